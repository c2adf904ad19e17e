"""The registry against ZooKeeper, the embedded one and Debian's: znodes, sessions, faults, bounds in time."""

# ruff: noqa: F811, as a test's argument has the name of the imported fixture

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from kazoo.client import KazooClient
from kazoo.exceptions import NoAuthError, NotEmptyError

import mprpc.registry as registry_module
from mprpc.config import MprpcConfig
from mprpc.embedded_zookeeper import Clock
from mprpc.errors import ConfigError, ResourceExhausted, Status, Unavailable
from mprpc.registry import MAX_JOBS, Registration, Registry, ServiceView, Snapshot, advertised_address, connect_probe
from mprpc.testing import Code, EmbeddedZooKeeper, Op
from mprpc.zookeeper_client import kazoo_options
from zookeeper_server import (  # noqa: F401
    RealEnsemble,
    RealZooKeeper,
    ZooKeeper,
    four_letters,
    real_ensemble,
    real_zookeeper,
    shared_real_zookeeper,
    zookeeper,
)

SERVICE = "fixbug.UserServiceRpc"
METHODS = ("Login", "Register")
PATH = f"/mprpc/{SERVICE}"
LOGIN = "/UserServiceRpc/Login"
PATIENCE = 20.0  # seconds for what takes milliseconds


def config(hosts: str, **more: object) -> MprpcConfig:
    return MprpcConfig(zookeeperip=hosts, **{"session_timeout": 4.0, "connect_timeout": 0.2, **more})  # type: ignore[arg-type]


def registration(port: int = 8000, **more: object) -> Registration:
    return Registration(SERVICE, METHODS, "127.0.0.1", port, **more)  # type: ignore[arg-type]


@contextmanager
def open_registry(hosts: str, **more: object) -> Iterator[Registry]:
    """With a session of its own."""
    with Registry(config(hosts, **more)) as registry:
        yield registry


@contextmanager
def outsider(hosts: str) -> Iterator[KazooClient]:
    client = KazooClient(hosts, timeout=4.0)
    client.start(PATIENCE)
    try:
        yield client
    finally:
        client.stop()
        client.close()


@pytest.fixture
def embedded() -> Iterator[EmbeddedZooKeeper]:
    """Time passes by itself."""
    with EmbeddedZooKeeper(clock=Clock()) as server:
        yield server


@contextmanager
def watch_log(logger: str, text: str) -> Iterator[threading.Event]:
    """An event that is set when a line with `text` is logged."""
    said = threading.Event()

    class Watcher(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                said.set()

    watcher = Watcher()
    logging.getLogger(logger).addHandler(watcher)
    try:
        yield said
    finally:
        logging.getLogger(logger).removeHandler(watcher)


def wait_until(view: ServiceView, fits: Callable[[Snapshot], bool]) -> Snapshot:
    came = threading.Event()
    view.on_change(lambda snapshot: came.set() if fits(snapshot) else None)
    assert fits(view.snapshot) or came.wait(PATIENCE), view.snapshot
    return view.snapshot


def addresses(snapshot: Snapshot) -> list[str]:
    return [endpoint.address for endpoint in snapshot.endpoints]


def lists(*ports: int) -> Callable[[Snapshot], bool]:
    return lambda snapshot: snapshot.confirmed and addresses(snapshot) == [f"127.0.0.1:{port}" for port in ports]


def session_of(registry: Registry) -> int:
    client_id = registry._shell._client.client_id
    assert client_id is not None
    return client_id[0]


class TestPublishing:
    def test_the_znodes_byte_by_byte(self, zookeeper: ZooKeeper) -> None:
        with open_registry(zookeeper.hosts) as registry, outsider(zookeeper.hosts) as other:
            publication = registry.publish([registration(weight=2.5, zone="a", tags=("x", "y"))])
            assert publication.wait(PATIENCE)
            assert publication.registered
            (instance,) = other.get_children(PATH)
            data, stat = other.get(f"{PATH}/{instance}")
            assert stat.ephemeralOwner == session_of(registry)
            said = json.loads(data)
            assert abs(said.pop("registrationTimeUTC") / 1000 - time.time()) < 60
            assert said == {
                "name": SERVICE,
                "id": instance,
                "address": "127.0.0.1",
                "port": 8000,
                "sslPort": None,
                "payload": {
                    "@class": "org.springframework.cloud.zookeeper.discovery.ZookeeperInstance",
                    "id": instance,
                    "name": SERVICE,
                    "metadata": {
                        "protocol": "1",
                        "weight": "2.5",
                        "zone": "a",
                        "tags": "x,y",
                        "methods": "Login,Register",
                    },
                },
                "serviceType": "DYNAMIC",
                "uriSpec": None,
                "enabled": True,
            }
            assert sorted(other.get_children("/UserServiceRpc")) == ["Login", "Register"]
            seed, seed_stat = other.get(LOGIN)
            assert seed == b"127.0.0.1:8000"
            assert seed_stat.ephemeralOwner == session_of(registry)

    def test_parents_have_no_data_and_everybody_may_change_the_seeds(self, zookeeper: ZooKeeper) -> None:
        with open_registry(zookeeper.hosts) as registry, outsider(zookeeper.hosts) as other:
            assert registry.publish([registration()]).wait(PATIENCE)
            for path in ("/UserServiceRpc", "/mprpc", PATH):
                data, stat = other.get(path)
                assert data is None
                assert stat.ephemeralOwner == 0
            acls, _ = other.get_acls(LOGIN)
            assert [(each.id.scheme, each.id.id, each.perms) for each in acls] == [("world", "anyone", 31)]

    def test_with_an_acl_of_our_own_the_seed_layout_stays_open(self, zookeeper: ZooKeeper) -> None:
        with outsider(zookeeper.hosts) as other:
            with open_registry(zookeeper.hosts, zookeeper_auth="digest:me:secret", zookeeper_acl="creator") as registry:
                assert registry.publish([registration()]).wait(PATIENCE)
                assert other.get_acls(LOGIN)[0][0].id.id == "anyone"
                with pytest.raises(NoAuthError):
                    other.get_children(PATH)
                with open_registry(zookeeper.hosts) as stranger, pytest.raises(Unavailable):
                    stranger.follow(SERVICE).wait(0.3)
                wait_until(registry.follow(SERVICE), lists(8000))
            other.add_auth("digest", "me:secret")
            assert other.get_acls(PATH)[0][0].id.scheme == "digest"
            other.delete("/mprpc", recursive=True)

    def test_withdrawing_deletes_both_layouts(self, zookeeper: ZooKeeper) -> None:
        with open_registry(zookeeper.hosts) as registry, outsider(zookeeper.hosts) as other:
            publication = registry.publish([registration()])
            assert publication.wait(PATIENCE)
            publication.withdraw(PATIENCE)
            assert other.get_children(PATH) == []
            assert other.get_children("/UserServiceRpc") == []

    def test_closing_deletes_what_was_published(self, zookeeper: ZooKeeper) -> None:
        with outsider(zookeeper.hosts) as other:
            with open_registry(zookeeper.hosts) as registry:
                assert registry.publish([registration()]).wait(PATIENCE)
            assert other.get_children(PATH) == []
            assert other.get_children("/UserServiceRpc") == []

    def test_replacing_changes_the_weight_for_consumers(self, zookeeper: ZooKeeper) -> None:
        with open_registry(zookeeper.hosts) as registry:
            publication = registry.publish([registration()])
            view = registry.follow(SERVICE)
            wait_until(view, lists(8000))
            publication.replace([registration(weight=7.0)])
            wait_until(view, lambda snapshot: [each.weight for each in snapshot.endpoints] == [7.0])

    def test_an_impossible_service_is_refused(self, embedded: EmbeddedZooKeeper) -> None:
        with open_registry(embedded.hosts) as registry:
            for name in ("", "a/b", "..", "a\nb"):
                with pytest.raises(ValueError, match="is no service's name"):
                    registry.follow(name)
                with pytest.raises(ValueError, match="is no service's name"):
                    registry.publish([Registration(name, METHODS, "127.0.0.1", 1)])


class TestFollowing:
    def test_a_new_provider_is_listed_within_a_second(self, zookeeper: ZooKeeper) -> None:
        with open_registry(zookeeper.hosts) as consumer, open_registry(zookeeper.hosts) as provider:
            view = consumer.follow(SERVICE, METHODS)
            with pytest.raises(Unavailable, match=f"no provider of {SERVICE} is registered at ZooKeeper"):
                view.wait(PATIENCE)
            before = time.monotonic()
            provider.publish([registration()])
            assert addresses(view.wait(PATIENCE, for_provider=True)) == ["127.0.0.1:8000"]
            assert time.monotonic() - before < 1

    def test_what_is_missing_is_said(self, embedded: EmbeddedZooKeeper) -> None:
        hosts = embedded.hosts
        embedded.stop()
        with open_registry(hosts) as registry:
            with pytest.raises(Unavailable) as caught:
                registry.follow(SERVICE).wait(0.2)
            assert caught.value.status is Status.UNAVAILABLE
            assert caught.value.not_run
            assert caught.value.text == f"ZooKeeper {hosts} did not say within 0.2 s who provides {SERVICE}"

    def test_a_callback_that_fails_does_not_end_the_discovery(
        self, embedded: EmbeddedZooKeeper, caplog: pytest.LogCaptureFixture
    ) -> None:
        with open_registry(embedded.hosts) as registry:
            view = registry.follow(SERVICE)
            view.on_change(lambda snapshot: 1 / 0)  # type: ignore[arg-type]
            publication = registry.publish([registration()])
            wait_until(view, lists(8000))
            publication.replace([registration(8001)])
            wait_until(view, lists(8001))
        assert "a callback for the providers of fixbug.UserServiceRpc failed" in caplog.text

    def test_a_provider_that_is_only_in_the_seed_layout(self, zookeeper: ZooKeeper) -> None:
        with open_registry(zookeeper.hosts) as registry, outsider(zookeeper.hosts) as other:
            other.create(LOGIN, b"127.0.0.1:7000", ephemeral=True, makepath=True)
            snapshot = registry.follow(SERVICE, METHODS).wait(PATIENCE)
            assert [(each.address, each.classic) for each in snapshot.for_method("Login")] == [("127.0.0.1:7000", True)]
            assert snapshot.for_method("Register") == ()

    def test_a_cpp_consumer_finds_the_next_holder(self, zookeeper: ZooKeeper) -> None:
        """It reads the method's node and nothing else."""
        with outsider(zookeeper.hosts) as cpp, open_registry(zookeeper.hosts) as second:
            with open_registry(zookeeper.hosts) as first:
                assert first.publish([registration(8001)]).wait(PATIENCE)
                assert second.publish([registration(8002)]).wait(PATIENCE)
                assert cpp.get(LOGIN)[0] == b"127.0.0.1:8001"
                changed = threading.Event()
                assert cpp.exists(LOGIN, lambda event: changed.set())
            assert changed.wait(PATIENCE)
            made = threading.Event()
            if not cpp.exists(LOGIN, lambda event: made.set()):
                assert made.wait(PATIENCE)
            assert cpp.get(LOGIN)[0] == b"127.0.0.1:8002"

    def test_more_services_than_the_limit(self, embedded: EmbeddedZooKeeper, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry_module, "MAX_FOLLOWED", 3)
        with open_registry(embedded.hosts) as registry:
            for number in range(3):
                registry.follow(f"s{number}")
            with pytest.raises(ResourceExhausted, match="s3 is one service more than the 3 that are followed"):
                registry.follow("s3")
            registry.follow("s0")

    def test_views_of_one_service_share_its_watches(self, embedded: EmbeddedZooKeeper) -> None:
        settings = config(embedded.hosts)
        with Registry.open(settings) as one, Registry.open(settings) as two:
            one.publish([registration()])
            wait_until(one.follow(SERVICE), lists(8000))
            assert two.follow(SERVICE).snapshot == one.follow(SERVICE).snapshot
            assert two.follow(SERVICE) is not one.follow(SERVICE)
            assert one.follow(SERVICE) is one.follow(SERVICE)
            one.close()
            wait_until(two.follow(SERVICE), lambda snapshot: not snapshot.endpoints)

    def test_the_probe_decides_whether_an_empty_list_is_believed(self, embedded: EmbeddedZooKeeper) -> None:
        asked = threading.Event()
        dead = threading.Event()

        def probe(address: str, service: str, timeout: float) -> bool:
            assert (address, service, timeout) == ("127.0.0.1:8000", SERVICE, 0.2)
            asked.set()
            return not dead.is_set()

        with Registry(config(embedded.hosts), probe) as consumer:
            with open_registry(embedded.hosts) as provider:
                assert provider.publish([registration()]).wait(PATIENCE)
                view = consumer.follow(SERVICE)
                wait_until(view, lists(8000))
            assert asked.wait(PATIENCE)
            wait_until(view, lambda snapshot: addresses(snapshot) == ["127.0.0.1:8000"] and not snapshot.confirmed)
            dead.set()
            view.report_down("127.0.0.1:8000")
            wait_until(view, lists())

    def test_probes_at_once_are_bounded(self, embedded: EmbeddedZooKeeper) -> None:
        at_once = 0
        most = 0
        probed = 0
        lock = threading.Lock()
        full = threading.Barrier(MAX_JOBS)

        def probe(address: str, service: str, timeout: float) -> bool:
            nonlocal at_once, most, probed
            with lock:
                at_once += 1
                most = max(most, at_once)
            full.wait(PATIENCE)  # in eights, which shows that there are as many as that
            with lock:
                at_once -= 1
                probed += 1
            return False

        ports = range(8000, 8000 + MAX_JOBS * 5)
        with Registry(config(embedded.hosts), probe) as consumer:
            with open_registry(embedded.hosts) as provider:
                assert provider.publish([registration(port) for port in ports]).wait(PATIENCE)
                view = consumer.follow(SERVICE)
                wait_until(view, lists(*ports))
            wait_until(view, lists())
        assert probed == len(ports)
        assert most == MAX_JOBS


class TestFaults:
    def test_the_session_expires(self, embedded: EmbeddedZooKeeper) -> None:
        with open_registry(embedded.hosts) as registry, open_registry(embedded.hosts) as consumer:
            publication = registry.publish([registration()])
            assert publication.wait(PATIENCE)
            view = consumer.follow(SERVICE)
            (before,) = wait_until(view, lists(8000)).endpoints
            embedded.expire_session(session_of(registry))
            wait_until(view, lambda snapshot: lists(8000)(snapshot) and snapshot.endpoints[0].id != before.id)
            assert publication.wait(PATIENCE)
            assert embedded.owner(LOGIN) == session_of(registry)

    def test_the_old_session_is_purged_late(self, embedded: EmbeddedZooKeeper) -> None:
        with open_registry(embedded.hosts) as registry:
            publication = registry.publish([registration()])
            assert publication.wait(PATIENCE)
            old = session_of(registry)
            lost = threading.Event()
            registry.follow(SERVICE).on_change(lambda snapshot: None if snapshot.confirmed else lost.set())
            wait_until(registry.follow(SERVICE), lists(8000))
            embedded.expire_session(old, purge=False)
            assert lost.wait(PATIENCE)
            wait_until(registry.follow(SERVICE), lists(8000))
            assert publication.wait(PATIENCE)
            assert session_of(registry) != old
            assert embedded.owner(LOGIN) == session_of(registry)
            embedded.purge_session(old)
            assert embedded.owner(LOGIN) == session_of(registry)
            with outsider(embedded.hosts) as other:
                assert len(other.get_children(PATH)) == 1

    def test_the_tree_is_deleted_by_an_operator(self, zookeeper: ZooKeeper) -> None:
        with open_registry(zookeeper.hosts) as registry, outsider(zookeeper.hosts) as other:
            assert registry.publish([registration()]).wait(PATIENCE)
            for _ in range(5):
                made = threading.Event()
                for path in ("/mprpc", "/UserServiceRpc"):  # while the provider makes it again
                    _delete(other, path)
                if not other.exists(LOGIN, lambda event, made=made: made.set()):
                    assert made.wait(PATIENCE)
                wait_until(registry.follow(SERVICE), lists(8000))

    def test_zookeeper_is_down_at_the_start(self, caplog: pytest.LogCaptureFixture) -> None:
        with EmbeddedZooKeeper(clock=Clock()) as server:
            server.stop()
            with open_registry(server.hosts) as registry:
                publication = registry.publish([registration()])
                assert not publication.wait(1.2)
                server.start()
                assert publication.wait(PATIENCE)
                wait_until(registry.follow(SERVICE), lists(8000))
        assert f"ZooKeeper {server.hosts} can't be reached yet" in caplog.text

    def test_zookeeper_restarts(self, real_zookeeper: RealZooKeeper) -> None:
        with open_registry(real_zookeeper.hosts) as registry:
            assert registry.publish([registration()]).wait(PATIENCE)
            view = registry.follow(SERVICE)
            wait_until(view, lists(8000))
            real_zookeeper.stop()
            wait_until(view, lambda snapshot: not snapshot.confirmed)
            assert addresses(view.snapshot) == ["127.0.0.1:8000"]
            real_zookeeper.start()
            before = time.monotonic()
            wait_until(view, lists(8000))
            assert time.monotonic() - before < 10  # 4 are promised; `make faults` measures that, alone on its machine

    def test_zookeeper_comes_back_without_its_data(self, embedded: EmbeddedZooKeeper) -> None:
        """kazoo's client has seen a later state and is turned away for ever; a new one is not."""
        with open_registry(embedded.hosts, session_timeout=1.0) as registry:
            publication = registry.publish([registration()])
            assert publication.wait(PATIENCE)
            view = registry.follow(SERVICE)
            wait_until(view, lists(8000))
            embedded.restart(keep_data=False)
            wait_until(view, lambda snapshot: not snapshot.confirmed)
            wait_until(view, lists(8000))
            with outsider(embedded.hosts) as other:
                assert len(other.get_children(PATH)) == 1

    def test_the_leader_is_killed(self, real_ensemble: RealEnsemble) -> None:
        with open_registry(real_ensemble.hosts) as provider, open_registry(real_ensemble.hosts) as consumer:
            publication = provider.publish([registration()])
            assert publication.wait(PATIENCE)
            view = consumer.follow(SERVICE)
            wait_until(view, lists(8000))
            real_ensemble.leader().stop()
            publication.replace([registration(8001)])
            wait_until(view, lists(8001))

    @pytest.mark.parametrize("op", [Op.CREATE, Op.EXISTS, Op.MULTI, Op.GET_DATA, Op.GET_CHILDREN2])
    def test_an_answer_is_lost(self, embedded: EmbeddedZooKeeper, op: Op) -> None:
        with open_registry(embedded.hosts) as registry:
            view = registry.follow(SERVICE)
            publication = registry.publish([registration()])
            wait_until(view, lists(8000))
            embedded.lose_answers(op=op)
            publication.replace([registration(8000, weight=2.0), registration(8001)])
            wait_until(view, lists(8000, 8001))
            with outsider(embedded.hosts) as other:
                assert len(other.get_children(PATH)) == 2

    def test_a_refusal_is_said_and_tried_again(
        self, embedded: EmbeddedZooKeeper, caplog: pytest.LogCaptureFixture
    ) -> None:
        embedded.refuse_requests(Code.NO_AUTH, op=Op.CREATE, count=11)
        with open_registry(embedded.hosts) as registry:
            assert registry.publish([registration()]).wait(PATIENCE)
        assert "refuses /mprpc/fixbug.UserServiceRpc/" in caplog.text
        assert "NoAuth" in caplog.text

    def test_a_server_that_never_answers_is_left(self, embedded: EmbeddedZooKeeper) -> None:
        """Connected, but an answer does not come: the client is replaced, and takes its session along."""
        with open_registry(embedded.hosts, session_timeout=1.0) as registry:
            publication = registry.publish([registration()])
            assert publication.wait(PATIENCE)
            view = registry.follow(SERVICE)
            wait_until(view, lists(8000))
            with embedded.answers_held():
                publication.replace([registration(8001)])
                wait_until(view, lambda snapshot: not snapshot.confirmed)
            wait_until(view, lists(8001))

    def test_a_client_that_hangs_in_stopping_is_not_multiplied(
        self, embedded: EmbeddedZooKeeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(registry_module, "MAX_STOPPING", 0)
        said = watch_log("mprpc.registry", "clients hang in stopping")
        with open_registry(embedded.hosts, session_timeout=1.0) as registry, said as happened:
            assert registry.publish([registration()]).wait(PATIENCE)
            client = registry._shell._client
            with embedded.answers_held():
                registry.publish([registration(8001)])
                assert happened.wait(PATIENCE)
            assert registry._shell._client is client

    def test_the_servers_names_are_looked_up_again(
        self, embedded: EmbeddedZooKeeper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """ZooKeeper moved while it could not be reached: the name says where to."""
        where = "127.0.0.2"
        real = socket.getaddrinfo

        def getaddrinfo(host: str, *args: object, **kwargs: object) -> object:
            return real(where if host == "zookeeper.test" else host, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        with open_registry(f"zookeeper.test:{embedded.hosts.partition(':')[2]}") as registry:
            publication = registry.publish([registration()])
            assert not publication.wait(0.3)
            where = "127.0.0.1"
            assert publication.wait(PATIENCE)

    def test_wrong_credentials_are_said_and_not_shown(
        self, embedded: EmbeddedZooKeeper, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        with open_registry(embedded.hosts, zookeeper_auth="nonsense:me:secret") as registry:
            view = registry.follow(SERVICE)
            with pytest.raises(Unavailable):
                view.wait(0.5)
        assert "it refuses our credentials" in caplog.text
        assert "secret" not in caplog.text


def _delete(client: KazooClient, path: str) -> None:
    while True:
        try:
            client.delete(path, recursive=True)
        except NotEmptyError:
            continue  # it is registered again already
        return


class TestSharing:
    def test_one_session_for_all_who_name_the_same_zookeeper(self, embedded: EmbeddedZooKeeper) -> None:
        settings = config(embedded.hosts)
        with Registry.open(settings) as one, Registry.open(settings.replace(weight=9)) as two:
            one.publish([registration(8000)]).wait(PATIENCE)
            two.publish([registration(8001)]).wait(PATIENCE)
            assert len(embedded.sessions()) == 1
            with Registry.open(settings.replace(root="/other")) as three:
                three.publish([registration(8002)]).wait(PATIENCE)
                assert len(embedded.sessions()) == 2
            two.close()
            two.close()  # counted once
            wait_until(one.follow(SERVICE), lists(8000))
        assert embedded.sessions() == []

    def test_closed_is_closed(self, embedded: EmbeddedZooKeeper) -> None:
        registry = Registry.open(config(embedded.hosts))
        registry.close()
        with pytest.raises(Unavailable, match="this registry was closed"):
            registry.follow(SERVICE)

    def test_without_zookeeperip_there_is_no_discovery(self) -> None:
        with pytest.raises(ConfigError, match="zookeeperip: is empty"):
            Registry.open(MprpcConfig())

    @pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")  # that is the subject
    def test_a_child_after_a_fork_has_a_session_of_its_own(self, embedded: EmbeddedZooKeeper) -> None:
        settings = config(embedded.hosts)
        with Registry.open(settings) as registry:
            publication = registry.publish([registration()])
            assert publication.wait(PATIENCE)
            parent = session_of(registry)
            child = os.fork()
            if child == 0:
                os._exit(_in_the_child(registry, settings, parent))
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            assert session_of(registry) == parent
            assert embedded.owner(LOGIN) == parent
            publication.replace([registration(8005)])
            wait_until(registry.follow(SERVICE), lists(8005))


def _in_the_child(registry: Registry, settings: MprpcConfig, parent: int) -> int:
    """The exit code: which step failed."""
    if registry.follow(SERVICE).wait(PATIENCE).endpoints[0].address != "127.0.0.1:8000":
        return 1
    if session_of(registry) == parent:
        return 2
    with Registry.open(settings) as second:
        if session_of(second) != session_of(registry):
            return 3
    registry.close()
    return 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if "zookeeper" not in thread.name.lower())


class TestStopping:
    def cycle(self, hosts: str, count: int, *, registered: bool = False) -> float:
        """The longest close of `count` registries; none leaves a thread or a descriptor."""
        before = descriptors(), threads()
        longest = 0.0
        for _ in range(count):
            registry = Registry(config(hosts))
            publication = registry.publish([registration()])
            assert not registered or publication.wait(PATIENCE)
            start = time.monotonic()
            registry.close()
            longest = max(longest, time.monotonic() - start)
        assert (descriptors(), threads()) == before
        return longest

    def test_with_zookeeper_up(self, embedded: EmbeddedZooKeeper) -> None:
        assert self.cycle(embedded.hosts, 40, registered=True) < 1
        assert self.cycle(embedded.hosts, 10) < 1
        with outsider(embedded.hosts) as other:
            assert other.get_children("/UserServiceRpc") == []
        assert len(embedded.sessions()) <= 1

    def test_with_zookeeper_down(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            hosts = f"127.0.0.1:{taken.getsockname()[1]}"
        assert self.cycle(hosts, 5) < 1

    def test_with_a_zookeeper_that_swallows_connections(self) -> None:
        """A listener whose queue is full answers no SYN."""
        with socket.socket() as full, socket.socket() as filler:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            filler.connect(full.getsockname())
            assert self.cycle(f"127.0.0.1:{full.getsockname()[1]}", 5) < 1

    def test_with_a_zookeeper_that_accepts_and_says_nothing(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            assert self.cycle(f"127.0.0.1:{silent.getsockname()[1]}", 5) < 1

    def test_with_a_zookeeper_that_fell_silent(self, embedded: EmbeddedZooKeeper) -> None:
        before = descriptors(), threads()
        registry = Registry(config(embedded.hosts))
        assert registry.publish([registration()]).wait(PATIENCE)
        connections = descriptors()
        with embedded.stalled():
            start = time.monotonic()
            registry.close(2.0)
            assert time.monotonic() - start < 2.5
            assert descriptors() < connections
        embedded.drop_connections()
        assert threads() == before[1]

    def test_a_process_that_just_ends_withdraws(self, embedded: EmbeddedZooKeeper) -> None:
        program = (
            "from mprpc.config import MprpcConfig\n"
            "from mprpc.registry import Registration, Registry\n"
            f"registry = Registry.open(MprpcConfig(zookeeperip={embedded.hosts!r}))\n"
            f"assert registry.publish([Registration({SERVICE!r}, ('Login',), '127.0.0.1', 8000)]).wait({PATIENCE})\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stderr) == (0, "")
        assert embedded.sessions() == []


class TestSavedLists:
    def test_a_consumer_starts_while_zookeeper_is_down(self, embedded: EmbeddedZooKeeper, tmp_path: Path) -> None:
        hosts = embedded.hosts
        where = str(tmp_path / "lists")
        with open_registry(hosts) as provider, open_registry(hosts, snapshot_dir=where) as consumer:
            provider.publish([registration(), registration(8001, weight=3.0, zone="z", tags=("t",))])
            before = wait_until(consumer.follow(SERVICE), lists(8000, 8001))
            (file,) = _files(Path(where))
        embedded.stop()
        with open_registry(hosts, snapshot_dir=where) as consumer:
            snapshot = consumer.follow(SERVICE).wait(PATIENCE)
            assert snapshot.endpoints == before.endpoints
            assert not snapshot.confirmed
        file.write_text(file.read_text().replace("8001", "8002"))
        with open_registry(hosts, snapshot_dir=where) as consumer, pytest.raises(Unavailable):
            consumer.follow(SERVICE).wait(1)

    def test_a_directory_that_can_not_be_written_costs_a_warning(
        self, embedded: EmbeddedZooKeeper, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("")
        said = watch_log("mprpc.saved_lists", "can't be saved")
        with open_registry(embedded.hosts, snapshot_dir=str(tmp_path / "file")) as registry, said as happened:
            registry.publish([registration()])
            wait_until(registry.follow(SERVICE), lists(8000))
            assert happened.wait(PATIENCE)


def _files(directory: Path) -> list[Path]:
    """Once the last one is in its place; writing them is nobody's to wait for."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        files = list(directory.glob("[!.]*")) if directory.exists() else []
        if files and "8001" in files[0].read_text():
            return files
        threading.Event().wait(0.01)
    raise AssertionError("no list was saved")


class TestAdvertising:
    def test_an_address_is_advertised_as_it_is_listened_on(self) -> None:
        assert advertised_address(config("127.0.0.1:1"), "127.0.0.1", 8000) == ("127.0.0.1", 8000)
        assert advertised_address(config("127.0.0.1:1"), "10.1.2.3", 8000) == ("10.1.2.3", 8000)
        assert advertised_address(config("127.0.0.1:1"), "::1", 8000) == ("::1", 8000)
        assert advertised_address(config("127.0.0.1:1"), "localhost", 8000)[0] in ("127.0.0.1", "::1")

    def test_all_interfaces_are_the_one_that_reaches_zookeeper(self) -> None:
        assert advertised_address(config("127.0.0.1:1"), "0.0.0.0", 8000) == ("127.0.0.1", 8000)
        assert advertised_address(config("127.0.0.1:1"), "::", 8000) == ("127.0.0.1", 8000)
        assert advertised_address(config("nowhere.invalid:1,127.0.0.1:1"), "0.0.0.0", 8000) == ("127.0.0.1", 8000)

    def test_the_configuration_has_the_last_word(self) -> None:
        settings = config("127.0.0.1:1", advertise_ip="example.org", advertise_port=99)
        assert advertised_address(settings, "0.0.0.0", 8000) == ("example.org", 99)

    def test_a_name_that_nobody_knows(self) -> None:
        with pytest.raises(ConfigError, match=r"rpcserverip=nowhere\.invalid: can't be looked up"):
            advertised_address(config("127.0.0.1:1"), "nowhere.invalid", 8000)


def test_the_fallback_probe() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert connect_probe(address, SERVICE, 1.0)
    assert not connect_probe(address, SERVICE, 1.0)


def test_credentials_and_tls_reach_kazoo() -> None:
    options = kazoo_options(
        config("127.0.0.1:1", zookeeper_auth="digest:me:se:cret", zookeeper_tls_ca="/ca", zookeeper_tls_cert="/cert")
    )
    assert options["auth_data"] == [("digest", "me:se:cret")]
    assert (options["use_ssl"], options["ca"], options["certfile"], options["keyfile"]) == (
        True,
        "/ca",
        "/cert",
        "/cert",
    )
    assert options["timeout"] == 4.0
    with pytest.raises(ConfigError, match="pip install pure-sasl") as caught:
        kazoo_options(config("127.0.0.1:1", zookeeper_sasl="DIGEST-MD5:me:secret"))
    assert "secret" not in str(caught.value)


def test_the_first_list_of_a_process_is_quick(embedded: EmbeddedZooKeeper) -> None:
    """With kazoo imported; most of the time is its threads and the two handshakes."""
    with open_registry(embedded.hosts) as provider:
        assert provider.publish([registration()]).wait(PATIENCE)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            with open_registry(embedded.hosts) as consumer:
                consumer.follow(SERVICE).wait(PATIENCE)
                times.append(time.perf_counter() - start)
        assert min(times) < 0.03


def test_importing_the_registry_imports_no_kazoo() -> None:
    program = "import sys, mprpc.registry; sys.exit('kazoo' in sys.modules or 'asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_standalone_server_answers_four_letters(real_zookeeper: RealZooKeeper) -> None:
    """No session is left there when the last registry has closed."""
    with open_registry(real_zookeeper.hosts) as registry:
        assert registry.publish([registration()]).wait(PATIENCE)
        assert "Connections: 2" in four_letters(real_zookeeper.port, "srvr")  # and this one
    assert "ephemerals: 0" not in four_letters(real_zookeeper.port, "dump")
    assert "Sessions with Ephemerals (0)" in four_letters(real_zookeeper.port, "dump")
