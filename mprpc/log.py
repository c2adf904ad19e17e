"""The log: the standard `logging` under "mprpc", and the seed's log files as they were meant.

As a library this package only logs to `logging.getLogger("mprpc.…")` and sets nothing up. A command calls `start` (as
`mprpc.init` does): without a log directory, lines on standard error from `level` on; with one, a `SeedLogHandler` from
`level` on, and on standard error what is a warning or worse.

`SeedLogHandler` writes the seed's lines, `6:7:45 =>[info] text`, to the seed's files, one a day, `2026-1-5-log.txt`
(nothing padded, local time). Its rules:

- Logging never waits for the disk. The line is made by the thread that logs, from the record's own time, and queued;
  one daemon thread writes. The queue is bounded: what finds no room is dropped and counted, and the count is a line of
  the log as soon as there is room again.
- A record is a line: control characters in the text are escaped. A traceback follows as lines that begin with four
  blanks, which no record's line does.
- A disk that can't be written costs the lines of that time, counted in the same way, and one line on standard error.
- The file stays open until the day changes or somebody moves it away, and is only ever appended to, each batch of lines
  with one write, so that several processes can share it.
- The queue is written out when the process exits; a disk that hangs holds that up for twice CLOSE_TIMEOUT. After
  a fork the child has an empty queue and a writer of its own. Who leaves with os._exit, as the children of
  multiprocessing do, calls `flush` before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CLOSE_TIMEOUT",
    "MAX_LINE",
    "MAX_QUEUED",
    "SeedFormatter",
    "SeedLogHandler",
    "name_process",
    "rest",
    "start",
    "stop",
]

MAX_QUEUED = 4 << 20
"""Bytes of lines that wait for the disk: some 20,000 lines, what a busy server logs while a disk hangs for seconds."""

MAX_LINE = 64 << 10
"""Characters of one record with its traceback; the rest is cut off (the seed cut at 1,023 bytes)."""

CLOSE_TIMEOUT = 2.0
"""Seconds that `flush` and `close` each wait for the disk at most."""

_MAX_BATCH = 256 << 10  # bytes of one write: long enough to be cheap, short enough to be seen soon
_OVERHEAD = 200  # bytes that a queued line costs beside its own

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_ESCAPES |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\t", 0x2028: "\\u2028", 0x2029: "\\u2029"}

_process_name = ""  # of a worker process, and what separates it from a line's text

_package = logging.getLogger("mprpc")
_package.addHandler(logging.NullHandler())


class SeedFormatter(logging.Formatter):
    """`6:7:45 =>[info] text`, without the newline at the end. Any thread."""

    def format(self, record: logging.LogRecord) -> str:
        lines = [f"{_stamp(record.created, record.levelno)} {_process_name}{record.getMessage().translate(_ESCAPES)}"]
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        for text in (record.exc_text, record.stack_info and self.formatStack(record.stack_info)):
            lines += (f"    {line.translate(_ESCAPES)}" for line in (text or "").splitlines())
        whole = "\n".join(lines)
        return whole if len(whole) <= MAX_LINE else f"{whole[:MAX_LINE]}… ({len(whole) - MAX_LINE} characters more)"


class SeedLogHandler(logging.Handler):
    """Writes the seed's log files to a directory, asynchronously.

    For any logger, not only for this package's: `logging.getLogger().addHandler(SeedLogHandler("logs"))`. The directory
    is made when it is missing. Lives until `close`, which logging calls at exit. Any thread, signal handlers too.
    """

    def __init__(self, logdir: str | os.PathLike[str], level: int | str = logging.NOTSET) -> None:
        super().__init__(level)
        self.setFormatter(SeedFormatter())
        self.logdir = os.fspath(logdir)
        self._file = _DayFile(self.logdir)
        self._closed = False
        self._begin()
        _handlers.add(self)

    def _begin(self) -> None:
        """Empty, with no thread: at the start, and in a forked child, where the lines are left to the parent."""
        # put() of a SimpleQueue may be interrupted by itself: a signal handler may log.
        self._queue: queue.SimpleQueue[_Line | threading.Event | None] = queue.SimpleQueue()
        self._count = threading.RLock()  # of the two numbers below; never held while something blocks
        self._starting = threading.Lock()  # taken by the one emit() that starts the thread
        self._queued = 0
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = _Line(record.created, self.format(record))
        except Exception:
            self.handleError(record)  # arguments that don't fit the format: reported as logging always does
            return
        with self._count:
            if self._closed or self._queued + line.cost > MAX_QUEUED:
                self._dropped += 1
                return
            self._queued += line.cost
        self._queue.put(line)
        self._ensure_writer()

    def flush(self) -> None:
        """Waits until what was logged before is written, at most CLOSE_TIMEOUT."""
        if self._thread is not None and self._thread.is_alive():
            written = threading.Event()
            self._queue.put(written)
            written.wait(CLOSE_TIMEOUT)

    def close(self) -> None:
        """Writes what is queued, at most CLOSE_TIMEOUT, and ends. What is logged later is dropped."""
        self.acquire()  # logging holds this lock around emit(): after it no line is put behind the last one
        closed, self._closed = self._closed, True
        self.release()
        if not closed:
            self._queue.put(None)
            if self._starting.acquire(blocking=False):
                self._write_all()  # no thread: nothing was logged, or none could be started
            elif self._thread is not None:
                self._thread.join(CLOSE_TIMEOUT)
        super().close()

    def rest(self) -> None:
        """As `flush`, and the thread ends until there is another line. Nobody may log meanwhile."""
        thread = self._thread
        if thread is not None:
            self._queue.put(None)
            thread.join(CLOSE_TIMEOUT)
            if not thread.is_alive():
                self._thread = None
                self._starting.release()

    def _ensure_writer(self) -> None:
        if self._thread is None and self._starting.acquire(blocking=False):
            thread = threading.Thread(target=self._write_all, name="mprpc-log", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError:  # no more threads, or the interpreter is going: a later line, or close(), writes it
                self._starting.release()

    def _write_all(self) -> None:
        """Writes batches until close() says that it was the last. Writer thread."""
        going = True
        while going:
            lines, written, going = self._take()
            lost = self._file.append(lines)
            with self._count:
                self._queued -= sum(line.cost for line in lines)
                self._dropped += lost
                dropped = 0 if lost else self._dropped
                self._dropped -= dropped
            if dropped:
                lost = self._file.append([_Line(time.time(), _dropped_text(dropped))])
                with self._count:
                    self._dropped += dropped if lost else 0
            for event in written:
                event.set()
        self._file.close()

    def _take(self) -> tuple[list[_Line], list[threading.Event], bool]:
        """The next lines, waiting for the first; who waits for them; and whether more may come."""
        lines: list[_Line] = []
        written: list[threading.Event] = []
        size = 0
        with contextlib.suppress(queue.Empty):
            while size < _MAX_BATCH:
                item = self._queue.get(block=not lines and not written)
                if item is None:
                    return lines, written, False
                if isinstance(item, threading.Event):
                    written.append(item)
                else:
                    lines.append(item)
                    size += len(item.data)
        return lines, written, True


class _Line:
    """A formatted record: its day, which is its file's name, and its bytes."""

    __slots__ = ("cost", "data", "day")

    def __init__(self, created: float, text: str) -> None:
        now = time.localtime(created)
        self.day = f"{now.tm_year}-{now.tm_mon}-{now.tm_mday}"
        self.data = f"{text}\n".encode(errors="backslashreplace")
        self.cost = len(self.data) + _OVERHEAD


class _DayFile:
    """The file of the day in a directory, opened when needed. Writer thread only."""

    def __init__(self, logdir: str) -> None:
        self._logdir = logdir
        self._path = ""
        self._fd = -1
        self._torn = False  # a write ended within a line, and the next begins with a newline
        self._told = False

    def append(self, lines: list[_Line]) -> int:
        """Writes `lines`, each to the file of its day. Returns how many were lost; never raises OSError."""
        lost = 0
        for same_day in _runs(lines):
            data = [line.data for line in same_day]
            done = 0
            try:
                self._open(os.path.join(self._logdir, f"{same_day[0].day}-log.txt"))
                if self._torn:
                    os.write(self._fd, b"\n")
                    self._torn = False
                whole = b"".join(data)
                while done < len(whole):
                    done += os.write(self._fd, whole[done:])
                self._told = False
            except OSError as error:
                self._tell(error)
                for line in data:
                    self._torn = self._torn or 0 < done < len(line)
                    lost += done < len(line)
                    done -= len(line)
        return lost

    def _open(self, path: str) -> None:
        """Makes the file at `path` the open one, also after it was moved away or deleted."""
        if path == self._path and self._is_current():
            return
        self.close()
        os.makedirs(self._logdir, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._path = path

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except OSError:
            return False

    def _tell(self, error: OSError) -> None:
        """Once for each time of trouble: a log that can't be written can't say so in the log."""
        if not self._told and sys.stderr is not None:
            self._told = True
            sys.stderr.write(f"mprpc: the log in {self._logdir} can't be written: {error.strerror}; lines are lost\n")

    def close(self) -> None:
        self._path = ""
        self._torn = False
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _stamp(created: float, level: int) -> str:
    now = time.localtime(created)
    word = "debug" if level < 20 else "info" if level < 30 else "warning" if level < 40 else "error"
    return f"{now.tm_hour}:{now.tm_min}:{now.tm_sec} =>[{word}]"


def _dropped_text(count: int) -> str:
    return f"{_stamp(time.time(), logging.WARNING)} {count} records dropped: the log's disk was too slow or failed"


def _runs(lines: Iterable[_Line]) -> list[list[_Line]]:
    """`lines` in their order, cut where the day changes."""
    runs: list[list[_Line]] = []
    for line in lines:
        if not runs or runs[-1][0].day != line.day:
            runs.append([])
        runs[-1].append(line)
    return runs


_handlers: weakref.WeakSet[SeedLogHandler] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    global _start_lock
    _start_lock = threading.Lock()
    for handler in list(_handlers):
        handler._file.close()
        handler._begin()


os.register_at_fork(after_in_child=_after_fork_in_child)


def name_process(name: str) -> None:
    """Begins the text of each later line of a `SeedFormatter` with `name`, such as "worker 1". Any thread."""
    global _process_name
    _process_name = f"{name}: " if name else ""


def rest() -> None:
    """Lets the threads that write end until there is another line, each after at most CLOSE_TIMEOUT: for a process of
    one thread that is about to fork."""
    for handler in list(_handlers):
        handler.rest()


_started: list[logging.Handler] = []
_start_lock = threading.Lock()


def start(*, logdir: str = "", level: str = "info") -> None:
    """Sets up logging for a command, as this module's head says; again: in place of what was set up before.

    Standard error is left alone when the root logger has handlers already: the program has its own logging then. Raises
    OSError when `logdir` can't be made. Any thread.
    """
    if logdir:
        os.makedirs(logdir, exist_ok=True)
    stop()
    with _start_lock:
        _package.setLevel(level.upper())
        if logdir:
            _started.append(SeedLogHandler(logdir))
        if not logging.getLogger().handlers:
            console: logging.StreamHandler[TextIO] = logging.StreamHandler()
            console.setFormatter(SeedFormatter())
            console.setLevel(logging.WARNING if logdir else logging.NOTSET)
            _started.append(console)
        for handler in _started:
            _package.addHandler(handler)


def stop() -> None:
    """Takes back `start`, what was logged being written first, at most CLOSE_TIMEOUT. Any thread."""
    with _start_lock:
        while _started:
            handler = _started.pop()
            _package.removeHandler(handler)
            handler.close()
        _package.setLevel(logging.NOTSET)
