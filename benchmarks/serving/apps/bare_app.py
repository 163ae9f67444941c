"""``session.run`` alone. For each line ``MODEL RUNS`` on standard input, answers the median in seconds."""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
from onnx_models import OnnxModel, open_models

MODELS = open_models()


def timed(model: OnnxModel, runs: int) -> float:
    """The median of ``runs`` runs of one row."""
    rows = np.random.default_rng(1).standard_normal((1, *model.shape)).astype(np.float32)
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        model.session.run(["y"], {"x": rows})
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


for line in sys.stdin:
    name, count = line.split()
    print(timed(MODELS[name], int(count)), flush=True)
