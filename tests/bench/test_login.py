"""One blocking Login call through each system, both processes on one core; `pytest tests/bench --benchmark-only`.

The systems take turns, round by round, so that what disturbs the machine disturbs all of them.
"""

from __future__ import annotations

from typing import Any

import pytest

SYSTEMS = ["raw_socket", "epoll_pb", "grpcio", "mprpc"]
ROUNDS = 5
CALLS = {"grpcio": 300}  # where not 2,000


@pytest.mark.parametrize(("number", "system"), [(number, system) for number in range(ROUNDS) for system in SYSTEMS])
def test_login(benchmark: Any, login: Any, note_median: Any, number: int, system: str) -> None:
    if system == "grpcio":
        pytest.importorskip("grpc", reason="pip install mprpc-zk[bench]")
    benchmark.group = f"round {number}"
    call = login(system)
    reply = call()
    assert system == "raw_socket" or (reply.success and reply.result.errmsg == b"ok")
    benchmark.pedantic(call, rounds=CALLS.get(system, 2000), warmup_rounds=100)
    note_median(system, number, benchmark.stats.stats.median)
