"""A caller gives a call up: start_cancel() on all faces, before, during and after the call."""

# ruff: noqa: F811, as a test's argument has the name of the imported fixture

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

import services
import wire
from held import Held, held, holding, provider  # noqa: F401
from mprpc import AsyncMprpcChannel, MprpcChannel, MprpcController, RpcProvider, Status
from services import REQUEST, LoginRequest, LoginResponse, user_mprpc

HOLD = LoginRequest(name=b"hold")
LEAVING, OTHERS = 300, 9000  # connections with a call each, and calls of another one
FEW = 4  # times what it costs without the others; a look at each of them makes it a dozen


def is_cancelled(controller: MprpcController) -> bool:
    said = controller.status, controller.error_text()
    return said == (Status.CANCELLED, "fixbug.UserServiceRpc.Login: the caller cancelled the call")


def cancel_when_taken(held: Held, controller: MprpcController) -> threading.Thread:
    def cancel() -> None:
        held.taken()
        controller.start_cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    return thread


def test_a_blocking_call_is_cancelled_while_it_reads(provider: RpcProvider, held: Held) -> None:
    with services.calling(provider, timeout=wire.PATIENCE) as stub:
        controller = MprpcController()
        for _ in range(3):
            thread = cancel_when_taken(held, controller)
            began = time.monotonic()
            assert stub.Login(HOLD, controller=controller) == LoginResponse()
            assert time.monotonic() - began < wire.PATIENCE / 2
            assert is_cancelled(controller)
            assert not controller.not_run
            held.cancelled()
            thread.join()
        assert stub.Login(REQUEST, controller=controller).success  # an earlier call's cancelling is over
        assert not controller.failed()


def test_the_caller_too_may_ask_and_be_told(provider: RpcProvider, held: Held) -> None:
    """By either spelling; what is to be told of one call is not told of the next."""
    with services.calling(provider, timeout=wire.PATIENCE) as stub:
        controller, told = MprpcController(), threading.Semaphore(0)
        controller.NotifyOnCancel(told.release)
        assert stub.Login(REQUEST, controller=controller).success
        controller.notify_on_cancel(told.release)
        thread = cancel_when_taken(held, controller)
        stub.Login(HOLD, controller=controller)
        thread.join()
        assert controller.is_canceled()
        assert controller.IsCanceled()
        assert told.acquire(timeout=wire.PATIENCE)
        assert not told.acquire(blocking=False)
        assert stub.Login(REQUEST, controller=controller).success
        assert not controller.is_canceled()
        held.cancelled()


def test_blocking_calls_are_cancelled_while_others_read(provider: RpcProvider, held: Held) -> None:
    """Those that sleep are woken; the one that reads goes on, and what follows it reads on."""
    with services.calling(provider, timeout=wire.PATIENCE) as stub:
        stub.Login(REQUEST)
        controllers = [MprpcController() for _ in range(8)]
        threads = [
            threading.Thread(target=stub.Login, args=(HOLD,), kwargs={"controller": each}) for each in controllers
        ]
        for thread in threads:
            thread.start()
        held.taken(8)
        for controller, thread in list(zip(controllers, threads, strict=True))[::-1]:
            controller.StartCancel()
            thread.join(wire.PATIENCE)
            assert is_cancelled(controller)
        held.cancelled(8)
        assert stub.Login(REQUEST).success


@pytest.mark.parametrize("connected", [True, False])
def test_a_cancelling_that_comes_first_fails_the_call_at_once(
    provider: RpcProvider, held: Held, connected: bool
) -> None:
    with services.calling(provider, timeout=wire.PATIENCE) as stub:
        if connected:
            stub.Login(REQUEST)
        controller = MprpcController()
        controller.start_cancel()
        assert stub.Login(HOLD, controller=controller) == LoginResponse()
        assert is_cancelled(controller)
        assert controller.not_run
        controller.reset()
        controller.start_cancel()
        assert stub.Login.future(HOLD, controller=controller).result(wire.PATIENCE) == LoginResponse()
        assert is_cancelled(controller)
        assert not held.calls
        assert stub.Login(REQUEST, controller=controller).success


def test_a_cancelling_that_comes_last_changes_nothing(provider: RpcProvider) -> None:
    with services.calling(provider, timeout=wire.PATIENCE) as stub:
        controller = MprpcController()
        for _ in range(2):
            assert stub.Login(REQUEST, controller=controller).success
            controller.start_cancel()
            assert not controller.failed()
            assert stub.Login.future(REQUEST, controller=controller).result(wire.PATIENCE).success
            controller.start_cancel()
            assert not controller.failed()


def test_a_future_is_cancelled_through_its_controller(provider: RpcProvider, held: Held) -> None:
    with services.calling(provider, timeout=wire.PATIENCE) as stub:
        controller = MprpcController()
        called = threading.Event()
        future = stub.Login.future(HOLD, controller=controller)
        future.add_done_callback(lambda _: called.set())
        held.taken()
        controller.start_cancel()
        assert called.is_set()
        assert future.result(0) == LoginResponse()
        assert is_cancelled(controller)
        held.cancelled()


def test_a_coroutines_call_is_cancelled_but_not_its_task(provider: RpcProvider, held: Held) -> None:
    async def main() -> None:
        async with AsyncMprpcChannel(provider.address, timeout=wire.PATIENCE) as channel:
            stub = user_mprpc.UserServiceRpc_AsyncStub(channel)
            controller = MprpcController()
            thread = cancel_when_taken(held, controller)
            assert await stub.Login(HOLD, controller=controller) == LoginResponse()
            assert is_cancelled(controller)
            held.cancelled()
            thread.join()
            controller.reset()
            controller.start_cancel()
            assert await stub.Login(HOLD, controller=controller) == LoginResponse()
            assert is_cancelled(controller)
            task = asyncio.ensure_future(stub.Login(HOLD, controller=controller))
            await asyncio.get_running_loop().run_in_executor(None, held.taken)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.get_running_loop().run_in_executor(None, held.cancelled)
            assert (await stub.Login(REQUEST, controller=controller)).success

    asyncio.run(main())


def test_the_answer_and_a_cancelling_at_the_same_time_end_the_call_once(provider: RpcProvider) -> None:
    """Whichever is first; the controller and what is returned agree, and the next call is not hit."""
    with MprpcChannel(provider.address, timeout=wire.PATIENCE) as channel:
        stub = user_mprpc.UserServiceRpc_Stub(channel)
        controllers = [MprpcController() for _ in range(400)]
        go = threading.Semaphore(0)

        def cancel() -> None:
            for controller in controllers:
                go.acquire()
                controller.start_cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        for i, controller in enumerate(controllers):
            go.release()
            if i % 2:
                response = stub.Login(REQUEST, controller=controller)
            else:
                response = stub.Login.future(REQUEST, controller=controller).result(wire.PATIENCE)
            assert response.success != controller.failed()
            assert is_cancelled(controller) or not controller.failed()
        thread.join()
        assert channel._fixed().load.in_flight == 0
        assert stub.Login(REQUEST).success


def test_the_end_of_a_connection_costs_what_it_has_in_flight() -> None:
    """It was a look at every call of every other one as well: with thousands in flight, callers that left together kept
    the provider busy for seconds."""

    def seconds(others: int) -> float:
        with holding() as (held, provider), contextlib.ExitStack() as stack:
            crowd = stack.enter_context(wire.connect(provider.address))
            crowd.send(b"".join(wire.login(number, b"hold") for number in range(1, others + 1)))
            held.taken(others)
            leaving = [stack.enter_context(wire.connect(provider.address)) for _ in range(LEAVING)]
            for peer in leaving:
                peer.send(wire.login(1, b"hold"))
            held.taken(LEAVING)
            began = time.process_time()
            for peer in leaving:
                peer.close()
            held.cancelled(LEAVING)
            return time.process_time() - began

    assert seconds(OTHERS) < FEW * seconds(0)


def test_a_handler_knows_which_attempt_it_serves(held: Held) -> None:
    seen: list[int] = []

    def login(request: object, controller: MprpcController) -> object:
        seen.append(controller.attempt)
        return services.accept(request, controller)

    with services.serving(login) as provider, MprpcChannel(provider.address) as channel:
        endpoint = channel._fixed()
        link = endpoint.connect(time.monotonic_ns() + int(wire.PATIENCE * 1e9))
        call = user_mprpc.UserServiceRpc_Stub(channel).Login
        for attempt in (0, 1, 7):
            assert call._send(endpoint, link, REQUEST.SerializeToString(), 10**10, attempt, 0).success
    assert seen == [0, 1, 7]
