"""Models: what ``compress`` starts from, in one type whatever form it came in.

    model = load_model("bert-dir/")                                      a Hugging Face directory
    model = load_model("package.module:factory", Path("w.safetensors"))  a function that builds a torch module
    model = load_model("model.pt2")                                      a torch.export program
    model = load_model("model.onnx")                                     an ONNX graph

    model.inputs, model.outputs    the signature: names, types, shapes with the batch axis first, -1 = free
    model.module()                 a new torch module in inference mode; takes the inputs by position
    model.example(batch=2)         arrays that fit the signature, the same at every call
    model.preprocess               how raw data becomes inputs, where the model's own files say so

Loading never executes code that came with weights: no pickles, no remote code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from device_agent.manifest import TensorSpec
from edgekit.errors import BadInput
from edgekit.objects import is_object_spec
from edgekit.preprocess import Preprocess
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    from torch import nn

#: Size that a free axis other than the batch gets in ``Model.example``.
EXAMPLE_LENGTH = 16


@dataclass(frozen=True)
class Model:
    """A model that was found, read and run once.

    Attributes:
        kind: ``torch`` (a module whose structure can be pruned), ``exported`` (a torch.export program: it
            runs and exports, but is not pruned) or ``onnx`` (no torch module).
        name: from its source, fit for ``Manifest.name``.
        digest: SHA-256 over the content that defines it.
        inputs, outputs: the signature.
        path: the directory or file it came from; None for a factory.
        preprocess: as the caller or else the model's own files say; None where neither says anything.
    """

    kind: Literal["torch", "exported", "onnx"]
    name: str
    digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    path: Path | None
    preprocess: Preprocess | None
    _examples: Callable[[int, int], Arrays] = field(repr=False, compare=False)
    _build: Callable[[], nn.Module] | None = field(default=None, repr=False, compare=False)

    def module(self) -> nn.Module:
        """Build the module anew, in inference mode, on the CPU, with its weights.

        Raises:
            BadInput: this is an ONNX model, which has no torch module.
        """
        if self._build is None:
            raise BadInput(
                f"the model {self.name} has no torch module",
                "it is an ONNX graph: it can be quantized, but neither pruned nor trained",
                "give the torch model it was exported from",
            )
        return self._build()

    def example(self, batch: int, length: int = EXAMPLE_LENGTH) -> Arrays:
        """Arrays by input name that fit the signature; reproducible, rows differ.

        Args:
            batch: number of rows; ignored where the batch axis is fixed.
            length: size of every other free axis.
        """
        return self._examples(batch, length)


def load_model(
    spec: str | Path,
    weights: Path | None = None,
    *,
    sample: Arrays | None = None,
    preprocess: Preprocess | None = None,
) -> Model:
    """Load a model in any of its forms.

    Args:
        spec: a directory, ``package.module:factory``, a ``.pt2`` or an ``.onnx`` file.
        weights: ``.safetensors`` (or ``.pt``, ``.bin``, read without executing anything) for a factory.
        sample: one sample of the data, without batch axis; the shape for a factory that has no
            ``example_inputs`` beside it.
        preprocess: takes the place of what the model's own files say; its size of images is the model's.

    Raises:
        BadInput: missing, malformed, not a form that edgekit reads, or something that would execute code.
    """
    text = str(spec)
    if is_object_spec(text) and not Path(text).exists():
        from edgekit.models import factory

        return replace(factory.load(text, weights, sample), preprocess=preprocess)
    path = Path(spec)
    if weights is not None:
        raise BadInput(
            f"--weights does not go with {text}",
            "a directory, a .pt2 and an .onnx file carry their own weights",
            "leave --weights out, or give package.module:factory",
        )
    if not path.exists():
        raise BadInput(
            f"the model {text} does not exist",
            "there is no such file or directory, and it is not package.module:factory",
            "check the path",
        )
    return _load_path(path, preprocess)


def _load_path(path: Path, preprocess: Preprocess | None) -> Model:
    if path.is_dir():
        from edgekit.models import huggingface

        return huggingface.load(path, preprocess)
    if path.suffix == ".onnx":
        from edgekit.models import onnx_file

        return replace(onnx_file.load(path), preprocess=preprocess)
    if path.suffix == ".pt2":
        from edgekit.models import exported

        return replace(exported.load(path), preprocess=preprocess)
    raise BadInput(
        f"{path} is not a model that edgekit reads",
        "a model is a Hugging Face directory, package.module:factory, a .pt2 or an .onnx file",
        "give weights alone (.safetensors, .pt, .bin) as --weights, with package.module:factory as the model",
    )


def model_name(text: str) -> str:
    """The closest valid model name: letters, digits, ``.``, ``_`` and ``-``, at most 64."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:64] or "model"


def combined_digest(parts: Mapping[str, str]) -> str:
    """One SHA-256 for several named digests or settings."""
    return hashlib.sha256(json.dumps(dict(parts), sort_keys=True).encode()).hexdigest()
