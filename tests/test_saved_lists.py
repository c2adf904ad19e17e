"""The last lists as files: what is written comes back, and what was touched does not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mprpc import saved_lists
from mprpc.desk import Snapshot
from mprpc.layout import Endpoint
from mprpc.saved_lists import SavedLists

SERVICE = "fixbug.UserServiceRpc"
CLASSIC = Endpoint("10.0.0.9:1", classic=True, id="/UserServiceRpc/Login")
FRAMED = Snapshot(
    (Endpoint("10.0.0.1:1", False, 2.5, "z", ("a", "b"), "id"), Endpoint("[::1]:2")), confirmed=True, version=7
)


def lists(directory: Path, where: str = "zk:2181") -> SavedLists:
    return SavedLists(str(directory), where=where, root="/mprpc")


def save(directory: Path, snapshot: Snapshot = FRAMED) -> Path:
    saved = lists(directory)
    saved.put(SERVICE, snapshot)
    saved.write()
    (file,) = directory.iterdir()
    return file


def test_what_is_written_comes_back_unconfirmed(tmp_path: Path) -> None:
    save(tmp_path / "new")
    assert lists(tmp_path / "new").read(SERVICE) == Snapshot(FRAMED.endpoints)


def test_the_seed_layouts_list_comes_back_by_method(tmp_path: Path) -> None:
    save(tmp_path, Snapshot((CLASSIC,), True, 1, (("Login", CLASSIC),)))
    snapshot = lists(tmp_path).read(SERVICE)
    assert snapshot is not None
    assert snapshot.for_method("Login") == (CLASSIC,)


def test_the_newest_list_is_the_one_that_is_written(tmp_path: Path) -> None:
    saved = lists(tmp_path)
    saved.put(SERVICE, Snapshot())
    saved.put(SERVICE, FRAMED)
    saved.write()
    saved.write()
    assert saved.read(SERVICE) == Snapshot(FRAMED.endpoints)


def test_another_zookeepers_list_is_another(tmp_path: Path) -> None:
    save(tmp_path)
    assert lists(tmp_path, "other:2181").read(SERVICE) is None


def test_no_file_is_no_list_and_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert lists(tmp_path).read(SERVICE) is None
    assert not caplog.records


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save(tmp_path)
    whole = file.read_bytes()
    changed = 0
    for index in range(len(whole)):
        file.write_bytes(whole[:index])
        assert lists(tmp_path).read(SERVICE) is None
        other = bytearray(whole)
        other[index] ^= 1
        if not _same(bytes(other), whole):
            changed += 1
            file.write_bytes(other)
            assert lists(tmp_path).read(SERVICE) is None
    assert changed > 300
    assert "is not used" in caplog.text


def _same(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))  # a blank between two tokens
    except ValueError:
        return False


def test_a_file_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path)
    monkeypatch.setattr(saved_lists, "MAX_FILE", file.stat().st_size)
    assert lists(tmp_path).read(SERVICE) is not None
    monkeypatch.setattr(saved_lists, "MAX_FILE", file.stat().st_size - 1)
    assert lists(tmp_path).read(SERVICE) is None


def test_a_write_that_fails_leaves_the_old_list_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    saved = lists(tmp_path)
    saved.put(SERVICE, Snapshot())
    saved.write()
    assert list(tmp_path.iterdir()) == [file]
    assert saved.read(SERVICE) == Snapshot(FRAMED.endpoints)
