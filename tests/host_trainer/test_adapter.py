"""Adapters: they go where the structure says, start as nothing, are kept alone, and merge exactly."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from host_trainer import adapter
from host_trainer.errors import TrainingError
from host_trainer.structure import survey

IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**SMALL, num_labels=3))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=16, n_layer=2, n_head=4, n_positions=32))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=99, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, tie_word_embeddings=False
        )
    )


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    )


def _convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, image_size=32)
    )


def _resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    )


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    parts = {
        "embed": nn.Linear(8, 16),
        "encode": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        "head": nn.Linear(16, 3),
    }
    return nn.Sequential(OrderedDict(parts))


def _plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(3136, 5)
    )


@pytest.mark.parametrize(
    ("build", "counts", "head"),
    [
        (_bert, (8, 4, 0, 0), ("bert.pooler.dense", "classifier")),
        (_gpt2, (4, 4, 0, 0), ()),  # its head is the embedding
        (_llama, (8, 6, 0, 0), ("lm_head",)),
        (_t5, (24, 8, 0, 0), ()),
        (_vit, (8, 4, 0, 0), ("classifier",)),
        (_convnext, (0, 8, 1, 4), ("classifier",)),
        (_resnet, (0, 0, 9, 0), ("classifier.1",)),
        (_torch_encoder, (2, 4, 0, 0), ("head",)),
        (_plain, (0, 0, 1, 1), ("4",)),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else "",
)
def test_layers_are_found_by_structure(
    build: Callable[[], nn.Module], counts: tuple[int, ...], head: tuple[str, ...]
) -> None:
    """Attention, feed-forward, convolutions, grouped ones and the head of nine architectures."""
    layers = survey(build())
    assert (len(layers.attention), len(layers.mlp), len(layers.convolution), len(layers.grouped)) == counts
    assert layers.head == head


def _answers(*inputs: Tensor) -> Callable[[nn.Module], Tensor]:
    def forward(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        result = model(*(value.to(dtype) if value.is_floating_point() else value for value in inputs))
        return result if isinstance(result, Tensor) else result.logits

    return forward


def _attached(build: Callable[[], nn.Module], *parts: adapter.Part, **changes: Any) -> adapter.Attached:
    torch.manual_seed(0)
    return adapter.attach(build().eval(), parts, **{"rank": 4, "alpha": 8, **changes})


def _disturb(model: nn.Module) -> None:
    """As training would: every trainable weight moves."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


CASES = [
    pytest.param(_bert, ("attention", "mlp"), IDS, id="bert"),
    pytest.param(_gpt2, ("attention", "mlp"), IDS, id="gpt2"),
    pytest.param(_llama, ("attention", "mlp"), IDS, id="llama"),
    pytest.param(_convnext, ("mlp", "convolution"), IMAGE, id="convnext"),
    pytest.param(_torch_encoder, ("attention", "mlp"), torch.randn(2, 5, 8), id="torch"),
]


@pytest.mark.parametrize(("build", "parts", "inputs"), CASES)
def test_trained_kept_and_merged(
    build: Callable[[], nn.Module], parts: tuple[adapter.Part, ...], inputs: Tensor, tmp_path: Path
) -> None:
    """It starts as nothing, is written without the base, read onto a fresh one, and merges to the same."""
    torch.manual_seed(0)
    forward = _answers(inputs)
    with torch.no_grad():
        before = forward(build().eval())
        attached = _attached(build, *parts)
        assert torch.allclose(forward(attached.model), before, atol=1e-6)
        assert 0 < attached.trainable_fraction < 1
        _disturb(attached.model)
        trained = forward(attached.model)
    assert not torch.allclose(trained, before, atol=1e-2)
    adapter.save(attached.model, tmp_path)
    names = set(load_file(tmp_path / adapter.WEIGHTS_FILE))
    assert all("lora_" in name or any(f".{head}." in name for head in attached.head) for name in names)
    torch.manual_seed(0)
    loaded = adapter.load(build(), tmp_path)
    with torch.no_grad():
        assert torch.equal(forward(loaded), trained)
    merged = adapter.merge(loaded, forward)
    assert merged.merge_error < 1e-5
    assert merged.cast_error == 0
    torch.manual_seed(0)
    assert set(merged.model.state_dict()) == set(build().state_dict())
    with torch.no_grad():
        assert torch.allclose(forward(merged.model), trained, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_peft_reads_it_and_names_are_the_plain_model_s(tmp_path: Path) -> None:
    """From inside a compiled, data-parallel model too, the file is what peft itself loads on a plain base."""
    import peft

    attached = _attached(_bert, "attention")
    _disturb(attached.model)
    wrapped = torch.compile(nn.DataParallel(attached.model))
    adapter.save(wrapped, tmp_path)  # type: ignore[arg-type]
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(_bert(), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, attached.model(IDS).logits)


def test_a_frozen_head_stays(tmp_path: Path) -> None:
    """With ``train_head`` off nothing but low-rank updates is trained or kept."""
    attached = _attached(_bert, "mlp", train_head=False)
    assert attached.head == ()
    assert all("lora_" in name for name, p in attached.model.named_parameters() if p.requires_grad)
    adapter.save(attached.model, tmp_path)
    assert all("lora_" in name for name in load_file(tmp_path / adapter.WEIGHTS_FILE))


def test_names_that_end_alike_are_not_adapted() -> None:
    """Peft takes a name for the end of names; a layer outside of the body stays without an adapter."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.copy = nn.ModuleDict({"blocks": nn.ModuleDict({"0": nn.ModuleDict({"0": nn.Linear(4, 4)})})})
            self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.blocks(x)
            return result

    attached = adapter.attach(Outer(), ["mlp"], rank=2, alpha=2)
    adapted = {name for name, _ in attached.model.named_modules() if name.endswith(".lora_A")}
    assert adapted == {f"base_model.model.blocks.{n}.0.lora_A" for n in range(2)}


def test_grouped_convolutions_are_refused_and_said() -> None:
    """Among others they are skipped and listed; where there is nothing else, it is an error that says why."""
    attached = _attached(_convnext, "convolution")
    assert len(attached.skipped) == 4
    assert not set(attached.skipped) & set(attached.adapted)
    depthwise = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(TrainingError, match="grouped"):
        adapter.attach(depthwise, ["convolution"], rank=2, alpha=2)


def test_a_cast_is_measured() -> None:
    """Merging is exact in fp32; what bf16 costs is told apart from it."""
    attached = _attached(_bert, "attention", "mlp")
    _disturb(attached.model)
    merged = adapter.merge(attached.model, _answers(IDS), torch.bfloat16)
    assert next(merged.model.parameters()).dtype == torch.bfloat16
    assert merged.merge_error < 1e-5 < merged.cast_error < 0.1


def test_a_merge_that_changes_answers_is_refused() -> None:
    """NaN in an update, or a model that answers otherwise each time, gives no merged model."""
    attached = _attached(_bert, "attention")
    parameter = next(p for n, p in attached.model.named_parameters() if "lora_A" in n)
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(TrainingError, match="merged"):
        adapter.merge(attached.model, _answers(IDS))
    moody = iter((torch.ones(1), torch.zeros(1)))
    with pytest.raises(TrainingError, match="outputs differ"):
        adapter.merge(_attached(_bert, "attention").model, lambda _model: next(moody))


@pytest.mark.parametrize("how", ["missing", "other model", "kind", "pickled", "shape"])
def test_adapters_that_do_not_fit_are_named(how: str, tmp_path: Path) -> None:
    """Missing files, another model's adapter, another method, only a pickle: three lines, nothing loaded."""
    adapter.save(_attached(_bert, "attention").model, tmp_path)
    config, weights = tmp_path / adapter.CONFIG_FILE, tmp_path / adapter.WEIGHTS_FILE
    if how == "missing":
        config.unlink()
    elif how == "kind":
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
    elif how == "pickled":
        torch.save(load_file(weights), tmp_path / "adapter_model.bin")
        weights.unlink()
    elif how == "shape":
        save_file(
            {name: tensor[..., :2].contiguous() for name, tensor in load_file(weights).items()}, weights
        )
    model = _llama() if how == "other model" else _bert()
    with pytest.raises(TrainingError) as caught:
        adapter.load(model, tmp_path)
    assert len(str(caught.value).splitlines()) == 3
