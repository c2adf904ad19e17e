"""Futures: calls that go on while their caller does something else.

`stub.Login.future(request)` gives the request to the connection and returns. While any such call is in flight, one
thread of the process, the reader, reads for all connections (`_mailbox.c`): C ends many calls at a time, and the reader
resolves their futures. The thread ends when nothing is in flight.

A call that can't be submitted at once, because a provider has to be found or connected first, or that must go on to
another provider, is made on one of a few lanes, threads that do just what a blocking caller does.
"""

from __future__ import annotations

import os
import queue
import struct
import threading
import time
from concurrent.futures import Future, InvalidStateError
from itertools import count
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from google.protobuf.message import Message

from mprpc._native import ffi, lib
from mprpc.controller import MprpcController
from mprpc.errors import ResourceExhausted, RpcError

if TYPE_CHECKING:
    from mprpc.channel import UnaryCall, _Endpoint

__all__ = ["MAIL", "CallFuture", "Mail", "start_future"]

Response = TypeVar("Response", bound=Message)

_NS = 1_000_000_000
_FOREVER = 2**64 - 1
_LINGER = 50_000_000  # ns that the reader waits for another call before its thread ends
_LANES = 8  # calls being found or connected at once; more wait in their queue, within max_pending

MAIL = struct.Struct("=QqqQIIiBB2x")  # struct mprpc_mail
assert MAIL.size == ffi.sizeof("struct mprpc_mail")

# token, outcome, reason, offset, text_size, details_size, status, not_run, sent
Mail = tuple[int, int, int, int, int, int, int, int, int]


class CallFuture(Future[Response], Generic[Response]):
    """One call under way: a `concurrent.futures.Future` whose `cancel()` tells the provider as well.

    Its callbacks run on the process's reader thread and must not block. Any thread.
    """

    def __init__(self, call: UnaryCall[Any, Response], controller: MprpcController | None) -> None:
        super().__init__()
        self._call = call
        self._controller = controller
        self._link: Any = None
        self._id = self._token = 0

    def cancel(self) -> bool:
        """Gives the call up: CANCEL to the provider, no answer here. False when it has ended already."""
        if not super().cancel():
            return False
        self.set_running_or_notify_cancel()  # for wait() and as_completed()
        if self._link is not None:
            lib.mprpc_link_cancel(self._link, self._id)
        _reader.forget(self)
        return True

    def _resolve(self, response: Response | None, error: BaseException | None) -> None:
        try:
            if self._controller is not None and isinstance(error, RpcError):
                self._controller._set_error(error)
                self.set_result(self._call._response_class())
            elif error is not None:
                self.set_exception(error)
            else:
                self.set_result(response)  # type: ignore[arg-type]  # one of the two is there
        except InvalidStateError:
            return  # cancelled meanwhile


class _Reader:
    """The calls in flight of this process, and the thread that ends them."""

    def __init__(self) -> None:
        self._box = ffi.gc(lib.mprpc_mailbox_new(), lib.mprpc_mailbox_free)
        self._pending: dict[int, tuple[CallFuture[Any], _Endpoint, Any, bytes, int]] = {}
        self._tokens = count(1)
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._waiting = 0
        self._thread: threading.Thread | None = None
        self._lanes: queue.SimpleQueue[tuple[CallFuture[Any], bytes, int, _Endpoint | None]] = queue.SimpleQueue()
        self._lane_count = self._lane_idle = 0

    # ---- any thread ----

    def start(
        self, future: CallFuture[Any], endpoint: _Endpoint | None, link: Any, payload: bytes, timeout: int
    ) -> None:
        """Submits the call, or has a lane make it. Raises ResourceExhausted when max_pending are in flight."""
        call = future._call
        limit = call._channel._config.max_pending
        deadline = time.monotonic_ns() + timeout
        if len(self._pending) >= limit:
            self._wait_for_room(limit, deadline)
        if link is None or endpoint is None:
            self._make_on_lane(future, payload, deadline, endpoint)
            return
        if endpoint.mailed is not link:
            lib.mprpc_link_attach(link, self._box, False)
            endpoint.mailed = link
        token = future._token = next(self._tokens)
        self._pending[token] = future, endpoint, link, payload, deadline
        reason = ffi.new("int64_t *")
        future._link = link
        identity = lib.mprpc_link_submit(
            link, token, call._names, call._names_size, payload, len(payload), timeout, True, reason
        )
        if identity > 0:
            future._id = identity
            if self._thread is None:
                self._start_thread()
            if future.cancelled():  # before its id was known
                lib.mprpc_link_cancel(link, identity)
            return
        del self._pending[token]
        endpoint.drop(link)
        self._make_on_lane(future, payload, deadline)

    def forget(self, future: CallFuture[Any]) -> None:
        """A cancelled call ends as no mail."""
        self._pending.pop(future._token, None)
        if not self._pending:
            lib.mprpc_mailbox_wake(self._box)  # the thread has nothing to wait for any more
        self._tell_room()

    def _tell_room(self) -> None:
        if self._waiting:
            with self._room:
                self._room.notify_all()

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None and self._pending:
                self._thread = threading.Thread(target=self._run, name="mprpc-reader", daemon=True)
                self._thread.start()

    def _wait_for_room(self, limit: int, deadline: int) -> None:
        full = ResourceExhausted(f"max_pending={limit} calls are in flight", not_run=True)
        if threading.current_thread() is self._thread:
            raise full  # it is the one that makes room
        with self._room:
            self._waiting += 1
            try:
                while len(self._pending) >= limit:
                    left = (deadline - time.monotonic_ns()) / _NS
                    if left <= 0 or not self._room.wait(left):
                        raise full
            finally:
                self._waiting -= 1

    # ---- the reader's thread ----

    def _run(self) -> None:
        box = self._box
        while True:
            if lib.mprpc_mailbox_wait(box, _FOREVER if self._pending else _LINGER):
                self._deliver()
                continue
            with self._lock:
                if not self._pending:
                    self._thread = None
                    return

    def _deliver(self) -> None:
        mail, data = take_mail(self._box)
        for each in MAIL.iter_unpack(mail):
            entry = self._pending.pop(each[0], None)
            if entry is not None:
                self._end(entry, each, data)
        self._tell_room()

    def _end(self, entry: tuple[CallFuture[Any], _Endpoint, Any, bytes, int], mail: Mail, data: bytes) -> None:
        future, endpoint, link, payload, deadline = entry
        call = future._call
        size = mail[1]
        if size >= 0:
            try:
                future._resolve(call._parsed(data[mail[3] : mail[3] + size]), None)
            except RpcError as error:
                future._resolve(None, error)
            return
        problem = call._mail_error(endpoint, link, mail, data)
        if call._may_retry(problem) and time.monotonic_ns() < deadline:
            self._make_on_lane(future, payload, deadline)
        else:
            future._resolve(None, problem)

    # ---- the lanes ----

    def _make_on_lane(
        self, future: CallFuture[Any], payload: bytes, deadline: int, first: _Endpoint | None = None
    ) -> None:
        future._link = None
        with self._lock:
            self._lanes.put((future, payload, deadline, first))
            start = self._lane_idle < self._lanes.qsize() and self._lane_count < _LANES
            self._lane_count += start
        if start:
            threading.Thread(target=self._lane, name="mprpc-lane", daemon=True).start()

    def _lane(self) -> None:
        while True:
            with self._lock:
                self._lane_idle += 1
            try:
                work = self._lanes.get(timeout=_LINGER / _NS)
            except queue.Empty:
                work = None
            with self._lock:
                self._lane_idle -= 1
                if work is None and self._lanes.empty():
                    self._lane_count -= 1
                    return
            if work is not None:
                self._make(*work)

    def _make(self, future: CallFuture[Any], payload: bytes, deadline: int, first: _Endpoint | None) -> None:
        if future.cancelled():
            return
        try:
            future._resolve(future._call._go_round(payload, deadline, future._controller, first), None)
        except BaseException as error:
            future._resolve(None, error)


def take_mail(box: Any) -> tuple[bytes, bytes]:
    """The mail that is there, as records of MAIL, and the bytes that their offsets point into."""
    mail, data, size = ffi.new("struct mprpc_mail **"), ffi.new("uint8_t **"), ffi.new("size_t *")
    records = lib.mprpc_mailbox_take(box, mail, data, size)
    if not records:
        return b"", b""
    return bytes(ffi.buffer(mail[0], records * MAIL.size)), bytes(ffi.buffer(data[0], size[0])) if size[0] else b""


def start_future(
    call: UnaryCall[Any, Response], request: Message, timeout: float | None, controller: MprpcController | None
) -> CallFuture[Response]:
    """What `UnaryCall.future` does."""
    payload, nanoseconds = call._prepare(request, timeout if controller is None or timeout else controller.timeout)
    if controller is not None:
        given = controller.timeout
        controller.reset()
        controller.timeout = given
    future = CallFuture(call, controller)
    endpoint = call._target.next() if len(payload) <= call._max_payload else None
    if endpoint is not None and controller is not None:
        controller._peer = endpoint.address
    _reader.start(future, endpoint, endpoint.link if endpoint is not None else None, payload, nanoseconds)
    return future


_reader = _Reader()


def _after_fork() -> None:
    global _reader
    _reader = _Reader()  # the parent's calls are the parent's


os.register_at_fork(after_in_child=_after_fork)
