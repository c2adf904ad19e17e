"""Several providers in one process, which fail when they are told to:  python -m reliability.troubled ORDERS

ORDERS (JSON): `config`, `ports` (0: any free one), `hold_ms` (of each provider's answers), `hiccups` (the share of
requests that take `hiccup_ms` instead). It tells `serving` with the
addresses. Commands: `fail` makes every handler raise UNAVAILABLE, `heal` ends that, `count` tells how many requests
their handlers have had. SIGTERM ends it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from typing import Any

import ledger_mprpc
import ledger_pb2
from mprpc import MprpcConfig, RpcProvider, Unavailable
from reliability.laggard import Clock
from reliability.member import say

REGISTERED_SECONDS = 60.0


class Ledger(ledger_mprpc.LedgerRpc):
    """Answers, later if it is to, or fails."""

    failing = False
    _clock = Clock()

    def __init__(self, hold_ms: float, hiccups: float, hiccup_ms: float) -> None:
        self.count = 0
        self._hold, self._hiccups, self._hiccup = hold_ms / 1000, hiccups, hiccup_ms / 1000

    def Look(self, request: Any, controller: Any) -> Any:
        self.count += 1
        if Ledger.failing:
            raise Unavailable("told to fail")
        receipt = ledger_pb2.Receipt(number=request.number, process=os.getpid())
        hold = self._hiccup if random.random() < self._hiccups else self._hold
        return self._clock.later(hold, receipt) if hold else receipt

    Book = Look


def main() -> None:
    orders = json.loads(sys.argv[1])
    ledgers = [Ledger(each, orders["hiccups"], orders["hiccup_ms"]) for each in orders["hold_ms"]]
    providers = []
    for port, ledger in zip(orders["ports"], ledgers, strict=True):
        provider = RpcProvider(MprpcConfig(**orders["config"], rpcserverport=port))
        provider.notify_service(ledger)
        provider.start()
        providers.append(provider)
    for provider in providers:
        provider.wait_registered(REGISTERED_SECONDS)
    say(serving=[provider.address for provider in providers])
    ended = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            command = line.strip()
            if command in ("fail", "heal"):
                Ledger.failing = command == "fail"
            say(**{command: [ledger.count for ledger in ledgers]})
        os._exit(3)  # whoever started it is gone

    threading.Thread(target=listen, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    ended.wait()
    for provider in providers:
        provider.stop(0.5)


if __name__ == "__main__":
    main()
