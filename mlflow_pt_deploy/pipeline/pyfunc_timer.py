"""Time `mlflow.pyfunc`'s `predict` of a logged model in a fresh process.

    python -m mlflow_pt_deploy.pipeline.pyfunc_timer URI < ROWS

A timing in a notebook shows this latency, not that of the runtime alone: it includes the
micro-batcher and MLflow's checks.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.preprocessing import Row, row_from_json, row_to_json
from mlflow_pt_deploy.registry.addresses import registry_variables
from mlflow_pt_deploy.system import child_process as child

PYFUNC_ROWS = 32
_PASSES = 5
_TIMEOUT_S = 300.0


def pyfunc_latency_ms(uri: str, rows: Sequence[Row]) -> float:
    """Median latency of a row in `mlflow.pyfunc.load_model(uri).predict`, in milliseconds.

    Args:
        uri: ``models:/m-...``.
        rows: Raw rows; the first few are timed.

    Raises:
        ModelError: The model cannot be loaded or timed.
    """
    document = json.dumps([row_to_json(row) for row in rows[:PYFUNC_ROWS]])
    process = child.start(
        child.command("pipeline.pyfunc_timer", uri),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child.environment(**registry_variables(), PT_DEPLOY_ALLOW_CODE="1"),
    )
    try:
        out, _ = process.communicate(document.encode(), timeout=_TIMEOUT_S)
        return float(json.loads(out.splitlines()[-1])["p50_ms"])
    except (subprocess.TimeoutExpired, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{uri} could not be timed through mlflow.pyfunc") from error
    finally:
        child.end(process)


def main() -> int:
    """Time the model given on the command line; the last line printed is JSON."""
    import mlflow

    child.end_with_parent()
    rows = [row_from_json(row) for row in json.loads(sys.stdin.read())]
    model = mlflow.pyfunc.load_model(sys.argv[1])
    found = []
    for number in range(1 + _PASSES):
        for row in rows:
            start = time.perf_counter()
            model.predict([row])
            if number:  # the first pass warms up
                found.append(time.perf_counter() - start)
    print(json.dumps({"p50_ms": 1e3 * statistics.median(found)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
