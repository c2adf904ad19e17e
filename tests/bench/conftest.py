"""For the pytest form of the comparison: both sides of every call on one core, and the ratios at the end."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median
from typing import Any

import pytest

RATIOS = [("mprpc", "epoll_pb"), ("mprpc", "grpcio"), ("mprpc", "raw_socket"), ("epoll_pb", "raw_socket")]

# system -> round -> seconds, the median of that round's calls
_medians: dict[str, dict[int, float]] = defaultdict(dict)


@pytest.fixture(autouse=True)
def _leaves_nothing() -> None:
    """Unlike elsewhere in the tests: the servers outlive a test, because the systems take turns."""


@pytest.fixture(scope="session")
def one_core() -> Iterator[None]:
    """This process on core 0, beside the servers."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="session")
def login(one_core: None) -> Iterator[Any]:
    """system -> a callable that makes one Login call; a system's server is started when first asked for."""
    import stubs

    stubs.use()
    from clients import CLIENTS
    from machinery import Server

    clients: dict[str, Any] = {}
    with ExitStack() as stack:

        def of(system: str) -> Any:
            if system not in clients:
                name = "raw_python" if system == "raw_socket" else system
                server = stack.enter_context(Server(name, min(os.sched_getaffinity(0))))
                clients[system] = CLIENTS[name](server.port)
                stack.callback(clients[system].close)
            return clients[system].login

        yield of


@pytest.fixture
def note_median() -> Any:
    def note(system: str, number: int, seconds: float) -> None:
        _medians[system][number] = seconds

    return note


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _medians:
        return
    terminalreporter.section("Login, both processes on one core: ratios of medians, median (min-max) of the rounds")
    for system, other in RATIOS:
        both = _medians[system].keys() & _medians[other].keys()
        values = sorted(_medians[system][number] / _medians[other][number] for number in both)
        if values:
            line = f"{system} / {other}".ljust(28) + f"{median(values):.3f}  ({values[0]:.3f}-{values[-1]:.3f})"
            terminalreporter.write_line(line)
