/* How many of a provider's loops are at work: where its connections belong. It decides from what each loop has counted;
 * no Python, no socket. */
#ifndef MPRPC_PLACEMENT_H
#define MPRPC_PLACEMENT_H

#include <stdatomic.h>
#include <stdint.h>

enum {
    MPRPC_STINT = 5000000,        /* ns after which a loop tells what it has counted */
    MPRPC_STINT_MIN = 64,         /* requests that say something */
    MPRPC_STINT_MAX = 500000000,  /* ns after which what was counted is too old to say something */
    MPRPC_STINT_LONG = 50000,     /* ns from which a handler does not run through: it waits, or computes */
    MPRPC_STINT_LARGE = 16384,    /* bytes a request from which the kernel's copies are what it costs */
    MPRPC_PLACEMENT_SURE = 2,     /* stints in a row that say the same */
    MPRPC_TRIAL_BASE = 50000000,  /* ns for which the rate of one loop is measured */
    MPRPC_TRIAL_SETTLE = 20000000, /* ns for which connections may find their loops */
    MPRPC_TRIAL = 80000000,       /* ns for which the rate of all loops is measured */
    MPRPC_TRIAL_GAIN = 115,       /* percent of one loop's rate that all must make */
};
static const uint64_t MPRPC_TRIAL_FIRST = UINT64_C(1000000000), /* ns between trials: the first, doubled up to the last */
    MPRPC_TRIAL_LAST = UINT64_C(64000000000);

/* What a loop has counted; its leader's. */
struct mprpc_stint {
    uint64_t since, processor;   /* when it began, and the processor's time of the leader then (0: not known), ns */
    uint64_t waited, held;       /* ns for the interpreter's lock, and with it */
    uint64_t bytes;              /* of requests and responses */
    uint32_t requests, long_runs; /* of them took MPRPC_STINT_LONG at least */
};

enum mprpc_phase { MPRPC_SPREAD, MPRPC_GATHERED, MPRPC_MEASURING_ONE, MPRPC_MEASURING_ALL };

struct mprpc_placement {
    _Atomic uint32_t active; /* loops at work: the first ones */
    uint32_t loops;
    atomic_flag busy; /* of all that follows */
    enum mprpc_phase phase;
    uint32_t votes;   /* stints in a row that ask for the other phase */
    uint64_t requests; /* of all loops, as far as they have told */
    uint64_t at, from; /* of a measurement: when it began, and `requests` then; at 0: it has not */
    uint64_t rate;     /* requests a second of one loop */
    uint64_t next, pause; /* when to try again, and how long to wait after that */
};

void mprpc_placement_init(struct mprpc_placement *p, uint32_t loops);
uint32_t mprpc_placement_active(const struct mprpc_placement *p); /* any thread */
/* A leader's, after a turn: looks at what it has counted, and counts anew, if that says something. Any thread. */
void mprpc_placement_tell(struct mprpc_placement *p, struct mprpc_stint *stint, uint64_t now);

#endif
