"""Processes under measurement: servers and callers, each pinned to a core, and what the kernel tells of them.

CPU comes from /proc/<pid>/task/*/schedstat (ns, all living threads), memory from VmRSS and VmHWM.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import stubs

START = 20.0  # seconds for a server to accept: an import of grpcio on a loaded machine takes several
CC = [os.environ.get("CC", "cc"), "-O2", "-o"]


@functools.cache
def compiled(name: str) -> str:
    """The program made of a C file beside this one."""
    program = stubs.directory() / name
    subprocess.run([*CC, str(program), str(stubs.HERE / f"{name}.c")], check=True)
    return str(program)


class Process:
    """One process, pinned to a core (None: wherever the kernel likes). Ended by leaving its `with`."""

    def __init__(self, command: list[str], core: int | None, **options: Any) -> None:
        pin = [] if core is None else ["taskset", "-c", str(core)]
        self.popen = subprocess.Popen([*pin, *command], env=stubs.environment(), text=True, **options)
        self.pid = self.popen.pid

    def cpu(self) -> float:
        """Seconds of CPU so far. A thread that has ended is not counted, so pools must be grown before."""
        spent = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                spent += int((task / "schedstat").read_text().split()[0])
            except (FileNotFoundError, ProcessLookupError):
                continue
        return spent / 1e9

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes: VmRSS now, VmHWM at most since `reset_peak`."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise KeyError(field)

    def reset_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def read(self) -> dict[str, float]:
        """The next line of JSON that it prints."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.popen.args!r} has ended, see above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()


class Server(Process):
    """A server of one system. `system` is a name of serve.py, `raw_c`, or a file to run as `file serve PORT`."""

    def __init__(self, system: str, core: int | None = 0, **options: object) -> None:
        self.system = system
        self.port = free_port()
        more = [f"--{name}={value}" for name, value in options.items()]
        if system == "raw_c":
            command = [compiled("echo"), str(self.port)]
        elif system.endswith(".py"):
            command = [sys.executable, system, "serve", str(self.port)]
        else:
            command = [sys.executable, str(stubs.HERE / "serve.py"), system, str(self.port), *more]
        super().__init__(command, core)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + START
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if self.popen.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server of {self.system} did not start, see above") from None
                time.sleep(0.02)


class Caller(Process):
    """clients.py: calls on command. `closed`: with so many processes."""

    def __init__(self, system: str, port: int, core: int | None = 1, closed: int = 0) -> None:
        command = [sys.executable, str(stubs.HERE / "clients.py"), system, str(port)]
        command += ["closed", str(closed)] if closed else []
        super().__init__(command, core, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.read()

    def tell(self, *command: object) -> dict[str, float]:
        assert self.popen.stdin is not None
        self.popen.stdin.write(" ".join(map(str, command)) + "\n")
        self.popen.stdin.flush()
        return self.read()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wire(system: str) -> tuple[str, list[str]]:
    """How load.c is to speak to a system: the format, and the Login call's bytes in hex."""
    stubs.use()
    import clients
    import user_pb2

    payload: bytes = user_pb2.LoginRequest(name=clients.NAME, pwd=clients.PWD).SerializeToString()
    if system == "mprpc":
        names = b"\x0a\x15fixbug.UserServiceRpc\x12\x05Login\x18" + bytes([len(payload)])
        timeout = b"\x30\x88\x27"  # timeout_ms = 5000, the default of a channel
        return "mprpc", [names.hex(), timeout.hex(), payload.hex()]
    if system == "thriftpy2":
        import thrift_user

        request, reply_size = thrift_user.exchange(clients.NAME, clients.PWD)
        return "fixed", [request.hex(), str(reply_size)]
    if system.startswith("grpcio"):
        message = b"\0" + len(payload).to_bytes(4, "big") + payload
        return "h2", [hpack().hex(), "", message.hex()]
    return "be32", [clients.epoll_pb_request().hex()]


def hpack() -> bytes:
    """The headers of a gRPC call, as literals that are not indexed (RFC 7541, 6.2.2); names from the static table."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    def named(index: int, value: str) -> bytes:  # a 4-bit prefix
        return (bytes([index]) if index < 15 else bytes([15, index - 15])) + text(value)

    post, http = b"\x83", b"\x86"  # indexed: the static table has both whole
    return (
        post
        + http
        + named(4, "/fixbug.UserServiceRpc/Login")
        + named(1, "127.0.0.1")
        + named(31, "application/grpc")
        + b"\0"
        + text("te")
        + text("trailers")
        + b"\0"
        + text("grpc-timeout")
        + text("5S")
    )


class Load(Process):
    """load.c, replaying one system's Login call; `how` is "seconds", "latency" or "idle". `told` is what it prints.

    Its connections stay open until the `with` is left, so that the server's threads are still there to be counted.
    """

    def __init__(
        self, server: Server, how: str, amount: float, *, connections: int = 16, depth: int = 1, core: int | None = 1
    ) -> None:
        form, request = wire(server.system)
        numbers = [str(server.port), str(connections), str(depth)]
        command = [compiled("load"), form, *numbers, how, str(amount), *request]
        super().__init__(command, core, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self.told = self.read()
        except BaseException:
            self.__exit__()
            raise


def load(server: Server, how: str, amount: float, **options: Any) -> dict[str, float]:
    """One run of `Load`: calls, seconds, p50 and p99 in ns, and `cpu`, the server's seconds of CPU."""
    before = server.cpu()
    with Load(server, how, amount, **options) as loading:
        return {**loading.told, "cpu": server.cpu() - before}
