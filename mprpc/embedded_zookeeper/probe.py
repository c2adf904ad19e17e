"""Is a ZooKeeper there already? Whoever would bring an embedded one along asks first."""

from __future__ import annotations

import contextlib
import errno
import socket

from .server import EmbeddedZooKeeperServer, logger

PROBE_SECONDS = 1.0


def answering(host: str, port: int, timeout: float = PROBE_SECONDS) -> bool:
    """Whether something accepts connections at host:port.

    It is asked `srvr` too, which a 3.8 server answers unless told not to; what accepts and does not answer like a
    ZooKeeper counts as well, with a warning, since nothing else could listen there anyway. Blocks for `timeout`
    seconds at most for each of the two.
    """
    try:
        connection = socket.create_connection((host, port), timeout)
    except OSError:
        return False
    with connection:
        connection.settimeout(timeout)
        greeting = b""
        with contextlib.suppress(OSError):
            connection.sendall(b"srvr")
            greeting = connection.recv(64)
    if b"ookeeper" not in greeting and b"srvr" not in greeting:
        logger.warning("%s:%s accepts connections but does not answer as a ZooKeeper does", host, port)
    return True


def start_unless_answering(host: str, port: int, *, tick_ms: int = 2000) -> EmbeddedZooKeeperServer | None:
    """Starts an embedded server at host:port and returns it, or None where one answers already.

    Of several processes that do this at the same moment one starts it and the others get None. Raises OSError where
    nothing answers and nothing can listen either, as at an address of another machine.
    """
    if answering(host, port):
        return None
    server = EmbeddedZooKeeperServer(host, port, tick_ms=tick_ms)
    try:
        server.start()
    except OSError as error:
        if error.errno == errno.EADDRINUSE and answering(host, port):
            return None
        raise
    return server
