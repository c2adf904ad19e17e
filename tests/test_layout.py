"""What znodes say, by literal bytes: ours, Curator's, Spring Cloud's, the seed's, and nonsense."""

from __future__ import annotations

import json

import pytest

from mprpc import layout
from mprpc.layout import (
    Endpoint,
    Override,
    Overrides,
    Registration,
    edit_overrides,
    instance_data,
    parse_address,
    parse_instance,
    parse_overrides,
    parse_seed,
)

OURS = (
    b'{"name":"fixbug.UserServiceRpc","id":"0a1b-1","address":"10.0.0.1","port":8000,"sslPort":null,'
    b'"payload":{"@class":"org.springframework.cloud.zookeeper.discovery.ZookeeperInstance","id":"0a1b-1",'
    b'"name":"fixbug.UserServiceRpc","metadata":{"protocol":"1","weight":"2.5","zone":"b","tags":"x,y",'
    b'"methods":"Login,Register"}},"registrationTimeUTC":1700000000123,"serviceType":"DYNAMIC","uriSpec":null,'
    b'"enabled":true}'
)
CURATOR = (
    b'{"name":"test","id":"ca2fff8e-d756-480c-b59e-8297ff88624b","address":"10.20.30.40","port":1234,"sslPort":null,'
    b'"payload":"From Test","registrationTimeUTC":1325129459728,"serviceType":"STATIC",'
    b'"uriSpec":{"parts":[{"value":"scheme","variable":true}]}}'
)
SPRING = (
    b'{"name":"users","id":"9f","address":"host.example","port":8080,"sslPort":null,"payload":{"@class":'
    b'"org.springframework.cloud.zookeeper.discovery.ZookeeperInstance","id":"application-1","name":"users",'
    b'"metadata":{"instance_status":"UP"}},"registrationTimeUTC":1700000000123,"serviceType":"DYNAMIC",'
    b'"uriSpec":{"parts":[]},"enabled":false}'
)


def test_what_an_instance_writes() -> None:
    registration = Registration("fixbug.UserServiceRpc", ("Login", "Register"), "10.0.0.1", 8000, 2.5, "b", ("x", "y"))
    assert instance_data(registration, "0a1b-1", 1700000000.1234) == OURS


def test_what_is_read_of_ours() -> None:
    instance = parse_instance("0a1b-1", OURS)
    assert instance.endpoint == Endpoint("10.0.0.1:8000", False, 2.5, "b", ("x", "y"), "0a1b-1")
    assert instance.methods == ("Login", "Register")
    assert instance.enabled


def test_what_is_read_of_curators_own() -> None:
    assert parse_instance("ca2f", CURATOR) == ((("10.20.30.40:1234", False, 1.0, "", (), "ca2f")), (), True)


def test_what_is_read_of_spring_clouds() -> None:
    instance = parse_instance("9f", SPRING)
    assert instance.endpoint == Endpoint("host.example:8080", id="9f")
    assert not instance.enabled


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (None, "it is no JSON"),
        (b"", "it is no JSON"),
        (b"\xff", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b"[]", "it is no JSON object"),
        (b"{}", "is no address"),
        (b'{"address":"a"}', "is no address"),
        (b'{"address":"a","port":true}', "is no address"),
        (b'{"address":"a","port":65536}', "is no address"),
        (b'{"address":"a","port":0}', "is no address"),
        (b'{"address":"","port":1}', "is no address"),
        (b'{"address":"a\\nb","port":1}', "is no address"),
    ],
)
def test_an_instance_without_an_address(data: bytes | None, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_instance("x", data)


@pytest.mark.parametrize("weight", ['"nan"', '"-1"', "-1", '"x"', "null", "true", "[]", "1e999", '"inf"'])
def test_a_weight_that_is_none_is_one(weight: str) -> None:
    data = f'{{"address":"a","port":1,"payload":{{"metadata":{{"weight":{weight}}}}}}}'.encode()
    assert parse_instance("x", data).endpoint.weight == 1.0


def test_more_data_than_the_limit() -> None:
    big = OURS[:-1] + b" " * layout.MAX_DATA + b"}"
    with pytest.raises(ValueError, match=f"of which at most {layout.MAX_DATA} are read"):
        parse_instance("x", big)


def test_addresses() -> None:
    assert parse_address("10.0.0.1:8000") == ("10.0.0.1", 8000)
    assert parse_address("[::1]:8000") == ("::1", 8000)
    assert layout.address_of("::1", 8000) == "[::1]:8000"
    for text in ("", ":", "a", "a:", ":1", "a:b", "a:99999", "::1:8000", "[a]:1", "a:-1", "a:\u0661"):
        with pytest.raises(ValueError, match="address"):
            parse_address(text)


def test_what_a_cpp_consumer_can_connect_to() -> None:
    assert layout.is_ipv4("127.0.0.1")
    for host in ("localhost", "::1", "1.2.3", "1.2.3.4.5", "1.2.3.256", "1.2.3.x", "1.2.3.²", "1.2.3."):
        assert not layout.is_ipv4(host)


def test_the_seeds_node() -> None:
    assert parse_seed(b"127.0.0.1:8000") == "127.0.0.1:8000"
    assert parse_seed(b"127.0.0.1:8000\0") == "127.0.0.1:8000"
    for data in (None, b"", b"x", b"\xff:1", b"127.0.0.1:"):
        with pytest.raises(ValueError, match="address"):
            parse_seed(data)


def test_paths() -> None:
    assert layout.seed_path("fixbug.UserServiceRpc", "Login") == "/UserServiceRpc/Login"
    assert layout.seed_path("UserServiceRpc", "Login") == "/UserServiceRpc/Login"
    assert layout.service_path("/a/b", "x.Y") == "/a/b/x.Y"
    assert list(layout.ancestors("/a/b/x.Y/id")) == ["/a", "/a/b", "/a/b/x.Y"]


class TestOverrides:
    written = b'{"instances":{"10.0.0.1:1":{"disabled":true},"10.0.0.2:1":{"weight":0.5}},"weight":3}'

    def test_they_are_read_and_applied(self) -> None:
        overrides = parse_overrides(self.written)
        assert overrides.apply(Endpoint("10.0.0.1:1")) is None
        assert overrides.apply(Endpoint("10.0.0.2:1")) == Endpoint("10.0.0.2:1", weight=0.5)
        assert overrides.apply(Endpoint("10.0.0.3:1")) == Endpoint("10.0.0.3:1", weight=3.0)
        assert parse_overrides(b'{"disabled":true}').apply(Endpoint("10.0.0.3:1")) is None

    @pytest.mark.parametrize("data", [None, b"", b"{}", b'{"instances":7,"disabled":"yes","weight":"heavy"}'])
    def test_nothing_is_overridden(self, data: bytes | None) -> None:
        assert parse_overrides(data).apply(Endpoint("a:1", weight=2.0)) == Endpoint("a:1", weight=2.0)

    def test_editing_keeps_what_it_does_not_know(self) -> None:
        data = edit_overrides(b'{"x":[1],"instances":{"a:1":{"note":"n"}}}', "a:1", Override(True, 2.0))
        assert json.loads(data) == {"x": [1], "instances": {"a:1": {"note": "n", "disabled": True, "weight": 2.0}}}
        data = edit_overrides(data, "a:1", Override())
        assert json.loads(data) == {"x": [1], "instances": {"a:1": {"note": "n"}}}

    def test_editing_leaves_nothing_behind(self) -> None:
        data = edit_overrides(None, "a:1", Override(disabled=True))
        assert data == b'{"instances":{"a:1":{"disabled":true}}}'
        assert edit_overrides(data, "a:1", Override()) == b""
        assert edit_overrides(b"", "", Override(weight=0.0)) == b'{"weight":0.0}'
        assert edit_overrides(b'{"weight":1,"disabled":true}', "", Override()) == b""

    def test_editing_nonsense_is_refused(self) -> None:
        with pytest.raises(ValueError, match="it is no JSON"):
            edit_overrides(b"{", "", Override())

    def test_the_default_is_everything_as_registered(self) -> None:
        assert Overrides().apply(Endpoint("a:1", weight=4.0)) == Endpoint("a:1", weight=4.0)
