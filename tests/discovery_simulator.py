"""A ZooKeeper and any number of processes in one thread, for the reconciler: every message moves when a test says so.

`World` has the znodes, sessions, watches and the time. A `Process` has a `Reconciler`, what it sent and ZooKeeper has
not carried out yet (`outbox`), and what ZooKeeper sent and it has not handled yet (`inbox`); both in order, as on a
connection. `settle` moves everything until nothing moves; a test that wants a race moves single messages instead.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from mprpc.desk import (
    Action,
    Answer,
    Children,
    Connected,
    Create,
    Delete,
    Ended,
    Event,
    Exists,
    Fired,
    Follow,
    Operation,
    Probe,
    Probed,
    Publish,
    Read,
    Registered,
    Replace,
    Request,
    Save,
    Say,
    Show,
    Snapshot,
    Stat,
    Suspended,
    Tick,
    Transaction,
    Withdraw,
    Withdrawn,
)
from mprpc.layout import Registration
from mprpc.reconciler import Reconciler

ROOT = "/mprpc"
SERVICE = "fixbug.UserServiceRpc"
METHODS = ("Login", "Register")
PATH = f"{ROOT}/{SERVICE}"
LOGIN = "/UserServiceRpc/Login"
SESSION_TIMEOUT = 4.0


@dataclass
class Node:
    data: bytes | None
    owner: int
    czxid: int
    version: int = 0
    cversion: int = 0

    @property
    def stat(self) -> Stat:
        return Stat(self.czxid, self.version, self.cversion, self.owner)


class Refused(Exception):
    """An operation that ends with ZooKeeper's error of this name."""


class World:
    """ZooKeeper, the time, and the providers that answer a probe."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.zxid = 100
        self.nodes: dict[str, Node] = {"/": Node(None, 0, 0)}
        self.sessions: set[int] = set()
        self.watches: dict[tuple[str, str], set[Process]] = {}
        self.processes: list[Process] = []
        self.answering: set[str] = set()
        self.refuse: dict[type, str] = {}
        self.reads = 0
        self._session = 0x1000

    def new_session(self) -> int:
        self._session += 1
        self.sessions.add(self._session)
        return self._session

    def process(self, address: str = "") -> Process:
        made = Process(self, address)
        self.processes.append(made)
        return made

    # The tree.

    def apply(self, process: Process, operation: Operation) -> object:
        """The value of the answer; raises Refused."""
        if type(operation) in self.refuse:
            raise Refused(self.refuse[type(operation)])
        if isinstance(operation, Transaction):
            before = {path: Node(**vars(node)) for path, node in self.nodes.items()}
            fired: list[tuple[str, str]] = []
            try:
                for step in operation.operations:
                    fired += self._write(process.session, step)
            except Refused:
                self.nodes = before
                raise
            self._fire(fired)
            return None
        if isinstance(operation, (Create, Delete)):
            self._fire(self._write(process.session, operation))
            return None
        self.reads += 1
        return self._read(process, operation)

    def _read(self, process: Process, operation: Operation) -> object:
        assert isinstance(operation, (Exists, Read, Children))
        node = self.nodes.get(operation.path)
        if isinstance(operation, Exists):
            self.watches.setdefault((operation.path, "data"), set()).add(process)
            return node.stat if node else None
        if node is None:
            raise Refused("NoNode")
        if isinstance(operation, Read):
            if operation.watch:
                self.watches.setdefault((operation.path, "data"), set()).add(process)
            return node.data, node.stat
        self.watches.setdefault((operation.path, "child"), set()).add(process)
        return tuple(path.rpartition("/")[2] for path in self.nodes if _parent(path) == operation.path), node.stat

    def _write(self, session: int, operation: Create | Delete) -> list[tuple[str, str]]:
        parent = self.nodes.get(_parent(operation.path))
        if isinstance(operation, Create):
            if parent is None:
                raise Refused("NoNode")
            if operation.path in self.nodes:
                raise Refused("NodeExists")
            self.zxid += 1
            self.nodes[operation.path] = Node(operation.data, session if operation.ephemeral else 0, self.zxid)
        else:
            if operation.path not in self.nodes:
                raise Refused("NoNode")
            self.zxid += 1
            del self.nodes[operation.path]
        assert parent is not None
        parent.cversion += 1
        kind = "created" if isinstance(operation, Create) else "deleted"
        return [(operation.path, kind), (_parent(operation.path), "child")]

    def _fire(self, fired: list[tuple[str, str]]) -> None:
        for path, kind in fired:
            if kind in ("child", "deleted"):
                self._send(path, "child", kind)
            if kind != "child":
                self._send(path, "data", kind)

    def _send(self, path: str, watch: str, kind: str) -> None:
        for process in sorted(self.watches.pop((path, watch), ()), key=self.processes.index):
            if process.connected:
                process.inbox.append(Fired(path, kind))

    # What people and time do to it.

    def write(self, path: str, data: bytes | None, owner: int = 0) -> None:
        """As somebody else: with the parents, created or changed."""
        parts = path.split("/")
        for count in range(2, len(parts)):
            if "/".join(parts[:count]) not in self.nodes:
                self._fire(self._write(0, Create("/".join(parts[:count]), None)))
        if path not in self.nodes:
            self._fire(self._write(owner, Create(path, data, ephemeral=bool(owner))))
            return
        self.nodes[path].data = data
        self.nodes[path].version += 1
        self._send(path, "data", "changed")

    def delete(self, path: str) -> None:
        """As an operator: with everything below it."""
        for below in sorted((each for each in self.nodes if each.startswith(path + "/")), reverse=True):
            self._fire(self._write(0, Delete(below)))
        if path in self.nodes:
            self._fire(self._write(0, Delete(path)))

    def end_session(self, session: int) -> None:
        self.sessions.discard(session)
        for path in [path for path, node in self.nodes.items() if node.owner == session]:
            self._fire(self._write(0, Delete(path)))

    def settle(self, seconds: float = 0.0) -> None:
        """Move every message, in a random order of the processes, until nothing moves; for `seconds` of the time."""
        end = self.now + seconds
        while True:
            self._move_all()
            times = [each.reconciler.wakeup for each in self.processes if each.running]
            when = min((time for time in times if time is not None), default=end)
            if when > end:
                break
            self.now = max(when, self.now)
            for process in self.processes:
                process.tick()
        self.now = end
        self._move_all()

    def _move_all(self) -> None:
        while moving := [each for each in self.processes if each.inbox or each.outbox]:
            process = self.random.choice(moving)
            if process.outbox and (not process.inbox or self.random.random() < 0.5):
                process.send_one()
            else:
                process.handle_one()

    # What a test asks.

    def children(self, path: str = PATH) -> list[str]:
        return sorted(each for each in self.nodes if _parent(each) == path)

    def seed_data(self, path: str = LOGIN) -> str:
        node = self.nodes.get(path)
        return (node.data or b"").decode() if node else ""


@dataclass(eq=False)
class Process:
    """One process; with an address it answers probes there for as long as it runs."""

    world: World
    address: str
    session: int = 0
    connected: bool = False
    running: bool = True
    inbox: deque[Event] = field(default_factory=deque)
    outbox: deque[Request] = field(default_factory=deque)
    actions: list[Action] = field(default_factory=list)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    saved: dict[str, Snapshot] = field(default_factory=dict)
    registered: dict[int, bool] = field(default_factory=dict)
    withdrawn: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.reconciler = Reconciler(
            where="zk:2181",
            root=ROOT,
            process=f"p{len(self.world.processes)}",
            timeout=SESSION_TIMEOUT,
            random=self.world.random.random,
        )
        if self.address:
            self.world.answering.add(self.address)

    @property
    def logged(self) -> list[str]:
        return [f"{action.level}: {action.text}" for action in self.actions if isinstance(action, Say)]

    def endpoints(self, service: str = SERVICE) -> list[str]:
        return [endpoint.address for endpoint in self.snapshots[service].endpoints]

    def handle(self, event: Event) -> None:
        for action in self.reconciler.handle(event, self.world.now):
            self.actions.append(action)
            self._do(action)

    def _do(self, action: Action) -> None:
        if isinstance(action, Request):
            if self.connected:
                self.outbox.append(action)
        elif isinstance(action, Probe):
            self.inbox.append(Probed(action.service, action.address, action.address in self.world.answering))
        elif isinstance(action, Show):
            self.snapshots[action.service] = action.snapshot
        elif isinstance(action, Save):
            self.saved[action.service] = action.snapshot
        elif isinstance(action, Registered):
            self.registered[action.publication] = action.confirmed
        elif isinstance(action, Withdrawn):
            self.withdrawn.add(action.publication)
        elif isinstance(action, Replace):
            self.disconnect()

    def send_one(self) -> None:
        """Let ZooKeeper carry out the oldest request."""
        request = self.outbox.popleft()
        try:
            answer = Answer(request.token, self.world.apply(self, request.operation))
        except Refused as error:
            answer = Answer(request.token, error=str(error))
        self.inbox.append(answer)

    def handle_one(self) -> None:
        """The oldest message; or the oldest answer or watch event, as kazoo brings these by two threads."""
        lanes: dict[type, int] = {}
        for index, event in enumerate(self.inbox):
            if not isinstance(event, (Answer, Fired)):
                break
            lanes.setdefault(type(event), index)
        index = self.world.random.choice(sorted(lanes.values()) or [0])
        event = self.inbox[index]
        del self.inbox[index]
        self.handle(event)

    def tick(self) -> None:
        wakeup = self.reconciler.wakeup
        if self.running and wakeup is not None and wakeup <= self.world.now:
            self.handle(Tick())

    def publish(self, address: str = "", number: int = 1, service: str = SERVICE, **more: object) -> None:
        host, _, port = (address or self.address).rpartition(":")
        self.handle(Publish(number, (Registration(service, METHODS, host, int(port), **more),)))  # type: ignore[arg-type]

    def withdraw(self, number: int = 1) -> None:
        self.handle(Withdraw(number))

    def follow(self, service: str = SERVICE, saved: Snapshot | None = None) -> None:
        self.handle(Follow(service, METHODS, saved))

    def connect(self) -> None:
        """To the session that it had, if that still lives."""
        if self.session not in self.world.sessions:
            self.session = self.world.new_session()
        self.connected = True
        self.inbox.append(Connected(self.session, SESSION_TIMEOUT))

    def disconnect(self, *, carried_out: int = 0) -> None:
        """The connection breaks; of what was sent ZooKeeper carries out the first `carried_out`."""
        for _ in range(min(carried_out, len(self.outbox))):
            self.send_one()
        self.outbox.clear()
        self.connected = False
        self.inbox.clear()
        for watchers in self.world.watches.values():
            watchers.discard(self)
        self.inbox.append(Suspended())

    def expire(self, *, purge: bool = True) -> int:
        """The session ends; with purge=False its nodes stay until the world's `end_session`. Returns its id."""
        self.disconnect()
        session = self.session
        self.world.sessions.discard(session)
        if purge:
            self.world.end_session(session)
        return session

    def kill(self) -> int:
        """kill -9: the session stays until somebody ends it. Returns its id."""
        self.disconnect()
        self.inbox.clear()
        self.running = False
        self.world.answering.discard(self.address)
        return self.session

    def end(self, why: str) -> None:
        self.disconnect()
        self.inbox.append(Ended(why))


def _parent(path: str) -> str:
    return "" if path == "/" else path.rpartition("/")[0] or "/"
