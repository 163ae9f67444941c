"""Build a TensorRT engine from an ONNX graph: one code path over TensorRT 8.5 to 11 and TensorRT-RTX.

What the releases do not share is asked of the module itself with ``hasattr``, never of its version. Up to
8.6 flags of the builder say the precision; newer ones take it from the graph's own types and Q/DQ pairs
(a strongly typed network) unless a calibration cache, a list of precisions or the DLA needs the flags, which
10.x still has. 11 and RTX have none; the DLA of 11.4 takes a strongly typed network.

Nothing here imports TensorRT: the caller hands over the module, ``tensorrt`` or ``tensorrt_rtx``. The host
builds ahead of time with this, the agent on the device. Python 3.8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Optional, Tuple

from device_agent.engines.tensorrt_config import configure, constrain, monitor, put_on_dla
from device_agent.engines.tensorrt_log import Said
from device_agent.engines.tensorrt_module import TensorRt, register_plugins, version
from device_agent.engines.tensorrt_settings import BuildError, BuildSettings, Built, NeedsGpu, OnProgress

if TYPE_CHECKING:
    from tensorrt import Builder, IBuilderConfig, ICudaEngine, INetworkDefinition, ParserError

_NO_DRIVER = "CUDA driver version is insufficient"


def build_engine(
    trt: TensorRt,
    graph: bytes,
    settings: BuildSettings,
    path: Optional[str] = None,
    on_progress: Optional[OnProgress] = None,
) -> Built:
    """Build an engine. Takes seconds to many minutes, and as much memory as TensorRT likes.

    An earlier build's timings only save time: where no engine comes of a build with them, it is tried once
    more without.

    Args:
        trt: the module ``tensorrt`` or ``tensorrt_rtx``.
        graph: the ONNX model's bytes.
        settings: what to build.
        path: of the ONNX file, where its tensors lie in files beside it.
        on_progress: called while it builds, by the releases that report progress (not 8.5).

    Raises:
        BuildError: the graph is not for this TensorRT, or no engine came of it.
    """
    try:
        return _build(trt, graph, settings, path, on_progress)
    except _NoEngine:
        if not settings.timing_cache:
            raise
    return _build(trt, graph, replace(settings, timing_cache=b""), path, on_progress)


class _NoEngine(BuildError):
    """The builder took the graph, and no engine came of it."""


def _build(
    trt: TensorRt,
    graph: bytes,
    settings: BuildSettings,
    path: Optional[str],
    on_progress: Optional[OnProgress],
) -> Built:
    by_flags = _by_flags(trt, settings)
    said = Said(trt)
    builder, network = _read(trt, said, graph, path, by_flags)
    config = builder.create_builder_config()
    kept = configure(trt, builder, network, config, settings, by_flags)
    if on_progress is not None and hasattr(trt, "IProgressMonitor"):
        kept.append(monitor(trt, on_progress))
        config.progress_monitor = kept[-1]
    constrained = constrain(trt, network, config, settings.layer_precisions) if by_flags else 0
    not_on_dla = put_on_dla(trt, builder, network, config, settings.dla_core)
    serialized = builder.build_serialized_network(network, config)
    del kept  # what the builder calls back lives until here
    if serialized is None:
        raise _NoEngine(said.why("TensorRT builds no engine and does not say why"))
    return Built(
        engine=bytes(serialized),
        timing_cache=_timing_cache(config),
        layers=network.num_layers,
        not_on_dla=not_on_dla,
        constrained=constrained,
        warnings=tuple(dict.fromkeys(said.warnings)),
        layer_listing=said.layers,
    )


def read_graph(trt: TensorRt, graph: bytes, path: Optional[str] = None) -> None:
    """Let the parser read a graph whose own types say the precision, and build nothing.

    Raises:
        BuildError: it does not take it.
    """
    _read(trt, Said(trt), graph, path, by_flags=_by_flags(trt, BuildSettings()))


def describe_layers(trt: TensorRt, engine: ICudaEngine) -> str:
    """What TensorRT made of the graph: its layers with their kernels and precisions, as JSON.

    Of an engine for several shapes the inspector tells no types before it knows the shapes of a run, which
    are the usual ones here; that takes the memory of a run.
    """
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context()
    if context is not None:  # no memory for one: the names are still told
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                context.set_input_shape(name, engine.get_tensor_profile_shape(name, 0)[1])
        inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


# The network


def _by_flags(trt: TensorRt, settings: BuildSettings) -> bool:
    """Whether the builder's flags say the precision, and not the graph.

    Raises:
        BuildError: they would have to, and this TensorRT has none.
    """
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return True
    needs = settings.calibration_cache or settings.layer_precisions
    if hasattr(trt.BuilderFlag, "INT8"):
        return bool(needs) or settings.dla_core is not None  # a DLA that knows no Q/DQ pairs
    if needs:
        raise BuildError(
            f"TensorRT {version(trt)} takes no calibration cache and no layer precisions; "
            "give it a graph whose types and Q/DQ pairs say the precision"
        )
    return False


def _network_flags(trt: TensorRt, by_flags: bool) -> int:
    flags, known = 0, trt.NetworkDefinitionCreationFlag
    if by_flags and hasattr(known, "EXPLICIT_BATCH"):
        flags |= 1 << int(known.EXPLICIT_BATCH)
    if not by_flags:
        flags |= 1 << int(known.STRONGLY_TYPED)
    return flags


def _read(
    trt: TensorRt, said: Said, graph: bytes, path: Optional[str], by_flags: bool
) -> Tuple[Builder, INetworkDefinition]:
    try:
        builder = trt.Builder(said.logger)
    except TypeError as error:  # the binding's word for "there is none"
        raise BuildError(said.why("TensorRT makes no builder here; is there a GPU?")) from error
    register_plugins(trt, said.logger)
    network = builder.create_network(_network_flags(trt, by_flags))
    parser = trt.OnnxParser(network, said.logger)
    parsed = parser.parse(graph) if path is None else parser.parse(graph, path)
    if parsed:
        return builder, network
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    why = "; ".join(f"{_node(error)}: {error.desc()}" for error in errors) or "it does not parse"
    if any(_NO_DRIVER in error for error in said.errors):
        raise NeedsGpu(f"a plugin asks for a GPU when the graph is read, and there is none here: {why}")
    raise BuildError(why)


def _node(error: ParserError) -> str:
    if hasattr(error, "node_name"):  # not in 8.5
        return f"{error.node_operator()} '{error.node_name()}'"
    return f"node {error.node()}"


def _timing_cache(config: IBuilderConfig) -> bytes:
    cache = config.get_timing_cache() if hasattr(config, "get_timing_cache") else None
    return b"" if cache is None else bytes(cache.serialize())
