"""Modules that are imported late, when they are first used, and forks.

A thread that imports a module holds that module's lock: in a child forked meanwhile nobody would ever release it, and
the module would stay half made. So a late import holds `importing`, and a fork waits for it.
"""

from __future__ import annotations

import os
import threading

__all__ = ["importing"]

importing = threading.RLock()
"""For a `with` around a late import. Any thread."""

os.register_at_fork(before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release)
