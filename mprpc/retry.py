"""Retries and hedges: what a call that failed, or is slow, may still try, where, when and at whose cost. One logic for
all three faces.

It decides and does nothing: errors, the time (monotonic ns) and chance come in, and out comes the next endpoint, how
long to wait for it, or that the call has failed.

Rules:
- A request of which nothing was sent, or that a provider which takes no more calls has refused (UNAVAILABLE, not_run),
  goes to the next endpoint at once, as long as there is one that it has not been at. That costs the providers nothing.
- Any other further attempt is a retry. It is allowed after not_run (a full provider), or if the method is idempotent
  and the connection ended, the provider is unavailable or the attempt's own time is over. A call gets at most `retries`
  of them, the channel a budget for all: without one, an outage would multiply the load that it ends under.
- A retry goes to an endpoint that the call has not been at. When it has been at all, it begins again with all but those
  that lack the method.
- The first retry goes at once if it goes elsewhere; others wait, by chance between nothing and a bound that doubles
  each time. What would wait past the deadline fails now, with its reason.
- An attempt is numbered on the wire by how often the request may have run before; the calls of a handler that serves a
  number above 0 are not retried, or retries would multiply from layer to layer.
- A hedge is a second request of an idempotent method's call, to another endpoint, when the first has not been answered
  for a while: a fixed time, or what one call of twenty takes. The first answer wins, the other request is cancelled. It
  is no retry and is not retried, and has a budget of its own, which is only a share of the calls.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from mprpc.errors import RpcError, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

__all__ = ["P95", "Attempts", "Budget", "Hedging", "Policy"]

E = TypeVar("E")  # an endpoint; only ever compared

_NS = 1_000_000_000
P95 = -1.0  # as a hedge's delay: what 19 of 20 of the method's latest requests were answered within
_FEWEST = 20  # latencies that say something about the slowest of twenty
_REMEMBERED = 1000  # latencies; then half of their weight is forgotten
_STEPS = 8  # buckets for each doubling: 9 % wide
_BURST = 10.0  # seconds of its rate, and at least so many tokens, that a budget saves up


class Policy(NamedTuple):
    """What a method's calls may do; durations in seconds."""

    idempotent: bool
    retries: int
    backoff: float  # the first pause's bound
    backoff_max: float
    attempt_timeout: float  # of an idempotent method's single attempt; 0.0: the call's own
    hedge_delay: float | None = None  # None: no hedges; P95
    hedge_share: float = 0.05  # of the calls, that are hedged at most

    @property
    def hedges(self) -> bool:
        return self.idempotent and self.hedge_delay is not None


class Budget:
    """How many further attempts a channel may make: a share of its calls, and some a second. Under `lock`, any thread.

    A bucket of tokens that holds ten seconds of its rate, at least ten; `full` says whether it starts so.
    """

    def __init__(self, share: float, rate: float, lock: AbstractContextManager[object], *, full: bool = True) -> None:
        self._share, self._rate, self._lock = share, rate, lock
        self._most = max(rate, 1.0) * _BURST
        self._tokens = self._most if full else 0.0
        self._seen: int | None = None
        self.taken = 0

    def called(self, count: int = 1) -> None:
        """So many calls were made, attempts not counted."""
        with self._lock:
            self._tokens = min(self._most, self._tokens + count * self._share)

    def take(self, now: int) -> bool:
        """Whether one more attempt may be made; then it is paid for."""
        with self._lock:
            seen = now if self._seen is None else self._seen
            self._seen = max(seen, now)
            self._tokens = min(self._most, self._tokens + (self._seen - seen) / _NS * self._rate)
            if self._tokens < 1.0:
                return False
            self._tokens -= 1.0
            self.taken += 1
            return True


class Attempts(Generic[E]):
    """One call's attempts, from the first that was not plain. Its caller's thread.

    `deadline`: the call's; `chance` returns a number from 0 to 1; `settled`: it makes no retries, because its caller
    is itself one.
    """

    __slots__ = ("_budget", "_chance", "_lacking", "_made", "_policy", "_settled", "_spared", "_tried", "deadline",
                 "endpoint", "number", "problem")  # fmt: skip

    def __init__(
        self, policy: Policy, budget: Budget, deadline: int, chance: Callable[[], float], *, settled: bool = False
    ) -> None:
        self._policy, self._budget, self._chance, self._settled = policy, budget, chance, settled
        self.deadline = deadline
        self.number = 0  # the next attempt's, on the wire
        self.problem: RpcError | None = None  # what the call would fail with now
        self._made = 0
        self._tried: list[E] = []  # in this round
        self._lacking: list[E] = []  # that do not have the method
        self._spared: list[E] = []  # whose old connection had ended
        self.endpoint: E | None = None  # the last that was to be tried

    def next(self, endpoints: Sequence[E]) -> E | None:
        """The one to try: the first of them that the call has not been at, or of a new round. None: there is none."""
        self.endpoint = next((each for each in endpoints if each not in self._tried), None)
        if self.endpoint is None:
            self._tried = list(self._lacking)
            self.endpoint = next((each for each in endpoints if each not in self._tried), None)
        return self.endpoint

    def hedge(self, endpoint: E) -> Attempts[E]:
        """Those of the same call's hedge, which begins elsewhere than there. From now on the call may have run."""
        other: Attempts[E] = Attempts(self._policy, self._budget, self.deadline, self._chance, settled=True)
        self.number += 1
        other.number = self.number
        other._tried = [endpoint]
        return other

    def timeout(self, now: int) -> int:
        """Nanoseconds for the next attempt, 0 or less when the call is over."""
        left = self.deadline - now
        own = self._policy.attempt_timeout
        return min(left, int(own * _NS)) if own and self._policy.idempotent else left

    def after(
        self, error: RpcError, endpoint: E | None, endpoints: Sequence[E], now: int, *, old: bool = False
    ) -> int | None:
        """Nanoseconds until the next attempt, or None: the call has failed with `problem`.

        `old`: it was a connection from before this call, so that its end says nothing of the endpoint.
        """
        self.problem = error if not self.number else _may_have_run(error)
        if endpoint is not None:
            self._note(error, endpoint, old)
        if now >= self.deadline:
            return None
        elsewhere = any(each not in self._tried for each in endpoints)
        if elsewhere and error.not_run and error.status is Status.UNAVAILABLE:
            return 0
        return self._retry(error, elsewhere, now) if elsewhere or error.status is not Status.UNIMPLEMENTED else None

    def _note(self, error: RpcError, endpoint: E, old: bool) -> None:
        if old and error.status is Status.UNAVAILABLE and endpoint not in self._spared:
            self._spared.append(endpoint)
            return
        self._tried.append(endpoint)
        if error.status is Status.UNIMPLEMENTED:
            self._lacking.append(endpoint)

    def _retry(self, error: RpcError, elsewhere: bool, now: int) -> int | None:
        if self._settled or self._made >= self._policy.retries or not self._may_repeat(error):
            return None
        pause = 0 if elsewhere and self._made == 0 else self._pause()
        if now + pause >= self.deadline or not self._budget.take(now):
            return None
        self._made += 1
        self.number += not error.not_run
        return pause

    def _may_repeat(self, error: RpcError) -> bool:
        if error.status in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED):
            return error.not_run or self._policy.idempotent
        return error.not_run and error.status in (Status.RESOURCE_EXHAUSTED, Status.UNIMPLEMENTED)

    def _pause(self) -> int:
        bound = min(self._policy.backoff * 2.0**self._made, self._policy.backoff_max)
        return int(self._chance() * bound * _NS)


def _may_have_run(error: RpcError) -> RpcError:
    """Of a call that may have run before it was refused nothing else may be said."""
    return RpcError(error.status, error.text, details=error.details) if error.not_run else error


class Hedging:
    """When one method's calls are hedged. Under `lock`, any thread."""

    def __init__(self, policy: Policy, lock: AbstractContextManager[object]) -> None:
        self._fixed = policy.hedge_delay
        self._lock = lock
        self._budget = Budget(policy.hedge_share, 0.0, lock, full=False)
        self._counts: dict[int, int] = {}  # of latencies, by bucket
        self._count = 0

    def forget_forked(self, lock: AbstractContextManager[object]) -> None:
        """In a forked child: a thread of the parent may have had the lock."""
        self._lock = self._budget._lock = lock

    @property
    def taken(self) -> int:
        """How many were."""
        return self._budget.taken

    def delay(self) -> int | None:
        """A call begins: nanoseconds after which it may be hedged, if it may be."""
        self._budget.called()
        if self._fixed is None or self._fixed != P95:
            return None if self._fixed is None else int(self._fixed * _NS)
        with self._lock:
            return self._p95() if self._count >= _FEWEST else None

    def take(self, now: int) -> bool:
        """Whether a call may be hedged that has lasted for its delay; then that is paid for."""
        return self._budget.take(now)

    def lasted(self, latency: int) -> None:
        """A request was answered, or given up, after so many nanoseconds."""
        bucket = math.ceil(math.log2(max(1, latency)) * _STEPS)
        with self._lock:
            if self._count >= _REMEMBERED:
                self._counts = {each: count // 2 for each, count in self._counts.items() if count > 1}
                self._count = sum(self._counts.values())
            self._counts[bucket] = self._counts.get(bucket, 0) + 1
            self._count += 1

    def _p95(self) -> int:
        above = self._count // 20
        for bucket in sorted(self._counts, reverse=True):
            above -= self._counts[bucket]
            if above < 0:
                break
        return int(2.0 ** (bucket / _STEPS))
