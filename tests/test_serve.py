"""The provider's turn in C: what it keeps between calls, what it hands to Python, and that it loses no reference."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

import services
import wire
from mprpc import RpcError, Status
from mprpc._native import ffi
from mprpc.fast import native
from mprpc.provider import _Lines, _Loop, _ServerController
from services import LoginResponse

OK = LoginResponse(success=True)
BATCH = 200
CALLS = 100_000


def names(count: int, name: bytes = b"zhang san") -> bytes:
    return b"".join(wire.login(i, name) for i in range(1, count + 1))


def exchange(peer: wire.Peer, data: bytes, count: int) -> list[tuple[Any, bytes]]:
    """Sends all at once, so that the requests come in few turns."""
    peer.send(data)
    return [peer.frame() for _ in range(count)]


# ---- the controller that is used again ----


def test_a_controller_that_nobody_kept_serves_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(_ServerController, "__init__", lambda self: made.append(id(self)), raising=False)
    with services.serving() as provider, wire.connect(provider.address) as peer:
        exchange(peer, names(BATCH), BATCH)
    assert len(made) == 1


@pytest.mark.parametrize(
    "touch",
    [
        lambda controller: setattr(controller, "note", "mine"),
        lambda controller: vars(controller).update(note="mine"),
        lambda controller: setattr(controller, "timeout", 3.0),
        lambda controller: controller.reset(),
    ],
    ids=["attribute", "vars", "timeout", "reset"],
)
def test_what_a_handler_leaves_in_a_controller_is_not_the_next_calls(touch: Callable[[Any], object]) -> None:
    found = []

    def login(request: Any, controller: Any) -> Any:
        found.append((getattr(controller, "note", None), controller.timeout, controller.failed()))
        touch(controller)
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        answers = exchange(peer, names(BATCH), BATCH)
    assert found == [(None, None, False)] * BATCH
    assert [header.status for header, _ in answers] == [Status.OK] * BATCH


def test_a_failed_call_does_not_fail_the_next() -> None:
    def login(request: Any, controller: Any) -> Any:
        if request.name == b"no":
            controller.set_failed("not you", Status.PERMISSION_DENIED)
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        data = b"".join(wire.login(i, b"no" if i % 2 else b"yes") for i in range(1, 101))
        statuses = {header.call_id: header.status for header, _ in exchange(peer, data, 100)}
    assert statuses == {i: Status.PERMISSION_DENIED if i % 2 else Status.OK for i in range(1, 101)}


@pytest.mark.parametrize("kept_as", [lambda each: each, weakref.ref], ids=["itself", "weakly"])
def test_a_controller_that_was_kept_serves_no_other_call(kept_as: Callable[[Any], Any]) -> None:
    kept: list[Any] = []
    found = []

    def login(request: Any, controller: Any) -> Any:
        found.append(controller in [each() if isinstance(each, weakref.ref) else each for each in kept])
        kept.append(kept_as(controller))
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        exchange(peer, names(20), 20)
    assert found == [False] * 20


def test_a_controller_after_its_call_knows_nothing_of_the_next() -> None:
    """Its peer and its time are those of the call that runs, and only while it runs."""
    kept: list[Any] = []
    found = []

    def login(request: Any, controller: Any) -> Any:
        found.extend((each.peer, each.time_remaining()) for each in kept)
        kept[:] = [controller]
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        for i in (1, 2):
            exchange(peer, wire.login(i, timeout_ms=60_000), 1)
    assert found == [("", None)]


def test_another_thread_asks_the_controller_of_a_handler_that_runs() -> None:
    found: list[Any] = []

    def login(request: Any, controller: Any) -> Any:
        asking = threading.Thread(target=lambda: found.append((controller.peer, controller.time_remaining())))
        asking.start()
        asking.join(wire.PATIENCE)
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        exchange(peer, wire.login(1, timeout_ms=60_000), 1)
        ((who, left),) = found
        assert who in ("", "{}:{}".format(*peer.socket.getsockname()))  # known if the handler took its time
        assert (left is None) == (who == "")


# ---- what Python decides, and what happens when that fails ----


@pytest.mark.parametrize(
    ("decision", "login"),
    [
        ("_raised", lambda request, controller: 1 // 0),
        ("_settle", lambda request, controller: None),
        ("_refuse", lambda request, controller: LoginResponse.FromString(b"\x0a\xe8\x07\x12\xe5\x07" + b"x" * 997)),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_decision_that_fails_fails_its_call_alone(
    decision: str, login: services.Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(type(args.exc_value)))

    def fails(self: object, *arguments: object) -> None:
        raise LookupError("a defect")

    monkeypatch.setattr(_Loop, decision, fails)

    def either(request: Any, controller: Any) -> Any:
        return OK if request.name == b"fine" else login(request, controller)

    with services.serving(either, max_payload=900) as provider, wire.connect(provider.address) as peer:
        data = b"".join(wire.login(i, b"bad" if i % 2 else b"fine") for i in range(1, 21))
        answers = exchange(peer, data, 20)
    assert sorted(header.call_id for header, _ in answers) == list(range(1, 21))
    assert {header.status for header, _ in answers if header.call_id % 2} == {Status.INTERNAL}
    assert {header.status for header, _ in answers if header.call_id % 2 == 0} == {Status.OK}
    assert unraisable == ([LookupError] * 10 if decision == "_raised" else [])


def test_news_that_cant_be_told_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(type(args.exc_value)))

    def fails(self: object, line: str) -> None:
        raise LookupError("a defect")

    monkeypatch.setattr(_Lines, "warn", fails)
    with services.serving() as provider:
        with wire.connect(provider.address) as stranger:
            stranger.send(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.was_reset()
        with wire.connect(provider.address) as peer:
            assert exchange(peer, wire.login(1), 1)[0][0].status == Status.OK
    assert unraisable == [LookupError]


def test_expired_requests_of_a_turn_are_not_run() -> None:
    ran = []

    def login(request: Any, controller: Any) -> Any:
        ran.append(request.name)
        if request.name == b"long":
            sum(range(5_000_000))  # tens of milliseconds, in which nobody else gets the interpreter
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        data = wire.login(1, b"long") + wire.login(2, b"late", timeout_ms=5) + wire.login(3, b"last", timeout_ms=9000)
        answers = {header.call_id: header for header, _ in exchange(peer, data, 3)}
    assert ran == [b"long", b"last"]
    assert (answers[2].status, answers[2].not_run) == (Status.DEADLINE_EXCEEDED, True)


def test_a_turns_replies_are_of_any_size() -> None:
    """Small ones go with their turn, from 64 KiB on each by itself, and what a turn needed much of is given back."""
    sizes = [0, 1, 65_000, 65_521, 65_522, 65_523, 65_536, 100_000, 3] * 4
    asked = iter(sizes)

    def login(request: Any, controller: Any) -> Any:
        response = LoginResponse()
        response.result.errmsg = b"x" * next(asked)
        return response

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        answers = exchange(peer, names(len(sizes)), len(sizes))
    found = {header.call_id: len(LoginResponse.FromString(payload).result.errmsg) for header, payload in answers}
    assert [found[i] for i in range(1, len(sizes) + 1)] == sizes


# ---- references ----

ENDINGS: dict[str, services.Login] = {
    "response": services.accept,
    "failed": lambda request, controller: controller.set_failed("no"),
    "raised": lambda request, controller: 1 // 0,
    "none": lambda request, controller: None,
    "attribute": lambda request, controller: vars(controller).update(note="x") or OK,
    "future": lambda request, controller: future_of(OK),
    "large": lambda request, controller: LoginResponse.FromString(b"\x0a\x83\xf1\x04\x12\xff\xf0\x04" + b"x" * 79_999),
}


def future_of(value: object) -> Future[Any]:
    made: Future[Any] = Future()
    made.set_result(value)
    return made


def counts() -> list[int]:
    """Of what a call's ending could keep or give away once too often."""
    shared = [services.accept, LoginResponse, services.LoginRequest, Status.OK, OK]
    if sys.version_info < (3, 12):  # since then these are immortal: the interpreter itself does not count them
        shared += [None, (), b""]
    return [sys.getrefcount(each) for each in shared]


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_ending_of_a_call_keeps_or_loses_a_reference(ending: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "mprpc.provider")  # the lines would be kept for the report
    with services.serving(ENDINGS[ending]) as provider, wire.connect(provider.address) as peer:
        number = 0

        def call(count: int) -> None:
            nonlocal number
            data = b"".join(wire.login(number + i) for i in range(1, count + 1))
            number += count
            sending = threading.Thread(target=peer.send, args=(data,))
            sending.start()
            for _ in range(count):
                peer.frame()
            sending.join()

        call(100)
        gc.collect()
        before, objects = counts(), len(gc.get_objects())
        call(1000)
        gc.collect()
        # Each call that left something behind would have left 1,000; a thread more has some of its own.
        assert max(abs(now - was) for now, was in zip(counts(), before, strict=True)) < 900
        assert abs(len(gc.get_objects()) - objects) < 900


def test_arguments_that_do_not_parse_keep_nothing() -> None:
    with services.serving() as provider, wire.connect(provider.address) as peer:
        bad = [wire.request(i, *wire.LOGIN, b"\xff\xff") for i in range(1, 2001)]
        exchange(peer, b"".join(bad[:100]), 100)
        gc.collect()
        objects = len(gc.get_objects())
        for start in range(100, 2000, 100):
            for header, _ in exchange(peer, b"".join(bad[start : start + 100]), 100):
                assert header.status == Status.INVALID_ARGUMENT
        gc.collect()
        assert abs(len(gc.get_objects()) - objects) < 100


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_large_request_is_in_memory_once_while_its_handler_runs() -> None:
    """Neither what was received nor the bytes that it was parsed from lie beside the message."""
    size = 40 << 20  # malloc gives so much back at once
    grown = []

    def login(request: Any, controller: Any) -> Any:
        grown.append(resident() - before)
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        data = wire.login(1, b"x" * size)
        before = resident()
        peer.send(data)
        assert peer.frame()[0].status == Status.OK
        data = wire.login(2, b"x" * size) + wire.login(3)  # in one buffer with another's arguments
        before = resident()
        peer.send(data)
        assert sorted(peer.frame()[0].call_id for _ in range(2)) == [2, 3]
    assert grown[0] < 1.5 * size


def test_memory_stays_flat_over_many_calls() -> None:
    with services.serving() as provider, wire.connect(provider.address) as peer:
        frames = [wire.login(i) for i in range(1, CALLS + 1)]
        for start in range(0, CALLS, BATCH):
            exchange(peer, b"".join(frames[start : start + BATCH]), BATCH)
            if start == CALLS // 10:
                before = resident()
        assert resident() - before < 4 << 20  # 90,000 calls: a reference lost in each would be as many objects


def test_a_stopped_provider_is_collected() -> None:
    with services.serving() as provider, wire.connect(provider.address) as peer:
        exchange(peer, names(3), 3)
        loop = weakref.ref(provider._loops[0])
    del provider
    gc.collect()
    assert loop() is None


# ---- beside a thread that computes ----


@contextlib.contextmanager
def computing() -> Iterator[list[int]]:
    """A thread that never waits; how far it has counted."""
    counted, done = [0], threading.Event()

    def compute() -> None:
        while not done.is_set():
            counted[0] += 1

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield counted
    finally:
        done.set()
        thread.join(wire.PATIENCE)


def test_calls_beside_a_thread_that_computes_and_the_thread_beside_calls() -> None:
    """Neither starves the other, also when there is always one more request."""
    with services.serving(switch_interval=0.001) as provider, computing() as counted, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(wire.connect(provider.address)) for _ in range(8)]
        end, i, seen = time.monotonic() + wire.PATIENCE, 0, {counted[0]}
        while i < 50 or len(seen) < 5:
            assert time.monotonic() < end, f"it has counted {counted[0]} beside {i * 8} calls"
            i += 1
            for peer in peers:
                peer.send(wire.login(i))
            assert [peer.frame()[0].call_id for peer in peers] == [i] * 8
            seen.add(counted[0])


def test_the_switch_interval_is_the_shortest_asked_for_and_comes_back() -> None:
    before = sys.getswitchinterval()
    with services.serving(switch_interval=0.002):
        with services.serving(switch_interval=0.001):
            with services.serving(switch_interval=0):
                assert sys.getswitchinterval() == pytest.approx(0.001)
        assert sys.getswitchinterval() == pytest.approx(0.002)
    assert sys.getswitchinterval() == before
    with services.serving(switch_interval=0):
        assert sys.getswitchinterval() == before
    with services.serving(switch_interval=1.0):
        assert sys.getswitchinterval() == before


# ---- the type ----


def test_only_a_member_of_the_crew_leads() -> None:
    with services.serving() as provider:
        with pytest.raises(ValueError, match="no member"):
            provider._loops[0].server.lead(0)


@pytest.mark.parametrize("methods", [[()], (1,), ((1, 2),)])
def test_a_table_that_is_none(methods: Any) -> None:
    with services.serving() as provider:
        address = int(ffi.cast("uintptr_t", provider._loops[0].handle))
        with pytest.raises(TypeError):
            native.Server(None, address, 0, methods, object, Status.OK, 1, 0)
        with pytest.raises(TypeError):
            native.Server(None, address, 0, (), object, Status.OK, 1, 0, more=1)


def test_errors_of_the_users_own_kind() -> None:
    """An exception whose constructor or text fails is still an answer."""

    class Odd(Exception):
        def __init__(self, first: int, second: int) -> None:
            raise TypeError("can't even be made")

    def login(request: Any, controller: Any) -> Any:
        with contextlib.suppress(ZeroDivisionError):
            1 // 0  # noqa: B018
        raise Odd

    with services.serving(login) as provider, services.calling(provider) as users:
        with pytest.raises(RpcError) as raised:
            users.Login(services.REQUEST)
    assert raised.value.status is Status.INTERNAL
