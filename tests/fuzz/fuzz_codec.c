/* libFuzzer's entry to the codec: an input is a stream. */
#include "oracle.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    if (size <= ORACLE_MAX)
        oracle_codec(bytes, size);
    return 0;
}
