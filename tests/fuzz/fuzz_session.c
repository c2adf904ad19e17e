/* libFuzzer's entry to the session, both sides: an input is how it is fed (one byte), then a stream. */
#include "oracle.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    if (size > 0 && size <= ORACLE_MAX)
        oracle_session(bytes + 1, size - 1, bytes[0]);
    return 0;
}
