"""The plain call in C: what it takes, what it hands to Python, and that nothing is left behind on any way out of it."""

# ruff: noqa: F811, as a test's argument has the name of the imported fixture

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import mprpc
import services
import wire
from held import Held, held, provider  # noqa: F401
from mprpc import DeadlineExceeded, Internal, MprpcChannel, NotFound, RpcProvider, UnaryCall
from mprpc._native import lib
from mprpc.fast import native
from services import REQUEST, LoginRequest, LoginResponse, user_mprpc, user_pb2

HOLD, FAIL = LoginRequest(name=b"hold"), LoginRequest(name=b"fail")
LARGE = LoginRequest(name=b"x" * 100_000)


@pytest.fixture
def users(provider: RpcProvider) -> Iterator[Any]:
    with services.calling(provider, timeout=wire.PATIENCE) as users:
        users.Login(REQUEST)
        yield users


PLAIN = """
import sys
import services
async def login(request, controller):
    return services.accept(request, controller)
if sys.argv[2:]:
    with services.serving(login) as provider, services.calling(provider) as users:
        users.Login(services.REQUEST)
with services.calling(sys.argv[1]) as users:
    users.Login(services.REQUEST)
    entered = []
    sys.setprofile(lambda frame, event, _: entered.append(frame.f_code.co_name) if event == "call" else None)
    users.Login(services.REQUEST)
    users.Login(services.REQUEST, 5.0)
    users.Login(services.REQUEST, timeout=5)
    sys.setprofile(None)
    print(entered)
"""


@pytest.mark.parametrize("arguments", [[], ["async"]], ids=["", "where async handlers have run"])
def test_a_plain_call_runs_no_line_of_python(provider: RpcProvider, arguments: list[str]) -> None:
    """Else it is not plain any more."""
    process = services.start_python(PLAIN, provider.address, *arguments)
    assert process.communicate(timeout=wire.PATIENCE) == ("[]\n", "")


def test_it_is_a_unary_call_of_a_stub(users: Any) -> None:
    assert isinstance(users.Login, UnaryCall)
    assert callable(users.Login.future)
    assert "One method, callable" in (UnaryCall.__doc__ or "")


@pytest.mark.parametrize("timeout", [None, 5, 5.0, float("inf"), pytest.param(10**400, id="huge"), True])
def test_every_way_to_give_a_timeout(users: Any, timeout: Any) -> None:
    for answer in (users.Login(REQUEST, timeout), users.Login(REQUEST, timeout=timeout)):
        assert answer.success


@pytest.mark.parametrize("timeout", [0, 0.0, -1, -1.0, 0.02])
def test_a_timeout_passes(users: Any, timeout: float) -> None:
    for call in (lambda: users.Login(HOLD, timeout), lambda: users.Login(HOLD, timeout=timeout)):
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            call()
        assert time.monotonic() - began < wire.PATIENCE / 2


@pytest.mark.parametrize(
    "arguments",
    [
        ((), {}),
        ((REQUEST, 1.0, None, 4), {}),
        ((REQUEST,), {"patience": 1.0}),
        ((REQUEST, 1.0), {"timeout": 1.0}),
        ((REQUEST, "1.0"), {}),
        ((None,), {}),
        ((LoginResponse(),), {}),
        ((b"request",), {"timeout": 1.0}),
    ],
    ids=str,
)
def test_wrong_arguments_are_a_type_error(users: Any, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    with pytest.raises(TypeError):
        users.Login(*arguments[0], **arguments[1])
    assert users.Login(REQUEST).success


def test_not_a_number_is_no_timeout(users: Any) -> None:
    with pytest.raises(ValueError, match="NaN"):
        users.Login(REQUEST, timeout=float("nan"))


def test_request_by_name_and_controller_are_pythons(users: Any) -> None:
    assert users.Login(request=REQUEST).success
    controller = mprpc.MprpcController()
    assert users.Login(REQUEST, None, controller).success
    assert controller.peer


def test_large_responses_and_errors(users: Any) -> None:
    assert users.Login(LARGE).result.errmsg == LARGE.name
    with pytest.raises(NotFound, match="fail"):
        users.Login(FAIL)


def test_a_response_that_does_not_parse() -> None:
    def answer(peer: wire.Peer) -> None:
        for payload in (b"\xff", b"\xff" * 20_000, LoginResponse(success=True).SerializeToString()):
            header, _ = peer.frame()
            peer.send(wire.response(header.call_id, payload))
        peer.rest()

    with wire.FakeProvider(answer) as provider, services.calling(provider.address, timeout=wire.PATIENCE) as users:
        for _ in range(2):
            with pytest.raises(Internal, match=r"the response is no fixbug.LoginResponse"):
                users.Login(REQUEST)
        assert users.Login(REQUEST) == LoginResponse(success=True)


def test_a_connection_dropped_under_its_call_is_freed_after_it(users: Any, held: Held) -> None:
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(users.Login(HOLD)))
    thread.start()
    held.taken()
    endpoint = users.Login._target.next()
    endpoint.drop(endpoint.link)
    assert endpoint.link is None
    gc.collect()
    assert users.Login(REQUEST).success  # on another one
    held.calls[0][2].set_result(LoginResponse(success=True))
    thread.join(wire.PATIENCE)
    assert answers == [LoginResponse(success=True)]


def test_calls_and_links_are_made_only_whole() -> None:
    for arguments in ((), (1,), ("handle", 0), ("handle", "address")):
        with pytest.raises(TypeError):
            native.Link(*arguments)
    with pytest.raises(TypeError):
        native.Call()
    half = native.Call.__new__(native.Call)
    with pytest.raises(AttributeError):
        half(REQUEST)
    with pytest.raises(TypeError):
        half._send(None, native.Link.__new__(native.Link), b"", 1, 0, 0)


def test_a_forgotten_call_is_collected(provider: RpcProvider) -> None:
    channel = MprpcChannel(provider.address)
    call = user_mprpc.UserServiceRpc_Stub(channel).Login
    call.itself = call
    gone = weakref.ref(call)
    channel.close()
    del call, channel
    gc.collect()
    assert gone() is None


def ended(call: Callable[..., Any], *arguments: Any) -> None:
    with contextlib.suppress(mprpc.RpcError, TypeError):
        call(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [(REQUEST,), (REQUEST, 5.0), (LARGE,), (FAIL,), (REQUEST, 0.0), (LoginResponse(),), (REQUEST, "soon")],
    ids=["plain", "timeout", "large", "failed", "late", "wrong request", "wrong timeout"],
)
def test_no_way_out_of_a_call_leaves_a_reference(users: Any, arguments: tuple[Any, ...]) -> None:
    call = users.Login
    endpoint = call._target.next()
    watched = [call, endpoint, endpoint.link, user_pb2.LoginRequest, user_pb2.LoginResponse, arguments[0], None]

    def counts() -> list[int]:
        for _ in range(300):
            ended(call, *arguments)
        gc.collect()
        return [sys.getrefcount(each) for each in watched] + [sys.getallocatedblocks() // 200]

    counts()
    before, after = counts(), counts()
    assert all(abs(a - b) < 100 for a, b in zip(before, after, strict=True)), (before, after)


def test_a_broken_connection_leaves_none() -> None:
    """Each call finds its connection closed and makes another."""
    with services.serving() as provider, services.calling(provider, timeout=wire.PATIENCE) as users:

        def objects() -> int:
            for _ in range(50):
                users.Login(REQUEST)
                lib.mprpc_link_close(users.Login._target.next().link.handle)
            gc.collect()
            return len(gc.get_objects())

        objects()
        before = objects()
        assert objects() - before < 30


def test_looking_for_the_answer_before_sleeping_becomes_rarer_in_vain() -> None:
    """100 answers that take longer than the look cost not 100 looks; quick ones are found all the same."""

    def slow(request: Any, controller: Any) -> Any:
        threading.Event().wait(0.003)
        return services.accept(request, controller)

    with services.serving(slow) as provider:
        config = mprpc.MprpcConfig(rpcserverport=int(provider.address.rpartition(":")[2]), busy_poll_us=1000)
        with MprpcChannel(config, timeout=wire.PATIENCE) as channel:
            users = user_mprpc.UserServiceRpc_Stub(channel)
            users.Login(REQUEST)
            before = time.thread_time()
            for _ in range(100):
                assert users.Login(REQUEST).success
            assert time.thread_time() - before < 0.05


LARGE_ONES = """
import tracemalloc
import services, wire
from mprpc import MprpcChannel, UnaryCall

size = 20_000_000
answer = wire.response(1, services.LoginRequest(name=bytes(size)).SerializeToString())

class Response:
    DESCRIPTOR = services.LoginResponse.DESCRIPTOR

    @staticmethod
    def FromString(data):
        print((tracemalloc.get_traced_memory()[0] - before) / size)

def serve(peer):
    peer.frame()
    peer.send(answer)
    peer.rest()

method = services.user_pb2.DESCRIPTOR.services_by_name["UserServiceRpc"].methods_by_name["Login"]
with wire.FakeProvider(serve) as provider, MprpcChannel(provider.address, timeout=wire.PATIENCE) as channel:
    channel.wait_ready(wire.PATIENCE)
    call = UnaryCall(channel, method, Response)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    call(services.LoginRequest(name=bytes(size)))
    tracemalloc.stop()
"""


def test_a_large_request_is_given_up_before_its_response_is_parsed() -> None:
    """Beside the caller's own message there are at most two of a large payload at a time, in a plain call."""
    process = services.start_python(LARGE_ONES)
    copies, errors = process.communicate(timeout=wire.PATIENCE * 3)
    assert errors == ""
    assert 1 <= float(copies) < 1.5


# ---- what a failed call leaves to the collector ----

GARBAGE = """
import asyncio, gc, sys
import services
from mprpc import AsyncMprpcChannel, RpcError

HOLD, FAIL = services.LoginRequest(name=b"hold"), services.LoginRequest(name=b"fail")

def left(call):
    call()
    gc.collect()
    for _ in range(20):
        call()
    return gc.collect()

def failing(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except RpcError:
        return
    raise AssertionError("it has not failed")

async def tasks(address):
    async with AsyncMprpcChannel(address) as channel:
        users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
        await users.Login(services.REQUEST)
        gc.collect()
        for request in [HOLD, FAIL] * 10:
            try:
                await users.Login(request, timeout=0.002 if request is HOLD else 5.0)
            except RpcError:
                continue
            raise AssertionError("it has not failed")
        return gc.collect()

gc.disable()
with services.calling(sys.argv[1]) as users:
    users.Login(services.REQUEST)
    again = users.Login.with_options(idempotent=True)
    print(left(lambda: failing(users.Login, HOLD, timeout=0.002)), left(lambda: failing(users.Login, FAIL)))
    print(left(lambda: failing(again, HOLD, timeout=0.002)), left(lambda: failing(again, FAIL)))
    print(*(left(lambda: failing(lambda: users.Login.future(each, timeout=0.01).result())) for each in (HOLD, FAIL)))
with services.calling("127.0.0.1:1") as nobody:
    print(left(lambda: failing(nobody.Login, services.REQUEST, timeout=0.01)))
print(asyncio.run(tasks(sys.argv[1])))
"""


def test_a_failed_call_leaves_nothing_to_the_collector(provider: RpcProvider) -> None:
    """Each left its error, whose traceback held frames that held it: with many failed calls the collector, who has the
    interpreter's lock, made others late by a tenth of a second."""
    process = services.start_python(GARBAGE, provider.address)
    assert process.communicate(timeout=wire.PATIENCE) == ("0 0\n0 0\n0 0\n0\n0\n", "")
