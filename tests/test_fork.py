"""Forks: a child makes its own connections, and neither hangs nor disturbs its parent. Real processes throughout.

Each program runs with `-X dev -W error`; what it writes to standard error is a failure.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import services

PATIENCE = 120.0  # seconds for a program; most take one, on a machine that does nothing else

# What the programs have in common. A child that hangs is ended by its own alarm, and is told by its code.
PREAMBLE = """
import faulthandler, os, signal, socket, subprocess, sys, threading, time, warnings
from concurrent.futures import Future
warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 warns of forks beside threads, which is what this is about
import mprpc, services
from mprpc import MprpcChannel, MprpcConfig, RpcProvider
from services import LoginRequest, LoginResponse, REQUEST, Users, calling, serving, user_mprpc

def stub(channel):
    return user_mprpc.UserServiceRpc_Stub(channel)

def forked(child, exit=os._exit):
    pid = os.fork()
    if pid:
        return pid
    faulthandler.dump_traceback_later(20, exit=True)
    try:
        child()
        faulthandler.cancel_dump_traceback_later()
    except BaseException:
        import traceback
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    exit(0)

def code_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def connections(provider):
    from mprpc._native import ffi, lib
    told = ffi.new("struct mprpc_loop_statistics *")
    lib.mprpc_loop_statistics(provider._loops[0].handle, told)
    return told.accepted, told.connections

def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
"""


def run(program: str, *arguments: str, silent: bool = True) -> str:
    """What the program prints; it must end by itself, with code 0 and nothing on standard error."""
    with services.start_python(PREAMBLE + program, *arguments) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # the traceback of each thread: -X dev enables the fault handler
            out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, f"code {process.returncode}\n{out}\n{err}"
    assert err == "" or not silent, err
    return out


def test_a_child_uses_its_parents_channel_on_a_connection_of_its_own() -> None:
    """Blocking and as a future, in children that end at once and in those that end the interpreter's way."""
    run("""
with serving() as provider, MprpcChannel(provider.address) as channel:
    users = stub(channel)

    def child():
        assert users.Login(REQUEST).success
        assert users.Login.future(REQUEST).result(10).success

    assert users.Login(REQUEST).success and users.Login.future(REQUEST).result().success
    for number in range(6):
        assert code_of(forked(child, os._exit if number % 2 else sys.exit)) == 0
        assert users.Login(REQUEST).success and users.Login.future(REQUEST).result().success
    until(lambda: connections(provider) == (7, 1))
""")


def test_forks_beside_threads_that_call() -> None:
    """Whatever the parent's threads are in the middle of, the child must not wait for it."""
    run("""
ended = threading.Event()
calls = []

def caller(users, number):
    count = 0
    while not ended.is_set():
        if number % 2:
            assert users.Login(REQUEST).success
        else:
            assert all(each.result().success for each in [users.Login.future(REQUEST) for _ in range(8)])
        count += 1
    calls.append(count)

with serving(loops=2) as provider, MprpcChannel(provider.address, timeout=30.0) as channel:
    users = stub(channel)
    threads = [threading.Thread(target=caller, args=(users, number)) for number in range(4)]
    for thread in threads:
        thread.start()

    def child():
        assert users.Login(REQUEST).success
        assert users.Login.future(REQUEST).result(10).success
        channel.close()
        provider.stop()

    for _ in range(40):
        assert code_of(forked(child)) == 0
    ended.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 4 and min(calls) > 0
""")


def test_a_future_of_the_parents_has_failed_in_the_child() -> None:
    run("""
release = threading.Event()

def login(request, controller):
    answer = Future()
    threading.Thread(target=lambda: (release.wait(20), answer.set_result(LoginResponse(success=True)))).start()
    return answer

with serving(login) as provider, calling(provider) as users:
    called = []
    future = users.Login.future(REQUEST)
    future.add_done_callback(called.append)
    until(lambda: connections(provider)[0] == 1)

    def child():
        error = future.exception(10)
        assert isinstance(error, mprpc.Unavailable) and "before a fork" in str(error), error
        assert not future.cancel() and not called

    assert code_of(forked(child)) == 0
    release.set()
    assert future.result().success and called == [future]
""")


def test_asyncio_in_parent_and_child() -> None:
    """The parent's event loop sits in its poller, with a call in flight, while another thread forks."""
    run("""
import asyncio
from mprpc import AsyncMprpcChannel

release = threading.Event()

async def slowly():
    while not release.is_set():
        await asyncio.sleep(0.005)
    return LoginResponse(success=True)

def login(request, controller):
    return slowly() if request.name == b"slow" else LoginResponse(success=True)

with serving(login) as provider:
    async def main():
        async with AsyncMprpcChannel(provider.address) as channel:
            users = user_mprpc.UserServiceRpc_AsyncStub(channel)
            slow = asyncio.ensure_future(users.Login(LoginRequest(name=b"slow"), timeout=30.0))
            assert (await users.Login(REQUEST)).success

            async def once():
                assert (await users.Login(REQUEST)).success

            def child():
                asyncio.run(once())

            for _ in range(3):
                forking = asyncio.get_running_loop().run_in_executor(None, lambda: code_of(forked(child)))
                assert await asyncio.wait_for(forking, 30) == 0
                assert (await users.Login(REQUEST)).success
            release.set()
            assert (await slow).success

    asyncio.run(main())
""")


def test_a_handler_that_forks() -> None:
    """Its child lives on: neither the provider's port nor its connections stay open for it."""
    run("""
children = []

def login(request, controller):
    if request.name == b"fork":
        children.append(forked(lambda: time.sleep(15)))
    return LoginResponse(success=True)

provider = RpcProvider(MprpcConfig())
provider.notify_service(Users(login))
provider.start()
host, _, port = provider.address.rpartition(":")
with calling(provider) as users, socket.create_connection((host, int(port))) as idle:
    assert users.Login(LoginRequest(name=b"fork")).success
    assert users.Login(REQUEST).success
    until(lambda: connections(provider)[1] == 2)
    provider.stop(0.5)
    idle.settimeout(5)
    try:
        assert idle.recv(1) == b""
    except ConnectionResetError:
        pass
    try:
        socket.create_connection((host, int(port)), 5)
        raise AssertionError("somebody listens")
    except ConnectionRefusedError:
        pass
with serving(rpcserverport=int(port)) as again, calling(again) as users:
    assert users.Login(REQUEST).success
os.kill(children[0], signal.SIGKILL)
code_of(children[0])
""")


def test_a_child_that_comes_back_from_its_handler_serves_nobody(tmp_path: Path) -> None:
    """The requests behind it came in the same turn: each runs once, in the parent, and has one answer."""
    run(
        """
import wire
noted = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
children = []

def login(request, controller):
    os.write(noted, request.name + b" ")
    if request.name == b"0":
        pid = os.fork()
        if pid:
            children.append(pid)
        else:
            signal.alarm(20)
    return LoginResponse(success=True)

with serving(login) as provider:
    host, _, port = provider.address.rpartition(":")
    with socket.create_connection((host, int(port))) as caller:
        for round in range(5):
            calls = [(round * 20 + number + 1, LoginRequest(name=b"%d" % number)) for number in range(20)]
            frames = b"".join(wire.request(i, *wire.LOGIN, request.SerializeToString()) for i, request in calls)
            caller.sendall(frames)
            answers = b""
            caller.settimeout(10)
            while answers.count(LoginResponse(success=True).SerializeToString()) < 20:
                assert (received := caller.recv(65536))
                answers += received
            assert code_of(children.pop()) == 0
os.close(noted)
""",
        str(tmp_path / "noted"),
    )
    noted = (tmp_path / "noted").read_text().split()
    assert sorted(noted, key=int) == sorted([str(number) for number in range(20)] * 5, key=int)


def test_a_handlers_child_is_bound_by_no_deadline_of_the_handler() -> None:
    run("""
with serving() as behind, calling(behind) as users:
    children = []

    def login(request, controller):
        def child():
            time.sleep(0.5)
            assert users.Login(REQUEST).success
        children.append(forked(child))
        return LoginResponse(success=True)

    with serving(login) as provider, calling(provider, timeout=0.3) as front:
        assert front.Login(REQUEST).success
        assert code_of(children[0]) == 0
""")


def test_a_running_providers_child_can_be_ended() -> None:
    """A signal for the child used to wake the parent, by the descriptor that both have, and nothing else."""
    run("""
import multiprocessing
context = multiprocessing.get_context("fork")
ended = []

def login(request, controller):
    process = context.Process(target=time.sleep, args=(60,))
    process.start()
    process.terminate()
    process.join(20)
    ended.append(process.exitcode)
    process.close()
    return LoginResponse(success=True)

provider = RpcProvider(MprpcConfig())
provider.notify_service(Users(login))
provider.start()

def call():
    with calling(provider) as users:
        for _ in range(2):
            assert users.Login(REQUEST, timeout=30.0).success
    assert ended == [-signal.SIGTERM] * 2, ended
    provider.stop()

thread = threading.Thread(target=call)
thread.start()
provider.run()
thread.join()
assert len(ended) == 2
""")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    """Pool and Process, while the parent goes on calling."""
    program = f"""
import multiprocessing, os, sys, warnings
sys.path[:0] = {sys.path!r}
warnings.simplefilter("ignore", DeprecationWarning)
import services

address = sys.argv[1] if len(sys.argv) > 1 else ""
channel = users = None

def call(number):
    global channel, users
    if channel is None:
        channel = services.MprpcChannel(os.environ["ADDRESS"])
        users = services.user_mprpc.UserServiceRpc_Stub(channel)
    assert users.Login(services.REQUEST, timeout=20.0).success
    return users.Login.future(services.REQUEST).result(20).success

def main():
    global channel
    import threading
    ended = threading.Event()
    with services.serving() as provider:
        os.environ["ADDRESS"] = provider.address
        assert call(0)
        failed = []

        def caller():
            while not ended.is_set():
                call(0) or failed.append(1)

        thread = threading.Thread(target=caller)
        thread.start()
        try:
            context = multiprocessing.get_context({method!r})
            with context.Pool(2) as pool:
                assert pool.map(call, range(10), chunksize=1) == [True] * 10
                pool.close()
                pool.join()
            process = context.Process(target=call, args=(1,))
            process.start()
            process.join(30)
            assert process.exitcode == 0
            process.close()
        finally:
            ended.set()
            thread.join()
        assert not failed
        channel.close()

if __name__ == "__main__":
    main()
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-X", "dev", "-W", "error", str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_that_a_handler_starts_inherits_nothing() -> None:
    """Not one descriptor, though the handler asks for all that are inheritable."""
    out = run("""
listing = "import os; fd = '/proc/self/fd/'; print([os.readlink(fd + n) for n in os.listdir(fd)[3:-1]])"

def login(request, controller):
    done = subprocess.run([sys.executable, "-c", listing], close_fds=False, capture_output=True, text=True, timeout=30)
    return LoginResponse(result=services.user_pb2.ResultCode(errmsg=(done.stdout + done.stderr).encode()))

from mprpc.embedded_zookeeper import EmbeddedZooKeeperServer
with EmbeddedZooKeeperServer(port=0) as server:
    provider = RpcProvider(MprpcConfig(zookeeperip=server.address, loops=2))
    provider.notify_service(Users(login))
    with provider, MprpcChannel(MprpcConfig(zookeeperip=server.address)) as channel:
        assert provider.wait_registered(20)
        users = stub(channel)
        print(users.Login(REQUEST, timeout=30.0).result.errmsg.decode())
        print(users.Login.future(REQUEST, timeout=30.0).result().result.errmsg.decode())
""")
    listings = [line for line in out.splitlines() if line]
    assert len(listings) == 2
    assert listings == ["[]", "[]"]


def test_discovery_in_parent_and_child() -> None:
    """The parent's session and nodes outlive its children; the embedded server's port is not theirs."""
    run("""
from mprpc.embedded_zookeeper import EmbeddedZooKeeperServer
server = EmbeddedZooKeeperServer(port=0)
server.start()
config = MprpcConfig(zookeeperip=server.address)
provider = RpcProvider(config)
provider.notify_service(Users())
with provider, MprpcChannel(config) as channel:
    assert provider.wait_registered(20)
    users = stub(channel)
    assert users.Login(REQUEST).success
    sessions = [each.id for each in server._keeper.sessions]

    def child():
        assert users.Login(REQUEST, timeout=20.0).success
        provider.stop()

    for exit in (os._exit, sys.exit):
        assert code_of(forked(child, exit)) == 0
        assert provider.wait_registered(0) and users.Login(REQUEST).success
    assert sessions[0] in [each.id for each in server._keeper.sessions]
    living = forked(lambda: time.sleep(15))
server.stop()
try:
    socket.create_connection((server.host, server.port), 5)
    raise AssertionError("somebody listens")
except ConnectionRefusedError:
    os.kill(living, signal.SIGKILL)
    code_of(living)
""")
