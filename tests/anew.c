/* Renewals, and what a connection learns of its path: a client asks by one more handshake whether its server is still
 * there, servers are started again, messages go one way, paths drop what is large. Time is virtual and datagrams go through
 * memory. check.h says how this runs. */
#include "virtual.h"
#include "world.h"

enum { HANDSHAKE_TYPE = 22, ROUND_TRIP_US = TURN_MS * 1000, IP_UDP = 28 };

static int64_t us_of(int ms)
{
    return ms * (int64_t)1000;
}

/* The server as after a crash: nobody is told, and it remembers nothing. */
static void server_crashes(void)
{
    wire_drop = NULL;
    send_refuses = 1;
    dtls_endpoint_free(server.ep);
    send_refuses = 0;
    server.ep = NULL;
    server.conn = NULL;
}

static void server_starts(dtls_config cfg)
{
    cfg.send = on_send;
    side_open(&server, "server", cfg);
    dtls_endpoint_listen(server.ep, NULL, NULL);
}

static void pass_ms(int ms)
{
    for (int64_t until = now_us + us_of(ms); now_us < until;)
        turn();
}

static void say(const char *text)
{
    dtls_conn_send(client.conn, text, strlen(text));
}

/* The server has got it. */
static int is_heard(const char *text)
{
    int before = server.messages;
    say(text);
    return wait_for(&server.messages, before + 1) && strcmp(server.last, text) == 0;
}

static int everything(const struct datagram *d)
{
    (void)d;
    return 1;
}

static int from_server(const struct datagram *d)
{
    return d->from.port == server_addr.port;
}

static void test_by_call(void)
{
    start((dtls_config){0}, (dtls_config){0});
    REQUIRE(connected(), "a connection");
    dtls_conn *conn = client.conn;
    dtls_info info;
    CHECK_EQ(dtls_conn_renew(server.conn), DTLS_ERR_STATE, "a server cannot ask");
    CHECK_EQ(dtls_conn_renew(conn), 0, "a client can");
    CHECK_EQ(dtls_conn_renew(conn), 0, "and once more, while it asks");
    CHECK_EQ(dtls_conn_send(conn, "meanwhile", 9), 0, "it can send meanwhile");
    CHECK_THAT(wait_for(&client.renewed, 1), "it is renewed");
    CHECK_EQ(client.resumed, 1, "by resumption");
    CHECK_EQ(client.connected, 1, "connected is told once");
    CHECK_THAT(wait_for(&server.connected, 2) && wait_for(&server.closed, 1), "the server has a new connection only");
    CHECK_THAT(strcmp(server.last, "meanwhile") == 0, "and got what was sent meanwhile");
    CHECK_EQ(server.reason == DTLS_CLOSE_REPLACED || server.reason == DTLS_CLOSE_PEER, 1, "its old one was replaced");
    CHECK_THAT(client.conn == conn && is_heard("later"), "the client's goes on");
    dtls_conn_info(conn, &info);
    CHECK_EQ(info.renewals, 1, "the client's counts renewals");
    CHECK_EQ(info.messages_out, 2, "and messages over all of them");
    CHECK_EQ(client.closed, 0, "nothing was closed for the client");
    dtls_conn_close(conn);
    CHECK_EQ(client.closed, 1, "which is told once");
    stop();
}

static void test_forgotten(void)
{
    start((dtls_config){0}, (dtls_config){0});
    REQUIRE(connected(), "a connection");
    server_crashes();
    server_starts((dtls_config){0});
    say("lost");
    pass_ms(2000);
    CHECK_EQ(client.renewed, 0, "nobody asks by itself");
    CHECK_EQ(dtls_conn_renew(client.conn), 0, "the client asks");
    CHECK_THAT(wait_for(&client.renewed, 1) && client.resumed == 0, "a server that forgot it makes a full handshake");
    CHECK_THAT(is_heard("heard"), "and hears it");
    stop();
}

static void test_one_way(void)
{
    start((dtls_config){0}, (dtls_config){.unanswered_ms = 3000, .idle_timeout_ms = DTLS_NEVER});
    REQUIRE(connected(), "a connection");
    pass_ms(60000);
    CHECK_EQ(client.renewed, 0, "who sends nothing asks nothing");
    say("one");
    pass_ms(2900);
    CHECK_EQ(client.renewed, 0, "nor does who waits for less than unanswered_ms");
    CHECK_THAT(wait_for(&client.renewed, 1) && client.resumed, "a server that is only silent resumes");
    int sent = 0, before = server.messages;
    for (int64_t until = now_us + us_of(20000); now_us < until; sent++) {
        say("more");
        pass_ms(50);
    }
    CHECK_EQ(server.messages - before, sent, "none of many messages is lost meanwhile");
    CHECK_THAT(client.renewed >= 3 && client.renewed <= 5, "and it asks every 5 s: %d times", client.renewed);
    server_crashes();
    pass_ms(10000);
    server_starts((dtls_config){0});
    int renewed = client.renewed;
    say("lost");
    int64_t began = now_us;
    CHECK_THAT(wait_for(&client.renewed, renewed + 1) && !client.resumed, "a new server is found");
    CHECK_THAT(now_us - began <= us_of(4000), "within unanswered_ms and a second: %lld ms",
               (long long)(now_us - began) / 1000);
    CHECK_THAT(is_heard("heard"), "and hears the next");
    stop();
}

/* The server answers what it gets: nothing is ever asked. */
static void test_both_ways(void)
{
    start((dtls_config){0}, (dtls_config){.unanswered_ms = 1000});
    server.echo = 1;
    REQUIRE(connected(), "a connection");
    for (int i = 0; i < 100; i++) {
        say("question");
        pass_ms(300);
    }
    CHECK_EQ(client.messages, 100, "all were answered");
    CHECK_EQ(client.renewed, 0, "nothing was asked");
    stop();
}

static void test_no_answer(void)
{
    start((dtls_config){0},
          (dtls_config){.unanswered_ms = 1000, .idle_timeout_ms = DTLS_NEVER, .handshake_timeout_ms = 4000});
    REQUIRE(connected(), "a connection");
    dtls_counters before, after;
    wire_drop = everything;
    say("lost");
    pass_ms(60000);
    dtls_endpoint_counters(client.ep, &after);
    CHECK_EQ(after.handshakes_failed, 1, "one message is asked about once");
    CHECK_EQ(client.closed, 0, "no answer ends nothing");
    wire_drop = NULL;
    CHECK_THAT(is_heard("still here"), "the old association goes on");
    wire_drop = everything;
    before = after;
    for (int i = 0; i < 60; i++) {
        say("lost");
        pass_ms(1000);
    }
    dtls_endpoint_counters(client.ep, &after);
    CHECK_THAT(after.handshakes_failed - before.handshakes_failed >= 8, "with more messages it asks again: %llu times",
               (unsigned long long)(after.handshakes_failed - before.handshakes_failed));
    wire_drop = NULL;
    say("now");
    CHECK_THAT(wait_for(&client.renewed, 1), "until it is answered");
    dtls_conn_close(client.conn);
    CHECK_EQ(client.closed, 1, "it ends once");
    stop();
}

static void end_inside(struct side *s, dtls_conn *conn, dtls_event event)
{
    if (event == DTLS_EV_RENEWED)
        dtls_conn_close(conn);
    (void)s;
}

static void free_inside(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)conn;
    if (event == DTLS_EV_RENEWED) {
        dtls_endpoint *ep = s->ep;
        s->ep = NULL;
        dtls_endpoint_free(ep);
    }
}

static void test_ends(void)
{
    void (*const inside[])(struct side *, dtls_conn *, dtls_event) = {NULL, end_inside, free_inside};
    static const char *const what[] = {"while it asks", "in the event", "with its endpoint in the event"};
    for (int i = 0; i < 3; i++) {
        start((dtls_config){0}, (dtls_config){0});
        REQUIRE(connected(), "a connection");
        client.inside = inside[i];
        dtls_conn_renew(client.conn);
        turn();
        if (i == 0)
            dtls_conn_close(client.conn);
        CHECK_THAT(wait_for(&client.closed, 1) && client.closed == 1, "closed %s", what[i]);
        pass_ms(40000);
        CHECK_EQ(client.closed, 1, "closed %s: once", what[i]);
        stop();
    }
}

static struct identity stranger, large_server, large_client;

static void test_impostor(void)
{
    start((dtls_config){0}, (dtls_config){0});
    REQUIRE(connected(), "a connection");
    struct side old = server;
    server.ep = NULL;
    server.id = &stranger;
    server_starts((dtls_config){0});
    dtls_conn_renew(client.conn);
    pass_ms(5000);
    CHECK_EQ(client.renewed, 0, "a server of another CA is not taken");
    CHECK_EQ(client.closed, 0, "and ends nothing");
    struct side other = server;
    server = old;
    CHECK_THAT(is_heard("still here"), "the right one is still there");
    dtls_endpoint_free(other.ep);
    stop();
}

/* ---- what the path does ---- */

static size_t path_carries;
static int path_to_server;

static int too_large(const struct datagram *d)
{
    return from_server(d) != path_to_server && d->len + IP_UDP > path_carries;
}

static void test_path(void)
{
    static const size_t carries[] = {600, 700, 1000, 1300};
    for (int i = 0; i < 8; i++) {
        path_carries = carries[i / 2];
        path_to_server = i % 2;
        server.id = &large_server;
        client.id = &large_client;
        start((dtls_config){0}, (dtls_config){0});
        wire_drop = too_large;
        int64_t began = now_us;
        bool good = connected();
        int took_ms = (int)((now_us - began) / 1000);
        CHECK_THAT(good && took_ms <= 2000, "at most %zu bytes %s the server: connected after %d ms", path_carries,
                   path_to_server ? "to" : "from", took_ms);
        REQUIRE(good, "a connection");
        dtls_conn *from = path_to_server ? client.conn : server.conn;
        struct side *to = path_to_server ? &server : &client;
        unsigned char text[DTLS_MESSAGE_MAX] = {'x'};
        int before = to->messages;
        size_t max = dtls_conn_payload_max(from);
        dtls_conn_send(from, text, max);
        CHECK_THAT(wait_for(&to->messages, before + 1) || took_ms < 250,
                   "what payload_max tells, %zu, arrives, if any was lost", max);
        stop();
    }
}

static int handshakes_lost;

static int some_handshakes(const struct datagram *d)
{
    return d->data[0] == HANDSHAKE_TYPE && handshakes_lost-- > 0;
}

static void test_round_trip(void)
{
    dtls_info info;
    dtls_counters n;
    start((dtls_config){0}, (dtls_config){0});
    REQUIRE(connected(), "a connection");
    dtls_conn_info(client.conn, &info);
    CHECK_EQ(info.round_trip_us, ROUND_TRIP_US, "the client knows its round trip");
    CHECK_EQ(info.resends, 0, "and that nothing was sent again");
    dtls_conn_info(server.conn, &info);
    CHECK_THAT(info.round_trip_us >= ROUND_TRIP_US && info.round_trip_us <= 2 * ROUND_TRIP_US,
               "the server, too: %lld us", (long long)info.round_trip_us);
    handshakes_lost = 1;
    wire_drop = some_handshakes;
    int64_t began = now_us;
    dtls_conn_renew(client.conn);
    bool good = wait_for(&client.renewed, 1);
    int took_ms = (int)((now_us - began) / 1000);
    CHECK_THAT(good && took_ms >= 100 && took_ms < 200,
               "a renewal's first wait comes from that: with one loss it took %d ms", took_ms);
    dtls_conn_info(client.conn, &info);
    CHECK_EQ(info.resends, 1, "and one more flight is counted");
    SSL_SESSION *session = dtls_conn_session(client.conn);
    dtls_conn_close(client.conn);
    for (int known = 0; known < 2; known++) {
        dtls_target t = {.peer = server_addr, .local = client_addr, .name = "localhost", .session = session};
        t.round_trip_us = known ? info.round_trip_us : 0;
        handshakes_lost = 1;
        began = now_us;
        int before = client.connected;
        good = dtls_endpoint_connect(client.ep, &t, NULL) && wait_for(&client.connected, before + 1);
        took_ms = (int)((now_us - began) / 1000);
        CHECK_THAT(good && (took_ms < 200) == known, "a new connection %s: with one loss it took %d ms",
                   known ? "that is told" : "that is not", took_ms);
        dtls_conn_close(client.conn);
    }
    SSL_SESSION_free(session);
    dtls_endpoint_counters(client.ep, &n);
    CHECK_EQ(n.retransmissions, 3, "in all");
    stop();
}

/* A long round trip: nothing is sent again for nothing, once it is known. */
static struct datagram slow[64];
static int64_t slow_at[64];
static size_t slow_len;

static int late(const struct datagram *d)
{
    if (slow_len == 64)
        return 1;
    slow[slow_len] = *d;
    slow_at[slow_len++] = now_us + us_of(300);
    return 1;
}

static void slow_turn(void)
{
    size_t n = slow_len, kept = 0;
    for (size_t i = 0; i < n; i++) {
        dtls_endpoint *ep = slow[i].to.port == server_addr.port ? server.ep : client.ep;
        if (slow_at[i] <= now_us) {
            dtls_endpoint_input(ep, slow[i].data, slow[i].len, &slow[i].from, &slow[i].to);
        } else {
            slow[kept] = slow[i];
            slow_at[kept++] = slow_at[i];
        }
    }
    slow_len = kept;
    turn();
}

static void test_slow(void)
{
    dtls_info info;
    start((dtls_config){0}, (dtls_config){0});
    wire_drop = late;
    dtls_target t = {.peer = server_addr, .local = client_addr, .name = "localhost", .round_trip_us = 620000};
    client.conn = dtls_endpoint_connect(client.ep, &t, NULL);
    for (int i = 0; i < 1000 && !(client.connected && server.connected); i++)
        slow_turn();
    REQUIRE(client.connected && server.connected, "a connection");
    dtls_conn_info(client.conn, &info);
    CHECK_EQ(info.resends, 0, "with a known round trip of 0.6 s the client sends nothing again");
    CHECK_THAT(info.round_trip_us >= 600000 && info.round_trip_us <= 640000, "it is measured: %lld us",
               (long long)info.round_trip_us);
    slow_len = 0;
    stop();
}

/* Silence is told with what was dropped meanwhile. */
static void test_reason(void)
{
    server.id = &large_server;
    start((dtls_config){0}, (dtls_config){.max_chain_bytes = 512, .handshake_timeout_ms = 3000});
    REQUIRE(connect_client(NULL), "a client");
    CHECK_THAT(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_TIMEOUT &&
                   strstr(client.reason_text, "; dropped: ") && strstr(client.reason_text, " handshake"),
               "a chain that is too long: \"%s\"", client.reason_text);
    stop();
}

/* A certificate that fills most of a datagram. */
static struct identity issue_large(long serial, const char *name, const char *usage)
{
    char comment[601];
    struct identity id = issue(serial, name, usage);
    memset(comment, 'x', 600);
    comment[600] = 0;
    extend(id.cert, ca.cert, NID_netscape_comment, comment);
    X509_sign(id.cert, ca.key, EVP_sha256());
    return id;
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"by call", test_by_call},       {"by a server that forgot", test_forgotten},
        {"one way", test_one_way},       {"both ways", test_both_ways},
        {"no answer", test_no_answer},   {"ends", test_ends},
        {"impostor", test_impostor},     {"path that drops large datagrams", test_path},
        {"round trip", test_round_trip}, {"slow path", test_slow},
        {"reason", test_reason},
    };
    virtual_chance();
    virtual_identities();
    large_server = issue_large(4, "server", "serverAuth");
    large_client = issue_large(5, "client", "clientAuth");
    struct identity ours = ca; /* issue() signs with it */
    ca = issue(8, "another CA", NULL);
    stranger = issue(9, "stranger", "serverAuth");
    identity_free(&ca);
    ca = ours;
    int status = RUN_TESTS("anew", tests, argc, argv);
    identity_free(&stranger);
    identity_free(&large_server);
    identity_free(&large_client);
    virtual_identities_free();
    return status;
}
