"""A unary call: one method of one channel, callable.

A plain call, with a connection that is there and a response, is one call into C (`_call.c`), which serializes, sends,
waits and receives without the interpreter's lock, and parses; what is not plain comes here. What a call that failed may
still try is said by `retry.py`, what one that a handler makes inherits by `context.py`. A timeout becomes a deadline
when the call starts; finding a provider, connecting, sending, waiting and retries all draw on it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.message_factory import GetMessageClass

from mprpc import context
from mprpc._native import ffi, lib
from mprpc.controller import MprpcController
from mprpc.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    RpcError,
    Status,
    Unavailable,
)
from mprpc.fast import native
from mprpc.late import importing
from mprpc.retry import P95, Attempts, Policy
from mprpc.target import Fixed

if TYPE_CHECKING:
    from collections.abc import Callable

    from mprpc.channel import MprpcChannel
    from mprpc.config import MprpcConfig
    from mprpc.futures import CallFuture, Mail
    from mprpc.subchannel import Subchannel
    from mprpc.target import Target

__all__ = ["UnaryCall", "changed_policy", "names_on_wire", "nanoseconds", "policy_of"]

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)

_NS = 1_000_000_000
_LONGEST = 1e9  # seconds; a longer timeout, such as infinity, means this one
_IDEMPOTENCY_UNKNOWN = 0  # google.protobuf.MethodOptions.IdempotencyLevel
_CLASSIC_CHUNK = 65536  # bytes of a classic response taken at once

_start_future: Any = None  # of mprpc.futures, which is imported when it is used

if TYPE_CHECKING:

    class _Call:  # of _call.c
        _plain: bool  # whether C may make calls without asking here
        _calls: int  # C adds the plain ones

        def __init__(self, *arguments: object) -> None: ...

        def _send(
            self, endpoint: Subchannel, link: Any, payload: bytes, timeout: int, attempt: int, flag: int
        ) -> Any: ...

        def _begun(self) -> int: ...  # counts a call; when it began, monotonic ns

        def _ended(self, began: int, status: int) -> None: ...

else:
    _Call = native.Call


class Cancellation:
    """Ends one blocking call from any thread."""

    def __init__(self) -> None:
        self._flag = ffi.new("struct mprpc_flag *")
        self._link: Any = None
        self.wanted = False
        self._awake: threading.Event | None = None

    def __call__(self) -> None:
        self.wanted = True
        if self._awake is not None:
            self._awake.set()
        lib.mprpc_link_cancel_call(ffi.NULL, self._flag)  # first the flag, then a look at who did not see it any more
        link = self._link
        if link is not None:
            lib.mprpc_link_cancel_call(link.handle, self._flag)

    def on(self, link: Any) -> int:
        """The call goes to that link next; where the flag is that it takes there."""
        self._link = link
        return int(ffi.cast("uintptr_t", self._flag))

    def pause(self, seconds: float) -> None:
        """Sleeps, unless the call is cancelled."""
        self._awake = threading.Event()
        if not self.wanted:
            self._awake.wait(seconds)
        self._awake = None


class UnaryCall(_Call, Generic[Request, Response]):
    """One method, callable: `stub.Login(request, timeout=1.0)`. Any thread, any number at once.

    Returns the response or raises `RpcError`. With a controller it never raises for the call's sake: it returns an
    empty response and the controller says why. `timeout` (seconds) goes before the controller's, that before the
    channel's. A request of another class is a TypeError, always.
    """

    def __init__(
        self,
        channel: MprpcChannel,
        method: MethodDescriptor,
        response_class: type[Response],
        policy: Policy | None = None,
    ) -> None:
        self._channel = channel
        self._method = method
        self._request_class = GetMessageClass(method.input_type)
        self._response_class = response_class
        self._parse: Callable[[bytes], Response] = response_class.FromString
        self._names = names_on_wire(method.containing_service.full_name, method.name)
        self._names_size = len(self._names)
        self._timeout_ns = nanoseconds(channel._timeout)
        self._max_payload = channel._config.max_payload
        self._policy = policy_of(channel._config, method) if policy is None else policy
        self._hurries = self._policy.idempotent and self._policy.attempt_timeout > 0.0
        self._hedging = channel._new_hedging(self._policy) if self._policy.hedges else None
        self._begin(channel._target(method))

    def _begin(self, target: Target) -> None:
        self._target = target
        tally = self._channel._tally(self._method.full_name)
        super().__init__(
            self._request_class,
            self._response_class,
            self._names,
            self._timeout_ns,
            self._max_payload,
            self._channel._config.max_pending,
            tally,
            int(ffi.cast("uintptr_t", tally)),
            *((None, target.next()) if isinstance(target, Fixed) else (target.next, None)),
        )
        self._plain = not self._hurries and self._hedging is None
        self._calls = 0  # since the last one that had to ask for a retry

    if TYPE_CHECKING:

        def __call__(
            self, request: Request, timeout: float | None = None, controller: MprpcController | None = None
        ) -> Response: ...

    def _general(
        self, request: Request, timeout: float | None = None, controller: MprpcController | None = None
    ) -> Response:
        """A call that is not plain, or not known to be."""
        if self._hedging is not None and _may_wait():
            return self._hedged(request, timeout, controller)
        if type(request) is not self._request_class:
            raise self._wrong_request(request)
        began, status = self._begun(), Status.CANCELLED  # unless it ends in another way
        try:
            if controller is not None:
                response = self._controlled(request, timeout, controller)
                status = controller.status
            elif context.handled() is not None:
                response = self._within(request, timeout, MprpcController())
                status = Status.OK
            else:
                response = self._call(request, timeout, None)
                status = Status.OK
        except RpcError as error:
            status = error.status
            raise
        finally:
            self._ended(began, status)
        return response

    def with_options(
        self,
        *,
        idempotent: bool | None = None,
        retries: int | None = None,
        attempt_timeout: float | None = None,
        hedge_delay: float | str | None = None,
    ) -> UnaryCall[Request, Response]:
        """The same method with other rules for what fails: `login = users.Login.with_options(idempotent=True)`.

        `idempotent`: it may run twice, whatever its .proto file says. The others go before the keys of the same name.
        What is None stays as it is. Raises ValueError.
        """
        policy = changed_policy(self._policy, idempotent, retries, attempt_timeout, hedge_delay)
        made: UnaryCall[Request, Response] = UnaryCall(self._channel, self._method, self._response_class, policy)
        made._begin(self._target)
        return made

    def keyed(self, key: bytes) -> UnaryCall[Request, Response]:
        """The same for calls that belong together: `stub.Login.keyed(b"user 7")(request)`. With the balancer
        consistent_hash those with one key go to one provider, as long as it has room."""
        made: UnaryCall[Request, Response] = UnaryCall.__new__(UnaryCall)
        made.__dict__.update(self.__dict__)
        made._begin(self._target.keyed(key))
        return made

    if TYPE_CHECKING:

        def future(
            self, request: Request, timeout: float | None = None, controller: MprpcController | None = None
        ) -> CallFuture[Response]:
            """Starts the call and returns its future at once. Any thread.

            It is a `concurrent.futures.Future`; `cancel()` tells the provider. Raises ResourceExhausted when the key
            `max_pending` such calls of this process are in flight and none ends within this call's deadline.
            """

    def _future(
        self, request: Request, timeout: float | None = None, controller: MprpcController | None = None
    ) -> CallFuture[Response]:
        """One that is not plain, or not known to be, or the first of the process."""
        global _start_future
        if _start_future is None:  # once: an import statement that finds all there still costs half a microsecond
            with importing:
                from mprpc.futures import start_future as _start_future
        future: CallFuture[Response] = _start_future(self, request, timeout, controller)
        return future

    def _hedged(self, request: Request, timeout: float | None, controller: MprpcController | None) -> Response:
        """As a future, since one thread can't wait in two connections."""
        future = self.future(request, timeout, controller)
        try:
            return future.result()
        except RpcError:
            raise
        except BaseException:  # Ctrl-C
            future.cancel()
            raise

    def _controlled(self, request: Request, timeout: float | None, controller: MprpcController) -> Response:
        try:
            return self._within(request, timeout, controller)
        except RpcError:
            return self._response_class()

    def _within(self, request: Request, timeout: float | None, controller: MprpcController) -> Response:
        """A call with a controller, and perhaps inside of a handler."""
        failed: RpcError | None = None
        stop = Cancellation()
        timeout = controller._begin(stop, timeout)
        outer = context.handled()
        if outer is not None:
            outer.notify_on_cancel(stop)
        try:
            if outer is not None:
                timeout = context.left(outer, self._channel._timeout if timeout is None else timeout)
                controller._settled = outer.attempt > 0
            return self._call(request, timeout, controller)
        except RpcError as error:
            failed = error
            raise
        finally:
            if outer is not None:
                outer._forget_on_cancel(stop)
            controller._end(failed)

    def _prepare(self, request: Message, timeout: float | None) -> tuple[bytes, int]:
        """The request's bytes and the call's nanoseconds."""
        if type(request) is not self._request_class:
            raise self._wrong_request(request)
        try:
            payload = request.SerializeToString()
        except EncodeError as error:
            raise InvalidArgument(f"{self._method.full_name}: {error}", not_run=True) from None
        return payload, self._timeout_ns if timeout is None else nanoseconds(timeout)

    def _call(self, request: Request, timeout: float | None, controller: MprpcController | None) -> Response:
        payload, nanoseconds = self._prepare(request, timeout)
        self._calls += 1
        endpoint = self._target.next()
        if endpoint is None or (link := endpoint.link) is None or len(payload) > self._max_payload or self._hurries:
            settled = controller is not None and controller._settled
            attempts = self._attempts(time.monotonic_ns() + nanoseconds, settled=settled)
            return self._go_round(payload, attempts, controller, endpoint)
        flag = 0
        if controller is not None:
            controller._peer = endpoint.address
            flag = controller._stop.on(link)  # type: ignore[union-attr]  # a Cancellation here
        deadline = time.monotonic_ns() + nanoseconds
        try:
            response: Response = self._send(endpoint, link, payload, nanoseconds, 0, flag)
            return response
        except RpcError as error:
            attempts = self._attempts(deadline, settled=controller is not None and controller._settled)
            self._wait_to_retry(attempts, endpoint, error, controller, old=True)
        return self._go_round(payload, attempts, controller)

    # ---- what C asks for ----

    def _connect_and_call(self, request: Request, timeout: float | None, endpoint: Subchannel | None) -> Response:
        """A plain call whose endpoint, whose turn it was, has no connection."""
        payload, nanoseconds = self._prepare(request, timeout)
        attempts = self._attempts(time.monotonic_ns() + nanoseconds, settled=False)
        return self._go_round(payload, attempts, None, endpoint)

    def _failed(self, error: RpcError, endpoint: Subchannel, payload: bytes, deadline: int) -> Response:
        """A plain call came to that."""
        attempts = self._attempts(deadline, settled=False)
        try:
            self._wait_to_retry(attempts, endpoint, error, None, old=True)
        finally:
            del error  # whose traceback holds this frame: a cycle would be left for the collector by each failed call
        return self._go_round(payload, attempts, None)

    # ---- what is not plain ----

    def _attempts(self, deadline: int, *, settled: bool) -> Attempts[Subchannel]:
        """For a call that is not plain any more."""
        import random  # reseeded in a forked child; most processes get here late or never

        return Attempts(self._policy, self._channel._budget, deadline, random.random, settled=settled)

    def _go_round(
        self,
        payload: bytes,
        attempts: Attempts[Subchannel],
        controller: MprpcController | None,
        first: Subchannel | None = None,
    ) -> Response:
        """Calls one endpoint after the other, from `first` on, as long as `attempts` says."""
        self._check_size(payload)
        began = time.monotonic()
        while True:
            endpoint = attempts.next(self._target.all(attempts.deadline, first))
            first, old = None, endpoint is not None and endpoint.link is not None
            try:
                if endpoint is None:
                    raise self._nobody(attempts)
                return self._call_endpoint(endpoint, payload, attempts, began, controller)
            except RpcError as error:
                if self._wait_to_retry(attempts, endpoint, error, controller, old=old):
                    began = time.monotonic()

    def _wait_to_retry(
        self,
        attempts: Attempts[Subchannel],
        endpoint: Subchannel | None,
        error: RpcError,
        controller: MprpcController | None,
        *,
        old: bool,
    ) -> int:
        """How many nanoseconds it has waited until the next attempt. Raises what the call has failed with."""
        pause = self._after(attempts, endpoint, error, old=old)
        if pause is None:
            try:
                raise attempts.problem or error
            finally:
                attempts.problem = None  # as in _failed
                del error
        if pause and controller is not None and isinstance(controller._stop, Cancellation):
            controller._stop.pause(pause / _NS)
        elif pause:
            time.sleep(pause / _NS)
        return pause

    def _after(
        self, attempts: Attempts[Subchannel], endpoint: Subchannel | None, error: RpcError, *, old: bool
    ) -> int | None:
        """Nanoseconds until the next attempt; None when the call has failed with `attempts.problem`."""
        attempts.problem = error
        if self._channel._closed:
            return None
        calls, self._calls = self._calls, 0
        self._channel._budget.called(calls)
        pause = attempts.after(error, endpoint, self._target.known(), time.monotonic_ns(), old=old)
        if pause is not None and endpoint is not None and not old and isinstance(error, Unavailable):
            self._target.failed(endpoint)
        return pause

    def _nobody(self, attempts: Attempts[Subchannel]) -> RpcError:
        text = f"{self._method.full_name}: {self._target.nobody()}"
        return attempts.problem or Unavailable(text, not_run=True)

    def _check_size(self, payload: bytes) -> None:
        if len(payload) > self._max_payload:
            text = f"{self._method.full_name}: the request has {len(payload)} bytes, max_payload allows"
            raise ResourceExhausted(f"{text} {self._max_payload}", not_run=True)

    def _call_endpoint(
        self,
        endpoint: Subchannel,
        payload: bytes,
        attempts: Attempts[Subchannel],
        began: float,
        controller: MprpcController | None,
    ) -> Response:
        stop: Cancellation | None = None
        if controller is not None:
            controller._peer = endpoint.address
            stop = controller._stop  # type: ignore[assignment]  # a Cancellation here
        if stop is not None and stop.wanted:
            raise self._cancelled(not_run=True)
        if endpoint.classic:
            now = time.monotonic_ns()
            return self._call_classic(endpoint, payload, now + attempts.timeout(now))
        link = endpoint.link
        if link is None:
            link = endpoint.connect(attempts.deadline, began)
        left = attempts.timeout(time.monotonic_ns())
        if left <= 0:
            raise self._out_of_time()
        flag = 0 if stop is None else stop.on(link)
        response: Response = self._send(endpoint, link, payload, left, attempts.number, flag)
        return response

    def _out_of_time(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"{self._method.full_name}: the deadline passed before it was sent", not_run=True)

    def _error(self, endpoint: Subchannel, link: Any, at: int, outcome: int) -> RpcError:
        """What an attempt failed with; at: its struct mprpc_call, until this returns."""
        call = ffi.cast("struct mprpc_call *", at)
        if outcome == lib.MPRPC_CALL_FAILED:
            words = bytes(ffi.buffer(call.words, call.text_size + call.details_size)) if call.words else b""
            return _failure(endpoint, call.status, call.not_run, words, call.text_size)
        return self._broken(endpoint, link, outcome, call.reason, call.sent)

    def _mail_error(self, endpoint: Subchannel, link: Any, mail: Mail, data: bytes) -> RpcError:
        _, outcome, reason, offset, text_size, details_size, status, not_run, sent = mail
        if outcome == lib.MPRPC_CALL_FAILED:
            return _failure(endpoint, status, not_run, data[offset : offset + text_size + details_size], text_size)
        return self._broken(endpoint, link, outcome, reason, sent)

    def _broken(self, endpoint: Subchannel, link: Any, outcome: int, reason: int, sent: int) -> RpcError:
        name, address = self._method.full_name, endpoint.address
        if outcome == lib.MPRPC_CALL_TIMEOUT:
            endpoint.silent()
            return DeadlineExceeded(f"{name}: no answer from {address} within the call's deadline")
        if outcome == lib.MPRPC_CALL_CANCELLED:
            return self._cancelled(not_run=not sent)
        if outcome == lib.MPRPC_CALL_FULL:
            crowd = f"{lib.MPRPC_CALLS_MAX} calls are in flight, or max_unsent bytes wait, or memory ran out"
            text = f"{name}: {address} takes no more now: {crowd}"
            return ResourceExhausted(text, not_run=True)
        endpoint.drop(link)
        if sent and reason not in (lib.MPRPC_LINK_CLOSED, lib.MPRPC_LINK_GOAWAY):
            endpoint.broke(_why(reason))
        return Unavailable(f"{name}: {address}: {_why(reason)}", not_run=not sent)

    def _cancelled(self, not_run: bool) -> Cancelled:
        return Cancelled(f"{self._method.full_name}: the caller cancelled the call", not_run=not_run)

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

    def _call_classic(self, endpoint: Subchannel, payload: bytes, deadline: int) -> Response:
        """One call on a connection of its own; the end of the stream ends the response."""
        measure, began, verdict = endpoint.measure, time.monotonic_ns(), lib.MPRPC_LOAD_FAILED
        lib.mprpc_load_begin(measure)
        try:
            answer = self._exchange_classic(endpoint, payload, deadline)
            verdict = lib.MPRPC_LOAD_OK
        except DeadlineExceeded:
            endpoint.silent()
            raise
        except Unavailable as error:
            endpoint.unreachable(error.text) if error.not_run else endpoint.broke(error.text)
            raise
        finally:
            lib.mprpc_load_end(measure, began, time.monotonic_ns(), verdict)
        return self._parsed(answer)

    def _exchange_classic(self, endpoint: Subchannel, payload: bytes, deadline: int) -> bytes:
        service = self._method.containing_service.name
        frame = _classic_request(service, self._method.name, payload)
        name, address = self._method.full_name, endpoint.address
        with endpoint.exchange(deadline) as connection:
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
        return answer


def policy_of(config: MprpcConfig, method: MethodDescriptor) -> Policy:
    has_options = getattr(method, "has_options", True)  # protobuf 5 does not say; GetOptions imports more
    return Policy(
        has_options and method.GetOptions().idempotency_level != _IDEMPOTENCY_UNKNOWN,
        config.retries,
        config.retry_backoff,
        config.retry_backoff_max,
        config.attempt_timeout,
        _hedge_delay(config.hedge_delay),
        config.hedge_share,
    )


def _hedge_delay(given: float | str) -> float | None:
    """As a Policy has it. Raises ValueError."""
    if given in ("off", "p95"):
        return None if given == "off" else P95
    if not float(given) >= 0.0:
        raise ValueError
    return float(given)


def changed_policy(
    policy: Policy,
    idempotent: bool | None,
    retries: int | None,
    attempt_timeout: float | None,
    hedge_delay: float | str | None,
) -> Policy:
    if retries is not None and retries < 0:
        raise ValueError(f"retries={retries}: give 0 or more")
    if attempt_timeout is not None and not attempt_timeout >= 0.0:
        raise ValueError(f"attempt_timeout={attempt_timeout}: give seconds, or 0 for the call's own")
    try:
        hedge = policy.hedge_delay if hedge_delay is None else _hedge_delay(hedge_delay)
    except ValueError:
        raise ValueError(f'hedge_delay={hedge_delay}: give seconds, "p95" or "off"') from None
    return policy._replace(
        hedge_delay=hedge,
        idempotent=policy.idempotent if idempotent is None else idempotent,
        retries=policy.retries if retries is None else retries,
        attempt_timeout=policy.attempt_timeout if attempt_timeout is None else attempt_timeout,
    )


def _may_wait() -> bool:
    """Whether this thread may wait for a future: not one that sees to their ends."""
    from mprpc.futures import reader

    return threading.get_ident() not in reader().threads


def _failure(endpoint: Subchannel, status: int, not_run: int, words: bytes, text_size: int) -> RpcError:
    """What the provider said: the text, then the details."""
    text = words[:text_size].decode(errors="replace")
    error = RpcError(status, text, not_run=bool(not_run), details=words[text_size:])
    endpoint.answered(error)
    return error


def nanoseconds(timeout: float) -> int:
    return int(min(max(timeout, 0.0), _LONGEST) * _NS)


def names_on_wire(service: str, method: str) -> bytes:
    """The two names as fields of the header."""
    wire = service.encode(), method.encode()
    room = len(wire[0]) + len(wire[1]) + 12
    if room > lib.MPRPC_NAMES_MAX:
        raise ValueError(f"{service}.{method}: a name of over {lib.MPRPC_NAMES_MAX} bytes can't be called")
    to = ffi.new("uint8_t[]", room)
    return bytes(ffi.buffer(to, lib.mprpc_put_names(to, wire[0], len(wire[0]), wire[1], len(wire[1]))))


def _classic_request(service: str, method: str, payload: bytes) -> bytes:
    names = names_on_wire(service, method)
    head = ffi.new("uint8_t[]", len(names) + 64)
    return bytes(ffi.buffer(head, lib.mprpc_put_call(head, names, len(names), len(payload), 0, 0, 0))) + payload


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


def _why(reason: int) -> str:
    if reason > 0:
        return os.strerror(reason)
    return _REASONS.get(reason) or f"the provider sent {ffi.string(lib.mprpc_why(reason)).decode()}"


_REASONS = {
    lib.MPRPC_LINK_END: "the provider ended the connection",
    lib.MPRPC_LINK_CLOSED: "the channel was closed",
    lib.MPRPC_LINK_GOAWAY: "the provider takes no more calls on this connection (GOAWAY)",
    lib.MPRPC_LINK_SILENT: "the provider is silent, no answer to PING within keepalive_timeout",
}
