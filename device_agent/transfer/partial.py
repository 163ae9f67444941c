"""A bundle that is on its way: its files at full length, with holes where chunks are lacking.

Nothing here is synced. Which chunks are there is found by their digests, each time, so that a power cut
costs no more than what it tore; what is complete is checked against the signed manifest when the store takes
it, and synced then.

Python 3.8.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO, Dict, List, Optional, Set, Tuple

from device_agent.archive import Head
from device_agent.errors import BadInput
from device_agent.manifest import MANIFEST_NAME, SIGNATURE_NAME, FileEntry
from device_agent.transfer.offer import Chunk, ChunkedFile, chunks_of, places_of

#: Below this, reading what is installed in search of chunks takes longer than sending them.
_WORTH_A_SEARCH_BYTES = 64 * 1024


class Partial:
    """The directory of a bundle of which some chunks are here.

    Args:
        directory: its own; created, or what an earlier transfer left is used.
        head: the bundle's, authenticated.
        files: the chunks of the manifest's files.
        whole: whether the store holds the bundle already: then the head is all that may be new.

    Raises:
        OSError: the disk failed.
    """

    def __init__(
        self, directory: Path, head: Head, files: Tuple[ChunkedFile, ...], *, whole: bool = False
    ) -> None:
        self.directory = directory
        self.head = head
        self._files = files
        self._places = places_of(files)
        self._lacking: Set[bytes] = set() if whole else set(self._places)
        found_before = directory.is_dir()
        self._write_head()
        if whole:
            return
        for entry in head.manifest.files:
            _make_room(directory / entry.path, entry.size_bytes)
        if found_before:
            for file in files:
                self._take_same(directory / file.path, file)

    # Finding what is here

    def seed(self, sources: List[Tuple[Path, FileEntry]]) -> None:
        """Take what other files on this device hold: equal files first, then equal chunks of others.

        Args:
            sources: files that may resemble the bundle's, most likely first, with what their manifest says of
                them. One that is missing or damaged gives what it still holds.

        Raises:
            OSError: the disk failed while the bundle's own files were written.
        """
        rest = []
        for path, listed in sources:
            same = [file for file in self._files if self._entry(file).sha256 == listed.sha256]
            for file in same:
                self._take_same(path, file)
            if not same:
                rest.append(path)
        for path in rest:
            if self._lacking_bytes() < _WORTH_A_SEARCH_BYTES:
                return
            self._search(path)

    def missing(self) -> List[int]:
        """The chunks to send, numbered through all files; what is needed twice is sent once."""
        numbers = []
        seen: Set[bytes] = set()
        for number, chunk in enumerate(self._chunks()):
            if chunk.sha256 in self._lacking and chunk.sha256 not in seen:
                seen.add(chunk.sha256)
                numbers.append(number)
        return numbers

    def missing_chunks(self) -> List[Chunk]:
        """The chunks that ``missing`` numbers."""
        every = self._chunks()
        return [every[number] for number in self.missing()]

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return not self._lacking

    # Taking chunks

    def take(self, chunk: Chunk, data: bytes) -> None:
        """Write a chunk that was received to every place that it belongs.

        Raises:
            BadInput: it is another chunk, or was damaged on the way.
            OSError: the disk failed.
        """
        if hashlib.sha256(data).digest() != chunk.sha256:
            raise BadInput(
                "a chunk was damaged on its way",
                "its SHA-256 is not the one that was offered",
                "deploy again: what arrived whole is kept",
            )
        self._place(chunk.sha256, data)
        os.utime(str(self.directory))  # whose age says how long ago somebody last came back for it

    def _place(self, sha256: bytes, data: bytes) -> None:
        for path, place in self._places[sha256]:
            with (self.directory / path).open("r+b") as target:
                target.seek(place.offset)
                target.write(data)
        self._lacking.discard(sha256)

    def _take_same(self, source: Path, file: ChunkedFile) -> None:
        """Take the chunks of ``file`` from where they are in an equal file, or in itself."""
        itself = source == self.directory / file.path
        stream = _open(source)
        if stream is None:
            return
        with stream:
            for chunk in file.chunks:
                if chunk.sha256 in self._lacking:
                    data = _read_at(stream, chunk)
                    if hashlib.sha256(data).digest() != chunk.sha256:
                        continue
                    if itself and len(self._places[chunk.sha256]) == 1:
                        self._lacking.discard(chunk.sha256)
                    else:
                        self._place(chunk.sha256, data)

    def _search(self, source: Path) -> None:
        """Take what another file holds, wherever it is in it."""
        for average_bytes in self._averages():
            stream = _open(source)
            if stream is None:
                return
            with stream:
                for chunk in chunks_of(source, average_bytes):
                    if chunk.sha256 in self._lacking:
                        data = _read_at(stream, chunk)
                        if hashlib.sha256(data).digest() == chunk.sha256:
                            self._place(chunk.sha256, data)

    # Helpers

    def _averages(self) -> List[int]:
        """The averages of the files that lack something."""
        return sorted(
            {f.average_bytes for f in self._files if any(c.sha256 in self._lacking for c in f.chunks)}
        )

    def _lacking_bytes(self) -> int:
        return sum(self._places[sha256][0][1].length_bytes for sha256 in self._lacking)

    def _chunks(self) -> List[Chunk]:
        return [chunk for file in self._files for chunk in file.chunks]

    def _entry(self, file: ChunkedFile) -> FileEntry:
        return next(entry for entry in self.head.manifest.files if entry.path == file.path)

    def _write_head(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        contents: Dict[str, Optional[bytes]] = {
            MANIFEST_NAME: self.head.manifest_bytes,
            SIGNATURE_NAME: self.head.signature,
        }
        for name, data in contents.items():
            path = self.directory / name
            if data is not None:
                path.write_bytes(data)
            elif path.exists():
                path.unlink()


def allocated_bytes(directory: Path) -> int:
    """What the files of a directory take on the disk; holes take nothing."""
    paths = (Path(root, name) for root, _, names in os.walk(str(directory)) for name in names)
    return sum(path.lstat().st_blocks * 512 for path in paths)


def _make_room(path: Path, size_bytes: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as stream:
        if stream.tell() != size_bytes:
            stream.truncate(size_bytes)


def _open(path: Path) -> Optional[BinaryIO]:
    try:
        return path.open("rb")
    except OSError:
        return None  # it is gone or unreadable, so it has nothing to give


def _read_at(stream: BinaryIO, chunk: Chunk) -> bytes:
    try:
        stream.seek(chunk.offset)
        return stream.read(chunk.length_bytes)
    except OSError:
        return b""  # a bad sector: the chunk is sent instead
