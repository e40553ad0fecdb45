/* Whole worlds in one process, from a seed: a server, several clients, and a network that loses, doubles, delays,
 * reorders, damages and cuts off; clients that vanish and come back on the same port, or on one that another client had;
 * a server that restarts. In some worlds a mean host starts handshakes and leaves them, there are few places for
 * handshakes, each look at the clock takes time, so that the turn's share for handshakes is used up, or somebody puts a
 * Certificate that he saw ahead of what belongs to a resumed handshake. Time is virtual, for libssl as well, and so are chance and the certificates: a seed repeats its
 * world.
 *
 *   simulate WORLDS [FIRST_SEED [LOSS_PERCENT]]    on all cores
 *   simulate -v SEED [LOSS_PERCENT]                one world, with the log of both sides
 *
 * Checked all along: no message is delivered twice, changed, or to the wrong connection; each connection has one end; no
 * timer spins; a handshake's states follow each other as its table has it; a handshake fails only if a cut, a side's end or damage was in its way, or so much was lost that its
 * deadline came first. Once the network is good again every client gets through; in the end tables and timers are empty
 * and OpenSSL holds what it held before. */
#include "virtual.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    CLIENTS_MAX = 8,
    FLYING_MAX = 4096,
    MESSAGES_MAX = 64,
    MEAN_MAX = 12, /* handshakes that the mean host has left */
    MEAN_MS = 150,
    FORGED_MAX = 600, /* bytes of a Certificate that somebody saw */
    SERVER_PORT = 4433,
    CLIENT_PORT = 20000,
    LIFE_MS = 60000,    /* clients come and go for so long, */
    HEALED_MS = 40000,  /* then the network is good: a handshake's deadline and a bit */
    EMPTY_MS = 60000,   /* then they are gone: deadlines and idle timeouts pass */
    SPIN_MAX = 1000,    /* turns of the loop without a step of time */
    WARM_UP_WORLDS = 3, /* by then OpenSSL has made what it keeps */
    /* but for a decoder for each kind of key that it is shown, as damaged certificates have: so many worlds may add one */
    KEPT = OPENSSL_VERSION_NUMBER >= 0x30200000 ? 20 : 0,
    DAMAGE_ENDURED = 1,  /* damaged datagrams that no handshake may fail from */
    LATE_ONE_IN = 20000, /* undisturbed handshakes may miss their deadline by bad luck, so seldom */
    HISTOGRAM_MS = 10,   /* handshake times are counted in steps of it, */
    HISTOGRAM_MAX = 3001 /* up to the deadline */
};

/* One datagram in the air. */
struct datagram {
    int64_t at;
    uint64_t order; /* among those of the same time */
    dtls_addr from, to;
    size_t len;
    unsigned char *data;
    int damaged;
};

/* What every message says of itself; the rest is a pattern from these. */
struct message {
    uint32_t client, life, port, number, len;
};

struct client {
    dtls_addr addr;
    int given_up; /* the last handshake at this address was, and the server's answers to it may still come */
    dtls_conn *conn;
    uint32_t life; /* counts connections */
    int64_t connecting_at;
    int64_t answered_at; /* the last echo */
    int open, sent;
    int offered;                      /* a session that the server must still have */
    int trouble;                      /* since connecting, a cut or a side's end could have hurt */
    int damaged;                      /* since connecting, so many damaged datagrams arrived at either end */
    unsigned char seen[MESSAGES_MAX]; /* echoes that came back in this life */
    SSL_SESSION *session;
    long server; /* which of the servers, by restarts, made the session */
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
    int loss, twice, late, damage, cut, leave; /* percent */
    int64_t cut_until;
    int muted;         /* the server's process is gone: what it sends is lost */
    int unanswered_ms; /* clients ask so; 0: never */
    int healed, ending;
    unsigned serving;
    int max_handshakes, forging;
    int64_t look_us; /* what each look at the clock takes */
    dtls_endpoint *mean;
    dtls_conn *left[MEAN_MAX];
    int mean_port;
    dtls_timer *mean_timer;
    unsigned char forged[2][FORGED_MAX]; /* a Certificate to a client, and one to the server */
    size_t forged_len[2];
};

/* What the worlds of one process saw, summed over processes at the end. */
struct figures {
    long worlds, associations, resumed, renewed, messages, datagrams, restarts, failed, late, broken;
    long full_times[HISTOGRAM_MAX], resumed_times[HISTOGRAM_MAX]; /* of undisturbed handshakes */
};

static struct world *w;
static struct figures sum;
static int verbose;

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
    exit(1);
}

/* ---- the network ---- */

static int sooner(const struct datagram *a, const struct datagram *b)
{
    return a->at != b->at ? a->at < b->at : a->order < b->order;
}

static struct datagram *fly(const void *data, size_t len, const dtls_addr *from, const dtls_addr *to, int64_t delay)
{
    if (w->flying_len == FLYING_MAX)
        broken("too many datagrams in the air");
    struct datagram *d = malloc(sizeof *d);
    *d = (struct datagram){now_us + delay, w->order++, *from, *to, len, malloc(len), 0};
    memcpy(d->data, data, len);
    size_t i = ++w->flying_len;
    for (; i > 1 && sooner(d, w->flying[i / 2]); i /= 2)
        w->flying[i] = w->flying[i / 2];
    w->flying[i] = d;
    return d;
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

/* One in four is cut short, in the others a bit flips. */
static void damage(struct datagram *d)
{
    d->damaged = 1;
    if (percent(25))
        d->len = 1 + dice((uint32_t)d->len);
    else
        d->data[dice((uint32_t)d->len)] ^= (unsigned char)(1u << dice(8));
}

static int on_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    (void)user;
    sum.datagrams++;
    if (w->muted || now_us < w->cut_until || percent(w->loss))
        return 0;
    for (int copies = 1 + percent(w->twice); copies > 0; copies--) {
        struct datagram *d = fly(data, len, from, to, 1000 + (percent(w->late) ? 5000 + dice(75000) : dice(500)));
        if (percent(w->damage))
            damage(d);
    }
    return 0;
}

/* Whoever has the address now. */
static struct client *client_at(const dtls_addr *addr)
{
    for (int i = 0; i < w->clients_len; i++)
        if (dtls_addr_equal(&w->clients[i].addr, addr))
            return &w->clients[i];
    return NULL;
}

/* What a mean host gets: cookies, nothing else. */
static int is_for_mean(const struct datagram *d)
{
    return d->to.ip[1] == 66 && d->data[13] != 3;
}

/* In front of what belongs to a resumed handshake comes a Certificate from the same address. */
static void forge(const struct datagram *d, int to_server)
{
    const struct client *c = client_at(to_server ? &d->from : &d->to);
    if (d->data[0] == 22 && d->len > 13 && d->data[13] == 11 && d->len <= FORGED_MAX && !d->damaged) {
        memcpy(w->forged[to_server], d->data, d->len);
        w->forged_len[to_server] = d->len;
    }
    if (w->forging && c && c->offered && !c->trouble && !c->damaged && !c->open && w->forged_len[to_server])
        dtls_endpoint_input(to_server ? w->server : w->clients_ep, w->forged[to_server], w->forged_len[to_server],
                            &d->from, &d->to);
}

static void arrive(struct datagram *d)
{
    int to_server = d->to.port == SERVER_PORT;
    struct client *c = client_at(to_server ? &d->from : &d->to);
    if (c) {
        c->damaged += d->damaged;
        forge(d, to_server);
    }
    if (!is_for_mean(d))
        dtls_endpoint_input(to_server ? w->server : c ? w->clients_ep : w->mean, d->data, d->len, &d->from, &d->to);
}

static void datagram_free(struct datagram *d)
{
    free(d->data);
    free(d);
}

/* ---- messages ---- */

static unsigned char pattern(const struct message *m, uint32_t i)
{
    return (unsigned char)(m->client * 31 + m->life * 17 + m->number * 7 + i * 3);
}

static uint32_t client_number(const struct client *c)
{
    return (uint32_t)(c - w->clients);
}

static size_t message_make(unsigned char *buf, struct client *c)
{
    uint32_t len = (uint32_t)sizeof(struct message) + (percent(3) ? dice(16000) : dice(1200));
    struct message m = {client_number(c), c->life, c->addr.port, (uint32_t)c->sent++, len};
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
    sum.messages++;
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
        if (m.port != info.peer.port || m.client != s->first.client || m.life != s->first.life)
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

/* Errors are bugs of the library's own: a handshake's state that may not follow the one before. */
static void on_log(void *user, dtls_log level, const char *line)
{
    if (level == DTLS_LOG_ERROR)
        broken("%s", line);
    if (verbose)
        printf("# %8.3f %s: %s\n", (double)now_us / 1e6, user == &server_id ? "server" : "client", line);
}

static dtls_endpoint *endpoint(struct identity *id, dtls_config cfg)
{
    dtls_error err;
    cfg.on_log = on_log;
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
    w->server = endpoint(
        &server_id,
        (dtls_config){.on_event = server_event, .idle_timeout_ms = 20000, .max_handshakes = w->max_handshakes});
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
    sum.restarts++;
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
    c->open = c->sent = c->damaged = 0;
    c->offered = t.session && c->server == sum.restarts && !c->given_up;
    c->life++;
    memset(c->seen, 0, sizeof c->seen);
    c->conn = dtls_endpoint_connect(w->clients_ep, &t, &err);
    if (!c->conn)
        broken("client cannot connect: %s", err.text);
}

/* Away: with a close_notify, or as if killed. Sometimes another one that is away gets the address. */
static void client_leave(struct client *c)
{
    int64_t cut = w->cut_until;
    struct client *other = &w->clients[dice((uint32_t)w->clients_len)];
    if (percent(50))
        w->cut_until = INT64_MAX;
    dtls_conn_close(c->conn);
    w->cut_until = cut;
    if (!other->conn && percent(20)) {
        dtls_addr addr = c->addr;
        int given_up = c->given_up;
        c->addr = other->addr;
        c->given_up = other->given_up;
        other->addr = addr;
        other->given_up = given_up;
    }
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
        size_t n = message_make(buf, c);
        if (dtls_conn_send(c->conn, buf, n) != 0)
            broken("a message of %zu bytes was refused", n);
    }
    if (info.connected && w->unanswered_ms && percent(3) && dtls_conn_renew(c->conn) != 0)
        broken("a renewal was refused");
    if (percent(w->leave) || c->sent == MESSAGES_MAX)
        client_leave(c);
    dtls_timer_set(c->timer, 1 + dice(w->healed ? 10000 : 1500));
}

static void client_connected(struct client *c)
{
    dtls_info info;
    dtls_conn_info(c->conn, &info);
    int64_t slot = (now_us - c->connecting_at) / 1000 / HISTOGRAM_MS;
    c->open = 1;
    if (c->offered && !c->trouble && !c->damaged && !info.resumed)
        broken("client %u offered a session that the server has, and did not resume it", client_number(c));
    sum.associations++;
    sum.resumed += info.resumed;
    if (!c->trouble)
        (info.resumed ? sum.resumed_times : sum.full_times)[slot < HISTOGRAM_MAX ? slot : HISTOGRAM_MAX - 1]++;
    SSL_SESSION_free(c->session);
    c->session = dtls_conn_session(c->conn);
    c->server = c->trouble ? -1 : sum.restarts;
}

/* Which handshakes may fail: those that met trouble, those that damage spoilt too often, and under heavy loss those that
 * had no luck until their deadline. */
static void client_failed(struct client *c, dtls_reason reason, const char *text)
{
    sum.failed++;
    if (c->trouble || w->healed == 0) {
        int excused = c->trouble || c->damaged > DAMAGE_ENDURED || (reason == DTLS_CLOSE_TIMEOUT && w->loss > 0);
        sum.late += !c->trouble && reason == DTLS_CLOSE_TIMEOUT;
        if (excused)
            return;
    }
    broken("client %u failed for no reason: %s", client_number(c), text);
}

static void client_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct client *c = dtls_conn_user(conn);
    if (c->conn != conn)
        broken("an event for a connection that was closed");
    if (event == DTLS_EV_CONNECTED) {
        client_connected(c);
    } else if (event == DTLS_EV_RENEWED) {
        if (!c->open)
            broken("client %u renewed what was not open", client_number(c));
        sum.renewed++;
        SSL_SESSION_free(c->session);
        c->session = dtls_conn_session(c->conn);
        c->server = c->trouble ? -1 : sum.restarts;
    } else if (event == DTLS_EV_MESSAGE) {
        struct message m = message_check(data, len);
        if (m.client != client_number(c) || m.life != c->life)
            broken("client %u got an answer to client %u", client_number(c), m.client);
        once(c->seen, &m);
        c->answered_at = now_us;
    } else if (event == DTLS_EV_CLOSED) {
        dtls_reason reason = dtls_conn_reason(conn);
        c->given_up = !c->open || w->unanswered_ms; /* a renewal may have been under way */
        c->conn = NULL;
        if (reason != DTLS_CLOSE_LOCAL && !c->open)
            client_failed(c, reason, dtls_conn_reason_text(conn));
    }
}

/* ---- the mean host ---- */

/* Always as many as it can, each from a port of its own, none of which says more than its ClientHello. */
static void mean_turn(void *user)
{
    dtls_target t = {.peer = {.ip = {10, 0, 0, 1}, .port = SERVER_PORT, .family = 4}, .name = "localhost"};
    (void)user;
    if (w->healed)
        return;
    t.local = (dtls_addr){.ip = {10, 66, 0, 1}, .port = (uint16_t)(1024 + w->mean_port), .family = 4};
    dtls_conn **left = &w->left[w->mean_port++ % MEAN_MAX];
    t.user = left;
    if (*left)
        dtls_conn_close(*left);
    *left = dtls_endpoint_connect(w->mean, &t, NULL);
    dtls_timer_set(w->mean_timer, MEAN_MS);
}

static void mean_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    (void)data, (void)len;
    dtls_conn **left = dtls_conn_user(conn);
    if (event == DTLS_EV_CLOSED && *left == conn)
        *left = NULL;
}

/* ---- worlds ---- */

static int64_t slow_clock(void *user)
{
    (void)user;
    return now_us += w->look_us;
}

static void advance(int64_t until)
{
    int turns = 0;
    while (now_us < until) {
        int ms = dtls_loop_timeout(w->loop);
        int64_t next = ms < 0 ? until : now_us + ms * (int64_t)1000;
        if (w->flying_len && w->flying[1]->at < next)
            next = w->flying[1]->at;
        turns = next > now_us ? 0 : turns + 1;
        if (turns > SPIN_MAX)
            broken("the loop spins");
        next = next < until ? next : until;
        now_us = next > now_us ? next : now_us;
        while (w->flying_len && w->flying[1]->at <= now_us) {
            struct datagram *d = land();
            arrive(d);
            datagram_free(d);
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

static void world_begin(int loss)
{
    w->loss = loss >= 0 ? loss : (int)dice(31);
    w->twice = (int)dice(11);
    w->late = (int)dice(21);
    w->damage = (int)dice(3);
    w->cut = (int)dice(3);
    w->leave = 2 + (int)dice(25);
    w->clients_len = 1 + (int)dice(CLIENTS_MAX);
    w->max_handshakes = percent(30) ? 4 + (int)dice(5) : 0;
    w->look_us = percent(20) ? 20 + dice(200) : 0;
    w->forging = percent(30);
    w->unanswered_ms = percent(40) ? 500 + (int)dice(4000) : 0;
    w->loop = dtls_loop_new(&(dtls_loop_config){.now_us = slow_clock});
    server_start();
    w->clients_ep =
        endpoint(&client_id,
                 (dtls_config){.on_event = client_event, .idle_timeout_ms = 15000, .unanswered_ms = w->unanswered_ms});
    if (w->max_handshakes) {
        w->mean = endpoint(&client_id, (dtls_config){.on_event = mean_event});
        w->mean_timer = dtls_timer_new(w->loop, mean_turn, NULL);
        dtls_timer_set(w->mean_timer, 1000);
    }
    for (int i = 0; i < w->clients_len; i++) {
        struct client *c = &w->clients[i];
        c->addr = (dtls_addr){.ip = {10, 0, 0, 2}, .port = (uint16_t)(CLIENT_PORT + i), .family = 4};
        c->timer = dtls_timer_new(w->loop, client_turn, c);
        dtls_timer_set(c->timer, dice(3000));
    }
}

static void world_live(void)
{
    int64_t end = now_us + LIFE_MS * (int64_t)1000;
    while (now_us < end) {
        advance(now_us + 1000000);
        if (percent(w->cut)) {
            w->cut_until = now_us + dice(5000000);
            trouble_everywhere();
        }
        if (dice(300) == 0)
            server_restart();
    }
}

/* Nothing may be stuck: whatever state the bad times left, each client gets an answer now. */
static void world_heal(void)
{
    int64_t began = now_us;
    w->loss = w->twice = w->late = w->damage = w->leave = 0;
    w->cut_until = 0;
    w->healed = 1;
    advance(began + HEALED_MS * (int64_t)1000);
    for (int i = 0; i < w->clients_len; i++)
        if (w->clients[i].answered_at < began)
            broken("client %d is stuck", i);
}

static void world_end(void)
{
    w->ending = 1;
    for (int i = 0; i < w->clients_len; i++)
        if (w->clients[i].conn)
            client_leave(&w->clients[i]);
    dtls_endpoint_free(w->mean);
    advance(now_us + EMPTY_MS * (int64_t)1000);
    empty(w->server, "server");
    empty(w->clients_ep, "client");
    for (int i = 0; i < w->clients_len; i++) {
        dtls_timer_free(w->clients[i].timer);
        SSL_SESSION_free(w->clients[i].session);
    }
    if (w->serving || dtls_loop_timeout(w->loop) != -1)
        broken("%u connections and a timer are left", w->serving);
    dtls_loop_free(w->loop);
    while (w->flying_len)
        datagram_free(land());
}

/* What OpenSSL holds at the moment, in allocations. Its memory, and ours by the sanitizer, is what could be left. */
static long held;

static void *held_malloc(size_t n, const char *file, int line)
{
    (void)file, (void)line;
    void *p = malloc(n);
    held += p != NULL;
    return p;
}

static void held_free(void *p, const char *file, int line)
{
    (void)file, (void)line;
    held -= p != NULL;
    free(p);
}

static void *held_realloc(void *p, size_t n, const char *file, int line)
{
    if (p && n == 0) {
        held_free(p, file, line);
        return NULL;
    }
    void *q = realloc(p, n);
    held += !p && q;
    return q;
}

static void world_run(uint64_t seed, int loss)
{
    static long held_before, kept;
    struct world world = {.seed = seed, .random = seed};
    w = &world;
    chance_state = seed;
    now_us = 1000000;
    world_begin(loss);
    world_live();
    world_heal();
    world_end();
    sum.worlds++;
    OPENSSL_thread_stop(); /* frees the error queue, which keeps old texts */
    if (sum.worlds > WARM_UP_WORLDS && held > held_before && ++kept > KEPT)
        broken("OpenSSL holds %ld allocations more than before this world", held - held_before);
    held_before = held;
}

/* ---- all cores ---- */

static long worlds, processes;
static uint64_t first;
static int loss_wanted = -1;

/* The share of one process: every so manieth seed. */
static void child(long number, int out)
{
    for (long i = number; i < worlds; i += processes)
        world_run(first + (uint64_t)i, loss_wanted);
    virtual_identities_free();
    fflush(stdout);
    if (write(out, &sum, sizeof sum) != (ssize_t)sizeof sum)
        exit(1);
}

static void add(const struct figures *f)
{
    const long *from = (const long *)f;
    long *to = (long *)&sum;
    for (size_t i = 0; i < sizeof sum / sizeof *to; i++)
        to[i] += from[i];
}

/* A pipe takes less than a struct of figures at once, so they are read to the end before the process is waited for. */
static int gather(int in, pid_t pid)
{
    struct figures f;
    size_t got = 0;
    ssize_t n;
    int status;
    while ((n = read(in, (char *)&f + got, sizeof f - got)) > 0)
        got += (size_t)n;
    close(in);
    if (got == sizeof f)
        add(&f);
    return waitpid(pid, &status, 0) == pid && status == 0 && got == sizeof f ? 0 : -1;
}

static int run_all(void)
{
    int failed = 0, in[64];
    pid_t pid[64];
    for (long i = 0; i < processes; i++) {
        int ends[2];
        if (pipe(ends) != 0 || (pid[i] = fork()) < 0)
            return -1;
        if (pid[i] == 0) {
            child(i, ends[1]);
            exit(0); /* and not _exit(): the sanitizer looks for leaks */
        }
        close(ends[1]);
        in[i] = ends[0];
    }
    for (long i = 0; i < processes; i++)
        failed |= gather(in[i], pid[i]);
    return failed;
}

static double quantile(const long *histogram, double share)
{
    long total = 0, below = 0;
    int i = 0;
    for (int k = 0; k < HISTOGRAM_MAX; k++)
        total += histogram[k];
    while (i < HISTOGRAM_MAX - 1 && (double)(below += histogram[i]) < share * (double)total)
        i++;
    return (i + 1) * HISTOGRAM_MS / 1000.0;
}

static void print_times(const long *histogram, const char *kind)
{
    printf(
        "# simulate: undisturbed %s handshakes: median %.2f s, 99 %% within %.2f s, 99.9 %% within %.2f s, all within "
        "%.2f s\n",
        kind, quantile(histogram, 0.5), quantile(histogram, 0.99), quantile(histogram, 0.999),
        quantile(histogram, 1.0));
}

static void report(double seconds)
{
    printf("# simulate: %ld worlds, %ld associations (%ld resumed, %ld renewals), %ld messages, %ld datagrams, %ld "
           "server restarts\n",
           sum.worlds, sum.associations, sum.resumed, sum.renewed, sum.messages, sum.datagrams, sum.restarts);
    printf("# simulate: %.0f worlds and %.0f associations a second in %ld processes\n", (double)sum.worlds / seconds,
           (double)sum.associations / seconds, processes);
    print_times(sum.full_times, "full");
    print_times(sum.resumed_times, "resumed");
    printf("# simulate: %ld handshakes failed, %ld of them undisturbed at their deadline\n", sum.failed, sum.late);
}

int main(int argc, char **argv)
{
    struct timespec began, ended;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc < 2 || !CRYPTO_set_mem_functions(held_malloc, held_realloc, held_free))
        return 2;
    verbose = strcmp(argv[1], "-v") == 0;
    worlds = verbose ? 1 : atol(argv[1]);
    first = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    loss_wanted = argc > 3 ? atoi(argv[3]) : -1;
    processes = sysconf(_SC_NPROCESSORS_ONLN);
    processes = verbose || processes < 1 ? 1 : processes > 64 ? 64 : processes;
    virtual_chance();
    virtual_identities();
    clock_gettime(CLOCK_MONOTONIC, &began);
    int failed = run_all();
    clock_gettime(CLOCK_MONOTONIC, &ended);
    virtual_identities_free();
    report((double)(ended.tv_sec - began.tv_sec) + (double)(ended.tv_nsec - began.tv_nsec) / 1e9);
    if (sum.late > 1 + sum.associations / LATE_ONE_IN)
        failed = printf("not ok - simulate: too many undisturbed handshakes missed their deadline\n");
    if (!failed)
        printf("ok - simulate %ld worlds\n", worlds);
    return failed ? 1 : 0;
}
