"""Cost of a row without a server: batch inference in a separate process.

    python benchmarks/batch.py --model models:/NAME@champion --data FOLDER --seconds 5
    python benchmarks/batch.py --model models:/NAME@champion --data FOLDER --table .parquet

Loads the model as in a batch job and scores all test texts in one call, repeatedly. Prints one
line of JSON: rows/s, and CPU microseconds of all threads per row. With `--table` the same number of
rows is then scored from file to file, as `pt-deploy predict` does: table_rows_per_s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
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
    found = {"rows_per_s": round(rows / wall_s, 1), "cpu_us": round(cpu_s / rows * 1e6, 1)}
    if options.table:
        repeated = texts * (rows // len(texts))
        found["table_rows_per_s"] = round(_table_rows_per_s(options.model, repeated, options.table))
    print(json.dumps(found))


def _table_rows_per_s(model: str, texts: Sequence[str], suffix: str) -> float:
    """Rows per second of a batch prediction from file to file."""
    import pandas as pd

    from mlflow_pt_deploy.prediction.runner import predict_table

    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/in{suffix}", f"{folder}/out{suffix}"
        table = pd.DataFrame({"id": range(len(texts)), "text": texts})
        if suffix == ".parquet":
            table.to_parquet(source, index=False)
        elif suffix == ".jsonl":
            table.to_json(source, orient="records", lines=True)
        else:
            table.to_csv(source, index=False)
        return len(texts) / predict_table(model, source, target).seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="MLflow URI of our model")
    parser.add_argument("--data", required=True, help="as for pt-deploy: a folder, catalog, ...")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--table", default="", help=".parquet, .csv or .jsonl")
    return parser


if __name__ == "__main__":
    main()
