/* Very many clients behind one NAT, which is started again and gives all of them new ports, and then each the port of
 * another. A server on a real socket must know all of them again, on the first or second line that each of them sends.
 *
 * Clients without connection ID are stock OpenSSL, those with one are this library on a transport of our own. Each has a
 * socket of its own towards the server, which is its upstream port of the NAT. Printed is what that cost; how long it may
 * take is not judged. Linux and BSD, with sockets enough. */
#include "../dtls.h"
#include "check.h"

#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    CLIENTS_MAX = 1000,
    BLIND_CLIENTS = 200,  /* where the server has to try keys */
    HANDSHAKES = 32,      /* at once, */
    LINES = 64,           /* and lines that wait for their answers: what a socket buffer of any size holds */
    SILENCE_US = 1000000, /* without any answer: those that are missing will not come */
    POLL_MS = 20,
    DATAGRAM_BYTES = 2048,
    MTU = 1472
};

struct client {
    int fd; /* its upstream port: who has it may change */
    dtls_watch *watch;
    SSL *ssl;        /* a stock one, or */
    dtls_conn *conn; /* one of the library */
    dtls_addr local; /* by which its endpoint knows it, wherever its upstream port is */
    bool began, connected;
    int answered;      /* the last phase of which an answer came */
    const uint8_t *in; /* the datagram that libssl may read */
    size_t in_len;
};

struct kind {
    const char *suites; /* of a stock client; NULL: the library's */
    int clients;
};

static dtls_loop *loop;
static dtls_endpoint *server_ep, *client_ep;
static dtls_addr server_addr;
static struct sockaddr_in server_sa;
static SSL_CTX *ctx;
static BIO_METHOD *method;
static struct client clients[CLIENTS_MAX];
static int clients_len, connected, closed, phase, answered, wrong;

/* ---- a client's datagrams ---------------------------------------------------------------------------------------- */

static int bio_read(BIO *bio, char *to, int size)
{
    struct client *c = BIO_get_data(bio);
    size_t n = c->in_len < (size_t)size ? c->in_len : (size_t)size;
    BIO_clear_retry_flags(bio);
    if (!c->in) {
        BIO_set_retry_read(bio);
        return -1;
    }
    memcpy(to, c->in, n);
    c->in = NULL;
    return (int)n;
}

static int bio_write(BIO *bio, const char *data, int len)
{
    struct client *c = BIO_get_data(bio);
    send(c->fd, data, (size_t)len, 0); /* it may be lost, as on any network */
    return len;
}

static long bio_ctrl(BIO *bio, int command, long number, void *p)
{
    (void)bio, (void)number, (void)p;
    return command == BIO_CTRL_DGRAM_QUERY_MTU ? MTU : command == BIO_CTRL_FLUSH;
}

/* The library's clients: which one it is, its address tells. */
static int transport(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    (void)user, (void)to;
    return send(clients[from->port - 1].fd, data, len, 0) == (ssize_t)len ? 0 : -1;
}

/* An answer is the text of a line: the phase and the client's number. */
static void take_answer(struct client *c, const char *data, size_t len)
{
    char text[64];
    int of_phase, number;
    snprintf(text, sizeof text, "%.*s", (int)len, data);
    if (sscanf(text, "%d %d", &of_phase, &number) != 2 || number != c - clients)
        wrong++; /* somebody else's */
    else if (of_phase == phase && c->answered < phase) {
        c->answered = phase;
        answered++;
    }
}

static void stock_step(struct client *c)
{
    ERR_clear_error();
    if (!c->connected && SSL_do_handshake(c->ssl) == 1) {
        c->connected = true;
        connected++;
    }
    char text[64];
    for (int n; c->connected && (n = SSL_read(c->ssl, text, sizeof text)) > 0;)
        take_answer(c, text, (size_t)n);
}

static void readable(void *user, int fd, unsigned events)
{
    static uint8_t data[DATAGRAM_BYTES];
    struct client *c = user;
    (void)events;
    for (ssize_t n; (n = recv(fd, data, sizeof data, 0)) >= 0;) {
        if (!c->ssl) {
            dtls_endpoint_input(client_ep, data, (size_t)n, &server_addr, &c->local);
            continue;
        }
        c->in = data;
        c->in_len = (size_t)n;
        stock_step(c);
        c->in = NULL;
    }
}

static void client_watch(struct client *c)
{
    c->watch = dtls_watch_new(loop, c->fd, DTLS_READ, readable, c);
    REQUIRE(c->watch, "a watch");
}

static int open_socket(void)
{
    struct sockaddr_in any = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    REQUIRE(fd >= 0 && bind(fd, (struct sockaddr *)&any, sizeof any) == 0 &&
                connect(fd, (struct sockaddr *)&server_sa, sizeof server_sa) == 0,
            "a socket");
    return fd;
}

/* ---- both ends --------------------------------------------------------------------------------------------------- */

static void on_server_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    if (event == DTLS_EV_MESSAGE)
        dtls_conn_send(conn, data, len);
    closed += event == DTLS_EV_CLOSED;
}

static void on_client_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct client *c = dtls_conn_user(conn);
    if (event == DTLS_EV_CONNECTED) {
        c->connected = true;
        connected++;
    } else if (event == DTLS_EV_MESSAGE)
        take_answer(c, data, len);
    else if (event == DTLS_EV_CLOSED)
        c->conn = NULL;
}

static dtls_endpoint *endpoint_new(const char *who, dtls_config cfg)
{
    char cert[512], key[512], ca[512];
    dtls_error err = {0};
    snprintf(cert, sizeof cert, "%s/%s.pem", certs, who);
    snprintf(key, sizeof key, "%s/%s.key", certs, who);
    snprintf(ca, sizeof ca, "%s/ca.pem", certs);
    cfg.cert_file = cert;
    cfg.key_file = key;
    cfg.ca_file = ca;
    dtls_endpoint *ep = dtls_endpoint_new(loop, &cfg, &err);
    REQUIRE(ep, "endpoint %s: %s", who, err.text);
    if (!ctx) /* the stock clients' */
        REQUIRE((ctx = SSL_CTX_new(DTLS_client_method())) &&
                    (method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "datagrams")) &&
                    BIO_meth_set_read(method, bio_read) && BIO_meth_set_write(method, bio_write) &&
                    BIO_meth_set_ctrl(method, bio_ctrl) && SSL_CTX_load_verify_locations(ctx, ca, NULL) == 1,
                "OpenSSL");
    if (strcmp(who, "client") == 0)
        REQUIRE(SSL_CTX_use_certificate_chain_file(ctx, cert) == 1 &&
                    SSL_CTX_use_PrivateKey_file(ctx, key, SSL_FILETYPE_PEM) == 1,
                "the client's certificate");
    return ep;
}

static void open_ends(const struct kind *kind)
{
    dtls_error err = {0};
    clients_len = kind->clients;
    loop = dtls_loop_new(NULL);
    server_ep = endpoint_new("server", (dtls_config){.on_event = on_server_event});
    client_ep = endpoint_new("client", (dtls_config){.on_event = on_client_event, .send = transport});
    REQUIRE(dtls_addr_parse(&server_addr, "127.0.0.1:0", NULL) == 0 &&
                dtls_endpoint_listen(server_ep, &server_addr, &err) == 0 &&
                dtls_addr_to_sockaddr(&server_addr, (struct sockaddr *)&server_sa, sizeof server_sa) > 0,
            "a server: %s", err.text);
    if (kind->suites)
        REQUIRE(SSL_CTX_set_cipher_list(ctx, kind->suites) == 1, "%s", kind->suites);
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER, NULL);
    for (int i = 0; i < clients_len; i++) {
        clients[i].fd = open_socket();
        clients[i].local = server_addr;
        clients[i].local.port = (uint16_t)(i + 1);
        client_watch(&clients[i]);
    }
}

static void client_begin(struct client *c, bool stock)
{
    dtls_target target = {.peer = server_addr, .local = c->local, .name = "localhost", .user = c};
    c->began = true;
    if (!stock) {
        c->conn = dtls_endpoint_connect(client_ep, &target, NULL);
        REQUIRE(c->conn, "a connection of the library");
        return;
    }
    BIO *bio = BIO_new(method);
    c->ssl = SSL_new(ctx);
    REQUIRE(bio && c->ssl, "a connection of OpenSSL");
    BIO_set_data(bio, c);
    SSL_set_bio(c->ssl, bio, bio);
    SSL_set_connect_state(c->ssl);
    stock_step(c);
}

static void close_ends(void)
{
    for (struct client *c = clients; c < clients + clients_len; c++) {
        SSL_free(c->ssl);
        dtls_watch_free(c->watch);
        close(c->fd);
    }
    memset(clients, 0, sizeof clients);
    dtls_loop_free(loop);
    SSL_CTX_free(ctx);
    BIO_meth_free(method);
    ctx = NULL;
    phase = connected = closed = wrong = 0;
}

/* ---- what happens ------------------------------------------------------------------------------------------------ */

static void connect_all(bool stock)
{
    int64_t last = dtls_loop_now(loop);
    for (int begun = 0, before = 0; connected < clients_len && dtls_loop_now(loop) < last + 10 * SILENCE_US;) {
        while (begun < clients_len && begun < connected + HANDSHAKES)
            client_begin(&clients[begun++], stock);
        dtls_loop_poll(loop, POLL_MS);
        for (struct client *c = clients; stock && c < clients + begun; c++)
            if (!c->connected)
                DTLSv1_handle_timeout(c->ssl);
        if (connected > before)
            last = dtls_loop_now(loop);
        before = connected;
    }
    REQUIRE(connected == clients_len, "%d of %d clients are connected", connected, clients_len);
}

static void say_line(struct client *c)
{
    char text[64];
    int len = snprintf(text, sizeof text, "%d %d", phase, (int)(c - clients));
    if (c->ssl)
        SSL_write(c->ssl, text, len);
    else if (c->conn)
        dtls_conn_send(c->conn, text, (size_t)len);
}

/* Everybody who had no answer sends a line. Returns how many have one then. */
static int lines(void)
{
    int64_t last = dtls_loop_now(loop);
    int waiting = 0, next = 0, before = answered;
    while (next < clients_len || answered < clients_len) {
        for (; next < clients_len && waiting < LINES; next++)
            if (clients[next].answered < phase) {
                say_line(&clients[next]);
                waiting++;
            }
        dtls_loop_poll(loop, POLL_MS);
        if (answered > before)
            last = dtls_loop_now(loop);
        waiting -= answered - before;
        before = answered;
        if (dtls_loop_now(loop) <= last + SILENCE_US)
            continue;
        if (next == clients_len)
            break;
        waiting = 0; /* these had none: the next ones, please */
        last = dtls_loop_now(loop);
    }
    return answered;
}

static void ask_all(const char *what, int moves)
{
    dtls_counters was, is;
    int64_t began = dtls_loop_now(loop);
    dtls_endpoint_counters(server_ep, &was);
    phase++;
    answered = 0;
    int first = lines(), both = first < clients_len ? lines() : first;
    dtls_endpoint_counters(server_ep, &is);
    printf("# roam_storm: %s: %s: %d of %d answered on the first line, %d more on the second; moves %llu, trials %llu, "
           "trials_refused %llu, in %.3f s\n",
           test_name, what, first, clients_len, both - first, (unsigned long long)(is.moves - was.moves),
           (unsigned long long)(is.trials - was.trials), (unsigned long long)(is.trials_refused - was.trials_refused),
           (double)(dtls_loop_now(loop) - began) / 1e6);
    CHECK_EQ(both, clients_len, "%s: all are answered", what);
    CHECK_EQ(is.moves - was.moves, moves, "%s: each moved once", what);
    CHECK_EQ(closed + wrong, 0, "%s: nobody was lost, nobody got another's answer", what);
}

/* New ports for all; those of before are gone. */
static void restart(void)
{
    for (struct client *c = clients; c < clients + clients_len; c++) {
        int before = c->fd;
        c->fd = open_socket(); /* first, so that none gets a port that another one had */
        dtls_watch_free(c->watch);
        client_watch(c);
        close(before);
    }
}

/* Each gets the port of another: by twos, so that every pair swaps, or from the next one. */
static void permute(bool by_twos)
{
    int first = clients[0].fd;
    for (struct client *c = clients; c < clients + clients_len; c++)
        dtls_watch_free(c->watch);
    dtls_loop_poll(loop, 0); /* what is freed is gone */
    for (int i = 0; i + 1 < clients_len; i += by_twos ? 2 : 1) {
        int fd = clients[i].fd;
        clients[i].fd = clients[i + 1].fd;
        clients[i + 1].fd = by_twos ? fd : first;
    }
    for (struct client *c = clients; c < clients + clients_len; c++)
        client_watch(c);
}

static void run_kind(struct kind kind)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    if (getrlimit(RLIMIT_NOFILE, &files) != 0 || files.rlim_cur < (rlim_t)kind.clients + 100) {
        test_skip("clients", "more sockets than this system lets a process have");
        return;
    }
    open_ends(&kind);
    connect_all(kind.suites != NULL);
    ask_all("at home", 0);
    restart();
    ask_all("the NAT was started again", kind.clients);
    permute(true);
    ask_all("pairs swapped their ports", kind.clients);
    permute(false);
    ask_all("each has the port of the next one", kind.clients);
    close_ends();
}

static void gcm(void)
{
    run_kind((struct kind){.suites = "ECDHE+AESGCM", .clients = CLIENTS_MAX});
}

static void cid(void)
{
    run_kind((struct kind){.clients = CLIENTS_MAX});
}

static void chacha(void)
{
    run_kind((struct kind){.suites = "ECDHE+CHACHA20", .clients = BLIND_CLIENTS});
}

int main(int argc, char **argv)
{
    static const struct test tests[] = {
        {"stock clients with AES-GCM", gcm},
        {"clients with connection IDs", cid},
        {"stock clients with ChaCha20", chacha},
    };
    return RUN_TESTS("roam_storm", tests, argc, argv);
}
