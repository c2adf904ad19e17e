"""Worker processes: a supervisor that forks them, replaces them when they die, and restarts them one by one.

The supervisor is one thread that waits: for signals, for what its processes say, for its next timer. It serves nothing,
has no session with ZooKeeper and starts no thread, so that a fork copies nothing half done. What a process does is a
function that it is given, the body; this module knows nothing of providers.

All workers accept on one socket that the supervisor keeps. A connection that waits there when a worker dies or drains
is another worker's; with SO_REUSEPORT it would be reset, as each worker would have a queue of its own. The kernel alone
spreads such a socket's connections badly, so that workers count theirs in memory that they share, and who has many
leaves the next to who has few (`mprpc_loop_share`).

Each process is joined to the supervisor by a pair of sockets. It says there when it serves and is registered; the end
of it tells that the supervisor is gone, however it went, and the process ends as for SIGTERM.

Rules: a successor serves and is registered before its predecessor drains. A process that died is replaced, at once the
first time, then later each time. Whatever is waited for has a bound, and at its end SIGKILL.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from mprpc import log
from mprpc._native import ffi, lib
from mprpc.errors import ConfigError, RpcError
from mprpc.signals import SignalHandlers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    Body = Callable[["Worker"], None]

__all__ = ["DELAYS", "LIVED", "PATIENCE", "Shared", "Supervisor", "Worker"]

DELAYS = (0.5, 30.0)
"""Seconds before the second replacement of a process that keeps dying, and the longest wait, doubled in between. The
first is replaced at once; one that dies at its start every time must not cost a core."""

LIVED = 60.0
"""Seconds after which the death of a process is taken for the first again."""

PATIENCE = 30.0
"""Seconds for a process to say that it serves, and in a rolling restart that it is registered. One that dies later, or
whose ZooKeeper is away for longer, ends the restart with the old processes in place."""

_MARGIN = 2.0  # seconds beyond the drain for a process to end, and for everything once a second signal has come
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
_FAR = 1e9  # seconds
_MAX_SAID = 4096  # bytes of one line of a process; it is our own code that speaks

_log = logging.getLogger("mprpc.workers")


class Shared:
    """The socket that all workers accept on, and the memory in which they count their connections."""

    def __init__(self, listener: socket.socket, processes: int) -> None:
        self.listener = listener
        self.processes = processes
        self._memory = mmap.mmap(-1, 4 * processes)
        self.counts = ffi.from_buffer("unsigned[]", self._memory)
        for place in range(processes):
            self.leave(place)

    def leave(self, place: int) -> None:
        """Nobody counts there."""
        self.counts[place] = lib.MPRPC_NOT_ACCEPTING


class Worker:
    """What a body knows of the process it runs in. Main thread only, but `said`."""

    def __init__(self, name: str, number: int, place: int, shared: Shared, control: socket.socket) -> None:
        self.name = name
        self.number = number
        self.place = place
        """Its index in `shared.counts`."""
        self.shared = shared
        self.hurry: Callable[[], None] = lambda: None
        """Called by a second SIGTERM."""
        self._control = control
        self._told = False
        self._waker, self._wakeup = socket.socketpair()

    def said(self, what: str) -> None:
        """Tells the supervisor: "serving", "registered", "needless" or "failed …". Any thread."""
        try:
            self._control.sendall(what.replace("\n", " ").encode(errors="replace")[: _MAX_SAID - 1] + b"\n")
        except OSError:
            _log.debug("the supervisor is gone")

    def wait(self) -> None:
        """Returns when the process is to end: after SIGTERM, or the supervisor's end."""
        poll = select.poll()
        for each in (self._waker, self._control):
            poll.register(each, select.POLLIN)
        while not self._told:
            for descriptor, _ in poll.poll():
                if descriptor == self._control.fileno():
                    _log.error("the supervisor is gone; %s ends", self.name)
                    self._told = True
                else:
                    self._waker.recv(64)
        self._told = True

    def _settle_in(self) -> None:
        """Its own signals, exit handlers and name. Signals are blocked until then."""
        # What the parent has registered is the parent's to run; multiprocessing does the same since 3.14.
        atexit._clear()
        # Ctrl-C reaches the whole group of a terminal: the supervisor says what follows of it. No SIG_IGN, which
        # programs that a handler starts would inherit.
        SignalHandlers(self._on_signal, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), self._wakeup)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        log.name_process(f"{self.name} ({os.getpid()})")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            if self._told:
                self.hurry()
            self._told = True

    def _run(self, body: Body) -> NoReturn:
        code = 1
        try:
            self._settle_in()
            body(self)
            code = 0
        except (ConfigError, RpcError) as error:
            _log.error("%s", error)
            self.said(f"failed {error}")
        except BaseException as error:
            _log.exception("this process failed")
            self.said(f"failed {type(error).__name__}: {error}")
        finally:
            _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends a forked process: what it has registered itself runs, what the parent's frames would still do does not."""
    try:
        atexit._run_exitfuncs()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        os._exit(code)


class _Process:
    """A forked process as the supervisor sees it."""

    def __init__(self, pid: int, control: socket.socket, place: int, generation: int) -> None:
        self.pid = pid
        self.control = control
        self.place = place
        self.generation = generation
        self.started = time.monotonic()
        self.said: set[str] = set()
        self.failed = ""
        self.deadline = self.started + PATIENCE  # when it is killed
        self.ending = False
        self._partial = b""

    def hear(self) -> None:
        try:
            data = self.control.recv(_MAX_SAID)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            self.said.add(word)
            self.failed = rest or self.failed
        if self.settled and not self.ending:
            self.deadline = _FAR
        if not data:
            self.control.close()

    @property
    def settled(self) -> bool:
        return bool({"serving", "needless"} & self.said)

    def end(self, grace: float) -> None:
        """Has it drain; killed after `grace` seconds. Again: sooner."""
        self.ending = True
        self.deadline = min(self.deadline, time.monotonic() + grace)
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        self.ending = True
        self.deadline = _FAR
        os.kill(self.pid, signal.SIGKILL)

    def reap(self) -> int | None:
        """Its exit code, negative for a signal, if it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        self.hear()
        self.control.close()
        return os.waitstatus_to_exitcode(status)


class _Slot:
    """One place that is to be filled with a process: it, its successor while that starts, and those who still drain."""

    def __init__(self, name: str, number: int, body: Body) -> None:
        self.name = name
        self.number = number
        self.body = body
        self.current: _Process | None = None
        self.successor: _Process | None = None
        self.leaving: list[_Process] = []
        self.start_at = 0.0
        self.deaths = 0

    @property
    def processes(self) -> list[_Process]:
        return [each for each in (self.current, self.successor) if each is not None] + self.leaving

    @property
    def settled(self) -> bool:
        return self.current is not None and self.current.settled


class Supervisor:
    """Keeps `workers` processes running, each of them `body(worker)`, until SIGTERM, SIGINT or `stop`.

    `before`, if given, is the body of one more process, which serves before the workers start and ends after them.
    `grace`: seconds for a process to drain. Main thread, of a process that has no other.
    """

    def __init__(self, shared: Shared, workers: int, body: Body, before: Body | None, grace: float) -> None:
        self._shared = shared
        self._grace = grace
        self._workers = [_Slot(f"worker {number}", number, body) for number in range(workers)]
        self._before = _Slot("zookeeper", -1, before) if before is not None else None
        self._slots = [*([self._before] if self._before is not None else []), *self._workers]
        self._waker: socket.socket
        self._wakeup: socket.socket | None = None
        self._generation = 0
        self._rolling = False
        self._signals: list[int] = []
        self._stopping = False
        self._failed = ""
        self._served = False

    def run(self) -> None:
        """Raises ConfigError when a worker can't start at all, and RuntimeError on another thread than the main one."""
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("workers are forked and signalled from the main thread: call run() there")
        self._waker, self._wakeup = socket.socketpair()
        self._waker.setblocking(False)
        handlers = SignalHandlers(self._on_signal, _SIGNALS, self._wakeup)
        try:
            while not self._ended():
                self._wait()
                self._obey()
                self._step()
        finally:
            self._kill_all()
            handlers.restore()
            self._waker.close()
            self._wakeup.close()
            self._wakeup = None
        if self._failed:
            raise ConfigError(self._failed)

    def stop(self) -> None:
        """As SIGTERM. Any thread, signal handlers too."""
        self._signals.append(signal.SIGTERM)
        wakeup = self._wakeup
        try:
            if wakeup is not None:
                wakeup.send(b"\0")
        except OSError:
            _log.debug("the supervisor is awake, or has ended")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)

    # ---- what happens ----

    def _processes(self) -> Iterable[_Process]:
        return (process for slot in self._slots for process in slot.processes)

    def _ended(self) -> bool:
        return self._stopping and not any(self._processes())

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self._waker, select.POLLIN)
        listening = {each.control.fileno(): each for each in self._processes() if each.control.fileno() >= 0}
        for descriptor in listening:
            poll.register(descriptor, select.POLLIN)
        left = self._next_timer() - time.monotonic()
        for descriptor, _ in poll.poll(min(max(left, 0.0), 3600.0) * 1000 + 1):
            if descriptor in listening:
                listening[descriptor].hear()
            else:
                self._waker.recv(64)

    def _next_timer(self) -> float:
        timers = [each.deadline for each in self._processes()]
        if not self._stopping:
            timers += [slot.start_at for slot in self._slots if slot.current is None and self._may_start(slot)]
            timers += [slot.successor.started + PATIENCE for slot in self._workers if slot.successor is not None]
        return min(timers, default=_FAR)

    def _obey(self) -> None:
        signals, self._signals = self._signals, []
        for number in signals:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._stop(_MARGIN if self._stopping else self._grace + _MARGIN)
            elif number == signal.SIGHUP and not self._stopping:
                _log.info("restarting all workers, one by one")
                self._generation += 1
                self._rolling = True

    def _stop(self, grace: float) -> None:
        self._stopping = True
        workers = [process for slot in self._workers for process in slot.processes]
        for process in workers:
            process.end(grace)
        self._shared.listener.close()  # else callers would connect to nobody

    # ---- what follows ----

    def _step(self) -> None:
        for slot in tuple(self._slots):
            for process in slot.processes:
                code = process.reap()
                if code is not None:
                    self._died(slot, process, code)
        self._kill_overdue()
        if self._stopping:
            self._end_before()
            return
        for slot in self._slots:
            if slot.current is None and self._may_start(slot) and time.monotonic() >= slot.start_at:
                slot.current = self._fork(slot)
                slot.start_at = time.monotonic() + DELAYS[0]  # should there be none
        self._say_serving()
        self._roll()

    def _say_serving(self) -> None:
        if not self._served and all(slot.settled for slot in self._slots):
            self._served = True
            _log.info("%d workers serve", len(self._workers))

    def _may_start(self, slot: _Slot) -> bool:
        return slot is self._before or self._before is None or self._before.settled

    def _died(self, slot: _Slot, process: _Process, code: int) -> None:
        self._shared.leave(process.place)
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
        if process in slot.leaving:
            slot.leaving.remove(process)
            if code:
                _log.error("%s (process %d) %s while it drained", slot.name, process.pid, how)
        elif process is slot.successor:
            slot.successor = None
            self._give_up_rolling(f"the new {slot.name} (process {process.pid}) {how}")
        else:
            self._lost(slot, process, how)

    def _lost(self, slot: _Slot, process: _Process, how: str) -> None:
        slot.current = None
        if "needless" in process.said:
            self._slots.remove(slot)
            self._before = None
        elif self._stopping:
            if how != "ended with code 0":
                _log.error("%s (process %d) %s", slot.name, process.pid, how)
        elif process.failed and not self._served:
            self._failed = process.failed
            self._stop(self._grace + _MARGIN)
        else:
            slot.deaths = 1 if time.monotonic() - process.started > LIVED else slot.deaths + 1
            first, longest = DELAYS
            delay = 0.0 if slot.deaths == 1 else min(first * 2.0 ** (slot.deaths - 2), longest)
            slot.start_at = time.monotonic() + delay
            _log.error("%s (process %d) %s; another starts in %g s", slot.name, process.pid, how, delay)

    def _kill_overdue(self) -> None:
        for slot in self._slots:
            for process in slot.processes:
                if time.monotonic() >= process.deadline:
                    what = "end" if process.settled else "start"
                    _log.error("%s (process %d) is killed: it did not %s in time", slot.name, process.pid, what)
                    process.kill()

    def _end_before(self) -> None:
        if self._before is not None and not any(slot.processes for slot in self._workers):
            for process in self._before.processes:
                if not process.ending:
                    process.end(_MARGIN)

    # ---- a rolling restart ----

    def _roll(self) -> None:
        for slot in self._workers:
            new, old = slot.successor, slot.current
            if new is not None and "registered" in new.said:
                slot.current, slot.successor = new, None
                if old is not None:
                    slot.leaving.append(old)
                    old.end(self._grace + _MARGIN)
            elif new is not None and time.monotonic() >= new.started + PATIENCE:
                slot.successor = None
                slot.leaving.append(new)
                new.end(_MARGIN)
                self._give_up_rolling(f"the new {slot.name} is not registered within {PATIENCE:g} s")
        quiet = all(slot.settled and slot.successor is None and not slot.leaving for slot in self._workers)
        if self._rolling and quiet:
            self._roll_next()

    def _roll_next(self) -> None:
        for slot in self._workers:
            if slot.current is not None and slot.current.generation < self._generation:
                slot.successor = self._fork(slot)
                if slot.successor is None:
                    self._give_up_rolling(f"there is no process for the new {slot.name}")
                return
        self._rolling = False
        _log.info("all workers are new")

    def _give_up_rolling(self, why: str) -> None:
        _log.error("%s: the restart ends here, the other workers stay", why)
        self._rolling = False

    # ---- processes ----

    def _fork(self, slot: _Slot) -> _Process | None:
        taken = {each.place for each in self._processes()}
        place = next(each for each in range(self._shared.processes) if each not in taken)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        log.rest()
        # Until the child has its own handlers a signal must not run ours there.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._become(Worker(slot.name, slot.number, place, self._shared, theirs), slot, ours)
        except OSError as error:
            _log.error("%s can't be started: %s", slot.name, error.strerror)
            ours.close()
            return None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            theirs.close()
        _log.info("%s is process %d", slot.name, pid)
        return _Process(pid, ours, place, self._generation)

    def _become(self, worker: Worker, slot: _Slot, ours: socket.socket) -> NoReturn:
        """In the child: what is the supervisor's is closed, so that its end is seen by all."""
        try:
            for each in (ours, self._waker, self._wakeup, *(process.control for process in self._processes())):
                if each is not None:
                    each.close()
            if slot is self._before:
                self._shared.listener.close()
        finally:
            worker._run(slot.body)

    def _kill_all(self) -> None:
        """After an error of ours: nobody is left behind."""
        for process in self._processes():
            os.kill(process.pid, signal.SIGKILL)
            os.waitpid(process.pid, 0)
            process.control.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
