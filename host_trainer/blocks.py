"""The repeated parts of a network: what is recomputed or sharded as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
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
        norms = [module for module in block.modules() if isinstance(module, _BatchNorm)]
        # torch.compile takes no contexts, so only those blocks have them that need them.
        options: dict[str, Any] = {"context_fn": partial(_contexts, norms)} if norms else {}
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    return len(found)


def _contexts(norms: list[_BatchNorm]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first computation and for the second."""
    return nullcontext(), _statistics_kept(norms)


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """The batch has been counted in the running statistics."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
