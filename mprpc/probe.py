"""The probe: does a provider at an address serve a service?

A PING that names the service, on a connection of its own (the wire's rule 6). A port alone says little: a stranger may
have it by now, and a provider that is leaving still accepts.
"""

from __future__ import annotations

import socket
import time
from typing import Any

from mprpc._native import ffi, lib
from mprpc.layout import parse_address

__all__ = ["probe"]

_PING, _CALL_ID = 3, 1
_CHUNK = 4096  # bytes; a PONG has some twenty


def probe(address: str, service: str, timeout: float) -> bool:
    """Whether the provider at `host:port` or `unix:/path` says, within `timeout` seconds, that it serves `service`.

    Any thread. Silence, a refused connection, GOAWAY, UNIMPLEMENTED and everything that is no PONG are a no.
    """
    deadline = time.monotonic() + timeout
    try:
        with _connected(address, timeout) as connection:
            connection.sendall(_ping(service))
            return _ponged(connection, deadline)
    except (OSError, ValueError):
        return False


def _connected(address: str, timeout: float) -> socket.socket:
    if not address.startswith("unix:"):
        return socket.create_connection(parse_address(address), timeout)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.settimeout(timeout)
        made.connect(address[5:])
    except OSError:
        made.close()
        raise
    return made


def _ping(service: str) -> bytes:
    name = service.encode()
    head = ffi.new("uint8_t[]", len(name) + 76)
    names = ffi.new("uint8_t[]", len(name) + 12)
    size = lib.mprpc_put_names(names, name, len(name), ffi.NULL, 0)
    size = lib.mprpc_put_call(head, names, size, 0, _CALL_ID, 0, 0)
    # kind: put_call writes requests, whose kind is absent; a field more behind it, and header_size with it.
    frame = bytearray(ffi.buffer(head, size)) + bytes((5 << 3, _PING))
    frame[:4] = (len(frame) - 4).to_bytes(4, "little")
    return bytes(frame)


def _ponged(connection: socket.socket, deadline: float) -> bool:
    session = ffi.new("struct mprpc_session *")
    lib.mprpc_session_init(session, ffi.NULL, 0, False)
    event, count, out = ffi.new("struct mprpc_event *"), ffi.new("size_t *"), ffi.new("struct mprpc_bytes *")
    received = b""
    try:
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            part = connection.recv(_CHUNK)
            received += part
            used = lib.mprpc_session_receive(session, received, len(received), 0, event, 1, count, out)
            if count[0]:
                return _serves(event.frame)
            if not part or used < 0:
                return False
            received = received[used:]
        return False
    finally:
        lib.mprpc_bytes_free(out)
        lib.mprpc_session_free(session)


def _serves(frame: Any) -> bool:
    pong = 4
    return bool(frame.kind == pong and frame.call_id == _CALL_ID and frame.status == 0)
