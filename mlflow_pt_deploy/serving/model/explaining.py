"""Explanations of a request's predictions: limits, the model's computations, the deadline."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, RequestError
from mlflow_pt_deploy.explanation.explainer import Explainer
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.runtimes.base import Logits
from mlflow_pt_deploy.serving.batching.request import Encoded, RequestContext

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.model.inference_service import InferenceService

MAX_ROWS = 8
"""Most rows of a request with explanations."""

MAX_PENDING = 16
"""Most requests that wait for an explanation."""

# One computes while the other waits for the model.
_THREADS = 2


def wants_explanation(params: Mapping[str, Any] | None) -> bool:
    """Whether a request asks for explanations.

    Raises:
        RequestError: ``explain`` is not a boolean.
    """
    wanted = (params or {}).get("explain")
    if wanted is not None and not isinstance(wanted, (bool, np.bool_)):
        raise RequestError("'explain' must be true or false")
    return bool(wanted)


def check_explainable(column: str, rows: Sequence[Row]) -> None:
    """Check that the rows of a request can be explained.

    Raises:
        RequestError: They are images, or more than `MAX_ROWS`.
    """
    if column != "text":
        raise RequestError("'explain': explanations are for texts; this model reads images")
    if len(rows) > MAX_ROWS:
        raise RequestError(
            f"'{column}' has {len(rows)} rows; a request with explanations may have {MAX_ROWS}. "
            "Send several smaller requests."
        )


class PredictionExplainer:
    """Adds explanations to predictions of one loaded model.

    Args:
        service: Computes the rows of an explanation.

    Raises:
        VariantError: The model's `explain_method` is not possible.
    """

    def __init__(self, service: InferenceService) -> None:
        self._service = service
        self._explainer = Explainer(service.loaded, service.options.explain_method)

    def explain(
        self,
        rows: Sequence[Row],
        predictions: Sequence[Any],
        context: RequestContext | None = None,
        *,
        bounded: bool = True,
    ) -> None:
        """Add an explanation to each prediction; blocks until they are computed.

        Args:
            rows: The texts.
            predictions: See `PredictionFormatter.to_objects`; of several labels a row the best one
                is explained.
            context: Deadline, and whether the client is still connected.
            bounded: See `Batcher.submit`.

        Raises:
            ServingError: See `Batcher.submit`.
        """
        context = context or RequestContext()

        def score(encoded: Sequence[Encoded]) -> Logits:
            return self._score(encoded, context, bounded)

        check = self._deadline_check(context)
        for row, prediction in zip(rows, predictions, strict=True):
            check()
            best = prediction[0] if isinstance(prediction, list) else prediction
            text, label = str(row), best["label"]
            best["explanation"] = self._explainer.explain(text, label, score, check)

    def _score(self, encoded: Sequence[Encoded], context: RequestContext, bounded: bool) -> Logits:
        """Compute one batch after the other: the queue stays free for other requests."""
        options, batcher = self._service.options, self._service.batcher
        size = min(options.max_batch_rows, options.queue_rows)
        return np.concatenate(
            [
                batcher.submit(encoded[start : start + size], bounded=bounded, context=context)
                for start in range(0, len(encoded), size)
            ]
        )

    def _deadline_check(self, context: RequestContext) -> Callable[[], None]:
        def check() -> None:
            expired = context.expires_at is not None and time.monotonic() >= context.expires_at
            if expired or context.disconnected:
                raise self.deadline_error()

        return check

    def deadline_error(self) -> DeadlineError:
        """See `Batcher.deadline_error`."""
        return self._service.batcher.deadline_error()


class ExplanationThreads:
    """Explains for requests of an event loop, on a few threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="explain")
        self._pending = 0

    async def explain(
        self,
        explainer: PredictionExplainer,
        rows: Sequence[Row],
        texts: Sequence[str],
        context: RequestContext,
    ) -> list[str]:
        """Add an explanation to each prediction.

        Args:
            explainer: Of the version that predicted.
            rows: The texts.
            texts: A prediction per row as JSON.
            context: Deadline, and whether the client is still connected.

        Raises:
            OverloadedError: `MAX_PENDING` requests wait already.
            DeadlineError: The deadline passed.
            Exception: See `PredictionExplainer.explain`.
        """
        if self._pending >= MAX_PENDING:
            raise OverloadedError(
                f"server overloaded: {self._pending} requests wait for explanations; retry later"
            )

        def work() -> list[str]:
            predictions = [json.loads(text) for text in texts]
            explainer.explain(rows, predictions, context)
            return [json.dumps(prediction) for prediction in predictions]

        loop, expires_at = asyncio.get_running_loop(), context.expires_at
        remaining_s = None if expires_at is None else expires_at - time.monotonic()
        self._pending += 1
        try:
            async with asyncio.timeout(remaining_s):
                return await loop.run_in_executor(self._threads, work)
        except TimeoutError as error:
            context.disconnected = True  # the thread stops at its next step
            raise explainer.deadline_error() from error
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Drop what waits; the event loop has ended."""
        self._threads.shutdown(wait=False, cancel_futures=True)
