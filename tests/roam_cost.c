/* roam_cost.c - what it costs to follow clients to other addresses, and to be asked for it by strangers.
 *
 *   roam_cost CERTS_DIR [quick]
 *
 * Server and clients are this library, on a transport of our own: datagrams go through memory, so no system call is in the
 * figures. Both ends take turns in one thread; only what the server does with its datagrams is timed (CPU time of the
 * thread). Figures of one run, taken in turn, may be compared: medians of the rounds, and of the rounds' ratios. How good
 * they are is not judged. */
#include "../dtls.h"

#include <inttypes.h>
#include <openssl/ssl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    CONNS = 1000,
    ECHOING = 32, /* connections, a message each at once */
    DATAGRAM_BYTES = 2048,
    WIRE = 256,
    ROUNDS_MAX = 25,
    FLOOD_PER_MS = 38,
    SERVER_PORT = 4444,
    MOVED = 20000, /* is added to the port of a client that moved */
    STRANGERS = 40000,
    TENTHS_MAX = 30 /* of a second, of a flood */
};

enum stranger { JUNK, OTHER_IP, SAME_IP, UNKNOWN_CID, KNOWN_CID };

struct datagram {
    dtls_addr from, to;
    size_t len;
    uint8_t data[DATAGRAM_BYTES];
};

/* Two ends, with all between them. */
struct world {
    const char *suites;
    dtls_loop *server_loop, *client_loop;
    dtls_endpoint *server, *client;
    dtls_conn *conn[CONNS];
    int answers[CONNS];
    int moved[CONNS]; /* added to its port, as a NAT would */
    int conns, connected;
    struct datagram wire[2][WIRE]; /* to the server, to clients */
    size_t len[2];
    double spent_s;            /* by the server */
    uint8_t cid[DTLS_CID_MAX]; /* that a client was given */
    bool has_cid;
};

static const char *certs;
static int rounds = 15, batches = 200, tenths = TENTHS_MAX;
static bool silent; /* clients say nothing before they are looked for */
static dtls_addr server_addr;

__attribute__((noreturn, format(printf, 1, 2))) static void die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("roam_cost: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(1);
}

static double clock_s(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double cpu_s(void)
{
    return clock_s(CLOCK_THREAD_CPUTIME_ID);
}

/* ---- two ends in memory ------------------------------------------------------------------------------------------ */

static int transport(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    struct world *w = user;
    int to_client = to->port != SERVER_PORT;
    if (w->len[to_client] == WIRE || len > DATAGRAM_BYTES)
        return -1;
    struct datagram *d = &w->wire[to_client][w->len[to_client]++];
    d->from = *from;
    d->to = *to;
    d->len = len;
    memcpy(d->data, data, len);
    if (to_client) {
        d->to.port = (uint16_t)(d->to.port > MOVED ? d->to.port - MOVED : d->to.port);
        return 0;
    }
    d->from.port = (uint16_t)(d->from.port + w->moved[from->port - 1]);
    if (d->data[0] == 25 && !w->has_cid) {
        memcpy(w->cid, d->data + 11, sizeof w->cid);
        w->has_cid = true;
    }
    return 0;
}

static void on_server(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    if (event == DTLS_EV_MESSAGE)
        dtls_conn_send(c, data, len);
    if (event == DTLS_EV_CLOSED)
        die("a connection was closed: %s", dtls_conn_reason_text(c));
}

static void on_client(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    struct world *w = dtls_endpoint_user(dtls_conn_endpoint(c));
    (void)data, (void)len;
    w->connected += event == DTLS_EV_CONNECTED;
    if (event == DTLS_EV_MESSAGE)
        ++*(int *)dtls_conn_user(c);
}

static int set_suites(void *user, SSL_CTX *ctx)
{
    struct world *w = user;
    return SSL_CTX_set_cipher_list(ctx, w->suites) != 1;
}

static dtls_endpoint *endpoint(struct world *w, dtls_loop *loop, const char *who, dtls_config cfg)
{
    char file[3][512];
    dtls_error err;
    snprintf(file[0], sizeof *file, "%s/%s.pem", certs, who);
    snprintf(file[1], sizeof *file, "%s/%s.key", certs, who);
    snprintf(file[2], sizeof *file, "%s/ca.pem", certs);
    cfg.cert_file = file[0];
    cfg.key_file = file[1];
    cfg.ca_file = file[2];
    cfg.send = transport;
    cfg.user = w;
    dtls_endpoint *ep = dtls_endpoint_new(loop, &cfg, &err);
    if (!ep)
        die("%s", err.text);
    return ep;
}

/* What is on the wire arrives; the server's part is timed. */
static void deliver(struct world *w)
{
    double began = cpu_s();
    for (size_t i = 0; i < w->len[0]; i++)
        dtls_endpoint_input(w->server, w->wire[0][i].data, w->wire[0][i].len, &w->wire[0][i].from, &w->wire[0][i].to);
    dtls_loop_poll(w->server_loop, 0);
    w->spent_s += cpu_s() - began;
    w->len[0] = 0;
    for (size_t i = 0; i < w->len[1]; i++)
        dtls_endpoint_input(w->client, w->wire[1][i].data, w->wire[1][i].len, &w->wire[1][i].from, &w->wire[1][i].to);
    w->len[1] = 0;
    dtls_loop_poll(w->client_loop, 0);
}

static dtls_addr client_addr(int port)
{
    dtls_addr a;
    dtls_addr_parse(&a, "198.51.100.1:1", NULL);
    a.port = (uint16_t)port;
    return a;
}

/* Client i has port i + 1. */
static struct world *world_new(const char *suites, int conns, dtls_config server, int client_cid)
{
    struct world *w = calloc(1, sizeof *w);
    if (!w || !(w->server_loop = dtls_loop_new(NULL)) || !(w->client_loop = dtls_loop_new(NULL)))
        die("no memory");
    w->suites = suites;
    w->conns = conns;
    server.on_event = on_server;
    server.idle_timeout_ms = DTLS_NEVER; /* a round of trials takes long */
    w->server = endpoint(w, w->server_loop, "server", server);
    w->client = endpoint(w, w->client_loop, "client",
                         (dtls_config){.on_event = on_client, .on_ssl_ctx = set_suites, .cid_bytes = client_cid});
    dtls_endpoint_listen(w->server, NULL, NULL);
    for (int i = 0; i < conns; i++) {
        dtls_target t = {.peer = server_addr, .local = client_addr(i + 1), .name = "localhost", .user = &w->answers[i]};
        w->conn[i] = dtls_endpoint_connect(w->client, &t, NULL);
        for (int n = 0; w->conn[i] && w->connected == i && n < 100000; n++)
            deliver(w);
        if (w->connected != i + 1)
            die("client %d does not connect", i);
    }
    for (int i = 0; i < conns && !silent; i++) { /* by its first message a client may tell how it chooses nonces */
        dtls_conn_send(w->conn[i], "hello", 5);
        deliver(w);
        if (w->answers[i] != 1)
            die("client %d has no answer", i);
    }
    return w;
}

static void world_free(struct world *w)
{
    dtls_loop_free(w->client_loop); /* first, with an end of each connection that nobody hears */
    w->len[0] = w->len[1] = 0;
    free(w);
}

/* ---- echoes ------------------------------------------------------------------------------------------------------ */

/* Microseconds of the server for one echo. */
static double echo_us(struct world *w, size_t bytes)
{
    static const uint8_t message[DATAGRAM_BYTES];
    double before = w->spent_s;
    for (int b = 0; b < batches; b++) {
        for (int i = 0; i < ECHOING; i++)
            if (dtls_conn_send(w->conn[i], message, bytes) != 0)
                die("a message cannot be sent");
        deliver(w);
    }
    return (w->spent_s - before) * 1e6 / batches / ECHOING;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, by_value);
    return values[n / 2];
}

static void echoes(const char *name, const char *suites)
{
    static const size_t sizes[] = {64, 1200};
    static const char *const kinds[] = {"server's ID", "both ways"};
    struct world *never = world_new(suites, ECHOING, (dtls_config){.cid_bytes = DTLS_NEVER}, DTLS_NEVER);
    struct world *with[] = {world_new(suites, ECHOING, (dtls_config){0}, 0),
                            world_new(suites, ECHOING, (dtls_config){0}, 8)};
    for (int s = 0; s < 2; s++) {
        double a[ROUNDS_MAX], b[2][ROUNDS_MAX], ratio[2][ROUNDS_MAX];
        for (int r = -1; r < rounds; r++) /* the first one warms */
            for (int k = 0, at = r < 0 ? 0 : r; k < 2; k++) {
                a[at] = echo_us(never, sizes[s]);
                b[k][at] = echo_us(with[k], sizes[s]);
                ratio[k][at] = b[k][at] / a[at];
            }
        double none = median(a, rounds);
        for (int k = 0; k < 2; k++)
            printf("echo of %4zu bytes, %-8s  without IDs %6.2f us, %-11s %6.2f us, ratio %.2f\n", sizes[s], name, none,
                   kinds[k], median(b[k], rounds), median(ratio[k], rounds));
        fflush(stdout);
    }
    world_free(never);
    world_free(with[0]);
    world_free(with[1]);
}

/* ---- strangers --------------------------------------------------------------------------------------------------- */

static uint64_t chance = 88172645463325252;

static uint8_t random_byte(void)
{
    chance ^= chance << 13;
    chance ^= chance >> 7;
    chance ^= chance << 17;
    return (uint8_t)(chance >> 24);
}

/* A record with a number that may be the next one of any connection here. */
static void forge(const struct world *w, enum stranger kind, struct datagram *d)
{
    size_t cid = kind == UNKNOWN_CID || kind == KNOWN_CID ? 8 : 0;
    d->len = 13 + cid + 64;
    d->to = server_addr;
    d->from = client_addr(MOVED / 2 + (int)(chance % 5000)); /* nobody's port */
    if (kind == OTHER_IP)
        d->from.ip[0]++;
    for (size_t i = 0; i < d->len; i++)
        d->data[i] = random_byte();
    if (kind == JUNK)
        return;
    memcpy(d->data, (const uint8_t[]){(uint8_t)(cid ? 25 : 23), 254, 253, 0, 1, 0, 0, 0, 0, 0, 200}, 11);
    if (kind == KNOWN_CID)
        memcpy(d->data + 11, w->cid, cid);
    memcpy(d->data + 11 + cid, (const uint8_t[]){0, 64}, 2);
}

/* Nanoseconds of the server for one datagram, and how many keys it tried. */
static void strangers(struct world *w, const char *who, enum stranger kind, int count)
{
    dtls_counters was, is;
    double ns[ROUNDS_MAX];
    dtls_endpoint_counters(w->server, &was);
    for (int r = 0; r < rounds; r++) {
        double spent = 0;
        for (int n = 0; n < count; n += WIRE) {
            for (int i = 0; i < WIRE; i++)
                forge(w, kind, &w->wire[0][i]);
            double began = cpu_s();
            for (int i = 0; i < WIRE; i++)
                dtls_endpoint_input(w->server, w->wire[0][i].data, w->wire[0][i].len, &w->wire[0][i].from,
                                    &server_addr);
            dtls_loop_poll(w->server_loop, 0);
            spent += cpu_s() - began;
        }
        ns[r] = spent * 1e9 / ((count + WIRE - 1) / WIRE * WIRE);
    }
    dtls_endpoint_counters(w->server, &is);
    double all = (double)(is.datagrams_in - was.datagrams_in);
    printf("a stranger's datagram, %-64s %9.0f ns, %.1f keys tried, %.0f %% refused\n", who, median(ns, rounds),
           (double)(is.trials - was.trials) / all, 100 * (double)(is.trials_refused - was.trials_refused) / all);
    fflush(stdout);
    w->len[0] = w->len[1] = 0;
}

/* As many spoofed datagrams in a second as would keep a core busy if all keys were tried; in between clients move, and say
 * a line in each tenth of a second until they are answered. */
static void flood(struct world *w, const char *who, enum stranger kind)
{
    enum { HONEST = 20 };
    dtls_counters was, is;
    double spent = 0, began = clock_s(CLOCK_MONOTONIC);
    int in_tenth[TENTHS_MAX] = {0}, back = 0;
    dtls_endpoint_counters(w->server, &was);
    for (int i = 0; i < HONEST; i++) {
        w->moved[i] = w->moved[i] ? 0 : MOVED;
        w->answers[i] = 0;
    }
    for (int ms = 0; ms < tenths * 100; ms++) {
        for (int i = 0; ms % 100 == 50 && i < HONEST; i++)
            if (w->answers[i] == 0)
                dtls_conn_send(w->conn[i], "line", 4);
        dtls_loop_poll(w->client_loop, 0);
        size_t real = w->len[0];
        for (int i = 0; i < FLOOD_PER_MS; i++)
            forge(w, kind, &w->wire[0][w->len[0]++]);
        for (size_t i = real; i-- > 0;) { /* those come among the others */
            struct datagram swap = w->wire[0][i];
            size_t other = chance % w->len[0];
            w->wire[0][i] = w->wire[0][other];
            w->wire[0][other] = swap;
        }
        double before = w->spent_s;
        deliver(w);
        deliver(w);
        spent += w->spent_s - before;
        int answered = 0;
        for (int i = 0; i < HONEST; i++)
            answered += w->answers[i] > 0;
        in_tenth[ms / 100] += answered - back;
        back = answered;
        double early = began + (ms + 1) / 1e3 - clock_s(CLOCK_MONOTONIC);
        struct timespec rest = {.tv_nsec = early > 0 ? (long)(early * 1e9) : 0};
        nanosleep(&rest, NULL);
    }
    double took = clock_s(CLOCK_MONOTONIC) - began;
    dtls_endpoint_counters(w->server, &is);
    printf(
        "%.0f such datagrams a second, %-59s %4.1f %% of a core; %" PRIu64 " keys tried, %" PRIu64
        " datagrams refused; of %d clients that moved %d are back, %d with the first line, %d more with the second\n",
        FLOOD_PER_MS * tenths * 100 / took, who, 100 * spent / took, is.trials - was.trials,
        is.trials_refused - was.trials_refused, HONEST, back, in_tenth[0], in_tenth[1]);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static const char gcm[] = "ECDHE-ECDSA-AES128-GCM-SHA256", chacha[] = "ECDHE-ECDSA-CHACHA20-POLY1305";
    if (argc < 2 || argc > 3)
        return 2;
    certs = argv[1];
    bool quick = argc == 3;
    int conns = quick ? 300 : CONNS, count = quick ? WIRE * 8 : STRANGERS;
    if (quick)
        rounds = 3, batches = 20, tenths = 10;
    dtls_addr_parse(&server_addr, "192.0.2.1:4444", NULL);
    printf("%s, %d rounds; CPU time of the server alone\n", OpenSSL_version(OPENSSL_VERSION), rounds);
    echoes("AES-GCM", gcm);
    echoes("ChaCha20", chacha);

    struct world *w = world_new(gcm, conns, (dtls_config){0}, DTLS_NEVER);
    strangers(w, "no record", JUNK, count);
    strangers(w, "from an IP that nobody has", OTHER_IP, count);
    strangers(w, "from the IP of all, who use AES-GCM", SAME_IP, count);
    flood(w, "from the IP of all, who use AES-GCM", SAME_IP);
    world_free(w);
    silent = true;
    w = world_new(gcm, conns, (dtls_config){0}, DTLS_NEVER);
    strangers(w, "the same, and none of them has said anything yet", SAME_IP, count);
    world_free(w);
    silent = false;
    w = world_new(gcm, conns, (dtls_config){0}, 0);
    strangers(w, "with an ID that nobody has", UNKNOWN_CID, count);
    strangers(w, "with the ID of a connection", KNOWN_CID, count);
    flood(w, "with the ID of a connection", KNOWN_CID);
    world_free(w);
    w = world_new(chacha, conns, (dtls_config){.roam_trials = 1 << 30}, DTLS_NEVER);
    strangers(w, "from the IP of all, who use ChaCha20, as many keys as it takes", SAME_IP, count / 100);
    world_free(w);
    w = world_new(chacha, conns, (dtls_config){0}, DTLS_NEVER);
    strangers(w, "the same with the usual bounds, which are soon used up", SAME_IP, count);
    flood(w, "from the IP of all, who use ChaCha20", SAME_IP);
    world_free(w);
    puts("ok - roam_cost measures");
    return 0;
}
