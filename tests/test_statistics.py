"""What a provider counts: every call once, under what it ended with, wherever its answer came from."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

import services
import wire
from mprpc import NotFound, Status
from mprpc._native import lib
from mprpc.statistics import Latency, MethodStatistics, _lower
from services import LoginResponse

LOGIN = "fixbug.UserServiceRpc.Login"
OK = LoginResponse(success=True)


def wait_until(true: Callable[[], object]) -> None:
    for _ in range(int(wire.PATIENCE / 0.002)):
        if true():
            return
        threading.Event().wait(0.002)
    raise AssertionError("never came true")


def ended(provider: Any, calls: int) -> MethodStatistics:
    """Login's, once so many calls have ended: the last one's answer may be out before it is counted."""
    wait_until(lambda: of(provider).calls - of(provider).in_flight >= calls)
    return of(provider)


def of(provider: Any) -> MethodStatistics:
    found: MethodStatistics = provider.statistics().methods[LOGIN]
    return found


# ---- what counts as what ----


def later(request: Any, controller: Any) -> Any:
    future: Future[Any] = Future()
    threading.Timer(0.02, future.set_result, [OK]).start()
    return future


async def awaited(request: Any, controller: Any) -> Any:
    await asyncio.sleep(0.02)
    return OK


def raises(request: Any, controller: Any) -> Any:
    raise NotFound("nobody")


def refuses(request: Any, controller: Any) -> Any:
    controller.set_failed("no", Status.PERMISSION_DENIED)
    return OK


def rejected(request: Any, controller: Any) -> Any:
    future: Future[Any] = Future()
    future.set_exception(NotFound("nobody"))
    return future


@pytest.mark.parametrize(
    ("login", "errors"),
    [
        (services.accept, {}),
        (later, {}),
        (awaited, {}),
        (lambda request, controller: LoginResponse(result={"errmsg": b"x" * 200_000}), {}),
        (raises, {Status.NOT_FOUND: 5}),
        (refuses, {Status.PERMISSION_DENIED: 5}),
        (rejected, {Status.NOT_FOUND: 5}),
        (lambda request, controller: 1 // 0, {Status.INTERNAL: 5}),
        (lambda request, controller: None, {Status.INTERNAL: 5}),
    ],
)
@pytest.mark.parametrize("loops", [1, 3])
def test_each_call_counts_once(login: services.Login, errors: dict[Status, int], loops: int) -> None:
    with services.serving(login, loops=loops) as provider:
        for i in range(5):
            with wire.connect(provider.address) as peer:
                peer.send(wire.login(i + 1))
                peer.frame()
        found = ended(provider, 5)
    assert (found.calls, dict(found.errors), found.in_flight) == (5, errors, 0)
    assert found.latency.calls == 5
    assert found.latency.mean >= (0.02 if login in (later, awaited) else 0)
    assert found.latency.mean < wire.PATIENCE


def test_calls_whose_handler_did_not_run_have_no_latency() -> None:
    with services.serving() as provider, wire.connect(provider.address) as peer:
        peer.send(wire.request(1, *wire.LOGIN, b"\xff\xff") + wire.request(2, "fixbug.UserServiceRpc", "Nothing"))
        peer.send(wire.login(3))
        assert {peer.frame()[0].status for _ in range(3)} == {0, Status.INVALID_ARGUMENT, Status.UNIMPLEMENTED}
        found = ended(provider, 2)
        assert (found.calls, dict(found.errors)) == (2, {Status.INVALID_ARGUMENT: 1})
        others = provider.statistics().methods["fixbug.UserServiceRpc.Register"]
        assert (others.calls, others.latency.calls, others.latency.percentile(50)) == (0, 0, 0.0)


def test_expired_calls_are_errors_that_took_no_time() -> None:
    blocked, go = threading.Event(), threading.Event()

    def login(request: Any, controller: Any) -> Any:
        blocked.set()
        go.wait(wire.PATIENCE)
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1) + wire.login(2, timeout_ms=1))
        assert blocked.wait(wire.PATIENCE)
        threading.Event().wait(0.01)
        go.set()
        assert {peer.frame()[0].status for _ in range(2)} == {Status.OK, Status.DEADLINE_EXCEEDED}
        found = ended(provider, 2)
    assert (found.calls, dict(found.errors), found.latency.calls) == (2, {Status.DEADLINE_EXCEEDED: 1}, 1)


def test_calls_under_way_are_in_flight() -> None:
    futures: list[Future[Any]] = []

    def login(request: Any, controller: Any) -> Any:
        futures.append(Future())
        return futures[-1]

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1) + wire.login(2) + wire.login(3))
        wait_until(lambda: len(futures) == 3)
        assert (of(provider).calls, of(provider).in_flight, of(provider).latency.calls) == (3, 3, 0)
        for future in futures:
            future.set_result(OK)
        assert ended(provider, 3).in_flight == 0
        assert provider.statistics().in_flight == 0


def test_a_call_answered_after_its_caller_went_has_ended_too() -> None:
    futures: list[Future[Any]] = []

    def login(request: Any, controller: Any) -> Any:
        futures.append(Future())
        return futures[-1]

    with services.serving(login) as provider:
        with wire.connect(provider.address) as peer:
            peer.send(wire.login(1))
            wait_until(lambda: futures)
        wait_until(lambda: provider.statistics().connections == 0)
        futures[0].set_result(OK)
        assert ended(provider, 1).latency.calls == 1


def test_connections_count() -> None:
    with services.serving(loops=2) as provider:
        with wire.connect(provider.address) as one, wire.connect(provider.address) as other:
            for peer in (one, other):
                peer.send(wire.login(1))
                peer.frame()
            assert provider.statistics().connections == 2
            one.send(b"GET / HTTP/1.1\r\n\r\n")
            wait_until(lambda: provider.statistics().broken == 1)
        wait_until(lambda: provider.statistics().connections == 0)
        assert provider.statistics().accepted == 2


def test_statistics_before_the_start_and_after_the_end() -> None:
    with services.serving() as provider, services.calling(provider) as users:
        users.Login(services.REQUEST)
        ended(provider, 1)
    assert of(provider).calls == 1
    from mprpc import MprpcConfig, RpcProvider

    unstarted = RpcProvider(MprpcConfig())
    assert unstarted.statistics() == ({}, 0, (), 0, 0, 0, 0, 0, 0)


def test_snapshots_are_taken_from_any_thread_and_never_go_back() -> None:
    with services.serving(loops=2) as provider, wire.connect(provider.address) as peer:
        done = threading.Event()
        failures: list[object] = []

        def watch() -> None:
            before = 0
            while not done.is_set():
                found = of(provider)
                if not before <= found.calls:
                    failures.append((before, found))
                before = found.calls

        threads = [threading.Thread(target=watch) for _ in range(3)]
        for thread in threads:
            thread.start()
        for start in range(0, 5000, 100):
            peer.send(b"".join(wire.login(start + i) for i in range(1, 101)))
            for _ in range(100):
                peer.frame()
        done.set()
        for thread in threads:
            thread.join(wire.PATIENCE)
        assert not failures
        assert ended(provider, 5000).calls == 5000


def test_a_snapshot_is_immutable() -> None:
    with services.serving() as provider:
        found = provider.statistics()
    with pytest.raises(AttributeError):
        found.connections = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.methods[LOGIN] = None  # type: ignore[index]
    with pytest.raises(TypeError):
        found.methods[LOGIN].errors[Status.INTERNAL] = 1  # type: ignore[index]


# ---- the histogram ----


def test_buckets_are_those_that_c_counts_in() -> None:
    buckets = lib.MPRPC_TALLY_BUCKETS
    for bucket in range(buckets):
        assert lib.mprpc_tally_bucket(_lower(bucket)) == bucket
        assert bucket == 0 or lib.mprpc_tally_bucket(_lower(bucket) - 1) == bucket - 1
    assert lib.mprpc_tally_bucket(1 << 63) == buckets - 1
    assert _lower(buckets - 1) > 30 * 60 * 1_000_000_000


@pytest.mark.parametrize("seconds", [1e-6, 37e-6, 0.001, 0.0123, 1.0, 60.0])
def test_a_percentile_is_known_to_within_an_eighth(seconds: float) -> None:
    counts = [0] * lib.MPRPC_TALLY_BUCKETS
    counts[lib.mprpc_tally_bucket(int(seconds * 1e9))] = 100
    assert Latency(tuple(counts), 1.0).percentile(50) == pytest.approx(seconds, rel=0.125)


def test_percentiles() -> None:
    counts = [0] * lib.MPRPC_TALLY_BUCKETS
    for microseconds in range(1, 101):
        counts[lib.mprpc_tally_bucket(microseconds * 1000)] += 1
    latency = Latency(tuple(counts), sum(range(1, 101)) / 1e6)
    low, half, most, all_of_them = latency.percentiles(1, 50, 90, 100)
    assert [low, half, most, all_of_them] == pytest.approx([1e-6, 50e-6, 90e-6, 100e-6], rel=0.15)
    assert latency.mean == pytest.approx(50.5e-6)
    with pytest.raises(ValueError, match="0 to 100"):
        latency.percentile(101)
