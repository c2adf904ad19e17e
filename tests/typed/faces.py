"""What mypy --strict accepts and refuses of the asyncio face, futures and async handlers; as in the files beside."""

import asyncio
from concurrent.futures import Future

import mprpc
import mprpc.testing
import user_mprpc
import user_pb2


class Users(user_mprpc.UserServiceRpc):
    async def Login(self, request: user_pb2.LoginRequest, controller: mprpc.MprpcController) -> user_pb2.LoginResponse:
        await asyncio.sleep(0)
        return user_pb2.LoginResponse(success=controller.is_canceled())


async def call(channel: mprpc.AsyncMprpcChannel) -> bool:
    stub = user_mprpc.UserServiceRpc_AsyncStub(channel)
    login: mprpc.AsyncUnaryCall[user_pb2.LoginRequest, user_pb2.LoginResponse] = stub.Login
    answer = await login(user_pb2.LoginRequest(name=b"zhang san"), timeout=1.0)
    task = asyncio.create_task(stub.Login(user_pb2.LoginRequest(), controller=mprpc.MprpcController()))
    many: list[user_pb2.LoginResponse] = await asyncio.gather(*(login(user_pb2.LoginRequest()) for _ in range(3)))
    async with mprpc.AsyncMprpcChannel("127.0.0.1:8000") as other:
        user_mprpc.UserServiceRpc_AsyncStub(other)
    return answer.success and (await task).success and many[0].success


async def refused(channel: mprpc.AsyncMprpcChannel, blocking: mprpc.MprpcChannel) -> None:
    stub = user_mprpc.UserServiceRpc_AsyncStub(channel)
    await stub.Login(user_pb2.RegisterRequest())  # type: ignore[arg-type]
    await stub.Login()  # type: ignore[call-arg]
    await stub.Logout(user_pb2.LoginRequest())  # type: ignore[attr-defined]
    print(stub.Login(user_pb2.LoginRequest()).success)  # type: ignore[attr-defined]
    answer: user_pb2.RegisterResponse = await stub.Login(user_pb2.LoginRequest())  # type: ignore[assignment]
    print(answer)
    user_mprpc.UserServiceRpc_AsyncStub(blocking)  # type: ignore[arg-type]
    user_mprpc.UserServiceRpc_Stub(channel)  # type: ignore[arg-type]


def futures(channel: mprpc.MprpcChannel) -> bool:
    stub = user_mprpc.UserServiceRpc_Stub(channel)
    future: Future[user_pb2.LoginResponse] = stub.Login.future(user_pb2.LoginRequest(), timeout=1.0)
    stub.Login.future(user_pb2.RegisterRequest())  # type: ignore[arg-type]
    wrong: Future[user_pb2.RegisterResponse] = stub.Login.future(user_pb2.LoginRequest())  # type: ignore[assignment]
    return future.result().success and wrong.cancel()


class WrongReturn(user_mprpc.UserServiceRpc):
    async def Login(self, request: user_pb2.LoginRequest, controller: mprpc.MprpcController) -> user_pb2.LoginResponse:
        return user_pb2.RegisterResponse()  # type: ignore[return-value]


def tests() -> None:
    with mprpc.testing.pair(Users()) as channel, mprpc.testing.serve(Users()) as address:
        assert futures(channel)
        registry = mprpc.testing.FakeRegistry({Users.DESCRIPTOR.full_name: [address]})
        assert futures(registry.channel())
        assert asyncio.run(call(registry.async_channel()))
