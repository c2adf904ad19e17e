"""The processes of a run: providers (`member.py`), consumers (`caller.py`), and what they have told so far.

One thread a process reads what it tells; `Fleet.wait` waits, bounded, for something to have been told.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import generated

if TYPE_CHECKING:
    from typing_extensions import Self

SERVICE = "mprpc.test.LedgerRpc"
PATIENCE = 60.0  # seconds for what takes one, on a machine that is busy
NUMBER = struct.Struct("<Q")


class Process:
    """One process and the lines that it tells, each with the time at which it was said."""

    def __init__(self, fleet: Fleet, name: str, module: str, *arguments: str) -> None:
        self.name = name
        self.told: dict[str, Any] = {}  # the newest of each kind
        self._fleet = fleet
        with (fleet.directory / f"{name}.log").open("ab") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"PYTHONPATH": fleet.path},
            )
        self.pid = self._popen.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            said = json.loads(line)
            with self._fleet.changed:
                self.told |= said
                self._hear(said)
                self._fleet.changed.notify_all()
        with self._fleet.changed:
            self._end()
            self._fleet.changed.notify_all()

    def _hear(self, said: dict[str, Any]) -> None:
        """With the fleet's condition held."""

    def _end(self) -> None:
        """It says no more. With the fleet's condition held."""

    def order(self, line: str) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(line + "\n")
        self._popen.stdin.flush()

    def ask(self, command: str) -> Any:
        """The answer to a command that is answered under its own name."""
        with self._fleet.changed:
            self.told.pop(command, None)
        self.order(command)
        self._fleet.wait(lambda: command in self.told, f"{self.name} to answer {command}")
        return self.told[command]

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def wait(self) -> int:
        code = self._popen.wait(PATIENCE)
        self._reader.join(PATIENCE)
        self.close()
        return code

    def close(self) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()
        self._reader.join(PATIENCE)
        for pipe in (self._popen.stdin, self._popen.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue  # what was written last was not read any more


class Member(Process):
    """A provider. It is warm when made, and starts when it is told its port."""

    def __init__(self, fleet: Fleet, name: str) -> None:
        self.address = ""
        super().__init__(fleet, name, "reliability.member", json.dumps(fleet.config), str(fleet.booked))

    def start(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.order(str(port))

    def kill(self) -> tuple[float, float]:
        """When it was killed, and when it was gone: on a busy machine its sockets live on for a moment."""
        killed = time.monotonic()
        self.signal(signal.SIGKILL)
        self.wait()
        return killed, time.monotonic()

    @property
    def session(self) -> tuple[int, bytes]:
        number, password = self.ask("session")
        return int(number), bytes.fromhex(password)


class Caller(Process):
    """A process with consumers."""

    def __init__(self, fleet: Fleet, number: int, **orders: Any) -> None:
        self.addresses: frozenset[str] = frozenset()
        self.confirmed = False
        orders |= {"number": number, "config": fleet.config}
        super().__init__(fleet, f"caller-{number}", "reliability.caller", json.dumps(orders))

    def _hear(self, said: dict[str, Any]) -> None:
        fleet, at = self._fleet, said["at"]
        if "list" in said:
            self.addresses, self.confirmed = frozenset(said["list"]), said["confirmed"]
        elif "failed" in said:
            fleet.failures.append({"caller": self.name, "ended": at} | said["failed"])
        elif "unreached" in said:
            fleet.unreached.append((at, said["unreached"], f"{self.name}/{said['consumer']}"))
        elif "tally" in said:
            fleet.add(said["tally"])

    def _end(self) -> None:
        if "ended" not in self.told:
            self._fleet.crashed.append(self.name)


class Fleet:
    """All processes of a run. `with` ends them. `config`: the keys that providers and consumers have in common."""

    def __init__(self, **config: Any) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="mprpc-reliability-"))
        self.booked = self.directory / "booked"
        self.config = config
        self.path = os.pathsep.join((str(generated.ROOT), str(generated.directory()), str(generated.ROOT / "tests")))
        self.changed = threading.Condition()
        self.members: list[Member] = []
        self.callers: list[Caller] = []
        self.failures: list[dict[str, Any]] = []
        self.unreached: list[tuple[float, str, str]] = []
        self.crashed: list[str] = []  # consumers that ended without having been told to
        self.calls = 0
        self.slowest = 0.0
        self.first_answer: dict[int, float] = {}  # by process
        self.answers: Counter[int] = Counter()
        self.confirmed_booked: list[int] = []
        self._processes: list[Process] = []
        self._standby: Member | None = None
        self._made = 0

    def add(self, tally: dict[str, Any]) -> None:
        self.calls += tally["calls"]
        self.slowest = max(self.slowest, tally["slowest"])
        self.confirmed_booked += tally["booked"]
        for process, count, first in tally["processes"]:
            self.answers[process] += count
            self.first_answer.setdefault(process, first)

    def wait(self, condition: Callable[[], Any], what: str, timeout: float = PATIENCE) -> None:
        with self.changed:
            came = self.changed.wait_for(lambda: self.crashed or condition(), timeout)
            if self.crashed:
                raise RuntimeError(f"{', '.join(self.crashed)} crashed\n{self.logs()}")
            if not came:
                raise TimeoutError(f"waited {timeout:g} s for {what}")

    def pause(self, seconds: float) -> None:
        """Waits while the load goes on; raises RuntimeError when a consumer crashes."""
        with suppress(TimeoutError):
            self.wait(lambda: False, "time to pass", max(0.0, seconds))

    def start(self, name: str, module: str, *arguments: str) -> Process:
        process = Process(self, name, module, *arguments)
        self._processes.append(process)
        return process

    def warm_up(self) -> None:
        """Has the next provider ready to start."""
        if self._standby is None:
            self._standby = Member(self, f"member-{self._made}")
            self._made += 1
            self._processes.append(self._standby)

    def start_member(self, port: int) -> Member:
        """A provider that is starting at `port`: it has its modules loaded and listens within milliseconds."""
        self.warm_up()
        member, self._standby = self._standby, None
        assert member is not None
        self.wait(lambda: "warm" in member.told, f"{member.name} to be warm")
        member.start(port)
        return member

    def start_caller(self, **orders: Any) -> Caller:
        caller = Caller(self, len(self.callers) + 1, **orders)
        self._processes.append(caller)
        self.callers.append(caller)
        return caller

    def listed(self, addresses: set[str]) -> bool:
        """Whether every consumer lists these addresses and no others, and is sure of it."""
        return all(caller.confirmed and caller.addresses == addresses for caller in self.callers)

    def end_callers(self) -> None:
        for caller in self.callers:
            caller.order("end")
        for caller in self.callers:
            caller.wait()

    def booked_numbers(self) -> Counter[int]:
        """How often each Book ran."""
        data = self.booked.read_bytes() if self.booked.exists() else b""
        return Counter(number for (number,) in NUMBER.iter_unpack(data))

    def logs(self, most: int = 2000) -> str:
        """The end of each log that says something."""
        parts = []
        for log in sorted(self.directory.glob("*.log")):
            text = log.read_text(errors="replace")
            if text:
                parts.append(f"{log.name}:\n{text[-most:]}")
        return "\n".join(parts)

    def close(self) -> None:
        for process in self._processes:
            process.close()
        shutil.rmtree(self.directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
