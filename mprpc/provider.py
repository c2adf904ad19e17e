"""The provider: publishes services, answers calls.

A turn of a loop (`_loop.c`) returns all requests that are there, `_serve.c` parses them, runs their handlers and gives
all replies to the next turn. So the interpreter's lock is let go once a turn, not once a system call; and what is no
plain response comes to this module. A handler runs on the thread that turns its loop; while one takes long, another
thread goes on with the loop (`crew.py`), and a method that is known to take long runs on a thread of its own. A handler
may also return a Future and resolve it from another thread, or be `async def`: those run on an event loop of the
provider's (`coroutines.py`).

Rules: every request is answered exactly once; what a handler raises becomes its own call's error and nothing else;
services are published before the loops start and don't change after.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
import weakref
from itertools import count
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError

from mprpc._native import ffi, lib
from mprpc.config import MprpcConfig
from mprpc.controller import MprpcController
from mprpc.crew import Crew
from mprpc.detached import DetachedCalls
from mprpc.errors import ConfigError, RpcError, Status
from mprpc.fast import native
from mprpc.incidents import of_loops
from mprpc.late import importing
from mprpc.service import MethodEntry, methods_of
from mprpc.signals import SignalHandlers

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType, TracebackType

    from mprpc.coroutines import Coroutines
    from mprpc.limiter import Limiter
    from mprpc.registry import Publication, Registry
    from mprpc.statistics import ProviderStatistics
    from mprpc.workers import Supervisor, Worker

__all__ = ["RpcProvider"]

_log = logging.getLogger("mprpc.provider")

_BACKLOG = 4096  # connections waiting to be accepted: a herd after a restart; the kernel cuts it to somaxconn
_CANCELS = 64  # cancelled calls taken from C at once
_LOG_BURST = 10  # lines a second about bad peers; more are counted in one line
_SETTLE = 100_000_000  # ns for which consumers that only now hear of the end still find somebody who says "not run"
_JOIN = 1.0  # seconds beyond the grace that stop() waits for a loop's thread
_NS = 1_000_000_000
_LATE = 0.05  # seconds after its deadline until a Future is given up: by then its caller has said so itself
_KEEP = 0.9  # of a switch interval for which a loop keeps the interpreter's lock beside a thread that computes


class RpcProvider:
    """Serves protobuf services on one address and keeps them published in ZooKeeper.

        with RpcProvider(MprpcConfig(rpcserverport=8000)) as provider: …      # or start() and stop()
        provider.run()                                                        # until SIGTERM or Ctrl-C

    With the key `workers` over 1 it is run() alone that starts it: that forks so many processes, each of which serves.
    Without `zookeeperip` in the configuration it serves and registers nowhere. All methods: any thread.
    """

    def __init__(self, config: MprpcConfig | None = None) -> None:
        self._config = MprpcConfig() if config is None else config
        self._entries: list[MethodEntry] = []
        self._lock = threading.RLock()
        self._loops: list[_Loop] = []
        self._crew: Crew | None = None
        self._placement: Any = None  # the loops point to it
        self._address = ""
        self._registry: Registry | None = None
        self._publication: Publication | None = None
        self._embedded: Any = None
        self._coroutines: Coroutines | None = None
        self._coroutines_lock = threading.Lock()
        self._stopped = threading.Event()
        self._turn = count()
        self._wakeup: socket.socket | None = None
        self._supervisor: Supervisor | None = None
        self._worker: Worker | None = None
        _providers.add(self)

    def notify_service(self, service: object) -> None:
        """Publishes a service: an instance of a class derived from a generated one. Before start().

        Raises TypeError for what can't be published, ValueError for a service whose short name (the last part, all
        that the seed's znodes and wire know) another one has, RuntimeError once the provider has started.
        """
        entries = methods_of(service)
        with self._lock:
            if self._loops:
                raise RuntimeError("the provider has started: publish all services before start() or run()")
            for new in entries[:1]:
                self._refuse_duplicate(new)
            self._entries += entries

    def _refuse_duplicate(self, new: MethodEntry) -> None:
        for entry in self._entries:
            if entry.short_service == new.short_service:
                raise ValueError(
                    f"{new.service} can't be published beside {entry.service}: a service is also known by its short"
                    f" name, {new.short_service}, which must be one service's alone; publish it on another provider"
                )

    @property
    def address(self) -> str:
        """Where it listens, `host:port` (the real port), `unix:/path` or `memory:name`; empty before start()."""
        return self._address

    def incidents(self) -> dict[str, int]:
        """How often what went wrong on connections, by kind (`incidents.py` says what each means), since start()."""
        return of_loops(loop.handle for loop in self._loops)

    def start(self) -> None:
        """Listens, starts the loops' threads, begins to register; returns when calls can come.

        Raises ConfigError when the address can't be listened on, and with `workers`, which only run() makes;
        RuntimeError when it has been started before.
        """
        with self._lock:
            self._check_new()
            if self._config.workers > 1:
                raise ConfigError(
                    f"workers={self._config.workers}: only run() makes worker processes; start() and `with` serve in"
                    " this one, so leave workers out"
                )
            if _is_within(self._config.rpcserverip):
                self._serve_within()
            else:
                listener = _listen(self._config)
                self._address = _address_of(listener)
                self._start_loops(listener, None)
            self._say_serving(self._address)
            if self._config.zookeeper_hosts:
                if self._config.zookeeper == "embedded":
                    self._start_embedded()
                self._register(self._address)

    def _check_new(self) -> None:
        if self._loops or self._stopped.is_set():
            raise RuntimeError("a provider starts once: make another one")

    def _say_serving(self, address: str) -> None:
        _log.info("serving %s on %s", ", ".join(sorted({e.service for e in self._entries})), address)

    def _serve_within(self) -> None:
        from mprpc import memory

        self._address = self._config.rpcserverip
        memory.listen(self._address, self._adopt)
        self._start_loops(None, None)

    def _adopt(self, end: Any) -> bool:
        """Takes over one end of a connection within the process. Any thread."""
        turn = next(self._turn) % self._config.loops
        return bool(self._loops) and lib.mprpc_loop_adopt(self._loops[turn].handle, end) == 0

    def _start_loops(self, listener: socket.socket | None, worker: Worker | None) -> None:
        try:
            self._make_loops(listener, worker)
        except BaseException:
            _switching.restore(self)
            if listener is not None:
                listener.close()
            raise

    def _make_loops(self, listener: socket.socket | None, worker: Worker | None) -> None:
        services = ffi.gc(lib.mprpc_services_new(), lib.mprpc_services_free)
        for index, entry in enumerate(self._entries):
            name = entry.name.encode()
            for service in {entry.service, entry.short_service}:
                lib.mprpc_services_add(services, service.encode(), len(service.encode()), name, len(name), index)
        paces = ffi.new("struct mprpc_pace[]", len(self._entries) + 1)
        _switching.shorten(self, self._config.switch_interval)
        loops = [
            _Loop(self._config, services, self._entries, paces, self._run_coroutines, self._queue)
            for _ in range(self._config.loops)
        ]
        handles = ffi.new("struct mprpc_loop *[]", [loop.handle for loop in loops])
        failed = self._place(handles)
        if listener is not None and not failed:
            failed = lib.mprpc_loop_listen(loops[0].handle, listener.fileno(), handles, len(loops))
        if worker is not None and not failed:
            failed = _share(loops[0].handle, handles, worker)
        if failed:
            raise ConfigError(f"can't listen on {self._address}: {os.strerror(ffi.errno)}")
        if listener is not None:
            listener.detach()
        self._loops = loops
        self._crew = Crew(loops, self._config.handler_threads, self._config.max_queued)
        self._crew.start()

    def _place(self, loops: Any) -> int:
        if len(loops) == 1:
            return 0
        self._placement = ffi.new("struct mprpc_placement *")
        lib.mprpc_placement_init(self._placement, len(loops))
        return int(lib.mprpc_loop_place(loops, len(loops), self._placement))

    def _queue(self, job: Callable[[], None]) -> bool:
        return self._crew is not None and self._crew.queue(job)

    def _run_coroutines(self) -> Coroutines:
        with importing:
            from mprpc.coroutines import Coroutines
        with self._coroutines_lock:
            if self._coroutines is None:
                self._coroutines = Coroutines()
            return self._coroutines

    def _register(self, own: str) -> None:
        """Publishes `own`, the address that this process alone listens on."""
        with importing:
            from mprpc.probe import probe
            from mprpc.registry import Registration, Registry

        if own.startswith(("unix:", "memory:")):
            _log.warning("%s is registered nowhere: ZooKeeper's readers can't reach it", own)
            return
        host, port, shared = self._advertised(own)
        services: dict[str, list[str]] = {}
        for entry in self._entries:
            services.setdefault(entry.service, []).append(entry.name)
        self._registry = Registry.open(self._config, probe)
        self._publication = self._registry.publish(
            [
                Registration(
                    service=service,
                    methods=tuple(methods),
                    host=host,
                    port=port,
                    weight=self._config.weight,
                    zone=self._config.zone,
                    tags=self._config.tags,
                    shared=shared,
                    heir=self._worker is None or self._worker.number == 0,
                )
                for service, methods in services.items()
            ]
        )

    def _advertised(self, own: str) -> tuple[str, int, str]:
        """Host and port that callers are told, and the address that workers share; advertise_port is of the latter."""
        from mprpc.registry import advertised_address

        config, (host, port) = self._config, _host_and_port(own)
        if self._worker is None:
            return *advertised_address(config, host, port), ""
        shared_host, shared_port = advertised_address(config, *_host_and_port(self._address))
        shared = f"[{shared_host}]:{shared_port}" if ":" in shared_host else f"{shared_host}:{shared_port}"
        return *advertised_address(config.replace(advertise_port=0), host, port), shared

    def _start_embedded(self) -> None:
        from mprpc.embedded_zookeeper import start_unless_answering

        host, _, port = self._config.zookeeper_hosts.split(",")[0].rpartition(":")
        self._embedded = start_unless_answering(host.strip("[]"), int(port))

    def wait_registered(self, timeout: float) -> bool:
        """Waits, at most `timeout` seconds, until ZooKeeper has confirmed all registrations; whether it has.

        True at once where nothing is to be registered.
        """
        publication = self._publication
        return publication is None or publication.wait(timeout)

    def stop(self, grace: float | None = None) -> None:
        """Leaves: nodes deleted, GOAWAY to all connections, calls in flight finished, connections closed.

        `grace`: seconds for the calls in flight, by default the key `drain_timeout`. Bounded, whatever ZooKeeper does;
        a second call waits for the first, and makes it quicker when its grace is shorter.
        """
        grace = self._config.drain_timeout if grace is None else grace
        if self._stopped.is_set():
            self._hurry(grace)
        with self._lock:
            first = not self._stopped.is_set()
            self._stopped.set()
            if self._supervisor is not None:
                self._supervisor.stop()
            elif first:
                self._leave(time.monotonic() + grace)
        self._wake()

    def _leave(self, deadline: float) -> None:
        if self._publication is not None:
            self._publication.withdraw(max(0.1, deadline - time.monotonic()))
        self._hurry(max(0.0, deadline - time.monotonic()))
        if self._crew is not None:
            self._wait_for_loops(self._crew, deadline + _JOIN)
        _switching.restore(self)
        if self._coroutines is not None:
            self._coroutines.stop()
        if self._registry is not None:
            self._registry.close()
        if self._embedded is not None:
            self._embedded.stop()
        if self._address.startswith("unix:") and self._worker is None:
            _remove_socket(self._address[5:])
        elif _is_within(self._address):
            from mprpc import memory

            memory.ignore(self._address)

    def _wait_for_loops(self, crew: Crew, deadline: float) -> None:
        if crew.is_alive() and not crew.is_member():  # a handler's own answer may be what its loop waits for
            for loop in self._loops:
                loop.ended.wait(max(0.0, deadline - time.monotonic()))
        crew.stop(max(_JOIN / 10, deadline - time.monotonic()))

    def _hurry(self, grace: float) -> None:
        for loop in self._loops:
            lib.mprpc_loop_stop(loop.handle, int(grace * _NS), _SETTLE if self._publication is not None else 0)

    def statistics(self) -> ProviderStatistics:
        """What became of all calls since the start, by method: how many, errors, latency; connections; threads."""
        from mprpc.statistics import provider_statistics

        names = [f"{entry.service}.{entry.name}" for entry in self._entries]
        crew = ffi.new("struct mprpc_crew_statistics *") if self._crew is None else self._crew.statistics()
        return provider_statistics([loop.handle for loop in self._loops], names, crew)

    def run(self) -> None:
        """Starts, unless it has started, and serves until SIGTERM, SIGINT or stop(); a second signal stops at once.

        On the main thread it handles both signals, and restores their handlers after; on another it waits for stop().
        With the key `workers` over 1 this process serves nothing itself: it forks so many that do, replaces those that
        die, restarts them one by one at SIGHUP, and returns when all have ended; main thread only. Raises as start().
        """
        if self._config.workers > 1:
            self._supervise()
            return
        if not self._loops:
            self.start()
        if threading.current_thread() is threading.main_thread():
            self._run_with_signals()
        else:
            self._stopped.wait()

    def _run_with_signals(self) -> None:
        # A pair of sockets: an Event must not be set by the handler of a signal that came while it was waited on.
        waker, self._wakeup = socket.socketpair()
        handlers = SignalHandlers(self._on_signal, (signal.SIGTERM, signal.SIGINT), self._wakeup)
        try:
            if not self._stopped.is_set():  # stop() sets it before it looks for what to wake
                waker.recv(1)
            self.stop()
        finally:
            handlers.restore()
            self._wakeup.close()
            self._wakeup = None
            waker.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopped.is_set():
            self._hurry(0)

    def _wake(self) -> None:
        wakeup = self._wakeup  # run() may take it away meanwhile
        try:
            if wakeup is not None:
                wakeup.send(b"\0")
        except OSError:
            _log.debug("run() is awake already")

    # ---- worker processes ----

    def _supervise(self) -> None:
        from mprpc.workers import Shared, Supervisor

        config = self._config
        with self._lock:
            self._check_new()
            if config.zookeeper_hosts:
                from mprpc.zookeeper_client import load_kazoo

                load_kazoo()  # once here, not in each process
            listener = _listen(config)
            self._address = _address_of(listener)
            embedded = self._embed if config.zookeeper == "embedded" else None
            shared = Shared(listener, 2 * config.workers)
            self._supervisor = Supervisor(shared, config.workers, self._work, embedded, config.drain_timeout)
        self._say_serving(self._address)
        try:
            self._supervisor.run()
        finally:
            self._stopped.set()
            listener.close()
            if self._address.startswith("unix:"):
                _remove_socket(self._address[5:])

    def _work(self, worker: Worker) -> None:
        """A worker's life, in its process."""
        self._supervisor, self._worker = None, worker
        worker.hurry = lambda: self._hurry(0)
        own = ""
        listener = self._own_listener()
        if listener is not None:
            own = _address_of(listener)
        self._start_loops(listener, worker)
        worker.said("serving")
        if self._config.zookeeper_hosts:
            self._register(own or self._address)
        threading.Thread(target=self._tell_when_registered, name="mprpc-worker", daemon=True).start()
        worker.wait()
        self.stop()

    def _own_listener(self) -> socket.socket | None:
        """Beside the shared one, where there is somebody to be told of it."""
        config = self._config
        if config.rpcserverip.startswith("unix:") or not (config.zookeeper_hosts or config.worker_port):
            return None
        if not config.worker_port:
            return _listen(config.replace(rpcserverport=0))
        for port in range(config.worker_port, config.worker_port + 2 * config.workers):
            try:
                return _listen(config.replace(rpcserverport=port))
            except ConfigError as error:
                failed = error
        raise failed

    def _tell_when_registered(self) -> None:
        worker = self._worker
        while worker is not None and not self._stopped.is_set():
            if self.wait_registered(3600.0):
                worker.said("registered")
                return

    def _embed(self, worker: Worker) -> None:
        """The embedded ZooKeeper's life, in its process."""
        self._supervisor = None
        try:
            self._start_embedded()
        except OSError as error:
            raise ConfigError(f"no ZooKeeper can be started at {self._config.zookeeper_hosts}: {error}") from None
        worker.said("serving" if self._embedded is not None else "needless")
        if self._embedded is not None:
            worker.wait()
            self._embedded.stop()

    def _forget_forked(self) -> None:
        """In a forked child: it serves in the process that started it, and here no longer."""
        self._lock, self._coroutines_lock = threading.RLock(), threading.Lock()
        if not self._loops:
            return
        if self._coroutines is not None:
            self._coroutines.forget_forked()
        self._loops, self._coroutines, self._crew = [], None, None
        self._registry = self._publication = self._embedded = None
        self._stopped = threading.Event()
        self._stopped.set()
        if self._wakeup is not None:
            self._wakeup.close()
            self._wakeup = None

    def __enter__(self) -> RpcProvider:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # The seed's spellings.

    def NotifyService(self, service: object) -> None:
        """`notify_service`."""
        self.notify_service(service)

    def Run(self) -> None:
        """`run`."""
        self.run()


class _Switching:
    """The interpreter's switch interval: the shortest that a started provider asks for, then what it was before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[RpcProvider, float] = {}
        self._before = 0.0

    def shorten(self, provider: RpcProvider, seconds: float) -> None:
        """0 asks for nothing."""
        if seconds:
            with self._lock:
                if not self._asked:
                    self._before = sys.getswitchinterval()
                self._asked[provider] = seconds
                self._set()

    def restore(self, provider: RpcProvider) -> None:
        with self._lock:
            if self._asked.pop(provider, 0.0):
                self._set()

    def _set(self) -> None:
        sys.setswitchinterval(min([self._before, *self._asked.values()]))


_switching = _Switching()


class _Loop:
    """One loop. One thread of the crew leads it at a time."""

    def __init__(
        self,
        config: MprpcConfig,
        services: Any,
        entries: list[MethodEntry],
        paces: Any,
        coroutines: Callable[[], Coroutines],
        queue: Callable[[Callable[[], None]], bool],
    ) -> None:
        limits = ffi.new("struct mprpc_limits *")
        limits.frame_timeout = int(config.frame_timeout * _NS)
        limits.idle_timeout = int(config.idle_timeout * _NS)
        limits.payload_max = config.max_payload
        limits.output_max = config.max_output
        limits.connections_max = config.max_connections
        limits.calls_max = config.max_in_flight
        limits.input_max = max(1, config.max_input // config.loops)
        limits.classic = config.classic
        handle = lib.mprpc_loop_new(services, limits, "MPRPC_POLL" in os.environ)
        if handle == ffi.NULL:
            raise ConfigError(f"no loop can be made: {os.strerror(ffi.errno)}")
        self.handle = ffi.gc(handle, lib.mprpc_loop_free)
        self._limiters = _limiters(handle, entries, config.adaptive_limit)
        self._detached: DetachedCalls[_Later] = DetachedCalls(self._remind)
        self._coroutines = coroutines
        self._queue_job = queue
        self._services, self._paces = services, paces  # the loop and the server point into them
        self._max_payload = config.max_payload
        self._lines = _Lines()
        self._parting = threading.Condition()  # a controller's _later comes
        self.ended = threading.Event()
        self._controllers = type(
            "ServerController", (native.Controller, _ServerController), {"_loop": self, "__slots__": ()}
        )
        methods = tuple(
            (e, e.request_class.FromString, e.handler, e.response_class, e.response_class.SerializeToString, e.blocking)
            for e in entries
        )
        self.server = native.Server(
            self,
            _address(self.handle),
            _address(paces),
            methods,
            self._controllers,
            Status.OK,
            config.max_payload,
            int(sys.getswitchinterval() * _KEEP * _NS),
        )

    def lead(self, member: Any) -> None:
        """Turns it on this thread until it has stopped, or another one leads: then this thread's call is answered."""
        if self.server.lead(_address(member)):
            self.ended.set()

    # ---- what is not a plain response: _serve.c calls these ----

    def _notice(self) -> None:
        self._log_incidents()
        self._cancel_calls()
        self._expire_calls()
        if self._limiters:
            self._adapt()

    def _raised(self, i: int, entry: MethodEntry, error: BaseException, parsing: bool) -> None:
        self._fail(i, _error_of(entry, error, parsing=parsing))

    def _refuse(self, i: int, size: int) -> None:
        self._fail(i, _too_large(size, self._max_payload))

    def _fail(self, i: int, error: RpcError, not_run: bool = False) -> None:
        text = error.text.encode(errors="replace")
        lib.mprpc_loop_fail(self.handle, i, error.status, not_run, text, len(text), error.details, len(error.details))

    def _settle(self, i: int, entry: MethodEntry, controller: _ServerController, response: Any) -> None:
        if controller.failed():
            _discard(response)
            self._fail(i, controller._error())
        elif _is_future(response) or hasattr(response, "__await__"):
            self._follow(response, self._detach(i, entry, controller))
        else:
            self._fail(i, _wrong_type(entry, response))

    def _follow(self, response: Any, later: _Later) -> None:
        """Answers when the Future or the coroutine has ended."""
        if _is_future(response):
            deadline = later.controller._deadline
            self._detached.promise(later, None if deadline is None else deadline + _LATE)
            try:
                response.add_done_callback(lambda future: self._ended(later, future))
            except BaseException as error:  # it is none
                if self._detached.fulfil(later):
                    later.finish(None, error)
            if later.controller.is_canceled():  # before it was promised
                self._abandon(later)
            return
        coroutines = self._coroutines()
        if coroutines.is_full():
            _discard(response)
            later.refuse(RpcError(Status.RESOURCE_EXHAUSTED, "too many async handlers are under way"))
        else:
            coroutines.run(response, later.controller, later.finish)

    def _ended(self, later: _Later, future: Any) -> None:
        """A handler's Future has. Any thread."""
        if self._detached.fulfil(later):
            later.finish(*_outcome(future))
        else:
            self.outcome_of(later.entry, later.controller, *_outcome(future))  # which logs a mistake

    def _abandon(self, later: _Later) -> None:
        """Its caller has given up: the call ends, whether or not its Future ever does."""
        if self._detached.abandon(later):
            later.answer(RpcError(Status.CANCELLED, "the caller gave up"))

    def _remind(self, at: float) -> None:
        lib.mprpc_loop_remind(self.handle, int(at * _NS) + 1)

    def _expire_calls(self) -> None:
        """Their Futures have not ended in time."""
        for later in self._detached.expired(time.monotonic()):
            later.controller._cancel()
            later.answer(RpcError(Status.DEADLINE_EXCEEDED, "the handler's Future had not ended at the deadline"))

    def _detach(self, i: int, entry: MethodEntry, controller: _ServerController) -> _Later:
        """Lets go of a request that is answered later, on any thread."""
        name, deadline = ffi.new("char[]", lib.MPRPC_PEER_MAX), lib.mprpc_loop_deadline(self.handle, i)
        lib.mprpc_loop_peer(self.handle, i, name)
        controller._peer = ffi.string(name).decode()
        controller._deadline = deadline / _NS if deadline else None
        controller._attempt = lib.mprpc_loop_attempt(self.handle, i)
        ticket = ffi.new("struct mprpc_ticket *")
        lib.mprpc_loop_detach(self.handle, i, ticket)
        later = _Later(self, entry, controller, ticket)
        self._detached.add(later)
        return later

    # ---- what takes long ----

    def _queue(self, i: int, method: int, entry: MethodEntry, arguments: bytes) -> None:
        """A method that takes long is called: a thread of its own runs it."""
        later = self._detach(i, entry, self._controllers())
        if not self._queue_job(lambda: self._run_job(method, arguments, later)):
            text = "no thread is free for handlers that take long: handler_threads are busy and max_queued calls wait"
            self._lines.warn(f"{entry.service}.{entry.name} refuses a call: {text}")
            later.refuse(RpcError(Status.RESOURCE_EXHAUSTED, text))

    def _run_job(self, method: int, arguments: bytes, later: _Later) -> None:
        if later.controller.is_canceled():
            later.refuse(RpcError(Status.CANCELLED, "the caller gave up before the handler started"))
        elif later.controller.time_remaining() == 0.0:
            later.refuse(RpcError(Status.DEADLINE_EXCEEDED, "the deadline passed before the handler started"))
        else:
            self._conclude(later, *self._outcome_of_job(method, arguments, later))

    def _outcome_of_job(self, method: int, arguments: bytes, later: _Later) -> tuple[Any, BaseException | None]:
        try:
            request = later.entry.request_class.FromString(arguments)
        except BaseException as error:
            return None, _error_of(later.entry, error, parsing=True)
        try:
            return self.server.run_job(method, request, later.controller), None
        except BaseException as error:
            return None, error

    def _conclude(self, later: _Later, response: Any, error: BaseException | None) -> None:
        """A handler has ended on a thread that does not lead."""
        pending = error is None and (_is_future(response) or hasattr(response, "__await__"))
        if pending and not later.controller.failed():
            self._follow(response, later)
        else:
            _discard(response)
            later.finish(response, error)

    def _take_over(self, i: int, entry: MethodEntry, controller: _ServerController) -> None:
        """This thread leads now: the one before it is running that handler."""
        later = self._detach(i, entry, controller)
        with self._parting:
            controller._later = later
            self._parting.notify_all()

    def _relieved(
        self, entry: MethodEntry, controller: _ServerController, response: Any, error: BaseException | None
    ) -> None:
        """This handler has returned on a thread that leads no more."""
        self._conclude(self.parted(controller), response, error)

    def parted(self, controller: _ServerController) -> _Later:
        """How a handler that took long answers, when the thread that leads now has said so."""
        with self._parting:
            while (later := controller._later) is None:
                self._parting.wait()
        return later

    def outcome_of(
        self, entry: MethodEntry, controller: MprpcController, response: Any, raised: BaseException | None
    ) -> tuple[RpcError, bytes]:
        """The error of a call that was answered later, with status OK for none, and the reply's bytes."""
        try:
            if raised is not None:
                return _error_of(entry, raised), b""
            if controller.failed():
                return controller._error(), b""
            if type(response) is not entry.response_class:
                return _wrong_type(entry, response), b""
            reply = response.SerializeToString()
        except BaseException as error:
            return _error_of(entry, error), b""
        if len(reply) > self._max_payload:
            return _too_large(len(reply), self._max_payload), b""
        return RpcError(Status.OK), reply

    def forget(self, later: _Later) -> None:
        """That call has been answered. Any thread."""
        self._detached.remove(later)

    def _cancel_calls(self) -> None:
        """The callers of these have given up, or gone away."""
        tickets = ffi.new("struct mprpc_ticket[]", _CANCELS)
        while count := lib.mprpc_loop_cancelled(self.handle, tickets, _CANCELS):
            for ticket in tickets[0:count]:
                for later in self._detached.give_up(ticket.connection, ticket.call_id):
                    later.controller._cancel()
                    self._abandon(later)

    def _adapt(self) -> None:
        """Lets the limits follow what their gates have let through."""
        from mprpc.limiter import Window

        window, now = ffi.new("struct mprpc_window *"), time.monotonic()
        for gate, limiter in enumerate(self._limiters):
            lib.mprpc_loop_window(self.handle, gate, window)
            samples = window.samples
            latency = window.nanoseconds / samples / _NS if samples else 0.0
            limit = limiter.update(now, Window(samples, latency, window.refused, window.peak))
            lib.mprpc_loop_admit(self.handle, gate, limit)

    def _log_incidents(self) -> None:
        incidents, more = ffi.new("struct mprpc_incident[]", lib.MPRPC_INCIDENTS_MAX), ffi.new("uint64_t *")
        for incident in incidents[0 : lib.mprpc_loop_incidents(self.handle, incidents, more)]:
            self._lines.warn(_incident(incident.reason, ffi.string(incident.peer).decode()))
        self._lines.skip(more[0])


class _Later:
    """A call that is answered later, once, on any thread."""

    def __init__(self, loop: _Loop, entry: MethodEntry, controller: _ServerController, ticket: Any) -> None:
        self.entry = entry
        self.controller = controller
        self.key: tuple[int, int] = ticket.connection, ticket.call_id
        self._loop = loop
        self._ticket = ticket

    def finish(self, response: Any, raised: BaseException | None) -> None:
        """The handler has ended so."""
        self.answer(*self._loop.outcome_of(self.entry, self.controller, response, raised))

    def refuse(self, error: RpcError) -> None:
        """The handler was never started."""
        self.answer(error, not_run=True)

    def answer(self, error: RpcError, reply: bytes = b"", *, not_run: bool = False) -> None:
        self._loop.forget(self)
        text = error.text.encode(errors="replace")
        lib.mprpc_loop_answer(
            self._loop.handle, self._ticket, error.status, not_run, text, len(text),
            error.details, len(error.details), reply, len(reply),
        )  # fmt: skip


class _ServerController(MprpcController):
    """Reads what C knows of the call while the handler runs; who detaches the call copies it."""

    _loop: _Loop
    _later: _Later | None = None

    @property
    def peer(self) -> str:
        told = self._loop.server.peer(self)
        if told:
            self._peer = told
        elif told is False:
            self._loop.parted(self)
        return self._peer

    def time_remaining(self) -> float | None:
        told = self._loop.server.deadline(self)
        if told is False:
            self._loop.parted(self)
        elif told is not None:
            self._deadline = told / _NS if told else None
        return super().time_remaining()

    @property
    def attempt(self) -> int:
        told = self._loop.server.attempt(self)
        if told is False:
            self._loop.parted(self)
        elif told is not None:
            self._attempt = told
        return self._attempt

    def _keep(self) -> None:
        self._peer = self.peer
        self._attempt = self.attempt
        self.time_remaining()


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))


def _is_future(response: Any) -> bool:
    return callable(getattr(response, "add_done_callback", None)) and not hasattr(response, "get_loop")


class _Lines:
    """Log lines about bad peers, at most _LOG_BURST a second: a flood of them must not become a flood of lines."""

    def __init__(self) -> None:
        self._second = 0
        self._count = 0
        self._skipped = 0

    def warn(self, line: str) -> None:
        self._tick()
        if self._count < _LOG_BURST:
            self._count += 1
            _log.warning("%s", line)
        else:
            self._skipped += 1

    def skip(self, count: int) -> None:
        self._tick()
        self._skipped += count

    def _tick(self) -> None:
        second = int(time.monotonic())
        if second == self._second:
            return
        if self._skipped:
            _log.warning("%d more lines like these were left out", self._skipped)
        self._second, self._count, self._skipped = second, 0, 0


def _limiters(handle: Any, entries: list[MethodEntry], all_methods: bool) -> list[Limiter]:
    """The limiters of a loop, and its gates: one for each method that is declared so, one for all others if wanted."""
    own = [method for method, entry in enumerate(entries) if entry.limited]
    if not own and not all_methods:
        return []
    from mprpc.limiter import FIRST, PERIOD, Limiter

    del own[lib.MPRPC_NO_GATE - 1 :]  # what has no number is limited with the others
    others = len(own) if all_methods or sum(entry.limited for entry in entries) > len(own) else lib.MPRPC_NO_GATE
    gates = bytes(own.index(method) if method in own else others for method in range(len(entries)))
    count = len(own) + (others != lib.MPRPC_NO_GATE)
    if lib.mprpc_loop_gates(handle, gates, len(gates), count, FIRST, int(PERIOD * _NS)) < 0:
        raise ConfigError("no memory for the limits of the provider's methods")
    return [Limiter(time.monotonic()) for _ in range(count)]


_TROUBLES = {
    lib.MPRPC_STALLED: "{peer} sent a part of a frame and then nothing within frame_timeout: closed",
    lib.MPRPC_CROWDED: "{peer} was refused: max_connections are open",
    lib.MPRPC_NO_DESCRIPTOR: "{peer} was refused: the process has no file descriptor left (ulimit -n)",
    lib.MPRPC_UNREAD: "{peer} has read nothing of its answers for idle_timeout: closed",
    lib.MPRPC_NO_ROOM: "{peer} is closed: max_input bytes of unfinished requests wait",
    lib.MPRPC_LONG_CLASSIC: "{peer} got a classic response over 1024 bytes: the C++ consumer reads only its start",
}


def _incident(reason: int, peer: str) -> str:
    known = _TROUBLES.get(reason)
    return known.format(peer=peer) if known else f"{peer} is closed: {ffi.string(lib.mprpc_why(reason)).decode()}"


def _error_of(entry: MethodEntry, error: BaseException, *, parsing: bool = False) -> RpcError:
    """What the caller hears of an exception; the traceback stays in this log. parsing: of the arguments."""
    if isinstance(error, RpcError) and error.status:
        return RpcError(error.status, error.text, details=error.details)  # not_run is the framework's to say
    if isinstance(error, DecodeError) and parsing:
        return RpcError(Status.INVALID_ARGUMENT, f"the arguments are no {entry.request_class.DESCRIPTOR.full_name}")
    _log.error("%s.%s failed, its caller hears INTERNAL", entry.service, entry.name, exc_info=error)
    return RpcError(Status.INTERNAL, f"the handler raised {type(error).__name__}")


def _wrong_type(entry: MethodEntry, response: object) -> RpcError:
    _discard(response)
    _log.error(
        "%s.%s returned a %s, its caller hears INTERNAL: it must return a %s, or a Future or an awaitable of one",
        entry.service, entry.name, type(response).__qualname__, entry.response_class.DESCRIPTOR.full_name,
    )  # fmt: skip
    return RpcError(Status.INTERNAL, "the handler returned no response of its method's type")


def _outcome(future: Any) -> tuple[Any, BaseException | None]:
    try:
        return future.result(), None
    except BaseException as raised:
        return None, raised


def _discard(response: object) -> None:
    close = getattr(response, "close", None)
    if callable(close) and hasattr(response, "cr_frame"):
        close()  # a coroutine that nobody will await


def _too_large(size: int, limit: int) -> RpcError:
    return RpcError(Status.RESOURCE_EXHAUSTED, f"the response has {size} bytes, max_payload allows {limit}")


def _is_within(address: str) -> bool:
    return address.startswith("memory:")


def _share(handle: Any, handles: Any, worker: Worker) -> int:
    shared = worker.shared
    descriptor = shared.listener.detach()
    count, processes = len(handles), shared.processes
    return int(lib.mprpc_loop_share(handle, descriptor, handles, count, shared.counts, processes, worker.place))


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _listen(config: MprpcConfig) -> socket.socket:
    """A listening, non-blocking socket, or ConfigError."""
    host, port = config.rpcserverip, config.rpcserverport
    family, address = _resolve(host, port)
    if family == socket.AF_UNIX:
        _remove_socket(address)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        where = host if family == socket.AF_UNIX else f"{host}:{port}"
        why = error.strerror or str(error)
        raise ConfigError(f"can't listen on {where}: {why}; change rpcserverip or rpcserverport") from None
    return listener


def _resolve(host: str, port: int) -> tuple[int, Any]:
    if host.startswith("unix:"):
        return socket.AF_UNIX, host[5:]
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"rpcserverip={host}: {error.strerror or error}") from None
    return found[0][0], found[0][4]


def _address_of(listener: socket.socket) -> str:
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if listener.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"


def _remove_socket(path: str) -> None:
    """Removes a unix socket that nobody listens on; anything else at that path is left, and bind() says so."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        return


_providers: weakref.WeakSet[RpcProvider] = weakref.WeakSet()


def _after_fork() -> None:
    for provider in list(_providers):
        provider._forget_forked()


os.register_at_fork(after_in_child=_after_fork)
