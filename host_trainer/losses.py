"""Losses that the loop can minimize, beyond those that torch has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation(
    student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float, mask: Tensor | None = None
) -> Tensor:
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
        mask: (batch, tokens), 0 where there is only padding, which does not count; None: there is none.

    Returns:
        A scalar, the mean over outputs.
    """
    terms = [_one(s, t, temperature, mask) for s, t in zip(student, teacher, strict=True)]
    return torch.stack(terms).mean()


def _one(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    error = _relative_error(_kept(student, mask), _kept(teacher, mask))
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


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of (batch, tokens, width) that are no padding; values of another shape as they are."""
    if mask is None or values.ndim != 3 or values.shape[:2] != mask.shape:
        return values
    return values[mask.bool()]


def features(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Squared error between activations, relative to the teacher's variance (Romero et al., "FitNets", 2015).

    Args:
        student: activations, projected to the teacher's width where it differs.
        teacher: activations of the same shapes.
        mask: as for ``distillation``.

    Returns:
        A scalar, the mean over layers.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([_relative_error(_kept(s, mask), _kept(t, mask)) for s, t in pairs]).mean()


def attention(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence between what attention looks at (after Wang et al., "MiniLM", 2020).

    Args:
        student: probabilities of each layer, (batch, heads, queries, keys); the mean over heads counts.
        teacher: likewise, of any number of heads.
        mask: as for ``distillation``, of the queries.

    Returns:
        A scalar, the mean over layers, samples and queries.
    """
    terms = []
    for mine, theirs in zip(student, teacher, strict=True):
        mean, target = (_kept(each.mean(dim=1), mask).clamp_min(1e-9) for each in (mine, theirs))
        terms.append((target * (target.log() - mean.log())).sum(dim=-1).mean())
    return torch.stack(terms).mean()


def energy(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """How differently activations are spread over the places of the input, whatever the widths are.

    The energy at each place, scaled to length 1: squared error (Zagoruyko and Komodakis, "Paying More
    Attention to Attention", 2017).

    Args:
        student: activations, (batch, channels, height, width) or (batch, tokens, channels).
        teacher: of the same places, and any number of channels.
        mask: as for ``distillation``.

    Returns:
        A scalar, the mean over layers and samples.
    """
    terms = [
        (_energy(mine, mask) - _energy(theirs, mask)).square().sum(dim=1).mean()
        for mine, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(terms).mean()


def _energy(activation: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, places), each row of length 1."""
    channels = 1 if activation.ndim == 4 else -1
    energy = activation.square().mean(dim=channels).flatten(1)
    if mask is not None and energy.shape == mask.shape:
        energy = energy * mask
    return F.normalize(energy, dim=1)
