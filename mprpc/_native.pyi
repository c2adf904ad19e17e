# What cffi builds; its types are C's, declared in _native_build.py.
from typing import Any

ffi: Any
lib: Any
