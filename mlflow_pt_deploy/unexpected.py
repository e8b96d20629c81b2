"""Errors that no stage foresaw, in one sentence; the traceback goes to a file."""

from __future__ import annotations

import errno
import os
import time
import traceback
from pathlib import Path

from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.home import home

DEBUG = "PT_DEPLOY_DEBUG"
_LONGEST = 600  # characters of a library's message

_MEMORY = (
    "memory ran out ({}). Free some, or take less: a smaller --batch-size, fewer rows with "
    "--limit, or a smaller model."
)
_DISK = "the disk is full ({}). Free some space and give the same command again."
_SENTENCES = {
    "builtins.MemoryError torch.OutOfMemoryError": _MEMORY,
    "builtins.PermissionError": (
        "permission denied ({}). Check who owns it, and who may write there."
    ),
    "sqlalchemy.SQLAlchemyError sqlite3.Error mlflow.MlflowException": (
        "MLflow's tracking server or database failed ({}). Check that it runs and that "
        "MLFLOW_TRACKING_URI names it."
    ),
    "requests.RequestException httpx.HTTPError builtins.ConnectionError builtins.TimeoutError": (
        "a server cannot be reached ({}). Check the network, a proxy and the address."
    ),
    "builtins.OSError": "a file cannot be used ({}).",
}
"""Of kinds of errors, the first that fits; with the cause in brackets."""


def told(error: BaseException) -> str:
    """What a user reads of an error; of one that no stage foresaw, where its traceback is."""
    if not isinstance(error, PtDeployError):
        return f"{in_words(error)} {keep_traceback(error)}"
    return f"{error}\n{keep_traceback(error)}" if os.environ.get(DEBUG) else str(error)


def in_words(error: BaseException) -> str:
    """The kind of an error, its cause, and what to do, on one line."""
    cause = one_line(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _DISK.format(cause)
    if isinstance(error, RuntimeError) and "can't allocate memory" in cause:  # torch on a CPU
        return _MEMORY.format(cause)
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).mro()}
    for known, sentence in _SENTENCES.items():
        if kinds & set(known.split()):
            return sentence.format(cause)
    return f"an error that was not foreseen: {type(error).__name__}: {cause}."


def keep_traceback(error: BaseException) -> str:
    """Write an error's traceback to a file below `home`, and say where; or show it here."""
    text = "".join(traceback.format_exception(error))
    if os.environ.get(DEBUG):
        return text
    folder = home() / "errors"
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf8")
    except OSError:  # the disk may be what is wrong
        return f"{DEBUG}=1 shows the traceback."
    return f"The traceback is in {_short(path)}; {DEBUG}=1 shows it."


def _short(path: Path) -> str:
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)


def one_line(error: BaseException) -> str:
    """A library's message without line breaks; its kind where it says nothing."""
    said = " ".join(str(error).split()).rstrip(".")
    if len(said) > _LONGEST:
        said = f"{said[: _LONGEST // 2]} ... {said[-_LONGEST // 2 :]}"
    return said or type(error).__name__
