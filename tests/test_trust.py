"""The sequence of all long runs, with tiny ones: what has passed is not repeated, what fails is said."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reliability import trust
from reliability.trust import Run

MINUTES = 0.1  # more than any of these takes
MOST = 90  # minutes for all
UNTIL_STOPPED = "signal.pause()"
# The first time, and a second time while it is stopped itself.
STOP_ALL = """
def stop():
    os.kill(os.getppid(), signal.SIGTERM)

if not Path({0!r}).exists():
    Path({0!r}).touch()
    try:
        stop()
        signal.pause()
    finally:
        stop()
"""

Make = Callable[..., Run]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run that does `body`, notes that it has, and prints a table."""

    def made(name: str, body: str = "", *, alone: bool = False, minutes: float = MINUTES) -> Run:
        script = tmp_path / f"{name}.py"
        script.write_text(
            f"import os, signal, sys\nfrom pathlib import Path\n{body}\n"
            f"with open({str(tmp_path / 'ran')!r}, 'a') as ran:\n    ran.write('{name} ')\n"
            f"print('progress\\n\\n{name} (seed 1)\\n  calls  7')\n"
        )
        return Run(name, (str(script),), minutes, alone)

    return made


def go(place: Path, *runs: Run, options: tuple[str, ...] = ()) -> int:
    return trust.main(options, runs, place / "state")


def ran(place: Path) -> list[str]:
    return (place / "ran").read_text().split()


def test_what_was_stopped_goes_on(make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And what has passed keeps its table."""
    runs = make("one", alone=True), make("two", STOP_ALL.format(str(tmp_path / "stopped")))
    last = make("three", alone=True)
    assert go(tmp_path, *runs, last) == 130
    assert ran(tmp_path) == ["one"]
    assert "two is stopped" in capfd.readouterr().out
    assert go(tmp_path, *runs, last) == 0
    assert ran(tmp_path) == ["one", "two", "three"]
    said = capfd.readouterr().out
    assert "2 of 3 runs are left" in said
    assert [f"\n{name} (seed 1)\n  calls  7\n  took" in said for name in ("one", "two", "three")] == [True] * 3
    assert "progress" not in said
    assert go(tmp_path, *runs, last) == 0
    assert len(ran(tmp_path)) == 3


def test_another_source_is_another_run(make: Make, tmp_path: Path) -> None:
    assert go(tmp_path, make("one"), make("two")) == 0
    assert go(tmp_path, make("one", "pass"), make("two")) == 0
    assert sorted(ran(tmp_path)) == ["one", "one", "two"]


def test_what_fails_is_said_and_ends_the_others(make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = make("bad", "sys.exit('a call was lost')"), make("beside", UNTIL_STOPPED), make("next", alone=True)
    assert go(tmp_path, *runs) == 1
    assert not (tmp_path / "ran").exists()
    said = capfd.readouterr().out
    assert "bad failed (1)" in said
    assert "a call was lost" in said
    assert f"python {tmp_path}/bad.py" in said
    assert "beside is stopped" in said
    assert "failed or left: bad, beside, next" in said


def test_the_others_may_keep_going(make: Make, tmp_path: Path) -> None:
    runs = make("bad", "sys.exit(1)", alone=True), make("good"), make("better")
    assert go(tmp_path, *runs, options=("--keep-going",)) == 1
    assert sorted(ran(tmp_path)) == ["better", "good"]
    assert go(tmp_path, make("bad", alone=True), *runs[1:]) == 0
    assert sorted(ran(tmp_path)) == ["bad", "better", "good"]


def test_what_hangs_is_ended(make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert go(tmp_path, make("silent", UNTIL_STOPPED, minutes=0.001)) == 1
    assert "silent has not ended after" in capfd.readouterr().out


def test_two_bear_company_and_others_none(make: Make, tmp_path: Path) -> None:
    """Each of the two ends only if the other is there; those that are alone would find the other's mark."""
    pipe, mark = tmp_path / "pipe", str(tmp_path / "mark")
    os.mkfifo(pipe)
    alone = f"os.mkdir({mark!r}); os.rmdir({mark!r})"
    runs = (
        make("first", alone, alone=True),
        make("second", alone, alone=True),
        make("reads", f"open({str(pipe)!r}).read()"),
        make("writes", f"open({str(pipe)!r}, 'w').close()"),
        make("last", alone, alone=True),
    )
    assert go(tmp_path, *runs) == 0
    assert ran(tmp_path)[:2] == ["first", "second"]
    assert ran(tmp_path)[-1] == "last"


def test_all_together_take_less_than_ninety_minutes() -> None:
    assert trust.remaining(trust.RUNS) < MOST
    assert trust.remaining([Run("a", (), 2, alone=True), Run("b", (), 5), Run("c", (), 3), Run("d", (), 1)]) == 7
