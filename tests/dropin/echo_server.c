/* An echo server on our own loop.
 *
 *   echo_server ADDR      127.0.0.1:4444, say; port 0 is any free one; SIGINT and SIGTERM end it */
#include "dtls.h"

#include <signal.h>
#include <stdio.h>

static void on_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    if (event == DTLS_EV_MESSAGE)
        dtls_conn_send(conn, data, len); /* where that fails the answer is lost, as any datagram may be */
}

static void on_log(void *user, dtls_log level, const char *line)
{
    (void)user;
    if (level <= DTLS_LOG_INFO)
        fprintf(stderr, "%s\n", line);
}

static void on_signal(void *loop, int signo)
{
    (void)signo;
    dtls_loop_stop(loop);
}

static int serve(dtls_loop *loop, const char *where, dtls_error *err)
{
    dtls_config config = {.cert_file = "certs/server.pem",
                          .key_file = "certs/server.key",
                          .ca_file = "certs/ca.pem",
                          .on_event = on_event,
                          .on_log = on_log};
    dtls_addr addr;
    char text[DTLS_ADDR_TEXT];
    dtls_endpoint *server = dtls_endpoint_new(loop, &config, err);
    if (!server || dtls_addr_parse(&addr, where, err) < 0 || dtls_endpoint_listen(server, &addr, err) < 0)
        return -1;
    printf("listening on %s\n", dtls_addr_format(&addr, text, sizeof text));
    fflush(stdout);
    return dtls_loop_run(loop);
}

int main(int argc, char **argv)
{
    dtls_error err = {.text = "the event loop failed"};
    dtls_loop *loop = dtls_loop_new(NULL);
    int failed = argc != 2 || !loop || dtls_loop_signal(loop, SIGINT, on_signal, loop) < 0 ||
                 dtls_loop_signal(loop, SIGTERM, on_signal, loop) < 0 || serve(loop, argv[1], &err) < 0;
    if (failed)
        fprintf(stderr, "%s\n", argc != 2 ? "usage: echo_server ADDR" : err.text);
    dtls_loop_free(loop); /* with all that is on it; the clients are told */
    return failed;
}
