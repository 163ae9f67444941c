"""The few calls of the CUDA driver that an engine needs, straight from ``libcuda.so.1``.

Memory, streams and graphs, by ctypes: the driver's C interface is the same on JetPack 5 and on a server and
comes with the driver, whereas pycuda has to be compiled on each device and knows no graphs, and cuda-python
is not there for JetPack 5's Python. The context is the device's primary one, which TensorRT uses too.

Reference: CUDA Driver API, chapters Primary Context, Memory, Stream and Graph Management.
"""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, List, Optional, Tuple

import numpy as np

_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_PORTABLE, _MAPPED = 1, 2  # CU_MEMHOSTALLOC_*
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: waits for no other stream
_THIS_THREAD = (
    1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads do is not captured, and not hindered
)
_OUT_OF_MEMORY = 2

_DRIVER_FILES = (
    (Path("/etc/nv_tegra_release"), r"R(\d+).*REVISION: ([\d.]+)"),  # Jetson's own release
    (Path("/proc/driver/nvidia/version"), r"Kernel Module[^\d]*(?:x86_64|aarch64)?\s+(\d+\.[\d.]+)"),
)


class CudaError(Exception):
    """The driver refused; the text is its own.

    Attributes:
        out_of_memory: whether there was too little memory.
    """

    def __init__(self, text: str, out_of_memory: bool = False) -> None:
        super().__init__(text)
        self.out_of_memory = out_of_memory


@lru_cache(maxsize=None)
def device() -> Device:
    """The GPU of this process: the first that CUDA shows.

    Raises:
        CudaError: there is no driver, or no GPU.
    """
    return Device()


class Device:
    """A GPU, its primary context, and what the driver does with it.

    Attributes:
        name: such as ``Orin``.
        sm: its architecture, such as ``87``.
        integrated: whether it shares the host's memory, as on a Jetson.
        cuda: the newest CUDA that the driver knows, such as ``11.4``.
        driver: the driver's own version.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"there is no CUDA driver: {error}") from error
        self._call("cuInit", ctypes.c_uint(0))
        number = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(number), ctypes.c_int(0))
        self._number = number
        self._context: Optional[ctypes.c_void_p] = None
        self.sm = f"{self._attribute(_MAJOR)}{self._attribute(_MINOR)}"
        self.integrated = bool(self._attribute(_INTEGRATED))
        self.name = self._read_name()
        self.cuda = self._read_version()
        self.driver = driver_version()

    def use(self) -> None:
        """Make the context this thread's, which the methods below need. The first call takes memory."""
        if self._context is None:
            context = ctypes.c_void_p()
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._number)
            self._context = context
        self._call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """How much memory the GPU can still give."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    # Memory

    def allocate(self, size_bytes: int) -> int:
        """Memory on the GPU; its address there."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size_bytes)))
        return address.value

    def free(self, address: int) -> None:
        """Give back what ``allocate`` gave."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def allocate_pinned(self, size_bytes: int) -> Tuple[np.ndarray[Any, Any], int]:
        """Memory of the host that stays where it is, so that the GPU can read and write it.

        Returns:
            The bytes, and their address for the GPU.
        """
        host, mapped = ctypes.c_void_p(), ctypes.c_uint64()
        flags = ctypes.c_uint(_PORTABLE | _MAPPED)
        self._call("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(max(1, size_bytes)), flags)
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(mapped), host, ctypes.c_uint(0))
        memory = (ctypes.c_uint8 * max(1, size_bytes)).from_address(host.value or 0)
        return np.ctypeslib.as_array(memory), mapped.value

    def free_pinned(self, memory: np.ndarray[Any, Any]) -> None:
        """Give back what ``allocate_pinned`` gave; nobody may look at it afterwards."""
        self._call("cuMemFreeHost", ctypes.c_void_p(memory.ctypes.data))

    def copy_in(self, to: int, host: int, size_bytes: int, stream: int) -> None:
        """Begin a copy from pinned memory to the GPU."""
        size = ctypes.c_size_t(size_bytes)
        self._call(
            "cuMemcpyHtoDAsync_v2", ctypes.c_uint64(to), ctypes.c_void_p(host), size, ctypes.c_void_p(stream)
        )

    def copy_out(self, host: int, source: int, size_bytes: int, stream: int) -> None:
        """Begin a copy from the GPU to pinned memory."""
        size = ctypes.c_size_t(size_bytes)
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(host),
            ctypes.c_uint64(source),
            size,
            ctypes.c_void_p(stream),
        )

    # Streams and graphs

    def create_stream(self) -> int:
        """A queue of work that waits for no other."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Free a stream."""
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        """Wait until a stream is done. Other Python threads run meanwhile.

        Raises:
            CudaError: something in it failed.
        """
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what ``work`` puts on a stream, which does not run now.

        Returns:
            A graph for :meth:`launch`.

        Raises:
            CudaError: something of it cannot be recorded.
        """
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), ctypes.c_int(_THIS_THREAD))
        try:
            work()
        finally:
            ended = self._status("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        self._check("cuStreamEndCapture", ended)
        try:
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        finally:
            self._call("cuGraphDestroy", graph)
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Put a recorded graph on a stream."""
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        """Free a graph."""
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    # The library

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(which), self._number)
        return value.value

    def _read_name(self) -> str:
        name = ctypes.create_string_buffer(128)
        self._call("cuDeviceGetName", name, ctypes.c_int(len(name)), self._number)
        return name.value.decode("utf-8", "replace")

    def _read_version(self) -> str:
        version = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def _call(self, function: str, *arguments: Any) -> None:
        self._check(function, self._status(function, *arguments))

    def _status(self, function: str, *arguments: Any) -> int:
        return int(getattr(self._library, function)(*arguments))

    def _check(self, function: str, status: int) -> None:
        if status == 0:
            return
        text = ctypes.c_char_p()
        self._status("cuGetErrorString", ctypes.c_int(status), ctypes.byref(text))
        reason = (text.value or b"unknown error").decode("utf-8", "replace")
        raise CudaError(f"{function}: {reason} ({status})", status == _OUT_OF_MEMORY)


def driver_version() -> str:
    """The version of the NVIDIA driver, or of a Jetson's release; empty where neither says."""
    for path, pattern in _DRIVER_FILES:
        with suppress(OSError):
            found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
            if found:
                parts: List[str] = list(found.groups())
                return ".".join(parts)
    return ""
