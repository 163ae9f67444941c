"""What a runtime must offer to serve: the ``Engine`` protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Mapping, Protocol, Tuple

import numpy as np

from device_agent.affinity import ANYWHERE, Placement
from device_agent.manifest import TensorSpec

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


class EngineError(Exception):
    """The engine could not run these inputs; the text is the runtime's own."""


class InputError(EngineError):
    """The inputs are to blame: the runtime cannot carry such values."""


@dataclass(frozen=True)
class EngineSettings:
    """How an engine may use the machine.

    Attributes:
        threads: threads for one run; 0: as many as ``placement`` has cores, or the machine.
        placement: the cores and the memory node that it may use.
    """

    threads: int = 0
    placement: Placement = ANYWHERE


class Engine(Protocol):
    """A loaded model.

    Attributes:
        runtime: the runtime's name in the manifest, such as ``onnxruntime``.
        inputs, outputs: the tensors, in the model's own order.
    """

    runtime: str
    inputs: Tuple[TensorSpec, ...]
    outputs: Tuple[TensorSpec, ...]

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """Compute every output. Called from one thread at a time.

        Args:
            inputs: an array for each input; see :mod:`device_agent.tensors` for ``BYTES`` and ``BF16``.

        Returns:
            An array for each output, by name.

        Raises:
            InputError: the values cannot be carried by this runtime.
            EngineError: the run failed.
        """

    def close(self) -> None:
        """Free what the engine holds. No run may follow."""
