"""Tensors in memory that two processes share: the data in a memfd, a short header in the message.

The request's memory is written by the agent and the answer's by the engine process; each side only ever
reads the other's. Growing is up to the writer, and the size is in every header; the kernel seals the memory
against shrinking, so that no reader can be hit by SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from device_agent.engines.base import Arrays, EngineError
from device_agent.manifest import TensorSpec
from device_agent.tensors import NUMPY_DTYPES, TensorError, decode_binary, encode_binary

_F_ADD_SEALS, _F_SEAL_SHRINK = 1033, 0x0002  # linux/fcntl.h; Python names them from 3.9 on
_ALIGNMENT = 64  # a cache line, and what a runtime's vector loads want
_SMALLEST_BYTES = 64 * 1024
_SIZE = struct.Struct("<Q")
_TENSOR = struct.Struct("<QQB")  # offset, bytes, axes


class SharedMemory:
    """A piece of anonymous memory that grows.

    Attributes:
        descriptor: the memfd, to be passed to the other process.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, os.fstat(descriptor).st_size)

    @classmethod
    def create(cls, name: str) -> SharedMemory:
        """Make new memory; ``name`` shows in ``/proc/PID/maps``.

        Raises:
            OSError: the kernel has none, or this process may not have more descriptors.
        """
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, _SMALLEST_BYTES)
            fcntl.fcntl(descriptor, _F_ADD_SEALS, _F_SEAL_SHRINK)
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def __len__(self) -> int:
        return len(self._map)

    def grow(self, size_bytes: int) -> None:
        """Hold at least ``size_bytes``; arrays on the old mapping stay valid, and keep it."""
        if size_bytes > len(self._map):
            os.ftruncate(self.descriptor, 1 << (size_bytes - 1).bit_length())
            self._remap()

    def follow(self, size_bytes: int) -> None:
        """See what the other process wrote after it grew the memory."""
        if size_bytes > len(self._map):
            self._remap()
        if size_bytes > len(self._map):
            raise EngineError(f"shared memory has {len(self._map)} bytes where {size_bytes} are announced")

    def array(self, dtype: np.dtype[Any], shape: Tuple[int, ...], offset: int) -> np.ndarray[Any, Any]:
        """An array on the memory."""
        return np.ndarray(shape, dtype, self._map, offset)

    def view(self, offset: int, size_bytes: int) -> memoryview:
        """The bytes at ``offset``."""
        return memoryview(self._map)[offset : offset + size_bytes]

    def close(self) -> None:
        """Give up the descriptor; the memory goes when the last array on it does."""
        os.close(self.descriptor)

    def _remap(self) -> None:
        self._map = mmap.mmap(self.descriptor, os.fstat(self.descriptor).st_size)


def write_tensors(memory: SharedMemory, specs: Sequence[TensorSpec], arrays: Arrays) -> bytes:
    """Copy an array for each of ``specs`` into ``memory``.

    Returns:
        The header that ``read_tensors`` takes.

    Raises:
        EngineError: an array is not of the type that its tensor has.
    """
    values = [_value(spec, arrays[spec.name]) for spec in specs]
    offsets, end = _layout([value.nbytes for value in values])
    memory.grow(end)
    header = [_SIZE.pack(end)]
    for spec, value, offset in zip(specs, values, offsets):
        memory.array(value.dtype, value.shape, offset)[...] = value
        shape = arrays[spec.name].shape
        header.append(_TENSOR.pack(offset, value.nbytes, len(shape)))
        header.append(struct.pack(f"<{len(shape)}q", *shape))
    return b"".join(header)


def _value(spec: TensorSpec, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What lies in memory for a tensor: its elements; for ``BYTES`` their protocol form."""
    if array.dtype != NUMPY_DTYPES[spec.dtype]:
        raise EngineError(f"'{spec.name}' is {array.dtype} where the model has {spec.dtype}")
    if spec.dtype == "BYTES":
        return np.frombuffer(bytearray(encode_binary("BYTES", array)), np.uint8)
    return array


def _layout(sizes_bytes: List[int]) -> Tuple[List[int], int]:
    offsets, end = [], 0
    for size_bytes in sizes_bytes:
        offsets.append(end)
        end += -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def read_tensors(
    memory: SharedMemory, specs: Sequence[TensorSpec], header: bytes
) -> Dict[str, np.ndarray[Any, Any]]:
    """The arrays that the other process wrote, as views on ``memory`` but for ``BYTES``.

    Raises:
        EngineError: the header does not fit the tensors or the memory.
    """
    try:
        (end,) = _SIZE.unpack_from(header)
        memory.follow(end)
        position, arrays = _SIZE.size, {}
        for spec in specs:
            offset, size_bytes, axes = _TENSOR.unpack_from(header, position)
            position += _TENSOR.size
            shape = struct.unpack_from(f"<{axes}q", header, position)
            position += 8 * axes
            if spec.dtype == "BYTES":
                arrays[spec.name] = decode_binary("BYTES", shape, memory.view(offset, size_bytes))
            else:
                arrays[spec.name] = memory.array(NUMPY_DTYPES[spec.dtype], shape, offset)
    except (struct.error, TensorError, TypeError, ValueError) as error:
        raise EngineError(f"the other process sent what is no tensor: {error}") from error
    return arrays
