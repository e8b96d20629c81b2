"""Compare an exported variant with eager fp32 for other shapes and for padding.

An export is traced on one example. A length or a batch size that became a constant is detected only
with other rows, and an attention window that contains only padding occurs only in a batch of
different lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlflow_pt_deploy.errors import VariantError, root_cause
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, streams_of

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


class Tolerance(NamedTuple):
    """Maximum errors of a logit, relative to eager's largest logit; a row's mean is subtracted.

    Attributes:
        eager: Difference to eager fp32.
        batch: Change of that difference when the row shares a batch with others.
    """

    eager: float
    batch: float


# fp32 differs by rounding only, at most 1e-5 for thirty architectures. The accuracy of a lower
# precision is measured on validation; the error of a broken export is as large as the logits.
# Dynamic int8 has one activation scale per batch, so a row depends on the other rows by design; in
# all other precisions it changes by rounding only.
TOLERANCE = {
    "fp32": Tolerance(1e-3, 1e-3),
    "bf16": Tolerance(0.3, 0.1),
    "fp16": Tolerance(0.05, 0.02),
    "fp8-dynamic": Tolerance(0.6, 0.1),
    "int8-dynamic": Tolerance(0.6, 0.5),
    "int8-static": Tolerance(0.6, 0.1),
    "int8-accuracy": Tolerance(0.6, 0.1),
}
_MAX_TOKENS = 640  # a longer row would take seconds
_WINDOW = 137  # tokens; odd, and more than the usual window of local attention (128)
_EXTRA_TOKENS = (1, 3, 5, 8, 11)  # lengths of short rows, minus that of the shortest
_REAL_ROWS = 5
_MAX_SINGLE_TOKENS = 64  # longer rows are computed in a batch only


@dataclass(frozen=True)
class _Probe:
    """A batch to compare.

    Attributes:
        rows: Indices of its rows among all rows.
        inputs: Named arrays, batch first.
        expected: Centered logits of eager fp32, float32 (batch, classes).
    """

    rows: tuple[int, ...]
    inputs: Inputs
    expected: Logits


class Probes:
    """Batches that reveal broken exports, with the logits of eager fp32.

    Checking a model of MiniLM's size takes less than a second with one thread. Batches that the
    model itself cannot compute are skipped.

    Args:
        module: The model in eager fp32, in evaluation mode, on the CPU.
        rows: A few raw rows of the data.

    Raises:
        VariantError: The model fails on every batch, or returns NaN.
    """

    def __init__(self, module: Classifier, rows: Sequence[Row]) -> None:
        batches = (_text_batches if module.preprocessor.column == "text" else _image_batches)(
            module.preprocessor, rows
        )
        self._probes: list[_Probe] = []
        failed = ""
        for indices, encoded in batches:
            inputs = module.preprocessor.collate(encoded)
            try:
                expected = _eager_logits(module, inputs)
            except Exception as error:  # a network's code may raise any type
                failed = f"the model itself fails on {_describe(inputs)}: {root_cause(error)}"
                continue
            if not np.isfinite(expected).all():
                raise VariantError(f"the model itself returns NaN for {_describe(inputs)}.")
            self._probes.append(_Probe(indices, inputs, _centered(expected)))
        if not self._probes:
            raise VariantError(failed)
        largest = max(float(np.abs(probe.expected).max()) for probe in self._probes)
        self._scale = max(largest, 1e-6)

    def check(self, predict: Predict, precision: str) -> None:
        """Compare the logits of a loaded variant with eager fp32.

        Args:
            predict: The loaded predictor. Each batch is computed in one padded call, also by
                `Streams`.
            precision: Selects the tolerance.

        Raises:
            VariantError: The predictor fails, returns NaN, or exceeds `TOLERANCE`.
        """
        predict, _ = streams_of(predict)
        allowed = TOLERANCE[precision]
        single: dict[int, tuple[Logits, Logits]] = {}
        for probe in self._probes:
            error = self._error(predict, probe)
            _check_limit(allowed.eager, float(np.abs(error).max()), "differ by", probe)
            if len(probe.rows) == 1:
                single[probe.rows[0]] = error[0], probe.expected[0]
                continue
            for position, row in enumerate(probe.rows):
                if row in single:
                    before, expected = single[row]
                    # Subtract eager's own change: some networks depend on padding.
                    own = np.abs(probe.expected[position] - expected).max() / self._scale
                    change = float(np.abs(error[position] - before).max() - own)
                    _check_limit(allowed.batch, change, "change in a batch by", probe)

    def _error(self, predict: Predict, probe: _Probe) -> Logits:
        """Difference to eager relative to the largest logit, float32 (batch, classes)."""
        batch = _describe(probe.inputs)
        try:
            actual = predict(probe.inputs)
        except Exception as error:  # a runtime may raise any type
            raise VariantError(f"the variant fails on {batch}: {root_cause(error)}") from error
        if actual.shape != probe.expected.shape:
            raise VariantError(
                f"the logits differ from eager: for {batch} their shape is {actual.shape} instead "
                f"of {probe.expected.shape}."
            )
        if not np.isfinite(actual).all():
            raise VariantError(f"the logits differ from eager: NaN for {batch}.")
        difference: Logits = (_centered(actual) - probe.expected) / self._scale
        return difference


def _check_limit(limit: float, value: float, words: str, probe: _Probe) -> None:
    if value > limit:
        raise VariantError(
            f"the logits differ from eager: for {_describe(probe.inputs)} they {words} {value:.1%} "
            f"of the largest logit, the limit is {limit:.1%}."
        )


def check_int8(quantized: int, total: int, *, min_share: float = 0.5, kind: str = "int8") -> None:
    """Check that enough weight matrices are quantized.

    Args:
        quantized: Number of weight matrices that are multiplied as 8-bit numbers.
        total: Number of weight matrices, counted once per use, without embeddings.
        min_share: Minimum share of quantized matrices.
        kind: ``int8`` or ``fp8``.

    Raises:
        VariantError: Too few matrices, or none, are quantized.
    """
    if not quantized or quantized < min_share * total:
        raise VariantError(
            f"only {quantized} of {total} weight matrices are {kind} after quantization. Use fp32, "
            f"or {kind} of another runtime."
        )


_Batches = list[tuple[tuple[int, ...], list[Any]]]


def _text_batches(preprocessor: Any, rows: Sequence[Any]) -> _Batches:
    """Short and real rows one by one, then in batches; the shortest row with long ones."""
    real = [
        _truncate(ids, _MAX_SINGLE_TOKENS)
        for ids in preprocessor.encode(rows[:_REAL_ROWS])
        if len(ids)
    ]
    shortest = min(filter(len, preprocessor.encode(["", "a"])), key=len)
    text = " ".join([*rows, "a"])
    longest = preprocessor.encode([f"{text} " * (1 + _MAX_TOKENS // len(text.split()))])[0]
    short = [shortest, *(_truncate(longest, len(shortest) + step) for step in _EXTRA_TOKENS)]
    long = [_truncate(longest, size) for size in (_WINDOW, _MAX_TOKENS)]
    encoded, ends = [*short, *real, *long], (len(short), len(short) + len(real))
    groups = [range(ends[0]), range(*ends), (0, ends[1]), (0, ends[1] + 1)]
    if len(long[0]) == len(long[1]):
        del groups[-1]
    batches = [(row,) for row in range(ends[1])] + [tuple(group) for group in groups if group]
    return [(batch, [encoded[row] for row in batch]) for batch in batches]


def _truncate(ids: Sequence[int], size: int) -> list[int]:
    """Truncate a row and keep its last token, which is usually a special token."""
    return [*ids[: size - 1], ids[-1]] if len(ids) > size else list(ids)


def _image_batches(preprocessor: Any, rows: Sequence[Any]) -> _Batches:
    encoded = preprocessor.encode(rows[:_REAL_ROWS])
    sizes = sorted({1, min(2, len(encoded)), len(encoded)})
    return [(tuple(range(size)), list(encoded[:size])) for size in sizes]


def _eager_logits(module: Any, inputs: Inputs) -> Logits:
    from mlflow_pt_deploy.runtimes.eager import torch_predict

    return torch_predict(module, "cpu")(inputs)


def _centered(logits: Logits) -> Logits:
    centered: Logits = logits - logits.mean(1, keepdims=True)
    return centered


def _describe(inputs: Inputs) -> str:
    """Describe a batch for messages, e.g. ``rows of 2 and 137 tokens in one batch``."""
    if "attention_mask" not in inputs:
        size = len(next(iter(inputs.values())))
        return "one image" if size == 1 else f"a batch of {size} images"
    lengths = sorted(inputs["attention_mask"].sum(1).tolist())
    if len(lengths) == 1:
        return f"a row of {lengths[0]} tokens"
    *shorter, longest = map(str, lengths)
    return f"rows of {', '.join(shorter)} and {longest} tokens in one batch"
