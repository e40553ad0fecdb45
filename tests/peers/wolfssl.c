/* A foreign peer: DTLS 1.2 by wolfSSL. peer.h tells what it does and how it is run.
 *
 *   cc -o wolfssl wolfssl.c -lwolfssl */
#include <wolfssl/options.h>
#include <wolfssl/ssl.h>

#include "peer.h"

static const char SERVER_NAME[] = "localhost";

static WOLFSSL_CTX *ctx;
static WOLFSSL *ssl;
static WOLFSSL_SESSION *session;  /* a client's to resume */
static const struct options *psk; /* has a pre-shared key; NULL: certificates are used */

static bool failed(const char *what, int result)
{
    char text[WOLFSSL_MAX_ERROR_SZ];
    say("failed: %s: %s", what, wolfSSL_ERR_error_string((unsigned long)wolfSSL_get_error(ssl, result), text));
    return false;
}

#ifdef WOLFSSL_DTLS_CID /* an option of its build */
static bool has_cids(void)
{
    return true;
}

static bool offer_cid(void)
{
    return wolfSSL_dtls_cid_use(ssl) == WOLFSSL_SUCCESS &&
           wolfSSL_dtls_cid_set(ssl, link_.cid, (unsigned)link_.cid_len) == WOLFSSL_SUCCESS;
}

static bool session_cids(int *in, int *out)
{
    unsigned in_len = 0, out_len = 0;
    if (wolfSSL_dtls_cid_get_rx_size(ssl, &in_len) != WOLFSSL_SUCCESS ||
        wolfSSL_dtls_cid_get_tx_size(ssl, &out_len) != WOLFSSL_SUCCESS)
        return false;
    *in = (int)in_len;
    *out = (int)out_len;
    return true;
}
#else
static bool has_cids(void)
{
    return false;
}

static bool offer_cid(void)
{
    return false;
}

static bool session_cids(int *in, int *out)
{
    (void)in, (void)out;
    return false;
}
#endif

static int receive_on_link(WOLFSSL *of, char *data, int size, void *user)
{
    (void)of, (void)user;
    int len = link_receive((unsigned char *)data, (size_t)size);
    return len < 0 ? WOLFSSL_CBIO_ERR_WANT_READ : len;
}

static int send_on_link(WOLFSSL *of, char *data, int len, void *user)
{
    (void)of, (void)user;
    int sent = link_send((unsigned char *)data, (size_t)len);
    return sent < 0 ? WOLFSSL_CBIO_ERR_GENERAL : sent;
}

static void session_follow(void)
{
    wolfSSL_SSLSetIORecv(ssl, receive_on_link);
    wolfSSL_SSLSetIOSend(ssl, send_on_link);
}

#ifdef NO_PSK /* an option of its build */
static bool load_psk(const struct options *options)
{
    psk = options;
    return false;
}
#else
static unsigned copy_key(unsigned char *key, unsigned size)
{
    if (psk->key_len > size)
        return 0;
    memcpy(key, psk->key, psk->key_len);
    return (unsigned)psk->key_len;
}

static unsigned psk_of_client(WOLFSSL *of, const char *hint, char *identity, unsigned identity_size, unsigned char *key,
                              unsigned size)
{
    (void)of, (void)hint;
    snprintf(identity, identity_size, "%s", psk->identity);
    return copy_key(key, size);
}

static unsigned psk_of_server(WOLFSSL *of, const char *identity, unsigned char *key, unsigned size)
{
    (void)of;
    return strcmp(identity, psk->identity) == 0 ? copy_key(key, size) : 0;
}

/* With ECDHE_PSK a client of 5.5 offers X25519 and then fails, "Bad ECC Peer Key", when the server takes it. */
static bool load_psk(const struct options *options)
{
    psk = options;
    wolfSSL_CTX_UseSupportedCurve(ctx, WOLFSSL_ECC_SECP256R1);
    if (options->server)
        wolfSSL_CTX_set_psk_server_callback(ctx, psk_of_server);
    else
        wolfSSL_CTX_set_psk_client_callback(ctx, psk_of_client);
    return true;
}
#endif

static bool load_certificates(const struct options *options)
{
    char path[PATH_BYTES];
    const char *cert = options->server ? "server.pem" : "client.pem";
    const char *key = options->server ? "server.key" : "client.key";
    return wolfSSL_CTX_load_verify_locations(ctx, certs_path(options, "ca.pem", path), NULL) == WOLFSSL_SUCCESS &&
           wolfSSL_CTX_use_certificate_chain_file(ctx, certs_path(options, cert, path)) == WOLFSSL_SUCCESS &&
           wolfSSL_CTX_use_PrivateKey_file(ctx, certs_path(options, key, path), WOLFSSL_FILETYPE_PEM) ==
               WOLFSSL_SUCCESS;
}

static bool library_start(const struct options *options)
{
    if (options->mtu) { /* wolfSSL_dtls_set_mtu is an option of its build, which Debian does not take */
        say("failed: no mtu here");
        return false;
    }
    if (options->cid && !has_cids()) {
        say("failed: no connection IDs in this wolfSSL");
        return false;
    }
    wolfSSL_Init();
    ctx = wolfSSL_CTX_new(options->server ? wolfDTLSv1_2_server_method() : wolfDTLSv1_2_client_method());
    if (!ctx || !(options->identity[0] ? load_psk(options) : load_certificates(options)) ||
        (options->suite && wolfSSL_CTX_set_cipher_list(ctx, options->suite) != WOLFSSL_SUCCESS)) {
        say("failed: certificates or suite");
        return false;
    }
    if (!psk)
        wolfSSL_CTX_set_verify(ctx, WOLFSSL_VERIFY_PEER | WOLFSSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    return true;
}

static void say_connected(void)
{
    WOLFSSL_X509 *cert = wolfSSL_get_peer_certificate(ssl);
    const char *name = cert ? wolfSSL_X509_get_subjectCN(cert) : NULL;
    say("connected: %s, %s, %s", name ? name : "no certificate", wolfSSL_get_cipher_name(ssl),
        wolfSSL_session_reused(ssl) ? "resumed session" : "full handshake");
    wolfSSL_X509_free(cert);
}

static void session_free(void)
{
    wolfSSL_free(ssl);
    ssl = NULL;
}

/* On a blocking socket wolfSSL waits for the peer, and sends its flights again, by itself. */
static bool handshake(int fd, bool server)
{
    wolfSSL_set_dtls_fd_connected(ssl, fd);
    if (!server && !psk)
        wolfSSL_check_domain_name(ssl, SERVER_NAME);
    if (session)
        wolfSSL_set_session(ssl, session);
    int done = server ? wolfSSL_accept(ssl) : wolfSSL_connect(ssl);
    return done == WOLFSSL_SUCCESS || failed("handshake", done);
}

static bool session_open(int fd, const struct options *options)
{
    ssl = wolfSSL_new(ctx);
    if (ssl && options->cid && !offer_cid()) {
        say("failed: connection ID");
        session_free();
    }
    if (!ssl || !handshake(fd, options->server)) {
        session_free();
        return false;
    }
    if (!options->server) {
        wolfSSL_SESSION_free(session);
        session = wolfSSL_get1_session(ssl);
    }
    wolfSSL_SetIOReadFlags(ssl, MSG_DONTWAIT); /* from now on a read does not wait */
    wolfSSL_dtls_set_using_nonblock(ssl, 1);
    say_connected();
    return true;
}

static int session_read(char *data, size_t size)
{
    int len = wolfSSL_read(ssl, data, (int)size);
    int error = len > 0 ? WOLFSSL_ERROR_NONE : wolfSSL_get_error(ssl, len);
    if (len > 0)
        return len;
    if (error == WOLFSSL_ERROR_WANT_READ)
        return SESSION_EMPTY;
    if (error == WOLFSSL_ERROR_ZERO_RETURN)
        return SESSION_CLOSED;
    failed("read", len);
    return SESSION_FAILED;
}

static bool session_write(const char *data, size_t len)
{
    int sent = wolfSSL_write(ssl, data, (int)len);
    return sent == (int)len || failed("write", sent);
}

static int session_max(void)
{
    return wolfSSL_GetMaxOutputSize(ssl);
}

static void session_close(void)
{
    wolfSSL_shutdown(ssl);
    session_free();
}
