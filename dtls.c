/* dtls.c - DTLS 1.2 over UDP in one C file, on OpenSSL. dtls.h is its manual.
 *
 * Copyright (c) 2026 the dtls.c authors
 *
 * Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
 * documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
 * rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
 * permit persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright
 * notice and this permission notice shall be included in all copies or substantial portions of the Software.
 *
 * THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
 * WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
 * COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
 * OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
 *
 *
 * The parts, from top to bottom. Each one calls only itself and what stands above it; tests/structure.py proves that.
 * Where something has to reach upward (a datagram that arrived, the end of a turn), the upper part is the one below in
 * this file, and it has left a pointer.
 *
 *    1  platform     includes, and what differs between systems but for the event backends
 *    2  base         errors, addresses, a keyed hash and a table
 *    3  loop         objects and when they are freed, timers, jobs, descriptors, signals, posts, one turn
 *    4  datagrams    UDP sockets: batches in and out, local addresses, the send queue; knows no DTLS
 *    5  wire         records, the guard in front of libssl, record keys and connection IDs, flights, the BIO
 *    6  peers        the structs of all below; where peers come from, whom their certificates name, sessions, the log
 *    7  connection   associations and connections: how they are found, deadlines, jobs, moves, their end, the name
 *    8  traffic      an open connection: its deadlines, reading, sending, where its peer is, what one can ask of it
 *    9  handshake    its states and their transitions, its deadlines, new starts; it ends by opening the connection
 *   10  context      configuration, certificates, versions, ciphers, sessions
 *   11  endpoint     cookies, ClientHellos, peers at new addresses, listening, connecting
 *   12  program      with -DDTLS_MAIN: options, server, client
 *
 * A datagram's way in:  udp_readable, then ep_listening_input (which association, or the cookie exchange) or
 * assoc_own_input (a client's own socket), then hs_input or traffic_input (the guard), bio_read, libssl, on_event. And out:
 * dtls_conn_send, libssl, bio_write, wire_send, assoc_send, udp_send, and one flush at the end of the turn. What has a
 * connection ID is opened before libssl, which knows none, and translated behind it (part 5).
 */

/* ==== 1. platform ================================================================================================= */

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* recvmmsg, struct in6_pktinfo */
#elif defined(__APPLE__)
#define _DARWIN_C_SOURCE
#define __APPLE_USE_RFC_3542 /* IPV6_RECVPKTINFO */
#elif defined(__NetBSD__)
#define _NETBSD_SOURCE
#endif

#include "dtls.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <openssl/bio.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/kdf.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>
#include <openssl/x509v3.h>
#if OPENSSL_VERSION_NUMBER >= 0x30000000L
#include <openssl/store.h>
#include <openssl/ui.h>
#endif

#if defined(__linux__) && !defined(DTLS_USE_KQUEUE)
#define BACKEND "epoll"
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#elif defined(DTLS_USE_KQUEUE) || defined(__APPLE__) || defined(__FreeBSD__) || defined(__NetBSD__) ||                 \
    defined(__OpenBSD__) || defined(__DragonFly__)
#define BACKEND "kqueue"
#ifndef DTLS_USE_KQUEUE
#define DTLS_USE_KQUEUE
#endif
#include <sys/event.h>
#include <sys/stat.h>
#else
#error "dtls.c needs epoll (Linux) or kqueue (macOS, the BSDs)"
#endif

#if defined(LIBRESSL_VERSION_NUMBER) || defined(OPENSSL_IS_BORINGSSL) || OPENSSL_VERSION_NUMBER < 0x10101000L
#error "dtls.c needs OpenSSL, 1.1.1 or later; LibreSSL and BoringSSL lack calls that it makes"
#elif OPENSSL_VERSION_NUMBER < 0x30000000L
#define SSL_get1_peer_certificate SSL_get_peer_certificate
#endif
#if OPENSSL_VERSION_NUMBER < 0x30300000L
#define SSL_SESSION_get_time_ex SSL_SESSION_get_time
#endif
#if OPENSSL_VERSION_NUMBER < 0x40000000L /* the store's own list; later one has to take a copy */
#define store_objects X509_STORE_get0_objects
#define store_objects_free(list) ((void)(list))
#else
#define store_objects X509_STORE_get1_objects
#define store_objects_free(list) sk_X509_OBJECT_pop_free(list, X509_OBJECT_free)
#endif

static int64_t clock_monotonic_us(void *user)
{
    struct timespec ts;
    (void)user;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static int64_t us(int ms)
{
    return ms * (int64_t)1000;
}

/* Where the system can, in one step: between two another thread might start a program, which would inherit it. */
static int fd_socket(int family)
{
#ifdef SOCK_CLOEXEC
    return socket(family, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
#else
    int fd = socket(family, SOCK_DGRAM, 0), flags = fd < 0 ? -1 : fcntl(fd, F_GETFL);
    if (fd < 0 || (flags >= 0 && fcntl(fd, F_SETFL, flags | O_NONBLOCK) == 0 && fcntl(fd, F_SETFD, FD_CLOEXEC) == 0))
        return fd;
    close(fd);
    return -1;
#endif
}

static int fd_pipe(int fd[2])
{
#ifdef __APPLE__
    return pipe(fd) < 0 || fcntl(fd[0], F_SETFD, FD_CLOEXEC) < 0 || fcntl(fd[1], F_SETFD, FD_CLOEXEC) < 0 ? -1 : 0;
#else
    return pipe2(fd, O_CLOEXEC);
#endif
}

/* Anybody can forge the ICMP message that says a path takes only small datagrams. Linux would believe it, and split what
 * we send; so it is told to leave the path's MTU alone. Elsewhere UDP does that anyway. */
static void fd_ignore_path_mtu(int fd, bool four)
{
#ifdef IP_PMTUDISC_OMIT
    int omit = four ? IP_PMTUDISC_OMIT : IPV6_PMTUDISC_OMIT;
    setsockopt(fd, four ? IPPROTO_IP : IPPROTO_IPV6, four ? IP_MTU_DISCOVER : IPV6_MTU_DISCOVER, &omit, sizeof omit);
#else
    (void)fd, (void)four;
#endif
}

/* What the system thinks a connected socket's path carries, headers included; 0: it does not tell. */
static int fd_path_mtu(int fd, bool four)
{
    int mtu = 0;
#if defined(IP_MTU) && defined(IPV6_MTU)
    socklen_t len = sizeof mtu;
    if (getsockopt(fd, four ? IPPROTO_IP : IPPROTO_IPV6, four ? IP_MTU : IPV6_MTU, &mtu, &len) < 0)
        return 0;
#else
    (void)fd, (void)four;
#endif
    return mtu;
}

/* UDP: how a wildcard socket tells and chooses its local IPv4 address. */
#ifndef IP_SENDSRCADDR

#define LOCAL4_RECV IP_PKTINFO /* the option that asks for it */
#define LOCAL4_TYPE IP_PKTINFO /* the message that brings it */
#define LOCAL4_SEND IP_PKTINFO /* the message that chooses it */
typedef struct in_pktinfo local4;

static void local4_put(local4 *info, const uint8_t ip[4])
{
    memset(info, 0, sizeof *info);
    memcpy(&info->ipi_spec_dst, ip, 4);
}

/* False: not one of ours to answer from: multicast, broadcast. */
static bool local4_get(const local4 *info, uint8_t ip[4])
{
    memcpy(ip, &info->ipi_addr, 4);
#ifndef DTLS_USE_KQUEUE /* macOS does not fill it in */
    if (memcmp(&info->ipi_spec_dst, ip, 4) != 0)
        return false;
#endif
    return ip[0] < 0xe0;
}

#else

#define LOCAL4_RECV IP_RECVDSTADDR
#define LOCAL4_TYPE IP_RECVDSTADDR
#define LOCAL4_SEND IP_SENDSRCADDR
typedef struct in_addr local4;

static void local4_put(local4 *info, const uint8_t ip[4])
{
    memcpy(info, ip, 4);
}

static bool local4_get(const local4 *info, uint8_t ip[4])
{
    memcpy(ip, info, 4);
    return ip[0] < 0xe0; /* a network's own broadcast address does not show */
}

#endif

#ifndef DTLS_USE_KQUEUE

typedef struct mmsghdr batch_msg;

static int batch_recv(int fd, batch_msg *msgs, unsigned n)
{
    return recvmmsg(fd, msgs, n, 0, NULL);
}

static int batch_send(int fd, batch_msg *msgs, unsigned n)
{
    return sendmmsg(fd, msgs, n, 0);
}

#else

typedef struct {
    struct msghdr msg_hdr;
    unsigned msg_len;
} batch_msg;

static int batch_recv(int fd, batch_msg *msgs, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        ssize_t got = recvmsg(fd, &msgs[i].msg_hdr, 0);
        if (got < 0)
            return i ? (int)i : -1;
        msgs[i].msg_len = (unsigned)got;
    }
    return (int)n;
}

static int batch_send(int fd, batch_msg *msgs, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        if (sendmsg(fd, &msgs[i].msg_hdr, 0) < 0)
            return i ? (int)i : -1;
    return (int)n;
}

#endif

/* ==== 2. base ===================================================================================================== */

/* Errors. */

#ifdef __GNUC__
#define PRINTF_LIKE(text, first) __attribute__((format(printf, text, first)))
#define APART __attribute__((noinline)) /* a large buffer that its caller most often does without */
#else
#define PRINTF_LIKE(text, first)
#define APART
#endif

static int fail(dtls_error *err, int code, const char *format, ...) PRINTF_LIKE(3, 4);

static int fail(dtls_error *err, int code, const char *format, ...)
{
    if (err) {
        va_list args;
        va_start(args, format);
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
        for (char *p = err->text; *p; p++) /* what it quotes may hold anything: one line stays one line */
            if ((unsigned char)*p < 0x20 || *p == 0x7f)
                *p = '?';
        err->code = code;
    }
    return code;
}

/* All connections of a thread share OpenSSL's error queue: an entry left there turns the next one's WANT_READ into a
 * fatal error. OpenSSL 3.0 takes long to clear an empty queue, so this looks first. */
static void errors_clear(void)
{
    if (ERR_peek_error())
        ERR_clear_error();
}

const char *dtls_version(void)
{
    return DTLS_C_VERSION;
}

const char *dtls_strerror(int code)
{
    static const char *const text[] = {"success",
                                       "bad argument",
                                       "not an address",
                                       "out of memory",
                                       "system error",
                                       "bad certificate",
                                       "OpenSSL refused",
                                       "not possible in this state",
                                       "message empty or too long",
                                       "send queue full",
                                       "limit reached"};
    return code > 0 || code < DTLS_ERR_LIMIT ? "unknown error" : text[-code];
}

/* Addresses. */

enum { ADDR_PACKED = 24 };

static const uint8_t v4_mapped[12] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};

static bool addr_is_wildcard(const dtls_addr *a)
{
    static const uint8_t zero[16];
    return memcmp(a->ip, zero, 16) == 0;
}

static void addr_set_v6(dtls_addr *a, const struct in6_addr *ip, uint32_t scope)
{
    if (memcmp(ip, v4_mapped, 12) == 0) {
        a->family = 4;
        memcpy(a->ip, (const uint8_t *)ip + 12, 4);
        return;
    }
    a->family = 6;
    memcpy(a->ip, ip, 16);
    a->scope = IN6_IS_ADDR_LINKLOCAL(ip) ? scope : 0;
}

int dtls_addr_from_sockaddr(dtls_addr *a, const struct sockaddr *sa, size_t len)
{
    memset(a, 0, sizeof *a);
    if (len >= sizeof(struct sockaddr_in) && sa->sa_family == AF_INET) {
        struct sockaddr_in in;
        memcpy(&in, sa, sizeof in);
        a->family = 4;
        a->port = ntohs(in.sin_port);
        memcpy(a->ip, &in.sin_addr, 4);
        return 0;
    }
    if (len >= sizeof(struct sockaddr_in6) && sa->sa_family == AF_INET6) {
        struct sockaddr_in6 in6;
        memcpy(&in6, sa, sizeof in6);
        a->port = ntohs(in6.sin6_port);
        addr_set_v6(a, &in6.sin6_addr, in6.sin6_scope_id);
        return 0;
    }
    return DTLS_ERR_ADDR;
}

static socklen_t addr_to_sockaddr(const dtls_addr *a, struct sockaddr_storage *ss)
{
    memset(ss, 0, sizeof *ss);
    if (a->family == 4) {
        struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(a->port)};
        memcpy(&in.sin_addr, a->ip, 4);
        memcpy(ss, &in, sizeof in);
        return sizeof in;
    }
    struct sockaddr_in6 in6 = {.sin6_family = AF_INET6, .sin6_port = htons(a->port), .sin6_scope_id = a->scope};
    memcpy(&in6.sin6_addr, a->ip, 16);
    memcpy(ss, &in6, sizeof in6);
    return sizeof in6;
}

size_t dtls_addr_to_sockaddr(const dtls_addr *a, struct sockaddr *sa, size_t size)
{
    struct sockaddr_storage ss;
    socklen_t len = a->family == 4 || a->family == 6 ? addr_to_sockaddr(a, &ss) : 0;
    if (len > size)
        return 0;
    memcpy(sa, &ss, len);
    return len;
}

static int addr_parse_number(const char *text, uint32_t max, uint32_t *value)
{
    size_t digits = strlen(text);
    if (digits == 0 || digits > 10 || strspn(text, "0123456789") != digits || (text[0] == '0' && digits > 1))
        return -1;
    unsigned long long n = strtoull(text, NULL, 10);
    *value = (uint32_t)n;
    return n > max ? -1 : 0;
}

int dtls_addr_parse(dtls_addr *a, const char *text, dtls_error *err)
{
    char host[INET6_ADDRSTRLEN + IF_NAMESIZE + 2];
    bool bracketed = text[0] == '[';
    const char *end = bracketed ? strchr(text, ']') : strrchr(text, ':');
    const char *port = end && bracketed ? end + 1 : end;
    uint32_t number, scope = 0;
    memset(a, 0, sizeof *a);

    if (!bracketed && end && strchr(text, ':') != end)
        return fail(err, DTLS_ERR_ADDR, "%.100s: put an IPv6 address in brackets, as in [::1]:1234", text);
    if (!port || *port != ':')
        return fail(err, DTLS_ERR_ADDR, "%.100s: no port; write ADDRESS:PORT, as in 127.0.0.1:1234 or [::1]:1234",
                    text);
    if (addr_parse_number(port + 1, UINT16_MAX, &number) < 0)
        return fail(err, DTLS_ERR_ADDR, "%.100s: the port must be a number up to 65535", text);
    a->port = (uint16_t)number;

    const char *start = text + bracketed;
    size_t len = (size_t)(end - start);
    if (len >= sizeof host)
        return fail(err, DTLS_ERR_ADDR, "%.100s: not an address", text);
    memcpy(host, start, len);
    host[len] = 0;
    if (!bracketed) {
        a->family = 4;
        if (inet_pton(AF_INET, host, a->ip) == 1)
            return 0;
        return fail(err, DTLS_ERR_ADDR, "%.100s: not an IPv4 address, and names are not looked up here", text);
    }
    struct in6_addr ip;
    char *zone = strchr(host, '%');
    if (zone) {
        *zone++ = 0;
        scope = if_nametoindex(zone);
        if (!scope && (addr_parse_number(zone, UINT32_MAX, &scope) < 0 || !scope)) /* "%2": by its index */
            return fail(err, DTLS_ERR_ADDR, "%.100s: no interface named %s", text, zone);
    }
    if (inet_pton(AF_INET6, host, &ip) != 1)
        return fail(err, DTLS_ERR_ADDR, "%.100s: not an IPv6 address", text);
    addr_set_v6(a, &ip, scope);
    return 0;
}

char *dtls_addr_format(const dtls_addr *a, char *buf, size_t size)
{
    char ip[INET6_ADDRSTRLEN] = "?", zone[IF_NAMESIZE + 1] = "";
    if (a->family == 4) {
        inet_ntop(AF_INET, a->ip, ip, sizeof ip);
        snprintf(buf, size, "%s:%u", ip, (unsigned)a->port);
        return buf;
    }
    inet_ntop(AF_INET6, a->ip, ip, sizeof ip);
    if (a->scope) {
        zone[0] = '%';
        if (!if_indextoname(a->scope, zone + 1))
            snprintf(zone, sizeof zone, "%%%u", (unsigned)a->scope);
    }
    snprintf(buf, size, "[%s%s]:%u", ip, zone, (unsigned)a->port);
    return buf;
}

int dtls_addr_equal(const dtls_addr *a, const dtls_addr *b)
{
    return a->family == b->family && a->port == b->port && a->scope == b->scope && memcmp(a->ip, b->ip, 16) == 0;
}

/* The bytes that are hashed and MACed: the same for the same address on every machine. */
static void addr_pack(const dtls_addr *a, uint8_t out[ADDR_PACKED])
{
    memcpy(out, a->ip, 16);
    for (int i = 0; i < 4; i++)
        out[16 + i] = (uint8_t)(a->scope >> (24 - 8 * i));
    out[20] = (uint8_t)(a->port >> 8);
    out[21] = (uint8_t)a->port;
    out[22] = a->family;
    out[23] = 0;
}

static int64_t earlier(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static char *text_copy(const char *text)
{
    size_t n = strlen(text) + 1;
    char *copy = malloc(n);
    return copy ? memcpy(copy, text, n) : NULL;
}

static uint64_t sip_rotate(uint64_t x, int bits)
{
    return x << bits | x >> (64 - bits);
}

static void sip_round(uint64_t v[4])
{
    v[0] += v[1];
    v[2] += v[3];
    v[1] = sip_rotate(v[1], 13) ^ v[0];
    v[3] = sip_rotate(v[3], 16) ^ v[2];
    v[0] = sip_rotate(v[0], 32);
    v[2] += v[1];
    v[0] += v[3];
    v[1] = sip_rotate(v[1], 17) ^ v[2];
    v[3] = sip_rotate(v[3], 21) ^ v[0];
    v[2] = sip_rotate(v[2], 32);
}

static uint64_t load64(const uint8_t *p, size_t n)
{
    uint64_t x = 0;
    for (size_t i = 0; i < n; i++)
        x |= (uint64_t)p[i] << (8 * i);
    return x;
}

/* SipHash-2-4: peers choose what is hashed, so the hash is keyed or they choose our collisions, too. */
static uint64_t siphash(const uint8_t key[16], const uint8_t *data, size_t len)
{
    uint64_t k0 = load64(key, 8), k1 = load64(key + 8, 8), last = (uint64_t)len << 56;
    uint64_t v[4] = {k0 ^ 0x736f6d6570736575, k1 ^ 0x646f72616e646f6d, k0 ^ 0x6c7967656e657261,
                     k1 ^ 0x7465646279746573};
    for (; len >= 8; data += 8, len -= 8) {
        uint64_t m = load64(data, 8);
        v[3] ^= m;
        sip_round(v);
        sip_round(v);
        v[0] ^= m;
    }
    last |= load64(data, len);
    v[3] ^= last;
    sip_round(v);
    sip_round(v);
    v[0] ^= last;
    v[2] ^= 0xff;
    for (int i = 0; i < 4; i++)
        sip_round(v);
    return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* A hash table. What stands in it has an entry, and the entry knows the hash of its key. The table is as large as it will
 * ever have to be from the start, so that nobody waits while it grows; pages that nobody touched cost nothing. */
struct entry {
    struct entry *next;
    uint64_t hash;
};

struct table {
    struct entry **slots;
    size_t size;
    uint8_t key[16];
};

enum { TABLE_SLOTS_MAX = 1 << 22 };

/* The struct that a member at `p` belongs to. */
#define OWNER_OF(type, member, p) ((type *)(void *)((char *)(p)-offsetof(type, member)))

/* For so many elements, or a few more. False: no memory. The key is still to be filled. */
static bool table_init(struct table *t, size_t elements)
{
    t->size = 64;
    while (t->size < elements && t->size < TABLE_SLOTS_MAX)
        t->size *= 2;
    t->slots = calloc(t->size, sizeof *t->slots);
    return t->slots != NULL;
}

static uint64_t table_hash(const struct table *t, const uint8_t *key, size_t len)
{
    return siphash(t->key, key, len);
}

static struct entry *entry_match(struct entry *e, uint64_t hash)
{
    while (e && e->hash != hash)
        e = e->next;
    return e;
}

static struct entry *table_first(const struct table *t, uint64_t hash)
{
    return entry_match(t->slots[hash & (t->size - 1)], hash);
}

static struct entry *table_next(const struct entry *e)
{
    return entry_match(e->next, e->hash);
}

/* In front of all that have the same hash. */
static void table_add(struct table *t, struct entry *e, uint64_t hash)
{
    struct entry **slot = &t->slots[hash & (t->size - 1)];
    *e = (struct entry){.next = *slot, .hash = hash};
    *slot = e;
}

static void table_remove(struct table *t, const struct entry *e)
{
    struct entry **at = &t->slots[e->hash & (t->size - 1)];
    while (*at != e)
        at = &(*at)->next;
    *at = e->next;
}

/* ==== 3. loop ===================================================================================================== */

enum {
    EVENTS_PER_WAIT = 64,
    SIGNALS_MAX = 16,
    FIRED_MAX = EVENTS_PER_WAIT + SIGNALS_MAX,
    POSTS_MAX = 65536,
    SHARE_US = 500 /* of each turn, for jobs */
};

/* Every object that can end inside a callback starts with this: the end of the turn frees it. */
struct object {
    struct object *prev, *next;
    void (*end)(struct object *object);     /* those that a loop's user made: what dtls_loop_free() calls */
    void (*destroy)(struct object *object); /* at the end of the turn */
};

struct timer {
    int64_t at_us;
    size_t slot; /* place in the heap, from 1; 0: not set */
    void (*fn)(void *user);
    void *user;
};

/* Work that open connections should not wait for, one piece after another. Who has more to do asks for another turn. */
struct job {
    struct job *prev, *next; /* NULL: it does not wait */
    void (*run)(struct job *job);
};

struct dtls_timer {
    struct object object;
    dtls_loop *loop;
    struct timer timer;
    bool dead;
};

struct dtls_watch {
    struct object object;
    dtls_loop *loop;
    int fd;
    unsigned events;
    bool dead;
    void (*fn)(void *user, int fd, unsigned events);
    void *user;
};

struct signal_watch {
    int signo; /* 0: free */
    void (*fn)(void *user, int signo);
    void *user;
};

struct post {
    struct post *next;
    void (*fn)(void *arg);
    void *arg;
};

/* One thing that the system says happened: a descriptor that is watched, or a signal. */
struct fired {
    dtls_watch *watch; /* NULL: a signal */
    unsigned events;
    int signo;
};

struct dtls_loop {
    int64_t (*now_us)(void *user);
    void *clock_user;
    int fd;                   /* epoll or kqueue */
    int wake[2];              /* eventfd twice, or a pipe, or -1 with EVFILT_USER */
    int signal_fd;            /* epoll: one signalfd for all signals, or -1; */
    sigset_t signals_watched; /* those that it reads */
    dtls_watch **by_fd;       /* kqueue: which descriptors are watched, and by whom */
    size_t by_fd_max;
    unsigned depth;
    bool stopping;
    int64_t now; /* when this turn's events came */
    struct object live, dead;
    struct timer **heap; /* from index 1 */
    size_t heap_len, heap_max, timers;
    struct job jobs; /* those that wait, in a ring */
    size_t jobs_len;
    int64_t share_us; /* what is left of this turn's */
    int64_t share_ends;
    bool working; /* a job is running */
    struct signal_watch signals[SIGNALS_MAX];
    _Atomic(struct post *) posts;
    atomic_size_t posts_len;
    unsigned lookups;
    struct io *io;                      /* the datagram part's buffers, and */
    void (*turn_ends)(dtls_loop *loop); /* what it does at the end of each turn; NULL: there are no sockets */
};

static int64_t loop_now(const dtls_loop *l)
{
    return l->now_us(l->clock_user);
}

/* Objects. */

static void list_init(struct object *head)
{
    head->prev = head->next = head;
}

static void list_add(struct object *head, struct object *o)
{
    o->prev = head->prev;
    o->next = head;
    head->prev->next = o;
    head->prev = o;
}

static void list_remove(struct object *o)
{
    o->prev->next = o->next;
    o->next->prev = o->prev;
}
/* Everything that may run a callback or queue a datagram happens between enter and leave; the outermost leave ends the
 * turn. So a send outside any turn goes out at once, and one inside goes out with all others. */
static void loop_enter(dtls_loop *l)
{
    if (l->depth++ == 0)
        l->now = loop_now(l);
}

static void loop_leave(dtls_loop *l)
{
    if (l->depth == 1) {
        if (l->turn_ends)
            l->turn_ends(l);
        while (l->dead.next != &l->dead) {
            struct object *o = l->dead.next;
            list_remove(o);
            o->destroy(o);
        }
    }
    l->depth--;
}

/* Takes an object off the list it lives on; the end of the turn destroys it. */
static void loop_bury(dtls_loop *l, struct object *o)
{
    list_remove(o);
    list_add(&l->dead, o);
}

static void object_free(struct object *o)
{
    free(o);
}

/* Timers: a binary heap. Room is reserved when a timer is made, so that setting one cannot fail. */

static int timer_init(dtls_loop *l, struct timer *t, void (*fn)(void *user), void *user)
{
    if (l->timers + 1 >= l->heap_max) {
        size_t max = l->heap_max ? l->heap_max * 2 : 64;
        struct timer **heap = realloc(l->heap, max * sizeof *heap);
        if (!heap)
            return DTLS_ERR_MEMORY;
        l->heap = heap;
        l->heap_max = max;
    }
    l->timers++;
    *t = (struct timer){.fn = fn, .user = user};
    return 0;
}

static void timer_place(dtls_loop *l, struct timer *t, size_t slot)
{
    l->heap[slot] = t;
    t->slot = slot;
}

static void timer_sift(dtls_loop *l, struct timer *t, size_t slot)
{
    for (; slot > 1 && l->heap[slot / 2]->at_us > t->at_us; slot /= 2)
        timer_place(l, l->heap[slot / 2], slot);
    for (size_t child; (child = slot * 2) <= l->heap_len; slot = child) {
        if (child < l->heap_len && l->heap[child + 1]->at_us < l->heap[child]->at_us)
            child++;
        if (l->heap[child]->at_us >= t->at_us)
            break;
        timer_place(l, l->heap[child], slot);
    }
    timer_place(l, t, slot);
}

static void timer_stop(dtls_loop *l, struct timer *t)
{
    size_t slot = t->slot;
    if (!slot)
        return;
    struct timer *last = l->heap[l->heap_len--];
    t->slot = 0;
    if (last != t)
        timer_sift(l, last, slot);
}

static void timer_set(dtls_loop *l, struct timer *t, int64_t at_us)
{
    size_t slot = t->slot ? t->slot : ++l->heap_len;
    t->at_us = at_us;
    timer_sift(l, t, slot);
}

static void timer_done(dtls_loop *l, struct timer *t)
{
    timer_stop(l, t);
    l->timers--;
}

/* At most as many as were set when it began: a timer that sets itself to now cannot hold the loop. */
static void timer_run(dtls_loop *l)
{
    int64_t now = loop_now(l);
    for (size_t left = l->heap_len; left > 0 && l->heap_len > 0 && l->heap[1]->at_us <= now; left--) {
        struct timer *t = l->heap[1];
        timer_stop(l, t);
        t->fn(t->user);
    }
}

/* Jobs: a piece of work runs at once while the turn's share lasts and nobody waits, otherwise in its turn, behind what
 * came in and the timers. So however many handshakes there are, an open connection waits for one share and one piece. */

static void job_run(dtls_loop *l, struct job *j)
{
    int64_t began = loop_now(l);
    l->working = true;
    l->share_ends = began + l->share_us;
    j->run(j);
    l->working = false;
    l->share_us -= loop_now(l) - began;
}

/* For a job with another piece to do: whether it may go on with it in this turn. */
static bool job_may_go_on(const dtls_loop *l)
{
    return loop_now(l) < l->share_ends;
}

static void job_add(dtls_loop *l, struct job *j)
{
    if (j->next)
        return;
    if (l->jobs_len == 0 && l->share_us > 0 && !l->working) {
        job_run(l, j);
        return;
    }
    j->prev = l->jobs.prev;
    j->next = &l->jobs;
    j->prev->next = l->jobs.prev = j;
    l->jobs_len++;
}

static void job_remove(dtls_loop *l, struct job *j)
{
    if (!j->next)
        return;
    j->prev->next = j->next;
    j->next->prev = j->prev;
    j->prev = j->next = NULL;
    l->jobs_len--;
}

/* One at least, whatever came in before; and none twice. */
static void job_run_all(dtls_loop *l)
{
    size_t left = l->jobs_len;
    do {
        struct job *j = l->jobs.next;
        if (j == &l->jobs)
            return;
        job_remove(l, j);
        job_run(l, j);
    } while (--left > 0 && l->share_us > 0);
}

/* Timers as a loop's user has them. */

static void timer_end(struct object *o)
{
    dtls_timer *t = (dtls_timer *)o;
    timer_done(t->loop, &t->timer);
    t->dead = true; /* whoever still has it may set or free it until the end of the turn */
    loop_bury(t->loop, o);
}

dtls_timer *dtls_timer_new(dtls_loop *l, void (*fn)(void *user), void *user)
{
    dtls_timer *t = calloc(1, sizeof *t);
    if (!t || timer_init(l, &t->timer, fn, user) < 0) {
        free(t);
        return NULL;
    }
    t->loop = l;
    t->object.end = timer_end;
    t->object.destroy = object_free;
    list_add(&l->live, &t->object);
    return t;
}

void dtls_timer_set(dtls_timer *t, int64_t delay_ms)
{
    const int64_t far_ms = INT64_MAX / 4000; /* the rest of the range is the clock's */
    if (delay_ms < 0)
        timer_stop(t->loop, &t->timer);
    else if (!t->dead)
        timer_set(t->loop, &t->timer, loop_now(t->loop) + (delay_ms < far_ms ? delay_ms : far_ms) * 1000);
}

void dtls_timer_free(dtls_timer *t)
{
    if (!t || t->dead)
        return;
    dtls_loop *l = t->loop;
    loop_enter(l);
    timer_end(&t->object);
    loop_leave(l);
}

/* The backends: six functions each, the same names. backend_wait() only tells what fired, and calls nobody.
 * backend_wake() is the only one that other threads reach. */

#ifndef DTLS_USE_KQUEUE

/* Adds a descriptor of the loop's own; what stands in `mark` tells it from a watch. */
static int backend_add(dtls_loop *l, int fd, void *mark)
{
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = mark};
    return epoll_ctl(l->fd, EPOLL_CTL_ADD, fd, &e);
}

static int backend_open(dtls_loop *l)
{
    sigemptyset(&l->signals_watched);
    l->fd = epoll_create1(EPOLL_CLOEXEC);
    l->wake[0] = l->wake[1] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return l->fd < 0 || l->wake[0] < 0 ? -1 : backend_add(l, l->wake[0], l->wake);
}

static void backend_close(dtls_loop *l)
{
    const int fds[] = {l->signal_fd, l->wake[0], l->fd};
    for (int i = 0; i < 3; i++)
        if (fds[i] >= 0)
            close(fds[i]);
}

static void backend_wake(dtls_loop *l)
{
    uint64_t one = 1;
    ssize_t n = write(l->wake[1], &one, sizeof one);
    (void)n; /* it can only fail when the counter is full, and then the loop wakes anyway */
}

static int backend_watch(dtls_watch *w, unsigned events)
{
    struct epoll_event e = {.data.ptr = w};
    int op = !w->events ? EPOLL_CTL_ADD : !events ? EPOLL_CTL_DEL : EPOLL_CTL_MOD;
    if (w->events == events)
        return 0;
    e.events = (events & DTLS_READ ? (uint32_t)EPOLLIN : 0) | (events & DTLS_WRITE ? (uint32_t)EPOLLOUT : 0);
    return epoll_ctl(w->loop->fd, op, w->fd, &e);
}

static int backend_read_signals(dtls_loop *l, struct fired *fired)
{
    struct signalfd_siginfo info[SIGNALS_MAX];
    ssize_t n = read(l->signal_fd, info, sizeof info);
    int len = n > 0 ? (int)((size_t)n / sizeof *info) : 0;
    for (int i = 0; i < len; i++)
        fired[i] = (struct fired){.signo = (int)info[i].ssi_signo};
    return len;
}

static int backend_wait(dtls_loop *l, int timeout_ms, struct fired *fired)
{
    struct epoll_event e[EVENTS_PER_WAIT];
    int n = epoll_wait(l->fd, e, EVENTS_PER_WAIT, timeout_ms), len = 0;
    for (int i = 0; i < n; i++) {
        uint64_t count;
        if (e[i].data.ptr == &l->signal_fd) {
            len += backend_read_signals(l, fired + len);
        } else if (e[i].data.ptr == l->wake) {
            ssize_t r = read(l->wake[0], &count, sizeof count);
            (void)r; /* only empties the counter */
        } else {
            unsigned in = e[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP) ? DTLS_READ : 0;
            unsigned out = e[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP) ? DTLS_WRITE : 0;
            fired[len++] = (struct fired){.watch = e[i].data.ptr, .events = in | out};
        }
    }
    return n < 0 && errno != EINTR ? -1 : len;
}

/* A thread's mask is shared by all its loops: the first that watches a signal blocks it, the last one puts it back. */
static _Thread_local struct {
    unsigned loops;
    bool was_blocked;
} signals_shared[NSIG];

static int signal_block(int signo, bool on)
{
    sigset_t one, old;
    unsigned *loops = &signals_shared[signo].loops;
    sigemptyset(&one);
    sigaddset(&one, signo);
    if (on && *loops == 0) {
        if (sigprocmask(SIG_BLOCK, &one, &old) != 0)
            return -1;
        signals_shared[signo].was_blocked = sigismember(&old, signo) == 1;
    }
    *loops += on ? 1u : -1u;
    if (*loops == 0 && !signals_shared[signo].was_blocked) {
        const struct timespec at_once = {0};
        sigtimedwait(&one, NULL, &at_once); /* what came while it was watched has no other effect any more */
        return sigprocmask(SIG_UNBLOCK, &one, NULL);
    }
    return 0;
}

/* The signal is blocked, and the signalfd reads it. */
static int backend_signal(dtls_loop *l, int signo, bool on)
{
    sigset_t all = l->signals_watched;
    if (!on) {
        sigdelset(&l->signals_watched, signo);
        signalfd(l->signal_fd, &l->signals_watched, 0); /* changing a mask needs nothing and cannot fail */
        return signal_block(signo, false);
    }
    if (sigaddset(&all, signo) < 0) /* no such signal */
        return -1;
    if (signal_block(signo, true) < 0)
        return -1;
    int fd = signalfd(l->signal_fd, &all, SFD_NONBLOCK | SFD_CLOEXEC);
    if (fd >= 0 && (fd == l->signal_fd || backend_add(l, fd, &l->signal_fd) == 0)) {
        l->signal_fd = fd;
        l->signals_watched = all;
        return 0;
    }
    if (fd >= 0)
        close(fd);
    signal_block(signo, false);
    return -1;
}

#else

static int backend_change(dtls_loop *l, uintptr_t ident, short filter, unsigned short flags, unsigned notes, void *user)
{
    struct kevent e;
    EV_SET(&e, ident, filter, flags, notes, 0, user);
    return kevent(l->fd, &e, 1, NULL, 0, NULL);
}

static int backend_open(dtls_loop *l)
{
    l->wake[0] = l->wake[1] = -1;
    l->fd = kqueue();
    if (l->fd < 0 || fcntl(l->fd, F_SETFD, FD_CLOEXEC) < 0)
        return -1;
#ifdef EVFILT_USER
    return backend_change(l, 0, EVFILT_USER, EV_ADD | EV_CLEAR, 0, NULL);
#else
    if (pipe2(l->wake, O_CLOEXEC | O_NONBLOCK) < 0)
        return -1;
    return backend_change(l, (uintptr_t)l->wake[0], EVFILT_READ, EV_ADD, 0, NULL);
#endif
}

static void backend_close(dtls_loop *l)
{
    for (int i = 0; i < 2; i++)
        if (l->wake[i] >= 0)
            close(l->wake[i]);
    if (l->fd >= 0)
        close(l->fd);
}

static void backend_wake(dtls_loop *l)
{
#ifdef EVFILT_USER
    backend_change(l, 0, EVFILT_USER, 0, NOTE_TRIGGER, NULL);
#else
    ssize_t n = write(l->wake[1], "", 1);
    (void)n; /* it can only fail when the pipe is full, and then the loop wakes anyway */
#endif
}

/* Whether kqueue takes it, but says nothing at its end: regular files, and on macOS named pipes. */
static bool backend_ends_unseen(int fd)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return false;
#ifdef __APPLE__
    if (S_ISFIFO(st.st_mode) && st.st_nlink > 0)
        return true;
#endif
    return S_ISREG(st.st_mode);
}

/* kqueue would let a second watch silently take the first one's place; epoll refuses it. False: errno tells why. */
static bool backend_claim(dtls_watch *w)
{
    dtls_loop *l = w->loop;
    size_t fd = w->fd < 0 ? 0 : (size_t)w->fd, max = l->by_fd_max ? l->by_fd_max : 64;
    if (w->fd < 0 || (fd < l->by_fd_max && l->by_fd[fd])) {
        errno = w->fd < 0 ? EBADF : EEXIST;
        return false;
    }
    while (max <= fd)
        max *= 2;
    if (max > l->by_fd_max) {
        dtls_watch **by_fd = realloc(l->by_fd, max * sizeof *by_fd);
        if (!by_fd)
            return false;
        memset(by_fd + l->by_fd_max, 0, (max - l->by_fd_max) * sizeof *by_fd);
        l->by_fd = by_fd;
        l->by_fd_max = max;
    }
    l->by_fd[fd] = w;
    return true;
}

static int backend_filters(dtls_watch *w, unsigned events)
{
    static const short filter[2] = {EVFILT_READ, EVFILT_WRITE};
    static const unsigned bit[2] = {DTLS_READ, DTLS_WRITE};
    unsigned was = w->events;
    if (!was && events && backend_ends_unseen(w->fd)) {
        errno = EPERM; /* as epoll does */
        return -1;
    }
    for (int i = 0; i < 2; i++)
        if (events & ~was & bit[i] && backend_change(w->loop, (uintptr_t)w->fd, filter[i], EV_ADD, 0, w) < 0) {
            if (i > 0 && events & ~was & bit[0]) /* both or none */
                backend_change(w->loop, (uintptr_t)w->fd, filter[0], EV_DELETE, 0, w);
            return -1;
        }
    for (int i = 0; i < 2; i++)
        if (was & ~events & bit[i] && backend_change(w->loop, (uintptr_t)w->fd, filter[i], EV_DELETE, 0, w) < 0)
            return -1;
    return 0;
}

static int backend_watch(dtls_watch *w, unsigned events)
{
    bool begins = !w->events && events;
    if (begins && !backend_claim(w))
        return -1;
    int r = backend_filters(w, events);
    if (r < 0 ? begins : w->events && !events)
        w->loop->by_fd[w->fd] = NULL;
    return r;
}

static int backend_wait(dtls_loop *l, int timeout_ms, struct fired *fired)
{
    struct kevent e[EVENTS_PER_WAIT];
    struct timespec ts = {timeout_ms / 1000, timeout_ms % 1000 * 1000000L};
    int n = kevent(l->fd, NULL, 0, e, EVENTS_PER_WAIT, timeout_ms < 0 ? NULL : &ts), len = 0;
    for (int i = 0; i < n; i++) {
        if (e[i].filter == EVFILT_SIGNAL) {
            fired[len++] = (struct fired){.signo = (int)e[i].ident};
        } else if (e[i].udata) {
            unsigned event = e[i].filter == EVFILT_WRITE ? DTLS_WRITE : DTLS_READ;
            fired[len++] = (struct fired){.watch = (void *)e[i].udata, .events = event};
        } else if (l->wake[0] >= 0) {
            char drain[64];
            while (read(l->wake[0], drain, sizeof drain) > 0)
                ;
        }
    }
    return n < 0 && errno != EINTR ? -1 : len;
}

/* EVFILT_SIGNAL counts what a handler gets as well. Not SIG_IGN: programs that we start would inherit it, and ignoring
 * SIGCHLD takes their exit status away. */
static void backend_signal_caught(int signo)
{
    (void)signo;
}

/* What a signal does is the whole process's: the first loop that watches it catches it, the last one puts back what was
 * there. Loops of several threads take turns at that. */
static struct {
    unsigned loops;
    struct sigaction was;
} signals_shared[NSIG];
static atomic_flag signals_busy = ATOMIC_FLAG_INIT;

static int signal_catch(int signo, bool on)
{
    struct sigaction caught = {.sa_handler = backend_signal_caught, .sa_flags = SA_RESTART};
    unsigned *loops = &signals_shared[signo].loops;
    int r = 0;
    while (atomic_flag_test_and_set(&signals_busy))
        ;
    if (on && *loops == 0)
        r = sigaction(signo, &caught, &signals_shared[signo].was);
    else if (!on && *loops == 1)
        r = sigaction(signo, &signals_shared[signo].was, NULL);
    if (r == 0)
        *loops += on ? 1u : -1u;
    atomic_flag_clear(&signals_busy);
    return r;
}

static int backend_signal(dtls_loop *l, int signo, bool on)
{
    if (!on) {
        signal_catch(signo, false);
        return backend_change(l, (uintptr_t)signo, EVFILT_SIGNAL, EV_DELETE, 0, NULL);
    }
    /* In this order: a signal between the two has its old effect, and is not lost. */
    if (backend_change(l, (uintptr_t)signo, EVFILT_SIGNAL, EV_ADD, 0, NULL) < 0)
        return -1;
    if (signal_catch(signo, true) == 0)
        return 0;
    backend_change(l, (uintptr_t)signo, EVFILT_SIGNAL, EV_DELETE, 0, NULL);
    return -1;
}

#endif

/* Descriptors. */

static void watch_end(struct object *o)
{
    dtls_watch *w = (dtls_watch *)o;
    backend_watch(w, 0);
    w->dead = true; /* events of this turn may still name it */
    loop_bury(w->loop, o);
}

dtls_watch *dtls_watch_new(dtls_loop *l, int fd, unsigned events, void (*fn)(void *user, int fd, unsigned events),
                           void *user)
{
    dtls_watch *w = calloc(1, sizeof *w);
    if (!w)
        return NULL;
    *w =
        (dtls_watch){.object = {.end = watch_end, .destroy = object_free}, .loop = l, .fd = fd, .fn = fn, .user = user};
    if (dtls_watch_set(w, events) < 0) {
        int error = errno;
        free(w);
        errno = error;
        return NULL;
    }
    list_add(&l->live, &w->object);
    return w;
}

int dtls_watch_set(dtls_watch *w, unsigned events)
{
    if (w->dead)
        return DTLS_ERR_STATE;
    if (events & ~(unsigned)(DTLS_READ | DTLS_WRITE)) {
        errno = EINVAL;
        return DTLS_ERR_ARG;
    }
    if (backend_watch(w, events) < 0)
        return DTLS_ERR_SYSTEM;
    w->events = events;
    return 0;
}

void dtls_watch_free(dtls_watch *w)
{
    if (!w || w->dead)
        return;
    dtls_loop *l = w->loop;
    loop_enter(l);
    watch_end(&w->object);
    loop_leave(l);
}

/* Signals and posts. */

int dtls_loop_signal(dtls_loop *l, int signo, void (*fn)(void *user, int signo), void *user)
{
    struct signal_watch *slot = NULL;
    for (struct signal_watch *s = l->signals; s < l->signals + SIGNALS_MAX; s++)
        if (s->signo == signo || (!s->signo && !slot))
            slot = s;
    if (signo < 1 || signo >= NSIG || signo == SIGKILL || signo == SIGSTOP)
        return DTLS_ERR_ARG;
    if (!fn && (!slot || !slot->signo))
        return 0;
    if (!slot)
        return DTLS_ERR_LIMIT;
    if (!fn) {
        int r = backend_signal(l, slot->signo, false);
        *slot = (struct signal_watch){0};
        return r < 0 ? DTLS_ERR_SYSTEM : 0;
    }
    bool known = slot->signo != 0;
    *slot = known ? *slot : (struct signal_watch){.signo = signo};
    slot->fn = fn;
    slot->user = user;
    if (known || backend_signal(l, signo, true) == 0)
        return 0;
    *slot = (struct signal_watch){0};
    return DTLS_ERR_SYSTEM;
}

/* A stack that any thread pushes to; the loop takes it whole and turns it round. */
int dtls_loop_post(dtls_loop *l, void (*fn)(void *arg), void *arg)
{
    struct post *p = malloc(sizeof *p);
    if (!p)
        return DTLS_ERR_MEMORY;
    if (atomic_fetch_add(&l->posts_len, 1) >= POSTS_MAX) {
        atomic_fetch_sub(&l->posts_len, 1);
        free(p);
        return DTLS_ERR_AGAIN;
    }
    *p = (struct post){.fn = fn, .arg = arg, .next = atomic_load(&l->posts)};
    while (!atomic_compare_exchange_weak(&l->posts, &p->next, p))
        ;
    backend_wake(l);
    return 0;
}

static void loop_run_posts(dtls_loop *l, bool call)
{
    struct post *p = atomic_exchange(&l->posts, NULL), *ordered = NULL;
    while (p) {
        struct post *next = p->next;
        p->next = ordered;
        ordered = p;
        p = next;
    }
    while ((p = ordered) != NULL) {
        ordered = p->next;
        atomic_fetch_sub(&l->posts_len, 1);
        if (call)
            p->fn(p->arg);
        free(p);
    }
}

/* The loop. */

/* What an earlier one of the same turn ended or set to silence is silent at once. */
static void loop_dispatch(dtls_loop *l, const struct fired *f)
{
    dtls_watch *w = f->watch;
    unsigned events = w ? f->events & w->events : 0;
    if (w && !w->dead && events)
        w->fn(w->user, w->fd, events);
    for (struct signal_watch *s = l->signals; !w && s < l->signals + SIGNALS_MAX; s++) {
        if (s->signo == f->signo) {
            s->fn(s->user, s->signo);
            return;
        }
    }
}

dtls_loop *dtls_loop_new(const dtls_loop_config *config)
{
    dtls_loop *l = calloc(1, sizeof *l);
    if (!l)
        return NULL;
    l->now_us = config && config->now_us ? config->now_us : clock_monotonic_us;
    l->clock_user = config ? config->user : NULL;
    list_init(&l->live);
    list_init(&l->dead);
    l->jobs.prev = l->jobs.next = &l->jobs;
    l->share_us = SHARE_US;
    l->fd = l->wake[0] = l->wake[1] = l->signal_fd = -1;
    if (backend_open(l) == 0)
        return l;
    backend_close(l);
    free(l);
    return NULL;
}

int dtls_loop_fd(const dtls_loop *l)
{
    return l->fd;
}

int64_t dtls_loop_now(const dtls_loop *l)
{
    return loop_now(l);
}

int dtls_loop_timeout(dtls_loop *l)
{
    if (atomic_load(&l->posts) || l->jobs_len > 0)
        return 0;
    if (!l->heap_len)
        return -1;
    int64_t left = l->heap[1]->at_us - loop_now(l);
    if (left <= 0)
        return 0;
    left = (left + 999) / 1000; /* up: waking too early would spin */
    return left > INT_MAX ? INT_MAX : (int)left;
}

int dtls_loop_poll(dtls_loop *l, int timeout_ms)
{
    struct fired fired[FIRED_MAX];
    if (l->depth)
        return DTLS_ERR_STATE;
    int next = dtls_loop_timeout(l);
    if (next >= 0 && (timeout_ms < 0 || next < timeout_ms))
        timeout_ms = next;
    loop_enter(l);
    int n = backend_wait(l, timeout_ms, fired);
    l->now = loop_now(l);
    l->share_us = SHARE_US;
    for (int i = 0; i < n; i++)
        loop_dispatch(l, &fired[i]);
    loop_run_posts(l, true);
    timer_run(l);
    job_run_all(l);
    loop_leave(l);
    return n < 0 ? DTLS_ERR_SYSTEM : 0;
}

int dtls_loop_run(dtls_loop *l)
{
    int r = 0;
    if (l->depth)
        return DTLS_ERR_STATE;
    while (!l->stopping && r == 0)
        r = dtls_loop_poll(l, -1);
    l->stopping = false;
    return r;
}

void dtls_loop_stop(dtls_loop *l)
{
    l->stopping = true;
}

void dtls_loop_free(dtls_loop *l)
{
    if (!l)
        return;
    loop_enter(l);
    while (l->live.next != &l->live) /* endpoints run callbacks, which may make or end others */
        l->live.next->end(l->live.next);
    loop_leave(l);
    for (struct signal_watch *s = l->signals; s < l->signals + SIGNALS_MAX; s++)
        if (s->signo) /* not before the peers know: a second signal must not end us before that */
            dtls_loop_signal(l, s->signo, NULL, NULL);
    loop_run_posts(l, false);
    backend_close(l);
    free(l->by_fd);
    free(l->heap);
    free(l->io);
    free(l);
}

/* ==== 4. datagrams ================================================================================================ */

enum {
    DATAGRAM_MAX = 18432, /* above any DTLS 1.2 record: 13 + 2^14 + 2,048, RFC 6347 section 4.3.1 */
    BATCH_IN = 32,        /* datagrams per receive call */
    BATCH_OUT = 64,       /* datagrams, and bytes, queued before an early flush */
    BATCH_OUT_BYTES = 262144,
    CONTROL_BYTES = 64, /* ancillary data: one in_pktinfo or in6_pktinfo with its header */
    ADDRS_MAX = 8,      /* of a host that are tried */
    LOOKUPS_MAX = 64,   /* at once, each with a thread */
    HOST_BYTES = 256
};

/* What the system would not take yet, per socket, bounded by config.send_queue_bytes. */
struct backlog {
    struct backlog *next;
    dtls_addr from, to;
    size_t len;
    uint8_t data[];
};

struct udp;

/* Whom a socket serves: where its datagrams and its errors go, what it counts in, and how it is configured. */
struct udp_user {
    void (*input)(struct udp *u, const uint8_t *p, size_t n, const dtls_addr *from, const dtls_addr *to);
    void (*error)(struct udp *u, int error);
    void (*writable)(struct udp *u); /* after its backlog was full it has room again */
    void *owner;
    dtls_counters *counters;
    const dtls_config *cfg;
};

struct udp {
    struct object object;
    struct udp_user user;
    dtls_watch *watch;
    bool connected; /* a client's own, connected to its peer; otherwise one that listens */
    int fd;
    dtls_addr local;
    bool wildcard;
    struct backlog *first, **last;
    size_t backlog_bytes;
    bool refused; /* the backlog was full, and whoever wanted to send was not told yet that it has room again */
};

struct control {
    _Alignas(struct cmsghdr) uint8_t bytes[CONTROL_BYTES];
};

struct outgoing {
    struct udp *udp;
    dtls_addr from, to;
    const uint8_t *data;
    size_t len;
};

/* One per loop, as large as the batches; pages never touched cost nothing. */
struct io {
    uint8_t in[BATCH_IN][DATAGRAM_MAX];
    struct sockaddr_storage in_from[BATCH_IN];
    struct control in_control[BATCH_IN];
    struct iovec in_iov[BATCH_IN];
    batch_msg in_msgs[BATCH_IN];

    struct outgoing out[BATCH_OUT];
    unsigned out_len;
    size_t out_used;
    uint8_t out_bytes[BATCH_OUT_BYTES];
};

static void udp_dropped(struct udp *u, dtls_drop reason)
{
    u->user.counters->dropped[reason]++;
}

/* What the system reports is counted, and told upward; life goes on. */
static void udp_failed(struct udp *u, int error)
{
    u->user.counters->receive_errors++;
    u->user.error(u, error);
}

/* Puts the local address that the datagram must leave from into the ancillary data. */
static void udp_put_local(struct msghdr *m, struct control *c, const dtls_addr *from)
{
    memset(c, 0, sizeof *c);
    m->msg_control = c->bytes;
    m->msg_controllen = sizeof c->bytes;
    struct cmsghdr *h = CMSG_FIRSTHDR(m);
    if (from->family == 4) {
        local4 info;
        local4_put(&info, from->ip);
        h->cmsg_level = IPPROTO_IP;
        h->cmsg_type = LOCAL4_SEND;
        h->cmsg_len = CMSG_LEN(sizeof info);
        m->msg_controllen = CMSG_SPACE(sizeof info);
        memcpy(CMSG_DATA(h), &info, sizeof info);
    } else {
        struct in6_pktinfo info = {0};
        h->cmsg_level = IPPROTO_IPV6;
        h->cmsg_type = IPV6_PKTINFO;
        memcpy(&info.ipi6_addr, from->ip, 16);
        info.ipi6_ifindex = from->scope;
        h->cmsg_len = CMSG_LEN(sizeof info);
        m->msg_controllen = CMSG_SPACE(sizeof info);
        memcpy(CMSG_DATA(h), &info, sizeof info);
    }
}

/* The address that a datagram to a wildcard socket was sent to; false: not one of ours (multicast, broadcast). */
static bool udp_get_local(struct msghdr *m, dtls_addr *to)
{
    struct cmsghdr *h = CMSG_FIRSTHDR(m); /* there is no other: one option asks for one */
    if (!h)
        return false;
    if (h->cmsg_level == IPPROTO_IP && h->cmsg_type == LOCAL4_TYPE) {
        local4 info;
        memcpy(&info, CMSG_DATA(h), sizeof info);
        return local4_get(&info, to->ip);
    }
    if (h->cmsg_level == IPPROTO_IPV6 && h->cmsg_type == IPV6_PKTINFO) {
        struct in6_pktinfo info;
        memcpy(&info, CMSG_DATA(h), sizeof info);
        addr_set_v6(to, &info.ipi6_addr, (uint32_t)info.ipi6_ifindex);
        return !IN6_IS_ADDR_MULTICAST(&info.ipi6_addr);
    }
    return false;
}

static void udp_fill(struct udp *u, struct msghdr *m, struct iovec *iov, struct sockaddr_storage *ss, struct control *c,
                     const struct outgoing *o)
{
    iov->iov_base = (void *)(uintptr_t)o->data; /* sendmsg only reads it */
    iov->iov_len = o->len;
    *m = (struct msghdr){.msg_iov = iov, .msg_iovlen = 1};
    if (u->connected)
        return;
    m->msg_namelen = addr_to_sockaddr(&o->to, ss);
    m->msg_name = ss;
    if (u->wildcard)
        udp_put_local(m, c, &o->from);
}

/* Sends up to BATCH_OUT datagrams. Returns how many are done with, be it that the system took them or that they were
 * given up; the others have to wait, since it takes no more now. */
static unsigned udp_send_batch(struct udp *u, const struct outgoing *o, unsigned n)
{
    batch_msg msgs[BATCH_OUT];
    struct iovec iov[BATCH_OUT];
    struct sockaddr_storage to[BATCH_OUT];
    struct control control[BATCH_OUT];
    unsigned done = 0;
    bool again = false; /* a pending error of an earlier datagram was reported, not one of this */
    for (unsigned i = 0; i < n; i++)
        udp_fill(u, &msgs[i].msg_hdr, &iov[i], &to[i], &control[i], &o[i]);
    while (done < n) {
        int sent = batch_send(u->fd, msgs + done, n - done);
        if (sent > 0) {
            done += (unsigned)sent;
            again = false;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            break;
        } else if (errno == ECONNREFUSED && !again) {
            udp_failed(u, errno);
            again = true;
        } else if (errno != EINTR) {
            udp_failed(u, errno);
            udp_dropped(u, DTLS_DROP_SEND);
            done++;
            again = false;
        }
    }
    return done;
}

static int backlog_add(struct udp *u, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    size_t room = (size_t)u->user.cfg->send_queue_bytes;
    struct backlog *b = len <= room && u->backlog_bytes <= room - len ? malloc(sizeof *b + len) : NULL;
    if (u->first && !b) {
        u->refused = true;
        return DTLS_ERR_AGAIN;
    }
    if (!b || (!u->first && dtls_watch_set(u->watch, DTLS_READ | DTLS_WRITE) < 0)) { /* nobody would tell us to go on */
        udp_dropped(u, DTLS_DROP_SEND);
        free(b);
        return 0;
    }
    *b = (struct backlog){.from = *from, .to = *to, .len = len};
    memcpy(b->data, data, len);
    *u->last = b;
    u->last = &b->next;
    u->backlog_bytes += len;
    return 0;
}

static void backlog_drop_first(struct udp *u)
{
    struct backlog *b = u->first;
    u->first = b->next;
    u->backlog_bytes -= b->len;
    if (!u->first)
        u->last = &u->first;
    free(b);
}

static void udp_writable(struct udp *u)
{
    while (u->first) {
        struct backlog *b = u->first;
        struct outgoing o = {.udp = u, .from = b->from, .to = b->to, .data = b->data, .len = b->len};
        if (udp_send_batch(u, &o, 1) == 0)
            return;
        backlog_drop_first(u);
    }
    dtls_watch_set(u->watch, DTLS_READ);
    if (u->refused) {
        u->refused = false;
        u->user.writable(u);
    }
}

/* The end of every turn: what was queued leaves, one system call for each run of datagrams on the same socket. */
static void io_flush(dtls_loop *l)
{
    struct io *io = l->io;
    if (!io || !io->out_len)
        return;
    for (unsigned i = 0, j; i < io->out_len; i = j) {
        struct udp *u = io->out[i].udp;
        for (j = i + 1; j < io->out_len && io->out[j].udp == u; j++)
            ;
        for (unsigned k = i + udp_send_batch(u, &io->out[i], j - i); k < j; k++) {
            const struct outgoing *o = &io->out[k];
            if (backlog_add(u, o->data, o->len, &o->from, &o->to) != 0)
                udp_dropped(u, DTLS_DROP_SEND);
        }
    }
    io->out_len = 0;
    io->out_used = 0;
}

/* Queues one datagram; DTLS_ERR_AGAIN: the socket's backlog is full. */
static int udp_send(dtls_loop *l, struct udp *u, const void *data, size_t len, const dtls_addr *from,
                    const dtls_addr *to)
{
    struct io *io = l->io;
    if (io->out_len == BATCH_OUT || len > sizeof io->out_bytes - io->out_used)
        io_flush(l);
    if (u->first)
        return backlog_add(u, data, len, from, to);
    uint8_t *copy = io->out_bytes + io->out_used;
    memcpy(copy, data, len);
    io->out_used += len;
    io->out[io->out_len++] = (struct outgoing){.udp = u, .from = *from, .to = *to, .data = copy, .len = len};
    return 0;
}

static void udp_receive_one(struct udp *u, batch_msg *m, const uint8_t *data)
{
    dtls_addr from, to = u->local;
    if (m->msg_hdr.msg_flags & MSG_TRUNC) {
        udp_dropped(u, DTLS_DROP_OVERSIZE);
        return;
    }
    if (dtls_addr_from_sockaddr(&from, m->msg_hdr.msg_name, m->msg_hdr.msg_namelen) != 0 || from.port == 0 ||
        (u->wildcard && !udp_get_local(&m->msg_hdr, &to))) {
        udp_dropped(u, DTLS_DROP_STRANGER);
        return;
    }
    u->user.input(u, data, m->msg_len, &from, &to);
}

static void udp_readable(struct udp *u)
{
    struct io *io = u->watch->loop->io;
    unsigned left = (unsigned)u->user.cfg->datagrams_per_turn;
    while (left > 0 && !u->watch->dead) {
        unsigned want = left < BATCH_IN ? left : BATCH_IN;
        for (unsigned i = 0; i < want; i++) {
            struct msghdr *m = &io->in_msgs[i].msg_hdr;
            io->in_iov[i] = (struct iovec){io->in[i], DATAGRAM_MAX};
            *m = (struct msghdr){.msg_name = &io->in_from[i],
                                 .msg_namelen = sizeof io->in_from[i],
                                 .msg_iov = &io->in_iov[i],
                                 .msg_iovlen = 1};
            if (u->wildcard) {
                m->msg_control = io->in_control[i].bytes;
                m->msg_controllen = CONTROL_BYTES;
            }
        }
        int got = batch_recv(u->fd, io->in_msgs, want);
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (got < 0) { /* an ICMP report or the like: it is gone once read, what stands behind it is not */
            if (errno != EINTR)
                udp_failed(u, errno);
            left--;
            continue;
        }
        for (int i = 0; i < got && !u->watch->dead; i++)
            udp_receive_one(u, &io->in_msgs[i], io->in[i]);
        if ((unsigned)got < want)
            return;
        left -= (unsigned)got;
    }
}

static void udp_event(void *user, int fd, unsigned events)
{
    struct udp *u = user;
    (void)fd;
    if (events & DTLS_WRITE)
        udp_writable(u);
    if (events & DTLS_READ)
        udp_readable(u);
}

static void udp_destroy(struct object *o)
{
    struct udp *u = (struct udp *)o;
    while (u->first)
        backlog_drop_first(u);
    close(u->fd);
    free(u);
}

static void udp_free(struct udp *u)
{
    dtls_loop *l = u->watch->loop;
    dtls_watch_free(u->watch);
    loop_bury(l, &u->object);
}

/* Linux caps what is asked for, the BSDs refuse what is above their limit. There SO_SNDBUF limits a datagram, too. */
static void udp_buffer(int fd, int option, int bytes)
{
    if (bytes < DATAGRAM_MAX)
        bytes = DATAGRAM_MAX;
    while (setsockopt(fd, SOL_SOCKET, option, &bytes, sizeof bytes) < 0 && bytes > DATAGRAM_MAX)
        bytes = bytes / 2 > DATAGRAM_MAX ? bytes / 2 : DATAGRAM_MAX;
}

/* Options before bind: IPv6 only, the local address with each datagram, buffers. */
static int udp_options(const struct udp *u)
{
    int one = 1;
    udp_buffer(u->fd, SO_RCVBUF, u->user.cfg->socket_buffer_bytes);
    udp_buffer(u->fd, SO_SNDBUF, u->user.cfg->socket_buffer_bytes);
    fd_ignore_path_mtu(u->fd, u->local.family == 4);
    if (u->local.family == 6 && setsockopt(u->fd, IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one) < 0)
        return -1;
    if (!u->wildcard)
        return 0;
    if (u->local.family == 6)
        return setsockopt(u->fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &one, sizeof one);
    return setsockopt(u->fd, IPPROTO_IP, LOCAL4_RECV, &one, sizeof one);
}

/* The system's socket: bound to u->local, or connected to the peer, if there is one. Its address ends up in u->local. */
static int udp_socket(struct udp *u, const dtls_addr *peer)
{
    union {
        struct sockaddr sa;
        struct sockaddr_storage ss;
    } at;
    socklen_t len = addr_to_sockaddr(peer ? peer : &u->local, &at.ss);
    u->fd = fd_socket(u->local.family == 4 ? AF_INET : AF_INET6);
    if (u->fd < 0 || udp_options(u) < 0 || (peer ? connect(u->fd, &at.sa, len) : bind(u->fd, &at.sa, len)) < 0)
        return -1;
    len = sizeof at;
    return getsockname(u->fd, &at.sa, &len) < 0 || dtls_addr_from_sockaddr(&u->local, &at.sa, len) < 0 ? -1 : 0;
}

static int io_open(dtls_loop *l)
{
    if (!l->io)
        l->io = calloc(1, sizeof *l->io);
    l->turn_ends = io_flush;
    return l->io ? 0 : -1;
}

/* A socket bound to local, or one connected to the peer: a client's own, so that the system sorts datagrams and reports
 * ICMP errors. It is added to the list; udp_free() takes it off. NULL: errno tells why. */
static struct udp *udp_open(dtls_loop *l, const struct udp_user *user, struct object *list, const dtls_addr *local,
                            const dtls_addr *peer)
{
    struct udp *u = io_open(l) < 0 ? NULL : malloc(sizeof *u);
    if (!u) {
        errno = ENOMEM;
        return NULL;
    }
    *u = (struct udp){.object.destroy = udp_destroy,
                      .user = *user,
                      .connected = peer != NULL,
                      .local = peer ? *peer : *local,
                      .wildcard = !peer && addr_is_wildcard(local)};
    u->last = &u->first;
    if (udp_socket(u, peer) == 0 && (u->watch = dtls_watch_new(l, u->fd, DTLS_READ, udp_event, u)) != NULL) {
        list_add(list, &u->object);
        return u;
    }
    int error = errno;
    if (u->fd >= 0)
        close(u->fd);
    free(u);
    errno = error;
    return NULL;
}

/* Names. getaddrinfo() waits, so it has a thread of its own, which shares nothing with the loop but a pipe: the answer
 * comes through that. The thread cannot be stopped, so a lookup that nobody wants any more is one until then, or until the
 * loop is freed. */

struct answer {
    int error; /* getaddrinfo()'s */
    int system_error;
    unsigned len;
    dtls_addr addrs[ADDRS_MAX];
};

struct question {
    int fd;
    char host[HOST_BYTES], port[12];
};

struct lookup {
    struct object object;
    dtls_watch *watch;
    struct question what;
    void (*fn)(void *user, const struct question *what, const struct answer *answer);
    void *user;
};

/* RFC 8305 section 4: one of the other family next, so that where one does not work half of the tries are good. */
static void answer_alternate(struct answer *to)
{
    for (unsigned i = 1, j; i < to->len; i++) {
        for (j = i; j < to->len && to->addrs[j].family == to->addrs[i - 1].family; j++)
            ;
        if (j == to->len)
            return;
        dtls_addr other = to->addrs[j];
        memmove(&to->addrs[i + 1], &to->addrs[i], (j - i) * sizeof other);
        to->addrs[i] = other;
    }
}

static void *lookup_thread(void *user)
{
    struct question *q = user;
    struct addrinfo hints = {.ai_socktype = SOCK_DGRAM}, *list = NULL;
    struct answer answer;
    memset(&answer, 0, sizeof answer);
    answer.error = getaddrinfo(q->host, q->port, &hints, &list);
    answer.system_error = errno;
    for (struct addrinfo *ai = list; ai && answer.len < ADDRS_MAX; ai = ai->ai_next)
        if (dtls_addr_from_sockaddr(&answer.addrs[answer.len], ai->ai_addr, ai->ai_addrlen) == 0)
            answer.len++;
    if (list)
        freeaddrinfo(list);
    answer_alternate(&answer);
    while (write(q->fd, &answer, sizeof answer) < 0 && errno == EINTR) /* in one piece: it is below PIPE_BUF */
        ;
    close(q->fd);
    free(q);
    return NULL;
}

static void lookup_end(struct object *o)
{
    struct lookup *l = (struct lookup *)o;
    dtls_loop *loop = l->watch->loop;
    int fd = l->watch->fd;
    dtls_watch_free(l->watch);
    close(fd);
    loop->lookups--;
    loop_bury(loop, o);
}

static void lookup_readable(void *user, int fd, unsigned events)
{
    struct lookup *l = user;
    struct answer answer;
    ssize_t n = read(fd, &answer, sizeof answer);
    (void)events;
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (n != (ssize_t)sizeof answer)
        answer = (struct answer){.error = EAI_FAIL};
    lookup_end(&l->object);
    if (l->fn)
        l->fn(l->user, &l->what, &answer);
}

/* Signals are for the loop's thread, and SIGPIPE tells that nobody wants the answer. */
static int lookup_start(struct question *q)
{
    pthread_attr_t attr;
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    int r = pthread_attr_init(&attr);
    if (r != 0)
        return r;
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    r = pthread_create(&thread, &attr, lookup_thread, q);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attr);
    return r;
}

/* Asks for a host's addresses; fn is called once, and not before this returns. Who does not want that any more clears it.
 * NULL: errno tells why. */
static struct lookup *lookup_new(dtls_loop *loop, const struct question *what,
                                 void (*fn)(void *user, const struct question *what, const struct answer *answer),
                                 void *user)
{
    int fd[2] = {-1, -1}, error = loop->lookups < LOOKUPS_MAX ? ENOMEM : EAGAIN;
    struct lookup *l = error == ENOMEM ? calloc(1, sizeof *l) : NULL;
    struct question *q = l ? malloc(sizeof *q) : NULL;
    if (q && fd_pipe(fd) == 0 && (l->watch = dtls_watch_new(loop, fd[0], DTLS_READ, lookup_readable, l)) != NULL) {
        *q = l->what = *what;
        q->fd = fd[1];
        l->object = (struct object){.end = lookup_end, .destroy = object_free};
        l->fn = fn;
        l->user = user;
        error = lookup_start(q);
        if (error == 0) {
            loop->lookups++;
            list_add(&loop->live, &l->object);
            return l;
        }
        dtls_watch_free(l->watch);
    } else if (q) {
        error = errno;
    }
    for (int i = 0; i < 2; i++)
        if (fd[i] >= 0)
            close(fd[i]);
    free(q);
    free(l);
    errno = error;
    return NULL;
}

/* ==== 5. wire ===================================================================================================== */

enum {
    RECORD_HEADER = 13, /* type, version, epoch, sequence number, length: RFC 6347 section 4.1 */
    RECORD_BODY_MAX = 16384 + 256,
    TYPE_CCS = 20,
    TYPE_ALERT = 21,
    TYPE_HANDSHAKE = 22,
    TYPE_DATA = 23,
    TYPE_CID = 25,      /* RFC 9146 */
    TYPE_RRC = 27,      /* RFC 9853 */
    UNIFIED_MIN = 0x20, /* first bytes of DTLS 1.3 records, RFC 9147 section 4 */
    UNIFIED_MAX = 0x3f,

    HANDSHAKE_HEADER = 12, /* type, length, message_seq, fragment offset, fragment length: RFC 6347 section 4.2.2 */
    HELLO_RANDOM = 32,
    CLIENT_HELLO = 1,
    SERVER_HELLO = 2,
    HELLO_VERIFY_REQUEST = 3,
    NEW_SESSION_TICKET = 4,
    CERTIFICATE = 11,
    SERVER_KEY_EXCHANGE = 12,
    CERTIFICATE_REQUEST = 13,
    SERVER_HELLO_DONE = 14,
    CERTIFICATE_VERIFY = 15,
    CLIENT_KEY_EXCHANGE = 16,
    CERTIFICATE_STATUS = 22
};

/* What the guard lets through. */
enum {
    CA_NAMES_LENGTH_MAX = 32768, /* of a CertificateRequest */
    HELLO_LENGTH_MAX = 4096,
    KEY_LENGTH_MAX = 2048, /* a signature of RSA-16384 */
    SERVER_SEQ_MAX = 8,
    EARLY_RECORDS = 6, /* protected records kept ahead of their keys: libssl buffers them unauthenticated */
    OVERHEAD_MAX = 24, /* explicit nonce and tag of GCM and CCM; ChaCha20-Poly1305 and CCM_8 have 16 */
    OVERHEAD_MIN = 16
};

enum {
    IP4_UDP_HEADERS = 28,
    IP6_UDP_HEADERS = 48,
    MTU_MIN = 256,
    MTU_FALLBACK_1 = 1280, /* what every IPv6 link carries, */
    MTU_FALLBACK_2 = 576,  /* and every IPv4 host */
    FLIGHT_SMALL = MTU_FALLBACK_2 - IP6_UDP_HEADERS
};

/* Records. */

struct record {
    const uint8_t *start, *body;
    size_t size, header, body_len; /* size: header included */
    unsigned type, epoch;
    uint64_t sequence;
};

static unsigned load16(const uint8_t *p)
{
    return (unsigned)p[0] << 8 | p[1];
}

static unsigned load24(const uint8_t *p)
{
    return (unsigned)p[0] << 16 | (unsigned)p[1] << 8 | p[2];
}

static uint64_t load_number(const uint8_t *p, int bytes)
{
    uint64_t n = 0;
    for (int i = 0; i < bytes; i++)
        n = n << 8 | p[i];
    return n;
}

static void store_number(uint8_t *p, int bytes, uint64_t n)
{
    for (int i = bytes - 1; i >= 0; i--, n >>= 8)
        p[i] = (uint8_t)n;
}

/* Of whatever type, with a connection ID of that length in its header. */
static bool record_parse_any(const uint8_t *p, size_t n, size_t cid_len, struct record *r)
{
    size_t header = RECORD_HEADER + cid_len;
    if (n < header || p[1] != 0xfe || (p[2] != 0xff && p[2] != 0xfd))
        return false;
    r->type = p[0];
    r->epoch = load16(p + 3);
    r->sequence = load_number(p + 5, 6);
    r->body_len = load16(p + header - 2);
    r->start = p;
    r->body = p + header;
    r->header = header;
    r->size = header + r->body_len;
    return r->body_len > 0 && r->body_len <= RECORD_BODY_MAX && r->body_len <= n - header;
}

static bool record_parse(const uint8_t *p, size_t n, struct record *r)
{
    return n > 0 && p[0] >= TYPE_CCS && p[0] <= TYPE_DATA && record_parse_any(p, n, 0, r);
}

/* Why what stands there is no record of DTLS 1.2. */
static dtls_drop record_drop(const uint8_t *p, size_t n)
{
    if (n > 0 && p[0] >= UNIFIED_MIN && p[0] <= UNIFIED_MAX)
        return DTLS_DROP_DTLS13;
    return n > 0 && p[0] == TYPE_CID ? DTLS_DROP_CID : DTLS_DROP_MALFORMED;
}

/* A ServerHello's random, if this is its first fragment; it tells one handshake of a server's from another. */
static const uint8_t *record_server_random(const struct record *r)
{
    const uint8_t *p = r->body;
    bool there = p[0] == SERVER_HELLO && load24(p + 6) == 0 && load24(p + 9) >= 2 + HELLO_RANDOM;
    return there ? p + HANDSHAKE_HEADER + 2 : NULL;
}

/* An answer to a ClientHello. */
static bool record_is_server_hello(const struct record *r)
{
    return r->epoch == 0 && r->type == TYPE_HANDSHAKE &&
           (r->body[0] == SERVER_HELLO || r->body[0] == HELLO_VERIFY_REQUEST);
}

/* A ClientHello at the start of a datagram, unfragmented or its first fragment: what the cookie exchange looks at. */
static bool record_client_hello(const uint8_t *p, size_t n, struct record *r)
{
    return record_parse(p, n, r) && r->epoch == 0 && r->type == TYPE_HANDSHAKE &&
           r->body_len >= HANDSHAKE_HEADER + 2 + HELLO_RANDOM && r->body[0] == CLIENT_HELLO && load24(r->body + 6) == 0;
}

/* The guard: what may reach libssl. Pure functions, which change nothing: each returns a verdict on one record. What to
 * do about it is up to the caller. The README has a table of the attacks. */

enum {
    GUARD_PASS = -1,
    GUARD_CLAIM = -2 /* dropped as an alert (DTLS_DROP_ALERT), but it claims that the peer refuses us or leaves */
    /* otherwise a dtls_drop: why the record must not pass */
};

/* What the guard has to know of a handshake. */
struct guard {
    bool server;        /* our role */
    bool asks;          /* a server's: it asks for a certificate */
    bool tickets;       /* a client's: it takes session tickets */
    bool offers;        /* a client's: its ClientHello offers to resume a session */
    bool resumed;       /* the handshake is abbreviated: besides a ticket nobody sends a plaintext message any more */
    unsigned chain_max; /* bytes of a Certificate message */
    bool keyed;         /* libssl has the keys of the peer's protected records */
    unsigned early;     /* protected records that went through before it had them */
    bool hello_due;     /* a client's: its ClientHello waits for a ServerHello or HelloVerifyRequest, and */
    bool answered;      /* had one of them before */
    bool anew;          /* a client's: this is not its first try */
    const uint8_t *random; /* of the last ServerHello that came, in this try or the one before */
};

/* Handshake messages that a peer may send unprotected: how long they get and, towards a server, their place. Behind our
 * cookie exchange a client's message_seq is fixed, so that nobody makes libssl keep more than one of each for later. A
 * server whose on_ssl_ctx switched verification off asks for no certificate: none may come, and the key takes its place.
 */
static bool guard_message(const struct guard *g, unsigned type, unsigned seq, unsigned length)
{
    bool server = g->server;
    if (g->resumed && type != NEW_SESSION_TICKET)
        return false;
    switch (type) {
    case CLIENT_HELLO: /* a later fragment: the first goes to the cookie exchange */
        return server && seq == 1 && length <= HELLO_LENGTH_MAX;
    case CERTIFICATE:
        return (!server || (g->asks && seq == 2)) && length <= g->chain_max;
    case CLIENT_KEY_EXCHANGE:
        return server && seq == (g->asks ? 3u : 2u) && length <= KEY_LENGTH_MAX;
    case CERTIFICATE_VERIFY:
        return server && seq == 4 && length <= KEY_LENGTH_MAX;
    case SERVER_HELLO:
    case HELLO_VERIFY_REQUEST:
    case SERVER_KEY_EXCHANGE:
        return !server && seq <= SERVER_SEQ_MAX && length <= HELLO_LENGTH_MAX;
    case NEW_SESSION_TICKET:
        return !server && g->tickets && seq <= SERVER_SEQ_MAX && length <= g->chain_max;
    case CERTIFICATE_REQUEST:
    case SERVER_HELLO_DONE:
    case CERTIFICATE_STATUS:
        return !server && seq <= SERVER_SEQ_MAX && length <= CA_NAMES_LENGTH_MAX;
    default:
        return false;
    }
}

/* libssl ends the handshake over a fragment that lies about its place or size; nothing in a real one does. An empty one it
 * takes for a whole message, which then lacks everything. */
static bool guard_fragments(const struct guard *g, const struct record *r)
{
    const uint8_t *p = r->body;
    size_t left = r->body_len;
    while (left >= HANDSHAKE_HEADER) {
        unsigned length = load24(p + 1), offset = load24(p + 6), fragment = load24(p + 9);
        if (!guard_message(g, p[0], load16(p + 4), length) || offset > length || fragment > length - offset ||
            (fragment == 0 && length > 0) || fragment > left - HANDSHAKE_HEADER)
            return false;
        p += HANDSHAKE_HEADER + fragment;
        left -= HANDSHAKE_HEADER + fragment;
    }
    return left == 0;
}

/* After a new start, or at an address that another client had before, what the server sent in an earlier handshake still
 * arrives. A message of it that libssl keeps for later would spoil this one. Of the last try we know the ServerHello;
 * otherwise nobody can tell them apart, but only the right ones come in this order. */
static bool guard_leftover(const struct guard *g, const struct record *r)
{
    if (!g->hello_due)
        return false;
    if (!record_is_server_hello(r)) /* a full handshake's message would end one that turns out to be resumed */
        return !g->answered || g->anew || g->offers;
    const uint8_t *random = record_server_random(r);
    if (random && g->anew && memcmp(random, g->random, HELLO_RANDOM) == 0)
        return true;
    return !g->answered && load16(r->body + 4) != 0;
}

static int guard_unprotected(const struct guard *g, const struct record *r)
{
    switch (r->type) {
    case TYPE_DATA:
        return DTLS_DROP_DATA;
    case TYPE_ALERT:
        return r->body_len == 2 && (r->body[0] == SSL3_AL_FATAL || r->body[1] == SSL_AD_CLOSE_NOTIFY) ? GUARD_CLAIM
                                                                                                      : DTLS_DROP_ALERT;
    case TYPE_CCS:
        return r->body_len == 1 && r->body[0] == 1 ? GUARD_PASS : DTLS_DROP_HANDSHAKE;
    default:
        return guard_fragments(g, r) && !guard_leftover(g, r) ? GUARD_PASS : DTLS_DROP_HANDSHAKE;
    }
}

/* A protected fragment shows by its size that it is empty. Of what is real only an 8-byte piece of a Finished has that
 * size, with a suite of little overhead; nobody cuts a message of 12 bytes. */
static bool guard_empty_fragment(const struct record *r)
{
    return r->type == TYPE_HANDSHAKE &&
           (r->body_len == HANDSHAKE_HEADER + OVERHEAD_MIN || r->body_len == HANDSHAKE_HEADER + OVERHEAD_MAX);
}

static int guard_handshake(const struct guard *g, const struct record *r)
{
    if (r->epoch == 0)
        return guard_unprotected(g, r);
    if (r->epoch != 1)
        return DTLS_DROP_EPOCH;
    if (r->type == TYPE_CCS || guard_empty_fragment(r))
        return DTLS_DROP_HANDSHAKE;
    if (r->body_len < OVERHEAD_MAX) /* the suite may not be known yet; the Finished and what follows is longer anyway */
        return DTLS_DROP_SHORT;
    /* With the keys libssl drops what they do not open. Before, it keeps such records unread. */
    return g->keyed || g->early < EARLY_RECORDS ? GUARD_PASS : DTLS_DROP_EARLY;
}

/* overhead: of the suite's nonce and tag. */
static int guard_open(size_t overhead, const struct record *r)
{
    if (r->epoch != 1)
        return DTLS_DROP_EPOCH;
    if (r->body_len < overhead) /* openssl/openssl#25290: fatal to libssl, whoever sent it */
        return DTLS_DROP_SHORT;
    return r->type == TYPE_CCS ? DTLS_DROP_HANDSHAKE : GUARD_PASS;
}

/* Keys: those of the association's records, a second time. With connection IDs libssl's records are translated on their way
 * out, and those that come are opened before it sees any; without, the keys tell whose record one from an unknown address
 * is. */

struct aead {
    int nid;
    const char *name;                 /* in OpenSSL's name of the suite, where the nid does not tell */
    uint8_t key, salt, explicit, tag; /* bytes; explicit: of the nonce, in each record */
    bool ccm;
};

enum { NONCE_BYTES = 12, AEAD_KEY_MAX = 32, TAG_MAX = 16, MASTER_BYTES = 48 };

/* RFC 5288, 6209, 6655, 7905. */
static const struct aead aeads[] = {
    {NID_aes_128_gcm, "", 16, 4, 8, 16, false},        {NID_aes_256_gcm, "", 32, 4, 8, 16, false},
    {NID_aria_128_gcm, "", 16, 4, 8, 16, false},       {NID_aria_256_gcm, "", 32, 4, 8, 16, false},
    {NID_chacha20_poly1305, "", 32, 12, 0, 16, false}, {NID_aes_128_ccm, "CCM8", 16, 4, 8, 8, true},
    {NID_aes_256_ccm, "CCM8", 32, 4, 8, 8, true},      {NID_aes_128_ccm, "", 16, 4, 8, 16, true},
    {NID_aes_256_ccm, "", 32, 4, 8, 16, true}};
enum { AEADS = sizeof aeads / sizeof *aeads };

/* NULL: another kind of suite. */
static const struct aead *aead_of(const SSL_CIPHER *suite)
{
    for (const struct aead *a = aeads; suite && a < aeads + AEADS; a++)
        if (a->nid == SSL_CIPHER_get_cipher_nid(suite) && strstr(SSL_CIPHER_get_name(suite), a->name))
            return a;
    return NULL;
}

/* An endpoint's: one context for each kind, since two of them would double the memory of a connection, and room to work in,
 * which a thread's stack may not have. Who uses it sets the key. */
struct crypt {
    EVP_CIPHER_CTX *ctx[AEADS];
    uint8_t key[AEADS][AEAD_KEY_MAX]; /* that each has: who comes next may need the same */
    bool keyed[AEADS];
    uint8_t text[RECORD_BODY_MAX + 1], out[DATAGRAM_MAX]; /* of what goes out */
    uint8_t in[DATAGRAM_MAX];                             /* what libssl is to read */
};

static void crypt_free(struct crypt *c)
{
    for (int i = 0; c && i < AEADS; i++)
        EVP_CIPHER_CTX_free(c->ctx[i]);
    if (c)
        OPENSSL_cleanse(c, sizeof *c);
    free(c);
}

/* NULL: no memory. For CCM it is made ready anew each time, since that takes lengths and tag ahead of the key. */
static EVP_CIPHER_CTX *crypt_get(struct crypt *c, const struct aead *aead, bool seals)
{
    EVP_CIPHER_CTX **ctx = &c->ctx[aead - aeads];
    bool made = !*ctx;
    if (made && !(*ctx = EVP_CIPHER_CTX_new()))
        return NULL;
    if (!made && !aead->ccm)
        return *ctx;
    if (EVP_CipherInit_ex(*ctx, EVP_get_cipherbynid(aead->nid), NULL, NULL, NULL, seals) == 1 &&
        EVP_CIPHER_CTX_ctrl(*ctx, EVP_CTRL_AEAD_SET_IVLEN, NONCE_BYTES, NULL) == 1 &&
        (!aead->ccm || EVP_CIPHER_CTX_ctrl(*ctx, EVP_CTRL_AEAD_SET_TAG, aead->tag, NULL) == 1))
        return *ctx;
    EVP_CIPHER_CTX_free(*ctx);
    *ctx = NULL;
    return NULL;
}

/* What one record's protection works on. */
struct sealing {
    const struct aead *aead;
    const uint8_t *key;
    uint8_t nonce[NONCE_BYTES], aad[23 + UINT8_MAX];
    size_t aad_len;
};

/* The key that is to be set; NULL: it is already. */
static const uint8_t *crypt_key(struct crypt *c, const struct sealing *s)
{
    size_t i = (size_t)(s->aead - aeads);
    if (c->keyed[i] && !s->aead->ccm && memcmp(c->key[i], s->key, s->aead->key) == 0)
        return NULL;
    memcpy(c->key[i], s->key, s->aead->key);
    return s->key;
}

/* From `in` to `out`, n bytes of text; the tag is behind the sealed one. */
static bool crypt_run(struct crypt *c, const struct sealing *s, bool seals, const uint8_t *in, size_t n, uint8_t *out)
{
    EVP_CIPHER_CTX *ctx = crypt_get(c, s->aead, seals);
    bool ccm = s->aead->ccm;
    uint8_t tag[TAG_MAX];
    int len;
    if (!ctx)
        return false;
    if (!seals)
        memcpy(tag, in + n, s->aead->tag);
    bool good = (seals || !ccm || EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_AEAD_SET_TAG, s->aead->tag, tag) == 1) &&
                EVP_CipherInit_ex(ctx, NULL, NULL, crypt_key(c, s), s->nonce, seals) == 1 &&
                (seals || ccm || EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_AEAD_SET_TAG, s->aead->tag, tag) == 1) &&
                (!ccm || EVP_CipherUpdate(ctx, NULL, &len, NULL, (int)n) == 1) &&
                EVP_CipherUpdate(ctx, NULL, &len, s->aad, (int)s->aad_len) == 1 &&
                EVP_CipherUpdate(ctx, out, &len, in, (int)n) == 1 &&
                ((ccm && !seals) || EVP_CipherFinal_ex(ctx, out + n, &len) == 1) &&
                (!seals || EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_AEAD_GET_TAG, s->aead->tag, out + n) == 1);
    c->keyed[s->aead - aeads] = good; /* one that failed may lack its key */
    return good;
}

/* One direction's, RFC 5246 section 6.3. */
struct record_key {
    uint8_t key[AEAD_KEY_MAX], salt[NONCE_BYTES];
};

struct record_keys {
    const struct aead *aead;
    struct record_key in, out;
    uint8_t master[MASTER_BYTES]; /* that they are made of; a handshake may come to another one, until they are */
    bool sure;                    /* they opened a record */
};

static void record_keys_free(struct record_keys *k)
{
    if (k)
        OPENSSL_cleanse(k, sizeof *k);
    free(k);
}

static bool record_keys_expand(const EVP_MD *md, const uint8_t master[MASTER_BYTES],
                               const uint8_t randoms[2][HELLO_RANDOM], uint8_t *block, size_t size)
{
    EVP_PKEY_CTX *prf = EVP_PKEY_CTX_new_id(EVP_PKEY_TLS1_PRF, NULL);
    bool good = prf && EVP_PKEY_derive_init(prf) == 1 && EVP_PKEY_CTX_set_tls1_prf_md(prf, md) == 1 &&
                EVP_PKEY_CTX_set1_tls1_prf_secret(prf, master, MASTER_BYTES) == 1 &&
                EVP_PKEY_CTX_add1_tls1_prf_seed(prf, (const uint8_t *)"key expansion", 13) == 1 &&
                EVP_PKEY_CTX_add1_tls1_prf_seed(prf, randoms[1], HELLO_RANDOM) == 1 &&
                EVP_PKEY_CTX_add1_tls1_prf_seed(prf, randoms[0], HELLO_RANDOM) == 1 &&
                EVP_PKEY_derive(prf, block, &size) == 1;
    EVP_PKEY_CTX_free(prf);
    return good;
}

/* randoms: the client's, then the server's. False: a suite of another kind, or no memory. */
static bool record_keys_make(const SSL_CIPHER *suite, const uint8_t master[MASTER_BYTES],
                             const uint8_t randoms[2][HELLO_RANDOM], bool server, struct record_keys *k)
{
    uint8_t block[2 * (AEAD_KEY_MAX + NONCE_BYTES)], *p = block;
    struct record_key *of[2] = {server ? &k->in : &k->out, server ? &k->out : &k->in}; /* a client's, a server's */
    memset(k, 0, sizeof *k);
    k->aead = aead_of(suite);
    bool good = k->aead && record_keys_expand(SSL_CIPHER_get_handshake_digest(suite), master, randoms, block,
                                              2u * (k->aead->key + k->aead->salt));
    for (int i = 0; good && i < 2; i++, p += k->aead->key)
        memcpy(of[i]->key, p, k->aead->key);
    for (int i = 0; good && i < 2; i++, p += k->aead->salt)
        memcpy(of[i]->salt, p, k->aead->salt);
    OPENSSL_cleanse(block, sizeof block);
    return good;
}

/* Those of the handshake that libssl is in, or had, and of its master secret. False: as above. */
static bool record_keys_derive(SSL *ssl, bool server, const uint8_t master[MASTER_BYTES], struct record_keys *k)
{
    uint8_t randoms[2][HELLO_RANDOM];
    const SSL_CIPHER *suite = SSL_get_pending_cipher(ssl) ? SSL_get_pending_cipher(ssl) : SSL_get_current_cipher(ssl);
    SSL_get_client_random(ssl, randoms[0], HELLO_RANDOM);
    SSL_get_server_random(ssl, randoms[1], HELLO_RANDOM);
    bool good = record_keys_make(suite, master, (const uint8_t(*)[HELLO_RANDOM])randoms, server, k);
    memcpy(k->master, master, MASTER_BYTES);
    return good;
}

/* The nonce: with an explicit part as it stands in the record, otherwise made of epoch and number. */
static void sealing_nonce(struct sealing *s, const struct record_key *key, const struct record *r)
{
    memcpy(s->nonce, key->salt, NONCE_BYTES);
    if (s->aead->explicit)
        memcpy(s->nonce + s->aead->salt, r->body, s->aead->explicit);
    for (int i = 0; !s->aead->explicit && i < 8; i++)
        s->nonce[4 + i] ^= r->start[3 + i];
}

/* What is authenticated besides the text, RFC 5246 section 6.2.3.3 and RFC 9146 section 5.3. */
static void sealing_aad(struct sealing *s, const uint8_t *header, size_t cid_len, size_t n)
{
    uint8_t *p = s->aad;
    if (header[0] == TYPE_CID) {
        memset(p, 0xff, 8);
        p[8] = p[10] = TYPE_CID;
        p[9] = (uint8_t)cid_len;
        memcpy(p + 11, header + 1, 10 + cid_len); /* version, epoch, number, connection ID */
        p += 21 + cid_len;
    } else {
        memcpy(p, header + 3, 8);
        memcpy(p + 8, header, 3);
        p += 11;
    }
    store_number(p, 2, n);
    s->aad_len = (size_t)(p + 2 - s->aad);
}

/* Opens a record: its text, to at least as many bytes as the record has. With a connection ID the true type stands behind
 * the text, and zeros behind that. False: it is not authentic, or has no type. */
static bool record_open(struct crypt *c, const struct aead *aead, const struct record_key *key, const struct record *r,
                        uint8_t *text, size_t *len, unsigned *type)
{
    struct sealing s = {.aead = aead, .key = key->key};
    size_t overhead = (size_t)aead->explicit + aead->tag;
    if (r->body_len < overhead)
        return false;
    size_t n = r->body_len - overhead;
    sealing_nonce(&s, key, r);
    sealing_aad(&s, r->start, r->header - RECORD_HEADER, n);
    if (!crypt_run(c, &s, false, r->body + aead->explicit, n, text))
        return false;
    *type = r->type;
    if (r->type == TYPE_CID) {
        while (n > 0 && text[n - 1] == 0)
            n--;
        if (n == 0)
            return false;
        *type = text[--n];
    }
    *len = n;
    return true;
}

/* Seals that text once more, with the number and so with the nonce of r: plain, or where cid is not NULL with that and the
 * type behind the text, which has room for it. Returns the record's size, 0: no memory. Of the two forms of a record only one
 * may ever be sent, since they share a nonce. */
static size_t record_seal(struct crypt *c, const struct aead *aead, const struct record_key *key,
                          const struct record *r, const uint8_t *cid, size_t cid_len, unsigned type, uint8_t *text,
                          size_t n, uint8_t *out)
{
    struct sealing s = {.aead = aead, .key = key->key};
    uint8_t *p = out + RECORD_HEADER;
    memcpy(out, r->start, RECORD_HEADER - 2);
    out[0] = (uint8_t)(cid ? TYPE_CID : type);
    if (cid) {
        memcpy(p - 2, cid, cid_len);
        p += cid_len;
        text[n++] = (uint8_t)type;
    }
    store_number(p - 2, 2, n + aead->explicit + aead->tag);
    memcpy(p, r->body, aead->explicit);
    sealing_nonce(&s, key, r);
    sealing_aad(&s, out, cid_len, n);
    p += aead->explicit;
    return crypt_run(c, &s, true, text, n, p) ? (size_t)(p - out) + n + aead->tag : 0;
}

/* The BIO: what libssl reads from and writes to. */

/* libssl sends a flight again with a datagram for each message, so that under loss one is always missing. While a flight
 * is attached its datagrams are packed instead, as many as `room` holds. One that the transport refuses then counts as
 * lost. It lies on the stack of whoever makes libssl write. */
struct flight {
    size_t len, room;
    uint8_t bytes[DTLS_MESSAGE_MAX];
};

struct wire {
    const uint8_t *in; /* the datagram or record that libssl may read next, borrowed; NULL: none */
    size_t in_len;
    bool in_peek, in_renumber;
    uint64_t in_sequence; /* next number for a record that is renumbered */
    int mtu;              /* the link's, as far as known */
    int headers;          /* what IP and UDP take of it */
    size_t largest;       /* datagram of the present flight */
    struct flight *flight;
    bool written;     /* libssl wrote a datagram since this was cleared */
    const void *text; /* of the record that libssl writes, NULL where it is not known */
    size_t text_len;
    SSL *ssl;
    struct crypt *crypt;
    struct record_keys *keys;         /* NULL: not needed yet */
    bool server;                      /* our role */
    bool cid;                         /* connection IDs were agreed upon: one of no bytes is none, in that direction */
    bool offers;                      /* a client's hello has the extension */
    bool rrc;                         /* the peer can be asked whether it is reached, RFC 9853 */
    uint8_t cid_in[1 + DTLS_CID_MAX]; /* ours, behind its length */
    uint8_t *cid_out, cid_out_len;
    unsigned as; /* the type that the next protected record gets instead of its own; 0: that */
    uint64_t newest,
        seen; /* the highest number of an authentic record, and which of the 64 up to it came, a bit each */
    int (*send)(void *owner, const void *data, size_t len);
    void *owner;
    dtls_counters *counters;
};

/* A record of this association's: with our connection ID where we have one. */
static bool wire_parse(const struct wire *w, const uint8_t *p, size_t n, struct record *r)
{
    size_t len = w->cid ? w->cid_in[0] : 0;
    if (n > 0 && p[0] == TYPE_CID)
        return len > 0 && record_parse_any(p, n, len, r) && r->epoch == 1 &&
               memcmp(p + RECORD_HEADER - 2, w->cid_in + 1, len) == 0;
    if (n > 0 && p[0] == TYPE_RRC)
        return w->rrc && len == 0 && record_parse_any(p, n, 0, r) && r->epoch == 1;
    return record_parse(p, n, r);
}

static bool wire_is_fresh(const struct wire *w, uint64_t sequence)
{
    return sequence > w->newest || (w->newest - sequence < 64 && !(w->seen >> (w->newest - sequence) & 1));
}

/* An authentic record came. */
static void wire_note(struct wire *w, uint64_t sequence)
{
    if (sequence > w->newest) {
        w->seen = sequence - w->newest < 64 ? w->seen << (sequence - w->newest) : 0;
        w->newest = sequence;
    }
    if (w->newest - sequence < 64)
        w->seen |= (uint64_t)1 << (w->newest - sequence);
}

/* The keys, as far as the handshake has got to any. They are made anew only for another master secret, since anybody who
 * saw the connection ID can ask for them. */
static bool wire_keys(struct wire *w)
{
    uint8_t master[MASTER_BYTES];
    if (w->keys && w->keys->sure)
        return true;
    const SSL_SESSION *session = SSL_get_session(w->ssl);
    if (!session || SSL_SESSION_get_master_key(session, master, sizeof master) != sizeof master)
        return false;
    if (!w->keys || CRYPTO_memcmp(w->keys->master, master, sizeof master) != 0) {
        record_keys_free(w->keys);
        w->keys = malloc(sizeof *w->keys);
        if (w->keys && !record_keys_derive(w->ssl, w->server, master, w->keys)) {
            record_keys_free(w->keys);
            w->keys = NULL;
        }
    }
    OPENSSL_cleanse(master, sizeof master);
    return w->keys != NULL;
}

/* Opens a record that came, or with `out` one that libssl wrote. */
static bool wire_open(struct wire *w, bool out, const struct record *r, uint8_t *text, size_t *len, unsigned *type)
{
    struct record_keys *k = wire_keys(w) ? w->keys : NULL;
    bool good = k && record_open(w->crypt, k->aead, out ? &k->out : &k->in, r, text, len, type);
    if (good)
        k->sure = true;
    errors_clear();
    return good;
}

/* A record that was opened, in the form that libssl knows; it reads that before another is made. False: no memory. */
static bool wire_plain(struct wire *w, const struct record *r, unsigned type, uint8_t *text, size_t n,
                       struct record *plain)
{
    uint8_t *out = w->crypt->in;
    size_t size = record_seal(w->crypt, w->keys->aead, &w->keys->in, r, NULL, 0, type, text, n, out);
    errors_clear();
    return size > 0 && record_parse(out, size, plain);
}

/* The text of a record that libssl wrote. */
static bool wire_text(struct wire *w, const struct record *r, size_t *len, unsigned *type)
{
    const struct record_keys *k = w->keys;
    if (!k || !k->sure || !w->text || r->type != TYPE_DATA ||
        r->body_len != w->text_len + k->aead->explicit + k->aead->tag)
        return wire_open(w, true, r, w->crypt->text, len, type);
    memcpy(w->crypt->text, w->text, w->text_len);
    *len = w->text_len;
    *type = r->type;
    return true;
}

/* What libssl wrote, as it goes out: protected records get the peer's connection ID. Returns its size, 0: it must not. */
static size_t wire_translate(struct wire *w, const uint8_t *p, size_t n)
{
    struct crypt *c = w->crypt;
    struct record r;
    size_t size = 0, done, len;
    unsigned type;
    for (; n > 0; p += r.size, n -= r.size, size += done) {
        if (!record_parse(p, n, &r) || r.size + w->cid_out_len + 1 > sizeof c->out - size)
            return 0;
        done = r.size;
        if (r.epoch == 0) {
            memcpy(c->out + size, p, done);
            continue;
        }
        if (!wire_text(w, &r, &len, &type))
            return 0;
        done = record_seal(c, w->keys->aead, &w->keys->out, &r, w->cid_out_len ? w->cid_out : NULL, w->cid_out_len,
                           w->as ? w->as : type, c->text, len, c->out + size);
        errors_clear();
        if (done == 0)
            return 0;
    }
    return size;
}

/* Where the form that goes out cannot be made nothing does: a record in both forms would give its key away, since they share
 * a nonce. It counts as lost. */
static int wire_send(struct wire *w, const uint8_t *p, size_t n)
{
    if (w->cid_out_len == 0 && !w->as)
        return w->send(w->owner, p, n);
    n = wire_translate(w, p, n);
    if (n > 0)
        return w->send(w->owner, w->crypt->out, n);
    w->counters->dropped[DTLS_DROP_SEND]++;
    return 0;
}

/* What fits into one datagram of a handshake; never more than any receiver's buffer for a record. */
static size_t wire_room(const struct wire *w)
{
    int n = w->mtu - w->headers;
    return (size_t)(n < DTLS_MESSAGE_MAX ? n : DTLS_MESSAGE_MAX);
}

/* small: the same flight is sent a third time, and the path's MTU may be why. */
static void flight_begin(struct wire *w, struct flight *f, bool small)
{
    size_t room = wire_room(w), more = w->cid_out_len ? 2 * (w->cid_out_len + 1u) : 0; /* of two protected records */
    room = small && FLIGHT_SMALL < room ? FLIGHT_SMALL : room;
    f->len = 0;
    f->room = room > more ? room - more : 0; /* 0: nothing is packed */
    w->flight = f;
}

static void flight_flush(struct wire *w)
{
    struct flight *f = w->flight;
    w->largest = f->len > w->largest ? f->len : w->largest;
    if (f->len > 0 && wire_send(w, f->bytes, f->len) != 0)
        w->counters->dropped[DTLS_DROP_SEND]++;
    f->len = 0;
}

static void flight_end(struct wire *w)
{
    flight_flush(w);
    w->flight = NULL;
}

static int bio_read(BIO *b, char *out, int size)
{
    struct wire *w = BIO_get_data(b);
    size_t n = w->in_len < (size_t)size ? w->in_len : (size_t)size;
    BIO_clear_retry_flags(b);
    if (!w->in || n == 0) {
        BIO_set_retry_read(b);
        return -1;
    }
    memcpy(out, w->in, n);
    if (w->in_peek)
        return (int)n;
    /* Plaintext sequence numbers prove nothing, but libssl would take a forged high one for the edge of its replay
     * window and every real record for stale. So these records are numbered as they come. */
    if (w->in_renumber) {
        store_number((uint8_t *)out + 5, 6, w->in_sequence++);
    }
    w->in = NULL;
    return (int)n;
}

static int bio_write(BIO *b, const char *data, int len)
{
    struct wire *w = BIO_get_data(b);
    struct flight *f = w->flight;
    size_t n = (size_t)len;
    BIO_clear_retry_flags(b);
    w->written = true;
    if (f && f->len + n > f->room)
        flight_flush(w);
    if (f && n <= f->room) {
        memcpy(f->bytes + f->len, data, n);
        f->len += n;
        return len;
    }
    if (f)
        w->largest = n > w->largest ? n : w->largest;
    if (wire_send(w, (const uint8_t *)data, n) == 0)
        return len;
    if (f) { /* libssl must not keep the rest of a flight: lost, and sent again as if the network had */
        w->counters->dropped[DTLS_DROP_SEND]++;
        return len;
    }
    BIO_set_retry_write(b);
    return -1;
}

/* A flight was lost twice: that may be the path's doing, which drops what is too large for it. False: this flight is small,
 * and its loss tells nothing about the path. libssl would ask for a smaller MTU only one timeout later, and then for small
 * flights, too, even on an open connection, where the peer repeats its Finished; so it is told that there is none. */
static bool wire_fall_back(struct wire *w)
{
    int size = (int)w->largest + w->headers, less = size > MTU_FALLBACK_1 ? MTU_FALLBACK_1 : MTU_FALLBACK_2;
    if (size <= less || w->mtu <= less)
        return false;
    w->mtu = less;
    w->largest = 0;
    return true;
}

/* What libssl asks of a datagram BIO. It reads an unexpected answer as a size or a flag, so the default is 0. */
static long bio_ctrl(BIO *b, int cmd, long num, void *ptr)
{
    struct wire *w = BIO_get_data(b);
    (void)ptr;
    switch (cmd) {
    case BIO_CTRL_FLUSH:
        return 1;
    case BIO_CTRL_PENDING:
        return w->in ? (long)w->in_len : 0;
    case BIO_CTRL_EOF:
        return w->in == NULL;
    case BIO_CTRL_DGRAM_QUERY_MTU:
    case BIO_CTRL_DGRAM_GET_FALLBACK_MTU:
        return (long)wire_room(w);
    case BIO_CTRL_DGRAM_GET_MTU_OVERHEAD:
        return w->headers;
    case BIO_CTRL_DGRAM_SET_PEEK_MODE:
        w->in_peek = num != 0;
        return 1;
    default: /* SET_NEXT_TIMEOUT, SET_CONNECTED, GET_PEER, SET_PEER, WPENDING, PUSH, POP, GET_KTLS_SEND (73) and _RECV
                (76), and whatever comes: we know our peer and our timer ourselves, nothing waits, no KTLS */
        return 0;
    }
}

static BIO_METHOD *bio_method_new(void)
{
    /* A fixed number: BIO_get_new_index() hands out a bounded supply for the whole process. libssl does not look. */
    BIO_METHOD *m = BIO_meth_new(BIO_TYPE_SOURCE_SINK | 0x7d, "dtls.c datagram");
    if (m && BIO_meth_set_read(m, bio_read) && BIO_meth_set_write(m, bio_write) && BIO_meth_set_ctrl(m, bio_ctrl))
        return m;
    BIO_meth_free(m);
    return NULL;
}

/* ==== 6. peers ==================================================================================================== */

enum {
    NAME_MAX_BYTES = 256, /* ub-common-name, RFC 5280 appendix A: 64 characters, of at most four bytes each */
    SHA256_BYTES = 32,
    REASON_BYTES = 256,
    LINE_BYTES = 256, /* of a line in the log, behind the address */
    COOKIE_SECRET = 32,
    INBOX_BYTES = 32768, /* of datagrams that wait for a handshake's turn: two large flights */
    YOUNG_MS = 3000,     /* for so long a handshake may keep its place, where its source has no more than others */
    KINDS = 16,          /* of lines that strangers cause, */
    KIND_LOGGED = 5,     /* so many of each are logged, */
    KIND_MS = 10000,     /* and the number of the others, once in this time */
    WALKS_MAX = 64,
    WALK_STEP = 16,     /* connections, before others have their turn */
    PATHS_ASKED = 3,    /* times, whether a peer is at its new address, before its next record is waited for */
    SAME_MAX = 4,       /* associations that moved to one address and are looked at */
    CID_BYTES = 8,      /* of a server's connection ID */
    UNPROVEN_FACTOR = 3 /* so much may be sent of what came from an unproven address: RFC 9146 section 6 */
};

struct association;

/* A deadline: when it is due (microseconds; INT64_MAX: not as things are), and what happens then. */
struct rule {
    int64_t (*due)(const struct association *a);
    void (*then)(struct association *a, int64_t now);
};

/* What an association does in its handshake, and what it does when it is open. */
struct phase {
    const struct rule *rules;                                         /* its deadlines, in the order of their rank */
    void (*input)(struct association *a, const uint8_t *p, size_t n); /* what to do with a datagram that arrives, */
    /* and with one that waited for its turn: does one piece of work, and returns how many bytes are done with. */
    size_t (*work)(struct association *a, const uint8_t *p, size_t n);
    void (*failed)(struct association *a, int error); /* the system reports an error on its own socket */
};

/* What may still be done under an association's keys. */
struct key_use {
    bool by_bytes;    /* otherwise by records */
    uint64_t out, in; /* protected, in each direction, and */
    uint64_t forged;  /* refused */
};

/* A datagram that waits for its association's turn. */
struct letter {
    struct letter *next;
    size_t len, at; /* what stands before `at` is done with */
    uint8_t data[];
};

/* Where strangers come from: an IPv4 address or an IPv6 /64, and above it the /48 that this is part of. A server gives
 * each its share of the handshakes and of the connections. It lives while it has any of them, or is above one that has. */
struct source {
    struct entry entry;
    struct source *above;       /* NULL: an IPv4 address or a /48 */
    struct source *prev, *next; /* those with handshakes, but for /48s */
    uint8_t prefix[16];
    uint8_t prefix_bytes;
    size_t refs;                            /* associations, and sources below it */
    size_t handshakes, open;                /* a /48 has the sum */
    struct association *first[3], *last[3]; /* in their handshake, by age: those that sent nothing behind their
                                             * ClientHello, and the others; and open ones that nothing tells apart */
};

/* The way of a datagram: the peer's address, ours, and the socket; NULL: a transport of the user's own. */
struct path {
    dtls_addr peer, local;
    struct udp *udp;
};

enum move_check { CHECK_NONE, CHECK_OLD, CHECK_NEW };

/* The last change of an association's path. A server's: where its peer was before, for KEEP_MS, and what may be sent to where
 * it is now, until that is proven. A client's: its socket of before, through which answers may still come. */
struct move {
    struct entry entry; /* by the peer's old address; a server's */
    struct association *a;
    struct path old; /* proven, while a server's new one is not */
    int64_t at;
    uint64_t sequence;         /* of the record that showed it */
    uint64_t in, out;          /* bytes of authentic records from the new address, and bytes that went there */
    bool proven, kept, roamed; /* kept: the old one is in the table; roamed: that is not where its handshake was */
    enum move_check check;     /* which one was asked whether the peer is there, RFC 9853, */
    uint8_t cookies[1 + PATHS_ASKED][8]; /* with these: the first to the old one */
    unsigned sent;                       /* a bit for each of them */
    int64_t asked_at;
    unsigned asked; /* times */
};

/* One DTLS association: an SSL, the BIO beneath it, the addresses and the socket that it speaks through, its deadlines.
 * It begins with a handshake, whose data hang on it until it opens. A connection has one that is open, or some that it
 * tries, or both; the first of these to open takes over, and the others are let go: nothing moves, but a pointer.
 *
 * Who frees it: the connection's end or the one that took over buries it, the end of the turn frees it. Its SSL, its
 * handshake and, where it is a client's own, its socket go with it. */
struct association {
    struct object object;
    dtls_endpoint *ep;
    dtls_conn *conn;           /* NULL: the endpoint's spare one, which answers ClientHellos */
    struct association *older; /* of the connection's tries, the next one */
    struct entry entry;
    bool listed, ended; /* listed: in the table */
    SSL *ssl;
    struct wire wire;
    struct udp *udp; /* the socket it speaks through; NULL: a transport of the user's own */
    dtls_addr peer, local;
    struct timer timer;
    const struct phase *phase;   /* NULL: none, it is spare or has ended */
    struct handshake *handshake; /* NULL: it is open, or spare */
    struct job job;              /* a deadline that is due, or datagrams of its handshake */
    bool due;
    struct letter *inbox, **inbox_last;
    size_t inbox_bytes;
    struct source *source; /* a server's; it is among the source's handshakes or its open ones */
    struct association *source_prev, *source_next;
    struct entry cid_entry, mark_entry;
    bool cid_listed, mark_listed,       /* it is found by its connection ID; by what its nonces have in common, */
        blind;                          /* or by trying its keys: then it is among those of its source */
    bool roamed;                        /* it is not where its handshake was */
    struct move *move;                  /* NULL: none, or long ago */
    const struct record *record;        /* at hand; NULL: none */
    const struct path *from;            /* of the datagram at hand, where that is not its own path; NULL: it is */
    const struct path *via;             /* what it sends leaves by this one; NULL: by its own */
    int64_t asked_at, rebound_at;       /* a client's, in silence: it asked its peer, and took another port */
    bool lost;                          /* a client's: the system says that its address or its way is gone */
    bool shown;                         /* the peer sent more than its ClientHello */
    bool authentic;                     /* something was, of what came since this was cleared */
    uint8_t hello_random[HELLO_RANDOM]; /* of the peer's ClientHello or ServerHello */
    size_t overhead, message_max;       /* of the suite's records, and what one may carry, once it is open */
    struct key_use keys;
    struct identity *identity; /* whom the handshake found, until it opens, and */
    const SSL_CTX *made_with;  /* the trust of its SSL */
    bool refused;              /* that peer; why: */
    char *refusal;
    bool buffers;    /* libssl's record buffers are there, and */
    int64_t used_at; /* when they were used last */
};

enum conn_state { CONN_CONNECTING, CONN_OPEN, CONN_CLOSED };

/* What a client's connection needs while it has tries. */
struct dial {
    struct lookup *lookup; /* NULL: the addresses are known */
    dtls_addr addrs[ADDRS_MAX], local;
    unsigned addrs_len, addrs_tried;
    int64_t since, next_at; /* next_at: the next address is tried */
    SSL_SESSION *session;   /* to resume */
    dtls_reason fault;      /* why a try was given up, and in words */
    char fault_text[REASON_BYTES];
    char warning[REASON_BYTES]; /* what an insecure client would have refused */
};

/* What the application knows: one peer, whatever associations it takes. All times are microseconds. */
struct dtls_conn {
    struct object object;
    dtls_endpoint *ep;
    uint64_t serial;
    dtls_conn *prev, *next;           /* the endpoint's list; an ended one's next stays, for those who walk it */
    struct association *open, *tries; /* they stay when it ends, to be asked until it is gone; the newest try first */
    struct dial *dial;                /* NULL: a server's, or it is open and tries nothing */
    enum conn_state state;
    bool server, resumed;
    bool unanswered; /* something was sent, and nothing authentic came since */
    bool doubted;    /* ICMP says that nobody is there any more; anybody can forge that */
    bool waits;      /* the application was told DTLS_ERR_AGAIN; it is on the endpoint's list */
    bool paced;      /* the round-trip time was known before its present handshake */
    char *name;      /* a client expects it in the certificate; NULL: the peer's IP address */
    int64_t started, last_in, idle_raised, unanswered_at, renewed_at;
    int64_t round_trip_us; /* the quickest answer in its handshakes; 0: not known */
    uint64_t messages_in, messages_out, bytes_in, bytes_out, resends;
    unsigned renewals, moves;
    dtls_reason reason;
    char *text;                /* why it ended; NULL: it did not, or there was no memory for it */
    struct identity *identity; /* NULL: none is known */
    void *user;
};

/* Whom a certificate names: one for all its connections. */
struct identity {
    struct entry entry;
    size_t refs, open; /* connections that know it, and those of them that are open */
    uint8_t fingerprint[SHA256_BYTES];
    char hex[2 * SHA256_BYTES + 1]; /* the same as text; "" for a pre-shared key */
    char *name, *serial;
    const char **alt_names; /* ends with NULL; the texts stand behind it */
};

/* Who we are and whom we trust. */
struct trust {
    SSL_CTX *ctx;
    SSL_CTX **named; /* with further certificates */
    size_t named_len;
    char *alpn; /* protocols, each with a zero behind it; an empty one ends them */
    char *psk_identity;
    uint8_t psk_key[DTLS_PSK_MAX];
    size_t psk_key_len;
    uint8_t id[SSL_MAX_SID_CTX_LENGTH]; /* random: sessions are good with this trust only */
    time_t since;                       /* older sessions are of another trust; 0: there was none */
};

/* A session that a server keeps for resumption, without the chain of certificates. */
struct session {
    struct entry entry;
    struct session *newer, *older;
    SSL_SESSION *session;
};

/* Somebody who wants to see all connections, some in each turn. */
struct walk {
    struct object object;
    struct job job;
    dtls_endpoint *ep;
    dtls_conn *at;   /* the next one; NULL: there are no more */
    uint64_t serial; /* of the last one */
    bool over;
    void (*fn)(dtls_conn *conn, void *user);
    void *user;
};

/* One kind of line that strangers cause: how many were logged, and how many are only counted. */
struct kind {
    uint64_t hash;
    unsigned logged, more; /* logged 0: free */
    int64_t since;
    dtls_log level;
    dtls_addr last;
    char text[LINE_BYTES];
};

struct dtls_endpoint {
    struct object object;
    dtls_loop *loop;
    dtls_config cfg;
    struct trust trust;
    BIO_METHOD *bio_method;
    BIO_ADDR *listen_addr;     /* DTLSv1_listen insists on one */
    struct association *spare; /* answers ClientHellos; becomes a connection's once a cookie proves right */
    bool listening, closed;
    bool inside; /* in the middle of OpenSSL's work: a callback of the user's may call nothing that enters it again */
    struct object sockets;
    dtls_conn *first, *last;
    uint64_t serials;
    struct object walks;
    size_t walks_len;
    struct object waiting; /* connections whose application waits until it can send again */
    struct table associations, sources, identities, sessions, cids, marks, moves;
    struct crypt *crypt;
    uint8_t cid_prefix[DTLS_CID_MAX];
    int64_t trials_at; /* of roam_trials, so many are left in the second since then */
    int trials_left;
    struct session *newest, *oldest;
    size_t sessions_len;
    struct source *crowd; /* the first source with handshakes */
    struct kind kinds[KINDS];
    struct timer kinds_timer;
    uint8_t secret[2][COOKIE_SECRET]; /* this one and the one before */
    int64_t secret_at;
    dtls_counters counters;
};

static bool at_limit(size_t count, int limit)
{
    return limit != DTLS_NEVER && count >= (size_t)limit;
}

static void ep_count(dtls_endpoint *ep, dtls_drop reason)
{
    ep->counters.dropped[reason]++;
}

const char *dtls_drop_name(dtls_drop reason)
{
    static const char *const names[DTLS_DROP_COUNT] = {"malformed", "oversize", "stranger", "hello", "limit",
                                                       "epoch",     "short",    "alert",    "data",  "handshake",
                                                       "early",     "send",     "DTLS 1.3", "CID"};
    return (unsigned)reason < DTLS_DROP_COUNT ? names[reason] : "unknown";
}

/* Sources. */

static uint64_t source_key(const dtls_endpoint *ep, const dtls_addr *a, uint8_t bytes, uint8_t key[17])
{
    memset(key, 0, 17);
    memcpy(key, a->ip, bytes);
    key[16] = bytes;
    return table_hash(&ep->sources, key, 17);
}

static struct source *source_find_prefix(const dtls_endpoint *ep, const dtls_addr *a, uint8_t bytes)
{
    uint8_t key[17];
    struct entry *e = table_first(&ep->sources, source_key(ep, a, bytes, key));
    for (; e; e = table_next(e)) {
        struct source *s = OWNER_OF(struct source, entry, e);
        if (s->prefix_bytes == bytes && memcmp(s->prefix, key, 16) == 0)
            return s;
    }
    return NULL;
}

/* NULL: it has neither handshakes nor connections. */
static struct source *source_find(const dtls_endpoint *ep, const dtls_addr *a)
{
    return source_find_prefix(ep, a, a->family == 4 ? 4 : 8);
}

static struct source *source_get(dtls_endpoint *ep, const dtls_addr *a, uint8_t bytes)
{
    uint8_t key[17];
    struct source *s = source_find_prefix(ep, a, bytes);
    if (s || !(s = calloc(1, sizeof *s)))
        return s;
    uint64_t hash = source_key(ep, a, bytes, key);
    memcpy(s->prefix, key, 16);
    s->prefix_bytes = bytes;
    table_add(&ep->sources, &s->entry, hash);
    return s;
}

static void source_release(dtls_endpoint *ep, struct source *s)
{
    while (s && s->refs == 0) {
        struct source *above = s->above;
        table_remove(&ep->sources, &s->entry);
        free(s);
        if (above)
            above->refs--;
        s = above;
    }
}

/* That of an address, made if need be; who does not keep it releases it. NULL: no memory. */
static struct source *source_of(dtls_endpoint *ep, const dtls_addr *a)
{
    struct source *s = source_get(ep, a, a->family == 4 ? 4 : 8);
    if (s && a->family != 4 && !s->above) {
        s->above = source_get(ep, a, 6);
        if (!s->above) {
            source_release(ep, s);
            return NULL;
        }
        s->above->refs++;
    }
    return s;
}

/* Which of its source's lists it is in. */
static int source_list(const struct association *a)
{
    return a->blind ? 2 : a->shown;
}

static void source_link(struct association *a)
{
    struct source *s = a->source;
    int list = source_list(a);
    struct association *first = s->first[list];
    bool oldest = first && !a->blind && a->used_at < first->used_at;
    a->source_prev = oldest ? NULL : s->last[list];
    a->source_next = oldest ? first : NULL;
    *(a->source_prev ? &a->source_prev->source_next : &s->first[list]) = a;
    *(a->source_next ? &a->source_next->source_prev : &s->last[list]) = a;
}

static void source_unlink(struct association *a)
{
    struct source *s = a->source;
    int list = source_list(a);
    *(a->source_prev ? &a->source_prev->source_next : &s->first[list]) = a->source_next;
    *(a->source_next ? &a->source_next->source_prev : &s->last[list]) = a->source_prev;
}

static void source_count(struct association *a, bool begins)
{
    struct source *s = a->source;
    dtls_endpoint *ep = a->ep;
    size_t change = begins ? 1 : (size_t)-1, was = s->handshakes;
    s->handshakes += change;
    if (s->above)
        s->above->handshakes += change;
    if (was == 0) {
        s->prev = NULL;
        s->next = ep->crowd;
        ep->crowd = s;
        if (s->next)
            s->next->prev = s;
    } else if (s->handshakes == 0) {
        *(s->prev ? &s->prev->next : &ep->crowd) = s->next;
        if (s->next)
            s->next->prev = s->prev;
    }
}

/* A handshake begins. */
static void source_join(struct association *a, struct source *s)
{
    a->source = s;
    s->refs++;
    source_link(a);
    source_count(a, true);
}

/* The peer sent something behind its ClientHello. */
static void source_shown(struct association *a)
{
    if (!a->source || a->shown)
        return;
    source_unlink(a);
    a->shown = true;
    source_link(a);
}

static void source_opened(struct association *a)
{
    if (!a->source)
        return;
    source_unlink(a);
    source_count(a, false);
    a->source->open++;
}

/* Whether an open one is found by trying the keys of all that are. */
static void source_set_blind(struct association *a, bool blind)
{
    if (!a->source || a->blind == blind)
        return;
    if (a->blind)
        source_unlink(a);
    a->blind = blind;
    if (blind)
        source_link(a);
}

/* It was tried: others come first from now on. */
static void source_tried(struct association *a)
{
    source_unlink(a);
    source_link(a);
}

static void source_leave(struct association *a)
{
    struct source *s = a->source;
    if (!s)
        return;
    if (a->handshake) {
        source_unlink(a);
        source_count(a, false);
    } else {
        source_set_blind(a, false);
        s->open--;
    }
    a->source = NULL;
    s->refs--;
    source_release(a->ep, s);
}

/* An open one's peer is there, as it said itself when it was asked: it counts there, if there is a place, and otherwise where
 * it did. Other proofs are none against the peer, who could fill others' places. */
static void source_move(struct association *a, const dtls_addr *peer)
{
    dtls_endpoint *ep = a->ep;
    struct source *s = a->source && a->wire.rrc ? source_of(ep, peer) : NULL;
    bool blind = a->blind;
    if (!s || s == a->source)
        return;
    if (at_limit(s->open, ep->cfg.max_conns_per_address)) {
        source_release(ep, s);
        return;
    }
    s->refs++;
    s->open++;
    source_leave(a);
    a->source = s;
    source_set_blind(a, blind);
}

static size_t source_weight(const struct source *s)
{
    return s->above ? s->above->handshakes : s->handshakes;
}

/* Whose handshake gives way to a newcomer's: the source with most, and of its handshakes the oldest one that showed
 * least. NULL: the newcomer gives way. It does where its own source has as many, unless the other one had its time:
 * otherwise a crowd that comes at once would throw out those who are about to succeed. */
static struct association *source_victim(const dtls_endpoint *ep, const struct source *newcomer)
{
    const struct source *most = NULL;
    for (const struct source *s = ep->crowd; s; s = s->next) {
        size_t weight = source_weight(s), heaviest = most ? source_weight(most) : 0;
        if (weight > heaviest || (weight == heaviest && s->handshakes > most->handshakes))
            most = s;
    }
    if (!most)
        return NULL;
    struct association *oldest = most->first[0] ? most->first[0] : most->first[1];
    bool fairer = source_weight(most) > source_weight(newcomer) + 1 ||
                  (most->above && most->above == newcomer->above && most->handshakes > newcomer->handshakes + 1);
    bool had_its_time = most->first[0] && ep->loop->now - oldest->used_at > us(YOUNG_MS);
    return fairer || had_its_time ? oldest : NULL;
}

/* Identities. */

/* Text that grows; with `to` NULL it is only measured. */
struct text {
    char *to;
    size_t len;
};

static void text_put(struct text *t, char c)
{
    if (t->to)
        t->to[t->len] = c;
    t->len++;
}

/* Names may hold anything. What could break a line, obey a terminal or be taken for an escape is written as one, so that
 * different names stay different. */
static void text_put_name(struct text *t, const char *kind, const uint8_t *p, size_t n, bool utf8)
{
    static const char digits[] = "0123456789abcdef";
    while (*kind)
        text_put(t, *kind++);
    for (size_t i = 0; i < n; i++) {
        bool c1 = (p[i] == 0xc2 && i + 1 < n && p[i + 1] < 0xa0) || (i > 0 && p[i - 1] == 0xc2 && p[i] < 0xa0);
        if (p[i] < 0x20 || p[i] == 0x7f || c1 || (!utf8 && p[i] >= 0x80) || p[i] == '\\') {
            text_put(t, '\\');
            text_put(t, 'x');
            text_put(t, digits[p[i] >> 4]);
            text_put(t, digits[p[i] & 15]);
        } else {
            text_put(t, (char)p[i]);
        }
    }
    text_put(t, 0);
}

static void text_put_alt_name(struct text *t, const GENERAL_NAME *name)
{
    char ip[INET6_ADDRSTRLEN] = "?";
    int kind;
    const ASN1_STRING *value = GENERAL_NAME_get0_value(name, &kind);
    const uint8_t *p = ASN1_STRING_get0_data(value);
    size_t n = (size_t)ASN1_STRING_length(value);
    if (kind == GEN_IPADD) {
        inet_ntop(n == 4 ? AF_INET : AF_INET6, p, ip, sizeof ip);
        text_put_name(t, "IP:", (const uint8_t *)ip, strlen(ip), false);
    } else {
        text_put_name(t, kind == GEN_DNS ? "DNS:" : kind == GEN_URI ? "URI:" : "email:", p, n, false);
    }
}

/* Other kinds of names have no common text form. */
static bool alt_name_is_known(const GENERAL_NAME *name)
{
    int kind;
    const ASN1_STRING *value = GENERAL_NAME_get0_value(name, &kind);
    int n = kind == GEN_IPADD ? ASN1_STRING_length(value) : 0;
    return kind == GEN_DNS || kind == GEN_URI || kind == GEN_EMAIL || n == 4 || n == 16;
}

/* The subjectAltNames; to be freed with GENERAL_NAMES_free(). False: they cannot be read, or there is no memory. */
static bool alt_names_get(X509 *cert, GENERAL_NAMES **names)
{
    int critical = -1; /* stays so if there are none */
    *names = X509_get_ext_d2i(cert, NID_subject_alt_name, &critical, NULL);
    return *names || critical == -1;
}

/* Each with a zero behind it, and where each begins, if `at` is not NULL. Returns their number. */
static size_t alt_names_put(struct text *t, const GENERAL_NAMES *names, const char **at)
{
    size_t count = 0;
    for (int i = 0; i < sk_GENERAL_NAME_num(names); i++) {
        const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
        if (!alt_name_is_known(name))
            continue;
        if (at)
            at[count] = t->to + t->len;
        count++;
        text_put_alt_name(t, name);
    }
    return count;
}

/* The commonName as UTF-8, "" if there is none; to be freed with OPENSSL_free(). A negative length: it cannot be read, or
 * is too long; a peer must not pass for one without a name. */
static uint8_t *common_name(X509 *cert, int *len)
{
    int at = X509_NAME_get_index_by_NID(X509_get_subject_name(cert), NID_commonName, -1);
    uint8_t *utf8 = NULL;
    *len = 0;
    if (at >= 0)
        *len =
            ASN1_STRING_to_UTF8(&utf8, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(X509_get_subject_name(cert), at)));
    if (*len > NAME_MAX_BYTES)
        *len = -1;
    return utf8;
}

/* Room for `size` bytes of texts, and for that many of them, the name first. NULL: no memory. */
static struct identity *identity_alloc(size_t count, size_t size, struct text *text)
{
    struct identity *id = calloc(1, sizeof *id);
    if (id)
        id->alt_names = calloc(1, (count + 1) * sizeof *id->alt_names + size);
    if (!id || !id->alt_names) {
        free(id);
        return NULL;
    }
    *text = (struct text){.to = (char *)(id->alt_names + count + 1)};
    id->name = text->to;
    return id;
}

/* NULL: no memory, or a name that cannot be shown whole. */
static struct identity *identity_of_cert(X509 *cert, const uint8_t digest[SHA256_BYTES])
{
    struct text text = {0};
    GENERAL_NAMES *names;
    int len;
    uint8_t *name = common_name(cert, &len);
    bool good = alt_names_get(cert, &names) && len >= 0;
    struct identity *id = NULL;
    BIGNUM *number = ASN1_INTEGER_to_BN(X509_get0_serialNumber(cert), NULL);
    char *serial = number ? BN_bn2hex(number) : NULL;
    if (good && serial) {
        text_put_name(&text, "", name, (size_t)len, true);
        size_t count = alt_names_put(&text, names, NULL);
        id = identity_alloc(count, text.len + strlen(serial) + 1, &text);
    }
    if (id) {
        text_put_name(&text, "", name, (size_t)len, true);
        alt_names_put(&text, names, id->alt_names);
        id->serial = text.to + text.len;
        memcpy(id->serial, serial, strlen(serial) + 1);
        for (size_t i = 0; i < SHA256_BYTES; i++)
            snprintf(id->hex + 2 * i, 3, "%02x", digest[i]);
    }
    OPENSSL_free(serial);
    BN_free(number);
    GENERAL_NAMES_free(names);
    OPENSSL_free(name);
    return id;
}

static struct identity *identity_of_psk(const char *name)
{
    struct text text = {0};
    text_put_name(&text, "", (const uint8_t *)name, strlen(name), true);
    struct identity *id = identity_alloc(0, text.len + 1, &text);
    if (id) {
        text_put_name(&text, "", (const uint8_t *)name, strlen(name), true);
        id->serial = text.to + text.len; /* "" */
    }
    return id;
}

/* Of a certificate, or where that is NULL of a pre-shared key's identity: the one that is there, or a new one. The caller has
 * a reference. NULL: no memory, or no name. */
static struct identity *identity_get(dtls_endpoint *ep, X509 *cert, const char *psk)
{
    uint8_t digest[EVP_MAX_MD_SIZE];
    unsigned len;
    struct identity *id = NULL;
    if (cert ? X509_digest(cert, EVP_sha256(), digest, &len) != 1
             : EVP_Digest(psk, strlen(psk), digest, &len, EVP_sha256(), NULL) != 1)
        return NULL;
    uint64_t hash = table_hash(&ep->identities, digest, SHA256_BYTES);
    for (struct entry *e = table_first(&ep->identities, hash); e && !id; e = table_next(e)) {
        id = OWNER_OF(struct identity, entry, e);
        if (memcmp(id->fingerprint, digest, SHA256_BYTES) != 0)
            id = NULL;
    }
    if (!id && (id = cert ? identity_of_cert(cert, digest) : identity_of_psk(psk)) != NULL) {
        memcpy(id->fingerprint, digest, SHA256_BYTES);
        table_add(&ep->identities, &id->entry, hash);
    }
    if (id)
        id->refs++;
    return id;
}

static void identity_release(dtls_endpoint *ep, struct identity *id)
{
    if (!id || --id->refs > 0)
        return;
    table_remove(&ep->identities, &id->entry);
    free(id->alt_names);
    free(id);
}

/* Sessions that a server keeps. Not in libssl's own cache: that keeps the peer's whole chain with each, which may be fifty
 * times as much, and forgets a session whenever a handshake that resumes it fails, which anybody can bring about. */

static uint64_t session_hash(const dtls_endpoint *ep, const uint8_t *id, unsigned len)
{
    return table_hash(&ep->sessions, id, len);
}

static struct session *session_find(const dtls_endpoint *ep, const uint8_t *id, unsigned len)
{
    struct entry *e = table_first(&ep->sessions, session_hash(ep, id, len));
    for (; e; e = table_next(e)) {
        struct session *s = OWNER_OF(struct session, entry, e);
        unsigned its_len;
        const uint8_t *its_id = SSL_SESSION_get_id(s->session, &its_len);
        if (its_len == len && memcmp(its_id, id, len) == 0)
            return s;
    }
    return NULL;
}

static void session_drop(dtls_endpoint *ep, struct session *s)
{
    *(s->newer ? &s->newer->older : &ep->newest) = s->older;
    *(s->older ? &s->older->newer : &ep->oldest) = s->newer;
    ep->sessions_len--;
    table_remove(&ep->sessions, &s->entry);
    SSL_SESSION_free(s->session);
    free(s);
}

/* Takes the session over; what is too many goes, the oldest first. */
static void session_keep(dtls_endpoint *ep, SSL_SESSION *session)
{
    unsigned len;
    const uint8_t *id = SSL_SESSION_get_id(session, &len);
    struct session *s = calloc(1, sizeof *s);
    if (!s) {
        SSL_SESSION_free(session);
        return;
    }
    s->session = session;
    s->older = ep->newest;
    *(s->older ? &s->older->newer : &ep->oldest) = s;
    ep->newest = s;
    table_add(&ep->sessions, &s->entry, session_hash(ep, id, len));
    ep->sessions_len++;
    while (ep->sessions_len > (size_t)ep->cfg.session_cache)
        session_drop(ep, ep->oldest);
}

static void session_forget(dtls_endpoint *ep, const SSL *ssl)
{
    SSL_SESSION *session = SSL_get_session(ssl);
    unsigned len = 0;
    const uint8_t *id = session ? SSL_SESSION_get_id(session, &len) : NULL;
    struct session *s = id ? session_find(ep, id, len) : NULL;
    if (s)
        session_drop(ep, s);
}

/* The log. Each line is about a peer: its address, then what happened. */

static void ep_log(const dtls_endpoint *ep, dtls_log level, const dtls_addr *peer, const char *text)
{
    const dtls_config *cfg = &ep->cfg;
    char line[512], addr[DTLS_ADDR_TEXT];
    if (!cfg->on_log)
        return;
    if (peer->family || peer->port)
        snprintf(line, sizeof line, "%s %s", dtls_addr_format(peer, addr, sizeof addr), text);
    else /* its name is still looked up */
        snprintf(line, sizeof line, "%s", text);
    cfg->on_log(cfg->user, level, line);
}

/* Lines that differ only in numbers are of one kind. */
static uint64_t kind_hash(const dtls_endpoint *ep, const char *text)
{
    uint8_t words[LINE_BYTES];
    size_t n = 0;
    for (; *text && n < sizeof words; text++) {
        text += *text == '[' ? strcspn(text, "]") : 0; /* an IPv6 address */
        if (!*text)
            break;
        if (*text < '0' || *text > '9')
            words[n++] = (uint8_t)*text;
    }
    return table_hash(&ep->associations, words, n);
}

/* The kind of a line; with more kinds than places the last place is for all others. */
static struct kind *kind_find(dtls_endpoint *ep, uint64_t hash)
{
    struct kind *found = NULL;
    for (struct kind *k = ep->kinds; k < ep->kinds + KINDS; k++)
        if (k->logged > 0 ? k->hash == hash : !found)
            found = k;
    return found ? found : &ep->kinds[KINDS - 1];
}

/* Says how many lines of the kind were not logged; false: none, and the next one is news again. */
static bool kind_sum_up(dtls_endpoint *ep, struct kind *k, int64_t now)
{
    char text[LINE_BYTES + 64];
    unsigned more = k->more;
    if (more > 0) {
        snprintf(text, sizeof text, "and %u more in %.1f s: %s", more, (double)(now - k->since) / 1e6, k->text);
        k->more = 0;
        k->since = now;
        ep_log(ep, k->level, &k->last, text);
    }
    return more > 0;
}

static void kinds_sum_up(void *user)
{
    dtls_endpoint *ep = user;
    int64_t now = loop_now(ep->loop), next = INT64_MAX;
    for (struct kind *k = ep->kinds; k < ep->kinds + KINDS; k++) {
        if (k->logged > 0 && (ep->closed || now >= k->since + us(KIND_MS)) && !kind_sum_up(ep, k, now))
            k->logged = 0;
        if (k->logged > 0)
            next = earlier(next, k->since + us(KIND_MS));
    }
    if (next < INT64_MAX && !ep->closed)
        timer_set(ep->loop, &ep->kinds_timer, next);
}

/* Whoever can send datagrams can cause these lines, so their number has a bound. */
static void ep_log_stranger(dtls_endpoint *ep, dtls_log level, const dtls_addr *peer, const char *text)
{
    uint64_t hash = kind_hash(ep, text);
    struct kind *k = kind_find(ep, hash);
    if (!ep->cfg.on_log)
        return;
    if (k->logged == 0) {
        *k = (struct kind){.hash = hash, .since = loop_now(ep->loop)};
        if (!ep->kinds_timer.slot)
            timer_set(ep->loop, &ep->kinds_timer, k->since + us(KIND_MS));
    }
    if (k->logged < KIND_LOGGED) {
        k->logged++;
        ep_log(ep, level, peer, text);
        return;
    }
    k->more++;
    k->level = level;
    k->last = *peer;
    snprintf(k->text, sizeof k->text, "%s", text);
}

/* ==== 7. connection =============================================================================================== */

/* The table of associations: by the peer's address, and compared by both addresses, since one peer may talk to two of
 * ours from one port. The newest of those with the same addresses comes first: behind a restarted client's handshake
 * stands its old association. */

static uint64_t assoc_hash(const struct table *t, const dtls_addr *peer)
{
    uint8_t key[ADDR_PACKED];
    addr_pack(peer, key);
    return table_hash(t, key, sizeof key);
}

static struct association *assoc_match(struct entry *e, const dtls_addr *peer, const dtls_addr *local)
{
    for (; e; e = table_next(e)) {
        struct association *a = OWNER_OF(struct association, entry, e);
        if (dtls_addr_equal(&a->peer, peer) && dtls_addr_equal(&a->local, local))
            return a;
    }
    return NULL;
}

static struct association *assoc_find(const dtls_endpoint *ep, const dtls_addr *peer, const dtls_addr *local)
{
    return assoc_match(table_first(&ep->associations, assoc_hash(&ep->associations, peer)), peer, local);
}

static struct association *assoc_next_same(const struct association *a)
{
    return assoc_match(table_next(&a->entry), &a->peer, &a->local);
}

static void assoc_list(struct association *a)
{
    table_add(&a->ep->associations, &a->entry, assoc_hash(&a->ep->associations, &a->peer));
    a->listed = true;
}

static void assoc_unlist(struct association *a)
{
    if (a->listed)
        table_remove(&a->ep->associations, &a->entry);
    a->listed = false;
}

/* The first open one of those at the same addresses, from this one on. */
static struct association *assoc_open_same(struct association *a)
{
    while (a && a->handshake)
        a = assoc_next_same(a);
    return a;
}

/* The one whose place a new one takes, from this one on. Not one that moved there: who copies a record could bring that
 * about. */
static struct association *assoc_native(struct association *a)
{
    a = assoc_open_same(a);
    while (a && a->roamed)
        a = assoc_open_same(assoc_next_same(a));
    return a;
}

static struct association *assoc_predecessor(const struct association *a)
{
    return assoc_native(assoc_next_same(a));
}

/* One that moved comes to its address. Whoever is there stays, also where that is only somebody's claim; but of too many that
 * moved there the last one has to be found in another way. One in its handshake stays in front. */
static void assoc_place(struct association *a)
{
    assoc_unlist(a);
    struct association *first = assoc_find(a->ep, &a->peer, &a->local), *last = NULL;
    int moved = 0;
    for (struct association *t = first; t; t = assoc_next_same(t)) {
        last = t->roamed && !last ? t : last;
        moved += t->roamed;
    }
    if (moved >= SAME_MAX)
        assoc_unlist(last);
    assoc_list(a);
    if (first && first->handshake) {
        assoc_unlist(first);
        assoc_list(first);
    }
}

/* Other ways to find one: its connection ID, and what the nonces of its peer's records have in common. OpenSSL and wolfSSL
 * count those of AES-GCM from a random number on, so number less record number stays the same; others begin with 0, or with
 * the epoch, which tells nothing. */

static struct association *assoc_find_cid(const dtls_endpoint *ep, const uint8_t *cid, size_t len)
{
    struct entry *e = table_first(&ep->cids, table_hash(&ep->cids, cid, len));
    for (; e; e = table_next(e)) {
        struct association *a = OWNER_OF(struct association, cid_entry, e);
        if (a->wire.cid_in[0] == len && memcmp(a->wire.cid_in + 1, cid, len) == 0)
            return a;
    }
    return NULL;
}

/* A connection ID of its own, drawn once. False: there are no random numbers, or hardly any is free. */
static bool assoc_draw_cid(struct association *a)
{
    dtls_endpoint *ep = a->ep;
    int bytes = ep->cfg.cid_bytes, tries = 16;
    uint8_t *cid = a->wire.cid_in + 1;
    size_t len = bytes > 0 ? (size_t)bytes : bytes == 0 && a->wire.server ? CID_BYTES : 0;
    size_t prefix = a->wire.server ? ep->cfg.cid_prefix_len : 0;
    a->wire.cid_in[0] = (uint8_t)len;
    if (a->cid_listed || len == 0)
        return true;
    do {
        if (tries-- == 0 || RAND_bytes(cid, (int)len) != 1)
            return false;
        memcpy(cid, ep->cid_prefix, prefix);
    } while (assoc_find_cid(ep, cid, len));
    table_add(&ep->cids, &a->cid_entry, table_hash(&ep->cids, cid, len));
    a->cid_listed = true;
    return true;
}

static uint64_t assoc_mark(const struct record *r)
{
    return load_number(r->body, 8) - r->sequence;
}

static uint64_t assoc_mark_hash(const dtls_endpoint *ep, uint64_t mark)
{
    uint8_t key[8];
    store_number(key, sizeof key, mark);
    return table_hash(&ep->marks, key, sizeof key);
}

/* From an authentic record. */
static void assoc_learn_mark(struct association *a, const struct record *r)
{
    uint64_t mark = assoc_mark(r);
    if (a->overhead != OVERHEAD_MAX || mark == 0 || mark == (uint64_t)1 << 48)
        return;
    uint64_t hash = assoc_mark_hash(a->ep, mark);
    if (table_first(&a->ep->marks, hash)) /* chance makes no two, but somebody may want to be taken for another */
        return;
    source_set_blind(a, false);
    table_add(&a->ep->marks, &a->mark_entry, hash);
    a->mark_listed = true;
}

/* Associations. */

static struct association *assoc_of(SSL *ssl)
{
    const struct wire *w = BIO_get_data(SSL_get_rbio(ssl));
    return w->owner;
}

static bool assoc_is_unproven(const struct association *a)
{
    return a->move && !a->move->proven;
}

/* What libssl writes leaves through the socket, or through the user's transport. */
static int assoc_send(void *owner, const void *data, size_t len)
{
    struct association *a = owner;
    dtls_endpoint *ep = a->ep;
    const dtls_addr *local = a->via ? &a->via->local : &a->local, *peer = a->via ? &a->via->peer : &a->peer;
    struct udp *u = a->via ? a->via->udp : a->udp;
    struct move *m = !a->via && assoc_is_unproven(a) ? a->move : NULL;
    int r;
    if (m && m->out + len > UNPROVEN_FACTOR * m->in)
        return DTLS_ERR_AGAIN;
    if (u) {
        r = udp_send(ep->loop, u, data, len, local, peer);
    } else {
        ep->inside = true;
        int marked = ERR_set_mark(); /* libssl would take errors that are left in the queue for its own */
        r = ep->cfg.send(ep->cfg.user, data, len, local, peer);
        if (marked)
            ERR_pop_to_mark();
        else
            errors_clear();
        ep->inside = false;
    }
    ep->counters.datagrams_out += r == 0;
    if (m && r == 0)
        m->out += len;
    return r;
}

/* Sets the one timer to the earliest of all deadlines. Those that moved later meanwhile are found out when it fires, so
 * that what moves them (each message does) need not touch it. */
static void assoc_arm(struct association *a)
{
    int64_t now = loop_now(a->ep->loop), at = INT64_MAX;
    for (const struct rule *r = a->phase ? a->phase->rules : NULL; r && r->due; r++)
        at = earlier(at, r->due(a));
    if (at == INT64_MAX)
        timer_stop(a->ep->loop, &a->timer);
    else
        timer_set(a->ep->loop, &a->timer, at > now ? at : now + 1000); /* what is due at once waits for its turn */
}

static void assoc_rule(struct association *a)
{
    int64_t now = loop_now(a->ep->loop);
    const struct rule *r = a->phase->rules;
    while (r->due && r->due(a) > now)
        r++;
    if (r->due)
        r->then(a, now);
    assoc_arm(a);
}

/* What arrived comes before what is due: it may be what the deadline is about. */
static void assoc_piece(struct association *a)
{
    struct letter *letter = a->inbox;
    if (!letter) {
        a->due = false;
        assoc_rule(a);
        return;
    }
    letter->at += a->phase->work(a, letter->data + letter->at, letter->len - letter->at);
    if (letter->at < letter->len && a->phase)
        return;
    a->inbox = letter->next;
    a->inbox_last = a->inbox ? a->inbox_last : &a->inbox;
    a->inbox_bytes -= letter->len;
    free(letter);
}

static void assoc_work(struct job *job)
{
    struct association *a = OWNER_OF(struct association, job, job);
    do
        assoc_piece(a);
    while (a->phase && (a->inbox || a->due) && job_may_go_on(a->ep->loop));
    if (a->phase && (a->inbox || a->due))
        job_add(a->ep->loop, &a->job);
}

static void assoc_fire(void *user)
{
    struct association *a = user;
    a->due = true;
    job_add(a->ep->loop, &a->job);
}

/* Keeps a datagram until it is its turn. */
static void assoc_post(struct association *a, const uint8_t *p, size_t n)
{
    struct letter *letter = n <= INBOX_BYTES - a->inbox_bytes ? malloc(sizeof *letter + n) : NULL;
    if (!letter) {
        ep_count(a->ep, DTLS_DROP_LIMIT);
        return;
    }
    *letter = (struct letter){.len = n};
    memcpy(letter->data, p, n);
    *a->inbox_last = letter;
    a->inbox_last = &letter->next;
    a->inbox_bytes += n;
    job_add(a->ep->loop, &a->job);
}

static void assoc_input(struct association *a, const uint8_t *p, size_t n)
{
    if (a->phase)
        a->phase->input(a, p, n);
}

static void assoc_destroy(struct object *o)
{
    struct association *a = (struct association *)o;
    for (struct letter *next; a->inbox; a->inbox = next) {
        next = a->inbox->next;
        free(a->inbox);
    }
    timer_done(a->ep->loop, &a->timer);
    SSL_free(a->ssl);
    errors_clear();
    identity_release(a->ep, a->identity);
    record_keys_free(a->wire.keys);
    free(a->wire.cid_out);
    free(a->refusal);
    free(a->handshake);
    free(a);
}

/* An SSL that speaks through this association; the BIO goes with it. */
static SSL *assoc_ssl_new(struct association *a)
{
    BIO *bio = BIO_new(a->ep->bio_method);
    SSL *ssl = bio ? SSL_new(a->ep->trust.ctx) : NULL;
    if (!ssl) {
        BIO_free(bio);
        return NULL;
    }
    BIO_set_data(bio, &a->wire);
    BIO_set_init(bio, 1);
    SSL_set_bio(ssl, bio, bio);
    return ssl;
}

/* NULL: no memory. It belongs to nobody yet: assoc_destroy() or assoc_end() is up to the caller. */
static struct association *assoc_new(dtls_endpoint *ep)
{
    struct association *a = calloc(1, sizeof *a);
    if (!a)
        return NULL;
    *a = (struct association){.object.destroy = assoc_destroy, .ep = ep, .buffers = true, .job.run = assoc_work};
    a->inbox_last = &a->inbox;
    a->wire = (struct wire){
        .mtu = ep->cfg.mtu_bytes, .crypt = ep->crypt, .send = assoc_send, .owner = a, .counters = &ep->counters};
    list_init(&a->object);
    if (timer_init(ep->loop, &a->timer, assoc_fire, a) < 0) {
        free(a);
        return NULL;
    }
    a->ssl = a->wire.ssl = assoc_ssl_new(a);
    a->made_with = ep->trust.ctx;
    if (a->ssl)
        return a;
    assoc_destroy(&a->object);
    return NULL;
}

static void assoc_set_addresses(struct association *a, const dtls_addr *peer, const dtls_addr *local)
{
    a->peer = *peer;
    a->local = *local;
    a->wire.headers = peer->family == 4 ? IP4_UDP_HEADERS : IP6_UDP_HEADERS;
}

static void conn_raise(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    if (c->ep->cfg.on_event)
        c->ep->cfg.on_event(c, event, data, len);
}

static void conn_waits(dtls_conn *c)
{
    if (!c->waits)
        list_add(&c->ep->waiting, &c->object);
    c->waits = true;
}

static void conn_tell_writable(dtls_conn *c)
{
    if (!c->waits)
        return;
    c->waits = false;
    list_remove(&c->object);
    list_init(&c->object);
    conn_raise(c, DTLS_EV_WRITABLE, NULL, 0);
}

/* The socket has room again: those whose application was told DTLS_ERR_AGAIN hear of it, until one fills it. */
static void ep_tell_waiting(dtls_endpoint *ep, const struct udp *u)
{
    struct object *o = ep->waiting.next;
    while (o != &ep->waiting && !u->refused) {
        dtls_conn *c = (dtls_conn *)o;
        o = o->next;
        if (c->open->udp == u && !assoc_is_unproven(c->open)) {
            conn_tell_writable(c);
            o = ep->waiting.next; /* the callback may have ended any */
        }
    }
}

/* A client's own socket serves its association alone, which so needs no place in the table. */

static void assoc_own_input(struct udp *u, const uint8_t *p, size_t n, const dtls_addr *from, const dtls_addr *to)
{
    struct association *a = u->user.owner;
    const struct path old = {a->peer, u->local, u};
    (void)from, (void)to;
    a->ep->counters.datagrams_in++;
    a->from = u == a->udp ? NULL : &old;
    assoc_input(a, p, n);
    a->from = NULL;
}

static void assoc_own_failed(struct udp *u, int error)
{
    struct association *a = u->user.owner;
    if (a->phase && u == a->udp)
        a->phase->failed(a, error);
}

static void assoc_own_writable(struct udp *u)
{
    const struct association *a = u->user.owner;
    ep_tell_waiting(a->ep, u);
}

static int assoc_open_socket(struct association *a, const dtls_addr *peer, struct udp **u, dtls_error *err)
{
    dtls_endpoint *ep = a->ep;
    const struct udp_user user = {assoc_own_input, assoc_own_failed, assoc_own_writable, a, &ep->counters, &ep->cfg};
    char text[DTLS_ADDR_TEXT];
    *u = udp_open(ep->loop, &user, &ep->sockets, NULL, peer);
    if (!*u)
        return fail(err, DTLS_ERR_SYSTEM, "%s: %s", dtls_addr_format(peer, text, sizeof text), strerror(errno));
    int mtu = fd_path_mtu((*u)->fd, peer->family == 4);
    if (mtu >= MTU_MIN && mtu < a->wire.mtu)
        a->wire.mtu = mtu;
    return 0;
}

/* The way to the peer: a socket of its own, or the user's transport. 0 or an error. */
static int assoc_open_path(struct association *a, const dtls_addr *peer, const dtls_addr *local, dtls_error *err)
{
    dtls_endpoint *ep = a->ep;
    char text[DTLS_ADDR_TEXT];
    int r = ep->cfg.send ? 0 : assoc_open_socket(a, peer, &a->udp, err);
    if (r < 0)
        return r;
    dtls_addr_format(peer, text, sizeof text);
    assoc_set_addresses(a, peer, a->udp ? &a->udp->local : local);
    const struct association *other = a->udp ? NULL : assoc_find(ep, peer, local);
    while (other && other->roamed)
        other = assoc_next_same(other);
    if (other && other->conn != a->conn)
        return fail(err, DTLS_ERR_STATE, "%s: connected already", text);
    if (!a->udp)
        assoc_list(a);
    return 0;
}

/* libssl 3.0 crashes when it writes without its buffers, so they come back before any call that might. False: no memory,
 * and libssl will not use this SSL again. */
static bool assoc_need_buffers(struct association *a)
{
    a->used_at = a->ep->loop->now;
    if (a->buffers)
        return true;
    errors_clear();
    if (!SSL_alloc_buffers(a->ssl))
        return false;
    a->buffers = true;
    assoc_arm(a);
    return true;
}

static void assoc_forget_move(struct association *a)
{
    struct move *m = a->move;
    a->move = NULL;
    if (!m)
        return;
    if (m->kept)
        table_remove(&a->ep->moves, &m->entry);
    if (m->old.udp && m->old.udp->connected)
        udp_free(m->old.udp);
    free(m);
}

/* Nobody finds it any more. */
static void assoc_hide(struct association *a)
{
    assoc_unlist(a);
    if (a->cid_listed)
        table_remove(&a->ep->cids, &a->cid_entry);
    if (a->mark_listed)
        table_remove(&a->ep->marks, &a->mark_entry);
    a->cid_listed = a->mark_listed = false;
    assoc_forget_move(a);
    source_leave(a);
}

/* Lets go of it. The peer is told where it can understand that. */
static void assoc_end(struct association *a, dtls_reason reason)
{
    if (a->ended)
        return;
    a->ended = true;
    bool tell = reason == DTLS_CLOSE_LOCAL || reason == DTLS_CLOSE_PEER || reason == DTLS_CLOSE_IDLE ||
                reason == DTLS_CLOSE_VERIFY || reason == DTLS_CLOSE_KEYS;
    if (tell && SSL_is_init_finished(a->ssl) && assoc_need_buffers(a)) {
        errors_clear();
        SSL_shutdown(a->ssl); /* close_notify, sent once; nothing waits for an answer */
    } else if (reason != DTLS_CLOSE_ERROR && reason != DTLS_CLOSE_VERIFY) {
        SSL_set_shutdown(a->ssl, SSL_SENT_SHUTDOWN | SSL_RECEIVED_SHUTDOWN); /* a client's session stays good */
    }
    /* RFC 5246 section 7.2.2; but before both sides proved who they are, nobody takes a session away. */
    if (reason == DTLS_CLOSE_ERROR && !a->handshake)
        session_forget(a->ep, a->ssl);
    errors_clear();
    a->phase = NULL;
    timer_stop(a->ep->loop, &a->timer);
    job_remove(a->ep->loop, &a->job);
    assoc_hide(a);
    if (a->udp && a->udp->connected)
        udp_free(a->udp);
    loop_bury(a->ep->loop, &a->object);
}

/* Which name was wanted, and which the certificate has. */
static void assoc_mismatch(const struct association *a, X509 *cert, int result, char words[REASON_BYTES])
{
    char ip[INET6_ADDRSTRLEN] = "?";
    const char *wanted = a->conn->name;
    struct text t = {0};
    GENERAL_NAMES *names = NULL;
    size_t count = cert && alt_names_get(cert, &names) ? alt_names_put(&t, names, NULL) : 0;
    t = (struct text){.to = malloc(t.len + 1)};
    if (!wanted)
        wanted = inet_ntop(a->peer.family == 4 ? AF_INET : AF_INET6, a->peer.ip, ip, sizeof ip);
    if (count > 0 && t.to) {
        alt_names_put(&t, names, NULL);
        for (size_t i = 0; i + 1 < t.len; i++)
            t.to[i] = t.to[i] ? t.to[i] : ' ';
    }
    GENERAL_NAMES_free(names);
    snprintf(words, REASON_BYTES, "%s: %s was wanted, the certificate has %s", X509_verify_cert_error_string(result),
             wanted, count > 0 && t.to ? t.to : "no subjectAltName");
    free(t.to);
}

/* Why libssl gave up, in words. *code is OpenSSL's reason. */
static dtls_reason assoc_failure(const struct association *a, int *code, char text[REASON_BYTES])
{
    unsigned long e = ERR_peek_last_error();
    const char *words = ERR_reason_error_string(e), *format = "protocol error: %s";
    char mismatch[REASON_BYTES];
    int result = (int)SSL_get_verify_result(a->ssl);
    dtls_reason why = DTLS_CLOSE_ERROR;
    *code = ERR_GET_REASON(e);
    if (ERR_GET_LIB(e) != ERR_LIB_SSL || !words) {
        format = "OpenSSL: %s";
        words = words ? words : "no reason given";
    } else if (*code == SSL_R_CERTIFICATE_VERIFY_FAILED) {
        why = DTLS_CLOSE_VERIFY;
        format = "certificate refused: %s";
        words = X509_verify_cert_error_string(result);
        if (result == X509_V_ERR_HOSTNAME_MISMATCH || result == X509_V_ERR_IP_ADDRESS_MISMATCH) {
            assoc_mismatch(a, sk_X509_value(SSL_get0_verified_chain(a->ssl), 0), result, mismatch);
            words = mismatch;
        }
    } else if (*code == SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE) {
        why = DTLS_CLOSE_VERIFY;
        format = "certificate refused: %s";
        words = "peer sent no certificate";
    } else if (*code > SSL_AD_REASON_OFFSET && *code <= SSL_AD_REASON_OFFSET + UINT8_MAX) {
        format = "the peer sent %s";
    }
    snprintf(text, REASON_BYTES, format, words);
    return why;
}

/* Connections. */

static void dial_end(dtls_conn *c)
{
    struct dial *d = c->dial;
    c->dial = NULL;
    if (!d)
        return;
    if (d->lookup)
        d->lookup->fn = NULL;
    SSL_SESSION_free(d->session);
    free(d);
}

static void conn_destroy(struct object *o)
{
    dtls_conn *c = (dtls_conn *)o;
    identity_release(c->ep, c->identity);
    free(c->name);
    free(c->text);
    free(c);
}

/* Not on any list yet. NULL: no memory. */
static dtls_conn *conn_new(dtls_endpoint *ep, bool server)
{
    dtls_conn *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    *c = (dtls_conn){.object.destroy = conn_destroy, .ep = ep, .server = server};
    c->started = c->last_in = c->idle_raised = loop_now(ep->loop);
    list_init(&c->object);
    return c;
}

/* Whom it is connected with from now on. */
static void conn_set_identity(dtls_conn *c, struct identity *id)
{
    if (c->state == CONN_OPEN && c->identity)
        c->identity->open--;
    identity_release(c->ep, c->identity);
    c->identity = id;
    if (id)
        id->open++;
}

static void conn_add_try(dtls_conn *c, struct association *a)
{
    a->conn = c;
    a->older = c->tries;
    c->tries = a;
}

static void conn_list(dtls_conn *c)
{
    dtls_endpoint *ep = c->ep;
    c->serial = ++ep->serials;
    c->prev = ep->last;
    *(ep->last ? &ep->last->next : &ep->first) = c;
    ep->last = c;
    ep->counters.conns++;
    ep->counters.handshakes += c->server;
}

static void conn_unlist(dtls_conn *c, bool was_open)
{
    dtls_endpoint *ep = c->ep;
    for (struct object *o = ep->walks.next; o != &ep->walks; o = o->next) {
        struct walk *w = (struct walk *)o;
        w->at = w->at == c ? c->next : w->at;
    }
    *(c->prev ? &c->prev->next : &ep->first) = c->next;
    *(c->next ? &c->next->prev : &ep->last) = c->prev;
    ep->counters.conns--;
    ep->counters.handshakes -= c->server && !was_open;
}

/* The association that tells its addresses and its cipher. */
static const struct association *conn_assoc(const dtls_conn *c)
{
    return c->open ? c->open : c->tries;
}

static void assoc_log(const struct association *a, dtls_log level, const char *format, ...) PRINTF_LIKE(3, 4);
static void conn_end(dtls_conn *c, dtls_reason reason, const char *format, ...) PRINTF_LIKE(3, 4);

static void assoc_log(const struct association *a, dtls_log level, const char *format, ...)
{
    const dtls_conn *c = a->conn;
    char text[LINE_BYTES];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    bool strange = c->server && !c->open && (level == DTLS_LOG_WARNING || level == DTLS_LOG_DEBUG);
    if (strange)
        ep_log_stranger(c->ep, level, &a->peer, text);
    else
        ep_log(c->ep, level, &a->peer, text);
}

/* The one way a connection ends: its associations, then, once all is in order, what the application is told. */
static void conn_end(dtls_conn *c, dtls_reason reason, const char *format, ...)
{
    bool was_open = c->state == CONN_OPEN;
    va_list args;
    if (c->state == CONN_CLOSED)
        return;
    c->state = CONN_CLOSED;
    c->reason = reason;
    char text[REASON_BYTES];
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    c->text = text_copy(text);
    /* Before any callback: one that frees the endpoint buries it, and it must go after its connections. */
    if (c->open)
        assoc_end(c->open, reason);
    for (struct association *a = c->tries; a; a = a->older)
        assoc_end(a, reason);
    dial_end(c);
    conn_unlist(c, was_open);
    loop_bury(c->ep->loop, &c->object);
    if (was_open && c->identity)
        c->identity->open--;
    if (was_open) {
        assoc_log(conn_assoc(c), DTLS_LOG_INFO, "closed: %s", text);
    } else {
        c->ep->counters.handshakes_failed++;
        assoc_log(conn_assoc(c), reason == DTLS_CLOSE_LOCAL ? DTLS_LOG_DEBUG : DTLS_LOG_WARNING, "handshake failed: %s",
                  text);
    }
    if (was_open || !c->server)
        conn_raise(c, DTLS_EV_CLOSED, NULL, 0);
    else if (reason != DTLS_CLOSE_LOCAL)
        conn_raise(c, DTLS_EV_FAILED, NULL, 0);
}

/* Moving. */

static bool path_equal(const struct path *a, const struct path *b)
{
    return dtls_addr_equal(&a->peer, &b->peer) && dtls_addr_equal(&a->local, &b->local) && a->udp == b->udp;
}

/* What follows from another address: the table, the MTU, what is counted and told. */
static void assoc_moved(struct association *a, const dtls_addr *was, const char *words, const dtls_addr *which)
{
    char text[LINE_BYTES], addr[DTLS_ADDR_TEXT];
    a->conn->moves++;
    a->ep->counters.moves++;
    SSL_set_mtu(a->ssl, (long)wire_room(&a->wire));
    snprintf(text, sizeof text, "%s %s", words, dtls_addr_format(which, addr, sizeof addr));
    ep_log_stranger(a->ep, DTLS_LOG_INFO, &a->peer, text);
    if (a->conn->state == CONN_OPEN)
        conn_raise(a->conn, DTLS_EV_MOVED, was, sizeof *was);
}

/* A server's peer is there now, as its newest record shows. An address that it had before, and that was proven, stays so.
 * False: no memory. */
static bool assoc_move(struct association *a, const struct path *to, const struct record *newest)
{
    const struct path was = {a->peer, a->local, a->udp};
    bool proven = !a->move || a->move->proven, back = a->move && path_equal(&a->move->old, to);
    if (path_equal(&was, to)) {
        assoc_place(a);
        return true;
    }
    struct move *m = malloc(sizeof *m);
    if (!m)
        return false;
    *m = (struct move){.a = a,
                       .old = proven ? was : a->move->old,
                       .at = loop_now(a->ep->loop),
                       .sequence = newest->sequence,
                       .in = newest->size,
                       .proven = back,
                       .kept = true,
                       .roamed = proven ? a->roamed : a->move->roamed};
    struct association *native = back ? assoc_native(assoc_find(a->ep, &to->peer, &to->local)) : NULL;
    a->roamed = !back || a->move->roamed || (native && native != a); /* an address has one at most */
    assoc_forget_move(a);
    if (back && !proven) { /* nothing is worth keeping */
        free(m);
    } else {
        a->move = m;
        table_add(&a->ep->moves, &m->entry, assoc_hash(&a->ep->moves, &m->old.peer));
    }
    assoc_unlist(a);
    assoc_set_addresses(a, &to->peer, &to->local);
    a->udp = to->udp;
    if (back)
        source_move(a, &to->peer);
    assoc_place(a);
    assoc_arm(a);
    assoc_moved(a, &was.peer, "moved from", &was.peer);
    if (back && a->conn->state == CONN_OPEN)
        conn_tell_writable(a->conn);
    return true;
}

/* Identities. The server's is checked against the subjectAltName only: RFC 9525 section 2 retires the common name.
 * libssl does that in a full handshake; a resumed one verifies nothing, so there it is up to us. */

enum { NAME_FLAGS = X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS | X509_CHECK_FLAG_NEVER_CHECK_SUBJECT };

/* The length of the IP address that is expected in the certificate, 0 if it is a name. Not with OpenSSL's own parser,
 * which takes "127.0.0.1 x" for an address. */
static size_t name_expected_ip(const struct association *a, uint8_t ip[16])
{
    const char *name = a->conn->name;
    memcpy(ip, a->peer.ip, 16);
    if (!name)
        return a->peer.family == 4 ? 4 : 16;
    return inet_pton(AF_INET, name, ip) == 1 ? 4 : inet_pton(AF_INET6, name, ip) == 1 ? 16 : 0;
}

static bool name_expect(const struct association *a, SSL *ssl)
{
    const char *name = a->conn->name;
    uint8_t ip[16];
    size_t ip_len = name_expected_ip(a, ip);
    X509_VERIFY_PARAM *param = SSL_get0_param(ssl);
    X509_VERIFY_PARAM_set_hostflags(param, NAME_FLAGS);
    if (ip_len)
        return X509_VERIFY_PARAM_set1_ip(param, ip, ip_len) == 1;
    return SSL_set_tlsext_host_name(ssl, name) == 1 && X509_VERIFY_PARAM_set1_host(param, name, 0) == 1;
}

static bool name_is_expected(const struct association *a, X509 *cert)
{
    uint8_t ip[16];
    size_t ip_len = name_expected_ip(a, ip);
    if (ip_len)
        return X509_check_ip(cert, ip, ip_len, 0) == 1;
    return X509_check_host(cert, a->conn->name, 0, NAME_FLAGS, NULL) == 1;
}

/* The name as it stands in certificates: without the dot that may end a DNS name. NULL: *r tells why. A name of the DNS
 * has letters, digits, '-' and (where people do so) '_'; anything else must not get into a ClientHello, RFC 6066 section 3.
 */
static char *name_copy(const char *name, int *r)
{
    uint8_t ip[16];
    size_t n = strlen(name);
    *r = DTLS_ERR_ARG;
    if (n > 1 && name[n - 1] == '.')
        n--;
    if (n == 0 || name[0] == '.' || n > 253)
        return NULL;
    if (inet_pton(AF_INET6, name, ip) != 1 &&
        strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") < n)
        return NULL;
    char *copy = malloc(n + 1);
    *r = copy ? 0 : DTLS_ERR_MEMORY;
    if (copy) {
        memcpy(copy, name, n);
        copy[n] = 0;
    }
    return copy;
}

/* Is it over? Yes, if it cannot be read. */
static bool time_is_past(const ASN1_TIME *t)
{
    return ASN1_TIME_cmp_time_t(t, time(NULL)) <= 0;
}

/* ==== 8. traffic ================================================================================================== */

enum {
    QUIET_MS = 1000,      /* without traffic: libssl's record buffers, 33 KB, go back */
    KEY_RECORD_COST = 32, /* bytes that a record takes of its keys besides its text */
    KEEP_MS = 10000,      /* after a move: what the address before is good for */
    PATH_MESSAGE = 9,     /* bytes: type and cookie, RFC 9853 section 4 */
    PATH_CHALLENGE = 0,
    PATH_RESPONSE = 1,
    PATH_DROP = 2,
    ASK_MIN_MS = 100,     /* for its answer; three round trips, RFC 9853 section 5.5, */
    ASK_MS = 1000,        /* or so long where that is not known */
    SILENCE_MS = 5000,    /* without an answer: a client doubts its way to the peer */
    REBIND_REST_MS = 1000 /* between tries where the system has none */
};

/* The deadlines of an open connection:
 *
 *   gone    idle_timeout_ms after the last authentic message the peer counts as gone, and the connection ends
 *   quiet   QUIET_MS after the last use libssl's record buffers go back; the next use allocates them again
 *   idle    idle_ms after the last authentic message DTLS_EV_IDLE is raised, and again every idle_repeat_ms
 *   asked   the peer did not say in time whether it is at its new address
 *   kept    KEEP_MS after a move the address of before is forgotten, and a client's socket of before
 *   lost    a client looks for another way to its peer: where the system says that the old one is gone, or after
 *           SILENCE_MS without an answer
 *
 * The first three start when the connection opens. Each authentic message moves them; what is forged moves none. */

static int64_t traffic_gone_at(const struct association *a)
{
    int ms = a->ep->cfg.idle_timeout_ms;
    return ms == DTLS_NEVER ? INT64_MAX : a->conn->last_in + us(ms);
}

static void traffic_gone(struct association *a, int64_t now)
{
    dtls_conn *c = a->conn;
    conn_end(c, DTLS_CLOSE_IDLE, "idle for %.1f s", (double)(now - c->last_in) / 1e6);
}

static int64_t traffic_quiet_at(const struct association *a)
{
    return a->buffers ? a->used_at + us(QUIET_MS) : INT64_MAX;
}

static void traffic_quiet(struct association *a, int64_t now)
{
    a->buffers = !SSL_free_buffers(a->ssl);
    a->used_at = now; /* where it refused, it is asked again later */
}

static int64_t traffic_idle_at(const struct association *a)
{
    const dtls_conn *c = a->conn;
    const dtls_config *cfg = &c->ep->cfg;
    if (cfg->idle_ms <= 0)
        return INT64_MAX;
    if (c->idle_raised > c->last_in)
        return c->idle_raised + us(cfg->idle_repeat_ms);
    return c->last_in + us(cfg->idle_ms);
}

static void traffic_idle(struct association *a, int64_t now)
{
    dtls_conn *c = a->conn;
    c->idle_raised = now;
    conn_raise(c, DTLS_EV_IDLE, NULL, 0);
}

/* RFC 9325 section 4.4: keys protect only so much. False: less is left than this message needs, and the connection ends. */
static bool traffic_spend(struct association *a, uint64_t *left, size_t bytes)
{
    uint64_t cost = a->keys.by_bytes ? bytes + KEY_RECORD_COST : 1;
    if (*left < cost) {
        conn_end(a->conn, DTLS_CLOSE_KEYS, "the keys have protected as much as they safely can");
        return false;
    }
    *left -= cost;
    return true;
}

static void traffic_failed(struct association *a)
{
    char text[REASON_BYTES];
    int code;
    dtls_reason why = assoc_failure(a, &code, text);
    conn_end(a->conn, why, "%s", text);
}

/* SSL_read had nothing to give, and this is why. */
static void traffic_read_nothing(struct association *a, int error)
{
    bool waits = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
    if (waits && !SSL_is_init_finished(a->ssl)) /* OpenSSL 3.5 may stay in it for good */
        conn_end(a->conn, DTLS_CLOSE_ERROR, "protocol error: renegotiation");
    else if (error == SSL_ERROR_ZERO_RETURN)
        conn_end(a->conn, DTLS_CLOSE_PEER, "closed by the peer");
    else if (!waits)
        traffic_failed(a);
}

/* A message for the peer, or with `as` a record of that type, by way of `via`. */
static int traffic_seal(struct association *a, const void *data, size_t len, unsigned as, const struct path *via)
{
    if (!assoc_need_buffers(a)) {
        conn_end(a->conn, DTLS_CLOSE_ERROR, "out of memory");
        return DTLS_ERR_TLS;
    }
    if (!traffic_spend(a, &a->keys.out, len))
        return DTLS_ERR_TLS;
    errors_clear();
    a->wire.as = as;
    a->wire.text = data;
    a->wire.text_len = len;
    a->via = via;
    int n = SSL_write(a->ssl, data, (int)len);
    a->wire.as = 0;
    a->wire.text = NULL;
    a->via = NULL;
    int e = n > 0 ? SSL_ERROR_NONE : SSL_get_error(a->ssl, n);
    if (e == SSL_ERROR_NONE)
        return 0;
    if (e == SSL_ERROR_WANT_WRITE || e == SSL_ERROR_WANT_READ)
        return DTLS_ERR_AGAIN;
    traffic_failed(a);
    return DTLS_ERR_TLS;
}

/* Whether the peer is where it seems to be: the Return Routability Check, RFC 9853. The old address is asked first (section
 * 5.2): where a peer answers from there, a copied record only made it look as if it had moved, and that answer moves it
 * back. Where nobody does, or the peer says that it left, the new one is asked (section 5.1). */

static void traffic_send_path(struct association *a, uint8_t type, const uint8_t cookie[8], const struct path *via)
{
    uint8_t message[PATH_MESSAGE] = {type};
    memcpy(message + 1, cookie, 8);
    traffic_seal(a, message, sizeof message, TYPE_RRC, via);
}

static void traffic_ask(struct association *a, enum move_check check)
{
    struct move *m = a->move;
    m->asked = check == m->check ? m->asked + 1 : 1;
    m->check = check;
    m->asked_at = loop_now(a->ep->loop);
    unsigned which = check == CHECK_OLD ? 0 : m->asked;
    if (RAND_bytes(m->cookies[which], sizeof m->cookies[which]) == 1) {
        m->sent |= 1u << which;
        traffic_send_path(a, PATH_CHALLENGE, m->cookies[which], check == CHECK_OLD ? &m->old : NULL);
    }
    if (a->phase)
        assoc_arm(a);
}

/* Which question that answers, the first being 0; -1: none of ours. A slow path's answer comes behind the next question. */
static int traffic_question(const struct move *m, const uint8_t cookie[8])
{
    for (int i = 0; m && i <= PATHS_ASKED; i++)
        if ((m->sent >> i & 1) && CRYPTO_memcmp(m->cookies[i], cookie, 8) == 0)
            return i;
    return -1;
}

static int64_t traffic_patience(const struct association *a)
{
    int64_t round_trip = a->conn->round_trip_us;
    if (round_trip == 0)
        return us(ASK_MS);
    return round_trip * 3 > us(ASK_MIN_MS) ? round_trip * 3 : us(ASK_MIN_MS);
}

static int64_t traffic_asked_at(const struct association *a)
{
    const struct move *m = a->move;
    if (!m || m->proven || m->check == CHECK_NONE)
        return INT64_MAX;
    return m->asked_at +
           (traffic_patience(a) << (m->check == CHECK_NEW ? m->asked : 0)); /* the new path may be longer */
}

static void traffic_asked(struct association *a, int64_t now)
{
    (void)now;
    if (a->move->check == CHECK_OLD || a->move->asked < PATHS_ASKED)
        traffic_ask(a, CHECK_NEW);
    else
        a->move->check = CHECK_NONE;
}

static void traffic_proven(struct association *a)
{
    a->move->proven = true;
    a->move->check = CHECK_NONE;
    source_move(a, &a->peer);
    assoc_arm(a);
    conn_tell_writable(a->conn);
}

static void traffic_hear_path(struct association *a, const uint8_t *p, size_t n)
{
    const struct move *m = a->move;
    if (n != PATH_MESSAGE)
        return;
    int question = traffic_question(m, p + 1);
    if (p[0] == PATH_CHALLENGE) /* a client that left its old socket says so */
        traffic_send_path(a, a->from && !a->conn->server ? PATH_DROP : PATH_RESPONSE, p + 1, a->from);
    else if (p[0] == PATH_RESPONSE && question > 0 && !a->from && !m->proven)
        traffic_proven(a);
    else if (p[0] == PATH_DROP && question == 0 && m->check == CHECK_OLD)
        traffic_ask(a, CHECK_NEW);
}

static int64_t traffic_kept_at(const struct association *a)
{
    const struct move *m = a->move;
    return m && (m->kept || m->proven) ? m->at + us(KEEP_MS) : INT64_MAX;
}

static void traffic_kept(struct association *a, int64_t now)
{
    struct move *m = a->move;
    (void)now;
    if (m->proven) {
        assoc_forget_move(a);
        return;
    }
    table_remove(&a->ep->moves, &m->entry);
    m->kept = false;
}

/* What arrives. */

/* An authentic record tells where its peer is. A second one from an address proves that, where nobody can be asked. */
static void traffic_seen(struct association *a, const struct record *r)
{
    struct move *m = a->move;
    wire_note(&a->wire, r->sequence);
    if (a->blind)
        assoc_learn_mark(a, r);
    if (!m || m->proven || a->from)
        return;
    m->in += r->sequence > m->sequence ? r->size : 0;
    if (!a->wire.rrc && r->sequence > m->sequence)
        traffic_proven(a);
    else if (a->wire.rrc && m->check == CHECK_NONE)
        traffic_ask(a, CHECK_OLD);
}

/* An authentic message. False: the connection is over, or has another association. */
static bool traffic_arrived(struct association *a, const uint8_t *message, size_t n)
{
    dtls_conn *c = a->conn;
    a->authentic = true;
    a->lost = false;
    c->last_in = c->ep->loop->now;
    c->unanswered = c->doubted = false;
    c->messages_in += n > 0;
    c->bytes_in += n;
    if (!traffic_spend(a, &a->keys.in, n))
        return false;
    if (a->record)
        traffic_seen(a, a->record);
    if (n > 0 && c->state == CONN_OPEN) /* an empty record is legal, says that the peer is alive, and nothing else */
        conn_raise(c, DTLS_EV_MESSAGE, message, n);
    return c->state == CONN_OPEN && c->open == a;
}

static void traffic_forged(struct association *a)
{
    if (--a->keys.forged == 0)
        conn_end(a->conn, DTLS_CLOSE_KEYS, "the keys have refused as many forgeries as they safely can");
}

/* Reads all there is. After a single record (`only`) a look at what libssl has buffered saves a second SSL_read. */
static void traffic_read(struct association *a, bool only)
{
    uint8_t message[DTLS_MESSAGE_MAX];
    struct flight flight;
    dtls_conn *c = a->conn;
    while (c->state == CONN_OPEN && c->open == a) {
        errors_clear();
        size_t n = 0;
        flight_begin(&a->wire, &flight, false); /* it answers a repeated Finished with our last flight */
        int r = SSL_read_ex(a->ssl, message, sizeof message, &n);
        flight_end(&a->wire);
        if (r != 1) {
            traffic_read_nothing(a, SSL_get_error(a->ssl, r));
            return;
        }
        if (!traffic_arrived(a, message, n) || (only && !a->wire.in && !SSL_has_pending(a->ssl)))
            return;
    }
}

static void traffic_take(struct association *a, const struct record *r)
{
    if (!assoc_need_buffers(a)) {
        conn_end(a->conn, DTLS_CLOSE_ERROR, "out of memory");
        return;
    }
    a->wire.in = r->start;
    a->wire.in_len = r->size;
    a->wire.in_renumber = false;
    traffic_read(a, true);
    a->wire.in = NULL;
}

/* One that libssl opens. */
static void traffic_plain(struct association *a, const struct record *r)
{
    int verdict = guard_open(a->overhead, r);
    if (verdict == GUARD_PASS && a->wire.cid && a->wire.cid_in[0] > 0)
        verdict = DTLS_DROP_CID;
    if (verdict != GUARD_PASS) {
        ep_count(a->ep, (dtls_drop)verdict);
        return;
    }
    bool before = a->authentic;
    a->authentic = false;
    traffic_take(a, r);
    if (!a->authentic && a->conn->state == CONN_OPEN)
        traffic_forged(a);
    a->authentic = a->authentic || before;
}

/* One that we open. Alerts, handshake messages and messages that are too long are libssl's business. */
static APART void traffic_opened(struct association *a, const struct record *r)
{
    uint8_t text[RECORD_BODY_MAX + 1];
    struct wire *w = &a->wire;
    struct record plain;
    size_t n;
    unsigned type;
    bool fresh = wire_is_fresh(w, r->sequence), opens = fresh && wire_open(w, false, r, text, &n, &type);
    if (fresh && !opens)
        traffic_forged(a);
    if (!opens) {
        ep_count(a->ep, DTLS_DROP_CID);
        return;
    }
    a->authentic = true;
    if (type == TYPE_DATA && n <= DTLS_MESSAGE_MAX) {
        traffic_arrived(a, text, n);
    } else if (type == TYPE_RRC && w->rrc) {
        if (traffic_arrived(a, text, 0))
            traffic_hear_path(a, text, n);
    } else if (type >= TYPE_ALERT && type <= TYPE_DATA && wire_plain(w, r, type, text, n, &plain)) {
        traffic_seen(a, r);
        a->record = NULL;
        if (a->phase)
            traffic_take(a, &plain);
    }
}

/* One datagram, record by record. */
static void traffic_input(struct association *a, const uint8_t *p, size_t n)
{
    struct record r;
    for (; n > 0 && a->conn->state == CONN_OPEN && a->phase; p += r.size, n -= r.size) {
        if (!wire_parse(&a->wire, p, n, &r)) {
            ep_count(a->ep, record_drop(p, n));
            return; /* what follows cannot be found */
        }
        a->record = &r;
        if (r.type == TYPE_CID || r.type == TYPE_RRC)
            traffic_opened(a, &r);
        else
            traffic_plain(a, &r);
        a->record = NULL;
    }
}

static size_t traffic_work(struct association *a, const uint8_t *p, size_t n)
{
    traffic_input(a, p, n);
    return n;
}

/* A client's other way to its peer: a new socket, which has another port, and another address if the system now takes
 * another way there. With `if_new` only in that case; 1: it was not. */
static int traffic_rebind(struct association *a, bool if_new, dtls_error *err)
{
    const struct path was = {a->peer, a->local, a->udp};
    struct udp *u;
    int r = assoc_open_socket(a, &a->peer, &u, err);
    if (r < 0)
        return r;
    struct move *m = if_new && memcmp(u->local.ip, a->local.ip, sizeof a->local.ip) == 0 ? NULL : malloc(sizeof *m);
    if (!m) {
        udp_free(u);
        return if_new ? 1 : fail(err, DTLS_ERR_MEMORY, "out of memory");
    }
    assoc_forget_move(a); /* its socket, too */
    *m = (struct move){.a = a, .old = was, .at = loop_now(a->ep->loop), .proven = true};
    a->rebound_at = m->at;
    a->move = m;
    a->udp = u;
    a->local = u->local;
    a->lost = false;
    assoc_arm(a);
    assoc_moved(a, &was.local, "goes on from", &a->local);
    if (a->conn->state == CONN_OPEN) /* what it waited for was the old socket */
        conn_tell_writable(a->conn);
    return 0;
}

/* Asks the peer for a sign of life, which tells it where we are. */
static void traffic_call(struct association *a)
{
    uint8_t cookie[8];
    if (a->phase && a->wire.rrc && RAND_bytes(cookie, sizeof cookie) == 1)
        traffic_send_path(a, PATH_CHALLENGE, cookie, NULL);
}

/* Without an answer a client looks whether its way to the peer is another one now; a peer that can be asked is asked, and
 * where it has a connection ID and says nothing, it may be a NAT that does not let its answers through any more: then another
 * port helps. Others would not know us there. */
static int64_t traffic_lost_at(const struct association *a)
{
    const dtls_conn *c = a->conn;
    int64_t silent = c->unanswered_at;
    int wait = c->ep->cfg.unanswered_ms;
    if (c->server || !a->udp || c->dial)
        return INT64_MAX;
    if (a->lost)
        return a->rebound_at + us(REBIND_REST_MS);
    if (!c->unanswered)
        return INT64_MAX;
    if (a->asked_at < silent)
        return silent + us(SILENCE_MS);
    if (a->wire.cid_out_len == 0 || (!a->wire.rrc && (wait <= 0 || a->rebound_at >= silent)))
        return INT64_MAX;
    if (!a->wire.rrc)
        return silent + us(SILENCE_MS > wait / 2 ? SILENCE_MS : wait / 2);
    return a->rebound_at < silent ? a->asked_at + us(ASK_MS) : a->rebound_at + us(SILENCE_MS);
}

static void traffic_lost(struct association *a, int64_t now)
{
    dtls_error err;
    bool if_new = a->lost || a->asked_at < a->conn->unanswered_at;
    *(a->lost ? &a->rebound_at : &a->asked_at) = now;
    if (traffic_rebind(a, if_new, &err) == 1)
        a->lost = false;
    if (a->phase)
        traffic_call(a);
}

/* ICMP may tell that nobody listens there any more, or be forged. It ends nothing, but makes us ask. What tells of our own
 * address or way makes us look for another one. Not where the system is short of buffers. */
static void traffic_socket_failed(struct association *a, int error)
{
    a->conn->doubted = a->conn->doubted || error == ECONNREFUSED;
    a->lost = a->lost || error == ENETUNREACH || error == EHOSTUNREACH || error == EADDRNOTAVAIL || error == ENETDOWN ||
              error == EINVAL;
    assoc_arm(a);
}

int dtls_conn_rebind(dtls_conn *c)
{
    dtls_error err;
    if (c->server || c->state != CONN_OPEN || !c->open->udp || c->ep->inside)
        return DTLS_ERR_STATE;
    loop_enter(c->ep->loop);
    int r = traffic_rebind(c->open, false, &err);
    if (r == 0)
        traffic_call(c->open);
    loop_leave(c->ep->loop);
    return r;
}

/* What the application does. */

/* From now on the peer owes us a sign of life. */
static void traffic_expect(struct association *a)
{
    dtls_conn *c = a->conn;
    c->unanswered = true;
    c->unanswered_at = c->ep->loop->now;
    if (!c->server && (c->doubted || c->ep->cfg.unanswered_ms > 0 || !a->timer.slot ||
                       a->timer.at_us > c->unanswered_at + us(SILENCE_MS)))
        assoc_arm(a);
}

static int traffic_write(struct association *a, const void *data, size_t len)
{
    dtls_conn *c = a->conn;
    int r = traffic_seal(a, data, len, 0, NULL);
    if (r == DTLS_ERR_AGAIN && (a->udp || assoc_is_unproven(a)))
        conn_waits(c);
    if (r < 0)
        return r;
    c->messages_out++;
    c->bytes_out += len;
    if (!c->unanswered)
        traffic_expect(a);
    return 0;
}

int dtls_conn_send(dtls_conn *c, const void *data, size_t len)
{
    if (c->state != CONN_OPEN || c->ep->inside)
        return DTLS_ERR_STATE;
    if (!data || len == 0 ||
        len > c->open->message_max) /* libssl sends no empty record, and ends up confused asked to */
        return DTLS_ERR_SIZE;
    loop_enter(c->ep->loop);
    int r = traffic_write(c->open, data, len);
    loop_leave(c->ep->loop);
    return r;
}

void dtls_conn_close(dtls_conn *c)
{
    dtls_loop *l = c->ep->loop;
    if (c->ep->inside)
        return;
    loop_enter(l);
    conn_end(c, DTLS_CLOSE_LOCAL, "closed here");
    loop_leave(l);
}

size_t dtls_conn_payload_max(const dtls_conn *c)
{
    if (c->state != CONN_OPEN)
        return 0;
    const struct wire *w = &c->open->wire;
    size_t n = DTLS_get_data_mtu(c->open->ssl), max = c->open->message_max;
    size_t more = w->cid_out_len ? w->cid_out_len + 1u : 0; /* libssl does not know of */
    n = n > more ? n - more : 0;
    return n < max ? n : max;
}

/* The protocol that was agreed upon, as it stands in the configuration. */
static const char *traffic_alpn(const struct association *a)
{
    const unsigned char *chosen = NULL;
    unsigned len = 0;
    const char *name = a->ep->trust.alpn ? a->ep->trust.alpn : "";
    SSL_get0_alpn_selected(a->ssl, &chosen, &len);
    while (*name && !(strlen(name) == len && memcmp(name, chosen, len) == 0))
        name += strlen(name) + 1;
    return name;
}

static void traffic_describe(const dtls_conn *c, const struct association *a, const struct identity *id,
                             dtls_info *info)
{
    static const char *const no_names[] = {NULL};
    int64_t now = loop_now(c->ep->loop);
    bool done = SSL_is_init_finished(a->ssl) == 1;
    *info = (dtls_info){.peer = a->peer,
                        .local = a->local,
                        .peer_name = id ? id->name : "",
                        .peer_alt_names = id ? id->alt_names : no_names,
                        .peer_fingerprint = id ? id->hex : "",
                        .peer_serial = id ? id->serial : "",
                        .psk = id && !id->hex[0],
                        .version = done ? SSL_get_version(a->ssl) : "",
                        .alpn = done ? traffic_alpn(a) : "",
                        .cipher = SSL_get_current_cipher(a->ssl) ? SSL_get_cipher_name(a->ssl) : "",
                        .server = c->server,
                        .connected = c->state == CONN_OPEN,
                        .resumed = c->resumed,
                        .age_ms = (now - c->started) / 1000,
                        .silent_ms = (now - c->last_in) / 1000,
                        .round_trip_us = c->round_trip_us,
                        .resends = c->resends,
                        .renewals = c->renewals,
                        .moves = c->moves,
                        .cid_in = a->wire.cid ? a->wire.cid_in[0] : -1,
                        .cid_out = a->wire.cid ? a->wire.cid_out_len : -1,
                        .messages_in = c->messages_in,
                        .messages_out = c->messages_out,
                        .bytes_in = c->bytes_in,
                        .bytes_out = c->bytes_out};
}

void dtls_conn_info(const dtls_conn *c, dtls_info *info)
{
    const struct association *a = conn_assoc(c);
    traffic_describe(c, a, c->identity ? c->identity : a->identity, info);
}

/* Whether the application lets that peer in. */
static bool traffic_welcomes(struct association *a, const struct identity *id, char *reason, size_t size)
{
    dtls_endpoint *ep = a->ep;
    dtls_info info;
    if (!ep->cfg.on_peer)
        return true;
    traffic_describe(a->conn, a, id, &info);
    snprintf(reason, size, "refused by the application");
    bool before = ep->inside;
    ep->inside = true;
    int r = ep->cfg.on_peer(ep->cfg.user, &info, reason, size);
    ep->inside = before;
    return r == 0;
}

int dtls_conn_export(const dtls_conn *c, const char *label, void *out, size_t len)
{
    if (c->state != CONN_OPEN || c->ep->inside)
        return DTLS_ERR_STATE;
    errors_clear();
    int r = SSL_export_keying_material(c->open->ssl, out, len, label, strlen(label), NULL, 0, 0);
    errors_clear();
    return r == 1 ? 0 : DTLS_ERR_TLS;
}

dtls_reason dtls_conn_reason(const dtls_conn *c)
{
    return c->reason;
}

const char *dtls_conn_reason_text(const dtls_conn *c)
{
    return c->text ? c->text : c->state == CONN_CLOSED ? "closed, and no memory to say why" : "";
}

dtls_endpoint *dtls_conn_endpoint(const dtls_conn *c)
{
    return c->ep;
}

void *dtls_conn_user(const dtls_conn *c)
{
    return c->user;
}

void dtls_conn_set_user(dtls_conn *c, void *user)
{
    c->user = user;
}

/* An association that is open keeps its SSL; one in its handshake may begin anew, on another. */

SSL_SESSION *dtls_conn_session(const dtls_conn *c)
{
    return c->open ? SSL_get1_session(c->open->ssl) : NULL;
}

SSL *dtls_conn_ssl(const dtls_conn *c)
{
    return c->open ? c->open->ssl : NULL;
}

/* ==== 9. handshake ================================================================================================ */

enum {
    CLAIM_GRACE_MS = 3000,      /* silence that makes a claim that the peer refuses us credible */
    CLAIM_RETRY_MS = 1000,      /* the same where a client tries once more before it believes it */
    STALL_MS = 8000,            /* a client's handshake stands still for so long: it begins one more */
    HELLO_WAIT_MS = 1000,       /* at most between ClientHellos until one is answered */
    STAGGER_MS = 250,           /* between a host's addresses, RFC 8305 section 5 */
    RETRANSMIT_MIN_US = 100000, /* however short the round trip is: the peer has to calculate */
    RENEW_REST_MS = 5000,       /* between renewals that nobody asked for */
    FAILURES_MAX = 5,           /* after so many a client begins anew, */
    FAILURES_REFUSED = 2,       /* after the peer's alerts, */
    FAILURES_VERIFY = 1,        /* and after certificates that it refused itself */
    UNPROVEN_RESENDS = 3,       /* of a server's first flight, to a client that may be somebody else's invention */
    NO_ALERT = -1
};

/* A client's try:                                        A server's, behind the stateless cookie exchange:
 *
 *   new -> asking -> cookie -> flights -> done             new -> flights -> done
 *            |          |         |
 *            +----------+---------+-> failed
 *
 * One more try may begin beside it, or take its place, from each of a client's states. A handshake that does not get to its
 * end ends with its association, in whatever state it is. */
enum hs_state {
    HS_NEW,
    HS_ASKING,  /* the ClientHello is under way, nobody answered */
    HS_COOKIE,  /* the server answered with a cookie, which went back to it */
    HS_FLIGHTS, /* a client has the ServerHello, a server a ClientHello with a good cookie */
    HS_FAILED,  /* a client waits a little before one more try takes its place */
    HS_DONE,
    HS_STATES
};

static const char *const hs_names[HS_STATES] = {"new", "asking", "cookie", "flights", "failed", "done"};

/* What may follow what, by role: 0 a client, 1 a server. */
static const uint8_t hs_follows[2][HS_STATES] = {{[HS_NEW] = 1 << HS_ASKING,
                                                  [HS_ASKING] = 1 << HS_COOKIE | 1 << HS_FLIGHTS | 1 << HS_FAILED,
                                                  [HS_COOKIE] = 1 << HS_FLIGHTS | 1 << HS_FAILED,
                                                  [HS_FLIGHTS] = 1 << HS_DONE | 1 << HS_FAILED},
                                                 {[HS_NEW] = 1 << HS_FLIGHTS, [HS_FLIGHTS] = 1 << HS_DONE}};

static const struct phase hs_phase;
static const struct phase open_phase; /* both below; an open connection may ask for one more handshake */

/* Anybody can claim that the peer refuses us: by a plaintext alert, or by ICMP. libssl never sees the claim. It is
 * believed only if nothing plausible follows for a while, so that a forger cannot stop a handshake that goes on, and a
 * real refusal is still reported as such. */
struct claim {
    bool made;
    int64_t at;
    int alert; /* or NO_ALERT */
    char text[REASON_BYTES];
};

/* An association's handshake: made with it, freed when it opens. */
struct handshake {
    enum hs_state state;
    int64_t since;                         /* it is in this state, */
    int64_t anew_at;                       /* where it failed */
    OSSL_HANDSHAKE_STATE step;             /* libssl in this one, */
    int64_t step_at;                       /* since then */
    struct association *beside;            /* the client's try that it began beside, which goes on; NULL: none */
    int64_t asked_at;                      /* since then the present ClientHello waits for its answer */
    int64_t round_trip_us;                 /* the quickest answer to one; 0: there was none yet */
    bool cookies;                          /* this server has a cookie exchange: it takes a new start for what it is */
    unsigned resends;                      /* of the present flight */
    unsigned earned;                       /* resends that a peer may draw who showed only its ClientHello */
    unsigned early;                        /* protected records that came before their keys */
    unsigned restarts, failures, refusals; /* refusals: certificates that we refused */
    struct claim claim;
    bool long_chain;                                 /* the peer sent too many certificates */
    bool no_key;                                     /* nobody knows a pre-shared key for its identity */
    uint8_t unfit[RECORD_HEADER + HANDSHAKE_HEADER]; /* of a message that may not reach libssl yet; [0] is 0: none */
    uint32_t dropped[DTLS_DROP_COUNT];
};

/* The one place where a handshake's state changes. A transition that the table does not have is a bug in this file. */
static void hs_become(struct association *a, enum hs_state state)
{
    struct handshake *h = a->handshake;
    enum hs_state was = h->state;
    h->state = state;
    h->since = loop_now(a->ep->loop);
    if (!(hs_follows[a->conn->server][was] >> state & 1))
        assoc_log(a, DTLS_LOG_ERROR, "bug: handshake state %s after %s", hs_names[state], hs_names[was]);
}

static bool hs_under_way(const struct association *a)
{
    return a->phase && a->handshake && a->handshake->state != HS_NEW && a->handshake->state != HS_FAILED;
}

/* RFC 6347 section 4.2.4.1, with our first value and largest instead of libssl's 1 s and 60 s. Each wait is half as long
 * again as the one before, and not twice as long: at 30 % loss each way that takes the slowest of a hundred handshakes
 * from 14 s to 10 s. A round-trip time that is known makes the first wait one and a half times as long, RFC 9147 section
 * 5.8.2; one that the present handshake measured makes it only longer. libssl calls this whenever it sets its timer. */
static unsigned hs_retransmit_us(SSL *ssl, unsigned last_us)
{
    const struct association *a = assoc_of(ssl);
    const dtls_config *cfg = &a->ep->cfg;
    unsigned first = (unsigned)cfg->retransmit_ms * 1000u, max = (unsigned)cfg->retransmit_max_ms * 1000u;
    unsigned paced = (unsigned)earlier(a->conn->round_trip_us, max) / 2 * 3;
    if (paced > first || (paced > 0 && a->conn->paced))
        first = paced > max ? max : paced < RETRANSMIT_MIN_US && first > RETRANSMIT_MIN_US ? RETRANSMIT_MIN_US : paced;
    /* Until the first answer only one side tries, and its datagram is small and costs the other nothing. */
    if (a->handshake && a->handshake->state <= HS_ASKING && !a->conn->server && max > HELLO_WAIT_MS * 1000u)
        max = first > HELLO_WAIT_MS * 1000u ? first : HELLO_WAIT_MS * 1000u;
    if (last_us == 0)
        return first;
    return last_us > max / 3 * 2 ? max : last_us / 2 * 3;
}

/* Keeps up with libssl. A ServerHello that came behind another message of its record is found out here. */
static void hs_follow(struct association *a)
{
    struct handshake *h = a->handshake;
    OSSL_HANDSHAKE_STATE step = SSL_get_state(a->ssl);
    bool asks = step == TLS_ST_BEFORE || step == TLS_ST_CW_CLNT_HELLO || step == DTLS_ST_CR_HELLO_VERIFY_REQUEST;
    if (step == h->step)
        return;
    h->step = step;
    h->step_at = loop_now(a->ep->loop);
    h->resends = 0;
    a->wire.largest = 0;
    if (!asks && (h->state == HS_ASKING || h->state == HS_COOKIE))
        hs_become(a, HS_FLIGHTS);
}

/* Whether it makes sense to offer the session: with what libssl would not take, and what we would refuse when it is
 * resumed, a full handshake is quicker. */
static bool hs_may_offer(const struct association *a, const SSL *ssl, SSL_SESSION *session)
{
    const STACK_OF(SSL_CIPHER) *suites = SSL_get_ciphers(ssl);
    const SSL_CIPHER *suite = SSL_SESSION_get0_cipher(session);
    X509 *cert = SSL_SESSION_get0_peer(session);
    bool known = false;
    for (int i = 0; i < sk_SSL_CIPHER_num(suites); i++)
        known = known || sk_SSL_CIPHER_value(suites, i) == suite;
    return known && SSL_SESSION_is_resumable(session) && SSL_SESSION_get_protocol_version(session) == DTLS1_2_VERSION &&
           SSL_SESSION_get_time_ex(session) >= a->ep->trust.since &&
           (cert ? !time_is_past(X509_get0_notAfter(cert)) && name_is_expected(a, cert)
                 : SSL_CIPHER_get_auth_nid(suite) == NID_auth_psk);
}

static void hs_forget_session(struct dial *d)
{
    SSL_SESSION_free(d->session);
    d->session = NULL;
}

static bool hs_still_trusts(const struct association *a, char reason[REASON_BYTES]);

/* libssl ties a session to the context of its making; ours is random, and another process has another. For a client that
 * protects nothing: who saved the session says that it may be used. */
static bool hs_offer(const struct association *a, SSL *ssl, SSL_SESSION *session)
{
    unsigned len;
    char reason[REASON_BYTES];
    const uint8_t *context = SSL_SESSION_get0_id_context(session, &len);
    SSL_SESSION *copy = SSL_SESSION_dup(session); /* libssl marks it as spoilt if this handshake fails */
    bool good = copy && SSL_set_session_id_context(ssl, context, len) == 1 && SSL_set_session(ssl, copy) == 1;
    SSL_SESSION_free(copy);
    /* It may come from an insecure run, or from one that trusted others: in a full handshake all is looked at again. */
    if (good && a->ep->cfg.auth != DTLS_AUTH_INSECURE && SSL_get_verify_mode(ssl) != SSL_VERIFY_NONE &&
        (SSL_get_verify_result(ssl) != X509_V_OK || !hs_still_trusts(a, reason))) {
        hs_forget_session(a->conn->dial);
        good = SSL_set_session(ssl, NULL) == 1;
    }
    return good;
}

/* An insecure client takes any certificate, and remembers what it would have refused. Not logged from in here. */
static int hs_look_away(int good, X509_STORE_CTX *store)
{
    SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());
    struct dial *d = assoc_of(ssl)->conn->dial;
    if (!good && d && !d->warning[0])
        snprintf(d->warning, sizeof d->warning, "%s", X509_verify_cert_error_string(X509_STORE_CTX_get_error(store)));
    return 1;
}

static bool hs_be_client(const struct association *a)
{
    struct dial *d = a->conn->dial;
    dtls_auth auth = a->ep->cfg.auth;
    DTLS_set_timer_cb(a->ssl, hs_retransmit_us);
    SSL_set_connect_state(a->ssl);
    if (auth != DTLS_AUTH_MUTUAL)
        SSL_set_verify(a->ssl, SSL_VERIFY_PEER, auth == DTLS_AUTH_INSECURE ? hs_look_away : NULL);
    if (d->session && !hs_may_offer(a, a->ssl, d->session))
        hs_forget_session(d);
    return name_expect(a, a->ssl) && (!d->session || hs_offer(a, a->ssl, d->session));
}

/* A client tries once more, and remembers why. If nobody answers then, that is what there is to tell. A server whose
 * certificate we refused did answer. */
static void hs_note_fault(struct dial *d, dtls_reason reason, const char *text)
{
    if (d->fault == DTLS_CLOSE_VERIFY && reason != DTLS_CLOSE_VERIFY)
        return;
    d->fault = reason;
    snprintf(d->fault_text, sizeof d->fault_text, "%s", text);
}

static void hs_lose(struct association *a, dtls_reason reason, const char *text);

static void hs_give_up(struct association *a, dtls_reason reason, const char *text)
{
    const struct dial *d = a->conn->dial;
    if (d && d->fault && a->handshake->state == HS_ASKING)
        hs_lose(a, d->fault, d->fault_text);
    else
        hs_lose(a, reason, text);
}

/* Opening: the handshake is over. */

/* What is wrong with the peer of a resumed handshake, which verifies nothing again, neither dates nor names. */
static bool hs_refuses_session(struct association *a, X509 *cert, char text[REASON_BYTES])
{
    char words[REASON_BYTES] = "";
    struct dial *d = a->conn->dial;
    if (a->ep->cfg.auth == DTLS_AUTH_INSECURE && !a->conn->server) {
        if (d && SSL_get_verify_result(a->ssl) != X509_V_OK)
            snprintf(d->warning, sizeof d->warning, "%s", X509_verify_cert_error_string(SSL_get_verify_result(a->ssl)));
        return false;
    }
    if (SSL_get_verify_mode(a->ssl) != SSL_VERIFY_NONE && SSL_get_verify_result(a->ssl) != X509_V_OK)
        snprintf(words, sizeof words, "%s", X509_verify_cert_error_string(SSL_get_verify_result(a->ssl)));
    else if (cert && time_is_past(X509_get0_notAfter(cert)))
        snprintf(words, sizeof words, "%s", X509_verify_cert_error_string(X509_V_ERR_CERT_HAS_EXPIRED));
    else if (cert && !a->conn->server && !name_is_expected(a, cert))
        assoc_mismatch(a, cert, X509_V_ERR_HOSTNAME_MISMATCH, words);
    if (words[0]) {
        session_forget(a->ep, a->ssl);
        snprintf(text, REASON_BYTES, "certificate refused: %.200s", words);
    }
    return words[0] != 0;
}

/* A server's: the length of that identity's key, 0 if there is none. */
static size_t psk_find(dtls_endpoint *ep, const char *identity, uint8_t key[DTLS_PSK_MAX])
{
    ep->inside = true;
    size_t n = ep->cfg.psk ? ep->cfg.psk(ep->cfg.user, identity, key) : 0;
    ep->inside = false;
    return n <= DTLS_PSK_MAX ? n : 0;
}

static bool psk_is_known(dtls_endpoint *ep, const char *identity)
{
    uint8_t key[DTLS_PSK_MAX];
    bool known = psk_find(ep, identity, key) > 0;
    OPENSSL_cleanse(key, sizeof key);
    return known;
}

/* Who the peer is. False: text says why that is nobody. */
static bool hs_identify(struct association *a, X509 *cert, char text[REASON_BYTES])
{
    const char *psk = !cert && a->conn->server ? SSL_get_psk_identity(a->ssl) : NULL;
    if (psk && SSL_session_reused(a->ssl) && !psk_is_known(a->ep, psk)) {
        snprintf(text, REASON_BYTES, "refused: its pre-shared key is no longer known");
        return false;
    }
    if (cert || psk)
        a->identity = identity_get(a->ep, cert, psk);
    if (!a->identity && (cert || psk))
        snprintf(text, REASON_BYTES, "certificate refused: its name cannot be read");
    return a->identity || !(cert || psk);
}

/* Whether its address or its certificate has as many connections as it may, but for one that this replaces. */
static bool hs_is_too_many(const struct association *a, char text[REASON_BYTES])
{
    const dtls_config *cfg = &a->ep->cfg;
    const struct identity *id = a->identity;
    const struct association *old = assoc_predecessor(a);
    size_t replaced = old && old->source == a->source; /* it may count elsewhere */
    const dtls_counters *n = &a->ep->counters;
    if (a->source && !old &&
        at_limit(n->conns - n->handshakes, cfg->max_conns)) /* the one that it was to replace moved away */
        snprintf(text, REASON_BYTES, "refused: max_conns (%d) is reached", cfg->max_conns);
    else if (a->source && at_limit(a->source->open - replaced, cfg->max_conns_per_address))
        snprintf(text, REASON_BYTES, "refused: max_conns_per_address (%d) is reached", cfg->max_conns_per_address);
    else if (a->source && id && at_limit(id->open - (old && old->conn->identity == id), cfg->max_conns_per_identity))
        snprintf(text, REASON_BYTES, "refused: max_conns_per_identity (%d) is reached by %.100s",
                 cfg->max_conns_per_identity, id->name);
    else
        return false;
    return true;
}

/* Whether the present trust would take the peer of an association that another one took. */
static bool hs_still_trusts(const struct association *a, char reason[REASON_BYTES])
{
    dtls_endpoint *ep = a->ep;
    bool server = a->conn->server;
    SSL_CTX *ctx = ep->trust.ctx;
    int mode = SSL_CTX_get_verify_mode(ctx);
    X509 *cert = SSL_get1_peer_certificate(a->ssl);
    X509_STORE_CTX *store = cert ? X509_STORE_CTX_new() : NULL;
    const char *psk = cert ? NULL : SSL_get_psk_identity(a->ssl);
    bool asked = mode != SSL_VERIFY_NONE || (!server && ep->cfg.auth == DTLS_AUTH_SERVER);
    bool good = !asked || (!server && ep->cfg.auth == DTLS_AUTH_INSECURE);
    snprintf(reason, REASON_BYTES, "no memory to verify it");
    if (!cert) {
        snprintf(reason, REASON_BYTES, psk ? "its pre-shared key is no longer known" : "it has no certificate");
        good = !server || (psk ? psk_is_known(ep, psk) : !(mode & SSL_VERIFY_FAIL_IF_NO_PEER_CERT));
    } else if (store && !good &&
               X509_STORE_CTX_init(store, SSL_CTX_get_cert_store(ctx), cert, SSL_get_peer_cert_chain(a->ssl)) == 1 &&
               X509_STORE_CTX_set_default(store, server ? "ssl_client" : "ssl_server") == 1 &&
               X509_VERIFY_PARAM_set1(X509_STORE_CTX_get0_param(store), SSL_CTX_get0_param(ctx)) == 1) {
        good = X509_verify_cert(store) == 1;
        snprintf(reason, REASON_BYTES, "%s", X509_verify_cert_error_string(X509_STORE_CTX_get_error(store)));
    }
    X509_STORE_CTX_free(store);
    X509_free(cert);
    errors_clear();
    return good;
}

/* Whether anything is wrong with the peer, though libssl is content: a->refusal says what. */
static bool hs_refuses(struct association *a)
{
    char text[REASON_BYTES], reason[REASON_BYTES] = "";
    X509 *cert = SSL_get1_peer_certificate(a->ssl);
    bool bad = SSL_session_reused(a->ssl) == 1 && hs_refuses_session(a, cert, text);
    if (!bad && !a->ep->cfg.allow_no_ems && SSL_get_extms_support(a->ssl) != 1) {
        snprintf(text, REASON_BYTES, "refused: no extended master secret (RFC 7627)");
        bad = true;
    }
    if (!bad && a->made_with != a->ep->trust.ctx && !hs_still_trusts(a, reason)) { /* reloaded meanwhile */
        snprintf(text, REASON_BYTES, "certificate refused: %.200s", reason);
        bad = true;
    }
    bad = bad || !hs_identify(a, cert, text) || hs_is_too_many(a, text);
    if (!bad && !traffic_welcomes(a, a->identity, reason, sizeof reason)) {
        session_forget(a->ep, a->ssl);
        snprintf(text, REASON_BYTES, "refused: %.200s", reason);
        bad = true;
    }
    if (bad)
        a->refusal = text_copy(text);
    a->refused = bad;
    X509_free(cert);
    errors_clear();
    return bad;
}

/* A client that a server refuses at the end of a full handshake hears why: in place of the server's last flight, which
 * begins with its ChangeCipherSpec, goes an alert. Up to there it has spoken unprotected, so that is the right form. */
static void hs_deny(struct association *a)
{
    struct flight *f = a->wire.flight;
    if (f->len <= RECORD_HEADER || f->bytes[0] != TYPE_CCS)
        return;
    const uint8_t alert[] = {0, 2, SSL3_AL_FATAL, SSL_AD_ACCESS_DENIED};
    f->bytes[0] = TYPE_ALERT;
    memcpy(f->bytes + RECORD_HEADER - 2, alert, sizeof alert);
    f->len = RECORD_HEADER + 2;
    SSL_set_shutdown(a->ssl, SSL_SENT_SHUTDOWN);
}

/* Lets libssl work until it wants more input. What it writes goes out packed. Returns what SSL_get_error() says. */
static int hs_advance(struct association *a)
{
    struct flight flight;
    errors_clear();
    flight_begin(&a->wire, &flight, a->handshake->resends > 0);
    int r = SSL_do_handshake(a->ssl);
    bool refused = r == 1 && hs_refuses(a);
    if (refused && a->conn->server)
        hs_deny(a);
    else if (refused && SSL_session_reused(a->ssl))
        flight.len = 0; /* with our Finished the server would take this one for the connection */
    flight_end(&a->wire);
    return r == 1 ? SSL_ERROR_NONE : SSL_get_error(a->ssl, r);
}

/* Nonce and tag of the suite's records. */
static size_t hs_record_overhead(const SSL_CIPHER *cipher)
{
    const struct aead *aead = aead_of(cipher);
    return aead ? (size_t)aead->explicit + aead->tag : OVERHEAD_MAX;
}

/* The largest message: the peer may take less than a record holds (max_fragment_length, RFC 6066 section 4), and so may
 * on_ssl_ctx. libssl does not tell its max_send_fragment, but refuses any split_send_fragment above it. */
static size_t hs_message_max(SSL *ssl)
{
    unsigned code = SSL_SESSION_get_max_fragment_length(SSL_get0_session(ssl));
    size_t max = DTLS_MESSAGE_MAX, above = max;
    if (SSL_set_split_send_fragment(ssl, (long)max) != 1)
        max = 512; /* the smallest that libssl lets anybody set */
    while (above - max > 1) {
        size_t middle = (max + above) / 2;
        bool fits = SSL_set_split_send_fragment(ssl, (long)middle) == 1;
        *(fits ? &max : &above) = middle;
    }
    return code >= 1 && code <= 4 && max > (size_t)256 << code ? (size_t)256 << code : max;
}

/* What keys are good for, RFC 9325 section 4.4 and what it refers to: AES-GCM for so many blocks of text, AES-CCM for so
 * many records; and as many forgeries as RFC 9147 section 4.5.3 allows. The record number ends what ChaCha20-Poly1305 may. */
static struct key_use hs_key_use(const SSL_CIPHER *cipher)
{
    int nid = SSL_CIPHER_get_cipher_nid(cipher);
    if (nid == NID_aes_128_gcm || nid == NID_aes_256_gcm)
        return (struct key_use){.by_bytes = true, .out = 1ull << 38, .in = 1ull << 38, .forged = 1ull << 36};
    if (nid == NID_chacha20_poly1305)
        return (struct key_use){.out = 1ull << 47, .in = 1ull << 47, .forged = 1ull << 36};
    return (struct key_use){.out = 1ull << 23, .in = 1ull << 23, .forged = 1ull << 23};
}

/* A new association from the same addresses takes this one's place. One whose client refused it says so. */
static void hs_give_way(struct association *old)
{
    if (old->handshake && old->handshake->claim.made)
        conn_end(old->conn, DTLS_CLOSE_REFUSED, "%s", old->handshake->claim.text);
    else
        conn_end(old->conn, DTLS_CLOSE_REPLACED, "replaced by a new association from the same address");
}

/* From here on the association is its connection's open one, instead of the one before and of all other tries. The
 * handshake is gone after this. */
static void hs_take_over(struct association *a)
{
    dtls_conn *c = a->conn;
    struct association *old = c->open;
    hs_become(a, HS_DONE);
    free(a->handshake);
    a->handshake = NULL;
    a->phase = &open_phase;
    source_opened(a);
    a->overhead = hs_record_overhead(SSL_get_current_cipher(a->ssl));
    a->message_max = hs_message_max(a->ssl);
    a->keys = hs_key_use(SSL_get_current_cipher(a->ssl));
    source_set_blind(a, !(a->wire.cid && a->wire.cid_in[0] > 0));
    for (struct association *t = c->tries; t; t = t->older)
        if (t != a)
            assoc_end(t, DTLS_CLOSE_REPLACED);
    c->tries = NULL;
    c->open = a;
    a->wire.rrc = a->wire.rrc && a->wire.cid;
    if (old)
        assoc_end(old, DTLS_CLOSE_LOCAL);
    dial_end(c);
    conn_set_identity(c, a->identity);
    a->identity = NULL;
    c->resumed = SSL_session_reused(a->ssl) == 1;
    c->unanswered = c->doubted = false;
    c->last_in = c->idle_raised = a->used_at = loop_now(a->ep->loop);
    a->ep->counters.handshakes -= c->server;
    a->ep->counters.handshakes_resumed += c->resumed;
    a->ep->counters.handshakes_full += !c->resumed;
    assoc_arm(a);
}

/* The application hears of it. */
static void hs_tell(struct association *a, bool renewed)
{
    dtls_conn *c = a->conn;
    c->renewals += renewed;
    conn_raise(c, renewed ? DTLS_EV_RENEWED : DTLS_EV_CONNECTED, NULL, 0);
    if (c->open == a && c->state == CONN_OPEN)
        conn_tell_writable(c);
    traffic_read(a, false);
    /* Given back now libssl's buffers leave no holes in the heap. A busy connection gets them again and keeps them. */
    if (a->phase) {
        traffic_quiet(a, loop_now(a->ep->loop));
        assoc_arm(a);
    }
}

static void hs_open(struct association *a)
{
    dtls_conn *c = a->conn;
    bool renewed = c->open != NULL;
    if (a->refused) {
        hs_lose(a, DTLS_CLOSE_VERIFY, a->refusal ? a->refusal : "refused, and no memory to say why");
        return;
    }
    /* The callbacks in here may end it; until it is open the application does not know it. */
    struct association *old = assoc_predecessor(a);
    if (old && old->conn != c) /* RFC 6347 section 4.2.8 */
        hs_give_way(old);
    if (a->phase && c->dial && c->dial->warning[0])
        assoc_log(a, DTLS_LOG_WARNING, "not verified: %s", c->dial->warning);
    if (a->phase)
        assoc_log(a, DTLS_LOG_INFO, "%s: %s, %s, %s", renewed ? "renewed" : "connected",
                  a->identity ? a->identity->name : "", SSL_get_cipher_name(a->ssl),
                  SSL_session_reused(a->ssl) ? "resumed session" : "full handshake");
    if (!a->phase)
        return;
    hs_take_over(a);
    c->state = CONN_OPEN;
    hs_tell(a, renewed);
}

/* Failing, and beginning anew. */

/* Whether a failure may come from a damaged message; a certificate that was damaged looks like a wrong one. */
static bool hs_may_begin_anew(struct association *a, int code)
{
    struct handshake *h = a->handshake;
    if (a->conn->server)
        return false;
    if (code == SSL_R_CERTIFICATE_VERIFY_FAILED)
        return h->refusals++ < FAILURES_VERIFY;
    return h->failures++ < FAILURES_MAX;
}

/* libssl gave up. */
static void hs_failed(struct association *a, int error)
{
    char text[REASON_BYTES];
    int code;
    dtls_conn *c = a->conn;
    dtls_reason why = assoc_failure(a, &code, text);
    bool offered = c->dial && c->dial->session; /* that may be why, so it is left out */
    if (error != SSL_ERROR_SSL && error != SSL_ERROR_SYSCALL) {
        hs_lose(a, DTLS_CLOSE_ERROR, "a hook of on_ssl_ctx asks to be called again, which is not possible here");
        return;
    }
    if (a->handshake->long_chain) {
        why = DTLS_CLOSE_VERIFY;
        code = SSL_R_CERTIFICATE_VERIFY_FAILED;
        snprintf(text, sizeof text, "certificate refused: too many in its chain");
    }
    a->handshake->long_chain = false;
    if (!offered && !hs_may_begin_anew(a, code)) {
        hs_lose(a, why, text);
        return;
    }
    hs_note_fault(c->dial, why, text);
    hs_become(a, HS_FAILED);
    a->handshake->anew_at = a->handshake->since + (offered ? 0 : us(a->ep->cfg.retransmit_ms));
    if (offered)
        hs_forget_session(c->dial);
    assoc_arm(a);
}

/* The same flight is to be sent for a third time: in smaller datagrams, if it has large ones. */
static void hs_fall_back(struct association *a)
{
    if (a->handshake->resends > 0 && wire_fall_back(&a->wire))
        SSL_set_mtu(a->ssl, (long)wire_room(&a->wire));
}

static void hs_resent(struct association *a)
{
    a->handshake->resends++;
    a->conn->resends++;
    a->ep->counters.retransmissions++;
    assoc_log(a, DTLS_LOG_DEBUG, "did not answer in time: flight sent again");
}

/* When a datagram comes just as libssl's timer has run out, libssl sends the flight again itself, unless that was the answer
 * to it. That is no rare case: where both sides began to wait at one time, they go on in step. */
static void hs_drive(struct association *a)
{
    struct timeval left;
    int mtu = a->wire.mtu;
    size_t largest = a->wire.largest;
    a->wire.written = false;
    bool due = DTLSv1_get_timeout(a->ssl, &left) && left.tv_sec == 0 && left.tv_usec == 0;
    if (due)
        hs_fall_back(a);
    int e = hs_advance(a);
    if (!a->phase) /* a hook of on_ssl_ctx ended it */
        return;
    if (e != SSL_ERROR_NONE && e != SSL_ERROR_WANT_READ && e != SSL_ERROR_WANT_WRITE) {
        hs_failed(a, e);
        return;
    }
    if (due && a->wire.written && SSL_get_state(a->ssl) == a->handshake->step) {
        hs_resent(a);
    } else if (a->wire.mtu != mtu) {
        a->wire.mtu = mtu;
        a->wire.largest = largest;
        SSL_set_mtu(a->ssl, (long)wire_room(&a->wire));
    }
    if (!a->phase) /* the log ended it */
        return;
    hs_follow(a);
    if (e == SSL_ERROR_NONE)
        hs_open(a);
    else
        assoc_arm(a);
}

/* A client's tries. Its first, one for each further address of its host, and one more where one fails or stands still:
 * plaintext handshake messages may arrive damaged or forged, the peer that stumbles over one forgets the handshake, and
 * RFC 6347 has no way back.
 *
 * One more goes out from a socket of its own. So it is one more to every server, while from the same port only a server
 * that does as RFC 6347 section 4.2.8 says would take it for a new start; and the one that stands still goes on beside it,
 * since the server's next retransmission may be all that it waits for. With a transport of the user's own there is only
 * the one port, and the new start takes the place of the old one. */

/* False: no memory. The association's connection is there. */
static bool hs_new(struct association *a)
{
    struct handshake *h = a->handshake = calloc(1, sizeof *h);
    if (!h)
        return false;
    h->asked_at = h->step_at = a->used_at = a->conn->server ? a->conn->started : loop_now(a->ep->loop);
    h->earned = UNPROVEN_RESENDS;
    a->wire.server = a->conn->server;
    a->phase = &hs_phase;
    return true;
}

/* A client's first ClientHello. Not done: OpenSSL's error queue has the reason. */
static bool hs_connect(struct association *a)
{
    hs_become(a, HS_ASKING);
    int e = hs_advance(a); /* cannot be done before an answer */
    if (e != SSL_ERROR_WANT_READ && e != SSL_ERROR_WANT_WRITE)
        return false;
    assoc_arm(a);
    return true;
}

static struct association *hs_try_new(dtls_conn *c)
{
    struct association *a = assoc_new(c->ep);
    if (!a)
        return NULL;
    a->conn = c; /* hs_new() looks at it */
    if (hs_new(a)) {
        conn_add_try(c, a);
        return a;
    }
    assoc_end(a, DTLS_CLOSE_ERROR);
    return NULL;
}

static void hs_try_remove(struct association *a)
{
    struct association **at = &a->conn->tries;
    for (struct association *t = *at; t; t = t->older)
        if (t->handshake->beside == a)
            t->handshake->beside = NULL;
    while (*at != a)
        at = &(*at)->older;
    *at = a->older;
    assoc_end(a, DTLS_CLOSE_REPLACED);
}

/* Its first ClientHello, to that address. 0 or an error. */
static int hs_try_start(struct association *a, const dtls_addr *peer, dtls_error *err)
{
    char text[DTLS_ADDR_TEXT];
    int r = assoc_open_path(a, peer, &a->conn->dial->local, err);
    if (r < 0)
        return r;
    if (hs_be_client(a) && hs_connect(a))
        return 0;
    const char *reason = ERR_reason_error_string(ERR_peek_last_error());
    return fail(err, DTLS_ERR_TLS, "%s: OpenSSL: %s", dtls_addr_format(peer, text, sizeof text),
                reason ? reason : "no reason given");
}

/* The next of the host's addresses. 0, or why none could be tried; a connection that has no other keeps its last try, to be
 * asked until it is gone. */
static int hs_dial(dtls_conn *c, dtls_error *err)
{
    struct dial *d = c->dial;
    struct association *spoilt = NULL;
    int r = fail(err, DTLS_ERR_MEMORY, "out of memory");
    while (d->addrs_tried < d->addrs_len) {
        bool placeholder = c->tries && !spoilt && c->tries->handshake->state == HS_NEW;
        struct association *a = placeholder ? c->tries : hs_try_new(c);
        d->next_at = loop_now(c->ep->loop) + us(STAGGER_MS);
        if (!a)
            return r;
        if (spoilt)
            hs_try_remove(spoilt);
        spoilt = NULL;
        r = hs_try_start(a, &d->addrs[d->addrs_tried++], err);
        if (r == 0)
            return 0;
        if (a->older || c->open)
            hs_try_remove(a);
        else
            spoilt = a;
    }
    return r;
}

/* A renewal came to nothing: the connection stays what it was. */
static void hs_not_renewed(dtls_conn *c, const char *text)
{
    while (c->tries)
        hs_try_remove(c->tries);
    dial_end(c);
    c->unanswered = false;
    c->ep->counters.handshakes_failed++;
    assoc_log(c->open, DTLS_LOG_WARNING, "not renewed: %s", text);
    if (c->state == CONN_OPEN)
        assoc_arm(c->open);
}

/* This try is over. The last one ends what it was for. */
static void hs_lose(struct association *a, dtls_reason reason, const char *text)
{
    dtls_conn *c = a->conn;
    struct dial *d = c->dial;
    dtls_error err;
    char words[REASON_BYTES];
    snprintf(words, sizeof words, "%s", text);
    if (c->server) {
        conn_end(c, reason, "%s", words);
        return;
    }
    hs_note_fault(d, reason, words);
    if (c->tries->older || d->addrs_tried < d->addrs_len) {
        assoc_log(a, DTLS_LOG_DEBUG, "one of several tries failed: %s", words);
        if (!a->phase || c->dial != d)
            return;
        bool more = d->addrs_tried < d->addrs_len && hs_dial(c, &err) == 0;
        if (more || c->tries->older) {
            hs_try_remove(a);
            return;
        }
    }
    snprintf(words, sizeof words, "%s", d->fault_text);
    if (c->open)
        hs_not_renewed(c, words);
    else
        conn_end(c, d->fault, "%s", words);
}

/* Whether the present try can go on beside a new one. */
static bool hs_has_own_socket(const struct association *a)
{
    return a->udp != NULL;
}

static bool hs_has_successor(const struct association *a)
{
    const struct association *t = a->conn->tries;
    while (t && t->handshake->beside != a)
        t = t->older;
    return t != NULL;
}

static void hs_begin_anew(struct association *a, bool beside)
{
    dtls_conn *c = a->conn;
    struct handshake *h = a->handshake;
    dtls_error err;
    h->step_at = loop_now(c->ep->loop);
    if (!beside && (h->beside || hs_has_successor(a))) { /* that is the new start */
        hs_try_remove(a);
        return;
    }
    struct association *b = hs_try_new(c);
    if (!b) {
        if (!beside)
            hs_lose(a, DTLS_CLOSE_ERROR, "out of memory");
        return;
    }
    if (h->beside)
        hs_try_remove(h->beside);
    b->handshake->restarts = h->restarts + 1;
    b->handshake->failures = h->failures;
    b->handshake->refusals = h->refusals;
    memcpy(b->handshake->dropped, h->dropped, sizeof h->dropped);
    memcpy(b->handshake->unfit, h->unfit, sizeof h->unfit);
    memcpy(b->hello_random, a->hello_random, HELLO_RANDOM);
    b->wire.mtu = a->wire.mtu; /* what is known of the path stays */
    b->handshake->beside = beside ? a : NULL;
    if (!beside)
        hs_try_remove(a);
    assoc_log(b, DTLS_LOG_DEBUG, "begins its handshake anew");
    if (b->phase && hs_try_start(b, &a->peer, &err) < 0)
        hs_lose(b, DTLS_CLOSE_ERROR, err.text);
}

static void hs_replace(struct association *a, int64_t now)
{
    (void)now;
    hs_begin_anew(a, false);
}

/* The deadlines of a handshake. The first stays what it is; what arrives and passes the guard may move the others:
 *
 *   over         handshake_timeout_ms after its first datagram the connection ends, or stays what it was if it is open
 *   begin        a server's begins as soon as it is its turn
 *   next         a host's next address is tried STAGGER_MS after the last one
 *   anew         a client that failed begins anew after retransmit_ms, since what else of that try is under way comes
 *                first; at once, and without it, where it had offered a session
 *   believed     a claim that the peer refuses us is acted upon after a time in which nothing plausible came
 *   stalled      a client that made no progress for STALL_MS begins one more try, later after each
 *   retransmit   libssl's own timer (DTLSv1_get_timeout): the present flight is sent again
 */

static int64_t hs_began_at(const struct association *a)
{
    return a->conn->dial ? a->conn->dial->since : a->conn->started;
}

static int64_t hs_over_at(const struct association *a)
{
    return hs_began_at(a) + us(a->ep->cfg.handshake_timeout_ms);
}

/* What was dropped may be why. */
static void hs_put_drops(const struct handshake *h, char *text, size_t size)
{
    const char *before = "; dropped: ";
    for (int i = 0; i < DTLS_DROP_COUNT; i++) {
        size_t len = strlen(text);
        if (h->dropped[i] > 0 && len < size) {
            snprintf(text + len, size - len, "%s%u %s", before, h->dropped[i], dtls_drop_name((dtls_drop)i));
            before = ", ";
        }
    }
}

/* A message that no peer sends that is in order. Anybody can forge one, so a handshake that goes on must not end by it, and
 * libssl gets it only when the handshake is over. An empty fragment of it will do: by what its header says libssl tells the
 * peer what is wrong with it. */
static void hs_keep_unfit(struct association *a, const struct guard *g, const struct record *r)
{
    const uint8_t *p = r->body;
    uint8_t *unfit = a->handshake->unfit;
    if (r->epoch != 0 || r->type != TYPE_HANDSHAKE || r->body_len < HANDSHAKE_HEADER ||
        guard_message(g, p[0], load16(p + 4), load24(p + 1)))
        return;
    memset(unfit, 0, sizeof a->handshake->unfit); /* and so offset and size of the fragment */
    memcpy(unfit, r->start, RECORD_HEADER + 6);
    unfit[11] = 0;
    unfit[12] = HANDSHAKE_HEADER;
}

static void hs_tell_unfit(struct association *a, char *text, size_t size)
{
    const uint8_t *unfit = a->handshake->unfit, *message = unfit + RECORD_HEADER;
    size_t n = strlen(text);
    if (!unfit[0])
        return;
    if (message[0] == CERTIFICATE && load24(message + 1) > (unsigned)a->ep->cfg.max_chain_bytes)
        snprintf(text + n, size - n, "; a Certificate of %u bytes came, max_chain_bytes is %d", load24(message + 1),
                 a->ep->cfg.max_chain_bytes);
    else
        snprintf(text + n, size - n, "; a message out of place came, of type %u", message[0]);
    a->wire.in = unfit;
    a->wire.in_len = sizeof a->handshake->unfit;
    a->wire.in_renumber = true;
    hs_advance(a);
    a->wire.in = NULL;
    errors_clear();
}

/* A wrong key shows by nothing but silence, since libssl drops what it cannot read. */
static void hs_tell_psk(struct association *a, char *text, size_t size)
{
    const char *psk = a->conn->server ? SSL_get_psk_identity(a->ssl) : NULL;
    struct identity *id = psk ? identity_get(a->ep, NULL, psk) : NULL;
    size_t n = strlen(text);
    if (id)
        snprintf(text + n, size - n, "; %s, for identity %.100s",
                 a->handshake->no_key ? "no pre-shared key is known" : "the pre-shared key may be wrong", id->name);
    identity_release(a->ep, id);
}

static void hs_over(struct association *a, int64_t now)
{
    dtls_conn *c = a->conn;
    char text[REASON_BYTES];
    snprintf(text, sizeof text, "timed out after %.1f s", (double)(now - hs_began_at(a)) / 1e6);
    hs_put_drops(a->handshake, text, sizeof text);
    hs_tell_unfit(a, text, sizeof text);
    hs_tell_psk(a, text, sizeof text);
    while (c->tries->older)
        hs_try_remove(c->tries == a ? c->tries->older : c->tries);
    if (c->dial)
        c->dial->addrs_len = 0;
    hs_give_up(a, DTLS_CLOSE_TIMEOUT, text);
}

static int64_t hs_begin_at(const struct association *a)
{
    return a->conn->server && a->handshake->state == HS_NEW ? a->conn->started : INT64_MAX;
}

static void hs_begin(struct association *a, int64_t now)
{
    if (a->used_at == a->conn->started) /* its time begins when it is answered */
        a->used_at = now;
    a->handshake->asked_at = now;
    hs_become(a, HS_FLIGHTS);
    hs_drive(a);
}

static int64_t hs_next_at(const struct association *a)
{
    const struct dial *d = a->conn->dial;
    return d && a == a->conn->tries && d->addrs_tried < d->addrs_len ? d->next_at : INT64_MAX;
}

static void hs_next(struct association *a, int64_t now)
{
    dtls_error err;
    (void)now;
    hs_dial(a->conn, &err); /* where it fails, the tries under way decide */
}

static int64_t hs_anew_at(const struct association *a)
{
    const struct handshake *h = a->handshake;
    return h->state == HS_FAILED ? h->anew_at : INT64_MAX;
}

/* An alert may be about a message of ours that came damaged or was forged; ICMP is not. */
static bool hs_may_retry_refusal(const struct handshake *h)
{
    return h->cookies && h->claim.alert != NO_ALERT;
}

static int64_t hs_believed_at(const struct association *a)
{
    const struct handshake *h = a->handshake;
    int64_t grace = us(CLAIM_GRACE_MS);
    int64_t between = h->claim.at - hs_began_at(a) + us(CLAIM_RETRY_MS); /* tries of a client that doubles its waits */
    if (h->state == HS_FAILED || !h->claim.made)
        return INT64_MAX;
    if (hs_may_retry_refusal(h))
        grace = us(CLAIM_RETRY_MS);
    else if (a->conn->server && grace < us(a->ep->cfg.retransmit_max_ms))
        grace = us(a->ep->cfg.retransmit_max_ms);
    if (a->conn->server && grace < between)
        grace = between;
    return h->claim.at + grace + 2 * h->round_trip_us;
}

static void hs_believed(struct association *a, int64_t now)
{
    struct handshake *h = a->handshake;
    (void)now;
    if (hs_may_retry_refusal(h) && h->failures++ < FAILURES_REFUSED) {
        hs_note_fault(a->conn->dial, DTLS_CLOSE_REFUSED, h->claim.text);
        hs_begin_anew(a, false);
    } else {
        hs_give_up(a, DTLS_CLOSE_REFUSED, h->claim.text);
    }
}

/* Longer than the peer's first timers, of 1, 2 and 4 s: servers that serve one client at a time may be confused by one more
 * ClientHello. From the same port a server without cookies would take it for a stale one. */
static int64_t hs_stalled_at(const struct association *a)
{
    const struct handshake *h = a->handshake;
    bool answered = h->state == HS_COOKIE || h->state == HS_FLIGHTS;
    if (a->conn->server || !answered || (!hs_has_own_socket(a) && !h->cookies) || hs_has_successor(a))
        return INT64_MAX;
    return h->step_at + us(STALL_MS) * (2 + h->restarts) / 2 + 2 * h->round_trip_us;
}

static void hs_stalled(struct association *a, int64_t now)
{
    (void)now;
    hs_begin_anew(a, hs_has_own_socket(a));
}

/* Somebody who saw a ClientHello with its cookie can send it again in the other's name. So a client of which we know no
 * more than that gets few flights, and then one for each time that it repeats its ClientHello. */
static bool hs_is_owed_nothing(const struct association *a)
{
    return a->conn->server && !a->shown && a->handshake->resends >= a->handshake->earned;
}

static void hs_hello_again(struct association *a)
{
    if (hs_is_owed_nothing(a)) {
        a->handshake->earned++;
        assoc_arm(a);
    }
}

/* libssl's timer follows the wall clock: after a step of that it could be far off, so no wait is longer than the longest
 * of ours. */
static int64_t hs_retransmit_at(const struct association *a)
{
    struct timeval left;
    if (hs_is_owed_nothing(a) || a->handshake->state == HS_FAILED || !DTLSv1_get_timeout(a->ssl, &left))
        return INT64_MAX;
    int64_t left_us = left.tv_sec * (int64_t)1000000 + left.tv_usec;
    if (left_us == 0)
        return INT64_MIN; /* and not now, which is later with each look at the clock */
    return loop_now(a->ep->loop) + earlier(left_us, us(a->ep->cfg.retransmit_max_ms));
}

static void hs_retransmit(struct association *a, int64_t now)
{
    struct flight flight;
    errors_clear();
    hs_fall_back(a);
    flight_begin(&a->wire, &flight, a->handshake->resends > 0);
    long r = DTLSv1_handle_timeout(a->ssl);
    flight_end(&a->wire);
    if (r > 0) {
        hs_resent(a);
    } else if (r < 0 && !a->conn->server) { /* libssl gives up after 12; a client goes on until its deadline */
        hs_begin_anew(a, false);
    } else if (r < 0) {
        hs_over(a, now);
    }
}

static const struct rule hs_rules[] = {{hs_over_at, hs_over},
                                       {hs_begin_at, hs_begin},
                                       {hs_next_at, hs_next},
                                       {hs_anew_at, hs_replace},
                                       {hs_believed_at, hs_believed},
                                       {hs_stalled_at, hs_stalled},
                                       {hs_retransmit_at, hs_retransmit},
                                       {NULL, NULL}};

/* What arrives. */

static void hs_claim(struct association *a, int alert, const char *text)
{
    struct claim *claim = &a->handshake->claim;
    if (!claim->made)
        claim->at = loop_now(a->ep->loop);
    claim->made = true;
    claim->alert = alert;
    snprintf(claim->text, sizeof claim->text, "%s%s", alert == NO_ALERT ? "" : "refused by the peer: ", text);
    assoc_arm(a);
}

/* An error on a client's own socket may be ICMP telling that nobody is there. Once somebody answered it counts no more,
 * and never where the system is short of buffers: the BSDs say that of a busy interface. */
static void hs_socket_failed(struct association *a, int error)
{
    if (hs_under_way(a) && !a->conn->open && a->handshake->state == HS_ASKING && error != ENOBUFS && error != ENOMEM)
        hs_claim(a, NO_ALERT, strerror(error));
}

/* A flight has its answer. Only where it was sent once does that tell a round trip; otherwise at most how long one is. */
static void hs_round_trip(struct association *a, int64_t took)
{
    dtls_conn *c = a->conn;
    struct handshake *h = a->handshake;
    took = took > 0 ? took : 1;
    if (h->round_trip_us == 0 || took < h->round_trip_us)
        h->round_trip_us = took;
    if (h->resends == 0 && (c->round_trip_us == 0 || took < c->round_trip_us))
        c->round_trip_us = took;
}

/* A ClientHello has its answer. That took a round trip, and longer if any was lost: the quickest tells most. */
static void hs_answered(struct association *a, const struct record *r)
{
    struct handshake *h = a->handshake;
    bool cookie = r->body[0] == HELLO_VERIFY_REQUEST;
    const uint8_t *random = record_server_random(r);
    int64_t now = loop_now(a->ep->loop), took = now - h->asked_at;
    if (SSL_get_state(a->ssl) != TLS_ST_CW_CLNT_HELLO)
        return; /* a repeated one */
    if (random)
        memcpy(a->hello_random, random, HELLO_RANDOM);
    h->cookies = h->cookies || cookie; /* whatever else came before: somebody may have forged that */
    if (h->state == HS_FLIGHTS || (cookie && h->state == HS_COOKIE))
        return;
    hs_round_trip(a, took);
    h->asked_at = h->step_at = now;
    hs_become(a, cookie ? HS_COOKIE : HS_FLIGHTS);
}

static struct guard hs_guard(const struct association *a)
{
    const struct handshake *h = a->handshake;
    OSSL_HANDSHAKE_STATE step = SSL_get_state(a->ssl);
    const SSL_CIPHER *suite = SSL_get_pending_cipher(a->ssl);
    bool psk = suite && SSL_CIPHER_get_auth_nid(suite) == NID_auth_psk;
    return (struct guard){.server = a->conn->server,
                          .asks = SSL_get_verify_mode(a->ssl) != SSL_VERIFY_NONE && !psk,
                          .tickets = !(SSL_get_options(a->ssl) & SSL_OP_NO_TICKET),
                          .offers = a->conn->dial && a->conn->dial->session,
                          .resumed = SSL_session_reused(a->ssl) == 1,
                          .chain_max = (unsigned)a->ep->cfg.max_chain_bytes,
                          .keyed = step == TLS_ST_SR_CHANGE || step == TLS_ST_CR_CHANGE,
                          .early = h->early,
                          .hello_due = !a->conn->server && step == TLS_ST_CW_CLNT_HELLO,
                          .answered = h->state != HS_ASKING,
                          .anew = h->restarts > 0,
                          .random = a->hello_random};
}

static void hs_take(struct association *a, const struct record *r, bool keyed)
{
    a->handshake->early += r->epoch == 1 && !keyed;
    if (record_is_server_hello(r))
        hs_answered(a, r);
    a->handshake->claim.made = false;
    if (a->conn->server && !a->shown)
        hs_round_trip(a, loop_now(a->ep->loop) - a->handshake->asked_at);
    source_shown(a);
    a->wire.in = r->start;
    a->wire.in_len = r->size;
    a->wire.in_renumber = r->epoch == 0;
    hs_drive(a);
    a->wire.in = NULL;
    if (!a->handshake && a->phase && r->epoch == 1) /* the Finished that opened it */
        traffic_seen(a, r);
}

static void hs_drop(struct association *a, dtls_drop reason)
{
    a->handshake->dropped[reason]++;
    ep_count(a->ep, reason);
}

/* A record with our connection ID, in the form that libssl knows; any other as it is. False: it is not authentic, comes too
 * early or again, or lacks the ID. */
static bool hs_opens(struct association *a, const struct record *r, struct record *plain)
{
    uint8_t text[RECORD_BODY_MAX + 1];
    struct wire *w = &a->wire;
    size_t n;
    unsigned type;
    *plain = *r;
    if (r->type != TYPE_CID)
        return r->epoch == 0 || ((!w->cid || w->cid_in[0] == 0) && r->type != TYPE_RRC);
    if (!wire_is_fresh(w, r->sequence) || !wire_open(w, false, r, text, &n, &type) || type < TYPE_ALERT ||
        type > TYPE_DATA || !wire_plain(w, r, type, text, n, plain))
        return false;
    wire_note(w, r->sequence);
    return true;
}

/* A datagram that waited, up to the first record that gets to libssl. Each goes alone through the guard, since it may change
 * the state that the next one is checked against. What follows when the connection has opened is for that. */
static size_t hs_work(struct association *a, const uint8_t *p, size_t n)
{
    struct record r, plain;
    for (size_t at = 0; at < n && hs_under_way(a); at += r.size) {
        if (!wire_parse(&a->wire, p + at, n - at, &r)) {
            hs_drop(a, record_drop(p + at, n - at));
            return n; /* what follows cannot be found */
        }
        struct guard g = hs_guard(a);
        int verdict = hs_opens(a, &r, &plain) ? guard_handshake(&g, &plain) : DTLS_DROP_CID;
        if (verdict == GUARD_PASS) {
            hs_take(a, &plain, g.keyed);
            return at + r.size;
        }
        hs_drop(a, verdict == GUARD_CLAIM ? DTLS_DROP_ALERT : (dtls_drop)verdict);
        if (r.type == TYPE_CID) /* keys were made for it: that was a piece of work */
            return at + r.size;
        if (verdict == DTLS_DROP_HANDSHAKE)
            hs_keep_unfit(a, &g, &r);
        if (verdict == GUARD_CLAIM)
            hs_claim(a, r.body[1], SSL_alert_desc_string_long(r.body[1]));
    }
    return n;
}

/* A datagram that arrives. What the guard would not let through whatever else happens before its turn does not wait for
 * it, so that forgers do not fill the inbox. */
static void hs_input(struct association *a, const uint8_t *p, size_t n)
{
    struct guard g = hs_guard(a);
    struct record r;
    g.hello_due = false;
    g.keyed = true;
    if (!hs_under_way(a)) {
        ep_count(a->ep, DTLS_DROP_HANDSHAKE);
        return;
    }
    for (size_t at = 0; at < n && wire_parse(&a->wire, p + at, n - at, &r); at += r.size) {
        int verdict = r.type == TYPE_CID ? GUARD_PASS : guard_handshake(&g, &r);
        if (verdict == GUARD_PASS || (verdict == GUARD_CLAIM && a->inbox)) { /* a claim is about what came before it */
            assoc_post(a, p, n);
            return;
        }
    }
    hs_work(a, p, n); /* nothing in it gets to libssl */
}

static const struct phase hs_phase = {hs_rules, hs_input, hs_work, hs_socket_failed};

/* A server's, from the ClientHello whose cookie DTLSv1_listen found to be good. */
static void hs_accept(struct association *a, const struct record *hello)
{
    a->wire.in_sequence = hello->sequence + 1;
    DTLS_set_timer_cb(a->ssl, hs_retransmit_us); /* listening cleared it */
    assoc_fire(a);
}

/* Renewals: a client's open connection asks by one more handshake whether the peer is still there and still knows it. */

/* 0 or an error; 0 also if one is under way. */
static int hs_renew(dtls_conn *c, dtls_error *err)
{
    if (c->dial)
        return 0;
    struct dial *d = c->dial = calloc(1, sizeof *d);
    if (!d)
        return fail(err, DTLS_ERR_MEMORY, "out of memory");
    d->since = c->renewed_at = loop_now(c->ep->loop);
    d->addrs[0] = c->open->peer;
    d->addrs_len = 1;
    d->local = c->open->local;
    d->session = SSL_get1_session(c->open->ssl);
    c->paced = c->round_trip_us > 0;
    int r = hs_dial(c, err);
    if (r < 0)
        hs_not_renewed(c, err->text);
    errors_clear();
    return r;
}

/* It asks when messages had no answer for unanswered_ms; at once where ICMP told that nobody is there, or where the last
 * renewal had no answer either; but not again and again. */
static int64_t hs_renew_at(const struct association *a)
{
    const dtls_conn *c = a->conn;
    int ms = c->doubted ? 0 : c->ep->cfg.unanswered_ms;
    if (c->server || c->dial || !c->unanswered || (ms <= 0 && !c->doubted))
        return INT64_MAX;
    int64_t rested = c->renewed_at ? c->renewed_at + us(RENEW_REST_MS) : INT64_MIN;
    int64_t at = c->unanswered_at + us(ms);
    return at > rested ? at : rested;
}

static void hs_renew_now(struct association *a, int64_t now)
{
    dtls_error err;
    (void)now;
    hs_renew(a->conn, &err);
}

static const struct rule open_rules[] = {{traffic_gone_at, traffic_gone}, {traffic_quiet_at, traffic_quiet},
                                         {traffic_idle_at, traffic_idle}, {traffic_asked_at, traffic_asked},
                                         {traffic_kept_at, traffic_kept}, {traffic_lost_at, traffic_lost},
                                         {hs_renew_at, hs_renew_now},     {NULL, NULL}};

static const struct phase open_phase = {open_rules, traffic_input, traffic_work, traffic_socket_failed};

int dtls_conn_renew(dtls_conn *c)
{
    dtls_error err;
    if (c->server || c->state != CONN_OPEN || c->ep->inside)
        return DTLS_ERR_STATE;
    loop_enter(c->ep->loop);
    int r = hs_renew(c, &err);
    loop_leave(c->ep->loop);
    return r;
}

/* ==== 10. context ================================================================================================= */

enum {
    ALPN_BYTES = 1024,
    EXTENSION_CID = 54,          /* RFC 9146 */
    EXTENSION_RRC = 61,          /* RFC 9853 */
    PEER_CID_MAX = 64,           /* bytes of a client's: no answer is more than three times as large as its question */
    CID_CHANCE = 4,              /* bytes of a connection ID that are random */
    BYTES_PER_CERTIFICATE = 1600 /* of a chain: five certificates in 8 KB */
};

#define SUITES "ECDHE+AESGCM:ECDHE+CHACHA20"

static void config_default(int *field, int value)
{
    if (*field == 0)
        *field = value;
}

static int config_check(dtls_config *cfg, dtls_error *err)
{
    config_default(&cfg->retransmit_ms, 250);
    config_default(&cfg->retransmit_max_ms, 6000);
    config_default(&cfg->handshake_timeout_ms, 30000);
    config_default(&cfg->idle_repeat_ms, 5000);
    config_default(&cfg->idle_timeout_ms, 120000);
    config_default(&cfg->cookie_ms, 60000);
    config_default(&cfg->mtu_bytes, 1500);
    config_default(&cfg->max_conns, 4096);
    config_default(&cfg->max_handshakes, 512);
    config_default(&cfg->datagrams_per_turn, 64);
    config_default(&cfg->send_queue_bytes, 1048576);
    config_default(&cfg->socket_buffer_bytes, 1048576);
    config_default(&cfg->session_cache, 4096);
    config_default(&cfg->max_chain_bytes, 8192);
    config_default(&cfg->max_conns_per_address, cfg->max_conns / 2 + 1);
    config_default(&cfg->max_conns_per_identity, cfg->max_conns / 2 + 1);
    config_default(&cfg->roam_trials, 20000);
    config_default(&cfg->roam_trials_each, 256);
    if (cfg->cid_bytes < DTLS_CID_EMPTY || cfg->cid_bytes > DTLS_CID_MAX)
        return fail(err, DTLS_ERR_ARG, "a connection ID has at most %d bytes", DTLS_CID_MAX);
    if (cfg->cid_prefix_len > 0 &&
        (!cfg->cid_prefix || cfg->cid_bytes < 0 ||
         cfg->cid_prefix_len + CID_CHANCE > (size_t)(cfg->cid_bytes > 0 ? cfg->cid_bytes : CID_BYTES)))
        return fail(err, DTLS_ERR_ARG, "cid_prefix must leave %d bytes of a connection ID to chance", CID_CHANCE);
    if (cfg->mtu_bytes < MTU_MIN || cfg->mtu_bytes > 65535)
        return fail(err, DTLS_ERR_ARG, "the MTU must be 256 to 65535 bytes");
    if (cfg->max_chain_bytes < 512 || cfg->max_chain_bytes > 65536)
        return fail(err, DTLS_ERR_ARG, "max_chain_bytes must be 512 to 65,536");
    if (cfg->retransmit_max_ms > 600000) /* libssl counts in 32-bit microseconds */
        return fail(err, DTLS_ERR_ARG, "retransmit_max_ms must not be above 600,000");
    if (cfg->retransmit_ms < 1 || cfg->retransmit_ms > cfg->retransmit_max_ms || cfg->handshake_timeout_ms < 1 ||
        cfg->idle_repeat_ms < 1 || cfg->idle_timeout_ms < DTLS_NEVER || cfg->idle_ms < DTLS_NEVER ||
        cfg->unanswered_ms < DTLS_NEVER || cfg->cookie_ms < 1)
        return fail(err, DTLS_ERR_ARG, "a timer in the configuration is out of range");
    if (cfg->max_conns < 1 || cfg->max_handshakes < 1 || cfg->datagrams_per_turn < 1 || cfg->send_queue_bytes < 1 ||
        cfg->socket_buffer_bytes < 1 || cfg->session_cache < DTLS_NEVER || cfg->max_conns_per_address < DTLS_NEVER ||
        cfg->max_conns_per_identity < DTLS_NEVER || cfg->roam_trials < DTLS_NEVER || cfg->roam_trials_each < 1)
        return fail(err, DTLS_ERR_ARG, "a limit in the configuration is out of range");
    return 0;
}

/* Whose password is asked for; without a callback OpenSSL would ask on the terminal. */
struct secret {
    const dtls_config *cfg;
    const char *file;
};

static int ctx_password(char *buf, int size, int writing, void *user)
{
    const struct secret *of = user;
    (void)writing;
    int n = of && of->cfg->on_password ? of->cfg->on_password(of->cfg->user, of->file, buf, size) : -1;
    return n > size ? -1 : n;
}

static int ctx_readable(const char *file, dtls_error *err)
{
    FILE *f = fopen(file, "r");
    bool empty = f && fgetc(f) == EOF && !ferror(f);
    int error = !f || ferror(f) ? errno : 0; /* a directory opens, too */
    if (f)
        fclose(f);
    if (!error && !empty)
        return 0;
    return fail(err, DTLS_ERR_CERT, "%.150s: %s", file, empty ? "empty" : strerror(error));
}

/* A key from a store that a provider of OpenSSL 3 has. */
static EVP_PKEY *ctx_stored_key(const char *uri, struct secret *of)
{
    EVP_PKEY *key = NULL;
#if OPENSSL_VERSION_NUMBER >= 0x30000000L
    UI_METHOD *ask = UI_UTIL_wrap_read_pem_callback(ctx_password, 0);
    OSSL_STORE_CTX *store = ask ? OSSL_STORE_open(uri, ask, of, NULL, NULL) : NULL;
    if (store)
        OSSL_STORE_expect(store, OSSL_STORE_INFO_PKEY);
    while (store && !key && !OSSL_STORE_eof(store)) {
        OSSL_STORE_INFO *info = OSSL_STORE_load(store);
        key = info && OSSL_STORE_INFO_get_type(info) == OSSL_STORE_INFO_PKEY ? OSSL_STORE_INFO_get1_PKEY(info) : NULL;
        OSSL_STORE_INFO_free(info);
        if (!info && OSSL_STORE_error(store))
            break;
    }
    OSSL_STORE_close(store);
    UI_destroy_method(ask);
#else
    (void)uri, (void)of;
#endif
    return key;
}

/* "pkcs11:object=..." and the like, but not a file that is called so. */
static bool ctx_is_uri(const char *file)
{
    size_t n = strcspn(file, ":/");
    return n > 1 && file[n] == ':' && access(file, F_OK) < 0;
}

static int ctx_check_dates(SSL_CTX *ctx, const char *file, dtls_error *err)
{
    X509 *cert = SSL_CTX_get0_certificate(ctx);
    const ASN1_TIME *from = X509_get0_notBefore(cert), *to = X509_get0_notAfter(cert);
    bool expired = time_is_past(to);
    if (!expired && time_is_past(from))
        return 0;
    char date[64] = "";
    BIO *b = BIO_new(BIO_s_mem());
    if (b && ASN1_TIME_print(b, expired ? to : from) == 1)
        BIO_read(b, date, sizeof date - 1);
    BIO_free(b);
    return fail(err, DTLS_ERR_CERT, "%.150s: the certificate %s %s", file,
                expired ? "expired on" : "is not valid before", date);
}

static int ctx_load_cert(SSL_CTX *ctx, const char *file, dtls_error *err)
{
    if (ctx_readable(file, err) < 0)
        return DTLS_ERR_CERT;
    if (SSL_CTX_use_certificate_chain_file(ctx, file) != 1)
        return fail(err, DTLS_ERR_CERT, "%.150s: no certificate in PEM form that can be used", file);
    return ctx_check_dates(ctx, file, err);
}

static int ctx_use_key(SSL_CTX *ctx, const char *file, struct secret *of, dtls_error *err)
{
    if (ctx_is_uri(file)) {
        EVP_PKEY *key = ctx_stored_key(file, of);
        int r = key ? SSL_CTX_use_PrivateKey(ctx, key) : 0;
        EVP_PKEY_free(key);
        if (r == 1 || key)
            return r;
        return fail(err, DTLS_ERR_CERT,
                    "%.150s: no key; is its provider configured, its password right (openssl storeutl -keys)?", file);
    }
    return ctx_readable(file, err) < 0 ? -1 : SSL_CTX_use_PrivateKey_file(ctx, file, SSL_FILETYPE_PEM);
}

static int ctx_load_key(SSL_CTX *ctx, const dtls_config *cfg, const dtls_cert *cert, dtls_error *err)
{
    struct secret of = {.cfg = cfg, .file = cert->key_file};
    errors_clear();
    SSL_CTX_set_default_passwd_cb_userdata(ctx, &of);
    int r = ctx_use_key(ctx, cert->key_file, &of, err);
    SSL_CTX_set_default_passwd_cb_userdata(ctx, NULL);
    if (r == 1)
        return 0;
    if (r < 0)
        return DTLS_ERR_CERT;
    if (ERR_GET_LIB(ERR_peek_last_error()) == ERR_LIB_X509)
        return fail(err, DTLS_ERR_CERT, "%.100s: the key does not match %.100s", cert->key_file, cert->cert_file);
    return fail(err, DTLS_ERR_CERT, "%.150s: no private key in PEM form, or one with %s password%s", cert->key_file,
                cfg->on_password ? "another" : "a", cfg->on_password ? "" : " ('openssl pkey' removes it)");
}

static int ctx_load_ca(SSL_CTX *ctx, const char *file, dtls_error *err)
{
    if (ctx_readable(file, err) < 0)
        return DTLS_ERR_CERT;
    STACK_OF(X509_NAME) *names = SSL_load_client_CA_file(file);
    if (!names || SSL_CTX_load_verify_locations(ctx, file, NULL) != 1) {
        sk_X509_NAME_pop_free(names, X509_NAME_free);
        return fail(err, DTLS_ERR_CERT, "%.150s: no CA certificate in PEM form", file);
    }
    SSL_CTX_set_client_CA_list(ctx, names);
    return 0;
}

static int ctx_load_crl(SSL_CTX *ctx, const char *file, dtls_error *err)
{
    X509_STORE *store = SSL_CTX_get_cert_store(ctx);
    X509_LOOKUP *lookup = X509_STORE_add_lookup(store, X509_LOOKUP_file());
    if (ctx_readable(file, err) < 0)
        return DTLS_ERR_CERT;
    if (!lookup || X509_load_crl_file(lookup, file, X509_FILETYPE_PEM) < 1 ||
        X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK) != 1)
        return fail(err, DTLS_ERR_CERT, "%.150s: no revocation list in PEM form", file);
    return 0;
}

static bool config_has_psk(const dtls_config *cfg)
{
    return cfg->psk || cfg->psk_identity;
}

/* Whether there is anything but pre-shared keys. */
static bool config_has_certs(const dtls_config *cfg)
{
    return cfg->cert_file || cfg->ca_file || cfg->ca_system || cfg->on_ssl_ctx || !config_has_psk(cfg);
}

static int ctx_load(SSL_CTX *ctx, const dtls_config *cfg, const dtls_cert *cert, dtls_error *err)
{
    bool needs_ca = config_has_certs(cfg) && cfg->auth != DTLS_AUTH_SERVER && cfg->auth != DTLS_AUTH_INSECURE;
    if ((cert->cert_file && ctx_load_cert(ctx, cert->cert_file, err) < 0) ||
        (cert->key_file && ctx_load_key(ctx, cfg, cert, err) < 0) ||
        (cfg->ca_file && ctx_load_ca(ctx, cfg->ca_file, err) < 0) ||
        (cfg->crl_file && ctx_load_crl(ctx, cfg->crl_file, err) < 0))
        return DTLS_ERR_CERT;
    if (cfg->ca_system && SSL_CTX_set_default_verify_paths(ctx) != 1)
        return fail(err, DTLS_ERR_CERT, "the CAs that the system trusts cannot be read");
    if (needs_ca && !cfg->ca_file && !cfg->ca_system && !cfg->on_ssl_ctx)
        return fail(err, DTLS_ERR_CERT, "a CA certificate is needed, or every peer is refused");
    if (cfg->on_ssl_ctx && cfg->on_ssl_ctx(cfg->user, ctx) != 0)
        return fail(err, DTLS_ERR_TLS, "on_ssl_ctx gave up");
    return 0;
}

/* Suites that this file is not made for: with CBC anybody's record ends a connection (openssl/openssl#24972); the others
 * have no forward secrecy, or prove nobody's identity. Pre-shared keys are an exception where they are asked for. */
static int ctx_check_suites(SSL_CTX *ctx, const dtls_config *cfg, dtls_error *err)
{
    STACK_OF(SSL_CIPHER) *ciphers = SSL_CTX_get_ciphers(ctx);
    for (int i = 0; i < sk_SSL_CIPHER_num(ciphers); i++) {
        const SSL_CIPHER *cipher = sk_SSL_CIPHER_value(ciphers, i);
        int kx = SSL_CIPHER_get_kx_nid(cipher), auth = SSL_CIPHER_get_auth_nid(cipher);
        bool of_tls13 = kx == NID_kx_any, of_psk = auth == NID_auth_psk && config_has_psk(cfg);
        if (!SSL_CIPHER_is_aead(cipher))
            return fail(err, DTLS_ERR_ARG, "%s: only AEAD suites are safe with DTLS", SSL_CIPHER_get_name(cipher));
        if (!of_tls13 && !of_psk &&
            ((kx != NID_kx_ecdhe && kx != NID_kx_dhe) || (auth != NID_auth_rsa && auth != NID_auth_ecdsa)))
            return fail(err, DTLS_ERR_ARG, "%s: only suites with ECDHE or DHE and certificates",
                        SSL_CIPHER_get_name(cipher));
    }
    return 0;
}

/* OpenSSL takes a certificate whose extensions it could not read, be it for want of memory, and goes without them. */
static int ctx_check_cert(SSL_CTX *ctx, const dtls_config *cfg, dtls_error *err)
{
    X509 *cert = SSL_CTX_get0_certificate(ctx);
    bool optional = !cfg->cert_file && (!config_has_certs(cfg) || cfg->auth == DTLS_AUTH_SERVER ||
                                        cfg->auth == DTLS_AUTH_INSECURE || config_has_psk(cfg));
    if (!cert && optional)
        return 0;
    if (!cert || SSL_CTX_check_private_key(ctx) != 1)
        return fail(err, DTLS_ERR_CERT, "a certificate and its private key are needed");
    if (X509_check_purpose(cert, -1, 0) != 1)
        return fail(err, DTLS_ERR_CERT, "the certificate has extensions that OpenSSL cannot read");
    return 0;
}

/* After on_ssl_ctx, which may have changed anything: what the guard relies on must still hold. */
static int ctx_check(SSL_CTX *ctx, const dtls_config *cfg, dtls_error *err)
{
    SSL_CTX_clear_options(ctx, SSL_OP_NO_QUERY_MTU); /* with it libssl would not ask the BIO, and send nothing */
    if (ctx_check_suites(ctx, cfg, err) < 0)
        return DTLS_ERR_ARG;
    if (SSL_CTX_get_min_proto_version(ctx) != DTLS1_2_VERSION || SSL_CTX_get_max_proto_version(ctx) != DTLS1_2_VERSION)
        return fail(err, DTLS_ERR_ARG, "on_ssl_ctx changed the versions; only DTLS 1.2 is possible");
    if (ctx_check_cert(ctx, cfg, err) < 0)
        return DTLS_ERR_CERT;
    /* OpenSSL also takes a CA whose extensions or key it could not read, and refuses every peer. */
    STACK_OF(X509_OBJECT) *trusted = store_objects(SSL_CTX_get_cert_store(ctx));
    int bad = trusted == NULL;
    for (int i = 0; i < sk_X509_OBJECT_num(trusted); i++) {
        X509 *ca = X509_OBJECT_get0_X509(sk_X509_OBJECT_value(trusted, i));
        bad += ca && (!X509_get0_pubkey(ca) || X509_check_purpose(ca, -1, 0) != 1);
    }
    store_objects_free(trusted);
    return bad ? fail(err, DTLS_ERR_CERT, "a CA certificate has a key or extensions that OpenSSL cannot read") : 0;
}

/* Sessions. */

/* The session without the chain that the peer sent with its certificate: its encoding does not have that. */
static SSL_SESSION *ctx_session_strip(SSL_SESSION *session)
{
    int len = i2d_SSL_SESSION(session, NULL);
    uint8_t *bytes = len > 0 ? malloc((size_t)len) : NULL, *end = bytes;
    if (!bytes)
        return NULL;
    i2d_SSL_SESSION(session, &end);
    const uint8_t *begin = bytes;
    SSL_SESSION *stripped = d2i_SSL_SESSION(NULL, &begin, len);
    OPENSSL_cleanse(bytes, (size_t)len);
    free(bytes);
    return stripped;
}

/* A full handshake is done. The return says whether we keep the reference that libssl gives us. */
static int ctx_session_new(SSL *ssl, SSL_SESSION *session)
{
    bool chain = sk_X509_num(SSL_get_peer_cert_chain(ssl)) > 0;
    SSL_SESSION *kept = chain ? ctx_session_strip(session) : session;
    if (kept)
        session_keep(assoc_of(ssl)->ep, kept);
    return !chain;
}

/* Whom the application does not let in any more resumes nothing: in a full handshake he can be told. */
static bool ctx_welcomes(struct association *a, SSL_SESSION *session)
{
    char reason[REASON_BYTES];
    X509 *cert = SSL_SESSION_get0_peer(session);
    struct identity *id = cert ? identity_get(a->ep, cert, NULL) : NULL;
    bool welcome = !id || traffic_welcomes(a, id, reason, sizeof reason);
    identity_release(a->ep, id);
    return welcome;
}

/* A client wants to resume. It gets a copy: libssl marks a session as spoilt when a handshake with it fails. */
static SSL_SESSION *ctx_session_get(SSL *ssl, const unsigned char *id, int len, int *copy)
{
    dtls_endpoint *ep = assoc_of(ssl)->ep;
    struct session *s = session_find(ep, id, (unsigned)len);
    *copy = 0;
    return s && ctx_welcomes(assoc_of(ssl), s->session) ? SSL_SESSION_dup(s->session) : NULL;
}

/* ALPN, RFC 7301. */

/* The first of ours that the client has; a client that has none of them is refused, as the RFC wants it. */
static int ctx_alpn_select(SSL *ssl, const unsigned char **chosen, unsigned char *len, const unsigned char *theirs,
                           unsigned theirs_len, void *user)
{
    const dtls_endpoint *ep = user;
    (void)ssl;
    for (const char *name = ep->trust.alpn ? ep->trust.alpn : ""; *name; name += strlen(name) + 1) {
        for (unsigned i = 0; i < theirs_len; i += theirs[i] + 1u) {
            if (theirs[i] == strlen(name) && memcmp(name, theirs + i + 1, theirs[i]) == 0) {
                *chosen = theirs + i + 1;
                *len = theirs[i];
                return SSL_TLSEXT_ERR_OK;
            }
        }
    }
    return SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* The protocols of the configuration, as libssl wants them and as text: *alpn is the caller's to free. 0 or an error. */
static int ctx_set_alpn(SSL_CTX *ctx, dtls_endpoint *ep, const char *text, char **alpn, dtls_error *err)
{
    uint8_t names[ALPN_BYTES];
    size_t n = strlen(text), length_at = 0;
    if (n == 0 || n + 1 > sizeof names)
        return fail(err, DTLS_ERR_ARG, "alpn must be names with commas between them, at most %d bytes", ALPN_BYTES - 1);
    char *list = calloc(1, n + 2);
    free(*alpn);
    *alpn = list;
    if (!list)
        return fail(err, DTLS_ERR_MEMORY, "out of memory");
    memcpy(names + 1, text, n); /* and where the commas were, and in front, stands the length of what follows */
    for (size_t i = 0; i <= n; i++) {
        bool ends = i == n || text[i] == ',';
        list[i] = ends ? 0 : text[i];
        if (ends && (i == length_at || i - length_at > UINT8_MAX))
            return fail(err, DTLS_ERR_ARG, "alpn: each name must have 1 to 255 bytes");
        names[ends ? length_at : i + 1] = ends ? (uint8_t)(i - length_at) : (uint8_t)text[i];
        length_at = ends ? i + 1 : length_at;
    }
    SSL_CTX_set_alpn_select_cb(ctx, ctx_alpn_select, ep);
    return SSL_CTX_set_alpn_protos(ctx, names, (unsigned)n + 1) == 0 ? 0 : fail(err, DTLS_ERR_MEMORY, "out of memory");
}

/* Pre-shared keys. */

static unsigned ctx_psk_client(SSL *ssl, const char *hint, char *identity, unsigned identity_size, unsigned char *key,
                               unsigned key_size)
{
    const struct trust *t = &assoc_of(ssl)->ep->trust;
    (void)hint;
    if (!t->psk_identity || strlen(t->psk_identity) >= identity_size || t->psk_key_len > key_size)
        return 0;
    memcpy(identity, t->psk_identity, strlen(t->psk_identity) + 1);
    memcpy(key, t->psk_key, t->psk_key_len);
    return (unsigned)t->psk_key_len;
}

/* An identity that is not known gets a key that nobody has: from outside that looks like a wrong key. */
static unsigned ctx_psk_server(SSL *ssl, const char *identity, unsigned char *key, unsigned size)
{
    struct association *a = assoc_of(ssl);
    uint8_t found[DTLS_PSK_MAX];
    size_t n = psk_find(a->ep, identity, found);
    bool known = n > 0 && n <= size;
    if (!known && RAND_bytes(found, sizeof found) != 1)
        return 0;
    n = known ? n : sizeof found;
    memcpy(key, found, n);
    OPENSSL_cleanse(found, sizeof found);
    if (a->handshake)
        a->handshake->no_key = !known;
    return (unsigned)n;
}

/* CCM_8 has a short tag, so OpenSSL thinks it is weak. Whoever asks for it gets it, and nothing else that is. */
static int ctx_allows(const SSL *ssl, const SSL_CTX *ctx, int op, int bits, int nid, void *other, void *user)
{
    const SSL_CIPHER *cipher = other;
    bool of_suite = op == SSL_SECOP_CIPHER_SUPPORTED || op == SSL_SECOP_CIPHER_SHARED || op == SSL_SECOP_CIPHER_CHECK;
    if (of_suite && strcmp(SSL_CIPHER_get_name(cipher), "PSK-AES128-CCM8") == 0)
        return 1;
    return ((int (*)(const SSL *, const SSL_CTX *, int, int, int, void *, void *))(uintptr_t)user)(ssl, ctx, op, bits,
                                                                                                   nid, other, NULL);
}

static int ctx_set_psk(SSL_CTX *ctx, const dtls_config *cfg, dtls_error *err)
{
    char suites[256];
    if (!config_has_psk(cfg))
        return 0;
    if (cfg->psk_identity && (!*cfg->psk_identity || strlen(cfg->psk_identity) > 127 || !cfg->psk_key ||
                              cfg->psk_key_len < 1 || cfg->psk_key_len > DTLS_PSK_MAX))
        return fail(err, DTLS_ERR_ARG, "a pre-shared key has an identity of 1 to 127 bytes, and 1 to %d bytes",
                    DTLS_PSK_MAX);
    if (cfg->psk_ccm8) {
        void *usual = (void *)(uintptr_t)SSL_CTX_get_security_callback(ctx);
        SSL_CTX_set_security_callback(ctx, ctx_allows);
        SSL_CTX_set0_security_ex_data(ctx, usual);
    }
    snprintf(suites, sizeof suites,
             "%sECDHE-PSK-CHACHA20-POLY1305:PSK-AES256-GCM-SHA384:PSK-AES128-GCM-SHA256:"
             "PSK-CHACHA20-POLY1305%s",
             config_has_certs(cfg) ? SUITES ":" : "", cfg->psk_ccm8 ? ":PSK-AES128-CCM8" : "");
    if (SSL_CTX_set_cipher_list(ctx, suites) != 1)
        return fail(err, DTLS_ERR_TLS, "this OpenSSL has no suites for pre-shared keys");
    if (cfg->psk_identity)
        SSL_CTX_set_psk_client_callback(ctx, ctx_psk_client);
    if (cfg->psk)
        SSL_CTX_set_psk_server_callback(ctx, ctx_psk_server);
    return 0;
}

/* Names. The first certificate that has the name that the client asks for. */
static int ctx_server_name(SSL *ssl, int *alert, void *user)
{
    dtls_endpoint *ep = user;
    const char *name = SSL_get_servername(ssl, TLSEXT_NAMETYPE_host_name);
    X509 *cert = SSL_CTX_get0_certificate(ep->trust.ctx);
    if (!name || (cert && X509_check_host(cert, name, 0, NAME_FLAGS, NULL) == 1))
        return SSL_TLSEXT_ERR_OK;
    for (size_t i = 0; i < ep->trust.named_len; i++) {
        cert = SSL_CTX_get0_certificate(ep->trust.named[i]);
        if (cert && X509_check_host(cert, name, 0, NAME_FLAGS, NULL) == 1)
            return SSL_set_SSL_CTX(ssl, ep->trust.named[i]) ? SSL_TLSEXT_ERR_OK : SSL_TLSEXT_ERR_ALERT_FATAL;
    }
    *alert = SSL_AD_UNRECOGNIZED_NAME;
    return ep->cfg.strict_names ? SSL_TLSEXT_ERR_ALERT_FATAL : SSL_TLSEXT_ERR_NOACK;
}

static void ctx_keylog(const SSL *ssl, const char *line)
{
    dtls_endpoint *ep = assoc_of((SSL *)(uintptr_t)ssl)->ep;
    ep->inside = true;
    if (ep->cfg.on_keylog)
        ep->cfg.on_keylog(ep->cfg.user, line);
    ep->inside = false;
}

/* No DSA, no SHA-1, no SHA-224: RFC 9325 section 4.2, RFC 9155. */
#define SIGNATURES                                                                                                     \
    "ECDSA+SHA256:ECDSA+SHA384:ECDSA+SHA512:ed25519:ed448:rsa_pss_rsae_sha256:rsa_pss_rsae_sha384:rsa_pss_rsae_"       \
    "sha512:"                                                                                                          \
    "rsa_pss_pss_sha256:rsa_pss_pss_sha384:rsa_pss_pss_sha512:RSA+SHA256:RSA+SHA384:RSA+SHA512"

/* libssl decodes the keys of all certificates before it verifies any, at up to 0.8 ms each. It shows a message here before
 * it looks into it. Where there are too many of them the length of the list is spoilt, so that it refuses the message; it
 * offers no other way. The memory is its own buffer. */
static void ctx_message(int outgoing, int version, int type, const void *bytes, size_t len, SSL *ssl, void *user)
{
    const uint8_t *p = bytes;
    size_t at = HANDSHAKE_HEADER + 3, count = 0;
    (void)version, (void)user;
    if (outgoing || type != SSL3_RT_HANDSHAKE || len < at || p[0] != CERTIFICATE)
        return;
    struct association *a = assoc_of(ssl);
    for (; at + 3 <= len; at += 3 + load24(p + at))
        count++;
    if (a->handshake && count > 1 && count > (size_t)a->ep->cfg.max_chain_bytes / BYTES_PER_CERTIFICATE) {
        a->handshake->long_chain = true;
        ((uint8_t *)(uintptr_t)p)[HANDSHAKE_HEADER] ^= 0xff;
    }
}

/* Connection IDs. A client offers its own, a server answers with its own, and each puts the other's into its records. */

static int ctx_cid_add(SSL *ssl, unsigned type, unsigned context, const unsigned char **out, size_t *len, X509 *cert,
                       size_t chain, int *alert, void *user)
{
    struct association *a = assoc_of(ssl);
    bool server = context & SSL_EXT_TLS1_2_SERVER_HELLO;
    (void)cert, (void)chain, (void)alert, (void)user;
    *out = a->wire.cid_in;
    *len = 0;
    if (type == EXTENSION_RRC) {
        a->wire.rrc = a->wire.rrc && a->wire.cid;
        return server ? a->wire.rrc : a->wire.offers;
    }
    bool bad = server && (!aead_of(SSL_get_pending_cipher(ssl)) || a->wire.cid_out_len > PEER_CID_MAX);
    if (bad || !assoc_draw_cid(a)) {
        free(a->wire.cid_out); /* the client's, which is not agreed upon */
        a->wire.cid_out = NULL;
        a->wire.cid_out_len = 0;
        return 0;
    }
    a->wire.offers = !server;
    a->wire.cid = server;
    *len = 1u + a->wire.cid_in[0];
    return 1;
}

static int ctx_cid_parse(SSL *ssl, unsigned type, unsigned context, const unsigned char *in, size_t len, X509 *cert,
                         size_t chain, int *alert, void *user)
{
    struct wire *w = &assoc_of(ssl)->wire;
    (void)cert, (void)chain, (void)user;
    *alert = SSL_AD_DECODE_ERROR;
    if (type == EXTENSION_RRC) {
        w->rrc = true;
        return len == 0;
    }
    if (len < 1 || len != 1u + in[0])
        return 0;
    uint8_t *copy = malloc(len);
    *alert = SSL_AD_INTERNAL_ERROR;
    if (!copy)
        return 0;
    memcpy(copy, in + 1, len - 1);
    free(w->cid_out);
    w->cid_out = copy;
    w->cid_out_len = in[0];
    w->cid = context & SSL_EXT_TLS1_2_SERVER_HELLO;
    return 1;
}

static int ctx_set_cid(SSL_CTX *ctx, const dtls_config *cfg, dtls_error *err)
{
    const unsigned where = SSL_EXT_CLIENT_HELLO | SSL_EXT_TLS1_2_SERVER_HELLO;
    if (cfg->cid_bytes != DTLS_NEVER &&
        (SSL_CTX_add_custom_ext(ctx, EXTENSION_CID, where, ctx_cid_add, NULL, NULL, ctx_cid_parse, NULL) != 1 ||
         SSL_CTX_add_custom_ext(ctx, EXTENSION_RRC, where, ctx_cid_add, NULL, NULL, ctx_cid_parse, NULL) != 1))
        return fail(err, DTLS_ERR_TLS, "this OpenSSL takes no extension for connection IDs");
    return 0;
}

/* What on_ssl_ctx may change later. */
static int ctx_defaults(SSL_CTX *ctx, const dtls_config *cfg, const struct trust *t, dtls_error *err)
{
    /* DTLSv1_listen stays a DTLS 1.2 call: the cap is on purpose, here and nowhere else. */
    if (SSL_CTX_set_min_proto_version(ctx, DTLS1_2_VERSION) != 1 ||
        SSL_CTX_set_max_proto_version(ctx, DTLS1_2_VERSION) != 1 || SSL_CTX_set_cipher_list(ctx, SUITES) != 1)
        return fail(err, DTLS_ERR_TLS, "this OpenSSL has no DTLS 1.2 with ECDHE and AEAD suites");
    /* Whatever this OpenSSL was built with. */
    if (SSL_CTX_get_security_level(ctx) < 2)
        SSL_CTX_set_security_level(ctx, 2);
    SSL_CTX_clear_options(ctx, SSL_OP_LEGACY_SERVER_CONNECT);
    if (SSL_CTX_set1_sigalgs_list(ctx, SIGNATURES) != 1)
        return fail(err, DTLS_ERR_TLS, "this OpenSSL lacks signature algorithms");
    /* A ticket carries the client's certificate: a ClientHello above 1 KB and much CPU. The cache does it better. */
    SSL_CTX_set_options(ctx, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION |
                                 SSL_OP_CIPHER_SERVER_PREFERENCE);
    /* The chain comes from the file; building one for each handshake costs 8 % of it. */
    SSL_CTX_set_mode(ctx, SSL_MODE_NO_AUTO_CHAIN | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_max_cert_list(ctx, cfg->max_chain_bytes);
    SSL_CTX_set_msg_callback(ctx, ctx_message);
    SSL_CTX_set_verify(ctx,
                       cfg->auth == DTLS_AUTH_OPTIONAL ? SSL_VERIFY_PEER
                       : cfg->auth == DTLS_AUTH_SERVER ? SSL_VERIFY_NONE
                                                       : SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT,
                       NULL);
    SSL_CTX_set_default_passwd_cb(ctx, ctx_password);
    if (cfg->on_keylog)
        SSL_CTX_set_keylog_callback(ctx, ctx_keylog);
    /* Resumption with client certificates needs a context; a random one keeps sessions within this set of trust. */
    if (SSL_CTX_set_session_id_context(ctx, t->id, sizeof t->id) != 1)
        return fail(err, DTLS_ERR_TLS, "OpenSSL takes no context for sessions");
    if (cfg->session_cache == DTLS_NEVER) {
        SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    } else {
        SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_SERVER | SSL_SESS_CACHE_NO_INTERNAL);
        SSL_CTX_sess_set_new_cb(ctx, ctx_session_new);
        SSL_CTX_sess_set_get_cb(ctx, ctx_session_get);
    }
    return 0;
}

/* ==== 11. endpoint ================================================================================================ */

enum {
    COOKIE_BYTES = 16,          /* keeps a HelloVerifyRequest (44 bytes) below any ClientHello */
    BLIND_AHEAD = 4096,         /* records that may have been lost, where keys are tried */
    HELLO_SEQUENCE_MAX = 0xffff /* libssl goes on counting from the ClientHello's record */
};

/* Cookies: RFC 6347 section 4.2.1. The address pair under a secret that changes; the one before stays valid. Nothing of
 * the ClientHello: somebody who sends one in a client's name must not make the client's cookie a wrong one. */

/* False: no memory for it, and no cookie is better than one that anybody can guess. */
static bool cookie_make(const struct association *a, const uint8_t secret[COOKIE_SECRET], uint8_t cookie[COOKIE_BYTES])
{
    uint8_t data[2 * ADDR_PACKED], mac[EVP_MAX_MD_SIZE];
    unsigned len = sizeof mac;
    addr_pack(&a->peer, data);
    addr_pack(&a->local, data + ADDR_PACKED);
    if (!HMAC(EVP_sha256(), secret, COOKIE_SECRET, data, sizeof data, mac, &len))
        return false;
    memcpy(cookie, mac, COOKIE_BYTES);
    return true;
}

static void cookie_rotate(dtls_endpoint *ep)
{
    int64_t period = us(ep->cfg.cookie_ms), age = ep->loop->now - ep->secret_at;
    if (age < period)
        return;
    for (int n = age < 2 * period ? 1 : 2; n > 0; n--) { /* after a long silence both are too old */
        memcpy(ep->secret[1], ep->secret[0], COOKIE_SECRET);
        if (RAND_bytes(ep->secret[0], COOKIE_SECRET) != 1)
            return; /* the old one serves on; the next ClientHello tries again */
    }
    ep->secret_at = ep->loop->now;
}

static int cookie_generate(SSL *ssl, unsigned char *cookie, unsigned *len)
{
    const struct association *a = assoc_of(ssl);
    *len = COOKIE_BYTES;
    return cookie_make(a, a->ep->secret[0], cookie);
}

static int cookie_verify(SSL *ssl, const unsigned char *cookie, unsigned len)
{
    const struct association *a = assoc_of(ssl);
    uint8_t good[COOKIE_BYTES];
    bool same = false;
    for (int i = 0; i < 2 && !same && len == COOKIE_BYTES; i++)
        same = cookie_make(a, a->ep->secret[i], good) && CRYPTO_memcmp(cookie, good, COOKIE_BYTES) == 0;
    return same;
}

/* ClientHellos. */

/* One that has to be refused for longer hears of it: by a plaintext alert, which is smaller than its ClientHello. */
static void ep_refuse(struct association *a, const struct record *hello, const char *why)
{
    uint8_t alert[RECORD_HEADER + 2] = {TYPE_ALERT, 0xfe, 0xfd};
    memcpy(alert + 5, hello->start + 5, 6); /* with the ClientHello's number, as every answer to it */
    alert[12] = 2;
    alert[13] = SSL3_AL_FATAL;
    alert[14] = SSL_AD_INTERNAL_ERROR; /* "makes it impossible to continue", and nothing is wrong with the client */
    assoc_send(a, alert, sizeof alert);
    ep_log_stranger(a->ep, DTLS_LOG_WARNING, &a->peer, why);
}

/* Whether there is a place for a newcomer with that address; for one that will replace what its address has there is. */
static bool ep_has_place(struct association *a, const struct record *hello, const struct source *s)
{
    const dtls_config *cfg = &a->ep->cfg;
    const dtls_counters *n = &a->ep->counters;
    char why[LINE_BYTES];
    if (at_limit(n->conns - n->handshakes, cfg->max_conns))
        snprintf(why, sizeof why, "refused: max_conns (%d) is reached", cfg->max_conns);
    else if (at_limit(s->open, cfg->max_conns_per_address))
        snprintf(why, sizeof why, "refused: max_conns_per_address (%d) is reached", cfg->max_conns_per_address);
    else
        return true;
    ep_refuse(a, hello, why);
    return false;
}

/* Makes room for one more handshake, if the newcomer is to have it. It is not told otherwise: it asks again. */
static bool ep_make_room(struct association *a, const struct source *s, bool replaces)
{
    dtls_endpoint *ep = a->ep;
    const dtls_counters *n = &ep->counters;
    while (n->handshakes >= (size_t)ep->cfg.max_handshakes || (!replaces && n->conns >= (size_t)ep->cfg.max_conns)) {
        struct association *victim = source_victim(ep, s);
        if (!victim) {
            ep_log_stranger(ep, DTLS_LOG_WARNING, &a->peer, "has to wait: too many handshakes are in progress");
            return false;
        }
        conn_end(victim->conn, DTLS_CLOSE_TIMEOUT, "gave way to others: too many handshakes are in progress");
    }
    return !ep->closed; /* the log of the above may have ended the endpoint */
}

/* A connection for an association whose cookie was good. False: there is no place, or no memory. */
static bool ep_admit(struct association *a, const struct record *hello, struct association *old)
{
    dtls_endpoint *ep = a->ep;
    struct source *s = source_of(ep, &a->peer);
    bool replaces = old && !old->handshake && assoc_native(old);
    int64_t since = old && old->handshake ? old->used_at : INT64_MAX;
    if (!s)
        return false;
    s->refs++; /* it must not go with the last of its handshakes while we look */
    if (old && old->handshake)
        hs_give_way(old);
    bool good = !ep->closed && (replaces || ep_has_place(a, hello, s)) && ep_make_room(a, s, replaces);
    dtls_conn *c = good ? conn_new(ep, true) : NULL;
    if (c)
        conn_add_try(c, a);
    good = c && hs_new(a);
    if (good) {
        a->used_at = earlier(a->used_at, since); /* who begins again and again gets no time for it */
        source_join(a, s);
        assoc_list(a);
        conn_list(c);
    } else if (c) {
        conn_destroy(&c->object);
    }
    s->refs--;
    source_release(ep, s);
    return good;
}

/* The spare association's cookie was good: it becomes a connection's. */
static void ep_accept(dtls_endpoint *ep, const struct record *hello, struct association *old)
{
    struct association *a = ep->spare;
    ep->spare = NULL;
    if (ep_admit(a, hello, old)) {
        hs_accept(a, hello);
    } else {
        ep_count(ep, DTLS_DROP_LIMIT);
        assoc_destroy(&a->object);
    }
}

/* A ClientHello: from a stranger, or from a live peer's address (a restarted client, or somebody who only writes that
 * address on his datagrams). It goes through DTLSv1_listen on the spare association: nothing is kept before the cookie
 * proves the address, and a live connection stays until the new handshake is done. */
static void ep_hello(dtls_endpoint *ep, struct udp *u, const struct record *r, const dtls_addr *from,
                     const dtls_addr *to, struct association *old)
{
    if (!ep->spare && !(ep->spare = assoc_new(ep))) {
        ep_count(ep, DTLS_DROP_LIMIT);
        return;
    }
    struct association *a = ep->spare;
    assoc_set_addresses(a, from, to);
    a->udp = u;
    memcpy(a->hello_random, r->body + HANDSHAKE_HEADER + 2, HELLO_RANDOM);
    a->wire.written = false;
    a->wire.in = r->start; /* alone: OpenSSL 3.5 would work on what stands behind it in the datagram */
    a->wire.in_len = r->size;
    cookie_rotate(ep);
    errors_clear();
    int verified = DTLSv1_listen(a->ssl, ep->listen_addr);
    errors_clear();
    a->wire.in = NULL;
    if (verified > 0)
        ep_accept(ep, r, old);
    else if (a->wire.written)
        ep->counters.cookies_sent++;
    else
        ep_count(ep, DTLS_DROP_HELLO);
}

/* A repeated one: of a handshake under way, or of a connection's own. */
static struct association *ep_hello_of(struct association *a, const struct record *r)
{
    while (a && memcmp(a->hello_random, r->body + HANDSHAKE_HEADER + 2, HELLO_RANDOM) != 0)
        a = assoc_next_same(a);
    return a;
}

/* Datagrams. */

static bool ep_is_there(const struct association *a, const struct path *path)
{
    const struct path own = {a->peer, a->local, a->udp};
    return path_equal(&own, path);
}

/* A datagram from there. */
static void ep_pass(struct association *a, const struct path *from, const uint8_t *p, size_t n)
{
    a->from = ep_is_there(a, from) ? NULL : from;
    assoc_input(a, p, n);
    a->from = NULL;
}

/* Where there are several, each open one takes what it has the keys for. False: nothing was for them. */
static bool ep_give(struct association *a, const uint8_t *p, size_t n)
{
    for (struct association *open = assoc_open_same(a), *next; open; open = next) {
        next = assoc_open_same(assoc_next_same(open));
        open->authentic = false;
        assoc_input(open, p, n);
        if (open->authentic || !open->phase)
            return true;
    }
    return false;
}

/* Peers that come from another address. */

/* Whether the association's peer sent this, from there. Where nothing newer was there before it is moved there. The same
 * record from two addresses means that somebody copies: the one that is proven is the peer's. */
static APART bool ep_is_from(struct association *a, const struct record *r, const struct path *from)
{
    uint8_t text[RECORD_BODY_MAX + 1];
    size_t n;
    unsigned type;
    const struct move *m = a->move;
    bool back = m && path_equal(&m->old, from);
    bool newest = r->sequence > a->wire.newest || (back && !m->proven && r->sequence == a->wire.newest);
    if (!a->phase || a->handshake || !a->conn->server || !(back || newest) || (r->type == TYPE_RRC && !a->wire.rrc))
        return false;
    a->ep->counters.trials++;
    if (!wire_open(&a->wire, false, r, text, &n, &type))
        return false;
    /* A repeated Finished is of a handshake, which stays where it is. Answers are to our own question: only one that it is
     * still there moves it back. */
    bool answer = type == TYPE_RRC && n == PATH_MESSAGE && text[0] != PATH_CHALLENGE;
    if (!newest || type == TYPE_HANDSHAKE || (answer && !(back && text[0] == PATH_RESPONSE)))
        return true;
    if (assoc_move(a, from, r))
        return true;
    ep_count(a->ep, DTLS_DROP_LIMIT);
    return false;
}

/* Whose record one without a connection ID may be. The first that is looked at costs next to nothing; for others there is a
 * limit, since whoever sends datagrams can make us look. */
struct search {
    dtls_endpoint *ep;
    const struct record *r;
    const struct path *from;
    int looked_at;
    bool refused;
};

static bool search_may_look(struct search *s)
{
    dtls_endpoint *ep = s->ep;
    int64_t now = ep->loop->now;
    if (s->looked_at++ == 0)
        return true;
    if (now - ep->trials_at >= us(1000)) {
        ep->trials_at = now;
        ep->trials_left = ep->cfg.roam_trials;
    }
    s->refused = s->looked_at > ep->cfg.roam_trials_each || ep->trials_left == 0;
    ep->trials_left -= !s->refused;
    return !s->refused;
}

/* Those whose peer was there a moment ago. What it sent before it left may come late. */
static struct association *search_moved(struct search *s)
{
    const struct table *t = &s->ep->moves;
    struct entry *e = table_first(t, assoc_hash(t, &s->from->peer)), *next;
    for (; e && search_may_look(s); e = next) {
        struct association *a = OWNER_OF(struct move, entry, e)->a;
        next = table_next(e);
        if (path_equal(&a->move->old, s->from) && ep_is_from(a, s->r, s->from))
            return a;
    }
    return NULL;
}

/* Those that the nonce tells; *there: some are. */
static struct association *search_marked(struct search *s, bool *there)
{
    const struct table *t = &s->ep->marks;
    struct entry *e = s->r->body_len < OVERHEAD_MAX ? NULL : table_first(t, assoc_mark_hash(s->ep, assoc_mark(s->r))),
                 *next;
    *there = e != NULL;
    for (; e && search_may_look(s); e = next) {
        struct association *a = OWNER_OF(struct association, mark_entry, e);
        next = table_next(e);
        if (ep_is_from(a, s->r, s->from))
            return a;
    }
    return NULL;
}

/* Those from the same source, the one that was looked at longest ago first. */
static struct association *search_blindly(struct search *s)
{
    struct source *source = source_find(s->ep, &s->from->peer);
    struct association *a = source ? source->first[2] : NULL, *last = source ? source->last[2] : NULL, *next;
    for (; a && search_may_look(s); a = a == last ? NULL : next) {
        bool near = s->r->sequence > a->wire.newest && s->r->sequence - a->wire.newest <= BLIND_AHEAD;
        next = a->source_next;
        if (near && ep_is_from(a, s->r, s->from))
            return a;
        source_tried(a);
    }
    return NULL;
}

/* A datagram from an address at which nobody has the keys for it. */
static bool ep_roams(dtls_endpoint *ep, const struct path *from, const uint8_t *p, size_t n)
{
    struct record r;
    if (!ep->listening || ep->cfg.roam_trials == DTLS_NEVER || !record_parse_any(p, n, 0, &r) || r.size != n ||
        r.epoch != 1 || (r.type != TYPE_DATA && r.type != TYPE_ALERT && r.type != TYPE_RRC) ||
        r.body_len < OVERHEAD_MIN)
        return false;
    struct search s = {.ep = ep, .r = &r, .from = from};
    bool marked = false;
    struct association *a = search_moved(&s);
    a = a ? a : search_marked(&s, &marked);
    a = a || marked ? a : search_blindly(&s);
    ep->counters.trials_refused += s.refused;
    if (a)
        ep_pass(a, from, p, n);
    return a != NULL;
}

/* One that begins with a connection ID. */
static void ep_input_cid(dtls_endpoint *ep, const struct path *from, const uint8_t *p, size_t n)
{
    const uint8_t *cid = p + RECORD_HEADER - 2;
    size_t len = ep->cfg.cid_bytes > 0 ? (size_t)ep->cfg.cid_bytes : CID_BYTES;
    struct association *a = n >= RECORD_HEADER + len ? assoc_find_cid(ep, cid, len) : NULL;
    struct record r;
    if (!a || !wire_parse(&a->wire, p, n, &r) || (a->handshake && !ep_is_there(a, from))) {
        ep_count(ep, DTLS_DROP_CID);
        return;
    }
    if (!ep_is_there(a, from))
        ep_is_from(a, &r, from);
    ep_pass(a, from, p, n);
}

static void ep_input(dtls_endpoint *ep, struct udp *u, const uint8_t *p, size_t n, const dtls_addr *from,
                     const dtls_addr *to)
{
    struct record r;
    const struct path path = {*from, *to, u};
    struct association *a = assoc_find(ep, from, to);
    ep->counters.datagrams_in++;
    if (n > 0 && p[0] == TYPE_CID) {
        ep_input_cid(ep, &path, p, n);
    } else if (ep->listening && (!a || a->conn->server) && record_client_hello(p, n, &r)) {
        struct association *known = ep_hello_of(a, &r);
        if (known || r.sequence > HELLO_SEQUENCE_MAX)
            ep_count(ep, DTLS_DROP_HELLO);
        else
            ep_hello(ep, u, &r, from, to, a);
        if (known && known->handshake)
            hs_hello_again(known);
        a = n > r.size ? ep_hello_of(assoc_find(ep, from, to), &r) : NULL;
        if (a && a->handshake) /* what stands behind it: more pieces of it */
            a->handshake->state == HS_NEW ? assoc_post(a, p + r.size, n - r.size)
                                          : assoc_input(a, p + r.size, n - r.size);
    } else if (!(a && ep_give(a, p, n)) && !ep_roams(ep, &path, p, n)) {
        /* A handshake comes last: somebody may have started it in the name of whoever is open there, or have left since. */
        dtls_drop why = record_drop(p, n);
        if (a && a->handshake)
            assoc_input(a, p, n);
        else if (!a)
            ep_count(ep, why == DTLS_DROP_MALFORMED ? DTLS_DROP_STRANGER : why);
    }
}

static void ep_listening_input(struct udp *u, const uint8_t *p, size_t n, const dtls_addr *from, const dtls_addr *to)
{
    ep_input(u->user.owner, u, p, n, from, to);
}

static void ep_listening_failed(struct udp *u, int error)
{
    (void)u, (void)error; /* whoever it is about, others use this socket as well */
}

static void ep_listening_writable(struct udp *u)
{
    ep_tell_waiting(u->user.owner, u);
}

int dtls_endpoint_input(dtls_endpoint *ep, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    if (ep->inside)
        return DTLS_ERR_STATE;
    loop_enter(ep->loop);
    if (!ep->closed) {
        if (len <= DATAGRAM_MAX)
            ep_input(ep, NULL, data, len, from, to);
        else
            ep_count(ep, DTLS_DROP_OVERSIZE);
    }
    loop_leave(ep->loop);
    return 0;
}

/* Listening. */

static bool ep_covered(const dtls_endpoint *ep, const dtls_addr *a)
{
    if (a->port == 0)
        return false;
    for (struct object *o = ep->sockets.next; o != &ep->sockets; o = o->next) {
        const struct udp *u = (const struct udp *)o;
        if (!u->connected && u->local.port == a->port && u->local.family == a->family &&
            (u->wildcard || dtls_addr_equal(&u->local, a)))
            return true;
    }
    return false;
}

static struct udp *ep_bind(dtls_endpoint *ep, const dtls_addr *a, dtls_error *err)
{
    char text[DTLS_ADDR_TEXT];
    const struct udp_user user = {
        ep_listening_input, ep_listening_failed, ep_listening_writable, ep, &ep->counters, &ep->cfg};
    struct udp *u = udp_open(ep->loop, &user, &ep->sockets, a, NULL);
    int error = errno;
    if (!u)
        fail(err, DTLS_ERR_SYSTEM, "%s: %s", dtls_addr_format(a, text, sizeof text), strerror(error));
    errno = error;
    return u;
}

/* "[::]:p" means every address, so it takes two sockets on one port. With port 0 the IPv6 socket's pick may be taken
 * for IPv4; then the pair is tried again. */
static int ep_listen_everywhere(dtls_endpoint *ep, dtls_addr *a, dtls_error *err)
{
    for (int tries = 16; tries > 0; tries--) {
        struct udp *six = ep_bind(ep, a, err);
        dtls_addr four = {.family = 4, .port = six ? six->local.port : a->port};
        if (!six && errno != EAFNOSUPPORT && errno != EADDRNOTAVAIL)
            return DTLS_ERR_SYSTEM; /* no IPv6 on this machine is no error, anything else is */
        struct udp *u = ep_covered(ep, &four) ? six : ep_bind(ep, &four, err);
        if (u) {
            a->port = u->local.port;
            return 0;
        }
        int error = errno;
        if (six)
            udp_free(six);
        if (a->port != 0 || error != EADDRINUSE)
            break;
    }
    return DTLS_ERR_SYSTEM;
}

/* Every peer would refuse a certificate whose extendedKeyUsage says otherwise. */
static int ep_check_purpose(const struct trust *t, const dtls_config *cfg, int purpose, dtls_error *err)
{
    bool server = purpose == X509_PURPOSE_SSL_SERVER;
    if (!SSL_CTX_get0_certificate(t->ctx) && server && !cfg->psk)
        return fail(err, DTLS_ERR_CERT, "a server needs a certificate and its private key, or pre-shared keys");
    for (size_t i = 0; i <= t->named_len; i++) {
        X509 *cert = SSL_CTX_get0_certificate(i ? t->named[i - 1] : t->ctx);
        if (cert && X509_check_purpose(cert, purpose, 0) != 1)
            return fail(err, DTLS_ERR_CERT, "%s certificate is not for a %s (extendedKeyUsage)",
                        i ? "a further" : "the", server ? "server" : "client");
    }
    return 0;
}

int dtls_endpoint_listen(dtls_endpoint *ep, dtls_addr *a, dtls_error *err)
{
    int r = 0;
    if (ep->closed)
        return fail(err, DTLS_ERR_STATE, "the endpoint was freed");
    if (ep_check_purpose(&ep->trust, &ep->cfg, X509_PURPOSE_SSL_SERVER, err) < 0)
        return DTLS_ERR_CERT;
    if (ep->cfg.send) {
        ep->listening = true;
        return 0;
    }
    if (!a || (a->family != 4 && a->family != 6))
        return fail(err, DTLS_ERR_ARG, "no address to listen on");
    if (ep_covered(ep, a))
        return 1;
    loop_enter(ep->loop);
    if (a->family == 6 && addr_is_wildcard(a)) {
        r = ep_listen_everywhere(ep, a, err);
    } else {
        struct udp *u = ep_bind(ep, a, err);
        r = u ? 0 : DTLS_ERR_SYSTEM;
        if (u)
            a->port = u->local.port;
    }
    ep->listening = ep->listening || r == 0;
    loop_leave(ep->loop);
    return r;
}

/* Connecting. */

/* A host name and port, or an address. 0 or an error. */
static int ep_parse_host(const char *host, struct question *q, dtls_addr *addr, dtls_error *err)
{
    const char *colon = strrchr(host, ':');
    size_t n = colon ? (size_t)(colon - host) : 0;
    uint32_t port = 0;
    if (dtls_addr_parse(addr, host, err) == 0)
        return 0;
    memset(addr, 0, sizeof *addr);
    if (n == 0 || n >= sizeof q->host || strchr(host, ':') != colon || host[0] == '[' ||
        strspn(host, "0123456789.") == n)
        return DTLS_ERR_ADDR; /* no host name: err still says what is wrong with the address */
    if (addr_parse_number(colon + 1, UINT16_MAX, &port) < 0 || port == 0)
        return fail(err, DTLS_ERR_ADDR, "%.100s: the port must be a number from 1 to 65535", host);
    snprintf(q->host, sizeof q->host, "%.*s", (int)n, host);
    snprintf(q->port, sizeof q->port, "%u", (unsigned)port);
    return 0;
}

/* The host's addresses are there. */
static void ep_resolved(void *user, const struct question *what, const struct answer *answer)
{
    dtls_conn *c = user;
    struct dial *d = c->dial;
    dtls_error err;
    int error = answer->error;
    d->lookup = NULL;
    memcpy(d->addrs, answer->addrs, sizeof d->addrs);
    d->addrs_len = answer->len;
    if (error || answer->len == 0)
        conn_end(c, DTLS_CLOSE_ERROR, "%.150s: %s", what->host,
                 error == EAI_SYSTEM ? strerror(answer->system_error) : gai_strerror(error ? error : EAI_NONAME));
    else if (hs_dial(c, &err) < 0)
        conn_end(c, DTLS_CLOSE_ERROR, "%s", err.text);
    errors_clear();
}

/* What the client expects and offers, and where. 0 or an error. */
static int ep_set_target(dtls_conn *c, const dtls_target *t, struct question *q, dtls_error *err)
{
    struct dial *d = c->dial;
    const char *name = t->name ? t->name : q->host[0] ? q->host : NULL;
    int r = 0;
    d->since = c->started;
    d->local = t->local;
    c->user = t->user;
    c->round_trip_us = t->round_trip_us;
    c->paced = t->round_trip_us > 0;
    if (name && !(c->name = name_copy(name, &r)))
        return fail(err, r, "%.100s: not a name to expect in a certificate", name);
    if (t->session && SSL_SESSION_up_ref(t->session) == 1)
        d->session = t->session;
    return 0;
}

static int ep_start(dtls_conn *c, const dtls_addr *peer, const struct question *q, dtls_error *err)
{
    struct dial *d = c->dial;
    if (!hs_try_new(c))
        return fail(err, DTLS_ERR_MEMORY, "out of memory");
    if (!q->host[0]) {
        d->addrs[0] = *peer;
        d->addrs_len = 1;
        return hs_dial(c, err);
    }
    d->lookup = lookup_new(c->ep->loop, q, ep_resolved, c);
    if (!d->lookup)
        return fail(err, DTLS_ERR_SYSTEM, "%.100s: %s", q->host, strerror(errno));
    assoc_arm(c->tries);
    return 0;
}

/* What can be refused before anything is made. */
static int ep_check_target(dtls_endpoint *ep, const dtls_target *t, dtls_addr *peer, struct question *q,
                           dtls_error *err)
{
    char text[DTLS_ADDR_TEXT];
    *peer = t->peer;
    if (ep->inside || ep->closed)
        return fail(err, DTLS_ERR_STATE, "not possible now");
    if (t->host && ep->cfg.send)
        return fail(err, DTLS_ERR_ARG, "%.100s: a transport of your own needs the peer's address", t->host);
    if (t->host && ep_parse_host(t->host, q, peer, err) < 0)
        return DTLS_ERR_ADDR;
    dtls_addr_format(peer, text, sizeof text);
    if (!ep->cfg.send && !q->host[0] && ((peer->family != 4 && peer->family != 6) || peer->port == 0))
        return fail(err, DTLS_ERR_ARG, "%s: no address to connect to", text);
    if (ep_check_purpose(&ep->trust, &ep->cfg, X509_PURPOSE_SSL_CLIENT, err) < 0)
        return DTLS_ERR_CERT;
    if (ep->counters.conns >= (size_t)ep->cfg.max_conns)
        return fail(err, DTLS_ERR_LIMIT, "%s: %d connections are open already", q->host[0] ? q->host : text,
                    ep->cfg.max_conns);
    return 0;
}

/* Nobody heard of it yet. */
static void ep_discard(dtls_conn *c)
{
    while (c->tries)
        hs_try_remove(c->tries);
    dial_end(c);
    loop_bury(c->ep->loop, &c->object);
}

dtls_conn *dtls_endpoint_connect(dtls_endpoint *ep, const dtls_target *t, dtls_error *err)
{
    struct question q = {.fd = -1};
    dtls_addr peer;
    if (ep_check_target(ep, t, &peer, &q, err) < 0)
        return NULL;
    loop_enter(ep->loop);
    dtls_conn *c = conn_new(ep, false);
    if (!c || !(c->dial = calloc(1, sizeof *c->dial)))
        fail(err, DTLS_ERR_MEMORY, "out of memory");
    bool good = c && c->dial && ep_set_target(c, t, &q, err) == 0 && ep_start(c, &peer, &q, err) == 0;
    if (good) {
        conn_list(c);
    } else if (c) {
        ep_discard(c);
        c = NULL;
    }
    errors_clear();
    loop_leave(ep->loop);
    return c;
}

/* Who we are and whom we trust. */

static void trust_free(struct trust *t)
{
    for (size_t i = 0; i < t->named_len; i++)
        SSL_CTX_free(t->named[i]);
    SSL_CTX_free(t->ctx);
    free(t->named);
    free(t->alpn);
    free(t->psk_identity);
    OPENSSL_cleanse(t, sizeof *t);
}

/* NULL: *err tells why. */
static SSL_CTX *trust_ctx(dtls_endpoint *ep, const dtls_config *cfg, const dtls_cert *cert, struct trust *t,
                          dtls_error *err)
{
    SSL_CTX *ctx = SSL_CTX_new(DTLS_method());
    if (!ctx) {
        fail(err, DTLS_ERR_MEMORY, "out of memory");
        return NULL;
    }
    SSL_CTX_set_cookie_generate_cb(ctx, cookie_generate);
    SSL_CTX_set_cookie_verify_cb(ctx, cookie_verify);
    if (cfg->certs_len > 0 || cfg->strict_names) {
        SSL_CTX_set_tlsext_servername_callback(ctx, ctx_server_name);
        SSL_CTX_set_tlsext_servername_arg(ctx, ep);
    }
    if (ctx_defaults(ctx, cfg, t, err) == 0 && ctx_set_psk(ctx, cfg, err) == 0 && ctx_set_cid(ctx, cfg, err) == 0 &&
        (!cfg->alpn || ctx_set_alpn(ctx, ep, cfg->alpn, &t->alpn, err) == 0) && ctx_load(ctx, cfg, cert, err) == 0 &&
        ctx_check(ctx, cfg, err) == 0)
        return ctx;
    SSL_CTX_free(ctx);
    return NULL;
}

/* Builds and checks all of it. 0 or an error, and then trust_free() is up to the caller all the same. */
static int trust_build(dtls_endpoint *ep, const dtls_config *cfg, struct trust *t, dtls_error *err)
{
    const dtls_cert own = {.cert_file = cfg->cert_file, .key_file = cfg->key_file};
    *t = (struct trust){.psk_key_len = cfg->psk_identity ? cfg->psk_key_len : 0};
    if (RAND_bytes(t->id, sizeof t->id) != 1)
        return fail(err, DTLS_ERR_TLS, "OpenSSL has no random numbers");
    t->ctx = trust_ctx(ep, cfg, &own, t, err);
    if (!t->ctx)
        return err && err->code ? err->code : DTLS_ERR_CERT;
    t->named = cfg->certs_len ? calloc(cfg->certs_len, sizeof *t->named) : NULL;
    t->psk_identity = cfg->psk_identity ? text_copy(cfg->psk_identity) : NULL;
    if ((cfg->certs_len && !t->named) || (cfg->psk_identity && !t->psk_identity))
        return fail(err, DTLS_ERR_MEMORY, "out of memory");
    if (cfg->psk_identity)
        memcpy(t->psk_key, cfg->psk_key, cfg->psk_key_len);
    for (; t->named_len < cfg->certs_len; t->named_len++) {
        t->named[t->named_len] = trust_ctx(ep, cfg, &cfg->certs[t->named_len], t, err);
        if (!t->named[t->named_len])
            return err && err->code ? err->code : DTLS_ERR_CERT;
    }
    return 0;
}

/* The endpoint. */

void dtls_endpoint_each(dtls_endpoint *ep, void (*fn)(dtls_conn *conn, void *user), void *user)
{
    loop_enter(ep->loop);
    for (dtls_conn *c = ep->first; c; c = c->next) /* fn may end any: they stay in memory until we leave */
        if (c->state == CONN_OPEN)
            fn(c, user);
    loop_leave(ep->loop);
}

static void walk_end(struct walk *w)
{
    dtls_loop *l = w->ep->loop;
    if (w->over)
        return;
    w->over = true;
    w->ep->walks_len--;
    job_remove(l, &w->job);
    loop_bury(l, &w->object);
    w->fn(NULL, w->user);
}

static void walk_on(struct job *job)
{
    struct walk *w = OWNER_OF(struct walk, job, job);
    for (int n = WALK_STEP; n > 0 && !w->over && w->at && w->at->serial <= w->serial; n--) {
        dtls_conn *c = w->at;
        w->at = c->next;
        if (c->state == CONN_OPEN)
            w->fn(c, w->user);
    }
    if (w->over)
        return;
    if (w->at && w->at->serial <= w->serial)
        job_add(w->ep->loop, job);
    else
        walk_end(w);
}

int dtls_endpoint_walk(dtls_endpoint *ep, void (*fn)(dtls_conn *conn, void *user), void *user)
{
    if (ep->closed)
        return DTLS_ERR_STATE;
    if (ep->walks_len == WALKS_MAX)
        return DTLS_ERR_LIMIT;
    struct walk *w = calloc(1, sizeof *w);
    if (!w)
        return DTLS_ERR_MEMORY;
    *w = (struct walk){
        .object.destroy = object_free, .job.run = walk_on, .ep = ep, .at = ep->first, .fn = fn, .user = user};
    w->serial = ep->serials;
    list_add(&ep->walks, &w->object);
    ep->walks_len++;
    loop_enter(ep->loop);
    job_add(ep->loop, &w->job);
    loop_leave(ep->loop);
    return 0;
}

void dtls_endpoint_counters(const dtls_endpoint *ep, dtls_counters *counters)
{
    *counters = ep->counters;
}

void *dtls_endpoint_user(const dtls_endpoint *ep)
{
    return ep->cfg.user;
}

dtls_loop *dtls_endpoint_loop(const dtls_endpoint *ep)
{
    return ep->loop;
}

static void ep_destroy(struct object *o)
{
    dtls_endpoint *ep = (dtls_endpoint *)o;
    if (ep->spare)
        assoc_destroy(&ep->spare->object);
    while (ep->newest)
        session_drop(ep, ep->newest);
    free(ep->associations.slots);
    free(ep->sources.slots);
    free(ep->identities.slots);
    free(ep->sessions.slots);
    free(ep->cids.slots);
    free(ep->marks.slots);
    free(ep->moves.slots);
    crypt_free(ep->crypt);
    timer_done(ep->loop, &ep->kinds_timer);
    BIO_ADDR_free(ep->listen_addr);
    trust_free(&ep->trust);
    BIO_meth_free(ep->bio_method);
    OPENSSL_cleanse(ep, sizeof *ep);
    free(ep);
}

static void ep_end(struct object *o)
{
    dtls_endpoint *ep = (dtls_endpoint *)o;
    ep->closed = true;
    ep->listening = false;
    while (ep->first)
        conn_end(ep->first, DTLS_CLOSE_LOCAL, "closed here");
    while (ep->walks.next != &ep->walks)
        walk_end((struct walk *)ep->walks.next);
    kinds_sum_up(ep);
    timer_stop(ep->loop, &ep->kinds_timer);
    while (ep->sockets.next != &ep->sockets)
        udp_free((struct udp *)ep->sockets.next);
    loop_bury(ep->loop, o); /* behind its connections: they need its SSL_CTX and BIO_METHOD to the end */
}

void dtls_endpoint_free(dtls_endpoint *ep)
{
    if (!ep || ep->closed || ep->inside)
        return;
    dtls_loop *l = ep->loop;
    loop_enter(l);
    ep_end(&ep->object);
    loop_leave(l);
}

/* Each as large as the configuration lets it get. */
static bool ep_make_tables(dtls_endpoint *ep)
{
    const size_t conns = (size_t)ep->cfg.max_conns;
    struct {
        struct table *table;
        size_t elements;
    } tables[] = {{&ep->associations, conns},
                  {&ep->sources, conns},
                  {&ep->identities, conns},
                  {&ep->cids, conns},
                  {&ep->marks, conns},
                  {&ep->moves, conns},
                  {&ep->sessions, ep->cfg.session_cache == DTLS_NEVER ? 1 : (size_t)ep->cfg.session_cache}};
    for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
        if (!table_init(tables[i].table, tables[i].elements) || RAND_bytes(tables[i].table->key, 16) != 1)
            return false;
    return true;
}

void dtls_endpoint_recheck(dtls_endpoint *ep)
{
    char reason[REASON_BYTES];
    if (ep->closed || ep->inside)
        return;
    loop_enter(ep->loop);
    for (dtls_conn *c = ep->first; c; c = c->next) {
        if (c->state == CONN_OPEN &&
            (!hs_still_trusts(c->open, reason) || !traffic_welcomes(c->open, c->identity, reason, sizeof reason)))
            conn_end(c, DTLS_CLOSE_VERIFY, "no longer trusted: %s", reason);
    }
    loop_leave(ep->loop);
}

static int ep_setup(dtls_endpoint *ep, dtls_error *err)
{
    if (OpenSSL_version_num() >> 28 != OPENSSL_VERSION_NUMBER >> 28)
        return fail(err, DTLS_ERR_TLS, "compiled for another OpenSSL than %s", OpenSSL_version(OPENSSL_VERSION));
    if (config_check(&ep->cfg, err) < 0)
        return DTLS_ERR_ARG;
    if (ep->cfg.cid_prefix_len > 0)
        memcpy(ep->cid_prefix, ep->cfg.cid_prefix, ep->cfg.cid_prefix_len);
    ep->bio_method = bio_method_new();
    ep->listen_addr = BIO_ADDR_new();
    ep->crypt = calloc(1, sizeof *ep->crypt);
    ep->trials_left = ep->cfg.roam_trials;
    if (!ep->bio_method || !ep->listen_addr || !ep->crypt)
        return fail(err, DTLS_ERR_MEMORY, "out of memory");
    if (!ep_make_tables(ep))
        return fail(err, DTLS_ERR_MEMORY, "out of memory, or of random numbers");
    if (RAND_bytes(&ep->secret[0][0], sizeof ep->secret) != 1)
        return fail(err, DTLS_ERR_TLS, "OpenSSL has no random numbers");
    ep->secret_at = loop_now(ep->loop);
    return trust_build(ep, &ep->cfg, &ep->trust, err);
}

/* Used up; not ours to keep. */
static void ep_forget_files(dtls_config *cfg)
{
    cfg->cert_file = cfg->key_file = cfg->ca_file = cfg->crl_file = cfg->alpn = cfg->psk_identity = NULL;
    cfg->psk_key = cfg->cid_prefix = NULL;
    cfg->certs = NULL;
}

int dtls_endpoint_reload(dtls_endpoint *ep, const dtls_config *from, dtls_error *err)
{
    struct trust t;
    dtls_config cfg = ep->cfg;
    if (ep->closed || ep->inside)
        return fail(err, DTLS_ERR_STATE, "not possible now");
    cfg.cert_file = from->cert_file;
    cfg.key_file = from->key_file;
    cfg.ca_file = from->ca_file;
    cfg.crl_file = from->crl_file;
    cfg.ca_system = from->ca_system;
    cfg.auth = from->auth;
    cfg.certs = from->certs;
    cfg.certs_len = from->certs_len;
    cfg.strict_names = from->strict_names;
    cfg.alpn = from->alpn;
    cfg.on_password = from->on_password;
    cfg.psk_identity = from->psk_identity;
    cfg.psk_key = from->psk_key;
    cfg.psk_key_len = from->psk_key_len;
    cfg.psk = from->psk;
    cfg.psk_ccm8 = from->psk_ccm8;
    loop_enter(ep->loop);
    errors_clear();
    int r = trust_build(ep, &cfg, &t, err);
    if (r == 0 && ep->listening)
        r = ep_check_purpose(&t, &cfg, X509_PURPOSE_SSL_SERVER, err);
    errors_clear();
    if (r == 0) {
        t.since = time(NULL) + 1; /* sessions know whole seconds only */
        trust_free(&ep->trust);   /* handshakes under way hold what they need of it */
        ep->trust = t;
        ep->cfg = cfg;
        ep_forget_files(&ep->cfg);
        while (ep->newest)
            session_drop(ep, ep->newest);
        if (ep->spare)
            assoc_destroy(&ep->spare->object);
        ep->spare = NULL;
    } else {
        trust_free(&t);
    }
    loop_leave(ep->loop);
    return r;
}

dtls_endpoint *dtls_endpoint_new(dtls_loop *l, const dtls_config *config, dtls_error *err)
{
    dtls_endpoint *ep = calloc(1, sizeof *ep);
    if (!ep) {
        fail(err, DTLS_ERR_MEMORY, "out of memory");
        return NULL;
    }
    *ep = (dtls_endpoint){.object = {.end = ep_end, .destroy = ep_destroy}, .loop = l, .cfg = *config};
    list_init(&ep->sockets);
    list_init(&ep->walks);
    list_init(&ep->waiting);
    if (timer_init(l, &ep->kinds_timer, kinds_sum_up, ep) < 0) {
        free(ep);
        fail(err, DTLS_ERR_MEMORY, "out of memory");
        return NULL;
    }
    errors_clear();
    int r = ep_setup(ep, err);
    errors_clear();
    if (r < 0) {
        ep_destroy(&ep->object);
        return NULL;
    }
    ep_forget_files(&ep->cfg);
    list_add(&l->live, &ep->object);
    return ep;
}

/* ==== 12. program ================================================================================================= */

#ifdef DTLS_MAIN

/* From top to bottom: the options and what every mode makes of them; the service with its commands, and the server that
 * offers it; editor, line input and dialling; the client, which ties dialling to one of the two inputs; main() with the
 * modes. As above, a part calls only what stands before it. Editor, line input and dialling know neither each other nor
 * the client: their owner holds the struct, calls the functions and sets the pointers by which it hears of events. */

#include <ctype.h>
#include <histedit.h>
#include <locale.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <termios.h>
#include <wchar.h>
#include <wctype.h>

/* Options. */

enum {
    EXIT_USAGE = 2,
    PATH_BYTES = 1024,
    SETTINGS_MAX = 40,
    WORDS_MAX = 64,   /* of an option that may be repeated */
    KEYS_MAX = 10000, /* pre-shared keys in a file */
    IDENTITY_BYTES = 128,
    EXPIRY_DAYS = 14,                  /* before that a certificate's end is told, */
    EXPIRY_LOOK_MS = 24 * 3600 * 1000, /* and so often looked for */
    LIST_BYTES = 256,                  /* the names of all commands, or of all modes, in a sentence */
    INPUT_BYTES = 65536,               /* read from standard input at once */
    WINDOW_LINES = 32,                 /* lines from a file or pipe that may wait for their answer */
    PACE_MS = 200,                     /* no answer for so long: the server does not answer every line */
    LINGER_MS = 200,                   /* after the last answer, for one more; at least */
    LINGER_OWED_MS = 2000,             /* for answers still missing */
    LOOK_MS = 50,                      /* between looks at an input that cannot be watched and has nothing yet */
    KEPT_LINES = 1024,                 /* that wait for their answer, to be sent again or told of */
    BACKOFF_FIRST_MS = 500,            /* before dialling again, doubling */
    BACKOFF_MAX_MS = 30000,
    PROBE_MS = 700, /* between probes of a silent server, at most: a ping, then a new handshake beside it, too */
    GONE_MS = 15000 /* of probes without any answer, at most: it counts as gone */
};

static const char usage_text[] =
    "usage: dtls server [options] ADDR...     serve on each ADDR\n"
    "       dtls client [options] ADDR        talk to the server at ADDR\n"
    "       dtls --help | --version\n"
    "\n"
    "ADDR is 127.0.0.1:1234, [::1]:1234, [fe80::1%%eth0]:1234, [::]:1234 for every IPv4 and IPv6\n"
    "address of a server, or for a client also a host name as in localhost:1234.\n"
    "\n"
    "  --certs DIR             folder with ca.pem, server.pem, server.key, client.pem, client.key (certs)\n"
    "  --cert FILE             own certificate, then its intermediates (DIR/server.pem or DIR/client.pem)\n"
    "  --key FILE              its private key\n"
    "  --ca FILE               certificates that the peer's must come from (DIR/ca.pem)\n"
    "                          'system': those that this system trusts\n"
    "  --crl FILE              revocation lists of those CAs\n"
    "  --key-password FILE     its first line is the password of the private key\n"
    "  --name NAME             client: name or IP address expected in the server's certificate (from ADDR)\n"
    "  --psk IDENTITY:HEX      a pre-shared key; a server's may be repeated\n"
    "  --psk-file FILE         server: pre-shared keys, a line each; nobody else may read it\n"
    "  --psk-ccm8              also the suite with CCM_8, for constrained peers\n"
    "  --allow NAME            only peers with this commonName, subjectAltName or identity; may be repeated\n"
    "  --deny NAME             no peers with it; may be repeated\n"
    "  --optional-cert         server: clients without a certificate, too\n"
    "  --no-client-cert        server: clients are not asked for one\n"
    "  --also CERT,KEY         server: a further certificate, for clients that ask for its name\n"
    "  --strict-names          server: no clients that ask for a name that no certificate has\n"
    "  --recheck               server: SIGHUP also closes connections that would be refused now\n"
    "  --no-cert               client: without a certificate of its own\n"
    "  --insecure              client: takes any server, and tells what it would have refused\n"
    "  --alpn NAMES            application protocols, as in coap,echo\n"
    "  --show-cert             what the peer's certificates say, and whether they are good\n"
    "  --keylog FILE           writes secrets there, for Wireshark: whoever reads it reads everything\n"
    "  --session FILE          client: keeps its session there, to resume it in the next run\n"
    "  --mtu BYTES             the link's MTU, 256 to 65535 (1500)\n"
    "  --idle-timeout SECONDS  server: a client silent for so long is gone; 0 never (120)\n"
    "  --keepalive SECONDS     client: ping a server silent for so long; 0 never (25)\n"
    "  --unanswered SECONDS    client: lines had no answer for so long: ask by a new handshake; 0 never (0)\n"
    "  --cid BYTES             of the connection ID in records to us, 0 to 20; never: none in any (server 8, client "
    "0)\n"
    "  --max-clients N         server (4096)\n"
    "  -v, -q                  more (retransmissions, counters at the end), or only errors, on standard error\n"
    "\n"
    "Commands of the service: %s.\n"
    "A client on a terminal edits lines; otherwise it sends standard input line by line, prints the\n"
    "answers and exits with 0, or with 1 if it could not connect or the connection was lost.\n"
    "A server that gets SIGHUP reads its certificates, keys, lists and --psk-file again.\n"
    "A client that gets SIGUSR1 goes on from another port.\n";

/* What an option brought that may be repeated. */
struct words {
    const char *word[WORDS_MAX];
    size_t len;
};

enum of { OF_BOTH, OF_SERVER, OF_CLIENT, OF_MODES };

struct options {
    const struct mode *mode;
    bool help, version;
    bool ccm8, optional_cert, no_client_cert, strict_names, recheck, no_cert, insecure, show_cert;
    const char *certs, *cert, *key, *ca, *name, *crl, *key_password, *psk_file, *alpn, *keylog, *session;
    struct words psk, allow, deny, also;
    int mtu, idle_timeout_ms, keepalive_ms, unanswered_ms, max_clients, cid_bytes;
    dtls_log level;
    const char *of[OF_MODES]; /* the last option that only one of them has */
    char **addrs;
    int addrs_len;
};

/* What the first word of the command line chooses. */
struct mode {
    const char *name;
    const char *role;              /* names its certificate and key in the folder */
    bool one_addr;                 /* otherwise one or more */
    int (*run)(struct options *o); /* returns the exit status */
};

/* An option is a switch, which sets flag or level, or takes a value for text, seconds or number. */
struct setting {
    const char *name;
    bool *flag;
    dtls_log *level, to;
    const char **text;
    struct words *words;
    int *seconds, *number, min, max;
    int *cid;
    enum of of; /* the mode that it says something to */
};

static int complain(int status, const char *text)
{
    fprintf(stderr, "dtls: %s\n", text);
    return status;
}

static void text_append(char *text, size_t size, const char *separator, const char *more)
{
    size_t len = strlen(text);
    snprintf(text + len, size - len, "%s%s", len > 0 ? separator : "", more);
}

static int option_seconds(const char *text, int *ms)
{
    char *end;
    double s = text[strspn(text, "0123456789.")] == 0 ? strtod(text, &end) : -1;
    if (!(s >= 0 && s <= 1000000) || end == text || *end)
        return -1;
    *ms = s == 0 ? DTLS_NEVER : (int)(s * 1000 + 0.999); /* rounded up: 0 would mean the default */
    return 0;
}

static int option_number(const char *text, int min, int max, int *value)
{
    size_t digits = strlen(text);
    long n = digits > 0 && digits < 9 && strspn(text, "0123456789") == digits ? strtol(text, NULL, 10) : -1;
    if (n < min || n > max)
        return -1;
    *value = (int)n;
    return 0;
}

static int option_cid(const char *text, int *bytes)
{
    if (strcmp(text, "never") == 0) {
        *bytes = DTLS_NEVER;
        return 0;
    }
    int r = option_number(text, 0, DTLS_CID_MAX, bytes);
    *bytes = *bytes ? *bytes : DTLS_CID_EMPTY;
    return r;
}

static int option_value(const struct setting *s, const char *value, dtls_error *err)
{
    if (!value || !*value)
        return fail(err, DTLS_ERR_ARG, "%s needs a value; see dtls --help", s->name);
    if (s->text)
        *s->text = value;
    if (s->words && s->words->len == WORDS_MAX)
        return fail(err, DTLS_ERR_ARG, "%s: at most %d times", s->name, WORDS_MAX);
    if (s->words)
        s->words->word[s->words->len++] = value;
    if (s->seconds && option_seconds(value, s->seconds) < 0)
        return fail(err, DTLS_ERR_ARG, "%s %.100s: must be a number of seconds from 0 (never) to 1000000", s->name,
                    value);
    if (s->cid && option_cid(value, s->cid) < 0)
        return fail(err, DTLS_ERR_ARG, "%s %.100s: must be a number from 0 to %d, or never", s->name, value,
                    DTLS_CID_MAX);
    if (s->number && option_number(value, s->min, s->max, s->number) < 0)
        return fail(err, DTLS_ERR_ARG, "%s %.100s: must be a number from %d to %d", s->name, value, s->min, s->max);
    return 0;
}

static void option_table(struct options *o, struct setting to[SETTINGS_MAX])
{
    const struct setting table[] = {
        {.name = "--certs", .text = &o->certs},
        {.name = "--cert", .text = &o->cert},
        {.name = "--key", .text = &o->key},
        {.name = "--ca", .text = &o->ca},
        {.name = "--crl", .text = &o->crl},
        {.name = "--key-password", .text = &o->key_password},
        {.name = "--name", .of = OF_CLIENT, .text = &o->name},
        {.name = "--psk", .words = &o->psk},
        {.name = "--psk-file", .of = OF_SERVER, .text = &o->psk_file},
        {.name = "--psk-ccm8", .flag = &o->ccm8},
        {.name = "--allow", .words = &o->allow},
        {.name = "--deny", .words = &o->deny},
        {.name = "--optional-cert", .of = OF_SERVER, .flag = &o->optional_cert},
        {.name = "--no-client-cert", .of = OF_SERVER, .flag = &o->no_client_cert},
        {.name = "--also", .of = OF_SERVER, .words = &o->also},
        {.name = "--strict-names", .of = OF_SERVER, .flag = &o->strict_names},
        {.name = "--recheck", .of = OF_SERVER, .flag = &o->recheck},
        {.name = "--no-cert", .of = OF_CLIENT, .flag = &o->no_cert},
        {.name = "--insecure", .of = OF_CLIENT, .flag = &o->insecure},
        {.name = "--alpn", .text = &o->alpn},
        {.name = "--show-cert", .flag = &o->show_cert},
        {.name = "--keylog", .text = &o->keylog},
        {.name = "--session", .of = OF_CLIENT, .text = &o->session},
        {.name = "--idle-timeout", .of = OF_SERVER, .seconds = &o->idle_timeout_ms},
        {.name = "--keepalive", .of = OF_CLIENT, .seconds = &o->keepalive_ms},
        {.name = "--unanswered", .of = OF_CLIENT, .seconds = &o->unanswered_ms},
        {.name = "--mtu", .number = &o->mtu, .min = 256, .max = 65535},
        {.name = "--max-clients", .of = OF_SERVER, .number = &o->max_clients, .min = 1, .max = 10000000},
        {.name = "--cid", .cid = &o->cid_bytes},
        {.name = "-v", .level = &o->level, .to = DTLS_LOG_DEBUG},
        {.name = "-q", .level = &o->level, .to = DTLS_LOG_ERROR},
        {.name = "-h", .flag = &o->help},
        {.name = "--help", .flag = &o->help},
        {.name = "--version", .flag = &o->version},
        {.name = NULL}};
    memcpy(to, table, sizeof table);
}

static const struct setting *option_find(const struct setting *table, const char *arg, size_t len)
{
    while (table->name && (strlen(table->name) != len || memcmp(table->name, arg, len) != 0))
        table++;
    return table->name ? table : NULL;
}

/* argv[i] is an option: returns how many arguments it took, or an error. */
static int option_parse(struct options *o, int argc, char **argv, int i, dtls_error *err)
{
    struct setting table[SETTINGS_MAX];
    option_table(o, table);
    const char *equals = strchr(argv[i], '=');
    const struct setting *s = option_find(table, argv[i], equals ? (size_t)(equals - argv[i]) : strlen(argv[i]));
    bool is_switch = s && (s->flag || s->level);
    if (!s || (is_switch && equals))
        return fail(err, DTLS_ERR_ARG, "%.100s: unknown option; see dtls --help", argv[i]);
    o->of[s->of] = s->name;
    if (s->flag)
        *s->flag = true;
    if (s->level)
        *s->level = s->to;
    if (is_switch)
        return 1;
    int r = option_value(s, equals ? equals + 1 : i + 1 < argc ? argv[i + 1] : NULL, err);
    return r < 0 ? r : equals ? 1 : 2;
}

static int options_mode(struct options *o, const struct mode *modes, const char *name, dtls_error *err)
{
    char list[LIST_BYTES] = "";
    for (const struct mode *m = modes; m->name; m++) {
        text_append(list, sizeof list, name ? "' nor '" : " ADDR' or 'dtls ", m->name);
        if (name && strcmp(name, m->name) == 0)
            o->mode = m;
    }
    if (!name)
        return fail(err, DTLS_ERR_ARG, "say 'dtls %s ADDR'; see dtls --help", list);
    if (!o->mode)
        return fail(err, DTLS_ERR_ARG, "%.100s: neither '%s'; see dtls --help", name, list);
    if (o->addrs_len == 0)
        return fail(err, DTLS_ERR_ARG, "no address; write one as in 127.0.0.1:1234 or [::1]:1234");
    if (o->mode->one_addr && o->addrs_len > 1)
        return fail(err, DTLS_ERR_ARG, "%.100s: a %s takes one address", o->addrs[1], name);
    const char *others = o->of[o->mode->one_addr ? OF_SERVER : OF_CLIENT];
    if (others)
        return fail(err, DTLS_ERR_ARG, "%s: no option of a %s; see dtls --help", others, name);
    if (o->mode->one_addr && o->psk.len > 1)
        return fail(err, DTLS_ERR_ARG, "--psk: a %s has one", name);
    return 0;
}

/* Leaves the addresses, in order, in argv; 0 or an error. */
static int options_parse(struct options *o, const struct mode *modes, int argc, char **argv, dtls_error *err)
{
    const char *mode = NULL;
    bool only_words = false;
    *o = (struct options){.certs = "certs", .level = DTLS_LOG_INFO, .keepalive_ms = 25000, .addrs = argv};
    for (int i = 1, took; i < argc; i += took) {
        took = 1;
        if (!only_words && strcmp(argv[i], "--") == 0)
            only_words = true;
        else if (!only_words && argv[i][0] == '-' && argv[i][1])
            took = option_parse(o, argc, argv, i, err);
        else if (!mode)
            mode = argv[i];
        else
            o->addrs[o->addrs_len++] = argv[i];
        if (took < 0)
            return took;
    }
    return o->help || o->version ? 0 : options_mode(o, modes, mode, err);
}

static bool option_addr(const char *text, dtls_addr *a, dtls_error *err)
{
    if (dtls_addr_parse(a, text, err) != 0)
        return false;
    if (a->port == 0)
        return fail(err, DTLS_ERR_ADDR, "%.100s: the port must be a number from 1 to 65535", text) == 0;
    if (a->family == 6 && a->ip[0] == 0xfe && (a->ip[1] & 0xc0) == 0x80 && !a->scope)
        return fail(err, DTLS_ERR_ADDR, "%.100s: say through which interface, as in [fe80::1%%eth0]:1234", text) == 0;
    return true;
}

/* Pre-shared keys. */

struct key {
    char identity[IDENTITY_BYTES];
    uint8_t bytes[DTLS_PSK_MAX];
    size_t len;
};

struct keys {
    struct key *list;
    size_t len;
};

static void keys_free(struct keys *k)
{
    if (k->list)
        OPENSSL_cleanse(k->list, k->len * sizeof *k->list);
    free(k->list);
    *k = (struct keys){0};
}

static const struct key *keys_find(const struct keys *k, const char *identity)
{
    for (size_t i = 0; i < k->len; i++)
        if (strcmp(k->list[i].identity, identity) == 0)
            return &k->list[i];
    return NULL;
}

/* "IDENTITY:HEX"; an identity may have colons in it, too. False: it is none. */
static bool key_parse(struct key *k, const char *text, size_t n)
{
    size_t colon = n;
    while (colon > 0 && text[colon - 1] != ':')
        colon--;
    size_t digits = n - colon;
    if (colon < 2 || colon > sizeof k->identity || digits < 2 || digits % 2 || digits / 2 > sizeof k->bytes ||
        memchr(text, 0, colon))
        return false;
    memset(k, 0, sizeof *k);
    memcpy(k->identity, text, colon - 1);
    k->len = digits / 2;
    for (size_t i = 0; i < digits; i++) {
        const char *at = strchr("0123456789abcdef", tolower((unsigned char)text[colon + i]));
        if (!at || !*at)
            return false;
        k->bytes[i / 2] |= (uint8_t)((at - "0123456789abcdef") << (i % 2 ? 0 : 4));
    }
    return true;
}

/* where: what to call the text in an error, which must not show the key. */
static int keys_add(struct keys *k, const char *text, size_t n, const char *where, dtls_error *err)
{
    struct key key;
    if (!key_parse(&key, text, n))
        return fail(err, DTLS_ERR_ARG, "%s: not IDENTITY:HEX, with at most %d bytes and %d hexadecimal digits", where,
                    IDENTITY_BYTES - 1, 2 * DTLS_PSK_MAX);
    if (k->len == KEYS_MAX || keys_find(k, key.identity))
        return fail(err, DTLS_ERR_ARG, "%s: %s", where,
                    k->len == KEYS_MAX ? "too many keys" : "this identity has a key already");
    struct key *list = (k->len & (k->len + 1)) == 0 ? malloc(2 * (k->len + 1) * sizeof *list) : k->list;
    if (list && list != k->list) {
        if (k->len)
            memcpy(list, k->list, k->len * sizeof *list);
        size_t len = k->len;
        keys_free(k);
        *k = (struct keys){list, len};
    }
    if (list)
        k->list[k->len++] = key;
    OPENSSL_cleanse(&key, sizeof key);
    return list ? 0 : fail(err, DTLS_ERR_MEMORY, "out of memory");
}

static int keys_read(struct keys *k, const char *file, dtls_error *err)
{
    char line[IDENTITY_BYTES + 2 * DTLS_PSK_MAX + 4], where[PATH_BYTES + 32];
    struct stat st;
    FILE *f = fopen(file, "r");
    int r = f && fstat(fileno(f), &st) == 0 ? 0 : fail(err, DTLS_ERR_SYSTEM, "%.150s: %s", file, strerror(errno));
    if (r == 0 && S_ISDIR(st.st_mode))
        r = fail(err, DTLS_ERR_SYSTEM, "%.150s: %s", file, strerror(EISDIR));
    if (r == 0 && (st.st_mode & (S_IRWXG | S_IRWXO)))
        r = fail(err, DTLS_ERR_ARG, "%.150s: others may read or change it; 'chmod 600' takes that from them", file);
    for (unsigned n = 1; r == 0 && fgets(line, sizeof line, f); n++) {
        size_t len = strcspn(line, "\r\n");
        snprintf(where, sizeof where, "%.150s, line %u", file, n);
        if (!line[len] && !feof(f))
            r = fail(err, DTLS_ERR_ARG, "%s: too long", where);
        else if (len > 0 && line[0] != '#')
            r = keys_add(k, line, len, where, err);
    }
    if (r == 0 && ferror(f))
        r = fail(err, DTLS_ERR_SYSTEM, "%.150s: cannot be read", file);
    OPENSSL_cleanse(line, sizeof line);
    if (f)
        fclose(f);
    return r;
}

static int keys_load(struct keys *k, const struct options *o, dtls_error *err)
{
    int r = 0;
    *k = (struct keys){0};
    for (size_t i = 0; i < o->psk.len && r == 0; i++)
        r = keys_add(k, o->psk.word[i], strlen(o->psk.word[i]), "--psk", err);
    if (r == 0 && o->psk_file)
        r = keys_read(k, o->psk_file, err);
    if (r == 0 && o->key_password && access(o->key_password, R_OK) < 0)
        r = fail(err, DTLS_ERR_SYSTEM, "%.150s: %s", o->key_password, strerror(errno));
    return r;
}

/* What server and client have in common: their endpoint's user begins with it. */

struct program {
    const struct options *options;
    struct keys keys;
    FILE *keylog;
};

static size_t program_psk(void *user, const char *identity, uint8_t key[DTLS_PSK_MAX])
{
    const struct program *p = user;
    const struct key *k = keys_find(&p->keys, identity);
    if (k)
        memcpy(key, k->bytes, k->len);
    return k ? k->len : 0;
}

static bool program_is_called(const dtls_info *info, const struct words *names)
{
    bool is = false;
    for (size_t i = 0; i < names->len; i++) {
        is = is || strcmp(info->peer_name, names->word[i]) == 0;
        for (const char *const *alt = info->peer_alt_names; *alt; alt++) {
            const char *value = strchr(*alt, ':');
            is = is || strcmp(*alt, names->word[i]) == 0 || (value && strcmp(value + 1, names->word[i]) == 0);
        }
    }
    return is;
}

static int program_on_peer(void *user, const dtls_info *info, char *reason, size_t size)
{
    const struct program *p = user;
    const struct options *o = p->options;
    bool denied = program_is_called(info, &o->deny);
    bool bad = denied || (o->allow.len > 0 && !program_is_called(info, &o->allow));
    if (bad)
        snprintf(reason, size, "\"%.80s\" is %s", info->peer_name,
                 denied ? "denied (--deny)" : "not allowed (--allow)");
    return bad;
}

static int program_password(void *user, const char *key, char *password, int size)
{
    const struct program *p = user;
    FILE *f = p->options->key_password ? fopen(p->options->key_password, "r") : NULL;
    (void)key;
    if (!f || !fgets(password, size, f))
        *password = 0;
    if (f)
        fclose(f);
    return (int)strcspn(password, "\r\n");
}

static void program_keylog(void *user, const char *line)
{
    const struct program *p = user;
    fprintf(p->keylog, "%s\n", line);
    fflush(p->keylog);
}

/* What a certificate says, on standard error. */
static void show_certificate(BIO *b, X509 *cert, int number)
{
    char words[REASON_BYTES] = "";
    EVP_PKEY *key = X509_get0_pubkey(cert);
    BIO_printf(b, "certificate %d\n  subject    ", number);
    X509_NAME_print_ex(b, X509_get_subject_name(cert), 0, XN_FLAG_RFC2253 & ~ASN1_STRFLGS_ESC_MSB);
    struct text t = {0};
    GENERAL_NAMES *names = NULL;
    if (alt_names_get(cert, &names) && names) {
        alt_names_put(&t, names, NULL);
        t = (struct text){.to = malloc(t.len + 1)};
        if (t.to)
            alt_names_put(&t, names, NULL);
        for (size_t at = 0; t.to && at < t.len; at += strlen(t.to + at) + 1)
            BIO_printf(b, "\n  name       %s", t.to + at);
        free(t.to);
    }
    GENERAL_NAMES_free(names);
    BIO_printf(b, "\n  issuer     ");
    X509_NAME_print_ex(b, X509_get_issuer_name(cert), 0, XN_FLAG_RFC2253 & ~ASN1_STRFLGS_ESC_MSB);
    BIO_printf(b, "\n  serial     ");
    i2a_ASN1_INTEGER(b, X509_get0_serialNumber(cert));
    BIO_printf(b, "\n  not before ");
    ASN1_TIME_print(b, X509_get0_notBefore(cert));
    BIO_printf(b, "\n  not after  ");
    ASN1_TIME_print(b, X509_get0_notAfter(cert));
    if (key)
        snprintf(words, sizeof words, "%s, %d bits",
                 EVP_PKEY_base_id(key) == EVP_PKEY_EC    ? "EC"
                 : EVP_PKEY_base_id(key) == EVP_PKEY_RSA ? "RSA"
                                                         : OBJ_nid2ln(EVP_PKEY_base_id(key)),
                 EVP_PKEY_bits(key));
    BIO_printf(b, "\n  key        %s\n  signature  %s\n", words, OBJ_nid2ln(X509_get_signature_nid(cert)));
}

/* In place of libssl's own call of X509_verify_cert(). */
static int show_and_verify(X509_STORE_CTX *store, void *user)
{
    BIO *b = BIO_new_fp(stderr, BIO_NOCLOSE);
    STACK_OF(X509) *chain = X509_STORE_CTX_get0_untrusted(store);
    (void)user;
    for (int i = 0; b && i < sk_X509_num(chain); i++)
        show_certificate(b, sk_X509_value(chain, i), i);
    int good = X509_verify_cert(store);
    int error = X509_STORE_CTX_get_error(store);
    if (b && error != X509_V_OK)
        BIO_printf(b, "refused: %s, certificate %d\n", X509_verify_cert_error_string(error),
                   X509_STORE_CTX_get_error_depth(store));
    else if (b)
        BIO_printf(b, "good\n");
    BIO_free(b);
    return good;
}

static int program_show(void *user, SSL_CTX *ctx)
{
    (void)user;
    SSL_CTX_set_cert_verify_callback(ctx, show_and_verify, NULL);
    return 0;
}

/* The files, by option or from the folder. */
struct paths {
    char cert[PATH_BYTES], key[PATH_BYTES], ca[PATH_BYTES];
    dtls_cert also[WORDS_MAX];
    char also_text[WORDS_MAX][PATH_BYTES];
};

static int program_also(struct paths *paths, const struct options *o, dtls_config *cfg, dtls_error *err)
{
    for (size_t i = 0; i < o->also.len; i++) {
        char *text = paths->also_text[i];
        snprintf(text, PATH_BYTES, "%s", o->also.word[i]);
        char *comma = strchr(text, ',');
        if (!comma)
            return fail(err, DTLS_ERR_ARG, "--also %.100s: not CERT,KEY", text);
        *comma = 0;
        paths->also[i] = (dtls_cert){.cert_file = text, .key_file = comma + 1};
    }
    cfg->certs = paths->also;
    cfg->certs_len = o->also.len;
    return 0;
}

/* Where the options leave it open: with pre-shared keys certificates are used if there are any (a server's), or if they are
 * named (a client's). */
static int program_config(const struct program *p, struct paths *paths, dtls_config *cfg, dtls_error *err)
{
    const struct options *o = p->options;
    bool client = o->mode->one_addr, named = o->cert || o->key || o->ca;
    snprintf(paths->cert, PATH_BYTES, "%s/%s.pem", o->certs, o->mode->role);
    snprintf(paths->key, PATH_BYTES, "%s/%s.key", o->certs, o->mode->role);
    snprintf(paths->ca, PATH_BYTES, "%s/ca.pem", o->certs);
    if (client) /* an option of the other mode decides nothing */
        cfg->auth = o->insecure ? DTLS_AUTH_INSECURE : o->no_cert ? DTLS_AUTH_SERVER : DTLS_AUTH_MUTUAL;
    else
        cfg->auth = o->optional_cert ? DTLS_AUTH_OPTIONAL : o->no_client_cert ? DTLS_AUTH_SERVER : DTLS_AUTH_MUTUAL;
    bool keys_only = p->keys.len > 0 && !named && (client || access(paths->cert, F_OK) < 0);
    bool no_ca = !o->ca && access(paths->ca, F_OK) < 0 && (o->insecure || o->no_client_cert);
    cfg->ca_system = o->ca && strcmp(o->ca, "system") == 0;
    if (!keys_only && !(client && (o->no_cert || (o->insecure && !o->cert && access(paths->cert, F_OK) < 0)))) {
        cfg->cert_file = o->cert ? o->cert : paths->cert;
        cfg->key_file = o->key ? o->key : paths->key;
    }
    if (!keys_only && !no_ca && !cfg->ca_system)
        cfg->ca_file = o->ca ? o->ca : paths->ca;
    cfg->crl_file = o->crl;
    cfg->alpn = o->alpn;
    cfg->strict_names = o->strict_names;
    cfg->on_password = o->key_password ? program_password : NULL;
    cfg->on_peer = o->allow.len || o->deny.len ? program_on_peer : NULL;
    cfg->on_keylog = p->keylog ? program_keylog : NULL;
    cfg->on_ssl_ctx = o->show_cert && !keys_only ? program_show : NULL;
    cfg->psk_ccm8 = o->ccm8;
    if (client && p->keys.len) {
        cfg->psk_identity = p->keys.list[0].identity;
        cfg->psk_key = p->keys.list[0].bytes;
        cfg->psk_key_len = p->keys.list[0].len;
    } else if (p->keys.len || o->psk_file) {
        cfg->psk = program_psk;
    }
    cfg->mtu_bytes = o->mtu;
    cfg->cid_bytes = o->cid_bytes;
    return program_also(paths, o, cfg, err);
}

static const char *program_advice(const struct options *o, const struct paths *paths, const char *text)
{
    const char *const files[] = {paths->cert, paths->key, paths->ca};
    bool ours = false; /* it is one of those files that is wrong */
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        ours = ours || (*files[i] && strncmp(text, files[i], strnlen(files[i], 100)) == 0);
    if (!ours || o->cert || o->key || o->ca)
        return "";
    if (strstr(text, "expired"))
        return "; 'make delete-certs certs' makes new ones";
    if (access(paths->cert, F_OK) < 0 || access(paths->key, F_OK) < 0 || access(paths->ca, F_OK) < 0)
        return "; 'make certs' makes a set, --certs names another folder";
    return "";
}

/* NULL after one line that says what to do. */
static dtls_endpoint *program_endpoint(dtls_loop *l, struct program *p, dtls_config *cfg)
{
    struct paths paths;
    const struct options *o = p->options;
    dtls_error err = {.text = ""};
    dtls_endpoint *ep = NULL;
    memset(&paths, 0, sizeof paths);
    int fd = o->keylog ? open(o->keylog, O_WRONLY | O_CREAT | O_APPEND, S_IRUSR | S_IWUSR) : -1;
    if (o->keylog && !(p->keylog = fd < 0 ? NULL : fdopen(fd, "a")))
        fail(&err, DTLS_ERR_SYSTEM, "%.150s: %s", o->keylog, strerror(errno));
    else if (keys_load(&p->keys, o, &err) == 0 && program_config(p, &paths, cfg, &err) == 0)
        ep = dtls_endpoint_new(l, cfg, &err);
    if (!ep)
        fprintf(stderr, "dtls: %s%s\n", err.text, program_advice(o, &paths, err.text));
    return ep;
}

static void program_end(struct program *p)
{
    keys_free(&p->keys);
    if (p->keylog)
        fclose(p->keylog);
}

static bool program_signals(dtls_loop *l, void (*fn)(void *user, int signo), void *user)
{
    return dtls_loop_signal(l, SIGINT, fn, user) == 0 && dtls_loop_signal(l, SIGTERM, fn, user) == 0 &&
           dtls_loop_signal(l, SIGHUP, fn, user) == 0;
}

/* What -v tells at the end. */
static void program_counters(const dtls_endpoint *ep)
{
    dtls_counters n;
    dtls_endpoint_counters(ep, &n);
    fprintf(stderr, "datagrams: %llu in, %llu out; cookies sent: %llu; flights sent again: %llu; socket errors: %llu\n",
            (unsigned long long)n.datagrams_in, (unsigned long long)n.datagrams_out, (unsigned long long)n.cookies_sent,
            (unsigned long long)n.retransmissions, (unsigned long long)n.receive_errors);
    fprintf(stderr,
            "handshakes: %llu full, %llu resumed, %llu failed; moves: %llu; keys tried: %llu, refused: %llu\ndropped:",
            (unsigned long long)n.handshakes_full, (unsigned long long)n.handshakes_resumed,
            (unsigned long long)n.handshakes_failed, (unsigned long long)n.moves, (unsigned long long)n.trials,
            (unsigned long long)n.trials_refused);
    for (int i = 0; i < DTLS_DROP_COUNT; i++)
        fprintf(stderr, "%s %llu %s", i ? "," : "", (unsigned long long)n.dropped[i], dtls_drop_name((dtls_drop)i));
    fputc('\n', stderr);
}

/* The service: a server greets a client with its address; then each message is a command. */

struct message {
    const char *text;
    size_t len;
};

struct command {
    const char *form; /* its name; then, if text must follow, a space and what help calls that text */
    void (*run)(dtls_conn *c, struct message text); /* c has sent it */
    const char *answer;                             /* what its answer begins with; NULL: the text, all of it */
    bool once; /* it may not be sent again where nobody knows whether it arrived: others would see it twice */
};

/* Several lines for one client, in messages of whole lines, each of a size that needs no IP fragmentation. */
struct pager {
    dtls_conn *to; /* it has this as its user pointer; NULL: it is gone */
    char page[DTLS_MESSAGE_MAX];
    size_t len;
};

static void service_send(dtls_conn *c, struct message m)
{
    dtls_conn_send(c, m.text, m.len); /* a full queue loses it, as the network may */
}

static void service_send_peer(dtls_conn *c, const char *before)
{
    char text[DTLS_ADDR_TEXT + 16], addr[DTLS_ADDR_TEXT];
    dtls_info info;
    dtls_conn_info(c, &info);
    snprintf(text, sizeof text, "%s%s", before, dtls_addr_format(&info.peer, addr, sizeof addr));
    service_send(c, (struct message){text, strlen(text)});
}

static void pager_flush(struct pager *p)
{
    if (p->to)
        service_send(p->to, (struct message){p->page, p->len});
    p->len = 0;
}

static void pager_add(struct pager *p, const char *line, size_t len)
{
    if (p->len > 0 && (!p->to || p->len + 1 + len > dtls_conn_payload_max(p->to)))
        pager_flush(p);
    if (p->len > 0)
        p->page[p->len++] = '\n';
    memcpy(p->page + p->len, line, len);
    p->len += len;
}

/* For a command that did not get its memory, or its turn among all the others that are under way. */
static void service_send_busy(dtls_conn *c)
{
    service_send(c, (struct message){"busy, try again", 15});
}

static void command_ping(dtls_conn *c, struct message text)
{
    (void)text;
    service_send(c, (struct message){"pong", 4});
}

static void command_whoami(dtls_conn *c, struct message text)
{
    (void)text;
    service_send_peer(c, "");
}

/* One line for each client; at last, without one, it is sent. */
static void command_stats_line(dtls_conn *c, void *user)
{
    char line[512], addr[DTLS_ADDR_TEXT], moved[40] = "";
    struct pager *p = user;
    dtls_info i;
    if (!c) {
        pager_flush(p);
        if (p->to)
            dtls_conn_set_user(p->to, NULL);
        free(p);
        return;
    }
    dtls_conn_info(c, &i);
    if (i.moves > 0)
        snprintf(moved, sizeof moved, i.moves == 1 ? ", moved once" : ", moved %u times", i.moves);
    int n =
        snprintf(line, sizeof line, "%s %s, %lld s, in %llu messages %llu bytes, out %llu messages %llu bytes%s%s",
                 dtls_addr_format(&i.peer, addr, sizeof addr), i.peer_name, (long long)(i.age_ms / 1000),
                 (unsigned long long)i.messages_in, (unsigned long long)i.bytes_in, (unsigned long long)i.messages_out,
                 (unsigned long long)i.bytes_out, i.resumed ? ", resumed" : "", moved);
    pager_add(p, line, (size_t)n);
}

static void command_stats(dtls_conn *c, struct message text)
{
    struct pager *p = dtls_conn_user(c) ? NULL : calloc(1, sizeof *p);
    char line[64];
    dtls_counters n;
    (void)text;
    dtls_endpoint_counters(dtls_conn_endpoint(c), &n);
    if (p) {
        p->to = c;
        dtls_conn_set_user(c, p);
        pager_add(p, line, (size_t)snprintf(line, sizeof line, "users: %zu", n.conns - n.handshakes));
    }
    if (p && dtls_endpoint_walk(dtls_conn_endpoint(c), command_stats_line, p) == 0)
        return;
    if (p)
        dtls_conn_set_user(c, NULL);
    free(p);
    service_send_busy(c);
}

static void command_bc_one(dtls_conn *c, void *user)
{
    struct message *m = user;
    if (c)
        service_send(c, *m);
    else
        free(m);
}

/* The text is kept behind the message, since those who are last get it some turns later. */
static void command_bc(dtls_conn *c, struct message text)
{
    struct message *m = malloc(sizeof *m + text.len);
    if (m) {
        memcpy(m + 1, text.text, text.len);
        *m = (struct message){(const char *)(m + 1), text.len};
    }
    if (m && dtls_endpoint_walk(dtls_conn_endpoint(c), command_bc_one, m) == 0)
        return;
    free(m);
    service_send_busy(c);
}

static const struct command commands[] = {
    {.form = "ping", .run = command_ping, .answer = "pong"},
    {.form = "echo TEXT", .run = service_send},
    {.form = "whoami", .run = command_whoami, .answer = ""},      /* the client's address */
    {.form = "stats", .run = command_stats, .answer = "users: "}, /* the clients and their traffic, in lines */
    {.form = "bc TEXT", .run = command_bc, .once = true},         /* the text, to every client */
    {.form = NULL}};

static const char commands_intro[] = "commands: "; /* the answer to what is none */

static void commands_list(char *list, size_t size)
{
    for (const struct command *command = commands; command->form; command++)
        text_append(list, size, ", ", command->form);
}

/* NULL: no command. One newline at the end does not count: line tools such as s_client send it along. */
static const struct command *command_parse(const char *data, size_t len, struct message *text)
{
    if (len > 0 && data[len - 1] == '\n')
        len--;
    if (len > 0 && data[len - 1] == '\r')
        len--;
    *text = (struct message){NULL, 0};
    for (const struct command *command = commands; command->form; command++) {
        size_t n = strcspn(command->form, " ");
        bool takes_text = command->form[n] == ' ';
        if (len < n || memcmp(data, command->form, n) != 0)
            continue;
        if (takes_text && len > n + 1 && data[n] == ' ')
            *text = (struct message){data + n + 1, len - n - 1};
        if (takes_text ? text->len > 0 : len == n)
            return command;
    }
    return NULL;
}

/* For the client: whether that may be the answer to this. */
static bool command_is_answer(const char *line, size_t line_len, const char *data, size_t len)
{
    struct message text;
    const struct command *command = command_parse(line, line_len, &text);
    const char *begins = command ? command->answer : commands_intro;
    if (begins)
        return len >= strlen(begins) && memcmp(data, begins, strlen(begins)) == 0;
    return len == text.len && memcmp(data, text.text, len) == 0;
}

static bool command_may_repeat(const char *line, size_t len)
{
    struct message text;
    const struct command *command = command_parse(line, len, &text);
    return !command || !command->once;
}

static void service_event(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    char list[LIST_BYTES];
    size_t start = (size_t)snprintf(list, sizeof list, "%s", commands_intro);
    struct message text;
    if (event == DTLS_EV_CONNECTED)
        service_send_peer(c, "hello, ");
    struct pager *pager = event == DTLS_EV_CLOSED ? dtls_conn_user(c) : NULL;
    if (pager)
        pager->to = NULL;
    if (event != DTLS_EV_MESSAGE)
        return;
    const struct command *command = command_parse(data, len, &text);
    if (command) {
        command->run(c, text);
    } else {
        commands_list(list + start, sizeof list - start);
        service_send(c, (struct message){list, strlen(list)});
    }
}

/* The server. */

struct server {
    struct program program;
    dtls_loop *loop;
    dtls_endpoint *ep;
    dtls_timer *timer; /* the next look at certificates that expire */
};

static void server_log(void *user, dtls_log level, const char *line)
{
    const struct server *s = user;
    if (level <= s->program.options->level)
        fprintf(stderr, "%s\n", line);
}

/* A line for each certificate in the file that has not long to live. */
static void server_look_at(struct server *s, const char *file)
{
    char line[PATH_BYTES + 64];
    FILE *f = file ? fopen(file, "r") : NULL;
    for (X509 *cert; f && (cert = PEM_read_X509(f, NULL, NULL, NULL)) != NULL; X509_free(cert)) {
        int days = 0, seconds = 0;
        if (ASN1_TIME_diff(&days, &seconds, NULL, X509_get0_notAfter(cert)) != 1 || days >= EXPIRY_DAYS)
            continue;
        snprintf(line, sizeof line, "%s: a certificate in it %s %d days", file,
                 days < 0 ? "expired, for" : "expires in", days < 0 ? -days : days);
        server_log(s, DTLS_LOG_WARNING, line);
    }
    errors_clear();
    if (f)
        fclose(f);
}

/* A line for each revocation list that is too old: all peers of its CA are refused. */
static void server_look_at_lists(struct server *s, const char *file)
{
    char line[PATH_BYTES + 100];
    FILE *f = file ? fopen(file, "r") : NULL;
    for (X509_CRL *crl; f && (crl = PEM_read_X509_CRL(f, NULL, NULL, NULL)) != NULL; X509_CRL_free(crl)) {
        const ASN1_TIME *next = X509_CRL_get0_nextUpdate(crl);
        if (!next || !time_is_past(next))
            continue;
        snprintf(line, sizeof line, "%s: a revocation list in it is too old, and the peers of its CA are refused",
                 file);
        server_log(s, DTLS_LOG_WARNING, line);
    }
    errors_clear();
    if (f)
        fclose(f);
}

static void server_look(void *user)
{
    struct server *s = user;
    struct paths paths;
    dtls_config cfg = {0};
    dtls_error err;
    memset(&paths, 0, sizeof paths);
    if (program_config(&s->program, &paths, &cfg, &err) < 0)
        return;
    server_look_at(s, cfg.cert_file);
    server_look_at(s, cfg.ca_file);
    server_look_at_lists(s, cfg.crl_file);
    for (size_t i = 0; i < cfg.certs_len; i++)
        server_look_at(s, cfg.certs[i].cert_file);
    dtls_timer_set(s->timer, EXPIRY_LOOK_MS);
}

/* What systemd wants to hear, sd_notify(3). Nobody else listens. */
static void server_notify(const char *format, long long value)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    char text[128];
    int fd = path && strlen(path) < sizeof to.sun_path ? socket(AF_UNIX, SOCK_DGRAM, 0) : -1;
    if (fd < 0)
        return;
    snprintf(to.sun_path, sizeof to.sun_path, "%s", path);
    socklen_t len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path));
    if (to.sun_path[0] == '@') /* an abstract one */
        to.sun_path[0] = 0;
    snprintf(text, sizeof text, format, value);
    if (sendto(fd, text, strlen(text), 0, (struct sockaddr *)&to, len) < 0)
        fprintf(stderr, "dtls: %s: %s\n", path, strerror(errno));
    close(fd);
}

static void server_reload(void *user, int signo)
{
    struct server *s = user;
    struct paths paths;
    struct program next = {.options = s->program.options, .keylog = s->program.keylog};
    dtls_config cfg = {.user = s};
    dtls_error err;
    char line[400];
    (void)signo;
    memset(&paths, 0, sizeof paths);
    server_notify("RELOADING=1\nMONOTONIC_USEC=%lld", (long long)clock_monotonic_us(NULL));
    if (keys_load(&next.keys, next.options, &err) < 0 || program_config(&next, &paths, &cfg, &err) < 0 ||
        dtls_endpoint_reload(s->ep, &cfg, &err) < 0) {
        keys_free(&next.keys);
        snprintf(line, sizeof line, "not reloaded: %s", err.text);
        server_log(s, DTLS_LOG_ERROR, line);
    } else {
        keys_free(&s->program.keys);
        s->program.keys = next.keys;
        server_log(s, DTLS_LOG_INFO, "reloaded");
        if (next.options->recheck)
            dtls_endpoint_recheck(s->ep);
        server_look(s);
    }
    server_notify("READY=1", 0);
}

static void server_stop(void *user, int signo)
{
    struct server *s = user;
    (void)signo;
    dtls_loop_stop(s->loop);
}

static int addr_by_wildcard(const void *a, const void *b)
{
    return addr_is_wildcard(b) - addr_is_wildcard(a);
}

/* Wildcards first: then what they cover is skipped, not refused as in use. */
static int server_listen(dtls_endpoint *ep, dtls_addr *addrs, int n)
{
    char text[DTLS_ADDR_TEXT], line[DTLS_ADDR_TEXT + 64];
    dtls_error err;
    qsort(addrs, (size_t)n, sizeof *addrs, addr_by_wildcard);
    for (int i = 0; i < n; i++) {
        int r = dtls_endpoint_listen(ep, &addrs[i], &err);
        if (r < 0) {
            bool used = strstr(err.text, strerror(EADDRINUSE)) != NULL;
            fprintf(stderr, "dtls: %s%s\n", err.text,
                    used ? "; another program has this port: use another or stop it" : "");
            return 1;
        }
        snprintf(line, sizeof line, r ? "skipped %s: an address given before covers it" : "listening on %s",
                 dtls_addr_format(&addrs[i], text, sizeof text));
        server_log(dtls_endpoint_user(ep), r ? DTLS_LOG_WARNING : DTLS_LOG_INFO, line);
    }
    return 0;
}

static int server_run(struct server *s, dtls_addr *addrs)
{
    const struct options *o = s->program.options;
    dtls_config cfg = {.on_event = service_event, .on_log = server_log, .user = s};
    cfg.idle_timeout_ms = o->idle_timeout_ms;
    cfg.max_conns = o->max_clients;
    /* A signal still ends us while the certificates are read: any of those files may block for ever. */
    s->ep = program_endpoint(s->loop, &s->program, &cfg);
    s->timer = s->ep ? dtls_timer_new(s->loop, server_look, s) : NULL;
    if (!s->timer || !program_signals(s->loop, server_stop, s) ||
        dtls_loop_signal(s->loop, SIGHUP, server_reload, s) != 0 || server_listen(s->ep, addrs, o->addrs_len) != 0)
        return 1;
    server_look(s);
    server_notify("READY=1", 0);
    int status = dtls_loop_run(s->loop) == 0 ? 0 : complain(1, strerror(errno));
    server_notify("STOPPING=1", 0);
    if (o->level == DTLS_LOG_DEBUG)
        program_counters(s->ep);
    return status;
}

static int server_main(struct options *o)
{
    struct server s = {.program.options = o};
    dtls_error err;
    dtls_addr *addrs = calloc((size_t)o->addrs_len, sizeof *addrs);
    for (int i = 0; addrs && i < o->addrs_len; i++) {
        if (!option_addr(o->addrs[i], &addrs[i], &err)) {
            free(addrs);
            return complain(EXIT_USAGE, err.text);
        }
    }
    s.loop = addrs ? dtls_loop_new(NULL) : NULL;
    int status = s.loop ? server_run(&s, addrs) : complain(1, strerror(errno));
    dtls_loop_free(s.loop);
    program_end(&s.program);
    free(addrs);
    return status;
}

/* The editor: libedit in the loop. It reads whole keys from our buffer, never from the terminal, so it never blocks. */

/* Whom the editor and the line input hand their lines; their owner fills it in. */
struct sink {
    int (*send)(void *user, const char *line, size_t len); /* as dtls_conn_send() */
    void (*end)(void *user);                               /* no more lines come */
    void (*say)(void *user, dtls_log level, const char *line);
    void *user;
};

struct editor {
    struct sink sink;
    EditLine *el;
    HistoryW *history;
    struct termios saved; /* the terminal's settings, as they were found */
    bool hidden;          /* neither prompt nor line is on the screen */
    wchar_t *kept;        /* the typed line while hidden */
    int kept_cursor;
    unsigned char in[INPUT_BYTES];
    size_t in_len, key, key_end; /* in[key, key_end) is being fed */
    bool ended;                  /* by ^D on an empty line, or with the terminal */
};

static struct editor *editor_of(EditLine *el)
{
    void *e = NULL;
    el_get(el, EL_CLIENTDATA, &e);
    return e;
}

static wchar_t *editor_prompt(EditLine *el)
{
    static wchar_t none[] = L"", prompt[] = L"> ";
    return editor_of(el)->hidden ? none : prompt;
}

static int editor_getc(EditLine *el, wchar_t *wc)
{
    struct editor *e = editor_of(el);
    mbstate_t state = {0};
    if (e->key >= e->key_end)
        return 0; /* no more: el_wgets() returns */
    size_t n = mbrtowc(wc, (char *)e->in + e->key, e->key_end - e->key, &state);
    if (n == (size_t)-1 || n == (size_t)-2) {
        *wc = 0xfffd;
        n = 1;
    }
    e->key += n ? n : 1;
    return 1;
}

/* Bytes of the first whole key; 0: not all there yet. */
static size_t editor_key_length(const unsigned char *p, size_t n)
{
    if (p[0] != 27) {
        size_t need = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : p[0] >= 0xc2 ? 2 : 1, i = 1;
        while (i < need && i < n && (p[i] & 0xc0) == 0x80)
            i++;
        return i == need ? need : i < n ? 1 : 0; /* 1: what begins like a character, but is none */
    }
    if (n == 1)
        return 0; /* a lone ESC is the start of something: no timeout guesses otherwise */
    if (p[1] == 27)
        return 1;
    if (p[1] == 'O')
        return n < 3 ? 0 : 3;
    if (p[1] != '[')
        return 2;
    for (size_t i = 2; i < n; i++)
        if (p[i] >= 0x40 && p[i] <= 0x7e)
            return i + 1;
    return n > 64 ? n : 0;
}

/* Function keys and the marks around a paste, ESC [ and at least two digits: libedit knows none and would type their
 * tail. */
static bool editor_unknown_key(const unsigned char *p, size_t n)
{
    return n > 4 && p[0] == 27 && p[1] == '[' && p[n - 1] == '~' && isdigit(p[2]) && isdigit(p[3]);
}

/* An editor command that empties line and prompt, so that libedit itself erases exactly what it drew. editor_hide()
 * calls it by a key that no keyboard has. */
static unsigned char editor_erase(EditLine *el, wint_t c)
{
    struct editor *e = editor_of(el);
    const LineInfoW *li = el_wline(el);
    int n = (int)(li->lastchar - li->buffer);
    (void)c;
    e->kept = calloc((size_t)n + 1, sizeof *e->kept);
    e->kept_cursor = e->kept ? (int)(li->cursor - li->buffer) : 0;
    if (e->kept)
        wmemcpy(e->kept, li->buffer, (size_t)n);
    el_cursor(el, n);
    el_deletestr(el, n);
    e->hidden = true;
    return CC_REFRESH;
}

static void editor_hide(struct editor *e)
{
    int n;
    if (e->hidden)
        return;
    el_wpush(e->el, L"\033[9999~");
    el_wgets(e->el, &n);
}

static void editor_show(struct editor *e)
{
    if (!e->hidden)
        return;
    e->hidden = false;
    if (e->kept) {
        el_winsertstr(e->el, e->kept);
        el_cursor(e->el, e->kept_cursor - el_cursor(e->el, 0));
    }
    free(e->kept);
    e->kept = NULL;
    el_set(e->el, EL_REFRESH);
}

/* A message above the line being typed. Control characters would let whoever sent it draw on the terminal. */
static void editor_say(struct editor *e, const char *text, size_t len)
{
    bool was_hidden = e->hidden;
    editor_hide(e);
    for (size_t i = 0, n; i < len; i += n) {
        mbstate_t state = {0};
        wchar_t wc = 0;
        n = mbrtowc(&wc, text + i, len - i, &state);
        bool whole = n != (size_t)-1 && n != (size_t)-2 && n != 0;
        n = whole ? n : 1;
        if (whole && (iswprint((wint_t)wc) || wc == L'\n' || wc == L'\t'))
            fwrite(text + i, 1, n, stdout);
        else
            for (size_t k = i; k < i + n; k++)
                printf("\\x%02x", (unsigned char)text[k]);
    }
    putchar('\n');
    fflush(stdout);
    if (!was_hidden)
        editor_show(e);
}

static void editor_send(struct editor *e, const char *line, size_t len)
{
    char text[64];
    int r = e->sink.send(e->sink.user, line, len);
    const char *why = r == DTLS_ERR_STATE ? "not connected: not sent" : dtls_strerror(r);
    snprintf(text, sizeof text, "%zu bytes, more than %d: not sent", len, DTLS_MESSAGE_MAX);
    why = r == DTLS_ERR_SIZE ? text : why;
    if (r != 0)
        editor_say(e, why, strlen(why));
}

/* A new empty line, the terminal's settings untouched. */
static void editor_fresh(struct editor *e)
{
    el_set(e->el, EL_EDITMODE, 0);
    el_set(e->el, EL_UNBUFFERED, 0);
    el_set(e->el, EL_EDITMODE, 1);
    el_set(e->el, EL_UNBUFFERED, 1);
}

static void editor_entered(struct editor *e, const wchar_t *wide, int n)
{
    HistEventW ev;
    wchar_t *line = calloc((size_t)n, sizeof *line); /* n counts the newline: room for the end */
    if (!line)
        return;
    wmemcpy(line, wide, (size_t)n - 1);
    size_t bytes = wcstombs(NULL, line, 0);
    char *text = bytes != (size_t)-1 ? malloc(bytes + 1) : NULL;
    if (text && bytes > 0) {
        wcstombs(text, line, bytes + 1);
        history_w(e->history, &ev, H_ENTER, line);
    }
    editor_fresh(e);
    if (text && bytes > 0)
        editor_send(e, text, bytes);
    free(text);
    free(line);
}

/* Whether the prompt and the line take more than one row. */
static bool editor_wraps(struct editor *e)
{
    struct winsize size;
    int width = 2;
    const LineInfoW *li = el_wline(e->el);
    for (const wchar_t *p = li->buffer; p < li->lastchar; p++)
        width += wcwidth(*p) > 0 ? wcwidth(*p) : 1;
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 && width >= size.ws_col;
}

static void editor_feed(struct editor *e)
{
    size_t at = 0, len;
    while (at < e->in_len && !e->ended && (len = editor_key_length(e->in + at, e->in_len - at)) != 0) {
        const LineInfoW *li = el_wline(e->el);
        e->ended = e->in[at] == 4 && li->lastchar == li->buffer; /* ^D on an empty line */
        e->key = at;
        at = e->key_end = at + len;
        if (e->ended || editor_unknown_key(e->in + e->key, len))
            continue;
        int n = 0;
        bool wrapped = editor_wraps(e);
        const wchar_t *line = el_wgets(e->el, &n);
        if (line && n > 0 && line[n - 1] == L'\n') {
            editor_entered(e, line, n);
        } else if (wrapped || editor_wraps(e)) { /* libedit's updates go wrong across rows: draw it whole */
            editor_hide(e);
            editor_show(e);
        }
    }
    memmove(e->in, e->in + at, e->in_len - at);
    e->in_len -= at;
    e->key = e->key_end = 0;
    if (e->ended)
        e->sink.end(e->sink.user);
}

static void editor_readable(void *user, int fd, unsigned events)
{
    struct editor *e = user;
    (void)events;
    ssize_t n = read(fd, e->in + e->in_len, sizeof e->in - e->in_len); /* one read of a readable terminal */
    if (n > 0) {
        e->in_len += (size_t)n;
        editor_feed(e);
    } else if (n == 0 || (errno != EINTR && errno != EAGAIN)) {
        e->ended = true;
        e->sink.end(e->sink.user);
    }
}

static void editor_resize(void *user, int signo)
{
    struct editor *e = user;
    (void)signo;
    editor_hide(e);
    el_resize(e->el);
    editor_show(e);
}

/* ^Z: give the terminal back, stop for real, take it again. */
static void editor_suspend(void *user, int signo)
{
    struct editor *e = user;
    editor_hide(e);
    el_set(e->el, EL_PREP_TERM, 0);
    raise(SIGSTOP);
    el_set(e->el, EL_PREP_TERM, 1);
    editor_resize(e, signo);
}

static bool editor_open(struct editor *e)
{
    /* Left out: keys that would read further keys inside the command, and those that are signals. */
    static const char *const unbound[] = {"^V", "^R", "^S", "^Q", "^Z", "^C", "^O", "\\ex", "\\eX"};
    HistEventW ev;
    setlocale(LC_CTYPE, "");
    if (MB_CUR_MAX == 1 && !setlocale(LC_CTYPE, "C.UTF-8"))
        setlocale(LC_CTYPE, "UTF-8"); /* macOS */
    if (tcgetattr(STDIN_FILENO, &e->saved) < 0 || !(e->history = history_winit()))
        return false;
    e->el = el_init("dtls", stdin, stdout, stderr);
    if (!e->el) {
        history_wend(e->history);
        return false;
    }
    history_w(e->history, &ev, H_SETSIZE, 500);
    history_w(e->history, &ev, H_SETUNIQUE, 1); /* the same line twice in a row is kept once */
    el_set(e->el, EL_CLIENTDATA, e);
    el_set(e->el, EL_SIGNAL, 0);
    el_set(e->el, EL_SETTY, "-d", "-ixon", NULL); /* ^S would stop the terminal, and with it our writes */
    el_wset(e->el, EL_GETCFN, editor_getc);
    el_wset(e->el, EL_PROMPT, editor_prompt);
    el_set(e->el, EL_EDITOR, "emacs");
    el_wset(e->el, EL_HIST, history_w, e->history);
    el_wset(e->el, EL_ADDFN, L"dtls-erase", L"erase the line for a message", editor_erase);
    el_set(e->el, EL_BIND, "\\e[9999~", "dtls-erase", NULL);
    for (size_t i = 0; i < sizeof unbound / sizeof *unbound; i++)
        el_set(e->el, EL_BIND, unbound[i], "ed-unassigned", NULL);
    el_set(e->el, EL_UNBUFFERED, 1); /* raw mode and the first prompt */
    return true;
}

static bool editor_watch(struct editor *e, dtls_loop *l)
{
    /* macOS does not watch /dev/tty, if that is our input; the output is the same terminal. */
    return (dtls_watch_new(l, STDIN_FILENO, DTLS_READ, editor_readable, e) ||
            dtls_watch_new(l, STDOUT_FILENO, DTLS_READ, editor_readable, e)) &&
           dtls_loop_signal(l, SIGWINCH, editor_resize, e) == 0 && dtls_loop_signal(l, SIGTSTP, editor_suspend, e) == 0;
}

static void editor_close(struct editor *e)
{
    editor_hide(e);
    free(e->kept);
    el_set(e->el, EL_PREP_TERM, 0);
    el_end(e->el);
    history_wend(e->history);
    tcsetattr(STDIN_FILENO, TCSADRAIN, &e->saved);
}

/* Line input: standard input that is no terminal, a message from each line. Only some lines at a time may wait for their
 * answers, so that a long file does not flood the network; the end waits for the last answers. Lines are kept until then:
 * where the server was started again meanwhile, they are sent once more, or the user hears which may be lost. */

struct kept {
    struct kept *next;
    unsigned long number;
    size_t len;
    char text[];
};

struct lines {
    struct sink sink;  /* send: DTLS_ERR_AGAIN if the line has to wait */
    bool going;        /* the owner clears what lines_start() set: nothing is read or sent any more */
    bool ended;        /* nothing more to read */
    int status;        /* 1: not everything could be read and sent */
    dtls_watch *watch; /* NULL: a file, which is always readable */
    dtls_timer *timer; /* for a line that waits, for the end, for an input without a watch */
    char in[INPUT_BYTES], line[DTLS_MESSAGE_MAX];
    size_t in_at, in_len, line_len; /* line_len may count beyond what is kept */
    bool line_ready;                /* the line is whole, and not sent yet */
    unsigned long count;            /* whole lines so far */
    unsigned window, owed;          /* lines not answered: since the last pause, and those kept: */
    struct kept *kept, **kept_last; /* from the first to the last; */
    struct kept *again;             /* from here on they have to be sent again */
    unsigned long forgotten;        /* lines not answered before them; too many to be kept */
    int linger_ms, linger_least_ms; /* the wait at the end, 0 before; a round trip: no answer could come sooner */
};

/* Messages that others broadcast pass for answers and must not keep us: the wait only ever gets shorter. */
static void lines_linger(struct lines *l)
{
    int ms = l->owed ? LINGER_OWED_MS : l->linger_least_ms;
    if (l->count == 0) {
        l->sink.end(l->sink.user);
    } else if (l->linger_ms == 0 || ms < l->linger_ms) {
        l->linger_ms = ms;
        dtls_timer_set(l->timer, ms);
    }
}

static void lines_forget(struct lines *l, struct kept **at)
{
    struct kept *k = *at;
    *at = k->next;
    if (!*at)
        l->kept_last = at;
    if (l->again == k)
        l->again = k->next;
    l->owed--;
    free(k);
}

static void lines_keep(struct lines *l, const char *text, size_t len)
{
    struct kept *k = l->owed < KEPT_LINES ? malloc(sizeof *k + len) : NULL;
    if (!k) {
        l->forgotten += 1 + l->owed;
        while (l->kept)
            lines_forget(l, &l->kept);
        return;
    }
    *k = (struct kept){.number = l->count, .len = len};
    memcpy(k->text, text, len);
    *l->kept_last = k;
    l->kept_last = &k->next;
    l->owed++;
}

static bool kept_any(const struct kept *k)
{
    return k != NULL;
}

static bool kept_must_not_repeat(const struct kept *k)
{
    return k && !command_may_repeat(k->text, k->len);
}

/* Says which lines may be lost, and forgets them. */
static void lines_lost(struct lines *l, dtls_log level, bool (*is_lost)(const struct kept *k))
{
    char text[LIST_BYTES] = "", part[64], line[2 * LIST_BYTES];
    unsigned long n = l->forgotten;
    for (struct kept **at = &l->kept; *at;) {
        unsigned long first = (*at)->number, last = first;
        if (!is_lost(*at)) {
            at = &(*at)->next;
            continue;
        }
        for (; is_lost(*at) && (*at)->number <= last + 1; n++) {
            last = (*at)->number;
            lines_forget(l, at);
        }
        snprintf(part, sizeof part, first == last ? "%lu" : "%lu to %lu", first, last);
        text_append(text, sizeof text - sizeof part, ", ", part); /* a longer list is cut */
    }
    if (n == 0)
        return;
    snprintf(line, sizeof line, "dtls: %lu of %lu lines had no answer%s%s", n, l->count, *text ? ": " : "", text);
    l->forgotten = 0;
    l->sink.say(l->sink.user, level, line);
}

/* The server is another one now, or may be. What it did not answer goes out once more, where it is our service and that does
 * no harm. */
static void lines_repeat(struct lines *l, bool ours)
{
    unsigned owed = l->owed;
    lines_lost(l, DTLS_LOG_ERROR, ours ? kept_must_not_repeat : kept_any);
    l->status = l->owed < owed ? 1 : l->status;
    l->again = l->kept;
    l->window = 0;
    l->linger_ms = 0;
}

static bool lines_send_again(struct lines *l)
{
    for (; l->again; l->again = l->again ? l->again->next : NULL) /* the end of the connection forgets them all */
        if (l->sink.send(l->sink.user, l->again->text, l->again->len) == DTLS_ERR_AGAIN)
            return false;
    return true;
}

/* False: the line has to wait. */
static bool lines_send(struct lines *l)
{
    if (l->line_len > DTLS_MESSAGE_MAX) {
        fprintf(stderr, "dtls: line %lu is %zu bytes, more than %d: not sent\n", l->count, l->line_len,
                DTLS_MESSAGE_MAX);
        l->status = 1;
    } else if (l->line_len > 0) {
        if (l->window >= WINDOW_LINES || l->sink.send(l->sink.user, l->line, l->line_len) == DTLS_ERR_AGAIN)
            return false;
        l->window++;
        lines_keep(l, l->line, l->line_len);
    }
    l->line_ready = false;
    l->line_len = 0;
    return true;
}

/* Takes bytes up to the end of the line; false: it has not come yet. */
static bool lines_take(struct lines *l)
{
    const char *start = l->in + l->in_at;
    size_t left = l->in_len - l->in_at;
    const char *end = memchr(start, '\n', left);
    size_t n = end ? (size_t)(end - start) : left;
    size_t room = l->line_len < DTLS_MESSAGE_MAX ? DTLS_MESSAGE_MAX - l->line_len : 0;
    memcpy(l->line + DTLS_MESSAGE_MAX - room, start, n < room ? n : room);
    l->line_len += n;
    l->in_at += n + (end != NULL);
    l->line_ready = end || (l->ended && l->line_len > 0); /* the last line may have no newline */
    l->count += l->line_ready;
    return l->line_ready;
}

/* Sends what it can, and sees to it that the rest follows. */
static void lines_pump(struct lines *l)
{
    bool waits = !l->going || !lines_send_again(l);
    while (l->going && !waits && (l->line_ready || lines_take(l)))
        waits = !lines_send(l);
    if (!l->going)
        return;
    if (l->watch)
        dtls_watch_set(l->watch, waits || l->ended ? 0 : DTLS_READ);
    if (waits)
        dtls_timer_set(l->timer, PACE_MS);
    else if (l->ended)
        lines_linger(l);
    else if (!l->watch)
        dtls_timer_set(l->timer, 0);
}

static void lines_readable(void *user, int fd, unsigned events)
{
    struct lines *l = user;
    ssize_t n = read(fd, l->in, sizeof l->in);
    (void)events;
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (n < 0)
        l->status = complain(1, "standard input cannot be read");
    l->ended = n <= 0;
    l->in_at = 0;
    l->in_len = n > 0 ? (size_t)n : 0;
    lines_pump(l);
}

/* Some of what cannot be watched may block all the same: on macOS a named pipe, /dev/tty. */
static bool lines_input_ready(void)
{
    struct timeval none = {0};
    fd_set set;
    FD_ZERO(&set);
    FD_SET(STDIN_FILENO, &set);
    return select(STDIN_FILENO + 1, &set, NULL, NULL, &none) != 0; /* an error is read()'s to tell */
}

static void lines_timer(void *user)
{
    struct lines *l = user;
    if (!l->going)
        return;
    if (l->line_ready || l->again) {
        l->window = 0; /* a server that does not answer each line holds nothing up */
        lines_pump(l);
    } else if (l->ended) {
        l->sink.end(l->sink.user);
    } else if (lines_input_ready()) {
        lines_readable(l, STDIN_FILENO, DTLS_READ);
    } else {
        dtls_timer_set(l->timer, LOOK_MS);
    }
}

/* Our service's answer is that to a line which it fits; what fits none was somebody's broadcast. */
static void lines_answered(struct lines *l, bool ours, const char *data, size_t len)
{
    struct kept **at = &l->kept;
    while (*at && ours && !command_is_answer((*at)->text, (*at)->len, data, len))
        at = &(*at)->next;
    l->window -= l->window > 0;
    if (*at)
        lines_forget(l, at);
    lines_pump(l);
}

/* From now on send works, and an answer may take so long. */
static void lines_start(struct lines *l, int64_t round_trip_ms)
{
    int64_t ms = round_trip_ms < LINGER_MS ? LINGER_MS : round_trip_ms;
    l->linger_least_ms = ms < LINGER_OWED_MS ? (int)ms : LINGER_OWED_MS;
    l->going = true;
    lines_pump(l);
}

/* The input is watched, unless the system refuses, as it does files and /dev/null: some of it only when asked to. */
static bool lines_open(struct lines *l, dtls_loop *loop)
{
    l->kept_last = &l->kept;
    l->timer = dtls_timer_new(loop, lines_timer, l);
    l->watch = dtls_watch_new(loop, STDIN_FILENO, 0, lines_readable, l);
    if (l->watch && (dtls_watch_set(l->watch, DTLS_READ) != 0 || dtls_watch_set(l->watch, 0) != 0)) {
        dtls_watch_free(l->watch);
        l->watch = NULL;
    }
    return l->timer != NULL;
}

static void lines_close(struct lines *l)
{
    while (l->kept)
        lines_forget(l, &l->kept);
}

/* Calling the server: again after a while, if that failed or the connection was lost. */

struct call {
    dtls_endpoint *ep; /* the owner's; it passes on what becomes of the connection */
    dtls_timer *timer; /* calls call_go() for another round */
    bool stopped;      /* the owner sets it: nobody is called any more, and nothing reported */
    const char *host, *name;
    dtls_conn *conn;       /* NULL: none now */
    bool connected;        /* it is */
    SSL_SESSION *session;  /* to resume */
    int64_t round_trip_us; /* of the connection before */
    int backoff_ms;        /* the last wait; 0: none since a connection */
    char why[REASON_BYTES];
    void (*failed)(void *user); /* the time for call_later() */
    void *user;
};

static void call_go(void *user)
{
    struct call *d = user;
    dtls_error err;
    dtls_target t = {.host = d->host, .name = d->name, .session = d->session, .round_trip_us = d->round_trip_us};
    if (d->conn || d->stopped)
        return;
    d->conn = dtls_endpoint_connect(d->ep, &t, &err);
    if (d->conn)
        return;
    const char *reason = strstr(err.text, ": "); /* behind the address, which is told anyway */
    snprintf(d->why, sizeof d->why, "%.150s", reason ? reason + 2 : err.text);
    d->failed(d->user);
}

/* Another round after a while, longer each time; returns the milliseconds. */
static int call_later(struct call *d)
{
    d->backoff_ms = d->backoff_ms == 0 ? BACKOFF_FIRST_MS : d->backoff_ms * 2;
    d->backoff_ms = d->backoff_ms < BACKOFF_MAX_MS ? d->backoff_ms : BACKOFF_MAX_MS;
    dtls_timer_set(d->timer, d->backoff_ms);
    return d->backoff_ms;
}

/* DTLS_EV_CONNECTED and DTLS_EV_RENEWED */
static void call_connected(struct call *d)
{
    dtls_info info;
    dtls_conn_info(d->conn, &info);
    d->connected = true;
    d->backoff_ms = 0;
    d->round_trip_us = info.round_trip_us;
    SSL_SESSION_free(d->session);
    d->session = dtls_conn_session(d->conn);
}

/* DTLS_EV_CLOSED */
static void call_closed(struct call *d)
{
    snprintf(d->why, sizeof d->why, "%s", dtls_conn_reason_text(d->conn));
    if (dtls_conn_reason(d->conn) == DTLS_CLOSE_ERROR) {
        SSL_SESSION_free(d->session); /* it may be what went wrong */
        d->session = NULL;
    }
    d->conn = NULL;
    d->connected = false;
    if (!d->stopped)
        d->failed(d->user);
}

/* The client. */

struct client {
    struct program program;
    const struct options *options;
    dtls_loop *loop;
    struct call call;
    bool on_terminal; /* then the editor is the input, otherwise the lines */
    struct editor editor;
    struct lines lines;
    int probes; /* pings of ours whose pong the user is not shown */
    bool was_connected, greeted, finished;
    int status;
};

static bool is_text(const char *data, size_t len, const char *text)
{
    return len == strlen(text) && memcmp(data, text, len) == 0;
}

/* "hello, ADDR". A zone in it is the server's name of an interface, which means nothing here. */
static bool is_greeting(const char *data, size_t len)
{
    char text[DTLS_ADDR_TEXT];
    dtls_addr a;
    if (len <= 7 || len - 7 >= sizeof text || memcmp(data, "hello, ", 7) != 0)
        return false;
    snprintf(text, sizeof text, "%.*s", (int)(len - 7), data + 7);
    char *zone = strchr(text, '%'), *end = strchr(text, ']');
    if (zone && end > zone)
        memmove(zone, end, strlen(end) + 1);
    return dtls_addr_parse(&a, text, NULL) == 0;
}

static void client_log(void *user, dtls_log level, const char *line)
{
    struct client *cl = user;
    if (level > cl->options->level || cl->finished)
        return;
    if (cl->on_terminal)
        editor_say(&cl->editor, line, strlen(line));
    else
        fprintf(stderr, "%s\n", line);
}

/* The first call decides; what closing logs after it is no news. */
static void client_finish(struct client *cl, int status)
{
    if (cl->finished)
        return;
    cl->finished = true;
    cl->status = status ? status : cl->lines.status;
    cl->call.stopped = true;
    cl->lines.going = false;
    dtls_loop_stop(cl->loop);
}

static void client_signal(void *user, int signo)
{
    (void)signo;
    client_finish(user, 0);
}

static void client_input_end(void *user)
{
    struct client *cl = user;
    lines_lost(&cl->lines, DTLS_LOG_WARNING, kept_any);
    client_finish(cl, 0);
}

static int client_send(void *user, const char *line, size_t len)
{
    struct client *cl = user;
    int r = cl->call.connected ? dtls_conn_send(cl->call.conn, line, len) : DTLS_ERR_STATE;
    if (r != DTLS_ERR_AGAIN && is_text(line, len, "ping"))
        cl->probes = 0; /* from now on a pong may be the user's */
    return r;
}

static void client_failed(void *user)
{
    struct client *cl = user;
    char text[96];
    if (cl->on_terminal) {
        snprintf(text, sizeof text, "reconnecting in %.1f s", call_later(&cl->call) / 1000.0);
        client_log(cl, DTLS_LOG_INFO, text);
    } else {
        fprintf(stderr, "dtls: %s: %s: %s\n", cl->options->addrs[0],
                cl->was_connected ? "connection lost" : "could not connect", cl->call.why);
        lines_lost(&cl->lines, DTLS_LOG_ERROR, kept_any);
        client_finish(cl, 1);
    }
}

static void client_connected(struct client *cl, dtls_conn *c)
{
    dtls_info info;
    call_connected(&cl->call);
    cl->probes = 0;
    cl->greeted = false;
    cl->was_connected = true;
    dtls_conn_info(c, &info);
    if (!cl->on_terminal)
        lines_start(&cl->lines, info.age_ms); /* a handshake takes at least two round trips */
}

static void client_renewed(struct client *cl)
{
    bool ours = cl->greeted;
    call_connected(&cl->call);
    cl->probes = 0;
    cl->greeted = false;
    if (!cl->on_terminal && !cl->finished) {
        lines_repeat(&cl->lines, ours);
        lines_pump(&cl->lines);
    }
}

/* The server is silent, or idle: a ping tells. Where it does not answer that, either, it may have been started again. */
static void client_idle(struct client *cl, dtls_conn *c)
{
    if (cl->probes > 0)
        dtls_conn_renew(c);
    cl->probes += dtls_conn_send(c, "ping", 4) == 0;
}

static void client_message(struct client *cl, const char *data, size_t len)
{
    if (cl->finished)
        return;
    if (cl->probes > 0 && is_text(data, len, "pong")) {
        cl->probes--;
    } else if (cl->on_terminal) {
        editor_say(&cl->editor, data, len);
    } else if (!cl->greeted && is_greeting(data, len)) {
        cl->greeted = true;
    } else if (fwrite(data, 1, len, stdout) != len || putchar('\n') == EOF || fflush(stdout) != 0) {
        client_finish(cl, complain(1, "standard output cannot be written"));
    } else {
        lines_answered(&cl->lines, cl->greeted, data, len);
    }
}

static void client_event(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    struct client *cl = dtls_endpoint_user(dtls_conn_endpoint(c));
    if (event == DTLS_EV_CONNECTED)
        client_connected(cl, c);
    else if (event == DTLS_EV_RENEWED)
        client_renewed(cl);
    else if (event == DTLS_EV_MESSAGE)
        client_message(cl, data, len);
    else if (event == DTLS_EV_IDLE)
        client_idle(cl, c);
    else if (event == DTLS_EV_WRITABLE && !cl->on_terminal)
        lines_pump(&cl->lines);
    else if (event == DTLS_EV_CLOSED)
        call_closed(&cl->call);
}

static int client_open_input(struct client *cl)
{
    const char *term = getenv("TERM");
    if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO) || !term || !*term || strcmp(term, "dumb") == 0)
        return lines_open(&cl->lines, cl->loop) ? 0 : complain(1, strerror(errno));
    if (!editor_open(&cl->editor))
        return complain(1, "the terminal cannot be used");
    cl->on_terminal = true;
    return editor_watch(&cl->editor, cl->loop) ? 0 : complain(1, "the terminal cannot be watched");
}

static void client_rebind(void *user, int signo)
{
    const struct client *cl = user;
    (void)signo;
    if (cl->call.conn)
        dtls_conn_rebind(cl->call.conn);
}

static int client_run(struct client *cl)
{
    const struct options *o = cl->options;
    int ms = o->keepalive_ms;
    dtls_config cfg = {.on_event = client_event, .on_log = client_log, .user = cl};
    cfg.idle_ms = ms;
    cfg.idle_repeat_ms = ms > 0 && ms < PROBE_MS ? ms : PROBE_MS;
    cfg.idle_timeout_ms = ms == DTLS_NEVER ? DTLS_NEVER : ms < GONE_MS / 3 ? 4 * ms : ms + GONE_MS;
    cfg.unanswered_ms = o->unanswered_ms;
    dtls_endpoint *ep = cl->call.ep = program_endpoint(cl->loop, &cl->program, &cfg);
    if (!ep)
        return 1;
    cl->call.timer = dtls_timer_new(cl->loop, call_go, &cl->call);
    if (!cl->call.timer || !program_signals(cl->loop, client_signal, cl) ||
        dtls_loop_signal(cl->loop, SIGUSR1, client_rebind, cl) != 0)
        return complain(1, strerror(errno));
    if (client_open_input(cl) != 0)
        return 1;
    call_go(&cl->call);
    int status = dtls_loop_run(cl->loop) == 0 ? cl->status : complain(1, strerror(errno));
    if (o->level == DTLS_LOG_DEBUG && !cl->on_terminal)
        program_counters(ep);
    return status;
}

/* The session of an earlier run, and for a later one: it holds keys. */

/* None yet, or an empty file: there will be one. Anything else is somebody's, and not ours to write over. */
static int client_find_session(struct client *cl, dtls_error *err)
{
    const char *file = cl->options->session;
    FILE *f = file ? fopen(file, "r") : NULL;
    int r = 0, c = f ? fgetc(f) : EOF;
    if ((file && !f && errno != ENOENT) || (f && ferror(f)))
        r = fail(err, DTLS_ERR_SYSTEM, "%.150s: %s", file, strerror(errno));
    if (c != EOF && ungetc(c, f) == c) {
        cl->call.session = PEM_read_SSL_SESSION(f, NULL, NULL, (char[]){""}); /* no password is asked for */
        if (!cl->call.session)
            r = fail(err, DTLS_ERR_ARG, "%.150s: no session in it; name another file, or remove it", file);
    }
    if (f)
        fclose(f);
    errors_clear();
    return r;
}

static void client_keep_session(const struct client *cl)
{
    const char *file = cl->options->session;
    if (!file || !cl->call.session)
        return;
    int fd = open(file, O_WRONLY | O_CREAT | O_TRUNC, S_IRUSR | S_IWUSR);
    FILE *f = fd < 0 || fchmod(fd, S_IRUSR | S_IWUSR) < 0 ? NULL : fdopen(fd, "w");
    if (!f || PEM_write_SSL_SESSION(f, cl->call.session) != 1)
        fprintf(stderr, "dtls: %s: the session cannot be written: %s\n", file, strerror(errno));
    if (f)
        fclose(f);
}

/* Whether there is anybody to call: before anything else is wrong. */
static int client_check(const char *host, dtls_error *err)
{
    struct question q = {.fd = -1};
    dtls_addr a;
    if (ep_parse_host(host, &q, &a, err) < 0)
        return DTLS_ERR_ADDR;
    return q.host[0] || option_addr(host, &a, err) ? 0 : DTLS_ERR_ADDR;
}

static int client_main(struct options *o)
{
    dtls_error err;
    struct client *cl = calloc(1, sizeof *cl);
    if (!cl)
        return complain(1, "out of memory");
    cl->options = cl->program.options = o;
    cl->lines.sink = cl->editor.sink =
        (struct sink){.send = client_send, .end = client_input_end, .say = client_log, .user = cl};
    cl->call.failed = client_failed;
    cl->call.user = cl;
    cl->call.host = o->addrs[0];
    cl->call.name = o->name;
    int status, r = client_check(o->addrs[0], &err), found = r == 0 ? client_find_session(cl, &err) : 0;
    cl->loop = r == 0 && found == 0 ? dtls_loop_new(NULL) : NULL;
    if (r < 0 || found < 0)
        status = complain(r < 0 ? EXIT_USAGE : 1, err.text);
    else
        status = cl->loop ? client_run(cl) : complain(1, strerror(errno));
    cl->finished = cl->call.stopped = true; /* also where client_run() gave up early */
    dtls_loop_free(cl->loop);
    if (cl->on_terminal)
        editor_close(&cl->editor);
    client_keep_session(cl);
    SSL_SESSION_free(cl->call.session);
    program_end(&cl->program);
    lines_close(&cl->lines);
    free(cl);
    return status;
}

/* Main. */

static const struct mode modes[] = {{.name = "server", .role = "server", .run = server_main},
                                    {.name = "client", .role = "client", .one_addr = true, .run = client_main},
                                    {.name = NULL}};

int main(int argc, char **argv)
{
    struct options o;
    dtls_error err;
    char list[LIST_BYTES] = "";
    signal(SIGPIPE, SIG_IGN);                   /* nobody reads our log: no reason to stop */
    for (int fd = 0; fd <= STDERR_FILENO; fd++) /* a closed one would become some socket's number */
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0)
            return 1;
    if (options_parse(&o, modes, argc, argv, &err) < 0)
        return complain(EXIT_USAGE, err.text);
    commands_list(list, sizeof list);
    if (o.help)
        printf(usage_text, list);
    else if (o.version)
        printf("dtls %s, %s, %s\n", dtls_version(), OpenSSL_version(OPENSSL_VERSION), BACKEND);
    else
        return o.mode->run(&o);
    return fflush(stdout) == 0 ? 0 : 1;
}

#endif
