"""ONNX Runtime, on the GPU where its CUDA provider is here, else on the CPU: it can serve every bundle.

Two types need care (both seen in onnxruntime 1.19 and 1.32). String tensors: the Python binding writes
``b'a'`` as the five characters ``b'a'`` without an error, so they go in as ``str`` and must be UTF-8.
BF16: numpy has no such type, so those tensors travel as ``OrtValue`` through I/O binding, which only newer
releases let a caller fill (1.32 does, 1.19 does not); older ones refuse such a graph when it is loaded.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Mapping, Set, Tuple, Type

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _binding

from device_agent.affinity import Placement, placed, policy_of_thread, threads_of
from device_agent.engines import cuda, external_data
from device_agent.engines.base import Arrays, Engine, EngineError, EngineSettings, InputError
from device_agent.engines.cuda import CudaError
from device_agent.errors import Refused
from device_agent.manifest import TensorSpec
from device_agent.tensors import object_array

_DTYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}
_ONNX_BFLOAT16 = 16  # TensorProto.BFLOAT16
_NO_SATURATION = "session.x64quantprecision"
_SHARED_WEIGHT = "replace the existing tensor"  # in what ONNX Runtime says of it
_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CARRIES_BFLOAT16 = hasattr(onnxruntime.OrtValue, "ortvalue_from_numpy_with_onnx_type")

# The binding's errors have no common base class of their own.
_ERRORS: Tuple[Type[Exception], ...] = (
    *(item for item in vars(_binding).values() if isinstance(item, type) and issubclass(item, Exception)),
    RuntimeError,
    ValueError,
    TypeError,
)
_LOAD_ERRORS: Tuple[Type[Exception], ...] = (*_ERRORS, OSError)


def fingerprint() -> Mapping[str, str]:
    """What a graph may ask to be equal: one optimized ahead of time, or in half precision for a GPU.

    Returns:
        ``version``, and ``provider``: ``cuda`` or ``cpu``.
    """
    provider = "cuda" if _on_gpu() else "cpu"
    return {"version": onnxruntime.__version__, "provider": provider}


def _on_gpu() -> bool:
    if _CUDA not in onnxruntime.get_available_providers():
        return False
    try:
        cuda.device()
    except CudaError:  # the package is here and a GPU is not
        return False
    return True


def _providers() -> List[Any]:
    """What a session should run on, in order of preference; what CUDA cannot run falls to the CPU.

    cuDNN chooses kernels by its quick heuristics, not with the effort of ONNX Runtime's default: a kernel is
    chosen again for each convolution when a batch has a new size (microsoft/onnxruntime#19838).
    """
    return [(_CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}), _CPU] if _on_gpu() else [_CPU]


def open_graph(path: Path, settings: EngineSettings) -> Engine:
    """Load an ONNX file.

    Raises:
        Refused: ONNX Runtime does not take the file, or it reads files elsewhere (see ``external_data``).
    """
    try:
        external_data.check(path)
        before = threads_of(os.getpid())
        with placed(settings.placement):  # the session's threads inherit it
            session = exact_session(path, _options(settings), _providers())
            policy = "" if settings.placement.numa_node is None else policy_of_thread()
        started = threads_of(os.getpid()) - before
        return OnnxRuntimeEngine(session, frozenset(started - _threads_of_python()), policy)
    except _LOAD_ERRORS as error:
        raise Refused(
            f"ONNX Runtime {onnxruntime.__version__} does not load {path.name}",
            _first_line(error),
            "make the bundle again for this device's profile",
        ) from error


def exact_session(path: Path, options: Any, providers: List[Any]) -> Any:
    """A session whose 8-bit products do not saturate.

    x86 processors without VNNI add two u8 x s8 products in 16 bits. ONNX Runtime can take other kernels there
    for weights of more than seven bits (onnxruntime_session_options_config_keys.h); on other processors the
    setting changes nothing. It fails where two operators share a weight: those keep the usual kernels.
    """
    options.add_session_config_entry(_NO_SATURATION, "1")
    try:
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=providers)
    except _LOAD_ERRORS as error:
        if _SHARED_WEIGHT not in str(error):
            raise
        options.add_session_config_entry(_NO_SATURATION, "0")
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=providers)


def _threads_of_python() -> Set[int]:
    """The ids of Python's own threads, those included that are being started meanwhile."""
    while True:
        numbers = {thread.native_id for thread in threading.enumerate()}
        if None not in numbers:
            return {number for number in numbers if number is not None}
        time.sleep(0.001)  # a thread learns its number when it first runs


def _options(settings: EngineSettings) -> Any:
    options = onnxruntime.SessionOptions()
    threads = settings.threads or len(settings.placement.cpus)
    options.intra_op_num_threads = threads
    affinities = _thread_affinities(settings.placement, threads)
    if affinities:
        options.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors only; the agent reports what a person can act on
    return options


def _thread_affinities(placement: Placement, threads: int) -> str:
    """A core for each of the session's own threads, counted from 1; the thread that runs it is one more.

    Only where there is a core for each: fewer threads than cores may move among them, as they inherited.
    """
    if len(placement.cpus) != threads:
        return ""
    return ";".join(str(core + 1) for core in placement.cpus[1:])


class OnnxRuntimeEngine:
    """An ``InferenceSession`` as an :class:`~device_agent.engines.base.Engine`."""

    runtime = "onnxruntime"

    def __init__(self, session: Any, threads: FrozenSet[int], memory_policy: str) -> None:
        self.process = os.getpid()
        self.threads = threads
        self.memory_policy = memory_policy
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._session = session
        self._output_names = [spec.name for spec in self.outputs]
        self._text_inputs = [spec.name for spec in self.inputs if spec.dtype == "BYTES"]
        self._text_outputs = [spec.name for spec in self.outputs if spec.dtype == "BYTES"]
        self._has_bfloat16 = any(spec.dtype == "BF16" for spec in self.inputs + self.outputs)

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """See :meth:`device_agent.engines.base.Engine.run`."""
        feeds = _with_text(inputs, self._text_inputs) if self._text_inputs else inputs
        try:
            values = (
                self._run_bound(feeds) if self._has_bfloat16 else self._session.run(self._output_names, feeds)
            )
        except _ERRORS as error:
            raise EngineError(_first_line(error)) from error
        outputs = dict(zip(self._output_names, values))
        for name in self._text_outputs:
            outputs[name] = _encode_text(outputs[name])
        return outputs

    def close(self) -> None:
        """Free the session."""
        self._session = None

    def _run_bound(self, feeds: Arrays) -> List[np.ndarray[Any, Any]]:
        binding = self._session.io_binding()
        for spec in self.inputs:
            binding.bind_ortvalue_input(spec.name, _to_ortvalue(spec.dtype, feeds[spec.name]))
        for name in self._output_names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return [_from_ortvalue(spec.dtype, value) for spec, value in zip(self.outputs, values)]


def _spec(node: Any) -> TensorSpec:
    if node.type not in _DTYPES:
        raise TypeError(f"{node.name} is a {node.type}, which the Open Inference Protocol cannot carry")
    if _DTYPES[node.type] == "BF16" and not CARRIES_BFLOAT16:
        raise TypeError(f"{node.name} is BF16, which this release cannot take from a caller")
    shape = tuple(size if isinstance(size, int) and size > 0 else -1 for size in node.shape)
    return TensorSpec(node.name, _DTYPES[node.type], shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# BYTES


def _with_text(inputs: Arrays, names: List[str]) -> Arrays:
    feeds = dict(inputs)
    for name in names:
        array = feeds[name]
        try:
            texts = [item.decode("utf-8") for item in array.ravel().tolist()]
        except UnicodeDecodeError as error:
            raise InputError(f"input '{name}' has a BYTES element that is not UTF-8") from error
        feeds[name] = object_array(texts, array.shape)
    return feeds


def _encode_text(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return object_array([str(item).encode("utf-8") for item in array.ravel().tolist()], array.shape)


# BF16


def _to_ortvalue(dtype: str, array: np.ndarray[Any, Any]) -> Any:
    contiguous = np.ascontiguousarray(array)
    if dtype == "BF16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(contiguous, _ONNX_BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(contiguous)


def _from_ortvalue(dtype: str, value: Any) -> np.ndarray[Any, Any]:
    if dtype != "BF16":
        array: np.ndarray[Any, Any] = value.numpy()
        return array
    return _copy_memory(value.data_ptr(), value.shape())


def _copy_memory(address: int, shape: List[int]) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(ctypes.string_at(address, 2 * count), dtype=np.uint16).reshape(shape)
