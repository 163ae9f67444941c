"""Preprocessing: how raw data (an image, a text) becomes the model's inputs, written down once.

The same description is applied to calibration data here and travels in the manifest for whoever sends
requests. ``None`` stands for "the model takes tensors as they are".

    from_huggingface(directory)   from preprocessor_config.json or tokenizer.json
    from_mapping(raw, base)       from a recipe or a manifest; paths are relative to ``base``
    to_manifest(description)      the JSON of ``Manifest.preprocessing``
    files(description)            files that the bundle has to carry for it
    apply(description, raw, names)   one sample's inputs by name, without batch axis
    digest(description)           its identity
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from edgekit.errors import BadInput, nearest
from edgekit.tensors import Arrays

if TYPE_CHECKING:
    from PIL.Image import Image
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"

Resample = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
PositiveInt = Annotated[int, Field(gt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Deviation = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ImagePreprocess(_Strict):
    """An upright image becomes float32 [channels, height, width]: ``(pixel * rescale - mean) / std``.

    Attributes:
        size: height and width that the model takes.
        channels: ``RGB``, or ``L`` for grey; images are converted.
        shortest_edge: the shorter edge is scaled to this and the middle of ``size`` cut out; None: the
            image is scaled to ``size``, whatever its proportions.
        resample: the filter of that scaling, as Pillow computes it; None: images must have ``size``.
        rescale: factor from 0...255 to the range that ``mean`` and ``std`` are for.
        mean, std: one for each channel.
        layout: of the batch.
    """

    kind: Literal["image"] = "image"
    size: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
    channels: Literal["RGB", "L"] = "RGB"
    shortest_edge: PositiveInt | None = None
    resample: Resample | None = "bilinear"
    rescale: Deviation = 1 / 255
    mean: Annotated[tuple[Finite, ...], Field(strict=False)]
    std: Annotated[tuple[Deviation, ...], Field(strict=False)]
    layout: Literal["NCHW"] = "NCHW"

    @model_validator(mode="after")
    def _consistent(self) -> ImagePreprocess:
        if not len(self.mean) == len(self.std) == len(self.channels):
            raise ValueError(
                f"mean and std need {len(self.channels)} values, one for each of {self.channels}"
            )
        if self.shortest_edge is not None and self.shortest_edge < max(self.size):
            raise ValueError("shortest_edge is smaller than size, so there is nothing to cut out")
        return self


class TextPreprocess(_Strict):
    """A text becomes int64 [length] arrays: ``input_ids``, ``attention_mask``, ``token_type_ids`` if asked.

    Attributes:
        tokenizer: a ``tokenizer.json``, which holds normalization, vocabulary and special tokens.
        max_length: longer texts are cut, special tokens included.
        padding: ``longest`` pads to the longest text of a batch, ``max_length`` always to ``max_length``.
        pad_id: token that pads; its mask is 0.
    """

    kind: Literal["text"] = "text"
    tokenizer: Annotated[Path, Field(strict=False)]
    max_length: PositiveInt
    padding: Literal["longest", "max_length"] = "longest"
    pad_id: Annotated[int, Field(ge=0)] = 0


Preprocess = ImagePreprocess | TextPreprocess
_ADAPTER: TypeAdapter[Preprocess] = TypeAdapter(Annotated[Preprocess, Field(discriminator="kind")])
_KINDS: dict[str, type[_Strict]] = {"image": ImagePreprocess, "text": TextPreprocess}


def from_huggingface(directory: Path) -> Preprocess | None:
    """What the directory says about its images or texts; None where it says nothing.

    Raises:
        BadInput: it asks for something that edgekit's preprocessing cannot do.
    """
    from edgekit.preprocess.huggingface import read

    return read(directory)


def from_mapping(raw: Mapping[str, Any] | None, base: Path) -> Preprocess | None:
    """Read a description from a recipe or a manifest.

    Raises:
        BadInput: an unknown key or a wrong value, or the tokenizer does not exist below ``base``.
    """
    if raw is None:
        return None
    try:
        description = _ADAPTER.validate_python(dict(raw))
    except ValidationError as error:
        raise _explain(error, raw) from error
    if isinstance(description, TextPreprocess):
        path = base / description.tokenizer
        if not path.is_file():
            raise BadInput(
                f"the tokenizer {path} does not exist",
                "preprocessing.tokenizer names no file",
                "give a tokenizer.json; AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one",
            )
        return description.model_copy(update={"tokenizer": path})
    return description


def to_manifest(description: Preprocess | None) -> dict[str, Any] | None:
    """JSON for ``Manifest.preprocessing``; the tokenizer is named as ``files`` names it in the bundle."""
    if description is None:
        return None
    raw = description.model_dump(mode="json")
    if isinstance(description, TextPreprocess):
        raw["tokenizer"] = TOKENIZER_FILE
    return raw


def files(description: Preprocess | None) -> dict[str, Path]:
    """Files to put into the bundle, by their path inside it."""
    return {TOKENIZER_FILE: description.tokenizer} if isinstance(description, TextPreprocess) else {}


def digest(description: Preprocess | None) -> str:
    """Lower-case hex SHA-256 over the settings and the contents of the files."""
    contents = {name: _sha256(path) for name, path in files(description).items()}
    canonical = json.dumps([to_manifest(description), contents], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def apply(description: Preprocess, raw: Image | str, names: Sequence[str]) -> Arrays:
    """Turn one raw sample into the model's inputs.

    Args:
        description: what to do.
        raw: a Pillow image, or a text.
        names: the model's inputs; for an image the one input.

    Returns:
        Arrays by input name, without batch axis.

    Raises:
        BadInput: the model's inputs do not fit the kind of data.
    """
    if isinstance(description, ImagePreprocess):
        if isinstance(raw, str):
            raise _wrong_kind("images", "texts")
        if len(names) != 1:
            raise _wrong_inputs("an image gives one input", names)
        return {names[0]: image_array(description, raw)}
    if not isinstance(raw, str):
        raise _wrong_kind("texts", "images")
    encoded = encode_text(description, raw)
    if not set(names) <= set(encoded):
        raise _wrong_inputs(f"a text gives {', '.join(encoded)}", names)
    return {name: encoded[name] for name in names}


def image_array(description: ImagePreprocess, image: Image) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Convert, scale, crop and normalize an image to float32 [channels, height, width]."""
    image = _resized(description, image.convert(description.channels))
    pixels = np.asarray(image, np.float32).reshape(*description.size, len(description.channels))
    mean = np.asarray(description.mean, np.float32)
    std = np.asarray(description.std, np.float32)
    normalized = (pixels * np.float32(description.rescale) - mean) / std
    return np.ascontiguousarray(normalized.transpose(2, 0, 1))


def encode_text(description: TextPreprocess, text: str) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """Tokenize a text to int64 [length] arrays, cut to ``max_length``; padded only for ``max_length``."""
    encoding = _tokenizer(description.tokenizer, description.max_length).encode(text)
    arrays = {
        "input_ids": np.asarray(encoding.ids, np.int64),
        "attention_mask": np.asarray(encoding.attention_mask, np.int64),
        "token_type_ids": np.asarray(encoding.type_ids, np.int64),
    }
    if description.padding == "longest":
        return arrays
    missing = description.max_length - len(encoding.ids)
    fill = {"input_ids": description.pad_id}
    return {
        name: np.pad(array, (0, missing), constant_values=fill.get(name, 0)) for name, array in arrays.items()
    }


class Placement(NamedTuple):
    """Where an image comes to lie: it is scaled to ``width`` x ``height``, and cut at ``left``, ``top``."""

    width: int
    height: int
    left: int
    top: int

    def x(self, before: float, image_width: int) -> float:
        """A horizontal position in the image of that width, in the model's pixels."""
        return before * self.width / image_width - self.left

    def y(self, before: float, image_height: int) -> float:
        """A vertical position, likewise."""
        return before * self.height / image_height - self.top


def placement(description: ImagePreprocess, width: int, height: int) -> Placement:
    """How an image of that size is scaled and cut."""
    model_height, model_width = description.size
    if description.shortest_edge is None or description.resample is None:
        return Placement(model_width, model_height, 0, 0)
    # Rounded as the Hugging Face processors round, so that pixels are those the model was trained on.
    edge = description.shortest_edge
    short, long = sorted((width, height))
    scaled = int(edge * long / short)
    new_width, new_height = (edge, scaled) if width <= height else (scaled, edge)
    return Placement(new_width, new_height, (new_width - model_width) // 2, (new_height - model_height) // 2)


def _resized(description: ImagePreprocess, image: Image) -> Image:
    from PIL import Image as pillow

    height, width = description.size
    if description.resample is None:
        if image.size != (width, height):
            raise BadInput(
                f"an image is {image.height} x {image.width} pixels, the model takes {height} x {width}",
                "its preprocessing does no resizing",
                "resize the images, or set preprocessing.resample in the recipe",
            )
        return image
    place = placement(description, *image.size)
    image = image.resize((place.width, place.height), pillow.Resampling[description.resample.upper()])
    return image.crop((place.left, place.top, place.left + width, place.top + height))


@lru_cache(maxsize=4)
def _tokenizer(path: Path, max_length: int) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every fault of the file
        raise BadInput(
            f"the tokenizer {path} cannot be read",
            str(error),
            "save it again with AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        ) from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _wrong_kind(wanted: str, got: str) -> BadInput:
    return BadInput(
        f"the data holds {got}, but the model takes {wanted}",
        f"its preprocessing is for {wanted}",
        "give other data, or describe the preprocessing in the recipe",
    )


def _wrong_inputs(gives: str, names: Sequence[str]) -> BadInput:
    return BadInput(
        "the preprocessing does not fit the model",
        f"{gives}; the model takes {', '.join(names)}",
        "give the data as .npz, with one array for each input",
    )


def _explain(error: ValidationError, raw: Mapping[str, Any]) -> BadInput:
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    key = ".".join(str(part) for part in fault["loc"][1:])
    if fault["type"] == "extra_forbidden":
        valid = _KINDS[str(raw["kind"])].model_fields
        return BadInput(f"preprocessing has the unknown key '{key}'", "it is misspelt", nearest(key, valid))
    if not key:
        key = "kind" if fault["type"].startswith("union_tag") else "settings"
    return BadInput(
        f"preprocessing has wrong or missing {key}",
        fault["msg"].removeprefix("Value error, "),
        "docs/preprocessing.md lists all keys and what they take",
    )
