"""A provider's threads: they turn its loops and run what takes long (leaders and followers; the rules are `_crew.c`'s).

All threads are alike. One leads a loop, runs its handlers, and finds after one that took long that another leads now:
then it answers that one call and stands by. Who stands by is sent for a loop, or for a job: a call of a method that is
known to take long. One thread more than there is work for is kept, and started by the one that was the last.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from mprpc._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Crew", "Led"]

_log = logging.getLogger("mprpc.crew")


class Led(Protocol):
    """A loop, as far as a thread leads it."""

    def lead(self, member: Any) -> None:
        """Turns it on this thread until it has stopped, or another one leads: then this thread's call is answered."""


class _Thread(threading.Thread):
    """One of a crew's. A daemon, so that a handler that never ends can't keep the interpreter alive."""

    def __init__(self, crew: Crew, loop: int | None, number: int) -> None:
        super().__init__(target=crew.serve, args=(loop,), name=f"mprpc-crew-{number}", daemon=True)
        self.crew = crew


class Crew:
    """The threads. `threads`: handlers that run beside the loops at once; `queued`: jobs that wait for one."""

    def __init__(self, loops: Sequence[Led], threads: int, queued: int) -> None:
        handle = lib.mprpc_crew_new(len(loops), threads, queued, lib.MPRPC_CREW_PERIOD)
        if handle == ffi.NULL:
            raise MemoryError
        self._handle = ffi.gc(handle, lib.mprpc_crew_free)
        self._loops = loops
        self._pid = os.getpid()
        self._jobs: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # of the jobs, which are as many as C knows of, and of starting a thread
        self._threads: list[_Thread] = []

    def start(self) -> None:
        """A thread for every loop, and one that stands by."""
        for number in range(len(self._loops)):
            self._start(number)
        self._start(None)

    def queue(self, job: Callable[[], None]) -> bool:
        """Has a thread run `job`, which raises nothing. False when too many wait. Any thread."""
        with self._lock:
            if lib.mprpc_crew_queue(self._handle) < 0:
                return False
            self._jobs.append(job)
        return True

    def is_member(self) -> bool:
        """Whether the caller's thread is one of these. Any thread."""
        mine = threading.current_thread()
        return isinstance(mine, _Thread) and mine.crew is self

    def is_alive(self) -> bool:
        """Whether any of the threads is, and not in a process that this one was forked from. Any thread."""
        return any(thread.is_alive() for thread in self._threads)

    def stop(self, timeout: float) -> None:
        """Ends the threads, after the loops; those whose handlers have not returned in `timeout` s are left behind.

        One of the threads itself waits for no other: they may need its handler's end for their own.
        """
        lib.mprpc_crew_stop(self._handle)
        if self.is_member():
            return
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for thread in self._threads:
            if thread.is_alive():
                _log.error("a handler on %s has not returned, its thread is left behind", thread.name)

    def statistics(self) -> Any:
        """struct mprpc_crew_statistics. Any thread."""
        found = ffi.new("struct mprpc_crew_statistics *")
        lib.mprpc_crew_statistics(self._handle, found)
        return found

    def _start(self, loop: int | None) -> None:
        with self._lock:
            thread = _Thread(self, loop, len(self._threads))
            thread.start()
            self._threads.append(thread)

    def serve(self, loop: int | None) -> None:
        """One thread: leads that loop first, if one is given, and goes where it is sent."""
        member = ffi.gc(lib.mprpc_member_new(self._handle), lib.mprpc_member_free)
        if loop is not None:
            lib.mprpc_crew_lead(member, loop)
            self._loops[loop].lead(member)
        wanted = ffi.new("int *")
        while (work := lib.mprpc_crew_stand_by(member, wanted)) != lib.MPRPC_CREW_STOP:
            job = work == lib.MPRPC_CREW_JOB
            leads = not job and lib.mprpc_crew_relieve(member, wanted)
            if wanted[0]:
                self._start_another()
            if job:
                self._take_job()()
            elif leads:
                self._loops[work].lead(member)
        if os.getpid() != self._pid:
            # A child that a handler has forked, back from it. Its process ends with this thread, its only one; the
            # destructors of libraries would wait there for threads that only the parent has.
            os._exit(0)

    def _start_another(self) -> None:
        try:
            self._start(None)
        except RuntimeError as error:  # it is asked for again when somebody has stood by
            lib.mprpc_crew_unwanted(self._handle)
            _log.error("no thread can be started for handlers that take long: %s", error)

    def _take_job(self) -> Callable[[], None]:
        with self._lock:
            return self._jobs.popleft()
