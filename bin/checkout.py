"""Lets the examples run straight from a checkout: importing this comes before all other imports.

It starts the script again with the checkout's .venv where there is one, puts proto/, where `make build` leaves the
generated modules, on the path, and where something is still missing it says in one line what to run (exit code 2).
A program of your own needs none of it: install mprpc and your generated modules, as `make build` does.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")

if os.path.exists(PYTHON) and os.path.realpath(sys.prefix) != os.path.realpath(VENV):
    os.execv(PYTHON, [PYTHON, *sys.argv])

sys.path.insert(0, os.path.join(ROOT, "proto"))
try:
    import friend_mprpc  # noqa: F401
    import user_mprpc  # noqa: F401
except Exception as error:  # an ImportError, or protobuf's for modules that were generated for another version of it
    sys.stderr.write(f"{os.path.basename(sys.argv[0])}: {error}; run: make -C {ROOT} build\n")
    sys.exit(2)
