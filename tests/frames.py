"""The frame, in plain Python, written from the wire's description alone: what the C codec is compared with.

    header_size (4 bytes, little-endian) | a serialized mprpc.RpcHeader | args_size bytes of payload

`decode` reads the frame at the start of some bytes, `Frame.encode` writes one. No speed, no cleverness: one table of
fields, and every rule of the wire in the place where a reader would look for it. A frame is taken apart into values
here, while the C codec points into the bytes: the two have nothing in common but the description.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from typing import Any

HEADER_MAX = 65535
METADATA_MAX = 128
PING_MAX = 64

REQUEST, RESPONSE, CANCEL, PING, PONG, GOAWAY = range(6)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIELD_MAX = (1 << 29) - 1  # of any protobuf message
_UINT32 = range(1 << 32)
_HTTP = (b"GET ", b"POST", b"HEAD", b"PUT ", b"OPTI", b"DELE", b"PATC", b"PRI ")

# Field number: name, and the values it can have. Enums are read as unsigned: the wire has no negative kind.
_SCALARS: dict[int, tuple[str, range]] = {
    3: ("args_size", _UINT32),
    4: ("call_id", range(1 << 64)),
    5: ("kind", _UINT32),
    6: ("timeout_ms", _UINT32),
    7: ("status", range(-(1 << 31), 1 << 31)),
    9: ("compression", _UINT32),
    12: ("not_run", range(2)),
    20: ("attempt", _UINT32),
}
_SPANS = {1: "service_name", 2: "method_name", 8: "error_text", 11: "error_details"}
_METADATA = 10


class Malformed(ValueError):
    """These bytes are no frame, and nothing behind them can be read. Its text is one of: size, http, tls, header."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """One frame. A field that is absent has its default; `metadata` are the serialized entries."""

    service_name: bytes = b""
    method_name: bytes = b""
    args_size: int = 0
    call_id: int = 0
    kind: int = REQUEST
    timeout_ms: int = 0
    status: int = 0
    error_text: bytes = b""
    compression: int = 0
    metadata: tuple[bytes, ...] = ()
    error_details: bytes = b""
    not_run: int = 0
    attempt: int = 0
    payload: bytes | None = b""  # None: larger than the limit, so it was not looked at

    def header(self) -> bytes:
        """The serialized RpcHeader, fields in order; what has its default is left out."""
        written = [(_METADATA, span(_METADATA, entry)) for entry in self.metadata]
        written += [(number, scalar(number, getattr(self, name))) for number, (name, _) in _SCALARS.items()]
        written += [(number, span(number, getattr(self, name))) for number, name in _SPANS.items()]
        absent = {number for number, (name, _) in _SCALARS.items() if not getattr(self, name)}
        absent |= {number for number, name in _SPANS.items() if not getattr(self, name)}
        return b"".join(field for number, field in sorted(written, key=lambda each: each[0]) if number not in absent)

    def encode(self) -> bytes:
        """The whole frame. args_size is the payload's, but stays as it is where the payload is None."""
        if self.payload is None:
            return framed(self.header())
        return framed(dataclasses.replace(self, args_size=len(self.payload)).header()) + self.payload


def framed(header: bytes) -> bytes:
    """A header behind its size."""
    return struct.pack("<I", len(header)) + header


def varint(value: int) -> bytes:
    """A base-128 varint; a negative value is sign-extended to 64 bits, as protobuf writes an int32."""
    value %= 1 << 64
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])


def scalar(field: int, value: int) -> bytes:
    """One varint field, its tag included."""
    return varint(field << 3 | _VARINT) + varint(value)


def span(field: int, value: bytes) -> bytes:
    """One length-delimited field, its tag included."""
    return varint(field << 3 | _BYTES) + varint(len(value)) + value


def decode(data: bytes, payload_max: int) -> tuple[Frame, int] | None:
    """The first frame and how many bytes it takes, None while it is incomplete; Malformed if it is none.

    A payload over `payload_max` is not waited for: the frame ends with its header then.
    """
    if len(data) < 4:
        return None
    size = int.from_bytes(data[:4], "little")
    if size > HEADER_MAX:
        raise Malformed(_what(data))
    if len(data) < 4 + size:
        return None
    fields = _fields(data[4 : 4 + size])
    end = 4 + size + fields.get("args_size", 0)
    if fields.get("args_size", 0) > payload_max:
        return Frame(**fields, payload=None), 4 + size
    if len(data) < end:
        return None
    return Frame(**fields, payload=data[4 + size : end]), end


def whole(data: bytes, payload_max: int = 64 << 20) -> list[Frame]:
    """All the frames of bytes that end with a frame; ValueError if they do not."""
    found = []
    while data:
        decoded = decode(data, payload_max)
        if decoded is None:
            raise ValueError(f"{len(data)} bytes are left that are no whole frame")
        found.append(decoded[0])
        data = data[decoded[1] :]
    return found


def _what(data: bytes) -> str:
    if data[:4] in _HTTP:
        return "http"
    return "tls" if data[:2] == b"\x16\x03" and 1 <= data[2] <= 4 else "size"


def _fields(header: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for number, wire_type, value in _pairs(header):
        if number in _SCALARS:
            fields[_SCALARS[number][0]] = _checked(number, wire_type, value)  # given twice: the last counts
        elif number in _SPANS:
            fields[_SPANS[number]] = _bytes(wire_type, value)
        elif number == _METADATA:
            fields["metadata"] = (*fields.get("metadata", ()), _bytes(wire_type, value))
    return fields


def _pairs(header: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    at = 0
    while at < len(header):
        tag, at = _varint(header, at)
        number, wire_type = tag >> 3, tag & 7
        if not 1 <= number <= _FIELD_MAX:
            raise Malformed("header")
        if wire_type == _VARINT:
            value, at = _varint(header, at)
            yield number, wire_type, value
            continue
        if wire_type == _BYTES:
            length, at = _varint(header, at)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise Malformed("header")
        if at + length > len(header):
            raise Malformed("header")
        yield number, wire_type, header[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if value >= 1 << 64:
                raise Malformed("header")
            return value, at + i + 1
    raise Malformed("header")


def _checked(number: int, wire_type: int, value: int | bytes) -> int:
    name, allowed = _SCALARS[number]
    if wire_type != _VARINT or isinstance(value, bytes):
        raise Malformed("header")
    if name == "status" and value >= 1 << 63:
        value -= 1 << 64
    if value not in allowed:
        raise Malformed("header")
    return value


def _bytes(wire_type: int, value: int | bytes) -> bytes:
    if wire_type != _BYTES or isinstance(value, int):
        raise Malformed("header")
    return value
