/* Time, chance and certificates that a seed repeats, for test programs that carry their datagrams through memory: libssl
 * reads the same clock (gettimeofday) and the same chance (RAND_set_rand_method). A program includes this once. */
#ifndef VIRTUAL_H
#define VIRTUAL_H

#define OPENSSL_SUPPRESS_DEPRECATED /* RAND_set_rand_method, EC_KEY: what makes chance and keys repeatable everywhere */
#include "../dtls.h"

#include <openssl/ec.h>
#include <openssl/rand.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <sys/time.h>
#include <time.h>

/* ---- time and chance, also libssl's ---- */

static int64_t now_us; /* one world at a time, so the clock may be a global as the real one is */
static uint64_t chance_state;

int gettimeofday(struct timeval *restrict tv, void *restrict zone)
{
    (void)zone;
    int64_t t = 1700000000000000 + now_us;
    tv->tv_sec = (time_t)(t / 1000000);
    tv->tv_usec = (suseconds_t)(t % 1000000);
    return 0;
}

static inline int64_t virtual_now(void *user)
{
    (void)user;
    return now_us;
}

static uint64_t next_random(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15; /* splitmix64 */
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
}

static int chance_bytes(unsigned char *buf, int n)
{
    for (int i = 0; i < n; i++)
        buf[i] = (unsigned char)next_random(&chance_state);
    return 1;
}

static int chance_status(void)
{
    return 1;
}

/* Call it before anything of OpenSSL's draws a number. */
static void virtual_chance(void)
{
    static const RAND_METHOD chance = {NULL, chance_bytes, NULL, NULL, chance_bytes, chance_status};
    RAND_set_rand_method(&chance);
}

/* ---- certificates ---- */

static struct identity {
    EVP_PKEY *key;
    X509 *cert;
} ca, server_id, client_id;

static void extend(X509 *cert, X509 *issuer, int nid, const char *value)
{
    X509V3_CTX ctx;
    X509V3_set_ctx(&ctx, issuer, cert, NULL, NULL, 0);
    X509_EXTENSION *e = X509V3_EXT_conf_nid(NULL, &ctx, nid, value);
    X509_add_ext(cert, e, -1);
    X509_EXTENSION_free(e);
}

static struct identity issue(long serial, const char *name, const char *usage)
{
    struct identity id = {EVP_PKEY_new(), X509_new()};
    EC_KEY *ec = EC_KEY_new_by_curve_name(NID_X9_62_prime256v1);
    EC_KEY_generate_key(ec);
    EVP_PKEY_assign_EC_KEY(id.key, ec);
    X509_set_version(id.cert, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(id.cert), serial);
    ASN1_TIME_set_string(X509_getm_notBefore(id.cert), "20200101000000Z");
    ASN1_TIME_set_string(X509_getm_notAfter(id.cert), "20991231235959Z");
    X509_set_pubkey(id.cert, id.key);
    X509_NAME *subject = X509_NAME_new();
    X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC, (const unsigned char *)name, -1, -1, 0);
    X509_set_subject_name(id.cert, subject);
    X509_NAME_free(subject);
    struct identity issuer = usage ? ca : id;
    X509_set_issuer_name(id.cert, X509_get_subject_name(issuer.cert));
    extend(id.cert, issuer.cert, NID_basic_constraints, usage ? "critical,CA:FALSE" : "critical,CA:TRUE");
    if (usage)
        extend(id.cert, issuer.cert, NID_ext_key_usage, usage);
    extend(id.cert, issuer.cert, NID_subject_alt_name, "DNS:localhost");
    X509_sign(id.cert, issuer.key, EVP_sha256());
    return id;
}

static int on_ssl_ctx(void *user, SSL_CTX *ctx)
{
    const struct identity *id = user;
    return X509_STORE_add_cert(SSL_CTX_get_cert_store(ctx), ca.cert) != 1 ||
           SSL_CTX_use_certificate(ctx, id->cert) != 1 || SSL_CTX_use_PrivateKey(ctx, id->key) != 1;
}

static void identity_free(struct identity *id)
{
    X509_free(id->cert);
    EVP_PKEY_free(id->key);
}

static void virtual_identities(void)
{
    ca = issue(1, "simulated CA", NULL);
    server_id = issue(2, "server", "serverAuth");
    client_id = issue(3, "client", "clientAuth");
}

static void virtual_identities_free(void)
{
    identity_free(&client_id);
    identity_free(&server_id);
    identity_free(&ca);
}

#endif
