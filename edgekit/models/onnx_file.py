"""Models that are ONNX files already, with or without external data."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_agent.manifest import TensorSpec
from edgekit.artifact import file_digest
from edgekit.errors import BadInput
from edgekit.models import Model, combined_digest, model_name
from edgekit.models.signature import plain_examples
from edgekit.tensors import protocol_dtype

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto, ValueInfoProto

#: The largest model that is read, external data included.
MAX_MODEL_BYTES = 16 << 30
_PROTOBUF_LIMIT_BYTES = 2 << 30


def load(path: Path) -> Model:
    """Read and check an ONNX file.

    Raises:
        BadInput: damaged, invalid, too large, or with external data that is missing, short or outside the
            model's directory.
    """
    _check_size(path, path.stat().st_size, _PROTOBUF_LIMIT_BYTES)
    model = _parse(path)
    data_files = _external_files(path, model)
    _check_size(path, sum(file.stat().st_size for file in {path, *data_files}), MAX_MODEL_BYTES)
    _check(path)
    inputs = _inputs(path, model)
    return Model(
        kind="onnx",
        name=model_name(path.stem),
        digest=combined_digest(
            {"graph": file_digest(path)} | {file.name: file_digest(file) for file in data_files}
        ),
        inputs=inputs,
        outputs=tuple(_spec(path, info) for info in model.graph.output),
        path=path,
        preprocess=None,
        _examples=partial(plain_examples, inputs),
    )


def _parse(path: Path) -> ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise _damaged(path, f"it is not ONNX: {error}") from error
    if not model.graph.node:
        raise _damaged(path, "its graph is empty")
    return model


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(path)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise _damaged(path, str(error).strip().splitlines()[0]) from error


def _check_size(path: Path, size_bytes: int, limit_bytes: int) -> None:
    if size_bytes > limit_bytes:
        raise BadInput(
            f"the model {path} is too large",
            f"{size_bytes} bytes; the limit is {limit_bytes}",
            "give a smaller model, or keep its weights as external data",
        )


def _external_files(path: Path, model: ModelProto) -> list[Path]:
    """Files with external data; each has to lie beside the model and to be as long as the model says."""
    found: set[Path] = set()
    for tensor in _tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if not entries:
            continue
        location = entries.get("location", "")
        if not _is_text(location):
            raise _damaged(path, f"the data of {tensor.name!r} has no readable location")
        file = path.parent / location
        if not file.resolve().is_relative_to(path.parent.resolve()) or file.is_symlink():
            raise _damaged(path, f"the data of '{tensor.name}' lies outside its directory: {location}")
        if not file.is_file():
            raise _damaged(path, f"the data of '{tensor.name}' is missing: {location}")
        _check_extent(path, tensor.name, entries, file)
        found.add(file)
    return sorted(found)


def _check_extent(path: Path, name: str, entries: dict[str, str], file: Path) -> None:
    try:
        end_bytes = int(entries.get("offset", "0")) + int(entries.get("length", "0"))
    except ValueError as error:
        raise _damaged(path, f"the data of '{name}' has a malformed offset or length") from error
    if end_bytes > file.stat().st_size:
        raise _damaged(path, f"{file.name} is too short for '{name}'")


def _tensors(model: ModelProto) -> list[TensorProto]:
    """Every tensor that may have external data: initializers and attributes, subgraphs too."""
    from onnx.external_data_helper import _get_all_tensors

    return list(_get_all_tensors(model))


def _inputs(path: Path, model: ModelProto) -> tuple[TensorSpec, ...]:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_spec(path, info) for info in model.graph.input if info.name not in constants)
    if not inputs:
        raise _damaged(path, "it has no inputs")
    return inputs


def _spec(path: Path, info: ValueInfoProto) -> TensorSpec:
    import onnx

    tensor = info.type.tensor_type
    if not _is_text(info.name):
        raise _damaged(path, f"a tensor has the name {info.name!r}")
    try:
        dtype = protocol_dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError as error:
        names = {number: name for name, number in onnx.TensorProto.DataType.items()}
        kind = names.get(tensor.elem_type, f"type {tensor.elem_type}")
        raise BadInput(
            f"the model {path} is not one that edgekit takes",
            f"'{info.name}' is no tensor of numbers: {kind}",
            "cut text, sequence and map inputs and outputs off the graph",
        ) from error
    shape = tuple(_dimension(dimension) for dimension in tensor.shape.dim)
    return TensorSpec(info.name, dtype, shape)


def _is_text(value: Any) -> bool:
    """Whether a protobuf string is one: damaged ones come as bytes, or with characters that no name has."""
    return isinstance(value, str) and value.isprintable() and value != ""


def _dimension(dimension: Any) -> int:
    """A free size has a name, or nothing at all; a zero is what some exporters write for it."""
    return dimension.dim_value if dimension.HasField("dim_value") and dimension.dim_value > 0 else -1


def _damaged(path: Path, why: str) -> BadInput:
    return BadInput(
        f"the model {path} is not a valid ONNX file",
        why,
        "export it again, or copy it again with its external data",
    )
