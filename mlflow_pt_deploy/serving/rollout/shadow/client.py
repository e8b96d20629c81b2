"""The sending side of shadows: a sample of the requests that a worker answered.

Samples are collected for some milliseconds and sent together, after the responses. A message that
the shadow process does not take at once is dropped and counted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.serving.rollout.shadow.message import (
    MAX_BYTES,
    Sample,
    new_address,
    new_socket,
    pack,
    sampling_point,
)
from mlflow_pt_deploy.serving.rollout.shadow.plan import ShadowPlan

FLUSH_S = 0.02
FLUSH_BYTES = 8 * 2**10
"""What is collected is sent after this time, or in the iteration after this size is reached."""

_MAX_COLLECTED = 4 * FLUSH_BYTES

_OVERHEAD_BYTES = 256  # of a sample, beside rows and predictions


class ShadowClient:
    """Sends samples to the shadow process; used by the event loop only.

    Args:
        folder: The run directory; None: nothing is sent.

    Attributes:
        targets: Version whose answers are sampled, and share of its requests, by model; replaced
            as a whole by the monitor's thread.
        sent: Requests that were sent, by model.
        dropped: Those that were sampled but not sent.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.targets: Mapping[str, tuple[str, float]] = {}
        self.sent: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._address = new_address(folder) if folder else None
        self._socket = new_socket() if folder else None
        if self._socket is not None:
            self._socket.setblocking(False)
        self._waiting: list[Sample] = []
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def follow(self, plans: Mapping[str, ShadowPlan]) -> None:
        """Sample what these plans want."""
        self.targets = {
            name: (plan.answered, plan.share) for name, plan in plans.items() if plan.share
        }

    def offer(
        self, model: str, version: str, request_id: str, rows: Sequence[Row], texts: Sequence[str]
    ) -> None:
        """Sample an answered request; never waits.

        Args:
            model: Served model, one of `targets`.
            version: Label of the version that answered.
            request_id: Decides whether it is sampled.
            rows: Raw rows.
            texts: A prediction per row, as JSON.
        """
        answered, share = self.targets.get(model, ("", 0.0))
        if version != answered or (point := sampling_point(request_id)) >= share:
            return
        size = _OVERHEAD_BYTES + sum(map(len, rows)) + sum(map(len, texts))
        if size > MAX_BYTES:
            self.dropped[model] += 1
            return
        if self._waiting and self._bytes + size > _MAX_COLLECTED:
            self.flush()
        self._waiting.append(Sample(model, version, point, texts, rows))
        before, self._bytes = self._bytes, self._bytes + size
        if not before:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)
        if before <= FLUSH_BYTES < self._bytes:  # after the responses of this iteration
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Send what was collected, or drop it."""
        samples, self._waiting, self._bytes = self._waiting, [], 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._socket is None or self._address is None or not samples:
            return
        message = pack(samples)
        outcome = self.sent
        try:
            if len(message) > MAX_BYTES:
                raise BlockingIOError
            self._socket.sendto(message, self._address.path)
        except OSError:  # the process is slow, stopped or absent
            outcome = self.dropped
        outcome.update(sample.model for sample in samples)

    def close(self) -> None:
        """Release the socket; the event loop has ended."""
        self.targets, self._waiting = {}, []
        if self._socket is not None and self._address is not None:
            self._socket.close()
            self._address.close()
            self._socket = self._address = None
