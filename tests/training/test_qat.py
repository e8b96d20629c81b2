"""Quantization-aware training: rounds inside the block only and reduces the loss of int8."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mlflow_pt_deploy.training.qat import int8_rounding


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 2))


def test_layers_round_inside_the_block_only() -> None:
    network, seen = _network(), []
    inputs = torch.randn(5, 3, 4, 4)
    plain = network(inputs)
    names = list(network.state_dict())
    with int8_rounding(network):
        hook = network[2].register_forward_hook(lambda layer, given, out: seen.append(out))
        rounded = network(inputs)
        hook.remove()
        assert list(network.state_dict()) == names  # checkpoints are compatible
    assert not torch.equal(plain, rounded)
    torch.testing.assert_close(plain, rounded, atol=0.1, rtol=0)
    assert torch.equal(network(inputs), plain)
    assert len(seen) == 1


def test_number_of_levels() -> None:
    from mlflow_pt_deploy.training.qat import _round_per_channel, _round_per_tensor

    values = torch.randn(3, 1000) * torch.tensor([[1.0], [10.0], [0.0]])
    weights = _round_per_channel(values)
    for row, (given, found) in enumerate(zip(values, weights, strict=True)):
        step = given.abs().max() / 127
        assert len(found.unique()) <= 255, row
        assert (given - found).abs().max() <= step / 2 + 1e-6
    inputs = _round_per_tensor(values + 3)
    assert len(inputs.unique()) <= 256
    assert torch.equal(_round_per_tensor(torch.zeros(2, 2)), torch.zeros(2, 2))


def test_gradients_pass_through_the_rounding() -> None:
    network = _network()
    with int8_rounding(network):
        network(torch.randn(5, 3, 4, 4)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_training_with_rounding_loses_less_accuracy() -> None:
    """Weights of very different magnitude within a row make the rounding error visible."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 8) * torch.tensor([100.0, 1, 1, 1, 1, 1, 1, 1])
    truth = inputs @ torch.tensor([0.001, 1, -1, 1, -1, 1, -1, 1])
    start = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def train(rounding: bool) -> float:
        network = copy.deepcopy(start)
        optimizer = torch.optim.Adam(network.parameters(), 0.01)

        def step() -> float:
            loss = nn.functional.mse_loss(network(inputs)[:, 0], truth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        for _ in range(300):
            if rounding:
                with int8_rounding(network):
                    step()
            else:
                step()
        with int8_rounding(network), torch.inference_mode():
            return float(nn.functional.mse_loss(network(inputs)[:, 0], truth))

    assert train(True) < 0.8 * train(False)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e6])
def test_no_input_scale_gives_nan(scale: float) -> None:
    network = _network()
    with int8_rounding(network):
        assert np.isfinite(network(torch.randn(2, 3, 4, 4) * scale).detach().numpy()).all()
