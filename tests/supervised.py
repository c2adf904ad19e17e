"""A provider with worker processes, in a process of its own: its lines, its workers, and a load on it.

Its Login answers with the process that serves it; for the name `sleep0.5` after half a second.
"""

from __future__ import annotations

import os
import re
import select
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import services
from mprpc import MprpcChannel, RpcError
from zookeeper_server import free_ports

if TYPE_CHECKING:
    from typing_extensions import Self

PATIENCE = 60.0  # seconds for what takes one, on a machine that is busy

PROGRAM = """
import os, signal, sys, threading, time
import mprpc, services
from mprpc import log

def login(request, controller):
    if request.name.startswith(b"sleep"):
        print("asleep", file=sys.stderr, flush=True)
        time.sleep(float(request.name[5:]))
    return services.LoginResponse(result=services.user_pb2.ResultCode(errmsg=b"%d" % os.getpid()), success=True)

config = mprpc.MprpcConfig.load(sys.argv[1])
log.start(logdir=config.logdir, level=config.loglevel)
provider = mprpc.RpcProvider(config)
provider.notify_service(services.Users(login))
try:
    provider.run()
except mprpc.ConfigError as error:
    sys.exit(f"refused: {error}")
print("returned", os.getpid(), flush=True)
"""


def who(response: Any) -> int:
    """The process that answered."""
    return int(response.result.errmsg)


class Supervised:
    """The program above with these keys, or another one. `with` ends it."""

    def __init__(self, directory: Path, program: str = PROGRAM, **keys: object) -> None:
        conf = directory / "workers.conf"
        keys = {"rpcserverport": free_ports(1)[0], "workers": 2} | keys
        conf.write_text("".join(f"{name}={value}\n" for name, value in keys.items()))
        self.address = f"127.0.0.1:{keys['rpcserverport']}"
        self.lines: list[tuple[float, str]] = []
        self.changed = threading.Condition()
        self.popen = services.start_python(program, str(conf))
        self.pid = self.popen.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self.changed:
                self.lines.append((time.monotonic(), line.rstrip()))
                self.changed.notify_all()

    def wait_line(self, pattern: str, count: int = 1, timeout: float = PATIENCE) -> list[tuple[float, str]]:
        """The first `count` lines that match, each with the time when it came."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.matching(pattern)) >= count, timeout):
                raise TimeoutError(f"no {count} lines {pattern!r} in {timeout} s:\n{self.log}")
            return self.matching(pattern)[:count]

    def matching(self, pattern: str) -> list[tuple[float, str]]:
        """The lines so far that match."""
        return [(at, line) for at, line in tuple(self.lines) if re.search(pattern, line)]

    @property
    def log(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def workers(self) -> list[int]:
        """The workers' processes, in their order, the newest of each."""
        newest = {name: int(pid) for name, pid in re.findall(r"\] (worker \d+) is process (\d+)", self.log)}
        return [newest[name] for name in sorted(newest)]

    def tell(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self, number: int = signal.SIGTERM, timeout: float = PATIENCE) -> int:
        """Its exit code."""
        if self.popen.poll() is None:
            self.tell(number)
        return self.wait(timeout)

    def wait(self, timeout: float = PATIENCE) -> int:
        code = self.popen.wait(timeout)
        self._reader.join(PATIENCE)
        return code

    def output(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.end()
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            assert pipe is not None
            pipe.close()


class Load:
    """Calls at a steady rate, from threads with channels of their own, until the `with` is left. Any target."""

    def __init__(self, target: Any, rate: float, threads: int = 4) -> None:
        self.calls = 0
        self.failures: list[str] = []
        self.by: dict[int, float] = {}  # process: when it answered last
        self.slowest = 0.0
        self._target = target
        self._pause = threads / rate
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(threads)]

    def _call(self) -> None:
        with MprpcChannel(self._target, timeout=5.0) as channel:
            users = services.user_mprpc.UserServiceRpc_Stub(channel)
            due = time.monotonic()
            while not self._ended.wait(max(0.0, due - time.monotonic())):
                due = max(due + self._pause, time.monotonic() - 1.0)
                self._one(users)

    def _one(self, users: Any) -> None:
        began = time.monotonic()
        try:
            process, failure = who(users.Login(services.REQUEST)), ""
        except RpcError as error:
            process, failure = 0, repr(error)
        now = time.monotonic()
        with self._lock:
            self.calls += 1
            self.slowest = max(self.slowest, now - began)
            self.by[process] = now
            if failure:
                self.failures.append(failure)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def gone(pid: int, timeout: float = PATIENCE) -> bool:
    """Waits for a process, which need not be a child, to end; whether it has."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(timeout * 1000))
    finally:
        os.close(descriptor)
