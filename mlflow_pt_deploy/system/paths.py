"""Folders for caches, unfinished work and temporary files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.environment import environment


def home() -> Path:
    """``$PT_DEPLOY_HOME``, or ``~/.cache/mlflow-pt-deploy``; not created."""
    return Path(os.environ.get("PT_DEPLOY_HOME") or Path.home() / ".cache" / "mlflow-pt-deploy")


def work_folder(run_id: str) -> Path:
    """Create the folder of a run; the run removes it when it is done."""
    folder = home() / run_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Use one folder for all temporary files, those of child processes included, and remove it.

    A process that is killed runs no cleanup, so its parent does. TorchInductor's compile cache
    stays in its usual folder, for later processes.
    """
    default = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    compile_cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default)
    folder = tempfile.mkdtemp(prefix="pt-deploy-")
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        with (
            interrupt.exit_action(remove),
            environment(TMPDIR=folder, TORCHINDUCTOR_CACHE_DIR=compile_cache),
        ):
            yield
    finally:
        tempfile.tempdir = before
        remove()
