/* What the fuzz targets of server and client share: time and chance that repeat, datagrams in memory, recorded
 * handshakes, and the script that an input is.
 *
 * libssl meets the same chance each time one of our calls enters it, so the handshakes that were recorded when the
 * target started are valid again in every execution, on any version of OpenSSL. A script sends their records as they
 * are, or changed, doubled, cut, glued together, at other times, from other addresses, and among bytes of its own.
 *
 * A strict script holds the library to its promise: what it puts between the recorded records is only what the guard
 * must keep from libssl, so the handshake has to succeed whatever the script does. */
#ifndef FUZZ_H
#define FUZZ_H

#include "virtual.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    WORLD_EXECUTIONS = 5000, /* then everything is made anew */
    WORLD_CHANCE = 1,
    SERVER_CHANCE,
    RECORDED_CHANCE, /* what the clients of recorded handshakes draw from; others have other hello randoms */
    LIVE_CHANCE,

    MTU = 1500,
    SMALL_MTU = 256, /* what dtls.h allows at least: fragments */
    IP_UDP_HEADERS = 28,
    DATAGRAM_BYTES = 20000, /* above what an endpoint takes */
    AIR_MAX = 64,           /* a datagram of many messages gets as many echoes */
    RECORDINGS = 2,
    PIECES_MAX = 32,
    PIECES_AFTER = 3, /* behind the handshake: two messages and the close_notify */
    PIECE_BYTES = 2048,
    PIECES_AT_ONCE = 8,
    WAIT_UNIT_MS = 50,
    WAIT_MAX_MS = 45000, /* in all; less than an idle timeout */
    HANDSHAKE_MS = 30000,
    IDLE_MS = 60000,
    SPIN_MAX = 64, /* turns of a loop without a step of time */

    SURGE_MAX_BYTES = 1048576,
    CONTEXT_BYTES = 4096, /* of an endpoint's contexts for records, made when the first key is tried */
    BLOCK_HEADER = 16,    /* keeps the alignment of malloc() */

    RECORD_HEADER = 13,
    HANDSHAKE_HEADER = 12,
    CCS = 20,
    ALERT = 21,
    HANDSHAKE = 22,
    DATA = 23,
    CLIENT_HELLO = 1,
    HELLOS_MAX = 3,    /* those of a server are 2 and 3 */
    PROTECTED_MIN = 24 /* nonce and tag of AES-GCM: a shorter protected record is fatal to libssl */
};

enum who { SERVER, VISITOR, MEMBER, STRANGER, ADDRS };

/* Scripts in tests/corpus/ name them by number. */
enum operation {
    OP_NEXT,  /* the played handshake's next record, as it was */
    OP_ADD,   /* recorded records to the datagram being made */
    OP_BYTES, /* bytes of the script to it */
    OP_XOR,   /* changes one byte of it */
    OP_PUT,   /* replaces a slice of it */
    OP_CUT,   /* shortens it */
    OP_SEND,  /* sends it, and may keep it to send it once more */
    OP_WAIT,
    OP_TALK, /* the target's own: a message of a live connection */
    OPERATIONS
};

struct piece {
    size_t len;
    uint8_t data[PIECE_BYTES];
};

/* The records that one side of one connection sent: the handshake, "first", "last", close_notify. */
struct recording {
    enum who from;
    int len;
    struct piece pieces[PIECES_MAX];
};

struct datagram {
    enum who from, to;
    size_t len;
    uint8_t data[DATAGRAM_BYTES];
};

struct input {
    const uint8_t *p;
    size_t left;
};

static dtls_loop *loop;
static dtls_endpoint *server, *clients; /* those that are there get the datagrams in the air */
static uint64_t client_chance;
static struct datagram air[AIR_MAX]; /* a ring */
static unsigned air_first, air_len;
static size_t sent_by_server;

static struct recording recordings[RECORDINGS], *recording; /* the one being made */
static const struct recording *played;
static int played_next;
static int strict, waited_ms;
static int farewell; /* the script had a close_notify in its hands: its connection may end by it */
static struct datagram made;

/* The target's own. */
static void world_begin(void);
static void world_end(void);
static void deliver(enum who from, const void *data, size_t len);
static enum who sender(unsigned n);
static void talk(void);
static int played_open(void);

#define BROKEN(...) (fprintf(stderr, "broken: " __VA_ARGS__), fputc('\n', stderr), abort())

/* ---- what OpenSSL holds, in bytes: the size stands in front of each block ---- */

static size_t held, held_before;

/* What strangers can make it keep, from before their cookies to half-open connections, has its bound. */
static void surge_check(void)
{
    if (held_before && held > held_before + SURGE_MAX_BYTES)
        BROKEN("OpenSSL holds %zu bytes, %zu before", held, held_before);
}

static void *held_malloc(size_t n, const char *file, int line)
{
    (void)file, (void)line;
    size_t *block = malloc(BLOCK_HEADER + n);
    if (!block)
        return NULL;
    *block = n;
    held += n;
    return (uint8_t *)block + BLOCK_HEADER;
}

static void held_free(void *p, const char *file, int line)
{
    (void)file, (void)line;
    if (!p)
        return;
    size_t *block = (void *)((uint8_t *)p - BLOCK_HEADER);
    held -= *block;
    free(block);
}

static void *held_realloc(void *p, size_t n, const char *file, int line)
{
    void *q = n > 0 ? held_malloc(n, file, line) : NULL;
    if (p && q) {
        size_t old = *(size_t *)(void *)((uint8_t *)p - BLOCK_HEADER);
        memcpy(q, p, old < n ? old : n);
    }
    if (q || n == 0)
        held_free(p, file, line);
    return q;
}

/* ---- the network ---- */

static dtls_addr addr_of(enum who who)
{
    return (dtls_addr){.ip = {10, 0, 0, (uint8_t)who}, .port = 4433, .family = 4};
}

static enum who who_is(const dtls_addr *addr)
{
    return (enum who)addr->ip[3];
}

static int on_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    (void)user;
    struct datagram *d = &air[(air_first + air_len++) % AIR_MAX];
    if (air_len > AIR_MAX || len > MTU - IP_UDP_HEADERS)
        BROKEN("%u datagrams at once, the last with %zu bytes", air_len, len);
    d->from = who_is(from);
    d->to = who_is(to);
    d->len = len;
    memcpy(d->data, data, len);
    if (d->from == SERVER)
        sent_by_server += len;
    return 0;
}

/* From memory of just that size, for the sanitizer to see what reads behind it. */
static void input(enum who from, enum who to, const void *data, size_t len)
{
    dtls_addr source = addr_of(from), target = addr_of(to);
    dtls_endpoint *ep = to == SERVER ? server : clients;
    uint8_t *copy = malloc(len);
    memcpy(copy, data, len);
    chance_state = to == SERVER ? SERVER_CHANCE : client_chance;
    if (ep)
        dtls_endpoint_input(ep, copy, len, &source, &target);
    free(copy);
}

static void record(const struct datagram *d)
{
    const uint8_t *p = d->data;
    for (size_t left = d->len, n; left > 0; p += n, left -= n) {
        n = (size_t)RECORD_HEADER + (size_t)(p[11] << 8 | p[12]);
        if (recording->len == PIECES_MAX || n > PIECE_BYTES || n > left)
            BROKEN("a handshake that cannot be recorded");
        struct piece *piece = &recording->pieces[recording->len++];
        piece->len = n;
        memcpy(piece->data, p, n);
    }
}

/* Brings what is in the air to those it is for, and their answers, until there is silence. */
static void carry(void)
{
    while (air_len > 0) {
        struct datagram *d = &air[air_first]; /* its place is not used again while it is looked at */
        if (recording && recording->from == d->from)
            record(d);
        input(d->from, d->to, d->data, d->len);
        air_first = (air_first + 1) % AIR_MAX;
        air_len--;
    }
}

/* ---- time ---- */

/* Turns the loop until it has nothing to do at this time. */
static void quiet(void)
{
    int turns = 0;
    do {
        if (turns++ > SPIN_MAX)
            BROKEN("the loop spins");
        chance_state = client_chance;
        dtls_loop_poll(loop, 0);
        carry();
    } while (dtls_loop_timeout(loop) == 0);
}

static void advance(int ms)
{
    int64_t until = now_us + ms * (int64_t)1000;
    while (now_us < until) {
        int next = dtls_loop_timeout(loop);
        if (next < -1)
            BROKEN("a timeout of %d ms", next);
        int64_t at = next < 0 ? until : now_us + next * (int64_t)1000;
        now_us = at < until ? at : until;
        quiet();
    }
}

/* ---- endpoints and recordings ---- */

static dtls_endpoint *endpoint(struct identity *id, dtls_config cfg)
{
    dtls_error err;
    cfg.on_ssl_ctx = on_ssl_ctx;
    cfg.user = id;
    cfg.send = on_send;
    cfg.cid_bytes = cfg.roam_trials =
        DTLS_NEVER; /* peers are told apart by their addresses here; fuzz_cid.c has the IDs */
    cfg.handshake_timeout_ms = HANDSHAKE_MS;
    chance_state = WORLD_CHANCE;
    dtls_endpoint *ep = dtls_endpoint_new(loop, &cfg, &err);
    if (!ep || (id == &server_id && dtls_endpoint_listen(ep, NULL, &err) != 0))
        BROKEN("%s", err.text);
    return ep;
}

static dtls_conn *connect_from(enum who who, uint64_t chance, SSL_SESSION *session)
{
    dtls_target t = {.peer = addr_of(SERVER), .local = addr_of(who), .name = "localhost", .session = session};
    dtls_error err;
    chance_state = client_chance = chance;
    dtls_conn *c = dtls_endpoint_connect(clients, &t, &err);
    if (!c)
        BROKEN("%s", err.text);
    return c;
}

static void say(dtls_conn *c, const char *text)
{
    if (dtls_conn_send(c, text, strlen(text)) != 0)
        BROKEN("\"%s\" was not sent", text);
    carry();
}

static int handshake_len(const struct recording *r)
{
    return r->len - PIECES_AFTER;
}

static const struct piece *last_message(const struct recording *r)
{
    return &r->pieces[r->len - 2];
}

static int is_verified(const dtls_conn *c, const struct identity *peer)
{
    SSL *ssl = dtls_conn_ssl(c);
    X509 *cert = ssl ? SSL_get_peer_certificate(ssl) : NULL;
    int same = cert && X509_cmp(cert, peer->cert) == 0;
    X509_free(cert);
    return same && SSL_get_verify_result(ssl) == X509_V_OK;
}

/* Counts a message of a recorded connection, which says "first" and "last". */
static void hear(int *heard, const void *data, size_t len)
{
    int first = len == 5 && memcmp(data, "first", len) == 0, last = len == 4 && memcmp(data, "last", len) == 0;
    if (!first && !last)
        BROKEN("a message that nobody sent");
    if (heard[last]++)
        BROKEN("a message came twice");
}

/* ---- executions ---- */

static void fuzz_begin(void)
{
    if (CRYPTO_set_mem_functions(held_malloc, held_realloc, held_free) != 1)
        BROKEN("OpenSSL has memory already");
    chance_state = WORLD_CHANCE;
    virtual_chance();
    virtual_identities();
    atexit(virtual_identities_free);
}

static void execution_begin(void)
{
    static long executions;
    if (executions++ % WORLD_EXECUTIONS != 0)
        return;
    if (executions == 1)
        fuzz_begin();
    else
        world_end();
    world_begin();
}

static void execution_end(void)
{
    OPENSSL_thread_stop(); /* frees the error queue, which keeps old texts */
    if (!held_before || held < held_before)
        held_before = held;
    if (held > held_before + CONTEXT_BYTES)
        BROKEN("OpenSSL holds %zu bytes, %zu before", held, held_before);
}

/* ---- what cannot do harm ---- */

/* A handshake message that no peer sends, or that does not fit where it says it belongs. */
static int is_lie(const uint8_t *p, size_t n)
{
    static const uint8_t known[] = {1, 2, 3, 4, 11, 12, 13, 14, 15, 16, 22};
    if (n < HANDSHAKE_HEADER || !memchr(known, p[0], sizeof known))
        return 1;
    unsigned length = (unsigned)(p[1] << 16 | p[2] << 8 | p[3]), offset = (unsigned)(p[6] << 16 | p[7] << 8 | p[8]);
    unsigned fragment = (unsigned)(p[9] << 16 | p[10] << 8 | p[11]);
    return offset + fragment > length || fragment > n - HANDSHAKE_HEADER || (fragment == 0 && length > 0);
}

/* A record of the handshake under another sequence number. The hellos decide which handshake it is, so of those only
 * what the server has already. */
static int is_copy(const uint8_t *p, size_t n)
{
    for (int i = 0; i < handshake_len(played); i++) {
        const struct piece *r = &played->pieces[i];
        uint8_t type = r->data[RECORD_HEADER];
        if (r->len == n && (type > HELLOS_MAX || (type == CLIENT_HELLO && i < played_next)) &&
            memcmp(p, r->data, 5) == 0 && memcmp(p + 11, r->data + 11, n - 11) == 0)
            return 1;
    }
    return 0;
}

static int is_harmless_record(const uint8_t *p, size_t n)
{
    unsigned epoch = (unsigned)(p[3] << 8 | p[4]);
    size_t body = n - RECORD_HEADER;
    if (epoch > 0)
        return epoch > 1 || p[0] == CCS || body < PROTECTED_MIN;
    if (p[0] == HANDSHAKE)
        return is_lie(p + RECORD_HEADER, body) || is_copy(p, n);
    return p[0] != CCS || body != 1 || p[RECORD_HEADER] != 1;
}

/* Whether a handshake must survive the datagram. Alerts may end it, but only if the real peer falls silent then. */
static int is_harmless(const uint8_t *p, size_t n)
{
    for (size_t record; n > RECORD_HEADER; p += record, n -= record) {
        record = (size_t)RECORD_HEADER + (size_t)(p[11] << 8 | p[12]);
        if (p[0] < CCS || p[0] > DATA || p[1] != 0xfe || record == RECORD_HEADER || record > n)
            break; /* what stands behind it cannot be found */
        if (!is_harmless_record(p, record))
            return 0;
    }
    return 1;
}

/* ---- scripts ---- */

static unsigned take(struct input *in)
{
    if (in->left == 0)
        return 0;
    in->left--;
    return *in->p++;
}

static unsigned take16(struct input *in)
{
    unsigned high = take(in);
    return high << 8 | take(in);
}

static void append(const void *data, size_t len)
{
    if (len > DATAGRAM_BYTES - made.len)
        len = DATAGRAM_BYTES - made.len;
    memcpy(made.data + made.len, data, len);
    made.len += len;
}

static void play_next(void)
{
    const struct piece *p = &played->pieces[played_next];
    if (played_next == handshake_len(played))
        return;
    played_next++;
    deliver(played->from, p->data, p->len);
}

/* The last message is kept back: it tells in the end whether the connection is alive. */
static void add(unsigned which, unsigned count)
{
    const struct recording *r = &recordings[which / PIECES_MAX % RECORDINGS];
    for (int i = (int)(which % PIECES_MAX); i < r->len && count > 0; i++, count--) {
        if (&r->pieces[i] == last_message(r) || (strict && i == r->len - 1))
            continue;
        if (i == r->len - 1)
            farewell = 1;
        append(r->pieces[i].data, r->pieces[i].len);
    }
}

static void put(struct input *in, size_t at, size_t len)
{
    for (; len > 0 && at < made.len; len--)
        made.data[at++] = (uint8_t)take(in);
}

static void send_made(unsigned how)
{
    enum who from = sender(how & 3);
    if (!strict || played_open() || is_harmless(made.data, made.len))
        deliver(from, made.data, made.len);
    if (!(how & 4))
        made.len = 0;
}

static void wait_a_little(unsigned units)
{
    int ms = (int)units * WAIT_UNIT_MS;
    if (strict || ms > WAIT_MAX_MS - waited_ms)
        return;
    waited_ms += ms;
    advance(ms);
}

static void operate(struct input *in)
{
    unsigned at;
    switch (take(in) % OPERATIONS) {
    case OP_NEXT:
        play_next();
        break;
    case OP_ADD:
        at = take(in);
        add(at, 1 + take(in) % PIECES_AT_ONCE);
        break;
    case OP_BYTES:
        at = (unsigned)made.len;
        made.len += take(in);
        made.len = made.len < DATAGRAM_BYTES ? made.len : DATAGRAM_BYTES;
        put(in, at, made.len - at);
        break;
    case OP_XOR:
        at = take16(in);
        made.data[made.len ? at % made.len : 0] ^= (uint8_t)take(in);
        break;
    case OP_PUT:
        at = take16(in);
        put(in, at, take(in));
        break;
    case OP_CUT:
        at = take16(in);
        made.len = at < made.len ? at : made.len;
        break;
    case OP_SEND:
        send_made(take(in));
        break;
    case OP_WAIT:
        wait_a_little(take(in));
        break;
    case OP_TALK:
        talk();
        break;
    default:
        break;
    }
}

/* The first byte says whether the script is strict, and which recording is played. */
static void script_run(const uint8_t *data, size_t len)
{
    struct input in = {data, len};
    unsigned mode = take(&in);
    strict = mode & 1;
    played = &recordings[mode >> 1 & 1];
    played_next = waited_ms = farewell = 0;
    made.len = 0;
    while (in.left > 0)
        operate(&in);
    while (strict && played_next < handshake_len(played))
        play_next();
    if (strict && !played_open())
        BROKEN("harmless datagrams stopped a handshake");
}

#endif
