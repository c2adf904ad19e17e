"""Half an hour of calls of all sizes with a fault every half minute: what grows, leaks.

Every half minute a fault strikes one of three providers (its network, as in `proxy.py`; all its connections; its
process, killed and started again) and is over after ten seconds. Then the calls stop for a moment: none may be
unended, and memory, objects, descriptors and threads of the caller and of the two providers that live on are counted.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
from collections.abc import Callable

from mprpc import MprpcConfig
from mprpc import futures as mprpc_futures
from mprpc.testing import FakeRegistry
from reliability.fleet import SERVICE, Fleet, Process
from reliability.load import Load, Yardstick
from reliability.proxy import DIRECTIONS, FAULTS, PAST
from reliability.report import Report, look, return_memory

RATE = 300.0
TIMEOUT = 2.0
SIZES = (0, 8, 64, 1000, 1000, 9000, 60_000, 300_000)  # bytes, both ways
EVERY, LASTS = 30.0, 10.0  # seconds from fault to fault, and of one
SETTLED = 1 / 3  # of the samples come before anything is compared: caches, pools and high-water marks fill up
GROWTH = 2048  # kB
MORE_OBJECTS, MORE_DESCRIPTORS, MORE_THREADS = 500, 3, 3


def soak(*, seed: int, count: int, minutes: float) -> int:
    """Ends after `minutes`; `count` bounds the faults."""
    report = Report("soak", seed)
    with Yardstick() as yardstick:
        run(report, seed=seed, faults=count, seconds=minutes * 60)
    yardstick.tell(report)
    return report.finish()


def run(report: Report, *, seed: int, faults: int, seconds: float, every: float = EVERY, lasts: float = LASTS) -> None:
    return_memory()
    dice = random.Random(seed)
    samples: dict[str, list[dict[str, int]]] = {}
    end = time.monotonic() + seconds
    with Fleet() as fleet:
        providers = [_provider(fleet, f"laggard-{number}") for number in range(3)]
        addresses = [provider.told["serving"] for provider in providers]
        network = fleet.start("network", "reliability.network", json.dumps({"provider": addresses[0], "seed": seed}))
        fleet.wait(lambda: "address" in network.told, "the proxy")
        registry = FakeRegistry({SERVICE: [network.told["address"], *addresses[1:]]})
        config = MprpcConfig(attempt_timeout=0.5, balancer="round_robin")
        with registry.channel(config) as channel:
            with Load(channel, rate=RATE, timeout=TIMEOUT, seed=seed, sizes=SIZES, keep=False) as load:
                calls, struck = 0, 0
                while time.monotonic() < end and struck < faults:
                    struck += 1
                    heal = _strike(fleet, dice, network, providers)
                    for part in (lasts, every - lasts):
                        phase = load.phase(part)
                        calls += phase.calls
                        for text in phase.wrong[:5]:
                            report.breach(text)
                        if phase.past > PAST:
                            report.breach(f"a call ended {phase.past:.3f} s past its deadline: {phase.latest}")
                        heal()
                    with load.still() as unended:
                        _count(report, samples, providers, unended)
        report.row("calls", f"{calls:,}, up to {max(SIZES):,} bytes, {struck} faults")
        for name, taken in samples.items():
            _compare(report, name, taken)
        if logs := fleet.logs():
            report.breach(f"a process said on standard error: {logs}")


def _provider(fleet: Fleet, name: str, port: int = 0) -> Process:
    orders = {"config": {"rpcserverport": port}, "calls": Load.NUMBERS, "reset_every": 0}
    provider = fleet.start(name, "reliability.laggard", json.dumps(orders))
    fleet.wait(lambda: "serving" in provider.told, "a provider")
    return provider


def _strike(fleet: Fleet, dice: random.Random, network: Process, providers: list[Process]) -> Callable[[], None]:
    """What ends the fault."""
    kind = dice.choice((*FAULTS, "connections", "death"))
    if kind == "connections":
        providers[1].ask("reset")
        return lambda: None
    if kind == "death":
        port = int(providers[2].told["serving"].rpartition(":")[2])
        providers[2].close()
        dead = providers[2]

        def restart() -> None:
            if providers[2] is dead:
                providers[2] = _provider(fleet, dead.name, port)

        return restart
    network.order(f"set {kind} {dice.choice(list(DIRECTIONS.values()))}")
    return lambda: network.order("set none 0 0")


def _count(report: Report, samples: dict[str, list[dict[str, int]]], providers: list[Process], unended: int) -> None:
    reader = mprpc_futures.reader()
    left = unended + len(reader._pending) + len(reader._queued)
    if left:
        report.breach(f"{left} calls are left where there should be none")
    gc.collect()
    for name, taken in [("the caller", look()), *((each.name, each.ask("look")) for each in providers[:2])]:
        samples.setdefault(name, []).append(taken)
    caller = samples["the caller"][-1]
    report.progress(", ".join(f"{value:,} {name}" for name, value in caller.items()))


def _compare(report: Report, name: str, taken: list[dict[str, int]]) -> None:
    """What there was when all had settled, beside the end: the median of a few, as one is chance."""
    settled = taken[int(len(taken) * SETTLED) :]
    few = max(1, len(settled) // 5)
    row = []
    for what, most in (
        ("kilobytes", GROWTH), ("objects", MORE_OBJECTS), ("descriptors", MORE_DESCRIPTORS), ("threads", MORE_THREADS),
    ):  # fmt: skip
        first = statistics.median(each[what] for each in settled[:few])
        last = statistics.median(each[what] for each in settled[-few:])
        row.append(f"{what} {first:,.0f} to {last:,.0f}")
        if last - first > most:
            report.breach(f"{name} has {last - first:,.0f} more {what} than when it had settled")
    report.row(name, ", ".join(row))
