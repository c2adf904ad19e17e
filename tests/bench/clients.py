"""One blocking client of each system, all with the same face, and the loops that time them.

As a program it calls on command, in a process of its own, pinned by whoever starts it; a line of JSON answers each line
of its input:  python clients.py SYSTEM PORT

    latency N            ->  p50, p99, mean of N Login calls, ns
    bulk N SIZE          ->  seconds for N echoes of SIZE bytes
    threads N SECONDS    ->  calls that N threads on one channel made
    sleeping N MS        ->  when N threads have called a method that sleeps so long 3 times each; they go on
    closed SECONDS       ->  calls that N processes made, each on its own connection: SYSTEM PORT closed N
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import stubs

NAME, PWD = b"zhang san", b"123456"
ONE = struct.Struct("d")
WARM_UP = 300  # calls: caches, the interpreter's specialised bytecode


class Client:
    """`login()` makes one Login call as a user of the system would, `echo(data)` one of a bytes field."""

    login: Callable[[], Any]
    echo: Callable[[bytes], bytes]
    sleep: Callable[[int], Any]  # ms; mprpc's alone
    close: Callable[[], Any]

    def latency(self, count: int) -> list[int]:
        """ns of each of so many Login calls."""
        login, clock, times = self.login, time.perf_counter_ns, [0] * count
        for i in range(count):
            start = clock()
            login()
            times[i] = clock() - start
        return times


class RawPython(Client):
    def __init__(self, port: int) -> None:
        import raw_echo

        client = raw_echo.Client(port, epoll_pb_request())
        self.login, self.echo, self.close = client.login, client.echo, client.socket.close


class EpollPb(Client):
    def __init__(self, port: int, file: str = "") -> None:
        client = epoll_pb_module(file).Client(port)
        self.login = lambda: client.login(NAME, PWD)
        self.echo = getattr(client, "echo", None) or bytes
        self.close = client.socket.close if not file else lambda: None


def epoll_pb_module(file: str = "") -> ModuleType:
    """Ours, or another file with the same face."""
    if not file:
        import epoll_pb

        return epoll_pb
    spec = importlib.util.spec_from_file_location("other_epoll_pb", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def epoll_pb_request() -> bytes:
    import user_pb2

    body = user_pb2.LoginRequest(name=NAME, pwd=PWD).SerializeToString()
    return (len(body) + 1).to_bytes(4, "big") + b"\0" + body


class Mprpc(Client):
    def __init__(self, port: int) -> None:
        import bench_pb2
        import user_pb2
        from bench_mprpc import BenchRpc_Stub
        from mprpc import MprpcChannel
        from user_mprpc import UserServiceRpc_Stub

        channel = MprpcChannel(f"127.0.0.1:{port}")
        users, bench = UserServiceRpc_Stub(channel), BenchRpc_Stub(channel)
        channel.wait_ready(5)
        self.login = lambda: users.Login(user_pb2.LoginRequest(name=NAME, pwd=PWD))
        self.echo = lambda data: bench.Echo(bench_pb2.Blob(data=data)).data
        self.sleep = lambda milliseconds: bench.Sleep(bench_pb2.Pause(milliseconds=milliseconds))
        self.close = channel.close


class Providers(Client):
    """Ours with a list of so many providers, all connected: addresses of 127.0.0.0/8, at which one server listens."""

    def __init__(self, count: int, port: int) -> None:
        import user_pb2
        from mprpc.testing import FakeRegistry
        from user_mprpc import UserServiceRpc_Stub

        addresses = [f"127.0.{1 + i // 250}.{1 + i % 250}:{port}" for i in range(count)]
        channel = FakeRegistry({"fixbug.UserServiceRpc": addresses}).channel()
        users = UserServiceRpc_Stub(channel)
        until = time.monotonic_ns() + 60 * 10**9
        for endpoint in users.Login._target.all(until):
            endpoint.connect(until)
        self.login = lambda: users.Login(user_pb2.LoginRequest(name=NAME, pwd=PWD))
        self.close = channel.close


class Grpcio(Client):
    def __init__(self, port: int) -> None:
        import grpc

        import bench_pb2
        import user_pb2

        channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        login, echo = grpc_methods(channel)
        self.login = lambda: login(user_pb2.LoginRequest(name=NAME, pwd=PWD), timeout=5)
        self.echo = lambda data: echo(bench_pb2.Blob(data=data), timeout=5).data
        self.close = channel.close


class GrpcioAio(Client):
    """A call awaited, then the next."""

    def __init__(self, port: int) -> None:
        import asyncio

        import grpc

        import bench_pb2
        import user_pb2

        self.run = asyncio.new_event_loop().run_until_complete

        async def connect() -> Any:
            return grpc.aio.insecure_channel(f"127.0.0.1:{port}")

        channel = self.run(connect())
        self.async_login, self.async_echo = grpc_methods(channel)
        self.close = lambda: self.run(channel.close())
        self.request = user_pb2.LoginRequest
        self.login = lambda: self.run(self.one())
        self.echo = lambda data: self.run(self.one_echo(bench_pb2.Blob(data=data)))

    async def one(self) -> Any:
        return await self.async_login(self.request(name=NAME, pwd=PWD), timeout=5)

    async def one_echo(self, blob: Any) -> bytes:
        return (await self.async_echo(blob, timeout=5)).data  # type: ignore[no-any-return]

    def latency(self, count: int) -> list[int]:
        async def calls() -> list[int]:
            clock, times = time.perf_counter_ns, [0] * count
            for i in range(count):
                start = clock()
                await self.async_login(self.request(name=NAME, pwd=PWD), timeout=5)
                times[i] = clock() - start
            return times

        return self.run(calls())


def grpc_methods(channel: Any) -> tuple[Any, Any]:
    import bench_pb2
    import user_pb2

    return (
        channel.unary_unary(
            "/fixbug.UserServiceRpc/Login",
            request_serializer=user_pb2.LoginRequest.SerializeToString,
            response_deserializer=user_pb2.LoginResponse.FromString,
        ),
        channel.unary_unary(
            "/bench.BenchRpc/Echo",
            request_serializer=bench_pb2.Blob.SerializeToString,
            response_deserializer=bench_pb2.Blob.FromString,
        ),
    )


class Thriftpy2(Client):
    def __init__(self, port: int) -> None:
        import thrift_user

        client = thrift_user.Client(port)
        self.login = lambda: client.login(NAME, PWD)
        self.echo, self.close = client.echo, client.client.close


CLIENTS: dict[str, Callable[[int], Client]] = {
    "raw_c": RawPython,
    "raw_python": RawPython,
    "epoll_pb": EpollPb,
    "mprpc": Mprpc,
    "grpcio": Grpcio,
    "grpcio_aio": GrpcioAio,
    "thriftpy2": Thriftpy2,
    **{f"providers_{count}": partial(Providers, count) for count in (1, 1000)},
}


def latency(client: Client, count: int) -> dict[str, float]:
    times = sorted(client.latency(count))
    return {"p50": times[count // 2], "p99": times[count * 99 // 100], "mean": sum(times) / count}


def bulk(client: Client, count: int, size: int) -> dict[str, float]:
    data = os.urandom(4096) * (size // 4096)
    if client.echo(data) != data:
        raise RuntimeError("the echo is not what was sent")
    start = time.perf_counter()
    for _ in range(count):
        client.echo(data)
    return {"seconds": time.perf_counter() - start}


def threads(client: Client, count: int, seconds: float) -> dict[str, float]:
    made, begin = [0] * count, threading.Barrier(count + 1)

    def call(number: int) -> None:
        login, clock = client.login, time.monotonic
        begin.wait()
        end = clock() + seconds
        while clock() < end:
            login()
            made[number] += 1

    running = [threading.Thread(target=call, args=(number,)) for number in range(count)]
    for thread in running:
        thread.start()
    begin.wait()
    start = time.monotonic()
    for thread in running:
        thread.join()
    return {"calls": sum(made), "seconds": time.monotonic() - start}


def sleeping(client: Client, count: int, milliseconds: int) -> dict[str, float]:
    called = threading.Barrier(count + 1)

    def call() -> None:
        for _ in range(3):
            client.sleep(milliseconds)
        called.wait()
        while True:
            client.sleep(milliseconds)

    for _ in range(count):
        threading.Thread(target=call, daemon=True).start()
    called.wait()
    return {}


def closed(make: Callable[[], Client], count: int) -> Callable[[float], dict[str, float]]:
    """Forks processes that each make a client of their own; what is returned lets all call for so many seconds."""
    commands: list[socket.socket] = []
    for _ in range(count):
        ours, theirs = socket.socketpair()
        commands.append(ours)
        if os.fork() == 0:
            for command in commands:  # so that the parent's end alone is left, and its death is the stream's end
                command.close()
            follow(theirs, make())
            os._exit(0)
        theirs.close()
    for command in commands:
        command.recv(8)

    def run(seconds: float) -> dict[str, float]:
        for command in commands:
            command.send(ONE.pack(seconds))
        return {"calls": sum(ONE.unpack(command.recv(8))[0] for command in commands), "seconds": seconds}

    return run


def follow(command: socket.socket, client: Client) -> None:
    login, clock = client.login, time.monotonic
    client.latency(WARM_UP)
    answer = 0.0
    while command.send(ONE.pack(answer)) and (told := command.recv(8)):
        end, answer = clock() + ONE.unpack(told)[0], 0.0
        while clock() < end:
            login()
            answer += 1


def main() -> None:
    stubs.assert_upb()
    system, port, *more = sys.argv[1:]
    if more and more[0] == "closed":
        run = closed(lambda: CLIENTS[system](int(port)), int(more[1]))
        commands: dict[str, Callable[..., dict[str, float]]] = {"closed": run}
    else:
        client = EpollPb(int(port), system) if system.endswith(".py") else CLIENTS[system](int(port))
        client.latency(WARM_UP)
        commands = {
            "latency": partial(latency, client),
            "bulk": partial(bulk, client),
            "threads": partial(threads, client),
            "sleeping": partial(sleeping, client),
        }
    print("{}", flush=True)
    for line in sys.stdin:
        name, *numbers = line.split()
        print(json.dumps(commands[name](*map(json.loads, numbers))), flush=True)


if __name__ == "__main__":
    main()
