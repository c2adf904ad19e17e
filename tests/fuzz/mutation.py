"""Streams that are nearly right: frames of all kinds, as the wire has them, and what chance makes of them.

The nth input of a seed is always the same, so that a finding is named by two numbers.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import frames
from frames import Frame

CORPUS = Path(__file__).parent / "corpus"
SERVICES = (
    (b"fixbug.UserServiceRpc", b"Login"),
    (b"UserServiceRpc", b"Login"),
    (b"fixbug.UserServiceRpc", b""),
    (b"", b""),
)
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
LARGEST = 4096  # bytes of an input


@functools.cache
def corpus() -> list[bytes]:
    """What libFuzzer found worth keeping, in an order of its own."""
    files = sorted((CORPUS / "codec").iterdir()) + sorted((CORPUS / "session").iterdir())
    return [file.read_bytes()[file.parent.name == "session" :] for file in files]


def stream(seed: int, number: int) -> bytes:
    """The nth input."""
    dice = random.Random((seed << 40) + number)
    kind = dice.random()
    if kind < 0.5:
        data = b"".join(frame(dice) for _ in range(dice.choice((1, 1, 2, 3, 8))))
    elif kind < 0.9:
        data = dice.choice(corpus())
    else:
        data = dice.randbytes(dice.randrange(200))
    for _ in range(dice.choice((0, 0, 1, 1, 2, 4))):
        data = mutated(data, dice)
    return data[:LARGEST]


def frame(dice: random.Random) -> bytes:
    """A frame that may be right."""
    service, method = dice.choice(SERVICES)
    made = Frame(
        service_name=service,
        method_name=method,
        call_id=dice.choice((0, 1, 1, 2, 3, dice.choice(NUMBERS) % 2**64)),
        kind=dice.choice((0, 0, 1, 1, 2, 3, 4, 5, 6, 31, 32)),
        timeout_ms=dice.choice((0, 0, 1, 1000, 2**32 - 1)),
        status=dice.choice((0, 0, 0, 13, -1)),
        error_text=dice.choice((b"", b"why", b"\xff\xfe", b"long" * 50)),
        compression=dice.choice((0, 0, 0, 0, 1)),
        metadata=(b"\x0a\x01k\x12\x01v",) * dice.choice((0, 0, 0, 1, 128, 129)),
        not_run=dice.choice((0, 0, 1)),
        attempt=dice.choice((0, 0, 1)),
        payload=dice.choice((b"", b"", b"hi", b"\x0a\x05fixed\x12\x011", b"\x80", dice.randbytes(dice.randrange(70)))),
    )
    return made.encode()


def mutated(data: bytes, dice: random.Random) -> bytes:
    if not data:
        return dice.randbytes(4)
    at, size = dice.randrange(len(data)), dice.choice((1, 1, 2, 4, 16))
    kind = dice.randrange(7)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + dice.randbytes(size) + data[at + size :]
    if kind == 2:
        return data[:at] + data[at + size :]
    if kind == 3:
        return data[:at] + frames.varint(dice.choice(NUMBERS)) + data[at:]
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data[:at] + data[: dice.randrange(len(data)) + 1] + data[at:]
    return data[:at] + dice.choice(corpus())
