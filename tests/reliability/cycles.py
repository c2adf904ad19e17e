"""Start and stop, again and again: bounded in time and without a trace, with ZooKeeper up, down and black-holed.

A cycle is a provider and a channel with discovery, made, used and closed in this process. Black-holed comes in three
kinds: a server that accepts and says nothing, one whose SYNs are dropped, and one that freezes once it is connected to.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError

import generated
from mprpc import MprpcChannel, MprpcConfig, RpcError, RpcProvider
from reliability.report import Report
from zookeeper_server import RealZooKeeper, free_ports

STOP = 5.0  # seconds that a stop may take
SETTLED = 10.0  # seconds in which threads that are on their way out have gone
LOOK = 0.05
QUIET = 0.5  # seconds without a thread's end
EIGHTH = 8  # of 400 cycles with ZooKeeper up, 50 with it down and 50 with it black-holed
SESSION = 4.0
REGISTERED = 20.0
NO_LIST = 0.05  # seconds for a call that can't be made


class Trial:
    """The service, and how one cycle went."""

    def __init__(self, report: Report) -> None:
        ledger_mprpc, self._ledger_pb2 = generated.module("ledger_mprpc"), generated.module("ledger_pb2")
        self._stub = ledger_mprpc.LedgerRpc_Stub
        self._report = report
        pb2 = self._ledger_pb2

        class Ledger(ledger_mprpc.LedgerRpc):  # type: ignore[name-defined, misc]
            def Look(self, request: Any, controller: Any) -> Any:
                return pb2.Receipt(number=request.number)

            Book = Look

        self._service = Ledger()

    def cycle(self, hosts: str, *, answers: bool, before_stop: Callable[[], None] = lambda: None) -> float:
        """Seconds that the longer of the two stops took. `answers`: ZooKeeper is well."""
        provider = RpcProvider(MprpcConfig(zookeeperip=hosts, session_timeout=SESSION))
        provider.notify_service(self._service)
        provider.start()
        channel = MprpcChannel(MprpcConfig(zookeeperip=hosts, session_timeout=SESSION))
        if answers and not provider.wait_registered(REGISTERED):
            self._report.breach("a provider was not registered")
        try:
            call = self._stub(channel).Look
            call(self._ledger_pb2.Entry(number=1), timeout=STOP if answers else NO_LIST)
        except RpcError as error:
            if answers:
                self._report.breach(f"a call failed: {error}")
        before_stop()
        times = []
        for stop in (provider.stop, channel.close):
            began = time.monotonic()
            stop()
            times.append(time.monotonic() - began)
        if max(times) > STOP:
            self._report.breach(f"stop took {max(times):.2f} s")
        return max(times)


@contextmanager
def leaving_nothing(report: Report, what: str) -> Iterator[None]:
    """Threads (the kernel's count) and descriptors are as many after as before."""
    threads, descriptors = steady()
    yield
    now = settled(threads, descriptors)
    report.row(f"{what}: threads, descriptors left", f"{now[0] - threads}, {now[1] - descriptors}")
    if now[0] > threads or now[1] > descriptors:
        names = [thread.name for thread in threading.enumerate()]
        report.breach(f"{what}: {now} threads and descriptors instead of {(threads, descriptors)}: {names}")


def held() -> tuple[int, int]:
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def steady() -> tuple[int, int]:
    """How many there are once nothing more ends."""
    last = (0, 0)
    while (now := held()) != last:
        last = now
        threading.Event().wait(QUIET)
    return now


def settled(threads: int, descriptors: int) -> tuple[int, int]:
    """How many there are when no more than these are left, or after a while."""
    deadline = time.monotonic() + SETTLED
    while True:
        now = held()
        if (now[0] <= threads and now[1] <= descriptors) or time.monotonic() > deadline:
            return now
        threading.Event().wait(LOOK)


def nodes(hosts: str) -> list[str]:
    """Every ephemeral node that is left."""
    client = KazooClient(hosts)
    client.start()
    found: list[str] = []

    def walk(path: str) -> None:
        try:
            for name in client.get_children(path):
                walk(f"{path.rstrip('/')}/{name}")
            if client.get(path)[1].ephemeralOwner:
                found.append(path)
        except NoNodeError:
            return

    walk("/")
    client.stop()
    client.close()
    return found


@contextmanager
def silent() -> Iterator[str]:
    """An address that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def dropping() -> Iterator[str]:
    """An address whose queue of connections is full, so that SYNs are dropped."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def freeze(server: RealZooKeeper, number: int) -> None:
    assert server._process is not None
    server._process.send_signal(number)


KINDS = ("up", "down", "silent", "dropping", "frozen")


def cycles(seed: int, count: int, minutes: float, kinds: Collection[str] = KINDS) -> int:
    """`count` cycles with ZooKeeper up, an eighth of that each with it down and black-holed in one of three ways."""
    report = Report(f"{count} cycles of start and stop", seed)
    trial, others = Trial(report), max(3, count // EIGHTH)
    times: dict[str, list[float]] = {}

    def run(what: str, number: int, cycle: Callable[[], float]) -> None:
        if what not in kinds:
            return
        cycle()  # what is made once, is made
        with leaving_nothing(report, what):
            took = times[what] = []
            while len(took) < number and report.seconds < minutes * 60:
                took.append(cycle())
                if len(took) % 50 == 0:
                    report.progress(f"{what}: {len(took)}")

    with RealZooKeeper() as zookeeper, silent() as mute, dropping() as full:
        run("up", count, lambda: trial.cycle(zookeeper.hosts, answers=True))
        left = nodes(zookeeper.hosts)
        report.row("ephemeral nodes left", len(left))
        if left:
            report.breach(f"nodes left: {left}")
        nobody = f"127.0.0.1:{free_ports(1)[0]}"
        run("down", others, lambda: trial.cycle(nobody, answers=False))
        run("silent", others - 2 * (others // 3), lambda: trial.cycle(mute, answers=False))
        run("dropping", others // 3, lambda: trial.cycle(full, answers=False))
        run("frozen", others // 3, lambda: frozen_cycle(trial, zookeeper))
        left = await_none(zookeeper.hosts)
        report.row("nodes left when the frozen ones' sessions have ended", len(left))
        if left:
            report.breach(f"nodes left: {left}")
    for what, took in times.items():
        report.spread(f"{what}: stop took", took)
    return report.finish()


def frozen_cycle(trial: Trial, server: RealZooKeeper) -> float:
    try:
        return trial.cycle(server.hosts, answers=True, before_stop=lambda: freeze(server, signal.SIGSTOP))
    finally:
        freeze(server, signal.SIGCONT)


def await_none(hosts: str) -> list[str]:
    """What is left when the sessions that could not be closed have ended."""
    deadline = time.monotonic() + 3 * SESSION
    while (left := nodes(hosts)) and time.monotonic() < deadline:
        threading.Event().wait(LOOK)
    return left
