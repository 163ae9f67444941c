"""Content codings of HTTP bodies: gzip and deflate, bounded. Pure functions."""

from __future__ import annotations

import zlib
from typing import Optional, Sequence, Tuple

from device_agent.server.fields import ProtocolError
from device_agent.tensors import Buffer

# zlib's window bits also say which container is read: a zlib stream, or gzip.
_WINDOW_BITS = {b"gzip": 16 + zlib.MAX_WBITS, b"x-gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_LEVEL = 1  # links to a device are faster than its processor compresses


def decompress(body: memoryview, coding: Optional[bytes], max_bytes: int) -> memoryview:
    """Undo a request's ``Content-Encoding``.

    Raises:
        ProtocolError: 501 for an unknown coding, 400 for corrupt data, 413 for more than ``max_bytes``.
    """
    if coding is None or coding.lower() in (b"", b"identity"):
        return body
    bits = _WINDOW_BITS.get(coding.lower())
    if bits is None:
        raise ProtocolError(501, f"Content-Encoding {coding.decode('latin-1')!r} is not supported")
    stream = zlib.decompressobj(bits)
    try:
        data = stream.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise ProtocolError(400, f"the body is not what its Content-Encoding says: {error}") from error
    if len(data) > max_bytes:
        raise ProtocolError(413, f"the body has more than {max_bytes} bytes when decompressed")
    if not stream.eof or stream.unused_data:
        raise ProtocolError(400, "the compressed body is cut short or has data after its end")
    return memoryview(data)


def compress(parts: Sequence[Buffer], accepted: Optional[bytes]) -> Tuple[Sequence[Buffer], bytes]:
    """Compress an answer for a client that asks for one coding.

    A list such as ``gzip, deflate, br`` is what client libraries always send; it says what they can read, not
    that the device should spend its processor on it. Such clients get the answer as it is.

    Returns:
        The parts to send, and the header line to send with them (empty: not compressed).
    """
    coding = (accepted or b"").strip().lower()
    if coding not in (b"gzip", b"deflate"):
        return parts, b""
    stream = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS[coding])
    packed = [stream.compress(part) for part in parts]
    packed.append(stream.flush())
    return packed, b"Content-Encoding: %s\r\n" % coding
