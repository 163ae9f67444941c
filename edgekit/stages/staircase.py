"""Latency against channels on the device: measured where it can be reached, else from its profile's
figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from edgekit.measure import staircase
from edgekit.profile import Profile
from edgekit.stages.registry import Inputs


class Config(BaseModel):
    """Settings of this stage: whether the device can be measured, and the threads of one run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measured: bool
    threads: int


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Make the latency model; the artifact is its metadata.

    Raises:
        EdgekitError: the device cannot be reached, or does not run a layer.
    """
    import torch

    model = inputs.sources.model
    example = tuple(torch.from_numpy(array) for array in model.example(1).values())
    layers = staircase.layers(model.module(), example)
    alignment = max(profile.alignment.values())
    if config.measured:
        found = staircase.measure(layers, inputs.sources.device, config.threads, alignment)
    else:
        found = staircase.predicted(layers, profile, alignment)
    return found.as_json()
