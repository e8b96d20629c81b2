"""Fixtures: a tiny variant and a worker process that runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny.votes import export, start_worker

from mlflow_pt_deploy.evaluation import Worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("variants") / "teacher-onnxruntime-fp32")


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Worker]:
    with start_worker(folder) as worker:
        yield worker
