"""Groups of channels that can be removed, made from what a trace showed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekit.pruning.labels import Array
from edgekit.pruning.trace import Owner, Trace

#: For each group the importance of its slots, float [width]; the lowest go first.
Scores = Mapping[str, "npt.NDArray[np.float64]"]


@dataclass(frozen=True)
class Group:
    """Slots that look alike: each holds the same number of channels of the same layers.

    A slot is removed whole: one channel and what depends on it, or a head of attention with its queries, keys
    and values.

    Attributes:
        name: the first layer that makes these channels; the same in every run.
        width: number of slots.
        channels: channels of that layer in a slot.
        operands: how many channels a slot has on each axis of a product; alignment is about those.
        members: the layers that lose something with it.
        parameters: numbers that would leave if all its slots left and every other group stayed whole.
        why: why no slot may be removed; None where they may.
    """

    name: str
    width: int
    channels: int
    operands: tuple[int, ...]
    members: tuple[str, ...]
    parameters: int
    why: str | None

    @property
    def prunable(self) -> bool:
        """Whether slots may be removed."""
        return self.why is None

    def step(self, alignment: int) -> int:
        """Slots that must go together for every product to stay a multiple of ``alignment`` channels wide."""
        return math.lcm(*(alignment // math.gcd(alignment, count) for count in self.operands))


@dataclass(frozen=True, eq=False)
class Met:
    """An axis that a module's own code met: its size, and the slot of each index, int64 [size]."""

    size: int
    slots: Array


@dataclass(frozen=True)
class Share:
    """Of an axis of a parameter, the indices that belong to a group: so many for each of its slots."""

    group: str
    indices: int


@dataclass(frozen=True, eq=False)
class Structure:
    """A model's groups, and where their slots are in its parameters.

    Attributes:
        groups: in the order of the model's layers.
        labels: number of labels; slots are numbered below it.
        slots: prunable group -> the roots of its slots, in the order of its first layer's channels.
        axes: (module, attribute) of each parameter and buffer -> the slot of each index of each axis, int64.
        shapes: (module, attribute) of each parameter -> its shape; shared ones under their first name only.
        shares: the same keys -> for each axis, the groups on it.
        reads: the same keys -> the axes over which products sum.
        sightings: module -> the axes that its own code met.
        renumbered: modules whose numbers follow the axes that their code met, whatever their names.
    """

    groups: tuple[Group, ...]
    labels: int
    slots: Mapping[str, Array]
    axes: Mapping[Owner, tuple[Array | None, ...]]
    shapes: Mapping[Owner, tuple[int, ...]]
    shares: Mapping[Owner, tuple[tuple[Share, ...], ...]]
    reads: Mapping[Owner, tuple[int, ...]]
    sightings: Mapping[str, tuple[Met, ...]]
    renumbered: frozenset[str] = frozenset()

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups that may lose slots."""
        return tuple(group for group in self.groups if group.prunable)

    def group(self, name: str) -> Group:
        """The group of that name."""
        return next(group for group in self.groups if group.name == name)

    def parameters(self, widths: Mapping[str, int]) -> int:
        """Parameters of the model when these groups keep so many slots, and the others all."""
        lost = {group.name: group.width - widths.get(group.name, group.width) for group in self.groups}
        return sum(
            math.prod(
                size - sum(share.indices * lost[share.group] for share in shares)
                for size, shares in zip(shape, self.shares[owner], strict=True)
            )
            for owner, shape in self.shapes.items()
        )


def build(trace: Trace, renumbered: frozenset[str] = frozenset()) -> Structure:
    """Sort the slots of a trace into groups."""
    everything = np.arange(len(trace.labels), dtype=np.int64)
    roots = trace.labels.roots(everything)
    pins, reasons = trace.labels.pinned()
    axes = {
        owner: tuple(None if axis is None else roots[axis] for axis in of)
        for owner, of in trace.parameters.items()
    }
    made = np.zeros(len(roots), bool)
    made[roots[np.flatnonzero(trace.made)]] = True
    kinds = _kinds(len(roots), axes)
    groups, slots = [], {}
    taken: dict[str, int] = {}
    grouped = np.zeros(len(roots), bool)
    for owner, axis in _made_axes(trace, axes):
        new = axis[~grouped[axis] & made[axis]]
        for kind in dict.fromkeys(zip(kinds[new].tolist(), pins[new].tolist(), strict=True)):
            same = new[(kinds[new] == kind[0]) & (pins[new] == kind[1])]
            members = np.fromiter(dict.fromkeys(same.tolist()), np.int64)
            grouped[members] = True
            name = _name(owner, taken)
            why = reasons[kind[1]] if kind[1] else None
            if why is None and len(members) == 1:
                why = "it is a single slot"
            groups.append((name, members, int((axis == members[0]).sum()), why))
            if why is None:
                slots[name] = members
    group_of = np.full(len(roots), -1, np.int64)
    for index, (_, members, _, _) in enumerate(groups):
        group_of[members] = index
    names = [name for name, *_ in groups]
    widths = [len(members) for _, members, _, _ in groups]
    shares = {
        owner: tuple(_shares(axis, group_of, names, widths) for axis in of) for owner, of in axes.items()
    }
    shapes = {owner: trace.shapes[owner] for owner in trace.shapes}
    operands = _operands(trace, roots, group_of, len(groups))
    sightings = {
        name: tuple(Met(seen.size, roots[seen.labels]) for seen in of) for name, of in trace.sightings.items()
    }
    made_groups = tuple(
        Group(
            name=name,
            width=len(members),
            channels=channels,
            operands=tuple(sorted({count // len(members) for count in operands[index]})) or (channels,),
            members=tuple(
                dict.fromkeys(
                    _layer(owner) for owner, of in shares.items()
                    if any(share.group == name for axis in of for share in axis)
                )
            ),
            parameters=_leaving(name, len(members), shapes, shares),
            why=why,
        )
        for index, (name, members, channels, why) in enumerate(groups)
    )  # fmt: skip
    reads = {
        owner: tuple(
            number
            for number, labels in enumerate(trace.parameters[owner])
            if labels is not None and trace.read[labels].all()
        )
        for owner in shapes
    }
    return Structure(made_groups, len(roots), slots, axes, shapes, shares, reads, sightings, renumbered)


def _kinds(count: int, axes: Mapping[Owner, tuple[Array | None, ...]]) -> Array:
    """A number for each slot, equal where slots have as many indices on the same axes of parameters."""
    rng = np.random.default_rng(0)
    kinds = np.zeros(count, np.int64)
    for of in axes.values():
        for axis in of:
            salt = rng.integers(1, 2**62)
            if axis is not None:
                np.add.at(kinds, axis, salt)
    return kinds


def _made_axes(trace: Trace, axes: Mapping[Owner, tuple[Array | None, ...]]) -> Iterator[tuple[Owner, Array]]:
    """The axes of parameters that make channels, in the order of the model's layers."""
    for owner in trace.shapes:
        for labels, axis in zip(trace.parameters[owner], axes[owner], strict=True):
            if labels is not None and axis is not None and trace.made[labels].any():
                yield owner, axis


def _name(owner: Owner, taken: dict[str, int]) -> str:
    layer = _layer(owner)
    taken[layer] = taken.get(layer, -1) + 1
    return f"{layer}#{taken[layer]}" if taken[layer] else layer


def _layer(owner: Owner) -> str:
    """A layer's name; of a parameter that is not the weight or bias of a layer, its own."""
    module, attribute = owner
    if attribute in ("weight", "bias", "running_mean", "running_var") and module:
        return module
    return f"{module}.{attribute}" if module else attribute


def _shares(axis: Array | None, group_of: Array, names: list[str], widths: list[int]) -> tuple[Share, ...]:
    if axis is None:
        return ()
    found, counts = np.unique(group_of[axis], return_counts=True)
    return tuple(
        Share(names[group], int(count) // widths[group])
        for group, count in zip(found.tolist(), counts.tolist(), strict=True)
        if group >= 0
    )


def _operands(trace: Trace, roots: Array, group_of: Array, count: int) -> list[list[int]]:
    """For each group its channels on the axes of products."""
    found: list[list[int]] = [[] for _ in range(count)]
    seen = set()
    for labels in trace.operands:
        groups = group_of[roots[labels]]
        key = groups.tobytes()
        if key in seen:
            continue
        seen.add(key)
        for group, channels in zip(*np.unique(groups, return_counts=True), strict=True):
            if group >= 0:
                found[group].append(int(channels))
    return found


def _leaving(
    name: str,
    width: int,
    shapes: Mapping[Owner, tuple[int, ...]],
    shares: Mapping[Owner, tuple[tuple[Share, ...], ...]],
) -> int:
    """Parameters with an index on an axis that belongs to the group."""
    total = 0
    for owner, shape in shapes.items():
        kept = [
            size - width * sum(share.indices for share in of if share.group == name)
            for size, of in zip(shape, shares[owner], strict=True)
        ]
        total += math.prod(shape) - math.prod(kept)
    return total
