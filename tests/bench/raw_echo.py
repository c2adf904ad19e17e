"""The floor in Python: sends back what comes, one epoll loop, no frames, no protobuf."""

from __future__ import annotations

import contextlib
import select
import socket

from epoll_pb import accept, listen


def serve(port: int) -> None:
    listener = listen(port)
    listening = listener.fileno()
    poller = select.epoll()
    poller.register(listening, select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    outputs: dict[int, bytearray] = {}
    while True:
        for fd, events in poller.poll():
            if fd == listening:
                connection = accept(listener)
                connections[connection.fileno()] = connection
                poller.register(connection.fileno(), select.EPOLLIN)
                continue
            connection = connections[fd]
            if events & ~select.EPOLLOUT:
                try:
                    data = connection.recv(65536)
                except OSError:
                    data = b""
                if not data:
                    poller.unregister(fd)
                    connections.pop(fd).close()
                    outputs.pop(fd, None)
                    continue
                if fd in outputs:
                    outputs[fd] += data
                    continue
                sent = connection.send(data)
                if sent < len(data):
                    outputs[fd] = bytearray(memoryview(data)[sent:])
                    poller.modify(fd, select.EPOLLIN | select.EPOLLOUT)
            if events & select.EPOLLOUT and fd in outputs:
                output = outputs[fd]
                del output[: connection.send(output)]
                if not output:
                    del outputs[fd]
                    poller.modify(fd, select.EPOLLIN)


class Client:
    """One connection; what is sent is what must come back."""

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.request = request

    def login(self) -> bytes:
        self.socket.send(self.request)
        return self.socket.recv(4096)

    def echo(self, data: bytes) -> bytes:
        """Receives while it sends: a server that keeps nothing would wait for ever for a client that only sends."""
        parts, left, at, view = [], len(data), 0, memoryview(data)
        while left:
            if at < len(data):
                with contextlib.suppress(BlockingIOError):
                    at += self.socket.send(view[at:], socket.MSG_DONTWAIT)
            part = self.socket.recv(1 << 20)
            left -= len(part)
            parts.append(part)
        return b"".join(parts)
