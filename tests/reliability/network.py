"""A proxy that does to connections what networks do, as a process:  python -m reliability.network ORDERS

ORDERS (JSON): `provider`, where connections go, and `seed`. It tells `address`, where they come from. Commands:
`set FAULT TO BACK`: from now on that fault, in the direction to the provider if TO is 1, to the consumer if BACK is;
what a black hole has swallowed comes out when it ends. `count` tells how many connections there have been.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import sys
import threading
from contextlib import suppress

from reliability.member import say

CHUNK = 65536
LATENCY, JITTER = 0.1, 0.2  # seconds, of every chunk
BANDWIDTH = 20_000  # bytes a second
SLICE = 7  # bytes, at most
BREAK = (0.1, 0.3)  # seconds between two resets, or ends of one direction


class Way:
    """One direction of one connection."""

    def __init__(self, proxy: Proxy, back: bool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._proxy, self._back = proxy, back
        self._reader, self._writer = reader, writer
        self._ended = False

    async def carry(self) -> None:
        """Until the end of the stream, which it passes on."""
        try:
            while data := await self._reader.read(CHUNK):
                await self._pass(data)
            self.end()
        except OSError:
            self.reset()

    async def _pass(self, data: bytes) -> None:
        proxy, dice = self._proxy, self._proxy.dice
        fault = proxy.fault if proxy.strikes[self._back] else "none"
        size = SLICE if fault == "slicing" else CHUNK
        if fault == "black hole":
            await proxy.over.wait()
        elif fault in ("latency", "jitter"):
            await asyncio.sleep(LATENCY if fault == "latency" else dice.uniform(0.0, JITTER))
        elif fault == "bandwidth":
            await asyncio.sleep(len(data) / BANDWIDTH)
        at = 0
        while at < len(data) and not self._ended:
            step = dice.randint(1, size) if fault == "slicing" else size
            self._writer.write(data[at : at + step])
            await self._writer.drain()
            at += step

    def end(self) -> None:
        """This direction only."""
        self._ended = True
        with suppress(OSError, RuntimeError):
            self._writer.write_eof()

    def reset(self) -> None:
        with suppress(OSError):
            made = self._writer.get_extra_info("socket")
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class Proxy:
    """Carries connections to a provider, on the event loop that it is made on."""

    def __init__(self, provider: str, seed: int) -> None:
        self.dice = random.Random(seed)
        self.fault, self.strikes = "none", (False, False)
        self.over = asyncio.Event()
        self.connections = 0
        self._provider = provider.rsplit(":", 1)
        self._pairs: list[tuple[Way, Way]] = []

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            there_reader, there_writer = await asyncio.open_connection(*self._provider)
        except OSError:
            writer.transport.abort()
            return
        pair = Way(self, False, reader, there_writer), Way(self, True, there_reader, writer)
        self._pairs.append(pair)
        await asyncio.gather(pair[0].carry(), pair[1].carry())
        self._pairs.remove(pair)
        for each in (writer, there_writer):
            each.transport.abort()

    async def strike(self) -> None:
        """Resets and ends connections, as long as that is the fault."""
        while True:
            await asyncio.sleep(self.dice.uniform(*BREAK))
            if self._pairs and self.fault in ("reset", "half-close"):
                for back, way in enumerate(self.dice.choice(self._pairs)):
                    if self.strikes[back]:
                        way.end() if self.fault == "half-close" else way.reset()

    def set(self, fault: str, strikes: tuple[bool, bool]) -> None:
        self.fault, self.strikes = fault, strikes
        if fault == "black hole":
            self.over.clear()
        else:
            self.over.set()


async def serve(provider: str, seed: int) -> None:
    proxy, loop = Proxy(provider, seed), asyncio.get_running_loop()
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    say(address=f"{host}:{port}")

    def listen() -> None:
        for line in sys.stdin:
            command, _, rest = line.strip().partition(" ")
            if command == "set":
                fault, to, back = rest.rsplit(" ", 2)
                loop.call_soon_threadsafe(proxy.set, fault, (to == "1", back == "1"))
                say(set=rest)
            elif command == "count":
                say(count=proxy.connections)
        os._exit(0)  # whoever started it is gone

    threading.Thread(target=listen, daemon=True).start()
    await proxy.strike()


if __name__ == "__main__":
    orders = json.loads(sys.argv[1])
    asyncio.run(serve(orders["provider"], orders["seed"]))
