"""The real ZooKeeper, for tests: Debian's 3.8, one server or an ensemble of three, in a directory of its own.

The fixture `zookeeper` gives a test the embedded server in one run and the real one in another. Where Debian's is not
installed the second run is skipped and says how to install it; with CI=true in the environment it fails instead.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError

from mprpc.embedded_zookeeper import Clock
from mprpc.testing import EmbeddedZooKeeper

if TYPE_CHECKING:
    from typing_extensions import Self

JARS = (Path("/usr/share/java/zookeeper.jar"), Path("/usr/share/java/slf4j-simple.jar"))
INSTALL = "sudo apt-get install --no-install-recommends zookeeper default-jre-headless libslf4j-java"
TICK_MS = 500
READY_SECONDS = 30.0
POLL_SECONDS = 0.02

_JAVA = ("java", "-Xmx128m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
# super:test, who may do everything: what a test has locked must go before the next one.
_SUPERUSER = "-Dzookeeper.DigestAuthenticationProvider.superDigest=super:D/InIHSb7yEEbrWz8b9l71RjZJU="
_MAIN = "org.apache.zookeeper.server.quorum.QuorumPeerMain"
_SETTINGS = """\
tickTime={tick_ms}
dataDir={directory}/data
clientPort={port}
clientPortAddress=127.0.0.1
admin.enableServer=false
4lw.commands.whitelist=*
maxClientCnxns=0
"""


class ZooKeeper(Protocol):
    """What a test that runs against both may rely on."""

    @property
    def hosts(self) -> str:
        """`host:port`, or several with commas, as KazooClient takes them."""


def missing() -> str | None:
    """Why the real ZooKeeper can't be run, with the line that installs it; None where it can."""
    absent = [str(jar) for jar in JARS if not jar.exists()]
    if shutil.which("java") is None:
        absent.append("java")
    return f"no real ZooKeeper ({', '.join(absent)} missing): {INSTALL}" if absent else None


def require() -> None:
    """Skips the test where the real ZooKeeper is missing; on CI, which installs it, fails."""
    reason = missing()
    if reason is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at; all held while they are chosen, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def four_letters(port: int, word: str) -> str:
    """The answer to a four-letter word; empty where nothing answers."""
    try:
        with socket.create_connection(("127.0.0.1", port), 1.0) as connection:
            connection.sendall(word.encode())
            with connection.makefile("rb") as stream:
                return stream.read().decode()
    except OSError:
        return ""


class RealZooKeeper:
    """One server process; its data outlives `stop` and is removed by `close`. `with` starts and closes it."""

    def __init__(self, settings: str = "", server_id: int | None = None, port: int | None = None) -> None:
        self.port = port or free_ports(1)[0]
        self._directory = Path(tempfile.mkdtemp(prefix="zookeeper-"))
        data = self._directory / "data"
        data.mkdir()
        if server_id is not None:
            (data / "myid").write_text(str(server_id))
        common = _SETTINGS.format(tick_ms=TICK_MS, directory=self._directory, port=self.port)
        (self._directory / "zoo.cfg").write_text(common + settings)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def hosts(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._process is not None

    def launch(self) -> None:
        """Starts the process and does not wait for it: an ensemble needs its majority first."""
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*_JAVA, _SUPERUSER, "-cp", ":".join(map(str, JARS)), _MAIN, "zoo.cfg"],
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_ready(self) -> None:
        """Returns when it serves; raises RuntimeError with the end of its log when it dies or takes too long."""
        assert self._process is not None
        deadline = time.monotonic() + READY_SECONDS
        while "Mode:" not in four_letters(self.port, "srvr"):
            try:
                self._process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                if time.monotonic() < deadline:
                    continue
            log = (self._directory / "log").read_text(errors="replace")
            raise RuntimeError(f"ZooKeeper at {self.hosts} does not serve:\n{log[-2000:]}")

    def start(self) -> None:
        self.launch()
        self.wait_ready()

    def stop(self) -> None:
        """Ends the process at once, as a crash would; the data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._directory)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RealEnsemble:
    """Three servers that elect a leader; `servers` may be stopped and started one by one."""

    def __init__(self) -> None:
        ports = free_ports(9)
        members = "".join(
            f"server.{number}=127.0.0.1:{peer}:{election}\n"
            for number, (peer, election) in enumerate(zip(ports[3:6], ports[6:9], strict=True), 1)
        )
        settings = f"initLimit=10\nsyncLimit=5\n{members}"
        self.servers = [RealZooKeeper(settings, number, port) for number, port in enumerate(ports[:3], 1)]

    @property
    def hosts(self) -> str:
        return ",".join(server.hosts for server in self.servers)

    def start(self) -> None:
        for server in self.servers:
            server.launch()
        for server in self.servers:
            server.wait_ready()

    def leader(self) -> RealZooKeeper:
        return next(each for each in self.servers if "Mode: leader" in four_letters(each.port, "srvr"))

    def close(self) -> None:
        for server in self.servers:
            server.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wipe(hosts: str) -> None:
    """Removes every node but ZooKeeper's own, so that one server can serve one test after another."""
    client = KazooClient(hosts, auth_data=[("digest", "super:test")])
    client.start()
    try:
        for name in client.get_children("/"):
            if name != "zookeeper":
                _delete_below(client, f"/{name}")
    finally:
        client.stop()
        client.close()


def _delete_below(client: KazooClient, path: str) -> None:
    try:
        client.delete(path, recursive=True)
    except NoNodeError:
        return  # an ephemeral node whose session ended meanwhile


@pytest.fixture(scope="session")
def shared_real_zookeeper() -> Iterator[RealZooKeeper]:
    """One real server for the whole run: starting a JVM for every test would be most of its time."""
    require()
    with RealZooKeeper() as server:
        yield server


@pytest.fixture(params=["embedded", "real"])
def zookeeper(request: pytest.FixtureRequest) -> Iterator[ZooKeeper]:
    """An empty ZooKeeper, the embedded one and then the real one; time passes by itself in both."""
    if request.param == "embedded":
        with EmbeddedZooKeeper(tick_ms=TICK_MS, clock=Clock()) as embedded:
            yield embedded
    else:
        real: RealZooKeeper = request.getfixturevalue("shared_real_zookeeper")
        wipe(real.hosts)
        yield real


@pytest.fixture
def real_zookeeper() -> Iterator[RealZooKeeper]:
    """A real server of this test's own, which it may stop and start."""
    require()
    with RealZooKeeper() as server:
        yield server


@pytest.fixture
def real_ensemble() -> Iterator[RealEnsemble]:
    """Three real servers of this test's own."""
    require()
    with RealEnsemble() as ensemble:
        yield ensemble
