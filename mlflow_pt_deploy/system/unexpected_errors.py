"""One-line messages for unexpected errors; their tracebacks are saved to a file."""

from __future__ import annotations

import errno
import os
import time
import traceback
from pathlib import Path

from mlflow_pt_deploy.errors import PtDeployError, missing_extra
from mlflow_pt_deploy.system.paths import home

DEBUG = "PT_DEPLOY_DEBUG"
_MAX_CHARACTERS = 600  # of a library's message

_MEMORY = (
    "out of memory ({}). Free memory, or use a smaller --batch-size, fewer rows with --limit, or a "
    "smaller model."
)
_DISK = "the disk is full ({}). Free some space and run the same command again."
_SENTENCES = {
    "builtins.MemoryError torch.OutOfMemoryError": _MEMORY,
    "builtins.PermissionError": ("permission denied ({}). Check the owner and the permissions."),
    "sqlalchemy.SQLAlchemyError sqlite3.Error mlflow.MlflowException": (
        "MLflow's tracking server or database failed ({}). Check that it runs and that "
        "MLFLOW_TRACKING_URI is right."
    ),
    "requests.RequestException httpx.HTTPError builtins.ConnectionError builtins.TimeoutError": (
        "a server cannot be reached ({}). Check the network, a proxy and the address."
    ),
    "builtins.OSError": "a file cannot be used ({}).",
}
"""Exception types to message templates; the first match is used."""


def error_message(error: BaseException) -> str:
    """Message of an error for the user; if unexpected, with the location of its traceback."""
    error = missing_extra(error) or error
    if not isinstance(error, PtDeployError):
        return f"{describe_error(error)} {save_traceback(error)}"
    return f"{error}\n{save_traceback(error)}" if os.environ.get(DEBUG) else str(error)


def describe_error(error: BaseException) -> str:
    """Kind of an error, its cause, and what to do, on one line."""
    cause = one_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _DISK.format(cause)
    if isinstance(error, RuntimeError) and "can't allocate memory" in cause:  # torch on a CPU
        return _MEMORY.format(cause)
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).mro()}
    for known, sentence in _SENTENCES.items():
        if kinds & set(known.split()):
            return sentence.format(cause)
    return f"unexpected error: {type(error).__name__}: {cause}."


def save_traceback(error: BaseException) -> str:
    """Save an error's traceback below `home`; returns its location, or the text if debugging."""
    text = "".join(traceback.format_exception(error))
    if os.environ.get(DEBUG):
        return text
    folder = home() / "errors"
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")
    except OSError:  # the disk may be full
        return f"{DEBUG}=1 shows the traceback."
    return f"The traceback is in {_short(path)}; {DEBUG}=1 shows it."


def _short(path: Path) -> str:
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)


def one_line(error: BaseException) -> str:
    """Message of an error without line breaks; its type if the message is empty."""
    text = " ".join(str(error).split()).rstrip(".")
    if len(text) > _MAX_CHARACTERS:
        text = f"{text[: _MAX_CHARACTERS // 2]} ... {text[-_MAX_CHARACTERS // 2 :]}"
    return text or type(error).__name__
