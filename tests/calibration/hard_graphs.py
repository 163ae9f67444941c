"""Graphs that are hard to quantize on purpose: channels of one tensor whose sizes differ a thousand times."""

from __future__ import annotations

import numpy as np
from graphs import Array, build
from onnx import ModelProto, TensorProto, helper


def make_uneven_cnn(seed: int = 0, spread: float = 1000.0, channels: int = 32) -> ModelProto:
    """Conv, ReLU, depthwise Conv, ReLU, Conv 1 x 1, mean, Flatten, Gemm; channels differ by ``spread``."""
    rng = np.random.default_rng(seed)
    first, second, third = (np.exp(rng.uniform(0, np.log(spread), channels)) for _ in range(3))
    constants: dict[str, Array] = {
        "w1": rng.normal(0, 0.3, (channels, 3, 3, 3)) * first[:, None, None, None],
        "b1": rng.normal(0, 0.1, channels) * first,
        "w2": rng.normal(0, 0.3, (channels, 1, 3, 3)) * (second / first)[:, None, None, None],
        "b2": rng.normal(0, 0.1, channels) * second,
        "w3": rng.normal(0, 0.3, (channels, channels, 1, 1))
        * third[:, None, None, None]
        / second[None, :, None, None],
        "b3": rng.normal(0, 0.1, channels) * third,
        "w4": rng.normal(0, 0.3, (channels, 10)) / third[:, None],
        "b4": rng.normal(0, 0.1, 10),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], name="stem", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="depthwise", pads=[1] * 4, group=channels),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], name="pointwise"),
        helper.make_node("GlobalAveragePool", ["c3"], ["mean"], name="mean_"),
        helper.make_node("Flatten", ["mean"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "w4", "b4"], ["logits"], name="head"),
    ]
    return build(
        nodes,
        {"image": (TensorProto.FLOAT, ["batch", 3, 8, 8])},
        {"logits": ["batch", 10]},
        {name: value.astype(np.float32) for name, value in constants.items()},
    )


def make_block_with_outliers(post_norm: bool, width: int = 32, outlier: float = 80.0) -> ModelProto:
    """LayerNorm, query, key and value, and a feed-forward part; two features of the norm are outliers.

    With ``post_norm`` the residual Add reads the LayerNorm's result too, as in BERT.
    """
    rng = np.random.default_rng(1)
    gain = np.ones(width)
    gain[[3, 17]] = outlier
    constants: dict[str, Array] = {"gain": gain, "shift": rng.normal(0, 0.1, width)}
    for name in ("wq", "wk", "wv", "wf"):
        constants[name] = rng.normal(0, 0.3, (width, width)) / gain[:, None]
    constants["bq"] = rng.normal(0, 0.1, width)
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gain", "shift"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "wq"], ["q0"], name="query"),
        helper.make_node("Add", ["q0", "bq"], ["q"], name="query_bias"),
        helper.make_node("MatMul", ["n", "wk"], ["k"], name="key"),
        helper.make_node("MatMul", ["n", "wv"], ["v"], name="value"),
        helper.make_node("Mul", ["q", "k"], ["qk"], name="gate"),
        helper.make_node("Mul", ["qk", "v"], ["qkv"], name="mix"),
        helper.make_node("MatMul", ["qkv", "wf"], ["f"], name="feed"),
        helper.make_node("Add", ["f", "n" if post_norm else "x"], ["y"], name="residual"),
    ]
    return build(
        nodes,
        {"x": (TensorProto.FLOAT, ["batch", "length", width])},
        {"y": ["batch", "length", width]},
        {name: value.astype(np.float32) for name, value in constants.items()},
    )
