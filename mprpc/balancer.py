"""The balancer: which of a service's endpoints gets the next call.

    listed ──► tags ──► those that don't rest ──► zone ──► weights, slow start ──► Candidates ──► Strategy.pick

All that changes seldom (a new list, a rest, a step of the slow start) is worked into an immutable `Candidates`; a pick
only reads that, in under 2 µs however long it is. A strategy is one method, `pick`; those here are stateless but for
what they keep with the candidates (`derived`, `lasting`), so that one serves any number of lists and threads.

Rules: never more than half of a list rests; past that all are used again. A weight of 0 gets nothing, unless all have
it. The own zone gets all calls as long as its healthy endpoints can take its share of them, and beyond that what they
can. No thread, socket or clock: time (`now`) and the random generator are given.
"""

from __future__ import annotations

from bisect import bisect
from hashlib import shake_128
from itertools import accumulate, chain, cycle
from math import floor, log2
from struct import unpack
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mprpc.layout import Endpoint
    from mprpc.outliers import Health

__all__ = ["STRATEGIES", "Balancer", "Candidate", "Candidates", "Load", "Strategy", "strategy"]

_OVERPROVISIONED = 1.4  # a zone's endpoints can take this much more than their share (Envoy's overprovisioning factor)
_STEPS = 20  # of a slow start; each makes new Candidates
_FINEST = 100  # turns of the heaviest endpoint for one of the lightest; a finer weight is not worth a longer list
_TURNS = 8  # turns for each endpoint of a long list: what bounds the list of turns
_LOOKS = 5  # of least_in_flight at a long list
_POINTS = 256  # on the ring for an endpoint, up to twice that for a heavier one: shares differ by 6 % or so
_BOUND = 1.25  # calls in flight that consistent_hash allows an endpoint, times the average
_SUMS = 2  # endpoints whose calls in flight one pick adds up: the sum over n is made anew every n/2 picks


class Load(Protocol):
    """What an endpoint's calls tell of it."""

    @property
    def in_flight(self) -> int:
        """Calls that have been sent and not answered."""

    @property
    def ended(self) -> int:
        """Calls that have ended, all told."""

    @property
    def latency(self) -> int:
        """Nanoseconds: an average that jumps to a slow call at once and forgets slowly; 0 as long as none is known."""

    def cost(self, now: int) -> int:
        """How long another call would take at `now` (monotonic ns), about: latency x (in_flight + 1). Where no latency
        is known it is 0 for one that is idle, so that it gets its first call, and more than any other's if it isn't."""


class Candidate:
    """One endpoint of one service: what the registry lists, and what this channel knows of it."""

    __slots__ = ("address", "endpoint", "health", "load", "subchannel", "weight")

    def __init__(self, endpoint: Endpoint, load: Load, health: Health, subchannel: Any = None) -> None:
        self.address = endpoint.address
        self.endpoint = endpoint
        self.weight = endpoint.weight
        """As it is listed; what counts now is in `Candidates.weights`."""
        self.load = load
        self.health = health
        self.subchannel = subchannel

    @property
    def ended(self) -> int:
        """Its calls that have ended, all told."""
        return self.load.ended

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"


class Candidates(tuple[Candidate, ...]):
    """Those that may get a call now, in the order of the list; immutable."""

    weights: tuple[float, ...]
    """The share of each relative to the others: 1.0 on average."""
    even: bool
    """All weights are the same."""
    cumulative: list[float]
    """Sums of the weights up to each, itself included."""
    total: float
    listed: Sequence[Candidate]
    """With those that rest, the same object until there is another list."""
    derived: dict[object, Any]
    """What a strategy makes of these candidates, once, under a key of its own."""
    lasting: dict[object, Any]
    """What a strategy keeps from one list to the next, under such a key."""

    @classmethod
    def of(
        cls,
        chosen: Iterable[Candidate],
        weights: Sequence[float],
        listed: Sequence[Candidate] | None = None,
        lasting: dict[object, Any] | None = None,
    ) -> Candidates:
        made = cls(chosen)
        average = sum(weights) / len(made) if made else 1.0
        made.weights = tuple(weight / average for weight in weights)
        made.even = len(set(weights)) <= 1
        made.cumulative = list(accumulate(made.weights))
        made.total = made.cumulative[-1] if made else 0.0
        made.listed = made if listed is None else listed
        made.derived = {}
        made.lasting = {} if lasting is None else lasting
        return made


class Strategy(Protocol):
    """How an endpoint is chosen: `MprpcChannel(config, balancer=MyStrategy())`."""

    def pick(self, candidates: Candidates, key: bytes | None) -> Candidate:
        """One of two or more. `key` is the call's, None for most (`stub.Login.keyed(key)`).

        It is called for every call, on the caller's thread and on any number at once: it must be quick, and must not
        block."""


class PowerOfTwo:
    """p2c: of two drawn by weight, the one where another call costs less, by its calls in flight and their latency.

    It spreads calls nearly as evenly as looking at all would, looks at two, and leaves alone whoever has become slow.
    Chance has a part in it, or small differences would decide, and one slow answer would keep an idle endpoint without
    calls for a minute: where a call costs twice as much it goes one time in nine, where six times as much or more, one
    in 200. A slow endpoint of two still gets under one call of a hundred, which the 99th percentile does not see.
    """

    def __init__(self, random: Callable[[], float], clock: Callable[[], int]) -> None:
        self._random = random
        self._clock = clock

    def pick(self, candidates: Candidates, key: bytes | None) -> Candidate:
        random = self._random
        if candidates.even:
            n = len(candidates)
            i, j = int(random() * n), int(random() * (n - 1))
            one, other = candidates[i], candidates[j + (j >= i)]  # two: against itself a slow one would win
            now = self._clock()
            a: float = one.load.cost(now)
            b: float = other.load.cost(now)
        else:
            i, j = self._draw(candidates)
            one, other, weights, now = candidates[i], candidates[j], candidates.weights, self._clock()
            a, b = _cost(one.load, weights[i], now), _cost(other.load, weights[j], now)
        if a > b * _FAR:
            return one if b and random() < _RARELY else other
        if b > a * _FAR:
            return other if a and random() < _RARELY else one
        a, b = a * a * a, b * b * b
        return other if random() * (a + b) < a else one

    def _draw(self, candidates: Candidates) -> tuple[int, int]:
        """Two of them, as likely as their weights say."""
        cumulative, last = candidates.cumulative, len(candidates) - 1
        i = bisect(cumulative, self._random() * candidates.total, 0, last)
        before, weight = cumulative[i - 1] if i else 0.0, candidates.weights[i]
        at = self._random() * (candidates.total - weight)  # anywhere but in the first one's stretch
        return i, bisect(cumulative, at if at < before else at + weight, 0, last)


_FAR = 6
_RARELY = 1 / (1 + _FAR**3)


def _cost(load: Load, weight: float, now: int) -> float:
    """Its cost if it had as many calls in flight as fall to a weight of 1."""
    cost, calls = load.cost(now), load.in_flight
    return cost * (calls / weight + 1.0) / (calls + 1) if calls else cost


class RoundRobin:
    """All in turn, each as often as its weight says, spread evenly."""

    def pick(self, candidates: Candidates, key: bytes | None) -> Candidate:
        turns = candidates.derived.get(RoundRobin)
        if turns is None:
            order = candidates if candidates.even else [candidates[i] for i in shares(candidates.weights)]
            turns = candidates.derived.setdefault(RoundRobin, cycle(order).__next__)
        chosen: Candidate = turns()
        return chosen


def shares(weights: Sequence[float]) -> list[int]:
    """Indices in the order of their turns: as many as the weight says (at least one), spread evenly."""
    bound = max(_FINEST * 10, _TURNS * len(weights))
    unit = max(min(weights), max(weights) / _FINEST, sum(weights) / bound)
    turns = []
    for i, weight in enumerate(weights):
        share = max(1, round(weight / unit))
        turns += [((turn + 0.5) / share, i) for turn in range(share)]
    return [i for _, i in sorted(turns)]


class WeightedRandom:
    """Any, as likely as its weight says."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random

    def pick(self, candidates: Candidates, key: bytes | None) -> Candidate:
        at = self._random() * candidates.total
        return candidates[bisect(candidates.cumulative, at, 0, len(candidates) - 1)]


class LeastInFlight:
    """The one with the fewest calls in flight for its weight; of many, the best of five drawn by weight."""

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random

    def pick(self, candidates: Candidates, key: bytes | None) -> Candidate:
        n, random = len(candidates), self._random
        best, fewest = candidates[0], float("inf")
        first = int(random() * n)
        for look in range(min(n, _LOOKS)):
            if n <= _LOOKS:
                i = (first + look) % n
            else:
                i = bisect(candidates.cumulative, random() * candidates.total, 0, n - 1)
            calls = candidates[i].load.in_flight / candidates.weights[i]
            if calls < fewest:
                best, fewest = candidates[i], calls
            if not calls and n > _LOOKS:
                break
        return best


class ConsistentHash:
    """Calls with one key go to one endpoint, as long as that has room: then to the next on the ring.

    Room is 1.25 times the average of calls in flight (bounded loads, Mirrokni et al., 2016), by weight. An endpoint
    that leaves or rests gives its keys to the others and takes nobody else's along. A call without a key goes anywhere.
    """

    def __init__(self, random: Callable[[], float]) -> None:
        self._random = random

    def pick(self, candidates: Candidates, key: bytes | None) -> Candidate:
        room: _Room = candidates.derived.get(ConsistentHash) or _Room(candidates)
        ring, starts = room.ring, room.starts
        point = int(self._random() * _ROUND) if key is None else crc32(key) * _SPREAD % _ROUND
        stretch = point >> _STRETCH
        i = bisect(ring, point << _PLACE, starts[stretch], starts[stretch + 1])
        owner = ring[i if i < len(ring) else 0] & _PLACES
        room.left -= 1
        if room.left < 0:
            room.count()
        chosen = room.homes[owner]
        if chosen is not None and chosen.load.in_flight < room.allowed * room.weights[owner]:
            return chosen
        return room.next(i)


_ROUND = 1 << 32
_SPREAD = 0x9E3779B1  # odd: CRC-32 alone puts keys that are alike too near to each other (Knuth, 6.4)
_PLACE = 20  # bits of a ring's entry that say whose it is, below those that say where
_PLACES = (1 << _PLACE) - 1
_STRETCH = 22  # bits of a place on the ring within one of its 1024 stretches
_PART = _ROUND // _POINTS
_LEFT = 4  # endpoints that are listed for each that has left and is still on the ring
# One point in each of 256 equal parts of the ring shares more evenly than points anywhere would. The parts come in an
# order of which each beginning is spread evenly, for endpoints that have fewer.
_PARTS = [int(f"{i:08b}"[::-1], 2) * _PART for i in range(_POINTS)] * 2


class _Ring:
    """The points of a list's endpoints, in order, each with whose it is; immutable.

    The next list's is made of it, since to hash and to sort all of a long list anew would take a tenth of a second of
    some call's time: it gets the points of who is new, and keeps those of who has left, whom nobody stands for, until
    they are too many.
    """

    def __init__(self, listed: Sequence[Candidate], before: _Ring | None = None) -> None:
        heaviest = max(each.weight for each in listed) or 1.0
        self.listed = listed
        self.unit = 2.0 ** floor(log2(heaviest))  # it mostly stays the same when an endpoint comes or goes
        owners = [(each.address, max(1, round(_POINTS * (each.weight or self.unit) / self.unit))) for each in listed]
        self.points: list[int] = []
        self.starts: list[int] = []
        """Where the stretches begin: a search through all points would find little in the processor's cache."""
        self.places: dict[tuple[str, int], int] = {}
        """Of those that are or were listed, with the number of their points."""
        if before is not None and before._suits(owners, self.unit):
            self.points, self.starts, self.places = before.points, before.starts, before.places
        if new := [owner for owner in dict.fromkeys(owners) if owner not in self.places]:
            first = len(self.places)
            self.places = self.places | {owner: first + i for i, owner in enumerate(new)}
            self.points = sorted([*self.points, *chain.from_iterable(map(self._drawn, new))])
            stretches = range((_ROUND >> _STRETCH) + 1)
            self.starts = [bisect(self.points, stretch << _STRETCH + _PLACE) for stretch in stretches]
        self.order = [self.places[owner] for owner in owners]
        """The place of each that is listed."""

    def _suits(self, owners: Sequence[tuple[str, int]], unit: float) -> bool:
        left = len(self.places.keys() - set(owners))
        return self.unit == unit and left * _LEFT <= len(owners)

    def _drawn(self, owner: tuple[str, int]) -> list[int]:
        place, (address, count) = self.places[owner], owner
        turned, *drawn = unpack(f"<{count + 1}I", shake_128(address.encode()).digest(4 * count + 4))
        return [
            (part + turned + at % _PART) % _ROUND << _PLACE | place for part, at in zip(_PARTS, drawn, strict=False)
        ]


def _ring(candidates: Candidates) -> _Ring:
    kept: _Ring | None = candidates.lasting.get(ConsistentHash)
    if kept is None or kept.listed is not candidates.listed:
        kept = candidates.lasting[ConsistentHash] = _Ring(candidates.listed, kept)
    return kept


class _Room:
    """Who may have how many calls in flight; by the place on the ring."""

    def __init__(self, candidates: Candidates) -> None:
        made = _ring(candidates)
        self.ring, self.starts = made.points, made.starts
        self.weights = [0.0] * len(made.places)
        self.homes: list[Candidate | None] = [None] * len(made.places)
        weights = {id(each): weight for each, weight in zip(candidates, candidates.weights, strict=True)}
        for each, place in zip(candidates.listed, made.order, strict=True):
            if id(each) in weights:
                self.homes[place], self.weights[place] = each, weights[id(each)]
        self.allowed = 0.0  # for a weight of 1
        self.left = 0  # picks until the calls in flight are counted again
        self._candidates = candidates
        candidates.derived[ConsistentHash] = self

    def count(self) -> None:
        """Until the next time as many calls may begin as there will be picks."""
        picks = max(1, len(self._candidates) // _SUMS)
        self.left = picks - 1
        calls = sum([each.load.in_flight for each in self._candidates])
        self.allowed = _BOUND * (calls + picks) / self._candidates.total

    def next(self, i: int) -> Candidate:
        """The next one on the ring that has room. There is one, but for calls that others have made meanwhile."""
        seen: set[int] = set()
        for at in chain(range(i, len(self.ring)), range(i)):
            owner = self.ring[at] & _PLACES
            chosen = self.homes[owner]
            if chosen is not None and owner not in seen:
                seen.add(owner)
                if chosen.load.in_flight < self.allowed * self.weights[owner]:
                    return chosen
        return self._candidates[0]


STRATEGIES = ("p2c", "round_robin", "weighted_random", "least_in_flight", "consistent_hash")


def strategy(name: str, random: Callable[[], float], clock: Callable[[], int]) -> Strategy:
    """The one of that name. `random` gives numbers from 0 to under 1, `clock` monotonic nanoseconds."""
    if name == "p2c":
        return PowerOfTwo(random, clock)
    if name == "round_robin":
        return RoundRobin()
    if name == "weighted_random":
        return WeightedRandom(random)
    if name == "least_in_flight":
        return LeastInFlight(random)
    if name == "consistent_hash":
        return ConsistentHash(random)
    raise ValueError(f"balancer={name!r}: give {', '.join(STRATEGIES)}, or an object with a method pick")


class Balancer:
    """One list of endpoints, and which of them are candidates. Calls of its methods come one at a time."""

    def __init__(self, *, zone: str = "", tags: Iterable[str] = (), slow_start: float = 0.0) -> None:
        self._zone = zone
        self._tags = frozenset(tags)
        self._slow_start = slow_start
        self._lasting: dict[object, Any] = {}
        self.listed: tuple[Candidate, ...] = ()
        """Those of the list that have the tags."""
        self.candidates = Candidates.of((), ())
        self.panic = False
        """More than half rest, so that all are used."""
        self.weightless = False
        """All of them have a weight of 0, so that it means nothing."""

    def update(self, listed: Iterable[Candidate], now: float) -> float | None:
        """There is another list. Returns when the slow start's next step is due, None for no slow start.

        The candidate of an instance that was listed before may be the same or another one. One that is new to a list
        that others were in starts slowly.
        """
        chosen = tuple(each for each in listed if self._tags.issubset(each.endpoint.tags))
        known = {(each.address, each.endpoint.id) for each in self.listed}
        for each in chosen:
            if known and (each.address, each.endpoint.id) not in known:
                each.health.warm(now)
        self.listed = chosen
        return self.refresh(now)

    def refresh(self, now: float) -> float | None:
        """Something has changed: an endpoint's health, or a step of the slow start is due. Returns as update()."""
        positive: Sequence[Candidate] = [each for each in self.listed if each.weight > 0]
        self.weightless = not positive
        positive = positive or self.listed
        well = [each for each in positive if not each.health.out]
        suspected = sum(each.health.suspected for each in positive)  # only for as long as a probe takes
        self.panic = (len(positive) - len(well) - suspected) * 2 > len(positive)
        if len(well) * 2 < len(positive):
            well = list(positive)
        shares = [each.health.share(now, self._slow_start) for each in well]
        weights = [(each.weight or 1.0) * share for each, share in zip(well, shares, strict=True)]
        part = self._own_part(positive, well)
        if part is not None:
            well, weights = self._divided(well, weights, part)
        self.candidates = Candidates.of(well, weights, self.listed, self._lasting)
        return now + self._slow_start / _STEPS if any(share < 1.0 for share in shares) else None

    def _own_part(self, listed: Sequence[Candidate], well: Sequence[Candidate]) -> float | None:
        """The part of the calls that the own zone gets; None where zones don't matter.

        Callers are taken to be spread evenly over the zones, so that its share is one of the number of zones.
        """
        zones = {each.endpoint.zone for each in listed}
        if not self._zone or self._zone not in zones or len(zones) == 1:
            return None
        able = sum((each.weight or 1.0) for each in well if each.endpoint.zone == self._zone)
        return min(1.0, _OVERPROVISIONED * len(zones) * able / sum((each.weight or 1.0) for each in listed))

    def _divided(
        self, well: Sequence[Candidate], weights: Sequence[float], part: float
    ) -> tuple[list[Candidate], list[float]]:
        own = [each.endpoint.zone == self._zone for each in well]
        ours = sum(weight for weight, mine in zip(weights, own, strict=True) if mine)
        theirs = sum(weights) - ours
        if theirs <= 0.0:
            part = 1.0
        divided = []
        for each, weight, mine in zip(well, weights, own, strict=True):
            new = weight * part / ours if mine else weight * (1.0 - part) / theirs
            if new > 0.0:
                divided.append((each, new))
        return [each for each, _ in divided], [weight for _, weight in divided]
