"""A Login that the test holds: what the tests of futures, asyncio and async handlers call.

A name that begins with "hold" waits for the test; "fail" fails with NOT_FOUND; all others are said back. Fixtures, to
be imported: `held`, and `provider`, which serves it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

import services
import wire
from mprpc import NotFound, RpcProvider
from services import LoginRequest


class Held:
    """The handler, and what it has taken. The test's thread calls all but `__call__`."""

    def __init__(self) -> None:
        self._taken = threading.Semaphore(0)
        self._cancelled = threading.Semaphore(0)
        self.calls: list[tuple[Any, Any, Future[Any]]] = []

    def __call__(self, request: Any, controller: Any) -> Any:
        if request.name.startswith(b"fail"):
            raise NotFound(request.name.decode())
        if not request.name.startswith(b"hold"):
            return services.accept(request, controller)
        future: Future[Any] = Future()
        self.calls.append((request, controller, future))
        controller.notify_on_cancel(self._cancelled.release)
        self._taken.release()
        return future

    def taken(self, count: int = 1) -> None:
        """Waits until so many more held calls have come."""
        for _ in range(count):
            assert self._taken.acquire(timeout=wire.PATIENCE), "the call did not come"

    def cancelled(self, count: int = 1) -> None:
        """Waits until so many more handlers have heard that their caller gave up."""
        for _ in range(count):
            assert self._cancelled.acquire(timeout=wire.PATIENCE), "no handler heard of it"

    def release(self) -> None:
        """Answers all that are held."""
        for request, controller, future in self.calls:
            if not future.done():
                future.set_result(services.accept(request, controller))


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def provider(held: Held) -> Iterator[RpcProvider]:
    with services.serving(held) as provider:
        yield provider


@contextlib.contextmanager
def holding(**keys: Any) -> Iterator[tuple[Held, Any]]:
    """A Held and the provider that serves it; what is still held is answered at the end."""
    held = Held()
    with services.serving(held, **keys) as provider:
        try:
            yield held, provider
        finally:
            held.release()


def named(name: str | bytes) -> Any:
    return LoginRequest(name=name.encode() if isinstance(name, str) else name)


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An address that accepts no connection and refuses none."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):  # more than it keeps waiting
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def dead() -> Iterator[str]:
    """An address that refuses every connection."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"
