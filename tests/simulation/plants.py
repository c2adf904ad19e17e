"""Bugs on purpose: what the simulation must find, or it finds nothing.

`IN_C` are lines of the session as they are and as they would be with the bug, all in one build of the C units;
`IN_PYTHON` are decisions replaced. `planted(name)` has the bug for a while, and gives the native units to run with.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from cffi import FFI

import generated
from mprpc import _native_build, retry
from mprpc.directory import Directory
from mprpc.registrar import Registrar
from mprpc.subchannel import Subchannel
from simulation import actors, run
from simulation.sessions import Native

UNITS = ("_codec.c", "_session.c")

IN_C = {
    "a call_id used again": (
        "    do\n        s->last_id++;",
        "    if (PLANTED && s->last_id % 5 == 4)\n        s->last_id--;\n    do\n        s->last_id++;",
    ),
    "call_ids that start again, and nobody who minds": (
        "if (dialect == MPRPC_FRAMED && f->call_id <= s->last_id)",
        "if (PLANTED && dialect == MPRPC_FRAMED)\n        f->call_id = 1 + f->call_id % 8;\n"
        "    else if (dialect == MPRPC_FRAMED && f->call_id <= s->last_id)",
    ),
    "a late answer that is let through": (
        "if (!mprpc_session_forget(s, f->call_id))",
        "if (!mprpc_session_forget(s, f->call_id) && !PLANTED)",
    ),
    "an answer for another call's tag": (
        "    e->tag = s->tags[f->call_id & (s->ring - 1)];",
        "    e->tag = s->tags[(f->call_id - (PLANTED && f->call_id % 16 == 15)) & (s->ring - 1)];",
    ),
    "a tag lost when the ring grows": (
        "            tags[s->ids[i] & (ring - 1)] = s->tags[i];",
        "            tags[s->ids[i] & (ring - 1)] = s->tags[PLANTED ? 0 : i];",
    ),
    "a GOAWAY that is not sent": (
        "    s->draining = TOLD;\n    return put(out, &r, NULL);",
        "    s->draining = TOLD;\n    return PLANTED ? OK : put(out, &r, NULL);",
    ),
    "a GOAWAY that says too little": (
        "struct mprpc_reply r = {.call_id = s->last_id, .kind = MPRPC_GOAWAY};",
        "struct mprpc_reply r = {.call_id = PLANTED ? 1 : s->last_id, .kind = MPRPC_GOAWAY};",
    ),
    "requests that are still run after GOAWAY": (
        "    if (s->draining) {",
        "    if (s->draining && !PLANTED) {",
    ),
    "a refusal that does not say not_run": (
        ".status = status, .not_run = 1,",
        ".status = status, .not_run = !PLANTED,",
    ),
    "a deadline of a thousandth": (
        "now + f->timeout_ms * UINT64_C(1000000)",
        "now + f->timeout_ms * UINT64_C(1000000) / (PLANTED ? 1000 : 1)",
    ),
    "a call that stays in flight for its client": (
        "    s->ids[id & (s->ring - 1)] = 0;\n    s->in_flight--;",
        "    s->ids[id & (s->ring - 1)] = 0;\n    s->in_flight -= !(PLANTED && id % 8 == 0);",
    ),
    "a call that stays in flight for its provider": (
        "void mprpc_session_unaccept(struct mprpc_session *s)\n{\n    s->in_flight--;",
        "void mprpc_session_unaccept(struct mprpc_session *s)\n{\n    s->in_flight -= !PLANTED;",
    ),
    "a PONG without its payload's end": (
        ".kind = MPRPC_PONG, .payload_size = f->payload_size,",
        ".kind = MPRPC_PONG, .payload_size = f->payload_size - (PLANTED && f->payload_size > 1),",
    ),
}


def _never(*_: object, **__: object) -> None:
    """An event that nobody hears of."""


def _any(*_: object) -> bool:
    return True


def _zero(*_: object) -> int:
    return 0


def _give_up_some(self: actors.Client, call: actors.Call) -> None:
    if call.number % 16:
        _give_up(self, call)


_give_up = actors.Client.give_up

IN_PYTHON: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a call that may have run is made again": (retry.Attempts, "_may_repeat", _any),
    "a retry without a budget": (retry.Budget, "take", _any),
    "a retry that says it is the first": (retry.Attempts, "number", property(_zero, _never)),
    "hedges for all": (retry.Hedging, "take", _any),
    "an endpoint that rests and is not probed": (Subchannel, "_probe_later", _never),
    "a deadline that is not kept": (actors.Client, "give_up", _give_up_some),
    "a new session that nobody registers in": (Registrar, "connected", _never),
    "a list that no watch renews": (Directory, "fired", _never),
}


@functools.cache
def _build() -> Any:
    """The C units with all the bugs, of which `mprpc_plant` is the one that is there."""
    directory = Path(tempfile.mkdtemp(prefix="mprpc-planted-"))
    source = (generated.ROOT / "mprpc" / "_session.c").read_text()
    for number, (right, wrong) in enumerate(IN_C.values(), 1):
        assert source.count(right) == 1, f"where is this line of _session.c?\n{right}"
        source = source.replace(right, wrong.replace("PLANTED", f"(mprpc_plant == {number})"))
    (directory / "_session.c").write_text("int mprpc_plant;\n" + source)
    ffi = FFI()
    ffi.cdef(_native_build.DECLARATIONS.partition("#define MPRPC_INCIDENTS_MAX")[0] + "extern int mprpc_plant;")
    ffi.set_source(
        "planted",
        '#include "_session.h"\nextern int mprpc_plant;',
        sources=[str(directory / "_session.c"), str(generated.ROOT / "mprpc" / "_codec.c")],
        include_dirs=[str(generated.ROOT / "mprpc")],
        extra_compile_args=["-O1"],
    )
    spec = importlib.util.spec_from_file_location("planted", ffi.compile(str(directory)))
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@functools.cache
def _native() -> Native:
    return Native(_build())


@contextlib.contextmanager
def planted(name: str) -> Iterator[Native]:
    """The native units to run with, while that bug is there."""
    if name in IN_PYTHON:
        owner, attribute, bug = IN_PYTHON[name]
        with mock.patch.object(owner, attribute, bug):
            yield run.native()
        return
    native = _native()
    native.lib.mprpc_plant = list(IN_C).index(name) + 1
    try:
        yield native
    finally:
        native.lib.mprpc_plant = 0
