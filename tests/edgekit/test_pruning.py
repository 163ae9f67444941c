"""What depends on what: groups followed through real modules; removing what is zero changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgekit import pruning
from edgekit.modules import output_tensors, parameter_count
from edgekit.pruning.labels import Labels
from edgekit.pruning.rewriting import rewrite

LENGTH, VOCABULARY = 9, 50


class Image(nn.Module):
    """Convolutions of every kind, with a sum, a concatenation, a channel shuffle and a gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.side = nn.Conv2d(16, 32, 1)
        self.mix = nn.Conv2d(48, 24, 1)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.gate = nn.Conv2d(12, 16, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.grouped(self.depthwise(x)) + self.side(x))
        y = y.reshape(y.shape[0], 2, -1, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        y = torch.relu(self.up(torch.relu(self.mix(torch.cat([x, y], dim=1)))))
        a, b = self.gate(nn.functional.hardswish(y, inplace=True)).chunk(2, dim=1)
        logits: Tensor = self.head((a * torch.sigmoid(b)).mean(dim=(2, 3)))
        return logits


class Keeping(nn.Module):
    """Makes a tensor once and keeps it, as BEiT its index of positions; and splits channels by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.zeros(5000)[:24] + torch.zeros(24)
        x = torch.relu(self.second(torch.relu(self.first(x))) + self.kept)
        x = x.reshape(x.shape[0], 6, 4) + torch.arange(6.0)[:, None]  # no groups of four: a second run
        logits: Tensor = self.head(x.flatten(1))
        return logits


class Fused(nn.Module):
    """An encoder layer with torch's own attention, and a convolution with a normalized weight before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 24, 1))
        self.layer = nn.TransformerEncoderLayer(24, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(self.first(x).transpose(1, 2)).mean(1))
        return logits


def _transformer(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    """A small model of transformers with random weights that answers with its logits."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            import transformers

            super().__init__()
            config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **settings)
            config.use_cache = False
            config._experts_implementation = "eager"
            self.body = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.body(input_ids=ids, return_dict=True).logits
            return logits

    return Logits


_COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TRANSFORMERS = {
    "fused projections (Conv1D)": _transformer("GPT2", n_embd=32, n_layer=2, n_head=4),
    "rotary, grouped queries": _transformer("Llama", num_key_value_heads=2, **_COMMON),
    "mixture of experts": _transformer("Mixtral", num_key_value_heads=2, num_local_experts=3, **_COMMON),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "image": (Image, (3, 8, 8)),
    "torch's attention": (Fused, (4, LENGTH)),
    **{name: (build, (LENGTH,)) for name, build in TRANSFORMERS.items()},
}


def _made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    build, shape = MODELS[name]
    torch.manual_seed(3)
    model = rewrite(build().eval())
    x = torch.randint(VOCABULARY, (2, *shape)) if name in TRANSFORMERS else torch.randn(2, *shape)
    return model, (x,)


@pytest.fixture(params=list(MODELS))
def subject(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return _made(request.param)


def _random(structure: pruning.Structure) -> pruning.Scores:
    rng = np.random.default_rng(1)
    return {group.name: rng.random(group.width) for group in structure.prunable}


def test_removing_channels_that_are_zero_changes_no_output() -> None:
    """Ties are right to the index: where the weights of a slot are zero, its removal changes no output."""
    model, example = _made("image")
    structure = pruning.examine(model, example)
    scores = _random(structure)
    widths = {group.name: group.width // 2 for group in structure.prunable}
    gone = np.concatenate(
        [structure.slots[n][np.argsort(scores[n])[: structure.group(n).width - w]] for n, w in widths.items()]
    )
    modules = dict(model.named_modules())
    with torch.no_grad():
        for (path, attribute), axes in structure.axes.items():
            for number, slots in enumerate(axes):
                if slots is not None and np.isin(slots, gone).any() and "running_var" not in attribute:
                    lost = torch.from_numpy(np.flatnonzero(np.isin(slots, gone)))
                    getattr(modules[path], attribute).index_fill_(number, lost, 0.0)
        want = output_tensors(model(*example))
        got = output_tensors(pruning.cut(model, structure, widths, scores)(*example))
    torch.testing.assert_close(got, want)


def test_every_group_can_be_cut_alone_and_has_the_size_that_was_said(
    subject: tuple[nn.Module, tuple[Tensor, ...]],
) -> None:
    """A group that is called prunable is: the model runs without half of it, at another batch size too, and
    has exactly as many parameters as the structure counted.
    """
    model, example = subject
    structure = pruning.examine(model, example)
    want = model(*example).shape
    assert len(structure.prunable) >= 3
    for group in structure.prunable:
        widths = {group.name: max(1, group.width // 2)}
        pruned = pruning.cut(model, structure, widths, _random(structure))
        assert parameter_count(pruned) == structure.parameters(widths) < parameter_count(model)
        with torch.no_grad():
            assert pruned(example[0].repeat(3, *[1] * (example[0].dim() - 1))).shape == (6, *want[1:])


def test_a_tensor_that_the_model_keeps_does_no_harm() -> None:
    """A tensor that a model makes in one run and uses in the next pins the channels that meet it."""
    torch.manual_seed(0)
    model, example = Keeping().eval(), (torch.randn(2, 16),)
    structure = pruning.examine(model, example)
    group = structure.group("first")
    assert (group.prunable, group.width) == (True, 24)
    assert not structure.group("second").prunable
    pruned = pruning.cut(model, structure, {"first": 8}, _random(structure))
    assert pruned(*example).shape == (2, 3)


def test_attention_loses_whole_heads() -> None:
    """Queries, keys and values of a head go together; a shared key takes all of its queries with it."""
    model, example = _made("rotary, grouped queries")
    structure = pruning.examine(model, example)
    group = structure.group("body.model.layers.0.self_attn.q_proj")
    assert (group.width, group.channels) == (2, 16)
    assert {name.rpartition(".")[2] for name in group.members} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    pruned = pruning.cut(model, structure, {group.name: 1}, _random(structure))
    attention = pruned.body.model.layers[0].self_attn  # type: ignore[union-attr,index]
    assert attention.q_proj.out_features == 16  # type: ignore[union-attr]
    assert attention.k_proj.out_features == 8  # type: ignore[union-attr]


def test_a_group_that_must_stay_says_why() -> None:
    """Every layer whose channels cannot be removed is listed with a reason; asking for it is an error."""
    model, example = _made("image")
    structure = pruning.examine(model, example)
    assert structure.group("head").why is not None
    with pytest.raises(ValueError, match="output of the model"):
        pruning.cut(model, structure, {"head": 1}, _random(structure))


@pytest.mark.parametrize("alignment", [1, 4, 8])
def test_sizes_are_met_in_widths_that_the_device_likes(
    subject: tuple[nn.Module, tuple[Tensor, ...]], alignment: int
) -> None:
    """Both allocations stay within the size where they can, and cut in steps of the alignment."""
    model, example = subject
    structure = pruning.examine(model, example)
    scores = pruning.scores_of(model, structure, "magnitude", (), 0)
    limits = {"max_layer_ratio": 0.9, "alignment": alignment}
    most, _ = pruning.globally(structure, scores, 0.6, **limits)  # type: ignore[arg-type]
    for widths in (most, pruning.uniformly(structure, 0.6, **limits)):  # type: ignore[arg-type]
        for group in structure.prunable:
            kept = widths[group.name]
            assert kept == group.width or all(kept * n % alignment == 0 for n in group.operands)
    assert structure.parameters(most) <= 0.6 * structure.parameters({})


@pytest.mark.parametrize("name", ["torch's attention"])
def test_rewriting_changes_no_output(name: str) -> None:
    """Split attention and folded weights compute what the original does."""
    build, shape = MODELS[name]
    model = build().eval()
    x = torch.randn(2, *shape)
    want = model(x)
    torch.testing.assert_close(rewrite(model)(x), want)
    assert not any(isinstance(module, nn.MultiheadAttention) for module in model.modules())


@given(
    pairs=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=20),
    pins=st.lists(st.integers(1, 12), max_size=3),
)
@settings(max_examples=60)
def test_labels_are_tied_through_others_and_pins_spread(
    pairs: list[tuple[int, int]], pins: list[int]
) -> None:
    """Labels are together exactly when a chain of ties joins them; one pin holds the whole slot."""
    labels = Labels()
    labels.fresh(12)
    together = {n: {n} for n in range(1, 13)}
    for a, b in pairs:
        labels.tie(np.array([a]), np.array([b]))
        joined = together[a] | together[b]
        together |= dict.fromkeys(joined, joined)
    labels.pin(np.array(pins, np.int64), "because")
    roots = labels.roots(np.arange(13))
    held, reasons = labels.pinned()
    for n in range(1, 13):
        assert {m for m in range(1, 13) if roots[m] == roots[n]} == together[n]
        assert (held[n] != 0) == bool(together[n] & set(pins))
        assert not held[n] or reasons[held[n]] == "because"
