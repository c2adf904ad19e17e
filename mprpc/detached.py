"""The calls that a loop has let go of, each of which is answered once, later, on any thread.

A call is here from the moment it is let go of until its answer is under way; so a caller that gives up is found by its
connection and call id. A Future that a handler has returned may never end: such a call is promised, and whoever comes
first, the Future's end, its caller's giving up, or the deadline, ends it; the others find nothing to do.

The handler's work may go on behind a call that was abandoned, where no limit of calls in flight sees it. So only so
many are abandoned; past that calls stay in flight until their Futures end, and who begins and cancels all the time is
refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

__all__ = ["DetachedCalls"]

_ABANDONED_MAX = 10_000  # calls of one loop whose Futures have not ended
_PACE = 0.02  # seconds at least between two looks at all promised calls,
_LOOK = 1e-5  # and so many for each of them, so that looking costs little


class _Call(Protocol):
    @property
    def key(self) -> tuple[int, int]:
        """Its connection, and its id there."""


Call = TypeVar("Call", bound=_Call)


class DetachedCalls(Generic[Call]):
    """One loop's. All methods: any thread. `remind`: called with the monotonic time at which to ask for `expired`."""

    def __init__(self, remind: Callable[[float], None]) -> None:
        self._remind = remind
        self._lock = threading.Lock()
        self._calls: dict[int, dict[int, Call]] = {}  # by connection
        self._promised: dict[Call, float] = {}  # until when
        self._abandoned: set[Call] = set()
        self._due = float("inf")

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._calls.values()))

    def add(self, call: Call) -> None:
        """Has been let go of."""
        connection, number = call.key
        with self._lock:
            self._calls.setdefault(connection, {})[number] = call

    def remove(self, call: Call) -> None:
        """Has its answer."""
        connection, number = call.key
        with self._lock:
            calls = self._calls.get(connection, {})
            if calls.get(number) is call:
                del calls[number]
            if not calls:
                self._calls.pop(connection, None)

    def give_up(self, connection: int, number: int) -> list[Call]:
        """Removes and returns the call that nobody waits for any more; number 0: all calls of that connection."""
        with self._lock:
            calls = self._calls.get(connection, {})
            if number == 0 or calls.keys() == {number}:
                self._calls.pop(connection, None)
                return list(calls.values())
            call = calls.pop(number, None)
            return [] if call is None else [call]

    def promise(self, call: Call, deadline: float | None) -> None:
        """A Future will end it, by its deadline (monotonic seconds; None: there is none)."""
        with self._lock:
            self._promised[call] = until = float("inf") if deadline is None else deadline
            sooner = until < self._due
            if sooner:
                self._due = until
        if sooner:
            self._remind(until)

    def fulfil(self, call: Call) -> bool:
        """Its Future has ended: whether who asks is to answer it, for nobody has yet."""
        with self._lock:
            self._abandoned.discard(call)
            return self._promised.pop(call, None) is not None

    def abandon(self, call: Call) -> bool:
        """Its caller has given up: whether who asks is to answer it, before its Future has ended."""
        with self._lock:
            return self._abandon(call)

    def _abandon(self, call: Call) -> bool:
        if call not in self._promised or len(self._abandoned) >= _ABANDONED_MAX:
            return False
        del self._promised[call]
        self._abandoned.add(call)
        return True

    def expired(self, now: float) -> list[Call]:
        """Those whose deadline has passed, abandoned: who asks is to answer them. Asks for the next reminder."""
        if now < self._due:
            return []
        with self._lock:
            late = [call for call, until in self._promised.items() if until <= now]
            late = [call for call in late if self._abandon(call)]
            first = min(self._promised.values(), default=float("inf"))
            self._due = due = max(first, now + _PACE + _LOOK * len(self._promised))
        if due != float("inf"):
            self._remind(due)
        return late
