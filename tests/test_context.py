"""What calls inherit that a handler makes: deadline, cancellation, and that a retry's calls are not retried."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import mprpc
import services
import wire
from held import holding, named
from mprpc import AsyncMprpcChannel, Cancelled, DeadlineExceeded, MprpcChannel, MprpcConfig, RpcError, Status
from mprpc.context import handled
from test_retry import Script

LONG = 300.0  # what the nested calls would have by themselves
SHORT = 60.0  # what the outer one has

Handler = Callable[[Any, Any], Any]
Nested = Callable[..., Any]


def told(request: Any, controller: Any) -> Any:
    """A Login that answers with how long it has."""
    return services.LoginResponse(result=services.user_pb2.ResultCode(errmsg=str(controller.time_remaining()).encode()))


def seconds(answer: Any) -> float:
    return float(answer.result.errmsg)


# How a handler calls on: each makes a handler of a blocking stub's and an asyncio stub's method.


def in_place(call: Any, acall: Any) -> Handler:
    return lambda request, controller: call(request, timeout=LONG)


def with_a_controller(call: Any, acall: Any) -> Handler:
    def handler(request: Any, controller: Any) -> Any:
        inner = mprpc.MprpcController()
        answer = call(request, timeout=LONG, controller=inner)
        if inner.failed():
            raise RpcError(inner.status, inner.error_text())
        return answer

    return handler


def by_future(call: Any, acall: Any) -> Handler:
    """The handler's answer is the nested call's future itself."""
    return lambda request, controller: call.future(request, timeout=LONG)


def in_a_coroutine(call: Any, acall: Any) -> Handler:
    async def handler(request: Any, controller: Any) -> Any:
        return await acall(request, timeout=LONG)

    return handler


def in_a_task(call: Any, acall: Any) -> Handler:
    async def handler(request: Any, controller: Any) -> Any:
        async def later() -> Any:
            await asyncio.sleep(0)
            return await acall(request, timeout=LONG)

        return await asyncio.shield(asyncio.create_task(later()))  # so that nothing but what it inherits cancels it

    return handler


def off_the_event_loop(call: Any, acall: Any) -> Handler:
    async def handler(request: Any, controller: Any) -> Any:
        return await asyncio.to_thread(call, request, LONG)

    return handler


def in_a_thread(call: Any, acall: Any) -> Handler:
    def handler(request: Any, controller: Any) -> Any:
        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(call(request, timeout=LONG))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=mprpc.inherit(run)).start()
        return answer

    return handler


def in_a_thread_of_a_coroutine(call: Any, acall: Any) -> Handler:
    async def handler(request: Any, controller: Any) -> Any:
        def run() -> Any:
            return call(request, timeout=LONG)

        with ThreadPoolExecutor(1) as pool:
            return await asyncio.wrap_future(pool.submit(mprpc.inherit(run)))

    return handler


WAYS = [in_place, with_a_controller, by_future, in_a_coroutine, in_a_task, off_the_event_loop, in_a_thread]
WAYS += [in_a_thread_of_a_coroutine]
ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@contextlib.contextmanager
def chained(way: Nested, to: str, **options: Any) -> Iterator[mprpc.RpcProvider]:
    """A provider whose Login calls on, to the one at that address."""
    host, _, port = to.rpartition(":")
    config = MprpcConfig(rpcserverip=host, rpcserverport=int(port), retry_backoff=0.001)
    channel, achannel = MprpcChannel(config), AsyncMprpcChannel(config)
    call = services.user_mprpc.UserServiceRpc_Stub(channel).Login.with_options(**options)
    acall = services.user_mprpc.UserServiceRpc_AsyncStub(achannel).Login.with_options(**options)
    with services.serving(way(call, acall)) as provider:
        yield provider
    channel.close()
    asyncio.run(achannel.close())


@ways
def test_a_nested_call_has_what_is_left(way: Nested) -> None:
    with services.serving(told) as inner, chained(way, inner.address) as outer, services.calling(outer) as users:
        assert SHORT - wire.PATIENCE < seconds(users.Login(services.REQUEST, timeout=SHORT)) <= SHORT
        assert LONG - wire.PATIENCE < seconds(users.Login(services.REQUEST, timeout=LONG * 2)) <= LONG


def test_its_own_timeout_may_be_shorter() -> None:
    def shorter(call: Any, acall: Any) -> Handler:
        return lambda request, controller: call(request, timeout=SHORT)

    with services.serving(told) as inner, chained(shorter, inner.address) as outer, services.calling(outer) as users:
        assert seconds(users.Login(services.REQUEST, timeout=LONG)) <= SHORT


@ways
def test_a_nested_call_is_cancelled_with_the_one_that_is_handled(way: Nested) -> None:
    with holding() as (held, inner), chained(way, inner.address) as outer, services.calling(outer) as users:
        future = users.Login.future(named("hold"), timeout=LONG)
        held.taken()
        future.cancel()
        held.cancelled()


@ways
def test_a_nested_call_is_cancelled_when_the_caller_goes_away(way: Nested) -> None:
    with holding() as (held, inner), chained(way, inner.address) as outer:
        with wire.connect(outer.address) as peer:
            peer.send(wire.login(1, b"hold"))
            held.taken()
        held.cancelled()


@ways
@pytest.mark.parametrize("attempt", [0, 1])
def test_what_a_retry_calls_is_not_retried(way: Nested, attempt: int) -> None:
    script = Script()
    scripts = [script.lose] * 3 + [script.answer]
    with (
        wire.FakeProvider(*scripts) as inner,
        chained(way, inner.address, idempotent=True, retries=3) as outer,
        wire.connect(outer.address) as peer,
    ):
        peer.send(wire.login(1, attempt=attempt, timeout_ms=60000))
        header, _ = peer.frame()
        assert header.status == (Status.UNAVAILABLE if attempt else Status.OK)
    assert script.attempts == ([0] if attempt else [0, 1, 2, 3])


def test_a_handler_knows_its_callers_attempt() -> None:
    seen = []

    def login(request: Any, controller: Any) -> Any:
        seen.append(controller.attempt)
        return services.accept(request, controller)

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        for attempt in (0, 7):
            peer.send(wire.login(attempt + 1, attempt=attempt))
            peer.frame()
    assert seen == [0, 7]


def test_nothing_is_called_after_the_deadline() -> None:
    """The handler is late; what it calls then fails at once, and its provider hears nothing."""
    ended: list[RpcError] = []

    def late(call: Any, acall: Any) -> Handler:
        def handler(request: Any, controller: Any) -> Any:
            while controller.time_remaining():
                threading.Event().wait(0.001)
            try:
                call(request, timeout=LONG)
            except RpcError as error:
                ended.append(error)
            return services.LoginResponse()

        return handler

    with holding() as (held, inner), chained(late, inner.address) as outer, services.calling(outer) as users:
        with contextlib.suppress(DeadlineExceeded):
            users.Login(named("hold"), timeout=0.05)
        deadline = time.monotonic() + wire.PATIENCE
        while not ended:
            assert time.monotonic() < deadline
            threading.Event().wait(0.001)
        assert held.calls == []
    assert isinstance(ended[0], DeadlineExceeded)
    assert ended[0].not_run


def test_nothing_is_called_once_the_call_is_cancelled() -> None:
    ended: Future[BaseException | None] = Future()

    def later(call: Any, acall: Any) -> Handler:
        def handler(request: Any, controller: Any) -> Any:
            answer: Future[Any] = Future()

            def run() -> None:
                try:
                    call(request, timeout=LONG)
                except BaseException as error:
                    ended.set_result(error)
                answer.set_result(services.LoginResponse())

            controller.notify_on_cancel(threading.Thread(target=mprpc.inherit(run)).start)
            started.set()
            return answer

        return handler

    started = threading.Event()
    with holding() as (held, inner), chained(later, inner.address) as outer, services.calling(outer) as users:
        future = users.Login.future(named("hold"), timeout=LONG)
        assert started.wait(wire.PATIENCE)
        future.cancel()
        error = ended.result(wire.PATIENCE)
        assert held.calls == []
    assert isinstance(error, Cancelled)
    assert error.not_run


def test_outside_of_a_handler_nothing_is_inherited() -> None:
    seen = []

    def fail(request: Any, controller: Any) -> Any:
        seen.append(handled() is controller)
        raise mprpc.NotFound("nobody")

    with services.serving(fail) as provider, services.calling(provider) as users:
        with pytest.raises(mprpc.NotFound):
            users.Login(services.REQUEST)
    assert seen == [True]
    assert handled() is None
    assert mprpc.inherit(fail) is fail


CHAIN = """
import sys, mprpc, services
address, = sys.argv[1:]
def login(request, controller):
    if not address:
        left = str(controller.time_remaining()).encode()
        return services.LoginResponse(result=services.user_pb2.ResultCode(errmsg=left))
    return users.Login(request, timeout=300.0)
users = services.user_mprpc.UserServiceRpc_Stub(mprpc.MprpcChannel(address)) if address else None
with services.serving(login) as provider:
    print(provider.address, flush=True)
    sys.stdin.read()
"""


def test_two_levels_across_processes() -> None:
    with contextlib.ExitStack() as stack:
        address = ""
        for _ in range(3):
            process = services.start_python(CHAIN, address)
            stack.callback(process.communicate)  # ends its input, and so the process
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address
        with services.calling(address) as users:
            assert SHORT - wire.PATIENCE < seconds(users.Login(services.REQUEST, timeout=SHORT)) <= SHORT
