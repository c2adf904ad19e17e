"""What a herd costs ZooKeeper: hundreds of consumers lose the leader at once, and read their lists again.

Each consumer and each provider has a session of its own. Reads are counted where the registry asks for them, from just
before the leader's end until everybody is sure again and nothing more is asked for.
"""

from __future__ import annotations

import json
import time
from typing import Any

from reliability.fleet import PATIENCE, Fleet, Process
from reliability.report import Report
from zookeeper_server import RealEnsemble

MAX_READS = 3  # for each consumer and service
PROVIDERS = 200
PROCESSES = 5  # with 300 consumers and 200 providers, a hundred sessions each
FIRST_PORT = 20000
QUIET = 5.0  # seconds without another read, after which there will be none
LOOK = 0.25


class Crowd:
    """The processes, looked at together."""

    def __init__(self, fleet: Fleet, consumers: int, providers: int) -> None:
        self._fleet = fleet
        share = max(1, PROCESSES * providers // (consumers + providers))
        rest = max(1, PROCESSES - share)
        ports = list(range(FIRST_PORT, FIRST_PORT + providers))
        self.processes = [self._process(f"providers-{i}", 0, ports[i::share]) for i in range(share)]
        self.wait(lambda looks: sum(look["registered"] for look in looks) == providers, "all to be registered")
        self.processes += [self._process(f"consumers-{i}", len(range(i, consumers, rest)), []) for i in range(rest)]

    def _process(self, name: str, consumers: int, ports: list[int]) -> Process:
        orders = {"config": self._fleet.config, "consumers": consumers, "ports": ports}
        return self._fleet.start(name, "reliability.crowd", json.dumps(orders))

    def look(self) -> list[dict[str, Any]]:
        return [process.ask("look") for process in self.processes]

    def wait(self, condition: Any, what: str) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 2 * PATIENCE
        while not condition(looks := self.look()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {2 * PATIENCE:g} s for {what}: {looks}")
            self._fleet.pause(LOOK)
        return looks


def sure_of(looks: list[dict[str, Any]]) -> list[int]:
    return [size for look in looks for size in look["sure"]]


def herd(seed: int, count: int, minutes: float, providers: int = PROVIDERS) -> int:
    """`count` consumers."""
    report = Report(f"leader killed under {count} consumers and {providers} providers", seed)
    with RealEnsemble() as ensemble, Fleet(zookeeperip=ensemble.hosts) as fleet:
        crowd = Crowd(fleet, count, providers)
        everybody = [providers] * count

        def well(looks: list[dict[str, Any]]) -> bool:
            return sure_of(looks) == everybody and sum(look["registered"] for look in looks) == providers

        crowd.wait(well, "everybody to know everybody")
        report.progress("everybody knows everybody")
        fleet.pause(QUIET)
        for process in crowd.processes:
            process.ask("reset")
        began = time.monotonic()
        ensemble.leader().stop()
        fleet.pause(1.0)  # for the connections' end to be seen
        crowd.wait(well, "everybody to be sure again")
        took = time.monotonic() - began
        report.progress("everybody is sure again")
        fleet.pause(QUIET)
        reads = sorted(count for look in crowd.look() for count in look["reads"])
        report.row("reads of a consumer and service", f"mean {sum(reads) / len(reads):.2f}, most {reads[-1]}")
        report.row("reads in all", sum(reads))
        report.row("everybody sure of its list again after", f"{took:.1f} s")
        for number in reads:
            if number > MAX_READS:
                report.breach(f"a consumer read {number} times")
        for process in crowd.processes:
            process.order("end")
        for process in crowd.processes:
            process.wait()
    return report.finish()
