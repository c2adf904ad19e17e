"""Calls that are answered later: who gives them up, who fulfils them, and when they expire."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any, NamedTuple

import pytest

import services
import wire
from mprpc import DeadlineExceeded, Internal, Status
from mprpc.detached import DetachedCalls
from services import REQUEST
from test_provider import OK, wait_until


class Call(NamedTuple):
    key: tuple[int, int]


def calls_of(*keys: tuple[int, int]) -> tuple[DetachedCalls[Call], list[Call], list[float]]:
    reminders: list[float] = []
    calls: DetachedCalls[Call] = DetachedCalls(reminders.append)
    made = [Call(key) for key in keys]
    for call in made:
        calls.add(call)
    return calls, made, reminders


def test_a_connection_gives_up_its_own_calls() -> None:
    calls, (first, second, other), _ = calls_of((1, 1), (1, 2), (2, 1))
    assert calls.give_up(1, 2) == [second]
    assert calls.give_up(1, 2) == []
    assert calls.give_up(1, 0) == [first]
    assert calls.give_up(3, 0) == []
    calls.remove(other)
    assert not calls


def test_what_it_costs_that_connections_end_does_not_grow_with_the_calls_of_others() -> None:
    def spent(others: int) -> float:
        calls, _, _ = calls_of(*((number, 1) for number in range(others)))
        began = time.thread_time()
        for number in range(500):
            assert len(calls.give_up(number, 0)) == 1
        return time.thread_time() - began

    few = min(spent(1000) for _ in range(5))
    assert min(spent(50_000) for _ in range(3)) < 5 * few


def test_a_promise_is_fulfilled_once() -> None:
    calls, (call,), reminders = calls_of((1, 1))
    assert not calls.fulfil(call), "it was not promised"
    calls.promise(call, None)
    assert calls.fulfil(call)
    assert not calls.fulfil(call)
    assert reminders == []


def test_reminders_come_for_the_earliest_deadline() -> None:
    calls, (late, early, never), reminders = calls_of((1, 1), (1, 2), (1, 3))
    calls.promise(late, 20.0)
    calls.promise(never, None)
    calls.promise(early, 10.0)
    assert reminders == [20.0, 10.0]
    assert calls.expired(9.9) == []
    assert calls.expired(10.0) == [early]
    assert reminders[2:] == [20.0]
    assert calls.expired(21.0) == [late]
    assert not calls.fulfil(late)
    assert not calls.abandon(late)
    assert reminders[3:] == []
    assert calls.fulfil(never)


def test_many_promises_are_not_looked_at_for_each() -> None:
    calls, made, reminders = calls_of(*((1, number) for number in range(1, 10_001)))
    for number, call in enumerate(made):
        calls.promise(call, 10.0 + number / 1000)
    assert len(calls.expired(10.0)) == 1
    assert reminders[-1] == pytest.approx(10.12, abs=0.001), "not 10.001: that would be a look for each"
    assert len(calls.expired(reminders[-1])) == pytest.approx(120, abs=2)


def test_only_so_many_are_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else who begins calls and cancels them would have handlers at work without a limit."""
    monkeypatch.setattr("mprpc.detached._ABANDONED_MAX", 3)
    calls, made, reminders = calls_of(*((1, number) for number in range(1, 6)))
    for call in made:
        calls.promise(call, 10.0)
    assert calls.abandon(made[0])
    assert calls.expired(11.0) == made[1:3]
    assert not calls.abandon(made[3])
    assert 11.0 < reminders[-1] < 11.1, "the others are looked at again"
    assert calls.expired(12.0) == []
    assert not calls.fulfil(made[1]), "its Future has ended, which was answered before"
    assert calls.expired(13.0) == [made[3]]
    assert calls.fulfil(made[4])


# ---- a provider's ----


def test_a_future_that_never_ends_holds_nothing() -> None:
    """Not its connection's place among max_in_flight, and not the calls in flight, once the deadline has passed."""
    futures: list[Future[Any]] = []
    told: list[Any] = []

    def login(request: Any, controller: Any) -> Any:
        futures.append(Future())
        controller.notify_on_cancel(lambda: told.append(controller.is_canceled()))
        return futures[-1]

    with services.serving(login, max_in_flight=4) as provider, services.calling(provider) as users:
        for _ in range(3):
            under_way = [users.Login.future(REQUEST, timeout=0.05) for _ in range(4)]
            for each in under_way:
                with pytest.raises(DeadlineExceeded):
                    each.result(wire.PATIENCE)
            wait_until(lambda: provider.statistics().in_flight == 0, "the provider has let go of them")
        assert told == [True] * 12
        for future in futures:
            future.set_result(OK)  # late: nobody hears of it
        late = users.Login.future(REQUEST, timeout=wire.PATIENCE)
        wait_until(lambda: len(futures) == 13, "the handler has run")
        futures[12].set_result(OK)
        assert late.result(wire.PATIENCE).success
        wait_until(lambda: provider.statistics().in_flight == 0, "the last one is over, too")
        counted = provider.statistics().methods["fixbug.UserServiceRpc.Login"]
        assert (counted.calls, dict(counted.errors)) == (13, {Status.DEADLINE_EXCEEDED: 12})


def test_a_future_whose_caller_gives_up_holds_nothing(caplog: pytest.LogCaptureFixture) -> None:
    futures: list[Future[Any]] = []

    def login(request: Any, controller: Any) -> Any:
        futures.append(Future())
        return futures[-1]

    with services.serving(login) as provider, services.calling(provider) as users:
        for _ in range(3):
            call = users.Login.future(REQUEST, timeout=wire.PATIENCE)
            wait_until(lambda: provider.statistics().in_flight == 1, "the handler has run")
            call.cancel()
            wait_until(lambda: provider.statistics().in_flight == 0, "the provider has let go of it")
        assert provider.statistics().methods["fixbug.UserServiceRpc.Login"].errors == {Status.CANCELLED: 3}
        futures[0].set_result(OK)
        futures[1].set_exception(ValueError("a mistake that nobody waits for"))
    assert "a mistake that nobody waits for" in caplog.text


def test_a_call_that_was_cancelled_before_its_handler_returned_a_future() -> None:
    came, go_on = threading.Event(), threading.Event()

    def login(request: Any, controller: Any) -> Any:
        came.set()
        assert go_on.wait(wire.PATIENCE)
        return Future()

    with services.serving(login) as provider, services.calling(provider) as users:
        call = users.Login.future(REQUEST, timeout=wire.PATIENCE)
        assert came.wait(wire.PATIENCE)
        wait_until(lambda: provider.statistics().relieved == 1, "another thread leads")
        call.cancel()
        wait_until(lambda: not provider._loops[0]._detached, "the provider has heard of it")
        go_on.set()
        wait_until(lambda: provider.statistics().in_flight == 0, "the provider has let go of it")


def test_what_only_looks_like_a_future_fails_its_call() -> None:
    """The class instead of one of its instances, say."""
    with services.serving(lambda request, controller: Future) as provider, services.calling(provider) as users:
        began = time.monotonic()
        with pytest.raises(Internal, match="TypeError"):
            users.Login(REQUEST, timeout=wire.PATIENCE)
        assert time.monotonic() - began < wire.PATIENCE / 2
        wait_until(lambda: provider.statistics().in_flight == 0, "the provider has let go of it")
