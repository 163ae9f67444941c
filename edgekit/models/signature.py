"""The signature of a torch module, found by running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from device_agent.manifest import TensorSpec
from edgekit.errors import BadInput, EdgekitError
from edgekit.tensors import Arrays, numpy_dtype, protocol_dtype

# Two runs that differ in every free size tell which sizes of an output are free.
_FIRST_RUN = (2, 16)
_SECOND_RUN = (3, 24)
_EXAMPLE_SEED = 0


def run(module: Callable[..., Any], inputs: Arrays, names: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Run a module on arrays, by position in the order of ``names``; its outputs by name.

    A single tensor is called ``output``; a tuple's are ``output_0``, ``output_1``...; a dict's keep theirs.
    """
    import torch

    tensors = [torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in names]
    with torch.inference_mode():
        result = module(*tensors)
    if isinstance(result, torch.Tensor):
        named: Mapping[str, Any] = {"output": result}
    elif isinstance(result, Mapping):
        named = result
    elif isinstance(result, tuple | list):
        named = {f"output_{index}": value for index, value in enumerate(result)}
    else:
        named = {"": result}
    for name, value in named.items():
        if not isinstance(value, torch.Tensor):
            raise BadInput(
                f"the model's output '{name}' is a {type(value).__name__}",
                "a model returns a tensor, a tuple of tensors or a dict of tensors by name",
                "wrap the model in a module that returns tensors only",
            )
    return {name: value.numpy() for name, value in named.items()}


def inputs_of(example: Arrays, free_length: int | None = None) -> tuple[TensorSpec, ...]:
    """Signature of example inputs: the batch axis is free, as is the length of ``[batch, free_length]``."""
    return tuple(
        TensorSpec(name, protocol_dtype(array.dtype), (-1, *_free_text(array.shape[1:], free_length)))
        for name, array in example.items()
    )


def _free_text(sizes: tuple[int, ...], free_length: int | None) -> tuple[int, ...]:
    return (-1,) if sizes == (free_length,) else sizes


def plain_examples(inputs: Sequence[TensorSpec], batch: int, length: int) -> Arrays:
    """Arrays for inputs of which only the signature is known, the same at every call.

    Floats are normal. Integers are ones: in nearly every graph a valid token, index and mask alike.
    """
    rng = np.random.default_rng(_EXAMPLE_SEED)
    return {spec.name: _plain_example(spec, batch, length, rng) for spec in inputs}


def _plain_example(
    spec: TensorSpec, batch: int, length: int, rng: np.random.Generator
) -> np.ndarray[Any, np.dtype[Any]]:
    free = [batch if axis == 0 else length for axis in range(len(spec.shape))]
    shape = tuple(free[axis] if size == -1 else size for axis, size in enumerate(spec.shape))
    dtype = numpy_dtype(spec.dtype)
    return rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.ones(shape, dtype)


def outputs_of(
    module: Callable[..., Any],
    inputs: Sequence[TensorSpec],
    examples: Callable[[int, int], Arrays],
    what: str,
) -> tuple[TensorSpec, ...]:
    """Run a module twice, with different free sizes, and describe its outputs.

    Raises:
        BadInput: it fails on its own example inputs.
    """
    names = [spec.name for spec in inputs]
    try:
        first = run(module, examples(*_FIRST_RUN), names)
        second = run(module, examples(*_SECOND_RUN), names)
    except EdgekitError:
        raise
    except Exception as error:  # whatever a user's module raises
        reason = str(error).strip().splitlines() or [""]
        raise BadInput(
            f"{what} fails on its example inputs",
            f"{type(error).__name__}: {reason[0]}",
            "it has to run with "
            + ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in inputs),
        ) from error
    if {name: array.ndim for name, array in first.items()} != {
        name: array.ndim for name, array in second.items()
    }:
        raise BadInput(
            f"{what} answers differently for different batches",
            f"a batch of {_FIRST_RUN[0]} gives {_shapes(first)}, one of {_SECOND_RUN[0]} {_shapes(second)}",
            "a model keeps the number of its outputs and of their axes",
        )
    return tuple(
        TensorSpec(name, protocol_dtype(array.dtype), _free(array.shape, second[name].shape))
        for name, array in first.items()
    )


def _shapes(arrays: Arrays) -> str:
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())


def _free(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    return tuple(a if a == b else -1 for a, b in zip(first, second, strict=True))
