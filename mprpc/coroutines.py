"""Runs `async def` handlers: one asyncio event loop for a provider, on a thread of its own.

A call's deadline and its cancellation reach its handler as the cancellation of its task. Imported when the first such
handler is called; what arrives together is started together, with one wake-up of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from mprpc import context
from mprpc.errors import Cancelled, DeadlineExceeded, Unavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mprpc.controller import MprpcController

__all__ = ["MOST", "Coroutines"]

_log = logging.getLogger("mprpc.coroutines")

MOST = 10_000  # handlers under way at once, a few kB each; the provider refuses one more
_STOP = 1.0  # seconds that stop() waits for the thread; half of it is for handlers to end that were cancelled


class _Work(NamedTuple):
    awaitable: Awaitable[Any]
    controller: MprpcController
    done: Callable[[Any, BaseException | None], None]


class Coroutines:
    """An event loop on a thread. All methods: any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._arrived: deque[_Work] = deque()
        self._woken = False
        self._running = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="mprpc-coroutines", daemon=True)
        self._thread.start()

    def is_full(self) -> bool:
        """Whether MOST handlers are under way."""
        return self._running + len(self._arrived) >= MOST

    def run(
        self,
        awaitable: Awaitable[Any],
        controller: MprpcController,
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        """Awaits it; then calls done(response, error), once."""
        self._arrived.append(_Work(awaitable, controller, done))
        if self._stopping:
            self._refuse_arrived()
        elif not self._woken:  # looked at after the append, as it is cleared before the deque is emptied
            self._woken = True
            with contextlib.suppress(RuntimeError):  # stop() was quicker, and _serve refuses it
                self._loop.call_soon_threadsafe(self._start_arrived)

    def stop(self) -> None:
        """Cancels what still runs and ends the thread, within a second."""
        self._stopping = True
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP)
        if self._thread.is_alive():
            _log.error("an async handler blocks its event loop, the thread %s is left behind", self._thread.name)

    def forget_forked(self) -> None:
        """In a forked child, where nobody turns the event loop. Its descriptors are closed as they are: what closes it
        the usual way takes them out of the parent's epoll set, and an event loop that is never closed complains."""
        loop: Any = self._loop
        with contextlib.suppress(
            AttributeError
        ):  # no loop of asyncio's own, such as uvloop's, which minds forks itself
            for each in (loop._ssock, loop._csock, loop._selector):
                each.close()
            loop._closed = True

    # ---- the event loop's thread ----

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._refuse_arrived()
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            if left:
                _, left = self._loop.run_until_complete(asyncio.wait(left, timeout=_STOP / 2))
            if left:
                _log.error("%d async handlers went on after they were cancelled", len(left))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def _start_arrived(self) -> None:
        self._woken = False
        while self._arrived:
            self._start(self._arrived.popleft())

    def _start(self, work: _Work) -> None:
        task = self._loop.create_task(_outcome(work.awaitable, work.controller))
        self._running += 1
        left = work.controller.time_remaining()
        timer = None if left is None else self._loop.call_later(left, task.cancel)

        def finish(task: asyncio.Task[tuple[Any, BaseException | None]]) -> None:
            self._running -= 1
            if timer is not None:
                timer.cancel()
            if task.cancelled():
                _close(work.awaitable)
                work.done(None, self._why(work.controller))
            else:
                work.done(*task.result())

        task.add_done_callback(finish)
        work.controller.notify_on_cancel(lambda: self._cancel(task))

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and has cancelled it
            self._loop.call_soon_threadsafe(task.cancel)

    def _refuse_arrived(self) -> None:
        with contextlib.suppress(IndexError):  # another thread may empty it, too
            while True:
                work = self._arrived.popleft()
                _close(work.awaitable)
                work.done(None, Unavailable("the provider has stopped"))

    def _why(self, controller: MprpcController) -> BaseException:
        """Why a task was cancelled; by nothing of ours, it is the handler's own doing."""
        if controller.is_canceled():
            return Cancelled("the call was cancelled")
        if controller.time_remaining() == 0:
            return DeadlineExceeded("the handler ran out of time")
        if self._stopping:
            return Unavailable("the provider has stopped")
        return asyncio.CancelledError()


async def _outcome(awaitable: Awaitable[Any], controller: MprpcController) -> tuple[Any, BaseException | None]:
    context.enter(controller)
    try:
        return await awaitable, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:  # SystemExit too: in a task it would end the event loop
        return None, error


def _close(awaitable: object) -> None:
    """Of a coroutine that was never started nothing must complain."""
    close = getattr(awaitable, "close", None)
    if callable(close):
        close()
