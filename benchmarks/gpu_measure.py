"""Times, rates and agreement of one way to run a model, beside the baseline.

Host times are those of whole calls: raw rows in, labels out, copies and tokenization included.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_forms import Form, labels

from mlflow_pt_deploy.preprocessing.text import TextPreprocessor

_ROUNDS = 3
_BLOCK_S = 0.07
_CALLS = (3, 60)
_RATE_ROWS, _RATE_LENGTH = 256, 128
_QUERY = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


@dataclass
class Batch:
    """One batch size of a form.

    Attributes:
        p50_ms: Host time of a call, median; `p95_ms` likewise.
        rows_per_s: Rows of a call divided by its median.
        ratio: The baseline's median divided by this one's, both measured in turns.
        model_ms: Host time without tokenization: token ids to logits.
        model_ratio: The baseline's divided by it.
        device_ms: The same between two device events; None without a GPU.
    """

    rows: int
    p50_ms: float
    p95_ms: float
    rows_per_s: float
    ratio: float
    model_ms: float
    model_ratio: float
    device_ms: float | None


@dataclass
class Seen:
    """What was seen of a form, or why it could not run.

    Attributes:
        model: Name of the model.
        form: Key of `FORMS`.
        reason: Why there are no figures; empty where there are.
        same_labels: Share of the rows whose label is the baseline's.
        accuracy: Share of the rows whose label is right.
        off: Largest difference to the baseline's logits; `largest` is their largest magnitude.
        peak_mb: Device memory that the form added at its peak, weights included.
        full_ms: Device time of 256 rows of 128 tokens, from tensors on the device.
        tflops: Floating-point operations of that divided by its time, in 10^12/s.
    """

    model: str
    form: str
    reason: str = ""
    build_s: float = 0.0
    same_labels: float = 0.0
    accuracy: float = 0.0
    off: float = 0.0
    largest: float = 0.0
    peak_mb: float = 0.0
    full_ms: float = 0.0
    tflops: float = 0.0
    batches: list[Batch] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """The baseline, and its answers.

    Attributes:
        rows: Texts, for all that is timed.
        logits: The baseline's, of `rows`.
        targets: What is right.
        flops: Floating-point operations of 256 rows of 128 tokens.
    """

    form: Form
    preprocessor: TextPreprocessor
    rows: Sequence[str]
    logits: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]
    flops: float


def sync(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def answers(form: Form, preprocessor: TextPreprocessor, rows: Sequence[str]) -> Any:
    """Logits of all rows, by batches of 256."""
    parts = [
        form.predict(preprocessor.encode(rows[start : start + 256]))
        for start in range(0, len(rows), 256)
    ]
    return np.concatenate(parts)


def measure(
    form: Form, reference: Reference, seen: Seen, sizes: Sequence[int], device: str
) -> None:
    """Check a form, then time it, and write both into `seen`."""
    found = answers(form, reference.preprocessor, reference.rows)
    seen.off = float(np.abs(found - reference.logits).max())
    seen.largest = float(np.abs(reference.logits).max())
    if not np.isfinite(found).all() or seen.off > 0.5 * seen.largest:
        raise ValueError(f"wrong: logits are off by {seen.off:.3g} of {seen.largest:.3g}")
    seen.same_labels = float((found.argmax(1) == reference.logits.argmax(1)).mean())
    seen.accuracy = float((found.argmax(1) == reference.targets).mean())
    for size in sizes:
        seen.batches.append(_batch(form, reference, size, device))
    seen.full_ms = _full_ms(form, device, int(reference.preprocessor.max_length))
    seen.tflops = reference.flops / seen.full_ms / 1e9


def _batch(form: Form, reference: Reference, size: int, device: str) -> Batch:
    picks = _Picks(reference.rows, size)

    def answer(which: Form) -> float:
        rows = picks.next()
        start = time.perf_counter()
        labels(which, reference.preprocessor.encode(rows))
        return time.perf_counter() - start

    both = {"own": form, "base": reference.form}
    samples: dict[str, list[float]] = {name: [] for name in both}
    calls = {}
    for name, which in both.items():
        picks.restart()
        warm = [answer(which) for _ in range(4)]
        calls[name] = int(min(max(_BLOCK_S / min(warm), _CALLS[0]), _CALLS[1]))
    for _ in range(_ROUNDS):
        for name, which in both.items():
            picks.restart()
            samples[name] += [answer(which) for _ in range(calls[name])]
    own_s = statistics.median(samples["own"])
    model_s, device_ms = _model(form, reference, picks, device)
    baseline_s, _ = _model(reference.form, reference, picks, device)
    return Batch(
        rows=size,
        p50_ms=own_s * 1e3,
        p95_ms=float(np.percentile(samples["own"], 95)) * 1e3,
        rows_per_s=size / own_s,
        ratio=statistics.median(samples["base"]) / own_s,
        model_ms=model_s * 1e3,
        model_ratio=baseline_s / model_s,
        device_ms=device_ms,
    )


def _model(
    form: Form, reference: Reference, picks: _Picks, device: str
) -> tuple[float, float | None]:
    """Median host seconds and device milliseconds of token ids to logits."""
    picks.restart()
    hosts, devices = [], []
    for _ in range(12):
        encoded = reference.preprocessor.encode(picks.next())
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device != "cpu" else []
        start = time.perf_counter()
        if events:
            events[0].record()
        form.predict(encoded)
        if events:
            events[1].record()
        sync(device)
        hosts.append(time.perf_counter() - start)
        devices += [events[0].elapsed_time(events[1])] if events else []
    return statistics.median(hosts), statistics.median(devices) if devices else None


class _Picks:
    """Batches of rows, one after the other, from the start again at the end."""

    def __init__(self, rows: Sequence[str], size: int) -> None:
        self._rows = list(rows) * (1 + size // len(rows))
        self._size = size
        self._at = 0

    def restart(self) -> None:
        self._at = 0

    def next(self) -> list[str]:
        if self._at + self._size > len(self._rows):
            self._at = 0
        self._at += self._size
        return self._rows[self._at - self._size : self._at]


def _full_ms(form: Form, device: str, longest: int) -> float:
    """Median milliseconds of 256 rows of 128 tokens; a tiny batch without a GPU."""
    rows, length = (_RATE_ROWS, min(_RATE_LENGTH, longest)) if device != "cpu" else (2, 16)
    ids = np.random.default_rng(0).integers(1000, 20000, (rows, length)).tolist()
    tensors = [torch.from_numpy(array).to(device) for array in form.arrays(ids).values()]
    with torch.inference_mode():
        return timed_ms(lambda: form.module(*tensors), device)


def timed_ms(call: Callable[[], object], device: str, repeats: int = 7) -> float:
    """Median milliseconds of five calls in a row, divided by five, after a warm-up."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(repeats):
        sync(device)
        if device == "cpu":
            start = time.perf_counter()
            call()
            samples.append((time.perf_counter() - start) * 1e3)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(5):
            call()
        last.record()
        last.synchronize()
        samples.append(first.elapsed_time(last) / 5)
    return statistics.median(samples)


def full_flops(config: Any) -> float:
    """Floating-point operations of an encoder on 256 rows of 128 tokens: its matrix products."""
    width, tokens = config.hidden_size, _RATE_ROWS * _RATE_LENGTH
    weights = 4 * width**2 + 2 * width * config.intermediate_size
    attention = 2 * _RATE_LENGTH * width
    return float(2 * tokens * (weights + attention) * config.num_hidden_layers)


def matrix_tflops(device: str) -> dict[str, float]:
    """Rate of a square matrix product, 8192 wide, by precision, in 10^12/s; tiny on the CPU."""
    size = 8192 if device != "cpu" else 256
    rates = {}
    for name, dtype in {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
    }.items():
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[name] = 2 * size**3 / timed_ms(partial(torch.mm, left, right), device) / 1e9
    return rates


def gpu_state(device: str) -> str:
    """Clocks, power and temperature as nvidia-smi says; read only."""
    if device == "cpu":
        return ""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    try:
        return subprocess.check_output(command, text=True, timeout=20).strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"
