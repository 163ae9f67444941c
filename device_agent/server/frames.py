"""Where the frames of HTTP/2 end in a stream of bytes (RFC 9113, section 4.1).

Python 3.8.
"""

from __future__ import annotations

from typing import Optional

#: Says that no new stream is taken, and names none that was lost (section 6.8).
GOAWAY = b"\0\0\x08" + b"\x07\0" + b"\0\0\0\0" + b"\x7f\xff\xff\xff" + b"\0\0\0\0"

_HEADER_BYTES = 9
_HEADER_BLOCKS = (0x1, 0x5, 0x9)  # HEADERS, PUSH_PROMISE, CONTINUATION
_END_HEADERS = 0x4


class Frames:
    """Follows what one side of a connection sends, after its preface.

    Attributes:
        between: whether a frame of this side's own may be sent now: a frame has ended, and none has begun.
    """

    def __init__(self) -> None:
        self.between = False  # the first frame has to be the sender's settings
        self._header = b""
        self._left_bytes = 0  # of the payload
        self._block_goes_on = False  # nothing may come between a block of header fields and its continuation

    def advance(self, data: bytes) -> Optional[int]:
        """Follow what was sent next.

        Returns:
            The first place in ``data`` where a frame may be put in; None: there is none.
        """
        first: Optional[int] = None
        position = 0
        while position < len(data):
            position = self._step(data, position)
            if self.between and first is None:
                first = position
        return first

    def _step(self, data: bytes, position: int) -> int:
        """Go to the end of a header, of a payload, or of the data."""
        if self._left_bytes:
            taken = min(self._left_bytes, len(data) - position)
            self._left_bytes -= taken
        else:
            taken = min(_HEADER_BYTES - len(self._header), len(data) - position)
            self._header += data[position : position + taken]
            if len(self._header) == _HEADER_BYTES:
                self._begin()
        self.between = not self._left_bytes and not self._header and not self._block_goes_on
        return position + taken

    def _begin(self) -> None:
        kind, flags = self._header[3], self._header[4]
        self._left_bytes = int.from_bytes(self._header[:3], "big")
        self._block_goes_on = kind in _HEADER_BLOCKS and not flags & _END_HEADERS
        self._header = b""
