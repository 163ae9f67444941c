"""A bundle, either form, ready to be offered to any number of devices: the sender's side of a transfer.

What is sent is cut from where it lies, a directory or a single file; nothing is unpacked. Whoever receives it
checks every byte against the signed manifest.

Python 3.8.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Dict, Iterator, List, Mapping, Tuple, cast

from device_agent import archive
from device_agent.errors import BadInput
from device_agent.manifest import FileEntry, Manifest
from device_agent.transfer import chunking, offer


@dataclass(frozen=True)
class Payload:
    """What is offered, and where the chunks come from.

    Attributes:
        head: the bundle's manifest and signature.
        files: the chunks of every file.
        listed: the chunks as they are offered on the wire.
        places: for each file of the manifest what holds its content, and from which offset in bytes.
    """

    head: archive.Head
    files: Tuple[offer.ChunkedFile, ...]
    listed: bytes
    places: Mapping[str, Tuple[Path, int]]

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.head.manifest

    @property
    def digest(self) -> str:
        """The bundle's digest."""
        return self.head.digest

    def offer(self) -> Tuple[Dict[str, object], bytes]:
        """The request that offers the bundle, and its body."""
        signature = self.head.signature or b""
        message: Dict[str, object] = {
            "op": "offer",
            "manifest_bytes": len(self.head.manifest_bytes),
            "signature_bytes": len(signature),
            "chunks_bytes": len(self.listed),
        }
        return message, self.head.manifest_bytes + signature + self.listed

    def chunks(self, missing: List[List[int]]) -> Iterator[bytes]:
        """The content of chunks.

        Args:
            missing: runs ``[first, count]`` of chunks, numbered through all files.
        """
        chunks = [(file.path, chunk) for file in self.files for chunk in file.chunks]
        for first, count in missing:
            for path, chunk in chunks[first : first + count]:
                holder, offset = self.places[path]
                with holder.open("rb") as stream:
                    stream.seek(offset + chunk.offset)
                    yield stream.read(chunk.length_bytes)


def prepare(bundle: Path) -> Payload:
    """Cut every file of a bundle; each is read twice.

    Raises:
        BadInput: it is missing, unreadable or malformed, or holds something else than its manifest says.
    """
    head = archive.read_head(bundle)
    places = archive.locate(bundle, head)
    try:
        files = tuple(_cut(entry, *places[entry.path]) for entry in head.manifest.files)
    except OSError as error:
        raise BadInput(
            f"the bundle {bundle} cannot be read", error.strerror or str(error), "look at the disk it is on"
        ) from error
    return Payload(head, files, offer.encode(files), places)


def _cut(entry: FileEntry, holder: Path, offset: int) -> offer.ChunkedFile:
    average_bytes = chunking.average_for(entry.size_bytes)
    with holder.open("rb") as stream, io.BufferedReader(_Member(stream, offset, entry.size_bytes)) as member:
        chunks = offer.cut_stream(cast(BinaryIO, member), average_bytes)
    return offer.ChunkedFile(entry.path, average_bytes, tuple(chunks))


class _Member(io.RawIOBase):
    """A part of a file, as a stream of its own."""

    def __init__(self, stream: BinaryIO, offset: int, size_bytes: int) -> None:
        self._stream = stream
        self._offset = offset
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        self._position = base + position
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]  # a writable buffer, as RawIOBase has it
        self._stream.seek(self._offset + self._position)
        data = self._stream.read(min(len(view), max(self._size_bytes - self._position, 0)))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)
