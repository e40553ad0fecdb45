/* Two endpoints that speak through a queue in memory: no socket, nothing but dtls.h. It shows how to bring a
 * transport of one's own, and tries what is easiest to provoke there: lost, forged and repeated datagrams.
 *
 *   memory CERTS_DIR
 * */
#include "../dtls.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WIRE_MAX = 256, DATAGRAM_BYTES = 17000 };

struct datagram {
    dtls_addr from, to;
    size_t len;
    unsigned char data[DATAGRAM_BYTES];
};

/* One side of the world: its endpoint, and what it saw. */
struct side {
    dtls_endpoint *ep;
    dtls_conn *conn;
    int connected, messages, closed, idle;
    dtls_reason reason;
    char last[64];
    size_t last_len;
    int echo;
    void (*inside)(struct side *s, dtls_conn *conn, dtls_event event); /* what else a test does in the callback */
};

static struct datagram wire[WIRE_MAX]; /* a transport must not deliver from inside send: it queues */
static size_t wire_len;
static int (*wire_drop)(const struct datagram *d);
static struct side server, client;
static dtls_addr server_addr, client_addr;
static dtls_loop *loop;
static int input_in_send;
static const char *certs;
static int failed;

static void check(int good, const char *name)
{
    printf("%s - memory %s\n", good ? "ok" : "not ok", name);
    failed |= !good;
}

static int on_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    struct side *s = user;
    if (wire_len == WIRE_MAX || len > DATAGRAM_BYTES)
        return -1;
    wire[wire_len].from = *from;
    wire[wire_len].to = *to;
    wire[wire_len].len = len;
    memcpy(wire[wire_len++].data, data, len);
    if (dtls_endpoint_input(s->ep, data, len, to, from) == DTLS_ERR_STATE)
        input_in_send++; /* refused, as documented */
    return 0;
}

static void on_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct side *s = dtls_endpoint_user(dtls_conn_endpoint(conn));
    switch (event) {
    case DTLS_EV_CONNECTED:
        s->conn = conn;
        s->connected++;
        break;
    case DTLS_EV_MESSAGE:
        s->messages++;
        s->last_len = len;
        snprintf(s->last, sizeof s->last, "%.*s", (int)(len < 60 ? len : 60), (const char *)data);
        if (s->echo)
            dtls_conn_send(conn, data, len);
        break;
    case DTLS_EV_IDLE:
        s->idle++;
        break;
    case DTLS_EV_CLOSED:
        s->closed++;
        s->reason = dtls_conn_reason(conn);
        if (s->conn == conn)
            s->conn = NULL;
        break;
    }
    if (s->inside)
        s->inside(s, conn, event);
}

/* Carries datagrams until none is left. */
static void deliver(void)
{
    while (wire_len > 0) {
        struct datagram d = wire[0];
        memmove(wire, wire + 1, --wire_len * sizeof *wire);
        if (wire_drop && wire_drop(&d))
            continue;
        struct side *to = d.to.port == server_addr.port ? &server : &client;
        if (to->ep)
            dtls_endpoint_input(to->ep, d.data, d.len, &d.from, &d.to);
    }
}

static int wait_for(const int *flag, int value)
{
    for (int i = 0; i < 2000 && *flag < value; i++) {
        deliver();
        if (*flag < value)
            dtls_loop_poll(loop, 5);
    }
    return *flag >= value;
}

static dtls_endpoint *endpoint(struct side *s, const char *name, dtls_config cfg)
{
    char cert[512], key[512], ca[512];
    dtls_error err;
    memset(s, 0, sizeof *s);
    snprintf(cert, sizeof cert, "%s/%s.pem", certs, name);
    snprintf(key, sizeof key, "%s/%s.key", certs, name);
    snprintf(ca, sizeof ca, "%s/ca.pem", certs);
    cfg.cert_file = cert;
    cfg.key_file = key;
    cfg.ca_file = ca;
    cfg.on_event = on_event;
    cfg.send = on_send;
    cfg.user = s;
    s->ep = dtls_endpoint_new(loop, &cfg, &err);
    if (!s->ep) {
        printf("not ok - memory endpoint %s: %s\n", name, err.text);
        exit(1);
    }
    return s->ep;
}

static void start(dtls_config server_cfg, dtls_config client_cfg)
{
    dtls_error err;
    loop = dtls_loop_new(NULL);
    endpoint(&server, "server", server_cfg);
    endpoint(&client, "client", client_cfg);
    server.echo = 1;
    dtls_endpoint_listen(server.ep, NULL, &err);
}

static void stop(void)
{
    wire_drop = NULL;
    wire_len = 0;
    dtls_endpoint_free(client.ep);
    dtls_endpoint_free(server.ep);
    server.ep = client.ep = NULL;
    dtls_loop_free(loop);
}

static dtls_conn *connect_client(struct ssl_session_st *session)
{
    dtls_error err = {0};
    dtls_target t = {.peer = server_addr, .local = client_addr, .name = "localhost", .session = session};
    dtls_conn *c = dtls_endpoint_connect(client.ep, &t, &err);
    if (!c)
        printf("not ok - memory connect: %s\n", err.text);
    return c;
}

static void test_messages(void)
{
    static char big[DTLS_MESSAGE_MAX + 1];
    dtls_info info;
    start((dtls_config){0}, (dtls_config){0});
    dtls_conn *c = connect_client(NULL);
    check(c && client.connected == 0, "connect returns before any event");
    check(wait_for(&server.connected, 1) && wait_for(&client.connected, 1), "handshake without a socket");
    check(input_in_send > 0, "input from inside send is refused");
    check(dtls_conn_send(c, "hello", 5) == 0 && wait_for(&client.messages, 1) && strcmp(client.last, "hello") == 0,
          "message and echo");
    memset(big, 'x', sizeof big);
    check(dtls_conn_send(c, big, DTLS_MESSAGE_MAX) == 0 && wait_for(&client.messages, 2) &&
              client.last_len == DTLS_MESSAGE_MAX,
          "message of 16,384 bytes");
    check(dtls_conn_send(c, big, sizeof big) == DTLS_ERR_SIZE && dtls_conn_send(c, "", 0) == DTLS_ERR_SIZE &&
              wire_len == 0,
          "too long and empty messages are refused, nothing is sent");
    check(dtls_conn_send(c, "still", 5) == 0 && wait_for(&client.messages, 3), "the connection is unharmed by that");
    dtls_conn_info(server.conn, &info);
    check(strcmp(info.peer_name, "client") == 0 && info.server && info.connected && info.messages_in == 3,
          "the server knows its client");
    check(dtls_conn_payload_max(c) > 1300 && dtls_conn_payload_max(c) < 1472, "payload limit fits the MTU");
    dtls_conn_close(c);
    check(client.closed == 1 && client.reason == DTLS_CLOSE_LOCAL, "one close event, here");
    check(wait_for(&server.closed, 1) && server.reason == DTLS_CLOSE_PEER, "one close event, there");
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

static int drop_all(const struct datagram *d)
{
    (void)d;
    return 1;
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
    check(good && counters.retransmissions > 0, "handshake with two of five datagrams lost");
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
    check(datagrams == 2 && last_flight == 3, "the last flight is sent again in one datagram");
    wire_drop = NULL;
    check(wait_for(&client.connected, 1), "and ends the handshake when it arrives");
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
    dtls_conn *c = connect_client(NULL);
    wait_for(&client.connected, 1);
    dtls_conn_close(c);
    wait_for(&server.closed, 1);
    int kept = flight_len;
    wire_drop = leftovers_first;
    connect_client(NULL);
    check(kept > 0 && wait_for(&client.connected, 2) && !began_anew && client.closed == 1,
          "an earlier handshake's flight that arrives late spoils nothing");
    stop();
}

static void test_resumption(void)
{
    dtls_info info;
    start((dtls_config){0}, (dtls_config){0});
    dtls_conn *c = connect_client(NULL);
    wait_for(&server.connected, 1);
    wait_for(&client.connected, 1);
    struct ssl_session_st *session = dtls_conn_session(c);
    dtls_conn_close(c);
    wait_for(&server.closed, 1);
    connect_client(session);
    wait_for(&server.connected, 2);
    wait_for(&client.connected, 2);
    dtls_conn_info(server.conn, &info);
    check(info.resumed && strcmp(info.peer_name, "client") == 0, "resumption keeps the peer's identity");
    SSL_SESSION_free(session);
    stop();
}

/* Nothing is verified again in a resumed handshake, so a session must not carry one server's identity to another
 * name. */
static void test_resumption_elsewhere(void)
{
    dtls_error err;
    start((dtls_config){0}, (dtls_config){0});
    dtls_conn *c = connect_client(NULL);
    wait_for(&client.connected, 1);
    struct ssl_session_st *session = dtls_conn_session(c);
    dtls_conn_close(c);
    wait_for(&server.closed, 1);
    dtls_target t = {.peer = server_addr, .local = client_addr, .name = "bank.example", .session = session};
    dtls_endpoint_connect(client.ep, &t, &err);
    check(wait_for(&client.closed, 2) && client.reason == DTLS_CLOSE_VERIFY && client.connected == 1,
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
        char text[96];
        dtls_error err;
        start((dtls_config){0}, (dtls_config){0});
        dtls_target t = {.peer = server_addr, .local = client_addr, .name = names[i].name};
        dtls_conn *c = dtls_endpoint_connect(client.ep, &t, &err);
        int connected = c && wait_for(&client.connected, names[i].good) && client.connected;
        if (c && !names[i].good)
            connected = !(wait_for(&client.closed, 1) && client.reason == DTLS_CLOSE_VERIFY && !client.connected);
        snprintf(text, sizeof text, "name \"%s\" is %s", names[i].name, names[i].good ? "accepted" : "refused");
        check(connected == names[i].good, text);
        stop();
    }
}

static void test_idle(void)
{
    start((dtls_config){.idle_timeout_ms = 300}, (dtls_config){.idle_ms = 50, .idle_repeat_ms = 50});
    connect_client(NULL);
    wait_for(&server.connected, 1);
    wait_for(&client.connected, 1);
    check(wait_for(&client.idle, 2), "idle events repeat");
    check(wait_for(&server.closed, 1) && server.reason == DTLS_CLOSE_IDLE, "a silent peer leaves");
    stop();
}

/* A client that lost its state and starts again from the same address. */
static void test_restart(void)
{
    start((dtls_config){0}, (dtls_config){0});
    connect_client(NULL);
    wait_for(&server.connected, 1);
    wait_for(&client.connected, 1);
    dtls_endpoint_free(client.ep);
    client.ep = NULL;
    wire_drop = drop_all; /* its close_notify does not arrive */
    deliver();
    wire_drop = NULL;
    endpoint(&client, "client", (dtls_config){0});
    connect_client(NULL);
    check(wait_for(&client.connected, 1) && wait_for(&server.connected, 2), "a restarted client gets in");
    check(server.closed == 1 && server.reason == DTLS_CLOSE_REPLACED, "and replaces its old connection");
    stop();
}

/* ---- ClientHellos of others ---- */

static struct datagram hello; /* the last one with a cookie */

static int keep_hello(const struct datagram *d)
{
    if (d->to.port == server_addr.port && d->data[0] == 22 && d->data[13] == 1 && d->data[60] != 0)
        hello = *d; /* its cookie's length: no session id stands before it here */
    return 0;
}

static void test_replayed_hello(void)
{
    dtls_counters n;
    start((dtls_config){0}, (dtls_config){0});
    wire_drop = keep_hello;
    dtls_conn *c = connect_client(NULL);
    wait_for(&server.connected, 1);
    wait_for(&client.connected, 1);
    struct datagram first = hello;
    dtls_conn_close(c);
    wait_for(&server.closed, 1);
    c = connect_client(NULL);
    wait_for(&server.connected, 2);
    wait_for(&client.connected, 2);
    dtls_endpoint_input(server.ep, hello.data, hello.len, &client_addr, &server_addr);
    dtls_endpoint_counters(server.ep, &n);
    check(first.len > 0 && n.conns == 1, "a repeated ClientHello starts nothing");
    dtls_endpoint_input(server.ep, first.data, first.len, &client_addr, &server_addr);
    dtls_endpoint_counters(server.ep, &n);
    check(n.handshakes == 1, "an older one with a good cookie starts a handshake beside the connection");
    for (int i = 1; i <= 3; i++) {
        dtls_conn_send(c, "alive", 5);
        wait_for(&client.messages, i);
    }
    check(client.messages == 3 && server.closed == 1, "the connection lives beside a replayed handshake");
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
        if (dtls_conn_send(conn, "late", 4) != DTLS_ERR_STATE) /* still in memory until the turn ends */
            failed = 1;
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
            char name[96];
            start(idle, idle);
            end_at = cases[i].at;
            server.inside = how[h];
            server.echo = 0;
            connect_client(NULL);
            wait_for(&client.connected, 1);
            if (client.conn)
                dtls_conn_send(client.conn, "x", 1);
            int good = wait_for(&server.closed, 1) && wait_for(&client.closed, 1) && server.closed == 1;
            snprintf(name, sizeof name, "%s in the callback for %s", h ? "endpoint freed" : "connection closed",
                     cases[i].name);
            check(good && (!h || server.ep == NULL), name);
            stop();
        }
    }
    start((dtls_config){0}, (dtls_config){0});
    client.inside = connect_again;
    connect_client(NULL);
    wait_for(&client.connected, 1);
    dtls_conn_close(client.conn);
    check(wait_for(&client.connected, 2), "connecting again in the callback for closed");
    stop();
}

/* ---- what others send ---- */

/* A failed handshake elsewhere in the program leaves its errors in the thread's queue. */
static void poison(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)s, (void)conn, (void)event;
    BIO *empty = BIO_new(BIO_s_mem());
    if (PEM_read_bio_X509(empty, NULL, NULL, NULL))
        failed = 1;
    BIO_free(empty);
}

static void test_poisoned_queue(void)
{
    start((dtls_config){0}, (dtls_config){0});
    server.inside = client.inside = poison;
    poison(NULL, NULL, DTLS_EV_IDLE);
    dtls_conn *c = connect_client(NULL);
    wait_for(&client.connected, 1);
    wait_for(&server.connected, 1);
    for (int i = 0; i < 3; i++)
        dtls_conn_send(c, "hello", 5);
    check(wait_for(&client.messages, 3) && !client.closed && !server.closed, "errors others left in OpenSSL's queue");
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
    wire_drop = forging; /* before each real datagram */
    dtls_conn *c = connect_client(NULL);
    check(wait_for(&client.connected, 1) && wait_for(&server.connected, 1), "handshake among forged datagrams");
    for (int i = 0; i < 5; i++) {
        dtls_conn_send(c, "alive", 5);
        wait_for(&client.messages, i + 1);
    }
    check(client.messages == 5 && !client.closed && !server.closed, "connection among forged datagrams");
    dtls_endpoint_counters(server.ep, &n);
    check(n.dropped[DTLS_DROP_SHORT] && n.dropped[DTLS_DROP_EPOCH] && n.dropped[DTLS_DROP_MALFORMED] &&
              n.dropped[DTLS_DROP_ALERT] && n.dropped[DTLS_DROP_DATA] && n.dropped[DTLS_DROP_HANDSHAKE],
          "every kind is counted");
    stop();
}

/* ---- limits ---- */

static void connect_from(uint16_t port)
{
    dtls_addr was = client_addr;
    client_addr.port = port;
    connect_client(NULL);
    client_addr = was;
}

static int drop_to_clients_after_cookie(const struct datagram *d)
{
    return d->to.port != server_addr.port && d->data[13] != 3; /* only HelloVerifyRequests get through */
}

static void test_limits(void)
{
    dtls_counters n;
    start((dtls_config){.max_conns = 2}, (dtls_config){.handshake_timeout_ms = 300});
    for (uint16_t i = 0; i < 3; i++) {
        connect_from((uint16_t)(6000 + i));
        wait_for(i < 2 ? &client.connected : &client.closed, i < 2 ? i + 1 : 1);
    }
    dtls_endpoint_counters(server.ep, &n);
    check(server.connected == 2 && client.closed == 1 && n.conns == 2 && n.dropped[DTLS_DROP_LIMIT] > 0,
          "no more connections than max_conns");
    dtls_conn_close(client.conn);
    wait_for(&server.closed, 1);
    connect_from(6009);
    check(wait_for(&server.connected, 3), "one leaves, one gets in");
    stop();

    start((dtls_config){.max_handshakes = 3, .handshake_timeout_ms = 300}, (dtls_config){.handshake_timeout_ms = 5000});
    wire_drop = drop_to_clients_after_cookie;
    for (uint16_t i = 0; i < 30; i++) { /* ten times the limit, none of them completes */
        connect_from((uint16_t)(7000 + i));
        deliver();
        dtls_endpoint_counters(server.ep, &n);
        if (n.handshakes > 3)
            failed = 1;
    }
    wire_drop = NULL;
    connect_from(7999);
    check(n.handshakes == 3 && wait_for(&server.connected, 1), "silent handshakes lock nobody out");
    wire_drop = drop_to_clients_after_cookie;
    dtls_endpoint_free(client.ep);
    endpoint(&client, "client", (dtls_config){0});
    for (int i = 0; i < 200 && n.handshakes > 0; i++) {
        dtls_loop_poll(loop, 5);
        dtls_endpoint_counters(server.ep, &n);
    }
    wire_drop = NULL;
    wire_len = 0;
    check(n.handshakes == 0 && n.handshakes_failed >= 30, "handshakes that stop leave at the deadline");
    connect_from(8000);
    check(wait_for(&server.connected, 2), "and a good one still gets in");
    stop();
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    certs = argv[1];
    dtls_addr_parse(&server_addr, "192.0.2.1:4444", NULL);
    dtls_addr_parse(&client_addr, "192.0.2.2:5555", NULL);
    test_messages();
    test_loss();
    test_last_flight();
    test_leftovers();
    test_resumption();
    test_resumption_elsewhere();
    test_names();
    test_idle();
    test_restart();
    test_replayed_hello();
    test_endings();
    test_poisoned_queue();
    test_forgeries();
    test_limits();
    return failed;
}
