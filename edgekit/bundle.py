"""Pack a bundle, open it and describe it: the host's side of ``device_agent.manifest``.

A bundle has two forms that hold the same files: a directory ``OUT/NAME`` and a single file
``OUT/NAME.edgekit`` (see ``docs/bundle.md``). Both are published whole or not at all, and the same
content gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from device_agent import archive, signature
from device_agent.errors import AgentError
from device_agent.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Resources,
    digest,
    dumps,
    schema_of,
)
from edgekit.errors import BadInput
from edgekit.profile import Profile

_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Bundle:
    """A bundle that was packed.

    Attributes:
        directory: its directory form.
        archive: its single-file form.
        digest: its identity, the SHA-256 of its manifest.
        manifest: its manifest, with the files filled in.
    """

    directory: Path
    archive: Path
    digest: str
    manifest: Manifest


class OpenBundle(NamedTuple):
    """An unpacked bundle whose files were checked against its manifest."""

    directory: Path
    manifest: Manifest
    digest: str


def pack(staging: Path, manifest: Manifest, out: Path) -> Bundle:
    """Make a bundle from the files in ``staging`` and publish both forms under ``out``.

    Args:
        staging: directory with every file of the bundle at its path inside the bundle.
        manifest: what is known of the bundle; its ``schema`` and ``files`` are replaced by what is true.
        out: directory that gets ``NAME/`` and ``NAME.edgekit``. A bundle of that name is replaced; one
            with the same digest is kept as it is, with its signature.

    Raises:
        BadInput: a file that cannot be in a bundle, a manifest that contradicts the files, or something
            in ``out`` under the bundle's name that is not a bundle.
    """
    with bundle_errors():
        manifest = replace(manifest, schema=schema_of(manifest), files=_entries(staging))
        manifest_bytes = dumps(manifest)
        identity = digest(manifest_bytes)
        directory, single = out / manifest.name, out / (manifest.name + archive.SUFFIX)
        out.mkdir(parents=True, exist_ok=True)
        if not _holds(directory, identity):
            _publish(staging, manifest, manifest_bytes, directory)
        if not _holds(single, identity):
            archive.pack(directory, single)
    return Bundle(directory, single, identity, manifest)


def resources_of(profile: Profile) -> Resources | None:
    """What a bundle for a device asks its agent for; None where the profile says nothing of it."""
    serving = profile.serving
    return None if serving is None else Resources(serving.threads, serving.cpus, serving.numa_node)


@contextmanager
def open_bundle(path: Path) -> Iterator[OpenBundle]:
    """Give the unpacked bundle at ``path``, either form, with every file checked against the manifest.

    The signature is not checked: see ``edgekit.sign.verify``. A single file is unpacked into a temporary
    directory that is gone after the ``with`` block.

    Raises:
        BadInput: not a bundle, malformed, damaged, or newer than this edgekit understands.
    """
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary:
        with bundle_errors():
            head = archive.read_head(path)
            if path.is_dir():
                directory = path
                archive.check_files(path, head.manifest)
            else:
                directory = Path(temporary, head.manifest.name)
                archive.unpack(path, head, directory)
        yield OpenBundle(directory, head.manifest, head.digest)


def inspect(path: Path) -> dict[str, Any]:
    """Describe the bundle at ``path``, either form, for ``edgekit inspect --json``.

    Returns:
        The manifest's keys and ``path``, ``form`` (``directory`` or ``file``), ``digest``, ``size_bytes``,
        ``signed`` and ``key_fingerprint`` (null if not signed; not verified here).

    Raises:
        BadInput: not a bundle, malformed, damaged, or newer than this edgekit understands.
    """
    with open_bundle(path) as opened, bundle_errors():
        head = archive.read_head(path)
        hint = None if head.signature is None else signature.key_hint(head.signature)
        return {
            **asdict(opened.manifest),
            "path": str(path),
            "form": "directory" if path.is_dir() else "file",
            "digest": opened.digest,
            "size_bytes": head.size_bytes,
            "signed": head.signature is not None,
            "key_fingerprint": hint,
        }


@contextmanager
def bundle_errors() -> Iterator[None]:
    """Turn the agent's errors about a bundle, and the disk's, into edgekit's own."""
    try:
        yield
    except AgentError as error:
        raise BadInput(error.what, error.why, error.fix) from error
    except OSError as error:
        raise BadInput(
            f"a bundle's file cannot be read or written: {error.filename}",
            error.strerror or str(error),
            "check that the disk has space and that you may write there",
        ) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file at ``path``; a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _entries(staging: Path) -> tuple[FileEntry, ...]:
    if not staging.is_dir():
        raise BadInput(
            f"{staging} is not a directory", "there is nothing to pack", "give a directory of files"
        )
    return tuple(_entry(staging, path) for path in sorted(staging.rglob("*")) if not _is_directory(path))


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _entry(staging: Path, path: Path) -> FileEntry:
    relative = path.relative_to(staging).as_posix()
    if path.is_symlink() or not path.is_file():
        raise BadInput(
            f"{relative} cannot be part of a bundle",
            "it is a link or a special file; a bundle holds regular files only",
            f"put a copy of the file into {staging}",
        )
    sha256 = hashlib.sha256()
    size = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha256.update(chunk)
            size += len(chunk)
    return FileEntry(relative, sha256.hexdigest(), size)


def _holds(path: Path, identity: str) -> bool:
    """Whether the bundle ``identity`` is already at ``path``, whole."""
    try:
        with open_bundle(path) as opened:
            return opened.digest == identity
    except BadInput:
        return False


def _publish(staging: Path, manifest: Manifest, manifest_bytes: bytes, directory: Path) -> None:
    """Copy the bundle beside its place and swap it in."""
    fresh = directory.with_name(f".{directory.name}.new")
    _remove(fresh)
    for entry in manifest.files:
        target = fresh / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(staging / entry.path, target)
    write_atomically(fresh / MANIFEST_NAME, manifest_bytes)
    place(fresh, directory)


def place(fresh: Path, directory: Path) -> None:
    """Give a finished bundle's directory its place, on the same file system; a bundle there is replaced.

    Raises:
        BadInput: something is there that is not a bundle.
    """
    old = directory.with_name(f".{directory.name}.old")
    _remove(old)
    if directory.exists():
        refuse_foreign(directory)
        directory.rename(old)
    fresh.rename(directory)
    _remove(old)


def _remove(directory: Path) -> None:
    """Remove what an interrupted run may have left."""
    if directory.exists():
        shutil.rmtree(directory)


def refuse_foreign(directory: Path) -> None:
    """Refuse to replace what is not a bundle.

    Raises:
        BadInput: it is none.
    """
    if not (directory / MANIFEST_NAME).is_file():
        raise BadInput(
            f"{directory} is in the way",
            "the bundle belongs there, and what is there is not a bundle",
            "choose another --out or move it away",
        )
