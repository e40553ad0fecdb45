/* Whole worlds in one process, from a seed: a server, several clients, and a network that loses, doubles, delays,
 * reorders, damages and cuts off; clients that vanish and come back on the same port, or on one that another client had;
 * a server that restarts. In some worlds a mean host starts handshakes and leaves them, there are few places for
 * handshakes, each look at the clock takes time, so that the turn's share for handshakes is used up, or somebody puts a
 * Certificate that he saw ahead of what belongs to a resumed handshake. Time is virtual, for libssl as well, and so are chance and the certificates: a seed repeats its
 * world.
 *
 * In other worlds, a third as many, there is a NAT between some of the clients and the server, which gives them other
 * addresses, swaps them, and gives them what others had; and somebody copies what clients send, and sends it from elsewhere.
 *
 *   simulate WORLDS [FIRST_SEED [LOSS_PERCENT]]    on all cores
 *   simulate moves WORLDS [...]                    only those with a NAT
 *   simulate [moves] -v SEED [LOSS_PERCENT]        one world, with the log of both sides
 *
 * Checked all along: no message is delivered twice, changed, or to the wrong connection; each connection has one end; no
 * timer spins; a handshake's states follow each other as its table has it; a handshake fails only if a cut, a side's end or damage was in its way, or so much was lost that its
 * deadline came first. Once the network is good again every client gets through; in the end tables and timers are empty
 * and OpenSSL holds what it held before.
 *
 * Where addresses change: a message comes from whom the certificate names; an address that is not proven gets three times
 * what came from there at most; nobody is closed by a move or a copy; and when the network is good, each message that was not
 * itself copied on its way is answered, at once, wherever its client is by then. Those whose records tell nothing (no
 * connection ID, no AES-GCM) are known at their IP address only; who moves in a handshake may need another one. */
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
    KEPT_MAX = 64,    /* datagrams that somebody copied, */
    HELLOS_MAX = 256, /* and addresses that began a handshake of late: */
    HELLO_MS = 31000, /* until the server gives up on it */
    PROVEN_MAX = 4,
    NAT_PORT = 30000, /* and up: what a NAT gives */
    NAT_IPS = 3,
    NAT_MS = 1500,       /* between its changes, at most */
    OLD_GOOD_MS = 10001, /* so long an address that was proven stays so */
    OVERTAKE_MS = 5,     /* what is sent so shortly after another may overtake it */
    ANSWER_MS = 100,     /* in a good network an answer is there by then */
    UNPROVEN_FACTOR = 3, /* so much goes to an address that is not proven, of what came from there */
    WITH_CID = 25,       /* types of records */
    PATH_TYPE = 27,
    PATH_BYTES = 9,    /* of what asks whether somebody is there, or answers that, RFC 9853 */
    MOVES_SHARE = 3,   /* of so many worlds, one more with a NAT */
    MOVES_ENOUGH = 10, /* such worlds have some of everything */
    MOVES_MS = 40000,  /* so long addresses go on changing when the network is good */
    FIRST_USES = 20,   /* what OpenSSL keeps from the first use of each suite */
    FORGED_MAX = 600,  /* bytes of a Certificate that somebody saw */
    SERVER_PORT = 4433,
    CLIENT_PORT = 20000,
    LIFE_MS = 60000,    /* clients come and go for so long, */
    HEALED_MS = 40000,  /* then the network is good: a handshake's deadline and a bit */
    EMPTY_MS = 60000,   /* then they are gone: deadlines and idle timeouts pass */
    IDLE_MS = 15000,    /* a client's idle timeout */
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
    int damaged, lost, copy;
    uint32_t client, life; /* whose it is, client number and 1; 0: the server's */
};

/* Where the server takes a client to be. */
struct place {
    dtls_addr addr;
    int64_t since;
    size_t in, out; /* bytes since it moved there */
    uint64_t sequence;
    int proven, sure, shared; /* sure: by a second record. */ /* shared: others send or get something there, too */
    int asked;
};

/* What every message says of itself; the rest is a pattern from these. */
struct message {
    uint32_t client, life, port, number, len;
};

struct client {
    dtls_addr addr, shown; /* its own, and what others see of it */
    dtls_addr before;      /* shown before that */
    struct identity *id;
    dtls_endpoint *ep;
    int suite, cid_bytes, behind_nat;
    int shaking;     /* a handshake is under way, */
    int ready;       /* and the server is done with it */
    int excused;     /* what the server knows of it may be lost: it moved in a handshake, or another has its address */
    int moved_early; /* times, in its first handshake */
    int unknown;     /* the server could not know whose the last messages were */
    int copied;      /* the last that it sent was, and the copy comes first */
    int64_t copied_at;
    int64_t due[MESSAGES_MAX];
    uint32_t extras;
    unsigned char seen_extras[MESSAGES_MAX];
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
    struct served *next;
    dtls_conn *conn;
    uint32_t client, life; /* where clients move: as the certificate says */
    struct place at;
    dtls_addr born;               /* where its handshake was */
    dtls_addr proven[PROVEN_MAX]; /* where it was before that, and that may have been */
    uint32_t proven_len;
    unsigned moves;
    uint64_t newest; /* of its messages */
    dtls_addr home;  /* where it was proven to be, before a copy moved it, */
    size_t home_len;
    uint64_t home_sequence; /* with that number; 0: none did */
    int64_t home_by;        /* it is asked there, and back by then; 0: not for sure */
    int cid_in, cid_out;
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
    struct served *served; /* where clients move: all */
    int strict;            /* the network is good, and clients move */
    int64_t strict_since;
    int copying; /* percent */
    int server_cid;
    dtls_timer *nat_timer;
    uint16_t nat_port;
    const struct datagram *arriving;
    struct datagram *kept[KEPT_MAX];
    uint32_t kept_len;
    struct hello {
        dtls_addr addr;
        const struct client *client;
        int64_t at;
    } hellos[HELLOS_MAX];
    uint32_t hellos_len;
    unsigned long moved;                 /* events of this server */
    unsigned char forged[2][FORGED_MAX]; /* a Certificate to a client, and one to the server */
    size_t forged_len[2];
};

/* What the worlds of one process saw, summed over processes at the end. */
struct figures {
    long worlds, associations, resumed, renewed, messages, datagrams, restarts, failed, late, broken;
    long changes, moves, trials, copies, raced, limited, unproven, expected, taken;
    long full_times[HISTOGRAM_MAX], resumed_times[HISTOGRAM_MAX]; /* of undisturbed handshakes */
};

static struct world *w;
static struct figures sum;
static int verbose, moving;

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
    *d = (struct datagram){now_us + delay, w->order++, *from, *to, len, malloc(len), 0, 0, 0, 0, 0};
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

static int64_t delay(void)
{
    return 1000 + (percent(w->late) ? 5000 + dice(75000) : dice(500));
}

static int moving_send(int from_server, const unsigned char *data, size_t len, const dtls_addr *from,
                       const dtls_addr *to);

static int on_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    if (moving)
        return moving_send(user == &server_id, data, len, from, to);
    sum.datagrams++;
    if (w->muted || now_us < w->cut_until || percent(w->loss))
        return 0;
    for (int copies = 1 + percent(w->twice); copies > 0; copies--) {
        struct datagram *d = fly(data, len, from, to, delay());
        if (percent(w->damage))
            damage(d);
    }
    return 0;
}

static uint32_t client_number(const struct client *c)
{
    return (uint32_t)(c - w->clients);
}

/* Whoever has the address now. */
static struct client *client_at(const dtls_addr *addr)
{
    for (int i = 0; i < w->clients_len; i++)
        if (dtls_addr_equal(&w->clients[i].shown, addr))
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

static void moving_arrive(struct datagram *d);

static void arrive(struct datagram *d)
{
    int to_server = d->to.port == SERVER_PORT;
    if (moving) {
        moving_arrive(d);
        return;
    }
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

/* ---- clients that move ---- */

static const char *const suites[] = {"ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384",
                                     "ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-CCM"};
enum { SUITES = sizeof suites / sizeof *suites, SUITE_CHACHA = 2, SUITE_CCM = 3, NONCE_BYTES = 8, TAG_BYTES = 16 };

static const int cids[] = {0, 8, DTLS_CID_EMPTY, DTLS_NEVER};
enum { CIDS = sizeof cids / sizeof *cids };

static struct identity client_ids[CLIENTS_MAX];

static uint64_t sequence_of(const unsigned char *data)
{
    uint64_t n = 0;
    for (int i = 5; i < 11; i++)
        n = n << 8 | data[i];
    return n;
}

static int is_hello(const unsigned char *data, size_t len)
{
    return len > 13 && data[0] == 22 && data[4] == 0 && data[13] == 1;
}

/* Asks whether somebody is there, or answers that: seen from outside by its size. */
static int is_path_message(const unsigned char *data, size_t len, int suite, int cid)
{
    size_t rest = 13 + (suite == SUITE_CHACHA ? 0 : NONCE_BYTES) + TAG_BYTES + PATH_BYTES;
    return data[0] == PATH_TYPE || (data[0] == WITH_CID && cid > 0 && len == rest + (size_t)cid + 1);
}

/* Those who copy have addresses that nobody else has. */
static int is_copyist(const dtls_addr *addr)
{
    return addr->ip[1] == 77;
}

static struct client *client_of(const struct served *s)
{
    return s->client < (uint32_t)w->clients_len ? &w->clients[s->client] : NULL;
}

/* The server's newest connection of that client. */
static struct served *served_of(const struct client *c)
{
    struct served *s = w->served;
    while (s && (s->client != (uint32_t)(c - w->clients) || s->life != c->life))
        s = s->next;
    return s;
}

/* Whether somebody other than that client began a handshake there, so that the server may still be busy with it. */
static int hello_from(const dtls_addr *addr, const struct client *but)
{
    for (const struct hello *h = w->hellos; h < w->hellos + HELLOS_MAX; h++)
        if (h->client && h->client != but && dtls_addr_equal(&h->addr, addr) &&
            now_us - h->at < HELLO_MS * (int64_t)1000)
            return 1;
    return 0;
}

static int was_proven(const struct served *s, const dtls_addr *addr)
{
    for (int i = 0; i < PROVEN_MAX; i++)
        if (dtls_addr_equal(&s->proven[i], addr))
            return 1;
    return 0;
}

/* Whether what goes there may be for others than the one that comes there now, and from now on may be for it. */
static int others_at(const struct served *own, const dtls_addr *addr)
{
    int others = 0;
    for (struct served *s = w->served; s; s = s->next) {
        int there = dtls_addr_equal(&s->at.addr, addr);
        if (s == own)
            continue;
        s->at.shared |= there;
        others |= there || was_proven(s, addr);
    }
    if (others)
        return 1;
    return hello_from(addr, NULL);
}

/* Whether the server can know whose records these are: by their connection ID, by their nonces, or by where they are from. */
static int is_findable(const struct client *c, const struct served *s)
{
    return s->cid_in > 0 || (c->suite < SUITE_CHACHA && s->used) || memcmp(s->at.addr.ip, c->shown.ip, 4) == 0;
}

/* Where it is, it need not be as things should be: it moves, say, or somebody copies what it sends. */
static void expect_nowhere(const struct client *c)
{
    for (struct served *s = w->served; s; s = s->next)
        if (client_of(s) == c)
            s->home_sequence = 0, s->home_by = 0;
}

static void expect_nothing(struct client *c)
{
    memset(c->due, 0, sizeof c->due);
    expect_nowhere(c);
}

/* The original arrived, and no more than one copy did before: it counts more, where it came from. Or it is lost, and its
 * client is asked where it was. */
static void expect_home(const struct datagram *d)
{
    for (struct served *s = w->served; s; s = s->next) {
        int original = d->client == s->client + 1 && d->life == s->life && !d->copy && !d->damaged && d->data[4] == 1 &&
                       s->home_sequence && sequence_of(d->data) == s->home_sequence && d->len == s->home_len &&
                       s->newest <= s->home_sequence && dtls_addr_equal(&d->from, &s->home);
        int late = s->home_by && now_us > s->home_by;
        if ((original || late) && !s->at.proven && !dtls_addr_equal(&s->at.addr, &s->home))
            broken("client %u is not where its message came from, but where a copy did", s->client);
        if (late)
            s->home_by = 0;
    }
}

/* What was sent so long ago must have been answered. */
static void expect_answers(const struct client *c)
{
    for (int i = 0; i < MESSAGES_MAX; i++)
        if (c->due[i] && now_us - c->due[i] > ANSWER_MS * (int64_t)1000)
            broken("message %d of client %d, sent at %.3f s, was not answered", i, (int)(c - w->clients),
                   (double)c->due[i] / 1e6);
}

/* The message with that number was sent. */
static void expect_answer(struct client *c, int number)
{
    const struct served *s = served_of(c);
    int unknown = s && !is_findable(c, s);
    c->unknown |= unknown;
    if (!w->strict || now_us - c->copied_at < OVERTAKE_MS * 1000 || c->shaking || !c->ready || c->excused ||
        c->copied || !s || unknown)
        return;
    c->due[number] = now_us;
    sum.expected++;
}

static dtls_addr copyist(const struct client *victim)
{
    dtls_addr addr = {.ip = {10, 77, 0, (uint8_t)(1 + dice(3))}, .port = (uint16_t)(1000 + dice(3)), .family = 4};
    switch (dice(6)) {
    case 0:
        return w->clients[dice((uint32_t)w->clients_len)].shown;
    case 1:
        return victim->before;
    case 2: /* somebody beside it, behind the same NAT */
        addr = victim->shown;
        addr.port = (uint16_t)(900 + dice(3));
        return addr;
    default:
        return addr;
    }
}

static int copies_now(void)
{
    return w->copying && (!w->healed || w->strict);
}

static void copy(const struct datagram *d, int64_t after)
{
    dtls_addr from = copyist(&w->clients[d->client - 1]);
    struct datagram *c = fly(d->data, d->len, &from, &d->to, after);
    c->client = d->client;
    c->life = d->life;
    c->copy = 1;
    sum.copies++;
}

static void keep(const struct datagram *d)
{
    struct datagram **k = &w->kept[w->kept_len++ % KEPT_MAX];
    if (*k)
        datagram_free(*k);
    *k = malloc(sizeof **k);
    **k = *d;
    (*k)->data = malloc(d->len);
    memcpy((*k)->data, d->data, d->len);
}

static void copy_old(void)
{
    if (w->kept_len > 0)
        copy(w->kept[dice(w->kept_len < KEPT_MAX ? w->kept_len : KEPT_MAX)], 1 + dice(2000));
}

/* Somebody sees what a client sends. His copy comes later, or earlier; then the original may take its time, or be lost. */
static void copy_new(struct client *c, struct datagram *d, int64_t after)
{
    keep(d);
    expect_nowhere(c);
    c->copied_at = now_us;
    for (int i = 0; i < MESSAGES_MAX; i++)
        if (now_us - c->due[i] < OVERTAKE_MS * 1000)
            c->due[i] = 0;
    if (percent(30)) {
        copy_old();
        c->copied = after > ANSWER_MS * 500;
        return;
    }
    if (percent(30)) {
        copy(d, after + dice(3000));
        c->copied = after > ANSWER_MS * 500;
        return;
    }
    copy(d, after / 4);
    d->lost = percent(30);
    c->copied = 1;
    sum.raced++;
}

static void count_out(const unsigned char *data, size_t len, const dtls_addr *to)
{
    int there = 0;
    for (struct served *s = w->served; s; s = s->next) {
        struct place *p = &s->at;
        if (!dtls_addr_equal(&p->addr, to))
            continue;
        there++;
        p->out += len;
        p->shared |= data[0] == 22;
        p->asked |= is_path_message(data, len, client_of(s)->suite, s->cid_out);
        if (!p->proven && !p->shared && p->out > UNPROVEN_FACTOR * p->in)
            broken("%zu bytes went to an address that is not proven, and %zu came from there", p->out, p->in);
    }
    if (is_copyist(to) && !there)
        broken("%zu bytes went to somebody who copies, and nobody was there", len);
}

static void count_in(const struct datagram *d)
{
    for (struct served *s = w->served; s; s = s->next) {
        struct place *p = &s->at;
        uint64_t sequence = sequence_of(d->data);
        if (!dtls_addr_equal(&p->addr, &d->from) || s->client + 1 != d->client || s->life != d->life ||
            d->data[4] != 1 || p->proven)
            continue;
        p->in += d->len;
        if (s->cid_in >= 0) /* then it can be asked */
            p->proven =
                p->asked && !is_copyist(&d->from) && is_path_message(d->data, d->len, client_of(s)->suite, s->cid_in);
        else
            p->proven = sequence > p->sequence;
        p->sure = s->cid_in < 0 && p->proven && !d->damaged;
    }
}

static int moving_send(int from_server, const unsigned char *data, size_t len, const dtls_addr *from,
                       const dtls_addr *to)
{
    struct client *c = NULL;
    dtls_addr seen = *from;
    sum.datagrams++;
    if (w->muted)
        return 0;
    if (from_server) {
        count_out(data, len, to);
    } else {
        for (int i = 0; i < w->clients_len; i++)
            if (dtls_addr_equal(&w->clients[i].addr, from))
                c = &w->clients[i];
        seen = c->shown;
        c->copied = 0;
        if (is_hello(data, len)) {
            c->shaking = 1;
            c->ready = 0;
            expect_nothing(c);
            w->hellos[w->hellos_len++ % HELLOS_MAX] = (struct hello){seen, c, now_us};
        }
    }
    if (now_us < w->cut_until || percent(w->loss))
        return 0;
    for (int copies = 1 + percent(w->twice); copies > 0; copies--) {
        int copied = c && !is_hello(data, len) && copies_now() && percent(w->copying);
        int64_t after = delay() + (copied && percent(20) ? dice(300000) : 0);
        struct datagram *d = fly(data, len, &seen, to, after);
        if (c) {
            d->client = client_number(c) + 1;
            d->life = c->life;
        }
        if (copied)
            copy_new(c, d, after);
        if (percent(w->damage))
            damage(d);
    }
    return 0;
}

static void moving_arrive(struct datagram *d)
{
    struct client *c = client_at(&d->to);
    if (d->lost)
        return;
    w->arriving = d;
    if (d->to.port == SERVER_PORT) {
        if (d->client)
            w->clients[d->client - 1].damaged += d->damaged;
        count_in(d);
        dtls_endpoint_input(w->server, d->data, d->len, &d->from, &d->to);
        expect_home(d);
    } else if (c) {
        c->damaged += d->damaged;
        dtls_endpoint_input(c->ep, d->data, d->len, &d->from, &c->addr);
    }
    w->arriving = NULL;
}

/* A NAT gives a client another address, which nobody else has. */
static void client_moves(struct client *c, const dtls_addr *to)
{
    c->before = c->shown;
    c->shown = *to;
    expect_nothing(c);
    sum.changes++;
    if (!c->conn)
        return;
    c->moved_early += !c->open;
    c->trouble = 1;
    if (c->shaking || !c->ready)
        c->excused = 1;
    if (verbose)
        printf("# %8.3f client %u moves to 10.9.0.%d:%d\n", (double)now_us / 1e6, client_number(c), to->ip[3],
               to->port);
}

static dtls_addr fresh_port(const dtls_addr *at)
{
    dtls_addr addr = *at;
    addr.port = w->nat_port++;
    return addr;
}

static void swap_clients(struct client *a, struct client *b)
{
    dtls_addr seen = a->shown;
    client_moves(a, &b->shown);
    client_moves(b, &seen);
}

static void nat_restarts(void)
{
    for (int i = 0; i < w->clients_len; i++) {
        dtls_addr to = fresh_port(&w->clients[i].shown);
        if (w->clients[i].behind_nat)
            client_moves(&w->clients[i], &to);
    }
}

static void nat_change(struct client *c, struct client *other)
{
    dtls_addr to = fresh_port(&c->shown), was = c->shown;
    uint32_t what = dice(12);
    if (what == 0) {
        nat_restarts();
    } else if (what < 4 && c != other) {
        swap_clients(c, other);
    } else if (what < 6 && c != other) { /* somebody gets at once what another had */
        client_moves(c, &to);
        client_moves(other, &was);
    } else if (what < 8 && !client_at(&c->before)) {
        to = c->before;
        client_moves(c, &to);
    } else {
        if (what < 10)
            to.ip[3] = (uint8_t)(1 + dice(NAT_IPS));
        client_moves(c, &to);
    }
}

static void nat_turn(void *user)
{
    (void)user;
    if (w->ending)
        return;
    struct client *c = &w->clients[dice((uint32_t)w->clients_len)],
                  *other = &w->clients[dice((uint32_t)w->clients_len)];
    if ((!w->healed || w->strict) && c->behind_nat)
        nat_change(c, other->behind_nat ? other : c);
    if (copies_now() && percent(30))
        copy_old();
    dtls_timer_set(w->nat_timer, 1 + dice(NAT_MS));
}

/* The server has another connection: whose, the certificate says. */
static void served_begins(struct served *s, dtls_conn *conn)
{
    dtls_info info;
    dtls_conn_info(conn, &info);
    s->conn = conn;
    if (sscanf(info.peer_name, "client %u", &s->client) != 1 || !client_of(s))
        broken("a connection of %s", info.peer_name);
    client_of(s)->ready = 1;
    s->life = client_of(s)->life;
    s->at.addr = s->born = info.peer;
    s->at.proven = s->at.sure = 1;
    s->cid_in = info.cid_in;
    s->cid_out = info.cid_out;
    s->next = w->served;
    w->served = s;
}

static void served_moves(struct served *s, const dtls_addr *before)
{
    dtls_info info;
    const struct client *c = client_of(s);
    dtls_conn_info(s->conn, &info);
    if (!dtls_addr_equal(before, &s->at.addr) || dtls_addr_equal(before, &info.peer))
        broken("a connection moved from where it was not, or to where it was");
    if (info.moves != ++s->moves || !w->arriving || !dtls_addr_equal(&w->arriving->from, &info.peer))
        broken("a connection moved without a reason");
    if (w->arriving->client != s->client + 1 || w->arriving->life != s->life)
        broken("a connection of client %u moved, and client %d sent that", s->client, (int)w->arriving->client - 1);
    uint64_t sequence = sequence_of(w->arriving->data);
    int back = was_proven(s, &info.peer) && (!s->at.proven || now_us - s->at.since < OLD_GOOD_MS * (int64_t)1000);
    if (sequence < s->newest || (sequence == s->newest && !back && s->newest > 0))
        broken("a connection of client %u moved by what is not new", s->client);
    s->home_sequence = s->at.sure && w->arriving->copy ? sequence : 0;
    s->home_len = w->arriving->len; /* what another association of its sent may have the same number */
    s->home = s->at.addr;
    s->home_by = 0;
    if (s->home_sequence && s->cid_in >= 0 && w->strict && c->conn && c->life == s->life && !c->shaking &&
        dtls_addr_equal(&s->home, &c->shown))
        s->home_by = now_us + ANSWER_MS * (int64_t)1000;
    if (s->at.proven)
        s->proven[s->proven_len++ % PROVEN_MAX] = s->at.addr;
    s->at = (struct place){
        .addr = info.peer, .in = w->arriving->len, .sequence = sequence, .proven = back, .since = now_us};
    s->at.shared = others_at(s, &info.peer);
    w->moved++;
    sum.moves++;
    sum.unproven += !back && !s->at.shared;
}

/* A message came. If it is the newest, its client is there, and only there, from now on; what asks whether it is somewhere
 * has numbers, too. */
static void served_hears(struct served *s, const dtls_addr *peer)
{
    uint64_t sequence = w->arriving && w->arriving->data[4] == 1 ? sequence_of(w->arriving->data) : 0;
    if (s->cid_in < 0 && sequence > s->newest && !dtls_addr_equal(peer, &w->arriving->from))
        broken("the newest message of client %u came from elsewhere", s->client);
    if (sequence > s->newest)
        s->newest = sequence;
}

/* It says more than it is asked. */
static void served_tells(struct served *s)
{
    unsigned char buf[sizeof(struct message) + 1200];
    struct client *c = client_of(s);
    if (percent(70) || s->life != c->life)
        return;
    for (uint32_t n = 1 + dice(6); n > 0 && c->extras < MESSAGES_MAX; n--) {
        struct message m = {s->client, s->life, 0, c->extras, (uint32_t)sizeof m + dice(1200)};
        memcpy(buf, &m, sizeof m);
        for (uint32_t i = sizeof m; i < m.len; i++)
            buf[i] = pattern(&m, i);
        int r = dtls_conn_send(s->conn, buf, m.len);
        sum.limited += r == DTLS_ERR_AGAIN;
        c->extras += r == 0;
        if (r != 0 && (r != DTLS_ERR_AGAIN || s->at.sure))
            broken("a message was refused: %s", dtls_strerror(r));
    }
}

/* No move ends a connection. Its client does, or somebody who has its old address now begins another one there. */
static void served_ends(struct served *s, dtls_reason reason)
{
    struct client *c = client_of(s);
    struct served **at = &w->served;
    int newest = served_of(c) == s, live = c->conn && c->open && c->life == s->life && c->ready && newest;
    while (*at != s)
        at = &(*at)->next;
    *at = s->next;
    if (live && reason == DTLS_CLOSE_REPLACED) {
        if (!dtls_addr_equal(&s->at.addr, &s->born) || !hello_from(&s->at.addr, c))
            broken("the connection of client %u was replaced by nobody's", s->client);
        sum.taken++;
        c->excused = 1;
        expect_nothing(c);
    } else if (live && !(reason == DTLS_CLOSE_LOCAL && w->muted) &&
               !(reason == DTLS_CLOSE_PEER && c->excused) && /* one from before its renewal, which was replaced */
               !(reason == DTLS_CLOSE_IDLE && (c->excused || c->unknown || !w->strict))) {
        broken("the connection of client %u was closed: %s", s->client, dtls_conn_reason_text(s->conn));
    }
}

static void moves_check(void)
{
    dtls_counters n;
    dtls_endpoint_counters(w->server, &n);
    if (n.moves != w->moved)
        broken("%llu moves were counted, and %lu seen", (unsigned long long)n.moves, w->moved);
    w->moved = 0;
    sum.trials += (long)n.trials;
    for (int i = 0; i < w->clients_len; i++) {
        dtls_endpoint_counters(w->clients[i].ep, &n);
        if (n.moves != 0 || n.trials != 0)
            broken("client %d moved", i);
    }
}

/* ---- the server ---- */

static void server_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct served *s = dtls_conn_user(conn);
    dtls_info info;
    if (event == DTLS_EV_CONNECTED) {
        s = calloc(1, sizeof *s);
        dtls_conn_set_user(conn, s);
        w->serving++;
        if (moving)
            served_begins(s, conn);
    } else if (event == DTLS_EV_MESSAGE) {
        struct message m = message_check(data, len);
        dtls_conn_info(conn, &info);
        if (!s->used) {
            s->first = m;
            s->life = m.life; /* a handshake may be done after its client has left, and begun another */
        }
        s->used = 1;
        if ((moving ? m.client != s->client : m.port != info.peer.port) || m.client != s->first.client ||
            m.life != s->first.life)
            broken("client %u life %u got into the connection of client %u life %u", m.client, m.life, s->first.client,
                   s->first.life);
        if (moving)
            served_hears(s, &info.peer);
        once(s->seen, &m);
        dtls_conn_send(conn, data, len);
        if (moving)
            served_tells(s);
    } else if (event == DTLS_EV_MOVED) {
        if (!moving)
            broken("a connection moved");
        served_moves(s, data);
    } else if (event == DTLS_EV_CLOSED) {
        if (!s)
            broken("a connection closed twice, or before it was open");
        if (moving)
            served_ends(s, dtls_conn_reason(conn));
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

static int on_client_ctx(void *user, SSL_CTX *ctx)
{
    const struct client *c = user;
    return on_ssl_ctx(c->id, ctx) || SSL_CTX_set_cipher_list(ctx, suites[c->suite]) != 1;
}

static int on_server_ctx(void *user, SSL_CTX *ctx)
{
    char all[200] = "";
    for (int i = 0; i < SUITES; i++)
        snprintf(all + strlen(all), sizeof all - strlen(all), "%s%s", i > 0 ? ":" : "", suites[i]);
    return on_ssl_ctx(user, ctx) || (moving && SSL_CTX_set_cipher_list(ctx, all) != 1);
}

/* With what is handed to its callbacks: an identity, or a client. */
static dtls_endpoint *endpoint(void *user, dtls_config cfg)
{
    dtls_error err;
    cfg.on_log = on_log;
    cfg.on_ssl_ctx = cfg.on_ssl_ctx ? cfg.on_ssl_ctx : on_ssl_ctx;
    cfg.user = user;
    cfg.send = on_send;
    dtls_endpoint *ep = dtls_endpoint_new(w->loop, &cfg, &err);
    if (!ep)
        broken("%s", err.text);
    return ep;
}

static void server_start(void)
{
    w->server = endpoint(&server_id, (dtls_config){.on_event = server_event,
                                                   .on_ssl_ctx = on_server_ctx,
                                                   .cid_bytes = w->server_cid,
                                                   .idle_timeout_ms = 20000,
                                                   .max_handshakes = w->max_handshakes});
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
    if (moving)
        moves_check();
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
    c->offered = t.session && c->server == sum.restarts && !c->given_up && !moving;
    c->excused = c->unknown = c->moved_early = 0;
    c->extras = 0;
    memset(c->seen_extras, 0, sizeof c->seen_extras);
    expect_nothing(c);
    c->life++;
    memset(c->seen, 0, sizeof c->seen);
    c->conn = dtls_endpoint_connect(c->ep, &t, &err);
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
        dtls_addr addr = c->addr, shown = c->shown;
        int given_up = c->given_up;
        c->addr = other->addr;
        c->shown = other->shown;
        c->given_up = other->given_up;
        other->addr = addr;
        other->shown = shown;
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
    if (moving)
        expect_answers(c);
    dtls_conn_info(c->conn, &info);
    if (info.connected && c->sent < MESSAGES_MAX) {
        size_t n = message_make(buf, c);
        if (dtls_conn_send(c->conn, buf, n) != 0)
            broken("a message of %zu bytes was refused", n);
        if (moving)
            expect_answer(c, c->sent - 1);
    }
    if (info.connected && w->unanswered_ms && percent(3) && dtls_conn_renew(c->conn) != 0)
        broken("a renewal was refused");
    if (percent(w->leave) || c->sent == MESSAGES_MAX)
        client_leave(c);
    dtls_timer_set(c->timer, 1 + dice(w->healed && !w->strict ? 10000 : 1500));
}

static void client_connected(struct client *c)
{
    dtls_info info;
    dtls_conn_info(c->conn, &info);
    int64_t slot = (now_us - c->connecting_at) / 1000 / HISTOGRAM_MS;
    c->open = 1;
    c->shaking = 0;
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
        int excused = (c->trouble && !(w->strict && c->moved_early < 2)) || c->damaged > DAMAGE_ENDURED ||
                      (reason == DTLS_CLOSE_TIMEOUT && w->loss > 0);
        sum.late += !c->trouble && reason == DTLS_CLOSE_TIMEOUT;
        if (excused)
            return;
    }
    broken("client %u failed for no reason: %s", client_number(c), text);
}

/* No move ends a connection, but where it cannot be known any more. */
static void client_closed(struct client *c, dtls_reason reason, const char *text)
{
    expect_answers(c);
    expect_nothing(c);
    if (c->open && reason != DTLS_CLOSE_LOCAL && reason != DTLS_CLOSE_IDLE)
        broken("the connection of client %u was closed: %s", client_number(c), text);
    if (c->open && w->strict && now_us - w->strict_since > IDLE_MS * (int64_t)1000 && reason == DTLS_CLOSE_IDLE &&
        !c->excused && !c->unknown)
        broken("client %u got no answers: %s", client_number(c), text);
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
        c->shaking = c->excused = 0;
        expect_nothing(c);
        SSL_SESSION_free(c->session);
        c->session = dtls_conn_session(c->conn);
        c->server = c->trouble ? -1 : sum.restarts;
    } else if (event == DTLS_EV_MESSAGE) {
        struct message m = message_check(data, len);
        if (m.client != client_number(c) || m.life != c->life)
            broken("client %u got an answer to client %u", client_number(c), m.client);
        once(m.port ? c->seen : c->seen_extras, &m);
        if (m.port == 0)
            return;
        c->due[m.number] = 0;
        c->unknown = 0;
        c->answered_at = now_us;
    } else if (event == DTLS_EV_CLOSED) {
        dtls_reason reason = dtls_conn_reason(conn);
        c->given_up = !c->open || w->unanswered_ms; /* a renewal may have been under way */
        c->conn = NULL;
        if (moving)
            client_closed(c, reason, dtls_conn_reason_text(conn));
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

/* Each client has its own certificate, suite and connection IDs, and some are behind the NAT. */
static void moves_begin(void)
{
    w->max_handshakes = w->forging = 0;
    w->copying = percent(70) ? 5 + (int)dice(40) : 0;
    w->server_cid = percent(60) ? 0 : cids[dice(CIDS)];
    w->nat_port = NAT_PORT;
    for (int i = 0; i < w->clients_len; i++) {
        struct client *c = &w->clients[i];
        c->id = &client_ids[i];
        c->suite = (int)dice(SUITES);
        c->cid_bytes = cids[dice(CIDS)];
        c->behind_nat = percent(75);
    }
}

static void moves_go(void)
{
    dtls_config cfg = {.on_event = client_event, .on_ssl_ctx = on_client_ctx, .idle_timeout_ms = IDLE_MS};
    cfg.unanswered_ms = w->unanswered_ms;
    for (int i = 0; i < w->clients_len; i++) {
        struct client *c = &w->clients[i];
        cfg.cid_bytes = c->cid_bytes;
        c->ep = endpoint(c, cfg);
        if (c->behind_nat)
            c->shown = (dtls_addr){.ip = {10, 9, 0, 1}, .port = w->nat_port++, .family = 4};
        c->before = c->shown;
    }
    w->nat_timer = dtls_timer_new(w->loop, nat_turn, NULL);
    dtls_timer_set(w->nat_timer, 1000);
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
    if (moving)
        moves_begin();
    w->loop = dtls_loop_new(&(dtls_loop_config){.now_us = slow_clock});
    server_start();
    w->clients_ep = endpoint(
        &client_id,
        (dtls_config){.on_event = client_event, .idle_timeout_ms = IDLE_MS, .unanswered_ms = w->unanswered_ms});
    if (w->max_handshakes) {
        w->mean = endpoint(&client_id, (dtls_config){.on_event = mean_event});
        w->mean_timer = dtls_timer_new(w->loop, mean_turn, NULL);
        dtls_timer_set(w->mean_timer, 1000);
    }
    for (int i = 0; i < w->clients_len; i++) {
        struct client *c = &w->clients[i];
        c->addr = (dtls_addr){.ip = {10, 0, 0, 2}, .port = (uint16_t)(CLIENT_PORT + i), .family = 4};
        c->shown = c->addr;
        c->ep = w->clients_ep;
        c->timer = dtls_timer_new(w->loop, client_turn, c);
        dtls_timer_set(c->timer, dice(3000));
    }
    if (moving)
        moves_go();
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

/* Now that nothing is lost, addresses go on changing, and clients come and go. */
static void world_move(void)
{
    w->strict = 1;
    w->leave = 3;
    w->strict_since = now_us;
    advance(now_us + MOVES_MS * (int64_t)1000);
    for (int i = 0; i < w->clients_len; i++)
        expect_answers(&w->clients[i]);
    w->strict = 0;
}

static void moves_end(void)
{
    moves_check();
    dtls_timer_free(w->nat_timer);
    for (int i = 0; i < w->clients_len; i++)
        empty(w->clients[i].ep, "client");
    for (int i = 0; i < KEPT_MAX; i++)
        if (w->kept[i])
            datagram_free(w->kept[i]);
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
    if (moving)
        moves_end();
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
    if (moving)
        world_move();
    world_end();
    sum.worlds++;
    OPENSSL_thread_stop(); /* frees the error queue, which keeps old texts */
    if (sum.worlds > WARM_UP_WORLDS && held > held_before && ++kept > KEPT + (moving ? FIRST_USES : 0))
        broken("OpenSSL holds %ld allocations more than before this world", held - held_before);
    held_before = held;
}

/* ---- all cores ---- */

static long worlds, processes;
static uint64_t first;
static int loss_wanted = -1;

static void identities_free(void)
{
    for (int i = 0; i < CLIENTS_MAX; i++)
        identity_free(&client_ids[i]);
    virtual_identities_free();
}

/* The share of one process: every so manieth seed. */
static void child(long number, int out)
{
    for (long i = number; i < worlds; i += processes)
        world_run(first + (uint64_t)i, loss_wanted);
    identities_free();
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

static void report_moves(void)
{
    printf(
        "# simulate: %ld worlds in which clients move: %ld associations (%ld renewals), %ld messages, %ld of which had "
        "to be answered at once; %ld addresses were taken by others\n",
        sum.worlds, sum.associations, sum.renewed, sum.messages, sum.expected, sum.taken);
    printf("# simulate: %ld addresses changed, %ld moves, %ld to a place to be proven, %ld messages refused there; %ld "
           "keys tried; %ld copies, %ld of them first\n",
           sum.changes, sum.moves, sum.unproven, sum.limited, sum.trials, sum.copies, sum.raced);
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

/* The first is the worlds as they are, the second those in which clients move. */
static int run_pass(int moves, long n)
{
    struct timespec began, ended;
    moving = moves;
    worlds = n;
    memset(&sum, 0, sizeof sum);
    clock_gettime(CLOCK_MONOTONIC, &began);
    int failed = run_all();
    clock_gettime(CLOCK_MONOTONIC, &ended);
    if (moves) {
        report_moves();
        if (!failed && worlds >= MOVES_ENOUGH &&
            (!sum.changes || !sum.moves || !sum.trials || !sum.copies || !sum.raced || !sum.unproven || !sum.limited))
            failed = printf("not ok - simulate: nobody moved, or nothing was copied\n");
        return failed;
    }
    report((double)(ended.tv_sec - began.tv_sec) + (double)(ended.tv_nsec - began.tv_nsec) / 1e9);
    if (sum.late > 1 + sum.associations / LATE_ONE_IN)
        failed = printf("not ok - simulate: too many undisturbed handshakes missed their deadline\n");
    return failed;
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    int moves = argc > 1 && strcmp(argv[1], "moves") == 0;
    argc -= moves;
    argv += moves;
    if (argc < 2 || !CRYPTO_set_mem_functions(held_malloc, held_realloc, held_free))
        return 2;
    verbose = strcmp(argv[1], "-v") == 0;
    long wanted = verbose ? 1 : atol(argv[1]);
    first = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    loss_wanted = argc > 3 ? atoi(argv[3]) : -1;
    processes = sysconf(_SC_NPROCESSORS_ONLN);
    processes = verbose || processes < 1 ? 1 : processes > 64 ? 64 : processes;
    virtual_chance();
    virtual_identities();
    for (int i = 0; i < CLIENTS_MAX; i++) {
        char name[40];
        snprintf(name, sizeof name, "client %d", i);
        client_ids[i] = issue(10 + i, name, "clientAuth");
    }
    int failed = 0;
    if (!moves)
        failed |= run_pass(0, wanted);
    if (moves || !verbose)
        failed |= run_pass(1, moves ? wanted : (wanted + MOVES_SHARE - 1) / MOVES_SHARE);
    identities_free();
    if (!failed)
        printf("ok - simulate %ld worlds\n", wanted);
    return failed ? 1 : 0;
}
