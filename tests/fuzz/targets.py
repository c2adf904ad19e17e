"""The Python targets: each is a class whose instances try one input after the other, and raise `Finding`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import frames
import services
import test_session
from fuzz import mutation
from mprpc import AsyncMprpcChannel, MprpcChannel, MprpcConfig, RpcError, Status
from mprpc._native import ffi, lib

LIMIT = 100  # bytes of payload for `frames`
ROOM = 16
LISTEN_SECONDS = 5.0
CALL_SECONDS = 2.0
CHECKED_EVERY = 200  # inputs after which the provider must still serve


class Finding(AssertionError):
    """Something that no bytes may do."""


class Target(Protocol):
    def __call__(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class Frames:
    """The C codec says of any bytes what the decoder written from the description says; a session takes them."""

    def __init__(self) -> None:
        self._room = ffi.new("struct mprpc_frame[]", ROOM)
        self._count, self._need = ffi.new("size_t *"), ffi.new("uint64_t *")

    def __call__(self, data: bytes) -> None:
        kept = ffi.from_buffer(data)
        used = lib.mprpc_split(kept, len(data), LIMIT, self._room, ROOM, self._count, self._need)
        expected, size, malformed = _decoded(data)
        count = self._count[0]
        if used < 0:
            if expected or not malformed:
                raise Finding(f"the codec finds fault ({used}) with {expected or 'nothing'}")
        elif (used, count) != (size, len(expected)) or (malformed and not expected):
            raise Finding(f"the codec takes {used} bytes for {count} frames, it should be {size} for {len(expected)}")
        for i, frame in enumerate(expected):
            said = test_session._event(_Whole(self._room[i])).frame
            if said != _without_metadata(frame):
                raise Finding(f"the codec reads {said}, it should be {frame}")
        for side in (test_session.server(), test_session.client(calls=4)):
            outcome = side.feed(data)
            frames.whole(outcome.out)  # what the protocol answers is always whole frames

    def close(self) -> None:
        """There is nothing to close."""


class _Whole:
    """A frame as an event has it."""

    method = deadline = tag = 0

    def __init__(self, frame: Any) -> None:
        self.frame = frame


def _decoded(data: bytes) -> tuple[list[frames.Frame], int, bool]:
    """As many frames as the codec is given room for, their size, and whether what comes then is none."""
    found: list[frames.Frame] = []
    at = 0
    while len(found) < ROOM:
        try:
            decoded = frames.decode(data[at:], LIMIT)
        except frames.Malformed:
            return found, at, True
        if decoded is None:
            break
        found.append(decoded[0])
        at += decoded[1]
        if decoded[0].payload is None:
            break  # its payload is not there to be stepped over
    return found, at, False


def _without_metadata(frame: frames.Frame) -> frames.Frame:
    return frames.dataclasses.replace(frame, metadata=())


class Provider:
    """A running provider answers frames or ends the connection, and goes on serving others."""

    def __init__(self) -> None:
        self._ends = contextlib.ExitStack()
        address = self._ends.enter_context(_address())
        self._ends.enter_context(_quiet("mprpc"))
        self._provider = self._ends.enter_context(services.serving(rpcserverip=address, loops=2))
        self._users = self._ends.enter_context(services.calling(self._provider))
        self._count = 0
        self._descriptors = 0

    def __call__(self, data: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(LISTEN_SECONDS)
            peer.connect(self._provider.address.removeprefix("unix:"))
            with contextlib.suppress(ConnectionError):
                peer.sendall(data)
                peer.shutdown(socket.SHUT_WR)
                try:
                    answer = _to_end(peer)
                except TimeoutError:
                    raise Finding("the provider neither answers nor ends the connection") from None
                self._judge(data, answer)
        self._count += 1
        if self._count % CHECKED_EVERY == 1:
            self.check()

    def _judge(self, data: bytes, answer: bytes) -> None:
        """An answer is frames, or the bare answer to a classic request, or a word to a browser."""
        if not answer or answer.startswith(b"HTTP/1.1 "):
            return
        try:
            first = frames.decode(data, 64 << 20)
        except frames.Malformed:
            first = None
        if first is not None and first[0].kind == frames.REQUEST and first[0].call_id == 0:
            return
        for frame in frames.whole(answer):
            if frame.kind not in (frames.RESPONSE, frames.PONG, frames.GOAWAY):
                raise Finding(f"the provider sends {frame}")

    def check(self) -> None:
        if not self._users.Login(services.REQUEST, timeout=LISTEN_SECONDS).success:
            raise Finding("the provider does not serve any more")
        open_now = len(os.listdir("/proc/self/fd"))
        self._descriptors = self._descriptors or open_now + 20
        if open_now > self._descriptors:
            raise Finding(f"{open_now} descriptors are open")

    def close(self) -> None:
        self._ends.close()


class Channel:
    """A call, of any face, to a server that says anything ends with a response or an RpcError, in time."""

    def __init__(self) -> None:
        self._ends = contextlib.ExitStack()
        path = self._ends.enter_context(_address()).removeprefix("unix:")
        self._ends.enter_context(_quiet("mprpc"))
        self._listener = self._ends.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(path)
        self._listener.listen(16)
        self._data = b""
        # What says that it has not run would be tried again, after a pause.
        config = MprpcConfig(rpcserverip=f"unix:{path}", call_timeout=CALL_SECONDS, retries=0)
        users = services.user_mprpc.UserServiceRpc_Stub(self._ends.enter_context(MprpcChannel(config)))
        self._loop = asyncio.new_event_loop()
        channel = AsyncMprpcChannel(config)
        tasks = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
        self._ends.callback(self._loop.close)
        self._ends.callback(lambda: self._loop.run_until_complete(channel.close()))
        faces = (
            lambda: users.Login(services.REQUEST),
            lambda: users.Login.future(services.REQUEST).result(),
            lambda: self._loop.run_until_complete(tasks.Login(services.REQUEST)),
        )
        self._faces = itertools.cycle(faces)
        self._thread = threading.Thread(target=self._serve, name="hostile")
        self._thread.start()

    def _serve(self) -> None:
        while True:
            peer = self._listener.accept()[0]
            with peer, contextlib.suppress(OSError):
                peer.settimeout(LISTEN_SECONDS)
                request = peer.recv(65536)
                if request == b"end":
                    return
                peer.sendall(self._data)

    def __call__(self, data: bytes) -> None:
        self._data = data
        try:
            answer = next(self._faces)()
        except RpcError as error:
            if not isinstance(error.status, Status) or not str(error):
                raise Finding(f"no clean error: {error!r}") from None
            return
        if not isinstance(answer, services.LoginResponse):
            raise Finding(f"the call returned {answer!r}")

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(self._listener.getsockname())
            last.sendall(b"end")
        self._thread.join()
        self._ends.close()


@contextlib.contextmanager
def _address() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="mprpc-fuzz-") as directory:
        yield f"unix:{directory}/socket"


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Its log is written, so that no record can break it, to nobody."""
    logger, handler = logging.getLogger(name), logging.StreamHandler(open(os.devnull, "w"))  # noqa: SIM115
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.stream.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _to_end(peer: socket.socket) -> bytes:
    parts = []
    while part := peer.recv(65536):
        parts.append(part)
    return b"".join(parts)


TARGETS = {"frames": Frames, "provider": Provider, "channel": Channel}


def attack(target: Target, seed: int, first: int, count: int) -> None:
    """So many inputs of that seed, from the first on."""
    for number in range(first, first + count):
        data = mutation.stream(seed, number)
        try:
            target(data)
        except Exception as error:
            raise Finding(f"input {number} of seed {seed}, {data.hex()}: {type(error).__name__}: {error}") from error
