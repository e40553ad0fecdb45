/* Fuzzes what a client does with datagrams: see fuzz.h for what an input is.
 *
 * Each execution starts a connection whose server was recorded: a full handshake in fragments, or a resumed one.
 *
 * Checked: the connection is open only to the right server; no message is made up, or comes twice; it ends once, by its
 * deadline, by the close_notify if the script had it, or by us; what is open takes the server's last message whatever
 * came before; nothing is left, in OpenSSL's memory, too; and the loop comes to rest. */
#include "fuzz.h"

static dtls_conn *conn;
static int opened, closed, heard[2];
static SSL_SESSION *session;

/* ---- the recorded server ---- */

static dtls_conn *serving;

static void server_event(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    if (event == DTLS_EV_CONNECTED)
        serving = c;
    else if (event == DTLS_EV_MESSAGE)
        dtls_conn_send(c, data, len);
}

static void recorded_event(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    (void)data, (void)len;
    if (event == DTLS_EV_CONNECTED && !session)
        session = dtls_conn_session(c);
}

static void record_server(struct recording *r, SSL_SESSION *resume)
{
    *r = (struct recording){.from = SERVER};
    recording = r;
    dtls_conn *c = connect_from(VISITOR, RECORDED_CHANCE, resume);
    carry();
    say(c, "first");
    say(c, "last");
    dtls_conn_close(serving);
    carry();
    recording = NULL;
}

/* ---- the client ---- */

static void client_event(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    if (c != conn || closed)
        BROKEN("event %d of a connection that is not there", (int)event);
    if (event == DTLS_EV_CONNECTED) {
        if (opened++ || !is_verified(c, &server_id))
            BROKEN("a connection that cannot be");
    } else if (event == DTLS_EV_MESSAGE) {
        if (!opened)
            BROKEN("a message ahead of its connection");
        hear(heard, data, len);
    } else if (event == DTLS_EV_CLOSED) {
        dtls_reason reason = dtls_conn_reason(c);
        if (opened && reason != DTLS_CLOSE_LOCAL && !(reason == DTLS_CLOSE_PEER && farewell))
            BROKEN("an open connection ended: %s", dtls_conn_reason_text(c));
        closed = 1;
    }
}

/* ---- for scripts ---- */

static int played_open(void)
{
    return opened && !closed;
}

static enum who sender(unsigned n)
{
    return n == 3 ? STRANGER : SERVER;
}

static void talk(void)
{
    if (played_open())
        say(conn, "hello");
}

static void deliver(enum who from, const void *data, size_t len)
{
    input(from, VISITOR, data, len);
    surge_check();
    quiet();
}

/* ---- worlds ---- */

static void world_begin(void)
{
    now_us = 1000000;
    loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now});
    server = endpoint(&server_id, (dtls_config){.on_event = server_event, .mtu_bytes = SMALL_MTU});
    dtls_endpoint *mine = endpoint(&client_id, (dtls_config){.on_event = recorded_event});
    clients = mine;
    record_server(&recordings[0], NULL);
    record_server(&recordings[1], session);
    dtls_endpoint_free(server);
    dtls_endpoint_free(mine);
    server = NULL; /* from now on nobody answers */
    clients = endpoint(&client_id, (dtls_config){.on_event = client_event});
}

static void world_end(void)
{
    dtls_loop_free(loop);
    SSL_SESSION_free(session);
    session = NULL;
}

static void connection_begin(int resume)
{
    SSL_SESSION *copy = resume ? SSL_SESSION_dup(session) : NULL; /* libssl writes on it when a handshake fails */
    opened = closed = heard[0] = heard[1] = 0;
    conn = connect_from(VISITOR, RECORDED_CHANCE, copy);
    SSL_SESSION_free(copy);
    carry();
}

/* A session that a failed handshake spoilt is not offered again, so what began as resumed may end as full. */
static void connection_end(void)
{
    dtls_info info;
    dtls_counters n;
    if (played_open()) {
        dtls_conn_info(conn, &info);
        const struct piece *last = last_message(&recordings[info.resumed]);
        deliver(SERVER, last->data, last->len);
        if (heard[1] != 1)
            BROKEN("the connection is dead");
        dtls_conn_close(conn);
        carry();
    }
    advance(HANDSHAKE_MS);
    dtls_endpoint_counters(clients, &n);
    if (!closed || n.conns != 0)
        BROKEN("the connection outlived its deadline");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    execution_begin();
    connection_begin(len > 0 && (data[0] & 2));
    script_run(data, len);
    connection_end();
    execution_end();
    return 0;
}
