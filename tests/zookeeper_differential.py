"""The embedded ZooKeeper against the real one: random operations of three sessions must look the same on both.

Each step is one request of one session, sent to both servers and answered before the next is made. Compared are the
answer (error code, zxid, every field of a Stat but the times) and the watch events that each of the three sessions got
by it, in order. Both servers start empty, so zxids must be equal; session ids are compared by whose they are. The
client is written here from the protocol's description and shares nothing with the server's own codec.

Left out, on purpose: the times of a Stat; a top-level `check` that succeeds, which the real server never answers (in
a multi it is compared); malformed requests, which the real server answers and tolerates and this one answers and ends;
container and TTL flags in a multi, which the real server takes for a request it can't read; the order of children, of
the ephemeral nodes of one session and of identities, which are hash sets there.

    python tests/zookeeper_differential.py --seeds 20 --operations 2000
"""

from __future__ import annotations

import argparse
import contextlib
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SESSIONS = 3
TIMEOUT_MS = 10_000
ANSWER_SECONDS = 10.0
SHOWN_STEPS = 8

_STAT = struct.Struct(">qqqqiiiqiiq")

Entries = tuple[tuple[int, str, str], ...]
OPEN: Entries = ((31, "world", "anyone"),)
ACLS: tuple[Entries, ...] = (
    *([OPEN] * 40),
    ((1, "world", "anyone"),),
    ((15, "world", "anyone"), (16, "digest", "ann:aaa")),
    ((31, "auth", ""),),
    ((31, "auth", ""), (1, "world", "anyone"), (1, "world", "anyone")),
    ((31, "ip", "127.0.0.1"),),
    ((31, "ip", "127.0.0.0/8"), (1, "digest", "bob:x")),
    ((31, "ip", "10.0.0.1"), (16, "world", "anyone")),
    ((27, "ip", "127.0.0.1/32"),),
    (),
    ((31, "world", "someone"),),
    ((31, "digest", "nocolon"),),
    ((31, "ip", "300.0.0.1"),),
    ((31, "ip", "127.0.0.1/33"),),
    ((31, "sasl", "user"),),
    ((2, "world", "anyone"), (4, "auth", "ignored")),
)
NAMES = ("a", "b", "..é")
ODD_PATHS = (
    "", "/", "a", "//", "/a/", "/a//b", "/a/.", "/./a", "/a/..", "/../a", "/a\x01", "/a\x7f", "/\ue000", "/\U0001f600",
    "/\ufff0", "/zookeeper", "/zookeeper/quota", "/zookeeper/config", "/zookeeper/x", "/a b", "/ü/x", "/a\0b",
)  # fmt: skip
DATA = (b"", b"x", b"some data", bytes(range(256)) * 4, None)
MULTI_FLAGS = (0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 7)
FLAGS = (*MULTI_FLAGS, 4, 5, 6, -1)
CREDENTIALS = (b"ann:secret", b"bob:hidden", b"nocolon", b"")


class Step(NamedTuple):
    """One thing that one session does; `run` does it, on whichever server, and returns what is to be compared."""

    session: int
    what: str
    run: Callable[[Client], object]
    unordered_events: bool = False


class Client:
    """A session at one server over a plain socket; it notes the watch events it gets."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.events: list[tuple[object, ...]] = []
        self.last_zxid = 0
        self._xid = 0
        self.connect(0, bytes(16))

    def connect(self, session_id: int, password: bytes, timeout_ms: int = TIMEOUT_MS) -> tuple[object, ...]:
        """Opens or resumes a session; what came of it, comparable between servers."""
        self._socket = socket.create_connection(("127.0.0.1", self.server.port), ANSWER_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = self._socket.makefile("rb")
        request = struct.pack(">iqiqi", 0, self.last_zxid, timeout_ms, session_id, 16) + password + b"\0"
        self.send(framed(request))
        try:
            answer = self.read()
        except ConnectionError:
            self.close()
            raise
        _, timeout, self.session_id, size = struct.unpack_from(">iiqi", answer)
        self.password = answer[20 : 20 + size]
        if self.session_id and self.session_id not in self.server.owners:
            self.server.owners[self.session_id] = len(self.server.owners) + 1
        return timeout, self.server.owners.get(self.session_id, 0), answer[20 + size :]

    def close(self) -> None:
        self._stream.close()
        self._socket.close()

    def reconnect(self) -> object:
        self.close()
        return self.connect(self.session_id, self.password)

    def reconnect_with_wrong_password(self) -> object:
        """The server turns it away; with the right one the session goes on, so that none is left to expire."""
        session_id, password = self.session_id, self.password
        self.close()
        turned_away = self.connect(session_id, bytes(16))
        assert self.hung_up_on()
        self.close()
        return turned_away, self.connect(session_id, password)

    def end_session(self) -> object:
        answer = self.ask(-11)
        assert self.hung_up_on()
        self.close()
        return answer, self.connect(0, bytes(16))

    def ask(self, op: int, body: bytes = b"", read: Callable[[Answer], object] = lambda answer: None) -> object:
        """One request: (error code, zxid, what `read` makes of the answer's body)."""
        self._xid += 1
        xid = -2 if op == 11 else self._xid
        self.send(framed(struct.pack(">ii", xid, op) + body))
        while True:
            answer = Answer(self.read(), self.server)
            got, zxid, code = answer.integer(), answer.long(), answer.integer()
            if got == -1:
                self.events.append((zxid, code, answer.integer(), answer.integer(), answer.string()))
                continue
            assert got == xid, f"answer to {got} where {xid} was asked"
            if zxid > 0:
                self.last_zxid = zxid
            return code, zxid, read(answer) if code == 0 else None

    def take_events(self) -> list[tuple[object, ...]]:
        """What came since the last time; the ping makes sure that all of it has come."""
        self.ask(11)
        events, self.events = self.events, []
        return events

    def hung_up_on(self) -> bool:
        """Whether the server ends the connection; waits for it, whatever else still comes."""
        with contextlib.suppress(ConnectionResetError):
            while self._stream.read(1 << 16):
                continue
        return True

    def send(self, data: bytes, *, last: bool = False) -> None:
        """Any bytes; after the last of them the server reads the end of the stream."""
        self._socket.sendall(data)
        if last:
            with contextlib.suppress(OSError):  # the server may have hung up already
                self._socket.shutdown(socket.SHUT_WR)

    def is_silent(self) -> bool:
        """Whether nothing of the server's is there to be read."""
        return not select.select([self._socket], [], [], 0)[0]

    def read(self) -> bytes:
        """The next packet, whatever it is."""
        head = self._stream.read(4)
        if len(head) < 4:
            raise ConnectionError("the server hung up")
        return self._stream.read(struct.unpack(">i", head)[0])


class Server(NamedTuple):
    """One of the two, and the number that each of its session ids goes by in comparisons."""

    name: str
    port: int
    owners: dict[int, int]


class Answer:
    """Reads an answer's fields, made comparable."""

    def __init__(self, data: bytes, server: Server) -> None:
        self._data = data
        self._at = 0
        self._server = server

    def integer(self) -> int:
        self._at += 4
        return int(struct.unpack_from(">i", self._data, self._at - 4)[0])

    def long(self) -> int:
        self._at += 8
        return int(struct.unpack_from(">q", self._data, self._at - 8)[0])

    def buffer(self) -> bytes | None:
        size = self.integer()
        if size < 0:
            return None
        self._at += size
        return self._data[self._at - size : self._at]

    def string(self) -> str:
        # The real server writes what lies beyond U+FFFF as two surrogates of three bytes each.
        text = (self.buffer() or b"").decode("utf-8", "surrogatepass")
        return text.encode("utf-16", "surrogatepass").decode("utf-16")

    def strings(self) -> list[str]:
        return sorted(self.string() for _ in range(self.integer()))

    def stat(self) -> tuple[int, ...]:
        self._at += _STAT.size
        czxid, mzxid, _, _, version, cversion, aversion, owner, length, children, pzxid = _STAT.unpack_from(
            self._data, self._at - _STAT.size
        )
        return czxid, mzxid, version, cversion, aversion, self._server.owners.get(owner, owner), length, children, pzxid

    def acl(self) -> list[tuple[int, str, str]]:
        return sorted((self.integer(), self.string(), self.string()) for _ in range(self.integer()))

    def pairs(self) -> list[tuple[str, str]]:
        return sorted((self.string(), self.string()) for _ in range(self.integer()))

    def multi(self) -> list[tuple[object, ...]]:
        readers: dict[int, Callable[[], object]] = {
            1: self.string,
            15: lambda: (self.string(), self.stat()),
            5: self.stat,
            -1: self.integer,
        }
        results: list[tuple[object, ...]] = []
        while True:
            kind, done, code = self.integer(), self._data[self._at], self.integer_after_boolean()
            if done:
                return [*results, (kind, code)]
            results.append((kind, code, readers.get(kind, lambda: None)()))

    def integer_after_boolean(self) -> int:
        self._at += 1
        return self.integer()


def framed(packet: bytes) -> bytes:
    return struct.pack(">i", len(packet)) + packet


def buffer(data: bytes | None) -> bytes:
    return struct.pack(">i", -1) if data is None else struct.pack(">i", len(data)) + data


def string(text: str) -> bytes:
    return buffer(text.encode())


def strings(texts: Sequence[str]) -> bytes:
    return struct.pack(">i", len(texts)) + b"".join(map(string, texts))


def acl_list(entries: Entries) -> bytes:
    parts = [struct.pack(">i", perms) + string(scheme) + string(name) for perms, scheme, name in entries]
    return struct.pack(">i", len(parts)) + b"".join(parts)


class Generator:
    """Makes steps from a seed. It learns of created paths, so that sequential nodes are used again too."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._known: deque[str] = deque(maxlen=40)

    def step(self) -> Step:
        session = self._random.randrange(SESSIONS)
        makers: list[tuple[int, Callable[[int], Step]]] = [
            (26, self._create),
            (16, self._delete),
            (12, self._set_data),
            (10, self._exists),
            (10, self._get_data),
            (12, self._get_children),
            (12, self._multi),
            (4, self._set_acl),
            (3, self._get_acl),
            (2, self._sync),
            (2, self._authenticate),
            (3, self._change_watches),
            (2, self._set_watches),
            (3, self._ask_about),
            (1, self._reconnect),
            (1, self._end_session),
        ]
        weights = [weight for weight, _ in makers]
        (maker,) = self._random.choices([maker for _, maker in makers], weights)
        return maker(session)

    def learn(self, path: str) -> None:
        self._known.append(path)

    def _path(self) -> str:
        kind = self._random.random()
        if kind < 0.05:
            return self._random.choice(ODD_PATHS)
        if kind < 0.3 and self._known:
            return self._random.choice(self._known)
        depth = self._random.choice((1, 1, 1, 1, 2, 2, 3))
        return "".join(f"/{self._random.choice(NAMES)}" for _ in range(depth))

    def _version(self) -> int:
        return self._random.choice((-1, -1, -1, -1, -1, -1, -1, 0, 0, 1, 2, -2))

    def _create_body(self, flag_choices: Sequence[int] = FLAGS) -> tuple[str, bytes]:
        path, data = self._path(), self._random.choice(DATA)
        entries = self._random.choice(ACLS)
        flags = self._random.choice(flag_choices)
        if flags in (2, 3) and self._random.random() < 0.2:
            path = self._random.choice(("/", "/a/", "//"))
        what = f"{path!r} flags={flags} acl={entries} data={None if data is None else len(data)}"
        return what, string(path) + buffer(data) + acl_list(entries) + struct.pack(">i", flags)

    def _create(self, session: int) -> Step:
        what, body = self._create_body()

        def read(answer: Answer) -> object:
            path = answer.string()
            self.learn(path)
            return path

        if self._random.random() < 0.5:
            return Step(session, f"create {what}", lambda client: client.ask(1, body, read))
        return Step(
            session,
            f"create2 {what}",
            lambda client: client.ask(15, body, lambda answer: (read(answer), answer.stat())),
        )

    def _delete(self, session: int) -> Step:
        path, version = self._path(), self._version()
        body = string(path) + struct.pack(">i", version)
        return Step(session, f"delete {path!r} {version}", lambda client: client.ask(2, body))

    def _set_data(self, session: int) -> Step:
        path, data, version = self._path(), self._random.choice(DATA), self._version()
        body = string(path) + buffer(data) + struct.pack(">i", version)
        return Step(session, f"set {path!r} {version}", lambda client: client.ask(5, body, Answer.stat))

    def _exists(self, session: int) -> Step:
        return self._read(session, "exists", 3, Answer.stat)

    def _get_data(self, session: int) -> Step:
        return self._read(session, "get", 4, lambda answer: (answer.buffer(), answer.stat()))

    def _get_children(self, session: int) -> Step:
        if self._random.random() < 0.5:
            return self._read(session, "children", 8, Answer.strings)
        return self._read(session, "children2", 12, lambda answer: (answer.strings(), answer.stat()))

    def _read(self, session: int, what: str, op: int, read: Callable[[Answer], object]) -> Step:
        path, watch = self._path(), self._random.random() < 0.8
        body = string(path) + bytes([watch])
        return Step(session, f"{what} {path!r} watch={watch}", lambda client: client.ask(op, body, read))

    def _multi(self, session: int) -> Step:
        whats, body = [], b""
        for _ in range(self._random.choice((0, 1, 2, 2, 3, 4))):
            what, kind, part = self._multi_part()
            whats.append(what)
            body += struct.pack(">i?i", kind, False, -1) + part
        body += struct.pack(">i?i", -1, True, -1)
        return Step(session, f"multi {whats}", lambda client: client.ask(14, body, Answer.multi))

    def _multi_part(self) -> tuple[str, int, bytes]:
        kind = self._random.choice((1, 1, 15, 2, 5, 13))
        if kind in (1, 15):
            what, body = self._create_body(MULTI_FLAGS)
            return f"create {what}", kind, body
        path, version = self._path(), self._version()
        data = buffer(self._random.choice(DATA)) if kind == 5 else b""
        return f"{kind} {path!r} {version}", kind, string(path) + data + struct.pack(">i", version)

    def _set_acl(self, session: int) -> Step:
        path, entries, version = self._path(), self._random.choice(ACLS), self._version()
        body = string(path) + acl_list(entries) + struct.pack(">i", version)
        return Step(session, f"set_acl {path!r} {entries} {version}", lambda client: client.ask(7, body, Answer.stat))

    def _get_acl(self, session: int) -> Step:
        path = self._path()
        read = lambda answer: (answer.acl(), answer.stat())  # noqa: E731
        return Step(session, f"get_acl {path!r}", lambda client: client.ask(6, string(path), read))

    def _sync(self, session: int) -> Step:
        path = self._path()
        return Step(session, f"sync {path!r}", lambda client: client.ask(9, string(path), Answer.string))

    def _authenticate(self, session: int) -> Step:
        credentials = self._random.choice(CREDENTIALS)
        body = struct.pack(">i", 0) + string("digest") + buffer(credentials)
        return Step(session, f"auth {credentials!r}", lambda client: client.ask(100, body))

    def _change_watches(self, session: int) -> Step:
        path, kind, op = self._path(), self._random.choice((1, 2, 3)), self._random.choice((17, 18))
        body = string(path) + struct.pack(">i", kind)
        what = "check_watches" if op == 17 else "remove_watches"
        return Step(session, f"{what} {path!r} {kind}", lambda client: client.ask(op, body))

    def _set_watches(self, session: int) -> Step:
        lists = [[self._path() for _ in range(self._random.randrange(4))] for _ in range(3)]
        back = self._random.choice((0, 1, 5, 20))

        def run(client: Client) -> object:
            body = struct.pack(">q", max(0, client.last_zxid - back)) + b"".join(map(strings, lists))
            return client.ask(101, body)

        return Step(session, f"set_watches {back} zxids back {lists}", run)

    def _ask_about(self, session: int) -> Step:
        path = self._path()
        return self._random.choice(
            (
                Step(session, f"ephemerals {path!r}", lambda client: client.ask(103, string(path), Answer.strings)),
                Step(session, f"count {path!r}", lambda client: client.ask(104, string(path), Answer.integer)),
                Step(session, "who_am_i", lambda client: client.ask(107, b"", Answer.pairs)),
            )
        )

    def _reconnect(self, session: int) -> Step:
        if self._random.random() < 0.2:
            return Step(session, "reconnect with a wrong password", Client.reconnect_with_wrong_password)
        return Step(session, "reconnect", Client.reconnect)

    def _end_session(self, session: int) -> Step:
        return Step(session, "close the session and open another", Client.end_session, unordered_events=True)


class Difference(AssertionError):
    """The two servers did not do the same."""


def compare(embedded_port: int, real_port: int, seed: int, operations: int) -> int:
    """Runs one seed against two empty servers; returns how many watch events came by it. Raises Difference."""
    servers = [Server("embedded", embedded_port, {}), Server("real", real_port, {})]
    generator, events = Generator(seed), 0
    shown: deque[str] = deque(maxlen=SHOWN_STEPS)
    clients: list[list[Client]] = []
    with contextlib.ExitStack() as stack:
        for server in servers:
            clients.append([Client(server) for _ in range(SESSIONS)])
            for client in clients[-1]:
                stack.callback(client.close)
        for number in range(operations):
            step = generator.step()
            shown.append(f"{number}: session {step.session}: {step.what}")
            outcomes = [_run(step, group) for group in clients]
            if outcomes[0] != outcomes[1]:
                steps = "\n".join(shown)
                raise Difference(f"seed {seed}\n{steps}\nembedded: {outcomes[0]}\nreal:     {outcomes[1]}")
            events += sum(map(len, outcomes[0][1]))
    return events


def _run(step: Step, clients: list[Client]) -> tuple[object, list[list[tuple[object, ...]]]]:
    result = step.run(clients[step.session])
    events = [client.take_events() for client in clients]
    if step.unordered_events:
        events = [sorted(each, key=repr) for each in events]
    return result, events


@contextlib.contextmanager
def fresh_servers() -> Iterator[tuple[int, int]]:
    """The ports of an empty embedded server and an empty real one."""
    from mprpc.embedded_zookeeper import EmbeddedZooKeeperServer
    from zookeeper_server import RealZooKeeper

    with EmbeddedZooKeeperServer(port=0, tick_ms=500) as embedded, RealZooKeeper() as real:
        yield embedded.port, real.port


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compares the embedded ZooKeeper with the real one.")
    parser.add_argument("--seeds", type=int, default=20, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--operations", type=int, default=2000, help="for each seed (default: %(default)s)")
    arguments = parser.parse_args(argv)
    from zookeeper_server import missing

    reason = missing()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        began = time.monotonic()
        try:
            with fresh_servers() as (embedded_port, real_port):
                events = compare(embedded_port, real_port, seed, arguments.operations)
        except Difference as difference:
            print(difference)
            return 1
        seconds = time.monotonic() - began
        print(f"seed {seed}: {arguments.operations} operations and {events} watch events equal, {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
