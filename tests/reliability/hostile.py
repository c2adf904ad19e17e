"""Peers that mean harm, one kind after the other: what a provider's other callers notice, and what it costs in memory.

The provider, the attackers (`python -m reliability.hostile`) and the others, an open loop of calls, are processes of
their own. Attackers run at the lowest priority: in earnest they are on machines of their own, here they must not take
the processor from those they attack.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import services
import wire
from mprpc import MprpcConfig, RpcProvider
from reliability.overload import OpenLoop, percentile
from reliability.report import Report

RATE = 400.0  # calls a second of the others
MEMORY = 96 << 20  # bytes that the provider may grow by
SLACK = 0.001  # seconds of p99 by which two measurements of a quiet machine differ
IDLE, ACTIVE = 10_000, 200  # connections
DESCRIPTORS, CLIENTS, RECOVERY = 512, 2000, 2.0
HEADER_MAX = 65_535

kinds = wire.rpcheader_pb2


def flood(frame: bytes, address: str, until: float) -> None:
    """As many of a tiny frame as the provider takes, on four connections; what comes back is read."""
    data = frame * max(1, 60_000 // len(frame))
    _pump(address, 4, until, lambda peer: data)


def loris(address: str, until: float) -> None:
    """300 connections that send a byte now and then."""
    data = wire.login(1, b"x" * 10_000)
    with contextlib.ExitStack() as stack:
        peers: dict[int, wire.Peer] = {}
        at = 0
        while time.monotonic() < until:
            for i in range(300):
                try:
                    if i not in peers:
                        peers[i] = stack.enter_context(wire.connect(address))
                    peers[i].send(data[at % len(data) : at % len(data) + 1])
                except OSError:
                    peers.pop(i, None)
            at += 1
            time.sleep(0.05)


def halves(address: str, until: float) -> None:
    """Half a frame on each of a thousand connections, and nothing more."""
    data = wire.login(1, b"x" * 1000)
    with contextlib.ExitStack() as stack:
        for i in range(1000):
            with contextlib.suppress(OSError):
                stack.enter_context(wire.connect(address)).send(data[: 1 + i % 900])
        time.sleep(max(0.0, until - time.monotonic()))


def metadata(address: str, until: float) -> None:
    """Headers as long as they may be, full of empty entries."""
    numbers = [0] * 4

    def requests(peer: int) -> bytes:
        numbers[peer] += 1
        header = wire.request(numbers[peer], *wire.LOGIN)[4:]
        header += b"\x52\x00" * ((HEADER_MAX - len(header)) // 2)
        return struct.pack("<I", len(header)) + header

    _pump(address, 4, until, requests)


def strange(address: str, until: float) -> None:
    """One connection after the other that begins, or goes on, with what breaks the protocol."""
    bad = [
        b"\xff\xff\xff\xff", struct.pack("<I", 65_536) + bytes(100), b"GET / HTTP/1.1\r\n\r\n",
        wire.request(1, *wire.LOGIN, args_size=2**32 - 1), wire.login(5) + wire.login(5), wire.login(5) + wire.login(4),
        wire.frame(kind=kinds.PING), b"\x02\x00\x00\x00\x1b\x00", wire.frame(b"x" * 65, kind=kinds.PING, call_id=1),
    ]  # fmt: skip
    while time.monotonic() < until:
        for data in bad:
            with contextlib.suppress(OSError), wire.connect(address) as peer:
                peer.send(data)
                peer.rest()


def never_reads(address: str, until: float) -> None:
    """Twenty connections that ask for 40 kB again and again and read nothing."""
    with contextlib.ExitStack() as stack:
        threads = []
        for _ in range(20):
            peer = stack.enter_context(wire.connect(address, SO_RCVBUF=4096))
            data = b"".join(wire.login(number, b"x" * 40_000) for number in range(1, 200))
            threads.append(threading.Thread(target=_send, args=(peer, data), daemon=True))
            threads[-1].start()
        time.sleep(max(0.0, until - time.monotonic()))
        os._exit(0)  # the senders are stuck, which is the point


def connects(address: str, until: float) -> None:
    """3,000 connections at once, which are closed and made again."""
    host, _, port = address.partition(":")
    while time.monotonic() < until:
        with contextlib.ExitStack() as stack:
            for _ in range(3000):
                made = stack.enter_context(contextlib.closing(socket.socket()))
                made.setblocking(False)
                made.connect_ex((host, int(port)))
            time.sleep(0.5)


def noise(address: str, until: float) -> None:
    """Random bytes, and frames in which some were changed."""
    generator = random.Random(7)
    while time.monotonic() < until:
        data = bytearray(wire.login(1) + wire.frame(kind=kinds.PING, call_id=2) + wire.login(3))
        for _ in range(generator.randrange(1, 6)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        with contextlib.suppress(OSError), wire.connect(address) as peer:
            peer.send(bytes(data) if generator.random() < 0.7 else generator.randbytes(200))
            peer.socket.settimeout(0.02)
            peer.rest()


ATTACKS: dict[str, Callable[[str, float], None]] = {
    "tiny cancels": lambda address, until: flood(wire.frame(kind=kinds.CANCEL, call_id=1), address, until),
    "tiny responses": lambda address, until: flood(wire.response(1), address, until),
    "tiny unknown kinds": lambda address, until: flood(wire.frame(kind=200, call_id=1), address, until),
    "tiny refused kinds": lambda address, until: flood(wire.frame(kind=20, call_id=1), address, until),
    "tiny pings": lambda address, until: flood(wire.frame(kind=kinds.PING, call_id=1), address, until),
    "slow loris": loris,
    "half frames": halves,
    "32,000 metadata entries": metadata,
    "broken protocol": strange,
    "noise": noise,
    "never reads": never_reads,
    "3,000 connects": connects,
}


def _send(peer: wire.Peer, data: bytes) -> None:
    with contextlib.suppress(OSError):
        peer.send(data)


def _pump(address: str, connections: int, until: float, make: Callable[[int], bytes]) -> None:
    """Writes what `make` gives for each connection, and reads what comes back, as fast as it goes."""
    selector = selectors.DefaultSelector()
    host, _, port = address.partition(":")
    waiting: dict[int, bytes] = {}
    for i in range(connections):
        made = socket.create_connection((host, int(port)))
        made.setblocking(False)
        selector.register(made, selectors.EVENT_READ | selectors.EVENT_WRITE, i)
    while time.monotonic() < until and selector.get_map():
        for key, events in selector.select(0.1):
            made, i = key.fileobj, key.data
            assert isinstance(made, socket.socket)
            try:
                if events & selectors.EVENT_READ and not made.recv(1 << 20):
                    raise ConnectionError
                if events & selectors.EVENT_WRITE:
                    data = waiting.get(i) or make(i)
                    waiting[i] = data[made.send(data) :]
            except BlockingIOError:
                continue
            except OSError:
                selector.unregister(made)
                made.close()
    for key in list(selector.get_map().values()):
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()
    selector.close()


def hold(address: str, count: int) -> None:
    """So many connections that have called once, until standard input ends."""
    with contextlib.ExitStack() as stack:
        made = 0
        for _ in range(count):
            with contextlib.suppress(OSError, EOFError):
                peer = stack.enter_context(wire.connect(address))
                peer.send(wire.login(1))
                peer.socket.settimeout(5.0)
                peer.frame()
                made += 1
        print(made, flush=True)
        sys.stdin.readline()


class Process:
    """`python -c` with the tests' modules at hand; its lines are read as they come."""

    def __init__(self, program: str) -> None:
        tests = Path(__file__).resolve().parent.parent
        path = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests.parent)!r}]\nfrom reliability import hostile\n"
        self._process = subprocess.Popen(
            [sys.executable, "-c", path + program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def memory(self) -> int:
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def end(self) -> None:
        try:
            self._process.communicate("\n", timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve(descriptors: int, keys: dict[str, Any]) -> None:
    """Serves, and tells its incidents for each line that it reads, until an empty one."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    provider = RpcProvider(MprpcConfig(**keys))
    provider.notify_service(services.Users())
    with provider:
        print(provider.address, flush=True)
        while sys.stdin.readline().strip():
            print(json.dumps({name: n for name, n in provider.incidents().items() if n}), flush=True)


@contextlib.contextmanager
def provider(descriptors: int, **keys: Any) -> Iterator[tuple[Process, str]]:
    made = Process(f"hostile.serve({descriptors}, {keys!r})")
    try:
        yield made, made.line()
        made.end()
    finally:
        made.kill()


def attack(name: str, address: str, seconds: float) -> None:
    os.nice(19)
    print("ready", flush=True)
    with contextlib.suppress(OSError):
        ATTACKS[name](address, time.monotonic() + seconds)


def hostile(*, seed: int, count: int, minutes: float) -> int:
    """`count`: seconds of each attack."""
    report = Report(f"a dozen attacks, {count} s each; {IDLE} idle connections; no descriptors", seed)
    _attacks(report, count)
    _idle(report, count)
    _descriptors(report)
    return report.finish()


def _attacks(report: Report, seconds: int, attacks: tuple[str, ...] = tuple(ATTACKS)) -> None:
    """Each also at a provider that nobody else uses: what the others notice then is the machine, which all share."""
    keys = {"frame_timeout": 2.0, "max_connections": 4000}
    with provider(10_000, **keys) as (served, address), provider(10_000, **keys) as (_, elsewhere):
        others = OpenLoop(address)
        others.run(RATE, 1.0)
        start = served.memory()
        for name in attacks:
            before = _p99(others, seconds / 2)
            machine = _attacked(others, name, elsewhere, seconds)
            during = _attacked(others, name, address, seconds)
            grown = served.memory() - start
            after = _p99(others, seconds / 2)
            calm = max(before, after, machine)
            served.say("incidents")
            report.progress(f"{name}: {served.line()}")
            report.row(
                name,
                f"p99 of the others {1000 * during:.2f} ms, before and after {1000 * before:.2f} and"
                f" {1000 * after:.2f} ms, the same at another provider {1000 * machine:.2f} ms;"
                f" {grown / (1 << 20):+.0f} MB",
            )
            if during > 2 * calm + SLACK:
                report.breach(f"{name}: p99 rose from {1000 * calm:.2f} to {1000 * during:.2f} ms")
            if grown > MEMORY:
                report.breach(f"{name}: the provider grew by {grown >> 20} MB")
        others.close()


def _attacked(others: OpenLoop, name: str, address: str, seconds: float) -> float:
    """The others' p99 while that address is attacked."""
    attacker = Process(f"hostile.attack({name!r}, {address!r}, {seconds + 1})")
    attacker.line()
    during = _p99(others, seconds)
    attacker.kill()
    return during


def _p99(others: OpenLoop, seconds: float) -> float:
    answers = others.run(RATE, seconds)
    return percentile([each.seconds if each.status == 0 else 9.999 for each in answers], 99)


def _idle(report: Report, seconds: int, idle: int = IDLE, active: int = ACTIVE) -> None:
    with provider(min(4 * idle, resource.getrlimit(resource.RLIMIT_NOFILE)[1]), max_connections=2 * idle) as (
        served,
        address,
    ):
        others = OpenLoop(address, active)
        others.run(RATE, 1.0)
        start, before = served.memory(), _p99(others, seconds)
        holders = [Process(f"hostile.hold({address!r}, {idle // 2})") for _ in range(2)]
        made = sum(int(holder.line()) for holder in holders)
        during, grown = _p99(others, seconds), served.memory() - start
        for holder in holders:
            holder.end()
        others.close()
        each = grown / max(made, 1) / 1024
        report.row(
            f"{made} idle connections, {active} active",
            f"p99 {1000 * during:.2f} ms, without them {1000 * before:.2f} ms; {each:.1f} kB each",
        )
        if made < idle:
            report.breach(f"only {made} of {idle} connections could be made")
        if during > 2 * before + SLACK:
            report.breach(f"{made} idle connections: p99 rose from {1000 * before:.2f} to {1000 * during:.2f} ms")


def _descriptors(report: Report, limit: int = DESCRIPTORS, clients: int = CLIENTS) -> None:
    with provider(limit) as (served, address):
        crowd = [Process(f"hostile.hold({address!r}, {clients // 2})") for _ in range(2)]
        made = sum(int(each.line()) for each in crowd)
        served.say("incidents")
        refused = json.loads(served.line()).get("no_descriptor", 0)
        for each in crowd:
            each.kill()
        began = time.monotonic()
        while not _answers(address) and time.monotonic() < began + 10 * RECOVERY:
            time.sleep(0.01)
        took = time.monotonic() - began
        report.row(
            f"{clients} clients, {limit} descriptors",
            f"{made} were served, {refused} refused; all well {took:.2f} s after they went",
        )
        if made > limit or refused < clients - limit:
            report.breach(f"{made} of {clients} clients served and {refused} refused with {limit} descriptors")
        if took > RECOVERY:
            report.breach(f"it took {took:.2f} s until a new caller was served")


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError, EOFError), wire.connect(address) as peer:
        peer.socket.settimeout(1.0)
        peer.send(wire.login(1))
        return peer.frame()[0].status == 0
    return False
