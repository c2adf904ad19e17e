"""`python -m mprpc zookeeper`: the embedded ZooKeeper alone, in the foreground, until SIGINT or SIGTERM."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

from .server import DEFAULT_PORT, EmbeddedZooKeeperServer


def main(argv: Sequence[str] | None = None, prog: str = "python -m mprpc zookeeper") -> int:
    """Serves until told to stop; returns the exit code: 0, or 1 where it can't listen."""
    arguments = _parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Blocked before the server's thread starts, which inherits it: the signal waits for sigwait below.
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    server = EmbeddedZooKeeperServer(arguments.host, arguments.port, tick_ms=arguments.tick_ms)
    try:
        server.start()
    except OSError as error:
        print(f"{prog}: can't listen at {server.address}: {error.strerror or error}", file=sys.stderr)
        return 1
    print(f"listening at {server.address}", flush=True)
    signal.sigwait(signals)
    server.stop()
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Runs a small in-memory ZooKeeper, for development and tests only."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--tick-ms",
        type=int,
        default=2000,
        metavar="MS",
        help="session timeouts are negotiated between 2 and 20 of these (default: %(default)s)",
    )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
