"""kazoo behind its bounds: order, errors, and the session that a new client takes over."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mprpc.config import MprpcConfig
from mprpc.desk import (
    Answer,
    Children,
    Connected,
    Create,
    Delete,
    Ended,
    Event,
    Exists,
    Operation,
    Read,
    Request,
    Stat,
    Suspended,
    Transaction,
)
from mprpc.embedded_zookeeper import Clock
from mprpc.testing import Code, EmbeddedZooKeeper, Op
from mprpc.zookeeper_client import ZooKeeperClient

PATIENCE = 20.0


class Driven:
    """A client whose events wait to be taken."""

    def __init__(self, hosts: str, client_id: tuple[int, bytes] | None = None) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        config = MprpcConfig(zookeeperip=hosts, session_timeout=4.0)
        self.client = ZooKeeperClient(config, self.events.put, client_id)
        self.token = 0

    def take(self) -> Event:
        return self.events.get(timeout=PATIENCE)

    def send(self, operation: Operation) -> int:
        self.token += 1
        self.client.execute(Request(self.token, operation))
        return self.token

    def answer(self, operation: Operation) -> Answer:
        token = self.send(operation)
        while not isinstance(event := self.take(), Answer) or event.token != token:
            pass
        return event


@contextmanager
def connected(hosts: str) -> Iterator[Driven]:
    driven = Driven(hosts)
    driven.client.start()
    try:
        assert isinstance(driven.take(), Connected)
        yield driven
    finally:
        assert driven.client.stop(PATIENCE)


@pytest.fixture
def zookeeper() -> Iterator[EmbeddedZooKeeper]:
    with EmbeddedZooKeeper(clock=Clock()) as server:
        yield server


def test_each_operation_and_what_it_is_answered_by(zookeeper: EmbeddedZooKeeper) -> None:
    with connected(zookeeper.hosts) as driven:
        assert driven.answer(Exists("/a")).value is None
        assert driven.answer(Create("/a", None)) == Answer(driven.token)
        stat = driven.answer(Exists("/a")).value
        assert isinstance(stat, Stat)
        assert driven.answer(Create("/a/b", b"data", ephemeral=True)) == Answer(driven.token)
        read: Any = driven.answer(Read("/a/b")).value
        data, stat = read
        assert data == b"data"
        assert stat.owner == driven.client.client_id[0]  # type: ignore[index]
        children: Any = driven.answer(Children("/a")).value
        names, stat = children
        assert (names, stat.cversion) == (("b",), 1)
        assert driven.answer(Delete("/a/b")) == Answer(driven.token)


def test_null_data_is_not_empty_data(zookeeper: EmbeddedZooKeeper) -> None:
    with connected(zookeeper.hosts) as driven:
        driven.answer(Create("/null", None))
        driven.answer(Create("/empty", b""))
        assert driven.answer(Read("/null")).value[0] is None  # type: ignore[index]
        assert driven.answer(Read("/empty")).value[0] == b""  # type: ignore[index]


@pytest.mark.parametrize(
    ("operation", "error"),
    [
        (Create("/a/b", None), "NoNode"),
        (Create("/zookeeper", None), "NodeExists"),
        (Delete("/a"), "NoNode"),
        (Read("/a"), "NoNode"),
        (Children("/a"), "NoNode"),
        (Transaction((Create("/a", b""), Delete("/none"))), "NoNode"),
        (Transaction((Create("/zookeeper", b""), Create("/a", b""))), "NodeExists"),
    ],
)
def test_errors_have_zookeepers_names(zookeeper: EmbeddedZooKeeper, operation: Operation, error: str) -> None:
    with connected(zookeeper.hosts) as driven:
        assert driven.answer(operation) == Answer(driven.token, error=error)
        assert driven.answer(Exists("/a")).value is None


def test_answers_come_in_the_order_of_the_requests(zookeeper: EmbeddedZooKeeper) -> None:
    """kazoo let the answer to an exists overtake that to the create before it, and a claim was lost."""
    with connected(zookeeper.hosts) as driven:
        for _ in range(100):
            driven.send(Create("/a", None))
            driven.send(Exists("/a"))
            driven.send(Delete("/a"))
            driven.send(Transaction((Delete("/a"),)))
        answers: list[int] = []
        while len(answers) < driven.token:
            if isinstance(event := driven.take(), Answer):
                answers.append(event.token)
        assert answers == sorted(answers)


def test_what_a_lost_connection_took_is_not_answered(zookeeper: EmbeddedZooKeeper) -> None:
    with connected(zookeeper.hosts) as driven:
        zookeeper.lose_answers(op=Op.CREATE)
        driven.send(Create("/a", None))
        lost = driven.send(Exists("/a"))
        assert isinstance(driven.take(), Suspended)
        assert isinstance(driven.take(), Connected)
        answer = driven.answer(Exists("/a"))
        assert answer.token > lost
        assert isinstance(answer.value, Stat)


def test_a_refusal_is_an_answer(zookeeper: EmbeddedZooKeeper) -> None:
    zookeeper.refuse_requests(Code.NO_AUTH, op=Op.EXISTS)
    with connected(zookeeper.hosts) as driven:
        assert driven.answer(Exists("/a")) == Answer(driven.token, error="NoAuth")


def test_the_session_goes_from_a_client_to_the_next(zookeeper: EmbeddedZooKeeper) -> None:
    first = Driven(zookeeper.hosts)
    first.client.start()
    event = first.take()
    assert isinstance(event, Connected)
    assert event.timeout == 4.0
    first.answer(Create("/a", None, ephemeral=True))
    client_id = first.client.client_id
    first.client.abandon()
    second = Driven(zookeeper.hosts, client_id)
    second.client.start()
    assert second.take() == Connected(event.session, 4.0)
    assert zookeeper.owner("/a") == event.session
    assert second.client.stop(PATIENCE)
    assert zookeeper.owner("/a") is None


def test_the_negotiated_timeout_is_the_servers(zookeeper: EmbeddedZooKeeper) -> None:
    with EmbeddedZooKeeper(clock=Clock(), tick_ms=100) as small:
        driven = Driven(small.hosts)
        driven.client.start()
        event = driven.take()
        assert isinstance(event, Connected)
        assert event.timeout == 2.0  # 20 ticks
        assert driven.client.stop(PATIENCE)


def test_a_refused_identity_ends_the_client_with_a_reason(zookeeper: EmbeddedZooKeeper) -> None:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    client = ZooKeeperClient(MprpcConfig(zookeeperip=zookeeper.hosts, zookeeper_auth="no:such"), events.put)
    client.start()
    while not isinstance(event := events.get(timeout=PATIENCE), Ended):
        pass
    assert event.why == "it refuses our credentials, zookeeper_auth or zookeeper_sasl"
    assert client.stop(PATIENCE)
