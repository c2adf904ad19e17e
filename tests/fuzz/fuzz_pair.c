/* libFuzzer's entry to a client and a provider that speak to each other: an input is what they do. */
#include "oracle.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    if (size <= ORACLE_MAX)
        oracle_pair(bytes, size);
    return 0;
}
