/* A client that knows no loop: the lines of its input go to the server, the answers to its output, and it ends when it has
 * them all. client_poll.c, client_ev.c and client_uv.c put it into theirs. */
#include "dtls.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

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

static int wants_input(void)
{
    return conn && !input_ended;
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

static void end_when_answered(void)
{
    if (conn && input_ended && unanswered == 0) {
        status = 0;
        dtls_conn_close(conn);
    }
}

/* A loop of ours with the client on it; NULL after telling why not. */
static dtls_loop *connect_to(const char *addr)
{
    dtls_config config = {.cert_file = "certs/client.pem",
                          .key_file = "certs/client.key",
                          .ca_file = "certs/ca.pem",
                          .on_event = on_event,
                          .idle_timeout_ms = 10000}; /* nobody waits longer for an answer that was lost */
    dtls_error err = {.text = "no memory or descriptor for a loop"};
    dtls_target target = {0};
    dtls_loop *loop = dtls_loop_new(NULL);
    dtls_endpoint *client = loop ? dtls_endpoint_new(loop, &config, &err) : NULL;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (client && dtls_addr_parse(&target.peer, addr, &err) == 0 && dtls_endpoint_connect(client, &target, &err))
        return loop;
    fprintf(stderr, "%s\n", err.text);
    dtls_loop_free(loop);
    return NULL;
}
