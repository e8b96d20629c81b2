"""Whom there is no time for in a turn of the event loop: refused before they are read.

Where more comes than can be answered, most of what is done is to refuse, so it must cost little:
whether is decided once for all requests alike, and they are told of together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mlflow_pt_deploy.serving.http.mlflow_protocol import (
    DEADLINE_HEADER,
    LATER,
    Answer,
    failure,
    time_left,
)
from mlflow_pt_deploy.serving.lifecycle.served_model import Slot
from mlflow_pt_deploy.serving.turn import Turn

Told = Callable[[Slot, str, Answer, float, Sequence[bytes]], None]
"""Told of an answer: slot, path, answer, seconds, ``traceparent`` of each request that got it."""

_CROWDED = failure(
    429,
    "RESOURCE_EXHAUSTED",
    "so many rows wait that the request's deadline would be missed. Try again later.",
    LATER,
)


class Admission(NamedTuple):
    """How many requests may wait outside.

    Attributes:
        waiting: For the next turn.
        coming: In all, until it is asked again.
        refusal: What all others are told.
    """

    waiting: int
    coming: float
    refusal: Answer


@dataclass(slots=True, eq=False)
class _Crowd:
    """Requests alike that are refused in this turn, by their ``traceparent``."""

    path: str
    slot: Slot
    refusal: Answer
    full: bool
    parents: list[bytes]


class Crowds:
    """Those who are refused in the turn under way.

    Args:
        turn: Knows what turns take.
        told: Told of refusals when the turn ends.
    """

    def __init__(self, turn: Turn, told: Told) -> None:
        self._turn, self._told = turn, told
        self._crowds: dict[tuple[str, bytes | None], _Crowd] = {}  # by path and deadline
        self._outside = 0

    def refuse(
        self, path: str, slot: Slot, headers: Mapping[bytes, bytes], taken: int
    ) -> Answer | None:
        """Refuse a request that would come too late.

        Args:
            path: That it came to.
            slot: Behind that path.
            headers: Of the request, names in lower case.
            taken: Requests that were taken on in this turn.

        Returns:
            The refusal; None: there is time for it.
        """
        alike = path, headers.get(DEADLINE_HEADER)
        crowd = self._crowds.get(alike)
        if crowd is None:
            crowd = self._gather(*alike, slot, taken)
            if crowd is None:
                return None
            self._crowds[alike] = crowd
        crowd.parents.append(headers.get(b"traceparent", b""))
        return crowd.refusal

    def room(self, slot: Slot, header: bytes | None, taken: int) -> Admission | None:
        """For how many more requests with the same deadline there is time; None: for all.

        Args:
            slot: Behind their path.
            header: Their deadline.
            taken: Requests that were taken on in this turn.
        """
        version = slot.current
        left_s = None if version is None else time_left(version, header)
        if version is None or left_s is None:
            return None
        batcher = version.pyfunc.batcher
        waiting = max(0, self._turn.room(left_s) - taken)
        coming = batcher.spare_rows(left_s) if batcher.workers.busy else math.inf
        return Admission(waiting, coming, _CROWDED._replace(version=version))

    def tell(self, path: str, slot: Slot, number: int) -> None:
        """So many were refused outside, before the turn that comes to its end next."""
        self._outside += number
        self._told(slot, path, _CROWDED._replace(version=slot.current), 0.0, [b""] * number)

    def disperse(self, answered: int) -> None:
        """The turn is at its end, with so many requests answered, or handed on."""
        crowds, self._crowds = self._crowds.values(), {}
        outside, self._outside = self._outside, 0
        full = sum(len(crowd.parents) for crowd in crowds if crowd.full)
        self._turn.end(answered, full, outside)
        for crowd in crowds:
            self._told(crowd.slot, crowd.path, crowd.refusal, 0.0, crowd.parents)

    def _gather(self, path: str, header: bytes | None, slot: Slot, taken: int) -> _Crowd | None:
        """Those whom there is no time for: for none who come later in this turn there will be."""
        version = slot.current
        if version is None:
            return None
        batcher = version.pyfunc.batcher
        if not (taken or batcher.queued_rows):
            return None
        left_s = time_left(version, header)
        if left_s is None:
            return None
        full = not self._turn.has_room(taken, left_s)
        if not (full or batcher.crowded(left_s, self._turn.takes_s(taken))):
            return None
        return _Crowd(path, slot, _CROWDED._replace(version=version), full, [])
