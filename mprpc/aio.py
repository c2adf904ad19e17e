"""The asyncio face of the channel: `await stub.Login(request)`.

Finding providers, choosing endpoints, errors and retries are the blocking channel's; only the waiting differs. An event
loop has connections of its own, whose descriptors it polls; a turn of one (`mprpc_link_turn`) reads what is there,
and all calls that ended are resolved from one copy. What is called in one iteration of the event loop leaves in one
send at its end.

Any number of event loops may use one channel, in any threads: each gets its own connections. What would block
(ZooKeeper, host names, the seed's dialect) runs on threads beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from mprpc import context
from mprpc._native import ffi, lib
from mprpc.channel import MprpcChannel
from mprpc.config import MprpcConfig
from mprpc.controller import MprpcController
from mprpc.errors import Cancelled, DeadlineExceeded, ResourceExhausted, RpcError, Status, Unavailable
from mprpc.futures import MAIL, PASSING, Mail, Mailbox
from mprpc.subchannel import new_link, split_address
from mprpc.unary_call import UnaryCall, changed_policy, policy_of

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Sequence
    from types import TracebackType

    from mprpc.balancer import Strategy
    from mprpc.pool import EndpointState
    from mprpc.retry import Attempts, Hedging, Policy
    from mprpc.statistics import ChannelStatistics
    from mprpc.subchannel import Subchannel

__all__ = ["AsyncMprpcChannel", "AsyncUnaryCall"]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

_NS = 1_000_000_000
_FOREVER = 2**64 - 1
_FOUND = 0.01  # seconds after which a call for which nobody was found yet is looked at again, to be hedged
_GRACE = 0.02  # seconds beyond its deadline for which a call waits to hear from a thread beside what was missing


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
        balancer: str | Strategy | None = None,
        tags: Sequence[str] | None = None,
    ) -> None:
        self._channel = MprpcChannel(target, timeout=timeout, dialect=dialect, balancer=balancer, tags=tags)
        self._hubs: dict[asyncio.AbstractEventLoop, _Hub] = {}
        self._lock = threading.Lock()
        self._closed = False
        _channels.add(self)

    def unary_call(self, method: MethodDescriptor, response_class: type[Response]) -> AsyncUnaryCall[Any, Response]:
        """The callable for one method; generated stubs ask for theirs here."""
        return AsyncUnaryCall(self, method, response_class)

    def endpoints(self) -> list[EndpointState]:
        """As `MprpcChannel.endpoints`."""
        return self._channel.endpoints()

    def statistics(self) -> ChannelStatistics:
        """As `MprpcChannel.statistics`."""
        return self._channel.statistics()

    async def close(self) -> None:
        """Ends all connections, other event loops' too; calls in flight and later ones fail with Unavailable."""
        with self._lock:
            self._closed = True
            hubs = list(self._hubs.items())
            self._hubs.clear()
        for loop, hub in hubs:
            if loop is asyncio.get_running_loop():
                hub.close()
            else:
                try:
                    loop.call_soon_threadsafe(hub.close)
                except RuntimeError:  # that loop has ended
                    hub.cut()
        thread = ThreadPoolExecutor(1, "mprpc-close")  # the event loop's may all be in calls that this ends
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._channel.close)
        finally:
            thread.shutdown(wait=False)

    async def __aenter__(self) -> AsyncMprpcChannel:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def _forget_forked(self) -> None:
        """In a forked child: event loops and connections are the parent's."""
        self._lock = threading.Lock()
        self._hubs = {}

    def _hub(self) -> _Hub:
        loop = asyncio.get_running_loop()
        return self._hubs.get(loop) or self._new_hub(loop)

    def _new_hub(self, loop: asyncio.AbstractEventLoop) -> _Hub:
        with self._lock:
            if self._closed:
                raise _closed()
            for each in [each for each in self._hubs if each.is_closed()]:
                del self._hubs[each]  # with its connections
            hub = self._hubs[loop] = _Hub(loop, self._channel._config)
            return hub


class AsyncUnaryCall(Generic[Request, Response]):
    """One method, awaitable: `await stub.Login(request, timeout=1.0)`.

    Errors, controller and timeout are `UnaryCall`'s. Cancelling the task sends CANCEL to the provider.
    """

    def __init__(
        self,
        channel: AsyncMprpcChannel,
        method: MethodDescriptor,
        response_class: type[Response],
        policy: Policy | None = None,
    ) -> None:
        self._channel = channel
        self._method = method
        self._response_class = response_class
        self._policy = policy_of(channel._channel._config, method) if policy is None else policy
        self._key: bytes | None = None
        self._made: UnaryCall[Any, Response] | None = None

    def __call__(
        self, request: Request, timeout: float | None = None, controller: MprpcController | None = None
    ) -> Coroutine[Any, Any, Response]:
        if controller is not None:
            return self._controlled(request, timeout, controller)
        return self._call(request, timeout, None)

    def keyed(self, key: bytes) -> AsyncUnaryCall[Request, Response]:
        """As `UnaryCall.keyed`."""
        made = copy(self)
        made._key = key
        made._made = None if self._made is None else self._made.keyed(key)
        return made

    async def _controlled(self, request: Request, timeout: float | None, controller: MprpcController) -> Response:
        loop, failed = asyncio.get_running_loop(), None
        running: asyncio.Task[Response] | None = None
        wanted = False

        def stop() -> None:
            nonlocal wanted
            wanted = True
            if running is not None:
                with contextlib.suppress(RuntimeError):  # the event loop has ended
                    loop.call_soon_threadsafe(running.cancel)

        timeout = controller._begin(stop, timeout)
        running = loop.create_task(self._call(request, timeout, controller))  # start_cancel() must not end our caller
        if wanted:
            running.cancel()
        try:
            await asyncio.wait({running})
            return running.result()
        except RpcError as error:
            failed = error
        except asyncio.CancelledError:
            if not running.done():  # it is our caller's task that is cancelled
                running.cancel()
                raise
            failed = Cancelled(f"{self._method.full_name}: the caller cancelled the call")
        finally:
            controller._end(failed)
        return self._response_class()

    def with_options(
        self,
        *,
        idempotent: bool | None = None,
        retries: int | None = None,
        attempt_timeout: float | None = None,
        hedge_delay: float | str | None = None,
    ) -> AsyncUnaryCall[Request, Response]:
        """As `UnaryCall.with_options`."""
        policy = changed_policy(self._policy, idempotent, retries, attempt_timeout, hedge_delay)
        made: AsyncUnaryCall[Request, Response]
        made = AsyncUnaryCall(self._channel, self._method, self._response_class, policy)
        made._key = self._key
        return made

    async def _call(
        self, request: Request, timeout: float | None, controller: MprpcController | None, settled: bool | None = None
    ) -> Response:
        """settled: whether it makes no retries; None: that and the deadline are inherited, if there is a scope."""
        outer = context.handled() if settled is None else None
        if outer is not None:
            return await self._within(outer, request, timeout, controller)
        call = self._made or await self._make()
        if type(request) is not call._request_class:
            raise call._wrong_request(request)
        began, status = call._begun(), Status.CANCELLED  # unless it ends in another way
        try:
            response = await self._answer(call, request, timeout, controller, bool(settled))
            status = Status.OK
            return response
        except RpcError as error:
            status = error.status
            raise
        finally:
            call._ended(began, status)

    async def _within(
        self, outer: MprpcController, request: Request, timeout: float | None, controller: MprpcController | None
    ) -> Response:
        """A call that belongs to a handler's."""
        default = self._channel._channel._timeout
        timeout = context.left(outer, default if timeout is None else timeout)
        outer._keep()
        started = asyncio.ensure_future(self._call(request, timeout, controller, outer.attempt > 0))
        started.add_done_callback(_retrieve)
        loop = asyncio.get_running_loop()

        def cancel() -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                loop.call_soon_threadsafe(started.cancel)

        outer.notify_on_cancel(cancel)
        try:
            await asyncio.wait({started})
        except BaseException:
            started.cancel()
            raise
        finally:
            outer._forget_on_cancel(cancel)
        if started.cancelled():
            raise Cancelled("the caller of this handler has given up")
        return started.result()

    async def _answer(
        self,
        call: UnaryCall[Any, Response],
        request: Request,
        timeout: float | None,
        controller: MprpcController | None,
        settled: bool,
    ) -> Response:
        payload, nanoseconds = call._prepare(request, timeout)
        call._calls += 1
        deadline = time.monotonic_ns() + nanoseconds
        endpoint = call._target.next()
        hub = self._channel._hub()
        attempts: Attempts[Subchannel] | None = None
        if call._hedging is not None and not settled:
            attempts = call._attempts(deadline, settled=False)
            return await self._hedged(hub, call, payload, attempts, controller, endpoint, call._hedging)
        if endpoint is not None and len(payload) <= call._max_payload and not call._hurries:
            link = hub.links.get(endpoint.address)
            if link is not None and not endpoint.classic and not endpoint.health.gone:
                if controller is not None:
                    controller._peer = endpoint.address
                try:
                    return await hub.call(link, call, endpoint, payload, nanoseconds, deadline, 0)
                except RpcError as error:
                    attempts = call._attempts(deadline, settled=settled)
                    await self._wait_to_retry(call, attempts, endpoint, error, old=True)
                    endpoint = None
        attempts = attempts or call._attempts(deadline, settled=settled)
        return await self._go_round(hub, call, payload, attempts, controller, endpoint)

    async def _hedged(
        self,
        hub: _Hub,
        call: UnaryCall[Any, Response],
        payload: bytes,
        attempts: Attempts[Subchannel],
        controller: MprpcController | None,
        first: Subchannel | None,
        hedging: Hedging,
    ) -> Response:
        """Two requests, if the first takes long: whichever is answered first."""
        running: dict[asyncio.Task[Response], tuple[int, Attempts[Subchannel]]] = {}

        def send(attempts: Attempts[Subchannel], first: Subchannel | None = None) -> None:
            going = asyncio.create_task(self._go_round(hub, call, payload, attempts, None, first))
            running[going] = time.monotonic_ns(), attempts

        delay = hedging.delay()
        send(attempts, first)
        try:
            await asyncio.wait(running, timeout=None if delay is None else delay / _NS)
            while attempts.endpoint is None and not any(each.done() for each in running):
                await asyncio.wait(running, timeout=_FOUND)
            slow, now = attempts.endpoint, time.monotonic_ns()
            if (
                slow is not None
                and not any(each.done() for each in running)
                and any(each is not slow for each in call._target.known())
                and hedging.take(now)
            ):
                send(attempts.hedge(slow))
            answered = await _first_answer(running)
            for each, (began, tried) in running.items():
                if each is answered or not each.done():
                    hedging.lasted(time.monotonic_ns() - began)
                if each is answered and controller is not None and tried.endpoint is not None:
                    controller._peer = tried.endpoint.address
            return answered.result()
        finally:
            for each in running:
                each.cancel()
                each.add_done_callback(_retrieve)

    @staticmethod
    async def _wait_to_retry(
        call: UnaryCall[Any, Response],
        attempts: Attempts[Subchannel],
        endpoint: Subchannel | None,
        error: RpcError,
        *,
        old: bool,
    ) -> None:
        """Until the next attempt. Raises what the call has failed with."""
        pause = call._after(attempts, endpoint, error, old=old)
        if pause is None:
            try:
                raise attempts.problem or error
            finally:
                attempts.problem = None  # its traceback holds the frames that hold these: a cycle for the collector
                del error
        if pause:
            await asyncio.sleep(pause / _NS)

    async def _make(self) -> UnaryCall[Any, Response]:
        """The blocking call that this one is the face of; making it may open the registry, which takes its time."""
        channel = self._channel._channel
        if channel._address:
            made: UnaryCall[Any, Response] = UnaryCall(channel, self._method, self._response_class, self._policy)
        else:
            run = asyncio.get_running_loop().run_in_executor
            made = await run(None, UnaryCall, channel, self._method, self._response_class, self._policy)
        if self._key is not None:
            made = made.keyed(self._key)
        if self._made is None:  # callers at the same time go on with one: what looks for a provider is shared by it
            self._made = made
        return self._made

    async def _go_round(
        self,
        hub: _Hub,
        call: UnaryCall[Any, Response],
        payload: bytes,
        attempts: Attempts[Subchannel],
        controller: MprpcController | None,
        first: Subchannel | None,
    ) -> Response:
        """Calls one endpoint after the other, from `first` on, as long as `attempts` says."""
        call._check_size(payload)
        while True:
            endpoint = attempts.next(await hub.endpoints(call, attempts.deadline, first))
            first, old = None, endpoint is not None and endpoint.address in hub.links
            try:
                if endpoint is None:
                    raise call._nobody(attempts)
                if controller is not None:
                    controller._peer = endpoint.address
                return await hub.call_endpoint(call, endpoint, payload, attempts)
            except RpcError as error:
                await self._wait_to_retry(call, attempts, endpoint, error, old=old)


class _Link:
    """A connection of one event loop."""

    def __init__(self, handle: Any, address: str) -> None:
        self.handle = handle
        self.address = address
        self.descriptor = lib.mprpc_link_descriptor(handle)
        self.dirty = False  # it will be written to at the end of this iteration
        self.writing = False  # the event loop watches for room to write
        self.due = _FOREVER  # when the event loop's timer for it goes off, monotonic ns
        self.timer: asyncio.TimerHandle | None = None


class _Hub:
    """What one event loop has of one channel. On that loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, config: MprpcConfig) -> None:
        self.links: dict[str, _Link] = {}  # what new calls go to
        self._all: set[_Link] = set()  # those too that only have calls in flight
        self._loop = loop
        self._config = config
        self._max_pending = config.max_pending
        self._max_bytes = config.max_payload
        self._box = Mailbox()
        self._pending: dict[int, asyncio.Future[tuple[Mail, bytes]]] = {}
        self._flying = self._bytes = 0  # calls in flight and being let in, and their requests' bytes
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()  # calls that there is no room for yet
        self._tokens = count(1)
        self._connecting: dict[str, asyncio.Task[_Link]] = {}
        self._finding: dict[object, tuple[asyncio.Future[tuple[Subchannel, ...]], int]] = {}
        self._expiry = ffi.new("uint64_t *")
        self._closed = False

    # ---- a call ----

    async def call_endpoint(
        self,
        call: UnaryCall[Any, Response],
        endpoint: Subchannel,
        payload: bytes,
        attempts: Attempts[Subchannel],
    ) -> Response:
        if endpoint.classic:
            now = time.monotonic_ns()
            return await self.call_classic(call, endpoint, payload, now + attempts.timeout(now))
        link = self.links.get(endpoint.address)
        if link is None:
            link = await self.connect(endpoint, attempts.deadline)
        now = time.monotonic_ns()
        left = attempts.timeout(now)
        if left <= 0:
            raise call._out_of_time()
        return await self.call(link, call, endpoint, payload, left, now + left, attempts.number)

    async def call(
        self,
        link: _Link,
        call: UnaryCall[Any, Response],
        endpoint: Subchannel,
        payload: bytes,
        timeout: int,
        deadline: int,
        attempt: int,
    ) -> Response:
        size = len(payload)
        if self._waiting or not self._has_room(size):
            await self._wait_for_room(size, deadline)
            timeout = max(0, deadline - time.monotonic_ns())
        else:
            self._flying += 1
            self._bytes += size
        token = next(self._tokens)
        try:
            identity = self._submit(link, token, call, endpoint, payload, timeout, attempt)
            future: asyncio.Future[tuple[Mail, bytes]] = self._loop.create_future()
            self._pending[token] = future
            try:
                mail, data = await future
            except asyncio.CancelledError:
                if self._forget(link, token, identity) and not link.dirty:
                    self._write_soon(link)
                raise
            except GeneratorExit:  # its task is gone, perhaps the event loop too
                self._forget(link, token, identity)
                raise
        finally:
            self._leave(size)
        size = mail[1]
        if size >= 0:
            return call._parsed(data[mail[3] : mail[3] + size])
        raise call._mail_error(endpoint, None, mail, data)

    def _submit(
        self,
        link: _Link,
        token: int,
        call: UnaryCall[Any, Any],
        endpoint: Subchannel,
        payload: bytes,
        timeout: int,
        attempt: int,
    ) -> int:
        """Its call_id; what it ends with is looked for only after this iteration of the event loop."""
        identity: int = lib.mprpc_link_submit(
            link.handle, token, call._names, call._names_size, payload, len(payload), timeout, attempt, True, ffi.NULL
        )
        if identity < 0:
            if identity != lib.MPRPC_CALL_FULL:
                self._retire(link)
            raise call._broken(endpoint, None, identity, lib.mprpc_link_check(link.handle), 0)
        if not link.dirty:
            self._write_soon(link)
        return identity

    def _forget(self, link: _Link, token: int, identity: int) -> bool:
        """A cancelled call ends as no mail. Whether CANCEL is to be written."""
        return self._pending.pop(token, None) is not None and bool(lib.mprpc_link_cancel(link.handle, identity))

    async def call_classic(
        self, call: UnaryCall[Any, Response], endpoint: Subchannel, payload: bytes, deadline: int
    ) -> Response:
        """In the seed's dialect, on the executor; its threads may all be taken until after the deadline."""
        running = self._loop.run_in_executor(None, call._call_classic, endpoint, payload, deadline)
        running.add_done_callback(_retrieve)
        left = (deadline - time.monotonic_ns()) / _NS
        done, _ = await asyncio.wait({running}, timeout=max(0.0, left) + _GRACE)
        if not done:
            running.cancel()
            raise DeadlineExceeded(f"{call._method.full_name}: no answer from {endpoint.address} within the deadline")
        return running.result()

    # ---- room ----

    def _has_room(self, size: int) -> bool:
        return self._flying < self._max_pending and (self._bytes + size <= self._max_bytes or not self._bytes)

    async def _wait_for_room(self, size: int, deadline: int) -> None:
        """Slows those who start more calls than max_pending, or with more bytes than max_payload; in order."""
        turn: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((turn, size))
        left = max(0, deadline - time.monotonic_ns()) / _NS
        timer = self._loop.call_later(left, self._refuse, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._leave(size)  # let in and cancelled at once
            raise
        finally:
            timer.cancel()

    def _refuse(self, turn: asyncio.Future[None]) -> None:
        if not turn.done():
            limits = f"max_pending={self._max_pending}, max_payload={self._max_bytes} bytes of requests"
            text = f"the calls in flight leave no room within the deadline ({limits})"
            turn.set_exception(ResourceExhausted(text, not_run=True))

    def _leave(self, size: int) -> None:
        self._flying -= 1
        self._bytes -= size
        while self._waiting and (self._waiting[0][0].done() or self._has_room(self._waiting[0][1])):
            turn, size = self._waiting.popleft()
            if not turn.done():
                self._flying += 1
                self._bytes += size
                turn.set_result(None)

    # ---- the event loop's callbacks ----

    def _write_soon(self, link: _Link) -> None:
        link.dirty = True
        self._loop.call_soon(self._write, link)

    def _write(self, link: _Link) -> None:
        link.dirty = False
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
        if told < 0:
            self._lose(link)
        elif told != link.writing:
            self._watch_writing(link, told > 0)
        due = self._expiry[0]
        if due < link.due and told >= 0:
            self._set_timer(link, due)
        mail, data = self._box.take()
        pending = self._pending
        for each in MAIL.iter_unpack(mail):
            future = pending.pop(each[0], None)
            if future is not None and not future.done():
                future.set_result((each, data))

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

    # ---- finding providers ----

    async def endpoints(
        self, call: UnaryCall[Any, Any], deadline: int, first: Subchannel | None
    ) -> tuple[Subchannel, ...]:
        target = call._target
        with contextlib.suppress(Unavailable):  # there is no list yet
            return target.all(0, first)
        while True:
            finding, until = self._finding.get(target.whole) or self._find(target.whole, deadline)
            left = (deadline - time.monotonic_ns()) / _NS
            await asyncio.wait({finding}, timeout=max(0.0, left) + _GRACE)
            if not finding.done():
                raise Unavailable(f"{call._method.full_name}: no provider was found within the deadline", not_run=True)
            if finding.exception() is None or until >= deadline or time.monotonic_ns() < until:
                found = finding.result()  # else it looked no longer than for a call with a nearer deadline
                return found if target is target.whole else target.all(0, first)

    def _find(self, target: Any, deadline: int) -> tuple[asyncio.Future[tuple[Subchannel, ...]], int]:
        """Looks for a list on a thread of its own; callers at the same time share it."""
        finding: asyncio.Future[tuple[Subchannel, ...]] = self._loop.create_future()
        finding.add_done_callback(_retrieve)
        self._finding[target] = finding, deadline

        def settle(found: tuple[Subchannel, ...], error: Exception | None) -> None:
            self._finding.pop(target, None)
            if not finding.done():
                finding.set_exception(error) if error is not None else finding.set_result(found)

        def find() -> None:
            found: tuple[Subchannel, ...] = ()
            error: Exception | None = None
            try:
                found = target.all(deadline)
            except Exception as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._loop.call_soon_threadsafe(settle, found, error)

        threading.Thread(target=find, name="mprpc-find", daemon=True).start()
        return finding, deadline

    # ---- connections ----

    async def connect(self, endpoint: Subchannel, deadline: int) -> _Link:
        """The connection to that endpoint; callers at the same time share one attempt."""
        if self._closed:
            raise _closed()
        link = self.links.get(endpoint.address)
        if link is not None:
            return link
        task = self._connecting.get(endpoint.address)
        if task is None:
            task = self._connecting[endpoint.address] = self._loop.create_task(self._connect(endpoint))
            task.add_done_callback(lambda _: self._connecting.pop(endpoint.address, None))
            task.add_done_callback(_retrieve)
        left = (deadline - time.monotonic_ns()) / _NS
        done, _ = await asyncio.wait({task}, timeout=max(0.0, left))
        if not done:
            raise Unavailable(f"can't connect to {endpoint.address}: no connection within the deadline", not_run=True)
        if task.cancelled():
            raise _closed()
        return task.result()

    async def _connect(self, endpoint: Subchannel) -> _Link:
        measure = endpoint.measure
        lib.mprpc_load_begin(measure)
        try:
            handle = await self._connect_link(endpoint)
        except Unavailable as error:
            endpoint.unreachable(error.text)
            raise
        finally:
            lib.mprpc_load_leave(measure)
        endpoint.reached()
        lib.mprpc_link_measure(handle, measure)
        link = _Link(handle, endpoint.address)
        lib.mprpc_link_attach(link.handle, self._box.handle, True)
        self.links[endpoint.address] = link
        self._all.add(link)
        self._loop.add_reader(link.descriptor, self._readable, link)
        return link

    async def _connect_link(self, endpoint: Subchannel) -> Any:
        if endpoint.address.startswith("memory:"):
            from mprpc import memory

            return memory.connect(endpoint.address, self._config.max_payload)
        connect = self._config.connect_timeout
        try:
            connection = await asyncio.wait_for(self._reach(endpoint.address), connect)
        except asyncio.TimeoutError:
            text = f"can't connect to {endpoint.address}: no connection within {connect:.3g} s"
            raise Unavailable(text, not_run=True) from None
        except OSError as error:
            text = f"can't connect to {endpoint.address}: {error.strerror or error}"
            raise Unavailable(text, not_run=True) from None
        descriptor = connection.detach()
        handle = new_link(descriptor, self._config)
        if handle is None:
            os.close(descriptor)
            raise Unavailable(f"can't connect to {endpoint.address}: no memory for a connection", not_run=True)
        return handle

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

    def _retire(self, link: _Link) -> None:
        """It takes no new calls; those in flight on it may still be answered."""
        if self.links.get(link.address) is link:
            del self.links[link.address]

    def _lose(self, link: _Link) -> None:
        """The connection has ended; the next call makes another."""
        self._retire(link)
        if link in self._all:
            self._all.remove(link)
            self._loop.remove_reader(link.descriptor)
            self._loop.remove_writer(link.descriptor)
            if link.timer is not None:
                link.timer.cancel()

    def cut(self) -> None:
        """Any thread, once the event loop has ended: else only the cycle collector ends its connections."""
        for link in list(self._all):
            lib.mprpc_link_close(link.handle)

    def close(self) -> None:
        self._closed = True
        for task in list(self._connecting.values()):
            task.cancel()
        for finding, _ in list(self._finding.values()):
            if not finding.done():
                finding.set_exception(_closed())
        for link in list(self._all):
            lib.mprpc_link_close(link.handle)
            self._turn(link, False)


async def _first_answer(running: Iterable[asyncio.Task[Response]]) -> asyncio.Task[Response]:
    """Of a call's two requests: one that another provider could not turn out well, or the last."""
    waiting = set(running)
    while True:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            if not isinstance(each.exception(), PASSING) or not waiting:
                return each


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Those who waited may all have gone: then nobody hears of the exception, which is no mistake."""
    if not done.cancelled():
        done.exception()


def _closed() -> Unavailable:
    return Unavailable("the channel is closed", not_run=True)


_channels: weakref.WeakSet[AsyncMprpcChannel] = weakref.WeakSet()


def _after_fork() -> None:
    for channel in list(_channels):
        channel._forget_forked()


os.register_at_fork(after_in_child=_after_fork)
