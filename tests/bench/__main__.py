"""Compares mprpc with other systems in one run, pinned and interleaved:  python tests/bench [--quick] [MODE …]

Prints medians with minimum and maximum and the ratios to each named system; `--json` keeps all values. On a machine
with other work the absolute figures say little, the ratios still do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import report
import stubs
from modes import MODES, QUICK, Bench, callers, servers

HISTORY = stubs.HERE / "history.jsonl"
PICTURE = stubs.ROOT / "docs" / "benchmark.svg"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modes", nargs="*", metavar="MODE", help=f"of {', '.join(MODES)}; all by default")
    parser.add_argument("--quick", action="store_true", help=f"short rounds of {', '.join(QUICK)}, under a minute")
    parser.add_argument("--rounds", type=int, help="of each mode; 15, quick 5")
    parser.add_argument("--systems", help="comma-separated, of those in systems; all by default")
    parser.add_argument("--json", type=Path, help="write all values there")
    parser.add_argument("--picture", action="store_true", help=f"draw {PICTURE.relative_to(stubs.ROOT)}")
    parser.add_argument("--record", action="store_true", help=f"append the ratios to {HISTORY.name}")
    parser.add_argument("--check", action="store_true", help="exit code 1 for a ratio 10 %% worse than its history")
    parser.add_argument("--equal", metavar="FILE", help="only show that epoll_pb.py is not over 5 %% slower than FILE")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """What figures belong to."""
    import google.protobuf

    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=stubs.ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "protobuf": google.protobuf.__version__,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    only = set(options.systems.split(",")) if options.systems else None
    bench = Bench(options.rounds or (5 if options.quick else 15), 0.5 if options.quick else 1.0, only)
    for mode in options.modes or (QUICK if options.quick else MODES):
        start = time.monotonic()
        MODES[mode](bench)
        print(f"{mode}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    return {**machine(), "figures": bench.figures}


def equal(file: str, rounds: int) -> int:
    """Whether our epoll_pb is as fast as another file's, in p50 on one core and in server CPU."""
    from machinery import load

    ours = "epoll_pb"
    bench = Bench(rounds, 1.0)
    with servers([ours, file]) as running, callers(running, 0) as calling:
        for system in bench.interleave([ours, file]):
            bench.add("equal", system, p50=calling[system].tell("latency", 3000)["p50"] / 1000)
        for system in bench.interleave([ours, file]):
            told = load(running[system], "seconds", 0.4)
            bench.add("equal", system, cpu=told["cpu"] / told["calls"] * 1e6)
    found = {metric: report.Target("equal", metric, ours, file, at_most=1.05) for metric in ("p50", "cpu")}
    reached = True
    for metric, target in found.items():
        values = target.of(bench.figures)
        good = target.reached(median(values))
        reached &= good
        print(f"{metric}: ours / theirs {report.spread(values)}, {'equal' if good else 'SLOWER'}")
    return 0 if reached else 1


def main() -> int:
    options = arguments()
    if unknown := [mode for mode in options.modes if mode not in MODES]:
        print(f"no such mode: {unknown[0]}; there are {', '.join(MODES)}", file=sys.stderr)
        return 2
    stubs.use()
    if options.equal:
        return equal(options.equal, options.rounds or 15)
    told = measure(options)
    print(report.table(told["figures"]))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    if options.picture:
        import picture

        PICTURE.write_text(picture.draw(told))
    now = report.ratios(told["figures"])
    worse = report.regressions(told["figures"], report.history(HISTORY))
    for line in worse:
        print(f"WORSE  {line}")
    if options.record:
        with HISTORY.open("a") as file:
            file.write(json.dumps({**{k: v for k, v in told.items() if k != "figures"}, "ratios": now}) + "\n")
    return 1 if options.check and worse else 0


if __name__ == "__main__":
    sys.exit(main())
