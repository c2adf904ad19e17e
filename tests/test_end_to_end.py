"""The whole path with real parts: bin/provider and bin/consumer as processes, ZooKeeper between them."""
# ruff: noqa: F811, as a test's argument has the name of the imported fixture

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from kazoo.client import KazooClient

import generated
import services
import wire
from mprpc import MprpcChannel, MprpcConfig, MprpcController, RpcProvider, Status, Unavailable
from mprpc.embedded_zookeeper import Clock
from mprpc.testing import EmbeddedZooKeeper
from services import REQUEST
from zookeeper_server import (  # noqa: F401
    RealZooKeeper,
    ZooKeeper,
    free_ports,
    require,
    shared_real_zookeeper,
    zookeeper,
)

if TYPE_CHECKING:
    from typing_extensions import Self

user_mprpc = generated.module("user_mprpc")

LINES = """\
UserServiceRpc.Login: errcode=0 success=true
UserServiceRpc.Register: errcode=0 success=true
FriendServiceRpc.GetFriendList: errcode=0 friends=gao yang,liu hong,wang shuo
"""
METHODS = ["UserServiceRpc.Login", "UserServiceRpc.Register", "FriendServiceRpc.GetFriendList"]
SERVICES = ["fixbug.UserServiceRpc", "fixbug.FriendServiceRpc"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ and proto/ as in a checkout after `make build`, but without a .venv: the scripts run with this Python."""
    root = tmp_path_factory.mktemp("checkout")
    (root / "bin").mkdir()
    for name in ("provider", "consumer", "checkout.py", "demo"):
        copied = root / "bin" / name
        copied.write_bytes((generated.ROOT / "bin" / name).read_bytes())
        copied.chmod(0o755)
    (root / "proto").symlink_to(generated.directory())
    return root


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(generated.ROOT), "PYTHONUNBUFFERED": "1"}


def run(script: Path, *arguments: str | Path, python: tuple[str, ...] = (sys.executable,)) -> Any:
    """A script that ends by itself: returncode, stdout, stderr."""
    command = [*python, str(script), *map(str, arguments)]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=2 * wire.PATIENCE, check=False
    )


class Provider:
    """bin/provider, running; its log line by line. `with` ends it."""

    def __init__(self, checkout: Path, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(checkout / "bin" / "provider"), *map(str, arguments)],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._queue: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,))
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._queue.put(line.rstrip("\n"))
        self._queue.put("")

    def wait_for(self, words: str) -> str:
        """The next line of its log that has these words."""
        while line := self._queue.get(timeout=wire.PATIENCE):
            self.lines.append(line)
            if words in line:
                return line
        raise AssertionError(f"the provider ended before it said {words!r}: {self.lines}")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(wire.PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(wire.PATIENCE)
        assert self.process.stderr is not None
        self.process.stderr.close()


def write_config(folder: Path, hosts: str = "", **keys: object) -> Path:
    """A test.conf, with a free port to serve on unless it is given."""
    if hosts:
        host, _, port = hosts.partition(":")
        keys.update(zookeeperip=host, zookeeperport=port)
    keys.setdefault("rpcserverip", "127.0.0.1")
    keys.setdefault("rpcserverport", free_ports(1)[0])
    path = folder / "test.conf"
    path.write_text("".join(f"{key}={value}\n" for key, value in keys.items()))
    return path


def quiet(config: Path) -> Path:
    """The same configuration with less in the log, which a script writes to its standard error."""
    path = config.with_name("quiet.conf")
    path.write_text(config.read_text() + "loglevel=warning\n")
    return path


@contextlib.contextmanager
def kazoo(hosts: str) -> Iterator[KazooClient]:
    client = KazooClient(hosts)
    client.start(wire.PATIENCE)
    try:
        yield client
    finally:
        client.stop()
        client.close()


def wait_until(true: Callable[[], object], what: str) -> None:
    """For what nobody tells of: looks again and again, bounded."""
    deadline = time.monotonic() + wire.PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"never came true: {what}"
        threading.Event().wait(0.01)


def users_at(channel: MprpcChannel) -> Any:
    return user_mprpc.UserServiceRpc_Stub(channel)


# ---- both scripts and ZooKeeper ----


def test_consumer_finds_and_calls_every_method(checkout: Path, zookeeper: ZooKeeper, tmp_path: Path) -> None:
    config = write_config(tmp_path, zookeeper.hosts)
    with Provider(checkout, "-i", config) as provider:
        provider.wait_for("registered: ")
        consumer = run(checkout / "bin" / "consumer", "-i", quiet(config))
        assert (consumer.returncode, consumer.stdout, consumer.stderr) == (0, LINES, "")
        assert provider.stop() == 0
    with kazoo(zookeeper.hosts) as client:  # gone with the provider, not with its session
        assert client.get_children("/UserServiceRpc") == []
        assert [client.get_children(f"/mprpc/{service}") for service in SERVICES] == [[], []]


INSTANCE = (
    '{{"name":"{service}","id":"{id}","address":"127.0.0.1","port":{port},"sslPort":null,'
    '"payload":{{"@class":"org.springframework.cloud.zookeeper.discovery.ZookeeperInstance","id":"{id}",'
    '"name":"{service}","metadata":{{"protocol":"1","weight":"1.0","zone":"","tags":"","methods":"{methods}"}}}},'
    '"registrationTimeUTC":{utc},"serviceType":"DYNAMIC","uriSpec":null,"enabled":true}}'
)


def test_znodes_of_both_layouts_byte_by_byte(checkout: Path, zookeeper: ZooKeeper, tmp_path: Path) -> None:
    port = free_ports(1)[0]
    config = write_config(tmp_path, zookeeper.hosts, rpcserverport=port)
    with Provider(checkout, "-i", config) as provider, kazoo(zookeeper.hosts) as client:
        provider.wait_for("registered: ")
        assert sorted(client.get_children("/")) == ["FriendServiceRpc", "UserServiceRpc", "mprpc", "zookeeper"]
        owners = set()
        for service, methods in (("UserServiceRpc", ["Login", "Register"]), ("FriendServiceRpc", ["GetFriendList"])):
            data, stat = client.get(f"/{service}")
            assert (data, stat.ephemeralOwner) == (None, 0)  # no data at all, as the C++ framework makes it
            assert sorted(client.get_children(f"/{service}")) == methods
            for method in methods:
                data, stat = client.get(f"/{service}/{method}")
                assert data == f"127.0.0.1:{port}".encode()
                owners.add(stat.ephemeralOwner)

            full = f"fixbug.{service}"
            assert client.get(f"/mprpc/{full}")[1].ephemeralOwner == 0
            (instance,) = client.get_children(f"/mprpc/{full}")
            data, stat = client.get(f"/mprpc/{full}/{instance}")
            owners.add(stat.ephemeralOwner)
            utc = json.loads(data)["registrationTimeUTC"]
            assert abs(utc / 1000 - time.time()) < 60
            expected = INSTANCE.format(service=full, id=instance, port=port, methods=",".join(methods), utc=utc)
            assert data == expected.encode()
        assert sorted(client.get_children("/mprpc")) == sorted(SERVICES)
        assert len(owners) == 1  # one session, a real one
        assert owners.pop() != 0
        assert provider.stop() == 0


def test_consumer_without_a_provider_says_what_is_missing(checkout: Path, zookeeper: ZooKeeper, tmp_path: Path) -> None:
    config = write_config(tmp_path, zookeeper.hosts, call_timeout=0.5, loglevel="warning")
    before = time.monotonic()
    consumer = run(checkout / "bin" / "consumer", "-i", config)
    assert time.monotonic() - before < 10.0
    assert (consumer.returncode, consumer.stdout) == (1, "")
    lines = consumer.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == METHODS
    for line in lines:
        assert line.partition(": ")[2].startswith("UNAVAILABLE: ")
        assert "fixbug." + line.partition(".")[0] in line
        assert zookeeper.hosts in line


def test_consumer_without_zookeeper_says_so_within_its_deadline(checkout: Path, tmp_path: Path) -> None:
    hosts = f"127.0.0.1:{free_ports(1)[0]}"
    config = write_config(tmp_path, hosts, call_timeout=0.3)
    before = time.monotonic()
    consumer = run(checkout / "bin" / "consumer", "-i", config)
    assert time.monotonic() - before < 10.0
    assert consumer.returncode == 1
    said = [line for line in consumer.stderr.splitlines() if line.partition(":")[0] in METHODS]
    assert len(said) == 3
    for line in said:
        assert hosts in line
        assert "fixbug." + line.partition(".")[0] in line


@contextlib.contextmanager
def zookeeper_at(kind: str, port: int) -> Iterator[None]:
    server = RealZooKeeper(port=port) if kind == "real" else EmbeddedZooKeeper(port=port, clock=Clock())
    with server:
        yield


@pytest.mark.parametrize("kind", ["embedded", pytest.param("real", marks=pytest.mark.slow)])
def test_provider_starts_before_zookeeper(kind: str, checkout: Path, tmp_path: Path) -> None:
    """It serves at once, and registers when ZooKeeper comes."""
    if kind == "real":
        require()
    zookeeper_port, port = free_ports(2)
    config = write_config(tmp_path, f"127.0.0.1:{zookeeper_port}", rpcserverport=port)
    with Provider(checkout, "-i", config) as provider:
        provider.wait_for("serving ")
        with services.calling(f"127.0.0.1:{port}") as users:
            assert users.Login(REQUEST).success
        with zookeeper_at(kind, zookeeper_port):
            provider.wait_for("registered: ")
            consumer = run(checkout / "bin" / "consumer", "-i", config)
            assert (consumer.returncode, consumer.stdout) == (0, LINES), consumer.stderr
            assert provider.stop() == 0


def test_provider_brings_the_embedded_zookeeper_along(checkout: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, f"127.0.0.1:{free_ports(1)[0]}")
    with Provider(checkout, "-i", config, "--embedded-zookeeper") as provider:
        provider.wait_for("registered: ")
        consumer = run(checkout / "bin" / "consumer", "-i", config)
        assert (consumer.returncode, consumer.stdout) == (0, LINES), consumer.stderr
        assert provider.stop() == 0


def test_demo_shows_the_consumers_lines(checkout: Path) -> None:
    demo = run(checkout / "bin" / "demo")
    assert demo.returncode == 0, demo.stderr
    assert LINES in demo.stdout
    assert "registered: " in demo.stdout


def test_seed_layout_alone_is_called_in_the_classic_dialect(zookeeper: ZooKeeper) -> None:
    """As with a C++ provider: only the method's znode, and the bytes that it understands."""
    received = []

    def serve(peer: wire.Peer) -> None:
        received.append(peer.socket.recv(65536))
        peer.send(services.accept(REQUEST, None).SerializeToString())

    with wire.FakeProvider(serve, serve) as seed, kazoo(zookeeper.hosts) as client:
        client.create("/UserServiceRpc")
        client.create("/UserServiceRpc/Login", seed.address.encode(), ephemeral=True)
        with MprpcChannel(discovering(zookeeper.hosts)) as channel:
            controller = MprpcController()
            for _ in range(2):
                assert users_at(channel).Login(REQUEST, controller=controller).success, controller.error_text()
                assert controller.peer == seed.address
            users_at(channel).Register(services.user_pb2.RegisterRequest(), controller=controller, timeout=0.5)
            assert controller.status is Status.UNAVAILABLE  # nobody registered that method
    assert received == [wire.SEED_LOGIN] * 2


def discovering(hosts: str, **keys: Any) -> MprpcConfig:
    return MprpcConfig(zookeeperip=hosts.partition(":")[0], zookeeperport=int(hosts.partition(":")[2]), **keys)


@contextlib.contextmanager
def registered(hosts: str, login: services.Login = services.accept) -> Iterator[RpcProvider]:
    provider = RpcProvider(discovering(hosts))
    provider.notify_service(services.Users(login))
    with provider:
        assert provider.wait_registered(wire.PATIENCE)
        yield provider


def test_calls_go_on_when_one_of_two_providers_leaves(zookeeper: ZooKeeper) -> None:
    with registered(zookeeper.hosts) as stays, MprpcChannel(discovering(zookeeper.hosts)) as channel:
        users, controller = users_at(channel), MprpcController()
        channel.wait_ready(wire.PATIENCE)
        with registered(zookeeper.hosts) as leaves:
            seen: set[str] = set()

            def both_are_called() -> bool:
                assert users.Login(REQUEST, controller=controller).success, controller.error_text()
                seen.add(controller.peer)
                return len(seen) == 2

            wait_until(both_are_called, "the second provider is found")
            assert seen == {stays.address, leaves.address}
            stopping = threading.Thread(target=leaves.stop)
            stopping.start()
            while stopping.is_alive():
                assert users.Login(REQUEST, controller=controller).success, controller.error_text()
            stopping.join()
        for _ in range(50):
            assert users.Login(REQUEST, controller=controller).success, controller.error_text()
            assert controller.peer == stays.address


def test_call_before_the_provider_waits_no_longer_than_its_deadline(zookeeper: ZooKeeper) -> None:
    with MprpcChannel(discovering(zookeeper.hosts)) as channel:
        users = users_at(channel)
        before = time.monotonic()
        with pytest.raises(Unavailable, match=r"fixbug\.UserServiceRpc") as raised:
            users.Login(REQUEST, timeout=0.3)
        assert raised.value.not_run
        assert zookeeper.hosts in raised.value.text
        assert time.monotonic() - before < 5.0
        with registered(zookeeper.hosts):
            channel.wait_ready(wire.PATIENCE)
            assert users.Login(REQUEST).success


# ---- the scripts alone ----


@pytest.mark.parametrize("script", ["provider", "consumer"])
def test_help(script: str, checkout: Path) -> None:
    said = run(checkout / "bin" / script, "--help")
    assert said.returncode == 0
    assert "-i FILE" in said.stdout
    assert said.stderr == ""


@pytest.mark.parametrize("script", ["provider", "consumer"])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "test.conf: can't be read: No such file or directory"),
        ("rpcserverport=8000\nzokeeperip=127.0.0.1\n", "test.conf:2: unknown key zokeeperip; the nearest known one is"),
        ("rpcserverport=80000\n", "test.conf:1: rpcserverport=80000: "),
        ("rpcserverport=\n", "test.conf:1: rpcserverport: the value is missing"),
        ("rpcserverport=1\nrpcserverport=1\n", "test.conf:2: rpcserverport is given twice, first in line 1"),
    ],
    ids=["missing file", "unknown key", "out of range", "no value", "twice"],
)
def test_bad_configuration_is_one_line_and_exit_code_2(
    script: str, text: str | None, why: str, checkout: Path, tmp_path: Path
) -> None:
    config = tmp_path / "test.conf"
    if text is not None:
        config.write_text(text)
    said = run(checkout / "bin" / script, "-i", config)
    assert (said.returncode, said.stdout) == (2, "")
    assert len(said.stderr.splitlines()) == 1
    assert why in said.stderr


@pytest.mark.parametrize("script", ["provider", "consumer"])
@pytest.mark.parametrize("arguments", [(), ("-i",), ("-x", "test.conf")], ids=["none", "no file", "unknown"])
def test_bad_usage_is_exit_code_2(script: str, arguments: tuple[str, ...], checkout: Path) -> None:
    said = run(checkout / "bin" / script, *arguments)
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith("usage: ")


def test_address_in_use_is_one_line_and_exit_code_2(checkout: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = run(checkout / "bin" / "provider", "-i", write_config(tmp_path, rpcserverport=port))
    assert said.returncode == 2
    assert len(said.stderr.splitlines()) == 1
    assert f"can't listen on 127.0.0.1:{port}: Address already in use" in said.stderr


def test_consumer_without_discovery_calls_the_address(checkout: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    with Provider(checkout, "-i", config) as provider:
        provider.wait_for("serving ")
        consumer = run(checkout / "bin" / "consumer", "-i", config)
        assert (consumer.returncode, consumer.stdout, consumer.stderr) == (0, LINES, "")
        assert provider.stop() == 0
    consumer = run(checkout / "bin" / "consumer", "-i", config)
    assert (consumer.returncode, consumer.stdout) == (1, "")
    assert consumer.stderr.count("Connection refused") == 3


def test_consumer_without_port_or_discovery_is_bad_configuration(checkout: Path, tmp_path: Path) -> None:
    said = run(checkout / "bin" / "consumer", "-i", write_config(tmp_path, rpcserverport=0))
    assert (said.returncode, said.stdout) == (2, "")
    assert len(said.stderr.splitlines()) == 1
    assert "rpcserverport" in said.stderr


@pytest.mark.parametrize("script", ["provider", "consumer"])
def test_missing_installation_is_explained_in_one_line(script: str, checkout: Path) -> None:
    said = run(checkout / "bin" / script, "-i", "x", python=(sys.executable, "-E", "-S"))
    assert (said.returncode, said.stdout) == (2, "")
    assert len(said.stderr.splitlines()) == 1
    assert said.stderr.startswith(f"{script}: ")
    assert f"run: make -C {checkout} build" in said.stderr


@pytest.mark.parametrize("script", ["provider", "consumer"])
def test_scripts_find_the_checkouts_venv(script: str, checkout: Path, tmp_path: Path) -> None:
    """From any directory, and through a link: the Python of .venv is started with the same arguments."""
    (tmp_path / "bin").symlink_to(checkout / "bin")
    copy = tmp_path / "copy"
    (copy / "bin").mkdir(parents=True)
    for name in (script, "checkout.py"):
        (copy / "bin" / name).write_bytes((checkout / "bin" / name).read_bytes())
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "venv: $@"\n')
    python.chmod(0o755)
    (tmp_path / script).symlink_to(copy / "bin" / script)
    said = run(tmp_path / script, "-i", "my file")
    assert (said.returncode, said.stdout) == (0, f"venv: {tmp_path / script} -i my file\n")


def test_bin_test_conf_is_the_top_levels() -> None:
    link = generated.ROOT / "bin" / "test.conf"
    assert os.readlink(link) == "../test.conf"
    assert MprpcConfig.load(link) == MprpcConfig.load(generated.ROOT / "test.conf")


# ---- what idle connections cost ----


def resident(pid: int) -> int:
    """Bytes of a process that are in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


@contextlib.contextmanager
def many_descriptors(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        pytest.skip(f"only {hard} descriptors are allowed (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("used", [True, False], ids=["after a call", "never used"])
def test_2000_idle_connections_cost_less_than_4_megabytes(used: bool, checkout: Path, tmp_path: Path) -> None:
    port = free_ports(1)[0]
    with many_descriptors(4096), contextlib.ExitStack() as stack:
        config = write_config(tmp_path, rpcserverport=port)
        provider = stack.enter_context(Provider(checkout, "-i", config))
        provider.wait_for("serving ")
        first = stack.enter_context(wire.connect(f"127.0.0.1:{port}"))
        for call in range(1, 201):  # so that what is made once has been made
            first.send(wire.login(call))
            assert first.frame()[0].call_id == call
        before = resident(provider.process.pid)
        for _ in range(2000):
            peer = stack.enter_context(wire.connect(f"127.0.0.1:{port}"))
            if used:
                peer.send(wire.login(1))
                assert peer.frame()[0].call_id == 1
        first.send(wire.login(1000))
        assert first.frame()[0].call_id == 1000  # all that came before it has been accepted
        cost = resident(provider.process.pid) - before
        assert cost < 4 << 20, f"{cost / 2000:.0f} bytes a connection"
