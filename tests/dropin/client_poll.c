/* A client inside a poll(2) loop, beside another descriptor.
 *
 *   client_poll ADDR      sends its input line by line, prints the answers, ends when it has them all */
#include "dtls.h"

#include <poll.h>
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

int main(int argc, char **argv)
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
    if (!client || dtls_addr_parse(&target.peer, argc == 2 ? argv[1] : "", &err) < 0 ||
        !dtls_endpoint_connect(client, &target, &err))
        done = fprintf(stderr, "%s\n", err.text);
    while (!done) {
        struct pollfd fds[] = {{.fd = dtls_loop_fd(loop), .events = POLLIN},
                               {.fd = conn && !input_ended ? STDIN_FILENO : -1, .events = POLLIN}};
        poll(fds, 2, dtls_loop_timeout(loop));
        dtls_loop_poll(loop, 0);
        if (conn && fds[1].revents)
            read_lines();
        if (conn && input_ended && unanswered == 0) {
            status = 0;
            dtls_conn_close(conn);
        }
    }
    dtls_loop_free(loop);
    return status;
}
