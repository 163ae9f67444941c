"""Runs that train an adapter or learn from a teacher: what they write is whole, small, and taken further."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy

from host_trainer import adapter
from host_trainer.config import Config, parse
from host_trainer.data import call
from host_trainer.errors import ConfigError
from host_trainer.merging import merge
from host_trainer.train import train

WORDS = ("good", "fine", "great", "bad", "poor", "awful", "film", "plot")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with its tokenizer, as a Hugging Face directory."""
    return _bert(tmp_path_factory.mktemp("base"), width=16, layers=2, spread=0.02)


def _bert(directory: Path, width: int, layers: int, spread: float) -> Path:
    """Weights are drawn with a deviation of ``spread``: a small one answers nearly the same to everything."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(layers)
    config = BertConfig(
        vocab_size=16, hidden_size=width, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=16, num_labels=2, initializer_range=spread,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(directory)
    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def _texts(path: Path, labels: bool = True) -> Path:
    rows = [
        {"text": f"{WORDS[n % 6]} {WORDS[6 + n % 2]}", **({"label": int(n % 6 < 3)} if labels else {})}
        for n in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _config(tmp_path: Path, base: Path, labels: bool = True, **sections: Any) -> Config:
    return parse(
        {
            "run": str(tmp_path / "run"),
            "model": {"source": str(base)},
            "data": {"train": str(_texts(tmp_path / "t.jsonl", labels)), "workers": 0},
            "optimize": {"epochs": 8, "batch_size": 16, "learning_rate": 0.01},
            "checkpoint": {"every_steps": 8},
            "parallel": {"device": "cpu"},
            "monitor": {"tensorboard": False},
            **sections,
        },
        "test",
    )


def _losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_an_adapter_is_trained_kept_alone_and_merged(tmp_path: Path, base: Path) -> None:
    """Checkpoints and the result hold the adapter only; merged, it is a model that answers the same."""
    from transformers import BertForSequenceClassification

    config = _config(
        tmp_path, base, lora={"rank": 4, "targets": ["attention", "mlp"]}, monitor={"every_steps": 1}
    )
    assert train(config).state == "finished"
    losses = _losses(config.run)
    assert losses[-1] < 0.7 * losses[0]
    again = config.model_copy(update={"run": tmp_path / "again"})
    torch.manual_seed(99)  # the caller's random state decides nothing
    train(again)
    files = [(one.run / "model" / adapter.WEIGHTS_FILE).read_bytes() for one in (config, again)]
    assert files[0] == files[1]
    [checkpoint, *_] = sorted((config.run / "checkpoints").iterdir())
    kept = {
        *load_file(checkpoint / "model.safetensors"),
        *load_file(config.run / "model" / adapter.WEIGHTS_FILE),
    }
    assert all("lora_" in name or "classifier" in name or "pooler" in name for name in kept)
    merged = merge(config.run, tmp_path / "merged", torch.float32)
    assert merged.merge_error < 1e-5
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    wrapped = adapter.load(BertForSequenceClassification.from_pretrained(base), config.run / "model")
    ids = torch.tensor([[2, 8], [5, 9]])
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, wrapped(ids).logits, atol=1e-5)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    with pytest.raises(ConfigError, match="exists"):
        merge(config.run, tmp_path / "merged", torch.float32)


def test_a_student_learns_from_a_teacher_s_answers_and_insides(tmp_path: Path) -> None:
    """Without labels; what is written is the model alone, by its own names."""
    teacher = _bert(tmp_path / "teacher", width=16, layers=2, spread=0.5)
    small = _bert(tmp_path / "small", width=8, layers=1, spread=0.02)
    distill = {"teacher": str(teacher), "features": 1.0, "attention": 1.0}
    config = _config(tmp_path, small, labels=False, distill=distill, monitor={"every_steps": 1})
    assert train(config).state == "finished"
    losses = _losses(config.run)
    assert losses[-1] < 0.8 * losses[0]
    weights = {path: set(load_file(path / "model.safetensors")) for path in (small, config.run / "model")}
    assert weights[small] == weights[config.run / "model"]


def test_an_onnx_file_teaches_a_factory_s_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The student's weights come to be the graph's."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "teacher",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weight.numpy(), "w")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9),
        tmp_path / "t.onnx",
    )
    (tmp_path / "nets_of_test.py").write_text(
        "import torch\n"
        "def net():\n    return torch.nn.Linear(4, 3)\n"
        "def data():\n"
        "    make = lambda n: torch.randn(4, generator=torch.Generator().manual_seed(n)).numpy()\n"
        "    return [{'x': make(n)} for n in range(64)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = _config(
        tmp_path, Path("unused"), model={"source": "nets_of_test:net"},
        data={"train": "nets_of_test:data", "workers": 0}, distill={"teacher": str(tmp_path / "t.onnx")},
        optimize={"epochs": 120, "batch_size": 32, "learning_rate": 0.05},
    )  # fmt: skip
    train(config)
    learned = load_file(config.run / "model" / "model.safetensors")["weight"]
    assert torch.allclose(learned.T, weight, atol=0.1)


def test_an_adapter_is_judged_with_the_statistics_that_it_is_merged_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm's statistics stay the base's, as its weights do: merged, it has the loss that was told."""
    (tmp_path / "normalized_of_test.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def block():\n    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
        "def net():\n"
        "    body = nn.Sequential(block(), block())\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 1), body, nn.Flatten(), nn.Linear(16, 2))\n"
        "def data():\n"
        "    make = lambda n: torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(n)).numpy()\n"
        "    return [{'x': 5 + n % 2 + make(n), 'labels': n % 2} for n in range(32)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = "normalized_of_test:data"
    config = _config(
        tmp_path, Path("unused"), model={"source": "normalized_of_test:net"},
        data={"train": data, "eval": data, "workers": 0}, lora={"targets": ["convolution"]},
    )  # fmt: skip
    results = train(config).results
    merged = merge(config.run, tmp_path / "merged", torch.float32).model
    samples = call(data, "")
    with torch.no_grad():
        logits = merged(torch.stack([torch.from_numpy(sample["x"]) for sample in samples]))
        loss = cross_entropy(logits, torch.tensor([sample["labels"] for sample in samples]))
    assert float(loss) == pytest.approx(results["eval/loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"lora": {"targets": []}}, "lora.targets"),
        ({"lora": {"ranks": 4}}, "did you mean 'rank'"),
        ({"distill": {"teacher": "t.onnx", "features": 1}}, "distill.features"),
        ({"distill": {"teacher": "t", "outputs": 0}}, "nothing to learn"),
        ({"distill": {"teacher": "t", "teacher_weights": "w"}}, "distill.teacher_weights"),
    ],
)
def test_contradictions_are_named(sections: dict[str, Any], key: str, tmp_path: Path) -> None:
    """Before anything is loaded, with the key."""
    with pytest.raises(ConfigError) as caught:
        _config(tmp_path, Path("base"), **sections)
    assert key in str(caught.value)


def test_a_run_without_an_adapter_has_nothing_to_merge(tmp_path: Path, base: Path) -> None:
    """Nor has one that is not finished; it is said, and nothing is written."""
    for sections, what in (({}, "trained no adapter"), ({"lora": {}}, "is not finished")):
        config = _config(tmp_path, base, **sections)
        config.run.mkdir(exist_ok=True)
        (config.run / "config.json").write_text(config.model_dump_json())
        with pytest.raises(ConfigError, match=what):
            merge(config.run, tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()
