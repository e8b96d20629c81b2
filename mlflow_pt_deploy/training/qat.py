"""Quantization-aware training: simulate int8 rounding during training.

Linear and convolution layers compute in fp32, with weights (per channel, symmetric) and inputs (per
tensor, asymmetric, range of the batch) rounded to 256 levels. Gradients use the straight-through
estimator (Jacob et al. 2018). The result is ordinary fp32 weights that lose less accuracy when a
runtime quantizes them, dynamically or with calibration.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

_MIN_SCALE = 1e-8


@contextmanager
def int8_rounding(network: nn.Module) -> Iterator[None]:
    """Simulate int8 rounding in `network` within the block; its weights stay fp32.

    Args:
        network: Its linear and convolution layers round within the block. The last linear layer,
            which computes the logits, does not.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    rounded = [layer for layer in layers if layer not in linears[-1:]]
    for layer in rounded:
        # An instance attribute hides the method and leaves the names in the state dict unchanged.
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in rounded:
            del layer.forward


def _forward(layer: nn.Linear | nn.Conv2d, inputs: torch.Tensor) -> torch.Tensor:
    weight = _round_per_channel(layer.weight)
    inputs = _round_per_tensor(inputs)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(inputs, weight, layer.bias)
    output: torch.Tensor = layer._conv_forward(inputs, weight, layer.bias)
    return output


def _round_per_channel(weight: torch.Tensor) -> torch.Tensor:
    """Round weights to 255 levels around 0, with one scale per row or filter."""
    with torch.no_grad():
        scale = weight.abs().flatten(1).amax(1).clamp(min=_MIN_SCALE) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def _round_per_tensor(inputs: torch.Tensor) -> torch.Tensor:
    """Round inputs to 256 levels between their minimum and maximum; 0 is one of the levels."""
    with torch.no_grad():
        low, high = inputs.min().clamp(max=0), inputs.max().clamp(min=0)
        scale = ((high - low) / 255).clamp(min=_MIN_SCALE).float()
        zero = (-low / scale).round().to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(inputs, scale, zero, 0, 255)
