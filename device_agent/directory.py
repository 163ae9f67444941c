"""The directory form of a bundle: exactly the manifest's files, regular and unchanged.

Standard library only; Python 3.8.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO, Iterator, Optional, Tuple

from device_agent import manifest as manifest_module
from device_agent.errors import BadInput, TrustError
from device_agent.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry, Manifest

MAX_SIGNATURE_BYTES = 4 * 1024 * 1024
REMAKE = "make or copy the bundle again; `edgekit verify` shows whether a copy is whole"

_CHUNK_BYTES = 1024 * 1024


def check_files(directory: Path, manifest: Manifest) -> None:
    """Check that an unpacked bundle holds exactly the manifest's files, unchanged.

    Raises:
        TrustError: a file changed, is missing, is not listed, or is not a regular file.
    """
    _refuse_unlisted(directory, manifest)
    for entry in manifest.files:
        with open_listed(directory, entry) as source:
            copy_exactly(source, entry, None)


def check_listing(directory: Path, manifest: Manifest) -> None:
    """Check that an unpacked bundle holds exactly the manifest's files by their sizes; reads no content.

    Raises:
        TrustError: a file is missing, not listed, not a regular file, unreadable, or of another size.
    """
    _refuse_unlisted(directory, manifest)
    for entry in manifest.files:
        open_listed(directory, entry).close()


def copy_files(directory: Path, manifest: Manifest, destination: Path) -> None:
    """Copy the manifest's files, checking every byte on the way.

    Raises:
        TrustError: as ``check_files``.
        OSError: the destination cannot be written.
    """
    _refuse_unlisted(directory, manifest)
    for entry in manifest.files:
        with open_listed(directory, entry) as source, create(destination / entry.path) as out:
            copy_exactly(source, entry, out)


def read_signature(directory: Path) -> Optional[bytes]:
    """Read ``model.sig``; None if there is none.

    Raises:
        TrustError: it is unreadable, no regular file, or too large.
    """
    path = directory / SIGNATURE_NAME
    try:
        data = manifest_module.read_regular(path, MAX_SIGNATURE_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TrustError(f"{path} cannot be read", str(error.strerror), REMAKE) from error
    if len(data) > MAX_SIGNATURE_BYTES:
        raise TrustError(f"{path} is too large", f"the limit is {MAX_SIGNATURE_BYTES} bytes", REMAKE)
    return data


def _refuse_unlisted(directory: Path, manifest: Manifest) -> None:
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME, SIGNATURE_NAME}
    for path, mode in _walk(directory):
        if not stat.S_ISREG(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
            raise TrustError(f"the bundle holds something else than files: {path}", f"it is {kind}", REMAKE)
        if path not in listed:
            raise TrustError(
                f"the bundle holds a file that its manifest does not list: {path}",
                "it may have been added after the bundle was made",
                "remove the file, or " + REMAKE,
            )


def _walk(directory: Path) -> Iterator[Tuple[str, int]]:
    """Yield the POSIX path and the mode of everything below ``directory`` that is not a directory."""
    for root, directories, files in os.walk(str(directory)):
        for name in directories + files:
            path = Path(root, name)
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode):
                yield path.relative_to(directory).as_posix(), mode


def open_listed(directory: Path, entry: FileEntry) -> BinaryIO:
    """Open one of the manifest's files, which has the size that the manifest says.

    Raises:
        TrustError: it is missing, not a regular file, unreadable, or of another size.
    """
    try:
        stream = manifest_module.open_regular(directory / entry.path, follow_links=False)
    except FileNotFoundError as error:
        raise TrustError(
            f"a file of the bundle is missing: {entry.path}", "the manifest lists it", REMAKE
        ) from error
    except OSError as error:
        raise _unreadable(entry, error) from error
    size = os.fstat(stream.fileno()).st_size
    if size != entry.size_bytes:
        stream.close()
        raise _changed(entry, f"it has {size} bytes, the manifest says {entry.size_bytes}")
    return stream


def create(path: Path) -> BinaryIO:
    """Create a file that must not exist, and its parents.

    Raises:
        OSError: it exists or cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.fdopen(os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb")


def copy_exactly(source: BinaryIO, entry: FileEntry, out: Optional[BinaryIO]) -> None:
    """Read a file's content from ``source``, to ``out`` if there is one, and check its digest.

    Raises:
        TrustError: the digest is not the manifest's, or the source cannot be read.
        BadInput: the source ends too early.
        OSError: ``out`` cannot be written.
    """
    sha256 = hashlib.sha256()
    left = entry.size_bytes
    while left:
        chunk = _read_chunk(source, min(left, _CHUNK_BYTES), entry)
        sha256.update(chunk)
        if out is not None:
            out.write(chunk)
        left -= len(chunk)
    if sha256.hexdigest() != entry.sha256:
        raise _changed(entry, "its SHA-256 is not the manifest's")


def _read_chunk(source: BinaryIO, limit_bytes: int, entry: FileEntry) -> bytes:
    try:
        chunk = source.read(limit_bytes)
    except OSError as error:
        raise _unreadable(entry, error) from error
    if not chunk:
        raise BadInput("the bundle is truncated", f"it ends inside {entry.path}", REMAKE)
    return chunk


def _unreadable(entry: FileEntry, error: OSError) -> TrustError:
    return TrustError(f"a file of the bundle cannot be read: {entry.path}", str(error.strerror), REMAKE)


def _changed(entry: FileEntry, why: str) -> TrustError:
    return TrustError(f"a file of the bundle was changed: {entry.path}", why, REMAKE)
