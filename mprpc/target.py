"""A target: which subchannels a method's calls go to, and in which order.

`Fixed` is the one address that a channel was given; `Found` is what the registry's snapshot lists for the method, in a
pool (`pool.py`) that the service's methods share. `Keyed` is that for calls with a key.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor

    from mprpc.channel import MprpcChannel
    from mprpc.pool import Pool
    from mprpc.registry import ServiceView
    from mprpc.subchannel import Subchannel

__all__ = ["Fixed", "Found", "Keyed", "Target"]

_NS = 1_000_000_000


class Fixed:
    """The one address that the channel was given."""

    def __init__(self, endpoint: Subchannel) -> None:
        self._endpoint = endpoint

    @property
    def whole(self) -> Fixed:
        return self

    def keyed(self, key: bytes) -> Fixed:
        """All keys go to the one address."""
        return self

    def next(self, key: bytes | None = None) -> Subchannel | None:
        return self._endpoint

    def all(self, deadline: int, first: Subchannel | None = None, key: bytes | None = None) -> tuple[Subchannel, ...]:
        return (self._endpoint,)

    def known(self) -> tuple[Subchannel, ...]:
        """As all(), without waiting for a list."""
        return (self._endpoint,)

    def failed(self, endpoint: Subchannel) -> None:
        """There is no list to be wrong."""

    def nobody(self) -> str:
        return "no address"


class Found:
    """What the registry lists for one method; the balancer chooses."""

    def __init__(self, channel: MprpcChannel, service: ServiceDescriptor, method: str) -> None:
        self._channel = channel
        self._service = service
        self._method = method
        self._view: ServiceView | None = channel._view(service)
        self._pool: Pool | None = None

    @property
    def whole(self) -> Found:
        return self

    def keyed(self, key: bytes) -> Keyed:
        return Keyed(self, key)

    def next(self, key: bytes | None = None) -> Subchannel | None:
        """Where the next call goes, None as long as there is no list."""
        pool, view = self._pool, self._view
        if pool is None or view is None or view.snapshot is not pool.seen:
            pool = self._renew()
        return pool.only or pool.next(key)

    def all(self, deadline: int, first: Subchannel | None = None, key: bytes | None = None) -> tuple[Subchannel, ...]:
        """Every endpoint once, from `first` or else the next in turn; waits for the first list. Raises Unavailable
        without one. `first` is whose turn it was: with another turn taken for it, one that is not connected yet would
        be passed over again and again."""
        pool = self._renew()
        if not pool and self._view is not None:
            self._view.wait(max(0.0, (deadline - time.monotonic_ns()) / _NS))
            pool = self._renew()
        return pool.all(first or pool.next(key))

    def known(self) -> tuple[Subchannel, ...]:
        """Every endpoint of the list as it is, in no order."""
        return self._pool.known if self._pool is not None else ()

    def failed(self, endpoint: Subchannel) -> None:
        """A call went on to the next endpoint: does the list still hold?"""
        if self._view is not None:
            self._view.report_down(endpoint.address)

    def nobody(self) -> str:
        return self._pool.nobody() if self._pool is not None else "no provider was looked for"

    def _renew(self) -> Pool:
        view = self._view
        if view is None:
            view = self._view = self._channel._view(self._service)
        snapshot = view.snapshot
        pool = self._pool = self._channel._pools().of(
            self._service.full_name, self._method if snapshot.by_method else ""
        )
        if snapshot is not pool.seen:
            found = snapshot.for_method(self._method)
            pool.update(snapshot, found, self._channel._endpoints_of(found, self._service.full_name))
            self._channel._keep_only(snapshot)
        return pool

    def forget_forked(self) -> None:
        """In a forked child: the parent's list stands still there, so another is followed."""
        self._view = self._pool = None


class Keyed:
    """A target for calls with one key, which a balancer of the kind of consistent_hash goes by."""

    def __init__(self, target: Found, key: bytes) -> None:
        self._target = target
        self._key = key

    @property
    def whole(self) -> Found:
        """What looks for the list, for all keys."""
        return self._target

    def keyed(self, key: bytes) -> Keyed:
        return Keyed(self._target, key)

    def next(self) -> Subchannel | None:
        return self._target.next(self._key)

    def known(self) -> tuple[Subchannel, ...]:
        return self._target.known()

    def failed(self, endpoint: Subchannel) -> None:
        self._target.failed(endpoint)

    def nobody(self) -> str:
        return self._target.nobody()

    def all(self, deadline: int, first: Subchannel | None = None) -> tuple[Subchannel, ...]:
        return self._target.all(deadline, first, self._key)


Target = Fixed | Found | Keyed
