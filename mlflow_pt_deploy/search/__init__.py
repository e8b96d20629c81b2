"""The search for students: many tried, those that nothing beats kept.

Two objectives, validation accuracy (up) and measured latency (down). Knows Optuna; does not know
how a student is trained or measured, nor MLflow: the caller gives a function.
"""

from mlflow_pt_deploy.search.pareto import (
    CompletedTrial,
    FailedTrial,
    Outcome,
    SelectedTrial,
    StudyResult,
    choose_point,
    pareto,
)
from mlflow_pt_deploy.search.space import STATIC, TRANSFORMER, Ranges, Space, TrialParams
from mlflow_pt_deploy.search.study import Evaluate, Report, StudyConfig, search

__all__ = [
    "STATIC",
    "TRANSFORMER",
    "SelectedTrial",
    "FailedTrial",
    "Evaluate",
    "CompletedTrial",
    "StudyResult",
    "Outcome",
    "StudyConfig",
    "TrialParams",
    "Ranges",
    "Report",
    "Space",
    "choose_point",
    "pareto",
    "search",
]
