"""Where a file is cut into chunks: at its content, so that a change moves no cut but the nearest ones.

A rolling hash of the last 32 bytes decides: a polynomial modulo 2^32 (Karp and Rabin, IBM J. R&D, 1987),
with FastCDC's normalized choice of the cut (Xia et al., USENIX ATC 2016): up to the average size a cut is
four times rarer than it would be, after it four times as frequent. Host and device cut alike; the cuts of a
file depend on nothing but its bytes and the average size.

Numpy only; Python 3.8.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import BinaryIO, Iterator, List, Tuple

import numpy as np

MIN_AVERAGE_BYTES = 2 * 1024
MAX_AVERAGE_BYTES = 64 * 1024

_SPREAD = 4  # the smallest chunk is the average divided by it, the largest is the average times it
_WINDOW_BYTES = 32
_BASE = 0x08088405  # odd, so that no byte of the window falls out of the top bits before its time
_OFFSET = np.uint32(0x9E3779B9)  # keeps runs of zero bytes, whose hash is zero, from being cut
_BLOCK_BYTES = 32 * 1024  # so that the arrays below stay in the processor's cache


def average_for(size_bytes: int) -> int:
    """The average chunk of a file: small where it is, as a change or a broken link costs a chunk."""
    for average_bytes in (MIN_AVERAGE_BYTES, 2 * MIN_AVERAGE_BYTES, 8 * MIN_AVERAGE_BYTES):
        if size_bytes <= 1024 * average_bytes:
            return average_bytes
    return MAX_AVERAGE_BYTES


def smallest(average_bytes: int) -> int:
    """The smallest chunk but a file's last."""
    return average_bytes // _SPREAD


def largest(average_bytes: int) -> int:
    """The largest chunk."""
    return average_bytes * _SPREAD


def lengths(stream: BinaryIO, average_bytes: int) -> List[int]:
    """Cut what ``stream`` holds, from where it stands to its end.

    Args:
        stream: read once.
        average_bytes: from ``MIN_AVERAGE_BYTES`` to ``MAX_AVERAGE_BYTES``.

    Returns:
        The chunks' lengths in bytes, in order; their sum is the stream's. Empty for an empty stream.
    """
    often, seldom, size = _candidates(stream, average_bytes)
    found = []
    start = 0
    while size - start > smallest(average_bytes):
        end = min(_next_cut(often, seldom, start, average_bytes), size)
        found.append(end - start)
        start = end
    if size > start:
        found.append(size - start)
    return found


def _next_cut(often: List[int], seldom: List[int], start: int, average_bytes: int) -> int:
    first = bisect_left(seldom, start + smallest(average_bytes))
    if first < len(seldom) and seldom[first] < start + average_bytes:
        return seldom[first]
    first = bisect_left(often, start + average_bytes)
    last = start + largest(average_bytes)
    return min(often[first], last) if first < len(often) else last


def _candidates(stream: BinaryIO, average_bytes: int) -> Tuple[List[int], List[int], int]:
    """Where a chunk may end after the average size, where before it, and the size of the stream."""
    threshold = 2**32 // average_bytes
    often: List[int] = []
    seldom: List[int] = []
    position = 0
    for hashes in _hashes(stream):
        ends = np.flatnonzero(hashes < np.uint32(threshold * _SPREAD))
        rare = ends[hashes[ends] < np.uint32(threshold // _SPREAD)]
        often.extend((ends + (position + 1)).tolist())
        seldom.extend((rare + (position + 1)).tolist())
        position += len(hashes)
    return often, seldom, position


def _hashes(stream: BinaryIO) -> Iterator[np.ndarray]:
    """For each byte the hash of the window that ends with it, block by block."""
    before = b""
    while True:
        block = stream.read(_BLOCK_BYTES)
        if not block:
            return
        data = before + block
        hashes = np.frombuffer(data, np.uint8).astype(np.uint32)
        width = 1
        while width < _WINDOW_BYTES:  # the window doubles: of two neighbours, the older one counts base^width
            hashes[width:] += hashes[:-width] * np.uint32(pow(_BASE, width, 2**32))
            width *= 2
        yield hashes[len(before) :] + _OFFSET
        before = data[-(_WINDOW_BYTES - 1) :]
