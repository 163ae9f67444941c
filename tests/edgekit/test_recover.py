"""Recovery: the pruned model learns to answer as the original, without labels, the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_testing import aligned_profile, dataset, noise, run_stage, sources, torch_model
from torch import nn

from edgekit import ort, surgery
from edgekit.artifact import Artifact
from edgekit.errors import BadInput
from edgekit.models import Model
from edgekit.modules import forward
from edgekit.recipe import Prune, Recover
from host_trainer.distill import look

SHAPE = (3, 6, 6)


def _net() -> nn.Module:
    """A classifier whose answers differ from image to image, with statistics as after a training."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (net[0], net[3], net[8]):
            layer.weight *= 4  # type: ignore[operator]
        for _ in range(40):
            net(torch.randn(64, *SHAPE))
    return net


@pytest.fixture(scope="module")
def model() -> Model:
    """A small convolutional classifier."""
    return torch_model(_net, image=SHAPE)


@pytest.fixture(scope="module")
def pruned(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The model with half of its parameters."""
    config = {"prune": Prune(allocation="global"), "size": 0.5, "latency_share": None, "seed": 0}
    out = tmp_path_factory.mktemp("pruned") / "out"
    return run_stage("prune", config, sources(model), out, aligned_profile(4))


def _recover(
    model: Model, pruned: Artifact, out: Path, count: int = 64, seed: int = 0, **settings: Any
) -> Artifact:
    images = dataset(noise({"image": SHAPE}, count))
    config = {"recover": {"epochs": 6, "batch_size": 16, **settings}, "seed": seed, "threads": 1}
    return run_stage("recover", config, sources(model, images), out, model=pruned)


def _distance(model: Model, artifact: Artifact) -> float:
    """Mean squared distance to the original's logits on images that were not trained on."""
    images = torch.from_numpy(np.random.default_rng(77).normal(size=(64, *SHAPE)).astype(np.float32))
    student = surgery.load_into(model.module(), artifact.path)
    return float((forward(student, (images,))[0] - forward(model.module(), (images,))[0]).pow(2).mean())


def test_it_answers_more_like_the_original(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """On data that it was not trained on, the recovered model is far nearer to the original's answers."""
    recovered = _recover(model, pruned, tmp_path / "out", count=256)
    assert _distance(model, recovered) < 0.5 * _distance(model, pruned)
    losses = recovered.metadata["epoch_losses"]
    assert losses[-1] < losses[0]
    assert recovered.metadata["steps"] == 6 * 16
    assert recovered.metadata["batchnorm_layers"] == 2


def test_the_structure_stays(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """Recovery changes numbers, not shapes."""
    recovered = _recover(model, pruned, tmp_path / "out", epochs=1)
    assert (recovered.path / surgery.STRUCTURE_FILE).read_bytes() == (
        pruned.path / surgery.STRUCTURE_FILE
    ).read_bytes()


def test_the_same_seed_gives_the_same_bytes(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """Bit for bit, whatever the caller's random state; another seed gives other weights."""
    first = _recover(model, pruned, tmp_path / "a", epochs=2)
    torch.manual_seed(99)
    second = _recover(model, pruned, tmp_path / "b", epochs=2)
    third = _recover(model, pruned, tmp_path / "c", epochs=2, seed=1)
    assert first.sha256 == second.sha256 != third.sha256


def test_zero_epochs_recalibrate_only(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """Without training, the BatchNorm statistics are still those of the data."""
    result = _recover(model, pruned, tmp_path / "out", epochs=0)
    assert result.metadata["steps"] == 0
    before = surgery.load_into(model.module(), pruned.path).state_dict()
    after = surgery.load_into(model.module(), result.path).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("running" in name or "num_batches" in name for name in changed)


def test_fewer_samples_than_a_batch_are_enough(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """A handful of samples makes one small batch."""
    assert _recover(model, pruned, tmp_path / "out", count=5, epochs=2).metadata["steps"] == 2


def test_a_single_sample_is_refused(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """Statistics of one sample are none: an error with three lines, not a traceback from torch."""
    with pytest.raises(BadInput, match="too few"):
        _recover(model, pruned, tmp_path / "out", count=1)


def test_a_diverging_recovery_is_named(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """A learning rate that blows up is an error that names the setting."""
    with pytest.raises(BadInput, match="recovery failed") as caught:
        _recover(model, pruned, tmp_path / "out", learning_rate=1e30)
    assert "learning_rate" in caught.value.fix


def test_the_defaults_are_valid() -> None:
    """The stage takes the recipe's own defaults."""
    assert Recover().batch_size >= 2


def test_it_stops_when_nothing_gets_better_and_keeps_the_best(
    model: Model, pruned: Artifact, tmp_path: Path
) -> None:
    """With patience, an eighth of the data says when to stop; a step too long to help is not kept."""
    stopped = _recover(model, pruned, tmp_path / "a", epochs=30, learning_rate=1.0, patience=1)
    assert "no better" in stopped.metadata["stopped"]
    assert stopped.metadata["steps"] < 30 * 3
    whole = _recover(model, pruned, tmp_path / "b", epochs=2)
    assert whole.metadata["stopped"] is None


def test_the_time_budget_ends_it(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """After the budget no further step is taken; what was learnt till then counts."""
    recovered = _recover(model, pruned, tmp_path / "out", epochs=10_000, budget_s=1.0)
    assert recovered.metadata["stopped"] == "the time budget was used up"
    assert 0 < recovered.metadata["steps"] < 10_000 * 4
    assert _distance(model, recovered) < _distance(model, pruned)


def test_epochs_through_rounding_leave_a_float_model(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """The epochs with rounding are taken, and what is saved is a float model with the names that it had."""
    recovered = _recover(model, pruned, tmp_path / "out", epochs=2, quantization_aware_epochs=1)
    assert recovered.metadata["steps"] == 3 * 4
    assert (recovered.path / surgery.STRUCTURE_FILE).read_bytes() == (
        pruned.path / surgery.STRUCTURE_FILE
    ).read_bytes()
    assert np.isfinite(_distance(model, recovered))


def _lopsided_net() -> nn.Module:
    """Three channels are a hundred times as large as the others and are scaled back behind: one scale for the
    whole tensor leaves the others few of its 8-bit steps.
    """
    net = _net()
    with torch.no_grad():
        for channel in (0, 5, 9):
            net[1].weight[channel] *= 100  # type: ignore[index]
            net[1].bias[channel] *= 100  # type: ignore[index]
            net[3].weight[:, channel] /= 100  # type: ignore[index]
    return net


def test_recovery_through_rounding_makes_int8_do_less_harm(tmp_path: Path) -> None:
    """What ONNX Runtime's INT8 adds to the error is less than what it adds after as many epochs without
    rounding, where INT8 does harm.
    """
    model = torch_model(_lopsided_net, image=SHAPE)
    whole = {"prune": Prune(allocation="global"), "size": 1.0, "latency_share": None, "seed": 0}
    start = run_stage("prune", whole, sources(model), tmp_path / "start", aligned_profile(4))
    settings = {"count": 256, "learning_rate": 1e-2}
    through = _recover(model, start, tmp_path / "a", epochs=6, quantization_aware_epochs=6, **settings)
    without = _recover(model, start, tmp_path / "b", epochs=12, **settings)
    harm = _int8_harm(model, through, tmp_path / "c")
    # 0.12 to 0.68 of it for three seeds and two learning rates
    assert harm < _int8_harm(model, without, tmp_path / "d")


def _int8_harm(model: Model, recovered: Artifact, home: Path) -> float:
    """Mean squared distance to the original's logits, of the INT8 graph less that of the float graph."""
    given = sources(model, dataset(noise({"image": SHAPE}, 256)))
    plain = run_stage("export", {"export": {}}, given, home / "float", model=recovered)
    config = {"precision": "int8", "quantize": {"observer": "minmax", "methods": []}, "bound": None}
    int8 = run_stage("quantize", config, given, home / "int8", graph=plain)
    images = np.random.default_rng(77).normal(size=(64, *SHAPE)).astype(np.float32)
    wanted = forward(model.module(), (torch.from_numpy(images),))[0].numpy()
    errors = []
    for graph in (int8, plain):
        (answers,) = ort.Session(graph.path / "model.onnx", 1).run({"image": images}).values()
        errors.append(float(np.square(answers - wanted).mean()))
    return errors[0] - errors[1]


def _blocks_net() -> nn.Module:
    """As ``_net``, in blocks."""
    net = nn.Sequential(
        *(
            nn.Sequential(nn.Conv2d(width, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
            for width in (3, 16, 16)
        ),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter *= 4
        for _ in range(40):
            net(torch.randn(64, *SHAPE))
    return net


def test_features_of_the_original_are_kept_too(tmp_path: Path) -> None:
    """With ``feature_weight``, what the original's blocks show can be told better from the pruned model's,
    whose blocks are narrower; its answers are no worse, and nothing of the projections is left.
    """
    model = torch_model(_blocks_net, image=SHAPE)
    half = {"prune": Prune(allocation="global"), "size": 0.5, "latency_share": None, "seed": 0}
    pruned = run_stage("prune", half, sources(model), tmp_path / "pruned", aligned_profile(4))
    plain = _recover(model, pruned, tmp_path / "a", count=256)
    taught = _recover(model, pruned, tmp_path / "b", count=256, feature_weight=1.0)
    for without, having in zip(_untold(model, plain), _untold(model, taught), strict=True):
        assert having < 0.97 * without
    assert _distance(model, taught) < 1.1 * _distance(model, plain)
    assert (taught.path / surgery.STRUCTURE_FILE).read_bytes() == (
        pruned.path / surgery.STRUCTURE_FILE
    ).read_bytes()


def _untold(model: Model, artifact: Artifact) -> list[float]:
    """For each block, the share of the original's activations that no linear map of the student's gives."""
    images = torch.from_numpy(np.random.default_rng(77).normal(size=(64, *SHAPE)).astype(np.float32))
    shares = []
    seen = [
        look(module.eval(), lambda net, batch: net(*batch), (images,), inside=True).features
        for module in (surgery.load_into(model.module(), artifact.path), model.module())
    ]
    for mine, wanted in zip(*seen, strict=True):
        given, target = (tensor.detach().movedim(1, -1).flatten(0, -2).numpy() for tensor in (mine, wanted))
        best = np.linalg.lstsq(given, target, rcond=None)[0]
        shares.append(float(np.square(given @ best - target).mean() / target.var()))
    return shares


def test_features_need_blocks(model: Model, pruned: Artifact, tmp_path: Path) -> None:
    """A network without repeated parts has no such features: an error that says so, not a silent zero."""
    with pytest.raises(BadInput, match="shows no blocks"):
        _recover(model, pruned, tmp_path / "out", feature_weight=1.0)


class _Block(nn.Module):
    """Two layers beside a sum, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return answer


def _residual_net() -> nn.Module:
    blocks = nn.Sequential(_Block(), _Block(), _Block())
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 24), blocks, nn.Linear(24, 5))
    with torch.no_grad():
        net[3].weight *= 8  # type: ignore[operator]
    return net


def test_low_rank_updates_are_merged(tmp_path: Path) -> None:
    """With ``adapter_rank``, what recovery adds to a block's layers has that rank, and the first layer stays;
    the model is nearer to the original all the same, is a plain one, and the same every time.
    """
    model = torch_model(_residual_net, image=SHAPE)
    half = {"prune": Prune(allocation="global"), "size": 0.5, "latency_share": None, "seed": 0}
    pruned = run_stage("prune", half, sources(model), tmp_path / "pruned", aligned_profile(4))
    settings = {"count": 256, "adapter_rank": 3, "epochs": 8, "learning_rate": 1e-2}
    recovered = _recover(model, pruned, tmp_path / "a", **settings)
    assert _distance(model, recovered) < 0.8 * _distance(model, pruned)
    before, after = (surgery.load_into(model.module(), it.path).state_dict() for it in (pruned, recovered))
    assert list(after) == list(before)
    ranks = {
        name: int(torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-4))
        for name in before
        if before[name].ndim == 2
    }
    assert ranks.pop("1.weight") == 0
    assert ranks.pop("3.weight") == 5
    assert set(ranks.values()) == {3}
    again = _recover(model, pruned, tmp_path / "b", **settings)
    assert (again.path / surgery.WEIGHTS_FILE).read_bytes() == (
        recovered.path / surgery.WEIGHTS_FILE
    ).read_bytes()


def test_rounding_comes_after_the_updates_are_merged(tmp_path: Path) -> None:
    """Epochs through rounding train all weights of the merged model."""
    model = torch_model(_residual_net, image=SHAPE)
    whole = {"prune": Prune(allocation="global"), "size": 1.0, "latency_share": None, "seed": 0}
    start = run_stage("prune", whole, sources(model), tmp_path / "start", aligned_profile(4))
    made = _recover(model, start, tmp_path / "a", adapter_rank=2, epochs=1, quantization_aware_epochs=1)
    before, after = (surgery.load_into(model.module(), it.path).state_dict() for it in (start, made))
    assert list(after) == list(before)
    assert int(torch.linalg.matrix_rank(after["2.0.up.weight"] - before["2.0.up.weight"], rtol=1e-4)) > 2
