"""Where unfinished work and what is worth keeping between runs lies on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """``$PT_DEPLOY_HOME``, or ``~/.cache/mlflow-pt-deploy``; not created."""
    return Path(os.environ.get("PT_DEPLOY_HOME") or Path.home() / ".cache" / "mlflow-pt-deploy")


def work_folder(run_id: str) -> Path:
    """A run's own folder, created; the run removes it when it is done."""
    folder = home() / run_id
    folder.mkdir(parents=True, exist_ok=True)
    return folder
