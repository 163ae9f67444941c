"""Embedding tables in int8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import build, run
from onnx import ModelProto, TensorProto, helper, numpy_helper

from calibration import Scales, calibrate, quantize, sqnr_db

ROWS, WIDTH = 2000, 32


@pytest.fixture(scope="module")
def encoder() -> ModelProto:
    """A table read by two lookups, a small one, and a product."""
    rng = np.random.default_rng(0)
    return build(
        [
            helper.make_node("Gather", ["words", "ids"], ["a"], name="lookup"),
            helper.make_node("Gather", ["words", "other"], ["b"], name="lookup_again"),
            helper.make_node("Gather", ["kinds", "ids"], ["c"], name="small"),
            helper.make_node("Sum", ["a", "b", "c"], ["x"], name="sum"),
            helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        ],
        {name: (TensorProto.INT64, ["n", "length"]) for name in ("ids", "other")},
        {"y": ["n", "length", 4], "a": ["n", "length", WIDTH]},
        {
            "words": rng.normal(0, rng.uniform(0.1, 3, WIDTH), (ROWS, WIDTH)).astype(np.float32),
            "kinds": rng.normal(0, 1, (ROWS // 8, WIDTH)).astype(np.float32),
            "w": rng.normal(0, 1, (WIDTH, 4)).astype(np.float32),
        },
    )


@pytest.fixture(scope="module")
def feed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.integers(0, ROWS // 8, (3, 5)) for name in ("ids", "other")}


@pytest.fixture(scope="module")
def scales(encoder: ModelProto, feed: dict[str, np.ndarray]) -> Scales:
    return calibrate(encoder, [feed])


def test_large_tables_shrink_and_keep_their_values(
    encoder: ModelProto, scales: Scales, feed: dict[str, np.ndarray]
) -> None:
    """A large table is stored once in int8 for all its lookups, and its rows come back above 40 dB."""
    int8 = quantize(encoder, scales)
    onnx.checker.check_model(int8.model, full_check=True)
    assert int8.report.tables == ("lookup", "lookup_again")
    tables = [t for t in int8.model.graph.initializer if list(t.dims) == [ROWS, WIDTH]]
    assert [t.data_type for t in tables] == [TensorProto.INT8]
    assert int8.model.ByteSize() < 0.45 * encoder.ByteSize()
    (_, rows), (_, found) = run(encoder, feed), run(int8.model, feed)
    assert sqnr_db([rows], [found]) > 40


def test_excluded_and_foreign_tables_stay_float(encoder: ModelProto, scales: Scales) -> None:
    """A table that one excluded lookup reads stays in float for all; so do tables for TensorRT."""
    assert quantize(encoder, scales, exclude=["lookup"]).report.tables == ()
    assert quantize(encoder, scales, "tensorrt").report.tables == ()


def test_a_table_with_another_reader_stays_float() -> None:
    """A table that is also the classifier's weight is left as it is."""
    rng = np.random.default_rng(0)
    model = build(
        [
            helper.make_node("Gather", ["words", "ids"], ["x"], name="lookup"),
            helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
            helper.make_node("Gemm", ["h", "words"], ["y"], name="tied", transB=1),
        ],
        {"ids": (TensorProto.INT64, ["n"])},
        {"y": ["n", ROWS]},
        {
            "words": rng.normal(0, 1, (ROWS, WIDTH)).astype(np.float32),
            "w": rng.normal(0, 1, (WIDTH, WIDTH)).astype(np.float32),
        },
    )
    feed = {"ids": np.arange(7)}
    int8 = quantize(model, calibrate(model, [feed]), exclude=["tied"])
    assert int8.report.tables == ()
    kept = {t.name: numpy_helper.to_array(t).dtype for t in int8.model.graph.initializer}
    assert kept["words"] == np.float32
