"""A small ZooKeeper in memory, for one machine and for tests, so that neither needs Java.

It speaks the client protocol of ZooKeeper 3.8, as kazoo and the C client use it; a real ensemble takes its place by
changing an address. Left out: SASL, TLS, reconfiguration, read-only mode, quorum, persistent watches, container and
TTL nodes. Nothing is kept on disk.

From the wire inwards: `server` (sockets, one thread) gives packets to `keeper` (sessions, watches, zxid: no socket, no
thread), which works on `tree` (znodes and the order of checks). `protocol`, `acl`, `watches`, `sessions`, `clock` and
`commands` each hold one noun of these; `faults` is what a test may order to go wrong; `probe` asks whether a
ZooKeeper is there already. It imports the standard library only, and nothing of the rest of this project.
"""

from .clock import Clock, SteppedClock
from .keeper import Limits
from .probe import answering, start_unless_answering
from .protocol import Code, Op
from .server import EmbeddedZooKeeperServer

__all__ = [
    "Clock",
    "Code",
    "EmbeddedZooKeeperServer",
    "Limits",
    "Op",
    "SteppedClock",
    "answering",
    "start_unless_answering",
]
