/* Two endpoints that speak through a queue in memory: no socket, nothing but dtls.h. It shows how to bring a transport of
 * one's own, and tries what is easiest to provoke there: lost, forged and repeated datagrams.
 *
 *   memory CERTS_DIR
 */
#include "../dtls.h"

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
    extern void SSL_SESSION_free(struct ssl_session_st *);
    SSL_SESSION_free(session);
    stop();
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

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    certs = argv[1];
    dtls_addr_parse(&server_addr, "192.0.2.1:4444", NULL);
    dtls_addr_parse(&client_addr, "192.0.2.2:5555", NULL);
    test_messages();
    test_loss();
    test_resumption();
    test_idle();
    test_restart();
    return failed;
}
