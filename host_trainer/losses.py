"""Losses that the loop can minimize, beyond those that torch has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """How far a student's outputs are from its teacher's; labels are not needed.

    Two-dimensional outputs with more than one column are taken for logits: the Kullback-Leibler divergence of
    the softened distributions, times the temperature squared so that its gradient keeps its size (Hinton,
    Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015), plus the squared error of the
    logits, relative to their variance, which also carries their scale. Other outputs get the relative
    squared error alone.

    Args:
        student: outputs, batch first.
        teacher: outputs of the same shapes.
        temperature: softens both distributions; above 0.

    Returns:
        A scalar, the mean over outputs.
    """
    terms = [_one(s, t, temperature) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(terms).mean()


def _one(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    error = F.mse_loss(student, teacher) / teacher.var(unbiased=False).clamp_min(1e-6)
    if student.ndim != 2 or student.shape[1] == 1:
        return error
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2 + error
