/* What a connection's units share: _channel.c (calls that wait), _mailbox.c (calls that don't), _keeper.c (no calls). */
#ifndef MPRPC_LINK_H
#define MPRPC_LINK_H

#include <pthread.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#include "_fork.h"
#include "_mailbox.h"
#include "_wire.h"

struct mprpc_link {
    pthread_mutex_t mutex; /* of all but `in`, which is the reader's */
    struct mprpc_session session;
    struct mprpc_bytes in, out;
    size_t sent; /* bytes at the start of out */
    const uint8_t *lent;       /* the rest of a large frame, before what is in out; it lies in its caller's memory, */
    size_t lent_size;          /* who waits here as long as it does */
    struct mprpc_call *lender;
    struct mprpc_call *first, *last;
    uint64_t used;    /* when a call last ended */
    uint64_t patience; /* ns, as set for the socket's receiving */
    uint64_t heard;   /* when bytes last came */
    uint64_t asked;   /* when PING was sent that nothing has come after, 0: none */
    uint64_t acked;   /* bytes that the peer's kernel had acknowledged then */
    uint64_t keepalive_time, keepalive_timeout; /* ns; no time: never asked */
    size_t unsent_max;
    int64_t dead;     /* why, 0: alive */
    int fd;
    struct mprpc_wire *wire; /* of a connection within the process, or NULL */
    uint8_t reading, writing; /* somebody waits for input; somebody minds that out gets written */
    uint8_t boxed;            /* it is the mailbox's thread that reads */
    uint8_t owned;            /* and always will be: an event loop polls the descriptor */
    uint32_t mails;           /* calls in flight that end in the mailbox */
    uint64_t expiry;          /* no such call's deadline is before */
    struct mprpc_mailbox *box; /* constant once attached */
    uint64_t spin;            /* ns that the reader looks before it sleeps; constant */
    uint32_t vain, skip;      /* the reader's: how often in a row that was in vain; how often it will not look */
    struct mprpc_load *load;  /* where its calls are counted, or NULL */
    uint64_t now;             /* when something last came, or else the calls that end now end */
    unsigned born;            /* mprpc_forks then */
    struct { /* under the mutex of the one who has the list */
        struct mprpc_link *before, *after;
        size_t polled; /* its place among what is polled, 0 for none */
    } kept, mailed;
#ifndef __linux__
    pthread_cond_t changed;
#endif
};

/* Whether this is a forked child and the connection its parent's, of which a thread may have been anywhere. */
static inline int mprpc_link_parents(const struct mprpc_link *k)
{
    return k->born != mprpc_forks;
}

static inline uint64_t mprpc_clock(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

/* All with the link's mutex held. */
static inline int mprpc_link_unwritten(const struct mprpc_link *k)
{
    return k->out.size || k->lent_size;
}

void mprpc_link_die(struct mprpc_link *k, int64_t reason);
void mprpc_link_look(struct mprpc_link *k); /* takes what is there, without waiting; nobody else may be reading */
void mprpc_link_flush(struct mprpc_link *k);
void mprpc_link_promote(struct mprpc_link *k);
/* Numbers a call and writes its frame; hold: only behind what is to be written. Its call_id, or why not. A call that
 * ends as mail may have ended, and be freed, when this returns. */
int64_t mprpc_link_send(struct mprpc_link *k, struct mprpc_call *c, const uint8_t *names, size_t names_size,
                        const uint8_t *payload, size_t size, uint64_t timeout, uint32_t attempt, int hold);
/* CANCEL to the provider. */
void mprpc_link_tell_cancel(struct mprpc_link *k, uint64_t id);
/* It is no longer in flight; k->now is when it ended. */
void mprpc_link_drop(struct mprpc_link *k, struct mprpc_call *c, enum mprpc_load_verdict verdict);
void mprpc_link_end(struct mprpc_link *k, struct mprpc_call *c, int64_t outcome);

/* _keeper.c: every link from birth to death. */
void mprpc_keeper_add(struct mprpc_link *k);
void mprpc_keeper_remove(struct mprpc_link *k);
void mprpc_keeper_call(void); /* have it look again: a link has something to write and nobody who does */

/* _mailbox.c: the end of a call that nobody waits for; frees the call. */
void mprpc_mail(struct mprpc_link *k, struct mprpc_call *c, int64_t outcome, const struct mprpc_frame *f);
void mprpc_mailbox_call(struct mprpc_mailbox *box); /* have its thread look again */
void mprpc_mailbox_detach(struct mprpc_link *k);

#endif
