"""How many requests may be under way at once, found out while they run: a limit that follows the latency (a gradient).

What is let in adds to the latency only once it has to wait for others. So the limit is judged by what it led to, many
times a second: where requests take no longer than they do unhindered, it rises by its square root, room for a queue
that keeps everybody busy; where they take longer than `_TOLERANCE` times that, it falls in proportion. What they take
unhindered is the least that was seen; it may rise, too, so under overload the limit is lowered for a moment now and
then, to look.

A sans-I/O decision: windows (what a gate of the loop let through, `_gate.h`) and the time go in, the limit comes out.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

__all__ = ["FIRST", "PERIOD", "Limiter", "Window"]

PERIOD = 0.05  # seconds of a window
FIRST = 64  # requests that are let in before anything is known

_LEAST, _MOST = 1, 100_000
_TOLERANCE = 2.0  # times the unhindered latency: what waiting may add
_FLOOR = 0.004  # seconds: a latency below is no sign of overload, whatever it was before
_FALL = 0.5  # of the limit, at most, in one window
_LOOK_FIRST, _LOOK_EVERY = 1.0, 10.0  # seconds between two looks at the unhindered latency: each twice the last
_LOOK_AT = 4  # then the limit is so many times lower, until the queue is empty and one window has been measured
_WAIT = 0.5  # seconds, at most, for a change to show in the latency
_STUCK = 1.0  # seconds in which requests were refused and none ended, before a few more are let in


class Window(NamedTuple):
    """What went through since the last one. `latency`: seconds, the mean from receipt to answer of the `samples` that
    ran; `peak`: the most requests that were under way at once; `refused`: those that were not let in."""

    samples: int
    latency: float
    refused: int
    peak: int


class Limiter:
    """One limit. Not for several threads."""

    def __init__(self, now: float) -> None:
        self.limit = FIRST
        self.unhindered = float("inf")  # seconds
        self._exact = float(FIRST)
        self._looking = 0  # windows that are left of a look
        self._look_every = _LOOK_FIRST
        self._look_at = now + self._look_every
        self._shows_at = now  # when the last change can be seen in the latency
        self._moved_at = now  # when a request last ended, or none was refused

    def update(self, now: float, window: Window) -> int:
        """The limit from now on."""
        if window.samples or not window.refused:
            self._moved_at = now
        if self._looking:
            self._look(now, window)
        elif window.samples:
            self.unhindered = min(self.unhindered, window.latency)
            if now >= self._shows_at:
                self._follow(window)
                self._shows_at = now + min(window.latency, _WAIT)
            if window.refused and now >= self._look_at:
                self._looking = 2 + int(2 * min(window.latency, _WAIT) / PERIOD)
        elif now - self._moved_at >= _STUCK:  # all that is under way takes long, or was given up and never ends
            self._exact += sqrt(self._exact)
            self._moved_at = now
        self._exact = min(max(self._exact, _LEAST), _MOST)
        self.limit = max(_LEAST, int(self._exact) // (_LOOK_AT if self._looking else 1))
        return self.limit

    def _look(self, now: float, window: Window) -> None:
        self._looking -= 1
        if self._looking == 0:
            self._look_every = min(2 * self._look_every, _LOOK_EVERY)
            self._look_at = now + self._look_every
            if window.samples:
                self.unhindered = window.latency

    def _follow(self, window: Window) -> None:
        allowed = _TOLERANCE * max(self.unhindered, _FLOOR)
        gradient = min(1.0, max(_FALL, allowed / window.latency)) if window.latency else 1.0
        if gradient < 1.0 or window.peak * 2 >= self._exact:  # what was not used says nothing of more
            self._exact = self._exact * gradient + sqrt(self._exact)
