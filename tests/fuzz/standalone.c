/* Runs a fuzz target over files, each of them once, where the compiler has no libFuzzer. */
#include <stdio.h>

#include "oracle.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int main(int argc, char **argv)
{
    static uint8_t bytes[ORACLE_MAX];

    for (int i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        if (!f) {
            perror(argv[i]);
            return 2;
        }
        LLVMFuzzerTestOneInput(bytes, fread(bytes, 1, sizeof bytes, f));
        fclose(f);
    }
    printf("%d inputs\n", argc - 1);
    return 0;
}
