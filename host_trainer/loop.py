"""The training loop: the only one in the house.

It takes what varies (batches, a loss) as functions, so that training from labels, distillation and the
recovery of a pruned model are the same loop. On one machine type with the same versions, the same seed
gives the same weights, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from host_trainer.errors import TrainingError

Batch = Any
LossFunction = Callable[[nn.Module, Batch], Tensor]
StepHook = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainSettings:
    """How to optimize.

    Attributes:
        epochs: passes over the batches.
        learning_rate: the peak of a one-cycle schedule (Smith and Topin, 2018): linear warm-up, cosine decay.
        weight_decay: AdamW's (Loshchilov and Hutter, 2019), on matrices and kernels only.
        warmup_fraction: share of all steps that warms up.
        clip_norm: largest norm of the gradient.
        seed: for everything random inside the model and the batches' order.
    """

    epochs: int
    learning_rate: float
    weight_decay: float = 1e-2
    warmup_fraction: float = 0.2
    clip_norm: float = 5.0
    seed: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What a run did: optimizer steps taken, and the mean loss of each epoch."""

    steps: int
    epoch_losses: tuple[float, ...]


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    steps_per_epoch: int,
    loss_function: LossFunction,
    settings: TrainSettings,
    on_step: StepHook | None = None,
) -> TrainResult:
    """Train ``model`` in place and leave it in eval mode.

    Args:
        model: its trainable parameters are those with ``requires_grad``.
        batches: called with the epoch's number, gives that epoch's batches.
        steps_per_epoch: how many batches an epoch has; the schedule is laid out from it.
        loss_function: takes the model and a batch, gives a scalar to minimize.
        settings: how to optimize.
        on_step: called after every step with (steps done, steps in all, loss).

    Raises:
        TrainingError: the loss became NaN or infinite, or an epoch gave no batch.
    """
    total_steps = settings.epochs * steps_per_epoch
    if total_steps == 0:
        model.eval()
        return TrainResult(0, ())
    optimizer = torch.optim.AdamW(_parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle(step, total_steps, settings.warmup_fraction)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    step, epoch_losses = 0, []
    with deterministic(settings.seed):
        for epoch in range(settings.epochs):
            model.train()
            losses = []
            for batch in batches(epoch):
                loss = loss_function(model, batch)
                losses.append(_finite(loss, step))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
                optimizer.step()
                schedule.step()
                step += 1
                if on_step is not None:
                    on_step(step, total_steps, losses[-1])
            if not losses:
                raise TrainingError(
                    f"epoch {epoch + 1} had no batch",
                    "the training data is empty or smaller than one batch",
                    "give more training data or a smaller batch_size",
                )
            epoch_losses.append(math.fsum(losses) / len(losses))
    model.eval()
    return TrainResult(step, tuple(epoch_losses))


def one_cycle(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Factor on the peak learning rate at ``step``: linear up to 1, then a cosine down to 0 at the end."""
    if step >= total_steps:
        return 0.0
    warmup_steps = max(1, round(total_steps * warmup_fraction))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Seed torch and ask for deterministic kernels; the caller's random state and choice come back after."""
    before = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and norms are not decayed: shrinking them moves the function, not its capacity."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss became {value} at step {step + 1}",
            "training diverged, or the data holds NaN or infinity",
            "lower learning_rate, or check the data",
        )
    return value
