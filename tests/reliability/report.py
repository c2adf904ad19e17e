"""What a run found: progress lines, a table at the end, and the exit code."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import hashlib
import os
import platform
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import generated

SHOWN = 20  # broken promises that are printed one by one
SOURCES = (".py", ".c", ".h", ".proto")
MADE = ("_native.c", "_pb2.py", "_mprpc.py")  # from the others


class Report:
    """Collects the rows of the table, and every promise that was broken."""

    def __init__(self, title: str, seed: int) -> None:
        self.title = title
        self.seed = seed
        self.broken: list[str] = []
        self._began = time.monotonic()
        self._rows: list[tuple[str, str]] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def progress(self, text: str) -> None:
        print(f"[{self.seconds:6.1f} s] {text}", flush=True)

    def breach(self, text: str) -> None:
        """A promise that was not kept."""
        self.broken.append(text)
        self.progress(f"BROKEN: {text}")

    def row(self, name: str, value: object) -> None:
        self._rows.append((name, str(value)))

    def spread(self, name: str, values: Sequence[float], unit: str = "s") -> None:
        """A row of median, 95th percentile and maximum."""
        if not values:
            return
        ordered = sorted(values)
        median, late = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
        self.row(name, f"median {median:.2f}, 95 % {late:.2f}, worst {ordered[-1]:.2f} {unit} (n={len(ordered)})")

    def finish(self) -> int:
        """Prints the table; the exit code."""
        width = max(len(name) for name, _ in [*self._rows, ("broken promises", "")]) + 2
        print(f"\n{self.title} (seed {self.seed}, {self.seconds:.0f} s, {machine()})")
        for name, value in self._rows:
            print(f"  {name:<{width}}{value}")
        print(f"  {'broken promises':<{width}}{len(self.broken)}")
        for text in self.broken[:SHOWN]:
            print(f"    {text}")
        return 1 if self.broken else 0


def machine() -> str:
    """What figures belong to."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=generated.ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    cores = f"{os.cpu_count()} cores of {model}, load {os.getloadavg()[0]:.1f}"
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return f"{today}, {commit or '?'}, {cores}, Python {platform.python_version()}"


def sources(*places: str | Path) -> str:
    """A name for what these files say, and the sources in these directories: with others it is another."""
    digest = hashlib.sha256()
    for place in places:
        top = generated.ROOT / place
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if file.suffix in SOURCES and not file.name.endswith(MADE):
                digest.update(f"{file}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def return_memory() -> None:
    """From now on what is freed goes back to the system at once, so that this process's size is what it holds: glibc
    would keep what its threads had at most, for each of them. Before there are threads."""
    with contextlib.suppress(AttributeError):
        for parameter, value in ((-8, 1), (-3, 65536), (-1, 131072)):  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)


def look() -> dict[str, int]:
    """Of this process, what grows when something leaks."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc's: what is free in its arenas does not count
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return {
        "kilobytes": int(status.partition("VmRSS:")[2].split()[0]),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
    }
