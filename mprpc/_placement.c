/* Strategy: under the interpreter's lock only one loop at a time runs handlers. Where these take microseconds, several
 * loops mostly wake each other, and one does the work of four for less: so when loops wait for the lock, the connections
 * gather in the first one. They spread over all of them again when requests or handlers take long, since those go on
 * without the lock. Whether several loops would do more on this machine is found out by trying it now and then, while
 * the first one has no time to spare: the trial is short, and what it finds decides.
 *
 * Only the number of loops at work is decided here. A loop that is not at work hands each connection on when it has
 * nothing in flight there (`_loop.c`), so nothing is lost, whatever is decided. */
#define _GNU_SOURCE
#include "_placement.h"

#include <string.h>
#include <time.h>

void mprpc_placement_init(struct mprpc_placement *p, uint32_t loops)
{
    memset(p, 0, sizeof *p);
    atomic_init(&p->active, loops);
    p->loops = loops;
    atomic_flag_clear(&p->busy);
    p->pause = MPRPC_TRIAL_FIRST;
}

uint32_t mprpc_placement_active(const struct mprpc_placement *p)
{
    return atomic_load_explicit(&p->active, memory_order_relaxed);
}

static uint64_t processor_ns(void)
{
    struct timespec t;

    return clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) ? 0
                                                      : (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

/* ---- what a stint says ---- */

static int takes_long(const struct mprpc_stint *s)
{
    return s->long_runs * UINT64_C(10) > s->requests || s->bytes / s->requests >= 2 * MPRPC_STINT_LARGE;
}

/* Its requests are small and quick, and it waits for the interpreter's lock more than half as long as it has it. */
static int contends(const struct mprpc_stint *s)
{
    return s->waited > s->held / 2 && s->long_runs * UINT64_C(50) <= s->requests &&
           s->bytes / s->requests < MPRPC_STINT_LARGE;
}

/* The leader has had a core of its own for five sixths of the time, and used it. */
static int has_no_time(const struct mprpc_stint *s, uint64_t processor, uint64_t now)
{
    return s->processor && processor > s->processor && (processor - s->processor) * 6 > (now - s->since) * 5;
}

/* ---- phases ---- */

static void enter(struct mprpc_placement *p, enum mprpc_phase phase, uint64_t now)
{
    p->phase = phase;
    p->votes = 0;
    p->at = phase == MPRPC_MEASURING_ONE ? now : 0;
    p->from = p->requests;
    atomic_store(&p->active, phase == MPRPC_SPREAD || phase == MPRPC_MEASURING_ALL ? p->loops : 1);
}

static void gather(struct mprpc_placement *p, uint64_t now)
{
    p->next = now + p->pause;
    enter(p, MPRPC_GATHERED, now);
}

/* Stays so for at least `stay` ns. */
static void spread(struct mprpc_placement *p, uint64_t now, uint64_t stay)
{
    p->pause = MPRPC_TRIAL_FIRST;
    p->next = now + stay;
    enter(p, MPRPC_SPREAD, now);
}

static uint64_t rate(const struct mprpc_placement *p, uint64_t now)
{
    return (p->requests - p->from) * UINT64_C(1000000000) / (now - p->at);
}

static void measure_one(struct mprpc_placement *p, uint64_t now)
{
    if (now - p->at < MPRPC_TRIAL_BASE)
        return;
    p->rate = rate(p, now);
    if (now - p->at < 2 * MPRPC_TRIAL_BASE)
        enter(p, MPRPC_MEASURING_ALL, p->next = now);
    else
        gather(p, now); /* the load has paused meanwhile */
}

static void measure_all(struct mprpc_placement *p, uint64_t now)
{
    if (!p->at && now - p->next >= MPRPC_TRIAL_SETTLE) {
        p->at = now;
        p->from = p->requests;
    } else if (p->at && now - p->at >= MPRPC_TRIAL) {
        if (now - p->at < 2 * MPRPC_TRIAL && rate(p, now) * 100 > p->rate * MPRPC_TRIAL_GAIN) {
            spread(p, now, MPRPC_TRIAL_LAST);
            return;
        }
        p->pause = p->pause * 2 < MPRPC_TRIAL_LAST ? p->pause * 2 : MPRPC_TRIAL_LAST;
        gather(p, now);
    }
}

static void decide(struct mprpc_placement *p, const struct mprpc_stint *s, uint64_t processor, uint64_t now)
{
    int against = p->phase == MPRPC_SPREAD ? contends(s) && now >= p->next : takes_long(s);

    p->votes = against ? p->votes + 1 : 0;
    if (p->votes >= MPRPC_PLACEMENT_SURE && p->phase == MPRPC_SPREAD)
        gather(p, now);
    else if (p->votes >= MPRPC_PLACEMENT_SURE)
        spread(p, now, 0);
    else if (p->phase == MPRPC_GATHERED && now >= p->next && has_no_time(s, processor, now))
        enter(p, MPRPC_MEASURING_ONE, now);
    else if (p->phase == MPRPC_MEASURING_ONE)
        measure_one(p, now);
    else if (p->phase == MPRPC_MEASURING_ALL)
        measure_all(p, now);
}

void mprpc_placement_tell(struct mprpc_placement *p, struct mprpc_stint *s, uint64_t now)
{
    int enough = s->requests >= MPRPC_STINT_MIN, old = now - s->since >= MPRPC_STINT_MAX;

    if (now - s->since < MPRPC_STINT || !(enough || old) || atomic_flag_test_and_set(&p->busy))
        return;
    uint64_t processor = processor_ns();
    p->requests += s->requests;
    if (enough && !old)
        decide(p, s, processor, now);
    atomic_flag_clear(&p->busy);
    *s = (struct mprpc_stint){.since = now, .processor = processor};
}
