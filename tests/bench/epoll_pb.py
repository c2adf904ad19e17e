"""The yardstick: what a good engineer writes by hand in Python for one service, an epoll loop and protobuf.

A request is a 32-bit big-endian length of the rest, one byte that names the method, and the arguments; a reply is the
length and the response. Partial frames, partial writes and coalesced requests are dealt with. There are no call ids,
deadlines, errors, discovery or statistics, which is what makes it hard to beat.
"""

from __future__ import annotations

import select
import socket
import struct
import threading

import bench_pb2
import user_pb2

LOGIN, ECHO = 0, 1

unpack = struct.Struct(">I").unpack_from
pack = struct.Struct(">I").pack


def login(body: bytes) -> bytes:
    request = user_pb2.LoginRequest.FromString(body)
    response = user_pb2.LoginResponse(success=request.pwd != b"wrong")
    response.result.errcode = 0
    response.result.errmsg = b"ok"
    out: bytes = response.SerializeToString()
    return pack(len(out)) + out


def echo(body: bytes) -> bytes:
    out: bytes = bench_pb2.Blob(data=bench_pb2.Blob.FromString(body).data).SerializeToString()
    return pack(len(out)) + out


METHODS = [login, echo]


def replies(buf: bytes | bytearray) -> tuple[list[bytes], int]:
    """The replies to all whole requests of buf, and how much of it they are."""
    out, at, size = [], 0, len(buf)
    while size - at >= 4:
        end = at + 4 + unpack(buf, at)[0]
        if size < end:
            break
        body = buf[at + 5 : end] if type(buf) is bytes else bytes(memoryview(buf)[at + 5 : end])
        out.append(METHODS[buf[at + 4]](body))
        at = end
    return out, at


def listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(4096)
    listener.setblocking(False)
    return listener


def accept(listener: socket.socket) -> socket.socket:
    connection, _ = listener.accept()
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def serve(port: int, loops: int = 1) -> None:
    """With more loops, each in a thread of its own, whichever is free accepts."""
    listener = listen(port)
    for _ in range(loops - 1):
        threading.Thread(target=loop, args=(listener,), daemon=True).start()
    loop(listener)


def loop(listener: socket.socket) -> None:
    listening = listener.fileno()
    poller = select.epoll()
    poller.register(listening, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    inputs: dict[int, bytes | bytearray] = {}
    outputs: dict[int, bytearray] = {}
    while True:
        for fd, events in poller.poll():
            if fd == listening:
                try:
                    connection = accept(listener)
                except OSError:
                    continue
                connections[connection.fileno()] = connection
                poller.register(connection.fileno(), select.EPOLLIN)
                continue
            connection = connections[fd]
            if events & ~select.EPOLLOUT:
                try:
                    data = connection.recv(65536)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                if not data:
                    poller.unregister(fd)
                    connections.pop(fd).close()
                    inputs.pop(fd, None)
                    outputs.pop(fd, None)
                    continue
                buf = inputs.pop(fd, None)
                if buf is None:
                    buf = data
                else:
                    buf += data
                answers, used = replies(buf)
                if used < len(buf):
                    inputs[fd] = bytearray(memoryview(buf)[used:]) if used or type(buf) is bytes else buf
                if not answers:
                    continue
                out = answers[0] if len(answers) == 1 else b"".join(answers)
                if fd in outputs:
                    outputs[fd] += out
                    continue
                try:
                    sent = connection.send(out)
                except BlockingIOError:
                    sent = 0
                if sent < len(out):
                    outputs[fd] = bytearray(memoryview(out)[sent:])
                    poller.modify(fd, select.EPOLLIN | select.EPOLLOUT)
            if events & select.EPOLLOUT and fd in outputs:
                output = outputs[fd]
                try:
                    sent = connection.send(output)
                except BlockingIOError:
                    sent = 0
                del output[:sent]
                if not output:
                    del outputs[fd]
                    poller.modify(fd, select.EPOLLIN)


class Client:
    """One connection, one blocking call at a time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def login(self, name: bytes, pwd: bytes) -> user_pb2.LoginResponse:
        body = user_pb2.LoginRequest(name=name, pwd=pwd).SerializeToString()
        self.socket.send(pack(len(body) + 1) + b"\0" + body)
        reply = self.socket.recv(4096)
        if len(reply) < 4 or len(reply) != 4 + unpack(reply)[0]:
            raise OSError("short reply")
        return user_pb2.LoginResponse.FromString(reply[4:])

    def echo(self, data: bytes) -> bytes:
        body = bench_pb2.Blob(data=data).SerializeToString()
        self.socket.sendall(b"".join((pack(len(body) + 1), b"\1", body)))
        reply = self.socket.recv(65536)
        left = 4 + unpack(reply)[0] - len(reply)
        body = reply[4:] + self.socket.recv(left, socket.MSG_WAITALL) if left else reply[4:]
        if left and len(body) + 4 != len(reply) + left:
            raise OSError("short reply")
        out: bytes = bench_pb2.Blob.FromString(body).data
        return out
