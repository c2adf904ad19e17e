"""What a channel counts: every call once, on whichever face, under what it ended with for its caller."""

# ruff: noqa: F811, as a test's argument has the name of the imported fixture

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import wire
from held import Held, held, provider  # noqa: F401
from mprpc import AsyncMprpcChannel, MprpcChannel, MprpcController, RpcError, RpcProvider, Status
from mprpc.statistics import MethodStatistics
from services import REQUEST, LoginRequest, LoginResponse, user_mprpc

LOGIN = "fixbug.UserServiceRpc.Login"
HOLD, FAIL = LoginRequest(name=b"hold"), LoginRequest(name=b"fail")


class Blocking:
    """One face of a channel: `call` returns when the call has ended, however."""

    def __init__(self, address: str) -> None:
        self.channel: Any = MprpcChannel(address, timeout=wire.PATIENCE)
        self.stub: Any = user_mprpc.UserServiceRpc_Stub(self.channel)

    def call(self, request: Any, timeout: float | None = None, controller: MprpcController | None = None) -> None:
        self._ended(self.stub.Login, request, timeout, controller)

    @staticmethod
    def _ended(call: Callable[..., Any], *arguments: Any) -> None:
        try:
            call(*arguments)
        except RpcError:
            return

    def of(self) -> MethodStatistics:
        found: MethodStatistics = self.channel.statistics().methods[LOGIN]
        return found

    def close(self) -> None:
        self.channel.close()


class Futures(Blocking):
    def call(self, request: Any, timeout: float | None = None, controller: MprpcController | None = None) -> None:
        self._ended(lambda: self.stub.Login.future(request, timeout, controller).result(wire.PATIENCE))


class Asyncio(Blocking):
    def __init__(self, address: str) -> None:
        self.loop = asyncio.new_event_loop()
        self.channel = AsyncMprpcChannel(address, timeout=wire.PATIENCE)
        self.stub = user_mprpc.UserServiceRpc_AsyncStub(self.channel)

    def call(self, request: Any, timeout: float | None = None, controller: MprpcController | None = None) -> None:
        self._ended(lambda: self.loop.run_until_complete(self.stub.Login(request, timeout, controller)))

    def close(self) -> None:
        self.loop.run_until_complete(self.channel.close())
        self.loop.close()


@pytest.fixture(params=[Blocking, Futures, Asyncio], ids=["blocking", "futures", "asyncio"])
def face(request: pytest.FixtureRequest, provider: RpcProvider) -> Iterator[Any]:
    face = request.param(provider.address)
    yield face
    face.close()


@pytest.mark.parametrize("controlled", [False, True], ids=["raising", "controlled"])
def test_a_call_is_counted_once_under_what_it_ended_with(face: Blocking, controlled: bool) -> None:
    def call(request: Any, timeout: float | None = None) -> None:
        face.call(request, timeout, MprpcController() if controlled else None)

    for _ in range(3):
        call(REQUEST)
    assert face.of()[:3] == (3, {}, 0)
    call(FAIL)
    call(HOLD, 0.02)
    call(LoginRequest(name=b"x" * 100_000))
    assert face.of()[:3] == (6, {Status.NOT_FOUND: 1, Status.DEADLINE_EXCEEDED: 1}, 0)
    latency = face.of().latency
    assert latency.calls == 6
    assert latency.percentile(100) > 0.017
    assert 0.02 < latency.seconds < wire.PATIENCE


def test_a_wrong_request_is_no_call(face: Blocking) -> None:
    face.call(REQUEST)
    with pytest.raises(TypeError):
        face.call(LoginResponse())
    assert face.of()[:3] == (1, {}, 0)


def test_nobody_there_is_unavailable(face: Blocking, provider: RpcProvider) -> None:
    face.call(REQUEST)
    provider.stop(0)
    face.call(REQUEST, 0.05)
    assert face.of()[:2] == (2, {Status.UNAVAILABLE: 1})


def test_calls_in_flight_and_cancelled_ones(provider: RpcProvider, held: Held) -> None:
    face = Blocking(provider.address)
    future, controller = face.stub.Login.future(HOLD), MprpcController()
    thread = threading.Thread(target=face.call, args=(HOLD, None, controller))
    thread.start()
    held.taken(2)
    assert face.of()[:3] == (2, {}, 2)
    future.cancel()
    controller.start_cancel()
    thread.join(wire.PATIENCE)
    assert face.of()[:3] == (2, {Status.CANCELLED: 2}, 0)
    before = face.stub.Login.future(HOLD, controller=controller)
    held.taken()
    controller.start_cancel()
    assert before.result(0) == LoginResponse()
    assert face.of()[:3] == (3, {Status.CANCELLED: 3}, 0)
    face.close()


def test_a_cancelled_task_is_a_cancelled_call(provider: RpcProvider, held: Held) -> None:
    async def main() -> None:
        async with AsyncMprpcChannel(provider.address, timeout=wire.PATIENCE) as channel:
            task = asyncio.ensure_future(user_mprpc.UserServiceRpc_AsyncStub(channel).Login(HOLD))
            await asyncio.get_running_loop().run_in_executor(None, held.taken)
            assert channel.statistics().methods[LOGIN].in_flight == 1
            task.cancel()
            await asyncio.wait({task})
            assert channel.statistics().methods[LOGIN][:3] == (1, {Status.CANCELLED: 1}, 0)

    asyncio.run(main())


def test_many_threads_lose_none(provider: RpcProvider) -> None:
    face = Blocking(provider.address)

    def call() -> None:
        for _ in range(200):
            face.call(REQUEST)
            face.call(FAIL)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert face.of()[:3] == (3200, {Status.NOT_FOUND: 1600}, 0)
    assert face.of().latency.calls == 3200
    face.close()


def test_stubs_of_one_channel_share_their_counts_and_endpoints_are_told(provider: RpcProvider) -> None:
    face = Blocking(provider.address)
    other = user_mprpc.UserServiceRpc_Stub(face.channel)
    face.call(REQUEST)
    other.Login.with_options(retries=0)(REQUEST)
    statistics = face.channel.statistics()
    assert statistics.methods[LOGIN].calls == 2
    assert statistics.methods["fixbug.UserServiceRpc.Register"].calls == 0
    endpoint = statistics.endpoints[provider.address]
    assert endpoint[:4] == (0, 2, 0, 0)
    assert 0 < endpoint.latency < wire.PATIENCE
    assert statistics.retries == 0
    face.close()


def test_a_forked_child_counts_its_own_calls_in_flight(provider: RpcProvider, held: Held) -> None:
    face = Blocking(provider.address)
    future = face.stub.Login.future(HOLD)
    held.taken()
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, bytes([face.of().in_flight]))
        os._exit(0)
    assert os.read(read, 1) == b"\0"
    os.wait()
    os.close(read)
    os.close(write)
    assert face.of().in_flight == 1
    future.cancel()
    face.close()
