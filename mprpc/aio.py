"""The asyncio face of the channel: `await stub.Login(request)`.

Finding providers, choosing endpoints, errors and retries are the blocking channel's; only the waiting differs. An event
loop has connections of its own, whose descriptors it polls; a turn of one (`mprpc_link_turn`) reads what is there,
and all calls that ended are resolved from one copy. What is called in one iteration of the event loop leaves in one
send at its end.

Any number of event loops may use one channel, in any threads: each gets its own connections. What would block
(ZooKeeper, host names) runs on the event loop's executor.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from mprpc._native import ffi, lib
from mprpc.channel import MprpcChannel, UnaryCall, split_address
from mprpc.config import MprpcConfig
from mprpc.controller import MprpcController
from mprpc.errors import DeadlineExceeded, ResourceExhausted, RpcError, Unavailable
from mprpc.futures import MAIL, Mail, take_mail

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from mprpc.channel import _Endpoint

__all__ = ["AsyncMprpcChannel", "AsyncUnaryCall"]

T = TypeVar("T")
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

_NS = 1_000_000_000
_FOREVER = 2**64 - 1


class AsyncMprpcChannel:
    """`MprpcChannel` for asyncio; the same arguments. Use it in coroutines, with `async with` or `await close()`.

    Any event loop, any number of them at once.
    """

    def __init__(
        self,
        target: MprpcConfig | str | None = None,
        *,
        timeout: float | None = None,
        dialect: str | None = None,
    ) -> None:
        self._channel = MprpcChannel(target, timeout=timeout, dialect=dialect)
        self._hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Hub] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def unary_call(self, method: MethodDescriptor, response_class: type[Response]) -> AsyncUnaryCall[Any, Response]:
        """The callable for one method; generated stubs ask for theirs here."""
        return AsyncUnaryCall(self, method, response_class)

    async def close(self) -> None:
        """Ends all connections, those of other event loops too; calls in flight fail with Unavailable."""
        with self._lock:
            hubs = list(self._hubs.items())
            self._hubs.clear()
        for loop, hub in hubs:
            if loop is asyncio.get_running_loop():
                hub.close()
            elif not loop.is_closed():
                loop.call_soon_threadsafe(hub.close)
        await asyncio.get_running_loop().run_in_executor(None, self._channel.close)

    async def __aenter__(self) -> AsyncMprpcChannel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _hub(self) -> _Hub:
        loop = asyncio.get_running_loop()
        hub = self._hubs.get(loop)
        if hub is None:
            with self._lock:
                hub = self._hubs[loop] = _Hub(loop, self._channel._config)
        return hub


class AsyncUnaryCall(Generic[Request, Response]):
    """One method, awaitable: `await stub.Login(request, timeout=1.0)`.

    Errors, controller and timeout are `UnaryCall`'s. Cancelling the task sends CANCEL to the provider.
    """

    def __init__(self, channel: AsyncMprpcChannel, method: MethodDescriptor, response_class: type[Response]) -> None:
        self._channel = channel
        self._method = method
        self._response_class = response_class
        self._made: UnaryCall[Any, Response] | None = None

    async def __call__(
        self, request: Request, timeout: float | None = None, controller: MprpcController | None = None
    ) -> Response:
        if controller is None:
            return await self._call(request, timeout, None)
        own = controller.timeout
        timeout = own if timeout is None else timeout
        controller.reset()
        controller.timeout = own
        try:
            return await self._call(request, timeout, controller)
        except RpcError as error:
            controller._set_error(error)
            return self._response_class()

    async def _call(self, request: Request, timeout: float | None, controller: MprpcController | None) -> Response:
        call = self._made or await self._make()
        payload, nanoseconds = call._prepare(request, timeout)
        endpoint = first = call._target.next()
        hub = self._channel._hub()
        if endpoint is not None and len(payload) <= call._max_payload:
            link = hub.links.get(endpoint.address)
            if link is not None and not endpoint.classic:
                if controller is not None:
                    controller._peer = endpoint.address
                try:
                    return await hub.call(link, call, endpoint, payload, nanoseconds)
                except RpcError as error:
                    if not call._may_retry(error):
                        raise
                    first = None
        return await self._go_round(hub, call, payload, time.monotonic_ns() + nanoseconds, controller, first)

    async def _make(self) -> UnaryCall[Any, Response]:
        """The blocking call that this one is the face of; making it may open the registry, which takes its time."""
        channel = self._channel._channel
        if channel._address:
            made: UnaryCall[Any, Response] = UnaryCall(channel, self._method, self._response_class)
        else:
            run = asyncio.get_running_loop().run_in_executor
            made = await run(None, UnaryCall, channel, self._method, self._response_class)
        self._made = made
        return made

    async def _go_round(
        self,
        hub: _Hub,
        call: UnaryCall[Any, Response],
        payload: bytes,
        deadline: int,
        controller: MprpcController | None,
        first: _Endpoint | None,
    ) -> Response:
        """Calls the endpoints in turn, from `first` on, until one has taken the request."""
        call._check_size(payload)
        failed: RpcError | None = None
        for endpoint in await hub.endpoints(call, deadline, first):
            if controller is not None:
                controller._peer = endpoint.address
            try:
                if endpoint.classic:
                    return await hub.run(call._call_classic, endpoint, payload, deadline)
                link = hub.links.get(endpoint.address) or await hub.connect(endpoint, deadline)
                left = deadline - time.monotonic_ns()
                if left <= 0:
                    text = f"{call._method.full_name}: the deadline passed before it was sent"
                    raise DeadlineExceeded(text, not_run=True)
                return await hub.call(link, call, endpoint, payload, left)
            except RpcError as error:
                if not call._may_retry(error):
                    raise
                call._target.failed(endpoint)
                failed = error
        raise failed or Unavailable(f"{call._method.full_name}: {call._target.nobody()}", not_run=True)


class _Link:
    """A connection of one event loop."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.descriptor = lib.mprpc_link_descriptor(handle)
        self.writing = False  # the event loop watches for room to write
        self.due = _FOREVER  # when the event loop's timer for it goes off, monotonic ns
        self.timer: asyncio.TimerHandle | None = None


class _Hub:
    """What one event loop has of one channel. On that loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, config: MprpcConfig) -> None:
        self.links: dict[str, _Link] = {}
        self._loop = loop
        self._config = config
        self._box = ffi.gc(lib.mprpc_mailbox_new(), lib.mprpc_mailbox_free)
        self._pending: dict[int, asyncio.Future[tuple[Mail, bytes]]] = {}
        self._tokens = count(1)
        self._connecting: dict[str, asyncio.Task[_Link]] = {}
        self._to_write: set[_Link] = set()
        self._expiry = ffi.new("uint64_t *")
        self._reason = ffi.new("int64_t *")
        self._closed = False
        self._room: asyncio.Event | None = None

    # ---- a call ----

    async def call(
        self, link: _Link, call: UnaryCall[Any, Response], endpoint: _Endpoint, payload: bytes, timeout: int
    ) -> Response:
        if len(self._pending) >= self._config.max_pending:
            await self._wait_for_room(timeout)
        token = next(self._tokens)
        names = call._names
        identity = lib.mprpc_link_submit(
            link.handle, token, names, len(names), payload, len(payload), timeout, True, self._reason
        )
        if identity < 0:
            self._lose(link)
            raise call._broken(endpoint, None, identity, self._reason[0], 0)
        future = self._pending[token] = self._loop.create_future()
        if not self._to_write:
            self._loop.call_soon(self._write)
        self._to_write.add(link)
        try:
            mail, data = await future
        except asyncio.CancelledError:
            if self._pending.pop(token, None) is not None and lib.mprpc_link_cancel(link.handle, identity):
                self._turn(link, False)
            raise
        size = mail[1]
        if size >= 0:
            return call._parsed(data[mail[3] : mail[3] + size])
        raise call._mail_error(endpoint, None, mail, data)

    async def _wait_for_room(self, timeout: int) -> None:
        """Slows a caller that starts more calls than max_pending."""
        deadline = self._loop.time() + timeout / _NS
        while len(self._pending) >= self._config.max_pending:
            self._room = self._room or asyncio.Event()
            try:
                await asyncio.wait_for(self._room.wait(), deadline - self._loop.time())
            except asyncio.TimeoutError:
                text = f"max_pending={self._config.max_pending} calls are in flight"
                raise ResourceExhausted(text, not_run=True) from None

    # ---- the event loop's callbacks ----

    def _write(self) -> None:
        links, self._to_write = self._to_write, set()
        for link in links:
            self._turn(link, False)

    def _readable(self, link: _Link) -> None:
        self._turn(link, True)

    def _writable(self, link: _Link) -> None:
        self._turn(link, False)

    def _expired(self, link: _Link) -> None:
        link.due, link.timer = _FOREVER, None
        self._turn(link, False)

    def _turn(self, link: _Link, read: bool) -> None:
        told = lib.mprpc_link_turn(link.handle, read, self._expiry)
        due = self._expiry[0]
        if told < 0:
            self._lose(link)
        elif told != link.writing:
            self._watch_writing(link, told > 0)
        if due < link.due:
            self._set_timer(link, due)
        mail, data = take_mail(self._box)
        pending = self._pending
        for each in MAIL.iter_unpack(mail):
            future = pending.pop(each[0], None)
            if future is not None and not future.done():
                future.set_result((each, data))
        if self._room is not None and len(pending) < self._config.max_pending:
            self._room.set()
            self._room = None

    def _watch_writing(self, link: _Link, wanted: bool) -> None:
        link.writing = wanted
        if wanted:
            self._loop.add_writer(link.descriptor, self._writable, link)
        else:
            self._loop.remove_writer(link.descriptor)

    def _set_timer(self, link: _Link, due: int) -> None:
        if link.timer is not None:
            link.timer.cancel()
        link.due = due
        left = max(0, due - time.monotonic_ns()) / _NS
        link.timer = self._loop.call_later(left, self._expired, link)

    # ---- connections ----

    async def endpoints(
        self, call: UnaryCall[Any, Any], deadline: int, first: _Endpoint | None
    ) -> tuple[_Endpoint, ...]:
        if first is not None or call._target.next() is not None:
            return call._target.all(deadline, first)
        return await self.run(call._target.all, deadline)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """What blocks, on the executor."""
        return await self._loop.run_in_executor(None, lambda: function(*arguments))

    async def connect(self, endpoint: _Endpoint, deadline: int) -> _Link:
        """The connection to that endpoint; callers at the same time share one attempt."""
        task = self._connecting.get(endpoint.address)
        if task is None:
            task = self._connecting[endpoint.address] = self._loop.create_task(self._connect(endpoint))
            task.add_done_callback(lambda _: self._connecting.pop(endpoint.address, None))
        left = (deadline - time.monotonic_ns()) / _NS
        done, _ = await asyncio.wait({task}, timeout=max(0.0, left))
        if not done:
            raise Unavailable(f"can't connect to {endpoint.address}: no connection within the deadline", not_run=True)
        return task.result()

    async def _connect(self, endpoint: _Endpoint) -> _Link:
        connect = self._config.connect_timeout
        try:
            connection = await asyncio.wait_for(self._reach(endpoint.address), connect)
        except asyncio.TimeoutError:
            endpoint.rest()
            text = f"can't connect to {endpoint.address}: no connection within {connect:.3g} s"
            raise Unavailable(text, not_run=True) from None
        except OSError as error:
            endpoint.rest()
            text = f"can't connect to {endpoint.address}: {error.strerror or error}"
            raise Unavailable(text, not_run=True) from None
        if self._closed:
            connection.close()
            raise Unavailable("the channel is closed", not_run=True)
        endpoint.reached()
        handle = lib.mprpc_link_new(connection.detach(), self._config.max_payload)
        link = _Link(ffi.gc(handle, lib.mprpc_link_free))
        lib.mprpc_link_attach(link.handle, self._box, True)
        self.links[endpoint.address] = link
        self._loop.add_reader(link.descriptor, self._readable, link)
        return link

    async def _reach(self, address: str) -> socket.socket:
        host, port = split_address(address)
        if port is None:
            return await self._connected(socket.AF_UNIX, host)
        found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        failed: OSError | None = None
        for family, _, _, _, where in found:
            try:
                return await self._connected(family, where)
            except OSError as error:
                failed = error
        raise failed or OSError(f"{host} has no address")

    async def _connected(self, family: int, where: Any) -> socket.socket:
        made = socket.socket(family, socket.SOCK_STREAM)
        try:
            made.setblocking(False)
            await self._loop.sock_connect(made, where)
            if family != socket.AF_UNIX:
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            made.close()
            raise
        return made

    def _lose(self, link: _Link) -> None:
        """The connection has ended; the next call makes another."""
        for address, each in list(self.links.items()):
            if each is link:
                del self.links[address]
                self._loop.remove_reader(link.descriptor)
                self._loop.remove_writer(link.descriptor)
                if link.timer is not None:
                    link.timer.cancel()
        self._to_write.discard(link)

    def close(self) -> None:
        self._closed = True
        for link in list(self.links.values()):
            lib.mprpc_link_close(link.handle)
            self._turn(link, False)
