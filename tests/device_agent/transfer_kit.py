"""What a host does to bring a bundle in chunks."""

from __future__ import annotations

from pathlib import Path
from typing import List, Tuple

from device_agent import archive
from device_agent.manifest import Manifest
from device_agent.transfer import chunking, offer


def cut(directory: Path, listed: Manifest) -> Tuple[offer.ChunkedFile, ...]:
    """Cut the files of a directory as a manifest lists them."""
    averages = [(entry, chunking.average_for(entry.size_bytes)) for entry in listed.files]
    return tuple(
        offer.ChunkedFile(entry.path, average, tuple(offer.chunks_of(directory / entry.path, average)))
        for entry, average in averages
    )


def missing_data(bundle: Path, missing: List[List[int]]) -> bytes:
    """The bytes of the chunks that a device asked for."""
    chunks = []
    for file in cut(bundle, archive.read_head(bundle).manifest):
        data = (bundle / file.path).read_bytes()
        chunks += [data[chunk.offset : chunk.offset + chunk.length_bytes] for chunk in file.chunks]
    return b"".join(chunks[i] for first, count in missing for i in range(first, first + count))
