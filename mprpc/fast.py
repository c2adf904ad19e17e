"""Loads `mprpc._fast`, the C that holds Python objects: a second module in the shared library of `mprpc._native`.

cffi writes the first module's C and leaves no room there for functions that take Python objects; a library of its own
would have its own copy of the units' state.
"""

from __future__ import annotations

import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from typing import Any

from mprpc import _native

__all__ = ["native"]


def _load() -> Any:
    name = "mprpc._fast"
    loader = ExtensionFileLoader(name, _native.__file__)
    module = loader.create_module(ModuleSpec(name, loader, origin=_native.__file__))
    loader.exec_module(module)
    sys.modules[name] = module
    return module


native: Any = _load()
