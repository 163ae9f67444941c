"""Pruning: to the asked size, in the device's widths, with the outputs as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stage_testing import aligned_profile, run_stage, sources, torch_model
from torch import Tensor, nn

from edgekit import surgery
from edgekit.artifact import Artifact
from edgekit.errors import BadInput
from edgekit.models import Model
from edgekit.modules import forward, parameter_count
from edgekit.pruning.allocation import kept_width
from edgekit.recipe import Prune


def conv(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    """Convolution, normalization, ReLU."""
    options = {"padding": 1, "bias": False, **options}
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, **options), nn.BatchNorm2d(outputs), nn.ReLU())


class Chain(nn.Module):
    """Convolutions one after the other, and a head."""

    def __init__(self, *, softmax: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 32), conv(32, 64), conv(64, 64))
        self.head = nn.Linear(64, 10)
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean(dim=(2, 3)))
        return logits.softmax(dim=1) if self.softmax else logits


class Residual(Chain):
    """A sum ties the widths of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = conv(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        logits: Tensor = self.head((x + self.branch(x)).mean(dim=(2, 3)))
        return logits


class Concat(Chain):
    """Two branches, concatenated along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = conv(3, 32)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([self.body(x), self.branch(x)], dim=1).mean(dim=(2, 3)))
        return logits


class Depthwise(Chain):
    """Depthwise and pointwise convolutions, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        point = nn.Sequential(nn.Conv2d(64, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.body = nn.Sequential(conv(3, 64), conv(64, 64, groups=64), point)


class Grouped(Chain):
    """A convolution in four groups, as in ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 64), conv(64, 64, groups=4), conv(64, 64))


class TwoHeads(Chain):
    """Two outputs, one of them a map that is seen through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(64, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = self.body(x)
        return self.head(x.mean(dim=(2, 3))), self.map(x).flatten(2)


class Encoder(nn.Module):
    """Convolutions whose last activations are the output, through a norm and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 32), conv(32, 64), conv(64, 48))

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


NETS = [Chain, Residual, Concat, Depthwise, Grouped, TwoHeads, Encoder, lambda: Chain(softmax=True)]


def _prune(
    model: Model, out: Path, size: float = 0.5, alignment: int = 8, seed: int = 0, **settings: Any
) -> Artifact:
    by_rank = Prune(**{"allocation": "global", **settings})
    config = {"prune": by_rank, "size": size, "latency_share": None, "seed": seed}
    return run_stage("prune", config, sources(model), out, aligned_profile(alignment))


def _load(model: Model, pruned: Artifact) -> nn.Module:
    return surgery.load_into(model.module(), pruned.path)


@pytest.mark.parametrize("build", NETS)
def test_outputs_keep_their_shape_and_widths_fit_the_device(build: Any, tmp_path: Path) -> None:
    """Sums, concatenations, depthwise and grouped convolutions, heads: pruned, running, aligned."""
    model = torch_model(build, image=(3, 8, 8))
    pruned = _prune(model, tmp_path / "pruned")
    module = _load(model, pruned)
    assert parameter_count(module) <= 0.5 * parameter_count(model.module())
    assert pruned.metadata["params"] == parameter_count(module)
    example = tuple(torch.from_numpy(array) for array in model.example(3).values())
    want = [value.shape for value in forward(model.module(), example)]
    got = forward(module, example)
    assert [value.shape for value in got] == want
    assert all(torch.isfinite(value).all() for value in got)
    for name, (before, after) in pruned.metadata["widths"].items():
        assert after == before or after % 8 == 0, name
        assert 0 < after <= before


@pytest.mark.parametrize("alignment", [1, 4, 16, 32])
def test_every_width_is_a_multiple_of_the_alignment(alignment: int, tmp_path: Path) -> None:
    """What was cut has a width that the profile's kernels like."""
    pruned = _prune(torch_model(Residual, image=(3, 8, 8)), tmp_path / "p", 0.6, alignment)
    changed = [after for before, after in pruned.metadata["widths"].values() if after != before]
    assert changed
    assert all(width % alignment == 0 for width in changed)


@given(
    width=st.integers(1, 512),
    ratio=st.floats(0.05, 0.95),
    unit=st.sampled_from([1, 4, 8, 16, 32, 48]),
    data=st.data(),
)
def test_kept_widths_are_aligned_bounded_and_ordered(
    width: int, ratio: float, unit: int, data: st.DataObject
) -> None:
    """A layer keeps all of its width or a multiple of the unit, at least what it must, and never nothing;
    wanting less never keeps more.
    """
    wanted = data.draw(st.integers(0, width))
    kept = kept_width(width, wanted, ratio, unit)
    assert kept == width or kept % unit == 0
    assert width * (1 - ratio) - 1e-6 <= kept <= width
    assert kept >= 1
    assert kept_width(width, max(0, wanted - 1), ratio, unit) <= kept


@pytest.mark.parametrize("build", [Residual, Grouped, Depthwise])
def test_asking_for_less_never_keeps_more(build: Any, tmp_path: Path) -> None:
    """Down to the least that is possible, a smaller size gives a smaller model."""
    model = torch_model(build, image=(3, 8, 8))
    params = [
        _prune(model, tmp_path / str(size), size, alignment=16).metadata["params"]
        for size in (0.8, 0.6, 0.4, 0.2)
    ]
    assert params == sorted(params, reverse=True)


@pytest.mark.parametrize("build", [Chain, TwoHeads, Encoder, lambda: Chain(softmax=True)])
def test_layers_that_make_outputs_keep_their_width(build: Any, tmp_path: Path) -> None:
    """The head stays as wide as the classes, behind a softmax, a view or a norm as well."""
    model = torch_model(build, image=(3, 8, 8))
    pruned = _prune(model, tmp_path / "pruned")
    for name in ("head", "map", "body.2.0"):
        if name in pruned.metadata["widths"] and (name != "body.2.0" or build is Encoder):
            before, after = pruned.metadata["widths"][name]
            assert before == after, name


@pytest.mark.parametrize("size", [0.9, 0.6, 0.35, 0.2])
def test_the_largest_model_within_the_size_is_taken(size: float, tmp_path: Path) -> None:
    """No more is cut than asked: one alignment step less in every layer would be too large."""
    model = torch_model(Chain, image=(3, 8, 8))
    pruned = _prune(model, tmp_path / "pruned", size, alignment=1)
    ratio = pruned.metadata["params"] / pruned.metadata["params_original"]
    assert size - 0.05 <= ratio <= size


def test_the_saved_model_is_the_pruned_model_to_the_bit(tmp_path: Path) -> None:
    """Structure and weights read back compute what was written; the same seed writes the same bytes."""
    model = torch_model(Residual, image=(3, 8, 8))
    first = _prune(model, tmp_path / "first")
    second = _prune(model, tmp_path / "second")
    assert first.sha256 == second.sha256
    example = tuple(torch.from_numpy(array) for array in model.example(3).values())
    for a, b in zip(
        forward(_load(model, first), example), forward(_load(model, second), example), strict=True
    ):
        assert torch.equal(a, b)


def test_the_smallest_channels_go_first(tmp_path: Path) -> None:
    """As long as there are channels whose weights are nearly zero, no other is cut."""

    def build() -> nn.Module:
        net = Chain()
        with torch.no_grad():
            net.body[1][0].weight[::2] *= 1e-4
            net.body[1][1].weight[::2] *= 1e-4
            net.body[2][0].weight[:, ::2] *= 1e-4
        return net

    model = torch_model(build, image=(3, 8, 8))
    module = _load(model, _prune(model, tmp_path / "pruned", 0.75, alignment=1))
    largest = module.body[1][0].weight.abs().amax(dim=(1, 2, 3))  # type: ignore[index,union-attr]
    assert int((largest > 1e-3).sum()) == 32
    assert len(largest) < 64


def test_a_random_choice_is_another_one(tmp_path: Path) -> None:
    """The control, ``importance = "random"``, follows the seed and differs from the magnitude."""
    model = torch_model(Chain, image=(3, 8, 8))
    digests = {
        _prune(model, tmp_path / "a").sha256,
        _prune(model, tmp_path / "b", importance="random").sha256,
        _prune(model, tmp_path / "c", importance="random", seed=1).sha256,
    }
    assert len(digests) == 3


def test_no_layer_loses_more_than_it_may(tmp_path: Path) -> None:
    """``max_layer_ratio`` bounds every layer; a size beyond it gives the smallest model within the bound."""
    model = torch_model(Chain, image=(3, 8, 8))
    pruned = _prune(model, tmp_path / "pruned", 0.6, alignment=1, max_layer_ratio=0.5)
    assert all(after >= before * 0.5 for before, after in pruned.metadata["widths"].values())
    smallest = _prune(model, tmp_path / "too-far", 0.05, alignment=1, max_layer_ratio=0.5).metadata
    assert 0.05 < smallest["params"] / smallest["params_original"] < 0.6
    assert all(after >= before * 0.5 for before, after in smallest["widths"].values())


@pytest.mark.parametrize("build", [Chain, Residual, Grouped, Encoder])
def test_a_cut_of_what_was_cut_counts_from_the_original(build: Any, tmp_path: Path) -> None:
    """Two cuts reach the size that is asked of the original, and are told by the original's widths."""
    model = torch_model(build, image=(3, 8, 8))
    first = _prune(model, tmp_path / "first", 0.7, alignment=1, steps=2)
    config = {
        "prune": Prune(allocation="global", steps=2), "size": 0.49, "latency_share": None, "seed": 0,
    }  # fmt: skip
    second = run_stage("prune", config, sources(model), tmp_path / "second", aligned_profile(1), model=first)
    module = _load(model, second)
    whole = parameter_count(model.module())
    assert second.metadata["params"] == parameter_count(module)
    assert second.metadata["params_original"] == whole
    assert 0.35 * whole < second.metadata["params"] <= 0.49 * whole < first.metadata["params"]
    originals = dict(model.module().named_modules())
    for name, (before, after) in second.metadata["widths"].items():
        layer = originals[name]
        assert before == getattr(layer, "out_channels", getattr(layer, "out_features", None))
        assert after <= first.metadata["widths"][name][1]
    for name, (before, after) in second.metadata["groups"].items():
        assert before == first.metadata["groups"][name][1] >= after
    example = tuple(torch.from_numpy(array) for array in model.example(3).values())
    assert all(torch.isfinite(output).all() for output in forward(module, example))


class NothingToPrune(nn.Module):
    """A head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


class FixedReshape(Chain):
    """Reshapes to a width that is written into the code."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).reshape(-1, 64, 64).mean(dim=2))
        return logits


def test_what_cannot_be_pruned_says_so(tmp_path: Path) -> None:
    """A model without free channels: an error with the way out."""
    with pytest.raises(BadInput, match="--size") as caught:
        _prune(torch_model(NothingToPrune, image=(3, 2, 2)), tmp_path / "pruned")
    assert "cannot be pruned" in caught.value.what
    assert len(str(caught.value).splitlines()) == 3


def test_a_width_in_the_code_keeps_its_layer_alone(tmp_path: Path) -> None:
    """The layer whose width the code counts on stays whole, with the reason; the others are pruned."""
    pruned = _prune(torch_model(FixedReshape, image=(3, 8, 8)), tmp_path / "pruned")
    assert "needs its size" in pruned.metadata["kept_whole"]["body.2.0"]
    assert pruned.metadata["widths"]["body.2.0"] == [64, 64]
    assert pruned.metadata["params"] <= 0.5 * pruned.metadata["params_original"]


@pytest.mark.parametrize("importance", ["taylor", "hessian", "activation", "activation2"])
def test_channels_without_influence_go_first(importance: str, tmp_path: Path) -> None:
    """Channels that nothing reads are the least important by every measure on calibration data, however
    large their own weights are.
    """

    def build() -> nn.Module:
        net = Chain()
        with torch.no_grad():
            net.body[1][0].weight[::2] *= 10
            net.body[2][0].weight[:, ::2] = 0
        return net

    model = torch_model(build, image=(3, 8, 8))
    pruned = _prune(model, tmp_path / "pruned", 0.75, alignment=1, importance=importance, samples=4)
    module = _load(model, pruned)
    read = module.body[2][0].weight.abs().amax(dim=(0, 2, 3))  # type: ignore[index,union-attr]
    assert int((read > 0).sum()) == 32
    assert len(read) < 64


def test_the_caller_s_random_state_is_left_alone(tmp_path: Path) -> None:
    """Pruning draws from its own generator."""
    torch.manual_seed(9)
    want = torch.rand(3)
    torch.manual_seed(9)
    _prune(torch_model(Chain, image=(3, 8, 8)), tmp_path / "pruned", importance="random")
    assert torch.equal(torch.rand(3), want)
