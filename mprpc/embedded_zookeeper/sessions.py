"""Sessions: who they are, and which of them have not been heard of for too long.

A session outlives its connections. Hearing of one only moves its deadline later, so the earliest deadline found at
the last look is a time before which nothing can be due: that is when the loop next wakes, and hearing of a session
costs one addition.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Generic, TypeVar

from .clock import Clock
from .protocol import PASSWORD_BYTES

PeerT = TypeVar("PeerT")


class Session(Generic[PeerT]):
    """One client's session; `peer` is the connection it is on now, `closing` means lost but not yet purged."""

    __slots__ = ("closing", "deadline", "id", "password", "peer", "timeout_ms")

    def __init__(self, session_id: int, timeout_ms: int) -> None:
        self.id = session_id
        self.password = os.urandom(PASSWORD_BYTES)
        self.timeout_ms = timeout_ms
        self.deadline = math.inf
        self.peer: PeerT | None = None
        self.closing = False


class Sessions(Generic[PeerT]):
    """All sessions by id. Ids count up from the time of the start, as the real server's do."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._by_id: dict[int, Session[PeerT]] = {}
        self._next_id = 1 << 56 | (clock.wall_ms() << 24 & 2**64 - 1) >> 8
        self._next_look = math.inf
        self._held = False

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Session[PeerT]]:
        return iter(list(self._by_id.values()))

    def open(self, timeout_ms: int) -> Session[PeerT]:
        session: Session[PeerT] = Session(self._next_id, timeout_ms)
        self._next_id += 1
        self._by_id[session.id] = session
        self.heard_of(session)
        return session

    def find(self, session_id: int) -> Session[PeerT] | None:
        return self._by_id.get(session_id)

    def remove(self, session: Session[PeerT]) -> None:
        self._by_id.pop(session.id, None)

    def heard_of(self, session: Session[PeerT]) -> None:
        session.deadline = self._clock.monotonic() + session.timeout_ms / 1000
        self._next_look = min(self._next_look, session.deadline)

    def hear_of_all(self) -> None:
        """After the server was away: every session gets its whole timeout again, as after a restart of a real one."""
        for session in self._by_id.values():
            self.heard_of(session)

    @property
    def next_look(self) -> float:
        """Before this moment `due` has nothing to tell."""
        return math.inf if self._held else self._next_look

    def due(self) -> list[Session[PeerT]]:
        """The sessions whose timeout has passed, those already closing not among them."""
        now = self._clock.monotonic()
        if now < self.next_look:
            return []
        alive = [session for session in self._by_id.values() if not session.closing]
        self._next_look = min((session.deadline for session in alive if session.deadline > now), default=math.inf)
        return [session for session in alive if session.deadline <= now]

    def hold(self, held: bool) -> None:
        """While held no session is ever due; released, those that ran out meanwhile are."""
        self._held = held
