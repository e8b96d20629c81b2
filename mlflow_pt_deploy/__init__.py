"""From a good but slow PyTorch model to a fast, promoted, served one, on MLflow.

Names are loaded on first use: importing the package imports neither torch nor mlflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mlflow_pt_deploy._version import __version__

if TYPE_CHECKING:
    from mlflow_pt_deploy.artifacts import load_variant, write_variant
    from mlflow_pt_deploy.config import Options
    from mlflow_pt_deploy.data import Split, Splits, load_data
    from mlflow_pt_deploy.errors import PtDeployError
    from mlflow_pt_deploy.evaluation import Measurement, Result
    from mlflow_pt_deploy.pipeline.comparison import compare_models
    from mlflow_pt_deploy.pipeline.lifecycle import run_lifecycle
    from mlflow_pt_deploy.pipeline.promotion_stage import promote_choice, read_optimized
    from mlflow_pt_deploy.pipeline.report_stage import write_report
    from mlflow_pt_deploy.pipeline.search_stage import search_students
    from mlflow_pt_deploy.pipeline.stages import (
        distill_student,
        optimize_models,
        train_teacher,
    )
    from mlflow_pt_deploy.pipeline.verification import verify_model
    from mlflow_pt_deploy.registry.history import read_history
    from mlflow_pt_deploy.registry.promotion import rollback
    from mlflow_pt_deploy.runtimes.base import Variant
    from mlflow_pt_deploy.runtimes.catalog import VARIANTS
    from mlflow_pt_deploy.selection.choice import Choice, choose
    from mlflow_pt_deploy.selection.policy import Policy
    from mlflow_pt_deploy.serving.api import serve

_HOMES = {
    "data": ("Split", "Splits", "load_data"),
    "errors": ("PtDeployError",),
    "evaluation": ("Measurement", "Result"),
    "config": ("Options",),
    "pipeline.lifecycle": ("run_lifecycle",),
    "selection.choice": ("Choice", "choose"),
    "selection.policy": ("Policy",),
    "pipeline.search_stage": ("search_students",),
    "serving.api": ("serve",),
    "pipeline.stages": (
        "distill_student",
        "optimize_models",
        "train_teacher",
    ),
    "pipeline.promotion_stage": ("promote_choice", "read_optimized"),
    "pipeline.comparison": ("compare_models",),
    "pipeline.report_stage": ("write_report",),
    "pipeline.verification": ("verify_model",),
    "registry.history": ("read_history",),
    "registry.promotion": ("rollback",),
    "artifacts": ("load_variant", "write_variant"),
    "runtimes.base": ("Variant",),
    "runtimes.catalog": ("VARIANTS",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "VARIANTS",
    "Choice",
    "Measurement",
    "Options",
    "Policy",
    "PtDeployError",
    "Result",
    "Split",
    "Splits",
    "Variant",
    "__version__",
    "choose",
    "compare_models",
    "distill_student",
    "load_data",
    "load_variant",
    "optimize_models",
    "promote_choice",
    "read_history",
    "read_optimized",
    "rollback",
    "run_lifecycle",
    "search_students",
    "serve",
    "train_teacher",
    "verify_model",
    "write_report",
    "write_variant",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
