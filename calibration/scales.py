"""Scales: what calibration found, and the file that holds it.

Every emission (Q/DQ graphs, calibration caches, FP16 guards) is made from this one object.

``scales.json``, version 1: an object with the keys

- ``version``: 1
- ``observer``: name of the observer; ``settings``: its numbers, such as ``{"percentile": 99.99}``
- ``samples``: how many rows were run
- ``tensors``: by tensor name, ``lo`` and ``hi`` (the range to quantize), ``min`` and ``max`` (what was
  seen) and ``elements`` (how many values were seen in all)
- ``macs``: by node name, multiply-accumulates over all samples

Keys are sorted, numbers are written in their shortest exact form: the same scales give the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from calibration.errors import CalibrationError

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class TensorRange:
    """One tensor's range.

    Attributes:
        lo, hi: the range to quantize, chosen by the observer.
        min, max: the smallest and the largest value seen.
        elements: how many values were seen, over all samples.
    """

    lo: float
    hi: float
    min: float
    max: float
    elements: int


@dataclass(frozen=True)
class Scales:
    """What calibration found about a model.

    Attributes:
        observer: the observer that chose the ranges.
        settings: the observer's numbers.
        samples: rows that were run.
        tensors: ranges by tensor name.
        macs: multiply-accumulates by node name, over all samples.
    """

    observer: str
    settings: Mapping[str, float]
    samples: int
    tensors: Mapping[str, TensorRange]
    macs: Mapping[str, int] = field(default_factory=dict)

    def dumps(self) -> str:
        """The text of ``scales.json``; the same scales give the same text."""
        document = {"version": SCHEMA_VERSION, **asdict(self)}
        return json.dumps(document, sort_keys=True, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write ``scales.json``."""
        Path(path).write_text(self.dumps(), encoding="utf-8")


def loads(text: str) -> Scales:
    """Parse ``scales.json``.

    Raises:
        CalibrationError: not JSON, another version, or a number that is not finite.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise _malformed(f"it is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise _malformed("the top level is not an object")
    if raw.get("version") != SCHEMA_VERSION:
        raise _malformed(f"its version is {raw.get('version')!r}, this release reads {SCHEMA_VERSION}")
    try:
        return _build(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(f"a value is missing or wrong: {error}") from error


def load(path: str | Path) -> Scales:
    """Read ``scales.json``.

    Raises:
        CalibrationError: the file cannot be read, or is malformed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _malformed(f"{path} cannot be read: {error}") from error
    return loads(text)


def _build(raw: dict[str, Any]) -> Scales:
    tensors = {name: TensorRange(**values) for name, values in raw["tensors"].items()}
    for name, found in tensors.items():
        if not all(math.isfinite(value) for value in (found.lo, found.hi, found.min, found.max)):
            raise ValueError(f"the range of {name!r} is not finite")
        if found.lo > found.hi:
            raise ValueError(f"the range of {name!r} is upside down")
    return Scales(
        observer=str(raw["observer"]),
        settings={str(key): float(value) for key, value in raw["settings"].items()},
        samples=int(raw["samples"]),
        tensors=tensors,
        macs={str(key): int(value) for key, value in raw["macs"].items()},
    )


def _malformed(why: str) -> CalibrationError:
    return CalibrationError("the scales cannot be read", why, "calibrate the model again")
