/* A channel's connection: the system calls around a client session, for any number of calling threads. */
#ifndef MPRPC_CHANNEL_H
#define MPRPC_CHANNEL_H

#include "_load.h"
#include "_session.h"
#include "_wire.h"

enum {
    MPRPC_CALL_SMALL = 8192, /* a response up to this is copied into the call itself */
    MPRPC_CANCEL_MS = 10,    /* how often a reader whose call may be cancelled looks whether it is */
};

/* How a call ended, when not with a response (then: its size, 0 or more). */
enum mprpc_outcome {
    MPRPC_CALL_FAILED = -1,      /* the provider says so: status, not_run, text, details */
    MPRPC_CALL_TIMEOUT = -2,     /* the deadline passed; a late answer reaches nobody */
    MPRPC_CALL_BROKEN = -3,      /* the connection ended: reason (errno above 0, mprpc_why below), sent */
    MPRPC_CALL_INTERRUPTED = -4, /* a signal may have come: mprpc_link_wait goes on, mprpc_link_forget gives up */
    MPRPC_CALL_FULL = -5,        /* MPRPC_CALLS_MAX in flight, unsent_max bytes waiting, or no memory; nothing was sent */
    MPRPC_CALL_CANCELLED = -6,   /* mprpc_link_cancel_call; the provider has been told if it was sent */
};
/* Reasons of this side. */
enum {
    MPRPC_LINK_END = -60,
    MPRPC_LINK_CLOSED = -61,
    MPRPC_LINK_GOAWAY = -62,
    MPRPC_LINK_SILENT = -63, /* PING was not answered */
    MPRPC_LINK_UNSENT = -59, /* only counted: a call over unsent_max was refused */
};

/* Set once, by whoever cancels a call. Zeroed at first; lives as long as a call has it. */
struct mprpc_flag {
    _Atomic uint32_t set;
};

/* One call: its caller's, who may use it again once it has ended. Zeroed at first, but for small. */
struct mprpc_call {
    uint64_t id, began, deadline, token;
    struct mprpc_call *before, *after; /* in flight on the same connection, in order */
    uint8_t *small;                    /* the caller's room of MPRPC_CALL_SMALL bytes for the response */
    uint8_t *large;                    /* a bigger response's bytes, from mprpc_call_take */
    uint8_t *block;                    /* what holds them */
    uint8_t *words;                    /* text, then details */
    int64_t outcome, reason;
    uint32_t text_size, details_size;
    int32_t status;
    const struct mprpc_flag *cancelled; /* the caller's flag, NULL for none: see mprpc_link_cancel_call */
    _Atomic uint32_t signal; /* counts what should wake its thread */
    uint8_t not_run, sent, pending, away, asleep;
    uint8_t mail; /* nobody waits: _mailbox.c */
};

struct mprpc_link;

/* A connected, blocking stream socket, which the link owns from now on. NULL without memory. */
struct mprpc_link *mprpc_link_new(int fd, uint32_t payload_max);
/* The same over an end that is no socket. */
struct mprpc_link *mprpc_link_new_within(struct mprpc_wire *wire, uint32_t payload_max);
/* Any thread. keepalive_time: ns of silence after which the peer is sent PING (0, as at first: never);
 * keepalive_timeout: ns of further silence after which the connection ends, MPRPC_LINK_SILENT. unsent_max: bytes that
 * may wait to be written when a call comes (0, as at first: any). */
void mprpc_link_limit(struct mprpc_link *link, uint64_t keepalive_time, uint64_t keepalive_timeout, size_t unsent_max);
/* Any thread. How often a connection of this process ended, or dropped a frame, for that reason (below 0). */
uint64_t mprpc_link_count(int64_t reason);
/* Before the link's first call. Whoever reads looks for so many ns again and again before it sleeps; where that is mostly
 * in vain, seldom. */
void mprpc_link_spin(struct mprpc_link *link, uint64_t ns);
/* Nobody may be in a call. */
void mprpc_link_free(struct mprpc_link *link);
/* Any thread. Ends all calls in flight; later ones end at once. */
void mprpc_link_close(struct mprpc_link *link);

/* Before the link's first call: its calls are counted there. */
void mprpc_link_measure(struct mprpc_link *link, struct mprpc_load *load);

/* Any thread. One whole call: send, wait, receive. timeout: ns; attempt: 0 for the first; cancelled: NULL, or
 * what may cancel it. Returns the response's size (in small, or large when over MPRPC_CALL_SMALL) or an mprpc_outcome. */
int64_t mprpc_link_call(struct mprpc_link *link, struct mprpc_call *call, const uint8_t *names, size_t names_size,
                        const uint8_t *payload, size_t size, uint64_t timeout, uint32_t attempt,
                        const struct mprpc_flag *cancelled);
/* The caller's thread, after MPRPC_CALL_INTERRUPTED. */
int64_t mprpc_link_wait(struct mprpc_link *link, struct mprpc_call *call);
void mprpc_link_forget(struct mprpc_link *link, struct mprpc_call *call);
/* Any thread. Sets the flag: a call that waits with it on that link ends as MPRPC_CALL_CANCELLED, within
 * MPRPC_CANCEL_MS where its thread reads the connection; one that has not been sent yet ends when it would be. The
 * link may be NULL. 1: one has been ended. */
int mprpc_link_cancel_call(struct mprpc_link *link, struct mprpc_flag *cancelled);
/* Frees what the last outcome left: large, words. */
void mprpc_call_clear(struct mprpc_call *call);
/* Any thread. Why no new call can be made, 0 if one can (as far as is known), with a look at the socket. */
int64_t mprpc_link_check(struct mprpc_link *link);

#endif
