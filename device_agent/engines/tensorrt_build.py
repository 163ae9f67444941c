"""Build a TensorRT engine from an ONNX graph: one code path over TensorRT 8.5 to 11 and TensorRT-RTX.

What the releases do not share is asked of the module itself with ``hasattr``, never of its version. Up to
8.6 flags of the builder say the precision; newer ones take it from the graph's own types and Q/DQ pairs
(a strongly typed network) unless a calibration cache, a list of precisions or the DLA needs the flags, which
10.x still has and 11 and RTX have not.

Nothing here imports TensorRT: the caller hands over the module, ``tensorrt`` or ``tensorrt_rtx``. The host
builds ahead of time with this, the agent on the device. Python 3.8.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from device_agent.engines.tensorrt_log import collecting_logger
from device_agent.manifest import ShapeRange

Shape = Tuple[int, ...]

#: Told what TensorRT does: the phase, its steps that are done, and how many it has; 0: nobody knows.
OnProgress = Callable[[str, int, int], None]


class BuildError(Exception):
    """TensorRT cannot build this; the text is what it said."""


@dataclass(frozen=True)
class BuildSettings:
    """What to build.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``int8``. By flags, float layers of an int8 engine may use fp16.
        profiles: optimization profiles, each a range for every input; empty for a graph of fixed shapes.
        workspace_bytes: the most that one layer may take for itself while it runs; 0: TensorRT's own limit.
        calibration_cache: scales in TensorRT's text format, for a graph without Q/DQ pairs.
        layer_precisions: by the name of an ONNX node, what it must compute in: ``fp32`` or ``fp16``. Nodes
            that are ``int8`` here, or not here, are left to TensorRT.
        timing_cache: what an earlier build measured on the same device with the same TensorRT.
        tactic_sources: names of ``trt.TacticSource``; None: TensorRT's default.
        dla_core: the DLA to build for, its layers falling back to the GPU where they must; None: the GPU.
        compute_capabilities: GPUs to build for without having one, such as ``SM89``; TensorRT-RTX only.
    """

    precision: str = "fp32"
    profiles: Tuple[Mapping[str, ShapeRange], ...] = ()
    workspace_bytes: int = 0
    calibration_cache: bytes = b""
    layer_precisions: Mapping[str, str] = field(default_factory=dict)
    timing_cache: bytes = b""
    tactic_sources: Optional[Tuple[str, ...]] = None
    dla_core: Optional[int] = None
    compute_capabilities: Tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """An engine, and what came of building it.

    Attributes:
        engine: the serialized engine.
        timing_cache: for the next build on this device; empty where this TensorRT keeps none.
        layers: of the network before TensorRT fused them.
        not_on_dla: names of the layers that the DLA cannot run, which the GPU does.
        constrained: how many layers were held to ``layer_precisions``.
        warnings: what TensorRT warned of, each once.
    """

    engine: bytes
    timing_cache: bytes = b""
    layers: int = 0
    not_on_dla: Tuple[str, ...] = ()
    constrained: int = 0
    warnings: Tuple[str, ...] = ()


def serving_ranges(
    shapes: Mapping[str, Sequence[int]],
    batches: Sequence[int],
    free: Optional[Tuple[int, int, int]] = None,
) -> Dict[str, ShapeRange]:
    """The optimization profile of a model that is served in these batches; tuned for the largest.

    Args:
        shapes: of each input, -1 where a size is free; the batch axis is the first.
        batches: the sizes that the server makes.
        free: the least, usual and largest size of every other free axis, such as a sequence's length.

    Raises:
        BuildError: an axis is free and ``free`` does not say its sizes.
    """
    sizes = (min(batches), max(batches), max(batches))
    return {
        name: ShapeRange(*(_filled(name, shape, sizes, free, i) for i in range(3)))
        for name, shape in shapes.items()
    }


def _filled(
    name: str, shape: Sequence[int], batch: Tuple[int, int, int], free: Optional[Tuple[int, int, int]], i: int
) -> Shape:
    filled = [batch[i] if axis == 0 and size < 0 else size for axis, size in enumerate(shape)]
    if free is None and min(filled, default=0) < 0:
        raise BuildError(f"input '{name}' has a free axis besides the batch, whose sizes were not given")
    return tuple(size if size >= 0 or free is None else free[i] for size in filled)


def build_engine(
    trt: Any,
    graph: bytes,
    settings: BuildSettings,
    path: Optional[str] = None,
    on_progress: Optional[OnProgress] = None,
) -> Built:
    """Build an engine. Takes seconds to many minutes, and as much memory as TensorRT likes.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        graph: the ONNX model's bytes.
        settings: what to build.
        path: of the ONNX file, where its tensors lie in files beside it.
        on_progress: called while it builds, by the releases that report progress (not 8.5).

    Raises:
        BuildError: the graph is not for this TensorRT, or no engine came of it.
    """
    by_flags = _by_flags(trt, settings)
    logger = collecting_logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # the binding's word for "there is none"
        raise BuildError(logger.why("TensorRT makes no builder here; is there a GPU?")) from error
    network = builder.create_network(_network_flags(trt, by_flags))
    _parse(trt, network, logger, graph, path)
    config = builder.create_builder_config()
    kept = _configure(trt, builder, network, config, settings, by_flags)
    if on_progress is not None and hasattr(trt, "IProgressMonitor"):
        kept.append(_monitor(trt, on_progress))
        config.progress_monitor = kept[-1]
    constrained = _constrain(trt, network, config, settings.layer_precisions) if by_flags else 0
    not_on_dla = _on_dla(trt, network, config, settings.dla_core)
    serialized = builder.build_serialized_network(network, config)
    del kept  # what the builder calls back lives until here
    if serialized is None:
        raise BuildError(logger.why("TensorRT builds no engine and does not say why"))
    return Built(
        engine=bytes(serialized),
        timing_cache=_timing_cache(config),
        layers=network.num_layers,
        not_on_dla=not_on_dla,
        constrained=constrained,
        warnings=tuple(dict.fromkeys(logger.warnings)),
    )


def describe_layers(trt: Any, engine: Any) -> str:
    """What TensorRT made of the graph: its layers with their kernels and precisions, as JSON."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


# The network


def _by_flags(trt: Any, settings: BuildSettings) -> bool:
    """Whether the builder's flags say the precision, and not the graph.

    Raises:
        BuildError: they would have to, and this TensorRT has none.
    """
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return True
    needs = settings.calibration_cache or settings.layer_precisions or settings.dla_core is not None
    if needs and not hasattr(trt.BuilderFlag, "INT8"):
        raise BuildError(
            f"TensorRT {trt.__version__} takes no calibration cache, layer precisions or DLA; "
            "give it a graph whose types and Q/DQ pairs say the precision"
        )
    return bool(needs)


def _network_flags(trt: Any, by_flags: bool) -> int:
    flags, known = 0, trt.NetworkDefinitionCreationFlag
    if by_flags and hasattr(known, "EXPLICIT_BATCH"):
        flags |= 1 << int(known.EXPLICIT_BATCH)
    if not by_flags:
        flags |= 1 << int(known.STRONGLY_TYPED)
    return flags


def _parse(trt: Any, network: Any, logger: Any, graph: bytes, path: Optional[str]) -> None:
    parser = trt.OnnxParser(network, logger)
    if parser.parse(graph) if path is None else parser.parse(graph, path):
        return
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    raise BuildError(
        "; ".join(f"node {error.node()}: {error.desc()}" for error in errors) or "it does not parse"
    )


# The configuration


def _configure(
    trt: Any, builder: Any, network: Any, config: Any, settings: BuildSettings, by_flags: bool
) -> List[Any]:
    """Set everything but the precision of single layers; returns what must outlive the build."""
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that `describe_layers` names kernels
    if settings.workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.tactic_sources is not None:
        sources = (getattr(trt.TacticSource, name) for name in settings.tactic_sources)
        config.set_tactic_sources(sum(1 << int(source) for source in sources))
    if settings.compute_capabilities:
        config.num_compute_capabilities = len(settings.compute_capabilities)
        for number, name in enumerate(settings.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), number)
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


def _profile(builder: Any, ranges: Mapping[str, ShapeRange]) -> Any:
    profile = builder.create_optimization_profile()
    for name, shapes in ranges.items():
        profile.set_shape(name, shapes.least, shapes.usual, shapes.most)
    return profile


def _set_precision(trt: Any, builder: Any, network: Any, config: Any, settings: BuildSettings) -> List[Any]:
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
    kept = [calibrator]
    if settings.profiles:  # one shape: the calibrator's batch is never asked for, but must fit
        usual = {name: ShapeRange(*(shapes.usual,) * 3) for name, shapes in settings.profiles[0].items()}
        profile = _profile(builder, usual)
        config.set_calibration_profile(profile)
        kept.append(profile)
    return kept


def _is_quantized(trt: Any, network: Any) -> bool:
    layers = (network.get_layer(number) for number in range(network.num_layers))
    return any(layer.type == trt.LayerType.QUANTIZE for layer in layers)


def _calibrator(trt: Any, cache: bytes) -> Any:
    class FromCache(trt.IInt8EntropyCalibrator2):  # type: ignore[misc]  # its base is only known here
        """Hands over scales that were computed elsewhere; asks for no sample."""

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, _names: List[str]) -> None:
            return None

        def read_calibration_cache(self) -> bytes:
            return cache

        def write_calibration_cache(self, _cache: Any) -> None:
            return None

    return FromCache()


def _constrain(trt: Any, network: Any, config: Any, precisions: Mapping[str, str]) -> int:
    """Hold layers to the precisions of their nodes, which the parser names them after."""
    types = {"fp32": trt.float32, "fp16": trt.float16}
    constrained = 0
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        wanted = types.get(precisions.get(layer.name, ""))
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        if (
            wanted is None
            or layer.type == trt.LayerType.CONSTANT
            or any(x.dtype != trt.float32 for x in outputs)
        ):
            continue
        layer.precision = wanted
        for i in range(layer.num_outputs):
            layer.set_output_type(i, wanted)
        constrained += 1
    if constrained:
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    return constrained


def _on_dla(trt: Any, network: Any, config: Any, core: Optional[int]) -> Tuple[str, ...]:
    if core is None:
        return ()
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    return tuple(layer.name for layer in layers if not config.can_run_on_DLA(layer))


def _monitor(trt: Any, on_progress: OnProgress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its base is only known here
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


def _timing_cache(config: Any) -> bytes:
    cache = config.get_timing_cache() if hasattr(config, "get_timing_cache") else None
    return b"" if cache is None else bytes(cache.serialize())
