"""Figures as a table, ratios with their targets, and the history that shows when one got worse.

A ratio is the median of the rounds' own ratios. What a call costs is better low, what a second brings is better high.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

TOLERANCE = 0.10  # what a ratio may get worse before it is flagged
BASIS = 5  # latest runs whose median is compared with

TITLES = {
    "raw_c": "raw C echo",
    "raw_python": "raw Python echo",
    "epoll_pb": "Python epoll + protobuf",
    "mprpc": "mprpc",
    "thriftpy2": "thriftpy2",
    "grpcio": "grpcio",
    "grpcio_aio": "grpcio aio",
}
UNITS = {
    "p50": "p50 µs",
    "p99": "p99 µs",
    "calls": "calls/s",
    "cpu": "server CPU µs/call",
    "rate": "MB/s",
    "bytes": "bytes/connection",
    "resting_cpu": "CPU µs in a second",
    "server_copies": "server's copies",
    "client_copies": "client's copies",
    "first_alone": "first call ms",
    "first_alone_cpu": "its CPU ms",
    "first_kazoo": "with kazoo imported ms",
    "first_kazoo_cpu": "its CPU ms",
}


class Target(NamedTuple):
    """`system`'s metric against `other`'s in the same mode: a ratio, or (`other` is empty) the value itself."""

    mode: str
    metric: str
    system: str
    other: str
    at_most: float | None = None
    at_least: float | None = None
    difference: bool = False

    @property
    def name(self) -> str:
        sign = "-" if self.difference else "/"
        return f"{self.mode} {self.metric} {self.system}" + (f" {sign} {self.other}" if self.other else "")

    @property
    def low_is_good(self) -> bool:
        return self.at_least is None

    def reached(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def of(self, figures: Mapping[str, Any]) -> list[float]:
        """One value for each round; none where it was not measured."""
        mine = figures.get(self.mode, {}).get(self.system, {}).get(self.metric, [])
        if not self.other:
            return list(mine)
        others = figures.get(self.mode, {}).get(self.other, {}).get(self.metric, [])
        return [a - b if self.difference else a / b for a, b in zip(mine, others, strict=False)]


TARGETS = [
    Target("latency_one_core", "p50", "mprpc", "epoll_pb", at_most=0.90),
    Target("latency_one_core", "p50", "mprpc", "thriftpy2", at_most=0.55),
    Target("latency_one_core", "p50", "mprpc", "grpcio", at_most=0.05),
    Target("latency_one_core", "p50", "mprpc", "raw_python"),
    Target("latency_two_cores", "p50", "mprpc", "raw_c", at_most=8.0, difference=True),
    Target("latency_two_cores", "p50", "mprpc", "epoll_pb"),
    Target("capacity", "cpu", "mprpc", "epoll_pb", at_most=0.75),
    Target("capacity", "calls", "mprpc", "epoll_pb", at_least=1.0),
    Target("pipelined", "cpu", "mprpc", "epoll_pb"),
    Target("closed", "cpu", "mprpc", "epoll_pb"),
    Target("loops", "cpu", "mprpc_4", "mprpc_1", at_most=1.5),
    Target("loops", "calls", "mprpc_4", "mprpc_1", at_least=0.8),
    Target("busy_5ms", "calls", "mprpc", "epoll_pb", at_least=3.0),
    Target("busy_200us", "calls", "mprpc", "epoll_pb", at_least=3.0),
    Target("threads", "calls", "mprpc", "grpcio", at_least=8.0),
    Target("slow", "p50", "mprpc_slow", "mprpc", at_most=1.3),
    Target("slow", "p99", "mprpc_slow", "", at_most=5000),
    Target("bulk", "rate", "mprpc", "epoll_pb", at_least=1.2),
    Target("bulk", "server_copies", "mprpc", "", at_most=3.2),
    Target("bulk", "client_copies", "mprpc", "", at_most=3.2),
    Target("idle_2000", "bytes", "mprpc", "", at_most=1024),
    Target("idle_10000", "bytes", "mprpc", "", at_most=1024),
    *(
        Target("scaling", "p50", name, "1", at_most=1.15)
        for name in ("connections_100", "connections_1000", "connections_10000", "methods_1000", "loops_2", "loops_4")
    ),
    Target("scaling", "p50", "providers_1000", "providers_1", at_most=1.15),
    Target("first", "first_kazoo", "mprpc", "", at_most=30),
    Target("first", "first_alone", "mprpc", "", at_most=70),
]


def ratios(figures: Mapping[str, Any]) -> dict[str, float]:
    """The medians of all targets that were measured, by name."""
    return {target.name: median(values) for target in TARGETS if (values := target.of(figures))}


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 20 else f"{value:.2f}"


def spread(values: Iterable[float]) -> str:
    """median (min-max)"""
    values = sorted(values)
    return f"{number(median(values))} ({number(values[0])}-{number(values[-1])})"


def table(figures: Mapping[str, Any]) -> str:
    lines = []
    for mode, systems in figures.items():
        metrics = list(dict.fromkeys(metric for values in systems.values() for metric in values))
        lines += ["", mode, " " * 26 + "".join(f"{UNITS.get(metric, metric):>30}" for metric in metrics)]
        for system, values in systems.items():
            cells = (spread(values[metric]) if values.get(metric) else "" for metric in metrics)
            lines.append(f"  {TITLES.get(system, system):<24}" + "".join(f"{cell:>30}" for cell in cells))
    lines += ["", "ratios, median (min-max) of the rounds' own", ""]
    for target in TARGETS:
        if values := target.of(figures):
            bound = target.at_most if target.low_is_good else target.at_least
            wanted = "" if bound is None else f"  {'at most' if target.low_is_good else 'at least'} {bound:g}"
            verdict = "" if bound is None else "  reached" if target.reached(median(values)) else "  NOT REACHED"
            lines.append(f"  {target.name:<58}{spread(values):>24}{wanted:<16}{verdict}")
    return "\n".join(lines)


def history(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def regressions(figures: Mapping[str, Any], before: list[dict[str, Any]]) -> list[str]:
    """A line for each ratio that is over TOLERANCE worse than the median of the latest runs that have it.

    Three quarters of the rounds must be: on a busy machine the median of a few rounds wanders further than that.
    """
    found = []
    for target in TARGETS:
        values = sorted(target.of(figures), reverse=not target.low_is_good)
        earlier = [run["ratios"][target.name] for run in before if target.name in run["ratios"]][-BASIS:]
        if not values or not earlier:
            continue
        basis, mild = median(earlier), values[len(values) // 4]
        worse = mild - basis if target.low_is_good else basis - mild
        if worse > TOLERANCE * abs(basis):
            found.append(f"{target.name}: {number(median(values))}, was {number(basis)} in the latest runs")
    return found
