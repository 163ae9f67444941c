"""Sensitivity: what each group is worth, measured, and a pruning that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stage_testing import aligned_profile, run_stage, sources, torch_model
from torch import Tensor, nn

from edgekit import surgery
from edgekit.artifact import Artifact
from edgekit.modules import parameter_count
from edgekit.recipe import Prune


class Lopsided(nn.Module):
    """Two convolutions of the same shape; the second one's channels hardly reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.matters = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.idles = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        self.heads = nn.ModuleList([nn.Linear(64, 10), nn.Linear(64, 10)])
        with torch.no_grad():
            self.heads[1].weight.mul_(1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = [branch(x).mean(dim=(2, 3)) for branch in (self.matters, self.idles)]
        logits: Tensor = self.heads[0](pooled[0]) + self.heads[1](pooled[1])
        return logits


@pytest.fixture(scope="module")
def given() -> Any:
    """The model, with noise as data."""
    return sources(torch_model(Lopsided, image=(3, 8, 8)))


@pytest.fixture(scope="module")
def measured(given: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Its sensitivity."""
    config = {"prune": Prune(), "seed": 0, "threads": 1}
    return run_stage("sensitivity", config, given, tmp_path_factory.mktemp("s") / "out", aligned_profile(8))


def test_a_group_that_hardly_reaches_the_output_is_worth_little(measured: Artifact) -> None:
    """The loss is that of the outputs, group by group, at widths that the device likes."""
    groups = measured.metadata["groups"]
    losses = {name: dict(map(tuple, group["points"])) for name, group in groups.items()}
    assert {"matters.0", "idles.0"} <= set(losses)
    assert losses["idles.0"][32] < losses["matters.0"][32] / 10
    assert all(width % 8 == 0 for group in losses.values() for width in group)


def _latency(given: Any, home: Path) -> Artifact:
    config = {"measured": False, "threads": 1}
    return run_stage("staircase", config, given, home / "latency", aligned_profile(8))


def _prune(given: Any, out: Path, size: float, share: float | None, **artifacts: Artifact) -> Artifact:
    config = {"prune": Prune(), "size": size, "latency_share": share, "seed": 0}
    return run_stage("prune", config, given, out, aligned_profile(8), **artifacts)


def test_pruning_takes_from_the_group_that_is_worth_little(
    given: Any, measured: Artifact, tmp_path: Path
) -> None:
    """The size is met, and the idle branch paid for it."""
    pruned = _prune(given, tmp_path / "out", 0.6, None, sensitivity=measured)
    module = surgery.load_into(given.model.module(), pruned.path)
    assert parameter_count(module) <= 0.6 * parameter_count(given.model.module())
    widths = pruned.metadata["groups"]
    assert widths["idles.0"][1] < widths["matters.0"][1]


def test_a_latency_bound_prunes_further_than_the_size(given: Any, measured: Artifact, tmp_path: Path) -> None:
    """The share of the latency is met as its model sees it, which is kept with the result."""
    latency = _latency(given, tmp_path)
    pruned = _prune(given, tmp_path / "out", 0.9, 0.5, sensitivity=measured, latency=latency)
    assert pruned.metadata["latency_share"] <= 0.5
    assert pruned.metadata["latency_model"] == "roofline of x86-cpu"
    loose = _prune(given, tmp_path / "loose", 0.9, None, sensitivity=measured, latency=latency)
    assert loose.metadata["latency_share"] > 0.5


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_other_allocations_know_the_bound_too(given: Any, allocation: str, tmp_path: Path) -> None:
    """Ranked over the model, or the same share everywhere: smaller until the latency fits."""
    latency = _latency(given, tmp_path)
    config = {"prune": Prune(allocation=allocation), "size": 0.9, "latency_share": 0.6, "seed": 0}
    pruned = run_stage("prune", config, given, tmp_path / "out", aligned_profile(8), latency=latency)
    assert pruned.metadata["latency_share"] <= 0.6
