"""The C++ framework's own bytes, from the wire: what its consumers send, and what its provider answers."""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

import generated
import services
import wire
from mprpc import MprpcChannel, MprpcConfig, MprpcController, ResourceExhausted, RpcProvider, Status, Unavailable
from services import LoginResponse

user_pb2 = generated.module("user_pb2")

ANSWER = LoginResponse(result=user_pb2.ResultCode(errmsg=b"zhang san"), success=True).SerializeToString()
FRAME_TIMEOUT = 0.05


@pytest.fixture
def provider(poller: str) -> Iterator[RpcProvider]:
    with services.serving(frame_timeout=FRAME_TIMEOUT) as started:
        yield started


def answer_to(provider: RpcProvider, data: bytes) -> bytes:
    with wire.connect(provider.address) as peer:
        peer.send(data)
        return peer.rest()


def test_login_is_answered_with_the_bare_response_and_the_end(provider: RpcProvider) -> None:
    assert wire.classic_login() == wire.SEED_LOGIN
    assert answer_to(provider, wire.SEED_LOGIN) == ANSWER


@pytest.mark.parametrize("cut", range(1, len(wire.SEED_LOGIN)))
def test_login_cut_anywhere_is_answered_alike(cut: int, long_patience: RpcProvider) -> None:
    with wire.connect(long_patience.address) as peer:
        peer.send(wire.SEED_LOGIN[:cut])
        settle(long_patience)
        peer.send(wire.SEED_LOGIN[cut:])
        assert peer.rest() == ANSWER


def test_login_byte_by_byte(long_patience: RpcProvider) -> None:
    with wire.connect(long_patience.address) as peer:
        for byte in wire.SEED_LOGIN:
            peer.send(bytes([byte]))
            settle(long_patience)
        assert peer.rest() == ANSWER


@pytest.fixture(scope="module")
def long_patience() -> Iterator[RpcProvider]:
    with services.serving() as started:
        yield started


def settle(provider: RpcProvider) -> None:
    """Returns when the provider's loop has taken what was sent before: it answers this connection's later request."""
    assert answer_to(provider, wire.SEED_LOGIN) == ANSWER


def test_args_size_is_absent_without_arguments(provider: RpcProvider) -> None:
    data = wire.request(0, "UserServiceRpc", "Login")
    assert data == struct.pack("<I", 23) + b"\x0a\x0eUserServiceRpc\x12\x05Login"
    assert answer_to(provider, data) == LoginResponse(result=user_pb2.ResultCode(), success=True).SerializeToString()


def test_bytes_after_the_first_request_are_not_run(poller: str) -> None:
    names = []

    def login(request: Any, controller: Any) -> Any:
        names.append(request.name)
        return LoginResponse(success=True)

    with services.serving(login) as provider:
        both = wire.classic_login(b"first") + wire.classic_login(b"second")
        assert answer_to(provider, both) == LoginResponse(success=True).SerializeToString()
        assert answer_to(provider, wire.classic_login(b"third"))
    assert names == [b"first", b"third"]


def test_end_of_the_consumers_side_does_not_lose_the_answer(provider: RpcProvider) -> None:
    with wire.connect(provider.address) as peer:
        peer.send(wire.SEED_LOGIN)
        peer.finish()
        assert peer.rest() == ANSWER


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b"\xff\xff\xff\xff" + wire.SEED_LOGIN[4:], "header_size over 65535"),
        (b"\xff\xff\xff\x7f" + wire.SEED_LOGIN[4:], "header_size over 65535"),
        (wire.SEED_LOGIN[3::-1] + wire.SEED_LOGIN[4:], "header_size over 65535"),
        (bytes(4) + wire.SEED_LOGIN[4:], "a classic request that can't be answered"),
        (wire.SEED_LOGIN[:3], "nothing within frame_timeout"),
        (wire.request(0, "UserServiceRpc", "Login", b"\x0a\x01z", args_size=4000), "nothing within frame_timeout"),
    ],
    ids=["4294967295", "2147483647", "big-endian", "zero", "three bytes", "args_size too large"],
)
def test_bad_frame_ends_its_own_connection_only(
    bad: bytes, why: str, provider: RpcProvider, caplog: pytest.LogCaptureFixture
) -> None:
    with wire.connect(provider.address) as framed, wire.connect(provider.address) as idle:
        framed.send(wire.login(1))
        assert framed.frame()[0].status == Status.OK
        with wire.connect(provider.address) as peer:
            name = "{}:{}".format(*peer.socket.getsockname())
            peer.send(bad)
            assert peer.was_reset()
        framed.send(wire.login(2))
        assert framed.frame()[1] == ANSWER
        idle.send(wire.SEED_LOGIN)
        assert idle.rest() == ANSWER
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert lines[0].startswith(name)
    assert why in lines[0]


def test_request_of_200_kilobytes(provider: RpcProvider) -> None:
    name = bytes(range(256)) * 800
    answer = LoginResponse.FromString(answer_to(provider, wire.classic_login(name)))
    assert answer.result.errmsg == name


def test_long_answer_is_warned_about(provider: RpcProvider, caplog: pytest.LogCaptureFixture) -> None:
    assert answer_to(provider, wire.classic_login(b"x" * 900))
    settle(provider)
    assert not caplog.records
    assert answer_to(provider, wire.classic_login(b"x" * 1100))
    settle(provider)
    assert ["1024" in record.getMessage() for record in caplog.records] == [True]


def test_stop_in_the_turn_that_has_something_to_log(poller: str, caplog: pytest.LogCaptureFixture) -> None:
    """A loop whose last connection ended while a line waited for the log turned once more and never came back."""
    stopping = threading.Thread(target=lambda: serving.stop())

    def login(request: Any, controller: Any) -> Any:
        stopping.start()
        stopping.join(0.05)  # until the loop has been told, in the turn that answers this
        return services.accept(request, controller)

    with services.serving(login) as serving:
        with wire.connect(serving.address) as peer:
            peer.send(wire.classic_login(b"x" * 1100))
            peer.finish()
            assert len(peer.rest()) > 1024
        stopping.join(wire.PATIENCE)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


BAD_REQUESTS = [
    ("NoService", "Login", b"", Status.UNIMPLEMENTED),
    ("UserServiceRpc", "NoMethod", b"", Status.UNIMPLEMENTED),
    ("UserServiceRpc", "", b"", Status.UNIMPLEMENTED),
    ("", "", b"", Status.UNIMPLEMENTED),
    ("UserServiceRpc", "Login", b"\xff\xff\xff", Status.INVALID_ARGUMENT),
]
NAMES = ["service", "method", "no method", "no names", "arguments"]


@pytest.mark.parametrize(("service", "method", "arguments", "status"), BAD_REQUESTS, ids=NAMES)
def test_classic_error_is_a_reset_at_once(
    service: str, method: str, arguments: bytes, status: Status, provider: RpcProvider
) -> None:
    with wire.connect(provider.address) as peer:
        peer.send(wire.request(0, service, method, arguments))
        assert peer.was_reset()


@pytest.mark.parametrize(("service", "method", "arguments", "status"), BAD_REQUESTS, ids=NAMES)
def test_framed_error_leaves_the_connection(
    service: str, method: str, arguments: bytes, status: Status, provider: RpcProvider
) -> None:
    with wire.connect(provider.address) as peer:
        peer.send(wire.request(1, service, method, arguments) + wire.login(2))
        header, payload = peer.frame()
        assert (header.call_id, header.status, payload) == (1, status, b"")
        assert header.not_run or status == Status.INVALID_ARGUMENT
        assert header.error_text
        assert "\n" not in header.error_text
        assert peer.frame()[1] == ANSWER


def test_handler_that_fails_resets_the_classic_connection() -> None:
    def login(request: Any, controller: Any) -> Any:
        controller.SetFailed("no")
        return LoginResponse()

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.SEED_LOGIN)
        assert peer.was_reset()


def test_classic_off_refuses_the_dialect(poller: str) -> None:
    with services.serving(classic=False) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.SEED_LOGIN)
        assert peer.was_reset()
        with services.calling(provider) as users:
            assert users.Login(services.REQUEST).success


def test_classic_and_framed_on_one_connection(provider: RpcProvider) -> None:
    with wire.connect(provider.address) as peer:
        peer.send(wire.login(1))
        assert peer.frame()[0].call_id == 1
        peer.send(wire.SEED_LOGIN)
        assert peer.rest() == b""


def test_seed_consumers_empty_response_is_no_reset(poller: str) -> None:
    with services.serving(lambda request, controller: LoginResponse()) as provider:
        assert answer_to(provider, wire.SEED_LOGIN) == b""


def test_classic_calls_at_shutdown_are_reset(poller: str) -> None:
    """The C++ consumer parses zero bytes as an empty success, so only a reset tells it that nothing was done."""
    started = threading.Event()

    def login(request: Any, controller: Any) -> Any:
        started.set()
        return Future()  # that nobody resolves

    with services.serving(login) as provider:
        with wire.connect(provider.address) as busy, wire.connect(provider.address) as idle:
            busy.send(wire.SEED_LOGIN)
            assert started.wait(wire.PATIENCE)
            provider.stop(0.0)
            assert idle.was_reset()
            assert busy.was_reset()


# ---- our channel and a provider of the C++ framework ----


def seed_provider(*answers: bytes, received: list[bytes], **options: Any) -> wire.FakeProvider:
    """As the C++ provider: one read, one send, and the end of the connection."""

    def script(answer: bytes) -> Any:
        def serve(peer: wire.Peer) -> None:
            received.append(peer.socket.recv(65536))
            peer.send(answer)

        return serve

    return wire.FakeProvider(*map(script, answers), **options)


def test_classic_channel_sends_the_seeds_bytes() -> None:
    received: list[bytes] = []
    with seed_provider(ANSWER, ANSWER, received=received) as seed:
        with services.calling(seed.address, dialect="classic") as users:
            assert users.Login(services.REQUEST).SerializeToString() == ANSWER
            controller = MprpcController()
            assert users.Login(services.REQUEST, controller=controller).success
            assert not controller.failed()
            assert controller.peer == seed.address
    assert received == [wire.SEED_LOGIN] * 2


def test_classic_channel_calls_our_provider(provider: RpcProvider) -> None:
    with services.calling(provider, dialect="classic") as users:
        assert users.Login(services.REQUEST).SerializeToString() == ANSWER
        with pytest.raises(Unavailable):  # its error is a reset
            users.Register(user_pb2.RegisterRequest())
        assert users.Login(services.REQUEST).success


def test_empty_classic_answer_is_unavailable_unless_expected() -> None:
    received: list[bytes] = []
    with seed_provider(b"", b"", received=received) as seed:
        with services.calling(seed.address, dialect="classic") as users:
            with pytest.raises(Unavailable, match="classic_empty") as raised:
                users.Login(services.REQUEST)
            assert not raised.value.not_run
        host, _, port = seed.address.partition(":")
        config = MprpcConfig(rpcserverip=host, rpcserverport=int(port), dialect="classic", classic_empty=True)
        with MprpcChannel(config) as channel:
            assert services.user_mprpc.UserServiceRpc_Stub(channel).Login(services.REQUEST) == LoginResponse()


def test_a_forked_child_that_closes_the_channel_leaves_its_parent_s_classic_call() -> None:
    def late(peer: wire.Peer) -> None:
        assert peer.socket.recv(65536)
        taken.set()
        assert go_on.wait(wire.PATIENCE)
        peer.send(ANSWER)

    taken, go_on = threading.Event(), threading.Event()
    with wire.FakeProvider(late) as seed:
        host, _, port = seed.address.partition(":")
        config = MprpcConfig(rpcserverip=host, rpcserverport=int(port), dialect="classic")
        with MprpcChannel(config, timeout=wire.PATIENCE) as channel:
            call = services.user_mprpc.UserServiceRpc_Stub(channel).Login.future(services.REQUEST)
            assert taken.wait(wire.PATIENCE)
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    channel.close()
                    os._exit(0)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            go_on.set()
            assert call.result(wire.PATIENCE).success


@pytest.mark.parametrize("classic_empty", [False, True])
def test_closing_the_channel_ends_a_classic_call(classic_empty: bool) -> None:
    """It went on to its deadline; and the end of the stream that close() makes is no empty answer."""

    def silent(peer: wire.Peer) -> None:
        assert peer.socket.recv(65536)
        taken.set()
        peer.rest()

    taken = threading.Event()
    with wire.FakeProvider(silent) as seed:
        host, _, port = seed.address.partition(":")
        config = MprpcConfig(rpcserverip=host, rpcserverport=int(port), dialect="classic", classic_empty=classic_empty)
        with MprpcChannel(config, timeout=600.0) as channel:
            closer = threading.Thread(target=lambda: taken.wait(wire.PATIENCE) and channel.close())
            closer.start()
            with pytest.raises(Unavailable, match="closed"):
                services.user_mprpc.UserServiceRpc_Stub(channel).Login(services.REQUEST)
            closer.join()


def test_classic_answer_in_many_pieces_and_of_any_size() -> None:
    answer = LoginResponse(result=user_pb2.ResultCode(errmsg=b"x" * 300_000), success=True)

    def serve(peer: wire.Peer) -> None:
        peer.socket.recv(65536)
        data = answer.SerializeToString()
        for at in range(0, len(data), 40_000):
            peer.send(data[at : at + 40_000])

    with wire.FakeProvider(serve) as seed, services.calling(seed.address, dialect="classic") as users:
        assert users.Login(services.REQUEST) == answer


def test_classic_answer_over_the_limit() -> None:
    received: list[bytes] = []
    with seed_provider(b"x" * 5000, received=received) as seed:
        host, _, port = seed.address.partition(":")
        config = MprpcConfig(rpcserverip=host, rpcserverport=int(port), dialect="classic", max_payload=1000)
        with MprpcChannel(config) as channel, pytest.raises(ResourceExhausted, match="max_payload"):
            services.user_mprpc.UserServiceRpc_Stub(channel).Login(services.REQUEST)


def test_classic_answer_that_never_comes_ends_at_the_deadline() -> None:
    done = threading.Event()
    with wire.FakeProvider(lambda peer: done.wait(wire.PATIENCE)) as seed:
        with services.calling(seed.address, dialect="classic") as users:
            controller = MprpcController()
            assert users.Login(services.REQUEST, timeout=0.05, controller=controller) == LoginResponse()
            assert controller.status is Status.DEADLINE_EXCEEDED
            done.set()
