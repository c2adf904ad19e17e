/* The frame of mprpc's wire: header_size (4 bytes, little-endian), a serialized mprpc.RpcHeader, args_size bytes of
 * payload. Pure functions over the caller's bytes: no I/O, no allocation, no globals; results point into the input. */
#ifndef MPRPC_CODEC_H
#define MPRPC_CODEC_H

#include <stddef.h>
#include <stdint.h>

enum {
    MPRPC_PREFIX = 4,           /* the bytes of header_size */
    MPRPC_HEADER_MAX = 65535,   /* fixed by the wire: what is above is no header, but may be HTTP or TLS */
    MPRPC_METADATA_MAX = 128,   /* entries; more fail the call */
    MPRPC_REPLY_ROOM = 64,      /* bounds what mprpc_put_reply writes beside text and details */
    MPRPC_CALL_ROOM = 64,       /* bounds what mprpc_put_call writes beside the names */
};

enum mprpc_kind {
    MPRPC_REQUEST = 0,
    MPRPC_RESPONSE = 1,
    MPRPC_CANCEL = 2,
    MPRPC_PING = 3,
    MPRPC_PONG = 4,
    MPRPC_GOAWAY = 5,
    MPRPC_KIND_ANSWERED = 31, /* unknown kinds up to here are answered UNIMPLEMENTED, those above ignored */
};

/* Why bytes are no frame. All are final: the connection can't be read on. */
enum mprpc_malformed {
    MPRPC_BAD_SIZE = -1,      /* header_size over MPRPC_HEADER_MAX, and nothing known */
    MPRPC_BAD_HTTP = -2,      /* the same, but it reads as an HTTP request */
    MPRPC_BAD_TLS = -3,       /* the same, but it reads as a TLS ClientHello */
    MPRPC_BAD_VARINT = -4,    /* over 10 bytes, over 64 bits, or past the header's end */
    MPRPC_BAD_WIRE_TYPE = -5, /* of a known field, or one that protobuf 3 has not */
    MPRPC_BAD_VALUE = -6,     /* out of the field's range */
    MPRPC_BAD_LENGTH = -7,    /* past the header's end */
};

/* One frame. Fields that were absent are zero; pointers are valid as long as the bytes that were split. */
struct mprpc_frame {
    const uint8_t *header; /* the serialized RpcHeader */
    const uint8_t *payload; /* NULL: it is over the limit and was not consumed, payload_size says how much comes */
    const uint8_t *service, *method, *error_text, *error_details;
    uint64_t call_id;
    uint32_t header_size, payload_size;
    uint32_t service_size, method_size, error_text_size, error_details_size;
    uint32_t kind, timeout_ms, compression, attempt, metadata_count;
    int32_t status;
    uint8_t not_run;
};

/* Splits the whole frames at the start of bytes[0, size) into frames[0, room): returns the bytes that *count of them
 * take, 0 when the first is incomplete, or an mprpc_malformed when the first is no frame (one behind others is told
 * by the next call). *need is how many bytes the frame after them takes at least, as far as is known. */
int64_t mprpc_split(const uint8_t *bytes, size_t size, uint32_t payload_max, struct mprpc_frame *frames, size_t room,
                    size_t *count, uint64_t *need);

/* What a caller says of a response, or of any frame that is not a request. */
struct mprpc_reply {
    uint64_t call_id;
    const uint8_t *text, *details;
    uint32_t text_size, details_size, payload_size, kind;
    int32_t status;
    uint8_t not_run;
};

/* Write the bytes that precede the payload, header_size included; return how many. The caller's room must be at
 * least MPRPC_REPLY_ROOM + text_size + details_size, or MPRPC_CALL_ROOM + names_size. The caller has cut text so that
 * the header stays within MPRPC_HEADER_MAX. */
size_t mprpc_put_reply(uint8_t *to, const struct mprpc_reply *reply);
/* names: the fields service_name and method_name, serialized (made once for a method by mprpc_put_names). */
size_t mprpc_put_call(uint8_t *to, const uint8_t *names, uint32_t names_size, uint32_t args_size, uint64_t call_id,
                      uint32_t timeout_ms, uint32_t attempt);
/* Room: 12 bytes beside the names. */
size_t mprpc_put_names(uint8_t *to, const uint8_t *service, uint32_t service_size, const uint8_t *method,
                       uint32_t method_size);

#endif
