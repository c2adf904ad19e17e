"""Outliers: endpoints that can't be reached, fall silent, or fail far more often than their peers, and rest for it.

    good ──► resting ──► probing ──► good, warming up
      └────────────────────┘  ▲└──► resting, longer

`Health` is one endpoint's state. A refused or broken connection makes it rest at once. A call that got no answer only
makes it suspected: it is probed at once, gets no calls meanwhile, and loses nothing when the probe is answered, since
then only that call was slow. After a rest it is probed, never tried with a call; an answer brings it back with a small
share of the calls that grows. What fails again soon after its return rests twice as long as before.

`Rates` compares the endpoints of a list: who failed far more of its calls within the window than its peers rests too.
What counts as a failure is said where it is reported; what the application refuses and overload do not.

No thread, socket or clock; times are monotonic seconds. Calls for one object come one at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["REST_FIRST", "REST_LONGEST", "Health", "Rates", "Tallied"]

REST_FIRST, REST_LONGEST = 0.1, 30.0
"""Seconds of the first rest, and the bound of its doubling: a provider that restarts is back in tenths of a second,
one that is gone costs a probe every half minute."""

_MEMORY = 10.0  # seconds after a return within which a failure doubles the rest instead of starting over
_TRUST = 1.0  # seconds after an answered probe within which silence raises no new suspicion: some calls are slow
_LEAST = 0.1  # share of the calls that one gets which has just come (back)

WINDOW = 10.0
"""Seconds within which calls are compared."""

VOLUME = 20
"""Calls within the window below which nothing is said of an endpoint, nor of anybody by it."""

_PAUSE = 1.0  # seconds between comparisons, each of which looks at the whole list
_DEVIATIONS = 1.9  # by how many standard deviations of its peers an outlier is worse (as Envoy's)
_CHANCE = 3.0  # and by how many that chance alone makes of so few calls
_MARGIN = 0.1  # and by how much at least


class Health:
    """One endpoint's state, as one channel knows it."""

    out = False
    """It rests or is being probed: it gets no calls, as long as at least half of its list does."""
    gone = False
    """It did not answer a call or a probe, and nothing since: its connection may be a black hole."""
    why = ""
    """What made it rest, a few words."""
    rests = 0
    """How often it has rested."""
    failures = 0
    """Calls that say something against it."""

    def __init__(self) -> None:
        self.rests_until = 0.0
        self._rested = self._rest = 0.0
        self._suspected = False
        self._returned = self._trusted_until = float("-inf")
        self._warm_from = float("-inf")

    def rest(self, now: float, why: str) -> bool:
        """It can't be used. Whether that is news: what fails while it rests changes nothing."""
        if self.out and not self._suspected:
            return False
        again = now - self._returned < _MEMORY + self._rest
        self._rest = min(self._rest * 2 if again and self._rest else REST_FIRST, REST_LONGEST)
        self._rested, self.rests_until = now, now + self._rest
        self.out, self._suspected, self.why = True, False, why
        self.rests += 1
        return True

    def suspect(self, now: float) -> bool:
        """A call had no answer. Whether it is now to be probed."""
        if self.out or now < self._trusted_until:
            return False
        self.out = self.gone = self._suspected = True
        self.rests_until = now
        return True

    def probed(self, answered: bool, now: float) -> bool:
        """What the probe said that was due. Whether it is in use again; else the next one is due at rests_until."""
        if not self.out:
            return True
        self.gone = not answered
        if not answered:
            if self._suspected:
                self.rest(now, "it does not answer")
            else:
                self._rest = min(self._rest * 2, REST_LONGEST)
                self.rests_until = now + self._rest
            return False
        if self._suspected:
            self.out = self._suspected = False
            self._trusted_until = now + _TRUST
        else:
            self.back(now)
        return True

    def back(self, now: float) -> bool:
        """It can be called: what made it rest is over. Whether that is news."""
        if not self.out or self._suspected:
            return False
        self.out = self.gone = False
        self._returned = now
        if now - self._rested >= REST_FIRST:  # else only a connection had ended
            self._warm_from = now
        return True

    def warm(self, now: float) -> None:
        """It has only just come: its share of the calls grows from now on."""
        self._warm_from = now

    def forget(self) -> None:
        """Another provider has its address."""
        self.out = self.gone = self._suspected = False
        self._rest = 0.0
        self._returned = self._trusted_until = self._warm_from = float("-inf")

    def share(self, now: float, slow_start: float) -> float:
        """Its part of the calls that it gets later: from a tenth to all within slow_start seconds."""
        since = now - self._warm_from
        return 1.0 if since >= slow_start else max(_LEAST, since / slow_start)

    @property
    def suspected(self) -> bool:
        """It is being probed because a call had no answer."""
        return self._suspected


class Tallied(Protocol):
    """What `Rates` asks of an endpoint."""

    @property
    def address(self) -> str: ...

    @property
    def health(self) -> Health: ...

    @property
    def ended(self) -> int:
        """Its calls that have ended, all told."""


T = TypeVar("T", bound=Tallied)


class Rates:
    """How often the endpoints of one list fail, within a window."""

    def __init__(self) -> None:
        self._began = float("-inf")
        self._compared = float("-inf")
        self._marks: dict[str, tuple[int, int]] = {}  # by address: what was counted before the window

    def outliers(self, among: Sequence[T], now: float) -> list[T]:
        """After a failure: those that fail far more often than their peers. Looks at most once a second."""
        if now - self._began > WINDOW:
            self._began = self._compared = now
            self._marks = {each.address: (each.ended, each.health.failures) for each in among}
            return []
        if now - self._compared < _PAUSE:
            return []
        self._compared = now
        rates = [(each, calls, failures / calls) for each, calls, failures in self._counted(among) if calls >= VOLUME]
        return [each for each, calls, rate in _far_above(rates) if not each.health.out]

    def _counted(self, among: Sequence[T]) -> list[tuple[T, int, int]]:
        counted = []
        for each in among:
            ended, failures = self._marks.setdefault(each.address, (each.ended, each.health.failures))
            calls = max(each.ended - ended, each.health.failures - failures)
            counted.append((each, calls, each.health.failures - failures))
        return counted


def _far_above(rates: list[tuple[T, int, float]]) -> list[tuple[T, int, float]]:
    """Each is compared with all others: with itself among them, one of few would hide its own failures."""
    others = len(rates) - 1
    if others < 1:
        return []
    total, squares = sum(rate for _, _, rate in rates), sum(rate * rate for _, _, rate in rates)
    far = []
    for each, calls, rate in rates:
        mean = (total - rate) / others
        deviation = max(0.0, (squares - rate * rate) / others - mean * mean) ** 0.5
        chance = (max(mean * (1.0 - mean), 0.0) / calls) ** 0.5
        if rate > mean + max(_DEVIATIONS * deviation, _CHANCE * chance, _MARGIN):
            far.append((each, calls, rate))
    return far
