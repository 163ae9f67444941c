"""The bodies of a connection's requests while they are received, one after the other.

A short body is the piece that the parser delivers. The rest of a long one whose length was announced is
received straight into memory of its own, placed so that the tensors behind its JSON are aligned.
"""

from __future__ import annotations

from typing import Any, Optional, Tuple

import numpy as np

_ALIGNMENT_BYTES = 64


class Body:
    """The body that is being received.

    Attributes:
        announced: its length by the head; None: it comes in chunks, or there is none.
        received: how much of it has come.
        pieces: how many pieces the parser has delivered.
        rest: the memory that a long body is received into; None: its pieces come from the parser.
        memory: what ``rest`` is part of.
    """

    __slots__ = ("_first", "_joined", "_spare", "announced", "memory", "pieces", "received", "rest")

    def __init__(self) -> None:
        self._spare: Optional[np.ndarray[Any, Any]] = None
        self.clear()

    def clear(self) -> None:
        """Forget what has come, and be ready for the next body."""
        self.announced: Optional[int] = None
        self.received = 0
        self.pieces = 0
        self.rest: Optional[memoryview] = None
        self.memory: Optional[np.ndarray[Any, Any]] = None
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

    def is_long(self) -> bool:
        """Whether an announced body has not come with the data that its head came in."""
        return self.announced is not None and self.received < self.announced

    def receive_directly(self, json_bytes: int) -> None:
        """Give the rest of an announced body its own memory.

        Args:
            json_bytes: where in the body its tensors start.
        """
        size = self.announced or 0
        memory, self._spare = self._spare, None
        if memory is None or len(memory) < size + _ALIGNMENT_BYTES:
            memory = np.empty(size + _ALIGNMENT_BYTES, dtype=np.uint8)
        offset = -(memory.ctypes.data + json_bytes) % _ALIGNMENT_BYTES
        self.memory = memory
        self.rest = memory.data[offset : offset + size]
        self.rest[: self.received] = self._first if self._joined is None else self._joined

    def finish(self) -> Tuple[memoryview, Optional[np.ndarray[Any, Any]]]:
        """Everything that has come, and the memory that it lies in if that can be reused; then as new."""
        first, joined, rest, memory = self._first, self._joined, self.rest, self.memory
        self.announced = None
        self.received = self.pieces = 0
        self._first = b""
        if rest is not None:
            self.rest = self.memory = self._joined = None
            return rest, memory
        self._joined = None
        return memoryview(first if joined is None else joined), None

    def reuse(self, memory: Optional[np.ndarray[Any, Any]]) -> None:
        """Take back the memory of an answered request, for the next long body; None: let go of it.

        Its pages are mapped already, which saves as much time as reading the next body into it takes.
        """
        self._spare = memory
