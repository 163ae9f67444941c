"""Runs a model once and follows the channels of its parameters through every operator.

The operators are those below autograd (ATen), where everything that a model can call is made of a few dozen
kinds. Nothing is compiled or exported: what can run can be followed. An operator without a rule pins the
channels that reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit.pruning.axes import PLAIN, Axes, Axis, Splits, reshape
from edgekit.pruning.labels import FOREIGN, Array, Labels

if TYPE_CHECKING:
    from torch import Tensor, nn

_MOST_RUNS = 6

#: (module, attribute) of a parameter or buffer.
Owner = tuple[str, str]
Rule = Callable[["Tracer", "Call"], Any]


@dataclass(frozen=True)
class Call:
    """One call of an operator: its name, arguments by name, and result."""

    operator: Any
    name: str
    arguments: dict[str, Any]
    result: Any

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in order."""
        return _tensors(self.arguments.values())


@dataclass(frozen=True, eq=False)
class Sighting:
    """An axis of channels that a module's own code met: it may count on the size."""

    size: int
    labels: Array


@dataclass(eq=False)
class Trace:
    """What a run of the model showed.

    Attributes:
        labels: of all channels.
        parameters: (module, attribute) of each parameter and buffer -> labels of its axes.
        shapes: the same keys of each parameter -> shape; of a shared one under its first name only.
        operands: labels of the axes over which, or into which, products ran.
        made: whether a label is of a channel that a layer makes, bool [labels].
        read: whether it is of an index over which a product sums, bool [labels].
        sightings: module -> the axes that its own code reshaped, split or normalized.
    """

    labels: Labels
    parameters: dict[Owner, tuple[Array | None, ...]]
    shapes: dict[Owner, tuple[int, ...]]
    operands: list[Array]
    made: npt.NDArray[np.bool_]
    read: npt.NDArray[np.bool_]
    sightings: dict[str, list[Sighting]]


def _by_tensor() -> MutableMapping[Tensor, Axes]:
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


@dataclass(eq=False)
class Tracer:
    """Knows the axes of every tensor, and ties and pins their labels."""

    labels: Labels
    splits: Splits
    sources: dict[int, Axes]
    path: list[str] = field(default_factory=list)
    operands: list[Array] = field(default_factory=list)
    made: list[Array] = field(default_factory=list)
    read: list[Array] = field(default_factory=list)
    sightings: dict[str, list[Sighting]] = field(default_factory=dict)
    calls: int = 0
    #: Of this run: a model may keep a tensor from one run to the next, and labels are another run's then.
    results: MutableMapping[Tensor, Axes] = field(default_factory=_by_tensor)

    def axes(self, tensor: Tensor) -> Axes:
        """What is known of a tensor's axes."""
        if id(tensor) in self.sources:
            return self.sources[id(tensor)]
        known = self.results.get(tensor)
        if known is None or len(known) != tensor.dim():
            return (PLAIN,) * tensor.dim()
        return known

    def assign(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        """Remember a result's axes; a tensor written in place keeps what it had, tied to the new."""
        if len(axes) != tensor.dim():
            raise ValueError(f"{len(axes)} axes for a tensor of {tensor.dim()}")
        if id(tensor) in self.sources or tensor in self.results:
            before = self.axes(tensor)
            axes = [
                self.tie((old, new), size) for old, new, size in zip(before, axes, tensor.shape, strict=True)
            ]
        self.results[tensor] = tuple(axes)

    def meet(self, axes: Sequence[Axis], size: int) -> Axis:
        """Axes that meet index by index in a sum: what meets constants cannot carry a split's labels."""
        if size > 1 and any(axis.labels is None and not axis.places for axis in axes):
            for axis in axes:
                self.splits.spoils(axis)
        return self.tie(axes, size)

    def tie(self, axes: Sequence[Axis], size: int) -> Axis:
        """Axes of the same size that stand or fall together, index by index."""
        if size == 1:
            return PLAIN
        places = frozenset().union(*(axis.places for axis in axes))
        carriers = [axis.labels for axis in axes if axis.labels is not None]
        plain = [axis for axis in axes if axis.labels is None]
        if not carriers:
            return Axis(None, places)
        for other in carriers[1:]:
            self.labels.tie(carriers[0], other)
        if plain:
            self.pin(Axis(carriers[0]), "it meets values that no layer makes")
        return Axis(carriers[0], places)

    def pin(self, axis: Axis, why: str) -> None:
        """The channels of an axis must stay."""
        if axis.labels is not None:
            self.labels.pin(axis.labels[axis.labels != FOREIGN], f"{why} (in {self.where})")
        self.splits.spoils(axis)

    def contract(self, first: Axis, second: Axis, size: int) -> None:
        """A product sums over these two axes."""
        self.operand(self.tie((first, second), size))
        for axis in (first, second):
            self.splits.spoils(axis)
            if axis.labels is not None:
                self.read.append(axis.labels)

    def operand(self, axis: Axis) -> None:
        """A product runs over this axis: its size decides how fast."""
        if axis.labels is not None:
            self.operands.append(axis.labels)

    def product(self, axis: Axis) -> None:
        """A product or a lookup makes the channels of this axis."""
        self.operand(axis)
        if axis.labels is not None:
            self.made.append(axis.labels)

    def reshape(self, axes: Axes, before: Sequence[int], after: Sequence[int]) -> Axes:
        """The axes of a tensor that is seen in another shape."""
        self.sight(axes, before)
        result = reshape(self.labels, self.splits, self.calls, axes, before, after)
        self.sight(result, after)
        return result

    def sight(self, axes: Axes, shape: Sequence[int]) -> None:
        """The running module's own code met these axes."""
        seen = self.sightings.setdefault(self.where, [])
        seen += [
            Sighting(size, axis.labels)
            for axis, size in zip(axes, shape, strict=True)
            if axis.labels is not None
        ]

    @property
    def where(self) -> str:
        """The innermost module that runs."""
        return self.path[-1] if self.path else ""

    def follow(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Work out the axes of an operator's result."""
        from edgekit.pruning.rules import rule_for

        self.calls += 1
        arguments = {}
        for position, argument in enumerate(operator._schema.arguments):
            if position < len(args):
                arguments[argument.name] = args[position]
            else:
                arguments[argument.name] = kwargs.get(argument.name, argument.default_value)
        call = Call(operator, operator._schema.name.partition("::")[2], arguments, result)
        made = rule_for(operator)(self, call)
        if made is None:
            return
        outputs = _tensors([result])
        for tensor, axes in zip(outputs, made, strict=False):
            if axes is not None:
                self.assign(tensor, axes)


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> Trace:
    """Run the model until its splits are settled, and tell what was seen.

    Raises:
        whatever the model's forward raises.
    """
    splits = Splits()
    for _ in range(_MOST_RUNS):
        splits.begin()
        found = _run(model, example, splits)
        if splits.settle():
            break
    return found


def _run(model: nn.Module, example: tuple[Tensor, ...], splits: Splits) -> Trace:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils._python_dispatch import TorchDispatchMode

    labels = Labels()
    named = _named_tensors(model)
    sources = {}
    for tensor in {id(tensor): tensor for tensor in named.values()}.values():
        parameter = isinstance(tensor, torch.nn.Parameter)
        sources[id(tensor)] = tuple(
            Axis(labels.fresh(size)) if size > 1 and (parameter or tensor.is_floating_point()) else PLAIN
            for size in tensor.shape
        )
    tracer = Tracer(labels, splits, dict(sources))

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            tracer.follow(func, args, kwargs or {}, result)
            return result

    with torch.no_grad(), entered(model, tracer.path), sdpa_kernel(SDPBackend.MATH), Mode():  # type: ignore[no-untyped-call]
        outputs = tensors_in(model(*example))
        for tensor in outputs:
            for axis in tracer.axes(tensor):
                if axis.labels is not None:
                    labels.pin(axis.labels[axis.labels != FOREIGN], "it is an output of the model")
    parameters = {name: tuple(axis.labels for axis in sources[id(tensor)]) for name, tensor in named.items()}
    first = {id(tensor): name for name, tensor in reversed(named.items())}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in named.items()
        if isinstance(tensor, torch.nn.Parameter) and first[id(tensor)] == name
    }
    made, read = _marked(len(labels), tracer.made), _marked(len(labels), tracer.read)
    return Trace(labels, parameters, shapes, tracer.operands, made, read, tracer.sightings)


def _marked(count: int, arrays: Sequence[Array]) -> npt.NDArray[np.bool_]:
    marked = np.zeros(count, bool)
    for labels in arrays:
        marked[labels] = True
    return marked


def _named_tensors(model: nn.Module) -> dict[Owner, Tensor]:
    """Parameters and buffers by (module, attribute), shared ones under each of their names."""
    named: dict[Owner, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for slot in (module._parameters, module._buffers):
            named.update({(path, key): tensor for key, tensor in slot.items() if tensor is not None})
    return named


@contextmanager
def entered(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the names of the running modules in ``path``; after an exception they stay there."""

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        path.pop()

    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _m, _i, name=name: path.append(name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tensors_in(result: Any) -> list[Tensor]:
    """All tensors in a model's answer, nested in sequences and mappings."""
    import torch

    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, (str, bytes)) or result is None:
        return []
    if isinstance(result, dict) or hasattr(result, "values"):
        result = list(result.values())
    if isinstance(result, (list, tuple)):
        return [tensor for item in result for tensor in tensors_in(item)]
    return []


def _tensors(values: Any) -> list[Tensor]:
    import torch

    found: list[Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
