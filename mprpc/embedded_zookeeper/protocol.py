"""ZooKeeper 3.8's client protocol: its numbers, and its records as bytes.

A packet is a 4-byte length and a record; integers are big-endian; a string, a buffer or a vector is a 4-byte count
(-1 for null) and its content. `Reader` takes a request apart, the functions below it build answers. Nothing here
knows a socket, a session or the tree.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

_INT = struct.Struct(">i")
_LONG = struct.Struct(">q")
_REPLY = struct.Struct(">iiqi")
_WELCOME = struct.Struct(">iiqi")
_NOTICE = struct.Struct(">iiqiii")
_MULTI_HEADER = struct.Struct(">i?i")

PING_XID = -2
NOTIFICATION_XID = -1
SYNC_CONNECTED = 3
PASSWORD_BYTES = 16


class Op(IntEnum):
    """The request types of 3.8, with the names that its documentation gives them."""

    CREATE = 1
    DELETE = 2
    EXISTS = 3
    GET_DATA = 4
    SET_DATA = 5
    GET_ACL = 6
    SET_ACL = 7
    GET_CHILDREN = 8
    SYNC = 9
    PING = 11
    GET_CHILDREN2 = 12
    CHECK = 13
    MULTI = 14
    CREATE2 = 15
    RECONFIG = 16
    CHECK_WATCHES = 17
    REMOVE_WATCHES = 18
    CREATE_CONTAINER = 19
    DELETE_CONTAINER = 20
    CREATE_TTL = 21
    MULTI_READ = 22
    AUTH = 100
    SET_WATCHES = 101
    SASL = 102
    GET_EPHEMERALS = 103
    GET_ALL_CHILDREN_NUMBER = 104
    SET_WATCHES2 = 105
    ADD_WATCH = 106
    WHO_AM_I = 107
    CLOSE_SESSION = -11


class Code(IntEnum):
    """The error codes that this server answers with, and those that a test may have it answer with."""

    OK = 0
    SYSTEM_ERROR = -1
    RUNTIME_INCONSISTENCY = -2
    CONNECTION_LOSS = -4
    MARSHALLING_ERROR = -5
    UNIMPLEMENTED = -6
    OPERATION_TIMEOUT = -7
    BAD_ARGUMENTS = -8
    NO_NODE = -101
    NO_AUTH = -102
    BAD_VERSION = -103
    NO_CHILDREN_FOR_EPHEMERALS = -108
    NODE_EXISTS = -110
    NOT_EMPTY = -111
    SESSION_EXPIRED = -112
    INVALID_ACL = -114
    AUTH_FAILED = -115
    SESSION_MOVED = -118
    NO_WATCHER = -121
    RECONFIG_DISABLED = -123
    QUOTA_EXCEEDED = -125
    THROTTLED = -127


class EventType(IntEnum):
    """What a watch tells of."""

    CREATED = 1
    DELETED = 2
    DATA_CHANGED = 3
    CHILDREN_CHANGED = 4


class AclEntry(NamedTuple):
    """One line of an ACL as it came: the scheme and the id may be null on the wire."""

    perms: int
    scheme: str | None
    id: str | None


class ZooKeeperError(Exception):
    """A request was refused as ZooKeeper refuses it; the client is told `code` and the connection goes on."""

    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


class MalformedError(Exception):
    """The bytes are no request of this protocol; the connection they came on ends."""


class Reader:
    """Reads one record from the front of a packet; raises MalformedError where the packet is too short for it."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes, at: int = 0) -> None:
        self._data = data
        self._at = at

    def integer(self) -> int:
        try:
            (value,) = _INT.unpack_from(self._data, self._at)
        except struct.error:
            raise MalformedError("a record ends inside an int") from None
        self._at += 4
        return int(value)

    def long(self) -> int:
        try:
            (value,) = _LONG.unpack_from(self._data, self._at)
        except struct.error:
            raise MalformedError("a record ends inside a long") from None
        self._at += 8
        return int(value)

    def boolean(self) -> bool:
        if self._at >= len(self._data):
            raise MalformedError("a record ends before a boolean")
        self._at += 1
        return self._data[self._at - 1] != 0

    def at_end(self) -> bool:
        return self._at >= len(self._data)

    def buffer(self) -> bytes | None:
        size = self.integer()
        if size == -1:
            return None
        start, end = self._at, self._at + size
        if size < 0 or end > len(self._data):
            raise MalformedError(f"a record gives {size} as the size of a string or buffer")
        self._at = end
        return self._data[start:end]

    def string(self) -> str:
        """A path or a name; null, which the protocol can write and no operation accepts, is malformed."""
        text = self.nullable_string()
        if text is None:
            raise MalformedError("a record has null where a string must be")
        return text

    def nullable_string(self) -> str | None:
        # Undecodable bytes become U+FFFD, which no path may contain: the same answer that the Java server gives.
        raw = self.buffer()
        return None if raw is None else raw.decode("utf-8", "replace")

    def strings(self) -> list[str]:
        return [self.string() for _ in range(self.integer())]

    def acl(self) -> list[AclEntry]:
        return [AclEntry(self.integer(), self.nullable_string(), self.nullable_string()) for _ in range(self.integer())]

    def multi_header(self) -> tuple[int, bool]:
        """The type of the next operation of a multi, and whether there is none."""
        kind, done = self.integer(), self.boolean()
        self.integer()
        return kind, done


def buffer(data: bytes | None) -> bytes:
    return b"\xff\xff\xff\xff" if data is None else _INT.pack(len(data)) + data


def string(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return _INT.pack(len(raw)) + raw


def strings(texts: Iterable[str]) -> bytes:
    parts = [string(text) for text in texts]
    return _INT.pack(len(parts)) + b"".join(parts)


def integer(value: int) -> bytes:
    return _INT.pack(value)


def acl(entries: Iterable[AclEntry]) -> bytes:
    parts = [_INT.pack(perms) + string(scheme or "") + string(name or "") for perms, scheme, name in entries]
    return _INT.pack(len(parts)) + b"".join(parts)


def multi_result(kind: int, body: bytes) -> bytes:
    return _MULTI_HEADER.pack(kind, False, 0) + body


def multi_error(code: int) -> bytes:
    return _MULTI_HEADER.pack(-1, False, code) + _INT.pack(code)


MULTI_END = _MULTI_HEADER.pack(-1, True, -1)


def reply(xid: int, zxid: int, code: int, body: bytes = b"") -> bytes:
    """A whole packet that answers request `xid`."""
    return _REPLY.pack(16 + len(body), xid, zxid, code) + body


def notice(event: EventType, path: str) -> bytes:
    """A whole packet that tells of a fired watch; 3.8 gives it zxid -1."""
    where = string(path)
    return _NOTICE.pack(24 + len(where), NOTIFICATION_XID, -1, 0, event, SYNC_CONNECTED) + where


def welcome(timeout_ms: int, session_id: int, password: bytes, *, read_only_field: bool) -> bytes:
    """A whole packet that answers a connect request; a client from before 3.4 expects no read-only field."""
    body = _WELCOME.pack(0, timeout_ms, session_id, len(password)) + password
    return buffer(body + b"\0" if read_only_field else body)


class ConnectRequest(NamedTuple):
    """The first packet of a connection."""

    last_zxid: int
    timeout_ms: int
    session_id: int
    password: bytes
    read_only_field: bool

    @classmethod
    def read(cls, packet: bytes) -> ConnectRequest:
        reader = Reader(packet)
        reader.integer()  # protocol version, which the real server ignores too
        last_zxid, timeout_ms, session_id = reader.long(), reader.integer(), reader.long()
        password = reader.buffer() or b""
        return cls(last_zxid, timeout_ms, session_id, password, not reader.at_end())
