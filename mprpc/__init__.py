"""Remote procedure calls for Python services, defined in protobuf and found through ZooKeeper.

A provider:                                        A consumer:

    class Users(UserServiceRpc):                       channel = MprpcChannel(MprpcConfig.load("test.conf"))
        def Login(self, request, controller):          users = UserServiceRpc_Stub(channel)
            return LoginResponse(success=True)         users.Login(LoginRequest(name=b"zhang san"))

    provider = RpcProvider(MprpcConfig.load("test.conf"))
    provider.notify_service(Users())
    provider.run()
"""

from typing import TYPE_CHECKING

from mprpc.channel import MprpcChannel, stub
from mprpc.config import MprpcConfig, init
from mprpc.context import inherit
from mprpc.controller import MprpcController
from mprpc.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    ConfigError,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    RpcError,
    Status,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from mprpc.provider import RpcProvider
from mprpc.service import Reply, Service, adaptive_limit, blocking
from mprpc.unary_call import UnaryCall

if TYPE_CHECKING:  # not in __all__: `from mprpc import *` must not import asyncio
    from mprpc.aio import AsyncMprpcChannel as AsyncMprpcChannel
    from mprpc.aio import AsyncUnaryCall as AsyncUnaryCall

__all__ = [
    "Aborted",
    "AlreadyExists",
    "Cancelled",
    "ConfigError",
    "DataLoss",
    "DeadlineExceeded",
    "FailedPrecondition",
    "Internal",
    "InvalidArgument",
    "MprpcChannel",
    "MprpcConfig",
    "MprpcController",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "Reply",
    "ResourceExhausted",
    "RpcError",
    "RpcProvider",
    "Service",
    "Status",
    "UnaryCall",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "adaptive_limit",
    "blocking",
    "inherit",
    "init",
    "stub",
]


def __getattr__(name: str) -> object:
    """asyncio's face is imported when it is used."""
    if name in ("AsyncMprpcChannel", "AsyncUnaryCall"):
        from mprpc import aio

        return getattr(aio, name)
    raise AttributeError(f"module 'mprpc' has no attribute {name!r}")
