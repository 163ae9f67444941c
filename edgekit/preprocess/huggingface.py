"""Preprocessing as a Hugging Face directory describes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from edgekit.errors import BadInput
from edgekit.preprocess import TOKENIZER_FILE, ImagePreprocess, Preprocess, TextPreprocess

_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
# PIL.Image.Resampling by number, which is how the configuration names it.
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
# Steps that some processors take and this description has no word for.
_UNSUPPORTED = ("do_pad", "do_flip_channel_order", "do_thumbnail", "keep_aspect_ratio", "include_top")
# ConvNeXt's processor scales to shortest_edge / crop_pct below this size, and squeezes from it on.
_CONVNEXT_SQUEEZE_SIZE = 384


def read(directory: Path) -> Preprocess | None:
    """Read ``preprocessor_config.json``, else ``tokenizer.json``; None where there is neither.

    Raises:
        BadInput: the file is malformed, or asks for a step that ``ImagePreprocess`` has no word for.
    """
    for name in _IMAGE_FILES:
        if (directory / name).is_file():
            return _image(directory / name)
    if (directory / TOKENIZER_FILE).is_file():
        return _text(directory)
    return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the directory; an empty one where there is no such file.

    Raises:
        BadInput: it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read", str(error), "copy or download it again") from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} is malformed", "it is not a JSON object", "copy or download it again")
    return value


def _image(path: Path) -> ImagePreprocess:
    config = read_json(path)
    config = config.get("image_processor", config)
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if used:
        raise _unsupported(path, f"'{used[0]}' is a step that edgekit does not know")
    normalize = config.get("do_normalize", True)
    if normalize and not (config.get("image_mean") and config.get("image_std")):
        raise _unsupported(path, "it normalizes, but does not say with which image_mean and image_std")
    mean = config["image_mean"] if normalize else [0.0] * 3
    std = config["image_std"] if normalize else [1.0] * 3
    try:
        return ImagePreprocess(
            **_geometry(path, config),
            channels="L" if len(mean) == 1 else "RGB",
            rescale=config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0,
            mean=tuple(mean),
            std=tuple(std),
        )
    except ValidationError as error:
        raise _unsupported(path, error.errors(include_url=False)[0]["msg"]) from error
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise _unsupported(path, f"a setting has a value that makes no sense: {error}") from error


def _geometry(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Size, shortest_edge and resample."""
    size = _sizes(config.get("size"))
    crop = _sizes(config.get("crop_size")) if config.get("do_center_crop") else None
    if not config.get("do_resize", True):
        target = crop or size
        if target is None or len(target) != 2:
            raise _unsupported(path, "it does not say which size the model takes")
        return {"size": target, "resample": None}
    resample = _RESAMPLE[config.get("resample", 2)]
    if size is None:
        raise _unsupported(
            path, f"its size {config.get('size')} is neither height and width nor shortest_edge"
        )
    if len(size) == 2:
        if crop is not None and crop != size:
            raise _unsupported(path, "it resizes to one size and crops to another")
        return {"size": size, "resample": resample}
    edge = size[0]
    if "convnext" in _processor_type(config):
        if edge >= _CONVNEXT_SQUEEZE_SIZE:
            return {"size": (edge, edge), "resample": resample}
        crop, edge = (edge, edge), int(edge / config.get("crop_pct", 224 / 256))
    if crop is None or len(crop) != 2:
        raise _unsupported(path, "it keeps proportions without cropping, so sizes differ from image to image")
    return {"size": crop, "shortest_edge": edge, "resample": resample}


def _sizes(value: Any) -> tuple[int, ...] | None:
    """(height, width), (shortest_edge,), or None for anything else."""
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, dict) and {"height", "width"} <= set(value):
        return (value["height"], value["width"])
    if isinstance(value, dict) and set(value) == {"shortest_edge"}:
        return (value["shortest_edge"],)
    return None


def _processor_type(config: dict[str, Any]) -> str:
    return str(config.get("image_processor_type", config.get("feature_extractor_type", ""))).lower()


def _text(directory: Path) -> TextPreprocess:
    model = read_json(directory / "config.json")
    limits = [
        read_json(directory / "sentence_bert_config.json").get("max_seq_length"),
        read_json(directory / "tokenizer_config.json").get("model_max_length"),
        _positions(model),
    ]
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 1e9]
    return TextPreprocess(
        tokenizer=directory / TOKENIZER_FILE,
        max_length=min(known, default=512),
        pad_id=model.get("pad_token_id") or 0,
    )


def _positions(model: dict[str, Any]) -> int | None:
    """Longest sequence that the position table allows."""
    positions = model.get("max_position_embeddings")
    if positions is None:
        return None
    # RoBERTa and its kin count positions from pad_token_id + 1.
    reserved = model.get("pad_token_id", 1) + 1 if "roberta" in str(model.get("model_type")) else 0
    return int(positions) - reserved


def _unsupported(path: Path, why: str) -> BadInput:
    return BadInput(
        f"the preprocessing in {path} is not one that edgekit does",
        why,
        "describe it in the recipe: [preprocessing]",
    )
