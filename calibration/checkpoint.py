"""Carrying a calibration over a crash: what was collected so far, written now and then.

A checkpoint fits one model and one kind of collection; another is not read but replaced. Since what is
collected does not depend on order, a resumed run ends with exactly the scales of an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from calibration.histogram import Histogram
from calibration.probe import Probe
from calibration.storage import digest

_FORMAT = 2  # of the state: 2 counts what was looked at, beside what there was


@dataclass(frozen=True)
class Progress:
    """How far a calibration is: samples taken, and the rows in them."""

    samples: int
    rows: int


class Checkpoint:
    """A file with the state of one calibration.

    Args:
        path: the file; it is replaced whole, and removed at the end.
        model: the prepared model that is calibrated.
        probe: what collects.
        every_s: seconds between two writes.
    """

    def __init__(self, path: Path, model: ModelProto, probe: Probe, every_s: float) -> None:
        self._path = path
        self._probe = probe
        self._every_s = every_s
        self._written = time.monotonic()
        kinds = "".join("h" if isinstance(c, Histogram) else "e" for c in probe.collected.values())
        self._key = hashlib.sha256(f"{_FORMAT} {digest(model)} {kinds}".encode()).hexdigest()

    def restore(self) -> Progress:
        """Read the state of an earlier run into the probe; nothing where there is none that fits."""
        try:
            with np.load(self._path) as stored:
                state = json.loads(bytes(stored["state"]))
                counts = stored["counts"]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return Progress(0, 0)
        if state["key"] != self._key:
            return Progress(0, 0)
        self._apply(state, counts)
        return Progress(state["samples"], state["rows"])

    def is_due(self) -> bool:
        """Whether the last write is long enough ago for another."""
        return time.monotonic() - self._written >= self._every_s

    def remove(self) -> None:
        """Remove the file: the calibration is done."""
        self._path.unlink(missing_ok=True)

    def write(self, progress: Progress) -> None:
        """Replace the file by the state now; no row may be running."""
        collected = self._probe.collected.values()
        histograms = [c for c in collected if isinstance(c, Histogram)]
        state = {
            "key": self._key,
            "samples": progress.samples,
            "rows": progress.rows,
            "extremes": [[c.lo, c.hi, c.elements] for c in collected],
            "histograms": [[h.exponent, h.zeros, h.looked_at] for h in histograms],
            "macs": self._probe.macs.totals,
        }
        counts = np.stack([h.counts for h in histograms]) if histograms else np.zeros((0, 0), np.int64)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, state=text, counts=counts)
        temporary.replace(self._path)
        self._written = time.monotonic()

    def _apply(self, state: Mapping[str, Any], counts: np.ndarray) -> None:
        collected = list(self._probe.collected.values())
        for one, (lo, hi, elements) in zip(collected, state["extremes"], strict=True):
            one.lo, one.hi, one.elements = lo, hi, elements
        histograms = [one for one in collected if isinstance(one, Histogram)]
        for histogram, (exponent, zeros, looked_at), row in zip(
            histograms, state["histograms"], counts, strict=True
        ):
            histogram.exponent, histogram.zeros, histogram.looked_at = exponent, zeros, looked_at
            histogram.counts = row.copy()
        self._probe.macs.totals.update(state["macs"])
