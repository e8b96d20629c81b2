"""Hyperparameters of training, optimizers, gradient clipping, precision."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import nn

from mlflow_pt_deploy.model_types import STATIC
from mlflow_pt_deploy.models import Classifier
from mlflow_pt_deploy.system.device import CPU, kind_of
from mlflow_pt_deploy.system.hardware import cpu_flags


@dataclass(frozen=True)
class Schedule:
    """Training hyperparameters.

    Attributes:
        epochs: Passes over train.
        learning_rate: Peak learning rate; 0 selects a default, see `resolved`.
        batch_size: Rows per step; 0 selects a default.
        warmup: Share of the steps in which the learning rate rises, 0 to 1.
        weight_decay: Weight decay of AdamW.
        seed: Random seed of the row order and of dropout.
    """

    epochs: int = 5
    learning_rate: float = 0.0
    batch_size: int = 0
    warmup: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0

    def resolved(self, classifier: Classifier) -> Schedule:
        """Return the schedule with defaults filled in.

        Rows per step: 32; static students 128, networks from scratch 64. Peak learning rate: 2e-4
        for encoders with a hidden size up to 512 and 5e-5 above; 2e-3 for static students, 1e-3 for
        networks from scratch.
        """
        config = classifier.network.config
        if config.model_type == STATIC:
            rows, peak = 128, 2e-3
        elif not classifier.pretrained:
            rows, peak = 64, 1e-3
        else:
            rows, peak = 32, 2e-4 if getattr(config, "hidden_size", 768) <= 512 else 5e-5
        return replace(
            self,
            batch_size=self.batch_size or rows,
            learning_rate=self.learning_rate or peak,
        )


def new_optimizers(classifier: Classifier, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """AdamW for dense parameters, SparseAdam for embeddings with sparse gradients."""
    tables = [
        module.weight
        for module in classifier.modules()
        if isinstance(module, nn.Embedding) and module.sparse
    ]
    sparse = {id(table) for table in tables}
    dense = [each for each in classifier.parameters() if id(each) not in sparse]
    rate = schedule.learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(dense, lr=rate, weight_decay=schedule.weight_decay, fused=True)
    ]
    if tables:
        optimizers.append(torch.optim.SparseAdam(tables, lr=rate))
    return optimizers


def clip_gradients(classifier: Classifier, max_norm: float) -> None:
    """Clip like `torch.nn.utils.clip_grad_norm_`, with support for sparse gradients."""
    values = []
    for parameter in classifier.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # sums the entries of a row
            values.append(parameter.grad.values())
        elif parameter.grad is not None:
            values.append(parameter.grad)
    scale = (max_norm / (torch.nn.utils.get_total_norm(values) + 1e-6)).clamp(max=1.0)
    for each in values:
        each.mul_(scale)


def compute_dtype(device: str) -> torch.dtype:
    """Precision of a step's computation: bf16 where it is faster; on older GPUs fp16; else fp32.

    With avx512_bf16 alone the conversion of fp32 weights at each step costs more than it saves:
    MiniLM takes 400 ms per step with it and 290 ms without (Xeon). GPUs before Ampere only emulate
    bf16.
    """
    if kind_of(device) == CPU:
        return torch.bfloat16 if "amx_bf16" in cpu_flags() else torch.float32
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def autocast(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Compute in `dtype` within the block; the weights stay fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(kind_of(device), dtype=dtype)


def new_grad_scaler(device: str, dtype: torch.dtype) -> torch.amp.GradScaler:
    """Keep small gradients of fp16 above zero (Micikevicius et al. 2018); else change nothing."""
    return torch.amp.GradScaler(kind_of(device), enabled=dtype == torch.float16)
