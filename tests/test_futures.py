"""Futures over real sockets: their ends, cancelling, deadlines, bounds, and the threads that see to them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import queue
import signal
import threading
import time
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import pytest

import held
import services
import wire
from held import named
from mprpc import (
    DeadlineExceeded,
    MprpcChannel,
    MprpcConfig,
    MprpcController,
    NotFound,
    ResourceExhausted,
    RpcError,
    Status,
    Unavailable,
)
from mprpc import futures as subject
from mprpc.fast import native
from mprpc.subchannel import Subchannel
from mprpc.testing import EmbeddedZooKeeper
from services import REQUEST

PATIENCE = wire.PATIENCE
LONG = 60.0  # seconds: a deadline that plays no part


def said(future: Any) -> bytes:
    return bytes(future.result(PATIENCE).result.errmsg)


def stays(condition: Any, seconds: float) -> bool:
    """Whether it holds for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not condition():
            return False
        threading.Event().wait(0.005)
    return True


def becomes(condition: Any) -> bool:
    """Whether it holds before patience ends."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        threading.Event().wait(0.005)
    return True


def reader_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith(("mprpc-reader", "mprpc-lane"))]


def config_of(provider: Any, **keys: Any) -> MprpcConfig:
    host, _, port = provider.address.rpartition(":")
    return MprpcConfig(rpcserverip=host, rpcserverport=int(port), **keys)


@contextlib.contextmanager
def configured(provider: Any, **keys: Any) -> Any:
    """A stub on a channel with a configuration."""
    with MprpcChannel(config_of(provider, **keys)) as channel:
        yield services.user_mprpc.UserServiceRpc_Stub(channel)


# ---- how they end ----


def test_an_answer() -> None:
    with services.serving() as provider, services.calling(provider) as users:
        for name in ("first", "second"):  # the first has to connect
            future = users.Login.future(named(name))
            assert isinstance(future, concurrent.futures.Future)
            assert said(future) == name.encode()
            assert future.done()
            assert not future.cancelled()
            assert future.exception() is None


def test_a_failure_is_the_future_s_exception() -> None:
    with services.serving(held.Held()) as provider, services.calling(provider) as users:
        for _ in range(2):
            future = users.Login.future(named("fail: nobody"))
            assert isinstance(future.exception(PATIENCE), NotFound)
            with pytest.raises(NotFound, match="fail: nobody"):
                future.result()


def test_each_gets_its_own_answer() -> None:
    with services.serving(loops=2) as provider, services.calling(provider) as users:
        flying = {users.Login.future(named(f"name {i}")): f"name {i}".encode() for i in range(3000)}
        for future in concurrent.futures.as_completed(flying, PATIENCE):
            assert said(future) == flying.pop(future)
        assert not flying


def test_wait_tells_what_is_done_and_what_is_not() -> None:
    with held.holding() as (holder, provider), services.calling(provider) as users:
        ready, waiting = users.Login.future(named("a")), users.Login.future(named("hold"))
        done, rest = concurrent.futures.wait([ready, waiting], PATIENCE, concurrent.futures.FIRST_COMPLETED)
        assert (done, rest) == ({ready}, {waiting})
        holder.taken()
        gone = users.Login.future(named("hold"))
        gone.cancel()
        assert concurrent.futures.wait([gone], PATIENCE).done == {gone}
        holder.release()
        assert said(waiting) == b"hold"


def test_a_request_of_another_class_is_a_type_error_at_once() -> None:
    with services.serving() as provider, services.calling(provider) as users:
        with pytest.raises(TypeError, match=r"takes a fixbug\.LoginRequest"):
            users.Login.future(services.user_pb2.RegisterRequest())


def test_a_request_over_the_limit_fails_its_future() -> None:
    with services.serving() as provider, configured(provider, max_payload=100) as users:
        for _ in range(2):
            future = users.Login.future(named("x" * 200))
            with pytest.raises(ResourceExhausted, match="max_payload"):
                future.result(PATIENCE)
            assert said(users.Login.future(named("small"))) == b"small"


def test_large_answers_and_small_ones() -> None:
    sizes = [10_000_000, 0, 70_000, 8192, 8193, 3_000_000, 1]
    with services.serving() as provider, services.calling(provider) as users:
        flying = [users.Login.future(named(bytes([size % 251]) * size), timeout=LONG) for size in sizes]
        assert [future.result(PATIENCE).result.errmsg for future in flying] == [
            bytes([size % 251]) * size for size in sizes
        ]


def test_requests_that_no_socket_buffer_holds_while_the_provider_sends_too() -> None:
    """Whoever waits to write also reads: else both sides wait for the other to take something."""
    with services.serving() as provider, services.calling(provider) as users:
        names = [bytes([i]) * 2_000_000 for i in range(12)]
        flying = [users.Login.future(named(name), timeout=LONG) for name in names]
        assert [said(future) for future in flying] == names


# ---- deadlines ----


def test_the_deadline_ends_a_call_and_leaves_the_connection() -> None:
    with held.holding() as (holder, provider), services.calling(provider) as users:
        assert said(users.Login.future(named("connects"))) == b"connects"
        start = time.monotonic()
        late, other = users.Login.future(named("hold"), timeout=0.1), users.Login.future(named("hold"), timeout=LONG)
        holder.taken(2)
        assert isinstance(late.exception(PATIENCE), DeadlineExceeded)
        assert 0.09 < time.monotonic() - start < 2
        holder.release()
        assert said(other) == b"hold"
        assert said(users.Login.future(named("after"))) == b"after"


def test_waiting_for_the_result_no_longer_does_not_end_the_call() -> None:
    with held.holding() as (holder, provider), services.calling(provider) as users:
        future = users.Login.future(named("hold"))
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(0.01)
        holder.taken()
        holder.release()
        assert said(future) == b"hold"


def test_a_deadline_is_kept_while_a_blocking_caller_reads() -> None:
    with held.holding() as (holder, provider), services.calling(provider, timeout=LONG) as users:
        with ThreadPoolExecutor(1) as pool:
            blocked = pool.submit(users.Login, named("hold"))
            holder.taken()
            start = time.monotonic()
            assert isinstance(users.Login.future(named("hold"), timeout=0.1).exception(PATIENCE), DeadlineExceeded)
            assert time.monotonic() - start < 2
            holder.release()
            assert said(blocked) == b"hold"


def test_deadlines_are_kept_where_nothing_connects() -> None:
    """More calls than lanes: those that wait for one end in time, too."""
    with held.black_hole() as address, services.calling(address) as users:
        start = time.monotonic()
        patient = [users.Login.future(REQUEST, timeout=1.0) for _ in range(20)]
        hasty = [users.Login.future(REQUEST, timeout=0.1) for _ in range(20)]
        for future in hasty:
            assert isinstance(future.exception(PATIENCE), Unavailable)
        assert time.monotonic() - start < 0.9
        for future in patient:
            assert isinstance(future.exception(PATIENCE), Unavailable)
        assert time.monotonic() - start < 3


def test_a_call_that_runs_out_of_time_before_its_retry_may_have_run() -> None:
    """It was said not to have: all lanes were busy, and the deadline passed while it waited for one."""

    def lose_the_second(peer: wire.Peer) -> None:
        peer.frame()
        peer.send(wire.response(1))
        peer.frame()
        peer.reset()

    with held.black_hole() as silent, services.calling(silent) as others:
        with wire.FakeProvider(lose_the_second) as provider, services.calling(provider.address) as users:
            login = users.Login.with_options(idempotent=True)
            login.future(REQUEST, timeout=LONG).result(PATIENCE)
            waiting = [others.Login.future(REQUEST, timeout=LONG) for _ in range(4 * subject._LANES)]
            assert becomes(lambda: subject.reader()._lanes - subject.reader()._idle_lanes == subject._LANES)
            error = login.future(REQUEST, timeout=0.3).exception(PATIENCE)
            assert isinstance(error, RpcError)
            assert not error.not_run
            for each in waiting:
                each.cancel()


def test_no_time_at_all() -> None:
    with services.serving() as provider, services.calling(provider) as users:
        for _ in range(2):
            assert isinstance(users.Login.future(REQUEST, timeout=0.0).exception(PATIENCE), RpcError)
        controller = MprpcController()
        controller.timeout = LONG
        users.Login.future(REQUEST, timeout=0.0, controller=controller).result(PATIENCE)
        assert controller.failed()


# ---- cancelling ----


def test_cancelling_tells_the_handler() -> None:
    with held.holding() as (holder, provider), services.calling(provider) as users:
        for _ in range(2):  # the first call connects
            future = users.Login.future(named("hold"))
            holder.taken()
            assert future.cancel()
            holder.cancelled()
            assert holder.calls[-1][1].is_canceled()
            with pytest.raises(CancelledError):
                future.result(PATIENCE)
        assert said(users.Login.future(named("after"))) == b"after"


def test_cancelling_again_changes_nothing_and_after_the_end_it_is_refused() -> None:
    with held.holding() as (_, provider), services.calling(provider) as users:
        future = users.Login.future(named("hold"))
        calls: list[bool] = []
        future.add_done_callback(lambda future: calls.append(future.cancel()))
        assert [future.cancel(), future.cancel()] == [True, True]
        assert calls == [True]
        ended = users.Login.future(named("a"))
        assert said(ended) == b"a"
        assert not ended.cancel()
        assert said(ended) == b"a"


def test_cancelling_at_once_leaves_the_connection_to_blocking_callers() -> None:
    """Cancelled before the reader had begun, it left the connection without anybody who reads."""
    with services.serving() as provider, services.calling(provider) as users:
        users.Login(REQUEST)
        for _ in range(20):
            users.Login.future(REQUEST).cancel()
            assert users.Login(named("next"), timeout=2.0).result.errmsg == b"next"


def test_cancelling_before_there_is_a_connection() -> None:
    with held.black_hole() as address, services.calling(address) as users:
        flying = [users.Login.future(REQUEST, timeout=1.0) for _ in range(20)]
        assert all(future.cancel() for future in flying)
        for future in flying:
            with pytest.raises(CancelledError):
                future.result(0)


def test_a_call_that_was_cancelled_while_it_connected_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    connects, gate, connect = threading.Event(), threading.Event(), Subchannel.connect

    def late(self: Subchannel, *arguments: Any) -> Any:
        link = connect(self, *arguments)
        connects.set()
        assert gate.wait(PATIENCE)
        return link

    with services.serving() as provider, services.calling(provider) as users:
        monkeypatch.setattr(Subchannel, "connect", late)
        future = users.Login.future(REQUEST)
        assert connects.wait(PATIENCE)
        assert future.cancel()
        gate.set()
        assert said(users.Login.future(named("a"))) == b"a"
        assert provider.statistics().methods["fixbug.UserServiceRpc.Login"].calls == 1


def test_cancelling_beside_the_answer_ends_it_once() -> None:
    with services.serving() as provider, services.calling(provider) as users:
        ends: queue.SimpleQueue[int] = queue.SimpleQueue()
        flying = []
        for i in range(2000):
            future = users.Login.future(named(str(i)))
            future.add_done_callback(lambda _, i=i: ends.put(i))
            flying.append(future)
        cancelled = [future.cancel() for future in reversed(flying)][::-1]
        assert sorted(ends.get(timeout=PATIENCE) for _ in flying) == list(range(2000))
        for i, future in enumerate(flying):
            assert future.cancelled() if cancelled[i] else said(future) == str(i).encode()
        assert ends.empty()


def test_a_controller_hears_that_its_call_was_cancelled() -> None:
    with held.holding() as (holder, provider), services.calling(provider) as users:
        controller = MprpcController()
        future = users.Login.future(named("hold"), controller=controller)
        holder.taken()
        future.cancel()
        assert controller.status is Status.CANCELLED


# ---- callbacks ----


def test_callbacks_may_start_calls() -> None:
    ended: Future[int] = Future()
    with services.serving() as provider, services.calling(provider) as users:

        def next_call(future: Any) -> None:
            count = int(said(future))
            if count == 200:
                ended.set_result(count)
            else:
                users.Login.future(named(str(count + 1))).add_done_callback(next_call)

        users.Login.future(named("0")).add_done_callback(next_call)
        assert ended.result(PATIENCE) == 200


def test_a_callback_that_raises_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    with services.serving() as provider, services.calling(provider) as users:
        flying = [users.Login.future(named(str(i))) for i in range(20)]
        for error in (ValueError, SystemExit, KeyboardInterrupt):

            def fail(_: Any, error: type[BaseException] = error) -> None:
                raise error

            future = users.Login.future(named("x"))
            future.add_done_callback(fail)
            flying.append(future)
        assert [said(future) for future in flying] == [str(i).encode() for i in range(20)] + [b"x"] * 3
        assert said(users.Login.future(named("after"))) == b"after"
    assert caplog.get_records("call")
    caplog.clear()


def test_a_callback_may_make_a_blocking_call() -> None:
    """The reader is then busy with it, while other futures are in flight: who waits for an answer reads it."""
    answers: Future[bytes] = Future()
    with held.holding() as (holder, provider), services.calling(provider) as users:
        other = users.Login.future(named("hold"), timeout=LONG)
        holder.taken()

        def call(_: Any) -> None:
            answers.set_result(users.Login(named("blocking"), timeout=5.0).result.errmsg)

        users.Login.future(named("a")).add_done_callback(call)
        start = time.monotonic()
        assert answers.result(PATIENCE) == b"blocking"
        assert time.monotonic() - start < 2
        holder.release()
        assert said(other) == b"hold"


# ---- controllers, and CallMethod with done ----


def test_with_a_controller_a_future_has_no_exception() -> None:
    with services.serving(held.Held()) as provider, services.calling(provider) as users:
        controller = MprpcController()
        controller.set_failed("of another call")
        assert said(users.Login.future(named("a"), controller=controller)) == b"a"
        assert not controller.failed()
        assert controller.peer == provider.address
        future = users.Login.future(named("fail"), timeout=3.0, controller=controller)
        assert future.result(PATIENCE) == services.LoginResponse()
        assert (controller.status, controller.error_text()) == (Status.NOT_FOUND, "fail")
        assert controller.timeout is None


def test_call_method_with_done_returns_at_once() -> None:
    method = services.user_pb2.DESCRIPTOR.services_by_name["UserServiceRpc"].methods_by_name["Login"]
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with held.holding() as (holder, provider), MprpcChannel(provider.address) as channel:
        controller = MprpcController()
        assert channel.CallMethod(method, controller, named("hold"), services.LoginResponse, answers.put) is None
        holder.taken()
        assert answers.empty()
        holder.release()
        assert answers.get(timeout=PATIENCE).result.errmsg == b"hold"
        channel.CallMethod(method, controller, named("fail"), services.LoginResponse, answers.put)
        assert answers.get(timeout=PATIENCE) == services.LoginResponse()
        assert controller.Failed()
        channel.CallMethod(method, None, named("fail"), services.LoginResponse, answers.put)
        assert answers.get(timeout=PATIENCE) is None


# ---- connections that end ----


def test_closing_the_channel_ends_all_that_is_in_flight() -> None:
    with held.holding() as (holder, provider), MprpcChannel(provider.address) as channel:
        users = services.user_mprpc.UserServiceRpc_Stub(channel)
        flying = [users.Login.future(named("hold"), timeout=LONG) for _ in range(50)]
        holder.taken(50)
        channel.close()
        for future in flying:
            assert isinstance(future.exception(PATIENCE), Unavailable)
        with pytest.raises(Unavailable, match="the channel is closed"):
            users.Login.future(REQUEST).result(PATIENCE)
        holder.cancelled(50)


SERVE = """
import services, sys, time
from concurrent.futures import Future
kept = []
def login(request, controller):
    if not request.name.startswith(b"hold"):
        return services.accept(request, controller)
    kept.append(Future())
    return kept[-1]
with services.serving(login) as provider:
    print(provider.address, flush=True)
    sys.stdin.read()
"""


def test_a_provider_that_is_killed_ends_each_call_once() -> None:
    process = services.start_python(SERVE)
    try:
        assert process.stdout is not None
        with services.calling(process.stdout.readline().strip()) as users:
            ends: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
            for _ in range(300):
                users.Login.future(named("hold"), timeout=LONG).add_done_callback(lambda f: ends.put(f.exception()))
            assert said(users.Login.future(named("a"))) == b"a"
            process.send_signal(signal.SIGKILL)
            assert all(isinstance(ends.get(timeout=PATIENCE), Unavailable) for _ in range(300))
            with pytest.raises(Unavailable):
                users.Login.future(REQUEST, timeout=2.0).result(PATIENCE)
            assert ends.empty()
    finally:
        process.kill()
        process.communicate()


def test_a_call_that_goaway_refuses_is_made_again() -> None:
    def leaving(peer: wire.Peer) -> None:
        header, _ = peer.frame()
        peer.send(wire.response(header.call_id, services.accept(REQUEST, None).SerializeToString()))
        second, _ = peer.frame()
        peer.send(wire.frame(call_id=header.call_id, kind=wire.rpcheader_pb2.GOAWAY))
        assert second.call_id > header.call_id
        peer.rest()

    def staying(peer: wire.Peer) -> None:
        header, payload = peer.frame()
        name = services.LoginRequest.FromString(payload)
        peer.send(wire.response(header.call_id, services.accept(name, None).SerializeToString()))
        peer.rest()

    with wire.FakeProvider(leaving, staying) as fake, services.calling(fake.address) as users:
        assert said(users.Login.future(REQUEST)) == b"zhang san"
        assert said(users.Login.future(named("again"))) == b"again"


def test_a_call_goes_on_to_another_provider() -> None:
    """Of two that are registered one refuses; every call gets its answer from the other."""
    with EmbeddedZooKeeper() as zookeeper:
        host, _, port = zookeeper.hosts.partition(":")
        keys: dict[str, Any] = {"zookeeperip": host, "zookeeperport": int(port)}
        with services.serving(**keys) as staying, services.serving(**keys) as leaving:
            for provider in (staying, leaving):
                assert provider.wait_registered(PATIENCE)
            with MprpcChannel(MprpcConfig(**keys)) as channel:
                users = services.user_mprpc.UserServiceRpc_Stub(channel)
                assert {users.Login.future(named("a")).result(PATIENCE).success for _ in range(10)} == {True}
                with zookeeper.answers_held():
                    stopping = threading.Thread(target=leaving.stop, args=(0.5,))
                    stopping.start()
                    stopping.join(PATIENCE)
                    flying = [users.Login.future(named(str(i))) for i in range(40)]
                    assert [said(future) for future in flying] == [str(i).encode() for i in range(40)]


def test_the_seed_s_dialect() -> None:
    with services.serving(held.Held()) as provider, services.calling(provider, dialect="classic") as users:
        flying = [users.Login.future(named(str(i))) for i in range(30)]
        assert [said(future) for future in flying] == [str(i).encode() for i in range(30)]
        with pytest.raises(Unavailable):
            users.Login.future(named("fail")).result(PATIENCE)


def test_a_forked_child_has_futures_of_its_own() -> None:
    with held.holding() as (holder, provider), services.calling(provider) as users:
        waiting = users.Login.future(named("hold"), timeout=LONG)
        holder.taken()
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                waiting.cancel()  # the parent's: nothing of it may reach the provider
                code = 0 if said(users.Login.future(named("child"))) == b"child" else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert said(users.Login.future(named("parent"))) == b"parent"
        assert not holder.calls[0][1].is_canceled()
        holder.release()
        assert said(waiting) == b"hold"


# ---- threads ----


def test_the_reader_is_there_only_while_calls_are_outstanding() -> None:
    with held.holding() as (holder, provider), services.calling(provider) as users:
        users.Login(REQUEST)
        assert not reader_threads()
        flying = [users.Login.future(named("hold"), timeout=LONG) for _ in range(10)]
        holder.taken(10)
        assert stays(lambda: reader_threads() == ["mprpc-reader"], 0.15)
        holder.release()
        concurrent.futures.wait(flying, PATIENCE)
        assert becomes(lambda: not reader_threads())
        assert said(users.Login.future(named("again"))) == b"again"
        flying = [users.Login.future(named("hold"), timeout=LONG) for _ in range(10)]
        assert all(future.cancel() for future in flying)
        assert becomes(lambda: not reader_threads())


def test_blocking_callers_and_futures_share_a_connection() -> None:
    with services.serving() as provider, services.calling(provider) as users:

        def block(thread: int) -> int:
            return sum(
                users.Login(named(f"{thread}.{i}"), timeout=LONG).result.errmsg == f"{thread}.{i}".encode()
                for i in range(300)
            )

        def fly(thread: int) -> int:
            right = 0
            for start in range(0, 600, 60):
                names = [f"{thread}.{start + i}" for i in range(60)]
                flying = [users.Login.future(named(name), timeout=LONG) for name in names]
                right += sum(said(future) == name.encode() for future, name in zip(flying, names, strict=True))
            return right

        with ThreadPoolExecutor(8) as pool:
            blocked, flown = [pool.submit(block, i) for i in range(4)], [pool.submit(fly, i) for i in range(4)]
            assert [each.result(PATIENCE) for each in blocked + flown] == [300] * 4 + [600] * 4


def test_a_future_is_not_slowed_by_a_blocking_caller_that_waits() -> None:
    """Its frame waited in the output while that caller sat in recv."""
    with held.holding() as (holder, provider), services.calling(provider, timeout=LONG) as users:
        with ThreadPoolExecutor(1) as pool:
            blocked = pool.submit(users.Login, named("hold"))
            holder.taken()
            start = time.monotonic()
            for i in range(20):
                assert said(users.Login.future(named(str(i)))) == str(i).encode()
            assert time.monotonic() - start < 1
            holder.release()
            assert said(blocked) == b"hold"


def test_a_future_that_is_kept_keeps_no_connection() -> None:
    with services.serving() as provider:
        with services.calling(provider) as users:
            kept = users.Login.future(REQUEST)
            kept.result(PATIENCE)
            assert not any(isinstance(each, native.Link) for each in gc.get_referents(kept))
        assert said(kept) == b"zhang san"


def test_nothing_of_a_call_is_left() -> None:
    """Answered, failed, cancelled before or beside the answer, expired: no future is kept, or counted as in flight."""
    with held.holding() as (holder, provider), services.calling(provider) as users:
        users.Login(REQUEST)
        flying: list[Any] = [users.Login.future(named(name)) for name in ("a", "fail: b", "hold", "hold") * 50]
        assert any(isinstance(each, native.Link) for each in gc.get_referents(flying[2]))
        flying += [users.Login.future(named("hold"), timeout=0.02) for _ in range(50)]
        for future in flying[3::4]:
            future.cancel()
        for future in users.Login.future(named("c")), users.Login.future(named("x" * 10_000)):
            flying.append(future)
            future.cancel()
        holder.release()
        assert not concurrent.futures.wait(flying, PATIENCE).not_done
        gone = [weakref.ref(future) for future in flying]
        del flying, future
        assert becomes(lambda: not any(each() for each in gone))  # without the collector: there is no cycle
        assert subject.reader()._in_flight() == 0


def test_futures_and_their_reader_are_made_only_whole() -> None:
    for arguments in ((), (None, None), (REQUEST, None)):
        with pytest.raises(TypeError):
            subject.CallFuture(*arguments)
        with pytest.raises(TypeError):
            native.Reader(*arguments)
    half = subject.CallFuture.__new__(subject.CallFuture)
    with pytest.raises(TypeError, match="not initialised"):
        half._post(native.Link.__new__(native.Link), 1, 0)
    half._withdraw()
    assert not half._waiters


def test_a_response_that_is_none() -> None:
    def answer(peer: wire.Peer) -> None:
        for _ in range(2):
            header, _ = peer.frame()
            peer.send(wire.response(header.call_id, b"\xff"))
        assert peer.rest() == b""

    with wire.FakeProvider(answer) as fake, services.calling(fake.address) as users:
        for _ in range(2):
            with pytest.raises(RpcError, match=r"the response is no fixbug\.LoginResponse") as failed:
                users.Login.future(REQUEST).result(PATIENCE)
            assert failed.value.status is Status.INTERNAL


def test_many_that_end_together_end_in_order() -> None:
    """More than are ended at a time."""
    with services.serving() as provider, services.calling(provider, timeout=LONG) as users:
        said(users.Login.future(REQUEST))
        ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        with subject._mutex:  # the reader waits for it
            for i in range(2000):
                users.Login.future(named(f"name {i}")).add_done_callback(lambda _, i=i: ended.put(i))
        assert [ended.get(timeout=PATIENCE) for _ in range(2000)] == list(range(2000))


def test_a_callback_may_fork() -> None:
    """The child has none of the batch's other callbacks to run, and futures of its own."""
    with services.serving() as provider, services.calling(provider) as users:
        users.Login(REQUEST)
        children: queue.SimpleQueue[int] = queue.SimpleQueue()
        other, ran = os.pipe()

        def fork(future: Any) -> None:
            child = os.fork()
            if child:
                children.put(child)
                return
            with contextlib.suppress(BaseException):
                os._exit(0 if said(users.Login.future(named("child"))) == b"child" else 2)
            os._exit(1)

        said(users.Login.future(REQUEST))
        with subject._mutex:  # the reader waits for it
            flying = [users.Login.future(named(str(i))) for i in range(100)]
            flying[0].add_done_callback(fork)
            for future in flying[1:]:
                future.add_done_callback(lambda _: os.write(ran, b"x"))
        assert os.waitstatus_to_exitcode(os.waitpid(children.get(timeout=PATIENCE), 0)[1]) == 0
        assert [said(future) for future in flying] == [str(i).encode() for i in range(100)]
        wrote = b""
        while len(wrote) < 99:
            wrote += os.read(other, 1000)
        os.close(ran)
        assert wrote + os.read(other, 1000) == b"x" * 99
        os.close(other)


def test_a_fork_while_futures_are_being_ended() -> None:
    """Their mail has been taken, and they have no result yet: in the child nobody would ever end them."""
    with services.serving() as provider, services.calling(provider) as users:
        users.Login(REQUEST)
        said(users.Login.future(REQUEST))
        with subject._mutex:  # the reader waits for it
            flying = [users.Login.future(named(str(i))) for i in range(10)]
            assert stays(lambda: not flying[0].done(), 0.1)
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    left = [future.exception(PATIENCE) for future in flying]
                    os._exit(0 if all(isinstance(each, Unavailable) for each in left) else 2)
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [said(future) for future in flying] == [str(i).encode() for i in range(10)]


def test_a_fork_while_a_future_waits_for_its_next_attempt() -> None:
    with services.calling("127.0.0.1:1") as users:
        login = users.Login.with_options(retries=1000)
        future = login.future(REQUEST, timeout=LONG)
        assert becomes(lambda: subject.reader()._paused)
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os._exit(0 if isinstance(future.exception(1.0), Unavailable) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        future.cancel()


def test_an_event_loop_may_wait_for_one() -> None:
    async def wait() -> list[bytes]:
        flying = [asyncio.wrap_future(users.Login.future(named(str(i)))) for i in range(100)]
        return [bytes((await future).result.errmsg) for future in flying]

    with services.serving() as provider, services.calling(provider) as users:
        assert asyncio.run(wait()) == [str(i).encode() for i in range(100)]


# ---- bounds ----


def test_max_pending_slows_and_then_refuses() -> None:
    with held.holding() as (holder, provider), configured(provider, max_pending=10, call_timeout=LONG) as users:
        flying = [users.Login.future(named("hold")) for _ in range(10)]
        holder.taken(10)
        start = time.monotonic()
        with pytest.raises(ResourceExhausted, match="max_pending=10") as refused:
            users.Login.future(REQUEST, timeout=0.1)
        assert time.monotonic() - start < 2
        assert refused.value.not_run
        controller = MprpcController()
        assert users.Login.future(REQUEST, timeout=0.1, controller=controller).result(0) == services.LoginResponse()
        assert controller.status is Status.RESOURCE_EXHAUSTED
        with ThreadPoolExecutor(1) as pool:
            slowed = pool.submit(users.Login.future, named("slowed"))
            assert stays(lambda: not slowed.done(), 0.1)
            assert flying[0].cancel()
            assert said(slowed.result(PATIENCE)) == b"slowed"
        holder.release()
        assert {said(future) for future in flying[1:]} == {b"hold"}


def test_a_call_that_is_interrupted_while_it_waits_for_room_is_over() -> None:
    with held.holding() as (holder, provider), MprpcChannel(config_of(provider, max_pending=1)) as channel:
        users = services.user_mprpc.UserServiceRpc_Stub(channel)
        flying = users.Login.future(named("hold"), timeout=LONG)
        holder.taken()
        for controller in (None, MprpcController()):
            interrupt = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT))
            interrupt.start()
            with pytest.raises(KeyboardInterrupt):
                users.Login.future(REQUEST, timeout=PATIENCE, controller=controller)
            interrupt.join()
            assert channel.statistics().methods["fixbug.UserServiceRpc.Login"].in_flight == 1
        holder.release()
        assert said(flying) == b"hold"


def test_threads_that_could_not_be_started_are_started_by_later_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    assert becomes(lambda: not reader_threads())
    with services.serving() as provider:
        for connected in (False, True):
            with services.calling(provider) as users:
                if connected:
                    users.Login(REQUEST)
                with monkeypatch.context() as patched:
                    patched.setattr(threading.Thread, "start", refuse)
                    for _ in range(10):
                        with pytest.raises(RuntimeError, match="new thread"):
                            users.Login.future(REQUEST, timeout=0.1)
                assert said(users.Login.future(named("a"))) == b"a"
                assert becomes(lambda: not reader_threads())


def test_the_reader_itself_is_refused_at_once() -> None:
    """A callback that waited for room would wait for itself."""
    refused: Future[BaseException] = Future()
    with held.holding() as (holder, provider), configured(provider, max_pending=1, call_timeout=LONG) as users:

        def call_twice(_: Any) -> None:
            try:
                flying.extend([users.Login.future(named("hold")), users.Login.future(named("hold"))])
            except BaseException as error:
                refused.set_result(error)

        flying: list[Any] = []
        users.Login.future(named("a")).add_done_callback(call_twice)
        assert isinstance(refused.result(PATIENCE), ResourceExhausted)
        holder.release()


def test_large_requests_are_bounded_by_their_bytes() -> None:
    """Ten thousand of 60 MB would be in the limit of max_pending."""
    with held.holding() as (holder, provider), configured(provider, max_payload=3_000_000) as users:
        users.Login(REQUEST)
        large = named(b"hold" + bytes(2_000_000))
        first = users.Login.future(large, timeout=LONG)
        with pytest.raises(ResourceExhausted, match="max_payload=3000000 bytes together"):
            users.Login.future(large, timeout=0.1)
        assert said(users.Login.future(named("small"))) == b"small"
        holder.taken()
        holder.release()
        assert len(said(first)) == 2_000_004
        assert len(said(users.Login.future(named(bytes(2_000_000)), timeout=LONG))) == 2_000_000


@pytest.mark.parametrize("count", [30_000, pytest.param(1_000_000, marks=pytest.mark.long)], ids=["short", "long"])
def test_however_many_are_started_few_are_in_flight(count: int) -> None:
    most = right = 0
    ended = threading.Semaphore(0)

    def check(future: Any, i: int) -> None:
        nonlocal right
        right += future.result().result.errmsg == b"%d" % i  # on the reader's thread alone
        ended.release()

    with services.serving() as provider, configured(provider, max_pending=500, call_timeout=LONG) as users:
        users.Login(REQUEST)
        for i in range(count):
            users.Login.future(named(b"%d" % i)).add_done_callback(lambda future, i=i: check(future, i))
            most = max(most, len(subject.reader()._pending))
        for _ in range(count):
            assert ended.acquire(timeout=PATIENCE)
    assert most <= 500
    assert right == count


def test_more_than_a_connection_takes() -> None:
    """One more is refused, and the connection and its calls go on."""
    answer = threading.Event()

    def swallow(peer: wire.Peer) -> None:
        peer.send(wire.response(peer.frame()[0].call_id))
        first, *_ = [peer.frame()[0].call_id for _ in range(65_536)]
        assert answer.wait(PATIENCE)
        peer.send(wire.response(first, services.accept(named("first"), None).SerializeToString()))
        peer.rest()

    with wire.FakeProvider(swallow) as fake, configured(fake, max_pending=100_000, call_timeout=LONG) as users:
        users.Login(REQUEST)  # connects: calls that have to wait for that go in no particular order
        flying = [users.Login.future(REQUEST) for _ in range(65_536)]
        with pytest.raises(ResourceExhausted, match="65536 calls"):
            users.Login.future(REQUEST).result(PATIENCE)
        answer.set()
        assert said(flying[0]) == b"first"
        assert all(future.cancel() for future in flying[1:])
