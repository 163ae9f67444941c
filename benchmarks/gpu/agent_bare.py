"""What a careful person writes by hand: pinned memory, one stream, ``execute_async_v3``; with pycuda."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, cast

import numpy as np
import pycuda.driver as cuda
import tensorrt as trt

_LOGGER = trt.Logger(trt.Logger.ERROR)
_TYPES = {trt.float32: np.float32, trt.float16: np.float16, trt.int32: np.int32}


class Bare:
    """An engine in a bare loop."""

    def __init__(self, path: Path) -> None:
        cuda.init()
        self._cuda = cuda.Device(0).retain_primary_context()
        self._cuda.push()
        self._runtime = trt.Runtime(_LOGGER)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        self._context = self._engine.create_execution_context()
        self._stream = cuda.Stream()
        self._begin, self._end = cuda.Event(), cuda.Event()
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = trt.TensorIOMode.INPUT
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == mode]
        self._outputs = [n for n in names if n not in self._inputs]
        self._shapes: Any = None
        self._host: Dict[str, Any] = {}
        self._device: Dict[str, Any] = {}
        self._cuda.pop()

    def run(self, inputs: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        """Copy in, run, copy out, wait."""
        self._cuda.push()
        shapes = [inputs[name].shape for name in self._inputs]
        if shapes != self._shapes:
            self._allocate(inputs, shapes)
        for name in self._inputs:
            np.copyto(self._host[name], inputs[name], casting="unsafe")  # INT64 where clients have it
            cuda.memcpy_htod_async(self._device[name], self._host[name], self._stream)
        if not self._context.execute_async_v3(self._stream.handle):
            raise RuntimeError("execute_async_v3 failed")
        for name in self._outputs:
            cuda.memcpy_dtoh_async(self._host[name], self._device[name], self._stream)
        self._stream.synchronize()
        outputs = {name: self._host[name].copy() for name in self._outputs}
        self._cuda.pop()
        return outputs

    def timed(self) -> float:
        """Milliseconds of the layers alone, by events, in the shapes of the last run."""
        self._cuda.push()
        self._begin.record(self._stream)
        self._context.execute_async_v3(self._stream.handle)
        self._end.record(self._stream)
        self._end.synchronize()
        milliseconds = float(self._end.time_since(self._begin))
        self._cuda.pop()
        return milliseconds

    def close(self) -> None:
        """Free it."""
        self._cuda.push()
        del self._context, self._engine
        self._host.clear()
        self._device.clear()
        self._cuda.pop()

    def _allocate(self, inputs: Dict[str, np.ndarray], shapes: Any) -> None:
        for name in self._inputs:
            self._context.set_input_shape(name, inputs[name].shape)
        for name in [*self._inputs, *self._outputs]:
            shape: Any = tuple(cast(Any, self._context.get_tensor_shape(name)))
            dtype = _TYPES[self._engine.get_tensor_dtype(name)]
            self._host[name] = cuda.pagelocked_empty(shape, dtype)
            self._device[name] = cuda.mem_alloc(self._host[name].nbytes)
            self._context.set_tensor_address(name, int(self._device[name]))
        self._shapes = shapes
