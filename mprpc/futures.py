"""Futures: calls that go on while their caller does something else.

`stub.Login.future(request)` gives the request to the connection and returns. While any such call is in flight, one
thread of the process, the reader, reads for all connections (`_mailbox.c`). A plain future, with a connection that is
there and a response, never leaves C (`_future.c`), which ends many at a time; what is not plain comes here. The thread
ends when nothing is in flight.

A call that can't be submitted at once, because a provider has to be found or connected first, or that must go on to
another provider, waits in a queue for one of a few lanes: threads that do what blocks, and then submit it as well. So a
future can be cancelled, and its deadline is kept, wherever it is.

Rules: a call in flight is posted, or in `_queued` or `_paused`, or on a lane; who takes it from there sees to its end.
At most max_pending are in flight, and of requests that are not small at most max_payload bytes. No user code runs with
a lock held.
"""

from __future__ import annotations

import heapq
import logging
import os
import struct
import threading
import time
from concurrent.futures import CancelledError, Future, TimeoutError  # on 3.10 not the built-in one
from concurrent.futures._base import CANCELLED_AND_NOTIFIED, FINISHED, PENDING
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.message import Message

from mprpc import context
from mprpc._native import ffi, lib
from mprpc.controller import MprpcController
from mprpc.errors import DeadlineExceeded, ResourceExhausted, RpcError, Status, Unavailable
from mprpc.fast import native

if TYPE_CHECKING:
    from mprpc.config import MprpcConfig
    from mprpc.retry import Attempts
    from mprpc.subchannel import Subchannel
    from mprpc.unary_call import UnaryCall

__all__ = ["MAIL", "PASSING", "CallFuture", "Mail", "Mailbox", "start_future"]

_log = logging.getLogger("mprpc.futures")

Response = TypeVar("Response", bound=Message)

_NS = 1_000_000_000
_FOREVER = 2**64 - 1
_LINGER = 50_000_000  # ns that the reader and a lane wait for another call before their thread ends
_LANES = 8  # calls being found or connected at once; more wait in the queue, within max_pending
_FOUND = 10_000_000  # ns after which a call for which nobody was found yet is looked at again
_HEDGES_KEPT = 1000  # calls that have ended and whose time for a hedge has not come are forgotten beyond so many
_SMALL = 4096  # bytes up to which a request is not counted: max_pending of them are 40 MB

MAIL = struct.Struct("=QqqQIIiBB2x")  # struct mprpc_mail
assert MAIL.size == ffi.sizeof("struct mprpc_mail")

# token, outcome, reason, offset, text_size, details_size, status, not_run, sent
Mail = tuple[int, int, int, int, int, int, int, int, int]


_mutex = threading.RLock()  # of the states of all CallFutures; as_completed() takes it once for each of its own


if TYPE_CHECKING:

    class _Pending:  # of _future.c
        _call: UnaryCall[Any, Any]
        _controller: MprpcController | None
        _state: str
        _result: Any
        _exception: BaseException | None
        _waiters: list[Any]
        _done_callbacks: list[Any]
        _payload: bytes  # until it has ended
        _weight: int  # the payload's bytes, as far as they are counted
        _deadline: int
        _endpoint: Subchannel | None
        _old: bool  # the link was an old one: its end says nothing of the endpoint
        _outer: MprpcController | None  # of the handler that it belongs to
        _began: int  # where it may be hedged: when, monotonic ns
        _counted: int  # when it was counted as begun

        def __init__(self, call: UnaryCall[Any, Any], controller: MprpcController | None) -> None: ...

        def _post(self, link: Any, timeout: int, attempt: int) -> int: ...  # its call_id; 0: has ended; or an outcome

        def _withdraw(self) -> None: ...  # what was posted: CANCEL, and no mail ends it

        def _forget(self) -> None: ...  # in a forked child

    class _PlainReader:  # of _future.c
        _queued: dict[int, CallFuture[Any]]
        _paused: dict[int, CallFuture[Any]]
        _thread: threading.Thread | None
        _pending: list[CallFuture[Any]]  # that a mail is to end
        _flying: int  # how many they are

        def __init__(self, box: int, kind: type[CallFuture[Any]], mutex: threading.RLock) -> None: ...

        def _receive(self, patience: int) -> bool | None: ...  # waits, ns; whether futures have ended; None: forked

else:
    _Pending, _PlainReader = native.Pending, native.Reader


class CallFuture(_Pending, Future[Response], Generic[Response]):
    """One call under way: a `concurrent.futures.Future` whose `cancel()` tells the provider as well.

    Its callbacks run on the process's reader thread and must not wait for other futures. Any thread.
    """

    # A condition of its own, as Future.__init__ makes one, costs more than the rest of a call does here. All share this
    # one, nobody waits on it, and what Future's other methods find of a future is as they expect it.
    _condition = threading.Condition(_mutex)
    _token = 0  # its key in _queued or _paused
    _attempts: Attempts[Subchannel] | None = None  # once it is no plain call any more
    _hedge: _Hedge[Any] | None = None  # its second request, while that is under way
    _held: BaseException | None = None  # what the first one came to meanwhile

    def cancel(self) -> bool:
        """Gives the call up: CANCEL to the provider, no answer here. False when it has ended already."""
        with _mutex:
            if self._state != PENDING:
                return self._state != FINISHED
            self._state = CANCELLED_AND_NOTIFIED
            for waiter in self._waiters:
                waiter.add_cancelled(self)
        self._call._ended(self._counted, Status.CANCELLED)
        reader().forget(self)
        self._drop_hedge()
        self._leave()
        if self._controller is not None:
            self._controller._end(self._call._cancelled(not_run=False))
        self._run_callbacks()
        return True

    def _stop(self) -> None:
        """The controller's start_cancel(): to the provider as cancel() is, to who waits here a failed call."""
        if self._resolve(None, self._call._cancelled(not_run=False)):
            reader().forget(self)
            self._run_callbacks()

    if TYPE_CHECKING:

        def result(self, timeout: float | None = None) -> Response:
            """The response. Raises what the call failed with, CancelledError, after `timeout` seconds TimeoutError."""

    def _outcome(self, timeout: float | None = None) -> Response:
        """As result(), which asks this unless there is a response."""
        if self._state == PENDING:
            self._wait(timeout)
        if self._exception is not None:
            try:
                raise self._exception
            finally:
                self = None  # type: ignore[assignment]  # as in Future: the traceback must not hold it
        if self._state != FINISHED:
            raise CancelledError
        response: Response = self._result
        return response

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call failed with, None for a response. Raises CancelledError, or after `timeout` TimeoutError."""
        if self._state == PENDING:
            self._wait(timeout)
        if self._state != FINISHED:
            raise CancelledError
        return self._exception

    def _wait(self, timeout: float | None) -> None:
        waiter = _Waiter()
        with _mutex:
            if self._state != PENDING:
                return
            self._waiters.append(waiter)
        if waiter.lock.acquire(timeout=-1 if timeout is None else min(max(timeout, 0.0), threading.TIMEOUT_MAX)):
            return
        with _mutex:
            self._waiters.remove(waiter)
            if self._state == PENDING:
                raise TimeoutError

    def _end(self, response: Response | None, error: BaseException | None) -> None:
        """Resolves it, unless it has been cancelled."""
        if self._began and not self._ends_with(error):
            return
        self._payload = b""
        if self._outer is not None:
            self._leave()
        if self._weight:
            reader().unload(self)
        if self._resolve(response, error) and self._done_callbacks:
            self._run_callbacks()

    def _resolve(self, response: Response | None, error: BaseException | None) -> bool:
        """Whether it was under way until now."""
        failed = error
        if self._controller is not None and isinstance(error, RpcError):
            response, error = self._call._response_class(), None
        with _mutex:
            if self._state != PENDING:
                return False
            if self._controller is not None:
                self._controller._end(failed if isinstance(failed, RpcError) else None)
            self._result, self._exception, self._state = response, error, FINISHED
            for waiter in self._waiters:
                waiter.add_result(self) if error is None else waiter.add_exception(self)
        status = 0 if failed is None else failed.status if isinstance(failed, RpcError) else Status.CANCELLED
        self._call._ended(self._counted, status)
        return True

    def _ends_with(self, error: BaseException | None) -> bool:
        """Whether its own request's end is the call's, or its hedge may still be answered."""
        hedging = self._call._hedging
        if error is None and hedging is not None:
            hedging.lasted(time.monotonic_ns() - self._began)
        with _mutex:
            hedge = self._hedge
            if hedge is not None and isinstance(error, PASSING):
                self._held = error
                return False
        self._drop_hedge()
        return True

    def _drop_hedge(self) -> None:
        with _mutex:
            hedge, self._hedge = self._hedge, None
        if hedge is not None:
            hedge.drop()

    def _leave(self) -> None:
        if self._outer is not None:
            self._outer._forget_on_cancel(self._stop)
            self._outer = None

    def _disown(self) -> None:
        """In a forked child."""
        self._forget()
        self._weight = 0
        self._done_callbacks = []
        if self._state == PENDING:
            text = f"{self._call._method.full_name}: the call was made before a fork; its answer is the parent's"
            self._exception, self._state = Unavailable(text), FINISHED

    def _run_callbacks(self) -> None:
        try:
            self._invoke_callbacks()  # type: ignore[attr-defined]  # private, but so since the first version
        except BaseException:  # SystemExit and such; of Exceptions Future itself makes a line in the log
            _log.exception("a callback of a future of %s failed", self._call._method.full_name)


# What another provider may still turn out well.
PASSING = (Unavailable, DeadlineExceeded, ResourceExhausted)


class _Hedge(CallFuture[Response]):
    """The second request of a call: the future of nobody, whose response ends its first one's."""

    def __init__(self, first: CallFuture[Response], attempts: Attempts[Subchannel]) -> None:
        super().__init__(first._call, None)
        self._first = first
        self._payload, self._deadline, self._attempts = first._payload, first._deadline, attempts
        self._sent = time.monotonic_ns()

    def _end(self, response: Response | None, error: BaseException | None) -> None:
        first, hedging = self._first, self._call._hedging
        with _mutex:
            if self._state != PENDING:
                return
            self._state = FINISHED
            self._payload = b""
            held, first._held = first._held, None
            if first._hedge is self:
                first._hedge = None
        now = time.monotonic_ns()
        if error is None or not isinstance(error, PASSING):
            if hedging is not None and error is None:
                hedging.lasted(now - self._sent)
                hedging.lasted(now - first._began)  # the first one's, or more
            reader().forget(first)
            first._began = 0
            if first._controller is not None and self._endpoint is not None:
                first._controller._peer = self._endpoint.address
            first._end(response, error)
        elif held is not None:
            first._end(None, held)

    def drop(self) -> None:
        """The first request was answered: CANCEL to the provider."""
        with _mutex:
            if self._state != PENDING:
                return
            self._state = CANCELLED_AND_NOTIFIED
        reader().forget(self)


class _Waiter:
    """One thread in result(); concurrent.futures has others for wait() and as_completed()."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()

    def add_result(self, future: object) -> None:
        self.lock.release()

    add_exception = add_cancelled = add_result


class Mailbox:
    """A struct mprpc_mailbox. Raises ResourceExhausted when there is no descriptor for it."""

    def __init__(self) -> None:
        box = lib.mprpc_mailbox_new()
        if box == ffi.NULL:
            raise ResourceExhausted(f"no mailbox can be made: {os.strerror(ffi.errno)}", not_run=True)
        self.handle = ffi.gc(box, lib.mprpc_mailbox_free)
        self._mail, self._data = ffi.new("struct mprpc_mail **"), ffi.new("uint8_t **")
        self._size = ffi.new("size_t *")

    def take(self) -> tuple[bytes, bytes]:
        """The mail that is there, as records of MAIL, and the bytes that their offsets point into. One thread."""
        records = lib.mprpc_mailbox_take(self.handle, self._mail, self._data, self._size)
        if not records:
            return b"", b""
        mail = bytes(ffi.buffer(self._mail[0], records * MAIL.size))
        return mail, bytes(ffi.buffer(self._data[0], self._size[0])) if self._size[0] else b""


class _Reader(_PlainReader):
    """The calls in flight of this process, and the threads that see to them."""

    def __init__(self) -> None:
        self._box = Mailbox()
        self._queued = {}  # for a lane, in order
        self._paused = {}  # until their next attempt
        self._later: list[tuple[int, int]] = []  # when, and which token: a heap, under the lock
        self._hedged: list[tuple[int, int, CallFuture[Any]]] = []  # when a call's hedge is due: the same
        self._due = _FOREVER  # no queued call's deadline is before, monotonic ns
        self._tokens = count(1)
        self._lock = threading.Lock()  # of what follows
        self._room = threading.Condition(self._lock)
        self._waiting = 0
        self._bytes = 0  # of requests in flight that are not small
        self._thread = None
        self._work = threading.Condition(self._lock)  # something is queued
        self._lanes = self._idle_lanes = 0
        self.threads: set[int] = set()  # ours, which must wait neither for room nor for futures: they make it
        self._carried: set[CallFuture[Any]] = set()  # each on a lane
        super().__init__(int(ffi.cast("uintptr_t", self._box.handle)), CallFuture, _mutex)  # C may call from now on

    # ---- any thread ----

    def start(self, future: CallFuture[Any], timeout: int) -> None:
        """Submits the call, or queues it. Raises ResourceExhausted when there is no room before its deadline."""
        call, size = future._call, len(future._payload)
        call._calls += 1
        if size > _SMALL or self._in_flight() >= call._channel._config.max_pending:
            self._wait_for_room(future, size)
            timeout = max(0, future._deadline - time.monotonic_ns())
        endpoint = future._endpoint = call._target.next()
        if endpoint is not None and not endpoint.classic:
            if future._controller is not None:
                future._controller._peer = endpoint.address
            link = endpoint.link
            if link is not None and not call._hurries:
                future._old = True
                problem = self._submit(future, endpoint, link, timeout, 0)
                if problem is not None:
                    self._retry(future, problem)
                return
        self._queue(future)

    def _in_flight(self) -> int:
        return self._flying + len(self._queued) + len(self._paused)

    def _submit(
        self, future: CallFuture[Any], endpoint: Subchannel, link: Any, timeout: int, attempt: int
    ) -> RpcError | None:
        """Gives the call to a connection. None, or why that does not take it."""
        identity = future._post(link, timeout, attempt)
        if identity < 0:
            return self._why_not(future, endpoint, link, identity)
        if self._thread is None:
            self._start_thread()
        if future.done():
            self.forget(future)  # cancelled before it was posted
        return None

    def _why_not(self, future: CallFuture[Any], endpoint: Subchannel, link: Any, outcome: int) -> RpcError:
        return future._call._broken(endpoint, link, outcome, lib.mprpc_link_check(link.handle), 0)

    def forget(self, future: CallFuture[Any]) -> None:
        """A cancelled call ends as no mail."""
        future._withdraw()
        self._queued.pop(future._token, None)
        self._paused.pop(future._token, None)
        if not self._in_flight():
            lib.mprpc_mailbox_wake(self._box.handle)  # the thread has nothing to wait for any more
        if future._weight:
            self.unload(future)
        self._tell_room()

    def unload(self, future: CallFuture[Any]) -> None:
        """Its bytes count no more."""
        with self._lock:
            self._bytes -= future._weight
            future._weight = 0

    def _tell_room(self) -> None:
        if self._waiting:
            with self._lock:
                self._room.notify_all()

    def _wait_for_room(self, future: CallFuture[Any], size: int) -> None:
        config = future._call._channel._config
        weight = size if size > _SMALL else 0
        with self._lock:
            self._waiting += 1
            try:
                while not self._has_room(config, weight):
                    left = (future._deadline - time.monotonic_ns()) / _NS
                    if left <= 0 or threading.get_ident() in self.threads or not self._room.wait(left):
                        raise self._full(config)
                future._weight = weight
                self._bytes += weight
            finally:
                self._waiting -= 1

    def _has_room(self, config: MprpcConfig, weight: int) -> bool:
        fits = not weight or not self._bytes or self._bytes + weight <= config.max_payload
        return fits and self._in_flight() < config.max_pending

    def _full(self, config: MprpcConfig) -> ResourceExhausted:
        text = f"max_pending={config.max_pending} calls are in flight"
        if self._in_flight() < config.max_pending:
            text = f"requests with max_payload={config.max_payload} bytes together are in flight"
        return ResourceExhausted(text, not_run=True)

    # ---- the reader's thread ----

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None and self._in_flight():
                thread = threading.Thread(target=self._run, name="mprpc-reader", daemon=True)
                thread.start()  # or raises, and the next call tries again
                self._thread = thread

    def _run(self) -> None:
        self.threads.add(threading.get_ident())
        while (arrived := self._receive(self._patience())) is not None:
            if arrived:
                self._tell_room()
            if self._due != _FOREVER and time.monotonic_ns() >= self._due:
                self._expire_queued()
            if self._later:
                self._resume()
            if self._hedged:
                self._send_hedges()
            if not arrived and not self._in_flight() and self._ends():
                break
        self.threads.discard(threading.get_ident())

    def _patience(self) -> int:
        until = self._due if self._queued else _FOREVER
        if self._later or self._hedged:
            with self._lock:
                for heap in (self._later, self._hedged):
                    until = min(until, heap[0][0]) if heap else until
        if until != _FOREVER:
            return max(0, until - time.monotonic_ns())
        return _FOREVER if self._flying else _LINGER

    def _ends(self) -> bool:
        """First the thread is gone, then it looks again: who has added a call since finds that it needs another."""
        with self._lock:
            thread, self._thread = self._thread, None
            if self._in_flight():
                self._thread = thread
            return self._thread is None

    # ---- what C asks for ----

    def _begin(self, future: CallFuture[Any], timeout: int) -> None:
        """A plain call for which there may be no room."""
        try:
            self.start(future, timeout)
        except BaseException as error:  # Ctrl-C, too
            future._end(None, error)
            raise

    def _started(self, future: CallFuture[Any]) -> None:
        """A future was posted, and nobody reads."""
        self._start_thread()

    def _refused(self, future: CallFuture[Any], how: tuple[Any, int]) -> None:
        """The connection did not take it."""
        endpoint = future._endpoint
        assert endpoint is not None
        self._retry(future, self._why_not(future, endpoint, *how))

    def _failed(self, future: CallFuture[Any], link: Any, mail: Mail, words: bytes) -> None:
        endpoint = future._endpoint
        assert endpoint is not None
        self._retry(future, future._call._mail_error(endpoint, link, mail, words))

    def _misread(self, future: CallFuture[Any], data: bytes) -> None:
        """A response that C could not have parsed."""
        try:
            response = future._call._parsed(data)
        except Exception as error:
            future._end(None, error)
        else:
            future._end(response, None)

    # ---- attempts ----

    def _retry(self, future: CallFuture[Any], problem: RpcError) -> None:
        """Any thread: its last attempt has failed so."""
        pause = self._after(future, problem)
        if pause is None:
            future._end(None, future._attempts.problem if future._attempts is not None else problem)
        elif pause:
            self._pause(future, pause)
        else:
            self._queue(future)

    def _after(self, future: CallFuture[Any], problem: RpcError) -> int | None:
        attempts = self._attempts(future)
        if future.done():
            return None
        return future._call._after(attempts, future._endpoint, problem, old=future._old)

    def _attempts(self, future: CallFuture[Any]) -> Attempts[Subchannel]:
        if future._attempts is None:
            outer = future._outer
            settled = outer is not None and outer.attempt > 0
            future._attempts = future._call._attempts(future._deadline, settled=settled)
        return future._attempts

    def _pause(self, future: CallFuture[Any], pause: int) -> None:
        """Any thread: its next attempt comes later. The reader's thread sees to that."""
        token = future._token = next(self._tokens)
        with self._lock:
            self._paused[token] = future
            heapq.heappush(self._later, (time.monotonic_ns() + pause, token))
            first = self._later[0][1] == token
        if first:
            lib.mprpc_mailbox_wake(self._box.handle)
        if self._thread is None:
            self._start_thread()
        if future.done():
            self.forget(future)  # cancelled before it paused

    def _resume(self) -> None:
        now, due = time.monotonic_ns(), []
        with self._lock:
            while self._later and self._later[0][0] <= now:
                due.append(heapq.heappop(self._later)[1])
        for token in due:
            future = self._paused.pop(token, None)
            if future is not None:
                self._queue(future)

    def hedge_later(self, future: CallFuture[Any], delay: int) -> None:
        """The future has been started."""
        with self._lock:
            if len(self._hedged) > 2 * self._in_flight() + _HEDGES_KEPT:
                self._hedged = [each for each in self._hedged if not each[2].done()]
                heapq.heapify(self._hedged)
            entry = future._began + delay, next(self._tokens), future
            heapq.heappush(self._hedged, entry)
            first = self._hedged[0] is entry
        if first:
            lib.mprpc_mailbox_wake(self._box.handle)

    def _send_hedges(self) -> None:
        now, due = time.monotonic_ns(), []
        with self._lock:
            while self._hedged and self._hedged[0][0] <= now:
                due.append(heapq.heappop(self._hedged)[2])
        for future in due:
            call, endpoint = future._call, future._endpoint
            if future.done() or call._hedging is None:
                continue
            if endpoint is None:
                self.hedge_later(future, now - future._began + _FOUND)
                continue
            if any(each is not endpoint for each in call._target.known()) and call._hedging.take(now):
                hedge = _Hedge(future, self._attempts(future).hedge(endpoint))
                with _mutex:
                    future._hedge = None if future.done() else hedge
                if future._hedge is hedge:
                    self._queue(hedge)

    def _expire_queued(self) -> None:
        """Ends what no lane had time for; _due is a bound, so most rounds have nothing to look for."""
        now, self._due = time.monotonic_ns(), _FOREVER
        for token, future in list(self._queued.items()):
            if future._deadline > now:
                self._due = min(self._due, future._deadline)
            elif self._queued.pop(token, None) is not None:
                name, attempts = future._call._method.full_name, future._attempts
                not_run = attempts is None or attempts.number == 0  # else an earlier attempt may have
                future._end(None, Unavailable(f"{name}: no connection within the call's deadline", not_run=not_run))
        self._tell_room()

    # ---- the lanes ----

    def _queue(self, future: CallFuture[Any]) -> None:
        token = future._token = next(self._tokens)
        with self._lock:
            first = not self._queued
            self._queued[token] = future
            if self._idle_lanes:
                self._work.notify()
            elif self._lanes < _LANES:
                self._start_lane()
        self._due = min(self._due, future._deadline)
        if first or self._due == future._deadline:
            lib.mprpc_mailbox_wake(self._box.handle)
        if self._thread is None:
            self._start_thread()
        if future.done():
            self.forget(future)  # cancelled before it was queued

    def _start_lane(self) -> None:
        """With the lock."""
        try:
            threading.Thread(target=self._lane, name="mprpc-lane", daemon=True).start()
        except RuntimeError as error:  # the call waits for another one, to its deadline; the next call tries again
            _log.error("no thread can be started for calls that have to connect: %s", error)
        else:
            self._lanes += 1

    def _lane(self) -> None:
        self.threads.add(threading.get_ident())
        while (future := self._next_queued()) is not None:
            self._carried.add(future)
            try:
                error = self._go_on(future)
            except BaseException as raised:
                error = raised
            self._carried.discard(future)
            if error is not None:
                future._end(None, error)
            if not self._in_flight():
                lib.mprpc_mailbox_wake(self._box.handle)  # it would wait until the deadline of what was queued
        self.threads.discard(threading.get_ident())

    def _next_queued(self) -> CallFuture[Any] | None:
        """Waits a little for a queued call; None ends the lane."""
        with self._lock:
            self._idle_lanes += 1
            if not self._queued:
                self._work.wait(_LINGER / _NS)
            self._idle_lanes -= 1
            for token in self._queued:
                return self._queued.pop(token)
            self._lanes -= 1
            return None

    def _go_on(self, future: CallFuture[Any]) -> BaseException | None:
        """Offers the call to one endpoint after the other, until one has taken it; else why none has."""
        call, attempts = future._call, self._attempts(future)
        first, future._endpoint = (None if attempts.problem else future._endpoint), None
        while not future.done():
            endpoint = future._endpoint = attempts.next(call._target.all(future._deadline, first))
            first = None
            try:
                problem = self._offer(future, endpoint, attempts)
            except RpcError as error:
                problem = error
            if problem is None:
                return None
            pause = self._after(future, problem)
            if pause is None:
                return attempts.problem
            if pause:
                self._pause(future, pause)
                return None
        return None

    def _offer(
        self, future: CallFuture[Any], endpoint: Subchannel | None, attempts: Attempts[Subchannel]
    ) -> RpcError | None:
        call, future._old = future._call, False
        if endpoint is None:
            return call._nobody(attempts)
        if future._controller is not None:
            future._controller._peer = endpoint.address
        if endpoint.classic:
            now = time.monotonic_ns()
            future._end(call._call_classic(endpoint, future._payload, now + attempts.timeout(now)), None)
            return None
        link = endpoint.link
        future._old = link is not None
        if link is None:
            link = endpoint.connect(future._deadline)
        left = attempts.timeout(time.monotonic_ns())
        if left <= 0:
            return call._out_of_time()
        return self._submit(future, endpoint, link, left, attempts.number)


def start_future(
    call: UnaryCall[Any, Response], request: Message, timeout: float | None, controller: MprpcController | None
) -> CallFuture[Response]:
    """What `UnaryCall.future` does."""
    if type(request) is not call._request_class:
        raise call._wrong_request(request)
    future: CallFuture[Response] = CallFuture(call, controller)
    future._counted = call._begun()
    if controller is not None:
        timeout = controller._begin(future._stop, timeout)
        if future.done():
            return future
    outer = context.handled()
    try:
        if outer is not None:
            timeout = context.left(outer, call._channel._timeout if timeout is None else timeout)
        future._payload, nanoseconds = call._prepare(request, timeout)
        future._deadline = time.monotonic_ns() + nanoseconds
        call._check_size(future._payload)
        if outer is not None:
            outer._keep()
            future._outer = outer
            outer.notify_on_cancel(future._stop)
    except RpcError as error:
        future._end(None, error)
        return future
    if future.done():  # the handler's call has just been cancelled
        return future
    try:
        _start(future, nanoseconds)
    except ResourceExhausted as error:
        future._end(None, error)
        if controller is None:
            raise
    except RpcError as error:
        future._end(None, error)
    except BaseException as error:  # Ctrl-C
        future._end(None, error)
        raise
    return future


def _start(future: CallFuture[Any], nanoseconds: int) -> None:
    mine, hedging = _reader or reader(), future._call._hedging
    delay = None
    if hedging is not None and not (future._outer is not None and future._outer.attempt > 0):
        future._began = time.monotonic_ns()
        delay = hedging.delay()
    mine.start(future, nanoseconds)
    if delay is not None and not future.done():
        mine.hedge_later(future, delay)


_reader: _Reader | None = None
_reader_lock = threading.Lock()


def reader() -> _Reader:
    """The one of this process."""
    global _reader
    if _reader is None:
        with _reader_lock:
            _reader = _reader or _Reader()
    return _reader


def _after_fork() -> None:
    """The parent's calls are the parent's: here they have failed, so that nobody waits for them, without a callback."""
    global _reader, _reader_lock, _mutex
    _mutex = threading.RLock()
    CallFuture._condition = threading.Condition(_mutex)
    if _reader is not None:
        for future in (*_reader._pending, *_reader._queued.values(), *_reader._paused.values(), *_reader._carried):
            future._disown()
    _reader, _reader_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
