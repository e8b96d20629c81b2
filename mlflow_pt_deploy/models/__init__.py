"""What teachers and students are made of."""

from mlflow_pt_deploy.models.static import new_static
from mlflow_pt_deploy.models.text import (
    Classifier,
    load_classifier,
    new_classifier,
    save_classifier,
    shrink,
)

__all__ = [
    "Classifier",
    "load_classifier",
    "new_classifier",
    "new_static",
    "save_classifier",
    "shrink",
]
