"""The bodies of a connection's requests while they are received, one after the other.

A body whose length was announced is put straight into memory of its own, placed so that the tensors behind
its JSON are aligned. A chunked one is the pieces that the parser delivers.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import numpy as np

_ALIGNMENT_BYTES = 64


class Memory:
    """What bodies lie in. One that was answered leaves its memory to the next on its connection.

    Its pages are mapped already, which saves as much time as reading the next body into it takes.
    """

    __slots__ = ("_address", "_array", "_byte_size")

    def __init__(self, byte_size: int) -> None:
        self._array: np.ndarray[Any, Any] = np.empty(byte_size + _ALIGNMENT_BYTES, dtype=np.uint8)
        self._address = int(self._array.ctypes.data)
        self._byte_size = byte_size

    def fits(self, byte_size: int) -> bool:
        """Whether a body of this size has room."""
        return byte_size <= self._byte_size

    def room(self, byte_size: int, aligned_at: int) -> memoryview:
        """Memory for a body whose byte ``aligned_at`` lies where every type of tensor may start."""
        offset = -(self._address + aligned_at) % _ALIGNMENT_BYTES
        return self._array.data[offset : offset + byte_size]


class Body:
    """The body that is being received.

    Attributes:
        announced: its length by the head; None: it comes in chunks, or there is none.
        received: how much of it has come.
        pieces: how many pieces the parser has delivered.
        rest: the memory that an announced body is received into; None: its pieces come from the parser.
    """

    __slots__ = ("_first", "_joined", "_memory", "_spare", "announced", "pieces", "received", "rest")

    def __init__(self) -> None:
        self._spare: Optional[Memory] = None
        self.clear()

    def clear(self) -> None:
        """Forget what has come, and be ready for the next body."""
        self.announced: Optional[int] = None
        self.received = 0
        self.pieces = 0
        self.rest: Optional[memoryview] = None
        self._memory: Optional[Memory] = None
        self._first = b""
        self._joined: Optional[bytearray] = None

    def add(self, piece: bytes) -> None:
        """Append what the parser delivers."""
        self.received += len(piece)
        self.pieces += 1
        if self.pieces == 1:
            self._first = piece
            return
        if self._joined is None:
            self._joined = bytearray(self._first)
        self._joined += piece

    def is_cut(self) -> bool:
        """Whether an announced body has not come with the data that its head came in."""
        return self.announced is not None and self.received < self.announced

    def expect(self, byte_size: int, json_bytes: int) -> memoryview:
        """Give a body of ``byte_size``, or the rest of it, its own memory.

        Args:
            byte_size: of the whole body.
            json_bytes: where in it its tensors start.
        """
        memory, self._spare = self._spare, None
        if memory is None or not memory.fits(byte_size):
            memory = Memory(byte_size)
        self._memory = memory
        self.announced = byte_size
        self.rest = rest = memory.room(byte_size, json_bytes)
        if self.received:
            rest[: self.received] = self._first if self._joined is None else self._joined
        return rest

    def finish(self) -> Tuple[memoryview, Optional[Memory]]:
        """Everything that has come, and the memory that it lies in if that can be reused; then as new."""
        first, joined, rest, memory = self._first, self._joined, self.rest, self._memory
        self.announced = None
        self.received = self.pieces = 0
        self._first = b""
        self._joined = None
        if rest is not None:
            self.rest = self._memory = None
            return rest, memory
        return memoryview(first if joined is None else joined), None

    def reuse(self, memory: Optional[Memory]) -> None:
        """Take back the memory of an answered request, for the next body; None: let go of it."""
        self._spare = memory
