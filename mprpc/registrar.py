"""What this process should have registered, and what it takes to make it so: one half of the reconciler's decisions.

Instances: a node of ours for each service, under an id that no other session ever uses. It is created and looked at
(which leaves a watch) in one go; the look decides, whatever the create said.

Claims: the seed's layout has one node for a method, for which all providers compete. A claim looks first. A node that
is missing is created. One of another live session is left, and its watch tells when it goes. One that an earlier life
of this provider left is replaced, in one transaction: our address, and older than our first instance (or owned by an
earlier session of this process). Nothing guards against replacing a live owner's node, as a new owner's node has
version 0 as well: the look afterwards shows who owns it, and the one that lost its node claims it by its own watch.
Of worker processes, which share an address, one is the heir that replaces; the others leave what is there.

All is looked at again after each connection, when a watch fires, and on the audit. Every failure waits, longer each
time, before the next try.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, cast

from mprpc.desk import (
    NO_NODE,
    NODE_EXISTS,
    Create,
    Delete,
    Exists,
    Read,
    Registered,
    Stat,
    Transaction,
    Withdrawn,
)
from mprpc.layout import ancestors, instance_data, parse_seed, seed_path, service_path

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mprpc.desk import Answer, Desk, Fired, Publish, Timer, Withdraw
    from mprpc.layout import Registration

__all__ = ["AUDIT", "HEIR_DELAY", "MAX_LEFTOVERS", "MAX_SESSIONS", "RETRY_DELAYS", "Registrar"]

AUDIT = 30.0
"""Seconds, on average, between two looks at all of our nodes: what a lost watch can cost at most, half of it more."""

RETRY_DELAYS = (0.1, 30.0)
"""Seconds before a failed operation is tried again: the first and the longest wait, doubled in between. A missing
permission needs a person; a race is over in milliseconds."""

HEIR_DELAY = 1.0
"""Seconds that a process waits at its start, where others share its address, for the heir among them to claim the
seed's nodes: those who start together must not take them from each other. A node that goes is claimed at once."""

MAX_LEFTOVERS = 10_000
"""Nodes of ours that are still to be deleted. They go with their session anyway; ten thousand are every node of some
hundred sessions of a large process."""

MAX_SESSIONS = 64
"""Earlier sessions whose nodes are known as ours. A session's nodes outlive it by seconds; 64 don't end so soon."""


class _Node:
    """A node of ours and the operation that is under way for it. `failures` in a row, `retry` when there is one."""

    __slots__ = ("creating", "failures", "path", "retry", "settled")

    def __init__(self, path: str) -> None:
        self.path = path
        self.settled = False  # seen as it should be, in this session
        self.creating = False  # the answer to a create is to come
        self.failures = 0
        self.retry: Timer | None = None

    def unsettle(self) -> None:
        self.settled = self.creating = False
        if self.retry is not None:
            self.retry.cancel()
        self.retry = None


class _Instance(_Node):
    """A service's instance node."""

    __slots__ = ("data", "id", "publication", "registration")

    def __init__(self, publication: int, registration: Registration) -> None:
        super().__init__("")  # it has no name before the first session
        self.publication = publication
        self.registration = registration
        self.id = ""
        self.data = b""


class _Claim(_Node):
    """A method's node in the seed's layout. `wanted`: the address that each publication would like to stand there."""

    __slots__ = ("address", "heir", "held", "said", "waiting", "wanted")

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.wanted: dict[int, str] = {}
        self.heir = True  # it replaces an earlier life's node
        self.waiting = False  # for the heir among those who share the address to be first
        self.held = False  # our session owns it
        self.address = ""  # what we wrote there last, "" if that isn't known
        self.said = ""  # the last thing that was logged of it

    def unsettle(self) -> None:
        super().unsettle()
        self.held = False


class _Publication:
    """What one caller published, and which of its nodes are still to go when it withdraws."""

    __slots__ = ("claims", "confirmed", "instances", "leaving", "lost", "registrations")

    def __init__(self) -> None:
        self.registrations: tuple[Registration, ...] = ()
        self.instances: dict[tuple[str, str], _Instance] = {}  # by service and address
        self.claims: dict[str, _Claim] = {}
        self.confirmed = False
        self.lost = False  # it was confirmed before
        self.leaving: set[str] | None = None


class Registrar:
    """The reconciler's half that registers. Driven by `Reconciler` alone."""

    def __init__(self, desk: Desk, *, root: str, process: str, where: str) -> None:
        self._desk = desk
        self._root = root
        self._process = process
        self._where = where
        self._publications: dict[int, _Publication] = {}
        self._instances: dict[str, _Instance] = {}  # by path
        self._claims: dict[str, _Claim] = {}
        self._leftovers: dict[str, None] = {}  # instance paths to delete, oldest first
        self._sessions: deque[int] = deque(maxlen=MAX_SESSIONS)
        self._counter = 0
        self._first_czxid = (
            0  # of this process's first instance; before it is known no node is called our earlier life's
        )
        self._audit: Timer | None = None

    def publish(self, event: Publish) -> None:
        publication = self._publications.setdefault(event.publication, _Publication())
        publication.registrations = event.registrations
        wanted = {(item.service, item.address): item for item in event.registrations}
        for key in [key for key in publication.instances if key not in wanted]:
            self._leave(publication.instances.pop(key))
        for key, registration in wanted.items():
            self._publish_one(event.publication, publication, key, registration)
        self._publish_claims(event.publication, publication)
        self._settle(event.publication)

    def _publish_one(
        self, number: int, publication: _Publication, key: tuple[str, str], registration: Registration
    ) -> None:
        instance = publication.instances.get(key)
        if instance is None:
            instance = publication.instances[key] = _Instance(number, registration)
            self._make_afresh(instance)
        elif instance.registration != registration:
            instance.registration = registration
            self._exchange(instance)

    def _publish_claims(self, number: int, publication: _Publication) -> None:
        wanted = {
            seed_path(item.service, method): item
            for item in publication.registrations
            if item.seed_address
            for method in item.methods
        }
        for path in [path for path in publication.claims if path not in wanted]:
            self._unclaim(number, publication.claims.pop(path))
        for path, item in wanted.items():
            claim = publication.claims[path] = self._claims.setdefault(path, _Claim(path))
            if claim.wanted.get(number) != item.seed_address:
                claim.wanted[number] = item.seed_address
                claim.heir = item.heir
                claim.waiting = not item.heir
                self._look(claim)
                self._gone(path)  # for another publication that waits until it is deleted: it won't be

    def withdraw(self, event: Withdraw) -> None:
        publication = self._publications.get(event.publication)
        if publication is None:
            self._desk.act(Withdrawn(event.publication))
            return
        if publication.leaving is not None:
            return
        publication.leaving = {instance.path for instance in publication.instances.values() if instance.path} | {
            path for path, claim in publication.claims.items() if claim.wanted.keys() == {event.publication}
        }
        for instance in publication.instances.values():
            self._leave(instance)
        for claim in publication.claims.values():
            self._unclaim(event.publication, claim)
        self._gone("")

    def fired(self, event: Fired) -> None:
        instance = self._instances.get(event.path)
        if instance is not None:
            self._instance_fired(instance, event)
        claim = self._claims.get(event.path)
        if claim is not None and not (claim.creating and event.kind == "created"):  # then the look follows anyway
            claim.settled = claim.held = False
            self._look(claim)

    def connected(self, *, renewed: bool) -> None:
        if renewed:
            self._sessions.append(self._desk.session)
        for path in self._leftovers:
            self._delete_leftover(path)
        for number, publication in self._publications.items():
            if publication.leaving is None:
                self._reconnect(number, publication, renewed=renewed)
        for claim in list(self._claims.values()):
            self._look(claim)
        self._schedule_audit()

    def _reconnect(self, number: int, publication: _Publication, *, renewed: bool) -> None:
        if renewed:
            self._confirm(number, publication, confirmed=False)
        for instance in publication.instances.values():
            if renewed or not instance.path:
                self._make_afresh(instance)
            else:
                self._check(instance)

    def disconnected(self) -> None:
        for node in (*self._instances.values(), *self._claims.values()):
            node.unsettle()

    def session_doubtful(self) -> None:
        """The session must have ended by now, if ZooKeeper has been well: our nodes may be gone."""
        for number, publication in self._publications.items():
            if publication.confirmed:
                self._desk.say("warning", f"{_names(publication.registrations)} may be registered no longer")
                self._confirm(number, publication, confirmed=False)

    def _schedule_audit(self) -> None:
        if self._audit is not None:
            self._audit.cancel()
        self._audit = self._desk.later_here(AUDIT * (0.5 + self._desk.random()), self._run_audit)

    def _run_audit(self) -> None:
        for instance in self._instances.values():
            self._check(instance)
        for claim in self._claims.values():
            self._look(claim)
        self._schedule_audit()

    # Instances.

    def _make_afresh(self, instance: _Instance) -> None:
        """Under a new id: the old node, should it linger, is another's as far as anybody can tell."""
        self._leave(instance)
        self._name(instance)
        self._make(instance)

    def _name(self, instance: _Instance) -> None:
        if not self._desk.connected:
            return
        self._counter += 1
        instance.unsettle()
        instance.id = f"{self._process}-{self._counter}"
        instance.path = f"{service_path(self._root, instance.registration.service)}/{instance.id}"
        instance.data = instance_data(instance.registration, instance.id, self._desk.utc)
        self._instances[instance.path] = instance

    def _make(self, instance: _Instance) -> None:
        if not self._desk.connected:
            return
        instance.retry = None
        instance.creating = True
        self._desk.ask(self._creation(instance), partial(self._made, instance, instance.path))
        self._check(instance)

    def _creation(self, instance: _Instance) -> Create:
        return Create(instance.path, instance.data, ephemeral=True)

    def _check(self, instance: _Instance) -> None:
        if self._desk.connected:
            self._desk.ask(Exists(instance.path), partial(self._seen, instance, instance.path))

    def _made(self, instance: _Instance, path: str, answer: Answer) -> None:
        if path != instance.path:
            return
        instance.creating = False
        if answer.error == NO_NODE:
            for parent in ancestors(path):
                self._desk.ask(Create(parent, None), _ignore)
        if answer.error == NO_NODE and not instance.failures:
            instance.failures = 1
            self._make(instance)
        elif answer.error not in ("", NODE_EXISTS):
            self._retry(instance, answer.error, partial(self._make, instance))

    def _seen(self, instance: _Instance, path: str, answer: Answer) -> None:
        if path != instance.path:
            return
        stat = cast("Stat | None", answer.value)
        if answer.error:
            self._retry(instance, answer.error, partial(self._make, instance))
        elif stat is None:
            if not instance.creating and instance.retry is None:
                self._make(instance)
        elif stat.owner != self._desk.session:
            self._make_afresh(instance)
        elif not instance.settled:
            self._instance_settled(instance, stat)

    def _instance_settled(self, instance: _Instance, stat: Stat) -> None:
        instance.settled = True
        instance.failures = 0
        if not self._first_czxid:
            self._first_czxid = stat.czxid
            for claim in self._claims.values():
                if not claim.settled:
                    self._look(claim)
        self._settle(instance.publication)

    def _instance_fired(self, instance: _Instance, event: Fired) -> None:
        if event.kind != "deleted":
            if not instance.creating:  # else the look follows anyway
                self._check(instance)
            return
        instance.unsettle()
        item = instance.registration
        self._desk.say("warning", f"the registration of {item.service} at {item.address} was deleted by somebody")
        self._confirm(instance.publication, self._publications[instance.publication], confirmed=False)
        self._make(instance)

    def _exchange(self, instance: _Instance) -> None:
        """The data of an instance never changes: a new id, the old and the new in one transaction."""
        old = instance.path
        if not (instance.settled and self._desk.connected):
            self._make_afresh(instance)
            return
        self._instances.pop(old)
        self._leave_path(old)  # should the answer be lost
        self._name(instance)
        self._confirm(instance.publication, self._publications[instance.publication], confirmed=False)
        operations = (Delete(old), self._creation(instance))
        self._desk.ask(Transaction(operations), partial(self._exchanged, instance, instance.path, old))

    def _exchanged(self, instance: _Instance, path: str, old: str, answer: Answer) -> None:
        if answer.error:
            self._delete_leftover(old)
        else:
            self._gone(old)
        if path == instance.path:
            self._check(instance)

    def _leave(self, instance: _Instance) -> None:
        """Have its node deleted, now or when there is a connection."""
        instance.unsettle()
        path, instance.path = instance.path, ""
        if self._instances.pop(path, None) is not None:
            self._leave_path(path)
            self._delete_leftover(path)

    def _leave_path(self, path: str) -> None:
        self._leftovers[path] = None
        while len(self._leftovers) > MAX_LEFTOVERS:
            self._gone(next(iter(self._leftovers)))

    def _delete_leftover(self, path: str) -> None:
        if self._desk.connected:
            self._desk.ask(Delete(path), partial(self._leftover_deleted, path))

    def _leftover_deleted(self, path: str, answer: Answer) -> None:
        if answer.error not in ("", NO_NODE):
            self._desk.say("warning", f"{path} can't be deleted: {answer.error}; it goes with its session")
        self._gone(path)

    # Claims.

    def _look(self, claim: _Claim) -> None:
        if not self._desk.connected:
            return
        if claim.retry is not None:
            claim.retry.cancel()
            claim.retry = None
        self._desk.ask(Exists(claim.path), partial(self._looked, claim))

    def _looked(self, claim: _Claim, answer: Answer) -> None:
        stat = cast("Stat | None", answer.value)
        if answer.error:
            self._retry(claim, answer.error, partial(self._look, claim))
        elif stat is None:
            self._claim_missing(claim)
        elif stat.owner == self._desk.session:
            self._claim_ours(claim, stat)
        elif not claim.wanted:
            self._forget_claim(claim)
        elif stat.owner in self._sessions:
            self._take_over(claim)
        elif not claim.heir:
            self._claim_foreign(claim, stat)
        elif stat.owner and not self._first_czxid:
            claim.held = False  # nothing is known of its age yet; the first instance's look comes back to it
        elif stat.owner and stat.czxid < self._first_czxid:
            self._desk.ask(Read(claim.path), partial(self._read_old, claim))
        else:
            self._claim_foreign(claim, stat)

    def _claim_missing(self, claim: _Claim) -> None:
        claim.held = False
        if not claim.wanted:
            self._forget_claim(claim)
        elif claim.waiting:
            claim.retry = self._desk.later_here(HEIR_DELAY, partial(self._waited, claim))
        elif not claim.creating and claim.retry is None:
            self._create_claim(claim)

    def _waited(self, claim: _Claim) -> None:
        claim.waiting = False
        self._look(claim)

    def _create_claim(self, claim: _Claim) -> None:
        if not (self._desk.connected and claim.wanted):
            return
        claim.retry = None
        claim.creating = True
        self._desk.ask(self._claiming(claim), partial(self._claimed, claim))
        self._look(claim)

    def _claiming(self, claim: _Claim) -> Create:
        claim.address = next(iter(claim.wanted.values()))
        return Create(claim.path, claim.address.encode(), ephemeral=True, open=True)

    def _claimed(self, claim: _Claim, answer: Answer) -> None:
        claim.creating = False
        if answer.error == NO_NODE:
            for parent in ancestors(claim.path):
                self._desk.ask(Create(parent, None, open=True), _ignore)
        if answer.error == NO_NODE and not claim.failures:
            claim.failures = 1
            self._create_claim(claim)
        elif answer.error == NODE_EXISTS:
            claim.address = ""  # the look tells whose it is, and it may be ours from before the connection was lost
        elif answer.error:
            self._retry(claim, answer.error, partial(self._create_claim, claim))

    def _claim_ours(self, claim: _Claim, stat: Stat) -> None:
        if not claim.wanted:
            self._desk.ask(Delete(claim.path), partial(self._unclaimed, claim))
        elif claim.address in claim.wanted.values() and not stat.version:
            self._hold(claim)
        else:
            self._desk.ask(Read(claim.path), partial(self._read_ours, claim))

    def _hold(self, claim: _Claim) -> None:
        claim.held = True
        if claim.said:
            self._desk.say("info", f"{claim.path} is ours now, {claim.address}")
            claim.said = ""
        self._claim_settled(claim)

    def _read_ours(self, claim: _Claim, answer: Answer) -> None:
        """A node that our session owns: does it say what it should?"""
        address = _seed_address(answer)
        if address in claim.wanted.values():
            claim.address = address
            self._hold(claim)
        elif answer.error:
            self._look_after(claim, answer.error)
        else:
            self._take_over(claim)

    def _read_old(self, claim: _Claim, answer: Answer) -> None:
        """A node that is older than this process: is it of this provider's own earlier life?"""
        if answer.error:
            self._look_after(claim, answer.error)
        elif _seed_address(answer) in claim.wanted.values():
            self._take_over(claim)
        else:
            self._claim_foreign(claim, Stat(owner=1))

    def _take_over(self, claim: _Claim) -> None:
        if claim.wanted:
            operations = (Delete(claim.path), self._claiming(claim))
            self._desk.ask(Transaction(operations), partial(self._taken_over, claim))

    def _taken_over(self, claim: _Claim, answer: Answer) -> None:
        claim.address = "" if answer.error else claim.address
        self._look_after(claim, answer.error)

    def _look_after(self, claim: _Claim, error: str) -> None:
        """At once when all went well or somebody was faster."""
        if error in ("", NO_NODE):
            self._look(claim)
        else:
            self._retry(claim, error, partial(self._look, claim))

    def _claim_foreign(self, claim: _Claim, stat: Stat) -> None:
        claim.held = claim.waiting = False
        what = "held by another provider; it is taken over when that one goes"
        what = what if stat.owner else "a persistent node, which no provider made; delete it to have it registered"
        if claim.said != what:
            claim.said = what
            self._desk.say("info" if stat.owner else "warning", f"{claim.path} is {what}")
        self._claim_settled(claim)

    def _claim_settled(self, claim: _Claim) -> None:
        claim.failures = 0
        if not claim.settled:
            claim.settled = True
            for number in claim.wanted:
                self._settle(number)

    def _unclaim(self, number: int, claim: _Claim) -> None:
        address = claim.wanted.pop(number, "")
        if claim.held and claim.wanted and address != claim.address:
            return
        claim.settled = False
        if claim.held and not claim.wanted and self._desk.connected:
            self._desk.ask(Delete(claim.path), partial(self._unclaimed, claim))
        elif self._desk.connected:
            self._look(claim)
        elif not self._sessions:
            self._forget_claim(claim)

    def _unclaimed(self, claim: _Claim, answer: Answer) -> None:
        claim.held = False
        claim.address = ""
        if claim.wanted:  # wanted anew in the meantime
            self._look(claim)
        else:
            self._forget_claim(claim)

    def _forget_claim(self, claim: _Claim) -> None:
        claim.unsettle()
        if self._claims.get(claim.path) is claim:
            del self._claims[claim.path]
        self._gone(claim.path)

    # Both.

    def _retry(self, node: _Node, error: str, call: partial[None]) -> None:
        first, longest = RETRY_DELAYS
        delay = min(first * 2.0**node.failures, longest) * (0.5 + self._desk.random() / 2)
        node.failures += 1
        if node.retry is not None:
            node.retry.cancel()
        node.retry = self._desk.later_here(delay, call)
        if node.failures in (3, 10):  # once soon, once for those who came late
            self._desk.say("error", f"ZooKeeper {self._where} refuses {node.path}: {error}; trying on")

    def _settle(self, number: int) -> None:
        publication = self._publications.get(number)
        if publication is None or publication.leaving is not None:
            return
        nodes: Iterable[_Node] = (*publication.instances.values(), *publication.claims.values())
        if not publication.confirmed and self._desk.connected and all(node.settled for node in nodes):
            again = " again" if publication.lost else ""
            self._desk.say("info", f"registered{again}: {_names(publication.registrations)} at {self._where}")
            self._confirm(number, publication, confirmed=True)

    def _confirm(self, number: int, publication: _Publication, *, confirmed: bool) -> None:
        if publication.confirmed != confirmed:
            publication.confirmed = confirmed
            publication.lost = not confirmed
            self._desk.act(Registered(number, confirmed))

    def _gone(self, path: str) -> None:
        """`path` is deleted as far as we can have it; who waits for the last of its nodes has withdrawn."""
        self._leftovers.pop(path, None)
        for number, publication in list(self._publications.items()):
            if publication.leaving is None:
                continue
            publication.leaving.discard(path)
            if not publication.leaving:
                del self._publications[number]
                self._desk.say("info", f"withdrawn: {_names(publication.registrations)}")
                self._desk.act(Withdrawn(number))


def _ignore(answer: Answer) -> None:
    """A parent: created, there already, or the next step's error says what is wrong."""


def _seed_address(answer: Answer) -> str:
    if answer.error:
        return ""
    data, _ = cast("tuple[bytes | None, Stat]", answer.value)
    try:
        return parse_seed(data)
    except ValueError:
        return ""


def _names(registrations: tuple[Registration, ...]) -> str:
    return ", ".join(f"{item.service} at {item.address}" for item in registrations) or "nothing"
