"""A ZooKeeper without sockets and threads: packets of its peers go in, packets for its peers come out.

It owns the tree, the watches, the sessions and the zxid. Every request that writes takes a zxid, also one that is
refused, and its watches fire before its answer goes out, as in the real server. What a packet causes is put into the
outboxes of the peers it concerns; `take_ready` names those peers. All of it belongs to one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from . import acl, protocol
from .acl import Identity, Perm
from .clock import Clock
from .protocol import Code, ConnectRequest, EventType, MalformedError, Op, Reader, ZooKeeperError
from .sessions import Session, Sessions
from .tree import Node, Tree, Txn
from .watches import Watches, WatchTable

_HEADER = struct.Struct(">ii")


@dataclass(frozen=True)
class Limits:
    """What may grow, and how far; each is there so that no client can take the process's memory or descriptors."""

    packet_bytes: int = 0xFFFFF
    """The longest request, ZooKeeper's own jute.maxbuffer; a longer one ends its connection."""
    connections: int = 10_000
    """One more is closed as soon as it is accepted."""
    sessions: int = 20_000
    """They outlive connections, so connecting in a loop could pile them up; one more is refused."""
    tree_bytes: int = 512 << 20
    """Data, paths and overhead of all nodes; what would go past it is refused with QUOTA_EXCEEDED."""
    watches: int = 100_000
    """For one connection: fifty times what a consumer of a thousand services sets. More ends the connection."""
    identities: int = 100
    """Credentials added to one connection; more ends it."""
    unsent_bytes: int = 16 << 20
    """Answers and events waiting for one client to read; more ends its connection."""
    pause_bytes: int = 1 << 20
    """With this much unsent no further request of the connection is read: requests can't outrun their answers."""
    handshake_seconds: float = 10.0
    """How long a connection may exist without a session, or with its last answer unread."""


class Peer:
    """One connection as the keeper knows it. `ending` is set once it must close: the reason, for the log."""

    def __init__(self, address: str) -> None:
        self.identities: dict[Identity, None] = {("ip", address): None}
        self.session: Session[Peer] | None = None
        self.outbox: list[bytes] = []
        self.unsent = 0
        self.ending: str | None = None
        self.at_fault = False

    def end(self, reason: str, *, at_fault: bool = False) -> None:
        """What is in the outbox still goes out, nothing more comes in. The first reason stays."""
        if self.ending is None:
            self.ending, self.at_fault = reason, at_fault


Handler = Callable[[Peer, Reader], bytes]
WriteHandler = Callable[[Txn, Reader], bytes]


class Keeper:
    """The state behind one address; `tick_ms` sets the range of session timeouts, 2 to 20 ticks as in the real one."""

    def __init__(self, clock: Clock, limits: Limits, tick_ms: int) -> None:
        self.clock = clock
        self.limits = limits
        self.tick_ms = tick_ms
        self.zxid = 0
        self.tree = Tree(limits.tree_bytes)
        self.watches: Watches[Peer] = Watches()
        self.sessions: Sessions[Peer] = Sessions(clock)
        self._ready: dict[Peer, None] = {}
        self._readers: dict[int, Handler] = {
            Op.EXISTS: self._exists,
            Op.GET_DATA: self._get_data,
            Op.GET_ACL: self._get_acl,
            Op.GET_CHILDREN: self._get_children,
            Op.GET_CHILDREN2: self._get_children2,
            Op.SYNC: self._sync,
            Op.SET_WATCHES: self._set_watches,
            Op.CHECK_WATCHES: self._check_watches,
            Op.REMOVE_WATCHES: self._remove_watches,
            Op.GET_EPHEMERALS: self._get_ephemerals,
            Op.GET_ALL_CHILDREN_NUMBER: self._get_all_children_number,
            Op.WHO_AM_I: self._who_am_i,
            Op.MULTI_READ: _not_offered,
            Op.SET_WATCHES2: _not_offered,
            Op.ADD_WATCH: _not_offered,
        }
        self._multi_writers: dict[int, tuple[Op, WriteHandler]] = {
            Op.CREATE: (Op.CREATE, self._create),
            Op.CREATE2: (Op.CREATE, self._create),  # 3.8 takes it for a plain create, and answers it as one
            Op.DELETE: (Op.DELETE, self._delete),
            Op.SET_DATA: (Op.SET_DATA, self._set_data),
            Op.CHECK: (Op.CHECK, self._check),
        }
        self._writers: dict[int, WriteHandler] = {
            Op.CREATE: self._create,
            Op.CREATE2: self._create2,
            Op.DELETE: self._delete,
            Op.SET_DATA: self._set_data,
            Op.CHECK: self._check,
            Op.SET_ACL: self._set_acl,
            Op.MULTI: self._multi,
            Op.RECONFIG: _reconfig,
            Op.CREATE_CONTAINER: _not_offered,
            Op.CREATE_TTL: _not_offered,
            Op.DELETE_CONTAINER: _not_offered,
        }

    def take_ready(self) -> list[Peer]:
        """The peers that have something to send, or to end, since the last call."""
        ready, self._ready = list(self._ready), {}
        return ready

    def connect(self, peer: Peer, packet: bytes) -> None:
        """The first packet of a connection: opens a session or resumes one."""
        request = ConnectRequest.read(packet)
        if request.last_zxid > self.zxid:
            seen = f"the client has seen zxid {request.last_zxid:#x}, this server only {self.zxid:#x}"
            self._end(peer, seen, at_fault=True)
            return
        timeout_ms = min(max(request.timeout_ms, 2 * self.tick_ms), 20 * self.tick_ms)
        session = self._resume(request, timeout_ms) if request.session_id else self._open(timeout_ms)
        if session is None:
            none = protocol.welcome(0, 0, bytes(protocol.PASSWORD_BYTES), read_only_field=request.read_only_field)
            self.send(peer, none)
            self._end(peer, "there is no such session, or no room for one more")
            return
        peer.session, session.peer = session, peer
        reply = protocol.welcome(
            session.timeout_ms, session.id, session.password, read_only_field=request.read_only_field
        )
        self.send(peer, reply)

    def request(self, peer: Peer, packet: bytes) -> None:
        """Any later packet. Raises MalformedError for one with no header; other bad input is answered, then ends it."""
        if len(packet) < _HEADER.size:
            raise MalformedError("a request shorter than its header")
        xid, op = _HEADER.unpack_from(packet)
        if peer.session is not None:
            self.sessions.heard_of(peer.session)
        if op == Op.PING:
            self.send(peer, protocol.reply(protocol.PING_XID, self.zxid, Code.OK))
        elif op == Op.AUTH:
            self._authenticate(peer, xid, Reader(packet, _HEADER.size))
        elif op == Op.CLOSE_SESSION and peer.session is not None:
            self.close_session(peer.session)
            self.send(peer, protocol.reply(xid, self.zxid, Code.OK))
            self._end(peer, "the client closed its session")
        else:
            self._answer(peer, xid, op, Reader(packet, _HEADER.size))

    def disconnect(self, peer: Peer) -> None:
        """The connection is gone; its session stays until its timeout."""
        self.watches.forget(peer)
        self._ready.pop(peer, None)
        if peer.session is not None and peer.session.peer is peer:
            peer.session.peer = None
        peer.session = None

    def expire_due(self) -> list[int]:
        """Closes the sessions whose time is up and returns their ids."""
        due = self.sessions.due()
        for session in due:
            peer = session.peer
            self.close_session(session)
            if peer is not None:
                self._end(peer, "its session expired")
        return [session.id for session in due]

    def condemn(self, session: Session[Peer]) -> None:
        """The session can't be resumed any more, yet its ephemeral nodes stay until it is closed."""
        session.closing = True
        if session.peer is not None:
            self._end(session.peer, "its session expired")

    def close_session(self, session: Session[Peer]) -> None:
        self.sessions.remove(session)
        self.tree.purge(self._next_txn(session.id, ()))
        self._tell_watchers()

    def send(self, peer: Peer, packet: bytes) -> None:
        peer.outbox.append(packet)
        peer.unsent += len(packet)
        self._ready[peer] = None

    def refuse(self, peer: Peer, packet: bytes, code: int) -> None:
        """Answers a request with an error, without a look at what it asks."""
        xid, _ = _HEADER.unpack_from(packet)
        self.send(peer, protocol.reply(xid, self.zxid, code))

    def _end(self, peer: Peer, reason: str, *, at_fault: bool = False) -> None:
        peer.end(reason, at_fault=at_fault)
        self._ready[peer] = None

    def _open(self, timeout_ms: int) -> Session[Peer] | None:
        if len(self.sessions) >= self.limits.sessions:
            return None
        self.zxid += 1
        return self.sessions.open(timeout_ms)

    def _resume(self, request: ConnectRequest, timeout_ms: int) -> Session[Peer] | None:
        session = self.sessions.find(request.session_id)
        if session is None:
            return None
        if session.peer is not None:  # even when the password turns out wrong, as in the real server
            self._end(session.peer, "its session went on with another connection")
        if session.closing or session.password != request.password:
            return None
        session.timeout_ms = timeout_ms
        self.sessions.heard_of(session)
        return session

    def _authenticate(self, peer: Peer, xid: int, reader: Reader) -> None:
        reader.integer()
        scheme, credentials = reader.nullable_string(), reader.buffer()
        if scheme == "digest" and credentials is not None:
            peer.identities[acl.digest_identity(credentials)] = None
        elif scheme != "ip":
            self.send(peer, protocol.reply(xid, 0, Code.AUTH_FAILED))
            self._end(peer, f"authentication failed for scheme {scheme!r:.40}", at_fault=True)
            return
        self.send(peer, protocol.reply(xid, 0, Code.OK))
        if len(peer.identities) > self.limits.identities:
            self._end(peer, f"more than {self.limits.identities} identities", at_fault=True)

    def _answer(self, peer: Peer, xid: int, op: int, reader: Reader) -> None:
        code, body = Code.OK, b""
        try:
            if op in self._writers:
                body = self._write(peer, op, reader)
            elif op in self._readers:
                body = self._readers[op](peer, reader)
            else:
                self.send(peer, protocol.reply(xid, -1, Code.UNIMPLEMENTED))
                self._end(peer, f"unknown request type {op}", at_fault=True)
                return
        except ZooKeeperError as error:
            code = error.code
        except MalformedError as error:
            code = Code.MARSHALLING_ERROR
            self._end(peer, f"malformed request of type {op}: {error}", at_fault=True)
        self.send(peer, protocol.reply(xid, self.zxid, code, body))

    def _write(self, peer: Peer, op: int, reader: Reader) -> bytes:
        session_id = peer.session.id if peer.session is not None else 0
        body = self._writers[op](self._next_txn(session_id, peer.identities), reader)
        self._tell_watchers()
        return body

    def _next_txn(self, session_id: int, identities: dict[Identity, None] | tuple[()]) -> Txn:
        self.zxid += 1
        return Txn(self.zxid, self.clock.wall_ms(), session_id, identities)

    def _tell_watchers(self) -> None:
        events, self.tree.events = self.tree.events, []
        for event in events:
            for peer in self.watches.fire(event):
                if acl.permitted(event.acl, Perm.READ, peer.identities):
                    self.send(peer, protocol.notice(event.type, event.path))

    def _create(self, txn: Txn, reader: Reader) -> bytes:
        path, data, entries = reader.string(), reader.buffer(), reader.acl()
        return protocol.string(self.tree.create(txn, path, data, entries, reader.integer()))

    def _create2(self, txn: Txn, reader: Reader) -> bytes:
        path, data, entries = reader.string(), reader.buffer(), reader.acl()
        path = self.tree.create(txn, path, data, entries, reader.integer())
        return protocol.string(path) + self.tree.get(path).stat()

    def _delete(self, txn: Txn, reader: Reader) -> bytes:
        self.tree.delete(txn, reader.string(), reader.integer())
        return b""

    def _set_data(self, txn: Txn, reader: Reader) -> bytes:
        return self.tree.set_data(txn, reader.string(), reader.buffer(), reader.integer()).stat()

    def _set_acl(self, txn: Txn, reader: Reader) -> bytes:
        return self.tree.set_acl(txn, reader.string(), reader.acl(), reader.integer()).stat()

    def _check(self, txn: Txn, reader: Reader) -> bytes:
        self.tree.check(txn, reader.string(), reader.integer())
        return b""

    def _multi(self, txn: Txn, reader: Reader) -> bytes:
        """All or nothing; what came before a failure is reported OK, what comes after it RUNTIME_INCONSISTENCY."""
        results: list[bytes] = []
        failed: tuple[int, Code] | None = None
        self.tree.begin()
        try:
            kind, done = reader.multi_header()
            while not done:
                # A malformed operation spoils the whole request, also after one that failed: all are read.
                if kind not in self._multi_writers:
                    raise MalformedError(f"a multi with an operation of type {kind}")
                if failed is None:
                    answered_as, write = self._multi_writers[kind]
                    try:
                        results.append(protocol.multi_result(answered_as, write(txn, reader)))
                    except ZooKeeperError as error:
                        failed = len(results), error.code
                        results.append(b"")
                else:
                    self._skip(kind, reader)
                    results.append(b"")
                kind, done = reader.multi_header()
        except MalformedError:
            self.tree.rollback()
            raise
        if failed is None:
            self.tree.commit()
            return b"".join(results) + protocol.MULTI_END
        self.tree.rollback()
        return _failed_multi(len(results), *failed)

    def _exists(self, peer: Peer, reader: Reader) -> bytes:
        path, watch = reader.string(), reader.boolean()
        if "\0" in path:
            raise ZooKeeperError(Code.BAD_ARGUMENTS)
        if watch:  # set for a missing node too: that is how its creation is waited for
            self._watch_data(peer, path)
        return self.tree.get(path).stat()

    def _get_data(self, peer: Peer, reader: Reader) -> bytes:
        path, watch = reader.string(), reader.boolean()
        node = self.tree.read(path, peer.identities)
        if watch:
            self._watch_data(peer, path)
        return protocol.buffer(node.data) + node.stat()

    def _get_children(self, peer: Peer, reader: Reader) -> bytes:
        return protocol.strings(self._list(peer, reader).children)

    def _get_children2(self, peer: Peer, reader: Reader) -> bytes:
        node = self._list(peer, reader)
        return protocol.strings(node.children) + node.stat()

    def _list(self, peer: Peer, reader: Reader) -> Node:
        path, watch = reader.string(), reader.boolean()
        node = self.tree.read(path, peer.identities)
        if watch:
            self._watch_children(peer, path)
        return node

    def _get_acl(self, peer: Peer, reader: Reader) -> bytes:
        node = self.tree.read(reader.string(), peer.identities, Perm.READ | Perm.ADMIN)
        entries = node.acl
        if not acl.permitted(entries, Perm.ADMIN, peer.identities):
            entries = acl.without_proofs(entries)
        return protocol.acl(entries) + node.stat()

    def _sync(self, peer: Peer, reader: Reader) -> bytes:
        return protocol.string(reader.string())

    def _set_watches(self, peer: Peer, reader: Reader) -> bytes:
        """After a reconnect: what changed since the client's zxid is told at once, the rest is watched again.

        Unlike a watch that fires, 3.8 tells of nodes that the client may not read too.
        """
        since = reader.long()
        for path in reader.strings():
            node = self.tree.find(path)
            if node is None or node.mzxid > since:
                self._notify(peer, EventType.DELETED if node is None else EventType.DATA_CHANGED, path)
            else:
                self._watch_data(peer, path)
        for path in reader.strings():
            node = self.tree.find(path)
            if node is not None:
                self._notify(peer, EventType.CREATED, path)
            else:
                self._watch_data(peer, path)
        for path in reader.strings():
            node = self.tree.find(path)
            if node is None or node.pzxid > since:
                self._notify(peer, EventType.DELETED if node is None else EventType.CHILDREN_CHANGED, path)
            else:
                self._watch_children(peer, path)
        return b""

    def _notify(self, peer: Peer, event: EventType, path: str) -> None:
        self.send(peer, protocol.notice(event, path))

    def _watch_data(self, peer: Peer, path: str) -> None:
        self.watches.data.add(path, peer)
        self._check_watch_count(peer)

    def _watch_children(self, peer: Peer, path: str) -> None:
        self.watches.children.add(path, peer)
        self._check_watch_count(peer)

    def _check_watch_count(self, peer: Peer) -> None:
        if self.watches.count(peer) > self.limits.watches:
            self._end(peer, f"more than {self.limits.watches} watches", at_fault=True)

    def _check_watches(self, peer: Peer, reader: Reader) -> bytes:
        path, tables = reader.string(), self._tables(reader.integer())
        if path and "/" not in path:  # 3.8 trips over it
            raise ZooKeeperError(Code.MARSHALLING_ERROR)
        if not any(table.has_any(path) for table in tables):
            raise ZooKeeperError(Code.NO_WATCHER)
        return b""

    def _remove_watches(self, peer: Peer, reader: Reader) -> bytes:
        path, tables = reader.string(), self._tables(reader.integer())
        removed = [table.remove(path, peer) for table in tables]  # from every table, not only up to the first
        if True not in removed:
            raise ZooKeeperError(Code.NO_WATCHER)
        return b""

    def _tables(self, kind: int) -> list[WatchTable[Peer]]:
        children, data = self.watches.children, self.watches.data
        tables = {1: [children], 2: [data], 3: [children, data]}
        if kind not in tables:
            raise MalformedError(f"{kind} is no type of watch")
        return tables[kind]

    def _get_ephemerals(self, peer: Peer, reader: Reader) -> bytes:
        prefix = (reader.nullable_string() or "").strip()
        paths = self.tree.ephemerals(peer.session.id) if peer.session is not None else []
        return protocol.strings(path for path in paths if prefix in ("", "/") or path.startswith(prefix))

    def _get_all_children_number(self, peer: Peer, reader: Reader) -> bytes:
        path = reader.string()
        self.tree.read(path, peer.identities)
        return protocol.integer(self.tree.descendants(path))

    def _who_am_i(self, peer: Peer, reader: Reader) -> bytes:
        # Of a digest only the user's name is shown.
        parts = [protocol.string(scheme) + protocol.string(name.split(":")[0]) for scheme, name in peer.identities]
        return protocol.integer(len(parts)) + b"".join(parts)

    @staticmethod
    def _skip(kind: int, reader: Reader) -> None:
        """Reads one operation of a multi for its bytes only."""
        reader.string()
        if kind in (Op.CREATE, Op.CREATE2, Op.SET_DATA):
            reader.buffer()
        if kind in (Op.CREATE, Op.CREATE2):
            reader.acl()
        reader.integer()


def _failed_multi(count: int, position: int, code: Code) -> bytes:
    codes = [Code.OK] * position + [code] + [Code.RUNTIME_INCONSISTENCY] * (count - position - 1)
    return b"".join(protocol.multi_error(each) for each in codes) + protocol.MULTI_END


def _not_offered(_who: object, _reader: Reader) -> bytes:
    """A request of 3.8 that this server leaves out: the client is told so, and its connection goes on."""
    raise ZooKeeperError(Code.UNIMPLEMENTED)


def _reconfig(_txn: Txn, _reader: Reader) -> bytes:
    raise ZooKeeperError(Code.RECONFIG_DISABLED)
