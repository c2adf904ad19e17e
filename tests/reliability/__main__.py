"""`python tests/reliability RUN`: see `__init__.py`."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from reliability import (
    balance,
    cycles,
    faults,
    herd,
    hostile,
    hunt,
    overload,
    proxy,
    restarts,
    retries,
    soak,
    trust,
    workers,
)


class Run(Protocol):
    """What each of them takes: the exit code comes back."""

    def __call__(self, *, seed: int, count: int, minutes: float) -> int: ...


RUNS: dict[str, tuple[Run, int]] = {
    "rolling": (restarts.rolling, 200),
    "kill": (restarts.kill, 100),
    "faults": (faults.faults, 300),
    "outage": (faults.outage, 90),
    "herd": (herd.herd, 300),
    "cycles": (cycles.cycles, 400),
    "hunt": (hunt.hunt, 2_000_000),
    "proxy": (proxy.proxy, 20),
    "soak": (soak.soak, 60),
    "retries": (retries.retries, 30),
    "workers": (workers.workers, 50),
    "balance": (balance.balance, 15),
    "hostile": (hostile.hostile, 5),
    "overload": (overload.overload, 10),
}


def main() -> int:
    if sys.argv[1:2] == ["trust"]:
        return trust.main(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python tests/reliability", description="Long runs that hurt.")
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--count", type=int, help="how many (balance, hostile, outage, overload, proxy, retries: seconds)"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="end after these, whatever has been done")
    options = parser.parse_args()
    logging.getLogger("kazoo").setLevel(logging.CRITICAL)  # that connections are lost is no news here
    run, count = RUNS[options.run]
    return run(seed=options.seed, count=options.count or count, minutes=options.minutes)


if __name__ == "__main__":
    sys.exit(main())
