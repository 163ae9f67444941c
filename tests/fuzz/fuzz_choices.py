"""Decisions taken from a fuzzer's bytes: each byte chooses one thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """A source of decisions; when the bytes are used up, every further one is the first of its kind."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        """The next byte."""
        at = self._at
        if at >= len(self._data):
            return 0
        self._at = at + 1
        return self._data[at]

    def below(self, bound: int) -> int:
        """A number from 0 to ``bound`` - 1; at most 256 of them."""
        return self.byte() % bound

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.byte() % len(options)]

    def rarely(self) -> bool:
        """True for four bytes of 256."""
        return self.byte() >= 252

    def take(self, count: int) -> bytes:
        """Up to ``count`` bytes as they are."""
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    @property
    def left(self) -> int:
        """Bytes that are not used yet."""
        return len(self._data) - self._at
