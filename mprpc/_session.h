/* One connection's state, on either side: bytes and the time go in, events and bytes come out. No system call, no
 * thread, no clock. The loop, the channel, the asyncio face and the simulator drive this one implementation. */
#ifndef MPRPC_SESSION_H
#define MPRPC_SESSION_H

#include "_codec.h"

#include <stdatomic.h>

/* Bytes that grow. Zeroed is empty; mprpc_bytes_free when done. */
struct mprpc_bytes {
    uint8_t *at;
    size_t size, room;
};

/* 0, or -1 without memory (the bytes are as before). */
int mprpc_bytes_reserve(struct mprpc_bytes *b, size_t more);
int mprpc_bytes_add(struct mprpc_bytes *b, const void *from, size_t size);
void mprpc_bytes_drop(struct mprpc_bytes *b, size_t first); /* the first bytes; what is empty gives its memory back */
void mprpc_bytes_free(struct mprpc_bytes *b);

/* Which methods a provider serves, by the bytes on the wire. Filled before the loops start, only read after. */
struct mprpc_services;
struct mprpc_services *mprpc_services_new(void);
void mprpc_services_free(struct mprpc_services *services);
/* 0, -1 without memory, or 1 when the pair is there already. */
int mprpc_services_add(struct mprpc_services *services, const uint8_t *service, size_t service_size,
                       const uint8_t *method, size_t method_size, uint32_t index);
uint32_t mprpc_services_methods(const struct mprpc_services *services); /* one more than the highest index */

enum {
    MPRPC_PING_MAX = 64,           /* bytes of payload that a PING may carry */
    MPRPC_CALLS_MAX = 65536,       /* calls in flight on one connection; past it a call is refused at once */
    MPRPC_NAMES_MAX = 4096,        /* bytes of a method's serialized names */
    MPRPC_ERROR_TEXT_MAX = 4096,   /* bytes of a response's text: one line for a person */
    MPRPC_FRAMES_MAX = 256,        /* frames taken at once, also of those that make no event: a flood of them holds up
                                      nobody else */
    MPRPC_DETAILS_MAX = 32768,     /* bytes of error_details; both leave the header far under its limit */
};

/* Why a session ended, beside the codec's reasons. */
enum mprpc_violation {
    MPRPC_BAD_CALL_ID = -20, /* a frame that needs a call_id has none */
    MPRPC_BAD_ORDER = -21,   /* a request's call_id is not above the last */
    MPRPC_BAD_DIALECT = -22, /* classic and framed on one connection */
    MPRPC_BAD_PING = -23,    /* a PING over MPRPC_PING_MAX */
    MPRPC_BAD_DISCARD = -24, /* a payload over the limit and over what would be discarded */
    MPRPC_NO_CLASSIC = -25,  /* a classic request that gets no answer: its dialect has no form for an error */
    MPRPC_NO_MEMORY = -26,
};
/* What is refused, or dropped, while the session goes on: counted. */
enum mprpc_refusal {
    MPRPC_STRAY = -27,          /* a response that nobody waits for, a kind that means nothing here */
    MPRPC_OVERSIZED = -28,      /* a request over payload_max */
    MPRPC_METADATA = -29,       /* a request with over MPRPC_METADATA_MAX entries */
    MPRPC_UNKNOWN_METHOD = -30, /* or service */
    MPRPC_UNKNOWN_KIND = -31,
    MPRPC_COMPRESSED = -32,
    MPRPC_BUSY = -33, /* a request over calls_max */
    MPRPC_LEAVING = -34, /* a request behind GOAWAY */
};
enum { MPRPC_REASONS = 64 }; /* all reasons of this side are above its negative: what counts are indexed by */
/* The same in words, for a log or an error text. A constant. */
const char *mprpc_why(int64_t reason);

enum mprpc_dialect { MPRPC_UNKNOWN = 0, MPRPC_FRAMED = 1, MPRPC_CLASSIC = 2 };

struct mprpc_session {
    const struct mprpc_services *services; /* NULL: the client's side */
    uint64_t last_id;                      /* server: the highest accepted; client: the highest used */
    uint64_t skip;                         /* bytes of a refused payload that are still to come */
    uint64_t need;                         /* no frame is whole before so many bytes are there */
    uint64_t goaway_id;                    /* client: what the peer's GOAWAY said */
    const void *last;                      /* server: the last request's method, which the next one often is as well */
    uint64_t *ids, *tags;                  /* client: calls in flight, a ring indexed by call_id */
    uint32_t ring;                         /* its size, a power of two or 0 */
    uint32_t in_flight;
    uint32_t strays;                       /* frames dropped: late responses, kinds that mean nothing here */
    uint32_t payload_max;
    uint32_t calls_max;                    /* server: in flight, a request too many is refused; 0: any */
    _Atomic uint64_t *counts;              /* by reason's negative, MPRPC_REASONS of them, or NULL */
    uint8_t dialect, classic_allowed, draining, gone; /* gone: the peer sent GOAWAY */
};

struct mprpc_event {
    struct mprpc_frame frame; /* points into the bytes received; kind REQUEST, CANCEL, RESPONSE, PONG or GOAWAY */
    uint64_t tag;             /* RESPONSE: the caller's */
    uint64_t deadline;        /* REQUEST: on the clock of `now`, 0 for none */
    uint32_t method;          /* REQUEST: the index given to mprpc_services_add */
};

/* services NULL for the client's side. */
void mprpc_session_init(struct mprpc_session *s, const struct mprpc_services *services, uint32_t payload_max,
                        int classic_allowed);
void mprpc_session_free(struct mprpc_session *s);

/* Takes the whole frames at the start of bytes[0, size): returns how many bytes are done with (the caller keeps the
 * rest and shows it again, with more behind it), or why the session ended. events[0, *count) are what the caller has to
 * act on; all the protocol answers by itself is appended to *out. now: nanoseconds, monotonic. */
int64_t mprpc_session_receive(struct mprpc_session *s, const uint8_t *bytes, size_t size, uint64_t now,
                              struct mprpc_event *events, size_t room, size_t *count, struct mprpc_bytes *out);

/* Server: writes what precedes the payload of one accepted request's answer to `to` (room: MPRPC_REPLY_ROOM + text +
 * details) and returns how many bytes, 0 for a classic success; MPRPC_NO_CLASSIC: reset the connection instead. Text
 * and details over their limits are cut, and left out. */
int64_t mprpc_session_reply(struct mprpc_session *s, struct mprpc_reply *reply, uint8_t *to);
/* Server: an accepted request needs no answer, it was cancelled before its handler started. */
void mprpc_session_unaccept(struct mprpc_session *s);
/* Server: GOAWAY into *out; later requests are answered UNAVAILABLE, not_run. Once. */
int mprpc_session_drain(struct mprpc_session *s, struct mprpc_bytes *out);

/* Client: opens a call under tag; its call_id, or 0 when MPRPC_CALLS_MAX are in flight (or memory ran out). */
uint64_t mprpc_session_call(struct mprpc_session *s, uint64_t tag);
/* Client: a PING into *out, which any peer answers. 0, or MPRPC_NO_MEMORY. */
int mprpc_session_ping(struct mprpc_session *s, struct mprpc_bytes *out);
/* Client: the tag of a call in flight, 0 if it is not. */
uint64_t mprpc_session_tag(const struct mprpc_session *s, uint64_t call_id);
/* Client: nobody waits for it any more; a late response is dropped. 1 if it was in flight. */
int mprpc_session_forget(struct mprpc_session *s, uint64_t call_id);

#endif
