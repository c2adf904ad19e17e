"""What an operator sees and says, with the embedded and the real ZooKeeper."""

# ruff: noqa: F811, as a test's argument has the name of the imported fixture

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from kazoo.client import KazooClient

from mprpc import administration
from mprpc.administration import Override, describe, set_override
from mprpc.config import MprpcConfig
from mprpc.errors import Unavailable
from mprpc.registry import Registration, Registry
from zookeeper_server import ZooKeeper, shared_real_zookeeper, zookeeper  # noqa: F401

SERVICE = "fixbug.UserServiceRpc"
PATH = f"/mprpc/{SERVICE}"
PATIENCE = 20.0


@pytest.fixture
def config(zookeeper: ZooKeeper) -> MprpcConfig:
    return MprpcConfig(zookeeperip=zookeeper.hosts, session_timeout=4.0)


@pytest.fixture
def registry(config: MprpcConfig) -> Iterator[Registry]:
    """With two providers of the service."""
    with Registry(config) as registry:
        registrations = [Registration(SERVICE, ("Login",), "127.0.0.1", port, zone="z") for port in (8002, 8001)]
        assert registry.publish(registrations).wait(PATIENCE)
        yield registry


def test_nothing_is_registered(config: MprpcConfig) -> None:
    assert describe(config) == []


def test_services_and_instances_are_listed_by_name_and_address(config: MprpcConfig, registry: Registry) -> None:
    (described,) = describe(config)
    assert described.service == SERVICE
    assert [each.endpoint.address for each in described.instances] == ["127.0.0.1:8001", "127.0.0.1:8002"]
    assert described.instances[0].methods == ("Login",)
    assert described.instances[0].endpoint.zone == "z"
    assert described.note == ""


def test_an_override_reaches_a_consumer_within_its_watch(config: MprpcConfig, registry: Registry) -> None:
    view = registry.follow(SERVICE)
    view.wait(PATIENCE)
    for override, expected in (
        (Override(disabled=True), [("127.0.0.1:8002", 1.0)]),
        (Override(weight=0.0), [("127.0.0.1:8001", 0.0), ("127.0.0.1:8002", 1.0)]),
        (Override(), [("127.0.0.1:8001", 1.0), ("127.0.0.1:8002", 1.0)]),
    ):
        came = threading.Event()

        def look(expected: object = expected, came: threading.Event = came) -> None:
            if [(each.address, each.weight) for each in view.snapshot.endpoints] == expected:
                came.set()

        view.on_change(lambda snapshot, look=look: look())  # type: ignore[misc]
        in_force = set_override(config, SERVICE, "127.0.0.1:8001", override)
        assert came.wait(PATIENCE)
        assert in_force.instances.get("127.0.0.1:8001", Override()) == override
        assert describe(config)[0].overrides == in_force


def test_a_service_may_be_overridden_before_it_exists(config: MprpcConfig) -> None:
    assert set_override(config, SERVICE, "", Override(disabled=True)).service == Override(disabled=True)
    (described,) = describe(config)
    assert described.overrides.service.disabled
    assert described.instances == ()


def test_what_is_not_understood_is_said(config: MprpcConfig, registry: Registry) -> None:
    client = KazooClient(config.zookeeper_hosts)
    client.start()
    try:
        client.set(PATH, b"nonsense")
        client.create(f"{PATH}/bad", b"{}", ephemeral=True)
        (described,) = describe(config)
        assert len(described.instances) == 2
        assert f"{PATH}: the overrides are ignored, as it is no JSON" in described.note
        assert f"{PATH}/bad is ignored" in described.note
        with pytest.raises(ValueError, match="it is no JSON"):
            set_override(config, SERVICE, "", Override(disabled=True))
    finally:
        client.stop()
        client.close()


@pytest.mark.parametrize(
    ("service", "address", "weight"),
    [("a/b", "", 1.0), (SERVICE, "nobody", 1.0), (SERVICE, "", -1.0), (SERVICE, "", float("nan"))],
)
def test_a_mistake_is_refused_before_anything_is_asked(service: str, address: str, weight: float) -> None:
    with pytest.raises(ValueError, match=r"a/b|nobody|weight="):
        set_override(MprpcConfig(zookeeperip="127.0.0.1:1"), service, address, Override(weight=weight))


def test_others_change_it_all_the_time(
    config: MprpcConfig, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []
    edit = administration.edit_overrides  # type: ignore[attr-defined]
    client = KazooClient(config.zookeeper_hosts)
    client.start()

    def slow(data: bytes | None, address: str, override: Override) -> bytes:
        tries.append(client.set(PATH, b""))
        return edit(data, address, override)

    monkeypatch.setattr(administration, "edit_overrides", slow)
    try:
        with pytest.raises(Unavailable, match="is being changed by others all the time"):
            set_override(config, SERVICE, "", Override(disabled=True))
    finally:
        client.stop()
        client.close()
    assert len(tries) == administration.MAX_EDITS


def test_no_zookeeper() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = MprpcConfig(zookeeperip=f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(Unavailable, match=r"can't be reached within 0\.2 s"):
            describe(config, 0.2)
