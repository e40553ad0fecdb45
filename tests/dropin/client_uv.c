/* A client inside libuv's loop.
 *
 *   client_uv ADDR      sends its input line by line, prints the answers, ends when it has them all
 *
 * The input is a pipe or a terminal: libuv does not poll files. */
#include "dtls.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <uv.h>

static dtls_loop *loop;
static uv_poll_t datagrams, input;
static uv_timer_t deadline;
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

static void on_readable(uv_poll_t *handle, int err, int events);

/* After everything that may have changed what dtls.c waits for. */
static void turn(uv_timer_t *timer)
{
    dtls_loop_poll(loop, 0);
    if (conn && input_ended && unanswered == 0) {
        status = 0;
        dtls_conn_close(conn);
    }
    int ms = dtls_loop_timeout(loop);
    uv_timer_stop(timer);
    if (ms >= 0)
        uv_timer_start(timer, turn, (uint64_t)ms, 0);
    uv_poll_stop(&input);
    if (conn && !input_ended)
        uv_poll_start(&input, UV_READABLE, on_readable);
    if (done)
        uv_stop(uv_default_loop());
}

static void on_readable(uv_poll_t *handle, int err, int events)
{
    (void)err, (void)events; /* read() tells, and dtls.c knows its own */
    if (handle == &input)
        read_lines();
    turn(&deadline);
}

static void close_handle(uv_handle_t *handle, void *arg)
{
    (void)arg;
    uv_close(handle, NULL);
}

static void run(uv_loop_t *uv)
{
    uv_timer_init(uv, &deadline);
    int err = uv_poll_init(uv, &input, STDIN_FILENO);
    if (!err && !(err = uv_poll_init(uv, &datagrams, dtls_loop_fd(loop))) &&
        !(err = uv_poll_start(&datagrams, UV_READABLE, on_readable)) && !(err = uv_timer_start(&deadline, turn, 0, 0)))
        uv_run(uv, UV_RUN_DEFAULT);
    if (err)
        fprintf(stderr, "libuv: %s\n", uv_strerror(err));
    uv_walk(uv, close_handle, NULL);
    uv_run(uv, UV_RUN_DEFAULT);
    uv_loop_close(uv);
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
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!client || dtls_addr_parse(&target.peer, argc == 2 ? argv[1] : "", &err) < 0 ||
        !dtls_endpoint_connect(client, &target, &err))
        fprintf(stderr, "%s\n", err.text);
    else
        run(uv_default_loop());
    dtls_loop_free(loop);
    return status;
}
