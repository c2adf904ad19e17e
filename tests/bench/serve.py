"""A server of one system, in a process of its own:  python serve.py SYSTEM PORT [--loops N] [--busy SECONDS] …

All answer Login alike: errcode 0, errmsg `ok`, success unless the password is `wrong`.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import stubs

GRPC_THREADS = 10  # as grpcio's own examples have it


def epoll_pb(options: argparse.Namespace) -> None:
    import epoll_pb

    epoll_pb.serve(options.port, options.loops)


def raw_python(options: argparse.Namespace) -> None:
    import raw_echo

    raw_echo.serve(options.port)


def mprpc(options: argparse.Namespace) -> None:
    import bench_pb2
    import user_pb2
    from bench_mprpc import BenchRpc
    from mprpc import MprpcConfig, MprpcController, RpcProvider
    from user_mprpc import UserServiceRpc

    class Users(UserServiceRpc):
        def Login(self, request: user_pb2.LoginRequest, controller: MprpcController) -> user_pb2.LoginResponse:
            response = user_pb2.LoginResponse(success=request.pwd != b"wrong")
            response.result.errcode = 0
            response.result.errmsg = b"ok"
            return response

    class Bench(BenchRpc):
        def Echo(self, request: bench_pb2.Blob, controller: MprpcController) -> bench_pb2.Blob:
            return bench_pb2.Blob(data=request.data)

        def Sleep(self, request: bench_pb2.Pause, controller: MprpcController) -> bench_pb2.Pause:
            time.sleep(request.milliseconds / 1000)
            return request

    zookeeper: dict[str, Any] = {
        "zookeeperip": "127.0.0.1",
        "zookeeperport": options.zookeeper,
        "zookeeper": "embedded",
    }
    provider = RpcProvider(
        MprpcConfig(
            rpcserverip=options.host,
            rpcserverport=options.port,
            loops=options.loops,
            max_connections=20000,
            **(zookeeper if options.zookeeper else {}),
            switch_interval=0,  # what the mode has set
        )
    )
    provider.notify_service(Users())
    provider.notify_service(Bench())
    for number in range(options.services):
        provider.notify_service(another_service(number))
    provider.run()


def another_service(number: int) -> object:
    """A service with one method, of which a provider can have as many as it likes."""
    from google.protobuf import descriptor_pb2, descriptor_pool

    file = descriptor_pb2.FileDescriptorProto(name=f"more{number}.proto", package="more", syntax="proto3")
    file.message_type.add(name=f"Nothing{number}")
    service = file.service.add(name=f"More{number}Rpc")
    service.method.add(name="Do", input_type=f".more.Nothing{number}", output_type=f".more.Nothing{number}")
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    from mprpc import Service

    described = pool.FindServiceByName(f"more.More{number}Rpc")
    return type(f"More{number}Rpc", (Service,), {"DESCRIPTOR": described, "Do": lambda self, request, _: request})()


def login(request: Any, context: Any = None) -> Any:
    import user_pb2

    response = user_pb2.LoginResponse(success=request.pwd != b"wrong")
    response.result.errcode = 0
    response.result.errmsg = b"ok"
    return response


def echo(request: Any, context: Any = None) -> Any:
    import bench_pb2

    return bench_pb2.Blob(data=request.data)


def grpc_handlers(login: Callable[..., Any], echo: Callable[..., Any]) -> tuple[Any, ...]:
    """Generic handlers: generated gRPC code would add nothing but a dependency."""
    import grpc

    import bench_pb2
    import user_pb2

    def unary(handler: Callable[..., Any], request: Any, response: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(handler, request.FromString, response.SerializeToString)

    return (
        grpc.method_handlers_generic_handler(
            "fixbug.UserServiceRpc", {"Login": unary(login, user_pb2.LoginRequest, user_pb2.LoginResponse)}
        ),
        grpc.method_handlers_generic_handler("bench.BenchRpc", {"Echo": unary(echo, bench_pb2.Blob, bench_pb2.Blob)}),
    )


def grpcio(options: argparse.Namespace) -> None:
    import grpc

    server = grpc.server(ThreadPoolExecutor(GRPC_THREADS))
    server.add_generic_rpc_handlers(grpc_handlers(login, echo))
    server.add_insecure_port(f"127.0.0.1:{options.port}")
    server.start()
    server.wait_for_termination()


def grpcio_aio(options: argparse.Namespace) -> None:
    import asyncio

    import grpc

    async def async_login(request: Any, context: Any) -> Any:
        return login(request)

    async def async_echo(request: Any, context: Any) -> Any:
        return echo(request)

    async def run() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(grpc_handlers(async_login, async_echo))
        server.add_insecure_port(f"127.0.0.1:{options.port}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(run())


def thriftpy2(options: argparse.Namespace) -> None:
    import thrift_user

    thrift_user.serve(options.port)


def keep_busy(seconds: float) -> None:
    """A thread that computes and never waits; `seconds` is the interpreter's switch interval, 0 leaves it alone."""
    if seconds:
        sys.setswitchinterval(seconds)

    def compute() -> None:
        number = 0
        while True:
            number = (number * 31 + 7) % 1000003

    threading.Thread(target=compute, daemon=True).start()


SYSTEMS = {
    "raw_python": raw_python,
    "epoll_pb": epoll_pb,
    "mprpc": mprpc,
    "grpcio": grpcio,
    "grpcio_aio": grpcio_aio,
    "thriftpy2": thriftpy2,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("port", type=int)
    parser.add_argument("--loops", type=int, default=1)
    parser.add_argument("--services", type=int, default=0, help="services beside those that are called")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen")
    parser.add_argument("--zookeeper", type=int, help="register there, with a ZooKeeper embedded")
    parser.add_argument("--busy", type=float, help="with a thread that computes, at that switch interval")
    options = parser.parse_args()
    stubs.assert_upb()
    if options.busy is not None:
        keep_busy(options.busy)
    SYSTEMS[options.system](options)


if __name__ == "__main__":
    main()
