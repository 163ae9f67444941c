"""A TensorRT engine that serves: pinned buffers, one stream, a CUDA graph for each shape that comes again.

One code path over TensorRT 8.5 to 11 and TensorRT-RTX, with tensors by name only. A run copies the inputs
into pinned memory and puts everything else (the copies to the GPU, the layers, the copies back) on the
engine's own stream; two models' batches overlap on the GPU. From the second run of a shape on, all of that is
one recorded graph, where TensorRT lets itself be recorded. On a Jetson, whose GPU shares the host's memory,
the layers read and write the pinned memory itself and nothing is copied.

The shapes are set again before another shape's graph is launched: what a graph reads of the context must be
what it was recorded with.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, FrozenSet, List, Mapping, Optional, Tuple

import numpy as np

from device_agent.engines import cuda
from device_agent.engines.base import Arrays, EngineError, InputError
from device_agent.engines.cuda import CudaError
from device_agent.engines.tensorrt_log import Said
from device_agent.engines.tensorrt_module import TensorRt, from_dims, register_plugins, version
from device_agent.errors import Refused
from device_agent.manifest import TensorSpec
from device_agent.tensors import NUMPY_DTYPES

if TYPE_CHECKING:
    from tensorrt import ICudaEngine

Shapes = Tuple[Tuple[int, ...], ...]

_DTYPES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "BF16": "BF16",
    "INT8": "INT8",
    "INT32": "INT32",
    "INT64": "INT64",
    "BOOL": "BOOL",
    "UINT8": "UINT8",
}
_MAX_SHAPES = 64  # kept ready; a graph takes some hundred kilobytes

_log = logging.getLogger(__name__)


def fingerprint(trt: TensorRt, name: str) -> Mapping[str, str]:
    """The device's own values of what an engine may have been built for.

    Returns:
        ``sm``, the version of TensorRT under ``name``, ``cuda`` and ``driver``.

    Raises:
        Refused: there is no GPU that CUDA can use.
    """
    gpu = _device()
    return {"sm": gpu.sm, name: version(trt), "cuda": gpu.cuda, "driver": gpu.driver}


def open_engine(trt: TensorRt, runtime: str, path: Path) -> TensorRtEngine:
    """Load a serialized engine.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        runtime: its name in the manifest.
        path: the engine.

    Raises:
        Refused: TensorRT does not take it, it has tensors that cannot be served, or there is too little
            memory on the GPU.
    """
    gpu = _device()
    said = Said(trt)
    try:
        gpu.use()
        register_plugins(trt, said.logger)
        engine = trt.Runtime(said.logger).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise _refused(trt, path, said.why("it is no engine for this device"))
        return TensorRtEngine(trt, runtime, engine, said, gpu)
    except CudaError as error:
        raise _refused(trt, path, _with_memory(error, gpu)) from error
    except (ValueError, TypeError, OSError, MemoryError) as error:
        raise _refused(trt, path, str(error)) from error


class TensorRtEngine:
    """A deserialized engine as an :class:`~device_agent.engines.base.Engine`.

    Attributes:
        graphs: how many shapes run as a recorded graph now.
    """

    memory_policy = ""
    threads: FrozenSet[int] = frozenset()  # TensorRT starts none

    def __init__(
        self, trt: TensorRt, runtime: str, engine: ICudaEngine, said: Said, gpu: cuda.Device
    ) -> None:
        """Allocate for the largest shapes.

        Raises:
            ValueError: it has tensors that cannot be served.
            CudaError: there is too little memory.
        """
        self.runtime = runtime
        self.process = os.getpid()
        self._said, self._gpu, self._engine = said, gpu, engine
        self._context = engine.create_execution_context()
        if self._context is None:
            raise CudaError(said.why("TensorRT makes no context"), out_of_memory=True)
        names = [engine.get_tensor_name(number) for number in range(engine.num_io_tensors)]
        modes = {name: engine.get_tensor_mode(name) for name in names}
        self.inputs = tuple(_spec(trt, engine, n) for n in names if modes[n] == trt.TensorIOMode.INPUT)
        self.outputs = tuple(_spec(trt, engine, n) for n in names if modes[n] == trt.TensorIOMode.OUTPUT)
        self._buffers: Dict[str, _Buffer] = {}
        self._ready: OrderedDict[Shapes, _Ready] = OrderedDict()
        self._set: Optional[Shapes] = None
        self._can_record = True
        self._stream = gpu.create_stream()
        try:
            largest = tuple(_largest(engine, spec) for spec in self.inputs)
            self._set_shapes(largest)
            for spec in self.inputs:
                self._buffers[spec.name] = _Buffer(gpu, _size_bytes(spec, largest[self.inputs.index(spec)]))
            self._growing = [spec.name for spec in self.outputs if min(self._shape(spec), default=0) < 0]
            self._allocators = {name: _output_allocator(trt, gpu) for name in self._growing}
            for spec in self.outputs:
                if spec.name not in self._growing:
                    self._buffers[spec.name] = _Buffer(gpu, _size_bytes(spec, self._shape(spec)))
            self._bind()
        except BaseException:
            self.close()
            raise

    @property
    def graphs(self) -> int:
        """How many shapes run as a recorded graph now."""
        return sum(ready.graph is not None for ready in self._ready.values())

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """See :meth:`device_agent.engines.base.Engine.run`."""
        shapes = tuple(inputs[spec.name].shape for spec in self.inputs)
        try:
            self._gpu.use()
            ready = self._prepare(shapes)
            for name, view in ready.inputs.items():
                np.copyto(view, inputs[name], casting="equiv")
            if ready.graph is not None:
                self._gpu.launch(ready.graph, self._stream)
            else:
                self._enqueue(ready)
            self._gpu.synchronize(self._stream)
            outputs = {name: view.copy() for name, view in ready.outputs.items()}
            for name in self._growing:
                outputs[name] = self._fetch(name)
        except CudaError as error:
            raise EngineError(str(error)) from error
        except TypeError as error:
            raise InputError(str(error)) from error
        return outputs

    def close(self) -> None:
        """Free the graphs, the buffers, the context and the engine."""
        self._gpu.use()
        for ready in self._ready.values():
            self._forget(ready)
        self._ready.clear()
        for held in ("_context", "_engine"):  # they end when nobody holds them
            vars(self).pop(held, None)
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        for allocator in getattr(self, "_allocators", {}).values():
            allocator.close()
        if self._stream:
            self._gpu.destroy_stream(self._stream)
            self._stream = 0

    # Shapes

    def _prepare(self, shapes: Shapes) -> _Ready:
        """Views of the buffers in these shapes; from their second run on with a graph."""
        ready = self._ready.get(shapes)
        if ready is None:
            self._set_shapes(shapes)
            ready = _Ready(
                {
                    spec.name: self._buffers[spec.name].view(spec, shape)
                    for spec, shape in zip(self.inputs, shapes)
                },
                {
                    spec.name: self._buffers[spec.name].view(spec, self._shape(spec))
                    for spec in self.outputs
                    if spec.name not in self._growing
                },
            )
            self._ready[shapes] = ready
            if len(self._ready) > _MAX_SHAPES:
                self._forget(self._ready.popitem(last=False)[1])
            return ready
        if self._set != shapes:
            self._set_shapes(shapes)
            self._ready.move_to_end(shapes)
        if ready.graph is None and self._can_record and not self._growing:
            self._record(ready)
        return ready

    def _set_shapes(self, shapes: Shapes) -> None:
        """Tell the context; its outputs' shapes follow.

        Raises:
            CudaError: the engine was not built for them.
        """
        self._set = None
        for spec, shape in zip(self.inputs, shapes):
            if not self._context.set_input_shape(spec.name, shape):
                raise CudaError(self._said.why(f"'{spec.name}' cannot have the shape {list(shape)}"))
        missing = self._context.infer_shapes()
        if missing:
            raise CudaError(self._said.why(f"no shape follows for {', '.join(missing)}"))
        self._set = shapes

    def _shape(self, spec: TensorSpec) -> Tuple[int, ...]:
        return from_dims(self._context.get_tensor_shape(spec.name))

    # Running

    def _bind(self) -> None:
        for name, buffer in self._buffers.items():
            self._context.set_tensor_address(name, buffer.device)
        for name, allocator in self._allocators.items():
            self._context.set_output_allocator(name, allocator)

    def _enqueue(self, ready: _Ready) -> None:
        for name, view in ready.inputs.items():
            self._buffers[name].send(view.nbytes, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise CudaError(self._said.why("the run failed and TensorRT does not say why"))
        for name, view in ready.outputs.items():
            self._buffers[name].fetch(view.nbytes, self._stream)

    def _record(self, ready: _Ready) -> None:
        """Record a run of shapes that ran before, which TensorRT needs; it may not let itself be recorded."""
        try:
            self._enqueue(ready)  # with the shapes as they were just set
            self._gpu.synchronize(self._stream)
            ready.graph = self._gpu.capture(self._stream, lambda: self._enqueue(ready))
        except CudaError as error:
            self._can_record = False
            _log.info("the engine runs without CUDA graphs: %s", error)

    def _forget(self, ready: _Ready) -> None:
        if ready.graph is not None:
            self._gpu.destroy_graph(ready.graph)
            ready.graph = None

    def _fetch(self, name: str) -> np.ndarray[Any, Any]:
        """An output whose size only the run decided."""
        spec = next(spec for spec in self.outputs if spec.name == name)
        allocator = self._allocators[name]
        buffer = _Buffer(self._gpu, _size_bytes(spec, allocator.shape), device=allocator.address)
        try:
            view = buffer.view(spec, allocator.shape)
            buffer.fetch(view.nbytes, self._stream)
            self._gpu.synchronize(self._stream)
            return view.copy()
        finally:
            buffer.close()


@dataclass
class _Ready:
    """What a run with certain shapes needs."""

    inputs: Dict[str, np.ndarray[Any, Any]]
    outputs: Dict[str, np.ndarray[Any, Any]]
    graph: Optional[int] = None


class _Buffer:
    """A tensor's memory, pinned on the host and on the GPU; one and the same where they share memory.

    Args:
        gpu: whose.
        size_bytes: for the largest shape.
        device: memory on the GPU that somebody else frees; None: its own.
    """

    def __init__(self, gpu: cuda.Device, size_bytes: int, device: Optional[int] = None) -> None:
        self._gpu = gpu
        self._host, mapped = gpu.allocate_pinned(size_bytes)
        self._copies = device is not None or not gpu.integrated
        self._owns = device is None and self._copies
        try:
            self.device: int = (
                device if device is not None else (gpu.allocate(size_bytes) if self._copies else mapped)
            )
        except BaseException:
            gpu.free_pinned(self._host)
            raise

    def view(self, spec: TensorSpec, shape: Tuple[int, ...]) -> np.ndarray[Any, Any]:
        return self._host[: _size_bytes(spec, shape)].view(NUMPY_DTYPES[spec.dtype]).reshape(shape)

    def send(self, size_bytes: int, stream: int) -> None:
        if self._copies and size_bytes:
            self._gpu.copy_in(self.device, self._host.ctypes.data, size_bytes, stream)

    def fetch(self, size_bytes: int, stream: int) -> None:
        if self._copies and size_bytes:
            self._gpu.copy_out(self._host.ctypes.data, self.device, size_bytes, stream)

    def close(self) -> None:
        if self._owns:
            self._gpu.free(self.device)
        self._gpu.free_pinned(self._host)


def _output_allocator(trt: TensorRt, gpu: cuda.Device) -> Any:
    if TYPE_CHECKING:
        from tensorrt import IOutputAllocator as Base
    else:
        Base = trt.IOutputAllocator  # known only here

    class Allocator(Base):
        """Gives memory to an output once TensorRT knows its size; keeps the largest."""

        def __init__(self) -> None:
            super().__init__()
            self.address = self.capacity_bytes = 0
            self.shape: Tuple[int, ...] = ()

        def reallocate_output(self, _name: str, _memory: int, size_bytes: int, _alignment: int) -> int:
            if size_bytes > self.capacity_bytes or not self.address:
                self.close()
                try:
                    self.address, self.capacity_bytes = gpu.allocate(size_bytes), size_bytes
                except CudaError:
                    return 0  # TensorRT's word for "there is none"
            return self.address

        def reallocate_output_async(
            self, name: str, memory: int, size_bytes: int, alignment: int, _stream: int
        ) -> int:
            return self.reallocate_output(name, memory, size_bytes, alignment)

        def notify_shape(self, _name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def close(self) -> None:
            if self.address:
                gpu.free(self.address)
            self.address = self.capacity_bytes = 0

    return Allocator()


def _spec(trt: TensorRt, engine: ICudaEngine, name: str) -> TensorSpec:
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES:
        raise ValueError(f"'{name}' is a tensor of {kind}, which the Open Inference Protocol cannot carry")
    if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
        raise ValueError(f"'{name}' is a shape, which TensorRT wants before the run")
    return TensorSpec(name, _DTYPES[kind], from_dims(engine.get_tensor_shape(name)))


def _largest(engine: ICudaEngine, spec: TensorSpec) -> Tuple[int, ...]:
    if min(spec.shape, default=0) >= 0:
        return spec.shape
    return from_dims(engine.get_tensor_profile_shape(spec.name, 0)[2])


def _size_bytes(spec: TensorSpec, shape: Tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * NUMPY_DTYPES[spec.dtype].itemsize


def _device() -> cuda.Device:
    try:
        return cuda.device()
    except CudaError as error:
        raise Refused(
            "this device has no GPU that TensorRT can use", str(error), "see that the NVIDIA driver is loaded"
        ) from error


def _with_memory(error: CudaError, gpu: cuda.Device) -> str:
    if not error.out_of_memory:
        return str(error)
    try:
        return f"{error}; {gpu.free_bytes() / 1e6:.0f} MB of the GPU are free"
    except CudaError:  # where not even a context fitted, the driver does not say how much is free
        return str(error)


def _refused(trt: TensorRt, path: Path, why: str) -> Refused:
    lines: List[str] = why.strip().splitlines() or ["it does not say why"]
    return Refused(
        f"TensorRT {version(trt)} does not load {path.name}",
        lines[0],
        "an engine fits one GPU and one TensorRT; the agent builds its own where the bundle says how",
    )
