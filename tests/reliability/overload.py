"""Five times the load that a provider can carry: what it still answers in time, how soon it says no, how it recovers.

The provider is a process of its own (`python -m reliability.overload HANDLER`). The client is an open loop: requests
leave by the clock, whatever has become of those before, and each counts from when it was due.
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mprpc
import services
import wire
from mprpc import MprpcConfig, RpcProvider
from mprpc._native import ffi, lib
from reliability.report import Report

CONNECTIONS = 16
DEADLINE = 0.2  # seconds that a caller waits
TICK = 0.002  # seconds between two looks at the clock
OVERLOAD = 5.0  # times the capacity
REFUSAL = 0.020  # seconds in which a refusal must be there
RECOVERY = 2.0  # seconds after the overload's end until all is well
GOODPUT = 0.9  # of the peak
OK, EXHAUSTED = 0, 8
ROOM = 512  # frames split at once

PAYLOAD = bytes(services.REQUEST.SerializeToString())

COMPUTE = 0.0004  # seconds of a handler that runs where its request was received
SLEEP, THREADS = 0.005, 16  # of one that waits on a thread of its own, and how many of those there are


class Answer(NamedTuple):
    """One request's fate: when it was due, and its seconds until the answer; status -1: none came."""

    due: float
    seconds: float
    status: int

    @property
    def good(self) -> bool:
        return self.status == OK and self.seconds <= DEADLINE


class OpenLoop:
    """Connections to a provider, and requests that leave them by the clock."""

    def __init__(self, address: str, connections: int = CONNECTIONS) -> None:
        host, _, port = address.partition(":")
        self._sockets = [socket.create_connection((host, int(port))) for _ in range(connections)]
        self._due: list[dict[int, float]] = [{} for _ in self._sockets]
        self._unsent = [b""] * connections
        self._kept = [b""] * connections
        self._number = 0
        self._selector = selectors.DefaultSelector()
        for i, each in enumerate(self._sockets):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.setblocking(False)
            self._selector.register(each, selectors.EVENT_READ, i)
        self._frames, self._count = ffi.new("struct mprpc_frame[]", ROOM), ffi.new("size_t *")
        self._need = ffi.new("uint64_t *")
        self._head = ffi.new("uint8_t[256]")
        self._bytes = ffi.buffer(self._head)
        names, (service, method) = ffi.new("uint8_t[100]"), (name.encode() for name in wire.LOGIN)
        size = lib.mprpc_put_names(names, service, len(service), method, len(method))
        self._names = bytes(ffi.buffer(names, size))

    def run(self, rate: float, seconds: float) -> list[Answer]:
        """`rate` requests a second; then waits for what is still to come."""
        answers: list[Answer] = []
        began = time.monotonic()
        sent = 0
        while (now := time.monotonic()) < began + seconds:
            while began + sent / rate <= now:
                self._request(began + sent / rate)
                sent += 1
            self._flush()
            self._read(answers, TICK)
        end = time.monotonic() + 2 * DEADLINE
        while any(self._due) and time.monotonic() < end:
            self._flush()
            self._read(answers, TICK)
        for due in self._due:
            answers += [Answer(when, DEADLINE, -1) for when in due.values()]
            due.clear()
        return answers

    def saturate(self, seconds: float, window: int = 4) -> float:
        """Answers a second with so many requests of each connection always under way."""
        answers: list[Answer] = []
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            for i, due in enumerate(self._due):
                while len(due) < window:
                    self._request(time.monotonic(), i)
            self._flush()
            self._read(answers, TICK)
        while any(self._due):
            self._read(answers, TICK)
        return sum(each.status == OK for each in answers) / seconds

    def close(self) -> None:
        self._selector.close()
        for each in self._sockets:
            each.close()

    def _request(self, due: float, connection: int | None = None) -> None:
        self._number += 1
        i = self._number % len(self._sockets) if connection is None else connection
        self._due[i][self._number] = due
        head = lib.mprpc_put_call(
            self._head, self._names, len(self._names), len(PAYLOAD), self._number, int(DEADLINE * 1000), 0
        )
        self._unsent[i] += self._bytes[:head] + PAYLOAD

    def _flush(self) -> None:
        for i, data in enumerate(self._unsent):
            if data:
                try:
                    self._unsent[i] = data[self._sockets[i].send(data) :]
                except BlockingIOError:
                    continue

    def _read(self, answers: list[Answer], timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            i = key.data
            data = self._kept[i] + self._sockets[i].recv(1 << 18)
            now = time.monotonic()
            while True:
                view = ffi.from_buffer(data)
                used = lib.mprpc_split(view, len(data), 1 << 20, self._frames, ROOM, self._count, self._need)
                for frame in self._frames[0 : self._count[0]]:
                    due = self._due[i].pop(frame.call_id, None)
                    if due is not None:
                        answers.append(Answer(due, now - due, frame.status))
                data = data[used:]
                if self._count[0] < ROOM:
                    break
            self._kept[i] = data


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def recovered_after(answers: list[Answer], began: float) -> float:
    """Seconds from `began` until 99 % were answered in time, of what was due in each tenth of a second from then on."""
    late, due = Counter[int](), Counter[int]()
    for each in answers:
        due[int((each.due - began) * 10)] += 1
        late[int((each.due - began) * 10)] += not each.good
    return max((tenth + 1 for tenth in due if late[tenth] > 0.01 * due[tenth]), default=0) / 10


@contextmanager
def provider(handler: str, limited: bool) -> Iterator[str]:
    """The address of a provider in a process of its own."""
    here = Path(__file__).resolve().parent.parent
    path = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
    program = path + f"from reliability import overload\noverload.serve({handler!r}, {limited})"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()
        process.communicate(b"\n", timeout=10)


def compute(request: Any, controller: Any) -> Any:
    until = time.perf_counter() + COMPUTE
    while time.perf_counter() < until:
        pass
    return services.accept(request, controller)


@mprpc.blocking
def sleep(request: Any, controller: Any) -> Any:
    time.sleep(SLEEP)
    return services.accept(request, controller)


class Blocking(services.Users):
    @mprpc.blocking
    def Login(self, request: Any, controller: Any) -> Any:
        return sleep(request, controller)


def serve(handler: str, limited: bool) -> None:
    """Serves until standard input ends."""
    made = RpcProvider(MprpcConfig(adaptive_limit=limited, handler_threads=THREADS, max_queued=10_000))
    made.notify_service(Blocking() if handler == "sleep" else services.Users(compute))
    with made:
        print(made.address, flush=True)
        sys.stdin.readline()


def overload(*, seed: int, count: int, minutes: float, handlers: tuple[str, ...] = ("compute", "sleep")) -> int:
    """`count`: seconds of overload."""
    report = Report(f"{OVERLOAD:g} times the capacity for {count} s, {DEADLINE * 1000:.0f} ms to answer", seed)
    for handler in handlers:
        for limited in (True, False):
            with provider(handler, limited) as address:
                _measure(report, handler, limited, address, count)
    return report.finish()


def _measure(report: Report, handler: str, limited: bool, address: str, seconds: float) -> None:
    name = f"{handler}, {'adaptive_limit' if limited else 'no limit'}"
    loop = OpenLoop(address)
    loop.saturate(1.0)
    capacity = loop.saturate(2.0)
    peak = max(_goodput(loop.run(capacity * part, 2.0), 2.0) for part in (0.8, 0.9, 1.0))
    report.progress(f"{name}: {capacity:.0f} a second at most, {peak:.0f} of them in time")
    answers = loop.run(OVERLOAD * capacity, seconds)
    goodput = _goodput(answers, seconds)
    refusals = [each.seconds for each in answers if each.status == EXHAUSTED]
    began = time.monotonic()
    recovery = recovered_after(loop.run(capacity / 2, 2 * RECOVERY), began)
    loop.close()
    refused = percentile(refusals, 99)
    report.row(f"{name}: goodput", f"{goodput:.0f} of {peak:.0f} a second, {100 * goodput / peak:.0f} %")
    report.row(
        f"{name}: refusals",
        f"{len(refusals)} of {len(answers)}, median {1000 * percentile(refusals, 50):.1f}, p99 {1000 * refused:.1f} ms",
    )
    report.row(f"{name}: recovered after", f"{recovery:.2f} s")
    if not limited:
        return
    if goodput < GOODPUT * peak:
        report.breach(f"{name}: goodput {goodput:.0f} is under {GOODPUT:.0%} of {peak:.0f}")
    if refused > REFUSAL:
        report.breach(f"{name}: a refusal took {1000 * refused:.1f} ms")
    if recovery > RECOVERY:
        report.breach(f"{name}: it recovered after {recovery:.2f} s")


def _goodput(answers: list[Answer], seconds: float) -> float:
    return sum(each.good for each in answers) / seconds
