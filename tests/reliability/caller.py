"""Consumers as a process:  python -m reliability.caller ORDERS

ORDERS (JSON): `number` of this process, `config`, `channels`, `rate` (calls a second of all channels), `timeout`.
Each channel is a consumer; half of its calls are made by blocking threads, half as futures. Every second call is the
idempotent Look, every tenth is held back by its handler, so that something is always in flight.

It tells by lines of JSON: each failed call, each new list, each connection that could not be made, and, every
half second, how many calls there were and who answered them. Commands: those of `member.py`, and `end`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from typing import Any

import ledger_mprpc
import ledger_pb2
import mprpc.subchannel
from mprpc import MprpcChannel, MprpcConfig, RpcError
from mprpc.probe import probe
from mprpc.registry import Registry, Snapshot
from reliability.fleet import SERVICE
from reliability.member import obey, say

HOLD_MS = 20
BLOCKING_THREADS = 4
TOLD_SECONDS = 0.5
FIRST_SECONDS = 30.0  # for the first list


class Tally:
    """What happened since it was last told. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.calls = 0
        self.processes: dict[int, list[float]] = {}  # by process: calls answered, when the first of them was
        self.slowest = 0.0
        self.booked: list[int] = []

    def answered(self, number: int, idempotent: bool, process: int, began: float) -> None:
        now = time.monotonic()
        with self._lock:
            self.calls += 1
            self.processes.setdefault(process, [0, now])[0] += 1
            self.slowest = max(self.slowest, now - began)
            if not idempotent:
                self.booked.append(number)

    def failed(self, idempotent: bool, began: float, error: BaseException) -> None:
        with self._lock:
            self.calls += 1
        status = getattr(error, "status", None)
        say(
            failed={
                "idempotent": idempotent,
                "began": began,
                "status": "?" if status is None else status.name,
                "not_run": getattr(error, "not_run", None),
                "text": f"{type(error).__name__}: {error}",
            }
        )

    def tell(self) -> None:
        with self._lock:
            told = {
                "calls": self.calls, "slowest": self.slowest, "booked": self.booked,
                "processes": [[process, *seen] for process, seen in self.processes.items()],
            }  # fmt: skip
            self._clear()
        say(tally=told)


class Consumer:
    """One channel and the threads that call through it."""

    def __init__(self, orders: dict[str, Any], index: int, tally: Tally, ended: threading.Event) -> None:
        self.channel = MprpcChannel(MprpcConfig(**orders["config"]), timeout=orders["timeout"])
        self._stub = ledger_mprpc.LedgerRpc_Stub(self.channel)
        self._rate = orders["rate"] / orders["channels"]
        self._tally = tally
        self._ended = ended
        self._next = (orders["number"] * 1000 + index) << 40
        self._lock = threading.Lock()
        self.in_flight = 0

    def start(self) -> list[threading.Thread]:
        share = self._rate / 2
        blocking = (share / BLOCKING_THREADS, self._block)
        threads = [threading.Thread(target=self._pace, args=blocking) for _ in range(BLOCKING_THREADS)]
        threads.append(threading.Thread(target=self._pace, args=(share, self._submit)))
        for thread in threads:
            thread.start()
        return threads

    def _pace(self, rate: float, call: Any) -> None:
        due = time.monotonic() + random.random() / rate
        while not self._ended.wait(max(0.0, due - time.monotonic())):
            call(*self._entry())
            due = max(due + 1 / rate, time.monotonic() - 1.0)  # a second is caught up with, not a minute

    def _entry(self) -> tuple[Any, Any, bool]:
        with self._lock:
            self._next += 1
            number = self._next
        entry = ledger_pb2.Entry(number=number, hold_ms=HOLD_MS if number % 20 in (4, 7) else 0)
        idempotent = number % 2 == 0
        return entry, self._stub.Look if idempotent else self._stub.Book, idempotent

    def _block(self, entry: Any, method: Any, idempotent: bool) -> None:
        began = time.monotonic()
        try:
            receipt = method(entry)
        except RpcError as error:
            self._tally.failed(idempotent, began, error)
        else:
            self._receive(receipt, entry, idempotent, began)

    def _submit(self, entry: Any, method: Any, idempotent: bool) -> None:
        began = time.monotonic()

        def done(future: Any) -> None:
            error = future.exception()
            if error is None:
                self._receive(future.result(), entry, idempotent, began)
            else:
                self._tally.failed(idempotent, began, error)
            with self._lock:
                self.in_flight -= 1

        with self._lock:
            self.in_flight += 1
        try:
            method.future(entry).add_done_callback(done)
        except RpcError as error:
            self._tally.failed(idempotent, began, error)
            with self._lock:
                self.in_flight -= 1

    def _receive(self, receipt: Any, entry: Any, idempotent: bool, began: float) -> None:
        if receipt.number != entry.number:
            self._tally.failed(idempotent, began, AssertionError(f"{receipt.number} answered {entry.number}"))
        else:
            self._tally.answered(entry.number, idempotent, receipt.process, began)


def tell_attempts() -> None:
    """Have every connection that can't be made told."""
    reach = mprpc.subchannel.Subchannel._reach

    def told(self: Any, deadline: int) -> Any:
        try:
            return reach(self, deadline)
        except RpcError as error:
            say(unreached=self.address, consumer=id(self), text=error.text)
            raise

    mprpc.subchannel.Subchannel._reach = told  # type: ignore[method-assign]


def tell_list(snapshot: Snapshot) -> None:
    say(list=[endpoint.address for endpoint in snapshot.endpoints], confirmed=snapshot.confirmed)


def main() -> None:
    orders = json.loads(sys.argv[1])
    tell_attempts()
    tally, ended = Tally(), threading.Event()
    registry = Registry.open(MprpcConfig(**orders["config"]), probe)
    view = registry.follow(SERVICE, ("Look", "Book"))
    view.on_change(tell_list)
    tell_list(view.wait(FIRST_SECONDS, for_provider=True))
    consumers = [Consumer(orders, index, tally, ended) for index in range(orders["channels"])]
    threads = [thread for consumer in consumers for thread in consumer.start()]

    def tell() -> None:
        while not ended.wait(TOLD_SECONDS):
            tally.tell()

    teller = threading.Thread(target=tell)
    teller.start()
    for line in sys.stdin:
        if line.strip() == "end":
            break
        obey(line.strip(), registry)
    else:
        os._exit(3)  # whoever started it is gone
    ended.set()
    for thread in (*threads, teller):
        thread.join()
    deadline = time.monotonic() + orders["timeout"] + 1
    while any(consumer.in_flight for consumer in consumers) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    tally.tell()
    for consumer in consumers:
        consumer.channel.close()
    registry.close()
    say(ended=True)


if __name__ == "__main__":
    main()
