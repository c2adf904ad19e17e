"""Compares calls that overlap on one connection, futures and asyncio, with what others offer:

    python tests/bench/faces.py [--rounds N] [--seconds S] [FACE …]

64 Login calls are kept in flight, callers on core 0 and servers on core 1, in short rounds of each face in turn; a
ratio is the median of the rounds' own. The yardsticks are written by hand: one thread that pipelines over a blocking
socket, and an asyncio Protocol with a future for each call; both speak to epoll_pb.py, whose replies come in order, so
they need no ids.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import stubs

IN_FLIGHT = 64
NAME, PWD = b"zhang san", b"123456"
CLIENT_CORE, SERVER_CORE = 0, 1
RATIOS = [
    ("futures", "pipelined", 0.5),
    ("futures", "grpcio_futures", 15.0),
    ("aio", "protocol", 1.0),
    ("aio", "grpcio_aio", 6.0),
]

unpack = struct.Struct(">I").unpack_from
pack = struct.Struct(">I").pack
Run = Callable[[float], int]


def request() -> Any:
    import user_pb2

    return user_pb2.LoginRequest(name=NAME, pwd=PWD)


def windowed(start: Callable[[], Any]) -> Run:
    """Waits for the oldest of the futures, then starts another."""

    def run(seconds: float) -> int:
        clock, count = time.monotonic, 0
        end = clock() + seconds
        flying = deque(start() for _ in range(IN_FLIGHT))
        while clock() < end:
            flying.popleft().result()
            flying.append(start())
            count += 1
        for future in flying:
            future.result()
        return count + IN_FLIGHT

    return run


def tasked(loop: asyncio.AbstractEventLoop, call: Callable[[], Any]) -> Run:
    """Tasks that each call again and again."""

    async def caller(end: float) -> int:
        clock, count = time.monotonic, 0
        while clock() < end:
            await call()
            count += 1
        return count

    async def callers(seconds: float) -> int:
        end = time.monotonic() + seconds
        return sum(await asyncio.gather(*(caller(end) for _ in range(IN_FLIGHT))))

    return lambda seconds: loop.run_until_complete(callers(seconds))


def futures(port: int) -> Run:
    from mprpc import MprpcChannel
    from user_mprpc import UserServiceRpc_Stub

    channel = MprpcChannel(f"127.0.0.1:{port}")
    channel.wait_ready(5)
    login = UserServiceRpc_Stub(channel).Login
    return windowed(lambda: login.future(request()))


def blocking(port: int) -> Run:
    """One call at a time: what the other faces must not make slower."""
    from mprpc import MprpcChannel
    from user_mprpc import UserServiceRpc_Stub

    login = UserServiceRpc_Stub(MprpcChannel(f"127.0.0.1:{port}")).Login

    def run(seconds: float) -> int:
        clock, count = time.monotonic, 0
        end = clock() + seconds
        while clock() < end:
            login(request())
            count += 1
        return count

    return run


def grpcio_futures(port: int) -> Run:
    import grpc

    import clients

    login, _ = clients.grpc_methods(grpc.insecure_channel(f"127.0.0.1:{port}"))
    return windowed(lambda: login.future(request(), timeout=5))


def pipelined(port: int) -> Run:
    """For every batch of replies as many requests leave in one send."""
    import user_pb2

    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def requests(count: int) -> bytes:
        parts = []
        for _ in range(count):
            body = request().SerializeToString()
            parts.append(pack(len(body) + 1) + b"\0" + body)
        return b"".join(parts)

    def replies(data: bytes) -> tuple[int, bytes]:
        at = count = 0
        while len(data) - at >= 4 and len(data) >= (end := at + 4 + unpack(data, at)[0]):
            user_pb2.LoginResponse.FromString(data[at + 4 : end])
            at, count = end, count + 1
        return count, data[at:]

    def run(seconds: float) -> int:
        clock, total, rest, flying = time.monotonic, 0, b"", IN_FLIGHT
        end = clock() + seconds
        connection.sendall(requests(IN_FLIGHT))
        while flying:
            count, rest = replies(rest + connection.recv(65536))
            total += count
            flying -= count
            if clock() < end:
                connection.sendall(requests(count))
                flying += count
        return total

    return run


def aio(port: int) -> Run:
    from mprpc import AsyncMprpcChannel
    from user_mprpc import UserServiceRpc_AsyncStub

    login = UserServiceRpc_AsyncStub(AsyncMprpcChannel(f"127.0.0.1:{port}")).Login
    return tasked(asyncio.new_event_loop(), lambda: login(request()))


def grpcio_aio(port: int) -> Run:
    import grpc

    import clients

    loop = asyncio.new_event_loop()

    async def connect() -> Any:
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    login, _ = clients.grpc_methods(loop.run_until_complete(connect()))
    return tasked(loop, lambda: login(request(), timeout=5))


class Protocol(asyncio.Protocol):
    """Frames as epoll_pb.py has them; replies come in the order of the requests."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        import user_pb2

        self.transport: Any = transport
        self.loop = asyncio.get_running_loop()
        self.waiting: deque[asyncio.Future[Any]] = deque()
        self.rest = b""
        self.parse = user_pb2.LoginResponse.FromString

    def data_received(self, data: bytes) -> None:
        data = self.rest + data if self.rest else data
        at, size = 0, len(data)
        while size - at >= 4 and size >= (end := at + 4 + unpack(data, at)[0]):
            self.waiting.popleft().set_result(self.parse(data[at + 4 : end]))
            at = end
        self.rest = data[at:]

    def login(self) -> asyncio.Future[Any]:
        body = request().SerializeToString()
        self.transport.write(pack(len(body) + 1) + b"\0" + body)
        future = self.loop.create_future()
        self.waiting.append(future)
        return future


def protocol(port: int) -> Run:
    loop = asyncio.new_event_loop()
    _, made = loop.run_until_complete(loop.create_connection(Protocol, "127.0.0.1", port))
    return tasked(loop, made.login)


FACES: dict[str, tuple[str, Callable[[int], Run]]] = {
    "blocking": ("mprpc", blocking),
    "futures": ("mprpc", futures),
    "pipelined": ("epoll_pb", pipelined),
    "grpcio_futures": ("grpcio", grpcio_futures),
    "aio": ("mprpc", aio),
    "protocol": ("epoll_pb", protocol),
    "grpcio_aio": ("grpcio_aio", grpcio_aio),
}


def serve_commands(face: str, port: int) -> None:
    """The caller's process: a line `SECONDS` is answered by calls a second."""
    stubs.assert_upb()
    run = FACES[face][1](port)
    run(0.2)
    print("{}", flush=True)
    for line in sys.stdin:
        start = time.monotonic()
        count = run(float(line))
        print(json.dumps({"rate": count / (time.monotonic() - start)}), flush=True)


def measure(names: list[str], rounds: int, seconds: float) -> dict[str, list[float]]:
    import subprocess

    from machinery import Process, Server

    rates: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(Server(kind, SERVER_CORE)) for kind in {FACES[name][0] for name in names}}
        callers = {}
        for name in names:
            command = [sys.executable, __file__, "--caller", name, str(servers[FACES[name][0]].port)]
            caller = Process(command, CLIENT_CORE, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            callers[name] = stack.enter_context(caller)
            caller.read()
        for number in range(rounds):
            for name in names if number % 2 else names[::-1]:
                pipe = callers[name].popen.stdin
                pipe.write(f"{seconds}\n")
                pipe.flush()
                rates[name].append(callers[name].read()["rate"])
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/bench/faces.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("faces", nargs="*", metavar="FACE", help=f"of {', '.join(FACES)}; all by default")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.4, help="of one face in one round")
    parser.add_argument("--caller", nargs=2, metavar=("FACE", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.caller:
        serve_commands(options.caller[0], int(options.caller[1]))
        return
    rates = measure(options.faces or list(FACES), options.rounds, options.seconds)
    for name, values in rates.items():
        print(f"{name:15} {median(values):9.0f} calls/s  (from {min(values):.0f} to {max(values):.0f})")
    for ours, other, goal in RATIOS:
        if ours in rates and other in rates:
            ratio = median(a / b for a, b in zip(rates[ours], rates[other], strict=True))
            print(f"{ours} / {other}: {ratio:.2f} (at least {goal:g})")


if __name__ == "__main__":
    main()
