"""The decisions of discovery, without thread, socket or clock: events and the time go in, actions come out.

The reconciler knows connections: when a session is new, when it may be lost, when the client itself is no good any
more. Its two halves know the znodes: the registrar what should be registered, the directory what others registered.

Whoever drives it (the registry's thread; a simulator) calls `handle` for one event at a time, carries out the actions
in their order, and sends `Tick` at `wakeup`. Operations are answered in the order in which they were asked, as
ZooKeeper does within a connection; watch events may come before or after the answers around them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mprpc.desk import (
    Answer,
    Connected,
    Desk,
    Ended,
    Fired,
    Publish,
    Replace,
    Suspended,
    Tick,
    Timer,
    Withdraw,
)
from mprpc.directory import Directory
from mprpc.registrar import Registrar

if TYPE_CHECKING:
    from collections.abc import Callable

    from mprpc.desk import Action, Event

__all__ = ["LATE_ANSWER", "OUTAGE_SAID_AFTER", "REPLACE_DELAYS", "Reconciler"]

LATE_ANSWER = 5.0
"""Seconds, at least, that an answer may take on a live connection; it gets the session's timeout when that is more.
Past it the client is wedged: a healthy one would have lost its connection by then."""

OUTAGE_SAID_AFTER = 1.0
"""Seconds without the first connection until a warning says so: longer than a handshake, shorter than patience."""

REPLACE_DELAYS = (1.0, 30.0)
"""Seconds before a client that ended by itself is replaced: the first and the longest wait, doubled in between. A
refused password is refused again, and must not be offered a thousand times a minute."""


class Reconciler:
    """Events in, actions out. One thread at a time; `now` is monotonic seconds, `random` uniform in [0, 1).

    `where` names the ZooKeeper for people, `root` is our root's path, `process` is new for every process start,
    `utc_offset` is what makes seconds since the epoch out of `now`, `timeout` the session timeout that is asked for.
    """

    def __init__(
        self,
        *,
        where: str,
        root: str,
        process: str,
        timeout: float,
        random: Callable[[], float],
        utc_offset: float = 0.0,
    ) -> None:
        self._where = where
        self._timeout = timeout
        self._desk = Desk(random, utc_offset)
        self._registrar = Registrar(self._desk, root=root, process=process, where=where)
        self._directory = Directory(self._desk, root=root, where=where)
        self._watchdog: Timer | None = None  # what happens if the connection does not come back
        self._replace_delay = REPLACE_DELAYS[0]
        self._started = False
        self._said_down = False

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do after `event`, in this order."""
        self._desk.now = now
        if not self._started:
            self._started = True
            self._await_connection()
            self._desk.later(OUTAGE_SAID_AFTER, self._say_down)
        self._dispatch(event)
        self._desk.run_timers()
        self._check_answers()
        return self._desk.take_actions()

    @property
    def wakeup(self) -> float | None:
        """When the next Tick is due; None: not before another event."""
        asked = self._desk.oldest_question
        late = None if asked is None else asked + self._patience
        times = [when for when in (self._desk.wakeup, late) if when is not None]
        return min(times, default=None)

    @property
    def _patience(self) -> float:
        return max(self._timeout, LATE_ANSWER)

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, Answer):
            self._desk.answer(event)
        elif isinstance(event, Fired):
            self._registrar.fired(event)
            self._directory.fired(event)
        elif isinstance(event, Connected):
            self._connected(event)
        elif isinstance(event, Suspended):
            self._disconnected()
        elif isinstance(event, Ended):
            self._ended(event)
        elif isinstance(event, Publish):
            self._registrar.publish(event)
        elif isinstance(event, Withdraw):
            self._registrar.withdraw(event)
        elif not isinstance(event, Tick):
            self._directory.wanted(event)

    def _connected(self, event: Connected) -> None:
        renewed = event.session != self._desk.session
        self._timeout = event.timeout
        self._said_down = False
        self._replace_delay = REPLACE_DELAYS[0]
        self._cancel_watchdog()
        again = "again " if self._desk.session else ""
        session = f"{'a new ' if renewed else 'the same '}session 0x{event.session & (2**64 - 1):x}"
        self._desk.say("info", f"connected {again}to ZooKeeper {self._where}, {session}")
        self._desk.connect(event.session)
        self._registrar.connected(renewed=renewed)
        self._directory.connected()

    def _disconnected(self) -> None:
        if not self._desk.connected:
            return
        self._desk.disconnect()
        self._desk.say("warning", f"lost the connection to ZooKeeper {self._where}; the last lists stay in use")
        self._said_down = True
        self._registrar.disconnected()
        self._directory.disconnected()
        # kazoo tells of a lost session only once it is connected again, which may be never.
        self._watchdog = self._desk.later(self._timeout, self._session_doubtful)

    def _session_doubtful(self) -> None:
        self._registrar.session_doubtful()
        self._await_connection()

    def _await_connection(self) -> None:
        # A client that has seen a later state than a restored ensemble's never connects again: a new one does.
        self._watchdog = self._desk.later(2 * self._timeout, partial(self._replace, "no connection for long"))

    def _ended(self, event: Ended) -> None:
        self._disconnected()
        self._cancel_watchdog()
        self._desk.say("error", f"ZooKeeper {self._where}: {event.why}; trying again in {self._replace_delay:g} s")
        self._watchdog = self._desk.later(self._replace_delay, partial(self._replace, event.why))
        self._replace_delay = min(self._replace_delay * 2, REPLACE_DELAYS[1])

    def _replace(self, why: str) -> None:
        self._desk.act(Replace(why))
        self._await_connection()

    def _check_answers(self) -> None:
        asked = self._desk.oldest_question
        if asked is not None and self._desk.now >= asked + self._patience:
            self._disconnected()
            self._cancel_watchdog()
            self._replace("an answer did not come")

    def _cancel_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()

    def _say_down(self) -> None:
        if not self._desk.session and not self._said_down:
            self._said_down = True
            self._desk.say("warning", f"ZooKeeper {self._where} can't be reached yet; going on when it comes")
