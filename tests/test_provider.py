"""The provider over real sockets: how handlers end, where it listens, what strangers send, how it stops."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message_factory import GetMessageClass

import generated
import mprpc
import services
import wire
from mprpc import ConfigError, MprpcConfig, NotFound, RpcError, RpcProvider, Status
from mprpc._native import ffi, lib
from services import REQUEST, LoginRequest, LoginResponse, Users

user_pb2 = generated.module("user_pb2")
friend_mprpc = generated.module("friend_mprpc")
legacy_pb2 = generated.module("legacy_pb2")

OK = LoginResponse(success=True)
ANSWER = services.accept(REQUEST, None).SerializeToString()


@pytest.fixture(autouse=True)
def _both_pollers(poller: str) -> None:
    """All of this file runs with epoll and with poll(2)."""


def call(login: services.Login, **keys: Any) -> Any:
    """What a call of that Login ends with: its response or its error."""
    with services.serving(login, **keys) as provider, services.calling(provider) as users:
        try:
            return users.Login(REQUEST)
        except RpcError as error:
            return error


def raises(error: BaseException) -> services.Login:
    def login(request: Any, controller: Any) -> Any:
        raise error

    return login


def returns(value: object) -> services.Login:
    return lambda request, controller: value


def fails(text: str, *status: Status) -> services.Login:
    def login(request: Any, controller: Any) -> Any:
        controller.set_failed(text, *status)
        return OK

    return login


def resolved(value: object) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def rejected(error: BaseException) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def cancelled() -> Future[Any]:
    future: Future[Any] = Future()
    future.cancel()
    return future


def wait_until(true: Callable[[], object], what: str) -> None:
    """For what nobody tells of: looks again and again, bounded."""
    deadline = time.monotonic() + wire.PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"never came true: {what}"
        threading.Event().wait(0.002)


def statistics(provider: RpcProvider) -> list[Any]:
    """Each loop's counters."""
    found = []
    for loop in provider._loops:
        found.append(ffi.new("struct mprpc_loop_statistics *"))
        lib.mprpc_loop_statistics(loop.handle, found[-1])
    return found


def in_flight(provider: RpcProvider) -> int:
    return sum(each.in_flight for each in statistics(provider))


# ---- how a handler ends ----


def test_response_reaches_the_caller() -> None:
    assert call(services.accept) == services.accept(REQUEST, None)


def test_future_resolved_by_another_thread() -> None:
    threads = []

    def login(request: Any, controller: Any) -> Any:
        future: Future[Any] = Future()
        threads.append(threading.Thread(target=lambda: future.set_result(services.accept(request, controller))))
        threads[-1].start()
        return future

    assert call(login) == services.accept(REQUEST, None)
    threads[0].join()


@pytest.mark.parametrize(
    ("login", "status", "text"),
    [
        (raises(RpcError(Status.NOT_FOUND, "no such user")), Status.NOT_FOUND, "no such user"),
        (raises(NotFound("no such user")), Status.NOT_FOUND, "no such user"),
        (raises(RpcError(Status.UNAVAILABLE, "later", not_run=True)), Status.UNAVAILABLE, "later"),
        (raises(RpcError(Status.ABORTED)), Status.ABORTED, ""),
        (raises(RpcError(Status.ABORTED, "Grüße 你好 \ud800")), Status.ABORTED, "Grüße 你好 ?"),
        (fails("closed today"), Status.UNKNOWN, "closed today"),
        (fails("closed today", Status.FAILED_PRECONDITION), Status.FAILED_PRECONDITION, "closed today"),
        (returns(rejected(NotFound("gone"))), Status.NOT_FOUND, "gone"),
    ],
    ids=["RpcError", "NotFound", "not_run", "no text", "unicode", "set_failed", "with status", "Future"],
)
def test_error_of_the_handlers_choice(
    login: services.Login, status: Status, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = call(login)
    assert (error.status, error.text, error.not_run) == (status, text, False)
    assert type(error) is type(RpcError(status))
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_error_details_arrive() -> None:
    details = bytes(range(256))
    assert call(raises(RpcError(Status.ABORTED, "", details=details))).details == details
    assert call(raises(RpcError(Status.ABORTED, "x", details=b"y" * 40_000))).details == b""  # half a message is none


def test_long_error_text_is_cut_between_characters() -> None:
    error = call(raises(RpcError(Status.ABORTED, "x" + "é" * 5000)))
    assert error.text == "x" + "é" * 2047


@pytest.mark.parametrize(
    "login",
    [
        raises(ValueError("the password is 123456")),
        raises(SystemExit(1)),
        raises(KeyboardInterrupt()),
        raises(GeneratorExit()),
        raises(RpcError(Status.OK, "fine")),
        returns(None),
        returns(b"bytes"),
        returns(user_pb2.RegisterResponse(success=True)),
        returns(LoginResponse),
        returns(resolved(None)),
        returns(resolved(user_pb2.RegisterResponse())),
        returns(rejected(ValueError("the password is 123456"))),
        returns(rejected(SystemExit(1))),
        returns(cancelled()),
        lambda request, controller: services.accept(request, request.no_such_field),
        lambda request, controller: LoginResponse.FromString(b"\xff"),
        lambda request, controller: controller.set_failed("", Status.OK),
    ],
    ids=lambda login: None,
)
def test_anything_else_is_internal(login: services.Login, caplog: pytest.LogCaptureFixture) -> None:
    with services.serving(login) as provider, services.calling(provider) as users:
        for _ in range(2):  # the provider lives
            with pytest.raises(mprpc.Internal) as raised:
                users.Login(REQUEST)
            assert "123456" not in raised.value.text
            assert "\n" not in raised.value.text
            assert not raised.value.not_run
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "fixbug.UserServiceRpc.Login" in errors[0].getMessage()


def test_traceback_is_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    error = call(raises(ValueError("told to nobody")))
    assert str(error) == "INTERNAL: the handler raised ValueError"
    assert "told to nobody" in caplog.text
    assert "Traceback" in caplog.text


def test_coroutine_is_awaited() -> None:
    async def login(request: Any, controller: Any) -> Any:
        await asyncio.sleep(0)
        return OK

    assert call(login) == OK


def test_response_over_the_limit_fails_its_call_alone() -> None:
    with services.serving(max_payload=100_000) as provider, services.calling(provider) as users:
        for size in (100_000 - 200, 150_000, 99_000):
            if size < 100_000:
                assert len(users.Login(LoginRequest(name=b"x" * size)).result.errmsg) == size
                continue
            with services.calling(provider) as others, pytest.raises(mprpc.ResourceExhausted, match="max_payload"):
                others.Login(LoginRequest(name=b"x" * size))


def test_response_grown_over_the_limit(poller: str) -> None:
    def login(request: Any, controller: Any) -> Any:
        return LoginResponse(result=user_pb2.ResultCode(errmsg=b"x" * int(request.name)), success=True)

    with services.serving(login, max_payload=100_000) as provider, services.calling(provider) as users:
        with pytest.raises(mprpc.ResourceExhausted, match=r"100010 bytes, max_payload allows 100000"):
            users.Login(LoginRequest(name=b"100000"))
        assert len(users.Login(LoginRequest(name=b"99000")).result.errmsg) == 99_000


def test_response_over_a_small_limit() -> None:
    """Small responses take another way than large ones; the limit holds on both."""
    error = call(returns(LoginResponse(result=user_pb2.ResultCode(errmsg=b"x" * 2000))), max_payload=1000)
    assert isinstance(error, mprpc.ResourceExhausted)
    error = call(returns(resolved(LoginResponse(result=user_pb2.ResultCode(errmsg=b"x" * 2000)))), max_payload=1000)
    assert isinstance(error, mprpc.ResourceExhausted)


def test_future_resolved_after_its_caller_went() -> None:
    """The answer reaches nobody, not even who gets the same descriptor next."""
    futures: list[Future[Any]] = []
    taken = threading.Semaphore(0)

    def login(request: Any, controller: Any) -> Any:
        if request.name == b"quick":
            return OK
        futures.append(Future())
        taken.release()
        return futures[-1]

    with services.serving(login) as provider:
        for go in (wire.Peer.close, wire.Peer.reset):
            peer = wire.connect(provider.address)
            peer.send(wire.login(1, b"slow"))
            assert taken.acquire(timeout=wire.PATIENCE)
            go(peer)
            wait_until(lambda: in_flight(provider) == 0, "the calls of who went are forgotten")
            with wire.connect(provider.address) as next_one:
                futures[-1].set_result(services.accept(REQUEST, None))
                next_one.send(wire.login(1, b"quick"))
                header, payload = next_one.frame()
                assert (header.call_id, payload) == (1, OK.SerializeToString())
                next_one.finish()
                assert next_one.rest() == b""


def test_answers_come_in_any_order() -> None:
    futures: dict[bytes, Future[Any]] = {}
    both = threading.Barrier(2)

    def login(request: Any, controller: Any) -> Any:
        futures[request.name] = Future()
        if len(futures) == 2:
            both.wait(wire.PATIENCE)
        return futures[request.name]

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"first") + wire.login(2, b"second"))
        both.wait(wire.PATIENCE)
        futures[b"second"].set_result(OK)
        assert peer.frame()[0].call_id == 2
        futures[b"first"].set_result(OK)
        assert peer.frame()[0].call_id == 1


def test_controller_knows_peer_and_time() -> None:
    seen: dict[bytes, Any] = {}

    def login(request: Any, controller: Any) -> Any:
        seen[request.name] = (controller.peer, controller.time_remaining(), controller.failed())
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"timed", timeout_ms=60_000) + wire.login(2, b"untimed"))
        assert [peer.frame()[0].call_id for _ in range(2)] == [1, 2]
        name = "{}:{}".format(*peer.socket.getsockname())
    assert seen[b"timed"][0] == seen[b"untimed"][0] == name
    assert 30 < seen[b"timed"][1] <= 60
    assert seen[b"untimed"][1] is None
    assert not seen[b"timed"][2]


def test_controller_of_a_future_knows_its_peer_later() -> None:
    seen = []

    def login(request: Any, controller: Any) -> Any:
        future: Future[Any] = Future()

        def answer() -> None:
            seen.append((controller.peer, controller.time_remaining()))
            controller.SetFailed("after all")
            future.set_result(OK)

        waiting.append(threading.Thread(target=answer))
        return future

    waiting: list[threading.Thread] = []
    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        name = "{}:{}".format(*peer.socket.getsockname())
        peer.send(wire.login(1, timeout_ms=60_000))
        wait_until(lambda: provider._loops[0]._detached, "the handler has run")
        waiting[0].start()
        header, _ = peer.frame()
        waiting[0].join()
    assert (header.status, header.error_text) == (Status.UNKNOWN, "after all")
    assert seen[0][0] == name
    assert 30 < seen[0][1] <= 60


def proto2_service() -> Any:
    """A service of a proto2 file whose messages have a required field."""
    file = descriptor_pb2.FileDescriptorProto(name="needs.proto", package="needs", syntax="proto2")
    for name in ("Question", "Answer"):
        field = file.message_type.add(name=name).field.add(name="text", number=1)
        field.type, field.label = field.TYPE_STRING, field.LABEL_REQUIRED
    method = file.service.add(name="Oracle").method.add(name="Ask")
    method.input_type, method.output_type = ".needs.Question", ".needs.Answer"
    pool = descriptor_pool.DescriptorPool()
    return pool.AddSerializedFile(file.SerializeToString()) or pool.FindFileByName("needs.proto")


class Oracle:
    """A proto2 service without generated code, that answers with `answer`."""

    def __init__(self) -> None:
        file = proto2_service()
        self.DESCRIPTOR = file.services_by_name["Oracle"]
        self.question = GetMessageClass(file.message_types_by_name["Question"])
        self.answer: Any = GetMessageClass(file.message_types_by_name["Answer"])()
        self.late = False

    def Ask(self, request: Any, controller: Any) -> Any:
        return resolved(self.answer) if self.late else self.answer


def test_response_without_a_required_field_is_internal(caplog: pytest.LogCaptureFixture) -> None:
    oracle = Oracle()
    provider = RpcProvider()
    provider.notify_service(oracle)
    with provider, mprpc.MprpcChannel(provider.address) as channel:
        stub = mprpc.stub(oracle.DESCRIPTOR, channel)
        for oracle.late in (False, True):
            with pytest.raises(mprpc.Internal):
                stub.Ask(oracle.question(text="?"))
            assert "text" in caplog.text  # the log says which field
            caplog.clear()
        oracle.answer.text = "42"
        assert stub.Ask(oracle.question(text="?")).text == "42"
        with pytest.raises(mprpc.InvalidArgument) as raised:
            stub.Ask(oracle.question())
        assert raised.value.not_run


def test_generic_service_of_protoc_is_served() -> None:
    class Generic(legacy_pb2.Oracle):  # type: ignore[name-defined, misc]
        def Ask(self, controller: Any, request: Any, done: Any) -> None:
            if request.text:
                done(legacy_pb2.Answer(text=request.text))
            else:
                controller.SetFailed("ask something")
                done()

    provider = RpcProvider()
    provider.notify_service(Generic())
    with provider, mprpc.MprpcChannel(provider.address) as channel:
        stub = mprpc.stub(legacy_pb2.DESCRIPTOR.services_by_name["Oracle"], channel)
        assert stub.Ask(legacy_pb2.Question(text="hm")).text == "hm"
        with pytest.raises(RpcError, match="ask something"):
            stub.Ask(legacy_pb2.Question())
        with pytest.raises(mprpc.Unimplemented):
            stub.Silence(legacy_pb2.Question())


# ---- deadlines ----


def test_expired_request_is_not_run() -> None:
    """Both requests come in one turn; the first one's handler takes longer than the second one waits."""
    ran = []

    def login(request: Any, controller: Any) -> Any:
        ran.append(request.name)
        until = time.monotonic() + 0.02
        wait_until(lambda: time.monotonic() > until, "time passes")
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"first") + wire.login(2, b"second", timeout_ms=1) + wire.login(3, b"third"))
        headers = [peer.frame()[0] for _ in range(3)]
    by_id = {header.call_id: header for header in headers}
    assert (by_id[2].status, by_id[2].not_run) == (Status.DEADLINE_EXCEEDED, True)
    assert (by_id[1].status, by_id[3].status) == (Status.OK, Status.OK)
    assert ran == [b"first", b"third"]


# ---- where it listens ----


def test_port_0_is_a_free_one_and_the_address_tells_it() -> None:
    provider = RpcProvider()
    assert provider.address == ""
    provider.notify_service(Users())
    with provider:
        host, _, port = provider.address.partition(":")
        assert host == "127.0.0.1"
        assert int(port) > 0
        with services.calling(provider) as users:
            assert users.Login(REQUEST).success


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]:"), ("localhost", ""), ("0.0.0.0", "0.0.0.0:")])
def test_listening_on(host: str, shown: str) -> None:
    with services.serving(rpcserverip=host) as provider:
        assert provider.address.startswith(shown)
        with services.calling(provider.address.replace("0.0.0.0", "127.0.0.1")) as users:
            assert users.Login(REQUEST).success


def test_peer_of_an_ipv6_caller_has_brackets() -> None:
    def login(request: Any, controller: Any) -> Any:
        raise NotFound(controller.peer)

    with services.serving(login, rpcserverip="::1") as provider, services.calling(provider) as users:
        with pytest.raises(NotFound, match=r"^NOT_FOUND: \[::1\]:\d+$"):
            users.Login(REQUEST)


def test_unknown_host_is_a_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"^rpcserverip=no\.such\.host\.invalid: ") as raised:
        with services.serving(rpcserverip="no.such.host.invalid"):
            pass
    assert "\n" not in str(raised.value)


def test_address_in_use_is_a_clear_error() -> None:
    with services.serving() as first:
        port = int(first.address.partition(":")[2])
        with pytest.raises(ConfigError, match=rf"can't listen on 127\.0\.0\.1:{port}: Address already in use"):
            with services.serving(rpcserverport=port):
                pass
        with services.calling(first) as users:
            assert users.Login(REQUEST).success


def test_port_is_free_again_at_once() -> None:
    with services.serving() as first, services.calling(first) as users:
        assert users.Login(REQUEST).success
        port = int(first.address.partition(":")[2])
    with services.serving(rpcserverport=port), services.calling(f"127.0.0.1:{port}") as users:
        assert users.Login(REQUEST).success


def test_unix_socket_is_served_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with services.serving(rpcserverip=f"unix:{path}") as provider:
        assert provider.address == f"unix:{path}"
        with services.calling(provider) as users:
            assert users.Login(REQUEST).success
    assert not path.exists()


def test_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with services.serving(rpcserverip=f"unix:{path}") as provider, services.calling(provider) as users:
        assert users.Login(REQUEST).success


def test_live_unix_socket_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with services.serving(rpcserverip=f"unix:{path}") as first, services.calling(first) as users:
        with pytest.raises(ConfigError, match="Address already in use"), services.serving(rpcserverip=f"unix:{path}"):
            pass
        assert users.Login(REQUEST).success


def test_foreign_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "letter"
    path.write_text("dear reader")
    with pytest.raises(ConfigError, match="letter"), services.serving(rpcserverip=f"unix:{path}"):
        pass
    assert path.read_text() == "dear reader"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError), services.serving(rpcserverip=f"unix:{tmp_path / 'link'}"):
        pass
    assert path.read_text() == "dear reader"


def test_unix_path_that_cant_be_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't listen on .*: No such file or directory"):
        with services.serving(rpcserverip=f"unix:{tmp_path / 'no' / 'directory'}"):
            pass
    with pytest.raises(ConfigError, match="unix:/path"):  # longer than sockaddr_un
        MprpcConfig(rpcserverip=f"unix:{tmp_path / ('x' * 200)}")


# ---- before and after start ----


def test_a_provider_starts_once() -> None:
    with services.serving() as provider:
        with pytest.raises(RuntimeError, match="once"):
            provider.start()
    with pytest.raises(RuntimeError, match="once"):
        provider.start()


def test_services_are_published_before_the_start() -> None:
    with services.serving() as provider, pytest.raises(RuntimeError, match="before start"):
        provider.notify_service(friend_mprpc.FriendServiceRpc())


def test_short_name_is_one_services_alone() -> None:
    provider = RpcProvider()
    provider.notify_service(Users())
    provider.notify_service(friend_mprpc.FriendServiceRpc())
    with pytest.raises(ValueError, match="UserServiceRpc"):
        provider.notify_service(Users())
    other = descriptor_pb2.FileDescriptorProto(name="other.proto", package="other", syntax="proto3")
    other.message_type.add(name="M")
    other.service.add(name="UserServiceRpc").method.add(name="Go", input_type=".other.M", output_type=".other.M")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(other.SerializeToString())

    class Other:
        DESCRIPTOR = pool.FindServiceByName("other.UserServiceRpc")

        def Go(self, request: Any, controller: Any) -> Any:
            return request

    with pytest.raises(ValueError, match=r"other\.UserServiceRpc .*fixbug\.UserServiceRpc"):
        provider.notify_service(Other())


def test_what_is_no_service_is_refused() -> None:
    with pytest.raises(TypeError):
        RpcProvider().notify_service(object())


def test_provider_without_a_service_answers_unimplemented() -> None:
    with RpcProvider() as provider, services.calling(provider) as users:
        with pytest.raises(mprpc.Unimplemented) as raised:
            users.Login(REQUEST)
        assert raised.value.not_run


def test_nothing_to_register_is_registered() -> None:
    with services.serving() as provider:
        assert provider.wait_registered(0.0)


def test_seeds_spellings() -> None:
    provider = RpcProvider()
    provider.NotifyService(Users())
    running = threading.Thread(target=provider.Run)
    running.start()
    wait_until(lambda: provider.address, "it serves")
    with services.calling(provider) as users:
        assert users.Login(REQUEST).success
    provider.stop()
    running.join(wire.PATIENCE)
    assert not running.is_alive()


# ---- stopping ----


class Slow:
    """A Login whose Future the test resolves."""

    def __init__(self) -> None:
        self.taken = threading.Semaphore(0)
        self.futures: list[Future[Any]] = []

    def __call__(self, request: Any, controller: Any) -> Any:
        self.futures.append(Future())
        self.taken.release()
        return self.futures[-1]


def test_stop_lets_calls_in_flight_finish() -> None:
    slow = Slow()
    with services.serving(slow) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(7))
        assert slow.taken.acquire(timeout=wire.PATIENCE)
        stopping = threading.Thread(target=provider.stop, args=(wire.PATIENCE,))
        stopping.start()
        header, _ = peer.frame()
        assert (header.kind, header.call_id) == (wire.rpcheader_pb2.GOAWAY, 7)
        peer.send(wire.login(8))
        header, _ = peer.frame()
        assert (header.call_id, header.status, header.not_run) == (8, Status.UNAVAILABLE, True)
        slow.futures[0].set_result(OK)
        header, payload = peer.frame()
        assert (header.call_id, header.status, payload) == (7, Status.OK, OK.SerializeToString())
        assert peer.rest() == b""
        peer.close()
        stopping.join(wire.PATIENCE)
        assert not stopping.is_alive()


def test_stop_serves_new_connections_not_run_while_it_drains() -> None:
    slow = Slow()
    with services.serving(slow) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1))
        assert slow.taken.acquire(timeout=wire.PATIENCE)
        stopping = threading.Thread(target=provider.stop, args=(wire.PATIENCE,))
        stopping.start()
        assert peer.frame()[0].kind == wire.rpcheader_pb2.GOAWAY
        with wire.connect(provider.address) as late:
            late.send(wire.login(1))
            header, _ = late.frame()
            assert (header.status, header.not_run) == (Status.UNAVAILABLE, True)
            header, _ = late.frame()  # so that whoever calls next knows that it never ran
            assert (header.kind, header.call_id) == (wire.rpcheader_pb2.GOAWAY, 0)
            late.send(wire.login(2))
            assert late.frame()[0].not_run
        slow.futures[0].set_result(OK)
        stopping.join(wire.PATIENCE)
        assert peer.frame()[0].call_id == 1


def test_stop_is_bounded_by_its_grace() -> None:
    slow = Slow()
    with services.serving(slow) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1))
        assert slow.taken.acquire(timeout=wire.PATIENCE)
        before = time.monotonic()
        provider.stop(0.1)
        assert 0.1 <= time.monotonic() - before < 2.0
        assert peer.frame()[0].kind == wire.rpcheader_pb2.GOAWAY
        assert peer.rest() == b""  # the end, no reset


def test_second_stop_hurries_the_first() -> None:
    slow = Slow()
    with services.serving(slow) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1))
        assert slow.taken.acquire(timeout=wire.PATIENCE)
        stopping = threading.Thread(target=provider.stop, args=(600.0,))
        stopping.start()
        assert peer.frame()[0].kind == wire.rpcheader_pb2.GOAWAY
        provider.stop(0.0)
        assert peer.rest() == b""
        stopping.join(wire.PATIENCE)
        assert not stopping.is_alive()


def test_stop_before_start_and_twice() -> None:
    provider = RpcProvider()
    provider.stop()
    provider.stop()
    with services.serving() as started:
        started.stop()
        started.stop()


def test_stop_by_a_handler() -> None:
    """It stops its own loop: stop() must not wait for the thread that it runs on."""
    stopped: list[bool] = []

    def login(request: Any, controller: Any) -> Any:
        provider.stop(5.0)
        stopped.append(True)
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1))
        headers = [peer.frame()[0] for _ in range(2)]
        assert {header.kind for header in headers} == {wire.rpcheader_pb2.GOAWAY, wire.rpcheader_pb2.RESPONSE}
        assert peer.rest() == b""
    assert stopped


def test_handler_that_never_returns_does_not_hold_stop(caplog: pytest.LogCaptureFixture) -> None:
    release, started = threading.Event(), threading.Event()

    def login(request: Any, controller: Any) -> Any:
        started.set()
        release.wait(wire.PATIENCE)
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1))
        assert started.wait(wire.PATIENCE)
        before = time.monotonic()
        provider.stop(0.0)
        assert time.monotonic() - before < 5.0
        release.set()
    assert "has not returned" in caplog.text


def test_idle_connections_hear_goaway_and_the_end() -> None:
    with services.serving(loops=2) as provider:
        with wire.connect(provider.address) as framed, wire.connect(provider.address) as silent:
            framed.send(wire.login(1))
            assert framed.frame()[0].call_id == 1
            provider.stop()
            assert framed.frame()[0].kind == wire.rpcheader_pb2.GOAWAY
            assert framed.rest() == b""
            assert silent.was_reset()  # perhaps a C++ consumer, which would take the end for an empty success


def test_nothing_stays_behind() -> None:
    with services.serving(loops=3) as provider, services.calling(provider) as users:
        assert users.Login(REQUEST).success
    del provider, users
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with services.serving(loops=3) as provider, services.calling(provider) as users:
            assert users.Login(REQUEST).success
        del provider, users
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- run() ----

RUN = """
import signal, threading, services, mprpc
from concurrent.futures import Future
def login(request, controller):
    if request.name != b"slow":
        return services.accept(request, controller)
    print("slow", flush=True)
    return Future()
def tell_when_run_is_there():
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL or signal.getsignal(signal.SIGINT) == default:
        threading.Event().wait(0.001)
    print(provider.address, flush=True)
default = signal.getsignal(signal.SIGINT)
provider = mprpc.RpcProvider(mprpc.MprpcConfig(drain_timeout=600, loops=2))
provider.notify_service(services.Users(login))
provider.start()
teller = threading.Thread(target=tell_when_run_is_there)
teller.start()
provider.run()
teller.join()
print("stopped", threading.active_count(), flush=True)
"""


@contextlib.contextmanager
def running(program: str = RUN, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that serves, and its address."""
    with services.start_python(program, **options) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, process.communicate()[1]
            yield process, address
        finally:
            if process.poll() is None:
                process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_stops_run_cleanly(number: signal.Signals) -> None:
    with running() as (process, address), wire.connect(address) as peer:
        peer.send(wire.login(1))
        assert peer.frame()[1] == ANSWER
        process.send_signal(number)
        assert peer.frame()[0].kind == wire.rpcheader_pb2.GOAWAY
        assert peer.rest() == b""
        peer.close()
        out, error = process.communicate(timeout=wire.PATIENCE)
        assert (process.returncode, out, error) == (0, "stopped 1\n", "")


def test_second_signal_ends_at_once() -> None:
    """The grace is ten minutes, and a call is in flight that is never answered."""
    with running() as (process, address), wire.connect(address) as peer:
        peer.send(wire.login(1, b"slow"))
        assert process.stdout is not None
        assert process.stdout.readline() == "slow\n"
        process.send_signal(signal.SIGTERM)
        assert peer.frame()[0].kind == wire.rpcheader_pb2.GOAWAY
        process.send_signal(signal.SIGTERM)
        assert peer.rest() == b""
        peer.close()
        out, error = process.communicate(timeout=wire.PATIENCE)
        assert (process.returncode, out, error) == (0, "stopped 1\n", "")


def test_run_restores_signals_and_wakeup() -> None:
    program = RUN + (
        "import signal\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.set_wakeup_fd(-1) == -1\n"
    )
    with running(program) as (process, _):
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=wire.PATIENCE)
        assert (process.returncode, out, error) == (0, "stopped 1\n", "")


def test_stop_from_another_thread_ends_run() -> None:
    program = RUN.replace(
        "provider.run()", "threading.Thread(target=lambda: (input(), provider.stop())).start()\nprovider.run()"
    )
    with running(program) as (process, _):
        out, error = process.communicate("\n", timeout=wire.PATIENCE)
        assert process.returncode == 0, error
        assert out.startswith("stopped")


def test_stop_just_before_run_is_not_lost() -> None:
    """run() on the main thread waited for ever for a stop() that came between its start and its wait."""
    program = "import services\nwith services.serving() as provider:\n    provider.stop()\n    provider.run()\n"
    with services.start_python(program) as process:
        out, error = process.communicate(timeout=wire.PATIENCE)
        assert (process.returncode, out, error) == (0, "", "")


def test_run_on_another_thread_returns_after_stop() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with services.serving() as provider:
        thread = threading.Thread(target=provider.run)
        thread.start()
        with services.calling(provider) as users:
            assert users.Login(REQUEST).success
        assert thread.is_alive()
        provider.stop()
        thread.join(wire.PATIENCE)
        assert not thread.is_alive()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_run_after_stop_returns_or_refuses() -> None:
    """run() of a provider that was stopped before must not wait for a stop that has been."""
    with services.serving() as provider:
        provider.stop()
        thread = threading.Thread(target=provider.run)
        thread.start()
        thread.join(wire.PATIENCE)
        assert not thread.is_alive()


# ---- many connections, many frames ----


def test_loops_share_connections_evenly() -> None:
    with services.serving(loops=4) as provider, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(wire.connect(provider.address)) for _ in range(40)]
        for peer in peers:
            peer.send(wire.login(1))
            assert peer.frame()[1] == ANSWER
        assert [each.connections for each in statistics(provider)] == [10] * 4
        for peer in peers[:20]:
            peer.close()
        wait_until(lambda: sum(each.connections for each in statistics(provider)) == 20, "they are gone")
        for _ in range(20):
            again = stack.enter_context(wire.connect(provider.address))
            again.send(wire.login(1))
            assert again.frame()[1] == ANSWER
        assert [each.connections for each in statistics(provider)] == [10] * 4


def test_thousand_requests_in_one_go() -> None:
    with services.serving() as provider, wire.connect(provider.address) as peer:
        data = b"".join(wire.login(i, b"%d" % i) for i in range(1, 1001))
        sending = threading.Thread(target=peer.send, args=(data,))
        sending.start()
        for i in range(1, 1001):
            header, payload = peer.frame()
            assert (header.call_id, LoginResponse.FromString(payload).result.errmsg) == (i, b"%d" % i)
        sending.join()


def test_small_requests_behind_a_large_one_get_their_own_arguments() -> None:
    """They are received into the large one's buffer, where their arguments were not looked for."""
    names = [b"%d" % i * (100_000 if i % 5 == 0 else i % 7) for i in range(1, 101)]
    data = b"".join(wire.login(i, name) for i, name in enumerate(names, 1))
    with services.serving() as provider, wire.connect(provider.address) as peer:
        sending = threading.Thread(target=peer.send, args=(data,))
        sending.start()
        for name in names:
            assert LoginResponse.FromString(peer.frame()[1]).result.errmsg == name
        sending.join()


def test_requests_cut_at_every_byte() -> None:
    data = wire.login(1, b"one") + wire.login(2, b"two")
    with services.serving() as provider, wire.connect(provider.address) as signpost:
        for cut in range(1, len(data)):
            with wire.connect(provider.address) as peer:
                peer.send(data[:cut])
                signpost.send(wire.login(cut))
                assert signpost.frame()[0].call_id == cut  # the loop has been round since the first part
                peer.send(data[cut:])
                assert [peer.frame()[0].call_id for _ in range(2)] == [1, 2]


def test_flood_does_not_starve_others() -> None:
    """While one connection has a hundred thousand requests waiting, another's calls come through."""
    answered = threading.Event()
    served = 0

    def login(request: Any, controller: Any) -> Any:
        nonlocal served
        served += 1
        return OK

    with services.serving(login, max_output=64 << 20) as provider:
        with wire.connect(provider.address) as flood, wire.connect(provider.address) as peer:
            data = b"".join(wire.login(i) for i in range(1, 100_001))

            def pour() -> None:
                with contextlib.suppress(OSError):
                    flood.send(data)

            def drink() -> None:
                with contextlib.suppress(OSError, EOFError, ValueError):
                    while not answered.is_set():
                        flood.frame()

            threads = [threading.Thread(target=pour), threading.Thread(target=drink)]
            for thread in threads:
                thread.start()
            wait_until(lambda: served > 1000, "the flood has come")
            for i in range(1, 21):
                before = served
                peer.send(wire.login(i))
                assert peer.frame()[0].call_id == i
                assert served - before < 20_000
            assert served < 100_000
            answered.set()
            flood.socket.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(wire.PATIENCE)


def memory() -> int:
    """Bytes of this process that are resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_slow_reader_is_not_read_from() -> None:
    """Its answers would take 400 MB; others are served meanwhile, and it gets every one when it reads after all."""
    answer = services.accept(LoginRequest(name=b"x" * 40_000), None)
    count = 10_000
    data = b"".join(wire.login(i, b"") for i in range(1, count + 1))

    with services.serving(returns(answer)) as provider:
        with wire.connect(provider.address, SO_RCVBUF=4096) as slow, wire.connect(provider.address) as peer:
            before = memory()
            sending = threading.Thread(target=slow.send, args=(data,))
            sending.start()
            for i in range(1, 101):
                peer.send(wire.login(i))
                assert peer.frame()[1] == answer.SerializeToString()
            assert memory() - before < 40 << 20
            assert sum(each.requests for each in statistics(provider)) < 1000
            seen = {slow.frame()[0].call_id for _ in range(3000)}  # in order but where a thread stood still meanwhile
            assert len(seen) == 3000
            assert max(seen) < 3300
            assert memory() - before < 40 << 20
            slow.socket.shutdown(socket.SHUT_RDWR)
            sending.join(wire.PATIENCE)


def test_slow_reader_is_not_taken_for_a_slow_sender(caplog: pytest.LogCaptureFixture) -> None:
    """While nothing is read from it, the frame that it has begun can't make progress."""
    answer = services.accept(LoginRequest(name=b"x" * 100_000), None)
    data = b"".join(wire.login(i, b"") for i in range(1, 4001))

    with services.serving(returns(answer), frame_timeout=0.05, max_output=1) as provider:
        with wire.connect(provider.address, SO_RCVBUF=4096) as slow:
            sending = threading.Thread(target=slow.send, args=(data,))
            sending.start()
            wait_until(lambda: sum(each.requests for each in statistics(provider)) > 20, "it is full")
            threading.Event().wait(0.15)  # three times the timeout
            assert len({slow.frame()[0].call_id for _ in range(500)}) == 500
            slow.socket.shutdown(socket.SHUT_RDWR)
            sending.join(wire.PATIENCE)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_connection_too_many_is_reset(caplog: pytest.LogCaptureFixture) -> None:
    with services.serving(max_connections=3, loops=2) as provider, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(wire.connect(provider.address)) for _ in range(3)]
        for peer in peers:
            peer.send(wire.login(1))
            assert peer.frame()[1] == ANSWER
        for _ in range(3):
            assert wire.is_refused(provider.address)
        peers[0].close()
        wait_until(lambda: sum(each.connections for each in statistics(provider)) == 2, "one has gone")
        with wire.connect(provider.address) as peer:
            peer.send(wire.login(1))
            assert peer.frame()[1] == ANSWER
    assert "max_connections" in caplog.text


DESCRIPTORS = """
import resource, services, mprpc, logging, signal, sys
logging.basicConfig(stream=sys.stderr)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # run() wants descriptors, which the crowd may have taken
provider = mprpc.RpcProvider(mprpc.MprpcConfig())
provider.notify_service(services.Users())
provider.start()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print(provider.address, flush=True)
signal.sigwait({signal.SIGTERM})
provider.stop()
"""


def test_provider_survives_without_descriptors() -> None:
    with running(DESCRIPTORS) as (process, address):
        with wire.connect(address) as old, contextlib.ExitStack() as stack:
            old.send(wire.login(1))
            assert old.frame()[1] == ANSWER
            crowd = []
            for _ in range(100):
                with contextlib.suppress(ConnectionResetError):  # refused before connect() has returned
                    crowd.append(stack.enter_context(wire.connect(address)))
            served = 0
            for peer in crowd:
                with contextlib.suppress(ConnectionError, EOFError):
                    peer.send(wire.login(1))
                    served += peer.frame()[1] == ANSWER
            assert 10 < served < 40
            old.send(wire.login(2))
            assert old.frame()[1] == ANSWER
        wait_until(lambda: is_served(address), "it takes connections again")
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=wire.PATIENCE)
        assert process.returncode == 0
        assert "no file descriptor left" in error
        assert len(error.splitlines()) < 30  # a crowd of connections is no crowd of lines


def is_served(address: str) -> bool:
    with contextlib.suppress(OSError, EOFError), wire.connect(address) as peer:
        peer.send(wire.login(1))
        return bool(peer.frame()[1] == ANSWER)
    return False


# ---- strangers ----


def test_incomplete_frame_ends_after_frame_timeout(caplog: pytest.LogCaptureFixture) -> None:
    data = wire.login(1)
    with services.serving(frame_timeout=0.05) as provider:
        for cut in (1, 3, 4, 10, len(data) - 1):
            with wire.connect(provider.address) as peer:
                before = time.monotonic()
                peer.send(data[:cut])
                assert peer.was_reset()
                assert time.monotonic() - before > 0.04
        with wire.connect(provider.address) as idle:  # silence between frames is no offence
            idle.send(data)
            assert idle.frame()[1] == ANSWER
            idle.socket.settimeout(0.15)
            with pytest.raises(TimeoutError):
                idle.socket.recv(1)
            idle.socket.settimeout(wire.PATIENCE)
    assert caplog.text.count("nothing within frame_timeout") == 5


def test_framed_connection_that_stalls_hears_its_answers_and_the_end() -> None:
    with services.serving(frame_timeout=0.05) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1) + wire.login(2)[:-1])
        assert peer.frame()[0].call_id == 1
        assert peer.rest() == b""


def test_slow_loris_does_not_get_longer_by_a_byte_now_and_then() -> None:
    data = wire.login(1, b"x" * 10_000)
    with services.serving(frame_timeout=0.1) as provider, wire.connect(provider.address) as peer:
        before = time.monotonic()
        ended = threading.Event()

        def watch() -> None:
            peer.was_reset()  # or the end, when it was send() that heard of the reset
            ended.set()

        watching = threading.Thread(target=watch)
        watching.start()
        for byte in data:
            with contextlib.suppress(ConnectionError):
                peer.send(bytes([byte]))
            if ended.wait(0.01):
                break
        assert ended.is_set()
        assert 0.09 < time.monotonic() - before < 5.0
        watching.join()


def test_large_frame_that_makes_progress_is_waited_for() -> None:
    data = wire.login(1, b"x" * 400_000)
    with services.serving(frame_timeout=0.5) as provider, wire.connect(provider.address) as peer:
        before = time.monotonic()
        for at in range(0, len(data), 20_000):
            peer.send(data[at : at + 20_000])
            threading.Event().wait(0.03)  # a slow line, not synchronisation
        assert time.monotonic() - before > 0.5
        assert len(peer.frame()[1]) > 400_000


HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"),
        (b"POST /x HTTP/1.1\r\n\r\n", "HTTP"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP"),
        (HELLO, "TLS"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "header_size over 65535"),
        (bytes(range(255, 0, -1)) * 100, "header_size over 65535"),
    ],
    ids=["GET", "POST", "PRI", "TLS", "SSH", "noise"],
)
def test_other_protocols_are_logged_once_and_closed(data: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    with services.serving() as provider, wire.connect(provider.address) as peer:
        name = "{}:{}".format(*peer.socket.getsockname())
        peer.send(data)
        assert peer.was_reset()
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert lines[0].startswith(name)
    assert why in lines[0]


def test_flood_of_bad_peers_is_no_flood_of_lines(caplog: pytest.LogCaptureFixture) -> None:
    with services.serving() as provider:
        for _ in range(200):
            with wire.connect(provider.address) as peer:
                peer.send(b"GET / HTTP/1.1\r\n\r\n")
                assert peer.was_reset()
        wait_until(lambda: sum(each.broken for each in statistics(provider)) == 200, "all are counted")
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert 0 < len(lines) < 60


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        (wire.login(5) + wire.login(5), "not above the last"),
        (wire.login(5) + wire.login(4), "not above the last"),
        (wire.login(5) + wire.frame(kind=3), "without the call_id"),
        (wire.login(5) + wire.frame(b"x" * 65, kind=3, call_id=6), "PING"),
        (wire.login(5) + b"\x02\x00\x00\x00\x1b\x00", "wrong wire type"),
        (wire.login(5) + b"\x03\x00\x00\x00\x0a\x05x", "length past its end"),
    ],
    ids=["same id", "lower id", "no id", "long ping", "wire type", "length"],
)
def test_protocol_error_ends_after_the_answers(frames: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    with services.serving() as provider, wire.connect(provider.address) as peer:
        peer.send(frames)
        assert peer.frame()[0].call_id == 5
        assert peer.rest() == b""
    assert [why in record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [True]


def test_frames_that_need_no_handler() -> None:
    header_of = wire.rpcheader_pb2
    with services.serving() as provider, wire.connect(provider.address) as peer:
        peer.send(wire.frame(b"hello", kind=header_of.PING, call_id=9))
        header, payload = peer.frame()
        assert (header.kind, header.call_id, header.status, payload) == (header_of.PONG, 9, Status.OK, b"hello")
        for service, status in ((b"fixbug.UserServiceRpc", Status.OK), (b"No.Such", Status.UNIMPLEMENTED)):
            peer.send(wire.frame(kind=header_of.PING, call_id=9, service_name=service))
            assert peer.frame()[0].status == status
        peer.send(wire.frame(kind=header_of.CANCEL, call_id=77) + wire.response(3, b"nobody asked"))
        peer.send(wire.frame(kind=7, call_id=10))
        header, _ = peer.frame()
        assert (header.call_id, header.status, header.not_run) == (10, Status.UNIMPLEMENTED, True)
        peer.send(wire.frame(b"ignored", kind=40, call_id=11) + wire.login(12))
        assert peer.frame()[0].call_id == 12


def test_request_over_the_limit_fails_alone() -> None:
    with services.serving(max_payload=1000) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"x" * 200_000) + wire.login(2))
        header, _ = peer.frame()
        assert (header.call_id, header.status, header.not_run) == (1, Status.RESOURCE_EXHAUSTED, True)
        assert peer.frame()[1] == ANSWER


def test_what_is_not_supported_says_so() -> None:
    with services.serving() as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, compression=1))
        header, _ = peer.frame()
        assert (header.status, header.not_run) == (Status.UNIMPLEMENTED, True)
        entries = [wire.rpcheader_pb2.Metadatum(key=b"k", value=b"v")]
        peer.send(wire.login(2, metadata=entries * 128))
        assert peer.frame()[1] == ANSWER
        peer.send(wire.login(3, metadata=entries * 129))
        header, _ = peer.frame()
        assert (header.call_id, header.status, header.not_run) == (3, Status.INVALID_ARGUMENT, True)


def test_callers_that_come_and_go_leave_nothing() -> None:
    """Connections that end in the middle of everything: of a frame, of a call, of an answer."""
    slow = Slow()

    def login(request: Any, controller: Any) -> Any:
        return slow(request, controller) if request.name == b"slow" else services.accept(request, controller)

    with services.serving(login, loops=2) as provider:
        for go in (wire.Peer.close, wire.Peer.reset):
            for data in (b"", wire.login(1)[:9], wire.login(1), wire.login(1, b"slow"), wire.login(1, b"x" * 500_000)):
                for _ in range(5):
                    peer = wire.connect(provider.address)
                    peer.send(data)
                    go(peer)
        wait_until(lambda: sum(each.connections for each in statistics(provider)) == 0, "all are gone")
        assert in_flight(provider) == 0
        with services.calling(provider) as users:
            assert users.Login(REQUEST).success


def test_connections_refused_after_stop() -> None:
    with services.serving() as provider:
        provider.stop()
        with pytest.raises(ConnectionRefusedError) as raised:
            wire.connect(provider.address)
        assert raised.value.errno == errno.ECONNREFUSED


def test_config_is_the_providers_own() -> None:
    with pytest.raises(ConfigError):
        RpcProvider(MprpcConfig(loops=0))


STANDING = """
import sys, services
served = 0
def login(request, controller):
    global served
    served += 1
    return services.LoginResponse(result=services.user_pb2.ResultCode(errcode=served))
with services.serving(login) as provider:
    print(provider.address, flush=True)
    sys.stdin.read()
"""


def stands_still(pid: int) -> bool:
    """Whether all its threads do: SIGSTOP reaches them one after the other."""
    states = [each.read_text().rpartition(")")[2].split()[0] for each in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}


@pytest.mark.parametrize("known", [True, False], ids=["known", "new"])
@pytest.mark.parametrize("closes", [True, False], ids=["closed", "half-closed"])
def test_what_a_peer_sent_that_has_gone_is_not_run(closes: bool, known: bool) -> None:
    """A provider that had stood still for a while ran all that its sockets had kept, though nobody waited any more."""
    process = services.start_python(STANDING)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with wire.connect(address) as peer:
            if known:
                peer.send(wire.login(1))
                peer.frame()
            process.send_signal(signal.SIGSTOP)
            wait_until(lambda: stands_still(process.pid), "it stands still")
            peer.send(b"".join(wire.login(i) for i in range(2, 200)))
            if closes:
                peer.close()
            else:
                peer.finish()
            process.send_signal(signal.SIGCONT)
            if not closes:
                assert peer.rest() == b""
        with wire.connect(address) as peer:
            peer.send(wire.login(1))
            assert LoginResponse.FromString(peer.frame()[1]).result.errcode == 1 + known
    finally:
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=wire.PATIENCE)
