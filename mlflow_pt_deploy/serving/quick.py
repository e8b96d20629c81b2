"""The common request, scored in the event loop: no thread, no task, and many at a time.

For models so fast that to hand a request to a thread costs more than to score it. Requests that
come in one turn of the loop are one batch. What is not the common request, or fails, goes the long
way and is answered there, alone; so both ways give the same answers and the same errors.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from mlflow_pt_deploy.serving.guard import Guard
from mlflow_pt_deploy.serving.protocol import Answer
from mlflow_pt_deploy.serving.pyfunc import PyFunc
from mlflow_pt_deploy.serving.slot import Slot
from mlflow_pt_deploy.serving.version import Version

Done = Callable[[Answer | None], None]
"""Told the answer; None: nothing was scored, go the long way."""
Told = Callable[[Slot, str, Answer, float], None]
"""Told of each answer: slot, path, answer, seconds."""

MOST_ROWS = 4
MOST_BYTES = 16 * 2**10
# The loop serves nobody else meanwhile; what comes above this waits in threads.
MOST_WAITING = 256

_MEDIA = (b"application/json", b"application/json; charset=utf-8")
_SPECIAL = (b"x-deadline-ms", b"content-encoding")


class _Asked(NamedTuple):
    """A request that waits for the end of this turn of the loop."""

    path: str
    slot: Slot
    version: Version
    rows: list[str]
    top_k: int
    since: float
    done: Done


class Quick:
    """Scores short requests of texts between two turns of the event loop.

    Args:
        scored: The slot behind each path.
        guard: Who may score.
        told: Told of each answer.
    """

    def __init__(self, scored: Mapping[str, Slot], guard: Guard, told: Told) -> None:
        self._scored = {path.encode(): (path, slot) for path, slot in scored.items()}
        self._guard = guard
        self._told = told
        self._asked: list[_Asked] = []
        self._waiting = 0

    def knows(self, path: bytes) -> bool:
        """Whether a request to this path may be a common one."""
        return path in self._scored

    def take(self, path: bytes, headers: Mapping[bytes, bytes], body: bytes, done: Done) -> bool:
        """Take a request on, or say that it must go the long way.

        Args:
            path: One that it knows.
            headers: Of the request, names in lower case.
            body: The whole of it.
            done: Called once, in a later turn of the loop, if this returns True.
        """
        route, slot = self._scored[path]
        version = slot.current
        if version is None or not version.pyfunc.quick or self._waiting >= MOST_WAITING:
            return False
        if not self._common(headers, body):
            return False
        since = time.perf_counter()
        found = _parse(body, version.pyfunc)
        if found is None:
            return False
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._score_all)
        self._asked.append(_Asked(route, slot, version, *found, since, done))
        self._waiting += len(found[0])
        return True

    def _common(self, headers: Mapping[bytes, bytes], body: bytes) -> bool:
        return (
            len(body) <= MOST_BYTES
            and headers.get(b"content-type", b"").lower() in _MEDIA
            and not any(name in headers for name in _SPECIAL)
            and self._guard.may_score(headers.get(b"authorization"))
        )

    def _score_all(self) -> None:
        asked, self._asked, self._waiting = self._asked, [], 0
        for version in {id(request.version): request.version for request in asked}.values():
            requests = [request for request in asked if request.version is version]
            for request, result in zip(requests, _score(version, requests), strict=True):
                if result is not None:
                    seconds = time.perf_counter() - request.since
                    self._told(request.slot, request.path, result, seconds)
                request.done(result)


def _parse(body: bytes, pyfunc: PyFunc) -> tuple[list[str], int] | None:
    """Texts and `top_k` of the common form, or None."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict) or not request.keys() <= {"inputs", "params"}:
        return None
    rows, params = request.get("inputs"), request.get("params") or {"top_k": 1}
    if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
        return None
    top_k = params.get("top_k", 1) if isinstance(params, dict) else None
    if type(top_k) is not int or not 1 <= top_k <= len(pyfunc.loaded.labels):
        return None
    return (rows, top_k) if 0 < len(rows) <= MOST_ROWS else None


def _score(version: Version, requests: list[_Asked]) -> list[Answer] | list[None]:
    """Answers to requests for one version; all None where one of them fails."""
    pyfunc = version.pyfunc
    try:
        if pyfunc.batcher.busy:  # a thread is in the model; the loop must not wait for it
            return [None] * len(requests)
        rows = [row for request in requests for row in request.rows]
        widest = max(request.top_k for request in requests)
        best = pyfunc.encode(pyfunc.score(rows), widest)
    except Exception:  # found again, told and logged on the long way
        return [None] * len(requests)
    answers, at = [], 0
    for request in requests:
        mine = best[at : at + len(request.rows)]
        at += len(request.rows)
        if widest > 1:
            mine = [row[0] if request.top_k == 1 else row[: request.top_k] for row in mine]
        answers.append(Answer(200, json.dumps({"predictions": mine}).encode(), version=version))
    return answers
