"""What a call may still try: the decider by itself, with a clock and chance of the test's, then through all faces."""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from typing import Any

import pytest

import held
import services
import wire
from mprpc import AsyncMprpcChannel, MprpcChannel, MprpcConfig, MprpcController
from mprpc.errors import (
    DeadlineExceeded,
    Internal,
    NotFound,
    ResourceExhausted,
    RpcError,
    Status,
    Unavailable,
    Unimplemented,
)
from mprpc.retry import P95, Attempts, Budget, Hedging, Policy
from mprpc.testing import EmbeddedZooKeeper

S = 1_000_000_000
UNSENT = Unavailable("refused", not_run=True)
BROKEN = Unavailable("the connection ended")
FULL = ResourceExhausted("full", not_run=True)
LATE = DeadlineExceeded("no answer")
LACKING = Unimplemented("no such method", not_run=True)
PLAIN = Policy(idempotent=False, retries=3, backoff=0.1, backoff_max=0.25, attempt_timeout=0.0)
IDEMPOTENT = PLAIN._replace(idempotent=True)


def budget(share: float = 0.2, rate: float = 10.0, *, full: bool = True) -> Budget:
    return Budget(share, rate, contextlib.nullcontext(), full=full)


def attempts(
    policy: Policy = PLAIN, *, deadline: int = 100 * S, settled: bool = False, of: Budget | None = None
) -> Attempts[str]:
    return Attempts(policy, of or budget(), deadline, lambda: 1.0, settled=settled)


def test_what_was_not_sent_goes_through_the_list_at_once_and_for_nothing() -> None:
    empty = budget(rate=0.0, full=False)
    call = attempts(PLAIN._replace(retries=0), settled=True, of=empty)
    for endpoint in "abc":
        assert call.next("abcd") == endpoint
        assert call.after(UNSENT, endpoint, "abcd", 0) == 0
    assert call.next("abcd") == "d"
    assert call.after(UNSENT, "d", "abcd", 0) is None
    assert call.problem is UNSENT
    assert empty.taken == call.number == 0


def test_another_round_backs_off_and_starts_from_the_beginning() -> None:
    call = attempts()
    pauses = []
    while (endpoint := call.next("ab")) and (pause := call.after(UNSENT, endpoint, "ab", 0)) is not None:
        pauses.append(pause / S)
    assert pauses == [0, 0.1, 0, 0.2, 0, 0.25, 0]
    assert call.number == 0  # it never ran


def test_chance_takes_a_part_of_the_pause() -> None:
    call: Attempts[str] = Attempts(PLAIN, budget(), 100 * S, lambda: 0.5)
    assert call.after(UNSENT, "a", "a", 0) == 0.05 * S


@pytest.mark.parametrize(
    ("error", "plain", "idempotent"),
    [
        (UNSENT, True, True),
        (BROKEN, False, True),
        (FULL, True, True),
        (LATE, False, True),
        (DeadlineExceeded("in the queue", not_run=True), True, True),
        (LACKING, True, True),
        (ResourceExhausted("the handler's own"), False, False),
        (Unimplemented("the handler's own"), False, False),
        *((RpcError(each, ""), False, False) for each in Status if each not in (0, 4, 8, 12, 14)),
    ],
    ids=repr,
)
def test_what_may_be_tried_again(error: RpcError, plain: bool, idempotent: bool) -> None:
    assert (attempts().after(error, "a", "ab", 0) is not None) is plain
    assert (attempts(IDEMPOTENT).after(error, "a", "ab", 0) is not None) is idempotent


def test_the_first_retry_elsewhere_goes_at_once_the_next_waits() -> None:
    call = attempts()
    assert call.after(FULL, "a", "abc", 0) == 0
    assert call.next("abc") == "b"
    assert call.after(FULL, "b", "abc", 0) == 0.2 * S
    assert call.next("abc") == "c"


def test_a_list_of_the_tried_alone_waits() -> None:
    call = attempts()
    assert call.after(FULL, "a", "a", 0) == 0.1 * S
    assert call.next("a") == "a"


def test_who_lacks_the_method_is_not_asked_again() -> None:
    call = attempts()
    assert call.after(LACKING, "a", "ab", 0) == 0
    assert call.next("ab") == "b"
    assert call.after(FULL, "b", "ab", 0) == 0.2 * S
    assert call.next("ab") == "b"
    assert call.after(LACKING, "b", "ab", 0) is None
    assert attempts().after(LACKING, "a", "a", 0) is None


def test_retries_end_at_their_number() -> None:
    call = attempts(IDEMPOTENT)
    assert [call.after(BROKEN, "a", "a", 0) is None for _ in range(4)] == [False, False, False, True]
    assert call.number == 3


def test_no_retry_waits_past_the_deadline() -> None:
    assert attempts(deadline=S // 10).after(FULL, "a", "a", 0) is None
    assert attempts(deadline=S // 10 + 1).after(FULL, "a", "a", 0) is not None
    assert attempts(deadline=S).after(UNSENT, "a", "ab", S) is None


def test_a_call_of_a_retry_is_not_retried() -> None:
    assert attempts(IDEMPOTENT, settled=True).after(BROKEN, "a", "ab", 0) is None
    assert attempts(settled=True).after(FULL, "a", "ab", 0) is None
    assert attempts(settled=True).after(UNSENT, "a", "ab", 0) == 0


def test_an_old_connection_that_ended_says_nothing_of_its_endpoint() -> None:
    call = attempts()
    assert call.after(UNSENT, "a", "ab", 0, old=True) == 0
    assert call.next("ab") == "a"
    assert call.after(UNSENT, "a", "ab", 0, old=True) == 0
    assert call.next("ab") == "b"  # once


def test_an_attempt_has_its_own_time_where_it_may_be_repeated() -> None:
    policy = IDEMPOTENT._replace(attempt_timeout=0.5)
    assert attempts(policy, deadline=2 * S).timeout(0) == S // 2
    assert attempts(policy, deadline=2 * S).timeout(2 * S - 7) == 7
    assert attempts(policy._replace(idempotent=False), deadline=2 * S).timeout(0) == 2 * S


def test_nobody_is_listed() -> None:
    call = attempts()
    assert call.next("") is None
    assert call.after(UNSENT, None, "", 0) == 0.1 * S
    assert call.next("a") == "a"


def test_a_budget_is_a_share_of_the_calls_and_some_a_second() -> None:
    tokens = budget(0.25, 10.0)
    assert sum(tokens.take(0) for _ in range(1000)) == 100
    tokens.called(8)
    assert sum(tokens.take(0) for _ in range(1000)) == 2
    assert sum(tokens.take(S // 2) for _ in range(1000)) == 5
    tokens.called(1_000_000)
    assert sum(tokens.take(S) for _ in range(1000)) == 100  # what it saves up is bounded
    assert tokens.taken == 207


def test_a_budget_can_be_nothing() -> None:
    assert not budget(0.0, 0.0, full=False).take(10**18)


@pytest.mark.parametrize("seed", range(200))
def test_retries_stay_within_the_budget(seed: int) -> None:
    """Whatever fails, and however: of a channel's calls no more are repeated than their share and the rate allow."""
    chance = random.Random(seed)
    share, rate = chance.choice([0.0, 0.05, 0.2, 1.0]), chance.choice([0.0, 1.0, 10.0])
    tokens = budget(share, rate)
    trouble = chance.random()
    endpoints = [str(i) for i in range(chance.randint(1, 6))]
    now = calls = 0
    for _ in range(chance.randint(1, 400)):
        tokens.called()
        calls += 1
        policy = chance.choice([PLAIN, IDEMPOTENT])
        call: Attempts[str] = Attempts(policy, tokens, now + S, chance.random, settled=chance.random() < 0.1)
        ran = free = 0
        while chance.random() < trouble:
            endpoint = call.next(endpoints)
            error = chance.choice([UNSENT, BROKEN, FULL, LATE, LACKING, Internal("raised")])
            ran += not error.not_run
            now += chance.randint(0, S // 100)
            pause = call.after(error, endpoint, endpoints, now, old=chance.random() < 0.2)
            if pause is None:
                assert call.problem is not None
                assert call.problem.status is error.status
                assert call.problem.not_run is (error.not_run and ran == 0)
                break
            assert now + pause < call.deadline
            assert ran == 0 or policy.idempotent  # nothing else runs twice
            assert call.number == ran
            free = free + 1 if error is UNSENT else 0
            assert free <= 3 * (2 * len(endpoints) + 1)
            now += pause
    assert tokens.taken <= calls * share + now / S * rate + 10 * max(rate, 1.0)


def outage(tokens: Budget, policy: Policy, seed: int = 1) -> tuple[float, float]:
    """A virtual outage of 30 s of four endpoints that 200 calls a second are made to: how many times as many requests
    as before they get meanwhile, and in the first five seconds after it."""
    chance = random.Random(seed)
    begin, end, stop = 10 * S, 40 * S, 45 * S
    requests: list[int] = []
    queue: list[tuple[int, int, Attempts[str]]] = []
    now = number = 0
    while now < stop:
        number += 1
        heapq.heappush(queue, (now, number, Attempts(policy, tokens, now + 2 * S, chance.random)))
        tokens.called()
        now += S // 200
        while queue and queue[0][0] <= now:
            at, order, call = heapq.heappop(queue)
            endpoint = call.next("abcd")
            requests.append(at)
            if begin <= at < end and (pause := call.after(BROKEN, endpoint, "abcd", at)) is not None:
                heapq.heappush(queue, (at + max(pause, S // 1000), order, call))
    before = sum(at < begin for at in requests) / 10
    meanwhile = sum(begin <= at < end for at in requests) / 30
    after = sum(end <= at < stop for at in requests) / 5
    return meanwhile / before, after / before


def test_after_an_outage_the_load_is_what_it_was() -> None:
    meanwhile, after = outage(budget(), IDEMPOTENT._replace(backoff_max=1.0))
    assert 1.2 <= meanwhile <= 1.2 + 10 / 200 + 100 / 200 / 30 + 0.01
    assert after <= 1.2


def test_without_a_budget_an_outage_would_multiply_the_load() -> None:
    """What the test above is worth."""
    meanwhile, after = outage(budget(100.0, 1e6), IDEMPOTENT._replace(retries=10, backoff_max=1.0))
    assert meanwhile > 3
    assert after > 1.2


def test_a_hedge_begins_elsewhere_and_is_not_retried() -> None:
    first = attempts(IDEMPOTENT)
    assert first.next("abc") == "a"
    second = first.hedge("a")
    assert (second.next("abc"), second.number) == ("b", 1)
    assert second.after(UNSENT, "b", "abc", 0) == 0
    assert second.next("abc") == "c"
    assert second.after(BROKEN, "c", "abc", 0) is None


def test_what_was_hedged_may_have_run() -> None:
    """A first request that was refused said that it had not run, whatever had become of the hedge."""
    first = attempts(IDEMPOTENT)
    assert first.next("ab") == "a"
    first.hedge("a")
    first.after(UNSENT, "a", "ab", 0)
    assert first.problem is not None
    assert not first.problem.not_run
    assert first.number == 1


def hedging(delay: float | None, share: float = 0.05) -> Hedging:
    return Hedging(IDEMPOTENT._replace(hedge_delay=delay, hedge_share=share), contextlib.nullcontext())


def test_hedges_are_a_share_of_the_calls() -> None:
    hedges = hedging(0.5)
    taken = 0
    for _ in range(1000):
        assert hedges.delay() == S // 2
        taken += hedges.take(0)
    assert taken == hedges.taken
    assert 49 <= taken <= 50


def test_what_is_not_idempotent_is_not_hedged() -> None:
    assert IDEMPOTENT._replace(hedge_delay=0.0).hedges
    assert IDEMPOTENT._replace(hedge_delay=P95).hedges
    assert not IDEMPOTENT.hedges
    assert not PLAIN._replace(hedge_delay=P95).hedges


def test_the_delay_may_be_what_one_in_twenty_takes() -> None:
    hedges = hedging(P95)
    chance = random.Random(1)
    for i in range(19):
        assert hedges.delay() is None, i  # too few to know
        hedges.lasted(S)
    hedges.lasted(S)
    assert S <= (hedges.delay() or 0) <= 1.1 * S
    taken = [int(chance.expovariate(1) * S) for _ in range(5000)]
    for each in taken:
        hedges.lasted(each)
    wanted = sorted(taken[-1000:])[950]
    assert 0.8 * wanted <= (hedges.delay() or 0) <= 1.3 * wanted
    for _ in range(5000):
        hedges.lasted(S // 1000)
    assert S // 1000 <= (hedges.delay() or 0) <= 1.1 * S // 1000  # what was is forgotten
    assert len(hedges._counts) < 100


# ---- through the faces ----

ANSWER = services.accept(services.REQUEST, None)
Face = Callable[..., Any]


def config_for(address: str, **keys: Any) -> MprpcConfig:
    host, _, port = address.rpartition(":")
    return MprpcConfig(rpcserverip=host, rpcserverport=int(port), **({"retry_backoff": 0.001} | keys))


def block(
    config: MprpcConfig, calls: int = 1, timeout: float = wire.PATIENCE, request: Any = services.REQUEST, **options: Any
) -> list[Any]:
    """Each call's response, or the error that it raised."""
    with MprpcChannel(config) as channel:
        login = services.user_mprpc.UserServiceRpc_Stub(channel).Login.with_options(**options)
        return [outcome(lambda: login(request, timeout=timeout)) for _ in range(calls)]


def submit(
    config: MprpcConfig, calls: int = 1, timeout: float = wire.PATIENCE, request: Any = services.REQUEST, **options: Any
) -> list[Any]:
    with MprpcChannel(config) as channel:
        login = services.user_mprpc.UserServiceRpc_Stub(channel).Login.with_options(**options)
        return [outcome(lambda: login.future(request, timeout=timeout).result(wire.PATIENCE)) for _ in range(calls)]


def wait(
    config: MprpcConfig, calls: int = 1, timeout: float = wire.PATIENCE, request: Any = services.REQUEST, **options: Any
) -> list[Any]:
    async def run() -> list[Any]:
        async with AsyncMprpcChannel(config) as channel:
            login = services.user_mprpc.UserServiceRpc_AsyncStub(channel).Login.with_options(**options)
            ended = []
            for _ in range(calls):
                try:
                    ended.append(await login(request, timeout=timeout))
                except RpcError as error:
                    ended.append(error)
            return ended

    return asyncio.run(run())


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RpcError as error:
        return error


faces = pytest.mark.parametrize("face", [block, submit, wait], ids=["blocking", "future", "asyncio"])


class Script:
    """Scripts of a FakeProvider's connections, and the attempt numbers that they saw."""

    def __init__(self) -> None:
        self.attempts: list[int] = []

    def take(self, peer: wire.Peer) -> Any:
        header, _ = peer.frame()
        self.attempts.append(header.attempt)
        return header

    def lose(self, peer: wire.Peer) -> None:
        """Takes a request and ends the connection."""
        self.take(peer)

    def answer(self, peer: wire.Peer) -> None:
        peer.send(wire.response(self.take(peer).call_id, ANSWER.SerializeToString()))
        peer.rest()

    def refuse(self, times: int) -> Callable[[wire.Peer], None]:
        """Says so often that it is full, then answers."""

        def run(peer: wire.Peer) -> None:
            for _ in range(times):
                peer.send(wire.response(self.take(peer).call_id, status=Status.RESOURCE_EXHAUSTED, not_run=True))
            self.answer(peer)

        return run

    def refuse_all(self, peer: wire.Peer) -> None:
        with contextlib.suppress(EOFError):
            self.refuse(1 << 30)(peer)


@faces
def test_an_idempotent_call_goes_on_when_its_connection_ends(face: Face) -> None:
    script = Script()
    with wire.FakeProvider(script.lose, script.lose, script.answer) as provider:
        assert face(config_for(provider.address), idempotent=True) == [ANSWER]
    assert script.attempts == [0, 1, 2]


@faces
def test_what_may_have_run_is_not_sent_again(face: Face) -> None:
    script = Script()
    with wire.FakeProvider(script.lose) as provider:
        (error,) = face(config_for(provider.address))
    assert (error.status, error.not_run) == (Status.UNAVAILABLE, False)
    assert script.attempts == [0]


@faces
def test_retries_can_be_switched_off(face: Face) -> None:
    script = Script()
    with wire.FakeProvider(script.lose) as provider:
        (error,) = face(config_for(provider.address, retries=5), idempotent=True, retries=0)
    assert error.status is Status.UNAVAILABLE
    assert script.attempts == [0]


@faces
def test_a_full_provider_is_asked_again(face: Face) -> None:
    """Whatever the method; and since nothing ran, the number stays."""
    script = Script()
    with wire.FakeProvider(script.refuse(3)) as provider:
        assert face(config_for(provider.address)) == [ANSWER]
    assert script.attempts == [0, 0, 0, 0]


@faces
def test_an_attempt_that_takes_too_long_is_repeated(face: Face) -> None:
    script, timeouts = Script(), []

    def run(peer: wire.Peer) -> None:
        for _ in range(2):
            timeouts.append(script.take(peer).timeout_ms)
        script.answer(peer)

    with wire.FakeProvider(run) as provider:
        assert face(config_for(provider.address, attempt_timeout=0.1), idempotent=True) == [ANSWER]
    assert script.attempts == [0, 1, 2]
    assert all(0 < each <= 100 for each in timeouts)


@faces
def test_the_deadline_is_the_calls_not_the_attempts(face: Face) -> None:
    script = Script()

    def run(peer: wire.Peer) -> None:
        with contextlib.suppress(EOFError):
            while True:
                script.take(peer)

    with wire.FakeProvider(run) as provider:
        began = time.monotonic()
        (error,) = face(config_for(provider.address, attempt_timeout=0.05, retries=100), timeout=0.4, idempotent=True)
        assert 0.3 <= time.monotonic() - began <= wire.PATIENCE / 2
    assert error.status is Status.DEADLINE_EXCEEDED
    assert 2 <= len(script.attempts) <= 9
    assert script.attempts == list(range(len(script.attempts)))


@faces
def test_a_call_that_may_have_run_never_says_not_run(face: Face) -> None:
    script = Script()
    with wire.FakeProvider(script.lose, script.refuse_all) as provider:
        (error,) = face(config_for(provider.address), idempotent=True, retries=1)
    assert (error.status, error.not_run) == (Status.RESOURCE_EXHAUSTED, False)


@faces
def test_a_channel_keeps_its_budget(face: Face) -> None:
    script = Script()
    with wire.FakeProvider(script.refuse_all) as provider:
        ended = face(config_for(provider.address, retry_share=0.5, retry_rate=0.0), calls=40)
    assert {each.status for each in ended} == {Status.RESOURCE_EXHAUSTED}
    assert 40 < len(script.attempts) <= 40 + 10 + 40 * 0.5


@faces
def test_a_dead_address_is_tried_again(face: Face) -> None:
    """Something may listen there by then."""
    with held.dead() as address:
        began = time.monotonic()
        (error,) = face(config_for(address, retry_backoff=0.1, retry_backoff_max=0.1))
        assert time.monotonic() - began <= wire.PATIENCE / 2
    assert (error.status, error.not_run) == (Status.UNAVAILABLE, True)


def test_a_pause_ends_when_the_call_is_cancelled() -> None:
    controller = MprpcController()

    def refuse(peer: wire.Peer) -> None:
        peer.send(wire.response(peer.frame()[0].call_id, status=Status.RESOURCE_EXHAUSTED, not_run=True))
        controller.start_cancel()
        peer.rest()

    with wire.FakeProvider(refuse) as provider:
        config = config_for(provider.address, retry_backoff=3600.0, retry_backoff_max=3600.0)
        with MprpcChannel(config) as channel:
            users = services.user_mprpc.UserServiceRpc_Stub(channel)
            users.Login(services.REQUEST, controller=controller, timeout=86400.0)
    assert controller.status is Status.CANCELLED


class Two:
    """A slow provider and a fast one, and a registry that knows both; the slow one answers when the test says so."""

    def __init__(self, stack: contextlib.ExitStack, slow: held.Held | None = None) -> None:
        self.slow = slow or held.Held()
        zookeeper = stack.enter_context(EmbeddedZooKeeper())
        host, _, port = zookeeper.address.rpartition(":")
        keys: dict[str, Any] = {"zookeeperip": host, "zookeeperport": int(port)}
        providers = [stack.enter_context(services.serving(login, **keys)) for login in (self.hold, self.count)]
        stack.callback(self.slow.release)
        for provider in providers:
            assert provider.wait_registered(wire.PATIENCE)
        self.config = MprpcConfig(**keys, hedge_share=1.0, hedge_delay="0.02", balancer="round_robin")
        self.attempts: list[int] = []

    def hold(self, request: Any, controller: Any) -> Any:
        request.name = b"hold " + request.name
        return self.slow(request, controller)

    def all_attempts(self) -> list[int]:
        """At either."""
        return self.attempts + [controller.attempt for _, controller, _ in self.slow.calls]

    def count(self, request: Any, controller: Any) -> Any:
        self.attempts.append(controller.attempt)
        if request.name == b"fail":
            raise NotFound("nobody")
        return services.accept(request, controller)


@faces
def test_the_first_answer_wins_and_the_other_request_is_cancelled(face: Face) -> None:
    with contextlib.ExitStack() as stack:
        two = Two(stack)
        assert face(two.config, calls=10, idempotent=True) == [ANSWER] * 10
        assert two.slow.calls
        two.slow.cancelled(len(two.slow.calls))
        assert two.attempts.count(1) >= 1  # the slow one's attempts may be either: connecting may take long, too
        assert len(two.attempts) == 10


@faces
def test_without_budget_or_idempotency_nothing_is_hedged(face: Face) -> None:
    with contextlib.ExitStack() as stack:
        two = Two(stack)
        answers = face(two.config.replace(hedge_share=0.0), calls=6, timeout=0.2, idempotent=True)
        answers += face(two.config, calls=6, timeout=0.2)
        assert any(isinstance(each, DeadlineExceeded) for each in answers)
        assert set(two.all_attempts()) == {0}


@faces
def test_an_error_of_the_handler_is_an_answer(face: Face) -> None:
    with contextlib.ExitStack() as stack:
        two = Two(stack)
        answers = face(two.config, calls=4, idempotent=True, request=held.named("fail"))
        assert {each.status for each in answers} == {Status.NOT_FOUND}
        assert two.slow.calls


class Late(held.Held):
    """Answers by itself, after twice the hedge's delay."""

    def __call__(self, request: Any, controller: Any) -> Any:
        future = super().__call__(request, controller)
        timer = threading.Timer(0.04, self.answer, (future, services.accept(request, controller)))
        timer.start()
        return future

    @staticmethod
    def answer(future: Any, response: Any) -> None:
        with contextlib.suppress(InvalidStateError):  # its caller has gone
            future.set_result(response)


@faces
def test_hedging_has_its_cap(face: Face) -> None:
    """Without it every second call would be hedged; none fails, or the slow one would get no more of them."""
    with contextlib.ExitStack() as stack:
        two = Two(stack, Late())
        answers = face(two.config.replace(hedge_share=0.25), calls=40, idempotent=True)
        assert not [each for each in answers if isinstance(each, RpcError)]
        assert 1 <= two.all_attempts().count(1) <= 10


def test_a_hedged_call_that_is_cancelled_cancels_both() -> None:
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(held.holding()) for _ in range(2))
        channel = stack.enter_context(MprpcChannel(first[1].address))
        login = services.user_mprpc.UserServiceRpc_Stub(channel).Login.with_options(idempotent=True, hedge_delay=0.0)
        other = stack.enter_context(MprpcChannel(second[1].address))._fixed()
        known = (channel._fixed(), other)
        login._target = Listed(known)
        login._hedging._budget.called(1000)
        for _ in range(5):
            future = login.future(held.named("hold"), timeout=wire.PATIENCE)
            for each, _ in (first, second):
                each.taken()
            future.cancel()
            for each, _ in (first, second):
                each.cancelled()


def test_a_call_for_which_nobody_was_found_in_time_is_hedged_later() -> None:
    """It was never hedged: the list of providers came after the hedge's delay."""
    with contextlib.ExitStack() as stack:
        holder, slow = stack.enter_context(held.holding())

        def after(request: Any, controller: Any) -> Any:
            holder.taken()  # else the slow one may have heard that the call is over before it was run
            return services.accept(request, controller)

        fast = stack.enter_context(services.serving(after))
        channel = stack.enter_context(MprpcChannel(slow.address))
        other = stack.enter_context(MprpcChannel(fast.address))._fixed()
        login = services.user_mprpc.UserServiceRpc_Stub(channel).Login.with_options(idempotent=True, hedge_delay=0.01)
        before = login.with_options(hedge_delay="off").future(held.named("hold"), timeout=wire.PATIENCE)
        holder.taken()
        login._target = Listed((channel._fixed(), other), late=0.1)
        login._hedging._budget.called(1000)
        answer = login.future(held.named("hold"), timeout=wire.PATIENCE).result(wire.PATIENCE)
        assert answer == services.accept(held.named("hold"), None)
        before.cancel()
        holder.cancelled(2)


def test_a_call_that_is_given_up_is_no_latency() -> None:
    """It counted as one that had lasted since the machine was started."""
    with held.holding() as (holder, provider), MprpcChannel(provider.address) as channel:
        login = services.user_mprpc.UserServiceRpc_Stub(channel).Login.with_options(idempotent=True, hedge_delay="p95")
        future = login.future(held.named("hold"), timeout=wire.PATIENCE)
        holder.taken()
        future.cancel()
        assert login._hedging._count == 0


class Listed:
    """A target of subchannels that the test has; always the first one's turn. late: seconds that the list takes."""

    def __init__(self, endpoints: tuple[Any, ...], late: float = 0.0) -> None:
        self._endpoints = endpoints
        self._late = late

    def next(self) -> Any:
        return None if self._late else self._endpoints[0]

    def all(self, deadline: int, first: Any = None) -> tuple[Any, ...]:
        threading.Event().wait(self._late)
        return self._endpoints

    def known(self) -> tuple[Any, ...]:
        return self._endpoints

    def failed(self, endpoint: Any) -> None:
        pass


def test_options_are_checked() -> None:
    with services.calling("127.0.0.1:1") as users:
        with pytest.raises(ValueError, match="retries=-1"):
            users.Login.with_options(retries=-1)
        with pytest.raises(ValueError, match="attempt_timeout=nan"):
            users.Login.with_options(attempt_timeout=float("nan"))
        for wrong in ("p96", -1.0, ""):
            with pytest.raises(ValueError, match="hedge_delay="):
                users.Login.with_options(hedge_delay=wrong)
