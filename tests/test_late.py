"""A fork waits for a late import, in whichever thread that is."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from mprpc.late import importing


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # 3.12 on, of forks beside threads
def test_a_child_finds_the_module_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for ever for the lock of a module that a thread of its parent was importing."""
    (tmp_path / "imported_late.py").write_text("begun.set()\ngo_on.wait(20)\nwhole = True\n")
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("builtins.begun", begun, raising=False)
    monkeypatch.setattr("builtins.go_on", go_on, raising=False)

    def load() -> None:
        with importing:
            import imported_late  # type: ignore[import-not-found]  # noqa: F401

    thread = threading.Thread(target=load)
    thread.start()
    assert begun.wait(20)
    threading.Timer(0.2, go_on.set).start()
    child = os.fork()
    if child == 0:
        os._exit(0 if getattr(sys.modules.get("imported_late"), "whole", False) else 1)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    sys.modules.pop("imported_late", None)
