"""An engine whose clients see other shapes than its graph: the ``reshape`` of a model configuration."""

from __future__ import annotations

from typing import Any, Dict, Mapping, Sequence, Tuple

import numpy as np

from device_agent.engines.base import Arrays, Engine, EngineError
from device_agent.engines.in_front import EngineInFront
from device_agent.repository.completion import specs
from device_agent.repository.model_config import Dims, ModelConfig, TensorConfig

Shape = Tuple[int, ...]


def reshaped(engine: Engine, config: ModelConfig) -> Engine:
    """``engine`` itself, or one in front of it that reshapes, where ``config`` has a ``reshape``."""
    if all(tensor.reshape is None for tensor in config.inputs + config.outputs):
        return engine
    return ReshapingEngine(engine, config)


class ReshapingEngine(EngineInFront):
    """Gives inputs the shape that the graph has and outputs the one that clients see; no data is copied."""

    def __init__(self, engine: Engine, config: ModelConfig) -> None:
        inputs, outputs = (specs(of, config.max_batch_size) for of in (config.inputs, config.outputs))
        super().__init__(engine, inputs, outputs)
        self._batched = int(config.max_batch_size > 0)
        self._inputs = [tensor for tensor in config.inputs if tensor.reshape is not None]
        self._outputs = [tensor for tensor in config.outputs if tensor.reshape is not None]

    def run(self, inputs: Arrays) -> Dict[str, np.ndarray[Any, Any]]:
        """See :meth:`device_agent.engines.base.Engine.run`."""
        feeds = {**inputs, **self._shaped(inputs, self._inputs, to_graph=True)}
        outputs = self._engine.run(feeds)
        return {**outputs, **self._shaped(outputs, self._outputs, to_graph=False)}

    def _shaped(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], tensors: Sequence[TensorConfig], to_graph: bool
    ) -> Dict[str, np.ndarray[Any, Any]]:
        shaped: Dict[str, np.ndarray[Any, Any]] = {}
        for tensor in tensors:
            array, target = arrays[tensor.name], (tensor.reshape if to_graph else tensor.dims) or ()
            pattern = (tensor.dims if to_graph else tensor.reshape) or ()
            batch, own = array.shape[: self._batched], array.shape[self._batched :]
            shaped[tensor.name] = array.reshape(batch + _filled(tensor.name, own, pattern, target))
        return shaped


def _filled(name: str, own: Shape, pattern: Dims, target: Dims) -> Shape:
    """``target`` with its free sizes taken, in order, from ``own`` where ``pattern`` is free."""
    if len(own) != len(pattern) or any(size not in (-1, got) for size, got in zip(pattern, own)):
        raise EngineError(f"'{name}' has dims {list(own)}, its reshape is for {list(pattern)}")
    free = iter([got for size, got in zip(pattern, own) if size == -1])
    return tuple(next(free) if size == -1 else size for size in target)
