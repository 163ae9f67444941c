"""An artifact becomes a bundle's directory, with nothing fetched that is here already.

    WORK/parts/SHA256       blobs on their way; what came of one is never asked for again
    WORK/bundle/            files get their place here once their content is checked

A work directory means nothing to anybody else, and survives interruptions of any kind: whatever lies in it is
checked before it is used.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Dict, Mapping, Optional

from device_agent import archive, directory
from device_agent.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SIGNATURE_NAME, FileEntry
from device_agent.oci import artifact
from device_agent.oci.client import OnBytes, Repository
from device_agent.oci.digests import digest_from, digest_of_file
from device_agent.oci.errors import RegistryError

_WORTH_ANOTHER_BYTES = 64 * 1024


def fetch_head(repository: Repository, digest: str) -> archive.Head:
    """Read a bundle's manifest and signature, and check that the artifact holds the files they speak of.

    Args:
        repository: where the artifact lies.
        digest: of the artifact.

    Raises:
        BadInput: the artifact is not a bundle, or the bundle's manifest is malformed (ManifestError).
        RegistryError: it cannot be had.
    """
    found = artifact.parse(repository.manifest(digest))
    manifest_bytes = repository.blob(found.layer(MANIFEST_NAME).digest, MAX_MANIFEST_BYTES)
    signature: Optional[bytes] = None
    if SIGNATURE_NAME in found.named:
        signature = repository.blob(found.layer(SIGNATURE_NAME).digest, directory.MAX_SIGNATURE_BYTES)
    head = archive.head_of(manifest_bytes, signature)
    found.require_files(head.manifest)
    return head


class Assembly:
    """A work directory, with a bundle on its way."""

    def __init__(self, work: Path, head: archive.Head, here: Mapping[str, Path]) -> None:
        """Begin, or go on.

        Args:
            work: the work directory; made where it is missing.
            head: of the bundle.
            here: files that may be used instead of fetching them, by the SHA-256 that they should have.
        """
        self._bundle, self._parts = work / "bundle", work / "parts"
        self._head = head
        self._here = here

    def missing_bytes(self) -> int:
        """How much is to be fetched, taking at its word what lies here under the right SHA-256."""
        missing: Dict[str, int] = {}
        for entry in self._head.manifest.files:
            if entry.sha256 not in self._here and not (self._bundle / entry.path).exists():
                missing[entry.sha256] = entry.size_bytes - _size(self._parts / entry.sha256)
        return sum(max(0, bytes_) for bytes_ in missing.values())

    def complete(self, repository: Repository, on_bytes: OnBytes) -> Path:
        """Fetch what is missing.

        Args:
            repository: where the artifact lies.
            on_bytes: told of each piece that came over the network, in bytes.

        Returns:
            The directory form of the bundle, every byte checked.

        Raises:
            RegistryError: the transfer was cut, or the registry fails; the next call goes on from there.
            OSError: the disk failed.
        """
        self._bundle.mkdir(parents=True, exist_ok=True)
        self._parts.mkdir(exist_ok=True)
        whole = self._tidy()
        kept = {sha256: path for path, sha256 in whole.items()}
        for entry in self._head.manifest.files:
            target = self._bundle / entry.path
            if target in whole:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if not _take(kept.get(entry.sha256, self._here.get(entry.sha256)), entry, target):
                self._fetch(repository, entry, on_bytes)
                os.replace(str(self._parts / entry.sha256), str(target))
            kept[entry.sha256] = target
        self._write(MANIFEST_NAME, self._head.manifest_bytes)
        if self._head.signature is not None:
            self._write(SIGNATURE_NAME, self._head.signature)
        shutil.rmtree(str(self._parts))
        return self._bundle

    def _tidy(self) -> Dict[Path, str]:
        """Remove what is not of this bundle, and what decayed; return the SHA-256 of the files that stay."""
        listed = {entry.path: entry.sha256 for entry in self._head.manifest.files}
        whole: Dict[Path, str] = {}
        for root, _, files in os.walk(str(self._bundle)):
            for path in (Path(root, name) for name in files):
                sha256 = listed.get(path.relative_to(self._bundle).as_posix())
                if sha256 is not None and _holds(path, sha256):
                    whole[path] = sha256
                else:
                    path.unlink()
        wanted = set(listed.values())
        for part in self._parts.iterdir():
            if part.name not in wanted:
                part.unlink()
        return whole

    def _fetch(self, repository: Repository, entry: FileEntry, on_bytes: OnBytes) -> None:
        part = self._parts / entry.sha256
        while True:
            before_bytes = _size(part)
            try:
                return repository.download(digest_from(entry.sha256), entry.size_bytes, part, on_bytes)
            except RegistryError:
                # A line that is cut again and again, but brings something each time, gets there.
                if _size(part) < before_bytes + _WORTH_ANOTHER_BYTES:
                    raise

    def _write(self, name: str, data: bytes) -> None:
        (self._bundle / name).write_bytes(data)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _take(source: Optional[Path], entry: FileEntry, target: Path) -> bool:
    """Use a file that is here already; whether it is there, and whole."""
    if source is None or not _holds(source, entry.sha256):
        return False
    try:
        os.link(str(source), str(target))  # costs no space, and nobody ever writes into either
    except OSError:
        shutil.copyfile(str(source), str(target))  # it lies on another file system
    return True


def _holds(path: Path, sha256: str) -> bool:
    try:
        return not path.is_symlink() and digest_of_file(path) == digest_from(sha256)
    except OSError:
        return False
