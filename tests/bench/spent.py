"""Where a call's microseconds go:  python tests/bench/spent.py [--picture]

perf samples the server and the caller of blocking Login calls, both on one core, so that nothing runs beside a call and
what they share adds up to its time. A sample belongs to the code that runs; the kernel's are divided by system call.
Needs perf, and a kernel that lets it see its symbols (root, or kernel.perf_event_paranoid=-1).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import stubs

SYSTEMS = ("mprpc", "epoll_pb")
CALLS = 60_000
HERTZ = 4999  # beside any timer's own

PARTS = {
    "send": "send, through TCP to the other socket",
    "receive": "receive",
    "wait": "epoll_wait",
    "switch": "switching between the processes",
    "kernel": "the kernel's rest",
    "protobuf": "protobuf (upb)",
    "native": "mprpc's C",
    "python": "CPython, the handler, the caller",
    "library": "C library",
}
SWITCHING = {"schedule", "__schedule", "finish_task_switch", "finish_task_switch.isra.0"}
CALLED = {"sendto": "send", "sendmsg": "send", "recvfrom": "receive", "epoll_wait": "wait", "epoll_pwait": "wait"}


def part(frames: list[str]) -> str:
    """Of PARTS. frames: `symbol (object)`, the innermost first."""
    where = frames[0].rpartition("(")[2]
    if where.startswith("[kernel") or where.startswith("[guest.kernel"):
        names = {frame.split()[0] for frame in frames}
        if names & SWITCHING:
            return "switch"
        return next((what for name, what in CALLED.items() if f"__x64_sys_{name}" in names), "kernel")
    if "_native" in where:
        return "native"
    if "_message" in where or "upb" in where:
        return "protobuf"
    return "python" if "python" in where or "/_" in where else "library"


def stacks(text: str) -> Iterator[list[str]]:
    """perf script's output: a block of frames for each sample."""
    for block in text.split("\n\n"):
        frames = [line.strip().partition(" ")[2] for line in block.splitlines()[1:] if line.strip()]
        if frames:
            yield frames


def shares(system: str) -> tuple[dict[str, float], float]:
    """Each part's share of the samples, and the p50 in µs, taken without perf."""
    from machinery import Caller, Server

    with Server(system, 0) as server, Caller(system, server.port, 0) as caller, tempfile.TemporaryDirectory() as made:
        caller.tell("latency", CALLS // 10)
        p50 = caller.tell("latency", CALLS)["p50"] / 1000
        data = Path(made) / "perf.data"
        record = ["perf", "record", "-q", "-g", "-e", "cpu-clock", "-F", str(HERTZ), "-o", str(data)]
        with subprocess.Popen([*record, "-p", f"{server.pid},{caller.pid}"]) as perf:
            while not data.exists():  # it is made once the events are open
                if perf.poll() is not None:
                    raise RuntimeError("perf can't sample: see above")
                time.sleep(0.01)
            caller.tell("latency", CALLS)
            perf.terminate()
        script = subprocess.run(
            ["perf", "script", "-i", str(data), "-F", "comm,ip,sym,dso"], capture_output=True, text=True, check=True
        )
    found = Counter(part(frames) for frames in stacks(script.stdout))
    return {name: found[name] / found.total() for name in PARTS}, p50


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/bench/spent.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--picture", action="store_true", help="draw docs/call.svg")
    options = parser.parse_args()
    stubs.use()
    told = {system: shares(system) for system in SYSTEMS}
    print(f"{'':45}" + "".join(f"{system:>16}" for system in SYSTEMS))
    for name, title in PARTS.items():
        print(f"{title:45}" + "".join(f"{100 * of[name]:8.1f} %{of[name] * p50:6.2f}" for of, p50 in told.values()))
    print(f"{'p50, µs':45}" + "".join(f"{p50:16.2f}" for _, p50 in told.values()))
    if options.picture:
        import picture

        spent = {system: {PARTS[name]: share * p50 for name, share in of.items()} for system, (of, p50) in told.items()}
        (stubs.ROOT / "docs" / "call.svg").write_text(picture.divided(spent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
