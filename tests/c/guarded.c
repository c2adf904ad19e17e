/* guarded VECTORS COUNT: every input of the file, then COUNT mutations of them, through the oracle. The file is a
 * sequence of inputs, each behind its size (4 bytes, little-endian). The mutations are the same in every run. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "oracle.h"

enum { VECTORS_MAX = 4096, PARTS_MAX = 4, EDITS_MAX = 6 };

static const uint8_t *vectors[VECTORS_MAX];
static uint32_t sizes[VECTORS_MAX];
static size_t count;

static uint32_t below(uint32_t bound)
{
    static uint64_t state = 88172645463325252u; /* xorshift64 */

    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32) % bound;
}

static void look(const uint8_t *bytes, size_t size, unsigned how)
{
    oracle_codec(bytes, size);
    oracle_session(bytes, size, how);
}

static size_t mutate(uint8_t *to)
{
    static const uint8_t telling[] = {0, 1, 0x20, 0x64, 0x65, 0x7f, 0x80, 0xff};
    size_t size = 0;

    for (uint32_t parts = 1 + below(PARTS_MAX); parts; parts--) {
        size_t i = below((uint32_t)count);
        if (size + sizes[i] < ORACLE_MAX / 2) {
            memcpy(to + size, vectors[i], sizes[i]);
            size += sizes[i];
        }
    }
    for (uint32_t edits = below(EDITS_MAX); edits && size; edits--) {
        size_t at = below((uint32_t)size);
        uint8_t byte = below(2) ? telling[below(sizeof telling)] : (uint8_t)below(256);
        switch (below(4)) {
        case 0: to[at] ^= (uint8_t)(1u << below(8)); break;
        case 1: to[at] = byte; break;
        case 2: memmove(to + at, to + at + 1, --size - at); break;
        default:
            memmove(to + at + 1, to + at, size++ - at);
            to[at] = byte;
        }
    }
    return size;
}

static void load(const char *name)
{
    FILE *f = fopen(name, "rb");
    uint8_t head[4];

    while (f && count < VECTORS_MAX && fread(head, 1, sizeof head, f) == sizeof head) {
        uint32_t size = (uint32_t)head[0] | (uint32_t)head[1] << 8 | (uint32_t)head[2] << 16 | (uint32_t)head[3] << 24;
        uint8_t *at = malloc(size + 1u);
        if (!at || fread(at, 1, size, f) != size)
            abort();
        vectors[count] = at;
        sizes[count++] = size;
    }
    if (!f || !count) {
        fprintf(stderr, "no vectors in %s\n", name);
        exit(2);
    }
    fclose(f);
}

int main(int argc, char **argv)
{
    static uint8_t input[ORACLE_MAX];

    if (argc != 3)
        return 2;
    load(argv[1]);
    for (size_t i = 0; i < count; i++)
        for (unsigned fragment = 1; fragment < 20 && fragment <= sizes[i] + 1u; fragment++)
            look(vectors[i], sizes[i], fragment);
    for (long i = 0; i < atol(argv[2]); i++) {
        size_t size = mutate(input);
        look(input, size, 1 + below(below(2) ? 8 : 256));
    }
    printf("%zu vectors, %s mutations\n", count, argv[2]);
    for (size_t i = 0; i < count; i++)
        free((void *)(uintptr_t)vectors[i]);
    return 0;
}
