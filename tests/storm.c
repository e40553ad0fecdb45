/* Stock OpenSSL clients of `dtls server`, in great numbers and beside attackers. Linux only.
 *
 *   storm ADDR CERTS_DIR storm CLIENTS [SECONDS] [apart=1]
 *   storm ADDR CERTS_DIR attack HOSTS [SECONDS] [ports=700] [rate=1000] [honest=5] [rtt=MS]
 *   storm ADDR CERTS_DIR forged RATE [SECONDS] [honest=5] [rtt=MS]
 *   storm ADDR CERTS_DIR echo CLIENTS [SECONDS]
 *   storm ADDR CERTS_DIR walk CLIENTS [SECONDS]
 *
 * ADDR is on IPv4 loopback, as in 127.0.0.1:4444. The clients are libssl's own, with its timers (1, 2, 4 s ...); each
 * has a socket of its own and one try, and stays until the end. SECONDS are 14 if nothing is said.
 *
 * storm   All CLIENTS at once, from one address, or with apart=1 each from its own. Ends when all are in.
 * attack  HOSTS addresses with so many ports each: every port takes a cookie, and then they begin handshakes with fresh
 *         randoms in turn, so many in a second altogether, and let them lie. After WARM_US of that the honest clients
 *         come, each from its own address, so many over a path with a round trip of 50 ms, of 200 and of 600, or of the
 *         one that is named. Ends when they are in, or SECONDS after the first came.
 * forged  The same beside RATE ClientHellos in a second without cookies, from addresses that read no answers.
 * echo    One client's echoes, one in ECHO_US: for SECONDS alone, then as long beside CLIENTS that handshake, close and
 *         begin anew, in a process of less priority, so that their work delays no measuring.
 * walk    The same beside CLIENTS that are connected and silent, but that one of them says "bc x" and "stats" in turn,
 *         COMMAND_US apart.
 *
 * Prints a line for each result, all times in ms; what follows the first comma is missing where N is 0:
 *   connected N of ALL, median MS, 99th MS, slowest MS       beside a flood for each round trip: rtt MS: connected ...
 *   alone N of ALL, median MS, 99th MS, slowest MS           answers to echoes; the same for "beside"
 *   flood N, N with a cookie, in S s
 *   handshakes N, N in a second                              and of "walk": commands N beside N clients
 *   failed N, the last one: WHY                              if any client ended before its time
 *
 * Exit status 0: it could measure, whatever it measured; 1: it could not; 2: other words than these. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { DATAGRAM_MAX = 65536, HELLO_MAX = 1024, COOKIE_MAX = 64, CLIENTS_MAX = 16384, AMOUNT_MAX = 100000 };
enum { VALUES_MAX = 100000, RTTS = 3, EVENTS = 256, PORTS_MAX = 20000, NICE = 10, FORGED_PORTS = 2000, ECHO_US = 2000 };
enum {
    MTU = 1472, /* a UDP payload on an Ethernet link: with loopback's own the flights would be unlike any network's */
    MTU_FALLBACK = 548,
    WARM_US = 2000000,    /* of a flood, before the honest clients: by then it has filled whatever table there is */
    STAGGER_US = 37000,   /* between honest clients, so that no single moment decides about all of them */
    BURST_US = 20000,     /* a flood that was held up catches up with no more than this */
    FLOOD_WAIT_US = 1000, /* a flood's own clock */
    LATE_US = 2000000,    /* an echo that takes longer is lost */
    COMMAND_US = 100000,
    BATCH = 250 /* clients that handshake at once where it is not their handshakes that are measured */
};

/* Where things are in a ClientHello without a session id, and the cookie's length in a HelloVerifyRequest. */
enum { AT_SEQUENCE = 10, AT_TYPE = 13, AT_MESSAGE_SEQ = 18, AT_RANDOM = 27, RANDOM = 32, AT_COOKIE = 61 };
enum { AT_VERIFY = 27, HELLO_VERIFY_REQUEST = 3 };

/* Source addresses, none of them one that a server listens on. */
enum { APART = 0x7f010000, HOSTS = 0x7f420000, HONEST = 0x7f4d0000, FORGED = 0x7f580000, ECHOING = 0x7f630001 };

struct client {
    SSL *ssl;
    int fd, rtt_ms;
    bool connected, failed;
    int64_t began, due, took; /* due: its beginning, then libssl's timer */
    const uint8_t *in;        /* the datagram that libssl may read */
    size_t in_len;
};

/* An attacker's: it sends this random again with the cookie that it gets. */
struct port {
    int fd;
    uint8_t random[RANDOM], cookie[COOKIE_MAX];
    size_t cookie_len;
};

/* A datagram on its way between an honest client and the server. */
struct delayed {
    struct delayed *next;
    struct client *client;
    int64_t due;
    bool to_server;
    size_t len;
    uint8_t data[];
};

static int amount, seconds = 14, apart, ports_each = 700, rate = 1000, honest = 5, rtts = RTTS;
static int rtt_ms[] = {50, 200, 600};
static struct sockaddr_in server = {.sin_family = AF_INET};
static SSL_CTX *ctx;
static BIO_METHOD *method;
static int epoll_fd;

static struct client clients[CLIENTS_MAX];
static int clients_len, settled, failures;
static char failure[256];
static int64_t next_due; /* no client's timer is due before */
static struct delayed *under_way;
static bool again; /* clients that are through begin anew */

static struct port ports[PORTS_MAX];
static int ports_len, port_next;
static uint8_t hello[HELLO_MAX]; /* the first that any client sends, to copy */
static size_t hello_len;
static long hellos, hellos_with_cookie;

static double values[VALUES_MAX]; /* to print: milliseconds */
static int64_t echo_at[VALUES_MAX];
static int values_len, echoes, echo_first;

static int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int64_t in_seconds(int n)
{
    return now_us() + (int64_t)n * 1000000;
}

/* What cannot be: the system does not let us measure. */
static void must(bool good, const char *what)
{
    if (good)
        return;
    perror(what);
    ERR_print_errors_fp(stderr);
    exit(1);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_values(const char *what, int all)
{
    qsort(values, (size_t)values_len, sizeof *values, by_value);
    printf("%s %d of %d", what, values_len, all);
    if (values_len)
        printf(", median %.3f, 99th %.3f, slowest %.3f", values[values_len / 2], values[values_len * 99L / 100],
               values[values_len - 1]);
    printf("\n");
    fflush(stdout); /* before any fork, too */
}

/* A socket to the server, from that address; 0: from the one that the system takes. */
static int open_socket(int source, int number)
{
    struct sockaddr_in from = {.sin_family = AF_INET, .sin_addr.s_addr = htonl((uint32_t)source)};
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = (uint32_t)number};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    must(fd >= 0 && bind(fd, (struct sockaddr *)&from, sizeof from) == 0 &&
             connect(fd, (struct sockaddr *)&server, sizeof server) == 0 &&
             epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) == 0,
         "storm: socket");
    return fd;
}

static void delay(struct client *c, bool to_server, const void *data, size_t len)
{
    struct delayed **last = &under_way, *d = malloc(sizeof *d + len);
    must(d != NULL, "storm: memory");
    *d = (struct delayed){.client = c, .due = now_us() + c->rtt_ms * 500, .to_server = to_server, .len = len};
    memcpy(d->data, data, len);
    while (*last) /* there are few */
        last = &(*last)->next;
    *last = d;
}

static int bio_read(BIO *bio, char *to, int size)
{
    struct client *c = BIO_get_data(bio);
    size_t n = c->in_len < (size_t)size ? c->in_len : (size_t)size;
    BIO_clear_retry_flags(bio);
    if (!c->in) {
        BIO_set_retry_read(bio);
        return -1;
    }
    memcpy(to, c->in, n);
    c->in = NULL;
    return (int)n;
}

static int bio_write(BIO *bio, const char *data, int len)
{
    struct client *c = BIO_get_data(bio);
    if (!hello_len && len < HELLO_MAX - COOKIE_MAX)
        memcpy(hello, data, hello_len = (size_t)len);
    if (c->rtt_ms)
        delay(c, true, data, (size_t)len);
    else
        send(c->fd, data, (size_t)len, 0); /* it may be lost, as on any network */
    return len;
}

static long bio_ctrl(BIO *bio, int command, long number, void *p)
{
    (void)bio, (void)number, (void)p;
    if (command == BIO_CTRL_DGRAM_QUERY_MTU)
        return MTU;
    return command == BIO_CTRL_DGRAM_GET_FALLBACK_MTU ? MTU_FALLBACK : command == BIO_CTRL_FLUSH;
}

static void make_context(const char *certs)
{
    ctx = SSL_CTX_new(DTLS_client_method());
    method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "datagrams");
    must(chdir(certs) == 0 && ctx && method && BIO_meth_set_read(method, bio_read) &&
             BIO_meth_set_write(method, bio_write) && BIO_meth_set_ctrl(method, bio_ctrl) &&
             SSL_CTX_set_min_proto_version(ctx, DTLS1_2_VERSION) == 1 &&
             SSL_CTX_load_verify_locations(ctx, "ca.pem", NULL) == 1 &&
             SSL_CTX_use_certificate_chain_file(ctx, "client.pem") == 1 &&
             SSL_CTX_use_PrivateKey_file(ctx, "client.key", SSL_FILETYPE_PEM) == 1,
         "storm: OpenSSL, or the certificates");
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, NULL);
}

/* It begins with the next timeouts(). */
static struct client *client_open(struct client *c, int source)
{
    BIO *bio = BIO_new(method);
    must(c < clients + CLIENTS_MAX, "storm: too many clients");
    *c = (struct client){.ssl = SSL_new(ctx), .fd = open_socket(source, (int)(c - clients))};
    must(bio && c->ssl, "storm: SSL_new");
    BIO_set_data(bio, c);
    SSL_set_bio(c->ssl, bio, bio);
    SSL_set_connect_state(c->ssl);
    next_due = 0;
    return c;
}

static void client_close(struct client *c)
{
    c->rtt_ms = 0; /* nobody delivers any more */
    if (c->connected)
        SSL_shutdown(c->ssl);
    SSL_free(c->ssl);
    close(c->fd);
}

static void client_settle(struct client *c, bool connected)
{
    c->connected = connected;
    c->failed = !connected;
    c->took = now_us() - c->began;
    c->due = INT64_MAX;
    settled++;
    failures += !connected;
    if (!connected)
        ERR_error_string_n(ERR_peek_last_error(), failure, sizeof failure);
    if (again) {
        client_close(c);
        client_open(c, 0);
    }
}

/* Goes on with a handshake: a datagram is there, or libssl's timer is due, or it begins. */
static void client_step(struct client *c)
{
    struct timeval left;
    ERR_clear_error();
    if (!c->began)
        c->began = now_us();
    int done = DTLSv1_handle_timeout(c->ssl) < 0 ? -1 : SSL_do_handshake(c->ssl);
    bool over = done == 1 || SSL_get_error(c->ssl, done) != SSL_ERROR_WANT_READ;
    c->due = DTLSv1_get_timeout(c->ssl, &left) ? now_us() + (int64_t)left.tv_sec * 1000000 + left.tv_usec : INT64_MAX;
    next_due = c->due < next_due ? c->due : next_due;
    if (over)
        client_settle(c, done == 1);
}

static void timeouts(int64_t now)
{
    if (now < next_due)
        return;
    next_due = INT64_MAX;
    for (struct client *c = clients; c < clients + clients_len; c++) {
        if (c->due <= now)
            client_step(c);
        next_due = c->due < next_due ? c->due : next_due;
    }
}

/* An echo's text is its number; the server's greeting is none. */
static void client_read(struct client *c, int64_t when)
{
    char text[64], *end;
    for (int n; (n = SSL_read(c->ssl, text, sizeof text - 1)) > 0;) {
        text[n] = 0;
        long number = strtol(text, &end, 10);
        if (*end || number < echo_first || number >= echoes || !echo_at[number])
            continue;
        values[values_len++] = (double)(when - echo_at[number]) / 1e3;
        echo_at[number] = 0;
    }
}

static void client_take(struct client *c, const uint8_t *data, size_t len)
{
    c->in = data;
    c->in_len = len;
    if (c->connected)
        client_read(c, now_us());
    else if (!c->failed)
        client_step(c);
    c->in = NULL;
}

/* Each client's in their order, since all of one client take equally long. */
static void deliver(int64_t now)
{
    for (struct delayed **at = &under_way, *d; (d = *at) != NULL;) {
        if (d->due > now) {
            at = &d->next;
            continue;
        }
        *at = d->next; /* first, because what arrives may make another one, which goes to the end */
        if (d->to_server)
            send(d->client->fd, d->data, d->len, 0);
        else
            client_take(d->client, d->data, d->len);
        free(d);
    }
}

/* Those with that round trip. */
static void print_connected(int ms)
{
    int all = 0;
    values_len = 0;
    for (struct client *c = clients; c < clients + clients_len; c++) {
        all += c->rtt_ms == ms;
        if (c->rtt_ms == ms && c->connected)
            values[values_len++] = (double)c->took / 1e3;
    }
    if (ms)
        printf("rtt %d: ", ms);
    print_values("connected", all);
}

/* With a cookie it is the second message, in a record with the next number. */
static void port_send(struct port *p)
{
    static const size_t lengths[] = {11, 15, 23}; /* of the record, the message, the fragment: low bytes */
    uint8_t data[HELLO_MAX];
    memcpy(data, hello, AT_COOKIE);
    memcpy(data + AT_RANDOM, p->random, RANDOM);
    if (p->cookie_len) {
        data[AT_SEQUENCE] = data[AT_MESSAGE_SEQ] = 1;
        data[AT_COOKIE - 1] = (uint8_t)p->cookie_len;
        for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
            uint8_t *at = data + lengths[i];
            size_t n = ((size_t)at[0] << 8 | at[1]) + p->cookie_len;
            at[0] = (uint8_t)(n >> 8);
            at[1] = (uint8_t)n;
        }
        memcpy(data + AT_COOKIE, p->cookie, p->cookie_len);
    }
    memcpy(data + AT_COOKIE + p->cookie_len, hello + AT_COOKIE, hello_len - AT_COOKIE);
    send(p->fd, data, hello_len + p->cookie_len, 0);
    hellos++;
    hellos_with_cookie += p->cookie_len > 0;
}

/* A cookie: the one that was asked for, or a fresh one, because the server does not take the last one any more. */
static void port_take(struct port *p, const uint8_t *data, size_t n)
{
    if (n <= AT_VERIFY || data[AT_TYPE] != HELLO_VERIFY_REQUEST || data[AT_VERIFY] > COOKIE_MAX)
        return;
    p->cookie_len = data[AT_VERIFY];
    memcpy(p->cookie, data + AT_VERIFY + 1, p->cookie_len);
    port_send(p);
}

/* As many ClientHellos as are due, the ports in turn. */
static void flood(int64_t now)
{
    static int64_t last;
    static double due;
    due += (double)(now - last < BURST_US ? now - last : BURST_US) * rate / 1e6;
    last = now;
    for (; due >= 1; due--) {
        struct port *p = &ports[port_next++ % ports_len];
        must(RAND_bytes(p->random, RANDOM) == 1, "storm: random numbers");
        port_send(p);
    }
}

static void readable(uint32_t number)
{
    static uint8_t data[DATAGRAM_MAX];
    struct client *c = number < CLIENTS_MAX ? &clients[number] : NULL;
    struct port *p = c ? NULL : &ports[number - CLIENTS_MAX];
    for (ssize_t n; (n = recv(c ? c->fd : p->fd, data, sizeof data, 0)) >= 0;) {
        if (!c)
            port_take(p, data, (size_t)n);
        else if (c->rtt_ms)
            delay(c, false, data, (size_t)n);
        else
            client_take(c, data, (size_t)n);
    }
}

/* One turn of the loop, which ends at the given time at the latest. */
static void turn(int64_t wake)
{
    struct epoll_event events[EVENTS];
    int64_t now = now_us();
    wake = next_due < wake ? next_due : wake;
    for (struct delayed *d = under_way; d; d = d->next)
        wake = d->due < wake ? d->due : wake;
    int n = epoll_wait(epoll_fd, events, EVENTS, wake > now ? (int)((wake - now + 999) / 1000) : 0);
    for (int i = 0; i < n; i++)
        readable(events[i].data.u32);
    deliver(now_us());
    timeouts(now_us());
}

static void until_settled(void)
{
    for (int64_t until = in_seconds(seconds); settled < clients_len && now_us() < until;)
        turn(until);
}

/* The n-th of a net. */
static int address(int net, int n)
{
    return net + n / 250 * 256 + n % 250 + 1;
}

static void run_storm(void)
{
    for (int i = 0; i < amount; i++)
        client_open(&clients[i], apart ? address(APART, i) : 0);
    clients_len = amount;
    until_settled();
    print_connected(0);
}

/* Before a flood: so many ports of each address. Where nobody reads, answers are lost in the smallest of buffers. */
static void ports_open(int net, int addresses, bool reading)
{
    int least = 1;
    client_step(client_open(clients, 0)); /* for its ClientHello */
    client_close(clients);
    must(hello_len > AT_COOKIE && !hello[AT_COOKIE - 2] && !hello[AT_COOKIE - 1], "storm: not a ClientHello to copy");
    must(ports_len <= PORTS_MAX, "storm: too many ports");
    for (int i = 0; i < ports_len; i++) {
        int fd = ports[i].fd = open_socket(address(net, i % addresses), CLIENTS_MAX + i);
        must(reading || (setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &least, sizeof least) == 0 &&
                         epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL) == 0),
             "storm: socket");
    }
}

static void honest_beside_flood(void)
{
    int64_t began = now_us(), until = in_seconds(seconds) + WARM_US, now;
    clients_len = honest * rtts;
    for (int i = 0; i < clients_len; i++) {
        client_open(&clients[i], address(HONEST, i))->rtt_ms = rtt_ms[i % rtts];
        clients[i].due = began + WARM_US + i * STAGGER_US;
    }
    while ((now = now_us()) < until && settled < clients_len) {
        flood(now);
        turn(now + FLOOD_WAIT_US);
    }
    printf("flood %ld, %ld with a cookie, in %.1f s\n", hellos, hellos_with_cookie, (double)(now - began) / 1e6);
    for (int i = 0; i < rtts; i++)
        print_connected(rtt_ms[i]);
}

static void run_attack(void)
{
    ports_len = amount * ports_each;
    ports_open(HOSTS, amount, true);
    honest_beside_flood();
}

static void run_forged(void)
{
    rate = amount;
    ports_len = FORGED_PORTS;
    ports_open(FORGED, FORGED_PORTS, false);
    honest_beside_flood();
}

static void echo_for_seconds(const char *what)
{
    int64_t next = now_us(), until = in_seconds(seconds);
    char text[32];
    values_len = 0;
    echo_first = echoes;
    for (int64_t now; (now = now_us()) < until + LATE_US && (now < until || values_len < echoes - echo_first);) {
        if (now >= next && now < until && echoes < VALUES_MAX) {
            int n = snprintf(text, sizeof text, "echo %d", echoes);
            echo_at[echoes++] = now;
            must(SSL_write(clients->ssl, text, n) == n, "storm: SSL_write");
            next = now + ECHO_US;
        }
        turn(now < until ? next : until + LATE_US);
    }
    print_values(what, echoes - echo_first);
}

/* The child: handshakes all the time. */
/* In a child: of less priority, and without the client that echoes; its SSL is the parent's, who goes on with it. */
static void be_the_crowd(void)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setpriority(PRIO_PROCESS, 0, NICE);
    close(clients->fd);
    epoll_fd = epoll_create1(0);
    settled = clients_len = 0;
}

static void command_for_seconds(int report)
{
    static const char *const commands[] = {"bc x", "stats"};
    int sent = 0;
    be_the_crowd();
    for (int64_t until = in_seconds(600); settled < amount && now_us() < until; turn(now_us() + FLOOD_WAIT_US))
        while (clients_len < amount && clients_len - settled < BATCH)
            client_open(&clients[clients_len++], 0);
    must(settled == amount && failures == 0 && write(report, &settled, sizeof settled) == sizeof settled,
         "storm: the clients that stay");
    int64_t next = 0, until = in_seconds(seconds);
    for (int64_t now; (now = now_us()) < until; turn(next)) {
        if (now >= next) {
            const char *command = commands[sent++ % 2];
            must(SSL_write(clients->ssl, command, (int)strlen(command)) > 0, "storm: SSL_write");
            next = now + COMMAND_US;
        }
    }
    _exit(write(report, &sent, sizeof sent) != sizeof sent);
}

static void handshake_for_seconds(int report)
{
    int64_t until = in_seconds(seconds);
    be_the_crowd();
    again = true;
    for (int i = 0; i < amount; i++)
        client_open(&clients[i], 0);
    clients_len = amount;
    while (now_us() < until)
        turn(until);
    settled -= failures;
    _exit(write(report, &settled, sizeof settled) != sizeof settled);
}

/* Alone, then beside a child; it says when it is ready, if it has to be, and at its end a number. */
static int echo_beside(void (*crowd)(int report), bool waits)
{
    int ends[2], ready = 0, number = 0;
    client_open(clients, ECHOING);
    clients_len = 1;
    until_settled();
    must(clients->connected && pipe(ends) == 0, "storm: the client that echoes");
    echo_for_seconds("alone");
    pid_t child = fork();
    if (child == 0)
        crowd(ends[1]);
    close(ends[1]); /* so that the end of a child that fails is the end of the pipe */
    must(!waits || read(ends[0], &ready, sizeof ready) == sizeof ready,
         "storm: the clients beside the one that echoes");
    echo_for_seconds("beside");
    must(child > 0 && read(ends[0], &number, sizeof number) == sizeof number && waitpid(child, NULL, 0) == child,
         "storm: the clients beside the one that echoes");
    return number;
}

static void run_echo(void)
{
    int handshakes = echo_beside(handshake_for_seconds, false);
    printf("handshakes %d, %d in a second\n", handshakes, handshakes / seconds);
}

static void run_walk(void)
{
    int sent = echo_beside(command_for_seconds, true);
    printf("commands %d beside %d clients\n", sent, amount);
}

static bool option(const char *word)
{
    int one_rtt = sscanf(word, "rtt=%d", rtt_ms) == 1;
    rtts = one_rtt ? 1 : rtts;
    return one_rtt || sscanf(word, "apart=%d", &apart) == 1 || sscanf(word, "ports=%d", &ports_each) == 1 ||
           sscanf(word, "rate=%d", &rate) == 1 || sscanf(word, "honest=%d", &honest) == 1 ||
           sscanf(word, "%d", &seconds) == 1;
}

static bool options(int argc, char **argv)
{
    char host[16];
    if (argc < 5 || sscanf(argv[1], "%15[0-9.]:%hu", host, &server.sin_port) != 2 ||
        inet_pton(AF_INET, host, &server.sin_addr) != 1 || sscanf(argv[4], "%d", &amount) != 1)
        return false;
    server.sin_port = htons(server.sin_port);
    for (int i = 5; i < argc; i++)
        if (!option(argv[i]))
            return false;
    return amount > 0 && amount <= AMOUNT_MAX && seconds > 0 && rate > 0 && *rtt_ms > 0 && honest > 0 &&
           honest <= CLIENTS_MAX / RTTS && ports_each > 0 && ports_each <= PORTS_MAX;
}

static void (*chosen(const char *name))(void)
{
    return strcmp(name, "storm") == 0    ? run_storm
           : strcmp(name, "attack") == 0 ? run_attack
           : strcmp(name, "forged") == 0 ? run_forged
           : strcmp(name, "echo") == 0   ? run_echo
           : strcmp(name, "walk") == 0   ? run_walk
                                         : NULL;
}

int main(int argc, char **argv)
{
    struct rlimit files;
    void (*run)(void) = options(argc, argv) ? chosen(argv[3]) : NULL;
    if (!run)
        return 2;
    must(getrlimit(RLIMIT_NOFILE, &files) == 0, "storm: limits");
    files.rlim_cur = files.rlim_max;
    must(setrlimit(RLIMIT_NOFILE, &files) == 0 && (epoll_fd = epoll_create1(0)) >= 0, "storm: limits");
    make_context(argv[2]);
    run();
    if (failures)
        printf("failed %d, the last one: %s\n", failures, failure);
    for (struct client *c = clients; c < clients + clients_len; c++)
        client_close(c);
    return 0;
}
