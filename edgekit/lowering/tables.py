"""What a parser takes: tables of operators by release, each with its source.

A table may extend another one: its operators are added, those in ``without`` taken away, and its other keys
replace the base's. A profile gets the newest table that is no newer than its runtime.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from edgekit.profile import Profile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: They say what a tensor is made of, and are no work that has to run anywhere.
_PRECISION_ONLY = {"Cast", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Table:
    """What the parser of one release takes.

    Attributes:
        name: of the table's file.
        runtime: as in a profile.
        version: the first that it holds for.
        source: where the operators come from.
        lowest_opset, highest_opset: that the parser reads.
        int64: whether 64-bit integers are computed as such; else the parser cuts them down to 32 bits.
        operators: of the default domain.
    """

    name: str
    runtime: str
    version: Version
    source: str
    lowest_opset: int
    highest_opset: int
    int64: bool
    operators: frozenset[str]


@dataclass(frozen=True)
class DlaTable:
    """What a DLA runs; ``operators`` are those of its generation."""

    source: str
    operators: frozenset[str]

    def fallback(self, nodes: Mapping[str, str]) -> dict[str, str]:
        """Nodes that it leaves to the GPU -> why.

        Args:
            nodes: name -> operator.
        """
        able = self.operators | _PRECISION_ONLY
        return {name: f"the DLA has no {op_type}" for name, op_type in nodes.items() if op_type not in able}


def for_profile(profile: Profile) -> Table | None:
    """The table for a profile's parser; None where ONNX Runtime reads the graph itself."""
    version = lowest_version(profile)
    fitting = [
        table for table in _all() if table.runtime == profile.runtime.name and table.version <= version
    ]
    return max(fitting, key=lambda table: table.version, default=None)


def dla_for_profile(profile: Profile) -> DlaTable | None:
    """What the profile's DLA runs; None where it has none, or its TensorRT does not reach it."""
    if profile.dla is None or profile.dla.cores == 0 or profile.runtime.name != "tensorrt":
        return None
    raw = _raw("dla")
    version = lowest_version(profile)
    early = Version(raw["first_version"]) <= version <= Version(raw["last_version"])
    if not early and version < Version(raw["again_from_version"]):
        return None
    beyond = raw["second_generation_only"] if profile.dla.generation == 1 else ()
    return DlaTable(raw["source"], frozenset(raw["operators"]) - frozenset(beyond))


def lowest_version(profile: Profile) -> Version:
    """The oldest release of the runtime that the profile stands for; 0 where it names no lower end."""
    lower_ends = [
        Version(part.version.removesuffix(".*"))
        for part in SpecifierSet(profile.runtime.versions)
        if part.operator in ("==", ">=", "~=", "===")
    ]
    return max(lower_ends, default=Version("0"))


@cache
def _all() -> tuple[Table, ...]:
    folder = files("edgekit.lowering") / "tables"
    names = sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir())
    return tuple(_table(name) for name in names if name.startswith("tensorrt"))


def _table(name: str) -> Table:
    raw = _raw(name)
    return Table(
        name,
        raw["runtime"],
        Version(raw["version"]),
        raw["source"],
        raw["lowest_opset"],
        raw["highest_opset"],
        raw["int64"],
        frozenset(raw["operators"]),
    )


def _raw(name: str) -> dict[str, Any]:
    text = (files("edgekit.lowering") / "tables" / f"{name}.toml").read_text(encoding="utf-8")
    own = tomllib.loads(text)
    if "extends" not in own:
        return own
    base = _raw(own.pop("extends"))
    operators = {*base["operators"], *own["operators"]} - {*own.pop("without", ())}
    return {**base, **own, "operators": sorted(operators)}
