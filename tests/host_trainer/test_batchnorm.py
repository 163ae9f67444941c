"""Recalibration of BatchNorm: the statistics of the data, whatever was there before."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from host_trainer.batchnorm import recalibrate


def _forward(model: nn.Module, batch: Tensor) -> Tensor:
    result: Tensor = model(batch)
    return result


@given(batches=st.integers(1, 6), seed=st.integers(0, 99))
def test_statistics_are_those_of_the_population(batches: int, seed: int) -> None:
    """With equal batches, the mean is the population's, the variance the mean of the batches' variances."""
    data = 3 + 2 * torch.randn(batches, 16, 5, generator=torch.Generator().manual_seed(seed))
    norm = nn.BatchNorm1d(5)
    norm.running_mean.fill_(100)  # type: ignore[union-attr]
    norm.running_var.fill_(9)  # type: ignore[union-attr]
    assert recalibrate(norm, data, _forward) == 1
    assert torch.allclose(norm.running_mean, data.mean(dim=(0, 1)), atol=1e-5)  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, data.var(dim=1).mean(dim=0), atol=1e-4)  # type: ignore[arg-type]


def test_nothing_else_changes() -> None:
    """Weights, momentum and dropout's silence stay; the model is in eval mode afterwards."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Dropout(0.5), nn.BatchNorm1d(6)
    )
    weights = {name: value.clone() for name, value in model.named_parameters()}
    data = torch.randn(3, 32, 4)
    assert recalibrate(model, data, _forward) == 2
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert model[1].momentum == 0.3
    assert not any(module.training for module in model.modules())
    silent = model[:2](data.reshape(-1, 4))
    assert torch.allclose(model[3].running_mean, silent.mean(dim=0), atol=0.05)  # type: ignore[arg-type]


def test_a_model_without_statistics_is_left_alone() -> None:
    """No BatchNorm, or one that keeps no statistics: nothing to do, and no data is read."""

    def never(*_: object) -> Tensor:
        raise AssertionError("data was read")

    assert recalibrate(nn.Linear(2, 2), [torch.zeros(1, 2)], never) == 0
    assert recalibrate(nn.BatchNorm1d(2, track_running_stats=False), [torch.zeros(4, 2)], never) == 0
