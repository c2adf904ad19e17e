"""The codec: every frame as literal bytes, every way not to be one, and agreement with two other readers of the wire.

Those are frames.py, written from the wire's description, and google.protobuf by proto/rpcheader.proto.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

import frames
import generated
from frames import Frame, framed, scalar, span, varint
from mprpc._native import ffi, lib

RpcHeader = generated.module("rpcheader_pb2").RpcHeader
PAYLOAD_MAX = 1 << 20

# Name, bytes, what they say.
FRAMES = [
    (
        "the seed's Login",
        "19000000 0a0e 5573657253657276696365527063 1205 4c6f67696e 1813 0a097a68616e672073616e1206313233343536",
        Frame(
            service_name=b"UserServiceRpc",
            method_name=b"Login",
            args_size=19,
            payload=b"\x0a\x09zhang san\x12\x06123456",
        ),
    ),
    (
        "a classic request without arguments",
        "17000000 0a0e 5573657253657276696365527063 1205 4c6f67696e",
        Frame(service_name=b"UserServiceRpc", method_name=b"Login"),
    ),
    (
        "a framed request with all a request can have",
        "24000000 0a03 612e53 1201 4d 1802 2007 30ac02 4802 5206 0a016b120176 5206 0a016b120176 a00102 6869",
        Frame(
            service_name=b"a.S",
            method_name=b"M",
            args_size=2,
            call_id=7,
            timeout_ms=300,
            compression=2,
            metadata=(b"\x0a\x01k\x12\x01v",) * 2,
            attempt=2,
            payload=b"hi",
        ),
    ),
    ("a response", "06000000 1802 2007 2801 6f6b", Frame(call_id=7, kind=1, args_size=2, payload=b"ok")),
    (
        "a response that says why",
        "10000000 2007 2801 380d 4202 6e6f 5a02 080d 6001",
        Frame(call_id=7, kind=1, status=13, error_text=b"no", error_details=b"\x08\x0d", not_run=1),
    ),
    (
        "a response with a negative status",
        "0f000000 2007 2801 38ffffffffffffffffff01",
        Frame(call_id=7, kind=1, status=-1),
    ),
    ("CANCEL", "04000000 2007 2802", Frame(call_id=7, kind=2)),
    (
        "PING for one service, with the highest call_id",
        "14000000 0a03 612e53 1804 20ffffffffffffffffff01 2803 70696e67",
        Frame(service_name=b"a.S", args_size=4, call_id=2**64 - 1, kind=3, payload=b"ping"),
    ),
    (
        "PONG with a status",
        "08000000 1804 2007 2804 380c 70696e67",
        Frame(args_size=4, call_id=7, kind=4, status=12, payload=b"ping"),
    ),
    ("GOAWAY", "04000000 2007 2805", Frame(call_id=7, kind=5)),
    ("GOAWAY when nothing was accepted", "02000000 2805", Frame(kind=5)),
    ("a kind kept for streaming", "04000000 2007 2806", Frame(call_id=7, kind=6)),
    ("a kind of another age", "06000000 2007 28ff8c01", Frame(call_id=7, kind=0x467F)),
    ("no field at all", "00000000", Frame()),
    (
        "unknown fields of every wire type are skipped",
        "21000000 68 ff01 71 0102030405060708 7a03 616263 8501 01020304 f8ffffff0f 05 2007 2801",
        Frame(call_id=7, kind=1),
    ),
    (
        "of a scalar given twice the last counts",
        "18000000 1863 1802 2005 2007 2803 2801 3805 3800 300a 3014 6001 6000 6869",
        Frame(args_size=2, call_id=7, kind=1, timeout_ms=20, payload=b"hi"),
    ),
    (
        "of a name given twice the last counts",
        "0f000000 0a03 612e53 0a01 62 1201 4d 1200 2007",
        Frame(service_name=b"b", call_id=7),
    ),
    ("a varint longer than it needs to be", "07000000 20 87808000 2801", Frame(call_id=7, kind=1)),
    ("fields in the wrong order", "06000000 2801 2007 1802 6f6b", Frame(call_id=7, kind=1, args_size=2, payload=b"ok")),
]
MALFORMED = [
    ("service_name as a varint", "02000000 0801", "wrong wire type"),
    ("method_name as fixed32", "05000000 1501020304", "wrong wire type"),
    ("args_size as bytes", "03000000 1a0141", "wrong wire type"),
    ("call_id as fixed64", "09000000 210102030405060708", "wrong wire type"),
    ("kind as bytes", "03000000 2a0141", "wrong wire type"),
    ("timeout_ms as fixed32", "05000000 3501020304", "wrong wire type"),
    ("status as fixed64", "09000000 390102030405060708", "wrong wire type"),
    ("error_text as a varint", "02000000 4001", "wrong wire type"),
    ("compression as bytes", "03000000 4a0141", "wrong wire type"),
    ("metadata as a varint", "02000000 5001", "wrong wire type"),
    ("error_details as fixed32", "05000000 5d01020304", "wrong wire type"),
    ("not_run as bytes", "03000000 620141", "wrong wire type"),
    ("attempt as bytes", "04000000 a2010141", "wrong wire type"),
    ("wire type 3 of an unknown field", "02000000 6b6c", "wrong wire type"),
    ("wire type 4 of an unknown field", "01000000 6c", "wrong wire type"),
    ("wire type 6 of an unknown field", "02000000 6e01", "wrong wire type"),
    ("wire type 7 of an unknown field", "02000000 6f01", "wrong wire type"),
    ("wire type 3 of a known field", "02000000 0b0c", "wrong wire type"),
    ("a varint over 10 bytes", "0c000000 20 8080808080808080808001", "does not end"),
    ("a varint over 64 bits", "0b000000 20 ffffffffffffffffff02", "does not end"),
    ("an unknown varint over 64 bits", "0b000000 68 ffffffffffffffffff7f", "does not end"),
    ("a varint that the header cuts", "02000000 2080", "does not end"),
    ("a tag that the header cuts", "01000000 a0", "does not end"),
    ("a tag without a value", "01000000 20", "does not end"),
    ("a length over 10 bytes", "0c000000 0a 8080808080808080808001", "does not end"),
    ("args_size over 32 bits", "06000000 18 8080808010", "out of its field's range"),
    ("kind over 32 bits", "06000000 28 8080808010", "out of its field's range"),
    ("a negative kind", "0b000000 28 ffffffffffffffffff01", "out of its field's range"),
    ("timeout_ms over 32 bits", "06000000 30 8080808010", "out of its field's range"),
    ("status above 31 bits", "06000000 38 8080808008", "out of its field's range"),
    ("status below 31 bits", "0b000000 38 fffffffff7ffffffff01", "out of its field's range"),
    ("compression over 32 bits", "06000000 48 8080808010", "out of its field's range"),
    ("not_run neither true nor false", "02000000 6002", "out of its field's range"),
    ("attempt over 32 bits", "07000000 a001 8080808010", "out of its field's range"),
    ("field number 0", "02000000 0001", "out of its field's range"),
    ("field number 0 with bytes", "03000000 020141", "out of its field's range"),
    ("a field number over 29 bits", "06000000 80808080 1001", "out of its field's range"),
    ("a length past the header's end", "04000000 0a03 6162", "length past its end"),
    ("a length past it, with bytes behind the header", "04000000 0a03 6162 63646566", "length past its end"),
    ("an unknown length past the header's end", "04000000 6a03 6162", "length past its end"),
    ("a length of 63 bits", "0b000000 0a ffffffffffffffff7f 41", "length past its end"),
    ("a length of 64 bits", "0b000000 0a ffffffffffffffffff01", "length past its end"),
    ("fixed64 past the header's end", "08000000 69 01020304050607", "length past its end"),
    ("fixed32 past the header's end", "04000000 6d 010203", "length past its end"),
    ("header_size 0xFFFFFFFF", "ffffffff", "header_size over 65535"),
    ("header_size 0x7FFFFFFF", "ffffff7f", "header_size over 65535"),
    ("header_size 65536", "00000100", "header_size over 65535"),
    ("a big-endian header_size", "00000019 0a0e", "header_size over 65535"),
    ("GET", "47455420 2f20", "speaks HTTP"),
    ("POST", "504f5354 202f", "speaks HTTP"),
    ("HEAD", "48454144 202f", "speaks HTTP"),
    ("PUT", "50555420 2f20", "speaks HTTP"),
    ("OPTIONS", "4f505449 4f4e", "speaks HTTP"),
    ("DELETE", "44454c45 5445", "speaks HTTP"),
    ("PATCH", "50415443 4820", "speaks HTTP"),
    ("HTTP/2's preface", "505249202a20485454502f322e30", "speaks HTTP"),
    ("a method that is none", "47455409", "header_size over 65535"),
    ("a ClientHello of TLS 1.0", "16030100 c8", "speaks TLS"),
    ("a ClientHello of TLS 1.2", "16030301 00", "speaks TLS"),
    ("a ClientHello of TLS 1.3's drafts", "16030400 c8", "speaks TLS"),
    ("a ClientHello of SSL 3", "16030001 00", "header_size over 65535"),
    ("a ClientHello of the future", "16030500 00", "header_size over 65535"),
]


@dataclasses.dataclass
class Split:
    """What mprpc_split said: bytes used, or below 0 why not; the frames; what the next one needs at least."""

    used: int
    frames: list[dict[str, Any]]
    need: int

    @property
    def why(self) -> str:
        return str(ffi.string(lib.mprpc_why(self.used)).decode())


def split(data: bytes, payload_max: int = PAYLOAD_MAX, room: int = 16) -> Split:
    found, count, need = ffi.new("struct mprpc_frame[]", room), ffi.new("size_t *"), ffi.new("uint64_t *")
    used = lib.mprpc_split(ffi.from_buffer(data), len(data), payload_max, found, room, count, need)
    return Split(used, [_seen(found[i]) for i in range(count[0])], need[0])


def _seen(frame: Any) -> dict[str, Any]:
    """What the C codec saw, under the field's names; metadata is only counted there."""
    return {
        "service_name": ffi.buffer(frame.service, frame.service_size)[:] if frame.service_size else b"",
        "method_name": ffi.buffer(frame.method, frame.method_size)[:] if frame.method_size else b"",
        "args_size": frame.payload_size,
        "call_id": frame.call_id,
        "kind": frame.kind,
        "timeout_ms": frame.timeout_ms,
        "status": frame.status,
        "error_text": ffi.buffer(frame.error_text, frame.error_text_size)[:] if frame.error_text_size else b"",
        "compression": frame.compression,
        "metadata": frame.metadata_count,
        "error_details": ffi.buffer(frame.error_details, frame.error_details_size)[:]
        if frame.error_details_size
        else b"",
        "not_run": frame.not_run,
        "attempt": frame.attempt,
        "payload": ffi.buffer(frame.payload, frame.payload_size)[:] if frame.payload != ffi.NULL else None,
        "header": ffi.buffer(frame.header, frame.header_size)[:],
    }


def seen(frame: Frame, data: bytes) -> dict[str, Any]:
    """The same of a frame that frames.py decoded from data."""
    header_size = int.from_bytes(data[:4], "little")
    fields = dataclasses.asdict(frame)
    return {**fields, "metadata": len(frame.metadata), "header": data[4 : 4 + header_size]}


# ---- literal bytes ----


@pytest.mark.parametrize(("hexadecimal", "said"), [row[1:] for row in FRAMES], ids=[row[0] for row in FRAMES])
def test_a_frame_whole_cut_anywhere_and_with_bytes_behind_it(hexadecimal: str, said: Frame) -> None:
    data = bytes.fromhex(hexadecimal)
    assert frames.decode(data, PAYLOAD_MAX) == (said, len(data))
    assert split(data) == Split(len(data), [seen(said, data)], 4)
    for cut in range(len(data)):
        part = split(data[:cut])
        assert (part.used, part.frames) == (0, [])
        assert cut < part.need <= len(data)
    for behind in (b"\x00", b"\xff", b"\xff" * 4, data[:-1]):
        assert split(data + behind, room=1) == Split(len(data), [seen(said, data)], 4)


def test_what_need_says_is_enough_to_feed_the_whole_byte_by_byte() -> None:
    stream = b"".join(bytes.fromhex(row[1]) for row in FRAMES)
    buffered, need, found, looks = b"", 0, [], 0
    for byte in stream:
        buffered += bytes([byte])
        if len(buffered) < need:
            continue
        looks += 1
        part = split(buffered)
        found += part.frames
        buffered, need = buffered[part.used :], part.need
    assert buffered == b""
    assert found == [seen(row[2], bytes.fromhex(row[1])) for row in FRAMES]
    assert looks <= 4 * len(FRAMES)  # nothing, prefix, header, payload


def test_many_frames_at_once_and_no_more_than_there_is_room_for() -> None:
    data = [bytes.fromhex(row[1]) for row in FRAMES]
    expected = [seen(row[2], bytes.fromhex(row[1])) for row in FRAMES]
    stream = b"".join(data)
    for room in range(1, len(FRAMES) + 2):
        part = split(stream, room=room)
        assert part.frames == expected[:room]
        assert part.used == sum(map(len, data[:room]))
    assert split(stream, room=0) == Split(0, [], 4)


@pytest.mark.parametrize(("hexadecimal", "why"), [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
def test_what_is_no_frame_is_named(hexadecimal: str, why: str) -> None:
    data = bytes.fromhex(hexadecimal)
    with pytest.raises(frames.Malformed):
        frames.decode(data, PAYLOAD_MAX)
    assert why in split(data).why
    assert split(data + bytes(100)).used == split(data).used  # a header's end is its end
    whole = 4 if "over 65535" in why or "speaks" in why else 4 + data[0]
    for cut in range(whole):
        assert split(data[:cut]).used == 0
    behind_another = split(bytes.fromhex(FRAMES[0][1]) + data)
    assert behind_another.used == len(bytes.fromhex(FRAMES[0][1]))  # told by the next call, when it stands first
    assert len(behind_another.frames) == 1


def test_a_size_within_the_limit_is_always_a_frame() -> None:
    header = span(13, bytes(frames.HEADER_MAX - 4))
    assert len(header) == frames.HEADER_MAX
    assert split(framed(header)).used == 4 + frames.HEADER_MAX
    assert "over 65535" in split(framed(header + b"\x00")).why
    clienthello_like = span(13, bytes(0x0316 - 3))  # its size's first bytes are TLS's
    assert framed(clienthello_like)[:2] == b"\x16\x03"
    assert split(framed(clienthello_like)).used == 4 + 0x0316


def test_a_claimed_size_is_compared_in_64_bits() -> None:
    data = framed(scalar(3, 0xFFFFFFFF) + scalar(4, 1))
    assert split(data, payload_max=0xFFFFFFFF) == Split(0, [], len(data) + 0xFFFFFFFF)
    refused = split(data + b"abc", payload_max=0xFFFFFFFE)
    assert refused.used == len(data)
    assert (refused.frames[0]["args_size"], refused.frames[0]["payload"]) == (0xFFFFFFFF, None)


def test_a_payload_over_the_limit_is_not_waited_for_and_nothing_behind_it_is_split() -> None:
    over, under = Frame(call_id=1, payload=bytes(11)).encode(), Frame(call_id=2, payload=bytes(10)).encode()
    part = split(under + over + under, payload_max=10)
    assert part.used == len(under) + len(over) - 11
    assert [frame["payload"] for frame in part.frames] == [bytes(10), None]
    assert part.frames[1]["args_size"] == 11


def test_metadata_is_counted_not_parsed() -> None:
    header = span(10, b"\xff not a message") * 129
    assert split(framed(header)).frames[0]["metadata"] == 129


# ---- what is written ----


def put_reply(text: bytes = b"", details: bytes = b"", payload_size: int = 0, **fields: int) -> bytes:
    kept = ffi.from_buffer(text), ffi.from_buffer(details)
    reply = ffi.new("struct mprpc_reply *", {**fields, "text": kept[0], "details": kept[1]})
    reply.text_size, reply.details_size, reply.payload_size = len(text), len(details), payload_size
    to = ffi.new("uint8_t[]", 64 + len(text) + len(details))
    return bytes(ffi.buffer(to, lib.mprpc_put_reply(to, reply)))


def put_call(service: bytes, method: bytes, args_size: int, call_id: int, timeout_ms: int, attempt: int = 0) -> bytes:
    names = ffi.new("uint8_t[]", 12 + len(service) + len(method))
    size = lib.mprpc_put_names(names, service, len(service), method, len(method))
    to = ffi.new("uint8_t[]", 64 + size)
    return bytes(ffi.buffer(to, lib.mprpc_put_call(to, names, size, args_size, call_id, timeout_ms, attempt)))


def test_the_seeds_request_is_written_as_the_seed_writes_it() -> None:
    arguments = b"\x0a\x09zhang san\x12\x06123456"
    assert put_call(b"UserServiceRpc", b"Login", 19, 0, 0) + arguments == bytes.fromhex(FRAMES[0][1])
    assert put_call(b"UserServiceRpc", b"Login", 0, 0, 0)[:4] == bytes([23, 0, 0, 0])  # args_size is absent


UINT32, UINT64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)


@given(st.binary(max_size=300), st.binary(max_size=300), UINT32, UINT64, UINT32, UINT32)
@example(b"", b"", 0, 0, 0, 0)
@example(b"s" * 127, b"m" * 128, 2**32 - 1, 2**64 - 1, 2**32 - 1, 2**32 - 1)
def test_a_call_is_written_as_protobuf_writes_it(
    service: bytes, method: bytes, args_size: int, call_id: int, timeout_ms: int, attempt: int
) -> None:
    header = RpcHeader(
        service_name=service,
        method_name=method,
        args_size=args_size,
        call_id=call_id,
        timeout_ms=timeout_ms,
        attempt=attempt,
    )
    assert put_call(service, method, args_size, call_id, timeout_ms, attempt) == framed(header.SerializeToString())


@given(st.text(max_size=100), st.binary(max_size=300), UINT32, UINT64, st.integers(0, 5), INT32, st.booleans())
@example("", b"", 0, 0, 0, 0, False)
@example("é" * 4096, b"d" * 32768, 2**32 - 1, 2**64 - 1, 5, -1, True)
def test_a_reply_is_written_as_protobuf_writes_it(
    text: str, details: bytes, payload_size: int, call_id: int, kind: int, status: int, not_run: bool
) -> None:
    header = RpcHeader(
        args_size=payload_size,
        call_id=call_id,
        kind=kind,
        status=status,
        error_text=text,
        error_details=details,
        not_run=not_run,
    )
    written = put_reply(
        text.encode(), details, payload_size, call_id=call_id, kind=kind, status=status, not_run=not_run
    )
    assert written == framed(header.SerializeToString())
    assert len(written) <= 64 + len(text.encode()) + len(details)  # MPRPC_REPLY_ROOM


# ---- agreement ----

KNOWN = st.one_of(
    st.builds(span, st.sampled_from([1, 2, 8, 10, 11]), st.binary(max_size=20)),
    st.builds(scalar, st.sampled_from([3, 5, 6, 9, 20]), UINT32),
    st.builds(scalar, st.just(3), st.integers(0, 40)),
    st.builds(scalar, st.just(4), UINT64),
    st.builds(scalar, st.just(7), INT32),
    st.builds(scalar, st.just(12), st.integers(0, 1)),
)
UNKNOWN_NUMBER = st.one_of(st.integers(13, 19), st.integers(21, 31), st.integers(32, 2**29 - 1))
UNKNOWN = st.one_of(
    st.builds(scalar, UNKNOWN_NUMBER, UINT64),
    st.builds(span, UNKNOWN_NUMBER, st.binary(max_size=20)),
    st.builds(lambda field, value: varint(field << 3 | 1) + value, UNKNOWN_NUMBER, st.binary(min_size=8, max_size=8)),
    st.builds(lambda field, value: varint(field << 3 | 5) + value, UNKNOWN_NUMBER, st.binary(min_size=4, max_size=4)),
)
HEADERS = st.lists(KNOWN | UNKNOWN, max_size=12).map(b"".join)
BROKEN_FIELDS = st.one_of(
    st.builds(scalar, st.integers(0, 32), UINT64),
    st.builds(span, st.integers(0, 32), st.binary(max_size=10)),
    st.builds(lambda field, kind: varint(field << 3 | kind), st.integers(0, 32), st.integers(0, 7)),
    st.binary(max_size=12),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A frame with a few bytes changed, put in or taken out."""
    data = bytearray(framed(draw(HEADERS)) + draw(st.binary(max_size=40)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(data)


STREAMS = st.one_of(
    st.builds(lambda header, behind: framed(header) + behind, HEADERS, st.binary(max_size=60)),
    st.builds(
        lambda fields, behind: framed(b"".join(fields)) + behind,
        st.lists(KNOWN | BROKEN_FIELDS, max_size=6),
        st.binary(max_size=60),
    ),
    mutated(),
    st.binary(max_size=40),
)


@settings(max_examples=1500)
@given(STREAMS, st.sampled_from([0, 3, 30, PAYLOAD_MAX, 2**32 - 1]))
def test_the_codec_and_a_reader_written_from_the_description_agree(data: bytes, payload_max: int) -> None:
    part = split(data, payload_max, room=1)
    bad, decoded = "", None
    try:
        decoded = frames.decode(data, payload_max)
    except frames.Malformed as why:
        bad = str(why)
    if bad:
        assert part.used < 0
        words = {"http": "HTTP", "tls": "TLS", "size": "header_size over", "header": "a header with a "}
        assert words[bad] in part.why
        return
    if decoded is None:
        assert (part.used, part.frames) == (0, [])
        assert part.need > len(data)
    else:
        assert (part.used, part.frames) == (decoded[1], [seen(decoded[0], data)])


@settings(max_examples=500)
@given(HEADERS)
def test_what_the_codec_takes_protobuf_reads_the_same(header: bytes) -> None:
    part = split(framed(header), 0)
    assert part.used == 4 + len(header)
    try:
        read = RpcHeader.FromString(header)
    except DecodeError:  # the text is not UTF-8, or metadata holds no message: nothing that the codec looks at
        without = [field for field in frames._pairs(header) if field[0] not in (8, 10)]
        assert len(without) < len(list(frames._pairs(header)))
        return
    taken = part.frames[0]
    assert taken["metadata"] == len(read.metadata)
    assert taken["error_text"] == read.error_text.encode()
    for name in ("service_name", "method_name", "args_size", "call_id", "timeout_ms", "status", "error_details"):
        assert taken[name] == getattr(read, name), name
    assert bool(taken["not_run"]) == read.not_run
    assert taken["attempt"] == read.attempt
    for name in ("kind", "compression"):  # protobuf's enums are signed
        assert taken[name] == getattr(read, name) % 2**32, name
