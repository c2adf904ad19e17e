"""The simulation: a short run of what `make simulation` does at length, and planted bugs that it must find."""

from __future__ import annotations

import subprocess
import sys

import pytest

import generated
from simulation import plants
from simulation.run import Run, native

SEEDS = 500
FOUND_WITHIN = 60  # seeds


@pytest.mark.parametrize("first", range(0, SEEDS, 100))
def test_seeds(first: int) -> None:
    for seed in range(first, first + 100):
        done = Run(seed, native()).run()
        assert not done.violations, f"python tests/simulation --seed {seed}   # {done.violations[0]}"
        assert len(done.calls) >= 300
        assert sum(done.faults.values()) >= 10, seed


@pytest.mark.parametrize("bug", [*plants.IN_C, *plants.IN_PYTHON])
def test_a_planted_bug_is_found(bug: str) -> None:
    with plants.planted(bug) as units:
        assert any(Run(seed, units).run().violations for seed in range(FOUND_WITHIN))


def test_the_planted_build_without_a_bug_is_clean() -> None:
    with plants.planted(next(iter(plants.IN_C))) as units:
        units.lib.mprpc_plant = 0
        assert not any(Run(seed, units).run().violations for seed in range(20))


def test_a_seed_is_the_same_in_another_process() -> None:
    """Whatever order sets have there."""
    digest = Run(11, native()).run().digest
    for hash_seed in ("1", "2"):
        said = subprocess.run(
            [sys.executable, str(generated.ROOT / "tests" / "simulation"), "--seed", "11"],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert digest in said
