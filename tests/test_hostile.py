"""Peers that mean harm, or have lost their mind, on both sides: memory bounded, others undisturbed, counted by kind."""

from __future__ import annotations

import contextlib
import gc
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import held
import mprpc
import services
import wire
from mprpc import RpcProvider, Status
from mprpc.incidents import of_connections
from reliability import hostile
from reliability.report import Report
from services import REQUEST, LoginResponse
from test_provider import ANSWER, memory, wait_until

header_of = wire.rpcheader_pb2
OK = LoginResponse(success=True).SerializeToString()
ROOM = 48 << 20  # bytes that the process may grow by, whatever is sent


@pytest.fixture(autouse=True)
def _both_pollers(poller: str) -> None:
    """All of this file runs with epoll and with poll(2)."""


def count(provider: RpcProvider, *names: str) -> int:
    found = provider.incidents()
    return sum(found[name] for name in names)


def pour(peer: wire.Peer, data: bytes) -> threading.Thread:
    """Sends on a thread of its own, as far as the other side lets it."""

    def send() -> None:
        with contextlib.suppress(OSError):
            peer.send(data)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def drink(peer: wire.Peer) -> threading.Thread:
    """Reads and throws away, to the end."""

    def read() -> None:
        with contextlib.suppress(OSError, ValueError):
            while peer.socket.recv(1 << 20):
                pass

    thread = threading.Thread(target=read)
    thread.start()
    return thread


@contextlib.contextmanager
def watched(provider: RpcProvider, rounds: int = 100) -> Iterator[None]:
    """Another's calls come through all the while, and memory stays bounded."""
    before = memory()
    with wire.connect(provider.address) as bystander:
        yield
        for number in range(1, rounds + 1):
            bystander.send(wire.login(number))
            assert bystander.frame()[1] == ANSWER
    gc.collect()
    assert memory() - before < ROOM


# ---- towards a provider ----


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\xff\xff\xff" + bytes(20), "bad_size"),
        (struct.pack("<I", 65_536) + bytes(20), "bad_size"),
        (b"GET / HTTP/1.1\r\n\r\n", "http"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), "tls"),
        (wire.request(1, *wire.LOGIN, args_size=2**32 - 1), "bad_discard"),
        (b"\x0b\x00\x00\x00\x20" + b"\xff" * 10, "bad_varint"),
        (b"\x02\x00\x00\x00\x1b\x00", "bad_wire_type"),
        (wire.frame(kind=3, call_id=0), "bad_call_id"),
        (b"\x09\x00\x00\x00\x20\x01\x18\xff\xff\xff\xff\x7f\x00", "bad_value"),
        (b"\x03\x00\x00\x00\x0a\x05x", "bad_length"),
        (wire.login(5) + wire.login(5), "bad_order"),
        (wire.login(5) + wire.classic_login(), "bad_dialect"),
        (wire.frame(b"x" * 65, kind=3, call_id=1), "bad_ping"),
        (wire.request(0, "UserServiceRpc", "NoSuch"), "no_classic"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_protocol_is_counted_and_logged_once(
    data: bytes, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with services.serving() as provider, watched(provider):
        with wire.connect(provider.address) as peer:
            peer.send(data)
            with contextlib.suppress(ConnectionError):
                peer.rest()
        assert count(provider, kind) == 1
        assert sum(provider.incidents().values()) == 1
    assert len([each for each in caplog.records if each.levelno >= logging.WARNING]) == 1


def test_what_is_refused_is_counted_by_kind(caplog: pytest.LogCaptureFixture) -> None:
    entries = [header_of.Metadatum(key=b"k", value=b"v")]
    refused = [
        ("oversized", wire.login(1, b"x" * 100_000), Status.RESOURCE_EXHAUSTED),
        ("metadata", wire.login(2, metadata=entries * 129), Status.INVALID_ARGUMENT),
        ("unknown_method", wire.request(3, "No.Such", "Method"), Status.UNIMPLEMENTED),
        ("unknown_kind", wire.frame(kind=9, call_id=4), Status.UNIMPLEMENTED),
        ("compressed", wire.login(5, compression=2), Status.UNIMPLEMENTED),
    ]
    with services.serving(max_payload=50_000) as provider, wire.connect(provider.address) as peer:
        for name, data, status in refused:
            peer.send(data)
            header, _ = peer.frame()
            assert (header.status, header.not_run) == (status, True), name
            assert count(provider, name) == 1
        peer.send(wire.response(77, b"nobody asked") + wire.frame(kind=40, call_id=78) + wire.login(79))
        assert peer.frame()[1] == ANSWER
        assert count(provider, "stray") == 2
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


def test_as_many_metadata_entries_as_fit() -> None:
    with services.serving() as provider, watched(provider), wire.connect(provider.address) as peer:
        for number in range(1, 21):
            header = wire.request(number, *wire.LOGIN)[4:]
            header += b"\x52\x00" * ((65_535 - len(header)) // 2)  # 32,000 entries without key and value
            peer.send(struct.pack("<I", len(header)) + header)
            answer, _ = peer.frame()
            assert (answer.call_id, answer.status, answer.not_run) == (number, Status.INVALID_ARGUMENT, True)
        assert count(provider, "metadata") == 20


@pytest.mark.parametrize(
    ("frame", "answered"),
    [
        (wire.frame(kind=header_of.CANCEL, call_id=1), False),
        (wire.response(1), False),
        (wire.frame(kind=200, call_id=1), False),
        (wire.frame(kind=header_of.PING, call_id=1), True),
        (wire.frame(kind=20, call_id=1), True),
    ],
    ids=["cancel", "response", "unknown", "ping", "refused"],
)
def test_a_flood_of_tiny_frames(frame: bytes, answered: bool) -> None:
    """A hundred thousand here, a million in the long run."""
    with services.serving() as provider:
        with wire.connect(provider.address) as peer:
            threads = [drink(peer)] if answered else []
            with watched(provider):
                threads.append(pour(peer, frame * 100_000))
            threads[-1].join(wire.PATIENCE)
            peer.finish()
            if not answered:
                assert peer.rest() == b""
            for thread in threads:
                thread.join(wire.PATIENCE)
                assert not thread.is_alive()


def test_a_flood_of_pings_whose_answers_nobody_reads() -> None:
    ping = wire.frame(b"x" * 64, kind=header_of.PING, call_id=1)
    with services.serving(max_output=100_000) as provider:
        with wire.connect(provider.address, SO_RCVBUF=4096) as peer, watched(provider):
            sending = pour(peer, ping * 200_000)
            wait_until(lambda: count(provider, "slow_reader") == 1, "it is no longer read from")
            peer.socket.shutdown(socket.SHUT_RDWR)
            sending.join(wire.PATIENCE)


def test_unfinished_requests_are_bounded_together(caplog: pytest.LogCaptureFixture) -> None:
    """Each promises 60 MB, and sends what it has promised but the end."""
    size = 10 << 20
    data = wire.login(1, b"x" * (60 << 20))[:size]
    with services.serving(max_input=32 << 20) as provider, contextlib.ExitStack() as stack:
        stack.enter_context(watched(provider, 10))
        threads = []
        for _ in range(6):
            peer = stack.enter_context(wire.connect(provider.address))
            threads.append(pour(peer, data))
        for thread in threads:
            thread.join(wire.PATIENCE)
        wait_until(lambda: count(provider, "no_room") >= 2, "some are closed")
        assert count(provider, "no_room") < 6
    assert "max_input" in caplog.text


def test_discarding_needs_progress_too(caplog: pytest.LogCaptureFixture) -> None:
    """A byte now and then of a payload that is only thrown away kept a connection, and its thread, for months."""
    with services.serving(max_payload=1000, frame_timeout=0.15) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"x" * 1_000_000)[:5000])
        assert peer.frame()[0].status == Status.RESOURCE_EXHAUSTED
        ended = threading.Event()
        watching = threading.Thread(target=lambda: (_end_of(peer), ended.set()))
        watching.start()
        before = time.monotonic()
        while not ended.wait(0.01) and time.monotonic() - before < wire.PATIENCE:
            with contextlib.suppress(ConnectionError):
                peer.send(b"x")
        watching.join(wire.PATIENCE)
        assert 0.14 < time.monotonic() - before < 5.0
        assert count(provider, "stalled") == 1
    assert "frame_timeout" in caplog.text


def test_discarding_that_makes_progress_goes_on() -> None:
    data = wire.login(1, b"x" * 400_000)
    with services.serving(max_payload=1000, frame_timeout=0.3) as provider, wire.connect(provider.address) as peer:
        before = time.monotonic()
        for at in range(0, len(data), 20_000):
            peer.send(data[at : at + 20_000])
            threading.Event().wait(0.03)  # a slow line, not synchronisation
        assert time.monotonic() - before > 0.3
        peer.send(wire.login(2))
        assert [peer.frame()[0].status for _ in range(2)] == [Status.RESOURCE_EXHAUSTED, Status.OK]


def test_calls_in_flight_of_a_connection_are_bounded() -> None:
    with held.holding(max_in_flight=3) as (handler, provider), wire.connect(provider.address) as peer:
        peer.send(b"".join(wire.login(number, b"hold") for number in range(1, 6)))
        handler.taken(3)
        for number in (4, 5):
            header, _ = peer.frame()
            assert (header.call_id, header.status, header.not_run) == (number, Status.RESOURCE_EXHAUSTED, True)
        with wire.connect(provider.address) as other:
            other.send(wire.login(1))
            assert other.frame()[1] == ANSWER
        assert count(provider, "busy") == 2
        handler.release()
        assert sorted(peer.frame()[0].call_id for _ in range(3)) == [1, 2, 3]
        peer.send(wire.login(6))
        assert peer.frame()[1] == ANSWER


def test_a_call_too_many_goes_elsewhere_or_fails_as_not_run() -> None:
    with held.holding(max_in_flight=1) as (handler, provider), services.calling(provider) as users:
        first = users.Login.future(held.named("hold"))
        handler.taken()
        with pytest.raises(mprpc.ResourceExhausted) as raised:
            users.Login(REQUEST, timeout=0.5)
        assert raised.value.not_run
        handler.release()
        assert first.result(wire.PATIENCE).success
        assert users.Login(REQUEST).success


def test_half_frames_of_many_end_in_time() -> None:
    data = wire.login(1, b"x" * 1000)
    with services.serving(frame_timeout=0.3) as provider, contextlib.ExitStack() as stack:
        with watched(provider):
            for number in range(200):
                peer = stack.enter_context(wire.connect(provider.address))
                peer.send(data[: 1 + number % (len(data) - 1)])
            wait_until(lambda: count(provider, "stalled") == 200, "all are closed")


def test_a_crowd_of_connects_at_once() -> None:
    """A thousand here, three thousand in the long run."""
    with services.serving(max_connections=300) as provider, contextlib.ExitStack() as stack:
        with watched(provider):
            crowd = []
            for _ in range(1000):
                made = stack.enter_context(contextlib.closing(socket.socket()))
                made.setblocking(False)
                host, _, port = provider.address.partition(":")
                made.connect_ex((host, int(port)))
                crowd.append(made)
            wait_until(lambda: count(provider, "crowded") >= 600, "most are refused")
        for made in crowd:
            made.close()
        wait_until(lambda: _is_served(provider.address), "it takes connections again")


def _is_served(address: str) -> bool:
    with contextlib.suppress(OSError, EOFError), wire.connect(address) as peer:
        peer.send(wire.login(1))
        return bool(peer.frame()[1] == ANSWER)
    return False


def _end_of(peer: wire.Peer) -> None:
    with contextlib.suppress(ConnectionError):
        peer.rest()


@pytest.mark.parametrize("name", [name for name in hostile.ATTACKS if name != "never reads"])
def test_the_attacks_of_the_long_run(name: str) -> None:
    """`make hostile` measures what others notice; here they must be served, and memory stay where it is."""
    with services.serving(frame_timeout=0.2) as provider:
        attack = hostile.ATTACKS[name], provider.address, time.monotonic() + 0.3
        attacking = threading.Thread(target=_attack, args=attack)
        with watched(provider):
            attacking.start()
        attacking.join(wire.PATIENCE)
        assert not attacking.is_alive()
        wait_until(lambda: _is_served(provider.address), "it takes connections again")


def _attack(attack: Callable[[str, float], None], address: str, until: float) -> None:
    with contextlib.suppress(OSError):
        attack(address, until)


def test_no_descriptors_are_left_and_then_there_are() -> None:
    """The counters are readable just then: a module that was imported only when asked for them was not to be had."""
    report = Report("", 0)
    hostile._descriptors(report, limit=100, clients=400)
    assert not report.broken


# ---- towards a channel ----


def bad(data: bytes) -> Callable[[wire.Peer], None]:
    def script(peer: wire.Peer) -> None:
        peer.frame()
        peer.send(data)
        _end_of(peer)

    return script


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\xff\xff\xff" + bytes(20), "bad_size"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "bad_size"),
        (b"\x02\x00\x00\x00\x1b\x00", "bad_wire_type"),
        (wire.response(1, args_size=2**32 - 1), "bad_discard"),
        (wire.frame(kind=header_of.RESPONSE), "bad_call_id"),
        (wire.frame(b"x" * 65, kind=header_of.PING, call_id=1), "bad_ping"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_provider_that_is_none_fails_its_calls_and_is_counted(data: bytes, kind: str) -> None:
    before = of_connections()
    with wire.FakeProvider(bad(data)) as provider, services.calling(provider.address) as users:
        with pytest.raises(mprpc.Unavailable) as raised:
            users.Login(REQUEST)
        assert not raised.value.not_run
        assert "\n" not in raised.value.text
    after = of_connections()
    assert {name for name in after if after[name] != before[name]} == {kind}
    assert after[kind] == before[kind] + 1


def test_responses_nobody_asked_for_reach_nobody() -> None:
    """A hundred thousand of them, to a connection that waits and to one that is idle."""
    flood = b"".join(wire.response(number, OK) for number in range(1_000_000, 1_001_000)) * 100
    idle = threading.Event()

    def script(peer: wire.Peer) -> None:
        peer.frame()
        peer.send(flood)
        peer.send(wire.response(1, OK))
        assert idle.wait(wire.PATIENCE)
        peer.send(flood)
        peer.frame()
        peer.send(wire.response(2, OK))
        assert peer.rest() == b""

    before, strays = memory(), of_connections()["stray"]
    with wire.FakeProvider(script) as provider, services.calling(provider.address) as users:
        assert users.Login(REQUEST, timeout=wire.PATIENCE).success
        idle.set()
        assert users.Login(REQUEST, timeout=wire.PATIENCE).success
    assert of_connections()["stray"] - strays >= 200_000 - 1000
    assert memory() - before < ROOM


def test_a_response_that_never_ends_stays_within_the_limit() -> None:
    def script(peer: wire.Peer) -> None:
        peer.frame()
        with contextlib.suppress(OSError):
            peer.send(wire.response(1, args_size=200 << 20))
            for _ in range(100):
                peer.send(bytes(1 << 20))
            peer.rest()

    before = memory()

    def call(address: str) -> Status:
        with services.calling(address) as users:
            try:
                users.Login(REQUEST, timeout=wire.PATIENCE)
            except mprpc.RpcError as error:
                return error.status
        return Status.OK

    with wire.FakeProvider(script) as provider:
        assert call(provider.address) == Status.RESOURCE_EXHAUSTED
        gc.collect()  # the descriptor goes with the channel's last reference, and only then the sender's wait
    assert memory() - before < ROOM


def test_every_counter_is_explained() -> None:
    """The guide names them all."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "guide.md").read_text()
    with services.serving() as provider:
        missing = [name for name in (*provider.incidents(), *of_connections()) if f"`{name}`" not in text]
    assert not missing
