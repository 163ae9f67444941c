"""Artifacts and the store that keeps them.

An artifact is a directory that a stage wrote. It is stored under the key of everything that went into
it (the stage's code, settings, inputs, profile and tool versions; see ``edgekit.plan``), so the same work
is never done twice, and a run that was killed goes on where it stopped: an artifact is written to a
temporary directory and renamed into place when it is whole.

    WORKDIR/lock               held by the run that uses this directory
    WORKDIR/artifacts/KEY/     artifact.json and data/
    WORKDIR/timings/           what was measured of this machine to make later work faster; may be deleted
    WORKDIR/tmp/               unfinished work; emptied when the directory is opened and closed
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit import interrupt
from edgekit.errors import BadInput

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Artifact:
    """What a stage made.

    Attributes:
        kind: what it is, such as ``onnx``; stages declare the kinds that they consume and produce.
        path: the directory with its files.
        sha256: digest of the files' names and contents.
        key: digest of everything that went into it.
        parents: keys of the artifacts it was made from.
        metadata: small facts for later stages and the report; JSON.
    """

    kind: str
    path: Path
    sha256: str
    key: str
    parents: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def size_bytes(self) -> int:
        """Sum of the sizes of its files."""
        return sum(file.stat().st_size for file in files_below(self.path))


class Store:
    """The artifacts of one working directory. Make one with ``open_store``."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def timings(self) -> Path:
        """Folder for what is measured of this machine, which no artifact depends on."""
        return self.root / "timings"

    def get(self, key: str) -> Artifact | None:
        """Return the artifact of ``key``, or None if it is absent, or its record or a file was damaged."""
        home = self._home(key)
        try:
            record = json.loads((home / "artifact.json").read_text())
            artifact = Artifact(
                kind=record["kind"],
                path=home / "data",
                sha256=record["sha256"],
                key=key,
                parents=tuple(record["parents"]),
                metadata=record["metadata"],
            )
            whole = record["seal"] == _seal(record) and tree_digest(artifact.path) == artifact.sha256
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return artifact if whole else None

    def build(
        self,
        key: str,
        kind: str,
        parents: tuple[str, ...],
        make: Callable[[Path], Mapping[str, Any]],
    ) -> Artifact:
        """Run ``make`` in a fresh directory and store what it wrote.

        Args:
            key: the artifact's key.
            kind: the artifact's kind.
            parents: keys of the artifacts it is made from.
            make: writes files into the directory it is given, and returns the metadata.

        Raises:
            BadInput: the disk is full. Nothing is left of the unfinished work.
        """
        with disk_full_is_an_error(self.root):
            home = Path(tempfile.mkdtemp(dir=self.root / "tmp"))
            try:
                data = home / "data"
                data.mkdir()
                metadata = json.loads(json.dumps(make(data), sort_keys=True))
                interrupt.check()  # what was made around a lost Ctrl-C may not be what is made without
                record = {
                    "kind": kind,
                    "sha256": tree_digest(data),
                    "parents": list(parents),
                    "metadata": metadata,
                }
                sealed = {**record, "seal": _seal(record)}
                (home / "artifact.json").write_text(json.dumps(sealed, sort_keys=True, indent=2) + "\n")
                _sync_tree(home)
                shutil.rmtree(self._home(key), ignore_errors=True)  # a damaged earlier copy
                home.rename(self._home(key))
                _sync(self.root / "artifacts")
            finally:
                shutil.rmtree(home, ignore_errors=True)
        return Artifact(kind, self._home(key) / "data", record["sha256"], key, parents, metadata)

    def _home(self, key: str) -> Path:
        return self.root / "artifacts" / key


@contextmanager
def open_store(root: Path) -> Iterator[Store]:
    """Open (and create) the store in ``root`` for one run at a time.

    Raises:
        BadInput: another run uses it, or it cannot be written.
    """
    try:
        for part in ("artifacts", "timings", "tmp"):
            (root / part).mkdir(parents=True, exist_ok=True)
        lock = (root / "lock").open("w")
    except OSError as error:
        raise BadInput(
            f"the working directory {root} cannot be used",
            f"{error.strerror}",
            "give another one with --workdir",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(
                f"the working directory {root} is in use",
                "another edgekit run holds its lock",
                "wait for that run, or give another directory with --workdir",
            ) from error
        _remove_unfinished(root)
        try:
            yield Store(root)
        finally:
            _remove_unfinished(root)  # Ctrl-C may fall between making a directory and guarding it


def _remove_unfinished(root: Path) -> None:
    for leftover in (root / "tmp").iterdir():
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def disk_full_is_an_error(where: Path) -> Iterator[None]:
    """Turn "no space left" into an error with three lines; other errors pass through."""
    try:
        yield
    except Exception as error:  # libraries wrap it in errors of their own
        if not disk_is_full(error):
            raise
        raise BadInput(
            f"the disk is full: {where}",
            f"{os.strerror(errno.ENOSPC)}; what was finished before is kept",
            "free some space, or give other directories (--workdir, --out), then run the same command again",
        ) from error


def disk_is_full(error: BaseException | None) -> bool:
    """Whether "no space left" is the error, or what led to it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def tree_digest(directory: Path) -> str:
    """SHA-256 over the sorted relative names and contents of the files below ``directory``."""
    digest = hashlib.sha256()
    for file in files_below(directory):
        digest.update(f"{file.relative_to(directory).as_posix()}\0{file_digest(file)}\n".encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents, lower-case hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def files_below(directory: Path) -> list[Path]:
    """Every regular file below ``directory``, sorted by its relative path."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _seal(record: Mapping[str, Any]) -> str:
    """Digest of a record, by which damage to it is noticed."""
    unsealed = {name: value for name, value in record.items() if name != "seal"}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def _sync_tree(directory: Path) -> None:
    for path in [*files_below(directory), *(p for p in directory.rglob("*") if p.is_dir()), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
