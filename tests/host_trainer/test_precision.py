"""Mixed precision, recomputed activations and compilation change how a step is computed, not what."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch._inductor import config as inductor
from training import metrics, net, settings, train

from host_trainer import blocks
from host_trainer.compilation import compile_forward
from host_trainer.errors import ConfigError, MissingError


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model(torch.randn(5, 8)).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_recomputed_activations_give_the_same_gradient() -> None:
    """Bit for bit, with dropout too, under the same names; and less is kept for the backward pass."""
    torch.manual_seed(0)
    plain, thrifty = (nn.Sequential(nn.Linear(8, 8), _body(), nn.Linear(8, 3)) for _ in range(2))
    thrifty.load_state_dict(plain.state_dict())
    assert blocks.recompute(thrifty) == 2
    want, got = _gradients(plain), _gradients(thrifty)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert _kept_bytes(thrifty) < _kept_bytes(plain)


def test_recomputed_activations_leave_the_same_batch_statistics() -> None:
    """A batch counts once in BatchNorm's running statistics, although its block is computed twice."""
    torch.manual_seed(0)
    plain, thrifty = (nn.Sequential(_normalizing(), _normalizing(), nn.Linear(8, 3)) for _ in range(2))
    thrifty.load_state_dict(plain.state_dict())
    assert blocks.recompute(thrifty) == 2
    want, got = _gradients(plain), _gradients(thrifty)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert all(torch.equal(value, thrifty.state_dict()[name]) for name, value in plain.state_dict().items())


def _normalizing() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU())


def _body() -> nn.Module:
    return nn.Sequential(*(_block() for _ in range(2)))


def _block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 8))


def _kept_bytes(model: nn.Module) -> int:
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(64, 8))
    return kept


def test_blocks_are_the_repeated_layers() -> None:
    """Of a transformer its layers, of a convolutional network the blocks inside its stages."""
    from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel

    bert = BertModel(
        BertConfig(num_hidden_layers=9, hidden_size=32, num_attention_heads=2, intermediate_size=64)
    )
    assert [type(block).__name__ for block in blocks.blocks(bert)] == ["BertLayer"] * 9
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[3, 3, 3, 3]))
    names = {type(block).__name__ for block in blocks.blocks(resnet)}
    assert names
    assert "ResNetEncoder" not in names


def test_bf16_trains(tmp_path: Path) -> None:
    """With automatic mixed precision the loss falls as it does without, and the weights stay float32."""
    from training import weights

    for name, amp in (("fp32", "no"), ("bf16", "bf16")):
        train(
            settings(tmp_path / name, precision__amp=amp, precision__activation_checkpointing=amp == "bf16")
        )
    exact, mixed = metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16")
    assert exact != mixed
    assert mixed == pytest.approx(exact, rel=0.1, abs=0.02)
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}


def test_a_compiler_that_fails_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C++ compiler the model goes on as it would have, and the reason is said once."""
    monkeypatch.setattr(inductor, "fx_graph_cache", False)
    monkeypatch.setattr(inductor.cpp, "cxx", ("/nonexistent/compiler",))
    module, alerts = net(), list[str]()
    batch = torch.ones(2, 8)
    want = module(batch)
    compile_forward(module, alerts.append)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            assert torch.equal(module(batch), want)
    assert len(alerts) == 1
    assert "the run goes on without it" in alerts[0]


def test_a_compiled_model_answers_the_same() -> None:
    """One graph is compiled, a plain sequence of layers too, under the same parameter names."""
    module = net()
    names, batch = set(module.state_dict()), torch.ones(2, 8)
    want = module(batch)
    alerts: list[str] = []
    torch._dynamo.reset()
    compile_forward(module, alerts.append)
    assert torch.allclose(module(batch), want, atol=1e-5)
    if alerts:
        pytest.skip(f"no compiler works here: {alerts[0]}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert set(module.state_dict()) == names


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path) -> None:
    """``device = "cuda"`` on a machine without one: exit code 4, and what to do."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(MissingError, match="no GPU") as caught:
        train(settings(tmp_path / "run", parallel__device="cuda"))
    assert caught.value.exit_code == 4


def test_a_step_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    """Two processes and a step of 25 samples."""
    with pytest.raises(ConfigError, match=r"optimize\.batch_size 25"):
        train(settings(tmp_path / "run", optimize__batch_size=25), 2)
