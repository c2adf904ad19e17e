"""What an operator sees of the discovery, and what he says: services, their instances, the overrides.

An operator takes instances out of rotation, or weighs them anew, by the data of the service's znode; one watch
tells every consumer. Each function here has a ZooKeeper session of its own while it runs, and asks for all that it
wants to know at once.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from mprpc.errors import Unavailable
from mprpc.layout import (
    Instance,
    Override,
    Overrides,
    address_of,
    ancestors,
    check_service,
    edit_overrides,
    parse_address,
    parse_instance,
    parse_overrides,
    service_path,
)
from mprpc.zookeeper_client import ZooKeeperClient, own_acl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mprpc.config import MprpcConfig

    T = TypeVar("T")

__all__ = ["MAX_EDITS", "Described", "Instance", "Override", "Overrides", "describe", "set_override"]

MAX_EDITS = 10
"""Tries to change overrides that others change at the same time. Operators are people: one more is rare."""


class Described(NamedTuple):
    """A service as ZooKeeper has it: its overrides, and its instances with their own weights, by address."""

    service: str
    overrides: Overrides
    instances: tuple[Instance, ...]
    note: str = ""  # what in its znodes is not understood


def describe(config: MprpcConfig, timeout: float = 5.0) -> list[Described]:
    """All services below the root, by name, for a person to look at. Any thread; blocks.

    Raises Unavailable when ZooKeeper can't be reached within `timeout` seconds.
    """
    with ZooKeeperClient.connected(config, timeout) as kazoo, _errors(config):
        services = sorted(_children(kazoo.get_children_async(config.root), timeout))
        listings = {name: kazoo.get_children_async(service_path(config.root, name)) for name in services}
        datas = {name: kazoo.get_async(service_path(config.root, name)) for name in services}
        return [_describe(kazoo, config, name, listings[name], datas[name], timeout) for name in services]


def _describe(kazoo: Any, config: MprpcConfig, service: str, listing: Any, data: Any, timeout: float) -> Described:
    path = service_path(config.root, service)
    reads = {name: kazoo.get_async(f"{path}/{name}") for name in sorted(_children(listing, timeout))}
    notes: list[str] = []
    overrides = _understand(parse_overrides, _data(data, timeout), f"{path}: the overrides are ignored, as {{}}", notes)
    found = []
    for name, read in reads.items():
        content = _data(read, timeout)
        if content is not None:
            found.append(
                _understand(partial(parse_instance, name), content, f"{path}/{name} is ignored, as {{}}", notes)
            )
    instances = sorted((instance for instance in found if instance), key=lambda instance: instance.endpoint.address)
    return Described(service, overrides or Overrides(), tuple(instances), "; ".join(notes))


def set_override(
    config: MprpcConfig, service: str, address: str, override: Override, timeout: float = 5.0
) -> Overrides:
    """Set what an operator says of the instance at `address`, or of the whole service where that is "". The default
    `Override()` takes back what was said. Consumers honour it within their watch. Returns what is in force then.

    Any thread; blocks. Raises ValueError for an impossible service, address or weight and where the present overrides
    are not understood, Unavailable when ZooKeeper can't be reached within `timeout` seconds or refuses.
    """
    check_service(service)
    if address:
        address = address_of(*parse_address(address))
    if override.weight is not None and not 0 <= override.weight < float("inf"):
        raise ValueError(f"weight={override.weight}: must be a number from 0")
    path = service_path(config.root, service)
    with ZooKeeperClient.connected(config, timeout) as kazoo, _errors(config):
        for _ in range(MAX_EDITS):
            data = _edit(kazoo, config, path, address, override)
            if data is not None:
                return parse_overrides(data)
    raise Unavailable(f"{path} is being changed by others all the time; try again")


def _edit(kazoo: Any, config: MprpcConfig, path: str, address: str, override: Override) -> bytes | None:
    """The data that was written; None if somebody else was faster."""
    from kazoo.exceptions import BadVersionError, NodeExistsError, NoNodeError

    try:
        old, stat = kazoo.get(path)
        data = edit_overrides(old, address, override)
        kazoo.set(path, data, stat.version)
    except NoNodeError:
        acl = own_acl(config)
        for parent in (*ancestors(path), path):
            with suppress(NodeExistsError):
                kazoo.create(parent, None, acl)
        return None
    except BadVersionError:
        return None
    return data


def _children(listing: Any, timeout: float) -> list[str]:
    from kazoo.exceptions import NoNodeError

    try:
        return list(listing.get(timeout=timeout))
    except NoNodeError:
        return []


def _data(read: Any, timeout: float) -> bytes | None:
    from kazoo.exceptions import NoNodeError

    try:
        return bytes(read.get(timeout=timeout)[0] or b"")
    except NoNodeError:
        return None


def _understand(parse: Callable[[bytes | None], T], data: bytes | None, text: str, notes: list[str]) -> T | None:
    try:
        return parse(data)
    except ValueError as error:
        notes.append(text.format(error))
        return None


@contextmanager
def _errors(config: MprpcConfig) -> Iterator[None]:
    """kazoo's errors as ours."""
    from kazoo.exceptions import KazooException
    from kazoo.handlers.threading import KazooTimeoutError

    try:
        yield
    except (KazooException, KazooTimeoutError) as error:
        raise Unavailable(f"ZooKeeper {config.zookeeper_hosts}: {type(error).__name__.removesuffix('Error')}") from None
