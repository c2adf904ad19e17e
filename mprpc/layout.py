"""The znodes: which paths there are in ZooKeeper, and what their bytes say. Two layouts stand side by side.

The seed's, read by C++ consumers: `/UserServiceRpc` (persistent) and `/UserServiceRpc/Login` (ephemeral, "ip:port"),
one IPv4 address for a method. And the instances': `/mprpc/fixbug.UserServiceRpc` (persistent, its data an operator's
overrides) and `/mprpc/fixbug.UserServiceRpc/<instance id>` (ephemeral), whose data is Apache Curator's
`ServiceInstance` with the payload that Spring Cloud ZooKeeper reads; ours are keys of that payload's metadata.

What is written is written in one form. What is read was written by anybody: everything that isn't understood is
ignored where it is an extra, and a ValueError where an address depends on it. Pure functions of text and bytes.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = [
    "MAX_DATA",
    "Endpoint",
    "Instance",
    "Override",
    "Overrides",
    "Registration",
    "address_of",
    "ancestors",
    "check_service",
    "edit_overrides",
    "instance_data",
    "is_ipv4",
    "parse_address",
    "parse_instance",
    "parse_overrides",
    "parse_seed",
    "seed_path",
    "service_path",
]

MAX_DATA = 256 * 1024
"""Bytes of a znode's data that are parsed. ZooKeeper allows 1 MiB, ours has hundreds of bytes; a service with a
thousand overridden instances stays under it, and a consumer's memory does not depend on what others write."""

_PAYLOAD_CLASS = "org.springframework.cloud.zookeeper.discovery.ZookeeperInstance"
_PROTOCOL = "1"


class Registration(NamedTuple):
    """One service as a provider publishes it: its full proto name, its methods, and the address that callers reach.

    `host` is an IPv4 or IPv6 address without brackets, or a host name; `weight` is relative to other providers.
    `shared` is for processes that serve one address together beside their own: "host:port" of that, which the seed's
    znodes name instead; of these processes only the one that is `heir` replaces what an earlier life left there.
    """

    service: str
    methods: tuple[str, ...]
    host: str
    port: int
    weight: float = 1.0
    zone: str = ""
    tags: tuple[str, ...] = ()
    shared: str = ""
    heir: bool = True

    @property
    def address(self) -> str:
        return address_of(self.host, self.port)

    @property
    def seed_address(self) -> str:
        """What the seed's znodes say, empty where nobody could read it: C++ consumers know IPv4 only."""
        address = self.shared or self.address
        return address if is_ipv4(address.rpartition(":")[0]) else ""


class Endpoint(NamedTuple):
    """Where a service can be called. `address` is "10.0.0.1:8000" or "[::1]:8000"; `classic` says that it is known
    from the seed's layout alone, so that nothing but the classic dialect may be spoken to it; `id` is its znode's."""

    address: str
    classic: bool = False
    weight: float = 1.0
    zone: str = ""
    tags: tuple[str, ...] = ()
    id: str = ""


class Instance(NamedTuple):
    """What an instance's znode says: the endpoint, the methods it names, and whether it takes calls."""

    endpoint: Endpoint
    methods: tuple[str, ...]
    enabled: bool


class Override(NamedTuple):
    """What an operator says of a service or an instance: take it out of rotation, or another weight (None: its own)."""

    disabled: bool = False
    weight: float | None = None


class Overrides(NamedTuple):
    """The data of a service's znode: for the service as a whole, and by the instances' addresses."""

    service: Override = Override()
    instances: Mapping[str, Override] = {}

    def apply(self, endpoint: Endpoint) -> Endpoint | None:
        """`endpoint` with its weight overridden, None if it is disabled. The instance's word is the last."""
        mine = self.instances.get(endpoint.address, Override())
        if self.service.disabled or mine.disabled:
            return None
        weights = (weight for weight in (mine.weight, self.service.weight, endpoint.weight) if weight is not None)
        return endpoint._replace(weight=next(weights))


def check_service(service: str) -> None:
    """Raises ValueError for a service's name that is no component of a znode's path."""
    if not service or service in (".", "..") or "/" in service or not service.isprintable():
        raise ValueError(f"{service!r} is no service's name; it looks like fixbug.UserServiceRpc")


def service_path(root: str, service: str) -> str:
    return f"{root}/{service}"


def seed_path(service: str, method: str) -> str:
    """Where C++ consumers look for a method: its service's short name counts, outside of any root."""
    return f"/{service.rpartition('.')[2]}/{method}"


def ancestors(path: str) -> Iterator[str]:
    """The znodes above `path`, the uppermost first."""
    parts = path.split("/")[1:-1]
    return ("/" + "/".join(parts[: count + 1]) for count in range(len(parts)))


def is_ipv4(host: str) -> bool:
    """Whether `host` is what a C++ consumer can connect to: it calls inet_addr, which takes four numbers."""
    parts = host.split(".")
    return len(parts) == 4 and all(part.isascii() and part.isdigit() and int(part) < 256 for part in parts)


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_address(text: str) -> tuple[str, int]:
    """Host (an IPv6 one without its brackets) and port. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and bare and bare.isprintable() and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{text[:80]!r} is no address; one looks like 10.0.0.1:8000 or [::1]:8000")
    if (":" in bare) != (host is not bare):
        raise ValueError(f"{text[:80]!r}: an IPv6 address stands in brackets, and nothing else does")
    return bare, int(port)


def instance_data(registration: Registration, instance_id: str, utc: float) -> bytes:
    """The bytes of an instance's znode; `utc` is the time of the registration, seconds since the epoch."""
    metadata = {
        "protocol": _PROTOCOL,
        "weight": repr(float(registration.weight)),
        "zone": registration.zone,
        "tags": ",".join(registration.tags),
        "methods": ",".join(registration.methods),
    }
    payload = {"@class": _PAYLOAD_CLASS, "id": instance_id, "name": registration.service, "metadata": metadata}
    instance = {
        "name": registration.service,
        "id": instance_id,
        "address": registration.host,
        "port": registration.port,
        "sslPort": None,
        "payload": payload,
        "registrationTimeUTC": int(utc * 1000),
        "serviceType": "DYNAMIC",
        "uriSpec": None,
        "enabled": True,
    }
    return json.dumps(instance, separators=(",", ":")).encode()


def parse_instance(instance_id: str, data: bytes | None) -> Instance:
    """What the znode `instance_id` says. Without our metadata (a foreign program wrote it) the defaults hold.

    Raises ValueError, one line, when there is no address in it.
    """
    said = _object(data)
    host, port = said.get("address"), said.get("port")
    address = address_of(*parse_address(address_of(str(host), port if type(port) is int else 0)))
    metadata = _within(_within(said, "payload"), "metadata")
    endpoint = Endpoint(
        address,
        weight=_weight(metadata.get("weight"), default=1.0),
        zone=_text(metadata, "zone"),
        tags=_words(metadata, "tags"),
        id=instance_id,
    )
    return Instance(endpoint, _words(metadata, "methods"), enabled=said.get("enabled") is not False)


def parse_overrides(data: bytes | None) -> Overrides:
    """What a service's znode says; no data says nothing. Raises ValueError, one line, for what is no JSON object."""
    if not data:
        return Overrides()
    said = _object(data)
    instances = _within(said, "instances")
    return Overrides(_override(said), {address: _override(_within(instances, address)) for address in instances})


def edit_overrides(data: bytes | None, address: str, override: Override) -> bytes:
    """`data` with the override of the instance at `address`, or of the service where that is "", set to `override`.

    Keys that this version does not know are kept. Raises ValueError for data that is no JSON object.
    """
    said = _object(data) if data else {}
    instances = _within(said, "instances")
    mine = _within(instances, address) if address else said
    for key, value in (("disabled", override.disabled or None), ("weight", override.weight)):
        mine.pop(key, None)
        if value is not None:
            mine[key] = value
    if address:
        instances.pop(address, None)
        said["instances"] = instances | ({address: mine} if mine else {})
    if not said.get("instances"):
        said.pop("instances", None)
    return json.dumps(said, separators=(",", ":"), sort_keys=True).encode() if said else b""


def parse_seed(data: bytes | None) -> str:
    """The address that a method's znode of the seed's layout holds. Raises ValueError."""
    try:
        text = (data or b"")[:MAX_DATA].decode("ascii").rstrip("\0")
    except UnicodeDecodeError:
        raise ValueError("its data is no address") from None
    return address_of(*parse_address(text))


def _object(data: bytes | None) -> dict[str, object]:
    if data is not None and len(data) > MAX_DATA:
        raise ValueError(f"it has {len(data)} bytes, of which at most {MAX_DATA} are read")
    try:
        said = json.loads(data or b"")
    except (ValueError, RecursionError):
        raise ValueError("it is no JSON") from None
    if isinstance(said, dict):
        return said
    raise ValueError("it is no JSON object")


def _within(said: dict[str, object], key: str) -> dict[str, object]:
    inner = said.get(key)
    return inner if isinstance(inner, dict) else {}


def _text(said: dict[str, object], key: str) -> str:
    text = said.get(key)
    return text if isinstance(text, str) else ""


def _words(said: dict[str, object], key: str) -> tuple[str, ...]:
    return tuple(word for word in _text(said, key).split(",") if word)


def _override(said: dict[str, object]) -> Override:
    weight = _weight(said.get("weight"), default=-1.0)
    return Override(said.get("disabled") is True, None if weight < 0 else weight)


def _weight(said: object, default: float) -> float:
    if isinstance(said, bool) or not isinstance(said, (int, float, str)):
        return default
    try:
        weight = float(said)
    except (ValueError, OverflowError):
        return default
    return weight if math.isfinite(weight) and weight >= 0 else default
