"""Worker processes: real supervisors, real workers, real signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kazoo.client import KazooClient

import services
from mprpc import ConfigError, MprpcChannel, MprpcConfig, RpcError, RpcProvider, Unavailable
from mprpc.embedded_zookeeper import Clock
from mprpc.testing import EmbeddedZooKeeper
from services import LoginRequest
from supervised import PATIENCE, PROGRAM, Load, Supervised, gone, who
from zookeeper_server import free_ports

SEED = "/UserServiceRpc/Login"
INSTANCES = "/mprpc/fixbug.UserServiceRpc"


@pytest.fixture
def zookeeper() -> Iterator[EmbeddedZooKeeper]:
    with EmbeddedZooKeeper(clock=Clock()) as server:
        yield server


def keys_of(zookeeper: EmbeddedZooKeeper, **more: object) -> dict[str, Any]:
    host, _, port = zookeeper.hosts.rpartition(":")
    return {"zookeeperip": host, "zookeeperport": port, "session_timeout": 1.0} | more


def consumer(zookeeper: EmbeddedZooKeeper) -> MprpcConfig:
    return MprpcConfig(zookeeperip=zookeeper.hosts)


def registered(supervised: Supervised, count: int = 2) -> list[tuple[float, str]]:
    return supervised.wait_line(r"worker \d+ \(\d+\): registered: ", count)


def answering(channel: MprpcChannel, calls: int = 20) -> set[int]:
    users = services.user_mprpc.UserServiceRpc_Stub(channel)
    return {who(users.Login(services.REQUEST)) for _ in range(calls)}


def test_each_is_an_instance_and_one_claims_the_seeds_znodes(tmp_path: Path, zookeeper: EmbeddedZooKeeper) -> None:
    with Supervised(tmp_path, **keys_of(zookeeper, workers=3)) as supervised:
        registered(supervised, 3)
        client = KazooClient(zookeeper.hosts)
        client.start()
        try:
            sessions = {client.get(f"{INSTANCES}/{each}")[1].ephemeralOwner for each in client.get_children(INSTANCES)}
            assert len(sessions) == 3
            data, stat = client.get(SEED)
            assert data.decode() == supervised.address
            assert stat.ephemeralOwner in sessions
            assert stat.version == 0
        finally:
            client.stop()
            client.close()
        with MprpcChannel(consumer(zookeeper)) as channel:
            assert answering(channel) == set(supervised.workers())
        assert supervised.end() == 0
        assert supervised.output() == f"returned {supervised.pid}\n"
    assert not re.search(r"Traceback|Warning|error", supervised.log)


def test_the_shared_address_is_spread_evenly(tmp_path: Path) -> None:
    """By the kernel alone one worker gets nearly all connections that come one after the other."""
    with Supervised(tmp_path) as supervised:
        supervised.wait_line("2 workers serve")
        channels = [MprpcChannel(supervised.address) for _ in range(16)]
        try:
            count = Counter(answering(channel, 1).pop() for channel in channels)
        finally:
            for channel in channels:
                channel.close()
        assert sorted(count) == sorted(supervised.workers())
        assert max(count.values()) <= 10


def test_a_worker_that_is_killed_is_back_at_once(tmp_path: Path, zookeeper: EmbeddedZooKeeper) -> None:
    """And its connections' callers go on with the others; a second death waits half a second."""
    with Supervised(tmp_path, **keys_of(zookeeper)) as supervised:
        registered(supervised)
        with MprpcChannel(consumer(zookeeper)) as channel:
            before = supervised.workers()
            assert answering(channel) == set(before)
            os.kill(before[1], signal.SIGKILL)  # how long it takes is for `make workers` to see
            supervised.wait_line("worker 1 .* was killed by SIGKILL; another starts in 0 s")
            registered(supervised, 3)
            after = supervised.workers()
            assert after[0] == before[0]
            assert after[1] != before[1]
            deadline = time.monotonic() + PATIENCE
            while answering(channel) != set(after):
                assert time.monotonic() < deadline
        os.kill(after[1], signal.SIGKILL)
        supervised.wait_line(r"killed by SIGKILL; another starts in 0\.5 s")
        registered(supervised, 4)


def test_the_heirs_death_leaves_its_znodes_to_another(tmp_path: Path, zookeeper: EmbeddedZooKeeper) -> None:
    with Supervised(tmp_path, **keys_of(zookeeper)) as supervised:
        registered(supervised)
        client = KazooClient(zookeeper.hosts)
        client.start()
        try:
            owner = client.get(SEED)[1].ephemeralOwner
            os.kill(supervised.workers()[0], signal.SIGKILL)
            registered(supervised, 3)
            data, stat = client.get(SEED)
            assert stat.ephemeralOwner != owner
            assert data.decode() == supervised.address
        finally:
            client.stop()
            client.close()


def test_a_rolling_restart_fails_no_call(tmp_path: Path, zookeeper: EmbeddedZooKeeper) -> None:
    """Neither of callers that find the workers nor of those that know one address."""
    with Supervised(tmp_path, **keys_of(zookeeper)) as supervised:
        registered(supervised)
        before = set(supervised.workers())
        with Load(consumer(zookeeper), 200) as found, Load(supervised.address, 200) as fixed:
            for times in (1, 2):
                supervised.tell(signal.SIGHUP)
                supervised.wait_line("all workers are new", times)
                assert not before & set(supervised.workers())
                before = set(supervised.workers())
            deadline = time.monotonic() + PATIENCE
            while not (before <= set(found.by) and before <= set(fixed.by) | {max(before)}):
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert (found.failures, fixed.failures) == ([], [])
        assert found.calls > 100
        assert fixed.calls > 100
        assert supervised.end() == 0
    assert not re.search(r"Traceback|Warning|error", supervised.log)


def test_a_rolling_restart_without_zookeeper_keeps_the_old_ones(tmp_path: Path, zookeeper: EmbeddedZooKeeper) -> None:
    program = "import mprpc.workers; mprpc.workers.PATIENCE = 2.0\n" + PROGRAM
    with Supervised(tmp_path, program, **keys_of(zookeeper, session_timeout=10.0)) as supervised:
        registered(supervised)
        before = supervised.workers()
        zookeeper.stop()
        supervised.tell(signal.SIGHUP)
        supervised.wait_line("the new worker 0 is not registered within 2 s: the restart ends here")
        with MprpcChannel(supervised.address) as channel:
            assert answering(channel) <= set(before)
        zookeeper.start()


def test_the_supervisors_death_ends_all_and_frees_the_address(tmp_path: Path, zookeeper: EmbeddedZooKeeper) -> None:
    with Supervised(tmp_path, **keys_of(zookeeper)) as supervised:
        registered(supervised)
        workers = supervised.workers()
        supervised.end(signal.SIGKILL)
        assert all(gone(pid) for pid in workers)
        host, _, port = supervised.address.rpartition(":")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, int(port)))
        supervised.wait_line(r"worker \d \(\d+\): withdrawn", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_waits_for_calls_in_flight(tmp_path: Path, number: int) -> None:
    with Supervised(tmp_path) as supervised:
        supervised.wait_line("2 workers serve")
        with services.calling(supervised.address, timeout=10.0) as users:
            slow = users.Login.future(LoginRequest(name=b"sleep1"))
            supervised.wait_line("asleep")
            # Ctrl-C reaches the whole group of a terminal.
            for each in (supervised.pid, *(supervised.workers() if number == signal.SIGINT else ())):
                os.kill(each, number)
            assert slow.result().success
            assert supervised.wait() == 0


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    with Supervised(tmp_path, drain_timeout=60) as supervised:
        supervised.wait_line("2 workers serve")
        with services.calling(supervised.address, timeout=60.0) as users:
            slow = users.Login.future(LoginRequest(name=b"sleep30"))
            supervised.wait_line("asleep")
            supervised.tell(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                supervised.wait(0.5)
            began = time.monotonic()
            supervised.tell(signal.SIGTERM)
            supervised.wait()
            assert time.monotonic() - began < 5.0
            assert isinstance(slow.exception(), Unavailable)


def test_a_worker_that_hangs_is_killed(tmp_path: Path) -> None:
    with Supervised(tmp_path, drain_timeout=0.1) as supervised:
        supervised.wait_line("2 workers serve")
        hanging = supervised.workers()[0]
        os.kill(hanging, signal.SIGSTOP)
        assert supervised.end() == 0
        supervised.wait_line(rf"worker 0 \(process {hanging}\) is killed: it did not end in time")


def test_workers_on_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with Supervised(tmp_path, rpcserverip=f"unix:{path}") as supervised:
        supervised.wait_line("2 workers serve")
        with MprpcChannel(f"unix:{path}") as channel:
            assert answering(channel) <= set(supervised.workers())
        assert supervised.end() == 0
    assert not path.exists()


def test_own_ports_from_worker_port_on(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with Supervised(tmp_path, worker_port=port) as supervised:
            supervised.wait_line("2 workers serve")
            found = set()
            for each in range(port + 1, port + 4):  # one of them may be somebody's
                with MprpcChannel(f"127.0.0.1:{each}", timeout=10.0) as channel, contextlib.suppress(RpcError):
                    found |= answering(channel, 1)
            assert found == set(supervised.workers())


def test_a_start_that_fails_is_the_users_mistake(tmp_path: Path) -> None:
    """One line, and nobody is left behind."""
    program = (
        "import mprpc.provider as p; p.RpcProvider._own_listener = lambda self: p._listen(self._config)\n" + PROGRAM
    )
    with Supervised(tmp_path, program) as supervised:
        assert supervised.wait() == 1
        assert re.search(r"^refused: can't listen on 127.0.0.1:\d+: .*; change rpcserverip", supervised.log, re.M)
        assert all(gone(pid) for pid in supervised.workers())
    assert "Traceback" not in supervised.log


def test_a_worker_that_dies_at_its_start_is_started_less_and_less(tmp_path: Path) -> None:
    program = """
import mmap, os, socket, sys, time
from mprpc import log, workers
starts = mmap.mmap(-1, 100)
log.start()

def body(worker):
    if worker.number:
        starts[0] += 1
        os._exit(3)
    worker.said("serving")
    worker.wait()

workers.DELAYS = (0.1, 0.4)
listener = socket.create_server(("127.0.0.1", 0))
supervisor = workers.Supervisor(workers.Shared(listener, 4), 2, body, None, 1.0)
supervisor.run()
print(starts[0])
"""
    with Supervised(tmp_path, program) as supervised:
        for delay in ("0", "0.1", "0.2", "0.4", "0.4"):
            supervised.wait_line(rf"ended with code 3; another starts in {re.escape(delay)} s")
        assert supervised.end() == 0
        assert int(supervised.output()) <= 8


def test_the_embedded_zookeeper_is_a_child_of_the_supervisor(tmp_path: Path) -> None:
    host, port = "127.0.0.1", free_ports(1)[0]
    keys = {"zookeeperip": host, "zookeeperport": port, "zookeeper": "embedded", "session_timeout": 1.0}
    with Supervised(tmp_path, **keys) as supervised:
        registered(supervised)
        ((_, line),) = supervised.wait_line("zookeeper is process")
        os.kill(int(line.rpartition(" ")[2]), signal.SIGKILL)
        supervised.wait_line("zookeeper is process", 2)
        supervised.wait_line(r"zookeeper \(\d+\): embedded ZooKeeper at", 2)
        with socket.create_connection((host, port)) as connection:
            connection.sendall(b"ruok")
            assert connection.recv(10) == b"imok"
        assert supervised.end() == 0


def test_a_zookeeper_that_is_there_is_used(tmp_path: Path, zookeeper: EmbeddedZooKeeper) -> None:
    with Supervised(tmp_path, **(keys_of(zookeeper) | {"zookeeper": "embedded"})) as supervised:
        registered(supervised)
        assert len(zookeeper.sessions()) == 2
        assert supervised.end() == 0


def test_the_log_says_which_worker(tmp_path: Path, zookeeper: EmbeddedZooKeeper) -> None:
    """Also in files, which all processes share; the supervisor writes there without a thread at the fork."""
    with Supervised(tmp_path, **keys_of(zookeeper, logdir=str(tmp_path / "log"))) as supervised:
        deadline = time.monotonic() + PATIENCE
        pattern = re.compile(r"=>\[info\] worker (\d) \((\d+)\): registered: ")
        while len(found := pattern.findall("".join(each.read_text() for each in (tmp_path / "log").glob("*")))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert sorted(number for number, _ in found) == ["0", "1"]
        assert supervised.end() == 0
    assert supervised.log == ""
    (file,) = (tmp_path / "log").glob("*")
    assert "=>[info] 2 workers serve" in file.read_text()


# ---- without processes ----


def test_only_run_makes_workers() -> None:
    provider = RpcProvider(MprpcConfig(workers=2))
    provider.notify_service(services.Users())
    with pytest.raises(ConfigError, match=r"workers=2: only run\(\) makes worker processes; .* leave workers out"):
        provider.start()
    with pytest.raises(ConfigError, match="only run"), provider:
        pass


def test_run_on_another_thread_is_refused() -> None:
    provider = RpcProvider(MprpcConfig(workers=2))
    provider.notify_service(services.Users())
    raised: list[BaseException] = []

    def run() -> None:
        try:
            provider.run()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


def test_the_workers_ports_must_fit() -> None:
    with pytest.raises(ConfigError, match="worker_port=65533: leaves no room"):
        MprpcConfig(worker_port=65533, workers=2)
    assert MprpcConfig(worker_port=65532, workers=2).worker_port == 65532
