"""What an endpoint's calls tell of it: the load record, over all faces and across connections."""

# ruff: noqa: F811, as a test's argument has the name of the imported fixture

from __future__ import annotations

import asyncio
import threading
import time

import pytest

import mprpc
import services
import wire
from held import Held, held, provider  # noqa: F401
from mprpc import AsyncMprpcChannel, MprpcChannel, NotFound, RpcError
from mprpc._native import ffi, lib
from mprpc.subchannel import Load
from services import REQUEST, LoginRequest, user_mprpc

MS, SECOND = 1_000_000, 1_000_000_000


class Record:
    """A struct mprpc_load on a clock of the test's."""

    def __init__(self) -> None:
        self.handle = ffi.gc(lib.mprpc_load_new(), lib.mprpc_load_drop)
        self.now = 1000 * SECOND

    def call(self, took: int, verdict: int = lib.MPRPC_LOAD_OK) -> None:
        lib.mprpc_load_begin(self.handle)
        self.now += took
        lib.mprpc_load_end(self.handle, self.now - took, self.now, verdict)

    @property
    def load(self) -> Load:
        at = ffi.new("struct mprpc_load_snapshot *")
        lib.mprpc_load_snapshot(self.handle, self.now, at)
        return Load(at.in_flight, at.ended, at.failed, at.failing, at.latency, at.succeeded_at, at.failed_at)

    @property
    def cost(self) -> int:
        return int(lib.mprpc_load_cost(self.handle, self.now))


def near(value: float) -> object:
    return pytest.approx(value, rel=0.05)


def test_latency_jumps_up_at_once_and_forgets_over_ten_seconds() -> None:
    record = Record()
    for _ in range(100):
        record.call(MS)
    assert record.load.latency == near(MS)
    record.call(80 * MS)
    assert record.load.latency == near(80 * MS)
    for _ in range(10_000):  # ten seconds of quick calls
        record.call(MS)
    assert record.load.latency == near((80 - 1) / 2.7 * MS + MS)
    for _ in range(90_000):
        record.call(MS)
    assert record.load.latency == near(MS)


def test_what_is_not_called_is_forgotten() -> None:
    record = Record()
    record.call(80 * MS)
    record.now += 100 * SECOND
    assert record.load.latency < 0.01 * 80 * MS
    record.now += 40 * 24 * 3600 * SECOND  # its clock has gone round half
    assert record.load.latency <= 80 * MS


def test_many_calls_within_a_millisecond_do_not_hide_a_peak() -> None:
    record = Record()
    record.call(80 * MS)
    for _ in range(1000):
        record.call(100)
    assert record.load.latency == near(80 * MS)


def test_what_fails_quickly_is_not_quick() -> None:
    record = Record()
    record.call(50 * MS)
    for _ in range(1000):
        record.call(MS, lib.MPRPC_LOAD_FAILED)
    assert record.load[1:4] == (1001, 1000, 1000)
    assert record.load.latency > 40 * MS
    record.call(200 * MS, lib.MPRPC_LOAD_UNDECIDED)  # given up, but it has taken that long
    assert record.load.latency == near(200 * MS)
    record.call(MS)
    assert record.load[1:4] == (1003, 1000, 0)
    assert record.load.failed_at < record.load.succeeded_at == record.now


def test_a_call_more_costs_more() -> None:
    record, unknown = Record(), Record()
    assert unknown.cost == 0  # so that it is tried
    lib.mprpc_load_begin(unknown.handle)
    record.call(MS)
    idle = record.cost
    lib.mprpc_load_begin(record.handle)
    lib.mprpc_load_begin(record.handle)
    assert record.cost == near(3 * idle)
    assert record.cost < unknown.cost  # but not by all at once


def test_looking_at_two_loads_costs_next_to_nothing() -> None:
    first, second = Record(), Record()
    cost, now = lib.mprpc_load_cost, first.now
    best = 1.0
    for _ in range(20):
        began = time.perf_counter()
        for _ in range(1000):
            cost(first.handle, now) < cost(second.handle, now)  # noqa: B015
        best = min(best, (time.perf_counter() - began) / 1000)
    assert best < 2e-6, "0.2 us on a quiet machine"


def test_counting_from_many_threads_loses_nothing() -> None:
    record = Record()

    def count() -> None:
        for i in range(2000):
            lib.mprpc_load_begin(record.handle)
            lib.mprpc_load_end(record.handle, 1, 1 + i, lib.MPRPC_LOAD_OK if i % 2 else lib.MPRPC_LOAD_FAILED)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert record.load[:3] == (0, 8000, 4000)


# ---- calls ----


def load_of(channel: MprpcChannel) -> Load:
    return channel._fixed().load


def test_blocking_calls_and_futures_are_counted(provider: mprpc.RpcProvider, held: Held) -> None:
    with MprpcChannel(provider.address, timeout=wire.PATIENCE) as channel:
        stub = user_mprpc.UserServiceRpc_Stub(channel)
        assert load_of(channel) == Load(0, 0, 0, 0, 0, 0, 0)
        stub.Login(REQUEST)
        with pytest.raises(NotFound):  # an answer like any other
            stub.Login(LoginRequest(name=b"fail"))
        assert stub.Login.future(REQUEST).result(wire.PATIENCE).success
        first = load_of(channel)
        assert first[:4] == (0, 3, 0, 0)
        assert 0 < first.latency < wire.PATIENCE * SECOND
        assert 0 < time.monotonic_ns() - first.succeeded_at < wire.PATIENCE * SECOND
        held_one = stub.Login.future(LoginRequest(name=b"hold"))
        held.taken()
        assert load_of(channel).in_flight == 1
        held_one.cancel()
        assert load_of(channel)[:4] == (0, 4, 0, 0)
        with pytest.raises(mprpc.DeadlineExceeded):
            stub.Login(LoginRequest(name=b"hold"), timeout=0.02)
        assert load_of(channel)[:4] == (0, 5, 1, 1)
        assert load_of(channel).latency >= 19 * MS


def test_asyncio_is_counted_at_the_same_place(provider: mprpc.RpcProvider, held: Held) -> None:
    async def main() -> None:
        async with AsyncMprpcChannel(provider.address, timeout=wire.PATIENCE) as channel:
            stub = user_mprpc.UserServiceRpc_AsyncStub(channel)
            await asyncio.gather(*[stub.Login(REQUEST) for _ in range(20)])
            assert load_of(channel._channel)[:4] == (0, 20, 0, 0)
            with pytest.raises(mprpc.DeadlineExceeded):
                await stub.Login(LoginRequest(name=b"hold"), timeout=0.02)
            assert load_of(channel._channel)[:4] == (0, 21, 1, 1)

    asyncio.run(main())


def test_the_record_outlives_connections_and_knows_failures_to_connect() -> None:
    with services.serving() as provider:
        address = provider.address
        with MprpcChannel(address, timeout=1.0) as channel:
            stub = user_mprpc.UserServiceRpc_Stub(channel)
            stub.Login(REQUEST)
            provider.stop(0)
            for _ in range(2):
                with pytest.raises(RpcError):
                    stub.Login(REQUEST)
            after = load_of(channel)
            assert (after.in_flight, after.ended) == (0, 1)
            assert after.failing == after.failed >= 1
            assert after.failed_at > after.succeeded_at


def test_a_channel_that_closes_under_its_calls_blames_nobody(provider: mprpc.RpcProvider, held: Held) -> None:
    channel = MprpcChannel(provider.address, timeout=wire.PATIENCE)
    future = user_mprpc.UserServiceRpc_Stub(channel).Login.future(LoginRequest(name=b"hold"))
    held.taken()
    endpoint = channel._fixed()
    channel.close()
    assert isinstance(future.exception(wire.PATIENCE), mprpc.Unavailable)
    assert endpoint.load[:4] == (0, 1, 0, 0)
