"""Three providers, one of them behind a proxy that does to its connections what networks do, under a steady load.

Each fault strikes one direction, then the other, then both, a provider that is in use again. No call may hang past its
deadline or get a wrong answer; of the idempotent ones 99.9 % must succeed, by the other providers if need be; what must
not run twice has not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mprpc import MprpcConfig
from mprpc.testing import FakeRegistry
from reliability.fleet import SERVICE, Fleet, Process
from reliability.load import Load, Phase, Yardstick
from reliability.report import Report

RATE = 500.0  # calls a second
TIMEOUT = 2.0  # seconds of a call
ATTEMPT = 0.3  # of an idempotent one's attempt
SUCCESS = 0.999
PAST = 0.5  # seconds past its deadline at which a call hangs
BACK = 60.0  # seconds until the provider is in use again: longer than its longest rest
FAULTS = ("latency", "jitter", "black hole", "reset", "slicing", "bandwidth", "half-close")
DIRECTIONS = {"to the provider": "1 0", "to the consumer": "0 1", "both ways": "1 1"}


def proxy(*, seed: int, count: int, minutes: float) -> int:
    """Each fault for `count` seconds in each direction; ends early after `minutes`."""
    report = Report("a proxy of faults", seed)
    with Yardstick() as yardstick:
        run(report, seed=seed, seconds=float(count), over=lambda: report.seconds > minutes * 60)
    yardstick.tell(report)
    return report.finish()


def run(
    report: Report,
    *,
    seed: int,
    seconds: float,
    faults: Sequence[str] = FAULTS,
    directions: Sequence[str] = tuple(DIRECTIONS),
    over: Callable[[], bool] = lambda: False,
    fresh: bool = False,
) -> None:
    """`fresh`: each fault meets a channel of its own, which need not wait for the end of an endpoint's rest."""
    with Fleet() as fleet:
        providers = [_provider(fleet, number) for number in range(3)]
        addresses = [provider.told["serving"] for provider in providers]
        orders = {"provider": addresses[0], "seed": seed}
        network = fleet.start("network", "reliability.network", json.dumps(orders))
        fleet.wait(lambda: "address" in network.told, "the proxy")
        registry = FakeRegistry({SERVICE: [network.told["address"], *addresses[1:]]})
        # In turn: by default the balancer would soon leave alone what is slow, and meet few faults.
        config = MprpcConfig(attempt_timeout=ATTEMPT, call_timeout=TIMEOUT, balancer="round_robin")
        loads: list[Load] = []

        @contextmanager
        def calling() -> Iterator[tuple[Any, Load]]:
            first = loads[-1].number if loads else 0
            with registry.channel(config) as channel:
                with Load(channel, rate=RATE, timeout=TIMEOUT, seed=seed, first=first) as load:
                    loads.append(load)
                    yield channel, load
                    if last := load.end().unended:
                        report.breach(f"{last} calls never ended")

        strikes = [(fault, direction) for fault in faults for direction in directions]
        for some in [[strike] for strike in strikes] if fresh else [strikes]:
            with calling() as (channel, load):
                judge(report, "none", load.phase(0.2 if fresh else seconds), providers[0].pid)
                for fault, direction in some:
                    if over():
                        break
                    back = _wait_until_used(report, load, channel, network.told["address"])
                    network.order(f"set {fault} {DIRECTIONS[direction]}")
                    phase = load.phase(seconds)
                    network.order("set none 0 0")
                    judge(report, f"{fault} {direction}", phase, providers[0].pid, back)
        report.row("connections through the proxy", network.ask("count"))
        _judge_runs(report, fleet, providers, loads)
        if logs := fleet.logs():
            report.breach(f"a process said on standard error: {logs}")


def _provider(fleet: Fleet, number: int) -> Process:
    orders: dict[str, Any] = {"config": {"rpcserverport": 0}, "calls": Load.NUMBERS, "reset_every": 0}
    provider = fleet.start(f"laggard-{number}", "reliability.laggard", json.dumps(orders))
    fleet.wait(lambda: "serving" in provider.told, "a provider")
    return provider


def _wait_until_used(report: Report, load: Load, channel: Any, address: str) -> float:
    """Seconds until the provider behind the proxy gets its calls again."""
    began = time.monotonic()
    while time.monotonic() - began < BACK:
        (state,) = (each for each in channel.endpoints() if each.address == address)
        if state.state == "connected":
            return time.monotonic() - began
        load.phase(0.1)
    report.breach(f"the provider is not in use again after {BACK:g} s: it is {state.state}, {state.why}")
    return BACK


def judge(report: Report, name: str, phase: Phase, struck: int, back: float = 0.0) -> None:
    """`struck`: the process behind the proxy; `back`: seconds until it was in use, before the fault."""
    for text in phase.wrong[:5]:
        report.breach(f"{name}: {text}")
    if phase.past > PAST:
        report.breach(f"{name}: a call ended {phase.past:.3f} s past its deadline: {phase.latest}")
    share = phase.success(True)
    if share < SUCCESS:
        reasons = ", ".join(f"{text} ({count})" for text, count in phase.reasons.most_common(3))
        report.breach(f"{name}: {share:.2%} of the idempotent calls succeeded: {reasons}")
    report.row(
        name,
        f"{phase.calls:,} calls, {phase.processes[struck]:,} through; idempotent {share:.2%}, others "
        f"{phase.success(False):.2%}; 99 % in {phase.late(0.99) * 1000:.0f} ms, past a deadline {phase.past * 1000:.0f}"
        f" ms; in use again after {back:.1f} s",
    )
    report.progress(name)


def _judge_runs(report: Report, fleet: Fleet, providers: list[Process], loads: list[Load]) -> None:
    """What must not run twice has not, and what was said not to have run has not, at whichever provider."""
    counts = []
    for number, provider in enumerate(providers):
        path = fleet.directory / f"ran-{number}"
        provider.order(f"ran {path}")
        fleet.wait(lambda provider=provider: "ran" in provider.told, "a provider's counts")  # type: ignore[misc]
        counts.append(path.read_bytes())
    twice = [number for load in loads for number in load.once if sum(ran[number] for ran in counts) > 1]
    for number in twice[:5]:
        report.breach(f"call {number}, which is not idempotent, ran more than once")
    lied = [number for load in loads for number in load.not_run if any(ran[number] for ran in counts)]
    for number in lied[:5]:
        report.breach(f"call {number} was said not to have run, but it did")
    report.row("not idempotent, run more than once", len(twice))
    report.row("said not to have run", f"{sum(len(load.not_run) for load in loads)}, of which {len(lied)} did")
