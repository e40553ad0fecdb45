/* The loop the ways others would use it, over real sockets and through dtls.h alone: inside a plain poll(2) loop, in
 * several threads, with posts from another thread, with calls from outside any turn. Each side has a loop of its own, and
 * time is real. check.h says how this runs. */
#include "world.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PATIENCE_MS = 20000, MESSAGES = 200 };

static void stop_when_closed(struct side *s, dtls_conn *conn, dtls_event event)
{
    (void)conn;
    if (event == DTLS_EV_CLOSED)
        dtls_loop_stop(s->loop);
}

/* Returns where it listens. */
static dtls_addr open_server(struct side *s, dtls_config cfg)
{
    dtls_addr addr = address("127.0.0.1:0");
    dtls_error err = {0};
    *s = (struct side){.loop = dtls_loop_new(NULL), .echo = 1, .inside = stop_when_closed};
    side_open(s, "server", cfg);
    REQUIRE(dtls_endpoint_listen(s->ep, &addr, &err) == 0, "listen: %s", err.text);
    return addr;
}

static void connect_to(dtls_addr addr, dtls_config cfg)
{
    dtls_error err = {0};
    client = (struct side){.loop = dtls_loop_new(NULL)};
    side_open(&client, "client", cfg);
    REQUIRE(dtls_endpoint_connect(client.ep, &(dtls_target){.peer = addr}, &err), "connect: %s", err.text);
}

static int earlier(int a, int b)
{
    return a < 0 ? b : b < 0 || a < b ? a : b;
}

/* One turn of somebody else's loop that knows two descriptors and two deadlines. */
static int foreign_turn(void)
{
    struct pollfd fds[2] = {{dtls_loop_fd(server.loop), POLLIN, 0}, {dtls_loop_fd(client.loop), POLLIN, 0}};
    int ms = earlier(PATIENCE_MS, earlier(dtls_loop_timeout(server.loop), dtls_loop_timeout(client.loop)));
    int n = poll(fds, 2, ms);
    if (fds[0].revents || dtls_loop_timeout(server.loop) == 0)
        dtls_loop_poll(server.loop, 0);
    if (fds[1].revents || dtls_loop_timeout(client.loop) == 0)
        dtls_loop_poll(client.loop, 0);
    return n > 0 || ms < PATIENCE_MS;
}

static int foreign_until(const int *count, int value)
{
    for (int turns = 0; *count < value && turns < 100000; turns++)
        if (!foreign_turn())
            return 0;
    return *count >= value;
}

static void test_foreign_loop(void)
{
    connect_to(open_server(&server, (dtls_config){0}), (dtls_config){0});
    CHECK_THAT(foreign_until(&client.connected, 1) && foreign_until(&server.connected, 1),
               "handshake inside a poll loop");
    int good = 1;
    for (int i = 1; i <= MESSAGES && good; i++)
        good = dtls_conn_send(client.conn, "hello", 5) == 0 && foreign_until(&client.messages, i);
    CHECK_THAT(good, "messages inside a poll loop");

    /* From outside any turn a datagram leaves at once: the client's loop is not turned before the server has it. */
    int before = server.messages;
    dtls_conn_send(client.conn, "now", 3);
    dtls_loop_poll(server.loop, PATIENCE_MS);
    CHECK_EQ(server.messages, before + 1, "a send outside a turn does not wait for one");
    dtls_conn_close(client.conn);
    CHECK_THAT(client.closed == 1 && foreign_until(&server.closed, 1), "close outside a turn");
    dtls_loop_free(client.loop);
    dtls_loop_free(server.loop);
}

/* A socket that is flooded gets its share of a turn, and the others get theirs. */
static void test_fairness(void)
{
    dtls_counters n;
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    dtls_addr flooded = open_server(&server, (dtls_config){0}), other = address("127.0.0.1:0");
    dtls_endpoint_listen(server.ep, &other, NULL);
    int fd = socket(AF_INET, SOCK_DGRAM, 0), sent = 0;
    to.sin_port = htons(flooded.port);
    for (int i = 0; i < 200; i++)
        sent += sendto(fd, "x", 1, 0, (struct sockaddr *)&to, sizeof to) == 1;
    to.sin_port = htons(other.port);
    sent += sendto(fd, "x", 1, 0, (struct sockaddr *)&to, sizeof to) == 1;
    dtls_loop_poll(server.loop, PATIENCE_MS);
    dtls_endpoint_counters(server.ep, &n);
    CHECK(sent == 201);
    CHECK_EQ(n.datagrams_in, 64 + 1, "a flooded socket leaves the others their turn");
    for (int i = 0; i < 10 && n.datagrams_in < 201; i++) {
        dtls_loop_poll(server.loop, 0);
        dtls_endpoint_counters(server.ep, &n);
    }
    CHECK_EQ(n.datagrams_in, 201, "and is read on in the next turns");
    CHECK_EQ(n.dropped[DTLS_DROP_STRANGER], 201, "and what it read is dropped");
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
    struct side *s = arg;
    if (s->conn)
        dtls_conn_send(s->conn, "posted", 6);
}

static void *post_from_thread(void *user)
{
    struct side *s = user;
    for (int i = 0; i < MESSAGES; i++)
        dtls_loop_post(s->loop, post_send, s);
    return NULL;
}

static void give_up(void *user)
{
    *(int *)user = 1;
}

static int turn_until(const int *count, int value)
{
    int late = 0;
    dtls_timer *limit = dtls_timer_new(client.loop, give_up, &late);
    dtls_timer_set(limit, PATIENCE_MS);
    while (*count < value && !late)
        dtls_loop_poll(client.loop, -1);
    dtls_timer_free(limit);
    return *count >= value;
}

static void test_threads(void)
{
    enum { PAIRS = 2 };
    struct side servers[PAIRS];
    dtls_addr addrs[PAIRS];
    pthread_t threads[PAIRS], poster;
    for (int i = 0; i < PAIRS; i++) {
        addrs[i] = open_server(&servers[i], (dtls_config){0});
        pthread_create(&threads[i], NULL, serve, &servers[i]);
    }
    for (int i = 0; i < PAIRS; i++) {
        connect_to(addrs[i], (dtls_config){0});
        REQUIRE(turn_until(&client.connected, 1), "handshake with the loop in thread %d", i);
        pthread_create(&poster, NULL, post_from_thread, &client);
        CHECK(turn_until(&client.messages, MESSAGES));
        pthread_join(poster, NULL);
        dtls_loop_free(client.loop); /* close_notify, which stops the server's loop */
        pthread_join(threads[i], NULL);
        CHECK_EQ(servers[i].messages, MESSAGES, "posts from another thread to the loop in thread %d", i);
        CHECK_EQ(servers[i].closed, 1, "and its connection closes once");
    }
    for (int i = 0; i < PAIRS; i++)
        dtls_loop_free(servers[i].loop);
}

/* A server that slept takes what wakes it for what it is: not as old as its sleep. */
static void test_quiet_server(void)
{
    const dtls_config cfg = {.cookie_ms = 200, .idle_timeout_ms = 1000, .handshake_timeout_ms = 1500};
    pthread_t thread;
    dtls_info info;
    dtls_addr addr = open_server(&server, cfg);
    pthread_create(&thread, NULL, serve, &server);
    poll(NULL, 0, 600); /* silence is the matter here: longer than both cookie secrets live */
    connect_to(addr, cfg);
    CHECK_THAT(turn_until(&client.connected, 1), "a cookie after a long silence is good");
    for (int i = 1; i <= 2; i++) {
        poll(NULL, 0, 700);
        dtls_conn_send(client.conn, "still here", 10);
        turn_until(&client.messages, i);
    }
    dtls_conn_info(client.conn, &info);
    CHECK_EQ(client.messages, 2, "idle time counts from the last message");
    CHECK(info.age_ms > 1000);
    dtls_loop_free(client.loop);
    pthread_join(thread, NULL);
    dtls_loop_free(server.loop);
}

/* A host is looked up in another thread, whose answer wakes the loop. */
static void test_hosts(void)
{
    char host[32];
    dtls_error err = {0};
    snprintf(host, sizeof host, "localhost:%u", open_server(&server, (dtls_config){0}).port);
    client = (struct side){.loop = dtls_loop_new(NULL)};
    side_open(&client, "client", (dtls_config){0});
    for (int i = 1; i <= 8; i++) {
        int connected = server.connected;
        REQUIRE(dtls_endpoint_connect(client.ep, &(dtls_target){.host = host}, &err), "connect: %s", err.text);
        CHECK_THAT(foreign_until(&client.connected, i) && foreign_until(&server.connected, connected + 1),
                   "a host by its name");
    }
    for (int i = 0; i < 8; i++) /* these are left while they are looked up */
        REQUIRE(dtls_endpoint_connect(client.ep, &(dtls_target){.host = host}, &err), "connect: %s", err.text);
    dtls_loop_free(client.loop);
    dtls_loop_free(server.loop);
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"foreign loop", test_foreign_loop}, {"fairness", test_fairness}, {"threads", test_threads},
        {"quiet server", test_quiet_server}, {"hosts", test_hosts},
    };
    return RUN_TESTS("loops", tests, argc, argv);
}
