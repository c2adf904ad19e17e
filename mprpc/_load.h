/* What one endpoint's calls tell of it: how many are in flight, how long they take, how they end. It outlives the
 * connections to it. No clock of its own; all times are monotonic ns. Any thread, without a lock. */
#ifndef MPRPC_LOAD_H
#define MPRPC_LOAD_H

#include <stddef.h>
#include <stdint.h>

struct mprpc_load;

/* As it was at one time, each value for itself. */
struct mprpc_load_snapshot {
    uint64_t in_flight;
    uint64_t ended;        /* calls that have ended, cancelled ones too */
    uint64_t failed;       /* of them, those whose failure says something of the endpoint: see mprpc_load_verdict */
    uint64_t failing;      /* failures since the last success */
    uint64_t latency;      /* ns: the peak-weighted moving average, decayed until now; 0: not known */
    uint64_t succeeded_at; /* when a call last succeeded, 0 for never */
    uint64_t failed_at;
};

enum mprpc_load_verdict {
    MPRPC_LOAD_OK,        /* it answered: also with an error of the application's */
    MPRPC_LOAD_FAILED,    /* broken, timed out, UNAVAILABLE, DEADLINE_EXCEEDED, refused as overloaded */
    MPRPC_LOAD_UNDECIDED, /* cancelled, or the connection was closed in good order: that says nothing */
};

struct mprpc_load *mprpc_load_new(void); /* with one reference; NULL without memory */
struct mprpc_load *mprpc_load_hold(struct mprpc_load *load);
void mprpc_load_drop(struct mprpc_load *load); /* the last one frees it */

void mprpc_load_begin(struct mprpc_load *load);
/* One that has begun and was no call, but the making of a connection: meanwhile others go elsewhere. */
void mprpc_load_leave(struct mprpc_load *load);
/* One that has begun. began: when. */
void mprpc_load_end(struct mprpc_load *load, uint64_t began, uint64_t now, enum mprpc_load_verdict verdict);
/* It is not known any more how long calls take: another provider has the address, or the same one is back. */
void mprpc_load_forget(struct mprpc_load *load);
/* A failure that was no call: it could not be reached. */
void mprpc_load_fail(struct mprpc_load *load, uint64_t now);

void mprpc_load_snapshot(const struct mprpc_load *load, uint64_t now, struct mprpc_load_snapshot *to);
uint32_t mprpc_load_in_flight(const struct mprpc_load *load);
/* How long a call more would take as far as can be said: latency x (calls in flight + 1), ns. Not known: 0 while nothing
 * is in flight, so that it is tried; then more than any known one, so that not all try it at once. */
uint64_t mprpc_load_cost(const struct mprpc_load *load, uint64_t now);

#endif
