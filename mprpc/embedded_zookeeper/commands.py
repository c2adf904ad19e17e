"""The four-letter words: plain text for people and monitors, in the format of a 3.8 server.

A word takes the place of a connect request; its answer ends the connection. Offered are `ruok`, `srvr`, `stat`,
`mntr`, `envi` and `isro`.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass

from .keeper import Keeper

VERSION = "3.8.0-mprpc-embedded, built on 2022-02-25 08:49 UTC"
"""The version whose protocol is spoken; clients parse the number in front, and the date must be there for some."""


@dataclass
class Traffic:
    """What the server counts: packets since its start, and connections now. `started` is on the monotonic clock."""

    started: float = 0.0
    received: int = 0
    sent: int = 0
    connections: int = 0


def respond(word: bytes, keeper: Keeper, traffic: Traffic) -> bytes | None:
    """The answer to a word, None for one that is not offered."""
    command = _COMMANDS.get(word)
    return None if command is None else command(keeper, traffic).encode()


def _ruok(_keeper: Keeper, _traffic: Traffic) -> str:
    return "imok"


def _isro(_keeper: Keeper, _traffic: Traffic) -> str:
    return "rw"


def _srvr(keeper: Keeper, traffic: Traffic) -> str:
    return f"Zookeeper version: {VERSION}\n{_statistics(keeper, traffic)}"


def _stat(keeper: Keeper, traffic: Traffic) -> str:
    return f"Zookeeper version: {VERSION}\nClients:\n\n{_statistics(keeper, traffic)}"


def _statistics(keeper: Keeper, traffic: Traffic) -> str:
    return (
        "Latency min/avg/max: 0/0.0/0\n"
        f"Received: {traffic.received}\n"
        f"Sent: {traffic.sent}\n"
        f"Connections: {traffic.connections}\n"
        "Outstanding: 0\n"
        f"Zxid: {keeper.zxid:#x}\n"
        "Mode: standalone\n"
        f"Node count: {len(keeper.tree)}\n"
    )


def _mntr(keeper: Keeper, traffic: Traffic) -> str:
    values: dict[str, object] = {
        "version": VERSION,
        "server_state": "standalone",
        "num_alive_connections": traffic.connections,
        "outstanding_requests": 0,
        "packets_received": traffic.received,
        "packets_sent": traffic.sent,
        "global_sessions": len(keeper.sessions),
        "znode_count": len(keeper.tree),
        "watch_count": len(keeper.watches),
        "ephemerals_count": keeper.tree.ephemeral_count(),
        "approximate_data_size": keeper.tree.size,
        "uptime": int((keeper.clock.monotonic() - traffic.started) * 1000),
        "open_file_descriptor_count": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else -1,
    }
    return "".join(f"zk_{name}\t{value}\n" for name, value in values.items())


def _envi(_keeper: Keeper, _traffic: Traffic) -> str:
    values = {
        "zookeeper.version": VERSION,
        "host.name": platform.node(),
        "python.version": platform.python_version(),
        "python.executable": sys.executable,
        "os.name": platform.system(),
        "os.arch": platform.machine(),
        "os.version": platform.release(),
        "user.dir": os.getcwd(),
    }
    return "Environment:\n" + "".join(f"{name}={value}\n" for name, value in values.items())


_COMMANDS: dict[bytes, Callable[[Keeper, Traffic], str]] = {
    b"ruok": _ruok,
    b"isro": _isro,
    b"srvr": _srvr,
    b"stat": _stat,
    b"mntr": _mntr,
    b"envi": _envi,
}
