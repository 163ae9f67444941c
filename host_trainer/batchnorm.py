"""BatchNorm's statistics: estimated again after the weights below them changed, or left as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def recalibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> int:
    """Estimate every BatchNorm's mean and variance again as the plain average over ``batches``.

    Pruning removes channels whose contribution the old statistics still hold; a few batches forward, without
    gradients, repair that (Li et al., "EagleEye", ECCV 2020).

    Args:
        model: changed in place, left in eval mode.
        batches: batches of inputs.
        forward: runs the model on a batch.

    Returns:
        The number of BatchNorm layers; 0 means that nothing was done.
    """
    layers = [
        module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not layers:
        return 0
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average
    model.eval()
    for layer in layers:
        layer.train()
    with torch.no_grad():
        for batch in batches:
            forward(model, batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
    return len(layers)


def freeze(model: nn.Module) -> None:
    """Let every BatchNorm normalize by the statistics that it has, in training too, and leave them alone."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
            module.register_forward_pre_hook(_back_to_eval)


def _back_to_eval(module: nn.Module, inputs: Any) -> None:
    """``train()`` of the model reaches its parts."""
    module.training = False
