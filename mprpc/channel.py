"""The channel: how a consumer calls.

A `UnaryCall` is one method of one channel. It serializes the request and gives it to the connection of an endpoint; C
sends, waits and receives in one call without the interpreter's lock (`_channel.c`). Any number of threads share the one
kept-alive connection to an endpoint.

A target says which endpoints a method has: one fixed address, or what the registry's snapshot lists. Calls take them
in turn; one that could not be sent to its endpoint, or that the provider says never ran, goes on to the next, each
once, those that could not be reached lately last. What may have run is sent again only where the method is declared
idempotent (protobuf's `idempotency_level`). Deadlines: a timeout becomes a deadline when the call starts; finding a
provider, connecting, sending and waiting all draw on it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.message_factory import GetMessageClass

from mprpc._native import ffi, lib
from mprpc.config import MprpcConfig
from mprpc.controller import MprpcController
from mprpc.errors import (
    ConfigError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    RpcError,
    Status,
    Unavailable,
)
from mprpc.service import attribute_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future
    from types import TracebackType

    from mprpc.futures import CallFuture, Mail
    from mprpc.registry import Endpoint, Registry, ServiceView, Snapshot

__all__ = ["MprpcChannel", "UnaryCall", "split_address", "stub"]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

_NS = 1_000_000_000
_LONGEST = 1e9  # seconds; a longer timeout, such as infinity, means this one
_SMALL = lib.MPRPC_CALL_SMALL
_IDEMPOTENCY_UNKNOWN = 0  # google.protobuf.MethodOptions.IdempotencyLevel
_REST_FIRST, _REST_LONGEST = 0.1, 30.0  # seconds that an endpoint rests that could not be reached, doubling
_SHARES_MAX = 100  # turns of the heaviest endpoint for one of the lightest; a finer weight is not worth a longer list
_CLASSIC_CHUNK = 65536  # bytes of a classic response taken at once

_start_future: Any = None  # of mprpc.futures, which is imported when it is used

# Calls' state in C, used again and again; as many as there were calls at the same time.
_slots: list[tuple[Any, Any]] = []


def _new_slot() -> tuple[Any, Any]:
    call = ffi.gc(ffi.new("struct mprpc_call *"), lib.mprpc_call_clear)
    room = ffi.buffer(ffi.new("uint8_t[]", _SMALL), _SMALL)
    call.small = ffi.from_buffer(room)
    return call, room


class MprpcChannel:
    """Calls services: found through ZooKeeper, or at one address.

    `target`: an `MprpcConfig` (its `zookeeperip` says where to find providers; without one, rpcserverip:rpcserverport
    is called), or an address, `host:port`, `[::1]:port` or `unix:/path`. `timeout`: seconds for calls that give none,
    by default the key `call_timeout`. `dialect`: "framed" or "classic" (the C++ framework's), by default the key
    `dialect`, whose "auto" speaks classic only to endpoints that are known from the seed's znodes alone.

    Any thread, any number at once. Connections are made when first needed and made again when they end.
    """

    def __init__(
        self,
        target: MprpcConfig | str | None = None,
        *,
        timeout: float | None = None,
        dialect: str | None = None,
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
        self._registry: Registry | None = None
        self._endpoints: dict[tuple[str, bool], _Endpoint] = {}
        self._views: dict[str, ServiceView] = {}
        self._found: weakref.WeakSet[_Found] = weakref.WeakSet()
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
        deadline = time.monotonic_ns() + _nanoseconds(timeout)
        for endpoints in [lambda: (self._fixed(),)] if self._address else map(self._listed, self._services()):
            self._connect_one(endpoints, deadline)

    def _services(self) -> list[str]:
        with self._lock:
            return list(self._views)

    def _listed(self, service: str) -> Callable[[], tuple[_Endpoint, ...]]:
        def endpoints() -> tuple[_Endpoint, ...]:
            return self._endpoints_of(self._views[service].snapshot.endpoints)

        return endpoints

    def _connect_one(self, endpoints: Callable[[], tuple[_Endpoint, ...]], deadline: int) -> None:
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

    def close(self) -> None:
        """Ends all connections; calls in flight and later ones fail with Unavailable. Bounded, and may be repeated."""
        with self._lock:
            self._closed = True
            endpoints, registry = list(self._endpoints.values()), self._registry
            self._registry = None
        for endpoint in endpoints:
            endpoint.close()
        if registry is not None:
            registry.close()

    def __enter__(self) -> MprpcChannel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ---- what calls use ----

    def _target(self, method: MethodDescriptor) -> _Fixed | _Found:
        service = method.containing_service
        if self._address:
            return _Fixed(self._fixed())
        found = _Found(self, service, method.name)
        self._found.add(found)
        return found

    def _view(self, service: ServiceDescriptor) -> ServiceView:
        with self._lock:
            view = self._views.get(service.full_name)
            if view is None:
                view = self._open_registry().follow(service.full_name, [each.name for each in service.methods])
                self._views[service.full_name] = view
            return view

    def _open_registry(self) -> Registry:
        if self._closed:
            raise _closed()
        if self._registry is None:
            from mprpc.probe import probe
            from mprpc.registry import Registry

            self._registry = Registry.open(self._config, probe)
        return self._registry

    def _fixed(self) -> _Endpoint:
        with self._lock:
            return self._endpoint(self._address, self._dialect == "classic")

    def _endpoint(self, address: str, classic: bool) -> _Endpoint:
        """The one endpoint of that address. With the lock held."""
        key = address, classic
        if key not in self._endpoints:
            if self._closed:
                raise _closed()
            self._endpoints[key] = _Endpoint(address, classic, self._config)
        return self._endpoints[key]

    def _endpoints_of(self, found: Sequence[Endpoint]) -> tuple[_Endpoint, ...]:
        always, never = self._dialect == "classic", self._dialect == "framed"
        with self._lock:
            endpoints = tuple(self._endpoint(each.address, always or (each.classic and not never)) for each in found)
        for endpoint, each in zip(endpoints, found, strict=True):
            endpoint.registered(each.id)
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
        self._registry = None
        self._views.clear()
        for endpoint in self._endpoints.values():
            endpoint.forget_forked()
        for found in list(self._found):
            found.forget_forked()


class UnaryCall(Generic[Request, Response]):
    """One method, callable: `stub.Login(request, timeout=1.0)`. Any thread, any number at once.

    Returns the response or raises `RpcError`. With a controller it never raises for the call's sake: it returns an
    empty response and the controller says why. `timeout` (seconds) goes before the controller's, that before the
    channel's. A request of another class is a TypeError, always.
    """

    def __init__(self, channel: MprpcChannel, method: MethodDescriptor, response_class: type[Response]) -> None:
        self._channel = channel
        self._method = method
        self._request_class = GetMessageClass(method.input_type)
        self._response_class = response_class
        self._parse: Callable[[bytes], Response] = response_class.FromString
        self._names = _names(method.containing_service.full_name, method.name)
        self._names_size = len(self._names)
        self._timeout_ns = _nanoseconds(channel._timeout)
        self._max_payload = channel._config.max_payload
        self._idempotent = method.GetOptions().idempotency_level != _IDEMPOTENCY_UNKNOWN
        self._target = channel._target(method)

    def __call__(
        self, request: Request, timeout: float | None = None, controller: MprpcController | None = None
    ) -> Response:
        if controller is not None:
            return self._controlled(request, timeout, controller)
        return self._call(request, timeout, None)

    def future(
        self, request: Request, timeout: float | None = None, controller: MprpcController | None = None
    ) -> CallFuture[Response]:
        """Starts the call and returns its future at once. Any thread.

        It is a `concurrent.futures.Future`; `cancel()` tells the provider. Raises ResourceExhausted when the key
        `max_pending` such calls of this process are in flight and none ends within this call's deadline.
        """
        global _start_future
        if _start_future is None:  # once: an import statement that finds all there still costs half a microsecond
            from mprpc.futures import start_future as _start_future
        future: CallFuture[Response] = _start_future(self, request, timeout, controller)
        return future

    def _controlled(self, request: Request, timeout: float | None, controller: MprpcController) -> Response:
        own = controller.timeout
        timeout = own if timeout is None else timeout
        controller.reset()
        controller.timeout = own
        try:
            return self._call(request, timeout, controller)
        except RpcError as error:
            controller._set_error(error)
            return self._response_class()

    # ---- the hot path ----

    def _prepare(self, request: Message, timeout: float | None) -> tuple[bytes, int]:
        """The request's bytes and the call's nanoseconds."""
        if type(request) is not self._request_class:
            raise self._wrong_request(request)
        try:
            payload = request.SerializeToString()
        except EncodeError as error:
            raise InvalidArgument(f"{self._method.full_name}: {error}", not_run=True) from None
        return payload, self._timeout_ns if timeout is None else _nanoseconds(timeout)

    def _call(self, request: Request, timeout: float | None, controller: MprpcController | None) -> Response:
        payload, nanoseconds = self._prepare(request, timeout)
        endpoint = self._target.next()
        if endpoint is None or (link := endpoint.link) is None or len(payload) > self._max_payload:
            return self._go_round(payload, time.monotonic_ns() + nanoseconds, controller, endpoint)
        if controller is not None:
            controller._peer = endpoint.address
        try:
            slot = _slots.pop()
        except IndexError:
            slot = _new_slot()
        call = slot[0]
        try:
            size = lib.mprpc_link_call(link, call, self._names, self._names_size, payload, len(payload), nanoseconds)
            if 0 <= size <= _SMALL:
                data = slot[1][:size]
                _slots.append(slot)
                return self._parse(data)
        except DecodeError:
            raise self._bad_response() from None
        except BaseException:
            lib.mprpc_link_forget(link, call)
            raise
        deadline = call.deadline  # the first attempt's, before another call takes the slot
        try:
            return self._finish(endpoint, link, slot, size)
        except RpcError as error:
            if not self._may_retry(error):
                raise
        return self._go_round(payload, deadline, controller)

    # ---- what is not a plain response from a connection that was there ----

    def _go_round(
        self, payload: bytes, deadline: int, controller: MprpcController | None, first: _Endpoint | None = None
    ) -> Response:
        """Calls the endpoints in turn, from `first` on, until one has taken the request."""
        self._check_size(payload)
        failed: RpcError | None = None
        began = time.monotonic()
        for endpoint in self._target.all(deadline, first):
            if controller is not None:
                controller._peer = endpoint.address
            try:
                return self._call_endpoint(endpoint, payload, deadline, began)
            except RpcError as error:
                if not self._may_retry(error):
                    raise
                self._target.failed(endpoint)
                failed = error
        raise failed or Unavailable(f"{self._method.full_name}: {self._target.nobody()}", not_run=True)

    def _check_size(self, payload: bytes) -> None:
        if len(payload) > self._max_payload:
            text = f"{self._method.full_name}: the request has {len(payload)} bytes, max_payload allows"
            raise ResourceExhausted(f"{text} {self._max_payload}", not_run=True)

    def _may_retry(self, error: RpcError) -> bool:
        """Whether the same call may go to another endpoint: it never ran there, or may run twice."""
        if isinstance(error, Unavailable):
            return error.not_run or self._idempotent
        return error.not_run and error.status in (Status.RESOURCE_EXHAUSTED, Status.UNIMPLEMENTED)

    def _call_endpoint(self, endpoint: _Endpoint, payload: bytes, deadline: int, began: float) -> Response:
        if endpoint.classic:
            return self._call_classic(endpoint, payload, deadline)
        used = endpoint.link
        link = used if used is not None else endpoint.connect(deadline, began)
        try:
            return self._call_link(endpoint, link, payload, deadline)
        except Unavailable as error:
            if used is None or not self._may_retry(error):
                raise
        # The connection was an old one, which may have ended since its last call: that says nothing of the endpoint.
        return self._call_link(endpoint, endpoint.connect(deadline, began), payload, deadline)

    def _call_link(self, endpoint: _Endpoint, link: Any, payload: bytes, deadline: int) -> Response:
        left = deadline - time.monotonic_ns()
        if left <= 0:
            raise DeadlineExceeded(f"{self._method.full_name}: the deadline passed before it was sent", not_run=True)
        slot = _slots.pop() if _slots else _new_slot()
        try:
            size = lib.mprpc_link_call(link, slot[0], self._names, self._names_size, payload, len(payload), left)
        except BaseException:
            lib.mprpc_link_forget(link, slot[0])
            raise
        return self._finish(endpoint, link, slot, size)

    def _finish(self, endpoint: _Endpoint, link: Any, slot: tuple[Any, Any], size: int) -> Response:
        """The response, or what the call failed with; the slot is free again after."""
        call, small = slot
        try:
            while size == lib.MPRPC_CALL_INTERRUPTED:  # Python has run the signal's handler, which did not raise
                size = lib.mprpc_link_wait(link, call)
        except BaseException:
            lib.mprpc_link_forget(link, call)
            raise
        if size >= 0:
            data = bytes(ffi.buffer(call.large, size)) if size > _SMALL else small[:size]
            error = None
        else:
            error = self._error(endpoint, link, call, size)
        lib.mprpc_call_clear(call)
        _slots.append(slot)
        if error is not None:
            raise error
        return self._parsed(data)

    def _error(self, endpoint: _Endpoint, link: Any, call: Any, outcome: int) -> RpcError:
        if outcome == lib.MPRPC_CALL_FAILED:
            words = bytes(ffi.buffer(call.words, call.text_size + call.details_size)) if call.words else b""
            return _failure(call.status, call.not_run, words, call.text_size)
        return self._broken(endpoint, link, outcome, call.reason, call.sent)

    def _mail_error(self, endpoint: _Endpoint, link: Any, mail: Mail, data: bytes) -> RpcError:
        _, outcome, reason, offset, text_size, details_size, status, not_run, sent = mail
        if outcome == lib.MPRPC_CALL_FAILED:
            return _failure(status, not_run, data[offset : offset + text_size + details_size], text_size)
        return self._broken(endpoint, link, outcome, reason, sent)

    def _broken(self, endpoint: _Endpoint, link: Any, outcome: int, reason: int, sent: int) -> RpcError:
        name, address = self._method.full_name, endpoint.address
        if outcome == lib.MPRPC_CALL_TIMEOUT:
            return DeadlineExceeded(f"{name}: no answer from {address} within the call's deadline")
        if outcome == lib.MPRPC_CALL_FULL:
            text = f"{name}: {lib.MPRPC_CALLS_MAX} calls to {address} are in flight, or memory ran out"
            return ResourceExhausted(text, not_run=True)
        endpoint.drop(link)
        return Unavailable(f"{name}: {address}: {_why(reason)}", not_run=not sent)

    def _parsed(self, data: bytes) -> Response:
        try:
            return self._parse(data)
        except DecodeError:
            raise self._bad_response() from None

    def _bad_response(self) -> RpcError:
        return Internal(f"{self._method.full_name}: the response is no {self._response_class.DESCRIPTOR.full_name}")

    def _wrong_request(self, request: object) -> TypeError:
        return TypeError(
            f"{self._method.full_name} takes a {self._method.input_type.full_name}, not a {type(request).__qualname__}"
        )

    def _call_classic(self, endpoint: _Endpoint, payload: bytes, deadline: int) -> Response:
        """One call on a connection of its own; the end of the stream ends the response."""
        service = self._method.containing_service.name
        frame = _classic_request(service, self._method.name, payload)
        name, address = self._method.full_name, endpoint.address
        with endpoint.socket(deadline) as connection:
            try:
                _until(connection, deadline)
                connection.sendall(frame)
                answer = _read_to_end(connection, deadline, self._max_payload)
            except TimeoutError:
                raise DeadlineExceeded(f"{name}: no answer from {address} within the call's deadline") from None
            except OSError as error:
                raise Unavailable(f"{name}: {address}: {error.strerror or error}") from None
        if answer is None:
            raise ResourceExhausted(f"{name}: the response is larger than max_payload, {self._max_payload} bytes")
        if not answer and not self._channel._config.classic_empty:
            raise Unavailable(
                f"{name}: {address} answered nothing, as a classic provider that is dying does (set classic_empty where"
                " an empty answer is a response)"
            )
        return self._parsed(answer)


class _Endpoint:
    """One address and the connection to it."""

    def __init__(self, address: str, classic: bool, config: MprpcConfig) -> None:
        self.address = address
        self.classic = classic
        self.mailed: Any = None  # the link that takes futures
        self.link: Any = None  # read without the lock: a link that ended says so when it is used
        self._config = config
        self._lock = threading.Lock()
        self._closed = False
        self._id = ""
        self._failed_at = float("-inf")
        self._rest = 0.0
        self._rests_until = 0.0

    def registered(self, identity: str) -> None:
        """Listed under that id. Another one than before is another provider, which need not wait for the rest's end."""
        if identity != self._id:
            self._id = identity
            self.reached()

    def resting(self) -> bool:
        """Whether it could not be reached lately: others go first."""
        return self.link is None and time.monotonic() < self._rests_until

    def connect(self, deadline: int, since: float | None = None) -> Any:
        """The connection, made if there is none. Raises Unavailable, not_run, also when the deadline passes.

        Another call's attempt that has failed since that time (monotonic; by default now) counts for this one as well.
        """
        since = time.monotonic() if since is None else since
        if not self._lock.acquire(timeout=max(0.0, (deadline - time.monotonic_ns()) / _NS)):
            raise self._unreachable("no connection within the call's deadline")
        try:
            if self._closed:
                raise _closed()
            if self.link is None:
                if self._failed_at >= since:
                    raise self._unreachable("another call could not reach it either")
                connection = self._reach(deadline)
                connection.settimeout(None)
                link = lib.mprpc_link_new(connection.fileno(), self._config.max_payload)
                if link == ffi.NULL:
                    connection.close()
                    raise self._unreachable("no memory for a connection")
                connection.detach()
                self.link = ffi.gc(link, lib.mprpc_link_free)
            return self.link
        finally:
            self._lock.release()

    def _reach(self, deadline: int) -> socket.socket:
        try:
            connection = self.socket(deadline)
        except Unavailable:
            self._failed_at = time.monotonic()
            self.rest()
            raise
        self.reached()
        return connection

    def rest(self) -> None:
        """It could not be reached; longer each time, but once for attempts at the same time."""
        now = time.monotonic()
        if now >= self._rests_until:
            self._rest = min(max(_REST_FIRST, self._rest * 2), _REST_LONGEST)
            self._rests_until = now + self._rest

    def reached(self) -> None:
        """It could be reached, or there is a reason to think so."""
        self._rest = self._rests_until = 0.0

    def socket(self, deadline: int) -> socket.socket:
        """A new connected socket; as connect()."""
        left = (deadline - time.monotonic_ns()) / _NS
        if left <= 0:
            raise self._unreachable("no connection within the call's deadline")
        connect = min(left, self._config.connect_timeout)
        try:
            host, port = split_address(self.address)
            if port is None:
                made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                made.settimeout(connect)
                _connect_or_close(made, host)
            else:
                made = socket.create_connection((host, port), connect)
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except TimeoutError:
            raise self._unreachable(f"no connection within {connect:.3g} s") from None
        except OSError as error:
            raise self._unreachable(error.strerror or str(error)) from None
        return made

    def _unreachable(self, why: str) -> Unavailable:
        return Unavailable(f"can't connect to {self.address}: {why}", not_run=True)

    def drop(self, link: Any) -> None:
        """That connection has ended; the next call makes another."""
        with self._lock:
            if self.link is link:
                self.link = self.mailed = None

    def forget_forked(self) -> None:
        """In a forked child: freeing the link closes its descriptor and sends nothing."""
        self._lock = threading.Lock()
        self.link = self.mailed = None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            link, self.link = self.link, None
        if link is not None:
            lib.mprpc_link_close(link)


class _Fixed:
    """The one address that the channel was given."""

    def __init__(self, endpoint: _Endpoint) -> None:
        self._endpoint = endpoint

    def next(self) -> _Endpoint | None:
        return self._endpoint

    def all(self, deadline: int, first: _Endpoint | None = None) -> tuple[_Endpoint, ...]:
        return (self._endpoint,)

    def failed(self, endpoint: _Endpoint) -> None:
        """There is no list to be wrong."""

    def nobody(self) -> str:
        return "no address"


class _Found:
    """What the registry lists for one method, taken in turn, each as often as its weight says."""

    def __init__(self, channel: MprpcChannel, service: ServiceDescriptor, method: str) -> None:
        self._channel = channel
        self._service = service
        self._method = method
        self._view: ServiceView | None = channel._view(service)
        self._seen: Snapshot | None = None
        self._endpoints: tuple[_Endpoint, ...] = ()  # each once
        self._turns: tuple[_Endpoint, ...] = ()
        self._turn = count()

    def next(self) -> _Endpoint | None:
        if self._view is None or self._view.snapshot is not self._seen:
            self._renew()
        turns = self._turns
        if len(turns) == 1:
            return turns[0]
        return turns[next(self._turn) % len(turns)] if turns else None

    def all(self, deadline: int, first: _Endpoint | None = None) -> tuple[_Endpoint, ...]:
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
        return tuple(sorted(endpoints[start:] + endpoints[:start], key=_Endpoint.resting))

    def failed(self, endpoint: _Endpoint) -> None:
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


def stub(service: ServiceDescriptor, channel: MprpcChannel) -> Any:
    """A stub without generated code: an object with a `UnaryCall` for each method of the service.

    `service` is `user_pb2.DESCRIPTOR.services_by_name["UserServiceRpc"]`, or comes from a descriptor pool.
    """
    made = _Stub()
    for method in service.methods:
        setattr(made, attribute_of(method), channel.unary_call(method, GetMessageClass(method.output_type)))
    return made


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


class _Stub:
    """What stub() returns."""


def _failure(status: int, not_run: int, words: bytes, text_size: int) -> RpcError:
    """What the provider said: the text, then the details."""
    text = words[:text_size].decode(errors="replace")
    return RpcError(status, text, not_run=bool(not_run), details=words[text_size:])


def _response_of(future: Future[Response]) -> Response | None:
    return None if future.cancelled() or future.exception() else future.result()


def _nanoseconds(timeout: float) -> int:
    return int(min(max(timeout, 0.0), _LONGEST) * _NS)


def _names(service: str, method: str) -> bytes:
    """The two names as fields of the header."""
    wire = service.encode(), method.encode()
    room = len(wire[0]) + len(wire[1]) + 12
    if room > lib.MPRPC_NAMES_MAX:
        raise ValueError(f"{service}.{method}: a name of over {lib.MPRPC_NAMES_MAX} bytes can't be called")
    to = ffi.new("uint8_t[]", room)
    return bytes(ffi.buffer(to, lib.mprpc_put_names(to, wire[0], len(wire[0]), wire[1], len(wire[1]))))


def _classic_request(service: str, method: str, payload: bytes) -> bytes:
    names = _names(service, method)
    head = ffi.new("uint8_t[]", len(names) + 64)
    return bytes(ffi.buffer(head, lib.mprpc_put_call(head, names, len(names), len(payload), 0, 0))) + payload


def _until(connection: socket.socket, deadline: int) -> None:
    left = (deadline - time.monotonic_ns()) / _NS
    if left <= 0:
        raise TimeoutError
    connection.settimeout(left)


def _read_to_end(connection: socket.socket, deadline: int, limit: int) -> bytes | None:
    """All bytes to the end of the stream; None when they are more than the limit."""
    parts: list[bytes] = []
    size = 0
    while size <= limit:
        _until(connection, deadline)
        part = connection.recv(_CLASSIC_CHUNK)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
    return None


def _connect_or_close(made: socket.socket, address: str) -> None:
    try:
        made.connect(address)
    except OSError:
        made.close()
        raise


def _configured(config: MprpcConfig) -> str:
    host, port = config.rpcserverip, config.rpcserverport
    if host.startswith("unix:"):
        return host
    if port == 0:
        raise ConfigError("rpcserverport=0: a channel without zookeeperip calls this port, so it must be given")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(address: str) -> tuple[str, int | None]:
    """Host and port, or path and None. Raises ValueError for what is no address."""
    if address.startswith("unix:") and len(address) > 5:
        return address[5:], None
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (bare == host and ":" in host) or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is no address: give host:port, [IPv6]:port or unix:/path")
    return bare, int(port)


def _why(reason: int) -> str:
    if reason > 0:
        return os.strerror(reason)
    return _REASONS.get(reason) or f"the provider sent {ffi.string(lib.mprpc_why(reason)).decode()}"


def _closed() -> Unavailable:
    return Unavailable("the channel is closed", not_run=True)


_REASONS = {
    lib.MPRPC_LINK_END: "the provider ended the connection",
    lib.MPRPC_LINK_CLOSED: "the channel was closed",
    lib.MPRPC_LINK_GOAWAY: "the provider is shutting down",
}

_channels: weakref.WeakSet[MprpcChannel] = weakref.WeakSet()


def _after_fork() -> None:
    _slots.clear()  # a thread of the parent may have been taking one
    for channel in list(_channels):
        channel._forget_forked()


os.register_at_fork(after_in_child=_after_fork)
