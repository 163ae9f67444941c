"""System shared memory: a process on the same device passes tensors without sending them.

The client creates a POSIX shared memory object, registers it here under a name, and then names region, offset
and size in place of data. Requests view the memory in place.

The kernel ends a process that touches a mapped page which the file no longer has (SIGBUS). An object that has
shrunk since it was registered is therefore looked at before each use, and refused. What is left is a client
that shrinks its object while a request of its own is computed; only processes that may write to this device's
``/dev/shm`` can do that, and a client that makes a new object of the same name does not.
"""

from __future__ import annotations

import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from device_agent.server.fields import ProtocolError, is_size, shown

_MAX_REGIONS = 256  # each holds a file open
_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\0\ud800-\udfff]+")
_DIRECTORY = Path("/dev/shm")  # noqa: S108 - this is where POSIX shared memory lives on Linux


@dataclass(frozen=True)
class _Region:
    """A registered region: its key and place as the client gave them, and the object from its start."""

    key: str
    offset: int
    byte_size: int
    mapped: mmap.mmap


class Regions:
    """The registered regions, by name."""

    def __init__(self) -> None:
        self._regions: Dict[str, _Region] = {}

    def register(self, name: str, key: Any, offset: Any, byte_size: Any) -> None:
        """Map a shared memory object.

        Args:
            name: what requests call it.
            key: the name of the object, as given to ``shm_open``.
            offset: where the region starts in the object, in bytes.
            byte_size: its length.

        Raises:
            ProtocolError: 400: the name is taken, there is no such object, it is too small, or there are too
                many regions.
        """
        if name in self._regions:
            raise ProtocolError(400, f"shared memory region '{name}' is registered already")
        if len(self._regions) >= _MAX_REGIONS:
            raise ProtocolError(400, f"there are {_MAX_REGIONS} shared memory regions; unregister some")
        object_name = key[1:] if isinstance(key, str) and key.startswith("/") else key
        if not isinstance(object_name, str) or not _NAME.fullmatch(object_name):
            raise ProtocolError(400, f"{shown(key)} cannot be the key of a shared memory object")
        if not is_size(offset) or not is_size(byte_size) or byte_size == 0:
            raise ProtocolError(400, "offset and byte_size are not sizes in bytes")
        self._regions[name] = _Region(key, offset, byte_size, _map(object_name, offset + byte_size))

    def unregister(self, name: Optional[str]) -> None:
        """Forget a region, or all where ``name`` is None; requests that use it still finish."""
        if name is None:
            self._regions.clear()
        else:
            self._regions.pop(name, None)

    def status(self, name: Optional[str]) -> List[Dict[str, Any]]:
        """Describe a region, or all where ``name`` is None.

        Raises:
            ProtocolError: 400: no such region.
        """
        names = sorted(self._regions) if name is None else [name]
        return [
            {"name": n, "key": region.key, "offset": region.offset, "byte_size": region.byte_size}
            for n, region in ((n, self._find(n)) for n in names)
        ]

    def view(self, name: str, offset: int, byte_size: int) -> memoryview:
        """The bytes of a part of a region, in place.

        Raises:
            ProtocolError: 400: no such region, the part is not inside it, or its object has shrunk.
        """
        region = self._find(name)
        if offset + byte_size > region.byte_size:
            raise ProtocolError(
                400,
                f"bytes {offset} to {offset + byte_size} are not inside shared memory region '{name}', "
                f"which has {region.byte_size}",
            )
        start = region.offset + offset
        # Every time: touching what the object no longer has would end this process.
        if start + byte_size > region.mapped.size():
            raise ProtocolError(400, f"shared memory region '{name}' has shrunk since it was registered")
        return memoryview(region.mapped)[start : start + byte_size]

    def _find(self, name: str) -> _Region:
        if name not in self._regions:
            raise ProtocolError(400, f"shared memory region {shown(name)} is not registered")
        return self._regions[name]


def _map(object_name: str, byte_size: int) -> mmap.mmap:
    try:
        descriptor = os.open(_DIRECTORY / object_name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ProtocolError(
            400, f"shared memory object '{object_name}' cannot be opened: {error.strerror}"
        ) from error
    try:
        size = os.fstat(descriptor).st_size
        if byte_size > size:
            raise ProtocolError(
                400, f"shared memory object '{object_name}' has {size} bytes, not {byte_size}"
            )
        # mmap wants page-aligned offsets; mapping from the start lets a region begin anywhere.
        return mmap.mmap(descriptor, byte_size)
    except (OSError, ValueError) as error:
        raise ProtocolError(400, f"shared memory object '{object_name}' cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
