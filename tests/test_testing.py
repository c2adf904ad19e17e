"""What users' tests get: a pair of channel and provider, and a registry that asks nobody."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import mprpc
import services
from held import named
from mprpc import (
    AsyncMprpcChannel,
    ConfigError,
    DeadlineExceeded,
    MprpcChannel,
    MprpcConfig,
    NotFound,
    ResourceExhausted,
    RpcProvider,
    Unavailable,
)
from mprpc.testing import FakeRegistry, pair, serve

SERVICE = "fixbug.UserServiceRpc"


def stub(channel: Any) -> Any:
    return services.user_mprpc.UserServiceRpc_Stub(channel)


def answering(text: str) -> services.Users:
    """A service that always says that."""
    return services.Users(lambda request, controller: services.accept(named(text), controller))


def test_a_pair() -> None:
    with pair(services.Users()) as channel:
        assert isinstance(channel, mprpc.MprpcChannel)
        assert stub(channel).Login(named("somebody")).result.errmsg == b"somebody"
        assert stub(channel).Login.future(named("later")).result(5.0).result.errmsg == b"later"


def test_errors_and_limits_are_the_real_ones() -> None:
    def nobody(request: Any, controller: Any) -> Any:
        raise NotFound("nobody of that name")

    with pair(services.Users(nobody), config=MprpcConfig(max_payload=100)) as channel:
        with pytest.raises(NotFound, match="nobody of that name"):
            stub(channel).Login(named("x"))
        with pytest.raises(ResourceExhausted, match="max_payload"):
            stub(channel).Login(named("x" * 101))


def test_it_listens_on_no_port_and_leaves_nothing() -> None:
    before = descriptors()
    with pair(services.Users()) as channel:
        assert stub(channel).Login(named("somebody")).success
        opened = [what for number, what in descriptors().items() if number not in before]
        assert opened
        assert not [what for what in opened if what.startswith("socket:")]
    with pytest.raises(RuntimeError, match="the test's own"), pair(services.Users()) as channel:
        raise RuntimeError("the test's own")
    with pytest.raises(Unavailable):
        stub(channel).Login(named("x"))


def test_a_configuration_s_addresses_are_left_alone() -> None:
    config = MprpcConfig(rpcserverip="192.0.2.1", rpcserverport=9, zookeeperip="192.0.2.2")
    with pair(services.Users(), config=config) as channel:
        assert stub(channel).Login(named("x")).success


def test_what_can_t_be_published_is_told() -> None:
    with pytest.raises(TypeError, match="is a class"), pair(services.Users):
        pytest.fail("never comes here")


def test_asyncio_and_async_handlers() -> None:
    async def login(request: Any, controller: Any) -> Any:
        await asyncio.sleep(0)
        return services.accept(request, controller)

    async def main(address: str) -> None:
        async with AsyncMprpcChannel(address) as channel:
            users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
            assert (await users.Login(named("x"))).result.errmsg == b"x"

    with serve(services.Users(login)) as address:
        asyncio.run(main(address))


def test_a_registry_of_two_providers() -> None:
    with serve(answering("one")) as one, serve(answering("two")) as two:
        registry = FakeRegistry({SERVICE: [one, two]})
        with registry.channel() as channel:
            users = stub(channel)
            assert {users.Login(named("x")).result.errmsg for _ in range(4)} == {b"one", b"two"}
            registry.list(SERVICE, [two])
            assert {users.Login(named("x")).result.errmsg for _ in range(4)} == {b"two"}


def test_a_provider_that_is_gone_is_gone_on_from_and_reported() -> None:
    with serve(answering("here")) as here:
        registry = FakeRegistry({SERVICE: ["unix:/nowhere/at/all", here]})
        with registry.channel() as channel:
            users = stub(channel)
            assert {users.Login(named("x")).result.errmsg for _ in range(4)} == {b"here"}
            assert {users.Login.future(named("x")).result(5.0).result.errmsg for _ in range(4)} == {b"here"}
        assert set(registry.reported) == {"unix:/nowhere/at/all"}


def test_a_list_that_is_waited_for() -> None:
    with serve(answering("late")) as address:
        registry = FakeRegistry()
        with registry.channel(timeout=5.0) as channel:
            with pytest.raises(Unavailable, match=f"did not say within .* who provides {SERVICE}"):
                stub(channel).Login(named("x"), timeout=0.05)
            threading.Timer(0.1, registry.list, (SERVICE, [address])).start()
            start = time.monotonic()
            assert stub(channel).Login(named("x")).result.errmsg == b"late"
            assert time.monotonic() - start > 0.05
            registry.list(SERVICE, [])
            with pytest.raises(Unavailable, match="no provider of"):
                stub(channel).Login(named("x"))


def test_asyncio_with_such_a_registry() -> None:
    async def main() -> None:
        async with registry.async_channel() as channel:
            users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
            assert (await users.Login(named("x"))).result.errmsg == b"one"

    with serve(answering("one")) as one:
        registry = FakeRegistry({SERVICE: [one]})
        asyncio.run(main())


def test_an_impossible_configuration_is_refused() -> None:
    with pytest.raises(ConfigError), pair(services.Users(), config=MprpcConfig(max_payload=0)):
        pytest.fail("never comes here")


# ---- a connection within the process ----


def test_both_ways_carry_more_than_a_pipe_holds() -> None:
    def echo(request: Any, controller: Any) -> Any:
        return services.user_pb2.LoginResponse(result=services.user_pb2.ResultCode(errmsg=request.name))

    name = b"0123456789abcdef" * (1 << 18)  # 4 MiB
    with pair(services.Users(echo)) as channel:
        assert stub(channel).Login(services.user_pb2.LoginRequest(name=name)).result.errmsg == name
        both = [stub(channel).Login.future(services.user_pb2.LoginRequest(name=name)) for _ in range(2)]
        assert [each.result(30.0).result.errmsg for each in both] == [name, name]


def test_many_threads_and_futures_get_their_own_answers() -> None:
    with pair(services.Users(), config=MprpcConfig(loops=2)) as channel, ThreadPoolExecutor(8) as pool:
        users = stub(channel)
        names = [f"somebody {i}" for i in range(2000)]
        direct = pool.map(lambda name: users.Login(named(name)).result.errmsg, names)
        later = [users.Login.future(named(name)) for name in names]
        assert list(direct) == [name.encode() for name in names]
        assert [each.result(30.0).result.errmsg for each in later] == [name.encode() for name in names]


def test_a_deadline_passes_and_the_connection_stays_good() -> None:
    release = threading.Event()

    def wait(request: Any, controller: Any) -> Any:
        if request.name == b"slow":
            assert release.wait(10.0)
        return services.user_pb2.LoginResponse(success=True)

    with pair(services.Users(wait)) as channel:
        with pytest.raises(DeadlineExceeded):
            stub(channel).Login(named("slow"), timeout=0.02)
        release.set()
        assert stub(channel).Login(named("fast")).success


def test_asyncio_within_the_process() -> None:
    async def both(address: str) -> list[bytes]:
        async with mprpc.AsyncMprpcChannel(address) as channel:
            users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
            answers = await asyncio.gather(*(users.Login(named(str(i))) for i in range(100)))
            return [answer.result.errmsg for answer in answers]

    with serve(services.Users()) as address:
        assert asyncio.run(both(address)) == [str(i).encode() for i in range(100)]


def test_the_provider_s_end_is_seen_and_another_takes_the_name() -> None:
    first, second = (RpcProvider(MprpcConfig(rpcserverip="memory:same")) for _ in range(2))
    for provider in (first, second):
        provider.notify_service(services.Users())
    with MprpcChannel("memory:same") as channel:
        with first:
            assert stub(channel).Login(named("x")).success
            with pytest.raises(ConfigError, match="another provider of this process"):
                second.start()
        with pytest.raises(Unavailable, match="no provider of this process listens there"):
            stub(channel).Login(named("x"))
        with RpcProvider(MprpcConfig(rpcserverip="memory:same")) as third:
            assert third.address == "memory:same"


def test_the_classic_dialect_needs_a_socket() -> None:
    with serve(services.Users()) as address, MprpcChannel(address, dialect="classic") as channel:
        with pytest.raises(Unavailable, match="framed"):
            stub(channel).Login(named("x"))


def test_connections_over_the_limit_are_refused() -> None:
    with serve(services.Users(), config=MprpcConfig(max_connections=1)) as address:
        with MprpcChannel(address) as one, MprpcChannel(address) as two:
            assert stub(one).Login(named("x")).success
            with pytest.raises(Unavailable, match="refuses more connections"):
                stub(two).Login(named("x"))
            one.close()
            two.wait_ready(5.0)
            assert stub(two).Login(named("x")).success


def test_nothing_stays_open() -> None:
    before = descriptors()
    for _ in range(20):
        with pair(services.Users()) as channel:
            assert stub(channel).Login(named("x")).success
        del channel
    gc.collect()
    assert len(descriptors()) <= len(before) + 8  # the keeper's and the mailbox's pipes stay


def descriptors() -> dict[str, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found
