/* A UDP proxy in front of a server, on loopback, that misbehaves as asked and repeats itself from a seed.
 *
 *   proxy SERVER_PORT [NAME=VALUE...]       prints "listening on 127.0.0.1:PORT", on SIGTERM what it did, in two lines
 *
 *   seed=N                    of its chance (1)
 *   loss=P twice=P late=P corrupt=P
 *                             percent of the datagrams each way that are lost, doubled, late by 5 to 80 ms, damaged
 *   up=P down=P               percent of the datagrams to the server, to the client before which a forged one goes,
 *                             from the peer's own address
 *
 * What it forges is what anybody can send who knows the addresses. Whole plaintext handshake messages are not among it:
 * in DTLS 1.2 nobody can tell those from the peer's. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    CLIENTS_MAX = 1024,
    LATE_MAX = 8192,
    LATE_FIRST_MS = 5,
    LATE_LAST_MS = 80,
    DATAGRAM_MAX = 65536,
    RECORD_HEADER = 13,
    CCS = 20,
    ALERT = 21,
    HANDSHAKE = 22,
    DATA = 23
};

enum kind { SHORT, SEALED, FATAL, CLOSING, WARNING, PLAIN, AHEAD, EPOCH, EARLY, GARBAGE, FALSIFIED, KINDS };

static const char *const kind_names[KINDS] = {"short", "sealed", "fatal", "closing", "warning",  "plain",
                                              "ahead", "epoch",  "early", "garbage", "falsified"};

/* Each client has a socket of its own towards the server. */
static struct client {
    struct sockaddr_in addr;
    int fd;
} clients[CLIENTS_MAX];
static int clients_len, front;

struct late {
    int64_t at_ms;
    int fd;
    struct sockaddr_in to;
    size_t len;
    uint8_t *data;
};

static struct late late[LATE_MAX];
static int late_len;
static struct sockaddr_in server;
static uint64_t seed = 1;
static int loss, twice, late_percent, corrupt, up, down;
static long passed, lost, doubled, held, damaged, forged[KINDS];
static volatile sig_atomic_t ended;

static int64_t now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

static uint32_t dice(uint32_t n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(seed >> 33) % n;
}

static int percent(int p)
{
    return (int)dice(100) < p;
}

/* ---- what is forged ---- */

static size_t record(uint8_t *p, int type, int epoch, uint64_t sequence, size_t len)
{
    const uint8_t head[5] = {(uint8_t)type, 0xfe, 0xfd, (uint8_t)(epoch >> 8), (uint8_t)epoch};
    memcpy(p, head, sizeof head);
    for (int i = 10; i >= 5; i--, sequence >>= 8)
        p[i] = (uint8_t)sequence;
    p[11] = (uint8_t)(len >> 8);
    p[12] = (uint8_t)len;
    for (size_t i = 0; i < len; i++)
        p[RECORD_HEADER + i] = (uint8_t)dice(256);
    return RECORD_HEADER + len;
}

static size_t alert(uint8_t *p, int level, int description)
{
    size_t n = record(p, ALERT, 0, dice(100), 2);
    p[RECORD_HEADER] = (uint8_t)level;
    p[RECORD_HEADER + 1] = (uint8_t)description;
    return n;
}

/* The real one that follows, in p, made false. A plaintext handshake message only gets a number far ahead. */
static size_t falsify(uint8_t *p, size_t n)
{
    if (n <= RECORD_HEADER)
        return n;
    int protected = p[4] != 0;
    if (percent(50))
        return RECORD_HEADER + dice((uint32_t)(n - RECORD_HEADER)); /* cut short */
    if (protected)
        p[RECORD_HEADER + dice((uint32_t)(n - RECORD_HEADER))] ^= (uint8_t)(1 + dice(255));
    p[5 + dice(3)] ^= (uint8_t)(1 + dice(255));
    return n;
}

static size_t forge(uint8_t *p, const uint8_t *real, size_t n)
{
    uint64_t ahead = (uint64_t)dice(1u << 16) << 24;
    enum kind kind = dice(KINDS);
    forged[kind]++;
    switch (kind) {
    case SHORT: /* no room for nonce and tag */
        return record(p, percent(50) ? DATA : ALERT, 1, ahead, 1 + dice(23));
    case SEALED:
        return record(p, DATA, 1, ahead, 24 + dice(100));
    case FATAL:
        return alert(p, 2, 40); /* handshake_failure */
    case CLOSING:
        return alert(p, 1, 0); /* close_notify */
    case WARNING:
        return alert(p, 1, 90); /* libssl takes four in a row */
    case PLAIN:
        return record(p, DATA, 0, dice(100), 1 + dice(100));
    case AHEAD:
        return record(p, HANDSHAKE, 0, ahead, 1 + dice(200)); /* not even a header that holds */
    case EPOCH:
        return record(p, DATA, 2 + (int)dice(3), dice(100), 40);
    case EARLY: /* ChangeCipherSpec */
        record(p, CCS, 0, percent(50) ? ahead : dice(50), 1);
        p[RECORD_HEADER] = 1;
        return RECORD_HEADER + 1;
    case GARBAGE:
        record(p, (int)dice(256), (int)dice(65536), ahead, 100);
        return 1 + dice(RECORD_HEADER + 100);
    default: /* FALSIFIED */
        memcpy(p, real, n);
        return falsify(p, n);
    }
}

/* ---- the way through ---- */

static void forward(int fd, const struct sockaddr_in *to, const uint8_t *p, size_t n)
{
    if (sendto(fd, p, n, 0, (const struct sockaddr *)to, sizeof *to) < 0)
        lost++; /* ICMP of an earlier one, or a full buffer */
    else
        passed++;
}

static void hold(int fd, const struct sockaddr_in *to, const uint8_t *p, size_t n)
{
    struct late *l = &late[late_len];
    if (late_len == LATE_MAX || !(l->data = malloc(n))) {
        lost++;
        return;
    }
    late_len++;
    held++;
    l->at_ms = now_ms() + LATE_FIRST_MS + dice(LATE_LAST_MS - LATE_FIRST_MS);
    l->fd = fd;
    l->to = *to;
    l->len = n;
    memcpy(l->data, p, n);
}

static void carry(int fd, const struct sockaddr_in *to, uint8_t *p, size_t n, int forging)
{
    static uint8_t false_one[DATAGRAM_MAX];
    if (percent(forging))
        forward(fd, to, false_one, forge(false_one, p, n));
    if (percent(loss)) {
        lost++;
        return;
    }
    int copies = 1 + percent(twice);
    doubled += copies - 1;
    if (n > 0 && percent(corrupt)) {
        damaged++;
        if (percent(25))
            n = dice((uint32_t)n);
        else
            p[dice((uint32_t)n)] ^= (uint8_t)(1u << dice(8));
    }
    for (; copies > 0; copies--) {
        if (percent(late_percent))
            hold(fd, to, p, n);
        else
            forward(fd, to, p, n);
    }
}

/* Sends what is due; returns the milliseconds until the next one is, or -1. */
static int send_late(void)
{
    int64_t now = now_ms(), next = INT64_MAX;
    for (int i = 0; i < late_len; i++) {
        struct late *l = &late[i];
        if (l->at_ms > now) {
            next = l->at_ms < next ? l->at_ms : next;
            continue;
        }
        forward(l->fd, &l->to, l->data, l->len);
        free(l->data);
        *l = late[--late_len];
        i--;
    }
    return late_len ? (int)(next - now) : -1;
}

static int open_socket(void)
{
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_DGRAM, 0), bytes = 1 << 20;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
    if (fd < 0 || bind(fd, (struct sockaddr *)&any, sizeof any) < 0) {
        perror("proxy: socket");
        exit(1);
    }
    return fd;
}

static struct client *client_of(const struct sockaddr_in *addr)
{
    for (struct client *c = clients; c < clients + clients_len; c++)
        if (c->addr.sin_port == addr->sin_port && c->addr.sin_addr.s_addr == addr->sin_addr.s_addr)
            return c;
    if (clients_len == CLIENTS_MAX)
        return NULL;
    clients[clients_len] = (struct client){*addr, open_socket()};
    return &clients[clients_len++];
}

/* One datagram from the front (c NULL) or from a client's own socket. Returns 0 when there was none. */
static int receive(struct client *c)
{
    static uint8_t data[DATAGRAM_MAX];
    struct sockaddr_in from;
    socklen_t len = sizeof from;
    ssize_t n = recvfrom(c ? c->fd : front, data, sizeof data, MSG_DONTWAIT, (struct sockaddr *)&from, &len);
    if (n < 0)
        return 0;
    if (c) {
        carry(front, &c->addr, data, (size_t)n, down);
    } else if ((c = client_of(&from)) != NULL) {
        carry(c->fd, &server, data, (size_t)n, up);
    }
    return 1;
}

static void turn(void)
{
    struct pollfd fds[1 + CLIENTS_MAX] = {{.fd = front, .events = POLLIN}};
    int n = clients_len;
    for (int i = 0; i < n; i++)
        fds[1 + i] = (struct pollfd){.fd = clients[i].fd, .events = POLLIN};
    if (poll(fds, (nfds_t)n + 1, send_late()) <= 0)
        return;
    if (fds[0].revents)
        while (receive(NULL))
            ;
    for (int i = 0; i < n; i++)
        if (fds[1 + i].revents)
            while (receive(&clients[i]))
                ;
}

static void on_signal(int signo)
{
    (void)signo;
    ended = 1;
}

static int option(const char *word)
{
    static const struct {
        const char *name;
        int *value;
    } options[] = {{"loss", &loss},       {"twice", &twice}, {"late", &late_percent},
                   {"corrupt", &corrupt}, {"up", &up},       {"down", &down}};
    const char *equals = strchr(word, '=');
    size_t n = equals ? (size_t)(equals - word) : 0;
    if (n == 4 && memcmp(word, "seed", 4) == 0) {
        seed = strtoull(equals + 1, NULL, 10);
        return 0;
    }
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        if (n == strlen(options[i].name) && memcmp(word, options[i].name, n) == 0) {
            *options[i].value = atoi(equals + 1);
            return 0;
        }
    }
    return -1;
}

int main(int argc, char **argv)
{
    struct sockaddr_in here;
    socklen_t len = sizeof here;
    if (argc < 2)
        return 2;
    for (int i = 2; i < argc; i++)
        if (option(argv[i]) < 0)
            return 2;
    server.sin_family = AF_INET;
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    server.sin_port = htons((uint16_t)atoi(argv[1]));
    sigaction(SIGTERM, &(struct sigaction){.sa_handler = on_signal}, NULL);
    front = open_socket();
    getsockname(front, (struct sockaddr *)&here, &len);
    printf("listening on 127.0.0.1:%d\n", ntohs(here.sin_port));
    fflush(stdout);
    while (!ended)
        turn();
    printf("%ld passed, %ld lost, %ld doubled, %ld late, %ld damaged\nforged", passed, lost, doubled, held, damaged);
    for (int kind = 0; kind < KINDS; kind++)
        printf("%s %ld %s", kind ? "," : ":", forged[kind], kind_names[kind]);
    printf("\n");
    return 0;
}
