"""The search for students: many tried, those that nothing beats kept.

Two objectives, validation accuracy (up) and measured latency (down). Knows Optuna; does not know
how a student is trained or measured, nor MLflow: the caller gives a function.
"""

from mlflow_pt_deploy.search.pareto import (
    Chosen,
    Dropped,
    Finished,
    Found,
    Outcome,
    choose_point,
    pareto,
)
from mlflow_pt_deploy.search.space import STATIC, TRANSFORMER, Point, Ranges, Space
from mlflow_pt_deploy.search.study import Evaluate, Plan, Report, search

__all__ = [
    "STATIC",
    "TRANSFORMER",
    "Chosen",
    "Dropped",
    "Evaluate",
    "Finished",
    "Found",
    "Outcome",
    "Plan",
    "Point",
    "Ranges",
    "Report",
    "Space",
    "choose_point",
    "pareto",
    "search",
]
