"""The decisions of discovery in a simulated world: each race of the two layouts by itself, then all at random."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest

from discovery_simulator import LOGIN, METHODS, PATH, SERVICE, SESSION_TIMEOUT, Process, World
from mprpc import directory, reconciler, registrar
from mprpc.desk import (
    Answer,
    Children,
    Connected,
    Create,
    Delete,
    Exists,
    Follow,
    Probe,
    Publish,
    Read,
    Replace,
    ReportDown,
    Request,
    Save,
    Snapshot,
    Stat,
    Tick,
    Transaction,
    Unfollow,
)
from mprpc.layout import Endpoint, Registration
from mprpc.reconciler import Reconciler

A, B, C, D = (f"10.0.0.{number}:8000" for number in range(1, 5))
SHARED = "10.0.0.1:9000"  # of worker processes


@pytest.fixture
def world() -> World:
    return World()


def provider(world: World, address: str) -> Process:
    """Registered."""
    made = world.process(address)
    made.connect()
    made.publish()
    world.settle()
    return made


def consumer(world: World) -> Process:
    """With its first list."""
    made = world.process()
    made.connect()
    made.follow()
    world.settle()
    return made


class TestRegistering:
    def test_both_layouts_are_written(self, world: World) -> None:
        first = provider(world, A)
        (instance,) = world.children()
        assert world.nodes[instance].owner == first.session
        assert json.loads(world.nodes[instance].data or b"")["address"] == "10.0.0.1"
        assert {path: world.seed_data(path) for path in world.children("/UserServiceRpc")} == {
            LOGIN: A,
            "/UserServiceRpc/Register": A,
        }
        assert first.registered == {1: True}
        assert any(f"registered: {SERVICE} at {A}" in line for line in first.logged)

    def test_seed_parents_have_no_data_at_all(self, world: World) -> None:
        provider(world, A)
        assert world.nodes["/UserServiceRpc"].data is None
        assert world.nodes["/UserServiceRpc"].owner == 0

    def test_the_seed_layout_is_open_and_ours_is_not_marked_so(self, world: World) -> None:
        first = provider(world, A)
        creates = {
            action.operation.path: action.operation.open
            for action in first.actions
            if isinstance(action, Request) and isinstance(action.operation, Create)
        }
        assert {path for path, is_open in creates.items() if is_open} == {
            "/UserServiceRpc",
            LOGIN,
            LOGIN.replace("Login", "Register"),
        }
        assert not creates["/mprpc"]

    def test_starts_while_zookeeper_is_down_and_registers_when_it_comes(self, world: World) -> None:
        first = world.process(A)
        first.publish()
        world.settle(60)
        assert any(line.startswith("warning: ZooKeeper zk:2181 can't be reached yet") for line in first.logged)
        assert not first.registered.get(1)
        first.connect()
        world.settle()
        assert first.registered == {1: True}

    def test_a_steady_state_asks_nothing_but_the_audit(self, world: World) -> None:
        provider(world, A)
        reads = world.reads
        world.settle(registrar.AUDIT * 10)
        assert reads + 3 * 6 <= world.reads <= reads + 3 * 20

    def test_ipv6_is_registered_as_an_instance_only(self, world: World) -> None:
        first = world.process()
        first.connect()
        first.handle(Publish(1, (Registration(SERVICE, METHODS, "::1", 8000),)))
        world.settle()
        assert len(world.children()) == 1
        assert "/UserServiceRpc" not in world.nodes
        assert first.registered == {1: True}

    def test_a_change_of_the_data_is_a_new_id_in_one_transaction(self, world: World) -> None:
        first = provider(world, A)
        follower = consumer(world)
        (old,) = world.children()
        first.publish(weight=3.0)
        assert isinstance(first.outbox[0].operation, Transaction)
        world.settle(1)
        (new,) = world.children()
        assert new != old
        assert follower.snapshots[SERVICE].endpoints[0].weight == 3.0
        assert first.registered == {1: True}

    def test_the_answer_to_a_change_is_lost_after_it_was_carried_out(self, world: World) -> None:
        """The old node's name was forgotten with the question, and it stayed until the session's end."""
        for carried_out in (0, 1):
            first = provider(world, A)
            first.publish(weight=3.0)
            first.disconnect(carried_out=carried_out)
            first.connect()
            world.settle()
            assert len(world.children()) == 1
            world.end_session(first.kill())

    def test_a_change_while_there_is_no_connection(self, world: World) -> None:
        """The old node was both to be deleted and taken for the new one."""
        first = provider(world, A)
        first.disconnect()
        first.publish(weight=3.0)
        first.connect()
        world.settle()
        assert len(world.children()) == 1
        assert b'"weight":"3.0"' in (world.nodes[world.children()[0]].data or b"")

    def test_the_answer_to_a_creation_is_lost(self, world: World) -> None:
        provider(world, B)  # so that the parents are there
        for carried_out in (0, 1, 2):
            first = world.process(A)
            first.connect()
            first.handle_one()
            first.publish()
            first.disconnect(carried_out=carried_out)
            first.connect()
            world.settle()
            assert len(world.children()) == 2
            assert first.registered == {1: True}
            world.end_session(first.kill())

    def test_the_tree_is_deleted_by_an_operator(self, world: World) -> None:
        first, second = provider(world, A), provider(world, B)
        world.delete("/mprpc")
        world.delete("/UserServiceRpc")
        world.settle(1)
        assert {world.nodes[path].owner for path in world.children()} == {first.session, second.session}
        assert world.seed_data() in (A, B)
        assert any("was deleted by somebody" in line for line in first.logged)

    def test_a_lost_watch_is_healed_by_the_audit(self, world: World) -> None:
        first = provider(world, A)
        world.watches.clear()
        world.delete("/mprpc")
        world.delete("/UserServiceRpc")
        world.settle()
        assert not world.children()
        world.settle(registrar.AUDIT * 1.5)
        assert first.registered == {1: True}
        assert len(world.children()) == 1
        assert world.seed_data() == A

    def test_a_session_that_expired_is_replaced_under_new_ids(self, world: World) -> None:
        first = provider(world, A)
        (old,) = world.children()
        first.expire()
        assert not world.children()
        first.connect()
        world.settle()
        (new,) = world.children()
        assert new != old
        assert world.nodes[new].owner == first.session
        assert world.seed_data() == A
        assert any("registered again" in line for line in first.logged)

    def test_the_old_session_is_purged_late(self, world: World) -> None:
        """Its nodes are still there when the new session registers, and what goes with it must not be ours."""
        first = provider(world, A)
        old = first.expire(purge=False)
        first.connect()
        world.settle()
        assert world.nodes[LOGIN].owner == first.session
        world.end_session(old)
        world.settle()
        assert [world.nodes[path].owner for path in world.children()] == [first.session]
        assert world.seed_data() == A

    def test_a_fast_restart_meets_its_own_ghost(self, world: World) -> None:
        """The seed skips the node of its earlier life, and disappears when the old session expires."""
        old = provider(world, A).kill()
        again = provider(world, A)
        assert world.nodes[LOGIN].owner == again.session
        assert again.registered == {1: True}
        follower = consumer(world)
        assert follower.endpoints() == [A]
        world.end_session(old)
        world.settle(1)
        assert world.nodes[LOGIN].owner == again.session
        assert follower.endpoints() == [A]

    def test_a_session_that_may_be_lost_is_told_before_kazoo_knows(self, world: World) -> None:
        first = provider(world, A)
        first.disconnect()
        world.settle(SESSION_TIMEOUT - 0.1)
        assert first.registered == {1: True}
        world.settle(0.2)
        assert first.registered == {1: False}
        assert any("may be registered no longer" in line for line in first.logged)
        first.connect()  # and yet the session lives
        world.settle()
        assert first.registered == {1: True}

    def test_a_short_break_keeps_the_nodes(self, world: World) -> None:
        first = provider(world, A)
        before = world.children()
        first.disconnect()
        first.connect()
        world.settle()
        assert world.children() == before
        assert first.registered == {1: True}

    def test_a_refusal_is_tried_again_at_a_growing_distance_and_said_once(self, world: World) -> None:
        world.refuse[Create] = "NoAuth"
        first = provider(world, A)
        world.settle(60)
        tried = [each for each in first.actions if isinstance(each, Request) and isinstance(each.operation, Create)]
        assert 20 < len(tried) < 60  # three nodes
        assert len([line for line in first.logged if "NoAuth" in line and "/mprpc/" in line]) <= 2
        world.refuse.clear()
        world.settle(40)
        assert first.registered == {1: True}

    def test_every_operation_refused_is_no_busy_loop(self, world: World) -> None:
        for kind in (Create, Delete, Exists, Read, Children, Transaction):
            world.refuse[kind] = "NoAuth"
        both = provider(world, A)
        both.follow()
        world.settle(60)
        assert len([each for each in both.actions if isinstance(each, Request)]) < 250

    def test_two_publications_of_one_process_share_a_claim(self, world: World) -> None:
        first = world.process(A)
        first.connect()
        first.publish(A, 1)
        first.publish(B, 2)
        world.settle()
        assert world.seed_data() == A
        assert len(world.children()) == 2
        first.withdraw(1)
        world.settle()
        assert world.seed_data() == B
        assert first.withdrawn == {1}
        first.withdraw(2)
        world.settle()
        assert world.seed_data() == ""
        assert not world.children()


class TestClaims:
    def test_two_providers_claim_a_node_at_once(self, world: World) -> None:
        """Both looked, both saw nothing, both create."""
        for seed in range(50):
            world = World(seed)
            pair = [world.process(address) for address in (A, B)]
            for each in pair:
                each.connect()
                each.publish()
            world.settle()
            assert world.nodes[LOGIN].owner in [each.session for each in pair]
            assert [each.registered for each in pair] == [{1: True}, {1: True}]
            owner, other = sorted(pair, key=lambda each: each.session != world.nodes[LOGIN].owner)
            world.end_session(owner.kill())
            world.settle()
            assert world.nodes[LOGIN].owner == other.session

    def test_a_node_of_another_is_left_and_taken_over_when_it_goes(self, world: World) -> None:
        first, second = provider(world, A), provider(world, B)
        assert world.seed_data() == A
        assert second.registered == {1: True}
        assert any(f"{LOGIN} is held by another provider" in line for line in second.logged)
        first.withdraw()
        world.settle()
        assert world.seed_data() == B
        assert any(f"{LOGIN} is ours now" in line for line in second.logged)

    def test_a_foreign_node_that_is_older_but_says_another_address_is_left(self, world: World) -> None:
        world.write(LOGIN, b"10.9.9.9:1", owner=7)
        provider(world, A)
        assert world.seed_data() == "10.9.9.9:1"
        world.end_session(7)
        world.settle()
        assert world.seed_data() == A

    def test_a_younger_node_with_our_address_is_left(self, world: World) -> None:
        """Of worker processes that share an address one claims, the others watch."""
        first = provider(world, A)
        world.delete("/UserServiceRpc")
        first.inbox.clear()  # it has not noticed yet
        world.write(LOGIN, A.encode(), owner=7)
        world.settle(registrar.AUDIT * 2)
        assert world.nodes[LOGIN].owner == 7

    def test_workers_share_a_claim_without_taking_it_from_each_other(self) -> None:
        """Processes with one shared address used to replace each other's nodes once, at their start."""
        for seed in range(50):
            world = World(seed)
            owners = []
            world.write(LOGIN, SHARED.encode(), owner=7)  # of the life before
            workers = [world.process(address) for address in (A, B, "10.0.0.3:8000")]
            for number, each in enumerate(workers):
                each.connect()
                each.publish(shared=SHARED, heir=number == 0)
            for _ in range(40):
                world.settle(0.1)
                owners.append(world.nodes[LOGIN].owner)
            assert set(owners) - {7} == {workers[0].session}
            assert world.seed_data() == SHARED
            assert [each.registered for each in workers] == [{1: True}] * 3

            world.end_session(workers[0].kill())
            world.settle()
            assert world.nodes[LOGIN].owner in [each.session for each in workers[1:]]
            assert world.seed_data() == SHARED

    def test_workers_without_their_heir_claim_after_a_moment(self, world: World) -> None:
        worker = world.process(B)
        worker.connect()
        worker.publish(shared=SHARED, heir=False)
        world.settle(registrar.HEIR_DELAY * 0.9)
        assert LOGIN not in world.nodes
        world.settle(registrar.HEIR_DELAY * 0.2)
        assert world.seed_data() == SHARED
        assert worker.registered == {1: True}

    def test_a_deletion_hits_a_new_owner(self, world: World) -> None:
        """`delete` has no guard but the version, and that of a new owner's node is 0 as well: it heals."""
        first, second = provider(world, A), provider(world, B)
        first.withdraw()  # its Delete is on the way …
        world.delete(LOGIN)  # … while an operator deletes the node, and the other one claims it
        while world.seed_data() != B:
            second.handle_one() if second.inbox else second.send_one()
        first.inbox.clear()
        world.settle()
        assert world.seed_data() == B
        assert world.nodes[LOGIN].owner == second.session

    def test_a_ghost_is_purged_between_the_look_and_the_replacement(self, world: World) -> None:
        ghost = provider(world, A).kill()
        other = provider(world, B)
        again = world.process(A)
        again.connect()
        again.publish()
        while not any(isinstance(each.operation, Transaction) for each in again.outbox):
            again.send_one() if again.outbox else again.handle_one()
        world.end_session(ghost)
        while world.seed_data() != B:
            other.handle_one() if other.inbox else other.send_one()
        world.settle()
        owner = next(each for each in (again, other) if each.session == world.nodes[LOGIN].owner)
        survivor = next(each for each in (again, other) if each is not owner)
        world.end_session(owner.kill())
        world.settle()
        assert world.seed_data() == survivor.address

    def test_somebody_changes_our_node(self, world: World) -> None:
        provider(world, A)
        world.write(LOGIN, b"10.6.6.6:6")
        world.settle()
        assert world.seed_data() == A

    def test_a_persistent_node_in_the_way_is_said(self, world: World) -> None:
        world.write(LOGIN, b"10.6.6.6:6")
        first = provider(world, A)
        assert first.registered == {1: True}
        assert any(f"{LOGIN} is a persistent node" in line for line in first.logged)
        world.delete(LOGIN)
        world.settle()
        assert world.seed_data() == A

    def test_leaving_deletes_the_seed_nodes_and_keeps_their_parent(self, world: World) -> None:
        first = provider(world, A)
        first.withdraw()
        world.settle()
        assert first.withdrawn == {1}
        assert world.children() == []
        assert world.children("/UserServiceRpc") == []
        assert "/UserServiceRpc" in world.nodes

    def test_leaving_without_a_connection_ends_when_it_is_back(self, world: World) -> None:
        first = provider(world, A)
        first.disconnect()
        first.withdraw()
        world.settle()
        assert first.withdrawn == set()
        first.connect()
        world.settle()
        assert first.withdrawn == {1}
        assert world.children() == []
        assert world.seed_data() == ""

    def test_leaving_before_the_first_connection_ends_at_once(self, world: World) -> None:
        first = world.process(A)
        first.publish()
        first.withdraw()
        assert first.withdrawn == {1}

    def test_wanted_again_while_it_is_being_deleted(self, world: World) -> None:
        first = provider(world, A)
        first.withdraw(1)
        first.publish(A, 2)
        world.settle()
        assert world.seed_data() == A
        assert first.withdrawn == {1}
        assert first.registered[2]


class TestFollowing:
    def test_the_first_list_takes_two_round_trips(self, world: World) -> None:
        provider(world, A)
        follower = world.process()
        follower.follow()
        follower.connect()
        rounds = 0
        while SERVICE not in follower.snapshots:
            while follower.inbox:
                follower.handle_one()
            rounds += bool(follower.outbox)
            while follower.outbox:
                follower.send_one()
        assert rounds == 2
        assert follower.snapshots[SERVICE] == Snapshot(follower.snapshots[SERVICE].endpoints, confirmed=True, version=1)
        assert follower.endpoints() == [A]

    def test_a_new_provider_is_listed_and_its_node_is_read_once(self, world: World) -> None:
        provider(world, A)
        follower = consumer(world)
        before = world.now
        provider(world, B)
        world.settle(0.5)
        assert follower.endpoints() == [A, B]
        assert world.now - before < 1
        reads = [each.operation for each in follower.actions if isinstance(each, Request)]
        instances = [each.path for each in reads if isinstance(each, Read) and each.path != PATH]
        assert len(instances) == len(set(instances)) == 2

    def test_a_burst_of_changes_is_read_ten_times_a_second(self, world: World) -> None:
        follower = consumer(world)
        asked = len(follower.actions)
        for number in range(100):
            world.write(f"{PATH}/i{number}", b"{}", owner=7)
            world.settle(0.01)
        lists = [
            each
            for each in follower.actions[asked:]
            if isinstance(each, Request) and isinstance(each.operation, Children)
        ]
        assert len(lists) <= 12

    def test_a_missing_path_is_watched_until_it_is_made(self, world: World) -> None:
        follower = consumer(world)
        assert follower.snapshots[SERVICE] == Snapshot(
            (), True, 1, (), "no provider of fixbug.UserServiceRpc is registered at ZooKeeper zk:2181"
        )
        for address in (A, B):  # deleted and made again as well
            first = provider(world, address)
            world.settle(0.5)
            assert follower.endpoints() == [address]
            world.end_session(first.kill())
            world.settle(0.5)
            world.delete("/mprpc")
            world.settle(0.5)
            assert follower.endpoints() == []

    def test_a_path_that_comes_and_goes_before_it_is_read_is_still_watched(self, world: World) -> None:
        """The watch on its absence was used up, and nothing set another one."""
        follower = consumer(world)
        world.write(PATH, None)
        world.delete(PATH)
        world.settle(0.5)
        provider(world, A)
        world.settle(0.5)
        assert follower.endpoints() == [A]

    def test_the_newest_registration_of_an_address_wins(self, world: World) -> None:
        ghost = provider(world, A).kill()
        follower = consumer(world)
        (old,) = follower.snapshots[SERVICE].endpoints
        again = world.process(A)
        again.connect()
        again.publish(weight=5.0)
        world.settle(0.5)
        (endpoint,) = follower.snapshots[SERVICE].endpoints
        assert endpoint.weight == 5.0
        assert endpoint.id != old.id
        world.end_session(ghost)
        world.settle(0.5)
        assert follower.snapshots[SERVICE].endpoints == (endpoint,)

    def test_one_of_three_that_goes_is_believed(self, world: World) -> None:
        going, _, _ = (provider(world, address) for address in (A, B, C))
        follower = consumer(world)
        world.end_session(going.expire())
        world.settle(0.5)
        assert follower.endpoints() == [B, C]
        assert not any(isinstance(action, Probe) for action in follower.actions)

    def test_a_list_that_becomes_empty_is_probed(self, world: World) -> None:
        first = provider(world, A)
        follower = consumer(world)
        world.delete("/mprpc")
        first.inbox.clear()  # it does not notice
        world.settle(0.5)
        assert follower.endpoints() == [A]
        assert not follower.snapshots[SERVICE].confirmed
        world.answering.discard(A)
        world.settle(directory.PROBE_AGAIN * 1.5)
        assert follower.endpoints() == []
        assert follower.snapshots[SERVICE].confirmed

    def test_a_list_that_loses_more_than_half_is_probed(self, world: World) -> None:
        one, two, _ = (provider(world, address) for address in (A, B, C))
        follower = consumer(world)
        one.running = two.running = False  # they hang, but one of them still answers
        for each in (one, two):
            each.disconnect()
            each.inbox.clear()
            world.end_session(each.session)
        world.answering.discard(B)
        world.settle(0.5)
        assert follower.endpoints() == [A, C]
        assert any("lost 2 of 3 of its providers" in line for line in follower.logged)

    def test_what_is_listed_again_is_doubted_no_longer(self, world: World) -> None:
        first = provider(world, A)
        follower = consumer(world)
        world.delete("/mprpc")
        world.settle(1)  # it registers again
        assert follower.endpoints() == [A]
        assert follower.snapshots[SERVICE].confirmed
        world.settle(directory.PROBE_AGAIN * 3)
        probes = [action for action in follower.actions if isinstance(action, Probe)]
        assert len(probes) <= 2
        assert first.registered == {1: True}

    def test_a_doubted_endpoint_that_a_caller_misses_is_probed_at_once(self, world: World) -> None:
        first = provider(world, A)
        follower = consumer(world)
        world.delete("/mprpc")
        first.inbox.clear()
        world.settle(0.5)
        world.answering.discard(A)
        follower.handle(ReportDown(SERVICE, A))
        world.settle()
        assert follower.endpoints() == []

    def test_a_listed_endpoint_that_a_caller_misses_has_the_list_read_at_most_every_few_seconds(
        self, world: World
    ) -> None:
        provider(world, A)
        follower = consumer(world)
        world.settle(directory.REREAD)
        reads = world.reads
        for _ in range(100):
            follower.handle(ReportDown(SERVICE, A))
            world.settle(0.01)
        assert world.reads == reads + 1

    def test_without_zookeeper_the_last_list_stays_unconfirmed(self, world: World) -> None:
        provider(world, A)
        follower = consumer(world)
        follower.disconnect()
        world.settle(90)
        assert follower.endpoints() == [A]
        assert not follower.snapshots[SERVICE].confirmed
        follower.connect()
        world.settle(directory.SPREAD)
        assert follower.snapshots[SERVICE].confirmed

    def test_a_reconnect_costs_two_reads_spread_over_two_seconds(self, world: World) -> None:
        provider(world, A)
        followers = [consumer(world) for _ in range(40)]
        for each in followers:
            each.disconnect()
            each.connect()
        reads = world.reads
        world.settle(0)
        at_once = world.reads - reads
        world.settle(directory.SPREAD)
        assert at_once == 0
        assert world.reads - reads == 2 * len(followers)
        world.settle(2)
        assert world.reads - reads == 2 * len(followers)

    def test_overrides_are_honoured_without_a_restart(self, world: World) -> None:
        for address in (A, B):
            provider(world, address)
        follower = consumer(world)
        for data, expected in (
            ({"instances": {A: {"disabled": True}}}, [(B, 1.0)]),
            ({"instances": {A: {"weight": 0.5}}, "weight": 4}, [(A, 0.5), (B, 4.0)]),
            ({"disabled": True}, []),
            ({}, [(A, 1.0), (B, 1.0)]),
        ):
            world.write(PATH, json.dumps(data).encode())
            world.settle(0.2)
            assert [(each.address, each.weight) for each in follower.snapshots[SERVICE].endpoints] == expected
            assert follower.snapshots[SERVICE].confirmed
        assert not any(isinstance(action, Probe) for action in follower.actions)

    def test_overrides_that_are_no_json_leave_the_last_ones_in_force(self, world: World) -> None:
        provider(world, A)
        follower = consumer(world)
        world.write(PATH, b'{"weight": 2}')
        world.settle(0.2)
        world.write(PATH, b'{"weight": 3')
        world.settle(0.2)
        assert follower.snapshots[SERVICE].endpoints[0].weight == 2.0
        assert any("the overrides in" in line for line in follower.logged)

    def test_everybody_disabled_is_said(self, world: World) -> None:
        provider(world, A)
        world.write(PATH, b'{"disabled": true}')
        assert (
            consumer(world).snapshots[SERVICE].note
            == f"every provider of {SERVICE} is disabled in {PATH} at ZooKeeper zk:2181"
        )

    def test_a_bad_instance_is_ignored_and_said_once(self, world: World) -> None:
        provider(world, A)
        world.write(f"{PATH}/bad", b"\xff", owner=7)
        world.write(f"{PATH}/off", json.dumps({"address": "10.0.0.9", "port": 1, "enabled": False}).encode(), owner=7)
        follower = consumer(world)
        world.settle(directory.AUDIT * 2)
        assert follower.endpoints() == [A]
        assert len([line for line in follower.logged if "/bad is ignored" in line]) == 1

    def test_more_instances_than_the_limit(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(directory, "MAX_INSTANCES", 5)
        for number in range(8):
            world.write(f"{PATH}/i{number}", json.dumps({"address": "h", "port": number + 1}).encode(), owner=7)
        follower = consumer(world)
        assert len(follower.endpoints()) == 5
        assert any("has 8 instances" in line for line in follower.logged)

    def test_a_service_that_is_followed_no_longer_costs_nothing(self, world: World) -> None:
        provider(world, A)
        follower = consumer(world)
        follower.handle(Unfollow(SERVICE))
        reads = world.reads
        provider(world, B)
        asked = [each for each in follower.actions if isinstance(each, Request)]
        world.settle(directory.AUDIT * 2)
        assert [each for each in follower.actions if isinstance(each, Request)] == asked
        assert world.reads > reads


class TestSeedLayout:
    def test_a_service_that_never_had_an_instance_is_looked_up_there(self, world: World) -> None:
        world.write(LOGIN, b"10.0.0.9:7000", owner=7)
        snapshot = consumer(world).snapshots[SERVICE]
        assert snapshot.endpoints == (Endpoint("10.0.0.9:7000", classic=True, id=LOGIN),)
        assert snapshot.for_method("Login") == snapshot.endpoints
        assert snapshot.for_method("Register") == ()
        assert snapshot.confirmed

    def test_also_when_an_operator_made_its_node(self, world: World) -> None:
        world.write(PATH, b'{"weight": 2}')
        world.write(LOGIN, b"10.0.0.9:7000", owner=7)
        assert consumer(world).endpoints() == ["10.0.0.9:7000"]

    def test_it_is_watched(self, world: World) -> None:
        follower = consumer(world)
        assert follower.endpoints() == []
        for address in (A, B):
            world.write(LOGIN, address.encode(), owner=7)
            world.settle(0.1)
            assert follower.endpoints() == [address]
            world.write(LOGIN, C.encode())
            world.settle(0.1)
            assert follower.endpoints() == [C]
            world.delete(LOGIN)
            world.settle(0.1)
            assert follower.endpoints() == []

    def test_an_instance_ends_it(self, world: World) -> None:
        world.write(LOGIN, b"10.0.0.9:7000", owner=7)
        follower = consumer(world)
        provider(world, A)
        world.settle(0.5)
        assert follower.snapshots[SERVICE].endpoints[0].address == A
        assert not follower.snapshots[SERVICE].endpoints[0].classic
        assert follower.snapshots[SERVICE].by_method == ()

    def test_never_an_address_that_is_known_as_framed(self, world: World) -> None:
        """All of our nodes are gone, the seed's are still there: that is no reason to speak classic to a framed one."""
        first = provider(world, A)
        follower = consumer(world)
        other = "fixbug.FriendServiceRpc"
        world.write("/FriendServiceRpc/Login", A.encode(), owner=7)
        follower.follow(other)
        world.settle(0.5)
        assert follower.endpoints(other) == []
        world.delete("/mprpc")
        first.inbox.clear()
        first.running = False
        world.settle(0.5)
        assert [endpoint.classic for endpoint in follower.snapshots[SERVICE].endpoints] == [False]
        world.answering.clear()
        world.settle(30)
        assert follower.endpoints() == []
        assert world.seed_data() == A

    def test_nonsense_there_is_ignored(self, world: World) -> None:
        world.write(LOGIN, b"nobody", owner=7)
        follower = consumer(world)
        assert follower.endpoints() == []
        assert any(f"{LOGIN} is ignored" in line for line in follower.logged)

    def test_addresses_known_as_framed_are_bounded(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """The oldest is forgotten, and may then be called in the classic dialect, which our providers speak as well."""
        monkeypatch.setattr(directory, "MAX_KNOWN", 2)
        provider(world, A)
        follower = consumer(world)
        for address in (B, C):
            provider(world, address)
            world.settle(0.5)
        for short, address in (("Old", A), ("New", C)):
            world.write(f"/{short}/Login", address.encode(), owner=7)
            follower.follow(f"fixbug.{short}")
        world.settle(0.5)
        assert follower.endpoints("fixbug.New") == []
        assert follower.endpoints("fixbug.Old") in ([A], [])  # A is listed, so it may be the newest again


class TestSaved:
    saved = Snapshot((Endpoint(A), Endpoint(B)))

    def test_without_zookeeper_a_saved_list_is_shown_unconfirmed(self, world: World) -> None:
        follower = world.process()
        follower.follow(saved=self.saved)
        world.settle(directory.SAVED_AFTER - 0.1)
        assert not follower.snapshots
        world.settle(0.2)
        assert follower.endpoints() == [A, B]
        assert not follower.snapshots[SERVICE].confirmed

    def test_what_zookeeper_then_says_counts_at_once(self, world: World) -> None:
        provider(world, A)
        follower = world.process()
        follower.follow(saved=self.saved)
        world.settle(1)
        follower.connect()
        world.settle(0.1)
        assert follower.endpoints() == [A]
        assert follower.snapshots[SERVICE].confirmed

    def test_with_zookeeper_it_is_not_used(self, world: World) -> None:
        provider(world, C)
        follower = world.process()
        follower.connect()
        follower.follow(saved=self.saved)
        world.settle(5)
        assert follower.endpoints() == [C]
        assert not any("earlier list" in line for line in follower.logged)

    def test_confirmed_lists_alone_are_saved(self, world: World) -> None:
        provider(world, A)
        follower = consumer(world)
        assert follower.saved[SERVICE].endpoints[0].address == A
        saves = [action for action in follower.actions if isinstance(action, Save)]
        follower.disconnect()
        world.settle(1)
        assert [action for action in follower.actions if isinstance(action, Save)] == saves

    def test_a_saved_list_of_the_seed_layout(self, world: World) -> None:
        classic = Endpoint(A, classic=True, id=LOGIN)
        follower = world.process()
        follower.follow(saved=Snapshot((classic,), by_method=(("Login", classic),)))
        world.settle(1)
        assert follower.snapshots[SERVICE].for_method("Login") == (classic,)
        follower.connect()
        world.settle(1)
        assert follower.endpoints() == []


class TestClient:
    def test_a_client_that_finds_no_connection_for_long_is_replaced_again_and_again(self, world: World) -> None:
        first = provider(world, A)
        first.disconnect()
        world.settle(60)
        replaced = [action for action in first.actions if isinstance(action, Replace)]
        assert 4 <= len(replaced) <= 60 / (2 * SESSION_TIMEOUT)

    def test_an_answer_that_never_comes(self, world: World) -> None:
        first = world.process(A)
        first.connect()
        first.handle_one()
        first.publish()
        first.outbox.clear()
        world.settle(reconciler.LATE_ANSWER - 0.1)
        assert first.connected
        world.settle(0.2)
        assert not first.connected
        first.connect()
        world.settle()
        assert first.registered == {1: True}

    def test_answers_that_come_slowly_are_no_sign_of_a_wedged_client(self) -> None:
        """A busy process, which needed longer than that for all the answers to one list, began anew for ever."""
        made = Reconciler(where="zk", root="/mprpc", process="p", timeout=10.0, random=lambda: 0.5)
        made.handle(Connected(1, 10.0), 0.0)
        asked = made.handle(Follow("fixbug.UserServiceRpc", (), None), 0.0)
        tokens = [action.token for action in asked if isinstance(action, Request)]
        names = tuple(str(number) for number in range(5))
        actions = made.handle(Answer(tokens[0], (names, Stat(1, 0, 1, 0))), 0.0)
        tokens = tokens[1:] + [action.token for action in actions if isinstance(action, Request)]
        now = 0.0
        while len(tokens) > 1:
            now += 6.0
            assert not [each for each in made.handle(Tick(), now) if isinstance(each, Replace)]
            assert not [
                each for each in made.handle(Answer(tokens.pop(0), error="NoNode"), now) if isinstance(each, Replace)
            ]
        assert [each for each in made.handle(Tick(), now + 10.0) if isinstance(each, Replace)]

    def test_a_client_that_ended_is_replaced_at_a_growing_distance(self, world: World) -> None:
        first = provider(world, A)
        replaced = []
        for _ in range(8):
            first.end("it refuses our credentials")
            before = world.now
            while not any(isinstance(action, Replace) for action in first.actions):
                world.settle(0.5)
            replaced.append(world.now - before)
            first.actions.clear()
        assert replaced[0] <= 1.5
        assert replaced[-1] == pytest.approx(reconciler.REPLACE_DELAYS[1], abs=1)


LEFTOVERS = 20


def test_nodes_that_wait_for_their_deletion_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each session that begins and breaks before anything is deleted leaves another one to delete."""
    monkeypatch.setattr(registrar, "MAX_LEFTOVERS", LEFTOVERS)
    first = provider(world, A)
    for _ in range(LEFTOVERS * 2):
        first.expire()
        first.handle_one()
        first.connect()
        first.handle_one()
    deletes = [each for each in first.outbox if isinstance(each.operation, Delete)]
    assert len(deletes) <= LEFTOVERS + 1


@pytest.mark.parametrize("seed", range(150))
def test_faults_at_random(seed: int) -> None:
    """Whatever happens: in the end every live provider is listed, nobody else, and each seed node has an owner."""
    world = World(seed)
    chance = random.Random(seed)
    providers = [provider(world, address) for address in (A, B, C)]
    follower = consumer(world)
    ghosts: list[int] = []

    def restart() -> None:
        index = chance.randrange(len(providers))
        ghosts.append(providers[index].kill())
        again = providers[index] = world.process(providers[index].address)
        again.connect()
        again.publish()

    def breaks() -> None:
        one = chance.choice([*providers, follower])
        one.disconnect(carried_out=chance.randrange(3))

    faults: list[Callable[[], object]] = [
        lambda: ghosts.append(chance.choice(providers).expire(purge=False)),
        lambda: chance.choice([*providers, follower]).expire(),
        breaks,
        restart,
        lambda: world.delete(chance.choice(["/mprpc", "/UserServiceRpc", PATH, LOGIN])),
        lambda: world.end_session(ghosts.pop()) if ghosts else None,
        lambda: world.write(LOGIN, b"10.6.6.6:6"),
        lambda: chance.choice(providers).publish(weight=chance.random()),
    ]
    for _ in range(30):
        chance.choice(faults)()
        for _ in range(chance.randrange(12)):
            one = chance.choice([each for each in world.processes if each.running])
            if one.inbox and chance.random() < 0.5:
                one.handle_one()
            elif one.outbox:
                one.send_one()
        if chance.random() < 0.3:
            world.settle(chance.random() * 5)
        for each in (*providers, follower):
            if not each.connected and chance.random() < 0.5:
                each.connect()
    for each in (*providers, follower):
        if not each.connected:
            each.connect()
    for ghost in ghosts:
        world.end_session(ghost)
    if world.nodes.get(LOGIN) and not world.nodes[LOGIN].owner:
        world.delete(LOGIN)  # an operator's, who made it by changing what was gone
    world.settle(4.0)
    sessions = {each.session for each in providers}
    assert follower.endpoints() == [A, B, C]
    assert follower.snapshots[SERVICE].confirmed
    assert sorted(world.nodes[path].owner for path in world.children()) == sorted(sessions)
    for path in (LOGIN, "/UserServiceRpc/Register"):
        assert world.nodes[path].owner in sessions
        owner = next(each for each in providers if each.session == world.nodes[path].owner)
        assert world.seed_data(path) == owner.address
    assert all(each.registered == {1: True} for each in providers)
    for each in providers:
        each.withdraw()
    world.settle()
    assert not world.children()
    assert not world.children("/UserServiceRpc")
    assert all(each.withdrawn == {1} for each in providers)
