/* Writes tests/vectors.h: records by Mbed TLS 3.6 or later, with what it takes to open them. A client and a server speak
 * through memory, for each suite once with connection IDs (RFC 9146) and once without.
 *
 *   sh tests/peers/build.sh tests/build/peers mbedtls
 *   cc -o vectors -Itests/build/peers/mbedtls/include tests/peers/vectors.c tests/build/peers/mbedtls/mbedtls.a
 *   ./vectors >tests/vectors.h */
#include <mbedtls/ctr_drbg.h>
#include <mbedtls/entropy.h>
#include <mbedtls/ssl.h>
#include <mbedtls/timing.h>
#include <mbedtls/version.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DATAGRAMS = 16, DATAGRAM_BYTES = 2048, MASTER_BYTES = 48, RANDOM_BYTES = 32, ROUNDS = 50, BYTES_A_LINE = 16 };

/* What is on its way to one side. */
struct queue {
    unsigned char data[DATAGRAMS][DATAGRAM_BYTES];
    size_t len[DATAGRAMS], first, behind;
};

struct side {
    bool server;
    mbedtls_ssl_config config;
    mbedtls_ssl_context ssl;
    mbedtls_timing_delay_context timer;
    struct queue in, *out;
    unsigned char master[MASTER_BYTES], client_random[RANDOM_BYTES], server_random[RANDOM_BYTES];
};

static const struct {
    const char *name, *theirs; /* by OpenSSL, by Mbed TLS */
} suites[] = {{"PSK-AES128-GCM-SHA256", "TLS-PSK-WITH-AES-128-GCM-SHA256"},
              {"PSK-AES256-GCM-SHA384", "TLS-PSK-WITH-AES-256-GCM-SHA384"},
              {"PSK-CHACHA20-POLY1305", "TLS-PSK-WITH-CHACHA20-POLY1305-SHA256"},
              {"PSK-AES128-CCM", "TLS-PSK-WITH-AES-128-CCM"},
              {"PSK-AES128-CCM8", "TLS-PSK-WITH-AES-128-CCM-8"},
              {"PSK-AES256-CCM", "TLS-PSK-WITH-AES-256-CCM"},
              {"PSK-AES256-CCM8", "TLS-PSK-WITH-AES-256-CCM-8"},
              {"PSK-ARIA128-GCM-SHA256", "TLS-PSK-WITH-ARIA-128-GCM-SHA256"},
              {"PSK-ARIA256-GCM-SHA384", "TLS-PSK-WITH-ARIA-256-GCM-SHA384"}};

/* Connection IDs of other lengths, so that nobody takes one for the other. */
static const unsigned char cid_of_server[] = {0xc1, 0xd0, 1, 2, 3, 4, 5, 6}, cid_of_client[] = {0xa5, 0x5a, 0xff};

static mbedtls_entropy_context entropy;
static mbedtls_ctr_drbg_context drbg;

static void need(bool good, const char *what)
{
    if (!good) {
        fprintf(stderr, "vectors: %s failed\n", what);
        exit(1);
    }
}

static int send_datagram(void *user, const unsigned char *data, size_t len)
{
    struct queue *q = ((struct side *)user)->out;
    size_t at = q->behind++ % DATAGRAMS;
    need(len <= DATAGRAM_BYTES && q->behind - q->first <= DATAGRAMS, "queue");
    memcpy(q->data[at], data, len);
    q->len[at] = len;
    return (int)len;
}

static int receive_datagram(void *user, unsigned char *data, size_t size)
{
    struct queue *q = &((struct side *)user)->in;
    if (q->first == q->behind)
        return MBEDTLS_ERR_SSL_WANT_READ;
    size_t at = q->first++ % DATAGRAMS;
    need(q->len[at] <= size, "size");
    memcpy(data, q->data[at], q->len[at]);
    return (int)q->len[at];
}

static void keep_keys(void *user, mbedtls_ssl_key_export_type type, const unsigned char *secret, size_t len,
                      const unsigned char client_random[RANDOM_BYTES], const unsigned char server_random[RANDOM_BYTES],
                      mbedtls_tls_prf_types prf)
{
    struct side *s = user;
    (void)prf;
    need(type == MBEDTLS_SSL_KEY_EXPORT_TLS12_MASTER_SECRET && len == MASTER_BYTES, "master secret");
    memcpy(s->master, secret, len);
    memcpy(s->client_random, client_random, RANDOM_BYTES);
    memcpy(s->server_random, server_random, RANDOM_BYTES);
}

static void begin(struct side *s, bool server, const int *suite, bool with_cid)
{
    static const unsigned char key[] = "0123456789abcdef", identity[] = "vector";
    const unsigned char *cid = server ? cid_of_server : cid_of_client;
    size_t cid_len = !with_cid ? 0 : server ? sizeof cid_of_server : sizeof cid_of_client;
    memset(s, 0, sizeof *s);
    s->server = server;
    mbedtls_ssl_config_init(&s->config);
    mbedtls_ssl_init(&s->ssl);
    need(mbedtls_ssl_config_defaults(&s->config, server ? MBEDTLS_SSL_IS_SERVER : MBEDTLS_SSL_IS_CLIENT,
                                     MBEDTLS_SSL_TRANSPORT_DATAGRAM, MBEDTLS_SSL_PRESET_DEFAULT) == 0,
         "defaults");
    mbedtls_ssl_conf_rng(&s->config, mbedtls_ctr_drbg_random, &drbg);
    mbedtls_ssl_conf_ciphersuites(&s->config, suite);
    mbedtls_ssl_conf_dtls_cookies(&s->config, NULL, NULL, NULL);
    need(mbedtls_ssl_conf_psk(&s->config, key, sizeof key - 1, identity, sizeof identity - 1) == 0, "key");
    need(mbedtls_ssl_conf_cid(&s->config, cid_len, MBEDTLS_SSL_UNEXPECTED_CID_IGNORE) == 0, "connection ID");
    need(mbedtls_ssl_setup(&s->ssl, &s->config) == 0, "setup");
    need(!with_cid || mbedtls_ssl_set_cid(&s->ssl, MBEDTLS_SSL_CID_ENABLED, cid, cid_len) == 0, "connection ID");
    mbedtls_ssl_set_bio(&s->ssl, s, send_datagram, receive_datagram, NULL);
    mbedtls_ssl_set_timer_cb(&s->ssl, &s->timer, mbedtls_timing_set_delay, mbedtls_timing_get_delay);
    mbedtls_ssl_set_export_keys_cb(&s->ssl, keep_keys, s);
}

static void end(struct side *s)
{
    mbedtls_ssl_free(&s->ssl);
    mbedtls_ssl_config_free(&s->config);
}

static void print_bytes(const char *name, const unsigned char *p, size_t n)
{
    printf("     .%s = {", name);
    for (size_t i = 0; i < n; i++)
        printf("%s0x%02x", i == 0 ? "" : i % BYTES_A_LINE == 0 ? ",\n        " : ", ", p[i]);
    printf("},\n");
}

/* One message, as it goes to the other side, which must be able to read it. */
static void print_vector(const char *suite, struct side *from, struct side *to, bool with_cid)
{
    char text[64];
    unsigned char got[sizeof text];
    int len = snprintf(text, sizeof text, "%s, from the %s", suite, from->server ? "server" : "client");
    size_t at = to->in.behind % DATAGRAMS;
    need(mbedtls_ssl_write(&from->ssl, (unsigned char *)text, (size_t)len) == len, "write");
    size_t record_len = to->in.len[at];
    need(record_len <= 128 && to->in.data[at][0] == (with_cid ? MBEDTLS_SSL_MSG_CID : MBEDTLS_SSL_MSG_APPLICATION_DATA),
         "record");
    need(mbedtls_ssl_read(&to->ssl, got, sizeof got) == len && memcmp(got, text, (size_t)len) == 0, "read");
    printf("    {.suite = \"%s\",\n     .from_server = %s,\n", suite, from->server ? "true" : "false");
    print_bytes("master", from->master, MASTER_BYTES);
    print_bytes("client_random", from->client_random, RANDOM_BYTES);
    print_bytes("server_random", from->server_random, RANDOM_BYTES);
    if (with_cid) { /* that of the other side */
        size_t cid_len = to->server ? sizeof cid_of_server : sizeof cid_of_client;
        printf("     .cid_len = %zu,\n", cid_len);
        print_bytes("cid", to->server ? cid_of_server : cid_of_client, cid_len);
    }
    print_bytes("record", to->in.data[at], record_len);
    printf("     .record_len = %zu,\n     .text = \"%s\"},\n", record_len, text);
}

static void converse(const char *name, const char *theirs, bool with_cid)
{
    static struct side client, server;
    const int suite[] = {mbedtls_ssl_get_ciphersuite_id(theirs), 0};
    need(suite[0] != 0, theirs);
    begin(&client, false, suite, with_cid);
    begin(&server, true, suite, with_cid);
    client.out = &server.in;
    server.out = &client.in;
    for (int i = 0;
         i < ROUNDS && (!mbedtls_ssl_is_handshake_over(&client.ssl) || !mbedtls_ssl_is_handshake_over(&server.ssl));
         i++) {
        int results[] = {mbedtls_ssl_handshake(&client.ssl), mbedtls_ssl_handshake(&server.ssl)};
        for (int k = 0; k < 2; k++)
            need(results[k] == 0 || results[k] == MBEDTLS_ERR_SSL_WANT_READ, "handshake");
    }
    need(mbedtls_ssl_is_handshake_over(&client.ssl) && mbedtls_ssl_is_handshake_over(&server.ssl), "handshake");
    need(memcmp(client.master, server.master, MASTER_BYTES) == 0, "equal secrets");
    print_vector(name, &client, &server, with_cid);
    print_vector(name, &server, &client, with_cid);
    end(&client);
    end(&server);
}

int main(void)
{
    char version[18];
    mbedtls_version_get_string_full(version);
    mbedtls_entropy_init(&entropy);
    mbedtls_ctr_drbg_init(&drbg);
    need(mbedtls_ctr_drbg_seed(&drbg, mbedtls_entropy_func, &entropy, NULL, 0) == 0, "seed");
    printf("/* Records of application data by another implementation, with what it takes to open them: for each suite "
           "two\n"
           " * with a connection ID (RFC 9146), one from each side, and two without. Whoever reads them must get the "
           "text.\n"
           " * In those with a connection ID zeros stand behind text and inner type, up to a multiple of 16 bytes.\n"
           " * suite is OpenSSL's name; master, client_random and server_random are those of RFC 5246 section 8.1.\n"
           " * Written by tests/peers/vectors.c with %s; do not edit. */\n"
           "#include <stdbool.h>\n#include <stddef.h>\n#include <stdint.h>\n\n"
           "static const struct vector {\n"
           "    const char *suite;\n"
           "    bool from_server;\n"
           "    uint8_t master[48], client_random[32], server_random[32];\n"
           "    uint8_t cid_len, cid[20]; /* 0: a record without one */\n"
           "    unsigned char record[128];\n"
           "    size_t record_len;\n"
           "    const char *text;\n"
           "} vectors[] = {\n",
           version);
    for (size_t i = 0; i < sizeof suites / sizeof *suites; i++) {
        converse(suites[i].name, suites[i].theirs, true);
        converse(suites[i].name, suites[i].theirs, false);
    }
    printf("};\n");
    return 0;
}
