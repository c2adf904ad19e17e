"""What a call made inside a handler inherits from the call that is handled there.

Its deadline: the nested call gets what is left, if its own timeout is longer. Its cancellation: when the caller of the
handler gives up or goes away, the nested call is cancelled too. Its place in a retry: what the handler of a request
that was sent again calls is not retried (`retry.py`).

Strategy: while a sync handler runs, C holds its controller in a variable of the thread (`_context.c`), which costs a
plain call one look; a task that runs an `async def` handler, and what `inherit` made, have it in a context variable,
which C asks for only in processes where there is any.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from mprpc.errors import Cancelled, DeadlineExceeded
from mprpc.fast import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from mprpc.controller import MprpcController

__all__ = ["enter", "handled", "inherit", "left"]

P = ParamSpec("P")
T = TypeVar("T")

_handled: ContextVar[MprpcController | None] = ContextVar("mprpc.handled", default=None)


def handled() -> MprpcController | None:
    """The controller of the call that is handled here: in this task or on this thread."""
    controller: MprpcController | None = _handled.get()
    if controller is None:
        controller = native.handling()
    return controller


def enter(controller: MprpcController) -> None:
    """This task handles that call from now on, and what it starts belongs to it."""
    native.scope(_handled.get)
    _handled.set(controller)


def left(controller: MprpcController, timeout: float) -> float:
    """Seconds for a nested call that would have `timeout`. Raises Cancelled or DeadlineExceeded, both not_run."""
    if controller.is_canceled():
        raise Cancelled("the caller of this handler has given up", not_run=True)
    seconds = controller.time_remaining()
    if seconds is None:
        return timeout
    if seconds <= 0.0:
        raise DeadlineExceeded("the deadline of this handler's own call has passed", not_run=True)
    return min(timeout, seconds)


def inherit(function: Callable[P, T]) -> Callable[P, T]:
    """`function` for another thread, where its calls inherit as the handler's own do that calls `inherit`.

        executor.submit(mprpc.inherit(self._load), key)
        threading.Thread(target=mprpc.inherit(self._load)).start()

    Tasks, and what `asyncio.to_thread` runs, inherit by themselves. Outside of a handler it returns `function`. Any
    thread.
    """
    controller = handled()
    if controller is None:
        return function
    controller._keep()
    native.scope(_handled.get)
    inherited = controller

    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        token = _handled.set(inherited)
        try:
            return function(*args, **kwargs)
        finally:
            _handled.reset(token)

    within.__name__ = getattr(function, "__name__", "within")
    return within


def _after_fork() -> None:
    """A child that a handler forks outlives the call, and so must its own calls."""
    native.handle(None)
    _handled.set(None)


os.register_at_fork(after_in_child=_after_fork)
