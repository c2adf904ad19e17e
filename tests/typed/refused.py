"""What mypy --strict refuses: every wrong line ignores the one error that it must be."""

import mprpc
import user_mprpc
import user_pb2


class WrongRequest(user_mprpc.UserServiceRpc):
    def Login(  # type: ignore[override]
        self, request: user_pb2.RegisterRequest, controller: mprpc.MprpcController
    ) -> user_pb2.LoginResponse:
        return user_pb2.LoginResponse()


class WrongResponse(user_mprpc.UserServiceRpc):
    def Login(  # type: ignore[override]
        self, request: user_pb2.LoginRequest, controller: mprpc.MprpcController
    ) -> user_pb2.RegisterResponse:
        return user_pb2.RegisterResponse()


class WrongField(user_mprpc.UserServiceRpc):
    def Login(self, request: user_pb2.LoginRequest, controller: mprpc.MprpcController) -> user_pb2.LoginResponse:
        return user_pb2.LoginResponse(success=request.nme == b"x")  # type: ignore[attr-defined]


class WrongReturn(user_mprpc.UserServiceRpc):
    def Login(self, request: user_pb2.LoginRequest, controller: mprpc.MprpcController) -> user_pb2.LoginResponse:
        return user_pb2.RegisterResponse()  # type: ignore[return-value]


def call(channel: mprpc.MprpcChannel) -> None:
    stub = user_mprpc.UserServiceRpc_Stub(channel)
    stub.Login(user_pb2.RegisterRequest())  # type: ignore[arg-type]
    stub.Login(b"\x0a\x00")  # type: ignore[arg-type]
    stub.Login()  # type: ignore[call-arg]
    stub.Logout(user_pb2.LoginRequest())  # type: ignore[attr-defined]
    answer: user_pb2.RegisterResponse = stub.Login(user_pb2.LoginRequest())  # type: ignore[assignment]
    print(answer, stub.Login(user_pb2.LoginRequest()).sucess)  # type: ignore[attr-defined]


user_mprpc.UserServiceRpc_Stub("127.0.0.1:8000")  # type: ignore[arg-type]
