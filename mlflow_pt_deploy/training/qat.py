"""Quantization-aware training: a model learns with the rounding that int8 will do to it.

Linear and convolution layers compute in fp32, but with weights (per channel, symmetric) and inputs
(per tensor, asymmetric, range of the batch) rounded to 256 levels; gradients pass straight through
(Jacob et al. 2018). What is learnt are ordinary fp32 weights which lose less when any runtime
quantizes them, dynamically or with calibration; no runtime's own format is baked in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

_TINY = 1e-8


@contextmanager
def int8_rounding(network: nn.Module) -> Iterator[None]:
    """Within the block, `network` computes with int8's rounding; its weights stay fp32.

    Args:
        network: Its linear and convolution layers are changed, but for the block only. The last
            linear layer, which gives the logits, is left alone.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    rounded = [layer for layer in layers if layer not in linears[-1:]]
    for layer in rounded:
        # An attribute of the instance hides the method; names in the state stay as they are.
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in rounded:
            del layer.forward


def _forward(layer: nn.Linear | nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
    weight = _per_channel(layer.weight)
    inputs = _per_tensor(inputs)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, weight, layer.bias)
    found: torch.Tensor = layer._conv_forward(inputs, weight, layer.bias)
    return found


def _per_channel(weight: torch.Tensor) -> torch.Tensor:
    """Weights at 255 levels around 0, a scale for each row or filter."""
    with torch.no_grad():
        scale = weight.abs().flatten(1).amax(1).clamp(min=_TINY) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def _per_tensor(inputs: torch.Tensor) -> torch.Tensor:
    """Inputs at 256 levels from their lowest to their highest, 0 among them."""
    with torch.no_grad():
        low, high = inputs.min().clamp(max=0), inputs.max().clamp(min=0)
        scale = ((high - low) / 255).clamp(min=_TINY).float()
        zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(inputs, scale, zero, 0, 255)
