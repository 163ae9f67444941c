"""Distillation: a student comes to answer as its teacher, whatever the teacher is and however wide."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from host_trainer import losses
from host_trainer.distill import ModuleTeacher, OnnxTeacher, Student, Weights, look
from host_trainer.errors import TrainingError
from host_trainer.loop import TrainSettings, fit

Batch = tuple[Tensor]
STEPS = 20


def _call(model: nn.Module, batch: Batch) -> Any:
    return model(*batch)


def _conv(width: int, blocks: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)

    def block(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU())

    body = nn.Sequential(*(block(3 if n == 0 else width) for n in range(blocks)))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


def _bert(heads: int, width: int, layers: int = 2) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=width, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=16, num_labels=5, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _images(epoch: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS):
        yield (torch.randn(8, 3, 6, 6, generator=generator),)


def _texts(epoch: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS):
        yield (torch.randint(0, 50, (8, 7), generator=generator),)


def _linear_onnx(path: Path, inputs: str = "x") -> Path:
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).numpy()
    graph = helper.make_graph(
        [helper.make_node("MatMul", [inputs, "w"], ["y"])],
        "teacher",
        [helper.make_tensor_value_info(inputs, TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    "weights",
    [
        Weights(),
        Weights(features=1.0),
        Weights(attention=1.0),
        Weights(outputs=0, features=1.0),
        Weights(outputs=0, attention=1.0),
    ],
    ids=["outputs", "features", "attention", "features alone", "attention alone"],
)
@pytest.mark.parametrize("kind", ["convolution", "transformer"])
def test_each_term_falls(kind: str, weights: Weights) -> None:
    """A narrower, shallower student, by each term and by several; the teacher does not change."""
    if kind == "convolution":
        teacher, model, batches = _conv(16, 4), _conv(6, 2, seed=1), _images
    else:
        teacher, model, batches = _bert(4, 16, layers=4), _bert(2, 8), _texts
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = Student(model, _call, ModuleTeacher(teacher, _call, weights.inside), weights, next(batches(0)))
    result = fit(
        student, batches, STEPS, lambda student, batch: student(batch), TrainSettings(6, 0.02)
    )  # fmt: skip
    assert result.epoch_losses[-1] < 0.8 * result.epoch_losses[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_model_itself_is_trained_and_stays_plain() -> None:
    """No projection or hook is left on the model that comes out."""
    model = _conv(6, 2, seed=1)
    names = set(model.state_dict())
    weights = Weights(features=1.0)
    student = Student(
        model, _call, ModuleTeacher(_conv(16, 4), _call, True), weights, next(_images(0))
    )  # fmt: skip
    assert len(student.projections) == 2
    fit(student, _images, STEPS, lambda student, batch: student(batch), TrainSettings(1, 0.01))
    assert set(model.state_dict()) == names
    assert not any(module._forward_hooks for module in model.modules())


def test_a_projection_begins_as_the_best_linear_one() -> None:
    """So the student is drawn to what the teacher shows, and not to a random image of it."""
    batch = next(_images(0))
    model, teacher = _conv(6, 2, seed=1).eval(), _conv(16, 2).eval()
    student = Student(model, _call, ModuleTeacher(teacher, _call, True), Weights(features=1.0), batch)
    own, other = (look(net, _call, batch, inside=True).features for net in (model, teacher))
    for projection, mine, wanted in zip(student.projections, own, other, strict=True):
        given, target = (x.detach().movedim(1, -1).flatten(0, -2).double() for x in (mine, wanted))
        best = torch.linalg.lstsq(given, target).solution
        least = (given @ best - target).square().mean()
        assert (projection(mine) - wanted).square().mean() < 1.01 * least + 1e-6


def test_a_transformer_shows_the_probabilities_of_its_heads() -> None:
    """Rows that add up to 1, one map a layer, and the activation after each block."""
    seen = look(_bert(4, 16).eval(), _call, next(_texts(0)), inside=True)
    assert [tuple(map_.shape) for map_ in seen.attention] == [(8, 4, 7, 7)] * 2
    assert all(torch.allclose(map_.sum(dim=-1), torch.ones(8, 4, 7)) for map_ in seen.attention)
    assert [tuple(activation.shape) for activation in seen.features] == [(8, 7, 16)] * 2


def test_an_onnx_file_teaches(tmp_path: Path) -> None:
    """Its answers are ONNX Runtime's; a student of the same shape learns them."""
    teacher = OnnxTeacher(_linear_onnx(tmp_path / "t.onnx"))
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(16, 4, generator=generator),) for _ in range(STEPS)]
    model = nn.Linear(4, 3)
    student = Student(model, _call, teacher, Weights(), data[0])
    fit(student, lambda _epoch: data, STEPS, lambda student, batch: student(batch), TrainSettings(20, 0.1))
    with torch.no_grad():
        assert torch.allclose(model(data[0][0]), teacher({"x": data[0][0]}).outputs[0], atol=0.05)


@pytest.mark.parametrize(
    ("case", "what"),
    [
        ("answers", "answers"),
        ("deeper", "blocks"),
        ("onnx inside", "shows no blocks"),
        ("places", "a block of the student"),
        ("input", "not in the data"),
        ("no file", "cannot be loaded"),
        ("labels", "no loss from labels"),
    ],
)
def test_what_does_not_go_together_is_said(case: str, what: str, tmp_path: Path) -> None:
    """Before the first step, in three lines."""
    with pytest.raises(TrainingError, match=what) as caught:
        _provoke(case, tmp_path)
    assert len(str(caught.value).splitlines()) == 3


def _provoke(case: str, tmp_path: Path) -> None:
    images, row = next(_images(0)), (torch.zeros(2, 4),)
    teacher = ModuleTeacher(_conv(8, 2), _call, inside=True)
    if case == "answers":
        Student(nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), _call, teacher, Weights(), images)
    elif case == "deeper":
        Student(_conv(8, 3), _call, teacher, Weights(features=1), images)
    elif case == "onnx inside":
        student = nn.Sequential(nn.Sequential(nn.Linear(4, 3)), nn.Sequential(nn.Linear(3, 3)))
        file = OnnxTeacher(_linear_onnx(tmp_path / "t.onnx"))
        Student(student, _call, file, Weights(features=1), row)
    elif case == "places":
        strided = _conv(8, 2)
        strided.get_submodule("0.0.0").stride = (2, 2)  # type: ignore[assignment]
        Student(strided, _call, teacher, Weights(attention=1), images)
    elif case == "input":
        OnnxTeacher(_linear_onnx(tmp_path / "t.onnx", inputs="other"))({"x": row[0]})
    elif case == "no file":
        OnnxTeacher(tmp_path / "missing.onnx")
    else:
        Student(_conv(8, 2), _call, teacher, Weights(labels=1), images)


def test_equal_models_have_no_loss_and_energy_ignores_width() -> None:
    """Each loss is zero where both agree, however many channels or heads repeat it."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.softmax(torch.randn(2, 3, 5, 5, generator=generator), dim=-1)
    planes = torch.randn(2, 4, 6, 6, generator=generator)
    tokens = torch.randn(2, 5, 8, generator=generator)
    assert float(losses.attention([maps.repeat(1, 2, 1, 1)], [maps])) == pytest.approx(0, abs=1e-6)
    assert float(losses.energy([planes.repeat(1, 2, 1, 1)], [planes])) == pytest.approx(0, abs=1e-6)
    assert float(losses.energy([3 * tokens.repeat(1, 1, 2)], [tokens])) == pytest.approx(0, abs=1e-6)
    assert float(losses.features([tokens], [tokens])) == 0
    assert float(losses.attention([maps.roll(1, dims=-1)], [maps])) > 0.01
    assert float(losses.energy([planes.roll(1, dims=-1)], [planes])) > 0.01


def test_padding_teaches_nothing() -> None:
    """Texts of several lengths give the loss of what is in them: filled up further, they give the same."""
    student, teacher = _bert(2, 16).bert.eval(), _bert(4, 32).bert.eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    mask = torch.ones(8, 7, dtype=torch.int64)
    mask[:4, 5:] = 0
    texts = {"input_ids": torch.randint(1, 50, (8, 7)) * mask, "attention_mask": mask}
    longer = {name: torch.nn.functional.pad(values, (0, 4)) for name, values in texts.items()}

    def call(model: nn.Module, batch: Any) -> list[Tensor]:
        return [model(**batch).last_hidden_state[..., :16]]

    for weights in (Weights(), Weights(outputs=0, features=1.0), Weights(outputs=0, attention=1.0)):
        taught = Student(student, call, ModuleTeacher(teacher, call, weights.inside), weights, texts)
        with torch.no_grad():
            torch.testing.assert_close(taught(longer), taught(texts))
