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
    error = _relative_error(student, teacher)
    if student.ndim != 2 or student.shape[1] == 1:
        return error
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2 + error


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher) / teacher.var(unbiased=False).clamp_min(1e-6)


def features(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Squared error between activations, relative to the teacher's variance (Romero et al., "FitNets", 2015).

    Args:
        student: activations, projected to the teacher's width where it differs.
        teacher: activations of the same shapes.

    Returns:
        A scalar, the mean over layers.
    """
    return torch.stack([_relative_error(s, t) for s, t in zip(student, teacher, strict=True)]).mean()


def attention(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Kullback-Leibler divergence between what attention looks at (after Wang et al., "MiniLM", 2020).

    Args:
        student: probabilities of each layer, (batch, heads, queries, keys); the mean over heads counts.
        teacher: likewise, of any number of heads.

    Returns:
        A scalar, the mean over layers, samples and queries.
    """
    terms = []
    for mine, theirs in zip(student, teacher, strict=True):
        mean, target = mine.mean(dim=1).clamp_min(1e-9), theirs.mean(dim=1).clamp_min(1e-9)
        terms.append((target * (target.log() - mean.log())).sum(dim=-1).mean())
    return torch.stack(terms).mean()


def energy(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """How differently activations are spread over the places of the input, whatever the widths are.

    The energy at each place, scaled to length 1: squared error (Zagoruyko and Komodakis, "Paying More
    Attention to Attention", 2017).

    Args:
        student: activations, (batch, channels, height, width) or (batch, tokens, channels).
        teacher: of the same places, and any number of channels.

    Returns:
        A scalar, the mean over layers and samples.
    """
    terms = [
        (_energy(mine) - _energy(theirs)).square().sum(dim=1).mean()
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def _energy(activation: Tensor) -> Tensor:
    """(batch, places), each row of length 1."""
    channels = 1 if activation.ndim == 4 else -1
    return F.normalize(activation.square().mean(dim=channels).flatten(1), dim=1)
