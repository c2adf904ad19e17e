"""Handlers that take long: they hold up nobody, and end like all others. Then the crew in C, under the sanitizers."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

import mprpc
import services
import wire
from generated import ROOT
from mprpc import NotFound, RpcProvider, Status
from services import LoginRequest, LoginResponse
from test_sanitizers import SECONDS, Build, build, runs

__all__ = ["build"]

CREW = [ROOT / "mprpc" / name for name in ("_crew.c", "_fork.c")]
PATIENCE = wire.PATIENCE
OK = LoginResponse(success=True)
COUNT = 20


class Gate:
    """A Login that is held up, for requests named so, until it is opened; all others return at once."""

    def __init__(self, end: Callable[[Any, Any], Any] = services.accept) -> None:
        self.entered = threading.Semaphore(0)
        self.opened = threading.Event()
        self.threads: list[str] = []
        self._end = end

    def __call__(self, request: Any, controller: Any) -> Any:
        if not request.name.startswith(b"held"):
            return services.accept(request, controller)
        self.threads.append(threading.current_thread().name)
        self.entered.release()
        assert self.opened.wait(PATIENCE)
        return self._end(request, controller)

    def enters(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.entered.acquire(timeout=PATIENCE)


class Declared(Gate):
    @mprpc.blocking
    def __call__(self, request: Any, controller: Any) -> Any:
        return super().__call__(request, controller)


class Blocking(services.Users):
    @mprpc.blocking
    def Login(self, request: Any, controller: Any) -> Any:
        return super().Login(request, controller)


@contextlib.contextmanager
def serving(gate: Gate, declared: bool, **keys: Any) -> Iterator[RpcProvider]:
    """declared: the handler is known to take long; else it is found out while it runs."""
    provider = RpcProvider(mprpc.MprpcConfig(**keys))
    provider.notify_service(Blocking(gate) if declared else services.Users(gate))
    provider.start()
    try:
        yield provider
    finally:
        gate.opened.set()
        provider.stop(0.5)


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"never came true: {what}"
        threading.Event().wait(0.002)


def crew(provider: RpcProvider) -> Any:
    assert provider._crew is not None
    return provider._crew.statistics()


either_way = pytest.mark.parametrize("declared", [False, True], ids=["surprise", "declared"])


# ---- nobody is held up ----


@either_way
def test_others_are_served_while_a_handler_is_held_up(declared: bool) -> None:
    gate = Gate()
    with serving(gate, declared) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"held"))
        gate.enters()
        for i in range(2, 200):
            peer.send(wire.login(i))
            assert peer.frame()[0].call_id == i
        gate.opened.set()
        header, payload = peer.frame()
        assert (header.call_id, header.status) == (1, Status.OK)
        assert payload == services.accept(LoginRequest(name=b"held"), None).SerializeToString()


@either_way
def test_a_surprise_in_the_middle_of_a_batch(declared: bool) -> None:
    """What came before it is answered, and what comes after it: each once, with its own arguments."""
    gate = Gate()
    with serving(gate, declared) as provider, wire.connect(provider.address) as peer:
        names = [b"held" if i in (7, 11, 15) else b"number %d" % i for i in range(COUNT)]
        peer.send(b"".join(wire.login(i + 1, name) for i, name in enumerate(names)))
        gate.enters(3)
        answers = dict(received(peer) for _ in range(COUNT - 3))
        assert not answers.keys() & {8, 12, 16}
        gate.opened.set()
        answers |= dict(received(peer) for _ in range(3))
        assert answers == {i + 1: name for i, name in enumerate(names)}
        peer.finish()
        assert peer.rest() == b""


def received(peer: wire.Peer) -> tuple[int, bytes]:
    header, payload = peer.frame()
    assert header.status == Status.OK
    return header.call_id, LoginResponse.FromString(payload).result.errmsg


@pytest.mark.parametrize("loops", [1, 2])
def test_a_handler_calls_its_own_provider(loops: int) -> None:
    """The first call too, which nobody knows yet to take long, and three deep."""

    def login(request: Any, controller: Any) -> Any:
        if request.name:
            return users.Login(LoginRequest(name=request.name[1:]), timeout=PATIENCE)
        return services.accept(request, controller)

    with services.serving(login, loops=loops) as provider, services.calling(provider) as users:
        assert users.Login(LoginRequest(name=b"xxx"), timeout=PATIENCE).success


def test_a_large_request_keeps_its_arguments_while_others_come() -> None:
    gate = Gate()
    with serving(gate, False) as provider, wire.connect(provider.address) as peer:
        name = b"held" + b"x" * 300_000
        peer.send(wire.login(1, name))
        gate.enters()
        for i in range(2, 30):
            peer.send(wire.login(i, b"y" * 100_000))
            assert received(peer) == (i, b"y" * 100_000)
        gate.opened.set()
        assert received(peer) == (1, name)


def test_a_computing_handler_ends_and_lets_others_run() -> None:
    """It has the interpreter's lock: the others get it now and then."""

    def login(request: Any, controller: Any) -> Any:
        end = time.monotonic() + 0.3
        while request.name == b"compute" and time.monotonic() < end:
            pass
        return services.accept(request, controller)

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(b"".join(wire.login(i, b"compute" if i % 4 == 1 else b"fast") for i in range(1, 13)))
        answers = [received(peer) for _ in range(12)]
    assert sorted(answers) == [(i, b"compute" if i % 4 == 1 else b"fast") for i in range(1, 13)]


def test_a_classic_caller_is_held_up_alone() -> None:
    gate = Gate()
    with serving(gate, False) as provider, wire.connect(provider.address) as held:
        held.send(wire.classic_login(b"held"))
        gate.enters()
        with wire.connect(provider.address) as peer:
            peer.send(wire.login(1))
            assert peer.frame()[0].call_id == 1
        gate.opened.set()
        assert LoginResponse.FromString(held.rest()).result.errmsg == b"held"


# ---- which methods take long ----


def test_a_method_that_took_long_twice_gets_threads_of_its_own_until_it_is_fast_again() -> None:
    gate = Gate()
    names: dict[str, list[str]] = {"Login": [], "Register": []}

    class Both(services.Users):
        def Login(self, request: Any, controller: Any) -> Any:
            names["Login"].append(threading.current_thread().name)
            return gate(request, controller)

        def Register(self, request: Any, controller: Any) -> Any:
            names["Register"].append(threading.current_thread().name)
            return services.user_pb2.RegisterResponse(success=True)

    provider = RpcProvider()
    provider.notify_service(Both())
    with provider, services.calling(provider) as users:
        for number in (1, 2, 2):  # the third is no surprise
            gate.opened.clear()
            calling = users.Login.future(LoginRequest(name=b"held"), timeout=PATIENCE)
            gate.enters()
            wait_until(lambda wanted=number: crew(provider).relieved == wanted, "the leader is relieved")
            gate.opened.set()
            assert calling.result().success

        def is_on_the_loops_thread() -> bool:
            assert users.Login(services.REQUEST).success
            assert users.Register(services.user_pb2.RegisterRequest()).success
            return names["Login"][-1] == names["Register"][-1]

        names["Login"].clear()
        wait_until(is_on_the_loops_thread, "the method comes back")
        assert 10 < len(names["Login"]) < 1000


def test_a_declared_method_never_runs_on_a_loops_thread() -> None:
    gate = Gate()
    with serving(gate, True) as provider, services.calling(provider) as users:
        for _ in range(50):
            assert users.Login(services.REQUEST).success
        assert crew(provider).relieved == 0
        calls = [users.Login.future(LoginRequest(name=b"held"), timeout=PATIENCE) for _ in range(COUNT)]
        gate.enters(COUNT)
        assert len(set(gate.threads)) == COUNT
        gate.opened.set()
        assert all(call.result().success for call in calls)
        assert crew(provider).relieved == 0


# ---- the bounds ----


def test_past_the_threads_calls_queue_and_past_the_queue_they_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    with serving(gate, True, handler_threads=4, max_queued=16) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"held"))
        gate.enters()
        peer.send(b"".join(wire.login(i, b"held") for i in range(2, 5)))
        gate.enters(3)
        peer.send(b"".join(wire.login(i, b"held") for i in range(5, 101)))
        refused = [peer.frame()[0] for _ in range(80)]
        assert {(each.status, each.not_run) for each in refused} == {(Status.RESOURCE_EXHAUSTED, True)}
        assert "handler_threads" in refused[0].error_text
        seen = provider.statistics()
        assert (seen.beside, seen.queued, seen.relieved) == (4, 16, 0)
        gate.opened.set()
        answers = [peer.frame()[0] for _ in range(20)]
        assert {each.status for each in answers} == {Status.OK}
        assert len({each.call_id for each in refused + answers}) == 100
        assert crew(provider).members <= 1 + 4 + 1
    assert "fixbug.UserServiceRpc.Login refuses a call: no thread is free" in caplog.text


def test_surprises_past_the_threads_hold_up_their_loop_only_until_one_is_free() -> None:
    gate = Gate()
    with serving(gate, False, handler_threads=1) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"held"))
        gate.enters()
        peer.send(wire.login(2, b"held"))
        gate.enters()
        peer.send(wire.login(3))
        assert crew(provider).busy == 1
        gate.opened.set()
        assert {received(peer)[0] for _ in range(3)} == {1, 2, 3}


def test_without_a_thread_more_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The process may have as many threads as it can: the one that stood by goes on alone."""
    gate = Gate()

    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with serving(gate, False) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1))
        assert peer.frame()[0].call_id == 1
        monkeypatch.setattr("mprpc.crew._Thread.start", start)
        peer.send(wire.login(2, b"held"))
        gate.enters()
        peer.send(wire.login(3))
        assert received(peer) == (3, b"zhang san")
        gate.opened.set()
        assert received(peer) == (2, b"held")
        assert crew(provider).members == 2
    assert "no thread can be started for handlers that take long: can't start new thread" in caplog.text


def test_a_queued_call_whose_time_is_up_is_not_run() -> None:
    gate = Gate()
    with serving(gate, True, handler_threads=1) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"held"))
        gate.enters()
        peer.send(wire.login(2, b"held late", timeout_ms=20) + wire.login(3, timeout_ms=60_000))
        wait_until(lambda: crew(provider).queued == 2, "both wait")
        threading.Event().wait(0.03)  # until the deadline has passed, which nobody tells of
        gate.opened.set()
        answers = {header.call_id: header for header, _ in (peer.frame() for _ in range(3))}
        assert (answers[2].status, answers[2].not_run) == (Status.DEADLINE_EXCEEDED, True)
        assert (answers[1].status, answers[3].status) == (Status.OK, Status.OK)
        assert len(gate.threads) == 1


def test_a_queued_call_that_was_cancelled_is_not_run() -> None:
    gate = Gate()
    with serving(gate, True, handler_threads=1) as provider, services.calling(provider) as users:
        first = users.Login.future(LoginRequest(name=b"held"), timeout=PATIENCE)
        gate.enters()
        second = users.Login.future(LoginRequest(name=b"held"), timeout=PATIENCE)
        wait_until(lambda: crew(provider).queued == 1, "the second waits")
        second.cancel()
        assert users.Login.future(services.REQUEST, timeout=PATIENCE) is not None
        wait_until(lambda: crew(provider).queued == 2, "CANCEL has come, since what was sent after it has")
        gate.opened.set()
        assert first.result().success
        wait_until(lambda: crew(provider).busy == 0, "all have ended")
    assert len(gate.threads) == 1


# ---- what a handler knows of its call ----


@either_way
def test_the_controller_knows_its_call(declared: bool) -> None:
    known: list[Any] = []

    def end(request: Any, controller: Any) -> Any:
        known.append((controller.peer, controller.time_remaining(), controller.is_canceled()))
        return OK

    gate = Gate(end)
    with serving(gate, declared) as provider, wire.connect(provider.address) as peer:
        mine = "{}:{}".format(*peer.socket.getsockname())
        peer.send(wire.login(1, b"held", timeout_ms=50_000))
        gate.enters()
        if not declared:
            wait_until(lambda: crew(provider).relieved, "the leader is relieved")
        gate.opened.set()
        assert peer.frame()[0].status == Status.OK
    ((who, left, canceled),) = known
    assert (who, canceled) == (mine, False)
    assert 30 < left <= 50


def test_a_controller_that_is_asked_all_the_time() -> None:
    """Every question takes the loop back for a moment; in between the leader is relieved all the same."""
    stop = threading.Event()
    told = set()

    def login(request: Any, controller: Any) -> Any:
        while request.name == b"asks" and not stop.is_set():
            told.add((controller.peer, controller.time_remaining() is None))
            stop.wait(0.0001)
        return OK

    with services.serving(login) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"asks"))
        peer.send(wire.login(2))
        assert peer.frame()[0].call_id == 2
        stop.set()
        assert peer.frame()[0].call_id == 1
        assert told == {("{}:{}".format(*peer.socket.getsockname()), True)}


@either_way
@pytest.mark.parametrize("how", ["cancel", "gone"])
def test_cancelling_is_heard(declared: bool, how: str) -> None:
    heard = threading.Semaphore(0)
    canceled: list[bool] = []

    def login(request: Any, controller: Any) -> Any:
        controller.notify_on_cancel(heard.release)
        return gate(request, controller)

    def end(request: Any, controller: Any) -> Any:
        canceled.append(controller.is_canceled())
        return OK

    gate = Gate(end)
    provider = RpcProvider()
    provider.notify_service(Blocking(login) if declared else services.Users(login))
    with provider, wire.connect(provider.address) as other:
        with wire.connect(provider.address) as peer:
            peer.send(wire.login(1, b"held"))
            gate.enters()
            if how == "cancel":
                peer.send(wire.frame(b"", call_id=1, kind=wire.rpcheader_pb2.CANCEL))
                assert heard.acquire(timeout=PATIENCE)
        assert how == "cancel" or heard.acquire(timeout=PATIENCE)
        gate.opened.set()
        other.send(wire.login(1))
        assert other.frame()[0].call_id == 1
        wait_until(lambda: canceled, "the handler returns")
    assert canceled == [True]
    assert not heard.acquire(blocking=False)


# ---- how they end ----


def _raise(error: BaseException) -> Any:
    raise error


def _fail(controller: Any) -> Any:
    controller.set_failed("said so", Status.ABORTED)
    return OK


def resolved_elsewhere(answer: Any) -> Future[Any]:
    future: Future[Any] = Future()
    threading.Thread(target=lambda: future.set_result(answer)).start()
    return future


async def awaited(answer: Any) -> Any:
    return answer


@either_way
@pytest.mark.parametrize(
    ("end", "status", "text"),
    [
        (lambda _: OK, Status.OK, ""),
        (lambda _: _raise(NotFound("no such user")), Status.NOT_FOUND, "no such user"),
        (lambda _: _raise(KeyError("secret")), Status.INTERNAL, "the handler raised KeyError"),
        (lambda _: _raise(SystemExit()), Status.INTERNAL, "the handler raised SystemExit"),
        (_fail, Status.ABORTED, "said so"),
        (lambda _: b"no message", Status.INTERNAL, "the handler returned no response of its method's type"),
        (lambda _: resolved_elsewhere(OK), Status.OK, ""),
        (lambda _: awaited(OK), Status.OK, ""),
        (
            lambda _: LoginResponse(result={"errmsg": b"x" * 2000}),
            Status.RESOURCE_EXHAUSTED,
            "the response has 2006 bytes, max_payload allows 1000",
        ),
    ],
    ids=["response", "error", "exception", "exit", "set_failed", "wrong type", "future", "coroutine", "too large"],
)
def test_it_ends_like_any_other(declared: bool, end: Any, status: Status, text: str) -> None:
    gate = Gate(lambda request, controller: end(controller))
    with serving(gate, declared, max_payload=1000) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"held"))
        gate.enters()
        if not declared:
            wait_until(lambda: crew(provider).relieved, "the leader is relieved")
        gate.opened.set()
        header, payload = peer.frame()
        assert (header.call_id, header.status, header.error_text) == (1, status, text)
        assert payload == (OK.SerializeToString() if status is Status.OK else b"")
        peer.send(wire.login(2))
        assert peer.frame()[0].call_id == 2


def test_arguments_of_a_declared_method_that_are_none() -> None:
    with serving(Gate(), True) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.request(1, *wire.LOGIN, b"\xff"))
        header, _ = peer.frame()
        assert (header.status, header.error_text) == (
            Status.INVALID_ARGUMENT,
            "the arguments are no fixbug.LoginRequest",
        )


@either_way
def test_stop_is_bounded_whatever_handlers_do(declared: bool, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    with serving(gate, declared) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"held") + wire.login(2, b"held"))
        gate.enters(2)
        before = time.monotonic()
        provider.stop(0.1)
        assert time.monotonic() - before < 3.0
        assert peer.frame()[0].kind == wire.rpcheader_pb2.GOAWAY
        assert peer.rest() == b""
    assert "has not returned, its thread is left behind" in caplog.text


@either_way
def test_stop_lets_them_finish(declared: bool, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()
    caplog.set_level(logging.ERROR)
    with serving(gate, declared) as provider, wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"held"))
        gate.enters()
        stopping = threading.Thread(target=provider.stop, args=(PATIENCE,))
        stopping.start()
        assert peer.frame()[0].kind == wire.rpcheader_pb2.GOAWAY
        gate.opened.set()
        assert received(peer) == (1, b"held")
        assert peer.rest() == b""
        peer.close()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()
    assert not caplog.records
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mprpc-crew")]


@pytest.mark.parametrize("loops", [1, 3])
def test_a_crowd_of_all_kinds(loops: int) -> None:
    """Each answer is its caller's own, and nothing is left of the calls."""

    def login(request: Any, controller: Any) -> Any:
        kind = bytes(request.name).partition(b" ")[0]
        if kind in (b"waits", b"raises", b"future", b"async"):
            threading.Event().wait(0.005)
        if kind == b"computes":
            end = time.monotonic() + 0.005
            while time.monotonic() < end:
                pass
        if kind == b"nested":
            return users.Login(LoginRequest(name=b"fast" + request.name[6:]), timeout=PATIENCE)
        if kind == b"raises":
            raise NotFound(request.name.decode())
        answer = services.accept(request, controller)
        return resolved_elsewhere(answer) if kind == b"future" else awaited(answer) if kind == b"async" else answer

    def call(number: int) -> None:
        with services.calling(provider) as mine:
            for turn in range(6):
                for kind in (
                    "fast",
                    "waits",
                    "fast",
                    "computes",
                    "raises",
                    "fast",
                    "future",
                    "async",
                    "nested",
                    "fast",
                ):
                    text = f"{kind} {number} {turn}"
                    try:
                        got = mine.Login(LoginRequest(name=text.encode()), timeout=PATIENCE).result.errmsg.decode()
                    except NotFound as error:
                        got = error.text
                    wrong.extend([] if got == text.replace("nested", "fast") else [(text, got)])

    wrong: list[tuple[str, str]] = []
    with services.serving(login, loops=loops, handler_threads=24) as provider, services.calling(provider) as users:
        callers = [threading.Thread(target=call, args=(number,)) for number in range(12)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(3 * PATIENCE)
        assert not any(caller.is_alive() for caller in callers)
        wait_until(lambda: crew(provider).busy == 0, "all handlers have ended")
        assert [len(loop._detached) for loop in provider._loops] == [0] * loops
    assert wrong == []


PROGRAM = """
import threading, services
from mprpc import MprpcConfig, RpcProvider

started = threading.Semaphore(0)
def login(request, controller):
    started.release()
    threading.Event().wait()

provider = RpcProvider(MprpcConfig(drain_timeout=0.2))
provider.notify_service(services.Users(login))
provider.start()
def tell():
    for _ in range(4):
        started.acquire()
    print("held", flush=True)

threading.Thread(target=tell, daemon=True).start()
print(provider.address, flush=True)
provider.run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_process_whose_handlers_never_return(number: signal.Signals) -> None:
    with services.start_python(PROGRAM) as process:
        assert process.stdout is not None
        with wire.connect(process.stdout.readline().strip()) as peer:
            peer.send(b"".join(wire.login(i) for i in range(1, 5)))
            assert process.stdout.readline() == "held\n"
            before = time.monotonic()
            process.send_signal(number)
            process.communicate(timeout=PATIENCE)
            assert time.monotonic() - before < 5.0
    assert process.returncode == 0


def test_a_handler_may_fork(capfd: pytest.CaptureFixture[str]) -> None:
    """The child has none of the threads: it ends with its handler, and stop() there waits for nobody.

    Nor do libraries: libuv's destructor, for one, joins threads that only the parent has.
    """
    with contextlib.suppress(ImportError):
        uvloop = importlib.import_module("uvloop")
        loop = uvloop.new_event_loop()
        loop.run_until_complete(loop.getaddrinfo("localhost", 80))
        loop.close()
    codes: list[int] = []

    def login(request: Any, controller: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks beside threads
            child = os.fork()
        if child == 0 and request.name == b"stops":
            before = time.monotonic()
            provider.stop(10.0)
            os._exit(7 if time.monotonic() - before < 5.0 else 8)
        if child:
            codes.append(ends(child))
        return services.accept(request, controller)

    with services.serving(login) as provider, services.calling(provider) as users:
        for name in (b"stops", b"returns"):
            assert users.Login(LoginRequest(name=name), timeout=PATIENCE).success
    assert codes == [7, 0]
    assert capfd.readouterr().err == ""


def ends(child: int) -> int:
    """Its exit code."""
    deadline = time.monotonic() + PATIENCE / 2
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        threading.Event().wait(0.005)
    return os.waitstatus_to_exitcode(ended[1])


# ---- in C ----


@pytest.mark.parametrize("loops", ["1", "3"])
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "threads"])
def test_every_request_runs_once_and_is_answered_once(build: Build, memory: bool, loops: str) -> None:
    said = runs(build("crew", memory, *CREW), "1000", loops, "40")
    assert re.fullmatch(r"(\w+ [1-9]\d*(, )?){4}\n", said), said


def test_a_planted_stranded_batch_is_found(build: Build) -> None:
    """The watcher looks for a batch only before it says that it sleeps: one that begins in between is not seen."""
    program = build("crew", False, *CREW, plant="MPRPC_PLANT_STRANDED")
    ran = subprocess.run([program, "4000", "1", "5"], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ran.returncode != 0
    assert "stranded" in ran.stderr
