"""A provider as a process:  python -m reliability.member CONFIG BOOKED

It imports everything, says "warm", and starts when a line on standard input names its port. Each Book that runs is
noted in the file BOOKED, so that one that ran twice is found. Commands, a line each: `session` tells the ZooKeeper
session, `cut` cuts the connection to ZooKeeper. SIGTERM ends it the orderly way.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import ledger_mprpc
import ledger_pb2
import mprpc.probe
import mprpc.registry  # noqa: F401, with kazoo below: imported before the start is timed
from mprpc import MprpcConfig, RpcProvider

REGISTERED_SECONDS = 600.0
NUMBER = struct.Struct("<Q")


class Ledger(ledger_mprpc.LedgerRpc):
    """Answers at once, or later as it is told to."""

    def __init__(self, booked: int) -> None:
        self._booked = booked
        self._process = os.getpid()

    def Look(self, request: Any, controller: Any) -> Any:
        return self._answer(request)

    def Book(self, request: Any, controller: Any) -> Any:
        os.write(self._booked, NUMBER.pack(request.number))
        return self._answer(request)

    def _answer(self, request: Any) -> Any:
        receipt = ledger_pb2.Receipt(number=request.number, process=self._process)
        if not request.hold_ms:
            return receipt
        later: Future[Any] = Future()
        timer = threading.Timer(request.hold_ms / 1000, later.set_result, (receipt,))
        timer.daemon = True
        timer.start()
        return later


def say(**what: object) -> None:
    sys.stdout.write(json.dumps({"at": time.monotonic()} | what) + "\n")
    sys.stdout.flush()


def client_of(registry: Any) -> Any:
    return registry._shell._client


def obey(command: str, registry: Any) -> None:
    client = client_of(registry)
    if command == "session":
        identity = client.client_id
        say(session=None if identity is None else [identity[0], identity[1].hex()])
    elif command == "cut":
        with suppress(OSError):  # cut already
            client._handler._socket.shutdown(socket.SHUT_RDWR)
        say(cut=True)


def main() -> None:
    import kazoo.client  # noqa: F401

    booked = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    say(warm=True)
    line = sys.stdin.readline()
    if not line:
        return
    provider = RpcProvider(MprpcConfig(**json.loads(sys.argv[1]), rpcserverport=int(line)))
    provider.notify_service(Ledger(booked))
    provider.start()
    say(serving=provider.address)

    def confirm() -> None:
        if provider.wait_registered(REGISTERED_SECONDS):
            say(registered=provider.address)

    def listen() -> None:
        for command in sys.stdin:
            obey(command.strip(), provider._registry)
        os._exit(3)  # whoever started it is gone

    for task in (confirm, listen):
        threading.Thread(target=task, daemon=True).start()
    provider.run()
    say(ended=True)


if __name__ == "__main__":
    main()
