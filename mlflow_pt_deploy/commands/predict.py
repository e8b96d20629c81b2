"""The command ``predict``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.option_fields import option_specs
from mlflow_pt_deploy.prediction.options import PredictionOptions


def predict(parsed: argparse.Namespace) -> dict[str, Any]:
    """Score a file."""
    from mlflow_pt_deploy.model_config import parse_config
    from mlflow_pt_deploy.prediction.runner import predict_table

    to_stdout = parsed.output == "-"
    if to_stdout and parsed.json:
        raise DataError("--json needs standard output for itself. Give a file as OUTPUT.")
    names = [spec.name for spec in option_specs(PredictionOptions)]
    options = PredictionOptions(**{name: getattr(parsed, name) for name in names})
    config = parse_config(parsed.config)
    done = predict_table(parsed.uri, parsed.input, parsed.output, options, config)
    computed = done.rows - done.continued
    lines = [
        f"{done.file}: {done.rows - done.rejected:,} rows by {done.uri}, {done.seconds:.1f} s "
        f"({computed / done.seconds:,.0f} rows/s)"
    ]
    if done.rejected:
        where = f"; {done.rejected_file} says why" if done.rejected_file else ""
        lines.append(f"{done.rejected:,} of {done.rows:,} rows were rejected{where}")
    print("\n".join(lines), file=sys.stderr if to_stdout else sys.stdout)
    return {
        "stage": "predict",
        "uri": done.uri,
        "file": done.file,
        "rows": done.rows,
        "rejected": done.rejected,
        "rejected_file": str(done.rejected_file or ""),
        "continued": done.continued,
        "seconds": round(done.seconds, 3),
    }
