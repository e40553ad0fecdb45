/* A peer that is who it says and misbehaves: records that OpenSSL never writes, sealed with the keys of a connection
 * (ECDHE, AES-128-GCM) and handed to one of its ends. Whatever they hold, the connection goes on, or both ends are told
 * once that it is over.
 *
 *   keyholder
 *
 * Time is virtual and datagrams go through memory. */
#include "virtual.h"

#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    WIRE_MAX = 64,
    DATAGRAM_BYTES = 17000,
    TURN_MS = 10,
    PATIENCE_TURNS = 1000,
    IDLE_MS = 5000,    /* until an end that was told nothing gives up */
    QUIET_TURNS = 100, /* until libssl's buffers are given back, too */

    RANDOM = 32,
    MASTER = 48,
    KEY = 16,
    IV = 4,
    NONCE = 8, /* of which the record carries these */
    TAG = 16,
    HEADER = 13,
    FIRST_SEQUENCE = 10, /* ahead of what the real peer used, and within the window of 32, so that it may go on */

    CCS = 20,
    ALERT = 21,
    HANDSHAKE = 22,
    DATA = 23,
    UNKNOWN = 24
};

struct side {
    dtls_endpoint *ep;
    dtls_conn *conn;
    int connected, closed, messages;
    dtls_reason reason;
    char text[160];
};

static struct datagram {
    dtls_addr from, to;
    size_t len;
    unsigned char data[DATAGRAM_BYTES];
} wire[WIRE_MAX];

static size_t wire_len;
static struct side server, client;
static dtls_addr server_addr, client_addr;
static dtls_loop *loop;
static int failed;

static int on_send(void *user, const void *data, size_t len, const dtls_addr *from, const dtls_addr *to)
{
    (void)user;
    if (wire_len == WIRE_MAX || len > DATAGRAM_BYTES)
        return -1;
    wire[wire_len] = (struct datagram){.from = *from, .to = *to, .len = len};
    memcpy(wire[wire_len++].data, data, len);
    return 0;
}

static void on_event(dtls_conn *conn, dtls_event event, const void *data, size_t len)
{
    struct side *s = dtls_endpoint_user(dtls_conn_endpoint(conn));
    (void)data, (void)len;
    s->connected += event == DTLS_EV_CONNECTED;
    s->messages += event == DTLS_EV_MESSAGE;
    s->closed += event == DTLS_EV_CLOSED;
    s->conn = event == DTLS_EV_CLOSED ? NULL : conn;
    s->reason = dtls_conn_reason(conn);
    snprintf(s->text, sizeof s->text, "%s", dtls_conn_reason_text(conn));
}

static int on_context(void *user, SSL_CTX *ctx)
{
    struct identity *id = user == &server ? &server_id : &client_id;
    return on_ssl_ctx(id, ctx) || SSL_CTX_set_cipher_list(ctx, "ECDHE-ECDSA-AES128-GCM-SHA256") != 1;
}

static void turn(void)
{
    for (size_t n = wire_len; n > 0; n--) {
        struct datagram d = wire[0];
        memmove(wire, wire + 1, --wire_len * sizeof *wire);
        dtls_endpoint_input(d.to.port == server_addr.port ? server.ep : client.ep, d.data, d.len, &d.from, &d.to);
    }
    now_us += TURN_MS * 1000;
    dtls_loop_poll(loop, 0);
}

static int wait_for(const int *count, int value)
{
    for (int i = 0; i < PATIENCE_TURNS && *count < value; i++)
        turn();
    return *count >= value;
}

static void open_side(struct side *s)
{
    dtls_config cfg = {
        .send = on_send, .on_event = on_event, .on_ssl_ctx = on_context, .user = s, .idle_timeout_ms = IDLE_MS};
    dtls_error err;
    memset(s, 0, sizeof *s);
    s->ep = dtls_endpoint_new(loop, &cfg, &err);
    if (!s->ep) {
        printf("not ok - keyholder endpoint: %s\n", err.text);
        exit(1);
    }
}

static void start(void)
{
    loop = dtls_loop_new(&(dtls_loop_config){.now_us = virtual_now});
    open_side(&server);
    open_side(&client);
    dtls_endpoint_listen(server.ep, NULL, NULL);
    dtls_target t = {.peer = server_addr, .local = client_addr, .name = "localhost"};
    if (!dtls_endpoint_connect(client.ep, &t, NULL) || !wait_for(&client.connected, 1) ||
        !wait_for(&server.connected, 1)) {
        printf("not ok - keyholder handshake\n");
        exit(1);
    }
    for (int i = 0; i < QUIET_TURNS; i++)
        turn();
}

/* RFC 5246 section 6.3: the keys of both sides, then their implicit nonces; the client's come first. */
static void derive(SSL *ssl, unsigned char block[2 * (KEY + IV)])
{
    unsigned char master[MASTER], seed[2 * RANDOM];
    size_t n = 2 * (KEY + IV);
    SSL_SESSION_get_master_key(SSL_get0_session(ssl), master, sizeof master);
    SSL_get_server_random(ssl, seed, RANDOM);
    SSL_get_client_random(ssl, seed + RANDOM, RANDOM);
    EVP_PKEY_CTX *prf = EVP_PKEY_CTX_new_id(EVP_PKEY_TLS1_PRF, NULL);
    if (EVP_PKEY_derive_init(prf) != 1 || EVP_PKEY_CTX_set_tls1_prf_md(prf, EVP_sha256()) != 1 ||
        EVP_PKEY_CTX_set1_tls1_prf_secret(prf, master, MASTER) != 1 ||
        EVP_PKEY_CTX_add1_tls1_prf_seed(prf, (const unsigned char *)"key expansion", 13) != 1 ||
        EVP_PKEY_CTX_add1_tls1_prf_seed(prf, seed, sizeof seed) != 1 || EVP_PKEY_derive(prf, block, &n) != 1) {
        printf("not ok - keyholder keys\n");
        exit(1);
    }
    EVP_PKEY_CTX_free(prf);
}

/* RFC 5288: header, explicit nonce, ciphertext, tag. The epoch with the sequence number serves as the nonce. */
static size_t seal(SSL *ssl, int from_server, unsigned type, unsigned sequence, const void *data, size_t len,
                   unsigned char *out)
{
    unsigned char block[2 * (KEY + IV)], nonce[IV + NONCE];
    const size_t body = NONCE + len + TAG;
    const unsigned char number[NONCE] = {0, 1, 0, 0, 0, 0, (unsigned char)(sequence >> 8), (unsigned char)sequence};
    unsigned char aad[HEADER] = {[8] = (unsigned char)type, 0xfe, 0xfd, (unsigned char)(len >> 8), (unsigned char)len};
    int n;
    derive(ssl, block);
    memcpy(nonce, block + 2 * KEY + (from_server ? IV : 0), IV);
    memcpy(nonce + IV, number, NONCE);
    memcpy(aad, number, NONCE);
    memcpy(out, (unsigned char[]){(unsigned char)type, 0xfe, 0xfd}, 3);
    memcpy(out + 3, number, NONCE);
    out[11] = (unsigned char)(body >> 8);
    out[12] = (unsigned char)body;
    out += HEADER;
    memcpy(out, number, NONCE);
    EVP_CIPHER_CTX *gcm = EVP_CIPHER_CTX_new();
    EVP_EncryptInit_ex(gcm, EVP_aes_128_gcm(), NULL, block + (from_server ? KEY : 0), nonce);
    EVP_EncryptUpdate(gcm, NULL, &n, aad, sizeof aad);
    if (len > 0)
        EVP_EncryptUpdate(gcm, out + NONCE, &n, data, (int)len);
    EVP_EncryptFinal_ex(gcm, out + NONCE + len, &n);
    EVP_CIPHER_CTX_ctrl(gcm, EVP_CTRL_GCM_GET_TAG, TAG, out + NONCE + len);
    EVP_CIPHER_CTX_free(gcm);
    return HEADER + body;
}

enum outcome {
    LIVES, /* and takes what the real peer sends next */
    ENDS,  /* for both, told once each, with this reason where it came from */
    EITHER /* as the OpenSSL at hand will have it */
};

static const struct attack {
    const char *what;
    unsigned type;
    const char *data;
    size_t len;
    enum outcome outcome;
    dtls_reason reason;
    int to_client, times, messages; /* messages: that the application gets of it */
} attacks[] = {
    {"a message", DATA, "hi", 2, LIVES, 0, 0, 1, 1},
    {"an empty record", DATA, "", 0, EITHER, 0, 0, 1, 0},
    {"twenty empty records", DATA, "", 0, EITHER, 0, 0, 20, 0},
    {"the largest message", DATA, NULL, DTLS_MESSAGE_MAX, LIVES, 0, 0, 1, 1},
    {"a message of a byte more", DATA, NULL, DTLS_MESSAGE_MAX + 1, ENDS, DTLS_CLOSE_ERROR, 0, 1, 0},
    {"close_notify", ALERT, "\1\0", 2, ENDS, DTLS_CLOSE_PEER, 0, 1, 0},
    {"a fatal alert", ALERT, "\2\50", 2, ENDS, DTLS_CLOSE_ERROR, 0, 1, 0},
    {"a warning", ALERT, "\1\132", 2, EITHER, 0, 0, 1, 0},
    {"twenty warnings", ALERT, "\1\132", 2, EITHER, 0, 0, 20, 0},
    {"an empty alert", ALERT, "", 0, EITHER, 0, 0, 1, 0},
    {"half an alert", ALERT, "\1", 1, EITHER, 0, 0, 1, 0},
    {"an alert and a half", ALERT, "\1\0\1", 3, EITHER, 0, 0, 1, 0},
    {"ChangeCipherSpec", CCS, "\1", 1, LIVES, 0, 0, 1, 0},
    {"an empty handshake record", HANDSHAKE, "", 0, EITHER, 0, 0, 1, 0},
    {"a third of a handshake header", HANDSHAKE, "\1\0\0\0", 4, EITHER, 0, 0, 1, 0},
    {"handshake rubbish", HANDSHAKE, "rubbish rubbish rubbish", 23, EITHER, 0, 0, 1, 0},
    {"a HelloRequest to a client", HANDSHAKE, "\0\0\0\0\0\0\0\0\0\0\0\0", 12, EITHER, 0, 1, 1, 0},
    {"a HelloRequest to a server", HANDSHAKE, "\0\0\0\0\0\0\0\0\0\0\0\0", 12, EITHER, 0, 0, 1, 0},
    {"the start of a ClientHello to a server", HANDSHAKE, "\1\0\0\60\0\0\0\0\0\0\0\2\xfe\xfd", 14, EITHER, 0, 0, 1, 0},
    {"the same to a client", HANDSHAKE, "\1\0\0\60\0\0\0\0\0\0\0\2\xfe\xfd", 14, EITHER, 0, 1, 1, 0},
    {"a Finished to a client", HANDSHAKE, "\24\0\0\14\0\7\0\0\0\0\0\14 twelve bytes", 25, EITHER, 0, 1, 1, 0},
    {"a record of no known type", UNKNOWN, "hi", 2, LIVES, 0, 0, 1, 0},
};

static void launch(const struct attack *a, struct side *to)
{
    static unsigned char record[DATAGRAM_BYTES + HEADER + NONCE + TAG];
    static const char zeros[DTLS_MESSAGE_MAX + 1];
    for (int i = 0; i < a->times && to->conn; i++) {
        size_t n = seal(dtls_conn_ssl(to->conn), a->to_client, a->type, (unsigned)(FIRST_SEQUENCE + i),
                        a->data ? a->data : zeros, a->len, record);
        dtls_endpoint_input(to->ep, record, n, a->to_client ? &server_addr : &client_addr,
                            a->to_client ? &client_addr : &server_addr);
    }
}

static int lives(void)
{
    int before = server.messages;
    return client.conn && server.conn && dtls_conn_send(client.conn, "alive", 5) == 0 &&
           wait_for(&server.messages, before + 1);
}

/* The end that the record was for is told why; the other one by that end's alert, or when it has been silent too long. */
static int ended(const struct attack *a, const struct side *to)
{
    int both = wait_for(&server.closed, 1) && wait_for(&client.closed, 1);
    for (int i = 0; i < QUIET_TURNS; i++)
        turn();
    return both && server.closed == 1 && client.closed == 1 && to->text[0] &&
           (a->outcome == EITHER || to->reason == a->reason);
}

static void test(const struct attack *a)
{
    struct side *to = a->to_client ? &client : &server;
    dtls_info info = {.silent_ms = -1};
    start();
    launch(a, to);
    int good = to->messages == a->messages;
    if (a->type == DATA && a->outcome == LIVES) { /* authentic, so the peer counts as alive */
        if (to->conn)
            dtls_conn_info(to->conn, &info);
        good = good && info.silent_ms == 0;
    }
    for (int i = 0; i < QUIET_TURNS; i++)
        turn();
    int over = server.closed > 0 || client.closed > 0;
    good = good && (over ? a->outcome != LIVES && ended(a, to) : a->outcome != ENDS && lives());
    printf("%s - keyholder %s%s%s\n", good ? "ok" : "not ok", a->what, over ? ": " : "", over ? to->text : "");
    failed |= !good;
    dtls_loop_free(loop);
    wire_len = 0;
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    virtual_chance();
    virtual_identities();
    dtls_addr_parse(&server_addr, "192.0.2.1:4444", NULL);
    dtls_addr_parse(&client_addr, "192.0.2.2:5555", NULL);
    for (size_t i = 0; i < sizeof attacks / sizeof *attacks; i++)
        test(&attacks[i]);
    virtual_identities_free();
    return failed;
}
