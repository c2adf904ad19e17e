"""The wire as a stranger speaks it: frames by protobuf's own RpcHeader, and sockets that know nothing of mprpc.

    with wire.connect(provider.address) as peer:
        peer.send(wire.request(1, "fixbug.UserServiceRpc", "Login", LoginRequest().SerializeToString()))
        header, payload = peer.frame()

Everything that waits is bounded by PATIENCE, so that a test that fails ends.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import generated

if TYPE_CHECKING:
    from typing_extensions import Self

rpcheader_pb2 = generated.module("rpcheader_pb2")
RpcHeader = rpcheader_pb2.RpcHeader

PATIENCE = 20.0  # seconds, on a machine that is busy with something else
LOGIN = ("fixbug.UserServiceRpc", "Login")

# The C++ framework's own Login("zhang san", "123456"), as its consumer sends it.
SEED_LOGIN = bytes.fromhex(
    "190000000a0e557365725365727669636552706312054c6f67696e18130a097a68616e672073616e1206313233343536"
)


def frame(payload: bytes = b"", **fields: Any) -> bytes:
    """One frame; args_size is filled in unless it is given."""
    fields.setdefault("args_size", len(payload))
    header = RpcHeader(**fields).SerializeToString()
    return struct.pack("<I", len(header)) + bytes(header) + payload


def request(call_id: int, service: str, method: str, payload: bytes = b"", **fields: Any) -> bytes:
    """A REQUEST; call_id 0 makes it a classic one."""
    return frame(payload, service_name=service.encode(), method_name=method.encode(), call_id=call_id, **fields)


def login(call_id: int, name: bytes = b"zhang san", **fields: Any) -> bytes:
    """A Login request; the password is always the seed's."""
    payload = generated.module("user_pb2").LoginRequest(name=name, pwd=b"123456").SerializeToString()
    return request(call_id, *LOGIN, payload, **fields)


def classic_login(name: bytes = b"zhang san") -> bytes:
    payload = generated.module("user_pb2").LoginRequest(name=name, pwd=b"123456").SerializeToString()
    return request(0, "UserServiceRpc", "Login", payload)


def response(call_id: int, payload: bytes = b"", **fields: Any) -> bytes:
    return frame(payload, call_id=call_id, kind=rpcheader_pb2.RESPONSE, **fields)


class Peer:
    """A connected socket that reads and writes frames. One thread."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.socket.settimeout(PATIENCE)
        self._stream = connected.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def frame(self) -> tuple[Any, bytes]:
        """The next frame's header and payload; EOFError at the end of the stream."""
        header = RpcHeader.FromString(self._exactly(struct.unpack("<I", self._exactly(4))[0]))
        return header, self._exactly(header.args_size)

    def rest(self) -> bytes:
        """All bytes to the end of the stream; raises ConnectionResetError for a reset."""
        return self._stream.read()

    def was_reset(self) -> bool:
        """Whether the connection ends with a reset, with nothing before it."""
        try:
            self.rest()
        except ConnectionResetError:
            return True
        return False

    def finish(self) -> None:
        """Ends this side only."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Closes with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        self._stream.close()
        self.socket.close()

    def _exactly(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise EOFError(f"the stream ended after {len(data)} of {size} bytes")
        return data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(address: str, **options: int) -> Peer:
    """A connection to `host:port`, `[v6]:port` or `unix:/path`. options: SO_RCVBUF=4096 and such, set before."""
    if address.startswith("unix:"):
        made, target = socket.socket(socket.AF_UNIX), address[5:]
    else:
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
        made, target = socket.socket(family), (host.strip("[]"), int(port))  # type: ignore[assignment]
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in options.items():
        made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    made.settimeout(PATIENCE)
    try:
        made.connect(target)
    except BaseException:
        made.close()
        raise
    return Peer(made)


def is_refused(address: str) -> bool:
    """Whether a new connection is reset; that may happen before connect() has returned."""
    try:
        with connect(address) as peer:
            return peer.was_reset()
    except ConnectionResetError:
        return True


class FakeProvider:
    """Listens; the first connection is `scripts[0](peer)`'s, the second one's the next, each on a thread of its own.

    A peer is closed when its script returns. Leaving `with` waits for the scripts and raises what they raise; where the
    test itself fails it ends their connections, so that none is waited for.
    """

    def __init__(self, *scripts: Callable[[Peer], object]) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._scripts = scripts
        self._failures: list[BaseException] = []
        self._peers: list[Peer] = []
        self._threads = [threading.Thread(target=self._accept, name="fake-provider")]

    def _accept(self) -> None:
        for script in self._scripts:
            try:
                peer = Peer(self._listener.accept()[0])
            except OSError:
                return  # shut down by __exit__
            self._peers.append(peer)
            self._threads.append(threading.Thread(target=self._run, args=(script, peer), name="fake-peer"))
            self._threads[-1].start()

    def _run(self, script: Callable[[Peer], object], peer: Peer) -> None:
        try:
            with peer:
                script(peer)
        except BaseException as error:
            self._failures.append(error)

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for peer in self._peers if kind is not None else ():
            with contextlib.suppress(OSError):
                peer.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        self._listener.close()
        if kind is None and self._failures:
            raise self._failures[0]
