"""The two forms of a bundle: a directory, and one file ``NAME.edgekit`` that holds the same files.

The single file is an uncompressed ustar archive that any ``tar`` unpacks, in exactly one layout:
``manifest.json``, then ``model.sig`` if the bundle is signed, then the manifest's files by path; no time
stamps, no owners, mode 0644. The manifest therefore determines every header, and the reader accepts
nothing but the header that it expects next: links, devices, ``..`` and files that the manifest does not
list have no way in, and no size comes from anywhere but the manifest.

Standard library only; Python 3.8.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Callable, Dict, List, NoReturn, Optional, Tuple

from device_agent import directory, ustar
from device_agent import manifest as manifest_module
from device_agent.errors import BadInput
from device_agent.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SIGNATURE_NAME, FileEntry, Manifest
from device_agent.manifest_checks import safe_path

SUFFIX = ".edgekit"


@dataclass(frozen=True)
class Head:
    """What stands before the files of a bundle: enough to decide whether to read them at all.

    Attributes:
        manifest: the parsed manifest.
        manifest_bytes: its exact bytes; the signature covers them.
        digest: the bundle's digest.
        signature: the bytes of ``model.sig``; None where the bundle is not signed.
    """

    manifest: Manifest
    manifest_bytes: bytes
    digest: str
    signature: Optional[bytes]

    @property
    def size_bytes(self) -> int:
        """Bytes of the unpacked bundle."""
        own = len(self.manifest_bytes) + len(self.signature or b"")
        return own + sum(entry.size_bytes for entry in self.manifest.files)


def read_head(bundle: Path) -> Head:
    """Read the manifest and the signature of either form; no other file is touched.

    Raises:
        ManifestError: no manifest, or a bad one.
        BadInput: not a bundle, or an archive that this module did not write.
    """
    if os.path.isdir(str(bundle)):
        manifest_bytes = manifest_module.read_bytes(bundle)
        return head_of(manifest_bytes, directory.read_signature(bundle))
    with _open_archive(bundle) as stream:
        return _ArchiveReader(bundle, stream).head()


def head_of(manifest_bytes: bytes, signature: Optional[bytes]) -> Head:
    """The head of a bundle whose manifest and signature came another way than as files.

    Raises:
        ManifestError: the manifest is malformed.
    """
    parsed = manifest_module.loads(manifest_bytes)
    return Head(parsed, manifest_bytes, manifest_module.digest(manifest_bytes), signature)


def unpack(bundle: Path, head: Head, destination: Path) -> None:
    """Copy either form into the new directory ``destination``, checking every byte on the way.

    What is written is ``head`` and the files that its manifest lists, with their digests verified while
    they are copied; a bundle that changed since ``read_head`` is refused. Nothing is left behind when an
    error is raised.

    Raises:
        TrustError: a file's content differs from the manifest, is missing, or is not listed.
        BadInput: an archive that is damaged, truncated, or not in the one layout.
        OSError: ``destination`` exists or cannot be written.
    """
    destination.mkdir()
    try:
        if os.path.isdir(str(bundle)):
            directory.copy_files(bundle, head.manifest, destination)
        else:
            with _open_archive(bundle) as stream:
                _ArchiveReader(bundle, stream).unpack(head, destination)
        _write_head(head, destination)
    except BaseException:
        shutil.rmtree(str(destination), ignore_errors=True)
        raise


def locate(bundle: Path, head: Head) -> Dict[str, Tuple[Path, int]]:
    """Find where the content of each file begins in either form, without reading it.

    Returns:
        For each path of the manifest the file that holds it, and the offset in bytes.

    Raises:
        TrustError: a file is missing, not listed, not a regular file, or of another size.
        BadInput: an archive that is damaged, truncated, or not in the one layout.
    """
    if os.path.isdir(str(bundle)):
        directory.check_listing(bundle, head.manifest)
        return {entry.path: (bundle / entry.path, 0) for entry in head.manifest.files}
    with _open_archive(bundle) as stream:
        offsets = _ArchiveReader(bundle, stream).offsets(head)
    return {path: (bundle, offset) for path, offset in offsets.items()}


def pack(unpacked: Path, archive: Path) -> None:
    """Write the single-file form of the bundle in ``unpacked``; the same content gives the same bytes.

    Raises:
        ManifestError: the manifest is malformed.
        TrustError: a file differs from the manifest, is missing, or is not listed.
        BadInput: a path or a file is too large for the format.
    """
    head = read_head(unpacked)
    directory.check_files(unpacked, head.manifest)
    temporary = archive.with_name(f".{archive.name}.tmp")
    try:
        with temporary.open("wb") as out:
            for name, data in _head_members(head):
                out.write(ustar.header(name, len(data)) + data + ustar.padding(len(data)))
            for entry in _in_order(head.manifest):
                out.write(ustar.header(entry.path, entry.size_bytes))
                with directory.open_listed(unpacked, entry) as source:
                    directory.copy_exactly(source, entry, out)
                out.write(ustar.padding(entry.size_bytes))
            out.write(ustar.END)
            out.flush()
            os.fsync(out.fileno())
        os.replace(str(temporary), str(archive))
    finally:
        if temporary.exists():
            temporary.unlink()


def check_files(unpacked: Path, manifest: Manifest) -> None:
    """Check that an unpacked bundle holds exactly the manifest's files, unchanged.

    Raises:
        TrustError: a file changed, is missing, is not listed, or is not a regular file.
    """
    directory.check_files(unpacked, manifest)


# The single-file form


class _ArchiveReader:
    """Reads an archive front to back, holding each header to the one that the manifest implies."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self._path = path
        self._stream = stream

    def head(self) -> Head:
        manifest_bytes = self._small_member(self._block(), MANIFEST_NAME, MAX_MANIFEST_BYTES)
        if manifest_bytes is None:
            self._refuse(f"it does not begin with {MANIFEST_NAME}")
        signature = self._small_member(self._block(), SIGNATURE_NAME, directory.MAX_SIGNATURE_BYTES)
        return head_of(manifest_bytes, signature)

    def unpack(self, head: Head, destination: Path) -> None:
        def copy(entry: FileEntry) -> None:
            with directory.create(destination / entry.path) as out:
                directory.copy_exactly(self._stream, entry, out)

        self._walk(head, copy)

    def offsets(self, head: Head) -> Dict[str, int]:
        found: Dict[str, int] = {}

        def skip(entry: FileEntry) -> None:
            found[entry.path] = self._stream.tell()
            self._stream.seek(entry.size_bytes, os.SEEK_CUR)

        self._walk(head, skip)
        return found

    def _walk(self, head: Head, take: Callable[[FileEntry], None]) -> None:
        """Have ``take`` move over the content of each file, and hold all that is between to the layout."""
        for name, data in _head_members(head):
            if self._small_member(self._block(), name, len(data)) != data:
                self._refuse("it changed while it was read")
        seen: List[str] = []
        for entry in _in_order(head.manifest):
            header = self._block()
            if header != ustar.header(entry.path, entry.size_bytes):
                self._explain(header, entry, seen, head.manifest)
            take(entry)
            self._skip_padding(entry.size_bytes)
            seen.append(entry.path)
        end = self._block()
        if end.strip(b"\0"):
            self._explain(end, None, seen, head.manifest)
        if self._block() + self._stream.read(1) != bytes(ustar.BLOCK_BYTES):
            self._refuse("something follows its end")

    def _small_member(self, header: bytes, name: str, limit_bytes: int) -> Optional[bytes]:
        """Return the content of the member that ``header`` begins, or None if it is another member."""
        size = ustar.declared_size(header)
        if size is None or ustar.declared_name(header) != name:
            return None
        if size > limit_bytes:
            self._refuse(f"{name} has {size} bytes; the limit is {limit_bytes}")
        if header != ustar.header(name, size):
            self._refuse(f"the header of {name} is not the one that edgekit writes")
        data = self._read(size)
        self._skip_padding(size)
        return data

    def _block(self) -> bytes:
        return self._read(ustar.BLOCK_BYTES)

    def _skip_padding(self, size_bytes: int) -> None:
        padding = ustar.padding(size_bytes)
        if self._read(len(padding)) != padding:
            self._refuse("there is something between two of its members")

    def _read(self, size_bytes: int) -> bytes:
        data = self._stream.read(size_bytes)
        if len(data) < size_bytes:
            self._refuse("it is truncated")
        return data

    def _refuse(self, why: str) -> NoReturn:
        raise BadInput(f"{self._path} is not a usable bundle archive", why, directory.REMAKE)

    def _explain(
        self, header: bytes, expected: Optional[FileEntry], seen: List[str], manifest: Manifest
    ) -> NoReturn:
        """Refuse an unexpected header with the reason that a person can act on."""
        size, name = ustar.declared_size(header), ustar.declared_name(header)
        if size is None:
            missing = expected.path if expected is not None else "its end"
            self._refuse(f"a damaged header or the archive's end stands where {missing} should begin")
        sizes: Dict[str, int] = {entry.path: entry.size_bytes for entry in manifest.files}
        kind = ustar.special_kind(header)
        if kind is not None:
            self._refuse(f"{name!r} is {kind}; a bundle holds regular files only")
        if not safe_path(name):
            self._refuse(f"the path {name!r} leads out of the bundle")
        if name in seen or name in (MANIFEST_NAME, SIGNATURE_NAME):
            self._refuse(f"{name!r} is there twice, or out of its place")
        if name not in sizes:
            self._refuse(f"it holds {name!r}, which the manifest does not list")
        if size != sizes[name]:
            self._refuse(f"{name!r} has {size} bytes, the manifest says {sizes[name]}")
        self._refuse(f"{name!r} is out of its place or has a header that edgekit does not write")


def _open_archive(path: Path) -> BinaryIO:
    try:
        return manifest_module.open_regular(path)
    except PermissionError as error:
        raise BadInput(
            f"the bundle {path} cannot be read",
            "the user that this runs as may not; the agent runs as its own",
            "put it where that user may read it, such as /srv, or use `edgekit deploy`",
        ) from error
    except OSError as error:
        raise BadInput(
            f"the bundle {path} cannot be read",
            str(error.strerror),
            "give the directory or the .edgekit file that `edgekit compress` wrote",
        ) from error


def _in_order(manifest: Manifest) -> List[FileEntry]:
    return sorted(manifest.files, key=lambda entry: entry.path)


# The manifest and the signature


def _head_members(head: Head) -> List[Tuple[str, bytes]]:
    members = [(MANIFEST_NAME, head.manifest_bytes)]
    if head.signature is not None:
        members.append((SIGNATURE_NAME, head.signature))
    return members


def _write_head(head: Head, destination: Path) -> None:
    for name, data in _head_members(head):
        with directory.create(destination / name) as out:
            out.write(data)
