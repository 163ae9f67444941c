"""Removes slots from a copy of a model: slices its parameters and corrects the numbers of its modules."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit.pruning.labels import Array
from edgekit.pruning.structure import Scores, Structure

if TYPE_CHECKING:
    from torch import Tensor, nn


def cut(model: nn.Module, structure: Structure, widths: Mapping[str, int], scores: Scores) -> nn.Module:
    """A copy of the model whose groups keep so many slots, the most important ones.

    Args:
        model: the model that was examined.
        structure: its groups.
        widths: group -> slots to keep; groups that are left out keep all.
        scores: group -> importance of its slots; needed of the groups that lose some.

    Raises:
        ValueError: a width is out of range, or the group may lose nothing.
    """
    gone = _gone(structure, widths, scores)
    if not gone:
        return copy.deepcopy(model)
    stays = np.ones(structure.labels, bool)
    stays[np.concatenate(gone)] = False
    pruned = copy.deepcopy(model)
    modules = dict(pruned.named_modules(remove_duplicate=False))
    changes = _slice(modules, structure, stays)
    for name, module in modules.items():
        own = changes.get(name, {})
        met = {
            seen.size: int(stays[seen.slots].sum())
            for seen in structure.sightings.get(name, ())
            if not stays[seen.slots].all()
        }
        _renumber(module, own, met, eager=name in structure.renumbered)
    return pruned


def _gone(structure: Structure, widths: Mapping[str, int], scores: Scores) -> list[Array]:
    gone = []
    for name, width in widths.items():
        group = next((group for group in structure.groups if group.name == name), None)
        if group is None:
            raise ValueError(f"there is no group {name!r}")
        if not 0 < width <= group.width or (width < group.width and not group.prunable):
            raise ValueError(
                f"{name} cannot keep {width} of {group.width} slots: {group.why or 'out of range'}"
            )
        if width < group.width:
            order = np.argsort(scores[name], kind="stable")
            gone.append(structure.slots[name][order[: group.width - width]])
    return gone


def _slice(
    modules: Mapping[str, nn.Module], structure: Structure, stays: npt.NDArray[np.bool_]
) -> dict[str, dict[int, int]]:
    """Slice parameters and buffers; module -> size of an axis before -> after, where it is unambiguous."""
    import torch

    done: dict[int, Tensor] = {}
    changes: dict[str, dict[int, set[int]]] = {}
    for (path, attribute), of in structure.axes.items():
        module = modules[path]
        tensor = getattr(module, attribute)
        kept = [None if axis is None else np.flatnonzero(stays[axis]) for axis in of]
        for size, indices in zip(tensor.shape, kept, strict=True):
            after = size if indices is None else len(indices)
            changes.setdefault(path, {}).setdefault(size, set()).add(after)
        if id(tensor) not in done:
            sliced = tensor.detach()
            for number, indices in enumerate(kept):
                if indices is not None and len(indices) < tensor.shape[number]:
                    sliced = sliced.index_select(number, torch.from_numpy(indices))
            if isinstance(tensor, torch.nn.Parameter):
                done[id(tensor)] = torch.nn.Parameter(sliced.clone(), requires_grad=tensor.requires_grad)
            else:
                done[id(tensor)] = sliced.clone()
        slot: Any = module._parameters if attribute in module._parameters else module._buffers
        slot[attribute] = done[id(tensor)]
    return {
        path: {size: after.copy().pop() for size, after in sizes.items() if len(after) == 1}
        for path, sizes in changes.items()
    }


def _renumber(module: nn.Module, own: Mapping[int, int], met: Mapping[int, int], *, eager: bool) -> None:
    """Set the numbers that describe a module.

    Args:
        module: to be changed.
        own: sizes of its parameters' axes, before -> after.
        met: sizes of the axes that its code met and that were cut, before -> after.
        eager: whether every number follows ``met``, and not those alone that count heads.
    """
    import torch

    weight = module._parameters.get("weight")
    if isinstance(module, torch.nn.modules.conv._ConvNd) and weight is not None:
        _renumber_convolution(module, weight)
        return
    if isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = (int(size) for size in module.weight.shape)
        return
    leaf = next(module.children(), None) is None
    for key, value in _numbers(module):
        changed = own if leaf and own else met
        if isinstance(value, tuple):
            if leaf and all(item in changed for item in value):
                setattr(module, key, tuple(changed[item] for item in value))
        elif value in own and leaf:
            setattr(module, key, own[value])
        elif value in met and (eager or _counts_heads(key) or _normalizes(module, key)):
            setattr(module, key, met[value])


def _renumber_convolution(module: Any, weight: Tensor) -> None:
    outputs, inputs = (int(size) for size in weight.shape[:2])
    if module.transposed:
        inputs, outputs = outputs, inputs
    depthwise = module.groups > 1 and (
        module.in_channels == module.groups or module.out_channels == module.groups
    )
    if depthwise and not module.transposed:
        module.groups = outputs // (module.out_channels // module.groups)
    elif depthwise:
        module.groups = inputs // (module.in_channels // module.groups)
    if module.transposed:
        module.in_channels, module.out_channels = inputs, outputs * module.groups
    else:
        module.in_channels, module.out_channels = inputs * module.groups, outputs


def _counts_heads(key: str) -> bool:
    """Whether a number counts heads, or the channels of all heads, and not those of one."""
    key = key.lower()
    return "head" in key and ("all_head" in key or not any(word in key for word in ("dim", "size", "width")))


def _normalizes(module: nn.Module, key: str) -> bool:
    return key in ("num_features", "num_channels", "normalized_shape")


def _numbers(module: nn.Module) -> Iterable[tuple[str, int | tuple[int, ...]]]:
    for key, value in list(vars(module).items()):
        if key.startswith("_") or key == "training" or isinstance(value, bool):
            continue
        if isinstance(value, int):
            yield key, value
        elif isinstance(value, (tuple, list)) and value and all(type(item) is int for item in value):
            yield key, tuple(value)
