"""The only code that writes what must survive a power cut.

A file system promises little about what is on disk after the power went: data that was not synced may be
missing, and directory changes may have happened in another order. Every function here leaves, at any
moment, either the old state or the new one, and returns only when the new one is on disk: data is synced
before it gets its name, and the directory is synced after (see Pillai et al., "All File Systems Are Not
Created Equal", OSDI 2014).

The six primitives below the line are the only ones that touch the disk, so that a test can record them
and replay every prefix.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Replace the content of the file ``path``.

    There is one writer at a time (the store's lock), so the temporary file has a fixed name: one that a
    crash left behind is overwritten.

    Raises:
        OSError: nothing was replaced; or, if only the last sync failed, the new content may be lost again.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    _write_synced(temporary, data)
    _rename(temporary, path)
    _sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Create ``path`` and what is missing above it.

    A directory that is there already is synced into its parent once more: the process that made it may
    have died before it did so.

    Raises:
        OSError: it cannot be created, or a file is in the way.
    """
    if not path.is_dir():
        make_directory(path.parent)
        _make_directory(path)
    _sync_directory(path.parent)


def publish(temporary: Path, final: Path) -> None:
    """Give the finished directory ``temporary`` its place ``final``, whole or not at all.

    Both lie on one file system and ``final`` does not exist.

    Raises:
        OSError: it is not published; ``temporary`` is still there.
    """
    for root, _, files in os.walk(str(temporary), topdown=False):
        for name in files:
            _sync_file(Path(root, name))
        _sync_directory(Path(root))
    _rename(temporary, final)
    _sync_directory(final.parent)
    _sync_directory(temporary.parent)


def remove(path: Path, trash: Path) -> None:
    """Take the directory ``path`` away at once, then delete it.

    Args:
        path: what is removed.
        trash: a directory on the same file system whose content means nothing; a crash can leave the
            removed directory or parts of it there.

    Raises:
        OSError: ``path`` is still there, whole; or it is gone and some of it is left in the trash.
    """
    buried = trash / f"removed-{path.name}"
    empty(buried)
    _rename(path, buried)
    _sync_directory(path.parent)
    _sync_directory(trash)
    empty(buried)


def empty(path: Path) -> None:
    """Delete a file or a directory whose content means nothing; not atomic, and fine if it is missing."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        _delete_tree(path)
    else:
        path.unlink()


# The primitives


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _make_directory(path: Path) -> None:
    path.mkdir(mode=0o755)


def _rename(source: Path, target: Path) -> None:
    os.replace(str(source), str(target))


def _delete_tree(path: Path) -> None:
    shutil.rmtree(str(path))


def _sync_file(path: Path) -> None:
    descriptor = os.open(str(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(str(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
