"""The embedded server: the keeper behind a listening socket, on one thread of its own.

One loop waits for sockets and for the next session to run out, gives whole packets to the keeper, and afterwards
sends what became ready, so that any number of pipelined requests costs one system call to read and one to answer.
Whatever a client does wrong ends that client's connection, with one line in the log that says why. Public methods
may be called from any thread; everything else runs on the server's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

from . import commands
from .clock import Clock
from .commands import Traffic
from .faults import Faults
from .keeper import Keeper, Limits, Peer
from .protocol import MalformedError

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("mprpc.zookeeper")

DEFAULT_PORT = 2181
READ_BYTES = 256 << 10
ACCEPTS_A_TURN = 64
"""So that a flood of connections does not keep the established ones waiting."""

_LENGTH_BYTES = 4
_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

T = TypeVar("T")


class Connection(Peer):
    """A peer and its socket: `received` is what came and is not yet taken apart, `unwritten` what did not fit."""

    def __init__(self, sock: socket.socket, address: tuple[str, int], deadline: float) -> None:
        super().__init__(address[0].removeprefix("::ffff:"))
        self.sock = sock
        self.name = f"{address[0]}:{address[1]}"
        self.received = bytearray()
        self.unwritten = bytearray()
        self.interest = 0
        self.deadline = deadline
        """When it ends if it still has no session by then, or if its last words are still unread."""
        self.greeted = False
        self.closed = False


class _Task(Generic[T]):
    """A function on its way to the server's thread, and its result on the way back."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: T | None = None
        self._error: Exception | None = None
        self._done = threading.Event()

    def run(self) -> None:
        try:
            self._result = self._function()
        except Exception as error:  # whatever it is, it belongs to the thread that waits
            self._error = error

    def release(self) -> None:
        self._done.set()

    def wait(self) -> T:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # run() has set it


class EmbeddedZooKeeperServer:
    """A ZooKeeper for one machine and for tests, in memory; kazoo and the C client talk to it unchanged.

    `host` is loopback unless told otherwise, `port` 0 takes a free one. `tick_ms` sets the range that session
    timeouts are negotiated in, 2 to 20 ticks, as tickTime does. `clock` and `limits` are for tests.

        with EmbeddedZooKeeperServer(port=0) as server:
            client = KazooClient(server.address)
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        *,
        tick_ms: int = 2000,
        clock: Clock | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._tick_ms = tick_ms
        self._clock = clock or Clock()
        self._limits = limits or Limits()
        self._keeper = self._new_keeper()
        self._faults = Faults()
        self._traffic = Traffic()
        self._connections: dict[Connection, None] = {}
        self._on_probation: dict[Connection, None] = {}
        self._unflushed: dict[Connection, None] = {}
        self._lock = threading.Lock()
        self._tasks: list[_Task[object]] = []
        self._thread: threading.Thread | None = None
        self._stopping = False
        _servers.add(self)

    @property
    def host(self) -> str:
        return self._host

    @property
    def port(self) -> int:
        """The port, after `start` the one really taken."""
        return self._port

    @property
    def address(self) -> str:
        """`host:port`, as KazooClient takes it."""
        return f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"

    @property
    def running(self) -> bool:
        return self._thread is not None

    def start(self) -> None:
        """Listens, and serves from a daemon thread; started again, on the same port and with the data it had.

        Raises OSError when the address can't be listened at (errno.EADDRINUSE: something does already).
        """
        if self._thread is not None:
            raise RuntimeError("the server is running")
        self._listener = _listen(self._host, self._port)
        self._port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._wake_end, self._waking_end = socket.socketpair()
        for sock in (self._wake_end, self._waking_end):
            sock.setblocking(False)
        self._selector.register(self._listener, _READ, self._accept)
        self._selector.register(self._wake_end, _READ, self._drain_wakeups)
        self._keeper.sessions.hear_of_all()
        self._traffic = Traffic(started=self._clock.monotonic())
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mprpc-zookeeper", daemon=True)
        self._thread.start()
        logger.info("embedded ZooKeeper at %s: in memory, for development and tests only", self.address)

    def forget_forked(self) -> None:
        """In a forked child: port and connections are the parent's, and must not stay open for its sake."""
        if self._thread is None:
            return
        self._thread = None
        for sock in (self._listener, self._wake_end, self._waking_end, *(each.sock for each in self._connections)):
            sock.close()
        self._selector.close()
        os.close(self._spare)

    def stop(self) -> None:
        """Closes every connection and the port, and waits for the thread. The data stays, for the next `start`."""
        thread = self._thread
        if thread is None:
            return
        with self._lock:
            self._stopping = True
            self._wake()
        thread.join()
        self._thread = None

    def wipe(self) -> None:
        """Forgets all data and sessions, zxid included; the server must be stopped.

        A client that saw the old zxid is turned away until the new one has passed it: ZooKeeper's own rule.
        """
        if self._thread is not None:
            raise RuntimeError("the server is running")
        self._keeper = self._new_keeper()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _new_keeper(self) -> Keeper:
        return Keeper(self._clock, self._limits, self._tick_ms)

    def _call(self, function: Callable[[], T]) -> T:
        """Runs a function on the server's thread and waits until what it caused has been sent."""
        task = _Task(function)
        with self._lock:
            serving = self._thread is not None and not self._stopping
            if serving:
                self._tasks.append(task)  # type: ignore[arg-type]  # a task of T is one of object
                self._wake()
        if not serving:
            return function()
        return task.wait()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes up anyway; closed: it has ended
            self._waking_end.send(b"\0")

    def _drain_wakeups(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_end.recv(4096)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        except Exception:
            logger.exception("the embedded ZooKeeper at %s failed", self.address)
        finally:
            self._shut_down()

    def _turn(self) -> None:
        """One round of the loop."""
        for key, mask in self._selector.select(self._clock.wait(self._next_deadline())):
            key.data(mask)
        with self._lock:
            tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.run()
        for session_id in self._keeper.expire_due():
            logger.info("session %#x expired", session_id)
        self._end_overdue()
        self._flush()
        for task in tasks:
            task.release()

    def _next_deadline(self) -> float:
        deadline = self._keeper.sessions.next_look
        # All deadlines are the same time after their beginning, so the first that was noted is the next to come.
        first = next(iter(self._on_probation), None)
        return deadline if first is None else min(deadline, first.deadline)

    def _shut_down(self) -> None:
        with self._lock:
            self._stopping = True
            tasks, self._tasks = self._tasks, []
        for connection in list(self._connections):
            self._close(connection, "the server stops")
        self._selector.close()
        for sock in (self._listener, self._wake_end, self._waking_end):
            sock.close()
        os.close(self._spare)
        for task in tasks:
            task.run()
            task.release()

    def _accept(self, _mask: int) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._accept_failed(error)
                return
            self._admit(sock, address)

    def _accept_failed(self, error: OSError) -> None:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            logger.warning("accept failed: %s", error)
            return
        # Without a descriptor the connection can't even be closed and would wake the loop for ever: the spare one
        # is given up for a moment to take it and turn it away.
        logger.warning("out of file descriptors: a connection is turned away")
        os.close(self._spare)
        with contextlib.suppress(OSError):
            self._listener.accept()[0].close()
        self._spare = os.open(os.devnull, os.O_RDONLY)

    def _admit(self, sock: socket.socket, address: tuple[str, int]) -> None:
        if self._faults.connections_refused or len(self._connections) >= self._limits.connections:
            logger.warning("%s:%s turned away: %d connections", address[0], address[1], len(self._connections))
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = Connection(sock, address, 0.0)
        self._connections[connection] = None
        self._traffic.connections = len(self._connections)
        self._put_on_probation(connection)
        self._watch(connection)

    def _put_on_probation(self, connection: Connection) -> None:
        self._on_probation.pop(connection, None)
        connection.deadline = self._clock.monotonic() + self._limits.handshake_seconds
        self._on_probation[connection] = None

    def _end_overdue(self) -> None:
        now = self._clock.monotonic()
        for connection in [each for each in self._on_probation if each.deadline <= now]:
            self._close(connection, connection.ending or "no session was opened in time", at_fault=True)

    def _watch(self, connection: Connection) -> None:
        """Waits for what the connection is in a state to do."""
        if connection.closed:
            return
        interest = 0
        if not self._faults.stalled:
            paused = connection.unsent > self._limits.pause_bytes or connection.ending is not None
            interest = (0 if paused else _READ) | (_WRITE if connection.unwritten else 0)
        if interest == connection.interest:
            return
        if not connection.interest:
            self._selector.register(connection.sock, interest, lambda mask: self._on_socket(connection, mask))
        elif not interest:
            self._selector.unregister(connection.sock)
        else:
            key = self._selector.get_key(connection.sock)
            self._selector.modify(connection.sock, interest, key.data)
        connection.interest = interest

    def _on_socket(self, connection: Connection, mask: int) -> None:
        if connection.closed:  # by something earlier in this turn
            return
        if mask & _WRITE:
            self._unflushed[connection] = None
        if mask & _READ and self._receive(connection):
            self._take_packets(connection)
        self._watch(connection)

    def _receive(self, connection: Connection) -> bool:
        try:
            data = connection.sock.recv(READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._close(connection, f"the connection broke: {error}")
            return False
        if not data:
            inside = " in the middle of a packet" if connection.received else ""
            self._close(connection, f"the client hung up{inside}", at_fault=bool(inside))
            return False
        connection.received += data
        return True

    def _take_packets(self, connection: Connection) -> None:
        """Hands whole packets on, until one is incomplete or the client has enough unread answers to go on with."""
        received, at = connection.received, 0
        try:
            while connection.ending is None and connection.unsent <= self._limits.pause_bytes:
                size = self._packet_size(connection, at)
                if size is None or len(received) - at < _LENGTH_BYTES + size:
                    break
                packet = bytes(received[at + _LENGTH_BYTES : at + _LENGTH_BYTES + size])
                at += _LENGTH_BYTES + size
                self._traffic.received += 1
                self._take_packet(connection, packet)
                if connection.closed:
                    return
        except MalformedError as error:
            self._end(connection, str(error))
        except Exception:
            logger.exception("%s: a request failed in the server", connection.name)
            self._end(connection, "a request failed in the server")
        del received[:at]

    def _packet_size(self, connection: Connection, at: int) -> int | None:
        """The length of the packet at `at`, None until it is there; a four-letter word is answered right here."""
        head = bytes(connection.received[at : at + _LENGTH_BYTES])
        if len(head) < _LENGTH_BYTES:
            return None
        if not connection.greeted:
            text = commands.respond(head, self._keeper, self._traffic)
            if text is not None:
                self._keeper.send(connection, text)
                self._end(connection, "the command is answered", at_fault=False)
                return None
        size = int.from_bytes(head, "big")
        if size > self._limits.packet_bytes:
            raise MalformedError(f"a packet of {size} bytes, {self._limits.packet_bytes} are allowed")
        return size

    def _take_packet(self, connection: Connection, packet: bytes) -> None:
        if not connection.greeted:
            connection.greeted = True
            self._keeper.connect(connection, packet)
            if connection.session is not None:
                del self._on_probation[connection]
            return
        fault = self._faults.take(packet)
        if fault is None:
            self._keeper.request(connection, packet)
        elif fault.code is not None:
            self._keeper.refuse(connection, packet, fault.code)
        else:
            self._keeper.request(connection, packet)
            self._close(connection, "its answer is lost, as ordered")

    def _end(self, connection: Connection, reason: str, *, at_fault: bool = True) -> None:
        connection.end(reason, at_fault=at_fault)
        self._unflushed[connection] = None

    def _flush(self) -> None:
        """Sends what is ready. More may become ready by it: a reader that caught up is read from again."""
        while True:
            for peer in self._keeper.take_ready():
                assert isinstance(peer, Connection)
                self._unflushed[peer] = None
            if not self._unflushed or self._faults.stalled or self._faults.answers_held:
                self._drop_the_unreading()
                return
            batch, self._unflushed = self._unflushed, {}
            for connection in batch:
                if not connection.closed:
                    self._flush_one(connection)

    def _flush_one(self, connection: Connection) -> None:
        if not self._send(connection):
            return
        paused = connection.unsent > self._limits.pause_bytes
        if connection.unsent > self._limits.unsent_bytes:
            self._close(connection, f"the client leaves {connection.unsent} bytes unread", at_fault=True)
        elif connection.ending is not None and not connection.unsent:
            self._close(connection, connection.ending, at_fault=connection.at_fault)
        else:
            if connection.ending is not None and connection not in self._on_probation:
                self._put_on_probation(connection)
            if len(connection.received) >= _LENGTH_BYTES and not paused:
                self._take_packets(connection)
            self._watch(connection)

    def _drop_the_unreading(self) -> None:
        """While answers are held they pile up as for a client that does not read, and end at the same limit."""
        for connection in list(self._unflushed):
            if connection.unsent > self._limits.unsent_bytes and not connection.closed:
                self._close(connection, f"{connection.unsent} bytes are unread", at_fault=True)

    def _send(self, connection: Connection) -> bool:
        """Writes what the socket takes; False when the connection broke."""
        if connection.outbox:
            self._traffic.sent += len(connection.outbox)
            connection.unwritten += b"".join(connection.outbox)
            connection.outbox.clear()
        if connection.unwritten:
            try:
                sent = connection.sock.send(connection.unwritten)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._close(connection, f"the connection broke: {error}")
                return False
            del connection.unwritten[:sent]
        connection.unsent = len(connection.unwritten)
        return True

    def _close(self, connection: Connection, reason: str, *, at_fault: bool = False) -> None:
        # Said first: whoever sees the connection end can rely on the log.
        session = f"session {connection.session.id:#x}" if connection.session is not None else "no session"
        level = logging.WARNING if at_fault else logging.DEBUG
        logger.log(level, "%s (%s) closed: %s", connection.name, session, reason)
        connection.closed = True
        del self._connections[connection]
        self._on_probation.pop(connection, None)
        self._unflushed.pop(connection, None)
        self._traffic.connections = len(self._connections)
        if connection.interest:
            self._selector.unregister(connection.sock)
        connection.sock.close()
        self._keeper.disconnect(connection)


def _listen(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


_servers: weakref.WeakSet[EmbeddedZooKeeperServer] = weakref.WeakSet()


def _after_fork() -> None:
    for server in list(_servers):
        server.forget_forked()


os.register_at_fork(after_in_child=_after_fork)
