"""What mypy --strict accepts: services in every form that a handler may have, and calls through a stub."""

import asyncio
from concurrent.futures import Future

import mprpc
import user_mprpc
import user_pb2


class Plain(user_mprpc.UserServiceRpc):
    def Login(self, request: user_pb2.LoginRequest, controller: mprpc.MprpcController) -> user_pb2.LoginResponse:
        if request.pwd == b"wrong":
            raise mprpc.RpcError(mprpc.Status.UNAUTHENTICATED, "wrong password")
        return user_pb2.LoginResponse(success=True)


class Late(user_mprpc.UserServiceRpc):
    def Login(
        self, request: user_pb2.LoginRequest, controller: mprpc.MprpcController
    ) -> Future[user_pb2.LoginResponse]:
        return Future()

    async def Register(
        self, request: user_pb2.RegisterRequest, controller: mprpc.MprpcController
    ) -> user_pb2.RegisterResponse:
        await asyncio.sleep(0)
        return user_pb2.RegisterResponse()


class Patient(user_mprpc.UserServiceRpc):
    @mprpc.blocking
    def Login(self, request: user_pb2.LoginRequest, controller: mprpc.MprpcController) -> user_pb2.LoginResponse:
        return user_pb2.LoginResponse(success=controller.time_remaining() is None)


class Undecided(user_mprpc.UserServiceRpc):
    def Login(
        self, request: user_pb2.LoginRequest, controller: mprpc.MprpcController
    ) -> mprpc.Reply[user_pb2.LoginResponse]:
        return Future() if request.name else user_pb2.LoginResponse()


def call(channel: mprpc.MprpcChannel) -> bool:
    stub = user_mprpc.UserServiceRpc_Stub(channel)
    login: mprpc.UnaryCall[user_pb2.LoginRequest, user_pb2.LoginResponse] = stub.Login
    answer = login(user_pb2.LoginRequest(name=b"zhang san", pwd=b"123456"), timeout=1.0)
    stub.Register(user_pb2.RegisterRequest(), controller=mprpc.MprpcController())
    return answer.success and answer.result.errcode == 0


services: list[mprpc.Service] = [Plain(), Late(), Undecided()]
name: str = Plain.DESCRIPTOR.full_name + services[0].GetDescriptor().name
