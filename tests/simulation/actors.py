"""Providers and clients: what drives the sessions and the decisions, as thin as it can be.

A client sends a call on the connection to an endpoint, takes its answer, gives up at its deadline and asks the
decisions what to do about a failure. A provider runs handlers that take their time, drains, dies and comes back. Both
register or look with a `Reader`, a process of `discovery_simulator` whose messages move by the clock.
"""

from __future__ import annotations

import contextlib
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

from discovery_simulator import SERVICE, SESSION_TIMEOUT, Process
from mprpc._native import lib
from mprpc.balancer import STRATEGIES
from mprpc.config import MprpcConfig
from mprpc.desk import Action, Replace, ReportDown, Show
from mprpc.errors import DeadlineExceeded, RpcError, Status, Unavailable
from mprpc.futures import PASSING
from mprpc.pool import Pool, Pools
from mprpc.retry import P95, Attempts, Budget, Hedging, Policy
from mprpc.subchannel import Subchannel
from simulation.network import Timer, Wire
from simulation.sessions import CANCEL, GOAWAY, PING, PONG, RESPONSE, Event, Session, Violation

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulation.run import Run

CONNECT_TIMEOUT = 1.0
WITHDRAW_WAIT = 1.0  # seconds at most between an orderly stop's end of its nodes and GOAWAY
DRAIN = 5.0  # and then for what is in flight
ZOOKEEPER_LATENCY = (0.0005, 0.01)
RECONNECT = (0.05, 0.6)
POLICY = Policy(idempotent=False, retries=3, backoff=0.05, backoff_max=1.0, attempt_timeout=0.0)  # the keys' defaults
HEDGE_SHARE = 0.1
RETRY_SHARE, RETRY_RATE = 0.2, 1.0  # less a second than by default, so that the budget is felt
CONFIG = MprpcConfig()
_S = 1_000_000_000
_FAULT = dict.fromkeys((Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.RESOURCE_EXHAUSTED), lib.MPRPC_LOAD_FAILED)
QUESTION, ANSWER = struct.Struct("<QI"), struct.Struct("<QQ")


class Box(deque[Any]):
    """Messages under way; each moves some time after it was put there."""

    def __init__(self, put: Callable[[], object]) -> None:
        super().__init__()
        self._put = put

    def append(self, message: Any) -> None:
        super().append(message)
        self._put()


class Member(Process):
    """A process at ZooKeeper. It connects again by itself; a session without a connection ends at its time."""

    def __init__(self, run: Run, address: str = "") -> None:
        self._run = run
        self._wake: Timer | None = None
        self._last = [0.0, 0.0]
        super().__init__(run.world, address)
        run.world.processes.append(self)
        self.outbox = Box(lambda: self._later(0, self._send))
        self.inbox = Box(lambda: self._later(1, self._receive))
        self.shown: Callable[[], object] = lambda: None

    def _later(self, lane: int, move: Callable[[], None]) -> None:
        clock = self._run.clock
        self._last[lane] = max(self._last[lane], clock.now + clock.dice.uniform(*ZOOKEEPER_LATENCY))
        clock.at(self._last[lane], move)

    def _send(self) -> None:
        if self.outbox:
            self.send_one()

    def _receive(self) -> None:
        if self.running and self.inbox:
            self.handle_one()

    def handle(self, event: Any) -> None:
        super().handle(event)
        when = self.reconciler.wakeup
        if self._wake is not None:
            self._wake.cancel()
        self._wake = None if when is None else self._run.clock.at(when, self._tick)

    def _tick(self) -> None:
        self._wake = None
        self.tick()

    def _do(self, action: Action) -> None:
        super()._do(action)
        if isinstance(action, Show):
            self.shown()
        elif isinstance(action, Replace):
            self.come_back()

    def disconnect(self, *, carried_out: int = 0) -> None:
        session = self.session
        super().disconnect(carried_out=carried_out)
        if session in self.world.sessions:
            self._run.clock.later(SESSION_TIMEOUT, lambda: self._expire(session))

    def _expire(self, session: int) -> None:
        if not (self.connected and self.session == session):
            self.world.end_session(session)

    def come_back(self) -> None:
        self._run.clock.later(self._run.clock.dice.uniform(*RECONNECT), self._reconnect)

    def _reconnect(self) -> None:
        if not self.running or self.connected:
            return
        if self._run.zookeeper_down:
            self.come_back()
        else:
            self.connect()

    def lose(self) -> None:
        """The connection breaks, somewhere within what is under way."""
        if self.connected:
            self.disconnect(carried_out=self._run.clock.dice.randrange(3))
            self.come_back()

    def lose_session(self, purged_after: float) -> None:
        if self.connected:
            session = self.expire(purge=False)
            self._run.clock.later(purged_after, lambda: self.world.end_session(session))
            self.come_back()

    def die(self) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self.kill()


class Request:
    """One request that a provider has accepted."""

    __slots__ = ("attempt", "call_id", "cancelled", "connection", "deadline", "number", "sent", "started")

    def __init__(self, connection: Accepted, event: Event) -> None:
        self.connection = connection
        self.call_id = event.call_id
        self.deadline = event.deadline
        self.number, self.sent = QUESTION.unpack(event.payload)
        self.attempt = event.attempt
        self.started = self.cancelled = False


class Accepted:
    """A provider's end of a connection."""

    def __init__(self, provider: Provider, wire: Wire) -> None:
        self.provider = provider
        self.wire = wire
        self.session = Session(provider.run.native, server=True)
        self.requests: dict[int, Request] = {}

    def arrived(self, data: bytes) -> None:
        provider, clock = self.provider, self.provider.run.clock
        if provider.paused(lambda: self.arrived(data)) or self not in provider.connections:
            return
        try:
            events, out = self.session.receive(data, clock.now)
        except Violation as error:
            provider.run.violate(f"a provider ended a connection: {error}")
            self.wire.cut()
            return
        self.wire.send(1, out)
        for event in events:
            if event.kind == CANCEL:
                if event.call_id in self.requests:
                    self.requests[event.call_id].cancelled = True
            else:
                self._accept(Request(self, event), event.method)

    def _accept(self, request: Request, method: int) -> None:
        run = self.provider.run
        if request.call_id in self.requests:
            run.violate(f"call_id {request.call_id} is in use twice on a connection")
        self.requests[request.call_id] = request
        if bool(method) == run.calls[request.number].idempotent:
            run.violate(f"call {request.number} came as another method")
        run.clock.later(run.queueing(), lambda: self._start(request))

    def _start(self, request: Request) -> None:
        provider = self.provider
        run = provider.run
        if provider.paused(lambda: self._start(request)):
            return
        if provider.dead or self not in provider.connections:
            return
        if request.cancelled:
            del self.requests[request.call_id]
            run.native.lib.mprpc_session_unaccept(self.session.handle)
        elif request.deadline and run.clock.now >= request.deadline:
            self._reply(request, Status.DEADLINE_EXCEEDED, not_run=True)
        elif len(self.requests) > run.crowd:
            self._reply(request, Status.RESOURCE_EXHAUSTED, not_run=True)
        else:
            request.started = True
            run.started(request, provider)
            run.clock.later(run.handling(), lambda: self._finish(request))

    def _finish(self, request: Request) -> None:
        provider = self.provider
        if provider.paused(lambda: self._finish(request)):
            return
        if not provider.dead and self in provider.connections:
            self._reply(request, Status.OK)

    def _reply(self, request: Request, status: Status, *, not_run: bool = False) -> None:
        self.requests.pop(request.call_id, None)
        payload = b"" if status else ANSWER.pack(request.number, self.provider.token)
        self.wire.send(1, self.session.reply(request.call_id, payload, status, not_run))

    def ended(self) -> None:
        if self in self.provider.connections:
            self.provider.connections.remove(self)


class Provider:
    """One life of the provider at an address."""

    def __init__(self, run: Run, address: str) -> None:
        self.run = run
        self.address = address
        self.token = run.next_token()
        self.connections: list[Accepted] = []
        self._paused_until = 0.0
        self._late: list[Callable[[], None]] = []  # what would have happened meanwhile, in order
        self.dead = self.draining = False
        self.member = Member(run, address)
        self.member.publish()
        self.member.come_back()

    def accept(self, wire: Wire) -> None:
        accepted = Accepted(self, wire)
        if self.draining:
            accepted.session.handle.draining = 1
        self.connections.append(accepted)
        wire.accept(accepted)

    def pause(self, seconds: float) -> None:
        if not self._paused_until:
            self._paused_until = self.run.clock.now + seconds
            self.run.clock.at(self._paused_until, self._go_on)

    def paused(self, then: Callable[[], None]) -> bool:
        """Whether the process stands still; `then` happens when it goes on."""
        if self._paused_until:
            self._late.append(then)
        return bool(self._paused_until)

    def _go_on(self) -> None:
        late, self._late, self._paused_until = self._late, [], 0.0
        for then in late:
            then()

    def kill(self) -> None:
        self.dead = True
        for connection in list(self.connections):
            connection.wire.cut()
        self.connections.clear()
        self.member.die()

    def stop(self) -> None:
        """The orderly way: unlisted, drained, closed."""
        self.member.withdraw()
        self.run.clock.later(self.run.clock.dice.uniform(0.0, WITHDRAW_WAIT), self._drain)

    def _drain(self) -> None:
        if self.dead:
            return
        self.draining = True
        for connection in self.connections:
            connection.wire.send(1, connection.session.drain())
        self._close_when_idle(self.run.clock.now + DRAIN)

    def _close_when_idle(self, bound: float) -> None:
        if self.dead:
            return
        clock = self.run.clock
        if self.connections and clock.now < bound:
            clock.later(0.02, lambda: self._close_when_idle(bound))
            return
        self.dead = True
        for connection in list(self.connections):
            self.run.outstayed(connection)
            connection.wire.finish(1)
        self.connections.clear()
        self.member.die()
        self.run.stopped(self)


class Call:
    """One call of a client's."""

    def __init__(self, number: int, client: Client, idempotent: bool, timeout: float) -> None:
        self.number = number
        self.client = client
        self.idempotent = idempotent
        self.began = client.run.clock.now
        self.deadline = self.began + timeout
        policy = POLICY._replace(idempotent=idempotent, attempt_timeout=client.hurry)
        self.attempts: Attempts[Remote] = Attempts(
            policy, client.budget, _ns(self.deadline), client.run.clock.dice.random
        )
        self.link: Link | None = None
        self.old = False  # the link is from before this attempt
        self.call_id = 0
        self.sent_at = 0
        self.sent = self.retries = 0  # how often; retries are those that cost something
        self.hurry: Timer | None = None
        self.hedge: Hedge | None = None  # its second request, while that is under way
        self.held: RpcError | None = None  # what it ends with unless that is answered
        self.outcome: RpcError | int | None = None  # an error, or who answered
        self.timer = client.run.clock.at(self.deadline, lambda: client.give_up(self))


class Hedge(Call):
    """A call's second request, whose answer ends the call."""

    def __init__(self, first: Call) -> None:
        client, now = first.client, first.client.run.clock.now
        super().__init__(first.number, client, first.idempotent, first.deadline - now)
        self.first = first
        endpoint = first.attempts.endpoint
        assert endpoint is not None
        self.attempts = first.attempts.hedge(endpoint)


class Link:
    """A client's end of a connection, from the moment at which it is asked for."""

    def __init__(self, client: Client, remote: Remote) -> None:
        self.client = client
        self.remote = remote
        self.address = address = remote.address
        self.connected = self.over = False
        self.session = Session(client.run.native, server=False)
        self.calls: dict[int, Call] = {}  # in flight, by call_id
        self._waiting: list[Call] = []
        self._pings: dict[int, bytes] = {}
        run = client.run
        self.wire = Wire(run.clock, run.hosts[address], self)
        self._timeout = run.clock.later(CONNECT_TIMEOUT, self._fail)
        run.clock.at(max(run.clock.now + 2 * self.wire.latency(), self.wire.host.silent_until), self._connect)

    def _connect(self) -> None:
        provider = self.client.run.reachable(self.address)
        if self.over:
            return
        if provider is None:
            self._fail()
            return
        self._timeout.cancel()
        self.connected = True
        provider.accept(self.wire)
        self.remote.link = self
        self.remote.reached()
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            if call.outcome is None:
                self._send(call)

    def _fail(self) -> None:
        if self.connected or self.over:
            return
        self._timeout.cancel()
        self._leave()
        self.remote.unreachable("it can't be reached")
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            if call.outcome is None:
                self.client.failed(call, Unavailable(f"can't connect to {self.address}", not_run=True), self.remote)

    def take(self, call: Call) -> None:
        call.link = self
        if self.connected:
            self._send(call)
        else:
            call.call_id = 0
            self._waiting.append(call)

    def _send(self, call: Call) -> None:
        run = self.client.run
        call.call_id = self.session.call(call.number + 1)
        if call.call_id in self.calls:
            run.violate(f"call_id {call.call_id} was given out twice")
        self.calls[call.call_id] = call
        call.sent += 1
        call.sent_at = _ns(run.clock.now)
        lib.mprpc_load_begin(self.remote.measure)
        question = QUESTION.pack(call.number, call.sent)
        left = call.attempts.timeout(_ns(run.clock.now)) / _S
        self.wire.send(
            0, self.session.request(call.call_id, int(not call.idempotent), question, left, call.attempts.number)
        )

    def forget(self, call: Call) -> None:
        """Nobody waits for it any more."""
        if not call.call_id:
            self._waiting.remove(call)
        elif self.calls.pop(call.call_id, None) is not None:
            if not self.session.forget(call.call_id):
                self.client.run.violate(f"call {call.number} was in flight, but not for its session")
            self.wire.send(0, self.client.run.native.frame(CANCEL, call.call_id))
            self._end_if_idle()

    def ping(self) -> None:
        if self.connected and not self.over:
            number = 1 + max(self._pings, default=0)
            self._pings[number] = number.to_bytes(2, "little") * self.client.run.clock.dice.randrange(1, 32)
            self.wire.send(0, self.client.run.native.frame(PING, number, self._pings[number]))

    def arrived(self, data: bytes) -> None:
        try:
            events, out = self.session.receive(data, self.client.run.clock.now)
        except Violation as error:
            self.client.run.violate(f"a client ended a connection: {error}")
            self.wire.cut()
            return
        self.wire.send(0, out)
        for event in events:
            if event.kind == RESPONSE:
                self._answered(event)
            elif event.kind == PONG:
                self._ponged(event)
        if any(event.kind == GOAWAY for event in events):
            self._gone()  # last: the answer to a call that GOAWAY says never ran may be among them
        self._end_if_idle()

    def _answered(self, event: Event) -> None:
        run = self.client.run
        call = self.calls.pop(event.call_id, None)
        if call is None or event.tag != call.number + 1:
            run.violate(f"an answer to call_id {event.call_id}, which is not in flight, came through")
            return
        if event.status:
            error = RpcError(event.status, "as the provider says", not_run=event.not_run)
            self.remote.answered(error)
            self.client.failed(call, error, self.remote)
            return
        number, token = ANSWER.unpack(event.payload)
        if number != call.number:
            run.violate(f"call {call.number} got the answer of call {number}")
        self.client.complete(call, token)

    def _ponged(self, event: Event) -> None:
        if self._pings.pop(event.call_id, None) != event.payload:
            self.client.run.violate("a PONG with another payload than its PING's")

    def _gone(self) -> None:
        """GOAWAY: what is above the highest accepted never ran."""
        self._leave(over=False)
        above = [call for call_id, call in self.calls.items() if call_id > self.session.handle.goaway_id]
        for call in above:
            if not self.session.forget(call.call_id):
                self.client.run.violate(f"call {call.number} was in flight, but not for its session")
            del self.calls[call.call_id]
            self.client.failed(call, Unavailable("the provider is shutting down", not_run=True), self.remote)

    def _end_if_idle(self) -> None:
        if self.session.handle.gone and not self.session.in_flight and not self.over:
            self._leave()
            self.wire.finish(0)

    def _leave(self, *, over: bool = True) -> None:
        self.over = self.over or over
        if self.remote.way is self:
            self.remote.way = self.remote.link = None

    def ended(self) -> None:
        self._leave()
        calls, self.calls = list(self.calls.values()), {}
        for call in calls:
            self.session.forget(call.call_id)
            self.remote.broke("the connection ended")
            self.client.failed(call, Unavailable(f"the connection to {self.address} ended"), self.remote)


class Probe:
    """A PING on a connection of its own, to an endpoint that rests."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._over = False
        run = self._run = remote.client.run
        self._session = Session(run.native, server=False)
        self._wire = Wire(run.clock, run.hosts[remote.address], self)
        run.clock.later(CONNECT_TIMEOUT, self.ended)
        run.clock.at(max(run.clock.now + 2 * self._wire.latency(), self._wire.host.silent_until), self._connect)

    def _connect(self) -> None:
        provider = self._run.reachable(self._remote.address)
        if provider is None:
            self.ended()
        elif not self._over:
            provider.accept(self._wire)
            self._wire.send(0, self._run.native.frame(PING, 1, b"probe"))

    def arrived(self, data: bytes) -> None:
        events, _ = self._session.receive(data, self._run.clock.now)
        for event in events:
            if event.kind == PONG:
                self._end(event.status == Status.OK)

    def ended(self) -> None:
        self._end(False)

    def _end(self, answered: bool) -> None:
        if not self._over:
            self._over = True
            self._wire.finish(0)
            self._remote._judge_probe(answered)


class Remote(Subchannel):
    """An endpoint as a client knows it: the library's own health of it, over simulated connections."""

    def __init__(self, client: Client, address: str) -> None:
        super().__init__(address, False, CONFIG)
        self.client = client
        self.way: Link | None = None  # to it; `link` is the same once it is connected

    def _probe(self) -> None:
        if self.health.out and self.client.run.clock.now >= self.health.rests_until:
            Probe(self)

    def drop(self, link: Any) -> None:
        """What is in flight there goes on."""
        if self.way is link:
            self.way = self.link = None


class Client:
    """A process that calls. `mprpc.pool` says where a call goes, `mprpc.retry` what one that failed may still try."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.waiting: list[Call] = []  # for a list
        self.budget = Budget(RETRY_SHARE, RETRY_RATE, contextlib.nullcontext())
        self.hurry = 0.0 if run.gentle else run.clock.dice.choice((0.0, 0.3))  # seconds of an attempt
        hedged = None if run.gentle else run.clock.dice.choice((None, 0.05, P95))
        self.policy = POLICY._replace(idempotent=True, hedge_delay=hedged, hedge_share=HEDGE_SHARE)
        self.hedging = Hedging(self.policy, contextlib.nullcontext())
        self.remotes: dict[str, Remote] = {}
        self.links: list[Link] = []  # all that there have been
        self._pools = Pools(CONFIG, run.clock.dice.choice(STRATEGIES), None)
        self.member = Member(run)
        self.member.shown = self._listed
        self.member.follow()
        self.member.come_back()

    def addresses(self) -> list[str]:
        snapshot = self.member.snapshots.get(SERVICE)
        return [] if snapshot is None else [endpoint.address for endpoint in snapshot.endpoints]

    def pool(self) -> Pool:
        """With the newest list, as `mprpc.target` keeps it."""
        pool, snapshot = self._pools.of(SERVICE, ""), self.member.snapshots.get(SERVICE)
        if snapshot is not None and snapshot is not pool.seen:
            remotes = [self._remote(each.address) for each in snapshot.endpoints]
            for remote, each in zip(remotes, snapshot.endpoints, strict=True):
                remote.listed(each.id, SERVICE, self._pools.told)
            pool.update(snapshot, snapshot.endpoints, remotes)
        return pool

    def _remote(self, address: str) -> Remote:
        if address not in self.remotes:
            self.remotes[address] = Remote(self, address)
        return self.remotes[address]

    def _listed(self) -> None:
        if self.addresses():
            waiting, self.waiting = self.waiting, []
            for call in waiting:
                self.attempt(call)

    def start(self, call: Call) -> None:
        self.budget.called()
        self.run.called(self)
        if call.idempotent and self.policy.hedges:
            delay = self.hedging.delay()
            if delay is not None:
                self.run.clock.later(delay / _S, lambda: self._hedge(call))
        self.attempt(call)

    def _hedge(self, call: Call) -> None:
        slow, known = call.attempts.endpoint, self.pool().known
        if call.outcome is not None or slow is None or all(each is slow for each in known):
            return
        if self.hedging.take(_ns(self.run.clock.now)):
            self.run.hedged(self)
            call.hedge = Hedge(call)
            self.attempt(call.hedge)

    def attempt(self, call: Call) -> None:
        """The next attempt, unless the call has ended meanwhile."""
        if call.outcome is not None:
            return
        pool = self.pool()
        if not pool:
            self.waiting.append(call)
            return
        remote: Any = call.attempts.next(pool.all(pool.next(None)))  # type: ignore[arg-type]  # they are Remotes
        if remote is None:
            self.failed(call, Unavailable("nobody has the method", not_run=True), None)
            return
        call.old = remote.link is not None
        if remote.way is None:
            remote.way = Link(self, remote)
            self.links.append(remote.way)
        now = _ns(self.run.clock.now)
        own = call.attempts.timeout(now)
        if own < call.attempts.deadline - now:
            call.hurry = self.run.clock.later(own / _S, lambda: self._take_too_long(call))
        remote.way.take(call)

    def _take_too_long(self, call: Call) -> None:
        """The attempt's own time is over, the call's is not."""
        link, sent = call.link, bool(call.call_id)
        if link is not None:
            link.forget(call)
            link.remote.silent(int(sent))
            error = DeadlineExceeded("no answer in the attempt's time", not_run=not sent)
            self.failed(call, error, link.remote)

    def failed(self, call: Call, error: RpcError, remote: Remote | None) -> None:
        if call.outcome is not None:
            self.run.violate(f"call {call.number} failed after its end")
            return
        self._leave(call, _FAULT.get(error.status, lib.MPRPC_LOAD_OK))
        known: Any = self.pool().known
        pause = call.attempts.after(error, remote, known, _ns(self.run.clock.now), old=call.old)
        if pause is None:
            self.complete(call, call.attempts.problem or error)
            return
        if remote is not None and not (call.old and isinstance(error, Unavailable)):
            self.member.handle(ReportDown(SERVICE, remote.address))
        self.run.goes_on(call, error)
        if pause:
            self.run.clock.later(pause / _S, lambda: self.attempt(call))
        else:
            self.attempt(call)

    def give_up(self, call: Call) -> None:
        sent = bool(call.call_id)
        if call.link is not None:
            call.link.remote.silent(int(sent))
        self._drop(call, lib.MPRPC_LOAD_FAILED)
        not_run = not sent and call.attempts.number == 0
        self.complete(call, DeadlineExceeded("no answer within the call's deadline", not_run=not_run))

    def _drop(self, call: Call, verdict: int) -> None:
        """Nobody waits for its answer any more."""
        call.timer.cancel()
        if call.link is not None:
            call.link.forget(call)
        elif call in self.waiting:
            self.waiting.remove(call)
        self._leave(call, verdict)

    def _leave(self, call: Call, verdict: int) -> None:
        """An attempt is over."""
        if call.link is not None and call.call_id:
            lib.mprpc_load_end(call.link.remote.measure, call.sent_at, _ns(self.run.clock.now), verdict)
        call.link, call.call_id = None, 0
        if call.hurry is not None:
            call.hurry.cancel()

    def complete(self, call: Call, outcome: RpcError | int) -> None:
        call.timer.cancel()
        if call.outcome is not None:
            self.run.violate(f"call {call.number} ended twice")
            return
        self._leave(call, lib.MPRPC_LOAD_OK)
        passing = isinstance(outcome, PASSING)
        if isinstance(call, Hedge):
            call.outcome, first = outcome, call.first
            first.hedge = None
            if not passing:
                self._drop(first, lib.MPRPC_LOAD_UNDECIDED)
                self.complete(first, outcome)
            elif first.held is not None:
                self.complete(first, first.held)
            return
        if passing and call.hedge is not None:
            assert isinstance(outcome, RpcError)
            call.held = outcome
            return
        if call.hedge is not None:
            self._drop(call.hedge, lib.MPRPC_LOAD_UNDECIDED)
            call.hedge.outcome = outcome
        else:
            self.hedging.lasted(_ns(self.run.clock.now - call.began))
        call.outcome = outcome
        self.run.completed(call)


def _ns(seconds: float) -> int:
    return round(seconds * _S)
