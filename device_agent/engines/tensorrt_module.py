"""What is used of TensorRT's module, for the type checker: 8.5 to 11 and TensorRT-RTX come in through it.

The module is handed over, for nobody knows before which of them a device has. mypy reads the stubs of 10.13,
which still has all that is used of 8.5. Whether a name is gone, as in 11 and in RTX, is asked with
``hasattr`` where it is used. What RTX alone has is not in the stubs and goes by :class:`Any`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterable, Protocol, Sequence, Tuple, Type, cast

from device_agent.engines import import_library

if TYPE_CHECKING:
    import tensorrt


class TensorRt(Protocol):
    """The module ``tensorrt`` or ``tensorrt_rtx``; the names are its own."""

    @property
    def Builder(self) -> Type[tensorrt.Builder]: ...  # noqa: D102

    @property
    def BuilderFlag(self) -> Type[tensorrt.BuilderFlag]: ...  # noqa: D102

    @property
    def DeviceType(self) -> Type[tensorrt.DeviceType]: ...  # noqa: D102

    @property
    def IInt8EntropyCalibrator2(self) -> Type[tensorrt.IInt8EntropyCalibrator2]: ...  # noqa: D102

    @property
    def ILogger(self) -> Type[tensorrt.ILogger]: ...  # noqa: D102

    @property
    def IOutputAllocator(self) -> Type[tensorrt.IOutputAllocator]: ...  # noqa: D102

    @property
    def IProgressMonitor(self) -> Type[tensorrt.IProgressMonitor]: ...  # noqa: D102

    @property
    def LayerInformationFormat(self) -> Type[tensorrt.LayerInformationFormat]: ...  # noqa: D102

    @property
    def LayerType(self) -> Type[tensorrt.LayerType]: ...  # noqa: D102

    @property
    def MemoryPoolType(self) -> Type[tensorrt.MemoryPoolType]: ...  # noqa: D102

    @property
    def NetworkDefinitionCreationFlag(self) -> Type[tensorrt.NetworkDefinitionCreationFlag]: ...  # noqa: D102

    @property
    def OnnxParser(self) -> Type[tensorrt.OnnxParser]: ...  # noqa: D102

    @property
    def ProfilingVerbosity(self) -> Type[tensorrt.ProfilingVerbosity]: ...  # noqa: D102

    @property
    def Runtime(self) -> Type[tensorrt.Runtime]: ...  # noqa: D102

    @property
    def TacticSource(self) -> Type[tensorrt.TacticSource]: ...  # noqa: D102

    @property
    def TensorIOMode(self) -> Type[tensorrt.TensorIOMode]: ...  # noqa: D102

    @property
    def TensorLocation(self) -> Type[tensorrt.TensorLocation]: ...  # noqa: D102

    @property
    def init_libnvinfer_plugins(self) -> Callable[[tensorrt.ILogger, str], bool]: ...  # noqa: D102

    @property
    def float16(self) -> tensorrt.DataType: ...  # noqa: D102

    @property
    def float32(self) -> tensorrt.DataType: ...  # noqa: D102


def load(name: str) -> TensorRt:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        Missing, Refused: see :func:`device_agent.engines.import_library`.
    """
    return cast(TensorRt, import_library(name, name))


def version(trt: TensorRt) -> str:
    """Of TensorRT, such as ``8.5.2.2``; the stubs lack it."""
    return str(cast(Any, trt).__version__)


def register_plugins(trt: TensorRt, logger: tensorrt.ILogger) -> None:
    """Make TensorRT's own plugins known, which some operators are, such as RoiAlign and, in 8.5, more."""
    if hasattr(trt, "init_libnvinfer_plugins"):
        trt.init_libnvinfer_plugins(logger, "")


def as_dims(sizes: Sequence[int]) -> tensorrt.Dims:
    """A shape for TensorRT, which takes any sequence, though the stubs do not say so."""
    return cast("tensorrt.Dims", sizes)


def from_dims(dims: tensorrt.Dims) -> Tuple[int, ...]:
    """A shape of TensorRT; it can be iterated over, though the stubs do not say so."""
    return tuple(cast(Iterable[int], dims))


if TYPE_CHECKING:  # the stubs have all of these names
    _checked: TensorRt = tensorrt
