"""One-shot watches: on a node's data or existence, and on its children.

Both tables are kept by path, to fire, and by watcher, to forget a connection that has gone. A watcher is anything
hashable; this module never calls it, it says who is to be told what.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from .protocol import EventType
from .tree import Event

WatcherT = TypeVar("WatcherT", bound=Hashable)


class WatchTable(Generic[WatcherT]):
    """Watches of one kind."""

    def __init__(self) -> None:
        self._by_path: dict[str, dict[WatcherT, None]] = {}
        self._by_watcher: dict[WatcherT, dict[str, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_watcher.values()))

    def count(self, watcher: WatcherT) -> int:
        return len(self._by_watcher.get(watcher, ()))

    def add(self, path: str, watcher: WatcherT) -> None:
        self._by_path.setdefault(path, {})[watcher] = None
        self._by_watcher.setdefault(watcher, {})[path] = None

    def has_any(self, path: str) -> bool:
        return path in self._by_path

    def remove(self, path: str, watcher: WatcherT) -> bool:
        """Whether it was there."""
        if path not in self._by_watcher.get(watcher, ()):
            return False
        _discard(self._by_watcher, watcher, path)
        _discard(self._by_path, path, watcher)
        return True

    def forget(self, watcher: WatcherT) -> None:
        for path in self._by_watcher.pop(watcher, {}):
            _discard(self._by_path, path, watcher)

    def take(self, path: str) -> dict[WatcherT, None]:
        """Who watched the path; nobody does from now on."""
        watchers = self._by_path.pop(path, {})
        for watcher in watchers:
            _discard(self._by_watcher, watcher, path)
        return watchers


class Watches(Generic[WatcherT]):
    """Both kinds of watches, fired by events of the tree."""

    def __init__(self) -> None:
        self.data: WatchTable[WatcherT] = WatchTable()
        self.children: WatchTable[WatcherT] = WatchTable()

    def __len__(self) -> int:
        return len(self.data) + len(self.children)

    def count(self, watcher: WatcherT) -> int:
        return self.data.count(watcher) + self.children.count(watcher)

    def forget(self, watcher: WatcherT) -> None:
        self.data.forget(watcher)
        self.children.forget(watcher)

    def fire(self, event: Event) -> Iterator[WatcherT]:
        """Those to be told of the event: once each, even who watched both data and children of a deleted node."""
        if event.type is EventType.CHILDREN_CHANGED:
            yield from self.children.take(event.path)
            return
        told = self.data.take(event.path)
        if event.type is EventType.DELETED:
            told = {**told, **self.children.take(event.path)}
        yield from told


_K = TypeVar("_K")
_V = TypeVar("_V")


def _discard(table: dict[_K, dict[_V, None]], key: _K, value: _V) -> None:
    entries = table.get(key)
    if entries is not None:
        entries.pop(value, None)
        if not entries:
            del table[key]
