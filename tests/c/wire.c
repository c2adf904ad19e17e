/* wire: a loop and links within one process, for the sanitizers: threads call through links that other threads close,
 * over connections that the loop's end may close first. Every call ends once, and an answer is its own question's. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "_link.h"
#include "_loop.h"

#define MUST(what) ((what) ? (void)0 : fail(#what, __LINE__))

enum { CALLERS = 4, CALLS = 400, ROUNDS = 4, PAYLOAD_MAX = 1 << 20 };
static const uint64_t PATIENCE = UINT64_C(20000000000);
static _Atomic uint64_t answered, refused;

static void fail(const char *what, int line)
{
    fprintf(stderr, "wire.c:%d: does not hold: %s (errno %d)\n", line, what, errno);
    abort();
}

/* Answers each request with its own arguments. */
static void *serve(void *loop)
{
    struct mprpc_loop *l = loop;
    uint8_t *replies = malloc(mprpc_loop_room());
    int32_t sizes[MPRPC_BATCH_MAX];
    size_t size = 0, count = 0;
    int64_t told;

    MUST(replies != NULL);
    while ((told = mprpc_loop_turn(l, replies, size, sizes, count)) >= 0) {
        const struct mprpc_record *records = mprpc_loop_records(l);
        struct mprpc_incident incidents[MPRPC_INCIDENTS_MAX];
        struct mprpc_ticket cancelled[8];
        uint64_t more;
        if (told & MPRPC_TURN_SLOW) { /* a loop with news does not stop */
            mprpc_loop_incidents(l, incidents, &more);
            while (mprpc_loop_cancelled(l, cancelled, 8) == 8)
                continue;
        }
        size = 0;
        count = (size_t)(told & MPRPC_TURN_COUNT);
        for (size_t i = 0; i < count; i++) {
            const uint8_t *large = mprpc_loop_large(l, (uint32_t)i);
            sizes[i] = (int32_t)records[i].size;
            memcpy(replies + size, large ? large : mprpc_loop_bytes(l) + records[i].offset, records[i].size);
            size += records[i].size;
        }
    }
    free(replies);
    return NULL;
}

struct caller {
    struct mprpc_link *link;
    const uint8_t *names;
    size_t names_size;
    unsigned seed;
};

static void *call(void *caller)
{
    struct caller *who = caller;
    static const size_t sizes[] = {8, 100, 5000, 8, 100, 5000, 8, 70000};
    uint8_t *payload = malloc(70000), small[MPRPC_CALL_SMALL];

    MUST(payload != NULL);
    memset(payload, 7, 70000);
    for (uint64_t i = 0; i < CALLS; i++) {
        struct mprpc_call c = {.small = small};
        uint64_t mark = (uint64_t)who->seed << 32 | i;
        size_t size = sizes[(i + who->seed) % 8];
        memcpy(payload, &mark, sizeof mark);
        int64_t got = mprpc_link_call(who->link, &c, who->names, who->names_size, payload, size, PATIENCE, 0, NULL);
        while (got == MPRPC_CALL_INTERRUPTED)
            got = mprpc_link_wait(who->link, &c);
        MUST(got != MPRPC_CALL_TIMEOUT);
        if (got >= 0) {
            MUST((size_t)got == size && memcmp(size > MPRPC_CALL_SMALL ? c.large : small, payload, size) == 0);
            atomic_fetch_add(&answered, 1u);
        } else {
            atomic_fetch_add(&refused, 1u);
        }
        mprpc_call_clear(&c);
    }
    free(payload);
    return NULL;
}

static void round_of_calls(struct mprpc_loop *l, const uint8_t *names, size_t names_size, int cut)
{
    struct mprpc_wire *ends[2];
    struct mprpc_link *link;
    struct caller callers[CALLERS];
    pthread_t threads[CALLERS];
    uint64_t before = atomic_load(&answered);

    MUST(mprpc_wire_pair(ends) == 0);
    MUST(mprpc_loop_adopt(l, ends[0]) == 0);
    MUST((link = mprpc_link_new_within(ends[1], PAYLOAD_MAX)) != NULL);
    for (unsigned i = 0; i < CALLERS; i++) {
        callers[i] = (struct caller){link, names, names_size, i};
        MUST(pthread_create(&threads[i], NULL, call, &callers[i]) == 0);
    }
    while (cut && atomic_load(&answered) < before + CALLS)
        MUST(mprpc_link_check(link) <= 0);
    if (cut)
        mprpc_link_close(link);
    for (unsigned i = 0; i < CALLERS; i++)
        pthread_join(threads[i], NULL);
    mprpc_link_free(link);
}

int main(void)
{
    struct mprpc_limits limits = {.frame_timeout = PATIENCE, .payload_max = PAYLOAD_MAX, .output_max = 1 << 20,
                                  .connections_max = 2};
    struct mprpc_services *services = mprpc_services_new();
    uint8_t names[64];
    size_t names_size = mprpc_put_names(names, (const uint8_t *)"S", 1, (const uint8_t *)"M", 1);
    pthread_t server;

    MUST(services && mprpc_services_add(services, (const uint8_t *)"S", 1, (const uint8_t *)"M", 1, 0) == 0);
    struct mprpc_loop *l = mprpc_loop_new(services, &limits, 0);
    MUST(l && pthread_create(&server, NULL, serve, l) == 0);
    for (int i = 0; i < ROUNDS; i++)
        round_of_calls(l, names, names_size, i % 2);
    mprpc_loop_stop(l, 0, 0);
    pthread_join(server, NULL);
    struct mprpc_wire *ends[2];
    MUST(mprpc_wire_pair(ends) == 0);
    MUST(mprpc_loop_adopt(l, ends[0]) == 0); /* a loop that has stopped refuses it: its other side hears the end */
    uint8_t byte;
    MUST(mprpc_wire_receive(ends[1], &byte, 1) == 0);
    mprpc_wire_close(ends[1]);
    mprpc_loop_free(l);
    mprpc_services_free(services);
    MUST(atomic_load(&answered) + atomic_load(&refused) == (uint64_t)CALLERS * CALLS * ROUNDS);
    printf("answered %llu, refused %llu\n", (unsigned long long)answered, (unsigned long long)refused);
    return 0;
}
