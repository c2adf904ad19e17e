"""The timekeeper: what is due is done in order, what is gone or forgotten is not, and no thread stays."""

from __future__ import annotations

import threading
import time

import wire
from mprpc import timekeeper


class Errand:
    def __init__(self, log: list[str], name: str = "") -> None:
        self._log, self._name = log, name
        self.done, self.go_on = threading.Event(), threading.Event()

    def run(self) -> None:
        self._log.append(self._name)
        self.done.set()

    def block(self) -> None:
        self.done.set()
        self.go_on.wait(wire.PATIENCE)

    def fail(self) -> None:
        self.done.set()
        raise ValueError("on purpose")


def test_what_is_due_is_done_in_order_and_not_before() -> None:
    log: list[str] = []
    now = time.monotonic()
    errands = [Errand(log, name) for name in ("third", "first", "second")]
    for errand, wait in zip(errands, (0.3, 0.1, 0.2), strict=True):
        timekeeper.at(now + wait, errand.run)
    assert errands[0].done.wait(wire.PATIENCE)
    assert time.monotonic() >= now + 0.3
    assert log == ["first", "second", "third"]


def test_one_that_blocks_or_fails_holds_up_nobody() -> None:
    blocked, failed, last = Errand([]), Errand([]), Errand([])
    for method in (blocked.block, failed.fail, last.run):
        timekeeper.at(0.0, method)
    assert last.done.wait(wire.PATIENCE)
    assert blocked.done.wait(wire.PATIENCE)
    assert failed.done.wait(wire.PATIENCE)
    blocked.go_on.set()


def test_threads_are_bounded() -> None:
    errands = [Errand([]) for _ in range(timekeeper.MAX_THREADS + 5)]
    for errand in errands:
        timekeeper.at(0.0, errand.block)
    for errand in errands[: timekeeper.MAX_THREADS]:
        assert errand.done.wait(wire.PATIENCE)
    assert sum(thread.name == "mprpc-timekeeper" for thread in threading.enumerate()) == timekeeper.MAX_THREADS
    assert not any(errand.done.is_set() for errand in errands[timekeeper.MAX_THREADS :])
    for errand in errands:
        errand.go_on.set()
    assert errands[-1].done.wait(wire.PATIENCE)


def test_what_is_gone_or_forgotten_is_not_done() -> None:
    log: list[str] = []
    gone, forgotten, last = (Errand(log, name) for name in ("gone", "forgotten", "last"))
    now = time.monotonic()
    for errand in (gone, forgotten):
        timekeeper.at(now + 0.5, errand.run)
    timekeeper.at(now + 0.6, last.run)
    del gone, errand
    timekeeper.forget(forgotten)
    assert last.done.wait(wire.PATIENCE)
    assert log == ["last"]


def test_nobody_waits_for_what_was_forgotten() -> None:
    """The suite fails a test that leaves a thread behind."""
    errand = Errand([])
    timekeeper.at(time.monotonic() + 3600.0, errand.run)
    timekeeper.forget(errand)
