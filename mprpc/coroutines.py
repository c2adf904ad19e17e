"""Runs `async def` handlers: one asyncio event loop for a provider, on a thread of its own.

A call's deadline and its cancellation reach its handler as the cancellation of its task. Imported when the first such
handler is called; what arrives together is started together, with one wake-up of the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from mprpc.errors import Cancelled, DeadlineExceeded, RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mprpc.controller import MprpcController

__all__ = ["Coroutines"]

_STOP = 1.0  # seconds that stop() gives cancelled handlers to end


class _Work(NamedTuple):
    awaitable: Awaitable[Any]
    controller: MprpcController
    done: Callable[[Any, BaseException | None], None]


class Coroutines:
    """An event loop on a thread. `run` and `stop`: any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._arrived: deque[_Work] = deque()
        self._thread = threading.Thread(target=self._serve, name="mprpc-coroutines", daemon=True)
        self._thread.start()

    def run(
        self,
        awaitable: Awaitable[Any],
        controller: MprpcController,
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        """Awaits it; then calls done(response, error) on the event loop's thread, once."""
        first = not self._arrived
        self._arrived.append(_Work(awaitable, controller, done))
        if first:
            self._loop.call_soon_threadsafe(self._start_arrived)

    def stop(self) -> None:
        """Cancels what still runs and ends the thread, within a second."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            if left:
                self._loop.run_until_complete(asyncio.wait(left, timeout=_STOP / 2))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def _start_arrived(self) -> None:
        while self._arrived:
            work = self._arrived.popleft()
            task = self._loop.create_task(_finish(work))
            left = work.controller.time_remaining()
            if left is not None:
                timer = self._loop.call_later(left, task.cancel)
                task.add_done_callback(lambda _, timer=timer: timer.cancel())  # type: ignore[misc]
            work.controller.notify_on_cancel(lambda task=task: self._cancel(task))  # type: ignore[misc]

    def _cancel(self, task: asyncio.Task[None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(task.cancel)


async def _finish(work: _Work) -> None:
    try:
        response = await work.awaitable
    except asyncio.CancelledError as error:
        work.done(None, _why(work.controller) or error)
    except BaseException as error:
        work.done(None, error)
    else:
        work.done(response, None)


def _why(controller: MprpcController) -> RpcError | None:
    """Why a task was cancelled, None if it was by nothing of ours."""
    if controller.is_canceled():
        return Cancelled("the call was cancelled")
    if controller.time_remaining() == 0:
        return DeadlineExceeded("the handler ran out of time")
    return None
