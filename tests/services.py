"""The example services, as tests serve them: each test says what its Login does.

with services.serving(lambda request, controller: LoginResponse(success=True)) as provider: …
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import generated
from mprpc import MprpcChannel, MprpcConfig, RpcProvider

user_pb2 = generated.module("user_pb2")
user_mprpc = generated.module("user_mprpc")

LoginRequest, LoginResponse = user_pb2.LoginRequest, user_pb2.LoginResponse
REQUEST = LoginRequest(name=b"zhang san", pwd=b"123456")
Login = Callable[[Any, Any], Any]


def accept(request: Any, controller: Any) -> Any:
    """A Login that lets everybody in, and says their name back."""
    return LoginResponse(result=user_pb2.ResultCode(errmsg=request.name), success=True)


class Users(user_mprpc.UserServiceRpc):  # type: ignore[name-defined, misc]
    """UserServiceRpc with a Login of the test's; its Register is not written."""

    def __init__(self, login: Login = accept) -> None:
        self._login = login

    def Login(self, request: Any, controller: Any) -> Any:
        return self._login(request, controller)


@contextmanager
def serving(login: Login = accept, **keys: Any) -> Iterator[RpcProvider]:
    """A started provider on a free port of 127.0.0.1. keys: its configuration."""
    provider = RpcProvider(MprpcConfig(**keys))
    provider.notify_service(Users(login))
    provider.start()
    try:
        yield provider
    finally:
        provider.stop(0.5)


@contextmanager
def calling(target: str | RpcProvider, **options: Any) -> Iterator[Any]:
    """A stub of UserServiceRpc on a channel of its own."""
    address = target if isinstance(target, str) else target.address
    with MprpcChannel(address, **options) as channel:
        yield user_mprpc.UserServiceRpc_Stub(channel)


def start_python(program: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A Python process that can import mprpc, the generated modules and these helpers. Output is captured as text."""
    here = str(generated.ROOT / "tests")
    path = f"import sys; sys.path[:0] = [{str(generated.ROOT)!r}, {str(generated.directory())!r}, {here!r}]\n"
    return subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", path + program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
