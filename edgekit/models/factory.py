"""Models that a function builds: ``package.module:factory``, with a weights file."""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.artifact import file_digest
from edgekit.errors import BadInput
from edgekit.models import Model, combined_digest, model_name, weights
from edgekit.models.signature import inputs_of, outputs_of
from edgekit.objects import load_callable, load_module, source_digest
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    from torch import nn


def load(spec: str, weights_file: Path | None, sample: Arrays | None) -> Model:
    """Build the model once, put the weights in, and learn its signature.

    A function ``example_inputs`` in the factory's module may return the inputs: a tensor or an array, a
    tuple of them in the order of ``forward``, or a dict by name; batch axis first.

    Raises:
        BadInput: the factory or the weights do not work, or nothing says what the inputs look like.
    """
    factory = load_callable(spec)
    build = partial(_build, spec, factory, weights_file)
    module = build()
    rows = _example_rows(spec, module, sample)
    examples = partial(_cycled, rows)
    inputs = inputs_of(rows, free_length=_text_length(rows))
    return Model(
        kind="torch",
        name=model_name(spec.partition(":")[2]),
        digest=_digest(spec, module, weights_file),
        inputs=inputs,
        outputs=outputs_of(module, inputs, examples, spec),
        path=None,
        preprocess=None,
        _examples=examples,
        _build=build,
    )


def _build(spec: str, factory: Callable[[], Any], weights_file: Path | None) -> nn.Module:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that what the file does not set is the same every time
        try:
            module = factory()
        except Exception as error:  # whatever a user's function raises
            raise BadInput(
                f"{spec} failed",
                f"{type(error).__name__}: {error}",
                "the factory is called without arguments",
            ) from error
    if not isinstance(module, torch.nn.Module):
        raise BadInput(
            f"{spec} is not a model factory",
            f"it returned a {type(module).__name__}",
            "return a torch.nn.Module",
        )
    if weights_file is not None:
        weights.fill(module, weights.read(weights_file), weights_file)
    return module.eval()


def _example_rows(spec: str, module: nn.Module, sample: Arrays | None) -> Arrays:
    """Example inputs by name, batch axis first: the module's own, else one sample of the data."""
    names = _forward_names(module)
    own = getattr(load_module(spec), "example_inputs", None)
    if own is not None:
        return _named(spec, own(), names)
    if sample is None:
        raise BadInput(
            f"nothing says what inputs {spec} takes",
            "there is no function example_inputs beside the factory, and no data to take the shape from",
            "define example_inputs() in that module, returning a batch of inputs",
        )
    if len(sample) == 1 and len(names) == 1:
        return {names[0]: next(iter(sample.values()))[None]}
    _check_names(spec, set(sample), names)
    return {name: sample[name][None] for name in names if name in sample}


def _named(spec: str, value: Any, names: list[str]) -> Arrays:
    if isinstance(value, dict):
        _check_names(spec, set(value), names)
        return {name: _array(spec, value[name]) for name in names if name in value}
    values = value if isinstance(value, tuple | list) else (value,)
    if len(values) > len(names):
        raise BadInput(
            f"the example inputs of {spec} are too many",
            f"forward takes {', '.join(names)}; example_inputs returned {len(values)} inputs",
            "return a tuple with one batch for each input of forward",
        )
    return {name: _array(spec, item) for name, item in zip(names, values, strict=False)}


def _check_names(spec: str, given: set[str], names: list[str]) -> None:
    if not given <= set(names):
        raise BadInput(
            f"the example inputs of {spec} have the wrong names",
            f"forward takes {', '.join(names)}; there is {', '.join(sorted(given))}",
            "name the inputs as forward does",
        )


def _array(spec: str, value: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(value.detach().numpy() if hasattr(value, "detach") else value)
    if array.ndim == 0 or array.shape[0] == 0:
        raise BadInput(
            f"the example inputs of {spec} have no batch axis",
            f"an input has the shape {list(array.shape)}",
            "return inputs with the batch axis first, at least one row",
        )
    return array


def _forward_names(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in positional]


def _text_length(rows: Arrays) -> int | None:
    """Length of the texts, if these are texts: then it is free, as an attention mask says what counts."""
    mask = rows.get("attention_mask")
    return None if mask is None or mask.ndim != 2 else int(mask.shape[1])


def _cycled(rows: Arrays, batch: int, length: int) -> Arrays:
    """The rows over and over; texts are cut or repeated to ``length``."""
    text_length = _text_length(rows)
    arrays = {name: array[np.arange(batch) % len(array)] for name, array in rows.items()}
    return {
        name: array[:, np.arange(length) % text_length]
        if text_length is not None and array.shape[1:] == (text_length,)
        else array
        for name, array in arrays.items()
    }


def _digest(spec: str, module: nn.Module, weights_file: Path | None) -> str:
    """Over the factory's source, its layers' sources and the weights."""
    parts = {"factory": spec, "layers": repr(module)}
    for source in {load_module(spec), *(_module_of(layer) for layer in module.modules())} - {None}:
        if (
            source is not None and source.__name__.split(".")[0] != "torch"
        ):  # torch is among the tool versions
            parts[source.__name__] = source_digest(source)
    if weights_file is not None:
        parts["weights"] = file_digest(weights_file)
    else:
        parts["state"] = _state_digest(module)
    return combined_digest(parts)


def _module_of(layer: nn.Module) -> ModuleType | None:
    return sys.modules.get(type(layer).__module__)


def _state_digest(module: nn.Module) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
