"""Where unfinished work and what is worth keeping between runs lies on this machine."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mlflow_pt_deploy import interrupt
from mlflow_pt_deploy.environment import environment


def home() -> Path:
    """``$PT_DEPLOY_HOME``, or ``~/.cache/mlflow-pt-deploy``; not created."""
    return Path(os.environ.get("PT_DEPLOY_HOME") or Path.home() / ".cache" / "mlflow-pt-deploy")


def work_folder(run_id: str) -> Path:
    """A run's own folder, created; the run removes it when it is done."""
    folder = home() / run_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Put all temporary files, those of child processes too, where they can be removed together.

    A process that must end at once runs no cleanup of its own. torch keeps what it has compiled
    where it always does, for later processes.
    """
    usual = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR", usual)
    folder = tempfile.mkdtemp(prefix="pt-deploy-")
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        with (
            interrupt.last_act(remove),
            environment(TMPDIR=folder, TORCHINDUCTOR_CACHE_DIR=compiled),
        ):
            yield
    finally:
        tempfile.tempdir = before
        remove()
