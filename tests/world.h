/* Two endpoints, server and client, that speak through memory, and a record of what they are told. Where virtual.h is
 * included before this, time is virtual and certificates are made in memory; otherwise time is real and certificates are
 * those in CERTS_DIR. */
#ifndef WORLD_H
#define WORLD_H

#include "../dtls.h"
#include "check.h"

#include <openssl/ssl.h>

enum { WIRE_MAX = 256, DATAGRAM_BYTES = 17000, TURN_MS = 10, PATIENCE_TURNS = 6000 };

struct datagram {
    dtls_addr from, to;
    size_t len;
    unsigned char data[DATAGRAM_BYTES];
};

/* One side: its endpoint, and what it saw. */
struct side {
    dtls_loop *loop;
    dtls_endpoint *ep;
    dtls_conn *conn; /* the last one, until it closes */
    int connected, renewed, moved, messages, failed, closed, idle, writable, resumed, psk;
    dtls_addr before; /* the last move */
    dtls_reason reason;
    char peer_name[300], reason_text[256];
    char last[64]; /* message, or its beginning */
    size_t last_len;

    /* What a test may want to be different. */
    int echo;
    void (*inside)(struct side *s, dtls_conn *conn, dtls_event event); /* called last in each callback */
    const struct identity *id;                                         /* virtual.h has it, and its hook does these */
    const char *ciphers;
    int trusting;  /* it switches verification off */
    int keys_only; /* it has no certificates, and trusts none */
    uint64_t options, no_option;
    int (*hook)(SSL_CTX *ctx); /* after all these; not 0: gives up */
};

static dtls_loop *loop;
static struct side server, client;
static dtls_addr server_addr, client_addr;
static dtls_error connect_error;

static struct datagram wire[WIRE_MAX]; /* a transport must not deliver from inside send: it queues */
static size_t wire_len;
static int send_refuses;
static int (*wire_drop)(const struct datagram *d); /* whether a datagram is lost instead of delivered */
static void (*inside_send)(struct side *s);        /* the datagram is the last one on the wire */

static struct datagram hellos[2]; /* the last ClientHello without a cookie, and with one */

/* For wire_drop. */
static inline int keep_hellos(const struct datagram *d)
{
    if (d->data[0] == 22 && d->data[13] == 1 && d->data[18] < 2) /* handshake, ClientHello, message_seq */
        hellos[d->data[18]] = *d;
    return 0;
}

static inline int on_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    if (send_refuses || wire_len == WIRE_MAX || len > DATAGRAM_BYTES)
        return -1;
    struct datagram *d = &wire[wire_len++];
    d->from = *from;
    d->to = *to;
    d->len = len;
    memcpy(d->data, data, len);
    if (inside_send)
        inside_send(user);
    return 0;
}

static inline void on_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct side *s = dtls_endpoint_user(dtls_conn_endpoint(conn));
    dtls_info info;
    dtls_conn_info(conn, &info);
    switch (event) {
    case DTLS_EV_CONNECTED:
        s->conn = conn;
        s->connected++;
        s->resumed = info.resumed;
        s->psk = info.psk;
        snprintf(s->peer_name, sizeof s->peer_name, "%s", info.peer_name);
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
    case DTLS_EV_WRITABLE:
        s->writable++;
        break;
    case DTLS_EV_RENEWED:
        s->renewed++;
        s->resumed = info.resumed;
        break;
    case DTLS_EV_MOVED:
        s->moved++;
        memcpy(&s->before, data, sizeof s->before);
        break;
    case DTLS_EV_FAILED:
        s->failed++;
        s->reason = dtls_conn_reason(conn);
        snprintf(s->reason_text, sizeof s->reason_text, "%s", dtls_conn_reason_text(conn));
        break;
    case DTLS_EV_CLOSED:
        s->closed++;
        s->reason = dtls_conn_reason(conn);
        snprintf(s->reason_text, sizeof s->reason_text, "%s", dtls_conn_reason_text(conn));
        if (s->conn == conn)
            s->conn = NULL;
        break;
    }
    if (s->inside)
        s->inside(s, conn, event);
}

static inline dtls_addr address(const char *text)
{
    dtls_addr a;
    dtls_addr_parse(&a, text, NULL);
    return a;
}

/* With the files of that name, if no hook brings a certificate. */
static inline dtls_endpoint *endpoint_new(dtls_loop *on, const char *name, dtls_config cfg)
{
    char cert[512], key[512], ca_file[512];
    dtls_error err = {0};
    snprintf(cert, sizeof cert, "%s/%s.pem", certs, name);
    snprintf(key, sizeof key, "%s/%s.key", certs, name);
    snprintf(ca_file, sizeof ca_file, "%s/ca.pem", certs);
    if (!cfg.on_ssl_ctx) {
        cfg.cert_file = cert;
        cfg.key_file = key;
        cfg.ca_file = ca_file;
    }
    dtls_endpoint *ep = dtls_endpoint_new(on, &cfg, &err);
    REQUIRE(ep, "endpoint %s: %s", name, err.text);
    return ep;
}

#ifdef VIRTUAL_H
static const dtls_loop_config world_clock = {.now_us = virtual_now};

static inline int with_identity(void *user, SSL_CTX *ctx)
{
    const struct side *s = user;
    const struct identity *id = s->id ? s->id : s == &server ? &server_id : &client_id;
    if (s->trusting)
        SSL_CTX_set_verify(ctx, SSL_VERIFY_NONE, NULL);
    SSL_CTX_set_options(ctx, s->options);
    SSL_CTX_clear_options(ctx, s->no_option);
    return on_ssl_ctx((void *)(uintptr_t)id, ctx) || (s->ciphers && SSL_CTX_set_cipher_list(ctx, s->ciphers) != 1) ||
           (s->hook && s->hook(ctx) != 0);
}
#else
static const dtls_loop_config world_clock; /* the system's */
#endif

static inline void side_open(struct side *s, const char *name, dtls_config cfg)
{
    cfg.on_event = on_event;
    cfg.user = s;
#ifdef VIRTUAL_H
    cfg.on_ssl_ctx = with_identity;
#endif
    if (s->keys_only) {
        dtls_error err = {0};
        cfg.on_ssl_ctx = NULL;
        s->ep = dtls_endpoint_new(s->loop, &cfg, &err);
        REQUIRE(s->ep, "an endpoint without certificates: %s", err.text);
        return;
    }
    s->ep = endpoint_new(s->loop, name, cfg);
}

static inline void print_sides(void)
{
    const struct side *sides[] = {&server, &client};
    for (int i = 0; i < 2; i++)
        printf("; %s: %d connected, %d messages, %d closed: \"%s\"", i == 0 ? "server" : "client", sides[i]->connected,
               sides[i]->messages, sides[i]->closed, sides[i]->reason_text);
}

static inline void start(dtls_config server_cfg, dtls_config client_cfg)
{
    server.loop = client.loop = loop = dtls_loop_new(&world_clock);
    server_cfg.send = client_cfg.send = on_send;
    server_addr = address("192.0.2.1:4444");
    client_addr = address("192.0.2.2:5555");
    side_open(&server, "server", server_cfg);
    side_open(&client, "client", client_cfg);
    dtls_endpoint_listen(server.ep, NULL, NULL);
    check_values = print_sides;
}

static inline void stop(void)
{
    inside_send = NULL;
    wire_drop = NULL;
    send_refuses = 0;
    dtls_loop_free(loop);
    wire_len = 0;
    memset(&server, 0, sizeof server);
    memset(&client, 0, sizeof client);
    check_values = NULL;
}

static inline dtls_conn *connect_client(SSL_SESSION *session)
{
    dtls_target t = {.peer = server_addr, .local = client_addr, .name = "localhost", .session = session};
    client.conn = dtls_endpoint_connect(client.ep, &t, &connect_error);
    return client.conn;
}

/* What was under way arrives, and time goes on. */
static inline void turn(void)
{
    for (size_t n = wire_len; n > 0; n--) {
        struct datagram d = wire[0];
        memmove(wire, wire + 1, --wire_len * sizeof *wire);
        dtls_endpoint *ep = d.to.port == server_addr.port ? server.ep : client.ep;
        if (!(wire_drop && wire_drop(&d)) && ep)
            dtls_endpoint_input(ep, d.data, d.len, &d.from, &d.to);
    }
#ifdef VIRTUAL_H
    now_us += TURN_MS * 1000;
    dtls_loop_poll(loop, 0);
#else
    dtls_loop_poll(loop, wire_len > 0 ? 0 : TURN_MS);
#endif
}

static inline int wait_for(const int *count, int value)
{
    for (int i = 0; i < PATIENCE_TURNS && *count < value; i++)
        turn();
    return *count >= value;
}

static inline int connected(void)
{
    return connect_client(NULL) && wait_for(&client.connected, 1) && wait_for(&server.connected, 1);
}

#endif
