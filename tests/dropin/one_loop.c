/* Two servers and a client of both in one loop. Exits with 0 when both answered as they should. */
#include "dtls.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

static struct service {
    const char *name, *expected;
    int (*change)(int byte); /* NULL: leaves it as it is */
    dtls_addr addr;
} services[2] = {{.name = "echo", .expected = "hello"}, {.name = "upper", .expected = "HELLO", .change = toupper}};
static int good, closed;

/* One function for both servers: config.user tells which. */
static void on_server_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    const struct service *service = dtls_endpoint_user(dtls_conn_endpoint(conn));
    unsigned char answer[64];
    if (event != DTLS_EV_MESSAGE || len > sizeof answer)
        return;
    memcpy(answer, data, len);
    for (size_t i = 0; service->change && i < len; i++)
        answer[i] = (unsigned char)service->change(answer[i]);
    dtls_conn_send(conn, answer, len);
}

/* One endpoint has both of the client's connections: target.user tells which. */
static void on_client_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    const struct service *service = dtls_conn_user(conn);
    if (event == DTLS_EV_CONNECTED) {
        dtls_conn_send(conn, "hello", 5);
    } else if (event == DTLS_EV_MESSAGE) {
        printf("%s: %.*s\n", service->name, (int)len, (const char *)data);
        good += len == strlen(service->expected) && memcmp(data, service->expected, len) == 0;
        dtls_conn_close(conn);
    } else if (event == DTLS_EV_CLOSED) {
        fprintf(stderr, "%s: %s\n", service->name, dtls_conn_reason_text(conn));
        if (++closed == 2)
            dtls_loop_stop(dtls_endpoint_loop(dtls_conn_endpoint(conn)));
    }
}

static int run(dtls_loop *loop, dtls_error *err)
{
    dtls_config config = {.ca_file = "certs/ca.pem", .cert_file = "certs/server.pem", .key_file = "certs/server.key"};
    config.on_event = on_server_event;
    for (struct service *s = services; s < services + 2; s++) {
        config.user = s;
        dtls_endpoint *server = dtls_endpoint_new(loop, &config, err);
        if (!server || dtls_addr_parse(&s->addr, "127.0.0.1:0", err) < 0 ||
            dtls_endpoint_listen(server, &s->addr, err) < 0)
            return -1;
    }
    config = (dtls_config){.ca_file = "certs/ca.pem", .cert_file = "certs/client.pem", .key_file = "certs/client.key"};
    config.on_event = on_client_event;
    config.idle_timeout_ms = 10000; /* nobody waits longer for an answer that was lost */
    dtls_endpoint *client = dtls_endpoint_new(loop, &config, err);
    for (struct service *s = services; s < services + 2; s++) {
        dtls_target target = {.peer = s->addr, .user = s};
        if (!client || !dtls_endpoint_connect(client, &target, err))
            return -1;
    }
    return dtls_loop_run(loop);
}

int main(void)
{
    dtls_error err = {.text = "the event loop failed"};
    dtls_loop *loop = dtls_loop_new(NULL);
    if (!loop || run(loop, &err) < 0)
        fprintf(stderr, "%s\n", err.text);
    dtls_loop_free(loop); /* with the endpoints on it */
    return good != 2;
}
