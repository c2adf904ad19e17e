"""A crowd through all three faces: threads, futures and tasks together, some of them cancelled, some out of time.

Each call ends once, with its own answer or its own error; after it nothing is pending and no thread stays.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest

import services
import wire
from held import named
from mprpc import AsyncMprpcChannel, DeadlineExceeded, MprpcChannel, NotFound
from mprpc import futures as subject

LONG = 300.0
SOON = 0.02  # seconds: what a call gets whose handler never answers
LOST = 2000  # never answered Futures that the handler keeps, so that they stay alive a while


class Crowd:
    """The handler, and what came of the calls. A name is what to do, a space, and a number of its own."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()
        self._kept: list[Any] = []

    def __call__(self, request: Any, controller: Any) -> Any:
        what = request.name.partition(b" ")[0]
        if what == b"fail":
            raise NotFound(request.name.decode())
        if what == b"say":
            return services.accept(request, controller)
        future: Future[Any] = Future()
        self._kept.append(future)
        del self._kept[:-LOST]
        return future

    def ended(self, name: str, outcome: Any, *, cancelled: bool = False) -> None:
        """Once for each call."""
        what = name.partition(" ")[0]
        if cancelled:
            right = what == "cancel"
        elif isinstance(outcome, BaseException):
            failed = isinstance(outcome, NotFound) and outcome.text == name
            right = (what == "fail" and failed) or (what == "lose" and isinstance(outcome, DeadlineExceeded))
        else:
            right = what == "say" and outcome.result.errmsg == name.encode()
        with self._lock:
            self.ends[what] += 1
            if not right:
                self.wrong.append(f"{name}: {outcome!r}")


def plan(count: int, seed: int) -> list[str]:
    """Of ten calls one is cancelled, one runs out of time, one fails."""
    kinds = ["cancel", "lose", "fail", *["say"] * 7]
    mixed = [f"{kinds[i % 10]} {seed}.{i}" for i in range(count)]
    random.Random(seed).shuffle(mixed)
    return mixed


def timeout_of(name: str) -> float:
    return SOON if name.startswith("lose") else LONG


def block(crowd: Crowd, users: Any, names: list[str]) -> None:
    """A blocking call can't be cancelled: those that would be are made as futures, and cancelled."""
    for name in names:
        if name.startswith("cancel"):
            fly(crowd, users, [name])
            continue
        try:
            outcome = users.Login(named(name), timeout=timeout_of(name))
        except BaseException as error:
            outcome = error
        crowd.ended(name, outcome)


def fly(crowd: Crowd, users: Any, names: list[str]) -> None:
    done = threading.Semaphore(0)

    def end(name: str, future: Any) -> None:
        if future.cancelled():
            crowd.ended(name, CancelledError(), cancelled=True)
        else:
            crowd.ended(name, future.exception() or future.result())
        done.release()

    for start in range(0, len(names), 200):
        some = names[start : start + 200]
        flying = []
        for name in some:
            future = users.Login.future(named(name), timeout=timeout_of(name))
            future.add_done_callback(lambda future, name=name: end(name, future))
            flying.append(future)
        for name, future in zip(some, flying, strict=True):
            if name.startswith("cancel"):
                future.cancel()
        for _ in some:
            assert done.acquire(timeout=wire.PATIENCE)


async def go(crowd: Crowd, users: Any, names: list[str]) -> None:
    async def call(name: str) -> None:
        try:
            outcome = await users.Login(named(name), timeout=timeout_of(name))
        except asyncio.CancelledError as error:
            crowd.ended(name, error, cancelled=True)
        except BaseException as error:
            crowd.ended(name, error)
        else:
            crowd.ended(name, outcome)

    await users.Login(named("say connect"), timeout=LONG)  # else a short deadline may find no connection
    for start in range(0, len(names), 200):
        some = names[start : start + 200]
        tasks = [asyncio.ensure_future(call(name)) for name in some]
        await asyncio.sleep(0)
        for name, task in zip(some, tasks, strict=True):
            if name.startswith("cancel"):
                task.cancel()
        await asyncio.wait(tasks)


def run_crowd(calls: int, *, threads: int, flyers: int, loops: int) -> None:
    crowd = Crowd()
    parts = threads + flyers + loops
    names = [plan(calls // parts, seed) for seed in range(parts)]
    with services.serving(crowd, loops=2) as provider:
        with MprpcChannel(provider.address) as channel, ThreadPoolExecutor(parts) as pool:
            channel.wait_ready(wire.PATIENCE)  # else a short deadline may find no connection
            users = services.user_mprpc.UserServiceRpc_Stub(channel)
            shared = AsyncMprpcChannel(provider.address)
            tasks = services.user_mprpc.UserServiceRpc_AsyncStub(shared)
            running = [pool.submit(block, crowd, users, each) for each in names[:threads]]
            running += [pool.submit(fly, crowd, users, each) for each in names[threads : threads + flyers]]
            running += [pool.submit(asyncio.run, go(crowd, tasks, each)) for each in names[threads + flyers :]]
            for each in running:
                each.result(LONG)
            reader = subject.reader()
            assert not reader._pending
            assert not reader._queued
            assert reader._bytes == 0
            for hub in shared._hubs.values():
                assert (len(hub._pending), hub._flying, hub._bytes) == (0, 0, 0)
            asyncio.run(shared.close())
    assert crowd.wrong == []
    expected = Counter(name.partition(" ")[0] for each in names for name in each)
    assert crowd.ends == expected
    end = time.monotonic() + wire.PATIENCE
    while [each.name for each in threading.enumerate() if each.name.startswith("mprpc")]:
        assert time.monotonic() < end
        threading.Event().wait(0.01)


@pytest.mark.parametrize("calls", [20_000, pytest.param(1_000_000, marks=pytest.mark.long)], ids=["short", "long"])
def test_threads_futures_and_tasks_on_one_channel_each(calls: int) -> None:
    run_crowd(calls, threads=16, flyers=2, loops=2)


def test_four_event_loops_and_sixteen_threads() -> None:
    """On channels to the same provider, each event loop and each thread with one of its own."""
    crowd = Crowd()
    with services.serving(crowd, loops=2) as provider:

        def thread(seed: int) -> None:
            with services.calling(provider) as users:
                block(crowd, users, [name for name in plan(200, seed) if name[:4] in ("say ", "fail")])

        async def loop(seed: int) -> None:
            async with AsyncMprpcChannel(provider.address) as channel:
                await go(crowd, services.user_mprpc.UserServiceRpc_AsyncStub(channel), plan(1000, seed))

        with ThreadPoolExecutor(20) as pool:
            running = [pool.submit(thread, seed) for seed in range(16)]
            running += [pool.submit(asyncio.run, loop(seed)) for seed in range(16, 20)]
            for each in running:
                each.result(LONG)
    assert crowd.wrong == []
    assert sum(crowd.ends.values()) == 16 * 160 + 4 * 1000
