"""The asyncio face over real sockets: many tasks, many event loops, cancelling, deadlines, bounds, and its silence."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import held
import services
import wire
from held import named
from mprpc import (
    AsyncMprpcChannel,
    DeadlineExceeded,
    MprpcConfig,
    MprpcController,
    NotFound,
    ResourceExhausted,
    Status,
    Unavailable,
)
from mprpc.testing import EmbeddedZooKeeper
from services import REQUEST

PATIENCE = wire.PATIENCE
LONG = 60.0
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def run_asyncio(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(main, debug=True)


def run_uvloop(main: Coroutine[Any, Any, Any]) -> Any:
    loop = importlib.import_module("uvloop").new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.fixture(params=[run_asyncio, run_uvloop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine to its end, in both kinds of event loops."""
    if request.param is run_uvloop:
        pytest.importorskip("uvloop", reason="pip install uvloop")
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _silent(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio complains in its log: of tasks that were destroyed, of exceptions that nobody heard of."""
    yield
    gc.collect()
    said = [each.getMessage() for each in caplog.get_records("call") if each.name == "asyncio"]
    assert not [each for each in said if "Executing" not in each and "poll" not in each], said


@contextlib.asynccontextmanager
async def calling(target: Any, **options: Any) -> AsyncIterator[Any]:
    address = target if isinstance(target, (str, MprpcConfig)) else target.address
    async with AsyncMprpcChannel(address, **options) as channel:
        stub = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
        stub.channel = channel
        yield stub


def config_of(provider: Any, **keys: Any) -> MprpcConfig:
    host, _, port = provider.address.rpartition(":")
    return MprpcConfig(rpcserverip=host, rpcserverport=int(port), **keys)


async def taken(holder: held.Held, count: int = 1) -> None:
    await asyncio.get_running_loop().run_in_executor(None, holder.taken, count)


async def cancelled(holder: held.Held, count: int = 1) -> None:
    await asyncio.get_running_loop().run_in_executor(None, holder.cancelled, count)


def said(response: Any) -> bytes:
    return bytes(response.result.errmsg)


async def logins(users: Any, names: list[str], **options: Any) -> list[bytes]:
    return [said(each) for each in await asyncio.gather(*(users.Login(named(name), **options) for name in names))]


# ---- calls ----


def test_one_call_and_many(run: Run) -> None:
    async def main() -> None:
        async with calling(provider) as users:
            assert said(await users.Login(named("one"))) == b"one"
            names = [f"name {i}" for i in range(3000)]
            assert await logins(users, names) == [name.encode() for name in names]

    with services.serving(loops=2) as provider:
        run(main())


def test_a_failure_is_raised_or_with_a_controller_told(run: Run) -> None:
    async def main() -> None:
        async with calling(provider) as users:
            for _ in range(2):
                with pytest.raises(NotFound, match="fail: nobody"):
                    await users.Login(named("fail: nobody"))
            controller = MprpcController()
            assert await users.Login(named("fail"), controller=controller) == services.LoginResponse()
            assert (controller.status, controller.peer) == (Status.NOT_FOUND, provider.address)
            assert said(await users.Login(named("a"), controller=controller)) == b"a"
            assert not controller.failed()
            with pytest.raises(TypeError, match=r"takes a fixbug\.LoginRequest"):
                await users.Login(services.user_pb2.RegisterRequest())

    with services.serving(held.Held()) as provider:
        run(main())


def test_large_answers_and_requests_that_no_socket_buffer_holds(run: Run) -> None:
    async def main() -> None:
        async with calling(provider, timeout=LONG) as users:
            names = ["x", "y" * 10_000_000, *(str(i) * 2_000_000 for i in range(8)), "z" * 8193]
            assert await logins(users, names) == [name.encode() for name in names]

    with services.serving() as provider:
        run(main())


def test_a_request_over_the_limit(run: Run) -> None:
    async def main() -> None:
        async with calling(config_of(provider, max_payload=100)) as users:
            with pytest.raises(ResourceExhausted, match="max_payload"):
                await users.Login(named("x" * 200))
            assert said(await users.Login(named("small"))) == b"small"

    with services.serving() as provider:
        run(main())


def test_the_seed_s_dialect_goes_through_the_executor(run: Run) -> None:
    async def main() -> None:
        async with calling(provider, dialect="classic") as users:
            names = [str(i) for i in range(30)]
            assert await logins(users, names) == [name.encode() for name in names]
            slow = [asyncio.ensure_future(users.Login(named("hold"), timeout=LONG)) for _ in range(40)]
            with pytest.raises(DeadlineExceeded):  # also where the executor's threads are all taken
                await users.Login(named("hold"), timeout=0.1)
            assert not any(each.done() for each in slow)
            await users.channel.close()
            await asyncio.wait(slow)
            assert {type(each.exception()) for each in slow} == {Unavailable}

    with held.holding() as (_, provider):
        run(main())


# ---- deadlines and cancelling ----


def test_the_deadline_ends_a_call_and_leaves_the_connection(run: Run) -> None:
    async def main() -> None:
        async with calling(provider, timeout=LONG) as users:
            await users.Login(REQUEST)
            other = asyncio.ensure_future(users.Login(named("hold")))
            await taken(holder)
            start = time.monotonic()
            for timeout in (0.1, 0.05):
                with pytest.raises(DeadlineExceeded):
                    await users.Login(named("hold"), timeout=timeout)
            assert 0.14 < time.monotonic() - start < PATIENCE
            holder.release()
            assert said(await other) == b"hold"
            assert said(await users.Login(named("after"))) == b"after"

    with held.holding() as (holder, provider):
        run(main())


def test_cancelling_the_task_tells_the_handler(run: Run) -> None:
    async def main() -> None:
        async with calling(provider, timeout=LONG) as users:
            for _ in range(2):
                task = asyncio.ensure_future(users.Login(named("hold")))
                await taken(holder)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await cancelled(holder)
            call = asyncio.ensure_future(users.Login(named("hold")))
            await taken(holder)
            with pytest.raises(asyncio.TimeoutError):  # a deadline of the caller's own is a cancelling as well
                await asyncio.wait_for(call, 0.05)
            await cancelled(holder)
            assert said(await users.Login(named("after"))) == b"after"

    with held.holding() as (holder, provider):
        run(main())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.timeout came with Python 3.11")
def test_asyncio_timeout_and_deadlines_agree(run: Run) -> None:
    async def main() -> None:
        async with calling(provider) as users:
            await users.Login(REQUEST)
            with pytest.raises(DeadlineExceeded):  # a TimeoutError too, but the call's own
                async with asyncio.timeout(LONG):  # type: ignore[attr-defined, unused-ignore]
                    await users.Login(named("hold"), timeout=0.05)
            with pytest.raises(TimeoutError) as raised:
                async with asyncio.timeout(0.05):  # type: ignore[attr-defined, unused-ignore]
                    await users.Login(named("hold"), timeout=LONG)
            assert not isinstance(raised.value, DeadlineExceeded)

    with held.holding() as (_, provider):
        run(main())


def test_cancelled_beside_the_answer(run: Run) -> None:
    async def main() -> None:
        async with calling(provider) as users:
            await users.Login(REQUEST)
            for turns in range(200):
                task = asyncio.ensure_future(users.Login(named("x")))
                for _ in range(turns % 20):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or said(task.result()) == b"x"
            assert said(await users.Login(named("after"))) == b"after"

    with services.serving() as provider:
        run(main())


def test_an_abandoned_coroutine_leaves_nothing(run: Run) -> None:
    async def main() -> None:
        async with calling(provider, timeout=LONG) as users:
            await users.Login(REQUEST)
            call = users.Login(named("hold"))
            call.send(None)  # it waits for its answer
            call.close()
            (hub,) = users.channel._hubs.values()
            assert not hub._pending
            assert not hub._flying
            assert said(await users.Login(named("after"))) == b"after"

    with held.holding() as (_, provider):
        run(main())


# ---- connecting, and connections that end ----


def test_who_refuses_and_who_says_nothing(run: Run) -> None:
    async def main() -> None:
        async with calling(refusing) as users:
            with pytest.raises(Unavailable, match="can't connect") as refused:
                await users.Login(REQUEST)
            assert refused.value.not_run
        async with calling(silent) as users:
            patient = asyncio.ensure_future(users.Login(REQUEST, timeout=0.5))
            with pytest.raises(Unavailable, match="can't connect"):
                await users.Login(REQUEST, timeout=0.1)
            assert not patient.done()
            with pytest.raises(Unavailable, match="can't connect"):
                await patient
        async with calling(silent) as users:
            hasty = asyncio.ensure_future(users.Login(REQUEST, timeout=LONG))
            await asyncio.sleep(0.01)
            hasty.cancel()

    with held.dead() as refusing, held.black_hole() as silent:
        run(main())


def test_closing_ends_all_that_is_in_flight(run: Run) -> None:
    async def main() -> None:
        async with calling(provider, timeout=LONG) as users:
            flying = [asyncio.ensure_future(users.Login(named("hold"))) for _ in range(30)]
            await taken(holder, 30)
            await users.channel.close()
            for each in await asyncio.gather(*flying, return_exceptions=True):
                assert isinstance(each, Unavailable)
            with pytest.raises(Unavailable, match="the channel is closed"):
                await users.Login(REQUEST)
            await users.channel.close()

    with held.holding() as (holder, provider):
        run(main())


def test_closing_while_it_connects(run: Run) -> None:
    async def main() -> None:
        async with calling(silent) as users:
            flying = asyncio.ensure_future(users.Login(REQUEST, timeout=LONG))
            await asyncio.sleep(0.05)
            await users.channel.close()
            with pytest.raises(Unavailable, match="the channel is closed"):
                await flying

    with held.black_hole() as silent:
        run(main())


def test_a_provider_that_comes_back_is_found(run: Run) -> None:
    async def main() -> None:
        with held.holding() as (holder, provider):
            keys: dict[str, Any] = {"rpcserverport": int(provider.address.rpartition(":")[2])}
            channel = AsyncMprpcChannel(provider.address, timeout=LONG)
            users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
            flying = [asyncio.ensure_future(users.Login(named("hold"))) for _ in range(10)]
            await taken(holder, 10)
            await asyncio.get_running_loop().run_in_executor(None, provider.stop, 0.0)
            for each in await asyncio.gather(*flying, return_exceptions=True):
                assert isinstance(each, Unavailable)
            with pytest.raises(Unavailable):
                await users.Login(REQUEST)
        with services.serving(**keys):
            assert said(await users.Login(named("back"))) == b"back"
            await channel.close()

    run(main())


def test_goaway_lets_what_is_in_flight_end(run: Run) -> None:
    """A call after GOAWAY found the connection closed to it, and those before it were no longer read."""

    def leaving(peer: wire.Peer) -> None:
        first, _ = peer.frame()
        peer.send(wire.frame(call_id=first.call_id, kind=wire.rpcheader_pb2.GOAWAY))
        assert second_answered.wait(PATIENCE)
        peer.send(wire.response(first.call_id, services.accept(named("first"), None).SerializeToString()))
        peer.rest()

    def staying(peer: wire.Peer) -> None:
        with contextlib.suppress(EOFError):
            while True:
                header, payload = peer.frame()
                name = services.LoginRequest.FromString(payload)
                peer.send(wire.response(header.call_id, services.accept(name, None).SerializeToString()))

    async def main() -> None:
        async with calling(fake.address, timeout=LONG) as users:
            first = asyncio.ensure_future(users.Login(named("first")))
            while not (hubs := list(users.channel._hubs.values())) or not hubs[0]._pending:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)  # for GOAWAY; without it the second call may be refused, and is made again
            assert said(await users.Login(named("second"))) == b"second"
            second_answered.set()
            assert said(await first) == b"first"

    second_answered = threading.Event()
    with wire.FakeProvider(leaving, staying) as fake:
        run(main())


# ---- discovery ----


def test_discovery_does_not_block_the_event_loop(run: Run) -> None:
    async def main() -> None:
        """Which turns while nobody is found, as only it lets ZooKeeper go on."""
        async with calling(MprpcConfig(**keys), timeout=LONG) as users:
            calls = [asyncio.ensure_future(users.Login(named(str(i)))) for i in range(50)]
            hasty = asyncio.ensure_future(users.Login(REQUEST, timeout=0.2))
            await asyncio.wait([hasty])
            for _ in range(50):
                await asyncio.sleep(0.005)
            assert sum(thread.name == "mprpc-find" for thread in threading.enumerate()) <= 2  # shared by all
            assert not any(call.done() for call in calls)
            assert isinstance(hasty.exception(), Unavailable)
            release.set()
            assert [said(await call) for call in calls] == [str(i).encode() for i in range(50)]

    with EmbeddedZooKeeper() as zookeeper:
        host, _, port = zookeeper.hosts.partition(":")
        keys: dict[str, Any] = {"zookeeperip": host, "zookeeperport": int(port)}
        release, holds = threading.Event(), threading.Event()

        def hold() -> None:
            with zookeeper.answers_held():
                holds.set()
                assert release.wait(PATIENCE)

        with services.serving(**keys) as provider:
            assert provider.wait_registered(PATIENCE)
            holding = threading.Thread(target=hold)
            holding.start()
            assert holds.wait(PATIENCE)
            try:
                run(main())
            finally:
                release.set()
                holding.join()


# ---- bounds ----


def test_max_pending_slows_in_order_and_then_refuses(run: Run) -> None:
    async def main() -> None:
        async with calling(config_of(provider, max_pending=10, call_timeout=LONG)) as users:
            flying = [asyncio.ensure_future(users.Login(named("hold"))) for _ in range(10)]
            await taken(holder, 10)
            with pytest.raises(ResourceExhausted, match="max_pending=10") as refused:
                await users.Login(REQUEST, timeout=0.05)
            assert refused.value.not_run
            ends: list[int] = []
            slowed = [asyncio.ensure_future(users.Login(named(str(i)))) for i in range(20)]
            for i, task in enumerate(slowed):
                task.add_done_callback(lambda _, i=i: ends.append(i))
            await asyncio.sleep(0.05)
            assert not ends
            slowed[3].cancel()
            flying[0].cancel()
            done = await asyncio.gather(*slowed, return_exceptions=True)
            assert [said(each) for i, each in enumerate(done) if i != 3] == [
                str(i).encode() for i in range(20) if i != 3
            ]
            assert ends == [3, *(i for i in range(20) if i != 3)]
            holder.release()
            assert {said(await each) for each in flying[1:]} == {b"hold"}
            (hub,) = users.channel._hubs.values()
            assert (hub._flying, hub._bytes, len(hub._waiting), len(hub._pending)) == (0, 0, 0, 0)

    with held.holding() as (holder, provider):
        run(main())


def test_large_requests_are_bounded_by_their_bytes(run: Run) -> None:
    async def main() -> None:
        async with calling(config_of(provider, max_payload=3_000_000, call_timeout=LONG)) as users:
            first = asyncio.ensure_future(users.Login(named(b"hold" + bytes(2_000_000))))
            await taken(holder)
            with pytest.raises(ResourceExhausted, match="max_payload=3000000"):
                await users.Login(named(bytes(2_000_000)), timeout=0.1)
            second = asyncio.ensure_future(users.Login(named(bytes(2_000_000))))
            await asyncio.sleep(0.01)
            holder.release()
            assert [len(said(await each)) for each in (first, second)] == [2_000_004, 2_000_000]

    with held.holding() as (holder, provider):
        run(main())


def test_however_many_tasks_few_calls_are_in_flight(run: Run) -> None:
    async def main() -> None:
        most = 0
        async with calling(config_of(provider, max_pending=100, call_timeout=LONG)) as users:

            async def call(i: int) -> bool:
                nonlocal most
                response = await users.Login(named(str(i)))
                (hub,) = users.channel._hubs.values()
                most = max(most, len(hub._pending))
                return said(response) == str(i).encode()

            assert all(await asyncio.gather(*(call(i) for i in range(2_000))))
        assert most <= 100

    with services.serving() as provider:
        run(main())


# ---- event loops ----


def test_one_channel_serves_event_loops_in_many_threads() -> None:
    with services.serving(loops=2) as provider:
        channel = AsyncMprpcChannel(provider.address, timeout=LONG)
        users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)

        async def main(thread: int) -> bool:
            names = [f"{thread}.{i}" for i in range(500)]
            return await logins(users, names) == [name.encode() for name in names]

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda thread: asyncio.run(main(thread)), range(4)))
        asyncio.run(channel.close())


def test_event_loops_that_come_and_go_leave_no_connection() -> None:
    """A loop that ended without close() took nothing along: its connection stayed open for the channel's life."""
    with services.serving() as provider:
        channel = AsyncMprpcChannel(provider.address)
        users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
        for i in range(10):
            assert asyncio.run(logins(users, [str(i)])) == [str(i).encode()]
        assert len(channel._hubs) == 1
        asyncio.run(channel.close())


def test_closing_from_another_event_loop() -> None:
    with held.holding() as (holder, provider):
        channel = AsyncMprpcChannel(provider.address, timeout=LONG)
        users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(asyncio.run, logins(users, ["hold"]))
            holder.taken()
            asyncio.run(channel.close())
            assert isinstance(waiting.exception(PATIENCE), Unavailable)


SILENT = """
import asyncio, sys
import services
from mprpc import AsyncMprpcChannel

async def main(address, close):
    channel = AsyncMprpcChannel(address)
    users = services.user_mprpc.UserServiceRpc_AsyncStub(channel)
    assert (await users.Login(services.REQUEST)).success
    tasks = [asyncio.ensure_future(users.Login(services.REQUEST)) for _ in range(100)]
    if close:
        await channel.close()
    return tasks

for close in (False, True):
    tasks = asyncio.run(main(sys.argv[1], close), debug=True)
    assert all(task.done() for task in tasks)
    [task.cancelled() or task.exception() for task in tasks]
print("done")
"""


def test_an_event_loop_that_ends_in_the_middle_is_silent() -> None:
    """In a process with -X dev -W error; also at its exit, with connections that nobody closed."""
    with services.serving() as provider:
        process = services.start_python(SILENT, provider.address)
        out, err = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, err) == (0, "done\n", "")


def test_asyncio_is_imported_only_when_it_is_used() -> None:
    program = (
        "import sys, mprpc; before = 'asyncio' in sys.modules; mprpc.AsyncMprpcChannel;"
        " print(before, 'asyncio' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert ran.stdout == "False True\n"


def test_generated_stubs_import_no_asyncio() -> None:
    importlib.import_module("user_mprpc")
    program = "import sys, user_mprpc; print('asyncio' in sys.modules)"
    process = services.start_python(program)
    assert process.communicate(timeout=PATIENCE) == ("False\n", "")


def test_a_log_of_its_own_only(caplog: pytest.LogCaptureFixture) -> None:
    """What users see of the asyncio face in the log at its finest level is mprpc's."""
    caplog.set_level(logging.DEBUG)

    async def main() -> None:
        async with calling(provider) as users:
            await users.Login(REQUEST)

    with services.serving() as provider:
        asyncio.run(main())
    assert {each.name.partition(".")[0] for each in caplog.records} <= {"mprpc", "asyncio"}
