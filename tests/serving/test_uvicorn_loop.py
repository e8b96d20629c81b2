"""The event loop for MLflow's own server: more threads, so that more requests form a batch."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow.pyfunc import scoring_server
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.serving.uvicorn_loop import THREADS
from mlflow_pt_deploy.system.hardware import SWITCH_S

MANY = 40


@pytest.fixture
def switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching")
@pytest.mark.parametrize("lifted", [True, False])
def test_many_requests_form_a_batch_in_mlflows_server(
    lifted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_MLFLOW_IS_IN_SERVING_ENVIRONMENT", "true")
    monkeypatch.setattr("os.cpu_count", lambda: 2)  # asyncio then has six threads
    model = mlflow.pyfunc.load_model(str(save_tiny(tmp_path / "slow", predict_s=0.2)))
    batches: list[int] = []
    model._model_impl.service.batcher.executor.on_call = lambda rows, *_: batches.append(rows)
    settings = {"loop": "mlflow_pt_deploy.serving.uvicorn_loop:new_loop"} if lifted else {}
    with (
        running(scoring_server.init(model), **settings) as url,
        ThreadPoolExecutor(MANY) as pool,
    ):

        def ask(number: int) -> int:
            body = {"inputs": [f"red {number}" + " blue" * number]}
            return requests.post(f"{url}/invocations", json=body, timeout=30).status_code

        assert set(pool.map(ask, range(MANY))) == {200}
    assert sum(batches) == MANY
    if lifted:
        assert max(batches) > 6
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        assert THREADS >= MANY
    else:
        assert max(batches) <= 6
