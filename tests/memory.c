/* Two endpoints that speak through a queue in memory: no socket, nothing but dtls.h. world.h shows how to bring a
 * transport of one's own; here is what is easiest to provoke there: lost, forged and repeated datagrams. check.h says how
 * this runs. */
#include "world.h"

#include <openssl/err.h>
#include <openssl/pem.h>

static int input_in_send;

static void input_inside_send(struct side *s)
{
    const struct datagram *d = &wire[wire_len - 1];
    input_in_send += dtls_endpoint_input(s->ep, d->data, d->len, &d->to, &d->from) == DTLS_ERR_STATE;
}

static void test_messages(void)
{
    static char big[DTLS_MESSAGE_MAX + 1];
    dtls_info info;
    start((dtls_config){0}, (dtls_config){0});
    server.echo = 1;
    inside_send = input_inside_send;
    dtls_conn *c = connect_client(NULL);
    CHECK_THAT(c && client.connected == 0, "connect returns before any event");
    CHECK_THAT(wait_for(&server.connected, 1) && wait_for(&client.connected, 1), "handshake without a socket");
    CHECK_THAT(input_in_send > 0, "input from inside send is refused");
    CHECK_THAT(dtls_conn_send(c, "hello", 5) == 0 && wait_for(&client.messages, 1), "message and echo");
    CHECK_TEXT(client.last, "hello", "its text");
    memset(big, 'x', sizeof big);
    CHECK_THAT(dtls_conn_send(c, big, DTLS_MESSAGE_MAX) == 0 && wait_for(&client.messages, 2) &&
                   client.last_len == DTLS_MESSAGE_MAX,
               "message of 16,384 bytes");
    CHECK_THAT(dtls_conn_send(c, big, sizeof big) == DTLS_ERR_SIZE && dtls_conn_send(c, "", 0) == DTLS_ERR_SIZE &&
                   wire_len == 0,
               "too long and empty messages are refused, nothing is sent");
    CHECK_THAT(dtls_conn_send(c, "still", 5) == 0 && wait_for(&client.messages, 3),
               "the connection is unharmed by that");
    dtls_conn_info(server.conn, &info);
    CHECK_THAT(strcmp(info.peer_name, "client") == 0 && info.server && info.connected && info.messages_in == 3,
               "the server knows its client");
    CHECK_THAT(dtls_conn_payload_max(c) > 1300 && dtls_conn_payload_max(c) < 1472, "payload limit fits the MTU");
    dtls_conn_close(c);
    CHECK_THAT(client.closed == 1 && client.reason == DTLS_CLOSE_LOCAL, "one close event, here");
    CHECK_THAT(wait_for(&server.closed, 1) && server.reason == DTLS_CLOSE_PEER, "one close event, there");
    stop();
}

/* Two of five, from a fixed seed. */
static int drop_some(const struct datagram *d)
{
    static uint32_t seed = 1;
    (void)d;
    seed = seed * 1103515245u + 12345u;
    return (seed >> 16) % 5 < 2;
}

static void test_loss(void)
{
    dtls_config fast = {.retransmit_ms = 20, .retransmit_max_ms = 100};
    dtls_counters counters;
    start(fast, fast);
    wire_drop = drop_some;
    connect_client(NULL);
    int good = wait_for(&server.connected, 1) && wait_for(&client.connected, 1);
    dtls_endpoint_counters(client.ep, &counters);
    CHECK_THAT(good && counters.retransmissions > 0, "handshake with two of five datagrams lost");
    stop();
}

static int last_flight; /* datagrams of it that are lost on their way to the client */

static int drop_last_flight(const struct datagram *d)
{
    return server.connected && d->to.port != server_addr.port && ++last_flight;
}

/* On a lossy link a flight in two datagrams is one in which one is missing. */
static void test_last_flight(void)
{
    start((dtls_config){0}, (dtls_config){.retransmit_ms = 20});
    wire_drop = drop_last_flight;
    connect_client(NULL);
    wait_for(&last_flight, 2);
    int datagrams = last_flight;
    wait_for(&last_flight, 3);
    CHECK_EQ(datagrams, 2, "the last flight is two datagrams");
    CHECK_EQ(last_flight, 3, "and sent again in one");
    wire_drop = NULL;
    CHECK_THAT(wait_for(&client.connected, 1), "and ends the handshake when it arrives");
    stop();
}

/* The client repeats its Finished and the server its last flight, until one arrives. From the third time on libssl asks
 * for a smaller MTU, but a flight of two small records tells nothing about the path. */
static void test_mtu_stays(void)
{
    start((dtls_config){0}, (dtls_config){.retransmit_ms = 20, .retransmit_max_ms = 20});
    last_flight = 0;
    wire_drop = drop_last_flight;
    CHECK_THAT(connect_client(NULL) && wait_for(&server.connected, 1), "the server is connected");
    size_t before = dtls_conn_payload_max(server.conn);
    CHECK_THAT(wait_for(&last_flight, 7), "its last flight is lost many times");
    CHECK_EQ(dtls_conn_payload_max(server.conn), before, "and what fits into a datagram is what it was");
    wire_drop = NULL;
    CHECK_THAT(wait_for(&client.connected, 1), "the client is connected when it arrives");
    stop();
}

static struct datagram flight[4]; /* of an earlier handshake, without its ServerHello */
static int flight_len, began_anew;

static int keep_flight(const struct datagram *d)
{
    if (d->to.port != server_addr.port && d->data[0] == 22 && d->data[13] > 10 && d->data[13] < 15 && flight_len < 4)
        flight[flight_len++] = *d;
    return 0;
}

static int leftovers_first(const struct datagram *d)
{
    for (; d->to.port == server_addr.port && flight_len > 0; flight_len--)
        dtls_endpoint_input(client.ep, flight[flight_len - 1].data, flight[flight_len - 1].len, &server_addr,
                            &client_addr);
    return 0;
}

static void look_for_anew(void *user, dtls_log level, const char *line)
{
    (void)user, (void)level;
    began_anew += strstr(line, "anew") != NULL;
}

static void test_leftovers(void)
{
    start((dtls_config){.mtu_bytes = 256}, (dtls_config){.on_log = look_for_anew});
    wire_drop = keep_flight;
    connected();
    dtls_conn_close(client.conn);
    wait_for(&server.closed, 1);
    int kept = flight_len;
    wire_drop = leftovers_first;
    connect_client(NULL);
    CHECK_THAT(kept > 0 && wait_for(&client.connected, 2) && !began_anew && client.closed == 1,
               "an earlier handshake's flight that arrives late spoils nothing");
    stop();
}

static void test_resumption(void)
{
    dtls_info info;
    start((dtls_config){0}, (dtls_config){0});
    connected();
    dtls_conn *c = client.conn;
    struct ssl_session_st *session = dtls_conn_session(c);
    dtls_conn_close(c);
    wait_for(&server.closed, 1);
    connect_client(session);
    wait_for(&server.connected, 2);
    wait_for(&client.connected, 2);
    dtls_conn_info(server.conn, &info);
    CHECK_THAT(info.resumed && strcmp(info.peer_name, "client") == 0, "resumption keeps the peer's identity");
    SSL_SESSION_free(session);
    stop();
}

/* Nothing is verified again in a resumed handshake, so a session must not carry one server's identity to another
 * name. */
static void test_resumption_elsewhere(void)
{
    dtls_error err;
    start((dtls_config){0}, (dtls_config){0});
    connected();
    dtls_conn *c = client.conn;
    struct ssl_session_st *session = dtls_conn_session(c);
    dtls_conn_close(c);
    wait_for(&server.closed, 1);
    dtls_target t = {.peer = server_addr, .local = client_addr, .name = "bank.example", .session = session};
    dtls_endpoint_connect(client.ep, &t, &err);
    CHECK_THAT(wait_for(&client.closed, 2) && client.reason == DTLS_CLOSE_VERIFY && client.connected == 1,
               "a session for one name does not open another");
    SSL_SESSION_free(session);
    stop();
}

static void test_names(void)
{
    static const struct {
        const char *name;
        int good;
    } names[] = {{"localhost", 1},  {"localhost.", 1},
                 {"LOCALHOST", 1},  {"127.0.0.1", 1},
                 {"::1", 1},        {"127.0.0.1 x", 0},
                 {".localhost", 0}, {"", 0},
                 {".", 0},          {"*", 0},
                 {"host", 0},       {"127.0.0.2", 0},
                 {"::2", 0},        {"xn--localhost", 0}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        dtls_error err;
        start((dtls_config){0}, (dtls_config){0});
        dtls_target t = {.peer = server_addr, .local = client_addr, .name = names[i].name};
        dtls_conn *c = dtls_endpoint_connect(client.ep, &t, &err);
        int accepted = c && wait_for(&client.connected, names[i].good) && client.connected;
        if (c && !names[i].good)
            accepted = !(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_VERIFY && !client.connected);
        CHECK_EQ(accepted, names[i].good, "name \"%s\" is %s", names[i].name, names[i].good ? "accepted" : "refused");
        stop();
    }
}

static void test_idle(void)
{
    start((dtls_config){.idle_timeout_ms = 300}, (dtls_config){.idle_ms = 50, .idle_repeat_ms = 50});
    connected();
    CHECK_THAT(wait_for(&client.idle, 2), "idle events repeat");
    CHECK_THAT(wait_for(&server.closed, 1) && server.reason == DTLS_CLOSE_IDLE, "a silent peer leaves");
    stop();
}

/* A client that lost its state and starts again from the same address. */
static void test_restart(void)
{
    start((dtls_config){0}, (dtls_config){0});
    connected();
    dtls_endpoint_free(client.ep);
    wire_len = 0; /* its close_notify does not arrive */
    client = (struct side){.loop = loop};
    side_open(&client, "client", (dtls_config){.send = on_send});
    connect_client(NULL);
    CHECK_THAT(wait_for(&client.connected, 1) && wait_for(&server.connected, 2), "a restarted client gets in");
    CHECK_THAT(server.closed == 1 && server.reason == DTLS_CLOSE_REPLACED, "and replaces its old connection");
    stop();
}

/* ---- ClientHellos of others ---- */

static void test_replayed_hello(void)
{
    dtls_counters n;
    start((dtls_config){0}, (dtls_config){0});
    server.echo = 1;
    wire_drop = keep_hellos;
    connected();
    dtls_conn *c = client.conn;
    struct datagram first = hellos[1];
    dtls_conn_close(c);
    wait_for(&server.closed, 1);
    c = connect_client(NULL);
    wait_for(&server.connected, 2);
    wait_for(&client.connected, 2);
    dtls_endpoint_input(server.ep, hellos[1].data, hellos[1].len, &client_addr, &server_addr);
    dtls_endpoint_counters(server.ep, &n);
    CHECK_THAT(first.len > 0 && n.conns == 1, "a repeated ClientHello starts nothing");
    dtls_endpoint_input(server.ep, first.data, first.len, &client_addr, &server_addr);
    dtls_endpoint_counters(server.ep, &n);
    CHECK_EQ(n.handshakes, 1, "an older one with a good cookie starts a handshake beside the connection");
    for (int i = 1; i <= 3; i++) {
        dtls_conn_send(c, "alive", 5);
        wait_for(&client.messages, i);
    }
    CHECK_THAT(client.messages == 3 && server.closed == 1, "the connection lives beside a replayed handshake");
    stop();
}

/* ---- callbacks that end things ---- */

static dtls_event end_at;

static void close_own(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)s;
    if (event == end_at) {
        dtls_conn_close(conn);
        dtls_conn_close(conn);
    }
}

static void free_own_endpoint(struct side *s, dtls_conn *conn, dtls_event event)
{
    if (event == end_at) {
        dtls_endpoint_free(dtls_conn_endpoint(conn));
        s->ep = NULL;
        CHECK(dtls_conn_send(conn, "late", 4) == DTLS_ERR_STATE); /* still in memory until the turn ends */
    }
}

static void connect_again(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)conn;
    if (event == DTLS_EV_CLOSED && s->closed == 1)
        connect_client(NULL);
}

static void test_endings(void)
{
    static const struct {
        dtls_event at;
        const char *name;
    } cases[] = {{DTLS_EV_CONNECTED, "connected"},
                 {DTLS_EV_MESSAGE, "message"},
                 {DTLS_EV_IDLE, "idle"},
                 {DTLS_EV_CLOSED, "closed"}};
    void (*const how[])(struct side *, dtls_conn *, dtls_event) = {close_own, free_own_endpoint};
    const dtls_config idle = {.idle_ms = 20, .idle_timeout_ms = 100};
    for (int h = 0; h < 2; h++) {
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            start(idle, idle);
            end_at = cases[i].at;
            server.inside = how[h];
            connect_client(NULL);
            wait_for(&client.connected, 1);
            if (client.conn)
                dtls_conn_send(client.conn, "x", 1);
            int good = wait_for(&server.closed, 1) && wait_for(&client.closed, 1) && server.closed == 1;
            CHECK_THAT(good && (!h || server.ep == NULL), "%s in the callback for %s",
                       h ? "endpoint freed" : "connection closed", cases[i].name);
            stop();
        }
    }
    start((dtls_config){0}, (dtls_config){0});
    client.inside = connect_again;
    connected();
    dtls_conn_close(client.conn);
    CHECK_THAT(wait_for(&client.connected, 2), "connecting again in the callback for closed");
    stop();
}

/* ---- what others send ---- */

/* A failed handshake elsewhere in the program leaves its errors in the thread's queue. */
static void poison(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)s, (void)conn, (void)event;
    BIO *empty = BIO_new(BIO_s_mem());
    CHECK(!PEM_read_bio_X509(empty, NULL, NULL, NULL));
    BIO_free(empty);
}

static void test_poisoned_queue(void)
{
    start((dtls_config){0}, (dtls_config){0});
    server.echo = 1;
    server.inside = client.inside = poison;
    poison(NULL, NULL, DTLS_EV_IDLE);
    connected();
    for (int i = 0; i < 3; i++)
        dtls_conn_send(client.conn, "hello", 5);
    CHECK_THAT(wait_for(&client.messages, 3) && !client.closed && !server.closed,
               "errors others left in OpenSSL's queue");
    ERR_clear_error();
    stop();
}

static void forge(struct side *to, const void *data, size_t len)
{
    int server_side = to == &server;
    dtls_endpoint_input(to->ep, data, len, server_side ? &client_addr : &server_addr,
                        server_side ? &server_addr : &client_addr);
}

/* openssl/openssl#25290 and its like: each of these would end a connection that OpenSSL alone looks after. */
static void forge_all(struct side *to)
{
    unsigned char r[64] = {23, 0xfe, 0xfd, 0, 1, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0};
    for (unsigned type = 19; type < 26; type++) {
        for (unsigned epoch = 0; epoch < 3; epoch++) {
            for (unsigned len = 0; len < 50; len++) {
                r[0] = (unsigned char)type;
                r[4] = (unsigned char)epoch;
                r[12] = (unsigned char)len;
                if (epoch == 0 && type == 21)
                    r[13] = 2; /* fatal */
                forge(to, r, 13 + len);
                forge(to, r, 13 + len / 2); /* cut short */
                r[13] = 0;
            }
        }
    }
    for (unsigned len = 0; len < 14; len++)
        forge(to, r, len);
}

static int forging(const struct datagram *d)
{
    static int busy;
    if (!busy) {
        busy = 1;
        forge_all(d->to.port == server_addr.port ? &server : &client);
        busy = 0;
    }
    return 0;
}

static void test_forgeries(void)
{
    dtls_counters n;
    start((dtls_config){0}, (dtls_config){0});
    server.echo = 1;
    wire_drop = forging; /* before each real datagram */
    CHECK_THAT(connected(), "handshake among forged datagrams");
    for (int i = 0; i < 5; i++) {
        dtls_conn_send(client.conn, "alive", 5);
        wait_for(&client.messages, i + 1);
    }
    CHECK_THAT(client.messages == 5 && !client.closed && !server.closed, "connection among forged datagrams");
    dtls_endpoint_counters(server.ep, &n);
    CHECK_THAT(n.dropped[DTLS_DROP_SHORT] && n.dropped[DTLS_DROP_EPOCH] && n.dropped[DTLS_DROP_MALFORMED] &&
                   n.dropped[DTLS_DROP_ALERT] && n.dropped[DTLS_DROP_DATA] && n.dropped[DTLS_DROP_HANDSHAKE],
               "every kind is counted");
    stop();
}

/* ---- limits ---- */

static void connect_from(uint16_t port)
{
    client_addr.port = port;
    connect_client(NULL);
}

/* Clients at 192.0.2.2 get nothing but HelloVerifyRequests, so that they stop behind their ClientHello. */
static int drop_after_cookie(const struct datagram *d)
{
    return d->to.ip[3] == 2 && d->to.port != server_addr.port && d->data[13] != 3;
}

static void connect_from_elsewhere(uint16_t port)
{
    client_addr.ip[3] = 9;
    connect_from(port);
    client_addr.ip[3] = 2;
}

static void test_limits(void)
{
    dtls_counters n;
    start((dtls_config){.max_conns = 2}, (dtls_config){0});
    for (uint16_t i = 0; i < 2; i++) {
        connect_from((uint16_t)(6000 + i));
        wait_for(&server.connected, i + 1);
    }
    dtls_conn *last = client.conn;
    connect_from(6002);
    wait_for(&client.closed, 1);
    dtls_endpoint_counters(server.ep, &n);
    CHECK_THAT(server.connected == 2 && client.closed == 1 && n.conns == 2 && n.dropped[DTLS_DROP_LIMIT] > 0,
               "no more connections than max_conns");
    CHECK_THAT(client.reason == DTLS_CLOSE_REFUSED && strstr(client.reason_text, "internal error"),
               "who is one too many hears of it");
    dtls_conn_close(last);
    wait_for(&server.closed, 1);
    connect_from(6009);
    CHECK_THAT(wait_for(&server.connected, 3), "one leaves, one gets in");
    stop();
}

static void test_shares(void)
{
    dtls_counters n;
    start((dtls_config){.max_handshakes = 3, .handshake_timeout_ms = 1500},
          (dtls_config){.handshake_timeout_ms = 5000});
    wire_drop = drop_after_cookie;
    for (uint16_t i = 0; i < 30; i++) { /* ten times the limit, none of them completes */
        connect_from((uint16_t)(7000 + i));
        while (wire_len > 0)
            turn();
        dtls_endpoint_counters(server.ep, &n);
        CHECK(n.handshakes <= 3);
    }
    CHECK_EQ(n.handshakes_failed, 0, "a crowd from one address throws out none of its own");
    connect_from_elsewhere(7999);
    CHECK_THAT(n.handshakes == 3 && wait_for(&server.connected, 1), "it locks nobody else out");
    dtls_endpoint_counters(server.ep, &n);
    CHECK_EQ(n.handshakes_failed, 1, "one of it gave way");
    dtls_endpoint_free(client.ep);
    side_open(&client, "client", (dtls_config){.send = on_send});
    for (int i = 0; i < 400 && n.handshakes > 0; i++) {
        dtls_loop_poll(loop, 5);
        dtls_endpoint_counters(server.ep, &n);
    }
    wire_drop = NULL;
    wire_len = 0;
    CHECK_THAT(n.handshakes == 0 && n.handshakes_failed >= 3, "handshakes that stop leave at the deadline");
    connect_from(8000);
    CHECK_THAT(wait_for(&server.connected, 2), "and a good one still gets in");
    stop();
}

static void test_one_address(void)
{
    dtls_counters n;
    start((dtls_config){.max_conns = 4, .max_conns_per_address = 2}, (dtls_config){0});
    for (uint16_t i = 0; i < 2; i++) {
        connect_from((uint16_t)(6000 + i));
        wait_for(&client.connected, i + 1);
        wait_for(&server.connected, i + 1);
    }
    connect_from(6002);
    CHECK_THAT(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_REFUSED && server.connected == 2,
               "one more of the same address hears that it is refused");
    connect_from_elsewhere(6000);
    CHECK_THAT(wait_for(&server.connected, 3) && wait_for(&client.connected, 3), "another address gets in");
    dtls_endpoint_counters(server.ep, &n);
    CHECK_THAT(n.conns == 3 && n.dropped[DTLS_DROP_LIMIT] > 0, "and it was counted");
    stop();
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"messages", test_messages},
        {"loss", test_loss},
        {"last flight", test_last_flight},
        {"mtu of an open connection", test_mtu_stays},
        {"leftovers", test_leftovers},
        {"resumption", test_resumption},
        {"resumption elsewhere", test_resumption_elsewhere},
        {"names", test_names},
        {"idle", test_idle},
        {"restart", test_restart},
        {"replayed hello", test_replayed_hello},
        {"endings", test_endings},
        {"poisoned queue", test_poisoned_queue},
        {"forgeries", test_forgeries},
        {"limits", test_limits},
        {"shares", test_shares},
        {"one address", test_one_address},
    };
    return RUN_TESTS("memory", tests, argc, argv);
}
