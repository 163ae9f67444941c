"""How much each slot matters: from the weights alone, or from gradients on calibration data.

Every score is of a whole slot, over all that leaves with it, and is divided by the mean of its group, so that
slots of different groups can be ranked together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from edgekit.pruning.structure import Scores, Structure
from edgekit.pruning.trace import Owner, tensors_in

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

Importance = Literal["magnitude", "taylor", "hessian", "activation", "activation2", "random"]
Sample = tuple["Tensor", ...]


def scores(
    model: nn.Module, structure: Structure, importance: Importance, samples: Iterable[Sample], seed: int
) -> Scores:
    """The importance of every slot that may be removed.

    - ``magnitude``: sum of the squared weights (Li et al., "Pruning Filters", ICLR 2017, over the whole
      slot).
    - ``taylor``: first-order change of the outputs when the slot's weights go to zero, its mean square over
      samples (Molchanov et al., CVPR 2019).
    - ``hessian``: the same from the diagonal of the Gauss-Newton matrix alone, weight by weight (LeCun et
      al., "Optimal Brain Damage", 1990).
    - ``activation``, ``activation2``: mean absolute value, and mean square, of activation times gradient of
      the slot's channels where they are read (Molchanov et al., ICLR 2017; Theis et al., 2018).
    - ``random``: a control.

    The gradients are of a random projection of all outputs, drawn anew for each sample (Hutchinson), so
    labels are not needed, and what is estimated is the change of the outputs themselves.

    Args:
        model: the model that was examined.
        structure: its groups.
        importance: which of the above.
        samples: inputs of the model, each a batch (one sample each is best); not used by ``magnitude`` and
            ``random``.
        seed: of what is drawn.

    Returns:
        Group -> importance of its slots, float [width], of mean 1.

    Raises:
        ValueError: gradients are asked for and there are no samples.
    """
    rng = np.random.default_rng(seed)
    if importance == "random":
        return {group.name: rng.random(group.width) for group in structure.prunable}
    if importance == "magnitude":
        raw = _summed(structure, lambda owner: None, _squares(model, structure))
    else:
        raw = _from_gradients(model, structure, importance, samples, seed)
    return {name: _of_mean_one(values) for name, values in raw.items()}


Values = Mapping[Owner, "Tensor"]


def _squares(model: nn.Module, structure: Structure) -> Values:
    named = _parameters(model, structure)
    return {owner: tensor.detach().double().square() for owner, tensor in named.items()}


def _parameters(model: nn.Module, structure: Structure) -> Values:
    modules = dict(model.named_modules(remove_duplicate=False))
    return {owner: getattr(modules[owner[0]], owner[1]) for owner in structure.shapes}


def _summed(
    structure: Structure, axes_of: Callable[[Owner], set[int] | None], values: Values
) -> dict[str, npt.NDArray[np.float64]]:
    """Sum the values of all that each slot has on some axes (None: all) of the parameters."""
    total = np.zeros(structure.labels)
    for owner, value in values.items():
        chosen = axes_of(owner)
        for number, axis in enumerate(structure.axes[owner]):
            if (
                axis is None
                or not structure.shares[owner][number]
                or (chosen is not None and number not in chosen)
            ):
                continue
            others = [i for i in range(value.dim()) if i != number]
            along = value.sum(dim=others) if others else value
            np.add.at(total, axis, along.double().numpy())
    return {name: total[slots] for name, slots in structure.slots.items()}


def _from_gradients(
    model: nn.Module, structure: Structure, importance: Importance, samples: Iterable[Sample], seed: int
) -> dict[str, npt.NDArray[np.float64]]:
    import torch

    named = _parameters(model, structure)
    total = {name: np.zeros(len(slots)) for name, slots in structure.slots.items()}
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for sample in samples:
        gradients = _projected_gradients(model, named, sample, generator)
        count += 1
        products = {owner: (named[owner].detach() * gradient) for owner, gradient in gradients.items()}
        if importance == "hessian":
            squared = {owner: product.square() for owner, product in products.items()}
            found = _summed(structure, lambda owner: None, squared)
        elif importance == "taylor":
            found = {k: v**2 for k, v in _summed(structure, lambda owner: None, products).items()}
        else:
            by_channel = _summed(structure, lambda owner: set(structure.reads[owner]), products)
            power = 1 if importance == "activation" else 2
            found = {k: np.abs(v) ** power for k, v in by_channel.items()}
        for name, values in found.items():
            total[name] += values
    if not count:
        raise ValueError(f"{importance} needs samples")
    return {name: values / count for name, values in total.items()}


def _projected_gradients(
    model: nn.Module, named: Values, sample: Sample, generator: Generator
) -> dict[Owner, Tensor]:
    """Gradients of the outputs' product with random signs, for the parameters that have one."""
    import torch

    wanted = [(owner, tensor) for owner, tensor in named.items() if tensor.is_floating_point()]
    trained = [tensor.requires_grad for _, tensor in wanted]
    try:
        for _, tensor in wanted:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            outputs = [tensor for tensor in tensors_in(model(*sample)) if tensor.grad_fn is not None]
            signs = [torch.randint(0, 2, t.shape, generator=generator).to(t) * 2 - 1 for t in outputs]
            projected = sum(((t * s).sum() / t.numel() ** 0.5 for t, s in zip(outputs, signs, strict=True)))
            gradients = torch.autograd.grad(projected, [t for _, t in wanted], allow_unused=True)
    finally:
        for (_, tensor), before in zip(wanted, trained, strict=True):
            tensor.requires_grad_(before)
    return {
        owner: gradient
        for (owner, _), gradient in zip(wanted, gradients, strict=True)
        if gradient is not None
    }


def _of_mean_one(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)
