"""Training through rounding: it rounds while it lasts, gradients pass, and nothing of it stays."""

from __future__ import annotations

import torch
from torch import nn

from host_trainer.rounding import rounded


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 5)).eval()


def test_weights_and_inputs_are_rounded_to_eight_bits() -> None:
    """Within the block no channel has more than 255 values, and the outputs are near the float model's."""
    net, x = _net(), torch.randn(4, 3, 4, 4)
    exact = net(x)
    with rounded(net) as layers:
        assert layers == 2
        weight = net[3].weight[0]
        scale = weight.abs().max() / 127
        assert torch.allclose(weight / scale, (weight / scale).round(), atol=1e-3)
        near = net(x)
    assert 0 < (near - exact).abs().max() < 0.1 * exact.abs().max()


def test_gradients_reach_the_float_weights_which_stay() -> None:
    """Training within the block moves the float weights; afterwards the model has its own names and types."""
    net = _net()
    names, before = sorted(net.state_dict()), net[0].weight.detach().clone()
    with rounded(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(torch.randn(4, 3, 4, 4)).square().mean().backward()
        optimizer.step()
    assert sorted(net.state_dict()) == names
    assert type(net[0]) is nn.Conv2d
    assert not torch.equal(net[0].weight, before)
    assert isinstance(net[0].weight, nn.Parameter)
