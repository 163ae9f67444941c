"""The runs of a repository's model before it serves: its ``model_warmup``, and a look at its latency."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict, Tuple

import numpy as np

from device_agent.batching.latency import LatencyModel
from device_agent.engines.base import Engine, EngineError
from device_agent.errors import BadInput, Refused
from device_agent.manifest import open_regular
from device_agent.repository.model_config import ModelConfig, Warmup, WarmupInput
from device_agent.tensors import NUMPY_DTYPES, TensorError, decode_binary, element_count, object_array
from device_agent.warmup import learn_latency

WARMUP_DIRECTORY = "warmup"  # inside the model's, for input_data_file, as in Triton
_MAX_ELEMENTS = 2**28  # of one input, its rows included
_MAX_AXES = 32  # of numpy's older than 2.0

_log = logging.getLogger(__name__)

Arrays = Dict[str, "np.ndarray[Any, Any]"]
Shape = Tuple[int, ...]


def warm_up(engine: Engine, latency: LatencyModel, directory: Path, config: ModelConfig) -> None:
    """Run what the configuration says, then learn the latency of small batches.

    Without ``model_warmup`` the inputs are zeros of size 1 wherever a size is free. A graph that refuses
    those may still take what clients send, so that is only logged.

    Raises:
        BadInput: a file of the warm-up cannot be used, or an input is too large.
        Refused: the model failed on its own warm-up.
    """
    samples = [_sample(directory, config, warmup) for warmup in config.warmups]
    try:
        for warmup, arrays in zip(config.warmups, samples):
            for _ in range(warmup.count):
                engine.run(arrays)
    except EngineError as error:
        raise Refused(
            f"model '{config.name}' failed on its own model_warmup",
            str(error),
            "correct the warm-up, or the graph",
        ) from error
    try:
        learn_latency(engine, latency, samples[0] if samples else _zeros(config), config.max_batch_size)
    except EngineError as error:
        _log.warning(
            "model '%s' does not run on zeros, so it learns its latency later: %s", config.name, error
        )


def _sample(directory: Path, config: ModelConfig, warmup: Warmup) -> Arrays:
    missing = {tensor.name for tensor in config.inputs} ^ set(warmup.inputs)
    if missing:
        raise BadInput(
            f"the model_warmup '{warmup.name}' of model '{config.name}' cannot run",
            f"the input '{min(missing)}' is missing, or not the model's",
            "give every input of the model",
        )
    rows = (max(warmup.batch_size, 1),) if config.max_batch_size else ()
    return {name: _array(directory, config, given, rows) for name, given in warmup.inputs.items()}


def _array(directory: Path, config: ModelConfig, given: WarmupInput, rows: Any) -> np.ndarray[Any, Any]:
    if given.source == "input_data_file":
        row = _from_file(directory / WARMUP_DIRECTORY / given.file, config, given)
        return np.broadcast_to(row, _checked(config, rows + given.dims)).copy() if rows else row
    shape = rows + given.dims
    array = _empty_values(config, given.dtype, shape)
    if given.source == "random_data" and given.dtype != "BYTES":
        random = np.random.default_rng(0).random(shape)
        array[...] = random if array.dtype.kind == "f" else random * 2  # 0 or 1: every index type has them
    return array


def _from_file(path: Path, config: ModelConfig, given: WarmupInput) -> np.ndarray[Any, Any]:
    try:
        with open_regular(path) as stream:
            return decode_binary(given.dtype, given.dims, memoryview(stream.read()))
    except (OSError, TensorError) as error:
        raise BadInput(
            f"the model_warmup of model '{config.name}' cannot use {path.name}",
            f"it {error}" if isinstance(error, TensorError) else error.strerror or str(error),
            f"put the input's raw bytes into {path}",
        ) from error


def _zeros(config: ModelConfig) -> Arrays:
    front = (1,) if config.max_batch_size else ()
    zeros: Arrays = {}
    for tensor in config.inputs:
        shape = front + tuple(1 if size == -1 else size for size in tensor.dims or ())
        zeros[tensor.name] = _empty_values(config, tensor.dtype, shape)
    return zeros


def _empty_values(config: ModelConfig, dtype: str, shape: Shape) -> np.ndarray[Any, Any]:
    """Zeros, or texts without a character."""
    _checked(config, shape)
    if dtype == "BYTES":
        return object_array([b""] * element_count(shape), shape)
    return np.zeros(shape, NUMPY_DTYPES[dtype])


def _checked(config: ModelConfig, shape: Shape) -> Shape:
    if len(shape) > _MAX_AXES or element_count(shape) > _MAX_ELEMENTS:
        raise BadInput(
            f"model '{config.name}' cannot be warmed up",
            f"an input has more than {_MAX_ELEMENTS} elements, or more than {_MAX_AXES} axes",
            "correct its dims, or the batch_size of its model_warmup",
        )
    return shape
