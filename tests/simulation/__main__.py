"""`python tests/simulation`: see `__init__.py`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import generated
from mprpc.errors import RpcError
from reliability.report import Report, sources
from simulation.run import Run, native

STATE = generated.ROOT / ".simulation" / "state.json"
AT_ONCE = 100  # seeds of one task; what is done is written down after each


def simulate(seeds: range) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """How calls ended, which faults there were, and a line for each seed that found something."""
    ends: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    found = []
    for seed in seeds:
        done = Run(seed, native()).run()
        faults += done.faults
        ends.update(call.outcome.status.name if isinstance(call.outcome, RpcError) else "OK" for call in done.calls)
        if done.violations:
            found.append(f"python tests/simulation --seed {seed}   # {done.violations[0]}")
    return ends, faults, found


def replay(seed: int) -> int:
    done = Run(seed, native()).run()
    for text in done.violations:
        print(text)
    print(
        f"seed {seed}: {len(done.calls)} calls, {sum(done.faults.values())} faults, {len(done.violations)} violations"
    )
    print(f"every call ended as {done.digest} says")
    return 1 if done.violations else 0


class State:
    """What has been done of a run that may be stopped at any time."""

    def __init__(self, first: int, count: int) -> None:
        self._task = [first, count, sources("mprpc", "tests/simulation")]  # with others it is another run
        self.next = first
        self.ends: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.found: list[str] = []
        if STATE.exists() and (kept := json.loads(STATE.read_text()))["task"] == self._task:
            self.next, self.found = kept["next"], kept["found"]
            self.ends, self.faults = Counter(kept["ends"]), Counter(kept["faults"])

    def save(self) -> None:
        STATE.parent.mkdir(exist_ok=True)
        kept = {"task": self._task, "next": self.next, "found": self.found, "ends": self.ends, "faults": self.faults}
        made = STATE.with_suffix(".new")
        made.write_text(json.dumps(kept))
        made.replace(STATE)


def many(first: int, count: int, jobs: int) -> int:
    report = Report("simulation", first)
    state, end = State(first, count), first + count
    if state.next > first:
        report.progress(f"goes on from seed {state.next}")
    chunks = [range(seed, min(seed + AT_ONCE, end)) for seed in range(state.next, end, AT_ONCE)]
    with ProcessPoolExecutor(jobs) as pool:
        for chunk, (ends, faults, found) in zip(chunks, pool.map(simulate, chunks), strict=True):
            state.ends, state.faults = state.ends + Counter(ends), state.faults + Counter(faults)
            state.found += found
            state.next = chunk.stop
            state.save()
            for line in found:
                report.progress(line)
            if chunk.stop % (AT_ONCE * 10) == 0:
                report.progress(f"{chunk.stop - first:,} seeds")
    STATE.unlink(missing_ok=True)
    report.broken += state.found
    report.row("seeds", f"{first} to {end - 1}, {len(state.found)} with a violation")
    report.row("calls", f"{sum(state.ends.values()):,}: " + _counts(state.ends))
    report.row("faults", f"{sum(state.faults.values()):,}: " + _counts(state.faults))
    return report.finish()


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/simulation", description="Calls on a virtual clock.")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    return replay(options.seed) if options.seed is not None else many(options.first, options.count, options.jobs)


if __name__ == "__main__":
    sys.exit(main())
