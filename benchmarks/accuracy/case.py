"""What a model brings to the benchmark: how it is made, its data, and how its answers are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Feed = Mapping[str, Array]
#: One array an output, batch axis first.
Outputs = Sequence[Array]

#: Unlabelled rows that every tool is given; the last quarter of them is what ours judges its candidates on.
CALIBRATION_ROWS = 256
JUDGING_FRACTION = 0.25


@dataclass(frozen=True)
class Data:
    """The rows that a case is calibrated and tested on; no test row is calibrated or trained on.

    Attributes:
        calibration: unlabelled feeds of batch 1, from the training part.
        test: feeds of any batch size, in order.
        truth: labels of the test rows, one entry a row; None: what the float model's first output says.
    """

    calibration: Sequence[Feed]
    test: Sequence[Feed]
    truth: Array | None


@dataclass(frozen=True)
class Case:
    """A trained model.

    Attributes:
        name: in the table.
        summary: what the network is and what it was trained on.
        metric: name of ``quality``.
        quality: the task's metric, from outputs and truth; higher is better.
        distance_name: name of ``distance``.
        distance: from the float model's outputs and an INT8 model's; lower is better, 0 where they agree.
        transformer: NNCF wants to be told, and onnxruntime's operator types matter there.
        export: writes the trained float model as ONNX.
        data: loads the rows.
        sources: modules that the trained model depends on; a change in one trains it anew.
        fixed_length: whether every row has the same shape.
    """

    name: str
    summary: str
    metric: str
    quality: Callable[[Outputs, Array], float]
    distance_name: str
    distance: Callable[[Outputs, Outputs], float]
    transformer: bool
    export: Callable[[Path], None]
    data: Callable[[], Data]
    sources: Sequence[Path]
    fixed_length: bool = True


def image_rows(images: Array, name: str = "image", batch: int = 1) -> list[dict[str, Array]]:
    """Feeds of ``batch`` images each."""
    return [{name: images[start : start + batch]} for start in range(0, len(images), batch)]
