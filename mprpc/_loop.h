/* A provider's event loop: the system calls around server sessions. One thread turns it; the interpreter's lock is
 * not held inside a turn. */
#ifndef MPRPC_LOOP_H
#define MPRPC_LOOP_H

#include "_session.h"
#include "_tally.h"
#include "_gate.h"
#include "_placement.h"
#include "_wire.h"

enum {
    MPRPC_BATCH_MAX = 256,     /* requests in one turn: what bounds how long the first one's answer waits */
    MPRPC_FAIR_MAX = 64,       /* frames of one connection in one turn, so that a flood starves nobody */
    MPRPC_CHUNK = 65536,       /* bytes taken from one connection at once; what is larger gets a buffer of its own */
    MPRPC_INCIDENTS_MAX = 64,  /* remembered for the log until the next turn; more are only counted */
    MPRPC_PEER_MAX = 128,      /* bytes of an address in words */
};
#define MPRPC_NOT_ACCEPTING 0xffffffffu

struct mprpc_limits {
    uint64_t frame_timeout;   /* ns in which a frame that has begun must make progress */
    uint64_t idle_timeout;    /* ns without a call, or without reading an answer; 0: for ever */
    uint32_t payload_max;     /* bytes */
    uint32_t output_max;      /* bytes waiting for a slow reader before its requests are no longer read */
    uint32_t connections_max; /* over all loops of a provider */
    uint32_t calls_max;       /* in flight on one connection; 0: any */
    uint64_t input_max;       /* bytes of unfinished frames, over all connections of this loop; 0: any */
    uint32_t classic;         /* is the dialect served */
};

/* One request of a turn, as Python sees it: its arguments lie at offset in the turn's bytes. */
struct mprpc_record {
    uint32_t method, offset, size;
};

/* Something for the log. */
struct mprpc_incident {
    int64_t reason; /* mprpc_malformed, mprpc_violation or mprpc_trouble */
    char peer[MPRPC_PEER_MAX];
};

enum mprpc_trouble {
    MPRPC_STALLED = -40,       /* a frame made no progress within frame_timeout */
    MPRPC_CROWDED = -41,       /* a connection over connections_max was refused */
    MPRPC_NO_DESCRIPTOR = -42, /* no descriptor was left for a connection */
    MPRPC_LONG_CLASSIC = -43,  /* a classic response over 1,024 bytes, which the C++ consumer reads only the start of */
    MPRPC_UNREAD = -44,        /* a peer read nothing of an answer for idle_timeout */
    MPRPC_NO_ROOM = -45,       /* input_max bytes of unfinished frames wait */
    /* Only counted. */
    MPRPC_SLOW_READER = -50,   /* output_max bytes waited for a peer, which was no longer read from */
    MPRPC_IDLE = -51,          /* a connection without a call for idle_timeout was ended */
    MPRPC_EXPIRED = -52,       /* a request's deadline passed before it ran */
    MPRPC_OVERLOADED = -53,    /* a request was refused at a gate */
};

/* Outlives its turn: whom to answer later. */
struct mprpc_ticket {
    uint64_t connection, call_id;
    uint64_t began; /* its handler, for the statistics */
    uint64_t received; /* for its method's gate */
    uint32_t method;
};

struct mprpc_loop_statistics {
    uint64_t connections, accepted, requests, broken, in_flight;
    uint64_t moved; /* connections handed on to another loop */
};

struct mprpc_loop;

/* use_poll: poll(2) also where epoll is to be had. NULL without descriptors or memory (errno). services and, in Python,
 * whatever owns them must outlive the loop. */
struct mprpc_loop *mprpc_loop_new(const struct mprpc_services *services, const struct mprpc_limits *limits,
                                  int use_poll);
void mprpc_loop_free(struct mprpc_loop *loop);
/* The loop accepts on this listening, non-blocking socket (it owns it from now on) and spreads the connections evenly
 * over loops[0, count). Before the first turn. 0 or -1 (errno). */
int mprpc_loop_listen(struct mprpc_loop *loop, int listener, struct mprpc_loop **loops, size_t count);
/* The same for a socket that other processes accept on as well, beside or instead of the loop's own. `crowd` is memory
 * that they share, an unsigned of each process, aligned; who does not accept has MPRPC_NOT_ACCEPTING there. A connection
 * goes to a process that has few; when the loop drains it leaves the socket to the others at once. */
int mprpc_loop_share(struct mprpc_loop *loop, int listener, struct mprpc_loop **loops, size_t count, void *crowd,
                     size_t processes, size_t mine);

/* Before mprpc_loop_listen and _share, for all of a provider's loops: `placement` says how many of them are at work. Connections that
 * belong elsewhere are handed on when nothing of theirs is under way. 0, or -1 without memory. */
int mprpc_loop_place(struct mprpc_loop **loops, size_t count, struct mprpc_placement *placement);
/* NULL: every connection stays. */
struct mprpc_placement *mprpc_loop_placement(const struct mprpc_loop *loop);

enum {
    MPRPC_TURN_STOPPED = -1, /* nothing left to do, for good */
    MPRPC_TURN_COUNT = 1023, /* mask: how many requests */
    MPRPC_TURN_SLOW = 1024,  /* bit: a request is not in the turn's bytes, or there are incidents or cancelled calls */
    MPRPC_TURN_SHIFT = 11,   /* above: how many of the turn's bytes are used */
};
/* Loop thread only. Answers the last turn's requests i < count with sizes[i] bytes each of `replies`, one behind the
 * other (below 0: it was answered or detached already; sizes NULL: one reply of `size` bytes), then waits for requests:
 * returns them as the constants above say. 0 requests: a signal came, look at it and turn again. */
int64_t mprpc_loop_turn(struct mprpc_loop *loop, const uint8_t *replies, size_t size, const int32_t *sizes,
                        size_t count);
/* The same, but 0 requests after at most `patience` ns. */
int64_t mprpc_loop_turn_within(struct mprpc_loop *loop, const uint8_t *replies, size_t size, const int32_t *sizes,
                               size_t count, uint64_t patience);
/* Loop thread only, in the middle of a turn: answers requests as mprpc_loop_turn does, at once. */
void mprpc_loop_flush(struct mprpc_loop *loop, const uint8_t *replies, const int32_t *sizes, size_t count);
/* Where a turn's records and bytes are; constant for the loop's life. */
struct mprpc_record *mprpc_loop_records(struct mprpc_loop *loop);
uint8_t *mprpc_loop_bytes(struct mprpc_loop *loop);
size_t mprpc_loop_room(void);

/* Loop thread only, about request i of this turn, until the next. */
const uint8_t *mprpc_loop_large(struct mprpc_loop *loop, uint32_t i); /* its arguments, NULL if they are in the bytes */
/* Nobody looks at the arguments of request i any more: once, as long as they were not in the bytes. */
void mprpc_loop_copied(struct mprpc_loop *loop, uint32_t i);
/* The first handler of the turn begins now: how many ns the thread took to come to it, with the interpreter's lock. */
uint64_t mprpc_loop_begin(struct mprpc_loop *loop);
/* The handler of request i has ended; replied: its answer is among the next turn's. The next one
 * begins, or the turn's flush. Returns how many ns it took. */
uint64_t mprpc_loop_ran(struct mprpc_loop *loop, uint32_t i, int replied);
uint64_t mprpc_loop_time(const struct mprpc_loop *loop); /* when that was, monotonic ns */
int mprpc_loop_expired(struct mprpc_loop *loop, uint32_t i); /* 1: its deadline has passed, which was answered */
uint64_t mprpc_loop_expiry(struct mprpc_loop *loop); /* the first deadline of the turn, monotonic ns, or UINT64_MAX */
uint64_t mprpc_loop_deadline(struct mprpc_loop *loop, uint32_t i); /* monotonic ns, 0 for none */
uint32_t mprpc_loop_attempt(struct mprpc_loop *loop, uint32_t i); /* 0: the caller's first */
void mprpc_loop_peer(struct mprpc_loop *loop, uint32_t i, char *peer);
void mprpc_loop_reply(struct mprpc_loop *loop, uint32_t i, const uint8_t *payload, size_t size); /* at once */
void mprpc_loop_fail(struct mprpc_loop *loop, uint32_t i, int32_t status, int not_run, const uint8_t *text,
                     size_t text_size, const uint8_t *details, size_t details_size);
void mprpc_loop_detach(struct mprpc_loop *loop, uint32_t i, struct mprpc_ticket *ticket);
/* The detached calls that were cancelled since the last call: copies up to `room` tickets to `to`, returns how many. A
 * call_id of 0: all calls of that connection, which has ended. Fewer than room: that was all. */
size_t mprpc_loop_cancelled(struct mprpc_loop *loop, struct mprpc_ticket *to, size_t room);
/* Copies the incidents since the last call to `to` (room MPRPC_INCIDENTS_MAX), returns how many; *more: not kept. */
size_t mprpc_loop_incidents(struct mprpc_loop *loop, struct mprpc_incident *to, uint64_t *more);

/* Any thread. The answer goes to its own call or nowhere. 0, or -1 without memory. */
int mprpc_loop_answer(struct mprpc_loop *loop, const struct mprpc_ticket *ticket, int32_t status, int not_run,
                      const uint8_t *text, size_t text_size, const uint8_t *details, size_t details_size,
                      const uint8_t *payload, size_t size);
/* Any thread. A turn shows news (MPRPC_TURN_SLOW) at `at`, monotonic ns, or soon after; only the earliest counts. */
void mprpc_loop_remind(struct mprpc_loop *loop, uint64_t at);
/* Any thread. A connection that is no socket, which the loop owns from now on: 0, or -1 when the loop takes none. */
int mprpc_loop_adopt(struct mprpc_loop *loop, struct mprpc_wire *wire);
/* Any thread. GOAWAY to all; new requests are answered UNAVAILABLE, not_run. When nothing is in flight, but not before
 * `settle` ns, or when `grace` ns have passed, the connections end and the turn returns MPRPC_TURN_STOPPED. Again, with
 * less grace: sooner. */
void mprpc_loop_stop(struct mprpc_loop *loop, uint64_t grace, uint64_t settle);
/* Before the first turn: gates[method] is the number of its gate, MPRPC_NO_GATE for none; there are count of them, each of
 * which lets `limit` requests in at first. 0, or -1 without memory. A turn shows news (MPRPC_TURN_SLOW) at least every
 * `period` ns while there are requests, so that limits follow. */
enum { MPRPC_NO_GATE = 255 };
int mprpc_loop_gates(struct mprpc_loop *loop, const uint8_t *gates, size_t methods, size_t count, uint32_t limit,
                     uint64_t period);
/* Loop thread only. What went through since the last call; then what may. */
void mprpc_loop_window(struct mprpc_loop *loop, size_t gate, struct mprpc_window *to);
void mprpc_loop_admit(struct mprpc_loop *loop, size_t gate, uint32_t limit);
/* Any thread. How often what happened, by reason's negative: MPRPC_REASONS numbers. */
void mprpc_loop_counts(struct mprpc_loop *loop, uint64_t *to);
/* Any thread. */
void mprpc_loop_statistics(struct mprpc_loop *loop, struct mprpc_loop_statistics *to);
void mprpc_loop_tally(struct mprpc_loop *loop, uint32_t method, struct mprpc_tally *to); /* adds */

#endif
