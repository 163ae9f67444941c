"""What a builder is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """A candidate's graph, and what other runtimes need to make the same of it.

    Attributes:
        graph: the ``.onnx`` file as ONNX Runtime serves it, in ``precision``.
        plain: the float graph that it was made from, which ``scales`` belong to.
        precision: ``fp32``, ``fp16`` or ``int8``.
        examples: inputs at several batch sizes, to run what was built.
        shapes: of the inputs, -1 where a size is free; the batch first.
        max_batch_size: the largest batch that is promised.
        scales: of an int8 graph, the file of ``calibration.Scales``.
        timings: folder for what builders measure of this machine, kept from run to run.
        in_float: of an int8 graph, the linear operators that stay in float; of an fp16 graph, those in fp32.
    """

    graph: Path
    plain: Path
    precision: str
    examples: tuple[Mapping[str, Any], ...]
    shapes: Mapping[str, tuple[int, ...]]
    max_batch_size: int
    timings: Path
    scales: Path | None = None
    in_float: tuple[str, ...] = field(default=())
