"""Small helpers on torch modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def output_tensors(result: Any) -> list[Tensor]:
    """The tensors in a module's result: a tensor, or a sequence or mapping that holds tensors."""
    import torch

    if isinstance(result, torch.Tensor):
        return [result]
    items = result.values() if isinstance(result, Mapping) else result
    return [item for item in items if isinstance(item, torch.Tensor)]


def forward(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Run without gradients."""
    import torch

    with torch.no_grad():
        return output_tensors(module(*inputs))


def parameter_count(module: nn.Module) -> int:
    """Number of trainable numbers; a shared parameter counts once."""
    return sum(parameter.numel() for parameter in module.parameters())
