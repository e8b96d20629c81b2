"""Whether the registry answers: tells an outage from a refusal."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def is_outage(error: BaseException) -> bool:
    """Whether an error means that the registry gave no answer, or answered with status 5xx.

    MLflow wraps the errors of its HTTP client and of its database. "There is no such model" and
    "permission denied" are answers.
    """
    from mlflow.exceptions import RestException

    if isinstance(error, RestException):
        return bool(error.get_http_status_code() >= 500)
    kinds = _kinds()
    return any(isinstance(each, kinds) for each in _chain(error))


def answer_within(seconds: float, ask: Callable[[], _T]) -> _T:
    """Call `ask` on a thread, which goes on if it takes too long: MLflow retries for minutes.

    Raises:
        TimeoutError: It took longer than `seconds`.
        Exception: The error of `ask`.
    """
    answers: queue.SimpleQueue[tuple[_T | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, name="registry-lookup", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"the registry did not answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]  # of `ask`, whose type may include None


def _kinds() -> tuple[type[BaseException], ...]:
    """Errors of connections and timeouts; those of SQLAlchemy only where it is loaded."""
    from requests import exceptions as http

    kinds: list[type[BaseException]] = [ConnectionError, TimeoutError]
    kinds += [http.ConnectionError, http.Timeout, http.RetryError]
    if database := sys.modules.get("sqlalchemy.exc"):
        kinds += [database.OperationalError, database.InterfaceError, database.TimeoutError]
    return tuple(kinds)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
