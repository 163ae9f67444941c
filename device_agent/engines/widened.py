"""An engine with INT32 where its model has INT64: TensorRT before version 10 computes in nothing wider."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, FrozenSet, Iterable, Tuple

import numpy as np

from device_agent.engines.base import Arrays, Engine, InputError
from device_agent.engines.in_front import EngineInFront
from device_agent.manifest import TensorSpec

_RANGE = np.iinfo(np.int32)


class WidenedEngine(EngineInFront):
    """An engine whose INT32 tensors look like INT64 from outside.

    Args:
        engine: what runs.
        names: the tensors that are INT64 for clients.
    """

    def __init__(self, engine: Engine, names: Iterable[str]) -> None:
        wide = frozenset(names)
        inputs, self._narrow = _widen(engine.inputs, wide)
        outputs, self._short = _widen(engine.outputs, wide)
        super().__init__(engine, inputs, outputs)

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """See :meth:`device_agent.engines.base.Engine.run`.

        Raises:
            InputError: a value does not fit 32 bits.
        """
        outputs = self._engine.run(
            {**inputs, **{name: _narrowed(name, inputs[name]) for name in self._narrow}}
        )
        return {**outputs, **{name: outputs[name].astype(np.int64) for name in self._short}}


def _widen(
    specs: Tuple[TensorSpec, ...], wide: FrozenSet[str]
) -> Tuple[Tuple[TensorSpec, ...], Tuple[str, ...]]:
    short = tuple(spec.name for spec in specs if spec.name in wide and spec.dtype == "INT32")
    return tuple(replace(spec, dtype="INT64") if spec.name in short else spec for spec in specs), short


def _narrowed(name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.size and not (_RANGE.min <= array.min() and array.max() <= _RANGE.max):
        raise InputError(
            f"input '{name}' has a value that does not fit 32 bits, in which this engine computes"
        )
    return array.astype(np.int32)
