"""Retries: what a call that failed may still try, where, when and at whose cost. One logic for all three faces.

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
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from mprpc.errors import RpcError, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

__all__ = ["Attempts", "Budget", "Policy"]

E = TypeVar("E")  # an endpoint; only ever compared

_NS = 1_000_000_000
_BURST = 10.0  # seconds of its rate, and at least so many tokens, that a budget saves up


class Policy(NamedTuple):
    """What a method's calls may do; durations in seconds."""

    idempotent: bool
    retries: int
    backoff: float  # the first pause's bound
    backoff_max: float
    attempt_timeout: float  # of an idempotent method's single attempt; 0.0: the call's own


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
                 "number", "problem")  # fmt: skip

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

    def next(self, endpoints: Sequence[E]) -> E | None:
        """The one to try: the first of them that the call has not been at, or of a new round. None: there is none."""
        for endpoint in endpoints:
            if endpoint not in self._tried:
                return endpoint
        self._tried = list(self._lacking)
        return next((endpoint for endpoint in endpoints if endpoint not in self._tried), None)

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
