/* A server and a client with a pre-shared key and no certificates, in one loop: a message there, and who sent it. */
#include "dtls.h"

#include <stdio.h>
#include <string.h>

static const uint8_t key[32] = "32 bytes of chance, not of text";

static size_t find_key(void *user, const char *identity, uint8_t to[DTLS_PSK_MAX])
{
    (void)user;
    if (strcmp(identity, "sensor-1") != 0)
        return 0;
    memcpy(to, key, sizeof key);
    return sizeof key;
}

static int may_come_in(void *user, const dtls_info *info, char *reason, size_t size)
{
    (void)user;
    snprintf(reason, size, "only sensors");
    return strncmp(info->peer_name, "sensor-", 7) != 0;
}

static void on_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    dtls_info info;
    dtls_conn_info(conn, &info);
    if (event == DTLS_EV_CONNECTED && !info.server)
        dtls_conn_send(conn, "hello", 5);
    if (event == DTLS_EV_MESSAGE)
        printf("%s: %.*s\n", info.peer_name, (int)len, (const char *)data);
    if (event == DTLS_EV_MESSAGE || event == DTLS_EV_CLOSED || event == DTLS_EV_FAILED)
        dtls_loop_stop(dtls_endpoint_loop(dtls_conn_endpoint(conn)));
}

int main(void)
{
    dtls_error err = {.text = "no memory or descriptors"};
    dtls_loop *loop = dtls_loop_new(NULL);
    dtls_config for_server = {.psk = find_key, .on_peer = may_come_in, .on_event = on_event};
    dtls_config for_client = {
        .psk_identity = "sensor-1", .psk_key = key, .psk_key_len = sizeof key, .on_event = on_event};
    dtls_endpoint *server = loop ? dtls_endpoint_new(loop, &for_server, &err) : NULL;
    dtls_endpoint *client = server ? dtls_endpoint_new(loop, &for_client, &err) : NULL;
    dtls_target target = {.host = NULL};
    dtls_addr_parse(&target.peer, "127.0.0.1:0", NULL);
    if (!client || dtls_endpoint_listen(server, &target.peer, &err) != 0 ||
        !dtls_endpoint_connect(client, &target, &err))
        return fprintf(stderr, "%s\n", err.text), 1;
    dtls_loop_run(loop);
    dtls_loop_free(loop);
    return 0;
}
