"""The C extension; all else about the package stands in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["mprpc/_native_build.py:ffibuilder"])
