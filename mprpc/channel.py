"""The channel: how a consumer calls.

It knows where providers are (one address, or the registry), keeps one subchannel for each address and hands out a
`UnaryCall` for each method. Any number of threads share the kept-alive connections.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, TypeVar

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from mprpc._native import ffi
from mprpc.config import MprpcConfig
from mprpc.controller import MprpcController
from mprpc.errors import ConfigError, RpcError, Unavailable
from mprpc.late import importing
from mprpc.retry import Budget, Hedging, Policy
from mprpc.service import attribute_of
from mprpc.subchannel import Subchannel, channel_closed, split_address
from mprpc.target import Fixed, Found, Target
from mprpc.unary_call import UnaryCall, nanoseconds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from types import TracebackType

    from mprpc.balancer import Strategy
    from mprpc.pool import EndpointState, Pools
    from mprpc.registry import Endpoint, Registry, ServiceView, Snapshot
    from mprpc.statistics import ChannelStatistics

__all__ = ["MprpcChannel", "stub"]

Response = TypeVar("Response", bound=Message)

_NS = 1_000_000_000


class MprpcChannel:
    """Calls services: found through ZooKeeper, or at one address.

    `target`: an `MprpcConfig` (its `zookeeperip` says where to find providers; without one, rpcserverip:rpcserverport
    is called), or an address, `host:port`, `[::1]:port` or `unix:/path`. `timeout`: seconds for calls that give none,
    by default the key `call_timeout`. `dialect`: "framed" or "classic" (the C++ framework's), by default the key
    `dialect`, whose "auto" speaks classic only to endpoints that are known from the seed's znodes alone. `balancer`:
    how providers are chosen, a word as for the key `balancer` or a `Strategy`. `tags`: only providers that have all of
    these are called, by default those of the key `call_tags`.

    Any thread, any number at once. Connections are made when first needed and made again when they end.
    """

    def __init__(
        self,
        target: MprpcConfig | str | None = None,
        *,
        timeout: float | None = None,
        dialect: str | None = None,
        balancer: str | Strategy | None = None,
        tags: Sequence[str] | None = None,
    ) -> None:
        config = target if isinstance(target, MprpcConfig) else MprpcConfig()
        self._config = config
        self._dialect = dialect or config.dialect
        if self._dialect not in ("auto", "framed", "classic"):
            raise ValueError(f'dialect={dialect!r}: give "auto", "framed" or "classic"')
        self._timeout = config.call_timeout if timeout is None else timeout
        self._address = target if isinstance(target, str) else "" if config.zookeeper_hosts else _configured(config)
        if self._address or isinstance(target, str):
            split_address(self._address)  # a bad address is told now, not at the first call
        self._lock = threading.Lock()
        self._closed = False
        self._budget = _budget(config)
        self._hedgings: weakref.WeakSet[Hedging] = weakref.WeakSet()
        self._registry: Registry | None = None
        self._endpoints: dict[tuple[str, bool], Subchannel] = {}
        self._tallies: dict[str, Any] = {}  # of each method that calls were made for, by full name
        self._views: dict[str, ServiceView] = {}
        self._found: weakref.WeakSet[Found] = weakref.WeakSet()
        self._chooses = balancer, tags
        self._known_pools: Pools | None = None
        _channels.add(self)

    # ---- calls ----

    def unary_call(self, method: MethodDescriptor, response_class: type[Response]) -> UnaryCall[Any, Response]:
        """The callable for one method; generated stubs ask for theirs here."""
        return UnaryCall(self, method, response_class)

    def CallMethod(
        self,
        method: MethodDescriptor,
        controller: MprpcController | None,
        request: Message,
        response_class: type[Response],
        done: Callable[[Response | None], object] | None = None,
    ) -> Response | None:
        """What protobuf's own generated stubs call. Returns the response, or raises.

        With `done` it returns None at once and calls `done(response)` later, on another thread: with None when the call
        failed without a controller to say so.
        """
        call = self.unary_call(method, response_class)
        if done is None:
            return call(request, controller=controller)
        call.future(request, controller=controller).add_done_callback(lambda future: done(_response_of(future)))
        return None

    def wait_ready(self, timeout: float) -> None:
        """Waits until providers are connected: with discovery, one of every service that a stub was made for.

        Raises Unavailable, which says what is missing, after `timeout` seconds.
        """
        deadline = time.monotonic_ns() + nanoseconds(timeout)
        for endpoints in [lambda: (self._fixed(),)] if self._address else map(self._listed, self._services()):
            self._connect_one(endpoints, deadline)

    def _services(self) -> list[str]:
        with self._lock:
            return list(self._views)

    def _listed(self, service: str) -> Callable[[], tuple[Subchannel, ...]]:
        def endpoints() -> tuple[Subchannel, ...]:
            return self._endpoints_of(self._views[service].snapshot.endpoints, service)

        return endpoints

    def _connect_one(self, endpoints: Callable[[], tuple[Subchannel, ...]], deadline: int) -> None:
        why = None
        while True:
            for endpoint in endpoints():
                try:
                    if endpoint.classic:
                        endpoint.socket(deadline).close()  # one connection is one call there: none is kept
                    else:
                        endpoint.connect(deadline)
                    return
                except RpcError as error:
                    if why is None or time.monotonic_ns() < deadline:  # a refusal says more than the end of the time
                        why = Unavailable(error.text, not_run=True)
            left = deadline - time.monotonic_ns()
            if left <= 0 or self._closed:
                raise why or Unavailable("no provider is registered", not_run=True)
            threading.Event().wait(min(0.02, left / _NS))  # nobody tells when a port is opened

    def endpoints(self) -> list[EndpointState]:
        """What is known of each endpoint of each service that was called, as it is now."""
        if not self._address:
            return self._pools().states()
        from mprpc.pool import fixed_state

        return [fixed_state(self._fixed())]

    def statistics(self) -> ChannelStatistics:
        """What became of all calls so far, by method, and what the endpoints are like. Any thread."""
        from mprpc.statistics import channel_statistics

        with self._lock:
            tallies, endpoints = dict(self._tallies), list(self._endpoints.values())
        return channel_statistics(tallies, {each.address: each.load for each in endpoints}, self._budget.taken)

    def close(self) -> None:
        """Ends all connections; calls in flight and later ones fail with Unavailable. Bounded, and may be repeated."""
        with self._lock:
            self._closed = True
            endpoints, registry = list(self._endpoints.values()), self._registry
            self._registry = None
        for endpoint in endpoints:
            endpoint.close()
        if self._known_pools is not None:
            self._known_pools.close()
        if registry is not None:
            registry.close()

    def __enter__(self) -> MprpcChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- what calls use ----

    def _target(self, method: MethodDescriptor) -> Target:
        service = method.containing_service
        if self._address:
            return Fixed(self._fixed())
        found = Found(self, service, method.name)
        self._found.add(found)
        return found

    def _new_hedging(self, policy: Policy) -> Hedging:
        hedging = Hedging(policy, threading.Lock())
        self._hedgings.add(hedging)
        return hedging

    def _tally(self, method: str) -> Any:
        with self._lock:
            if method not in self._tallies:
                self._tallies[method] = ffi.new("struct mprpc_tally *")
            return self._tallies[method]

    def _view(self, service: ServiceDescriptor) -> ServiceView:
        with self._lock:
            view = self._views.get(service.full_name)
            if view is None:
                view = self._open_registry().follow(service.full_name, [each.name for each in service.methods])
                self._views[service.full_name] = view
            return view

    def _open_registry(self) -> Registry:
        if self._closed:
            raise channel_closed()
        if self._registry is None:
            with importing:
                from mprpc.probe import probe
                from mprpc.registry import Registry

            self._registry = Registry.open(self._config, probe)
        return self._registry

    def _fixed(self) -> Subchannel:
        with self._lock:
            return self._endpoint(self._address, self._dialect == "classic")

    def _endpoint(self, address: str, classic: bool) -> Subchannel:
        """The one endpoint of that address. With the lock held."""
        key = address, classic
        if key not in self._endpoints:
            if self._closed:
                raise channel_closed()
            self._endpoints[key] = Subchannel(address, classic, self._config)
        return self._endpoints[key]

    def _pools(self) -> Pools:
        pools = self._known_pools
        if pools is None:
            from mprpc.pool import Pools

            with self._lock:
                pools = self._known_pools = self._known_pools or Pools(self._config, *self._chooses)
        return pools

    def _endpoints_of(self, found: Sequence[Endpoint], service: str) -> tuple[Subchannel, ...]:
        always, never = self._dialect == "classic", self._dialect == "framed"
        with self._lock:
            endpoints = tuple(self._endpoint(each.address, always or (each.classic and not never)) for each in found)
        for endpoint, each in zip(endpoints, found, strict=True):
            endpoint.listed(each.id, service, self._pools().told, alone=len(found) == 1)
        return endpoints

    def _keep_only(self, snapshot: Snapshot) -> None:
        """Forgets the connections to endpoints that no service lists any more; calls in flight on them go on."""
        with self._lock:
            listed = {each.address for view in self._views.values() for each in view.snapshot.endpoints}
            listed.update(each.address for each in snapshot.endpoints)
            for key in [key for key in self._endpoints if key[0] not in listed]:
                del self._endpoints[key]

    def _forget_forked(self) -> None:
        """In a forked child: the parent's connections are not ours to use, nor to shut down."""
        self._lock = threading.Lock()
        self._budget = _budget(self._config)
        for hedging in list(self._hedgings):
            hedging.forget_forked(threading.Lock())
        self._registry = self._known_pools = None
        self._views.clear()
        for tally in self._tallies.values():
            tally.begun = sum(tally.ended)  # the parent's calls in flight end there
        for endpoint in self._endpoints.values():
            endpoint.forget_forked()
        for found in list(self._found):
            found.forget_forked()


def stub(service: ServiceDescriptor, channel: MprpcChannel) -> Any:
    """A stub without generated code: an object with a `UnaryCall` for each method of the service.

    `service` is `user_pb2.DESCRIPTOR.services_by_name["UserServiceRpc"]`, or comes from a descriptor pool.
    """
    made = _Stub()
    for method in service.methods:
        setattr(made, attribute_of(method), channel.unary_call(method, GetMessageClass(method.output_type)))
    return made


class _Stub:
    """What stub() returns."""


def _response_of(future: Future[Response]) -> Response | None:
    return None if future.cancelled() or future.exception() else future.result()


def _budget(config: MprpcConfig) -> Budget:
    return Budget(config.retry_share, config.retry_rate, threading.Lock())


def _configured(config: MprpcConfig) -> str:
    host, port = config.rpcserverip, config.rpcserverport
    if host.startswith(("unix:", "memory:")):
        return host
    if port == 0:
        raise ConfigError("rpcserverport=0: a channel without zookeeperip calls this port, so it must be given")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_channels: weakref.WeakSet[MprpcChannel] = weakref.WeakSet()


def _after_fork() -> None:
    for channel in list(_channels):
        channel._forget_forked()


os.register_at_fork(after_in_child=_after_fork)
