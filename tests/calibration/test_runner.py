"""Calibration over samples: what it finds, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from graphs import build
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration import CalibrationError, calibrate, quantize
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


def make_recurrent(batch: str | int) -> ModelProto:
    """An LSTM whose state comes in and goes out, with the batch second, and a classifier of its end."""
    rng = np.random.default_rng(0)
    return build(
        [
            helper.make_node("LSTM", ["x", "w", "r", "", "", "h", "c"], ["", "hn", "cn"], hidden_size=8),
            helper.make_node("Squeeze", ["hn", "axis"], ["last"]),
            helper.make_node("MatMul", ["last", "out"], ["y"], name="head"),
        ],
        {
            "x": (TensorProto.FLOAT, ["time", batch, 3]),
            "h": (TensorProto.FLOAT, [1, batch, 8]),
            "c": (TensorProto.FLOAT, [1, batch, 8]),
        },
        {"y": [batch, 2], "hn": [1, batch, 8], "cn": [1, batch, 8]},
        {
            "w": rng.normal(0, 1, (1, 32, 3)).astype(np.float32),
            "r": rng.normal(0, 1, (1, 32, 8)).astype(np.float32),
            "axis": np.array([0], np.int64),
            "out": rng.normal(0, 1, (8, 2)).astype(np.float32),
        },
    )


def recurrent_sample(batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"x": (5, batch, 3), "h": (1, batch, 8), "c": (1, batch, 8)}
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_batch_on_another_axis_is_cut_there() -> None:
    """Recurrent models with states and the batch second give the same scales however they are batched."""
    model, whole = make_recurrent("batch"), recurrent_sample(6)
    pairs = [{name: value[:, i : i + 2] for name, value in whole.items()} for i in (4, 0, 2)]
    scales = calibrate(model, [whole], observer="entropy")
    assert scales == calibrate(model, pairs, observer="entropy")
    assert scales.samples == 6
    assert scales.tensors["h"].elements == 6 * 8
    report = quantize(model, scales).report
    assert report.quantized == ("head",)
    assert list(report.kept_float.values()) == ["LSTM runs over time steps"]


def test_a_free_length_in_front_is_not_taken_for_a_batch() -> None:
    """With a fixed batch of one, a sequence whose free length comes first runs whole."""
    scales = calibrate(make_recurrent(1), [recurrent_sample(1), recurrent_sample(1)])
    assert scales.samples == 2


def test_unequal_batches_on_another_axis_are_refused() -> None:
    """States of another batch size than the input's are refused with the sizes."""
    sample = {**recurrent_sample(4), "h": recurrent_sample(3)["h"]}
    with pytest.raises(CalibrationError, match="different batch sizes"):
        calibrate(make_recurrent("batch"), [sample])


@pytest.mark.parametrize("observer", OBSERVERS)
def test_height_and_width_may_change(observer: str) -> None:
    """Images of any height and width calibrate one model, in memory that the largest decides."""
    model = build(
        [
            helper.make_node("Conv", ["image", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        {"image": (TensorProto.FLOAT, ["batch", 3, "height", "width"])},
        {"y": ["batch", 4, "height", "width"]},
        {"w": np.random.default_rng(0).normal(0, 1, (4, 3, 3, 3)).astype(np.float32)},
    )
    rng = np.random.default_rng(1)
    sizes = [(8, 8), (5, 31), (16, 4)]
    samples = [{"image": rng.normal(0, 1, (2, 3, *size)).astype(np.float32)} for size in sizes]
    scales = calibrate(model, samples, observer=observer)
    assert scales.tensors["image"].elements == sum(2 * 3 * height * width for height, width in sizes)
    assert scales == calibrate(model, reversed(samples), observer=observer)
    assert quantize(model, scales).report.int8_macs_fraction == 1.0


def test_no_samples_is_an_error(residual_cnn: ModelProto) -> None:
    """Zero samples give no scales, but an error."""
    with pytest.raises(CalibrationError, match="no calibration samples"):
        calibrate(residual_cnn, [])
