"""Structured pruning to a share of the parameters, in widths that the device likes.

Channels are grouped by dependency (torch-pruning; Fang et al., "DepGraph: Towards Any Structural Pruning",
CVPR 2023), ranked over the whole network by the norm of their group, and removed until the model has at most
the asked share of its parameters. The share of channels that gives that share of parameters is found by
bisection, each trial on a fresh copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edgekit import surgery
from edgekit.errors import BadInput
from edgekit.modules import forward, output_tensors, parameter_count
from edgekit.profile import Profile
from edgekit.recipe import Prune
from edgekit.stages.registry import Inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

_BISECTION_STEPS = 9


class Config(BaseModel):
    """Settings of this stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prune: Prune
    size: float
    seed: int


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Prune the model and write its structure and weights.

    Raises:
        BadInput: the model cannot be pruned.
    """
    import torch

    model = inputs.sources.model
    original = model.module()
    example = tuple(torch.from_numpy(array) for array in model.example(2).values())
    alignment = max(profile.alignment.values())
    pruner = _Pruner(original, example, alignment, config)
    pruned, channel_fraction = pruner.to_size(config.size, inputs.tick)
    surgery.save(out, surgery.edits_between(original, pruned), pruned)
    return {
        "params": parameter_count(pruned),
        "params_original": parameter_count(original),
        "channel_fraction": channel_fraction,
        "alignment": alignment,
        "widths": _widths(original, pruned),
    }


class _Pruner:
    """Prunes copies of one model to various degrees."""

    def __init__(
        self, original: nn.Module, example: Sequence[Tensor], alignment: int, config: Config
    ) -> None:
        self._original = original
        self._example = tuple(example)
        self._alignment = alignment
        self._config = config
        self._params = parameter_count(original)
        self._shapes = _shapes(forward(original, self._example))
        self._kept = _layers_that_make_outputs(original, self._example)

    def to_size(self, size: float, tick: Any) -> tuple[nn.Module, float]:
        """The least pruned model with at most ``size`` of the parameters, and its share of cut channels.

        Where even the most pruned one has more, that one: the contract is then missed, and the report says
        by how much.
        """
        low, high = 0.0, 1.0  # at 1, every layer loses all that it may
        best = self._prune(high)
        if parameter_count(best) == self._params:
            raise _cannot_prune("none of its layers may lose a channel")
        if parameter_count(best) > size * self._params:
            return best, high
        for step in range(_BISECTION_STEPS):
            tick(step, _BISECTION_STEPS)
            middle = (low + high) / 2
            trial = self._prune(middle)
            if parameter_count(trial) <= size * self._params:
                best, high = trial, middle
            else:
                low = middle
        return best, high

    def _prune(self, channel_fraction: float) -> nn.Module:
        """A copy without that share of its channels; learns on the way which layers must keep theirs."""
        model = self._without_channels(channel_fraction)
        shapes = _shapes(forward(model, self._example))
        if shapes == self._shapes:
            return model
        self._kept = tuple(sorted({*self._kept, *self._layers_as_wide_as_the_outputs(shapes)}))
        model = self._without_channels(channel_fraction)
        if _shapes(forward(model, self._example)) != self._shapes:
            raise _cannot_prune("removing channels changes the shape of the model's outputs")
        return model

    def _without_channels(self, channel_fraction: float) -> nn.Module:
        import copy

        import torch
        import torch_pruning as tp

        model = copy.deepcopy(self._original)
        modules = dict(model.named_modules())
        importance = (
            tp.importance.GroupMagnitudeImportance(p=2)
            if self._config.prune.importance == "magnitude"
            else tp.importance.RandomImportance()
        )
        with torch.random.fork_rng():
            torch.manual_seed(self._config.seed)
            try:
                pruner = tp.pruner.BasePruner(
                    model,
                    self._example,
                    importance=importance,
                    ignored_layers=[modules[name] for name in self._kept],
                )
                _remove_channels(
                    pruner, channel_fraction, self._config.prune.max_layer_ratio, self._alignment
                )
                forward(model, self._example)
            except Exception as error:  # whatever the dependency graph or the cut model's forward raises
                raise _cannot_prune(f"{type(error).__name__}: {error}") from error
        return model

    def _layers_as_wide_as_the_outputs(self, shapes: list[tuple[int, ...]]) -> list[str]:
        """Layers whose width equals a size that the pruned outputs lost: their channels leave the model."""
        lost = {
            want for was, now in zip(self._shapes, shapes, strict=True)
            for want, got in zip(was, now, strict=True) if want != got
        }  # fmt: skip
        widths = _widths(self._original, self._original)
        return [name for name, (width, _) in widths.items() if width in lost]


def _remove_channels(pruner: Any, channel_fraction: float, max_layer_ratio: float, alignment: int) -> None:
    """Remove the least important share of all channels, from each layer no more than it may lose.

    torch-pruning's own ``step`` leaves a layer whole whose channels are all among the least important, or
    whose width would round to 0; then a larger share can remove less, and a bisection finds nothing.
    """
    import torch

    graph = pruner.DG
    ranked = []
    for group in graph.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        importance = pruner.estimate_importance(group)
        if importance is not None:
            parts = pruner._get_channel_groups(group)  # of a grouped convolution: all lose the same
            root = group[0].dep.target.module, group[0].dep.handler
            ranked.append((root, parts, importance.view(parts, -1).mean(dim=0)))
    if not ranked:
        return
    everything = torch.cat([importance for _, _, importance in ranked]).sort().values
    threshold = everything[max(0, round(channel_fraction * len(everything)) - 1)]
    for root, parts, importance in ranked:
        width = parts * len(importance)
        wanted = width - parts * int((importance <= threshold).sum())
        kept = kept_width(width, wanted, max_layer_ratio, math.lcm(alignment, parts))
        lowest = importance.argsort(stable=True)[: (width - kept) // parts]
        indices = [int(i) + part * len(importance) for part in range(parts) for i in lowest]
        if indices:
            graph.get_pruning_group(*root, indices).prune()


def kept_width(width: int, wanted: int, max_layer_ratio: float, unit: int) -> int:
    """The width that a layer of ``width`` keeps where ``wanted`` channels would stay.

    Either all of it, or a multiple of ``unit``, and never less than ``1 - max_layer_ratio`` of it.
    """
    least = math.ceil(width * (1 - max_layer_ratio) / unit) * unit
    return min(width, max(least, unit, wanted // unit * unit))


def _layers_that_make_outputs(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[str, ...]:
    """Names of the layers whose own output is an output of the model: their channels must stay.

    They are found by identity of the storage: a layer's result that reaches the output unchanged, or only
    seen otherwise, is that output.
    """
    import torch
    from torch import nn

    results: dict[int, set[str]] = {}
    hooks = []

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in output_tensors(output):
                kept_alive.append(tensor)
                results.setdefault(tensor.untyped_storage().data_ptr(), set()).add(name)

        return hook

    kept_alive: list[Tensor] = []  # a freed storage's address could come again
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            hooks.append(module.register_forward_hook(remember(name)))
    try:
        with torch.no_grad():
            outputs = output_tensors(model(*example))
    finally:
        for hook in hooks:
            hook.remove()
    pointers = {tensor.untyped_storage().data_ptr() for tensor in outputs}
    return tuple(sorted(name for pointer in pointers for name in results.get(pointer, ())))


def _shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _widths(original: nn.Module, pruned: nn.Module) -> dict[str, list[int]]:
    """Layer -> [output channels before, after], for the layers that have them."""
    before = dict(original.named_modules())
    widths = {}
    for name, module in pruned.named_modules():
        for attribute in ("out_channels", "out_features"):
            if hasattr(module, attribute):
                widths[name] = [int(getattr(before[name], attribute)), int(getattr(module, attribute))]
    return widths


def _cannot_prune(why: str) -> BadInput:
    return BadInput(
        "this model cannot be pruned",
        why.splitlines()[0],
        "use --size 1 to quantize it without pruning",
    )
