"""The tree of znodes: what each operation checks, in the order of the real server, and what it changes.

Operations raise ZooKeeperError before they change anything, so a single one needs no undoing. In a transaction
(`begin`, then `commit` or `rollback`) each change also notes how to take it back. Every change is put on `events`,
in the order in which watches must learn of it; whoever drives the tree takes them from there. No clock: zxid and
time come in with each change.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .acl import OPEN_ACL, READ_ONLY_ACL, Acl, Identity, Perm, require, resolve
from .protocol import AclEntry, Code, EventType, ZooKeeperError

ANY_VERSION = -1
NODE_OVERHEAD_BYTES = 400
"""What an empty node weighs in CPython (object, dictionary entries, path), measured; counted against the limit."""

_STAT = struct.Struct(">qqqqiiiqiiq")
_RESERVED = frozenset({"/", "/zookeeper", "/zookeeper/quota", "/zookeeper/config"})
# Java sees UTF-16: what lies beyond U+FFFF is a pair of surrogates to it, and those are refused.
_BAD_PATH = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\uf8ff\ufff0-\U0010ffff]"  # characters that may not appear
    r"|//|/\.{1,2}(?=/|\Z)"  # an empty name, a relative one
)


class Txn(NamedTuple):
    """One change of the database: its number, its wall-clock time in milliseconds, and the session that asked."""

    zxid: int
    time_ms: int
    session_id: int
    identities: Iterable[Identity]


class Event(NamedTuple):
    """A change as watches see it; only who may read under `acl` is told."""

    type: EventType
    path: str
    acl: Acl


class Node:
    """One znode. `cversion` counts creations only, as in the real server, which derives the client's from it."""

    __slots__ = (
        "acl", "aversion", "children", "ctime", "cversion", "czxid",
        "data", "mtime", "mzxid", "owner", "pzxid", "version",
    )  # fmt: skip

    def __init__(self, data: bytes | None, acl: Acl, zxid: int, time_ms: int, owner: int) -> None:
        self.data = data
        self.acl = acl
        self.czxid = self.mzxid = self.pzxid = zxid
        self.ctime = self.mtime = time_ms
        self.version = self.cversion = self.aversion = 0
        self.owner = owner
        self.children: dict[str, None] = {}

    def stat(self) -> bytes:
        """The Stat record: 68 bytes."""
        count = len(self.children)
        return _STAT.pack(
            self.czxid, self.mzxid, self.ctime, self.mtime,
            self.version, _int32(self.cversion * 2 - count), self.aversion,
            self.owner, len(self.data or b""), count, self.pzxid,
        )  # fmt: skip


class Tree:
    """All znodes by path. `max_bytes` bounds data, paths and NODE_OVERHEAD_BYTES a node together."""

    def __init__(self, max_bytes: int) -> None:
        root = Node(b"", OPEN_ACL, 0, 0, 0)
        # The real server knows the root by two names too, and answers for both.
        self._nodes: dict[str, Node] = {"": root, "/": root}
        self._max_bytes = max_bytes
        self._size = 0
        self._ephemerals: dict[int, dict[str, None]] = {}
        self._undo: list[Callable[[], None]] | None = None
        self.events: list[Event] = []
        for path, acl in (
            ("/zookeeper", OPEN_ACL),
            ("/zookeeper/quota", OPEN_ACL),
            ("/zookeeper/config", READ_ONLY_ACL),
        ):
            self._insert(path, Node(b"", acl, 0, 0, 0))
        self._nodes["/zookeeper/config"].aversion = -1

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def size(self) -> int:
        """Bytes that count against the limit now."""
        return self._size

    def find(self, path: str) -> Node | None:
        return self._nodes.get(path)

    def get(self, path: str) -> Node:
        node = self._nodes.get(path)
        if node is None:
            raise ZooKeeperError(Code.NO_NODE)
        return node

    def read(self, path: str, identities: Iterable[Identity], perm: int = Perm.READ) -> Node:
        """The node, if it exists and may be read."""
        node = self.get(path)
        require(node.acl, perm, identities)
        return node

    def ephemerals(self, session_id: int) -> list[str]:
        return list(self._ephemerals.get(session_id, ()))

    def ephemeral_count(self) -> int:
        return sum(map(len, self._ephemerals.values()))

    def descendants(self, path: str) -> int:
        """How many nodes lie below; the whole tree is counted without the root's two names."""
        if path == "/":
            return len(self._nodes) - 2
        return sum(1 for other in self._nodes if other.startswith(path + "/"))

    def create(self, txn: Txn, path: str, data: bytes | None, acl: list[AclEntry], flags: int) -> str:
        """Makes a node and returns its path; flags: 1 ephemeral, 2 sequential, 4 container (kept as persistent)."""
        _check_flags(flags)
        if "/" not in path or "\0" in path:
            raise ZooKeeperError(Code.BAD_ARGUMENTS)
        stored_acl = resolve(acl, txn.identities)
        parent = self.get(_parent(path))
        require(parent.acl, Perm.CREATE, txn.identities)
        if flags & 2:
            path = f"{path}{parent.cversion:010d}"
        _check_path(path)
        if path in self._nodes:
            raise ZooKeeperError(Code.NODE_EXISTS)
        if parent.owner:
            raise ZooKeeperError(Code.NO_CHILDREN_FOR_EPHEMERALS)
        self._check_room(len(path) + len(data or b"") + NODE_OVERHEAD_BYTES)
        node = Node(data, stored_acl, txn.zxid, txn.time_ms, txn.session_id if flags & 1 else 0)
        self._add(path, node, parent, txn.zxid)
        return path

    def delete(self, txn: Txn, path: str, version: int) -> None:
        if "/" not in path or "\0" in path or path in _RESERVED:
            raise ZooKeeperError(Code.BAD_ARGUMENTS)
        parent = self.get(_parent(path))
        require(parent.acl, Perm.DELETE, txn.identities)
        node = self.get(path)
        _check_version(node.version, version)
        if node.children:
            raise ZooKeeperError(Code.NOT_EMPTY)
        self._drop(path, node, parent, txn.zxid)

    def set_data(self, txn: Txn, path: str, data: bytes | None, version: int) -> Node:
        _check_path(path)
        node = self.get(path)
        require(node.acl, Perm.WRITE, txn.identities)
        growth = len(data or b"") - len(node.data or b"")
        self._check_room(growth)
        _check_version(node.version, version)
        if self._undo is not None:
            self._undo.append(_restorer(node, "data", "version", "mzxid", "mtime"))
            self._undo.append(lambda: self._weigh(-growth))
        self._weigh(growth)
        node.data, node.version = data, _int32(node.version + 1)
        node.mzxid, node.mtime = txn.zxid, txn.time_ms
        self.events.append(Event(EventType.DATA_CHANGED, path, node.acl))
        return node

    def set_acl(self, txn: Txn, path: str, acl: list[AclEntry], version: int) -> Node:
        """Not part of a multi, in the protocol as here: it notes nothing to take back."""
        _check_path(path)
        stored_acl = resolve(acl, txn.identities)
        node = self.get(path)
        require(node.acl, Perm.ADMIN, txn.identities)
        _check_version(node.aversion, version)
        node.acl, node.aversion = stored_acl, _int32(node.aversion + 1)
        return node

    def check(self, txn: Txn, path: str, version: int) -> None:
        _check_path(path)
        node = self.get(path)
        require(node.acl, Perm.READ, txn.identities)
        _check_version(node.version, version)

    def purge(self, txn: Txn) -> None:
        """Removes the ephemeral nodes of the transaction's session."""
        for path in self._ephemerals.pop(txn.session_id, {}):
            self._drop(path, self._nodes[path], self._nodes[_parent(path)], txn.zxid)

    def begin(self) -> None:
        self._undo = []

    def commit(self) -> None:
        self._undo = None

    def rollback(self) -> None:
        """Takes back everything since `begin`, events included."""
        steps, self._undo = self._undo or [], None
        for step in reversed(steps):
            step()
        self.events.clear()

    def _add(self, path: str, node: Node, parent: Node, zxid: int) -> None:
        if self._undo is not None:
            self._undo.append(_restorer(parent, "cversion", "pzxid"))
            self._undo.append(lambda: self._remove(path, node))
        self._insert(path, node)
        parent.cversion, parent.pzxid = _int32(parent.cversion + 1), zxid
        self.events.append(Event(EventType.CREATED, path, node.acl))
        self.events.append(Event(EventType.CHILDREN_CHANGED, _parent(path) or "/", parent.acl))

    def _drop(self, path: str, node: Node, parent: Node, zxid: int) -> None:
        if self._undo is not None:
            self._undo.append(_restorer(parent, "pzxid"))
            self._undo.append(lambda: self._insert(path, node))
        self._remove(path, node)
        parent.pzxid = zxid
        self.events.append(Event(EventType.DELETED, path, node.acl))
        self.events.append(Event(EventType.CHILDREN_CHANGED, _parent(path) or "/", parent.acl))

    def _insert(self, path: str, node: Node) -> None:
        parent, _, name = path.rpartition("/")
        self._nodes[path] = node
        self._nodes[parent].children[name] = None
        if node.owner:
            self._ephemerals.setdefault(node.owner, {})[path] = None
        self._weigh(len(path) + len(node.data or b"") + NODE_OVERHEAD_BYTES)

    def _remove(self, path: str, node: Node) -> None:
        parent, _, name = path.rpartition("/")
        del self._nodes[path]
        del self._nodes[parent].children[name]
        owned = self._ephemerals.get(node.owner)
        if owned is not None:
            owned.pop(path, None)
            if not owned:
                del self._ephemerals[node.owner]
        self._weigh(-(len(path) + len(node.data or b"") + NODE_OVERHEAD_BYTES))

    def _weigh(self, change: int) -> None:
        self._size += change

    def _check_room(self, growth: int) -> None:
        if growth > 0 and self._size + growth > self._max_bytes:
            raise ZooKeeperError(Code.QUOTA_EXCEEDED)


def _parent(path: str) -> str:
    return path[: path.rindex("/")]


def _int32(value: int) -> int:
    """Versions are Java ints: they wrap."""
    return (value + 2**31) % 2**32 - 2**31


def _check_flags(flags: int) -> None:
    if flags in (5, 6):  # nodes with a time to live, which a 3.8 server offers only when configured to
        raise ZooKeeperError(Code.UNIMPLEMENTED)
    if not 0 <= flags <= 4:
        raise ZooKeeperError(Code.BAD_ARGUMENTS)


def _check_path(path: str) -> None:
    ends_badly = len(path) > 1 and path.endswith("/")
    if not path.startswith("/") or ends_badly or _BAD_PATH.search(path):
        raise ZooKeeperError(Code.BAD_ARGUMENTS)


def _check_version(actual: int, expected: int) -> None:
    if expected not in (ANY_VERSION, actual):
        raise ZooKeeperError(Code.BAD_VERSION)


def _restorer(node: Node, *names: str) -> Callable[[], None]:
    values = [(name, getattr(node, name)) for name in names]

    def restore() -> None:
        for name, value in values:
            setattr(node, name, value)

    return restore
