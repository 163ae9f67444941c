"""What a TensorRT engine is built from and with, and what comes of it. Python 3.8."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Dict, Mapping, Optional, Sequence, Tuple

from device_agent.manifest import ShapeRange

Shape = Tuple[int, ...]

#: Told what TensorRT does: the phase, its steps that are done, and how many it has; 0: nobody knows.
OnProgress = Callable[[str, int, int], None]


class BuildError(Exception):
    """TensorRT cannot build this; the text is what it said."""


class NeedsGpu(BuildError):
    """TensorRT-RTX cannot even read this graph where there is no GPU."""


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
        layer_listing: the engine's own layers in TensorRT-RTX's words; empty for a TensorRT that lists none.
    """

    engine: bytes
    timing_cache: bytes = b""
    layers: int = 0
    not_on_dla: Tuple[str, ...] = ()
    constrained: int = 0
    warnings: Tuple[str, ...] = ()
    layer_listing: str = ""


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
