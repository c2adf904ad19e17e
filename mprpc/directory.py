"""What others registered: the lists of endpoints that this process follows, the other half of the reconciler.

A service has one child watch and one data watch; an instance is read once, its data never changes. A path that is
missing is watched by exists. A list is complete, and shown, when all that belongs to it has been read; it is an
immutable snapshot, and calls ask ZooKeeper nothing.

A list is not believed when it became empty or lost more than half at once: what it lost is probed and stays until its
probe fails. Without a connection the last list stays, unconfirmed. A service that never had an instance is looked up in
the seed's layout instead, method by method; an address that was ever seen as an instance's is not called that way.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

from mprpc.desk import (
    NO_NODE,
    Children,
    Exists,
    Follow,
    Probe,
    Probed,
    Read,
    ReportDown,
    Save,
    Show,
    Snapshot,
    Unfollow,
)
from mprpc.layout import Endpoint, Overrides, parse_instance, parse_overrides, parse_seed, seed_path, service_path

if TYPE_CHECKING:
    from mprpc.desk import Answer, Desk, Fired, Stat, Timer

__all__ = [
    "AUDIT",
    "MAX_INSTANCES",
    "MAX_KNOWN",
    "PROBE_AGAIN",
    "READ_AGAIN",
    "REREAD",
    "SAVED_AFTER",
    "SPREAD",
    "Directory",
]

SPREAD = 2.0
"""Seconds over which the reads after a reconnect are spread: a thousand consumers must not read at one instant."""

READ_AGAIN = 0.1
"""Seconds between two reads of a service's list that its watch asks for: a rolling restart of hundreds of providers is
read ten times a second, not hundreds; and a new provider still gets calls well within a second."""

REREAD = 5.0
"""Seconds after which a list is read again because a read failed, or because a caller could not reach what it lists."""

AUDIT = 300.0
"""Seconds, on average, between two reads of a list that nothing asked for: what a lost watch can cost at most, half of
it more. Ten times the registrar's, as it is multiplied by the number of consumers."""

PROBE_AGAIN = 5.0
"""Seconds between two probes of an endpoint that answers though it is not listed any more."""

SAVED_AFTER = 0.5
"""Seconds without a first list until that of an earlier process is shown: ten times what a healthy ZooKeeper takes."""

MAX_INSTANCES = 10_000
"""Instances of a service that are read. ZooKeeper's 1 MiB answers end at about twice as many."""

MAX_KNOWN = 100_000
"""Addresses remembered as framed, oldest forgotten first: ten services of the greatest size, some 20 MB."""


class _Member(NamedTuple):
    endpoint: Endpoint
    czxid: int


class _Following:
    """A service that is followed, and how far the reading of its list has come."""

    def __init__(self, service: str, path: str) -> None:
        self.service = service
        self.path = path
        self.methods: dict[str, str] = {}  # by path in the seed's layout
        self.members: dict[str, _Member] = {}  # what is listed, by address
        self.doubted: dict[str, _Member] = {}  # what no longer is and still answers
        self.probing: set[str] = set()
        self.seed: dict[str, str] = {}  # address by method
        self.overrides = Overrides()
        self.ever = False  # it has had an instance
        self.snapshot = Snapshot()
        self.saved_snapshot: Snapshot | None = None
        self.parsed: dict[str, _Member | None] = {}  # by instance id; None: not callable
        self.failure = ""  # the last error that was logged
        self.forget_reads()

    def forget_reads(self) -> None:
        self.listing: list[str] | None = None  # None: not read on this connection
        self.missing = False
        self.data_read = False
        self.reading: set[str] = set()  # instance ids under way
        self.seed_reading: dict[str, int] = {}  # by seed path: the round that counts
        self.seed_known: set[str] = set()
        self.children_due: Timer | None = None
        self.children_read_at = float("-inf")
        self.round = 0
        self.data_round = 0

    @property
    def reads_seed(self) -> bool:
        return not self.ever and not self.members and not self.doubted


class Directory:
    """The reconciler's half that finds. Driven by `Reconciler` alone."""

    def __init__(self, desk: Desk, *, root: str, where: str) -> None:
        self._desk = desk
        self._root = root
        self._where = where
        self._followed: dict[str, _Following] = {}
        self._by_path: dict[str, _Following] = {}
        self._framed: dict[str, None] = {}

    def wanted(self, event: object) -> None:
        if isinstance(event, Follow):
            self._follow(event)
        elif isinstance(event, Unfollow):
            followed = self._followed.pop(event.service, None)
            if followed is not None:
                del self._by_path[followed.path]
        elif isinstance(event, Probed):
            self._probed(event)
        elif isinstance(event, ReportDown):
            self._report_down(event)

    def connected(self) -> None:
        for followed in self._followed.values():
            known = followed.snapshot.version and followed.snapshot is not followed.saved_snapshot
            self._desk.later_here(SPREAD * self._desk.random() if known else 0.0, partial(self._read, followed))

        self._schedule_audit()

    def _schedule_audit(self) -> None:
        self._desk.later_here(AUDIT * (0.5 + self._desk.random()), self._run_audit)

    def _run_audit(self) -> None:
        for followed in self._followed.values():
            self._read(followed)
        self._schedule_audit()

    def disconnected(self) -> None:
        for followed in self._followed.values():
            followed.forget_reads()
            if followed.snapshot.version:
                self._show(followed)

    def fired(self, event: Fired) -> None:
        followed = self._by_path.get(event.path)
        if followed is not None:
            followed.missing = False  # in any case the watch on its absence is used up
            if event.kind != "child":
                self._read_data(followed)
            if event.kind != "changed":
                self._read_children(followed)
        for reader in self._followed.values():
            if event.path in reader.methods and reader.reads_seed:
                self._read_seed(reader, event.path)

    # What the process wants.

    def _follow(self, event: Follow) -> None:
        followed = self._followed.get(event.service)
        if followed is None:
            followed = _Following(event.service, service_path(self._root, event.service))
            self._followed[event.service] = self._by_path[followed.path] = followed
            if event.saved is not None:
                followed.saved_snapshot = event.saved
                self._desk.later(SAVED_AFTER, partial(self._show_saved, followed))
            self._read(followed)
        for method in event.methods:
            path = seed_path(event.service, method)
            if path not in followed.methods:
                followed.methods[path] = method
        if followed.listing is not None:
            self._seed_complete(followed)

    def _show_saved(self, followed: _Following) -> None:
        saved = followed.saved_snapshot
        if saved is None or followed.snapshot.version or self._followed.get(followed.service) is not followed:
            return
        self._desk.say(
            "warning", f"the providers of {followed.service} are those of an earlier list, until ZooKeeper comes"
        )
        followed.members = {item.address: _Member(item, 0) for item in saved.endpoints if not item.classic}
        followed.seed = {method: item.address for method, item in saved.by_method}
        self._show(followed)
        followed.saved_snapshot = followed.snapshot

    def _report_down(self, event: ReportDown) -> None:
        followed = self._followed.get(event.service)
        if followed is None:
            return
        if event.address in followed.doubted:
            self._probe(followed, event.address)
        elif self._desk.connected and self._desk.now >= followed.children_read_at + REREAD:
            self._read_children(followed)

    # Reading.

    def _read(self, followed: _Following) -> None:
        self._read_children(followed)
        self._read_data(followed)

    def _alive(self, followed: _Following) -> bool:
        return self._desk.connected and self._followed.get(followed.service) is followed

    def _read_children(self, followed: _Following) -> None:
        """Now, or as soon as the last read is READ_AGAIN ago."""
        if not self._alive(followed) or followed.children_due is not None:
            return
        delay = followed.children_read_at + READ_AGAIN - self._desk.now
        if delay > 0:
            followed.children_due = self._desk.later_here(delay, partial(self._ask_children, followed))
        else:
            self._ask_children(followed)

    def _ask_children(self, followed: _Following) -> None:
        followed.children_due = None
        if not self._alive(followed):
            return
        followed.children_read_at = self._desk.now
        followed.round += 1
        self._desk.ask(Children(followed.path), partial(self._children, followed, followed.round))

    def _children(self, followed: _Following, round_: int, answer: Answer) -> None:
        if round_ != followed.round or not self._alive(followed):
            return
        if answer.error == NO_NODE:
            self._missing(followed)
        elif answer.error:
            self._failed(followed, answer.error)
        else:
            names, stat = cast("tuple[tuple[str, ...], Stat]", answer.value)
            followed.missing = False
            followed.ever = followed.ever or stat.cversion > 0
            if len(names) > MAX_INSTANCES:
                self._desk.say("error", f"{followed.path} has {len(names)} instances; {MAX_INSTANCES} of them are read")
            self._list(followed, sorted(names)[:MAX_INSTANCES])

    def _missing(self, followed: _Following) -> None:
        if not followed.missing:
            followed.missing = True
            followed.overrides = Overrides()
            self._desk.ask(Exists(followed.path), partial(self._came, followed))
        self._list(followed, [])

    def _came(self, followed: _Following, answer: Answer) -> None:
        """The answer to the exists that watches a missing path: there already?"""
        if answer.value is not None:
            followed.missing = False
            self._read(followed)

    def _failed(self, followed: _Following, error: str) -> None:
        if error != followed.failure:
            followed.failure = error
            self._desk.say("error", f"ZooKeeper {self._where} refuses {followed.path}: {error}; trying on")
        self._desk.later_here(REREAD, partial(self._read, followed))

    def _list(self, followed: _Following, names: list[str]) -> None:
        followed.listing = names
        followed.parsed = {name: followed.parsed[name] for name in names if name in followed.parsed}
        for name in names:
            if name not in followed.parsed and name not in followed.reading:
                followed.reading.add(name)
                self._desk.ask(Read(f"{followed.path}/{name}"), partial(self._instance, followed, name))
        self._seed_complete(followed)
        self._complete(followed)

    def _instance(self, followed: _Following, name: str, answer: Answer) -> None:
        followed.reading.discard(name)
        if answer.error == NO_NODE:  # gone since: the child watch tells, too
            followed.listing = [item for item in followed.listing or [] if item != name]
        elif answer.error:
            self._failed(followed, answer.error)
        else:
            data, stat = cast("tuple[bytes | None, Stat]", answer.value)
            followed.parsed[name] = self._parse(followed, name, data, stat)
        self._complete(followed)

    def _parse(self, followed: _Following, name: str, data: bytes | None, stat: Stat) -> _Member | None:
        try:
            instance = parse_instance(name, data)
        except ValueError as error:
            self._desk.say("warning", f"{followed.path}/{name} is ignored: {error}")
            return None
        return _Member(instance.endpoint, stat.czxid) if instance.enabled else None

    def _read_data(self, followed: _Following) -> None:
        if self._alive(followed):
            followed.data_round += 1
            self._desk.ask(Read(followed.path, watch=True), partial(self._data, followed, followed.data_round))

    def _data(self, followed: _Following, round_: int, answer: Answer) -> None:
        if round_ != followed.data_round:
            return
        if not answer.error:
            self._override(followed, cast("tuple[bytes | None, Stat]", answer.value)[0])
        elif answer.error != NO_NODE:
            self._failed(followed, answer.error)
        followed.data_read = True
        self._complete(followed)

    def _override(self, followed: _Following, data: bytes | None) -> None:
        try:
            followed.overrides = parse_overrides(data)
        except ValueError as error:
            self._desk.say(
                "error", f"the overrides in {followed.path} are ignored: {error}; the last ones stay in force"
            )

    # The seed's layout.

    def _seed_complete(self, followed: _Following) -> bool:
        """Whether the seed's layout has said all that is asked of it; what isn't asked yet is."""
        if followed.listing or not followed.reads_seed:
            return True
        for path in list(followed.methods):  # in their order: what is decided must not hang on how a set is laid out
            if path not in followed.seed_known and path not in followed.seed_reading:
                self._read_seed(followed, path)
        return followed.seed_known >= followed.methods.keys()

    def _read_seed(self, followed: _Following, path: str) -> None:
        if self._alive(followed):
            round_ = followed.seed_reading[path] = followed.seed_reading.get(path, 0) + 1
            self._desk.ask(Read(path, watch=True), partial(self._seed, followed, path, round_))

    def _seed(self, followed: _Following, path: str, round_: int, answer: Answer) -> None:
        if followed.seed_reading.get(path) != round_:
            return
        method = followed.methods[path]
        followed.seed.pop(method, None)
        if answer.error == NO_NODE:
            self._desk.ask(Exists(path), partial(self._seed_came, followed, path))
        elif answer.error:
            self._failed(followed, answer.error)
        else:
            self._seed_address(followed, path, cast("tuple[bytes | None, Stat]", answer.value)[0])
        del followed.seed_reading[path]
        followed.seed_known.add(path)
        self._complete(followed)

    def _seed_came(self, followed: _Following, path: str, answer: Answer) -> None:
        if answer.value is not None:
            self._read_seed(followed, path)

    def _seed_address(self, followed: _Following, path: str, data: bytes | None) -> None:
        try:
            address = parse_seed(data)
        except ValueError as error:
            self._desk.say("warning", f"{path} is ignored: {error}")
            return
        if address not in self._framed:
            followed.seed[followed.methods[path]] = address

    # What becomes of it.

    def _complete(self, followed: _Following) -> None:
        """Take the list over if all of it has been read."""
        if followed.listing is None or followed.reading or not followed.data_read or not self._seed_complete(followed):
            return
        fresh: dict[str, _Member] = {}
        for name in followed.listing:
            member = followed.parsed.get(name)
            if member is not None and member.czxid >= fresh.get(member.endpoint.address, member).czxid:
                fresh[member.endpoint.address] = member
        followed.failure = ""
        self._remember(fresh)
        self._compare(followed, fresh)
        followed.members = fresh
        self._show(followed)

    def _remember(self, fresh: dict[str, _Member]) -> None:
        for address in fresh:
            self._framed.pop(address, None)
            self._framed[address] = None
        while len(self._framed) > MAX_KNOWN:
            del self._framed[next(iter(self._framed))]

    def _compare(self, followed: _Following, fresh: dict[str, _Member]) -> None:
        lost = followed.members.keys() - fresh.keys()
        for address in fresh:
            followed.doubted.pop(address, None)
        if not lost or (fresh and 2 * len(lost) <= len(followed.members)):
            return
        what = "all" if not fresh else f"{len(lost)} of {len(followed.members)}"
        self._desk.say("warning", f"{followed.service} lost {what} of its providers at once; probing them")
        for address in sorted(lost):
            followed.doubted[address] = followed.members[address]
            self._probe(followed, address)

    def _probe(self, followed: _Following, address: str) -> None:
        if address in followed.doubted and address not in followed.probing:
            followed.probing.add(address)
            self._desk.act(Probe(followed.service, address))

    def _probed(self, event: Probed) -> None:
        followed = self._followed.get(event.service)
        if followed is None:
            return
        followed.probing.discard(event.address)
        if event.address not in followed.doubted:
            return
        if event.alive:
            delay = PROBE_AGAIN * (0.5 + self._desk.random())
            self._desk.later(delay, partial(self._probe, followed, event.address))
        else:
            del followed.doubted[event.address]
            self._desk.say("info", f"{event.address} does not serve {followed.service} any more")
            self._show(followed)
            self._complete(followed)  # the seed's layout may be worth a look now

    def _show(self, followed: _Following) -> None:
        members = {**followed.members, **followed.doubted}
        callable_ = (followed.overrides.apply(members[address].endpoint) for address in sorted(members))
        endpoints = tuple(endpoint for endpoint in callable_ if endpoint is not None)
        by_method: tuple[tuple[str, Endpoint], ...] = ()
        if followed.reads_seed and not followed.overrides.service.disabled:
            by_method = tuple(
                (method, Endpoint(address, classic=True, id=seed_path(followed.service, method)))
                for method, address in sorted(followed.seed.items())
            )
            endpoints = tuple({endpoint.address: endpoint for _, endpoint in by_method}.values())
        note = "" if endpoints else self._note(followed, members)
        confirmed = self._desk.connected and followed.listing is not None and not followed.doubted
        new = Snapshot(endpoints, confirmed, followed.snapshot.version + 1, by_method, note)
        if new._replace(version=followed.snapshot.version) != followed.snapshot or not followed.snapshot.version:
            followed.snapshot = new
            self._desk.act(Show(followed.service, new))
            if confirmed:
                self._desk.act(Save(followed.service, new))

    def _note(self, followed: _Following, members: dict[str, _Member]) -> str:
        if members or followed.overrides.service.disabled:
            return f"every provider of {followed.service} is disabled in {followed.path} at ZooKeeper {self._where}"
        return f"no provider of {followed.service} is registered at ZooKeeper {self._where}"
