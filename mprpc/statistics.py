"""What became of calls: immutable snapshots of what C counts all the time (`_tally.h`).

A snapshot is no moment: calls that end while it is taken may be in one of its numbers and not yet in another.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from mprpc._native import ffi, lib
from mprpc.errors import Status

if TYPE_CHECKING:
    from mprpc.subchannel import Load

__all__ = [
    "ChannelStatistics",
    "EndpointStatistics",
    "Latency",
    "MethodStatistics",
    "ProviderStatistics",
    "method_statistics",
    "provider_statistics",
]

_NS = 1_000_000_000
_LEAST: int = lib.MPRPC_TALLY_LEAST


class Latency(NamedTuple):
    """Of a provider, how long handlers took, with parsing and serializing: until their response was there, also when it
    came later. Of a channel, how long callers waited, however their calls ended, retries included.

    `counts`: calls in each bucket of C's histogram, four to a power of two, so that a time is known to within an
    eighth; `seconds`: all their time together.
    """

    counts: tuple[int, ...]
    seconds: float

    @property
    def calls(self) -> int:
        """How many."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Seconds, 0.0 without calls."""
        calls = self.calls
        return self.seconds / calls if calls else 0.0

    def percentile(self, percent: float) -> float:
        """The time in seconds that so many percent of the calls did not exceed, 0.0 without calls."""
        return self.percentiles(percent)[0]

    def percentiles(self, *percents: float) -> tuple[float, ...]:
        """The times in seconds that so many percent of the calls did not exceed. ValueError outside of 0 to 100."""
        for percent in percents:
            if not 0 <= percent <= 100:
                raise ValueError(f"percentiles are of 0 to 100, not {percent}")
        return tuple(self._below(percent / 100 * self.calls) for percent in percents)

    def _below(self, rank: float) -> float:
        passed = 0
        for bucket, count in enumerate(self.counts):
            passed += count
            if count and passed >= rank:
                return (_lower(bucket) + _lower(bucket + 1)) / 2 / _NS
        return 0.0


class MethodStatistics(NamedTuple):
    """One method's calls. `errors`: those that failed, by status; `in_flight`: those taken and not answered yet."""

    calls: int
    errors: Mapping[Status, int]
    in_flight: int
    latency: Latency


class ProviderStatistics(NamedTuple):
    """A provider's calls and connections since its start.

    `methods`: by full name, `package.Service.Method`; calls that found no method are in none. `connections`: open
    ones, `loops`: the same for each loop (small, quick calls gather in one); `accepted`: ever; `broken`: ended by the
    provider for what their peers sent, or didn't send in time. `in_flight`: calls whose callers wait. `beside`:
    handlers that run on threads beside the loops, of `handler_threads`; `queued`: calls that wait for such a thread,
    of `max_queued`; `relieved`: how often a handler took long by surprise.
    """

    methods: Mapping[str, MethodStatistics]
    connections: int
    loops: tuple[int, ...]
    accepted: int
    broken: int
    in_flight: int
    beside: int
    queued: int
    relieved: int


class EndpointStatistics(NamedTuple):
    """One endpoint as the calls to it tell, over all its connections; a call's attempts count each.

    `failed`: broken, timed out, unavailable or refused as overloaded, and attempts to connect; `failing`: of these the
    ones since the last success. `latency`: seconds, jumps up to a slow call at once and forgets it over ten seconds;
    0.0 where nothing is known.
    """

    in_flight: int
    ended: int
    failed: int
    failing: int
    latency: float


class ChannelStatistics(NamedTuple):
    """A channel's calls so far.

    `methods`: by full name, `package.Service.Method`, those that a stub was made for; `endpoints`: by address;
    `retries`: further attempts that were paid from the channel's budget.
    """

    methods: Mapping[str, MethodStatistics]
    endpoints: Mapping[str, EndpointStatistics]
    retries: int


def method_statistics(tally: Any) -> MethodStatistics:
    """Of a `struct mprpc_tally`. Any thread."""
    ended = list(tally.ended)
    return MethodStatistics(
        calls=tally.begun,
        errors=MappingProxyType({Status(code): count for code, count in enumerate(ended) if code and count}),
        in_flight=max(0, tally.begun - sum(ended)),
        latency=Latency(tuple(tally.took), tally.nanoseconds / _NS),
    )


def provider_statistics(handles: list[Any], methods: list[str], crew: Any) -> ProviderStatistics:
    """Of the loops with these handles, which serve these methods, and of their crew, as C counts it. Any thread."""
    counted = ffi.new("struct mprpc_loop_statistics[]", max(1, len(handles)))
    for number, handle in enumerate(handles):
        lib.mprpc_loop_statistics(handle, counted + number)
    by_method = {}
    for index, name in enumerate(methods):
        tally = ffi.new("struct mprpc_tally *")
        for handle in handles:
            lib.mprpc_loop_tally(handle, index, tally)
        by_method[name] = method_statistics(tally)
    return ProviderStatistics(
        MappingProxyType(by_method),
        connections=sum(each.connections for each in counted),
        loops=tuple(each.connections for each in counted[0 : len(handles)]),
        accepted=sum(each.accepted for each in counted),
        broken=sum(each.broken for each in counted),
        in_flight=sum(each.in_flight for each in counted),
        beside=crew.busy,
        queued=crew.queued,
        relieved=crew.relieved,
    )


def channel_statistics(tallies: Mapping[str, Any], loads: Mapping[str, Load], retries: int) -> ChannelStatistics:
    """Of the methods' and the endpoints' records. Any thread."""
    return ChannelStatistics(
        MappingProxyType({name: method_statistics(tally) for name, tally in tallies.items()}),
        MappingProxyType(
            {
                address: EndpointStatistics(load.in_flight, load.ended, load.failed, load.failing, load.latency / _NS)
                for address, load in loads.items()
            }
        ),
        retries,
    )


def _lower(bucket: int) -> int:
    """The least ns of a bucket, as mprpc_tally_bucket has it."""
    if bucket == 0:
        return 0
    power, quarter = divmod(bucket - 1, 4)
    return (4 + quarter) << (power + _LEAST - 2)
