/* The keeper: one thread for the process reads the connections that nobody calls through, so that PING is answered and
 * GOAWAY and the end are seen, and writes what a caller whose deadline has passed left of its frame. It takes either
 * only by trying, and lives as long as there are connections. Of all connections, whoever reads them, it minds that the
 * peer is still there: after a silence it sends PING, and ends the connection when nothing comes. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/tcp.h>
#include <netinet/in.h>
#endif

#include "_link.h"

static const uint64_t QUIET = 100000000; /* ns after which the keeper minds a connection, not the next caller */
enum { KEEPER_MS = 200 };                /* how often the keeper looks for connections that have become quiet */
static const uint64_t NEVER = UINT64_MAX;
enum { BREATH_MS = 50 };                 /* for which it leaves them alone once it was woken for a caller's answer */
enum { PING_ROOM = 64 }; /* more bytes than a PING takes, and than any frame of which the rest is worth waiting for */

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

/* An event loop that owns the connection polls for that itself. */
static int unwritten(const struct mprpc_link *k)
{
    return !k->dead && mprpc_link_unwritten(k) && !k->writing && !k->owned;
}

/* What the peer's kernel has taken of what we sent; 0 where nobody tells. */
static uint64_t acknowledged(const struct mprpc_link *k)
{
#ifdef __linux__
    struct tcp_info info = {0};
    socklen_t size = sizeof info;

    if (getsockopt(k->fd, IPPROTO_TCP, TCP_INFO, &info, &size) == 0)
        return info.tcpi_bytes_acked;
#else
    (void)k;
#endif
    return 0;
}

/* Whether silence says nothing: whoever reads is late with it, or a long request still moves, with our PING behind it. */
static int excused(struct mprpc_link *k)
{
    struct pollfd unread = {k->fd, POLLIN, 0};

    return poll(&unread, 1, 0) > 0 || acknowledged(k) > k->acked + PING_ROOM;
}

/* Minds that the peer is there. When to do so again. */
static uint64_t feel(struct mprpc_link *k, uint64_t now)
{
    uint64_t at = k->asked ? k->asked + k->keepalive_timeout : k->heard + k->keepalive_time;

    if (k->dead || !k->keepalive_time)
        return NEVER;
    if (at > now)
        return at;
    if (k->asked && !excused(k)) {
        mprpc_link_die(k, MPRPC_LINK_SILENT);
        return NEVER;
    }
    if (!k->asked && mprpc_session_ping(&k->session, &k->out) == 0 && !k->writing)
        mprpc_link_flush(k);
    k->asked = now;
    k->acked = acknowledged(k);
    return now + k->keepalive_timeout;
}

/* What to poll, and until when: the quiet ones, and those with something to write. *busy: some may become quiet. */
static size_t gather(struct pollfd **fds, size_t *room, int *busy, uint64_t *until)
{
    uint64_t now = mprpc_clock();
    size_t n = 1;

    *busy = 0;
    *until = NEVER;
    for (struct mprpc_link *k = keeper.first; k; k = k->kept.after) {
        k->kept.polled = 0;
        pthread_mutex_lock(&k->mutex);
        if (quiet(k) && k->session.gone)
            mprpc_link_die(k, MPRPC_LINK_GOAWAY); /* its last call timed out */
        uint64_t again = feel(k, now);
        *until = again < *until ? again : *until;
        int idle = quiet(k) && now - k->used > QUIET, dead = k->dead != 0, left = unwritten(k), take = idle || left;
        pthread_mutex_unlock(&k->mutex);
        if (take && n == *room) {
            struct pollfd *more = realloc(*fds, *room * 2 * sizeof **fds);
            take = more != NULL;
            *fds = more ? more : *fds;
            *room *= more ? 2 : 1;
        }
        short events = (short)((idle ? POLLIN : 0) | (left ? POLLOUT : 0));
        if (take)
            (*fds)[k->kept.polled = n++] = (struct pollfd){k->fd, events, 0};
        *busy |= !dead && !(take && idle);
    }
    return n;
}

static int patience(uint64_t until, int busy)
{
    uint64_t now = mprpc_clock(), ms = until <= now ? 0 : (until - now + 999999) / 1000000;

    return busy && ms > KEEPER_MS ? KEEPER_MS : until == NEVER ? -1 : ms > 3600000 ? 3600000 : (int)ms;
}

/* 0: there was nothing to do, as somebody calls through it again. */
static int mind(struct mprpc_link *k)
{
    pthread_mutex_lock(&k->mutex);
    uint64_t heard = k->heard;
    int done = unwritten(k);
    if (done)
        mprpc_link_flush(k);
    if (quiet(k))
        mprpc_link_look(k);
    done |= k->heard != heard || k->dead;
    if (quiet(k) && k->session.gone)
        mprpc_link_die(k, MPRPC_LINK_GOAWAY); /* nothing is in flight: the provider waits for our end */
    pthread_mutex_unlock(&k->mutex);
    return done;
}

/* Many connections that are called through now and then would wake it for each answer, to gather them all again. */
static void breathe(struct pollfd *wake)
{
    pthread_mutex_unlock(&keeper.mutex);
    poll(wake, 1, BREATH_MS);
    pthread_mutex_lock(&keeper.mutex);
}

static void *keep(void *unused)
{
    size_t room = 64;
    struct pollfd *fds = malloc(room * sizeof *fds);
    uint64_t until;
    int busy;
    char drop[64];

    pthread_mutex_lock(&keeper.mutex);
    while (fds && keeper.first) {
        fds[0] = (struct pollfd){keeper.wake[0], POLLIN, 0};
        size_t n = gather(&fds, &room, &busy, &until);
        pthread_mutex_unlock(&keeper.mutex);
        poll(fds, (nfds_t)n, patience(until, busy));
        pthread_mutex_lock(&keeper.mutex);
        while (fds[0].revents && read(keeper.wake[0], drop, sizeof drop) == sizeof drop)
            continue;
        int needless = 0;
        for (struct mprpc_link *k = keeper.first; k; k = k->kept.after)
            if (k->kept.polled && fds[k->kept.polled].revents)
                needless |= !mind(k);
        if (needless)
            breathe(fds);
    }
    keeper.running = 0;
    pthread_mutex_unlock(&keeper.mutex);
    free(fds);
    return unused;
}

void mprpc_keeper_call(void)
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

    if (keeper.wake[0] < 0 && mprpc_descriptor_pipe(keeper.wake) < 0)
        return;
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
    keeper.wake[0] = keeper.wake[1] = -1;
    keeper.first = NULL;
    keeper.running = 0;
}

static void mind_forks(void)
{
    pthread_atfork(NULL, NULL, forked);
}

void mprpc_keeper_add(struct mprpc_link *k)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;

    pthread_once(&once, mind_forks);
    pthread_mutex_lock(&keeper.mutex);
    k->kept.after = keeper.first;
    if (k->kept.after)
        k->kept.after->kept.before = k;
    keeper.first = k;
    if (!keeper.running)
        keeper_start();
    else
        mprpc_keeper_call();
    pthread_mutex_unlock(&keeper.mutex);
}

void mprpc_keeper_remove(struct mprpc_link *k)
{
    pthread_mutex_lock(&keeper.mutex);
    *(k->kept.before ? &k->kept.before->kept.after : &keeper.first) = k->kept.after;
    if (k->kept.after)
        k->kept.after->kept.before = k->kept.before;
    if (!keeper.first)
        mprpc_keeper_call(); /* with nothing to mind, the thread ends */
    pthread_mutex_unlock(&keeper.mutex);
}
