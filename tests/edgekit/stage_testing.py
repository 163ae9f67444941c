"""Stages run by hand: a model and data made in memory, a profile, and a directory to write to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from device_agent.manifest import TensorSpec
from edgekit import profile
from edgekit.artifact import Artifact, tree_digest
from edgekit.data import Dataset, Sample
from edgekit.models import Model
from edgekit.modules import forward
from edgekit.stages.registry import STAGES, Inputs, Sources, validate_config

Arrays = Mapping[str, np.ndarray[Any, Any]]


def noise(
    shapes: Mapping[str, tuple[int, ...]], batch: int, _length: int = 16
) -> dict[str, np.ndarray[Any, Any]]:
    """Normally distributed inputs, the same at every call."""
    random = np.random.default_rng(5)
    return {name: random.normal(size=(batch, *shape)).astype(np.float32) for name, shape in shapes.items()}


def torch_model(build: Callable[[], nn.Module], **shapes: tuple[int, ...]) -> Model:
    """A model from a function, with the inputs' shapes for one sample."""

    def module() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build().eval()

    examples = partial(noise, shapes)
    outputs = forward(module(), tuple(torch.from_numpy(a) for a in examples(2).values()))
    return Model(
        kind="torch",
        name="net",
        digest="d" * 64,
        inputs=tuple(TensorSpec(name, "FP32", (-1, *shape)) for name, shape in shapes.items()),
        outputs=tuple(
            TensorSpec(f"output{number}", "FP32", (-1, *value.shape[1:]))
            for number, value in enumerate(outputs)
        ),
        path=None,
        preprocess=None,
        _examples=examples,
        _build=module,
    )


def onnx_model(path: Path, **shapes: tuple[int, ...]) -> Model:
    """A model that is an ONNX file; shapes with the batch axis."""
    from edgekit.models import load_model

    return load_model(path)


def dataset(inputs: Arrays, labels: np.ndarray[Any, Any] | None = None) -> Dataset:
    """Data from arrays, the sample axis first."""
    count = len(next(iter(inputs.values())))

    def read() -> Any:
        for row in range(count):
            label = None if labels is None else labels[row].item()
            yield Sample({name: array[row] for name, array in inputs.items()}, label)

    return Dataset(count, labels is not None, "e" * 64, read)


def sources(model: Model, data: Dataset | None = None) -> Sources:
    """The same data in every role; noise, if none is given."""
    data = data or dataset(dict(model.example(24)))
    return Sources(model, data, data, data)


def run_stage(
    name: str,
    config: Mapping[str, Any],
    given: Sources,
    out: Path,
    device: profile.Profile | None = None,
    **artifacts: Artifact,
) -> Artifact:
    """Run a stage as the plan would, without the store."""
    stage = STAGES[name]
    out.mkdir(parents=True)
    timings = out.with_name("timings")
    timings.mkdir(exist_ok=True)
    inputs = Inputs(given, artifacts, lambda _done, _total: None, timings)
    made = stage.load().run(inputs, validate_config(stage, config), device or profile.load("x86-cpu"), out)
    return Artifact(stage.produces, out, tree_digest(out), "k" * 64, (), made)


def aligned_profile(alignment: int) -> profile.Profile:
    """The x86 profile with another alignment."""
    device = profile.load("x86-cpu")
    return device.model_copy(update={"alignment": dict.fromkeys(device.alignment, alignment)})
