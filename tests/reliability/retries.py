"""What retries and hedges cost the providers, and what they are worth.

First a steady load, offered whatever comes of it, on three providers that break down together for a while: their
process is killed and comes back at the same addresses, or it stands still (SIGSTOP), or every handler raises
UNAVAILABLE. For each call that is offered they must get at most 1.2 times the requests in the first seconds after it
that they got before, and while they fail no more than the budget allows. A provider that stood still then serves what
its sockets have kept, whether or not anybody waits: there the same outage without retries is what it is compared with.

Then ten providers of which one is twenty times slower, and ten that are so with one call of fifty: the same calls
without hedges and with them, at the same time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import generated
from mprpc import MprpcChannel, MprpcConfig
from mprpc.testing import EmbeddedZooKeeper
from reliability.fleet import PATIENCE
from reliability.report import Report
from zookeeper_server import free_ports

RATE = 400.0  # calls offered a second
TIMEOUT = 1.0
WINDOW = 5.0  # seconds that are looked at before and after an outage
LOAD = 1.2  # what providers get then, times what they got before
SAVED = 100.0  # retries that the budget has saved up by then: ten seconds of its rate
SLOW, FAST = 40.0, 2.0  # ms that a provider takes
HEDGES = 0.05  # the key hedge_share's default
HEDGE_DELAYS = ("off", "p95", 0.01)

ledger_pb2 = generated.module("ledger_pb2")
ledger_mprpc = generated.module("ledger_mprpc")


class Troubled:
    """The process of the providers; see `troubled.py`."""

    def __init__(self, zookeeper: str, ports: list[int], hold_ms: list[float], hiccups: float = 0.0) -> None:
        config: dict[str, Any] = {"zookeeperip": zookeeper, "session_timeout": 4.0} if zookeeper else {}
        orders = {"config": config, "ports": ports, "hold_ms": hold_ms, "hiccups": hiccups, "hiccup_ms": SLOW}
        self._orders = json.dumps(orders)
        self.start()

    def start(self) -> None:
        paths = [str(generated.ROOT), str(generated.directory()), str(generated.ROOT / "tests")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "reliability.troubled", self._orders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self.addresses: list[str] = self._read("serving")

    def ask(self, command: str) -> int:
        """How many requests its handlers have had."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        counts: list[int] = self._read(command)
        return sum(counts)

    def _read(self, what: str) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the providers ended with code {self.process.wait(PATIENCE)}")
        return json.loads(line)[what]

    def kill(self) -> None:
        self.process.kill()
        self._gone()

    def end(self) -> None:
        self.process.terminate()
        self._gone()

    def _gone(self) -> None:
        self.process.communicate(timeout=PATIENCE)


class Load:
    """Calls at a steady rate, each a future, from a thread of its own."""

    def __init__(self, call: Any, rate: float, seed: int) -> None:
        self.offered = self.answered = self.failed = 0
        self.latencies: list[float] = []
        self._call, self._rate = call, rate
        self._dice = random.Random(seed)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            self.offered += 1
            began = time.monotonic()
            future = self._call.future(ledger_pb2.Entry(number=self.offered), timeout=TIMEOUT)
            future.add_done_callback(lambda future, began=began: self._end(future, began))
            due += self._dice.expovariate(self._rate)

    def _end(self, future: Any, began: float) -> None:
        with self._lock:
            if future.exception() is None:
                self.answered += 1
                self.latencies.append(time.monotonic() - began)
            else:
                self.failed += 1

    def stop(self) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while self.answered + self.failed < self.offered and time.monotonic() < deadline:
            threading.Event().wait(0.01)


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def _killed(providers: Troubled, seconds: float) -> tuple[int, int | None]:
    """What they had had when it ended, and what they got during it, where that can be known."""
    providers.kill()
    _pause(seconds)
    providers.start()
    return 0, None


def _silent(providers: Troubled, seconds: float) -> tuple[int, int | None]:
    before = providers.ask("count")
    providers.process.send_signal(signal.SIGSTOP)
    _pause(seconds)
    providers.process.send_signal(signal.SIGCONT)
    return before, None


def _failing(providers: Troubled, seconds: float) -> tuple[int, int | None]:
    before = providers.ask("fail")
    _pause(seconds)
    after = providers.ask("heal")
    return after, after - before


OUTAGES: dict[str, Callable[[Troubled, float], tuple[int, int | None]]] = {
    "killed": _killed,
    "silent": _silent,
    "failing": _failing,
}


def outage(report: Report, kind: str, seconds: float, window: float = WINDOW, **keys: Any) -> float:
    """One outage; keys: the consumer's configuration. How many times as many requests there are for a call after it."""
    with EmbeddedZooKeeper() as zookeeper:
        providers = Troubled(zookeeper.address, free_ports(3), [0.0] * 3)
        host, _, port = zookeeper.address.rpartition(":")
        config = MprpcConfig(zookeeperip=host, zookeeperport=int(port), session_timeout=4.0, **keys)
        with MprpcChannel(config) as channel:
            stub = ledger_mprpc.LedgerRpc_Stub(channel)
            channel.wait_ready(PATIENCE)
            load = Load(stub.Look, RATE, report.seed)
            try:
                _pause(1.0)
                before = _requests_for_a_call(providers, load, window)
                offered = load.offered
                got, meanwhile = OUTAGES[kind](providers, seconds)
                hit, offered = load.offered - offered, load.offered
                _pause(window)
                after = (providers.ask("count") - got) / (load.offered - offered)
            finally:
                load.stop()
                providers.end()
    report.row(
        f"{kind}{keys or ''}: requests for each call", f"{before:.2f} before, {after:.2f} in the {window:.0f} s after"
    )
    report.row(f"{kind}{keys or ''}: calls", f"{load.offered}, {load.failed} failed")
    if meanwhile is not None:
        report.row(f"{kind}{keys or ''}: requests for each call meanwhile", f"{meanwhile / hit:.2f}")
        most = hit * (1 + config.retry_share) + seconds * config.retry_rate + SAVED
        if meanwhile > most:
            report.breach(f"{kind}: {meanwhile} requests during the outage, the budget allows {most:.0f}")
    return after / before


def _requests_for_a_call(providers: Troubled, load: Load, window: float) -> float:
    got, offered = providers.ask("count"), load.offered
    _pause(window)
    return (providers.ask("count") - got) / (load.offered - offered)


def hedged(report: Report, seconds: float, name: str, hold_ms: list[float], hiccups: float) -> None:
    """The same calls without hedges and with them, at the same time, so that both meet the same machine."""
    with EmbeddedZooKeeper() as zookeeper:
        providers = Troubled(zookeeper.address, free_ports(10), hold_ms, hiccups)
        host, _, port = zookeeper.address.rpartition(":")
        config = MprpcConfig(zookeeperip=host, zookeeperport=int(port))
        with MprpcChannel(config) as channel:
            look = ledger_mprpc.LedgerRpc_Stub(channel).Look
            channel.wait_ready(PATIENCE)
            calls = {delay: look.with_options(hedge_delay=delay) for delay in HEDGE_DELAYS}
            loads = {delay: Load(call, RATE / 4, report.seed) for delay, call in calls.items()}
            try:
                _pause(2.0)
                for load in loads.values():
                    load.latencies.clear()
                _pause(seconds)
            finally:
                for load in loads.values():
                    load.stop()
                requests = providers.ask("count")
                providers.end()
    for delay, load in loads.items():
        hedges = calls[delay]._hedging.taken if calls[delay]._hedging is not None else 0
        late = sorted(load.latencies)
        said = ", ".join(f"p{p} {late[len(late) * p // 100] * 1000:.1f} ms" for p in (50, 95, 99))
        report.row(f"{name} slow, hedge_delay={delay}", f"{said}; {hedges} of {load.offered} calls hedged")
        if hedges > load.offered * HEDGES:
            report.breach(f"{name}, hedge_delay={delay}: {hedges} of {load.offered} calls were hedged")
        if load.failed:
            report.breach(f"{name}, hedge_delay={delay}: {load.failed} calls failed")
        requests -= load.offered + hedges
    if requests > 0:
        report.breach(f"{name}: {requests} requests more than calls and hedges")


def retries(seed: int, count: int, minutes: float) -> int:
    """Outages of `count` seconds, then the slow providers for as long."""
    report = Report(f"outages of {count} s with retries, and hedges past slow providers", seed)
    for kind in OUTAGES:
        report.progress(f"an outage: {kind}")
        after = outage(report, kind, count)
        bare = outage(report, kind, count, retries=0) if kind == "silent" else 1.0
        without = f", without retries {bare:.2f}" if kind == "silent" else ""
        report.row(f"{kind}: the load after it", f"{after:.2f} times{without}")
        if after > LOAD * max(bare, 1.0):
            report.breach(f"{kind}: {after:.2f} times the load after the outage")
    for name, hold_ms, hiccups in (("one of ten", [FAST] * 9 + [SLOW], 0.0), ("2 % of calls", [FAST] * 10, 0.02)):
        report.progress(f"{name} slow")
        hedged(report, count, name, hold_ms, hiccups)
    return report.finish()
