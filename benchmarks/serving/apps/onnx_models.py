"""What every peer's application shares: the models to serve, each as a session with one thread."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

Array = np.ndarray[Any, Any]

#: A JSON object: model name -> {"path": ..., "shape": the shape of one row}.
VARIABLE = "BENCH_MODELS"


@dataclass(frozen=True)
class OnnxModel:
    """A session, and the shape of a row without the batch axis."""

    session: Any
    shape: tuple[int, ...]

    def run(self, rows: Array) -> Array:
        """Answer rows with the batch axis first."""
        answers: Array = self.session.run(["y"], {"x": rows})[0]
        return answers

    def run_text(self, texts: list[str]) -> list[str]:
        """Answer rows that came as Base64, as one batch."""
        data = b"".join(map(base64.b64decode, texts))
        answers = self.run(np.frombuffer(data, dtype="<f4").reshape(len(texts), *self.shape))
        return [base64.b64encode(row.tobytes()).decode() for row in answers]


def open_model(path: str, shape: list[int]) -> OnnxModel:
    """Open an ONNX file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, sess_options=options, providers=["CPUExecutionProvider"])
    return OnnxModel(session, tuple(shape))


def described() -> dict[str, dict[str, Any]]:
    """The models that the benchmark asks for."""
    models: dict[str, dict[str, Any]] = json.loads(os.environ[VARIABLE])
    return models


def open_models() -> dict[str, OnnxModel]:
    """Open them all."""
    return {name: open_model(**model) for name, model in described().items()}
