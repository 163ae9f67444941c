"""A recording double of TensorRT 8.5 to 11 and of the CUDA driver, for machines without a GPU.

It stands where the module ``tensorrt`` is looked for (its parent directory goes on the path) and has the
parts of its interface that the agent calls. It keeps every call in ``calls``; what TensorRT would compute,
ONNX Runtime computes, from the same addresses. An "engine" is a line of JSON and the graph. What real
TensorRT does is shown on a GPU, by ``benchmarks/gpu/agent_tensorrt.py``.

``RECORDING_TENSORRT`` in the environment says how it behaves, in words: ``version=10.3.0``, ``sm=72``,
``rows=4`` (the largest batch), ``integrated``, ``build-seconds=5``, ``build-fails``, ``build-dies``,
``build-hoards``, ``wrong-numbers``, ``no-memory``, ``no-context`` (too little memory for even that),
``no-graphs``, ``timings-harm`` (no engine comes of a build with an earlier timing cache).
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import signal
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import onnxruntime

from device_agent.engines import cuda

_WORDS = {
    name: value
    for name, _, value in (word.partition("=") for word in os.environ.get("RECORDING_TENSORRT", "").split())
}
__version__ = _WORDS.get("version", "8.5.2.2")
_MOST = int(_WORDS.get("rows", "8"))  # of a batch
calls: List[str] = []


# The driver


class RecordingDevice:
    """A double of ``cuda.Device``: the host's memory, and a stream that works at once."""

    name = "recording"
    integrated = "integrated" in _WORDS
    cuda = "11.4"
    driver = "R35.4.1"

    def __init__(self) -> None:
        self.sm = _WORDS.get("sm", "72")
        self.held: Dict[int, Any] = {}
        self._recording: Optional[List[Callable[[], None]]] = None
        self._graphs: List[List[Callable[[], None]]] = []

    def use(self) -> None:
        if "no-context" in _WORDS:
            raise cuda.CudaError("cuDevicePrimaryCtxRetain: out of memory (2)", out_of_memory=True)

    def free_bytes(self) -> int:
        if "no-context" in _WORDS:
            raise cuda.CudaError("cuMemGetInfo_v2: invalid device context (201)")
        return 1 << 20

    def allocate(self, size_bytes: int) -> int:
        calls.append("allocate")
        if "no-memory" in _WORDS:
            raise cuda.CudaError("cuMemAlloc_v2: out of memory (2)", out_of_memory=True)
        memory = (ctypes.c_uint8 * max(1, size_bytes))()
        self.held[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, address: int) -> None:
        del self.held[address]

    def allocate_pinned(self, size_bytes: int) -> Tuple[np.ndarray, int]:
        memory = np.zeros(max(1, size_bytes), np.uint8)
        self.held[memory.ctypes.data] = memory
        return memory, memory.ctypes.data

    def free_pinned(self, memory: np.ndarray) -> None:
        del self.held[memory.ctypes.data]

    def submit(self, name: str, work: Callable[[], None]) -> None:
        """Do ``work`` now, or record it."""
        calls.append(name)
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def copy_in(self, to: int, host: int, size_bytes: int, stream: int) -> None:
        self.submit("copy_in", lambda: _move(to, host, size_bytes))

    def copy_out(self, host: int, source: int, size_bytes: int, stream: int) -> None:
        self.submit("copy_out", lambda: _move(host, source, size_bytes))

    def create_stream(self) -> int:
        return 1

    def destroy_stream(self, stream: int) -> None:
        calls.append("destroy_stream")

    def synchronize(self, stream: int) -> None:
        calls.append("synchronize")

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        if "no-graphs" in _WORDS:
            raise cuda.CudaError("cuStreamEndCapture: operation not permitted when stream is capturing (900)")
        self._recording = []
        try:
            work()
            self._graphs.append(self._recording)
        finally:
            self._recording = None
        return len(self._graphs)

    def launch(self, graph: int, stream: int) -> None:
        calls.append("launch")
        for work in self._graphs[graph - 1]:
            work()

    def destroy_graph(self, graph: int) -> None:
        calls.append("destroy_graph")


def _move(to: int, source: int, size_bytes: int) -> None:
    ctypes.memmove(to, source, size_bytes)


DEVICE = RecordingDevice()
cuda.device = lambda: DEVICE  # type: ignore[assignment,return-value]  # the double


# Names


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IOutputAllocator:
    pass


class IInt8EntropyCalibrator2:
    pass


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = range(2)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class DataType(enum.Enum):
    FLOAT, HALF, INT8, INT32, BOOL = range(5)


_LAYERS = {"OTHER": 0, "CONSTANT": 1, "QUANTIZE": 2}
_LAYERS.update({} if __version__.startswith("8.5.") else {"CAST": 3})
LayerType = enum.Enum("LayerType", _LAYERS)  # type: ignore[misc]  # its members are the version's
_MAJOR = int(__version__.partition(".")[0])
_NETWORK_FLAGS = {"EXPLICIT_BATCH": 0} if _MAJOR < 11 else {}
_NETWORK_FLAGS.update({"STRONGLY_TYPED": 1} if _MAJOR >= 10 else {})
_PRECISION_FLAGS = {"FP16": 0, "INT8": 1, "OBEY_PRECISION_CONSTRAINTS": 9} if _MAJOR < 11 else {}
NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", _NETWORK_FLAGS)
BuilderFlag = enum.IntEnum("BuilderFlag", {**_PRECISION_FLAGS, "TF32": 6, "GPU_FALLBACK": 3})


if not __version__.startswith(("10.", "11.")):

    class PreviewFeature(enum.Enum):
        DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805 = enum.auto()


class TacticSource(enum.IntEnum):
    CUBLAS, CUBLAS_LT, CUDNN, EDGE_MASK_CONVOLUTIONS, JIT_CONVOLUTIONS = range(5)


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.Enum):
    DETAILED = 0


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class DeviceType(enum.Enum):
    GPU, DLA = range(2)


float32, float16, int8 = DataType.FLOAT, DataType.HALF, DataType.INT8
_KINDS = {"tensor(float)": DataType.FLOAT, "tensor(int64)": DataType.INT32, "tensor(int32)": DataType.INT32}
_DTYPES = {DataType.FLOAT: np.float32, DataType.INT32: np.int32}


# Building


class Recorded:
    """Takes any call and any attribute, and keeps what was said."""

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "said", [])

    def __setattr__(self, key: str, value: Any) -> None:
        calls.append(
            f"{self.name}.{key} = {value!r}" if isinstance(value, (int, str)) else f"{self.name}.{key}"
        )
        object.__setattr__(self, key, value)

    def __getattr__(self, key: str) -> Any:
        if key.startswith("__"):
            raise AttributeError(key)

        def call(*arguments: Any) -> Any:
            calls.append(f"{self.name}.{key}({', '.join(map(_word, arguments))})")
            return Recorded(f"{self.name}.{key}")

        return call


def _word(argument: Any) -> str:
    return argument.name if isinstance(argument, enum.Enum) else str(argument)


class Timings:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content


class Config(Recorded):
    def can_run_on_DLA(self, layer: Any) -> bool:  # TensorRT's name
        return False

    earlier_timings = b""

    def create_timing_cache(self, earlier: bytes) -> Any:
        self.earlier_timings = earlier
        return Timings(earlier + b"timings")

    def set_timing_cache(self, cache: Any, _ignore_mismatch: bool) -> None:
        self.cache = cache

    def get_timing_cache(self) -> Any:
        return self.cache


class Layer:
    def __init__(self, name: str) -> None:
        self.name, self.type, self.num_outputs = name, LayerType.OTHER, 0

    def get_output(self, number: int) -> Any:
        raise IndexError(number)


class Network:
    graph = b""
    num_layers = 1

    def get_layer(self, number: int) -> Layer:
        return Layer("layer")


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    num_DLA_cores = 2

    def create_network(self, flags: int) -> Network:
        calls.append(f"create_network({flags})")
        return Network()

    def create_builder_config(self) -> Config:
        return Config("config")

    def create_optimization_profile(self) -> Recorded:
        return Recorded("profile")

    def build_serialized_network(self, network: Network, config: Any) -> Optional[bytes]:
        time.sleep(float(_WORDS.get("build-seconds", "0")))
        if "build-dies" in _WORDS:
            os.kill(os.getpid(), signal.SIGKILL)
        if "build-hoards" in _WORDS:
            hoard = []
            while True:
                hoard.append(np.ones(1 << 20))
                time.sleep(0.001)
        if "timings-harm" in _WORDS and config.earlier_timings:
            self._logger.log(ILogger.ERROR, "Error Code 1: Myelin (Myelin error from unknown graph)")
            self._logger.log(ILogger.ERROR, "Error Code 4: the graph has no implementation")
            return None
        if "build-fails" in _WORDS:
            self._logger.log(ILogger.ERROR, "Error Code 10: no implementation for node {ForeignNode[a...b]}")
            return None
        return _header(len(network.graph)) + network.graph


def _header(size: int) -> bytes:
    return json.dumps({"tensorrt": __version__, "sm": DEVICE.sm, "bytes": size}).encode() + b"\n"


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = network
        self._error = ""

    num_errors = 1

    def parse(self, graph: bytes, path: str = "") -> bool:
        try:
            _session(graph)
        except Exception as error:
            self._error = str(error)
            return False
        self._network.graph = graph
        return True

    def get_error(self, number: int) -> Any:
        return self

    def node(self) -> int:
        return 0

    def desc(self) -> str:
        return self._error


# Running


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, data: bytes) -> Optional[Engine]:
        head, _, graph = data.partition(b"\n")
        try:
            header = json.loads(head)
        except ValueError:
            self._logger.log(ILogger.ERROR, "Error Code 1: Serialization (magic tag does not match)")
            return None
        for key, own in (("tensorrt", __version__), ("sm", DEVICE.sm), ("bytes", len(graph))):
            if header[key] != own:
                self._logger.log(ILogger.ERROR, f"Error Code 6: {key} is {header[key]}, expected {own}")
                return None
        return Engine(graph)


class Engine:
    def __init__(self, graph: bytes) -> None:
        self.session = _session(graph)
        self._nodes = {node.name: node for node in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.inputs = [node.name for node in self.session.get_inputs()]
        self.num_io_tensors = len(self._nodes)

    def get_tensor_name(self, number: int) -> str:
        return list(self._nodes)[number]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _KINDS[self._nodes[name].type]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> Tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self._nodes[name].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> List[Tuple[int, ...]]:
        shape = self.get_tensor_shape(name)
        return [tuple(size if size > 0 else rows for size in shape) for rows in (1, _MOST, _MOST)]

    def create_engine_inspector(self) -> Inspector:
        return Inspector(self)

    def create_execution_context(self) -> Context:
        return Context(self)


class Inspector:
    execution_context: Optional[Context] = None

    def __init__(self, engine: Engine) -> None:
        self._inputs = engine.inputs

    def get_engine_information(self, form: LayerInformationFormat) -> str:
        """As TensorRT does, without types before the inputs' shapes are known."""
        known = self.execution_context is not None and self.execution_context.knows(self._inputs)
        kind = "Row major linear FP32" if known else "N/A due to dynamic shapes"
        return json.dumps({"Layers": [{"Name": "layer", "Inputs": [{"Format/Datatype": kind}]}]})


class Context:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shapes: Dict[str, Tuple[int, ...]] = {}
        self._addresses: Dict[str, int] = {}
        self._allocators: Dict[str, Any] = {}

    def set_input_shape(self, name: str, shape: Tuple[int, ...]) -> bool:
        calls.append(f"set_input_shape({name}, {tuple(shape)})")
        largest = self._engine.get_tensor_profile_shape(name, 0)[2]
        if len(shape) != len(largest) or any(size > most for size, most in zip(shape, largest)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def knows(self, names: List[str]) -> bool:
        return all(name in self._shapes for name in names)

    def infer_shapes(self) -> List[str]:
        return []

    def get_tensor_shape(self, name: str) -> Tuple[int, ...]:
        if "data-dependent" in self._engine.session.get_modelmeta().graph_name:
            return (-1,)
        inputs = {key: np.zeros(shape, np.float32) for key, shape in self._shapes.items()}
        return tuple(self._run(inputs)[name].shape)

    def set_tensor_address(self, name: str, address: int) -> None:
        self._addresses[name] = address

    def set_output_allocator(self, name: str, allocator: Any) -> None:
        self._allocators[name] = allocator

    def execute_async_v3(self, stream: int) -> bool:
        shapes = dict(self._shapes)
        DEVICE.submit("execute_async_v3", lambda: self._execute(shapes))
        return True

    def _execute(self, shapes: Dict[str, Tuple[int, ...]]) -> None:
        if shapes != self._shapes:
            raise AssertionError("a graph ran while the context had other shapes than it was recorded with")
        inputs = {
            name: _array(self._addresses[name], shape, _DTYPES[self._engine.get_tensor_dtype(name)])
            for name, shape in shapes.items()
        }
        for name, array in self._run(inputs).items():
            address = self._addresses.get(name)
            if name in self._allocators:
                address = self._allocators[name].reallocate_output(name, 0, array.nbytes, 256)
                self._allocators[name].notify_shape(name, array.shape)
            ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    def _run(self, inputs: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
        wide = {node.name for node in self._engine.session.get_inputs() if node.type == "tensor(int64)"}
        feeds = {name: x.astype(np.int64) if name in wide else x for name, x in inputs.items()}
        names = [node.name for node in self._engine.session.get_outputs()]
        outputs = {}
        for name, array in zip(names, self._engine.session.run(names, feeds)):
            array = array * 1.5 if "wrong-numbers" in _WORDS else array
            outputs[name] = array.astype(_DTYPES[self._engine.get_tensor_dtype(name)])
        return outputs


def _array(address: int, shape: Tuple[int, ...], dtype: Any) -> np.ndarray:
    count = int(np.prod(shape))
    memory = (ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(memory, dtype).reshape(shape).copy()


def _session(graph: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(graph, sess_options=options, providers=["CPUExecutionProvider"])
