/* The protocol's rules, once, for both sides. Strategy: mprpc_split finds the frames, one function for each side says
 * what a frame means there; what needs no handler is answered here. The calls of a client lie in a ring indexed by
 * call_id: ids ascend, so a slot taken by a long call is stepped over and no id is ever used twice. */
#include "_session.h"

#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8, UNIMPLEMENTED = 12, UNAVAILABLE = 14 };

/* As long as the biggest payload that any configuration allows by default: a peer that sends one more is told so. */
static const uint64_t DISCARD_MAX = 256u << 20;

enum { TOLD = 2 }; /* of draining: the peer has been sent GOAWAY */

static const uint32_t WHOLE_SERVICE = UINT32_MAX; /* the index of a service's own entry, under the empty method */

/* An empty name is NULL, which memcpy and memcmp are not defined for. */
static void copy(uint8_t *to, const uint8_t *from, size_t size)
{
    if (size)
        memcpy(to, from, size);
}

static int same(const uint8_t *a, const uint8_t *b, size_t size)
{
    return size == 0 || memcmp(a, b, size) == 0;
}

/* ---- bytes ---- */

int mprpc_bytes_reserve(struct mprpc_bytes *b, size_t more)
{
    if (b->room - b->size >= more)
        return 0;
    size_t room = b->room ? b->room : 256;
    while (room - b->size < more)
        room *= 2;
    uint8_t *at = realloc(b->at, room);
    if (!at)
        return -1;
    b->at = at;
    b->room = room;
    return 0;
}

int mprpc_bytes_add(struct mprpc_bytes *b, const void *from, size_t size)
{
    if (size == 0)
        return 0;
    if (mprpc_bytes_reserve(b, size))
        return -1;
    memcpy(b->at + b->size, from, size);
    b->size += size;
    return 0;
}

void mprpc_bytes_free(struct mprpc_bytes *b)
{
    free(b->at);
    memset(b, 0, sizeof *b);
}

void mprpc_bytes_drop(struct mprpc_bytes *b, size_t first)
{
    b->size -= first;
    if (b->size == 0)
        mprpc_bytes_free(b);
    else if (first)
        memmove(b->at, b->at + first, b->size);
}

/* ---- services ---- */

struct entry {
    uint8_t *key; /* service and method, one after the other; NULL: free */
    uint32_t service_size, method_size, index;
};

struct mprpc_services {
    struct entry *entries; /* open addressing, at most half full */
    size_t room, count;
    uint32_t methods;
};

/* FNV-1a: a few names, known to all; nobody can choose keys that collide in somebody else's table. */
static uint64_t hash(uint64_t h, const uint8_t *at, size_t size)
{
    for (size_t i = 0; i < size; i++)
        h = (h ^ at[i]) * 1099511628211u;
    return h;
}

static int is(const struct entry *e, const uint8_t *service, size_t service_size, const uint8_t *method,
              size_t method_size)
{
    return e->service_size == service_size && e->method_size == method_size && same(e->key, service, service_size) &&
           same(e->key + service_size, method, method_size);
}

/* Where the pair is, or the free entry where it would be. */
static struct entry *slot(const struct mprpc_services *t, const uint8_t *service, size_t service_size,
                          const uint8_t *method, size_t method_size)
{
    uint64_t h = hash(hash(14695981039346656037u, service, service_size) ^ service_size, method, method_size);

    for (size_t i = h;; i++) {
        struct entry *e = &t->entries[i & (t->room - 1)];
        if (!e->key || is(e, service, service_size, method, method_size))
            return e;
    }
}

static const struct entry *find(const struct mprpc_services *t, const uint8_t *service, size_t service_size,
                                const uint8_t *method, size_t method_size)
{
    const struct entry *e = slot(t, service, service_size, method, method_size);

    return e->key ? e : NULL;
}

static int serves(const struct mprpc_services *t, const struct mprpc_frame *f)
{
    return find(t, f->service, f->service_size, NULL, 0) != NULL;
}

struct mprpc_services *mprpc_services_new(void)
{
    struct mprpc_services *t = calloc(1, sizeof *t);

    if (t && !(t->entries = calloc(t->room = 64, sizeof *t->entries))) {
        free(t);
        return NULL;
    }
    return t;
}

void mprpc_services_free(struct mprpc_services *t)
{
    for (size_t i = 0; i < t->room; i++)
        free(t->entries[i].key);
    free(t->entries);
    free(t);
}

static int grow(struct mprpc_services *t)
{
    struct mprpc_services bigger = {calloc(t->room * 2, sizeof *t->entries), t->room * 2, t->count, t->methods};

    if (!bigger.entries)
        return -1;
    for (size_t i = 0; i < t->room; i++) {
        struct entry *e = &t->entries[i];
        if (e->key)
            *slot(&bigger, e->key, e->service_size, e->key + e->service_size, e->method_size) = *e;
    }
    free(t->entries);
    *t = bigger;
    return 0;
}

static int add(struct mprpc_services *t, const uint8_t *service, size_t service_size, const uint8_t *method,
               size_t method_size, uint32_t index)
{
    if (t->count * 2 >= t->room && grow(t))
        return -1;
    struct entry *e = slot(t, service, service_size, method, method_size);
    if (e->key)
        return 1;
    if (!(e->key = malloc(service_size + method_size + 1)))
        return -1;
    copy(e->key, service, service_size);
    copy(e->key + service_size, method, method_size);
    e->service_size = (uint32_t)service_size;
    e->method_size = (uint32_t)method_size;
    e->index = index;
    t->count++;
    return 0;
}

int mprpc_services_add(struct mprpc_services *t, const uint8_t *service, size_t service_size, const uint8_t *method,
                       size_t method_size, uint32_t index)
{
    if (add(t, service, service_size, NULL, 0, WHOLE_SERVICE) < 0)
        return -1;
    if (index >= t->methods)
        t->methods = index + 1;
    return add(t, service, service_size, method, method_size, index);
}

uint32_t mprpc_services_methods(const struct mprpc_services *t)
{
    return t->methods;
}

/* ---- both sides ---- */

const char *mprpc_why(int64_t reason)
{
    switch (reason) {
    case MPRPC_BAD_SIZE: return "its first bytes are no frame (header_size over 65535)";
    case MPRPC_BAD_HTTP: return "it speaks HTTP, which is not served here";
    case MPRPC_BAD_TLS: return "it speaks TLS, which is not served here";
    case MPRPC_BAD_VARINT: return "a header with a varint that does not end";
    case MPRPC_BAD_WIRE_TYPE: return "a header with a field of the wrong wire type";
    case MPRPC_BAD_VALUE: return "a header with a value out of its field's range";
    case MPRPC_BAD_LENGTH: return "a header with a length past its end";
    case MPRPC_BAD_CALL_ID: return "a frame without the call_id that its kind needs";
    case MPRPC_BAD_ORDER: return "a request whose call_id is not above the last";
    case MPRPC_BAD_DIALECT: return "classic and framed requests on one connection";
    case MPRPC_BAD_PING: return "a PING with more than 64 bytes";
    case MPRPC_BAD_DISCARD: return "a payload far over the limit";
    case MPRPC_NO_CLASSIC: return "a classic request that can't be answered (its dialect has no form for an error)";
    case MPRPC_NO_MEMORY: return "no memory for it";
    default: return "an unknown reason";
    }
}

void mprpc_session_init(struct mprpc_session *s, const struct mprpc_services *services, uint32_t payload_max,
                        int classic_allowed)
{
    memset(s, 0, sizeof *s);
    s->services = services;
    s->payload_max = payload_max;
    s->classic_allowed = (uint8_t)(classic_allowed != 0);
    s->dialect = services ? MPRPC_UNKNOWN : MPRPC_FRAMED;
}

void mprpc_session_free(struct mprpc_session *s)
{
    free(s->ids);
    free(s->tags);
    s->ids = s->tags = NULL;
    s->ring = 0;
}

static void tally(struct mprpc_session *s, int reason)
{
    if (s->counts)
        atomic_fetch_add_explicit(&s->counts[-reason], 1u, memory_order_relaxed);
}

static int stray(struct mprpc_session *s)
{
    s->strays++;
    tally(s, MPRPC_STRAY);
    return 0;
}

static int put(struct mprpc_bytes *out, const struct mprpc_reply *r, const uint8_t *payload)
{
    size_t room = (size_t)MPRPC_REPLY_ROOM + r->text_size + r->details_size + r->payload_size;

    if (mprpc_bytes_reserve(out, room))
        return MPRPC_NO_MEMORY;
    out->size += mprpc_put_reply(out->at + out->size, r);
    return mprpc_bytes_add(out, payload, r->payload_size);
}

/* Answers a request that never reaches a handler. In the classic dialect there is no such answer. */
static int refuse(struct mprpc_session *s, const struct mprpc_frame *f, int reason, int32_t status, const char *text,
                  struct mprpc_bytes *out)
{
    struct mprpc_reply r = {.call_id = f->call_id, .kind = MPRPC_RESPONSE, .status = status, .not_run = 1,
                            .text = (const uint8_t *)text, .text_size = (uint32_t)strlen(text)};

    if (s->dialect == MPRPC_CLASSIC)
        return MPRPC_NO_CLASSIC;
    tally(s, reason);
    return put(out, &r, NULL);
}

static int pong(struct mprpc_session *s, const struct mprpc_frame *f, struct mprpc_bytes *out)
{
    if (f->payload_size > MPRPC_PING_MAX)
        return MPRPC_BAD_PING;
    int served = !s->services || !f->service_size || serves(s->services, f);
    struct mprpc_reply r = {.call_id = f->call_id, .kind = MPRPC_PONG, .payload_size = f->payload_size,
                            .status = served && !s->draining ? OK : served ? UNAVAILABLE : UNIMPLEMENTED};

    return put(out, &r, f->payload);
}

/* ---- the server's side: 1 makes an event, 0 is dealt with, below 0 ends the session ---- */

/* Once. A connection that came while we drain hears it behind its first answer: until then it may be a classic one. */
static int goaway(struct mprpc_session *s, struct mprpc_bytes *out)
{
    struct mprpc_reply r = {.call_id = s->last_id, .kind = MPRPC_GOAWAY};

    s->draining = TOLD;
    return put(out, &r, NULL);
}

static int request(struct mprpc_session *s, struct mprpc_event *e, uint64_t now, struct mprpc_bytes *out)
{
    struct mprpc_frame *f = &e->frame;
    enum mprpc_dialect dialect = f->call_id ? MPRPC_FRAMED : MPRPC_CLASSIC;

    if (s->dialect == MPRPC_UNKNOWN)
        s->dialect = (uint8_t)dialect;
    if (s->dialect != dialect)
        return MPRPC_BAD_DIALECT;
    if (dialect == MPRPC_CLASSIC && !s->classic_allowed)
        return MPRPC_NO_CLASSIC;
    if (dialect == MPRPC_FRAMED && f->call_id <= s->last_id)
        return MPRPC_BAD_ORDER;
    if (s->draining) {
        int told = refuse(s, f, MPRPC_LEAVING, UNAVAILABLE, "the provider is shutting down", out);
        return told < 0 || s->draining == TOLD ? told : goaway(s, out);
    }
    s->last_id = f->call_id;
    if (f->payload_size > s->payload_max)
        return refuse(s, f, MPRPC_OVERSIZED, RESOURCE_EXHAUSTED,
                      "the request is larger than the provider's max_payload", out);
    if (s->calls_max && s->in_flight >= s->calls_max)
        return refuse(s, f, MPRPC_BUSY, RESOURCE_EXHAUSTED, "too many calls of this connection are in flight", out);
    if (f->metadata_count > MPRPC_METADATA_MAX)
        return refuse(s, f, MPRPC_METADATA, INVALID_ARGUMENT, "more than 128 metadata entries", out);
    if (f->compression)
        return refuse(s, f, MPRPC_COMPRESSED, UNIMPLEMENTED, "this provider takes no compressed payload", out);
    const struct entry *m = s->last;
    if (!m || !is(m, f->service, f->service_size, f->method, f->method_size))
        m = find(s->services, f->service, f->service_size, f->method, f->method_size);
    if (m)
        s->last = m;
    if (!m || m->index == WHOLE_SERVICE)
        return refuse(s, f, MPRPC_UNKNOWN_METHOD, UNIMPLEMENTED,
                      serves(s->services, f) ? "the service has no such method" : "no such service here", out);
    e->method = m->index;
    e->deadline = f->timeout_ms ? now + f->timeout_ms * UINT64_C(1000000) : 0;
    s->in_flight++;
    return 1;
}

static int on_server(struct mprpc_session *s, struct mprpc_event *e, uint64_t now, struct mprpc_bytes *out)
{
    struct mprpc_frame *f = &e->frame;

    if (f->kind == MPRPC_REQUEST)
        return request(s, e, now, out);
    if (s->dialect == MPRPC_CLASSIC)
        return MPRPC_BAD_DIALECT;
    s->dialect = MPRPC_FRAMED;
    if (f->kind == MPRPC_PING)
        return pong(s, f, out);
    if (f->kind > MPRPC_GOAWAY && f->kind <= MPRPC_KIND_ANSWERED)
        return refuse(s, f, MPRPC_UNKNOWN_KIND, UNIMPLEMENTED, "this provider does not know that kind of frame",
                      out);
    if (f->kind == MPRPC_CANCEL)
        return 1;
    return f->kind == MPRPC_GOAWAY ? 0 : stray(s);
}

void mprpc_session_unaccept(struct mprpc_session *s)
{
    s->in_flight--;
}

int64_t mprpc_session_reply(struct mprpc_session *s, struct mprpc_reply *r, uint8_t *to)
{
    s->in_flight--;
    if (s->dialect == MPRPC_CLASSIC)
        return r->status == OK ? 0 : MPRPC_NO_CLASSIC;
    if (r->text_size > MPRPC_ERROR_TEXT_MAX) {
        r->text_size = MPRPC_ERROR_TEXT_MAX;
        while (r->text_size && (r->text[r->text_size] & 0xc0) == 0x80)
            r->text_size--; /* never in the middle of a character: a C++ peer refuses a string that is not UTF-8 */
    }
    if (r->details_size > MPRPC_DETAILS_MAX)
        r->details_size = 0; /* half a message is none */
    r->kind = MPRPC_RESPONSE;
    return (int64_t)mprpc_put_reply(to, r);
}

int mprpc_session_drain(struct mprpc_session *s, struct mprpc_bytes *out)
{
    if (s->draining)
        return 0;
    s->draining = TOLD;
    return s->dialect == MPRPC_CLASSIC ? 0 : goaway(s, out);
}

/* ---- the client's side ---- */

static int ring_grow(struct mprpc_session *s)
{
    uint32_t ring = s->ring ? s->ring * 2 : 16;
    uint64_t *ids = calloc(ring, sizeof *ids), *tags = calloc(ring, sizeof *tags);

    if (!ids || !tags) {
        free(ids);
        free(tags);
        return -1;
    }
    for (uint32_t i = 0; i < s->ring; i++)
        if (s->ids[i]) {
            ids[s->ids[i] & (ring - 1)] = s->ids[i]; /* apart in the small ring, so apart in the big one */
            tags[s->ids[i] & (ring - 1)] = s->tags[i];
        }
    mprpc_session_free(s);
    s->ids = ids;
    s->tags = tags;
    s->ring = ring;
    return 0;
}

uint64_t mprpc_session_call(struct mprpc_session *s, uint64_t tag)
{
    if (s->in_flight >= MPRPC_CALLS_MAX || (s->in_flight * 2 >= s->ring && ring_grow(s)))
        return 0;
    do
        s->last_id++;
    while (s->ids[s->last_id & (s->ring - 1)]);
    s->ids[s->last_id & (s->ring - 1)] = s->last_id;
    s->tags[s->last_id & (s->ring - 1)] = tag;
    s->in_flight++;
    return s->last_id;
}

int mprpc_session_ping(struct mprpc_session *s, struct mprpc_bytes *out)
{
    struct mprpc_reply r = {.call_id = ++s->last_id, .kind = MPRPC_PING};

    return put(out, &r, NULL);
}

uint64_t mprpc_session_tag(const struct mprpc_session *s, uint64_t id)
{
    return s->ring && id && s->ids[id & (s->ring - 1)] == id ? s->tags[id & (s->ring - 1)] : 0;
}

int mprpc_session_forget(struct mprpc_session *s, uint64_t id)
{
    if (!s->ring || !id || s->ids[id & (s->ring - 1)] != id)
        return 0;
    s->ids[id & (s->ring - 1)] = 0;
    s->in_flight--;
    return 1;
}

static int response(struct mprpc_session *s, struct mprpc_event *e)
{
    static const char large[] = "the response is larger than the channel's max_payload";
    static const char packed[] = "the response is compressed, which was not asked for";
    struct mprpc_frame *f = &e->frame;

    if (!mprpc_session_forget(s, f->call_id))
        return stray(s);
    e->tag = s->tags[f->call_id & (s->ring - 1)];
    int over = f->payload_size > s->payload_max;
    if (!over && !f->compression)
        return 1;
    f->status = over ? RESOURCE_EXHAUSTED : UNIMPLEMENTED;
    f->error_text = (const uint8_t *)(over ? large : packed);
    f->error_text_size = (uint32_t)(over ? sizeof large : sizeof packed) - 1;
    f->not_run = 0;
    return 1;
}

static int on_client(struct mprpc_session *s, struct mprpc_event *e, struct mprpc_bytes *out)
{
    struct mprpc_frame *f = &e->frame;

    switch (f->kind) {
    case MPRPC_RESPONSE: return response(s, e);
    case MPRPC_PING: return pong(s, f, out);
    case MPRPC_PONG: return 1;
    case MPRPC_GOAWAY:
        s->gone = 1;
        s->goaway_id = f->call_id;
        return 1;
    default: return stray(s);
    }
}

/* ---- receiving ---- */

static int one(struct mprpc_session *s, struct mprpc_event *e, uint64_t now, struct mprpc_bytes *out)
{
    const struct mprpc_frame *f = &e->frame;

    if (!f->call_id && f->kind != MPRPC_REQUEST && f->kind != MPRPC_GOAWAY && f->kind <= MPRPC_KIND_ANSWERED)
        return MPRPC_BAD_CALL_ID;
    if (!f->payload && f->payload_size > DISCARD_MAX)
        return MPRPC_BAD_DISCARD;
    int kept = s->services ? on_server(s, e, now, out) : on_client(s, e, out);
    if (kept >= 0 && !f->payload)
        s->skip = f->payload_size; /* not before: a violation must find its frame again when it stands first */
    return kept;
}

/* Bytes that belong to no frame: of a refused payload, or behind a classic request. */
static size_t discard(struct mprpc_session *s, size_t size)
{
    if (s->dialect == MPRPC_CLASSIC)
        return size;
    size_t n = s->skip < size ? (size_t)s->skip : size;
    s->skip -= n;
    return n;
}

int64_t mprpc_session_receive(struct mprpc_session *s, const uint8_t *bytes, size_t size, uint64_t now,
                              struct mprpc_event *events, size_t room, size_t *count, struct mprpc_bytes *out)
{
    uint32_t payload_max = s->payload_max > MPRPC_PING_MAX ? s->payload_max : MPRPC_PING_MAX; /* PINGs must be seen */
    size_t used = 0;

    *count = 0;
    for (size_t taken = 0; *count < room && taken < MPRPC_FRAMES_MAX; taken++) {
        used += discard(s, size - used);
        if (size - used < s->need || used == size)
            break;
        struct mprpc_event *e = &events[*count];
        size_t frames;
        int64_t n = mprpc_split(bytes + used, size - used, payload_max, &e->frame, 1, &frames, &s->need);
        if (n == 0)
            break;
        int kept = n < 0 ? (int)n : one(s, e, now, out);
        if (kept < 0 && *count == 0)
            return kept;
        if (kept < 0)
            break; /* the calls before it are valid; it is told when it stands first */
        used += (size_t)n;
        *count += (size_t)kept;
    }
    return (int64_t)used;
}
