/* crew MILLISECONDS COUNT SECONDS: COUNT loops without sockets, whose handlers are fast, slow, about as long as the
 * watcher's period, run as jobs, ask their loop for something, or wait for a call that their own loop serves. What a
 * leader owns is plain memory, so that the sanitizer sees two leaders. Every request must run once and be answered once,
 * and none may wait over SECONDS: with MPRPC_PLANT_STRANDED defined one does, which this program has to find. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "_crew.h"

enum {
    LOOPS_MAX = 3,
    THREADS = 6,
    QUEUED = 8,
    BATCH = 24,
    MEMBERS = LOOPS_MAX + THREADS + 1,
    CALLING = THREADS / 2, /* handlers that wait for their own loop at once: more would rightly use up the threads */
    REQUESTS = 4000000,
    PERIOD = 200000, /* ns */
};
enum { FAST, EDGE, SLOW, JOB, CALLS, ASKS };

#define MUST(what) ((what) ? (void)0 : fail(#what, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "crew.c:%d: does not hold: %s\n", line, what);
    _Exit(1);
}

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

static void nap(uint64_t ns)
{
    struct timespec t = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    nanosleep(&t, NULL);
}

static uint32_t chance(uint64_t *state, uint32_t bound)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (uint32_t)(*state >> 32) % bound;
}

/* ---- requests: what became of each ---- */

static _Atomic uint8_t ran[REQUESTS], answered[REQUESTS];
static _Atomic uint32_t requests, answers, jobs, refused, calling, stopped;
static _Atomic uint64_t until; /* no new requests after, where there were some of each kind */
static uint64_t patience;      /* ns */

static uint32_t new_request(void)
{
    uint32_t id = atomic_fetch_add(&requests, 1u);

    MUST(id < REQUESTS);
    return id;
}

static void answer(uint32_t id)
{
    MUST(atomic_fetch_add(&answered[id], 1) == 0);
    atomic_fetch_add(&answers, 1u);
}

/* ---- loops ---- */

struct request {
    uint32_t id, kind;
    int open; /* its leader answers it */
};

struct loop { /* its leader's */
    struct request requests[BATCH];
    uint32_t count, at;
    uint64_t random, asked;
    struct hand *running; /* whose handler runs */
    uint32_t replies[BATCH], reply_count;
    pthread_mutex_t mutex; /* of what follows */
    uint32_t posted[CALLING], posted_count;
};

struct hand { /* a thread */
    struct mprpc_member *member;
    pthread_t thread;
    int64_t parted; /* the request that it took along when it was relieved, -1: it does not know yet */
    uint64_t random;
    int leads;
};

static struct mprpc_crew *crew;
static struct loop loops[LOOPS_MAX];
static struct hand hands[MEMBERS * 2];
static _Atomic uint32_t hand_count;
static pthread_mutex_t parting = PTHREAD_MUTEX_INITIALIZER, queue_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t parted = PTHREAD_COND_INITIALIZER;
static uint32_t queue[QUEUED + THREADS], queued; /* jobs: also those for which a thread is on its way */

/* A handler that calls what its own loop serves. */
static void call_own(struct loop *l)
{
    uint32_t id = new_request();
    uint64_t begin = clock_ns();

    pthread_mutex_lock(&l->mutex);
    l->posted[l->posted_count++] = id;
    pthread_mutex_unlock(&l->mutex);
    while (!atomic_load(&answered[id])) {
        if (clock_ns() - begin > patience)
            fail("a batch is stranded behind a handler", __LINE__);
        nap(PERIOD / 4);
    }
    atomic_fetch_sub(&calling, 1u);
}

/* A handler that takes its loop back for a moment, again and again, until it has been relieved. */
static void ask_own(struct loop *l, struct hand *h)
{
    uint64_t begin = clock_ns();

    while (mprpc_leader_ends(h->member)) {
        l->asked++;
        mprpc_leader_goes_on(h->member);
        if (clock_ns() - begin > patience)
            fail("a batch is stranded behind a handler that asks", __LINE__);
        nap(PERIOD / 20);
    }
}

static void handle(struct loop *l, uint32_t id, uint32_t kind, struct hand *h)
{
    MUST(atomic_fetch_add(&ran[id], 1) == 0);
    if (kind == EDGE)
        nap(PERIOD / 2 + chance(&h->random, 3 * PERIOD));
    else if (kind == SLOW)
        nap(PERIOD * 10);
    else if (kind == ASKS)
        ask_own(l, h);
    else if (kind == CALLS)
        call_own(l);
}

static uint32_t any_kind(struct loop *l, int rested)
{
    uint32_t dice = rested ? 60 : chance(&l->random, 1000);
    uint32_t kind = dice < 10 ? EDGE : dice < 15 ? SLOW : dice < 60 ? JOB : dice < 65 ? CALLS : dice < 68 ? ASKS : FAST;

    if (kind == CALLS && atomic_fetch_add(&calling, 1u) >= CALLING) {
        atomic_fetch_sub(&calling, 1u);
        kind = FAST;
    }
    return kind;
}

/* Answers the last batch, brings the next. 0: it has stopped. */
static int turn(struct loop *l)
{
    for (uint32_t i = 0; i < l->reply_count; i++)
        answer(l->replies[i]);
    l->reply_count = l->at = l->count = 0;
    int rested = chance(&l->random, 50) == 0;
    if (rested) /* nobody calls: the watcher goes to sleep, perhaps just now */
        nap(PERIOD * MPRPC_CREW_QUIET + chance(&l->random, PERIOD * MPRPC_CREW_QUIET));
    pthread_mutex_lock(&l->mutex);
    while (l->posted_count)
        l->requests[l->count++] = (struct request){l->posted[--l->posted_count], FAST, 1};
    pthread_mutex_unlock(&l->mutex);
    if (clock_ns() >= atomic_load(&until) && atomic_load(&refused)) {
        nap(PERIOD / 10);
        return l->count || atomic_load(&answers) < atomic_load(&requests);
    }
    for (uint32_t more = chance(&l->random, 4) ? 1 : chance(&l->random, BATCH); more && l->count < BATCH; more--)
        l->requests[l->count++] = (struct request){new_request(), any_kind(l, rested), 1};
    return 1;
}

static void send_for_a_thread(uint32_t id)
{
    pthread_mutex_lock(&queue_mutex);
    int full = mprpc_crew_queue(crew) < 0;
    if (!full)
        queue[queued++] = id; /* nobody takes it before the mutex is free */
    pthread_mutex_unlock(&queue_mutex);
    atomic_fetch_add(full ? &refused : &jobs, 1u);
    if (full)
        answer(id);
}

static void do_job(struct hand *h)
{
    pthread_mutex_lock(&queue_mutex);
    MUST(queued > 0);
    uint32_t id = queue[--queued];
    pthread_mutex_unlock(&queue_mutex);
    handle(NULL, id, chance(&h->random, 2) ? SLOW : EDGE, h);
    answer(id);
}

/* After it was relieved: the one request that is still its own. */
static void end_alone(struct hand *h)
{
    pthread_mutex_lock(&parting);
    while (h->parted < 0)
        pthread_cond_wait(&parted, &parting);
    uint32_t id = (uint32_t)h->parted;
    h->parted = -1;
    pthread_mutex_unlock(&parting);
    answer(id);
}

/* A leader who relieved another goes on behind the request that runs. */
static void take_over(struct loop *l)
{
    if (!l->running)
        return;
    l->requests[l->at].open = 0;
    pthread_mutex_lock(&parting);
    l->running->parted = l->requests[l->at].id;
    pthread_cond_broadcast(&parted);
    pthread_mutex_unlock(&parting);
    l->at++;
}

/* 1: its batch is done; 0: it was relieved. */
static int serve_batch(struct loop *l, struct hand *h)
{
    for (; l->at < l->count; l->at++) {
        struct request *q = &l->requests[l->at];
        uint32_t id = q->id, kind = q->kind;
        MUST(q->open);
        q->open = 0;
        if (kind == JOB) {
            send_for_a_thread(id);
            continue;
        }
        l->running = h;
        mprpc_leader_begins(h->member);
        handle(l, id, kind, h);
        if (!mprpc_leader_ends(h->member))
            return 0;
        l->running = NULL;
        l->replies[l->reply_count++] = id;
    }
    mprpc_leader_rests(h->member);
    return 1;
}

static void lead(struct loop *l, struct hand *h)
{
    take_over(l);
    while (serve_batch(l, h))
        if (!turn(l)) {
            atomic_fetch_add(&stopped, 1u);
            return;
        }
    end_alone(h);
}

static void start(int leads);

static void *serve(void *hand)
{
    struct hand *h = hand;
    int work, wanted;

    MUST((h->member = mprpc_member_new(crew)) != NULL);
    if (h->leads >= 0) {
        mprpc_crew_lead(h->member, (uint32_t)h->leads);
        lead(&loops[h->leads], h);
    }
    while ((work = mprpc_crew_stand_by(h->member, &wanted)) != MPRPC_CREW_STOP) {
        if (work != MPRPC_CREW_JOB && chance(&h->random, 4) == 0)
            nap(PERIOD); /* it waits for what the handler may wait for, too */
        int leads = work != MPRPC_CREW_JOB && mprpc_crew_relieve(h->member, &wanted);
        if (wanted)
            start(-1);
        if (work == MPRPC_CREW_JOB)
            do_job(h);
        else if (leads)
            lead(&loops[work], h);
    }
    return NULL;
}

static void start(int leads)
{
    uint32_t i = atomic_fetch_add(&hand_count, 1u);

    MUST(i < MEMBERS);
    hands[i].random = 88172645463325252u + i;
    hands[i].leads = leads;
    hands[i].parted = -1;
    MUST(pthread_create(&hands[i].thread, NULL, serve, &hands[i]) == 0);
}

int main(int argc, char **argv)
{
    MUST(argc == 4);
    uint64_t ms = strtoull(argv[1], NULL, 10);
    uint32_t count = (uint32_t)strtoul(argv[2], NULL, 10);
    patience = strtoull(argv[3], NULL, 10) * 1000000000;
    struct mprpc_crew_statistics s;

    MUST(count > 0 && count <= LOOPS_MAX);
    MUST((crew = mprpc_crew_new(count, THREADS, QUEUED, PERIOD)) != NULL);
    atomic_store(&until, clock_ns() + ms * 1000000);
    for (uint32_t i = 0; i < count; i++) {
        pthread_mutex_init(&loops[i].mutex, NULL);
        loops[i].random = 1181783497276652981u * (i + 1);
        start((int)i);
    }
    start(-1);
    uint64_t end = atomic_load(&until) + 2 * patience;
    while (atomic_load(&stopped) < count) {
        if (clock_ns() > end)
            fail("a batch is stranded", __LINE__);
        nap(PERIOD);
    }
    mprpc_crew_stop(crew);
    count = atomic_load(&hand_count);
    for (uint32_t i = 0; i < count; i++) {
        pthread_join(hands[i].thread, NULL);
        mprpc_member_free(hands[i].member);
    }
    mprpc_crew_statistics(crew, &s);
    MUST(s.standing == 0 && s.busy == 0 && s.queued == 0 && s.members <= MEMBERS);
    MUST(mprpc_crew_queue(crew) < 0);
    mprpc_crew_free(crew);
    for (uint32_t i = 0; i < atomic_load(&requests); i++)
        MUST(answered[i] == 1);
    printf("requests %u, relieved %llu, jobs %u, refused %u\n", atomic_load(&requests), (unsigned long long)s.relieved,
           atomic_load(&jobs), atomic_load(&refused));
    return 0;
}
