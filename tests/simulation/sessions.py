"""The C session as both sides of the simulation use it: bytes and the time in, events and bytes out."""

from __future__ import annotations

from typing import Any, NamedTuple

import mprpc._native

SERVICE = b"fixbug.UserServiceRpc"
METHODS = (b"Login", b"Register")
PAYLOAD_MAX = 1 << 20
_ROOM = 8  # events taken at once
_S = 1_000_000_000
RESPONSE, CANCEL, PING, PONG, GOAWAY = 1, 2, 3, 4, 5


class Event(NamedTuple):
    """What a session tells. `deadline`: seconds on the clock, 0 for none."""

    kind: int
    call_id: int
    payload: bytes
    status: int
    not_run: bool
    tag: int
    deadline: float
    method: int
    attempt: int


class Violation(Exception):
    """The peer broke the protocol, as the session says."""


class Native:
    """One build of the C units."""

    def __init__(self, module: Any = mprpc._native) -> None:
        self.ffi, self.lib = module.ffi, module.lib
        self.services = self.ffi.gc(self.lib.mprpc_services_new(), self.lib.mprpc_services_free)
        self.names = []
        for index, method in enumerate(METHODS):
            assert self.lib.mprpc_services_add(self.services, SERVICE, len(SERVICE), method, len(method), index) == 0
            to = self.ffi.new("uint8_t[]", 64)
            size = self.lib.mprpc_put_names(to, SERVICE, len(SERVICE), method, len(method))
            self.names.append(bytes(self.ffi.buffer(to, size)))
        self.events = self.ffi.new("struct mprpc_event[]", _ROOM)
        self.count = self.ffi.new("size_t *")
        self.out = self.ffi.new("struct mprpc_bytes *")
        self.room = self.ffi.new("uint8_t[]", 4096)

    def frame(self, kind: int, call_id: int, payload: bytes = b"") -> bytes:
        """Of those that are neither request nor response."""
        reply = self.ffi.new("struct mprpc_reply *", {"kind": kind, "call_id": call_id, "payload_size": len(payload)})
        return bytes(self.ffi.buffer(self.room, self.lib.mprpc_put_reply(self.room, reply))) + payload


class Session:
    """One side's session with the bytes that it has not used yet. `close` when its connection has ended."""

    def __init__(self, native: Native, *, server: bool) -> None:
        self._native = native
        self._ffi, self._lib = native.ffi, native.lib
        self.handle = self._ffi.gc(self._ffi.new("struct mprpc_session *"), self._lib.mprpc_session_free)
        self._lib.mprpc_session_init(self.handle, native.services if server else self._ffi.NULL, PAYLOAD_MAX, 0)
        self._kept = b""

    def receive(self, data: bytes, now: float) -> tuple[list[Event], bytes]:
        """The events and what the protocol answers by itself; raises Violation."""
        native, kept = self._native, self._kept + data
        happened: list[Event] = []
        out = b""
        if len(kept) < self.handle.need:
            self._kept = kept
            return happened, out
        while kept:
            used = self._lib.mprpc_session_receive(
                self.handle, self._ffi.from_buffer(kept), len(kept), int(now * _S), native.events, _ROOM,
                native.count, native.out,
            )  # fmt: skip
            out += self._take_output()
            if used < 0:
                raise Violation(self._ffi.string(self._lib.mprpc_why(used)).decode())
            happened += [self._event(native.events[i]) for i in range(native.count[0])]
            kept = kept[used:]
            if not used:
                break
        self._kept = kept
        return happened, out

    def _event(self, event: Any) -> Event:
        frame = event.frame
        payload = bytes(self._ffi.buffer(frame.payload, frame.payload_size)) if frame.payload_size else b""
        return Event(
            frame.kind, frame.call_id, payload, frame.status, bool(frame.not_run), event.tag, event.deadline / _S,
            event.method, frame.attempt,
        )  # fmt: skip

    def _take_output(self) -> bytes:
        out = self._native.out
        if not out.size:
            return b""
        taken = bytes(self._ffi.buffer(out.at, out.size))
        self._lib.mprpc_bytes_free(out)
        return taken

    @property
    def in_flight(self) -> int:
        return int(self.handle.in_flight)

    # The provider's side.

    def reply(self, call_id: int, payload: bytes = b"", status: int = 0, not_run: bool = False) -> bytes:
        fields = {"call_id": call_id, "payload_size": len(payload), "status": status, "not_run": not_run}
        reply = self._ffi.new("struct mprpc_reply *", fields)
        size = self._lib.mprpc_session_reply(self.handle, reply, self._native.room)
        return bytes(self._ffi.buffer(self._native.room, size)) + payload

    def drain(self) -> bytes:
        assert self._lib.mprpc_session_drain(self.handle, self._native.out) == 0
        return self._take_output()

    # The client's side.

    def call(self, tag: int) -> int:
        return int(self._lib.mprpc_session_call(self.handle, tag))

    def forget(self, call_id: int) -> bool:
        return bool(self._lib.mprpc_session_forget(self.handle, call_id))

    def request(self, call_id: int, method: int, payload: bytes, timeout: float, attempt: int) -> bytes:
        names, room = self._native.names[method], self._native.room
        ms = max(1, -int(-timeout * 1000 // 1))
        size = self._lib.mprpc_put_call(room, names, len(names), len(payload), call_id, ms, attempt)
        return bytes(self._ffi.buffer(room, size)) + payload
