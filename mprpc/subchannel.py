"""A subchannel: one endpoint's address and the kept-alive connection to it.

It connects when first asked and again when the connection has ended; several calls that need it at the same time share
one attempt. One that could not be reached rests, longer each time, and others go first meanwhile.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from mprpc._native import ffi, lib
from mprpc.errors import Unavailable
from mprpc.fast import native

if TYPE_CHECKING:
    from mprpc.config import MprpcConfig

__all__ = ["Load", "Subchannel", "channel_closed", "new_link", "split_address"]

_NS = 1_000_000_000
_REST_FIRST, _REST_LONGEST = 0.1, 30.0  # seconds that an endpoint rests that could not be reached, doubling


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
        self.mailed: Any = None  # the link that takes futures
        self.measure: Any = _new_measure()  # a struct mprpc_load, which links to this endpoint are given
        self.link: Any = (
            None  # a native.Link, read without the lock, by C too: a link that ended says so when it is used
        )
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
        try:
            link = self._link(deadline)
        except Unavailable:
            self._failed_at = time.monotonic()
            lib.mprpc_load_fail(self.measure, time.monotonic_ns())
            self.rest()
            raise
        self.reached()
        lib.mprpc_link_measure(link, self.measure)
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
                self.link = self.mailed = None

    def forget_forked(self) -> None:
        """In a forked child: freeing the link closes its descriptor and sends nothing."""
        self._lock = threading.Lock()
        self.link = self.mailed = None
        self.measure = _new_measure()  # the parent's calls end there

    def close(self) -> None:
        with self._lock:
            self._closed = True
            link, self.link = self.link, None
        if link is not None:
            lib.mprpc_link_close(link.handle)


def new_link(descriptor: int, config: MprpcConfig) -> Any:
    """C's half of a connection, which owns the descriptor from now on; None without memory."""
    link = lib.mprpc_link_new(descriptor, config.max_payload)
    if link == ffi.NULL:
        return None
    keepalive = int(config.keepalive_time * _NS), int(config.keepalive_timeout * _NS)
    lib.mprpc_link_limit(link, *keepalive, config.max_unsent)
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
