"""What users' tests get: a pair of channel and provider, and a registry that asks nobody."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import mprpc
import services
from held import named
from mprpc import AsyncMprpcChannel, ConfigError, MprpcConfig, NotFound, ResourceExhausted, Unavailable
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
    with serve(services.Users()) as address:
        path = Path(address.removeprefix("unix:"))
        assert path.is_socket()
    assert not path.parent.exists()
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
