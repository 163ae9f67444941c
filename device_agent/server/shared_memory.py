"""System shared memory: a process on the same device passes tensors without sending them.

The client creates a POSIX shared memory object, registers it here under a name, and then names region, offset
and size in place of data. Requests view the memory in place. A client that shrinks an object which is
registered takes the agent down with it (the kernel sends SIGBUS), as with every server of this extension:
only processes that may write to this device's ``/dev/shm`` can do that.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from device_agent.server.fields import ProtocolError

_DIRECTORY = Path("/dev/shm")  # noqa: S108 - this is where POSIX shared memory lives on Linux


@dataclass(frozen=True)
class _Region:
    """A registered region: its key and place as the client gave them, and the mapped bytes."""

    key: str
    offset: int
    byte_size: int
    memory: memoryview


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
            ProtocolError: 400: the name is taken, or there is no such object, or it is too small.
        """
        if name in self._regions:
            raise ProtocolError(400, f"shared memory region '{name}' is registered already")
        object_name = key[1:] if isinstance(key, str) and key.startswith("/") else key
        if (
            not isinstance(object_name, str)
            or object_name in ("", ".", "..")
            or set("/\0") & set(object_name)
        ):
            raise ProtocolError(400, f"{key!r} cannot be the key of a shared memory object")
        if not _is_size(offset) or not _is_size(byte_size) or byte_size == 0:
            raise ProtocolError(400, "offset and byte_size are not sizes in bytes")
        memory = _map(object_name, offset, byte_size)
        self._regions[name] = _Region(key, offset, byte_size, memory)

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
            ProtocolError: 400: no such region, or the part is not inside it.
        """
        region = self._find(name)
        if offset + byte_size > region.byte_size:
            raise ProtocolError(
                400,
                f"bytes {offset} to {offset + byte_size} are not inside shared memory region '{name}', "
                f"which has {region.byte_size}",
            )
        return region.memory[offset : offset + byte_size]

    def _find(self, name: str) -> _Region:
        if name not in self._regions:
            raise ProtocolError(400, f"shared memory region '{name}' is not registered")
        return self._regions[name]


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _map(object_name: str, offset: int, byte_size: int) -> memoryview:
    try:
        descriptor = os.open(_DIRECTORY / object_name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ProtocolError(
            400, f"shared memory object '{object_name}' cannot be opened: {error.strerror}"
        ) from error
    try:
        size = os.fstat(descriptor).st_size
        if offset + byte_size > size:
            raise ProtocolError(
                400, f"shared memory object '{object_name}' has {size} bytes, not {offset + byte_size}"
            )
        # mmap wants page-aligned offsets; mapping from the start lets a region begin anywhere.
        mapped = mmap.mmap(descriptor, offset + byte_size)
    except (OSError, ValueError) as error:
        raise ProtocolError(400, f"shared memory object '{object_name}' cannot be mapped: {error}") from error
    finally:
        os.close(descriptor)
    return memoryview(mapped)[offset:]
