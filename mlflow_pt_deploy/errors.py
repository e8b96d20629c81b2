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

import re
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


def first_line(error: BaseException) -> str:
    """The cause that a library's error gives, as one line of at most `_MOST_CHARACTERS`.

    Left out are places in source files, headings, tracebacks, hints for the library's developers
    and dumps of graphs. Where an error says nothing, what it was raised from does.
    """
    seen: BaseException | None = error
    while seen is not None:
        inner = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
        # The system's own errors name what the user gave; a lookup's is nothing but the key.
        text = _gist(str(seen), paths=isinstance(seen, OSError))
        if text and not (inner and _only_wraps(str(seen), str(inner))):
            return _cut(f"{type(seen).__name__}: {text}" if isinstance(seen, LookupError) else text)
        seen = inner
    return type(error).__name__


def _only_wraps(outer: str, inner: str) -> bool:
    """Whether an error of several lines repeats its cause and adds headings and hints to it."""
    return "\n" in outer.strip() and bool(inner.strip()) and inner.strip() in outer


_MOST_CHARACTERS = 300
# What a library puts before its reason, or between its lines, for its own developers.
_NOISE = re.compile(
    r"^Exception from \S+:\d+:$"  # OpenVINO
    r"|^Node \S+ of type \S+$"
    r"|^Check '.*' failed at \S+:\d+:?$"
    # ONNX Runtime: its code, the node, the C++ function, once more the code.
    r"|^\[\w+\] : \d+ : \w+ : (.*Status Message: )?"
    r"(\S+\.(cc|h):\d+ .*?\([^()]*\)( const)?( \[with [^\]]*\])? )?(\[\w+\] : \d+ : \w+ : )?"
    r"|\bFor more information, run with .*$"  # torch.export
    r"|^Caused by: \(.*\)$"
    r"|^\(Background on this error at: .*\)$"  # SQLAlchemy
    r"|^(-|--|\*|E) (?=\S)"  # marks of a list
)
_SUMMARY = re.compile(r"^(?:Summary|Exception):$", re.MULTILINE)
_TRACEBACK = re.compile(r"^.*Traceback .*\(most recent call last\):$", re.MULTILINE)
# An absolute path of two parts or more, which is no part of a URL; its last part is kept.
_PATH = re.compile(r"(?<!url: )(?<![\w:/.?=])(?:/[^\s/'\":,;()]+)+/(?=[^\s/'\":,;()])")


def _gist(text: str, *, paths: bool) -> str:
    """The first paragraph with a reason, as one line; of a traceback or a summary the end."""
    traced = _TRACEBACK.search(text) is not None
    *_, text = _SUMMARY.split(text)
    paragraphs: list[list[str]] = [[]]
    for raw in text.splitlines():
        line = _NOISE.sub("", raw.strip().strip('"')).strip()
        if line and not line.endswith(":"):  # what a heading announces says more than the heading
            paragraphs[-1].append(line if paths else _PATH.sub("", line))
        elif paragraphs[-1]:
            paragraphs.append([])
    told = [lines for lines in paragraphs if lines]
    if not told:
        return " ".join(text.split()).rstrip(":")
    return told[-1][-1] if traced else " ".join(" ".join(dict.fromkeys(told[0])).split())


def _cut(text: str) -> str:
    """A long text without its middle: a library may put its reason first, or nest it last."""
    if len(text) <= _MOST_CHARACTERS:
        return text
    last = _MOST_CHARACTERS // 3
    start, end = text[: _MOST_CHARACTERS - last], text[-last:]
    return f"{start.rpartition(' ')[0] or start} ... {end.partition(' ')[2] or end}"


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
