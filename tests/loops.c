/* The loop the ways others would use it, over real sockets and through dtls.h alone: inside a plain poll(2) loop, in
 * several threads, with posts from another thread, with calls from outside any turn.
 *
 *   loops CERTS_DIR
 * */
#include "../dtls.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PATIENCE_MS = 20000, MESSAGES = 200 };

struct side {
    dtls_loop *loop;
    dtls_endpoint *ep;
    dtls_conn *conn;
    dtls_addr addr;
    int connected, messages, closed;
};

static const char *certs;
static int failed;

static void check(int good, const char *name)
{
    printf("%s - loops %s\n", good ? "ok" : "not ok", name);
    failed |= !good;
}

static void on_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct side *s = dtls_endpoint_user(dtls_conn_endpoint(conn));
    dtls_info info;
    dtls_conn_info(conn, &info);
    if (event == DTLS_EV_CONNECTED) {
        s->conn = conn;
        s->connected++;
    } else if (event == DTLS_EV_MESSAGE) {
        s->messages++;
        if (info.server)
            dtls_conn_send(conn, data, len);
    } else if (event == DTLS_EV_CLOSED) {
        s->conn = NULL;
        s->closed++;
        if (info.server)
            dtls_loop_stop(s->loop);
    }
}

static dtls_config more; /* what a test adds to the configuration */

static void open_side(struct side *s, const char *name)
{
    char cert[512], key[512], ca[512];
    dtls_error err;
    snprintf(cert, sizeof cert, "%s/%s.pem", certs, name);
    snprintf(key, sizeof key, "%s/%s.key", certs, name);
    snprintf(ca, sizeof ca, "%s/ca.pem", certs);
    dtls_config config = more;
    config.cert_file = cert;
    config.key_file = key;
    config.ca_file = ca;
    config.on_event = on_event;
    config.user = s;
    memset(s, 0, sizeof *s);
    s->loop = dtls_loop_new(NULL);
    s->ep = dtls_endpoint_new(s->loop, &config, &err);
    if (!s->ep) {
        printf("not ok - loops endpoint %s: %s\n", name, err.text);
        exit(1);
    }
}

static void open_server(struct side *s)
{
    dtls_error err = {0};
    open_side(s, "server");
    dtls_addr_parse(&s->addr, "127.0.0.1:0", NULL);
    if (dtls_endpoint_listen(s->ep, &s->addr, &err) != 0) {
        printf("not ok - loops listen: %s\n", err.text);
        exit(1);
    }
}

static void connect_to(struct side *client, const struct side *server)
{
    dtls_target t = {.peer = server->addr};
    dtls_error err = {0};
    open_side(client, "client");
    if (!dtls_endpoint_connect(client->ep, &t, &err)) {
        printf("not ok - loops connect: %s\n", err.text);
        exit(1);
    }
}

static int earlier(int a, int b)
{
    return a < 0 ? b : b < 0 || a < b ? a : b;
}

/* One turn of somebody else's loop that knows two descriptors and two deadlines. */
static int foreign_turn(struct side *a, struct side *b)
{
    struct pollfd fds[2] = {{dtls_loop_fd(a->loop), POLLIN, 0}, {dtls_loop_fd(b->loop), POLLIN, 0}};
    int ms = earlier(PATIENCE_MS, earlier(dtls_loop_timeout(a->loop), dtls_loop_timeout(b->loop)));
    int n = poll(fds, 2, ms);
    if (fds[0].revents || dtls_loop_timeout(a->loop) == 0)
        dtls_loop_poll(a->loop, 0);
    if (fds[1].revents || dtls_loop_timeout(b->loop) == 0)
        dtls_loop_poll(b->loop, 0);
    return n > 0 || ms < PATIENCE_MS;
}

static int foreign_until(struct side *a, struct side *b, const int *count, int value)
{
    for (int turns = 0; *count < value && turns < 100000; turns++)
        if (!foreign_turn(a, b))
            return 0;
    return *count >= value;
}

static void test_foreign_loop(void)
{
    struct side server, client;
    open_server(&server);
    connect_to(&client, &server);
    check(foreign_until(&server, &client, &client.connected, 1) &&
              foreign_until(&server, &client, &server.connected, 1),
          "handshake inside a poll loop");
    int good = 1;
    for (int i = 1; i <= MESSAGES && good; i++) {
        good = dtls_conn_send(client.conn, "hello", 5) == 0 && foreign_until(&server, &client, &client.messages, i);
    }
    check(good, "messages inside a poll loop");

    /* From outside any turn a datagram leaves at once: the client's loop is not turned before the server has it. */
    int before = server.messages;
    dtls_conn_send(client.conn, "now", 3);
    dtls_loop_poll(server.loop, PATIENCE_MS);
    check(server.messages == before + 1, "a send outside a turn does not wait for one");
    dtls_conn_close(client.conn);
    check(client.closed == 1 && foreign_until(&server, &client, &server.closed, 1), "close outside a turn");
    dtls_loop_free(client.loop);
    dtls_loop_free(server.loop);
}

/* A socket that is flooded gets its share of a turn, and the others get theirs. */
static void test_fairness(void)
{
    struct side server;
    dtls_addr other;
    dtls_counters n;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    open_server(&server);
    dtls_addr_parse(&other, "127.0.0.1:0", NULL);
    dtls_endpoint_listen(server.ep, &other, NULL);
    int fd = socket(AF_INET, SOCK_DGRAM, 0), sent = 0;
    to.sin_port = htons(server.addr.port);
    for (int i = 0; i < 200; i++)
        sent += sendto(fd, "x", 1, 0, (struct sockaddr *)&to, sizeof to) == 1;
    to.sin_port = htons(other.port);
    sent += sendto(fd, "x", 1, 0, (struct sockaddr *)&to, sizeof to) == 1;
    dtls_loop_poll(server.loop, PATIENCE_MS);
    dtls_endpoint_counters(server.ep, &n);
    check(sent == 201 && n.datagrams_in == 64 + 1, "a flooded socket leaves the others their turn");
    for (int i = 0; i < 10 && n.datagrams_in < 201; i++) {
        dtls_loop_poll(server.loop, 0);
        dtls_endpoint_counters(server.ep, &n);
    }
    check(n.datagrams_in == 201 && n.dropped[DTLS_DROP_STRANGER] == 201, "and is read on in the next turns");
    close(fd);
    dtls_loop_free(server.loop);
}

static void *serve(void *user)
{
    struct side *s = user;
    dtls_loop_run(s->loop);
    return NULL;
}

/* What the other thread hands to the client's loop. */
static void post_send(void *arg)
{
    struct side *client = arg;
    if (client->conn)
        dtls_conn_send(client->conn, "posted", 6);
}

static void *post_from_thread(void *user)
{
    struct side *client = user;
    for (int i = 0; i < MESSAGES; i++)
        dtls_loop_post(client->loop, post_send, client);
    return NULL;
}

static void give_up(void *user)
{
    *(int *)user = 1;
}

static int turn_until(struct side *s, const int *count, int value)
{
    int late = 0;
    dtls_timer *limit = dtls_timer_new(s->loop, give_up, &late);
    dtls_timer_set(limit, PATIENCE_MS);
    while (*count < value && !late)
        dtls_loop_poll(s->loop, -1);
    dtls_timer_free(limit);
    return *count >= value;
}

static void test_threads(void)
{
    enum { PAIRS = 2 };
    struct side server[PAIRS], client;
    pthread_t threads[PAIRS], poster;
    int good = 1;
    for (int i = 0; i < PAIRS; i++) {
        open_server(&server[i]);
        pthread_create(&threads[i], NULL, serve, &server[i]);
    }
    for (int i = 0; i < PAIRS; i++) {
        connect_to(&client, &server[i]);
        good = good && turn_until(&client, &client.connected, 1);
        pthread_create(&poster, NULL, post_from_thread, &client);
        good = good && turn_until(&client, &client.messages, MESSAGES);
        pthread_join(poster, NULL);
        dtls_loop_free(client.loop); /* close_notify, which stops the server's loop */
        pthread_join(threads[i], NULL);
        good = good && server[i].closed == 1 && server[i].messages == MESSAGES;
    }
    for (int i = 0; i < PAIRS; i++)
        dtls_loop_free(server[i].loop);
    check(good, "loops in several threads, posts from another");
}

/* A server that slept takes what wakes it for what it is: not as old as its sleep. */
static void test_quiet_server(void)
{
    struct side server, client;
    pthread_t thread;
    dtls_info info;
    more = (dtls_config){.cookie_ms = 200, .idle_timeout_ms = 1000, .handshake_timeout_ms = 1500};
    open_server(&server);
    pthread_create(&thread, NULL, serve, &server);
    poll(NULL, 0, 600); /* silence is the matter here: longer than both cookie secrets live */
    connect_to(&client, &server);
    check(turn_until(&client, &client.connected, 1), "a cookie after a long silence is good");
    for (int i = 1; i <= 2; i++) {
        poll(NULL, 0, 700);
        dtls_conn_send(client.conn, "still here", 10);
        turn_until(&client, &client.messages, i);
    }
    dtls_conn_info(client.conn, &info);
    check(client.messages == 2 && info.age_ms > 1000, "idle time counts from the last message");
    dtls_loop_free(client.loop);
    pthread_join(thread, NULL);
    dtls_loop_free(server.loop);
    more = (dtls_config){0};
}

int main(int argc, char **argv)
{
    if (argc != 2)
        return 2;
    certs = argv[1];
    setvbuf(stdout, NULL, _IOLBF, 0);
    test_foreign_loop();
    test_fairness();
    test_threads();
    test_quiet_server();
    return failed;
}
