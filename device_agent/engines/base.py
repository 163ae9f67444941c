"""What a runtime must offer to serve: the ``Engine`` protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, FrozenSet, Mapping, Protocol, Tuple

import numpy as np

from device_agent.affinity import ANYWHERE, Placement
from device_agent.manifest import TensorSpec

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


class EngineError(Exception):
    """The engine could not run these inputs; the text is the runtime's own."""


class InputError(EngineError):
    """The inputs are to blame: the runtime cannot carry such values."""


class EngineUnavailable(EngineError):
    """The engine runs nothing now, whatever the inputs: its process ended and is started again."""


@dataclass(frozen=True)
class EngineSettings:
    """How an engine may use the machine.

    Attributes:
        threads: threads for one run; 0: as many as ``placement`` has cores, or the machine.
        placement: the cores and the memory node that it may use.
        isolate: whether it gets a process of its own.
        run_timeout_s: after this an isolated engine is taken to hang.
    """

    threads: int = 0
    placement: Placement = ANYWHERE
    isolate: bool = False
    run_timeout_s: float = 30.0


class Engine(Protocol):
    """A loaded model.

    Attributes:
        runtime: the runtime's name in the manifest, such as ``onnxruntime``.
        inputs, outputs: the tensors, in the model's own order.
        memory_policy: what the kernel said of its memory when it was opened, such as ``bind 0``; empty where
            no node was asked for.
    """

    runtime: str
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]
    memory_policy: str

    @property
    def process(self) -> int:
        """The id of the process that it runs in; 0 while that is started again."""

    @property
    def threads(self) -> FrozenSet[int]:
        """Ids of the process's threads that are the engine's, but for the one that calls ``run``."""

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """Compute every output. Called from one thread at a time.

        Args:
            inputs: an array for each input; see :mod:`device_agent.tensors` for ``BYTES`` and ``BF16``.

        Returns:
            An array for each output, by name.

        Raises:
            InputError: the values cannot be carried by this runtime.
            EngineUnavailable: no run is possible now; this says nothing of the inputs.
            EngineError: the run failed.
        """

    def close(self) -> None:
        """Free what the engine holds. No run may follow."""
