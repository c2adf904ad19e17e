"""Connections that are idle, and connections whose other end is gone without a word."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import held
import mprpc
import services
import wire
from mprpc import AsyncMprpcChannel, MprpcChannel, MprpcConfig
from services import REQUEST, LoginResponse
from test_provider import statistics, wait_until

TIME, TIMEOUT = 0.2, 0.15  # keepalive_time and keepalive_timeout here
SLACK = 1.0  # seconds for a machine that is busy with something else
QUICK: dict[str, Any] = {"keepalive_time": TIME, "keepalive_timeout": TIMEOUT, "call_timeout": wire.PATIENCE}
PING, GOAWAY = wire.rpcheader_pb2.PING, wire.rpcheader_pb2.GOAWAY
OK = LoginResponse(success=True)


def to(address: str, **keys: Any) -> MprpcConfig:
    """What a channel to that address is made with."""
    host, _, port = address.partition(":")
    return MprpcConfig(rpcserverip=host, rpcserverport=int(port), **QUICK | keys)


@contextlib.contextmanager
def calling(address: str, **keys: Any) -> Iterator[Any]:
    with MprpcChannel(to(address, **keys)) as channel:
        yield services.user_mprpc.UserServiceRpc_Stub(channel)


def black_hole(peer: wire.Peer) -> None:
    """Takes a call and says nothing more."""
    peer.frame()
    assert peer.frame()[0].kind == PING
    with contextlib.suppress(ConnectionError):
        assert peer.rest() == b""


def answering(*numbers: int) -> Callable[[wire.Peer], None]:
    def answer(peer: wire.Peer) -> None:
        for number in numbers:
            assert peer.frame()[0].call_id == number
            peer.send(wire.response(number, OK.SerializeToString()))
        assert peer.rest() == b""

    return answer


def blocking(address: str) -> BaseException | None:
    with calling(address) as users:
        try:
            users.Login(REQUEST)
        except mprpc.RpcError as error:
            return error
    return None


def future(address: str) -> BaseException | None:
    with calling(address) as users:
        found: BaseException | None = users.Login.future(REQUEST).exception(wire.PATIENCE)
        return found


def coroutine(address: str) -> BaseException | None:
    async def call() -> BaseException | None:
        async with AsyncMprpcChannel(to(address)) as channel:
            try:
                await services.user_mprpc.UserServiceRpc_AsyncStub(channel).Login(REQUEST)
            except mprpc.RpcError as error:
                return error
        return None

    return asyncio.run(call())


@pytest.mark.parametrize("face", [blocking, future, coroutine])
def test_a_silent_provider_is_given_up_with_its_calls(face: Callable[[str], BaseException | None]) -> None:
    with wire.FakeProvider(black_hole) as provider:
        before = time.monotonic()
        error = face(provider.address)
        assert TIME + TIMEOUT <= time.monotonic() - before < TIME + TIMEOUT + SLACK
    assert isinstance(error, mprpc.Unavailable)
    assert "PING" in error.text
    assert not error.not_run


def test_a_provider_that_takes_long_but_lives_is_waited_for() -> None:
    with held.holding() as (handler, provider), calling(provider.address) as users:
        call = users.Login.future(held.named("hold"))
        handler.taken()
        done = threading.Event()
        call.add_done_callback(lambda _: done.set())
        assert not done.wait(4 * (TIME + TIMEOUT))
        handler.release()
        assert call.result(wire.PATIENCE).success
        assert sum(each.accepted for each in statistics(provider)) == 1


def test_an_idle_connection_to_a_silent_provider_is_made_anew() -> None:
    ended = threading.Event()

    def first(peer: wire.Peer) -> None:
        peer.frame()
        peer.send(wire.response(1, OK.SerializeToString()))
        assert peer.frame()[0].kind == PING
        with contextlib.suppress(ConnectionError):
            assert peer.rest() == b""
        ended.set()

    with wire.FakeProvider(first, answering(1)) as provider, calling(provider.address) as users:
        assert users.Login(REQUEST).success
        assert ended.wait(wire.PATIENCE)
        assert users.Login(REQUEST).success


def test_a_long_request_that_still_moves_is_no_silence() -> None:
    """PING waits behind it, and nothing can come back before it is there."""

    def sip(peer: wire.Peer) -> None:
        size = 0
        for _ in range(30):
            size += len(peer.socket.recv(100_000))
            threading.Event().wait(0.03)  # a slow line, not synchronisation
        while size < 12_000_000:
            part = peer.socket.recv(1 << 20)
            assert part
            size += len(part)
        peer.send(wire.response(1, OK.SerializeToString()))
        peer.rest()

    request = services.LoginRequest(name=b"x" * 12_000_000)
    with wire.FakeProvider(sip) as provider, calling(provider.address, keepalive_timeout=0.4) as users:
        before = time.monotonic()
        assert users.Login(request).success
        assert time.monotonic() - before > TIME + 0.4


def test_an_event_loop_that_is_late_kills_no_connection() -> None:
    """The answer to PING had come; nobody had read it."""

    async def call(address: str, answer: Callable[[], None]) -> Any:
        async with AsyncMprpcChannel(to(address)) as channel:
            task = asyncio.ensure_future(
                services.user_mprpc.UserServiceRpc_AsyncStub(channel).Login(held.named("hold"))
            )
            await asyncio.sleep(0.05)
            threading.Event().wait(3 * (TIME + TIMEOUT))
            answer()
            return await task

    with held.holding() as (handler, provider):

        def answer() -> None:
            handler.taken()
            handler.release()

        assert asyncio.run(call(provider.address, answer)).success


def test_keepalive_can_be_switched_off() -> None:
    def silent(peer: wire.Peer) -> None:
        peer.frame()
        peer.socket.settimeout(2 * (TIME + TIMEOUT))
        with pytest.raises(TimeoutError):
            peer.socket.recv(1)
        peer.socket.settimeout(wire.PATIENCE)
        peer.send(wire.response(1, OK.SerializeToString()))
        assert peer.rest() == b""

    with wire.FakeProvider(silent) as provider, calling(provider.address, keepalive_time=0.0) as users:
        assert users.Login(REQUEST).success


def test_idle_connections_cost_next_to_nothing() -> None:
    with services.serving() as provider, contextlib.ExitStack() as stack:
        for _ in range(100):
            channel = stack.enter_context(MprpcChannel(to(provider.address)))
            channel.wait_ready(wire.PATIENCE)
        threading.Event().wait(TIME)
        before = time.process_time()
        threading.Event().wait(2.0)
        used = time.process_time() - before  # the provider's as well, and each connection is asked about ten times
        assert used < 0.2


# ---- the provider's side ----


def test_an_idle_connection_hears_goaway_and_the_end() -> None:
    with services.serving(idle_timeout=0.2) as provider:
        with wire.connect(provider.address) as peer, wire.connect(provider.address) as silent:
            peer.send(wire.login(1))
            assert peer.frame()[0].call_id == 1
            before = time.monotonic()
            header, _ = peer.frame()
            assert (header.kind, header.call_id) == (GOAWAY, 1)
            assert time.monotonic() - before > 0.19
            peer.send(wire.login(2))  # it crosses the GOAWAY
            header, _ = peer.frame()
            assert (header.call_id, header.status, header.not_run) == (2, 14, True)
            assert peer.rest() == b""
            assert silent.was_reset()


def test_asking_alone_keeps_no_connection() -> None:
    with services.serving(idle_timeout=0.2) as provider, wire.connect(provider.address) as peer:
        for number in range(1, 1000):
            peer.send(wire.frame(kind=PING, call_id=number))
            if peer.frame()[0].kind == GOAWAY:
                break
            threading.Event().wait(0.01)
        else:
            pytest.fail("it is still there")


def test_a_connection_with_a_call_in_flight_is_not_idle() -> None:
    with held.holding(idle_timeout=0.1) as (handler, provider), calling(provider.address) as users:
        call = users.Login.future(held.named("hold"))
        handler.taken()
        threading.Event().wait(0.4)
        handler.release()
        assert call.result(wire.PATIENCE).success
        assert sum(each.accepted for each in statistics(provider)) == 1


def test_a_peer_that_never_reads_is_let_go() -> None:
    answer = services.accept(services.LoginRequest(name=b"x" * 40_000), None)
    data = b"".join(wire.login(i) for i in range(1, 2001))

    with services.serving(lambda request, controller: answer, idle_timeout=0.3) as provider:
        with wire.connect(provider.address, SO_RCVBUF=4096) as slow:
            sending = threading.Thread(target=_send_what_can_be, args=(slow, data))
            sending.start()
            wait_until(lambda: sum(each.accepted for each in statistics(provider)) == 1, "it has come")
            wait_until(lambda: sum(each.connections for each in statistics(provider)) == 0, "it is gone")
            sending.join(wire.PATIENCE)


def _send_what_can_be(peer: wire.Peer, data: bytes) -> None:
    with contextlib.suppress(OSError):
        peer.send(data)


@pytest.mark.parametrize("face", ["blocking", "future", "coroutine"])
def test_no_call_fails_for_the_end_of_an_idle_connection(face: str) -> None:
    """Calls come just when the connection ends: what GOAWAY does not name never ran, and is sent again."""
    idle, calls = 0.02, 60
    generator = random.Random(5)
    with services.serving(idle_timeout=idle) as provider:
        config = to(provider.address, keepalive_time=0.0)
        pauses = [generator.uniform(idle, 1.5 * idle) for _ in range(calls)]
        if face == "coroutine":
            asyncio.run(_await_them(config, pauses))
        else:
            with MprpcChannel(config) as channel:
                users = services.user_mprpc.UserServiceRpc_Stub(channel)
                for pause in pauses:
                    threading.Event().wait(pause)
                    one = users.Login(REQUEST) if face == "blocking" else users.Login.future(REQUEST).result()
                    assert one.success
        assert sum(each.accepted for each in statistics(provider)) > calls / 4  # else none has ended
        assert sum(each.requests for each in statistics(provider)) == calls


async def _await_them(config: MprpcConfig, pauses: list[float]) -> None:
    async with AsyncMprpcChannel(config) as channel:
        users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
        for pause in pauses:
            await asyncio.sleep(pause)
            assert (await users.Login(REQUEST)).success


# ---- what a slow provider has not read ----


def test_unsent_requests_are_bounded() -> None:
    """A provider that reads nothing; the calls that no memory is kept for fail at once, as never run."""
    release = threading.Event()
    with wire.FakeProvider(lambda peer: release.wait(wire.PATIENCE)) as provider:
        with calling(provider.address, max_unsent=1_000_000, keepalive_time=0.0) as users:
            large = services.LoginRequest(name=b"x" * 400_000)
            futures = [users.Login.future(large) for _ in range(200)]
            wait_until(lambda: sum(each.done() for each in futures) > 100, "what the kernel did not take has failed")
            refused = [each.exception(0) for each in futures if each.done()]
            assert all(isinstance(each, mprpc.ResourceExhausted) and each.not_run for each in refused)
            assert "max_unsent" in str(refused[0])
        release.set()
