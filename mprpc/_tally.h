/* What became of one method's calls. A provider's loop has its own: one thread at a time writes, any thread reads, without
 * a locked instruction. A channel's is shared by all threads that call. */
#ifndef MPRPC_TALLY_H
#define MPRPC_TALLY_H

#include <stdint.h>

enum {
    MPRPC_TALLY_STATUSES = 17, /* canonical codes; what is none of them counts as UNKNOWN */
    MPRPC_TALLY_LEAST = 8,     /* powers of two, in ns: less than 256 ns is one bucket, and so is more than 36 minutes; */
    MPRPC_TALLY_MOST = 41,     /* between them each power has four: a time is known to within an eighth */
    MPRPC_TALLY_BUCKETS = 1 + 4 * (MPRPC_TALLY_MOST - MPRPC_TALLY_LEAST),
};

struct mprpc_tally {
    uint64_t begun, nanoseconds; /* calls taken; the time of those in `took` */
    uint64_t ended[MPRPC_TALLY_STATUSES];
    uint64_t took[MPRPC_TALLY_BUCKETS]; /* calls whose handler ran, by how long */
};

static inline void mprpc_count(uint64_t *n, uint64_t more)
{
    __atomic_store_n(n, __atomic_load_n(n, __ATOMIC_RELAXED) + more, __ATOMIC_RELAXED);
}

static inline uint64_t mprpc_counted(const uint64_t *n)
{
    return __atomic_load_n(n, __ATOMIC_RELAXED);
}

static inline uint32_t mprpc_tally_bucket(uint64_t ns)
{
    if (ns >> MPRPC_TALLY_LEAST == 0)
        return 0;
    uint32_t power = 63 - (uint32_t)__builtin_clzll(ns);
    if (power >= MPRPC_TALLY_MOST)
        return MPRPC_TALLY_BUCKETS - 1;
    return 1 + (power - MPRPC_TALLY_LEAST) * 4 + (uint32_t)(ns >> (power - 2) & 3);
}

static inline void mprpc_tally_begin(struct mprpc_tally *t)
{
    mprpc_count(&t->begun, 1);
}

static inline void mprpc_tally_end(struct mprpc_tally *t, int32_t status)
{
    mprpc_count(&t->ended[status >= 0 && status < MPRPC_TALLY_STATUSES ? status : 2], 1);
}

static inline void mprpc_tally_took(struct mprpc_tally *t, uint64_t ns)
{
    mprpc_count(&t->nanoseconds, ns);
    mprpc_count(&t->took[mprpc_tally_bucket(ns)], 1);
}

static inline void mprpc_count_shared(uint64_t *n, uint64_t more)
{
    __atomic_fetch_add(n, more, __ATOMIC_RELAXED);
}

static inline void mprpc_tally_begin_shared(struct mprpc_tally *t)
{
    mprpc_count_shared(&t->begun, 1);
}

static inline void mprpc_tally_end_shared(struct mprpc_tally *t, int64_t status, uint64_t ns)
{
    mprpc_count_shared(&t->ended[status >= 0 && status < MPRPC_TALLY_STATUSES ? status : 2], 1);
    mprpc_count_shared(&t->nanoseconds, ns);
    mprpc_count_shared(&t->took[mprpc_tally_bucket(ns)], 1);
}

/* Any thread: adds what is there to `to`, which is the caller's own. */
void mprpc_tally_add(struct mprpc_tally *to, const struct mprpc_tally *from);

#endif
