"""The hunt for an answer that reaches the wrong call: many threads on one connection that is reset again and again.

A third of the calls give up after 10 ms while their handler answers around that moment or later, so that late answers
come all the time, to a connection on which others wait. Every answer is compared with its question, byte for byte;
every call must end once, in time; what failed as `not_run` must not have run, and what must not run twice has not.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

import generated
from mprpc import AsyncMprpcChannel, DeadlineExceeded, MprpcChannel, RpcError, Unavailable
from reliability.fleet import PATIENCE, Fleet
from reliability.load import Yardstick
from reliability.report import SHOWN, Report

THREADS = 64
SHAPES = 99_991  # of calls; a prime, so that no two threads have the same in the same order
RESET_EVERY = 500
SHORT, LONG = 0.010, 20.0  # seconds: the deadlines of those that give up, and of the others
HOLD_MS = (8, 30)
THINK = 0.008  # seconds at most between a thread's calls: else they would wait for the interpreter, not for answers
FLYING = 8  # futures, and tasks, in flight
EXCESS_RARE, EXCESS_WORST = 0.050, 0.500  # seconds past the deadline: the 99.999th percentile, and the worst
ANSWERED, LATE, LOST, CANCELLED = "answered", "out of time", "lost by a reset", "cancelled"

ledger_pb2 = generated.module("ledger_pb2")
ledger_mprpc = generated.module("ledger_mprpc")


class Shape(NamedTuple):
    """What a call is like, but for its number. Thrown beforehand: who throws dice for each call of 64 threads has the
    interpreter's lock for as long as all the rest of the call takes, and that is what calls would be late by."""

    idempotent: bool
    timeout: float
    hold_ms: int
    size: int  # of the note, in numbers

    @classmethod
    def thrown(cls, dice: random.Random) -> Shape:
        gives_up = dice.random() < 1 / 3
        hold = dice.randint(*HOLD_MS) if gives_up else 1 if dice.random() < 0.05 else 0
        # Most notes are small, some larger than what a call has room for, so that they go other ways.
        size = dice.choice((1, 2, 8)) if dice.random() < 0.98 else dice.choice((500, 1100, 2500))
        return cls(dice.random() < 0.5, SHORT if gives_up else LONG, hold, size)


class Question:
    """One call to make: what is asked, how long it may take, and what answer alone is right."""

    __slots__ = ("began", "ended", "entry", "idempotent", "number", "timeout")

    def __init__(self, number: int, shape: Shape) -> None:
        self.number = number
        self.idempotent = shape.idempotent
        self.timeout = shape.timeout
        note = number.to_bytes(8, "little") * shape.size  # of no two calls alike
        self.entry = ledger_pb2.Entry(number=number, hold_ms=shape.hold_ms, note=note)
        self.began = self.ended = 0.0

    def answers(self, receipt: Any) -> bool:
        return bool(receipt.number == self.number and receipt.note == self.entry.note)


class Tally:
    """How calls ended; one thread's, and added up after."""

    def __init__(self, face: str = "") -> None:
        self._face = face
        self.latest: tuple[float, str] = (0.0, "nobody")  # seconds past the deadline, and who
        self.ends: Counter[str] = Counter()
        self.excess = array("d")  # seconds past the deadline, of those that were
        self.wrong: list[str] = []
        self.not_run: list[tuple[int, str]] = []  # not the errors: all frames of their tracebacks would stay

    def end(self, question: Question, outcome: Any, *, cancelled: bool = False) -> None:
        now = time.monotonic()
        if question.ended:
            self.wrong.append(f"call {question.number} ended twice, the second time with {_said(outcome)}")
            return
        question.ended = now
        past = now - question.began - question.timeout
        if past > 0:
            self.excess.append(past)
            if past > self.latest[0]:
                self.latest = past, f"{self._face} with {question.timeout * 1000:.0f} ms: {_said(outcome)}"
        self.ends[self._kind(question, outcome, past, cancelled)] += 1

    def _kind(self, question: Question, outcome: Any, past: float, cancelled: bool) -> str:
        if isinstance(outcome, RpcError) and outcome.not_run:
            self.not_run.append((question.number, _said(outcome)))
        if isinstance(outcome, ledger_pb2.Receipt):
            if not question.answers(outcome):
                self.wrong.append(f"call {question.number} got the answer of {outcome.number}")
            return ANSWERED
        if isinstance(outcome, DeadlineExceeded):
            if past < 0:
                self.wrong.append(
                    f"call {question.number} gave up {-past * 1000:.1f} ms before its deadline: {_said(outcome)}"
                )
            return LATE
        if isinstance(outcome, Unavailable):
            return LOST
        if cancelled and isinstance(outcome, (CancelledError, asyncio.CancelledError)):
            return CANCELLED
        self.wrong.append(f"call {question.number} ended with {_said(outcome)}")
        return "otherwise"

    def add(self, other: Tally) -> None:
        self.ends += other.ends
        self.latest = max(self.latest, other.latest)
        self.excess += other.excess
        self.wrong += other.wrong
        self.not_run += other.not_run


def _said(outcome: Any) -> str:
    return f"{type(outcome).__name__}: {outcome}"[:200]


class Hunt:
    """The callers of one run. `numbers` of a part are its own; `over` ends it early."""

    def __init__(self, address: str, seed: int, calls: int, over: Callable[[], bool]) -> None:
        self.address = address
        self.channel = MprpcChannel(address)
        self.asked = 0
        self._stub = ledger_mprpc.LedgerRpc_Stub(self.channel)
        dice = random.Random(seed)
        self._shapes = [Shape.thrown(dice) for _ in range(SHAPES)]
        gc.freeze()  # calls are not to wait while the collector looks at these
        self._over = over
        self._parts = [Tally("a blocking call") for _ in range(THREADS)] + [Tally("a future"), Tally("a task")]
        self._share = calls // (THREADS + 8)  # the flyer and the event loop get four threads' share each

    def run(self) -> Tally:
        """Makes all calls, and waits for their ends."""
        threads = [threading.Thread(target=self._block, args=(part,)) for part in range(THREADS)]
        threads.append(threading.Thread(target=self._fly, args=(THREADS,)))
        threads.append(threading.Thread(target=lambda: asyncio.run(self._go(THREADS + 1))))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        total = Tally()
        for part in self._parts:
            total.add(part)
        self.channel.close()
        return total

    def done(self) -> int:
        return sum(sum(part.ends.values()) for part in self._parts)

    def _questions(self, part: int) -> Iterator[Question]:
        """The part's calls; a part of flyers or tasks has four threads' numbers."""
        first = part if part <= THREADS else THREADS + 4
        count = self._share * (1 if part < THREADS else 4)
        for number in range(first * self._share, first * self._share + count):
            if self._over():
                return
            yield Question(number, self._shapes[number % SHAPES])

    def _method(self, stub: Any, question: Question) -> Any:
        return stub.Look if question.idempotent else stub.Book

    def _block(self, part: int) -> None:
        tally = self._parts[part]
        dice = random.Random(part)
        for question in self._questions(part):
            time.sleep(dice.uniform(0.0, THINK))
            question.began = time.monotonic()
            try:
                outcome = self._method(self._stub, question)(question.entry, timeout=question.timeout)
            except Exception as error:
                outcome = error
            tally.end(question, outcome)

    def _fly(self, part: int) -> None:
        """The same connection's calls that nobody waits for; every seventh is cancelled, before or after its end."""
        tally, room, lock = self._parts[part], threading.Semaphore(FLYING), threading.Lock()

        def end(question: Question, future: Any) -> None:
            cancelled = future.cancelled()
            outcome = CancelledError() if cancelled else future.exception() or future.result()
            with lock:
                tally.end(question, outcome, cancelled=True)
            room.release()

        for question in self._questions(part):
            room.acquire()
            question.began = time.monotonic()
            try:
                future = self._method(self._stub, question).future(question.entry, timeout=question.timeout)
            except RpcError as error:
                with lock:
                    tally.end(question, error)
                room.release()
                continue
            future.add_done_callback(lambda future, question=question: end(question, future))
            if question.number % 7 == 0:
                future.cancel()
        for _ in range(FLYING):
            if not room.acquire(timeout=LONG + PATIENCE):
                tally.wrong.append("a future never ended")

    async def _go(self, part: int) -> None:
        """An event loop, on a connection of its own; every seventh task is cancelled."""
        tally, questions = self._parts[part], self._questions(part)

        async def worker(stub: Any) -> None:
            for question in questions:
                question.began = time.monotonic()
                task = asyncio.ensure_future(self._method(stub, question)(question.entry, timeout=question.timeout))
                if question.number % 7 == 0:
                    asyncio.get_running_loop().call_later(question.number % 5 / 1000, task.cancel)
                try:
                    outcome = await task
                except (Exception, asyncio.CancelledError) as error:
                    outcome = error
                tally.end(question, outcome, cancelled=True)

        async with AsyncMprpcChannel(self.address) as channel:
            await asyncio.gather(*(worker(ledger_mprpc.LedgerRpc_AsyncStub(channel)) for _ in range(FLYING)))


def hunt(*, seed: int, count: int, minutes: float) -> int:
    """`count` calls; they end early after `minutes`."""
    report = Report("stale-answer hunt", seed)
    run(report, seed=seed, count=count, minutes=minutes)
    return report.finish()


def run(report: Report, *, seed: int, count: int, minutes: float) -> Tally:
    end = time.monotonic() + minutes * 60
    orders = {"config": {"rpcserverport": 0}, "calls": count, "reset_every": RESET_EVERY}
    with Fleet() as fleet:
        provider = fleet.start("laggard", "reliability.laggard", json.dumps(orders))
        fleet.wait(lambda: "serving" in provider.told, "the provider")
        subject = Hunt(provider.told["serving"], seed, count, lambda: time.monotonic() > end)
        ended = threading.Event()

        def progress() -> None:
            while not ended.wait(20.0):
                report.progress(f"{subject.done():,} calls")

        watcher = threading.Thread(target=progress)
        watcher.start()
        with Yardstick() as yardstick:
            total = subject.run()
        ended.set()
        watcher.join()
        path = fleet.directory / "ran"
        provider.order(f"ran {path}")
        fleet.wait(lambda: "ran" in provider.told, "the provider's counts")
        ran = path.read_bytes()
        resets = provider.ask("look")["resets"]
        if logs := fleet.logs():
            report.breach(f"the provider said on standard error: {logs}")
    judge(report, total, ran, yardstick)
    report.row("resets of every connection", f"{resets:,}")
    return total


def judge(report: Report, total: Tally, ran: bytes, yardstick: Yardstick) -> None:
    calls = sum(total.ends.values())
    for text in total.wrong[:SHOWN]:
        report.breach(text)
    lied = [said for number, said in total.not_run if ran[number]]
    for said in lied[:SHOWN]:
        report.breach(f"a call was said not to have run, but it did: {said}")
    excess = sorted(total.excess)
    rare = excess[-1 - calls // 100_000] if excess else 0.0
    worst = excess[-1] if excess else 0.0
    if rare > EXCESS_RARE:
        report.breach(f"99.999 % of the calls ended within {rare * 1000:.0f} ms of their deadline")
    if worst > EXCESS_WORST:
        report.breach(f"a call ended {worst * 1000:.0f} ms past its deadline")
    report.row("calls", f"{calls:,}, {calls / report.seconds:,.0f} a second")
    report.row("ends", ", ".join(f"{kind} {count:,}" for kind, count in total.ends.most_common()))
    report.row("wrong answers, double or missing ends", len(total.wrong))
    report.row("said not to have run", f"{len(total.not_run):,}, of which {len(lied):,} did")
    report.row("past the deadline", f"99.999 % {rare * 1000:.1f} ms, worst {worst * 1000:.1f} ms")
    report.row("the latest", total.latest[1])
    yardstick.tell(report)
