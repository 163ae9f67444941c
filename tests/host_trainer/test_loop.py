"""The training loop: it learns, it repeats to the bit, and it stops where going on makes no sense."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from host_trainer.errors import TrainingError
from host_trainer.loop import TrainSettings, deterministic, fit, one_cycle

Pair = tuple[Tensor, Tensor]
STEPS = 8


def _net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 1))


def _batches(epoch: int) -> Iterator[Pair]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS):
        x = torch.randn(32, 4, generator=generator)
        yield x, x.prod(dim=1, keepdim=True).clamp(-1, 1) + x[:, :1]


def _loss(model: nn.Module, batch: Pair) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def _fit(model: nn.Module, **settings: Any) -> Any:
    return fit(
        model, _batches, STEPS, _loss, TrainSettings(**{"epochs": 6, "learning_rate": 0.02, **settings})
    )


def test_the_loss_falls() -> None:
    """On a problem that can be learned, the last epoch's loss is far below the first's."""
    model = _net()
    result = _fit(model)
    assert result.steps == 6 * STEPS
    assert len(result.epoch_losses) == 6
    assert result.epoch_losses[-1] < 0.5 * result.epoch_losses[0]
    assert not model.training


def test_the_same_seed_is_bit_identical_and_another_is_not() -> None:
    """Weights, statistics and losses repeat to the bit, whatever the caller's random state is."""
    states, losses = [], []
    for seed in (1, 1, 2):
        model = _net()
        torch.manual_seed(len(states))
        losses.append(_fit(model, seed=seed).epoch_losses)
        states.append(model.state_dict())
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def test_the_caller_s_random_state_and_choices_come_back() -> None:
    """Training neither advances the caller's generator nor leaves deterministic mode on, even if it fails."""
    torch.manual_seed(5)
    want = torch.rand(2)
    torch.manual_seed(5)
    _fit(_net())
    torch.manual_seed(5)
    with pytest.raises(ValueError, match="x"), deterministic(1):
        raise ValueError("x")
    assert torch.equal(torch.rand(2), want)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(value: float) -> None:
    """The step is named, and the weights are those from before it, not NaN."""
    model = _net()
    calls = []

    def loss(module: nn.Module, batch: Pair) -> Tensor:
        calls.append(1)
        return _loss(module, batch) * (value if len(calls) == 3 else 1.0)

    with pytest.raises(TrainingError, match="at step 3") as caught:
        fit(model, _batches, STEPS, loss, TrainSettings(epochs=2, learning_rate=0.01))
    assert len(str(caught.value).splitlines()) == 3
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_an_epoch_without_a_batch_is_an_error() -> None:
    """Empty data is named instead of "trained"."""
    with pytest.raises(TrainingError, match="had no batch"):
        fit(_net(), lambda _epoch: iter(()), STEPS, _loss, TrainSettings(epochs=1, learning_rate=0.01))


def test_no_epochs_change_nothing() -> None:
    """Zero epochs leave the weights as they are, in eval mode."""
    model = _net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert _fit(model, epochs=0) == (type(_fit(_net(), epochs=0)))(0, ())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_frozen_parameters_stay() -> None:
    """Only what requires a gradient is trained."""
    model = _net()
    model[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    before = model[0].weight.clone()  # type: ignore[index,operator,union-attr]
    last = model[4].weight.clone()  # type: ignore[index,operator,union-attr]
    _fit(model, epochs=1)
    assert torch.equal(model[0].weight, before)  # type: ignore[index,arg-type]
    assert not torch.equal(model[4].weight, last)  # type: ignore[index,arg-type]


def test_weight_decay_spares_biases_and_norms() -> None:
    """With a zero loss, matrices shrink; biases and normalization weights do not."""
    model = _net()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    fit(
        model, _batches, STEPS, lambda m, b: (m(b[0]) * 0).sum(),
        TrainSettings(epochs=1, learning_rate=0.1, weight_decay=0.5),
    )  # fmt: skip
    for name, value in model.named_parameters():
        if value.ndim > 1:
            assert value.norm() < before[name].norm()
        else:
            assert torch.equal(value, before[name])


def test_every_step_is_reported() -> None:
    """The hook hears of each step, in order, with the total and a finite loss."""
    heard: list[tuple[int, int, float]] = []
    settings = TrainSettings(epochs=2, learning_rate=0.01)
    fit(_net(), _batches, STEPS, _loss, settings, lambda *told: heard.append(told))
    assert [step for step, _, _ in heard] == list(range(1, 2 * STEPS + 1))
    assert {total for _, total, _ in heard} == {2 * STEPS}
    assert all(math.isfinite(loss) for _, _, loss in heard)


@given(total=st.integers(1, 500), warmup=st.floats(0, 0.9))
@example(total=2, warmup=0.75)  # a warm-up that rounds to all steps
def test_the_schedule_rises_to_one_and_falls_to_nearly_zero(total: int, warmup: float) -> None:
    """Never above the peak or below zero, rising in the warm-up, falling after it, reaching the peak once."""
    factors = [one_cycle(step, total, warmup) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == 1
    top = factors.index(1)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert one_cycle(total, total, warmup) == 0
    assert factors[0] > 0
