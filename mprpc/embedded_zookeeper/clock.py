"""The server's two clocks: a monotonic one, which sessions expire by, and the wall's, which stats show.

A test gives the server a `SteppedClock`, moves it by hand, and so expires sessions without waiting for anything.
"""

from __future__ import annotations

import math
import time


class Clock:
    """The machine's own time."""

    def monotonic(self) -> float:
        """Seconds, from an arbitrary start."""
        return time.monotonic()

    def wall_ms(self) -> int:
        """Milliseconds since 1970."""
        return time.time_ns() // 1_000_000

    def wait(self, deadline: float) -> float | None:
        """The seconds a loop may sleep that has something to do at `deadline`; None: as long as it likes."""
        return None if deadline == math.inf else max(0.0, deadline - self.monotonic())


class SteppedClock(Clock):
    """Stands still until it is moved. Move it on the server's thread, so that the server acts on it at once."""

    def __init__(self) -> None:
        self._elapsed = 0.0
        self._started_ms = super().wall_ms()

    def monotonic(self) -> float:
        return self._elapsed

    def wall_ms(self) -> int:
        return self._started_ms + int(self._elapsed * 1000)

    def wait(self, deadline: float) -> float | None:
        return None

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError("time goes forward only")
        self._elapsed += seconds
