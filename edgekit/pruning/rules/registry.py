"""The rules of operators by name, and what many of them need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgekit.pruning.axes import PLAIN, Axes
from edgekit.pruning.trace import Call, Rule, Tracer

if TYPE_CHECKING:
    from torch import Tensor

_RULES: dict[str, Rule] = {}


def rule_for(operator: Any) -> Rule:
    """The rule of an ATen operator."""
    import torch

    short = operator._schema.name.rpartition("::")[2]
    otherwise = pointwise if torch.Tag.pointwise in operator.tags else unknown
    return _RULES.get(short) or _RULES.get(short.removesuffix("_")) or otherwise


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Make a function the rule of the operators of these names."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def wrap(axis: int, dims: int) -> int:
    """An axis counted from the front."""
    return axis + dims if axis < 0 else axis


def axis_list(value: Any, dims: int) -> list[int]:
    """Axes given as one number, several, or none for all."""
    if value is None or value == []:
        return list(range(dims))
    if isinstance(value, int):
        value = [value]
    return [wrap(axis, dims) for axis in value]


def pointwise(tracer: Tracer, call: Call) -> Any:
    """The rule of operators that work element by element."""
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    axes = broadcast(tracer, [t for t in call.tensors() if t.dim()], results[0].shape)
    return [axes] * len(results)


def broadcast(tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int]) -> Axes:
    """The axes of a result of this shape in which the tensors meet, aligned at their last axes."""
    known = [(tracer.axes(tensor), tensor.shape) for tensor in tensors]
    made = []
    for back in range(1, len(shape) + 1):
        meeting = [axes[-back] for axes, size in known if len(size) >= back and size[-back] == shape[-back]]
        made.append(tracer.meet(meeting, shape[-back]) if meeting else PLAIN)
    return tuple(reversed(made))


def unknown(tracer: Tracer, call: Call) -> Any:
    """No rule: whatever reaches this operator must stay as it is."""
    for tensor in call.tensors():
        for axis in tracer.axes(tensor):
            tracer.pin(axis, f"no rule for the operator {call.name}")
    return None
