/* stress ROUNDS [poll]: loops and connections under load, for the sanitizers. Three loops echo; eight threads call
 * through one connection at a time, and each answer must be its caller's own. Meanwhile calls time out, are
 * interrupted, cancelled by other threads, and end as mail, connections are closed and made again, and handed from loop to loop, strangers send rubbish, and at the
 * end of every round the loops stop while calls are in flight. Request payloads: 8 bytes that no other call has, then
 * what is asked for, then filling. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "_loop.h"
#include "_mailbox.h"

enum {
    LOOPS = 3,
    MOVERS = 4,
    CALLERS = 8,
    ANSWERERS = 2,
    CALLS = 250,       /* of one thread in one round */
    REOPEN = 400,      /* calls after which the connection is closed under its callers */
    LARGEST = 200000,
    KEY = 8,           /* the bytes that are a call's own */
    DELAY = 9,         /* the offset of how long to wait, in units of 100 us */
    HEAD = 10,
    PAYLOAD_MAX = 1 << 20,
};
enum { ECHO, SLOW, FAIL, AT_ONCE, METHODS }; /* what the byte at KEY asks for; the method's index too */

#if defined MPRPC_PLANT_HASTY || defined MPRPC_PLANT_STRANDED
static const uint64_t PATIENT = 3000000000; /* ns; what is planted shows as a call without an answer */
#else
static const uint64_t PATIENT = 20000000000;
#endif

#define MUST(what) ((what) ? (void)0 : fail(#what, __LINE__))

static void fail(const char *what, int line)
{
    fprintf(stderr, "stress.c:%d: does not hold: %s (errno %d)\n", line, what, errno);
    abort();
}

static _Atomic uint64_t answered, failed, timed_out, broken, interrupted, mailed, cancelled, withdrawn, moved, steps, keys;

static uint32_t chance(uint64_t *state, uint32_t bound)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return (uint32_t)(*state >> 32) % bound;
}

static void nap(long ns)
{
    struct timespec t = {ns / 1000000000, ns % 1000000000};
    nanosleep(&t, NULL);
}

/* ---- the provider: loops, and threads that answer what was detached ---- */

struct job {
    struct job *next;
    struct mprpc_loop *loop;
    struct mprpc_ticket ticket;
    size_t size;
    uint8_t bytes[];
};

static struct {
    struct mprpc_services *services;
    struct mprpc_loop *loops[LOOPS];
    struct mprpc_placement placement;
    pthread_t turners[LOOPS], answerers[ANSWERERS];
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    struct job *jobs;
    int ending, port;
} provider = {.mutex = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void detach(struct mprpc_loop *l, uint32_t i, const uint8_t *bytes, size_t size)
{
    struct job *j = malloc(sizeof *j + size);

    MUST(j != NULL);
    j->loop = l;
    j->size = size;
    memcpy(j->bytes, bytes, size);
    mprpc_loop_detach(l, i, &j->ticket);
    pthread_mutex_lock(&provider.mutex);
    j->next = provider.jobs;
    provider.jobs = j;
    pthread_cond_signal(&provider.changed);
    pthread_mutex_unlock(&provider.mutex);
}

static void *answerer(void *unused)
{
    pthread_mutex_lock(&provider.mutex);
    while (provider.jobs || !provider.ending) {
        struct job *j = provider.jobs;
        if (!j) {
            pthread_cond_wait(&provider.changed, &provider.mutex);
            continue;
        }
        provider.jobs = j->next;
        pthread_mutex_unlock(&provider.mutex);
        nap((long)j->bytes[DELAY] * 100000);
        int details = j->bytes[0] & 1;
        MUST(mprpc_loop_answer(j->loop, &j->ticket, 0, 0, NULL, 0, j->bytes, details ? 5 : 0, j->bytes, j->size) == 0);
        free(j);
        pthread_mutex_lock(&provider.mutex);
    }
    pthread_mutex_unlock(&provider.mutex);
    return unused;
}

static void *turner(void *loop)
{
    struct mprpc_loop *l = loop;
    struct mprpc_incident incidents[MPRPC_INCIDENTS_MAX];
    struct mprpc_ticket tickets[8];
    struct mprpc_bytes replies = {0};
    int32_t sizes[MPRPC_BATCH_MAX];
    size_t count = 0;
    uint64_t more;

    MUST(mprpc_bytes_reserve(&replies, 1) == 0);
    for (;;) {
        int64_t turn = mprpc_loop_turn(l, replies.at, replies.size, sizes, count);
        if (turn == MPRPC_TURN_STOPPED)
            break;
        count = (size_t)(turn & MPRPC_TURN_COUNT);
        replies.size = 0;
        if (turn & MPRPC_TURN_SLOW) {
            mprpc_loop_incidents(l, incidents, &more);
            for (size_t n = 8; n == 8; cancelled += n) /* they are answered all the same, which must hurt nobody */
                n = mprpc_loop_cancelled(l, tickets, 8);
        }
        for (uint32_t i = 0; i < count; i++) {
            const struct mprpc_record *r = &mprpc_loop_records(l)[i];
            const uint8_t *bytes = mprpc_loop_large(l, i);
            char peer[MPRPC_PEER_MAX];
            if (!bytes)
                bytes = mprpc_loop_bytes(l) + r->offset;
            MUST(bytes >= mprpc_loop_bytes(l) + mprpc_loop_room() || r->offset + r->size <= mprpc_loop_room());
            sizes[i] = -1;
            if (mprpc_loop_expired(l, i))
                continue;
            if (r->size < HEAD || r->method == FAIL) {
                mprpc_loop_peer(l, i, peer);
                mprpc_loop_fail(l, i, 5, 0, bytes, r->size < KEY ? r->size : KEY, NULL, 0);
            } else if (r->method == SLOW) {
                detach(l, i, bytes, r->size);
            } else if (r->method == AT_ONCE) {
                mprpc_loop_reply(l, i, bytes, r->size);
            } else {
                MUST(mprpc_bytes_add(&replies, bytes, r->size) == 0);
                sizes[i] = (int32_t)r->size;
            }
        }
    }
    mprpc_bytes_free(&replies);
    return NULL;
}

static void start(int use_poll)
{
    struct mprpc_limits limits = {.frame_timeout = 300000000, .payload_max = PAYLOAD_MAX, .output_max = 1 << 18,
                                  .connections_max = 40, .classic = 1};
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof a;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

    MUST(bind(listener, (struct sockaddr *)&a, sizeof a) == 0 && listen(listener, 128) == 0);
    MUST(getsockname(listener, (struct sockaddr *)&a, &size) == 0);
    provider.port = ntohs(a.sin_port);
    provider.ending = 0;
    for (int i = 0; i < LOOPS; i++)
        MUST((provider.loops[i] = mprpc_loop_new(provider.services, &limits, (i + use_poll) % 2)) != NULL);
    mprpc_placement_init(&provider.placement, LOOPS);
    MUST(mprpc_loop_place(provider.loops, LOOPS, &provider.placement) == 0);
    MUST(mprpc_loop_listen(provider.loops[0], listener, provider.loops, LOOPS) == 0);
    for (int i = 0; i < LOOPS; i++)
        MUST(pthread_create(&provider.turners[i], NULL, turner, provider.loops[i]) == 0);
    for (int i = 0; i < ANSWERERS; i++)
        MUST(pthread_create(&provider.answerers[i], NULL, answerer, NULL) == 0);
}

static void stop(void)
{
    struct mprpc_loop_statistics s;

    for (int i = 0; i < LOOPS; i++)
        mprpc_loop_stop(provider.loops[i], 2000000000, 0);
    for (int i = LOOPS; i--;)
        mprpc_loop_stop(provider.loops[i], 20000000, 0); /* less grace, from another thread than the loops' */
    for (int i = 0; i < LOOPS; i++)
        pthread_join(provider.turners[i], NULL);
    pthread_mutex_lock(&provider.mutex);
    provider.ending = 1;
    pthread_cond_broadcast(&provider.changed);
    pthread_mutex_unlock(&provider.mutex);
    for (int i = 0; i < ANSWERERS; i++) /* they answer loops that have stopped */
        pthread_join(provider.answerers[i], NULL);
    for (int i = 0; i < LOOPS; i++) {
        mprpc_loop_statistics(provider.loops[i], &s);
        MUST(s.in_flight == 0 && s.connections == 0);
        moved += s.moved;
    }
    for (int i = 0; i < LOOPS; i++)
        mprpc_loop_free(provider.loops[i]);
}

static int dial(void)
{
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                            .sin_port = htons((uint16_t)provider.port)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

    MUST(fd >= 0);
    if (connect(fd, (struct sockaddr *)&a, sizeof a) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* ---- the connection that all callers share, replaced now and then ---- */

struct shared {
    struct mprpc_link *link;
    int users;
};

static struct {
    pthread_mutex_t mutex;
    struct shared *now;
    uint64_t calls;
    struct mprpc_mailbox *box;
    struct mprpc_load *load; /* of all connections */
    _Atomic int done;
} channel = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static struct shared *give_up(struct shared *s) /* with the mutex held; whom to free, or NULL */
{
    return --s->users == 0 ? s : NULL;
}

static void bury(struct shared *s)
{
    if (!s)
        return;
    mprpc_link_close(s->link);
    mprpc_link_free(s->link);
    free(s);
}

static struct shared *take(void)
{
    struct shared *old = NULL, *s;

    pthread_mutex_lock(&channel.mutex);
    int again = channel.now && (mprpc_link_check(channel.now->link) != 0 || ++channel.calls % REOPEN == 0);
    if (again) {
        mprpc_link_close(channel.now->link); /* under those who call through it */
        old = give_up(channel.now);
        channel.now = NULL;
    }
    int fd = channel.now || atomic_load(&channel.done) ? -1 : dial();
    if (fd >= 0) {
        MUST((s = calloc(1, sizeof *s)) && (s->link = mprpc_link_new(fd, PAYLOAD_MAX)));
        mprpc_link_attach(s->link, channel.box, 0);
        mprpc_link_measure(s->link, channel.load);
        s->users = 1;
        channel.now = s;
    }
    s = channel.now;
    if (s)
        s->users++;
    pthread_mutex_unlock(&channel.mutex);
    bury(old);
    return s;
}

static void give_back(struct shared *s)
{
    pthread_mutex_lock(&channel.mutex);
    s = give_up(s);
    pthread_mutex_unlock(&channel.mutex);
    bury(s);
}

/* ---- callers ---- */

static struct mprpc_flag flags[CALLERS]; /* of each one's call, which may be cancelled by it */

static size_t names_of(uint8_t *to, uint32_t method)
{
    static const char *names[] = {"Echo", "Slow", "Fail", "AtOnce", "Nothing"};
    const uint8_t *name = (const uint8_t *)names[method];
    return mprpc_put_names(to, (const uint8_t *)"a.S", 3, name, (uint32_t)strlen(names[method]));
}

static size_t fill(uint8_t *payload, uint64_t *state, uint64_t *timeout, uint32_t *method)
{
    static const uint32_t sizes[] = {HEAD, 40, 300, 5000, 9000, 70000, LARGEST};
    uint64_t key = atomic_fetch_add(&keys, 1u);
    size_t size = HEAD + chance(state, sizes[chance(state, chance(state, 8) ? 3 : 7)]);

    *method = chance(state, METHODS + 1);
    *timeout = chance(state, 4) ? PATIENT : 500000 + chance(state, 2000000);
    memset(payload, (int)(key & 0xff), size);
    memcpy(payload, &key, KEY);
    payload[KEY] = (uint8_t)*method;
    payload[DELAY] = (uint8_t)chance(state, 20);
    return size;
}

static void check(const struct mprpc_call *c, int64_t outcome, const uint8_t *payload, size_t size, uint32_t method,
                  uint64_t timeout)
{
    if (outcome >= 0) {
        MUST((size_t)outcome == size && method != FAIL && method != METHODS);
        MUST(memcmp(c->large ? c->large : c->small, payload, size) == 0);
        answered++;
    } else if (outcome == MPRPC_CALL_FAILED && c->status == 5) {
        MUST(method == FAIL && c->text_size == KEY && memcmp(c->words, payload, KEY) == 0 && !c->not_run);
        failed++;
    } else if (outcome == MPRPC_CALL_FAILED) { /* unknown method, past its deadline, draining */
        MUST(c->not_run && (c->status == 4 || c->status == 14 || (c->status == 12 && method == METHODS)));
        failed++;
    } else if (outcome == MPRPC_CALL_TIMEOUT) {
        MUST(timeout < PATIENT); /* else it was forgotten: nothing here takes that long */
        timed_out++;
    } else if (outcome == MPRPC_CALL_CANCELLED) {
        MUST(c->cancelled != NULL); /* its flag may have been taken back for it while it was being cancelled */
        withdrawn++;
    } else {
        MUST(outcome == MPRPC_CALL_BROKEN && c->reason != 0);
        broken++;
    }
}

static void *caller(void *seed)
{
    struct mprpc_call *c = calloc(1, sizeof *c);
    uint8_t *payload = malloc(HEAD + LARGEST), names[64];
    uint64_t state = 88172645463325252u + *(uint64_t *)seed * 1000003, timeout;
    uint32_t method;

    MUST(c && payload && (c->small = malloc(MPRPC_CALL_SMALL)));
    for (int i = 0; i < CALLS && !atomic_load(&channel.done); i++) {
        struct shared *s = take();
        if (!s)
            continue;
        size_t size = fill(payload, &state, &timeout, &method), n = names_of(names, method);
        struct mprpc_flag *flag = chance(&state, 2) ? &flags[*(uint64_t *)seed % CALLERS] : NULL;
        if (flag)
            atomic_store(&flag->set, 0u);
        int64_t outcome = mprpc_link_call(s->link, c, names, n, payload, size, timeout, 0, flag);
        while (outcome == MPRPC_CALL_INTERRUPTED && chance(&state, 8)) {
            interrupted++;
            outcome = mprpc_link_wait(s->link, c);
        }
        if (outcome == MPRPC_CALL_INTERRUPTED)
            mprpc_link_forget(s->link, c);
        else
            check(c, outcome, payload, size, method, timeout);
        mprpc_call_clear(c);
        give_back(s);
    }
    free(c->small);
    free(c);
    free(payload);
    return NULL;
}

/* Cancels whatever call has that flag now; or one that is about to begin, or has just ended. */
static void *canceller(void *unused)
{
    uint64_t state = 555555;

    while (!atomic_load(&channel.done)) {
        struct shared *s = take();
        if (!s)
            continue;
        struct mprpc_flag *flag = &flags[chance(&state, CALLERS)];
        mprpc_link_cancel_call(NULL, flag);
        mprpc_link_cancel_call(s->link, flag);
        give_back(s);
        nap((long)chance(&state, 500000));
    }
    return unused;
}

/* Submits calls that nobody waits for; each ends in exactly one mail, or is cancelled. */
static void *poster(void *unused)
{
    uint8_t *payload = malloc(HEAD + LARGEST), names[64], *bytes;
    uint64_t state = 1234567, timeout, submitted = 0, ended = 0;
    uint32_t method;
    struct mprpc_mail *mail;
    size_t size;

    MUST(payload != NULL);
    for (int i = 0; i < CALLS * 2 || ended < submitted; i++) {
        struct shared *s = i < CALLS * 2 && !atomic_load(&channel.done) ? take() : NULL;
        if (s) {
            int64_t reason, id;
            size = fill(payload, &state, &timeout, &method);
            size_t n = names_of(names, method);
            uint64_t key;
            memcpy(&key, payload, KEY);
            id = mprpc_link_submit(s->link, key, names, n, payload, size, timeout, 0, i % 3 == 0, &reason);
            submitted += id > 0;
            if (id > 0 && chance(&state, 10) == 0)
                ended += (uint64_t)mprpc_link_cancel(s->link, (uint64_t)id);
            give_back(s);
        }
        if (!s || chance(&state, 3) == 0)
            mprpc_mailbox_wait(channel.box, 2000000);
        size_t count = mprpc_mailbox_take(channel.box, &mail, &bytes, &size);
        for (size_t m = 0; m < count; m++)
            MUST(mail[m].outcome < 0 || (mail[m].offset + (size_t)mail[m].outcome <= size &&
                                         memcmp(bytes + mail[m].offset, &mail[m].token, KEY) == 0));
        ended += count;
        mailed += count;
    }
    MUST(ended == submitted);
    free(payload);
    return unused;
}

/* An event loop with a connection of its own: it polls the descriptor, and nobody else reads. */
static void *owner(void *unused)
{
    uint8_t *payload = malloc(HEAD + LARGEST), names[64], *bytes;
    uint64_t state = 7654321, timeout, expiry, submitted = 0, ended = 0;
    struct mprpc_mailbox *box = mprpc_mailbox_new();
    struct mprpc_link *k = NULL;
    struct mprpc_mail *mail;
    int told = 0;

    MUST(payload && box);
    for (int i = 0; i < CALLS * 2 || ended < submitted; i++) {
        int go_on = i < CALLS * 2 && !atomic_load(&channel.done), fd = !k && go_on ? dial() : -1;
        uint32_t method;
        int64_t reason;
        size_t size;
        if (fd >= 0) {
            MUST((k = mprpc_link_new(fd, PAYLOAD_MAX)) != NULL);
            mprpc_link_attach(k, box, 1);
        }
        if (k && go_on) {
            size = fill(payload, &state, &timeout, &method);
            int64_t id = mprpc_link_submit(k, keys, names, names_of(names, method), payload, size, timeout, 0, 1, &reason);
            submitted += id > 0;
            if (id > 0 && chance(&state, 10) == 0)
                ended += (uint64_t)mprpc_link_cancel(k, (uint64_t)id);
        }
        struct pollfd p = {k ? mprpc_link_descriptor(k) : -1, (short)(POLLIN | (told ? POLLOUT : 0)), 0};
        poll(&p, 1, go_on ? (int)chance(&state, 2) : 2);
        told = k ? mprpc_link_turn(k, p.revents & ~POLLOUT, &expiry) : 0;
        size_t count = mprpc_mailbox_take(box, &mail, &bytes, &size);
        ended += count;
        mailed += count;
        if (told < 0 || (k && i % 300 == 299)) {
            mprpc_link_close(k);
            ended += mprpc_mailbox_take(box, &mail, &bytes, &size);
            mprpc_link_free(k);
            k = NULL;
            told = 0;
        }
    }
    MUST(ended == submitted);
    if (k)
        mprpc_link_free(k);
    mprpc_mailbox_free(box);
    free(payload);
    return unused;
}

/* Half frames, rubbish, classic requests, resets. */
static void *stranger(void *unused)
{
    static const uint8_t starts[][24] = {
        "\x0d\0\0\0\x0a\x03" "a.S\x12\x04" "Echo\x20\x01", /* half a request, its header too short */
        "GET / HTTP/1.1\r\n", "\x16\x03\x01\x02\0", "\x04\0\0\0\x20\x01\x28\x03",
        "\x0b\0\0\0\x0a\x03" "a.S\x12\x04" "Fail", /* classic */
    };
    uint64_t state = 987654321;
    uint8_t drop[512];

    for (int i = 0; i < 120 && !atomic_load(&channel.done); i++) {
        int fd = dial();
        struct linger abort = {1, 0};
        struct timeval patience = {0, 20000};
        if (fd < 0)
            continue;
        const uint8_t *start = starts[chance(&state, 5)];
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        send(fd, start, 1 + chance(&state, 23), MSG_NOSIGNAL);
        if (chance(&state, 2))
            (void)!recv(fd, drop, sizeof drop, 0);
        if (chance(&state, 3) == 0)
            shutdown(fd, SHUT_WR);
        if (chance(&state, 2))
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &abort, sizeof abort);
        close(fd);
    }
    return unused;
}

/* Calls one at a time through connections of its own, so that they are handed from loop to loop all the time: this costs
 * no call. */
static void *mover(void *seed)
{
    struct mprpc_call *c = calloc(1, sizeof *c);
    uint8_t *payload = malloc(HEAD + LARGEST), names[64];
    uint64_t state = 362436069 + *(uint64_t *)seed * 521288629, timeout;
    uint32_t method;

    MUST(c && payload && (c->small = malloc(MPRPC_CALL_SMALL)));
    while (!atomic_load(&channel.done)) {
        int fd = dial();
        struct mprpc_link *k = fd < 0 ? NULL : mprpc_link_new(fd, PAYLOAD_MAX);
        for (int i = 0, whole = k != NULL; whole && i < CALLS && !atomic_load(&channel.done); i++) {
            size_t size = fill(payload, &state, &timeout, &method), n = names_of(names, method);
            atomic_store(&provider.placement.active, 1 + chance(&state, LOOPS));
            int64_t outcome = mprpc_link_call(k, c, names, n, payload, size, PATIENT, 0, NULL);
            while (outcome == MPRPC_CALL_INTERRUPTED)
                outcome = mprpc_link_wait(k, c);
            whole = outcome != MPRPC_CALL_BROKEN;
            steps++;
            MUST(whole || i == 0 || atomic_load(&channel.done)); /* the first may meet connections_max */
            check(c, outcome, payload, size, method, PATIENT);
            mprpc_call_clear(c);
        }
        if (k)
            mprpc_link_close(k);
        if (k)
            mprpc_link_free(k);
    }
    free(c->small);
    free(c);
    free(payload);
    return NULL;
}

static void on_signal(int number)
{
    (void)number;
}

static void round_of(int use_poll)
{
    static void *(*const others[])(void *) = {poster, owner, stranger, canceller};
    enum { OTHERS = sizeof others / sizeof *others };
    pthread_t callers[CALLERS], movers[MOVERS], other[OTHERS];
    uint64_t seeds[CALLERS], before = answered, stepped = steps;

    start(use_poll);
    channel.done = 0;
    MUST((channel.box = mprpc_mailbox_new()) && (channel.load = mprpc_load_new()));
    for (int i = 0; i < CALLERS; i++) {
        seeds[i] = keys * CALLERS + (uint64_t)i;
        MUST(pthread_create(&callers[i], NULL, caller, &seeds[i]) == 0);
    }
    for (int i = 0; i < MOVERS; i++)
        MUST(pthread_create(&movers[i], NULL, mover, &seeds[i]) == 0);
    for (int i = 0; i < OTHERS; i++)
        MUST(pthread_create(&other[i], NULL, others[i], NULL) == 0);
    for (int i = 0; answered < before + CALLERS * CALLS / 4 || steps < stepped + MOVERS * CALLS; i++) {
        nap(1000000);
        pthread_kill(callers[i % CALLERS], SIGUSR1); /* none has been joined */
        MUST(i < 60000);
    }
    atomic_store(&channel.done, 1);
    stop(); /* with calls in flight */
    for (int i = 0; i < CALLERS; i++)
        pthread_join(callers[i], NULL);
    for (int i = 0; i < MOVERS; i++)
        pthread_join(movers[i], NULL);
    for (int i = 0; i < OTHERS; i++)
        pthread_join(other[i], NULL);
    if (channel.now)
        bury(give_up(channel.now));
    channel.now = NULL;
    mprpc_mailbox_free(channel.box);
    struct mprpc_load_snapshot load;
    mprpc_load_snapshot(channel.load, UINT64_MAX, &load);
    MUST(load.in_flight == 0 && load.ended > load.failed && load.failed > 0);
    mprpc_load_drop(channel.load);
}

int main(int argc, char **argv)
{
    static const char *methods[] = {"Echo", "Slow", "Fail", "AtOnce"};
    struct sigaction action = {.sa_handler = on_signal}; /* without SA_RESTART, as Python's */

    if (argc < 2)
        return 2;
    sigaction(SIGUSR1, &action, NULL);
    MUST((provider.services = mprpc_services_new()) != NULL);
    for (uint32_t i = 0; i < METHODS; i++)
        MUST(mprpc_services_add(provider.services, (const uint8_t *)"a.S", 3, (const uint8_t *)methods[i],
                                strlen(methods[i]), i) == 0);
    for (int i = 0; i < atoi(argv[1]); i++)
        round_of(argc > 2);
    mprpc_services_free(provider.services);
    printf("answered %llu, failed %llu, timed out %llu, broken %llu, interrupted %llu, mailed %llu, cancelled %llu, "
           "withdrawn %llu, moved %llu\n",
           (unsigned long long)answered, (unsigned long long)failed, (unsigned long long)timed_out,
           (unsigned long long)broken, (unsigned long long)interrupted, (unsigned long long)mailed,
           (unsigned long long)cancelled, (unsigned long long)withdrawn, (unsigned long long)moved);
    MUST(answered && failed && timed_out && broken && interrupted && mailed && cancelled && withdrawn && moved);
    return 0;
}
