"""How large tensors are looked at: inside the graph, by a share of their values."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import build
from onnx import ModelProto, TensorProto, helper

from calibration import CalibrationError, calibrate
from calibration.observers import OBSERVERS

SIDE = 48


def wide_cnn(side: int | str, *, bad: float | None = None) -> ModelProto:
    """Convolutions over images that are large enough to be counted by a share; ``bad`` is put in a weight."""
    rng = np.random.default_rng(3)
    first, second = (rng.normal(0, 0.3, (16, n, 3, 3)).astype(np.float32) for n in (3, 16))
    if bad is not None:
        second[5, 2, 1, 1] = bad
    return build(
        [
            helper.make_node("Conv", ["image", "w1"], ["a"], name="first", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["ar"], name="first_relu"),
            helper.make_node("Conv", ["ar", "w2"], ["b"], name="second", pads=[1, 1, 1, 1]),
            helper.make_node("Add", ["b", "ar"], ["c"], name="add"),
            helper.make_node("Clip", ["c", "zero", "six"], ["cr"], name="add_clip"),
            helper.make_node("Conv", ["cr", "w3"], ["y"], name="third"),
        ],
        {"image": (TensorProto.FLOAT, ["n", 3, side, side])},
        {"y": ["n", 4, side, side]},
        {
            "w1": first,
            "w2": second,
            "w3": rng.normal(0, 0.3, (4, 16, 1, 1)).astype(np.float32),
            "zero": np.array(0, np.float32),
            "six": np.array(6, np.float32),
        },
    )


def wide_images(count: int) -> np.ndarray:
    return np.random.default_rng(4).normal(0, 1, (count, 3, SIDE, SIDE)).astype(np.float32)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_shares_do_not_depend_on_batches_order_threads_or_memory(observer: str) -> None:
    """Large tensors too give the same scales in any batches and order, and in memory slices."""
    images = wide_images(6)
    model = wide_cnn(SIDE)
    expected = calibrate(model, [{"image": images}], observer=observer, threads=3)
    singles = [{"image": images[i : i + 1]} for i in reversed(range(6))]
    assert calibrate(model, singles, observer=observer, threads=1) == expected
    assert calibrate(model, singles, observer=observer, max_memory_bytes=70_000) == expected


@pytest.mark.parametrize("observer", OBSERVERS)
def test_known_and_free_sizes_agree(observer: str) -> None:
    """A model of free height and width shows tensors another way: the same ends, nearly the same range."""
    samples = [{"image": wide_images(8)}]
    known = calibrate(wide_cnn(SIDE), samples, observer=observer)
    free = calibrate(wide_cnn("side"), samples, observer=observer)
    assert known.macs == free.macs
    assert set(known.tensors) == set(free.tensors)
    for name, found in known.tensors.items():
        other = free.tensors[name]
        assert (found.min, found.max, found.elements) == (other.min, other.max, other.elements), name
        assert found.hi - found.lo == pytest.approx(other.hi - other.lo, rel=0.3), name


def test_what_only_an_activation_reads_has_its_range() -> None:
    """The tensor before a ReLU or Clip, which runtimes never store, takes the range of what comes after."""
    scales = calibrate(wide_cnn(SIDE), [{"image": wide_images(2)}], observer="entropy")
    assert scales.tensors["a"] == scales.tensors["ar"]
    assert scales.tensors["c"] == scales.tensors["cr"]
    assert scales.tensors["c"].max == 6.0
    assert scales.tensors["b"].min < 0.0


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_found_in_a_share(observer: str, bad: float) -> None:
    """NaN or infinity from a weight is an error that names the tensor and the sample."""
    model = wide_cnn(SIDE, bad=bad)
    with pytest.raises(CalibrationError, match=r"tensor 'b' holds NaN or infinity on sample 0"):
        calibrate(model, [{"image": wide_images(1)}], observer=observer)


def test_nan_passes_the_blocked_layout() -> None:
    """NaN in a rectified image, of which a share is pooled, is found there too."""
    rng = np.random.default_rng(5)
    weight = rng.normal(0, 0.3, (16, 3, 3, 3)).astype(np.float32)
    weight[7, 1] = np.nan
    model = build(
        [
            helper.make_node("Conv", ["image", "w"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["ar"], name="relu"),
            helper.make_node("Conv", ["ar", "v"], ["y"], name="second"),
        ],
        {"image": (TensorProto.FLOAT, ["n", 3, SIDE, SIDE])},
        {"y": ["n", 4, SIDE - 2, SIDE - 2]},
        {"w": weight, "v": np.ones((4, 16, 1, 1), np.float32)},
    )
    with pytest.raises(CalibrationError, match="tensor 'ar' holds NaN"):
        calibrate(model, [{"image": wide_images(1)}], observer="entropy")
