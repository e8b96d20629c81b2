"""One turn of the event loop: how long it takes by the requests that it answers, and for whom there
is time in it.

Knows no requests, only how many there were; `quick` tells it.
"""

from __future__ import annotations

import time
from collections import deque

# Nobody is let in for whom what came before in the same turn takes more than this share of the time
# that he has: by then more comes than the loop can answer, and each turn is longer than the last.
# While some are refused turns become shorter, so that a refusal comes soon: in a turn's time.
_CALM, _BUSY = 0.15, 0.03
_TIGHTEN, _RELAX = 0.7, 1.05
# Those who wait outside it, where refusing takes no time of it, may wait for this share; before
# anything is known of turns, so many.
_WAITING, _FIRST = 0.1, 1024
# Turns of a few answers say nothing of one with many: mostly they take what any turn takes.
_MANY = 16
# A machine that pauses for a moment, as one does whose processor is shared out by quota, holds up
# some turns in a row; one that has become slower all of them.
_OF_LATE, _ENOUGH, _FASTER = 5, 3, 1


class Turn:
    """The turns of late, and the one under way.

    What an answer takes is a turn's time, with all that is done in it, by the turn's answers: the
    second lowest of the last five such figures. Where many are refused it so is more, and fewer are
    let in; a turn then takes what it may, of which the refusals take their part, and as soon as
    they take less, more are let in again.

    Attributes:
        open: Whether a request was taken on in this turn.
    """

    def __init__(self) -> None:
        self._each_s = 0.0
        self._of_late: deque[float] = deque(maxlen=_OF_LATE)
        self._share = _CALM
        self._began_s = 0.0
        self.open = False

    def begin(self) -> None:
        """The first request has come."""
        self.open = True
        self._began_s = time.perf_counter()

    def takes_s(self, answers: int) -> float:
        """Seconds of a turn with so many answers; 0 before some with many were seen."""
        return answers * self._each_s

    def has_room(self, answers: int, left_s: float) -> bool:
        """Whether one more may join so many.

        Args:
            answers: Requests taken on in this turn.
            left_s: Seconds that it has.
        """
        return self.takes_s(answers) <= self._share * left_s

    def room(self, left_s: float) -> int:
        """How many requests that have so many seconds may wait for the next turn."""
        return max(1, int(_WAITING * left_s / self._each_s)) if self._each_s else _FIRST

    def end(self, answers: int, refused: int, outside: int = 0) -> None:
        """All of the turn's requests are answered, or handed on.

        Args:
            answers: How many.
            refused: How many found no room.
            outside: How many were refused before the turn, where that takes no time of it.
        """
        if answers >= _MANY or (answers and (refused or outside)):
            self._of_late.append((time.perf_counter() - self._began_s) / answers)
            if len(self._of_late) >= _ENOUGH:
                self._each_s = sorted(self._of_late)[_FASTER]
        if refused:
            self._share *= max(_TIGHTEN, answers / (answers + refused))
            self._share = max(_BUSY, self._share)
        else:
            self._share = min(_CALM, _RELAX * self._share)
        self.open = False
