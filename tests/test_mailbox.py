"""The mailbox in C: stories of calls that nobody waits for, and a crowd of them, under the sanitizers."""

from __future__ import annotations

import re

import pytest

from test_sanitizers import UNITS, Build, build, runs

__all__ = ["build"]


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "threads"])
def test_stories_and_a_crowd(build: Build, memory: bool) -> None:
    said = runs(build("mailbox", memory, *UNITS))
    assert re.fullmatch(r"(\w+ [1-9]\d*(, )?){3}\n", said), said
