"""The session: each rule of the wire as literal bytes that go in and come out, on both sides, however they are cut.

Bytes are written in hexadecimal, with text in quotes: `0a03'a.S'` is the field service_name of three bytes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import frames
from frames import Frame
from mprpc._native import ffi, lib

NOW = 1_000_000_000
LIMIT = 100  # bytes of payload in most tests
UNKNOWN, FRAMED, CLASSIC = 0, 1, 2


def raw(text: str) -> bytes:
    """`0a03'a.S'` as bytes."""
    return b"".join(
        part[1:-1].encode() if part[0] == "'" else bytes.fromhex(part)
        for part in re.findall(r"'[^']*'|[0-9a-f]+", text)
    )


@dataclasses.dataclass(frozen=True)
class Event:
    """What a session tells its driver: a frame, and of a request also which method and until when."""

    frame: Frame
    method: int = 0
    deadline: int = 0
    tag: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All that can be seen of a session after some bytes. `why` is empty while it lives."""

    events: tuple[Event, ...] = ()
    out: bytes = b""
    why: str = ""
    strays: int = 0
    in_flight: int = 0
    dialect: int = FRAMED


def _services() -> Any:
    made = ffi.gc(lib.mprpc_services_new(), lib.mprpc_services_free)
    for index, (service, method) in enumerate([(b"a.S", b"M"), (b"a.S", b"N"), (b"a.T", b"M"), (b"S", b"M")]):
        assert lib.mprpc_services_add(made, service, len(service), method, len(method), index) == 0
    return made


SERVICES = _services()


class Session:
    """A session and what its driver keeps: the bytes that are not used yet, the events, the output. Never fed again
    after it ended, as the loop and the channel do it."""

    def __init__(self, *, services: Any = ffi.NULL, limit: int = LIMIT, classic: bool = True, room: int = 32) -> None:
        self.handle = ffi.gc(ffi.new("struct mprpc_session *"), lib.mprpc_session_free)
        lib.mprpc_session_init(self.handle, services, limit, classic)
        self._room, self._kept = room, b""
        self.events: list[Event] = []
        self.out, self.why = b"", ""

    def feed(self, data: bytes, now: int = NOW) -> Outcome:
        self._kept += data
        events, count = ffi.new("struct mprpc_event[]", self._room), ffi.new("size_t *")
        while not self.why:
            with Output() as out:
                kept = ffi.from_buffer(self._kept)
                used = lib.mprpc_session_receive(
                    self.handle, kept, len(self._kept), now, events, self._room, count, out.bytes
                )
                self.out += out.taken()
            if used < 0:
                assert count[0] == 0
                self.why = ffi.string(lib.mprpc_why(used)).decode()
                break
            self.events += [_event(events[i]) for i in range(count[0])]
            self._kept = self._kept[used:]
            if used == 0:
                break
        return self.outcome()

    def outcome(self) -> Outcome:
        handle = self.handle
        return Outcome(tuple(self.events), self.out, self.why, handle.strays, handle.in_flight, dialect=handle.dialect)

    def call(self, tag: int) -> int:
        return int(lib.mprpc_session_call(self.handle, tag))

    def forget(self, call_id: int) -> int:
        return int(lib.mprpc_session_forget(self.handle, call_id))

    def drain(self) -> bytes:
        with Output() as out:
            assert lib.mprpc_session_drain(self.handle, out.bytes) == 0
            return out.taken()

    def reply(self, call_id: int, text: bytes = b"", details: bytes = b"", **fields: int) -> bytes | str:
        """The answer to an accepted request, or why there is none. text lies at the end of its own memory."""
        kept = ffi.from_buffer(text), ffi.from_buffer(details)
        reply = ffi.new("struct mprpc_reply *", {**fields, "call_id": call_id, "text": kept[0], "details": kept[1]})
        reply.text_size, reply.details_size = len(text), len(details)
        to = ffi.new("uint8_t[]", 64 + len(text) + len(details))
        size = lib.mprpc_session_reply(self.handle, reply, to)
        return bytes(ffi.buffer(to, size)) if size >= 0 else str(ffi.string(lib.mprpc_why(size)).decode())


class Output:
    """The growing bytes that a session writes to."""

    def __init__(self) -> None:
        self.bytes = ffi.new("struct mprpc_bytes *")

    def taken(self) -> bytes:
        return bytes(ffi.buffer(self.bytes.at, self.bytes.size)) if self.bytes.size else b""

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        lib.mprpc_bytes_free(self.bytes)


def _event(event: Any) -> Event:
    f = event.frame

    def span(at: Any, size: int) -> bytes:
        return bytes(ffi.buffer(at, size)) if size else b""

    frame = Frame(
        service_name=span(f.service, f.service_size),
        method_name=span(f.method, f.method_size),
        args_size=f.payload_size,
        call_id=f.call_id,
        kind=f.kind,
        timeout_ms=f.timeout_ms,
        status=f.status,
        error_text=span(f.error_text, f.error_text_size),
        compression=f.compression,
        error_details=span(f.error_details, f.error_details_size),
        not_run=f.not_run,
        attempt=f.attempt,
        payload=span(f.payload, f.payload_size) if f.payload != ffi.NULL else None,
    )
    if f.kind == frames.REQUEST:
        return Event(frame, event.method, event.deadline)
    return Event(frame, tag=event.tag if f.kind == frames.RESPONSE else 0)


def server(**options: Any) -> Session:
    return Session(services=SERVICES, **options)


def client(calls: int = 0, **options: Any) -> Session:
    """With call_ids 1 to `calls` in flight, under the tags 101 and so on."""
    made = Session(**options)
    for i in range(calls):
        assert made.call(101 + i) == 1 + i
    return made


def everywhere(make: Any, stream: bytes) -> Outcome:
    """What comes of a stream, which must be the same whole, byte by byte, cut anywhere, and one event at a time."""
    outcome: Outcome = make().feed(stream)
    assert make(room=1).feed(stream) == outcome
    bytewise = make()
    for i in range(len(stream)):
        bytewise.feed(stream[i : i + 1])
    assert bytewise.outcome() == outcome
    for cut in range(1, len(stream)):
        parts = make()
        parts.feed(stream[:cut])
        assert parts.feed(stream[cut:]) == outcome, cut
    return outcome


def request(call_id: int, method: int = 0, payload: bytes = b"hi", **fields: Any) -> Event:
    """The event of a request for a.S.M (or .N)."""
    deadline = NOW + fields["timeout_ms"] * 1_000_000 if fields.get("timeout_ms") else 0
    names = [(b"a.S", b"M"), (b"a.S", b"N"), (b"a.T", b"M"), (b"S", b"M")][method]
    frame = Frame(*names, args_size=len(payload), call_id=call_id, payload=payload, **fields)
    return Event(frame, method, deadline)


REQUEST_7 = "0c000000 0a03'a.S' 1201'M' 1802 2007 'hi'"
REQUEST_8 = "0c000000 0a03'a.S' 1201'M' 1802 2008 'hi'"
CLASSIC_HI = "08000000 0a01'S' 1201'M' 1802 'hi'"


def refusal(call_id: int, status: int, text: str) -> bytes:
    """The answer to a request that did not run."""
    size = len(text)
    assert size < 128
    return frames.framed(raw(f"20{call_id:02x} 2801 38{status:02x} 42{size:02x}") + text.encode() + raw("6001"))


# ---- the server's side ----

SERVED: list[tuple[str, str, list[Event], bytes, dict[str, Any]]] = [
    # name, what the peer sends, events, what is answered at once, the rest of the outcome
    ("a request", REQUEST_7, [request(7)], b"", {"in_flight": 1}),
    (
        "a request without arguments",
        "0a000000 0a03'a.S' 1201'N' 2007",
        [request(7, 1, b"")],
        b"",
        {"in_flight": 1},
    ),
    (
        "a request's clock starts when it is received",
        "0f000000 0a03'a.S' 1201'M' 1802 2007 30ac02 'hi'",
        [request(7, timeout_ms=300)],
        b"",
        {"in_flight": 1},
    ),
    (
        "the longest timeout there is",
        "12000000 0a03'a.S' 1201'M' 1802 2007 30ffffffff0f 'hi'",
        [request(7, timeout_ms=2**32 - 1)],
        b"",
        {"in_flight": 1},
    ),
    (
        "a retried request",
        "0f000000 0a03'a.S' 1201'M' 1802 2007 a00101 'hi'",
        [request(7, attempt=1)],
        b"",
        {"in_flight": 1},
    ),
    (
        "call_ids ascend, with gaps",
        REQUEST_7 + "14000000 0a03'a.T' 1201'M' 1802 20ffffffffffffffff7f 'hi'",
        [request(7), request(2**63 - 1, 2)],
        b"",
        {"in_flight": 2},
    ),
    ("a call_id used twice", REQUEST_7 + REQUEST_7, [request(7)], b"", {"in_flight": 1, "why": "not above the last"}),
    ("a call_id below", REQUEST_8 + REQUEST_7, [request(8)], b"", {"in_flight": 1, "why": "not above the last"}),
    (
        "an unknown service",
        "0a000000 0a03'a.X' 1201'M' 2007",
        [],
        refusal(7, 12, "no such service here"),
        {},
    ),
    (
        "an unknown method",
        "0a000000 0a03'a.S' 1201'X' 2007" + REQUEST_8,
        [request(8)],
        refusal(7, 12, "the service has no such method"),
        {"in_flight": 1},
    ),
    ("no method", "07000000 0a03'a.S' 2007", [], refusal(7, 12, "the service has no such method"), {}),
    ("no service", "02000000 2007", [], refusal(7, 12, "no such service here"), {}),
    (
        "a short name is not for the framed dialect only",
        "08000000 0a01'S' 1201'M' 2007",
        [request(7, 3, b"")],
        b"",
        {"in_flight": 1},
    ),
    (
        "a payload over the limit fails its call alone",
        "0c000000 0a03'a.S' 1201'M' 1865 2007" + "00" * 101 + REQUEST_8,
        [request(8)],
        refusal(7, 8, "the request is larger than the provider's max_payload"),
        {"in_flight": 1},
    ),
    (
        "a payload at the limit",
        "0c000000 0a03'a.S' 1201'M' 1864 2007" + "00" * 100,
        [request(7, payload=bytes(100))],
        b"",
        {"in_flight": 1},
    ),
    (
        "a payload far over the limit",
        "10000000 0a03'a.S' 1201'M' 188180808001 2007",
        [],
        b"",
        {"why": "a payload far over the limit", "dialect": UNKNOWN},
    ),
    (
        "a compressed payload",
        "0e000000 0a03'a.S' 1201'M' 1802 2007 4801 'hi'" + REQUEST_8,
        [request(8)],
        refusal(7, 12, "this provider takes no compressed payload"),
        {"in_flight": 1},
    ),
    ("PING", "06000000 1804 2009 2803 'ping'", [], raw("06000000 1804 2009 2804 'ping'"), {}),
    ("PING without payload", "04000000 2009 2803", [], raw("04000000 2009 2804"), {}),
    (
        "PING with 64 bytes",
        "06000000 1840 2009 2803" + "5a" * 64,
        [],
        raw("06000000 1840 2009 2804" + "5a" * 64),
        {},
    ),
    (
        "PING with 65 bytes",
        "06000000 1841 2009 2803" + "5a" * 65,
        [],
        b"",
        {"why": "a PING with more than 64 bytes"},
    ),
    ("PING over the payload limit", "06000000 1865 2009 2803", [], b"", {"why": "a PING with more than 64 bytes"}),
    (
        "PING over the limit behind a request",
        REQUEST_7 + "06000000 1865 2009 2803" + "5a" * 101,
        [request(7)],
        b"",
        {"in_flight": 1, "why": "a PING with more than 64 bytes"},
    ),
    ("PING for a service", "09000000 0a03'a.T' 2009 2803", [], raw("04000000 2009 2804"), {}),
    ("PING for one that is not served", "09000000 0a03'a.X' 2009 2803", [], raw("06000000 2009 2804 380c"), {}),
    (
        "PING between requests, its call_id of no order",
        REQUEST_7 + "04000000 2003 2803" + REQUEST_8,
        [request(7), request(8)],
        raw("04000000 2003 2804"),
        {"in_flight": 2},
    ),
    ("PING without call_id", "02000000 2803", [], b"", {"why": "without the call_id", "dialect": UNKNOWN}),
    (
        "CANCEL, for any call: whether it is in flight is the driver's to know",
        REQUEST_7 + "04000000 2007 2802" + "04000000 2009 2802" + REQUEST_8,
        [request(7), Event(Frame(call_id=7, kind=2)), Event(Frame(call_id=9, kind=2)), request(8)],
        b"",
        {"in_flight": 2},
    ),
    ("CANCEL without call_id", "02000000 2802", [], b"", {"why": "without the call_id", "dialect": UNKNOWN}),
    (
        "a response is never answered",
        "04000000 2009 2801" + REQUEST_7,
        [request(7)],
        b"",
        {"in_flight": 1, "strays": 1},
    ),
    ("a response without call_id", "02000000 2801", [], b"", {"why": "without the call_id", "dialect": UNKNOWN}),
    ("PONG that nobody asked for", "04000000 2009 2804", [], b"", {"strays": 1}),
    ("GOAWAY", "04000000 2009 2805" + REQUEST_7, [request(7)], b"", {"in_flight": 1}),
    ("GOAWAY of one who accepted nothing", "02000000 2805", [], b"", {}),
    (
        "the first unknown kind",
        "06000000 1802 2007 2806 'hi'" + REQUEST_7,
        [request(7)],
        refusal(7, 12, "this provider does not know that kind of frame"),
        {"in_flight": 1},
    ),
    (
        "the last unknown kind that is answered",
        "04000000 2007 281f",
        [],
        refusal(7, 12, "this provider does not know that kind of frame"),
        {},
    ),
    (
        "an unknown kind whose payload is over the limit",
        "06000000 1865 2007 2806" + "00" * 101 + REQUEST_7,
        [request(7)],
        refusal(7, 12, "this provider does not know that kind of frame"),
        {"in_flight": 1},
    ),
    ("an unknown kind without call_id", "02000000 2806", [], b"", {"why": "without the call_id", "dialect": UNKNOWN}),
    (
        "kinds above 31 are ignored with their payload",
        "06000000 1802 2007 2820 'hi'" + "06000000 1865 28ffff01" + "00" * 101 + REQUEST_7,
        [request(7)],
        b"",
        {"in_flight": 1, "strays": 2},
    ),
    (
        "a classic request, and bytes after it",
        CLASSIC_HI + REQUEST_7 + "ffffffffffffffff",
        [request(0, 3)],
        b"",
        {"in_flight": 1, "dialect": CLASSIC},
    ),
    (
        "a classic request by the full name",
        "0a000000 0a03'a.S' 1201'M' 1802 'hi'",
        [request(0)],
        b"",
        {"in_flight": 1, "dialect": CLASSIC},
    ),
    (
        "classic has no form for an error",
        "06000000 0a01'S' 1201'X'",
        [],
        b"",
        {"why": "no form for an error", "dialect": CLASSIC},
    ),
    (
        "a classic payload over the limit",
        "08000000 0a01'S' 1201'M' 1865",
        [],
        b"",
        {"why": "no form for an error", "dialect": CLASSIC},
    ),
    (
        "classic behind framed",
        REQUEST_7 + CLASSIC_HI,
        [request(7)],
        b"",
        {"in_flight": 1, "why": "classic and framed"},
    ),
    (
        "classic behind framed, its payload over the limit",
        REQUEST_7 + "08000000 0a01'S' 1201'M' 1865" + "00" * 101,
        [request(7)],
        b"",
        {"in_flight": 1, "why": "classic and framed"},
    ),
    ("classic behind PING", "04000000 2009 2803" + CLASSIC_HI, [], raw("04000000 2009 2804"), {"why": "classic and"}),
    ("HTTP", "'GET / HTTP/1.1'", [], b"", {"why": "it speaks HTTP", "dialect": UNKNOWN}),
    ("TLS", "1603010200 010001fc", [], b"", {"why": "it speaks TLS", "dialect": UNKNOWN}),
    (
        "HTTP behind a request",
        REQUEST_7 + "'GET / HTTP/1.1'",
        [request(7)],
        b"",
        {"in_flight": 1, "why": "it speaks HTTP"},
    ),
    (
        "a malformed header behind a request",
        REQUEST_7 + "03000000 0a0341",
        [request(7)],
        b"",
        {"in_flight": 1, "why": "length past its end"},
    ),
    (
        "a call_id not above the last, its payload over the limit",
        REQUEST_7 + "0c000000 0a03'a.S' 1201'M' 1865 2007" + "00" * 101,
        [request(7)],
        b"",
        {"in_flight": 1, "why": "not above the last"},
    ),
]


def check(outcome: Outcome, events: Iterable[Event], out: bytes, rest: dict[str, Any]) -> None:
    assert outcome.events == tuple(events)
    assert outcome.out == out
    expected = Outcome(tuple(events), out, **{**rest, "why": outcome.why})
    assert outcome == expected
    assert bool(outcome.why) == bool(rest.get("why"))
    assert rest.get("why", "") in outcome.why


@pytest.mark.parametrize(("stream", "events", "out", "rest"), [row[1:] for row in SERVED], ids=[r[0] for r in SERVED])
def test_the_servers_side(stream: str, events: list[Event], out: bytes, rest: dict[str, Any]) -> None:
    check(everywhere(server, raw(stream)), events, out, rest)


def test_metadata_at_the_limit_and_past_it() -> None:
    def with_metadata(call_id: int, entries: int) -> bytes:
        return frames.framed(raw(f"0a03'a.S' 1201'M' 1802 20{call_id:02x}") + b"\x52\x00" * entries) + b"hi"

    outcome = server().feed(with_metadata(7, 128) + with_metadata(8, 129) + with_metadata(9, 0))
    assert [event.frame.call_id for event in outcome.events] == [7, 9]
    assert outcome.out == refusal(8, 3, "more than 128 metadata entries")


def test_a_limit_smaller_than_a_ping_does_not_keep_a_ping_from_its_answer() -> None:
    """max_payload may be as small as one byte; PINGs have a limit of their own."""
    ping = raw("06000000 1814 2009 2803" + "5a" * 20)
    request_over = raw("0c000000 0a03'a.S' 1201'M' 1802 2007 'hi'")

    def narrow(**options: Any) -> Session:
        return server(limit=1, **options)

    outcome = everywhere(narrow, ping + request_over + ping)
    pong = raw("06000000 1814 2009 2804" + "5a" * 20)
    refused = refusal(7, 8, "the request is larger than the provider's max_payload")
    check(outcome, [], pong + refused + pong, {})
    check(everywhere(lambda **options: client(limit=1, **options), ping), [], pong, {})
    called = everywhere(lambda **options: client(3, limit=1, **options), raw(RESPONSE_2))
    assert [(event.frame.status, event.tag) for event in called.events] == [(8, 102)]


def test_classic_can_be_refused() -> None:
    def without(**options: Any) -> Session:
        return server(classic=False, **options)

    check(everywhere(without, raw(CLASSIC_HI)), [], b"", {"why": "no form for an error", "dialect": CLASSIC})
    check(everywhere(without, raw(REQUEST_7)), [request(7)], b"", {"in_flight": 1})


def test_goaway_says_the_highest_accepted_and_what_comes_later_did_not_run() -> None:
    session = server()
    session.feed(raw(REQUEST_7))
    assert session.drain() == raw("04000000 2007 2805")
    assert session.drain() == b""
    late = session.feed(raw(REQUEST_8))
    assert late.events == (request(7),)
    assert late.out == refusal(8, 14, "the provider is shutting down")
    ping = session.feed(raw("06000000 1804 2009 2803 'ping'"))
    assert ping.out[len(late.out) :] == raw("08000000 1804 2009 2804 380e 'ping'")
    assert session.reply(7, payload_size=2) == raw("06000000 1802 2007 2801")
    assert session.outcome().in_flight == 0


def test_goaway_when_nothing_was_accepted_has_no_call_id() -> None:
    session = server()
    assert session.drain() == raw("02000000 2805")
    assert session.feed(raw(REQUEST_7)).out == refusal(7, 14, "the provider is shutting down")


def test_drain_in_the_classic_dialect() -> None:
    session = server()
    session.feed(raw(CLASSIC_HI))
    assert session.drain() == b""  # it has no form for it, and the call in flight is answered
    assert session.reply(0, payload_size=2) == b""
    draining = server()
    draining.drain()
    assert "no form for an error" in draining.feed(raw(CLASSIC_HI)).why


def test_what_an_answer_looks_like() -> None:
    session = server()
    session.feed(raw(REQUEST_7 + REQUEST_8))
    assert session.reply(8, payload_size=3) == raw("06000000 1803 2008 2801")
    assert session.outcome().in_flight == 1
    assert session.reply(7, b"no", b"\x08\x05", status=5, not_run=1) == raw(
        "10000000 2007 2801 3805 4202 'no' 5a02 0805 6001"
    )
    assert session.outcome().in_flight == 0


def test_a_classic_answer_is_bare_and_an_error_has_no_form() -> None:
    session = server()
    session.feed(raw(CLASSIC_HI))
    assert session.reply(0, payload_size=2) == b""
    session = server()
    session.feed(raw(CLASSIC_HI))
    assert "no form for an error" in str(session.reply(0, b"no", status=5))


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("size", [4095, 4096, 4097, 4098, 4099, 4100, 9000])
def test_a_text_is_cut_to_its_limit_between_characters(character: str, before: int, size: int) -> None:
    """A C++ peer refuses a string that is not UTF-8."""
    text = ("x" * before + character * 9000).encode()[:size].decode(errors="ignore")
    session = server()
    session.feed(raw(REQUEST_7))
    answer = session.reply(7, text.encode(), status=13)
    assert isinstance(answer, bytes)
    (frame,) = frames.whole(answer)
    kept = frame.error_text.decode()
    assert text.startswith(kept)
    assert len(frame.error_text) <= 4096
    assert kept == text or len(frame.error_text) + len(character.encode()) > 4096


def test_details_over_their_limit_are_left_out_whole() -> None:
    session = server()
    session.feed(raw(REQUEST_7 + REQUEST_8))
    for call_id, details, kept in ((7, bytes(32768), bytes(32768)), (8, bytes(32769), b"")):
        answer = session.reply(call_id, b"x" * 4096, details, status=13)
        assert isinstance(answer, bytes)
        (frame,) = frames.whole(answer)
        assert (frame.error_details, frame.error_text) == (kept, b"x" * 4096)


def test_services_are_told_apart_by_both_names() -> None:
    table = ffi.gc(lib.mprpc_services_new(), lib.mprpc_services_free)

    def add(service: bytes, method: bytes, index: int) -> int:
        return int(lib.mprpc_services_add(table, service, len(service), method, len(method), index))

    assert add(b"ab", b"c", 0) == 0
    assert add(b"a", b"bc", 1) == 0
    assert add(b"ab", b"c", 2) == 1
    pairs = [(b"s%d" % (i % 20), b"m%d" % i) for i in range(500)]
    for index, pair in enumerate(pairs):
        assert add(*pair, 3 + index) == 0
    session = Session(services=table)
    stream = b"".join(
        Frame(*pair, call_id=1 + i).encode() for i, pair in enumerate([(b"ab", b"c"), (b"a", b"bc"), *pairs])
    )
    outcome = session.feed(stream)
    methods = [event.method for event in outcome.events]
    assert methods == [0, 1, *range(3, 503)]
    assert outcome.out == b""


# ---- the client's side; calls 1, 2 and 3 are in flight ----


def response(call_id: int, payload: bytes | None = b"ok", tag: int = 0, **fields: Any) -> Event:
    size = fields.pop("args_size", len(payload or b""))
    frame = Frame(args_size=size, call_id=call_id, kind=frames.RESPONSE, payload=payload, **fields)
    return Event(frame, tag=tag or 100 + call_id)


RESPONSE_2 = "06000000 1802 2002 2801 'ok'"
TOO_LARGE = b"the response is larger than the channel's max_payload"
PACKED = b"the response is compressed, which was not asked for"

CALLED: list[tuple[str, str, list[Event], bytes, dict[str, Any]]] = [
    ("a response", RESPONSE_2, [response(2)], b"", {"in_flight": 2}),
    (
        "responses in any order",
        "04000000 2003 2801" + RESPONSE_2 + "04000000 2001 2801",
        [response(3, b""), response(2), response(1, b"")],
        b"",
        {"in_flight": 0},
    ),
    (
        "a response that says why",
        "10000000 2002 2801 3805 4202 'no' 5a02 0805 6001",
        [response(2, b"", status=5, error_text=b"no", error_details=b"\x08\x05", not_run=1)],
        b"",
        {"in_flight": 2},
    ),
    (
        "a response nobody waits for",
        "04000000 2009 2801" + "04000000 2004 2801" + RESPONSE_2,
        [response(2)],
        b"",
        {"in_flight": 2, "strays": 2},
    ),
    (
        "a call_id that only shares its slot",
        "04000000 2012 2801" + "0d000000 2082808080808080808001 2801" + RESPONSE_2,
        [response(2)],
        b"",
        {"in_flight": 2, "strays": 2},
    ),
    ("a second response", RESPONSE_2 + RESPONSE_2, [response(2)], b"", {"in_flight": 2, "strays": 1}),
    ("a response without call_id", "04000000 1802 2801 'ok'", [], b"", {"in_flight": 3, "why": "without the call_id"}),
    (
        "a response over the limit fails its call alone",
        "06000000 1865 2001 2801" + "00" * 101 + RESPONSE_2,
        [response(1, None, args_size=101, status=8, error_text=TOO_LARGE), response(2)],
        b"",
        {"in_flight": 1},
    ),
    (
        "one that also says it did not run",
        "0a000000 1865 2001 2801 3801 6001" + "00" * 101,
        [response(1, None, args_size=101, status=8, error_text=TOO_LARGE)],
        b"",
        {"in_flight": 2},
    ),
    (
        "a response far over the limit",
        "0a000000 188180808001 2001 2801",
        [],
        b"",
        {"in_flight": 3, "why": "a payload far over the limit"},
    ),
    (
        "a late response over the limit",
        "06000000 1865 2009 2801" + "00" * 101 + RESPONSE_2,
        [response(2)],
        b"",
        {"in_flight": 2, "strays": 1},
    ),
    (
        "a compressed response",
        "08000000 1802 2001 2801 4801 'ok'" + RESPONSE_2,
        [response(1, status=12, error_text=PACKED, compression=1), response(2)],
        b"",
        {"in_flight": 1},
    ),
    ("PING", "06000000 1804 2009 2803 'ping'", [], raw("06000000 1804 2009 2804 'ping'"), {"in_flight": 3}),
    ("PING with 65 bytes", "06000000 1841 2009 2803" + "00" * 65, [], b"", {"in_flight": 3, "why": "more than 64"}),
    (
        "PING over the payload limit behind a response",
        RESPONSE_2 + "06000000 1865 2009 2803" + "00" * 101,
        [response(2)],
        b"",
        {"in_flight": 2, "why": "more than 64"},
    ),
    (
        "PONG",
        "08000000 1804 2009 2804 380c 'ping'",
        [Event(Frame(args_size=4, call_id=9, kind=4, status=12, payload=b"ping"))],
        b"",
        {"in_flight": 3},
    ),
    ("GOAWAY", "04000000 2002 2805", [Event(Frame(call_id=2, kind=5))], b"", {"in_flight": 3}),
    ("GOAWAY, nothing was accepted", "02000000 2805", [Event(Frame(kind=5))], b"", {"in_flight": 3}),
    (
        "a request is not for a client",
        REQUEST_7 + CLASSIC_HI + "04000000 2007 2802" + RESPONSE_2,
        [response(2)],
        b"",
        {"in_flight": 2, "strays": 3},
    ),
    (
        "unknown kinds are dropped and counted",
        "06000000 1802 2001 2806 'hi'" + "04000000 2001 281f" + "06000000 1865 2001 2820" + "00" * 101 + RESPONSE_2,
        [response(2)],
        b"",
        {"in_flight": 2, "strays": 3},
    ),
    (
        "a malformed header behind a response",
        RESPONSE_2 + "02000000 0001",
        [response(2)],
        b"",
        {"in_flight": 2, "why": "out of its field's range"},
    ),
]


@pytest.mark.parametrize(("stream", "events", "out", "rest"), [row[1:] for row in CALLED], ids=[r[0] for r in CALLED])
def test_the_clients_side(stream: str, events: list[Event], out: bytes, rest: dict[str, Any]) -> None:
    check(everywhere(lambda **options: client(3, **options), raw(stream)), events, out, rest)


def test_goaway_is_remembered() -> None:
    session = client(3)
    assert not session.handle.gone
    session.feed(raw("04000000 2002 2805"))
    assert (session.handle.gone, session.handle.goaway_id) == (1, 2)


def test_a_late_response_reaches_nobody() -> None:
    session = client(3)
    assert session.forget(2) == 1
    assert session.forget(2) == 0
    assert session.forget(9) == 0
    assert session.forget(0) == 0
    assert session.feed(raw(RESPONSE_2)) == Outcome(in_flight=2, strays=1)
    assert client().forget(1) == 0  # before the first call


def test_a_long_call_outlives_a_hundred_thousand_others() -> None:
    session = client(1)
    seen = {1}
    for i in range(100_000):
        call_id = session.call(7)
        assert call_id not in seen
        assert call_id > i
        seen.add(call_id)
        assert session.forget(call_id) == 1
    assert session.feed(raw("04000000 2001 2801")).events == (response(1, b""),)
    assert session.outcome().in_flight == 0


def test_calls_in_flight_have_a_bound_and_room_comes_back() -> None:
    session = client()
    ids = [session.call(5000 + i) for i in range(lib.MPRPC_CALLS_MAX)]
    assert ids == sorted(set(ids))
    assert ids[0] == 1
    assert session.call(1) == 0
    assert session.outcome().in_flight == lib.MPRPC_CALLS_MAX
    outcome = session.feed(b"".join(Frame(call_id=each, kind=frames.RESPONSE).encode() for each in reversed(ids[:5])))
    assert [event.tag for event in outcome.events] == [5004, 5003, 5002, 5001, 5000]
    assert session.call(1) > ids[-1]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 60), max_size=300))
def test_each_response_goes_to_its_own_call(steps: list[int]) -> None:
    """0 to 19: a response for the n-th oldest call; 20 to 29: that one is forgotten; above: a new call."""
    session, tag = client(), 1
    open_calls: dict[int, int] = {}
    for step in steps:
        if step >= 30 or not open_calls:
            open_calls[session.call(tag)] = tag
            tag += 1
            continue
        call_id = list(open_calls)[step % 10 % len(open_calls)]
        expected = open_calls.pop(call_id)
        if step >= 20:
            assert session.forget(call_id) == 1
        seen = len(session.events)
        session.feed(Frame(call_id=call_id, kind=frames.RESPONSE).encode())
        assert [event.tag for event in session.events[seen:]] == ([expected] if step < 20 else [])
    assert session.outcome().in_flight == len(open_calls)


# ---- cut anywhere ----

PIECES = st.one_of(
    st.sampled_from([raw(row[1]) for row in SERVED + CALLED]),
    st.builds(
        lambda kind, call_id, payload, over: Frame(
            b"a.S", b"M", kind=kind, call_id=call_id, payload=payload + bytes(over), compression=over == 1
        ).encode(),
        st.integers(0, 33),
        st.integers(0, 40),
        st.binary(max_size=70),
        st.sampled_from([0, 0, 0, 1, 40, 101]),
    ),
    st.binary(max_size=6),
)


@settings(max_examples=400)
@given(st.lists(PIECES, max_size=8).map(b"".join), st.lists(st.integers(1, 60), max_size=30), st.integers(1, 4))
def test_the_outcome_does_not_depend_on_the_cuts(stream: bytes, sizes: list[int], room: int) -> None:
    for make in (server, lambda **options: client(30, **options)):
        whole, parts, rest = make().feed(stream), make(room=room), stream
        for size in sizes:
            parts.feed(rest[:size])
            rest = rest[size:]
        assert parts.feed(rest) == whole
