"""kazoo 2.11's own tests against the embedded ZooKeeper, which takes the place of the cluster of kazoo's harness.

Run as a program it fetches kazoo's source distribution, makes an environment with the old packages that the tests need
(in a temporary directory), runs them there and prints what was left out and why. pytest loads the same file as a
plugin in that environment; the server is loaded from its own directory, so it also shows that it needs nothing else.

    python tests/kazoo_suite.py [--keep DIRECTORY] [pytest's arguments]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

KAZOO = "kazoo==2.11.0"
PACKAGES = ("pyopenssl<24", "objgraph", "pyjks", "pure-sasl", "gevent", "eventlet", "pytest", "pytest-timeout")
TIMEOUT_SECONDS = 180
SERVERS = 3
LEFT_OUT = {
    "test_sasl.py": "SASL",
    "TestSSLClient": "TLS",
    "TestReconfig": "reconfiguration",
    "TestReadOnlyMode": "read-only mode",
}
"""Part of a test's name, and what it needs that the embedded server leaves out."""

_SERVER_DIRECTORY = Path(__file__).resolve().parent.parent / "mprpc" / "embedded_zookeeper"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite and returns pytest's exit code."""
    parser = argparse.ArgumentParser(description="Runs kazoo's own tests against the embedded ZooKeeper.")
    parser.add_argument("--keep", type=Path, help="a directory to prepare, or to use as an earlier run prepared it")
    arguments, pytest_arguments = parser.parse_known_args(argv)
    with contextlib.ExitStack() as stack:
        directory = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kazoo-suite-")))
        return _run(_prepare(directory), pytest_arguments or ["kazoo/tests"])


def _prepare(directory: Path) -> Path:
    """An environment and kazoo's unpacked source in the directory; returns the source's."""
    source = directory / KAZOO.replace("==", "-")
    python = directory / "venv" / "bin" / "python"
    if source.exists():
        return source
    venv.create(directory / "venv", with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *PACKAGES], check=True)
    subprocess.run(
        [*pip, "download", "--quiet", "--no-deps", "--no-binary", "kazoo", "--dest", str(directory), KAZOO], check=True
    )
    (archive,) = directory.glob("kazoo-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(directory, filter="data")
    return source


def _run(source: Path, pytest_arguments: Sequence[str]) -> int:
    python = source.parent / "venv" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "PYTEST_ADDOPTS")}
    environment |= {"ZOOKEEPER_VERSION": "3.8.0", "PYTHONPATH": str(Path(__file__).resolve().parent)}
    # kazoo's own configuration prints every log line of every test.
    quiet = ["-q", "-o", "log_cli=false", "-o", "addopts=", "--disable-warnings"]
    options = ["-p", Path(__file__).stem, f"--timeout={TIMEOUT_SECONDS}", "-p", "no:cacheprovider", *quiet]
    command = [str(python), "-m", "pytest", *options, *pytest_arguments]
    return subprocess.run(command, cwd=source, env=environment, check=False).returncode


class Door:
    """One member of the cluster as the tests see it: an address that leads to the one embedded server.

    Stopped, it closes its port and the connections through it, while those through other doors stay: a client must
    move on to another member and finds its session there, as in an ensemble.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self.client_port = 0
        self.running = False

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.client_port}"

    def run(self) -> None:
        if not self.running:
            self._listener = socket.create_server(("127.0.0.1", self.client_port))
            self.client_port = self._listener.getsockname()[1]
            self.running = True
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        if self.running:
            self.running = False
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            with self._lock:
                for each in self._connections:
                    _shut(each)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # stopped
            server = socket.create_connection(("127.0.0.1", self._target))
            with self._lock:
                self._connections += [client, server]
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    _shut(source)
    _shut(sink)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class Cluster:
    """What kazoo's harness asks of its cluster."""

    def __init__(self) -> None:
        self._server = _embedded_zookeeper().EmbeddedZooKeeperServer(port=0)
        self._doors: list[Door] = []

    def __iter__(self) -> Iterator[Door]:
        if not self._doors:
            self._server.start()
            self._doors = [Door(self._server.port) for _ in range(SERVERS)]
            self.start()
        return iter(self._doors)

    def __getitem__(self, number: int) -> Door:
        return list(self)[number]

    def start(self) -> None:
        for door in self._doors:
            door.run()

    def terminate(self) -> None:
        """Ends the cluster; the next test class gets an empty one."""
        for door in self._doors:
            door.stop()
        self._doors = []
        self._server.stop()
        self._server.wipe()

    def get_logs(self) -> list[str]:
        return []


def _embedded_zookeeper() -> ModuleType:
    """The package on its own, without the one around it."""
    spec = importlib.util.spec_from_file_location(
        "embedded_zookeeper", _SERVER_DIRECTORY / "__init__.py", submodule_search_locations=[str(_SERVER_DIRECTORY)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pytest_configure(config: Any) -> None:
    from kazoo.testing import harness

    cluster = Cluster()
    harness.get_global_cluster = lambda: cluster


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    left_out = {item: reason for item in items for part, reason in LEFT_OUT.items() if part in item.nodeid}
    config.left_out = {item.nodeid: reason for item, reason in left_out.items()}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    left_out = terminalreporter.config.left_out
    terminalreporter.section(f"left out: {len(left_out)}")
    for name, reason in left_out.items():
        terminalreporter.line(f"{name}: needs {reason}")
    for report in terminalreporter.stats.get("skipped", []):
        terminalreporter.line(f"{report.nodeid}: {report.longrepr[2]}")


if __name__ == "__main__":
    sys.exit(main())
