"""Generated modules for the benchmarks: the examples' user_pb2, and bench_pb2 with what is called beside.

Made once a run, by the protoc that fits, in a directory that goes away with the process; servers and callers find it
through `environment()`. All processes see to it that protobuf runs on its C implementation (upb): with another the
figures would compare protobuf's implementations.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@functools.cache
def directory() -> Path:
    """Where the generated modules are."""
    if str(HERE.parent) not in sys.path:
        sys.path.insert(0, str(HERE.parent))
    import generated

    out = Path(tempfile.mkdtemp(prefix="mprpc-bench-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    for proto in (ROOT / "proto" / "user.proto", HERE / "bench.proto"):
        ran = generated.run_protoc(f"-I{proto.parent}", f"--python_out={out}", f"--mprpc_out={out}", proto)
        if ran.returncode != 0:
            raise RuntimeError(f"protoc failed:\n{ran.stderr}")
    return out


def environment() -> dict[str, str]:
    """For the processes of a run: this tree's mprpc and the generated modules."""
    paths = os.pathsep.join([str(ROOT), str(HERE), str(directory())])
    return {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": ""}  # the first call imports what is compiled


def use() -> None:
    """Makes the generated modules importable in this process."""
    for path in (str(ROOT), str(directory())):
        if path not in sys.path:
            sys.path.insert(0, path)
    assert_upb()


def assert_upb() -> None:
    """Raises RuntimeError unless protobuf's messages are upb's."""
    from google.protobuf.internal import api_implementation

    if api_implementation.Type() != "upb":
        raise RuntimeError(f"protobuf runs on {api_implementation.Type()!r}, not on upb: reinstall protobuf")
