"""What is watched: metrics that programs and TensorBoard read, a band that alerts, causes that are right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from host_trainer import diagnosis
from host_trainer.config import Monitor
from host_trainer.errors import Diverged
from host_trainer.health import Health
from host_trainer.loop import Step, Task, TrainSettings, adamw, run
from host_trainer.record import Activations, Journal, Recorder, last_metrics

Batch = dict[str, Tensor]


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def _task(model: nn.Module, steps: int, change: dict[int, float] | None = None) -> Task:
    """Random batches; at some steps the targets are multiplied."""

    def batches(epoch: int, first: int) -> Any:
        for number in range(first, steps):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
            yield ({"x": x, "y": x[:, :1] * (change or {}).get(number + 1, 1.0)},)

    settings = TrainSettings(epochs=1, learning_rate=1e-3, clip_norm=1.0)
    return Task(model, adamw(model, settings), batches, steps, _loss, settings)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))


def test_tensorboard_reads_what_was_recorded(tmp_path: Path) -> None:
    """Loss, gradient with its band, speed, and each layer's distribution, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = Monitor(every_steps=5, activations_every_steps=10)
    journal = Journal(tmp_path, settings)
    watchers = [
        Recorder(journal, settings, 8, lambda: {"precision/loss_scale": 1.0}),
        Activations(journal, 10),
    ]
    run(_task(_net(), 20), watchers=watchers)
    journal.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15, 20]
    low, high = (events.Scalars(f"gradient/healthy_{side}")[0].value for side in ("low", "high"))
    assert (round(low, 3), high) == (0.1, 10.0)
    assert events.Scalars("speed/samples_per_s")[0].value > 0
    assert {f"activations/{layer}" for layer in "012"} <= set(events.Tags()["histograms"])
    assert events.Histograms("activations/1")[-1].step == 20  # the reader keeps the last one by default
    last = last_metrics(tmp_path)
    assert last["train/learning_rate"] == pytest.approx(0, abs=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    relu = [line["activation_zero_fraction/1"] for line in lines if "activation_zero_fraction/1" in line]
    assert len(relu) == 2
    assert all(0 < share < 1 for share in relu)


def test_every_line_of_the_metrics_is_json(tmp_path: Path) -> None:
    """What is infinite or no number is null, and no reader chokes on that or on a broken line."""
    journal = Journal(tmp_path, Monitor(tensorboard=False))
    journal.write(1, {"gradient/norm": float("inf"), "eval/loss": float("nan"), "train/loss": 2.0})
    journal.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "Infinity" not in text
    assert "NaN" not in text
    (tmp_path / "metrics.jsonl").write_text(text + '7\n{"train/loss": 1')
    assert last_metrics(tmp_path) == {"gradient/norm": None, "eval/loss": None, "train/loss": 2.0}


def test_nothing_is_hooked_between_records(tmp_path: Path) -> None:
    """A step without a record computes the bare model."""
    model = _net()
    journal = Journal(tmp_path, Monitor(tensorboard=False))
    run(_task(model, 3), watchers=[Activations(journal, 2)])
    journal.close()
    assert all(not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("factor", "side"), [(60.0, "above"), (1e-3, "below")])
def test_a_gradient_that_leaves_its_band_is_alerted_once(tmp_path: Path, factor: float, side: str) -> None:
    """The alert names the step, the norm and the side; while it stays outside nothing more is said."""
    alerts: list[str] = []
    task = _task(_net(), 40)
    scaled = replace(task, loss_function=lambda model, batch: _loss(model, batch) * factor)
    run(scaled, watchers=[Health(Monitor(stop_norm=1e6), alerts.append, tmp_path)])
    assert len(alerts) == 1
    assert f"is {side} its healthy band, 0.1 to 10" in alerts[0]


def test_a_huge_gradient_stops_before_the_weights_move(tmp_path: Path) -> None:
    """The step, the layer and the batch are named, and the weights are those of the step before."""
    model = _net()
    seen: list[dict[str, Tensor]] = []
    health = Health(Monitor(), print, tmp_path / "diverged")

    class Remember(Health):
        def before(self, number: int) -> None:
            seen.append({name: value.clone() for name, value in model.state_dict().items()})

    with pytest.raises(Diverged, match="at step 7") as caught:
        run(_task(model, 10, {7: 1e5}), watchers=[Remember(Monitor(), print, tmp_path), health])
    assert "in micro-batch 0 of process 0" in caught.value.why
    assert all(torch.equal(value, seen[-1][name]) for name, value in model.state_dict().items())


def test_a_loss_that_creeps_away_is_an_explosion_too(tmp_path: Path) -> None:
    """Twenty steps of ten times the beginning's loss end the run, though no gradient is huge."""
    change = dict.fromkeys(range(30, 80), 8.0)
    with pytest.raises(Diverged, match="the mean loss"):
        run(_task(_net(), 80, change), watchers=[Health(Monitor(), print, tmp_path)])


class _Broken(nn.Module):
    """A square root of nothing: finite forward, infinite backward."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0).abs().sqrt() + x


class _Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


@pytest.mark.parametrize(
    ("layer", "quantity", "name"), [(_Log(), "output", "1"), (_Broken(), "gradient", "0.bias")]
)
def test_the_first_layer_that_goes_wrong_is_found(layer: nn.Module, quantity: str, name: str) -> None:
    """A logarithm of a negative number by its output; a square root of zero by the gradient before it."""
    model = nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 1))
    task = _task(model, 1)
    (micro_batches,) = task.batches(0, 0)
    step = Step(1, 1, 0, (math.nan,), math.nan, 0.0, False, 0.0, micro_batches)
    cause = diagnosis.find(task, step)
    assert (cause.quantity, cause.layer) == (quantity, name)
    assert not math.isfinite(cause.value)
