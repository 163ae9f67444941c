"""Finds the groups of a model, and proves on a copy that they can be removed.

Code may count on a size in ways that no operator shows. So all groups are cut at once on a copy, and the copy
is run. Where it stops, the module that stopped is repaired, and all modules of its class with it: its numbers
are corrected; then axes of one size that it met are tied, since its code may take them for the same; and if
neither helps, the channels that it met are pinned, with the error as the reason.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from edgekit import interrupt
from edgekit.errors import BadInput
from edgekit.pruning.cutting import cut
from edgekit.pruning.structure import Structure, build
from edgekit.pruning.trace import Sighting, Trace, entered, tensors_in, trace

if TYPE_CHECKING:
    from torch import Tensor, nn

_MOST_REPAIRS = 30


def examine(model: nn.Module, example: tuple[Tensor, ...]) -> Structure:
    """The groups of a model.

    Args:
        model: in eval mode, on the CPU; it is run, and left as it was.
        example: inputs, of a batch of at least two.

    Raises:
        BadInput: the model does not run, or no group of it can be removed.
    """
    try:
        found = trace(model, example)
    except Exception as error:  # whatever the model's forward raises
        interrupt.check()
        raise cannot_prune(f"its channels cannot be followed: {first_line(error)}") from error
    want = _shapes(model, example)
    renumbered: frozenset[str] = frozenset()
    tied: set[str] = set()
    for _ in range(_MOST_REPAIRS):
        structure = build(found, renumbered)
        if not structure.prunable:
            raise cannot_prune(_why_nothing(structure))
        stopped, why = _trial(model, structure, example, want)
        if why is None:
            return structure
        renumbered = _repair(model, found, renumbered, tied, stopped, why)
    raise cannot_prune(f"it still stops after {_MOST_REPAIRS} repairs: {why}")


def _trial(
    model: nn.Module, structure: Structure, example: tuple[Tensor, ...], want: list[tuple[int, ...]]
) -> tuple[list[str], str | None]:
    """Cut every group, each by another share: the modules that ran when the copy stopped, and why."""
    path: list[str] = []
    rng = np.random.default_rng(0)
    widths = {group.name: max(1, int(group.width * rng.uniform(0.3, 0.9))) for group in structure.prunable}
    scores = {group.name: np.arange(group.width, dtype=np.float64) for group in structure.prunable}
    pruned = cut(model, structure, widths, scores)
    try:
        with entered(pruned, path):
            got = _shapes(pruned, example)
    except Exception as error:  # whatever the cut model's forward raises
        interrupt.check()
        return path, first_line(error)
    if got != want:
        return [""], "the shape of the outputs changes"
    return [], None


def _repair(
    model: nn.Module, found: Trace, renumbered: frozenset[str], tied: set[str], stopped: list[str], why: str
) -> frozenset[str]:
    """Correct more numbers of the modules of the class that stopped, else tie, else pin what they met."""
    modules = dict(model.named_modules())
    path = [name for name in stopped if not _is_torch_layer(modules[name])] or [""]
    for name in reversed(path):
        alike = {other for other, module in modules.items() if type(module) is type(modules[name])}
        if not alike <= renumbered and any(found.sightings.get(other) for other in alike):
            return renumbered | alike
        if not alike <= tied:
            tied |= alike
            changed = [_tie(found, other) for other in sorted(alike)]
            if any(changed):
                return renumbered
        if _pin(found, modules, alike, f"{type(modules[name]).__name__} needs its size: {why}"):
            return renumbered
    raise cannot_prune(why)


def _tie(found: Trace, name: str) -> bool:
    """Tie the axes of one size that a module met, index by index; whether any were apart."""
    apart = False
    by_size: dict[int, list[Sighting]] = {}
    for seen in found.sightings.get(name, ()):
        by_size.setdefault(seen.size, []).append(seen)
    for first, *others in by_size.values():
        for other in others:
            if not np.array_equal(found.labels.roots(first.labels), found.labels.roots(other.labels)):
                found.labels.tie(first.labels, other.labels)
                apart = True
    return apart


def _pin(found: Trace, modules: dict[str, nn.Module], names: set[str], why: str) -> bool:
    """Pin the channels that these modules met, else those of all their layers; whether any was free."""
    met = [seen.labels for name in names for seen in found.sightings.get(name, ())]
    below = [
        axis
        for (path, _), of in found.parameters.items()
        if any(path == name or not name or path.startswith(f"{name}.") for name in names)
        for axis in of
        if axis is not None
    ]
    for candidates in (met, below):
        if not candidates:
            continue
        labels = np.unique(np.concatenate(candidates))
        pins, _ = found.labels.pinned()
        free = labels[(pins[labels] == 0) & (labels != 0)]
        if len(free):
            found.labels.pin(free, why)
            return True
    return False


def _is_torch_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _shapes(model: nn.Module, example: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    import torch

    with torch.no_grad():
        return [tuple(tensor.shape) for tensor in tensors_in(model(*example))]


def _why_nothing(structure: Structure) -> str:
    reasons = dict.fromkeys(f"{group.name}: {group.why}" for group in structure.groups)
    return "none of its layers may lose a channel" + (f" ({next(iter(reasons))})" if reasons else "")


def cannot_prune(why: str) -> BadInput:
    """The error for a model that no group can be removed from."""
    return BadInput("this model cannot be pruned", why, "use --size 1 to quantize it without pruning")


def first_line(error: Exception) -> str:
    """An exception in one line of at most 200 characters."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}"[:200]
