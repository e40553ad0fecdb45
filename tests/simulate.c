/* Whole worlds in one process, from a seed: a server, several clients, and a network that loses, doubles, delays,
 * reorders, damages and cuts off; clients that vanish and come back on the same port; a server that restarts. Time is
 * virtual, for libssl as well, and so are chance and the certificates: a seed repeats its world.
 *
 *   simulate WORLDS [FIRST_SEED [LOSS_PERCENT]]
 *
 * Checked all along: no message is delivered twice, changed, or to the wrong connection; each connection has one end;
 * at the end tables and timers are empty. Handshakes that fail though no cut and no side's end was in their way are
 * printed: under damage some cannot succeed. Leaks are the sanitizer's business. */
#include "virtual.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    CLIENTS_MAX = 8,
    FLYING_MAX = 4096,
    MESSAGES_MAX = 64,
    SERVER_PORT = 4433,
    CLIENT_PORT = 20000,
    LIFE_MS = 60000, /* clients come and go for so long */
    TIMES_MAX = 200000
};

/* One datagram in the air. */
struct datagram {
    int64_t at;
    uint64_t order; /* among those of the same time */
    dtls_addr from, to;
    size_t len;
    unsigned char *data;
};

/* What every message says of itself; the rest is a pattern from these. */
struct message {
    uint32_t client, life, number, len;
};

struct client {
    dtls_addr addr;
    dtls_conn *conn;
    uint32_t life; /* counts connections */
    int64_t connecting_at;
    int open, sent;
    int trouble;                      /* since connecting, a cut or a side's end could have hurt */
    unsigned char seen[MESSAGES_MAX]; /* echoes that came back in this life */
    SSL_SESSION *session;
    dtls_timer *timer;
};

/* The server's view of one connection. */
struct served {
    int used;
    struct message first;
    unsigned char seen[MESSAGES_MAX];
};

struct world {
    uint64_t seed, random;
    dtls_loop *loop;
    dtls_endpoint *server, *clients_ep;
    struct client clients[CLIENTS_MAX];
    int clients_len;
    struct datagram *flying[FLYING_MAX + 1]; /* a heap */
    size_t flying_len;
    uint64_t order;
    int loss, twice, late, damage, cut_percent; /* percent */
    int64_t cut_until;
    int muted; /* the server's process is gone: what it sends is lost */
    int ending;
    unsigned serving;
};

static struct world *w;
static long associations, resumptions, messages, datagrams, restarts, failures;
static struct times {
    double value[TIMES_MAX];
    size_t len;
} full, resumed; /* of undisturbed handshakes, seconds */

static uint32_t dice(uint32_t n)
{
    return (uint32_t)(next_random(&w->random) >> 32) % n;
}

static int percent(int p)
{
    return (int)dice(100) < p;
}

static void broken(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("not ok - simulate seed %llu at %.3f s: ", (unsigned long long)w->seed, (double)now_us / 1e6);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    fflush(stdout);
    exit(1);
}

/* ---- the network ---- */

static int sooner(const struct datagram *a, const struct datagram *b)
{
    return a->at != b->at ? a->at < b->at : a->order < b->order;
}

static void fly(const void *data, size_t len, const dtls_addr *from, const dtls_addr *to, int64_t delay)
{
    if (w->flying_len == FLYING_MAX)
        return;
    struct datagram *d = malloc(sizeof *d);
    *d = (struct datagram){now_us + delay, w->order++, *from, *to, len, malloc(len)};
    memcpy(d->data, data, len);
    size_t i = ++w->flying_len;
    for (; i > 1 && sooner(d, w->flying[i / 2]); i /= 2)
        w->flying[i] = w->flying[i / 2];
    w->flying[i] = d;
}

static struct datagram *land(void)
{
    struct datagram *d = w->flying[1], *last = w->flying[w->flying_len--];
    size_t i = 1;
    for (size_t child; (child = i * 2) <= w->flying_len; i = child) {
        if (child < w->flying_len && sooner(w->flying[child + 1], w->flying[child]))
            child++;
        if (!sooner(w->flying[child], last))
            break;
        w->flying[i] = w->flying[child];
    }
    w->flying[i] = last;
    return d;
}

static int on_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    (void)user;
    datagrams++;
    if (w->muted || now_us < w->cut_until || percent(w->loss))
        return 0;
    for (int copies = 1 + percent(w->twice); copies > 0; copies--) {
        int64_t delay = 1000 + (percent(w->late) ? 5000 + dice(75000) : dice(500));
        unsigned char *damaged = NULL;
        size_t n = len;
        if (percent(w->damage)) {
            damaged = malloc(len);
            memcpy(damaged, data, len);
            if (percent(25))
                n = 1 + dice((uint32_t)len);
            else
                damaged[dice((uint32_t)len)] ^= (unsigned char)(1u << dice(8));
        }
        fly(damaged ? damaged : data, n, from, to, delay);
        free(damaged);
    }
    return 0;
}

/* ---- messages ---- */

static unsigned char pattern(const struct message *m, uint32_t i)
{
    return (unsigned char)(m->client * 31 + m->life * 17 + m->number * 7 + i * 3);
}

static size_t message_make(unsigned char *buf, uint32_t client, uint32_t life, uint32_t number)
{
    uint32_t len = (uint32_t)sizeof(struct message) + (percent(3) ? dice(16000) : dice(1200));
    struct message m = {client, life, number, len};
    memcpy(buf, &m, sizeof m);
    for (uint32_t i = sizeof m; i < len; i++)
        buf[i] = pattern(&m, i);
    return len;
}

static struct message message_check(const unsigned char *data, size_t len)
{
    struct message m;
    if (len < sizeof m)
        broken("a message of %zu bytes", len);
    memcpy(&m, data, sizeof m);
    if (m.len != len || m.number >= MESSAGES_MAX)
        broken("a message changed its size from %u to %zu", m.len, len);
    for (uint32_t i = sizeof m; i < len; i++)
        if (data[i] != pattern(&m, i))
            broken("a message was changed");
    return m;
}

static void once(unsigned char *seen, const struct message *m)
{
    if (seen[m->number]++)
        broken("message %u of client %u came twice", m->number, m->client);
    messages++;
}

/* ---- the server ---- */

static void server_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct served *s = dtls_conn_user(conn);
    dtls_info info;
    if (event == DTLS_EV_CONNECTED) {
        dtls_conn_set_user(conn, calloc(1, sizeof *s));
        w->serving++;
    } else if (event == DTLS_EV_MESSAGE) {
        struct message m = message_check(data, len);
        dtls_conn_info(conn, &info);
        if (!s->used)
            s->first = m;
        s->used = 1;
        if (m.client != (uint32_t)(info.peer.port - CLIENT_PORT) || m.client != s->first.client ||
            m.life != s->first.life)
            broken("client %u life %u got into the connection of client %u life %u", m.client, m.life, s->first.client,
                   s->first.life);
        once(s->seen, &m);
        dtls_conn_send(conn, data, len);
    } else if (event == DTLS_EV_CLOSED) {
        if (!s)
            broken("a connection closed twice, or before it was open");
        dtls_conn_set_user(conn, NULL);
        free(s);
        w->serving--;
    }
}

static dtls_endpoint *endpoint(struct identity *id, dtls_config cfg)
{
    dtls_error err;
    cfg.on_ssl_ctx = on_ssl_ctx;
    cfg.user = id;
    cfg.send = on_send;
    dtls_endpoint *ep = dtls_endpoint_new(w->loop, &cfg, &err);
    if (!ep)
        broken("%s", err.text);
    return ep;
}

static void server_start(void)
{
    w->server = endpoint(&server_id, (dtls_config){.on_event = server_event, .idle_timeout_ms = 20000});
    dtls_endpoint_listen(w->server, NULL, NULL);
}

static void trouble_everywhere(void)
{
    for (int i = 0; i < w->clients_len; i++)
        w->clients[i].trouble = 1;
}

/* As if killed: nothing more of it gets out, and its memory is gone. */
static void server_restart(void)
{
    restarts++;
    trouble_everywhere();
    w->muted = 1;
    dtls_endpoint_free(w->server);
    w->muted = 0;
    if (w->serving)
        broken("%u connections outlived their endpoint", w->serving);
    server_start();
}

/* ---- clients ---- */

static void client_connect(struct client *c)
{
    dtls_target t = {.peer = {.ip = {10, 0, 0, 1}, .port = SERVER_PORT, .family = 4}, .name = "localhost", .user = c};
    dtls_error err;
    t.local = c->addr;
    t.session = percent(70) ? c->session : NULL;
    c->connecting_at = now_us;
    c->trouble = now_us < w->cut_until;
    c->open = c->sent = 0;
    c->life++;
    memset(c->seen, 0, sizeof c->seen);
    c->conn = dtls_endpoint_connect(w->clients_ep, &t, &err);
    if (!c->conn)
        broken("client cannot connect: %s", err.text);
}

/* Away: with a close_notify, or as if killed. */
static void client_leave(struct client *c)
{
    int64_t cut = w->cut_until;
    if (percent(50))
        w->cut_until = INT64_MAX;
    dtls_conn_close(c->conn);
    w->cut_until = cut;
}

static void client_turn(void *user)
{
    struct client *c = user;
    unsigned char buf[DTLS_MESSAGE_MAX];
    dtls_info info;
    if (w->ending)
        return;
    if (!c->conn) {
        client_connect(c);
        dtls_timer_set(c->timer, 1000);
        return;
    }
    dtls_conn_info(c->conn, &info);
    if (info.connected && c->sent < MESSAGES_MAX) {
        size_t n = message_make(buf, c->addr.port - CLIENT_PORT, c->life, (uint32_t)c->sent++);
        if (dtls_conn_send(c->conn, buf, n) != 0)
            broken("a message of %zu bytes was refused", n);
    }
    if (percent(5) || c->sent == MESSAGES_MAX)
        client_leave(c);
    dtls_timer_set(c->timer, 1 + dice(1500));
}

static void client_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct client *c = dtls_conn_user(conn);
    dtls_info info;
    if (c->conn != conn)
        broken("an event for a connection that was closed");
    if (event == DTLS_EV_CONNECTED) {
        dtls_conn_info(conn, &info);
        c->open = 1;
        associations++;
        resumptions += info.resumed;
        struct times *t = info.resumed ? &resumed : &full;
        if (!c->trouble && t->len < TIMES_MAX)
            t->value[t->len++] = (double)(now_us - c->connecting_at) / 1e6;
        SSL_SESSION_free(c->session);
        c->session = dtls_conn_session(conn);
    } else if (event == DTLS_EV_MESSAGE) {
        struct message m = message_check(data, len);
        if (m.client != (uint32_t)(c->addr.port - CLIENT_PORT) || m.life != c->life)
            broken("client %u got an answer to client %u", (unsigned)(c->addr.port - CLIENT_PORT), m.client);
        once(c->seen, &m);
    } else if (event == DTLS_EV_CLOSED) {
        dtls_reason reason = dtls_conn_reason(conn);
        c->conn = NULL;
        if (reason != DTLS_CLOSE_LOCAL && !c->open) {
            failures++;
            if (!c->trouble)
                printf("# seed %llu at %.3f s: %s\n", (unsigned long long)w->seed, (double)now_us / 1e6,
                       dtls_conn_reason_text(conn));
        }
    }
}

/* ---- worlds ---- */

static void advance(int64_t until)
{
    while (now_us < until) {
        int ms = dtls_loop_timeout(w->loop);
        int64_t next = ms < 0 ? until : now_us + ms * (int64_t)1000;
        if (w->flying_len && w->flying[1]->at < next)
            next = w->flying[1]->at;
        now_us = next < until ? next : until;
        while (w->flying_len && w->flying[1]->at <= now_us) {
            struct datagram *d = land();
            dtls_endpoint *ep = d->to.port == SERVER_PORT ? w->server : w->clients_ep;
            dtls_endpoint_input(ep, d->data, d->len, &d->from, &d->to);
            free(d->data);
            free(d);
        }
        dtls_loop_poll(w->loop, 0);
    }
}

static void empty(dtls_endpoint *ep, const char *whose)
{
    dtls_counters n;
    dtls_endpoint_counters(ep, &n);
    if (n.conns || n.handshakes)
        broken("%zu connections and %zu handshakes are left in the %s's table", n.conns, n.handshakes, whose);
}

static void world_run(uint64_t seed, int loss)
{
    struct world world = {.seed = seed, .random = seed};
    w = &world;
    chance_state = seed;
    now_us = 1000000;
    w->loss = loss >= 0 ? loss : (int)dice(31);
    w->twice = (int)dice(11);
    w->late = (int)dice(21);
    w->damage = (int)dice(3);
    w->cut_percent = (int)dice(3);
    w->clients_len = 1 + (int)dice(CLIENTS_MAX);
    w->loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now});
    server_start();
    w->clients_ep = endpoint(&client_id, (dtls_config){.on_event = client_event, .idle_timeout_ms = 15000});
    for (int i = 0; i < w->clients_len; i++) {
        struct client *c = &w->clients[i];
        c->addr = (dtls_addr){.ip = {10, 0, 0, 2}, .port = (uint16_t)(CLIENT_PORT + i), .family = 4};
        c->timer = dtls_timer_new(w->loop, client_turn, c);
        dtls_timer_set(c->timer, dice(3000));
    }
    int64_t end = now_us + LIFE_MS * (int64_t)1000;
    while (now_us < end) {
        advance(now_us + 1000000);
        if (percent(w->cut_percent)) {
            w->cut_until = now_us + dice(5000000);
            trouble_everywhere();
        }
        if (dice(300) == 0)
            server_restart();
    }
    w->ending = 1;
    for (int i = 0; i < w->clients_len; i++)
        if (w->clients[i].conn)
            client_leave(&w->clients[i]);
    advance(now_us + 60000000); /* deadlines and idle timeouts pass */
    empty(w->server, "server");
    empty(w->clients_ep, "client");
    for (int i = 0; i < w->clients_len; i++) {
        dtls_timer_free(w->clients[i].timer);
        SSL_SESSION_free(w->clients[i].session);
    }
    if (w->serving || dtls_loop_timeout(w->loop) != -1)
        broken("%u connections and a timer are left", w->serving);
    dtls_loop_free(w->loop);
    while (w->flying_len) {
        struct datagram *d = land();
        free(d->data);
        free(d);
    }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_times(struct times *t, const char *kind)
{
    if (!t->len)
        return;
    qsort(t->value, t->len, sizeof *t->value, by_value);
    printf("# simulate: undisturbed %s handshakes: median %.3f s, 99 %% within %.3f s, all within %.3f s\n", kind,
           t->value[t->len / 2], t->value[t->len * 99 / 100], t->value[t->len - 1]);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    long worlds = atol(argv[1]);
    uint64_t first = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    int loss = argc > 3 ? atoi(argv[3]) : -1;
    virtual_chance();
    virtual_identities();
    clock_t began = clock();
    for (long i = 0; i < worlds; i++)
        world_run(first + (uint64_t)i, loss);
    double seconds = (double)(clock() - began) / CLOCKS_PER_SEC;
    printf("# simulate: %ld worlds, %ld associations (%ld resumed), %ld messages, %ld datagrams, %ld server restarts, "
           "%.0f associations a second\n",
           worlds, associations, resumptions, messages, datagrams, restarts, (double)associations / seconds);
    print_times(&full, "full");
    print_times(&resumed, "resumed");
    printf("# simulate: %ld handshakes failed\n", failures);
    virtual_identities_free();
    printf("ok - simulate %ld worlds\n", worlds);
    return 0;
}
