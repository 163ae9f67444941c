"""The device that latencies are measured on: this machine, or one that runs the agent, over SSH.

A stage gets one in ``Sources.device`` and does not know which it is. Its digest is part of the keys of what
was measured on it, so a measurement is reused there and nowhere else.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgekit import ort
from edgekit.measure import latency
from edgekit.measure.latency import Latency
from edgekit.tensors import Arrays


@dataclass(frozen=True)
class Timed:
    """A graph to time.

    Attributes:
        graph: a file, or a serialized model.
        inputs: of one run.
        batch: rows in them.
        behind: a graph that takes what ``graph`` gives, as ``ort.open_chain`` runs it; None: none.
    """

    graph: Path | bytes
    inputs: Arrays
    batch: int = 1
    behind: bytes | None = None


class Device(Protocol):
    """Where graphs run to be timed."""

    @property
    def address(self) -> str:
        """How it is reached; empty: it is this machine."""

    @property
    def digest(self) -> str:
        """Of what decides the times: the machine and its runtime."""

    def machine(self) -> str:
        """Its architecture, such as ``aarch64``."""

    def time(
        self, graphs: Mapping[str, Timed], *, runs: int, warmup: int, threads: int
    ) -> dict[str, Latency]:
        """Time the graphs in turns.

        Raises:
            EdgekitError: a graph does not run there, or the device cannot be reached.
        """


@dataclass(frozen=True)
class ThisMachine:
    """ONNX Runtime in this process."""

    address: str = ""

    @property
    def digest(self) -> str:
        """Processor, CPUs and runtime."""
        text = f"{latency.this_machine()} onnxruntime {ort.version()}"
        return hashlib.sha256(text.encode()).hexdigest()

    def machine(self) -> str:
        """See ``Device``."""
        return platform.machine()

    def time(
        self, graphs: Mapping[str, Timed], *, runs: int, warmup: int, threads: int
    ) -> dict[str, Latency]:
        """See ``Device``."""
        return latency.interleaved(
            {name: _runner(timed, threads) for name, timed in graphs.items()},
            runs=runs,
            warmup=warmup,
            batch=max(timed.batch for timed in graphs.values()),
            where=latency.this_machine(),
        )


def _runner(timed: Timed, threads: int) -> Callable[[], object]:
    session = ort.open_chain(timed.graph, timed.behind, threads)
    return lambda: session.run(timed.inputs)


THIS_MACHINE = ThisMachine()
