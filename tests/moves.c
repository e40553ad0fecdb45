/* Addresses that change: what a server follows, what it does not, and what others can make of that. Datagrams go through
 * memory and a NAT that gives a client whatever address a test wants; time is virtual. check.h says how this runs. */
#include "virtual.h"
#include "world.h"

enum {
    PEERS = 7,
    IP_UDP_BYTES = 28,
    CID_BYTES = 8, /* of a server's connection ID */
    WITH_CID = 25,
    KEPT = 64,
    SECOND_TURNS = 1000 / TURN_MS
};

/* A client's own address, and the one that the NAT gives it. */
static struct client {
    dtls_conn *conn;
    dtls_addr own, seen;
} clients[PEERS];

static dtls_addr elsewhere, other_port, other_ip; /* "192.0.2.66:66", and where clients[0] goes */
static struct datagram kept[KEPT];                /* the last protected datagrams to the server, as they came */
static size_t kept_len, bytes_elsewhere, largest, forms[32];
static int drops_next, holds;

static struct client *client_of(const dtls_addr *addr, int seen)
{
    for (struct client *c = clients; c < clients + PEERS; c++)
        if (dtls_addr_equal(seen ? &c->seen : &c->own, addr))
            return c;
    return NULL;
}

/* For wire_drop: everything goes through here. */
static int through_nat(const struct datagram *d)
{
    int to_server = dtls_addr_equal(&d->to, &server_addr);
    struct client *c = client_of(to_server ? &d->from : &d->to, !to_server);
    if (dtls_addr_equal(&d->to, &elsewhere))
        bytes_elsewhere += d->len;
    largest = d->len > largest ? d->len : largest;
    if (!c)
        return 1;
    if (!to_server) {
        dtls_endpoint_input(client.ep, d->data, d->len, &server_addr, &c->own);
        return 1;
    }
    if (d->data[0] == WITH_CID || d->data[4] == 1) {
        memmove(kept + 1, kept, (KEPT - 1) * sizeof *kept);
        kept[0] = *d;
        kept[0].from = c->seen;
        kept_len += kept_len < KEPT;
        forms[d->data[0]]++;
    }
    if (drops_next > 0) {
        drops_next--;
        return 1;
    }
    if (!holds && server.ep)
        dtls_endpoint_input(server.ep, d->data, d->len, &c->seen, &server_addr);
    return 1;
}

static void copied(const struct datagram *d, const dtls_addr *from)
{
    struct datagram copy = *d; /* what is kept may change meanwhile */
    dtls_endpoint_input(server.ep, copy.data, copy.len, from, &server_addr);
}

static void settle(void)
{
    for (int i = 0; i < 4; i++)
        turn();
}

static void wait_seconds(int seconds)
{
    for (int i = 0; i < seconds * SECOND_TURNS; i++)
        turn();
}

static int connect_one(struct client *c, SSL_SESSION *session)
{
    int n = client.connected, m = server.connected;
    dtls_target t = {.peer = server_addr, .local = c->own, .name = "localhost", .session = session};
    c->conn = dtls_endpoint_connect(client.ep, &t, &connect_error);
    return c->conn && wait_for(&client.connected, n + 1) && wait_for(&server.connected, m + 1);
}

/* Two sides, of which the clients are seen at their own addresses, and as many connections. */
static void world(dtls_config server_cfg, dtls_config client_cfg, int n)
{
    kept_len = bytes_elsewhere = 0;
    drops_next = holds = 0;
    memset(forms, 0, sizeof forms);
    start(server_cfg, client_cfg);
    server.echo = 1;
    elsewhere = address("192.0.2.66:66");
    other_port = address("192.0.2.2:7777");
    other_ip = address("198.51.100.9:9999");
    for (int i = 0; i < PEERS; i++) {
        char text[40];
        snprintf(text, sizeof text, "192.0.2.2:%d", 5555 + i);
        clients[i] = (struct client){.own = address(text), .seen = address(text)};
    }
    wire_drop = through_nat;
    for (int i = 0; i < n; i++)
        REQUIRE(connect_one(&clients[i], NULL), "connection %d", i);
    settle();
}

/* Says something, and whether it gets that back. */
static int answered(struct client *c, const char *text)
{
    int before = client.messages;
    return dtls_conn_send(c->conn, text, strlen(text)) == 0 && wait_for(&client.messages, before + 1) &&
           strcmp(client.last, text) == 0 && client.messages == before + 1;
}

/* The same within a few turns; otherwise it was lost. */
static int answered_soon(struct client *c, const char *text)
{
    int before = client.messages;
    if (dtls_conn_send(c->conn, text, strlen(text)) != 0)
        return 0;
    settle();
    return client.messages == before + 1 && strcmp(client.last, text) == 0;
}

static dtls_counters counted(void)
{
    dtls_counters n;
    dtls_endpoint_counters(server.ep, &n);
    return n;
}

static void found(dtls_conn *conn, void *user)
{
    dtls_info info;
    dtls_conn_info(conn, &info);
    if (dtls_addr_equal(&info.peer, user))
        ((dtls_addr *)user)->reserved++;
}

/* How many connections the server has at an address. */
static int at(const dtls_addr *addr)
{
    dtls_addr a = *addr;
    dtls_endpoint_each(server.ep, found, &a);
    return a.reserved;
}

static const char *const suites[] = {"ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384",
                                     "ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-ECDSA-AES128-CCM",
                                     "ECDHE-ECDSA-AES256-CCM",        "ECDHE-ECDSA-ARIA128-GCM-SHA256"};
enum { SUITES = sizeof suites / sizeof *suites, SUITE_CHACHA = 2 };

/* What both ask for: the server's, the client's, and what their records have then, in and out for the server. */
static const struct ids {
    const char *what;
    int server, client, in, out;
} ids[] = {{"no connection IDs", DTLS_NEVER, 0, -1, -1},
           {"a client that has none", 0, DTLS_NEVER, -1, -1},
           {"the server's", 0, 0, 8, 0},
           {"both have one", 0, 8, 8, 8},
           {"the longest", DTLS_CID_MAX, DTLS_CID_MAX, 20, 20},
           {"the client's", DTLS_CID_EMPTY, 1, 0, 1},
           {"empty ones", DTLS_CID_EMPTY, DTLS_CID_EMPTY, 0, 0}};
enum { IDS = sizeof ids / sizeof *ids };

static void world_of(int suite, const struct ids *id, int n)
{
    server.ciphers = client.ciphers = suites[suite];
    world((dtls_config){.cid_bytes = id->server}, (dtls_config){.cid_bytes = id->client}, n);
}

/* A NAT gives a client another port: nothing changes for it, and for the server only the address. */
static void test_new_port(void)
{
    dtls_info info;
    for (int suite = 0; suite < SUITES; suite++) {
        for (const struct ids *id = ids; id < ids + IDS; id++) {
            world_of(suite, id, 1);
            struct client *c = &clients[0];
            CHECK(answered(c, "before"));
            dtls_conn_info(server.conn, &info);
            CHECK(info.cid_in == id->in && info.cid_out == id->out && info.moves == 0);
            c->seen = other_port;
            CHECK_THAT(answered_soon(c, "behind") && answered_soon(c, "again"), "%s, %s: the next message is answered",
                       suites[suite], id->what);
            dtls_conn_info(server.conn, &info);
            CHECK(dtls_addr_equal(&info.peer, &other_port) && info.moves == 1 && info.connected);
            CHECK(server.moved == 1 && dtls_addr_equal(&server.before, &c->own) && client.moved == 0);
            CHECK(counted().moves == 1 && counted().trials >= 1 && at(&c->own) == 0 && at(&other_port) == 1);
            c->seen = c->own;
            CHECK(answered_soon(c, "back") && server.moved == 2 && server.connected == 1 && server.messages == 4);
            dtls_conn_close(c->conn);
            CHECK(wait_for(&server.closed, 1) && server.reason == DTLS_CLOSE_PEER);
            stop();
        }
    }
}

/* Another network: what the nonce tells, or the ID, leads to the connection from anywhere; keys are tried at home only. */
static void test_new_network(void)
{
    for (int suite = 0; suite < SUITES; suite++) {
        for (int with_id = 0; with_id < 2; with_id++) {
            int found_it = strstr(suites[suite], "GCM") || with_id;
            world_of(suite, &ids[with_id ? 2 : 0], 1);
            CHECK(answered(&clients[0], "before"));
            clients[0].seen = other_ip;
            CHECK_THAT(answered_soon(&clients[0], "behind") == found_it, "%s, %s: %s", suites[suite],
                       with_id ? "connection ID" : "none", found_it ? "found" : "not found");
            CHECK(server.moved == found_it && counted().dropped[DTLS_DROP_STRANGER] == (uint64_t)!found_it);
            clients[0].seen = clients[0].own;
            CHECK(answered_soon(&clients[0], "home"));
            stop();
        }
    }
}

/* The client's first message behind its handshake comes from another address: nothing is known of its nonces yet. */
static void test_first_message(void)
{
    world_of(0, &ids[0], 1);
    clients[0].seen = other_port;
    CHECK_THAT(answered_soon(&clients[0], "first"), "no message before: its key is tried");
    stop();
}

/* What was there before moves nothing: neither the newest record nor older ones. */
static void test_replays(void)
{
    for (int suite = 0; suite < SUITES; suite++) {
        for (int with_id = 0; with_id < 2; with_id++) {
            world_of(suite, &ids[with_id ? 2 : 0], 1);
            for (int i = 0; i < 5; i++)
                CHECK(answered(&clients[0], "text"));
            int messages = server.messages;
            for (size_t i = 0; i < kept_len; i++)
                copied(&kept[i], i % 2 ? &elsewhere : &other_port);
            settle();
            CHECK_THAT(server.moved == 0 && server.messages == messages && at(&clients[0].own) == 1,
                       "%s, %s: %zu replays from elsewhere", suites[suite], with_id ? "connection ID" : "none",
                       kept_len);
            CHECK(bytes_elsewhere == 0 && answered_soon(&clients[0], "goes on") && server.closed == 0);
            stop();
        }
    }
}

/* Somebody copies each record and is faster. The message counts once, and where the original comes, there its client is. */
static void test_race(void)
{
    for (int with_id = 0; with_id < 2; with_id++) {
        world_of(0, &ids[with_id ? 2 : 0], 1);
        struct client *c = &clients[0];
        CHECK(answered(c, "before"));
        holds = 1;
        for (int i = 0; i < 3; i++) {
            int messages = server.messages;
            CHECK(dtls_conn_send(c->conn, "raced", 5) == 0);
            turn();
            struct datagram original = kept[0];
            copied(&original, &elsewhere);
            CHECK(server.messages == messages + 1 && at(&elsewhere) == 1);
            copied(&original, &c->own);
            CHECK_THAT(at(&c->own) == 1 && at(&elsewhere) == 0, "%s: the original brings it back",
                       with_id ? "connection ID" : "none");
            settle();
            CHECK(server.messages == messages + 1);
        }
        holds = 0;
        CHECK(answered_soon(c, "goes on") && server.moved >= 6 && server.closed == 0);
        stop();
    }
}

/* A copied record, and the original is lost: to where it came from go at most three times its bytes, until the client's next
 * record. Where the server can ask, it does not take that long. */
static void test_three_times(void)
{
    static const char big[1200] = {0};
    for (int with_id = 0; with_id < 2; with_id++) {
        world_of(0, &ids[with_id ? 2 : 0], 1);
        struct client *c = &clients[0];
        CHECK(answered(c, "before"));
        server.echo = 0;
        holds = 1;
        CHECK(dtls_conn_send(c->conn, "copied", 6) == 0);
        turn();
        holds = 0;
        struct datagram original = kept[0];
        copied(&original, &elsewhere);
        CHECK(at(&elsewhere) == 1 && server.moved == 1);
        int r = 0, sends = 0;
        for (; sends < 100 && r == 0; sends++)
            r = dtls_conn_send(server.conn, big, sends % 2 ? 1 : sizeof big);
        CHECK_THAT(r == DTLS_ERR_AGAIN, "%s: nothing more may be sent", with_id ? "connection ID" : "none");
        for (int i = 0; i < 10; i++)
            dtls_conn_send(server.conn, "x", 1);
        settle();
        CHECK_THAT(bytes_elsewhere > 0 || with_id, "something may (%zu bytes)", bytes_elsewhere);
        CHECK_THAT(bytes_elsewhere <= 3 * original.len, "three times %zu bytes at most: %zu", original.len,
                   bytes_elsewhere);
        if (with_id) {
            CHECK_THAT(at(&c->own) == 1 && server.moved == 2, "it was asked, and answered from where it is");
        } else {
            CHECK(dtls_conn_send(c->conn, "next", 4) == 0);
            settle();
            CHECK_THAT(at(&c->own) == 1 && server.moved == 2, "its next record brings it back");
        }
        CHECK_THAT(server.writable == 1, "and there is room again");
        size_t bytes = bytes_elsewhere;
        CHECK(dtls_conn_send(server.conn, big, sizeof big) == 0);
        settle();
        CHECK(bytes_elsewhere == bytes && client.last_len == sizeof big);
        stop();
    }
}

/* Behind a second, newer record an address is as good as any; where the peer can be asked, behind its answer. */
static void test_proof(void)
{
    static const char big[1200] = {0};
    for (int with_id = 0; with_id < 2; with_id++) {
        world_of(0, &ids[with_id ? 2 : 0], 1);
        struct client *c = &clients[0];
        CHECK(answered(c, "before"));
        server.echo = 0;
        c->seen = elsewhere;
        CHECK(dtls_conn_send(c->conn, "first", 5) == 0);
        turn();
        CHECK(dtls_conn_send(server.conn, big, sizeof big) == DTLS_ERR_AGAIN);
        if (with_id)
            wait_seconds(1); /* its old address is asked first, and says nothing */
        else
            CHECK(dtls_conn_send(c->conn, "second", 6) == 0);
        settle();
        CHECK_THAT(server.writable == 1 && dtls_conn_send(server.conn, big, sizeof big) == 0, "%s: proven",
                   with_id ? "by its answer" : "by a second record");
        settle();
        CHECK(client.last_len == sizeof big && server.moved == 1);
        stop();
    }
}

/* Two clients whose addresses change places: each record is found to be the other's. */
static void test_swap(void)
{
    for (int suite = 0; suite < SUITES; suite++) {
        for (int with_id = 0; with_id < 2; with_id++) {
            int good = 1;
            world_of(suite, &ids[with_id ? 2 : 0], 3);
            for (int i = 0; i < 3; i++)
                CHECK(answered(&clients[i], "before"));
            for (int round = 0; round < 3; round++) {
                dtls_addr first = clients[0].seen;
                for (int i = 0; i < 3; i++)
                    clients[i].seen = i < 2 ? clients[i + 1].seen : first;
                for (int i = 0; i < 3; i++)
                    good &= answered_soon(&clients[i], "swapped") && answered_soon(&clients[i], "again");
            }
            CHECK_THAT(good, "%s, %s: three clients take turns", suites[suite], with_id ? "connection ID" : "none");
            CHECK(server.closed == 0 && counted().conns == 3 && server.messages == 3 + 18);
            for (int i = 0; i < 3; i++)
                CHECK(at(&clients[i].seen) == 1);
            stop();
        }
    }
}

/* A new association from an address takes the place of one that was made there, not of one that only moved there. */
static void test_newcomer(void)
{
    for (int with_id = 0; with_id < 2; with_id++) {
        world_of(0, &ids[with_id ? 2 : 0], 1);
        CHECK(answered(&clients[0], "before"));
        holds = 1;
        CHECK(dtls_conn_send(clients[0].conn, "copied", 6) == 0);
        turn();
        holds = 0;
        copied(&kept[0], &clients[1].own);
        CHECK(at(&clients[1].own) == 1);
        CHECK_THAT(connect_one(&clients[1], NULL) && server.closed == 0,
                   "%s: who copies a record and connects ends nobody", with_id ? "connection ID" : "none");
        CHECK(answered_soon(&clients[1], "newcomer") && answered_soon(&clients[0], "victim"));
        CHECK(answered_soon(&clients[1], "newcomer") && counted().conns == 2 && at(&clients[0].own) == 1);
        stop();
    }
}

/* The client says that, but it does not arrive: a copy does, from there. */
static void copy_instead(struct client *c, const dtls_addr *from)
{
    holds = 1;
    CHECK(dtls_conn_send(c->conn, "copied", 6) == 0);
    turn();
    holds = 0;
    copied(&kept[0], from);
}

/* Whose address somebody was moved to is found there all the same, and so is that one at home. */
static void test_displaced(void)
{
    for (int suite = 0; suite <= SUITE_CHACHA; suite += SUITE_CHACHA) {
        for (int with_id = 0; with_id < 2; with_id++) {
            world_of(suite, &ids[with_id ? 2 : 0], 2);
            CHECK(answered(&clients[0], "before") && answered(&clients[1], "before"));
            for (int i = 0; i < 3; i++) {
                copy_instead(&clients[0], &clients[1].own);
                CHECK(at(&clients[1].own) == 2);
                CHECK_THAT(answered_soon(&clients[1], "mine") && answered_soon(&clients[1], "again"),
                           "%s, %s: the one who was there", suites[suite], with_id ? "connection ID" : "none");
                CHECK(answered_soon(&clients[0], "home") && at(&clients[1].own) == 1 && at(&clients[0].own) == 1);
            }
            CHECK(server.closed == 0 && counted().conns == 2);
            stop();
        }
    }
}

/* Somebody moves to where a handshake is going on, which then takes no place from him. */
static void test_moved_into_a_handshake(void)
{
    for (int with_id = 0; with_id < 2; with_id++) {
        world_of(0, &ids[with_id ? 2 : 0], 1);
        CHECK(answered(&clients[0], "before"));
        dtls_target t = {.peer = server_addr, .local = clients[1].own, .name = "localhost"};
        clients[1].conn = dtls_endpoint_connect(client.ep, &t, &connect_error);
        for (int i = 0; i < 3; i++) /* the server has its ClientHello with the cookie */
            turn();
        CHECK(counted().handshakes == 1);
        if (with_id) { /* without one a datagram from there is the handshake's */
            copy_instead(&clients[0], &clients[1].own);
            CHECK(at(&clients[1].own) == 1);
        }
        CHECK_THAT(wait_for(&client.connected, 2) && wait_for(&server.connected, 2) && server.closed == 0,
                   "%s: the handshake goes on", with_id ? "connection ID" : "none");
        CHECK(answered_soon(&clients[1], "new") && answered_soon(&clients[0], "old") &&
              answered_soon(&clients[1], "new"));
        CHECK(counted().conns == 2 && at(&clients[0].own) == 1 && at(&clients[1].own) == 1);
        stop();
    }
}

/* Neither the old address nor the new one answers: they are asked four times in all, and again behind the next record. */
static void test_unanswered_questions(void)
{
    world_of(0, &ids[2], 1);
    CHECK(answered(&clients[0], "before"));
    copy_instead(&clients[0], &elsewhere);
    clients[0].seen = address("192.0.2.99:9");
    wait_seconds(5);
    size_t asked = bytes_elsewhere;
    CHECK_THAT(asked > 0 && asked <= 3 * kept[0].len && server.moved == 1, "%zu bytes ask an address that sent %zu",
               asked, kept[0].len);
    wait_seconds(20);
    CHECK(bytes_elsewhere == asked && server.closed == 0);
    clients[0].seen = clients[0].own;
    CHECK_THAT(answered(&clients[0], "back") && server.moved == 2, "it comes back whenever it likes");
    stop();
}

/* Places are counted where a client is, once that is proven and there is one. */
static void test_quotas(void)
{
    server.ciphers = client.ciphers = NULL;
    world((dtls_config){.max_conns_per_address = 1}, (dtls_config){0}, 1);
    CHECK(answered(&clients[0], "before"));
    clients[1].own = other_ip;
    clients[1].seen = other_ip;
    CHECK(connect_one(&clients[1], NULL));
    clients[0].seen = address("198.51.100.9:1");
    CHECK_THAT(answered_soon(&clients[0], "full"), "a full address");
    wait_seconds(1);
    CHECK_THAT(!connect_one(&clients[2], NULL), "it counts where it was");
    clients[0].seen = address("203.0.113.3:3");
    CHECK_THAT(answered_soon(&clients[0], "elsewhere") && server.moved == 2, "another one");
    wait_seconds(1);
    CHECK_THAT(connect_one(&clients[2], NULL), "and where it was there is a place again");
    stop();
}

/* ---- what others made of it once ---- */

static struct {
    struct datagram d;
    int64_t due;
} slow[64];
static int slow_len;
static int64_t delay_us;

static int slowly(const struct datagram *d)
{
    if (slow_len < 64) {
        slow[slow_len].d = *d;
        slow[slow_len++].due = now_us + delay_us;
    }
    return 1;
}

static void slow_turn(void)
{
    turn();
    for (int i = 0; i < slow_len; i++)
        if (slow[i].due <= now_us) {
            struct datagram d = slow[i].d;
            memmove(slow + i, slow + i + 1, (size_t)(--slow_len - i) * sizeof *slow);
            i--;
            through_nat(&d);
        }
}

/* The new path is slower than the old one: an answer that comes behind the next question is one all the same. */
static void test_slower_way(void)
{
    static const char big[1200] = {0};
    for (int ms = 30; ms <= 400; ms += 90) {
        server.ciphers = client.ciphers = suites[0];
        world((dtls_config){0}, (dtls_config){0}, 1);
        struct client *c = &clients[0];
        CHECK(answered(c, "before"));
        server.echo = 0;
        slow_len = 0;
        delay_us = ms * 1000;
        wire_drop = slowly;
        c->seen = other_port;
        int refused = 0, sent = 0;
        for (int i = 0; i < 3000; i++) { /* 30 s: the client says something each second, the server as much as it may */
            if (i % 100 == 0)
                dtls_conn_send(c->conn, "still here", 10);
            if (i > 1000 && i % 50 == 0) {
                int r = dtls_conn_send(server.conn, big, sizeof big);
                refused += r == DTLS_ERR_AGAIN;
                sent += r == 0;
            }
            slow_turn();
        }
        CHECK_THAT(refused == 0 && sent > 0,
                   "%d ms each way on the new path: 10 s after the move %d messages leave, %d are refused", ms, sent,
                   refused);
        stop();
    }
}

/* What is not proven takes nobody's place at an address. */
static void test_full_source(void)
{
    server.ciphers = client.ciphers = suites[0];
    world((dtls_config){.max_conns_per_address = 3, .max_conns_per_identity = DTLS_NEVER}, (dtls_config){0}, 3);
    for (int i = 0; i < 3; i++) {
        CHECK(answered(&clients[i], "before"));
        dtls_addr spoofed = other_ip;
        spoofed.port = (uint16_t)(40 + i);
        copy_instead(&clients[i], &spoofed);       /* the client itself writes that address on one datagram */
        clients[i].seen = address("192.0.2.99:9"); /* and answers no question */
    }
    clients[5].own = clients[5].seen = other_ip;
    CHECK_THAT(connect_one(&clients[5], NULL),
               "one datagram of each in the name of an address, and its own clients get in: %s", client.reason_text);
    stop();
}

/* Who is back home is where its handshake was: it is replaced there as before. */
static void test_roamed_for_good(void)
{
    for (int with_id = 0; with_id < 2; with_id++) {
        server.ciphers = client.ciphers = suites[0];
        world((dtls_config){.cid_bytes = with_id ? 0 : DTLS_NEVER, .max_conns_per_identity = 1}, (dtls_config){0}, 1);
        CHECK(answered(&clients[0], "before"));
        copy_instead(&clients[0], &elsewhere);
        CHECK(answered_soon(&clients[0], "home") && at(&clients[0].own) == 1);
        /* The client is started again, without a word. */
        clients[1].own = address("192.0.2.3:3");
        clients[1].seen = clients[0].seen;
        clients[0].seen = clients[0].own = address("192.0.2.77:7");
        CHECK_THAT(connect_one(&clients[1], NULL), "%s: once a record was copied, and its client is started again: %s",
                   with_id ? "connection ID" : "none", client.reason_text);
        stop();
    }
}

/* Whose address others move to, without a way to be found but by that. */
static void test_native_unlisted(void)
{
    /* The server has no connection ID for clients[0], and tries no keys; the others have IDs, and their datagrams false addresses. */
    server.ciphers = client.ciphers = suites[0];
    world((dtls_config){.roam_trials = DTLS_NEVER, .max_conns_per_identity = DTLS_NEVER}, (dtls_config){0}, 6);
    for (int i = 0; i < 6; i++)
        CHECK(answered(&clients[i], "before"));
    for (int i = 0; i < 4; i++)
        copy_instead(&clients[i], &other_ip);
    dtls_endpoint *with = client.ep;
    side_open(&client, "client", (dtls_config){.send = on_send, .cid_bytes = DTLS_NEVER});
    dtls_endpoint *without = client.ep;
    clients[6].own = clients[6].seen = other_ip;
    REQUIRE(connect_one(&clients[6], NULL), "victim");
    CHECK(answered(&clients[6], "mine"));
    dtls_conn *victim = clients[6].conn;
    client.ep = with;
    for (int i = 4; i < 6; i++)
        copy_instead(&clients[i], &other_ip);
    client.ep = without;
    clients[6].conn = victim;
    int ok = 0;
    for (int i = 0; i < 5; i++)
        ok += answered_soon(&clients[6], "still mine");
    CHECK_THAT(ok >= 4, "whose address five others moved to is heard there: %d of 5", ok);
    client.ep = with;
    stop();
}

/* Keys are tried so often in a second, or not at all. */
static void test_trials(void)
{
    server.ciphers = client.ciphers = suites[SUITE_CHACHA];
    world((dtls_config){.cid_bytes = DTLS_NEVER, .roam_trials = DTLS_NEVER}, (dtls_config){0}, 1);
    clients[0].seen = other_port;
    CHECK_THAT(!answered_soon(&clients[0], "never") && counted().trials == 0, "switched off");
    stop();
    server.ciphers = client.ciphers = suites[SUITE_CHACHA];
    world((dtls_config){.cid_bytes = DTLS_NEVER, .roam_trials = 1, .roam_trials_each = 2}, (dtls_config){0}, 4);
    for (int i = 0; i < 4; i++)
        clients[i].seen.port = (uint16_t)(clients[i].seen.port + 1000);
    int good = 0;
    for (int seconds = 0; good < 4 && seconds < 60; wait_seconds(1), seconds++) {
        good = 0;
        for (int i = 0; i < 4; i++)
            good += answered_soon(&clients[i], "there?");
    }
    CHECK_THAT(good == 4 && counted().trials_refused > 0, "few at a time: all are found in the end, %d were refused",
               (int)counted().trials_refused);
    CHECK(counted().moves == 4 && server.moved == 4);
    stop();
}

/* Not in a handshake: the client's other flights come from where the server does not know it, and nobody else can. */
static void test_in_handshake(void)
{
    server.ciphers = client.ciphers = NULL;
    world((dtls_config){0}, (dtls_config){0}, 0);
    struct client *c = &clients[0];
    dtls_target t = {.peer = server_addr, .local = c->own, .name = "localhost"};
    c->conn = dtls_endpoint_connect(client.ep, &t, &connect_error);
    for (int i = 0; i < 4; i++) /* cookie, and the server's first flight */
        turn();
    c->seen = other_port;
    CHECK_THAT(wait_for(&client.connected, 1) && wait_for(&server.connected, 1), "a new start brings it through");
    CHECK(answered(c, "talks") && server.moved == 0 && at(&other_port) == 1);
    stop();
}

/* With IDs everything protected that a client sends has one, and messages are of a size that fits. */
static void test_form(void)
{
    static char big[2000];
    for (const struct ids *id = ids + 2; id < ids + IDS; id++) {
        world_of(1, id, 1);
        size_t room = dtls_conn_payload_max(clients[0].conn), back = dtls_conn_payload_max(server.conn);
        CHECK(answered(&clients[0], "text"));
        largest = 0;
        server.echo = 0;
        CHECK(dtls_conn_send(clients[0].conn, big, room) == 0);
        settle();
        CHECK_THAT(largest == 1500 - IP_UDP_BYTES && server.last_len == room,
                   "%s: the largest message fills a datagram", id->what);
        CHECK(back == (size_t)(1500 - IP_UDP_BYTES - 13 - 24 - (id->out > 0 ? id->out + 1 : 0)));
        CHECK(room == (size_t)(1500 - IP_UDP_BYTES - 13 - 24 - (id->in > 0 ? id->in + 1 : 0)));
        dtls_conn_close(clients[0].conn);
        settle();
        CHECK_THAT(id->in > 0 ? forms[WITH_CID] >= 3 && !forms[21] && !forms[22] && !forms[23]
                              : !forms[WITH_CID] && forms[23] > 0,
                   "%s: %zu records with an ID, %zu messages without", id->what, forms[WITH_CID], forms[23]);
        stop();
    }
}

/* Extensions that are not as they should be, from a client that writes them itself. */

static struct {
    unsigned type;
    unsigned char data[256];
    size_t len;
} extension;

static int put_extension(SSL *ssl, unsigned type, unsigned context, const unsigned char **out, size_t *len, X509 *cert,
                         size_t chain, int *alert, void *user)
{
    (void)ssl, (void)type, (void)context, (void)cert, (void)chain, (void)alert, (void)user;
    *out = extension.data;
    *len = extension.len;
    return 1;
}

static int with_extension(SSL_CTX *ctx)
{
    return SSL_CTX_add_custom_ext(ctx, extension.type, SSL_EXT_CLIENT_HELLO | SSL_EXT_TLS1_2_SERVER_HELLO,
                                  put_extension, NULL, NULL, NULL, NULL) != 1;
}

static void test_odd_extensions(void)
{
    static const struct {
        const char *what;
        unsigned type;
        size_t len;
        unsigned char first;
        int in, out; /* what the server has then; -2: no connection */
    } tries[] = {{"an ID without its length", 54, 0, 0, -2, -2},
                 {"an ID that is shorter than its length", 54, 4, 4, -2, -2},
                 {"an ID that is longer", 54, 4, 2, -2, -2},
                 {"an empty ID with something behind it", 54, 2, 0, -2, -2},
                 {"an ID of more than 64 bytes", 54, 66, 65, -1, -1},
                 {"RRC without an ID", 61, 0, 0, -1, -1},
                 {"RRC with data", 61, 1, 0, -2, -2}};
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        dtls_info info;
        extension.type = tries[i].type;
        extension.len = tries[i].len;
        extension.data[0] = tries[i].first;
        server.ciphers = client.ciphers = NULL;
        client.hook = with_extension;
        world((dtls_config){.handshake_timeout_ms = 2000},
              (dtls_config){.cid_bytes = DTLS_NEVER, .handshake_timeout_ms = 2000}, 0);
        bool open = connect_one(&clients[0], NULL);
        CHECK_THAT(open == (tries[i].in != -2), "%s: %s", tries[i].what, open ? "connected" : client.reason_text);
        if (open) {
            dtls_conn_info(server.conn, &info);
            CHECK(info.cid_in == tries[i].in && info.cid_out == tries[i].out && answered(&clients[0], "talks"));
        }
        stop();
    }
}

/* A load balancer's number, and what is no good one. */
static void test_prefix(void)
{
    static const uint8_t number[] = {0xab, 0xcd, 0xef, 0x01, 0x02};
    static const struct {
        int bytes;
        size_t prefix;
        int good;
    } tries[] = {{0, 4, 1},  {0, 5, 0},  {9, 5, 1}, {20, 5, 1}, {4, 1, 0}, {DTLS_NEVER, 1, 0}, {DTLS_CID_EMPTY, 1, 0},
                 {21, 0, 0}, {-3, 0, 0}, {20, 0, 1}};
    server.ciphers = client.ciphers = NULL;
    world((dtls_config){.cid_prefix = number, .cid_prefix_len = 2}, (dtls_config){.cid_bytes = 5}, 2);
    for (int i = 0; i < 2; i++) {
        CHECK(answered(&clients[i], "text"));
        CHECK_THAT(kept[0].data[0] == WITH_CID && memcmp(kept[0].data + 11, number, 2) == 0 &&
                       memcmp(kept[0].data + 13, number + 2, 3) != 0,
                   "each ID begins with it");
    }
    CHECK_THAT(memcmp(kept[0].data + 13, kept[1].data + 13, CID_BYTES - 2) != 0, "and differs behind it");
    stop();
    loop = dtls_loop_new(&world_clock);
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        dtls_error err = {0};
        dtls_config cfg = {.cid_bytes = tries[i].bytes,
                           .cid_prefix = number,
                           .cid_prefix_len = tries[i].prefix,
                           .send = on_send,
                           .on_ssl_ctx = with_identity,
                           .user = &server};
        dtls_endpoint *ep = dtls_endpoint_new(loop, &cfg, &err);
        CHECK_THAT((ep != NULL) == tries[i].good, "%d bytes, %zu of them given: %s", tries[i].bytes, tries[i].prefix,
                   ep ? "taken" : err.text);
    }
    dtls_loop_free(loop);
}

/* ---- nonces ---- */

enum { NONCES_MAX = 4000 };

static struct nonce {
    int to_server;
    unsigned char key[2 + 8]; /* which association, and the nonce */
} nonces[NONCES_MAX];
static int nonces_len, nonces_again, association;

/* Each protected record that leaves: under one key no nonce comes twice, whatever the record's form. */
static void note_nonces(struct side *s)
{
    const struct datagram *d = &wire[wire_len - 1];
    (void)s;
    for (size_t at = 0, size; at + 13 < d->len; at += size) {
        const unsigned char *p = d->data + at;
        int to_server = dtls_addr_equal(&d->to, &server_addr);
        size_t header = p[0] == WITH_CID ? 13 + (to_server ? CID_BYTES : 4) : 13;
        size = header + (size_t)(p[header - 2] << 8 | p[header - 1]);
        if (p[4] == 0 || nonces_len == NONCES_MAX)
            continue;
        struct nonce n = {.to_server = to_server, .key = {(unsigned char)association}};
        memcpy(n.key + 2, p + header, 8);
        for (int i = 0; i < nonces_len; i++)
            nonces_again += memcmp(&nonces[i], &n, sizeof n) == 0;
        nonces[nonces_len++] = n;
    }
}

static void test_nonces(void)
{
    uint32_t chance = 7;
    server.ciphers = client.ciphers = suites[0];
    nonces_len = nonces_again = association = 0;
    world((dtls_config){.retransmit_ms = 20}, (dtls_config){.cid_bytes = 4, .retransmit_ms = 20}, 0);
    inside_send = note_nonces;
    server.echo = 1;
    for (int round = 0; round < 6; round++, association++) {
        drops_next = round % 3; /* its flights are sent again */
        REQUIRE(connect_one(&clients[0], NULL), "connection %d", round);
        for (int i = 0; i < 80 && clients[0].conn; i++) {
            chance = chance * 1103515245u + 12345u;
            send_refuses = (chance >> 16) % 5 == 0;
            dtls_conn_send(clients[0].conn, "text", 1 + (chance >> 20) % 4);
            dtls_conn_send(server.conn, "other", 1 + (chance >> 22) % 5);
            send_refuses = 0;
            drops_next = (chance >> 24) % 4 == 0;
            if ((chance >> 26) % 4 == 0)
                clients[0].seen.port = (uint16_t)(7000 + (chance >> 28));
            if (kept_len > 3 && (chance >> 12) % 3 == 0)
                copied(&kept[(chance >> 8) % 3], &elsewhere);
            turn();
        }
        dtls_conn_close(clients[0].conn);
        settle();
        clients[0].seen = clients[0].own;
    }
    CHECK_THAT(nonces_len > 1000 && nonces_again == 0, "of %d records none has another's nonce: %d have", nonces_len,
               nonces_again);
    CHECK_THAT(server.moved > 50, "with %d moves", server.moved);
    stop();
}

/* Short IDs run out; who gets none has a connection all the same. */
static void test_short_ids(void)
{
    int with_id = 0;
    server.ciphers = client.ciphers = NULL;
    world((dtls_config){.cid_bytes = 1, .max_conns = 1000}, (dtls_config){.max_conns = 1000}, 0);
    struct client *c = &clients[0];
    SSL_SESSION *session = NULL;
    for (int i = 0; i < 300; i++) {
        dtls_info info;
        c->own.port = c->seen.port = (uint16_t)(10000 + i);
        REQUIRE(connect_one(c, session), "connection %d", i);
        SSL_SESSION_free(session);
        session = dtls_conn_session(c->conn);
        dtls_conn_info(c->conn, &info);
        with_id += info.cid_out == 1;
        if (!answered_soon(c, "talks"))
            CHECK(!"answered");
    }
    SSL_SESSION_free(session);
    CHECK_THAT(with_id > 200 && with_id <= 256 && counted().conns == 300, "%d of 300 have one of 256", with_id);
    stop();
}

/* A resumed session has IDs of its own, and so has a renewed association. */
static void test_resumption(void)
{
    dtls_info info;
    server.ciphers = client.ciphers = NULL;
    world((dtls_config){0}, (dtls_config){0}, 1);
    CHECK(answered(&clients[0], "first"));
    uint8_t id[CID_BYTES];
    memcpy(id, kept[0].data + 11, CID_BYTES);
    SSL_SESSION *session = dtls_conn_session(clients[0].conn);
    CHECK(connect_one(&clients[1], session) && client.resumed && answered(&clients[1], "second"));
    dtls_conn_info(clients[1].conn, &info);
    CHECK_THAT(info.resumed && info.cid_out == CID_BYTES && memcmp(kept[0].data + 11, id, CID_BYTES) != 0,
               "a resumed session has another ID");
    clients[1].seen = other_ip;
    CHECK(answered_soon(&clients[1], "moved") && server.moved == 1);
    SSL_SESSION_free(session);
    CHECK(dtls_conn_renew(clients[0].conn) == 0 && wait_for(&client.renewed, 1));
    CHECK_THAT(answered(&clients[0], "renewed") && memcmp(kept[0].data + 11, id, CID_BYTES) != 0,
               "and so has a renewed association");
    stop();
}

/* Callbacks may end it all while it moves. */
static void close_moved(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)s;
    if (event == DTLS_EV_MOVED)
        dtls_conn_close(conn);
}

static void free_moved(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)conn;
    if (event == DTLS_EV_MOVED) {
        dtls_endpoint_free(s->ep);
        s->ep = NULL;
    }
}

static void send_moved(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)s;
    if (event == DTLS_EV_MOVED)
        CHECK(dtls_conn_send(conn, "you moved", 9) == 0);
}

static void test_callbacks(void)
{
    void (*const inside[])(struct side * s, dtls_conn * conn, dtls_event event) = {close_moved, free_moved, send_moved};
    for (int i = 0; i < 3; i++) {
        for (int with_id = 0; with_id < 2; with_id++) {
            world_of(0, &ids[with_id ? 2 : 0], 2);
            CHECK(answered(&clients[0], "before") && answered(&clients[1], "before"));
            server.inside = inside[i];
            clients[0].seen = other_port;
            CHECK(dtls_conn_send(clients[0].conn, "moved", 5) == 0);
            settle();
            CHECK_THAT(server.moved == 1 && server.messages == (i < 2 ? 2 : 3), "%s",
                       i == 0   ? "closed while it moves"
                       : i == 1 ? "freed while it moves"
                                : "answered while it moves");
            if (i == 2)
                CHECK(client.messages == 4);
            stop();
        }
    }
}

/* Ten seconds after a move the old address is one like any other. */
static void test_kept(void)
{
    static const char big[1200] = {0};
    for (int after = 0; after < 2; after++) {
        world_of(0, &ids[0], 1);
        CHECK(answered(&clients[0], "before"));
        clients[0].seen = other_port;
        CHECK(answered_soon(&clients[0], "one") && answered_soon(&clients[0], "two"));
        wait_seconds(after ? 11 : 5);
        server.echo = 0;
        clients[0].seen = clients[0].own;
        CHECK(dtls_conn_send(clients[0].conn, "back", 4) == 0);
        settle();
        CHECK_THAT(at(&clients[0].own) == 1 &&
                       dtls_conn_send(server.conn, big, sizeof big) == (after ? DTLS_ERR_AGAIN : 0),
                   "back after %s: %s", after ? "11 s" : "5 s", after ? "to be proven again" : "proven as before");
        stop();
    }
}

/* What was under way from the old address still counts, and moves nothing back. */
static void test_stragglers(void)
{
    for (int with_id = 0; with_id < 2; with_id++) {
        world_of(0, &ids[with_id ? 2 : 0], 1);
        struct client *c = &clients[0];
        CHECK(answered(c, "before"));
        holds = 1;
        CHECK(dtls_conn_send(c->conn, "late", 4) == 0);
        turn();
        holds = 0;
        struct datagram late = kept[0];
        c->seen = other_port;
        CHECK(answered_soon(c, "moved"));
        int messages = server.messages;
        copied(&late, &c->own);
        settle();
        CHECK_THAT(server.messages == messages + 1 && strcmp(server.last, "late") == 0 && server.moved == 1,
                   "%s: a message from before arrives, and moves nothing", with_id ? "connection ID" : "none");
        stop();
    }
}

/* Datagrams with IDs that are nobody's, cut, or of somebody else's connection. */
static void test_strange_ids(void)
{
    world_of(0, &ids[2], 2);
    CHECK(answered(&clients[0], "one") && answered(&clients[1], "two"));
    struct datagram other = kept[0];
    uint64_t before = counted().dropped[DTLS_DROP_CID];
    for (size_t len = 0; len < other.len; len++) {
        struct datagram cut = other;
        cut.len = len;
        copied(&cut, &elsewhere);
        copied(&cut, &clients[0].own);
    }
    CHECK(dtls_conn_send(clients[0].conn, "fresh", 5) == 0);
    holds = 1;
    turn();
    holds = 0;
    struct datagram fresh = kept[0];
    for (size_t i = 0; i < fresh.len; i++) {
        struct datagram changed = fresh;
        changed.data[i] ^= 0x10;
        copied(&changed, &elsewhere);
    }
    memcpy(fresh.data + 11, other.data + 11, CID_BYTES);
    copied(&fresh, &elsewhere);
    settle();
    CHECK_THAT(server.moved == 0 && server.messages == 2 && counted().dropped[DTLS_DROP_CID] > before + 100 &&
                   bytes_elsewhere == 0,
               "cut, changed and foreign IDs are dropped");
    CHECK(answered(&clients[0], "goes on") && answered(&clients[1], "goes on"));
    stop();
}

/* What a ClientHello offers, by the numbers of the extensions. */
static int offers(int extension)
{
    const unsigned char *p = hellos[1].data + 13 + 12 + 2 + 32; /* behind version and random */
    const unsigned char *end = hellos[1].data + hellos[1].len;
    p += 1 + p[0];               /* session */
    p += 1 + p[0];               /* cookie */
    p += 2 + (p[0] << 8 | p[1]); /* suites */
    p += 1 + p[0] + 2;           /* compression, and how much follows */
    for (; p + 4 <= end; p += 4 + (p[2] << 8 | p[3]))
        if ((p[0] << 8 | p[1]) == extension)
            return p[2] << 8 | p[3];
    return -1;
}

static int keep_and_pass(const struct datagram *d)
{
    keep_hellos(d);
    return through_nat(d);
}

/* Both extensions or none. */
static void test_offers(void)
{
    static const struct {
        const char *what;
        int cid_bytes, cid, rrc, agreed;
    } tries[] = {{"by default", 0, 1, 0, 1}, {"with one of its own", 7, 8, 0, 1}, {"never", DTLS_NEVER, -1, -1, 0}};
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        dtls_info info;
        client.ciphers = server.ciphers = NULL;
        world((dtls_config){0}, (dtls_config){.cid_bytes = tries[i].cid_bytes}, 0);
        wire_drop = keep_and_pass;
        REQUIRE(connect_one(&clients[0], NULL), "a connection");
        dtls_conn_info(clients[0].conn, &info);
        CHECK_THAT(offers(54) == tries[i].cid && offers(61) == tries[i].rrc &&
                       (info.cid_out == CID_BYTES) == tries[i].agreed,
                   "%s: %d and %d bytes", tries[i].what, offers(54), offers(61));
        CHECK(answered(&clients[0], "talks"));
        stop();
    }
}

/* Somebody began a handshake there, and has left. */
static void test_busy_address(void)
{
    for (int suite = 0; suite < SUITES; suite++) {
        world_of(suite, &ids[0], 2);
        CHECK(answered(&clients[0], "one") && answered(&clients[1], "two"));
        CHECK(dtls_conn_renew(clients[1].conn) == 0);
        for (int i = 0; i < 3; i++) /* cookie, and the server's first flight */
            turn();
        clients[0].seen = clients[1].seen;
        clients[1].seen = other_port;
        CHECK_THAT(answered_soon(&clients[0], "behind") && server.moved == 1, "%s: who has that address now is heard",
                   suites[suite]);
        stop();
    }
}

/* A copy comes first, the original is lost: who can be asked is asked where it was, also where its records have no ID of the
 * server's. */
static void test_asked(void)
{
    for (const struct ids *id = ids + 2; id < ids + IDS; id++) {
        world_of(0, id, 1);
        CHECK(answered(&clients[0], "before"));
        holds = 1;
        CHECK(dtls_conn_send(clients[0].conn, "copied", 6) == 0);
        turn();
        holds = 0;
        copied(&kept[0], &elsewhere);
        CHECK(at(&elsewhere) == 1);
        settle();
        CHECK_THAT(at(&clients[0].own) == 1 && server.moved == 2, "%s: its answer brings it back", id->what);
        stop();
    }
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"new port", test_new_port},
        {"new network", test_new_network},
        {"first message", test_first_message},
        {"replays", test_replays},
        {"race", test_race},
        {"three times", test_three_times},
        {"proof", test_proof},
        {"swap", test_swap},
        {"newcomer", test_newcomer},
        {"displaced", test_displaced},
        {"moved into a handshake", test_moved_into_a_handshake},
        {"unanswered questions", test_unanswered_questions},
        {"quotas", test_quotas},
        {"slower way", test_slower_way},
        {"full source", test_full_source},
        {"back home", test_roamed_for_good},
        {"native", test_native_unlisted},
        {"trials", test_trials},
        {"in a handshake", test_in_handshake},
        {"form", test_form},
        {"offers", test_offers},
        {"odd extensions", test_odd_extensions},
        {"prefix", test_prefix},
        {"nonces", test_nonces},
        {"short ids", test_short_ids},
        {"resumption", test_resumption},
        {"callbacks", test_callbacks},
        {"kept", test_kept},
        {"stragglers", test_stragglers},
        {"strange ids", test_strange_ids},
        {"busy address", test_busy_address},
        {"asked", test_asked},
        {NULL, NULL},
    };
    tests_begin("moves", argc, argv);
    virtual_chance();
    virtual_identities();
    for (const struct test *t = tests; t->name; t++)
        if (test_begin(t->name))
            t->run();
    virtual_identities_free();
    return tests_end();
}
