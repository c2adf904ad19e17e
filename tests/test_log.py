"""The log: the seed's names and lines exactly, nothing that waits for a disk, nothing that is lost without a count."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mprpc import log
from mprpc.log import MAX_LINE, MAX_QUEUED, SeedFormatter, SeedLogHandler

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A zone whose days are not UTC's."""
    monkeypatch.setenv("TZ", "CET-1")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[SeedLogHandler]:
    made = SeedLogHandler(tmp_path / "logs")
    yield made
    made.close()


def at(text: str) -> float:
    """The seconds of a local time such as 2026-1-5 6:7:45."""
    return time.mktime(time.strptime(text, "%Y-%m-%d %H:%M:%S"))


def record(text: str, when: str = "2026-1-5 6:7:45", level: int = logging.INFO) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "created": at(when), "levelno": level})


def lines(handler: SeedLogHandler, day: str = "2026-1-5") -> list[str]:
    handler.flush()
    return (Path(handler.logdir) / f"{day}-log.txt").read_text().splitlines()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the time of the records, so that what the log says of itself is in the same file."""
    monkeypatch.setattr(time, "time", lambda: at("2026-1-5 6:7:45"))


class Dam:
    """A disk that hangs until it is told otherwise: a FIFO in place of the file, that nobody reads."""

    def __init__(self, handler: SeedLogHandler, day: str = "2026-1-5") -> None:
        self.path = Path(handler.logdir) / f"{day}-log.txt"
        self.path.parent.mkdir(exist_ok=True)
        os.mkfifo(self.path)

    def open(self) -> str:
        """Lets the writer go on, and returns what it writes here until it closes this file for the next one."""
        fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        self.path.unlink()
        data = b""
        try:
            while select.select([fd], [], [], 10)[0]:
                chunk = os.read(fd, 1 << 16)
                if not chunk:
                    return data.decode()
                data += chunk
        finally:
            os.close(fd)
        pytest.fail(f"the writer still holds the file after {len(data)} bytes")


# ---- names and lines


def test_the_seeds_file_and_line(handler: SeedLogHandler) -> None:
    handler.handle(record("text"))
    handler.flush()
    (file,) = Path(handler.logdir).iterdir()
    assert file.name == "2026-1-5-log.txt"
    assert file.read_bytes() == b"6:7:45 =>[info] text\n"


def test_a_record_goes_where_its_own_time_says(handler: SeedLogHandler) -> None:
    for when in ("2026-1-5 23:59:59", "2026-1-6 0:0:0", "2026-1-5 23:59:58", "2026-12-31 10:20:30"):
        handler.handle(record(when, when))
    assert lines(handler, "2026-1-5") == [
        "23:59:59 =>[info] 2026-1-5 23:59:59",
        "23:59:58 =>[info] 2026-1-5 23:59:58",
    ]
    assert lines(handler, "2026-1-6") == ["0:0:0 =>[info] 2026-1-6 0:0:0"]
    assert lines(handler, "2026-12-31") == ["10:20:30 =>[info] 2026-12-31 10:20:30"]


@pytest.mark.parametrize(
    ("level", "word"),
    [(5, "debug"), (10, "debug"), (20, "info"), (25, "info"), (30, "warning"), (40, "error"), (50, "error")],
)
def test_levels(level: int, word: str) -> None:
    assert SeedFormatter().format(record("text", level=level)) == f"6:7:45 =>[{word}] text"


def test_a_record_is_a_line(handler: SeedLogHandler) -> None:
    handler.handle(record("a\nb\r\n6:7:45 =>[info] forged\x1b[2J\x00\x85\u2028\ttab \udcff 日志"))
    assert lines(handler) == [
        r"6:7:45 =>[info] a\nb\r\n6:7:45 =>[info] forged\x1b[2J\x00\x85\u2028" + "\ttab \\udcff 日志"
    ]


def test_a_traceback_follows_in_lines_that_no_record_begins_with(handler: SeedLogHandler) -> None:
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError("a\n6:7:45 =>[info] forged")
    except ValueError:
        logger.exception("it failed")
    logger.info("next", stack_info=True)
    first, *rest = lines(handler, time.strftime("%Y-%-m-%-d"))
    assert re.fullmatch(r"\d+:\d+:\d+ =>\[error\] it failed", first)
    assert rest[0] == "    Traceback (most recent call last):"
    assert "    6:7:45 =>[info] forged" in rest
    (at_next,) = [i for i, line in enumerate(rest) if not line.startswith("    ")]
    assert rest[at_next].endswith(" =>[info] next")
    assert rest[at_next + 1] == "    Stack (most recent call last):"


def test_a_long_record_is_cut(handler: SeedLogHandler) -> None:
    handler.handle(record(MAX_LINE * "x"))
    assert lines(handler) == [f"6:7:45 =>[info] {(MAX_LINE - 16) * 'x'}… (16 characters more)"]


def test_arguments_that_dont_fit_are_reported_as_logging_does(
    handler: SeedLogHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = record("%d")
    bad.args = ("x",)
    handler.handle(bad)
    handler.handle(record("good"))
    assert lines(handler) == ["6:7:45 =>[info] good"]
    assert "--- Logging error ---" in capsys.readouterr().err


# ---- order, threads, the file's life


def test_threads_share_it_and_nothing_is_lost(handler: SeedLogHandler) -> None:
    def write(who: int) -> None:
        for number in range(500):
            handler.handle(record(f"{who} {number}"))

    threads = [threading.Thread(target=write, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = [tuple(map(int, line.split()[2:])) for line in lines(handler)]
    assert len(written) == 4000
    for who in range(8):
        assert [number for each, number in written if each == who] == list(range(500)), "in each thread's order"


def test_the_file_is_appended_to(tmp_path: Path) -> None:
    for text in ("one", "two"):
        handler = SeedLogHandler(tmp_path)
        handler.handle(record(text))
        handler.close()
    assert (tmp_path / "2026-1-5-log.txt").read_text() == "6:7:45 =>[info] one\n6:7:45 =>[info] two\n"


def test_the_file_stays_open(handler: SeedLogHandler) -> None:
    handler.handle(record("one"))
    handler.flush()
    mine = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert mine.count(f"{handler.logdir}/2026-1-5-log.txt") == 1


@pytest.mark.parametrize("how", ["moved", "removed", "directory removed"])
def test_a_file_that_went_is_made_anew(handler: SeedLogHandler, how: str) -> None:
    path = Path(handler.logdir) / "2026-1-5-log.txt"
    handler.handle(record("one"))
    assert lines(handler) == ["6:7:45 =>[info] one"]
    if how == "moved":
        path.rename(path.with_name("old"))
    else:
        path.unlink()
    if how == "directory removed":
        path.parent.rmdir()
    handler.handle(record("two"))
    assert lines(handler) == ["6:7:45 =>[info] two"]


def test_nothing_is_made_before_something_is_logged(tmp_path: Path) -> None:
    threads = threading.active_count()
    handler = SeedLogHandler(tmp_path / "logs")
    handler.flush()
    handler.close()
    handler.close()
    handler.handle(record("late"))
    assert not (tmp_path / "logs").exists()
    assert threading.active_count() == threads


# ---- bounds and trouble


@pytest.mark.usefixtures("now")
def test_what_finds_no_room_is_dropped_and_counted(handler: SeedLogHandler) -> None:
    dam = Dam(handler)
    size = 10_000
    for number in range(2 * MAX_QUEUED // size):
        handler.handle(record(f"{number} ".ljust(size, "x")))
    written = dam.open()
    handler.handle(record("last"))
    handler.flush()  # the writer has left the FIFO
    written += "".join(path.read_text() for path in Path(handler.logdir).iterdir())
    found = re.findall(r"=>\[(.*?)\] (\d+|last)( records dropped)?", written)
    kept = [int(text) for level, text, dropped in found if level == "info" and text != "last"]
    dropped = [int(text) for level, text, dropped in found if dropped]
    assert kept == list(range(len(kept))), "the oldest are kept, in order"
    assert MAX_QUEUED * 0.9 < len(kept) * size < MAX_QUEUED
    assert sum(dropped) == 2 * MAX_QUEUED // size - len(kept)
    assert ("info", "last", "") in found
    for _ in range(MAX_QUEUED // size // 2):
        handler.handle(record(size * "y"))
    assert sum("yyy" in line for line in lines(handler)) == MAX_QUEUED // size // 2, "there is room again"


def test_logging_and_the_end_dont_wait_for_a_disk_that_hangs(
    handler: SeedLogHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "CLOSE_TIMEOUT", 0.05)
    dam = Dam(handler)
    start = time.monotonic()
    handler.handle(record("one"))
    handler.flush()
    handler.close()
    assert time.monotonic() - start < 1
    assert dam.open() == "6:7:45 =>[info] one\n"


@pytest.mark.usefixtures("now")
def test_a_full_disk_costs_lines_and_is_told_once_each_time(
    handler: SeedLogHandler, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(handler.logdir) / "2026-1-5-log.txt"
    path.parent.mkdir()
    for _ in range(2):
        path.symlink_to("/dev/full")
        for number in range(5):
            handler.handle(record(str(number)))
            handler.flush()
        path.unlink()
        handler.handle(record("room"))
        assert lines(handler) == [
            "6:7:45 =>[info] room",
            "6:7:45 =>[warning] 5 records dropped: the log's disk was too slow or failed",
        ]
        assert capsys.readouterr().err == (
            f"mprpc: the log in {handler.logdir} can't be written: No space left on device; lines are lost\n"
        )
        path.unlink()


def test_a_directory_that_cant_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    handler = SeedLogHandler(tmp_path / "file" / "logs")
    for _ in range(3):
        handler.handle(record("one"))
        handler.flush()
    handler.close()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_line_cut_by_a_full_disk_doesnt_spoil_the_next(tmp_path: Path) -> None:
    """The kernel writes what has room, and the rest of the line is lost: the size limit of a file does it, too."""
    program = """
import logging, resource, signal, sys
from mprpc.log import SeedLogHandler
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
handler = SeedLogHandler(sys.argv[1])
def put(text):
    handler.handle(logging.makeLogRecord({"msg": text, "created": 0, "levelno": 20}))
    handler.flush()
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
put(30 * "a"), put(80 * "b"), put(80 * "c")
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
put("whole")
"""
    ended = run(program, str(tmp_path))
    assert ended.returncode == 0
    assert ended.stderr.count("\n") == 1
    assert "File too large" in ended.stderr
    head = "1:0:0 =>[info] "
    assert (tmp_path / "1970-1-1-log.txt").read_text() == (
        f"{head}{30 * 'a'}\n{head}{(100 - 46 - 15) * 'b'}\n{head}whole\n"
    )


@pytest.mark.parametrize("later", [True, False])
def test_a_process_that_gets_no_thread_keeps_its_lines(
    handler: SeedLogHandler, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    """They are written by the thread of a later line, or by close(): at the interpreter's end no thread starts."""

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        handler.handle(record("one"))
        handler.flush()
        assert not Path(handler.logdir).exists()
        if not later:
            handler.close()
    if later:
        handler.handle(record("two"))
    assert lines(handler) == ["6:7:45 =>[info] one", "6:7:45 =>[info] two"][: 1 + later]


# ---- processes


def run(program: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, "-c", program, *argv], env=env, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise SystemError", "os.kill(os.getpid(), signal.SIGINT)"])
def test_everything_is_written_when_the_process_ends(tmp_path: Path, end: str) -> None:
    program = f"""
import logging, os, signal, sys
from mprpc import log
log.start(logdir=sys.argv[1])
for number in range(1000):
    logging.getLogger("mprpc.test").info("%d", number)
{end}
"""
    ended = run(program, str(tmp_path))
    (file,) = tmp_path.iterdir()
    assert [int(line.split()[2]) for line in file.read_text().splitlines()] == list(range(1000))
    if end in ("", "sys.exit(3)"):
        assert (ended.returncode, ended.stdout, ended.stderr) == (3 if end else 0, "", "")


def test_a_line_logged_at_exit_is_written(tmp_path: Path) -> None:
    program = """
import atexit, logging, sys
from mprpc import log
log.start(logdir=sys.argv[1])
atexit.register(logging.getLogger("mprpc").info, "bye")
"""
    ended = run(program, str(tmp_path))
    assert (ended.returncode, ended.stderr) == (0, "")
    (file,) = tmp_path.iterdir()
    assert file.read_text().endswith(" =>[info] bye\n")


def test_after_a_fork_both_write_and_no_line_is_written_twice(tmp_path: Path) -> None:
    """The FIFO holds the parent's writer, so that its queue is full of lines at the fork."""
    program = """
import logging, os, sys
from mprpc.log import SeedLogHandler
handler = SeedLogHandler(sys.argv[1])
def put(text, created):
    handler.handle(logging.makeLogRecord({"msg": text, "created": created, "levelno": 20}))
def files():
    return [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 64) if os.path.islink(f"/proc/self/fd/{fd}")]
put("before", 86400)
handler.flush()
os.mkfifo(sys.argv[1] + "/1970-1-1-log.txt")
put("held", 0)
for number in range(10):
    put(f"parent {number}", 86400)
pid = os.fork()
if pid == 0:
    assert not any("log.txt" in file for file in files()), files()
    put("child", 86400)
    handler.flush()
    assert sum("log.txt" in file for file in files()) == 1, files()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
with open(sys.argv[1] + "/1970-1-1-log.txt") as reader:
    handler.close()
    print(reader.read(), end="")
"""
    ended = run(program, str(tmp_path))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "1:0:0 =>[info] held\n"
    written = [line.split("] ")[1] for line in (tmp_path / "1970-1-2-log.txt").read_text().splitlines()]
    assert written == ["before", "child", *(f"parent {number}" for number in range(10))]


def test_a_signal_handler_may_log(handler: SeedLogHandler) -> None:
    """A trace function stands in for the signal: it logs before every single step of a line that is being logged."""
    steps = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal steps
        if frame.f_code.co_filename != log.__file__:
            return None
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):  # Python 3.12.1 has no opcode events for frames that ask for them so late
            steps += 1
            sys.settrace(None)
            handler.handle(interrupting)
            sys.settrace(trace)
        return trace

    interrupted, interrupting = record("interrupted"), record("interrupting")
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for _ in range(3):  # the first starts the thread
            handler.handle(interrupted)
    finally:
        sys.settrace(before)
    assert steps > 50
    written = lines(handler)
    assert written.count("6:7:45 =>[info] interrupted") == 3
    assert len(written) == 3 + steps


# ---- start and stop


@pytest.fixture
def package() -> Iterator[logging.Logger]:
    logger = logging.getLogger("mprpc")
    before = list(logger.handlers)
    yield logger
    log.stop()
    assert logger.handlers == before
    assert logger.level == logging.NOTSET


@contextlib.contextmanager
def bare_root() -> Iterator[None]:
    """The root logger as it is in a program that has set nothing up, other than pytest."""
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        yield
    finally:
        root.handlers = handlers


def test_a_library_says_nothing_by_itself() -> None:
    ended = run("import logging, mprpc.log; logging.getLogger('mprpc.x').error('text')")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_command_without_a_directory_logs_to_standard_error(
    package: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    with bare_root():
        log.start(level="warning")
        package.info("quiet")
        package.getChild("x").warning("loud")
        log.start(level="info")
        package.info("second")
    assert re.fullmatch(r"\d+:\d+:\d+ =>\[warning\] loud\n\d+:\d+:\d+ =>\[info\] second\n", capsys.readouterr().err)


def test_a_command_with_a_directory_says_only_warnings_on_standard_error(
    package: logging.Logger, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with bare_root():
        log.start(logdir=str(tmp_path / "a" / "b"), level="debug")
        package.debug("detail")
        package.warning("loud")
        log.stop()
    (file,) = (tmp_path / "a" / "b").iterdir()
    words = [line.partition(" =>")[2] for line in file.read_text().splitlines()]
    assert words == ["[debug] detail", "[warning] loud"]
    assert capsys.readouterr().err.partition(" =>")[2] == "[warning] loud\n"


def test_a_program_with_logging_of_its_own_keeps_standard_error(
    package: logging.Logger, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log.start()
    package.warning("loud")
    assert capsys.readouterr().err == ""
    assert caplog.messages == ["loud"]


def test_a_directory_that_cant_be_made_is_refused_at_the_start(package: logging.Logger, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        log.start(logdir=str(tmp_path / "file" / "logs"))


# ---- worker processes ----


def test_a_process_can_be_named(tmp_path: Path) -> None:
    formatter = log.SeedFormatter()
    record = logging.LogRecord("mprpc", logging.INFO, "", 0, "text", None, None)
    log.name_process("worker 1")
    try:
        assert formatter.format(record).endswith("=>[info] worker 1: text")
    finally:
        log.name_process("")
    assert formatter.format(record).endswith("=>[info] text")


def test_at_rest_there_is_no_thread_and_nothing_is_lost(tmp_path: Path) -> None:
    before = threading.active_count()
    handler = log.SeedLogHandler(tmp_path)
    logger = logging.Logger("resting")
    logger.addHandler(handler)
    for number in range(3):
        logger.warning("line %d", number)
        log.rest()
        assert threading.active_count() == before
        (file,) = tmp_path.glob("*")
        assert len(file.read_text().splitlines()) == number + 1
    handler.close()
