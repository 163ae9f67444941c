"""Runs of ONNX Runtime's CUDA provider, bound to memory on the GPU.

Where the package has that provider (``onnxruntime-gpu``) it is used; what it cannot run falls to the CPU.
Inputs keep their place on the GPU from run to run of the same shapes and are overwritten; outputs stay there
until the whole run is done and are copied once.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
import onnxruntime

from device_agent.engines.base import Arrays

PROVIDER = "CUDAExecutionProvider"
_DEVICE = ("cuda", 0)
_MAX_SHAPES = 32  # whose inputs keep their place


def providers() -> List[str]:
    """What a session should run on, in order of preference."""
    here = onnxruntime.get_available_providers()
    return [name for name in (PROVIDER, "CPUExecutionProvider") if name in here]


def runs_on_gpu(session: Any) -> bool:
    """Whether a session got the CUDA provider, which needs a driver, cuBLAS and cuDNN besides the package."""
    return PROVIDER in session.get_providers()


class BoundRuns:
    """Runs a session by I/O binding.

    Args:
        session: with the CUDA provider.
        inputs: names, in any order.
        outputs: names.
    """

    def __init__(self, session: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._session = session
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._places: OrderedDict[Tuple[Tuple[int, ...], ...], Dict[str, Any]] = OrderedDict()

    def run(self, feeds: Arrays) -> List[np.ndarray[Any, Any]]:
        """Compute the outputs, in their order."""
        binding = self._session.io_binding()
        for name, value in self._placed(feeds).items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, *_DEVICE)
        self._session.run_with_iobinding(binding)
        outputs: List[np.ndarray[Any, Any]] = binding.copy_outputs_to_cpu()
        return outputs

    def _placed(self, feeds: Arrays) -> Dict[str, Any]:
        """The inputs on the GPU."""
        arrays = {name: np.ascontiguousarray(feeds[name]) for name in self._inputs}
        shapes = tuple(arrays[name].shape for name in self._inputs)
        places = self._places.get(shapes)
        if places is None:
            make = onnxruntime.OrtValue.ortvalue_from_numpy
            places = {name: make(array, *_DEVICE) for name, array in arrays.items()}
            self._places[shapes] = places
            if len(self._places) > _MAX_SHAPES:
                self._places.popitem(last=False)
        else:
            for name, array in arrays.items():
                places[name].update_inplace(array)
        return places
