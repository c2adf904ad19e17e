"""Which of a provider's loops are at work: the decision on a virtual clock, then connections that are handed on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import services
import wire
from mprpc._native import ffi, lib
from services import LoginResponse
from test_provider import wait_until

LOOPS = 4
SECOND = 1_000_000_000
SMALL, LARGE = 100, 100_000  # bytes of a request and its response


class Simulated:
    """Loops that tell what they have counted, stint by stint, on a clock of their own."""

    def __init__(self) -> None:
        self.placement = ffi.new("struct mprpc_placement *")
        lib.mprpc_placement_init(self.placement, LOOPS)
        self.now = SECOND

    @property
    def active(self) -> int:
        return int(lib.mprpc_placement_active(self.placement))

    def stint(self, *, waits: float = 0.0, size: int = SMALL, long_runs: float = 0.0, calls: int = 1000) -> None:
        """One loop's: `waits` ns for the interpreter's lock for one with it, a share of `long_runs` among the calls."""
        began, self.now = self.now, self.now + lib.MPRPC_STINT
        told = ffi.new("struct mprpc_stint *")
        told.since, told.processor = began, 1  # so long ago that the leader's thread has used a core since
        told.held, told.waited = 1_000_000, int(1_000_000 * waits)
        told.requests, told.bytes, told.long_runs = calls, calls * size, int(calls * long_runs)
        lib.mprpc_placement_tell(self.placement, told, self.now)
        assert (told.since, told.requests) == (self.now, 0)

    def run(self, seconds: float, *, one: int, all_loops: int, **options: float) -> float:
        """The share of the time in which all loops were at work, where one makes `one` calls a stint, all so many."""
        end, spread, stints = self.now + seconds * SECOND, 0, 0
        while self.now < end:
            spread += self.active == LOOPS
            stints += 1
            self.stint(calls=all_loops if self.active == LOOPS else one, **options)  # type: ignore[arg-type]
        return spread / stints


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    """This thread has used a core for more than a stint, so that a leader of these stints had no time to spare."""
    while time.thread_time() * SECOND < 2 * lib.MPRPC_STINT:
        pass


def test_loops_that_wait_for_each_other_gather() -> None:
    loops = Simulated()
    assert loops.active == LOOPS
    loops.stint(waits=2.0)
    assert loops.active == LOOPS, "one stint may be chance"
    loops.stint(waits=2.0)
    assert loops.active == 1


@pytest.mark.parametrize("what", [{}, {"waits": 2.0, "size": LARGE}, {"waits": 2.0, "long_runs": 0.05}])
def test_loops_that_do_not_wait_or_do_large_or_long_things_stay(what: dict[str, float]) -> None:
    loops = Simulated()
    for _ in range(100):
        loops.stint(**what)  # type: ignore[arg-type]
    assert loops.active == LOOPS


def gathered() -> Simulated:
    loops = Simulated()
    loops.stint(waits=2.0)
    loops.stint(waits=2.0)
    assert loops.active == 1
    return loops


@pytest.mark.parametrize("what", [{"size": LARGE}, {"long_runs": 0.2}])
def test_what_goes_on_without_the_lock_spreads_at_once(what: dict[str, float]) -> None:
    loops = gathered()
    loops.stint(**what)  # type: ignore[arg-type]
    assert loops.active == 1
    loops.stint(**what)  # type: ignore[arg-type]
    assert loops.active == LOOPS


def test_a_trial_that_gains_nothing_is_seldom_made_again(core: None) -> None:
    loops = gathered()
    assert 0.02 < loops.run(5, one=700, all_loops=500, waits=2.0) < 0.1, "tried, and given up"
    assert 0 < loops.run(300, one=700, all_loops=500, waits=2.0) < 0.004


def test_a_trial_that_gains_lasts(core: None) -> None:
    loops = gathered()
    loops.run(3, one=700, all_loops=1000, waits=2.0)
    assert loops.active == LOOPS
    assert loops.run(300, one=700, all_loops=1000, waits=2.0) > 0.95


def test_nothing_is_tried_while_the_leader_has_time() -> None:
    loops = gathered()
    for _ in range(1000):
        began = loops.now
        told = ffi.new("struct mprpc_stint *")
        told.since, told.requests, told.bytes, told.held = began, 1000, 1000, 1000  # processor: 0, it is not known
        loops.now += lib.MPRPC_STINT
        lib.mprpc_placement_tell(loops.placement, told, loops.now)
        assert loops.active == 1


def test_few_calls_say_nothing() -> None:
    loops = Simulated()
    told = ffi.new("struct mprpc_stint *")
    told.since, told.requests, told.waited = loops.now, lib.MPRPC_STINT_MIN - 1, SECOND
    for stints in range(1, 1000):
        lib.mprpc_placement_tell(loops.placement, told, loops.now + stints * lib.MPRPC_STINT)
    assert loops.active == LOOPS


# ---- a provider's ----


@contextlib.contextmanager
def callers(address: str, count: int, wrong: list[str]) -> Iterator[None]:
    """So many connections in their own threads, each with one call in flight all the time."""
    over = threading.Event()

    def call(number: int) -> None:
        with wire.connect(address) as peer:
            for i in range(1, 1 << 30):
                name = b"%d/%d" % (number, i)
                peer.send(wire.login(i, name))
                header, payload = peer.frame()
                if (header.call_id, LoginResponse.FromString(payload).result.errmsg) != (i, name):
                    wrong.append(f"{number}: call {i} got {header}")
                if over.is_set():
                    return

    threads = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(wire.PATIENCE)
            assert not thread.is_alive()


def wait_for(provider: Any, placed: Callable[[tuple[int, ...]], bool], what: str) -> None:
    wait_until(lambda: placed(provider.statistics().loops), what)


def test_connections_gather_and_spread_again_and_no_answer_is_lost() -> None:
    """The callers are threads of the provider's process, so that its loops do wait for the interpreter's lock."""
    slow = threading.Event()

    def login(request: Any, controller: Any) -> Any:
        if slow.is_set():
            time.sleep(0.0003)
        return services.accept(request, controller)

    wrong: list[str] = []
    with services.serving(login, loops=LOOPS) as provider:
        with callers(provider.address, 8, wrong):
            wait_for(provider, lambda loops: loops == (8, 0, 0, 0), "they have gathered")
            slow.set()
            wait_for(provider, lambda loops: loops == (2, 2, 2, 2), "they have spread")
            slow.clear()
            wait_for(provider, lambda loops: loops == (8, 0, 0, 0), "they have gathered again")
        wait_for(provider, lambda loops: loops == (0, 0, 0, 0), "all are gone")
        told = provider.statistics()
        assert (told.accepted, told.connections, told.broken, told.in_flight) == (8, 0, 0, 0)
    assert wrong == []
