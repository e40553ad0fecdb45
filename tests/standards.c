/* What the standards ask and no other program shows: what ClientHellos and the answers to them say, which certificates,
 * suites and names are refused, what happens to records and fragments out of order. conformance.txt says where each
 * requirement is shown. Time is virtual and datagrams go through memory. check.h says how this runs. */
#include "virtual.h"
#include "world.h"

#include <openssl/rsa.h>

enum {
    RECORD = 13,  /* bytes of a record's header, and */
    MESSAGE = 12, /* of a handshake message's */
    RANDOM = 32,
    HANDSHAKE = 22,
    CLIENT_HELLO = 1,
    SERVER_HELLO = 2,
    HELLO_VERIFY = 3,
    CERTIFICATE = 11,
    HELLOS_MAX = 8,

    SERVER_NAME = 0, /* extensions */
    FRAGMENT_LENGTH = 1,
    GROUPS = 10,
    PROTOCOLS = 16,
    SIGNATURES = 13,
    EMS = 23,
    TICKET = 35,
    RENEGOTIATION = 0xff01,

    SESSION_S = 7200, /* libssl's limit, dtls.c leaves it */
    WINDOW = 32
};

/* What libssl asks for the age of sessions and certificates. */
time_t time(time_t *t)
{
    time_t now = (time_t)(1700000000 + now_us / 1000000);
    if (t)
        *t = now;
    return now;
}

static unsigned number(const unsigned char *p, int bytes)
{
    unsigned n = 0;
    for (int i = 0; i < bytes; i++)
        n = n << 8 | p[i];
    return n;
}

static void set_number(unsigned char *p, int bytes, unsigned n)
{
    for (int i = bytes; i > 0; n >>= 8)
        p[--i] = (unsigned char)n;
}

/* ---- hellos ---- */

static struct datagram said[HELLOS_MAX]; /* ClientHellos, ServerHellos and HelloVerifyRequests, as they came */
static size_t said_len;
static void (*change)(struct datagram *d); /* on its way */

/* The type of the message that begins the datagram; 0: none that can be read. */
static int says(const struct datagram *d)
{
    return d->len > RECORD + MESSAGE && d->data[0] == HANDSHAKE && number(d->data + 3, 2) == 0 ? d->data[RECORD] : 0;
}

/* For wire_drop; what it gets is turn()'s own copy. */
static int listen_in(const struct datagram *d)
{
    int type = says(d);
    if (change)
        change((struct datagram *)(uintptr_t)d);
    if (said_len < HELLOS_MAX && type >= CLIENT_HELLO && type <= HELLO_VERIFY)
        said[said_len++] = *d;
    return 0;
}

/* The n-th of its type; NULL: there were fewer. */
static const struct datagram *hello(int type, int n)
{
    for (size_t i = 0; i < said_len; i++)
        if (says(&said[i]) == type && n-- == 0)
            return &said[i];
    return NULL;
}

struct span {
    const unsigned char *at;
    size_t len;
};

struct parts {
    struct span session, cookie, suites, compressions, extensions; /* without their lengths */
};

/* What has its length, of so many bytes, in front. */
static struct span take(const unsigned char **p, int length_bytes)
{
    struct span s = {*p + length_bytes, number(*p, length_bytes)};
    *p = s.at + s.len;
    return s;
}

static struct parts parts(const struct datagram *d)
{
    struct parts h = {.cookie = {NULL, 0}};
    const unsigned char *p = d->data + RECORD + MESSAGE + 2 + RANDOM;
    h.session = take(&p, 1);
    if (says(d) == CLIENT_HELLO) {
        h.cookie = take(&p, 1);
        h.suites = take(&p, 2);
        h.compressions = take(&p, 1);
    } else { /* it chose one of each */
        h.suites = (struct span){p, 2};
        h.compressions = (struct span){p + 2, 1};
        p += 3;
    }
    if (p < d->data + RECORD + MESSAGE + number(d->data + RECORD + 1, 3))
        h.extensions = take(&p, 2);
    return h;
}

/* Without its number and length; at is NULL if the hello does not have it, or it is none. *times: how often it has. */
static struct span extension_times(const struct datagram *d, unsigned which, int *times)
{
    struct span found = {NULL, 0}, all = found;
    *times = 0;
    if (says(d) == CLIENT_HELLO || says(d) == SERVER_HELLO)
        all = parts(d).extensions;
    for (const unsigned char *p = all.at; p && p < all.at + all.len;) {
        unsigned type = number(p, 2);
        p += 2;
        struct span s = take(&p, 2);
        if (type == which) {
            found = s;
            ++*times;
        }
    }
    return found;
}

static struct span extension(const struct datagram *d, unsigned which)
{
    int times;
    return extension_times(d, which, &times);
}

/* The hello that begins the datagram grows by so many bytes at `at`. */
static void grow(struct datagram *d, size_t at, int by)
{
    unsigned char *message = d->data + RECORD;
    size_t extensions = (size_t)(parts(d).extensions.at - d->data) - 2;
    size_t from = by < 0 ? at + (size_t)-by : at;
    memmove(d->data + (by < 0 ? at : at + (size_t)by), d->data + from, d->len - from);
    d->len += (size_t)by;
    set_number(d->data + 11, 2, number(d->data + 11, 2) + (unsigned)by);
    set_number(message + 1, 3, number(message + 1, 3) + (unsigned)by);
    set_number(message + 9, 3, number(message + 9, 3) + (unsigned)by);
    set_number(d->data + extensions, 2, number(d->data + extensions, 2) + (unsigned)by);
}

static void strip(struct datagram *d, unsigned which)
{
    struct span e = extension(d, which);
    if (e.at)
        grow(d, (size_t)(e.at - d->data) - 4, -(int)(e.len + 4));
}

/* Whether the numbers of two bytes behind the first two have this one among them. */
static bool lists(struct span s, size_t from, unsigned which)
{
    for (size_t i = from; i + 1 < s.len; i += 2)
        if (number(s.at + i, 2) == which)
            return true;
    return false;
}

/* ---- two endpoints ---- */

static const char *const weak_suites = "ECDHE+AESGCM:@SECLEVEL=0";

/* What a hook does besides what world.h's does. */
static int (*server_more)(SSL_CTX *ctx), (*client_more)(SSL_CTX *ctx);

static int with_more(void *user, SSL_CTX *ctx)
{
    int (*more)(SSL_CTX *) = user == &server ? server_more : client_more;
    if (((const struct side *)user)->ciphers == weak_suites)
        SSL_CTX_set_security_level(ctx, 0); /* before it gets its key */
    return with_identity(user, ctx) || (more && more(ctx));
}

static void open_again(struct side *s, dtls_config cfg)
{
    dtls_endpoint_free(s->ep);
    cfg.send = on_send;
    cfg.on_event = on_event;
    cfg.user = s;
    cfg.on_ssl_ctx = with_more;
    s->ep = endpoint_new(loop, s == &server ? "server" : "client", cfg);
    if (s == &server)
        dtls_endpoint_listen(s->ep, NULL, NULL);
}

static void begin(dtls_config server_cfg, dtls_config client_cfg)
{
    said_len = 0;
    server.loop = client.loop = loop = dtls_loop_new(&world_clock);
    server_addr = address("192.0.2.1:4444");
    client_addr = address("192.0.2.2:5555");
    open_again(&server, server_cfg);
    open_again(&client, client_cfg);
    wire_drop = listen_in;
    check_values = print_sides;
}

static void finish(void)
{
    stop();
    change = NULL;
    server_more = client_more = NULL;
}

/* As connect_client(), to that name. */
static dtls_conn *connect_to(const char *name, SSL_SESSION *session)
{
    dtls_target t = {.peer = server_addr, .local = client_addr, .name = name, .session = session};
    client.conn = dtls_endpoint_connect(client.ep, &t, &connect_error);
    return client.conn;
}

/* Whether both are told that it is open, or the client why it is not. */
static bool connects(SSL_SESSION *session)
{
    int before = client.connected, at_server = server.connected, closed = client.closed;
    connect_client(session);
    for (int i = 0; i < PATIENCE_TURNS && client.connected == before && client.closed == closed; i++)
        turn();
    return client.connected > before && wait_for(&server.connected, at_server + 1);
}

static void part(void)
{
    int before = server.closed;
    dtls_conn_close(client.conn);
    wait_for(&server.closed, before + 1);
    said_len = 0;
}

static SSL_SESSION *first_session(void)
{
    REQUIRE(connects(NULL), "a first handshake");
    SSL_SESSION *session = dtls_conn_session(client.conn);
    part();
    return session;
}

/* RSA, or on that curve; NULL: not with this OpenSSL. */
static EVP_PKEY *make_key(int rsa_bits, int curve)
{
    EVP_PKEY *key = NULL;
    EVP_PKEY_CTX *maker = EVP_PKEY_CTX_new_id(rsa_bits ? EVP_PKEY_RSA : EVP_PKEY_EC, NULL);
    if (maker && EVP_PKEY_keygen_init(maker) == 1 &&
        (rsa_bits ? EVP_PKEY_CTX_set_rsa_keygen_bits(maker, rsa_bits)
                  : EVP_PKEY_CTX_set_ec_paramgen_curve_nid(maker, curve)) == 1)
        EVP_PKEY_keygen(maker, &key);
    EVP_PKEY_CTX_free(maker);
    return key;
}

static struct identity issue_key(EVP_PKEY *key, const EVP_MD *digest, const char *usage)
{
    struct identity id = issue(41, "a key", usage);
    EVP_PKEY_free(id.key);
    id.key = key;
    X509_set_pubkey(id.cert, key);
    X509_sign(id.cert, ca.key, digest);
    return id;
}

/* ---- RFC 6347 ---- */

static void test_hello_verify(void)
{
    begin((dtls_config){0}, (dtls_config){0});
    REQUIRE(connects(NULL), "handshake");
    const struct datagram *first = hello(CLIENT_HELLO, 0), *second = hello(CLIENT_HELLO, 1);
    const struct datagram *verify = hello(HELLO_VERIFY, 0), *answer = hello(SERVER_HELLO, 0);
    REQUIRE(first && second && verify && answer, "two ClientHellos, and what they got");
    const unsigned char *body = verify->data + RECORD + MESSAGE;
    CHECK_THAT(number(verify->data + 1, 2) == 0xfeff && number(body, 2) == 0xfeff,
               "a HelloVerifyRequest and its record have version 1.0");
    CHECK_THAT(memcmp(verify->data + 5, first->data + 5, 6) == 0 && memcmp(answer->data + 5, second->data + 5, 6) == 0,
               "HelloVerifyRequest and ServerHello have the record number of what they answer");
    CHECK_THAT(memcmp(second->data + 5, first->data + 5, 6) > 0, "which is another one each time");
    struct span cookie = parts(second).cookie;
    CHECK_THAT(parts(first).cookie.len == 0 && cookie.len == body[2] && memcmp(cookie.at, body + 3, cookie.len) == 0,
               "the second ClientHello has the cookie that came");
    size_t before = (size_t)(parts(first).cookie.at - 1 - first->data), head = RECORD + MESSAGE;
    size_t after = (size_t)(parts(first).suites.at - 2 - first->data);
    CHECK_THAT(second->len == first->len + cookie.len &&
                   memcmp(first->data + head, second->data + head, before - head) == 0 &&
                   memcmp(first->data + after, second->data + after + cookie.len, first->len - after) == 0,
               "and is otherwise the first one");
    finish();
}

static void test_replay_window(void)
{
    static struct datagram records[WINDOW];
    begin((dtls_config){0}, (dtls_config){0});
    REQUIRE(connects(NULL), "handshake");
    for (int i = 0; i < 3; i++)
        turn();
    for (size_t i = 0; i < WINDOW; i++) {
        CHECK(dtls_conn_send(client.conn, "hello", 5) == 0 && wire_len == 1);
        records[i] = wire[0];
        wire_len = 0;
    }
    for (size_t i = WINDOW; i-- > 0;)
        dtls_endpoint_input(server.ep, records[i].data, records[i].len, &client_addr, &server_addr);
    CHECK_EQ(server.messages, WINDOW, "32 records that arrive in the reverse order");
    for (size_t i = 0; i < WINDOW; i++)
        dtls_endpoint_input(server.ep, records[i].data, records[i].len, &client_addr, &server_addr);
    CHECK_EQ(server.messages, WINDOW, "and none of them twice");
    CHECK_THAT(server.closed == 0 && dtls_conn_send(client.conn, "alive", 5) == 0 && wait_for(&server.messages, 33),
               "the association is as it was");
    finish();
}

static int overlaps;

/* A Certificate that is whole becomes two fragments that have its middle in common; the later one comes first. The
 * numbers of their records are ones that nobody else uses. */
static void overlap(struct datagram *d)
{
    static unsigned char old[DATAGRAM_BYTES];
    size_t len = d->len, size;
    memcpy(old, d->data, len);
    d->len = 0;
    for (const unsigned char *p = old; p < old + len; p += size) {
        size = RECORD + number(p + 11, 2);
        unsigned body = number(p + RECORD + 1, 3);
        bool whole = p[0] == HANDSHAKE && p[4] == 0 && size == RECORD + MESSAGE + body;
        if (!whole || p[RECORD] != CERTIFICATE) {
            memcpy(d->data + d->len, p, size);
            d->len += size;
            continue;
        }
        for (unsigned i = 2; i-- > 0; overlaps++) {
            unsigned from = i * body / 3, part_len = body * 2 / 3 + (i ? body % 3 + 1 : 0);
            unsigned char *out = d->data + d->len;
            part_len = part_len > body - from ? body - from : part_len;
            memcpy(out, p, RECORD + MESSAGE);
            memcpy(out + RECORD + MESSAGE, p + RECORD + MESSAGE + from, part_len);
            out[10] = (unsigned char)(out[10] + 20 + i);
            set_number(out + 11, 2, MESSAGE + part_len);
            set_number(out + RECORD + 6, 3, from);
            set_number(out + RECORD + 9, 3, part_len);
            d->len += RECORD + MESSAGE + part_len;
        }
    }
}

static void test_overlapping(void)
{
    overlaps = 0;
    begin((dtls_config){0}, (dtls_config){0});
    change = overlap;
    CHECK_THAT(connects(NULL) && overlaps >= 4, "both certificates in fragments that overlap");
    finish();
}

/* ---- what is offered, and what is chosen ---- */

static bool suites_are_good(struct span suites)
{
    for (size_t i = 0; i + 1 < suites.len; i += 2) {
        unsigned n = number(suites.at + i, 2);
        bool gcm = n >= 0xc02b && n <= 0xc030 && n != 0xc02d && n != 0xc02e; /* ECDHE, not ECDH */
        bool chacha = n == 0xcca8 || n == 0xcca9;
        if (!gcm && !chacha && n != 0xff) /* the SCSV of RFC 5746, no suite */
            return false;
    }
    return suites.len > 2;
}

/* None with SHA-1, SHA-224, MD5 or DSA: RFC 8446 section 4.2.3 lists them. */
static bool signatures_are_good(struct span s)
{
    for (size_t i = 2; i + 1 < s.len; i += 2)
        if (s.at[i] < 4 || (s.at[i] < 8 && s.at[i + 1] == 2))
            return false;
    return s.len > 2;
}

/* 23 to 30 are P-256, P-384, P-521, Brainpool's from 256 bits on, X25519 and X448. */
static bool groups_are_good(struct span s)
{
    for (size_t i = 2; i + 1 < s.len; i += 2) {
        unsigned n = number(s.at + i, 2);
        if (n < 23 || n > 30)
            return false;
    }
    return s.len > 2;
}

static void test_offers(void)
{
    begin((dtls_config){0}, (dtls_config){0});
    REQUIRE(connects(NULL), "handshake");
    const struct datagram *d = hello(CLIENT_HELLO, 1), *answer = hello(SERVER_HELLO, 0);
    REQUIRE(d && answer, "hellos");
    struct parts offer = parts(d), choice = parts(answer);
    struct span groups = extension(d, GROUPS), signatures = extension(d, SIGNATURES);
    CHECK_EQ(number(d->data + RECORD + MESSAGE, 2), 0xfefd, "a ClientHello offers DTLS 1.2");
    CHECK_THAT(offer.compressions.len == 1 && offer.compressions.at[0] == 0, "no compression");
    CHECK_THAT(suites_are_good(offer.suites), "suites with ECDHE and AEAD, no others");
    CHECK_THAT(lists(offer.suites, 0, 0xff) || extension(d, RENEGOTIATION).at, "renegotiation_info, or its suite");
    CHECK_THAT(groups_are_good(groups) && lists(groups, 2, 23) && lists(groups, 2, 29),
               "curves of 255 bits and more, P-256 and X25519 among them");
    CHECK_THAT(signatures_are_good(signatures) && lists(signatures, 2, 0x403) && lists(signatures, 2, 0x401),
               "signatures with SHA-256 and better, by ECDSA and RSA");
    CHECK_THAT(extension(d, EMS).at && !extension(d, TICKET).at, "the extended master secret, and no tickets");
    CHECK_THAT(number(answer->data + RECORD + MESSAGE, 2) == 0xfefd && choice.compressions.at[0] == 0 &&
                   extension(answer, EMS).at && extension(answer, RENEGOTIATION).at,
               "a ServerHello says DTLS 1.2, no compression, extended master secret, renegotiation_info");
    finish();
}

/* The client's only suite. */
static void offer_rsa_transport(struct datagram *d)
{
    if (says(d) != CLIENT_HELLO)
        return;
    struct span suites = parts(d).suites;
    unsigned char *p = d->data + (suites.at - d->data);
    for (size_t i = 0; i < suites.len; i += 2)
        set_number(p + i, 2, 0x9d); /* TLS_RSA_WITH_AES_256_GCM_SHA384 */
}

static const char *chosen(void)
{
    static char name[64];
    dtls_info info = {.cipher = ""};
    if (connects(NULL))
        dtls_conn_info(client.conn, &info);
    snprintf(name, sizeof name, "%s", info.cipher ? info.cipher : "");
    return name;
}

static void test_choice(void)
{
    client.ciphers = "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384";
    begin((dtls_config){0}, (dtls_config){0});
    CHECK_TEXT(chosen(), "ECDHE-ECDSA-AES256-GCM-SHA384", "a server takes the stronger suite, the client's second");
    finish();

    struct identity rsa = issue_key(make_key(2048, 0), EVP_sha256(), "serverAuth");
    server.id = &rsa;
    begin((dtls_config){0}, (dtls_config){0});
    CHECK_TEXT(chosen(), "ECDHE-RSA-AES256-GCM-SHA384", "a server with a key of RSA, 2,048 bits");
    part();
    change = offer_rsa_transport;
    CHECK_THAT(!connects(NULL) && !hello(SERVER_HELLO, 0) && client.reason == DTLS_CLOSE_REFUSED,
               "a client that offers only RSA key transport is refused");
    finish();
    identity_free(&rsa);
}

/* ---- versions ---- */

static void answer_with_1_0(struct datagram *d)
{
    if (says(d) == SERVER_HELLO)
        set_number(d->data + RECORD + MESSAGE, 2, 0xfeff);
}

static int to_1_0(SSL_CTX *ctx)
{
    return SSL_CTX_set_min_proto_version(ctx, DTLS1_VERSION) != 1;
}

static int to_any(SSL_CTX *ctx)
{
    return SSL_CTX_set_min_proto_version(ctx, 0) != 1 || SSL_CTX_set_max_proto_version(ctx, 0) != 1;
}

static int to_only_1_0(SSL_CTX *ctx)
{
    return SSL_CTX_set_min_proto_version(ctx, DTLS1_VERSION) != 1 ||
           SSL_CTX_set_max_proto_version(ctx, DTLS1_VERSION) != 1;
}

static void test_versions(void)
{
    static int (*const hooks[])(SSL_CTX *) = {to_1_0, to_any, to_only_1_0};
    begin((dtls_config){0}, (dtls_config){0});
    change = answer_with_1_0;
    CHECK_THAT(!connects(NULL) && client.reason == DTLS_CLOSE_ERROR, "a server that answers with DTLS 1.0 is refused");
    int all = 0, good = 0;
    for (const struct datagram *d; (d = hello(CLIENT_HELLO, all)) != NULL; all++)
        good += number(d->data + RECORD + MESSAGE, 2) == 0xfefd;
    CHECK_THAT(all >= 2 && good == all, "and is asked for nothing below 1.2");
    for (size_t i = 0; i < sizeof hooks / sizeof *hooks; i++) {
        dtls_error err = {0};
        dtls_config cfg = {.send = on_send, .on_ssl_ctx = with_more, .user = &client};
        client_more = hooks[i];
        CHECK_THAT(!dtls_endpoint_new(loop, &cfg, &err) && strstr(err.text, "version"),
                   "a hook that changes the versions: %s", err.text);
    }
    finish();
}

/* ---- renegotiation_info and the extended master secret ---- */

static void without_renegotiation(struct datagram *d)
{
    if (says(d) == SERVER_HELLO)
        strip(d, RENEGOTIATION);
}

static void test_renegotiation_info(void)
{
    begin((dtls_config){0}, (dtls_config){0});
    change = without_renegotiation;
    CHECK_THAT(!connects(NULL) && client.reason == DTLS_CLOSE_ERROR && strstr(client.reason_text, "renegotiation"),
               "a server without renegotiation_info is refused: %s", client.reason_text);
    finish();
}

#ifdef SSL_OP_NO_EXTENDED_MASTER_SECRET
static const dtls_config lax = {.allow_no_ems = 1};

static int no_ems(SSL_CTX *ctx)
{
    SSL_CTX_set_options(ctx, SSL_OP_NO_EXTENDED_MASTER_SECRET);
    return 0;
}

static void test_ems(void)
{
    client_more = no_ems;
    begin(lax, lax);
    CHECK_THAT(connects(NULL) && !extension(hello(SERVER_HELLO, 0), EMS).at,
               "a server that allows it goes on without the extended master secret, and does not answer with it");
    finish();

    client_more = no_ems;
    begin((dtls_config){0}, lax);
    connects(NULL);
    CHECK_THAT(wait_for(&client.closed, 1) && server.connected == 0, "a client without it is refused");
    finish();

    server_more = no_ems;
    begin(lax, (dtls_config){0});
    CHECK_THAT(!connects(NULL) && client.reason != DTLS_CLOSE_REFUSED, "and a server without it: %s",
               client.reason_text);
    finish();
}

static bool stripped;

static void without_ems_once(struct datagram *d)
{
    if (says(d) != SERVER_HELLO || stripped)
        return;
    strip(d, EMS);
    stripped = true;
}

/* The session is with the extended master secret, or without it; then the client offers it in the other way. */
static void test_ems_resumed(void)
{
    begin(lax, lax);
    SSL_SESSION *session = first_session();
    REQUIRE(connects(session) && client.resumed, "a second handshake");
    CHECK_THAT(extension(hello(CLIENT_HELLO, 0), EMS).at && extension(hello(SERVER_HELLO, 0), EMS).at,
               "both say it again where they resume");
    part();
    change = without_ems_once;
    stripped = false;
    CHECK_THAT(connects(session) && stripped && !client.resumed && !server.resumed,
               "a client refuses to resume where the ServerHello lacks it, and begins anew");
    SSL_SESSION_free(session); /* libssl offers it no more */
    session = dtls_conn_session(client.conn);
    part();
    change = NULL;
    client_more = no_ems;
    open_again(&client, lax);
    int before = server.connected;
    CHECK_THAT(!connects(session) && parts(hello(CLIENT_HELLO, 0)).session.len > 0 && server.connected == before,
               "a server refuses to resume where the ClientHello lacks it: %s", client.reason_text);
    SSL_SESSION_free(session);
    finish();

    client_more = no_ems;
    begin(lax, lax);
    session = first_session();
    client_more = NULL;
    open_again(&client, (dtls_config){0});
    CHECK_THAT(connects(session) && !client.resumed && !server.resumed,
               "a session without it is not resumed by who has it");
    part();
    client_more = no_ems;
    open_again(&client, lax);
    open_again(&server, (dtls_config){0});
    before = server.connected;
    int closed = client.closed;
    connects(session);
    CHECK_THAT(wait_for(&client.closed, closed + 1) && server.connected == before,
               "nor is who offers it without accepted by a server that wants it");
    SSL_SESSION_free(session);
    finish();
}

#else
static void test_ems(void)
{
    test_skip("peers without it", "OpenSSL 1.1.1 cannot leave it out");
}

static void test_ems_resumed(void)
{
    test_ems();
}
#endif

/* ---- max_fragment_length ---- */

static int asks_for_512(SSL_CTX *ctx)
{
    return SSL_CTX_set_tlsext_max_fragment_length(ctx, TLSEXT_max_fragment_length_512) != 1;
}

static void answer_with_1024(struct datagram *d)
{
    struct span e = extension(d, FRAGMENT_LENGTH);
    if (says(d) == SERVER_HELLO && e.at)
        d->data[e.at - d->data] = TLSEXT_max_fragment_length_1024;
}

static void ask_for_nothing(struct datagram *d)
{
    if (says(d) == CLIENT_HELLO)
        d->data[extension(d, FRAGMENT_LENGTH).at - d->data] = 9;
}

/* The largest record of the server's that is not protected. */
static unsigned largest;

static void measure(struct datagram *d)
{
    for (size_t at = 0; d->from.port == server_addr.port && at + RECORD < d->len && d->data[at + 4] == 0;) {
        unsigned body = number(d->data + at + 11, 2);
        largest = body > largest ? body : largest;
        at += RECORD + body;
    }
}

static void test_fragment_length(void)
{
    static const char message[513] = "";
    client_more = asks_for_512;
    begin((dtls_config){0}, (dtls_config){0});
    change = measure;
    largest = 0;
    SSL_SESSION *session = first_session();
    CHECK_THAT(largest > 256 && largest <= 512, "handshake messages fit into 512 bytes: %u", largest);
    REQUIRE(connects(session) && client.resumed, "a second handshake");
    CHECK_THAT(extension(hello(CLIENT_HELLO, 0), FRAGMENT_LENGTH).at, "it is asked for again to resume");
    CHECK_THAT(dtls_conn_send(server.conn, message, 513) == DTLS_ERR_SIZE &&
                   dtls_conn_send(server.conn, message, 512) == 0 && wait_for(&client.messages, 1),
               "and holds for messages");
    part();
    change = answer_with_1024;
    CHECK_THAT(!connects(NULL) && client.reason == DTLS_CLOSE_ERROR, "another length than was asked for is refused: %s",
               client.reason_text);
    change = ask_for_nothing;
    int before = server.connected;
    CHECK_THAT(!connects(NULL) && server.connected == before, "a length that does not exist is refused: %s",
               client.reason_text);
    SSL_SESSION_free(session);
    finish();
}

/* ---- application protocols ---- */

static void answer_with_another(struct datagram *d)
{
    struct span e = extension(d, PROTOCOLS);
    if (says(d) == SERVER_HELLO && e.at)
        d->data[e.at - d->data + 3] = 'x';
}

static void test_protocols(void)
{
    static const char *const bad[] = {"", ",", "a,,b", "a,", ",a"};
    begin((dtls_config){.alpn = "b,a"}, (dtls_config){.alpn = "a,b"});
    REQUIRE(connects(NULL), "handshake");
    struct span offer = extension(hello(CLIENT_HELLO, 0), PROTOCOLS);
    struct span choice = extension(hello(SERVER_HELLO, 0), PROTOCOLS);
    CHECK_THAT(offer.len == 6 && memcmp(offer.at, "\0\4\1a\1b", 6) == 0, "a client offers its protocols in its order");
    CHECK_THAT(choice.len == 4 && memcmp(choice.at, "\0\2\1b", 4) == 0, "a server answers with its own first choice");
    part();
    change = answer_with_another;
    CHECK_THAT(!connects(NULL) && client.reason == DTLS_CLOSE_ERROR, "a protocol that was not offered is refused: %s",
               client.reason_text);
    change = NULL;
    open_again(&client, (dtls_config){.alpn = "c"});
    int before = server.connected;
    CHECK_THAT(!connects(NULL) && server.connected == before && strstr(client.reason_text, "no application protocol"),
               "no common protocol: %s", client.reason_text);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dtls_config cfg = {.send = on_send, .on_ssl_ctx = with_more, .user = &client, .alpn = bad[i]};
        CHECK_THAT(!dtls_endpoint_new(loop, &cfg, NULL), "an empty protocol in \"%s\"", bad[i]);
    }
    finish();
}

/* ---- names ---- */

/* What a ClientHello has as the server's name; NULL: none. */
static const char *named(const struct datagram *d)
{
    static char name[256];
    int times;
    struct span s = extension_times(d, SERVER_NAME, &times);
    if (!s.at)
        return NULL;
    if (times != 1 || s.len < 5 || number(s.at, 2) != s.len - 2 || s.at[2] != 0 || number(s.at + 3, 2) != s.len - 5)
        return "more than one name";
    snprintf(name, sizeof name, "%.*s", (int)(s.len - 5), (const char *)s.at + 5);
    return name;
}

static const char *named_for(const char *expected)
{
    said_len = wire_len = 0;
    if (!connect_to(expected, NULL))
        return "refused";
    for (int i = 0; i < 2; i++)
        turn();
    const char *name = hello(CLIENT_HELLO, 0) ? named(hello(CLIENT_HELLO, 0)) : "no ClientHello";
    dtls_conn_close(client.conn);
    return name ? name : "none";
}

static void test_server_names(void)
{
    static const struct {
        const char *expected, *sent;
    } names[] = {{"localhost", "localhost"},
                 {"host.example", "host.example"},
                 {"host.example.", "host.example"},
                 {"192.0.2.1", "none"},
                 {"2001:db8::1", "none"},
                 {NULL, "none"},
                 {"two words", "refused"},
                 {"a/b", "refused"},
                 {"h\xc3\xb6st.example", "refused"},
                 {"line\nline", "refused"},
                 {".example", "refused"},
                 {"", "refused"},
                 {"xn--hst-sna.example", "xn--hst-sna.example"}};
    begin((dtls_config){0}, (dtls_config){0});
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        CHECK_TEXT(named_for(names[i].expected), names[i].sent, "the name in a ClientHello, for row %zu", i);
    finish();

    begin((dtls_config){0}, (dtls_config){0});
    SSL_SESSION *session = first_session();
    REQUIRE(connects(session) && client.resumed, "a second handshake");
    const char *again = named(hello(CLIENT_HELLO, 0));
    CHECK_TEXT(again ? again : "none", "localhost", "and the same to resume");
    SSL_SESSION_free(session);
    finish();
}

/* A server's certificate; alt NULL: without a subjectAltName. */
static struct identity issue_named(const char *common_name, const char *alt)
{
    struct identity id = issue(40, common_name, "serverAuth");
    X509_EXTENSION_free(X509_delete_ext(id.cert, X509_get_ext_by_NID(id.cert, NID_subject_alt_name, -1)));
    if (alt)
        extend(id.cert, ca.cert, NID_subject_alt_name, alt);
    X509_sign(id.cert, ca.key, EVP_sha256());
    return id;
}

static void test_certificate_names(void)
{
    static const struct {
        const char *common_name, *alt, *expected;
        bool good;
    } rows[] = {{"host.example", NULL, "host.example", false},
                {"host.example", "DNS:other.example", "host.example", false},
                {"192.0.2.1", NULL, NULL, false},
                {"192.0.2.1", "DNS:192.0.2.1", NULL, false},
                {"x", "DNS:host.example", "host.example", true},
                {"x", "DNS:HOST.Example", "host.eXample", true},
                {"x", "IP:192.0.2.1", NULL, true},
                {"x", "IP:192.0.2.2", NULL, false},
                {"x", "DNS:*.host.example", "a.host.example", true},
                {"x", "DNS:*.host.example", "a.b.host.example", false},
                {"x", "DNS:*.host.example", "host.example", false},
                {"x", "DNS:a*.host.example", "ab.host.example", false},
                {"x", "DNS:*a.host.example", "ba.host.example", false},
                {"x", "DNS:a.*.example", "a.host.example", false},
                {"x", "DNS:*.*.example", "a.host.example", false},
                {"x", "DNS:*", "host", false}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        struct identity id = issue_named(rows[i].common_name, rows[i].alt);
        server.id = &id;
        begin((dtls_config){0}, (dtls_config){0});
        connect_to(rows[i].expected, NULL);
        for (int turns = 0; turns < PATIENCE_TURNS && !client.connected && !client.closed; turns++)
            turn();
        CHECK_THAT(rows[i].good ? client.connected == 1 : client.closed == 1 && client.reason == DTLS_CLOSE_VERIFY,
                   "common name %s, %s: %s for %s", rows[i].common_name, rows[i].alt ? rows[i].alt : "nothing else",
                   rows[i].good ? "good" : "refused", rows[i].expected ? rows[i].expected : "192.0.2.1");
        finish();
        identity_free(&id);
    }
}

/* ---- keys and signatures ---- */

/* The one has the key and no security level, the other one is as it should be. */
static void check_key(EVP_PKEY *key, const EVP_MD *digest, bool good, const char *what)
{
    for (int at_server = 0; at_server < 2; at_server++) {
        struct identity id = issue_key(key, digest, at_server ? "serverAuth" : "clientAuth");
        struct side *weak = at_server ? &server : &client, *strict = at_server ? &client : &server;
        EVP_PKEY_up_ref(key);
        weak->id = &id;
        weak->ciphers = weak_suites;
        begin((dtls_config){0}, (dtls_config){0});
        bool is_open = connects(NULL) && strict->connected == 1;
        CHECK_THAT(is_open == good && (good || strict->connected == 0), "a %s with %s: %s",
                   at_server ? "server" : "client", what, good ? "good" : "refused");
        finish();
        identity_free(&id);
    }
    EVP_PKEY_free(key);
}

static void test_keys(void)
{
    check_key(make_key(2048, 0), EVP_sha256(), true, "a key of RSA, 2,048 bits");
    check_key(make_key(1024, 0), EVP_sha256(), false, "a key of RSA, 1,024 bits");
    check_key(make_key(0, NID_X9_62_prime256v1), EVP_sha256(), true, "a key on P-256");
    check_key(make_key(0, NID_X9_62_prime256v1), EVP_sha1(), false, "a certificate that is signed with SHA-1");
    EVP_PKEY *small = make_key(0, NID_X9_62_prime192v1);
    if (small)
        check_key(small, EVP_sha256(), false, "a key on P-192");
    else
        test_skip("a key on P-192", "not in this OpenSSL");
}

static void test_own_key(void)
{
    struct identity id = issue_key(make_key(1024, 0), EVP_sha256(), "clientAuth");
    dtls_config cfg = {.send = on_send, .on_ssl_ctx = with_identity, .user = &client};
    dtls_error err = {0};
    begin((dtls_config){0}, (dtls_config){0});
    client.id = &id;
    CHECK_THAT(!dtls_endpoint_new(loop, &cfg, &err), "an endpoint with a key of RSA, 1,024 bits: %s", err.text);
    finish();
    identity_free(&id);
}

static int only_sha1(SSL_CTX *ctx)
{
    return SSL_CTX_set1_sigalgs_list(ctx, "ECDSA+SHA1") != 1;
}

static int only_p192(SSL_CTX *ctx)
{
    return SSL_CTX_set1_groups_list(ctx, "P-192") != 1;
}

static void test_signatures(void)
{
    for (int at_server = 0; at_server < 2; at_server++) {
        *(at_server ? &server_more : &client_more) = only_sha1;
        (at_server ? &server : &client)->ciphers = weak_suites;
        begin((dtls_config){0}, (dtls_config){0});
        const struct side *strict = at_server ? &client : &server;
        CHECK_THAT(!connects(NULL) && strict->connected == 0, "a %s that wants SHA-1 in signatures is refused",
                   at_server ? "server" : "client");
        finish();
    }
    EVP_PKEY *small = make_key(0, NID_X9_62_prime192v1);
    EVP_PKEY_free(small);
    if (!small) {
        test_skip("a client that wants P-192", "not in this OpenSSL");
        return;
    }
    client.ciphers = weak_suites;
    client_more = only_p192;
    begin((dtls_config){0}, (dtls_config){0});
    CHECK_THAT(!connects(NULL) && server.connected == 0, "a client that wants P-192 is refused");
    finish();
}

/* ---- sessions ---- */

static void test_old_sessions(void)
{
    begin((dtls_config){0}, (dtls_config){0});
    SSL_SESSION *session = first_session();
    now_us += (SESSION_S - 60) * (int64_t)1000000;
    CHECK_THAT(connects(session) && client.resumed, "a session of two hours, but for a minute, is resumed");
    part();
    now_us += 120 * (int64_t)1000000;
    CHECK_THAT(connects(session) && !client.resumed && !server.resumed, "two hours and a minute later it is not");
    SSL_SESSION_free(session);
    finish();
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"hello verify request", test_hello_verify},
        {"replay window", test_replay_window},
        {"overlapping fragments", test_overlapping},
        {"offers", test_offers},
        {"choice of suites", test_choice},
        {"versions", test_versions},
        {"renegotiation_info", test_renegotiation_info},
        {"extended master secret", test_ems},
        {"master secret and resumption", test_ems_resumed},
        {"max_fragment_length", test_fragment_length},
        {"application protocols", test_protocols},
        {"server names", test_server_names},
        {"names in certificates", test_certificate_names},
        {"weak keys", test_keys},
        {"weak key of one's own", test_own_key},
        {"weak signatures and curves", test_signatures},
        {"old sessions", test_old_sessions},
    };
    virtual_chance();
    virtual_identities();
    int status = RUN_TESTS("standards", tests, argc, argv);
    virtual_identities_free();
    return status;
}
