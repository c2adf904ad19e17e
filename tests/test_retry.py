"""What a call may still try: the decider by itself, with a clock and chance of the test's."""

from __future__ import annotations

import contextlib
import random

import pytest

from mprpc.errors import DeadlineExceeded, Internal, ResourceExhausted, RpcError, Status, Unavailable, Unimplemented
from mprpc.retry import Attempts, Budget, Policy

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
                assert call.problem is error
                break
            assert now + pause < call.deadline
            assert ran == 0 or policy.idempotent  # nothing else runs twice
            assert call.number == ran
            free = free + 1 if error is UNSENT else 0
            assert free <= 3 * (2 * len(endpoints) + 1)
            now += pause
    assert tokens.taken <= calls * share + now / S * rate + 10 * max(rate, 1.0)
