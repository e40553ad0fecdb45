/* Many clients of `dtls server` in one process: their handshakes at once, then pings.
 *
 *   crowd ADDR CERTS_DIR CLIENTS [SECONDS [flood]]
 *
 * Prints how many got in, and how fast; then, SECONDS later, how many connections are alive, and how many pings (one in
 * PING_MS from each client) were answered, and how fast. With "flood" the pings come as fast as the loop turns, and
 * nobody minds lost ones. Exit status 0: all got in and are alive. */
#include "../dtls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PING_MS = 100, CLIENTS_MAX = 4096, ANSWERS_MAX = 1000000, SILENT_MS = 3000, FLOOD = 64 };

struct client {
    dtls_conn *conn;
    int64_t began, pinged; /* pinged: 0 when the last one was answered */
    int settled, greeted;  /* greeted: the server's first message came, which is no answer */
};

static dtls_loop *loop;
static dtls_timer *ticks, *ending;
static struct client clients[CLIENTS_MAX];
static int clients_len, pending, connected, flooding, seconds;
static long pings, answers;
static double handshake_s[CLIENTS_MAX], answer_ms[ANSWERS_MAX];

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Of n values, sorted here: the median and the largest. */
static void print_spread(double *value, long n, const char *unit)
{
    qsort(value, (size_t)n, sizeof *value, by_value);
    if (n > 0)
        printf(", median %.3f %s, slowest %.3f %s", value[n / 2], unit, value[n - 1], unit);
    printf("\n");
    fflush(stdout);
}

static void ping(struct client *c)
{
    if (c->pinged && !flooding)
        pings++; /* the last one is lost, or late */
    c->pinged = dtls_loop_now(loop);
    for (int n = flooding ? FLOOD : 1; n > 0; n--)
        dtls_conn_send(c->conn, "ping", 4);
}

static void tick(void *user)
{
    (void)user;
    for (struct client *c = clients; c < clients + clients_len; c++)
        if (c->conn)
            ping(c);
    dtls_timer_set(ticks, flooding ? 0 : PING_MS);
}

static void finish(void *user)
{
    int alive = 0;
    (void)user;
    for (struct client *c = clients; c < clients + clients_len; c++) {
        dtls_info info = {.silent_ms = SILENT_MS};
        if (c->conn)
            dtls_conn_info(c->conn, &info);
        alive += info.connected && info.silent_ms < SILENT_MS;
    }
    printf("alive %d of %d, answered %ld of %ld", alive, clients_len, answers, pings);
    print_spread(answer_ms, answers < ANSWERS_MAX ? answers : ANSWERS_MAX, "ms");
    connected = alive;
    dtls_loop_stop(loop);
}

/* A handshake is over, one way or the other. */
static void settle(struct client *c)
{
    if (c->settled++ || --pending > 0)
        return;
    printf("connected %d of %d", connected, clients_len);
    print_spread(handshake_s, connected, "s");
    if (seconds == 0) {
        dtls_loop_stop(loop);
        return;
    }
    dtls_timer_set(ticks, 0);
    dtls_timer_set(ending, seconds * 1000);
}

static void answered(struct client *c)
{
    if (!c->greeted || !c->pinged) {
        c->greeted = 1;
        return;
    }
    if (answers < ANSWERS_MAX)
        answer_ms[answers] = (double)(dtls_loop_now(loop) - c->pinged) / 1e3;
    answers++;
    pings++;
    c->pinged = 0;
}

static void on_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct client *c = dtls_conn_user(conn);
    (void)data, (void)len;
    if (event == DTLS_EV_CONNECTED) {
        handshake_s[connected++] = (double)(dtls_loop_now(loop) - c->began) / 1e6;
        settle(c);
    } else if (event == DTLS_EV_MESSAGE) {
        answered(c);
    } else if (event == DTLS_EV_CLOSED) {
        c->conn = NULL;
        if (dtls_conn_reason(conn) == DTLS_CLOSE_LOCAL)
            return;
        printf("# %s: %s\n", c->settled ? "lost" : "failed", dtls_conn_reason_text(conn));
        settle(c);
    }
}

static int start(struct client *c, dtls_endpoint *ep, const dtls_target *target)
{
    dtls_error err;
    dtls_target t = *target;
    t.user = c;
    c->began = dtls_loop_now(loop);
    c->conn = dtls_endpoint_connect(ep, &t, &err);
    if (!c->conn)
        fprintf(stderr, "crowd: %s\n", err.text);
    return c->conn ? 0 : -1;
}

int main(int argc, char **argv)
{
    char cert[512], key[512], ca[512];
    dtls_error err;
    dtls_target target = {.name = "localhost"};
    if (argc < 4 || argc > 6 || dtls_addr_parse(&target.peer, argv[1], &err) != 0)
        return 2;
    clients_len = pending = atoi(argv[3]);
    seconds = argc > 4 ? atoi(argv[4]) : 0;
    flooding = argc > 5;
    if (clients_len < 1 || clients_len > CLIENTS_MAX)
        return 2;
    snprintf(cert, sizeof cert, "%s/client.pem", argv[2]);
    snprintf(key, sizeof key, "%s/client.key", argv[2]);
    snprintf(ca, sizeof ca, "%s/ca.pem", argv[2]);
    dtls_config config = {.cert_file = cert, .key_file = key, .ca_file = ca, .on_event = on_event};
    loop = dtls_loop_new(NULL);
    dtls_endpoint *ep = loop ? dtls_endpoint_new(loop, &config, &err) : NULL;
    ticks = loop ? dtls_timer_new(loop, tick, NULL) : NULL;
    ending = loop ? dtls_timer_new(loop, finish, NULL) : NULL;
    if (!ep || !ticks || !ending) {
        fprintf(stderr, "crowd: %s\n", ep ? "out of memory" : err.text);
        return 1;
    }
    for (int i = 0; i < clients_len; i++)
        if (start(&clients[i], ep, &target) < 0)
            return 1;
    dtls_loop_run(loop);
    dtls_loop_free(loop);
    return connected == clients_len ? 0 : 1;
}
