"""Fill in what a configuration leaves to the graph, as Triton does, and hold the rest against it. Pure.

Triton's rules for ONNX: where inputs or outputs are not given, they are the graph's; where, besides,
``max_batch_size`` is zero and the first axis of every tensor is free, that axis becomes the batch, of up to
``DEFAULT_MAX_BATCH_SIZE`` rows, and requests are batched dynamically. A tensor that would be left without an
axis is given one of size 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

from device_agent.manifest import TensorSpec
from device_agent.repository.document import ConfigError
from device_agent.repository.model_config import Dims, ModelConfig, TensorConfig

DEFAULT_MAX_BATCH_SIZE = 4  # Triton's default-max-batch-size


def complete(config: ModelConfig, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> ModelConfig:
    """Complete a configuration from the tensors of its graph.

    Args:
        config: what was read; ``ModelConfig(name)`` where there is no file.
        inputs: the graph's.
        outputs: likewise.

    Returns:
        A configuration whose tensors all have a type and sizes.

    Raises:
        ConfigError: it names a tensor that the graph does not have, or contradicts the graph.
    """
    dynamic, batch = config.dynamic_batching, config.max_batch_size
    can_batch = all(spec.shape[:1] == (-1,) for spec in [*inputs, *outputs])
    if batch > 0 and not can_batch:
        raise _contradiction(
            config, f"max_batch_size is {batch}, but not every first axis of the graph is free"
        )
    if batch == 0 and can_batch and not (config.inputs and config.outputs):
        batch, dynamic = DEFAULT_MAX_BATCH_SIZE, dynamic or {}
    completed = replace(
        config,
        max_batch_size=batch,
        dynamic_batching=dynamic if batch else None,
        inputs=_tensors(config, config.inputs, inputs, batch, "input"),
        outputs=_tensors(config, config.outputs, outputs, batch, "output"),
    )
    missing = {spec.name for spec in inputs} - {tensor.name for tensor in completed.inputs}
    if missing:
        raise _contradiction(config, f"the graph has the input '{min(missing)}', the configuration does not")
    return replace(completed, document=_document(completed))


def specs(tensors: Sequence[TensorConfig], batch: int) -> Tuple[TensorSpec, ...]:
    """The tensors as clients see them, with the batch axis in front where there is one."""
    front = (-1,) if batch else ()
    return tuple(TensorSpec(t.name, t.dtype, front + (t.dims or ())) for t in tensors)


def _tensors(
    config: ModelConfig, given: Sequence[TensorConfig], graph: Sequence[TensorSpec], batch: int, kind: str
) -> Tuple[TensorConfig, ...]:
    known = {spec.name: spec for spec in graph}
    completed: List[TensorConfig] = []
    for tensor in given or [TensorConfig(spec.name, "", None) for spec in graph]:
        spec = known.get(tensor.name)
        if spec is None:
            raise _contradiction(config, f"the graph has no {kind} '{tensor.name}'; it has {sorted(known)}")
        completed.append(_tensor(config, tensor, spec, spec.shape[1:] if batch else spec.shape))
    return tuple(completed)


def _tensor(config: ModelConfig, tensor: TensorConfig, spec: TensorSpec, own: Dims) -> TensorConfig:
    dims, reshape = tensor.dims, tensor.reshape
    if dims is None:
        dims, reshape = (own, None) if own else ((1,), ())
    seen = dims if reshape is None else reshape
    if len(seen) != len(own) or any(a != b and -1 not in (a, b) for a, b in zip(seen, own)):
        raise _contradiction(config, f"'{spec.name}' has dims {list(seen)}, in the graph {list(own)}")
    if tensor.dtype not in ("", spec.dtype):
        raise _contradiction(config, f"'{spec.name}' is {tensor.dtype}, in the graph {spec.dtype}")
    return replace(tensor, dtype=spec.dtype, dims=dims, reshape=reshape)


def _document(config: ModelConfig) -> Dict[str, Any]:
    """The completed configuration as Triton shows it."""
    document: Dict[str, Any] = {
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [{"name": f"{config.name}_0", "kind": "KIND_CPU", "count": 1}],
        "parameters": {},
        **config.document,
        "name": config.name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": config.max_batch_size,
        "input": [_tensor_document(tensor) for tensor in config.inputs],
        "output": [_tensor_document(tensor) for tensor in config.outputs],
        "default_model_filename": config.filename,
    }
    if config.dynamic_batching is None:  # nothing is batched, whatever the file wishes
        document.pop("dynamic_batching", None)
    else:
        document["dynamic_batching"] = dict(config.dynamic_batching)
    return document


def _tensor_document(tensor: TensorConfig) -> Dict[str, Any]:
    kind = "STRING" if tensor.dtype == "BYTES" else tensor.dtype
    document: Dict[str, Any] = {
        "name": tensor.name,
        "data_type": f"TYPE_{kind}",
        "dims": list(tensor.dims or ()),
    }
    if tensor.reshape is not None:
        document["reshape"] = {"shape": list(tensor.reshape)}
    if tensor.label_filename:
        document["label_filename"] = tensor.label_filename
    return document


def _contradiction(config: ModelConfig, why: str, fix: Optional[str] = None) -> ConfigError:
    return ConfigError(
        f"the configuration of model '{config.name}' does not fit its graph",
        why,
        fix or "correct config.pbtxt, or remove it: the agent then takes all from the graph",
    )
