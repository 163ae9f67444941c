"""``edgekit check`` against the parser of TensorRT-RTX itself: how often the table of operators is right.

python benchmarks/check_agreement.py [--json] [--quick]

The graphs are whole networks, networks and layers that PyTorch converted, and small composed models, all
of which the onnx package carries; and transformers and convolutional networks that are exported here.
Verdicts come from the published tables alone; then the real parser is asked about the same graph.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import torch
from common import document, finish, parse_options
from onnx import ModelProto

from calibration.storage import load_model
from edgekit import profile
from edgekit.builders import rtx
from edgekit.lowering.lower import lower
from edgekit.lowering.tables import for_profile

PROFILE = "rtx-4000-ada"
_QUICK_GRAPHS = 45
_TIMEOUT_S = 600


def main() -> None:
    """Ask both about every graph."""
    options = parse_options(__doc__)
    table = for_profile(profile.load(PROFILE))
    assert table is not None
    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary:
        names: list[str] = []
        verdicts, jobs = [], []
        for name, graph in _graphs():
            if options.quick and len(names) == _QUICK_GRAPHS:
                break
            lowered = lower(graph, table)
            path = Path(temporary, f"{len(names)}.onnx")
            onnx.save(lowered.model, str(path))
            names.append(name)
            verdicts.append(lowered.refused)
            jobs.append(rtx.Job(str(path)))
        answers = rtx.ask(jobs, timeout_s=_TIMEOUT_S)
    disagreements = [
        f"{name}: the table says {verdict[0].why if verdict else 'yes'}, the parser {answer.why or 'yes'}"
        for name, verdict, answer in zip(names, verdicts, answers, strict=True)
        if (not verdict) != answer.accepted and not answer.needs_gpu
    ]
    figures = {
        "graphs": len(names),
        "refused_by_both": [
            f"{name}: {verdict[0].op_type} {verdict[0].why}"
            for name, verdict, answer in zip(names, verdicts, answers, strict=True)
            if verdict and not answer.accepted
        ],
        "accepted_by_the_parser": sum(answer.accepted for answer in answers),
        "agreement_fraction": 1 - len(disagreements) / len(names),
        "disagreements": disagreements,
        "tensorrt_rtx": next((answer.version for answer in answers if answer.version), None),
    }
    targets = {"graphs": (">=", 40), "agreement_fraction": (">=", 0.98)}
    claim = "the tables of operators agree with the parser of TensorRT-RTX"
    finish(document("check_agreement", claim, figures, targets, 1), options.json)


def _graphs() -> Iterator[tuple[str, ModelProto]]:
    """Name and graph, the largest networks first."""
    yield from _exported()
    home = Path(onnx.__file__).parent / "backend" / "test" / "data"
    for folder in ("light", "pytorch-converted", "pytorch-operator", "simple"):
        for path in sorted((home / folder).rglob("*.onnx")):
            yield f"{folder}/{path.stem if folder == 'light' else path.parent.name}", load_model(path)


def _exported() -> Iterator[tuple[str, ModelProto]]:
    """Networks of several families with random weights, small."""
    import transformers
    from torch import nn

    text = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide = {**text, "intermediate_size": 64}
    image = {"image_size": 32, "num_channels": 3}
    tokens, pixels = torch.ones((2, 12), dtype=torch.int64), torch.randn(2, 3, 32, 32)
    models: list[tuple[str, type, Mapping[str, object], torch.Tensor]] = [
        ("bert", transformers.BertConfig, wide, tokens),
        ("roberta", transformers.RobertaConfig, wide, tokens),
        ("electra", transformers.ElectraConfig, {**wide, "embedding_size": 32}, tokens),
        ("albert", transformers.AlbertConfig, {**wide, "embedding_size": 16}, tokens),
        ("distilbert", transformers.DistilBertConfig,
         {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}, tokens),
        ("vit", transformers.ViTConfig, {**wide, **image, "patch_size": 8}, pixels),
        ("deit", transformers.DeiTConfig, {**wide, **image, "patch_size": 8}, pixels),
        ("convnext", transformers.ConvNextConfig,
         {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_channels": 3}, pixels),
        ("resnet", transformers.ResNetConfig,
         {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_channels": 3}, pixels),
        ("mobilenet_v2", transformers.MobileNetV2Config, {**image, "depth_multiplier": 0.35}, pixels),
        ("regnet", transformers.RegNetConfig,
         {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8}, pixels),
    ]  # fmt: skip
    for name, config, settings, example in models:
        torch.manual_seed(0)
        module: nn.Module = transformers.AutoModel.from_config(config(**settings))  # type: ignore[no-untyped-call]
        yield name, _export(module, example)


def _export(module: torch.nn.Module, example: torch.Tensor) -> ModelProto:
    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first: torch.Tensor = self.inner(x)[0]
            return first

    with tempfile.TemporaryDirectory(prefix="edgekit-bench-") as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(temporary, "m.onnx")
        torch.onnx.export(
            First().eval(), (example,), str(path), dynamo=True, external_data=False, verbose=False,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )  # fmt: skip
        return onnx.load(str(path))


if __name__ == "__main__":
    main()
