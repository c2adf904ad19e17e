"""`python tests/fuzz`: see `__init__.py`."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import generated
from fuzz import targets
from reliability.report import Report, sources

ROOT = generated.ROOT
PLACE = ROOT / ".fuzz"
IN_C = ("codec", "session", "pair")
SOURCES = ("tests/c/oracle.c", "mprpc/_codec.c", "mprpc/_session.c")
SANITIZED = [
    "-std=gnu11", "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all",
    "-Imprpc", "-Itests/c",
]  # fmt: skip
LENGTH = "-max_len={}"
LONGEST = {"pair": 200}  # bytes of an input, each of which is a step there
SLICE_C, SLICE_PYTHON = 500_000, 20_000  # executions after which what has been done is written down


class State:
    """How many executions a target has had; with other sources it has had none."""

    def __init__(self, target: str) -> None:
        headers = sorted((ROOT / "mprpc").glob("_*.h"))
        in_c = (*SOURCES, *headers, "tests/c/oracle.h", f"tests/fuzz/fuzz_{target}.c")
        self._tree = sources(*(in_c if target in IN_C else ("mprpc", "tests/fuzz")))
        self._file = PLACE / f"{target}.json"
        kept = json.loads(self._file.read_text()) if self._file.exists() else {}
        same = kept.get("tree") == self._tree
        self.executions: int = kept["executions"] if same else 0
        self.seconds: float = kept["seconds"] if same else 0.0

    def add(self, executions: int, seconds: float) -> None:
        self.executions += executions
        self.seconds += seconds
        self._file.write_text(json.dumps({"tree": self._tree, "executions": self.executions, "seconds": self.seconds}))


def in_c(target: str, seed: int) -> Callable[[int, int], int]:
    """Runs so many executions; how many they were."""
    program, corpus = PLACE / target, PLACE / f"{target}.corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    source = f"tests/fuzz/fuzz_{target}.c"
    subprocess.run(["clang", *SANITIZED, source, *SOURCES, "-o", str(program)], cwd=ROOT, check=True)

    def run(first: int, count: int) -> int:
        ran = subprocess.run(
            [
                str(program), f"-runs={count}", f"-seed={seed + 1 + first // SLICE_C}",
                LENGTH.format(LONGEST.get(target, 600)),
                f"-artifact_prefix={PLACE}/", str(corpus), f"tests/fuzz/corpus/{target}",
            ],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        done = re.search(r"Done (\d+) runs", ran.stderr)
        if ran.returncode or done is None:
            raise AssertionError(ran.stderr[-3000:])
        return int(done[1])

    return run


def fuzz(target: str, options: argparse.Namespace, report: Report) -> None:
    state = State(target)
    with contextlib.ExitStack() as ends:
        if target in IN_C:
            run, size = in_c(target, options.seed), SLICE_C
        else:
            run, size = in_python(target, options.seed, ends), SLICE_PYTHON
        end = time.monotonic() + options.seconds
        try:
            while (left := options.executions - state.executions) > 0 or (
                not options.executions and time.monotonic() < end
            ):
                count, began = min(size, left) if options.executions else size, time.monotonic()
                state.add(run(state.executions, count), time.monotonic() - began)
                report.progress(f"{target}: {state.executions:,} executions")
        except AssertionError as error:
            report.breach(f"{target}: {error}")
    rate = state.executions / state.seconds if state.seconds else 0.0
    report.row(target, f"{state.executions:,} executions in {state.seconds:,.0f} s, {rate:,.0f} a second")


def in_python(target: str, seed: int, ends: contextlib.ExitStack) -> Callable[[int, int], int]:
    subject = targets.TARGETS[target]()
    ends.callback(subject.close)

    def run(first: int, count: int) -> int:
        targets.attack(subject, seed, first, count)
        return count

    return run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description="Any bytes at all.")
    parser.add_argument("targets", nargs="*", default=[*IN_C, "frames", "provider", "channel"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--executions", type=int, default=0)
    options = parser.parse_args()
    PLACE.mkdir(exist_ok=True)
    report = Report("fuzzing", options.seed)
    for target in options.targets:
        fuzz(target, options, report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
