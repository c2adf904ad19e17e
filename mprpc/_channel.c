/* A connection that many threads call through. Strategy: whoever calls writes its own frame; whoever waits while nobody
 * reads, reads, hands the others their responses as they pass, and leaves the reading to the next when its own has come.
 * A single caller so pays for no second thread and no hand-over: send and receive are its only system calls. The roles
 * are taken and given back within one C call, under one mutex, which is never held across a system call that waits.
 * An idle connection is minded by the keeper, one thread for the process, so that PING is answered and GOAWAY seen. */
#define _GNU_SOURCE
#include "_channel.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

enum {
    CHUNK = 65536, /* what one receive has room for at least */
    COPIED = 4096, /* a payload up to this is copied behind its header: send costs 0.3 us less than sendmsg */
    EVENTS = 32,
};
static const uint64_t MS = 1000000;
static const uint64_t IDLE = 1000000;    /* ns after which the peer may have gone: look before writing */
static const uint64_t QUIET = 100000000; /* ns after which the keeper minds a connection, not the next caller */
enum { KEEPER_MS = 200 };                /* how often the keeper looks for connections that have become quiet */

struct mprpc_link {
    pthread_mutex_t mutex; /* of all but `in`, which is the reader's */
    struct mprpc_session session;
    struct mprpc_bytes in, out;
    size_t sent; /* bytes at the start of out */
    struct mprpc_call *first, *last;
    uint64_t used;    /* when a call last ended */
    uint64_t patience; /* ns, as set for the socket's receiving */
    int64_t dead;     /* why, 0: alive */
    int fd;
    uint8_t reading, writing; /* somebody waits for input; somebody minds that out gets written */
    struct mprpc_link *before, *after; /* of the keeper's list, under its mutex, as is: */
    size_t polled;                     /* its place among what the keeper polls, 0 for none */
    pid_t pid;                         /* the process that made it */
#ifndef __linux__
    pthread_cond_t changed;
#endif
};

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

/* ---- sleeping: a futex, because a signal ends its wait, which a condition variable's it does not ---- */

static void wake(struct mprpc_link *k, struct mprpc_call *c)
{
    if (!c->asleep)
        return; /* it will look for itself before it sleeps */
    atomic_fetch_add(&c->signal, 1u);
#ifdef __linux__
    (void)k;
    syscall(SYS_futex, &c->signal, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
#else
    pthread_cond_broadcast(&k->changed);
#endif
}

/* The mutex is held before and after, not meanwhile. 1: a signal came. */
static int sleep_on(struct mprpc_link *k, struct mprpc_call *c)
{
#ifdef __linux__
    uint32_t seen = atomic_load(&c->signal);
    struct timespec until = {(time_t)(c->deadline / UINT64_C(1000000000)), (long)(c->deadline % UINT64_C(1000000000))};

    c->asleep = 1;
    pthread_mutex_unlock(&k->mutex);
    long rc = syscall(SYS_futex, &c->signal, FUTEX_WAIT_BITSET_PRIVATE, seen, &until, NULL, FUTEX_BITSET_MATCH_ANY);
    int interrupted = rc < 0 && errno == EINTR;
    pthread_mutex_lock(&k->mutex);
    c->asleep = 0;
    return interrupted;
#else
    struct timespec until; /* in slices, each of which lets Python look at its signals */
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 50 * (long)MS;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    c->asleep = 1;
    int slice = pthread_cond_timedwait(&k->changed, &k->mutex, &until) == ETIMEDOUT;
    c->asleep = 0;
    return slice;
#endif
}

/* ---- the calls in flight ---- */

static void enlist(struct mprpc_link *k, struct mprpc_call *c)
{
    c->pending = 1;
    c->after = NULL;
    c->before = k->last;
    *(k->last ? &k->last->after : &k->first) = c;
    k->last = c;
}

static void unlist(struct mprpc_link *k, struct mprpc_call *c)
{
    *(c->before ? &c->before->after : &k->first) = c->after;
    *(c->after ? &c->after->before : &k->last) = c->before;
    c->before = c->after = NULL;
    c->pending = 0;
}

static void complete(struct mprpc_link *k, struct mprpc_call *c, int64_t outcome)
{
    unlist(k, c);
    c->outcome = outcome;
    wake(k, c);
}

/* Nobody reads (or writes) though somebody waits: the first who can, does. */
static void promote(struct mprpc_link *k)
{
    if (k->reading)
        return;
    for (struct mprpc_call *c = k->first; c; c = c->after)
        if (!c->away) {
            wake(k, c);
            return;
        }
}

static void die(struct mprpc_link *k, int64_t reason)
{
    if (!k->dead)
        k->dead = reason;
    shutdown(k->fd, SHUT_RDWR); /* whoever waits in recv wakes up */
    while (k->first) {
        k->first->reason = k->dead;
        mprpc_session_forget(&k->session, k->first->id);
        complete(k, k->first, MPRPC_CALL_BROKEN);
    }
}

/* ---- output ---- */

static void flush(struct mprpc_link *k)
{
    while (k->out.size > k->sent) {
        ssize_t n = send(k->fd, k->out.at + k->sent, k->out.size - k->sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
            die(k, errno);
        if (n < 0)
            return;
        k->sent += (size_t)n;
    }
    mprpc_bytes_free(&k->out);
    k->sent = 0;
}

/* Writes a frame, or what of it the socket takes; the rest is left to whoever is on the connection. */
static int put(struct mprpc_link *k, struct mprpc_call *c, const uint8_t *head, size_t head_size,
               const uint8_t *payload, size_t size)
{
    struct iovec parts[2] = {{(void *)(uintptr_t)head, head_size}, {(void *)(uintptr_t)payload, size}};
    struct msghdr m = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t n = 0;

    if (k->out.size == 0) {
        do
            n = size ? sendmsg(k->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL)
                     : send(k->fd, head, head_size, MSG_DONTWAIT | MSG_NOSIGNAL);
        while (n < 0 && errno == EINTR);
        if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
            die(k, errno);
            return -1;
        }
        n = n < 0 ? 0 : n;
    }
    c->sent = 1;
    if ((size_t)n == head_size + size)
        return 0;
    size_t of_head = (size_t)n < head_size ? (size_t)n : head_size, of_payload = (size_t)n - of_head;
    if (mprpc_bytes_add(&k->out, head + of_head, head_size - of_head) ||
        mprpc_bytes_add(&k->out, payload + of_payload, size - of_payload)) {
        die(k, ENOMEM);
        return -1;
    }
    return 0;
}

/* ---- input ---- */

static uint8_t *copied(const uint8_t *from, size_t size)
{
    uint8_t *to = malloc(size ? size : 1);

    if (to && size)
        memcpy(to, from, size);
    return to;
}

/* Hands a response to its call. steal: the whole of k->in, when nothing else is in it. */
static void deliver(struct mprpc_link *k, const struct mprpc_event *e, int steal)
{
    struct mprpc_call *c = (struct mprpc_call *)(uintptr_t)e->tag;
    const struct mprpc_frame *f = &e->frame;
    int64_t outcome = f->status == 0 ? (int64_t)f->payload_size : MPRPC_CALL_FAILED;

    c->status = f->status;
    c->not_run = f->not_run;
    if (outcome == MPRPC_CALL_FAILED) {
        c->words = malloc((size_t)f->error_text_size + f->error_details_size + 1);
        c->text_size = c->words ? f->error_text_size : 0;
        c->details_size = c->words ? f->error_details_size : 0;
        if (c->text_size)
            memcpy(c->words, f->error_text, c->text_size);
        if (c->details_size)
            memcpy(c->words + c->text_size, f->error_details, c->details_size);
    } else if (f->payload_size <= MPRPC_CALL_SMALL) {
        memcpy(c->small, f->payload, f->payload_size);
    } else if (steal) {
        c->block = k->in.at;
        c->large = c->block + (f->payload - k->in.at);
        memset(&k->in, 0, sizeof k->in);
    } else if ((c->block = copied(f->payload, f->payload_size))) {
        c->large = c->block;
    } else {
        c->reason = ENOMEM;
        outcome = MPRPC_CALL_BROKEN;
    }
    complete(k, c, outcome);
}

/* GOAWAY: what is above the highest accepted never ran. */
static void gone(struct mprpc_link *k)
{
    for (struct mprpc_call *c = k->first, *next; c; c = next) {
        next = c->after;
        if (c->id > k->session.goaway_id) {
            mprpc_session_forget(&k->session, c->id);
            c->sent = 0;
            c->reason = MPRPC_LINK_GOAWAY;
            complete(k, c, MPRPC_CALL_BROKEN);
        }
    }
}

/* All the frames that are whole in k->in. */
static void process(struct mprpc_link *k)
{
    struct mprpc_event events[EVENTS];
    size_t count, at = 0;
    int64_t used;

    do {
        used = mprpc_session_receive(&k->session, k->in.at + at, k->in.size - at, 0, events, EVENTS, &count, &k->out);
        if (used < 0) {
            die(k, used);
            break;
        }
        at += (size_t)used;
        for (size_t i = 0; i < count; i++) {
            if (events[i].frame.kind == MPRPC_RESPONSE)
                deliver(k, &events[i], count == 1 && at == k->in.size);
            else if (events[i].frame.kind == MPRPC_GOAWAY)
                gone(k);
        }
    } while (used > 0 && k->in.at);
    if (k->in.at && at) {
        k->in.size -= at;
        memmove(k->in.at, k->in.at + at, k->in.size);
    }
    flush(k);
}

static int reserve(struct mprpc_link *k)
{
    size_t free = k->in.room - k->in.size;

    if (free >= CHUNK / 2)
        return 0;
    return mprpc_bytes_reserve(&k->in, k->in.size > CHUNK ? k->in.size : CHUNK); /* doubles with what came */
}

static void received(struct mprpc_link *k, ssize_t n, int why)
{
    if (n > 0) {
        k->in.size += (size_t)n;
        process(k);
    } else if (n == 0) {
        die(k, MPRPC_LINK_END);
    } else if (why != EAGAIN && why != EWOULDBLOCK && why != EINTR) {
        die(k, why);
    }
}

/* One look at the socket that does not wait; nobody else reads. */
static void look(struct mprpc_link *k)
{
    if (reserve(k)) {
        die(k, ENOMEM);
        return;
    }
    ssize_t n = recv(k->fd, k->in.at + k->in.size, k->in.room - k->in.size, MSG_DONTWAIT);
    received(k, n, errno);
}

/* recv ends by itself at the deadline; setting that costs a system call only where timeouts differ from call to call. */
static void set_patience(struct mprpc_link *k, uint64_t left)
{
    if (k->patience <= left + 2 * MS && k->patience >= left / 2)
        return;
    struct timeval t = {(time_t)(left / (1000 * MS)), (suseconds_t)(left % (1000 * MS) / 1000 + 1)};
    setsockopt(k->fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    k->patience = left;
}

static int poll_ms(uint64_t left)
{
    return left > 3600000 * MS ? 3600000 : (int)((left + MS - 1) / MS);
}

/* As the reader: wait for input once, act on it. 1: a signal came. */
static int read_once(struct mprpc_link *k, uint64_t left)
{
    int write = k->out.size > 0 && !k->writing, why = EAGAIN;
    ssize_t n = -1;

    if (reserve(k)) {
        die(k, ENOMEM);
        return 0;
    }
    k->reading = 1;
    k->writing |= (uint8_t)write;
    if (!write)
        set_patience(k, left);
    pthread_mutex_unlock(&k->mutex);
    if (write) {
        struct pollfd p = {k->fd, POLLIN | POLLOUT, 0};
        if (poll(&p, 1, poll_ms(left)) < 0)
            why = errno;
        else if (p.revents & ~POLLOUT) {
            n = recv(k->fd, k->in.at + k->in.size, k->in.room - k->in.size, MSG_DONTWAIT);
            why = errno;
        }
    } else {
        n = recv(k->fd, k->in.at + k->in.size, k->in.room - k->in.size, 0);
        why = errno;
    }
    pthread_mutex_lock(&k->mutex);
    k->reading = 0;
    if (write) {
        k->writing = 0;
        flush(k);
    }
    received(k, n, why);
    return n < 0 && why == EINTR;
}

/* While another reads: mind the output. 1: a signal came. */
static int write_once(struct mprpc_link *k, uint64_t left)
{
    struct pollfd p = {k->fd, POLLOUT, 0};

    k->writing = 1;
    pthread_mutex_unlock(&k->mutex);
    int rc = poll(&p, 1, poll_ms(left)), why = errno;
    pthread_mutex_lock(&k->mutex);
    k->writing = 0;
    flush(k);
    return rc < 0 && why == EINTR;
}

/* ---- a call ---- */

/* With the mutex held; gives it back. */
static int64_t await(struct mprpc_link *k, struct mprpc_call *c)
{
    int interrupted = 0;

    c->away = 0;
    while (c->pending && !interrupted) {
        uint64_t now = clock_ns();
        if (now >= c->deadline) {
            mprpc_session_forget(&k->session, c->id);
            unlist(k, c);
            c->outcome = MPRPC_CALL_TIMEOUT;
        } else if (!k->reading) {
            interrupted = read_once(k, c->deadline - now);
        } else if (k->out.size && !k->writing) {
            interrupted = write_once(k, c->deadline - now);
        } else {
            interrupted = sleep_on(k, c);
        }
    }
    c->away = c->pending;
    int64_t outcome = c->pending ? MPRPC_CALL_INTERRUPTED : c->outcome;
    if (k->first)
        promote(k);
    else
        k->used = clock_ns();
    pthread_mutex_unlock(&k->mutex);
    return outcome;
}

static int64_t refused(struct mprpc_link *k, struct mprpc_call *c, int64_t outcome, int64_t reason)
{
    c->reason = reason;
    pthread_mutex_unlock(&k->mutex);
    return outcome;
}

int64_t mprpc_link_call(struct mprpc_link *k, struct mprpc_call *c, const uint8_t *names, size_t names_size,
                        const uint8_t *payload, size_t size, uint64_t timeout)
{
    uint8_t head[MPRPC_CALL_ROOM + MPRPC_NAMES_MAX + COPIED];
    uint64_t now = clock_ns(), ms = (timeout + MS - 1) / MS;

    c->deadline = now + timeout;
    c->sent = c->not_run = 0;
    pthread_mutex_lock(&k->mutex);
    if (!k->dead && !k->first && !k->reading && now - k->used > IDLE)
        look(k);
    if (k->dead || k->session.gone)
        return refused(k, c, MPRPC_CALL_BROKEN, k->dead ? k->dead : MPRPC_LINK_GOAWAY);
    c->id = mprpc_session_call(&k->session, (uint64_t)(uintptr_t)c);
    if (!c->id)
        return refused(k, c, MPRPC_CALL_FULL, 0);
    enlist(k, c);
    size_t n = mprpc_put_call(head, names, (uint32_t)names_size, (uint32_t)size, c->id,
                              ms > UINT32_MAX ? UINT32_MAX : ms ? (uint32_t)ms : 1);
    if (size && size <= COPIED) {
        memcpy(head + n, payload, size);
        n += size;
        size = 0;
    }
    put(k, c, head, n, payload, size);
    return await(k, c);
}

int64_t mprpc_link_wait(struct mprpc_link *k, struct mprpc_call *c)
{
    pthread_mutex_lock(&k->mutex);
    return await(k, c);
}

void mprpc_link_forget(struct mprpc_link *k, struct mprpc_call *c)
{
    pthread_mutex_lock(&k->mutex);
    if (c->pending) {
        mprpc_session_forget(&k->session, c->id);
        unlist(k, c);
    }
    promote(k);
    pthread_mutex_unlock(&k->mutex);
}

void mprpc_call_clear(struct mprpc_call *c)
{
    free(c->block);
    free(c->words);
    c->block = c->large = c->words = NULL;
    c->text_size = c->details_size = 0;
}

/* ---- the keeper ---- */

static struct {
    pthread_mutex_t mutex; /* taken before a link's, never after */
    struct mprpc_link *first;
    int wake[2];
    int running;
} keeper = {.mutex = PTHREAD_MUTEX_INITIALIZER, .wake = {-1, -1}};

static int quiet(const struct mprpc_link *k)
{
    return !k->dead && !k->first && !k->reading;
}

/* What to poll: the quiet ones. *busy: some may become so. */
static size_t gather(struct pollfd **fds, size_t *room, int *busy)
{
    uint64_t now = clock_ns();
    size_t n = 1;

    *busy = 0;
    for (struct mprpc_link *k = keeper.first; k; k = k->after) {
        k->polled = 0;
        pthread_mutex_lock(&k->mutex);
        int take = quiet(k) && now - k->used > QUIET, dead = k->dead != 0;
        pthread_mutex_unlock(&k->mutex);
        if (take && n == *room) {
            struct pollfd *more = realloc(*fds, *room * 2 * sizeof **fds);
            take = more != NULL;
            *fds = more ? more : *fds;
            *room *= more ? 2 : 1;
        }
        if (take) {
            (*fds)[k->polled = n++] = (struct pollfd){k->fd, POLLIN, 0};
        } else {
            *busy |= !dead;
        }
    }
    return n;
}

static void mind(struct mprpc_link *k)
{
    pthread_mutex_lock(&k->mutex);
    if (quiet(k))
        look(k);
    if (quiet(k) && k->session.gone)
        die(k, MPRPC_LINK_GOAWAY); /* nothing is in flight: the provider waits for our end */
    pthread_mutex_unlock(&k->mutex);
}

static void *keep(void *unused)
{
    size_t room = 64;
    struct pollfd *fds = malloc(room * sizeof *fds);
    int busy;
    char drop[64];

    pthread_mutex_lock(&keeper.mutex);
    while (fds && keeper.first) {
        fds[0] = (struct pollfd){keeper.wake[0], POLLIN, 0};
        size_t n = gather(&fds, &room, &busy);
        pthread_mutex_unlock(&keeper.mutex);
        poll(fds, (nfds_t)n, busy ? KEEPER_MS : -1);
        pthread_mutex_lock(&keeper.mutex);
        while (fds[0].revents && read(keeper.wake[0], drop, sizeof drop) == sizeof drop)
            continue;
        for (struct mprpc_link *k = keeper.first; k; k = k->after)
            if (k->polled && fds[k->polled].revents)
                mind(k);
    }
    keeper.running = 0;
    pthread_mutex_unlock(&keeper.mutex);
    free(fds);
    return unused;
}

static void keeper_wake(void)
{
    ssize_t n = write(keeper.wake[1], "", 1);
    (void)n;
}

/* With its mutex held. Without a keeper the connections work as well; only idle ones notice less. */
static void keeper_start(void)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t thread;

    if (keeper.wake[0] < 0 && pipe(keeper.wake) < 0)
        return;
    for (int end = 0; end < 2; end++) {
        fcntl(keeper.wake[end], F_SETFD, FD_CLOEXEC);
        fcntl(keeper.wake[end], F_SETFL, O_NONBLOCK);
    }
    sigfillset(&all);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for Python's threads */
    keeper.running = pthread_create(&thread, &attributes, keep, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

/* In a forked child: no keeper, nothing to mind, whatever the parent's was about. */
static void forked(void)
{
    pthread_mutex_init(&keeper.mutex, NULL);
    for (int i = 0; i < 2; i++) {
        if (keeper.wake[i] >= 0)
            close(keeper.wake[i]);
        keeper.wake[i] = -1;
    }
    keeper.first = NULL;
    keeper.running = 0;
}

static void mind_forks(void)
{
    pthread_atfork(NULL, NULL, forked);
}

static void keeper_add(struct mprpc_link *k)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, mind_forks);
    pthread_mutex_lock(&keeper.mutex);
    k->after = keeper.first;
    if (k->after)
        k->after->before = k;
    keeper.first = k;
    if (!keeper.running)
        keeper_start();
    else
        keeper_wake();
    pthread_mutex_unlock(&keeper.mutex);
}

static void keeper_remove(struct mprpc_link *k)
{
    if (k->pid != getpid())
        return;
    pthread_mutex_lock(&keeper.mutex);
    *(k->before ? &k->before->after : &keeper.first) = k->after;
    if (k->after)
        k->after->before = k->before;
    if (!keeper.first)
        keeper_wake(); /* with nothing to mind, the thread ends */
    pthread_mutex_unlock(&keeper.mutex);
}

/* ---- a connection ---- */

struct mprpc_link *mprpc_link_new(int fd, uint32_t payload_max)
{
    struct mprpc_link *k = calloc(1, sizeof *k);

    if (!k)
        return NULL;
    pthread_mutex_init(&k->mutex, NULL);
#ifndef __linux__
    pthread_cond_init(&k->changed, NULL);
#endif
    mprpc_session_init(&k->session, NULL, payload_max, 0);
    k->fd = fd;
    k->used = clock_ns();
    k->pid = getpid();
    keeper_add(k);
    return k;
}

void mprpc_link_close(struct mprpc_link *k)
{
    pthread_mutex_lock(&k->mutex);
    die(k, MPRPC_LINK_CLOSED);
    pthread_mutex_unlock(&k->mutex);
}

int64_t mprpc_link_check(struct mprpc_link *k)
{
    pthread_mutex_lock(&k->mutex);
    if (!k->dead && !k->reading)
        look(k);
    int64_t reason = k->dead ? k->dead : k->session.gone ? MPRPC_LINK_GOAWAY : 0;
    pthread_mutex_unlock(&k->mutex);
    return reason;
}

void mprpc_link_free(struct mprpc_link *k)
{
    keeper_remove(k);
    close(k->fd);
    mprpc_session_free(&k->session);
    mprpc_bytes_free(&k->in);
    mprpc_bytes_free(&k->out);
    pthread_mutex_destroy(&k->mutex);
    free(k);
}
