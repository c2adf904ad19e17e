"""`python -m mprpc registry`: tables and exit codes, against an embedded ZooKeeper."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kazoo.client import KazooClient

from mprpc.__main__ import main
from mprpc.config import MprpcConfig
from mprpc.embedded_zookeeper import Clock
from mprpc.registry import Registration, Registry
from mprpc.testing import EmbeddedZooKeeper

SERVICE = "fixbug.UserServiceRpc"
PATIENCE = 20.0
FIRST, SECOND = "127.0.0.1:8001", "127.0.0.1:8002"


@pytest.fixture
def hosts() -> Iterator[str]:
    """With two providers of the service."""
    with EmbeddedZooKeeper(clock=Clock()) as server, Registry(MprpcConfig(zookeeperip=server.hosts)) as registry:
        registrations = [
            Registration(SERVICE, ("Login", "Register"), "127.0.0.1", port, zone="z1") for port in (8002, 8001)
        ]
        assert registry.publish(registrations).wait(PATIENCE)
        yield server.hosts


def run(*arguments: str) -> int:
    return main(["registry", *arguments])


def table(hosts: str, capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    capsys.readouterr()
    assert run("--zookeeper", hosts, "list") == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_instances_are_listed_by_address_in_aligned_columns(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--zookeeper", hosts) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    heading, first, second = printed.out.splitlines()
    assert heading.split() == ["SERVICE", "ADDRESS", "STATE", "WEIGHT", "OVERRIDE", "ZONE", "TAGS", "METHODS"]
    assert first.split() == [SERVICE, FIRST, "up", "1", "-", "z1", "-", "Login,Register"]
    assert second.split() == [SERVICE, SECOND, "up", "1", "-", "z1", "-", "Login,Register"]
    assert heading.index("METHODS") == first.index("Login") == second.index("Login")


def test_an_instance_is_disabled_weighted_and_enabled_again(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each says its own part, and leaves the other as it was."""
    assert run("--zookeeper", hosts, "set", SERVICE, FIRST, "--disable") == 0
    assert capsys.readouterr().out == f"{SERVICE} at {FIRST}: disabled\n"
    assert table(hosts, capsys)[1][:5] == [SERVICE, FIRST, "disabled", "1", "disabled"]
    assert run("--zookeeper", hosts, "set", SERVICE, FIRST, "--weight", "2.5") == 0
    assert table(hosts, capsys)[1][:5] == [SERVICE, FIRST, "disabled", "1", "disabled,weight=2.5"]
    assert run("--zookeeper", hosts, "set", SERVICE, FIRST, "--enable") == 0
    assert table(hosts, capsys)[1][:5] == [SERVICE, FIRST, "up", "2.5", "weight=2.5"]
    assert run("--zookeeper", hosts, "set", SERVICE, FIRST, "--weight", "own") == 0
    assert capsys.readouterr().out == f"{SERVICE} at {FIRST}: no override\n"
    assert table(hosts, capsys)[1][:5] == [SERVICE, FIRST, "up", "1", "-"]


def test_a_service_is_disabled_as_a_whole(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--zookeeper", hosts, "set", SERVICE, "--disable", "--weight", "0") == 0
    assert capsys.readouterr().out == f"{SERVICE}: disabled,weight=0\n"
    _, whole, first, _ = table(hosts, capsys)
    assert whole[:5] == [SERVICE, "-", "disabled", "-", "disabled,weight=0"]
    assert first[:3] == [SERVICE, FIRST, "disabled"]


def test_an_override_of_what_is_not_registered_is_shown(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--zookeeper", hosts, "set", SERVICE, "10.0.0.9:1", "--disable") == 0
    assert "nothing is registered there" in capsys.readouterr().out
    assert table(hosts, capsys)[-1][:5] == [SERVICE, "10.0.0.9:1", "absent", "-", "disabled"]


def test_an_empty_registry(capsys: pytest.CaptureFixture[str]) -> None:
    with EmbeddedZooKeeper(clock=Clock()) as server:
        assert run("--zookeeper", server.hosts) == 0
    assert capsys.readouterr().out == "no service is registered below /mprpc\n"


def test_what_is_not_understood_is_a_note(hosts: str, capsys: pytest.CaptureFixture[str]) -> None:
    client = KazooClient(hosts)
    client.start()
    client.set(f"/mprpc/{SERVICE}", b"no json")
    client.stop()
    client.close()
    assert run("--zookeeper", hosts, "list") == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    assert printed.err.startswith("note: /mprpc/fixbug.UserServiceRpc: the overrides are ignored")
    assert run("--zookeeper", hosts, "set", SERVICE, "--disable") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_configuration_names_the_ensemble(hosts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "test.conf"
    file.write_text(f"zookeeperip={hosts}\nroot=/other\n")
    assert run("-i", str(file), "list") == 0
    assert capsys.readouterr().out == "no service is registered below /other\n"
    file.write_text("rpcserverport=1\n")
    assert run("-i", str(file), "list") == 2
    assert "zookeeperip" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["-i", "/nowhere/test.conf"],
        ["--zookeeper", "no host"],
        ["--zookeeper", "127.0.0.1", "set", SERVICE, "no-address", "--disable"],
        ["--zookeeper", "127.0.0.1", "set", "a/b", "--disable"],
    ],
)
def test_wrong_configuration_is_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["list"],
        ["--zookeeper", "127.0.0.1", "-i", "test.conf"],
        ["--zookeeper", "127.0.0.1", "set", SERVICE],
        ["--zookeeper", "127.0.0.1", "set", SERVICE, "--enable", "--disable"],
        ["--zookeeper", "127.0.0.1", "set", SERVICE, "--weight", "-3"],
        ["--zookeeper", "127.0.0.1", "set", SERVICE, "--weight", "nan"],
        ["--zookeeper", "127.0.0.1", "set", SERVICE, "--weight", "much"],
        ["--zookeeper", "127.0.0.1", "--timeout", "0"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_without_zookeeper_it_is_one_line_and_exit_code_1() -> None:
    command = [sys.executable, "-m", "mprpc", "registry", "--zookeeper", "127.0.0.1:1", "--timeout", "0.3", "list"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr == "python -m mprpc registry: ZooKeeper 127.0.0.1:1 can't be reached within 0.3 s\n"
