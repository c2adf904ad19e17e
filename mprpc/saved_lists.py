"""The last lists of providers as files, with which a consumer starts while ZooKeeper is down.

One file for a service, in a directory that the configuration names; its name holds a digest of the ZooKeeper and the
root, so that consumers of different ensembles can share a directory. A file is written whole beside its place and then
moved there, so that a reader sees the old or the new one; and it carries a digest of what it says, since disks fill up
and people edit. A file that can't be read or written costs a warning and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from mprpc.desk import Snapshot
from mprpc.layout import Endpoint, parse_address

__all__ = ["MAX_FILE", "SavedLists"]

MAX_FILE = 4 << 20
"""Bytes of a file that is read: ten thousand endpoints have about half of it."""

_log = logging.getLogger(__name__)


class SavedLists:
    """The files in `directory` of the ZooKeeper `where` and its `root`. Any thread."""

    def __init__(self, directory: str, *, where: str, root: str) -> None:
        self._directory = Path(directory)
        self._suffix = sha256(f"{where} {root}".encode()).hexdigest()[:12]
        self._lock = threading.Lock()
        self._newest: dict[str, Snapshot] = {}

    def put(self, service: str, snapshot: Snapshot) -> None:
        """Remember `snapshot` for the next `write`."""
        with self._lock:
            self._newest[service] = snapshot

    def write(self) -> None:
        """Write what was put since the last time."""
        with self._lock:
            while self._newest:
                service, snapshot = self._newest.popitem()
                try:
                    self._write(service, _text(service, snapshot))
                except OSError as error:
                    _log.warning("the list of %s can't be saved: %s", service, error)

    def read(self, service: str) -> Snapshot | None:
        """The saved list, unconfirmed; None where there is none that can be trusted."""
        path = self._path(service)
        try:
            with path.open("rb") as file:
                return _parse(service, file.read(MAX_FILE + 1))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            _log.warning("the saved list %s is not used: %s", path, error)
            return None

    def _path(self, service: str) -> Path:
        return self._directory / f"{service}.{self._suffix}.json"

    def _write(self, service: str, text: bytes) -> None:
        path = self._path(service)
        self._directory.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with beside.open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError:
            with suppress(OSError):
                beside.unlink()
            raise


def _text(service: str, snapshot: Snapshot) -> bytes:
    said = {
        "service": service,
        "endpoints": [endpoint._asdict() for endpoint in snapshot.endpoints],
        "by_method": {method: endpoint.address for method, endpoint in snapshot.by_method},
    }
    return json.dumps({"sha256": _digest(said), "list": said}, indent=1, sort_keys=True).encode()


def _digest(said: object) -> str:
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _parse(service: str, text: bytes) -> Snapshot:
    if len(text) > MAX_FILE:
        raise ValueError(f"it has more than {MAX_FILE} bytes")
    try:
        whole = json.loads(text)
        said, digest = whole["list"], whole["sha256"]
        if digest != _digest(said) or said["service"] != service:
            raise ValueError("its digest is not that of its content")
        endpoints = {item["address"]: _endpoint(item) for item in said["endpoints"]}
        by_method = tuple((method, endpoints[address]) for method, address in said["by_method"].items())
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is not in our format ({type(error).__name__})") from None
    return Snapshot(tuple(endpoints.values()), by_method=by_method)


def _endpoint(item: dict[str, object]) -> Endpoint:
    endpoint = Endpoint(**item)._replace(tags=tuple(item["tags"]))  # type: ignore[arg-type]
    parse_address(endpoint.address)
    return endpoint
