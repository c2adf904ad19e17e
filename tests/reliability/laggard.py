"""A provider as a process, whose answers come late:  python -m reliability.laggard ORDERS

ORDERS (JSON): `config`, `calls` (numbers are below it), `reset_every` (requests after which every connection is reset;
0: never). Each request is answered after its `hold_ms`, by another thread, whether or not its caller still waits. How
often each number ran is kept, a byte each. It tells `serving` with its address. Commands: `reset` resets every
connection, `look` tells descriptors and memory, `ran PATH` writes the counts to a file. SIGTERM ends it.
"""

from __future__ import annotations

import ctypes
import heapq
import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import ledger_mprpc
import ledger_pb2
from mprpc import MprpcConfig, RpcProvider
from reliability.member import say
from reliability.report import look, return_memory

_libc = ctypes.CDLL(None, use_errno=True)
_UNSPECIFIED = bytes(16)  # a sockaddr of AF_UNSPEC: connect(2) dissolves the association, tcp(7) with a reset
LATE_SPREAD = 3  # every such reset comes from a handler, in the middle of a turn; the others between turns


class Clock:
    """Resolves futures when their time has come, on a thread of its own."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Future[Any], Any]] = []
        self._changed = threading.Condition()
        self._count = 0
        threading.Thread(target=self._run, daemon=True, name="late").start()

    def later(self, seconds: float, result: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            self._count += 1
            entry = (time.monotonic() + seconds, self._count, future, result)
            heapq.heappush(self._due, entry)
            if self._due[0] is entry:
                self._changed.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due or self._due[0][0] > time.monotonic():
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                ripe = []
                while self._due and self._due[0][0] <= time.monotonic():
                    ripe.append(heapq.heappop(self._due))
            for _, _, future, result in ripe:
                if not future.cancelled():
                    future.set_result(result)


class Ledger(ledger_mprpc.LedgerRpc):
    """Answers with the question's number and note, when it is told to."""

    def __init__(self, calls: int, reset_every: int) -> None:
        self.ran = bytearray(bytes(calls))  # all of its pages are there from the start
        self._clock = Clock()
        self._process = os.getpid()
        self._reset_every = reset_every
        self._requests = 0
        self.resets = 0

    def Look(self, request: Any, controller: Any) -> Any:
        self.ran[request.number] = min(255, self.ran[request.number] + 1)
        self._requests += 1
        if self._reset_every and self._requests % self._reset_every == 0:
            self.resets += 1
            if self.resets % LATE_SPREAD:
                self._clock.later(0.0, None).add_done_callback(lambda _: reset_connections())
            else:
                reset_connections()
        receipt = ledger_pb2.Receipt(number=request.number, process=self._process, note=request.note)
        return self._clock.later(request.hold_ms / 1000, receipt) if request.hold_ms else receipt

    Book = Look


def reset_connections() -> int:
    """Resets every TCP connection of this process, under whoever is using it; how many there were."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            own = os.dup(int(name))  # so that the number stays this one's
            try:
                if not os.readlink(f"/proc/self/fd/{own}").startswith("socket:"):
                    continue
                connection = socket.socket(fileno=os.dup(own))
                with connection:
                    if connection.family == socket.AF_INET and connection.getpeername():
                        _libc.connect(own, _UNSPECIFIED, len(_UNSPECIFIED))
                        count += 1
            finally:
                os.close(own)
    return count


def main() -> None:
    orders = json.loads(sys.argv[1])
    return_memory()
    ledger = Ledger(orders["calls"], orders["reset_every"])
    provider = RpcProvider(MprpcConfig(**orders["config"]))
    provider.notify_service(ledger)
    provider.start()
    say(serving=provider.address)

    def listen() -> None:
        for line in sys.stdin:
            command, _, argument = line.strip().partition(" ")
            if command == "reset":
                say(reset=reset_connections())
            elif command == "look":
                say(look=look() | {"resets": ledger.resets})
            elif command == "ran":
                Path(argument).write_bytes(ledger.ran)
                say(ran=True)
        os._exit(3)  # whoever started it is gone

    threading.Thread(target=listen, daemon=True).start()
    provider.run()
    say(ended=True)


if __name__ == "__main__":
    main()
