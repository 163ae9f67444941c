"""Engines for ONNX Runtime: the graph itself, proven to load and to run at several batch sizes.

The session optimizes the graph for the device's own processor when it loads, so the file stays portable.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from edgekit import ort
from edgekit.builders.registry import Built
from edgekit.builders.work import Work
from edgekit.errors import BadInput
from edgekit.profile import Profile

ENGINE_FILE = "model.onnx"


def build(work: Work, profile: Profile, out: Path) -> Built:
    """Copy the graph into ``out`` and run it.

    Raises:
        BadInput: ONNX Runtime does not load it, or a row's output depends on what else is in its batch.
    """
    path = out / ENGINE_FILE
    shutil.copyfile(work.graph, path)
    session = ort.Session(path)
    for example in work.examples:
        outputs = session.run(example)
        rows = len(next(iter(example.values())))
        for name, value in outputs.items():
            if value.shape[:1] != (rows,):
                raise BadInput(
                    f"the exported graph does not keep the batch axis: output {name!r}",
                    f"{rows} rows went in, {len(value) if value.ndim else 'a single number'} came out",
                    "export the model with a free batch axis, or set export.max_batch_size = 1",
                )
            if not np.isfinite(value.astype(np.float64)).all():
                raise BadInput(
                    f"the graph gives NaN or infinity: output {name!r}",
                    "its weights or its precision overflow on ordinary inputs",
                    "check the weights, or choose another --precision",
                )
    return Built(
        "onnxruntime",
        ort.version(),
        profile.architecture,
        built=True,
        executed=True,
        path=path.name,
        layers_why="made when the graph is loaded; the report's layers are its kernels here",
    )
