"""All long runs that show whether calls can be trusted, in one go, which may be stopped and goes on.

    python tests/reliability trust [--keep-going]

First those that need the machine for themselves, one after the other; then the others in their order, two at a time.
What has passed is written down in .trust, with a name of the library's sources and the run's own, and is not repeated
while these are the same; simulation and fuzzing go on in their middle. Each run's output is in .trust/NAME.log, its
table in .trust/NAME.txt. The first run that fails ends the others, unless they are to keep going.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import generated
from reliability.report import sources

PLACE = generated.ROOT / ".trust"
AT_ONCE = 2  # of the runs that bear company: each keeps about one core busy
SLACK = 4  # times the minutes that a run should take, after which it hangs
TELL_EVERY = 60.0  # seconds
GRACE = 15.0  # seconds for a run to put things away when it is stopped
TAIL = 30  # lines of a failed run's output


@dataclasses.dataclass(frozen=True)
class Run:
    """`command`: what the interpreter is given. `minutes`: on two cores, measured."""

    name: str
    command: tuple[str, ...]
    minutes: float
    alone: bool = False

    @property
    def version(self) -> str:
        """Of all that a pass speaks of: the library, the run, its counts."""
        place = generated.ROOT / self.command[0]
        own = place / f"{self.command[1]}.py" if len(self.command) > 1 else place
        return f"{sources('mprpc', own if own.exists() else place)} {shlex.join(self.command)}"


def _reliability(name: str, minutes: float, *, alone: bool = False) -> Run:
    return Run(name, ("tests/reliability", name), minutes, alone)


def _fuzz(name: str, executions: int, minutes: float) -> Run:
    return Run(name, ("tests/fuzz", name, "--executions", str(executions)), minutes)


RUNS = (
    _reliability("hunt", 3.7, alone=True),
    _reliability("hostile", 4.0, alone=True),
    _reliability("overload", 2.0, alone=True),
    _reliability("soak", 30.0),
    Run("simulation", ("tests/simulation", "--count", "20000", "--jobs", "1"), 12.5),
    _reliability("proxy", 8.0),
    _fuzz("pair", 10_000_000, 8.5),
    _fuzz("session", 10_000_000, 6.5),
    _fuzz("channel", 1_000_000, 5.0),
    _fuzz("provider", 1_000_000, 3.0),
    _fuzz("frames", 1_000_000, 3.0),
    _fuzz("codec", 10_000_000, 1.0),
)  # what takes longest first, so that both cores are used to the end


class Record:
    """Which runs have passed, and in how many seconds."""

    def __init__(self, place: Path) -> None:
        place.mkdir(exist_ok=True)
        self._place = place
        self._file = place / "passed.json"
        self._passed: dict[str, dict[str, Any]] = json.loads(self._file.read_text()) if self._file.exists() else {}

    def passed(self, run: Run) -> bool:
        return self._passed.get(run.name, {}).get("version") == run.version

    def seconds(self, run: Run) -> float:
        return float(self._passed[run.name]["seconds"])

    def add(self, run: Run, version: str, seconds: float) -> None:
        self._passed[run.name] = {"version": version, "seconds": seconds}
        made = self._file.with_suffix(".new")
        made.write_text(json.dumps(self._passed, indent=1))
        made.replace(self._file)

    def log(self, run: Run) -> Path:
        return self._place / f"{run.name}.log"

    def table(self, run: Run) -> Path:
        return self._place / f"{run.name}.txt"


class Going:
    """A run that is under way, in a process group of its own; when it ends it says so to `ended`."""

    def __init__(self, run: Run, log: Path, ended: queue.SimpleQueue[Going]) -> None:
        self.run = run
        self.version = run.version
        self.code: int | None = None  # none: it hung
        self._log = log
        self._began = time.monotonic()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, *run.command],
                cwd=generated.ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self._thread = threading.Thread(target=self._wait, args=(ended,))
        self._thread.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def _wait(self, ended: queue.SimpleQueue[Going]) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.code = self._process.wait(self.run.minutes * 60 * SLACK)
        self._kill()
        ended.put(self)

    def _kill(self) -> None:
        """Nothing of it is left beside the next one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def interrupt(self) -> None:
        """Like Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def join(self) -> None:
        """Until it has ended, by force if that takes long."""
        self._thread.join(GRACE)
        self._kill()
        self._thread.join()

    def last_line(self) -> str:
        return (self._log.read_text(errors="replace").strip() or "nothing yet").splitlines()[-1]


class Trust:
    """The runs that are left, and those under way."""

    def __init__(self, runs: Sequence[Run], place: Path) -> None:
        self._runs = runs
        self._record = Record(place)
        self._left = deque(run for run in runs if not self._record.passed(run))
        self._going: list[Going] = []
        self._ended: queue.SimpleQueue[Going] = queue.SimpleQueue()
        self._began = time.monotonic()
        self._failed: list[Run] = []

    def go(self, *, keep_going: bool) -> int:
        """The exit code."""
        self._say(f"{len(self._left)} of {len(self._runs)} runs are left, {remaining(self._left):.0f} minutes")
        try:
            while (self._left or self._going) and (keep_going or not self._failed):
                self._start()
                self._look()
        finally:
            self._stop()
        return self._finish()

    def _start(self) -> None:
        """As many as there is room for; nothing overtakes what waits to be alone."""
        while self._left and not any(going.run.alone for going in self._going):
            if len(self._going) >= (1 if self._left[0].alone else AT_ONCE):
                return
            run = self._left.popleft()
            self._say(f"{run.name} begins, {run.minutes:g} minutes")
            self._going.append(Going(run, self._record.log(run), self._ended))

    def _look(self) -> None:
        """Until one has ended, or it is time to tell how far they are."""
        try:
            going = self._ended.get(timeout=TELL_EVERY)
        except queue.Empty:
            for each in self._going:
                self._say(f"{each.run.name}: {each.last_line()}")
            return
        self._going.remove(going)
        log = self._record.log(going.run).read_text(errors="replace")
        self._record.table(going.run).write_text(log.rpartition("\n\n")[2])
        if going.code == 0:
            self._record.add(going.run, going.version, going.seconds)
            self._say(f"{going.run.name} has passed after {going.seconds:.0f} s")
        else:
            self._failed.append(going.run)
            self._tell_failure(going, log)

    def _tell_failure(self, going: Going, log: str) -> None:
        why = f"has not ended after {going.seconds:.0f} s" if going.code is None else f"failed ({going.code})"
        self._say(f"{going.run.name} {why}; the end of {self._record.log(going.run)}:")
        print("\n".join(log.rstrip().splitlines()[-TAIL:]))
        print(f"again: {shlex.join([os.path.relpath(sys.executable), *going.run.command])}", flush=True)

    def _stop(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # a second one would leave some of them behind
        for going in self._going:
            self._say(f"{going.run.name} is stopped")
            going.interrupt()
        for going in self._going:
            going.join()

    def _finish(self) -> int:
        passed = [run for run in self._runs if self._record.passed(run)]
        for run in passed:
            print(f"\n{self._record.table(run).read_text().rstrip()}\n  took {self._record.seconds(run):.0f} s")
        print()
        without = ", ".join(run.name for run in self._runs if run not in passed)
        self._say(f"{len(passed)} of {len(self._runs)} runs have passed; failed or left: {without or 'none'}")
        return 1 if without else 0

    def _say(self, text: str) -> None:
        print(f"[{(time.monotonic() - self._began) / 60:5.1f} min] {text}", flush=True)


def remaining(runs: Sequence[Run] | deque[Run]) -> float:
    """Minutes that these take in their order."""
    together = [0.0] * AT_ONCE
    for run in runs:
        if run.alone:
            together = [max(together) + run.minutes] * AT_ONCE
        else:
            first = together.index(min(together))
            together[first] += run.minutes
    return max(together)


def main(arguments: Sequence[str], runs: Sequence[Run] = RUNS, place: Path = PLACE) -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/reliability trust", description="All that calls are trusted for."
    )
    parser.add_argument("--keep-going", action="store_true", help="the others go on when one fails")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return Trust(runs, place).go(keep_going=options.keep_going)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here")
        return 130


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
