"""TensorRT-RTX builds every emission ahead of time, without a GPU. Skipped where it is not installed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from graphs import make_attention, make_residual_cnn
from onnx import ModelProto

from calibration import Scales, calibrate, prepare, quantize, to_fp16

trt = pytest.importorskip("tensorrt_rtx", reason="needs the wheel tensorrt-rtx-cu13")

Emission = Callable[[ModelProto, Scales], ModelProto]
EMISSIONS: dict[str, Emission] = {
    "plain": lambda model, _: prepare(model),
    "fp16": lambda model, scales: to_fp16(model, scales)[0],
    "int8": lambda model, scales: quantize(model, scales, "tensorrt").model,
    "int8 and fp16": lambda model, scales: quantize(model, scales, "tensorrt-fp16").model,
}
#: Turing has no float32 matrix products in TensorRT-RTX.
NEEDS_FLOAT32 = {"plain", "int8"}


def build(model: ModelProto, architecture: str) -> bytes | None:
    """An engine for one GPU architecture; None where it cannot be built."""
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, architecture), 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        sizes = ([size if known < 0 else known for known in tensor.shape] for size in (1, 4, 8))
        profile.set_shape(tensor.name, *sizes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return None if engine is None else bytes(engine)


@pytest.mark.parametrize("architecture", ["SM75", "SM86", "SM89", "SM120"])
@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", ["cnn", "text"])
def test_every_emission_builds(
    kind: str, emission: str, architecture: str, images: np.ndarray, tokens: dict[str, np.ndarray]
) -> None:
    """Each emission parses and builds for each architecture; on Turing those whose floats are float16."""
    model, sample = (make_residual_cnn(), {"image": images}) if kind == "cnn" else (make_attention(), tokens)
    engine = build(EMISSIONS[emission](model, calibrate(model, [sample])), architecture)
    assert (engine is None) == (architecture == "SM75" and emission in NEEDS_FLOAT32)
