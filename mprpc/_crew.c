/* Strategy: a seat holds one number. A leader writes a new one before each handler, and after it changes the number that
 * it left there: only if nobody else has, it still leads. The watcher, one of those who stand by, looks at all seats
 * every period, without the interpreter's lock; a number that it sees twice is a handler that takes long. Then it changes
 * that number itself: now it leads, and the thread that comes back from the handler finds another number. So no clock is
 * read for a fast handler. When no batch runs the watcher sleeps until one begins; when it leaves, another one watches.
 *
 * A handler may stand still only because another thread has the interpreter's lock, or its core. To relieve its leader
 * would help nobody then: who comes had to wait for the same. So the watcher first gets what it needs to lead, and if
 * that took long itself, it waits until it is sure.
 *
 * Numbers only grow, and each is used once: what was true of one when it was seen is true of no other. */
#define _GNU_SOURCE
#include "_crew.h"
#include "_fork.h"

#include <pthread.h>
#include <stdlib.h>
#include <time.h>

/* A seat's number: a count of runs, and what is going on. */
enum {
    RUNNING = 1, /* a handler */
    BATCH = 2,   /* between the first handler of a batch and the last one's end */
    STEP = 4,
};

/* One loop's. Whoever finds here the number that it wrote leads the loop. */
struct seat {
    _Alignas(64) _Atomic uint64_t run;
    struct mprpc_member *leader; /* what follows is under the crew's mutex */
    uint64_t seen, since;        /* the number at the last look, and when it was seen first */
    uint64_t asked, tried;       /* the last number that somebody came for, and how long it had been there, ns */
    int suspected;               /* somebody is on the way to relieve its leader */
};

struct mprpc_member {
    struct mprpc_crew *crew;
    struct seat *seat; /* which it leads, also while it does not know yet that it was relieved */
    uint64_t run;      /* the number that it left there */
    uint32_t suspects; /* the seat that it was sent for */
    uint64_t looked;   /* when */
    pthread_cond_t called;   /* what follows is under the crew's mutex */
    struct mprpc_member *below; /* in the stack of those who wait */
    int waits;
    int busy; /* with a job, or relieved */
};

struct mprpc_crew {
    _Alignas(64) _Atomic int asleep; /* the watcher: who begins a batch calls it */
    _Alignas(64) pthread_mutex_t mutex; /* of all that follows */
    struct mprpc_member *waiting, *watcher;
    uint64_t look; /* when the seats were looked at last */
    uint64_t period, relieved;
    uint32_t seats, threads, queued_max, members, standing, busy, queued, quiet;
    int stopped;
    unsigned born; /* mprpc_forks then */
    struct seat seat[];
};

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

/* In a forked child: none of the threads is there, and one of them may have had the mutex. */
static int is_parents(const struct mprpc_crew *c)
{
    return c->born != mprpc_forks;
}

/* ---- the leader ---- */

static void call(struct mprpc_crew *c, struct mprpc_member *m)
{
    if (m->waits) {
        struct mprpc_member **at = &c->waiting;
        while (*at != m)
            at = &(*at)->below;
        *at = m->below;
        m->waits = 0;
    }
    pthread_cond_signal(&m->called);
}

static void wake_watcher(struct mprpc_crew *c)
{
    if (is_parents(c))
        return;
    pthread_mutex_lock(&c->mutex);
    atomic_store(&c->asleep, 0);
    if (c->watcher)
        call(c, c->watcher);
    pthread_mutex_unlock(&c->mutex);
}

void mprpc_leader_begins(struct mprpc_member *m)
{
    int first = !(m->run & BATCH);

    m->run = (m->run + STEP) | BATCH;
    if (!first) {
        atomic_store_explicit(&m->seat->run, m->run | RUNNING, memory_order_release);
        return;
    }
    /* In one order with the watcher, who says that it sleeps and then looks once more. */
    atomic_store(&m->seat->run, m->run | RUNNING);
    if (atomic_load(&m->crew->asleep))
        wake_watcher(m->crew);
}

int mprpc_leader_ends(struct mprpc_member *m)
{
    uint64_t expected = m->run | RUNNING;

    return atomic_compare_exchange_strong(&m->seat->run, &expected, m->run);
}

void mprpc_leader_goes_on(struct mprpc_member *m)
{
    atomic_store_explicit(&m->seat->run, m->run | RUNNING, memory_order_release);
}

void mprpc_leader_rests(struct mprpc_member *m)
{
    m->run &= ~(uint64_t)BATCH;
    atomic_store_explicit(&m->seat->run, m->run, memory_order_release);
}

/* ---- the watcher ---- */

/* Whether a batch is under way anywhere. */
static int batches(struct mprpc_crew *c)
{
    for (uint32_t i = 0; i < c->seats; i++)
        if (atomic_load(&c->seat[i].run) & (BATCH | RUNNING))
            return 1;
    return 0;
}

/* Looks at all seats: one whose leader may have to be relieved, or -1. */
static int look(struct mprpc_crew *c, struct mprpc_member *m)
{
    uint64_t now = clock_ns();
    int found = -1;

    c->look = now;
    for (uint32_t i = 0; i < c->seats && found < 0; i++) {
        struct seat *s = &c->seat[i];
        uint64_t run = atomic_load(&s->run), number = run & ~(uint64_t)RUNNING;
        if (number != s->seen) {
            s->seen = number;
            s->since = now;
            s->tried = 0;
        } else if (run & RUNNING && !s->suspected && c->busy < c->threads && now - s->since >= 3 * s->tried) {
            s->asked = number;
            s->tried = now - s->since;
            s->suspected = 1;
            m->suspects = i;
            m->looked = now;
            found = (int)i;
        }
    }
    return found;
}

static void wait_until(struct mprpc_crew *c, struct mprpc_member *m, uint64_t until)
{
#ifdef __APPLE__
    uint64_t now = clock_ns(), left = until > now ? until - now : 0;
    struct timespec t = {(time_t)(left / 1000000000), (long)(left % 1000000000)};
    pthread_cond_timedwait_relative_np(&m->called, &c->mutex, &t);
#else
    struct timespec t = {(time_t)(until / 1000000000), (long)(until % 1000000000)};
    pthread_cond_timedwait(&m->called, &c->mutex, &t);
#endif
}

/* With nothing to watch for some periods: says so, looks once more, and sleeps until a batch begins. */
static void sleep_until_called(struct mprpc_crew *c, struct mprpc_member *m)
{
#ifdef MPRPC_PLANT_STRANDED /* for the tests, which must find it: looks only before it says that it sleeps */
    if (batches(c))
        return;
    wait_until(c, m, clock_ns() + c->period);
    atomic_store(&c->asleep, 1);
#else
    atomic_store(&c->asleep, 1);
    if (batches(c)) {
        atomic_store(&c->asleep, 0);
        return;
    }
#endif
    pthread_cond_wait(&m->called, &c->mutex);
    atomic_store(&c->asleep, 0);
}

/* Waits a while, and then looks, if it is time: a seat, or -1. */
static int watch(struct mprpc_crew *c, struct mprpc_member *m)
{
    if (c->quiet >= MPRPC_CREW_QUIET) {
        c->quiet = 0;
        sleep_until_called(c, m);
        return -1;
    }
    wait_until(c, m, c->look + c->period);
    if (clock_ns() < c->look + c->period)
        return -1;
    c->quiet = batches(c) ? 0 : c->quiet + 1;
    return look(c, m);
}

/* ---- standing by ---- */

static void wait(struct mprpc_crew *c, struct mprpc_member *m)
{
    m->below = c->waiting;
    c->waiting = m;
    m->waits = 1;
    while (m->waits)
        pthread_cond_wait(&m->called, &c->mutex);
}

static int find_work(struct mprpc_crew *c, struct mprpc_member *m)
{
    for (;;) {
        if (c->stopped)
            return MPRPC_CREW_STOP;
        if (c->queued && c->busy < c->threads) {
            c->queued--;
            c->busy++;
            m->busy = 1;
            return MPRPC_CREW_JOB;
        }
        if (!c->watcher) {
            c->watcher = m;
            c->quiet = 0;
        }
        if (c->watcher != m) {
            wait(c, m);
            continue;
        }
        int found = watch(c, m);
        if (found >= 0)
            return found;
    }
}

/* One thread more than there is work for, so that a surprise finds somebody. */
static int want_another(struct mprpc_crew *c)
{
    int want = !c->standing && !c->stopped && c->members < c->seats + c->threads + 1;

    c->members += (uint32_t)want;
    return want;
}

int mprpc_crew_stand_by(struct mprpc_member *m, int *wanted)
{
    struct mprpc_crew *c = m->crew;

    *wanted = 0;
    if (is_parents(c))
        return MPRPC_CREW_STOP; /* a handler has forked, and this is the child */
    pthread_mutex_lock(&c->mutex);
    c->busy -= (uint32_t)m->busy;
    m->busy = 0;
    if (m->seat && m->seat->leader == m) /* its loop has stopped */
        m->seat->leader = NULL;
    m->seat = NULL;
    c->standing++;
    int work = find_work(c, m);
    c->standing--;
    if (c->watcher == m) {
        c->watcher = NULL;
        if (c->waiting)
            call(c, c->waiting);
    }
    *wanted = work == MPRPC_CREW_JOB && want_another(c);
    pthread_mutex_unlock(&c->mutex);
    return work;
}

/* Gives a seat to m. */
static void seat(struct mprpc_crew *c, struct seat *s, struct mprpc_member *m, uint64_t run)
{
    if (s->leader) {
        s->leader->busy = 1;
        c->busy++;
        c->relieved++;
    }
    s->leader = m;
    m->seat = s;
    m->run = run;
}

int mprpc_crew_relieve(struct mprpc_member *m, int *wanted)
{
    struct mprpc_crew *c = m->crew;
    struct seat *s = &c->seat[m->suspects];

    pthread_mutex_lock(&c->mutex);
    uint64_t now = clock_ns(), expected = s->seen | RUNNING;
    int sure = now - m->looked < c->period / 2 || now - s->since >= MPRPC_CREW_SURE * c->period;
    s->suspected = 0;
    int leads = sure && s->seen == s->asked && c->busy < c->threads &&
                atomic_compare_exchange_strong(&s->run, &expected, s->seen + STEP); /* else it has ended */
    if (leads)
        seat(c, s, m, s->seen + STEP);
    *wanted = leads && want_another(c);
    pthread_mutex_unlock(&c->mutex);
    return leads;
}

int mprpc_crew_queue(struct mprpc_crew *c)
{
    if (is_parents(c))
        return -1;
    pthread_mutex_lock(&c->mutex);
    int full = c->stopped || c->queued >= c->queued_max;
    if (!full) {
        c->queued++;
        struct mprpc_member *m = c->waiting ? c->waiting : c->watcher;
        if (m && c->busy < c->threads) /* else who comes back from a job takes it */
            call(c, m);
    }
    pthread_mutex_unlock(&c->mutex);
    return full ? -1 : 0;
}

/* ---- birth and death ---- */

void mprpc_crew_lead(struct mprpc_member *m, uint32_t i)
{
    struct mprpc_crew *c = m->crew;

    pthread_mutex_lock(&c->mutex);
    seat(c, &c->seat[i], m, atomic_load(&c->seat[i].run));
    pthread_mutex_unlock(&c->mutex);
}

void mprpc_crew_unwanted(struct mprpc_crew *c)
{
    pthread_mutex_lock(&c->mutex);
    c->members--;
    pthread_mutex_unlock(&c->mutex);
}

void mprpc_crew_stop(struct mprpc_crew *c)
{
    if (is_parents(c))
        return;
    pthread_mutex_lock(&c->mutex);
    c->stopped = 1;
    while (c->waiting)
        call(c, c->waiting);
    if (c->watcher)
        call(c, c->watcher);
    pthread_mutex_unlock(&c->mutex);
}

void mprpc_crew_statistics(struct mprpc_crew *c, struct mprpc_crew_statistics *to)
{
    *to = (struct mprpc_crew_statistics){0};
    if (is_parents(c))
        return;
    pthread_mutex_lock(&c->mutex);
    *to = (struct mprpc_crew_statistics){c->members, c->standing, c->busy, c->queued, c->relieved};
    pthread_mutex_unlock(&c->mutex);
}

struct mprpc_crew *mprpc_crew_new(uint32_t seats, uint32_t threads, uint32_t queued_max, uint64_t period)
{
    struct mprpc_crew *c;
    void *at;

    if (posix_memalign(&at, 64, sizeof *c + seats * sizeof c->seat[0]))
        return NULL;
    c = at;
    *c = (struct mprpc_crew){.period = period, .seats = seats, .threads = threads, .queued_max = queued_max,
                             .members = seats + 1, .born = mprpc_forks};
    for (uint32_t i = 0; i < seats; i++)
        c->seat[i] = (struct seat){0};
    pthread_mutex_init(&c->mutex, NULL);
    return c;
}

void mprpc_crew_free(struct mprpc_crew *c)
{
    if (!is_parents(c))
        pthread_mutex_destroy(&c->mutex);
    free(c);
}

struct mprpc_member *mprpc_member_new(struct mprpc_crew *c)
{
    struct mprpc_member *m = calloc(1, sizeof *m);
    pthread_condattr_t monotonic;

    if (!m)
        return NULL;
    m->crew = c;
    pthread_condattr_init(&monotonic);
#ifndef __APPLE__
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
#endif
    pthread_cond_init(&m->called, &monotonic);
    pthread_condattr_destroy(&monotonic);
    return m;
}

void mprpc_member_free(struct mprpc_member *m)
{
    pthread_cond_destroy(&m->called);
    free(m);
}
