/* A client inside libuv's loop.
 *
 *   client_uv ADDR      sends its input line by line, prints the answers, ends when it has them all
 *
 * The input is a pipe or a terminal: libuv does not poll files. */
#include "lines.h"

#include <uv.h>

static dtls_loop *loop;
static uv_poll_t datagrams, input;
static uv_timer_t deadline;

static void on_readable(uv_poll_t *handle, int err, int events);

/* After everything that may have changed what dtls.c waits for. */
static void turn(uv_timer_t *timer)
{
    dtls_loop_poll(loop, 0);
    end_when_answered();
    int ms = dtls_loop_timeout(loop);
    uv_timer_stop(timer);
    if (ms >= 0)
        uv_timer_start(timer, turn, (uint64_t)ms, 0);
    uv_poll_stop(&input);
    if (wants_input())
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
    loop = connect_to(argc == 2 ? argv[1] : "");
    if (loop)
        run(uv_default_loop());
    dtls_loop_free(loop);
    return status;
}
