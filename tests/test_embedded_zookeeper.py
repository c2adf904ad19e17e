"""The embedded ZooKeeper: what it shares with the real one, what tests can do to it, and what it survives."""

# ruff: noqa: F811  # a fixture that is imported is also a parameter

from __future__ import annotations

import ast
import contextlib
import logging
import os
import queue
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kazoo.client import KazooClient, KazooState
from kazoo.exceptions import (
    ConnectionLoss,
    NoAuthError,
    NodeExistsError,
    OperationTimeoutError,
    RolledBackError,
    RuntimeInconsistency,
    SessionExpiredError,
)
from kazoo.security import make_acl, make_digest_acl

import mprpc
import zookeeper_differential as differential
from mprpc.embedded_zookeeper import Clock, Code, EmbeddedZooKeeperServer, Limits, Op, answering, start_unless_answering
from mprpc.embedded_zookeeper.acl import digest_identity, permitted, resolve
from mprpc.embedded_zookeeper.protocol import AclEntry, ZooKeeperError
from mprpc.embedded_zookeeper.tree import Tree, Txn
from mprpc.testing import EmbeddedZooKeeper, embedded_zookeeper  # noqa: F401
from zookeeper_differential import OPEN, Answer, Client, Entries, Server, acl_list, buffer, framed, string, strings
from zookeeper_server import (
    TICK_MS,
    ZooKeeper,
    four_letters,
    free_ports,
    require,
    shared_real_zookeeper,  # noqa: F401
    zookeeper,  # noqa: F401
)

SECONDS = 10.0
"""How long a test waits for what must come; it comes at once."""
PACKET_LIMIT = 0xFFFFF
CREATE, DELETE, EXISTS, GET, SET, GET_ACL, SET_ACL, CHILDREN, SYNC = range(1, 10)
PING, CHECK, MULTI, AUTH, SET_WATCHES, CLOSE = 11, 13, 14, 100, 101, -11
CREATED, DELETED, CHANGED, CHILDREN_CHANGED = range(1, 5)
PACKAGE = Path(mprpc.__file__).parent / "embedded_zookeeper"
Owner = Callable[[], Client]


@pytest.fixture
def raw(request: pytest.FixtureRequest) -> Iterator[Callable[..., Client]]:
    """Makes raw sessions at a server: `raw(server)`."""
    with contextlib.ExitStack() as stack:

        def connect(server: ZooKeeper) -> Client:
            port = int(server.hosts.rsplit(":", 1)[1])
            client = Client(Server("server", port, {}))
            stack.callback(client.close)
            return client

        yield connect


@pytest.fixture
def kazoo() -> Iterator[Callable[..., KazooClient]]:
    """Makes started KazooClients: `kazoo(server)`."""
    with contextlib.ExitStack() as stack:

        def start(server: ZooKeeper, **options: object) -> KazooClient:
            client = KazooClient(server.hosts, **options)
            client.start(timeout=SECONDS)
            stack.callback(client.close)
            stack.callback(client.stop)
            return client

        yield start


def create_body(path: str, data: bytes | None = b"", flags: int = 0, acl: Entries = OPEN) -> bytes:
    return string(path) + buffer(data) + acl_list(acl) + struct.pack(">i", flags)


def path_and(path: str, number: int = -1) -> bytes:
    return string(path) + struct.pack(">i", number)


def path_data(path: str, data: bytes = b"", version: int = -1) -> bytes:
    return string(path) + buffer(data) + struct.pack(">i", version)


def path_watch(path: str, watch: bool = False) -> bytes:
    return string(path) + bytes([watch])


def code_of(answer: object) -> int:
    assert isinstance(answer, tuple)
    assert isinstance(answer[0], int)
    return answer[0]


def until(condition: Callable[[], bool]) -> None:
    """Asks again and again; each time the server takes a turn."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline


# Both the embedded server and the real one.


def test_a_node_is_created_read_changed_and_deleted(zookeeper: ZooKeeper, kazoo: Callable[..., KazooClient]) -> None:
    client = kazoo(zookeeper)
    assert client.create("/node", b"one") == "/node"
    _, made = client.get("/node")
    assert (made.version, made.cversion, made.aversion, made.dataLength, made.numChildren) == (0, 0, 0, 3, 0)
    first = made.czxid
    assert made.mzxid == made.pzxid == first > 0
    assert made.ctime == made.mtime
    assert made.ephemeralOwner == 0
    changed = client.set("/node", b"three", version=0)
    assert (changed.version, changed.dataLength, changed.mzxid, changed.czxid) == (1, 5, first + 1, first)
    client.create("/node/child")
    data, parent = client.get("/node")
    assert (data, parent.cversion, parent.numChildren, parent.pzxid) == (b"three", 1, 1, first + 2)
    assert client.get_children("/node", include_data=True)[0] == ["child"]
    client.delete("/node/child")
    assert client.exists("/node").cversion == 2
    client.delete("/node")
    assert client.exists("/node") is None
    assert client.sync("/node") == "/node"


def test_no_data_is_not_empty_data(zookeeper: ZooKeeper, raw: Callable[..., Client]) -> None:
    client = raw(zookeeper)
    for path, data in (("/none", None), ("/empty", b"")):
        client.ask(CREATE, create_body(path, data))
        answer = client.ask(GET, path_watch(path), Answer.buffer)
        assert isinstance(answer, tuple)
        assert answer[2] == data


def test_sequential_names_count_the_creations_under_a_parent(
    zookeeper: ZooKeeper, kazoo: Callable[..., KazooClient]
) -> None:
    client = kazoo(zookeeper)
    client.create("/queue")
    client.create("/queue/other")
    names = [client.create("/queue/n-", sequence=True) for _ in range(3)]
    assert names == ["/queue/n-0000000001", "/queue/n-0000000002", "/queue/n-0000000003"]
    client.delete(names[2])
    assert client.create("/queue/", sequence=True, ephemeral=True) == "/queue/0000000004"
    root = client.create("/", sequence=True)
    assert len(root) == 11
    assert root[1:].isdigit()


@pytest.mark.parametrize(
    ("op", "body", "expected"),
    [
        pytest.param(CREATE, create_body("/gone/a", flags=9, acl=()), Code.BAD_ARGUMENTS, id="create: flags first"),
        pytest.param(CREATE, create_body("nowhere", acl=()), Code.BAD_ARGUMENTS, id="create: path before acl"),
        pytest.param(CREATE, create_body("/gone/a", acl=()), Code.INVALID_ACL, id="create: acl before parent"),
        pytest.param(CREATE, create_body("/gone/a/"), Code.NO_NODE, id="create: parent before the path's rules"),
        pytest.param(CREATE, create_body("/closed/"), Code.NO_AUTH, id="create: permission before the path's rules"),
        pytest.param(CREATE, create_body("/closed/child"), Code.NO_AUTH, id="create: permission before existence"),
        pytest.param(CREATE, create_body("/brief/a"), Code.NO_CHILDREN_FOR_EPHEMERALS, id="create: in an ephemeral"),
        pytest.param(CREATE, create_body("/"), Code.NODE_EXISTS, id="create: the root"),
        pytest.param(CREATE, create_body("/a", flags=5), Code.UNIMPLEMENTED, id="create: no time to live"),
        pytest.param(DELETE, path_and("/"), Code.BAD_ARGUMENTS, id="delete: the root"),
        pytest.param(DELETE, path_and("/zookeeper"), Code.BAD_ARGUMENTS, id="delete: ZooKeeper's own"),
        pytest.param(DELETE, path_and("/gone/a"), Code.NO_NODE, id="delete: missing parent"),
        pytest.param(DELETE, path_and("/closed/missing"), Code.NO_AUTH, id="delete: permission before existence"),
        pytest.param(DELETE, path_and("/full", 7), Code.BAD_VERSION, id="delete: version before children"),
        pytest.param(DELETE, path_and("/full"), Code.NOT_EMPTY, id="delete: children last"),
        pytest.param(SET, path_data("/full/"), Code.BAD_ARGUMENTS, id="set: path first"),
        pytest.param(SET, path_data("/closed", version=7), Code.NO_AUTH, id="set: before version"),
        pytest.param(SET, path_data("/full", version=7), Code.BAD_VERSION, id="set: version"),
        pytest.param(GET, path_watch("/closed"), Code.NO_AUTH, id="get: not allowed"),
        pytest.param(GET, path_watch("relative"), Code.NO_NODE, id="get: any path is only missing"),
        pytest.param(EXISTS, path_watch("/closed"), Code.OK, id="exists: needs no permission"),
        pytest.param(EXISTS, path_watch("/\0"), Code.BAD_ARGUMENTS, id="exists: NUL"),
        pytest.param(CHILDREN, path_watch("/closed"), Code.NO_AUTH, id="children: not allowed"),
        pytest.param(CHECK, path_and("/full", 7), Code.BAD_VERSION, id="check: version"),
    ],
)
def test_the_first_thing_wrong_is_what_is_answered(
    zookeeper: ZooKeeper, raw: Callable[..., Client], op: int, body: bytes, expected: Code
) -> None:
    client = raw(zookeeper)
    nobody = ((31, "digest", "no:body"),)
    client.ask(CREATE, create_body("/full"))
    client.ask(CREATE, create_body("/full/child"))
    client.ask(CREATE, create_body("/brief", flags=1))
    client.ask(CREATE, create_body("/closed"))
    client.ask(CREATE, create_body("/closed/child"))
    client.ask(SET_ACL, string("/closed") + acl_list(nobody) + struct.pack(">i", -1))
    assert code_of(client.ask(op, body)) == expected


def test_a_multi_is_done_whole_or_not_at_all(zookeeper: ZooKeeper, kazoo: Callable[..., KazooClient]) -> None:
    client = kazoo(zookeeper)
    client.create("/base", b"old")
    before = client.exists("/base")
    failing = client.transaction()
    failing.create("/base/a")
    failing.set_data("/base", b"new")
    failing.delete("/base/a")
    failing.check("/base", 7)
    failing.create("/base/b")
    results = failing.commit()
    assert [type(result) for result in results[:3]] == [RolledBackError] * 3
    assert isinstance(results[4], RuntimeInconsistency)
    assert client.get("/base") == (b"old", before)
    working = client.transaction()
    working.create("/base/a")
    working.set_data("/base", b"new", version=0)
    working.check("/base", 1)
    working.delete("/base/a")
    created, changed, checked, deleted = working.commit()
    assert (created, checked, deleted) == ("/base/a", True, True)
    assert changed.version == 1
    assert changed.numChildren == 1
    assert client.exists("/base").mzxid == client.exists("/base").pzxid == changed.mzxid


def test_a_watch_fires_once_and_before_the_answer(zookeeper: ZooKeeper, raw: Callable[..., Client]) -> None:
    watcher, actor = raw(zookeeper), raw(zookeeper)
    watcher.ask(EXISTS, path_watch("/node", True))
    actor.ask(EXISTS, path_watch("/node", True))
    actor.ask(CREATE, create_body("/node"))
    event = (-1, 0, CREATED, 3, "/node")
    assert actor.events == [event]
    assert watcher.take_events() == [event]
    watcher.ask(GET, path_watch("/node", True))
    watcher.ask(CHILDREN, path_watch("/node", True))
    watcher.ask(CHILDREN, path_watch("/", True))
    actor.ask(DELETE, path_and("/node"))
    actor.ask(CREATE, create_body("/node"))
    assert watcher.take_events() == [(-1, 0, DELETED, 3, "/node"), (-1, 0, CHILDREN_CHANGED, 3, "/")]


def test_watches_are_set_again_after_a_reconnect(zookeeper: ZooKeeper, raw: Callable[..., Client]) -> None:
    watcher, actor = raw(zookeeper), raw(zookeeper)
    for path in ("/changed", "/same", "/parent"):
        actor.ask(CREATE, create_body(path))
    watcher.ask(PING)
    seen = watcher.last_zxid
    actor.ask(SET, path_data("/changed"))
    actor.ask(CREATE, create_body("/appeared"))
    watcher.reconnect()
    watched = (["/changed", "/same", "/gone"], ["/appeared", "/missing"], ["/parent"])
    assert code_of(watcher.ask(SET_WATCHES, struct.pack(">q", seen) + b"".join(map(strings, watched)))) == 0
    kinds = [(event[2], event[4]) for event in watcher.take_events()]
    assert kinds == [(CHANGED, "/changed"), (DELETED, "/gone"), (CREATED, "/appeared")]
    actor.ask(CREATE, create_body("/parent/child"))
    actor.ask(SET, path_data("/same"))
    actor.ask(CREATE, create_body("/missing"))
    kinds = [(event[2], event[4]) for event in watcher.take_events()]
    assert kinds == [(CHILDREN_CHANGED, "/parent"), (CHANGED, "/same"), (CREATED, "/missing")]


def test_acls_of_every_scheme(zookeeper: ZooKeeper, kazoo: Callable[..., KazooClient]) -> None:
    owner, stranger = kazoo(zookeeper), kazoo(zookeeper)
    owner.add_auth("digest", "ann:secret")
    owner.create("/auth", b"x", acl=[make_acl("auth", "", all=True), make_acl("world", "anyone", read=True)])
    owner.create("/digest", b"x", acl=[make_digest_acl("ann", "secret", all=True)])
    owner.create("/local", b"x", acl=[make_acl("ip", "127.0.0.0/8", read=True)])
    owner.create("/remote", b"x", acl=[make_acl("ip", "10.0.0.0/8", read=True)])
    assert stranger.get("/auth")[0] == stranger.get("/local")[0] == b"x"
    for path in ("/digest", "/remote"):
        with pytest.raises(NoAuthError):
            stranger.get(path)
    with pytest.raises(NoAuthError):
        stranger.set("/auth", b"y")
    assert owner.set("/auth", b"y").version == owner.set("/digest", b"y").version == 1
    assert [entry.id.id for entry in stranger.get_acls("/auth")[0]] == ["ann:x", "anyone"]
    assert owner.get_acls("/auth")[0][0].id.id == digest_identity(b"ann:secret")[1]
    assert owner.set_acls("/auth", [make_acl("world", "anyone", read=True)], version=0).aversion == 1


def test_who_may_not_read_a_node_is_not_told_of_it(zookeeper: ZooKeeper, raw: Callable[..., Client]) -> None:
    watcher, actor = raw(zookeeper), raw(zookeeper)
    watcher.ask(EXISTS, path_watch("/secret", True))
    actor.ask(CREATE, create_body("/secret", acl=((31, "digest", "no:body"),)))
    assert watcher.take_events() == []


def test_a_session_goes_on_with_another_connection(zookeeper: ZooKeeper, raw: Callable[..., Client]) -> None:
    first, second, observer = raw(zookeeper), raw(zookeeper), raw(zookeeper)
    first.ask(CREATE, create_body("/mine", flags=1))
    second.close()
    assert second.connect(first.session_id, first.password)[0] == differential.TIMEOUT_MS
    assert second.session_id == first.session_id
    assert first.hung_up_on()
    assert code_of(observer.ask(EXISTS, path_watch("/mine", True))) == Code.OK
    assert code_of(second.ask(CLOSE)) == Code.OK
    assert second.hung_up_on()
    assert [event[2] for event in observer.take_events()] == [DELETED]


def test_a_wrong_password_gets_no_session(zookeeper: ZooKeeper, raw: Callable[..., Client]) -> None:
    client, thief = raw(zookeeper), raw(zookeeper)
    thief.close()
    assert thief.connect(client.session_id, bytes(16)) == (0, 0, b"\0")
    assert thief.hung_up_on()


def test_a_client_that_knows_the_future_is_turned_away(zookeeper: ZooKeeper, raw: Callable[..., Client]) -> None:
    client = raw(zookeeper)
    client.close()
    client.last_zxid = 1 << 40
    with pytest.raises(ConnectionError):
        client.connect(client.session_id, client.password)


def test_a_silent_session_expires_and_its_nodes_go(zookeeper: ZooKeeper, raw: Callable[..., Client]) -> None:
    observer, silent = raw(zookeeper), raw(zookeeper)
    silent.close()
    assert silent.connect(0, bytes(16), timeout_ms=1)[0] == 2 * TICK_MS
    silent.ask(CREATE, create_body("/ghost", flags=1))
    observer.ask(EXISTS, path_watch("/ghost", True))
    assert silent.hung_up_on()
    assert [event[2:] for event in observer.take_events()] == [(DELETED, 3, "/ghost")]
    silent.close()
    assert silent.connect(silent.session_id, silent.password) == (0, 0, b"\0")


def test_the_longest_packet_is_taken_and_one_byte_more_ends_the_connection(
    zookeeper: ZooKeeper, raw: Callable[..., Client]
) -> None:
    client = raw(zookeeper)
    overhead = 8 + len(create_body("/big"))
    assert code_of(client.ask(CREATE, create_body("/big", bytes(PACKET_LIMIT - overhead)))) == Code.OK
    client.send(struct.pack(">i", PACKET_LIMIT + 1))
    assert client.hung_up_on()


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(struct.pack(">i", 2**31 - 1), id="length of 2^31 - 1"),
        pytest.param(struct.pack(">I", 2**31), id="length of 2^31"),
        pytest.param(struct.pack(">i", 0), id="empty packet"),
        pytest.param(struct.pack(">ii", 4, 1), id="half a header"),
        pytest.param(struct.pack(">iii", 8, 1, 77), id="unknown operation"),
        pytest.param(struct.pack(">iii", 8, 1, AUTH), id="empty auth"),
        pytest.param(struct.pack(">iiii", 12, 1, AUTH, 0) + b"\xff", id="auth cut short"),
    ],
)
def test_bad_input_ends_its_connection_and_no_other(
    zookeeper: ZooKeeper, raw: Callable[..., Client], bad: bytes
) -> None:
    client, other = raw(zookeeper), raw(zookeeper)
    client.send(bad, last=True)
    assert client.hung_up_on()
    assert code_of(other.ask(PING)) == Code.OK


def test_an_unknown_operation_is_called_unimplemented(zookeeper: ZooKeeper, raw: Callable[..., Client]) -> None:
    client = raw(zookeeper)
    assert client.ask(77) == (Code.UNIMPLEMENTED, -1, None)
    assert client.hung_up_on()


def test_four_letter_words(zookeeper: ZooKeeper, kazoo: Callable[..., KazooClient]) -> None:
    client = kazoo(zookeeper)
    port = int(zookeeper.hosts.rsplit(":", 1)[1])
    assert client.command(b"ruok") == four_letters(port, "ruok") == "imok"
    assert four_letters(port, "isro") == "rw"
    srvr = dict(line.split(": ", 1) for line in four_letters(port, "srvr").splitlines() if line)
    assert srvr["Mode"] == "standalone"
    assert int(srvr["Zxid"], 16) >= 1
    assert srvr["Zookeeper version"].startswith("3.8.0-")
    assert {"Latency min/avg/max", "Received", "Sent", "Connections", "Outstanding", "Node count"} <= set(srvr)
    mntr = dict(line.split("\t") for line in four_letters(port, "mntr").splitlines())
    assert mntr["zk_server_state"] == "standalone"
    assert {"zk_version", "zk_znode_count", "zk_watch_count", "zk_num_alive_connections"} <= set(mntr)
    assert client.server_version() == (3, 8, 0)
    assert four_letters(port, "stat").splitlines()[1] == "Clients:"


@pytest.mark.parametrize("seed", [1000, 1001])
def test_random_operations_do_the_same_on_both(seed: int) -> None:
    require()
    with differential.fresh_servers() as (embedded_port, real_port):
        assert differential.compare(embedded_port, real_port, seed, 2000) > 100


# Debian's own clients, where they are installed.


def tool(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/share/zookeeper/bin:/usr/lib/zookeeper/bin")
    if path is None:
        pytest.skip(f"{name} is not installed: sudo apt-get install zookeeper zookeeper-bin")
    return path


def test_the_java_client_reads_and_writes(embedded_zookeeper: EmbeddedZooKeeper) -> None:
    commands = "create /java hello\nset /java world\nget -s /java\nls -R /\ndelete /java\nls /\nquit\n"
    done = subprocess.run(
        [tool("zkCli.sh"), "-server", embedded_zookeeper.hosts],
        input=commands,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    said = done.stdout.splitlines()
    assert "Created /java" in done.stdout + done.stderr
    assert "world" in said
    assert "dataVersion = 1" in said
    assert said.count("/java") == 1
    assert "[zookeeper]" in said


def test_the_c_client_sets_its_watches_again_after_a_reconnect(embedded_zookeeper: EmbeddedZooKeeper) -> None:
    process = subprocess.Popen(
        [tool("stdbuf"), "-oL", tool("cli_mt"), embedded_zookeeper.hosts],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def say(command: str) -> None:
        assert process.stdin is not None
        process.stdin.write(command + "\n")
        process.stdin.flush()

    watchdog = threading.Timer(30, process.kill)
    watchdog.start()
    with process, contextlib.ExitStack() as stack:
        stack.callback(watchdog.cancel)
        wait_for_line(process.stdout, "state = CONNECTED_STATE")
        say("create /c")
        wait_for_line(process.stdout, "name = /c")
        say("wexists /c\nls /")
        wait_for_line(process.stdout, "zookeeper")
        embedded_zookeeper.drop_connections()
        wait_for_line(process.stdout, "state = CONNECTED_STATE")
        say("set /c changed")
        wait_for_line(process.stdout, "Watcher CHANGED_EVENT state = CONNECTED_STATE for path /c")
        say("quit")


def wait_for_line(stream: IO[str], text: str) -> None:
    for line in stream:
        if text in line:
            return
    pytest.fail(f"{text!r} never came")


# The levers of mprpc.testing.


class States:
    """The states of a KazooClient, in the order in which they come."""

    def __init__(self, client: KazooClient) -> None:
        self._queue: queue.Queue[str] = queue.Queue()
        client.add_listener(self._queue.put)

    def expect(self, *states: str) -> None:
        assert [self._queue.get(timeout=SECONDS) for _ in states] == list(states)


def test_an_expired_session_is_lost_and_its_nodes_with_it(
    embedded_zookeeper: EmbeddedZooKeeper, kazoo: Callable[..., KazooClient]
) -> None:
    client, observer = kazoo(embedded_zookeeper), kazoo(embedded_zookeeper)
    states = States(client)
    client.create("/mine", ephemeral=True)
    old = client.client_id[0]
    assert embedded_zookeeper.owner("/mine") == old
    embedded_zookeeper.expire_session(old)
    assert embedded_zookeeper.owner("/mine") is None
    assert observer.exists("/mine") is None
    states.expect(KazooState.SUSPENDED, KazooState.LOST, KazooState.CONNECTED)
    assert client.client_id[0] != old
    with pytest.raises(KeyError):
        embedded_zookeeper.expire_session(old)


def test_a_session_may_be_lost_long_before_its_nodes(
    embedded_zookeeper: EmbeddedZooKeeper, kazoo: Callable[..., KazooClient]
) -> None:
    client, observer = kazoo(embedded_zookeeper), kazoo(embedded_zookeeper)
    states = States(client)
    client.create("/mine", ephemeral=True)
    old = client.client_id[0]
    embedded_zookeeper.expire_session(old, purge=False)
    states.expect(KazooState.SUSPENDED, KazooState.LOST, KazooState.CONNECTED)
    embedded_zookeeper.advance(1000)
    assert embedded_zookeeper.owner("/mine") == old
    with pytest.raises(NodeExistsError):
        client.create("/mine", ephemeral=True)
    gone = threading.Event()
    observer.exists("/mine", watch=lambda _: gone.set())
    embedded_zookeeper.purge_session(old)
    assert gone.wait(SECONDS)
    client.create("/mine", ephemeral=True)
    with pytest.raises(KeyError):
        embedded_zookeeper.purge_session(old)


def test_time_passes_only_when_it_is_told_to(embedded_zookeeper: EmbeddedZooKeeper, raw: Callable[..., Client]) -> None:
    connected, away = raw(embedded_zookeeper), raw(embedded_zookeeper)
    away.close()
    embedded_zookeeper.advance(differential.TIMEOUT_MS / 1000 - 0.001)
    assert embedded_zookeeper.sessions() == [connected.session_id, away.session_id]
    embedded_zookeeper.advance(0.001)
    assert embedded_zookeeper.sessions() == [connected.session_id], "one without a connection is not heard of"
    with embedded_zookeeper.stalled():
        embedded_zookeeper.advance(differential.TIMEOUT_MS / 1000)
    assert embedded_zookeeper.sessions() == []
    assert connected.hung_up_on()
    with pytest.raises(ValueError, match="forward"):
        embedded_zookeeper.advance(-1)


def test_expiry_can_be_held_back(embedded_zookeeper: EmbeddedZooKeeper, raw: Callable[..., Client]) -> None:
    away = raw(embedded_zookeeper)
    away.close()
    with embedded_zookeeper.expiry_held():
        embedded_zookeeper.advance(100)
        assert embedded_zookeeper.sessions() == [away.session_id]
    assert embedded_zookeeper.sessions() == []


def test_dropped_connections_come_back_with_their_sessions(
    embedded_zookeeper: EmbeddedZooKeeper, kazoo: Callable[..., KazooClient]
) -> None:
    client, other = kazoo(embedded_zookeeper), kazoo(embedded_zookeeper)
    states, session = States(client), client.client_id[0]
    client.create("/mine", ephemeral=True)
    assert embedded_zookeeper.drop_connections(session) == 1
    states.expect(KazooState.SUSPENDED, KazooState.CONNECTED)
    assert client.client_id[0] == session
    assert other.exists("/mine")
    assert embedded_zookeeper.drop_connections() == 2


def test_a_stalled_server_answers_when_it_is_let_go(
    embedded_zookeeper: EmbeddedZooKeeper, kazoo: Callable[..., KazooClient]
) -> None:
    client = kazoo(embedded_zookeeper)
    with embedded_zookeeper.stalled():
        pending = client.create_async("/late")
        newcomer = socket.create_connection(("127.0.0.1", embedded_zookeeper.port))
        newcomer.sendall(b"ruok")
        assert embedded_zookeeper.owner("/late") is None
    assert pending.get(timeout=SECONDS) == "/late"
    with newcomer:
        assert newcomer.recv(4) == b"imok"


def test_held_answers_come_in_order(embedded_zookeeper: EmbeddedZooKeeper, raw: Callable[..., Client]) -> None:
    client = raw(embedded_zookeeper)
    client.ask(EXISTS, path_watch("/node", True))
    with embedded_zookeeper.answers_held():
        client.send(framed(struct.pack(">ii", 50, CREATE) + create_body("/node")))
        until(lambda: embedded_zookeeper.owner("/node") is not None)
        assert client.is_silent()
    event, answer = Answer(client.read(), client.server), Answer(client.read(), client.server)
    assert (event.integer(), answer.integer()) == (-1, 50)


def test_requests_can_be_refused(embedded_zookeeper: EmbeddedZooKeeper, kazoo: Callable[..., KazooClient]) -> None:
    client = kazoo(embedded_zookeeper)
    embedded_zookeeper.refuse_requests(Code.OPERATION_TIMEOUT, op=Op.CREATE, count=2)
    for _ in range(2):
        with pytest.raises(OperationTimeoutError):
            client.create("/node")
    assert client.exists("/node") is None
    assert client.create("/node") == "/node"
    embedded_zookeeper.refuse_requests(Code.SESSION_EXPIRED)
    with pytest.raises(SessionExpiredError):
        client.get("/node")


def test_an_answer_can_be_lost_while_others_wait_to_be_read(
    embedded_zookeeper: EmbeddedZooKeeper, raw: Callable[..., Client]
) -> None:
    """The connection once closed while its paused requests were taken up again, and was then waited for."""
    client, other = raw(embedded_zookeeper), raw(embedded_zookeeper)
    client.ask(CREATE, create_body("/big", bytes(900_000)))
    embedded_zookeeper.lose_answers(op=Op.CREATE)
    read, create = struct.pack(">ii", 1, GET) + path_watch("/big"), struct.pack(">ii", 2, CREATE) + create_body("/node")
    client.send(framed(read) * 20 + framed(create))
    assert client.hung_up_on()
    assert code_of(other.ask(EXISTS, path_watch("/node"))) == Code.OK


def test_an_answer_can_be_lost_after_the_deed(
    embedded_zookeeper: EmbeddedZooKeeper, kazoo: Callable[..., KazooClient]
) -> None:
    client = kazoo(embedded_zookeeper)
    states = States(client)
    embedded_zookeeper.lose_answers(op=Op.CREATE)
    with pytest.raises(ConnectionLoss):
        client.create("/node")
    states.expect(KazooState.SUSPENDED, KazooState.CONNECTED)
    assert client.exists("/node")


def test_connections_can_be_refused(embedded_zookeeper: EmbeddedZooKeeper, raw: Callable[..., Client]) -> None:
    before = raw(embedded_zookeeper)
    with embedded_zookeeper.connections_refused():
        with pytest.raises(ConnectionError):
            raw(embedded_zookeeper)
        assert code_of(before.ask(PING)) == Code.OK
    raw(embedded_zookeeper)


def test_it_comes_back_with_its_data_and_sessions(
    embedded_zookeeper: EmbeddedZooKeeper, kazoo: Callable[..., KazooClient]
) -> None:
    client = kazoo(embedded_zookeeper)
    states = States(client)
    client.create("/mine", b"kept", ephemeral=True)
    session, port = client.client_id[0], embedded_zookeeper.port
    embedded_zookeeper.restart(while_down=lambda: states.expect(KazooState.SUSPENDED))
    assert embedded_zookeeper.port == port
    states.expect(KazooState.CONNECTED)
    assert client.client_id[0] == session
    assert client.get("/mine")[0] == b"kept"


def test_it_comes_back_without_its_data(embedded_zookeeper: EmbeddedZooKeeper, raw: Callable[..., Client]) -> None:
    client = raw(embedded_zookeeper)
    client.ask(CREATE, create_body("/node"))
    embedded_zookeeper.restart(keep_data=False)
    assert embedded_zookeeper.sessions() == []
    client.close()
    with pytest.raises(ConnectionError):  # it has seen a zxid that is still to come
        client.connect(client.session_id, client.password)
    fresh = raw(embedded_zookeeper)
    assert code_of(fresh.ask(EXISTS, path_watch("/node"))) == Code.NO_NODE


def test_levers_work_on_a_stopped_server() -> None:
    server = EmbeddedZooKeeper()
    assert server.sessions() == []
    with server.stalled():
        server.advance(1)
    with pytest.raises(TypeError, match="SteppedClock"):
        EmbeddedZooKeeper(clock=Clock()).advance(1)


def test_the_fixture_is_there_for_who_loads_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["mprpc.testing"]\n')
    (tmp_path / "test_user.py").write_text("def test(embedded_zookeeper):\n    assert embedded_zookeeper.running\n")
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent.parent)}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


# Limits, and clients that mean harm.


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings logged so far."""
    caplog.set_level(logging.DEBUG, "mprpc.zookeeper")
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@contextlib.contextmanager
def limited(**limits: float) -> Iterator[EmbeddedZooKeeper]:
    with EmbeddedZooKeeper(limits=Limits(**limits)) as server:  # type: ignore[arg-type]
        yield server


def test_one_connection_too_many_is_turned_away(raw: Callable[..., Client], log: Callable[[], list[str]]) -> None:
    with limited(connections=2) as server:
        first, _ = raw(server), raw(server)
        with pytest.raises(ConnectionError):
            raw(server)
        assert len(log()) == 1
        assert "turned away: 2 connections" in log()[0]
        first.ask(CLOSE)
        assert first.hung_up_on()
        raw(server)


def test_one_session_too_many_is_refused(raw: Callable[..., Client]) -> None:
    with limited(sessions=2) as server:
        clients = [raw(server) for _ in range(3)]
        assert [bool(client.session_id) for client in clients] == [True, True, False]
        assert clients[2].hung_up_on()


def test_a_full_tree_refuses_to_grow(raw: Callable[..., Client]) -> None:
    with limited(tree_bytes=10_000) as server:
        client = raw(server)
        assert code_of(client.ask(CREATE, create_body("/a", bytes(5000)))) == Code.OK
        assert code_of(client.ask(CREATE, create_body("/b", bytes(5000)))) == Code.QUOTA_EXCEEDED
        assert code_of(client.ask(SET, path_data("/a", bytes(9000)))) == Code.QUOTA_EXCEEDED
        assert code_of(client.ask(SET, path_data("/a", b""))) == Code.OK
        assert code_of(client.ask(CREATE, create_body("/b", bytes(5000)))) == Code.OK
        assert code_of(client.ask(DELETE, path_and("/b"))) == Code.OK
        multi = b"".join(struct.pack(">i?i", CREATE, False, -1) + create_body(f"/{n}", bytes(3000)) for n in range(3))
        results = client.ask(MULTI, multi + struct.pack(">i?i", -1, True, -1), Answer.multi)
        assert isinstance(results, tuple)
        assert results[2][2][1] == Code.QUOTA_EXCEEDED
        assert code_of(client.ask(CREATE, create_body("/b", bytes(5000)))) == Code.OK, "the multi gave its room back"


def test_one_watch_too_many_ends_the_connection(raw: Callable[..., Client], log: Callable[[], list[str]]) -> None:
    with limited(watches=3) as server:
        client = raw(server)
        for path in ("/a", "/b", "/c", "/a", "/d"):
            client.ask(EXISTS, path_watch(path, True))
        assert client.hung_up_on()
        assert len(log()) == 1
        assert "more than 3 watches" in log()[0]


def test_one_identity_too_many_ends_the_connection(raw: Callable[..., Client], log: Callable[[], list[str]]) -> None:
    with limited(identities=3) as server:
        client = raw(server)
        for name in (b"ann", b"bob", b"ann", b"eve"):
            client.ask(AUTH, struct.pack(">i", 0) + string("digest") + buffer(name))
        assert client.hung_up_on()
        assert len(log()) == 1
        assert "more than 3 identities" in log()[0]


def test_a_connection_without_a_session_ends_after_a_while(log: Callable[[], list[str]]) -> None:
    with (
        limited(handshake_seconds=5) as server,
        socket.create_connection(("127.0.0.1", server.port)) as idle,
        socket.create_connection(("127.0.0.1", server.port)) as later,
    ):
        idle.sendall(struct.pack(">i", 44) + b"half a hello")
        later.sendall(b"ruok")
        assert later.recv(4) == b"imok"  # so both are accepted
        server.advance(4.9)
        assert log() == []
        server.advance(0.1)
        assert idle.recv(1) == b""
        assert len(log()) == 1
        assert "no session was opened in time" in log()[0]


def test_who_never_reads_is_not_read_from_either(raw: Callable[..., Client]) -> None:
    """A flood of requests for much data must not pile up answers: the server stops reading until they are taken."""
    with limited(pause_bytes=100_000) as server:
        client, other = raw(server), raw(server)
        client.ask(CREATE, create_body("/big", bytes(50_000)))
        requests = framed(struct.pack(">ii", 1, GET) + path_watch("/big")) * 20_000
        sender = threading.Thread(target=client.send, args=(requests,))
        sender.start()
        for _ in range(20):
            assert code_of(other.ask(PING)) == Code.OK
        assert server._call(lambda: max(each.unsent for each in server._connections)) < 200_000
        for _ in range(20_000):
            assert len(client.read()) == 16 + 4 + 50_000 + 68
        sender.join()


def test_who_leaves_too_much_unread_is_dropped(raw: Callable[..., Client], log: Callable[[], list[str]]) -> None:
    with limited(pause_bytes=100_000_000, unsent_bytes=1_000_000) as server:
        client, other = raw(server), raw(server)
        client.ask(CREATE, create_body("/big", bytes(500_000)))
        client.send(framed(struct.pack(">ii", 1, GET) + path_watch("/big")) * 100)
        until(lambda: len(server.sessions()) == 2 and len(log()) == 1)
        assert "bytes unread" in log()[0]
        assert code_of(other.ask(PING)) == Code.OK


def test_who_lets_events_pile_up_is_dropped(raw: Callable[..., Client], log: Callable[[], list[str]]) -> None:
    with limited(unsent_bytes=1000) as server:
        client, other = raw(server), raw(server)
        with server.answers_held():
            client.send(framed(struct.pack(">ii", 1, SYNC) + string("/" + "x" * 1000)))
            assert client.hung_up_on()
        assert code_of(other.ask(PING)) == Code.OK
        assert len(log()) == 1
        assert "bytes are unread" in log()[0]


def test_a_packet_that_is_cut_short_is_told_of(
    embedded_zookeeper: EmbeddedZooKeeper, raw: Callable[..., Client], log: Callable[[], list[str]]
) -> None:
    client = raw(embedded_zookeeper)
    client.send(framed(struct.pack(">ii", 1, CREATE) + create_body("/node"))[:-1], last=True)
    assert client.hung_up_on()
    assert len(log()) == 1
    assert "in the middle of a packet" in log()[0]


def test_an_unreadable_record_is_answered_and_ends_its_connection(
    embedded_zookeeper: EmbeddedZooKeeper, raw: Callable[..., Client], log: Callable[[], list[str]]
) -> None:
    for op, body in (
        (CREATE, b"\0\0"),
        (GET, struct.pack(">i", -1) + b"\0"),
        (MULTI, struct.pack(">i?i", 3, False, 0)),
    ):
        client = raw(embedded_zookeeper)
        assert code_of(client.ask(op, body)) == Code.MARSHALLING_ERROR
        assert client.hung_up_on()
    assert len(log()) == 3
    assert all("malformed request" in line for line in log())


def test_a_malformed_multi_changes_nothing(embedded_zookeeper: EmbeddedZooKeeper, raw: Callable[..., Client]) -> None:
    client, observer = raw(embedded_zookeeper), raw(embedded_zookeeper)
    observer.ask(EXISTS, path_watch("/a", True))
    body = struct.pack(">i?i", CREATE, False, -1) + create_body("/a") + struct.pack(">i?i", 99, False, -1)
    assert code_of(client.ask(MULTI, body)) == Code.MARSHALLING_ERROR
    assert code_of(observer.ask(EXISTS, path_watch("/a"))) == Code.NO_NODE
    assert observer.take_events() == []


@pytest.mark.parametrize("how", ["bare bytes", "a packet", "a request"])
def test_random_bytes_end_their_connection_only(how: str) -> None:
    """One reason at most is logged, never a fault of the server's own, and a steady client notices nothing."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("mprpc.zookeeper")
    logger.addHandler(handler)
    with EmbeddedZooKeeper() as server:
        steady = Client(Server("server", server.port, {}))

        @settings(max_examples=100, database=None)
        @given(st.sampled_from(list(Op)), st.binary(max_size=200))
        def attack(op: Op, junk: bytes) -> None:
            said.clear()
            client = Client(Server("server", server.port, {}))
            request = framed(struct.pack(">ii", 1, op) + junk)
            client.send({"bare bytes": junk, "a packet": framed(junk), "a request": request}[how], last=True)
            assert client.hung_up_on()
            client.close()
            assert code_of(steady.ask(PING)) == Code.OK
            assert len(said) <= 1
            assert not any("failed in the server" in line for line in said)

        attack()
        steady.close()
    logger.removeHandler(handler)


def test_without_descriptors_it_turns_connections_away_and_lives() -> None:
    """It must not spin on a connection that it can't even accept; the spare descriptor is for that."""
    with command() as (process, port):
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (24, 24))
        with contextlib.ExitStack() as stack:
            connections = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(40)]
            assert connections[-1].recv(1) == b"", "turned away"
        until(lambda: four_letters(port, "ruok") == "imok")  # once it has noticed that the others are gone


# Starting, stopping, and whether to start at all.


def test_it_starts_stops_and_starts_again_at_the_same_port(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mprpc.zookeeper")
    server = EmbeddedZooKeeperServer(port=0)
    server.stop()
    server.start()
    port = server.port
    assert server.address == f"127.0.0.1:{port}"
    assert server.running
    assert [record.getMessage() for record in caplog.records] == [
        f"embedded ZooKeeper at 127.0.0.1:{port}: in memory, for development and tests only"
    ]
    with pytest.raises(RuntimeError):
        server.start()
    with pytest.raises(RuntimeError):
        server.wipe()
    with pytest.raises(OSError, match="in use"):
        EmbeddedZooKeeperServer(port=port).start()
    server.stop()
    server.stop()
    assert not answering("127.0.0.1", port)
    with server:
        assert server.port == port
        assert answering("127.0.0.1", port)


def test_it_listens_at_ipv6_too() -> None:
    with EmbeddedZooKeeperServer("::1", 0) as server:
        assert server.address == f"[::1]:{server.port}"
        client = KazooClient(server.address)
        client.start(timeout=SECONDS)
        client.stop()
        client.close()


def test_it_is_started_only_where_nothing_answers(log: Callable[[], list[str]]) -> None:
    (port,) = free_ports(1)
    server = start_unless_answering("127.0.0.1", port)
    assert server is not None
    assert server.port == port
    with contextlib.closing(ExitOf(server)):
        assert start_unless_answering("127.0.0.1", port) is None
        assert log() == []


def test_whatever_listens_counts_as_answering(log: Callable[[], list[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        assert answering("127.0.0.1", stranger.getsockname()[1], timeout=0.01)
        assert len(log()) == 1
        assert "does not answer as a ZooKeeper" in log()[0]


def test_it_can_not_be_started_on_another_machine() -> None:
    with pytest.raises(OSError):  # 192.0.2.0/24 is nobody's  # noqa: PT011
        EmbeddedZooKeeperServer("192.0.2.1", 0).start()


class ExitOf:
    """Lets `closing` stop a server."""

    def __init__(self, server: EmbeddedZooKeeperServer) -> None:
        self.close = server.stop


@contextlib.contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command on a free port."""
    line = [sys.executable, "-m", "mprpc", "zookeeper", "--port", "0", *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline().rsplit(":", 1)[1])
        finally:
            process.terminate()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_stop(stop: signal.Signals) -> None:
    with command() as (process, port):
        assert four_letters(port, "ruok") == "imok"
        process.send_signal(stop)
        assert process.wait(SECONDS) == 0


def test_the_command_says_what_is_wrong() -> None:
    def run(*arguments: str) -> tuple[int, str]:
        line = [sys.executable, "-m", "mprpc", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    assert run("zookeeper", "--port", "70000")[0] == 2
    assert run("nonsense")[0] == 2
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, error = run("zookeeper", "--port", str(taken.getsockname()[1]))
    assert code == 1
    assert error.startswith("python -m mprpc zookeeper: can't listen at 127.0.0.1:")


def test_it_imports_the_standard_library_only() -> None:
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= sys.stdlib_module_names
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None
                assert node.module.split(".")[0] in {*sys.stdlib_module_names, "typing_extensions"}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1, "nothing of the package around it"


def test_it_runs_without_the_package_around_it() -> None:
    line = [sys.executable, "-m", "embedded_zookeeper", "--help"]
    done = subprocess.run(line, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert "for development and tests only" in done.stdout


# What it promises in figures, with room for a busy machine.


def test_a_thousand_sessions_at_once(embedded_zookeeper: EmbeddedZooKeeper) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    server = Server("server", embedded_zookeeper.port, {})
    with contextlib.ExitStack() as stack:
        clients = [Client(server) for _ in range(1000)]
        for client in clients:
            stack.callback(client.close)
        assert len(embedded_zookeeper.sessions()) == len({client.session_id for client in clients}) == 1000
        assert all(code_of(client.ask(PING)) == Code.OK for client in clients)


def test_three_thousand_creates_a_second_from_another_process_in_little_memory() -> None:
    with command() as (process, port):
        assert resident_kilobytes(process.pid) < 40_000
        client = Client(Server("server", port, {}))
        count = 6000
        packets = b"".join(
            framed(struct.pack(">ii", number, CREATE) + create_body(f"/n{number}", bytes(50)))
            for number in range(count)
        )
        began = time.monotonic()
        sender = threading.Thread(target=client.send, args=(packets,))
        sender.start()
        for number in range(count):
            assert Answer(client.read(), client.server).integer() == number
        assert time.monotonic() - began < count / 3000
        sender.join()
        client.close()


def resident_kilobytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def test_it_is_ready_in_a_tenth_of_a_second() -> None:
    began = time.monotonic()
    with EmbeddedZooKeeperServer(port=0) as server:
        assert four_letters(server.port, "ruok") == "imok"
        assert time.monotonic() - began < 0.1


# Its parts.


def test_digest_is_zookeepers() -> None:
    assert digest_identity(b"super:test") == ("digest", "super:D/InIHSb7yEEbrWz8b9l71RjZJU=")


@pytest.mark.parametrize(
    ("expression", "address", "allowed"),
    [
        ("10.1.2.3", "10.1.2.3", True),
        ("10.1.2.3", "10.1.2.4", False),
        ("10.1.2.3/24", "10.1.2.200", True),
        ("10.1.2.3/25", "10.1.2.200", False),
        ("10.1.2.3/0", "192.168.0.1", True),
        ("0.0.0.0/0", "::1", False),
    ],
)
def test_ip_acls(expression: str, address: str, allowed: bool) -> None:
    entries = resolve([AclEntry(1, "ip", expression)], ())
    assert permitted(entries, 1, [("ip", address)]) is allowed


@pytest.mark.parametrize("expression", ["10.1.2", "10.1.2.3.4", "10.1.2.256", "10.1.2.3/33", "10.1.2.x", "::1", ""])
def test_ip_acls_that_can_not_be_read(expression: str) -> None:
    with pytest.raises(ZooKeeperError):
        resolve([AclEntry(1, "ip", expression)], ())


def test_versions_wrap_as_javas_do() -> None:
    tree = Tree(1 << 20)
    txn = Txn(1, 0, 0, ())
    tree.create(txn, "/a", b"", [AclEntry(31, "world", "anyone")], 0)
    tree.get("/a").version = 2**31 - 1
    assert tree.set_data(txn, "/a", b"", -1).version == -(2**31)
    tree.get("/a").cversion = 2**31 - 1
    assert len(tree.get("/a").stat()) == 68
