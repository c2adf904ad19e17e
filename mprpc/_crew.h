/* The threads that turn a provider's loops and run its slow handlers: leaders and followers. No Python, no socket. */
#ifndef MPRPC_CREW_H
#define MPRPC_CREW_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum {
    MPRPC_CREW_PERIOD = 2000000, /* ns between two looks at the seats: what runs at both may be slow */
    MPRPC_CREW_SURE = 25,        /* periods after which it is taken to be, whatever else may have kept it standing */
    MPRPC_CREW_QUIET = 8,        /* periods without a batch after which nobody looks any more */
    MPRPC_CREW_JOB = -1,
    MPRPC_CREW_STOP = -2,
    MPRPC_PACE_SLOW = 1000000,   /* ns from which a handler's run is slow */
    MPRPC_PACE_FAST = 0,         /* what a run costs: a fast one pays one back */
    MPRPC_PACE_LONG = 1,         /* slow by a leader's clock: perhaps the thread waited for the interpreter's lock */
    MPRPC_PACE_SURE = 12,        /* its leader was relieved, or it was slow on a thread beside */
    MPRPC_PACE_LIMIT = 16,       /* a method that owes so much is slow, until all is paid: two sure ones within 8 runs */
    MPRPC_PACE_MAX = 32,
};

struct mprpc_crew;

/* One thread's, which alone touches it, but for what the crew keeps under its mutex. */
struct mprpc_member;

/* seats: loops, a leader each. threads: handlers beside the leaders at once, of jobs and of leaders that were relieved.
 * queued_max: jobs that wait for a thread. period: ns. It expects a member that leads for every seat and one that stands
 * by, and asks for more when they are wanted: at most seats + threads + 1. NULL without memory. */
struct mprpc_crew *mprpc_crew_new(uint32_t seats, uint32_t threads, uint32_t queued_max, uint64_t period);
void mprpc_crew_free(struct mprpc_crew *crew); /* no member is left, and nobody will call */
/* What mprpc_crew_stand_by asked for in `wanted` could not be had. Any thread. */
void mprpc_crew_unwanted(struct mprpc_crew *crew);

struct mprpc_member *mprpc_member_new(struct mprpc_crew *crew); /* NULL without memory */
void mprpc_member_free(struct mprpc_member *member);            /* its thread has left */
/* This thread leads from now on. Before the seat's first run. */
void mprpc_crew_lead(struct mprpc_member *member, uint32_t seat);

/* Waits for something to do: one of the constants above, or a seat whose leader's handler seems to take long, for
 * mprpc_crew_relieve. One whose job has ended, whose loop has stopped, or who was relieved and is done, comes back here.
 * *wanted: nobody is left who stands by, start one more thread before anything else. */
int mprpc_crew_stand_by(struct mprpc_member *member, int *wanted);
/* After mprpc_crew_stand_by has returned a seat, and this thread has all that it needs to lead, such as the interpreter's
 * lock: 1, it leads that loop from now on; 0, the handler has ended, or may only wait for what this thread had to wait
 * for, too. */
int mprpc_crew_relieve(struct mprpc_member *member, int *wanted);
/* Any thread. A job waits, which one thread will be sent for: 0, or -1 when queued_max wait or the crew has stopped. */
int mprpc_crew_queue(struct mprpc_crew *crew);
/* Any thread. All who stand by, and who come to, go. Jobs that wait are nobody's any more. */
void mprpc_crew_stop(struct mprpc_crew *crew);

struct mprpc_crew_statistics {
    uint32_t members, standing, busy, queued;
    uint64_t relieved; /* how often a leader was */
};
void mprpc_crew_statistics(struct mprpc_crew *crew, struct mprpc_crew_statistics *to);

/* ---- the leader's thread, around every handler ---- */

/* A handler begins. Until mprpc_leader_ends says so, the loop is this thread's no more. */
void mprpc_leader_begins(struct mprpc_member *member);
/* It has ended: 1, this thread leads as before; 0, it was relieved, and neither the loop nor the batch is its any more. */
int mprpc_leader_ends(struct mprpc_member *member);
/* The same handler goes on: between its end and this the loop is this thread's for a moment. */
void mprpc_leader_goes_on(struct mprpc_member *member);
/* The batch has ended, which it leads. */
void mprpc_leader_rests(struct mprpc_member *member);

/* ---- which methods are slow ---- */

/* One method's, for all loops of a provider; zeroed is fast. Updates of two threads may get lost, which does no harm. */
struct mprpc_pace {
    _Atomic uint32_t debt; /* bit 31: slow */
};

static inline int mprpc_pace_slow(const struct mprpc_pace *pace)
{
    return (int)(atomic_load_explicit(&pace->debt, memory_order_relaxed) >> 31);
}

/* A run that costs so much. */
static inline void mprpc_pace_add(struct mprpc_pace *pace, uint32_t cost)
{
    uint32_t was = atomic_load_explicit(&pace->debt, memory_order_relaxed), slow = was >> 31, debt = was & 0x7fffffff;

    if (cost)
        debt = debt + cost < MPRPC_PACE_MAX ? debt + cost : MPRPC_PACE_MAX;
    else if (debt)
        debt--;
    slow = debt >= MPRPC_PACE_LIMIT || (slow && debt);
    if ((slow << 31 | debt) != was)
        atomic_store_explicit(&pace->debt, slow << 31 | debt, memory_order_relaxed);
}

#endif
