"""Faults a test orders: what the server should do wrongly, and to which requests.

The server asks this table at the few places where it can go wrong; everything is off until a test says otherwise.
Only the server's thread touches it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from .protocol import Op

_HEADER = struct.Struct(">ii")


@dataclass
class RequestFault:
    """Befalls the next `count` requests of type `op`, or of any type but PING where it is None."""

    op: Op | None
    count: int
    code: int | None = None
    """Answer with this error and do nothing; None: do it and close the connection without an answer."""

    def befalls(self, op: int) -> bool:
        return self.count > 0 and (op == self.op or (self.op is None and op != Op.PING))


@dataclass
class Faults:
    """The orders in force."""

    stalled: bool = False
    """No connection is read or written, as behind a network that swallows packets."""
    answers_held: bool = False
    """Requests are carried out, answers and events wait."""
    connections_refused: bool = False
    """New connections are closed as soon as they are accepted."""
    request_faults: list[RequestFault] = field(default_factory=list)

    def take(self, packet: bytes) -> RequestFault | None:
        """The fault that befalls this request, if any; that is one less to come."""
        if not self.request_faults or len(packet) < _HEADER.size:
            return None
        _, op = _HEADER.unpack_from(packet)
        fault = next((fault for fault in self.request_faults if fault.befalls(op)), None)
        if fault is not None:
            fault.count -= 1
            self.request_faults = [each for each in self.request_faults if each.count > 0]
        return fault
