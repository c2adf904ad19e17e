"""A pool: what one channel knows of one service's endpoints, and which of them gets the next call.

It joins the registry's list and the channel's subchannels for the balancer, which decides. A pick reads what is there
and takes no lock. Whoever sees a change makes the candidates anew: a call that finds another list or met a failure, the
timekeeper at a step of a slow start or after a probe.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from mprpc import timekeeper
from mprpc._native import lib
from mprpc.balancer import Balancer, Candidate, Strategy, strategy
from mprpc.outliers import Rates

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mprpc.config import MprpcConfig
    from mprpc.layout import Endpoint
    from mprpc.registry import Snapshot
    from mprpc.subchannel import Subchannel

__all__ = ["EndpointState", "Load", "Pool", "Pools", "fixed_state"]

_NS = 1_000_000_000
_QUIET = 60.0  # seconds between two warnings that more than half of a list rests

_log = logging.getLogger("mprpc.balancer")


class EndpointState(NamedTuple):
    """One endpoint of one service as a channel sees it: a row of `channel.endpoints()`."""

    service: str
    """Its full name; "" for a channel to one address."""
    address: str
    id: str
    """Of its registration."""
    zone: str
    tags: tuple[str, ...]
    weight: float
    """As it is listed."""
    share: float
    """Of the calls now, by weight, zone and slow start: all add up to 1."""
    state: str
    """"connected", "idle" (not connected: the next call does that), "warming" (in its slow start), "probing" (a call
    had no answer), "resting" (it can't be used, and is probed when that ends)."""
    why: str
    """What made it rest the last time."""
    in_flight: int
    latency: float
    """Seconds; an average that jumps up to a slow call at once. 0.0 as long as none is known."""
    calls: int
    """That have ended."""
    failures: int
    """Of them, those that speak against it."""
    rests: int
    """How often it has rested."""
    rests_for: float
    """Seconds until its rest ends and it is probed."""


class Pool:
    """One service's endpoints. Any thread."""

    def __init__(self, service: str, config: MprpcConfig, chosen: Strategy, tags: Sequence[str]) -> None:
        self.service = service
        self.seen: Snapshot | None = None
        """The list that it was made from."""
        self.only: Subchannel | None = None
        """The one that all calls go to, where there is no choice."""
        self.known: tuple[Subchannel, ...] = ()
        """All that calls may go to, in the order of the list."""
        self._balancer = Balancer(zone=config.zone, tags=tags, slow_start=config.slow_start)
        self._slow_start = config.slow_start
        self._candidates = self._balancer.candidates
        self._pick = chosen.pick
        self._tags = tags
        self._rates = Rates()
        self._lock = threading.Lock()
        self._known: dict[Subchannel, Candidate] = {}
        self._stepping = False  # a step of a slow start is due some time
        self._warned = float("-inf")

    # ---- calls ----

    def __len__(self) -> int:
        return len(self._candidates)

    def next(self, key: bytes | None) -> Subchannel | None:
        """Where the next call goes; None: the list is empty."""
        candidates = self._candidates
        if len(candidates) < 2:
            return candidates[0].subchannel if candidates else None
        chosen: Subchannel = self._pick(candidates, key).subchannel
        return chosen

    def all(self, first: Subchannel | None) -> tuple[Subchannel, ...]:
        """All that may be tried, `first` first; those that rest and are not connected last."""
        candidates, known = self._candidates, self._known
        if not candidates:
            return ()
        at = random.randrange(len(candidates))  # whoever fails must not give all its calls to the one behind it
        order = {first: None} if first is not None and first in known else {}
        order |= dict.fromkeys(each.subchannel for each in (*candidates[at:], *candidates[:at]))
        order |= dict.fromkeys(known)
        return tuple(sorted(order, key=_is_no_use))

    def nobody(self) -> str:
        if self._tags and self.seen is not None and self.seen.endpoints:
            return f"no provider with the tags {','.join(self._tags)} is registered for this method"
        return "no provider is registered for this method"

    # ---- changes ----

    def update(self, snapshot: Snapshot, listed: Sequence[Endpoint], subchannels: Sequence[Subchannel]) -> None:
        """Goes on with that list; `subchannels` are its endpoints', in order."""
        with self._lock:
            if snapshot is self.seen:
                return
            there: dict[Subchannel, Candidate] = {}
            for each, subchannel in zip(listed, subchannels, strict=True):
                old = self._known.get(subchannel)
                if old is None or old.endpoint != each:
                    old = Candidate(each, Load(subchannel), subchannel.health, subchannel)
                there[subchannel] = old
            self._show(self._balancer.update(there.values(), time.monotonic()))
            chosen = self._balancer.listed
            self._known = {each.subchannel: each for each in chosen if each.weight > 0 or self._balancer.weightless}
            self.known = tuple(self._known)
            self.seen = snapshot

    def told(self, endpoint: Subchannel, changed: bool) -> None:
        """Something speaks against that endpoint, or its health has changed."""
        now = time.monotonic()
        with self._lock:
            if endpoint not in self._known:
                return
            if changed:
                self._show(self._balancer.refresh(now))
            outliers = [] if endpoint.health.out else self._rates.outliers(self._balancer.listed, now)
        for each in outliers:
            each.subchannel.outlier()

    def _step(self) -> None:
        with self._lock:
            self._stepping = False
            self._show(self._balancer.refresh(time.monotonic()))

    def _show(self, due: float | None) -> None:
        candidates = self._candidates = self._balancer.candidates
        self.only = candidates[0].subchannel if len(candidates) == 1 else None
        if due is not None and not self._stepping:
            self._stepping = True
            timekeeper.at(due, self._step)
        if self._balancer.panic:
            self._warn()

    def _warn(self) -> None:
        now = time.monotonic()
        if now - self._warned >= _QUIET:
            self._warned = now
            out = [each.health for each in self._balancer.listed if each.health.out]
            text = "%s: %d of %d providers can't be used (the first: %s), so that all are tried again"
            _log.warning(text, self.service, len(out), len(self._balancer.listed), out[0].why)

    def states(self) -> list[EndpointState]:
        candidates, now = self._candidates, time.monotonic()
        shares = dict(zip(candidates, candidates.weights, strict=True))
        total = candidates.total or 1.0
        return [
            _state(each, self.service, shares.get(each, 0.0) / total, self._slow_start, now)
            for each in self._balancer.listed
        ]


def _is_no_use(endpoint: Subchannel) -> bool:
    return endpoint.health.out and (endpoint.health.gone or endpoint.link is None)


def _state(each: Candidate, service: str, share: float, slow_start: float, now: float) -> EndpointState:
    health, load, listed = each.health, each.load, each.endpoint
    state = "connected" if each.subchannel.link is not None else "idle"
    if health.share(now, slow_start) < 1.0:
        state = "warming"
    if health.out:
        state = "probing" if health.suspected else "resting"
    rests_for = max(0.0, health.rests_until - now) if health.out else 0.0
    return EndpointState(
        service, each.address, listed.id, listed.zone, listed.tags, listed.weight, share, state, health.why,
        load.in_flight, load.latency / _NS, load.ended, health.failures, health.rests, rests_for,
    )  # fmt: skip


def fixed_state(endpoint: Subchannel) -> EndpointState:
    """Of the one address that a channel was given."""
    from mprpc.layout import Endpoint

    candidate = Candidate(Endpoint(endpoint.address), Load(endpoint), endpoint.health, endpoint)
    return _state(candidate, "", 1.0, 0.0, time.monotonic())


class Load:
    """A `balancer.Load` over the record that C keeps."""

    __slots__ = ("_measure", "_subchannel")

    def __init__(self, subchannel: Subchannel) -> None:
        self._subchannel = subchannel
        self._measure = subchannel.measure

    @property
    def in_flight(self) -> int:
        calls: int = lib.mprpc_load_in_flight(self._measure)
        return calls

    @property
    def ended(self) -> int:
        return self._subchannel.load.ended

    @property
    def latency(self) -> int:
        return self._subchannel.load.latency

    def cost(self, now: int) -> int:
        cost: int = lib.mprpc_load_cost(self._measure, now)
        return cost


class Pools:
    """A channel's. Any thread."""

    def __init__(self, config: MprpcConfig, balancer: str | Strategy | None, tags: Sequence[str] | None) -> None:
        chosen = config.balancer if balancer is None else balancer
        if isinstance(chosen, str):
            chosen = strategy(chosen, random.random, time.monotonic_ns)
        self._config = config
        self._strategy = chosen
        self._tags = tuple(config.call_tags if tags is None else tags)
        self._lock = threading.Lock()
        self._pools: dict[tuple[str, str], Pool] = {}

    def of(self, service: str, method: str) -> Pool:
        """That service's; `method` is "" where all its methods have the same providers."""
        with self._lock:
            pool = self._pools.get((service, method))
            if pool is None:
                pool = self._pools[service, method] = Pool(service, self._config, self._strategy, self._tags)
            return pool

    def told(self, endpoint: Subchannel, changed: bool) -> None:
        """What a subchannel's watcher is told."""
        for pool in self._all():
            pool.told(endpoint, changed)

    def close(self) -> None:
        """There will be no more calls."""
        for pool in self._all():
            timekeeper.forget(pool)

    def states(self) -> list[EndpointState]:
        return [state for pool in self._all() for state in pool.states()]

    def _all(self) -> list[Pool]:
        with self._lock:
            return list(self._pools.values())
