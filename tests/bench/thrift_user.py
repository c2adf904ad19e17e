"""The same service in Thrift, through thriftpy2's defaults: a thread for each connection, buffered transport, binary
protocol, both in Cython."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import thriftpy2
import thriftpy2.protocol
import thriftpy2.rpc
import thriftpy2.thrift
import thriftpy2.transport

protocols: Any = thriftpy2.protocol
rpc: Any = thriftpy2.rpc
transports: Any = thriftpy2.transport

IDL = """
struct ResultCode { 1: i32 errcode, 2: binary errmsg }
struct LoginRequest { 1: binary name, 2: binary pwd }
struct LoginResponse { 1: ResultCode result, 2: bool success }
service User {
    LoginResponse Login(1: LoginRequest request)
    binary Echo(1: binary data)
}
"""


def load_idl() -> Any:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "user.thrift"
        path.write_text(IDL)
        return thriftpy2.load(str(path), "user_thrift")


idl = load_idl()


class User:
    def Login(self, request: Any) -> Any:
        response = idl.LoginResponse(success=request.pwd != b"wrong")
        response.result = idl.ResultCode(errcode=0, errmsg=b"ok")
        return response

    def Echo(self, data: bytes) -> bytes:
        return data


FACTORIES = {
    "proto_factory": protocols.TCyBinaryProtocolFactory(decode_response=False),
    "trans_factory": transports.TCyBufferedTransportFactory(),
}


def serve(port: int) -> None:
    rpc.make_server(idl.User, User(), "127.0.0.1", port, client_timeout=None, **FACTORIES).serve()


class Client:
    def __init__(self, port: int) -> None:
        self.client = rpc.make_client(idl.User, "127.0.0.1", port, timeout=None, **FACTORIES)
        self.request = idl.LoginRequest

    def login(self, name: bytes, pwd: bytes) -> Any:
        return self.client.Login(self.request(name=name, pwd=pwd))

    def echo(self, data: bytes) -> bytes:
        return self.client.Echo(data)  # type: ignore[no-any-return]


def exchange(name: bytes, pwd: bytes) -> tuple[bytes, int]:
    """A Login call's bytes, and how many its reply has."""
    request, reply = transports.TCyMemoryBuffer(), transports.TCyMemoryBuffer()
    protocol = protocols.TCyBinaryProtocol(request, decode_response=False)
    protocol.write_message_begin("Login", 1, 0)
    arguments = idl.User.Login_args()
    arguments.request = idl.LoginRequest(name=name, pwd=pwd)
    arguments.write(protocol)
    protocol.write_message_end()
    bytes_sent = request.getvalue()
    processor = thriftpy2.thrift.TProcessor(idl.User, User())
    processor.process(
        protocols.TCyBinaryProtocol(transports.TCyMemoryBuffer(bytes_sent), decode_response=False),
        protocols.TCyBinaryProtocol(reply),
    )
    return bytes_sent, len(reply.getvalue())
