"""The training loop: the only one in the house.

It takes what varies (batches, a loss, an engine) as arguments, so that training from labels, distillation and
the recovery of a pruned model are the same loop. On one machine type with the same versions, the same seed
gives the same weights, bit for bit. Nothing that it computes depends on the steps before except through the
weights and the optimizer's state, so that a run goes on from any step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from host_trainer.engine import Engine, Local
from host_trainer.errors import Diverged, TrainingError

Batch = Any
LossFunction = Callable[[nn.Module, Batch], Tensor]
StepHook = Callable[[int, int, float], None]
#: (epoch, first step) -> the micro-batches of each step from there on.
MicroBatches = Callable[[int, int], Iterable[Sequence[Batch]]]


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
    """What a run did: optimizer steps taken, and the mean loss of each epoch that it saw the whole of."""

    steps: int
    epoch_losses: tuple[float, ...]


@dataclass(frozen=True)
class Task:
    """Everything that a run needs.

    Attributes:
        model: its trainable parameters are those with ``requires_grad``.
        optimizer: over those.
        batches: called with an epoch and a step of it, gives each step's micro-batches of this process.
        steps_per_epoch: how many steps an epoch has.
        loss_function: takes the model and a micro-batch, gives a scalar to minimize.
        settings: how to optimize.
        engine: how a step is computed.
        told_to_end: whether this process was; asked once a step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: MicroBatches
    steps_per_epoch: int
    loss_function: LossFunction
    settings: TrainSettings
    engine: Engine = field(default_factory=Local)
    told_to_end: Callable[[], bool] = lambda: False

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.settings.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Step:
    """A step whose gradient is known.

    Attributes:
        number: from 1.
        total: steps of the whole run.
        epoch: from 0.
        losses: of each process, means over its micro-batches.
        grad_norm: of the whole gradient, before clipping.
        learning_rate: of this step.
        skipped: the weights will stay as they are: fp16 is looking for its loss scale.
        waited_s: time that the batches took to come.
        micro_batches: what this process computed it from.
        ending: whether one of the processes was told to end; the same in each.
    """

    number: int
    total: int
    epoch: int
    losses: tuple[float, ...]
    grad_norm: float
    learning_rate: float
    skipped: bool
    waited_s: float
    micro_batches: Sequence[Batch]
    ending: bool = False

    @property
    def loss(self) -> float:
        """Mean over the processes."""
        return math.fsum(self.losses) / len(self.losses)


class Watcher:
    """What looks at a run from outside. Each method may be left as it is: it does nothing."""

    def begin(self, task: Task, step: int) -> None:
        """The run begins, or goes on, after ``step`` steps."""

    def before(self, number: int) -> None:
        """Step ``number`` is about to be computed."""

    def judge(self, step: Step) -> None:
        """The gradient is there and the weights have not moved yet; raising keeps them."""

    def after(self, step: Step) -> None:
        """The weights have moved."""

    def epoch_end(self, epoch: int, step: int) -> None:
        """``epoch`` ended with ``step``; leave the model in training mode."""


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    steps_per_epoch: int,
    loss_function: LossFunction,
    settings: TrainSettings,
    on_step: StepHook | None = None,
) -> TrainResult:
    """Train ``model`` in place, in this process, with deterministic kernels, and leave it in eval mode.

    Args:
        model: its trainable parameters are those with ``requires_grad``.
        batches: called with the epoch's number, gives that epoch's batches.
        steps_per_epoch: how many batches an epoch has; the schedule is laid out from it.
        loss_function: takes the model and a batch, gives a scalar to minimize.
        settings: how to optimize.
        on_step: called after every step with (steps done, steps in all, loss).

    Raises:
        Diverged: the loss or the gradient became NaN or infinite.
        TrainingError: an epoch gave fewer batches than it has steps.
    """

    def ones(epoch: int, first: int) -> Iterator[Sequence[Batch]]:
        return ((batch,) for batch in islice(batches(epoch), first, None))

    task = Task(model, adamw(model, settings), ones, steps_per_epoch, loss_function, settings)
    with deterministic(settings.seed):
        return run(task, watchers=(_Hook(on_step),) if on_step is not None else ())


def run(task: Task, start: int = 0, watchers: Sequence[Watcher] = ()) -> TrainResult:
    """Take the steps after ``start`` up to the last; the model is left in eval mode.

    Raises:
        Diverged: the loss or the gradient became NaN or infinite, or a watcher's judgement.
        TrainingError: an epoch gave fewer batches than it has steps.
    """
    first_epoch, skip = divmod(start, max(1, task.steps_per_epoch))
    epoch_losses = []
    for watcher in watchers:
        watcher.begin(task, start)
    for epoch in range(first_epoch, task.settings.epochs if task.steps_per_epoch else 0):
        task.model.train()
        losses = [step.loss for step in _epoch(task, epoch, skip, watchers)]
        if not skip:
            epoch_losses.append(math.fsum(losses) / len(losses))
        skip = 0
        for watcher in watchers:
            watcher.epoch_end(epoch, (epoch + 1) * task.steps_per_epoch)
    task.model.eval()
    return TrainResult(max(start, task.total_steps), tuple(epoch_losses))


def _epoch(task: Task, epoch: int, skip: int, watchers: Sequence[Watcher]) -> Iterator[Step]:
    arriving = iter(task.batches(epoch, skip))
    for position in range(skip, task.steps_per_epoch):
        asked = time.perf_counter()
        micro_batches = next(arriving, None)
        waited_s = time.perf_counter() - asked
        if micro_batches is None:
            raise _too_few(epoch, position, task.steps_per_epoch)
        number = epoch * task.steps_per_epoch + position + 1
        for watcher in watchers:
            watcher.before(number)
        step = _gradient(task, number, epoch, micro_batches, waited_s)
        for watcher in watchers:
            watcher.judge(step)
        if not step.skipped:
            _check_finite(step)
        task.engine.step(task.optimizer)
        for watcher in watchers:
            watcher.after(step)
        yield step


def _gradient(task: Task, number: int, epoch: int, micro_batches: Sequence[Batch], waited_s: float) -> Step:
    settings, engine = task.settings, task.engine
    learning_rate = settings.learning_rate * one_cycle(number - 1, task.total_steps, settings.warmup_fraction)
    for group in task.optimizer.param_groups:
        group["lr"] = learning_rate
    seed_step(settings.seed, number, engine.rank)
    task.optimizer.zero_grad(set_to_none=True)
    losses = []
    for index, batch in enumerate(micro_batches, 1):
        with engine.micro_step(task.model, last=index == len(micro_batches)):
            loss = task.loss_function(task.model, engine.place(batch)) / len(micro_batches)
            engine.backward(loss)
        losses.append(loss.detach())
    norm = engine.clip([p for p in task.model.parameters() if p.requires_grad], settings.clip_norm)
    ending = losses[0].new_full((), task.told_to_end())
    # One transfer from the device; it waits for the gradient, which must be known before the weights move.
    rows = engine.gather(torch.stack((torch.stack(losses).sum(), norm.to(losses[0]), ending))).tolist()
    return Step(
        number=number,
        total=task.total_steps,
        epoch=epoch,
        losses=tuple(row[0] for row in rows),
        grad_norm=rows[0][1],
        learning_rate=learning_rate,
        skipped=engine.skips(rows[0][1]),
        waited_s=waited_s,
        micro_batches=micro_batches,
        ending=any(row[2] for row in rows),
    )


def one_cycle(step: int, total_steps: int, warmup_fraction: float) -> float:
    """Factor on the peak learning rate at ``step``: linear up to 1, then a cosine down to 0 at the end."""
    if step >= total_steps:
        return 0.0
    warmup_steps = max(1, round(total_steps * warmup_fraction))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a step in a process: a run that goes on from a step draws what it would have drawn."""
    mixed = 0
    for part in (seed, step, rank):  # SplitMix64 (Steele, Lea and Flood, 2014)
        mixed = (mixed ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed


def seed_step(seed: int, step: int, rank: int) -> None:
    """Let torch draw what belongs to a step.

    ``torch.manual_seed`` would take 50 times as long: it asks for every kind of device.
    """
    seed = step_seed(seed, step, rank)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed(seed)


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


def adamw(model: nn.Module, settings: TrainSettings, fused: bool = False) -> torch.optim.AdamW:
    """The optimizer; biases and norms are not decayed: that moves the function, not its capacity."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused or None)


class _Hook(Watcher):
    def __init__(self, on_step: StepHook) -> None:
        self._on_step = on_step

    def after(self, step: Step) -> None:
        """Tell the hook."""
        self._on_step(step.number, step.total, step.loss)


def _check_finite(step: Step) -> None:
    for name, value in (("loss", step.loss), ("gradient", step.grad_norm)):
        if not math.isfinite(value):
            raise Diverged(
                f"the {name} became {value} at step {step.number}",
                "training diverged, or the data holds NaN or infinity",
                "lower learning_rate, or check the data",
            )


def _too_few(epoch: int, got: int, expected: int) -> TrainingError:
    if not got:
        return TrainingError(
            f"epoch {epoch + 1} had no batch",
            "the training data is empty or smaller than one batch",
            "give more training data or a smaller batch_size",
        )
    return TrainingError(
        f"epoch {epoch + 1} ended after {got} of {expected} batches",
        "the data gave fewer than it promised",
        "check that nothing changes the data while it is read",
    )
