"""Outliers: what makes an endpoint rest, for how long, how it returns, and who fails more than its peers. No clock."""

from __future__ import annotations

import pytest

from mprpc.outliers import REST_FIRST, REST_LONGEST, VOLUME, WINDOW, Health, Rates


def test_a_rest_doubles_as_long_as_the_probe_has_no_answer() -> None:
    health, now = Health(), 100.0
    rests: list[float] = []
    assert health.rest(now, "refused")
    while len(rests) < 12:
        assert health.out
        rests.append(health.rests_until - now)
        now = health.rests_until
        assert not health.probed(False, now)
    assert rests[:4] == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert rests[-1] == REST_LONGEST
    assert health.rests == 1
    assert health.why == "refused"


def test_what_fails_while_it_rests_makes_it_no_longer() -> None:
    health = Health()
    assert health.rest(1.0, "refused")
    assert not health.rest(1.01, "refused")
    assert not health.suspect(1.02)
    assert health.rests_until == 1.0 + REST_FIRST


def test_it_returns_gently_when_a_probe_is_answered() -> None:
    health = Health()
    health.rest(1.0, "refused")
    assert health.probed(True, 1.2)
    assert not health.out
    assert health.share(1.2, 10.0) == pytest.approx(0.1)
    assert health.share(6.2, 10.0) == pytest.approx(0.5)
    assert health.share(11.2, 10.0) == 1.0
    assert health.share(1.2, 0.0) == 1.0


def test_a_failure_soon_after_the_return_doubles_the_rest_and_a_late_one_starts_over() -> None:
    health = Health()
    health.rest(1.0, "broke")
    health.probed(True, 1.1)
    health.rest(5.0, "broke")
    assert health.rests_until - 5.0 == pytest.approx(2 * REST_FIRST)
    health.probed(True, 5.2)
    health.rest(60.0, "broke")
    assert health.rests_until - 60.0 == pytest.approx(REST_FIRST)


def test_a_connection_that_can_be_made_at_once_costs_no_share() -> None:
    """An idle connection has been closed by the other side, and the next one is there at once."""
    health = Health()
    health.rest(1.0, "the provider ended the connection")
    assert health.back(1.01)
    assert health.share(1.01, 10.0) == 1.0


def test_suspicion_ends_without_a_trace_when_the_probe_is_answered() -> None:
    health = Health()
    assert health.suspect(1.0)
    assert health.out
    assert health.suspected
    assert not health.back(1.0)  # that it accepts connections says nothing: a stopped process does
    assert health.probed(True, 1.01)
    assert not health.out
    assert health.rests == 0
    assert health.share(1.01, 10.0) == 1.0
    assert not health.suspect(1.5)  # it was there just now: its slow calls would have it probed all the time
    assert health.suspect(2.5)


def test_a_suspect_that_does_not_answer_rests() -> None:
    health = Health()
    health.suspect(1.0)
    assert not health.probed(False, 2.0)
    assert health.out
    assert not health.suspected
    assert health.rests == 1
    assert health.rests_until == pytest.approx(2.0 + REST_FIRST)


def test_another_provider_at_the_address_rests_for_nobody() -> None:
    health = Health()
    health.rest(1.0, "refused")
    health.forget()
    assert not health.out
    assert health.share(1.0, 10.0) == 1.0


class Peer:
    def __init__(self, address: str) -> None:
        self.address = address
        self.health = Health()
        self.ended = 0

    def calls(self, ended: int, failures: int = 0) -> None:
        self.ended += ended
        self.health.failures += failures


def outliers(*calls: tuple[int, int]) -> list[int]:
    """Which of peers rest after so many calls, and failures among them, within a window."""
    peers = [Peer(str(i)) for i in range(len(calls))]
    for each in peers:
        each.calls(1000, 500)  # before the window: that counts for nothing
    rates = Rates()
    assert rates.outliers(peers, 100.0) == []
    for each, (ended, failures) in zip(peers, calls, strict=True):
        each.calls(ended, failures)
    return [int(each.address) for each in rates.outliers(peers, 102.0)]


@pytest.mark.parametrize(
    ("calls", "found"),
    [
        ([(100, 50)] + [(100, 0)] * 9, [0]),
        ([(100, 50), (100, 0)], [0]),
        ([(100, 50), (100, 45)] + [(100, 1)] * 8, [0, 1]),
        ([(100, 50)] * 10, []),  # all are the same: that is the service's fault, or the caller's
        ([(100, 12)] + [(100, 5)] * 9, []),  # chance
        ([(100, 8)] + [(100, 0)] * 9, []),  # under the margin
        ([(VOLUME - 1, VOLUME - 1)] + [(100, 0)] * 9, []),  # too few calls to say anything
        ([(100, 100)], []),  # no peers
        ([(100, 100)] + [(5, 0)] * 9, []),  # none that says anything
        ([(10_000, 3000)] + [(10_000, 500)] * 3, [0]),
        ([(100, 30), (100, 10), (100, 35), (100, 0)], []),  # all differ
    ],
)
def test_who_fails_far_more_often_than_its_peers(calls: list[tuple[int, int]], found: list[int]) -> None:
    assert outliers(*calls) == found


def test_the_window_moves_on() -> None:
    peers = [Peer(str(i)) for i in range(5)]
    rates = Rates()
    rates.outliers(peers, 0.0)
    peers[0].calls(100, 100)
    for each in peers:
        each.calls(100)
    assert rates.outliers(peers, WINDOW + 1.0) == []  # those of before are forgotten, with what speaks against it
    for each in peers:
        each.calls(100)
    assert rates.outliers(peers, WINDOW + 3.0) == []


def test_the_list_is_compared_at_most_once_a_second() -> None:
    peers = [Peer(str(i)) for i in range(5)]
    rates = Rates()
    rates.outliers(peers, 0.0)
    for each in peers:
        each.calls(100, 60 * (each is peers[0]))
    assert rates.outliers(peers, 0.9) == []
    assert rates.outliers(peers, 1.1) == [peers[0]]
    assert rates.outliers(peers, 1.2) == []


def test_one_that_rests_already_is_no_news() -> None:
    peers = [Peer(str(i)) for i in range(5)]
    rates = Rates()
    rates.outliers(peers, 0.0)
    for each in peers:
        each.calls(100, 60 * (each is peers[0]))
    peers[0].health.rest(1.0, "refused")
    assert rates.outliers(peers, 1.1) == []
