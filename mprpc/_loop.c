/* The loop. Strategy: one turn is flush, wait, receive. All that the ready connections send is received into one
 * arena and split there, so that Python takes a whole turn's arguments in one copy; only the partial frame at a
 * connection's tail is kept, in a buffer of its own. Replies of one connection leave in one send. Level-triggered
 * polling: what a turn has no room for is simply ready again. Every kind of timeout has one duration, so a list in
 * order of time is its whole timer. Connections are addressed by slot and generation: what comes late finds nobody. */
#define _GNU_SOURCE
#include "_loop.h"

#include "_fork.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/epoll.h>
#include <sys/syscall.h>
#endif

enum {
    ARENA = 8 * MPRPC_CHUNK,
    ARENA_FULL = ARENA - 2 * MPRPC_CHUNK, /* a partial frame and a chunk always fit behind it */
    POLL_MAX = 256,
    ACCEPT_MAX = 64,         /* connections in one turn */
    PROGRESS_MIN = 16384,    /* bytes of a frame that count as progress: a byte now and then does not */
    CLASSIC_READ = 1024,     /* what the C++ consumer's only recv takes */
    LINGER_BYTES = 64 << 20, /* discarded from a peer that goes on sending to a connection that has ended */
    REFUSE_ROUNDS = 16,      /* looks at the queue in one turn while a gate refuses */
    SWEEP = 1024,            /* connections looked at for idleness at once */
    STALLED_MAX = 32,        /* connections ended in one turn for a frame without progress, or after lingering */
    STRANGERS = 500000,      /* ns of a turn for those who have never called: at least one, as many as that allows */
    LARGE = 65536,           /* a payload from here is sent from where it lies, without a copy through the scratch */
};
static const uint64_t LINGER = UINT64_C(2000000000);     /* ns to wait for a peer to end its side */
static const uint64_t LINGER_STOP = UINT64_C(200000000); /* the same when the whole loop stops */
static const uint64_t YIELD = UINT64_C(2000000);         /* ns for which a connection is left to who has fewer */
static const uint64_t FOREVER = UINT64_MAX;

enum { CANCELLED = 1, DEADLINE_EXCEEDED = 4, RESOURCE_EXHAUSTED = 8, UNAVAILABLE = 14 };

/* ---- poller: epoll, or poll(2) with the keys beside ---- */

enum { IN = 1, OUT = 2, ENDED = 4 }; /* ENDED: the peer's side is, behind what can be read */
#ifndef POLLRDHUP
#define POLLRDHUP 0
#endif

struct poller {
    int ep; /* -1: poll(2) */
    struct pollfd *fds;
    uint64_t *keys;
    size_t count, room, first; /* first: where the next round starts, so that POLL_MAX starves nobody */
};
struct ready {
    uint64_t key;
    int events;
};

static int poller_set(struct poller *p, int fd, uint64_t key, int events, int added)
{
#ifdef __linux__
    if (p->ep >= 0) {
        struct epoll_event e = {.events = (events & IN ? EPOLLIN | EPOLLRDHUP : 0u) | (events & OUT ? EPOLLOUT : 0u),
                                .data.u64 = key};
        return epoll_ctl(p->ep, added ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &e);
    }
#endif
    size_t i = 0;
    while (i < p->count && p->fds[i].fd != fd)
        i++;
    if (i == p->room) {
        size_t room = p->room ? p->room * 2 : 64;
        struct pollfd *fds = realloc(p->fds, room * sizeof *fds);
        if (fds)
            p->fds = fds;
        uint64_t *keys = realloc(p->keys, room * sizeof *keys);
        if (keys)
            p->keys = keys;
        if (!fds || !keys)
            return -1;
        p->room = room;
    }
    p->count += i == p->count;
    p->fds[i] = (struct pollfd){fd, (short)((events & IN ? POLLIN | POLLRDHUP : 0) | (events & OUT ? POLLOUT : 0)), 0};
    p->keys[i] = key;
    return 0;
}

static void poller_remove(struct poller *p, int fd)
{
#ifdef __linux__
    if (p->ep >= 0) { /* closing would do it, but for a forked child that holds the same descriptor */
        epoll_ctl(p->ep, EPOLL_CTL_DEL, fd, NULL);
        return;
    }
#endif
    for (size_t i = 0; i < p->count; i++)
        if (p->fds[i].fd == fd) {
            p->fds[i] = p->fds[--p->count];
            p->keys[i] = p->keys[p->count];
            return;
        }
}

#ifdef __linux__
/* Since Linux 5.11 (glibc 2.35 has a function for it); before, the wait ends at the next millisecond. */
static int wait_precisely(int ep, struct epoll_event *events, const struct timespec *timeout)
{
#ifdef SYS_epoll_pwait2
    int n = (int)syscall(SYS_epoll_pwait2, ep, events, POLL_MAX, timeout, NULL, 0);
    if (n >= 0 || errno != ENOSYS)
        return n;
#endif
    return epoll_wait(ep, events, POLL_MAX, 1);
}
#endif

/* How many are ready, 0 after timeout ns, -1 with errno EINTR. */
static int poller_wait(struct poller *p, struct ready *ready, uint64_t timeout)
{
    uint64_t ms = (timeout + 999999) / 1000000; /* rounded up: a timer that is not due yet must not spin */
    int n, wait = timeout == FOREVER || ms > INT_MAX ? -1 : (int)ms, k = 0;

#ifdef __linux__
    if (p->ep >= 0) {
        struct epoll_event events[POLL_MAX];
        struct timespec precise = {0, timeout < 1000000 ? (long)timeout : 0};
        n = precise.tv_nsec ? wait_precisely(p->ep, events, &precise) : epoll_wait(p->ep, events, POLL_MAX, wait);
        for (k = 0; k < n; k++) {
            uint32_t e = events[k].events;
            ready[k] = (struct ready){events[k].data.u64, (e & ~(uint32_t)EPOLLOUT ? IN : 0) |
                                                              (e & EPOLLOUT ? OUT : 0) | (e & EPOLLRDHUP ? ENDED : 0)};
        }
        return n;
    }
#endif
    n = poll(p->fds, (nfds_t)p->count, wait);
    for (size_t i = 0; n > 0 && i < p->count && k < POLL_MAX; i++) {
        size_t at = (p->first + i) % p->count;
        short e = p->fds[at].revents;
        if (e)
            ready[k++] = (struct ready){
                p->keys[at], (e & ~POLLOUT ? IN : 0) | (e & POLLOUT ? OUT : 0) | (e & POLLRDHUP ? ENDED : 0)};
    }
    p->first++;
    return n < 0 ? n : k;
}

/* ---- what a loop holds ---- */

struct list;
struct connection {
    struct mprpc_session session;
    struct mprpc_bytes in, out;
    struct connection *before, *after; /* in the list of its timeout */
    struct list *list;
    uint64_t since;    /* when it entered that list */
    uint64_t received; /* when what is in `in` came */
    uint64_t used;     /* when a request last came, an answer left, or its peer read */
    uint64_t discarded;
    size_t sent;       /* bytes at the start of out */
    size_t progress;   /* in.size when `since` was set */
    uint64_t skip;     /* session.skip then */
    size_t weighed;    /* in.room, as counted in the loop's buffered */
    uint32_t slot, generation;
    int fd;
    struct mprpc_wire *wire; /* of a connection within the process, or NULL */
    uint8_t events;   /* as told to the poller */
    uint8_t waiting;  /* whole frames are left in `in`: it stands in the loop's queue, unless it is full */
    uint8_t stuffed;  /* it was full, and has not read enough since */
    uint8_t parked;   /* waiting and full: out of the queue until its peer has read */
    uint8_t ended;    /* no more requests: what is left is to send `out`, end our side, and wait for the peer's */
    uint8_t shut;     /* our side is ended */
    uint8_t deserted; /* the peer has ended its side behind what is not read yet */
    uint8_t peer_end; /* the peer's side is */
    uint8_t taken;    /* what has come is being taken: more of it may lie in the arena */
};

/* Connections in the order in which their timeout comes. */
struct list {
    struct connection *first, *last;
    uint64_t timeout;
};

struct request {
    uint64_t connection, call_id, deadline, received;
    const uint8_t *large;
    uint32_t held; /* where it lies then */
    uint32_t attempt;
    uint8_t open; /* not yet answered or detached */
};

struct task { /* from another thread */
    struct task *next;
    struct mprpc_ticket ticket;
    int fd; /* a connection to take over, -1: an answer */
    struct mprpc_wire *wire; /* of that connection, or NULL */
    struct connection *moved; /* from another loop, or NULL */
    int32_t status;
    uint8_t not_run;
    uint32_t text_size, details_size;
    size_t size;
    uint8_t bytes[]; /* text, details, payload */
};

struct mprpc_loop {
    unsigned born; /* mprpc_forks then */
    struct poller poller;
    const struct mprpc_services *services;
    struct mprpc_limits limits;
    struct connection **connections;
    uint32_t *generations, *free_slots;
    uint32_t room, free_count;
    struct list frames, lingering; /* their timeouts */
    uint64_t sweep_at; /* when to look for idle connections again */
    uint32_t swept;    /* slots that this round has looked at */
    uint64_t *queue; /* connections with whole frames left, in order */
    size_t queued, queue_room;
    uint64_t now;
    uint32_t strangers_from; /* where the next turn's first look at strangers starts */
    uint64_t buffered; /* bytes that partial frames take */

    uint8_t *arena;
    size_t arena_size;
    struct request requests[MPRPC_BATCH_MAX];
    struct mprpc_record records[MPRPC_BATCH_MAX];
    uint32_t count;
    int slow; /* MPRPC_TURN_SLOW */
    struct mprpc_event events[MPRPC_FAIR_MAX];
    struct mprpc_bytes scratch;                 /* replies on their way */
    uint8_t *held[MPRPC_BATCH_MAX];             /* large requests' buffers, freed by the next turn at the latest */
    uint32_t users[MPRPC_BATCH_MAX];            /* requests in each */
    size_t held_count;

    int listener, shared, spare;
    struct mprpc_loop **loops;
    size_t loops_count;
    atomic_uint *crowd; /* the connections of each process that accepts on `shared`, ours at crowd_mine */
    size_t crowd_count, crowd_mine;
    uint64_t yield_until; /* FOREVER: `shared` is watched */
    struct mprpc_placement *placement; /* of `loops`, in which this one has a number; or NULL */
    uint32_t number, active; /* loops at work when last looked at */
    int even;                /* since then this one has had no more connections than another */

    int wake[2];
    pthread_mutex_t mutex; /* of what follows */
    struct task *tasks, **tasks_end;
    uint64_t grace, settle; /* FOREVER: not stopping; how long to go on accepting all the same */
    int closed;
    /* end of what mutex covers */
    uint64_t stop_at, settled_at; /* FOREVER: not stopping */
    int draining, ending;
    _Atomic uint64_t remind_at; /* FOREVER: of nothing */

    struct mprpc_bytes cancelled; /* tickets of detached calls that nobody waits for any more */
    struct mprpc_incident incidents[MPRPC_INCIDENTS_MAX];
    size_t incident_count;
    uint64_t incidents_lost;
    _Atomic uint64_t counts[MPRPC_REASONS];
    atomic_uint open; /* connections, read by the accepting loop */
    uint64_t accepted, taken, broken, in_flight, moved; /* written by whoever turns the loop, read by any */
    uint64_t began;                              /* the handler that runs, or would be next */
    struct mprpc_tally *tallies;                 /* of each method */
    struct mprpc_gate *gates;                    /* NULL: everything is let in */
    uint8_t *gate_of;                            /* each method's, or MPRPC_NO_GATE */
    uint64_t adapt_at, adapt_period;             /* when to let limits follow */
    int refusing;                                /* a gate has refused something in this turn */
};

enum { KEY_WAKE = UINT32_MAX, KEY_LISTENER = UINT32_MAX - 1, KEY_SHARED = UINT32_MAX - 2 };

/* Whether this is a forked child, in which nobody turns the loop and its descriptors are closed. */
static int is_parents(const struct mprpc_loop *l)
{
    return l->born != mprpc_forks;
}

static uint64_t key_of(const struct connection *c)
{
    return (uint64_t)c->generation << 32 | c->slot;
}

static struct connection *connection_at(struct mprpc_loop *l, uint64_t key)
{
    uint32_t slot = (uint32_t)key;

    return slot < l->room && l->connections[slot] && l->generations[slot] == key >> 32 ? l->connections[slot] : NULL;
}

static uint64_t clock_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

static void peer_name(int fd, char *to)
{
    union {
        struct sockaddr any;
        struct sockaddr_in v4;
        struct sockaddr_in6 v6;
        struct sockaddr_un un;
    } a;
    socklen_t size = sizeof a;
    char host[INET6_ADDRSTRLEN] = "?";

    memset(&a, 0, sizeof a);
    if (getpeername(fd, &a.any, &size) < 0)
        snprintf(to, MPRPC_PEER_MAX, "a peer that is gone");
    else if (a.any.sa_family == AF_INET)
        snprintf(to, MPRPC_PEER_MAX, "%s:%u", inet_ntop(AF_INET, &a.v4.sin_addr, host, sizeof host),
                 ntohs(a.v4.sin_port));
    else if (a.any.sa_family == AF_INET6)
        snprintf(to, MPRPC_PEER_MAX, "[%s]:%u", inet_ntop(AF_INET6, &a.v6.sin6_addr, host, sizeof host),
                 ntohs(a.v6.sin6_port));
    else
        snprintf(to, MPRPC_PEER_MAX, "unix:");
}

static void note(struct mprpc_loop *l, int64_t reason)
{
    atomic_fetch_add_explicit(&l->counts[-reason], 1u, memory_order_relaxed);
}

static void incident(struct mprpc_loop *l, int fd, int64_t reason)
{
    note(l, reason);
    l->slow = MPRPC_TURN_SLOW;
    if (l->incident_count == MPRPC_INCIDENTS_MAX) {
        l->incidents_lost++;
        return;
    }
    struct mprpc_incident *i = &l->incidents[l->incident_count++];
    i->reason = reason;
    peer_name(fd, i->peer);
}

static void cancelled(struct mprpc_loop *l, uint64_t connection, uint64_t call_id)
{
    struct mprpc_ticket t = {.connection = connection, .call_id = call_id};

    if (mprpc_bytes_add(&l->cancelled, &t, sizeof t) == 0) /* else the handler runs in vain, which hurts nobody */
        l->slow = MPRPC_TURN_SLOW;
}

/* ---- timeouts ---- */

static void unlist(struct connection *c)
{
    struct list *t = c->list;

    if (!t)
        return;
    *(c->before ? &c->before->after : &t->first) = c->after;
    *(c->after ? &c->after->before : &t->last) = c->before;
    c->before = c->after = NULL;
    c->list = NULL;
}

static void enlist(struct connection *c, struct list *t, uint64_t now)
{
    unlist(c);
    c->list = t;
    c->since = now;
    c->before = t->last;
    *(t->last ? &t->last->after : &t->first) = c;
    t->last = c;
}

static uint64_t due(const struct list *t)
{
    return t->first ? t->first->since + t->timeout : FOREVER;
}

/* ---- a connection's end ---- */

static int full(const struct mprpc_loop *l, const struct connection *c)
{
    return c->out.size - c->sent > l->limits.output_max && !c->ended;
}

static void watch(struct mprpc_loop *l, struct connection *c)
{
    int events = (full(l, c) || c->peer_end || c->waiting ? 0 : IN) | (c->out.size > c->sent ? OUT : 0);

    if (events != c->events && poller_set(&l->poller, c->fd, key_of(c), events, 0) == 0)
        c->events = (uint8_t)events;
}

static void weigh(struct mprpc_loop *l, struct connection *c)
{
    l->buffered += c->in.room - c->weighed;
    c->weighed = c->in.room;
}

/* The loop has it no more: its number finds nobody. */
static void part_from(struct mprpc_loop *l, struct connection *c)
{
    l->buffered -= c->weighed;
    c->weighed = 0;
    unlist(c);
    atomic_fetch_sub(&l->open, 1u);
    poller_remove(&l->poller, c->fd);
    l->connections[c->slot] = NULL;
    l->generations[c->slot]++;
    l->free_slots[l->free_count++] = c->slot;
}

static void discard(struct connection *c)
{
    mprpc_session_free(&c->session);
    mprpc_bytes_free(&c->in);
    mprpc_bytes_free(&c->out);
    free(c);
}

static void destroy(struct mprpc_loop *l, struct connection *c, int reset)
{
    struct linger abort = {1, 0};

    if (c->session.in_flight)
        cancelled(l, key_of(c), 0);
    mprpc_count(&l->in_flight, (uint64_t)0 - c->session.in_flight);
    part_from(l, c);
    if (reset)
        setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &abort, sizeof abort);
    if (c->wire)
        mprpc_wire_close(c->wire);
    else
        mprpc_descriptor_close(c->fd);
    discard(c);
}

/* Ends our side once all is sent, then waits, bounded, for the peer to end its own: closing with unread input would
 * reset the connection and throw away what the peer has not read yet. */
static void end(struct mprpc_loop *l, struct connection *c)
{
    if (!c->ended) {
        c->ended = 1;
        c->waiting = c->parked = 0;
        mprpc_bytes_free(&c->in);
        weigh(l, c);
        enlist(c, &l->lingering, l->now);
    }
    if (c->out.size == c->sent && !c->shut) {
        c->shut = 1;
        if (c->wire)
            mprpc_wire_shutdown(c->wire, 0);
        else
            shutdown(c->fd, SHUT_WR);
    }
    if (c->shut && c->peer_end)
        destroy(l, c, 0);
    else
        watch(l, c);
}

/* A connection that can't be read on. Only a framed one hears more of us than the end. */
static void broken(struct mprpc_loop *l, struct connection *c, int64_t reason)
{
    mprpc_count(&l->broken, 1);
    incident(l, c->fd, reason);
    if (c->session.dialect == MPRPC_FRAMED)
        end(l, c);
    else
        destroy(l, c, 1);
}

/* ---- output ---- */

static ssize_t send_some(const struct connection *c, struct iovec *parts, size_t count)
{
    struct msghdr m = {.msg_iov = parts, .msg_iovlen = count};
    ssize_t n;

    if (c->wire)
        return mprpc_wire_send(c->wire, parts, count);
    do
        n = count == 1 ? send(c->fd, parts->iov_base, parts->iov_len, MSG_NOSIGNAL | MSG_DONTWAIT)
                       : sendmsg(c->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
    while (n < 0 && errno == EINTR);
    return n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) ? 0 : n;
}

/* Sends both parts, keeps what does not fit. 0, or -1: the connection was destroyed. */
static int put(struct mprpc_loop *l, struct connection *c, const void *head, size_t head_size, const void *body,
               size_t body_size)
{
    struct iovec parts[2] = {{(void *)(uintptr_t)head, head_size}, {(void *)(uintptr_t)body, body_size}};
    size_t n = 0;

    if (c->shut)
        return 0;
    if (c->out.size == c->sent) {
        ssize_t sent = send_some(c, parts, body_size ? 2 : 1);
        if (sent < 0) {
            destroy(l, c, 0);
            return -1;
        }
        n = (size_t)sent;
        if (n == head_size + body_size)
            return 0;
    }
    size_t of_head = n < head_size ? n : head_size;
    if (mprpc_bytes_add(&c->out, (const uint8_t *)head + of_head, head_size - of_head) ||
        mprpc_bytes_add(&c->out, (const uint8_t *)body + (n - of_head), body_size - (n - of_head))) {
        incident(l, c->fd, MPRPC_NO_MEMORY);
        destroy(l, c, 1);
        return -1;
    }
    if (full(l, c) && !c->stuffed) {
        c->stuffed = 1;
        note(l, MPRPC_SLOW_READER);
    }
    if (full(l, c) && c->list == &l->frames)
        unlist(c); /* it is we who don't read: its frame can't make progress */
    watch(l, c);
    return 0;
}

static void enqueue(struct mprpc_loop *l, struct connection *c)
{
    if (l->queued == l->queue_room) {
        size_t room = l->queue_room ? l->queue_room * 2 : 64;
        uint64_t *queue = realloc(l->queue, room * sizeof *queue);
        if (!queue) {
            broken(l, c, MPRPC_NO_MEMORY);
            return;
        }
        l->queue = queue;
        l->queue_room = room;
    }
    l->queue[l->queued++] = key_of(c);
    c->waiting = 1;
    watch(l, c);
}

/* Its peer has read: what came before goes on. */
static void resume(struct mprpc_loop *l, struct connection *c)
{
    if (c->parked) {
        c->parked = 0;
        enqueue(l, c);
    } else if (!c->list && !c->waiting && (c->in.size || c->session.skip)) {
        c->progress = c->in.size;
        c->skip = c->session.skip;
        enlist(c, &l->frames, l->now);
    }
}

static void writable(struct mprpc_loop *l, struct connection *c)
{
    uint64_t key = key_of(c);
    struct iovec part = {c->out.at + c->sent, c->out.size - c->sent};
    ssize_t n = send_some(c, &part, 1);

    if (n < 0) {
        destroy(l, c, 0);
        return;
    }
    c->sent += (size_t)n;
    c->used = l->now;
    if (c->sent == c->out.size || c->sent > c->out.size / 2) { /* so each byte is moved at most once */
        mprpc_bytes_drop(&c->out, c->sent);
        c->sent = 0;
    }
    if (c->ended) {
        enlist(c, &l->lingering, l->now);
        end(l, c);
    } else {
        if (!full(l, c)) {
            c->stuffed = 0;
            resume(l, c);
        }
        if (connection_at(l, key) == c)
            watch(l, c);
    }
}

/* ---- from loop to loop ---- */

/* Nothing of it is under way in this loop: no call, so no ticket names it, and no byte either way. */
static int rests(const struct mprpc_loop *l, const struct connection *c)
{
#ifndef MPRPC_PLANT_HASTY /* for the tests, which must find it: a call's answer would find nobody */
    if (c->session.in_flight)
        return 0;
#endif
    return !c->in.size && !c->session.skip && c->out.size == c->sent && !c->list &&
           !(c->waiting | c->parked | c->ended | c->deserted | c->peer_end | c->taken) && !l->draining;
}

/* The loop that has the fewest connections of those at work, if this one has more than another: else NULL. */
static struct mprpc_loop *elsewhere(struct mprpc_loop *l)
{
    uint32_t active = mprpc_placement_active(l->placement);
    struct mprpc_loop *to = NULL;
    unsigned fewest = UINT_MAX;

    if (active != l->active) {
        l->active = active;
        l->even = 0;
    }
    if (l->number < active && l->even)
        return NULL;
    for (uint32_t i = 0; i < active; i++) {
        unsigned open = atomic_load(&l->loops[i]->open);
        if (open < fewest) {
            fewest = open;
            to = l->loops[i];
        }
    }
    if (l->number < active && fewest + 1 >= atomic_load(&l->open)) {
        l->even = 1;
        return NULL;
    }
    return to;
}

static void append(struct mprpc_loop *l, struct task *t);

/* Not to a loop that leaves: who is to hear GOAWAY stays where it will be said. */
static void move(struct mprpc_loop *l, struct connection *c, struct mprpc_loop *to)
{
    struct task *t = calloc(1, sizeof *t);

    if (!t)
        return; /* it stays */
    pthread_mutex_lock(&to->mutex);
    if (to->closed || to->grace != FOREVER) {
        pthread_mutex_unlock(&to->mutex);
        free(t);
        return;
    }
    atomic_fetch_add(&to->open, 1u); /* before it is counted here no more */
    part_from(l, c);
    mprpc_count(&l->moved, 1);
    t->fd = c->fd;
    t->wire = c->wire;
    t->moved = c;
    append(to, t);
    pthread_mutex_unlock(&to->mutex);
}

/* What a connection needs after the last answer it was waiting for: a classic one ends with it. It may be gone then. */
static void answered(struct mprpc_loop *l, struct connection *c)
{
    struct mprpc_loop *to;

    c->used = l->now;
    if (c->session.in_flight == 0 && (c->session.dialect == MPRPC_CLASSIC || c->peer_end))
        end(l, c);
    else if (l->placement && rests(l, c) && (to = elsewhere(l)))
        move(l, c, to);
}

/* One answer, straight to its connection. */
static void answer(struct mprpc_loop *l, uint64_t key, struct mprpc_reply *r, const uint8_t *payload, size_t size)
{
    uint8_t small[MPRPC_REPLY_ROOM + MPRPC_ERROR_TEXT_MAX], *head = small;
    struct connection *c = connection_at(l, key);

    if (!c || c->ended)
        return;
    if (r->text_size > MPRPC_ERROR_TEXT_MAX || r->details_size) {
        l->scratch.size = 0;
        if (mprpc_bytes_reserve(&l->scratch, (size_t)MPRPC_REPLY_ROOM + r->text_size + r->details_size)) {
            destroy(l, c, 1);
            return;
        }
        head = l->scratch.at;
    }
    r->payload_size = (uint32_t)size;
    int64_t n = mprpc_session_reply(&c->session, r, head);
    mprpc_count(&l->in_flight, (uint64_t)-1);
    if (n < 0) {
        destroy(l, c, 1);
        return;
    }
    if (c->session.dialect == MPRPC_CLASSIC && size > CLASSIC_READ)
        incident(l, c->fd, MPRPC_LONG_CLASSIC);
    if (put(l, c, n ? head : payload, n ? (size_t)n : size, n ? payload : NULL, n ? size : 0) == 0)
        answered(l, c);
}

static struct request *still_open(struct mprpc_loop *l, uint32_t i)
{
    struct request *q = i < l->count && l->requests[i].open && !is_parents(l) ? &l->requests[i] : NULL;

    if (q)
        q->open = 0;
    return q;
}

static struct mprpc_tally *tally(struct mprpc_loop *l, size_t i)
{
    return &l->tallies[l->records[i].method];
}

static struct mprpc_gate *gate(const struct mprpc_loop *l, uint32_t method)
{
    return l->gates && l->gate_of[method] != MPRPC_NO_GATE ? &l->gates[l->gate_of[method]] : NULL;
}

/* What is due when one of this turn's requests has its answer. ran: its time counts. */
static void over(struct mprpc_loop *l, size_t i, int32_t status, int ran)
{
    struct mprpc_gate *g = gate(l, l->records[i].method);

    mprpc_tally_end(tally(l, i), status);
    if (g)
        mprpc_gate_leave(g, ran ? clock_ns() - l->requests[i].received : 0);
}

void mprpc_loop_reply(struct mprpc_loop *l, uint32_t i, const uint8_t *payload, size_t size)
{
    struct request *q = still_open(l, i);
    struct mprpc_reply r = {0};

    if (!q)
        return;
    r.call_id = q->call_id;
    over(l, i, 0, 1);
    mprpc_tally_took(tally(l, i), clock_ns() - l->began);
    answer(l, q->connection, &r, payload, size);
}

void mprpc_loop_fail(struct mprpc_loop *l, uint32_t i, int32_t status, int not_run, const uint8_t *text,
                     size_t text_size, const uint8_t *details, size_t details_size)
{
    struct request *q = still_open(l, i);
    struct mprpc_reply r = {.status = status, .not_run = not_run != 0, .text = text, .text_size = (uint32_t)text_size,
                            .details = details, .details_size = (uint32_t)details_size};

    if (!q)
        return;
    r.call_id = q->call_id;
    over(l, i, status, !not_run);
    if (!not_run)
        mprpc_tally_took(tally(l, i), clock_ns() - l->began);
    answer(l, q->connection, &r, NULL, 0);
}

uint64_t mprpc_loop_begin(struct mprpc_loop *l)
{
    l->began = clock_ns();
    return l->began - l->now;
}

uint64_t mprpc_loop_time(const struct mprpc_loop *l)
{
    return l->began;
}

uint64_t mprpc_loop_ran(struct mprpc_loop *l, uint32_t i, int replied)
{
    uint64_t now = clock_ns(), took = now - l->began;

    if (replied)
        mprpc_tally_took(tally(l, i), took);
    l->began = now;
    return took;
}

int mprpc_loop_expired(struct mprpc_loop *l, uint32_t i)
{
    static const char text[] = "the deadline passed before the handler started";

    if (i >= l->count || !l->requests[i].deadline || l->requests[i].deadline > l->began)
        return 0;
    note(l, MPRPC_EXPIRED);
    mprpc_loop_fail(l, i, DEADLINE_EXCEEDED, 1, (const uint8_t *)text, sizeof text - 1, NULL, 0);
    return 1;
}

/* The replies of the last turn: all of one connection's in one send. */
static void flush(struct mprpc_loop *l, const uint8_t *replies, size_t size, const int32_t *sizes, size_t count)
{
    int32_t one = (int32_t)size;
    size_t i = 0;

    for (sizes = sizes ? sizes : &one; i < count && i < l->count;) {
        uint64_t key = l->requests[i].connection;
        struct connection *c = connection_at(l, key);
        l->scratch.size = 0;
        for (; i < count && i < l->count && l->requests[i].connection == key; i++) {
            if (sizes[i] < 0)
                continue;
            struct mprpc_reply r = {.call_id = l->requests[i].call_id, .payload_size = (uint32_t)sizes[i]};
            const uint8_t *payload = replies;
            replies += sizes[i];
            if (!l->requests[i].open)
                continue;
            l->requests[i].open = 0;
            over(l, i, 0, 1);
            if (!c || c->ended)
                continue;
            if (c->session.dialect == MPRPC_CLASSIC || sizes[i] >= LARGE ||
                mprpc_bytes_reserve(&l->scratch, (size_t)MPRPC_REPLY_ROOM + r.payload_size)) {
                if (l->scratch.size && put(l, c, l->scratch.at, l->scratch.size, NULL, 0) == 0)
                    l->scratch.size = 0;
                answer(l, key, &r, payload, r.payload_size);
                c = connection_at(l, key);
                continue;
            }
            l->scratch.size += (size_t)mprpc_session_reply(&c->session, &r, l->scratch.at + l->scratch.size);
            mprpc_count(&l->in_flight, (uint64_t)-1);
            memcpy(l->scratch.at + l->scratch.size, payload, r.payload_size);
            l->scratch.size += r.payload_size;
        }
        if (c && l->scratch.size && put(l, c, l->scratch.at, l->scratch.size, NULL, 0) == 0)
            answered(l, c);
    }
}

void mprpc_loop_flush(struct mprpc_loop *l, const uint8_t *replies, const int32_t *sizes, size_t count)
{
    l->now = clock_ns();
    flush(l, replies, 0, sizes, count);
}

/* ---- input ---- */

/* This turn takes no more. */
static int crowded(const struct mprpc_loop *l)
{
    return l->count == MPRPC_BATCH_MAX || l->arena_size > ARENA_FULL || l->held_count == MPRPC_BATCH_MAX;
}

static void expired_at_once(struct mprpc_loop *l, struct connection *c, uint64_t call_id)
{
    static const char text[] = "the deadline passed before the handler started";
    struct mprpc_reply r = {.call_id = call_id, .status = DEADLINE_EXCEEDED, .not_run = 1,
                            .text = (const uint8_t *)text, .text_size = sizeof text - 1};

    note(l, MPRPC_EXPIRED);
    answer(l, key_of(c), &r, NULL, 0);
}

/* Too many of its kind are under way: answered at once, in C, before it costs anything. */
static void turned_away(struct mprpc_loop *l, struct connection *c, uint64_t call_id)
{
    static const char text[] = "the provider is overloaded";
    struct mprpc_reply r = {.call_id = call_id, .status = RESOURCE_EXHAUSTED, .not_run = 1,
                            .text = (const uint8_t *)text, .text_size = sizeof text - 1};

    l->refusing = 1;
    note(l, MPRPC_OVERLOADED);
    answer(l, key_of(c), &r, NULL, 0);
}

/* A request of this turn is taken out before Python sees it; one that runs on the loop's thread is past by now, so what
 * is left may be a detached one. */
static void cancel(struct mprpc_loop *l, struct connection *c, uint64_t call_id)
{
    uint64_t key = key_of(c);
    uint32_t i = 0;

    while (i < l->count && (l->requests[i].connection != key || l->requests[i].call_id != call_id))
        i++;
    if (i == l->count) {
        if (c->session.in_flight)
            cancelled(l, key, call_id);
        return;
    }
    over(l, i, CANCELLED, 0);
    l->count--;
    memmove(&l->requests[i], &l->requests[i + 1], (l->count - i) * sizeof *l->requests);
    memmove(&l->records[i], &l->records[i + 1], (l->count - i) * sizeof *l->records);
    mprpc_session_unaccept(&c->session);
    mprpc_count(&l->in_flight, (uint64_t)-1);
}

/* Turns the session's events into requests of this turn. own: the bytes are not the arena's. */
static void take(struct mprpc_loop *l, struct connection *c, size_t count, uint64_t received, int own)
{
    uint64_t key = key_of(c);

    if (count)
        c->used = l->now;
    for (size_t i = 0; i < count; i++) {
        unsigned requests = l->events[i].frame.kind == MPRPC_REQUEST;
        mprpc_count(&l->in_flight, requests);
        mprpc_count(&l->taken, requests);
    }
    for (size_t i = 0; i < count; i++) {
        struct mprpc_event *e = &l->events[i];
        if (e->frame.kind == MPRPC_CANCEL) {
            cancel(l, c, e->frame.call_id);
            continue;
        }
        mprpc_tally_begin(&l->tallies[e->method]);
        if (e->deadline && e->deadline <= l->now) {
            mprpc_tally_end(&l->tallies[e->method], DEADLINE_EXCEEDED);
            expired_at_once(l, c, e->frame.call_id);
            if (connection_at(l, key) != c)
                return;
            continue;
        }
        struct mprpc_gate *g = gate(l, e->method);
        if (g && !mprpc_gate_enter(g)) {
            mprpc_tally_end(&l->tallies[e->method], RESOURCE_EXHAUSTED);
            turned_away(l, c, e->frame.call_id);
            if (connection_at(l, key) != c)
                return;
            continue;
        }
        uint32_t at = own ? 0 : (uint32_t)(e->frame.payload - l->arena);
        if (own)
            l->slow = MPRPC_TURN_SLOW;
        l->requests[l->count] = (struct request){.connection = key, .call_id = e->frame.call_id,
                                                 .deadline = e->deadline, .received = received,
                                                 .large = own ? e->frame.payload : NULL,
                                                 .held = own ? (uint32_t)l->held_count - 1 : 0,
                                                 .attempt = e->frame.attempt, .open = 1};
        if (own)
            l->users[l->held_count - 1]++;
        l->records[l->count++] = (struct mprpc_record){e->method, at, e->frame.payload_size};
    }
}

/* Whether what has come since it was last asked is worth as much again: a byte now and then is not, be it of a frame or
 * of a payload that is only discarded. */
static int progressed(const struct connection *c)
{
    uint64_t skip = c->session.skip;

    return skip ? c->skip < skip || c->skip - skip >= PROGRESS_MIN
                : c->in.size - c->progress >= PROGRESS_MIN || c->progress > c->in.size;
}

/* Keeps what the session has not used, and minds whether the frame that begins there makes progress. fresh: a frame
 * was finished. */
static void keep(struct mprpc_loop *l, struct connection *c, int fresh, size_t left)
{
    if (left == 0)
        mprpc_bytes_free(&c->in);
    if (left == 0 && c->session.skip == 0) {
        unlist(c);
        return;
    }
    if (left && left >= c->session.need) { /* the next turn is for it: nothing to wait for */
        unlist(c);
        enqueue(l, c);
    } else if (full(l, c)) {
        unlist(c);
    } else if (fresh || c->list != &l->frames || progressed(c)) {
        c->progress = c->in.size;
        c->skip = c->session.skip;
        enlist(c, &l->frames, l->now);
    }
}

static int no_room(const struct mprpc_loop *l, size_t more)
{
    return l->limits.input_max && more && l->buffered + more > l->limits.input_max;
}

/* The peer has ended its side before all that it sent was read. A framed one waits for none of it, and a loop that has
 * stood still for a while is not to run what its callers gave up long ago; for a classic one it is the usual way. */
static void desert(struct mprpc_loop *l, struct connection *c)
{
    if (c->session.in_flight)
        destroy(l, c, 0);
    else
        end(l, c);
}

/* Shows the session bytes[0, size): the arena's, or (own) those of c->in. Requests point into them, so they stay until
 * the next turn whatever becomes of the connection. */
static void consume(struct mprpc_loop *l, struct connection *c, const uint8_t *bytes, size_t size, uint64_t received,
                    int own)
{
    struct mprpc_bytes out = {0}, whole = {0};
    size_t count, room = MPRPC_BATCH_MAX - l->count;
    uint64_t key = key_of(c), skip = c->session.skip;
    int64_t used = mprpc_session_receive(&c->session, bytes, size, received, l->events,
                                         room < MPRPC_FAIR_MAX ? room : MPRPC_FAIR_MAX, &count, &out);

    int deserted = c->deserted && c->session.dialect == MPRPC_FRAMED;
    for (; deserted && count > 0; count--)
        if (l->events[count - 1].frame.kind == MPRPC_REQUEST)
            mprpc_session_unaccept(&c->session);
    if (own && used) {
        whole = c->in;
        memset(&c->in, 0, sizeof c->in);
    } else if (!own) {
        c->in.size = 0;
        l->arena_size += used > 0 ? (size_t)used : 0;
    }
    if (own && count) {
        l->users[l->held_count] = 0;
        l->held[l->held_count++] = whole.at;
    }
    c->taken = 1;
    take(l, c, count, received, own);
    if (connection_at(l, key) == c)
        c->taken = 0;
    if (connection_at(l, key) == c && out.size)
        put(l, c, out.at, out.size, NULL, 0);
    mprpc_bytes_free(&out);
    if (connection_at(l, key) == c && !c->ended) {
        size_t left = used < 0 ? 0 : size - (size_t)used;
        c->received = received;
        if (used < 0)
            broken(l, c, used);
        else if ((used || !own) && no_room(l, left))
            broken(l, c, MPRPC_NO_ROOM);
        else if ((used || !own) && mprpc_bytes_add(&c->in, bytes + used, left))
            broken(l, c, MPRPC_NO_MEMORY);
        else
            keep(l, c, (uint64_t)used > skip, left);
    }
    if (!count)
        free(whole.at);
    if (deserted && connection_at(l, key) == c && !c->ended)
        desert(l, c);
}

static void peer_ended(struct mprpc_loop *l, struct connection *c)
{
    c->peer_end = 1;
    if (c->ended) {
        end(l, c);
    } else if (c->session.in_flight && c->session.dialect == MPRPC_FRAMED) {
        destroy(l, c, 0); /* nobody waits for these calls any more */
    } else if (c->session.in_flight) {
        unlist(c);
        watch(l, c);
    } else if (c->out.size > c->sent) {
        end(l, c);
    } else {
        destroy(l, c, c->session.dialect == MPRPC_UNKNOWN && c->in.size);
    }
}

static void drained(struct mprpc_loop *l, struct connection *c, ssize_t n)
{
    c->discarded += (uint64_t)n;
    if (c->discarded > LINGER_BYTES)
        destroy(l, c, 0);
}

/* So many bytes more than before, at `bytes`, which are the arena's or (own) c->in's. */
static void arrived(struct mprpc_loop *l, struct connection *c, uint8_t *bytes, size_t more, size_t before, int own)
{
    l->now = clock_ns(); /* not from before they were here: a thread that slept in between would end deadlines too early */
    if (!own) {
        consume(l, c, bytes, before + more, l->now, 0);
        return;
    }
    c->in.size += more;
    if (c->in.size >= c->session.need)
        consume(l, c, c->in.at, c->in.size, l->now, 1);
    else
        keep(l, c, 0, c->in.size);
}

static void readable(struct mprpc_loop *l, struct connection *c)
{
    uint8_t *at = l->arena + l->arena_size;
    size_t before = c->in.size, room = MPRPC_CHUNK;
    int own = before >= MPRPC_CHUNK || (before && c->session.need > MPRPC_CHUNK);
    ssize_t n;

    if (own && !c->ended) {
        if (no_room(l, before)) {
            broken(l, c, MPRPC_NO_ROOM);
            return;
        }
        if (c->in.room - before < MPRPC_CHUNK && mprpc_bytes_reserve(&c->in, before)) { /* doubles with what came */
            broken(l, c, MPRPC_NO_MEMORY);
            return;
        }
        at = c->in.at + before;
        room = c->in.room - before;
        if (room > c->session.need - before + MPRPC_CHUNK) /* what comes behind it is copied for every few requests */
            room = c->session.need - before + MPRPC_CHUNK;
    } else if (before && !c->ended) {
        memcpy(at, c->in.at, before);
        at += before;
    }
    n = c->wire ? mprpc_wire_receive(c->wire, at, room) : recv(c->fd, at, room, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR))
        return;
    if (n < 0)
        destroy(l, c, 0);
    else if (n == 0)
        peer_ended(l, c);
    else if (c->ended)
        drained(l, c, n);
    else
        arrived(l, c, at - before, (size_t)n, before, own);
}

/* Frames that the last turn had no room for. Those that still find none stay in order. */
static void queue_on(struct mprpc_loop *l)
{
    size_t n = l->queued, kept = 0;
    uint64_t *queue = l->queue;

    if (n == 0)
        return;
    l->queue = NULL;
    l->queued = l->queue_room = 0;
    for (size_t i = 0; i < n; i++) {
        struct connection *c = connection_at(l, queue[i]);
        if (!c || c->ended)
            continue;
        if (crowded(l)) {
            queue[kept++] = queue[i];
            continue;
        }
        if (full(l, c)) { /* a request of some bytes may have an answer of megabytes */
            c->parked = 1;
            continue;
        }
        c->waiting = 0;
        if (c->in.size >= MPRPC_CHUNK) {
            consume(l, c, c->in.at, c->in.size, c->received, 1);
        } else {
            uint8_t *at = l->arena + l->arena_size;
            memcpy(at, c->in.at, c->in.size);
            consume(l, c, at, c->in.size, c->received, 0);
        }
        if (connection_at(l, queue[i]) == c) {
            weigh(l, c);
            watch(l, c);
        }
    }
    for (size_t i = 0; i < kept; i++) {
        struct connection *c = connection_at(l, queue[i]);
        if (c)
            enqueue(l, c);
    }
    free(queue);
}

/* ---- idle connections ---- */

/* Nothing is under way there, and nothing was for idle_timeout. PING does not count: a consumer that only asks whether
 * we live has no use for the connection. */
static int idle(const struct mprpc_loop *l, const struct connection *c)
{
    int unread = c->out.size > c->sent; /* our answers: then it is the peer that is idle, whatever is in flight */

    return c->used + l->limits.idle_timeout <= l->now &&
           (unread || !(c->session.in_flight || c->waiting || c->in.size || c->session.skip));
}

/* GOAWAY first, so that the peer ends its side when it has no call under way; whoever has not by the next round hears
 * the end. A request that crosses GOAWAY is answered not_run. */
static void reap(struct mprpc_loop *l, struct connection *c)
{
    struct mprpc_bytes out = {0};

    if (c->out.size > c->sent) {
        atomic_fetch_add(&l->broken, 1u);
        incident(l, c->fd, MPRPC_UNREAD);
        destroy(l, c, 1);
    } else if (c->session.dialect != MPRPC_FRAMED) {
        note(l, MPRPC_IDLE);
        destroy(l, c, 1);
    } else if (c->session.draining) {
        end(l, c);
    } else if (mprpc_session_drain(&c->session, &out) == 0) {
        note(l, MPRPC_IDLE);
        put(l, c, out.at, out.size, NULL, 0);
    }
    mprpc_bytes_free(&out);
}

/* A round over all connections takes a quarter of idle_timeout: so late may one be found, at no cost to calls. */
static void sweep(struct mprpc_loop *l)
{
    uint32_t until = l->room - l->swept > SWEEP ? l->swept + SWEEP : l->room;

    for (; l->swept < until; l->swept++) {
        struct connection *c = l->connections[l->swept];
        if (c && !c->ended && idle(l, c))
            reap(l, c);
    }
    if (l->swept == l->room)
        l->swept = 0;
    l->sweep_at = l->now + l->limits.idle_timeout / 4 / (l->room / SWEEP + 1);
}

/* ---- connections come ---- */

static int slots_grow(struct mprpc_loop *l)
{
    uint32_t room = l->room ? l->room * 2 : 64;
    struct connection **connections = realloc(l->connections, room * sizeof *connections);
    if (connections)
        l->connections = connections;
    uint32_t *generations = realloc(l->generations, room * sizeof *generations);
    if (generations)
        l->generations = generations;
    uint32_t *free_slots = realloc(l->free_slots, room * sizeof *free_slots);
    if (free_slots)
        l->free_slots = free_slots;
    if (!connections || !generations || !free_slots)
        return -1;
    for (uint32_t i = room; i-- > l->room;) {
        connections[i] = NULL;
        generations[i] = 0;
        free_slots[l->free_count++] = i;
    }
    l->room = room;
    return 0;
}

static void reset(int fd)
{
    struct linger abort = {1, 0};

    setsockopt(fd, SOL_SOCKET, SO_LINGER, &abort, sizeof abort);
    mprpc_descriptor_close(fd);
}

static void refuse(int fd, struct mprpc_wire *wire)
{
    if (wire)
        mprpc_wire_close(wire);
    else
        reset(fd);
}

/* l->open was counted by the loop that sent it here. 0, or -1: it was refused, and c is no more. */
static int settle(struct mprpc_loop *l, struct connection *c)
{
    if (l->free_count == 0 && slots_grow(l)) {
        incident(l, c->fd, MPRPC_NO_MEMORY);
        goto refused;
    }
    c->session.counts = l->counts;
    c->slot = l->free_slots[l->free_count - 1];
    c->generation = l->generations[c->slot];
    c->events = IN;
    c->used = l->now;
    if (poller_set(&l->poller, c->fd, key_of(c), IN, 1))
        goto refused;
    l->free_count--;
    l->connections[c->slot] = c;
    return 0;
refused:
    atomic_fetch_sub(&l->open, 1u);
    refuse(c->fd, c->wire);
    discard(c);
    return -1;
}

static void establish(struct mprpc_loop *l, int fd, struct mprpc_wire *wire)
{
    int on = 1;
    struct connection *c = calloc(1, sizeof *c);

    if (!c) {
        incident(l, fd, MPRPC_NO_MEMORY);
        atomic_fetch_sub(&l->open, 1u);
        refuse(fd, wire);
        return;
    }
    mprpc_session_init(&c->session, l->services, l->limits.payload_max, (int)l->limits.classic);
    c->session.calls_max = l->limits.calls_max;
    c->session.draining = (uint8_t)(l->draining != 0); /* without GOAWAY: it may be a classic one */
    c->fd = fd;
    c->wire = wire;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on); /* a unix socket has none */
    if (settle(l, c) == 0)
        mprpc_count(&l->accepted, 1);
}


/* With the mutex held, as append: a loop that has stopped has closed its descriptors under it. */
static void awaken(struct mprpc_loop *l)
{
    if (l->wake[1] < 0)
        return;
    ssize_t n = write(l->wake[1], "", 1); /* full: it is awake anyway */
    (void)n;
}

static void append(struct mprpc_loop *l, struct task *t)
{
    t->next = NULL;
    *l->tasks_end = t;
#ifdef MPRPC_PLANT_STRANDED /* for the tests, which must find it: who was handed on waits for what others do */
    if (t->moved) {
        l->tasks_end = &t->next;
        return;
    }
#endif
    if (l->tasks == t)
        awaken(l);
    l->tasks_end = &t->next;
}

/* Nobody will perform it. */
static void drop(struct mprpc_loop *l, struct task *t)
{
    if (t->fd >= 0) {
        atomic_fetch_sub(&l->open, 1u);
        refuse(t->fd, t->wire);
    }
    if (t->moved)
        discard(t->moved);
    free(t);
}

static void post(struct mprpc_loop *l, struct task *t)
{
    pthread_mutex_lock(&l->mutex);
    int closed = l->closed;
    if (!closed)
        append(l, t);
    pthread_mutex_unlock(&l->mutex);
    if (closed)
        drop(l, t);
}

static void spread(struct mprpc_loop *l, int fd)
{
    struct mprpc_loop *to = l->loops[0];
    uint32_t active = l->placement ? mprpc_placement_active(l->placement) : UINT32_MAX;
    unsigned total = 0, fewest = UINT_MAX;

    for (size_t i = 0; i < l->loops_count; i++) {
        unsigned open = atomic_load(&l->loops[i]->open);
        total += open;
        if (i < active && open < fewest) {
            fewest = open;
            to = l->loops[i];
        }
    }
    if (total >= l->limits.connections_max) {
        incident(l, fd, MPRPC_CROWDED);
        reset(fd);
        return;
    }
    atomic_fetch_add(&to->open, 1u);
    if (to == l) {
        establish(l, fd, NULL);
        return;
    }
    struct task *t = calloc(1, sizeof *t);
    if (!t) {
        atomic_fetch_sub(&to->open, 1u);
        reset(fd);
        return;
    }
    t->fd = fd;
    post(to, t);
}

static void close_if(int *fd)
{
    if (*fd >= 0)
        mprpc_descriptor_close(*fd);
    *fd = -1;
}

static void open_spare(struct mprpc_loop *l)
{
    if (l->spare < 0)
        l->spare = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (l->spare >= 0)
        mprpc_descriptor_keep(l->spare);
}

/* Out of descriptors: give up the spare one for a moment, so that the caller hears a reset instead of nothing, and
 * the listener does not stay ready for ever (the way of muduo's Acceptor). */
static void refuse_one(struct mprpc_loop *l, int listener)
{
    close_if(&l->spare);
    int fd = accept(listener, NULL, NULL);
    if (fd >= 0) {
        incident(l, fd, MPRPC_NO_DESCRIPTOR);
        reset(fd);
    } else {
        usleep(1000); /* another thread was quicker to the descriptor: do not spin on a listener that stays ready */
    }
    open_spare(l);
}

static void accept_some(struct mprpc_loop *l, int listener, int most)
{
    for (int i = 0; i < most; i++) {
#ifdef __linux__
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
#else
        int fd = accept(listener, NULL, NULL);
        if (fd >= 0 && (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0 || fcntl(fd, F_SETFL, O_NONBLOCK) < 0)) {
            close(fd);
            continue;
        }
#endif
        if (fd >= 0) {
            mprpc_descriptor_keep(fd);
            spread(l, fd);
        } else if (errno == EMFILE || errno == ENFILE) {
            refuse_one(l, listener);
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            return;
        } /* else: that one went away before it was accepted; the next */
    }
}

/* Whether another process that accepts on the same socket has clearly fewer connections: a quarter, so that a herd is
 * let in without each of them waiting for the others in turn. */
static int crowded_more(struct mprpc_loop *l)
{
    unsigned mine = 0, fewest = MPRPC_NOT_ACCEPTING;

    for (size_t i = 0; i < l->loops_count; i++)
        mine += atomic_load(&l->loops[i]->open);
    atomic_store(&l->crowd[l->crowd_mine], mine);
    for (size_t i = 0; i < l->crowd_count; i++) {
        unsigned other = atomic_load(&l->crowd[i]);
        fewest = other < fewest ? other : fewest;
    }
    return mine > fewest + fewest / 4;
}

/* The kernel wakes every process and the same one tends to be first, so that it would get nearly all connections: who
 * has more than another looks away for a moment, and takes one if it is still there then. */
static void accept_shared(struct mprpc_loop *l)
{
    if (l->yield_until == FOREVER && crowded_more(l)) {
        l->yield_until = l->now + YIELD;
        poller_set(&l->poller, l->shared, KEY_SHARED, 0, 0);
        return;
    }
    accept_some(l, l->shared, 1);
}

static void watch_shared(struct mprpc_loop *l)
{
    if (l->shared < 0 || l->yield_until > l->now)
        return;
    accept_shared(l);
    l->yield_until = FOREVER;
    poller_set(&l->poller, l->shared, KEY_SHARED, IN, 0);
}

static void leave_shared(struct mprpc_loop *l)
{
    if (l->shared < 0)
        return;
    atomic_store(&l->crowd[l->crowd_mine], MPRPC_NOT_ACCEPTING);
    poller_remove(&l->poller, l->shared);
    mprpc_descriptor_close(l->shared);
    l->shared = -1;
    l->yield_until = FOREVER;
}

/* ---- other threads ---- */

int mprpc_loop_answer(struct mprpc_loop *l, const struct mprpc_ticket *ticket, int32_t status, int not_run,
                      const uint8_t *text, size_t text_size, const uint8_t *details, size_t details_size,
                      const uint8_t *payload, size_t size)
{
    struct task *t = is_parents(l) ? NULL : malloc(sizeof *t + text_size + details_size + size);

    if (!t)
        return -1;
    *t = (struct task){.ticket = *ticket, .fd = -1, .status = status, .not_run = not_run != 0,
                       .text_size = (uint32_t)text_size, .details_size = (uint32_t)details_size, .size = size};
    if (text_size)
        memcpy(t->bytes, text, text_size);
    if (details_size)
        memcpy(t->bytes + text_size, details, details_size);
    if (size)
        memcpy(t->bytes + text_size + details_size, payload, size);
    post(l, t);
    return 0;
}

void mprpc_loop_remind(struct mprpc_loop *l, uint64_t at)
{
    if (is_parents(l))
        return;
    pthread_mutex_lock(&l->mutex);
    if (at < atomic_load(&l->remind_at)) {
        atomic_store(&l->remind_at, at);
        awaken(l); /* it may wait for longer */
    }
    pthread_mutex_unlock(&l->mutex);
}

int mprpc_loop_adopt(struct mprpc_loop *l, struct mprpc_wire *wire)
{
    struct task *t = calloc(1, sizeof *t);

    if (!t || atomic_fetch_add(&l->open, 1u) >= l->limits.connections_max) {
        if (t)
            atomic_fetch_sub(&l->open, 1u);
        mprpc_wire_close(wire);
        free(t);
        return -1;
    }
    t->fd = mprpc_wire_descriptor(wire);
    t->wire = wire;
    post(l, t);
    return 0;
}

void mprpc_loop_stop(struct mprpc_loop *l, uint64_t grace, uint64_t settle)
{
    if (is_parents(l))
        return;
    pthread_mutex_lock(&l->mutex);
    if (grace < l->grace)
        l->grace = grace;
    l->settle = settle;
    awaken(l);
    pthread_mutex_unlock(&l->mutex);
}

static void drain_all(struct mprpc_loop *l)
{
    l->draining = 1;
    leave_shared(l); /* what waits there is for those who stay */
    for (uint32_t i = 0; i < l->room; i++) {
        struct connection *c = l->connections[i];
        struct mprpc_bytes out = {0};
        if (!c || c->ended || c->session.dialect == MPRPC_CLASSIC)
            continue;
        if (c->session.dialect == MPRPC_UNKNOWN)
            c->session.draining = 1;
        else if (mprpc_session_drain(&c->session, &out) == 0 && out.size)
            put(l, c, out.at, out.size, NULL, 0);
        mprpc_bytes_free(&out);
    }
}

static void end_all(struct mprpc_loop *l)
{
    l->ending = 1;
    l->lingering.timeout = LINGER_STOP;
    if (l->listener >= 0) {
        poller_remove(&l->poller, l->listener);
        mprpc_descriptor_close(l->listener);
        l->listener = -1;
    }
    for (uint32_t i = 0; i < l->room; i++) {
        struct connection *c = l->connections[i];
        if (c && !c->ended && c->session.dialect == MPRPC_UNKNOWN && !c->waiting && !c->peer_end &&
            l->arena_size <= ARENA_FULL)
            readable(l, c); /* a request that is there is told that it never ran */
        if (!(c = l->connections[i]) || c->ended)
            continue;
        if (c->session.dialect == MPRPC_FRAMED)
            end(l, c);
        else
            destroy(l, c, 1);
    }
}

static void perform(struct mprpc_loop *l, struct task *t)
{
    struct mprpc_reply r = {.call_id = t->ticket.call_id, .status = t->status, .not_run = t->not_run,
                            .text = t->bytes, .text_size = t->text_size,
                            .details = t->bytes + t->text_size, .details_size = t->details_size};

    if (t->fd >= 0 && l->ending) {
        drop(l, t);
        return;
    }
    if (t->moved) {
        settle(l, t->moved);
    } else if (t->fd >= 0) {
        establish(l, t->fd, t->wire);
    } else {
        if (t->ticket.began) {
            mprpc_tally_end(&l->tallies[t->ticket.method], t->status);
            mprpc_tally_took(&l->tallies[t->ticket.method], l->now - t->ticket.began);
            struct mprpc_gate *g = gate(l, t->ticket.method);
            if (g)
                mprpc_gate_leave(g, t->not_run ? 0 : l->now - t->ticket.received);
        }
        answer(l, t->ticket.connection, &r, t->bytes + t->text_size + t->details_size, t->size);
    }
    free(t);
}

static void woken(struct mprpc_loop *l)
{
    char drop[64];

    while (read(l->wake[0], drop, sizeof drop) == sizeof drop)
        continue;
    pthread_mutex_lock(&l->mutex);
    struct task *t = l->tasks;
    l->tasks = NULL;
    l->tasks_end = &l->tasks;
    uint64_t grace = l->grace, settle = l->settle;
    pthread_mutex_unlock(&l->mutex);
    for (struct task *next; t; t = next) {
        next = t->next;
        perform(l, t);
    }
    if (grace == FOREVER)
        return;
    if (!l->draining) {
        drain_all(l);
        l->settled_at = l->now + settle;
    }
    if (l->now + grace < l->stop_at)
        l->stop_at = l->now + grace;
}

/* ---- the turn ---- */

/* When a loop that drains ends its connections: with nothing in flight, or out of patience. */
static uint64_t ends_at(const struct mprpc_loop *l)
{
    return l->in_flight == 0 && l->settled_at < l->stop_at ? l->settled_at : l->stop_at;
}

static void timers(struct mprpc_loop *l)
{
    int most = STALLED_MAX;

    while (!crowded(l) && due(&l->frames) <= l->now && most-- > 0) /* else it may be we who have not read */
        broken(l, l->frames.first, MPRPC_STALLED);
    while (due(&l->lingering) <= l->now && most-- > 0)
        destroy(l, l->lingering.first, 0);
    watch_shared(l);
    if (l->limits.idle_timeout && l->sweep_at <= l->now)
        sweep(l);
    if (!l->ending && ends_at(l) <= l->now)
        end_all(l);
    if (atomic_load_explicit(&l->remind_at, memory_order_relaxed) <= l->now) {
        atomic_store(&l->remind_at, FOREVER);
        l->slow = MPRPC_TURN_SLOW;
    }
}

static uint64_t patience(const struct mprpc_loop *l)
{
    uint64_t at = due(&l->frames);

    if (l->queued || l->slow)
        return 0;
    at = due(&l->lingering) < at ? due(&l->lingering) : at;
    at = l->yield_until < at ? l->yield_until : at;
    uint64_t remind_at = atomic_load_explicit(&l->remind_at, memory_order_relaxed);
    at = remind_at < at ? remind_at : at;
    if (l->limits.idle_timeout && l->free_count < l->room)
        at = l->sweep_at < at ? l->sweep_at : at;
    at = l->ending || ends_at(l) > at ? at : ends_at(l);
    return at == FOREVER ? FOREVER : at > l->now ? at - l->now : 0;
}

static int stopped(struct mprpc_loop *l)
{
    if (!l->ending || atomic_load(&l->open) != 0)
        return 0;
    pthread_mutex_lock(&l->mutex);
    l->closed = l->tasks == NULL;
    pthread_mutex_unlock(&l->mutex);
    return l->closed;
}

static void serve(struct mprpc_loop *l, const struct ready *r)
{
    struct connection *c;

    if ((uint32_t)r->key == KEY_WAKE) {
        woken(l);
    } else if ((uint32_t)r->key == KEY_LISTENER) {
        if (l->listener >= 0)
            accept_some(l, l->listener, ACCEPT_MAX);
    } else if ((uint32_t)r->key == KEY_SHARED) {
        if (l->shared >= 0)
            accept_shared(l);
    } else if ((c = connection_at(l, r->key))) {
        if (r->events & OUT && c->out.size > c->sent)
            writable(l, c);
        if (r->events & ENDED && connection_at(l, r->key) == c) {
            c->deserted = 1;
            if (c->session.dialect == MPRPC_FRAMED && !c->ended)
                desert(l, c);
        }
        if (r->events & IN && connection_at(l, r->key) == c && !c->waiting && !c->peer_end && !crowded(l))
            readable(l, c);
        else if (connection_at(l, r->key) == c && c->peer_end && !(r->events & OUT))
            destroy(l, c, 0); /* both sides have ended, or it was reset */
        if (connection_at(l, r->key) == c)
            weigh(l, c);
    }
}

/* Has called before, or is no connection of anybody's. */
static int is_known(struct mprpc_loop *l, uint64_t key)
{
    struct connection *c = connection_at(l, key);

    return (uint32_t)key == KEY_WAKE || (c && !c->ended && c->session.dialect != MPRPC_UNKNOWN);
}

/* Those first who have called before, all of them; then who comes, who goes, and who has not shown yet what it is, in
 * turn, as far as their time reaches. So a crowd of strangers costs the others that much a turn. The rest is ready again. */
static void serve_all(struct mprpc_loop *l, const struct ready *ready, uint32_t n)
{
    const struct ready *strangers[POLL_MAX];
    uint32_t count = 0, served = 0;

    for (uint32_t i = 0; i < n; i++)
        if (is_known(l, ready[i].key))
            serve(l, &ready[i]);
        else
            strangers[count++] = &ready[i];
    if (!count)
        return;
    uint64_t until = (l->now = clock_ns()) + STRANGERS;
    for (; served < count && l->now < until; served++) {
        serve(l, strangers[(l->strangers_from + served) % count]);
        l->now = clock_ns();
    }
    l->strangers_from += served;
}

/* No request points into what was received. */
static void release(struct mprpc_loop *l)
{
    while (l->held_count)
        free(l->held[--l->held_count]);
    l->arena_size = 0;
}

static void begin(struct mprpc_loop *l)
{
    release(l);
    if (l->scratch.room > ARENA)
        mprpc_bytes_free(&l->scratch);
    l->count = 0;
    l->refusing = 0;
    l->slow = l->incident_count || l->cancelled.size ? MPRPC_TURN_SLOW : 0;
}

/* Its descriptors go when it has stopped; its memory only when Python's collector comes upon it. */
static void let_go(struct mprpc_loop *l)
{
    pthread_mutex_lock(&l->mutex);
    close_if(&l->poller.ep);
    close_if(&l->listener);
    close_if(&l->shared);
    close_if(&l->spare);
    close_if(&l->wake[0]);
    close_if(&l->wake[1]);
    pthread_mutex_unlock(&l->mutex);
}


int64_t mprpc_loop_turn(struct mprpc_loop *l, const uint8_t *replies, size_t size, const int32_t *sizes, size_t count)
{
    return mprpc_loop_turn_within(l, replies, size, sizes, count, FOREVER);
}

int64_t mprpc_loop_turn_within(struct mprpc_loop *l, const uint8_t *replies, size_t size, const int32_t *sizes,
                               size_t count, uint64_t most)
{
    struct ready ready[POLL_MAX];

    if (is_parents(l))
        return MPRPC_TURN_STOPPED; /* a handler has forked, and this is the child */
    l->now = l->began > l->now ? l->began : clock_ns(); /* the last handler has ended right now */
    flush(l, replies, size, sizes, count);
    begin(l);
    uint64_t end = most == FOREVER ? FOREVER : clock_ns() + most;
    for (int rounds = 0; l->slow || !stopped(l); rounds++) {
        uint64_t left = end == FOREVER ? FOREVER : end > l->now ? end - l->now : 0, wait = patience(l);
        int n = poller_wait(&l->poller, ready, wait < left ? wait : left);
        l->now = clock_ns();
        if (n < 0)
            return l->slow;
        queue_on(l);
        serve_all(l, ready, (uint32_t)n);
        timers(l);
        l->began = l->now;
        if (l->refusing && l->queued && !l->slow && !crowded(l) && rounds < REFUSE_ROUNDS) {
            l->refusing = 0; /* what waits behind would be refused as well: not a turn later */
            continue;
        }
        if (l->gates && l->now >= l->adapt_at) {
            l->adapt_at = l->now + l->adapt_period;
            l->slow = MPRPC_TURN_SLOW;
        }
        if (l->count || l->slow)
            return (int64_t)l->arena_size << MPRPC_TURN_SHIFT | l->slow | l->count;
        release(l); /* all that came has been answered */
        if (l->now >= end)
            return 0;
    }
    let_go(l);
    return MPRPC_TURN_STOPPED;
}

/* ---- the rest of the face ---- */

struct mprpc_record *mprpc_loop_records(struct mprpc_loop *l)
{
    return l->records;
}

uint8_t *mprpc_loop_bytes(struct mprpc_loop *l)
{
    return l->arena;
}

size_t mprpc_loop_room(void)
{
    return ARENA;
}

const uint8_t *mprpc_loop_large(struct mprpc_loop *l, uint32_t i)
{
    return i < l->count ? l->requests[i].large : NULL;
}

void mprpc_loop_copied(struct mprpc_loop *l, uint32_t i)
{
    struct request *q = &l->requests[i];

    if (!q->large || --l->users[q->held])
        return;
    free(l->held[q->held]);
    l->held[q->held] = NULL;
    q->large = NULL;
}

uint64_t mprpc_loop_deadline(struct mprpc_loop *l, uint32_t i)
{
    return i < l->count ? l->requests[i].deadline : 0;
}

uint32_t mprpc_loop_attempt(struct mprpc_loop *l, uint32_t i)
{
    return i < l->count ? l->requests[i].attempt : 0;
}

uint64_t mprpc_loop_expiry(struct mprpc_loop *l)
{
    uint64_t first = FOREVER;

    for (uint32_t i = 0; i < l->count; i++)
        if (l->requests[i].deadline && l->requests[i].deadline < first)
            first = l->requests[i].deadline;
    return first;
}

void mprpc_loop_peer(struct mprpc_loop *l, uint32_t i, char *peer)
{
    struct connection *c = i < l->count ? connection_at(l, l->requests[i].connection) : NULL;

    peer_name(c ? c->fd : -1, peer);
}

void mprpc_loop_detach(struct mprpc_loop *l, uint32_t i, struct mprpc_ticket *ticket)
{
    struct request *q = still_open(l, i);

    *ticket = q ? (struct mprpc_ticket){q->connection, q->call_id, l->began, q->received, l->records[i].method}
                : (struct mprpc_ticket){.connection = UINT64_MAX};
}

size_t mprpc_loop_cancelled(struct mprpc_loop *l, struct mprpc_ticket *to, size_t room)
{
    size_t there = l->cancelled.size / sizeof *to, n = there < room ? there : room;

    if (n) {
        memcpy(to, l->cancelled.at, n * sizeof *to);
        mprpc_bytes_drop(&l->cancelled, n * sizeof *to);
    }
    return n;
}

size_t mprpc_loop_incidents(struct mprpc_loop *l, struct mprpc_incident *to, uint64_t *more)
{
    size_t n = l->incident_count;

    memcpy(to, l->incidents, n * sizeof *to);
    *more = l->incidents_lost;
    l->incident_count = 0;
    l->incidents_lost = 0;
    return n;
}

int mprpc_loop_gates(struct mprpc_loop *l, const uint8_t *gates, size_t methods, size_t count, uint32_t limit,
                     uint64_t period)
{
    l->gate_of = malloc(methods + 1);
    l->gates = l->gate_of ? calloc(count, sizeof *l->gates) : NULL;
    if (!l->gates)
        return -1;
    memcpy(l->gate_of, gates, methods);
    for (size_t i = 0; i < count; i++)
        l->gates[i].limit = limit;
    l->adapt_period = period;
    return 0;
}

void mprpc_loop_window(struct mprpc_loop *l, size_t i, struct mprpc_window *to)
{
    *to = l->gates[i].window;
    l->gates[i].window = (struct mprpc_window){.peak = l->gates[i].under_way};
}

void mprpc_loop_admit(struct mprpc_loop *l, size_t i, uint32_t limit)
{
    l->gates[i].limit = limit;
}

void mprpc_loop_counts(struct mprpc_loop *l, uint64_t *to)
{
    for (size_t i = 0; i < MPRPC_REASONS; i++)
        to[i] = atomic_load_explicit(&l->counts[i], memory_order_relaxed);
}

void mprpc_loop_statistics(struct mprpc_loop *l, struct mprpc_loop_statistics *to)
{
    *to = (struct mprpc_loop_statistics){atomic_load(&l->open), mprpc_counted(&l->accepted), mprpc_counted(&l->taken),
                                         mprpc_counted(&l->broken), mprpc_counted(&l->in_flight),
                                         mprpc_counted(&l->moved)};
}

void mprpc_loop_tally(struct mprpc_loop *l, uint32_t method, struct mprpc_tally *to)
{
    mprpc_tally_add(to, &l->tallies[method]);
}

/* ---- birth and death ---- */

static int descriptors(struct mprpc_loop *l, int use_poll)
{
    l->poller.ep = -1;
#ifdef __linux__
    if (!use_poll && (l->poller.ep = epoll_create1(EPOLL_CLOEXEC)) < 0)
        return -1;
    if (l->poller.ep >= 0)
        mprpc_descriptor_keep(l->poller.ep);
#else
    (void)use_poll;
#endif
    if (mprpc_descriptor_pipe(l->wake) < 0)
        return -1;
    return poller_set(&l->poller, l->wake[0], KEY_WAKE, IN, 1);
}

struct mprpc_loop *mprpc_loop_new(const struct mprpc_services *services, const struct mprpc_limits *limits,
                                  int use_poll)
{
    struct mprpc_loop *l = calloc(1, sizeof *l);

    if (!l)
        return NULL;
    l->born = mprpc_forks;
    l->services = services;
    l->limits = *limits;
    l->frames.timeout = limits->frame_timeout;
    l->lingering.timeout = LINGER;
    l->wake[0] = l->wake[1] = l->listener = l->shared = l->spare = -1;
    l->tasks_end = &l->tasks;
    l->grace = l->stop_at = l->settled_at = l->yield_until = FOREVER;
    atomic_init(&l->remind_at, FOREVER);
    pthread_mutex_init(&l->mutex, NULL);
    l->arena = malloc(ARENA);
    l->tallies = calloc((size_t)mprpc_services_methods(services) + 1, sizeof *l->tallies);
    if (!l->arena || !l->tallies || descriptors(l, use_poll) < 0) {
        int why = errno;
        mprpc_loop_free(l);
        errno = why;
        return NULL;
    }
    return l;
}

static int spread_over(struct mprpc_loop *l, struct mprpc_loop **loops, size_t count)
{
    if (l->loops)
        return 0;
    l->loops = calloc(count, sizeof *loops);
    if (!l->loops)
        return -1;
    memcpy(l->loops, loops, count * sizeof *loops);
    l->loops_count = count;
    return 0;
}

int mprpc_loop_place(struct mprpc_loop **loops, size_t count, struct mprpc_placement *placement)
{
    for (size_t i = 0; i < count; i++) {
        if (spread_over(loops[i], loops, count) < 0)
            return -1;
        loops[i]->placement = placement;
        loops[i]->number = (uint32_t)i;
    }
    return 0;
}

struct mprpc_placement *mprpc_loop_placement(const struct mprpc_loop *l)
{
    return l->placement;
}

int mprpc_loop_listen(struct mprpc_loop *l, int listener, struct mprpc_loop **loops, size_t count)
{
    open_spare(l);
    if (spread_over(l, loops, count) < 0 || poller_set(&l->poller, listener, KEY_LISTENER, IN, 1) < 0)
        return -1;
    l->listener = listener;
    mprpc_descriptor_keep(listener);
    return 0;
}

int mprpc_loop_share(struct mprpc_loop *l, int listener, struct mprpc_loop **loops, size_t count, void *crowd,
                     size_t processes, size_t mine)
{
    open_spare(l);
    if (spread_over(l, loops, count) < 0 || poller_set(&l->poller, listener, KEY_SHARED, IN, 1) < 0)
        return -1;
    l->shared = listener;
    mprpc_descriptor_keep(listener);
    l->crowd = crowd;
    l->crowd_count = processes;
    l->crowd_mine = mine;
    atomic_store(&l->crowd[mine], 0u);
    return 0;
}

void mprpc_loop_free(struct mprpc_loop *l)
{
    if (is_parents(l)) /* whose thread may have been in the middle of anything */
        return;
    for (uint32_t i = 0; i < l->room; i++)
        if (l->connections[i])
            destroy(l, l->connections[i], 0);
    for (struct task *t = l->tasks, *next; t; t = next) {
        next = t->next;
        drop(l, t);
    }
    while (l->held_count)
        free(l->held[--l->held_count]);
    let_go(l);
    free(l->poller.fds);
    free(l->poller.keys);
    free(l->connections);
    free(l->generations);
    free(l->free_slots);
    free(l->queue);
    free(l->loops);
    free(l->arena);
    free(l->tallies);
    free(l->gates);
    free(l->gate_of);
    mprpc_bytes_free(&l->scratch);
    mprpc_bytes_free(&l->cancelled);
    pthread_mutex_destroy(&l->mutex);
    free(l);
}
