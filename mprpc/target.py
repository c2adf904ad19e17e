"""A target: which subchannels a method's calls go to, and in which order.

`Fixed` is the one address that a channel was given; `Found` is what the registry's snapshot lists for the method.
"""

from __future__ import annotations

import time
from itertools import count
from typing import TYPE_CHECKING

from mprpc.subchannel import Subchannel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.descriptor import ServiceDescriptor

    from mprpc.channel import MprpcChannel
    from mprpc.registry import ServiceView, Snapshot

__all__ = ["Fixed", "Found"]

_NS = 1_000_000_000
_SHARES_MAX = 100  # turns of the heaviest endpoint for one of the lightest; a finer weight is not worth a longer list


class Fixed:
    """The one address that the channel was given."""

    def __init__(self, endpoint: Subchannel) -> None:
        self._endpoint = endpoint

    def next(self) -> Subchannel | None:
        return self._endpoint

    def all(self, deadline: int, first: Subchannel | None = None) -> tuple[Subchannel, ...]:
        return (self._endpoint,)

    def known(self) -> tuple[Subchannel, ...]:
        """As all(), without waiting for a list."""
        return (self._endpoint,)

    def failed(self, endpoint: Subchannel) -> None:
        """There is no list to be wrong."""

    def nobody(self) -> str:
        return "no address"


class Found:
    """What the registry lists for one method, taken in turn, each as often as its weight says."""

    def __init__(self, channel: MprpcChannel, service: ServiceDescriptor, method: str) -> None:
        self._channel = channel
        self._service = service
        self._method = method
        self._view: ServiceView | None = channel._view(service)
        self._seen: Snapshot | None = None
        self._endpoints: tuple[Subchannel, ...] = ()  # each once
        self._turns: tuple[Subchannel, ...] = ()
        self._turn = count()

    def next(self) -> Subchannel | None:
        if self._view is None or self._view.snapshot is not self._seen:
            self._renew()
        turns = self._turns
        if len(turns) == 1:
            return turns[0]
        return turns[next(self._turn) % len(turns)] if turns else None

    def all(self, deadline: int, first: Subchannel | None = None) -> tuple[Subchannel, ...]:
        """Every endpoint once, from `first` or else the next in turn; waits for the first list. Raises Unavailable
        without one. `first` is whose turn it was: with another turn taken for it, one that is not connected yet would
        be passed over again and again."""
        view = self._renew()
        if not self._endpoints:
            view.wait(max(0.0, (deadline - time.monotonic_ns()) / _NS))
            self._renew()
        endpoints = self._endpoints
        if first not in endpoints:
            first = self.next()
        start = endpoints.index(first) if first is not None else 0
        return tuple(sorted(endpoints[start:] + endpoints[:start], key=Subchannel.resting))

    def known(self) -> tuple[Subchannel, ...]:
        """Every endpoint of the list as it is, in no order."""
        return self._endpoints

    def failed(self, endpoint: Subchannel) -> None:
        """A call went on to the next endpoint: does the list still hold?"""
        if self._view is not None:
            self._view.report_down(endpoint.address)

    def nobody(self) -> str:
        return "no provider is registered for this method"

    def _renew(self) -> ServiceView:
        view = self._view
        if view is None:
            view = self._view = self._channel._view(self._service)
        snapshot = view.snapshot
        if snapshot is not self._seen:
            found = snapshot.for_method(self._method)
            endpoints = self._channel._endpoints_of(found)
            self._turns = tuple(endpoints[i] for i in _shares([each.weight for each in found]))
            self._endpoints = tuple(dict.fromkeys(self._turns))
            self._channel._keep_only(snapshot)
            self._seen = snapshot
        return view

    def forget_forked(self) -> None:
        """In a forked child: the parent's list stands still there, so another is followed."""
        self._view = self._seen = None
        self._endpoints = self._turns = ()


def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Indices in the order of their turns: as many as the weight says, spread evenly.

    A weight of 0 gets none, unless all are equal.
    """
    if len(set(weights)) <= 1:
        return tuple(range(len(weights)))
    positive = [weight for weight in weights if weight > 0]
    unit = max(min(positive), max(positive) / _SHARES_MAX)
    shares = [max(1, round(weight / unit)) if weight > 0 else 0 for weight in weights]
    turns = sorted(((turn + 0.5) / share, i) for i, share in enumerate(shares) for turn in range(share))
    return tuple(i for _, i in turns)
