"""What differs between one process and many, and between precisions; the loop sees only this."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """How a step is computed. ``rank`` of ``world`` processes, each with its share of the batch."""

    rank: int
    world: int

    def place(self, batch: Any) -> Any:
        """Bring a batch to the device."""

    def micro_step(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Surround the forward and backward pass of a micro-batch; gradients are exchanged in the last."""

    def backward(self, loss: Tensor) -> None:
        """Compute gradients and add them up."""

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scale the gradient down to ``max_norm``; gives its norm before that, the same in each process."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the weights."""

    def skips(self, grad_norm: float) -> bool:
        """Whether ``step`` will leave the weights as they are: fp16 is looking for its loss scale."""

    def gather(self, values: Tensor) -> Tensor:
        """One row of ``values`` for each process."""


class Local:
    """One process, in the precision that the model has."""

    rank = 0
    world = 1

    def place(self, batch: Any) -> Any:
        """The batch is where it should be."""
        return batch

    def micro_step(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Nothing to prepare."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Clip by the global norm."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the weights."""
        optimizer.step()

    def skips(self, grad_norm: float) -> bool:
        """Without a loss scale no step is skipped."""
        return False

    def gather(self, values: Tensor) -> Tensor:
        """The one row."""
        return values[None]
