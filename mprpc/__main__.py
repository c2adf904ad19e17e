"""`python -m mprpc COMMAND`: finds the command's module, imports that one only, and hands it the rest of the line."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast


class Command(NamedTuple):
    """A command is a module with `main(argv, prog) -> exit code`; naming it here costs no import."""

    module: str
    summary: str


COMMANDS = {
    "registry": Command("mprpc.registry_command", "list services, instances and overrides, and set overrides"),
    "zookeeper": Command("mprpc.embedded_zookeeper.__main__", "run the embedded ZooKeeper alone"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; wrong usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mprpc",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<12}{command.summary}" for name, command in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own; COMMAND --help lists them")
    chosen = parser.parse_args(argv)
    run = cast("Callable[[Sequence[str], str], int]", importlib.import_module(COMMANDS[chosen.command].module).main)
    return run(chosen.arguments, f"python -m mprpc {chosen.command}")


if __name__ == "__main__":
    sys.exit(main())
