/* A client inside libev's loop.
 *
 *   client_ev ADDR      sends its input line by line, prints the answers, ends when it has them all */
#include "lines.h"

#include <ev.h>

static dtls_loop *loop;
static struct ev_loop *ev;
static ev_io datagrams, input;
static ev_timer deadline;

/* After everything that may have changed what dtls.c waits for. */
static void turn(void)
{
    dtls_loop_poll(loop, 0);
    end_when_answered();
    int ms = dtls_loop_timeout(loop);
    ev_timer_stop(ev, &deadline);
    ev_timer_set(&deadline, ms / 1e3, 0);
    if (ms >= 0)
        ev_timer_start(ev, &deadline);
    if (wants_input())
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
    ev = ev_default_loop(0);
    loop = connect_to(argc == 2 ? argv[1] : "");
    if (loop && ev)
        run();
    if (ev)
        ev_loop_destroy(ev);
    dtls_loop_free(loop);
    return status;
}
