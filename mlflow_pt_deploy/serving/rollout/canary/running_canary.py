"""A canary that answers requests: which ones, and within a part of their deadline."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Executor

from mlflow_pt_deploy.errors import OverloadedError, PtDeployError, ServingError
from mlflow_pt_deploy.serving.batching.request import RequestContext
from mlflow_pt_deploy.serving.http.request import Headers
from mlflow_pt_deploy.serving.http.scoring_format import ScoringInput
from mlflow_pt_deploy.serving.model.inference_service import InferenceService
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.rollout.canary.comparison import Comparison
from mlflow_pt_deploy.serving.rollout.canary.split import KEY_HEADER, takes

DEADLINE_SHARE = 0.5
"""Share of the remaining time that a canary may take; the champion has the rest."""
NO_DEADLINE_S = 5.0
"""The same for a request without a deadline, seconds."""
_LOGGED_FAILURES = 3
_MAX_NAMED = 3

_logger = logging.getLogger(__name__)


class RunningCanary:
    """A loaded version that answers a share of the requests.

    Used on the event loop only.

    Args:
        version: The canary.
        model: Name of the model.
        champion: Label of the version that it was checked against.
        share: Its share of the requests, 0 to 1.
        since: When it started.
        metrics: Counts its failures.

    Attributes:
        label: Label of the canary.
    """

    def __init__(
        self,
        version: LoadedModel,
        model: str,
        champion: str,
        share: float,
        since: str,
        metrics: Metrics,
    ) -> None:
        self.version = version
        self.model = model
        self.label = version.label
        self.champion = champion
        self.share = share
        self.since = since
        self._metrics = metrics
        self._service = version.pyfunc.service
        self._salt = f"{version.resolved.name}/{version.label}"
        self._comparison = Comparison(self._service.counts)
        self._failures = 0

    def takes(self, champion: str, wanted: str, headers: Headers, request_id: str) -> bool:
        """Whether it answers a request.

        Args:
            champion: Label of the version that would answer otherwise.
            wanted: Version in the request's path; empty if there is none.
            headers: Headers of the request.
            request_id: Its id, for requests without a key.
        """
        if champion != self.champion:  # it was swapped; the pair has to be checked again
            return False
        if wanted:
            return wanted == self.label
        return takes(self.share, self._salt, headers.get(KEY_HEADER) or request_id)

    async def predict(
        self,
        found: ScoringInput,
        context: RequestContext,
        champion: InferenceService,
        threads: Executor,
    ) -> list[str] | None:
        """Predictions of the rows of a request as JSON; None if the champion has to answer.

        Args:
            found: The request, parsed for the champion.
            context: Its deadline.
            champion: Answers some of the rows too, to be compared.
            threads: For encoding rows that are not encoded on the event loop.
        """
        seconds = _allowed_s(context)
        mine = RequestContext(time.monotonic() + seconds)
        try:
            async with asyncio.timeout(seconds):
                texts = await self._score(found, mine, seconds, threads)
        except Exception as error:
            self._log(error)
            return None
        finally:
            mine.disconnected = True  # rows that are still queued are dropped
        self._comparison.begin(found, texts, champion)
        return texts

    def count_failure(self) -> None:
        """Count a request that the champion answered instead."""
        self._service.counts.count_response(500, 0.0)
        self._metrics.canary_failed(self.model, self.label)

    async def _score(
        self, found: ScoringInput, context: RequestContext, seconds: float, threads: Executor
    ) -> list[str]:
        service = self._service
        if reason := service.rejection(seconds):
            raise OverloadedError(reason)
        encoded = None
        if found.encoded is not None:  # too large for the event loop, or images
            loop = asyncio.get_running_loop()
            encoded = await loop.run_in_executor(threads, service.encode, found.rows)
        return await service.submit(found.rows, found.top_k, context, encoded)

    def _log(self, error: Exception) -> None:
        """Log the first failures only."""
        self._failures += 1
        if self._failures <= _LOGGED_FAILURES:
            known = isinstance(error, (PtDeployError, TimeoutError))
            _logger.warning(
                "%s: canary %s failed (%s); version %s answers",
                self.model,
                self.label,
                type(error).__name__,
                self.champion,
                exc_info=None if known else error,
            )


def check_pair(champion: LoadedModel, canary: LoadedModel) -> None:
    """Check that two versions answer the same question; the order of labels may differ.

    Raises:
        ServingError: They read different columns or have different labels.
    """
    first, second = champion.pyfunc.loaded, canary.pyfunc.loaded
    columns = first.preprocessor.column, second.preprocessor.column
    if columns[0] != columns[1]:
        raise ServingError(
            f"the canary reads the column {columns[1]!r} and the champion {columns[0]!r}; take a "
            "version that reads the same"
        )
    old, new = set(first.labels), set(second.labels)
    if old != new:
        raise ServingError(
            f"the canary's labels are not the champion's: new are {_some(new - old)}; missing are "
            f"{_some(old - new)}; take a version with the same labels"
        )


def _some(labels: set[str]) -> str:
    names = sorted(labels)
    shown = ", ".join(map(repr, names[:_MAX_NAMED])) or "none"
    more = len(names) - _MAX_NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def _allowed_s(context: RequestContext) -> float:
    """Seconds that the canary may take."""
    if context.expires_at is None:
        return NO_DEADLINE_S
    return DEADLINE_SHARE * max(0.0, context.expires_at - time.monotonic())
