/* A foreign peer: DTLS 1.2 by Mbed TLS, 2.28 or 3. peer.h tells what it does and how it is run.
 *
 *   cc -o mbedtls mbedtls.c -lmbedtls -lmbedx509 -lmbedcrypto */
#include <mbedtls/ctr_drbg.h>
#include <mbedtls/entropy.h>
#include <mbedtls/error.h>
#include <mbedtls/net_sockets.h>
#include <mbedtls/ssl.h>
#include <mbedtls/ssl_cache.h>
#include <mbedtls/ssl_cookie.h>
#include <mbedtls/timing.h>
#include <mbedtls/version.h>

#include "peer.h"

/* Connection IDs, with the number that they got at last. 2.28 can be built with an earlier one, 254. */
#if defined(MBEDTLS_SSL_DTLS_CONNECTION_ID) && MBEDTLS_VERSION_MAJOR >= 3 && MBEDTLS_TLS_EXT_CID == 54
#define HAS_CID
#endif

enum { READ_TIMEOUT_MS = 1 }; /* 0 would mean for ever */

static const char SERVER_NAME[] = "localhost";

static mbedtls_entropy_context entropy;
static mbedtls_ctr_drbg_context drbg;
static mbedtls_x509_crt ca, cert;
static mbedtls_pk_context key;
static mbedtls_ssl_config config;
static mbedtls_ssl_cookie_ctx cookies;
static mbedtls_ssl_cache_context cache; /* a server's sessions */
static mbedtls_ssl_session session;     /* a client's to resume, if session_there */
static bool session_there;

static mbedtls_ssl_context ssl;
static mbedtls_net_context net;
static mbedtls_timing_delay_context timer;

static bool failed(const char *what, int result)
{
    char text[160];
    mbedtls_strerror(result, text, sizeof text);
    say("failed: %s: -0x%04x %s", what, (unsigned)-result, text);
    return false;
}

static int load_key(const char *path)
{
#if MBEDTLS_VERSION_MAJOR >= 3
    return mbedtls_pk_parse_keyfile(&key, path, NULL, mbedtls_ctr_drbg_random, &drbg);
#else
    return mbedtls_pk_parse_keyfile(&key, path, NULL);
#endif
}

static bool load_certificates(const struct options *options)
{
    char path[PATH_BYTES];
    const char *cert_name = options->server ? "server.pem" : "client.pem";
    const char *key_name = options->server ? "server.key" : "client.key";
    int result = mbedtls_x509_crt_parse_file(&ca, certs_path(options, "ca.pem", path));
    if (result == 0)
        result = mbedtls_x509_crt_parse_file(&cert, certs_path(options, cert_name, path));
    if (result == 0)
        result = load_key(certs_path(options, key_name, path));
    if (result == 0)
        result = mbedtls_ssl_conf_own_cert(&config, &cert, &key);
    mbedtls_ssl_conf_ca_chain(&config, &ca, NULL);
    mbedtls_ssl_conf_authmode(&config, MBEDTLS_SSL_VERIFY_REQUIRED);
    return result == 0 || failed("certificates", result);
}

/* A server refuses every other identity. */
static bool load_psk(const struct options *options)
{
    int result = mbedtls_ssl_conf_psk(&config, options->key, options->key_len, (const unsigned char *)options->identity,
                                      strlen(options->identity));
    return result == 0 || failed("pre-shared key", result);
}

static bool choose_suite(const char *name)
{
    static int suites[2]; /* ends with 0 */
    if (!name)
        return true;
    suites[0] = mbedtls_ssl_get_ciphersuite_id(name);
    mbedtls_ssl_conf_ciphersuites(&config, suites);
    return suites[0] != 0 || failed("suite", MBEDTLS_ERR_SSL_BAD_INPUT_DATA);
}

#ifdef HAS_CID
/* A record with another connection ID is dropped. */
static bool want_cids(const struct options *options)
{
    int result = mbedtls_ssl_conf_cid(&config, (size_t)options->cid_len, MBEDTLS_SSL_UNEXPECTED_CID_IGNORE);
    return result == 0 || failed("connection ID", result);
}

static int offer_cid(void)
{
    return mbedtls_ssl_set_cid(&ssl, MBEDTLS_SSL_CID_ENABLED, link_.cid, link_.cid_len);
}

/* With two empty ones it says that there are none, which comes to the same. */
static bool session_cids(int *in, int *out)
{
    unsigned char cid[MBEDTLS_SSL_CID_OUT_LEN_MAX];
    size_t len = 0;
    int enabled = MBEDTLS_SSL_CID_DISABLED;
    if (mbedtls_ssl_get_peer_cid(&ssl, &enabled, cid, &len) != 0 || enabled != MBEDTLS_SSL_CID_ENABLED)
        return false;
    *in = (int)link_.cid_len;
    *out = (int)len;
    return true;
}
#else
static bool want_cids(const struct options *options)
{
    (void)options;
    say("failed: no connection IDs in this Mbed TLS");
    return false;
}

static int offer_cid(void)
{
    return MBEDTLS_ERR_SSL_FEATURE_UNAVAILABLE;
}

static bool session_cids(int *in, int *out)
{
    (void)in, (void)out;
    return false;
}
#endif

static int receive_on_link(void *user, unsigned char *data, size_t size, uint32_t timeout_ms)
{
    (void)user;
    struct pollfd in = {.fd = link_.fd, .events = POLLIN};
    int len = link_receive(data, size);
    if (len < 0 && poll(&in, 1, (int)timeout_ms) > 0)
        len = link_receive(data, size);
    return len < 0 ? MBEDTLS_ERR_SSL_TIMEOUT : len;
}

static int send_on_link(void *user, const unsigned char *data, size_t len)
{
    (void)user;
    return link_send(data, len);
}

static void session_follow(void)
{
    mbedtls_ssl_set_bio(&ssl, NULL, send_on_link, NULL, receive_on_link);
}

static bool library_start(const struct options *options)
{
    int role = options->server ? MBEDTLS_SSL_IS_SERVER : MBEDTLS_SSL_IS_CLIENT;
    mbedtls_entropy_init(&entropy);
    mbedtls_ctr_drbg_init(&drbg);
    mbedtls_x509_crt_init(&ca);
    mbedtls_x509_crt_init(&cert);
    mbedtls_pk_init(&key);
    mbedtls_ssl_config_init(&config);
    mbedtls_ssl_cookie_init(&cookies);
    mbedtls_ssl_cache_init(&cache);
    mbedtls_ssl_session_init(&session);
    int result = mbedtls_ctr_drbg_seed(&drbg, mbedtls_entropy_func, &entropy, NULL, 0);
    if (result == 0)
        result = mbedtls_ssl_config_defaults(&config, role, MBEDTLS_SSL_TRANSPORT_DATAGRAM, MBEDTLS_SSL_PRESET_DEFAULT);
    if (result == 0)
        result = mbedtls_ssl_cookie_setup(&cookies, mbedtls_ctr_drbg_random, &drbg);
    if (result != 0)
        return failed("start", result);
    mbedtls_ssl_conf_rng(&config, mbedtls_ctr_drbg_random, &drbg);
    mbedtls_ssl_conf_dtls_cookies(&config, mbedtls_ssl_cookie_write, mbedtls_ssl_cookie_check, &cookies);
    mbedtls_ssl_conf_session_cache(&config, &cache, mbedtls_ssl_cache_get, mbedtls_ssl_cache_set);
    mbedtls_ssl_conf_read_timeout(&config, READ_TIMEOUT_MS);
    if (options->cid && !want_cids(options))
        return false;
    return (options->identity[0] ? load_psk(options) : load_certificates(options)) && choose_suite(options->suite);
}

static void say_connected(void)
{
    char name[256] = "no certificate";
    const mbedtls_x509_crt *peer = mbedtls_ssl_get_peer_cert(&ssl);
    if (peer)
        mbedtls_x509_dn_gets(name, sizeof name, &peer->subject);
    say("connected: %s, %s", name, mbedtls_ssl_get_ciphersuite(&ssl));
}

/* WANT_READ is no error on a blocking socket either: it says that a datagram was dropped or put aside. */
static int handshake(void)
{
    int result = MBEDTLS_ERR_SSL_WANT_READ;
    while (result == MBEDTLS_ERR_SSL_WANT_READ)
        result = mbedtls_ssl_handshake(&ssl);
    return result;
}

/* The peer's address goes into its cookie; the first ClientHello is answered by a cookie and an error. */
static int accept_handshake(int fd)
{
    struct sockaddr_in peer;
    socklen_t len = sizeof peer;
    int result = MBEDTLS_ERR_SSL_HELLO_VERIFY_REQUIRED;
    getpeername(fd, (struct sockaddr *)&peer, &len);
    while (result == MBEDTLS_ERR_SSL_HELLO_VERIFY_REQUIRED) {
        mbedtls_ssl_session_reset(&ssl);
        mbedtls_ssl_set_client_transport_id(&ssl, (const unsigned char *)&peer, len);
        result = handshake();
    }
    return result;
}

static int connect_handshake(void)
{
    mbedtls_ssl_set_hostname(&ssl, SERVER_NAME);
    if (session_there)
        mbedtls_ssl_set_session(&ssl, &session);
    return handshake();
}

static bool session_open(int fd, const struct options *options)
{
    mbedtls_ssl_init(&ssl);
    net.fd = fd;
    int result = mbedtls_ssl_setup(&ssl, &config);
    if (result == 0 && options->cid)
        result = offer_cid();
    if (result != 0)
        return failed("session", result);
    mbedtls_ssl_set_timer_cb(&ssl, &timer, mbedtls_timing_set_delay, mbedtls_timing_get_delay);
    mbedtls_ssl_set_bio(&ssl, &net, mbedtls_net_send, NULL, mbedtls_net_recv_timeout);
    if (options->mtu)
        mbedtls_ssl_set_mtu(&ssl, (uint16_t)options->mtu);
    result = options->server ? accept_handshake(fd) : connect_handshake();
    if (result != 0) {
        failed("handshake", result);
        mbedtls_ssl_free(&ssl);
        return false;
    }
    if (!options->server) {
        mbedtls_ssl_session_free(&session);
        session_there = mbedtls_ssl_get_session(&ssl, &session) == 0;
    }
    say_connected();
    return true;
}

static int session_read(char *data, size_t size)
{
    int len = mbedtls_ssl_read(&ssl, (unsigned char *)data, size);
    if (len > 0)
        return len;
    if (len == MBEDTLS_ERR_SSL_TIMEOUT || len == MBEDTLS_ERR_SSL_WANT_READ)
        return SESSION_EMPTY;
    if (len == MBEDTLS_ERR_SSL_PEER_CLOSE_NOTIFY)
        return SESSION_CLOSED;
    failed("read", len);
    return SESSION_FAILED;
}

static bool session_write(const char *data, size_t len)
{
    int sent = mbedtls_ssl_write(&ssl, (const unsigned char *)data, len);
    return sent == (int)len || failed("write", sent);
}

static int session_max(void)
{
    return mbedtls_ssl_get_max_out_record_payload(&ssl);
}

static void session_close(void)
{
    mbedtls_ssl_close_notify(&ssl);
    mbedtls_ssl_free(&ssl);
}
