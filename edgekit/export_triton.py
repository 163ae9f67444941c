"""Write a bundle as a model of a Triton repository: ``config.pbtxt``, the graph, and the names of classes.

    DIR/NAME/config.pbtxt
    DIR/NAME/labels.txt            only with labels
    DIR/NAME/VERSION/model.onnx

The layout and the fields are those of Triton's "Model Repository" and ``model_config.proto``. A repository
holds one configuration for all versions of a model, so a bundle whose tensors differ from those that are
there is refused rather than mixed in. Golden outputs, signature and preprocessing have no place in that
format and stay behind.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from device_agent.manifest import Manifest, TensorSpec
from edgekit.bundle import OpenBundle, bundle_errors, open_bundle, write_atomically
from edgekit.errors import BadInput, nearest

_HEADER = "# Written by edgekit export-triton."
_LABELS_NAME = "labels.txt"


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        name: the model's.
        version: its directory's name.
        directory: ``DIR/NAME``.
        digest: the bundle's.
    """

    name: str
    version: int
    directory: Path
    digest: str


def export(bundle_path: Path, repository: Path, labels: str | None = None) -> Exported:
    """Add a bundle to a model repository.

    Args:
        bundle_path: the bundle, either form.
        repository: DIR; created if it is not there. Other models and other versions are left as they are.
        labels: a file with the name of a class in each line, or ``OUTPUT=FILE`` where the model has several
            outputs.

    Raises:
        BadInput: not a bundle, no such output, a file that cannot be read or written, or a model of that name
            that is not this one.
    """
    with open_bundle(bundle_path) as opened, bundle_errors():
        manifest = opened.manifest
        if manifest.composition:
            raise BadInput(
                f"{manifest.name} cannot be a model of a Triton repository",
                f"it is made of {len(manifest.composition)} graphs, which edgekit-agent chains",
                "serve it with edgekit-agent, or export each graph's own bundle",
            )
        directory = repository / manifest.name
        output, names = _labels(manifest, labels)
        config = config_text(manifest, {output: _LABELS_NAME} if output else {})
        _refuse_another(directory, config)
        directory.mkdir(parents=True, exist_ok=True)
        _add_version(opened, directory / str(manifest.version))
        if names is not None:
            write_atomically(directory / _LABELS_NAME, names)
        write_atomically(directory / "config.pbtxt", config.encode())
        return Exported(manifest.name, manifest.version, directory, opened.digest)


def config_text(manifest: Manifest, labels: dict[str, str]) -> str:
    """``config.pbtxt`` of a bundle.

    Args:
        manifest: the bundle's.
        labels: the file with the names of classes, by output.
    """
    batched = all(spec.shape[:1] == (-1,) for spec in manifest.inputs + manifest.outputs)
    lines = [
        _HEADER,
        f"name: {_quoted(manifest.name)}",
        'platform: "onnxruntime_onnx"',
        'backend: "onnxruntime"',
        f"max_batch_size: {manifest.max_batch_size if batched else 0}",
        *_tensors("input", manifest.inputs, batched, {}),
        *_tensors("output", manifest.outputs, batched, labels),
    ]
    if batched and manifest.max_batch_size > 1:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _tensors(kind: str, specs: Sequence[TensorSpec], batched: bool, labels: dict[str, str]) -> Iterable[str]:
    for spec in specs:
        data_type = "TYPE_STRING" if spec.dtype == "BYTES" else f"TYPE_{spec.dtype}"
        dims = spec.shape[1:] if batched else spec.shape
        yield f"{kind} {{"
        yield f"  name: {_quoted(spec.name)}"
        yield f"  data_type: {data_type}"
        yield f"  dims: [ {', '.join(map(str, dims or (1,)))} ]"
        if not dims:  # Triton has no empty dims
            yield "  reshape { shape: [ ] }"
        if spec.name in labels:
            yield f"  label_filename: {_quoted(labels[spec.name])}"
        yield "}"


def _quoted(text: str) -> str:
    """A string of protobuf's text format; all but plain ASCII as octal bytes of UTF-8."""
    plain = (
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode()
    )
    return f'"{"".join(plain)}"'


def _labels(manifest: Manifest, wanted: str | None) -> tuple[str, bytes | None]:
    """The output that has names of classes, and their file's content; an empty name without."""
    if wanted is None:
        return "", None
    outputs = [spec.name for spec in manifest.outputs]
    output, has_output, file = wanted.rpartition("=")
    if not has_output and len(outputs) > 1:
        raise BadInput(
            "which output has these labels?",
            f"the model has {len(outputs)}: {', '.join(outputs)}",
            f"give --labels {outputs[0]}={wanted}",
        )
    if has_output and output not in outputs:
        raise BadInput(
            f"there is no output '{output}'", "labels belong to an output", nearest(output, outputs)
        )
    try:
        return output or outputs[0], Path(file).read_bytes()
    except OSError as error:
        raise BadInput(
            f"the labels {file} cannot be read",
            error.strerror or str(error),
            "give --labels a file with a name a line",
        ) from error


def _refuse_another(directory: Path, config: str) -> None:
    """Never change what a team wrote by hand, nor what other versions of the model rely on."""
    path = directory / "config.pbtxt"
    if not directory.exists() or (path.exists() and path.read_bytes() == config.encode()):
        return
    if any(entry.name.isdecimal() for entry in directory.iterdir()) or path.exists():
        raise BadInput(
            f"{directory} holds another model",
            "its config.pbtxt is not what this bundle needs",
            "export into another directory, or move that model away",
        )


def _add_version(opened: OpenBundle, target: Path) -> None:
    """Publish the graph whole or not at all: a server may be watching the repository."""
    graph = opened.directory / opened.manifest.graph
    if target.exists():
        if not filecmp.cmp(graph, target / "model.onnx", shallow=False):
            raise BadInput(
                f"{target} holds another graph",
                f"version {target.name} of {target.parent.name} was exported before",
                "build the bundle with a higher version, or remove that directory",
            )
        return
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    shutil.copyfile(graph, fresh / "model.onnx")
    os.rename(fresh, target)
