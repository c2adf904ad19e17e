"""Handlers that are `async def`: their answers, deadlines, cancelling, bounds, and the provider's end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

import services
import wire
from held import named
from mprpc import DeadlineExceeded, Internal, MprpcController, NotFound, ResourceExhausted, RpcError, Status
from mprpc import coroutines as subject

PATIENCE = wire.PATIENCE
LONG = 60.0


class Story:
    """An async Login; a name says what it does. `events` tells how handlers ended."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self.events: list[str] = []

    async def __call__(self, request: Any, controller: Any) -> Any:
        self.started.release()
        try:
            return await self._tell(request, controller)
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise
        finally:
            self.ended.release()

    async def _tell(self, request: Any, controller: Any) -> Any:
        match request.name:
            case b"wait":
                await asyncio.sleep(LONG)
            case b"stubborn":
                for _ in range(3):  # the connection's end cancels it, and then stop()
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(LONG)
            case b"block":
                threading.Event().wait(2.5)
            case b"not found":
                raise NotFound("nobody of that name")
            case b"raises":
                raise KeyError("secret")
            case b"exits":
                raise SystemExit
            case b"gives up":
                raise asyncio.CancelledError
            case b"set failed":
                controller.set_failed("said so", Status.ABORTED)
            case b"wrong":
                return b"no message"
        await asyncio.sleep(0)
        return services.accept(request, controller)

    def starts(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.started.acquire(timeout=PATIENCE)

    def ends(self, count: int = 1) -> None:
        for _ in range(count):
            assert self.ended.acquire(timeout=PATIENCE)


@contextlib.contextmanager
def telling(**keys: Any) -> Iterator[tuple[Story, Any, Any]]:
    """The story, its provider, and a stub."""
    story = Story()
    with services.serving(story, **keys) as provider, services.calling(provider) as users:
        yield story, provider, users


@pytest.mark.parametrize("loops", [1, 3])
def test_many_at_once_get_their_own_answers(loops: int) -> None:
    with telling(loops=loops) as (_, _, users):
        assert users.Login(named("one")).result.errmsg == b"one"
        flying = {users.Login.future(named(str(i)), timeout=LONG): i for i in range(3000)}
        for future in concurrent.futures.as_completed(flying, PATIENCE):
            assert future.result().result.errmsg == str(flying[future]).encode()


def test_none_is_stranded_when_several_loops_hand_over() -> None:
    """One that arrived while the event loop emptied the queue waited until the next came."""
    with telling(loops=2) as (_, provider, _):

        def call(_: int) -> int:
            with services.calling(provider, timeout=5.0) as users:
                return sum(users.Login(named("x")).success for _ in range(250))

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert list(pool.map(call, range(4))) == [250] * 4


@pytest.mark.parametrize(
    ("name", "status", "text"),
    [
        ("not found", Status.NOT_FOUND, "nobody of that name"),
        ("set failed", Status.ABORTED, "said so"),
        ("raises", Status.INTERNAL, "the handler raised KeyError"),
        ("exits", Status.INTERNAL, "the handler raised SystemExit"),
        ("gives up", Status.INTERNAL, "the handler raised CancelledError"),
        ("wrong", Status.INTERNAL, "the handler returned no response of its method's type"),
    ],
)
def test_what_fails_a_call(name: str, status: Status, text: str) -> None:
    with telling() as (_, _, users):
        controller = MprpcController()
        users.Login(named(name), controller=controller)
        assert (controller.status, controller.error_text()) == (status, text)
        assert users.Login(named("after")).result.errmsg == b"after"


def test_the_deadline_cancels_the_handler() -> None:
    with telling() as (story, provider, _), wire.connect(provider.address) as peer:
        peer.send(wire.login(1, b"wait", timeout_ms=100))
        start = time.monotonic()
        header, _ = peer.frame()
        assert (header.call_id, header.status) == (1, Status.DEADLINE_EXCEEDED)
        assert not header.not_run
        assert 0.05 < time.monotonic() - start < 2
        story.ends()
        assert story.events == ["cancelled"]


def test_who_calls_hears_of_the_deadline_too() -> None:
    with telling() as (story, _, users):
        with pytest.raises(DeadlineExceeded):
            users.Login(named("wait"), timeout=0.1)
        story.ends()


def test_cancelling_the_call_cancels_the_handler() -> None:
    with telling() as (story, _, users):
        users.Login(named("connects"))
        story.starts()
        story.ends()
        flying = [users.Login.future(named("wait"), timeout=LONG) for _ in range(20)]
        story.starts(20)
        assert all(future.cancel() for future in flying)
        story.ends(20)
        assert story.events == ["cancelled"] * 20
        at_once = [users.Login.future(named("wait"), timeout=LONG) for _ in range(200)]
        for future in at_once:  # whether the handler has started or not
            future.cancel()
        assert users.Login(named("after")).result.errmsg == b"after"


def test_a_caller_that_goes_away_cancels_the_handler() -> None:
    with telling() as (story, provider, _):
        for end in (wire.Peer.close, wire.Peer.reset, wire.Peer.finish):
            with wire.connect(provider.address) as peer:
                peer.send(wire.login(1, b"wait") + wire.login(2, b"wait"))
                story.starts(2)
                end(peer)
                story.ends(2)
        assert story.events == ["cancelled"] * 6


def test_no_more_than_a_bound_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "MOST", 5)
    with telling() as (story, _, users):
        flying = [users.Login.future(named("wait"), timeout=LONG) for _ in range(5)]
        story.starts(5)
        with pytest.raises(ResourceExhausted) as refused:
            users.Login(named("more"))
        assert refused.value.not_run
        flying[0].cancel()
        story.ends()
        deadline = time.monotonic() + PATIENCE
        while True:  # its place is free a moment after its end
            with contextlib.suppress(ResourceExhausted):
                assert users.Login(named("more")).result.errmsg == b"more"
                break
            assert time.monotonic() < deadline


def test_stop_lets_handlers_finish_within_the_grace() -> None:
    with telling() as (story, provider, users):
        future = users.Login.future(named("quick"))
        story.starts()
        provider.stop(5.0)
        assert future.result(PATIENCE).result.errmsg == b"quick"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("wait", None),
        ("stubborn", "1 async handlers went on after they were cancelled"),
        ("block", "an async handler blocks its event loop"),
    ],
)
def test_stop_is_bounded_whatever_handlers_do(name: str, complaint: str | None, caplog: Any) -> None:
    with telling() as (story, provider, users):
        future = users.Login.future(named(name), timeout=LONG)
        story.starts()
        start = time.monotonic()
        provider.stop(0.1)
        assert time.monotonic() - start < 2.4
        assert isinstance(future.exception(PATIENCE), RpcError)
    said = [each.getMessage() for each in caplog.records if each.name.startswith("mprpc.coroutines")]
    assert [each[: len(complaint or "")] for each in said] == ([complaint] if complaint else [])
    if name == "block":
        story.ends()


SILENT = """
import asyncio, services
from held import named

async def login(request, controller):
    if request.name == b"wait":
        await asyncio.sleep(60)
    return services.accept(request, controller)

with services.serving(login) as provider, services.calling(provider) as users:
    assert users.Login(named("a")).success
    flying = [users.Login.future(named("wait")) for _ in range(50)]
    [future.cancel() for future in flying[::2]]
    provider.stop(0.0)
    [future.cancelled() or future.exception(20) for future in flying]
print("done")
"""


def test_a_process_that_ends_with_handlers_under_way_is_silent() -> None:
    process = services.start_python(SILENT)
    assert process.communicate(timeout=PATIENCE) == ("done\n", "")


def test_an_awaitable_that_is_no_coroutine() -> None:
    class Later:
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            return services.LoginResponse(success=True)

    with services.serving(lambda request, controller: Later()) as provider, services.calling(provider) as users:
        assert users.Login(named("a")).success


def test_a_callback_on_cancel_that_comes_beside_the_cancelling_is_called_once() -> None:
    """Set between the loop's look at the callbacks and its end, it was lost."""
    for _ in range(300):
        controller = MprpcController()
        calls: list[int] = []
        begin = threading.Barrier(2)

        def cancel(controller: Any = controller, begin: Any = begin) -> None:
            begin.wait()
            controller._cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        begin.wait()
        for i in range(5):
            controller.notify_on_cancel(partial(calls.append, i))
        thread.join()
        assert sorted(calls) == list(range(5))


def test_the_module_is_imported_with_the_first_such_handler() -> None:
    program = "import sys, services\nwith services.serving() as p, services.calling(p) as users: users.Login(services.REQUEST)\nprint('asyncio' in sys.modules)"  # noqa: E501
    assert services.start_python(program).communicate(timeout=PATIENCE) == ("False\n", "")


def test_an_exception_s_traceback_is_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    with telling() as (_, _, users):
        with pytest.raises(Internal, match="the handler raised KeyError") as failed:
            users.Login(named("raises"))
        assert "secret" not in str(failed.value)
    assert "secret" in caplog.text
