"""What went wrong on connections, by kind: how C counts it, and the names that a person reads.

C counts each reason for which it ends a connection, refuses a request or drops a frame, and what it only noticed; all
are negative numbers of the headers. Here each has its name, once; who has a connection's side adds up its counters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mprpc._native import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["of_connections", "of_loops"]

_FRAMES = {
    "bad_size": lib.MPRPC_BAD_SIZE,  # the first bytes are no frame
    "http": lib.MPRPC_BAD_HTTP,
    "tls": lib.MPRPC_BAD_TLS,
    "bad_varint": lib.MPRPC_BAD_VARINT,
    "bad_wire_type": lib.MPRPC_BAD_WIRE_TYPE,
    "bad_value": lib.MPRPC_BAD_VALUE,
    "bad_length": lib.MPRPC_BAD_LENGTH,
    "bad_call_id": lib.MPRPC_BAD_CALL_ID,  # none where one is needed
    "bad_ping": lib.MPRPC_BAD_PING,
    "bad_discard": lib.MPRPC_BAD_DISCARD,  # a payload far over the limit
    "no_memory": lib.MPRPC_NO_MEMORY,
    "stray": lib.MPRPC_STRAY,  # nobody waits for it
}
_LOOP = _FRAMES | {
    "bad_order": lib.MPRPC_BAD_ORDER,  # a call_id that is not above the last
    "bad_dialect": lib.MPRPC_BAD_DIALECT,
    "no_classic": lib.MPRPC_NO_CLASSIC,  # a classic request that has no answer
    "oversized": lib.MPRPC_OVERSIZED,  # over max_payload: refused
    "metadata": lib.MPRPC_METADATA,  # more than 128 entries: refused
    "unknown_method": lib.MPRPC_UNKNOWN_METHOD,
    "unknown_kind": lib.MPRPC_UNKNOWN_KIND,
    "compressed": lib.MPRPC_COMPRESSED,
    "busy": lib.MPRPC_BUSY,  # over max_in_flight: refused
    "leaving": lib.MPRPC_LEAVING,  # a request behind GOAWAY: refused
    "expired": lib.MPRPC_EXPIRED,  # its deadline passed before it ran
    "overloaded": lib.MPRPC_OVERLOADED,  # over the adaptive limit: refused
    "stalled": lib.MPRPC_STALLED,  # a frame made no progress within frame_timeout
    "crowded": lib.MPRPC_CROWDED,  # a connection over max_connections: reset
    "no_descriptor": lib.MPRPC_NO_DESCRIPTOR,
    "no_room": lib.MPRPC_NO_ROOM,  # over max_input: closed
    "slow_reader": lib.MPRPC_SLOW_READER,  # max_output bytes waited for it: not read from for a while
    "unread": lib.MPRPC_UNREAD,  # it read nothing for idle_timeout: closed
    "idle": lib.MPRPC_IDLE,  # no call for idle_timeout: ended
    "long_classic": lib.MPRPC_LONG_CLASSIC,
}
_LINK = _FRAMES | {
    "end": lib.MPRPC_LINK_END,  # the provider ended the connection without GOAWAY
    "goaway": lib.MPRPC_LINK_GOAWAY,
    "silent": lib.MPRPC_LINK_SILENT,  # no answer to PING: given up
    "unsent": lib.MPRPC_LINK_UNSENT,  # a call over max_unsent: refused
}


def of_loops(handles: Iterable[Any]) -> dict[str, int]:
    """The sum over a provider's loops, every name, from its start on. Any thread."""
    found = dict.fromkeys(_LOOP, 0)
    counts = ffi.new("uint64_t[]", lib.MPRPC_REASONS)
    for handle in handles:
        lib.mprpc_loop_counts(handle, counts)
        for name, reason in _LOOP.items():
            found[name] += counts[-reason]
    return found


def of_connections() -> dict[str, int]:
    """The sum over all connections that this process's channels have had, every name. Any thread."""
    return {name: int(lib.mprpc_link_count(reason)) for name, reason in _LINK.items()}
