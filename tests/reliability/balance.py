"""What choosing endpoints is worth: ten providers of which one is slow, silent or gone, or most are; what a pick costs.

The providers are processes, the lists are told to the channels directly: what is shown is what a channel finds out by
itself, before a registry could tell it.

- One of ten is twenty times slower: the 99th percentile of all calls stays under twice that of ten healthy ones, and
  round robin is beside it.
- One of ten stands still (SIGSTOP) under eight consumers, each with a channel of its own that calls one after the
  other: each loses one call at most, none lasts past its deadline, and it is used again when it goes on.
- Six of ten are killed: no call fails. They are stopped instead: each consumer loses one call to each at the most.
- A pick among 1,000 takes under 2 µs.
"""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import generated
from mprpc import DeadlineExceeded, MprpcChannel, MprpcConfig, RpcError
from mprpc.balancer import STRATEGIES, Balancer, Candidate, strategy
from mprpc.layout import Endpoint
from mprpc.pool import Load
from mprpc.subchannel import Subchannel
from mprpc.testing import FakeRegistry
from reliability.fleet import PATIENCE
from reliability.report import Report
from reliability.retries import FAST, SLOW, Troubled
from reliability.retries import Load as Calls

ledger_pb2 = generated.module("ledger_pb2")
ledger_mprpc = generated.module("ledger_mprpc")

SERVICE = "mprpc.test.LedgerRpc"
RATE = 200.0  # calls a second at the slow one of ten
CONSUMERS = 8
TIMEOUT = 1.0  # of the calls of consumers that call one after the other
GRACE = 0.3  # seconds that a call may take to come back past its deadline, on a machine that is busy
PICK = 2e-6
TIMES = 2.0  # the 99th percentile with a slow one, times that without


@contextlib.contextmanager
def providers(*groups: list[float]) -> Iterator[tuple[list[str], list[Troubled]]]:
    """The addresses of all, and a process for each group; a provider for each number in it, the ms that it takes."""
    with contextlib.ExitStack() as stack:
        processes = []
        for group in groups:
            processes.append(Troubled("", [0] * len(group), group))
            stack.callback(processes[-1].kill)
        yield [address for each in processes for address in each.addresses], processes


def tail(report: Report, balancer: str, slowest: float, seconds: float) -> float:
    """The 99th percentile in ms."""
    with providers([FAST] * 9 + [slowest]) as (addresses, _):
        config = MprpcConfig(balancer=balancer)
        with FakeRegistry({SERVICE: addresses}).channel(config) as channel:
            load = Calls(ledger_mprpc.LedgerRpc_Stub(channel).Look, RATE, report.seed)
            threading.Event().wait(2.0)
            load.latencies.clear()
            threading.Event().wait(seconds)
            load.stop()
            slow = [each for each in channel.endpoints() if each.address == addresses[-1]]
    if load.failed:
        report.breach(f"{balancer}: {load.failed} calls failed")
    late = sorted(load.latencies)
    shown = late[len(late) * 99 // 100] * 1000
    calls = f"{slow[0].calls} of {load.offered} calls at the tenth"
    report.row(f"{balancer}, nine take {FAST:g} ms, one {slowest:g}: p99", f"{shown:.1f} ms, {calls}")
    return shown


class Consumer:
    """One that calls one after the other."""

    def __init__(self, addresses: list[str]) -> None:
        self.calls, self.failed, self.late, self.longest = 0, 0, 0, 0.0
        self.channel: MprpcChannel = FakeRegistry({SERVICE: addresses}).channel(MprpcConfig(slow_start=1.0))
        self._look = ledger_mprpc.LedgerRpc_Stub(self.channel).Look
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            self.calls += 1
            try:
                self._look(ledger_pb2.Entry(number=self.calls), timeout=TIMEOUT)
            except DeadlineExceeded:
                self.late += 1
            except RpcError:
                self.failed += 1
            self.longest = max(self.longest, time.monotonic() - began)

    def states(self) -> dict[str, Any]:
        return {each.address: each for each in self.channel.endpoints()}

    def stop(self) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        self.channel.close()


@contextlib.contextmanager
def consumers(addresses: list[str]) -> Iterator[list[Consumer]]:
    made = [Consumer(addresses) for _ in range(CONSUMERS)]
    try:
        _soon(lambda: all(each.calls for c in made for each in c.states().values()))
        yield made
    finally:
        for each in made:
            each.stop()


def _soon(true: Any) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.02)
    return True


def silent(report: Report, bad: int, seconds: float) -> None:
    """So many of ten stand still for a while."""
    name = f"{bad} of ten silent for {seconds:g} s"
    report.progress(name)
    with providers([FAST] * (10 - bad), [FAST] * bad) as (addresses, (_, stopped)), consumers(addresses) as callers:
        stopped.process.send_signal(signal.SIGSTOP)
        threading.Event().wait(seconds)
        lost = [each.late for each in callers]
        before = sum(each.calls for each in callers)
        stopped.process.send_signal(signal.SIGCONT)
        began = time.monotonic()
        well = _soon(lambda: all(s.state not in ("resting", "probing") for c in callers for s in c.states().values()))
        back = time.monotonic() - began
    report.row(f"{name}: calls", f"{before}, of each of {CONSUMERS} consumers {min(lost)} to {max(lost)} lost")
    report.row(f"{name}: in use again after", f"{back:.1f} s")
    _judge(report, name, callers)
    if max(lost) > bad:
        report.breach(f"{name}: a consumer lost {max(lost)} calls")
    if not well:
        report.breach(f"{name}: not in use again after {PATIENCE} s")


def gone(report: Report, bad: int, seconds: float) -> None:
    """So many of ten are killed."""
    name = f"{bad} of ten killed, {seconds:g} s"
    report.progress(name)
    with providers([FAST] * (10 - bad), [FAST] * bad) as (addresses, (_, killed)), consumers(addresses) as callers:
        killed.kill()
        threading.Event().wait(0.5)  # the calls that are in flight there fail; they may have run
        in_flight, before = sum(each.failed for each in callers), sum(each.calls for each in callers)
        threading.Event().wait(seconds)
        failed, calls = sum(each.failed for each in callers) - in_flight, sum(each.calls for each in callers) - before
        shares = [each.share for each in callers[0].states().values()]
    report.row(f"{name}: calls after", f"{calls}, {failed} failed; {in_flight} that were in flight")
    _judge(report, name, callers)
    if failed or in_flight > CONSUMERS:
        report.breach(f"{name}: {failed} calls failed, {in_flight} in flight")
    if bad > 5 and not all(shares):
        report.breach(f"{name}: not all are used again: {shares}")


def _judge(report: Report, name: str, callers: list[Consumer]) -> None:
    longest = max(each.longest for each in callers)
    if longest > TIMEOUT + GRACE:
        report.breach(f"{name}: a call took {longest:.2f} s")


def picks(report: Report, size: int = 1000) -> None:
    """What a pick costs, in CPU time of one thread, the best of many rounds."""
    config, candidates = MprpcConfig(), []
    for i in range(size):
        subchannel = Subchannel(f"10.0.{i // 250}.{i % 250}:8000", False, config)
        candidates.append(Candidate(Endpoint(subchannel.address), Load(subchannel), subchannel.health, subchannel))
    balancer = Balancer()
    began = time.thread_time()
    balancer.update(candidates, 0.0)
    report.row(f"a list of {size} taken over", f"{(time.thread_time() - began) * 1e3:.2f} ms")
    keys = [b"user %d" % i for i in range(1000)]
    for name in STRATEGIES:
        pick, best = strategy(name, random.random, time.monotonic_ns).pick, 1.0
        began = time.thread_time()
        pick(balancer.candidates, b"")
        first = time.thread_time() - began
        for _ in range(50):
            began = time.thread_time()
            for key in keys:
                pick(balancer.candidates, key)
            best = min(best, (time.thread_time() - began) / len(keys))
        report.row(f"{name}: a pick among {size}", f"{best * 1e6:.2f} µs; the first {first * 1e3:.1f} ms")
        if best > PICK:
            report.breach(f"{name}: a pick takes {best * 1e6:.2f} µs")


def balance(seed: int, count: int, minutes: float) -> int:
    """`count`: seconds of each part."""
    report = Report("ten providers of which one or most are slow, silent or gone", seed)
    report.progress("picks")
    picks(report)
    report.progress("one of ten slow")
    healthy = tail(report, "p2c", FAST, count)
    slow = tail(report, "p2c", SLOW, count)
    tail(report, "round_robin", SLOW, count)
    if slow > healthy * TIMES:
        report.breach(f"p2c: the 99th percentile is {slow / healthy:.1f} times that of ten healthy ones")
    for bad in (1, 6):
        silent(report, bad, count)
        gone(report, bad, count)
    return report.finish()
