/* bench.c - what the server costs, each figure beside the least it could cost. Linux only; started by bench.sh.
 *
 * What runs on one core slows down what runs on the other, by up to 40 %, and machines have good and bad minutes. So a
 * figure means something only beside another one, taken under the same load at nearly the same time. Hence:
 *
 * - The server under test runs alone on core 0. This program, the load, runs on core 1 and never sleeps, so that core 0
 *   always has an equally busy neighbour and never pays for waking somebody up.
 * - The floors (libssl alone in memory, a bare UDP echo) run on core 0 too, in turn with the server, in rounds A B A B.
 *   While a floor without network is measured, core 1 burns the same kind of work.
 * - Printed are the median of each side and the median of the rounds' ratios.
 *
 * The load speaks raw libssl: the code under test is on one side only. All its clients share one UDP socket; each has a
 * source address of its own within 127.0.0.0/8, set by IP_PKTINFO, and so is a peer of its own to the server.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifdef BENCH_DTLS
#include "../dtls.h"
#endif

enum {
    SERVER_CORE = 0,
    LOAD_CORE = 1,
    DATAGRAM_MAX = 2048,
    UDP_PAYLOAD_BYTES = 1472, /* both sides' flights are packed for an Ethernet link */
    BATCH = 64,
    CLIENTS_MAX = 1024,
    HANDSHAKE_CLIENTS = 16, /* at once: keeps the server's core busy without a long queue */
    ECHO_CLIENTS = 32,      /* each keeps one message in flight */
    FLOOD_WINDOW = 256,     /* unanswered ClientHellos at most: less than a socket buffer of the default size holds */
    FLOOD_SOCKETS = 4,
    ROUNDS_MAX = 32,
    SOCKET_BUFFER_BYTES = 4 << 20,
    RECORD_OVERHEAD_BYTES = 13 + 8 + 16 /* DTLS header, explicit nonce and tag of AES-GCM */
};

/* Source addresses: 2^20 for clients, 2^22 for spoofed hellos, none of them an address that the server listens on. */
static const uint32_t CLIENT_NET = 0x7f100000;
static const uint32_t CLIENT_NET_SIZE = 1 << 20;
static const uint32_t FLOOD_NET = 0x7f400000;
static const uint32_t FLOOD_NET_SIZE = 1 << 22;

/* One cipher and one key exchange, so that every server does the same work. P-256 is there for the certificates. */
static const char CIPHER[] = "ECDHE-ECDSA-AES128-GCM-SHA256";
static const char GROUPS[] = "X25519:P-256";

static const double RETRANSMIT_S = 0.25; /* the load's first handshake timer, and its patience with an echo */
static const char *g_certs;

static void die(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

static void die(const char *format, ...)
{
    va_list args;
    fflush(stdout);
    fputs("bench: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    ERR_print_errors_fp(stderr);
    exit(1);
}

/* ---- clocks ------------------------------------------------------------------------------------------------------ */

static double clock_s(clockid_t clock)
{
    struct timespec ts;
    if (clock_gettime(clock, &ts) != 0)
        die("clock: %s", strerror(errno));
    return (double)ts.tv_sec + (double)ts.tv_nsec / 1e9;
}

static double now_s(void)
{
    return clock_s(CLOCK_MONOTONIC);
}

static void sleep_s(double seconds)
{
    struct timespec ts = {.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (double)(time_t)seconds) * 1e9)};
    nanosleep(&ts, NULL);
}

/* User and system time of a whole process, to the nanosecond. */
static double process_cpu_s(pid_t pid)
{
    clockid_t clock;
    if (clock_getcpuclockid(pid, &clock) != 0)
        die("the server is gone");
    return clock_s(clock);
}

static long process_rss_kb(pid_t pid)
{
    char path[64], line[256];
    long kb = -1;
    snprintf(path, sizeof path, "/proc/%ld/status", (long)pid);
    FILE *file = fopen(path, "r");
    if (!file)
        die("the server is gone");
    while (kb < 0 && fgets(line, sizeof line, file))
        if (sscanf(line, "VmRSS: %ld kB", &kb) != 1)
            kb = -1;
    fclose(file);
    if (kb < 0)
        die("no VmRSS in %s", path);
    return kb;
}

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)core, &set);
    if (sched_setaffinity(0, sizeof set, &set) != 0)
        die("cannot use core %d: %s", core, strerror(errno));
}

/* ---- datagrams for libssl: a BIO that holds one borrowed datagram and hands on what libssl sends ----------------- */

struct wire {
    const uint8_t *data; /* the datagram that libssl may read now; NULL: none */
    size_t len;
    bool peek;
    void (*send)(void *arg, const void *data, size_t len);
    void *arg;
};

static int wire_read(BIO *bio, char *out, int size)
{
    struct wire *wire = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    if (!wire->data) {
        BIO_set_retry_read(bio);
        return -1;
    }
    size_t len = wire->len < (size_t)size ? wire->len : (size_t)size;
    memcpy(out, wire->data, len);
    if (!wire->peek)
        wire->data = NULL;
    return (int)len;
}

static int wire_write(BIO *bio, const char *data, int len)
{
    struct wire *wire = BIO_get_data(bio);
    BIO_clear_retry_flags(bio);
    wire->send(wire->arg, data, (size_t)len);
    return len;
}

static long wire_ctrl(BIO *bio, int cmd, long num, void *ptr)
{
    struct wire *wire = BIO_get_data(bio);
    (void)ptr;
    switch (cmd) {
    case BIO_CTRL_FLUSH:
        return 1;
    case BIO_CTRL_DGRAM_GET_MTU_OVERHEAD:
        return 28;
    case BIO_CTRL_DGRAM_SET_PEEK_MODE:
        wire->peek = num != 0;
        return 1;
    default:
        return 0;
    }
}

static int wire_create(BIO *bio)
{
    BIO_set_init(bio, 1);
    return 1;
}

static void wire_attach(struct wire *wire, SSL *ssl)
{
    static BIO_METHOD *method;
    if (!method) {
        method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "bench datagram");
        if (!method)
            die("out of memory");
        BIO_meth_set_read(method, wire_read);
        BIO_meth_set_write(method, wire_write);
        BIO_meth_set_ctrl(method, wire_ctrl);
        BIO_meth_set_create(method, wire_create);
    }
    BIO *bio = BIO_new(method);
    if (!bio)
        die("out of memory");
    BIO_set_data(bio, wire);
    SSL_set_bio(ssl, bio, bio);
    SSL_set_mtu(ssl, UDP_PAYLOAD_BYTES);
}

/* ---- libssl contexts --------------------------------------------------------------------------------------------- */

static SSL_CTX *context_new(const SSL_METHOD *method, const char *who)
{
    char cert[512], key[512], ca[512];
    snprintf(cert, sizeof cert, "%s/%s.pem", g_certs, who);
    snprintf(key, sizeof key, "%s/%s.key", g_certs, who);
    snprintf(ca, sizeof ca, "%s/ca.pem", g_certs);
    SSL_CTX *ctx = SSL_CTX_new(method);
    if (!ctx || SSL_CTX_use_certificate_chain_file(ctx, cert) != 1 ||
        SSL_CTX_use_PrivateKey_file(ctx, key, SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_load_verify_locations(ctx, ca, NULL) != 1)
        die("certificates of %s in %s", who, g_certs);
    SSL_CTX_set_min_proto_version(ctx, DTLS1_2_VERSION);
    SSL_CTX_set_max_proto_version(ctx, DTLS1_2_VERSION);
    SSL_CTX_set_options(ctx, SSL_OP_NO_QUERY_MTU | SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION);
    SSL_CTX_set_mode(ctx, SSL_MODE_NO_AUTO_CHAIN);
    return ctx;
}

/* Checking the server's chain is the client's business and cost. Without it the load outpaces the server and keeps it
 * busy, which is when its cost can be told. SSL_VERIFY_NONE would check it all the same, and ignore the result. */
static int verify_nothing(X509_STORE_CTX *store, void *arg)
{
    (void)store;
    (void)arg;
    return 1;
}

static SSL_CTX *client_context(void)
{
    SSL_CTX *ctx = context_new(DTLS_client_method(), "client");
    if (SSL_CTX_set_cipher_list(ctx, CIPHER) != 1 || SSL_CTX_set1_groups_list(ctx, GROUPS) != 1)
        die("%s with %s is not available", CIPHER, GROUPS);
    SSL_CTX_set_cert_verify_callback(ctx, verify_nothing, NULL);
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    return ctx;
}

/* The floor's cookie is a constant: what a real one costs is the server's own expense. */
static int cookie_make(SSL *ssl, unsigned char *cookie, unsigned *len)
{
    (void)ssl;
    memset(cookie, 'c', 32);
    *len = 32;
    return 1;
}

static int cookie_check(SSL *ssl, const unsigned char *cookie, unsigned len)
{
    (void)ssl;
    (void)cookie;
    return len == 32;
}

static SSL_CTX *server_context(void)
{
    static const unsigned char id[] = "bench";
    SSL_CTX *ctx = context_new(DTLS_server_method(), "server");
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    SSL_CTX_set_session_id_context(ctx, id, sizeof id - 1);
    SSL_CTX_sess_set_cache_size(ctx, 4096);
    SSL_CTX_set_cookie_generate_cb(ctx, cookie_make);
    SSL_CTX_set_cookie_verify_cb(ctx, cookie_check);
    return ctx;
}

/* ---- floor: client and server in memory -------------------------------------------------------------------------- */

struct inbox {
    uint8_t data[16][DATAGRAM_MAX];
    size_t len[16];
    size_t first, count;
};

static void inbox_put(void *arg, const void *data, size_t len)
{
    struct inbox *inbox = arg;
    if (inbox->count == 16 || len > DATAGRAM_MAX)
        die("in memory: a flight larger than planned");
    size_t at = (inbox->first + inbox->count++) % 16;
    memcpy(inbox->data[at], data, len);
    inbox->len[at] = len;
}

/* Lends the oldest datagram to libssl. */
static bool inbox_lend(struct inbox *inbox, struct wire *wire)
{
    if (inbox->count == 0)
        return false;
    wire->data = inbox->data[inbox->first];
    wire->len = inbox->len[inbox->first];
    inbox->first = (inbox->first + 1) % 16;
    inbox->count--;
    return true;
}

struct pair {
    SSL *client, *server;
    struct wire client_wire, server_wire;
    struct inbox to_client, to_server;
    bool listening;
};

struct floor {
    SSL_CTX *client_ctx, *server_ctx;
    BIO_ADDR *addr;
    double spent_s;      /* CPU of the server's calls */
    double clock_cost_s; /* of one measurement, to be taken off */
};

static double floor_clock_cost(void)
{
    double start = clock_s(CLOCK_THREAD_CPUTIME_ID), end = start;
    for (int i = 0; i < 10000; i++)
        end = clock_s(CLOCK_THREAD_CPUTIME_ID);
    return (end - start) / 10000;
}

static void floor_begin(struct floor *fl)
{
    fl->spent_s -= clock_s(CLOCK_THREAD_CPUTIME_ID);
}

static void floor_end(struct floor *fl)
{
    fl->spent_s += clock_s(CLOCK_THREAD_CPUTIME_ID) - fl->clock_cost_s;
}

static void pair_server_turn(struct floor *fl, struct pair *pair)
{
    floor_begin(fl);
    if (pair->listening) {
        int result = DTLSv1_listen(pair->server, fl->addr);
        if (result < 0)
            die("in memory: DTLSv1_listen");
        pair->listening = result == 0;
    }
    if (!pair->listening) {
        int result = SSL_do_handshake(pair->server);
        if (result != 1 && SSL_get_error(pair->server, result) != SSL_ERROR_WANT_READ)
            die("in memory: the server's handshake failed");
    }
    floor_end(fl);
}

/* Connects the two; returns false when libssl did not resume though a session was given. */
static bool pair_open(struct floor *fl, struct pair *pair, SSL_SESSION *session)
{
    memset(&pair->client_wire, 0, sizeof pair->client_wire);
    memset(&pair->server_wire, 0, sizeof pair->server_wire);
    pair->to_client.count = pair->to_server.count = 0;
    pair->client_wire.send = pair->server_wire.send = inbox_put;
    pair->client_wire.arg = &pair->to_server;
    pair->server_wire.arg = &pair->to_client;
    pair->listening = true;

    pair->client = SSL_new(fl->client_ctx);
    if (!pair->client)
        die("out of memory");
    wire_attach(&pair->client_wire, pair->client);
    SSL_set_connect_state(pair->client);
    if (session)
        SSL_set_session(pair->client, session);
    SSL_do_handshake(pair->client);

    floor_begin(fl);
    pair->server = SSL_new(fl->server_ctx);
    if (!pair->server)
        die("out of memory");
    wire_attach(&pair->server_wire, pair->server);
    floor_end(fl);

    while (pair->to_server.count || pair->to_client.count) {
        while (inbox_lend(&pair->to_server, &pair->server_wire))
            pair_server_turn(fl, pair);
        while (inbox_lend(&pair->to_client, &pair->client_wire))
            if (SSL_do_handshake(pair->client) < 0 && SSL_get_error(pair->client, -1) != SSL_ERROR_WANT_READ)
                die("in memory: the client's handshake failed");
    }
    if (!SSL_is_init_finished(pair->client) || !SSL_is_init_finished(pair->server))
        die("in memory: the handshake stopped");
    return !session || SSL_session_reused(pair->client);
}

static void pair_close(struct floor *fl, struct pair *pair)
{
    char byte;
    SSL_shutdown(pair->client);
    inbox_lend(&pair->to_server, &pair->server_wire);
    floor_begin(fl);
    if (SSL_read(pair->server, &byte, 1) > 0 || SSL_get_error(pair->server, 0) != SSL_ERROR_ZERO_RETURN)
        die("in memory: no close_notify");
    SSL_shutdown(pair->server);
    SSL_free(pair->server);
    floor_end(fl);
    SSL_free(pair->client);
}

/* One message to and fro on each pair. The server's part is timed for all of them at once: the clock costs as much as a
 * record does, and as in the real server each connection meets a cache that the others have used. */
static void floor_echo(struct floor *fl, struct pair *pairs, size_t count, size_t bytes)
{
    static uint8_t message[DATAGRAM_MAX], buf[DATAGRAM_MAX];
    for (size_t i = 0; i < count; i++)
        SSL_write(pairs[i].client, message, (int)bytes);
    floor_begin(fl);
    for (size_t i = 0; i < count; i++) {
        struct pair *pair = &pairs[i];
        inbox_lend(&pair->to_server, &pair->server_wire);
        int len = SSL_read(pair->server, buf, sizeof buf);
        if (len <= 0 || SSL_write(pair->server, buf, len) != len)
            die("in memory: echo");
    }
    floor_end(fl);
    for (size_t i = 0; i < count; i++) {
        inbox_lend(&pairs[i].to_client, &pairs[i].client_wire);
        if (SSL_read(pairs[i].client, buf, sizeof buf) != (int)bytes)
            die("in memory: no echo");
    }
}

static void floor_init(struct floor *fl)
{
    memset(fl, 0, sizeof *fl);
    fl->client_ctx = client_context();
    fl->server_ctx = server_context();
    fl->addr = BIO_ADDR_new();
    fl->clock_cost_s = floor_clock_cost();
    if (!fl->addr)
        die("out of memory");
}

/* ---- floor process: measures on the server's core when asked ----------------------------------------------------- */

enum work { WORK_FULL, WORK_RESUMED, WORK_ECHO };

struct order {
    enum work work;
    size_t bytes;
    double seconds;
};

struct result {
    double us; /* CPU per handshake or per echo */
    uint64_t count;
};

/* What an order works on: all of it in either process, so that the neighbour can burn what the floor measures. */
struct worker {
    struct floor fl;
    struct pair *pairs; /* ECHO_CLIENTS connected ones, and one more for handshakes */
    SSL_SESSION *session;
};

static void worker_init(struct worker *worker)
{
    floor_init(&worker->fl);
    worker->pairs = calloc(ECHO_CLIENTS + 1, sizeof *worker->pairs);
    if (!worker->pairs)
        die("out of memory");
    for (size_t i = 0; i < ECHO_CLIENTS; i++)
        pair_open(&worker->fl, &worker->pairs[i], NULL);
    worker->session = SSL_get1_session(worker->pairs[0].client);
}

static uint64_t worker_do(struct worker *worker, const struct order *order)
{
    struct pair *spare = &worker->pairs[ECHO_CLIENTS];
    switch (order->work) {
    case WORK_FULL:
        pair_open(&worker->fl, spare, NULL);
        SSL_SESSION_free(worker->session); /* the server's cache forgets the oldest: keep the latest */
        worker->session = SSL_get1_session(spare->client);
        pair_close(&worker->fl, spare);
        return 1;
    case WORK_RESUMED:
        if (!pair_open(&worker->fl, spare, worker->session))
            die("in memory: not resumed");
        pair_close(&worker->fl, spare);
        return 1;
    case WORK_ECHO:
        floor_echo(&worker->fl, worker->pairs, ECHO_CLIENTS, order->bytes);
        return ECHO_CLIENTS;
    }
    return 0;
}

static struct result worker_measure(struct worker *worker, const struct order *order)
{
    struct result result = {0, 0};
    for (int i = 0; i < 10; i++)
        worker_do(worker, order);
    worker->fl.spent_s = 0;
    for (double end = now_s() + order->seconds; now_s() < end;)
        result.count += worker_do(worker, order);
    result.us = worker->fl.spent_s * 1e6 / (double)result.count;
    return result;
}

static volatile sig_atomic_t g_stopping; /* a child that ends now does so because we want it */

static void child_ended(int signo)
{
    static const char line[] = "bench: the server ended\n";
    (void)signo;
    if (g_stopping)
        return;
    ssize_t ignored = write(STDERR_FILENO, line, sizeof line - 1);
    (void)ignored;
    _exit(1);
}

/* A child that dies with us, on its core. */
static pid_t child_start(int core)
{
    fflush(stdout); /* the child has no part in it */
    pid_t parent = getpid(), pid = fork();
    if (pid < 0)
        die("fork: %s", strerror(errno));
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent)
            _exit(1);
        signal(SIGCHLD, SIG_DFL);
        pin(core);
    }
    return pid;
}

static void child_stop(pid_t pid)
{
    g_stopping = 1;
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    g_stopping = 0;
}

/* Returns the descriptor that takes orders and gives results. */
static int floor_process_start(void)
{
    int fds[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, fds) != 0)
        die("socketpair: %s", strerror(errno));
    if (child_start(SERVER_CORE) != 0) {
        close(fds[1]);
        return fds[0];
    }
    close(fds[0]);
    struct worker worker;
    struct order order;
    worker_init(&worker);
    while (recv(fds[1], &order, sizeof order, 0) == sizeof order) {
        struct result result = worker_measure(&worker, &order);
        send(fds[1], &result, sizeof result, 0);
    }
    _exit(0);
}

/* Has the floor measured while this core burns the same work, with a datagram through loopback for every echo. */
static double floor_measure(int floor_fd, struct worker *burner, int burn_socket, struct order order)
{
    struct result result;
    static uint8_t datagram[DATAGRAM_MAX];
    if (send(floor_fd, &order, sizeof order, 0) != sizeof order)
        die("the floor process is gone");
    for (;;) {
        ssize_t got = recv(floor_fd, &result, sizeof result, MSG_DONTWAIT);
        if (got == (ssize_t)sizeof result)
            return result.us;
        if (got == 0 || (got < 0 && errno != EAGAIN))
            die("the floor process is gone");
        worker_do(burner, &order);
        for (int i = 0; order.work == WORK_ECHO && i < ECHO_CLIENTS; i++) {
            send(burn_socket, datagram, order.bytes, MSG_DONTWAIT);
            recv(burn_socket, datagram, sizeof datagram, MSG_DONTWAIT);
        }
    }
}

/* ---- sockets ----------------------------------------------------------------------------------------------------- */

static struct sockaddr_in loopback(uint32_t ip, uint16_t port)
{
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = {.s_addr = htonl(ip)}};
    return addr;
}

static int udp_socket(uint32_t ip, uint16_t *port)
{
    struct sockaddr_in addr = loopback(ip, port ? *port : 0);
    socklen_t len = sizeof addr;
    int size = SOCKET_BUFFER_BYTES, one = 1, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&addr, sizeof addr) != 0 ||
        getsockname(fd, (struct sockaddr *)&addr, &len) != 0)
        die("UDP socket: %s", strerror(errno));
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size); /* the system may give less: a loss is sent again */
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &one, sizeof one);
    if (port)
        *port = ntohs(addr.sin_port);
    return fd;
}

/* A socket that gets what it sends. */
static int udp_mirror(void)
{
    uint16_t port = 0;
    int fd = udp_socket(INADDR_LOOPBACK, &port);
    struct sockaddr_in self = loopback(INADDR_LOOPBACK, port);
    if (connect(fd, (struct sockaddr *)&self, sizeof self) != 0)
        die("UDP socket: %s", strerror(errno));
    return fd;
}

/* Many datagrams in one system call, each from or to an address of ours of its own. */
struct batch {
    struct mmsghdr msg[BATCH];
    struct iovec iov[BATCH];
    struct sockaddr_in addr[BATCH];
    _Alignas(struct cmsghdr) char control[BATCH][CMSG_SPACE(sizeof(struct in_pktinfo))];
    uint8_t data[BATCH][DATAGRAM_MAX];
    unsigned count;
};

static void batch_slot(struct batch *batch, unsigned i, size_t len)
{
    batch->iov[i] = (struct iovec){.iov_base = batch->data[i], .iov_len = len};
    batch->msg[i].msg_hdr = (struct msghdr){.msg_name = &batch->addr[i],
                                            .msg_namelen = sizeof batch->addr[i],
                                            .msg_iov = &batch->iov[i],
                                            .msg_iovlen = 1,
                                            .msg_control = batch->control[i],
                                            .msg_controllen = sizeof batch->control[i]};
}

/* What the system does not take now counts as lost. */
static void batch_flush(struct batch *batch, int fd)
{
    unsigned sent = 0;
    while (sent < batch->count) {
        int n = sendmmsg(fd, batch->msg + sent, batch->count - sent, MSG_DONTWAIT);
        if (n > 0)
            sent += (unsigned)n;
        else if (errno == ECONNREFUSED)
            continue; /* the error of an earlier datagram: the server is not listening yet */
        else if (errno == EAGAIN || errno == ENOBUFS)
            break;
        else
            die("send: %s", strerror(errno));
    }
    batch->count = 0;
}

static void batch_add(struct batch *batch, int fd, uint32_t from, const struct sockaddr_in *to, const void *data,
                      size_t len)
{
    if (len > DATAGRAM_MAX)
        die("a datagram of %zu bytes", len);
    unsigned i = batch->count++;
    batch_slot(batch, i, len);
    memcpy(batch->data[i], data, len);
    batch->addr[i] = *to;
    struct cmsghdr *control = CMSG_FIRSTHDR(&batch->msg[i].msg_hdr);
    struct in_pktinfo info = {.ipi_spec_dst = {.s_addr = htonl(from)}};
    control->cmsg_level = IPPROTO_IP;
    control->cmsg_type = IP_PKTINFO;
    control->cmsg_len = CMSG_LEN(sizeof info);
    memcpy(CMSG_DATA(control), &info, sizeof info);
    if (batch->count == BATCH)
        batch_flush(batch, fd);
}

static unsigned batch_receive(struct batch *batch, int fd)
{
    for (unsigned i = 0; i < BATCH; i++)
        batch_slot(batch, i, DATAGRAM_MAX);
    int n = recvmmsg(fd, batch->msg, BATCH, MSG_DONTWAIT, NULL);
    return n > 0 ? (unsigned)n : 0;
}

/* The address of ours that datagram i was sent to. */
static uint32_t batch_local(struct batch *batch, unsigned i)
{
    struct cmsghdr *control = CMSG_FIRSTHDR(&batch->msg[i].msg_hdr);
    struct in_pktinfo info;
    if (!control || control->cmsg_type != IP_PKTINFO)
        return 0;
    memcpy(&info, CMSG_DATA(control), sizeof info);
    return ntohl(info.ipi_addr.s_addr);
}

/* ---- the load ---------------------------------------------------------------------------------------------------- */

enum state { IDLE, CONNECTING, CONNECTED };

struct load;

struct client {
    struct load *load;
    SSL *ssl;
    struct wire wire;
    SSL_SESSION *session; /* to resume */
    enum state state;
    uint32_t address;
    double started_s;
    bool waiting; /* for the answer to a message */
    double asked_s;
};

struct load {
    SSL_CTX *ctx;
    int fd;
    struct sockaddr_in server;
    struct client clients[CLIENTS_MAX];
    size_t slots;      /* clients in use */
    uint32_t next;     /* generation: every handshake has a fresh address */
    size_t connecting; /* now */
    bool resume;       /* with the client's session, if it has one */
    bool keep;         /* connections stay open */
    bool raw;          /* no DTLS: any datagram is an answer */
    size_t message_bytes;
    uint8_t message[DATAGRAM_MAX];
    double checked_s;
    uint64_t connected, resumed, echoed, resent, failed; /* so far */
    double last_connect_s;
    struct batch in, out;
};

static void client_send(void *arg, const void *data, size_t len)
{
    struct client *client = arg;
    struct load *load = client->load;
    batch_add(&load->out, load->fd, client->address, &load->server, data, len);
}

static unsigned client_timer(SSL *ssl, unsigned last_us)
{
    (void)ssl;
    return last_us ? last_us * 2 : (unsigned)(RETRANSMIT_S * 1e6);
}

static void client_drop(struct client *client)
{
    if (client->state == CONNECTING)
        client->load->connecting--;
    SSL_free(client->ssl);
    client->ssl = NULL;
    client->state = IDLE;
    client->waiting = false;
}

static void client_close(struct client *client)
{
    ERR_clear_error();
    SSL_shutdown(client->ssl);
    client_drop(client);
}

static void client_connected(struct client *client)
{
    struct load *load = client->load;
    client->state = CONNECTED;
    load->connecting--;
    load->connected++;
    load->resumed += SSL_session_reused(client->ssl) ? 1U : 0U;
    load->last_connect_s = now_s() - client->started_s;
    if (!load->resume) { /* the server's cache forgets the oldest: keep the latest */
        SSL_SESSION_free(client->session);
        client->session = SSL_get1_session(client->ssl);
    }
    if (!load->keep)
        client_close(client);
}

static void client_handshake(struct client *client)
{
    ERR_clear_error();
    int result = SSL_do_handshake(client->ssl);
    if (result == 1) {
        client_connected(client);
    } else if (SSL_get_error(client->ssl, result) != SSL_ERROR_WANT_READ) {
        if (client->load->failed++ == 0)
            ERR_print_errors_fp(stderr);
        client_drop(client);
    }
}

static void client_connect(struct load *load, size_t slot)
{
    struct client *client = &load->clients[slot];
    size_t generations = CLIENT_NET_SIZE / CLIENTS_MAX;
    client->load = load;
    client->address = CLIENT_NET + (uint32_t)(load->next++ % generations * CLIENTS_MAX + slot);
    client->ssl = SSL_new(load->ctx);
    if (!client->ssl)
        die("out of memory");
    client->wire = (struct wire){.send = client_send, .arg = client};
    wire_attach(&client->wire, client->ssl);
    DTLS_set_timer_cb(client->ssl, client_timer);
    SSL_set_connect_state(client->ssl);
    if (load->resume && client->session)
        SSL_set_session(client->ssl, client->session);
    client->state = CONNECTING;
    client->started_s = now_s();
    load->connecting++;
    client_handshake(client);
}

static void client_ask(struct client *client, double now)
{
    struct load *load = client->load;
    client->waiting = true;
    client->asked_s = now;
    if (load->raw) {
        client_send(client, load->message, load->message_bytes + RECORD_OVERHEAD_BYTES);
        return;
    }
    ERR_clear_error();
    if (SSL_write(client->ssl, load->message, (int)load->message_bytes) <= 0)
        die("SSL_write");
}

static void client_answer(struct client *client)
{
    uint8_t buf[DATAGRAM_MAX];
    ERR_clear_error();
    int len = SSL_read(client->ssl, buf, sizeof buf);
    if (len <= 0 && SSL_get_error(client->ssl, len) != SSL_ERROR_WANT_READ)
        die("the server closed a connection");
    if (len > 0 && client->waiting) {
        client->waiting = false;
        client->load->echoed++;
    }
}

/* Receives what there is and resends what is overdue. Sending waits for load_flush(). */
static void load_turn(struct load *load)
{
    unsigned count = batch_receive(&load->in, load->fd);
    for (unsigned i = 0; i < count; i++) {
        uint32_t local = batch_local(&load->in, i);
        struct client *client = &load->clients[(local - CLIENT_NET) % CLIENTS_MAX];
        if (client->address != local)
            continue; /* for an earlier connection of this slot: the answer to its close_notify */
        client->wire.data = load->in.data[i];
        client->wire.len = load->in.msg[i].msg_len;
        if (load->raw && client->waiting) {
            client->waiting = false;
            load->echoed++;
        } else if (client->state == CONNECTING) {
            client_handshake(client);
        } else if (client->state == CONNECTED) {
            client_answer(client);
        }
        client->wire.data = NULL;
    }
    double now = now_s();
    if (now < load->checked_s + 0.01)
        return;
    load->checked_s = now;
    for (size_t i = 0; i < load->slots; i++) {
        struct client *client = &load->clients[i];
        if (client->state == CONNECTING) {
            ERR_clear_error();
            if (DTLSv1_handle_timeout(client->ssl) > 0)
                load->resent++;
        } else if (client->waiting && now > client->asked_s + RETRANSMIT_S) {
            load->resent++;
            client_ask(client, now);
        }
    }
}

static void load_flush(struct load *load)
{
    if (load->out.count)
        batch_flush(&load->out, load->fd);
}

static void load_init(struct load *load, uint16_t server_port)
{
    memset(load, 0, sizeof *load);
    load->ctx = client_context();
    load->fd = udp_socket(INADDR_ANY, NULL);
    load->server = loopback(INADDR_LOOPBACK, server_port);
}

static void load_free(struct load *load)
{
    for (size_t i = 0; i < CLIENTS_MAX; i++) {
        if (load->clients[i].ssl)
            client_drop(&load->clients[i]);
        SSL_SESSION_free(load->clients[i].session);
    }
    SSL_CTX_free(load->ctx);
    close(load->fd);
    free(load);
}

/* Connects slots 0 to count - 1 that are not connected, `window` at a time. */
static void load_connect_all(struct load *load, size_t count, size_t window)
{
    double end = now_s() + 30;
    uint64_t before = load->failed;
    load->slots = count;
    load->keep = true;
    for (size_t ready = 0; ready < count;) {
        ready = 0;
        for (size_t i = 0; i < count; i++) {
            if (load->clients[i].state == IDLE && load->connecting < window)
                client_connect(load, i);
            ready += load->clients[i].state == CONNECTED;
        }
        load_flush(load);
        load_turn(load);
        load_flush(load);
        if (load->failed > before || now_s() > end)
            die("only %zu of %zu clients connected, %" PRIu64 " refused", ready, count, load->failed - before);
    }
    load->resent = 0; /* the server was still starting */
}

static void load_close_all(struct load *load)
{
    for (size_t i = 0; i < load->slots; i++)
        if (load->clients[i].state == CONNECTED)
            client_close(&load->clients[i]);
    load_flush(load);
}

/* Full or resumed handshakes for a while; every one that began is seen to its end. */
static uint64_t load_handshakes(struct load *load, double seconds)
{
    uint64_t before = load->connected, failed = load->failed;
    double end = now_s() + seconds, now = now_s();
    load->slots = HANDSHAKE_CLIENTS;
    load->keep = false;
    while (now < end || load->connecting) {
        for (size_t i = 0; now < end && i < load->slots; i++)
            if (load->clients[i].state == IDLE)
                client_connect(load, i);
        load_flush(load);
        load_turn(load);
        load_flush(load);
        now = now_s();
        if (load->failed > failed + 10 || now > end + 10)
            die("handshakes fail: %" PRIu64 " done, %" PRIu64 " refused", load->connected - before,
                load->failed - failed);
    }
    return load->connected - before;
}

/* Every connected client keeps one message in flight for a while. */
static uint64_t load_echoes(struct load *load, double seconds)
{
    uint64_t before = load->echoed;
    double end = now_s() + seconds, now = now_s();
    size_t waiting = 0;
    while (now < end || waiting) {
        waiting = 0;
        for (size_t i = 0; i < load->slots; i++) {
            if (!load->clients[i].waiting && now < end)
                client_ask(&load->clients[i], now);
            waiting += load->clients[i].waiting;
        }
        load_flush(load);
        load_turn(load);
        load_flush(load);
        now = now_s();
        if (now > end + 10)
            die("echoes do not come back");
    }
    return load->echoed - before;
}

/* ---- servers ----------------------------------------------------------------------------------------------------- */

struct server {
    pid_t pid;
    uint16_t port;
};

/* The command with every {} replaced by the address. */
static struct server server_start(char **command)
{
    struct server server = {0, 0};
    char *argv[64], address[32];
    int argc = 0;
    close(udp_socket(INADDR_LOOPBACK, &server.port));
    snprintf(address, sizeof address, "127.0.0.1:%u", (unsigned)server.port);
    for (; command[argc] && argc < 63; argc++)
        argv[argc] = strcmp(command[argc], "{}") == 0 ? address : command[argc];
    argv[argc] = NULL;
    server.pid = child_start(SERVER_CORE);
    if (server.pid == 0) {
        /* It keeps standard error to say why it cannot start. */
        if (!freopen("/dev/null", "r", stdin) || !freopen("/dev/null", "w", stdout))
            _exit(1);
        execvp(argv[0], argv);
        die("%s: %s", argv[0], strerror(errno));
    }
    return server;
}

/* Waits until the server has done what it was given, so that its clock stands still. */
static double server_settled_cpu(pid_t pid)
{
    double last = process_cpu_s(pid);
    for (int i = 0; i < 100; i++) {
        sleep_s(0.005);
        double cpu = process_cpu_s(pid);
        if (cpu - last < 20e-6)
            return cpu;
        last = cpu;
    }
    return last;
}

static void bare_echo(int fd)
{
    uint8_t buf[DATAGRAM_MAX];
    struct sockaddr_in from;
    for (;;) {
        socklen_t len = sizeof from;
        ssize_t got = recvfrom(fd, buf, sizeof buf, 0, (struct sockaddr *)&from, &len);
        if (got > 0)
            sendto(fd, buf, (size_t)got, 0, (struct sockaddr *)&from, len);
    }
}

static struct server bare_echo_start(void)
{
    struct server server = {0, 0};
    int fd = udp_socket(INADDR_LOOPBACK, &server.port), off = 0;
    setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &off, sizeof off);
    server.pid = child_start(SERVER_CORE);
    if (server.pid == 0)
        bare_echo(fd);
    close(fd);
    return server;
}

#ifdef BENCH_DTLS
/* The smallest server on the library. */
static void serve_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    if (event == DTLS_EV_MESSAGE)
        dtls_conn_send(conn, data, len);
}

static int serve(const char *address)
{
    char cert[512], key[512], ca[512];
    dtls_error err;
    dtls_addr addr;
    snprintf(cert, sizeof cert, "%s/server.pem", g_certs);
    snprintf(key, sizeof key, "%s/server.key", g_certs);
    snprintf(ca, sizeof ca, "%s/ca.pem", g_certs);
    dtls_config config = {.cert_file = cert, .key_file = key, .ca_file = ca, .on_event = serve_event};
    dtls_loop *loop = dtls_loop_new(NULL);
    dtls_endpoint *ep = dtls_endpoint_new(loop, &config, &err);
    if (!ep || dtls_addr_parse(&addr, address, &err) != 0 || dtls_endpoint_listen(ep, &addr, &err) < 0)
        die("%s", err.text);
    return dtls_loop_run(loop) == 0 ? 0 : 1;
}
#endif

/* ---- rounds and the table ---------------------------------------------------------------------------------------- */

struct plan {
    int rounds;
    double seconds; /* each measurement */
    uint64_t hellos;
    char **command;
    int floor_fd, burn_socket;
    struct worker burner;
};

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(const double *values, int count)
{
    double sorted[ROUNDS_MAX];
    memcpy(sorted, values, (size_t)count * sizeof *values);
    qsort(sorted, (size_t)count, sizeof *sorted, compare);
    return count % 2 ? sorted[count / 2] : (sorted[count / 2 - 1] + sorted[count / 2]) / 2;
}

static double median_ratio(const double *a, const double *b, int count)
{
    double ratio[ROUNDS_MAX];
    for (int i = 0; i < count; i++)
        ratio[i] = a[i] / b[i];
    return median(ratio, count);
}

static void row(const char *what, const char *ours, const char *against, const char *ratio, const char *goal)
{
    printf("%-34s %12s   %-34s %6s   %s\n", what, ours, against, ratio, goal);
    fflush(stdout);
}

__attribute__((format(printf, 1, 2))) static const char *text(const char *format, ...)
{
    static char ring[8][64];
    static unsigned next;
    char *buf = ring[next++ % 8];
    va_list args;
    va_start(args, format);
    vsnprintf(buf, sizeof ring[0], format, args);
    va_end(args);
    return buf;
}

static double share; /* of core 0 that the server used in the last measurement */

static double measure_handshakes(struct load *load, pid_t pid, double seconds)
{
    double cpu = server_settled_cpu(pid), start = now_s();
    double count = (double)load_handshakes(load, seconds);
    share = (process_cpu_s(pid) - cpu) / (now_s() - start);
    return (server_settled_cpu(pid) - cpu) * 1e6 / count;
}

static double measure_echoes(struct load *load, pid_t pid, double seconds)
{
    double cpu = server_settled_cpu(pid), start = now_s();
    double count = (double)load_echoes(load, seconds);
    share = (process_cpu_s(pid) - cpu) / (now_s() - start);
    return (server_settled_cpu(pid) - cpu) * 1e6 / count;
}

static struct load *load_new(uint16_t port)
{
    struct load *load = malloc(sizeof *load);
    if (!load)
        die("out of memory");
    load_init(load, port);
    return load;
}

static void bench_handshakes(struct plan *plan)
{
    double full[ROUNDS_MAX], full_floor[ROUNDS_MAX], again[ROUNDS_MAX], again_floor[ROUNDS_MAX], busy[ROUNDS_MAX];
    struct server server = server_start(plan->command);
    struct load *load = load_new(server.port);
    uint64_t resumed = 0, retried = 0;
    struct order order = {.seconds = plan->seconds};

    load_connect_all(load, HANDSHAKE_CLIENTS, 1); /* warms both sides and collects the sessions to resume */
    load_close_all(load);
    for (int i = 0; i < plan->rounds; i++) {
        load->resume = false;
        full[i] = measure_handshakes(load, server.pid, plan->seconds);
        busy[i] = share;
        order.work = WORK_FULL;
        full_floor[i] = floor_measure(plan->floor_fd, &plan->burner, plan->burn_socket, order);
        load->resume = true;
        resumed = load->resumed;
        retried = load->connected;
        again[i] = measure_handshakes(load, server.pid, plan->seconds / 2);
        if (load->resumed - resumed < (load->connected - retried) * 9 / 10)
            die("only %" PRIu64 " of %" PRIu64 " handshakes were resumed", load->resumed - resumed,
                load->connected - retried);
        order.work = WORK_RESUMED;
        order.seconds = plan->seconds / 2;
        again_floor[i] = floor_measure(plan->floor_fd, &plan->burner, plan->burn_socket, order);
        order.seconds = plan->seconds;
    }
    row("full mutual handshake", text("%.0f us", median(full, plan->rounds)),
        text("libssl alone %.0f us", median(full_floor, plan->rounds)),
        text("%.2f", median_ratio(full, full_floor, plan->rounds)), "<= 1.25");
    row("resumed handshake", text("%.0f us", median(again, plan->rounds)),
        text("own full handshake %.0f us", median(full, plan->rounds)),
        text("%.2f", median_ratio(again, full, plan->rounds)), "<= 0.15");
    row("", "", text("libssl alone %.0f us", median(again_floor, plan->rounds)),
        text("%.2f", median_ratio(again, again_floor, plan->rounds)), "");
    printf("  server's core %.0f %% busy in full handshakes; %" PRIu64 " flights resent, %" PRIu64 " failed\n",
           median(busy, plan->rounds) * 100, load->resent, load->failed);
    load_free(load);
    child_stop(server.pid);
}

static void bench_echo(struct plan *plan, size_t bytes)
{
    double ours[ROUNDS_MAX], bare[ROUNDS_MAX], libssl[ROUNDS_MAX], sum[ROUNDS_MAX];
    double busy[ROUNDS_MAX], bare_busy[ROUNDS_MAX];
    struct server server = server_start(plan->command), echo = bare_echo_start();
    struct load *load = load_new(server.port), *bare_load = load_new(echo.port);
    struct order order = {.work = WORK_ECHO, .bytes = bytes, .seconds = plan->seconds};

    memset(load->message, 'x', sizeof load->message);
    memcpy(load->message, "echo ", 5);
    load->message_bytes = bare_load->message_bytes = bytes;
    load_connect_all(load, ECHO_CLIENTS, 4);
    bare_load->raw = true;
    bare_load->slots = ECHO_CLIENTS;
    for (size_t i = 0; i < ECHO_CLIENTS; i++) {
        bare_load->clients[i].load = bare_load;
        bare_load->clients[i].address = CLIENT_NET + (uint32_t)i;
    }
    load_echoes(load, 0.1);
    load_echoes(bare_load, 0.1);
    for (int i = 0; i < plan->rounds; i++) {
        ours[i] = measure_echoes(load, server.pid, plan->seconds);
        busy[i] = share;
        bare[i] = measure_echoes(bare_load, echo.pid, plan->seconds);
        bare_busy[i] = share;
        libssl[i] = floor_measure(plan->floor_fd, &plan->burner, plan->burn_socket, order);
        sum[i] = bare[i] + libssl[i];
    }
    row(text("echo of %zu bytes", bytes), text("%.2f us", median(ours, plan->rounds)),
        text("bare UDP %.2f + libssl %.2f us", median(bare, plan->rounds), median(libssl, plan->rounds)),
        text("%.2f", median_ratio(ours, sum, plan->rounds)), "<= 1.25");
    printf("  server's core %.0f %% busy, with bare UDP %.0f %%; %" PRIu64 " messages resent, with bare UDP %" PRIu64
           "\n",
           median(busy, plan->rounds) * 100, median(bare_busy, plan->rounds) * 100, load->resent, bare_load->resent);
    load_free(load);
    load_free(bare_load);
    child_stop(server.pid);
    child_stop(echo.pid);
}

static void bench_memory(struct plan *plan)
{
    enum { CONNECTIONS = 1000 };
    struct server server = server_start(plan->command);
    struct load *load = load_new(server.port);
    for (long last = -1, rss; (rss = process_rss_kb(server.pid)) != last; last = rss)
        sleep_s(0.2); /* until it has started */
    long start = process_rss_kb(server.pid);
    load_connect_all(load, CONNECTIONS, ECHO_CLIENTS);
    sleep_s(3);
    double each = (double)(process_rss_kb(server.pid) - start) / CONNECTIONS;
    row("RSS per idle connection", text("%.1f KB", each), text("at start %ld KB", start), "",
        "<= 42 KB on OpenSSL 3.0");
    load_free(load);
    child_stop(server.pid);
}

/* ---- flood ------------------------------------------------------------------------------------------------------- */

struct hello {
    uint8_t data[DATAGRAM_MAX];
    size_t len;
};

static void hello_keep(void *arg, const void *data, size_t len)
{
    struct hello *hello = arg;
    memcpy(hello->data, data, len);
    hello->len = len;
}

/* A first ClientHello, without cookie. */
static struct hello hello_make(SSL_CTX *ctx)
{
    struct hello hello = {.len = 0};
    struct wire wire = {.send = hello_keep, .arg = &hello};
    SSL *ssl = SSL_new(ctx);
    if (!ssl)
        die("out of memory");
    wire_attach(&wire, ssl);
    SSL_set_connect_state(ssl);
    SSL_do_handshake(ssl);
    SSL_free(ssl);
    return hello;
}

struct flood {
    struct hello hello;
    struct sockaddr_in server;
    int fd[FLOOD_SOCKETS];
    uint64_t sent, answered, bytes_out, bytes_in, largest, lost;
    double answered_s; /* when the last answer came */
    struct batch in, out;
};

/* Sends as many hellos as the window allows, up to `limit` in all, and counts answers. Every hello comes from an
 * address of its own. An open loop would only measure how the kernel drops datagrams from a full socket buffer. */
static void flood_turn(struct flood *flood, uint64_t limit)
{
    double now = now_s();
    for (int s = 0; s < FLOOD_SOCKETS; s++) {
        for (int i = 0; i < BATCH / FLOOD_SOCKETS; i++) {
            if (flood->sent >= limit || flood->sent - flood->answered - flood->lost >= FLOOD_WINDOW)
                break;
            uint32_t from = FLOOD_NET + (uint32_t)((flood->sent * 7919) % FLOOD_NET_SIZE);
            batch_add(&flood->out, flood->fd[s], from, &flood->server, flood->hello.data, flood->hello.len);
            flood->sent++;
            flood->bytes_out += flood->hello.len;
        }
        if (flood->out.count)
            batch_flush(&flood->out, flood->fd[s]);
        unsigned count = batch_receive(&flood->in, flood->fd[s]);
        for (unsigned i = 0; i < count; i++) {
            size_t len = flood->in.msg[i].msg_len;
            flood->answered++;
            flood->bytes_in += len;
            if (len > flood->largest)
                flood->largest = len;
            flood->answered_s = now;
        }
    }
    if (now > flood->answered_s + 0.1) {
        flood->lost = flood->sent - flood->answered; /* a datagram was dropped on the way: the window opens again */
        flood->answered_s = now;
    }
}

static void flood_run(struct flood *flood, uint64_t hellos)
{
    uint64_t limit = flood->sent + hellos;
    double quiet = 0;
    flood->answered_s = now_s();
    while (flood->sent < limit)
        flood_turn(flood, limit);
    for (double end = now_s() + 0.3; flood->sent > flood->answered && quiet < end; quiet = now_s())
        flood_turn(flood, limit);
}

/* True if every assertion about it holds. */
static bool bench_flood(struct plan *plan)
{
    double connect[ROUNDS_MAX * 4];
    int connects = 0;
    uint64_t with_client = plan->hellos / 10;
    struct server server = server_start(plan->command);
    struct load *load = load_new(server.port);
    struct flood *flood = calloc(1, sizeof *flood);
    if (!flood)
        die("out of memory");
    flood->hello = hello_make(load->ctx);
    flood->server = load->server;
    for (int i = 0; i < FLOOD_SOCKETS; i++)
        flood->fd[i] = udp_socket(INADDR_ANY, NULL);

    /* What the server allocates once and keeps, for its first connections and its first hellos, is not growth. */
    load_connect_all(load, ECHO_CLIENTS, 4);
    load_close_all(load);
    flood_run(flood, 2000);
    double cpu = server_settled_cpu(server.pid);
    long rss = process_rss_kb(server.pid);
    uint64_t answered = flood->answered;
    flood_run(flood, plan->hellos - with_client);
    cpu = server_settled_cpu(server.pid) - cpu;
    answered = flood->answered - answered;
    long growth = process_rss_kb(server.pid) - rss; /* real clients leave sessions behind: taken before they come */

    /* The rest of the flood with a client in it that connects and closes, over and over. */
    load->slots = 1;
    load->keep = false;
    for (uint64_t limit = flood->sent + with_client; flood->sent < limit || load->connecting;) {
        uint64_t before = load->connected;
        if (load->clients[0].state == IDLE)
            client_connect(load, 0);
        flood_turn(flood, limit);
        load_turn(load);
        load_flush(load);
        if (load->connected > before && connects < ROUNDS_MAX * 4)
            connect[connects++] = load->last_connect_s;
        if (load->clients[0].state == CONNECTING && now_s() > load->clients[0].started_s + 10)
            die("a real client cannot connect during the flood");
    }
    flood_run(flood, 0);
    int shown = connects < ROUNDS_MAX ? connects : ROUNDS_MAX;
    double worst = 0;
    for (int i = 0; i < connects; i++)
        worst = connect[i] > worst ? connect[i] : worst;

    row(text("flood of %" PRIu64 " ClientHellos: growth", flood->sent), text("%ld KB", growth),
        text("RSS before it %ld KB", rss), "", "0");
    row("  per hello", text("%.2f us", cpu * 1e6 / (double)answered),
        text("%" PRIu64 " answered, %" PRIu64 " lost", flood->answered, flood->sent - flood->answered), "", "");
    row("  bytes answered per byte received", "",
        text("%" PRIu64 " in, %" PRIu64 " out", flood->bytes_out, flood->bytes_in),
        text("%.2f", (double)flood->bytes_in / (double)flood->bytes_out), "<= 1");
    row("  a real client connects meanwhile", text("%.1f ms", median(connect, shown) * 1e3),
        text("worst of %d: %.1f ms", connects, worst * 1e3), "", "it does");

    bool good = connects > 0 && flood->largest <= flood->hello.len && flood->bytes_in <= flood->bytes_out;
    if (!good)
        fprintf(stderr, "bench: the server amplifies, or nobody could connect\n");
    for (int i = 0; i < FLOOD_SOCKETS; i++)
        close(flood->fd[i]);
    free(flood);
    load_free(load);
    child_stop(server.pid);
    return good;
}

/* ---- main -------------------------------------------------------------------------------------------------------- */

static void out_of_time(int signo)
{
    static const char line[] = "bench: out of time\n";
    ssize_t ignored = write(STDERR_FILENO, line, sizeof line - 1);
    (void)signo;
    (void)ignored;
    _exit(1);
}

static int usage(void)
{
    fputs("usage: bench [--quick] certs-folder server-command...    {} in the command becomes the address\n"
          "       bench --serve certs-folder address                a small server on the library\n"
          "       environment: BENCH_HELLOS, BENCH_ROUNDS, BENCH_ONLY=handshake|echo|memory|flood\n",
          stderr);
    return 2;
}

static bool selected(const char *part)
{
    const char *only = getenv("BENCH_ONLY");
    return !only || !*only || strcmp(only, part) == 0;
}

static uint64_t setting(const char *name, uint64_t fallback)
{
    const char *value = getenv(name);
    return value && *value ? strtoull(value, NULL, 10) : fallback;
}

int main(int argc, char **argv)
{
    struct plan plan = {.rounds = 9, .seconds = 0.6, .hellos = 200000};
    bool quick = argc > 1 && strcmp(argv[1], "--quick") == 0, good = true;
#ifdef BENCH_DTLS
    if (argc == 4 && strcmp(argv[1], "--serve") == 0) {
        g_certs = argv[2];
        return serve(argv[3]);
    }
#endif
    argc -= quick;
    argv += quick;
    if (argc < 3)
        return usage();
    g_certs = argv[1];
    plan.command = argv + 2;
    if (quick) {
        plan.rounds = 3;
        plan.seconds = 0.2;
        plan.hellos = 50000;
    }
    plan.hellos = setting("BENCH_HELLOS", plan.hellos);
    plan.rounds = (int)setting("BENCH_ROUNDS", (uint64_t)plan.rounds);
    if (plan.rounds < 1 || plan.rounds > ROUNDS_MAX)
        return usage();

    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (sysconf(_SC_NPROCESSORS_ONLN) < 2) {
        puts("bench: skipped, it needs two cores");
        return 77;
    }
    signal(SIGALRM, out_of_time);
    signal(SIGCHLD, child_ended);
    alarm(120 + (unsigned)(plan.hellos / 20000));
    plan.floor_fd = floor_process_start();
    pin(LOAD_CORE);
    worker_init(&plan.burner);
    plan.burn_socket = udp_mirror();

    printf("%s, %s with %s, %d rounds of %.1f s\n", OpenSSL_version(OPENSSL_VERSION), CIPHER, GROUPS, plan.rounds,
           plan.seconds);
    printf("server:");
    for (char **word = plan.command; *word; word++)
        printf(" %s", *word);
    puts("\n");
    row("server CPU or memory", "ours", "against", "ratio", "goal");
    if (selected("handshake"))
        bench_handshakes(&plan);
    if (selected("echo")) {
        bench_echo(&plan, 64);
        bench_echo(&plan, 1200);
    }
    if (selected("memory"))
        bench_memory(&plan);
    if (selected("flood"))
        good = bench_flood(&plan) && good;
    return good ? 0 : 1;
}
