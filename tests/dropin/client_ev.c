/* A client inside libev's loop.
 *
 *   client_ev ADDR      sends its input line by line, prints the answers, ends when it has them all */
#include "dtls.h"

#include <ev.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static dtls_loop *loop;
static struct ev_loop *ev;
static ev_io datagrams, input;
static ev_timer deadline;
static dtls_conn *conn; /* while connected */
static int unanswered, input_ended, done, status = 1;

static void on_event(dtls_conn *c, dtls_event event, const void *data, size_t len)
{
    if (event == DTLS_EV_CONNECTED) {
        conn = c;
    } else if (event == DTLS_EV_MESSAGE) {
        printf("%.*s\n", (int)len, (const char *)data);
        unanswered--;
    } else if (event == DTLS_EV_CLOSED) {
        fprintf(stderr, "%s, %d unanswered\n", dtls_conn_reason_text(c), unanswered);
        conn = NULL;
        done = 1;
    }
}

/* The start of a line waits for its end. One that does not fit ends the input. */
static void read_lines(void)
{
    static char text[4096];
    static size_t len;
    ssize_t n = read(STDIN_FILENO, text + len, sizeof text - len);
    input_ended = n <= 0;
    len += n > 0 ? (size_t)n : 0;
    for (char *end; conn && (end = memchr(text, '\n', len)); memmove(text, end + 1, len)) {
        int err = dtls_conn_send(conn, text, (size_t)(end - text));
        len -= (size_t)(end + 1 - text);
        unanswered += err == 0;
        if (err < 0)
            fprintf(stderr, "not sent: %s\n", dtls_strerror(err));
    }
}

/* After everything that may have changed what dtls.c waits for. */
static void turn(void)
{
    dtls_loop_poll(loop, 0);
    if (conn && input_ended && unanswered == 0) {
        status = 0;
        dtls_conn_close(conn);
    }
    int ms = dtls_loop_timeout(loop);
    ev_timer_stop(ev, &deadline);
    ev_timer_set(&deadline, ms / 1e3, 0);
    if (ms >= 0)
        ev_timer_start(ev, &deadline);
    if (conn && !input_ended)
        ev_io_start(ev, &input);
    else
        ev_io_stop(ev, &input);
    if (done)
        ev_break(ev, EVBREAK_ALL);
}

static void on_deadline(struct ev_loop *l, ev_timer *timer, int events)
{
    (void)l, (void)timer, (void)events;
    turn();
}

static void on_readable(struct ev_loop *l, ev_io *watcher, int events)
{
    (void)l, (void)events;
    if (watcher == &input)
        read_lines();
    turn();
}

static void run(void)
{
    ev_io_init(&datagrams, on_readable, dtls_loop_fd(loop), EV_READ);
    ev_io_init(&input, on_readable, STDIN_FILENO, EV_READ);
    ev_timer_init(&deadline, on_deadline, 0, 0);
    ev_io_start(ev, &datagrams);
    ev_timer_start(ev, &deadline);
    ev_run(ev, 0);
}

int main(int argc, char **argv)
{
    dtls_config config = {.cert_file = "certs/client.pem",
                          .key_file = "certs/client.key",
                          .ca_file = "certs/ca.pem",
                          .on_event = on_event,
                          .idle_timeout_ms = 10000}; /* nobody waits longer for an answer that was lost */
    dtls_error err = {.text = "no memory or descriptor for a loop"};
    dtls_target target = {0};
    loop = dtls_loop_new(NULL);
    dtls_endpoint *client = loop ? dtls_endpoint_new(loop, &config, &err) : NULL;
    ev = ev_default_loop(0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!client || !ev || dtls_addr_parse(&target.peer, argc == 2 ? argv[1] : "", &err) < 0 ||
        !dtls_endpoint_connect(client, &target, &err))
        fprintf(stderr, "%s\n", err.text);
    else
        run();
    if (ev)
        ev_loop_destroy(ev);
    dtls_loop_free(loop);
    return status;
}
