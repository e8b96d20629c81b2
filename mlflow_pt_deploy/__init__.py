"""From a good but slow PyTorch model to a fast, promoted, served one, on MLflow.

Names are loaded on first use: importing the package imports neither torch nor mlflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow_pt_deploy.data import Split, Splits, load_data
    from mlflow_pt_deploy.errors import PtDeployError
    from mlflow_pt_deploy.measure import Measurement, Result
    from mlflow_pt_deploy.options import Options
    from mlflow_pt_deploy.pipeline import run_lifecycle
    from mlflow_pt_deploy.policy import Choice, Policy, choose
    from mlflow_pt_deploy.searches import search_students
    from mlflow_pt_deploy.serving.serve import serve
    from mlflow_pt_deploy.stages import (
        distill_student,
        optimize_models,
        promote_choice,
        read_optimized,
        train_teacher,
    )
    from mlflow_pt_deploy.variants import VARIANTS, Variant, load_variant, write_variant

__version__ = "0.1.0"

_HOMES = {
    "data": ("Split", "Splits", "load_data"),
    "errors": ("PtDeployError",),
    "measure": ("Measurement", "Result"),
    "options": ("Options",),
    "pipeline": ("run_lifecycle",),
    "policy": ("Choice", "Policy", "choose"),
    "searches": ("search_students",),
    "serving.serve": ("serve",),
    "stages": (
        "distill_student",
        "optimize_models",
        "promote_choice",
        "read_optimized",
        "train_teacher",
    ),
    "variants": ("VARIANTS", "Variant", "load_variant", "write_variant"),
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
