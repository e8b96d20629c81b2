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
    from mlflow_pt_deploy.pipeline.lifecycle import run_lifecycle
    from mlflow_pt_deploy.pipeline.search_stage import search_students
    from mlflow_pt_deploy.pipeline.stages import (
        distill_student,
        optimize_models,
        promote_choice,
        read_optimized,
        train_teacher,
    )
    from mlflow_pt_deploy.runtimes.base import Variant
    from mlflow_pt_deploy.runtimes.catalog import VARIANTS
    from mlflow_pt_deploy.selection.policy import Choice, Policy, choose
    from mlflow_pt_deploy.serving.api import serve

_HOMES = {
    "data": ("Split", "Splits", "load_data"),
    "errors": ("PtDeployError",),
    "evaluation": ("Measurement", "Result"),
    "config": ("Options",),
    "pipeline.lifecycle": ("run_lifecycle",),
    "selection.policy": ("Choice", "Policy", "choose"),
    "pipeline.search_stage": ("search_students",),
    "serving.api": ("serve",),
    "pipeline.stages": (
        "distill_student",
        "optimize_models",
        "promote_choice",
        "read_optimized",
        "train_teacher",
    ),
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
    "distill_student",
    "load_data",
    "load_variant",
    "optimize_models",
    "promote_choice",
    "read_optimized",
    "run_lifecycle",
    "search_students",
    "serve",
    "train_teacher",
    "write_variant",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
