"""The C units under gcc's sanitizers: what they do with any bytes, with many threads, and in stories that went wrong.

The programs are in tests/c and say at their heads what they do. Without the sanitizers these tests are skipped, but not
in CI. CC chooses the compiler.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import test_codec
import test_session

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "c"
FUZZ = ROOT / "tests" / "fuzz"
ALL = sorted(each for each in (ROOT / "mprpc").glob("_*.c") if each.name != "_native.c")
UNITS = [each for each in ALL if "_fast.h" not in each.read_text()]  # without those that hold Python objects
PURE = [each for each in UNITS if each.name in ("_codec.c", "_session.c")]
CC = shlex.split(os.environ.get("CC", "gcc"))
STRICT = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-pthread"]
MEMORY = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-O1", "-fsanitize=thread"]
FINDINGS = {"end": MEMORY, "overflow": MEMORY, "race": THREADS}
SECONDS = 120.0  # for one program; most take less than five
MUTATIONS = 200_000

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Compiles a program of tests/c under a sanitizer, once; skips, or fails in CI, where there is none.

    plant: a mistake in a unit, to be found, by the name that is defined for it.
    """
    directory = tmp_path_factory.mktemp("sanitized")

    @functools.cache
    def built(name: str, memory: bool, *units: Path, plant: str = "") -> Path:
        program = directory / f"{name}-{'memory' if memory else 'threads'}{plant}"
        sources = [FUZZ / f"{name}.c", FUZZ / "standalone.c"] if name.startswith("fuzz_") else [PROGRAMS / f"{name}.c"]
        if units == tuple(PURE):
            sources.append(PROGRAMS / "oracle.c")
        flags = [*STRICT, *(MEMORY if memory else THREADS), f"-I{ROOT / 'mprpc'}", f"-I{PROGRAMS}"]
        flags += [f"-D{plant}"] if plant else []
        made = _run([*CC, *flags, *map(str, [*sources, *units]), "-o", str(program)])
        assert made.returncode == 0, made.stderr
        return program

    def checked(name: str, memory: bool, *units: Path, plant: str = "") -> Path:
        if shutil.which(CC[0]) is None:
            _without(f"there is no compiler {CC[0]}")
        try:
            canary = built("canary", memory)
        except AssertionError as error:
            _without(f"{CC[0]} has not the sanitizers: {str(error).splitlines()[0]}")
        if _run([str(canary)]).returncode != 0:
            _without(f"programs do not run under {CC[0]}'s {'address' if memory else 'thread'} sanitizer here")
        return built(name, memory, *units, plant=plant)

    return checked


def _without(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def runs(program: Path, *arguments: str | Path) -> str:
    """What it prints; the sanitizer's finding is the failure's text."""
    ran = _run([str(program), *map(str, arguments)])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("unit", ALL, ids=[unit.name for unit in ALL])
def test_a_unit_compiles_without_a_warning(unit: Path) -> None:
    if shutil.which(CC[0]) is None:
        _without(f"there is no compiler {CC[0]}")
    made = _run(
        [*CC, *STRICT, "-std=c11", "-O2", f"-I{sysconfig.get_path('include')}", "-c", str(unit), "-o", os.devnull]
    )
    assert (made.returncode, made.stderr) == (0, "")


@pytest.mark.parametrize("finding", FINDINGS)
def test_the_sanitizers_find_what_they_are_for(build: Build, finding: str) -> None:
    program = build("canary", FINDINGS[finding] is MEMORY)
    assert _run([str(program), finding]).returncode != 0


def test_all_literal_bytes_and_their_mutations_end_at_an_unmapped_page(build: Build, tmp_path: Path) -> None:
    literal = [bytes.fromhex(row[1]) for row in [*test_codec.FRAMES, *test_codec.MALFORMED]]
    literal += [test_session.raw(row[1]) for row in test_session.SERVED + test_session.CALLED]
    vectors = tmp_path / "vectors"
    vectors.write_bytes(b"".join(len(each).to_bytes(4, "little") + each for each in literal))
    said = runs(build("guarded", True, *PURE), vectors, str(MUTATIONS))
    assert said == f"{len(literal)} vectors, {MUTATIONS} mutations\n"


@pytest.mark.parametrize("target", ["codec", "session", "pair"])
def test_the_fuzzers_corpus(build: Build, target: str) -> None:
    inputs = sorted((FUZZ / "corpus" / target).iterdir())
    assert len(inputs) > 10
    assert runs(build(f"fuzz_{target}", True, *PURE), *inputs) == f"{len(inputs)} inputs\n"


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "threads"])
def test_stories_that_went_wrong_once(build: Build, memory: bool) -> None:
    runs(build("scenarios", memory, *UNITS))


@pytest.mark.parametrize("poller", ["epoll", "poll"])
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "threads"])
def test_loops_and_connections_under_load(build: Build, memory: bool, poller: str) -> None:
    """poller: that of the loop that accepts; the other loop has the other."""
    said = runs(build("stress", memory, *UNITS), "2", *(["poll"] if poller == "poll" else []))
    assert re.fullmatch(r"(\w+( \w+)? [1-9]\d*(, )?){9}\n", said), said


@pytest.mark.parametrize("plant", ["HASTY", "STRANDED"])
def test_connections_handed_on_wrongly_are_found(build: Build, plant: str) -> None:
    """HASTY: one with calls in flight. STRANDED: without waking the loop that gets it."""
    ran = _run([str(build("stress", True, *UNITS, plant=f"MPRPC_PLANT_{plant}")), "2"])
    assert ran.returncode != 0
    assert "does not hold" in ran.stderr


@pytest.mark.parametrize("memory", [True, False], ids=["memory", "threads"])
def test_connections_within_the_process(build: Build, memory: bool) -> None:
    said = runs(build("wire", memory, *UNITS))
    assert re.fullmatch(r"answered [1-9]\d*, refused [1-9]\d*\n", said), said
