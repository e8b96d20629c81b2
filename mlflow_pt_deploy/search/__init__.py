"""Multi-objective hyperparameter and architecture search for students, on Optuna.

Maximizes validation accuracy and minimizes measured latency. The caller gives the function that
trains and measures a student.
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
