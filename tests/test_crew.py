"""The crew in C: leaders and followers, under the sanitizers, and that a mistake in them is found."""

from __future__ import annotations

import re
import subprocess

import pytest

from generated import ROOT
from test_sanitizers import SECONDS, Build, build, runs

__all__ = ["build"]

CREW = ROOT / "mprpc" / "_crew.c"


@pytest.mark.parametrize("loops", ["1", "3"])
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "threads"])
def test_every_request_runs_once_and_is_answered_once(build: Build, memory: bool, loops: str) -> None:
    said = runs(build("crew", memory, CREW), "1000", loops)
    assert re.fullmatch(r"(\w+ [1-9]\d*(, )?){4}\n", said), said


def test_a_planted_stranded_batch_is_found(build: Build) -> None:
    """The watcher looks for a batch only before it says that it sleeps: one that begins in between is not seen."""
    program = build("crew", False, CREW, plant="MPRPC_PLANT_STRANDED")
    ran = subprocess.run([program, "2000", "1"], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert ran.returncode != 0
    assert "stranded" in ran.stderr
