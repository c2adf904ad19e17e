/* Framing. Strategy: header_size is looked at first, then the whole header is scanned once, field by field, straight
 * from the caller's bytes; nothing is believed that would need memory. Every size is compared in 64 bits. */
#include "_codec.h"

#include <string.h>

static uint32_t load32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* Only for sizes that can't be a header's: these first bytes all read as more than 65,535. */
static int alien(const uint8_t *p)
{
    static const char methods[][5] = {"GET ", "POST", "HEAD", "PUT ", "OPTI", "DELE", "PATC", "PRI "};

    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (memcmp(p, methods[i], MPRPC_PREFIX) == 0)
            return MPRPC_BAD_HTTP;
    return p[0] == 0x16 && p[1] == 3 && p[2] >= 1 && p[2] <= 4 ? MPRPC_BAD_TLS : MPRPC_BAD_SIZE;
}

/* Moves *at behind the varint; NULL when it does not end within 10 bytes, 64 bits and the header. */
static const uint8_t *varint(const uint8_t *at, const uint8_t *end, uint64_t *value)
{
    uint64_t v = 0;

    for (unsigned shift = 0; shift < 70 && at < end; shift += 7) {
        uint8_t byte = *at++;
        if (shift == 63 && byte > 1)
            return NULL;
        v |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            *value = v;
            return at;
        }
    }
    return NULL;
}

/* 0, or MPRPC_BAD_VALUE. A known scalar field. */
static int scalar(struct mprpc_frame *f, uint64_t field, uint64_t v)
{
    uint32_t *to;

    switch (field) {
    case 3: to = &f->payload_size; break;
    case 4: f->call_id = v; return 0;
    case 5: to = &f->kind; break;
    case 6: to = &f->timeout_ms; break;
    case 7: /* int32: a negative one is sign-extended to 64 bits */
        if ((int64_t)v > INT32_MAX || (int64_t)v < INT32_MIN)
            return MPRPC_BAD_VALUE;
        f->status = (int32_t)(int64_t)v;
        return 0;
    case 9: to = &f->compression; break;
    case 12:
        if (v > 1)
            return MPRPC_BAD_VALUE;
        f->not_run = (uint8_t)v;
        return 0;
    default: to = &f->attempt; break;
    }
    if (v > UINT32_MAX)
        return MPRPC_BAD_VALUE;
    *to = (uint32_t)v;
    return 0;
}

static void span(struct mprpc_frame *f, uint64_t field, const uint8_t *at, uint32_t size)
{
    switch (field) {
    case 1: f->service = at; f->service_size = size; break;
    case 2: f->method = at; f->method_size = size; break;
    case 8: f->error_text = at; f->error_text_size = size; break;
    case 10: f->metadata_count++; break;
    case 11: f->error_details = at; f->error_details_size = size; break;
    default: break; /* unknown: skipped */
    }
}

enum { VARINT = 0, FIXED64 = 1, BYTES = 2, FIXED32 = 5, ANY = 8 };

/* The wire type that a field of RpcHeader has; those that are only kept may have any. */
static unsigned wire_type_of(uint64_t field)
{
    static const uint8_t types[21] = {ANY,    BYTES,  BYTES, VARINT, VARINT, VARINT, VARINT, VARINT, BYTES, VARINT, BYTES,
                                      BYTES, VARINT, ANY,   ANY,    ANY,    ANY,    ANY,    ANY,    ANY,   VARINT};

    return field < sizeof types ? types[field] : ANY;
}

/* Scans one serialized RpcHeader; 0 or an mprpc_malformed. */
static int header(struct mprpc_frame *f, const uint8_t *at, const uint8_t *end)
{
    while (at < end) {
        uint64_t tag, v;
        if (!(at = varint(at, end, &tag)))
            return MPRPC_BAD_VARINT;
        uint64_t field = tag >> 3;
        unsigned type = tag & 7, expected = wire_type_of(field);
        if (field == 0 || tag > UINT32_MAX)
            return MPRPC_BAD_VALUE;
        if (expected != ANY && type != expected)
            return MPRPC_BAD_WIRE_TYPE;
        switch (type) {
        case VARINT:
            if (!(at = varint(at, end, &v)))
                return MPRPC_BAD_VARINT;
            if (expected == VARINT && scalar(f, field, v) < 0)
                return MPRPC_BAD_VALUE;
            break;
        case BYTES:
            if (!(at = varint(at, end, &v)))
                return MPRPC_BAD_VARINT;
            if (v > (uint64_t)(end - at))
                return MPRPC_BAD_LENGTH;
            span(f, field, at, (uint32_t)v);
            at += v;
            break;
        case FIXED64:
        case FIXED32:
            v = type == FIXED64 ? 8 : 4;
            if (v > (uint64_t)(end - at))
                return MPRPC_BAD_LENGTH;
            at += v;
            break;
        default:
            return MPRPC_BAD_WIRE_TYPE;
        }
    }
    return 0;
}

/* mprpc_split's contract for one frame. */
static int64_t frame(const uint8_t *bytes, uint64_t size, uint32_t payload_max, struct mprpc_frame *f, uint64_t *need)
{
    *need = MPRPC_PREFIX;
    if (size < MPRPC_PREFIX)
        return 0;
    uint64_t header_size = load32(bytes), head = MPRPC_PREFIX + header_size;
    if (header_size > MPRPC_HEADER_MAX)
        return alien(bytes);
    *need = head;
    if (size < head)
        return 0;
    memset(f, 0, sizeof *f);
    f->header = bytes + MPRPC_PREFIX;
    f->header_size = (uint32_t)header_size;
    int bad = header(f, f->header, bytes + head);
    if (bad)
        return bad;
    if (f->payload_size > payload_max)
        return (int64_t)head;
    *need = head + f->payload_size;
    if (size < *need)
        return 0;
    f->payload = bytes + head;
    return (int64_t)*need;
}

int64_t mprpc_split(const uint8_t *bytes, size_t size, uint32_t payload_max, struct mprpc_frame *frames, size_t room,
                    size_t *count, uint64_t *need)
{
    uint64_t used = 0;

    *count = 0;
    *need = MPRPC_PREFIX;
    while (*count < room) {
        struct mprpc_frame *f = &frames[*count];
        int64_t n = frame(bytes + used, size - used, payload_max, f, need);
        if (n < 0 && *count == 0)
            return n;
        if (n <= 0)
            break;
        used += (uint64_t)n;
        ++*count;
        *need = MPRPC_PREFIX;
        if (!f->payload)
            break; /* what follows is its payload, no frame */
    }
    return (int64_t)used;
}

static uint8_t *put_varint(uint8_t *to, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        *to++ = (uint8_t)(v | 0x80);
    *to++ = (uint8_t)v;
    return to;
}

static uint8_t *put_scalar(uint8_t *to, unsigned field, uint64_t v)
{
    if (v == 0)
        return to; /* proto3 leaves out what is zero */
    return put_varint(put_varint(to, field << 3 | VARINT), v);
}

static uint8_t *put_span(uint8_t *to, unsigned field, const uint8_t *bytes, uint32_t size)
{
    if (size == 0)
        return to;
    to = put_varint(put_varint(to, field << 3 | BYTES), size);
    memcpy(to, bytes, size);
    return to + size;
}

static size_t put_size(uint8_t *frame, const uint8_t *end)
{
    uint32_t size = (uint32_t)(end - frame - MPRPC_PREFIX);

    for (unsigned i = 0; i < MPRPC_PREFIX; i++)
        frame[i] = (uint8_t)(size >> 8 * i);
    return (size_t)(end - frame);
}

size_t mprpc_put_reply(uint8_t *to, const struct mprpc_reply *r)
{
    uint8_t *at = to + MPRPC_PREFIX;

    at = put_scalar(at, 3, r->payload_size);
    at = put_scalar(at, 4, r->call_id);
    at = put_scalar(at, 5, r->kind);
    at = put_scalar(at, 7, (uint64_t)(int64_t)r->status);
    at = put_span(at, 8, r->text, r->text_size);
    at = put_span(at, 11, r->details, r->details_size);
    at = put_scalar(at, 12, r->not_run);
    return put_size(to, at);
}

size_t mprpc_put_call(uint8_t *to, const uint8_t *names, uint32_t names_size, uint32_t args_size, uint64_t call_id,
                      uint32_t timeout_ms, uint32_t attempt)
{
    uint8_t *at = to + MPRPC_PREFIX;

    if (names_size)
        memcpy(at, names, names_size);
    at = put_scalar(at + names_size, 3, args_size);
    at = put_scalar(at, 4, call_id);
    at = put_scalar(at, 6, timeout_ms);
    at = put_scalar(at, 20, attempt);
    return put_size(to, at);
}

size_t mprpc_put_names(uint8_t *to, const uint8_t *service, uint32_t service_size, const uint8_t *method,
                       uint32_t method_size)
{
    return (size_t)(put_span(put_span(to, 1, service, service_size), 2, method, method_size) - to);
}
