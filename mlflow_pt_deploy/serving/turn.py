"""One turn of the event loop: how long it takes by the requests that it answers, and for whom there
is time in it.

Knows no requests, only how many there were; `quick` tells it.
"""

from __future__ import annotations

import time

from mlflow_pt_deploy.cost import Cost
from mlflow_pt_deploy.serving.pyfunc import MOST_AT_ONCE

# Nobody is let in for whom what came before in the same turn takes more than this share of the time
# that he has: by then more comes than the loop can answer, and each turn is longer than the last.
# While some are refused turns become shorter, so that a refusal comes soon: in a turn's time.
_CALM, _BUSY = 0.15, 0.025
_TIGHTEN, _RELAX = 0.7, 1.1
# A turn that took so many times what was expected was held up by others than its requests, or the
# machine has slowed down: then the next ones will say so.
_MOST_SURPRISE = 4.0
_NEWS = 0.2


class Turn:
    """The turns of late, and the one under way.

    A line through those in which nobody was refused says what answers cost. One with refusals takes
    longer, by a factor that follows what is seen: were their time laid upon the answers, less would
    be let in, and so more refused.

    Attributes:
        open: Whether a request was taken on in this turn.
    """

    def __init__(self) -> None:
        self._cost = Cost()
        self._stretch = 1.0
        self._share = _CALM
        self._began_s = 0.0
        self.open = False

    def begin(self) -> None:
        """The first request has come."""
        self.open = True
        self._began_s = time.perf_counter()

    def takes_s(self, answers: int) -> float:
        """Seconds of a turn with so many answers."""
        return self._stretch * self._cost.of(answers, MOST_AT_ONCE)

    def has_room(self, answers: int, left_s: float) -> bool:
        """Whether one more may join so many.

        Args:
            answers: Requests taken on in this turn.
            left_s: Seconds that it has.
        """
        return self.takes_s(answers) <= self._share * left_s

    def end(self, answers: int, refused: int) -> None:
        """All of the turn's requests are answered, or handed on.

        Args:
            answers: How many.
            refused: How many found no room.
        """
        took_s = time.perf_counter() - self._began_s
        expected_s = self._cost.of(answers, MOST_AT_ONCE)
        if expected_s:
            took_s = min(took_s, _MOST_SURPRISE * expected_s)
        if refused:
            if expected_s:
                self._stretch += _NEWS * (took_s / expected_s - self._stretch)
            self._share = max(_BUSY, _TIGHTEN * self._share)
        else:
            if answers:
                self._cost.saw(answers, took_s)
            self._stretch += _NEWS * (1.0 - self._stretch)
            self._share = min(_CALM, _RELAX * self._share)
        self.open = False
