"""The command ``explain``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any


def explain(parsed: argparse.Namespace) -> dict[str, Any]:
    """Print which words of a text made its label."""
    from mlflow_pt_deploy.flavor import load_model
    from mlflow_pt_deploy.model_config import parse_config
    from mlflow_pt_deploy.reporting.contributions import contributions_text
    from mlflow_pt_deploy.serving.model.explaining import check_explainable
    from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc

    config = parse_config(parsed.config)
    loaded = load_model(parsed.uri, **config)
    rows = [parsed.text]
    check_explainable(loaded.preprocessor.column, rows)
    pyfunc = PtDeployPyFunc(loaded, config)
    (prediction,) = pyfunc.service.formatter.to_objects(loaded.logits(rows))
    pyfunc.explainer.explain(rows, [prediction], bounded=False)
    colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(contributions_text(parsed.text, prediction, colors=colors))
    return {"stage": "explain", "uri": parsed.uri, **prediction}
