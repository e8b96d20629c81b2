"""Calls of the model: what each costs is learned, and a row at fault fails by itself.

Knows rows and arrays, nothing of who waits for them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, tokens_computed
from mlflow_pt_deploy.runtimes.latency_model import Cost
from mlflow_pt_deploy.serving.batching.request import Encoded, Shape

Collate = Callable[[Sequence[Encoded]], Inputs]
Tokens = Callable[[Encoded], int]
Observe = Callable[[int, int, int, float], None]
"""Told of each call of the model: rows, tokens, tokens with padding, seconds."""
Answers = dict[Hashable, Logits | Exception]
"""A row's logits, float32 (classes,), or why there are none, by what names the row."""

# For texts that one thread computes. A call less is worth more, but where many rows wait there are
# enough of nearly the same length.
_STREAM_SLACK = 2
# A call is never taken to be worth more padding than this; nor less, before it is known.
_MOST_SLACK = 64


class Calls:
    """The model, call by call.

    Args:
        predict: The model.
        collate: Puts encoded rows together to named arrays, batch first.
        tokens: What an encoded row costs.
        pads: Whether a row costs as much as the longest beside it.

    Attributes:
        observe: Told of each call, if anybody wants to know.
    """

    def __init__(
        self, predict: Predict, collate: Collate, tokens: Tokens = len, pads: bool = True
    ) -> None:
        self._predict, self._collate = predict, collate
        self._tokens, self._pads = tokens, pads
        self._single: Predict | None = None
        self._cost, self._token_cost = Cost(), Cost()
        self._told = threading.Lock()
        self.observe: Observe | None = None
        self._began: dict[int, float] = {}

    def spread(self, single: Predict) -> None:
        """From here on calls are `single`'s, by several threads at once, unless one is alone."""
        self._single, self._pads = single, True

    @property
    def running_s(self) -> float:
        """Seconds for which the model has been computing its longest present call; 0 between."""
        began = min(list(self._began.values()), default=None)
        return 0.0 if began is None else time.perf_counter() - began

    @property
    def slack(self) -> float | None:
        """How many tokens of padding a call less is worth, see `Shape.fits`."""
        if not self._pads:
            return None
        if self._single is not None:
            return _STREAM_SLACK
        call_s, token_s = self._token_cost.call_s, self._token_cost.each_s
        return min(call_s / token_s, _MOST_SLACK) if token_s else _MOST_SLACK

    def expected_s(self, rows: int, most: int) -> float:
        """Seconds that so many rows take, at most `most` a call; 0 before the first call."""
        return self._cost.of(rows, most)

    def expected_rows(self, seconds: float, most: int) -> float:
        """How many rows take so long, at most `most` a call; infinity before the first call."""
        return self._cost.within(seconds, most)

    def lengths(self, rows: Sequence[Encoded]) -> list[int]:
        """Tokens of each row."""
        return [self._tokens(row) for row in rows]

    def shape(self, rows: Sequence[Encoded]) -> Shape:
        """Of rows that are computed together."""
        lengths = self.lengths(rows)
        return Shape(len(rows), max(lengths), sum(lengths))

    def logits(self, rows: Sequence[Encoded], alone: bool = True) -> Logits:
        """One call: float32 (rows, classes).

        Args:
            rows: What to compute.
            alone: Whether all threads are free for it.

        Raises:
            Exception: Whatever the model raised.
        """
        single = None if alone and len(rows) == 1 else self._single
        predict = single or self._predict
        me = threading.get_ident()
        self._began[me] = start = time.perf_counter()
        try:
            logits = predict(self._collate(rows))
        finally:
            del self._began[me]
        self._learn(self.shape(rows), predict, time.perf_counter() - start)
        if len(logits) != len(rows):
            raise ServingError(f"the model answered {len(logits)} of {len(rows)} rows")
        return logits

    def answer(
        self, rows: Sequence[tuple[Hashable, Encoded]], answers: Answers, alone: bool
    ) -> None:
        """One call, and where it fails halves, until the rows at fault are alone.

        Args:
            rows: Each with its name.
            answers: Filled as they come.
            alone: As for `logits`.
        """
        try:
            logits = self.logits([row for _, row in rows], alone)
        except Exception as error:
            if len(rows) == 1:
                answers[rows[0][0]] = error
                return
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                self.answer(half, answers, alone)
            return
        answers.update(zip((name for name, _ in rows), logits, strict=True))

    def _learn(self, shape: Shape, predict: Predict, seconds: float) -> None:
        padded = shape.padded(self._pads)
        with self._told:
            self._cost.saw(shape.rows, seconds)
            if self._pads and self._single is None:  # else nobody asks, see `slack`
                self._token_cost.saw(padded, seconds)
            if self.observe is not None:
                computed = tokens_computed(predict, padded)
                self.observe(shape.rows, shape.tokens, computed, seconds)
