"""What holds for every test: it leaves no thread and no child process behind, and upb is what parses messages."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from google.protobuf.internal import api_implementation

GONE_SECONDS = 5.0  # for a thread that is on its way out
POLL_SECONDS = 0.01
SHARED = b"QuorumPeerMain"  # one ZooKeeper serves a whole run

# That the machine is busy with something else is no finding.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

assert api_implementation.Type() == "upb", "figures and limits here are those of protobuf's C runtime, upb"


def _children() -> dict[int, bytes]:
    """Command lines of this process's children, zombies included."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread, or the child, has ended meanwhile
            for pid in (task / "children").read_text().split():
                found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes()
    return {pid: line for pid, line in found.items() if SHARED not in line}


def _leftovers(threads: set[threading.Thread], children: dict[int, bytes]) -> list[str]:
    crews = {getattr(each, "crew", None) for each in threads} - {None}  # of providers that serve several tests
    there = [each for each in threading.enumerate() if getattr(each, "crew", None) not in crews]
    stayed = [f"thread {each.name}" for each in there if each not in threads]
    return stayed + [f"process {pid} {line!r}" for pid, line in _children().items() if pid not in children]


@pytest.fixture(autouse=True)
def _leaves_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves threads or child processes behind."""
    threads, children = set(threading.enumerate()), _children()
    yield
    deadline = time.monotonic() + GONE_SECONDS
    while (left := _leftovers(threads, children)) and time.monotonic() < deadline:
        threading.Event().wait(POLL_SECONDS)
    assert not left, f"{request.node.nodeid} left behind: {', '.join(left)}"


@pytest.fixture(params=["epoll", "poll"])
def poller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with both of the loop's pollers."""
    monkeypatch.delenv("MPRPC_POLL", raising=False)
    if request.param == "poll":
        monkeypatch.setenv("MPRPC_POLL", "1")
    return str(request.param)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: minutes instead of seconds; only with MPRPC_LONG=1 in the environment")
    config.addinivalue_line("markers", "slow: builds packages or starts a JVM; leave out with -m 'not slow'")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("MPRPC_LONG") != "1":
        skip = pytest.mark.skip(reason="long: set MPRPC_LONG=1")
        for item in items:
            if "long" in item.keywords:
                item.add_marker(skip)
