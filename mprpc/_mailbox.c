/* Strategy: a submitted call is a small block of C memory that dies into a mail; the bytes of all mails lie in one
 * buffer, so that Python takes a whole turn's responses in one copy. While such calls are in flight the mailbox's thread
 * has the reading of their connections, and callers that wait are woken by it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "_link.h"

static const uint64_t NEVER = UINT64_MAX;
enum { EAGER = 2048 }; /* bytes of held frames that are written at once, so that the provider works while more are made */

struct batch {
    struct mprpc_bytes mail, bytes;
};

struct mprpc_mailbox {
    pthread_mutex_t links_mutex; /* taken before a link's mutex; of first and left */
    struct mprpc_link *first;
    int left; /* its owner has freed it: it goes with the last link */
    pthread_mutex_t mutex; /* taken after a link's mutex; of what follows */
    struct batch filling;
    size_t mails; /* calls in flight, for each of which filling has room */
    int called;   /* its thread shall look again */
    int asleep;   /* it sits in poll: a byte in the pipe wakes it; awake it needs none, that saves two system calls */
    int woken;    /* it shall return */
    /* end; what follows is the thread's */
    struct batch taken;
    struct pollfd *fds;
    size_t room;
    int wake[2];
    unsigned born; /* mprpc_forks then */
};

/* ---- mail ---- */

static void call(struct mprpc_mailbox *box, int woken)
{
    pthread_mutex_lock(&box->mutex);
    int asleep = box->asleep;
    box->called = 1;
    box->asleep = 0;
    box->woken |= woken;
    pthread_mutex_unlock(&box->mutex);
    if (asleep) {
        ssize_t n = write(box->wake[1], "", 1);
        (void)n;
    }
}

void mprpc_mailbox_call(struct mprpc_mailbox *box)
{
    call(box, 0);
}

void mprpc_mailbox_wake(struct mprpc_mailbox *box)
{
    call(box, 1);
}

void mprpc_mail(struct mprpc_link *k, struct mprpc_call *c, int64_t outcome, const struct mprpc_frame *f)
{
    struct mprpc_mailbox *box = k->box;
    struct mprpc_mail mail = {.token = c->token, .outcome = outcome, .reason = c->reason, .sent = c->sent};

    pthread_mutex_lock(&box->mutex);
    struct mprpc_bytes *bytes = &box->filling.bytes;
    size_t room = f ? (size_t)f->payload_size + f->error_text_size + f->error_details_size : 0;
    mail.offset = bytes->size;
    if (mprpc_bytes_reserve(bytes, room + 1)) {
        mail.outcome = MPRPC_CALL_FULL;
    } else if (f && outcome >= 0) {
        mprpc_bytes_add(bytes, f->payload, f->payload_size);
    } else if (f) {
        mail.status = f->status;
        mail.not_run = f->not_run;
        mail.text_size = f->error_text_size;
        mail.details_size = f->error_details_size;
        mprpc_bytes_add(bytes, f->error_text, f->error_text_size);
        mprpc_bytes_add(bytes, f->error_details, f->error_details_size);
    }
    mprpc_bytes_add(&box->filling.mail, &mail, sizeof mail); /* room was reserved when the call was submitted */
    box->mails--;
    pthread_mutex_unlock(&box->mutex);
    k->mails--;
    free(c);
    if (!k->owned)
        mprpc_mailbox_call(box);
}

size_t mprpc_mailbox_take(struct mprpc_mailbox *box, struct mprpc_mail **mail, uint8_t **bytes, size_t *size)
{
    struct batch last = box->taken;

    last.mail.size = last.bytes.size = 0;
    if (last.bytes.room > 1 << 20)
        mprpc_bytes_free(&last.bytes); /* it was large once */
    pthread_mutex_lock(&box->mutex);
    int full = mprpc_bytes_reserve(&last.mail, box->mails * sizeof **mail); /* then the mail waits for memory */
    box->taken = full ? last : box->filling;
    box->filling = full ? box->filling : last;
    pthread_mutex_unlock(&box->mutex);
    *mail = (struct mprpc_mail *)(void *)box->taken.mail.at;
    *bytes = box->taken.bytes.at;
    *size = box->taken.bytes.size;
    return box->taken.mail.size / sizeof **mail;
}

/* ---- calls ---- */

/* Room for one more mail; -1 without memory. */
static int expect(struct mprpc_mailbox *box)
{
    pthread_mutex_lock(&box->mutex);
    int rc = mprpc_bytes_reserve(&box->filling.mail, (box->mails + 1) * sizeof(struct mprpc_mail));
    box->mails += rc == 0;
    pthread_mutex_unlock(&box->mutex);
    return rc;
}

static void expect_less(struct mprpc_mailbox *box)
{
    pthread_mutex_lock(&box->mutex);
    box->mails--;
    pthread_mutex_unlock(&box->mutex);
}

/* The mailbox's thread has the reading while calls that end as mail are in flight, if no caller has it. */
static void settle(struct mprpc_link *k)
{
    if (k->owned || k->dead)
        return;
    if (k->mails && !k->reading) {
        k->reading = k->boxed = 1;
        mprpc_mailbox_call(k->box);
    } else if (!k->mails && k->boxed) {
        k->reading = k->boxed = 0;
        k->used = mprpc_clock();
        mprpc_link_promote(k);
        if (mprpc_link_unwritten(k) && !k->writing)
            mprpc_keeper_call(); /* the rest of a frame whose call has ended */
    }
}

static void push(struct mprpc_link *k)
{
    if (!k->dead)
        mprpc_link_flush(k);
    settle(k);
    if (!k->owned && mprpc_link_unwritten(k))
        mprpc_mailbox_call(k->box);
}

/* Gives the call to the session, its frame to what is to be written; with the link's mutex held. *due: whether to flush. */
static int64_t enqueue(struct mprpc_link *k, struct mprpc_call *c, const struct mprpc_letter *l, int hold, int *due)
{
    uint64_t expiry = k->expiry;
    size_t held = k->out.size;
    int alone = !k->owned && !k->session.in_flight;
    int64_t id = mprpc_link_send(k, c, l->names, l->names_size, l->payload, l->size, l->timeout, l->attempt, hold);

    if (id < 0) {
        expect_less(k->box);
        return id;
    } /* it may have died of being sent: then its mail is there */
    *due = (alone || (held < EAGER && k->out.size >= EAGER)) && k->out.size && !k->dead;
    settle(k);
    if (!k->owned && ((mprpc_link_unwritten(k) && !*due) || k->expiry < expiry))
        mprpc_mailbox_call(k->box);
    return id;
}

int64_t mprpc_link_submit(struct mprpc_link *k, uint64_t token, const uint8_t *names, size_t names_size,
                          const uint8_t *payload, size_t size, uint64_t timeout, uint32_t attempt, int hold,
                          int64_t *reason)
{
    struct mprpc_letter letter = {token, names, names_size, payload, size, timeout, attempt};
    struct mprpc_call *c = calloc(1, sizeof *c);
    int64_t id = MPRPC_CALL_FULL;
    int due;

    if (!c || expect(k->box)) {
        free(c);
        return id;
    }
    c->mail = 1;
    c->token = token;
    pthread_mutex_lock(&k->mutex);
    id = enqueue(k, c, &letter, hold && (k->owned || k->session.in_flight), &due);
    if (id < 0) {
        if (reason)
            *reason = c->reason;
        free(c);
    } else if (due) {
        push(k);
    }
    pthread_mutex_unlock(&k->mutex);
    return id;
}

int64_t mprpc_link_post(struct mprpc_link *k, const struct mprpc_letter *letter, int wait, int *due)
{
    struct mprpc_call *c;
    int64_t id = MPRPC_CALL_FULL;

    *due = 0;
    if (!wait && pthread_mutex_trylock(&k->mutex))
        return MPRPC_CALL_BUSY;
    if (wait)
        pthread_mutex_lock(&k->mutex);
    c = calloc(1, sizeof *c);
    if (c && expect(k->box) == 0) {
        c->mail = 1;
        c->token = letter->token;
        id = enqueue(k, c, letter, 1, due);
    }
    pthread_mutex_unlock(&k->mutex);
    if (id < 0)
        free(c);
    return id;
}

void mprpc_link_push(struct mprpc_link *k)
{
    pthread_mutex_lock(&k->mutex);
    push(k);
    pthread_mutex_unlock(&k->mutex);
}

int mprpc_link_cancel(struct mprpc_link *k, uint64_t id)
{
    if (mprpc_link_parents(k))
        return 0;
    pthread_mutex_lock(&k->mutex);
    uint64_t tag = mprpc_session_tag(&k->session, id);
    struct mprpc_call *c = (struct mprpc_call *)(uintptr_t)tag;
    if (tag) {
        k->now = mprpc_clock();
        mprpc_session_forget(&k->session, id);
        mprpc_link_drop(k, c, MPRPC_LOAD_UNDECIDED);
        k->mails--;
        free(c);
        expect_less(k->box);
        mprpc_link_tell_cancel(k, id);
        settle(k);
        if (!k->owned && mprpc_link_unwritten(k) && k->mails)
            mprpc_mailbox_call(k->box);
    }
    pthread_mutex_unlock(&k->mutex);
    return tag != 0;
}

/* Ends what has expired; k->expiry is a bound, so most turns have nothing to look for. */
static void expire(struct mprpc_link *k, uint64_t now)
{
    if (now < k->expiry)
        return;
    k->now = now;
    k->expiry = NEVER;
    for (struct mprpc_call *c = k->first, *next; c; c = next) {
        next = c->after;
        if (c->mail && c->deadline <= now) {
            mprpc_session_forget(&k->session, c->id);
            mprpc_link_end(k, c, MPRPC_CALL_TIMEOUT);
        } else if (c->mail && c->deadline < k->expiry) {
            k->expiry = c->deadline;
        }
    }
}

/* ---- an event loop's turn ---- */

int mprpc_link_turn(struct mprpc_link *k, int read, uint64_t *expiry)
{
    if (mprpc_link_parents(k))
        return -1;
    pthread_mutex_lock(&k->mutex);
    if (read && !k->dead)
        mprpc_link_look(k);
    if (!k->dead)
        mprpc_link_flush(k);
    expire(k, mprpc_clock());
    if (k->session.gone && !k->first && !k->dead)
        mprpc_link_die(k, MPRPC_LINK_GOAWAY);
    int told = k->dead ? -1 : mprpc_link_unwritten(k);
    *expiry = k->expiry;
    pthread_mutex_unlock(&k->mutex);
    return told;
}

int mprpc_link_descriptor(const struct mprpc_link *k)
{
    return k->fd;
}

/* ---- the mailbox's thread ---- */

/* What to poll, and until when. Where a caller reads, the writing and the deadlines are still this thread's. */
static size_t gather(struct mprpc_mailbox *box, uint64_t *until)
{
    size_t n = 1, room = 1;

    for (struct mprpc_link *k = box->first; k; k = k->mailed.after)
        room++;
    if (room > box->room) {
        struct pollfd *more = realloc(box->fds, room * 2 * sizeof *more);
        box->fds = more ? more : box->fds;
        box->room = more ? room * 2 : box->room;
    }
    for (struct mprpc_link *k = box->first; k; k = k->mailed.after) {
        k->mailed.polled = 0;
        pthread_mutex_lock(&k->mutex);
        settle(k);
        if (k->mails && !k->dead)
            mprpc_link_flush(k); /* it may die of it */
        if (n < box->room && k->mails && !k->dead && !k->owned) {
            short events = (short)((k->boxed ? POLLIN : 0) | (mprpc_link_unwritten(k) && !k->writing ? POLLOUT : 0));
            box->fds[k->mailed.polled = n++] = (struct pollfd){events ? k->fd : -1, events, 0};
            *until = k->expiry < *until ? k->expiry : *until;
        }
        pthread_mutex_unlock(&k->mutex);
    }
    return n;
}

static void serve(struct mprpc_link *k, short events, uint64_t now)
{
    pthread_mutex_lock(&k->mutex);
    if (k->boxed && !k->dead && events & ~POLLOUT)
        mprpc_link_look(k);
    if (!k->dead && events & POLLOUT)
        mprpc_link_flush(k);
    expire(k, now);
    settle(k);
    pthread_mutex_unlock(&k->mutex);
}

/* Whether there is a reason not to sleep; else the thread is asleep from now on. */
static int busy(struct mprpc_mailbox *box)
{
    pthread_mutex_lock(&box->mutex);
    int is = box->filling.mail.size || box->called || box->woken;
    box->asleep = !is;
    pthread_mutex_unlock(&box->mutex);
    return is;
}

enum { NOTHING, MAIL, WOKEN };

static int awake(struct mprpc_mailbox *box)
{
    pthread_mutex_lock(&box->mutex);
    box->asleep = 0;
    int what = box->filling.mail.size ? MAIL : box->woken ? WOKEN : NOTHING;
    box->woken = 0;
    pthread_mutex_unlock(&box->mutex);
    return what;
}

static int look(struct mprpc_mailbox *box, uint64_t until)
{
    char drop[64];

    pthread_mutex_lock(&box->mutex);
    box->called = 0; /* whatever it was about is gathered now */
    pthread_mutex_unlock(&box->mutex);
    pthread_mutex_lock(&box->links_mutex);
    size_t n = gather(box, &until);
    pthread_mutex_unlock(&box->links_mutex);
    struct pollfd only, *fds = box->fds ? box->fds : &only;
    fds[0] = (struct pollfd){box->wake[0], POLLIN, 0};
    uint64_t now = mprpc_clock(), left = until <= now ? 0 : until - now, ms = (left + 999999) / 1000000;
    poll(fds, (nfds_t)n, busy(box) || ms == 0 ? 0 : ms > 3600000 ? 3600000 : (int)ms);
    if (fds[0].revents)
        while (read(box->wake[0], drop, sizeof drop) == sizeof drop)
            continue;
    now = mprpc_clock();
    pthread_mutex_lock(&box->links_mutex);
    for (struct mprpc_link *k = box->first; k; k = k->mailed.after)
        if (k->mailed.polled)
            serve(k, fds[k->mailed.polled].revents, now);
    pthread_mutex_unlock(&box->links_mutex);
    return awake(box);
}

int mprpc_mailbox_wait(struct mprpc_mailbox *box, uint64_t timeout)
{
    uint64_t now = mprpc_clock(), until = timeout > NEVER - now ? NEVER : now + timeout;
    int what;

    do
        what = look(box, until);
    while (what == NOTHING && mprpc_clock() < until);
    return what == MAIL;
}

/* ---- birth and death ---- */

struct mprpc_mailbox *mprpc_mailbox_new(void)
{
    struct mprpc_mailbox *box = calloc(1, sizeof *box);

    if (!box || mprpc_descriptor_pipe(box->wake) < 0) {
        free(box);
        return NULL;
    }
    pthread_mutex_init(&box->links_mutex, NULL);
    pthread_mutex_init(&box->mutex, NULL);
    box->born = mprpc_forks;
    return box;
}

static void bury(struct mprpc_mailbox *box)
{
    mprpc_descriptor_close(box->wake[0]);
    mprpc_descriptor_close(box->wake[1]);
    free(box->fds);
    mprpc_bytes_free(&box->filling.mail);
    mprpc_bytes_free(&box->filling.bytes);
    mprpc_bytes_free(&box->taken.mail);
    mprpc_bytes_free(&box->taken.bytes);
    pthread_mutex_destroy(&box->links_mutex);
    pthread_mutex_destroy(&box->mutex);
    free(box);
}

void mprpc_mailbox_free(struct mprpc_mailbox *box)
{
    if (box->born != mprpc_forks) /* the parent's */
        return;
    pthread_mutex_lock(&box->links_mutex);
    box->left = 1;
    int alone = !box->first;
    pthread_mutex_unlock(&box->links_mutex);
    if (alone)
        bury(box);
}

void mprpc_link_attach(struct mprpc_link *k, struct mprpc_mailbox *box, int owned)
{
    pthread_mutex_lock(&box->links_mutex);
    pthread_mutex_lock(&k->mutex); /* the keeper knows it already */
    if (!k->box) {
        k->box = box;
        k->mailed.after = box->first;
        if (k->mailed.after)
            k->mailed.after->mailed.before = k;
        box->first = k;
        if (owned)
            k->owned = k->boxed = k->reading = 1;
    }
    pthread_mutex_unlock(&k->mutex);
    pthread_mutex_unlock(&box->links_mutex);
}

void mprpc_mailbox_detach(struct mprpc_link *k)
{
    struct mprpc_mailbox *box = k->box;

    if (!box)
        return;
    for (struct mprpc_call *c = k->first, *next; c; c = next) { /* nobody is left who would take their mail */
        next = c->after;
        mprpc_link_drop(k, c, MPRPC_LOAD_UNDECIDED);
        free(c);
        expect_less(box);
    }
    pthread_mutex_lock(&box->links_mutex);
    *(k->mailed.before ? &k->mailed.before->mailed.after : &box->first) = k->mailed.after;
    if (k->mailed.after)
        k->mailed.after->mailed.before = k->mailed.before;
    int last = box->left && !box->first;
    pthread_mutex_unlock(&box->links_mutex);
    if (last)
        bury(box);
}
