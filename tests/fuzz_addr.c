/* Fuzzes addresses: text that is parsed, and addresses of any bytes that are formatted.
 *
 * Checked: what was parsed is written in a form that parses to the same bytes; a buffer is never overrun and always
 * terminated; what is refused has its reason, in one line. */
#include "../dtls.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define BROKEN(...) (fprintf(stderr, "broken: " __VA_ARGS__), fputc('\n', stderr), abort())

/* Into a buffer of just that size, for the sanitizer to see. */
static void format_into(const dtls_addr *a, size_t size, const char *whole)
{
    char *buf = malloc(size);
    if (dtls_addr_format(a, buf, size) != buf || strlen(buf) >= size || strncmp(buf, whole, size - 1) != 0)
        BROKEN("\"%s\" was not cut at %zu", whole, size);
    free(buf);
}

static void formatted(const dtls_addr *a, char text[DTLS_ADDR_TEXT])
{
    dtls_addr_format(a, text, DTLS_ADDR_TEXT);
    for (size_t size = 1; size <= DTLS_ADDR_TEXT; size += 1 + size / 2)
        format_into(a, size, text);
}

static void round_trip(const dtls_addr *a)
{
    char text[DTLS_ADDR_TEXT];
    dtls_addr back;
    formatted(a, text);
    if (dtls_addr_parse(&back, text, NULL) != 0 || memcmp(a, &back, sizeof back) != 0 || !dtls_addr_equal(a, &back))
        BROKEN("\"%s\" is read as another address", text);
}

static void parse(const uint8_t *data, size_t len)
{
    char *text = malloc(len + 1);
    dtls_addr a;
    dtls_error err = {0};
    memcpy(text, data, len);
    text[len] = 0;
    int r = dtls_addr_parse(&a, text, &err);
    if (r == 0)
        round_trip(&a);
    else if (r != DTLS_ERR_ADDR || err.code != r || !err.text[0])
        BROKEN("\"%s\" was refused with %d and no reason", text, r);
    else if (strchr(err.text, '\n'))
        BROKEN("a reason of more than one line");
    free(text);
}

/* Any bytes: an address of a transport of the user's own, or one that the system gave. */
static void from_bytes(const uint8_t *data, size_t len)
{
    char text[DTLS_ADDR_TEXT];
    dtls_addr a = {0};
    memcpy(&a, data, len < sizeof a ? len : sizeof a);
    formatted(&a, text);

    struct sockaddr *sa = malloc(len + 1);
    memcpy(sa, data, len);
    if (dtls_addr_from_sockaddr(&a, sa, len) == 0)
        round_trip(&a);
    free(sa);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    parse(data, len);
    from_bytes(data, len);
    return 0;
}
