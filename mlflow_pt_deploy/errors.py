"""Every error this package raises on purpose.

    PtDeployError
    ├── DataError          rows or labels that cannot be used
    │   └── RowError            one row cannot be read; says which and why
    ├── ModelError         a model that cannot be found or read
    ├── VariantError       a variant that cannot be built or run
    │   ├── MissingExtraError   a library is not installed; names the extra
    │   └── UnsupportedError    this machine cannot run it
    ├── ArtifactError      a variant's folder that must not be loaded
    │   └── UntrustedError      it carries code that nobody vouched for
    ├── PolicyError        limits that make no sense, or that nothing meets
    ├── SearchError        a search that cannot go on, or has nothing to search in
    ├── TrackingError      MLflow's server or registry refused or cannot be reached
    └── ServingError       a scoring request that is not answered
        ├── RequestError        the request is wrong; names the field
        ├── OverloadedError     no room in the queue
        └── DeadlineError       not computed in time

A message says what was given, what is allowed, and what to do.
"""

import signal

__all__ = [
    "ArtifactError",
    "DataError",
    "DeadlineError",
    "MissingExtraError",
    "ModelError",
    "OverloadedError",
    "PolicyError",
    "PtDeployError",
    "RequestError",
    "RowError",
    "SearchError",
    "ServingError",
    "TrackingError",
    "UnsupportedError",
    "UntrustedError",
    "VariantError",
]


class PtDeployError(Exception):
    """Base of all errors of this package; catch it to catch them all."""


class DataError(PtDeployError):
    """Rows or labels that cannot be used."""


class RowError(DataError):
    """One row that cannot be read.

    Args:
        row: Its place among the rows that were given, from 0.
        fault: What is wrong with it and what to do, e.g. ``is cut off; send the whole file``.
    """

    def __init__(self, row: int, fault: str) -> None:
        super().__init__(f"row {row} {fault}.")
        self.row = row
        self.fault = fault


class ModelError(PtDeployError):
    """A model that cannot be found or read."""


class VariantError(PtDeployError):
    """A variant that cannot be built or run."""


class MissingExtraError(VariantError):
    """A library that a runtime needs is not installed.

    Args:
        library: Import name of the missing library, e.g. ``openvino``.
        extra: The extra of this distribution that brings it.
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"{library} is not installed. Install it with: pip install 'mlflow-pt-deploy[{extra}]'"
        )


class UnsupportedError(VariantError):
    """This machine cannot build or run the variant."""


class ArtifactError(PtDeployError):
    """A variant's folder is incomplete, changed or does not answer as it did."""


class UntrustedError(ArtifactError):
    """The artifact carries code, and neither the registry nor the user vouched for it."""


class PolicyError(PtDeployError):
    """Limits that make no sense, or that no variant meets."""


class SearchError(PtDeployError):
    """A search whose space makes no sense, or whose study cannot be used."""


class TrackingError(PtDeployError):
    """MLflow's tracking server or registry refused, or cannot be reached."""


class ServingError(PtDeployError):
    """A scoring request that is not answered."""


class RequestError(ServingError):
    """The request is wrong; the message names the field and never repeats its content."""


class OverloadedError(ServingError):
    """The queue is full; the client should come back later."""


class DeadlineError(ServingError):
    """The answer would have come after the request's deadline."""


def first_line(error: Exception) -> str:
    """What a library's error says, without its traceback or graph dump; else what it is."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def exit_in_words(code: int, killed: str) -> str:
    """How a child process ended.

    Args:
        code: Its exit code; below 0 the signal that ended it.
        killed: What follows where it was SIGKILL, which the system sends when memory runs out.
    """
    if code == -signal.SIGKILL:
        return f"was killed (SIGKILL){killed}"
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
