"""Providers that come, go and die under callers: short versions of the long runs, and what those runs have found."""

# ruff: noqa: F811, as a test's argument has the name of the imported fixture

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError

import generated
import mprpc.outliers
import mprpc.registry
import mprpc.subchannel
import mprpc.unary_call
import services
import wire
from mprpc import DeadlineExceeded, MprpcChannel, MprpcConfig, RpcProvider
from mprpc._native import ffi, lib
from mprpc.aio import AsyncMprpcChannel
from mprpc.desk import Children, Exists, Read, Request
from mprpc.embedded_zookeeper import Clock
from mprpc.registry import Registration, Registry
from mprpc.testing import EmbeddedZooKeeper
from reliability import cycles, faults, hunt, proxy, restarts, soak, workers
from services import LoginResponse
from zookeeper_server import ZooKeeper, require, shared_real_zookeeper, zookeeper  # noqa: F401

user_pb2 = generated.module("user_pb2")
ledger_pb2 = generated.module("ledger_pb2")
ledger_mprpc = generated.module("ledger_mprpc")

PATIENCE = 20.0  # seconds for what takes milliseconds
MANY = 60  # calls, each of which could go to any endpoint
ENTRY = ledger_pb2.Entry(number=1)


class Ledger(ledger_mprpc.LedgerRpc):  # type: ignore[name-defined, misc]
    """Says with each answer which provider it is."""

    def __init__(self, name: int) -> None:
        self._name = name

    def Look(self, request: Any, controller: Any) -> Any:
        return ledger_pb2.Receipt(number=request.number, process=self._name)

    Book = Look


@pytest.fixture
def embedded() -> Iterator[EmbeddedZooKeeper]:
    with EmbeddedZooKeeper(clock=Clock()) as server:
        yield server


@pytest.fixture
def config(embedded: EmbeddedZooKeeper) -> MprpcConfig:
    keys = {"balancer": "round_robin", "slow_start": 0.0}  # so that it is certain whose turn it is
    return MprpcConfig(zookeeperip=embedded.hosts, session_timeout=4.0, **keys)


@contextmanager
def serving(config: MprpcConfig, name: int, port: int = 0) -> Iterator[RpcProvider]:
    provider = RpcProvider(config.replace(rpcserverport=port))
    provider.notify_service(Ledger(name))
    provider.start()
    try:
        assert provider.wait_registered(PATIENCE)
        yield provider
    finally:
        provider.stop(0.5)


Call = Callable[[], int]


def blocking(config: MprpcConfig, stack: ExitStack) -> Call:
    stub = ledger_mprpc.LedgerRpc_Stub(stack.enter_context(MprpcChannel(config)))
    return lambda: int(stub.Look(ENTRY).process)


def future(config: MprpcConfig, stack: ExitStack) -> Call:
    stub = ledger_mprpc.LedgerRpc_Stub(stack.enter_context(MprpcChannel(config)))
    return lambda: int(stub.Look.future(ENTRY).result(PATIENCE).process)


def coroutine(config: MprpcConfig, stack: ExitStack) -> Call:
    loop = stack.enter_context(asyncio.Runner()) if hasattr(asyncio, "Runner") else _Runner(stack)
    channel = AsyncMprpcChannel(config)
    stack.callback(lambda: loop.run(channel.close()))
    method = ledger_pb2.DESCRIPTOR.services_by_name["LedgerRpc"].methods_by_name["Look"]
    call = channel.unary_call(method, ledger_pb2.Receipt)

    async def look() -> int:
        return int((await call(ENTRY)).process)

    return lambda: int(loop.run(look()))


class _Runner:
    """asyncio.Runner, for Python 3.10."""

    def __init__(self, stack: ExitStack) -> None:
        self._loop = asyncio.new_event_loop()
        stack.callback(self._loop.close)
        stack.callback(lambda: self._loop.run_until_complete(self._loop.shutdown_default_executor()))

    def run(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)


@pytest.mark.parametrize("face", [blocking, future, coroutine])
@pytest.mark.parametrize("providers", [2, 3, 4])
def test_a_lone_caller_reaches_a_provider_that_joins(
    face: Callable[[MprpcConfig, ExitStack], Call], providers: int, config: MprpcConfig
) -> None:
    """The turn of an endpoint that was not connected yet was passed on, so that a new provider got no calls at all."""
    with ExitStack() as stack:
        for name in range(1, providers):
            stack.enter_context(serving(config, name))
        call = face(config, stack)
        wait_until_answered_by(call, set(range(1, providers)))
        stack.enter_context(serving(config, providers))
        wait_until_answered_by(call, set(range(1, providers + 1)))


def wait_until_answered_by(call: Call, names: set[int]) -> None:
    """Calls until the list has come, then as often as all providers together need at the most."""
    ended = threading.Event()
    timer = threading.Timer(0.5, ended.set)  # half of the second in which a new provider gets its first call
    timer.start()
    seen: set[int] = set()
    while not (ended.is_set() or seen == names):
        seen.add(call())
    timer.cancel()
    assert {call() for _ in range(MANY)} == names


class Watcher:
    def told(self, endpoint: Any, changed: bool) -> None:
        """A pool would make its candidates anew."""


def test_many_callers_make_one_attempt_at_a_dead_provider(config: MprpcConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each caller that had waited for the connection tried again, and each doubled the rest, up to half a minute."""
    threads = 8
    attempts: list[str] = []
    waiting, refused, began = threading.Barrier(threads + 1), threading.Event(), time.monotonic()
    endpoint = mprpc.subchannel.Subchannel(dead_address(), False, config)
    watcher = Watcher()
    endpoint.listed("1", "mprpc.test.LedgerRpc", watcher.told)
    connect = endpoint.socket

    def slow(deadline: int) -> Any:
        attempts.append(endpoint.address)
        assert refused.wait(PATIENCE)
        return connect(deadline)

    monkeypatch.setattr(endpoint, "socket", slow)

    def caller() -> None:
        waiting.wait(PATIENCE)
        with pytest.raises(mprpc.Unavailable):
            endpoint.connect(2**62)

    callers = [threading.Thread(target=caller) for _ in range(threads)]
    for each in callers:
        each.start()
    waiting.wait(PATIENCE)
    threading.Event().wait(0.1)  # for all to be at the lock; who comes later makes an attempt of its own
    refused.set()
    for each in callers:
        each.join(PATIENCE)
    with pytest.raises(mprpc.Unavailable):  # whose call began before: it had chosen the endpoint already
        endpoint.connect(2**62, began)
    assert len(attempts) == 1
    assert endpoint.health.out
    assert endpoint.health.rests == 1


def test_a_provider_that_is_registered_anew_does_not_wait_for_the_rest_of_the_one_before(
    config: MprpcConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed provider is listed until its session ends; its successor at that address must not rest in its place."""
    monkeypatch.setattr(mprpc.outliers, "REST_FIRST", 30.0)
    address = dead_address()
    host, _, port = address.partition(":")
    with ExitStack() as stack:
        registry = stack.enter_context(Registry(config))
        ghost = Registration("mprpc.test.LedgerRpc", ("Look", "Book"), host, int(port))
        assert registry.publish([ghost]).wait(PATIENCE)
        stack.enter_context(serving(config, 1))
        call = blocking(config, stack)
        wait_until_answered_by(call, {1})
        stack.enter_context(serving(config, 2, int(port)))
        wait_until_answered_by(call, {1, 2})


def test_goaway_and_the_refusals_behind_it_come_together() -> None:
    """A call above GOAWAY's id was ended by it, and freed, and ended again by its refusal in the same receive."""
    calls = 20

    def drain(peer: wire.Peer) -> None:
        for _ in range(calls):
            peer.frame()
        refusals = (wire.response(number, status=14, not_run=True) for number in range(2, calls + 1))
        peer.send(wire.frame(kind=wire.rpcheader_pb2.GOAWAY, call_id=1) + b"".join(refusals))
        peer.send(wire.response(1, ledger_pb2.Receipt(number=1).SerializeToString()))
        assert peer.rest() == b""

    with wire.FakeProvider(drain, *[refuse] * calls) as provider, MprpcChannel(provider.address) as channel:
        channel.wait_ready(PATIENCE)
        stub = ledger_mprpc.LedgerRpc_Stub(channel)
        futures = [stub.Book.future(ENTRY) for _ in range(calls)]
        assert futures[0].result(PATIENCE).number == 1
        for each in futures[1:]:
            assert isinstance(each.exception(PATIENCE), mprpc.Unavailable)


def test_a_call_of_which_nothing_could_be_written_never_ran() -> None:
    """It was taken for one that may have run, so that it failed where another provider would have answered."""
    names = mprpc.unary_call.names_on_wire("mprpc.test.LedgerRpc", "Book")
    for _ in range(20):  # a connection that was used within a millisecond is written to without a look
        ours, peers = socket.socketpair()
        peers.close()
        link = lib.mprpc_link_new(ours.detach(), 1000)
        call = ffi.new("struct mprpc_call *")
        outcome = lib.mprpc_link_call(link, call, names, len(names), b"", 0, 1_000_000_000, 0, ffi.NULL)
        assert (outcome, call.sent) == (lib.MPRPC_CALL_BROKEN, 0)
        lib.mprpc_link_free(link)


def refuse(peer: wire.Peer) -> None:
    """Ends the connection without a word."""
    peer.finish()
    peer.rest()


class SeedConsumer:
    """As the C++ framework's: asks ZooKeeper for the method's znode, connects, sends once, receives once."""

    def __init__(self, hosts: str) -> None:
        self._zookeeper = KazooClient(hosts)
        self._zookeeper.start(PATIENCE)

    def address(self) -> str:
        return bytes(self._zookeeper.get("/UserServiceRpc/Login")[0]).decode()

    def login(self) -> bytes:
        host, _, port = self.address().partition(":")
        with socket.create_connection((host, int(port)), PATIENCE) as connection:
            connection.settimeout(PATIENCE)
            connection.sendall(wire.SEED_LOGIN)
            return connection.recv(1024)

    def wait_for(self, address: str) -> None:
        """Until the znode says that address."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            changed = threading.Event()
            there = self._zookeeper.exists("/UserServiceRpc/Login", lambda event, changed=changed: changed.set())
            with suppress(NoNodeError):  # gone meanwhile
                if there and self.address() == address:
                    return
            changed.wait(deadline - time.monotonic())
        raise AssertionError(f"{address} has not taken the znode over")

    def close(self) -> None:
        self._zookeeper.stop()
        self._zookeeper.close()


HOLDER = """
import sys
from mprpc import MprpcConfig, RpcProvider
from services import Users
provider = RpcProvider(MprpcConfig(zookeeperip=sys.argv[1], session_timeout=1.0))
provider.notify_service(Users())
provider.start()
assert provider.wait_registered(20)
print(provider.address, flush=True)
sys.stdin.read()
"""


def test_a_seed_consumer_finds_us_and_whoever_takes_over_when_the_holder_is_killed(
    zookeeper: ZooKeeper,
) -> None:
    answer = LoginResponse(result=user_pb2.ResultCode(errmsg=b"zhang san"), success=True).SerializeToString()
    holder = services.start_python(HOLDER, zookeeper.hosts)
    consumer = SeedConsumer(zookeeper.hosts)
    try:
        assert holder.stdout is not None
        address = holder.stdout.readline().strip()
        with services.serving(zookeeperip=zookeeper.hosts, session_timeout=1.0) as other:
            assert other.wait_registered(PATIENCE)
            assert consumer.address() == address
            assert consumer.login() == answer
            holder.kill()
            consumer.wait_for(other.address)
            assert consumer.login() == answer
    finally:
        holder.kill()
        holder.communicate()
        consumer.close()


def test_a_provider_of_the_seed_is_called_in_its_dialect(zookeeper: ZooKeeper) -> None:
    received: list[bytes] = []

    def serve(peer: wire.Peer) -> None:
        received.append(peer.socket.recv(65536))
        peer.send(LoginResponse(success=True).SerializeToString())

    seed = KazooClient(zookeeper.hosts)
    seed.start(PATIENCE)
    try:
        with wire.FakeProvider(serve) as provider:
            seed.create("/UserServiceRpc")
            seed.create("/UserServiceRpc/Login", provider.address.encode(), ephemeral=True)
            with MprpcChannel(MprpcConfig(zookeeperip=zookeeper.hosts)) as channel:
                users = services.user_mprpc.UserServiceRpc_Stub(channel)
                assert users.Login(services.REQUEST, timeout=PATIENCE).success
                with pytest.raises(mprpc.Unavailable):
                    users.Register(user_pb2.RegisterRequest(), timeout=PATIENCE)
    finally:
        seed.stop()
        seed.close()
    assert received == [wire.SEED_LOGIN]


def test_a_herd_reads_each_list_at_most_three_times(
    embedded: EmbeddedZooKeeper, config: MprpcConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumers, providers = 20, 5
    reads: Counter[int] = Counter()
    carry_out = mprpc.registry._Shell._carry_out

    def counted(self: Any, action: Any) -> None:
        if isinstance(action, Request) and isinstance(action.operation, (Children, Exists, Read)):
            reads[id(self)] += 1
        carry_out(self, action)

    monkeypatch.setattr(mprpc.registry._Shell, "_carry_out", counted)
    with ExitStack() as stack:
        for port in range(8001, 8001 + providers):
            registry = stack.enter_context(Registry(config))
            registration = Registration("mprpc.test.LedgerRpc", ("Look", "Book"), "127.0.0.1", port)
            assert registry.publish([registration]).wait(PATIENCE)
        herd = [stack.enter_context(Registry(config)) for _ in range(consumers)]
        views = [registry.follow("mprpc.test.LedgerRpc", ("Look", "Book")) for registry in herd]
        for view in views:
            assert len(view.wait(PATIENCE).endpoints) == providers
        reads.clear()
        sure = [threading.Event() for _ in views]
        for view, event in zip(views, sure, strict=True):
            view.on_change(lambda snapshot, event=event: event.set() if snapshot.confirmed else None)  # type: ignore[misc]
        embedded.drop_connections()
        assert all(event.wait(PATIENCE) for event in sure)
        assert all(len(view.snapshot.endpoints) == providers for view in views)
        assert max(reads[id(registry._shell)] for registry in herd) <= 3


def test_a_provider_that_has_stopped_holds_no_descriptor(config: MprpcConfig) -> None:
    """Its loop's four stayed until Python's collector came upon the provider, which may be never."""
    with serving(config, 1):
        pass
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for name in range(5):
            with serving(config, name):
                pass
        end = time.monotonic() + PATIENCE  # the embedded ZooKeeper's side of the last connection may close after ours
        while len(os.listdir("/proc/self/fd")) > before:
            assert time.monotonic() < end
            threading.Event().wait(0.01)
    finally:
        gc.enable()


@pytest.mark.slow
def test_rolling_restarts_fail_no_call() -> None:
    require()
    assert restarts.rolling(seed=1, count=4, minutes=1, rate=200, members=2) == 0


@pytest.mark.slow
def test_deaths_fail_only_what_is_in_flight() -> None:
    require()
    assert restarts.kill(seed=1, count=2, minutes=1, rate=200, members=3, missed=(0.3,)) == 0


@pytest.mark.slow
def test_faults_of_zookeeper_fail_no_call() -> None:
    require()
    mix = ("session expired", "connection lost", "tree deleted")
    assert faults.faults(seed=1, count=len(mix), minutes=1, rate=100, mix=dict.fromkeys(mix, 1)) == 0


@pytest.mark.slow
def test_cycles_leave_nothing() -> None:
    require()
    assert cycles.cycles(seed=1, count=8, minutes=1, kinds=("up", "down", "silent", "dropping")) == 0


def dead_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.slow
def test_a_second_worker_is_worth_nearly_as_much_as_the_first() -> None:
    """By the CPU that a call takes; that both are at work at the same time is seen by `make workers`."""
    assert workers.scaling(hunt.Report("workers", 1), rounds=1, seconds=1.0) >= workers.WORTH


def test_no_answer_reaches_the_wrong_call() -> None:
    """A third of the calls give up while their answers are under way, and the connection is reset all the time."""
    report = hunt.Report("hunt", 3)
    total = hunt.run(report, seed=3, count=20_000, minutes=1.0)
    assert [text for text in total.wrong if "gave up" not in text] == []
    assert [text for text in report.broken if "deadline" not in text] == []  # times are for `make hunt`
    assert sum(total.ends.values()) > 19_000
    assert min(total.ends[kind] for kind in (hunt.ANSWERED, hunt.LATE, hunt.LOST, hunt.CANCELLED)) > 50
    assert max(total.excess) < PATIENCE


def test_the_hunt_would_find_one() -> None:
    """A stranger's answer, a second end, an end too early, and one that was not expected."""
    shape, tally = hunt.Shape(idempotent=True, timeout=1.0, hold_ms=0, size=1), hunt.Tally()
    one, two, three = (hunt.Question(number, shape) for number in (1, 2, 3))
    one.began = two.began = three.began = time.monotonic()
    tally.end(one, ledger_pb2.Receipt(number=2, note=two.entry.note))
    tally.end(one, ledger_pb2.Receipt(number=1, note=one.entry.note))
    tally.end(two, DeadlineExceeded("too early"))
    tally.end(three, asyncio.CancelledError())
    assert len(tally.wrong) == 4
    said = ("1 got the answer of 2", "1 ended twice", "2 gave up", "3 ended with CancelledError")
    for text, expected in zip(tally.wrong, said, strict=True):
        assert text.startswith(f"call {expected}"), text


def test_faults_of_the_network_are_got_over() -> None:
    """One of three providers is behind them: a second each, both ways."""
    report = proxy.Report("proxy", 1)
    proxy.run(report, seed=1, seconds=1.0, directions=["both ways"], fresh=True)
    assert report.broken == []


@pytest.mark.long
def test_nothing_grows() -> None:
    report = soak.Report("soak", 1)
    soak.run(report, seed=1, faults=10, seconds=20.0, every=2.0, lasts=1.0)
    assert [text for text in report.broken if "kilobytes" not in text] == []  # memory settles later: `make soak`
