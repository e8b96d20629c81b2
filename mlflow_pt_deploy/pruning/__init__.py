"""Structured pruning of text classifiers: heads, neurons, hidden dimensions and vocabulary.

Pruned tensors are smaller, and config.json records their shapes. Training afterwards recovers the
lost accuracy.
"""

from mlflow_pt_deploy.pruning.importance import Importance, taylor_importance, teacher_importance
from mlflow_pt_deploy.pruning.structured import (
    cut_student,
    new_student,
    prune_heads,
    prune_neurons,
    prune_width,
)
from mlflow_pt_deploy.pruning.vocabulary import frequent_pieces, prune_vocabulary

__all__ = [
    "Importance",
    "cut_student",
    "frequent_pieces",
    "new_student",
    "prune_heads",
    "prune_neurons",
    "prune_vocabulary",
    "prune_width",
    "taylor_importance",
    "teacher_importance",
]
