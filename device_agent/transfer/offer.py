"""What a host offers: the chunks of each file of a bundle, in the order in which the device counts them.

On the wire, for each file in the order of the manifest: average size and number of chunks, each a
little-endian u32; then for each chunk its length as u32 and its SHA-256.

Python 3.8.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Dict, List, Tuple

from device_agent.errors import BadInput
from device_agent.manifest import FileEntry, Manifest
from device_agent.transfer import chunking

_FILE = struct.Struct("<II")
_CHUNK = struct.Struct("<I32s")


@dataclass(frozen=True)
class Chunk:
    """A piece of a file: where it begins, its length, and its SHA-256."""

    offset: int
    length_bytes: int
    sha256: bytes


@dataclass(frozen=True)
class ChunkedFile:
    """A file of the bundle: its path, the average that it was cut with, and its chunks in order."""

    path: str
    average_bytes: int
    chunks: Tuple[Chunk, ...]


def chunks_of(path: Path, average_bytes: int) -> List[Chunk]:
    """Cut one file.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return cut_stream(stream, average_bytes)


def cut_stream(stream: BinaryIO, average_bytes: int) -> List[Chunk]:
    """Cut what a seekable stream holds from its beginning to its end.

    Raises:
        OSError: it cannot be read.
    """
    lengths = chunking.lengths(stream, average_bytes)
    stream.seek(0)
    return _digest_each(stream, lengths)


def encode(files: Tuple[ChunkedFile, ...]) -> bytes:
    """The form on the wire."""
    parts = []
    for file in files:
        parts.append(_FILE.pack(file.average_bytes, len(file.chunks)))
        parts += [_CHUNK.pack(chunk.length_bytes, chunk.sha256) for chunk in file.chunks]
    return b"".join(parts)


def max_encoded_bytes(manifest: Manifest) -> int:
    """What an offer of this bundle takes at most: that of the smallest chunks there may be."""
    smallest = chunking.smallest(chunking.MIN_AVERAGE_BYTES)
    most = sum(entry.size_bytes // smallest + 1 for entry in manifest.files)
    return _FILE.size * len(manifest.files) + _CHUNK.size * most


def decode(data: bytes, manifest: Manifest) -> Tuple[ChunkedFile, ...]:
    """Read the form on the wire, holding it to the manifest.

    Raises:
        BadInput: it is not a list of the manifest's files in chunks of the sizes that are allowed.
    """
    files: List[ChunkedFile] = []
    position = 0
    for entry in manifest.files:
        average_bytes, count = _unpack(_FILE, data, position)
        position += _FILE.size
        files.append(_decode_file(entry, average_bytes, count, data, position))
        position += count * _CHUNK.size
    if position != len(data):
        raise _malformed("something follows its end")
    return tuple(files)


def _digest_each(stream: BinaryIO, lengths: List[int]) -> List[Chunk]:
    found = []
    offset = 0
    for length in lengths:
        found.append(Chunk(offset, length, hashlib.sha256(stream.read(length)).digest()))
        offset += length
    return found


def _decode_file(entry: FileEntry, average_bytes: int, count: int, data: bytes, position: int) -> ChunkedFile:
    if not chunking.MIN_AVERAGE_BYTES <= average_bytes <= chunking.MAX_AVERAGE_BYTES:
        raise _malformed(f"chunks of {average_bytes} bytes on average are not allowed")
    least, most = chunking.smallest(average_bytes), chunking.largest(average_bytes)
    chunks: List[Chunk] = []
    offset = 0
    for number in range(count):
        length, sha256 = _unpack(_CHUNK, data, position + number * _CHUNK.size)
        if not (least if number < count - 1 else 1) <= length <= most:
            raise _malformed(f"a chunk of {entry.path} has {length} bytes")
        chunks.append(Chunk(offset, length, sha256))
        offset += length
    if offset != entry.size_bytes:
        raise _malformed(f"the chunks of {entry.path} do not add up to its size")
    return ChunkedFile(entry.path, average_bytes, tuple(chunks))


def _unpack(form: struct.Struct, data: bytes, position: int) -> Tuple[Any, ...]:
    if position + form.size > len(data):
        raise _malformed("it is truncated")
    return form.unpack_from(data, position)


def _malformed(why: str) -> BadInput:
    return BadInput("the list of chunks is malformed", why, "deploy with an edgekit of the agent's version")


def runs_of(numbers: List[int]) -> List[List[int]]:
    """Write rising numbers as runs ``[first, count]``."""
    runs: List[List[int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return runs


def places_of(files: Tuple[ChunkedFile, ...]) -> Dict[bytes, List[Tuple[str, Chunk]]]:
    """Where each chunk belongs, by its SHA-256; the same content may be needed in several places."""
    places: Dict[bytes, List[Tuple[str, Chunk]]] = {}
    for file in files:
        for chunk in file.chunks:
            places.setdefault(chunk.sha256, []).append((file.path, chunk))
    return places
