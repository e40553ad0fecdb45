/* Runs a fuzz target on the files that are named, where there is no libFuzzer, and to measure coverage.
 *
 *   fuzz-TARGET-replay FILE... */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len);

/* From memory of just its size, so that a sanitizer sees a read behind its end. */
static int replay(const char *name)
{
    FILE *file = fopen(name, "rb");
    if (!file || fseek(file, 0, SEEK_END) != 0)
        return -1;
    long len = ftell(file);
    rewind(file);
    uint8_t *data = len >= 0 ? malloc((size_t)len + (len == 0)) : NULL;
    int good = data && fread(data, 1, (size_t)len, file) == (size_t)len;
    fclose(file);
    if (good)
        LLVMFuzzerTestOneInput(data, (size_t)len);
    free(data);
    return good ? 0 : -1;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        fprintf(stderr, "%s\n", argv[i]); /* the last one is what a failure is about */
        if (replay(argv[i]) != 0) {
            perror(argv[i]);
            return 1;
        }
    }
    return 0;
}
