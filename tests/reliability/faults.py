"""ZooKeeper's faults under load: everybody is listed again soon, and no call fails for a fault of ZooKeeper alone.

Three providers and a steady load on a real ensemble of three. The mix of faults is fixed, their order and targets are
the seed's. After each the run waits until all is well again: every consumer lists just the live providers and is sure
of it, every provider has an instance node of its present session, and the seed's nodes belong to live providers.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from kazoo.client import KazooClient
from kazoo.exceptions import KazooException, NoNodeError, NotEmptyError
from kazoo.retry import KazooRetry

from mprpc.layout import parse_instance
from reliability.fleet import PATIENCE, SERVICE, Fleet, Member, Process
from reliability.report import Report
from zookeeper_server import RealEnsemble, RealZooKeeper, four_letters, free_ports

SESSION = 4.0  # seconds, the session's timeout
HEALED = 4.0  # seconds from a fault's end until every live provider is listed
GONE = SESSION + 2.0  # seconds from a provider's end until nobody lists it
GIVEN_UP = 20.0  # seconds after which the run goes on, with a broken promise
STOPPED = 3 * SESSION  # seconds of a SIGSTOP
GHOST = 1.5 * SESSION  # seconds that a dead provider's session is kept alive
LOOK = 0.05  # seconds between two looks at ZooKeeper
NOTICED = 0.3  # seconds from a fault's end to the first look: before, nobody may have noticed it
TIMEOUT = 3.0  # seconds of a call
ROOT = f"/mprpc/{SERVICE}"
SEED = ("/LedgerRpc/Look", "/LedgerRpc/Book")
MIX = {
    "session expired": 84,
    "connection lost": 84,
    "tree deleted": 36,
    "leader killed": 30,
    "restarted at once": 24,
    "provider stopped": 15,
    "ensemble restarted": 12,
    "died": 9,
    "purged late": 6,
}
"""Of 300. Those that cost a JVM's start or a session's timeout are the fewer ones."""


def kinds(count: int, chance: random.Random, mix: Mapping[str, int]) -> list[str]:
    """`count` faults in the proportions of the mix, in a random order."""
    total = sum(mix.values())
    chosen = [kind for kind, share in mix.items() for _ in range(max(1, round(share * count / total)))]
    chance.shuffle(chosen)
    return chosen[:count]


class Trial:
    """The fleet, the ensemble, and what is done to them."""

    def __init__(self, report: Report, fleet: Fleet, ensemble: RealEnsemble, rate: float, callers: int = 2) -> None:
        self.report = report
        self.fleet = fleet
        self.ensemble = ensemble
        self.random = random.Random(report.seed)
        self.healed: dict[str, list[float]] = {}
        self.gone: list[float] = []
        self.excused: list[tuple[float, float, str, bool]] = []  # from, to, address of a provider that was killed
        # kazoo's own pauses between its attempts grow to a minute, which would be measured here.
        retry = KazooRetry(max_tries=-1, delay=0.05, max_delay=0.2)
        self.observer = KazooClient(ensemble.hosts, timeout=10.0, connection_retry=retry)
        self.observer.start(PATIENCE)
        self.members = [fleet.start_member(port) for port in free_ports(3)]
        for member in self.members:
            self._registered(member)
        for _ in range(callers):
            fleet.start_caller(channels=2, rate=rate / callers, timeout=TIMEOUT)
        fleet.wait(lambda: fleet.listed({each.address for each in self.members}), "the first lists")
        fleet.wait(lambda: len(fleet.first_answer) == len(self.members), "calls to all providers")
        self.began, self.calls_before = time.monotonic(), fleet.calls

    def _registered(self, member: Member) -> None:
        self.fleet.wait(lambda: "registered" in member.told, f"{member.name} to be registered")

    # What is done.

    def do(self, kind: str) -> None:
        """One fault, and the wait until it is healed."""
        self.fleet.warm_up()
        faults: dict[str, Callable[[], float]] = {
            "session expired": self.expire,
            "connection lost": self.cut,
            "tree deleted": self.delete,
            "leader killed": self.kill_leader,
            "ensemble restarted": self.restart_ensemble,
            "provider stopped": self.stop_provider,
            "restarted at once": self.restart_provider,
            "died": self.let_die,
            "purged late": self.purge_late,
        }
        self.await_health(kind, faults[kind]())
        for server in self.ensemble.servers:
            if not server.running:
                server.launch()
                server.wait_ready()

    def some(self) -> list[Process]:
        everybody: list[Process] = [*self.members, *self.fleet.callers]
        return self.random.sample(everybody, self.random.randint(1, len(everybody)))

    def expire(self) -> float:
        for process in self.some():
            number, password = self.session_of(process)
            deadline = time.monotonic() + PATIENCE
            # The process takes its session back while it is being closed from here; then once more.
            while self.session_of(process)[0] == number and time.monotonic() < deadline:
                self.close_session(number, password)
        return time.monotonic()

    def session_of(self, process: Process) -> tuple[int, bytes]:
        """Its session; waits for one where it is just being made."""
        while (said := process.ask("session")) is None:
            self.fleet.pause(LOOK)
        return int(said[0]), bytes.fromhex(said[1])

    def close_session(self, number: int, password: bytes) -> None:
        client = KazooClient(self.ensemble.hosts, client_id=(number, password), timeout=SESSION)
        with suppress(KazooException, client.handler.timeout_exception):
            client.start(5.0)
        client.stop()
        client.close()

    def cut(self) -> float:
        for _ in range(self.random.randint(1, 3)):
            for process in self.some():
                process.ask("cut")
        return time.monotonic()

    def delete(self) -> float:
        for path in self.random.sample((ROOT, "/LedgerRpc", "/mprpc"), self.random.randint(1, 3)):
            with suppress(NoNodeError, NotEmptyError):  # they are made again meanwhile
                self.observer.delete(path, recursive=True)
        return time.monotonic()

    def kill_leader(self) -> float:
        """Ended when the others have elected another."""
        self.leader().stop()
        self.leader()
        return time.monotonic()

    def leader(self) -> RealZooKeeper:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for server in self.ensemble.servers:
                if server.running and "Mode: leader" in four_letters(server.port, "srvr"):
                    return server
            self.fleet.pause(LOOK)
        raise TimeoutError("no leader was elected")

    def restart_ensemble(self) -> float:
        for server in self.ensemble.servers:
            server.stop()
        self.ensemble.start()
        return time.monotonic()

    def stop_provider(self) -> float:
        member = self.random.choice(self.members)
        member.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        gone = self.await_gone(member.address, stopped)
        self.excused.append((stopped, gone, member.address, False))
        self.fleet.pause(stopped + STOPPED - time.monotonic())
        member.signal(signal.SIGCONT)
        return time.monotonic()

    def restart_provider(self) -> float:
        """At the same address, while its earlier life's nodes are still there."""
        slot = self.random.randrange(len(self.members))
        old = self.members[slot]
        number, _ = self.session_of(old)
        died = self._kill(old)
        new = self._replace(slot, int(old.address.rpartition(":")[2]))
        self._registered(new)
        self.await_health("restarted, old nodes still there", new.told["at"])
        self.await_no_node_of(number, died)
        return time.monotonic()

    def let_die(self) -> float:
        """Nobody follows until it is gone everywhere."""
        slot = self.random.randrange(len(self.members))
        old = self.members[slot]
        died = self._kill(old)
        self.await_gone(old.address, died)
        self._replace(slot, free_ports(1)[0])
        return time.monotonic()

    def purge_late(self) -> float:
        """Another client keeps the dead provider's session, and with it its nodes, while the next one is there."""
        slot = self.random.randrange(len(self.members))
        old = self.members[slot]
        identity = self.session_of(old)
        self._kill(old)
        ghost = KazooClient(self.ensemble.hosts, client_id=identity, timeout=SESSION)
        ghost.start(PATIENCE)
        self._replace(slot, int(old.address.rpartition(":")[2]))
        ended = time.monotonic()
        self.await_health("restarted, old session kept alive", ended)
        self.fleet.pause(ended + GHOST - time.monotonic())
        ghost.stop()
        ghost.close()
        return time.monotonic()

    def _kill(self, member: Member) -> float:
        died, gone = member.kill()
        self.excused.append((died, gone, member.address, True))
        return died

    def _replace(self, slot: int, port: int) -> Member:
        new = self.members[slot] = self.fleet.start_member(port)
        self.fleet.wait(lambda: "serving" in new.told, f"{new.name} to serve")
        return new

    # What must hold.

    def await_health(self, kind: str, ended: float) -> None:
        """Until all is well; notes the seconds from the fault's end."""
        self.fleet.pause(ended + NOTICED - time.monotonic())
        missing = self.missing()
        while missing and time.monotonic() < ended + GIVEN_UP:
            self.fleet.pause(LOOK)
            missing = self.missing()
        took = time.monotonic() - ended
        self.healed.setdefault(kind, []).append(took)
        if missing or took > HEALED:
            self.report.breach(f"{kind}: {took:.1f} s after its end: {missing or 'well, but late'}")

    def missing(self) -> str:
        """What is not well; empty if all is."""
        addresses = {member.address for member in self.members}
        for caller in self.fleet.callers:
            if not caller.confirmed or caller.addresses != addresses:
                return f"{caller.name} lists {sorted(caller.addresses)}, {'sure' if caller.confirmed else 'unsure'}"
        sessions = {member.address: self.session_of(member)[0] for member in self.members}
        try:
            return self.missing_nodes(sessions)
        except KazooException as error:
            return f"ZooKeeper does not answer: {error!r}"

    def missing_nodes(self, sessions: dict[str, int]) -> str:
        registered = {(address, owner) for address, owner in self.instances()}
        for address, session in sessions.items():
            if (address, session) not in registered:
                return f"{address} has no node of its session; there are {registered}"
        for path in SEED:
            data, stat = self.observer.retry(self.observer.get, path)
            if sessions.get(data.decode()) != stat.ephemeralOwner:
                return f"{path} says {data!r} of session 0x{stat.ephemeralOwner:x}, which is no live provider's"
        return ""

    def instances(self) -> list[tuple[str, int]]:
        found = []
        for name in self.observer.retry(self.observer.get_children, ROOT):
            with suppress(NoNodeError):
                data, stat = self.observer.retry(self.observer.get, f"{ROOT}/{name}")
                found.append((parse_instance(name, data).endpoint.address, stat.ephemeralOwner))
        return found

    def await_gone(self, address: str, since: float) -> float:
        """Until no consumer lists a provider that is gone: the time."""
        with suppress(TimeoutError):
            self.fleet.wait(
                lambda: not any(address in caller.addresses for caller in self.fleet.callers),
                f"{address} to be gone",
                GIVEN_UP,
            )
        now = time.monotonic()
        self._gone_after(address, now - since)
        return now

    def await_no_node_of(self, session: int, since: float) -> None:
        while any(owner == session for _, owner in self.instances()) and time.monotonic() < since + GIVEN_UP:
            self.fleet.pause(LOOK)
        self._gone_after(f"session 0x{session:x}", time.monotonic() - since)

    def _gone_after(self, what: str, took: float) -> None:
        self.gone.append(took)
        if took > GONE:
            self.report.breach(f"{what} was still listed {took:.1f} s after its end")

    def judge(self) -> None:
        """Every failed call, and every Book."""
        fleet, report = self.fleet, self.report
        took = time.monotonic() - self.began
        self.fleet.pause(1.0)
        calls = fleet.calls - self.calls_before
        self.observer.stop()
        self.observer.close()
        fleet.end_callers()
        excused = Counter(self.excuse(failure) for failure in fleet.failures)
        for failure in fleet.failures:
            if not self.excuse(failure):
                report.breach(f"a call failed: {failure}")
        ran = fleet.booked_numbers()
        for number in [number for number, times in ran.items() if times > 1]:
            report.breach(f"Book {number} ran {ran[number]} times")
        report.row("calls", f"{calls} in {took:.0f} s, {calls / took:.0f} a second")
        report.row("failed for a fault of ZooKeeper alone", excused[""])
        report.row("failed in flight at a kill -9, not idempotent", excused["killed"])
        report.row("failed at a provider that SIGSTOP had silenced", excused["stopped"])
        report.row("slowest answered call", f"{fleet.slowest:.2f} s")

    def excuse(self, failure: dict[str, Any]) -> str:
        """Which fault of a provider, not of ZooKeeper, explains a failed call."""
        for since, until, address, killed in self.excused:
            if address not in failure["text"] or not (failure["began"] <= until and since <= failure["ended"]):
                continue
            if killed and not failure["idempotent"] and failure["not_run"] is False:
                return "killed"
            if not killed and failure["status"] == "DEADLINE_EXCEEDED":
                return "stopped"
        return ""


def faults(seed: int, count: int, minutes: float, rate: float = 500.0, mix: Mapping[str, int] = MIX) -> int:
    """Mixed faults, one after the other."""
    report = Report(f"{count} faults of ZooKeeper on an ensemble of three", seed)
    with RealEnsemble() as ensemble, Fleet(zookeeperip=ensemble.hosts, session_timeout=SESSION) as fleet:
        trial = Trial(report, fleet, ensemble, rate)
        done: Counter[str] = Counter()
        for kind in kinds(count, trial.random, mix):
            if report.seconds > minutes * 60:
                break
            trial.do(kind)
            done[kind] += 1
            if done.total() % 10 == 0:
                report.progress(f"{done.total()} faults, {fleet.calls} calls, {len(fleet.failures)} failed")
        report.row("faults", done.total())
        trial.judge()
        for kind, took in trial.healed.items():
            report.spread(f"well again after: {kind}", took)
        report.spread("dead and in no list after", trial.gone)
    return report.finish()


def outage(seed: int, count: int, minutes: float, rate: float = 500.0) -> int:
    """All of ZooKeeper down for `count` seconds."""
    report = Report(f"all of ZooKeeper down for {count} s", seed)
    with RealEnsemble() as ensemble, Fleet(zookeeperip=ensemble.hosts, session_timeout=SESSION) as fleet:
        trial = Trial(report, fleet, ensemble, rate)
        for server in ensemble.servers:
            server.stop()
        report.progress("ZooKeeper is down")
        trial.fleet.pause(min(count, minutes * 60))
        ensemble.start()
        report.progress(f"ZooKeeper is back; {fleet.calls} calls, {len(fleet.failures)} failed")
        trial.await_health("outage", time.monotonic())
        trial.judge()
        report.spread("well again after", trial.healed["outage"])
    return report.finish()
