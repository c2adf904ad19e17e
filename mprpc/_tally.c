/* A snapshot is no moment: what is counted while it is read may be in it or not, field by field. */
#include "_tally.h"

#include <stddef.h>

void mprpc_tally_add(struct mprpc_tally *to, const struct mprpc_tally *from)
{
    uint64_t *sum = (uint64_t *)to;
    const uint64_t *each = (const uint64_t *)from;

    for (size_t i = 0; i < sizeof *to / sizeof *sum; i++)
        sum[i] += mprpc_counted(&each[i]);
}
