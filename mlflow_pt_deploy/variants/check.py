"""Compare an exported variant with eager fp32 where exports break: other shapes and padding.

An export is traced on one example. A length or a batch size that became a constant there shows
only with other rows, and an attention window that holds nothing but padding only in a batch of
unequal rows. Knows arrays; does not know which runtime computes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlflow_pt_deploy.errors import VariantError, first_line
from mlflow_pt_deploy.preprocess import Row
from mlflow_pt_deploy.variants.base import Inputs, Logits, Predict, streams_of

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


class Tolerance(NamedTuple):
    """Largest errors of a logit, as shares of eager's largest one; a row's mean is left out.

    Attributes:
        eager: Difference to eager fp32.
        company: What that difference changes by when the row shares a batch with others.
    """

    eager: float
    company: float


# fp32 differs by rounding, at most 1e-5 of thirty architectures. What a lower precision costs is
# judged by its accuracy on validation; a broken export is off by as much as the logits themselves.
# Dynamic int8 has one scale for a whole batch's activations, so there a row's answer depends on
# the other rows by design; everywhere else it changes by rounding.
TOLERANCE = {
    "fp32": Tolerance(1e-3, 1e-3),
    "bf16": Tolerance(0.3, 0.1),
    "fp16": Tolerance(0.05, 0.02),
    "int8-dynamic": Tolerance(0.6, 0.5),
    "int8-static": Tolerance(0.6, 0.1),
    "int8-accuracy": Tolerance(0.6, 0.1),
}
_LONGEST = 640  # tokens; a longer row would take seconds
_WINDOW = 137  # tokens; more than the usual window of local attention (128), and odd
_STEPS = (1, 3, 5, 8, 11)  # tokens that short rows have more than the shortest
_REAL_ROWS = 5
_SHORT = 64  # tokens; longer rows are not computed once more by themselves


@dataclass(frozen=True)
class _Probe:
    """A batch to try.

    Attributes:
        places: Which of all rows it consists of.
        inputs: Named arrays, batch first.
        expected: What eager fp32 answers, float32 (batch, classes).
    """

    places: tuple[int, ...]
    inputs: Inputs
    expected: Logits


class Probes:
    """Batches on which exports break, with eager fp32's answers.

    Few tokens in all: checking a model of MiniLM's size takes well under a second with one thread.
    Batches that the model itself cannot compute are left out.

    Args:
        module: The model in eager fp32, in evaluation mode, on the CPU.
        rows: A few raw rows of the data.

    Raises:
        VariantError: The model itself answers no batch, or one with NaN.
    """

    def __init__(self, module: Classifier, rows: Sequence[Row]) -> None:
        batches = (_of_texts if module.preprocessor.column == "text" else _of_images)(
            module.preprocessor, rows
        )
        self._probes: list[_Probe] = []
        failed = ""
        for places, encoded in batches:
            inputs = module.preprocessor.collate(encoded)
            try:
                expected = _eager(module, inputs)
            except Exception as error:  # whatever a network's own code raises
                failed = f"the model itself fails on {_words(inputs)}: {first_line(error)}"
                continue
            if not np.isfinite(expected).all():
                raise VariantError(f"the model itself answers {_words(inputs)} with NaN.")
            self._probes.append(_Probe(places, inputs, _centred(expected)))
        if not self._probes:
            raise VariantError(failed)
        largest = max(float(np.abs(probe.expected).max()) for probe in self._probes)
        self._scale = max(largest, 1e-6)

    def check(self, predict: Predict, precision: str) -> None:
        """Compare a loaded variant's answers.

        Args:
            predict: What the variant loads. Its batches are computed in one call, padding
                included, also where `Streams` would take them apart.
            precision: Selects the tolerance.

        Raises:
            VariantError: It fails, gives NaN, or differs by more than `TOLERANCE`.
        """
        predict, _ = streams_of(predict)
        allowed = TOLERANCE[precision]
        alone: dict[int, tuple[Logits, Logits]] = {}
        for probe in self._probes:
            error = self._error(predict, probe)
            _refuse_over(allowed.eager, float(np.abs(error).max()), "are off by", probe)
            if len(probe.places) == 1:
                alone[probe.places[0]] = error[0], probe.expected[0]
                continue
            for row, place in enumerate(probe.places):
                if place in alone:
                    before, expected = alone[place]
                    # Eager's own change counts in favour: some networks look at padding.
                    own = np.abs(probe.expected[row] - expected).max() / self._scale
                    change = float(np.abs(error[row] - before).max() - own)
                    _refuse_over(allowed.company, change, "change beside other rows by", probe)

    def _error(self, predict: Predict, probe: _Probe) -> Logits:
        """Difference to eager, as a share of the largest logit, float32 (batch, classes)."""
        batch = _words(probe.inputs)
        try:
            actual = predict(probe.inputs)
        except Exception as error:  # whatever the runtime raises
            raise VariantError(f"it fails on {batch}: {first_line(error)}") from error
        if actual.shape != probe.expected.shape:
            raise VariantError(
                f"answers differ from eager: for {batch} the logits' shape is {actual.shape} "
                f"instead of {probe.expected.shape}."
            )
        if not np.isfinite(actual).all():
            raise VariantError(f"answers differ from eager: NaN for {batch}.")
        off: Logits = (_centred(actual) - probe.expected) / self._scale
        return off


def _refuse_over(allowed: float, found: float, words: str, probe: _Probe) -> None:
    if found > allowed:
        raise VariantError(
            f"answers differ from eager: for {_words(probe.inputs)} logits {words} {found:.1%} of "
            f"the largest, allowed is {allowed:.1%}."
        )


def check_int8(became: int, of: int, *, least: float = 0.5) -> None:
    """Refuse to call a model int8 that is not.

    Args:
        became: Matrices of weights that are stored and multiplied as int8.
        of: All of them, each as often as it is used; embeddings are not multiplied.
        least: Smallest share that may carry the name.

    Raises:
        VariantError: Too few of them became int8, or none.
    """
    if not became or became < least * of:
        raise VariantError(
            f"{became} of {of} weight matrices became int8, so this would hardly be an int8 "
            "model. Use fp32, or int8 of another runtime."
        )


_Batches = list[tuple[tuple[int, ...], list[Any]]]


def _of_texts(preprocessor: Any, rows: Sequence[Any]) -> _Batches:
    """Short rows and real ones alone, then together; the shortest one beside long ones."""
    real = [_cut(ids, _SHORT) for ids in preprocessor.encode(rows[:_REAL_ROWS]) if len(ids)]
    shortest = min(filter(len, preprocessor.encode(["", "a"])), key=len)
    text = " ".join([*rows, "a"])
    longest = preprocessor.encode([f"{text} " * (1 + _LONGEST // len(text.split()))])[0]
    short = [shortest, *(_cut(longest, len(shortest) + step) for step in _STEPS)]
    long = [_cut(longest, size) for size in (_WINDOW, _LONGEST)]
    found, ends = [*short, *real, *long], (len(short), len(short) + len(real))
    together = [range(ends[0]), range(*ends), (0, ends[1]), (0, ends[1] + 1)]
    if len(long[0]) == len(long[1]):
        del together[-1]
    batches = [(place,) for place in range(ends[1])] + [tuple(each) for each in together if each]
    return [(batch, [found[place] for place in batch]) for batch in batches]


def _cut(ids: Sequence[int], size: int) -> list[int]:
    """The beginning of a row; its last token, mostly a special one, stays the last."""
    return [*ids[: size - 1], ids[-1]] if len(ids) > size else list(ids)


def _of_images(preprocessor: Any, rows: Sequence[Any]) -> _Batches:
    found = preprocessor.encode(rows[:_REAL_ROWS])
    sizes = sorted({1, min(2, len(found)), len(found)})
    return [(tuple(range(size)), list(found[:size])) for size in sizes]


def _eager(module: Any, inputs: Inputs) -> Logits:
    from mlflow_pt_deploy.variants.eager import torch_predict

    return torch_predict(module, "cpu")(inputs)


def _centred(logits: Logits) -> Logits:
    centred: Logits = logits - logits.mean(1, keepdims=True)
    return centred


def _words(inputs: Inputs) -> str:
    """A batch, for a person, e.g. ``rows of 2 and 137 tokens in one batch``."""
    if "attention_mask" not in inputs:
        size = len(next(iter(inputs.values())))
        return "one image" if size == 1 else f"a batch of {size} images"
    lengths = sorted(inputs["attention_mask"].sum(1).tolist())
    if len(lengths) == 1:
        return f"a row of {lengths[0]} tokens"
    *shorter, longest = map(str, lengths)
    return f"rows of {', '.join(shorter)} and {longest} tokens in one batch"
