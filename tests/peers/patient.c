/* A client that does what libssl does by itself, and nothing else: it sends a flight again after 1 s, 2 s, 4 s and so
 * on (DTLSv1_get_timeout, DTLSv1_handle_timeout), never gives up what it began, and never begins anew. Ours is measured
 * by it. It can be a server too, for one client after the other and without cookies. peer.h tells the rest.
 *
 *   cc -o patient patient.c -lssl -lcrypto */
#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <sys/time.h>

#include "peer.h"

static const char SERVER_NAME[] = "localhost";

static SSL_CTX *ctx;
static SSL *ssl;
static SSL_SESSION *session; /* a client's to resume */

static bool failed(const char *what)
{
    const char *reason = ERR_reason_error_string(ERR_peek_error());
    say("failed: %s: %s", what, reason ? reason : "no reason");
    return false;
}

static bool library_start(const struct options *options)
{
    char path[PATH_BYTES];
    const char *cert = options->server ? "server.pem" : "client.pem";
    const char *key = options->server ? "server.key" : "client.key";
    ctx = SSL_CTX_new(options->server ? DTLS_server_method() : DTLS_client_method());
    if (!ctx || SSL_CTX_load_verify_locations(ctx, certs_path(options, "ca.pem", path), NULL) != 1 ||
        SSL_CTX_use_certificate_chain_file(ctx, certs_path(options, cert, path)) != 1 ||
        SSL_CTX_use_PrivateKey_file(ctx, certs_path(options, key, path), SSL_FILETYPE_PEM) != 1 ||
        (options->suite && SSL_CTX_set_cipher_list(ctx, options->suite) != 1))
        return failed("certificates or suite");
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    return true;
}

static void say_connected(void)
{
    char name[100] = "no certificate";
    X509 *cert = SSL_get_peer_certificate(ssl);
    if (cert)
        X509_NAME_get_text_by_NID(X509_get_subject_name(cert), NID_commonName, name, sizeof name);
    X509_free(cert);
    say("connected: %s, %s, %s", name, SSL_get_cipher_name(ssl),
        SSL_session_reused(ssl) ? "resumed session" : "full handshake");
}

static void session_free(void)
{
    SSL_free(ssl);
    ssl = NULL;
}

static bool session_new(int fd, const struct options *options)
{
    struct sockaddr_in peer;
    socklen_t len = sizeof peer;
    BIO *bio = BIO_new_dgram(fd, BIO_NOCLOSE);
    ssl = SSL_new(ctx);
    if (!bio || !ssl || getpeername(fd, (struct sockaddr *)&peer, &len))
        return failed("start");
    BIO_ctrl(bio, BIO_CTRL_DGRAM_SET_CONNECTED, 0, &peer);
    SSL_set_bio(ssl, bio, bio);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    if (options->mtu) {
        SSL_set_options(ssl, SSL_OP_NO_QUERY_MTU);
        SSL_set_mtu(ssl, options->mtu);
    }
    if (options->server) {
        SSL_set_accept_state(ssl);
        return true;
    }
    SSL_set_connect_state(ssl);
    return SSL_set_tlsext_host_name(ssl, SERVER_NAME) == 1 && SSL_set1_host(ssl, SERVER_NAME) == 1 &&
           (!session || SSL_set_session(ssl, session) == 1);
}

/* Errors of the network are no reason to stop: what is missing will be sent again. */
static bool handshake(int fd)
{
    struct pollfd in = {.fd = fd, .events = POLLIN};
    for (;;) {
        ERR_clear_error();
        int done = SSL_do_handshake(ssl);
        int error = SSL_get_error(ssl, done);
        if (done == 1)
            return true;
        if (error == SSL_ERROR_SSL)
            return failed("handshake");
        struct timeval left;
        bool timer = DTLSv1_get_timeout(ssl, &left) != 0;
        poll(&in, 1, timer ? (int)(left.tv_sec * 1000 + (left.tv_usec + 999) / 1000) : -1);
        DTLSv1_handle_timeout(ssl);
    }
}

static bool session_open(int fd, const struct options *options)
{
    if (!session_new(fd, options) || !handshake(fd)) {
        session_free();
        return false;
    }
    if (!options->server) {
        SSL_SESSION_free(session);
        session = SSL_get1_session(ssl);
    }
    say_connected();
    return true;
}

static int session_read(char *data, size_t size)
{
    ERR_clear_error();
    int len = SSL_read(ssl, data, (int)size);
    int error = SSL_get_error(ssl, len);
    if (len > 0)
        return len;
    if (error == SSL_ERROR_WANT_READ)
        return SESSION_EMPTY;
    if (error == SSL_ERROR_ZERO_RETURN)
        return SESSION_CLOSED;
    failed("read");
    return SESSION_FAILED;
}

static bool session_write(const char *data, size_t len)
{
    ERR_clear_error();
    return SSL_write(ssl, data, (int)len) == (int)len || failed("write");
}

/* libssl has no connection IDs, so it follows nobody. */

static bool session_cids(int *in, int *out)
{
    *in = *out = 0;
    return false;
}

static void session_follow(void) {}

static int session_max(void)
{
    return MESSAGE_MAX;
}

static void session_close(void)
{
    SSL_shutdown(ssl);
    session_free();
}
