"""The controller: what one call's caller and handler tell each other beside the messages.

The same class serves on both sides. A caller sets `timeout` before and reads `failed()`, `status`, `error_text()` and
`peer` after; with a controller a call never raises, and `start_cancel()` ends it from any thread. A handler reads
`peer` and `time_remaining()` and may call `set_failed`. Both have the seed's spellings too (`Failed`, `SetFailed`, …),
for handlers and callers made for it.

Most calls touch none of this, so an instance starts without an attribute of its own: the class holds the defaults.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from mprpc.errors import RpcError, Status

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MprpcController"]

_log = logging.getLogger("mprpc.controller")

# Of all controllers' _canceled, _on_cancel, _stop, _wanted and _ended: a handler's thread and the loop's meet here, and
# a caller's and the one that cancels its call.
_cancelling = threading.Lock()


class MprpcController:
    """State of one call; `reset()` makes it good for another. One thread at a time.

    `timeout`: seconds, for the caller to set; None takes the channel's default.
    """

    timeout: float | None = None
    _status: Status = Status.OK
    _text: str = ""
    _details: bytes = b""
    _not_run: bool = False
    _peer: str = ""
    _attempt: int = 0
    _deadline: float | None = None
    _canceled: bool = False
    _on_cancel: tuple[Callable[[], object], ...] = ()
    _stop: Callable[[], object] | None = None  # of a call under way: what ends it
    _wanted: bool = False
    _ended: bool = False
    _settled: bool = False  # of a call under way: it is not retried

    def reset(self) -> None:
        """As new, `timeout` included."""
        self.__dict__.clear()

    def failed(self) -> bool:
        """Whether the call has failed; false while it runs."""
        return self._status is not Status.OK

    def error_text(self) -> str:
        """One line that says why the call failed, empty if it didn't."""
        return self._text

    @property
    def status(self) -> Status:
        """How the call ended; OK while it runs."""
        return self._status

    @property
    def not_run(self) -> bool:
        """Caller: the framework knows that the handler never started, so the call may be tried again."""
        return self._not_run

    @property
    def peer(self) -> str:
        """The other side's address, `host:port`. Handler: while it runs, or until its Future is resolved."""
        return self._peer

    @property
    def attempt(self) -> int:
        """Handler: 0 for the caller's first request, 1 and up for one sent again or hedged."""
        return self._attempt

    def set_failed(self, text: str, status: Status | int = Status.UNKNOWN) -> None:
        """Handler: fail the call; what it returns then is not sent. `status` OK is refused with ValueError."""
        error = RpcError(status, text)
        if error.status is Status.OK:
            raise ValueError("set_failed(status=Status.OK): a call can't fail with OK, give another status")
        self._set_error(error)

    def start_cancel(self) -> None:
        """Caller: give the call up, CANCEL to the provider; it fails with CANCELLED. Any thread.

        One that has not begun yet fails as soon as it does; one that has ended stays as it is. A call that looks for a
        provider or connects is given up after that.
        """
        with _cancelling:
            self._wanted = True
            stop = None if self._ended else self._stop
        if stop is not None:
            stop()
            self._cancel()

    def _begin(self, stop: Callable[[], object], timeout: float | None) -> float | None:
        """Caller: a call begins, which `stop` ends. Its timeout, where that is given here or was set before."""
        with _cancelling:
            own, wanted = self.timeout, self._wanted and not self._ended
            callbacks = self._on_cancel
            self.__dict__.clear()
            self.timeout, self._stop, self._wanted, self._on_cancel = own, stop, wanted, callbacks
        if wanted:
            stop()
            self._cancel()
        return own if timeout is None else timeout

    def _end(self, error: RpcError | None) -> None:
        """Caller: it has ended so."""
        if error is not None:
            self._set_error(error)
        with _cancelling:
            self._stop, self._ended, self._on_cancel = None, True, ()

    def time_remaining(self) -> float | None:
        """Handler: seconds until the caller stops waiting (0.0 when it has), None when it waits for ever."""
        deadline = self._deadline
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def is_canceled(self) -> bool:
        """Handler: whether the caller has given up, or gone away. What the handler returns then reaches nobody.

        So it is when the deadline has passed before the Future that a handler returned has ended.

        Caller: whether `start_cancel` was called before the call had ended.
        """
        return self._canceled

    def notify_on_cancel(self, callback: Callable[[], object]) -> None:
        """Handler that answers later: call `callback` once when the caller gives up, at once if it has already.

        It runs on the thread of the provider's loop, or on this one, and must not block. Caller, before or during a
        call: once when `start_cancel` gives that call up, on the thread that does.
        """
        with _cancelling:
            canceled = self._canceled
            if not canceled:
                self._on_cancel = (*self._on_cancel, callback)
        if canceled:
            callback()

    def _forget_on_cancel(self, callback: Callable[[], object]) -> None:
        with _cancelling:
            self._on_cancel = tuple(each for each in self._on_cancel if each != callback)

    def _keep(self) -> None:
        """Handler: what it says is asked for on another thread from now on, or later."""

    def _cancel(self) -> None:
        with _cancelling:
            self._canceled = True
            callbacks, self._on_cancel = self._on_cancel, ()
        for callback in callbacks:
            try:
                callback()
            except Exception:
                _log.exception("a callback of notify_on_cancel failed")

    def _set_error(self, error: RpcError) -> None:
        self._status, self._text, self._details, self._not_run = error.status, error.text, error.details, error.not_run

    def _error(self) -> RpcError:
        return RpcError(self._status, self._text, details=self._details)

    # The seed's spellings (google::protobuf::RpcController).

    def Reset(self) -> None:
        """`reset`."""
        self.reset()

    def Failed(self) -> bool:
        """`failed`."""
        return self.failed()

    def ErrorText(self) -> str:
        """`error_text`."""
        return self.error_text()

    def SetFailed(self, reason: str) -> None:
        """`set_failed`."""
        self.set_failed(reason)

    def StartCancel(self) -> None:
        """`start_cancel`."""
        self.start_cancel()

    def IsCanceled(self) -> bool:
        """`is_canceled`."""
        return self.is_canceled()

    def NotifyOnCancel(self, callback: Callable[[], object]) -> None:
        """`notify_on_cancel`."""
        self.notify_on_cancel(callback)

    def __repr__(self) -> str:
        state: Any = f"{self._status.name}: {self._text}" if self.failed() else "OK"
        return f"<{type(self).__name__} {state}>"


def _after_fork() -> None:
    global _cancelling
    _cancelling = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
