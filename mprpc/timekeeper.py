"""The timekeeper: has done what is due later, such as probing an endpoint when its rest ends.

A few threads of the process, which are there only while something is due. It holds what it is to call weakly: nothing
is kept alive by being due, and what is gone is not called. What it calls may block, for as long as a probe takes.
"""

from __future__ import annotations

import heapq
import logging
import os
import threading
import time
import weakref
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_THREADS", "at", "forget"]

MAX_THREADS = 8
"""Probes under way at once: eight get through a hundred dead endpoints in a dozen connect timeouts."""

_LINGER = 0.05  # seconds that a thread waits for something to become due before it ends

_log = logging.getLogger("mprpc.timekeeper")


class _Timekeeper:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, weakref.WeakMethod[Callable[[], object]]]] = []
        self._numbers = count()
        self._threads = self._waiting = 0

    def at(self, when: float, method: Callable[[], object]) -> None:
        with self._changed:
            heapq.heappush(self._due, (when, next(self._numbers), weakref.WeakMethod(method)))
            self._call_somebody()

    def forget(self, owner: object) -> None:
        with self._changed:
            self._due = [each for each in self._due if getattr(each[2](), "__self__", owner) is not owner]
            heapq.heapify(self._due)
            self._changed.notify_all()

    def _call_somebody(self) -> None:
        if self._waiting:
            self._changed.notify()
        elif self._threads < MAX_THREADS:
            self._threads += 1
            threading.Thread(target=self._run, name="mprpc-timekeeper", daemon=True).start()

    def _run(self) -> None:
        while (what := self._next()) is not None:
            method = what()
            if method is None:
                continue
            try:
                method()
            except Exception:
                _log.exception("what was due failed")
            del method  # or it would be kept alive until something else is due

    def _next(self) -> weakref.WeakMethod[Callable[[], object]] | None:
        """Waits for what is due next; None ends the thread."""
        with self._changed:
            idle = False
            while True:
                left = self._due[0][0] - time.monotonic() if self._due else _LINGER
                if self._due and left <= 0:
                    what = heapq.heappop(self._due)[2]
                    if self._due:
                        self._call_somebody()
                    return what
                if idle and not self._due:
                    self._threads -= 1
                    return None
                self._waiting += 1
                idle = not self._changed.wait(left)
                self._waiting -= 1


_timekeeper = _Timekeeper()


def at(when: float, method: Callable[[], object]) -> None:
    """Has a bound method called at that time (monotonic seconds) or a little later, on a thread of its own, unless its
    object is gone by then. Any thread."""
    _timekeeper.at(when, method)


def forget(owner: object) -> None:
    """Nothing of that object is due any more, nor what is gone anyway; what is being called goes on. Any thread."""
    _timekeeper.forget(owner)


def _after_fork() -> None:
    global _timekeeper
    _timekeeper = _Timekeeper()


os.register_at_fork(after_in_child=_after_fork)
