"""Calibration over samples: what it finds, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from graphs import build
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration import CalibrationError, calibrate
from calibration.observers import OBSERVERS


@pytest.mark.parametrize("observer", OBSERVERS)
def test_batching_and_order_do_not_matter(
    observer: str, residual_cnn: ModelProto, images: np.ndarray
) -> None:
    """The same images in batches of 1, 5 or 24, forwards or backwards, give the same scales."""
    expected = calibrate(residual_cnn, [{"image": images}], observer=observer)
    singles = [{"image": images[i : i + 1]} for i in reversed(range(24))]
    fives = [{"image": images[i : i + 5]} for i in range(0, 24, 5)]
    assert calibrate(residual_cnn, singles, observer=observer) == expected
    assert calibrate(residual_cnn, fives, observer=observer) == expected
    assert expected.samples == 24


def test_memory_slices_change_nothing(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """With little memory a row runs in slices, and the scales are the same."""
    whole = calibrate(residual_cnn, [{"image": images[:4]}], observer="mse")
    for limit in (1, 10_000):
        found = calibrate(residual_cnn, [{"image": images[:4]}], observer="mse", max_memory_bytes=limit)
        assert found == whole


def test_ranges_are_the_tensors_own(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Min-max finds the smallest and the largest value of inputs and activations."""
    scales = calibrate(residual_cnn, [{"image": images}])
    found = scales.tensors["image"]
    assert (found.lo, found.hi) == (float(images.min()), float(images.max()))
    assert found.elements == images.size
    assert scales.tensors["stem_n_r"].lo == 0.0


def test_macs_are_counted(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Multiply-accumulates are those of the shapes that ran."""
    macs = calibrate(residual_cnn, [{"image": images[:2]}]).macs
    assert macs["stem"] == 2 * 16 * 8 * 8 * 3 * 9
    assert macs["fc"] == 2 * 16 * 10


def test_padding_does_not_reach_the_observers(attention: ModelProto, tokens: dict[str, np.ndarray]) -> None:
    """Rows padded to any length give the scales of the rows without padding."""
    lengths = tokens["attention_mask"].sum(axis=1)
    bare = [{name: v[i : i + 1, :n] for name, v in tokens.items()} for i, n in enumerate(lengths)]
    wide = [{name: np.pad(v, ((0, 0), (0, 9))) for name, v in tokens.items()}]
    assert calibrate(attention, [tokens]) == calibrate(attention, bare)
    assert calibrate(attention, wide) == calibrate(attention, bare)


def test_padding_of_a_fixed_length_does_not_reach_the_observers(
    attention: ModelProto, tokens: dict[str, np.ndarray]
) -> None:
    """In a model of fixed length the padding is replaced by the row's own tokens: token 0 is never seen."""
    fixed = ModelProto()
    fixed.CopyFrom(attention)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 12
    table = next(t for t in fixed.graph.initializer if t.name == "table")
    values = numpy_helper.to_array(table).copy()
    values[0] = 1000.0  # the padding token's row
    table.raw_data = values.tobytes()
    scales = calibrate(fixed, [tokens])
    assert scales.tensors["x"].hi < 10
    assert scales.tensors["x"].elements == 6 * 12 * 16


def test_infinite_masks_are_not_an_error(attention: ModelProto, tokens: dict[str, np.ndarray]) -> None:
    """A mask of minus infinity before a Softmax is not quantized, so it needs no finite range."""
    for constant in attention.graph.initializer:
        if constant.name == "low":
            constant.raw_data = np.array(-np.inf, np.float32).tobytes()
    gaps = tokens["attention_mask"].copy()
    gaps[0, 3] = 0
    scales = calibrate(attention, [{**tokens, "attention_mask": gaps}])
    assert np.isfinite(scales.tensors["masked"].min)


def test_progress_counts_rows(residual_cnn: ModelProto, images: np.ndarray) -> None:
    """Progress is told after each row, and samples are taken while the rows before them run, not ahead."""
    told: list[int] = []

    def samples() -> Iterator[dict[str, np.ndarray]]:
        for i in (0, 4, 8):
            assert len(told) >= i - 3
            yield {"image": images[i : i + 4]}

    calibrate(residual_cnn, samples(), threads=2, progress=told.append)
    assert told == list(range(1, 13))


@pytest.mark.parametrize("observer", ["minmax", "entropy"])
def test_the_number_of_threads_does_not_matter(
    observer: str, residual_cnn: ModelProto, images: np.ndarray
) -> None:
    """One thread and five give the same scales, however their rows overtake each other."""
    samples = [{"image": images * np.float32(scale)} for scale in (1, 40, 0.01)]
    one, five = (calibrate(residual_cnn, samples, observer=observer, threads=n) for n in (1, 5))
    assert one == five


@pytest.mark.parametrize("observer", OBSERVERS)
def test_nan_in_an_activation_names_tensor_and_sample(
    observer: str,
) -> None:
    """NaN inside the model is an error that names the tensor and the sample."""
    model = build(
        [
            helper.make_node("Sqrt", ["x"], ["root"]),
            helper.make_node("MatMul", ["root", "w"], ["y"]),
        ],
        {"x": (TensorProto.FLOAT, ["n", 3])},
        {"y": ["n", 2]},
        {"w": np.ones((3, 2), np.float32)},
    )
    good, bad = np.ones((2, 3), np.float32), np.array([[1, 1, 1], [1, -1, 1]], np.float32)
    with pytest.raises(CalibrationError, match=r"tensor 'root' .* sample 1"):
        calibrate(model, [{"x": good}, {"x": bad}], observer=observer)


def test_a_sum_that_overflows_is_not_an_infinity() -> None:
    """Large finite values calibrate, even where their sum leaves float32."""
    model = build(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n", 3])},
        {"y": ["n", 2]},
        {"w": np.full((3, 2), 1e-3, np.float32)},
    )
    scales = calibrate(model, [{"x": np.full((1, 3), 3e38, np.float32)}])
    assert scales.tensors["x"].hi == float(np.float32(3e38))


@pytest.mark.parametrize(
    ("sample", "why"),
    [
        ({}, "lacks"),
        ({"image": np.zeros((1, 3, 8, 8), np.float32), "more": np.zeros(1)}, "more"),
        ({"image": np.zeros((1, 3, 8, 8), np.float64)}, "float64"),
        ({"image": np.zeros((1, 3, 8, 8), np.uint8)}, "uint8"),
        ({"image": np.zeros((1, 4, 8, 8), np.float32)}, r"\(1, 4, 8, 8\)"),
        ({"image": np.zeros((3, 8, 8), np.float32)}, r"\(3, 8, 8\)"),
        ({"image": np.zeros((0, 3, 8, 8), np.float32)}, "shape"),
        ({"image": np.full((1, 3, 8, 8), np.nan, np.float32)}, "NaN"),
        ({"image": np.full((1, 3, 8, 8), np.inf, np.float32)}, "NaN or infinity"),
        ({"image": [[1.0]]}, "not a numpy array"),
        ([np.zeros((1, 3, 8, 8), np.float32)], "not a mapping"),
    ],
)
def test_samples_that_do_not_fit_are_refused(
    sample: dict[str, np.ndarray], why: str, residual_cnn: ModelProto, images: np.ndarray
) -> None:
    """A sample with wrong names, dtype, shape or NaN is refused by its position and what is wrong."""
    with pytest.raises(CalibrationError, match="sample 1 does not fit") as caught:
        calibrate(residual_cnn, [{"image": images}, sample])
    assert caught.match(why)


def test_unequal_batches_are_refused(attention: ModelProto, tokens: dict[str, np.ndarray]) -> None:
    """Inputs of one sample have to have one batch size."""
    with pytest.raises(CalibrationError, match="different batch sizes"):
        calibrate(attention, [{**tokens, "attention_mask": tokens["attention_mask"][:2]}])


def test_no_samples_is_an_error(residual_cnn: ModelProto) -> None:
    """Zero samples give no scales, but an error."""
    with pytest.raises(CalibrationError, match="no calibration samples"):
        calibrate(residual_cnn, [])
