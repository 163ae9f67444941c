"""What made a step explode: it is computed again, micro-batch by micro-batch, and watched layer by layer.

The weights have not moved and the step's random numbers are drawn again, so that it is the same computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from host_trainer.loop import Step, Task, seed_step


@dataclass(frozen=True)
class Cause:
    """Where it began.

    Attributes:
        layer: name of a module, a parameter or an input.
        quantity: ``input``, ``output``, ``loss`` or ``gradient``: what of it is wrong.
        value: NaN, infinity, or the norm of that layer's gradient.
        micro_batch: which of the process's micro-batches, from 0.
        rank: the process.
    """

    layer: str
    quantity: str
    value: float
    micro_batch: int
    rank: int

    def __str__(self) -> str:
        if self.quantity == "loss":
            what = f"the loss is {self.value}"
        elif self.quantity == "input":
            what = f"the input '{self.layer}' holds {self.value}"
        elif self.quantity == "gradient" and math.isfinite(self.value):
            what = f"the gradient of '{self.layer}' is the largest, {self.value:.3g}"
        else:
            what = f"the {self.quantity} of '{self.layer}' becomes {self.value}"
        return f"{what}, in micro-batch {self.micro_batch} of process {self.rank}"


def find(task: Task, step: Step) -> Cause:
    """Compute ``step`` again and say where it goes wrong; every process takes part and hears the same.

    What comes first in the computation is the cause: an input, else a layer's output, else the loss, else a
    gradient; among finite gradients, the largest.
    """
    seed_step(task.settings.seed, step.number, task.engine.rank)
    mine = max((_examine(task, index, batch) for index, batch in enumerate(step.micro_batches)), key=_rank)
    return max(_all(mine), key=_rank)


_ORDER = ("gradient", "loss", "output", "input")


def _rank(cause: Cause) -> tuple[bool, int, float]:
    finite = math.isfinite(cause.value)
    return not finite, 0 if finite else _ORDER.index(cause.quantity), cause.value if finite else 0.0


def _examine(task: Task, index: int, batch: Any) -> Cause:
    engine = task.engine
    task.optimizer.zero_grad(set_to_none=True)
    found: list[tuple[str, str, float]] = []
    placed = engine.place(batch)
    if isinstance(placed, Mapping):
        found += [(name, "input", bad) for name, value in placed.items() if (bad := _bad(value)) is not None]
    # Everything is computed even where the cause is known: other processes may wait for this one's part.
    with engine.micro_step(task.model, last=engine.world == 1 or _sharded(task.model)):
        with _outputs_watched(task.model, found):
            loss = task.loss_function(task.model, placed)
        if (bad := _bad(loss)) is not None:
            found.append(("loss", "loss", bad))
        # Not the engine's, which scales fp16's: the largest gradient is told.
        loss.backward()  # type: ignore[no-untyped-call]
    found += _worst_gradient(task.model)
    layer, quantity, value = found[0] if found else ("the model", "gradient", 0.0)
    return Cause(layer, quantity, value, index, engine.rank)


@contextmanager
def _outputs_watched(model: nn.Module, found: list[tuple[str, str, float]]) -> Iterator[None]:
    """Note the first layer whose output is no number."""
    noted: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not noted and isinstance(output, Tensor) and (bad := _bad(output)) is not None:
                noted.append(name)
                found.append((name, "output", bad))

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if next(m.children(), None) is None]
    handles = [module.register_forward_hook(watch(_plain(name))) for name, module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _worst_gradient(model: nn.Module) -> list[tuple[str, str, float]]:
    """The last parameter whose gradient is no number (NaN travels backward from there), else the largest."""
    norms = [
        (_plain(name), float(_whole(parameter.grad.detach().float().norm())))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]
    broken = [(name, "gradient", norm) for name, norm in norms if not math.isfinite(norm)]
    if broken:
        return broken[-1:]
    return [(name, "gradient", norm) for name, norm in sorted(norms, key=lambda pair: pair[1])[-1:]]


def _bad(value: Any) -> float | None:
    """A value that is no number, if the tensor holds one."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    wrong = value.detach()[~torch.isfinite(value.detach())]
    return float(wrong.flatten()[0]) if wrong.numel() else None


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _sharded(model: nn.Module) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


def _plain(name: str) -> str:
    return name.removeprefix("module.")


def _all(cause: Cause) -> list[Cause]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [cause]
    causes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(causes, cause)
    return causes
