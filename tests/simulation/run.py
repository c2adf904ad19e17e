"""One seed: what goes wrong and when, and what must hold whatever does."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mprpc.pool
import mprpc.subchannel
import mprpc.timekeeper
from discovery_simulator import World
from mprpc._native import lib
from mprpc.errors import RpcError, Status
from simulation.actors import HEDGE_SHARE, POLICY, RETRY_RATE, RETRY_SHARE, Accepted, Call, Client, Provider, Request
from simulation.network import Clock, Host
from simulation.sessions import Native

PROVIDERS, CLIENTS = 3, 2
CALLS, CALM_CALLS = 300, 40
FAULTS = (11, 16)
STORM = (1.5, 12.0)  # seconds after the start: in which faults begin
VISIBLE = 6.0  # seconds after the last fault's end within which everybody is sure of just the live providers
CALM = 2.0  # seconds of calls that must all succeed
BURST = 10.0  # seconds of the budget's rate, and at least so many retries, that may be saved up
GENTLE_EVERY = 4  # one seed of so many has only faults that must fail no call
EXPECTED = {Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.RESOURCE_EXHAUSTED}

_native: list[Native] = []


def native() -> Native:
    """The library's own build."""
    if not _native:
        _native.append(Native())
    return _native[0]


class Run:
    """One seed's world. `run` it once; `violations` is what did not hold."""

    def __init__(self, seed: int, native: Native) -> None:
        self.seed = seed
        self.native = native
        self.clock = Clock(seed)
        self.world = World(seed)
        self.clock.passed = lambda now: setattr(self.world, "now", now)
        self.gentle = seed % GENTLE_EVERY == 0
        self.zookeeper_down = False
        self.crowd = 40
        self.calm = False
        self.violations: list[str] = []
        self.calls: list[Call] = []
        self.ran: Counter[int] = Counter()
        self.runners: dict[int, set[int]] = {}
        self.faults: Counter[str] = Counter()
        self.refusing: set[str] = set()
        self.debts: dict[Client, tuple[float, float]] = {}
        self._firsts: set[int] = set()  # calls that ran under the number of a first attempt
        self.hedges: Counter[Client] = Counter()
        self._tokens = 0
        self._digest = hashlib.sha256()
        self.addresses = [f"10.0.0.{i + 1}:8000" for i in range(PROVIDERS)]
        self.hosts = {address: Host() for address in self.addresses}
        self.providers = {address: Provider(self, address) for address in self.addresses}
        with self._virtual():
            self.clients = [Client(self) for _ in range(CLIENTS)]
        self._restarting: set[str] = set()

    # ---- what actors ask and tell ----

    def violate(self, text: str) -> None:
        self.violations.append(f"{self.clock.now - 1000:.4f} s: {text}")

    def reachable(self, address: str) -> Provider | None:
        """Who takes a connection to that address now."""
        provider = self.providers[address]
        return None if provider.dead or address in self.refusing else provider

    def next_token(self) -> int:
        self._tokens += 1
        return self._tokens

    def queueing(self) -> float:
        """Seconds until a handler starts."""
        dice = self.clock.dice
        return 0.0 if dice.random() < 0.8 else dice.uniform(0.0, 0.05 if self.calm else 0.3)

    def handling(self) -> float:
        """Seconds that a handler takes."""
        dice = self.clock.dice
        slow = dice.random() < 0.15 and not self.calm
        return dice.uniform(0.1, 2.0) if slow else dice.uniform(0.0, 0.02)

    def called(self, client: Client) -> None:
        """A call's share of the budget for retries."""
        debt, when = self.debts.get(client, (0.0, self.clock.now))
        self.debts[client] = max(0.0, debt - RETRY_SHARE), when

    def hedged(self, client: Client) -> None:
        """A second request, within their share of all calls."""
        self.hedges[client] += 1
        calls = sum(call.client is client and call.idempotent for call in self.calls)
        if self.hedges[client] > calls * HEDGE_SHARE:
            self.violate(f"{self.hedges[client]} of {calls} calls are hedged")

    def goes_on(self, call: Call, error: RpcError) -> None:
        """Another attempt. One that costs the providers nothing is free; of the others no more than the budget."""
        if error.not_run and error.status is Status.UNAVAILABLE:
            return
        debt, when = self.debts[call.client]
        debt = max(0.0, debt - (self.clock.now - when) * RETRY_RATE) + 1.0
        self.debts[call.client] = debt, self.clock.now
        if debt > max(RETRY_RATE, 1.0) * BURST + 1.0:
            self.violate(f"call {call.number} is made again, over the channel's budget of retries")
        call.retries += 1
        if call.retries > POLICY.retries:
            self.violate(f"call {call.number} is made again for the {call.retries}th time")

    def started(self, request: Request, provider: Provider) -> None:
        call = self.calls[request.number]
        self.ran[request.number] += 1
        self.runners.setdefault(request.number, set()).add(provider.token)
        if self.ran[request.number] > 1 and not call.idempotent:
            self.violate(f"call {request.number}, which is not idempotent, ran twice")
        if request.attempt == 0 and request.number in self._firsts:
            self.violate(f"call {request.number} runs again, and says that it is the first time")
        if request.attempt == 0:
            self._firsts.add(request.number)
        if isinstance(call.outcome, RpcError) and call.outcome.not_run:
            self.violate(f"call {request.number} ran after it was said not to have")

    def completed(self, call: Call) -> None:
        outcome, number = call.outcome, call.number
        if self.clock.now > call.deadline + 1e-9:
            self.violate(f"call {number} ended {self.clock.now - call.deadline:.3f} s past its deadline")
        if isinstance(outcome, RpcError):
            self._failed(call, outcome)
        elif outcome not in self.runners.get(number, ()):
            self.violate(f"call {number} was answered by somebody who has not run it")
        said = outcome.status.name if isinstance(outcome, RpcError) else outcome
        self._digest.update(f"{number} {said} {self.clock.now:.9f}\n".encode())

    def _failed(self, call: Call, error: RpcError) -> None:
        if error.not_run and self.ran[call.number]:
            self.violate(f"call {call.number} ran, but was said not to have: {error}")
        if error.status not in EXPECTED:
            self.violate(f"call {call.number} failed: {error}")
        elif self.calm:
            self.violate(f"call {call.number} failed though nothing was wrong any more: {error}")
        elif self.gentle:
            self.violate(f"call {call.number} failed though nothing happened that may fail a call: {error}")

    def outstayed(self, connection: Accepted) -> None:
        """A connection that was still there at the end of the time to drain."""
        if self.gentle and not connection.requests:
            self.violate("a client has kept a connection without calls though its provider said GOAWAY")

    def stopped(self, provider: Provider) -> None:
        """It has stopped the orderly way."""
        self.clock.later(self.clock.dice.uniform(0.05, 0.5), partial(self._revive, provider.address))

    # ---- faults ----

    def _revive(self, address: str) -> None:
        self.providers[address] = Provider(self, address)
        self._restarting.discard(address)

    def _restart(self, address: str) -> bool:
        """At most one at a time; in a gentle seed only while the others are listed, so that somebody is there."""
        if self._restarting or (self.gentle and not self._all_listed()):
            return False
        self._restarting.add(address)
        self.providers[address].stop()
        return True

    def _all_listed(self) -> bool:
        return not self.zookeeper_down and all(sorted(each.addresses()) == self.addresses for each in self.clients)

    def _kill(self, address: str) -> bool:
        if address in self._restarting:
            return False
        self._restarting.add(address)
        self.providers[address].kill()
        self.clock.later(self.clock.dice.uniform(0.05, 3.0), partial(self._revive, address))
        return True

    def _cut(self, address: str) -> bool:
        """Every connection to it."""
        connections = list(self.providers[address].connections)
        for connection in connections:
            connection.wire.cut()
        return bool(connections)

    def _cut_one(self, address: str) -> bool:
        connections = self.providers[address].connections
        if connections:
            self.clock.dice.choice(connections).wire.cut()
        return bool(connections)

    def _silence(self, address: str) -> bool:
        """The network swallows what it has, then gives it back all at once: late answers, late requests."""
        self.hosts[address].silent_until = self.clock.now + self.clock.dice.uniform(0.05, 2.5)
        return True

    def _slow(self, address: str) -> bool:
        host = self.hosts[address]
        host.slowness = self.clock.dice.uniform(5.0, 80.0)
        self.clock.later(self.clock.dice.uniform(0.2, 2.0), lambda: setattr(host, "slowness", 1.0))
        return True

    def _pause(self, address: str) -> bool:
        """The process stands still."""
        provider = self.providers[address]
        provider.pause(self.clock.dice.uniform(0.05, 2.5))
        return True

    def _refuse(self, address: str) -> bool:
        """New connections are refused, and those that there are end."""
        self.refusing.add(address)
        self.clock.later(self.clock.dice.uniform(0.05, 2.0), lambda: self.refusing.discard(address))
        return self._cut(address)

    def _crowd(self, address: str) -> bool:
        """One call is taken at a time, or none."""
        self.crowd = self.clock.dice.choice((0, 1))
        self.clock.later(self.clock.dice.uniform(0.2, 1.5), lambda: setattr(self, "crowd", 40))
        return True

    def _lose_zookeeper(self, address: str) -> bool:
        self._member(address).lose()
        return True

    def _expire(self, address: str) -> bool:
        self._member(address).lose_session(self.clock.dice.choice((0.0, 0.3, 2.0)))
        return True

    def _zookeeper_down(self, address: str) -> bool:
        if self.zookeeper_down or (self.gentle and self._restarting):
            return False
        self.zookeeper_down = True
        for member in list(self.world.processes):
            if member.connected:
                member.lose()  # type: ignore[attr-defined]
        self.clock.later(self.clock.dice.uniform(0.5, 3.0), lambda: setattr(self, "zookeeper_down", False))
        return True

    def _member(self, address: str) -> Any:
        """A provider's or a client's process; in a gentle seed no provider's while another one restarts."""
        members = [client.member for client in self.clients]
        if not (self.gentle and self._restarting):
            members.append(self.providers[address].member)
        return self.clock.dice.choice(members)

    def _faults(self) -> list[Callable[[str], bool]]:
        harmless = [self._restart, self._lose_zookeeper, self._expire, self._zookeeper_down]
        if self.gentle:
            return harmless
        return [
            *harmless, self._kill, self._kill, self._cut, self._cut_one, self._silence, self._slow, self._pause,
            self._refuse, self._crowd,
        ]  # fmt: skip

    def _strike(self) -> None:
        """One fault; another if that one can't be now."""
        dice, choices = self.clock.dice, self._faults()
        for _ in range(20):
            fault = dice.choice(choices)
            if fault(dice.choice(self.addresses)):
                self.faults[fault.__name__.strip("_")] += 1
                return

    # ---- the course of a run ----

    def _call(self, longest: float) -> None:
        dice = self.clock.dice
        shortest = 2.0 if self.calm else 10.0 if self.gentle else 0.02
        timeout = dice.uniform(shortest, max(longest, shortest * 1.5)) if dice.random() < 0.7 else shortest
        call = Call(len(self.calls), dice.choice(self.clients), dice.random() < 0.5, timeout)
        self.calls.append(call)
        call.client.start(call)

    def _ping(self) -> None:
        for client in self.clients:
            for remote in client.remotes.values():
                if remote.way is not None:
                    remote.way.ping()

    def run(self) -> Run:
        with self._virtual():
            self._run()
        return self

    @contextlib.contextmanager
    def _virtual(self) -> Iterator[None]:
        """The library's time and chance are the run's."""
        clock = self.clock
        now = SimpleNamespace(monotonic=lambda: clock.now, monotonic_ns=lambda: round(clock.now * 1e9))
        with contextlib.ExitStack() as patches:
            for owner, name, value in (
                (mprpc.pool, "time", now), (mprpc.subchannel, "time", now), (mprpc.pool, "random", clock.dice),
                (mprpc.timekeeper, "at", clock.at),
            ):  # fmt: skip
                patches.enter_context(mock.patch.object(owner, name, value))
            yield

    def _run(self) -> None:
        clock, dice = self.clock, self.clock.dice
        start = clock.now
        for _ in range(CALLS):
            clock.at(start + dice.uniform(1.0, STORM[1] + 1.0), partial(self._call, 3.0))
        for _ in range(dice.randint(*FAULTS)):
            clock.at(start + dice.uniform(*STORM), self._strike)
        for _ in range(10):
            clock.at(start + dice.uniform(*STORM), self._ping)
        # The longest a fault lasts: an orderly stop with what is in flight, and the restart.
        clock.run(start + STORM[1] + WITHDRAW_AND_DRAIN)
        clock.run(clock.now + VISIBLE)
        self._check_lists()
        self.calm = True
        begin = clock.now
        for _ in range(CALM_CALLS):
            clock.at(begin + dice.uniform(0.0, CALM), partial(self._call, 3.0))
        clock.run(begin + CALM + 10.0 + 6.0)
        self._check_leftovers()

    def _check_lists(self) -> None:
        alive = sorted(address for address, provider in self.providers.items() if not provider.dead)
        if len(alive) < PROVIDERS:
            self.violate("a provider has not come back")  # the simulator's own promise
        for i, client in enumerate(self.clients):
            if sorted(client.addresses()) != alive:
                self.violate(f"client {i} lists {sorted(client.addresses())}, but {alive} are alive")

    def _check_leftovers(self) -> None:
        for call in self.calls:
            if call.outcome is None:
                self.violate(f"call {call.number} never ended")
        for client in self.clients:
            if client.waiting:
                self.violate(f"{len(client.waiting)} calls still wait for a list")
            for remote in client.remotes.values():
                if remote.health.out:
                    self.violate(f"{remote.address} still rests: {remote.health.why}")
                if lib.mprpc_load_in_flight(remote.measure):
                    self.violate(f"{remote.address} still has calls in flight, as its load says")
            for link in client.links:
                if link.calls or link.session.in_flight:
                    self.violate(f"a client has {link.session.in_flight} calls in flight in the end")
        for provider in self.providers.values():
            for connection in provider.connections:
                if connection.requests or connection.session.in_flight:
                    self.violate(f"a provider has {connection.session.in_flight} calls in flight in the end")

    @property
    def digest(self) -> str:
        """Of how and when every call ended."""
        return self._digest.hexdigest()[:16]


WITHDRAW_AND_DRAIN = 1.0 + 5.0 + 0.5
