/* mailbox: stories of calls that nobody waits for, each driven step by step, and then a crowd of them beside callers that
 * do wait, for the sanitizers. The other side of a connection is a thread that speaks by the codec alone. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "_link.h"

#define MUST(what) ((what) ? (void)0 : fail(#what, __LINE__))

static const uint64_t SECOND = 1000000000, PATIENCE = UINT64_C(20000000000);

enum { ECHO, SILENT, PAYLOAD_MAX = 1 << 20, KEY = 8, HEAD = 9 }; /* a payload: 8 bytes of its own, and what to do */

static void fail(const char *what, int line)
{
    fprintf(stderr, "mailbox.c:%d: does not hold: %s (errno %d)\n", line, what, errno);
    abort();
}

static void nap(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

/* ---- the other side ---- */

struct peer {
    struct mprpc_link *link; /* ours */
    int fd;                  /* its */
    pthread_t thread;
    _Atomic uint64_t requests, cancels;
};

static void answer(struct peer *p, const struct mprpc_frame *f, uint8_t *reply)
{
    struct mprpc_reply r = {.call_id = f->call_id, .kind = MPRPC_RESPONSE, .payload_size = f->payload_size};
    size_t n = mprpc_put_reply(reply, &r);

    memcpy(reply + n, f->payload, f->payload_size);
    n += f->payload_size;
    for (size_t sent = 0; sent < n;) {
        ssize_t k = send(p->fd, reply + sent, n - sent, MSG_NOSIGNAL);
        if (k < 0 && errno != EINTR)
            return; /* we are gone */
        sent += k > 0 ? (size_t)k : 0;
    }
}

static void *converse(void *peer)
{
    struct peer *p = peer;
    struct mprpc_bytes in = {0};
    uint8_t *reply = malloc(MPRPC_REPLY_ROOM + PAYLOAD_MAX);
    ssize_t n = 1;

    MUST(reply != NULL);
    while (n > 0) {
        struct mprpc_frame f;
        size_t count, at = 0;
        uint64_t need;
        int64_t used;
        MUST(mprpc_bytes_reserve(&in, 65536) == 0);
        n = recv(p->fd, in.at + in.size, in.room - in.size, 0);
        in.size += n > 0 ? (size_t)n : 0;
        while ((used = mprpc_split(in.at + at, in.size - at, PAYLOAD_MAX, &f, 1, &count, &need)) > 0) {
            at += (size_t)used;
            atomic_fetch_add(f.kind == MPRPC_CANCEL ? &p->cancels : &p->requests, 1u);
            if (f.kind == MPRPC_REQUEST && f.payload_size >= HEAD && f.payload[KEY] == ECHO)
                answer(p, &f, reply);
        }
        MUST(used == 0);
        memmove(in.at, in.at + at, in.size - at);
        in.size -= at;
    }
    mprpc_bytes_free(&in);
    free(reply);
    return NULL;
}

static struct peer *meet(struct mprpc_mailbox *box)
{
    struct peer *p = calloc(1, sizeof *p);
    int ends[2];

    MUST(p && socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    p->fd = ends[1];
    MUST((p->link = mprpc_link_new(ends[0], PAYLOAD_MAX)) != NULL);
    mprpc_link_attach(p->link, box, 0);
    MUST(pthread_create(&p->thread, NULL, converse, p) == 0);
    return p;
}

static void leave(struct peer *p)
{
    mprpc_link_close(p->link);
    mprpc_link_free(p->link);
    pthread_join(p->thread, NULL);
    close(p->fd);
    free(p);
}

static void reaches(_Atomic uint64_t *counter, uint64_t count)
{
    for (int i = 0; atomic_load(counter) < count; i++) {
        MUST(i < 20000);
        nap(1);
    }
}

/* ---- calls ---- */

static size_t names(uint8_t *to)
{
    return mprpc_put_names(to, (const uint8_t *)"S", 1, (const uint8_t *)"M", 1);
}

/* As futures do it: not waiting for who is on the connection, unless it has to, and writing when it is told to. */
static int64_t post(struct mprpc_link *k, const struct mprpc_letter *l)
{
    int due;
    int64_t id = mprpc_link_post(k, l, 0, &due);

    if (id == MPRPC_CALL_BUSY)
        id = mprpc_link_post(k, l, 1, &due);
    if (due)
        mprpc_link_push(k);
    return id;
}

static int64_t submit(struct mprpc_link *k, uint64_t token, uint8_t what, size_t size, uint64_t timeout)
{
    uint8_t head[16], *payload = calloc(1, HEAD + size);
    int64_t reason;

    MUST(payload != NULL);
    memcpy(payload, &token, KEY);
    payload[KEY] = what;
    struct mprpc_letter l = {token, head, names(head), payload, HEAD + size, timeout, 0};
    int64_t id = token % 2 ? post(k, &l)
                           : mprpc_link_submit(k, token, head, l.names_size, payload, l.size, timeout, 0, 1, &reason);
    free(payload);
    return id;
}

struct caller {
    struct mprpc_link *link;
    uint64_t timeout;
    int64_t outcome;
    uint8_t what;
    pthread_t thread;
};

static void *call(void *caller)
{
    struct caller *c = caller;
    struct mprpc_call *made = calloc(1, sizeof *made);
    uint8_t head[16], payload[HEAD] = {0};

    MUST(made && (made->small = malloc(MPRPC_CALL_SMALL)));
    payload[KEY] = c->what;
    c->outcome = mprpc_link_call(c->link, made, head, names(head), payload, HEAD, c->timeout, 0, NULL);
    mprpc_call_clear(made);
    free(made->small);
    free(made);
    return NULL;
}

static void start(struct caller *c, struct mprpc_link *k, uint8_t what, uint64_t timeout)
{
    *c = (struct caller){.link = k, .what = what, .timeout = timeout};
    MUST(pthread_create(&c->thread, NULL, call, c) == 0);
}

/* Waits for so much mail, which must all have that outcome. The time it took, ns. */
static uint64_t expect_mail(struct mprpc_mailbox *box, size_t count, int64_t outcome)
{
    uint64_t begin = mprpc_clock();
    struct mprpc_mail *mail;
    uint8_t *bytes;
    size_t size, seen = 0;

    while (seen < count) {
        MUST(mprpc_clock() - begin < PATIENCE);
        mprpc_mailbox_wait(box, SECOND);
        size_t there = mprpc_mailbox_take(box, &mail, &bytes, &size);
        for (size_t i = 0; i < there; i++)
            MUST(mail[i].outcome == outcome);
        seen += there;
    }
    MUST(seen == count);
    return mprpc_clock() - begin;
}

/* ---- stories ---- */

/* Submitted and cancelled before the mailbox's thread had looked: it held the reading for ever, and every caller after it
 * waited in vain for somebody to read. */
static void a_cancelled_call_gives_the_reading_back(void)
{
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    struct peer *p = meet(box);
    struct caller after;

    int64_t id = submit(p->link, 1, SILENT, 0, PATIENCE);
    MUST(id > 0 && mprpc_link_cancel(p->link, (uint64_t)id) == 1);
    MUST(mprpc_link_cancel(p->link, (uint64_t)id) == 0);
    start(&after, p->link, ECHO, 2 * SECOND);
    pthread_join(after.thread, NULL);
    MUST(after.outcome == HEAD);
    MUST(mprpc_mailbox_wait(box, 0) == 0); /* no mail for what was cancelled */
    leave(p);
    mprpc_mailbox_free(box);
}

/* Whoever posts with another lock held must not wait for one who is on the connection. */
static void posting_waits_for_nobody(void)
{
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    struct peer *p = meet(box);
    uint8_t head[16], payload[HEAD] = {0};
    struct mprpc_letter l = {1, head, names(head), payload, HEAD, PATIENCE, 0};
    int due = 1;

    payload[KEY] = ECHO;
    pthread_mutex_lock(&p->link->mutex);
    MUST(mprpc_link_post(p->link, &l, 0, &due) == MPRPC_CALL_BUSY && due == 0);
    pthread_mutex_unlock(&p->link->mutex);
    MUST(mprpc_link_post(p->link, &l, 0, &due) > 0 && due == 1); /* nothing is in flight whose answer would bring it along */
    l.token = 2;
    MUST(mprpc_link_post(p->link, &l, 0, &due) > 0 && due == 0);
    mprpc_link_push(p->link);
    expect_mail(box, 2, HEAD);
    mprpc_link_close(p->link);
    MUST(mprpc_link_post(p->link, &l, 0, &due) == MPRPC_CALL_BROKEN && due == 0);
    mprpc_link_push(p->link);
    leave(p);
    mprpc_mailbox_free(box);
}

/* A caller sat in recv: the frame of a call that was submitted meanwhile waited in the output until the keeper came by. */
static void a_submitted_call_is_written_while_a_caller_reads(void)
{
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    struct peer *p = meet(box);
    struct caller reader;
    uint64_t longest = 0;

    start(&reader, p->link, SILENT, PATIENCE);
    reaches(&p->requests, 1);
    for (uint64_t i = 0; i < 20; i++) {
        MUST(submit(p->link, i, ECHO, 0, PATIENCE) > 0);
        uint64_t took = expect_mail(box, 1, HEAD);
        longest = took > longest ? took : longest;
    }
    MUST(longest < SECOND / 10);
    mprpc_link_close(p->link);
    pthread_join(reader.thread, NULL);
    leave(p);
    mprpc_mailbox_free(box);
}

/* Its deadline was not looked at before that caller had its answer. */
static void a_submitted_call_expires_while_a_caller_reads(void)
{
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    struct peer *p = meet(box);
    struct caller reader;

    start(&reader, p->link, SILENT, PATIENCE);
    reaches(&p->requests, 1);
    MUST(submit(p->link, 1, SILENT, 0, SECOND / 20) > 0);
    MUST(expect_mail(box, 1, MPRPC_CALL_TIMEOUT) < SECOND);
    mprpc_link_close(p->link);
    pthread_join(reader.thread, NULL);
    leave(p);
    mprpc_mailbox_free(box);
}

static void *wait_for_one(void *box)
{
    expect_mail(box, 1, MPRPC_CALL_TIMEOUT);
    return NULL;
}

/* The mailbox's thread slept to the first call's deadline; a call with a nearer one has to wake it. */
static void a_nearer_deadline_is_kept(void)
{
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    struct peer *p = meet(box);
    pthread_t waiter;

    MUST(submit(p->link, 1, SILENT, 0, PATIENCE) > 0);
    MUST(pthread_create(&waiter, NULL, wait_for_one, box) == 0);
    reaches(&p->requests, 1);
    nap(20); /* it sleeps */
    uint64_t begin = mprpc_clock();
    MUST(submit(p->link, 2, SILENT, 0, SECOND / 20) > 0);
    pthread_join(waiter, NULL);
    MUST(mprpc_clock() - begin < SECOND / 2);
    leave(p);
    mprpc_mailbox_free(box);
}

/* A wake-up that comes before the wait, or between two, ends the next one. */
static void a_wake_up_is_not_lost(void)
{
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    struct peer *p = meet(box);

    MUST(submit(p->link, 1, SILENT, 0, PATIENCE) > 0);
    for (int i = 0; i < 3; i++) {
        uint64_t begin = mprpc_clock();
        mprpc_mailbox_wake(box);
        MUST(mprpc_mailbox_wait(box, PATIENCE) == 0 && mprpc_clock() - begin < SECOND);
    }
    leave(p);
    mprpc_mailbox_free(box);
}

/* Two connections that die at once bring all their mail, for which room was set aside. */
static void death_brings_mail_for_every_call(void)
{
    enum { CALLS = 500 };
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    struct peer *one = meet(box), *two = meet(box);

    for (uint64_t i = 0; i < CALLS; i++)
        MUST(submit(one->link, i, SILENT, 0, PATIENCE) > 0 && submit(two->link, i, SILENT, 0, PATIENCE) > 0);
    mprpc_link_close(one->link);
    mprpc_link_close(two->link);
    expect_mail(box, 2 * CALLS, MPRPC_CALL_BROKEN);
    MUST(submit(one->link, 1, ECHO, 0, PATIENCE) == MPRPC_CALL_BROKEN);
    leave(one);
    leave(two);
    mprpc_mailbox_free(box);
}

/* A garbage collector frees in any order: the mailbox was gone when its last connection looked for it. */
static void a_mailbox_outlives_its_owner(void)
{
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    struct peer *p = meet(box);

    MUST(submit(p->link, 1, SILENT, 100000, PATIENCE) > 0);
    mprpc_mailbox_free(box);
    mprpc_link_free(p->link); /* a call in flight on it */
    pthread_join(p->thread, NULL);
    close(p->fd);
    free(p);
}

/* ---- a crowd ---- */

enum { SUBMITTERS = 3, BLOCKED = 2, SUBMITTED = 1500, MOST = 200 };

static struct {
    struct mprpc_mailbox *box;
    struct peer *peer;
    _Atomic uint64_t submitted, cancelled, answered, expired, in_flight;
    _Atomic int done;
    _Atomic uint8_t ended[SUBMITTERS * SUBMITTED];
} crowd;

static void *submitting(void *number)
{
    uint64_t first = *(uint64_t *)number * SUBMITTED;

    for (uint64_t i = 0; i < SUBMITTED; i++) {
        uint64_t token = first + i;
        while (atomic_load(&crowd.in_flight) > MOST)
            nap(1);
        atomic_fetch_add(&crowd.in_flight, 1u);
        int silent = i % 10 == 1 || i % 10 == 2;
        int64_t id = submit(crowd.peer->link, token, silent ? SILENT : ECHO, i % 50 ? i % 300 : 90000,
                            i % 10 == 1 ? 3000000 : PATIENCE);
        MUST(id > 0);
        crowd.submitted++;
        if (i % 10 == 2) {
            MUST(mprpc_link_cancel(crowd.peer->link, (uint64_t)id) == 1 && atomic_exchange(&crowd.ended[token], 1) == 0);
            crowd.cancelled++;
            crowd.in_flight--;
        } else if (i % 10 == 3 && mprpc_link_cancel(crowd.peer->link, (uint64_t)id) == 1) { /* beside its answer */
            MUST(atomic_exchange(&crowd.ended[token], 1) == 0);
            crowd.cancelled++;
            crowd.in_flight--;
        }
    }
    return NULL;
}

static void *blocked(void *unused)
{
    while (!atomic_load(&crowd.done)) {
        struct caller c = {.link = crowd.peer->link, .what = ECHO, .timeout = PATIENCE};
        call(&c);
        MUST(c.outcome == HEAD);
    }
    return unused;
}

static void *collecting(void *unused)
{
    while (!atomic_load(&crowd.done) || atomic_load(&crowd.in_flight)) {
        struct mprpc_mail *mail;
        uint8_t *bytes;
        size_t size;
        mprpc_mailbox_wait(crowd.box, SECOND / 100);
        size_t count = mprpc_mailbox_take(crowd.box, &mail, &bytes, &size);
        for (size_t i = 0; i < count; i++) {
            MUST(atomic_exchange(&crowd.ended[mail[i].token], 1) == 0);
            if (mail[i].outcome >= 0) {
                MUST(mail[i].offset + (size_t)mail[i].outcome <= size &&
                     memcmp(bytes + mail[i].offset, &mail[i].token, KEY) == 0);
                crowd.answered++;
            } else {
                MUST(mail[i].outcome == MPRPC_CALL_TIMEOUT);
                crowd.expired++;
            }
            crowd.in_flight--;
        }
    }
    return unused;
}

static void every_call_of_a_crowd_ends_once(void)
{
    pthread_t submitters[SUBMITTERS], callers[BLOCKED], collector;
    uint64_t numbers[SUBMITTERS];

    crowd.box = mprpc_mailbox_new();
    crowd.peer = meet(crowd.box);
    MUST(pthread_create(&collector, NULL, collecting, NULL) == 0);
    for (int i = 0; i < BLOCKED; i++)
        MUST(pthread_create(&callers[i], NULL, blocked, NULL) == 0);
    for (uint64_t i = 0; i < SUBMITTERS; i++) {
        numbers[i] = i;
        MUST(pthread_create(&submitters[i], NULL, submitting, &numbers[i]) == 0);
    }
    for (int i = 0; i < SUBMITTERS; i++)
        pthread_join(submitters[i], NULL);
    atomic_store(&crowd.done, 1);
    pthread_join(collector, NULL);
    for (int i = 0; i < BLOCKED; i++)
        pthread_join(callers[i], NULL);
    MUST(crowd.answered + crowd.expired + crowd.cancelled == crowd.submitted && crowd.expired && crowd.answered);
    for (int i = 0; i < SUBMITTERS * SUBMITTED; i++)
        MUST(crowd.ended[i] == 1);
    leave(crowd.peer);
    mprpc_mailbox_free(crowd.box);
}

int main(void)
{
    a_cancelled_call_gives_the_reading_back();
    posting_waits_for_nobody();
    a_submitted_call_is_written_while_a_caller_reads();
    a_submitted_call_expires_while_a_caller_reads();
    a_nearer_deadline_is_kept();
    a_wake_up_is_not_lost();
    death_brings_mail_for_every_call();
    a_mailbox_outlives_its_owner();
    every_call_of_a_crowd_ends_once();
    printf("answered %llu, expired %llu, cancelled %llu\n", (unsigned long long)crowd.answered,
           (unsigned long long)crowd.expired, (unsigned long long)crowd.cancelled);
    return 0;
}
