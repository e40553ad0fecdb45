/* Who is whom: pre-shared keys, whom the application lets in, authentication that is optional or one-sided, what reload
 * changes, exported keys. Time is virtual and datagrams go through memory. What files are needed for is in e2e.py. check.h
 * says how this runs. */
#include "virtual.h"
#include "world.h"

enum { RECORD = 13, ALERT_TYPE = 21, ACCESS_DENIED = 49 };

static int64_t us_of(int ms)
{
    return ms * (int64_t)1000;
}

static void pass_ms(int ms)
{
    for (int64_t until = now_us + us_of(ms); now_us < until;)
        turn();
}

/* ---- pre-shared keys ---- */

static const uint8_t key_a[16] = "sixteen bytes a",
                     key_b[DTLS_PSK_MAX] = "sixty-four bytes, the longest key there is for now";
static int asked;
static char revoked[32];

static size_t find_key(void *user, const char *identity, uint8_t key[DTLS_PSK_MAX])
{
    (void)user;
    asked++;
    if (strcmp(identity, revoked) == 0)
        return 0;
    if (strcmp(identity, "a") == 0)
        return memcpy(key, key_a, sizeof key_a), sizeof key_a;
    if (strcmp(identity, "b\n") == 0)
        return memcpy(key, key_b, sizeof key_b), sizeof key_b;
    return 0;
}

static dtls_config with_key(const char *identity, const uint8_t *key, size_t len)
{
    return (dtls_config){.psk_identity = identity, .psk_key = key, .psk_key_len = len};
}

static void keys_only(dtls_config server_cfg, dtls_config client_cfg)
{
    server.keys_only = client.keys_only = 1;
    server_cfg.psk = find_key;
    start(server_cfg, client_cfg);
}

static const char *cipher_of(dtls_conn *conn)
{
    dtls_info info;
    dtls_conn_info(conn, &info);
    return info.cipher;
}

static void test_keys(void)
{
    keys_only((dtls_config){0}, with_key("a", key_a, sizeof key_a));
    CHECK_THAT(connected(), "a client with a key");
    CHECK_TEXT(server.peer_name, "a", "the server knows it by its identity");
    CHECK_EQ(server.psk, 1, "and that this is a key's");
    CHECK_TEXT(cipher_of(client.conn), "ECDHE-PSK-CHACHA20-POLY1305", "with forward secrecy");
    dtls_conn_send(client.conn, "hello", 5);
    CHECK_THAT(wait_for(&server.messages, 1), "a message");
    SSL_SESSION *session = dtls_conn_session(client.conn);
    dtls_conn_close(client.conn);
    pass_ms(100);
    CHECK_THAT(connect_client(session) && wait_for(&client.connected, 2) && client.resumed, "it resumes");
    CHECK_TEXT(server.peer_name, "a", "and is known");
    CHECK_EQ(dtls_conn_renew(client.conn), 0, "it is renewed");
    CHECK_THAT(wait_for(&client.renewed, 1) && client.resumed, "by resumption");
    dtls_conn_close(client.conn);
    pass_ms(100);
    strcpy(revoked, "a");
    connect_client(session);
    pass_ms(1000);
    CHECK_THAT(server.failed == 1 && strstr(server.reason_text, "no longer known"), "not with a key that is gone: %s",
               server.reason_text);
    revoked[0] = 0;
    SSL_SESSION_free(session);
    stop();

    keys_only((dtls_config){0}, with_key("b\n", key_b, sizeof key_b));
    CHECK_THAT(connected(), "a long key");
    CHECK_TEXT(server.peer_name, "b\\x0a", "an identity that must be escaped");
    stop();
}

/* Both look the same: silence until the deadline. */
static void test_wrong_keys(void)
{
    static const struct {
        const char *identity, *said;
    } cases[] = {{"a", "the pre-shared key may be wrong, for identity a"},
                 {"nobody", "no pre-shared key is known, for identity nobody"}};
    size_t sent[2];
    for (int i = 0; i < 2; i++) {
        keys_only((dtls_config){.handshake_timeout_ms = 3000}, with_key(cases[i].identity, key_b, sizeof key_b));
        dtls_counters n;
        connect_client(NULL);
        CHECK_THAT(wait_for(&server.failed, 1) && strstr(server.reason_text, cases[i].said), "%s: %s",
                   cases[i].identity, server.reason_text);
        dtls_endpoint_counters(server.ep, &n);
        sent[i] = (size_t)n.datagrams_out;
        CHECK_EQ(client.connected, 0, "%s does not get in", cases[i].identity);
        stop();
    }
    CHECK_EQ(sent[0], sent[1], "an unknown identity gets as many datagrams as a wrong key");
}

static void test_side_by_side(void)
{
    server.keys_only = 0;
    client.keys_only = 1;
    start((dtls_config){.psk = find_key}, with_key("a", key_a, sizeof key_a));
    CHECK_THAT(connected() && server.psk, "a server with certificates, too: a client with a key");
    stop();
    start((dtls_config){.psk = find_key}, (dtls_config){0});
    CHECK_THAT(connected() && !server.psk, "one with a certificate");
    CHECK_TEXT(server.peer_name, "client", "that has its name");
    stop();
    start((dtls_config){.psk = find_key}, with_key("a", key_a, sizeof key_a));
    CHECK_THAT(connected() && !server.psk, "one with both takes the certificate");
    stop();
    start((dtls_config){0}, with_key("a", key_a, sizeof key_a));
    CHECK_THAT(connected() && !server.psk, "as where the server has no keys");
    stop();
    client.keys_only = 1;
    start((dtls_config){0}, with_key("a", key_a, sizeof key_a));
    connect_client(NULL);
    CHECK_THAT(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_REFUSED, "with nothing in common: %s",
               client.reason_text);
    stop();
}

static int only_ccm8(SSL_CTX *ctx)
{
    return SSL_CTX_set_cipher_list(ctx, "PSK-AES128-CCM8") != 1;
}

static void test_ccm8(void)
{
    for (int wanted = 0; wanted < 2; wanted++) {
        dtls_config cfg = with_key("a", key_a, sizeof key_a);
        cfg.psk_ccm8 = 1;
        client.hook = only_ccm8;
        start((dtls_config){.psk = find_key, .psk_ccm8 = wanted}, cfg);
        connect_client(NULL);
        bool good = wait_for(wanted ? &client.connected : &client.closed, 1);
        CHECK_THAT(good, "CCM_8 %s", wanted ? "where it is asked for" : "is refused where it is not");
        if (good && wanted)
            CHECK_TEXT(cipher_of(client.conn), "PSK-AES128-CCM8", "and used");
        stop();
    }
}

static void test_bad_keys(void)
{
    char long_name[129];
    memset(long_name, 'x', 128);
    long_name[128] = 0;
    const dtls_config bad[] = {with_key("", key_a, 16), with_key(long_name, key_a, 16), with_key("a", NULL, 16),
                               with_key("a", key_a, 0), with_key("a", key_a, DTLS_PSK_MAX + 1)};
    loop = dtls_loop_new(&world_clock);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        dtls_error err = {0};
        dtls_endpoint *ep = dtls_endpoint_new(loop, &bad[i], &err);
        CHECK_THAT(!ep && err.code == DTLS_ERR_ARG, "bad key %zu: %s", i, err.text);
    }
    dtls_config cfg = with_key("a", key_a, 16);
    cfg.send = on_send;
    dtls_error err = {0};
    dtls_endpoint *ep = dtls_endpoint_new(loop, &cfg, &err);
    CHECK_THAT(ep && dtls_endpoint_listen(ep, NULL, &err) == DTLS_ERR_CERT, "a client's key makes no server: %s",
               err.text);
    dtls_loop_free(loop);
}

/* ---- who may come in ---- */

static char seen[400], unwelcome[64];
static int looks;

static int look(void *user, const dtls_info *info, char *reason, size_t size)
{
    const struct side *s = user;
    looks++;
    snprintf(seen, sizeof seen, "%s, %s, %zu, %s, %d", info->peer_name,
             info->peer_alt_names[0] ? info->peer_alt_names[0] : "none", strlen(info->peer_fingerprint),
             info->peer_serial, info->server);
    /* It may call nothing. */
    CHECK(dtls_endpoint_reload(s->ep, &(dtls_config){0}, NULL) == DTLS_ERR_STATE);
    if (strcmp(info->peer_name, unwelcome) != 0)
        return 0;
    snprintf(reason, size, "%s is not on the list", info->peer_name);
    return 1;
}

static int last_alert;

static int watch_alerts(const struct datagram *d)
{
    if (d->data[0] == ALERT_TYPE && d->data[4] == 0 && d->to.port == client_addr.port)
        last_alert = d->data[RECORD + 1];
    return 0;
}

static void test_on_peer(void)
{
    start((dtls_config){.on_peer = look}, (dtls_config){0});
    unwelcome[0] = 0;
    looks = 0;
    CHECK_THAT(connected() && looks == 1, "it looks once at a full handshake");
    CHECK_TEXT(seen, "client, DNS:localhost, 64, 03, 1", "and sees who it is");
    SSL_SESSION *session = dtls_conn_session(client.conn);
    dtls_conn_close(client.conn);
    pass_ms(100);
    CHECK_THAT(connect_client(session) && wait_for(&client.connected, 2) && client.resumed && looks > 1,
               "it looks at a resumed one");
    dtls_conn_close(client.conn);
    pass_ms(100);
    strcpy(unwelcome, "client");
    for (int i = 0; i < 2; i++) { /* with the session, which must not be resumed, and without */
        wire_drop = watch_alerts;
        last_alert = 0;
        int failed = server.failed, closed = client.closed;
        connect_client(i ? NULL : session);
        CHECK_THAT(wait_for(&server.failed, failed + 1) && server.reason == DTLS_CLOSE_VERIFY, "refused: %s",
                   server.reason_text);
        CHECK_TEXT(server.reason_text, "refused: client is not on the list", "with its reason");
        CHECK_THAT(wait_for(&client.closed, closed + 1) && client.reason == DTLS_CLOSE_REFUSED, "the client hears it");
        CHECK_TEXT(client.reason_text, "refused by the peer: access denied", "in words");
        CHECK_EQ(last_alert, ACCESS_DENIED, "by an alert");
    }
    CHECK_EQ(client.connected, 2, "it was never connected meanwhile");
    unwelcome[0] = 0;
    CHECK_THAT(connect_client(NULL) && wait_for(&client.connected, 3), "and gets in when it is welcome again");
    SSL_SESSION_free(session);
    stop();

    start((dtls_config){0}, (dtls_config){.on_peer = look});
    strcpy(unwelcome, "server");
    connect_client(NULL);
    CHECK_THAT(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_VERIFY, "a client refuses its server: %s",
               client.reason_text);
    CHECK_EQ(client.connected, 0, "before it is connected");
    unwelcome[0] = 0;
    stop();

    keys_only((dtls_config){.on_peer = look}, with_key("a", key_a, sizeof key_a));
    strcpy(unwelcome, "a");
    connect_client(NULL);
    CHECK_THAT(wait_for(&client.closed, 1) && strstr(client.reason_text, "access denied"),
               "a key's identity is refused: %s", client.reason_text);
    unwelcome[0] = 0;
    stop();
}

/* ---- authentication ---- */

static struct identity stranger, other_ca;

static int without_cert(void *user, SSL_CTX *ctx)
{
    (void)user;
    return X509_STORE_add_cert(SSL_CTX_get_cert_store(ctx), ca.cert) != 1;
}

static void test_auth(void)
{
    static const struct {
        const char *what;
        dtls_auth auth;
        int cert, good; /* the client's: 0 none, 1 good, 2 a stranger's */
    } cases[] = {{"mutual, without one", DTLS_AUTH_MUTUAL, 0, 0},     {"mutual, with one", DTLS_AUTH_MUTUAL, 1, 1},
                 {"optional, without one", DTLS_AUTH_OPTIONAL, 0, 1}, {"optional, with one", DTLS_AUTH_OPTIONAL, 1, 1},
                 {"optional, a bad one", DTLS_AUTH_OPTIONAL, 2, 0},   {"server only", DTLS_AUTH_SERVER, 0, 1},
                 {"server only, with one", DTLS_AUTH_SERVER, 1, 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        client.id = cases[i].cert == 2 ? &stranger : NULL;
        start((dtls_config){.auth = cases[i].auth}, (dtls_config){0});
        if (cases[i].cert == 0) {
            dtls_endpoint_free(client.ep);
            dtls_config cfg = {.on_ssl_ctx = without_cert,
                               .auth = DTLS_AUTH_SERVER,
                               .send = on_send,
                               .on_event = on_event,
                               .user = &client};
            client.ep = dtls_endpoint_new(loop, &cfg, &connect_error);
            REQUIRE(client.ep, "a client without a certificate: %s", connect_error.text);
        }
        connect_client(NULL);
        CHECK_THAT(wait_for(cases[i].good ? &client.connected : &client.closed, 1), "%s", cases[i].what);
        if (cases[i].good) {
            wait_for(&server.connected, 1);
            bool named = cases[i].cert == 1 && cases[i].auth != DTLS_AUTH_SERVER;
            CHECK_TEXT(server.peer_name, named ? "client" : "", "and the server knows what it can");
            SSL_SESSION *session = dtls_conn_session(client.conn);
            dtls_conn_close(client.conn);
            pass_ms(100);
            CHECK_THAT(connect_client(session) && wait_for(&client.connected, 2) && client.resumed, "and it resumes");
            SSL_SESSION_free(session);
        }
        stop();
    }
}

static char warned[300];

static void keep_warning(void *user, dtls_log level, const char *line)
{
    (void)user;
    if (level == DTLS_LOG_WARNING)
        snprintf(warned, sizeof warned, "%s", line);
}

static void test_insecure(void)
{
    for (int insecure = 0; insecure < 2; insecure++) {
        server.id = &stranger;
        warned[0] = 0;
        start((dtls_config){.auth = DTLS_AUTH_SERVER},
              (dtls_config){.auth = insecure ? DTLS_AUTH_INSECURE : DTLS_AUTH_MUTUAL, .on_log = keep_warning});
        connect_client(NULL);
        CHECK_THAT(wait_for(insecure ? &client.connected : &client.closed, 1), "a stranger's server is %s",
                   insecure ? "taken by an insecure client" : "refused");
        CHECK_THAT(strstr(warned, insecure ? "not verified: " : "certificate refused: "), "which says why: %s", warned);
        stop();
    }
}

/* ---- reload ---- */

static void test_reload(void)
{
    dtls_error err = {0};
    start((dtls_config){.psk = find_key}, (dtls_config){0});
    REQUIRE(connected(), "a connection");
    dtls_conn *first = client.conn;
    SSL_SESSION *session = dtls_conn_session(first);
    CHECK_THAT(dtls_endpoint_reload(server.ep, &(dtls_config){.cert_file = "/none"}, &err) < 0, "a bad one: %s",
               err.text);
    dtls_conn_send(first, "still", 5);
    CHECK_THAT(wait_for(&server.messages, 1), "changes nothing");
    server.id = &stranger; /* the hook is asked again */
    CHECK_EQ(dtls_endpoint_reload(server.ep, &(dtls_config){.psk = find_key}, &err), 0, "another certificate");
    dtls_conn_send(first, "still", 5);
    CHECK_THAT(wait_for(&server.messages, 2), "an open connection lives on");
    client_addr.port++;
    int closed = client.closed;
    CHECK_THAT(connect_client(session) && wait_for(&client.closed, closed + 1) && client.reason == DTLS_CLOSE_VERIFY,
               "a new one does not resume, and sees the new certificate: %s", client.reason_text);
    server.id = NULL;
    CHECK_EQ(dtls_endpoint_reload(server.ep, &(dtls_config){.psk = find_key}, &err), 0, "and back");
    client_addr.port++;
    CHECK_THAT(connect_client(session) && wait_for(&client.connected, 2) && !client.resumed, "a full handshake");
    now_us += 2000000;
    CHECK_EQ(dtls_endpoint_reload(client.ep, &(dtls_config){0}, &err), 0, "a client reloads");
    SSL_SESSION_free(session);
    stop();
}

static void test_recheck(void)
{
    dtls_error err = {0};
    start((dtls_config){.psk = find_key, .on_peer = look}, (dtls_config){0});
    REQUIRE(connected(), "a connection");
    dtls_endpoint_recheck(server.ep);
    pass_ms(100);
    CHECK_EQ(server.closed, 0, "who is still trusted stays");
    strcpy(unwelcome, "client");
    dtls_endpoint_recheck(server.ep);
    CHECK_THAT(server.closed == 1 && server.reason == DTLS_CLOSE_VERIFY, "who is not welcome any more goes: %s",
               server.reason_text);
    unwelcome[0] = 0;
    CHECK_THAT(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_PEER, "and is told");
    CHECK_THAT(connect_client(NULL) && wait_for(&client.connected, 2) && wait_for(&server.connected, 2), "another one");
    struct identity ours = ca;
    ca = other_ca; /* the hook is asked again, and trusts this one */
    CHECK_EQ(dtls_endpoint_reload(server.ep, &(dtls_config){.psk = find_key}, &err), 0, "another CA: %s", err.text);
    ca = ours;
    CHECK_EQ(server.closed, 1, "closes nobody");
    dtls_endpoint_recheck(server.ep);
    CHECK_THAT(server.closed == 2 && strstr(server.reason_text, "no longer trusted: "), "until asked to: %s",
               server.reason_text);
    stop();

    client.keys_only = 1;
    start((dtls_config){.psk = find_key}, with_key("a", key_a, sizeof key_a));
    REQUIRE(connected() && server.psk, "a connection with a key");
    dtls_endpoint_recheck(server.ep);
    CHECK_EQ(server.closed, 0, "a key that is known stays");
    strcpy(revoked, "a");
    dtls_endpoint_recheck(server.ep);
    CHECK_THAT(server.closed == 1 && strstr(server.reason_text, "no longer known"), "one that is gone goes: %s",
               server.reason_text);
    revoked[0] = 0;
    dtls_endpoint_recheck(client.ep); /* a client knows its own key */
    stop();
}

static int with_other_ca(struct side *s, dtls_config cfg)
{
    struct identity ours = ca;
    ca = other_ca;
    int r = dtls_endpoint_reload(s->ep, &cfg, NULL);
    ca = ours;
    return r;
}

static void until_handshake(void)
{
    dtls_counters n;
    do {
        turn();
        dtls_endpoint_counters(server.ep, &n);
    } while (!n.handshakes);
}

/* What is under way when a side reloads is held against what it trusts then. */
static void test_reload_meanwhile(void)
{
    start((dtls_config){0}, (dtls_config){0});
    connect_client(NULL);
    until_handshake();
    CHECK_EQ(with_other_ca(&server, (dtls_config){0}), 0, "a server trusts another CA");
    pass_ms(2000);
    CHECK_THAT(server.connected == 0 && strstr(server.reason_text, "certificate refused"),
               "a handshake from before fails: %s", server.reason_text);
    stop();

    client.keys_only = 1;
    start((dtls_config){.auth = DTLS_AUTH_OPTIONAL}, (dtls_config){.auth = DTLS_AUTH_INSECURE});
    connect_client(NULL);
    until_handshake();
    CHECK_EQ(dtls_endpoint_reload(server.ep, &(dtls_config){0}, NULL), 0, "a server wants certificates now");
    pass_ms(2000);
    CHECK_EQ(server.connected, 0, "nobody without one gets in");
    stop();

    client.keys_only = 1;
    start((dtls_config){.auth = DTLS_AUTH_OPTIONAL}, (dtls_config){.auth = DTLS_AUTH_INSECURE});
    REQUIRE(connected(), "a client without a certificate");
    dtls_endpoint_recheck(server.ep);
    CHECK_EQ(server.closed, 0, "stays while that is optional");
    CHECK_EQ(dtls_endpoint_reload(server.ep, &(dtls_config){0}, NULL), 0, "a server wants certificates now");
    dtls_endpoint_recheck(server.ep);
    CHECK_EQ(server.closed, 1, "and goes when it is not");
    stop();

    start((dtls_config){.auth = DTLS_AUTH_INSECURE}, (dtls_config){0});
    REQUIRE(connected(), "a connection to a server of an insecure endpoint");
    CHECK_EQ(with_other_ca(&server, (dtls_config){.auth = DTLS_AUTH_INSECURE}), 0, "that trusts another CA");
    dtls_endpoint_recheck(server.ep);
    CHECK_EQ(server.closed, 1, "as a server it is not insecure");
    stop();

    start((dtls_config){0}, (dtls_config){0});
    REQUIRE(connected(), "a connection");
    server.id = &client_id;
    dtls_error err = {0};
    CHECK_THAT(dtls_endpoint_reload(server.ep, &(dtls_config){0}, &err) == DTLS_ERR_CERT,
               "a server takes no client's certificate: %s", err.text);
    server.id = NULL;
    stop();
}

/* A renewal that the client itself refuses must not take the place of the connection at the server. */
static void test_refused_renewal(void)
{
    unwelcome[0] = 0;
    start((dtls_config){0}, (dtls_config){.on_peer = look});
    REQUIRE(connected(), "a connection");
    strcpy(unwelcome, "server");
    CHECK_EQ(dtls_conn_renew(client.conn), 0, "a renewal");
    pass_ms(1000);
    CHECK_EQ(client.renewed, 0, "is refused");
    dtls_conn_send(client.conn, "still here", 10);
    CHECK_THAT(wait_for(&server.messages, 1) && client.closed == 0, "the connection goes on");
    unwelcome[0] = 0;
    stop();
}

/* What an insecure run saved is no shortcut for a secure one. */
static void test_insecure_session(void)
{
    server.id = &stranger;
    start((dtls_config){.auth = DTLS_AUTH_SERVER}, (dtls_config){.auth = DTLS_AUTH_INSECURE});
    REQUIRE(connected(), "an insecure connection");
    SSL_SESSION *session = dtls_conn_session(client.conn);
    dtls_conn_close(client.conn);
    pass_ms(100);
    CHECK_EQ(with_other_ca(&client, (dtls_config){0}), 0, "the client learns to trust that CA");
    now_us += us_of(3000);
    CHECK_THAT(connect_client(session) && wait_for(&client.connected, 2) && !client.resumed,
               "and makes a full handshake: %s", client.reason_text);
    SSL_SESSION_free(session);
    stop();
}

/* ---- exported keys and logs ---- */

static int lines_logged;

static void count_lines(void *user, const char *line)
{
    (void)user;
    lines_logged += strncmp(line, "CLIENT_RANDOM ", 14) == 0;
}

static void test_export(void)
{
    uint8_t ours[32], theirs[32], others[32];
    lines_logged = 0;
    start((dtls_config){0}, (dtls_config){.on_keylog = count_lines});
    REQUIRE(connected(), "a connection");
    CHECK_THAT(dtls_conn_export(client.conn, "EXPORTER-test", ours, sizeof ours) == 0 &&
                   dtls_conn_export(server.conn, "EXPORTER-test", theirs, sizeof theirs) == 0 &&
                   dtls_conn_export(server.conn, "EXPORTER-other", others, sizeof others) == 0,
               "both export");
    CHECK_THAT(memcmp(ours, theirs, sizeof ours) == 0 && memcmp(ours, others, sizeof ours) != 0, "the same, by label");
    CHECK_EQ(lines_logged, 1, "secrets are logged where asked for");
    stop();
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"keys", test_keys},
        {"wrong keys", test_wrong_keys},
        {"keys and certificates", test_side_by_side},
        {"ccm8", test_ccm8},
        {"bad keys", test_bad_keys},
        {"on_peer", test_on_peer},
        {"auth", test_auth},
        {"insecure", test_insecure},
        {"reload", test_reload},
        {"recheck", test_recheck},
        {"reload meanwhile", test_reload_meanwhile},
        {"refused renewal", test_refused_renewal},
        {"insecure session", test_insecure_session},
        {"export", test_export},
    };
    virtual_chance();
    virtual_identities();
    struct identity ours = ca; /* issue() signs with it */
    ca = issue(8, "another CA", NULL);
    stranger = issue(9, "stranger", "serverAuth,clientAuth");
    other_ca = ca;
    ca = ours;
    int status = RUN_TESTS("trust", tests, argc, argv);
    identity_free(&stranger);
    identity_free(&other_ca);
    virtual_identities_free();
    return status;
}
