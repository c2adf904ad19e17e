/* A gate: how many requests of some methods may be under way at once, and what those took that were let in. It decides
 * nothing but yes or no; limiter.py reads the window and sets the limit. Whoever turns the loop uses it. */
#ifndef MPRPC_GATE_H
#define MPRPC_GATE_H

#include <stdint.h>

/* What went through a gate since it was last read. */
struct mprpc_window {
    uint64_t samples, nanoseconds; /* requests that were answered after they ran; from their receipt on, in all */
    uint64_t refused;
    uint32_t peak; /* the most that were under way at once */
};

struct mprpc_gate {
    uint32_t limit, under_way;
    struct mprpc_window window;
};

/* 1: it is let in, and mprpc_gate_leave follows; 0: it is refused. */
static inline int mprpc_gate_enter(struct mprpc_gate *g)
{
    if (g->under_way >= g->limit) {
        g->window.refused++;
        return 0;
    }
    if (++g->under_way > g->window.peak)
        g->window.peak = g->under_way;
    return 1;
}

/* ns: since it was received; 0: it never ran. */
static inline void mprpc_gate_leave(struct mprpc_gate *g, uint64_t ns)
{
    g->under_way--;
    g->window.samples += ns != 0;
    g->window.nanoseconds += ns;
}

#endif
