"""Headers of a POSIX ustar archive (IEEE Std 1003.1, "pax", section "ustar Interchange Format").

Written here rather than taken from ``tarfile`` so that the bytes are the same under every Python version
and so that the reader has nothing to interpret: it compares a header with the one that it expects.

Standard library only; Python 3.8.
"""

from __future__ import annotations

from typing import Optional, Tuple

from device_agent.errors import BadInput

BLOCK_BYTES = 512
END = bytes(2 * BLOCK_BYTES)
MAX_MEMBER_BYTES = 8**11 - 1  # eleven octal digits

_NAME_BYTES = 100
_PREFIX_BYTES = 155
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a directory",
    b"6": "a pipe",
}


def header(path: str, size_bytes: int) -> bytes:
    """Build the only header that a member may have.

    Raises:
        BadInput: the path or the size does not fit into the format.
    """
    if size_bytes > MAX_MEMBER_BYTES:
        raise BadInput(
            f"{path} is too large for the single-file form",
            f"it has {size_bytes} bytes; the limit of the format is {MAX_MEMBER_BYTES}",
            "use the directory form of the bundle",
        )
    prefix, name = _split(path)
    fields = b"".join((
        name.ljust(_NAME_BYTES, b"\0"),
        b"0000644\0",  # mode
        b"0000000\0" * 2,  # user and group
        b"%011o\0" % size_bytes,
        b"00000000000\0",  # modification time
        b" " * 8,  # the checksum counts itself as spaces
        b"0",  # a regular file
        bytes(100),  # no link
        b"ustar\0" b"00",
        bytes(64),  # no user and group names
        b"0000000\0" * 2,  # no device numbers
        prefix.ljust(_PREFIX_BYTES, b"\0"),
        bytes(12),
    ))  # fmt: skip
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def _split(path: str) -> Tuple[bytes, bytes]:
    """Split a path into the format's prefix (155 bytes) and name (100 bytes) at a slash."""
    raw = path.encode("utf-8")
    if len(raw) <= _NAME_BYTES:
        return b"", raw
    cut = raw.find(b"/", len(raw) - _NAME_BYTES - 1)
    if cut < 1 or cut > _PREFIX_BYTES:
        raise BadInput(
            f"the path is too long for the single-file form: {path}",
            "the format holds 100 bytes after a slash and 155 before it",
            "use a shorter file name",
        )
    return raw[:cut], raw[cut + 1 :]


def declared_name(header: bytes) -> str:
    """Read the path that a header gives, with undecodable bytes escaped."""
    prefix, name = header[345:500].rstrip(b"\0"), header[:100].rstrip(b"\0")
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace")


def declared_size(header: bytes) -> Optional[int]:
    """Read a header's size; None if its checksum is wrong or it is not a ustar header at all."""
    try:
        checksum = int(header[148:156].strip(b"\0 "), 8)
        size = int(header[124:136].strip(b"\0 "), 8)
    except ValueError:
        return None
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum or header[257:262] != b"ustar":
        return None
    return size if size >= 0 else None


def padding(size_bytes: int) -> bytes:
    """Zero bytes between the end of a member and the next header."""
    return bytes(-size_bytes % BLOCK_BYTES)


def special_kind(header: bytes) -> Optional[str]:
    """Name what a header describes; None for a regular file or a type that ustar does not define."""
    return _KINDS.get(header[156:157])
