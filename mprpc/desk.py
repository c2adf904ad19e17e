"""The desk at which discovery is decided: the events that come in, the actions that go out, questions and timers.

    Connected, Suspended, Ended        the ZooKeeper client's state        Request   an operation, answered by Answer
    Answer, Fired                      replies and watches        ─►       Probe     answered by Probed
    Publish, Withdraw, Follow, …       what the process wants              Show, Registered, Withdrawn, Save, Say
    Tick                               the time has come                   Replace   throw the client away, make another

A question is asked with its continuation. A lost connection forgets all questions: whether they were carried out shows
when everything is looked at again, so that no decision rests on anything but what was read since the last connection.
No thread, socket or clock: `now` is what the last event brought, randomness is a function that was given.
"""

from __future__ import annotations

import heapq
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from mprpc.layout import Endpoint, Registration

__all__ = [
    "NODE_EXISTS",
    "NO_NODE",
    "Action",
    "Answer",
    "Children",
    "Connected",
    "Create",
    "Delete",
    "Desk",
    "Ended",
    "Event",
    "Exists",
    "Fired",
    "Follow",
    "Operation",
    "Probe",
    "Probed",
    "Publish",
    "Read",
    "Registered",
    "Replace",
    "ReportDown",
    "Request",
    "Save",
    "Say",
    "Show",
    "Snapshot",
    "Stat",
    "Suspended",
    "Tick",
    "Timer",
    "Transaction",
    "Unfollow",
    "Withdraw",
    "Withdrawn",
]

NO_NODE, NODE_EXISTS = "NoNode", "NodeExists"


class Stat(NamedTuple):
    """Of a znode's Stat what decisions need. `owner` is the session that an ephemeral one belongs to, 0 otherwise."""

    czxid: int = 0
    version: int = 0
    cversion: int = 0
    owner: int = 0


class Snapshot(NamedTuple):
    """An immutable list of endpoints. `version` counts a service's lists from 1; 0 is no list yet.

    `confirmed`: ZooKeeper says exactly this, as far as it is known. False without a connection, and while a list that
    shrank suspiciously is checked. `by_method` is for the seed's layout, which holds one address for a method. `note`
    says why there are none.
    """

    endpoints: tuple[Endpoint, ...] = ()
    confirmed: bool = False
    version: int = 0
    by_method: tuple[tuple[str, Endpoint], ...] = ()
    note: str = ""

    def for_method(self, method: str) -> tuple[Endpoint, ...]:
        """The endpoints that serve `method`, its short name. Any thread."""
        if not self.by_method:
            return self.endpoints
        return tuple(endpoint for name, endpoint in self.by_method if name == method)


class Create(NamedTuple):
    """`open`: to everybody, whatever the configuration says of our own root. `data` None writes none at all."""

    path: str
    data: bytes | None
    ephemeral: bool = False
    open: bool = False


class Delete(NamedTuple):
    path: str


class Exists(NamedTuple):
    """Answered by a Stat or None; sets a data watch either way."""

    path: str


class Read(NamedTuple):
    """Answered by (bytes or None, Stat); sets a data watch if asked to, none on a missing node."""

    path: str
    watch: bool = False


class Children(NamedTuple):
    """Answered by (names, Stat); sets a child watch, none on a missing node."""

    path: str


class Transaction(NamedTuple):
    """All or none. What it creates has data: kazoo sends none here."""

    operations: tuple[Create | Delete, ...]


Operation = Create | Delete | Exists | Read | Children | Transaction


class Connected(NamedTuple):
    """`timeout`: the negotiated one, seconds."""

    session: int
    timeout: float


class Suspended(NamedTuple):
    """The connection is gone; the session may live on."""


class Ended(NamedTuple):
    """The client gave up for good."""

    why: str


class Answer(NamedTuple):
    """`error` is "" for success, else the name of ZooKeeper's error."""

    token: int
    value: object = None
    error: str = ""


class Fired(NamedTuple):
    """A watch: `kind` is "created", "deleted", "changed" or "child"."""

    path: str
    kind: str


class Publish(NamedTuple):
    """Publish, or replace what `publication` published before."""

    publication: int
    registrations: tuple[Registration, ...]


class Withdraw(NamedTuple):
    publication: int


class Follow(NamedTuple):
    """`saved`: the list of an earlier process, for the case that ZooKeeper is down."""

    service: str
    methods: tuple[str, ...]
    saved: Snapshot | None = None


class Unfollow(NamedTuple):
    service: str


class Probed(NamedTuple):
    service: str
    address: str
    alive: bool


class ReportDown(NamedTuple):
    service: str
    address: str


class Tick(NamedTuple):
    pass


Event = (
    Connected | Suspended | Ended | Answer | Fired | Publish | Withdraw | Follow | Unfollow | Probed | ReportDown | Tick
)


class Request(NamedTuple):
    token: int
    operation: Operation


class Probe(NamedTuple):
    service: str
    address: str


class Show(NamedTuple):
    service: str
    snapshot: Snapshot


class Save(NamedTuple):
    service: str
    snapshot: Snapshot


class Registered(NamedTuple):
    """All of a publication's nodes were seen in the present session, or no longer are."""

    publication: int
    confirmed: bool


class Withdrawn(NamedTuple):
    publication: int


class Say(NamedTuple):
    """A line for the log; `level` is "info", "warning" or "error"."""

    level: str
    text: str


class Replace(NamedTuple):
    why: str


Action = Request | Probe | Show | Save | Registered | Withdrawn | Say | Replace


class Timer:
    """A call that is due at `when`, until it is cancelled."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None

    def __lt__(self, other: Timer) -> bool:
        return self.when < other.when


class Desk:
    """What both halves decide with: questions, timers, randomness, and the pile of actions."""

    def __init__(self, random: Callable[[], float], utc_offset: float) -> None:
        self.now = 0.0
        self.session = 0  # 0: none yet
        self.connected = False
        self.random = random  # uniform in [0, 1)
        self._utc_offset = utc_offset
        self._actions: list[Action] = []
        self._timers: list[Timer] = []
        self._token = 0
        self._epoch = 0
        self._asked: dict[int, tuple[Callable[[Answer], None], float]] = {}
        self._answered = float("-inf")

    @property
    def utc(self) -> float:
        return self.now + self._utc_offset

    def act(self, action: Action) -> None:
        self._actions.append(action)

    def say(self, level: str, text: str) -> None:
        self.act(Say(level, text))

    def ask(self, operation: Operation, then: Callable[[Answer], None]) -> None:
        """`then` is called with the answer, or never when the connection is lost before."""
        self._token += 1
        self._asked[self._token] = (then, self.now)
        self.act(Request(self._token, operation))

    def later(self, delay: float, call: Callable[[], None]) -> Timer:
        timer = Timer(self.now + delay, call)
        heapq.heappush(self._timers, timer)
        return timer

    def later_here(self, delay: float, call: Callable[[], None]) -> Timer:
        """As `later`, but on the present connection alone."""
        return self.later(delay, partial(self._if_here, self._epoch, call))

    def _if_here(self, epoch: int, call: Callable[[], None]) -> None:
        if self.connected and epoch == self._epoch:
            call()

    def answer(self, answer: Answer) -> None:
        self._answered = self.now
        then, _ = self._asked.pop(answer.token, (None, 0.0))
        if then is not None:
            then(answer)

    def connect(self, session: int) -> None:
        self._forget()
        self.session, self.connected = session, True

    def disconnect(self) -> None:
        self._forget()
        self.connected = False

    def _forget(self) -> None:
        self._asked.clear()
        self._epoch += 1

    def run_timers(self) -> None:
        while self._timers and self._timers[0].when <= self.now:
            call = heapq.heappop(self._timers).call
            if call is not None:
                call()

    @property
    def wakeup(self) -> float | None:
        while self._timers and self._timers[0].call is None:
            heapq.heappop(self._timers)
        return self._timers[0].when if self._timers else None

    @property
    def oldest_question(self) -> float | None:
        """Since when nothing has been heard of the oldest question; an answer to an earlier one is a sign of life."""
        return max(next(iter(self._asked.values()))[1], self._answered) if self._asked else None

    def take_actions(self) -> list[Action]:
        actions, self._actions = self._actions, []
        return actions
