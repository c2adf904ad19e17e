"""The time and the connections. Bytes arrive in order, cut anywhere, late; or the connection ends before they do."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Protocol

LATENCY = (0.0002, 0.004)  # seconds that bytes take, one way
PARTS_MAX = 3  # into which what is sent at once is cut


class Timer:
    """What is due at some time, until it is cancelled."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], object]) -> None:
        self.call: Callable[[], object] | None = call

    def cancel(self) -> None:
        self.call = None


class Clock:
    """Virtual seconds. `dice` is the only randomness that there is."""

    def __init__(self, seed: int) -> None:
        self.now = 1000.0
        self.dice = random.Random(seed)
        self.passed: Callable[[float], object] = lambda now: None
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = 0

    def at(self, when: float, call: Callable[[], object]) -> Timer:
        self._order += 1
        timer = Timer(call)
        heapq.heappush(self._timers, (max(when, self.now), self._order, timer))
        return timer

    def later(self, seconds: float, call: Callable[[], object]) -> Timer:
        return self.at(self.now + seconds, call)

    def run(self, until: float) -> None:
        while self._timers and self._timers[0][0] <= until:
            when, _, timer = heapq.heappop(self._timers)
            if timer.call is not None:
                self.now = when
                self.passed(when)
                timer.call()
        self.now = until
        self.passed(until)


class End(Protocol):
    """One side of a connection."""

    def arrived(self, data: bytes) -> None: ...

    def ended(self) -> None:
        """Nothing arrives any more, and nothing that is sent does."""


class Host:
    """A machine as the network sees it. `silent_until`: what is sent to it or from it before waits till then."""

    def __init__(self) -> None:
        self.silent_until = 0.0
        self.slowness = 1.0


class Wire:
    """One connection. Side 0 is the client's, side 1 the provider's."""

    def __init__(self, clock: Clock, host: Host, client: End) -> None:
        self.open = True
        self.host = host
        self._clock = clock
        self._ends: list[End | None] = [client, None]
        self._hears = [True, True]
        self._arrival = [0.0, 0.0]  # of the last byte that goes to that side

    def accept(self, provider: End) -> None:
        self._ends[1] = provider

    def send(self, side: int, data: bytes) -> None:
        if not self.open or not data:
            return
        dice = self._clock.dice
        cuts = sorted(dice.randrange(len(data) + 1) for _ in range(dice.randrange(PARTS_MAX)))
        for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            if start < end:
                part = data[start:end]
                self._clock.at(self._due(1 - side), lambda part=part: self._deliver(1 - side, part))  # type: ignore[misc]

    def finish(self, side: int) -> None:
        """That side ends the connection; the other hears of it behind all that was sent to it."""
        if self.open:
            self.open = False
            self._hears[side] = False
            self._clock.at(self._due(1 - side), lambda: self._end(1 - side))

    def cut(self) -> None:
        """A reset: bytes that are under way may still arrive, or not."""
        if not self.open:
            return
        self.open = False
        for side in (0, 1):
            self._hears[side] = self._clock.dice.random() < 0.5
            self._clock.later(self.latency(), lambda side=side: self._end(side))  # type: ignore[misc]

    def latency(self) -> float:
        return self._clock.dice.uniform(*LATENCY) * self.host.slowness

    def _due(self, side: int) -> float:
        self._arrival[side] = max(self._arrival[side], self._clock.now + self.latency(), self.host.silent_until)
        return self._arrival[side]

    def _deliver(self, side: int, part: bytes) -> None:
        end = self._ends[side]
        if self._hears[side] and end is not None:
            end.arrived(part)

    def _end(self, side: int) -> None:
        end, self._ends[side] = self._ends[side], None
        self._hears[side] = False
        if end is not None:
            end.ended()
