/* Strategy: counters are atomics of their own; latency and the time it was measured at share one 64-bit word, so that it
 * is read and changed as one without a lock. The average is Finagle's peak-weighted one: it jumps up to a slow call at
 * once and forgets over about ten seconds, so a provider that has become slow is left alone before its queue grows. */
#include "_load.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { TICK = 20 }; /* the word's times are in units of 2^20 ns, about 1 ms, and go round after 52 days */

static const float MEMORY = 9536.7f;                 /* ticks: the 10 s after which a peak is down to two fifths */
static const uint64_t UNKNOWN = UINT64_C(1) << 40;   /* ns: the cost for each call in flight of what has not answered yet */

struct mprpc_load {
    _Atomic uint32_t references, in_flight, failing;
    _Atomic uint64_t ended, failed;
    _Atomic uint64_t latency; /* above: the tick; below: a float, ns */
    _Atomic uint64_t succeeded_at, failed_at;
};

static uint32_t tick(uint64_t now)
{
    return (uint32_t)(now >> TICK);
}

static uint64_t packed(float latency, uint32_t at)
{
    uint32_t bits;

    memcpy(&bits, &latency, sizeof bits);
    return (uint64_t)at << 32 | bits;
}

static float unpacked(uint64_t word)
{
    uint32_t bits = (uint32_t)word;
    float latency;

    memcpy(&latency, &bits, sizeof latency);
    return latency;
}

/* What is left of a weight after that time: e^-x, near enough for any x. */
static float kept(uint64_t word, uint32_t now)
{
    int32_t gone = (int32_t)(now - (uint32_t)(word >> 32));
    float x = gone > 0 ? (float)gone / MEMORY : 0.0f;

    return 1.0f / (1.0f + x + x * x / 2 + x * x * x / 6);
}

static void measure(struct mprpc_load *l, uint64_t took, uint64_t now, int only_up)
{
    uint64_t word = atomic_load_explicit(&l->latency, memory_order_relaxed), next;
    float latency = took ? (float)took : 1.0f;

    do {
        float known = unpacked(word), weight = kept(word, tick(now));
        if (latency >= known)
            next = packed(latency, tick(now));
        else if (only_up || tick(now) == (uint32_t)(word >> 32))
            return; /* nothing has been forgotten within one tick */
        else
            next = packed(known * weight + latency * (1.0f - weight), tick(now));
    } while (!atomic_compare_exchange_weak_explicit(&l->latency, &word, next, memory_order_relaxed,
                                                    memory_order_relaxed));
}

struct mprpc_load *mprpc_load_new(void)
{
    struct mprpc_load *l = calloc(1, sizeof *l);

    if (l)
        atomic_store(&l->references, 1u);
    return l;
}

struct mprpc_load *mprpc_load_hold(struct mprpc_load *l)
{
    atomic_fetch_add(&l->references, 1u);
    return l;
}

void mprpc_load_drop(struct mprpc_load *l)
{
    if (l && atomic_fetch_sub(&l->references, 1u) == 1)
        free(l);
}

void mprpc_load_begin(struct mprpc_load *l)
{
    atomic_fetch_add_explicit(&l->in_flight, 1u, memory_order_relaxed);
}

void mprpc_load_leave(struct mprpc_load *l)
{
    atomic_fetch_sub_explicit(&l->in_flight, 1u, memory_order_relaxed);
}

void mprpc_load_end(struct mprpc_load *l, uint64_t began, uint64_t now, enum mprpc_load_verdict verdict)
{
    uint64_t took = now > began ? now - began : 0;

    atomic_fetch_sub_explicit(&l->in_flight, 1u, memory_order_relaxed);
    atomic_fetch_add_explicit(&l->ended, 1u, memory_order_relaxed);
    measure(l, took, now, verdict != MPRPC_LOAD_OK); /* what failed quickly is not quick */
    if (verdict == MPRPC_LOAD_FAILED)
        mprpc_load_fail(l, now);
    if (verdict != MPRPC_LOAD_OK)
        return;
    atomic_store_explicit(&l->succeeded_at, now, memory_order_relaxed);
    if (atomic_load_explicit(&l->failing, memory_order_relaxed))
        atomic_store_explicit(&l->failing, 0u, memory_order_relaxed);
}

void mprpc_load_forget(struct mprpc_load *l)
{
    atomic_store_explicit(&l->latency, 0u, memory_order_relaxed);
}

void mprpc_load_fail(struct mprpc_load *l, uint64_t now)
{
    atomic_fetch_add_explicit(&l->failed, 1u, memory_order_relaxed);
    atomic_fetch_add_explicit(&l->failing, 1u, memory_order_relaxed);
    atomic_store_explicit(&l->failed_at, now, memory_order_relaxed);
}

static float latency_at(const struct mprpc_load *l, uint64_t now)
{
    uint64_t word = atomic_load_explicit(&l->latency, memory_order_relaxed);

    return unpacked(word) * kept(word, tick(now));
}

void mprpc_load_snapshot(const struct mprpc_load *l, uint64_t now, struct mprpc_load_snapshot *to)
{
    *to = (struct mprpc_load_snapshot){
        .in_flight = atomic_load_explicit(&l->in_flight, memory_order_relaxed),
        .ended = atomic_load_explicit(&l->ended, memory_order_relaxed),
        .failed = atomic_load_explicit(&l->failed, memory_order_relaxed),
        .failing = atomic_load_explicit(&l->failing, memory_order_relaxed),
        .latency = (uint64_t)latency_at(l, now),
        .succeeded_at = atomic_load_explicit(&l->succeeded_at, memory_order_relaxed),
        .failed_at = atomic_load_explicit(&l->failed_at, memory_order_relaxed),
    };
}

uint32_t mprpc_load_in_flight(const struct mprpc_load *l)
{
    return atomic_load_explicit(&l->in_flight, memory_order_relaxed);
}

uint64_t mprpc_load_cost(const struct mprpc_load *l, uint64_t now)
{
    uint64_t calls = atomic_load_explicit(&l->in_flight, memory_order_relaxed);
    uint64_t latency = (uint64_t)latency_at(l, now);

    return latency ? latency * (calls + 1) : UNKNOWN * calls;
}
