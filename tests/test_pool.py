"""Pools: how channels choose among real providers, by all three faces; who rests, for how long, and what shows it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

import held
import services
import wire
from mprpc import DeadlineExceeded, Internal, MprpcConfig, MprpcController, NotFound, ResourceExhausted, Unavailable
from mprpc.balancer import Candidate, Candidates
from mprpc.pool import EndpointState
from mprpc.registry import Endpoint
from mprpc.testing import FakeRegistry
from services import REQUEST, serving, user_mprpc

SERVICE = "fixbug.UserServiceRpc"
CONFIG = MprpcConfig(slow_start=0.0, connect_timeout=0.5)


class Caller:
    """One consumer of UserServiceRpc, of any face. Each call tells who answered, or what it failed with."""

    def __init__(self, stack: contextlib.ExitStack, face: str, registry: FakeRegistry, **options: Any) -> None:
        self._face = face
        config = options.pop("config", CONFIG)
        if face == "coroutine":
            self._loop = asyncio.new_event_loop()
            stack.callback(self._loop.close)
            stack.callback(lambda: self._loop.run_until_complete(self._loop.shutdown_default_executor()))
            self.channel: Any = registry.async_channel(config, **options)
            stack.callback(lambda: self._loop.run_until_complete(self.channel.close()))
            self._login = user_mprpc.UserServiceRpc_AsyncStub(self.channel).Login
        else:
            self.channel = stack.enter_context(registry.channel(config, **options))
            self._login = user_mprpc.UserServiceRpc_Stub(self.channel).Login

    def __call__(self, timeout: float = wire.PATIENCE, key: bytes | None = None, request: Any = REQUEST) -> Any:
        controller = MprpcController()
        call = self._login if key is None else self._login.keyed(key)
        if self._face == "blocking":
            call(request, timeout=timeout, controller=controller)
        elif self._face == "future":
            call.future(request, timeout=timeout, controller=controller).result(wire.PATIENCE)
        else:
            self._loop.run_until_complete(call(request, timeout=timeout, controller=controller))
        return controller.status if controller.failed() else controller.peer

    def times(self, count: int, **options: Any) -> Counter[Any]:
        return Counter(self(**options) for _ in range(count))

    def states(self) -> dict[str, EndpointState]:
        return {each.address: each for each in self.channel.endpoints()}

    def until(self, true: Callable[[dict[str, EndpointState]], bool]) -> None:
        deadline = time.monotonic() + wire.PATIENCE
        while not true(self.states()):
            assert time.monotonic() < deadline, self.states()
            threading.Event().wait(0.01)


faces = pytest.mark.parametrize("face", ["blocking", "future", "coroutine"])


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def providers(stack: contextlib.ExitStack, count: int, login: services.Login = services.accept) -> list[str]:
    return [stack.enter_context(serving(login)).address for _ in range(count)]


@contextlib.contextmanager
def mute() -> Iterator[str]:
    """Its kernel makes the connections, and nobody reads from them: a process that was stopped."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield "127.0.0.1:{1}".format(*listener.getsockname())


# ---- who is chosen ----


@faces
@pytest.mark.parametrize("balancer", ["p2c", "round_robin", "weighted_random", "least_in_flight", "consistent_hash"])
def test_all_providers_get_calls(face: str, balancer: str, stack: contextlib.ExitStack) -> None:
    addresses = providers(stack, 3)
    caller = Caller(stack, face, FakeRegistry({SERVICE: addresses}), balancer=balancer)
    assert set(caller.times(100)) == set(addresses)


@faces
def test_calls_with_one_key_go_to_one_provider(face: str, stack: contextlib.ExitStack) -> None:
    addresses = providers(stack, 4)
    registry = FakeRegistry({SERVICE: addresses})
    caller = Caller(stack, face, registry, balancer="consistent_hash")
    homes = {key: caller(key=key) for key in (b"%d" % i for i in range(40))}
    assert len(set(homes.values())) > 1
    for key, home in homes.items():
        assert caller.times(3, key=key) == {home: 3}
    registry.list(SERVICE, [each for each in addresses if each != addresses[0]])
    for key, home in homes.items():
        assert caller(key=key) == home or home == addresses[0]


def test_all_consumers_agree_on_the_home_of_a_key(stack: contextlib.ExitStack) -> None:
    registry = FakeRegistry({SERVICE: providers(stack, 4)})
    callers = [Caller(stack, face, registry, balancer="consistent_hash") for face in ("blocking", "future")]
    for key in (b"%d" % i for i in range(20)):
        assert len({caller(key=key) for caller in callers}) == 1


def test_a_key_goes_along_with_other_options(stack: contextlib.ExitStack) -> None:
    registry = FakeRegistry({SERVICE: providers(stack, 4)})
    channel = stack.enter_context(registry.channel(CONFIG, balancer="consistent_hash"))
    login = user_mprpc.UserServiceRpc_Stub(channel).Login
    peers = set()
    for call in (
        login.keyed(b"7"),
        login.keyed(b"7").with_options(retries=0),
        login.with_options(retries=0).keyed(b"7"),
    ):
        controller = MprpcController()
        call(REQUEST, controller=controller)
        peers.add(controller.peer)
    assert len(peers) == 1


def test_a_key_for_a_single_address_changes_nothing() -> None:
    with serving() as provider, services.calling(provider) as users:
        assert users.Login.keyed(b"7")(REQUEST).success


class Last:
    """A strategy of the user's."""

    def pick(self, candidates: Candidates, key: bytes | None) -> Candidate:
        return max(candidates, key=lambda each: each.address)


@faces
def test_a_strategy_of_ones_own(face: str, stack: contextlib.ExitStack) -> None:
    addresses = providers(stack, 3)
    caller = Caller(stack, face, FakeRegistry({SERVICE: addresses}), balancer=Last())
    assert caller.times(10) == {max(addresses): 10}


def test_tags_and_zones_of_the_list_are_heeded(stack: contextlib.ExitStack) -> None:
    here, there, canary = providers(stack, 3)
    listed = [Endpoint(here, zone="a"), Endpoint(there, zone="b"), Endpoint(canary, zone="c", tags=("canary",))]
    registry = FakeRegistry({SERVICE: listed})
    assert Caller(stack, "blocking", registry, config=CONFIG.replace(zone="a")).times(20) == {here: 20}
    assert Caller(stack, "blocking", registry, tags=["canary"]).times(20) == {canary: 20}
    assert Caller(stack, "blocking", registry, config=CONFIG.replace(call_tags=("canary",))).times(20) == {canary: 20}
    caller = Caller(stack, "blocking", registry, config=CONFIG.replace(zone="a", balancer="round_robin"))
    caller()
    registry.list(SERVICE, listed[1:])
    assert set(caller.times(20)) == {there, canary}


def test_tags_that_nobody_has_are_named_in_the_error(stack: contextlib.ExitStack) -> None:
    registry = FakeRegistry({SERVICE: providers(stack, 1)})
    channel = stack.enter_context(registry.channel(CONFIG, tags=["gpu", "big"]))
    with pytest.raises(Unavailable, match="no provider with the tags gpu,big is registered"):
        user_mprpc.UserServiceRpc_Stub(channel).Login(REQUEST, timeout=1.0)


def test_one_that_joins_gets_its_share_little_by_little(stack: contextlib.ExitStack) -> None:
    old, new = providers(stack, 2)
    registry = FakeRegistry({SERVICE: [old]})
    caller = Caller(stack, "blocking", registry, config=CONFIG.replace(slow_start=0.5, balancer="weighted_random"))
    assert caller.times(5) == {old: 5}
    registry.list(SERVICE, [old, new])
    caller()
    assert caller.states()[new].state == "warming"
    assert caller.states()[new].share < 0.35
    caller.until(lambda states: states[new].share == 0.5)
    assert caller.states()[new].state != "warming"


# ---- who rests ----


@faces
def test_a_mute_provider_costs_one_call(face: str, stack: contextlib.ExitStack) -> None:
    (good,) = providers(stack, 1)
    bad = stack.enter_context(mute())
    caller = Caller(stack, face, FakeRegistry({SERVICE: [good, bad]}))
    ends = caller.times(60, timeout=1.0)
    assert ends[DeadlineExceeded.status] == 1
    assert ends[good] == 59
    caller.until(lambda states: states[bad].state == "resting")
    assert caller.states()[bad].why == "it does not answer"
    assert caller.states()[bad].failures == 1
    assert caller.times(20) == {good: 20}


@faces
def test_a_black_hole_costs_one_attempt_and_no_call(face: str, stack: contextlib.ExitStack) -> None:
    (good,) = providers(stack, 1)
    bad = stack.enter_context(held.black_hole())
    caller = Caller(stack, face, FakeRegistry({SERVICE: [good, bad]}), config=CONFIG.replace(connect_timeout=1.0))
    slow = 0
    for _ in range(60):
        began = time.monotonic()
        assert caller() == good
        slow += time.monotonic() - began > 0.9
    assert slow == 1
    assert caller.states()[bad].state == "resting"


@faces
def test_a_provider_that_is_gone_is_probed_and_comes_back(face: str, stack: contextlib.ExitStack) -> None:
    """Nobody tells the registry: only the channel can notice."""
    (good,) = providers(stack, 1)
    with serving() as other:
        back = other.address
        patient = CONFIG.replace(connect_timeout=wire.PATIENCE, balancer="round_robin")
        caller = Caller(stack, face, FakeRegistry({SERVICE: [good, back]}), config=patient)
        assert set(caller.times(60)) == {good, back}
    assert set(caller.times(60)) == {good}
    caller.until(lambda states: states[back].state == "resting" and states[back].rests_for > 0.3)
    assert caller.states()[back].share == 0.0
    stack.enter_context(serving(rpcserverport=int(back.rpartition(":")[2])))
    caller.until(lambda states: states[back].state not in ("resting", "probing"))
    assert set(caller.times(60)) == {good, back}


def test_a_stopped_process_costs_one_call_and_returns_when_it_goes_on(stack: contextlib.ExitStack) -> None:
    (good,) = providers(stack, 1)
    process = services.start_python(
        "import services, sys\nwith services.serving() as provider:\n"
        "    print(provider.address, flush=True)\n    sys.stdin.read()"
    )
    stack.callback(process.communicate)
    stack.callback(process.send_signal, signal.SIGCONT)
    assert process.stdout is not None
    other = process.stdout.readline().strip()
    caller = Caller(stack, "blocking", FakeRegistry({SERVICE: [good, other]}), balancer="round_robin")
    assert set(caller.times(60)) == {good, other}
    os.kill(process.pid, signal.SIGSTOP)
    ends = caller.times(100, timeout=1.0)
    assert ends[DeadlineExceeded.status] == 1
    caller.until(lambda states: states[other].state == "resting")
    os.kill(process.pid, signal.SIGCONT)
    caller.until(lambda states: states[other].state not in ("resting", "probing"))
    assert set(caller.times(60)) == {good, other}


@faces
def test_a_slow_call_is_no_failure_of_the_provider(face: str, stack: contextlib.ExitStack) -> None:
    """It answers the probe, so that only that call was slow, and no rest comes of it."""
    hold = held.Held()
    stack.callback(hold.release)
    addresses = providers(stack, 2, hold)
    patient = CONFIG.replace(connect_timeout=wire.PATIENCE, balancer="round_robin")
    caller = Caller(stack, face, FakeRegistry({SERVICE: addresses}), config=patient)
    assert set(caller.times(4)) == set(addresses)
    assert caller.times(4, timeout=0.3, request=held.named("hold")) == {DeadlineExceeded.status: 4}
    caller.until(lambda states: not any(each.state in ("probing", "resting") for each in states.values()))
    assert {each.rests for each in caller.states().values()} == {0}
    assert set(caller.times(10)) == set(addresses)


def fails_with(error: Exception) -> services.Login:
    def login(request: Any, controller: Any) -> Any:
        raise error

    return login


@pytest.mark.parametrize(("error", "rests"), [(Internal("broken"), True), (ResourceExhausted("full"), False),
                                              (NotFound("nobody"), False)])  # fmt: skip
def test_who_fails_more_than_its_peers_rests_but_not_for_overload(
    error: Exception, rests: bool, stack: contextlib.ExitStack
) -> None:
    good = providers(stack, 3)
    (bad,) = providers(stack, 1, fails_with(error))
    caller = Caller(stack, "blocking", FakeRegistry({SERVICE: [*good, bad]}), balancer="round_robin")
    deadline = time.monotonic() + (wire.PATIENCE if rests else 1.5)
    while caller.times(40)[bad] or caller.states()[bad].state != "resting":
        if time.monotonic() > deadline:
            break
    assert (caller.states()[bad].rests > 0) == rests
    assert all(each.rests == 0 for address, each in caller.states().items() if address != bad)


def test_a_connection_that_ends_with_a_call_in_flight_makes_its_endpoint_rest(stack: contextlib.ExitStack) -> None:
    (good,) = providers(stack, 1)
    fake = stack.enter_context(wire.FakeProvider(*[lambda peer: peer.frame() and None] * 50))
    caller = Caller(stack, "blocking", FakeRegistry({SERVICE: [good, fake.address]}), balancer="round_robin")
    ends = caller.times(20)
    assert ends[Unavailable.status] <= 4
    assert caller.states()[fake.address].rests >= 1
    assert caller.states()[fake.address].failures == ends[Unavailable.status]


@faces
def test_when_most_can_not_be_reached_no_call_fails_and_one_line_says_so(
    face: str, stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    good = providers(stack, 4)
    dead = [stack.enter_context(held.dead()) for _ in range(6)]
    caller = Caller(stack, face, FakeRegistry({SERVICE: [*good, *dead]}))
    with caplog.at_level(logging.WARNING, "mprpc.balancer"):
        assert set(caller.times(200)) == set(good)
        caller.until(lambda states: all(states[each].state == "resting" for each in dead))
        assert set(caller.times(200)) == set(good)
    lines = [each.getMessage() for each in caplog.records if each.name == "mprpc.balancer"]
    assert len(lines) == 1
    assert lines[0].startswith(f"{SERVICE}: 6 of 10 providers can't be used")
    assert sum(each.share for each in caller.states().values()) == pytest.approx(1.0)
    assert min(each.share for each in caller.states().values()) > 0.0


def test_when_most_fail_all_are_used_again(stack: contextlib.ExitStack) -> None:
    """They answer, so that nothing but their rest could keep calls from them."""
    good, bad = providers(stack, 4), providers(stack, 6)
    caller = Caller(stack, "blocking", FakeRegistry({SERVICE: [*good, *bad]}), balancer="round_robin")
    assert set(caller.times(20)) == {*good, *bad}
    subchannels = {key[0]: each for key, each in caller.channel._endpoints.items()}
    for each in bad[:5]:
        subchannels[each].outlier()
    assert set(caller.times(20)) == {*good, bad[5]}
    subchannels[bad[5]].outlier()
    assert set(caller.times(20)) == {*good, *bad}


# ---- what shows it ----


def test_endpoints_tell_what_is_known(stack: contextlib.ExitStack) -> None:
    one, two = providers(stack, 2)
    listed: Sequence[Endpoint] = [Endpoint(one, weight=3.0, zone="a", tags=("big",), id="first"), Endpoint(two)]
    caller = Caller(stack, "blocking", FakeRegistry({SERVICE: listed}), balancer="round_robin")
    assert caller.channel.endpoints() == []  # nothing was called
    caller.times(8)
    first, second = caller.channel.endpoints()
    assert first[:7] == (SERVICE, one, "first", "a", ("big",), 3.0, 0.75)
    assert (first.state, first.why, first.in_flight, first.failures, first.rests, first.rests_for) == (
        "connected", "", 0, 0, 0, 0.0,
    )  # fmt: skip
    assert (first.calls, second.calls) == (6, 2)
    assert 0.0 < first.latency < wire.PATIENCE


def test_endpoints_of_a_channel_to_one_address() -> None:
    with serving() as provider, services.calling(provider) as users:
        users.Login(REQUEST)
        (only,) = users.Login._channel.endpoints()
        assert only[:3] == ("", provider.address, "")
        assert (only.state, only.calls, only.share) == ("connected", 1, 1.0)


def test_a_channel_that_is_closed_leaves_nothing_to_be_done(stack: contextlib.ExitStack) -> None:
    """The suite looks for threads that stay; here one would wait for the end of a rest."""
    registry = FakeRegistry({SERVICE: [*providers(stack, 1), stack.enter_context(held.dead())]})
    with registry.channel(CONFIG.replace(slow_start=60.0)) as channel:
        login = user_mprpc.UserServiceRpc_Stub(channel).Login
        while all(each.state != "resting" for each in channel.endpoints()):
            login(REQUEST)


def test_silence_costs_one_call_for_each_endpoint_even_where_most_are_silent(stack: contextlib.ExitStack) -> None:
    """Until all of them had been probed, a second each, calls went on to those that were suspected already."""
    (good,) = providers(stack, 1)
    bad = [stack.enter_context(mute()) for _ in range(4)]
    patient = CONFIG.replace(connect_timeout=wire.PATIENCE, balancer="round_robin")  # no probe ends while this lasts
    caller = Caller(stack, "blocking", FakeRegistry({SERVICE: [good, *bad]}), config=patient)
    assert caller.times(40, timeout=0.5) == {DeadlineExceeded.status: 4, good: 36}
    caller.channel.close()


def test_a_suspect_that_answers_keeps_its_connection(stack: contextlib.ExitStack) -> None:
    hold = held.Held()
    stack.callback(hold.release)
    addresses = providers(stack, 2, hold)
    patient = CONFIG.replace(connect_timeout=wire.PATIENCE, balancer="round_robin")
    caller = Caller(stack, "blocking", FakeRegistry({SERVICE: addresses}), config=patient)
    caller.times(4)
    subchannels = list(caller.channel._endpoints.values())
    links = [each.link for each in subchannels]
    assert caller.times(2, timeout=0.3, request=held.named("hold")) == {DeadlineExceeded.status: 2}
    caller.until(lambda states: all(each.state == "connected" for each in states.values()))
    assert [each.link for each in subchannels] == links


def test_a_provider_without_peers_is_not_suspected(stack: contextlib.ExitStack) -> None:
    caller = Caller(stack, "blocking", FakeRegistry({SERVICE: [stack.enter_context(mute())]}))
    assert caller.times(2, timeout=0.2) == {DeadlineExceeded.status: 2}
    (only,) = caller.channel.endpoints()
    assert (only.state, only.failures, only.rests) == ("connected", 2, 0)


def test_a_classic_provider_that_is_gone_rests_too(stack: contextlib.ExitStack) -> None:
    (good,) = providers(stack, 1)
    listed = [Endpoint(good, classic=True), Endpoint(stack.enter_context(held.dead()), classic=True)]
    caller = Caller(stack, "blocking", FakeRegistry({SERVICE: listed}), balancer="round_robin")
    assert caller.times(20) == {good: 20}
    first, second = caller.channel.endpoints()
    assert (first.calls, first.in_flight, first.failures, first.rests) == (20, 0, 0, 0)
    assert second.state == "resting"


FORKED = """
import os, sys, held, services
from mprpc import MprpcConfig
from mprpc.testing import FakeRegistry
with services.serving() as one, services.serving() as two, held.dead() as dead:
    registry = FakeRegistry({"fixbug.UserServiceRpc": [one.address, two.address, dead]})
    with registry.channel(MprpcConfig(slow_start=0.0)) as channel:
        login = services.user_mprpc.UserServiceRpc_Stub(channel).Login
        while not any(each.rests for each in channel.endpoints()):
            login(services.REQUEST)
        child = os.fork()
        if child == 0:
            channel._registry = registry
            assert not any(each.rests for each in channel.endpoints())
            while not any(each.rests for each in channel.endpoints()):
                login(services.REQUEST)
            assert [each.why for each in channel.endpoints() if each.rests]
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_finds_out_for_itself() -> None:
    """It took over who rests and nobody who probes them, so that they rested for ever."""
    process = services.start_python(FORKED)
    out, err = process.communicate(timeout=wire.PATIENCE)
    assert (out, err) == ("7\n", "")


def test_in_a_panic_a_coroutine_too_goes_elsewhere_first(stack: contextlib.ExitStack) -> None:
    """It went on with the connections of those that did not answer, so that most calls were lost."""
    (good,) = providers(stack, 1)
    bad = [stack.enter_context(mute()) for _ in range(2)]
    caller = Caller(stack, "coroutine", FakeRegistry({SERVICE: [good, *bad]}), balancer="round_robin")
    ends = caller.times(12, timeout=0.7)
    assert ends[DeadlineExceeded.status] <= 4
    caller.until(lambda states: all(states[each].state == "resting" for each in bad))
    caller.until(lambda states: all(states[each].rests_for > 0.2 for each in bad))
    assert caller.times(12, timeout=5.0) == {good: 12}
