"""The adaptive limit: the decision on a virtual clock and a simulated provider, then the provider's own."""

from __future__ import annotations

import heapq
import math
import random
import threading
from concurrent.futures import Future
from typing import Any

import pytest

import held
import mprpc
import services
import wire
from mprpc import MprpcConfig, RpcProvider, Status
from mprpc.limiter import FIRST, PERIOD, Limiter, Window
from reliability import overload
from services import REQUEST
from test_provider import ANSWER, wait_until

WORKERS, TOOK = 8, 0.010  # a simulated provider: 800 calls a second
DEADLINE = 0.2


class Simulated:
    """A provider with a queue and so many workers; requests come by chance, and the limiter says which are let in."""

    def __init__(self, seed: int, workers: int = WORKERS, took: float = TOOK) -> None:
        self.took, self.now = took, 0.0
        self.limiter = Limiter(0.0)
        self._random = random.Random(seed)
        self._free = [0.0] * workers  # when each worker has ended what it has taken
        self._ends: list[tuple[float, float]] = []  # when one that was let in ends, and when it came
        self._over: list[float] = []  # seconds of those that have ended in this window
        self._peak = self._refused = 0
        self._windows = 0.0

    def run(self, rate: float, seconds: float) -> tuple[float, float]:
        """Answers within the deadline a second, and the slowest answer's seconds."""
        good, slowest, end = 0, 0.0, self.now + seconds
        while True:
            come = self.now + self._random.expovariate(rate)
            while self._windows + PERIOD <= min(come, end):
                self._windows += PERIOD
                self._update(self._windows)
            self.now = min(come, end)
            if come > end:
                return good / seconds, slowest
            while self._ends and self._ends[0][0] <= come:
                ended, came = heapq.heappop(self._ends)
                self._over.append(ended - came)
            under_way = len(self._ends)
            if under_way >= self.limiter.limit:
                self._refused += 1
                continue
            self._peak = max(self._peak, under_way + 1)
            ends = max(come, heapq.heappop(self._free)) + self._random.uniform(0.8, 1.2) * self.took
            heapq.heappush(self._free, ends)
            heapq.heappush(self._ends, (ends, come))
            good += ends - come <= DEADLINE
            slowest = max(slowest, ends - come)

    def _update(self, now: float) -> None:
        latency = sum(self._over) / len(self._over) if self._over else 0.0
        self.limiter.update(now, Window(len(self._over), latency, self._refused, self._peak))
        self._over, self._peak, self._refused = [], len(self._ends), 0


@pytest.mark.parametrize("seed", range(3))
def test_goodput_at_five_times_the_capacity(seed: int) -> None:
    simulated = Simulated(seed)
    capacity = WORKERS / TOOK
    simulated.run(5 * capacity, 2.0)
    goodput, slowest = simulated.run(5 * capacity, 12.0)  # with one look at what they take unhindered
    assert goodput > 0.95 * capacity
    assert slowest < 0.1
    assert simulated.limiter.limit < 4 * WORKERS
    light, slowest = simulated.run(0.5 * capacity, 5.0)
    assert light > 0.97 * 0.5 * capacity
    assert slowest < 0.1


def test_one_worker_that_is_quick_gets_a_batch_at_a_time() -> None:
    """Calls of microseconds: the limit must leave room for what makes a turn cheap."""
    simulated = Simulated(1, 1, 0.00002)
    simulated.run(100_000, 1.0)
    goodput, slowest = simulated.run(100_000, 1.0)
    assert goodput > 45_000
    assert slowest < 0.02


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_calls_that_become_slower_or_faster(factor: float) -> None:
    simulated = Simulated(3)
    simulated.run(5 * WORKERS / TOOK, 5.0)
    simulated.took = TOOK * factor
    capacity = WORKERS / simulated.took
    simulated.run(5 * capacity, 7.0)  # one look at what they take unhindered
    goodput, _ = simulated.run(5 * capacity, 2.0)
    assert goodput > 0.9 * capacity
    assert 0.8 * simulated.took < simulated.limiter.unhindered < 3.5 * simulated.took


def test_without_overload_the_limit_stays_out_of_the_way() -> None:
    limiter = Limiter(0.0)
    for step in range(1, 200):
        before = limiter.limit
        assert limiter.update(step * PERIOD, Window(50, 0.01, 0, before)) >= before
    assert limiter.limit > 10 * FIRST
    for step in range(200, 400):  # little is used of it, which says nothing of more
        limiter.update(step * PERIOD, Window(50, 0.01, 0, 3))
    assert limiter.limit < 100_000


def test_latency_under_a_few_milliseconds_is_no_overload() -> None:
    limiter = Limiter(0.0)
    limiter.update(PERIOD, Window(100, 0.00001, 0, FIRST))
    assert limiter.update(2 * PERIOD, Window(100, 0.003, 0, FIRST)) > FIRST


def test_the_limit_never_closes() -> None:
    limiter = Limiter(0.0)
    limiter.update(PERIOD, Window(10, 0.001, 5, FIRST))
    for step in range(2, 500):
        assert limiter.update(step * PERIOD, Window(1, 60.0, 100, 1)) >= 1


def test_calls_that_never_end_do_not_close_it() -> None:
    """Handlers that nobody waits for any more need not answer: their places come back by the limit's rise."""
    limiter = Limiter(0.0)
    for step in range(1, 201):
        limiter.update(step * PERIOD, Window(0, 0.0, 10, FIRST))
    assert FIRST + 5 * math.isqrt(FIRST) < limiter.limit < 4 * FIRST


# ---- a provider's ----


def test_a_call_over_the_limit_is_refused_at_once_and_counted() -> None:
    with held.holding(adaptive_limit=True) as (handler, provider), wire.connect(provider.address) as peer:
        peer.send(b"".join(wire.login(number, b"hold") for number in range(1, FIRST + 3)))
        handler.taken(FIRST)
        for number in (FIRST + 1, FIRST + 2):
            header, _ = peer.frame()
            assert (header.call_id, header.status, header.not_run) == (number, Status.RESOURCE_EXHAUSTED, True)
        assert provider.incidents()["overloaded"] == 2
        handler.release()
        assert sorted(peer.frame()[0].call_id for _ in range(FIRST)) == list(range(1, FIRST + 1))
        peer.send(wire.login(1000))
        assert peer.frame()[1] == ANSWER


def test_a_methods_own_limit_is_its_own() -> None:
    class Two(services.Users):
        waiting: list[Future[Any]]

        @mprpc.adaptive_limit
        def Login(self, request: Any, controller: Any) -> Any:
            self.waiting.append(Future())
            return self.waiting[-1]

        def Register(self, request: Any, controller: Any) -> Any:
            return services.user_pb2.RegisterResponse(success=True)

    service = Two()
    service.waiting = []
    provider = RpcProvider(MprpcConfig())
    provider.notify_service(service)
    with provider, wire.connect(provider.address) as peer:
        peer.send(b"".join(wire.login(number) for number in range(1, FIRST + 2)))
        header, _ = peer.frame()
        assert (header.call_id, header.status) == (FIRST + 1, Status.RESOURCE_EXHAUSTED)
        register = wire.request(500, "fixbug.UserServiceRpc", "Register")
        peer.send(register)
        header, _ = peer.frame()
        assert (header.call_id, header.status) == (500, Status.OK)
        for future in service.waiting:
            future.set_result(services.accept(REQUEST, None))
        assert {peer.frame()[0].status for _ in range(FIRST)} == {Status.OK}


def test_every_end_of_a_call_gives_its_place_back() -> None:
    """Answers, errors, calls that expired or were cancelled before they ran, callers that went away."""
    release = threading.Event()

    def login(request: Any, controller: Any) -> Any:
        if request.name == b"wait":
            assert release.wait(wire.PATIENCE)
        if request.name == b"fail":
            raise mprpc.NotFound("no such user")
        return services.accept(request, controller)

    cancel = wire.rpcheader_pb2.CANCEL
    with services.serving(login, adaptive_limit=True) as provider:
        for _ in range(4):
            release.clear()
            with wire.connect(provider.address) as peer, wire.connect(provider.address) as gone:
                peer.send(wire.login(1, b"wait") + wire.login(2, timeout_ms=1) + wire.login(3, b"fail"))
                many = FIRST // 4
                peer.send(b"".join(wire.login(4 + i) for i in range(many)))
                peer.send(b"".join(wire.frame(kind=cancel, call_id=4 + i) for i in range(many)))
                gone.send(b"".join(wire.login(1 + i) for i in range(many)))
                gone.reset()
                release.set()
                while peer.frame()[0].call_id != 3:
                    pass
        wait_until(lambda: sum(each.in_flight for each in _statistics(provider)) == 0, "all have ended")
        with wire.connect(provider.address) as peer:  # as many at once as at the first time
            release.clear()
            peer.send(b"".join(wire.login(number, b"fail") for number in range(1, FIRST // 2)))
            assert {peer.frame()[0].status for _ in range(1, FIRST // 2)} == {Status.NOT_FOUND}
        assert provider.incidents()["overloaded"] == 0


def _statistics(provider: RpcProvider) -> Any:
    from test_provider import statistics

    return statistics(provider)


def test_five_times_the_capacity_of_a_provider() -> None:
    """`make overload` measures; here it only must not collapse, as it does without the limit (to under a tenth)."""
    with overload.provider("sleep", True) as address:
        loop = overload.OpenLoop(address)
        capacity = loop.saturate(0.5)
        answers = loop.run(overload.OVERLOAD * capacity, 1.5)
        loop.close()
    assert overload._goodput(answers, 1.5) > 0.25 * capacity
    assert sum(each.status == Status.RESOURCE_EXHAUSTED for each in answers) > len(answers) / 20


def test_without_the_key_nothing_is_limited() -> None:
    with held.holding() as (handler, provider), wire.connect(provider.address) as peer:
        peer.send(b"".join(wire.login(number, b"hold") for number in range(1, 4 * FIRST)))
        handler.taken(4 * FIRST - 1)
        handler.release()
        assert {peer.frame()[0].status for _ in range(1, 4 * FIRST)} == {Status.OK}
        assert provider.incidents()["overloaded"] == 0
