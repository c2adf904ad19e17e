"""The package as a person gets it: installed in each way, what is in it, and what importing it costs.

Builds happen in a copy of the tree. One environment is made as a person makes it, with the build's and the package's
needs from the index; the others take those needs from that one, as installing them again would be most of the time.
"""

from __future__ import annotations

import ast
import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from google.protobuf.internal import api_implementation

import generated

ROOT = generated.ROOT
TOP = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "Makefile", "test.conf")
BUILD_NEEDS = ("setuptools>=77", "cffi>=1.17")
SECONDS = 300  # for one pip, on a slow line

# Serves and calls, with nothing but what is installed.
ROUND_TRIP = """
import sys, pathlib, mprpc, mprpc._native
from google.protobuf import descriptor_pb2, descriptor_pool
file = descriptor_pb2.FileDescriptorProto(name="echo.proto", package="echo", syntax="proto3")
file.message_type.add(name="Text").field.add(name="text", number=1, type=9, label=1)
file.service.add(name="Echo").method.add(name="Say", input_type=".echo.Text", output_type=".echo.Text")
pool = descriptor_pool.DescriptorPool()
pool.AddSerializedFile(file.SerializeToString())
class Echo:
    DESCRIPTOR = pool.FindServiceByName("echo.Echo")
    def Say(self, request, controller):
        return request
provider = mprpc.RpcProvider()
provider.notify_service(Echo())
from google.protobuf.message_factory import GetMessageClass
Text = GetMessageClass(pool.FindMessageTypeByName("echo.Text"))
with provider, mprpc.MprpcChannel(provider.address) as channel:
    assert mprpc.stub(Echo.DESCRIPTOR, channel).Say(Text(text="hello")).text == "hello"
print(pathlib.Path(mprpc.__file__).parent, pathlib.Path(mprpc._native.__file__).name)
"""


def run(*command: str | Path, **options: object) -> str:
    """Standard output of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=environment,
        **options,  # type: ignore[call-overload]
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return str(ran.stdout)


class Environment:
    """A virtual environment, without pip: the tests' own installs into it."""

    def __init__(self, path: Path, *, needs_of: Environment | None = None) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", path)
        self.python = path / "bin" / "python"
        self.packages = next(path.glob("lib/python*/site-packages"))
        if needs_of is not None:
            (self.packages / "needs.pth").write_text(f"{needs_of.packages}\n")

    def pip(self, command: str, *arguments: str | Path) -> str:
        quiet = ("--quiet", "--disable-pip-version-check", "--python", self.python)
        return run(sys.executable, "-m", "pip", *quiet, command, *arguments)

    def round_trip(self, where: Path) -> tuple[Path, str]:
        """Serves and calls in this environment, from another directory; where mprpc is and what the extension is."""
        package, extension = run(self.python, "-W", "error", "-c", ROUND_TRIP, cwd=where).rsplit(maxsplit=1)
        return Path(package), extension


def copy_tree(to: Path) -> Path:
    to.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.so", "_native.c", "*_pb2.py*", "*_mprpc.py")
    for name in ("mprpc", "proto", "bin", "docs", "tests"):
        shutil.copytree(ROOT / name, to / name, ignore=skip, symlinks=True)
    for name in TOP:
        shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree as a fresh clone has it."""
    return copy_tree(tmp_path_factory.mktemp("source") / "mprpc")


@pytest.fixture(scope="module")
def needs(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment that has what the build and the package need, and not the package."""
    made = Environment(tmp_path_factory.mktemp("needs") / "venv")
    with (ROOT / "pyproject.toml").open() as file:
        (line,) = (line for line in file if line.startswith("dependencies = "))
    made.pip("install", *BUILD_NEEDS, *ast.literal_eval(line.partition("=")[2]))
    return made


@pytest.fixture(scope="module")
def sdist(source: Path, needs: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    hook = f"from setuptools import build_meta; print(build_meta.build_sdist({str(folder)!r}))"
    return folder / run(needs.python, "-c", hook, cwd=source).split()[-1]


@pytest.fixture(scope="module")
def wheel(sdist: Path, needs: Environment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    needs.pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_pip_install_in_an_empty_environment(source: Path, tmp_path: Path) -> None:
    """All of it: the build's needs, the build, the package's needs."""
    environment = Environment(tmp_path / "venv")
    environment.pip("install", source)
    package, extension = environment.round_trip(tmp_path)
    assert package == environment.packages / "mprpc"
    assert extension == "_native.abi3.so"
    installed = {path.name.partition("-")[0].lower() for path in environment.packages.glob("*.dist-info")}
    assert installed == {"mprpc_zk", "protobuf", "kazoo", "cffi", "pycparser"}
    assert "--mprpc_out=" in run(tmp_path / "venv" / "bin" / "protoc-gen-mprpc", "--help")


@pytest.mark.slow
def test_sdist_to_wheel_to_install(wheel: Path, needs: Environment, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv", needs_of=needs)
    environment.pip("install", "--no-deps", "--no-index", wheel)
    package, extension = environment.round_trip(tmp_path)
    assert package == environment.packages / "mprpc"
    assert extension == "_native.abi3.so"


@pytest.mark.slow
def test_editable_install_follows_the_tree(needs: Environment, tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    environment = Environment(tmp_path / "venv", needs_of=needs)
    environment.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", tree)
    assert environment.round_trip(tmp_path) == (tree / "mprpc", "_native.abi3.so")
    with (tree / "mprpc" / "__init__.py").open("a") as file:
        file.write("\nCHANGED = True\n")
    run(environment.python, "-c", "import mprpc; assert mprpc.CHANGED", cwd=tmp_path)


@pytest.mark.slow
def test_sdist_has_all_that_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("mprpc/*.c", "mprpc/*.h", "mprpc/*.py", "mprpc/embedded_zookeeper/*.py", "proto/*.proto"):
        found = {str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)} - {"mprpc/_native.c"}
        generated_ones = {name for name in found if name.endswith(("_pb2.py", "_mprpc.py"))}
        assert found - generated_ones <= names
    assert set(TOP) - names == set()
    assert {"mprpc/py.typed", "bin/provider", "bin/consumer", "tests/conftest.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_native.c"))]


@pytest.mark.slow
def test_wheel_is_one_for_all_pythons_and_typed(wheel: Path) -> None:
    assert "-cp310-abi3-linux_" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("dist-info/METADATA"))
        (points,) = (name for name in names if name.endswith("entry_points.txt"))
        said = email.message_from_bytes(archive.read(metadata))
        assert b"protoc-gen-mprpc = mprpc.plugin:main" in archive.read(points)
    assert "mprpc/py.typed" in names
    assert "mprpc/_native.abi3.so" in names
    assert {name.partition("/")[0] for name in names} == {"mprpc", metadata.partition("/")[0]}
    needed = [each for each in said.get_all("Requires-Dist") or [] if "extra ==" not in each]
    assert sorted(each.partition(">")[0].partition("<")[0] for each in needed) == ["cffi", "kazoo", "protobuf"]
    assert said["Name"] == "mprpc-zk"
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Requires-Python"] == ">=3.10"


# ---- what importing it costs ----


def modules_after(program: str) -> set[str]:
    """What is in sys.modules at the end of a program, and wasn't before."""
    show = f"import sys\nbefore = set(sys.modules)\n{program}\nprint(*sorted(set(sys.modules) - before))"
    return set(run(sys.executable, "-c", show, cwd=ROOT).split())


LATE = {"kazoo", "asyncio", "concurrent.futures", "inspect", "json", "ssl", "argparse", "subprocess", "multiprocessing"}


def test_import_loads_neither_kazoo_nor_asyncio_nor_futures() -> None:
    loaded = modules_after("import mprpc")
    assert loaded & LATE == set()
    assert not [name for name in loaded if name.startswith("mprpc.embedded_zookeeper")]


def test_import_loads_no_generated_code() -> None:
    """Generated code that is newer than the runtime raises, so none may stand between a person and the package."""
    generated_ones = {name for name in modules_after("import mprpc") if name.endswith("_pb2")}
    assert {name for name in generated_ones if not name.startswith("google.protobuf.")} == set()


def test_serving_and_calling_load_neither_kazoo_nor_asyncio() -> None:
    loaded = modules_after(ROUND_TRIP.replace("print(", "(lambda *_: None)("))
    assert "mprpc.provider" in loaded
    assert loaded & {"kazoo", "asyncio", "concurrent.futures"} == set()


def test_public_names_can_be_read_aloud() -> None:
    import mprpc

    assert all(getattr(mprpc, name) is not None for name in mprpc.__all__)
    assert sorted(mprpc.__all__) == list(mprpc.__all__)


def test_messages_are_parsed_by_upb() -> None:
    assert api_implementation.Type() == "upb"
