/* Two loops in two threads, each with a server and a client of the other's. Exits with 0 when both were answered. */
#include "dtls.h"

#include <pthread.h>
#include <stdio.h>

struct node {
    dtls_loop *loop; /* while the thread runs its alone, but for dtls_loop_post() */
    dtls_endpoint *client;
    dtls_addr addr; /* its server's */
    pthread_t thread;
    int running;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int answered, failed; /* under the lock */

static void count(int *what)
{
    pthread_mutex_lock(&lock);
    ++*what;
    pthread_cond_signal(&changed);
    pthread_mutex_unlock(&lock);
}

/* Runs in both threads. */
static void on_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    dtls_info info;
    dtls_conn_info(conn, &info);
    if (event == DTLS_EV_MESSAGE && info.server) {
        dtls_conn_send(conn, data, len);
    } else if (event == DTLS_EV_MESSAGE) {
        printf("answered: %.*s\n", (int)len, (const char *)data);
        count(&answered);
    } else if (event == DTLS_EV_CONNECTED && !info.server) {
        dtls_conn_send(conn, "hello", 5);
    } else if (event == DTLS_EV_CLOSED && !info.server) {
        fprintf(stderr, "%s\n", dtls_conn_reason_text(conn));
        count(&failed); /* or main() is about to leave, and does not look any more */
    }
}

static int set_up(struct node *n, dtls_error *err)
{
    dtls_config config = {.ca_file = "certs/ca.pem", .cert_file = "certs/server.pem", .key_file = "certs/server.key"};
    config.on_event = on_event;
    config.idle_timeout_ms = 10000; /* nobody waits longer for an answer that was lost */
    n->loop = dtls_loop_new(NULL);
    dtls_endpoint *server = n->loop ? dtls_endpoint_new(n->loop, &config, err) : NULL;
    if (!server || dtls_addr_parse(&n->addr, "127.0.0.1:0", err) < 0 || dtls_endpoint_listen(server, &n->addr, err) < 0)
        return -1;
    config.cert_file = "certs/client.pem";
    config.key_file = "certs/client.key";
    n->client = dtls_endpoint_new(n->loop, &config, err);
    return n->client ? 0 : -1;
}

static void *run(void *loop)
{
    dtls_loop_run(loop);
    return NULL;
}

static void stop(void *loop)
{
    dtls_loop_stop(loop);
}

static int start(struct node *n, const struct node *other, dtls_error *err)
{
    dtls_target target = {.peer = other->addr};
    n->running = dtls_endpoint_connect(n->client, &target, err) && !pthread_create(&n->thread, NULL, run, n->loop);
    return n->running ? 0 : -1;
}

int main(void)
{
    struct node nodes[2] = {{0}, {0}};
    dtls_error err = {.text = "no memory, descriptor or thread for a loop"};
    if (set_up(&nodes[0], &err) < 0 || set_up(&nodes[1], &err) < 0 || start(&nodes[0], &nodes[1], &err) < 0 ||
        start(&nodes[1], &nodes[0], &err) < 0) {
        fprintf(stderr, "%s\n", err.text);
        count(&failed);
    }
    pthread_mutex_lock(&lock);
    while (answered < 2 && !failed)
        pthread_cond_wait(&changed, &lock);
    int status = failed > 0;
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < 2; i++) {
        while (nodes[i].running && dtls_loop_post(nodes[i].loop, stop, nodes[i].loop) < 0)
            continue; /* no memory just now */
        if (nodes[i].running)
            pthread_join(nodes[i].thread, NULL);
    }
    for (int i = 0; i < 2; i++)
        dtls_loop_free(nodes[i].loop);
    return status;
}
