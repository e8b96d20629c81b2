"""What a server says beside its answers: its log on standard error, and its first words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Say = Callable[[Sequence[str]], None]
"""Told the first words of a server that is ready."""

_FORMAT = "%(asctime)s %(levelname)s %(message)s"


@contextmanager
def our_log(speaker: str = "") -> Iterator[None]:
    """Our own log on standard error, unless the program that calls us has set up logging.

    Args:
        speaker: What stands before each message, where several processes write into one log.
    """
    logger = logging.getLogger("mlflow_pt_deploy")
    if logging.getLogger().handlers or logger.handlers:
        yield
        return
    handler = logging.StreamHandler()
    message = f"{speaker}: %(message)s" if speaker else "%(message)s"
    handler.setFormatter(logging.Formatter(_FORMAT.replace("%(message)s", message)))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
