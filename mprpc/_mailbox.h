/* Calls that nobody waits for: futures and asyncio. They end as mail, taken many at a time. */
#ifndef MPRPC_MAILBOX_H
#define MPRPC_MAILBOX_H

#include "_channel.h"

/* How one call ended. Its response, or text and then details, lie at offset in the mailbox's bytes. */
struct mprpc_mail {
    uint64_t token;
    int64_t outcome, reason; /* as mprpc_link_call's */
    uint64_t offset;
    uint32_t text_size, details_size;
    int32_t status;
    uint8_t not_run, sent;
};

struct mprpc_mailbox;

struct mprpc_mailbox *mprpc_mailbox_new(void); /* NULL without memory or descriptors */
/* Nobody may wait or take any more. Links may outlive it: it goes with the last one. */
void mprpc_mailbox_free(struct mprpc_mailbox *box);
/* Before the link's first submitted call; for good, and again changes nothing. owned: an event loop polls the link's descriptor and calls
 * mprpc_link_turn; else whoever is in mprpc_mailbox_wait reads while submitted calls are in flight. */
void mprpc_link_attach(struct mprpc_link *link, struct mprpc_mailbox *box, int owned);

/* Any thread. Starts a call; its call_id, or an mprpc_outcome (why then in *reason, unless that is NULL). attempt: 0 for
 * the first. hold: the frame may wait for others to be written with it, until mprpc_link_turn or mprpc_mailbox_wait. */
int64_t mprpc_link_submit(struct mprpc_link *link, uint64_t token, const uint8_t *names, size_t names_size,
                          const uint8_t *payload, size_t size, uint64_t timeout, uint32_t attempt, int hold,
                          int64_t *reason);
/* A call as mprpc_link_submit has it, held, for who has a lock that others want: with `wait` 0, where somebody is on the
 * connection, it is MPRPC_CALL_BUSY instead. Makes no system call that takes long; *due: mprpc_link_push is to be called
 * next, whoever else has what lock. */
struct mprpc_letter {
    uint64_t token;
    const uint8_t *names;
    size_t names_size;
    const uint8_t *payload;
    size_t size;
    uint64_t timeout;
    uint32_t attempt;
};
enum { MPRPC_CALL_BUSY = -7 };
int64_t mprpc_link_post(struct mprpc_link *link, const struct mprpc_letter *letter, int wait, int *due);
void mprpc_link_push(struct mprpc_link *link);
/* Any thread. CANCEL to the provider, and no mail: 1; 0 when the call has ended, so that its mail comes or has come. */
int mprpc_link_cancel(struct mprpc_link *link, uint64_t call_id);

/* The event loop's thread: writes what waits, ends what has expired, with `read` reads what is there before. 1: tell me
 * when it can be written; -1: the link has died. *expiry: when to call again at the latest, monotonic ns or UINT64_MAX. */
int mprpc_link_turn(struct mprpc_link *link, int read, uint64_t *expiry);
int mprpc_link_descriptor(const struct mprpc_link *link);

/* One thread at a time: reads for all attached links until there is mail, 1, or `timeout` ns have passed or it was
 * woken, 0. */
int mprpc_mailbox_wait(struct mprpc_mailbox *box, uint64_t timeout);
void mprpc_mailbox_wake(struct mprpc_mailbox *box); /* any thread */
/* The mail that is there, and what its offsets point into: both until the next call. */
size_t mprpc_mailbox_take(struct mprpc_mailbox *box, struct mprpc_mail **mail, uint8_t **bytes, size_t *size);

#endif
