/* Fuzzes what the program reads: its arguments, the commands of clients, a server's greeting, the keys of a terminal.
 * The first byte of an input chooses.
 *
 * Checked: what they return lies within what they were given and means what was said there; keys are split in the same
 * way however they arrive, and never wait for ever. */
#define DTLS_MAIN
#define main program_main
#include "../dtls.c"
#undef main

enum { ARGS_MAX = 32, KEY_MAX = 64 };

#define BROKEN(...) (fprintf(stderr, "broken: " __VA_ARGS__), fputc('\n', stderr), abort())

/* The commands: what was understood, put together again, is what was sent, but for the end of its line. */
static void command_text(const char *data, size_t len)
{
    static const char *const names[] = {"ping", "echo ", "whoami", "stats", "bc "};
    struct message text;
    const struct command *command = command_parse(data, len, &text);
    if (!command)
        return;
    size_t at = (size_t)(command - commands);
    if (at >= sizeof names / sizeof *names)
        BROKEN("command %zu is in no table", at);
    size_t n = strlen(names[at]);
    bool takes_text = names[at][n - 1] == ' ';
    if (len < n + text.len || memcmp(data, names[at], n) != 0 || (text.text && text.text != data + n))
        BROKEN("command %zu is not what was sent", at);
    if ((text.text != NULL) != takes_text || (text.text != NULL) != (text.len > 0))
        BROKEN("command %zu with %zu bytes of text", at, text.len);
    for (size_t i = n + text.len; i < len; i++)
        if (len - i > 2 || (data[i] != '\r' && data[i] != '\n'))
            BROKEN("command %zu lost what stood behind it", at);
}

static bool in_range(int value, int min, int max)
{
    return value == 0 || (value >= min && value <= max);
}

static void options_check(const struct options *o, int argc)
{
    if (o->help || o->version)
        return;
    if (o->addrs_len < 1 || o->addrs_len >= argc || (o->mode->run != server_main && o->addrs_len != 1))
        BROKEN("%d addresses of %d arguments", o->addrs_len, argc);
    if (!in_range(o->mtu, 256, 65535) || !in_range(o->max_clients, 1, 10000000) ||
        !in_range(o->idle_timeout_ms, DTLS_NEVER, 1000000000) || !in_range(o->keepalive_ms, DTLS_NEVER, 1000000000))
        BROKEN("an option is out of range");
    for (int i = 0; i < o->addrs_len; i++) {
        dtls_addr a;
        dtls_error err = {0};
        if (option_addr(o->addrs[i], &a, &err) ? a.port == 0 : !err.text[0])
            BROKEN("address \"%s\": %s", o->addrs[i], err.text);
    }
}

/* Arguments: one a line. */
static void arguments(const char *data, size_t len)
{
    char *argv[ARGS_MAX + 1], *memory[ARGS_MAX];
    int argc = 0;
    while (len > 0 && argc < ARGS_MAX) {
        const char *end = memchr(data, '\n', len);
        size_t n = end ? (size_t)(end - data) : len;
        memory[argc] = argv[argc] = strndup(data, n);
        argc++;
        n += end != NULL;
        data += n;
        len -= n;
    }
    argv[argc] = NULL;
    int all = argc;
    struct options o;
    dtls_error err = {0};
    int r = argc > 0 ? options_parse(&o, modes, argc, argv, &err) : DTLS_ERR_ARG;
    if (r == 0)
        options_check(&o, argc);
    else if (argc > 0 && (r != DTLS_ERR_ARG || !err.text[0]))
        BROKEN("refused with %d and \"%s\"", r, err.text);
    while (all > 0)
        free(memory[--all]);
}

static void greeting(const char *data, size_t len)
{
    if (is_greeting(data, len) && (len < 8 || memcmp(data, "hello, ", 7) != 0))
        BROKEN("a greeting that is none");
}

/* A key that is whole was not so before its last byte came, unless it was too long to be one. */
static void keys(const unsigned char *p, size_t n)
{
    for (size_t len; n > 0; p += len, n -= len) {
        len = editor_key_length(p, n);
        if (len > n || (len == 0 && n > KEY_MAX))
            BROKEN("a key of %zu bytes in %zu", len, n);
        if (len == 0)
            return;
        for (size_t part = 1; part < len && len <= KEY_MAX; part++)
            if (editor_key_length(p, part) != 0)
                BROKEN("a key of %zu bytes is one of %zu, too", len, part);
        if (editor_unknown_key(p, len) && p[len - 1] != '~')
            BROKEN("a key that libedit knows");
    }
}

/* Pre-shared keys, one a line: what is taken is what was written, in hexadecimal, and found again. */
static void shared_keys(const char *data, size_t len)
{
    struct keys k = {0};
    for (size_t n; len > 0; data += n, len -= n) {
        const char *end = memchr(data, '\n', len);
        size_t line = end ? (size_t)(end - data) : len, before = k.len;
        dtls_error err = {0};
        n = line + (end != NULL);
        if (keys_add(&k, data, line, "here", &err) < 0) {
            if (k.len != before || !err.text[0])
                BROKEN("a key that was refused, or no reason");
            continue;
        }
        const struct key *key = &k.list[k.len - 1];
        size_t identity = strlen(key->identity);
        if (identity == 0 || key->len < 1 || key->len > DTLS_PSK_MAX || keys_find(&k, key->identity) != key)
            BROKEN("a key that cannot be");
        for (size_t i = 0; i < key->len; i++) {
            char hex[3];
            snprintf(hex, sizeof hex, "%02x", key->bytes[i]);
            if (tolower(data[line - 2 * key->len + 2 * i]) != hex[0] ||
                tolower(data[line - 2 * key->len + 2 * i + 1]) != hex[1])
                BROKEN("byte %zu of a key is not what was written", i);
        }
    }
    keys_free(&k);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    if (len == 0)
        return 0;
    char *copy = malloc(len - 1); /* of just that size, for the sanitizer to see what reads behind it */
    memcpy(copy, data + 1, len - 1);
    switch (data[0] >= 0xf0 ? 4 : data[0] % 4) {
    case 0:
        command_text(copy, len - 1);
        break;
    case 1:
        arguments(copy, len - 1);
        break;
    case 2:
        greeting(copy, len - 1);
        break;
    case 4:
        shared_keys(copy, len - 1);
        break;
    default:
        keys((unsigned char *)copy, len - 1);
        break;
    }
    free(copy);
    return 0;
}
