"""A steady load on one channel, half of it by blocking threads and half as futures, every call of which is looked at.

with Load(channel, rate=500, timeout=2.0, seed=1) as load:
    phase = load.phase(20.0)     # what became of the calls that began within the next 20 seconds
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import generated
from mprpc import RpcError

if TYPE_CHECKING:
    from typing_extensions import Self

    from reliability.report import Report

BLOCKING = 24  # threads
PATIENCE = 30.0  # seconds for the calls of a phase to end, after their deadlines
NAP = 0.01  # seconds
_SLEEPER = f"""
import select, sys, time
late = []
while True:
    began = time.monotonic()
    if select.select([sys.stdin], [], [], {NAP})[0]:
        break
    late.append(time.monotonic() - began - {NAP})
print(*late or [0.0])
"""
SMALL = (0, 8, 64, 1000)

ledger_pb2 = generated.module("ledger_pb2")
ledger_mprpc = generated.module("ledger_mprpc")


class Phase:
    """The calls that began within some time. Under the load's lock."""

    def __init__(self) -> None:
        self.calls = self.ended = 0
        self.wrong: list[str] = []
        self.past = 0.0  # seconds past its deadline, the worst
        self.latest = ""
        self.processes: Counter[int] = Counter()  # who answered how many
        self.reasons: Counter[str] = Counter()  # of idempotent calls that failed
        self._answered, self._failed = Counter[bool](), Counter[bool]()
        self._times: list[float] = []

    @property
    def unended(self) -> int:
        return self.calls - self.ended

    def end(self, idempotent: bool, seconds: float, timeout: float, outcome: Any, wrong: str) -> None:
        self.ended += 1
        self._times.append(seconds)
        if seconds - timeout > self.past:
            self.past, self.latest = seconds - timeout, f"{type(outcome).__name__} {outcome}".replace("\n", " ")[:150]
        if wrong:
            self.wrong.append(wrong)
        if isinstance(outcome, BaseException):
            self._failed[idempotent] += 1
            if idempotent:
                self.reasons[f"{type(outcome).__name__}: {outcome}"[:160]] += 1
        else:
            self._answered[idempotent] += 1
            self.processes[outcome.process] += 1

    def success(self, idempotent: bool) -> float:
        """The share of those that were answered."""
        answered = self._answered[idempotent]
        return answered / max(1, answered + self._failed[idempotent])

    def late(self, share: float) -> float:
        """Seconds within which so many had ended."""
        times = sorted(self._times)
        return times[min(len(times) - 1, int(len(times) * share))] if times else 0.0


class Load:
    """The callers. `once` are the numbers of those that must not run twice, unless `keep` says not to keep them."""

    NUMBERS = 4_000_000  # of calls, at most

    def __init__(
        self,
        channel: Any,
        *,
        rate: float,
        timeout: float,
        seed: int,
        sizes: Sequence[int] = SMALL,
        first: int = 0,
        keep: bool = True,
    ) -> None:
        self.once: list[int] = []
        self.not_run: list[int] = []
        self._stub = ledger_mprpc.LedgerRpc_Stub(channel)
        self._timeout, self._sizes, self._keep = timeout, sizes, keep
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._phase = Phase()
        self.number = first
        self._over = threading.Event()
        self._open = threading.Event()
        self._open.set()
        share = rate / 2
        self._threads = [
            threading.Thread(target=self._pace, args=(share / BLOCKING, self._block, random.Random(seed * 1000 + i)))
            for i in range(BLOCKING)
        ]
        self._threads.append(
            threading.Thread(target=self._pace, args=(share, self._submit, random.Random(seed * 1000 + BLOCKING)))
        )

    def _pace(self, rate: float, call: Any, dice: random.Random) -> None:
        due = time.monotonic() + dice.random() / rate
        while not self._over.wait(max(0.0, due - time.monotonic())):
            self._open.wait()
            call(dice)
            due = max(due + 1 / rate, time.monotonic() - 1.0)  # a second is caught up with, not a minute

    def _ask(self, dice: random.Random) -> tuple[Phase, Any, Any, bool, float]:
        idempotent = dice.random() < 0.5
        with self._lock:
            self.number += 1
            number, phase = self.number, self._phase
            phase.calls += 1
            if not idempotent and self._keep:
                self.once.append(number)
        entry = ledger_pb2.Entry(
            number=number,
            hold_ms=dice.randint(1, 30) if dice.random() < 0.1 else 0,
            note=number.to_bytes(8, "little") * (dice.choice(self._sizes) // 8),
        )
        return phase, entry, self._stub.Look if idempotent else self._stub.Book, idempotent, time.monotonic()

    def _block(self, dice: random.Random) -> None:
        phase, entry, method, idempotent, began = self._ask(dice)
        try:
            outcome = method(entry, timeout=self._timeout)
        except Exception as error:
            outcome = error
        self._end(phase, entry, idempotent, began, outcome)

    def _submit(self, dice: random.Random) -> None:
        phase, entry, method, idempotent, began = self._ask(dice)
        try:
            future = method.future(entry, timeout=self._timeout)
        except RpcError as error:
            self._end(phase, entry, idempotent, began, error)
            return

        def done(future: Any) -> None:
            self._end(phase, entry, idempotent, began, future.exception() or future.result())

        future.add_done_callback(done)

    def _end(self, phase: Phase, entry: Any, idempotent: bool, began: float, outcome: Any) -> None:
        seconds = time.monotonic() - began
        wrong = ""
        if isinstance(outcome, ledger_pb2.Receipt):
            if outcome.number != entry.number or outcome.note != entry.note:
                wrong = f"call {entry.number} got the answer of {outcome.number}"
        elif not isinstance(outcome, RpcError):
            wrong = f"call {entry.number} ended with {outcome!r}"
        with self._changed:
            if isinstance(outcome, RpcError) and outcome.not_run and self._keep:
                self.not_run.append(entry.number)
            phase.end(idempotent, seconds, self._timeout, outcome, wrong)
            self._changed.notify_all()

    def phase(self, seconds: float) -> Phase:
        """What became of the calls that begin from now on, for so long; waits until all of them have ended."""
        with self._lock:
            phase = self._phase = Phase()
        self._over.wait(seconds)
        with self._changed:
            self._phase = Phase()
            self._changed.wait_for(lambda: not phase.unended, self._timeout + PATIENCE)
        if phase.unended:
            phase.wrong.append(f"{phase.unended} calls never ended")
        return phase

    @contextmanager
    def still(self) -> Iterator[int]:
        """Meanwhile there are no calls. How many have not ended, though their deadlines are long past."""
        self._open.clear()
        with self._changed:
            self._changed.wait_for(lambda: not self._phase.unended, self._timeout + PATIENCE)
            unended = self._phase.unended
        try:
            yield unended
        finally:
            self._open.set()

    def end(self) -> Phase:
        """No more calls; the last ones, when they have ended."""
        self._over.set()
        self._open.set()
        for thread in self._threads:
            thread.join()
        with self._changed:
            self._changed.wait_for(lambda: not self._phase.unended, self._timeout + PATIENCE)
        return self._phase

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Yardstick:
    """How late a thread of this process wakes that sleeps for 10 ms, and how late a process that does nothing else: the
    second is the machine, the first the interpreter's lock as well. Use it with `with`."""

    def __init__(self) -> None:
        self._late = array("d")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            self._ended.wait(NAP)
            self._late.append(time.monotonic() - began - NAP)

    def __enter__(self) -> Self:
        self._sleeper = subprocess.Popen(
            [sys.executable, "-c", _SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._of_process = array("d", map(float, self._sleeper.communicate()[0].split()))

    def tell(self, report: Report) -> None:
        for who, lateness in ("thread", self._late), ("process", self._of_process):
            late = sorted(lateness)
            tail, worst = late[-1 - len(late) // 1000] * 1000, late[-1] * 1000
            text = f"99.9 % {tail:.1f} ms, worst {worst:.1f} ms (n={len(late):,})"
            report.row(f"a sleeping {who} wakes late by", text)
