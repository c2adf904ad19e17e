"""Layers go one way: the imports of every module and the includes of every C unit, against one table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import generated

PACKAGE = generated.ROOT / "mprpc"

# Lower layers first; a module may import its own layer and those below. What stands alone imports nothing of ours.
LAYERS = [
    {"errors", "config", "late", "log", "signals"},
    {"_native", "fast"},
    {"controller", "incidents", "service", "statistics"},
    # registry and balancer, with the rooms that they were divided into
    {
        "administration",
        "desk",
        "directory",
        "layout",
        "probe",
        "reconciler",
        "registrar",
        "registry",
        "saved_lists",
        "zookeeper_client",
        "balancer",
        "outliers",
        "timekeeper",
    },
    {
        "memory",
        "pool",
        "subchannel",
        "target",
        "crew",
        "detached",
        "limiter",
        "provider",
        "channel",
        "unary_call",
        "futures",
        "coroutines",
        "aio",
        "retry",
        "context",
        "workers",
    },
    {"testing", "registry_command", "__main__", "__init__"},
]
ALONE = {"embedded_zookeeper", "plugin"}
MAY_EMBED = {"provider", "workers", "testing", "__main__"}

# The deciders work on events and time that they are given.
DECIDERS = {"balancer", "limiter", "outliers", "reconciler", "registrar", "directory", "desk", "layout", "retry"}
SHELLS = {"socket", "threading", "time", "select", "kazoo", "random", "selectors", "asyncio", "queue"}

# What each C unit may include, beside its own header. Loop and channel are siblings.
CHANNEL = {"_codec", "_session", "_fork", "_wire", "_load", "_link", "_channel", "_keeper", "_mailbox"}
BELOW: dict[str, set[str]] = dict.fromkeys(CHANNEL, CHANNEL) | {
    "_codec": set(),
    "_tally": set(),
    "_gate": set(),
    "_placement": set(),
    "_session": {"_codec"},
    "_fork": set(),
    "_wire": {"_codec", "_session", "_fork"},
    "_loop": {"_codec", "_session", "_fork", "_wire", "_tally", "_gate", "_placement"},
    "_crew": {"_fork"},
    "_load": set(),
}
# What holds Python objects, above the rest.
FAST = {"_fast", "_call", "_future", "_serve", "_context"}
BELOW |= {unit: {"_fast", "_call", *CHANNEL, "_tally", "_loop", "_placement", "_crew"} for unit in FAST}
SYSTEM = re.compile(r"sys/|netinet/|arpa/|poll\.h|pthread\.h|unistd\.h|time\.h|signal\.h|fcntl\.h")


def modules() -> list[Path]:
    return sorted(PACKAGE.glob("*.py")) + sorted((PACKAGE / "embedded_zookeeper").glob("*.py"))


def room(path: Path) -> str:
    return path.parent.name if path.parent != PACKAGE else path.stem


def imports(path: Path, *, typing_too: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything a module imports, also inside functions; not what only type checkers import."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_too:
            skipped.update(id(inner) for statement in node.body for inner in ast.walk(statement))
    package = ["mprpc", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            if module == "mprpc":
                yield from ((f"mprpc.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield module, node.lineno


def layer(name: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if name in names]
    assert found, f"mprpc/{name} has no layer: say in tests/test_layers.py where it belongs"
    return found[0]


def rooms_imported(path: Path) -> Iterator[tuple[str, int]]:
    names = {room(each) for each in modules()} | {"_native"}
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "mprpc":
            inner = parts[1] if len(parts) > 1 else "__init__"
            yield (inner if inner in names else "__init__"), line  # a name of the package, not a module


@pytest.mark.parametrize("path", modules(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_go_down(path: Path) -> None:
    mine = room(path)
    for other, line in rooms_imported(path):
        where = f"{path.name}:{line} imports {other}"
        if mine in ALONE:
            assert other == mine, f"{where}: {mine} imports nothing of the rest"
        elif other == "embedded_zookeeper":
            assert mine in MAY_EMBED, where
        elif mine != "__main__":
            assert other not in ALONE, where
            assert layer(other) <= layer(mine), where


def test_every_layered_module_is_ours() -> None:
    """The other direction: the table has no room that was renamed away, but those that are still planned."""
    there = {room(path) for path in modules()} | {"_native"}
    assert set().union(*LAYERS) - there <= {"futures", "coroutines", "aio"}


@pytest.mark.parametrize("name", sorted(DECIDERS))
def test_deciders_know_no_thread_socket_or_clock(name: str) -> None:
    for module, line in imports(PACKAGE / f"{name}.py"):
        assert module.partition(".")[0] not in SHELLS, f"{name}.py:{line} imports {module}"


CORE = ["errors", "config", "controller", "service", "provider", "channel", "subchannel", "target", "unary_call"]


@pytest.mark.parametrize("name", CORE)
def test_core_loads_no_generated_code_kazoo_or_asyncio(name: str) -> None:
    for module, line in imports(PACKAGE / f"{name}.py"):
        assert not module.endswith("_pb2"), f"{name}.py:{line}"
        assert module.partition(".")[0] not in ("kazoo", "asyncio"), f"{name}.py:{line} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_rooms_for_odds_and_ends(path: Path) -> None:
    assert path.stem.strip("_") not in {"utils", "util", "common", "types", "constants", "helpers", "misc"}


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def units() -> list[Path]:
    return [path for path in sorted(PACKAGE.glob("_*.[ch]")) if path.name != "_native.c"]


@pytest.mark.parametrize("path", units(), ids=lambda path: path.name)
def test_c_units_include_what_is_below_them(path: Path) -> None:
    ours = {name.removesuffix(".h") for name in includes(path) if name.startswith("_")}
    assert ours <= BELOW[path.stem] | {path.stem}, f"say in tests/test_layers.py what {path.name} may include"


@pytest.mark.parametrize("name", ["_codec.c", "_codec.h", "_session.c", "_session.h"])
def test_codec_and_session_make_no_system_call(name: str) -> None:
    assert not [each for each in includes(PACKAGE / name) if SYSTEM.search(each)]
    assert not re.search(r"\b(recv|send|poll|clock_gettime|pthread_\w+|read|write)\s*\(", (PACKAGE / name).read_text())


def test_codec_allocates_nothing() -> None:
    assert not re.search(r"\b(malloc|calloc|realloc|free)\s*\(", (PACKAGE / "_codec.c").read_text())


def test_c_knows_neither_python_nor_protobuf() -> None:
    for path in units():
        if path.stem not in FAST:
            assert not [each for each in includes(path) if "Python" in each or "google" in each]


def test_codec_stays_small() -> None:
    assert len((PACKAGE / "_codec.c").read_text().splitlines()) <= 300
