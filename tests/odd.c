/* Peers that are odd or mean, and what strangers may not do: long chains, small fragments, names, sessions, sizes, what
 * RFC 9325 asks for. In memory and virtual time. check.h says how this runs. */
#include "virtual.h"
#include "world.h"

#include <openssl/err.h>

static int count_of(dtls_drop reason)
{
    dtls_counters n;
    dtls_endpoint_counters(server.ep, &n);
    return (int)n.dropped[reason];
}

static void turns(int n)
{
    while (n-- > 0)
        turn();
}

static dtls_info info_of(const dtls_conn *conn)
{
    dtls_info info;
    dtls_conn_info(conn, &info);
    return info;
}

static void say(dtls_conn *to, const char *text)
{
    dtls_conn_send(to, text, strlen(text));
}

/* A connection that is really one: a message gets through, each way. */
static int talks(void)
{
    int there = server.messages, back = client.messages;
    if (!client.conn || !server.conn)
        return 0;
    say(client.conn, "there");
    int good = wait_for(&server.messages, there + 1);
    say(server.conn, "back");
    return good && wait_for(&client.messages, back + 1);
}

/* A session, and the connection it came from closed. */
static SSL_SESSION *session_of_one(void)
{
    int closed = server.closed, there = server.connected, here = client.connected;
    if (!connect_client(NULL) || !wait_for(&client.connected, here + 1) || !wait_for(&server.connected, there + 1))
        return NULL;
    SSL_SESSION *session = dtls_conn_session(client.conn);
    dtls_conn_close(client.conn);
    wait_for(&server.closed, closed + 1);
    return session;
}

/* ---- chains ---- */

static int chain_certificates, chain_curve;

/* Certificates that have nothing to do with the leaf: a stranger does not care. */
static int with_chain(SSL_CTX *ctx)
{
    for (int i = 0; i < chain_certificates; i++) {
        EC_KEY *ec = EC_KEY_new_by_curve_name(chain_curve);
        EVP_PKEY *key = EVP_PKEY_new();
        X509 *cert = X509_new();
        EC_KEY_set_conv_form(ec, POINT_CONVERSION_COMPRESSED); /* dearer to decode */
        EC_KEY_generate_key(ec);
        EVP_PKEY_assign_EC_KEY(key, ec);
        X509_set_pubkey(cert, key);
        X509_gmtime_adj(X509_getm_notBefore(cert), 0);
        X509_gmtime_adj(X509_getm_notAfter(cert), 1000);
        X509_sign(cert, ca.key, EVP_sha256());
        EVP_PKEY_free(key);
        if (SSL_CTX_add_extra_chain_cert(ctx, cert) != 1)
            return 1;
    }
    SSL_CTX_set_security_level(ctx, 0); /* the client's own: it would refuse to send such keys */
    return 0;
}

/* What a client with so many certificates costs the server, at most: processor time of its turns, in milliseconds. */
static double chain_cost(int certificates, int curve, dtls_config cfg)
{
    double most = 0;
    chain_certificates = certificates;
    chain_curve = curve;
    client.hook = with_chain;
    start(cfg, (dtls_config){0});
    connect_client(NULL);
    for (int i = 0; i < 100 && !server.connected && !client.closed; i++) {
        clock_t began = clock();
        turn();
        double ms = (double)(clock() - began) * 1e3 / CLOCKS_PER_SEC;
        most = ms > most ? ms : most;
    }
    return most;
}

static void test_long_chain(void)
{
    static const struct {
        const char *name;
        int nid;
    } curves[] = {{"P-256", NID_X9_62_prime256v1},
                  {"P-521", NID_secp521r1},
                  {"secp224r1", NID_secp224r1},
                  {"sect571r1", NID_sect571r1}};
    double one = chain_cost(0, NID_X9_62_prime256v1, (dtls_config){0});
    CHECK_THAT(server.connected == 1, "a client without a chain gets in");
    stop();
    for (size_t i = 0; i < sizeof curves / sizeof *curves; i++) {
        EC_KEY *ec = EC_KEY_new_by_curve_name(curves[i].nid);
        EC_KEY_free(ec);
        if (!ec)
            continue;
        double many = chain_cost(30, curves[i].nid, (dtls_config){0});
        CHECK_THAT(server.connected == 0, "30 certificates of %s are refused", curves[i].name);
        printf("# odd: a turn with 30 certificates of %s: %.1f ms; one without a chain: %.1f ms\n", curves[i].name,
               many, one);
        stop();
    }
    chain_cost(4, NID_X9_62_prime256v1, (dtls_config){0});
    CHECK_THAT(server.connected == 1, "four more certificates than its own are taken");
    stop();
    chain_cost(30, NID_X9_62_prime256v1, (dtls_config){.max_chain_bytes = 65536});
    CHECK_THAT(server.connected == 1, "30 where the configuration allows that");
    stop();
    chain_cost(30, NID_X9_62_prime256v1, (dtls_config){.max_chain_bytes = 2048});
    CHECK_THAT(server.connected == 0 && count_of(DTLS_DROP_HANDSHAKE) > 0, "what is longer does not reach libssl");
    stop();

    server.hook = with_chain;
    chain_certificates = 30;
    start((dtls_config){0}, (dtls_config){0});
    connect_client(NULL);
    CHECK_THAT(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_VERIFY &&
                   strstr(client.reason_text, "too many in its chain"),
               "a server's are refused by the client");
    stop();
}

/* A chain takes fifty times the memory of a session. */
static void test_session_without_chain(void)
{
    chain_certificates = 4;
    chain_curve = NID_X9_62_prime256v1;
    client.hook = with_chain;
    start((dtls_config){.session_cache = 3}, (dtls_config){0});
    CHECK(connected());
    CHECK_EQ(sk_X509_num(SSL_get_peer_cert_chain(dtls_conn_ssl(server.conn))), 4,
             "a client with four more certificates");
    SSL_SESSION *session = dtls_conn_session(client.conn);
    dtls_conn_close(client.conn);
    wait_for(&server.closed, 1);
    connect_client(session);
    CHECK_THAT(wait_for(&server.connected, 2) && wait_for(&client.connected, 2) && server.resumed,
               "resumes its session");
    CHECK_THAT(sk_X509_num(SSL_get_peer_cert_chain(dtls_conn_ssl(server.conn))) <= 0, "which was kept without them");
    CHECK_TEXT(info_of(server.conn).peer_name, "client", "and the server knows whom it has");
    dtls_conn_close(client.conn);
    wait_for(&server.closed, 2);
    for (int i = 0; i < 3; i++)
        SSL_SESSION_free(session_of_one());
    connect_client(session);
    CHECK_THAT(wait_for(&server.connected, 6) && !server.resumed,
               "three newer ones take its place in a cache of three");
    SSL_SESSION_free(session);
    stop();
}

/* ---- sizes ---- */

static int with_512_byte_fragments(SSL_CTX *ctx)
{
    return SSL_CTX_set_tlsext_max_fragment_length(ctx, TLSEXT_max_fragment_length_512) != 1;
}

static int with_1000_byte_fragments(SSL_CTX *ctx)
{
    return SSL_CTX_set_max_send_fragment(ctx, 1000) != 1;
}

static void test_smaller_fragments(void)
{
    static const struct {
        int (*of_client)(SSL_CTX *ctx), (*of_server)(SSL_CTX *ctx);
        size_t max;
        const char *what;
    } cases[] = {{with_512_byte_fragments, NULL, 512, "max_fragment_length of the client"},
                 {NULL, with_1000_byte_fragments, 1000, "max_send_fragment of the server"}};
    static char big[2000];
    for (size_t i = 0; i < 2; i++) {
        client.hook = cases[i].of_client;
        server.hook = cases[i].of_server;
        start((dtls_config){0}, (dtls_config){0});
        CHECK_THAT(connected(), "%s: connected", cases[i].what);
        CHECK_THAT(dtls_conn_payload_max(server.conn) <= cases[i].max, "%s: and it is known", cases[i].what);
        CHECK_THAT(dtls_conn_send(server.conn, big, cases[i].max + 1) == DTLS_ERR_SIZE && !server.closed,
                   "%s: a larger message is refused", cases[i].what);
        CHECK_THAT(dtls_conn_send(server.conn, big, cases[i].max) == 0 && wait_for(&client.messages, 1) &&
                       client.last_len == cases[i].max,
                   "%s: one that fits arrives", cases[i].what);
        CHECK_THAT(talks(), "%s: the connection is unharmed", cases[i].what);
        stop();
    }
}

/* Joins two datagrams to the same place. */
static int join(const struct datagram *d)
{
    if (wire_len == 0 || d->len < 5000)
        return 0;
    unsigned char both[20000];
    memcpy(both, d->data, d->len);
    memcpy(both + d->len, wire[0].data, wire[0].len);
    dtls_endpoint_input(d->to.port == server_addr.port ? server.ep : client.ep, both, d->len + wire[0].len, &d->from,
                        &d->to);
    wire[0].len = 0;
    return 1;
}

static void test_two_large_records(void)
{
    static char big[9000];
    start((dtls_config){0}, (dtls_config){0});
    CHECK(connected());
    wire_drop = join;
    dtls_conn_send(client.conn, big, sizeof big);
    dtls_conn_send(client.conn, big, sizeof big);
    turns(3);
    CHECK_EQ(server.messages, 2, "two records of 9,000 bytes in one datagram are both read");
    wire_drop = NULL;
    CHECK_THAT(talks(), "and the connection goes on");
    stop();
}

/* ---- names ---- */

static struct identity issue_named(const char *common_name, const char *alt_names, const char *usage)
{
    struct identity id = issue(20, "x", usage);
    X509_NAME *subject = X509_NAME_new();
    X509_NAME_ENTRY *entry =
        X509_NAME_ENTRY_create_by_NID(NULL, NID_commonName, V_ASN1_UTF8STRING, (const unsigned char *)common_name,
                                      (int)strlen(common_name)); /* this does not look at the length */
    X509_NAME_add_entry(subject, entry, -1, 0);
    X509_set_subject_name(id.cert, subject);
    X509_EXTENSION_free(X509_delete_ext(id.cert, X509_get_ext_by_NID(id.cert, NID_subject_alt_name, -1)));
    if (alt_names)
        extend(id.cert, ca.cert, NID_subject_alt_name, alt_names);
    X509_sign(id.cert, ca.key, EVP_sha256());
    X509_NAME_ENTRY_free(entry);
    X509_NAME_free(subject);
    return id;
}

/* What the server calls a client of that name; NULL: it does not let it in. */
static const char *shown(const char *common_name)
{
    static char names[2][1100];
    static int next;
    struct identity id = issue_named(common_name, NULL, "clientAuth");
    char *name = names[next++ % 2];
    client.id = &id;
    start((dtls_config){0}, (dtls_config){.handshake_timeout_ms = 3000});
    bool in = connected();
    snprintf(name, sizeof names[0], "%s", in ? info_of(server.conn).peer_name : "");
    stop();
    identity_free(&id);
    return in ? name : NULL;
}

static void test_names(void)
{
    char a[300], b[300];
    memset(a, 'x', sizeof a);
    memset(b, 'x', sizeof b);
    a[100] = b[100] = 0;
    b[99] = 'y';
    const char *one = shown(a), *other = shown(b);
    CHECK_THAT(one && other && strcmp(one, other) != 0 && strcmp(one, a) == 0, "names that differ at their 100th byte");
    one = shown("a\nb");
    other = shown("a?b");
    CHECK_THAT(one && other && strcmp(one, other) != 0 && strcmp(one, "a\\x0ab") == 0, "and in a control character");
    one = shown("a\\x0ab");
    CHECK_THAT(one && strcmp(one, "a\\x5cx0ab") == 0, "and from one that only looks escaped");
    a[100] = 'x';
    a[256] = 0;
    CHECK_THAT(shown(a) != NULL, "256 bytes are taken");
    a[256] = 'x';
    a[257] = 0;
    CHECK_THAT(shown(a) == NULL, "257 are not");

    struct identity id =
        issue_named("alice", "DNS:alice.example,IP:192.0.2.7,IP:2001:db8::7,URI:urn:x:1,email:a@b.c", "clientAuth");
    static const char *const alt[] = {"DNS:alice.example", "IP:192.0.2.7", "IP:2001:db8::7", "URI:urn:x:1",
                                      "email:a@b.c"};
    unsigned char digest[32];
    char hex[65];
    X509_digest(id.cert, EVP_sha256(), digest, NULL);
    for (int i = 0; i < 32; i++)
        snprintf(hex + 2 * i, 3, "%02x", digest[i]);
    client.id = &id;
    start((dtls_config){0}, (dtls_config){0});
    CHECK(connected());
    dtls_info info = info_of(server.conn);
    int same = 0;
    while (same < 5 && info.peer_alt_names[same] && strcmp(info.peer_alt_names[same], alt[same]) == 0)
        same++;
    CHECK_THAT(same == 5 && !info.peer_alt_names[5], "the subjectAltNames, each with its kind");
    CHECK_TEXT(info.peer_fingerprint, hex, "the fingerprint is SHA-256 of the certificate");
    stop();
    identity_free(&id);
}

static void test_words_of_a_mismatch(void)
{
    struct identity nameless = issue_named("server", NULL, "serverAuth");
    static const char *const words[] = {"bank.example was wanted, the certificate has DNS:localhost",
                                        "bank.example was wanted, the certificate has no subjectAltName"};
    for (int i = 0; i < 2; i++) {
        server.id = i == 0 ? NULL : &nameless;
        start((dtls_config){0}, (dtls_config){0});
        dtls_target t = {.peer = server_addr, .local = client_addr, .name = "bank.example"};
        dtls_endpoint_connect(client.ep, &t, NULL);
        wait_for(&client.closed, 1);
        CHECK_THAT(client.reason == DTLS_CLOSE_VERIFY && strstr(client.reason_text, words[i]), "\"%s\"", words[i]);
        stop();
    }
    identity_free(&nameless);
}

/* ---- limits ---- */

static void connect_from(uint16_t port)
{
    client_addr.port = port;
    connect_client(NULL);
}

static void test_identity_limit(void)
{
    start((dtls_config){.max_conns_per_identity = 2}, (dtls_config){0});
    for (uint16_t i = 0; i < 2; i++) {
        connect_from((uint16_t)(6000 + i));
        CHECK(wait_for(&server.connected, i + 1) && wait_for(&client.connected, i + 1));
    }
    connect_from(6002);
    CHECK_THAT(wait_for(&client.closed, 1) && server.connected == 2, "a third connection of a certificate ends");
    dtls_conn_close(server.conn);
    wait_for(&client.closed, 2);
    connect_from(6003);
    CHECK_THAT(wait_for(&server.connected, 3), "when one has closed there is a place again");
    struct identity other = issue_named("other", NULL, "clientAuth");
    dtls_endpoint *same = client.ep;
    client.id = &other;
    side_open(&client, "client", (dtls_config){.send = on_send});
    connect_from(6004);
    CHECK_THAT(wait_for(&server.connected, 4), "another certificate has its own places");
    dtls_endpoint_free(same);
    stop();
    identity_free(&other);
}

static int seen, nulls;

static void see(dtls_conn *conn, void *user)
{
    (void)user;
    seen += conn != NULL;
    nulls += conn == NULL;
}

static void see_and_close(dtls_conn *conn, void *user)
{
    see(conn, user);
    if (conn && seen == 1)
        dtls_conn_close(conn);
    if (conn && seen == 5) {
        dtls_endpoint_free(server.ep);
        server.ep = NULL;
    }
}

static void test_walk(void)
{
    start((dtls_config){0}, (dtls_config){0});
    for (uint16_t i = 0; i < 40; i++) {
        connect_from((uint16_t)(6000 + i));
        wait_for(&server.connected, i + 1);
    }
    seen = nulls = 0;
    CHECK(dtls_endpoint_walk(server.ep, see, NULL) == 0);
    turns(10);
    CHECK_THAT(seen == 40 && nulls == 1, "a walk sees each connection once, and says when it is through");
    seen = nulls = 0;
    dtls_conn_close(client.conn);
    wait_for(&server.closed, 1);
    CHECK(dtls_endpoint_walk(server.ep, see_and_close, NULL) == 0);
    turns(10);
    CHECK_THAT(seen == 5 && nulls == 1, "its function may close connections and free the endpoint");
    stop();
}

static int logged, summed;
static char last_sum[300];

static void count_lines(void *user, dtls_log level, const char *line)
{
    (void)user;
    if (level > DTLS_LOG_WARNING)
        return;
    logged++;
    if (strstr(line, " more in ")) {
        summed++;
        snprintf(last_sum, sizeof last_sum, "%s", line);
    }
}

/* A ClientHello with its cookie from so many ports, and nothing more. */
static int drop_after_cookie(const struct datagram *d)
{
    return d->to.port != server_addr.port && d->data[13] != 3;
}

static void test_log_of_strangers(void)
{
    start((dtls_config){.on_log = count_lines, .handshake_timeout_ms = 1000},
          (dtls_config){.handshake_timeout_ms = 500});
    wire_drop = drop_after_cookie;
    logged = summed = 0;
    for (uint16_t i = 0; i < 200; i++)
        connect_from((uint16_t)(6000 + i));
    turns(300);
    CHECK_THAT(logged - summed == 5, "of 200 handshakes that time out five are in the log (%d)", logged);
    turns(1000);
    CHECK_THAT(summed == 1 && strstr(last_sum, "and 195 more in") && strstr(last_sum, "timed out"),
               "then one line about the others: %s", last_sum);
    turns(1500);
    logged = summed = 0;
    connect_from(7000);
    turns(200);
    CHECK_EQ(logged, 1, "after a quiet time it is news again");
    stop();
}

/* Clients of the first eight networks of site 1 get nothing but cookies. */
static int drop_after_cookie_of_site_1(const struct datagram *d)
{
    return d->to.family == 6 && d->to.ip[5] == 1 && d->to.ip[7] < 8 && d->data[13] != 3;
}

static void connect_from_site(unsigned site, unsigned net, unsigned port)
{
    char text[DTLS_ADDR_TEXT];
    snprintf(text, sizeof text, "[2001:db8:%x:%x::1]:%u", site, net, port);
    client_addr = address(text);
    connect_client(NULL);
    turns(8);
}

static int handshakes(void)
{
    dtls_counters n;
    dtls_endpoint_counters(server.ep, &n);
    return (int)n.handshakes;
}

/* Somebody with a /48 has 65,536 networks of 64 bits, and one share. */
static void test_shares_of_ipv6(void)
{
    start((dtls_config){.max_handshakes = 8}, (dtls_config){.retransmit_ms = 5000});
    wire_drop = drop_after_cookie_of_site_1;
    for (unsigned net = 0; net < 40; net++)
        connect_from_site(1, net % 8, 7000 + net);
    CHECK_EQ(handshakes(), 8, "eight networks of one site fill the places");
    connect_from_site(2, 0, 7000);
    CHECK_EQ(server.connected, 1, "a client of another site gets in");
    stop();

    start((dtls_config){.max_handshakes = 8}, (dtls_config){.retransmit_ms = 5000});
    wire_drop = drop_after_cookie_of_site_1;
    connect_from_site(1, 1, 7000);
    for (unsigned port = 7000; port < 7040; port++)
        connect_from_site(1, 0, port);
    CHECK_EQ(handshakes(), 8, "one network of a site fills them");
    connect_from_site(1, 9, 7000);
    CHECK_EQ(server.connected, 1, "a client of another network of that site gets in");
    stop();

    start((dtls_config){.max_handshakes = 8}, (dtls_config){.retransmit_ms = 5000});
    wire_drop = drop_after_cookie_of_site_1;
    for (unsigned net = 0; net < 8; net++)
        connect_from_site(1, net, 7000);
    connect_from_site(1, 8, 7000);
    CHECK_EQ(server.connected, 0, "where all have the same share a newcomer has to wait");
    now_us += 3500000;
    turn();
    connect_from_site(1, 9, 7000);
    CHECK_EQ(server.connected, 1, "until one had its time");
    stop();
}

/* ---- messages in pieces, and in others' places ---- */

enum { RECORD = 13, MESSAGE = 12, HEADERS = RECORD + MESSAGE };

static size_t record_size(const unsigned char *p)
{
    size_t cid = p[0] == 25 ? 8 : 0; /* a server's connection ID */
    return RECORD + cid + (size_t)(p[11 + cid] << 8 | p[12 + cid]);
}

static void deliver(const struct datagram *d, const unsigned char *p, size_t n)
{
    dtls_endpoint_input(d->to.port == server_addr.port ? server.ep : client.ep, p, n, &d->from, &d->to);
}

/* Makes a record of a piece of the message that the record p holds; returns its size. */
static size_t cut_piece(unsigned char *out, const unsigned char *p, size_t offset, size_t len)
{
    memcpy(out, p, HEADERS);
    memcpy(out + HEADERS, p + HEADERS + offset, len);
    out[11] = (unsigned char)((MESSAGE + len) >> 8);
    out[12] = (unsigned char)(MESSAGE + len);
    for (int i = 0; i < 2; i++) {
        out[20 + i] = (unsigned char)(offset >> (8 - 8 * i));
        out[23 + i] = (unsigned char)(len >> (8 - 8 * i));
    }
    return HEADERS + len;
}

static size_t message_size(const unsigned char *p)
{
    return (size_t)(p[15] << 8 | p[16]);
}

static char last_line[400];

static void keep_last(void *user, dtls_log level, const char *line)
{
    (void)user;
    if (level == DTLS_LOG_WARNING)
        snprintf(last_line, sizeof last_line, "%s", line);
}

static int put_before; /* records that were not the peer's */

/* Each record of a handshake alone, and ahead of a plaintext one what this makes of it. */
static int put_ahead(const struct datagram *d, void (*make)(const struct datagram *d, const unsigned char *p))
{
    for (size_t at = 0; at < d->len; at += record_size(d->data + at)) {
        const unsigned char *p = d->data + at;
        if (p[0] == 22 && p[4] == 0)
            make(d, p);
        deliver(d, p, record_size(p));
    }
    return 1;
}

static void make_empty(const struct datagram *d, const unsigned char *p)
{
    unsigned char piece[HEADERS];
    for (int end = 0; end < 2; end++, put_before++)
        deliver(d, piece, cut_piece(piece, p, end ? message_size(p) : 0, 0));
}

static int with_empty_fragments(const struct datagram *d)
{
    return put_ahead(d, make_empty);
}

/* It goes on at once, however much of that is put ahead. */
static void handshake_among(int (*put)(const struct datagram *d), int at_least)
{
    int64_t began = now_us;
    start((dtls_config){0}, (dtls_config){0});
    wire_drop = put;
    put_before = 0;
    CHECK_THAT(connected() && now_us - began < 500000, "a handshake goes on at once");
    CHECK_THAT(put_before >= at_least, "there were some (%d)", put_before);
    wire_drop = NULL;
    CHECK(talks());
    stop();
}

static void test_empty_fragments(void)
{
    handshake_among(with_empty_fragments, 20);
}

/* What no peer sends that is in order: a Certificate of 64 KB, and with the message_seq and the body of what is due
 * another type: a HelloRequest, a Finished, one that nobody knows, one of the receiver's own. */
static void make_unfit(const struct datagram *d, const unsigned char *p)
{
    static unsigned char unfit[DATAGRAM_BYTES];
    const unsigned char types[] = {11, 0, 20, 42, d->to.port == server_addr.port ? 12 : 16};
    for (size_t i = 0; i < sizeof types; i++, put_before++) {
        memcpy(unfit, p, record_size(p));
        unfit[RECORD] = types[i];
        if (i == 0) {
            unfit[14] = 1;
            unfit[15] = unfit[16] = 0;
        }
        deliver(d, unfit, record_size(p));
    }
}

static int with_unfit_messages(const struct datagram *d)
{
    return put_ahead(d, make_unfit);
}

/* libssl alone ends a handshake over each of them, and anybody can write one. */
static void test_unfit_messages(void)
{
    handshake_among(with_unfit_messages, 50);
}

static int alert_to[2], wrong_from, wrong_to, wrong_way; /* the last fatal alert, to the client and to the server */

static int listen_for_alerts(const struct datagram *d)
{
    int to_server = d->to.port == server_addr.port;
    for (size_t at = 0; at < d->len; at += record_size(d->data + at)) {
        unsigned char *p = (unsigned char *)(uintptr_t)(d->data + at); /* turn()'s own copy */
        if (p[0] == 21 && p[4] == 0 && p[RECORD] == 2)
            alert_to[to_server] = p[RECORD + 1];
        if (p[0] == 22 && p[4] == 0 && wrong_way == to_server && p[RECORD] == wrong_from)
            p[RECORD] = (unsigned char)wrong_to;
    }
    return 0;
}

/* Somebody may have forged what does not fit, so it ends no handshake. But when that is over anyway the peer is told. */
static void test_unfit_message_at_the_end(void)
{
    static const struct {
        const char *what;
        int certificates, way, from, to, alert;
        const char *words;
    } cases[] = {{"a client's chain", 30, 1, 0, 0, 47, "bytes came, max_chain_bytes is 2048"},
                 {"a server's chain", 30, 0, 0, 0, 47, "bytes came, max_chain_bytes is 2048"},
                 {"a client's CertificateVerify for its ClientKeyExchange", 0, 1, 16, 15, 10, "of type 15"},
                 {"a server's ClientKeyExchange for its Certificate", 0, 0, 11, 16, 10, "of type 16"},
                 {"a server's Finished for its ServerHelloDone", 0, 0, 14, 20, 10, "of type 20"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        /* Ours would begin anew after 8 s. */
        dtls_config far = {.handshake_timeout_ms = 60000, .max_chain_bytes = 65536};
        dtls_config near = {.handshake_timeout_ms = 3000, .max_chain_bytes = 2048, .on_log = keep_last};
        int way = cases[i].way;
        chain_certificates = cases[i].certificates;
        chain_curve = NID_X9_62_prime256v1;
        (way ? &client : &server)->hook = with_chain;
        wrong_from = cases[i].from;
        wrong_to = cases[i].to;
        wrong_way = way;
        start(way ? near : far, way ? far : near);
        wire_drop = listen_for_alerts;
        alert_to[0] = alert_to[1] = 0;
        last_line[0] = 0;
        connect_client(NULL);
        turns(280);
        CHECK_THAT(!alert_to[0] && !alert_to[1], "%s: silence", cases[i].what);
        turns(40);
        CHECK_EQ(alert_to[!way], cases[i].alert, "and an alert at the end");
        CHECK_THAT(strstr(last_line, cases[i].words), "and words: %s", last_line);
        stop();
    }
}

static size_t hello_piece; /* bytes of a ClientHello in a record, */
static int hello_packed;   /* with all its records in one datagram */

static int cut_hellos(const struct datagram *d)
{
    static unsigned char pieces[DATAGRAM_BYTES];
    const unsigned char *p = d->data;
    size_t size = 0;
    if (p[0] != 22 || p[4] != 0 || p[RECORD] != 1)
        return 0;
    for (size_t at = 0, len; at < message_size(p); at += len) {
        len = message_size(p) - at < hello_piece ? message_size(p) - at : hello_piece;
        size += cut_piece(pieces + size, p, at, len);
        if (hello_packed && at + len < message_size(p))
            continue;
        deliver(d, pieces, size);
        size = 0;
    }
    return 1;
}

/* Before a cookie has come back nothing is kept, not even a piece of a message. So the first piece has to hold the cookie:
 * version, random, session id and cookie, each of the two with its length, are 52 bytes, and 84 with a session id. */
static void test_hello_in_pieces(void)
{
    static const struct {
        size_t piece;
        int offers, good, packed;
    } cases[] = {{52, 0, 1, 0}, {51, 0, 0, 0}, {35, 0, 0, 0}, {1, 0, 0, 0},
                 {84, 1, 1, 0}, {83, 1, 0, 0}, {52, 0, 1, 1}, {51, 0, 0, 1}};
    start((dtls_config){0}, (dtls_config){0});
    SSL_SESSION *session = session_of_one();
    stop();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        start((dtls_config){0}, (dtls_config){.handshake_timeout_ms = 5000});
        wire_drop = cut_hellos;
        hello_piece = cases[i].piece;
        hello_packed = cases[i].packed;
        connect_client(cases[i].offers ? session : NULL);
        turns(30);
        CHECK_THAT(server.connected == cases[i].good && (cases[i].good || handshakes() == 0),
                   "pieces of %zu bytes%s%s%s", hello_piece, cases[i].offers ? ", with a session" : "",
                   hello_packed ? ", in one datagram" : "",
                   cases[i].good ? "" : " are too small, and nothing of them is kept");
        stop();
    }
    SSL_SESSION_free(session);
}

/* ---- sessions ---- */

static void test_saved_session(void)
{
    unsigned char bytes[4096], *end = bytes;
    dtls_counters n;
    start((dtls_config){0}, (dtls_config){0});
    SSL_SESSION *session = session_of_one();
    REQUIRE(session && i2d_SSL_SESSION(session, NULL) < (int)sizeof bytes, "a session to save");
    int len = i2d_SSL_SESSION(session, &end);
    SSL_SESSION_free(session);
    dtls_endpoint_free(client.ep); /* another process */
    const unsigned char *begin = bytes;
    session = d2i_SSL_SESSION(NULL, &begin, len);
    for (int i = 0; i < 2; i++) {
        client.ciphers = i == 0 ? NULL : "ECDHE-ECDSA-CHACHA20-POLY1305";
        client.resumed = 0;
        side_open(&client, "client", (dtls_config){.send = on_send});
        int64_t began = now_us;
        connect_client(session);
        wait_for(&client.connected, i + 2);
        dtls_endpoint_counters(client.ep, &n);
        CHECK_THAT(client.resumed == (i == 0) && n.handshakes_failed == 0 && now_us - began < 1000000, "%s",
                   i == 0 ? "a saved session resumes in another endpoint"
                          : "one whose suite it does not have leads to a full handshake at once");
        wait_for(&server.connected, i + 2);
        dtls_endpoint_free(client.ep);
    }
    client.ciphers = NULL;
    side_open(&client, "client", (dtls_config){.send = on_send});
    dtls_target t = {.peer = server_addr, .local = client_addr, .name = "elsewhere.example", .session = session};
    int closed = client.closed;
    dtls_endpoint_connect(client.ep, &t, NULL);
    wait_for(&client.closed, closed + 1);
    dtls_endpoint_counters(client.ep, &n);
    CHECK_THAT(client.reason == DTLS_CLOSE_VERIFY && n.handshakes_resumed == 0, "one of another name is not offered");
    SSL_SESSION_free(session);
    stop();
}

static struct datagram certificate[2]; /* the first datagram with one, to the client and to the server */
static int forging;

static int keep_certificate(const struct datagram *d)
{
    if (d->data[0] == 22 && d->data[13] == 11 && !certificate[d->to.port == server_addr.port].len)
        certificate[d->to.port == server_addr.port] = *d;
    return 0;
}

/* Behind each real datagram of a handshake, and ahead of it, comes the Certificate of an earlier one. */
static int forge_certificates(const struct datagram *d)
{
    struct datagram *c = &certificate[d->to.port == server_addr.port];
    forging++;
    dtls_endpoint_input(d->to.port == server_addr.port ? server.ep : client.ep, c->data, c->len, &d->from, &d->to);
    return 0;
}

/* Another client's id, in a handshake of one's own: the session is offered with other suites, and then left. */
static void steal(const SSL_SESSION *session)
{
    dtls_endpoint *own = client.ep;
    struct identity mallory = issue_named("mallory", NULL, "clientAuth");
    const struct identity *was = client.id;
    SSL_SESSION *stolen = SSL_SESSION_dup((SSL_SESSION *)(uintptr_t)session);
    static const unsigned char guess[48] = "not the master secret";
    SSL_SESSION_set1_master_key(stolen, guess, sizeof guess);
    client.id = &mallory;
    side_open(&client, "client", (dtls_config){.send = on_send, .handshake_timeout_ms = 2000});
    client_addr.port++;
    connect_client(stolen);
    turns(300);
    dtls_endpoint_free(client.ep);
    client_addr.port--;
    client.ep = own;
    client.id = was;
    SSL_SESSION_free(stolen);
    identity_free(&mallory);
}

static void test_stolen_session(void)
{
    start((dtls_config){.mtu_bytes = 400}, (dtls_config){.mtu_bytes = 400});
    wire_drop = keep_certificate;
    SSL_SESSION *session = session_of_one();
    CHECK(session && certificate[0].len && certificate[1].len);
    wire_drop = forge_certificates;
    for (int i = 0; i < 3; i++) {
        int was = client.connected;
        client.resumed = 0;
        connect_client(session);
        CHECK_THAT(wait_for(&client.connected, was + 1) && client.resumed && forging > 0,
                   "a handshake is resumed among Certificates of an earlier one");
        dtls_conn_close(client.conn);
        wait_for(&server.closed, was + 1);
    }
    wire_drop = NULL;
    steal(session);
    int was = client.connected;
    client.resumed = 0;
    connect_client(session);
    CHECK_THAT(wait_for(&client.connected, was + 1) && client.resumed,
               "who saw the id, but has not its key, takes the session away from nobody");
    SSL_SESSION_free(session);
    stop();
}

/* ---- transports ---- */

static int sends, refuse_at;
static dtls_endpoint *refusing;

static int refusing_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    struct side *s = user;
    if (s->ep == refusing && !s->connected && ++sends == refuse_at)
        return -1;
    return on_send(user, data, len, from, to);
}

static void test_refusing_transport(void)
{
    for (int of_server = 0; of_server < 2; of_server++) {
        int good = 0;
        for (refuse_at = 1; refuse_at <= 8; refuse_at++) {
            start((dtls_config){.mtu_bytes = 400}, (dtls_config){.mtu_bytes = 400});
            dtls_endpoint_free(server.ep);
            dtls_endpoint_free(client.ep);
            sends = 0;
            side_open(&server, "server", (dtls_config){.send = refusing_send, .mtu_bytes = 400});
            dtls_endpoint_listen(server.ep, NULL, NULL);
            side_open(&client, "client", (dtls_config){.send = refusing_send, .mtu_bytes = 400});
            refusing = of_server ? server.ep : client.ep;
            int64_t began = now_us;
            good += connected() && talks() && now_us - began < 2500000 && !client.closed && !server.closed;
            stop();
        }
        CHECK_EQ(good, 8, "a refused datagram of the %s's is a lost one", of_server ? "server" : "client");
    }
}

static int poisoned;

static int poisoning_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    poisoned++;
    ERR_put_error(ERR_LIB_USER, 0, 1, __FILE__, __LINE__);
    return on_send(user, data, len, from, to);
}

static void test_transports_errors(void)
{
    start((dtls_config){0}, (dtls_config){0});
    dtls_endpoint_free(server.ep);
    dtls_endpoint_free(client.ep);
    side_open(&server, "server", (dtls_config){.send = poisoning_send});
    dtls_endpoint_listen(server.ep, NULL, NULL);
    side_open(&client, "client", (dtls_config){.send = poisoning_send});
    CHECK_THAT(connected() && talks() && talks() && poisoned > 4, "errors that a transport leaves are not libssl's");
    ERR_clear_error();
    stop();
}

static dtls_conn *bystander;
static int said;

static void say_in_between(const SSL *ssl, int where, int result)
{
    (void)ssl, (void)where, (void)result;
    if (bystander && said < 5 && dtls_conn_send(bystander, "from inside", 11) == 0)
        said++;
}

static int with_info_callback(SSL_CTX *ctx)
{
    SSL_CTX_set_info_callback(ctx, say_in_between);
    return 0;
}

/* libssl calls a hook in the middle of one handshake's flight, and that sends to somebody else. */
static void test_send_from_a_hook(void)
{
    server.hook = with_info_callback;
    start((dtls_config){0}, (dtls_config){0});
    CHECK(connected());
    bystander = server.conn;
    said = 0;
    dtls_conn *first = client.conn;
    connect_from(6001);
    CHECK_THAT(wait_for(&client.connected, 2) && said == 5, "a handshake in whose hooks messages are sent to others");
    turns(5);
    dtls_info info = info_of(first);
    CHECK_EQ(info.messages_in, 5, "which get what was sent to them");
    bystander = NULL;
    stop();
}

/* ---- replays, claims, clocks, hooks ---- */

static int to_client_datagrams;
static size_t to_client_bytes;

static int count_to_client(const struct datagram *d)
{
    bool to_client = d->to.port != server_addr.port;
    to_client_datagrams += to_client;
    to_client_bytes += to_client ? d->len : 0;
    return to_client; /* and the client, whose name somebody used, never sees them */
}

static void test_replayed_hello(void)
{
    start((dtls_config){0}, (dtls_config){0});
    wire_drop = keep_hellos;
    SSL_SESSION_free(session_of_one());
    struct datagram old = hellos[1];
    server.closed = client.closed = server.connected = client.connected = 0;
    CHECK(connected());
    wire_drop = NULL;
    dtls_endpoint_input(server.ep, old.data, old.len, &client_addr, &server_addr);
    int early = count_of(DTLS_DROP_EARLY);
    for (int i = 0; i < 10; i++)
        CHECK(talks());
    CHECK_THAT(count_of(DTLS_DROP_EARLY) == early && !server.closed,
               "a live connection's records do not go to a handshake that somebody replayed");
    wire_drop = count_to_client;
    turns(3100);
    CHECK_THAT(to_client_datagrams > 0 && to_client_datagrams <= 6,
               "it draws %d datagrams more (%zu bytes), at most six", to_client_datagrams, to_client_bytes);
    stop();
}

static int silent_from_client;

static int drop_from_client(const struct datagram *d)
{
    return silent_from_client && d->to.port == server_addr.port;
}

static void forge_alert(void)
{
    static const unsigned char alert[] = {21, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 99, 0, 2, 2, 40};
    dtls_endpoint_input(server.ep, alert, sizeof alert, &client_addr, &server_addr);
}

/* A foreign client doubles its waits: 1, 2, 4, 8 s. */
static void test_forged_alert_in_a_pause(void)
{
    dtls_config slow = {.retransmit_ms = 8000, .retransmit_max_ms = 8000};
    start((dtls_config){0}, slow);
    wire_drop = drop_from_client;
    connect_client(NULL);
    for (int i = 0; i < 4; i++)
        turn();
    dtls_counters n;
    dtls_endpoint_counters(server.ep, &n);
    silent_from_client = 1;
    turns(400); /* 4 s of trying */
    forge_alert();
    turns(370);
    silent_from_client = 0;
    CHECK_THAT(n.handshakes == 1 && wait_for(&server.connected, 1), "8 s between two tries outlast a forged alert");
    stop();
}

static void test_clock_from_zero(void)
{
    static const int64_t begins[] = {0, -5000000};
    int64_t was = now_us;
    for (int i = 0; i < 2; i++) {
        now_us = begins[i];
        start((dtls_config){0}, (dtls_config){.idle_ms = 1000, .handshake_timeout_ms = 20000});
        CHECK_THAT(connected() && talks(), "a clock that begins at %d s", (int)(begins[i] / 1000000));
        CHECK_THAT(wait_for(&client.idle, 1), "and is idle in time");
        stop();
        now_us = begins[i];
        start((dtls_config){0}, (dtls_config){0});
        dtls_endpoint_free(server.ep);
        server.ep = NULL;
        static const unsigned char alert[] = {21, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 40};
        connect_client(NULL);
        dtls_endpoint_input(client.ep, alert, sizeof alert, &server_addr, &client_addr);
        CHECK_THAT(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_REFUSED, "and a refusal at once is one");
        stop();
    }
    now_us = was;
}

static int suspended(SSL *ssl, void *user)
{
    (void)ssl, (void)user;
    return -1;
}

static int with_suspending_hook(SSL_CTX *ctx)
{
    SSL_CTX_set_cert_cb(ctx, suspended, NULL);
    return 0;
}

static void test_hooks_that_suspend(void)
{
    client.hook = with_suspending_hook;
    start((dtls_config){0}, (dtls_config){0});
    connect_client(NULL);
    CHECK_THAT(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_ERROR && strstr(client.reason_text, "hook"),
               "a hook that wants to be called again ends the handshake: \"%s\"", client.reason_text);
    stop();
}

/* ---- RFC 9325 and its like ---- */

static const char *wanted_suites;
static int wanted_version;

static int with_wanted(SSL_CTX *ctx)
{
    SSL_CTX_set_min_proto_version(ctx, wanted_version);
    return SSL_CTX_set_cipher_list(ctx, wanted_suites) != 1;
}

static void test_suites(void)
{
    static const struct {
        const char *suites;
        int version;
        const char *words;
    } bad[] = {{"AES128-GCM-SHA256", DTLS1_2_VERSION, "only suites with ECDHE or DHE"},
               {"ADH-AES128-GCM-SHA256:@SECLEVEL=0", DTLS1_2_VERSION, "only suites with ECDHE or DHE"},
               {"ECDHE-ECDSA-AES128-SHA256", DTLS1_2_VERSION, "only AEAD"},
               {"ECDHE+AESGCM", DTLS1_VERSION, "versions"}};
    loop = dtls_loop_new(NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dtls_error err = {0};
        server.hook = with_wanted;
        wanted_suites = bad[i].suites;
        wanted_version = bad[i].version;
        dtls_endpoint *ep = dtls_endpoint_new(loop, &(dtls_config){.on_ssl_ctx = with_identity, .user = &server}, &err);
        CHECK_THAT(!ep && err.code == DTLS_ERR_ARG && strstr(err.text, bad[i].words), "%s: %s", bad[i].suites,
                   err.text);
    }
    dtls_loop_free(loop);
    server.hook = NULL;
}

#ifdef SSL_OP_NO_EXTENDED_MASTER_SECRET
static void test_without_extended_master_secret(void)
{
    for (int allowed = 0; allowed < 2; allowed++) {
        for (int of_client = 0; of_client < 2; of_client++) {
            (of_client ? &client : &server)->options = SSL_OP_NO_EXTENDED_MASTER_SECRET;
            dtls_config cfg = {.allow_no_ems = allowed, .handshake_timeout_ms = 5000};
            start(cfg, cfg);
            connect_client(NULL);
            int in = wait_for(allowed ? &client.connected : &client.closed, 1) && client.connected == allowed;
            CHECK_THAT(in && server.connected == allowed, "without an extended master secret %s: %s",
                       of_client ? "of the client" : "of the server", allowed ? "allowed" : "refused");
            stop();
        }
    }
}
#endif

static void test_alpn(void)
{
    static const struct {
        const char *of_server, *of_client, *chosen; /* NULL: refused */
    } cases[] = {{"coap,echo", "echo,coap", "coap"},
                 {"echo", "coap,echo", "echo"},
                 {"coap", "echo", NULL},
                 {"coap", NULL, ""},
                 {NULL, "coap", ""},
                 {"a,b", "b", "b"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        start((dtls_config){.alpn = cases[i].of_server},
              (dtls_config){.alpn = cases[i].of_client, .handshake_timeout_ms = 5000});
        bool in = connect_client(NULL) && wait_for(cases[i].chosen ? &client.connected : &client.closed, 1) &&
                  (!cases[i].chosen || wait_for(&server.connected, 1));
        if (in && cases[i].chosen)
            in = strcmp(info_of(client.conn).alpn, cases[i].chosen) == 0 &&
                 strcmp(info_of(server.conn).alpn, cases[i].chosen) == 0;
        CHECK_THAT(in && (cases[i].chosen || !client.connected), "%s and %s: %s",
                   cases[i].of_server ? cases[i].of_server : "none", cases[i].of_client ? cases[i].of_client : "none",
                   cases[i].chosen ? cases[i].chosen : "refused");
        stop();
    }
    static char name[300];
    memset(name, 'x', 256);
    const char *const bad[] = {"", ",", "a,,b", "a,", name};
    loop = dtls_loop_new(NULL);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dtls_config cfg = {.on_ssl_ctx = with_identity, .user = &server, .alpn = bad[i]};
        CHECK_THAT(!dtls_endpoint_new(loop, &cfg, NULL), "\"%.8s\" is refused", bad[i]);
    }
    dtls_loop_free(loop);
}

static void test_drops_of_other_versions(void)
{
    start((dtls_config){0}, (dtls_config){0});
    CHECK(connected());
    for (int live = 0; live < 2; live++) {
        dtls_addr from = client_addr;
        from.port = (uint16_t)(from.port + !live);
        unsigned char record[40] = {0x2c, 1, 2, 3};
        dtls_endpoint_input(server.ep, record, sizeof record, &from, &server_addr);
        record[0] = 25;
        dtls_endpoint_input(server.ep, record, sizeof record, &from, &server_addr);
    }
    CHECK_EQ(count_of(DTLS_DROP_DTLS13), 2, "records of DTLS 1.3 are counted as such");
    CHECK_EQ(count_of(DTLS_DROP_CID), 2, "and those with a connection ID");
    CHECK_TEXT(info_of(client.conn).version, "DTLSv1.2", "and this is DTLS 1.2");
    CHECK(talks());
    stop();
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"long chain", test_long_chain},
        {"session without chain", test_session_without_chain},
        {"smaller fragments", test_smaller_fragments},
        {"two large records", test_two_large_records},
        {"names", test_names},
        {"words of a mismatch", test_words_of_a_mismatch},
        {"identity limit", test_identity_limit},
        {"shares of IPv6", test_shares_of_ipv6},
        {"walk", test_walk},
        {"log of strangers", test_log_of_strangers},
        {"empty fragments", test_empty_fragments},
        {"unfit messages", test_unfit_messages},
        {"unfit message at the end", test_unfit_message_at_the_end},
        {"hello in pieces", test_hello_in_pieces},
        {"saved session", test_saved_session},
        {"stolen session", test_stolen_session},
        {"refusing transport", test_refusing_transport},
        {"transport's errors", test_transports_errors},
        {"send from a hook", test_send_from_a_hook},
        {"replayed hello", test_replayed_hello},
        {"forged alert in a pause", test_forged_alert_in_a_pause},
        {"clock from zero", test_clock_from_zero},
        {"hooks that suspend", test_hooks_that_suspend},
        {"suites", test_suites},
#ifdef SSL_OP_NO_EXTENDED_MASTER_SECRET
        {"without extended master secret", test_without_extended_master_secret},
#endif
        {"alpn", test_alpn},
        {"drops of other versions", test_drops_of_other_versions},
    };
    virtual_chance();
    virtual_identities();
    int status = RUN_TESTS("odd", tests, argc, argv);
    virtual_identities_free();
    return status;
}
