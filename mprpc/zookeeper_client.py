"""A KazooClient with bounds: it carries out a reconciler's requests, posts what happens as events, and can be stopped.

Of kazoo only its asynchronous operations, one state listener and one watch callback are used, and these do nothing but
post: a ZooKeeper call inside a listener deadlocks kazoo, and its recipe watchers stop for good when a path is deleted
and made again. Answers are posted in the order of their requests, which kazoo does not keep: it lets a create's pass
through its completion queue twice, so that the answer to a later exists overtakes it. Watch events come by another of
its threads, so that they and answers are in no order.

kazoo's `stop` waits as long as the session's timeout for a server that is silent; so stopping runs on a thread of its
own, and after a grace the connection is cut under it. All of that goes through kazoo's handler, which is its documented
place for such things; the negotiated session timeout, which kazoo keeps to itself, is overheard. It resolves the
servers' names anew before each round of connection attempts. It is imported when a client is made.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from mprpc.desk import (
    Answer,
    Children,
    Connected,
    Create,
    Delete,
    Ended,
    Exists,
    Fired,
    Read,
    Request,
    Stat,
    Suspended,
    Transaction,
)
from mprpc.errors import ConfigError, Unavailable
from mprpc.late import importing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kazoo.handlers.threading import SequentialThreadingHandler as _Threading

    from mprpc.config import MprpcConfig
    from mprpc.desk import Event, Operation
else:
    _Threading = object  # kazoo is imported when a client is made

__all__ = ["CONNECT_TIMEOUT", "RETRY_DELAY", "ZooKeeperClient", "kazoo_options", "load_kazoo", "own_acl"]

CONNECT_TIMEOUT = 1.5
"""Seconds for a TCP connection (and TLS) to one server. kazoo would wait for the session's timeout, for which the next
server of the list can't wait."""

RETRY_DELAY = 0.5
"""Seconds, at most, between two rounds of connection attempts: what an outage lasts longer for us."""

CLOSE_GRACE = 0.5
"""The part of a stop's time in which the session is closed the polite way; then the connection is cut."""

HANDSHAKE_GRACE = 0.1
"""Seconds for a handshake that is under way, so that its session is closed and does not live on until its timeout."""

_log = logging.getLogger(__name__)
_kazoo_log = logging.getLogger("mprpc.kazoo")
# kazoo warns at each failed attempt, and prints whole requests, credentials included, when it debugs.
_kazoo_log.addFilter(lambda record: record.levelno >= logging.ERROR)


def load_kazoo() -> None:
    """What the first client would import. It starts no thread."""
    with importing:
        import kazoo.client  # noqa: F401


class _Lost:
    """In an answer's place."""


_LOST = _Lost()


class ZooKeeperClient:
    """One KazooClient. The registry's thread makes, drives and stops it; `post` is called on kazoo's threads.

    `client_id` takes over the session of a client that was thrown away. Raises ConfigError where the configuration asks
    for something that is not installed.
    """

    def __init__(
        self, config: MprpcConfig, post: Callable[[Event], None], client_id: tuple[int, bytes] | None = None
    ) -> None:
        load_kazoo()
        from kazoo.client import KazooClient
        from kazoo.retry import KazooRetry
        from kazoo.security import OPEN_ACL_UNSAFE

        self._post = post
        self._open_acl = OPEN_ACL_UNSAFE
        self._own_acl = own_acl(config)
        self._timeout = config.session_timeout
        self._why = "the client gave up"
        self._lock = threading.Lock()
        self._answers: dict[int, Answer | _Lost | None] = {}  # in the order of the requests; None: to come
        self._handler = _handler_class()(ended=self._ended)
        jitter = 0.4  # kazoo adds it to the longest delay, too
        retry = KazooRetry(max_tries=-1, delay=0.05, max_delay=RETRY_DELAY / (1 + jitter), max_jitter=jitter)
        self._kazoo = KazooClient(
            handler=self._handler, client_id=client_id, connection_retry=retry, **kazoo_options(config)
        )
        self._overhear_timeout()
        self._kazoo.add_listener(self._listen)

    def start(self) -> None:
        """Returns at once."""
        self._kazoo.start_async()

    @classmethod
    @contextmanager
    def connected(cls, config: MprpcConfig, timeout: float) -> Iterator[Any]:
        """A KazooClient that is connected, for somebody who asks once; closed afterwards. Raises Unavailable."""
        client = cls(config, lambda event: None)
        try:
            if not client._kazoo.start_async().wait(timeout):
                raise Unavailable(f"ZooKeeper {config.zookeeper_hosts} can't be reached within {timeout:g} s")
            yield client._kazoo
        finally:
            client.stop(CONNECT_TIMEOUT * 2)

    @property
    def client_id(self) -> tuple[int, bytes] | None:
        """The session and its password while there is a connection. Any thread."""
        client_id: tuple[int, bytes] | None = self._kazoo.client_id
        return client_id

    def execute(self, request: Request) -> None:
        """Send an operation. Its answer is posted, unless the connection is lost first."""
        operation = request.operation
        with self._lock:
            self._answers[request.token] = None
        try:
            result = self._start(operation)
        except Exception as error:  # kazoo reports a client that is closed by raising, whatever the operation
            self._answer(request.token, partial(_raise, error))
            return
        result.rawlink(lambda result: self._answer(request.token, partial(_value, operation, result)))

    def stop(self, timeout: float) -> bool:
        """Close the session and release everything, within `timeout` seconds; False if kazoo hangs longer than that."""
        grace = timeout * CLOSE_GRACE if self._kazoo.connected else min(timeout, HANDSHAKE_GRACE)
        closer = threading.Thread(target=self._close, name="mprpc-registry-close", daemon=True)
        try:
            closer.start()
        except RuntimeError:  # the interpreter is ending, which from 3.12 on starts no thread any more
            self.abandon()
            return True
        closer.join(grace)
        if closer.is_alive():
            self._handler.abort()
            closer.join(max(timeout - grace, 0.0))
        return not closer.is_alive()

    def abandon(self) -> None:
        """Release everything as soon as kazoo lets go, and leave the session to whoever takes it over. Blocks."""
        self._handler.abort()
        self._close()

    def forget(self) -> None:
        """In a child after a fork: close the inherited descriptors, and say nothing to the parent's connection."""
        self._handler.forget()

    def _close(self) -> None:
        try:
            self._kazoo.stop()
            self._kazoo.close()
        except Exception as error:
            _log.warning("a ZooKeeper client was left behind: %s", error)

    def _start(self, operation: Operation) -> Any:
        kazoo = self._kazoo
        if isinstance(operation, Create):
            return kazoo.create_async(operation.path, operation.data, self._acl(operation), operation.ephemeral)
        if isinstance(operation, Delete):
            return kazoo.delete_async(operation.path)
        if isinstance(operation, Exists):
            return kazoo.exists_async(operation.path, self._watch)
        if isinstance(operation, Read):
            return kazoo.get_async(operation.path, self._watch if operation.watch else None)
        if isinstance(operation, Children):
            return kazoo.get_children_async(operation.path, self._watch, include_data=True)
        transaction = kazoo.transaction()
        for step in operation.operations:
            if isinstance(step, Create):
                transaction.create(step.path, step.data, self._acl(step), step.ephemeral)
            else:
                transaction.delete(step.path)
        return transaction.commit_async()

    def _acl(self, operation: Create) -> Any:
        return self._open_acl if operation.open else self._own_acl

    # On kazoo's threads: nothing but posting.

    def _answer(self, token: int, value: Callable[[], object]) -> None:
        """Post the answer once all earlier ones have been; one that a lost connection took is left out."""
        from kazoo.exceptions import ConnectionClosedError, ConnectionLoss, SessionExpiredError, SessionMovedError

        answer: Answer | _Lost
        try:
            answer = Answer(token, value())
        except (ConnectionLoss, ConnectionClosedError, SessionExpiredError, SessionMovedError):
            answer = _LOST  # what became of it is not known: the state listener tells, and all is looked at again
        except Exception as error:
            answer = Answer(token, error=type(error).__name__.removesuffix("Error"))
        with self._lock:
            self._answers[token] = answer
            while self._answers:
                oldest, waiting = next(iter(self._answers.items()))
                if waiting is None:
                    break
                del self._answers[oldest]
                if isinstance(waiting, Answer):
                    self._post(waiting)

    def _listen(self, state: str) -> None:
        client_id = self._kazoo.client_id
        if state == "CONNECTED" and client_id is not None:
            self._post(Connected(client_id[0], self._timeout))
            return
        if self._kazoo.client_state == "AUTH_FAILED":
            self._why = "it refuses our credentials, zookeeper_auth or zookeeper_sasl"
        self._post(Suspended())

    def _ended(self) -> None:
        self._post(Ended(self._why))

    def _watch(self, event: Any) -> None:
        if event.type in ("CREATED", "DELETED", "CHANGED", "CHILD"):  # not NONE, which tells of the connection
            self._post(Fired(event.path, event.type.lower()))

    def _overhear_timeout(self) -> None:
        connection = self._kazoo._connection
        invoke = connection._invoke

        def overhear(*args: Any, **kwargs: Any) -> Any:
            reply = invoke(*args, **kwargs)
            negotiated = getattr(reply[0], "time_out", 0) if isinstance(reply, tuple) else 0
            if negotiated > 0:
                self._timeout = negotiated / 1000.0
            return reply

        connection._invoke = overhear


def _value(operation: Operation, result: Any) -> object:
    """What the operation is answered by. Raises kazoo's error."""
    value = result.get(block=False)
    if isinstance(operation, Exists):
        return None if value is None else _stat(value)
    if isinstance(operation, Read):
        return value[0], _stat(value[1])
    if isinstance(operation, Children):
        return tuple(value[0]), _stat(value[1])
    if isinstance(operation, Transaction):
        _check_transaction(value)
    return None


def _check_transaction(results: list[Any]) -> None:
    from kazoo.exceptions import RolledBackError, RuntimeInconsistency

    errors = [result for result in results if isinstance(result, Exception)]
    # Those before and after the one that failed say only that they were not carried out.
    guilty = [error for error in errors if not isinstance(error, (RolledBackError, RuntimeInconsistency))]
    for error in guilty or errors:
        raise error


def _raise(error: Exception) -> object:
    raise error


def _stat(stat: Any) -> Stat:
    return Stat(stat.czxid, stat.version, stat.cversion, stat.ephemeralOwner)


def own_acl(config: MprpcConfig) -> Any:
    """The ACL of the nodes below our root, as kazoo takes it."""
    from kazoo.security import CREATOR_ALL_ACL, OPEN_ACL_UNSAFE

    return CREATOR_ALL_ACL if config.zookeeper_acl == "creator" else OPEN_ACL_UNSAFE


def kazoo_options(config: MprpcConfig) -> dict[str, Any]:
    """The keywords for KazooClient that the configuration says. Raises ConfigError where pure-sasl is missing."""
    options: dict[str, Any] = {
        "hosts": config.zookeeper_hosts,
        "timeout": config.session_timeout,
        "logger": _kazoo_log,
    }
    if config.zookeeper_auth:
        options["auth_data"] = [tuple(config.zookeeper_auth.split(":", 1))]
    if config.zookeeper_sasl:
        options["sasl_options"] = _sasl_options(config.zookeeper_sasl)
    if config.zookeeper_tls_ca or config.zookeeper_tls_cert:
        options |= {"use_ssl": True, "verify_certs": True, "check_hostname": True}
        options |= {
            "ca": config.zookeeper_tls_ca or None,
            "certfile": config.zookeeper_tls_cert or None,
            "keyfile": config.zookeeper_tls_key or config.zookeeper_tls_cert or None,
        }
    return options


def _sasl_options(text: str) -> dict[str, str]:
    from importlib.util import find_spec

    if find_spec("puresasl") is None:
        raise ConfigError("zookeeper_sasl: needs the package pure-sasl; pip install pure-sasl")
    mechanism, user, password = text.split(":", 2)
    return {"mechanism": mechanism, "username": user, "password": password}


@cache
def _handler_class() -> type[Any]:
    """Made when kazoo is imported."""
    from kazoo.handlers.threading import SequentialThreadingHandler

    return type("Handler", (_Bounds, SequentialThreadingHandler), {})


class _Bounds(_Threading):  # type: ignore[misc]
    """For kazoo's threading handler, an end to every wait: remembers the sockets, so that they can be cut, and tells
    when the connection's thread has ended."""

    def __init__(self, ended: Callable[[], None]) -> None:
        super().__init__()
        self._ended = ended
        self._lock = threading.Lock()
        self._aborted = False
        self._socket: socket.socket | None = None
        self._pair: tuple[socket.socket, ...] = ()
        self._pid = os.getpid()

    def start(self) -> None:
        import atexit

        super().start()
        atexit.unregister(self.stop)  # it would stop the answers before the registry has withdrawn at exit

    def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_ssl"):
            kwargs["timeout"] = min(kwargs["timeout"], CONNECT_TIMEOUT)
            return self._remember(super().create_connection(*args, **kwargs))
        return self._connect(args[0] if args else kwargs["address"])

    def _connect(self, address: tuple[str, int]) -> socket.socket:
        """Known before it is connected, so that it can be cut meanwhile."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        connection: socket.socket = self._remember(socket.socket(family, socket.SOCK_STREAM))
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(CONNECT_TIMEOUT)
            connection.connect(address)
        except BaseException:
            connection.close()
            raise
        return connection

    def _remember(self, connection: Any) -> Any:
        with self._lock:
            self._socket = connection
            if self._aborted:
                connection.close()
                raise OSError(errno.ECONNABORTED, "the client is being stopped")
        return connection

    def create_socket_pair(self) -> Any:
        self._pair = super().create_socket_pair()
        return self._pair

    def spawn(self, func: Callable[..., None], *args: Any, **kwargs: Any) -> Any:
        if getattr(func, "__name__", "") == "zk_loop":
            func = partial(self._run_connection, func)
        return super().spawn(func, *args, **kwargs)

    def _run_connection(self, loop: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            loop(*args, **kwargs)
        except Exception as error:
            _log.debug("kazoo's connection thread ended: %r", error)
        finally:
            self._ended()

    def abort(self) -> None:
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                _cut(self._socket)

    def forget(self) -> None:
        for each in (self._socket, *self._pair):
            if each is not None:
                each.close()


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # closed already
        connection.shutdown(socket.SHUT_RDWR)
