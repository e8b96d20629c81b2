"""Times, rates and agreement of a loaded variant, beside the baseline.

Host times are those of whole calls, which wait for the device: raw rows in, labels out, copies and
tokenization included.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_pt_deploy.artifacts import LoadedVariant

_ROUNDS = 3
_BLOCK_S = 0.07
_CALLS = (3, 60)
_CALLERS = 2
_RATE_ROWS, _RATE_LENGTH = 256, 128
_QUERY = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"


@dataclass
class Batch:
    """One batch size of a variant.

    Attributes:
        p50_ms: Host time of a call, median; `p95_ms` likewise.
        rows_per_s: Rows of a call divided by its median.
        ratio: The baseline's median divided by this one's, both measured in turns.
        model_ms: Host time without tokenization: token ids to logits.
        model_ratio: The baseline's divided by it.
        callers_rows_per_s: Token ids to logits from two threads at once: copies may overlap.
    """

    rows: int
    p50_ms: float
    p95_ms: float
    rows_per_s: float
    ratio: float
    model_ms: float
    model_ratio: float
    callers_rows_per_s: float


@dataclass
class Seen:
    """What was seen of a variant, or why it could not run.

    Attributes:
        model: Name of the model.
        variant: Runtime and precision.
        reason: Why there are no figures; empty where there are.
        build_s: Time of the export, in a process of its own.
        same_labels: Share of the rows whose label is the baseline's.
        accuracy: Share of the rows whose label is right.
        off: Largest difference to the baseline's logits; `largest` is their largest magnitude.
        used_mb: Memory of the device that is in use after the last row, and was not before.
        full_ms: Token ids to logits of 256 rows of 128 tokens.
        tflops: Floating-point operations of that divided by its time, in 10^12/s.
    """

    model: str
    variant: str
    reason: str = ""
    build_s: float = 0.0
    measured_s: float = 0.0
    same_labels: float = 0.0
    accuracy: float = 0.0
    off: float = 0.0
    largest: float = 0.0
    used_mb: float = 0.0
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

    loaded: LoadedVariant
    rows: Sequence[str]
    logits: np.ndarray[Any, Any]
    targets: np.ndarray[Any, Any]
    flops: float

    @classmethod
    def of(
        cls,
        loaded: LoadedVariant,
        rows: Sequence[str],
        targets: np.ndarray[Any, Any],
        flops: float,
    ) -> Reference:
        """Compute the baseline's answers."""
        return cls(loaded, rows, answers(loaded, rows), targets, flops)


def sync(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


def used_mb(device: str) -> float:
    """Megabytes of the device that are in use, by whatever library; 0 for the CPU."""
    if device == "cpu":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 1e6


def answers(loaded: LoadedVariant, rows: Sequence[str]) -> Any:
    """Logits of all rows, by batches of 256."""
    starts = range(0, len(rows), 256)
    return np.concatenate([loaded.logits(rows[start : start + 256]) for start in starts])


def measure(
    loaded: LoadedVariant, reference: Reference, seen: Seen, sizes: Sequence[int], device: str
) -> None:
    """Check a variant, then time it, and write both into `seen`."""
    found = answers(loaded, reference.rows)
    seen.off = float(np.abs(found - reference.logits).max())
    seen.largest = float(np.abs(reference.logits).max())
    if not np.isfinite(found).all() or seen.off > 0.5 * seen.largest:
        raise ValueError(f"wrong: logits are off by {seen.off:.3g} of {seen.largest:.3g}")
    seen.same_labels = float((found.argmax(1) == reference.logits.argmax(1)).mean())
    seen.accuracy = float((found.argmax(1) == reference.targets).mean())
    for size in sizes:
        seen.batches.append(_batch(loaded, reference, size))
    seen.full_ms = _full_ms(loaded, device)
    seen.tflops = reference.flops / seen.full_ms / 1e9


def _batch(loaded: LoadedVariant, reference: Reference, size: int) -> Batch:
    picks = _Picks(reference.rows, size)

    def answer(which: LoadedVariant) -> float:
        rows = picks.next()
        start = time.perf_counter()
        which.logits(rows).argmax(1)
        return time.perf_counter() - start

    both = {"own": loaded, "base": reference.loaded}
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
    inputs = _inputs(loaded, picks)
    model_s = _model_s(loaded, inputs)
    return Batch(
        rows=size,
        p50_ms=own_s * 1e3,
        p95_ms=float(np.percentile(samples["own"], 95)) * 1e3,
        rows_per_s=size / own_s,
        ratio=statistics.median(samples["base"]) / own_s,
        model_ms=model_s * 1e3,
        model_ratio=_model_s(reference.loaded, inputs) / model_s,
        callers_rows_per_s=size * _calls_per_s(loaded, inputs),
    )


def _inputs(loaded: LoadedVariant, picks: _Picks) -> list[Any]:
    """Twelve batches, encoded."""
    picks.restart()
    return [loaded.preprocessor(picks.next()) for _ in range(12)]


def _model_s(loaded: LoadedVariant, inputs: Sequence[Any]) -> float:
    """Median host seconds of token ids to logits."""
    took_s = []
    for batch in inputs:
        start = time.perf_counter()
        loaded.predict(batch)
        took_s.append(time.perf_counter() - start)
    return statistics.median(took_s)


def _calls_per_s(loaded: LoadedVariant, inputs: Sequence[Any]) -> float:
    """Calls per second of two threads, after a warm-up of both."""
    with ThreadPoolExecutor(_CALLERS) as pool:
        list(pool.map(loaded.predict, inputs))
        start = time.perf_counter()
        list(pool.map(loaded.predict, inputs))
        return len(inputs) / (time.perf_counter() - start)


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


def _full_ms(loaded: LoadedVariant, device: str) -> float:
    """Median milliseconds of 256 rows of 128 tokens; a tiny batch without a GPU."""
    longest = loaded.preprocessor.axes["input_ids"][1].maximum
    rows, length = (_RATE_ROWS, min(_RATE_LENGTH, longest)) if device != "cpu" else (2, 16)
    ids = np.random.default_rng(0).integers(1000, 20000, (rows, length)).tolist()
    inputs = loaded.preprocessor.collate(ids)
    for _ in range(3):
        loaded.predict(inputs)
    return _model_s(loaded, [inputs] * 9) * 1e3


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


def full_flops(folder: Path) -> float:
    """Floating-point operations of an encoder on 256 rows of 128 tokens: its matrix products.

    Args:
        folder: Hugging Face folder of the model.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    width, tokens = config["hidden_size"], _RATE_ROWS * _RATE_LENGTH
    weights = 4 * width**2 + 2 * width * config["intermediate_size"]
    attention = 2 * _RATE_LENGTH * width
    return float(2 * tokens * (weights + attention) * config["num_hidden_layers"])


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
