/* Fuzzes connection IDs: records in libssl's form that are translated on their way out, and records that arrive.
 *
 * The first bytes choose suite, lengths and type; the rest is text, or what arrives. Checked: what goes out is the one record
 * with the connection ID, of the size that it must have; its other end opens it to the same type and text, and turns it back
 * into the very bytes that libssl wrote; nothing that was changed by a bit is opened; of bytes that arrive nothing is read
 * behind their end; records that pass the window once do not pass it again. */
#include "../dtls.c"

#define BROKEN(...) (fprintf(stderr, "broken: " __VA_ARGS__), fputc('\n', stderr), abort())

static struct crypt *work;
static dtls_counters counters;
static uint8_t sent[DATAGRAM_MAX];
static size_t sent_len;

static int keep_sent(void *owner, const void *data, size_t len)
{
    (void)owner;
    memcpy(sent, data, len);
    sent_len = len;
    return 0;
}

/* One end's keys, with those of the two directions the other way round for the other. */
static struct record_keys *make_keys(const struct aead *aead, bool other)
{
    struct record_keys *k = calloc(1, sizeof *k);
    struct record_key *of[2] = {other ? &k->in : &k->out, other ? &k->out : &k->in};
    k->aead = aead;
    k->sure = true;
    for (int i = 0; i < 2; i++) {
        memset(of[i]->key, 0x11 + i, sizeof of[i]->key);
        memset(of[i]->salt, 0x51 + i, sizeof of[i]->salt);
    }
    return k;
}

struct choice {
    const struct aead *aead;
    size_t cid_len, len;
    unsigned type, as;
    uint64_t sequence;
    const uint8_t *text;
};

/* As libssl writes it: only where a number is given, the text may have any. */
static size_t make_plain(const struct choice *c, const struct record_keys *keys, uint8_t *out)
{
    uint8_t text[RECORD_BODY_MAX + 1], header[RECORD_HEADER + 8] = {(uint8_t)c->type, 0xfe, 0xfd, 0, 1};
    store_number(header + 5, 6, c->sequence);
    store_number(header + RECORD_HEADER, 8, 0x1122334455667788u + c->sequence);
    const struct record like = {.start = header, .body = header + RECORD_HEADER, .header = RECORD_HEADER};
    memcpy(text, c->text, c->len);
    return record_seal(work, c->aead, &keys->out, &like, NULL, 0, c->type, text, c->len, out);
}

/* The same bytes, ending where their memory ends. */
static void arrives(struct wire *w, const uint8_t *p, size_t n, const struct choice *c, const uint8_t *plain)
{
    uint8_t *copy = malloc(n ? n : 1), *text = malloc(RECORD_BODY_MAX + 1);
    struct record r, back;
    size_t len = 0;
    unsigned type = 0;
    memcpy(copy, p, n);
    bool opens = wire_parse(w, copy, n, &r) && r.type == TYPE_CID && wire_is_fresh(w, r.sequence) &&
                 wire_open(w, false, &r, text, &len, &type);
    if (opens && !c)
        BROKEN("a changed record is authentic");
    if (!opens && c)
        BROKEN("%s: a record of %zu bytes is not authentic", OBJ_nid2sn(c->aead->nid), c->len);
    if (opens) {
        if (type != (c->as ? c->as : c->type) || len != c->len || memcmp(text, c->text, len) != 0)
            BROKEN("another text or type: %u", type);
        if (!c->as && (!wire_plain(w, &r, type, text, len, &back) || memcmp(back.start, plain, back.size) != 0))
            BROKEN("libssl would read another record");
        wire_note(w, r.sequence);
        if (wire_is_fresh(w, r.sequence))
            BROKEN("a record passes twice");
    }
    free(text);
    free(copy);
}

static void go_out(const struct choice *c, const uint8_t *changes, size_t changes_len)
{
    uint8_t cid[UINT8_MAX], plain[DATAGRAM_MAX], changed[DATAGRAM_MAX];
    struct wire from = {.crypt = work, .keys = make_keys(c->aead, false), .cid = true, .as = c->as, .send = keep_sent};
    struct wire to = {.crypt = work, .keys = make_keys(c->aead, true), .cid = true, .server = true};
    memset(cid, 0xc1, sizeof cid);
    from.cid_out = cid;
    from.cid_out_len = (uint8_t)c->cid_len;
    from.counters = &counters;
    to.cid_in[0] = (uint8_t)c->cid_len;
    memset(to.cid_in + 1, 0xc1, c->cid_len);
    size_t n = make_plain(c, from.keys, plain);
    sent_len = 0;
    if (wire_send(&from, plain, n) != 0 || sent_len != n + c->cid_len + 1)
        BROKEN("%zu bytes went out as %zu", n, sent_len);
    for (size_t i = 0; i + 1 < changes_len; i += 2) {
        size_t at = load16(changes + i) % sent_len;
        memcpy(changed, sent, sent_len);
        changed[at] ^= (uint8_t)(1u << (changes[i] >> 5));
        if (at < 5 || (at > 10 && at < RECORD_HEADER + c->cid_len)) /* what makes it no record of this connection */
            continue;
        arrives(&to, changed, sent_len, NULL, NULL);
    }
    arrives(&to, sent, sent_len, c, plain);
    record_keys_free(from.keys);
    record_keys_free(to.keys);
}

/* Any bytes, behind a header that leads to the keys, and without. */
static void come_in(const struct aead *aead, size_t cid_len, const uint8_t *data, size_t n)
{
    struct wire w = {.crypt = work, .keys = make_keys(aead, true), .cid = true, .rrc = true, .server = true};
    uint8_t led[RECORD_HEADER + DTLS_CID_MAX + 1024] = {TYPE_CID, 0xfe, 0xfd, 0, 1};
    w.cid_in[0] = (uint8_t)cid_len;
    store_number(led + RECORD_HEADER + cid_len - 2, 2, n);
    memcpy(led + RECORD_HEADER + cid_len, data, n);
    arrives(&w, data, n, NULL, NULL);
    arrives(&w, led, RECORD_HEADER + cid_len + n, NULL, NULL);
    record_keys_free(w.keys);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const unsigned types[] = {TYPE_ALERT, TYPE_HANDSHAKE, TYPE_DATA, TYPE_DATA};
    if (!work)
        work = calloc(1, sizeof *work);
    if (n < 6 || n > 1024)
        return 0;
    struct choice c = {.aead = &aeads[data[0] % AEADS],
                       .cid_len = 1 + data[1] % DTLS_CID_MAX,
                       .type = types[data[2] & 3],
                       .as = data[2] & 4 ? TYPE_RRC : 0,
                       .sequence = load16(data + 3),
                       .text = data + 6,
                       .len = n - 6};
    if (data[5] & 1)
        come_in(c.aead, c.cid_len, data + 6, n - 6);
    else
        go_out(&c, data, n < 40 ? n : 40);
    return 0;
}
