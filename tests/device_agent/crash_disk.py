"""A disk that loses power: notes what a program does and rebuilds what may be left of it.

The disk is the double here; the program under test runs unchanged on a real directory. Until a file is
synced, any part of its new content may be missing; until a directory is synced, any subset of its changes
may be missing, also out of order (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014).
Only a rename is one change, as every journaling file system makes it; it lasts once both directories are
synced. What the program does past
``durable``'s primitives is noticed by comparing the directory with the model, and counts as never synced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import pytest

from device_agent import durable

PRIMITIVES = ("_write_synced", "_make_directory", "_rename", "_delete_tree", "_sync_file", "_sync_directory")
_ALL_SUBSETS_UP_TO = 5

#: What a rebuilt disk holds: content by path; None for a directory.
Contents = Dict[str, Optional[bytes]]


def on_primitive(
    monkeypatch: pytest.MonkeyPatch, around: Callable[[str, Sequence[Any], Callable[[], Any]], Any]
) -> None:
    """Pass every call of a durable primitive through ``around(name, arguments, call)``."""
    for name in PRIMITIVES:
        original = getattr(durable, name)

        def wrapped(*arguments: Any, _name: str = name, _original: Callable[..., Any] = original) -> Any:
            return around(_name, arguments, lambda: _original(*arguments))

        monkeypatch.setattr(durable, name, wrapped)


def on_plain_write(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    around: Callable[[str, Sequence[Any], Callable[[], Any]], Any],
) -> None:
    """Pass files that are opened for writing and directories that are made below ``root`` through it too."""
    for name, original in (("open", Path.open), ("mkdir", Path.mkdir)):

        def wrapped(
            path: Path,
            *arguments: Any,
            _name: str = name,
            _original: Callable[..., Any] = original,
            **options: Any,
        ) -> Any:
            mode = options.get("mode", arguments[0] if arguments else "r")
            if (path != root and root not in path.parents) or (_name == "open" and mode in ("r", "rb")):
                return _original(path, *arguments, **options)
            return around(_name, (path,), lambda: _original(path, *arguments, **options))

        monkeypatch.setattr(Path, name, wrapped)


@dataclass
class _File:
    current: bytes
    synced: Optional[bytes] = None

    def variants(self) -> List[bytes]:
        """What a power cut may leave of it: old, nothing, half, all."""
        if self.synced == self.current:
            return [self.current]
        return [self.synced or b"", self.current[: len(self.current) // 2], self.current]


@dataclass
class _Directory:
    entries: Dict[str, int] = field(default_factory=dict)


@dataclass
class _Change:
    """Names that change together: directory, name, and the inode that it stands for, or None."""

    names: List[Tuple[int, str, Optional[int]]]
    unsynced: Set[int]

    @classmethod
    def of(cls, *names: Tuple[int, str, Optional[int]]) -> _Change:
        """A change that lasts once every directory that it touches is synced."""
        return cls(list(names), {directory for directory, _, _ in names})


class CrashDisk:
    """Models the disk below ``root`` from now on; what is there now is durable."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._nodes: Dict[int, Any] = {0: _Directory()}
        self._changes: List[_Change] = []
        self._observe(0, root)
        for change in self._changes:
            change.unsynced.clear()
        for node in self._nodes.values():
            if isinstance(node, _File):
                node.synced = node.current

    def around(self, on_crash_point: Callable[[], None]) -> Callable[..., Any]:
        """A function for ``on_primitive`` that follows the program and calls back where power may go."""

        def follow(name: str, arguments: Sequence[Any], call: Callable[[], Any]) -> Any:
            self._observe(0, self._root)
            on_crash_point()
            result = call()
            if name == "_rename":
                self._rename(arguments[0], arguments[1])
            self._observe(0, self._root)
            if name == "_write_synced":
                on_crash_point()
            if name in ("_write_synced", "_sync_file"):
                node = self._nodes[self._find(arguments[0])]
                node.synced = node.current
            elif name == "_sync_directory" and self._inside(arguments[0]):
                self._sync_directory(self._find(arguments[0]))
            return result

        return follow

    def states(self) -> Iterator[Contents]:
        """Every disk that a power cut at this moment may leave."""
        for missing in self._missing_changes():
            kept = [change for change in self._changes if id(change) not in missing]
            tree = self._tree(kept)
            for variant in range(3):
                yield dict(self._contents(tree, 0, "", variant))

    def _missing_changes(self) -> Iterable[Set[int]]:
        pending = [id(change) for change in self._changes if change.unsynced]
        if len(pending) <= _ALL_SUBSETS_UP_TO:
            return (set(c) for n in range(len(pending) + 1) for c in combinations(pending, n))
        prefixes = (set(pending[n:]) for n in range(len(pending) + 1))
        one_missing = ({item} for item in pending)
        one_kept = (set(pending) - {item} for item in pending)
        return chain(prefixes, one_missing, one_kept)

    def _tree(self, changes: List[_Change]) -> Dict[int, Dict[str, int]]:
        tree: Dict[int, Dict[str, int]] = {}
        for change in changes:
            for directory, name, inode in change.names:
                entries = tree.setdefault(directory, {})
                if inode is None:
                    entries.pop(name, None)
                else:
                    entries[name] = inode
        return tree

    def _contents(
        self, tree: Dict[int, Dict[str, int]], inode: int, path: str, variant: int
    ) -> Iterator[Tuple[str, Optional[bytes]]]:
        node = self._nodes[inode]
        if isinstance(node, _File):
            variants = node.variants()
            yield path, variants[min(variant, len(variants) - 1)]
            return
        if path:
            yield path, None
        for name, child in tree.get(inode, {}).items():
            yield from self._contents(tree, child, f"{path}/{name}" if path else name, variant)

    # Following the program

    def _observe(self, inode: int, path: Path) -> None:
        """Note what changed below ``path`` since the last look."""
        directory = self._nodes[inode]
        real = {child.name: child for child in path.iterdir()}
        for name in [name for name in directory.entries if name not in real]:
            self._forget(inode, name)
        for name, child in real.items():
            if name not in directory.entries:
                self._nodes[len(self._nodes)] = _Directory() if child.is_dir() else _File(b"")
                directory.entries[name] = len(self._nodes) - 1
                self._changes.append(_Change.of((inode, name, len(self._nodes) - 1)))
            node = self._nodes[directory.entries[name]]
            if isinstance(node, _File):
                node.current = child.read_bytes()
            else:
                self._observe(directory.entries[name], child)

    def _forget(self, inode: int, name: str) -> None:
        child = self._nodes[inode].entries[name]
        if isinstance(self._nodes[child], _Directory):
            for inner in list(self._nodes[child].entries):
                self._forget(child, inner)
        del self._nodes[inode].entries[name]
        self._changes.append(_Change.of((inode, name, None)))

    def _rename(self, source: Path, target: Path) -> None:
        old, new = self._find(source.parent), self._find(target.parent)
        inode = self._nodes[old].entries.pop(source.name)
        self._nodes[new].entries[target.name] = inode
        self._changes.append(_Change.of((old, source.name, None), (new, target.name, inode)))

    def _sync_directory(self, inode: int) -> None:
        for change in self._changes:
            change.unsynced.discard(inode)

    def _inside(self, path: Path) -> bool:
        return path == self._root or self._root in path.parents

    def _find(self, path: Path) -> int:
        inode = 0
        for part in path.relative_to(self._root).parts:
            inode = self._nodes[inode].entries[part]
        return inode


def rebuild(contents: Contents, root: Path) -> None:
    """Write a state that ``CrashDisk.states`` gave to the new directory ``root``."""
    root.mkdir()
    for path, data in contents.items():
        if data is None:
            (root / path).mkdir(exist_ok=True)
        else:
            (root / path).write_bytes(data)
