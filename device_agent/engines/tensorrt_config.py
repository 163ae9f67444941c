"""What TensorRT's builder is told: limits, shapes, precisions, the DLA, whom to tell of its progress.

What the releases do not share is asked of the module with ``hasattr``. Python 3.8.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Sequence, Tuple

from device_agent.engines.tensorrt_module import TensorRt, as_dims
from device_agent.engines.tensorrt_settings import BuildError, BuildSettings, OnProgress
from device_agent.manifest import ShapeRange

if TYPE_CHECKING:
    from tensorrt import (
        Builder,
        IBuilderConfig,
        IInt8Calibrator,
        INetworkDefinition,
        IOptimizationProfile,
        IProgressMonitor,
    )


_EXTERNAL = {"CUBLAS", "CUBLAS_LT", "CUDNN"}


def configure(
    trt: TensorRt,
    builder: Builder,
    network: INetworkDefinition,
    config: IBuilderConfig,
    settings: BuildSettings,
    by_flags: bool,
) -> List[Any]:
    """Set everything but the precision of single layers; returns what must outlive the build."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that `describe_layers` names kernels
    if settings.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.tactic_sources is not None:
        sources = (getattr(trt.TacticSource, name) for name in settings.tactic_sources)
        config.set_tactic_sources(sum(1 << int(source) for source in sources))
        if not _EXTERNAL.intersection(settings.tactic_sources):
            _use_own_kernels_alone(trt, config)
    if settings.compute_capabilities:
        _target(trt, config, settings.compute_capabilities)
    kept: List[Any] = [_profile(builder, ranges) for ranges in settings.profiles]
    for profile in kept:
        config.add_optimization_profile(profile)
    if hasattr(config, "set_timing_cache"):
        cache = config.create_timing_cache(settings.timing_cache)
        config.set_timing_cache(cache, False)
        kept.append(cache)
    if settings.precision == "fp32" and hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    if by_flags:
        kept.extend(_set_precision(trt, builder, network, config, settings))
    return kept


def _use_own_kernels_alone(trt: TensorRt, config: IBuilderConfig) -> None:
    """Keep 8.5's and 8.6's core off cuBLAS and cuDNN; tactic sources alone may not (NVIDIA/TensorRT#1928)."""
    previews = getattr(trt, "PreviewFeature", None)
    feature = getattr(previews, "DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805", None)
    if feature is not None:
        config.set_preview_feature(feature, True)


def _target(rtx: Any, config: Any, capabilities: Sequence[str]) -> None:
    """Build for GPUs that need not be here; these names are TensorRT-RTX's alone, which has no stubs."""
    config.num_compute_capabilities = len(capabilities)
    for number, name in enumerate(capabilities):
        config.set_compute_capability(getattr(rtx.ComputeCapability, name), number)


def _profile(builder: Builder, ranges: Mapping[str, ShapeRange]) -> IOptimizationProfile:
    profile = builder.create_optimization_profile()
    for name, shapes in ranges.items():
        profile.set_shape(name, *(as_dims(sizes) for sizes in (shapes.least, shapes.usual, shapes.most)))
    return profile


def _set_precision(
    trt: TensorRt,
    builder: Builder,
    network: INetworkDefinition,
    config: IBuilderConfig,
    settings: BuildSettings,
) -> List[Any]:
    if settings.precision == "fp32":
        return []
    config.set_flag(trt.BuilderFlag.FP16)
    if settings.precision != "int8":
        return []
    config.set_flag(trt.BuilderFlag.INT8)
    if not settings.calibration_cache:
        if not _is_quantized(trt, network):
            raise BuildError("int8 needs a graph with Q/DQ pairs, or a calibration cache")
        return []
    calibrator = _calibrator(trt, settings.calibration_cache)
    config.int8_calibrator = calibrator
    kept: List[Any] = [calibrator]
    if settings.profiles:  # one shape: the calibrator's batch is never asked for, but must fit
        usual = {name: ShapeRange(*(shapes.usual,) * 3) for name, shapes in settings.profiles[0].items()}
        profile = _profile(builder, usual)
        config.set_calibration_profile(profile)
        kept.append(profile)
    return kept


def _is_quantized(trt: TensorRt, network: INetworkDefinition) -> bool:
    layers = (network.get_layer(number) for number in range(network.num_layers))
    return any(layer.type == trt.LayerType.QUANTIZE for layer in layers)


def _calibrator(trt: TensorRt, cache: bytes) -> IInt8Calibrator:
    if TYPE_CHECKING:
        from tensorrt import IInt8EntropyCalibrator2 as Base
    else:
        Base = trt.IInt8EntropyCalibrator2  # known only here

    class FromCache(Base):
        """Hands over scales that were computed elsewhere; asks for no sample."""

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: List[str]) -> List[int]:
            return []

        def read_calibration_cache(self) -> bytes:
            return cache

        def write_calibration_cache(self, _cache: Any) -> None:
            return None

    return FromCache()


def constrain(
    trt: TensorRt, network: INetworkDefinition, config: IBuilderConfig, precisions: Mapping[str, str]
) -> int:
    """Hold layers to the precisions of their nodes, which the parser names them after."""
    types = {"fp32": trt.float32, "fp16": trt.float16}
    # A cast's type is its purpose; holding it to another ends the build. 8.5 has no such layer.
    fixed = {trt.LayerType.CONSTANT, getattr(trt.LayerType, "CAST", trt.LayerType.CONSTANT)}
    constrained = 0
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        wanted = types.get(precisions.get(layer.name, ""))
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        if wanted is None or layer.type in fixed or any(x.dtype != trt.float32 for x in outputs):
            continue
        layer.precision = wanted
        for i in range(layer.num_outputs):
            layer.set_output_type(i, wanted)
        constrained += 1
    if constrained:
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    return constrained


def put_on_dla(
    trt: TensorRt, builder: Builder, network: INetworkDefinition, config: IBuilderConfig, core: Optional[int]
) -> Tuple[str, ...]:
    """Let the DLA run what it can and the GPU the rest, whose layers are returned.

    Raises:
        BuildError: this TensorRT reaches no such DLA.
    """
    if core is None:
        return ()
    if core >= builder.num_DLA_cores:
        raise BuildError(f"there is no DLA {core}: TensorRT reaches {builder.num_DLA_cores} here")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    return tuple(layer.name for layer in layers if not config.can_run_on_DLA(layer))


def monitor(trt: TensorRt, on_progress: OnProgress) -> IProgressMonitor:
    """What passes on TensorRT's reports; not for 8.5, which makes none."""
    if TYPE_CHECKING:
        from tensorrt import IProgressMonitor as Base
    else:
        Base = trt.IProgressMonitor  # known only here

    class Monitor(Base):
        """Passes on what TensorRT reports."""

        def __init__(self) -> None:
            super().__init__()
            self._steps: Dict[str, int] = {}

        def phase_start(self, phase: str, parent: Optional[str], steps: int) -> None:
            self._steps[phase] = steps
            if parent is None:  # those below are many and short
                on_progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            on_progress(phase, step + 1, self._steps.get(phase, 0))
            return True

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()
