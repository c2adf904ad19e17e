"""A process that makes one call, found through ZooKeeper, and says how long that took from the channel's making on:

    python first.py ZOOKEEPER_PORT [kazoo]

ms of time and of its own CPU. `kazoo`: with that imported before, as in a program that uses it itself.
"""

from __future__ import annotations

import json
import os
import sys
import time

import mprpc
import user_pb2
from user_mprpc import UserServiceRpc_Stub


def main() -> None:
    if "kazoo" in sys.argv:
        import kazoo.client  # noqa: F401
    start, spent = time.perf_counter(), time.process_time()
    config = mprpc.MprpcConfig(zookeeperip="127.0.0.1", zookeeperport=int(sys.argv[1]))
    users = UserServiceRpc_Stub(mprpc.MprpcChannel(config, timeout=20.0))
    users.Login(user_pb2.LoginRequest(name=b"zhang san", pwd=b"123456"))
    took, cpu = time.perf_counter() - start, time.process_time() - spent
    print(json.dumps({"took": took * 1000, "cpu": cpu * 1000}), flush=True)
    os._exit(0)  # what it has open ends with it


main()
