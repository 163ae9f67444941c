"""Surgery: the shape of a changed model, written without pickle and read back to the bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgekit import surgery
from edgekit.errors import BadInput


class Net(nn.Module):
    """Layers whose numbers, parameters and buffers surgery has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.heads = 2
        self.sizes = (1, 2)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(x)).mean(dim=(2, 3)))
        return logits


def _cut(model: Net, width: int) -> Net:
    """Keep the first channels, by hand."""
    cut = copy.deepcopy(model)
    cut.conv.weight = nn.Parameter(model.conv.weight[:width].detach().clone())
    cut.conv.bias = nn.Parameter(model.conv.bias[:width].detach().clone())  # type: ignore[index]
    cut.conv.out_channels = cut.norm.num_features = cut.head.in_features = width
    cut.norm.weight = nn.Parameter(model.norm.weight[:width].detach().clone())
    cut.norm.bias = nn.Parameter(model.norm.bias[:width].detach().clone())
    cut.norm.running_mean = torch.randn(width)
    cut.norm.running_var = torch.rand(width) + 0.5
    cut.head.weight = nn.Parameter(model.head.weight[:, :width].detach().clone())
    cut.heads, cut.sizes = 1, (width, 2)
    return cut


@given(width=st.integers(1, 8))
def test_a_changed_model_comes_back_to_the_bit(tmp_path_factory: pytest.TempPathFactory, width: int) -> None:
    """Every tensor, number, tuple and frozen parameter of the changed model is there again."""
    directory = tmp_path_factory.mktemp("surgery")
    torch.manual_seed(1)
    original = Net().eval()
    cut = _cut(original, width).eval()
    surgery.save(directory, surgery.edits_between(original, cut), cut)
    again = surgery.load_into(Net(), directory)
    assert isinstance(again, Net)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(again(x), cut(x))
    assert (again.heads, again.sizes, again.conv.out_channels) == (1, (width, 2), width)
    assert again.state_dict().keys() == cut.state_dict().keys()
    assert not again.head.bias.requires_grad
    assert again.conv.weight.requires_grad
    assert not again.training


def test_an_unchanged_model_has_no_edits() -> None:
    """Only differences are kept, and whether a model trains is none."""
    model = Net()
    assert surgery.edits_between(model, copy.deepcopy(model).eval()) == {}


def test_the_files_hold_data_only(tmp_path: Path) -> None:
    """JSON and safetensors; the same model gives the same bytes."""
    model = Net()
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        surgery.save(tmp_path / name, surgery.edits_between(model, _cut(model, 4)), model)
        contents.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert contents[0] == contents[1]
    edits = json.loads((tmp_path / "a" / surgery.STRUCTURE_FILE).read_text())
    assert edits["conv"] == {"out_channels": 4}


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """Edits for a module or a tensor that the model lacks: an error, not a mixture."""
    model = Net()
    surgery.save(tmp_path, {}, model)
    with pytest.raises(BadInput, match="do not fit this model"):
        surgery.load_into(nn.Linear(2, 2), tmp_path)
    surgery.save(tmp_path, {"missing": {"out_features": 3}}, model)
    with pytest.raises(BadInput, match="no module 'missing'"):
        surgery.load_into(Net(), tmp_path)
