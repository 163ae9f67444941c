"""Export: a free batch axis, proven; the other path where the first fails; nothing of this machine inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from stage_testing import run_stage, sources, torch_model
from torch import Tensor, nn

from edgekit import ort, profile
from edgekit.errors import BadInput
from edgekit.models import load_model
from edgekit.stages import export

EXPORT: dict[str, Any] = {"export": {}}


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


class TwoInTwoOut(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return self.mix(left) + right, right * 2


def _same(path: Path, module: nn.Module, batch: int, **inputs: np.ndarray[Any, Any]) -> None:
    got = ort.Session(path).run(inputs)
    with torch.no_grad():
        want = module(*(torch.from_numpy(value) for value in inputs.values()))
    for value, expected in zip(got.values(), want if isinstance(want, tuple) else (want,), strict=True):
        assert value.shape[0] == batch
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_any_batch_gives_the_module_s_outputs(tmp_path: Path) -> None:
    """The graph takes batches that the export never saw, and says how it was made."""
    model = torch_model(_conv, image=(3, 6, 6))
    made = run_stage("export", EXPORT, sources(model), tmp_path / "out")
    assert (made.metadata["exporter"], made.metadata["why"]) == ("dynamo", None)
    for batch in (1, 2, 7):
        _same(made.path / "model.onnx", model.module(), batch, image=model.example(batch)["image"])
    assert made.metadata["params"] == sum(p.numel() for p in model.module().parameters())


class AnyInputs(nn.Module):
    """Takes its inputs by position, as the wrapper of a transformers model does."""

    def __init__(self) -> None:
        super().__init__()
        self.body = TwoInTwoOut()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(*inputs)


def test_inputs_by_position_take_the_first_path_too(tmp_path: Path) -> None:
    """A forward of ``*inputs`` has a free batch axis in the newer exporter as well."""
    model = torch_model(AnyInputs, left=(4,), right=(3,))
    made = run_stage("export", EXPORT, sources(model), tmp_path / "out")
    assert (made.metadata["exporter"], made.metadata["why"]) == ("dynamo", None)
    _same(made.path / "model.onnx", model.module(), 5, **model.example(5))


def test_names_and_order_are_the_signature_s(tmp_path: Path) -> None:
    """Several inputs and outputs keep their names and their order."""
    model = torch_model(TwoInTwoOut, left=(4,), right=(3,))
    made = run_stage("export", EXPORT, sources(model), tmp_path / "out")
    session = ort.Session(made.path / "model.onnx")
    assert session.inputs == ("left", "right")
    assert session.outputs == ("output0", "output1")
    _same(made.path / "model.onnx", model.module(), 3, **model.example(3))


def test_the_same_model_gives_the_same_bytes_without_paths(tmp_path: Path) -> None:
    """Two exports are byte-identical and name no source file of this machine."""
    model = torch_model(_conv, image=(3, 6, 6))
    contents = [
        (run_stage("export", EXPORT, sources(model), tmp_path / name).path / "model.onnx").read_bytes()
        for name in ("a", "b")
    ]
    assert contents[0] == contents[1]
    for path in (str(Path(torch.__file__).parent), __file__):
        assert path.encode() not in contents[0]


@pytest.mark.parametrize("highest", [13, 17, 18])
def test_the_opset_stays_within_the_profile(highest: int, tmp_path: Path) -> None:
    """A device that reads at most opset N gets at most opset N."""
    device = profile.load("x86-cpu").model_copy(update={"highest_opset": highest})
    made = run_stage("export", EXPORT, sources(torch_model(_conv, image=(3, 6, 6))), tmp_path / "out", device)
    assert made.metadata["opset"] <= highest
    assert onnx.load(str(made.path / "model.onnx")).opset_import[0].version <= highest


def _failing(*_: Any) -> None:
    raise AssertionError("cannot trace\nand more")


def test_the_other_path_is_taken_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where dynamo fails, the TorchScript path is tried, proven the same way, and the reason is kept."""
    monkeypatch.setattr(export, "_dynamo", _failing)
    model = torch_model(_conv, image=(3, 6, 6))
    made = run_stage("export", EXPORT, sources(model), tmp_path / "out")
    assert made.metadata["exporter"] == "torchscript"
    assert made.metadata["why"] == "dynamo: AssertionError: cannot trace"
    _same(made.path / "model.onnx", model.module(), 5, image=model.example(5)["image"])


def _wrong_batch(export_path: Callable[..., None]) -> Callable[..., None]:
    """A double of an exporter that freezes the batch without an error."""

    def frozen(module: nn.Module, model: Any, opset: int, path: Path) -> None:
        export_path(module, model, opset, path)
        graph = onnx.load(str(path))
        graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
        onnx.save(graph, str(path))

    return frozen


def test_a_frozen_batch_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export that "succeeds" with the batch frozen is not taken; if both do, the error says so."""
    monkeypatch.setattr(export, "_dynamo", _wrong_batch(export._torchscript))
    model = torch_model(_conv, image=(3, 6, 6))
    made = run_stage("export", EXPORT, sources(model), tmp_path / "a")
    assert made.metadata["exporter"] == "torchscript"
    monkeypatch.setattr(export, "_torchscript", _failing)
    with pytest.raises(BadInput, match="cannot be exported") as caught:
        run_stage("export", EXPORT, sources(model), tmp_path / "b")
    assert "dynamo" in caught.value.why
    assert "cannot trace" in caught.value.why
    assert len(str(caught.value).splitlines()) == 3


def test_a_wrong_graph_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose numbers differ from the module's is not taken."""

    def other_weights(module: nn.Module, model: Any, opset: int, path: Path) -> None:
        with torch.no_grad():
            changed = _conv()
        export_torchscript(changed.eval(), model, opset, path)

    export_torchscript = export._torchscript
    monkeypatch.setattr(export, "_dynamo", other_weights)
    monkeypatch.setattr(export, "_torchscript", _failing)
    with pytest.raises(BadInput, match="cannot be exported") as caught:
        run_stage("export", EXPORT, sources(torch_model(_conv, image=(3, 6, 6))), tmp_path / "out")
    assert "differs from the module" in caught.value.why


class _Masked(nn.Module):
    """Scores, some of them ruled out, and a logarithm that has no value for some inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = x.masked_fill(x > 1.0, float("-inf")) + torch.log(x + 1.0)
        return scores


def test_what_is_no_number_must_be_none_in_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Infinite scores and NaN of the module are no reason against its graph; NaN where it has none are."""
    model = torch_model(_Masked, image=(3, 6, 6))
    made = run_stage("export", EXPORT, sources(model), tmp_path / "a")
    assert made.metadata["exporter"] == "dynamo"

    def without_values(module: nn.Module, model: Any, opset: int, path: Path) -> None:
        lost = nn.Sequential(module, nn.Threshold(100.0, float("nan"))).eval()
        export._torchscript(lost, model, opset, path)

    monkeypatch.setattr(export, "_dynamo", without_values)
    made = run_stage("export", EXPORT, sources(torch_model(_conv, image=(3, 6, 6))), tmp_path / "b")
    assert made.metadata["exporter"] == "torchscript"


def test_a_given_graph_is_taken_over_in_one_file(tmp_path: Path) -> None:
    """An ONNX model with external data becomes one self-contained file with the same outputs."""
    model = torch_model(_conv, image=(3, 6, 6))
    made = run_stage("export", EXPORT, sources(model), tmp_path / "first")
    graph = onnx.load(str(made.path / "model.onnx"))
    onnx.save(
        graph, str(tmp_path / "given.onnx"), save_as_external_data=True, location="weights", size_threshold=0
    )
    given = load_model(tmp_path / "given.onnx")
    taken = run_stage("export", EXPORT, sources(given), tmp_path / "second")
    assert [path.name for path in taken.path.iterdir()] == ["model.onnx"]
    _same(taken.path / "model.onnx", model.module(), 2, image=model.example(2)["image"])
    device = profile.load("x86-cpu").model_copy(update={"highest_opset": 13})
    with pytest.raises(BadInput, match="at most opset 13"):
        run_stage("export", EXPORT, sources(given), tmp_path / "third", device)
    own = taken.metadata["opset"]
    same = run_stage("export", {"export": {"opset": own}}, sources(given), tmp_path / "fourth")
    assert same.metadata["opset"] == own
    with pytest.raises(BadInput, match=f"export.opset {own - 1} contradicts the model"):
        run_stage("export", {"export": {"opset": own - 1}}, sources(given), tmp_path / "fifth")
