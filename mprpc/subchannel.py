"""A subchannel: one endpoint's address and the kept-alive connection to it.

It connects when first asked and again when the connection has ended; several calls that need it at the same time share
one attempt. What calls meet there goes into its health (`outliers.py`): one that can't be used rests, longer each time,
and others get the calls meanwhile. That matters where there are others: who lists it says so with `watch`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakMethod

from mprpc._native import ffi, lib
from mprpc.errors import RpcError, Status, Unavailable
from mprpc.fast import native
from mprpc.outliers import Health

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mprpc.config import MprpcConfig

    Watcher = Callable[["Subchannel", bool], None]

__all__ = ["Load", "Subchannel", "channel_closed", "new_link", "split_address"]

_log = logging.getLogger("mprpc.balancer")

_NS = 1_000_000_000
# Answers that speak against an endpoint which gives them more often than others do: it can't, or its handlers raise.
_FAULTS = frozenset((Status.UNAVAILABLE, Status.INTERNAL))


class Load(NamedTuple):
    """What the calls to one endpoint told of it; over all connections, on all faces. Times are monotonic ns, or 0."""

    in_flight: int
    ended: int
    failed: int  # broken, timed out, UNAVAILABLE, DEADLINE_EXCEEDED, refused as overloaded
    failing: int  # of them, those since the last success
    latency: int  # ns: jumps up to a slow call at once, forgets it over ten seconds; 0: not known
    succeeded_at: int
    failed_at: int


class Subchannel:
    """One address and the connection to it. Any thread."""

    def __init__(self, address: str, classic: bool, config: MprpcConfig) -> None:
        self.address = address
        self.classic = classic
        self.measure: Any = _new_measure()  # a struct mprpc_load, which links to this endpoint are given
        self.link: Any = (
            None  # a native.Link, read without the lock, by C too: a link that ended says so when it is used
        )
        self._config = config
        self._lock = threading.Lock()
        self._closed = False
        self._exchanges: set[socket.socket] = set()  # of calls in the seed's dialect
        self._id = ""
        self._failed_at = float("-inf")
        self._service = ""  # that it is probed for
        self._watcher: WeakMethod[Watcher] | None = None
        self._probed = False  # ever
        self._alone = False
        self._parked: Any = None  # the connection of one that is suspected
        self._judging = threading.Lock()  # of health
        self.health = Health()

    # ---- its health ----

    def listed(self, identity: str, service: str, watcher: Watcher, *, alone: bool = False) -> None:
        """It is in the service's list, under that id. Another one than before is another provider, which need not wait
        for the rest's end. `alone`: nobody else is, so that suspicion is of no use. `watcher`, a bound method that is
        held weakly, is told of what speaks against it, and whether its health has changed; on any thread."""
        if self._watcher is None or self._service != service:
            self._service, self._watcher = service, WeakMethod(watcher)
        self._alone = alone
        if identity != self._id:
            self._id = identity
            with self._judging:
                self.health.forget()
                lib.mprpc_load_forget(self.measure)

    def unreachable(self, why: str) -> None:
        """No connection could be made."""
        lib.mprpc_load_fail(self.measure, time.monotonic_ns())
        self._judge(why, 0)

    def broke(self, why: str) -> None:
        """A connection ended, not in good order, with a call in flight."""
        self._judge(why, 1)

    def outlier(self) -> None:
        """It fails far more often than its peers."""
        self._judge("it fails more often than the others do", 0)

    def silent(self, calls: int = 1) -> None:
        """A call had no answer, or no connection, within its deadline."""
        self._judge("", calls)

    def answered(self, error: RpcError) -> None:
        """A call was answered with that."""
        if error.status in _FAULTS and not error.not_run:
            with self._judging:
                self.health.failures += 1
            self._tell(False)

    def reached(self) -> None:
        """A connection could be made."""
        if self.health.out:
            with self._judging:
                changed = self.health.back(time.monotonic())
                if changed:
                    lib.mprpc_load_forget(self.measure)
            if changed:
                self._tell(True)

    def _judge(self, why: str, calls: int) -> None:
        """It rests, or without a reason is suspected; where it is the only one there is no use in that."""
        if self._watcher is None:
            return
        now = time.monotonic()
        with self._judging:
            self.health.failures += calls
            changed = self.health.rest(now, why) if why else not self._alone and self.health.suspect(now)
            if changed and self.health.suspected:  # it may be a black hole: other calls that come here go elsewhere
                self._parked, self.link = self.link, None
        if changed:
            _log.info("%s of %s %s", self.address, self._service, why or "did not answer: it is probed")
            self._probe_later()
        self._tell(changed)

    def _tell(self, changed: bool) -> None:
        watcher = self._watcher() if self._watcher is not None else None
        if watcher is not None:
            watcher(self, changed)

    def _probe_later(self) -> None:
        from mprpc import timekeeper

        self._probed = True
        timekeeper.at(self.health.rests_until, self._probe)

    def _probe(self) -> None:
        """What is due at the end of a rest. The connection goes, too, if there is no answer: it may be a black hole."""
        now = time.monotonic()
        if self._closed or not self.health.out or now < self.health.rests_until:
            return
        self._judge_probe(self._answers())

    def _judge_probe(self, answered: bool) -> None:
        with self._judging:
            rested = not self.health.suspected
            back = self.health.probed(answered, time.monotonic())
            if back and rested:
                lib.mprpc_load_forget(self.measure)
            if back and self.link is None:
                self.link = self._parked
            self._parked = None
        if not back:
            self.drop(self.link)
            self._probe_later()
        self._tell(True)

    def _answers(self) -> bool:
        deadline = time.monotonic_ns() + int(self._config.connect_timeout * _NS)
        if self.classic or self.address.startswith("memory:"):  # nobody answers a PING there
            try:
                self.socket(deadline).close() if self.classic else self._link(deadline)
            except Unavailable:
                return False
            return True
        from mprpc.probe import probe

        return probe(self.address, self._service, self._config.connect_timeout)

    # ---- its connection ----

    @property
    def load(self) -> Load:
        """As it is now."""
        at = ffi.new("struct mprpc_load_snapshot *")
        lib.mprpc_load_snapshot(self.measure, time.monotonic_ns(), at)
        return Load(at.in_flight, at.ended, at.failed, at.failing, at.latency, at.succeeded_at, at.failed_at)

    def connect(self, deadline: int, since: float | None = None) -> Any:
        """The connection, made if there is none. Raises Unavailable, not_run, also when the deadline passes.

        Another call's attempt that has failed since that time (monotonic; by default now) counts for this one as well.
        """
        since = time.monotonic() if since is None else since
        if not self._lock.acquire(timeout=max(0.0, (deadline - time.monotonic_ns()) / _NS)):
            raise self._unreachable("no connection within the call's deadline")
        try:
            if self._closed:
                raise channel_closed()
            if self.link is None:
                if self._failed_at >= since:
                    raise self._unreachable("another call could not reach it either")
                self.link = self._reach(deadline)
            return self.link
        finally:
            self._lock.release()

    def _reach(self, deadline: int) -> Any:
        measure = self.measure
        lib.mprpc_load_begin(measure)
        try:
            link = self._link(deadline)
        except Unavailable as error:
            self._failed_at = time.monotonic()
            if time.monotonic_ns() < deadline:
                self.unreachable(error.text)
            else:  # which may have been too near
                self.silent(0)
            raise
        finally:
            lib.mprpc_load_leave(measure)
        self.reached()
        lib.mprpc_link_measure(link, measure)
        return native.Link(link, int(ffi.cast("uintptr_t", link)))

    def _link(self, deadline: int) -> Any:
        if self.address.startswith("memory:"):
            from mprpc import memory

            return memory.connect(self.address, self._config.max_payload)
        connection = self.socket(deadline)
        connection.settimeout(None)
        link = new_link(connection.fileno(), self._config)
        if link is None:
            connection.close()
            raise self._unreachable("no memory for a connection")
        connection.detach()
        return link

    @contextmanager
    def exchange(self, deadline: int) -> Iterator[socket.socket]:
        """A connection for one call in the seed's dialect. Raises as connect(), and Unavailable if close() ends it."""
        with self.socket(deadline) as made:
            with self._lock:
                if self._closed:
                    raise channel_closed()
                self._exchanges.add(made)
            try:
                yield made
            finally:
                with self._lock:
                    self._exchanges.discard(made)
            if self._closed:  # then the end of the stream may be ours
                raise Unavailable("the channel was closed meanwhile")

    def socket(self, deadline: int) -> socket.socket:
        """A new connected socket; as connect()."""
        left = (deadline - time.monotonic_ns()) / _NS
        if left <= 0:
            raise self._unreachable("no connection within the call's deadline")
        if self.address.startswith("memory:"):
            raise self._unreachable("a memory address speaks only the framed dialect")
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
                self.link = None

    def forget_forked(self) -> None:
        """In a forked child: freeing the link closes its descriptor and sends nothing."""
        self._lock, self._judging = threading.Lock(), threading.Lock()
        self._exchanges = set()  # what is shut down here would be shut down there
        self.link = None
        self.measure = _new_measure()  # the parent's calls end there
        self.health, self._watcher, self._probed, self._parked = Health(), None, False, None

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links = self.link, self._parked
            self.link = self._parked = None
            for exchange in self._exchanges:
                with suppress(OSError):
                    exchange.shutdown(socket.SHUT_RDWR)
        for link in links:
            if link is not None:
                lib.mprpc_link_close(link.handle)
        if self._probed:
            from mprpc import timekeeper

            timekeeper.forget(self)


def new_link(descriptor: int, config: MprpcConfig) -> Any:
    """C's half of a connection, which owns the descriptor from now on; None without memory."""
    link = lib.mprpc_link_new(descriptor, config.max_payload)
    if link == ffi.NULL:
        return None
    keepalive = int(config.keepalive_time * _NS), int(config.keepalive_timeout * _NS)
    lib.mprpc_link_limit(link, *keepalive, config.max_unsent)
    lib.mprpc_link_spin(link, config.busy_poll_us * 1000)
    return ffi.gc(link, lib.mprpc_link_free)


def split_address(address: str) -> tuple[str, int | None]:
    """Host and port, or path and None. Raises ValueError for what is no address."""
    if address.startswith("unix:") and len(address) > 5:
        return address[5:], None
    if address.startswith("memory:") and len(address) > 7:
        return address, None
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (bare == host and ":" in host) or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is no address: give host:port, [IPv6]:port, unix:/path or memory:name")
    return bare, int(port)


def _new_measure() -> Any:
    load = lib.mprpc_load_new()
    if load == ffi.NULL:
        raise MemoryError
    return ffi.gc(load, lib.mprpc_load_drop)


def channel_closed() -> Unavailable:
    return Unavailable("the channel is closed", not_run=True)


def _connect_or_close(made: socket.socket, address: str) -> None:
    try:
        made.connect(address)
    except OSError:
        made.close()
        raise
