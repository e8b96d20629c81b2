"""Cost of a row without a server: batch inference in a separate process.

    python benchmarks/batch.py --model models:/NAME@champion --data FOLDER --seconds 5

Loads the model as in a batch job and scores all test texts in one call, repeatedly. Prints one
line of JSON: rows/s, and CPU microseconds of all threads per row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    options = _parser().parse_args(arguments)
    import mlflow

    from mlflow_pt_deploy.data import load_data

    texts = [row for row in load_data(options.data).test.rows if isinstance(row, str)]
    model = mlflow.pyfunc.load_model(options.model, suppress_warnings=True)
    model.predict(texts)  # warm-up
    rows, wall_s, cpu_s = 0, time.perf_counter(), time.process_time()
    while not rows or time.perf_counter() - wall_s < options.seconds:
        rows += len(model.predict(texts))
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    print(
        json.dumps({"rows_per_s": round(rows / wall_s, 1), "cpu_us": round(cpu_s / rows * 1e6, 1)})
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="MLflow URI of our model")
    parser.add_argument("--data", required=True, help="as for pt-deploy: a folder, catalog, ...")
    parser.add_argument("--seconds", type=float, default=5)
    return parser


if __name__ == "__main__":
    main()
