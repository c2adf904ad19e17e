"""Handlers of signals that belong to one process: a child that it forks gets back those that were there before.

CPython keeps a signal's handler and its wake-up descriptor over a fork. A signal for the child would run the parent's
handler there, and wake the parent by the socket that both have; one that came before the child could change that would
be lost. So the signals are blocked while it forks, in the thread that does, and delivered to the child after.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable
    from types import FrameType

    Handler = Callable[[int, FrameType | None], None]

__all__ = ["SignalHandlers"]


class SignalHandlers:
    """`handler` for each of the signals, and a byte to `wakeup` whenever one comes, until `restore`. Main thread."""

    def __init__(self, handler: Handler, signals: Iterable[int], wakeup: socket.socket) -> None:
        wakeup.setblocking(False)
        self._descriptor = signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        self._before: dict[int, Any] = {number: signal.signal(number, handler) for number in signals}
        _installed.append(self)

    def restore(self) -> None:
        """What was there before."""
        if self in _installed:  # else this is a child, which has done so
            _installed.remove(self)
            self._restore(self._descriptor)

    def _restore(self, descriptor: int) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(descriptor)


_installed: list[SignalHandlers] = []
_forking = threading.local()


def _before_fork() -> None:
    _forking.mask = None
    if _installed:
        numbers = {number for each in _installed for number in each._before}
        _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def _after_fork_in_parent() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _after_fork_in_child() -> None:
    while _installed:
        _installed.pop()._restore(-1)
    _after_fork_in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
