"""Discovery through ZooKeeper: what this process publishes, and the lists of providers that it follows.

    Registry.open(config) ──► publish(registrations) ──► Publication     wait, replace, withdraw
                          └─► follow(service, methods) ─► ServiceView    snapshot, wait, on_change, report_down

Everybody in a process who names the same ZooKeeper in the same way shares one session and one thread. That thread is a
thin shell: it owns the ZooKeeper client, feeds the reconciler with what happens and carries out what that decides.
Nothing here waits for ZooKeeper but what says so, with a bound; a call reads the snapshot, an attribute, and costs
ZooKeeper nothing.

After a fork the child has a thread and a session of its own, from its first `open`, `publish` or `follow` on; what it
inherited is closed, and its inherited publications and views stand still.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import random
import socket
import threading
import time
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from mprpc.desk import (
    Connected,
    Ended,
    Follow,
    Probe,
    Probed,
    Publish,
    Registered,
    Replace,
    ReportDown,
    Request,
    Save,
    Say,
    Show,
    Snapshot,
    Suspended,
    Tick,
    Unfollow,
    Withdraw,
    Withdrawn,
)
from mprpc.errors import ConfigError, ResourceExhausted, Unavailable
from mprpc.layout import Endpoint, Registration, check_service, parse_address
from mprpc.reconciler import Reconciler
from mprpc.saved_lists import SavedLists
from mprpc.zookeeper_client import ZooKeeperClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from typing_extensions import Self

    from mprpc.config import MprpcConfig
    from mprpc.desk import Action, Event

    ProbeFunction = Callable[[str, str, float], bool]

__all__ = [
    "MAX_FOLLOWED",
    "MAX_JOBS",
    "MAX_STOPPING",
    "Endpoint",
    "Publication",
    "Registration",
    "Registry",
    "ServiceView",
    "Snapshot",
    "advertised_address",
    "connect_probe",
]

MAX_JOBS = 8
"""Probes and snapshot files under way at once. A list that vanishes is probed whole; eight at a time get through a
hundred dead endpoints in a dozen connect timeouts, and eight threads are nothing."""

MAX_FOLLOWED = 1000
"""Services that one registry follows. Each has two watches at ZooKeeper; somebody who follows names that come from
outside must not fill its memory."""

MAX_STOPPING = 4
"""Clients that were thrown away and still stop. Each has three threads; with ZooKeeper gone one is thrown away every
other session timeout and needs seconds to stop, so that more than one at a time means that something hangs for good."""

EXIT_TIMEOUT = 1.0
"""Seconds at the process's exit for sessions that nobody closed."""

_log = logging.getLogger(__name__)
_registries: weakref.WeakSet[Registry] = weakref.WeakSet()
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def connect_probe(address: str, service: str, timeout: float) -> bool:
    """Whether anybody listens at `address`: the fallback for a real probe, which asks for `service` as well."""
    try:
        socket.create_connection(parse_address(address), timeout).close()
    except OSError:
        return False
    return True


class Registry:
    """One user's hold on the discovery of a process. Any thread may call any method.

    `Registry.open(config)` shares the session with all others that name the same ZooKeeper alike; `Registry(config)`
    has a session of its own. `probe(address, service, timeout)` tells whether a provider serves the service; it is
    called on threads of its own. Raises ConfigError without `zookeeperip`.
    """

    def __init__(self, config: MprpcConfig, probe: ProbeFunction | None = None, *, shared: bool = False) -> None:
        if not config.zookeeper_hosts:
            raise ConfigError("zookeeperip: is empty, so there is no discovery; name a ZooKeeper server")
        self._config = config
        self._probe = probe
        self._shared = shared
        self._lock = threading.Lock()
        self._closed = False
        self._views: dict[str, ServiceView] = {}
        self._publications: list[Publication] = []
        self._shell = _Shell.acquire(config, probe, shared=shared)
        _registries.add(self)

    @staticmethod
    def open(config: MprpcConfig, probe: ProbeFunction | None = None) -> Registry:
        """A registry on the process's session for this ZooKeeper, which ends when its last user has closed. The last
        probe that was given is the one that is used, for all of them. Raises ConfigError."""
        return Registry(config, probe, shared=True)

    def publish(self, registrations: Sequence[Registration]) -> Publication:
        """Register, and keep registered until it is withdrawn. Returns at once; with ZooKeeper down that happens when
        it comes. Call it when the address is listened on, never before. Raises ValueError for an impossible service."""
        for registration in registrations:
            check_service(registration.service)
        publication = Publication(self._acquire_shell(), tuple(registrations))
        with self._lock:
            self._publications.append(publication)
        return publication

    def follow(self, service: str, methods: Iterable[str] = ()) -> ServiceView:
        """The list of a service's providers, kept up to date. `service` is the full proto name, `methods` those that
        may have to be looked up in the seed's layout. Returns at once; the same view for the same service. Raises
        ValueError for an impossible service, ResourceExhausted past MAX_FOLLOWED services."""
        check_service(service)
        shell = self._acquire_shell()
        with self._lock:
            view = self._views.get(service)
            if view is None:
                if len(self._views) >= MAX_FOLLOWED:
                    raise ResourceExhausted(f"{service} is one service more than the {MAX_FOLLOWED} that are followed")
                view = self._views[service] = ServiceView(shell, service)
                shell.attach(view)
        view._follow(tuple(methods))
        return view

    def close(self, timeout: float = 5.0) -> None:
        """Withdraw what is published, let go of what is followed and, as the last user, end the session. Bounded by
        `timeout` seconds with ZooKeeper up, down or silent. A second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline = time.monotonic() + timeout
        if self._shell.mine:
            for publication in self._publications:
                publication._leave()
            for publication in self._publications:
                publication.withdraw(min(timeout / 2, _left(deadline)))
            for view in self._views.values():
                self._shell.detach(view)
            self._shell.release(_left(deadline))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _acquire_shell(self) -> _Shell:
        with self._lock:
            if self._closed:
                raise Unavailable("this registry was closed")
            if not self._shell.mine:  # a child after a fork
                self._shell = _Shell.acquire(self._config, self._probe, shared=self._shared)
                self._publications, self._views = [], {}
            return self._shell


class Publication:
    """What one `publish` registered. Any thread may call any method."""

    def __init__(self, shell: _Shell, registrations: tuple[Registration, ...]) -> None:
        self._shell = shell
        self._registered = False
        self._leaving = False
        self._withdrawn = False
        self.number = shell.add_publication(self)
        shell.post(Publish(self.number, registrations))

    @property
    def registered(self) -> bool:
        """Whether every node was seen in ZooKeeper in the present session."""
        return self._registered

    def wait(self, timeout: float) -> bool:
        """Wait until everything is registered and seen; False when it isn't within `timeout` seconds, and at once in a
        forked child."""
        return self._shell.wait_for(lambda: self._registered, timeout)

    def replace(self, registrations: Sequence[Registration]) -> None:
        """Publish these instead. Returns at once; what changes of an instance changes in one transaction."""
        if not self._leaving:
            self._shell.post(Publish(self.number, tuple(registrations)))

    def withdraw(self, timeout: float) -> None:
        """Delete the nodes, the seed's as well, and wait for that, at most `timeout` seconds and not at all without a
        connection: then they go with the session."""
        self._leave()
        self._shell.wait_for(lambda: self._withdrawn or not self._shell.connected, timeout)

    def _leave(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._shell.post(Withdraw(self.number))


class ServiceView:
    """The list of one service's providers. Any thread may call any method."""

    def __init__(self, shell: _Shell, service: str) -> None:
        self._shell = shell
        self._callbacks: list[Callable[[Snapshot], None]] = []
        self.service = service
        self.snapshot = Snapshot()
        """The newest list; reading it is all that a call needs."""

    def wait(self, timeout: float, *, for_provider: bool = False) -> Snapshot:
        """The first list, waited for at most `timeout` seconds; later calls return at once.

        Raises Unavailable (not_run), which says what is missing: the list, or any provider in it. `for_provider` waits
        for the latter, too.
        """
        self._shell.wait_for(lambda: bool(self.snapshot.endpoints if for_provider else self.snapshot.version), timeout)
        snapshot = self.snapshot
        if not snapshot.version:
            where = self._shell.where
            raise Unavailable(
                f"ZooKeeper {where} did not say within {timeout:g} s who provides {self.service}", not_run=True
            )
        if not snapshot.endpoints:
            raise Unavailable(snapshot.note, not_run=True)
        return snapshot

    def on_change(self, callback: Callable[[Snapshot], None]) -> None:
        """Have `callback(snapshot)` called for each new list, on the registry's thread: it must not block."""
        self._callbacks.append(callback)

    def report_down(self, address: str) -> None:
        """Tell that a caller could not reach `address`. The list is looked at again if that seems worth it."""
        self._shell.post(ReportDown(self.service, address))

    def _follow(self, methods: tuple[str, ...]) -> None:
        self._shell.post(
            Follow(self.service, methods, None if self.snapshot.version else self._shell.saved(self.service))
        )

    def _show(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        for callback in tuple(self._callbacks):
            try:
                callback(snapshot)
            except Exception:
                _log.exception("a callback for the providers of %s failed", self.service)


class _Shell:
    """The reconciler's thread with its client, and those who use them."""

    _shared: ClassVar[dict[object, _Shell]] = {}
    _all: ClassVar[weakref.WeakSet[_Shell]] = weakref.WeakSet()
    _class_lock: ClassVar[threading.Lock] = threading.Lock()
    _exit_pid: ClassVar[int] = 0

    def __init__(self, config: MprpcConfig, key: object) -> None:
        self.where = config.zookeeper_hosts
        self.connected = False
        self._config = config
        self._probe: ProbeFunction = connect_probe
        self._key = key
        self._pid = os.getpid()
        self._users = 0
        self._changed = threading.Condition()
        self._publications: dict[int, Publication] = {}
        self._last_number = 0
        self._views: dict[str, list[ServiceView]] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._events: queue.SimpleQueue[tuple[int, Event] | None] = queue.SimpleQueue()
        self._jobs = _Jobs()
        self._saved_lists: SavedLists | None = None
        if config.snapshot_dir:
            self._saved_lists = SavedLists(config.snapshot_dir, where=self.where, root=config.root)
        self._generation = 0
        self._client_id: tuple[int, bytes] | None = None
        self._stopping: list[threading.Thread] = []
        self._stop_by = 0.0
        self._reconciler = Reconciler(
            where=self.where,
            root=config.root,
            process=os.urandom(16).hex(),
            timeout=config.session_timeout,
            random=random.random,
            utc_offset=time.time() - time.monotonic(),
        )
        self._client = self._make_client()
        self._thread = threading.Thread(target=self._run, name="mprpc-registry", daemon=True)

    # Users; any thread.

    @classmethod
    def acquire(cls, config: MprpcConfig, probe: ProbeFunction | None, *, shared: bool) -> _Shell:
        key = _key(config) if shared else None
        with cls._class_lock:
            shell = cls._shared.get(key) if shared else None
            if shell is None:
                shell = cls(config, key)
                shell._start()
                cls._mind_exit()
                cls._all.add(shell)
                if shared:
                    cls._shared[key] = shell
            shell._users += 1
            shell._probe = probe or shell._probe
            return shell

    def release(self, timeout: float) -> None:
        with self._class_lock:
            self._users -= 1
            if self._users:
                return
            if self._shared.get(self._key) is self:
                del self._shared[self._key]
            self._all.discard(self)
        self.stop(timeout)

    @classmethod
    def _mind_exit(cls) -> None:
        """Once in each process: in a worker process what its parent has registered does not run."""
        if cls._exit_pid != os.getpid():
            cls._exit_pid = os.getpid()
            atexit.unregister(_Shell.at_exit)
            atexit.register(_Shell.at_exit)

    @property
    def mine(self) -> bool:
        """Whether this process made it, and not the one that it was forked from."""
        return self._pid == os.getpid()

    def _start(self) -> None:
        self._client.start()
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread and the session, within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        self._stop_by = deadline
        self._events.put(None)
        self._thread.join(timeout)
        for thread in self._stopping:
            thread.join(_left(deadline))

    def post(self, event: Event) -> None:
        self._events.put((0, event))

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        if not self.mine:
            return False
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def add_publication(self, publication: Publication) -> int:
        with self._changed:
            self._last_number += 1
            self._publications[self._last_number] = publication
            return self._last_number

    def attach(self, view: ServiceView) -> None:
        with self._changed:
            self._views.setdefault(view.service, []).append(view)
            view.snapshot = self._snapshots.get(view.service, view.snapshot)

    def detach(self, view: ServiceView) -> None:
        with self._changed:
            views = self._views.get(view.service, [])
            if view in views:
                views.remove(view)
            if not views and self._views.pop(view.service, None) is not None:
                self._snapshots.pop(view.service, None)
                self.post(Unfollow(view.service))

    def saved(self, service: str) -> Snapshot | None:
        return None if self._saved_lists is None else self._saved_lists.read(service)

    # The registry's thread.

    def _run(self) -> None:
        while True:
            try:
                item = self._events.get(timeout=self._patience())
            except queue.Empty:
                item = (0, Tick())
            if item is None:
                break
            generation, event = item
            if generation in (0, self._generation):
                self._handle(event)
        self._client.stop(_left(self._stop_by))

    def _patience(self) -> float | None:
        wakeup = self._reconciler.wakeup
        return None if wakeup is None else max(wakeup - time.monotonic(), 0.0)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Connected):
            self._client_id = self._client.client_id or self._client_id
        if isinstance(event, (Connected, Suspended, Ended)):
            self._notify(partial(setattr, self, "connected", isinstance(event, Connected)))
        try:
            for action in self._reconciler.handle(event, time.monotonic()):
                self._carry_out(action)
        except Exception:  # a mistake of ours must not end the discovery of a process
            _log.exception("the registry failed at %s", type(event).__name__)

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Request):
            self._client.execute(action)
        elif isinstance(action, Say):
            _log.log(_LEVELS[action.level], "%s", action.text)
        elif isinstance(action, Show):
            self._show(action)
        elif isinstance(action, Registered):
            self._tell(action.publication, "_registered", action.confirmed)
        elif isinstance(action, Withdrawn):
            self._tell(action.publication, "_withdrawn", True)
            with self._changed:
                self._publications.pop(action.publication, None)
        elif isinstance(action, Probe):
            self._jobs.add(partial(self._run_probe, action))
        elif isinstance(action, Save):
            self._save(action)
        elif isinstance(action, Replace):
            self._replace(action.why)

    def _notify(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    def _tell(self, number: int, what: str, value: bool) -> None:
        publication = self._publications.get(number)
        if publication is not None:
            self._notify(partial(setattr, publication, what, value))

    def _show(self, action: Show) -> None:
        with self._changed:
            views = tuple(self._views.get(action.service, ()))
            if views:
                self._snapshots[action.service] = action.snapshot
        for view in views:
            view._show(action.snapshot)
        self._notify(_nothing)

    def _run_probe(self, action: Probe) -> None:
        alive = self._probe(action.address, action.service, self._config.connect_timeout)
        self.post(Probed(action.service, action.address, alive))

    def _save(self, action: Save) -> None:
        if self._saved_lists is not None:
            self._saved_lists.put(action.service, action.snapshot)
            self._jobs.add(self._saved_lists.write)

    def _make_client(self) -> ZooKeeperClient:
        self._generation += 1
        generation = self._generation
        return ZooKeeperClient(self._config, lambda event: self._events.put((generation, event)), self._client_id)

    def _replace(self, why: str) -> None:
        self._stopping = [thread for thread in self._stopping if thread.is_alive()]
        if len(self._stopping) >= MAX_STOPPING:
            _log.error("%d ZooKeeper clients hang in stopping; keeping the present one", len(self._stopping))
            return
        _log.warning("a new ZooKeeper client for %s: %s", self.where, why)
        thread = threading.Thread(target=self._client.abandon, name="mprpc-registry-stop", daemon=True)
        thread.start()
        self._stopping.append(thread)
        self._client = self._make_client()
        self._client.start()

    # At the ends of the process.

    @classmethod
    def after_fork(cls) -> None:
        """In the child: the parent's sessions are the parent's."""
        shells, cls._all = list(cls._all), weakref.WeakSet()
        cls._shared = {}
        cls._class_lock = threading.Lock()
        for registry in list(_registries):
            registry._lock = threading.Lock()
        for shell in shells:
            shell._client.forget()

    @classmethod
    def at_exit(cls) -> None:
        deadline = time.monotonic() + EXIT_TIMEOUT
        for shell in list(cls._all):
            if shell.mine:
                shell.stop(_left(deadline))


class _Jobs:
    """Runs jobs on up to MAX_JOBS daemon threads, which end when there is nothing left to do. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Callable[[], None]] = deque()
        self._threads = 0

    def add(self, job: Callable[[], None]) -> None:
        with self._lock:
            self._waiting.append(job)
            if self._threads >= MAX_JOBS:
                return
            self._threads += 1
        threading.Thread(target=self._work, name="mprpc-registry-job", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                job = self._waiting.popleft()
            try:
                job()
            except Exception:
                _log.exception("a job of the registry failed")


def advertised_address(config: MprpcConfig, host: str, port: int) -> tuple[str, int]:
    """The address that callers are told, for a provider that listens on `host` and `port`.

    `advertise_ip` and `advertise_port` where they are set. Else the address that is listened on, where that is one; for
    all interfaces (0.0.0.0, ::) that of the one which reaches ZooKeeper, or the default route without one. A host name
    is looked up; this can take as long as the name service does. Any thread.
    """
    port = config.advertise_port or port
    if config.advertise_ip:
        return config.advertise_ip, port
    family, address = _resolve(host, port)
    if address not in ("0.0.0.0", "::"):
        return address, port
    return _route(config, family), port


def _resolve(host: str, port: int) -> tuple[int, str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"rpcserverip={host}: can't be looked up ({error}); set advertise_ip") from None
    return int(found[0][0]), str(found[0][4][0])


def _route(config: MprpcConfig, family: int) -> str:
    """The own address of the route to ZooKeeper. Connecting a datagram socket sends nothing."""
    targets = [parse_address(item) for item in config.zookeeper_hosts.split(",") if item]
    targets += (
        [("192.0.2.1", 9)] if family == socket.AF_INET else [("192.0.2.1", 9), ("2001:db8::1", 9)]
    )  # RFC 5737, 3849
    for target in targets:
        for item in _lookup(*target):
            if family == socket.AF_INET and item[0] != family:
                continue
            with socket.socket(item[0], socket.SOCK_DGRAM) as probe:
                try:
                    probe.connect(item[1])
                except OSError:
                    continue
                return str(probe.getsockname()[0])
    raise ConfigError("advertise_ip: must be set, as all interfaces are listened on and no route leads anywhere")


def _lookup(host: str, port: int) -> list[tuple[int, tuple[str, int]]]:
    try:
        return [
            (int(item[0]), (str(item[4][0]), port)) for item in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        ]
    except OSError:
        return []


def _key(config: MprpcConfig) -> object:
    """Who may share a session: those whose ZooKeeper, credentials and root are the same."""
    return tuple(
        getattr(config, name)
        for name in (
            "zookeeper_hosts", "zookeeper_auth", "zookeeper_acl", "zookeeper_tls_ca", "zookeeper_tls_cert",
            "zookeeper_tls_key", "zookeeper_sasl", "root", "session_timeout", "snapshot_dir",
        )
    )  # fmt: skip


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)


def _nothing() -> None:
    """For those who only want the others notified."""


os.register_at_fork(after_in_child=_Shell.after_fork)
