"""The channel over real sockets: many threads, deadlines, lost connections, forks, signals, and lying providers."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import generated
import mprpc
import services
import wire
from mprpc import (
    DeadlineExceeded,
    Internal,
    MprpcChannel,
    MprpcConfig,
    MprpcController,
    NotFound,
    ResourceExhausted,
    RpcError,
    RpcProvider,
    Status,
    Unavailable,
    Unimplemented,
)
from mprpc._native import ffi, lib
from mprpc.administration import Override, set_override
from mprpc.embedded_zookeeper import Clock
from mprpc.testing import EmbeddedZooKeeper
from services import REQUEST, LoginRequest, LoginResponse

user_pb2 = generated.module("user_pb2")
user_mprpc = generated.module("user_mprpc")
legacy_pb2 = generated.module("legacy_pb2")

USER = user_pb2.DESCRIPTOR.services_by_name["UserServiceRpc"]
OK = LoginResponse(success=True)
ANSWER = services.accept(REQUEST, None)
GOAWAY, PING, PONG = (getattr(wire.rpcheader_pb2, name) for name in ("GOAWAY", "PING", "PONG"))


@pytest.fixture(scope="module")
def provider() -> Iterator[RpcProvider]:
    """One that says names back, for tests that do nothing to it."""
    with services.serving() as started:
        yield started


def accepted(provider: RpcProvider) -> int:
    """How many connections it has taken so far."""
    counters = ffi.new("struct mprpc_loop_statistics *")
    total = 0
    for loop in provider._loops:
        lib.mprpc_loop_statistics(loop.handle, counters)
        total += counters.accepted
    return total


def config_for(provider: RpcProvider, **keys: Any) -> MprpcConfig:
    host, _, port = provider.address.rpartition(":")
    return MprpcConfig(rpcserverip=host, rpcserverport=int(port), **keys)


class Slow:
    """A Login whose names that begin with "slow" wait for the test, which resolves their Futures; others don't."""

    def __init__(self) -> None:
        self.taken = threading.Semaphore(0)
        self.futures: list[tuple[bytes, Future[Any]]] = []

    def __call__(self, request: Any, controller: Any) -> Any:
        if not request.name.startswith(b"slow"):
            return services.accept(request, controller)
        self.futures.append((request.name, Future()))
        self.taken.release()
        return self.futures[-1][1]

    def wait(self) -> None:
        assert self.taken.acquire(timeout=wire.PATIENCE)

    def resolve(self) -> None:
        for name, future in self.futures:
            future.set_result(services.accept(LoginRequest(name=name), None))
        self.futures.clear()


# ---- many threads ----


def hammer(users: Any, threads: int, calls: int) -> int:
    """So many threads with so many calls each, every payload its own; how many answers were right."""

    def run(thread: int) -> int:
        right = 0
        for i in range(calls):
            name = b"%d of %d" % (i, thread) + b"." * (i * 37 % 300)
            if i % 97 == 0:
                name *= 500  # past what is received at once
            right += users.Login(LoginRequest(name=name), timeout=60.0).result.errmsg == name
        return right

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(run, range(threads)))


@pytest.mark.parametrize("loops", [1, 4])
@pytest.mark.parametrize("calls", [20_000, pytest.param(200_000, marks=pytest.mark.long)], ids=["short", "long"])
def test_64_threads_on_one_channel_get_their_own_answers(calls: int, loops: int) -> None:
    with services.serving(loops=loops) as provider, services.calling(provider) as users:
        each = calls // 64 + 1
        assert hammer(users, 64, each) == 64 * each
        assert accepted(provider) == 1


def test_threads_on_channels_of_their_own_share_four_loops() -> None:
    with services.serving(loops=4) as provider:

        def run(_: int) -> int:
            with services.calling(provider) as users:
                return hammer(users, 4, 100)

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(run, range(8))) == [400] * 8


def test_large_answers_meet_small_ones() -> None:
    """The reader hands others their responses, also those it has to keep in a buffer of their own."""
    with services.serving(loops=2) as provider, services.calling(provider) as users:

        def run(size: int) -> bool:
            name = bytes([size % 251]) * size
            return all(users.Login(LoginRequest(name=name), timeout=60.0).result.errmsg == name for _ in range(20))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(run, [0, 10, 8100, 8192, 8300, 70_000, 1_000_000, 3]))


# ---- deadlines ----


def test_timeout_leaves_the_connection_usable() -> None:
    slow = Slow()
    with services.serving(slow) as provider, services.calling(provider) as users:
        for i in range(20):
            before = time.monotonic()
            with pytest.raises(DeadlineExceeded) as raised:
                users.Login(LoginRequest(name=b"slow %d" % i), timeout=0.02)
            assert 0.02 <= time.monotonic() - before < 1.0
            assert provider.address in raised.value.text
            assert not raised.value.not_run
            assert users.Login(REQUEST) == ANSWER
        slow.resolve()
        for i in range(100):
            assert users.Login(LoginRequest(name=b"%d" % i)).result.errmsg == b"%d" % i
        assert accepted(provider) == 1


def test_late_answers_reach_nobody() -> None:
    """While calls time out all the time, threads beside them get their own answers and no others."""
    slow = Slow()
    over = threading.Event()

    def resolving() -> None:
        while not over.is_set():
            slow.wait()
            name, future = slow.futures.pop(0)
            late.wait(0.003)
            future.set_result(services.accept(LoginRequest(name=name), None))

    late = threading.Event()  # never set
    with services.serving(slow) as provider, services.calling(provider) as users:
        assert users.Login(REQUEST) == ANSWER  # from here on there is a connection
        resolver = threading.Thread(target=resolving)
        resolver.start()

        def run(thread: int) -> int:
            wrong = 0
            for i in range(60):
                name = (b"slow " if i % 3 == 0 else b"") + b"%d of %d" % (i, thread)
                with contextlib.suppress(DeadlineExceeded):
                    timeout = 0.002 if name.startswith(b"slow") else 30.0
                    wrong += users.Login(LoginRequest(name=name), timeout=timeout).result.errmsg != name
            return wrong

        with ThreadPoolExecutor(16) as pool:
            assert sum(pool.map(run, range(16))) == 0
        over.set()
        with contextlib.suppress(DeadlineExceeded):
            users.Login(LoginRequest(name=b"slow end"), timeout=0.001)
        resolver.join(wire.PATIENCE)
        assert accepted(provider) == 1


@pytest.mark.parametrize(
    ("channel", "controller", "call", "expected"),
    [(None, None, None, 5.0), (20.0, None, None, 20.0), (20.0, 30.0, None, 30.0), (20.0, 30.0, 40.0, 40.0)],
)
def test_nearest_timeout_counts(
    channel: float | None, controller: float | None, call: float | None, expected: float
) -> None:
    seen = []

    def login(request: Any, server: Any) -> Any:
        seen.append(server.time_remaining())
        return OK

    with services.serving(login) as provider, services.calling(provider, timeout=channel) as users:
        mine = MprpcController() if controller is not None else None
        if mine is not None:
            mine.timeout = controller
        users.Login(REQUEST, timeout=call, controller=mine)
        assert expected - 1 < seen[0] <= expected + 0.001
        if mine is not None:
            assert mine.timeout == controller  # for the next call, too


def test_endless_timeout(provider: RpcProvider) -> None:
    with services.calling(provider, timeout=float("inf")) as users:
        assert users.Login(REQUEST) == ANSWER
        assert users.Login(REQUEST, timeout=float("inf")) == ANSWER
        assert users.Login(REQUEST, timeout=1e300) == ANSWER


def test_key_call_timeout_is_the_default() -> None:
    slow = Slow()
    with services.serving(slow) as provider, MprpcChannel(config_for(provider, call_timeout=0.03)) as channel:
        with pytest.raises(DeadlineExceeded):
            user_mprpc.UserServiceRpc_Stub(channel).Login(LoginRequest(name=b"slow"))


@pytest.mark.parametrize("timeout", [0.0, -1.0, 1e-9, float("-inf")])
def test_no_time_left_at_all(timeout: float, provider: RpcProvider) -> None:
    with services.calling(provider) as users:
        for _ in range(2):  # without and with a connection
            with pytest.raises(RpcError) as raised:
                users.Login(REQUEST, timeout=timeout)
            assert raised.value.status in (Status.DEADLINE_EXCEEDED, Status.UNAVAILABLE)
            assert users.Login(REQUEST) == ANSWER


# ---- connections that end ----


def restart(provider: RpcProvider, **keys: Any) -> RpcProvider:
    """Stops it; another one at the same address."""
    provider.stop()
    again = RpcProvider(config_for(provider, **keys))
    again.notify_service(services.Users())
    again.start()
    return again


def test_restart_while_idle_is_not_noticed() -> None:
    with services.serving() as provider, services.calling(provider) as users:
        for _ in range(3):
            assert users.Login(REQUEST) == ANSWER
            again = restart(provider)
            try:
                assert users.Login(REQUEST) == ANSWER
            finally:
                again.stop()
            provider = restart(again)
            assert users.Login(REQUEST) == ANSWER
            provider.stop()
            provider = restart(provider)
        provider.stop()


SERVE = """
import services, mprpc, sys
from concurrent.futures import Future
def login(request, controller):
    if request.name == b"slow":
        print("taken", flush=True)
        return Future()
    return services.accept(request, controller)
provider = mprpc.RpcProvider(mprpc.MprpcConfig(rpcserverport=int(sys.argv[1])))
provider.notify_service(services.Users(login))
provider.start()
print(provider.address, flush=True)
provider.run()
"""


def line(process: Any) -> str:
    return str(process.stdout.readline()).strip()


def test_killed_provider_fails_calls_in_flight_and_comes_back() -> None:
    with services.start_python(SERVE, "0") as process:
        address = line(process)
        with services.calling(address) as users, ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(users.Login, LoginRequest(name=b"slow"), 60.0) for _ in range(4)]
            assert [line(process) for _ in calls] == ["taken"] * 4
            process.kill()
            process.wait()
            for call in calls:
                with pytest.raises(Unavailable, match=address) as raised:
                    call.result(wire.PATIENCE)
                assert not raised.value.not_run
            with pytest.raises(Unavailable, match="Connection refused") as raised:
                users.Login(REQUEST)
            assert raised.value.not_run
            with services.start_python(SERVE, address.rpartition(":")[2]) as again:
                assert line(again) == address
                assert users.Login(REQUEST) == ANSWER
                again.kill()


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with services.calling(address) as users:
        with pytest.raises(Unavailable, match=f"can't connect to {address}: Connection refused") as raised:
            users.Login(REQUEST)
        assert raised.value.not_run


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """An address whose connections are neither made nor refused: the listener's queue is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(8):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_connecting_is_bounded_by_the_deadline() -> None:
    with black_hole() as address, services.calling(address) as users:
        before = time.monotonic()
        with pytest.raises(Unavailable, match=f"can't connect to {address}") as raised:
            users.Login(REQUEST, timeout=0.1)
        assert time.monotonic() - before < 0.9
        assert raised.value.not_run


def test_connecting_is_bounded_by_connect_timeout() -> None:
    with black_hole() as address:
        host, _, port = address.partition(":")
        config = MprpcConfig(rpcserverip=host, rpcserverport=int(port), connect_timeout=0.1)
        with MprpcChannel(config) as channel:
            before = time.monotonic()
            with pytest.raises(Unavailable):
                user_mprpc.UserServiceRpc_Stub(channel).Login(REQUEST, timeout=30.0)
            assert time.monotonic() - before < 5.0


def test_threads_that_wait_for_one_connection_keep_their_own_deadlines() -> None:
    with black_hole() as address, services.calling(address) as users, ThreadPoolExecutor(4) as pool:
        patient = pool.submit(users.Login, REQUEST, 0.8)
        before = time.monotonic()
        for call in [pool.submit(users.Login, REQUEST, 0.1) for _ in range(3)]:
            with pytest.raises(Unavailable):
                call.result(wire.PATIENCE)
        assert time.monotonic() - before < 0.8
        assert isinstance(patient.exception(wire.PATIENCE), Unavailable)


def test_wait_ready(provider: RpcProvider) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with MprpcChannel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(Unavailable, match="refused"):
            channel.wait_ready(0.05)
        coming = RpcProvider(MprpcConfig(rpcserverport=port))
        coming.notify_service(services.Users())
        starting = threading.Timer(0.05, coming.start)
        starting.start()
        try:
            channel.wait_ready(wire.PATIENCE)
            assert user_mprpc.UserServiceRpc_Stub(channel).Login(REQUEST, timeout=0.5) == ANSWER
        finally:
            starting.join()
            coming.stop()


def test_close_ends_calls_in_flight() -> None:
    slow = Slow()
    with services.serving(slow) as provider, ThreadPoolExecutor(4) as pool:
        with services.calling(provider) as users:
            calls = [pool.submit(users.Login, LoginRequest(name=b"slow"), 60.0) for _ in range(4)]
            for _ in calls:
                slow.wait()
        for call in calls:
            with pytest.raises(Unavailable, match="closed") as raised:
                call.result(wire.PATIENCE)
            assert not raised.value.not_run


def test_closed_channel_says_so(provider: RpcProvider) -> None:
    used, unused = MprpcChannel(provider.address), MprpcChannel(provider.address)
    stubs = [user_mprpc.UserServiceRpc_Stub(channel) for channel in (used, unused)]
    assert stubs[0].Login(REQUEST) == ANSWER
    for channel, users in zip((used, unused), stubs, strict=True):
        channel.close()
        channel.close()
        with pytest.raises(Unavailable, match="closed") as raised:
            users.Login(REQUEST)
        assert raised.value.not_run
        with pytest.raises(Unavailable, match="closed"):
            channel.wait_ready(0.1)
    with pytest.raises(Unavailable, match="closed"):
        user_mprpc.UserServiceRpc_Stub(used).Login(REQUEST)


def test_channels_leave_neither_descriptors_nor_threads(provider: RpcProvider) -> None:
    def use() -> None:
        with services.calling(provider) as users:
            assert users.Login(REQUEST) == ANSWER

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    use()
    gc.collect()
    before = held()
    for _ in range(100):
        use()
    gc.collect()
    deadline = time.monotonic() + wire.PATIENCE  # the provider's side, and the keeper, end when they see the end
    while (held()[0] > before[0] or held()[1] > before[1]) and time.monotonic() < deadline:
        threading.Event().wait(0.002)
    assert held()[0] == before[0]
    assert held()[1] <= before[1]


def test_forgotten_channel_closes_its_connection() -> None:
    with services.serving() as provider:
        channel = MprpcChannel(provider.address)
        assert user_mprpc.UserServiceRpc_Stub(channel).Login(REQUEST) == ANSWER
        before = len(os.listdir("/proc/self/fd"))
        del channel
        gc.collect()
        deadline = time.monotonic() + wire.PATIENCE
        while len(os.listdir("/proc/self/fd")) > before - 2 and time.monotonic() < deadline:
            threading.Event().wait(0.002)
        assert len(os.listdir("/proc/self/fd")) == before - 2  # both sides


# ---- sizes ----


def test_response_of_10_megabytes(provider: RpcProvider) -> None:
    name = os.urandom(1 << 20) * 10
    with services.calling(provider) as users:
        assert users.Login(LoginRequest(name=name), timeout=60.0).result.errmsg == name


def test_request_of_60_megabytes() -> None:
    sizes = []

    def login(request: Any, controller: Any) -> Any:
        sizes.append(len(request.name))
        return OK

    with services.serving(login) as provider, services.calling(provider) as users:
        assert users.Login(LoginRequest(name=bytes(60 << 20)), timeout=60.0) == OK
        assert sizes == [60 << 20]


def test_request_over_the_limit_is_not_sent(provider: RpcProvider) -> None:
    with MprpcChannel(config_for(provider, max_payload=1000)) as channel:
        users = user_mprpc.UserServiceRpc_Stub(channel)
        for _ in range(2):
            with pytest.raises(ResourceExhausted, match=r"UserServiceRpc\.Login: the request has 2003 bytes") as raised:
                users.Login(LoginRequest(name=b"x" * 2000))
            assert raised.value.not_run
            assert users.Login(REQUEST) == ANSWER


def test_response_over_the_limit_fails_its_call_alone() -> None:
    def login(request: Any, controller: Any) -> Any:
        return LoginResponse(result=user_pb2.ResultCode(errmsg=b"x" * int(request.name)))

    with services.serving(login) as provider, MprpcChannel(config_for(provider, max_payload=10_000)) as channel:
        users = user_mprpc.UserServiceRpc_Stub(channel)

        def run(i: int) -> bool:
            if i % 4:
                return len(users.Login(LoginRequest(name=b"%d" % i)).result.errmsg) == i
            with pytest.raises(ResourceExhausted, match="max_payload") as raised:
                users.Login(LoginRequest(name=b"200000"))
            return not raised.value.not_run

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(run, range(200)))
        assert accepted(provider) == 1


# ---- addresses ----


@pytest.mark.parametrize("host", ["::1", "localhost", "127.0.0.1"])
def test_addresses(host: str) -> None:
    with services.serving(rpcserverip=host) as provider:
        with services.calling(provider) as users:
            controller = MprpcController()
            assert users.Login(REQUEST, controller=controller) == ANSWER
            assert controller.peer == provider.address
        port = int(provider.address.rpartition(":")[2])
        with MprpcChannel(MprpcConfig(rpcserverip=host, rpcserverport=port)) as channel:
            assert user_mprpc.UserServiceRpc_Stub(channel).Login(REQUEST) == ANSWER


def test_unix_address(tmp_path: Path) -> None:
    config = MprpcConfig(rpcserverip=f"unix:{tmp_path / 'socket'}")
    with services.serving(rpcserverip=config.rpcserverip) as provider:
        for target in (provider.address, config):
            with MprpcChannel(target) as channel:
                assert user_mprpc.UserServiceRpc_Stub(channel).Login(REQUEST) == ANSWER


@pytest.mark.parametrize("address", ["", "host", ":80", "host:", "host:x", "host:70000", "::1:80", "unix:", "h:-1"])
def test_what_is_no_address_is_told_at_once(address: str) -> None:
    with pytest.raises((ValueError, mprpc.ConfigError)):
        MprpcChannel(address)


def test_host_that_cant_be_looked_up_is_unavailable() -> None:
    with services.calling("no.such.host.invalid:80") as users, pytest.raises(Unavailable, match=r"no\.such\.host"):
        users.Login(REQUEST)


def test_configuration_without_a_port_is_told_at_once() -> None:
    with pytest.raises(mprpc.ConfigError, match="rpcserverport"):
        MprpcChannel(MprpcConfig())


def test_dialect_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="framed"):
        MprpcChannel("127.0.0.1:1", dialect="french")


# ---- ways to call ----


def test_wrong_request_is_a_type_error(provider: RpcProvider) -> None:
    with services.calling(provider) as users:
        wrong: Any
        for wrong in (user_pb2.RegisterRequest(), None, b"", {}):
            for controller in (None, MprpcController()):
                with pytest.raises(TypeError, match=r"UserServiceRpc\.Login takes a fixbug\.LoginRequest"):
                    users.Login(wrong, controller=controller)
        assert users.Login(REQUEST) == ANSWER


def test_controller_style_never_raises() -> None:
    slow = Slow()

    def login(request: Any, controller: Any) -> Any:
        if request.name == b"nobody":
            raise RpcError(Status.NOT_FOUND, "no such user")
        return slow(request, controller)

    with services.serving(login, max_payload=1000) as provider:
        with MprpcChannel(config_for(provider)) as channel:
            users, controller = user_mprpc.UserServiceRpc_Stub(channel), MprpcController()
            for name, timeout, status in (
                (b"nobody", None, Status.NOT_FOUND),
                (b"slow", 0.01, Status.DEADLINE_EXCEEDED),
                (b"x" * 2000, None, Status.RESOURCE_EXHAUSTED),
                (b"", None, Status.OK),
            ):
                response = users.Login(LoginRequest(name=name), timeout=timeout, controller=controller)
                assert controller.status is status
                assert (controller.failed(), controller.Failed()) == (bool(status), bool(status))
                assert (response == LoginResponse()) is bool(status)
                assert bool(controller.error_text()) is bool(status)
                assert controller.ErrorText() == controller.error_text()
                assert controller.peer == provider.address
            users.Register(user_pb2.RegisterRequest(), controller=controller)
            assert (controller.status, controller.not_run) == (Status.UNIMPLEMENTED, False)
            channel.close()
            assert users.Login(REQUEST, controller=controller) == LoginResponse()
            assert (controller.status, controller.not_run) == (Status.UNAVAILABLE, True)


def test_stub_of_protocs_generic_services() -> None:
    class Generic(legacy_pb2.Oracle):  # type: ignore[name-defined, misc]
        def Ask(self, controller: Any, request: Any, done: Any) -> None:
            if request.text == "fail":
                controller.SetFailed("as told")
            done(legacy_pb2.Answer(text=request.text * 2))

    served = RpcProvider()
    served.notify_service(Generic())
    with served, MprpcChannel(served.address) as channel:
        oracle, controller = legacy_pb2.Oracle_Stub(channel), MprpcController()
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        assert oracle.Ask(controller, legacy_pb2.Question(text="ha"), None).text == "haha"
        oracle.Ask(controller, legacy_pb2.Question(text="ho"), answers.put)
        assert answers.get(timeout=wire.PATIENCE).text == "hoho"
        assert oracle.Ask(None, legacy_pb2.Question(text="hm")).text == "hmhm"
        oracle.Ask(controller, legacy_pb2.Question(text="fail"), answers.put)
        assert answers.get(timeout=wire.PATIENCE) == legacy_pb2.Answer()
        assert controller.ErrorText() == "as told"
        with pytest.raises(RpcError, match="as told"):
            oracle.Ask(None, legacy_pb2.Question(text="fail"))


def test_stub_without_generated_code(provider: RpcProvider) -> None:
    with MprpcChannel(provider.address) as channel:
        users = mprpc.stub(USER, channel)
        assert users.Login(REQUEST) == ANSWER
        with pytest.raises(Unimplemented):
            users.Register(user_pb2.RegisterRequest())
        assert not hasattr(users, "Logout")


def test_error_carries_what_the_handler_said() -> None:
    def login(request: Any, controller: Any) -> Any:
        raise RpcError(Status.NOT_FOUND, "niemand da: ÿ", details=b"\x08\x05")

    with services.serving(login) as provider, services.calling(provider) as users:
        with pytest.raises(NotFound) as raised:
            users.Login(REQUEST)
        error = raised.value
        assert (error.status, error.text, error.details) == (Status.NOT_FOUND, "niemand da: ÿ", b"\x08\x05")
        assert not error.not_run


# ---- signals, forks ----


def test_signal_whose_handler_returns_does_not_end_the_call() -> None:
    slow, signals = Slow(), []
    before = signal.signal(signal.SIGUSR1, lambda *_: signals.append(1))
    try:
        with services.serving(slow) as provider, services.calling(provider) as users:

            def interrupt() -> None:
                slow.wait()
                deadline = time.monotonic() + wire.PATIENCE
                while len(signals) < 3 and time.monotonic() < deadline:
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]
                    threading.Event().wait(0.01)
                slow.resolve()

            thread = threading.Thread(target=interrupt)
            thread.start()
            assert users.Login(LoginRequest(name=b"slow one"), timeout=60.0).result.errmsg == b"slow one"
            thread.join()
            assert len(signals) >= 3
    finally:
        signal.signal(signal.SIGUSR1, before)


INTERRUPTED = """
import threading, services, sys
with services.calling(sys.argv[1]) as users:
    def other():
        assert users.Login(services.LoginRequest(name=b"slow other"), timeout=60.0).result.errmsg == b"slow other"
    thread = threading.Thread(target=other)
    if sys.argv[2] == "waiter":
        thread.start()
        input()
    try:
        users.Login(services.LoginRequest(name=b"slow main"), timeout=60.0)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    for i in range(20):
        assert users.Login(services.LoginRequest(name=b"%d" % i)).result.errmsg == b"%d" % i
    print("goes on", flush=True)
    input()
    if thread.ident:
        thread.join()
print("done", flush=True)
"""


def wait_asleep(pid: int) -> None:
    """Returns when a process's main thread waits in a system call: a signal that comes before that ends no wait."""
    deadline = time.monotonic() + wire.PATIENCE
    while Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < deadline
        threading.Event().wait(0.001)


@pytest.mark.parametrize("role", ["reader", "waiter"])
def test_keyboard_interrupt_ends_a_call_and_no_more(role: str) -> None:
    slow = Slow()
    with services.serving(slow) as provider:
        with services.start_python(INTERRUPTED, provider.address, role) as process:
            try:
                if role == "waiter":
                    slow.wait()  # the other thread is in its call, so it reads
                    process.stdin.write("\n")  # type: ignore[union-attr]
                    process.stdin.flush()  # type: ignore[union-attr]
                slow.wait()
                wait_asleep(process.pid)
                process.send_signal(signal.SIGINT)
                assert line(process) == "interrupted", process.communicate()
                assert line(process) == "goes on", process.communicate()
                slow.resolve()
                assert process.communicate("\n", timeout=wire.PATIENCE) == ("done\n", "")
                assert process.returncode == 0
            finally:
                process.kill()


def test_unhandled_interrupt_ends_the_process_at_once() -> None:
    slow = Slow()
    program = "import services, sys\nwith services.calling(sys.argv[1]) as users:\n"
    program += '    users.Login(services.LoginRequest(name=b"slow"), timeout=600.0)\n'
    with services.serving(slow) as provider, services.start_python(program, provider.address) as process:
        slow.wait()
        wait_asleep(process.pid)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=wire.PATIENCE)
        assert error.strip().endswith("KeyboardInterrupt")
        assert process.returncode == -signal.SIGINT


FORKED = """
import os, threading, services, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks beside threads, which is what this is about
LoginRequest = services.LoginRequest
def check(users, who, count):
    for i in range(count):
        name = b"%s %d" % (who, i)
        assert users.Login(LoginRequest(name=name), timeout=30.0).result.errmsg == name
with services.calling(sys.argv[1]) as users:
    check(users, b"before", 3)
    threads = [threading.Thread(target=check, args=(users, b"thread %d" % i, 300)) for i in range(4)]
    for thread in threads:
        thread.start()
    children = []
    for child in range(5):
        pid = os.fork()
        if pid == 0:
            check(users, b"child %d" % child, 50)
            os._exit(0)
        children.append(pid)
        check(users, b"parent", 50)
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0
    for thread in threads:
        thread.join()
    check(users, b"after", 3)
print("done")
"""


def test_fork_with_a_live_channel() -> None:
    with services.serving(loops=2) as provider:
        with services.start_python(FORKED, provider.address) as process:
            out, error = process.communicate(timeout=60)
            assert (process.returncode, out, error) == (0, "done\n", "")
        assert accepted(provider) == 6


# ---- providers that misbehave ----


def answer(peer: wire.Peer, payload: bytes | None = None, **fields: Any) -> Any:
    """Answers the next request; its header."""
    header, arguments = peer.frame()
    if payload is None:
        payload = services.accept(LoginRequest.FromString(arguments), None).SerializeToString()
    peer.send(wire.response(header.call_id, payload, **fields))
    return header


def until_end(peer: wire.Peer) -> None:
    with contextlib.suppress(ConnectionError):
        assert peer.rest() == b""


def test_request_on_the_wire() -> None:
    seen: list[Any] = []

    def serve(peer: wire.Peer) -> None:
        for _ in range(3):
            seen.append(answer(peer))
        until_end(peer)

    with wire.FakeProvider(serve) as fake, services.calling(fake.address) as users:
        for timeout in (5.0, 0.9995, 60.0):
            assert users.Login(REQUEST, timeout=timeout) == ANSWER
    assert [header.call_id for header in seen] == [1, 2, 3]
    for header, limit in zip(seen, (5000, 1000, 60_000), strict=True):
        assert (header.service_name, header.method_name) == (b"fixbug.UserServiceRpc", b"Login")
        assert limit - 900 < header.timeout_ms <= limit
        assert (header.kind, header.status, header.attempt, len(header.metadata)) == (0, 0, 0, 0)


def test_response_byte_by_byte() -> None:
    def serve(peer: wire.Peer) -> None:
        header, _ = peer.frame()
        for byte in wire.response(header.call_id, ANSWER.SerializeToString()):
            peer.send(bytes([byte]))
        answer(peer)
        until_end(peer)

    with wire.FakeProvider(serve) as fake, services.calling(fake.address) as users:
        assert users.Login(REQUEST) == ANSWER
        assert users.Login(REQUEST) == ANSWER


def test_responses_that_nobody_asked_for_are_dropped() -> None:
    def serve(peer: wire.Peer) -> None:
        peer.send(wire.response(2**33, b"too early"))
        for _ in range(3):
            header, _ = peer.frame()
            for call_id in (header.call_id + 1, header.call_id + 16, 2**64 - 1, 2**40):
                peer.send(wire.response(call_id, b"nobody's"))
            peer.send(wire.frame(kind=7, call_id=1) + wire.frame(b"x", kind=40, call_id=1))
            peer.send(wire.response(header.call_id, ANSWER.SerializeToString()) * 3)
        until_end(peer)

    with wire.FakeProvider(serve) as fake, services.calling(fake.address) as users:
        for _ in range(3):
            assert users.Login(REQUEST) == ANSWER


@pytest.mark.parametrize(
    ("garbage", "why"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "its first bytes are no frame"),
        (b"\xff" * 100, "its first bytes are no frame"),
        (b"\x16\x03\x01\x02\x00\x01", "TLS"),
        (b"\x02\x00\x00\x00\x1b\x00", "wrong wire type"),
        (b"\x0b\x00\x00\x00\x18" + b"\xff" * 10, "varint"),
        (wire.frame(kind=1), "without the call_id"),
        (wire.response(1, args_size=2**32 - 1), "far over the limit"),
    ],
    ids=["HTTP", "noise", "TLS", "wire type", "varint", "no call_id", "huge"],
)
def test_garbage_fails_its_calls_and_the_next_connection_works(garbage: bytes, why: str) -> None:
    def lie(peer: wire.Peer) -> None:
        peer.frame()
        peer.send(garbage)
        until_end(peer)

    def serve(peer: wire.Peer) -> None:
        answer(peer)
        until_end(peer)

    with wire.FakeProvider(lie, serve) as fake, services.calling(fake.address) as users:
        with pytest.raises(Unavailable, match=why) as raised:
            users.Login(REQUEST)
        assert fake.address in raised.value.text
        assert not raised.value.not_run
        assert users.Login(REQUEST) == ANSWER


def test_end_in_the_middle_is_unavailable_and_not_sent_again() -> None:
    def leave(peer: wire.Peer) -> None:
        header, _ = peer.frame()
        peer.send(wire.response(header.call_id, ANSWER.SerializeToString())[:-1])

    def reset(peer: wire.Peer) -> None:
        peer.frame()
        peer.reset()

    def serve(peer: wire.Peer) -> None:
        answer(peer)
        until_end(peer)

    with wire.FakeProvider(leave, reset, serve) as fake, services.calling(fake.address) as users:
        for why in ("the provider ended the connection", "Connection reset by peer"):
            with pytest.raises(Unavailable, match=why) as raised:
                users.Login(REQUEST)
            assert not raised.value.not_run
        assert users.Login(REQUEST) == ANSWER


@pytest.mark.parametrize(
    ("payload", "fields", "kind", "text"),
    [
        (b"\xff\xff", {}, Internal, "the response is no fixbug.LoginResponse"),
        (b"", {"status": 99, "error_text": "of the future"}, RpcError, "of the future"),
        (b"", {"status": 14, "error_text": "full"}, Unavailable, "full"),
        (b"", {"status": 5, "error_text": "line\nline"}, NotFound, "line\nline"),
        (b"x", {"compression": 1}, Unimplemented, "compressed"),
    ],
    ids=["not parsable", "unknown status", "unavailable", "two lines", "compressed"],
)
def test_answers_that_are_no_success(payload: bytes, fields: Any, kind: type[RpcError], text: str) -> None:
    def serve(peer: wire.Peer) -> None:
        answer(peer, payload, **fields)
        answer(peer)
        until_end(peer)

    with wire.FakeProvider(serve) as fake, services.calling(fake.address) as users:
        with pytest.raises(kind) as raised:
            users.Login(REQUEST)
        assert text in raised.value.text
        assert type(raised.value) is kind
        assert users.Login(REQUEST) == ANSWER  # on the same connection


def test_unparsable_response_in_controller_style() -> None:
    def serve(peer: wire.Peer) -> None:
        answer(peer, b"\xff\xff")
        until_end(peer)

    with wire.FakeProvider(serve) as fake, services.calling(fake.address) as users:
        controller = MprpcController()
        assert users.Login(REQUEST, controller=controller) == LoginResponse()
        assert controller.status is Status.INTERNAL


def test_goaway_lets_accepted_calls_finish_and_the_rest_go_elsewhere() -> None:
    both = threading.Event()

    def leave(peer: wire.Peer) -> None:
        first, _ = peer.frame()
        both.set()
        _, arguments = peer.frame()
        peer.send(wire.frame(kind=GOAWAY, call_id=first.call_id))
        assert LoginRequest.FromString(arguments).name == b"second"
        peer.send(wire.response(first.call_id, OK.SerializeToString()))
        until_end(peer)

    def serve(peer: wire.Peer) -> None:
        answer(peer)
        answer(peer)
        until_end(peer)

    with wire.FakeProvider(leave, serve) as fake, ThreadPoolExecutor(1) as pool:
        with services.calling(fake.address) as users:
            call = pool.submit(users.Login, LoginRequest(name=b"first"), 20.0)
            assert both.wait(wire.PATIENCE)
            assert users.Login(LoginRequest(name=b"second"), timeout=20.0).result.errmsg == b"second"
            assert call.result(wire.PATIENCE) == OK
            assert users.Login(REQUEST) == ANSWER


def test_goaway_while_idle_makes_the_next_call_connect_anew() -> None:
    def leave(peer: wire.Peer) -> None:
        header = answer(peer)
        peer.send(wire.frame(kind=GOAWAY, call_id=header.call_id))
        told.set()
        peer.rest()  # which may be a request that has crossed with GOAWAY

    def serve(peer: wire.Peer) -> None:
        answer(peer)
        until_end(peer)

    told = threading.Event()
    with wire.FakeProvider(leave, serve) as fake, services.calling(fake.address) as users:
        assert users.Login(REQUEST) == ANSWER
        assert told.wait(wire.PATIENCE)
        assert users.Login(REQUEST) == ANSWER


def test_idle_channel_that_hears_goaway_ends_its_side() -> None:
    ended = threading.Event()

    def leave(peer: wire.Peer) -> None:
        header = answer(peer)
        peer.send(wire.frame(kind=GOAWAY, call_id=header.call_id))
        until_end(peer)
        ended.set()

    with wire.FakeProvider(leave) as fake, services.calling(fake.address) as users:
        assert users.Login(REQUEST) == ANSWER
        assert ended.wait(wire.PATIENCE)


def test_last_call_that_times_out_after_goaway_ends_the_connection() -> None:
    ended = threading.Event()

    def leave(peer: wire.Peer) -> None:
        header, _ = peer.frame()
        peer.send(wire.frame(kind=GOAWAY, call_id=header.call_id))
        until_end(peer)
        ended.set()

    with wire.FakeProvider(leave) as fake, services.calling(fake.address) as users:
        with pytest.raises(DeadlineExceeded):
            users.Login(REQUEST, timeout=0.05)
        assert ended.wait(wire.PATIENCE)


def test_idle_channel_answers_pings() -> None:
    ponged = threading.Event()

    def serve(peer: wire.Peer) -> None:
        answer(peer)
        peer.send(wire.frame(b"idle?", kind=PING, call_id=4))
        assert peer.frame()[1] == b"idle?"
        ponged.set()
        until_end(peer)

    with wire.FakeProvider(serve) as fake, services.calling(fake.address) as users:
        assert users.Login(REQUEST) == ANSWER
        assert ponged.wait(wire.PATIENCE)


def test_channel_answers_pings_beside_its_calls() -> None:
    def serve(peer: wire.Peer) -> None:
        header, _ = peer.frame()
        peer.send(wire.frame(b"there?", kind=PING, call_id=3))
        pong, payload = peer.frame()
        assert (pong.kind, pong.call_id, payload) == (PONG, 3, b"there?")
        peer.send(wire.response(header.call_id, ANSWER.SerializeToString()))
        until_end(peer)

    with wire.FakeProvider(serve) as fake, services.calling(fake.address) as users:
        assert users.Login(REQUEST) == ANSWER


def test_provider_that_does_not_read_does_not_hold_the_deadline() -> None:
    done = threading.Event()
    with wire.FakeProvider(lambda peer: done.wait(wire.PATIENCE)) as fake, services.calling(fake.address) as users:
        before = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            users.Login(LoginRequest(name=bytes(50 << 20)), timeout=0.2)
        assert time.monotonic() - before < 10.0  # copying 50 MB is all that may take long
        with pytest.raises(DeadlineExceeded):
            users.Login(REQUEST, timeout=0.05)
        done.set()


def test_half_sent_request_is_finished_by_the_next_call() -> None:
    """A deadline in the middle of a large frame must not leave a torn frame on a connection that others use."""
    name = os.urandom(1 << 20) * 20
    gate = threading.Event()

    def serve(peer: wire.Peer) -> None:
        gate.wait(wire.PATIENCE)
        header, arguments = peer.frame()
        assert LoginRequest.FromString(arguments).name == name
        peer.send(wire.response(header.call_id, b"late"))
        answer(peer)
        until_end(peer)

    with wire.FakeProvider(serve) as fake, services.calling(fake.address) as users:
        with pytest.raises(DeadlineExceeded):
            users.Login(LoginRequest(name=name), timeout=0.1)
        gate.set()
        assert users.Login(REQUEST, timeout=20.0) == ANSWER


def test_provider_goes_while_others_wait() -> None:
    """Each of many waiters hears of the end, not only the one who reads."""
    taken = threading.Semaphore(0)

    def leave(peer: wire.Peer) -> None:
        for _ in range(32):
            peer.frame()
        taken.release()

    with wire.FakeProvider(leave) as fake, ThreadPoolExecutor(32) as pool:
        with services.calling(fake.address) as users:
            calls = [pool.submit(users.Login, REQUEST, 20.0) for _ in range(32)]
            for call in calls:
                assert isinstance(call.exception(wire.PATIENCE), Unavailable)


# ---- weights and overrides ----


def peers(users: Any, calls: int) -> Counter[str]:
    controller, found = mprpc.MprpcController(), Counter[str]()
    for _ in range(calls):
        assert users.Login(REQUEST, controller=controller) == ANSWER
        found[controller.peer] += 1
    return found


def test_weights_and_overrides_are_honoured_without_a_restart() -> None:
    with EmbeddedZooKeeper(clock=Clock()) as zookeeper, contextlib.ExitStack() as stack:
        host, _, port = zookeeper.hosts.partition(":")
        config = MprpcConfig(zookeeperip=host, zookeeperport=int(port), balancer="round_robin", slow_start=0.0)
        keys: dict[str, Any] = {"zookeeperip": host, "zookeeperport": int(port)}
        light = stack.enter_context(services.serving(**keys))
        heavy = stack.enter_context(services.serving(**keys, weight=3.0))
        assert light.wait_registered(wire.PATIENCE)
        assert heavy.wait_registered(wire.PATIENCE)
        users = user_mprpc.UserServiceRpc_Stub(stack.enter_context(mprpc.MprpcChannel(config)))
        users.Login(REQUEST)
        assert peers(users, 40) == {light.address: 10, heavy.address: 30}

        def soon(wanted: dict[str, int], service: str = "fixbug.UserServiceRpc", **override: Any) -> None:
            set_override(config, service, heavy.address, Override(**override))
            deadline = time.monotonic() + wire.PATIENCE
            while peers(users, 4) != wanted:
                assert time.monotonic() < deadline, wanted

        soon({light.address: 2, heavy.address: 2}, weight=1.0)
        soon({light.address: 4}, disabled=True)
        soon({light.address: 1, heavy.address: 3})
        soon({light.address: 4}, weight=0.0)


def test_a_retry_keeps_the_first_attempts_deadline() -> None:
    """It began anew with the whole timeout when the connection had ended."""

    with services.serving() as provider, services.calling(provider) as users:
        assert users.Login(REQUEST) == ANSWER
        call, seen = users.Login, []
        endpoint = call._target.next()
        lib.mprpc_link_close(endpoint.link.handle)
        call._go_round = lambda payload, deadline, controller: seen.append(deadline) or ANSWER
        error_of, ended = call._error, []
        call._error = lambda *arguments: ended.append(time.monotonic_ns()) or error_of(*arguments)
        before = time.monotonic_ns()
        assert call(REQUEST, timeout=2.0) == ANSWER
        assert before + 2e9 <= seen[0].deadline <= ended[0] + 2e9


def test_wait_ready_keeps_no_connection_to_a_classic_endpoint() -> None:
    """It kept one, over which the next call was made in the framed dialect."""
    with services.serving() as provider, services.calling(provider, dialect="classic") as users:
        users.Login._channel.wait_ready(wire.PATIENCE)
        assert users.Login._target.next().link is None
        assert users.Login(REQUEST) == ANSWER
