"""The end of a process: at once, bounded, and clean, whatever is in flight. Real processes throughout.

Each program runs with `-X dev -W error`; what it writes to standard error beside what is expected is a failure.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import generated
import services
from zookeeper_server import free_ports

PATIENCE = 30.0  # seconds for what takes one, on a machine that is busy
AT_ONCE = 10.0  # seconds, on such a machine, for what takes a tenth; what is waited for in vain takes a minute
ROOT = generated.ROOT

PREAMBLE = """
import asyncio, os, signal, sys, threading, time
from concurrent.futures import Future
import mprpc, services
from mprpc import AsyncMprpcChannel, MprpcChannel, MprpcConfig, RpcProvider
from mprpc.testing import EmbeddedZooKeeper
from services import LoginRequest, LoginResponse, REQUEST, Users, user_mprpc
from mprpc.embedded_zookeeper import Clock

def stub(channel):
    return user_mprpc.UserServiceRpc_Stub(channel)

def say(text):  # in one piece: another thread may say something at the same time
    os.write(1, text.encode() + b"\\n")

def never(request, controller):
    say("in flight")
    return Future()

def provider_of(login=services.accept, **keys):
    provider = RpcProvider(MprpcConfig(**keys))
    provider.notify_service(Users(login))
    provider.start()
    return provider
"""

CALLS = {
    "blocking": "stub(channel).Login(REQUEST, timeout=60.0)",
    "future": "stub(channel).Login.future(REQUEST, timeout=60.0).result()",
    "many threads": """
for _ in range(4):
    threading.Thread(target=lambda: stub(channel).Login(REQUEST, timeout=60.0), daemon=True).start()
stub(channel).Login(REQUEST, timeout=60.0)""",
    "asyncio": """
async def main():
    channel = AsyncMprpcChannel(provider.address)
    users = user_mprpc.UserServiceRpc_AsyncStub(channel)
    await asyncio.gather(*(users.Login(REQUEST, timeout=60.0) for _ in range(4)))
asyncio.run(main())""",
}


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[str]]:
    with services.start_python(PREAMBLE + program) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == text:
            return
    raise AssertionError(f"it ended without {text!r}: {process.communicate()[1]}")


def end_of(process: subprocess.Popen[str], within: float = AT_ONCE) -> str:
    """What it wrote to standard error; it has so many seconds from now on to end."""
    began = time.monotonic()
    _, error = process.communicate(timeout=PATIENCE)
    took = time.monotonic() - began
    assert took < within, f"{took:.1f} s: {error}"
    return error


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_ends_a_consumer_with_calls_in_flight(call: str) -> None:
    """At once, though nothing is ever closed: the traceback of the KeyboardInterrupt, and nothing behind it."""
    program = f"provider = provider_of(never)\nchannel = MprpcChannel(provider.address)\n{CALLS[call]}\n"
    with running(program) as process:
        read_until(process, "in flight")
        process.send_signal(signal.SIGINT)
        error = end_of(process)
        assert process.returncode == -signal.SIGINT
    assert error.count("Traceback") == (2 if call == "asyncio" and sys.version_info >= (3, 11) else 1), error
    assert error.strip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_provider_with_calls_in_flight(number: int) -> None:
    """They get their time; a second signal takes it from them."""
    program = """
def never_once_it_runs(request, controller):
    while signal.getsignal(signal.SIGTERM) == signal.SIG_DFL or signal.getsignal(signal.SIGINT) == before:
        threading.Event().wait(0.001)
    return never(request, controller)

before = signal.getsignal(signal.SIGINT)
provider = provider_of(never_once_it_runs, drain_timeout=60)
call = stub(MprpcChannel(provider.address)).Login.future(REQUEST, timeout=60.0)
say("running")
provider.run()
assert isinstance(call.exception(5), mprpc.Unavailable)
"""
    with running(program) as process:
        read_until(process, "in flight")
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(number)
        assert end_of(process) == ""
        assert process.returncode == 0


LEFT_OPEN = """
server = EmbeddedZooKeeper(clock=Clock())
server.start()
config = MprpcConfig(zookeeperip=server.hosts)
provider = RpcProvider(config)
def login(request, controller):
    return Future() if request.name == b"never" else LoginResponse(success=True)
provider.notify_service(Users(login))
provider.start()
assert provider.wait_registered(20)
channel = MprpcChannel(config)
assert stub(channel).Login(REQUEST, timeout=20.0).success
assert stub(channel).Login.future(REQUEST, timeout=20.0).result().success
pending = [stub(channel).Login.future(LoginRequest(name=b"never"), timeout=60.0) for _ in range(10)]

async def main():
    users = user_mprpc.UserServiceRpc_AsyncStub(AsyncMprpcChannel(config))
    assert (await users.Login(REQUEST, timeout=20.0)).success

asyncio.run(main())
say("open")
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise SystemExit", 0),
        ("server.stop()", 0),
        ("held = server.stalled(); held.__enter__()", 0),
    ],
    ids=["falls off", "sys.exit", "SystemExit", "zookeeper down", "zookeeper silent"],
)
def test_nothing_that_is_left_open_keeps_the_process(end: str, code: int) -> None:
    """A provider, registrations, a channel, futures in flight, an event loop's connections: none is closed."""
    with running(LEFT_OPEN + end) as process:
        read_until(process, "open")
        assert end_of(process) == ""
        assert process.returncode == code


def test_an_uncaught_exception_ends_it_as_well() -> None:
    with running(LEFT_OPEN + "raise LookupError('the end')") as process:
        read_until(process, "open")
        error = end_of(process)
        assert process.returncode == 1
    assert error.startswith("Traceback")
    assert error.strip().endswith("LookupError: the end")


@pytest.mark.parametrize("how", ["up", "silent", "down"])
def test_stop_and_close_are_bounded(how: str) -> None:
    """And leave no thread and no descriptor, however ZooKeeper is."""
    trouble = {"up": "", "silent": "held = server.stalled(); held.__enter__()", "down": "server.stop()"}[how]
    relief = {"up": "", "silent": "held.__exit__(None, None, None)", "down": "server.start()"}[how]
    program = f"""
def left():
    return len(os.listdir("/proc/self/fd")), threading.active_count()

def cycle(trouble, relief):
    provider = RpcProvider(config)
    provider.notify_service(Users(services.accept))
    provider.start()
    assert provider.wait_registered(20)
    channel = MprpcChannel(config)
    assert stub(channel).Login(REQUEST, timeout=20.0).success
    assert stub(channel).Login.future(REQUEST, timeout=20.0).result().success
    trouble()
    began = time.monotonic()
    provider.stop()
    stopped = time.monotonic() - began
    channel.close()
    closed = time.monotonic() - began - stopped
    assert stopped < 5.0 and closed < 6.0, (stopped, closed)
    relief()

def settled(expected=None):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        import gc
        gc.collect()
        now = left()
        if now == expected or (expected is None and not server.sessions() and now[1] == 2):
            return now
        time.sleep(0.01)
    return left(), threading.enumerate(), os.listdir("/proc/self/fd")

def trouble():
    global held
    {trouble or "pass"}

def relief():
    {relief or "pass"}

server = EmbeddedZooKeeper(clock=Clock())
server.start()
config = MprpcConfig(zookeeperip=server.hosts, drain_timeout=2.0, session_timeout=1.0)
cycle(lambda: None, lambda: None)
expected = settled()
cycle(trouble, relief)
assert settled(expected) == expected, (expected, settled(expected))
server.stop()
say("closed")
"""
    with running(program) as process:
        read_until(process, "closed")
        assert end_of(process) == ""
        assert process.returncode == 0


# ---- the example programs ----


@contextmanager
def program(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """One of bin/, without the step into the checkout's .venv, with warnings as errors."""
    path = os.pathsep.join((str(ROOT), str(generated.directory())))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "bin" / name), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def waiting(name: str, tmp_path: Path, keys: str) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """One of bin/ that waits for a server which never answers, and what it has said to it. `keys`: its configuration,
    with `{port}` for that server's."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        conf = tmp_path / "test.conf"
        conf.write_text(keys.format(port=silent.getsockname()[1]))
        with program(name, "-i", str(conf)) as process:
            silent.settimeout(PATIENCE)
            connection, _ = silent.accept()
            with connection:
                connection.settimeout(PATIENCE)
                yield process, connection.recv(4)


def test_ctrl_c_ends_the_consumer(tmp_path: Path) -> None:
    """Which waits for a provider: 130, as a shell expects, and not a word."""
    with waiting("consumer", tmp_path, "rpcserverport={port}\ncall_timeout=60\n") as (process, said):
        assert said
        process.send_signal(signal.SIGINT)
        assert end_of(process) == ""
        assert process.returncode == 130


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_the_provider(tmp_path: Path, workers: int) -> None:
    """0: it was asked to end, and did. No traceback and no warning, from whichever process."""
    port, zookeeper = free_ports(2)
    conf = tmp_path / "test.conf"
    conf.write_text(
        f"rpcserverport={port}\nzookeeperip=127.0.0.1\nzookeeperport={zookeeper}\nzookeeper=embedded\nworkers={workers}\n"
    )
    with program("provider", "-i", str(conf)) as process:
        assert process.stderr is not None
        lines: list[str] = []
        while sum("registered: fixbug" in line for line in lines) < workers:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        process.send_signal(signal.SIGINT)
        error = "".join(lines) + end_of(process)
        assert process.returncode == 0
    assert not [line for line in error.splitlines() if "=>[info] " not in line], error


def test_ctrl_c_ends_a_provider_that_starts(tmp_path: Path) -> None:
    """It looks whether there is a ZooKeeper already, and waits for its word."""
    keys = "zookeeperip=127.0.0.1\nzookeeperport={port}\nzookeeper=embedded\n"
    with waiting("provider", tmp_path, keys) as (process, said):
        assert said == b"srvr"
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in end_of(process)
        assert process.returncode == 130
