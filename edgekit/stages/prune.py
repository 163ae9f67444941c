"""Structured pruning to a share of the parameters and of the latency, in widths that the device likes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edgekit import allocation, pruning, surgery
from edgekit.measure import staircase
from edgekit.measure.staircase import LatencyModel
from edgekit.modules import parameter_count
from edgekit.profile import Profile
from edgekit.recipe import Prune
from edgekit.stages.examined import Examined, examine
from edgekit.stages.registry import Inputs

if TYPE_CHECKING:
    from torch import nn

#: Widths that a group may be given; finer ones bring nothing that the losses could tell.
_STEPS = 16
#: Where an allocation knows only sizes, it is asked for a smaller one until the latency fits.
_SMALLER, _TRIES = 0.9, 30


class Config(BaseModel):
    """Settings of this stage.

    Attributes:
        prune: how.
        size: largest share of the original's parameters to keep.
        latency_share: largest share of its latency to keep, as the latency model sees it; None: any.
        seed: of random choices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prune: Prune
    size: float
    latency_share: float | None
    seed: int


def run(inputs: Inputs, config: Config, profile: Profile, out: Path) -> Mapping[str, Any]:
    """Prune the model and write its structure and weights.

    Where even the most pruned model is larger or slower than asked, that one is written: the contract is then
    missed, and the report says by how much.

    Raises:
        BadInput: the model cannot be pruned.
    """
    examined = examine(inputs, config.prune, config.seed, profile)
    latency = None
    if "latency" in inputs.artifacts:
        latency = staircase.from_json(inputs.artifacts["latency"].metadata)
    widths = _widths(examined, config, inputs, latency)
    pruned = examined.cut(widths)
    surgery.save(out, surgery.edits_between(examined.original, pruned), pruned)
    return {
        "params": parameter_count(pruned),
        "params_original": parameter_count(examined.original),
        "allocation": config.prune.allocation,
        "importance": config.prune.importance,
        "alignment": examined.alignment,
        "latency_share": None if latency is None else _latency_share(examined, latency, widths),
        "latency_model": None if latency is None else latency.how,
        "layers": _layers(examined, [name for name, _ in examined.structure.shapes], widths),
        "widths": _layer_widths(examined.original, pruned),
        "groups": {group.name: [group.width, widths[group.name]] for group in examined.structure.prunable},
        "kept_whole": {group.name: group.why for group in examined.structure.groups if not group.prunable},
    }


def _widths(
    examined: Examined, config: Config, inputs: Inputs, latency: LatencyModel | None
) -> Mapping[str, int]:
    if config.prune.allocation == "sensitivity":
        return _by_sensitivity(examined, config, inputs.artifacts["sensitivity"].metadata, latency)
    size = _size_now(examined, config)
    widths = _by_size(examined, config, size)
    for _ in range(_TRIES):
        fits = latency is None or config.latency_share is None
        if fits or _latency_share(examined, latency, widths) <= config.latency_share:  # type: ignore[arg-type,operator]  # neither is None then
            break
        size *= _SMALLER
        widths = _by_size(examined, config, size)
    return widths


def _size_now(examined: Examined, config: Config) -> float:
    """The share to keep of the parameters that earlier cuts have left."""
    if examined.module is examined.original:
        return config.size
    return config.size * parameter_count(examined.original) / parameter_count(examined.module)


def _by_size(examined: Examined, config: Config, size: float) -> Mapping[str, int]:
    limits = {"max_layer_ratio": examined.max_layer_ratio, "alignment": examined.alignment}
    if config.prune.allocation == "uniform":
        return pruning.uniformly(examined.structure, size, **limits)  # type: ignore[arg-type]  # an int and a float
    widths, _ = pruning.globally(examined.structure, examined.scores, size, **limits)  # type: ignore[arg-type]  # as above
    return widths


def _by_sensitivity(
    examined: Examined, config: Config, measured: Mapping[str, Any], latency: LatencyModel | None
) -> Mapping[str, int]:
    structure = examined.structure
    most = _size_now(examined, config) * structure.parameters({})

    def uses(widths: Mapping[str, int]) -> list[float]:
        used = [structure.parameters(widths) / most]
        if latency is not None and config.latency_share is not None:
            used.append(_latency_share(examined, latency, widths) / config.latency_share)
        return used

    curves = {
        group.name: allocation.curve(
            group.width,
            examined.allowed(group, _STEPS),
            [(int(width), float(loss)) for width, loss in measured["groups"][group.name]["points"]],
        )
        for group in structure.prunable
    }
    return allocation.allocate(curves, uses)


def _latency_share(examined: Examined, latency: LatencyModel, widths: Mapping[str, int]) -> float:
    return latency.share(_layers(examined, latency.layers, widths))


def _layers(
    examined: Examined, names: Iterable[str], widths: Mapping[str, int]
) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of layers, by name; without those whose weights are shared with an earlier one."""
    structure = examined.structure
    lost = {group.name: group.width - widths.get(group.name, group.width) for group in structure.groups}
    layers = {}
    for name in names:
        owner = (name, "weight")
        if len(structure.shapes.get(owner, ())) < 2:
            continue
        sizes = [
            size - sum(share.indices * lost[share.group] for share in shares)
            for size, shares in zip(structure.shapes[owner], structure.shares[owner], strict=True)
        ]
        layers[name] = (sizes[0], sizes[1])
    return layers


def _layer_widths(original: nn.Module, pruned: nn.Module) -> dict[str, list[int]]:
    """Layer -> [output channels before, after], for the layers that have them."""
    before = dict(original.named_modules())
    widths = {}
    for name, module in pruned.named_modules():
        for attribute in ("out_channels", "out_features"):
            if hasattr(module, attribute):
                widths[name] = [int(getattr(before[name], attribute)), int(getattr(module, attribute))]
    return widths
