"""What a model configuration asks for, checked: frozen dataclasses made from a document.

Meanings are those of Triton's model configuration: with ``max_batch_size`` above zero every tensor has a
batch axis in front that ``dims`` leaves out; with zero, ``dims`` is the whole shape and requests never share
a run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, List, Mapping, Optional, Sequence, Tuple

from device_agent.repository.document import ConfigError, Document, Parsed, decimal
from device_agent.tensors import element_count

Dims = Tuple[int, ...]


@dataclass(frozen=True)
class TensorConfig:
    """An input or an output.

    Attributes:
        name: the tensor's name, in the graph too.
        dtype: a type of the Open Inference Protocol; empty: as the graph has it.
        dims: sizes as clients see them, -1 where free; None: as the graph has them.
        reshape: sizes as the graph has them; None: the same as ``dims``.
        label_filename: names of the classes, one a line; empty: they have none.
    """

    name: str
    dtype: str
    dims: Optional[Dims]
    reshape: Optional[Dims] = None
    label_filename: str = ""


@dataclass(frozen=True)
class VersionPolicy:
    """Which versions are served: the ``latest`` so many, the ``specific`` ones, or with neither all."""

    latest: Optional[int] = 1
    specific: Optional[Tuple[int, ...]] = None

    def choose(self, available: Sequence[int]) -> List[int]:
        """The versions to serve, ascending, of those that are there."""
        ordered = sorted(available)
        if self.specific is not None:
            return [version for version in ordered if version in self.specific]
        return ordered if self.latest is None else ordered[-self.latest :]


@dataclass(frozen=True)
class WarmupInput:
    """What a warm-up sends to one input: zeros, random values, or the raw bytes of a file."""

    dtype: str
    dims: Dims
    source: str
    file: str = ""


@dataclass(frozen=True)
class Warmup:
    """Runs before the model is ready.

    Attributes:
        name: of the sample.
        batch_size: rows; 0 or 1 where the model has no batch axis.
        inputs: by input name.
        count: how often it runs.
    """

    name: str
    batch_size: int
    inputs: Mapping[str, WarmupInput]
    count: int


@dataclass(frozen=True)
class ModelConfig:
    """A checked configuration.

    Attributes:
        name: the model's name, which is its directory's.
        max_batch_size: most rows in a run; 0: the first axis is no batch.
        inputs, outputs: the tensors; empty: as the graph has them.
        version_policy: which versions are served.
        filename: of the graph, inside a version's directory.
        threads: threads of one run; None: as the agent's configuration says.
        dynamic_batching: the message of that name; None: requests run one by one.
        warmups: runs before it is ready.
        document: the whole configuration in Triton's JSON form.
        notes: what has no effect here, for the log.
    """

    name: str
    max_batch_size: int = 0
    inputs: Tuple[TensorConfig, ...] = ()
    outputs: Tuple[TensorConfig, ...] = ()
    version_policy: VersionPolicy = VersionPolicy()
    filename: str = "model.onnx"
    threads: Optional[int] = None
    dynamic_batching: Optional[Mapping[str, Any]] = None
    warmups: Tuple[Warmup, ...] = ()
    document: Mapping[str, Any] = field(default_factory=dict)
    notes: Tuple[str, ...] = ()


def read(parsed: Parsed, name: str) -> ModelConfig:
    """Check a configuration.

    Args:
        parsed: what was read.
        name: the model's directory.

    Raises:
        ConfigError: it contradicts itself, or asks for what this agent does not do.
    """
    document = parsed.document
    _check_identity(document, name)
    batch = document.get("max_batch_size", 0)
    if batch < 0:
        raise _refused(name, "max_batch_size", "it is negative", "give zero or more")
    if document.get("model_transaction_policy", {}).get("decoupled"):
        raise _refused(
            name, "model_transaction_policy", "each request has one answer here", "remove 'decoupled'"
        )
    if "dynamic_batching" in document and batch == 0 and document.get("input"):
        raise _refused(name, "dynamic_batching", "max_batch_size is 0", "give max_batch_size, or remove it")
    return ModelConfig(
        name=name,
        max_batch_size=batch,
        inputs=tuple(_tensor(name, "input", item, batch) for item in document.get("input", [])),
        outputs=tuple(_tensor(name, "output", item, batch) for item in document.get("output", [])),
        version_policy=_version_policy(name, document.get("version_policy", {})),
        filename=_filename(name, "default_model_filename", document.get("default_model_filename", ""))
        or "model.onnx",
        threads=_threads(name, document.get("parameters", {})),
        dynamic_batching=document.get("dynamic_batching"),
        warmups=tuple(_warmup(name, item) for item in document.get("model_warmup", [])),
        document=document,
        notes=tuple(_notes(parsed)),
    )


def _check_identity(document: Document, name: str) -> None:
    if document.get("name", name) != name:
        raise _refused(
            name, "name", f"it says '{document['name']}' in the directory '{name}'", "make both the same"
        )
    for key, only in (("platform", "onnxruntime_onnx"), ("backend", "onnxruntime"), ("runtime", "")):
        value = document.get(key, "")
        if value not in ("", only):
            raise _refused(
                name, key, f"it asks for '{value}'; the agent runs ONNX models", "export the model to ONNX"
            )


# Tensors


def _tensor(model: str, kind: str, item: Document, batch: int) -> TensorConfig:
    name = item.get("name", "")
    where = f"{kind} '{name}'"
    if not name:
        raise _refused(model, kind, "one has no name", "name every input and output")
    for flag in ("allow_ragged_batch", "optional", "is_shape_tensor", "is_non_linear_format_io"):
        if item.get(flag):
            raise _refused(model, f"{where}: {flag}", "the agent has no such tensors", f"remove '{flag}'")
    dims = tuple(item["dims"]) if item.get("dims") else None
    if any(size != -1 and size < 1 for size in dims or ()):
        raise _refused(model, f"{where}: dims", f"they are {list(dims or ())}", "give sizes above 0, or -1")
    reshape = tuple(item["reshape"].get("shape", [])) if "reshape" in item else None
    if reshape is not None and (dims is None or not _same_elements(dims, reshape)):
        given = list(dims or ())
        raise _refused(
            model, f"{where}: reshape", f"{given} cannot become {list(reshape)}", "correct the sizes"
        )
    return TensorConfig(
        name=name,
        dtype=protocol_dtype(item.get("data_type", "TYPE_INVALID")),
        dims=dims,
        reshape=reshape,
        label_filename=_filename(model, f"{where}: label_filename", item.get("label_filename", "")),
    )


def protocol_dtype(data_type: str) -> str:
    """The protocol's name of ``TYPE_...``; empty for ``TYPE_INVALID``."""
    name = data_type[len("TYPE_") :]
    return {"STRING": "BYTES", "INVALID": ""}.get(name, name)


def _same_elements(dims: Dims, reshape: Dims) -> bool:
    """Whether sizes hold equally many elements; free ones must correspond one to one, in order."""
    if any(size != -1 and size < 1 for size in reshape) or dims.count(-1) != reshape.count(-1):
        return False
    return abs(element_count(dims)) == abs(element_count(reshape))


# The rest


def _version_policy(model: str, policy: Document) -> VersionPolicy:
    if len(policy) > 1:
        raise _refused(model, "version_policy", f"it has {sorted(policy)}", "choose one of them")
    if "all" in policy:
        return VersionPolicy(latest=None)
    if "specific" in policy:
        return VersionPolicy(latest=None, specific=tuple(policy["specific"].get("versions", [])))
    latest = policy.get("latest", {}).get("num_versions", 1)
    if latest < 1:
        raise _refused(model, "version_policy", "it serves no version", "give num_versions above 0")
    return VersionPolicy(latest=latest)


def _threads(model: str, parameters: Document) -> Optional[int]:
    """Triton's ONNX Runtime backend reads its number of threads from the parameters."""
    value = parameters.get("intra_op_thread_count", {}).get("string_value")
    if value is None:
        return None
    threads = decimal(value)
    if threads is None or threads > 1024:
        raise _refused(
            model, "parameters: intra_op_thread_count", f"it is '{value[:100]}'", "give a number of threads"
        )
    return threads


def _warmup(model: str, item: Document) -> Warmup:
    where = f"model_warmup '{item.get('name', '')}'"
    inputs = {
        name: _warmup_input(model, f"{where}: input '{name}'", given)
        for name, given in item.get("inputs", {}).items()
    }
    batch_size = item.get("batch_size", 0)
    count = item.get("count", 0) or 1
    if not 0 <= batch_size <= 65536 or not 0 < count <= 1000:
        raise _refused(model, where, "batch_size or count is out of bounds", "give smaller numbers")
    return Warmup(item.get("name", ""), batch_size, inputs, count)


def _warmup_input(model: str, where: str, given: Document) -> WarmupInput:
    sources = [key for key in ("zero_data", "random_data", "input_data_file") if given.get(key)]
    dtype = protocol_dtype(given.get("data_type", "TYPE_INVALID"))
    dims = tuple(given.get("dims", []))
    if len(sources) != 1 or not dtype or any(size < 1 for size in dims) or element_count(dims) > 2**28:
        raise _refused(
            model,
            where,
            "it needs a data_type, fixed dims, and one of zero_data, random_data and input_data_file",
            "correct the warm-up",
        )
    file = _filename(model, where, given.get("input_data_file", ""))
    return WarmupInput(dtype, dims, sources[0], file)


def _filename(model: str, where: str, name: str) -> str:
    if "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise _refused(model, where, f"'{name}' leaves its directory", "give the name of a file")
    return name


def _notes(parsed: Parsed) -> List[str]:
    notes = [f"'{name}' has no effect here" for name in parsed.ignored]
    groups = parsed.document.get("instance_group", [])
    if any(group.get("kind") == "KIND_GPU" for group in groups):
        notes.append("'instance_group' asks for a GPU; the model runs on the CPU")
    if any(group.get("count", 1) > 1 for group in groups):
        notes.append("'instance_group' asks for several instances; one uses all cores that it is given")
    unused = sorted(set(parsed.document.get("parameters", {})) - {"intra_op_thread_count"})
    if unused:
        notes.append(f"the parameters {', '.join(unused)} have no effect here")
    return notes


def _refused(model: str, where: str, why: str, fix: str) -> ConfigError:
    return ConfigError(f"the configuration of model '{model}' cannot be served", f"{where}: {why}", fix)
