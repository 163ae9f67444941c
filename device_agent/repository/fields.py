"""The fields of Triton's model configuration that this agent reads, and how the others are treated.

Facts from Triton's ``model_config.proto``. A field that would change what a request gets back, and that this
agent cannot honour, is refused by name; a hint about speed is accepted, reported once and otherwise left
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple


@dataclass(frozen=True)
class Field:
    """A field of a message.

    Attributes:
        kind: ``string``, ``int`` (64 bits), ``bool``, a tuple of enumerators in the order of their numbers,
            or a table of fields.
        repeated: whether it is a list.
        keyed: whether it is a map from strings or numbers to ``kind``.
    """

    kind: str | Tuple[str, ...] | Dict[str, Field]
    repeated: bool = False
    keyed: bool = False


DATA_TYPES = (
    "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8",
    "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING",
    "TYPE_BF16",
)  # fmt: skip

_STRING, _INT, _BOOL = Field("string"), Field("int"), Field("bool")
_INTS = Field("int", repeated=True)
_RESHAPE = Field({"shape": _INTS})
_INPUT = {
    "name": _STRING,
    "data_type": Field(DATA_TYPES),
    "format": Field(("FORMAT_NONE", "FORMAT_NHWC", "FORMAT_NCHW")),
    "dims": _INTS,
    "reshape": _RESHAPE,
    "is_shape_tensor": _BOOL,
    "allow_ragged_batch": _BOOL,
    "optional": _BOOL,
    "is_non_linear_format_io": _BOOL,
}
_OUTPUT = {
    "name": _STRING,
    "data_type": Field(DATA_TYPES),
    "dims": _INTS,
    "reshape": _RESHAPE,
    "label_filename": _STRING,
    "is_shape_tensor": _BOOL,
    "is_non_linear_format_io": _BOOL,
}
_QUEUE_POLICY = {
    "timeout_action": Field(("REJECT", "DELAY")),
    "default_timeout_microseconds": _INT,
    "allow_timeout_override": _BOOL,
    "max_queue_size": _INT,
}
_DYNAMIC_BATCHING = {
    "preferred_batch_size": _INTS,
    "max_queue_delay_microseconds": _INT,
    "preserve_ordering": _BOOL,
    "priority_levels": _INT,
    "default_priority_level": _INT,
    "default_queue_policy": Field(_QUEUE_POLICY),
    "priority_queue_policy": Field(_QUEUE_POLICY, keyed=True),
}
_INSTANCE_GROUP = {
    "name": _STRING,
    "kind": Field(("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")),
    "count": _INT,
    "gpus": _INTS,
    "passive": _BOOL,
    "host_policy": _STRING,
    "profile": Field("string", repeated=True),
}
_WARMUP_INPUT = {
    "data_type": Field(DATA_TYPES),
    "dims": _INTS,
    "zero_data": _BOOL,
    "random_data": _BOOL,
    "input_data_file": _STRING,
}
_WARMUP = {
    "name": _STRING,
    "batch_size": _INT,
    "inputs": Field(_WARMUP_INPUT, keyed=True),
    "count": _INT,
}
_VERSION_POLICY = {
    "latest": Field({"num_versions": _INT}),
    "all": Field({}),
    "specific": Field({"versions": _INTS}),
}
MODEL_CONFIG = {
    "name": _STRING,
    "platform": _STRING,
    "backend": _STRING,
    "runtime": _STRING,
    "version_policy": Field(_VERSION_POLICY),
    "max_batch_size": _INT,
    "input": Field(_INPUT, repeated=True),
    "output": Field(_OUTPUT, repeated=True),
    "dynamic_batching": Field(_DYNAMIC_BATCHING),
    "instance_group": Field(_INSTANCE_GROUP, repeated=True),
    "default_model_filename": _STRING,
    "parameters": Field({"string_value": _STRING}, keyed=True),
    "model_warmup": Field(_WARMUP, repeated=True),
    "model_transaction_policy": Field({"decoupled": _BOOL}),
}

REFUSED = {
    "sequence_batching": "the agent keeps no state between requests",
    "ensemble_scheduling": "the agent serves no ensembles; a bundle's composition chains graphs instead",
    "batch_input": "the agent makes no inputs of its own",
    "batch_output": "the agent scatters no outputs",
    "model_operations": "the agent loads no custom operators",
    "model_repository_agents": "the agent runs no repository agents",
    "cc_model_filenames": "the agent picks no file by GPU",
}
SCHEDULERS = ("sequence_batching", "ensemble_scheduling")  # which are chosen by an empty message already
WITHOUT_EFFECT = ("optimization", "response_cache", "metric_tags", "model_metrics")
