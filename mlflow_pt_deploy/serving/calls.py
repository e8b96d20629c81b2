"""Calls of the model: what each costs is learned, and a row at fault fails by itself.

Knows rows and arrays, nothing of who waits for them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence

from mlflow_pt_deploy.cost import Cost
from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.ticket import Encoded, Shape
from mlflow_pt_deploy.variants.base import Inputs, Logits, Predict, tokens_computed

Collate = Callable[[Sequence[Encoded]], Inputs]
Tokens = Callable[[Encoded], int]
Observe = Callable[[int, int, int, float], None]
"""Told of each call of the model: rows, tokens, tokens with padding, seconds."""
Answers = dict[Hashable, Logits | Exception]
"""A row's logits, float32 (classes,), or why there are none, by what names the row."""

# A call is never taken to be worth more padding than this; nor less, before it is known.
_MOST_SLACK = 64


class Calls:
    """The model, one call after the other.

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
        self._cost, self._token_cost = Cost(), Cost()
        self.observe: Observe | None = None
        self._began: float | None = None

    @property
    def running_s(self) -> float:
        """Seconds for which the model has been computing its present call; 0 between calls."""
        began = self._began
        return 0.0 if began is None else time.perf_counter() - began

    @property
    def slack(self) -> float | None:
        """How many tokens of padding a call less is worth, see `Shape.fits`."""
        if not self._pads:
            return None
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

    def logits(self, rows: Sequence[Encoded]) -> Logits:
        """One call: float32 (rows, classes).

        Raises:
            Exception: Whatever the model raised.
        """
        self._began = start = time.perf_counter()
        try:
            logits = self._predict(self._collate(rows))
        finally:
            self._began = None
        seconds = time.perf_counter() - start
        shape = self.shape(rows)
        padded = shape.padded(self._pads)
        self._cost.saw(shape.rows, seconds)
        if self._pads:
            self._token_cost.saw(padded, seconds)
        if self.observe is not None:
            computed = tokens_computed(self._predict, padded)
            self.observe(shape.rows, shape.tokens, computed, seconds)
        if len(logits) != len(rows):
            raise ServingError(f"the model answered {len(logits)} of {len(rows)} rows")
        return logits

    def answer(self, rows: Sequence[tuple[Hashable, Encoded]], answers: Answers) -> None:
        """One call, and where it fails halves, until the rows at fault are alone.

        Args:
            rows: Each with its name.
            answers: Filled as they come.
        """
        try:
            logits = self.logits([row for _, row in rows])
        except Exception as error:
            if len(rows) == 1:
                answers[rows[0][0]] = error
                return
            middle = len(rows) // 2
            for half in (rows[:middle], rows[middle:]):
                self.answer(half, answers)
            return
        answers.update(zip((name for name, _ in rows), logits, strict=True))
