/* A peer that is who it says and misbehaves: records that OpenSSL never writes, sealed with the keys of a connection
 * (ECDHE, AES-128-GCM) and handed to one of its ends. Whatever they hold, the connection goes on, or both ends are told
 * once that it is over. Time is virtual and datagrams go through memory. check.h says how this runs. */
#include "virtual.h"
#include "world.h"

#include <openssl/evp.h>
#include <openssl/kdf.h>

enum {
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
    UNKNOWN = 24,
    WITH_CID = 25,
    PATH = 27, /* RFC 9853 */
    CID = 8
};

static unsigned char server_cid[CID]; /* as the client writes it */

/* For wire_drop. */
static int keep_cid(const struct datagram *d)
{
    for (size_t at = 0; at + HEADER + CID < d->len; at += HEADER + (size_t)(d->data[at + 11] << 8 | d->data[at + 12])) {
        if (d->data[at] == WITH_CID) {
            memcpy(server_cid, d->data + at + 11, CID);
            return 0;
        }
    }
    return 0;
}

/* RFC 5246 section 6.3: the keys of both sides, then their implicit nonces; the client's come first. */
static void derive(const SSL *ssl, unsigned char block[2 * (KEY + IV)])
{
    unsigned char master[MASTER], seed[2 * RANDOM];
    size_t n = 2 * (KEY + IV);
    SSL_SESSION_get_master_key(SSL_get0_session(ssl), master, sizeof master);
    SSL_get_server_random(ssl, seed, RANDOM);
    SSL_get_client_random(ssl, seed + RANDOM, RANDOM);
    EVP_PKEY_CTX *prf = EVP_PKEY_CTX_new_id(EVP_PKEY_TLS1_PRF, NULL);
    REQUIRE(EVP_PKEY_derive_init(prf) == 1 && EVP_PKEY_CTX_set_tls1_prf_md(prf, EVP_sha256()) == 1 &&
                EVP_PKEY_CTX_set1_tls1_prf_secret(prf, master, MASTER) == 1 &&
                EVP_PKEY_CTX_add1_tls1_prf_seed(prf, (const unsigned char *)"key expansion", 13) == 1 &&
                EVP_PKEY_CTX_add1_tls1_prf_seed(prf, seed, sizeof seed) == 1 && EVP_PKEY_derive(prf, block, &n) == 1,
            "keys");
    EVP_PKEY_CTX_free(prf);
}

/* What stands in front of a record's body, and what is authenticated besides its text: RFC 5246 section 6.2.3.3, or with a
 * connection ID RFC 9146 section 5. Returns the header's size. */
static size_t put_header(unsigned type, const unsigned char *cid, const unsigned char number[NONCE], size_t len,
                         unsigned char *out, unsigned char *aad, size_t *aad_len)
{
    const unsigned char length[2] = {(unsigned char)(len >> 8), (unsigned char)len};
    const size_t body = NONCE + len + TAG, header = HEADER + (cid ? CID : 0);
    memcpy(out, (unsigned char[]){(unsigned char)(cid ? WITH_CID : type), 0xfe, 0xfd}, 3);
    memcpy(out + 3, number, NONCE);
    if (cid) {
        memcpy(out + 11, cid, CID);
        memset(aad, 0xff, 8);
        memcpy(aad + 8, (unsigned char[]){WITH_CID, CID, WITH_CID}, 3);
        memcpy(aad + 11, out + 1, 10 + CID);
        memcpy(aad + 21 + CID, length, 2);
    } else {
        memcpy(aad, number, NONCE);
        memcpy(aad + NONCE, out, 3);
        memcpy(aad + NONCE + 3, length, 2);
    }
    *aad_len = cid ? 23 + CID : 13;
    out[header - 2] = (unsigned char)(body >> 8);
    out[header - 1] = (unsigned char)body;
    return header;
}

/* RFC 5288: header, explicit nonce, ciphertext, tag. The epoch with the sequence number serves as the nonce. With a
 * connection ID the type stands behind the text. */
static size_t seal(const SSL *ssl, int from_server, unsigned type, const unsigned char *cid, unsigned sequence,
                   const void *data, size_t len, unsigned char *out)
{
    unsigned char block[2 * (KEY + IV)], nonce[IV + NONCE], aad[23 + CID], inner = (unsigned char)type;
    const unsigned char number[NONCE] = {0, 1, 0, 0, 0, 0, (unsigned char)(sequence >> 8), (unsigned char)sequence};
    size_t aad_len, text = len + (cid ? 1 : 0), header = put_header(type, cid, number, text, out, aad, &aad_len);
    int n;
    derive(ssl, block);
    memcpy(nonce, block + 2 * KEY + (from_server ? IV : 0), IV);
    memcpy(nonce + IV, number, NONCE);
    out += header;
    memcpy(out, number, NONCE);
    EVP_CIPHER_CTX *gcm = EVP_CIPHER_CTX_new();
    EVP_EncryptInit_ex(gcm, EVP_aes_128_gcm(), NULL, block + (from_server ? KEY : 0), nonce);
    EVP_EncryptUpdate(gcm, NULL, &n, aad, (int)aad_len);
    if (len > 0)
        EVP_EncryptUpdate(gcm, out + NONCE, &n, data, (int)len);
    if (cid)
        EVP_EncryptUpdate(gcm, out + NONCE + len, &n, &inner, 1);
    EVP_EncryptFinal_ex(gcm, out + NONCE + text, &n);
    EVP_CIPHER_CTX_ctrl(gcm, EVP_CTRL_GCM_GET_TAG, TAG, out + NONCE + text);
    EVP_CIPHER_CTX_free(gcm);
    return header + NONCE + text + TAG;
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
    int with_cid_only;
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
    {"a padded message", 0, "hi\27\0\0", 5, LIVES, 0, 0, 1, 1, 1}, /* RFC 9146 section 4: zeros behind the type */
    {"padding alone", 0, "\0\0\0", 3, LIVES, 0, 0, 1, 0, 1},
    {"nothing, not even a type", 0, "", 0, LIVES, 0, 0, 1, 0, 1},
    {"a record with an ID inside", WITH_CID, "hi", 2, LIVES, 0, 0, 1, 0, 1},
    {"an answer that nobody asked for", PATH, "\1cookie..", 9, LIVES, 0, 0, 1, 0, 1},
    {"news of a move that was none", PATH, "\2cookie..", 9, LIVES, 0, 0, 1, 0, 1},
    {"half a cookie", PATH, "\0cook", 5, LIVES, 0, 0, 1, 0, 1},
    {"a cookie and a half", PATH, "\0cookie..cook", 13, LIVES, 0, 0, 1, 0, 1},
    {"a path message of no known type", PATH, "\11cookie..", 9, LIVES, 0, 0, 1, 0, 1},
    {"an empty path message", PATH, "", 0, LIVES, 0, 0, 1, 0, 1},
};

static void launch(const struct attack *a, struct side *to, const unsigned char *cid)
{
    static unsigned char record[DATAGRAM_BYTES + HEADER + CID + NONCE + 1 + TAG];
    static const char zeros[DTLS_MESSAGE_MAX + 1];
    for (int i = 0; i < a->times && to->conn; i++) {
        size_t n = seal(dtls_conn_ssl(to->conn), a->to_client, a->type, cid, (unsigned)(FIRST_SEQUENCE + i),
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
    return both && server.closed == 1 && client.closed == 1 && to->reason_text[0] &&
           (a->outcome == EITHER || to->reason == a->reason);
}

static void test_attack(const struct attack *a, int with_cid)
{
    const dtls_config cfg = {.idle_timeout_ms = IDLE_MS, .cid_bytes = with_cid ? 0 : DTLS_NEVER};
    struct side *to = a->to_client ? &client : &server;
    dtls_info info = {.silent_ms = -1};
    server.ciphers = client.ciphers = "ECDHE-ECDSA-AES128-GCM-SHA256";
    start(cfg, cfg);
    wire_drop = keep_cid;
    REQUIRE(connected(), "handshake");
    for (int i = 0; i < QUIET_TURNS; i++)
        turn();
    launch(a, to, with_cid ? server_cid : NULL);
    int messages = to->messages;
    if (a->type == DATA && a->outcome == LIVES) { /* authentic, so the peer counts as alive */
        if (to->conn)
            dtls_conn_info(to->conn, &info);
        CHECK(info.silent_ms == 0);
    }
    for (int i = 0; i < QUIET_TURNS; i++)
        turn();
    bool over = server.closed > 0 || client.closed > 0;
    CHECK(over ? a->outcome != LIVES && ended(a, to) : a->outcome != ENDS && lives());
    CHECK_EQ(messages, a->messages, "%s", over ? to->reason_text : "lives");
    stop();
}

/* ---- whether a peer is there ---- */

/* The text of a record from the server, which has no ID. */
static size_t open_record(const SSL *ssl, const unsigned char *p, unsigned char *text)
{
    unsigned char block[2 * (KEY + IV)], nonce[IV + NONCE], aad[HEADER];
    size_t len = (size_t)(p[11] << 8 | p[12]) - NONCE - TAG;
    int n, good;
    derive(ssl, block);
    memcpy(nonce, block + 2 * KEY + IV, IV);
    memcpy(nonce + IV, p + HEADER, NONCE);
    memcpy(aad, p + 3, NONCE);
    memcpy(aad + NONCE, p, 3);
    aad[11] = (unsigned char)(len >> 8);
    aad[12] = (unsigned char)len;
    EVP_CIPHER_CTX *gcm = EVP_CIPHER_CTX_new();
    EVP_DecryptInit_ex(gcm, EVP_aes_128_gcm(), NULL, block + KEY, nonce);
    EVP_DecryptUpdate(gcm, NULL, &n, aad, sizeof aad);
    EVP_DecryptUpdate(gcm, text, &n, p + HEADER + NONCE, (int)len);
    EVP_CIPHER_CTX_ctrl(gcm, EVP_CTRL_GCM_SET_TAG, TAG, (void *)(uintptr_t)(p + HEADER + NONCE + len));
    good = EVP_DecryptFinal_ex(gcm, text + n, &n);
    EVP_CIPHER_CTX_free(gcm);
    return good == 1 ? len : 0;
}

static struct datagram answer; /* the last path message to the client */
static int answers;

static int keep_answer(const struct datagram *d)
{
    if (d->data[0] == PATH) {
        answer = *d;
        answers++;
    }
    return keep_cid(d);
}

/* A path_challenge is answered once with its cookie, to where it came from; a repeated record is not. */
static void test_challenge(void)
{
    unsigned char record[100], text[100];
    server.ciphers = client.ciphers = "ECDHE-ECDSA-AES128-GCM-SHA256";
    start((dtls_config){0}, (dtls_config){0});
    wire_drop = keep_answer;
    REQUIRE(connected(), "handshake");
    answers = 0;
    const SSL *ssl = dtls_conn_ssl(server.conn);
    size_t n = seal(ssl, 0, PATH, server_cid, FIRST_SEQUENCE, "\0cookie..", 9, record);
    for (int times = 0; times < 3; times++)
        dtls_endpoint_input(server.ep, record, n, &client_addr, &server_addr);
    for (int i = 0; i < QUIET_TURNS; i++)
        turn();
    CHECK_EQ(answers, 1, "answered once");
    CHECK_THAT(open_record(ssl, answer.data, text) == 9 && memcmp(text, "\1cookie..", 9) == 0, "with its cookie");
    CHECK(answer.len <= n && lives());
    stop();
}

/* Where an ID is due a record without one is nothing, however authentic: RFC 9146 section 3. */
static void test_without_id(void)
{
    unsigned char record[100];
    dtls_counters before, after;
    server.ciphers = client.ciphers = "ECDHE-ECDSA-AES128-GCM-SHA256";
    start((dtls_config){0}, (dtls_config){0});
    REQUIRE(connected(), "handshake");
    dtls_endpoint_counters(server.ep, &before);
    size_t n = seal(dtls_conn_ssl(server.conn), 0, DATA, NULL, FIRST_SEQUENCE, "hi", 2, record);
    dtls_endpoint_input(server.ep, record, n, &client_addr, &server_addr);
    dtls_endpoint_counters(server.ep, &after);
    CHECK_THAT(server.messages == 0 && after.dropped[DTLS_DROP_CID] == before.dropped[DTLS_DROP_CID] + 1,
               "a record without the ID that is due");
    CHECK(lives());
    stop();
}

/* ---- within a handshake ---- */

static const SSL *trying;         /* the client's, which an application does not get before it is connected */
static unsigned char last_seq[2]; /* message_seq of the last plaintext message, to the client and to the server */
static int empties;

static void keep_ssl(const SSL *ssl, int where, int result)
{
    (void)where, (void)result;
    trying = ssl;
}

static int keep_ssls(SSL_CTX *ctx)
{
    SSL_CTX_set_info_callback(ctx, keep_ssl);
    return 0;
}

/* Ahead of a Finished come two fragments of it that hold nothing, as a peer may send that cuts its messages oddly. Both
 * sides' keys are known to the client's SSL when the first Finished is under way. */
static int with_empty_finished(const struct datagram *d)
{
    int to_server = d->to.port == server_addr.port;
    struct side *to = to_server ? &server : &client;
    for (size_t at = 0, size; at < d->len; at += size) {
        const unsigned char *p = d->data + at;
        size = HEADER + (size_t)(p[11] << 8 | p[12]);
        if (p[0] == HANDSHAKE && p[4] == 0)
            last_seq[to_server] = p[HEADER + 5];
        for (int end = 0; end < 2 && p[0] == HANDSHAKE && p[4] == 1; end++, empties++) {
            const unsigned char none[12] = {20, 0, 0,           12, 0, (unsigned char)(last_seq[to_server] + 1),
                                            0,  0, end ? 12 : 0};
            unsigned char record[HEADER + NONCE + sizeof none + TAG];
            size_t n =
                seal(trying, !to_server, HANDSHAKE, NULL, (unsigned)(FIRST_SEQUENCE + end), none, sizeof none, record);
            dtls_endpoint_input(to->ep, record, n, &d->from, &d->to);
        }
        dtls_endpoint_input(to->ep, p, size, &d->from, &d->to);
    }
    return 1;
}

static void test_empty_finished(void)
{
    int64_t began = now_us;
    server.ciphers = client.ciphers = "ECDHE-ECDSA-AES128-GCM-SHA256";
    client.hook = keep_ssls;
    start((dtls_config){.cid_bytes = DTLS_NEVER}, (dtls_config){0});
    empties = 0;
    wire_drop = with_empty_finished;
    CHECK_THAT(connected() && now_us - began < 500000, "a handshake goes on at once");
    CHECK_EQ(empties, 4, "two of each side's");
    wire_drop = NULL;
    CHECK(lives());
    stop();
}

int main(int argc, char **argv)
{
    char name[80];
    tests_begin("keyholder", argc, argv);
    virtual_chance();
    virtual_identities();
    for (size_t i = 0; i < sizeof attacks / sizeof *attacks; i++)
        for (int with_cid = attacks[i].with_cid_only; with_cid <= !attacks[i].to_client; with_cid++) {
            snprintf(name, sizeof name, "%s%s", attacks[i].what, with_cid ? ", with a connection ID" : "");
            if (test_begin(name))
                test_attack(&attacks[i], with_cid);
        }
    if (test_begin("without an ID"))
        test_without_id();
    if (test_begin("a path challenge"))
        test_challenge();
    if (test_begin("empty fragments of a Finished"))
        test_empty_finished();
    virtual_identities_free();
    return tests_end();
}
