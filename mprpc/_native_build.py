"""Builds `mprpc._native`, the C units behind one cffi interface; setup.py runs it.

The declarations below are what Python uses of the headers; the compiler checks them against the headers, which hold
the documentation. `...` leaves out what Python does not touch.
"""

from cffi import FFI

HEADERS = (
    "_codec.h",
    "_session.h",
    "_wire.h",
    "_tally.h",
    "_placement.h",
    "_loop.h",
    "_crew.h",
    "_load.h",
    "_channel.h",
    "_mailbox.h",
)
SOURCES = tuple(header.replace(".h", ".c") for header in (*HEADERS, "_keeper.h", "_fork.h"))
FAST = ("_fast.c", "_call.c", "_future.c", "_serve.c", "_context.c")  # the module mprpc._fast in the same library

DECLARATIONS = """
enum { MPRPC_HEADER_MAX = 65535, MPRPC_METADATA_MAX = 128, ... };
struct mprpc_frame {
    const uint8_t *header, *payload, *service, *method, *error_text, *error_details;
    uint64_t call_id;
    uint32_t header_size, payload_size, service_size, method_size, error_text_size, error_details_size;
    uint32_t kind, timeout_ms, compression, attempt, metadata_count;
    int32_t status;
    uint8_t not_run;
    ...;
};
struct mprpc_reply {
    uint64_t call_id;
    const uint8_t *text, *details;
    uint32_t text_size, details_size, payload_size, kind;
    int32_t status;
    uint8_t not_run;
    ...;
};
int64_t mprpc_split(const uint8_t *bytes, size_t size, uint32_t payload_max, struct mprpc_frame *frames, size_t room,
                    size_t *count, uint64_t *need);
size_t mprpc_put_reply(uint8_t *to, const struct mprpc_reply *reply);
size_t mprpc_put_call(uint8_t *to, const uint8_t *names, uint32_t names_size, uint32_t args_size, uint64_t call_id,
                      uint32_t timeout_ms, uint32_t attempt);
size_t mprpc_put_names(uint8_t *to, const uint8_t *service, uint32_t service_size, const uint8_t *method,
                       uint32_t method_size);

struct mprpc_bytes { uint8_t *at; size_t size, room; };
void mprpc_bytes_free(struct mprpc_bytes *b);
struct mprpc_services;
struct mprpc_services *mprpc_services_new(void);
void mprpc_services_free(struct mprpc_services *services);
int mprpc_services_add(struct mprpc_services *services, const uint8_t *service, size_t service_size,
                       const uint8_t *method, size_t method_size, uint32_t index);
#define MPRPC_CALLS_MAX ...
#define MPRPC_NAMES_MAX ...
#define MPRPC_BAD_SIZE ...
#define MPRPC_BAD_HTTP ...
#define MPRPC_BAD_TLS ...
#define MPRPC_BAD_VARINT ...
#define MPRPC_BAD_WIRE_TYPE ...
#define MPRPC_BAD_VALUE ...
#define MPRPC_BAD_LENGTH ...
#define MPRPC_BAD_CALL_ID ...
#define MPRPC_BAD_ORDER ...
#define MPRPC_BAD_DIALECT ...
#define MPRPC_BAD_PING ...
#define MPRPC_BAD_DISCARD ...
#define MPRPC_NO_CLASSIC ...
#define MPRPC_NO_MEMORY ...
#define MPRPC_STRAY ...
#define MPRPC_OVERSIZED ...
#define MPRPC_METADATA ...
#define MPRPC_UNKNOWN_METHOD ...
#define MPRPC_UNKNOWN_KIND ...
#define MPRPC_COMPRESSED ...
#define MPRPC_BUSY ...
#define MPRPC_LEAVING ...
#define MPRPC_REASONS ...
const char *mprpc_why(int64_t reason);
struct mprpc_session { uint32_t in_flight, strays; uint8_t dialect, draining, gone; uint64_t goaway_id, need; ...; };
struct mprpc_event { struct mprpc_frame frame; uint64_t tag, deadline; uint32_t method; ...; };
void mprpc_session_init(struct mprpc_session *s, const struct mprpc_services *services, uint32_t payload_max,
                        int classic_allowed);
void mprpc_session_free(struct mprpc_session *s);
int64_t mprpc_session_receive(struct mprpc_session *s, const uint8_t *bytes, size_t size, uint64_t now,
                              struct mprpc_event *events, size_t room, size_t *count, struct mprpc_bytes *out);
int64_t mprpc_session_reply(struct mprpc_session *s, struct mprpc_reply *reply, uint8_t *to);
void mprpc_session_unaccept(struct mprpc_session *s);
int mprpc_session_drain(struct mprpc_session *s, struct mprpc_bytes *out);
int mprpc_session_ping(struct mprpc_session *s, struct mprpc_bytes *out);
uint64_t mprpc_session_call(struct mprpc_session *s, uint64_t tag);
int mprpc_session_forget(struct mprpc_session *s, uint64_t call_id);

#define MPRPC_INCIDENTS_MAX ...
#define MPRPC_PEER_MAX ...
#define MPRPC_STALLED ...
#define MPRPC_CROWDED ...
#define MPRPC_NO_DESCRIPTOR ...
#define MPRPC_LONG_CLASSIC ...
#define MPRPC_UNREAD ...
#define MPRPC_NO_ROOM ...
#define MPRPC_SLOW_READER ...
#define MPRPC_IDLE ...
#define MPRPC_EXPIRED ...
#define MPRPC_OVERLOADED ...
#define MPRPC_TURN_SLOW ...
#define MPRPC_TURN_COUNT ...
#define MPRPC_TURN_SHIFT ...
struct mprpc_limits {
    uint64_t frame_timeout, idle_timeout, input_max;
    uint32_t payload_max, output_max, connections_max, calls_max, classic;
    ...;
};
struct mprpc_record { uint32_t method, offset, size; };
struct mprpc_incident { int64_t reason; char peer[...]; ...; };
struct mprpc_window { uint64_t samples, nanoseconds, refused; uint32_t peak; ...; };
#define MPRPC_NO_GATE ...
struct mprpc_ticket { uint64_t connection, call_id; ...; };
struct mprpc_loop_statistics { uint64_t connections, accepted, requests, broken, in_flight, moved; };
#define MPRPC_TALLY_LEAST ...
#define MPRPC_TALLY_BUCKETS ...
uint32_t mprpc_tally_bucket(uint64_t ns);
struct mprpc_tally { uint64_t begun, nanoseconds, ended[...], took[...]; };
void mprpc_loop_tally(struct mprpc_loop *loop, uint32_t method, struct mprpc_tally *to);
struct mprpc_loop;
struct mprpc_loop *mprpc_loop_new(const struct mprpc_services *services, const struct mprpc_limits *limits,
                                  int use_poll);
void mprpc_loop_free(struct mprpc_loop *loop);
int mprpc_loop_listen(struct mprpc_loop *loop, int listener, struct mprpc_loop **loops, size_t count);
#define MPRPC_NOT_ACCEPTING ...
int mprpc_loop_share(struct mprpc_loop *loop, int listener, struct mprpc_loop **loops, size_t count, void *crowd,
                     size_t processes, size_t mine);
int64_t mprpc_loop_turn(struct mprpc_loop *loop, const uint8_t *replies, size_t size, const int32_t *sizes,
                        size_t count);
struct mprpc_record *mprpc_loop_records(struct mprpc_loop *loop);
uint8_t *mprpc_loop_bytes(struct mprpc_loop *loop);
size_t mprpc_loop_room(void);
const uint8_t *mprpc_loop_large(struct mprpc_loop *loop, uint32_t i);
int mprpc_loop_expired(struct mprpc_loop *loop, uint32_t i);
uint64_t mprpc_loop_expiry(struct mprpc_loop *loop);
uint64_t mprpc_loop_deadline(struct mprpc_loop *loop, uint32_t i);
uint32_t mprpc_loop_attempt(struct mprpc_loop *loop, uint32_t i);
void mprpc_loop_peer(struct mprpc_loop *loop, uint32_t i, char *peer);
void mprpc_loop_reply(struct mprpc_loop *loop, uint32_t i, const uint8_t *payload, size_t size);
void mprpc_loop_fail(struct mprpc_loop *loop, uint32_t i, int32_t status, int not_run, const uint8_t *text,
                     size_t text_size, const uint8_t *details, size_t details_size);
void mprpc_loop_detach(struct mprpc_loop *loop, uint32_t i, struct mprpc_ticket *ticket);
size_t mprpc_loop_cancelled(struct mprpc_loop *loop, struct mprpc_ticket *to, size_t room);
size_t mprpc_loop_incidents(struct mprpc_loop *loop, struct mprpc_incident *to, uint64_t *more);
int mprpc_loop_answer(struct mprpc_loop *loop, const struct mprpc_ticket *ticket, int32_t status, int not_run,
                      const uint8_t *text, size_t text_size, const uint8_t *details, size_t details_size,
                      const uint8_t *payload, size_t size);
void mprpc_loop_remind(struct mprpc_loop *loop, uint64_t at);
struct mprpc_wire;
int mprpc_loop_adopt(struct mprpc_loop *loop, struct mprpc_wire *wire);
void mprpc_loop_stop(struct mprpc_loop *loop, uint64_t grace, uint64_t settle);
int mprpc_loop_gates(struct mprpc_loop *loop, const uint8_t *gates, size_t methods, size_t count, uint32_t limit,
                     uint64_t period);
void mprpc_loop_window(struct mprpc_loop *loop, size_t gate, struct mprpc_window *to);
void mprpc_loop_admit(struct mprpc_loop *loop, size_t gate, uint32_t limit);
void mprpc_loop_counts(struct mprpc_loop *loop, uint64_t *to);
void mprpc_loop_statistics(struct mprpc_loop *loop, struct mprpc_loop_statistics *to);

struct mprpc_placement { ...; };
struct mprpc_stint { uint64_t since, processor, waited, held, bytes; uint32_t requests, long_runs; };
uint32_t mprpc_placement_active(const struct mprpc_placement *placement);
void mprpc_placement_init(struct mprpc_placement *placement, uint32_t loops);
void mprpc_placement_tell(struct mprpc_placement *placement, struct mprpc_stint *stint, uint64_t now);
#define MPRPC_STINT ...
#define MPRPC_STINT_MIN ...
int mprpc_loop_place(struct mprpc_loop **loops, size_t count, struct mprpc_placement *placement);

#define MPRPC_CREW_PERIOD ...
#define MPRPC_CREW_JOB ...
#define MPRPC_CREW_STOP ...
struct mprpc_crew_statistics { uint32_t members, standing, busy, queued; uint64_t relieved; };
struct mprpc_crew;
struct mprpc_member;
struct mprpc_pace { ...; };
struct mprpc_crew *mprpc_crew_new(uint32_t seats, uint32_t threads, uint32_t queued_max, uint64_t period);
void mprpc_crew_free(struct mprpc_crew *crew);
void mprpc_crew_unwanted(struct mprpc_crew *crew);
struct mprpc_member *mprpc_member_new(struct mprpc_crew *crew);
void mprpc_member_free(struct mprpc_member *member);
void mprpc_crew_lead(struct mprpc_member *member, uint32_t seat);
int mprpc_crew_stand_by(struct mprpc_member *member, int *wanted);
int mprpc_crew_relieve(struct mprpc_member *member, int *wanted);
int mprpc_crew_queue(struct mprpc_crew *crew);
void mprpc_crew_stop(struct mprpc_crew *crew);
void mprpc_crew_statistics(struct mprpc_crew *crew, struct mprpc_crew_statistics *to);

struct mprpc_load;
struct mprpc_load_snapshot { uint64_t in_flight, ended, failed, failing, latency, succeeded_at, failed_at; };
struct mprpc_load *mprpc_load_new(void);
void mprpc_load_drop(struct mprpc_load *load);
void mprpc_load_begin(struct mprpc_load *load);
#define MPRPC_LOAD_OK ...
#define MPRPC_LOAD_FAILED ...
#define MPRPC_LOAD_UNDECIDED ...
void mprpc_load_end(struct mprpc_load *load, uint64_t began, uint64_t now, int verdict);
void mprpc_load_fail(struct mprpc_load *load, uint64_t now);
void mprpc_load_snapshot(const struct mprpc_load *load, uint64_t now, struct mprpc_load_snapshot *to);
void mprpc_load_forget(struct mprpc_load *load);
void mprpc_load_leave(struct mprpc_load *load);
uint32_t mprpc_load_in_flight(const struct mprpc_load *load);
uint64_t mprpc_load_cost(const struct mprpc_load *load, uint64_t now);

#define MPRPC_CALL_SMALL ...
#define MPRPC_CALL_CANCELLED ...
#define MPRPC_CALL_FAILED ...
#define MPRPC_CALL_TIMEOUT ...
#define MPRPC_CALL_BROKEN ...
#define MPRPC_CALL_INTERRUPTED ...
#define MPRPC_CALL_FULL ...
#define MPRPC_LINK_END ...
#define MPRPC_LINK_CLOSED ...
#define MPRPC_LINK_GOAWAY ...
#define MPRPC_LINK_SILENT ...
#define MPRPC_LINK_UNSENT ...
struct mprpc_call {
    uint64_t deadline;
    uint8_t *small, *large, *words;
    int64_t reason;
    uint32_t text_size, details_size;
    int32_t status;
    uint8_t not_run, sent;
    ...;
};
struct mprpc_flag { ...; };
struct mprpc_link;
struct mprpc_link *mprpc_link_new(int fd, uint32_t payload_max);
int mprpc_wire_pair(struct mprpc_wire *ends[2]);
void mprpc_wire_close(struct mprpc_wire *end);
struct mprpc_link *mprpc_link_new_within(struct mprpc_wire *wire, uint32_t payload_max);
uint64_t mprpc_link_count(int64_t reason);
void mprpc_link_limit(struct mprpc_link *link, uint64_t keepalive_time, uint64_t keepalive_timeout, size_t unsent_max);
void mprpc_link_free(struct mprpc_link *link);
void mprpc_link_close(struct mprpc_link *link);
void mprpc_link_spin(struct mprpc_link *link, uint64_t ns);
void mprpc_link_measure(struct mprpc_link *link, struct mprpc_load *load);
int mprpc_link_cancel_call(struct mprpc_link *link, struct mprpc_flag *cancelled);
int64_t mprpc_link_call(struct mprpc_link *link, struct mprpc_call *call, const uint8_t *names, size_t names_size,
                        const uint8_t *payload, size_t size, uint64_t timeout, uint32_t attempt,
                        struct mprpc_flag *cancelled);
int64_t mprpc_link_wait(struct mprpc_link *link, struct mprpc_call *call);
void mprpc_link_forget(struct mprpc_link *link, struct mprpc_call *call);
void mprpc_call_clear(struct mprpc_call *call);
int64_t mprpc_link_check(struct mprpc_link *link);

struct mprpc_mail {
    uint64_t token;
    int64_t outcome, reason;
    uint64_t offset;
    uint32_t text_size, details_size;
    int32_t status;
    uint8_t not_run, sent;
    ...;
};
struct mprpc_mailbox;
struct mprpc_mailbox *mprpc_mailbox_new(void);
void mprpc_mailbox_free(struct mprpc_mailbox *box);
void mprpc_link_attach(struct mprpc_link *link, struct mprpc_mailbox *box, int owned);
int64_t mprpc_link_submit(struct mprpc_link *link, uint64_t token, const uint8_t *names, size_t names_size,
                          const uint8_t *payload, size_t size, uint64_t timeout, uint32_t attempt, int hold,
                          int64_t *reason);
int mprpc_link_cancel(struct mprpc_link *link, uint64_t call_id);
int mprpc_link_turn(struct mprpc_link *link, int read, uint64_t *expiry);
int mprpc_link_descriptor(const struct mprpc_link *link);
int mprpc_mailbox_wait(struct mprpc_mailbox *box, uint64_t timeout);
void mprpc_mailbox_wake(struct mprpc_mailbox *box);
size_t mprpc_mailbox_take(struct mprpc_mailbox *box, struct mprpc_mail **mail, uint8_t **bytes, size_t *size);
"""

ffibuilder = FFI()
ffibuilder.cdef(DECLARATIONS)
ffibuilder.set_source(
    "mprpc._native",
    "".join(f'#include "{header}"\n' for header in HEADERS),
    sources=[f"mprpc/{source}" for source in (*SOURCES, *FAST)],
    include_dirs=["mprpc"],
    depends=[f"mprpc/{header}" for header in (*HEADERS, "_gate.h", "_link.h", "_call.h", "_fast.h", "_fork.h")],
    extra_compile_args=["-O2", "-pthread"],
    extra_link_args=["-pthread"],
)
