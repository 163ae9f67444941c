"""Quantize one ONNX file with NNCF; runs in NNCF's own environment.

nncf_worker.py MODEL ROWS.npz OUT [--transformer]     ROWS holds "row number/input name" arrays
"""

from __future__ import annotations

import sys
from pathlib import Path

import nncf
import numpy as np
import onnx


def main(model: Path, rows: Path, out: Path, transformer: bool) -> None:
    """Post-training quantization with every default, on all rows."""
    feeds: dict[int, dict[str, np.ndarray]] = {}
    with np.load(rows, allow_pickle=False) as data:
        for key in data.files:
            number, _, name = key.partition("/")
            feeds.setdefault(int(number), {})[name] = data[key]
    dataset = nncf.Dataset([feeds[number] for number in sorted(feeds)])
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    quantized = nncf.quantize(onnx.load(str(model)), dataset, subset_size=len(feeds), model_type=kind)
    onnx.save(quantized, str(out))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), transformer="--transformer" in sys.argv[4:])
