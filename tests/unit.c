/* Unit tests of the parts that nothing outside dtls.c can reach: they see its static functions by including it. check.h
 * says how this runs. */
#define DTLS_MAIN
#define main program_main
#include "../dtls.c"
#undef main

#include "check.h"
#include "vectors.h"

#include <pthread.h>

/* ---- addresses ---- */

static bool parses(const char *text, const char *back)
{
    dtls_addr a;
    char buf[DTLS_ADDR_TEXT];
    return dtls_addr_parse(&a, text, NULL) == 0 && strcmp(dtls_addr_format(&a, buf, sizeof buf), back) == 0;
}

static bool refused(const char *text, const char *word)
{
    dtls_addr a;
    dtls_error err = {0};
    return dtls_addr_parse(&a, text, &err) == DTLS_ERR_ADDR && err.code == DTLS_ERR_ADDR && strstr(err.text, word);
}

static void test_addresses(void)
{
    CHECK(parses("127.0.0.1:1234", "127.0.0.1:1234"));
    CHECK(parses("0.0.0.0:0", "0.0.0.0:0"));
    CHECK(parses("[::1]:65535", "[::1]:65535"));
    CHECK(parses("[2001:DB8::0001]:1", "[2001:db8::1]:1"));
    CHECK(parses("[::ffff:127.0.0.1]:1234", "127.0.0.1:1234"));
    CHECK(parses("[fe80::1%lo]:1234", "[fe80::1%lo]:1234"));
    CHECK(parses("[fe80::1%1]:1234", "[fe80::1%lo]:1234"));
    CHECK(parses("[2001:db8::1%lo]:1234", "[2001:db8::1]:1234")); /* only link-local addresses have a scope */
    CHECK(
        parses("[fe80::1%4294967295]:1", "[fe80::1%4294967295]:1")); /* no such interface, and still the same address */
    CHECK(refused("[fe80::1%4294967296]:1", "no interface"));
    CHECK(refused("two\nlines\x7f", "two?lines?"));
    CHECK(refused("[fe80::1%0]:1", "no interface"));
    CHECK(refused("127.0.0.1:12345678901", "65535"));
    CHECK(refused("127.0.0.1", "no port"));
    CHECK(refused("[::1]", "no port"));
    CHECK(refused("[::1]1234", "no port"));
    CHECK(refused("", "no port"));
    CHECK(refused("::1:1234", "brackets"));
    CHECK(refused("127.0.0.1:70000", "65535"));
    CHECK(refused("127.0.0.1:", "65535"));
    CHECK(refused("127.0.0.1:-1", "65535"));
    CHECK(refused("127.0.0.1:1x", "65535"));
    CHECK(refused("127.0.0.1:000001", "65535"));
    CHECK(refused("127.0.0.256:1", "IPv4"));
    CHECK(refused("localhost:1", "IPv4"));
    CHECK(refused("[127.0.0.1]:1", "IPv6"));
    CHECK(refused("[]:1", "IPv6"));
    CHECK(refused("[fe80::1%nosuch0]:1", "nosuch0"));
    CHECK(refused("[00000000000000000000000000000000000000000000000000000000000000000000000000000000000000]:1",
                  "not an"));
}

static void test_address_forms(void)
{
    struct sockaddr_in6 mapped = {.sin6_family = AF_INET6, .sin6_port = htons(7)};
    struct sockaddr_in plain = {.sin_family = AF_INET, .sin_port = htons(7)};
    struct sockaddr_storage ss;
    dtls_addr a, b;
    uint8_t packed[2][ADDR_PACKED];
    inet_pton(AF_INET6, "::ffff:10.1.2.3", &mapped.sin6_addr);
    inet_pton(AF_INET, "10.1.2.3", &plain.sin_addr);
    memset(&a, 0xaa, sizeof a);
    memset(&b, 0x55, sizeof b);
    CHECK(dtls_addr_from_sockaddr(&a, (struct sockaddr *)&mapped, sizeof mapped) == 0);
    CHECK(dtls_addr_from_sockaddr(&b, (struct sockaddr *)&plain, sizeof plain) == 0);
    CHECK(dtls_addr_equal(&a, &b) && memcmp(&a, &b, sizeof a) == 0);
    addr_pack(&a, packed[0]);
    addr_pack(&b, packed[1]);
    CHECK(memcmp(packed[0], packed[1], ADDR_PACKED) == 0);
    CHECK(dtls_addr_from_sockaddr(&a, (struct sockaddr *)&plain, 3) == DTLS_ERR_ADDR);
    dtls_addr_parse(&a, "[fe80::1%lo]:9", NULL);
    socklen_t len = addr_to_sockaddr(&a, &ss);
    CHECK(dtls_addr_from_sockaddr(&b, (struct sockaddr *)&ss, len) == 0 && dtls_addr_equal(&a, &b));
    dtls_addr_parse(&b, "[fe80::1]:9", NULL);
    CHECK(!dtls_addr_equal(&a, &b));
}

static void test_siphash(void)
{
    /* The first vectors of the reference implementation: key 00..0f, input 00.. of 0, 1, 8 and 15 bytes. */
    uint8_t key[16], data[16];
    for (int i = 0; i < 16; i++)
        key[i] = data[i] = (uint8_t)i;
    CHECK(siphash(key, data, 0) == 0x726fdb47dd0e0e31);
    CHECK(siphash(key, data, 1) == 0x74f839c593dc67fd);
    CHECK(siphash(key, data, 8) == 0x93f5f5799a932462);
    CHECK(siphash(key, data, 15) == 0xa129ca6149be45e5);
}

/* ---- loop ---- */

static int64_t fake_now;
static int64_t fake_clock(void *user)
{
    (void)user;
    return fake_now;
}

static int fired_order[1000], fired_len;
static struct timer many[1000];
static void fire(void *user)
{
    fired_order[fired_len++] = (int)((struct timer *)user - many);
}

static void test_timer_heap(void)
{
    dtls_loop *l = dtls_loop_new(&(dtls_loop_config){.now_us = fake_clock});
    unsigned seed = 1;
    bool set[1000] = {false}, ordered = true;
    int expected = 0;
    fake_now = 0;
    fired_len = 0;
    for (int i = 0; i < 1000; i++)
        CHECK(timer_init(l, &many[i], fire, &many[i]) == 0);
    for (int step = 0; step < 20000; step++) {
        seed = seed * 1103515245 + 12345;
        int i = (int)(seed >> 8) % 1000;
        set[i] = seed >> 28 != 0;
        if (set[i])
            timer_set(l, &many[i], (int64_t)(seed >> 4 & 0xffff));
        else
            timer_stop(l, &many[i]);
    }
    for (int i = 0; i < 1000; i++)
        expected += set[i];
    CHECK(l->heap_len == (size_t)expected);
    fake_now = 0x8000;
    timer_run(l);
    for (int i = 0; i < fired_len; i++) {
        ordered = ordered && many[fired_order[i]].at_us <= fake_now && set[fired_order[i]];
        ordered = ordered && (i == 0 || many[fired_order[i - 1]].at_us <= many[fired_order[i]].at_us);
    }
    CHECK(ordered && fired_len > 100 && fired_len < expected);
    CHECK(l->heap_len == 0 || l->heap[1]->at_us > fake_now);
    for (int i = 0; i < 1000; i++)
        timer_done(l, &many[i]);
    CHECK(l->heap_len == 0 && l->timers == 0);
    dtls_loop_free(l);
}

static int again_count;
static void fire_again(void *user)
{
    again_count++;
    dtls_timer_set(*(dtls_timer **)user, 0);
}

static void test_timers(void)
{
    dtls_loop *l = dtls_loop_new(&(dtls_loop_config){.now_us = fake_clock});
    dtls_timer *t = dtls_timer_new(l, fire_again, &t);
    fake_now = 1000;
    again_count = 0;
    CHECK(dtls_loop_timeout(l) == -1);
    dtls_timer_set(t, 5);
    CHECK(dtls_loop_timeout(l) == 5);
    fake_now += 4001;
    CHECK(dtls_loop_timeout(l) == 1); /* rounded up */
    CHECK(dtls_loop_poll(l, 0) == 0 && again_count == 0);
    fake_now += 999;
    CHECK(dtls_loop_timeout(l) == 0);
    CHECK(dtls_loop_poll(l, 0) == 0 && again_count == 1); /* set to now again, but the turn ends */
    CHECK(dtls_loop_poll(l, 0) == 0 && again_count == 2);
    dtls_timer_set(t, -1);
    CHECK(dtls_loop_timeout(l) == -1);
    dtls_timer_free(t);
    dtls_loop_free(l);
}

static dtls_watch *watch_other;
static int watch_calls;
static void watch_free_other(void *user, int fd, unsigned events)
{
    dtls_watch **mine = user;
    (void)fd;
    watch_calls += events == DTLS_READ;
    dtls_watch_free(watch_other); /* both are readable: the other one's event of this turn must not come */
    dtls_watch_free(*mine);
    watch_other = NULL;
}

static void test_watches(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    int a[2], b[2];
    CHECK(pipe(a) == 0 && pipe(b) == 0);
    CHECK(write(a[1], "x", 1) == 1 && write(b[1], "x", 1) == 1);
    dtls_watch *first = NULL, *second = NULL;
    first = dtls_watch_new(l, a[0], DTLS_READ, watch_free_other, &first);
    second = dtls_watch_new(l, b[0], DTLS_READ, watch_free_other, &second);
    watch_other = second; /* whichever comes first ends both */
    watch_calls = 0;
    CHECK(dtls_loop_poll(l, 1000) == 0 && watch_calls >= 1);
    CHECK(dtls_loop_poll(l, 0) == 0 && watch_calls == 1);
    for (int i = 0; i < 2; i++) {
        close(a[i]);
        close(b[i]);
    }
    dtls_loop_free(l);
}

static int posted_next, posted_bad;
static void posted(void *arg)
{
    posted_bad += (int)(intptr_t)arg != posted_next++;
}

static void *post_thread(void *user)
{
    for (int i = 0; i < 1000; i++)
        while (dtls_loop_post(user, posted, (void *)(intptr_t)i) != 0)
            ;
    return NULL;
}

static void test_posts(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    pthread_t thread;
    posted_next = posted_bad = 0;
    CHECK(pthread_create(&thread, NULL, post_thread, l) == 0);
    for (int i = 0; i < 5000 && posted_next < 1000; i++)
        dtls_loop_poll(l, 1000); /* woken by the posts, not by this limit */
    pthread_join(thread, NULL);
    CHECK(posted_next == 1000 && posted_bad == 0);
    for (int i = 0; i < POSTS_MAX; i++)
        if (dtls_loop_post(l, posted, NULL) != 0)
            posted_bad++;
    CHECK(posted_bad == 0 && dtls_loop_post(l, posted, NULL) == DTLS_ERR_AGAIN);
    dtls_loop_free(l); /* those still waiting are let go */
}

static int signals_seen;
static void on_signal(void *user, int signo)
{
    (void)user;
    signals_seen += signo == SIGUSR1;
}

static void test_signals(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    signals_seen = 0;
    CHECK(dtls_loop_signal(l, SIGUSR1, on_signal, NULL) == 0);
    raise(SIGUSR1);
    dtls_loop_poll(l, 1000);
    CHECK(signals_seen == 1);
    CHECK(dtls_loop_signal(l, SIGUSR1, NULL, NULL) == 0);
    sigset_t now;
    sigprocmask(SIG_BLOCK, NULL, &now);
    CHECK(sigismember(&now, SIGUSR1) == 0);
    for (int i = 0; i < SIGNALS_MAX; i++)
        CHECK(dtls_loop_signal(l, SIGRTMIN + 1 + i, on_signal, NULL) == 0);
    CHECK(dtls_loop_signal(l, SIGUSR1, on_signal, NULL) == DTLS_ERR_LIMIT);
    dtls_loop_free(l);
}

static int poll_result;
static void poll_inside(void *user)
{
    poll_result = dtls_loop_poll(user, 0);
}

static void test_loop_nesting(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_loop_post(l, poll_inside, l);
    CHECK(dtls_loop_timeout(l) == 0);
    dtls_loop_poll(l, 0);
    CHECK(poll_result == DTLS_ERR_STATE);
    dtls_loop_free(l);
    dtls_loop_free(NULL);
}

/* ---- endpoint, BIO, guard ---- */

static dtls_endpoint *make_endpoint_as(const char *who, dtls_loop *l, dtls_config cfg)
{
    char cert[512], key[512], ca[512];
    dtls_error err = {0};
    snprintf(cert, sizeof cert, "%s/%s.pem", certs, who);
    snprintf(key, sizeof key, "%s/%s.key", certs, who);
    snprintf(ca, sizeof ca, "%s/ca.pem", certs);
    cfg.cert_file = cert;
    cfg.key_file = key;
    cfg.ca_file = ca;
    dtls_endpoint *ep = dtls_endpoint_new(l, &cfg, &err);
    if (!ep)
        printf("# %s\n", err.text);
    return ep;
}

static dtls_endpoint *make_endpoint(dtls_loop *l, dtls_config cfg)
{
    return make_endpoint_as("server", l, cfg);
}

static int sent_len, send_refuses;
static unsigned char sent[2048];
static int fake_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    (void)user, (void)from, (void)to;
    if (send_refuses)
        return -1;
    sent_len = (int)len;
    memcpy(sent, data, len < sizeof sent ? len : sizeof sent);
    return 0;
}

static void test_bio(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send = fake_send, .mtu_bytes = 1400});
    struct association *c = assoc_new(ep);
    struct wire *w = &c->wire;
    dtls_addr peer, local = {.family = 4};
    dtls_addr_parse(&peer, "127.0.0.1:1", NULL);
    assoc_set_addresses(c, &peer, &local);
    BIO *b = SSL_get_rbio(c->ssl);
    char out[64];
    CHECK(BIO_read(b, out, sizeof out) == -1 && BIO_should_retry(b));
    CHECK(BIO_ctrl(b, BIO_CTRL_PENDING, 0, NULL) == 0 && BIO_ctrl(b, BIO_CTRL_EOF, 0, NULL) == 1);
    const uint8_t record[16] = {22, 0xfe, 0xff, 0, 0, 9, 9, 9, 9, 9, 9, 0, 3, 'a', 'b', 'c'};
    w->in = record;
    w->in_len = sizeof record;
    CHECK(BIO_ctrl(b, BIO_CTRL_PENDING, 0, NULL) == 16);
    BIO_ctrl(b, BIO_CTRL_DGRAM_SET_PEEK_MODE, 1, NULL);
    CHECK(BIO_read(b, out, sizeof out) == 16 && w->in == record);
    BIO_ctrl(b, BIO_CTRL_DGRAM_SET_PEEK_MODE, 0, NULL);
    w->in_renumber = true;
    w->in_sequence = 0x010203;
    CHECK(BIO_read(b, out, sizeof out) == 16 && memcmp(out + 5, "\0\0\0\1\2\3", 6) == 0 &&
          memcmp(out + 13, "abc", 3) == 0);
    CHECK(BIO_read(b, out, sizeof out) == -1 && BIO_should_retry(b) && w->in_sequence == 0x010204); /* one, then none */
    w->in = record;
    w->in_renumber = false;
    CHECK(BIO_read(b, out, 4) == 4 && BIO_read(b, out, 4) == -1); /* a datagram is read once, cut or not */

    CHECK(BIO_write(b, "xyz", 3) == 3 && sent_len == 3 && ep->counters.datagrams_out == 1);
    send_refuses = 1;
    CHECK(BIO_write(b, "xyz", 3) == -1 && BIO_should_retry(b) && ep->counters.datagrams_out == 1);
    send_refuses = 0;

    CHECK(BIO_ctrl(b, BIO_CTRL_FLUSH, 0, NULL) == 1);
    CHECK(BIO_ctrl(b, BIO_CTRL_DGRAM_QUERY_MTU, 0, NULL) == 1372);
    CHECK(BIO_ctrl(b, BIO_CTRL_DGRAM_GET_MTU_OVERHEAD, 0, NULL) == 28);
    CHECK(BIO_ctrl(b, BIO_CTRL_DGRAM_GET_FALLBACK_MTU, 0, NULL) == 1372); /* it is up to us */
    w->largest = 548;
    CHECK(!wire_fall_back(w) && w->mtu == 1400); /* such a flight is no larger than what would come next */
    w->largest = 1253;
    CHECK(wire_fall_back(w) && w->mtu == 1280 && w->largest == 0);
    CHECK(!wire_fall_back(w));
    w->largest = 1252;
    CHECK(wire_fall_back(w) && w->mtu == 576);
    w->largest = 1252;
    CHECK(!wire_fall_back(w) && BIO_ctrl(b, BIO_CTRL_DGRAM_QUERY_MTU, 0, NULL) == 548);
    dtls_addr_parse(&peer, "[::1]:1", NULL);
    assoc_set_addresses(c, &peer, &local);
    CHECK(BIO_ctrl(b, BIO_CTRL_DGRAM_QUERY_MTU, 0, NULL) == 528); /* what was learnt stays */
    CHECK(BIO_ctrl(b, BIO_CTRL_DGRAM_GET_MTU_OVERHEAD, 0, NULL) == 48);
    const int zero[] = {BIO_CTRL_PUSH,
                        BIO_CTRL_POP,
                        BIO_CTRL_WPENDING,
                        BIO_CTRL_DGRAM_GET_PEER,
                        BIO_CTRL_DGRAM_SET_PEER,
                        BIO_CTRL_DGRAM_SET_CONNECTED,
                        BIO_CTRL_DGRAM_SET_NEXT_TIMEOUT,
                        73,
                        76,
                        999,
                        -1};
    struct timeval tv = {0, 0};
    for (size_t i = 0; i < sizeof zero / sizeof *zero; i++)
        CHECK(BIO_ctrl(b, zero[i], 0, &tv) == 0);
    assoc_destroy(&c->object);
    dtls_loop_free(l);
}

/* While a flight is attached what libssl writes is packed, and what the transport refuses counts as lost. */
static void test_flights(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send = fake_send, .mtu_bytes = 1400});
    struct association *a = assoc_new(ep);
    dtls_addr peer, local = {.family = 4};
    struct flight flight;
    char piece[600] = "";
    dtls_addr_parse(&peer, "127.0.0.1:1", NULL);
    assoc_set_addresses(a, &peer, &local);
    BIO *b = SSL_get_rbio(a->ssl);
    flight_begin(&a->wire, &flight, false);
    CHECK(BIO_write(b, piece, 600) == 600 && BIO_write(b, piece, 600) == 600 && ep->counters.datagrams_out == 0);
    CHECK(BIO_write(b, piece, 200) == 200 && ep->counters.datagrams_out == 1 && sent_len == 1200);
    flight_end(&a->wire);
    CHECK(ep->counters.datagrams_out == 2 && sent_len == 200);
    flight_begin(&a->wire, &flight, true); /* smaller ones */
    CHECK(BIO_write(b, piece, 500) == 500 && BIO_write(b, piece, 100) == 100 && sent_len == 500);
    CHECK(BIO_write(b, piece, 600) == 600 && sent_len == 600 && ep->counters.datagrams_out == 5); /* larger than room */
    send_refuses = 1;
    CHECK(BIO_write(b, piece, 10) == 10);
    flight_end(&a->wire);
    send_refuses = 0;
    CHECK(ep->counters.datagrams_out == 5 && ep->counters.dropped[DTLS_DROP_SEND] == 1);
    assoc_destroy(&a->object);
    dtls_loop_free(l);
}

/* A record, for the guard. */
static struct record rec(unsigned type, unsigned epoch, const void *body, size_t len)
{
    static uint8_t bytes[2048];
    struct record r = {.size = 0};
    bytes[0] = (uint8_t)type;
    bytes[1] = 0xfe;
    bytes[2] = 0xfd;
    bytes[3] = 0;
    bytes[4] = (uint8_t)epoch;
    memset(bytes + 5, 0, 6);
    bytes[11] = (uint8_t)(len >> 8);
    bytes[12] = (uint8_t)len;
    memcpy(bytes + RECORD_HEADER, body, len);
    CHECK(record_parse(bytes, RECORD_HEADER + len, &r));
    return r;
}

static int guard(const struct guard *g, unsigned type, unsigned epoch, const void *body, size_t len)
{
    struct record r = rec(type, epoch, body, len);
    return guard_handshake(g, &r);
}

static int open_guard(size_t overhead, unsigned type, unsigned epoch, const void *body, size_t len)
{
    struct record r = rec(type, epoch, body, len);
    return guard_open(overhead, &r);
}

static void test_records(void)
{
    uint8_t p[RECORD_HEADER + 4] = {22, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 1, 2, 0, 4};
    struct record r;
    CHECK(record_parse(p, sizeof p, &r) && r.type == 22 && r.epoch == 1 && r.sequence == 0x102 && r.body_len == 4);
    CHECK(!record_parse(p, sizeof p - 1, &r)); /* cut short */
    for (size_t n = 0; n <= RECORD_HEADER; n++)
        CHECK(!record_parse(p, n, &r));
    p[12] = 0;
    CHECK(!record_parse(p, sizeof p, &r)); /* empty */
    p[12] = 4;
    p[0] = 24;
    CHECK(!record_parse(p, sizeof p, &r));
    p[0] = 19;
    CHECK(!record_parse(p, sizeof p, &r));
    p[0] = 22;
    p[1] = 3;
    CHECK(!record_parse(p, sizeof p, &r));
    p[1] = 0xfe;
    p[2] = 0xfc;
    CHECK(!record_parse(p, sizeof p, &r));
    p[2] = 0xff;
    CHECK(record_parse(p, sizeof p, &r));
    p[11] = 0xff;
    CHECK(!record_parse(p, sizeof p, &r));
}

static void test_guard(void)
{
    struct guard server = {.server = true, .asks = true, .answered = true}, *c = &server;
    uint8_t body[64] = {0};
    const uint8_t fatal[2] = {2, 48}, warning[2] = {1, 90}, close_notify[2] = {1, 0};

    /* In a handshake. */
    CHECK(guard(c, TYPE_DATA, 0, body, 8) == DTLS_DROP_DATA);
    CHECK(guard(c, TYPE_ALERT, 0, warning, 2) == DTLS_DROP_ALERT);
    CHECK(guard(c, TYPE_ALERT, 0, close_notify, 2) == GUARD_CLAIM);
    CHECK(guard(c, TYPE_ALERT, 0, fatal, 2) == GUARD_CLAIM && guard(c, TYPE_ALERT, 0, fatal, 1) == DTLS_DROP_ALERT);
    CHECK(guard(c, TYPE_CCS, 0, "\1", 1) == GUARD_PASS);
    CHECK(guard(c, TYPE_CCS, 0, "\2", 1) == DTLS_DROP_HANDSHAKE);
    CHECK(guard(c, TYPE_CCS, 0, "\1\1", 2) == DTLS_DROP_HANDSHAKE);
    CHECK(guard(c, TYPE_CCS, 1, "\1", 1) == DTLS_DROP_HANDSHAKE);
    CHECK(guard(c, TYPE_HANDSHAKE, 2, body, 40) == DTLS_DROP_EPOCH);
    CHECK(guard(c, TYPE_HANDSHAKE, 1, body, 23) == DTLS_DROP_SHORT);
    CHECK(guard(c, TYPE_HANDSHAKE, 1, body, 28) == DTLS_DROP_HANDSHAKE); /* a handshake header and no more */
    CHECK(guard(c, TYPE_HANDSHAKE, 1, body, 36) == DTLS_DROP_HANDSHAKE);
    CHECK(guard(c, TYPE_DATA, 1, body, 36) == GUARD_PASS);
    for (; c->early < EARLY_RECORDS; c->early++)
        CHECK(guard(c, TYPE_HANDSHAKE, 1, body, 40) == GUARD_PASS);
    CHECK(guard(c, TYPE_HANDSHAKE, 1, body, 40) == DTLS_DROP_EARLY);
    c->keyed = true;
    CHECK(guard(c, TYPE_HANDSHAKE, 1, body, 40) == GUARD_PASS);

    /* Handshake headers: type, length 4, sequence 3, offset 0, fragment 4. */
    uint8_t m[32] = {16, 0, 0, 4, 0, 3, 0, 0, 0, 0, 0, 4, 1, 2, 3, 4};
    CHECK(guard(c, TYPE_HANDSHAKE, 0, m, 16) == GUARD_PASS);
    CHECK(guard(c, TYPE_HANDSHAKE, 0, m, 15) == DTLS_DROP_HANDSHAKE);
    CHECK(guard(c, TYPE_HANDSHAKE, 0, m, 17) == DTLS_DROP_HANDSHAKE);
    CHECK(guard(c, TYPE_HANDSHAKE, 0, m, 5) == DTLS_DROP_HANDSHAKE);
    const struct {
        int at, value;
    } lies[] = {{0, 2}, {0, 20}, {0, 0}, {0, 99}, {1, 1}, {4, 1}, {5, 33}, {6, 1}, {8, 1}, {9, 1}, {11, 5}, {11, 0}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        uint8_t was = m[lies[i].at];
        m[lies[i].at] = (uint8_t)lies[i].value;
        CHECK(guard(c, TYPE_HANDSHAKE, 0, m, 16) == DTLS_DROP_HANDSHAKE);
        m[lies[i].at] = was;
    }
    memcpy(m + 16, m, 16); /* two messages in one record, the second a CertificateVerify */
    m[16] = 15;
    m[21] = 4;
    CHECK(guard(c, TYPE_HANDSHAKE, 0, m, 32) == GUARD_PASS);
    c->server = false;
    CHECK(guard(c, TYPE_HANDSHAKE, 0, m, 16) == DTLS_DROP_HANDSHAKE); /* no server sends a ClientKeyExchange */
    m[0] = 2;
    CHECK(guard(c, TYPE_HANDSHAKE, 0, m, 16) == GUARD_PASS);

    /* Established. */
    CHECK(open_guard(OVERHEAD_MAX, TYPE_DATA, 1, body, 24) == GUARD_PASS);
    CHECK(open_guard(OVERHEAD_MAX, TYPE_ALERT, 1, body, 26) == GUARD_PASS);
    CHECK(open_guard(OVERHEAD_MAX, TYPE_HANDSHAKE, 1, body, 40) == GUARD_PASS);
    for (size_t n = 1; n < 24; n++)
        CHECK(open_guard(OVERHEAD_MAX, TYPE_DATA, 1, body, n) == DTLS_DROP_SHORT);
    CHECK(open_guard(OVERHEAD_MAX, TYPE_CCS, 1, body, 24) == DTLS_DROP_HANDSHAKE);
    CHECK(open_guard(OVERHEAD_MAX, TYPE_ALERT, 0, fatal, 2) == DTLS_DROP_EPOCH);
    CHECK(open_guard(OVERHEAD_MAX, TYPE_DATA, 0, body, 40) == DTLS_DROP_EPOCH);
    CHECK(open_guard(OVERHEAD_MAX, TYPE_DATA, 2, body, 40) == DTLS_DROP_EPOCH);
    CHECK(open_guard(OVERHEAD_MIN, TYPE_DATA, 1, body, 16) == GUARD_PASS);
    CHECK(open_guard(OVERHEAD_MIN, TYPE_DATA, 1, body, 15) == DTLS_DROP_SHORT);
}

/* A connection in its handshake, as an endpoint makes them. */
static struct association *begin(dtls_endpoint *ep, bool is_server)
{
    dtls_conn *c = conn_new(ep, is_server);
    REQUIRE(c && (is_server || (c->dial = calloc(1, sizeof *c->dial)) != NULL), "a connection");
    struct association *a = hs_try_new(c);
    dtls_addr peer, local;
    dtls_addr_parse(&peer, "192.0.2.1:1000", NULL);
    dtls_addr_parse(&local, "192.0.2.2:2000", NULL);
    REQUIRE(a, "a handshake");
    assoc_set_addresses(a, &peer, &local);
    assoc_list(a);
    conn_list(c);
    return a;
}

/* What anybody can claim: by an alert, and on a client's socket by the system, where a busy interface is no refusal. */
static void test_claims(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send = fake_send});
    struct association *a = begin(ep, false);
    struct claim *claim = &a->handshake->claim;
    hs_become(a, HS_ASKING);
    hs_socket_failed(a, ENOBUFS);
    CHECK(!claim->made);
    hs_socket_failed(a, ECONNREFUSED);
    CHECK(claim->made && strcmp(claim->text, strerror(ECONNREFUSED)) == 0);
    hs_claim(a, 48, SSL_alert_desc_string_long(48));
    CHECK(strcmp(claim->text, "refused by the peer: unknown CA") == 0);
    claim->made = false;
    hs_become(a, HS_FLIGHTS); /* somebody answered */
    hs_socket_failed(a, ECONNREFUSED);
    CHECK(!claim->made);
    dtls_loop_free(l);
}

/* A ServerHello that somebody forged ahead of the server's cookie must not take the client its new starts. */
static void test_answers(void)
{
    fake_now = 1000;
    dtls_loop *l = dtls_loop_new(&(dtls_loop_config){.now_us = fake_clock});
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send = fake_send});
    struct association *a = begin(ep, false);
    struct handshake *h = a->handshake;
    const uint8_t server_hello[12 + 34] = {SERVER_HELLO, 0, 0, 70, 0, 0, 0, 0, 0, 0, 0, 34, 0xfe, 0xfd, 'r'};
    const uint8_t cookie[12 + 3] = {HELLO_VERIFY_REQUEST, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 3, 0xfe, 0xff, 0};
    CHECK(hs_be_client(a) && hs_connect(a) && h->state == HS_ASKING);
    fake_now += 5000;
    struct record r = rec(TYPE_HANDSHAKE, 0, server_hello, sizeof server_hello);
    hs_answered(a, &r);
    CHECK(h->state == HS_FLIGHTS && h->round_trip_us == 5000 && !h->cookies && a->hello_random[0] == 'r');
    CHECK(hs_stalled_at(a) == INT64_MAX); /* it would take a ClientHello from the same port for a stale one */
    fake_now += 1000;
    r = rec(TYPE_HANDSHAKE, 0, cookie, sizeof cookie);
    hs_answered(a, &r);
    CHECK(h->state == HS_FLIGHTS && h->round_trip_us == 5000 && h->cookies && hs_stalled_at(a) != INT64_MAX);
    dtls_loop_free(l);
}

static int bugs;
static void count_bugs(void *user, dtls_log level, const char *line)
{
    (void)user;
    bugs += level == DTLS_LOG_ERROR && strstr(line, "bug: handshake state ");
}

/* Each transition that the table does not have is told; the simulation sees in every world that there is none. */
static void test_transitions(void)
{
    static const enum hs_state ways[][6] = {{HS_ASKING, HS_COOKIE, HS_FLIGHTS, HS_DONE},
                                            {HS_ASKING, HS_FLIGHTS, HS_FAILED},
                                            {HS_ASKING, HS_COOKIE, HS_FAILED},
                                            {HS_ASKING, HS_FAILED}};
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send = fake_send, .on_log = count_bugs});
    struct association *a = begin(ep, false);
    int legal[2] = {0, 0};
    bugs = 0;
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        a->handshake->state = HS_NEW;
        for (int k = 0; k < 6 && ways[i][k] != HS_NEW; k++)
            hs_become(a, ways[i][k]);
    }
    CHECK(bugs == 0);
    for (int role = 0; role < 2; role++) {
        a->conn->server = role;
        for (enum hs_state from = HS_NEW; from < HS_STATES; from++) {
            for (enum hs_state to = HS_NEW; to < HS_STATES; to++) {
                bugs = 0;
                a->handshake->state = from;
                hs_become(a, to);
                legal[role] += !bugs;
            }
        }
    }
    CHECK(legal[0] == 8 && legal[1] == 2);
    a->conn->server = false;
    dtls_loop_free(l);
}

/* Of all deadlines the first that is due runs, and the timer is set to the earliest. */

static int64_t due[2];
static int ran[2];

static int64_t due_0(const struct association *a)
{
    (void)a;
    return due[0];
}

static int64_t due_1(const struct association *a)
{
    (void)a;
    return due[1];
}

static void run_0(struct association *a, int64_t now)
{
    (void)a, (void)now;
    ran[0]++;
    due[0] = INT64_MAX;
}

static void run_1(struct association *a, int64_t now)
{
    (void)a;
    ran[1]++;
    due[1] = now + 500000;
}

static void test_deadlines(void)
{
    static const struct rule rules[] = {{due_0, run_0}, {due_1, run_1}, {NULL, NULL}};
    fake_now = 1000000;
    dtls_loop *l = dtls_loop_new(&(dtls_loop_config){.now_us = fake_clock});
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send = fake_send});
    struct association *a = assoc_new(ep);
    ran[0] = ran[1] = 0;
    due[0] = fake_now + 200000;
    due[1] = fake_now + 100000;
    const struct phase phase = {.rules = rules};
    a->phase = &phase;
    assoc_arm(a);
    CHECK(dtls_loop_timeout(l) == 100);
    due[1] += 150000; /* what moves later does not touch the timer: it looks again when it fires */
    fake_now += 100000;
    dtls_loop_poll(l, 0);
    CHECK(ran[0] == 0 && ran[1] == 0 && dtls_loop_timeout(l) == 100);
    fake_now += 200000;
    dtls_loop_poll(l, 0);
    CHECK(ran[0] == 1 && ran[1] == 0 && dtls_loop_timeout(l) == 1); /* both were due: the first of the table ran */
    fake_now += 1000;
    dtls_loop_poll(l, 0);
    CHECK(ran[0] == 1 && ran[1] == 1 && dtls_loop_timeout(l) == 500);
    due[1] = INT64_MAX;
    assoc_arm(a);
    CHECK(dtls_loop_timeout(l) == -1);
    a->phase = NULL;
    assoc_destroy(&a->object);
    dtls_loop_free(l);
}

/* Where a message has its place, and how long it gets. */
static void test_guard_messages(void)
{
    enum { CHAIN_MAX = 8192 };
    static const struct {
        unsigned type, seq, length;
        bool server, good;
    } cases[] = {{CLIENT_HELLO, 1, HELLO_LENGTH_MAX, true, true},
                 {CLIENT_HELLO, 0, 100, true, false},
                 {CLIENT_HELLO, 1, HELLO_LENGTH_MAX + 1, true, false},
                 {CLIENT_HELLO, 1, 100, false, false},
                 {CERTIFICATE, 2, CHAIN_MAX, true, true},
                 {CERTIFICATE, 3, 100, true, false},
                 {CERTIFICATE, 3, 100, false, true},
                 {CERTIFICATE, 2, CHAIN_MAX + 1, false, false},
                 {CLIENT_KEY_EXCHANGE, 3, KEY_LENGTH_MAX, true, true},
                 {CLIENT_KEY_EXCHANGE, 2, 100, true, false},
                 {CLIENT_KEY_EXCHANGE, 3, KEY_LENGTH_MAX + 1, true, false},
                 {CERTIFICATE_VERIFY, 4, KEY_LENGTH_MAX, true, true},
                 {CERTIFICATE_VERIFY, 5, 100, true, false},
                 {CERTIFICATE_VERIFY, 4, KEY_LENGTH_MAX + 1, true, false},
                 {CERTIFICATE_VERIFY, 4, 100, false, false},
                 {SERVER_HELLO, SERVER_SEQ_MAX, HELLO_LENGTH_MAX, false, true},
                 {SERVER_HELLO, SERVER_SEQ_MAX + 1, 100, false, false},
                 {SERVER_HELLO, 1, HELLO_LENGTH_MAX + 1, false, false},
                 {SERVER_HELLO, 1, 100, true, false},
                 {NEW_SESSION_TICKET, 8, CHAIN_MAX, false, true},
                 {NEW_SESSION_TICKET, SERVER_SEQ_MAX + 1, 100, false, false},
                 {CERTIFICATE_REQUEST, 4, CA_NAMES_LENGTH_MAX + 1, false, false},
                 {SERVER_HELLO_DONE, 5, 0, true, false},
                 {CERTIFICATE_STATUS, 3, 100, false, true},
                 {0, 1, 0, false, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct guard g = {.server = cases[i].server, .asks = true, .tickets = true, .chain_max = CHAIN_MAX};
        CHECK(guard_message(&g, cases[i].type, cases[i].seq, cases[i].length) == cases[i].good);
        g.resumed = true; /* then nothing is left to say in plaintext but a ticket */
        CHECK(guard_message(&g, cases[i].type, cases[i].seq, cases[i].length) ==
              (cases[i].good && cases[i].type == NEW_SESSION_TICKET));
    }
    const struct guard trusting = {.server = true, .chain_max = CHAIN_MAX}, no_tickets = {.chain_max = CHAIN_MAX};
    CHECK(guard_message(&trusting, CLIENT_KEY_EXCHANGE, 2, 100) && !guard_message(&trusting, CERTIFICATE, 2, 100));
    CHECK(!guard_message(&no_tickets, NEW_SESSION_TICKET, 4, 100));
}

static void test_cookies(void)
{
    fake_now = 1000;
    dtls_loop *l = dtls_loop_new(&(dtls_loop_config){.now_us = fake_clock});
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send = fake_send, .cookie_ms = 1000});
    struct association *c = assoc_new(ep);
    unsigned char cookie[COOKIE_BYTES];
    unsigned len = 0;
    dtls_addr_parse(&c->peer, "192.0.2.1:1000", NULL);
    dtls_addr_parse(&c->local, "192.0.2.2:2000", NULL);
    CHECK(cookie_generate(c->ssl, cookie, &len) == 1 && len == COOKIE_BYTES);
    CHECK(cookie_verify(c->ssl, cookie, len) == 1);
    CHECK(cookie_verify(c->ssl, cookie, len - 1) == 0 && cookie_verify(c->ssl, cookie, 0) == 0);
    cookie[0] ^= 1;
    CHECK(cookie_verify(c->ssl, cookie, len) == 0);
    cookie[0] ^= 1;
    c->peer.port++;
    CHECK(cookie_verify(c->ssl, cookie, len) == 0);
    c->peer.port--;
    c->local.ip[3]++;
    CHECK(cookie_verify(c->ssl, cookie, len) == 0);
    c->local.ip[3]--;
    l->now = fake_now += 1000 * 1000;
    cookie_rotate(ep);
    CHECK(cookie_verify(c->ssl, cookie, len) == 1); /* under the secret before */
    l->now = fake_now += 1000 * 1000;
    cookie_rotate(ep);
    CHECK(cookie_verify(c->ssl, cookie, len) == 0);
    cookie_generate(c->ssl, cookie, &len);
    l->now = fake_now += 5000 * 1000; /* a long quiet time ages both */
    cookie_rotate(ep);
    CHECK(cookie_verify(c->ssl, cookie, len) == 0);
    assoc_destroy(&c->object);
    dtls_loop_free(l);
}

static void test_table(void)
{
    enum { N = 500 };
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send = fake_send});
    struct association *c[N];
    int found = 0;
    for (int i = 0; i < N; i++) {
        c[i] = assoc_new(ep);
        dtls_addr_parse(&c[i]->peer, "192.0.2.1:1000", NULL);
        c[i]->peer.port = (uint16_t)i;
        dtls_conn *conn = conn_new(ep, false);
        REQUIRE(conn, "a connection");
        conn_add_try(conn, c[i]);
        assoc_list(c[i]);
        conn_list(conn);
    }
    for (int i = 0; i < N; i++)
        found += assoc_find(ep, &c[i]->peer, &c[i]->local) == c[i];
    CHECK(found == N && ep->associations.size >= N);
    for (int i = 0; i < N; i += 2) {
        table_remove(&ep->associations, &c[i]->entry);
        conn_unlist(c[i]->conn, false);
    }
    found = 0;
    for (int i = 0; i < N; i++)
        found += assoc_find(ep, &c[i]->peer, &c[i]->local) == (i % 2 ? c[i] : NULL);
    CHECK(found == N && ep->counters.conns == N / 2);
    int walked = 0;
    for (dtls_conn *w = ep->first; w; w = w->next)
        walked += w == c[walked * 2 + 1]->conn;
    CHECK(walked == N / 2);
    for (int i = 0; i < N; i += 2) {
        conn_destroy(&c[i]->conn->object);
        assoc_destroy(&c[i]->object);
    }
    dtls_loop_free(l); /* ends the others */
}

/* Two endpoints that speak to each other, and what the keys of their association are good for. */

enum { MAIL = 32, AT_SERVER = 0, AT_CLIENT = 1 };

static struct mail {
    uint8_t data[2048];
    size_t len;
    int to;
} mail[MAIL];
static int mail_len;

struct end {
    dtls_endpoint *ep;
    dtls_conn *conn;
    dtls_addr addr;
    int messages, closed;
    dtls_reason reason;
};
static struct end ends[2];

static int mail_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    (void)from, (void)to;
    if (mail_len == MAIL || len > sizeof mail->data)
        return -1;
    mail[mail_len].to = user == &ends[AT_SERVER] ? AT_CLIENT : AT_SERVER;
    mail[mail_len].len = len;
    memcpy(mail[mail_len++].data, data, len);
    return 0;
}

static void mail_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct end *e = dtls_endpoint_user(dtls_conn_endpoint(conn));
    (void)data, (void)len;
    e->conn = event == DTLS_EV_CLOSED ? NULL : conn;
    e->messages += event == DTLS_EV_MESSAGE;
    if (event == DTLS_EV_CLOSED) {
        e->closed++;
        e->reason = dtls_conn_reason(conn);
    }
}

static void mail_deliver(dtls_loop *l)
{
    for (int turns = 0; turns < 30; turns++) {
        for (int n = mail_len; n > 0; n--) {
            struct mail m = mail[0];
            memmove(mail, mail + 1, (size_t)--mail_len * sizeof *mail);
            dtls_endpoint_input(ends[m.to].ep, m.data, m.len, &ends[!m.to].addr, &ends[m.to].addr);
        }
        dtls_loop_poll(l, 0);
    }
}

static dtls_loop *mail_connect(int cid_bytes)
{
    dtls_loop *l = dtls_loop_new(NULL);
    memset(ends, 0, sizeof ends);
    mail_len = 0;
    for (int i = 0; i < 2; i++) {
        char cert[512], key[512], ca[512];
        dtls_config cfg = {.cert_file = cert,
                           .key_file = key,
                           .ca_file = ca,
                           .send = mail_send,
                           .on_event = mail_event,
                           .cid_bytes = cid_bytes};
        const char *name = i == AT_SERVER ? "server" : "client";
        snprintf(cert, sizeof cert, "%s/%s.pem", certs, name);
        snprintf(key, sizeof key, "%s/%s.key", certs, name);
        snprintf(ca, sizeof ca, "%s/ca.pem", certs);
        cfg.user = &ends[i];
        dtls_addr_parse(&ends[i].addr, i == AT_SERVER ? "192.0.2.1:1" : "192.0.2.2:2", NULL);
        ends[i].ep = dtls_endpoint_new(l, &cfg, NULL);
        REQUIRE(ends[i].ep, "an endpoint");
    }
    dtls_endpoint_listen(ends[AT_SERVER].ep, NULL, NULL);
    dtls_target t = {.peer = ends[AT_SERVER].addr, .local = ends[AT_CLIENT].addr, .name = "localhost"};
    dtls_endpoint_connect(ends[AT_CLIENT].ep, &t, NULL);
    mail_deliver(l);
    REQUIRE(ends[0].conn && ends[1].conn, "a connection");
    return l;
}

/* The client sends the message that the keys have just room for, and the next one. */
static void check_last_message(bool receiving, int cid_bytes)
{
    const struct end *spent = &ends[receiving ? AT_SERVER : AT_CLIENT];
    dtls_loop *l = mail_connect(cid_bytes);
    struct key_use *keys = &spent->conn->open->keys;
    CHECK(keys->by_bytes && keys->out > 1ull << 37 && keys->in > 1ull << 37 && keys->forged == 1ull << 36);
    *(receiving ? &keys->in : &keys->out) = 2 * (5 + KEY_RECORD_COST) - 1;
    CHECK(dtls_conn_send(ends[AT_CLIENT].conn, "first", 5) == 0);
    mail_deliver(l);
    CHECK(ends[AT_SERVER].messages == 1 && !spent->closed);
    CHECK(dtls_conn_send(ends[AT_CLIENT].conn, "other", 5) == (receiving ? 0 : DTLS_ERR_TLS));
    mail_deliver(l);
    CHECK(ends[AT_SERVER].messages == 1 && spent->closed == 1 && spent->reason == DTLS_CLOSE_KEYS);
    CHECK(ends[receiving ? AT_CLIENT : AT_SERVER].closed == 1);
    dtls_loop_free(l);
}

static void check_forgeries(int cid_bytes)
{
    uint8_t forged[RECORD_HEADER + CID_BYTES + 40] = {23, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 9, 9, 0, 40};
    dtls_loop *l = mail_connect(cid_bytes);
    struct end *e = &ends[AT_SERVER];
    size_t size = RECORD_HEADER + 40;
    if (cid_bytes != DTLS_NEVER) {
        forged[0] = TYPE_CID;
        memcpy(forged + RECORD_HEADER - 2, e->conn->open->wire.cid_in + 1, CID_BYTES);
        forged[size - 40 + CID_BYTES - 1] = 40;
        size += CID_BYTES;
    }
    e->conn->open->keys.forged = 2;
    CHECK(dtls_conn_send(ends[AT_CLIENT].conn, "good", 4) == 0);
    mail_deliver(l);
    CHECK(e->messages == 1 && e->conn->open->keys.forged == 2);
    for (int i = 0; i < 2; i++) {
        CHECK(e->closed == 0);
        dtls_endpoint_input(e->ep, forged, size, &ends[AT_CLIENT].addr, &e->addr);
    }
    CHECK(e->closed == 1 && e->reason == DTLS_CLOSE_KEYS);
    mail_deliver(l);
    CHECK(ends[AT_CLIENT].closed == 1);
    dtls_loop_free(l);
}

static const SSL_CIPHER *suite_of(SSL_CTX *ctx, const char *name)
{
    SSL_CTX_set_cipher_list(ctx, name);
    STACK_OF(SSL_CIPHER) *suites = SSL_CTX_get_ciphers(ctx);
    for (int i = 0; i < sk_SSL_CIPHER_num(suites); i++)
        if (strcmp(SSL_CIPHER_get_name(sk_SSL_CIPHER_value(suites, i)), name) == 0)
            return sk_SSL_CIPHER_value(suites, i);
    return NULL;
}

/* Another implementation's record is opened by the other side's keys, and the same bytes come out where its text is sealed. A
 * changed byte anywhere, or the keys of the other direction, open nothing. */
static void check_vector(SSL_CTX *ctx, struct crypt *work, const struct vector *v)
{
    uint8_t text[RECORD_BODY_MAX + 1], again[DATAGRAM_MAX], changed[sizeof v->record], randoms[2][HELLO_RANDOM];
    struct record_keys k;
    struct record r;
    size_t len = 0;
    unsigned type = 0;
    memcpy(randoms[0], v->client_random, HELLO_RANDOM);
    memcpy(randoms[1], v->server_random, HELLO_RANDOM);
    const SSL_CIPHER *suite = suite_of(ctx, v->suite);
    REQUIRE(suite && record_keys_make(suite, v->master, (const uint8_t(*)[HELLO_RANDOM])randoms, !v->from_server, &k),
            "keys of %s", v->suite);
    REQUIRE(record_parse_any(v->record, v->record_len, v->cid_len, &r) && r.size == v->record_len, "a record");
    CHECK_THAT(record_open(work, k.aead, &k.in, &r, text, &len, &type) && type == TYPE_DATA && len == strlen(v->text) &&
                   memcmp(text, v->text, len) == 0,
               "%s, %s, %u bytes of ID", v->suite, v->from_server ? "server" : "client", v->cid_len);
    size_t padded =
        r.body_len - k.aead->explicit - k.aead->tag; /* its type and zeros belong to the text that is sealed */
    if (v->cid_len > 0)
        memset(text + len, 0, padded - len);
    if (v->cid_len > 0 && padded > len + 1)
        text[len] = TYPE_DATA;
    size_t n = record_seal(work, k.aead, &k.in, &r, v->cid_len ? v->cid : NULL, v->cid_len,
                           v->cid_len && padded > len + 1 ? 0 : TYPE_DATA, text, v->cid_len ? padded - 1 : len, again);
    CHECK(n == v->record_len && memcmp(again, v->record, n) == 0);
    CHECK(!record_open(work, k.aead, &k.out, &r, text, &len, &type));
    for (size_t i = 0; i < v->record_len; i++) {
        memcpy(changed, v->record, v->record_len);
        changed[i] ^= 0x04;
        CHECK(!record_parse_any(changed, v->record_len, v->cid_len, &r) ||
              !record_open(work, k.aead, &k.in, &r, text, &len, &type));
    }
}

static void test_vectors(void)
{
    SSL_CTX *ctx = SSL_CTX_new(DTLS_method());
    struct crypt *work = calloc(1, sizeof *work);
    SSL_CTX_set_security_level(ctx, 0); /* CCM_8 has 64 bits */
    SSL_CTX_set_max_proto_version(ctx, DTLS1_2_VERSION);
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++)
        check_vector(ctx, work, &vectors[i]);
    crypt_free(work);
    SSL_CTX_free(ctx);
}

/* A number passes once, and none that is too old. */
static void test_window(void)
{
    struct wire w = {0};
    CHECK(wire_is_fresh(&w, 0) && wire_is_fresh(&w, 1));
    wire_note(&w, 0);
    CHECK(!wire_is_fresh(&w, 0) && wire_is_fresh(&w, 1));
    wire_note(&w, 5);
    for (uint64_t i = 1; i < 5; i++)
        CHECK(wire_is_fresh(&w, i));
    wire_note(&w, 3);
    CHECK(!wire_is_fresh(&w, 3) && !wire_is_fresh(&w, 5) && !wire_is_fresh(&w, 0) && wire_is_fresh(&w, 2));
    wire_note(&w, 68);
    CHECK(!wire_is_fresh(&w, 4) && !wire_is_fresh(&w, 5) && wire_is_fresh(&w, 6) && wire_is_fresh(&w, 67));
    wire_note(&w, 1000);
    CHECK(!wire_is_fresh(&w, 68) && !wire_is_fresh(&w, 936) && wire_is_fresh(&w, 937) && wire_is_fresh(&w, 999));
    wire_note(&w, ((uint64_t)1 << 48) - 1);
    CHECK(!wire_is_fresh(&w, 1000) && !wire_is_fresh(&w, ((uint64_t)1 << 48) - 1) &&
          w.newest == ((uint64_t)1 << 48) - 1);
    wire_note(&w, 1);
    CHECK(!wire_is_fresh(&w, 1) && w.newest == ((uint64_t)1 << 48) - 1);
}

/* RFC 9325 section 4.4; the numbers are those of RFC 9147 section 4.5.3 and of RFC 9325. */
static void test_key_limits(void)
{
    static const struct {
        unsigned id;
        bool by_bytes;
        uint64_t both, forged;
    } suites[] = {{0xc02b, true, 1ull << 38, 1ull << 36},
                  {0xc030, true, 1ull << 38, 1ull << 36},
                  {0xcca9, false, 1ull << 47, 1ull << 36},
                  {0xc0ac, false, 1ull << 23, 1ull << 23}};
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send = fake_send});
    SSL *ssl = SSL_new(ep->trust.ctx);
    for (size_t i = 0; i < sizeof suites / sizeof *suites; i++) {
        const uint8_t id[2] = {(uint8_t)(suites[i].id >> 8), (uint8_t)suites[i].id};
        struct key_use use = hs_key_use(SSL_CIPHER_find(ssl, id));
        CHECK(use.by_bytes == suites[i].by_bytes && use.out == suites[i].both && use.in == suites[i].both &&
              use.forged == suites[i].forged);
    }
    SSL_free(ssl);
    dtls_loop_free(l);
    for (int cid_bytes = DTLS_NEVER; cid_bytes <= 0; cid_bytes++) { /* none, and a server's 8 */
        check_last_message(false, cid_bytes);
        check_last_message(true, cid_bytes);
        check_forgeries(cid_bytes);
    }
}

/* Sockets alone, without an endpoint: what arrives, what fails and what is counted goes to whom they serve. */

struct heard {
    int datagrams, errors, last_error, rooms;
    dtls_addr from;
    char text[16];
};

static void hear(struct udp *u, const uint8_t *p, size_t n, const dtls_addr *from, const dtls_addr *to)
{
    struct heard *h = u->user.owner;
    (void)to;
    h->datagrams++;
    h->from = *from;
    snprintf(h->text, sizeof h->text, "%.*s", (int)n, (const char *)p);
}

static void hear_error(struct udp *u, int error)
{
    struct heard *h = u->user.owner;
    h->errors++;
    h->last_error = error;
}

static void hear_room(struct udp *u)
{
    struct heard *h = u->user.owner;
    h->rooms++;
}

static void send_text(dtls_loop *l, struct udp *u, const char *text, const dtls_addr *to)
{
    loop_enter(l);
    CHECK(udp_send(l, u, text, strlen(text), &u->local, to) == 0);
    loop_leave(l);
}

static void test_sockets(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    const dtls_config cfg = {.send_queue_bytes = 1000, .datagrams_per_turn = 8, .socket_buffer_bytes = 20000};
    dtls_counters counters = {0};
    struct heard server = {0}, client = {0};
    struct object sockets;
    dtls_addr any;
    list_init(&sockets);
    dtls_addr_parse(&any, "127.0.0.1:0", NULL);
    struct udp *listening =
        udp_open(l, &(struct udp_user){hear, hear_error, hear_room, &server, &counters, &cfg}, &sockets, &any, NULL);
    CHECK(listening && listening->local.port != 0);
    struct udp *own = udp_open(l, &(struct udp_user){hear, hear_error, hear_room, &client, &counters, &cfg}, &sockets,
                               NULL, &listening->local);
    CHECK(own && own->connected && !listening->connected);
    send_text(l, own, "question", &listening->local);
    for (int i = 0; i < 100 && server.datagrams == 0; i++)
        dtls_loop_poll(l, 50);
    CHECK(server.datagrams == 1 && strcmp(server.text, "question") == 0 && dtls_addr_equal(&server.from, &own->local));
    send_text(l, listening, "answer", &server.from);
    for (int i = 0; i < 100 && client.datagrams == 0; i++)
        dtls_loop_poll(l, 50);
    CHECK(client.datagrams == 1 && strcmp(client.text, "answer") == 0);
    CHECK(fcntl(own->fd, F_GETFD) == FD_CLOEXEC && (fcntl(own->fd, F_GETFL) & O_NONBLOCK));
#ifdef IP_PMTUDISC_OMIT /* a forged ICMP message must not make the system split what we send */
    int discover = -1;
    socklen_t size = sizeof discover;
    CHECK(getsockopt(own->fd, IPPROTO_IP, IP_MTU_DISCOVER, &discover, &size) == 0 && discover == IP_PMTUDISC_OMIT);
#endif
    udp_free(listening);
    dtls_loop_poll(l, 0);
    send_text(l, own, "anybody?", &any); /* nobody: the system says so, and life goes on */
    for (int i = 0; i < 100 && client.errors == 0; i++)
        dtls_loop_poll(l, 50);
    CHECK(client.errors == 1 && client.last_error == ECONNREFUSED && counters.receive_errors == 1);
    udp_free(own);
    dtls_loop_free(l);
}

/* A Unix socket pair in place of a socket, since it does say when it is full. */
static void become_pair(dtls_loop *l, struct udp *u, int pair[2])
{
    CHECK(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) == 0);
    for (int i = 0; i < 2; i++)
        CHECK(fcntl(pair[i], F_SETFL, O_NONBLOCK) == 0);
    u->fd = pair[0];
    u->connected = true; /* no address to give */
    u->watch = dtls_watch_new(l, pair[0], DTLS_READ, udp_event, u);
}

/* The send queue. */
static void test_backlog(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send_queue_bytes = 50000});
    dtls_addr a, none = {.family = 4};
    char data[1000], got[2000];
    int pair[2], sent_ok = 0, received = 0, ordered = 1;
    dtls_addr_parse(&a, "127.0.0.1:0", NULL);
    CHECK(dtls_endpoint_listen(ep, &a, NULL) == 0 && a.port != 0);
    struct udp *u = (struct udp *)ep->sockets.next;
    const struct udp real = *u;
    become_pair(l, u, pair);
    for (int i = 0; i < 10000; i++) {
        snprintf(data, sizeof data, "%d", i);
        loop_enter(l);
        int r = udp_send(l, u, data, sizeof data, &none, &none);
        loop_leave(l);
        if (r != 0)
            break;
        sent_ok++;
    }
    CHECK(sent_ok >= 50 && sent_ok < 10000 && u->backlog_bytes > 49000 && u->backlog_bytes <= 50000);
    for (int turns = 0; turns < 10000 && received < sent_ok; turns++) {
        while (recv(pair[1], got, sizeof got, 0) > 0)
            ordered = ordered && atoi(got) == received++;
        dtls_loop_poll(l, 10);
    }
    CHECK(received == sent_ok && ordered && !u->first && u->backlog_bytes == 0 && u->watch->events == DTLS_READ);
    close(pair[1]); /* now the system refuses: dropped, counted, no harm */
    loop_enter(l);
    CHECK(udp_send(l, u, data, sizeof data, &none, &none) == 0);
    loop_leave(l);
    CHECK(ep->counters.dropped[DTLS_DROP_SEND] == 1 && ep->counters.receive_errors > 0);
    dtls_watch_free(u->watch);
    close(pair[0]);
    u->connected = false;
    u->fd = real.fd;
    u->watch = real.watch;
    dtls_loop_free(l);
}

/* Who was told DTLS_ERR_AGAIN hears when there is room: real connections, whose server's socket is swapped for one that
 * says when it is full. */
static int room_opened, room_told, room_again;

static void room_event(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    static const char text[1000];
    (void)data, (void)len;
    room_opened += event == DTLS_EV_CONNECTED;
    if (event != DTLS_EV_WRITABLE)
        return;
    room_told++;
    if (room_told == 1) { /* the first one to hear of it takes all */
        int r;
        while ((r = dtls_conn_send(c, text, sizeof text)) == 0)
            ;
        room_again += r == DTLS_ERR_AGAIN;
    }
}

static void room_fill(dtls_conn *c, void *user)
{
    static const char text[1000];
    int *again = user;
    for (int i = 0, r = 0; i < 10000 && r == 0; i++) {
        r = dtls_conn_send(c, text, sizeof text);
        *again += r == DTLS_ERR_AGAIN;
    }
}

static void test_room(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.send_queue_bytes = 50000, .on_event = room_event});
    char got[2000];
    dtls_endpoint *clients = make_endpoint_as("client", l, (dtls_config){.on_event = room_event});
    dtls_target t = {.name = "localhost"};
    int pair[2], again = 0;
    dtls_addr_parse(&t.peer, "127.0.0.1:0", NULL);
    CHECK(dtls_endpoint_listen(ep, &t.peer, NULL) == 0);
    room_opened = room_told = room_again = 0;
    for (int i = 0; i < 3; i++)
        CHECK(dtls_endpoint_connect(clients, &t, NULL) != NULL);
    for (int i = 0; i < 1000 && room_opened < 6; i++)
        dtls_loop_poll(l, 50);
    CHECK(room_opened == 6);
    struct udp *u = (struct udp *)ep->sockets.next;
    const struct udp real = *u;
    become_pair(l, u, pair);
    dtls_endpoint_each(ep, room_fill, &again);
    CHECK(again == 3 && room_told == 0);
    u->connected = false;      /* it would go with the connection; nothing is sent meanwhile */
    dtls_conn_close(ep->last); /* this one hears no more */
    u->connected = true;
    for (int turns = 0; turns < 500 && room_told < 3; turns++) {
        while (recv(pair[1], got, sizeof got, 0) > 0)
            ;
        dtls_loop_poll(l, 10);
    }
    /* Of the two that are left the first filled it again, and waited once more behind the other. */
    CHECK(room_told == 3 && room_again == 1 && ep->waiting.next == &ep->waiting);
    dtls_watch_free(u->watch);
    close(pair[0]);
    close(pair[1]);
    u->connected = false;
    u->fd = real.fd;
    u->watch = real.watch;
    dtls_loop_free(l);
}

/* A host's addresses: in turn of both families, and the next beside one that is silent. */
static void test_hosts(void)
{
    struct answer answer = {.len = 6};
    for (unsigned i = 0; i < 6; i++)
        answer.addrs[i] = (dtls_addr){.family = i < 4 ? 6 : 4, .port = (uint16_t)i};
    answer_alternate(&answer);
    static const unsigned order[] = {0, 4, 1, 5, 2, 3};
    for (unsigned i = 0; i < 6; i++)
        CHECK(answer.addrs[i].port == order[i]);

    struct question q = {.fd = -1};
    dtls_addr a;
    dtls_error err;
    CHECK(ep_parse_host("127.0.0.1:4444", &q, &a, &err) == 0 && !q.host[0] && a.port == 4444);
    CHECK(ep_parse_host("host.example:4444", &q, &a, &err) == 0 && strcmp(q.host, "host.example") == 0 &&
          strcmp(q.port, "4444") == 0);
    static const char *const bad[] = {"",      "host",       "host:",     "host:0", "host:65536",
                                      ":4444", "1.2.3:4444", "[::1:4444", "a:b:1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(ep_parse_host(bad[i], &q, &a, &err) == DTLS_ERR_ADDR && err.text[0]);

    dtls_loop *l = dtls_loop_new(NULL);
    dtls_endpoint *ep = make_endpoint(l, (dtls_config){.on_event = room_event});
    dtls_endpoint *clients = make_endpoint_as("client", l, (dtls_config){.on_event = room_event});
    dtls_addr_parse(&a, "127.0.0.1:0", NULL);
    CHECK(dtls_endpoint_listen(ep, &a, NULL) == 0);
    struct udp *silent = (struct udp *)ep->sockets.next;
    dtls_addr server = {0};
    dtls_addr_parse(&server, "127.0.0.1:0", NULL);
    dtls_watch_set(silent->watch, 0); /* it reads nothing */
    CHECK(dtls_endpoint_listen(ep, &server, NULL) == 0);
    room_opened = 0;
    dtls_target t = {.host = "no-such-host.invalid:4444", .name = "localhost"};
    dtls_conn *c = dtls_endpoint_connect(clients, &t, NULL);
    CHECK(c && c->dial->lookup && c->tries && !c->tries->older && c->tries->handshake->state == HS_NEW);
    c->dial->lookup->fn = NULL;
    answer = (struct answer){.len = 3, .addrs = {{0}, a, server}}; /* the first one cannot be connected to at all */
    dtls_addr_parse(&answer.addrs[0], "255.255.255.255:1", NULL);
    ep_resolved(c, &q, &answer);
    CHECK(c->dial->addrs_tried == 2 && !c->tries->older && c->tries->peer.port == a.port);
    for (int i = 0; i < 1000 && room_opened < 2; i++)
        dtls_loop_poll(l, 50);
    CHECK(room_opened == 2 && c->open && c->open->peer.port == server.port && !c->tries && !c->dial);
    t.host = "another.invalid:1";
    c = dtls_endpoint_connect(clients, &t, NULL);
    CHECK(c && c->dial->lookup);
    int more = 0;
    while (more < 2 * LOOKUPS_MAX && (c = dtls_endpoint_connect(clients, &t, &err)) != NULL) {
        dtls_conn_close(c); /* its thread goes on */
        more++;
    }
    CHECK(more >= LOOKUPS_MAX - 3 && more < 2 * LOOKUPS_MAX && strstr(err.text, "another.invalid"));
    dtls_loop_free(l); /* while they are looked up */
}

static void test_config(void)
{
    dtls_loop *l = dtls_loop_new(NULL);
    dtls_error err = {0};
    const dtls_config bad[] = {{.mtu_bytes = 255}, {.mtu_bytes = 65536},    {.retransmit_ms = 7000},
                               {.max_conns = -1},  {.idle_timeout_ms = -2}, {.retransmit_max_ms = 700000}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(!dtls_endpoint_new(l, &bad[i], &err) && err.code == DTLS_ERR_ARG && err.text[0]);
    CHECK(!dtls_endpoint_new(l, &(dtls_config){0}, &err) && err.code == DTLS_ERR_CERT);
    CHECK(strcmp(dtls_version(), DTLS_C_VERSION) == 0);
    for (int i = 0; i >= DTLS_ERR_LIMIT; i--)
        CHECK(strcmp(dtls_strerror(i), "unknown error") != 0);
    CHECK(strcmp(dtls_strerror(DTLS_ERR_LIMIT - 1), "unknown error") == 0);
    for (int i = 0; i < DTLS_DROP_COUNT; i++)
        CHECK(dtls_drop_name((dtls_drop)i)[0] != 0);
    dtls_loop_free(l);
}

/* ---- program ---- */

/* name NULL: no command */
static bool command_is(const char *message, const char *name, const char *text)
{
    struct message got;
    const struct command *command = command_parse(message, strlen(message), &got);
    size_t n = name ? strlen(name) : 0;
    if (!command != !name || (name && (strncmp(command->form, name, n) != 0 || strcspn(command->form, " ") != n)))
        return false;
    return text ? got.len == strlen(text) && memcmp(got.text, text, got.len) == 0 : got.text == NULL && got.len == 0;
}

static void test_commands(void)
{
    CHECK(command_is("ping", "ping", NULL));
    CHECK(command_is("ping\n", "ping", NULL));
    CHECK(command_is("ping\r\n", "ping", NULL));
    CHECK(command_is("ping\n\n", NULL, NULL));
    CHECK(command_is("ping ", NULL, NULL));
    CHECK(command_is("PING", NULL, NULL));
    CHECK(command_is("pin", NULL, NULL));
    CHECK(command_is("", NULL, NULL));
    CHECK(command_is("\n", NULL, NULL));
    CHECK(command_is("whoami", "whoami", NULL));
    CHECK(command_is("stats", "stats", NULL));
    CHECK(command_is("echo a b", "echo", "a b"));
    CHECK(command_is("echo  a ", "echo", " a "));
    CHECK(command_is("echo a\n", "echo", "a"));
    CHECK(command_is("echo", NULL, NULL));
    CHECK(command_is("echo ", NULL, NULL));
    CHECK(command_is("echoes", NULL, NULL));
    CHECK(command_is("bc x", "bc", "x"));
    CHECK(command_is("bc", NULL, NULL));
}

static int options(struct options *o, dtls_error *err, const char *line)
{
    static char copy[512];
    static char *argv[32];
    int argc = 0;
    snprintf(copy, sizeof copy, "dtls %s", line);
    for (char *word = strtok(copy, " "); word && argc < 31; word = strtok(NULL, " "))
        argv[argc++] = word;
    argv[argc] = NULL;
    return options_parse(o, modes, argc, argv, err);
}

static void test_options(void)
{
    struct options o;
    dtls_error err;
    CHECK(options(&o, &err, "server --mtu 1280 127.0.0.1:1 --idle-timeout=0 [::1]:2 -v") == 0);
    CHECK(o.mode->run == server_main && o.mtu == 1280 && o.idle_timeout_ms == DTLS_NEVER && o.addrs_len == 2 &&
          o.level == DTLS_LOG_DEBUG);
    CHECK(strcmp(o.addrs[0], "127.0.0.1:1") == 0 && strcmp(o.addrs[1], "[::1]:2") == 0);
    CHECK(options(&o, &err, "client --keepalive 0.5 --name x localhost:1") == 0 && o.keepalive_ms == 500);
    CHECK(o.mode->run == client_main && strcmp(o.name, "x") == 0);
    CHECK(options(&o, &err, "client --keepalive .0001 a:1") == 0 && o.keepalive_ms == 1);
    CHECK(options(&o, &err, "--help") == 0 && o.help);
    CHECK(options(&o, &err, "--version") == 0 && o.version);
    CHECK(options(&o, &err, "client -- -odd:1") == 0 && strcmp(o.addrs[0], "-odd:1") == 0);
    const char *const bad[] = {"",
                               "serve 127.0.0.1:1",
                               "server",
                               "client",
                               "client a:1 b:2",
                               "server --nonsense a:1",
                               "server -x a:1",
                               "server --mtu",
                               "server --mtu 255 a:1",
                               "server --mtu 1e3 a:1",
                               "server --mtu= a:1",
                               "server --max-clients 0 a:1",
                               "server --idle-timeout -1 a:1",
                               "server --idle-timeout nan a:1",
                               "server --idle-timeout inf a:1",
                               "server --idle-timeout 1x a:1",
                               "server --certs= a:1",
                               "server --a-very-long-option-name-that-nobody-has=1 a:1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(options(&o, &err, bad[i]) < 0 && err.text[0]);
}

static void test_editor_keys(void)
{
    const struct {
        const char *bytes;
        size_t n, expected;
    } keys[] = {{"a", 1, 1},
                {"\xc3\xa4", 2, 2},
                {"\xc3", 1, 0},
                {"\xc3"
                 "a",
                 2, 1},
                {"\xe2\x82\xac", 3, 3},
                {"\xf0\x9f", 2, 0},
                {"\033", 1, 0},
                {"\033[A", 3, 3},
                {"\033[", 2, 0},
                {"\033[200~x", 7, 6},
                {"\033OA", 3, 3},
                {"\033O", 2, 0},
                {"\033f", 2, 2},
                {"\033\033", 2, 1},
                {"\x80", 1, 1}};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        CHECK(editor_key_length((const unsigned char *)keys[i].bytes, keys[i].n) == keys[i].expected);
}

static void test_greeting(void)
{
    CHECK(is_greeting("hello, 127.0.0.1:1", 18) && is_greeting("hello, [::1]:1", 14));
    CHECK(is_greeting("hello, [fe80::1%nosuch0]:1", 26));
    CHECK(!is_greeting("hello, ", 7) && !is_greeting("hello, you", 10) && !is_greeting("hell", 4));
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"addresses", test_addresses},
        {"address forms", test_address_forms},
        {"siphash", test_siphash},
        {"timer heap", test_timer_heap},
        {"timers", test_timers},
        {"descriptors freed in callbacks", test_watches},
        {"posts from another thread", test_posts},
        {"signals", test_signals},
        {"loop in a callback", test_loop_nesting},
        {"bio", test_bio},
        {"record headers", test_records},
        {"flights", test_flights},
        {"guard", test_guard},
        {"claims", test_claims},
        {"answers to a ClientHello", test_answers},
        {"handshake states", test_transitions},
        {"deadlines", test_deadlines},
        {"guard, handshake messages", test_guard_messages},
        {"cookies", test_cookies},
        {"connection table", test_table},
        {"key limits", test_key_limits},
        {"vectors", test_vectors},
        {"window", test_window},
        {"sockets alone", test_sockets},
        {"send queue", test_backlog},
        {"room to send", test_room},
        {"hosts", test_hosts},
        {"configuration", test_config},
        {"commands", test_commands},
        {"options", test_options},
        {"editor keys", test_editor_keys},
        {"greeting", test_greeting},
    };
    int status = RUN_TESTS("unit", tests, argc, argv);
    if (checks > 0)
        printf("# unit: %d checks\n", checks);
    return status;
}
