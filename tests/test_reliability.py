"""Providers that come, go and die under callers: short versions of the long runs, and what those runs have found."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import generated
import pytest
import wire

import mprpc.channel
from mprpc import MprpcChannel, MprpcConfig, RpcProvider
from mprpc.aio import AsyncMprpcChannel
from mprpc.embedded_zookeeper import Clock
from mprpc.registry import Registration, Registry
from mprpc.testing import EmbeddedZooKeeper

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
def zookeeper() -> Iterator[EmbeddedZooKeeper]:
    with EmbeddedZooKeeper(clock=Clock()) as server:
        yield server


@pytest.fixture
def config(zookeeper: EmbeddedZooKeeper) -> MprpcConfig:
    return MprpcConfig(zookeeperip=zookeeper.hosts, session_timeout=4.0)


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


def test_many_callers_make_one_attempt_at_a_dead_provider(config: MprpcConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each caller that had waited for the connection tried again, and each doubled the rest, up to half a minute."""
    threads = 8
    attempts: list[str] = []
    waiting, refused = threading.Barrier(threads + 1), threading.Event()
    endpoint = mprpc.channel._Endpoint(dead_address(), False, config)
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
    assert len(attempts) == 1
    assert endpoint.resting()
    assert 0.0 < endpoint._rest < 0.15


def test_a_provider_that_is_registered_anew_does_not_wait_for_the_rest_of_the_one_before(
    config: MprpcConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed provider is listed until its session ends; its successor at that address must not rest in its place."""
    monkeypatch.setattr(mprpc.channel, "_REST_FIRST", 30.0)
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


def refuse(peer: wire.Peer) -> None:
    """Ends the connection without a word."""
    peer.finish()
    peer.rest()


def dead_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"
