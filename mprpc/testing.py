"""What tests need of mprpc, the users' tests as much as ours.

`pair` is a provider of the test's services and a channel to it, within this process: no socket, no port,
no ZooKeeper:

    class Users(user_mprpc.UserServiceRpc):
        def Login(self, request, controller):
            return user_pb2.LoginResponse(success=request.pwd == b"123456")

    def test_login():
        with mprpc.testing.pair(Users()) as channel:
            users = user_mprpc.UserServiceRpc_Stub(channel)
            assert users.Login(user_pb2.LoginRequest(pwd=b"123456")).success

Both are the real ones, only the bytes between them lie in memory: frames, threads, deadlines, errors and limits are
production's. `serve` is the provider alone, for channels of any kind; `FakeRegistry` tells channels which addresses a
service has, without asking anybody.

`EmbeddedZooKeeper` is a ZooKeeper of its own for one test, on a free port, that can be made to fail in the ways a real
one fails. Its clock stands still until the test moves it, so nothing expires by itself and no test need sleep.
With `pytest_plugins = ["mprpc.testing"]` in a conftest.py the fixture `embedded_zookeeper` is there; pytest itself is
imported only where pytest is already running.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from mprpc.channel import MprpcChannel
from mprpc.config import MprpcConfig
from mprpc.provider import RpcProvider

from .embedded_zookeeper import Clock, Code, EmbeddedZooKeeperServer, Limits, Op, SteppedClock
from .embedded_zookeeper.faults import RequestFault
from .embedded_zookeeper.server import Connection

if TYPE_CHECKING:
    from mprpc.aio import AsyncMprpcChannel
    from mprpc.registry import Endpoint, ServiceView

__all__ = ["Code", "EmbeddedZooKeeper", "FakeRegistry", "Op", "pair", "serve"]

_numbers = count()
_GRACE = 1.0  # seconds that handlers get which still run when a test has ended


@contextmanager
def serve(*services: object, config: MprpcConfig | None = None) -> Iterator[str]:
    """Serves them within this process and gives the address, for `MprpcChannel` and `AsyncMprpcChannel`.

    config: limits and timeouts; where to listen and to register is not taken from it. Any thread.
    """
    within = (config or MprpcConfig()).replace(rpcserverip=f"memory:pair-{next(_numbers)}", zookeeperip="")
    provider = RpcProvider(within)
    for service in services:
        provider.notify_service(service)
    provider.start()
    try:
        yield provider.address
    finally:
        provider.stop(_GRACE)


@contextmanager
def pair(*services: object, config: MprpcConfig | None = None) -> Iterator[MprpcChannel]:
    """A channel to a provider that serves them; both end with the `with`. See the example above. As `serve`."""
    with serve(*services, config=config) as address:
        with MprpcChannel((config or MprpcConfig()).replace(rpcserverip=address, zookeeperip="")) as channel:
            yield channel


class FakeRegistry:
    """Tells channels which addresses a service has, as ZooKeeper would.

        with serve(Users()) as one, serve(Users()) as two:
            registry = FakeRegistry({"fixbug.UserServiceRpc": [one, two]})
            with registry.channel() as channel: …

    A service that it was told nothing of is one whose list has not come yet. Any thread.
    """

    def __init__(self, services: Mapping[str, Iterable[str | Endpoint]] | None = None) -> None:
        self.where = "(the test's)"
        self.reported: list[str] = []
        """Addresses that calls could not reach and went on from, in order."""
        self._changed = threading.Condition()
        self._views: dict[str, ServiceView] = {}
        for service, addresses in (services or {}).items():
            self.list(service, addresses)

    def list(self, service: str, addresses: Iterable[str | Endpoint]) -> None:
        """From now on these are the service's, its full name, providers; none is a list, too. An `Endpoint` of
        `mprpc.registry` says more than an address: weight, zone and tags."""
        from mprpc.registry import Endpoint, Snapshot

        view = self.follow(service)
        listed = (each if isinstance(each, Endpoint) else Endpoint(each) for each in addresses)
        endpoints = tuple(each if each.id else each._replace(id=each.address) for each in listed)
        note = "" if endpoints else f"no provider of {service} is registered at ZooKeeper {self.where}"
        with self._changed:
            view._show(Snapshot(endpoints, True, view.snapshot.version + 1, note=note))
            self._changed.notify_all()

    def channel(self, config: MprpcConfig | None = None, **options: Any) -> MprpcChannel:
        """A channel that asks this registry; options are MprpcChannel's. Close it, or use it with `with`."""
        named = (config or MprpcConfig()).replace(zookeeperip="127.0.0.1")  # a channel with discovery; nobody is asked
        channel = MprpcChannel(named, **options)
        channel._registry = self  # type: ignore[assignment]
        return channel

    def async_channel(self, config: MprpcConfig | None = None, **options: Any) -> AsyncMprpcChannel:
        """The same for asyncio."""
        from mprpc.aio import AsyncMprpcChannel

        channel = AsyncMprpcChannel("memory:replaced")
        channel._channel = self.channel(config, **options)
        return channel

    # ---- what a channel and its views ask ----

    def follow(self, service: str, methods: Iterable[str] = ()) -> ServiceView:
        """The service's list, kept up to date."""
        from mprpc.registry import ServiceView

        with self._changed:
            if service not in self._views:
                self._views[service] = ServiceView(self, service)  # type: ignore[arg-type]
            return self._views[service]

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Waits until a list has made it true."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def post(self, event: Any) -> None:
        """A view tells of a provider that could not be reached."""
        self.reported.append(event.address)

    def close(self) -> None:
        """A channel has been closed; others may go on."""


class EmbeddedZooKeeper(EmbeddedZooKeeperServer):
    """An embedded ZooKeeper with levers for faults; use it with `with`, or `start` and `stop`.

    What a lever does has happened, and everything it causes has been sent, when it returns. Levers may be pulled from
    any thread but not from two at once. A session is named by its id: `client.client_id[0]` of a KazooClient, or
    `owner(path)` of an ephemeral node.

    Session timeouts are negotiated between 2 and 20 `tick_ms`. With `clock=Clock()` time passes by itself.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        tick_ms: int = 500,
        clock: Clock | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(port=port, tick_ms=tick_ms, clock=clock or SteppedClock(), limits=limits)

    @property
    def hosts(self) -> str:
        """`host:port`, for KazooClient and for the configuration."""
        return self.address

    def sessions(self) -> list[int]:
        """The ids of all sessions, connected or not, the oldest first."""
        return self._call(lambda: [session.id for session in self._keeper.sessions])

    def owner(self, path: str) -> int | None:
        """The session that an ephemeral node belongs to; 0 for a persistent node, None where there is no node."""
        node = self._call(lambda: self._keeper.tree.find(path))
        return None if node is None else node.owner

    def advance(self, seconds: float) -> None:
        """Lets time pass. Connected clients count as heard of all the while, unless they are stalled.

        Sessions without a connection expire when their timeout passes.
        """
        clock = self._clock
        if not isinstance(clock, SteppedClock):
            raise TypeError("only a SteppedClock can be advanced")

        def pass_time() -> None:
            clock.advance(seconds)
            if not self._faults.stalled:
                for connection in self._connections:
                    if connection.session is not None:
                        self._keeper.sessions.heard_of(connection.session)

        self._call(pass_time)

    def expire_session(self, session_id: int, *, purge: bool = True) -> None:
        """The session is lost, as after its timeout: its connection ends, and it can't be resumed.

        With purge=False its ephemeral nodes stay until `purge_session`: the ghost of a process whose session the
        server has not yet cleaned up. Raises KeyError where there is no such session.
        """

        def expire() -> None:
            session = self._keeper.sessions.find(session_id)
            if session is None:
                raise KeyError(session_id)
            self._keeper.condemn(session)
            if purge:
                self._keeper.close_session(session)

        self._call(expire)

    def purge_session(self, session_id: int) -> None:
        """Removes the ephemeral nodes of a session expired with purge=False; raises KeyError where there is none."""

        def purge() -> None:
            session = self._keeper.sessions.find(session_id)
            if session is None:
                raise KeyError(session_id)
            self._keeper.close_session(session)

        self._call(purge)

    def drop_connections(self, session_id: int | None = None) -> int:
        """Closes all connections, or those of one session; sessions stay. Returns how many there were."""

        def drop() -> int:
            chosen = [each for each in self._connections if session_id in (None, _session_id(each))]
            for connection in chosen:
                self._close(connection, "dropped, as ordered")
            return len(chosen)

        return self._call(drop)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Meanwhile nothing is read from any connection nor written to one, as if the network swallowed it."""
        self._call(lambda: self._set_stalled(True))
        try:
            yield
        finally:
            self._call(lambda: self._set_stalled(False))

    @contextmanager
    def answers_held(self) -> Iterator[None]:
        """Meanwhile requests are carried out, but answers and watch events wait; then all go out, in order."""
        with self._order("answers_held"):
            yield

    @contextmanager
    def connections_refused(self) -> Iterator[None]:
        """Meanwhile new connections are closed as soon as they are accepted; those that are open stay."""
        with self._order("connections_refused"):
            yield

    @contextmanager
    def expiry_held(self) -> Iterator[None]:
        """Meanwhile no session expires; those whose time ran out do so afterwards, if still not heard of."""
        self._call(lambda: self._keeper.sessions.hold(True))
        try:
            yield
        finally:
            self._call(lambda: self._keeper.sessions.hold(False))

    def refuse_requests(self, code: Code, *, op: Op | None = None, count: int = 1) -> None:
        """The next `count` requests (of one type, or any but pings) are answered with an error and not carried out."""
        self._add_fault(RequestFault(op, count, code))

    def lose_answers(self, *, op: Op | None = None, count: int = 1) -> None:
        """The next `count` requests are carried out, and then their connection closes instead of an answer."""
        self._add_fault(RequestFault(op, count))

    def restart(self, *, keep_data: bool = True, while_down: Callable[[], object] | None = None) -> None:
        """Stops and comes back on the same port, with its data and sessions or with neither.

        `while_down` is called in between. Without its data it counts zxids from 0 again, and turns away every client
        that has seen a higher one, as ZooKeeper does.
        """
        self.stop()
        if not keep_data:
            self.wipe()
        if while_down is not None:
            while_down()
        self.start()

    def _add_fault(self, fault: RequestFault) -> None:
        self._call(lambda: self._faults.request_faults.append(fault))

    @contextmanager
    def _order(self, name: str) -> Iterator[None]:
        self._call(lambda: setattr(self._faults, name, True))
        try:
            yield
        finally:
            self._call(lambda: setattr(self._faults, name, False))

    def _set_stalled(self, stalled: bool) -> None:
        self._faults.stalled = stalled
        for connection in self._connections:
            self._watch(connection)
            self._unflushed[connection] = None


def _session_id(connection: Connection) -> int | None:
    return connection.session.id if connection.session is not None else None


if "pytest" in sys.modules:
    import pytest

    @pytest.fixture
    def embedded_zookeeper() -> Iterator[EmbeddedZooKeeper]:
        """An EmbeddedZooKeeper of this test's own, running."""
        with EmbeddedZooKeeper() as server:
            yield server
