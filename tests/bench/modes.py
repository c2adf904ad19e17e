"""What is measured. A mode starts its servers and callers once, then takes one short round of each system in turn,
again and again: what disturbs the machine meanwhile disturbs all of them alike, and ratios are taken within a round.

Core 0 is the server's; the callers are on core 0 too, or on core 1. `Figures` is mode -> system -> metric -> one value
for each round.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import stubs
from machinery import Caller, Load, Process, Server, free_port, load

MICRO = 1e6
MEBIBYTE = 1 << 20

Figures = defaultdict[str, defaultdict[str, defaultdict[str, list[float]]]]


def figures() -> Figures:
    return defaultdict(lambda: defaultdict(lambda: defaultdict(list)))


class Bench:
    """The figures so far and how much to measure: `rounds` of each mode, `scale` times the usual length of a round."""

    def __init__(self, rounds: int, scale: float, only: set[str] | None = None) -> None:
        self.rounds = rounds
        self.scale = scale
        self.only = only
        self.figures = figures()

    def systems(self, *names: str) -> list[str]:
        return [name for name in names if self.only is None or name in self.only]

    def add(self, mode: str, system: str, **values: float) -> None:
        for metric, value in values.items():
            self.figures[mode][system][metric].append(value)

    def count(self, usual: int) -> int:
        return max(200, int(usual * self.scale))

    def interleave(self, systems: list[str]) -> Iterator[str]:
        """The systems in turn, each round beginning with another one."""
        for number in range(self.rounds if systems else 0):
            start = number % len(systems)
            yield from systems[start:] + systems[:start]


@contextmanager
def servers(systems: list[str], core: int | None = 0, **options: Any) -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        yield {system: stack.enter_context(Server(system, core, **options)) for system in systems}


@contextmanager
def callers(running: dict[str, Server], core: int | None, **options: Any) -> Iterator[dict[str, Caller]]:
    with ExitStack() as stack:
        yield {
            system: stack.enter_context(Caller(system, server.port, core, **options))
            for system, server in running.items()
        }


ALL = ("raw_c", "raw_python", "epoll_pb", "mprpc", "thriftpy2", "grpcio", "grpcio_aio")
CALLS = {"grpcio": 250, "grpcio_aio": 250, "thriftpy2": 1500}  # a round's calls, where not 3,000: as long as the others


def latency(bench: Bench, mode: str, core: int) -> None:
    """One blocking Login call after another, each system through its own client; raw_c through one in C."""
    systems = bench.systems(*ALL)
    with servers(systems) as running:
        with callers({name: server for name, server in running.items() if name != "raw_c"}, core) as calling:
            for system in bench.interleave(systems):
                count = bench.count(CALLS.get(system, 3000))
                if system == "raw_c":
                    told = load(running[system], "latency", count, connections=1, core=core)
                else:
                    told = calling[system].tell("latency", count)
                bench.add(mode, system, p50=told["p50"] / 1000, p99=told["p99"] / 1000)


def latency_one_core(bench: Bench) -> None:
    latency(bench, "latency_one_core", 0)


def latency_two_cores(bench: Bench) -> None:
    latency(bench, "latency_two_cores", 1)


def replay(bench: Bench, mode: str, running: dict[str, Server], **options: Any) -> None:
    for system in bench.interleave(list(running)):
        told = load(running[system], "seconds", 0.4 * bench.scale, **options)
        bench.add(mode, system, calls=told["calls"] / told["seconds"], cpu=told["cpu"] / told["calls"] * MICRO)


def capacity(bench: Bench) -> None:
    """16 connections, one call in flight on each, from a client in C that replays the bytes."""
    with servers(bench.systems(*ALL)) as running:
        replay(bench, "capacity", running)


def pipelined(bench: Bench) -> None:
    """One connection with 64 calls in flight, from the client in C. Thrift's server takes one at a time."""
    with servers(bench.systems(*(name for name in ALL if name != "thriftpy2"))) as running:
        replay(bench, "pipelined", running, connections=1, depth=64)


def closed(bench: Bench) -> None:
    """16 client processes, each one connection and one call in flight, through each system's own client."""
    with servers(bench.systems(*(name for name in ALL if name != "raw_c"))) as running:
        with callers(running, 1, closed=16) as calling:
            for system in bench.interleave(list(running)):
                before = running[system].cpu()
                told = calling[system].tell("closed", 0.4 * bench.scale)
                spent = running[system].cpu() - before
                bench.add(
                    "closed", system, calls=told["calls"] / told["seconds"], cpu=spent / max(1, told["calls"]) * MICRO
                )


def bulk(bench: Bench) -> None:
    """Echo of 1 MiB in a bytes field, one after another; MB/s of payload one way. Then the most memory for 32 MiB."""
    systems = bench.systems(*ALL)
    with servers(systems) as running, callers(running, 1) as calling:
        for system in bench.interleave(systems):
            count = max(3, int(20 * bench.scale))
            told = calling[system].tell("bulk", count, MEBIBYTE)
            bench.add("bulk", system, rate=count * MEBIBYTE / 1e6 / told["seconds"])
        for system in bench.systems("epoll_pb", "mprpc"):
            copies(bench, system, running[system], calling[system])


def copies(bench: Bench, system: str, server: Server, caller: Caller) -> None:
    """Peak memory of both sides while a large payload goes round, in payloads."""
    size = 32 * MEBIBYTE
    before = {side: side.memory() for side in (server, caller)}
    for side in before:
        side.reset_peak()
    caller.tell("bulk", 1, size)
    over = {side: (side.memory("VmHWM") - memory) / size for side, memory in before.items()}
    bench.add("bulk", system, server_copies=over[server], client_copies=over[caller] - 1)  # one is the caller's own


def resting(server: Server, count: int) -> Load:
    """So many connections that have made one call each and now rest."""
    return Load(server, "idle", 0, connections=count)


def idle(bench: Bench) -> None:
    """Memory of the server for each connection that has made one call and then rests, and its CPU meanwhile."""
    for count in (2000, 10000):
        for system in bench.systems(*ALL):
            with Server(system) as server:
                load(server, "latency", 200, connections=1)
                before = server.memory()
                with resting(server, count // 2), resting(server, count // 2):
                    used = server.memory() - before
                    start = server.cpu()
                    time.sleep(1)
                    bench.add(f"idle_{count}", system, bytes=used / count, resting_cpu=(server.cpu() - start) * MICRO)


def loops(bench: Bench) -> None:
    """Capacity with 1, 2 and 4 loops, server and client on both cores."""
    wanted = [(name, number) for name in bench.systems("epoll_pb", "mprpc") for number in (1, 2, 4)]
    with ExitStack() as stack:
        running = {f"{name}_{number}": stack.enter_context(Server(name, None, loops=number)) for name, number in wanted}
        replay(bench, "loops", running, core=None)


def busy(bench: Bench) -> None:
    """Capacity beside a thread that computes in Python, at the default switch interval and at 0.2 ms.

    One server at a time: the others' threads would compute all the while.
    """
    for mode, interval in (("busy_5ms", 0.0), ("busy_200us", 0.0002)):
        for system in bench.interleave(bench.systems("epoll_pb", "mprpc")):
            with Server(system, None, busy=interval) as server:
                told = load(server, "seconds", bench.scale, core=None)
                bench.add(mode, system, calls=told["calls"] / told["seconds"])


def threads(bench: Bench) -> None:
    """64 threads of one process, all blocking on calls through one channel."""
    with servers(bench.systems("mprpc", "grpcio"), core=None) as running, callers(running, None) as calling:
        for system in bench.interleave(list(running)):
            told = calling[system].tell("threads", 64, 0.5 * bench.scale)
            bench.add("threads", system, calls=told["calls"] / told["seconds"])


def slow(bench: Bench) -> None:
    """One loop: a fast method's latency with 20 calls of one that sleeps 100 ms in flight all the time, and without."""
    if not bench.systems("mprpc"):
        return
    with ExitStack() as stack:
        running = {name: stack.enter_context(Server("mprpc")) for name in ("mprpc", "mprpc_slow")}
        calling = {name: stack.enter_context(Caller("mprpc", server.port)) for name, server in running.items()}
        stack.enter_context(Caller("mprpc", running["mprpc_slow"].port)).tell("sleeping", 20, 100)
        for name in bench.interleave(list(calling)):
            told = calling[name].tell("latency", bench.count(5000))
            bench.add("slow", name, p50=told["p50"] / 1000, p99=told["p99"] / 1000)


def first(bench: Bench) -> None:
    """The first call of a fresh process, ms: the list from ZooKeeper, a connection, the call."""
    zookeeper = free_port()
    systems = bench.systems("mprpc")
    with servers(systems, zookeeper=zookeeper):
        for system in bench.interleave(systems):
            for name, more in {"alone": [], "kazoo": ["kazoo"]}.items():
                command = [sys.executable, str(stubs.HERE / "first.py"), str(zookeeper), *more]
                with Process(command, 1, stdout=subprocess.PIPE) as process:
                    told = process.read()
                bench.add("first", system, **{f"first_{name}": told["took"], f"first_{name}_cpu": told["cpu"]})


def scaling(bench: Bench) -> None:
    """p50 of one connection on one core as connections, methods and loops grow; all of it ours."""
    with ExitStack() as stack:
        calling = {"1": stack.enter_context(Caller("mprpc", stack.enter_context(Server("mprpc")).port, 0))}
        for name, options in {
            "methods_1000": {"services": 1000},
            "loops_2": {"loops": 2},
            "loops_4": {"loops": 4},
        }.items():
            server = stack.enter_context(Server("mprpc", **options))
            calling[name] = stack.enter_context(Caller("mprpc", server.port, 0))
        for count in (100, 1000, 10000):
            server = stack.enter_context(Server("mprpc"))
            stack.enter_context(resting(server, count))
            calling[f"connections_{count}"] = stack.enter_context(Caller("mprpc", server.port, 0))
        server = stack.enter_context(Server("mprpc", host="0.0.0.0"))
        for name in ("providers_1", "providers_1000"):
            calling[name] = stack.enter_context(Caller(name, server.port, 0))
        for name in bench.interleave(list(calling)):
            told = calling[name].tell("latency", bench.count(3000))
            bench.add("scaling", name, p50=told["p50"] / 1000)


MODES: dict[str, Callable[[Bench], None]] = {
    "latency_one_core": latency_one_core,
    "latency_two_cores": latency_two_cores,
    "capacity": capacity,
    "pipelined": pipelined,
    "closed": closed,
    "bulk": bulk,
    "idle": idle,
    "loops": loops,
    "busy": busy,
    "threads": threads,
    "slow": slow,
    "scaling": scaling,
    "first": first,
}
QUICK = ("latency_one_core", "latency_two_cores", "capacity", "pipelined")
