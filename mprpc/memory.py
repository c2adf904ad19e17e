"""Addresses within one process: `memory:NAME`, for tests. No socket, no port, no file; all else is real.

A provider listens under a name; who connects gets one end of a wire (`_wire.c`), a loop of the provider the other.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from mprpc._native import ffi, lib
from mprpc.errors import ConfigError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["connect", "ignore", "listen"]

_lock = threading.Lock()
_listening: dict[str, Callable[[Any], bool]] = {}


def listen(address: str, adopt: Callable[[Any], bool]) -> None:
    """From now on `adopt(end)` is called with the end of each wire that somebody connects to `address`; it returns
    whether it took it, and owns it from then on in either case. Raises ConfigError when another one listens there."""
    with _lock:
        if _listening.setdefault(address, adopt) is not adopt:
            raise ConfigError(f"can't listen on {address}: another provider of this process does; change rpcserverip")


def ignore(address: str) -> None:
    """Nobody listens there any more."""
    with _lock:
        _listening.pop(address, None)


def connect(address: str, max_payload: int) -> Any:
    """A link to the provider that listens there. Raises Unavailable. Any thread."""
    with _lock:
        adopt = _listening.get(address)
    if adopt is None:
        raise Unavailable(f"can't connect to {address}: no provider of this process listens there", not_run=True)
    ends = ffi.new("struct mprpc_wire *[2]")
    if lib.mprpc_wire_pair(ends) < 0:
        raise Unavailable(f"can't connect to {address}: {os.strerror(ffi.errno)}", not_run=True)
    if not adopt(ends[0]):
        lib.mprpc_wire_close(ends[1])
        raise Unavailable(f"can't connect to {address}: the provider refuses more connections", not_run=True)
    link = lib.mprpc_link_new_within(ends[1], max_payload)
    if link == ffi.NULL:
        lib.mprpc_wire_close(ends[1])
        raise Unavailable(f"can't connect to {address}: no memory for a connection", not_run=True)
    return ffi.gc(link, lib.mprpc_link_free)


def _after_fork() -> None:
    """In a forked child: the loops of the parent's providers don't run here."""
    global _lock
    _lock = threading.Lock()
    _listening.clear()


os.register_at_fork(after_in_child=_after_fork)
