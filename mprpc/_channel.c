/* A connection that many threads call through. Strategy: whoever calls writes its own frame; whoever waits while nobody
 * reads, reads, hands the others their responses as they pass, and leaves the reading to the next when its own has come.
 * A single caller so pays for no second thread and no hand-over: send and receive are its only system calls. The roles
 * are taken and given back within one C call, under one mutex, which is never held across a system call that waits.
 * An idle connection is minded by the keeper, one thread for the process, so that PING is answered and GOAWAY seen. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "_link.h"

enum {
    CHUNK = 65536, /* what one receive has room for at least */
    COPIED = 4096, /* a payload up to this is copied behind its header: send costs 0.3 us less than sendmsg */
    EVENTS = 32,
    SPIN_RAREST = 6, /* a power of two */
};
static const uint64_t MS = 1000000;
static const uint64_t AIR = 500000000; /* ns after which a wait shows itself: a signal just before it ended nothing */
static const uint64_t IDLE = 1000000;    /* ns after which the peer may have gone: look before writing */

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
static int sleep_on(struct mprpc_link *k, struct mprpc_call *c, uint64_t end)
{
#ifdef __linux__
    uint32_t seen = atomic_load(&c->signal);
    struct timespec until = {(time_t)(end / UINT64_C(1000000000)), (long)(end % UINT64_C(1000000000))};

    c->asleep = 1;
    pthread_mutex_unlock(&k->mutex);
    long rc = syscall(SYS_futex, &c->signal, FUTEX_WAIT_BITSET_PRIVATE, seen, &until, NULL, FUTEX_BITSET_MATCH_ANY);
    int interrupted = rc < 0 && errno == EINTR;
    pthread_mutex_lock(&k->mutex);
    c->asleep = 0;
    return interrupted;
#else
    (void)end;
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
    if (k->load)
        mprpc_load_begin(k->load);
    c->pending = 1;
    c->after = NULL;
    c->before = k->last;
    *(k->last ? &k->last->after : &k->first) = c;
    k->last = c;
}

void mprpc_link_drop(struct mprpc_link *k, struct mprpc_call *c, enum mprpc_load_verdict verdict)
{
    if (k->load)
        mprpc_load_end(k->load, c->began, k->now, verdict);
    *(c->before ? &c->before->after : &k->first) = c->after;
    *(c->after ? &c->after->before : &k->last) = c->before;
    c->before = c->after = NULL;
    c->pending = 0;
}

/* What an answer says of the endpoint. */
static enum mprpc_load_verdict judged(const struct mprpc_frame *f)
{
    enum { DEADLINE_EXCEEDED = 4, RESOURCE_EXHAUSTED = 8, UNAVAILABLE = 14 };
    int failed = f->status == UNAVAILABLE || f->status == DEADLINE_EXCEEDED ||
                 (f->status == RESOURCE_EXHAUSTED && f->not_run);

    return failed ? MPRPC_LOAD_FAILED : MPRPC_LOAD_OK;
}

/* What it says that there is none. */
static enum mprpc_load_verdict judged_without(const struct mprpc_call *c, int64_t outcome)
{
    int ours = c->reason == MPRPC_LINK_CLOSED || c->reason == MPRPC_LINK_GOAWAY || c->reason == ENOMEM;

    if (outcome == MPRPC_CALL_TIMEOUT || (outcome == MPRPC_CALL_BROKEN && !ours))
        return MPRPC_LOAD_FAILED;
    return MPRPC_LOAD_UNDECIDED;
}

static void finish(struct mprpc_link *k, struct mprpc_call *c, int64_t outcome, enum mprpc_load_verdict verdict)
{
    mprpc_link_drop(k, c, verdict);
    c->outcome = outcome;
    if (c->mail)
        mprpc_mail(k, c, outcome, NULL);
    else
        wake(k, c);
}

void mprpc_link_end(struct mprpc_link *k, struct mprpc_call *c, int64_t outcome)
{
    finish(k, c, outcome, judged_without(c, outcome));
}

/* Nobody reads though somebody waits: the mailbox's thread does, or the first caller who can. */
void mprpc_link_promote(struct mprpc_link *k)
{
    if (k->reading || k->dead)
        return;
    if (k->mails) {
        k->reading = k->boxed = 1;
        mprpc_mailbox_call(k->box);
        return;
    }
    for (struct mprpc_call *c = k->first; c; c = c->after)
        if (!c->away) {
            wake(k, c);
            return;
        }
}

static _Atomic uint64_t counts[MPRPC_REASONS]; /* by reason's negative, over all connections */

static void tally(int64_t reason)
{
    if (reason < 0)
        atomic_fetch_add_explicit(&counts[-reason], 1u, memory_order_relaxed);
}

uint64_t mprpc_link_count(int64_t reason)
{
    return reason < 0 && reason > -MPRPC_REASONS ? atomic_load_explicit(&counts[-reason], memory_order_relaxed) : 0;
}

void mprpc_link_die(struct mprpc_link *k, int64_t reason)
{
    if (!k->dead) {
        k->dead = reason;
        tally(reason);
    }
    k->now = mprpc_clock();
    k->lent_size = 0;
    if (k->wire)
        mprpc_wire_shutdown(k->wire, 1);
    else
        shutdown(k->fd, SHUT_RDWR); /* whoever waits in recv wakes up */
    while (k->first) {
        k->first->reason = k->dead;
        mprpc_session_forget(&k->session, k->first->id);
        mprpc_link_end(k, k->first, MPRPC_CALL_BROKEN);
    }
}

/* ---- system calls, or what stands for them within the process ---- */

static ssize_t send_parts(struct mprpc_link *k, struct iovec *parts, size_t count)
{
    struct msghdr m = {.msg_iov = parts, .msg_iovlen = count};
    ssize_t n;

    if (k->wire)
        return mprpc_wire_send(k->wire, parts, count);
    do
        n = count == 1 ? send(k->fd, parts->iov_base, parts->iov_len, MSG_DONTWAIT | MSG_NOSIGNAL)
                       : sendmsg(k->fd, &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n;
}

/* Behind what is in k->in, which has room. */
static ssize_t receive(struct mprpc_link *k, int flags)
{
    uint8_t *to = k->in.at + k->in.size;
    size_t room = k->in.room - k->in.size;

    return k->wire ? mprpc_wire_receive(k->wire, to, room) : recv(k->fd, to, room, flags);
}

/* ---- output ---- */

/* What the socket takes of it; -1: no more for now, or the link has died. */
static ssize_t send_some(struct mprpc_link *k, const uint8_t *at, size_t size)
{
    struct iovec part = {(void *)(uintptr_t)at, size};
    ssize_t n = send_parts(k, &part, 1);

    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
        mprpc_link_die(k, errno);
    return n;
}

void mprpc_link_flush(struct mprpc_link *k)
{
    ssize_t n;

    while (k->lent_size) {
        if ((n = send_some(k, k->lent, k->lent_size)) < 0)
            return;
        k->lent += n;
        k->lent_size -= (size_t)n;
    }
    while (k->out.size > k->sent) {
        if ((n = send_some(k, k->out.at + k->sent, k->out.size - k->sent)) < 0)
            return;
        k->sent += (size_t)n;
        if (k->sent > k->out.size / 2 && k->sent < k->out.size) { /* so each byte is moved at most once */
            mprpc_bytes_drop(&k->out, k->sent);
            k->sent = 0;
        }
    }
    mprpc_bytes_free(&k->out);
    k->sent = 0;
}

/* The lender goes: what is left of its frame is copied, and stays before what came after it. */
static void take_over(struct mprpc_link *k, const struct mprpc_call *c)
{
    struct mprpc_bytes whole = {0};

    if (k->lender != c || !k->lent_size)
        return;
    if (mprpc_bytes_reserve(&whole, k->lent_size + k->out.size)) {
        mprpc_link_die(k, ENOMEM);
        return;
    }
    mprpc_bytes_add(&whole, k->lent, k->lent_size);
    mprpc_bytes_add(&whole, k->out.at, k->out.size); /* nothing of it has been sent */
    mprpc_bytes_free(&k->out);
    k->out = whole;
    k->lent_size = 0;
}

/* Writes a frame, or what of it the socket takes; the rest is left to whoever is on the connection. */
static void put(struct mprpc_link *k, struct mprpc_call *c, const uint8_t *head, size_t head_size,
                const uint8_t *payload, size_t size, int hold)
{
    struct iovec parts[2] = {{(void *)(uintptr_t)head, head_size}, {(void *)(uintptr_t)payload, size}};
    ssize_t n = 0;

    c->sent = 1;
    if (!mprpc_link_unwritten(k) && (!hold || k->wire)) { /* a wire takes all, and tells nobody of room for more */
        n = send_parts(k, parts, size ? 2 : 1);
        if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
            c->sent = 0; /* not a byte of it */
            mprpc_link_die(k, errno);
            return;
        }
        n = n < 0 ? 0 : n;
    }
    if ((size_t)n == head_size + size)
        return;
    size_t of_head = (size_t)n < head_size ? (size_t)n : head_size, of_payload = (size_t)n - of_head;
    if (n > 0 && of_head == head_size && !c->mail) { /* it is waited for: no copy */
        k->lent = payload + of_payload;
        k->lent_size = size - of_payload;
        k->lender = c;
        return;
    }
    if (mprpc_bytes_add(&k->out, head + of_head, head_size - of_head) ||
        mprpc_bytes_add(&k->out, payload + of_payload, size - of_payload))
        mprpc_link_die(k, ENOMEM);
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

    if (c->mail) {
        mprpc_link_drop(k, c, judged(f));
        mprpc_mail(k, c, outcome, f);
        return;
    }
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
    finish(k, c, outcome, judged(f));
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
            mprpc_link_end(k, c, MPRPC_CALL_BROKEN);
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
            mprpc_link_die(k, used);
            break;
        }
        at += (size_t)used;
        int goaway = 0;
        for (size_t i = 0; i < count; i++) {
            if (events[i].frame.kind == MPRPC_RESPONSE)
                deliver(k, &events[i], count == 1 && at == k->in.size);
            goaway |= events[i].frame.kind == MPRPC_GOAWAY;
        }
        if (goaway) /* it may refuse a call whose answer has come with it: that one has ended */
            gone(k);
    } while (used > 0 && k->in.at);
    if (k->in.at && at) {
        k->in.size -= at;
        memmove(k->in.at, k->in.at + at, k->in.size);
    }
    mprpc_link_flush(k);
    if (k->session.gone && !k->first && !k->dead)
        mprpc_link_die(k, MPRPC_LINK_GOAWAY); /* nothing is in flight: the provider waits for our end */
}

static int reserve(struct mprpc_link *k)
{
    size_t free = k->in.room - k->in.size, more = k->in.size * 3; /* in proportion to what came, whatever is promised */
    uint64_t wanted = k->session.need > k->in.size ? k->session.need - k->in.size : 0;

    if (free >= CHUNK / 2)
        return 0;
    more = wanted < more ? (size_t)wanted : more;
    return mprpc_bytes_reserve(&k->in, more > CHUNK ? more : CHUNK);
}

static void received(struct mprpc_link *k, ssize_t n, int why)
{
    if (n > 0) {
        k->now = k->heard = mprpc_clock();
        k->asked = 0;
        k->in.size += (size_t)n;
        process(k);
    } else if (n == 0) {
        mprpc_link_die(k, MPRPC_LINK_END);
    } else if (why != EAGAIN && why != EWOULDBLOCK && why != EINTR) {
        mprpc_link_die(k, why);
    }
}

/* One look at the socket that does not wait; nobody else reads. */
void mprpc_link_look(struct mprpc_link *k)
{
    if (reserve(k)) {
        mprpc_link_die(k, ENOMEM);
        return;
    }
    ssize_t n = receive(k, MSG_DONTWAIT);
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

/* Looks at the socket without a pause: who sleeps has to be woken, which costs more than a quick answer takes. Each look
 * in vain makes the next ones rarer, down to one of 64, so that slow answers cost next to no CPU. */
static ssize_t spin(struct mprpc_link *k)
{
    uint64_t until = mprpc_clock() + k->spin;
    ssize_t n;

    if (k->skip) {
        k->skip--;
        errno = EAGAIN;
        return -1;
    }
    do
        n = receive(k, MSG_DONTWAIT);
    while (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) && mprpc_clock() < until);
    k->vain = n >= 0 ? 0 : k->vain + (k->vain < SPIN_RAREST);
    k->skip = (1u << k->vain) - 1;
    return n;
}

/* As the reader: wait for input once, act on it. 1: a signal came. */
static int read_once(struct mprpc_link *k, uint64_t left)
{
    int write = (mprpc_link_unwritten(k) && !k->writing) || k->wire, why = EAGAIN;
    ssize_t n = -1;

    if (reserve(k)) {
        mprpc_link_die(k, ENOMEM);
        return 0;
    }
    k->reading = 1;
    k->boxed = 0;
    k->writing |= (uint8_t)write;
    if (!write)
        set_patience(k, left);
    pthread_mutex_unlock(&k->mutex);
    if (write) {
        struct pollfd p = {k->fd, (short)(k->wire ? POLLIN : POLLIN | POLLOUT), 0};
        if (poll(&p, 1, poll_ms(left)) < 0)
            why = errno;
        else if (p.revents & ~POLLOUT) {
            n = receive(k, MSG_DONTWAIT);
            why = errno;
        }
    } else {
        if (k->spin)
            n = spin(k);
        if (!k->spin || (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)))
            n = receive(k, 0);
        why = errno;
    }
    pthread_mutex_lock(&k->mutex);
    k->reading = 0;
    if (write) {
        k->writing = 0;
        mprpc_link_flush(k);
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
    mprpc_link_flush(k);
    return rc < 0 && why == EINTR;
}

/* ---- a call ---- */

/* What a caller who goes does for those who stay. Whoever reads may sit in recv, and all others sleep: what is left of
 * a frame is then the keeper's to write. */
static void leave(struct mprpc_link *k)
{
    mprpc_link_promote(k);
    if (mprpc_link_unwritten(k) && !k->writing)
        mprpc_keeper_call();
}

/* Nobody can wake a reader, so one whose call may be cancelled looks for that now and then. */
static uint64_t patience(const struct mprpc_call *c, uint64_t left)
{
    return c->cancelled && left > MPRPC_CANCEL_MS * MS ? MPRPC_CANCEL_MS * MS : left;
}

/* With the mutex held; gives it back. */
static int64_t await(struct mprpc_link *k, struct mprpc_call *c, uint64_t now)
{
    uint64_t air = now + AIR, end = c->deadline < air ? c->deadline : air;
    int interrupted = 0;

    for (c->away = 0; c->pending && !interrupted; now = c->pending ? mprpc_clock() : 0) {
        if (now >= c->deadline) {
            k->now = now;
            mprpc_session_forget(&k->session, c->id);
            mprpc_link_end(k, c, MPRPC_CALL_TIMEOUT);
        } else if (now >= air) {
            interrupted = 1;
        } else if (!k->reading || (k->boxed && !k->owned)) { /* the mailbox's thread may be busy with its mail */
            interrupted = read_once(k, patience(c, end - now));
        } else if (mprpc_link_unwritten(k) && !k->writing) {
            interrupted = write_once(k, end - now);
        } else {
            interrupted = sleep_on(k, c, end);
        }
    }
    take_over(k, c);
    c->away = c->pending;
    int64_t outcome = c->pending ? MPRPC_CALL_INTERRUPTED : c->outcome;
    if (!k->first)
        k->used = k->now;
    leave(k);
    pthread_mutex_unlock(&k->mutex);
    return outcome;
}

int64_t mprpc_link_send(struct mprpc_link *k, struct mprpc_call *c, const uint8_t *names, size_t names_size,
                        const uint8_t *payload, size_t size, uint64_t timeout, uint32_t attempt, int hold)
{
    uint8_t head[MPRPC_CALL_ROOM + MPRPC_NAMES_MAX + COPIED];
    uint64_t now = mprpc_clock(), ms = (timeout + MS - 1) / MS;

    c->began = now;
    c->deadline = now + timeout;
    c->sent = c->not_run = 0;
    if (!k->dead && !k->first && (!k->reading || k->owned) && now - k->used > IDLE)
        mprpc_link_look(k);
    c->reason = k->dead ? k->dead : k->session.gone ? MPRPC_LINK_GOAWAY : 0;
    if (c->reason)
        return MPRPC_CALL_BROKEN;
    if (k->unsent_max && k->out.size - k->sent > k->unsent_max) {
        tally(MPRPC_LINK_UNSENT);
        return MPRPC_CALL_FULL;
    }
    c->id = mprpc_session_call(&k->session, (uint64_t)(uintptr_t)c);
    if (!c->id)
        return MPRPC_CALL_FULL;
    enlist(k, c);
    k->mails += c->mail;
    size_t n = mprpc_put_call(head, names, (uint32_t)names_size, (uint32_t)size, c->id,
                              ms > UINT32_MAX ? UINT32_MAX : ms ? (uint32_t)ms : 1, attempt);
    if (size && size <= COPIED) {
        memcpy(head + n, payload, size);
        n += size;
        size = 0;
    }
    int64_t id = (int64_t)c->id;
    if (c->mail && c->deadline < k->expiry)
        k->expiry = c->deadline;
    put(k, c, head, n, payload, size, hold);
    return id;
}

int64_t mprpc_link_call(struct mprpc_link *k, struct mprpc_call *c, const uint8_t *names, size_t names_size,
                        const uint8_t *payload, size_t size, uint64_t timeout, uint32_t attempt,
                        const struct mprpc_flag *cancelled)
{
    int64_t id = MPRPC_CALL_CANCELLED;

    c->cancelled = cancelled;
    pthread_mutex_lock(&k->mutex);
    if (!cancelled || !atomic_load(&cancelled->set)) /* looked at under the mutex: who cancels takes it after setting it */
        id = mprpc_link_send(k, c, names, names_size, payload, size, timeout, attempt, 0);
    else
        c->sent = c->not_run = 0;
    if (id > 0)
        return await(k, c, timeout < MS ? mprpc_clock() : c->began); /* sending takes less than that */
    pthread_mutex_unlock(&k->mutex);
    return id;
}

/* A signal handler has forked, and this is the child: the call is the parent's. */
static int64_t disowned(struct mprpc_call *c, int sent)
{
    c->reason = MPRPC_LINK_CLOSED;
    c->sent = (uint8_t)sent;
    return MPRPC_CALL_BROKEN;
}

int64_t mprpc_link_wait(struct mprpc_link *k, struct mprpc_call *c)
{
    if (mprpc_link_parents(k))
        return disowned(c, 1);
    pthread_mutex_lock(&k->mutex);
    return await(k, c, mprpc_clock());
}

void mprpc_link_forget(struct mprpc_link *k, struct mprpc_call *c)
{
    if (mprpc_link_parents(k))
        return;
    pthread_mutex_lock(&k->mutex);
    if (c->pending) {
        k->now = mprpc_clock();
        mprpc_session_forget(&k->session, c->id);
        mprpc_link_drop(k, c, MPRPC_LOAD_UNDECIDED);
    }
    leave(k);
    pthread_mutex_unlock(&k->mutex);
}

void mprpc_link_tell_cancel(struct mprpc_link *k, uint64_t id)
{
    struct mprpc_reply cancel = {.call_id = id, .kind = MPRPC_CANCEL};
    uint8_t frame[MPRPC_REPLY_ROOM];

    if (!k->dead && mprpc_bytes_add(&k->out, frame, mprpc_put_reply(frame, &cancel)) == 0 && !k->owned)
        mprpc_link_flush(k);
}

int mprpc_link_cancel_call(struct mprpc_link *k, struct mprpc_flag *cancelled)
{
    struct mprpc_call *c = NULL;

    atomic_store(&cancelled->set, 1u);
    if (!k || mprpc_link_parents(k))
        return 0;
    pthread_mutex_lock(&k->mutex);
    for (c = k->first; c && c->cancelled != cancelled; c = c->after)
        continue;
    if (c) {
        uint64_t id = c->id;
        k->now = mprpc_clock();
        mprpc_session_forget(&k->session, id);
        mprpc_link_end(k, c, MPRPC_CALL_CANCELLED); /* its thread has the mutex to wait for, then it is gone */
        mprpc_link_tell_cancel(k, id);
        leave(k);
    }
    pthread_mutex_unlock(&k->mutex);
    return c != NULL;
}

void mprpc_call_clear(struct mprpc_call *c)
{
    free(c->block);
    free(c->words);
    c->block = c->large = c->words = NULL;
    c->text_size = c->details_size = 0;
}

/* ---- a connection ---- */

static struct mprpc_link *link_new(int fd, struct mprpc_wire *wire, uint32_t payload_max)
{
    struct mprpc_link *k = calloc(1, sizeof *k);

    if (!k)
        return NULL;
    pthread_mutex_init(&k->mutex, NULL);
#ifndef __linux__
    pthread_cond_init(&k->changed, NULL);
#endif
    mprpc_session_init(&k->session, NULL, payload_max, 0);
    k->session.counts = counts;
    k->fd = fd;
    k->wire = wire;
    k->used = k->now = k->heard = mprpc_clock();
    k->expiry = UINT64_MAX;
    k->born = mprpc_forks;
    if (!wire)
        mprpc_descriptor_keep(fd);
    mprpc_keeper_add(k);
    return k;
}

struct mprpc_link *mprpc_link_new(int fd, uint32_t payload_max)
{
    return link_new(fd, NULL, payload_max);
}

struct mprpc_link *mprpc_link_new_within(struct mprpc_wire *wire, uint32_t payload_max)
{
    return link_new(mprpc_wire_descriptor(wire), wire, payload_max);
}

void mprpc_link_measure(struct mprpc_link *k, struct mprpc_load *load)
{
    k->load = mprpc_load_hold(load);
}

void mprpc_link_spin(struct mprpc_link *k, uint64_t ns)
{
    k->spin = ns;
}

void mprpc_link_limit(struct mprpc_link *k, uint64_t time, uint64_t timeout, size_t unsent_max)
{
    pthread_mutex_lock(&k->mutex);
    k->keepalive_time = time;
    k->keepalive_timeout = timeout;
    k->unsent_max = unsent_max;
    pthread_mutex_unlock(&k->mutex);
    mprpc_keeper_call();
}

void mprpc_link_close(struct mprpc_link *k)
{
    if (mprpc_link_parents(k))
        return;
    pthread_mutex_lock(&k->mutex);
    mprpc_link_die(k, MPRPC_LINK_CLOSED);
    pthread_mutex_unlock(&k->mutex);
}

int64_t mprpc_link_check(struct mprpc_link *k)
{
    if (mprpc_link_parents(k))
        return MPRPC_LINK_CLOSED;
    pthread_mutex_lock(&k->mutex);
    if (!k->dead && !k->reading)
        mprpc_link_look(k);
    int64_t reason = k->dead ? k->dead : k->session.gone ? MPRPC_LINK_GOAWAY : 0;
    pthread_mutex_unlock(&k->mutex);
    return reason;
}

void mprpc_link_free(struct mprpc_link *k)
{
    if (mprpc_link_parents(k))
        return;
    mprpc_mailbox_detach(k);
    mprpc_keeper_remove(k);
    if (k->wire)
        mprpc_wire_close(k->wire);
    else
        mprpc_descriptor_close(k->fd);
    mprpc_session_free(&k->session);
    mprpc_bytes_free(&k->in);
    mprpc_bytes_free(&k->out);
    pthread_mutex_destroy(&k->mutex);
    mprpc_load_drop(k->load);
    free(k);
}
