"""Models for ``agent_tensorrt.py``, made on the host, without a GPU.

    python benchmarks/gpu/agent_prepare.py OUT [--detector DIR]

Writes OUT/NAME/: ``model.onnx``, ``qdq.onnx`` and ``half.onnx`` with their weights zeroed, ``weights.json``
(how to draw them again), ``model.cache``, ``precisions.json`` and ``samples.npz``. The
weights are drawn from a seed, so that they need not be carried to the GPU; the digit network is trained for
one epoch.

    digits     the demo's network, trained on scikit-learn's scans
    detector   the detection example's network with both its heads, as ``examples.detection.train`` left it in
               DIR/detector.safetensors, beside DIR/scenes; left out without DIR
    resnet50   ResNet-50, random weights, 224 x 224
    pruned     the same with 0.35 of the parameters, widths in multiples of 32
    ragged     the same with 0.35 of the parameters, widths as they come
    deep       400 layers of ResNet-50's kind on 32 x 32: slow alone, in small requests
    nonzero    one operator (OUT/nonzero.onnx): an output whose size only the data decides
    encoder    a text encoder of MiniLM's shape (6 layers, 384 wide, 1,000 words), random weights,
               without LayerNormalization, which TensorRT 8.5 does not parse
    normalized the same with LayerNormalization, for 8.6
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from calibration import calibrate, layer_precisions, prepare, quantize, to_fp16, write_cache

Array = np.ndarray[Any, Any]

OPSET = 17  # TensorRT 8.5's parser
CALIBRATION = 16
TESTS = 32
SMALLEST = 4096  # elements of a tensor that is drawn again rather than carried
LARGE_BYTES = 4 << 20


def main() -> None:
    """Prepare every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--detector", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((CALIBRATION + TESTS, 3, 224, 224)).astype(np.float32)
    module, scans = _digits()
    _write(options.out / "digits", module, {"image": scans}, seeded=False)
    if options.detector:
        _write(options.out / "detector", *_detector(options.detector), seeded=False)
    for name, widths in (("resnet50", _WIDTHS), ("pruned", _PRUNED), ("ragged", _RAGGED)):
        _write(options.out / name, ResNet(widths), {"image": images}, seeded=True)
    small = {"image": np.ascontiguousarray(images[..., :32, :32])}
    _write(options.out / "deep", ResNet(_DEEP_WIDTHS, _DEEP), small, seeded=True)
    _write(options.out / "encoder", *_encoder(_normalized), seeded=True)
    _write(options.out / "normalized", *_encoder(_layer_norm), seeded=True)
    onnx.save(nonzero(), str(options.out / "nonzero.onnx"))


def nonzero() -> onnx.ModelProto:
    """Where a vector of eight is not zero: an output whose size only the data decides."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [8])
    y = onnx.helper.make_tensor_value_info("where", onnx.TensorProto.INT64, [1, "count"])
    node = onnx.helper.make_node("NonZero", ["x"], ["where"])
    graph = onnx.helper.make_graph([node], "nonzero", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)


def _write(out: Path, module: nn.Module, inputs: dict[str, Array], *, seeded: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "model.onnx"
    example = tuple(torch.from_numpy(array[:2]) for array in inputs.values())
    with torch.no_grad():
        answer = module.eval()(*example)
    outputs = list(answer) if isinstance(answer, dict) else ["output"]
    free = {name: {0: "batch"} for name in (*inputs, *outputs)}
    torch.onnx.export(
        module, example, str(path), input_names=list(inputs), output_names=outputs,
        opset_version=OPSET, dynamo=False, dynamic_axes=free,
    )  # fmt: skip
    model = prepare(onnx.load(str(path)))
    drawn = _draw(model) if seeded else {}
    samples = {name: array[:CALIBRATION] for name, array in inputs.items()}
    rows = ({name: array[i : i + 1] for name, array in samples.items()} for i in range(CALIBRATION))
    scales = calibrate(model, rows, observer="minmax")
    (out / "model.cache").write_text(write_cache(model, scales))
    (out / "precisions.json").write_text(json.dumps(dict(layer_precisions(model, scales))))
    quantized = quantize(model, scales, target="tensorrt-8").model
    half, _ = to_fp16(model, scales)
    weights = {}
    for file, graph in (("model.onnx", model), ("qdq.onnx", quantized), ("half.onnx", half)):
        weights[file] = _blank(graph, drawn)
        onnx.save(graph, str(out / file))
    (out / "weights.json").write_text(json.dumps(weights))
    if not seeded or sum(array.nbytes for array in inputs.values()) < LARGE_BYTES:  # else drawn there
        kept: dict[str, Any] = {name: array[CALIBRATION:] for name, array in inputs.items()}
        np.savez(out / "samples.npz", **kept)
    count = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    print(f"{out.name}: {count / 1e6:.2f} M parameters", flush=True)


def _draw(model: onnx.ModelProto) -> dict[str, tuple[int, float]]:
    """Give large tensors weights from a seed; returns seed and deviation by name."""
    drawn = {}
    for number, tensor in enumerate(model.graph.initializer):
        count = int(np.prod(tensor.dims))
        if tensor.data_type != onnx.TensorProto.FLOAT or count < SMALLEST:
            continue
        fan_in = int(np.prod(tensor.dims[1:])) if len(tensor.dims) == 4 else tensor.dims[0]
        deviation = (2.0 / fan_in) ** 0.5 if len(tensor.dims) == 4 else fan_in**-0.5
        if ".third." in tensor.name:  # the last of a residual branch: sums of random numbers stay small
            deviation *= 0.3
        drawn[tensor.name] = (number, deviation)
        tensor.CopyFrom(numpy_helper.from_array(draw(tuple(tensor.dims), number, deviation), tensor.name))
    return drawn


def draw(shape: tuple[int, ...], seed: int, deviation: float) -> Array:
    """The same numbers under every numpy, which keeps ``RandomState`` as it is."""
    normal = np.random.RandomState(seed).standard_normal(int(np.prod(shape)))
    return (normal * deviation).astype(np.float32).reshape(shape)


def _blank(model: onnx.ModelProto, drawn: dict[str, tuple[int, float]]) -> list[list[Any]]:
    """Zero what is drawn again, which then packs to nothing; returns where in the file it lies."""
    places = []
    data = model.SerializeToString()
    for tensor in model.graph.initializer:
        kind = {onnx.TensorProto.FLOAT: "<f4", onnx.TensorProto.FLOAT16: "<f2"}.get(tensor.data_type)
        name = tensor.name[:-5] if tensor.name.endswith("_fp16") else tensor.name  # as `to_fp16` names them
        if name in drawn and kind is not None:
            places.append([data.index(tensor.raw_data), list(tensor.dims), *drawn[name], kind])
            tensor.raw_data = bytes(len(tensor.raw_data))
    return places


# The models


def _digits() -> tuple[nn.Module, Array]:
    from edgekit.demo import digits

    train, held_out = digits.load(0)
    module = digits.build()
    optimizer = torch.optim.SGD(module.parameters(), 0.05, momentum=0.9)
    for start in range(0, len(train.images), 64):
        loss = nn.functional.cross_entropy(
            module(torch.from_numpy(train.images[start : start + 64])),
            torch.from_numpy(np.asarray(train.labels[start : start + 64])),
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return module, np.concatenate([train.images[:CALIBRATION], held_out.images[:TESTS]])


def _detector(made: Path) -> tuple[nn.Module, dict[str, Array]]:
    from examples.detection.detector import Detector
    from examples.detection.train import load
    from safetensors.torch import load_file

    module = Detector()
    module.load_state_dict(load_file(made / "detector.safetensors"))
    parts = (load(made / "scenes" / name, seed=0)[0] for name in ("calib.jsonl", "held_out.jsonl"))
    calibration, tests = (images.numpy() for images in parts)
    return module, {"image": np.concatenate([calibration[:CALIBRATION], tests[:TESTS]])}


_DEPTHS = (3, 4, 6, 3)
_DEEP, _DEEP_WIDTHS = (3, 32, 95, 3), (32, 32, 64, 64)
_WIDTHS = (64, 128, 256, 512)
_PRUNED = (32, 64, 160, 320)
_RAGGED = (37, 75, 151, 302)


class ResNet(nn.Module):
    """ResNet-50 (He et al., 2016) with its BatchNorm folded, in these widths."""

    def __init__(self, widths: tuple[int, ...], depths: tuple[int, ...] = _DEPTHS) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 7, 2, 3)
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for width, depth, stride in zip(widths, depths, (1, 2, 2, 2), strict=True):
            for position in range(depth):
                blocks.append(_Bottleneck(inputs, width, stride if position == 0 else 1))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[batch, 3, height, width] to logits [batch, 1000]."""
        x = nn.functional.max_pool2d(torch.relu(self.stem(image)), 3, 2, 1)
        logits: torch.Tensor = self.head(self.blocks(x).mean(dim=(2, 3)))
        return logits


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 1)
        self.second = nn.Conv2d(width, width, 3, stride, 1)
        self.third = nn.Conv2d(width, 4 * width, 1)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != 4 * width or stride != 1:
            self.shortcut = nn.Conv2d(inputs, 4 * width, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        return torch.relu(branch + self.shortcut(x))


LENGTH, WORDS, WIDTH, LAYERS, HEADS = 128, 1000, 384, 6, 12


Normalize = Callable[[torch.Tensor], torch.Tensor]


def _encoder(normalize: Normalize) -> tuple[nn.Module, dict[str, Array]]:
    rng = np.random.default_rng(1)
    count = CALIBRATION + TESTS
    ids = rng.integers(0, WORDS, (count, LENGTH))
    mask = (np.arange(LENGTH) < rng.integers(8, LENGTH + 1, (count, 1))).astype(np.int64)
    return _Encoder(normalize), {"input_ids": ids * mask, "attention_mask": mask}


class _Encoder(nn.Module):
    def __init__(self, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(_Layer(normalize) for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[batch, 128] ids and mask to the mean of the last layer, [batch, 384]."""
        keep = attention_mask.to(torch.float32)
        x = self.normalize(self.words(input_ids) + self.places)
        hidden = ((1 - keep) * -1e4)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, hidden)
        return (x * keep[..., None]).sum(1) / keep.sum(1, keepdim=True)


class _Layer(nn.Module):
    def __init__(self, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = (self._heads(part(x)) for part in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(2, 3) * (WIDTH // HEADS) ** -0.5 + hidden, -1)
        mixed = (weights @ v).transpose(1, 2).reshape(-1, LENGTH, WIDTH)
        x = self.normalize(x + self.output(mixed))
        return self.normalize(x + self.down(nn.functional.gelu(self.up(x))))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, LENGTH, HEADS, WIDTH // HEADS).transpose(1, 2)


def _normalized(x: torch.Tensor) -> torch.Tensor:
    """LayerNormalization in operators that TensorRT 8.5 has."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)


def _layer_norm(x: torch.Tensor) -> torch.Tensor:
    """The same as one operator."""
    return nn.functional.layer_norm(x, (WIDTH,))


if __name__ == "__main__":
    main()
