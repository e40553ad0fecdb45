/* Fuzzes what a server does with datagrams: see fuzz.h for what an input is.
 *
 * One server lives through thousands of executions, with one member: a real client whose connection is in the script's
 * hands only by its address and its messages, and that must get its echo after each script. The visitor's handshake was
 * recorded and is played; the other recording is the member's, as if it had restarted. The stranger has none.
 *
 * Checked: connections are open only to verified peers, one for each address, and end once and for a reason; no message
 * is made up, or comes twice; nothing larger than the request is answered before a cookie proved the address; the
 * counters count what is there; OpenSSL's memory stays bounded, and when deadlines have passed, the member's connection
 * is all that is left; and the loop comes to rest. */
#include "fuzz.h"

#include <limits.h>

enum {
    CONNS_MAX = 2, /* the member, and one more */
    IDLE_EVENT_MS = 20000,
    TALKS_MAX = 32, /* the member's messages in a script's hands */
    TALKS_AFTER = 3,
    TEXT_BYTES = 32,
    QUIET_MS = 3000 /* for libssl's buffers to be given back */
};

static struct peer {
    dtls_conn *open;
    int live; /* the member's real connection */
    int heard[2];
} peers[ADDRS];

static dtls_conn *member;
static int joining, leaving, replaced;
static int said, echoed; /* the member's messages of this execution */
static uint8_t heard[TALKS_MAX + TALKS_AFTER];

static size_t member_text(char text[TEXT_BYTES], int number)
{
    return (size_t)snprintf(text, TEXT_BYTES, "the member's message %d", number);
}

/* ---- the server ---- */

/* Its number, if it is one of the member's messages. */
static int member_number(const void *data, size_t len)
{
    char text[TEXT_BYTES];
    for (int i = 0; i < said; i++)
        if (len == member_text(text, i) && memcmp(data, text, len) == 0)
            return i;
    return -1;
}

static void hear_member(const void *data, size_t len)
{
    int number = member_number(data, len);
    if (number < 0 || heard[number]++)
        BROKEN("the member did not say that, or only once");
}

/* Nothing but a new handshake ends the member's connection; the others fall silent, too, or say goodbye. */
static int may_end(const struct peer *p, dtls_reason reason)
{
    if (leaving || reason == DTLS_CLOSE_REPLACED)
        return 1;
    return !p->live && (reason == DTLS_CLOSE_IDLE || (reason == DTLS_CLOSE_PEER && farewell));
}

static void server_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    dtls_info info;
    dtls_conn_info(conn, &info);
    enum who who = who_is(&info.peer);
    struct peer *p = &peers[who];
    if (event == DTLS_EV_CONNECTED) {
        if (p->open || who == STRANGER || !is_verified(conn, &client_id))
            BROKEN("a connection that cannot be");
        *p = (struct peer){.open = conn, .live = joining};
    } else if (event == DTLS_EV_FAILED) {
        if (p->open == conn || info.connected)
            BROKEN("a handshake failed that was done");
    } else if (p->open != conn) {
        BROKEN("event %d of a connection that is not open", (int)event);
    } else if (event == DTLS_EV_MESSAGE) {
        if (p->live)
            hear_member(data, len);
        else
            hear(p->heard, data, len);
        dtls_conn_send(conn, data, len);
    } else if (event == DTLS_EV_CLOSED) {
        if (!may_end(p, dtls_conn_reason(conn)))
            BROKEN("a connection ended: %s", dtls_conn_reason_text(conn));
        replaced |= p->live;
        p->open = NULL;
    }
}

/* ---- the member ---- */

static void client_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    if (event == DTLS_EV_MESSAGE)
        echoed = member_number(data, len);
    if (event == DTLS_EV_CLOSED && !leaving)
        BROKEN("the member's end of its connection closed: %s", dtls_conn_reason_text(conn));
}

static void member_say(void)
{
    char text[TEXT_BYTES];
    size_t len = member_text(text, said++);
    if (dtls_conn_send(member, text, len) != 0)
        BROKEN("the member cannot send");
}

static void member_echo(void)
{
    echoed = -1;
    member_say();
    carry();
    if (echoed != said - 1)
        BROKEN("the member got no echo");
}

static void member_join(void)
{
    joining = 1;
    member = connect_from(MEMBER, LIVE_CHANCE, NULL);
    carry();
    joining = replaced = 0;
    if (!peers[MEMBER].open || !peers[MEMBER].live)
        BROKEN("the member could not join");
}

/* It went under: a recorded handshake from its address took its place. */
static void member_rejoin(void)
{
    leaving = 1;
    dtls_conn_close(member);
    air_len = 0;
    member_join();
    leaving = 0;
}

/* ---- for scripts ---- */

static int played_open(void)
{
    const struct peer *p = &peers[played->from];
    return p->open && !p->live;
}

static enum who sender(unsigned n)
{
    static const enum who from[] = {VISITOR, MEMBER, STRANGER, MEMBER};
    return from[n];
}

/* What the member says is in the script's hands first. */
static void talk(void)
{
    if (replaced || said >= TALKS_MAX)
        return;
    member_say();
    append(air[air_first].data, air[air_first].len);
    air_len = 0;
}

static void count_open(dtls_conn *conn, void *user)
{
    (void)conn;
    ++*(size_t *)user;
}

static void counters_check(dtls_counters *n)
{
    size_t open = 0;
    dtls_endpoint_counters(server, n);
    dtls_endpoint_each(server, count_open, &open);
    /* A peer that restarts has two until the new one is done. */
    if (open > CONNS_MAX || n->conns > 2 * CONNS_MAX || open + n->handshakes != n->conns)
        BROKEN("%zu connections are not %zu and %zu handshakes", n->conns, open, n->handshakes);
}

static void deliver(enum who from, const void *data, size_t len)
{
    dtls_counters before, after;
    counters_check(&before);
    sent_by_server = 0;
    input(from, SERVER, data, len);
    counters_check(&after);
    if ((from == STRANGER || after.cookies_sent > before.cookies_sent) && sent_by_server > len)
        BROKEN("%zu bytes were answered with %zu", len, sent_by_server);
    if (replaced && !peers[MEMBER].open && !farewell)
        BROKEN("the member's connection gave way to nothing");
    surge_check();
    quiet();
}

/* ---- worlds ---- */

static void record_client(struct recording *r, enum who from, int mtu_bytes)
{
    dtls_endpoint *mine = endpoint(&client_id, (dtls_config){.on_event = client_event, .mtu_bytes = mtu_bytes});
    clients = mine;
    *r = (struct recording){.from = from};
    recording = r;
    dtls_conn *c = connect_from(from, RECORDED_CHANCE, NULL);
    carry();
    say(c, "first");
    say(c, "last");
    leaving = 1;
    dtls_conn_close(c);
    carry();
    leaving = 0;
    recording = NULL;
    dtls_endpoint_free(mine);
}

/* Pre-shared keys are offered, too, but nobody has one. */
static size_t some_key(void *user, const char *identity, uint8_t key[DTLS_PSK_MAX])
{
    (void)user;
    chance_bytes(key, DTLS_PSK_MAX);
    return strlen(identity) % 2 ? DTLS_PSK_MAX : 0;
}

static int whoever(void *user, const dtls_info *info, char *reason, size_t size)
{
    (void)user, (void)reason, (void)size;
    return strlen(info->peer_name) + strlen(info->peer_fingerprint) == 0; /* somebody in any case */
}

static void world_begin(void)
{
    now_us = 1000000;
    loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now});
    server = endpoint(&server_id, (dtls_config){.on_event = server_event,
                                                .psk = some_key,
                                                .on_peer = whoever,
                                                .max_conns = CONNS_MAX,
                                                .idle_ms = IDLE_EVENT_MS,
                                                .idle_timeout_ms = IDLE_MS,
                                                .cookie_ms = INT_MAX, /* as long as the world lasts */
                                                .session_cache = DTLS_NEVER});
    farewell = 1;
    record_client(&recordings[0], VISITOR, MTU);
    record_client(&recordings[1], MEMBER, SMALL_MTU);
    clients = endpoint(&client_id, (dtls_config){.on_event = client_event, .idle_timeout_ms = DTLS_NEVER});
    member_join();
}

static void world_end(void)
{
    leaving = 1;
    dtls_loop_free(loop);
    leaving = 0;
    air_len = 0;
}

/* Those whose handshake was played and not ended by the script are alive, too. */
static void last_messages(void)
{
    for (int i = 0; i < RECORDINGS; i++) {
        struct peer *p = &peers[recordings[i].from];
        const struct piece *last = last_message(&recordings[i]);
        if (!p->open || p->live)
            continue;
        deliver(recordings[i].from, last->data, last->len);
        if (p->heard[1] != 1)
            BROKEN("a connection is dead");
    }
}

static void deadlines_pass(void)
{
    dtls_counters n;
    advance(HANDSHAKE_MS);
    counters_check(&n);
    if (n.handshakes > 0)
        BROKEN("%zu handshakes outlived their deadline", n.handshakes);
    member_echo();
    advance(IDLE_MS - HANDSHAKE_MS);
    counters_check(&n);
    if (n.conns != 1)
        BROKEN("%zu connections are left", n.conns);
    member_echo();
    advance(QUIET_MS);
}

/* Newcomers are answered. It also leaves the spare SSL there, so that what OpenSSL holds can be compared. */
static void stranger_knocks(void)
{
    const struct piece *hello = &recordings[0].pieces[0];
    dtls_counters before, after;
    counters_check(&before);
    deliver(STRANGER, hello->data, hello->len);
    counters_check(&after);
    if (after.cookies_sent != before.cookies_sent + 1)
        BROKEN("a ClientHello was not answered");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    execution_begin();
    said = 0;
    memset(heard, 0, sizeof heard);
    client_chance = LIVE_CHANCE;
    script_run(data, len);
    last_messages();
    if (replaced)
        member_rejoin();
    member_echo();
    deadlines_pass();
    stranger_knocks();
    execution_end();
    return 0;
}
