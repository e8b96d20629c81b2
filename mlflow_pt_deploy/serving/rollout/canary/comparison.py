"""Rows that a canary answered, answered by the champion too, after the response was sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.serving.batching.request import BatchRequest, Encoded, RequestContext
from mlflow_pt_deploy.serving.http.scoring_format import ScoringInput
from mlflow_pt_deploy.serving.model.inference_service import InferenceService
from mlflow_pt_deploy.serving.model.outputs import best_label
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts

MAX_PER_S = 20.0
MAX_ROWS = 8
"""Rows of one request that are compared: a large request must not decide alone."""
_DEADLINE_S = 1.0


class Comparison:
    """Compares the labels of two versions on a bounded sample of requests.

    All of it runs on the event loop; the champion computes on its own threads.

    Args:
        counts: Of the canary; gets the rows that were compared.
    """

    def __init__(self, counts: VersionCounts) -> None:
        self._counts = counts
        self._next_at = 0.0

    def begin(self, found: ScoringInput, texts: Sequence[str], champion: InferenceService) -> None:
        """Let the champion answer rows too, unless it is busy or enough were compared lately.

        Args:
            found: The request that the canary answered, parsed for the champion.
            texts: Its predictions as JSON.
            champion: The other version.
        """
        now = time.monotonic()
        if now < self._next_at or champion.batcher.queued_rows:
            return
        self._next_at = now + 1 / MAX_PER_S
        loop = asyncio.get_running_loop()
        rows, encoded = found.rows[:MAX_ROWS], (found.encoded or ())[:MAX_ROWS]
        if any(each is None for each in encoded):  # the champion has its prediction in the cache
            encoded = ()
        loop.call_soon(self._submit, loop, rows, encoded, texts[:MAX_ROWS], champion)

    def _submit(
        self,
        loop: asyncio.AbstractEventLoop,
        rows: Sequence[Row],
        encoded: Sequence[Encoded],
        texts: Sequence[str],
        champion: InferenceService,
    ) -> None:
        def on_done(done: BatchRequest) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._count, texts, done, champion)

        with suppress(PtDeployError):  # overloaded, or a row that only the canary can read
            champion.batcher.submit_nowait(
                encoded or champion.encode(rows),
                on_done,
                dedup_keys=rows,
                context=RequestContext(time.monotonic() + _DEADLINE_S),
            )

    def _count(self, texts: Sequence[str], done: BatchRequest, champion: InferenceService) -> None:
        if done.error is not None:
            return
        with suppress(PtDeployError):  # logits that are not finite
            theirs = champion.formatter.to_objects(done.result())
            differ = sum(
                best_label(text) != other["label"]
                for text, other in zip(texts, theirs, strict=True)
            )
            self._counts.compared += len(texts)
            self._counts.disagreed += differ
