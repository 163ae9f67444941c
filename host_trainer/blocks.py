"""The repeated parts of a network: what is recomputed or sharded as one."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

#: A block with a larger share of the parameters is looked into.
_LARGEST_FRACTION = 1 / 8


def blocks(model: nn.Module) -> list[nn.Module]:
    """Elements of lists and sequences that have layers of their own, such as a transformer's layers.

    Where an element holds much of the model (a stage of a convolutional network), its own elements are taken.
    """
    limit = _LARGEST_FRACTION * sum(parameter.numel() for parameter in model.parameters())
    return _blocks(model, limit)


def _blocks(module: nn.Module, limit: float) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        in_list = (
            isinstance(module, nn.ModuleList | nn.Sequential) and next(child.children(), None) is not None
        )
        if not in_list:
            found += _blocks(child, limit)
        elif sum(parameter.numel() for parameter in child.parameters()) > limit:
            found += _blocks(child, limit) or [child]
        else:
            found.append(child)
    return found


def recompute(model: nn.Module) -> int:
    """Let each block keep its inputs only, and compute its activations again in the backward pass.

    Chen et al., "Training deep nets with sublinear memory cost", 2016. Names of parameters stay as they are.

    Returns:
        The number of blocks; 0: nothing was found to recompute.
    """
    found = blocks(model)
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(found)
