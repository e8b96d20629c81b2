"""Exception hierarchy of the package.

    PtDeployError
    ├── DataError          rows or labels that cannot be used
    │   └── RowError            one row cannot be read; gives its index and the reason
    ├── ModelError         a model that cannot be found or read
    ├── TrainingError      processes that cannot train together, or one that ended
    ├── VariantError       a variant that cannot be built or run
    │   ├── MissingExtraError   a library is not installed; names the extra
    │   └── UnsupportedError    this machine cannot run the variant
    ├── ArtifactError      a variant folder that must not be loaded
    │   └── UntrustedError      the folder contains code whose digest is not trusted
    ├── PolicyError        limits that are invalid, or results that cannot be compared
    │   └── NotPromotedError    no variant meets the limits, or the champion stays
    ├── SearchError        an invalid search space, or a study that cannot be used
    ├── TrackingError      the MLflow server or registry failed or cannot be reached
    └── ServingError       a scoring request that is not answered
        ├── RequestError        the request is invalid; names the field
        ├── OverloadedError     the request is rejected because of load
        ├── DeviceMemoryError   the device has no memory for the model or the batch
        ├── DeviceLostError     the process that owns the device has ended
        └── DeadlineError       the result was not ready before the deadline

A message states what was given, what is supported, and what to do.
"""

import re
import signal

__all__ = [
    "ArtifactError",
    "DataError",
    "DeadlineError",
    "DeviceLostError",
    "DeviceMemoryError",
    "MissingExtraError",
    "ModelError",
    "NotPromotedError",
    "OverloadedError",
    "PolicyError",
    "PtDeployError",
    "RequestError",
    "RowError",
    "SearchError",
    "ServingError",
    "TrackingError",
    "TrainingError",
    "UnsupportedError",
    "UntrustedError",
    "VariantError",
]


class PtDeployError(Exception):
    """Base class of all errors of this package."""


class DataError(PtDeployError):
    """Rows or labels that cannot be used."""


class RowError(DataError):
    """A row that cannot be read.

    Args:
        row: Index of the row in the input, from 0.
        fault: The problem and the remedy, e.g. ``is truncated; send the whole file``.
    """

    def __init__(self, row: int, fault: str) -> None:
        super().__init__(f"row {row} {fault}.")
        self.row = row
        self.fault = fault


class ModelError(PtDeployError):
    """A model that cannot be found or read."""


class TrainingError(PtDeployError):
    """Processes that cannot train a model together, or one of them ended."""


class VariantError(PtDeployError):
    """A variant that cannot be built or run."""


class MissingExtraError(VariantError):
    """A library that a runtime needs is not installed.

    Args:
        library: Import name of the missing library, e.g. ``openvino``.
        extra: The extra of this distribution that installs it.
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(
            f"{library} is not installed. Install it with: pip install 'mlflow-pt-deploy[{extra}]'"
        )


_EXTRAS = {
    "captum": "explain",
    "matplotlib": "train",
    "mlflow": "train",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "optuna": "search",
    "PIL": "images",
    "scipy": "train",
    "sklearn": "train",
    "sqlalchemy": "train",
    "torch": "train",
    "tqdm": "train",
    "transformers": "train",
}
"""Extra that installs a library, by import name."""


def missing_extra(error: BaseException) -> MissingExtraError | None:
    """The error for a failed import of a library of an extra; None for any other error."""
    library = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or library not in _EXTRAS:
        return None
    return MissingExtraError(library, _EXTRAS[library])


class UnsupportedError(VariantError):
    """This machine cannot build or run the variant."""


class ArtifactError(PtDeployError):
    """A variant folder is incomplete or modified, or its outputs have changed."""


class UntrustedError(ArtifactError):
    """The artifact contains code, and neither the registry nor the user trusts its digest."""


class PolicyError(PtDeployError):
    """Limits that are invalid, or results that cannot be compared."""


class NotPromotedError(PolicyError):
    """No variant meets the limits, or the champion stays.

    Args:
        message: What the variants lack, or why the champion stays.
        champion_stays: Whether a variant was chosen that does not replace the champion.
    """

    def __init__(self, message: str, *, champion_stays: bool = False) -> None:
        super().__init__(message)
        self.champion_stays = champion_stays


class SearchError(PtDeployError):
    """An invalid search space, or a study that cannot be used."""


class TrackingError(PtDeployError):
    """The MLflow tracking server or registry returned an error or cannot be reached."""


class ServingError(PtDeployError):
    """A scoring request that is not answered."""


class RequestError(ServingError):
    """The request is invalid; the message names the field and never repeats its content."""


class OverloadedError(ServingError):
    """The server is overloaded; the client should retry later."""


class DeviceMemoryError(ServingError):
    """The device has no memory for the model, or for a row of the request."""


class DeviceLostError(ServingError):
    """The process that owns the device has ended; it is started again."""


class DeadlineError(ServingError):
    """The result was not ready before the deadline of the request."""


def root_cause(error: BaseException) -> str:
    """Extract the cause from a library error, as one line of about `_MAX_CHARACTERS` or less.

    Source locations, headings, tracebacks, hints for the developers of the library and graph dumps
    are removed. If an error has no text, the error that it was raised from is used.
    """
    seen: BaseException | None = error
    while seen is not None:
        inner = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
        # OSError names the path that the user gave; a LookupError has the key only.
        text = _first_reason(str(seen), paths=isinstance(seen, OSError))
        if text and not (inner and _only_wraps(str(seen), str(inner))):
            return _shorten(
                f"{type(seen).__name__}: {text}" if isinstance(seen, LookupError) else text
            )
        seen = inner
    return type(error).__name__


def _only_wraps(outer: str, inner: str) -> bool:
    """Whether a multi-line error only repeats its cause with headings and hints."""
    return "\n" in outer.strip() and bool(inner.strip()) and inner.strip() in outer


_MAX_CHARACTERS = 300
# Developer information that libraries put before the reason or between its lines.
_NOISE = re.compile(
    r"^Exception from \S+:\d+:$"  # OpenVINO
    r"|^Node \S+ of type \S+$"
    r"|^Check '.*' failed at \S+:\d+:?$"
    # ONNX Runtime: error code, node, C++ function, error code again
    r"|^\[\w+\] : \d+ : \w+ : (.*Status Message: )?"
    r"(\S+\.(cc|h):\d+ .*?\([^()]*\)( const)?( \[with [^\]]*\])? )?(\[\w+\] : \d+ : \w+ : )?"
    r"|\bFor more information, run with .*$"  # torch.export
    r"|^Caused by: \(.*\)$"
    r"|^\(Background on this error at: .*\)$"  # SQLAlchemy
    r"|^(-|--|\*|E) (?=\S)"  # list markers
)
_SUMMARY = re.compile(r"^(?:Summary|Exception):$", re.MULTILINE)
_TRACEBACK = re.compile(r"^.*Traceback .*\(most recent call last\):$", re.MULTILINE)
# An absolute path of at least two parts that is not part of a URL; its last part is kept.
_PATH = re.compile(r"(?<!url: )(?<![\w:/.?=])(?:/[^\s/'\":,;()]+)+/(?=[^\s/'\":,;()])")


def _first_reason(text: str, *, paths: bool) -> str:
    """The first paragraph with a reason, as one line; the last line of a traceback."""
    traced = _TRACEBACK.search(text) is not None
    *_, text = _SUMMARY.split(text)
    paragraphs: list[list[str]] = [[]]
    for raw in text.splitlines():
        line = _NOISE.sub("", raw.strip().strip('"')).strip()
        if line and not line.endswith(":"):  # a heading has no reason
            paragraphs[-1].append(line if paths else _PATH.sub("", line))
        elif paragraphs[-1]:
            paragraphs.append([])
    reasons = [lines for lines in paragraphs if lines]
    if not reasons:
        return " ".join(text.split()).rstrip(":")
    return reasons[-1][-1] if traced else " ".join(" ".join(dict.fromkeys(reasons[0])).split())


def _shorten(text: str) -> str:
    """Remove the middle of a long text; libraries put the reason first or last."""
    if len(text) <= _MAX_CHARACTERS:
        return text
    last = _MAX_CHARACTERS // 3
    start, end = text[: _MAX_CHARACTERS - last], text[-last:]
    return f"{start.rpartition(' ')[0] or start} ... {end.partition(' ')[2] or end}"


def describe_exit(code: int, sigkill_hint: str) -> str:
    """Describe how a child process ended, e.g. ``crashed with SIGSEGV``.

    Args:
        code: Exit code of the process; -N if signal N ended it.
        sigkill_hint: Text to append for SIGKILL, which the kernel sends when memory runs out.
    """
    if code == -signal.SIGKILL:
        return f"was killed (SIGKILL){sigkill_hint}"
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
