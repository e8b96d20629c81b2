"""Teachers and students: text and image classifiers."""

from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.models.image import ImageClassifier, new_mobilenet, new_resnet
from mlflow_pt_deploy.models.layers import shrink
from mlflow_pt_deploy.models.loading import (
    blank_classifier,
    load_classifier,
    new_classifier,
    reload_classifier,
    save_classifier,
)
from mlflow_pt_deploy.models.static import new_static
from mlflow_pt_deploy.models.text import TextClassifier

__all__ = [
    "Classifier",
    "ImageClassifier",
    "TextClassifier",
    "blank_classifier",
    "load_classifier",
    "new_classifier",
    "new_mobilenet",
    "new_resnet",
    "new_static",
    "reload_classifier",
    "save_classifier",
    "shrink",
]
