"""Trained models, made when they are first needed and kept under ``.bench/``."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from accuracy import training
from accuracy.case import Case

HOME = Path(__file__).parents[2] / ".bench" / "accuracy"


def prepared(case: Case) -> Path:
    """The trained float model as every tool gets it, after onnxruntime's own ``quant_pre_process``."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = HOME / f"{case.name}-{digest(case.sources)}.onnx"
    if path.exists():
        return path
    print(f"making the model {case.name}", file=sys.stderr, flush=True)
    HOME.mkdir(parents=True, exist_ok=True)
    exported = path.with_suffix(".exported")
    case.export(exported)
    unfinished = path.with_suffix(".unfinished")
    quant_pre_process(exported, unfinished, skip_symbolic_shape=True)
    exported.unlink()
    for old in HOME.glob(f"{case.name}-*.onnx"):
        old.unlink()
    unfinished.replace(path)
    return path


def digest(sources: Sequence[Path]) -> str:
    """Of the code that makes a model, so that no model outlives it."""
    found = hashlib.sha256()
    for source in (Path(training.__file__), *sources):
        found.update(source.read_bytes())
    return found.hexdigest()[:12]
