"""`python -m mprpc registry`: what is registered, as a table; and an operator's word on it.

    python -m mprpc registry --zookeeper 10.0.0.1 list
    python -m mprpc registry -i test.conf set fixbug.UserServiceRpc 10.0.0.2:8000 --disable

Errors are one line. Exit codes: 0 all is well, 1 ZooKeeper can't be reached or refuses, 2 wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mprpc.administration import Described, Override, describe, set_override
from mprpc.config import MprpcConfig
from mprpc.errors import ConfigError, RpcError
from mprpc.layout import address_of, check_service, parse_address

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mprpc.administration import Instance, Overrides

__all__ = ["main"]

_HEADINGS = ("SERVICE", "ADDRESS", "STATE", "WEIGHT", "OVERRIDE", "ZONE", "TAGS", "METHODS")
_NOTHING = "-"
_LONGEST = 3600  # seconds that somebody waits for an answer at the most


def main(argv: Sequence[str] | None = None, prog: str = "python -m mprpc registry") -> int:
    """Runs the command and returns its exit code; wrong usage exits with 2."""
    options = _parser(prog).parse_args(argv)
    try:
        config = _config(options)
        if options.action == "set":
            _set(config, options, options.timeout)
        else:
            _list(config, options.timeout)
    except (ConfigError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except RpcError as error:
        print(f"{prog}: {error.text}", file=sys.stderr)
        return 1
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Shows the registry, and sets overrides.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("-i", dest="file", metavar="FILE", help="a configuration, such as test.conf")
    where.add_argument("--zookeeper", metavar="HOSTS", help="HOST, HOST:PORT, or a list of them between commas")
    parser.add_argument("--timeout", metavar="S", type=_seconds, default=5.0, help="for ZooKeeper to answer (5)")
    actions = parser.add_subparsers(dest="action", metavar="list|set", help="list is the default")
    actions.add_parser("list", help="services, instances and overrides")
    setting = actions.add_parser("set", help="an override, of an instance or of the whole service")
    setting.add_argument("service", metavar="SERVICE", help="the full name, such as fixbug.UserServiceRpc")
    setting.add_argument("address", metavar="ADDRESS", nargs="?", default="", help="of an instance: host:port")
    state = setting.add_mutually_exclusive_group()
    state.add_argument("--disable", dest="disabled", action="store_true", default=None, help="no more calls")
    state.add_argument("--enable", dest="disabled", action="store_false", help="calls again")
    setting.add_argument("--weight", metavar="W", type=_weight, help="a number from 0, or own: the provider's own")
    setting.set_defaults(fail=setting.error)
    return parser


def _weight(text: str) -> float:
    """-1 for the provider's own, as None is what argparse leaves where nothing is said."""
    if text == "own":
        return -1.0
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no weight: give a number from 0, or own")
    return weight


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= _LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds up to {_LONGEST}")
    return seconds


def _config(options: argparse.Namespace) -> MprpcConfig:
    config = MprpcConfig.load(options.file) if options.file else MprpcConfig(zookeeperip=options.zookeeper)
    if not config.zookeeper_hosts:
        raise ConfigError(f"{options.file or '--zookeeper'}: names no ZooKeeper (zookeeperip), so there is no registry")
    return config


def _set(config: MprpcConfig, options: argparse.Namespace, timeout: float) -> None:
    if options.disabled is None and options.weight is None:
        options.fail("one of --disable, --enable and --weight is needed")
    check_service(options.service)
    address = address_of(*parse_address(options.address)) if options.address else ""
    found = next((each for each in describe(config, timeout) if each.service == options.service), None)
    said = _said(found.overrides if found else None, address)
    if options.disabled is not None:
        said = said._replace(disabled=options.disabled)
    if options.weight is not None:
        said = said._replace(weight=None if options.weight < 0 else options.weight)
    in_force = set_override(config, options.service, address, said, timeout)
    print(f"{options.service}{address and ' at '}{address}: {_override(_said(in_force, address)) or 'no override'}")
    known = {each.endpoint.address for each in found.instances} if found else set()
    if not known or (address and address not in known):
        print(f"nothing is registered there now; it holds for what will be, see: list ({config.root})")


def _said(overrides: Overrides | None, address: str) -> Override:
    if overrides is None:
        return Override()
    return overrides.instances.get(address, Override()) if address else overrides.service


def _list(config: MprpcConfig, timeout: float) -> None:
    services = describe(config, timeout)
    rows = [row for described in services for row in _rows(described)]
    print(_table([_HEADINGS, *rows]) if rows else f"no service is registered below {config.root}")
    for described in services:
        if described.note:
            print(f"note: {described.note}", file=sys.stderr)


def _rows(described: Described) -> Iterator[tuple[str, ...]]:
    """The service's own where it has no instance or is overridden, the instances', and those of absent ones."""
    service = described.overrides.service
    if not described.instances or service != Override():
        state = "disabled" if service.disabled else "no instance" if not described.instances else _NOTHING
        yield described.service, _NOTHING, state, _NOTHING, _override(service), "", "", ""
    for instance in described.instances:
        yield _instance_row(described, instance)
    present = {instance.endpoint.address for instance in described.instances}
    for address in sorted(described.overrides.instances.keys() - present):
        override = described.overrides.instances[address]
        yield described.service, address, "absent", _NOTHING, _override(override), "", "", ""


def _instance_row(described: Described, instance: Instance) -> tuple[str, ...]:
    endpoint = instance.endpoint
    effective = described.overrides.apply(endpoint)
    state = "disabled" if effective is None else "up" if instance.enabled else "not enabled"
    override = _override(described.overrides.instances.get(endpoint.address, Override()))
    weight = f"{(effective or endpoint).weight:g}"
    words = endpoint.zone, ",".join(endpoint.tags), ",".join(instance.methods)
    return described.service, endpoint.address, state, weight, override, *words


def _override(override: Override) -> str:
    words = ["disabled"] if override.disabled else []
    if override.weight is not None:
        words.append(f"weight={override.weight:g}")
    return ",".join(words)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the left; what is empty shows as a dash."""
    shown = [[cell if cell and cell.isprintable() else _NOTHING for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in shown)
    return "\n".join(line.rstrip() for line in lines)
