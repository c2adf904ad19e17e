"""Many registries in one process, each with a session of its own:  python -m reliability.crowd ORDERS

ORDERS (JSON): `config`, `consumers`, `ports` (a provider registers at each of them; nobody listens there). Commands:
`look` tells how many are registered or sure of their list, and how many reads each consumer has asked ZooKeeper for
since `reset`; `end` closes all.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from typing import Any

import mprpc.registry
from mprpc import MprpcConfig
from mprpc.desk import Children, Exists, Read, Request
from mprpc.registry import Registration, Registry
from reliability.fleet import SERVICE
from reliability.member import say

METHODS = ("Look", "Book")
FIRST_LIST = 60.0  # seconds for the first list
reads: Counter[int] = Counter()  # by the registry's shell


def count_reads() -> None:
    """Every operation passes there on its way to ZooKeeper."""
    carry_out = mprpc.registry._Shell._carry_out

    def counted(self: Any, action: Any) -> None:
        if isinstance(action, Request) and isinstance(action.operation, (Children, Exists, Read)):
            reads[id(self)] += 1
        carry_out(self, action)

    mprpc.registry._Shell._carry_out = counted  # type: ignore[method-assign]


def main() -> None:
    orders = json.loads(sys.argv[1])
    config = MprpcConfig(**orders["config"])
    count_reads()
    providers = [Registry(config) for _ in orders["ports"]]
    publications = [
        registry.publish([Registration(SERVICE, METHODS, "127.0.0.1", port)])
        for registry, port in zip(providers, orders["ports"], strict=True)
    ]
    consumers = [Registry(config) for _ in range(orders["consumers"])]
    views = []
    for registry in consumers:  # one after the other: what a start costs is not the subject
        views.append(registry.follow(SERVICE, METHODS))
        views[-1].wait(FIRST_LIST)
    for line in sys.stdin:
        command = line.strip()
        if command == "look":
            say(
                look={
                    "registered": sum(each.registered for each in publications),
                    "sure": [len(view.snapshot.endpoints) if view.snapshot.confirmed else -1 for view in views],
                    "reads": [reads[id(registry._shell)] for registry in consumers],
                }
            )
        elif command == "reset":
            reads.clear()
            say(reset=True)
        elif command == "end":
            break
    else:
        os._exit(3)  # whoever started it is gone
    threads = [threading.Thread(target=registry.close) for registry in (*providers, *consumers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    say(ended=True)


if __name__ == "__main__":
    main()
