"""The stages, a line each: what a stage reads, makes, and depends on.

A stage is a module with a pydantic model ``Config`` and a function

    run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]

which writes the artifact's files into ``out`` and returns its metadata; the store adds digest and parents.
Everything that can change the result is declared here, because the artifact's key is computed from it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from edgekit.artifact import Artifact
from edgekit.builders.registry import BUILDERS
from edgekit.data import Dataset
from edgekit.measure.device import THIS_MACHINE, Device
from edgekit.models import Model
from edgekit.postprocess import Postprocess

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Sources:
    """What a run starts from, and the device that latencies are measured on."""

    model: Model
    calib: Dataset
    train: Dataset
    held_out: Dataset
    postprocess: Postprocess | None = None
    device: Device = THIS_MACHINE

    @property
    def behind(self) -> bytes | None:
        """The graph that is computed behind the model, if there is one."""
        return None if self.postprocess is None else self.postprocess.graph

    def digest(self, name: str) -> str | None:
        """What a field is, for the key of what is made from it."""
        source = getattr(self, name)
        return None if source is None else str(source.digest)


@dataclass(frozen=True)
class Inputs:
    """What a stage is given.

    Attributes:
        sources: what the run starts from.
        artifacts: those that it consumes, by role.
        tick: a progress hook.
        timings: folder for what is measured to make later work faster; no result may depend on it.
    """

    sources: Sources
    artifacts: Mapping[str, Artifact]
    tick: Tick
    timings: Path


@dataclass(frozen=True)
class Stage:
    """A row of the registry.

    Attributes:
        module: dotted name, imported when needed.
        consumes: role -> kinds that it accepts there.
        produces: kind of its artifact.
        reads: names of ``Sources`` that it reads.
        profile: fields of the profile that it looks at.
        libraries: distributions whose versions can change the result, or whose absence can.
        loads: own modules that it imports by name while it runs; a reader of its source does not see them.
    """

    module: str
    consumes: Mapping[str, tuple[str, ...]]
    produces: str
    reads: tuple[str, ...]
    profile: tuple[str, ...]
    libraries: tuple[str, ...]
    loads: tuple[str, ...] = ()

    def load(self) -> ModuleType:
        """Import the stage's module."""
        return importlib.import_module(self.module)


_GRAPHS = ("onnx",)

STAGES: dict[str, Stage] = {
    "staircase": Stage(
        "edgekit.stages.staircase",
        {},
        "latency",
        ("model", "device"),
        ("name", "accelerator", "alignment", "memory", "peak"),
        ("onnxruntime", "torch"),
    ),
    "sensitivity": Stage(
        "edgekit.stages.sensitivity",
        {"model": ("torch",)},
        "sensitivity",
        ("model", "calib"),
        ("alignment",),
        ("torch",),
    ),
    "prune": Stage(
        "edgekit.stages.prune",
        {"model": ("torch",), "sensitivity": ("sensitivity",), "latency": ("latency",)},
        "torch",
        ("model", "calib"),
        ("alignment",),
        ("torch",),
    ),
    "recover": Stage(
        "edgekit.stages.recover", {"model": ("torch",)}, "torch", ("model", "train"), (), ("torch",)
    ),
    "export": Stage(
        "edgekit.stages.export",
        {"model": ("torch",)},
        "onnx",
        ("model",),
        ("highest_opset",),
        ("torch", "onnx"),
    ),
    "quantize": Stage(
        "edgekit.stages.quantize",
        {"graph": _GRAPHS, "original": _GRAPHS},
        "onnx",
        ("model", "calib", "postprocess"),
        ("runtime", "accelerator"),
        ("onnx", "onnxruntime", "numpy"),
    ),
    "build": Stage(
        "edgekit.stages.build",
        {"graph": _GRAPHS, "plain": _GRAPHS},
        "engine",
        ("model",),
        ("name", "runtime", "accelerator", "memory", "dla"),
        ("onnx", "onnxruntime", "tensorrt", "tensorrt-rtx-cu13"),
        tuple(dict.fromkeys(BUILDERS.values())),
    ),
    "verify": Stage(
        "edgekit.stages.verify",
        {"original": ("engine",), "candidate": ("engine",)},
        "measurement",
        ("held_out", "postprocess", "device"),
        (),
        ("onnxruntime", "numpy"),
    ),
}


def validate_config(stage: Stage, config: Mapping[str, Any]) -> Any:
    """The stage's ``Config``, from plain JSON."""
    return stage.load().Config.model_validate(config)
