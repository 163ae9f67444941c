"""Training through 8-bit rounding, so that a model learns to live with it.

While a block of code runs, weights of convolutions and products are rounded to 8 bits for each output
channel, and what they are given to 8 bits for the whole tensor; the gradient passes straight through (Jacob
et al., "Quantization and Training", CVPR 2018). What is left afterwards is a float model that a calibrated
quantizer does less harm to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LEAST = 1e-8


class _RoundedWeight(nn.Module):
    """Symmetric, one scale for each output channel."""

    def forward(self, weight: Tensor) -> Tensor:
        largest = weight.detach().abs().amax(dim=tuple(range(1, weight.ndim))).clamp_min(_LEAST)
        zeros = torch.zeros_like(largest, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, largest / 127, zeros, 0, -127, 127)


@contextmanager
def rounded(model: nn.Module) -> Iterator[int]:
    """Round within the block; afterwards the model's weights are its own floats again.

    Yields:
        The number of layers that round.
    """
    layers = [module for module in model.modules() if isinstance(module, _KINDS)]
    hooks = []
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _RoundedWeight())
        hooks.append(layer.register_forward_pre_hook(_round_input))
    try:
        yield len(layers)
    finally:
        for layer, hook in zip(layers, hooks, strict=True):
            hook.remove()
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _round_input(_layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    given = inputs[0]
    if not given.is_floating_point():
        return inputs
    low = given.detach().amin().clamp_max(0.0)
    high = given.detach().amax().clamp_min(0.0)
    scale = ((high - low) / 255).clamp_min(_LEAST)
    zero = torch.round(-low / scale).clamp(0, 255).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(given, scale, zero, 0, 255), *inputs[1:]
