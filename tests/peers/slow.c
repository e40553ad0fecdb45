/* A server as some DTLS libraries make it: plain libssl, many clients by their addresses on one unconnected socket, no
 * cookies. It keeps what it has for an address: a client that begins anew from the same port is ignored (it has no RFC
 * 6347 section 4.2.8). Its timers are those of libssl: 1 s, doubled each time.
 *
 *   cc -o slow slow.c -lssl -lcrypto
 *   slow server HOST PORT CERTS_DIR
 *
 * The arguments, and what it prints and answers, are those of peer.h. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

enum { DATAGRAM_MAX = 65535, LINK_MTU = 1500, PATH_BYTES = 512 };

struct client {
    struct sockaddr_in addr;
    SSL *ssl;   /* NULL: it closed or failed; its address stays ignored */
    BIO *inbox; /* the present datagram */
    bool said;  /* that it is connected */
    struct client *next;
};

static int fd;
static SSL_CTX *ctx;
static BIO_METHOD *method;
static struct client *clients;

static void say(const char *what, const char *more)
{
    printf("%s%s\n", what, more);
    fflush(stdout);
}

/* Each write is a datagram. */
static int outbox_write(BIO *bio, const char *data, int len)
{
    const struct client *client = BIO_get_data(bio);
    return (int)sendto(fd, data, (size_t)len, 0, (const struct sockaddr *)&client->addr, sizeof client->addr);
}

static long outbox_ctrl(BIO *bio, int command, long number, void *pointer)
{
    (void)bio, (void)number, (void)pointer;
    return command == BIO_CTRL_FLUSH ? 1 : command == BIO_CTRL_DGRAM_GET_MTU_OVERHEAD ? 28 : 0;
}

static struct client *client_new(const struct sockaddr_in *addr)
{
    struct client *client = calloc(1, sizeof *client);
    BIO *outbox = BIO_new(method);
    client->addr = *addr;
    client->ssl = SSL_new(ctx);
    client->inbox = BIO_new(BIO_s_mem());
    BIO_set_mem_eof_return(client->inbox, -1);
    BIO_set_data(outbox, client);
    BIO_set_init(outbox, 1);
    SSL_set_bio(client->ssl, client->inbox, outbox);
    SSL_set_options(client->ssl, SSL_OP_NO_QUERY_MTU);
    DTLS_set_link_mtu(client->ssl, LINK_MTU);
    SSL_set_accept_state(client->ssl);
    client->next = clients;
    return clients = client;
}

static struct client *client_at(const struct sockaddr_in *addr)
{
    for (struct client *client = clients; client; client = client->next)
        if (client->addr.sin_port == addr->sin_port && client->addr.sin_addr.s_addr == addr->sin_addr.s_addr)
            return client;
    return client_new(addr);
}

static void client_end(struct client *client, const char *why, const char *more)
{
    say(why, more);
    SSL_free(client->ssl);
    client->ssl = NULL;
}

static void say_connected(const struct client *client)
{
    char line[200], name[100] = "no certificate";
    X509 *cert = SSL_get_peer_certificate(client->ssl);
    if (cert)
        X509_NAME_get_text_by_NID(X509_get_subject_name(cert), NID_commonName, name, sizeof name);
    X509_free(cert);
    snprintf(line, sizeof line, "%s, %s", name, SSL_get_cipher_name(client->ssl));
    say("connected: ", line);
}

/* After a datagram or a timeout. */
static void client_run(struct client *client)
{
    static char data[DATAGRAM_MAX];
    ERR_clear_error();
    int len = SSL_read(client->ssl, data, sizeof data);
    int error = len > 0 ? SSL_ERROR_NONE : SSL_get_error(client->ssl, len);
    if (SSL_is_init_finished(client->ssl) && !client->said) {
        client->said = true;
        say_connected(client);
    }
    if (len == 4 && memcmp(data, "ping", 4) == 0)
        SSL_write(client->ssl, "pong", 4);
    else if (len > 0)
        SSL_write(client->ssl, data, len);
    else if (error == SSL_ERROR_ZERO_RETURN)
        client_end(client, "closed by the peer", "");
    else if (error != SSL_ERROR_WANT_READ)
        client_end(client, "failed: ", ERR_peek_error() ? ERR_reason_error_string(ERR_peek_error()) : "?");
}

static void receive(void)
{
    static unsigned char data[DATAGRAM_MAX];
    struct sockaddr_in addr;
    socklen_t addr_len = sizeof addr;
    ssize_t len = recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&addr, &addr_len);
    if (len <= 0)
        return;
    struct client *client = client_at(&addr);
    if (!client->ssl)
        return;
    BIO_reset(client->inbox);
    BIO_write(client->inbox, data, (int)len);
    client_run(client);
}

/* Milliseconds until the next timer; -1: there is none. */
static int wait_ms(void)
{
    int least = -1;
    for (struct client *client = clients; client; client = client->next) {
        struct timeval left;
        if (!client->ssl || !DTLSv1_get_timeout(client->ssl, &left))
            continue;
        int ms = (int)(left.tv_sec * 1000 + (left.tv_usec + 999) / 1000);
        least = least < 0 || ms < least ? ms : least;
    }
    return least;
}

static void handle_timers(void)
{
    for (struct client *client = clients; client; client = client->next)
        if (client->ssl && DTLSv1_handle_timeout(client->ssl) < 0)
            client_end(client, "failed: ", "no answer");
}

static bool library_start(const char *certs)
{
    char path[PATH_BYTES];
    method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "one client of many");
    BIO_meth_set_write(method, outbox_write);
    BIO_meth_set_ctrl(method, outbox_ctrl);
    ctx = SSL_CTX_new(DTLS_server_method());
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    snprintf(path, sizeof path, "%s/ca.pem", certs);
    bool done = SSL_CTX_load_verify_locations(ctx, path, NULL) == 1;
    SSL_CTX_set_client_CA_list(ctx, SSL_load_client_CA_file(path));
    snprintf(path, sizeof path, "%s/server.pem", certs);
    done = done && SSL_CTX_use_certificate_chain_file(ctx, path) == 1;
    snprintf(path, sizeof path, "%s/server.key", certs);
    return done && SSL_CTX_use_PrivateKey_file(ctx, path, SSL_FILETYPE_PEM) == 1;
}

int main(int argc, char **argv)
{
    struct sockaddr_in addr = {.sin_family = AF_INET};
    if (argc != 5 || strcmp(argv[1], "server") != 0 || inet_pton(AF_INET, argv[2], &addr.sin_addr) != 1) {
        fprintf(stderr, "usage: %s server HOST PORT CERTS_DIR\n", argv[0]);
        return 2;
    }
    addr.sin_port = htons((in_port_t)atoi(argv[3]));
    fd = socket(AF_INET, SOCK_DGRAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&addr, sizeof addr)) {
        perror("bind");
        return 2;
    }
    if (!library_start(argv[4])) {
        say("failed: ", "certificates");
        return 2;
    }
    say("listening", "");
    for (struct pollfd in = {.fd = fd, .events = POLLIN};;) {
        if (poll(&in, 1, wait_ms()) > 0)
            receive();
        handle_timers();
    }
}
