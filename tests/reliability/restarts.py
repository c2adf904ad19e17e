"""Restarts and deaths of providers under load: no call fails for a restart; a death fails only what was in flight.

`rolling` ends one of four providers after the other with SIGTERM and starts another, in turn at the same address and at
another one. `kill` does the same with SIGKILL. Both look at every call of all consumers, and at every Book that ran.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence

from reliability.fleet import PATIENCE, Fleet, Member
from reliability.report import Report
from zookeeper_server import RealZooKeeper, free_ports

SESSION = 4.0  # seconds, the session's timeout
GONE = SESSION + 2.0  # seconds until a dead provider is in no list
TRAFFIC = 1.0  # seconds until a new provider answers calls
FIRST_REST = 0.1  # seconds for which an endpoint that could not be reached gets no call
TOLD = 0.6  # seconds by which a consumer's tally lags
DEATHS = (0.3, 1.0, 3.0)  # seconds that a killed provider is missed


class Restarts:
    """Four providers and a steady load; one is taken out and replaced, again and again."""

    def __init__(
        self, report: Report, fleet: Fleet, *, members: int, rate: float, processes: int, timeout: float
    ) -> None:
        self.report = report
        self.fleet = fleet
        self.random = random.Random(report.seed)
        self.listed_after: list[float] = []
        self.traffic_after: list[float] = []
        self.gone_after: list[float] = []
        self.extra_attempts: list[int] = []
        self.attempts: list[int] = []
        self.deaths: list[tuple[float, float, str]] = []
        self.members = [fleet.start_member(port) for port in free_ports(members)]
        for member in self.members:
            fleet.wait(lambda member=member: "registered" in member.told, f"{member.name} to be registered")  # type: ignore[misc]
        for _ in range(processes):
            fleet.start_caller(channels=2, rate=rate / processes, timeout=timeout)
        fleet.wait(lambda: fleet.listed(self.addresses), "the first lists")
        fleet.wait(lambda: len(fleet.first_answer) == members, "calls to all providers")
        self.began, self.calls_before = time.monotonic(), fleet.calls

    @property
    def addresses(self) -> set[str]:
        return {member.address for member in self.members}

    def replace(self, slot: int, *, missed: float | None, same: bool) -> None:
        """Ends a provider, by SIGTERM or, when it is to be missed for some seconds, by SIGKILL, and starts another."""
        fleet, old = self.fleet, self.members[slot]
        fleet.warm_up()
        if missed is None:
            old.signal(signal.SIGTERM)
            code = old.wait()
            if code or "ended" not in old.told:
                self.report.breach(f"{old.name} ended with code {code}")
            died = 0.0
        else:
            died = self._kill(old, missed)
        port = int(old.address.rpartition(":")[2]) if same else free_ports(1)[0]
        new = self.members[slot] = fleet.start_member(port)
        fleet.wait(lambda: "registered" in new.told, f"{new.name} to be registered")
        self._await_traffic(new)
        if missed is not None and not same:
            self._await_gone(old.address, died)

    def _kill(self, old: Member, missed: float) -> float:
        fleet = self.fleet
        died, gone = old.kill()
        self.deaths.append((died, gone, old.address))
        fleet.pause(gone + missed - time.monotonic())
        with fleet.changed:
            tried = [
                (at, consumer) for at, address, consumer in fleet.unreached if address == old.address and at > died
            ]
        first: dict[str, float] = {}
        for at, consumer in tried:
            first.setdefault(consumer, at)
        for consumer, at in first.items():
            mine = [each for each, by in tried if by == consumer]
            self.attempts.append(len(mine))
            self.extra_attempts.append(sum(at < each < at + FIRST_REST for each in mine))
        return died

    def _await_traffic(self, new: Member) -> None:
        fleet, registered = self.fleet, new.told["at"]
        try:
            fleet.wait(lambda: all(new.address in each.addresses for each in fleet.callers), f"{new.name} in all lists")
            self.listed_after.append(time.monotonic() - registered)
            fleet.wait(lambda: new.pid in fleet.first_answer, f"{new.name} to be called")
        except TimeoutError as error:
            self.report.breach(f"{error}; its address {new.address}")
            return
        took = max(0.0, fleet.first_answer[new.pid] - registered)
        self.traffic_after.append(took)
        if took > TRAFFIC:
            self.report.breach(f"{new.name} at {new.address} got its first call {took:.2f} s after it was registered")

    def _await_gone(self, address: str, died: float) -> None:
        fleet = self.fleet
        try:
            fleet.wait(
                lambda: not any(address in each.addresses for each in fleet.callers), f"{address} to go", PATIENCE
            )
        except TimeoutError as error:
            self.report.breach(str(error))
            return
        took = time.monotonic() - died
        self.gone_after.append(took)
        if took > GONE:
            self.report.breach(f"the dead {address} was listed for {took:.2f} s")

    def judge(self) -> None:
        """Every failed call, and every Book."""
        fleet, report = self.fleet, self.report
        took = time.monotonic() - self.began
        fleet.pause(TOLD)
        calls = fleet.calls - self.calls_before
        fleet.end_callers()
        allowed = 0
        for failure in fleet.failures:
            if self._in_flight_at_a_death(failure):
                allowed += 1
            else:
                report.breach(f"a call failed: {failure}")
        ran = fleet.booked_numbers()
        for number in [number for number, times in ran.items() if times > 1]:
            report.breach(f"Book {number} ran {ran[number]} times")
        for number in fleet.confirmed_booked:
            if not ran[number]:
                report.breach(f"Book {number} was answered and never ran")
        report.row("calls", f"{calls} in {took:.0f} s, {calls / took:.0f} a second")
        report.row("failed calls", len(fleet.failures))
        if self.deaths:
            report.row("of them not idempotent and in flight at a death", allowed)
        report.row("Book run twice", sum(times > 1 for times in ran.values()))
        report.row("slowest answered call", f"{fleet.slowest:.2f} s")
        report.spread("a new provider is in every list after", self.listed_after)
        report.spread("a new provider has answered a call after", self.traffic_after)
        report.spread("a dead provider is in no list after", self.gone_after)

    def _in_flight_at_a_death(self, failure: dict[str, object]) -> bool:
        began, ended = float(failure["began"]), float(failure["ended"])  # type: ignore[arg-type]
        return (
            not failure["idempotent"]
            and failure["status"] == "UNAVAILABLE"
            and failure["not_run"] is False
            and any(
                began <= gone and died <= ended and address in str(failure["text"])
                for died, gone, address in self.deaths
            )
        )


def rolling(seed: int, count: int, minutes: float, rate: float = 1000.0, members: int = 4) -> int:
    """Orderly restarts: no call fails."""
    report = Report(f"{count} rolling restarts of {members} providers", seed)
    with RealZooKeeper() as zookeeper, Fleet(zookeeperip=zookeeper.hosts, session_timeout=SESSION) as fleet:
        run = Restarts(report, fleet, members=members, rate=rate, processes=2, timeout=5.0)
        done = 0
        while done < count and report.seconds < minutes * 60:
            run.replace(done % members, missed=None, same=run.random.random() < 0.5)
            done += 1
            if done % 10 == 0:
                report.progress(f"{done} restarts, {fleet.calls} calls, {len(fleet.failures)} failed")
        report.row("restarts", done)
        run.judge()
    return report.finish()


def kill(
    seed: int,
    count: int,
    minutes: float,
    rate: float = 1000.0,
    members: int = 4,
    missed: Sequence[float] = DEATHS,
) -> int:
    """kill -9: only what was in flight and is not idempotent fails; one failed attempt takes the endpoint out."""
    report = Report(f"{count} times kill -9 of one of {members} providers", seed)
    with RealZooKeeper() as zookeeper, Fleet(zookeeperip=zookeeper.hosts, session_timeout=SESSION) as fleet:
        run = Restarts(report, fleet, members=members, rate=rate, processes=2, timeout=5.0)
        done = 0
        while done < count and report.seconds < minutes * 60:
            run.replace(done % members, missed=run.random.choice(missed), same=run.random.random() < 0.5)
            done += 1
            if done % 10 == 0:
                report.progress(f"{done} deaths, {fleet.calls} calls, {len(fleet.failures)} failed")
        report.row("deaths", done)
        run.judge()
        report.row("failed attempts of a consumer until it rests", 1 + max(run.extra_attempts, default=0))
        report.row("attempts of a consumer in all, at most", max(run.attempts, default=0))
        if any(run.extra_attempts):
            report.breach(f"{sum(run.extra_attempts)} calls tried a dead endpoint again within {FIRST_REST} s")
    return report.finish()
