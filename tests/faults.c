/* Injected faults: the n-th allocation, random number or system call of a whole life fails, for every n. A block of
 * runs is a process, forked from one that is warm; where one goes wrong its runs are repeated, each in a process of its
 * own. So a crash or a hang is reported with its n, and the next run goes on.
 *
 *   faults CERTS_DIR quick                      evenly spread samples, and every allocation of dtls.c
 *   faults CERTS_DIR all PART PARTS             every n, and OpenSSL's first use: PART, from 0, of PARTS processes
 *   faults CERTS_DIR SCENARIO KIND N [ERRNO]    one run
 *
 * Whatever says that it could not be done is asked again and must succeed then; a message that a fault lost is sent
 * again. So each run comes to its end, however early its fault: no crash, no hang, no connection that stays half open,
 * no wrong message, errors with a code and a text, and in the end every allocation and descriptor given back. Time is
 * virtual, so that deadlines cost nothing and a run repeats itself, while datagrams go through real sockets (in
 * "memory" and "crowd" they do not, and many are lost).
 *
 * The linker puts these in front of the system's, for dtls.c and this file alone; OpenSSL has hooks of its own:
 * wrap: malloc calloc realloc free fopen socket bind connect getsockname setsockopt fcntl recvmmsg sendmmsg close
 * wrap: epoll_create1 epoll_ctl epoll_wait eventfd signalfd sigprocmask read write pipe2 pthread_create getaddrinfo
 * wrap: freeaddrinfo
 * as in: cc ... -Wl,--wrap=malloc,--wrap=calloc,... */
#define _GNU_SOURCE /* recvmmsg */
#include "virtual.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    RUN_S = 10,         /* real time after which a run hangs; one takes some 10 ms */
    SPIN_MAX = 1000,    /* turns of the loop without a step of time */
    REPORTS_MAX = 16,   /* errors that one fault may cause: a dead connection loses a message at each try */
    ERRNOS_MAX = 10,    /* for each call */
    BLOCK = 32,         /* runs in one process */
    QUICK_RUNS = 8,     /* in quick mode about so many of each scenario, kind and errno, */
    QUICK_OPENSSL = 60, /* and of OpenSSL's allocations */
    ANSWER_MS = 1000,   /* virtual, as all from here on: for an echo, */
    SETTLE_MS = 45000,  /* for a handshake to succeed or fail: its deadline is 30 s, */
    IDLE_MS = 1000,     /* until the first idle event, */
    GONE_MS = 4000,     /* until a silent peer is given up, */
    COOKIE_MS = 500,    /* until the next cookie secret */
    MESSAGES_MAX = 64,
    TIMERS = 70,      /* the loop's heap has room for 63 and grows then */
    CROWD_ARMED = 61, /* those before are like any */
    CROWD = 66,       /* connections: the table has room for 64 and grows then */
    WIRE_MAX = 256,
    DATAGRAM_BYTES = 17000,
    LOST_OF_5 = 2,       /* datagrams in memory */
    DAMAGED_BYTES = 400, /* the first datagram to a client that is longer gets damaged: it has the certificate */
    TEXT_BYTES = 256
};

/* ---- the fault ---- */

enum call {
    MALLOC,
    OPENSSL,
    RANDOM,
    TRANSPORT,
    FOPEN,
    SOCKET,
    BIND,
    CONNECT,
    GETSOCKNAME,
    SETSOCKOPT,
    FCNTL,
    RECVMMSG,
    SENDMMSG,
    CLOSE,
    EPOLL_CREATE1,
    EPOLL_CTL,
    EPOLL_WAIT,
    EVENTFD,
    SIGNALFD,
    SIGPROCMASK,
    READ,
    WRITE,
    PIPE2,
    PTHREAD_CREATE,
    GETADDRINFO,
    CALLS
};

/* The errors are those that the system documents for the call, and EPERM, which a seccomp filter may give for any. */
static const struct kind {
    const char *name, *what;
    int errors[ERRNOS_MAX];
} kinds[CALLS] = {
    [MALLOC] = {"malloc", "allocations of dtls.c", {ENOMEM}},
    [OPENSSL] = {"openssl", "allocations of OpenSSL", {ENOMEM}},
    [RANDOM] = {"random", "random numbers", {EIO}},
    [TRANSPORT] = {"transport", "config.send", {EAGAIN}},
    [FOPEN] = {"fopen", "fopen", {EMFILE, EACCES, ENOMEM}},
    [SOCKET] = {"socket", "socket", {EMFILE, ENFILE, ENOBUFS, EAFNOSUPPORT}},
    [BIND] = {"bind", "bind", {EADDRINUSE, EADDRNOTAVAIL, EACCES}},
    [CONNECT] = {"connect", "connect", {ENETUNREACH, EAGAIN, EACCES}},
    [GETSOCKNAME] = {"getsockname", "getsockname", {ENOBUFS}},
    [SETSOCKOPT] = {"setsockopt", "setsockopt", {ENOPROTOOPT, ENOMEM}},
    [FCNTL] = {"fcntl", "fcntl", {EPERM}},
    [RECVMMSG] = {"recvmmsg", "recvmmsg", {EAGAIN, EINTR, ECONNREFUSED, EHOSTUNREACH, ENOMEM, ENOBUFS}},
    [SENDMMSG] = {"sendmmsg", "sendmmsg", {EAGAIN, EINTR, ECONNREFUSED, ENOBUFS, EPERM, EMSGSIZE, ENETUNREACH, EINVAL}},
    [CLOSE] = {"close", "close", {EINTR, EIO}},
    [EPOLL_CREATE1] = {"epoll_create1", "epoll_create1", {EMFILE, ENFILE, ENOMEM}},
    [EPOLL_CTL] = {"epoll_ctl", "epoll_ctl", {ENOMEM, ENOSPC}},
    [EPOLL_WAIT] = {"epoll_wait", "epoll_wait", {EINTR, EPERM}},
    [EVENTFD] = {"eventfd", "eventfd", {EMFILE, ENFILE, ENOMEM}},
    [SIGNALFD] = {"signalfd", "signalfd", {EMFILE, ENFILE, ENOMEM}},
    [SIGPROCMASK] = {"sigprocmask", "sigprocmask", {EPERM}},
    [READ] = {"read", "read", {EAGAIN, EINTR}},
    [WRITE] = {"write", "write", {EAGAIN}},
    [PIPE2] = {"pipe2", "pipe2", {EMFILE, ENFILE}},
    [PTHREAD_CREATE] = {"pthread_create", "pthread_create", {EAGAIN, EPERM}},
    [GETADDRINFO] = {"getaddrinfo", "getaddrinfo", {ENOMEM}},
};

struct fault {
    enum call call;
    long n; /* which use fails; 0: none */
    int error;
};

/* What a run tells its parent. */
struct outcome {
    bool fired, reported;
    long uses[CALLS];
    char site[TEXT_BYTES];   /* where OpenSSL asked for the memory that it did not get */
    char reason[TEXT_BYTES]; /* what was wrong, "" if nothing */
};

/* What a block of runs shares with the parent. */
struct shared {
    struct outcome runs[BLOCK];
    int began;
    long left; /* allocations that OpenSSL still holds after its own clean-up */
};

static struct shared *shared;

static struct outcome *outcome; /* of this run */

static struct fault fault;
static bool armed;     /* while a scenario runs */
static bool congested; /* the next sendmmsg finds the socket full, besides the fault */
static long held_ours, held_openssl, held_descriptors;

/* Whether this use is the one that fails. */
static bool due(enum call call)
{
    if (!armed || ++outcome->uses[call] != fault.n || call != fault.call)
        return false;
    outcome->fired = true;
    errno = fault.error;
    return true;
}

/* The world behaved badly: this ends the run. */
static void broken(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));

static void broken(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(outcome->reason, sizeof outcome->reason, format, args);
    va_end(args);
    fprintf(stderr, "faults: %s\n", outcome->reason);
    exit(1);
}

/* ---- what stands in front of the system's calls ---- */

#define REAL(type, name, ...)                                                                                          \
    type __real_##name(__VA_ARGS__);                                                                                   \
    type __wrap_##name(__VA_ARGS__)

static int opened(int fd)
{
    held_descriptors += fd >= 0;
    return fd;
}

REAL(void *, malloc, size_t n)
{
    void *p = due(MALLOC) ? NULL : __real_malloc(n);
    held_ours += p != NULL;
    return p;
}

REAL(void *, calloc, size_t n, size_t size)
{
    void *p = due(MALLOC) ? NULL : __real_calloc(n, size);
    held_ours += p != NULL;
    return p;
}

REAL(void *, realloc, void *old, size_t n)
{
    void *p = due(MALLOC) ? NULL : __real_realloc(old, n);
    held_ours += !old && p;
    return p;
}

REAL(void, free, void *p)
{
    held_ours -= p != NULL;
    __real_free(p);
}

REAL(FILE *, fopen, const char *path, const char *mode)
{
    return due(FOPEN) ? NULL : __real_fopen(path, mode);
}

REAL(int, socket, int family, int type, int protocol)
{
    return due(SOCKET) ? -1 : opened(__real_socket(family, type, protocol));
}

REAL(int, bind, int fd, const struct sockaddr *addr, socklen_t len)
{
    return due(BIND) ? -1 : __real_bind(fd, addr, len);
}

REAL(int, connect, int fd, const struct sockaddr *addr, socklen_t len)
{
    return due(CONNECT) ? -1 : __real_connect(fd, addr, len);
}

REAL(int, getsockname, int fd, struct sockaddr *addr, socklen_t *len)
{
    return due(GETSOCKNAME) ? -1 : __real_getsockname(fd, addr, len);
}

REAL(int, setsockopt, int fd, int level, int name, const void *value, socklen_t len)
{
    return due(SETSOCKOPT) ? -1 : __real_setsockopt(fd, level, name, value, len);
}

REAL(int, fcntl, int fd, int command, ...)
{
    va_list args;
    va_start(args, command);
    int value = command == F_GETFL ? 0 : va_arg(args, int);
    va_end(args);
    return due(FCNTL) ? -1 : __real_fcntl(fd, command, value);
}

REAL(int, recvmmsg, int fd, struct mmsghdr *messages, unsigned n, int flags, struct timespec *timeout)
{
    return due(RECVMMSG) ? -1 : __real_recvmmsg(fd, messages, n, flags, timeout);
}

REAL(int, sendmmsg, int fd, struct mmsghdr *messages, unsigned n, int flags)
{
    if (due(SENDMMSG))
        return -1;
    if (congested) {
        congested = false;
        errno = EAGAIN;
        return -1;
    }
    return __real_sendmmsg(fd, messages, n, flags);
}

/* Linux closes it whatever it returns. */
REAL(int, close, int fd)
{
    int r = __real_close(fd);
    held_descriptors -= r == 0;
    return due(CLOSE) ? -1 : r;
}

REAL(int, epoll_create1, int flags)
{
    return due(EPOLL_CREATE1) ? -1 : opened(__real_epoll_create1(flags));
}

/* Taking one out needs no memory. */
REAL(int, epoll_ctl, int fd, int op, int of, struct epoll_event *event)
{
    return op != EPOLL_CTL_DEL && due(EPOLL_CTL) ? -1 : __real_epoll_ctl(fd, op, of, event);
}

REAL(int, epoll_wait, int fd, struct epoll_event *events, int n, int timeout_ms)
{
    return due(EPOLL_WAIT) ? -1 : __real_epoll_wait(fd, events, n, timeout_ms);
}

REAL(int, eventfd, unsigned count, int flags)
{
    return due(EVENTFD) ? -1 : opened(__real_eventfd(count, flags));
}

/* Given one it changes that one. */
REAL(int, signalfd, int fd, const sigset_t *set, int flags)
{
    if (due(SIGNALFD))
        return -1;
    int r = __real_signalfd(fd, set, flags);
    return fd < 0 ? opened(r) : r;
}

REAL(int, sigprocmask, int how, const sigset_t *set, sigset_t *old)
{
    return due(SIGPROCMASK) ? -1 : __real_sigprocmask(how, set, old);
}

REAL(ssize_t, read, int fd, void *buf, size_t n)
{
    return due(READ) ? -1 : __real_read(fd, buf, n);
}

REAL(ssize_t, write, int fd, const void *buf, size_t n)
{
    return due(WRITE) ? -1 : __real_write(fd, buf, n);
}

REAL(int, pipe2, int fd[2], int flags)
{
    int r = due(PIPE2) ? -1 : __real_pipe2(fd, flags);
    held_descriptors += r == 0 ? 2 : 0;
    return r;
}

/* At once, so that a run repeats itself. */
REAL(int, pthread_create, pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg)
{
    (void)thread, (void)attr;
    if (due(PTHREAD_CREATE))
        return fault.error;
    start(arg);
    return 0;
}

/* The host of the scenario has one address where nobody is, and one of the server. */
static struct sockaddr_in host_addrs[2];
static struct addrinfo host_list[2];

REAL(int, getaddrinfo, const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **list)
{
    (void)hints;
    if (due(GETADDRINFO) || strcmp(host, "localhost") != 0)
        return EAI_SYSTEM;
    for (int i = 0; i < 2; i++) {
        host_addrs[i] = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)(i ? atoi(port) : 0))};
        host_addrs[i].sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        host_list[i] = (struct addrinfo){.ai_addr = (struct sockaddr *)&host_addrs[i],
                                         .ai_addrlen = sizeof host_addrs[i],
                                         .ai_next = i ? NULL : &host_list[1]};
    }
    *list = host_list;
    return 0;
}

REAL(void, freeaddrinfo, struct addrinfo *list)
{
    (void)list;
}

static bool openssl_due(const char *file, int line)
{
    if (!due(OPENSSL))
        return false;
    snprintf(outcome->site, sizeof outcome->site, " (%s:%d)", file, line);
    return true;
}

static void *openssl_malloc(size_t n, const char *file, int line)
{
    void *p = openssl_due(file, line) ? NULL : __real_malloc(n);
    held_openssl += p != NULL;
    return p;
}

static void openssl_free(void *p, const char *file, int line)
{
    (void)file, (void)line;
    held_openssl -= p != NULL;
    shared->left = held_openssl;
    __real_free(p);
}

static void *openssl_realloc(void *old, size_t n, const char *file, int line)
{
    if (old && n == 0) {
        openssl_free(old, file, line);
        return NULL;
    }
    void *p = openssl_due(file, line) ? NULL : __real_realloc(old, n);
    held_openssl += !old && p;
    return p;
}

static int random_bytes(unsigned char *buf, int n)
{
    return due(RANDOM) ? 0 : chance_bytes(buf, n);
}

static int random_status(void)
{
    return 1;
}

static void random_begin(void)
{
    static const RAND_METHOD method = {NULL, random_bytes, NULL, NULL, random_bytes, random_status};
    virtual_chance();
    RAND_set_rand_method(&method);
}

/* Allocations are counted here one by one, of OpenSSL as well: no need to search memory at each of many exits. */
const char *__asan_default_options(void);

const char *__asan_default_options(void)
{
    return "leak_check_at_exit=0";
}

/* ---- what may go wrong ---- */

static int reports; /* in this run */

/* Something did not work. Only the fault may be why, and only so often: it is over when it fired. */
static void excuse(const char *what, const char *text)
{
    if (!outcome->fired || ++reports > REPORTS_MAX)
        broken("%s: %s", what, text);
}

static void check_line(const char *line)
{
    if (!*line || strchr(line, '\n'))
        broken("a text that is not one line: \"%s\"", line);
}

/* A call said that it could not be done. */
static void refused(const char *call, const dtls_error *err)
{
    outcome->reported = true;
    if (err->code >= 0)
        broken("%s gives no code with its error", call);
    check_line(err->text);
    excuse(call, err->text);
}

static void refused_code(const char *call, int code)
{
    outcome->reported = true;
    if (strcmp(dtls_strerror(code), "unknown error") == 0)
        broken("%s gives %d", call, code);
    excuse(call, dtls_strerror(code));
}

/* ---- the world ---- */

static struct {
    dtls_endpoint *ep;
} server;

static struct {
    dtls_endpoint *ep;
    dtls_target target;
    dtls_conn *conn;
    bool settled, connected, idle; /* since it began to connect */
    bool renewed;
    dtls_reason reason;
    char reason_text[TEXT_BYTES];
    uint32_t sent, echoed; /* messages, numbered from 1 */
} client;

static const char *certs;
static dtls_loop *loop;
static bool congested_server;            /* each echo meets a full socket */
static size_t lengths[MESSAGES_MAX + 1]; /* of the messages sent */
static bool seen[MESSAGES_MAX + 1];      /* their echoes */

static bool done_renewed(void)
{
    return client.renewed || !client.conn;
}

static bool done_settled(void)
{
    return client.settled;
}

static bool done_echoed(void)
{
    return client.echoed == client.sent;
}

static bool done_idle(void)
{
    return client.idle;
}

static bool done_empty(void)
{
    dtls_counters s, c;
    dtls_endpoint_counters(server.ep, &s);
    dtls_endpoint_counters(client.ep, &c);
    return s.conns + s.handshakes + c.conns + c.handshakes == 0;
}

static struct datagram {
    dtls_addr from, to;
    size_t len;
    unsigned char data[DATAGRAM_BYTES];
} wire[WIRE_MAX]; /* what is under way in memory */
static size_t wire_len;

static void wire_deliver(void)
{
    static struct datagram d;
    while (wire_len > 0) {
        d = wire[0];
        memmove(wire, wire + 1, --wire_len * sizeof *wire);
        dtls_endpoint *to = d.to.port == client.target.peer.port ? server.ep : client.ep;
        dtls_endpoint_input(to, d.data, d.len, &d.from, &d.to);
    }
}

/* Turns the loop until it is done or so much time has passed. Time passes only when nothing else is left to do. */
static bool wait_for(bool (*done)(void), int limit_ms)
{
    int64_t until = now_us + limit_ms * (int64_t)1000;
    for (int turns = 0; !done() && now_us < until; turns++) {
        struct pollfd p = {.fd = dtls_loop_fd(loop), .events = POLLIN};
        if (wire_len == 0 && poll(&p, 1, 0) == 0) {
            int ms = dtls_loop_timeout(loop);
            int64_t next = ms < 0 ? until : now_us + ms * (int64_t)1000;
            if (next > now_us)
                turns = 0;
            now_us = next < until ? next : until;
        }
        if (turns > SPIN_MAX)
            broken("the loop spins");
        wire_deliver();
        int r = dtls_loop_poll(loop, 0);
        if (r < 0)
            refused_code("dtls_loop_poll", r);
    }
    return done();
}

static void on_log(void *user, dtls_log level, const char *line)
{
    (void)user, (void)level;
    check_line(line);
}

/* ---- messages ---- */

static unsigned char pattern(uint32_t number, size_t i)
{
    return (unsigned char)(number * 7 + i * 3);
}

static uint32_t message_check(const unsigned char *data, size_t len)
{
    uint32_t number = 0;
    if (len >= sizeof number)
        memcpy(&number, data, sizeof number);
    if (number < 1 || number > client.sent || len != lengths[number])
        broken("a message that nobody sent");
    for (size_t i = sizeof number; i < len; i++)
        if (data[i] != pattern(number, i))
            broken("a message was changed");
    return number;
}

static void server_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    dtls_info info;
    dtls_conn_info(conn, &info);
    if (event == DTLS_EV_CONNECTED && strcmp(info.peer_name, "client") != 0)
        broken("the server takes its client for \"%s\"", info.peer_name);
    if (event == DTLS_EV_MESSAGE) {
        message_check(data, len);
        congested = congested_server;
        int r = dtls_conn_send(conn, data, len);
        if (r < 0)
            refused_code("dtls_conn_send", r);
    }
    if (event == DTLS_EV_CLOSED)
        check_line(dtls_conn_reason_text(conn));
}

static void client_message(const unsigned char *data, size_t len)
{
    uint32_t number = message_check(data, len);
    if (seen[number])
        broken("message %u came twice", number);
    seen[number] = true;
    client.echoed = number;
}

static void client_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    if (!dtls_conn_user(conn)) /* one of the crowd */
        return;
    switch (event) {
    case DTLS_EV_CONNECTED:
        client.settled = client.connected = true;
        break;
    case DTLS_EV_RENEWED:
        client.renewed = true;
        break;
    case DTLS_EV_WRITABLE:
    case DTLS_EV_FAILED:
        break;
    case DTLS_EV_MESSAGE:
        client_message(data, len);
        break;
    case DTLS_EV_IDLE:
        client.idle = true;
        break;
    case DTLS_EV_CLOSED:
        client.settled = true;
        client.connected = false;
        client.conn = NULL;
        client.reason = dtls_conn_reason(conn);
        check_line(dtls_conn_reason_text(conn));
        snprintf(client.reason_text, sizeof client.reason_text, "%s", dtls_conn_reason_text(conn));
        break;
    }
}

/* ---- steps, each repeated until it works ---- */

static void loop_begin(void)
{
    while (!(loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now})))
        refused_code("dtls_loop_new", DTLS_ERR_MEMORY);
}

struct files {
    char cert[TEXT_BYTES], key[TEXT_BYTES], ca[TEXT_BYTES];
};

static void files(struct files *f, const char *name)
{
    snprintf(f->cert, sizeof f->cert, "%s/%s.pem", certs, name);
    snprintf(f->key, sizeof f->key, "%s/%s.key", certs, name);
    snprintf(f->ca, sizeof f->ca, "%s/ca.pem", certs);
}

static dtls_endpoint *endpoint_try(const char *name, dtls_config cfg)
{
    struct files f;
    dtls_error err = {0};
    files(&f, name);
    cfg.on_log = on_log;
    cfg.idle_ms = IDLE_MS;
    cfg.idle_timeout_ms = cfg.send ? SETTLE_MS : GONE_MS; /* a lossy link is silent for long */
    cfg.cookie_ms = COOKIE_MS;
    if (!cfg.on_ssl_ctx && !cfg.psk_identity) {
        cfg.cert_file = f.cert;
        cfg.key_file = f.key;
        cfg.ca_file = f.ca;
    }
    dtls_endpoint *ep = dtls_endpoint_new(loop, &cfg, &err);
    if (!ep)
        refused("dtls_endpoint_new", &err);
    return ep;
}

static dtls_endpoint *endpoint(const char *name, dtls_config cfg)
{
    dtls_endpoint *ep;
    while (!(ep = endpoint_try(name, cfg)))
        ;
    return ep;
}

static dtls_addr listening(const char *text)
{
    dtls_addr addr;
    dtls_error err = {0};
    dtls_addr_parse(&addr, text, NULL);
    while (dtls_endpoint_listen(server.ep, &addr, &err) < 0)
        refused("dtls_endpoint_listen", &err);
    return addr;
}

static void connect_once(void)
{
    dtls_error err = {0};
    client.settled = client.connected = client.idle = false;
    client.target.user = &client;
    while (!(client.conn = dtls_endpoint_connect(client.ep, &client.target, &err)))
        refused("dtls_endpoint_connect", &err);
    if (!wait_for(done_settled, SETTLE_MS))
        broken("a handshake without an end");
}

static void connected(void)
{
    for (connect_once(); !client.connected; connect_once()) {
        outcome->reported = true;
        excuse("a connection ended", client.reason_text);
    }
}

/* A fault cost a message, and perhaps the connection. */
static void lost(const char *what)
{
    excuse(what, client.conn ? "lost" : client.reason_text);
    if (!client.conn)
        connected();
}

static int message_send(size_t len)
{
    static unsigned char buf[DTLS_MESSAGE_MAX];
    uint32_t number = ++client.sent;
    if (number > MESSAGES_MAX)
        broken("no message gets through");
    lengths[number] = len;
    memcpy(buf, &number, sizeof number);
    for (size_t i = sizeof number; i < len; i++)
        buf[i] = pattern(number, i);
    return client.conn ? dtls_conn_send(client.conn, buf, len) : DTLS_ERR_STATE;
}

static void talk(size_t len)
{
    for (;;) {
        int r = message_send(len);
        if (r == 0 && wait_for(done_echoed, ANSWER_MS))
            return;
        if (r < 0)
            refused_code("dtls_conn_send", r);
        lost("a message");
    }
}

static void check_info(bool resumed)
{
    dtls_info info;
    dtls_counters n;
    dtls_conn_info(client.conn, &info);
    dtls_endpoint_counters(client.ep, &n);
    if (!info.connected || info.server || !*info.cipher || strcmp(info.peer_name, "server") != 0 || n.conns != 1 ||
        !dtls_conn_payload_max(client.conn))
        broken("an open connection that does not know itself");
    if (!!info.resumed != resumed)
        excuse("a handshake", "not resumed as it should be");
}

static void close_all(void)
{
    if (client.conn)
        dtls_conn_close(client.conn);
    if (client.conn || !wait_for(done_empty, SETTLE_MS))
        broken("connections are left after their end");
}

/* After all that the fault did: others get in as if nothing had happened. */
static void probe(void)
{
    client.target.session = NULL;
    connect_once();
    if (!client.connected)
        broken("nobody gets in afterwards: %s", client.reason_text);
    if (message_send(sizeof client.sent) != 0 || !wait_for(done_echoed, ANSWER_MS))
        broken("no message gets through afterwards");
    close_all();
}

/* ---- scenarios ---- */

/* Timers, watches, posts and signals, and nothing of OpenSSL. */
static int called;

static void on_timer(void *user)
{
    (void)user;
    called++;
}

static void on_watch(void *user, int fd, unsigned events)
{
    char c;
    (void)user;
    if (events & DTLS_READ && __real_read(fd, &c, 1) == 1)
        called++;
}

static void on_post(void *arg)
{
    called++;
    if (arg)
        dtls_loop_stop(loop);
}

static void on_signal(void *user, int signo)
{
    (void)user;
    called += signo == SIGUSR1;
}

static bool done_called(void)
{
    return called == 0;
}

/* So many callbacks are due. */
static void expect(int n, const char *what)
{
    called -= n;
    if (!wait_for(done_called, ANSWER_MS))
        broken("%s: %d calls are missing", what, -called);
}

static void loop_timers(void)
{
    dtls_timer *timers[TIMERS];
    for (int i = 0; i < TIMERS; i++) {
        while (!(timers[i] = dtls_timer_new(loop, on_timer, NULL)))
            refused_code("dtls_timer_new", DTLS_ERR_MEMORY);
        dtls_timer_set(timers[i], TIMERS - i);
    }
    expect(TIMERS, "timers");
    for (int i = 0; i < TIMERS; i += 2) /* the rest is left to dtls_loop_free() */
        dtls_timer_free(timers[i]);
}

static void loop_watch(void)
{
    int ends[2], r;
    dtls_watch *watch;
    if (pipe(ends) != 0)
        broken("pipe: %s", strerror(errno));
    while (!(watch = dtls_watch_new(loop, ends[0], DTLS_WRITE, on_watch, NULL)))
        refused_code("dtls_watch_new", DTLS_ERR_SYSTEM);
    while ((r = dtls_watch_set(watch, DTLS_READ)) < 0)
        refused_code("dtls_watch_set", r);
    if (__real_write(ends[1], "x", 1) != 1)
        broken("write: %s", strerror(errno));
    expect(1, "watch");
    dtls_watch_free(watch);
    __real_close(ends[0]);
    __real_close(ends[1]);
}

static void loop_post(void *stop)
{
    int r;
    while ((r = dtls_loop_post(loop, on_post, stop)) < 0)
        refused_code("dtls_loop_post", r);
}

static void loop_signal(void)
{
    int r;
    while ((r = dtls_loop_signal(loop, SIGUSR1, on_signal, NULL)) < 0)
        refused_code("dtls_loop_signal", r);
    while ((r = dtls_loop_signal(loop, SIGUSR2, on_signal, NULL)) < 0) /* left to dtls_loop_free() */
        refused_code("dtls_loop_signal", r);
    raise(SIGUSR1);
    expect(1, "signal");
    while ((r = dtls_loop_signal(loop, SIGUSR1, NULL, NULL)) < 0)
        refused_code("dtls_loop_signal", r);
}

static void check_mask(void)
{
    sigset_t set;
    __real_sigprocmask(SIG_BLOCK, NULL, &set);
    if ((sigismember(&set, SIGUSR1) || sigismember(&set, SIGUSR2)) && fault.call != SIGPROCMASK)
        broken("a signal stays blocked");
}

static void scenario_loop(void)
{
    int r;
    called = 0;
    loop_begin();
    loop_timers();
    loop_watch();
    loop_post(NULL);
    expect(1, "post");
    loop_signal();
    loop_post(loop);
    while ((r = dtls_loop_run(loop)) < 0) {
        refused_code("dtls_loop_run", r);
        if (called)
            break; /* it ran to its end in that turn */
    }
    expect(1, "run");
    loop_post(NULL); /* never called: the loop ends */
    dtls_loop_free(loop);
    check_mask();
}

/* A client and a server over UDP on the loopback interface. */

static bool have_ipv6(void)
{
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    int fd = __real_socket(AF_INET6, SOCK_DGRAM, 0);
    bool have = fd >= 0 && __real_bind(fd, (struct sockaddr *)&any, sizeof any) == 0;
    if (fd >= 0)
        __real_close(fd);
    return have;
}

/* A port where nobody listens. */
static uint16_t free_port(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof a;
    int fd = __real_socket(AF_INET, SOCK_DGRAM, 0);
    if (fd < 0 || __real_bind(fd, (struct sockaddr *)&a, len) != 0 ||
        __real_getsockname(fd, (struct sockaddr *)&a, &len) != 0)
        broken("no free port: %s", strerror(errno));
    __real_close(fd);
    return ntohs(a.sin_port);
}

/* "[::]:0" is open for both families, or for IPv4 alone if a fault made IPv6 look absent. */
static void connected_to_wildcard(uint16_t port)
{
    client.target.peer = (dtls_addr){.family = 4, .ip = {127, 0, 0, 1}, .port = port};
    if (have_ipv6()) {
        client.target.peer = (dtls_addr){.family = 6, .ip = {[15] = 1}, .port = port};
        connect_once();
        if (client.connected)
            return;
        excuse("no connection over IPv6", client.reason_text);
        client.target.peer = (dtls_addr){.family = 4, .ip = {127, 0, 0, 1}, .port = port};
    }
    connected();
}

static void idle(void)
{
    while (!wait_for(done_idle, 2 * IDLE_MS))
        lost("an idle event");
}

static void refused_by_nobody(void)
{
    client.target.peer.port = free_port();
    for (connect_once(); client.reason != DTLS_CLOSE_REFUSED; connect_once()) {
        if (client.connected)
            broken("connected to nobody");
        excuse("connecting to nobody", client.reason_text);
    }
}

static void sockets_begin(void)
{
    loop_begin();
    server.ep = endpoint("server", (dtls_config){.on_event = server_event});
    armed = false; /* it is made the same way */
    client.ep = endpoint("client", (dtls_config){.on_event = client_event});
    armed = true;
    client.target = (dtls_target){.name = "localhost"};
}

static void scenario_sockets(void)
{
    sockets_begin();
    dtls_addr one = listening("127.0.0.1:0"), all = listening("[::]:0");
    client.target.peer = one;
    connected();
    talk(64);
    talk(DTLS_MESSAGE_MAX);
    check_info(false);
    SSL_SESSION *session = dtls_conn_session(client.conn);
    close_all();

    client.target.session = session;
    connected_to_wildcard(all.port);
    check_info(session != NULL);
    congested = congested_server = true;
    talk(64);
    congested_server = false;
    idle();
    close_all();

    client.target.session = NULL;
    SSL_SESSION_free(session);
    client.target.peer = (dtls_addr){.family = 4, .ip = {127, 0, 0, 1}};
    refused_by_nobody();
    if (outcome->fired) {
        client.target.peer = one;
        probe();
    }
    dtls_loop_free(loop);
}

/* Through memory, where datagrams are lost and damaged. */

static bool lossy, cut, damage;

static int on_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    static const unsigned char none[16];
    const unsigned char *p = data;
    (void)user;
    if (due(TRANSPORT) || wire_len == WIRE_MAX || len > DATAGRAM_BYTES)
        return -1;
    if (p[0] == 22 && p[13] == 3 && memcmp(p + len - sizeof none, none, sizeof none) == 0)
        broken("a cookie that anybody can guess");
    if (cut || (lossy && next_random(&chance_state) % 5 < LOST_OF_5))
        return 0;
    wire[wire_len] = (struct datagram){.from = *from, .to = *to, .len = len};
    memcpy(wire[wire_len].data, data, len);
    if (damage && to->port != client.target.peer.port && len > DAMAGED_BYTES) {
        damage = false;
        wire[wire_len].data[len - 1] ^= 1;
    }
    wire_len++;
    return 0;
}

/* As on_ssl_ctx(), but not without the CA. */
static int on_ssl_ctx_checked(void *user, SSL_CTX *ctx)
{
    return on_ssl_ctx(user, ctx) || sk_X509_OBJECT_num(X509_STORE_get0_objects(SSL_CTX_get_cert_store(ctx))) != 1;
}

static dtls_config memory_config(struct identity *id)
{
    return (dtls_config){.on_ssl_ctx = on_ssl_ctx_checked,
                         .send = on_send,
                         .user = id,
                         .on_event = id == &server_id ? server_event : client_event};
}

static void memory_begin(void)
{
    loop_begin();
    server.ep = endpoint("server", memory_config(&server_id));
    client.ep = endpoint("client", memory_config(&client_id));
    listening("192.0.2.1:4444");
    client.target = (dtls_target){.name = "localhost"};
    dtls_addr_parse(&client.target.peer, "192.0.2.1:4444", NULL);
    dtls_addr_parse(&client.target.local, "192.0.2.2:5555", NULL);
}

static void talk_lossy(void)
{
    while (message_send(sizeof client.sent) != 0 || !wait_for(done_echoed, ANSWER_MS))
        if (!client.conn)
            lost("a message");
}

/* Many at once, to nobody: tables and heaps grow. */
static void crowd(void)
{
    dtls_target t = client.target;
    dtls_error err = {0};
    t.user = NULL;
    cut = true;
    for (int i = 0; i < CROWD; i++) {
        t.local.port++;
        armed = i >= CROWD_ARMED;
        while (!dtls_endpoint_connect(client.ep, &t, &err))
            refused("dtls_endpoint_connect", &err);
    }
    dtls_endpoint_free(client.ep);
    cut = false;
}

static void scenario_memory(void)
{
    chance_state = 1;
    memory_begin();
    lossy = damage = true;
    connected();
    talk_lossy();
    lossy = damage = false;
    close_all();
    if (outcome->fired)
        probe();
    dtls_loop_free(loop);
}

static void scenario_crowd(void)
{
    armed = false;
    memory_begin();
    crowd();
    client.ep = endpoint("client", memory_config(&client_id));
    if (outcome->fired)
        probe();
    dtls_loop_free(loop);
}

/* The same as in a program that just started. What OpenSSL sets up once it never tries again, so there is no second try
 * here: all that counts is that it ends well. */
static void scenario_first(void)
{
    dtls_error err = {0};
    loop_begin();
    server.ep = endpoint_try("server", (dtls_config){.on_event = server_event});
    client.ep = server.ep ? endpoint_try("client", (dtls_config){.on_event = client_event}) : NULL;
    if (client.ep) {
        client.target = (dtls_target){.peer = listening("127.0.0.1:0"), .name = "localhost", .user = &client};
        client.conn = dtls_endpoint_connect(client.ep, &client.target, &err);
        if (!client.conn)
            refused("dtls_endpoint_connect", &err);
        else if (!wait_for(done_settled, SETTLE_MS))
            broken("a handshake without an end");
        else if (!client.connected)
            excuse("a connection ended", client.reason_text);
    }
    dtls_loop_free(loop);
}

/* A host's addresses, the first of which is nobody's; then the connection is renewed, through sockets. */
static void scenario_host(void)
{
    char host[TEXT_BYTES];
    sockets_begin();
    dtls_addr addr = listening("127.0.0.1:0");
    snprintf(host, sizeof host, "localhost:%u", addr.port);
    client.target = (dtls_target){.host = host};
    connected();
    talk(64);
    for (client.renewed = false; !client.renewed;) {
        int r = client.conn ? dtls_conn_renew(client.conn) : DTLS_ERR_STATE;
        if (r < 0)
            refused_code("dtls_conn_renew", r);
        else if (wait_for(done_renewed, SETTLE_MS) && client.renewed)
            break;
        lost("a renewal");
    }
    talk(64);
    close_all();
    client.target = (dtls_target){.peer = addr, .name = "localhost"};
    if (outcome->fired)
        probe();
    dtls_loop_free(loop);
}

/* A client with a pre-shared key; then the server reloads, and the client resumes nothing. */
static const uint8_t shared_key[16] = "sixteen letters";

static size_t find_key(void *user, const char *identity, uint8_t key[DTLS_PSK_MAX])
{
    (void)user;
    if (strcmp(identity, "client") != 0)
        return 0;
    memcpy(key, shared_key, sizeof shared_key);
    return sizeof shared_key;
}

static int welcome(void *user, const dtls_info *info, char *reason, size_t size)
{
    (void)user, (void)reason, (void)size;
    return strcmp(info->peer_name, "client") != 0;
}

static void reload(void)
{
    struct files f;
    files(&f, "server");
    const dtls_cert more = {.cert_file = f.cert, .key_file = f.key};
    dtls_config cfg = {
        .cert_file = f.cert, .key_file = f.key, .ca_file = f.ca, .psk = find_key, .certs = &more, .certs_len = 1};
    dtls_error err = {0};
    while (dtls_endpoint_reload(server.ep, &cfg, &err) < 0)
        refused("dtls_endpoint_reload", &err);
}

static void scenario_trust(void)
{
    loop_begin();
    server.ep = endpoint("server", (dtls_config){.on_event = server_event, .psk = find_key, .on_peer = welcome});
    client.ep = endpoint("client", (dtls_config){.on_event = client_event,
                                                 .psk_identity = "client",
                                                 .psk_key = shared_key,
                                                 .psk_key_len = sizeof shared_key});
    client.target = (dtls_target){.peer = listening("127.0.0.1:0"), .name = "localhost"};
    connected();
    talk(64);
    reload();
    talk(64);
    dtls_endpoint_recheck(server.ep);
    SSL_SESSION *session = dtls_conn_session(client.conn);
    close_all();
    client.target.session = session;
    connected();
    talk(64);
    close_all();
    client.target.session = NULL;
    SSL_SESSION_free(session);
    if (outcome->fired)
        probe();
    dtls_loop_free(loop);
}

/* A client goes on from other ports, first with connection IDs, then without: the server looks for its key. */
static void moves_with(int cid_bytes)
{
    server.ep = endpoint("server", (dtls_config){.on_event = server_event, .cid_bytes = cid_bytes});
    client.ep = endpoint("client", (dtls_config){.on_event = client_event, .cid_bytes = cid_bytes == 0 ? 4 : 0});
    client.target = (dtls_target){.peer = listening("127.0.0.1:0"), .name = "localhost"};
    connected();
    talk(64);
    for (int moves = 0; moves < 3; moves++) {
        int r = client.conn ? dtls_conn_rebind(client.conn) : DTLS_ERR_STATE;
        if (r < 0)
            refused_code("dtls_conn_rebind", r);
        if (!client.conn)
            lost("a move");
        talk_lossy();
    }
    close_all();
    if (outcome->fired)
        probe();
    dtls_endpoint_free(client.ep);
    dtls_endpoint_free(server.ep);
}

static void scenario_moves(void)
{
    loop_begin();
    moves_with(0);
    moves_with(DTLS_NEVER);
    dtls_loop_free(loop);
}

static const struct scenario {
    const char *name;
    void (*run)(void);
    bool cold; /* from before OpenSSL's first use */
} scenarios[] = {{"loop", scenario_loop, false},     {"sockets", scenario_sockets, false},
                 {"memory", scenario_memory, false}, {"crowd", scenario_crowd, false},
                 {"host", scenario_host, false},     {"trust", scenario_trust, false},
                 {"moves", scenario_moves, false},   {"first", scenario_first, true}};
enum { SCENARIOS = sizeof scenarios / sizeof *scenarios };

/* ---- runs ---- */

static void run(const struct scenario *s, const struct fault *f)
{
    sigset_t none;
    sigemptyset(&none);
    __real_sigprocmask(SIG_SETMASK, &none, NULL);
    fault = *f;
    reports = 0;
    now_us = 1000000;
    chance_state = 1;
    memset(&client, 0, sizeof client);
    memset(seen, 0, sizeof seen);
    armed = true;
    s->run();
    armed = false;
    ERR_clear_error();
    if (held_ours || held_descriptors)
        broken("%ld allocations of dtls.c and %ld descriptors are left", held_ours, held_descriptors);
}

/* What OpenSSL looks up once for a process it must have found before, or a fault then hurts for good. */
static void warm_up(void)
{
    random_begin();
    virtual_identities();
    for (int i = 0; i < SCENARIOS; i++)
        if (!scenarios[i].cold)
            run(&scenarios[i], &(struct fault){0});
}

/* What OpenSSL makes of a failed allocation, and no use of it avoids. */
static const struct known {
    const char *site, *reason;  /* the file that asked for memory; a part of what went wrong */
    unsigned long from, before; /* versions, 0x300: 3.0 */
    const char *why;
    const char *frame;    /* in the sanitizer's report of a crash; NULL: whatever that says */
    const char *scenario; /* NULL: any */
} known[] = {
    {"crypto/", "it crashes", 0x300, 0x301,
     "a library context that could not be set up at OpenSSL's first use is used all the same: RAND_bytes(), the first "
     "call that needs it, reads a lock that is not there",
     NULL, "first"},
    {"crypto/core_namemap.c", "", 0x300, 0x301,
     "namemap_name2num_n() takes no memory for no such name, so that the name gets a second number, for the whole "
     "process, and what has the first one is not found any more",
     NULL, NULL},
    {"crypto/bn/bn_ctx.c", "bad certificate", 0x300, 0x301,
     "EC_GROUP_check_named_curve() takes no memory for a curve without a name, which no certificate may have", NULL,
     NULL},
    {"crypto/lhash/lhash.c", "it hangs", 0x300, 0x301,
     "SSL_CTX_add_session() without memory lists a session that it does not own, and SSL_CTX_free() never gets past "
     "it",
     NULL, NULL},
    {"crypto/lhash/lhash.c", "it crashes", 0x300, 0x301, "the same, found out sooner", NULL, NULL},
    {"", "it crashes", 0x302, 0x401,
     "a handshake that fails between the ChangeCipherSpec and its keys has the old keys in its record layer and with "
     "the message sent, and SSL_free() frees them twice: RECORD_LAYER_clear(), dtls1_clear_sent_buffer()",
     " in SSL_free ", NULL},
};
enum { KNOWN = sizeof known / sizeof *known };

static FILE *complaints; /* what runs write to stderr, a sanitizer's report say: shown if it is news */

static bool complaints_have(const char *words)
{
    char line[TEXT_BYTES];
    bool found = false;
    rewind(complaints);
    while (fgets(line, sizeof line, complaints))
        found = found || strstr(line, words);
    return found;
}

static const struct known *known_find(const struct scenario *scenario, const struct outcome *o)
{
    unsigned long version = (unsigned long)OpenSSL_version_num() >> 20;
    for (const struct known *k = known; k < known + KNOWN; k++)
        if (version >= k->from && version < k->before && strstr(o->site, k->site) && strstr(o->reason, k->reason) &&
            (!k->scenario || strcmp(k->scenario, scenario->name) == 0) && (!k->frame || complaints_have(k->frame)))
            return k;
    return NULL;
}

static void block_child(const struct scenario *s, struct fault f, long step, int n)
{
    for (; shared->began < n; f.n += step) {
        outcome = &shared->runs[shared->began++];
        alarm(RUN_S);
        run(s, &f);
        if (!outcome->fired || known_find(s, outcome)) /* the rest of a process is not what it was after those */
            break;
    }
    if (!s->cold)
        virtual_identities_free();
    OPENSSL_cleanup(); /* from OpenSSL 4.0 on that only asks for it, and exit() does it */
    exit(0);
}

static void complaints_show(void)
{
    char line[TEXT_BYTES];
    rewind(complaints);
    while (fgets(line, sizeof line, complaints))
        printf("# %s", line);
}

/* Up to n runs, each step further, in one process. False: the last one went wrong, or one of them left something. */
static bool block(const struct scenario *s, const struct fault *f, long step, int n, long left_always)
{
    int status;
    memset(shared, 0, sizeof *shared);
    fflush(stdout);
    if (ftruncate(fileno(complaints), 0) != 0 || lseek(fileno(complaints), 0, SEEK_SET) != 0) {
        perror("faults: temporary file");
        exit(1);
    }
    pid_t pid = fork();
    if (pid == 0) {
        dup2(fileno(complaints), STDERR_FILENO);
        block_child(s, *f, step, n);
    }
    if (pid < 0 || waitpid(pid, &status, 0) != pid) {
        perror("faults: fork");
        exit(1);
    }
    outcome = &shared->runs[shared->began > 0 ? shared->began - 1 : 0];
    if (WIFSIGNALED(status))
        snprintf(outcome->reason, sizeof outcome->reason, "%s (%s)",
                 WTERMSIG(status) == SIGALRM ? "it hangs" : "it crashes", strsignal(WTERMSIG(status)));
    else if (status != 0 && !*outcome->reason)
        snprintf(outcome->reason, sizeof outcome->reason, "exit status %d", WEXITSTATUS(status));
    /* OpenSSL's own clean-up empties its caches, so that what is left then was lost, but for what it always leaves, and
     * what its set-up loses it loses once. */
    else if (status == 0 && shared->left > left_always && !s->cold)
        snprintf(outcome->reason, sizeof outcome->reason, "OpenSSL has %ld allocations left, of which %ld always",
                 shared->left, left_always);
    else
        return status == 0;
    return false;
}

static struct {
    long runs, reported, recovered, failed, known[KNOWN];
} sum;

static void judge(const struct scenario *s, const struct fault *f, const struct outcome *o)
{
    const struct known *k = *o->reason ? known_find(s, o) : NULL;
    sum.runs += o->fired;
    if (k) {
        sum.known[k - known]++;
    } else if (*o->reason) {
        printf("# faults: %s %s %ld %d%s: %s\n", s->name, kinds[f->call].name, f->n, f->error, o->site, o->reason);
        complaints_show();
        sum.failed++;
    } else if (o->reported) {
        sum.reported++;
    } else {
        sum.recovered += o->fired;
    }
}

static long troubles(void)
{
    long n = sum.failed;
    for (int i = 0; i < KNOWN; i++)
        n += sum.known[i];
    return n;
}

/* The runs of a block that went wrong again, each in a process of its own, to find which it was. */
static void one_by_one(const struct scenario *s, struct fault f, long step, int n, long left_always)
{
    long before = troubles(), first = f.n;
    for (; n > 0; n--, f.n += step) {
        block(s, &f, step, 1, left_always);
        judge(s, &f, outcome);
    }
    if (troubles() == before) {
        printf("# faults: %s %s %ld to %ld, step %ld: wrong together, and none of them alone\n", s->name,
               kinds[f.call].name, first, f.n - step, step);
        sum.failed++;
    }
}

static long part, parts = 1; /* which of all n are for this process */

/* Every n, or every so manieth, until there is none for the fault to hit. */
static void sweep(const struct scenario *s, struct fault f, bool all)
{
    if (!block(s, &(struct fault){0}, 1, 1, LONG_MAX)) {
        judge(s, &(struct fault){0}, outcome);
        return;
    }
    long left_always = shared->left, runs = f.call == OPENSSL ? QUICK_OPENSSL : QUICK_RUNS;
    long step = all || f.call == MALLOC ? parts : outcome->uses[f.call] / runs + 1;
    bool fired = outcome->uses[f.call] > part;
    for (f.n = 1 + part; fired;) {
        bool good = block(s, &f, step, s->cold ? 1 : BLOCK, left_always);
        int n = shared->began;
        fired = !good || outcome->fired;
        if (!good && n > 1)
            one_by_one(s, f, step, n, left_always);
        else
            for (int i = 0; i < n; i++)
                judge(s, &(struct fault){f.call, f.n + i * step, f.error}, &shared->runs[i]);
        f.n += n * step;
    }
}

static void sweep_kind(enum call call, bool cold, bool all)
{
    long failed = sum.failed, runs = sum.runs;
    for (int i = 0; i < SCENARIOS; i++) {
        if (scenarios[i].cold != cold)
            continue;
        for (const int *error = kinds[call].errors; *error; error++)
            sweep(&scenarios[i], (struct fault){.call = call, .error = *error}, all);
    }
    const char *when = cold ? " at OpenSSL's first use" : "";
    if (sum.failed > failed)
        printf("not ok - faults %s%s: %ld of %ld runs failed\n", kinds[call].what, when, sum.failed - failed,
               sum.runs - runs);
    else
        printf("ok - faults %s%s (%ld)\n", kinds[call].what, when, sum.runs - runs);
}

static void report(void)
{
    printf("# faults: %ld faults: %ld ended in a clean error, %ld were got over without one, %ld failed\n", sum.runs,
           sum.reported, sum.recovered, sum.failed);
    for (int i = 0; i < KNOWN; i++)
        if (sum.known[i])
            printf("# faults: %ld met what %s does: %s\n", sum.known[i], OpenSSL_version(OPENSSL_VERSION),
                   known[i].why);
}

static int run_many(bool all)
{
    if (all)
        sweep_kind(OPENSSL, true, true);
    warm_up();
    for (int call = 0; call < CALLS; call++)
        sweep_kind((enum call)call, false, all);
    virtual_identities_free();
    report();
    return sum.failed != 0;
}

static int run_one(int argc, char **argv)
{
    int s = 0, call = 0;
    while (s < SCENARIOS && strcmp(scenarios[s].name, argv[0]) != 0)
        s++;
    while (call < CALLS && strcmp(kinds[call].name, argv[1]) != 0)
        call++;
    if (s == SCENARIOS || call == CALLS)
        return 2;
    struct fault f = {(enum call)call, atol(argv[2]), argc > 3 ? atoi(argv[3]) : kinds[call].errors[0]};
    if (!scenarios[s].cold)
        warm_up();
    if (!block(&scenarios[s], &(struct fault){0}, 1, 1, LONG_MAX)) {
        judge(&scenarios[s], &(struct fault){0}, outcome);
        return 1;
    }
    printf("# faults: %s has %ld of %s\n", argv[0], outcome->uses[call], argv[1]);
    block(&scenarios[s], &f, 1, 1, shared->left);
    judge(&scenarios[s], &f, outcome);
    report();
    return sum.failed != 0;
}

int main(int argc, char **argv)
{
    bool all = argc == 5 && strcmp(argv[2], "all") == 0, many = all || (argc == 3 && strcmp(argv[2], "quick") == 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    outcome = shared->runs;
    complaints = tmpfile();
    if (shared == MAP_FAILED || !complaints || (!many && (argc < 5 || argc > 6)) ||
        !CRYPTO_set_mem_functions(openssl_malloc, openssl_realloc, openssl_free))
        return 2;
    certs = argv[1];
    part = all ? atol(argv[3]) : 0;
    parts = all ? atol(argv[4]) : 1;
    return many ? run_many(all) : run_one(argc - 2, argv + 2);
}
