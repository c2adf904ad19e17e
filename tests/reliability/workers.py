"""Worker processes under load: what a second one is worth, rolling restarts, and kill -9.

The first part replays a call from C at 16 connections to the shared address, in turn at a provider without workers and
one with two. On a machine that is busy otherwise the calls a second of two say little, so what counts is what they
would be on two free cores: calls for a second of the workers' CPU, times two; both figures are shown.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mprpc import MprpcConfig
from reliability.report import Report
from supervised import PATIENCE, PROGRAM, Load, Supervised
from zookeeper_server import RealZooKeeper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

BUSY = PROGRAM.replace(
    "    return",
    "    end = time.thread_time_ns() + 100_000\n    while time.thread_time_ns() < end:\n        pass\n    return",
)
WORTH = 1.8  # times one worker's calls a second
BACK = 1.0  # seconds until a killed worker is registered again and has answered a call
SESSION = 4.0
LIVED = 1.0  # seconds after which a death is the first again; a minute by default, too long to wait for here


def cpu(pids: list[int]) -> float:
    """Seconds of CPU of these processes so far."""
    spent = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            spent += int((task / "schedstat").read_text().split()[0])
    return spent / 1e9


def replay(supervised: Supervised, pids: list[int], seconds: float) -> tuple[float, float]:
    """Calls a second, and calls for a second of CPU."""
    import machinery

    server: Any = SimpleNamespace(system="mprpc", port=int(supervised.address.rpartition(":")[2]))
    before = cpu(pids)
    with machinery.Load(server, "seconds", seconds, core=None) as load:
        told, spent = load.told, cpu(pids) - before
    return told["calls"] / told["seconds"], told["calls"] / spent


def scaling(report: Report, rounds: int, seconds: float) -> float:
    """What two workers are worth on two free cores, times one."""
    wall: list[float] = []
    worth: list[float] = []
    with running(BUSY, workers=1) as one, running(BUSY, workers=2) as two:
        one.wait_line("serving")
        two.wait_line("2 workers serve")
        for _ in range(rounds):
            alone, alone_cpu = replay(one, [one.pid], seconds)
            both, both_cpu = replay(two, two.workers(), seconds)
            wall.append(both / alone)
            worth.append(2 * both_cpu / alone_cpu)
            report.progress(f"one worker {alone:.0f} calls/s, two {both:.0f}: {both / alone:.2f} times as many")
    shown = f"best {max(wall):.2f}, median {statistics.median(wall):.2f}, worst {min(wall):.2f} (n={rounds})"
    report.row("2 workers, times the calls/s of one", shown)
    result = statistics.median(worth)
    report.row("… on two free cores, by CPU for a call", f"{result:.2f}")
    if result < WORTH:
        report.breach(f"two workers are worth {result:.2f} times one, less than {WORTH}")
    return result


@contextmanager
def running(program: str, **keys: object) -> Iterator[Supervised]:
    with tempfile.TemporaryDirectory() as directory, Supervised(Path(directory), program, **keys) as supervised:
        yield supervised


def restarts(report: Report, supervised: Supervised, zookeeper: str, count: int) -> None:
    """SIGHUP again and again under 1,000 calls a second: none fails."""
    with Load(MprpcConfig(zookeeperip=zookeeper), 500) as found, Load(supervised.address, 500) as fixed:
        began = time.monotonic()
        for number in range(1, count + 1):
            supervised.tell(signal.SIGHUP)
            supervised.wait_line("all workers are new", number)
    seconds = time.monotonic() - began
    for load, who in ((found, "found through ZooKeeper"), (fixed, "at the shared address")):
        for failure in load.failures:
            report.breach(f"a call {who} failed in a rolling restart: {failure}")
        report.row(f"calls {who}", f"{load.calls}, {len(load.failures)} failed, slowest {load.slowest:.2f} s")
    report.row("rolling restarts of both workers", f"{count} in {seconds:.0f} s, under {2 * 500} calls/s")


def deaths(report: Report, supervised: Supervised, zookeeper: str, count: int) -> None:
    """kill -9 again and again: back within a second, registered and serving."""
    registered: list[float] = []
    serving: list[float] = []
    seeded = random.Random(report.seed)
    with Load(MprpcConfig(zookeeperip=zookeeper), 200) as load:
        for _ in range(count):
            time.sleep(LIVED)
            before = supervised.workers()
            seen = len(supervised.matching(r"\): registered: "))
            killed = time.monotonic()
            os.kill(seeded.choice(before), signal.SIGKILL)
            back, _ = supervised.wait_line(r"\): registered: ", seen + 1)[-1]
            (new,) = set(supervised.workers()) - set(before)
            deadline = time.monotonic() + PATIENCE
            while new not in load.by and time.monotonic() < deadline:
                time.sleep(0.001)
            registered.append(back - killed)
            serving.append(load.by.get(new, deadline) - killed)
    late = sum(took > BACK for took in registered + serving)
    if late:
        report.breach(f"{late} times a worker was not back within {BACK} s")
    report.spread("a killed worker is registered again after", registered)
    report.spread("… and has answered a call after", serving)
    report.row("calls meanwhile", f"{load.calls}, {len(load.failures)} failed in flight at a death")
    if len(load.failures) > 4 * count:
        report.breach(f"{len(load.failures)} calls failed at {count} deaths, more than the 4 threads had in flight")


def workers(seed: int, count: int, minutes: float) -> int:
    report = Report("Worker processes", seed)
    scaling(report, rounds=max(3, min(count // 5, int(minutes * 4))), seconds=2.0)
    program = f"import mprpc.workers; mprpc.workers.LIVED = {LIVED / 2}\n" + PROGRAM
    with RealZooKeeper() as zookeeper:
        host, _, port = zookeeper.hosts.rpartition(":")
        keys = {"zookeeperip": host, "zookeeperport": port, "session_timeout": SESSION}
        with running(program, **keys) as supervised:
            supervised.wait_line(r"\): registered: ", 2)
            restarts(report, supervised, zookeeper.hosts, count)
            deaths(report, supervised, zookeeper.hosts, count)
    return report.finish()
