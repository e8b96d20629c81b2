"""Models are cut, saved and loaded once before anything long begins, so that nothing is lost late.

Weights do not matter for that: a student is cut from a teacher with a fresh head as from the
trained one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.errors import ModelError, PtDeployError
from mlflow_pt_deploy.models import Classifier, load_classifier, save_classifier
from mlflow_pt_deploy.models.family import FAMILIES
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.preprocess import Row
from mlflow_pt_deploy.students import start_student
from mlflow_pt_deploy.train import predict_logits

_ROWS = 4
_DRAWN = 16  # rows that tell which heads, neurons and dimensions matter: any will do
_TOLERANCE = 1e-3


def rehearse(classifier: Classifier, rows: Sequence[Row], what: str) -> None:
    """Save a model, load it again, and compare the two on a few rows.

    Args:
        classifier: It is not changed.
        rows: Some rows of the data.
        what: The model in words, e.g. ``a student with 2 layers``.

    Raises:
        ModelError: It cannot be saved or loaded, or answers otherwise then.
    """
    kind = classifier.network.config.model_type
    few = rows[:_ROWS]
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        expected = predict_logits(classifier, few)
        step = "saved"
        try:
            save_classifier(classifier, Path(folder))
            step = "loaded again"
            found = predict_logits(load_classifier(folder), few)
        except Exception as error:  # the library's own, by architecture
            raise _refused(kind, what, f"cannot be {step}", error) from error
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    if not np.abs(expected - found).max(initial=0.0) <= _TOLERANCE * scale:  # nan neither
        raise _refused(kind, what, "answers otherwise once it is saved and loaded again")


def rehearse_students(teacher: Classifier, options: Options, splits: Splits) -> None:
    """Cut each student that these options ask for, and `rehearse` it.

    Args:
        teacher: It may be untrained; it is not changed.
        options: `trials` above 0: the smallest students that a search may try.
        splits: Data that the students will learn from.

    Raises:
        ModelError: A student cannot be made, saved or loaded.
    """
    few = _few(splits)
    for wanted in _wanted(options, splits.column, teacher.network.config):
        static = splits.column == "text" and not wanted.student_layers
        what = "its static student" if static else f"a student with {wanted.student_layers} layers"
        if splits.column != "text":
            what = "its student"
        with torch.random.fork_rng():
            try:
                student = start_student(teacher, wanted, few, frequent=_ROWS)
            except PtDeployError:
                raise
            except Exception as error:  # the library's own, by architecture
                kind = teacher.network.config.model_type
                raise _refused(kind, what, "cannot be cut", error) from error
        rehearse(student, few.train.rows, what)


def _wanted(options: Options, column: str, config: Any) -> list[Options]:
    """A record of options for each student."""
    if options.trials:
        smallest = {"transformer": _smallest(config), "static": {"student_layers": 0}}
        kinds = {kind.strip() for kind in options.kinds.split(",")}
        return [replace(options, **cuts) for kind, cuts in smallest.items() if kind in kinds]
    wanted = [options] if options.student_epochs else []
    if column == "text" and options.static_epochs and options.student_layers:
        wanted.append(replace(options, student_layers=0))
    return wanted


def _smallest(config: Any) -> dict[str, Any]:
    """What is left of a transformer where a search cuts most."""
    family = FAMILIES.get(config.model_type)
    if family is None or not family.queries:
        return {"student_layers": 1}
    heads = max(1, config.num_attention_heads // 2)
    return {"student_layers": 1, "student_heads": heads, "student_width": 0.5}


def _few(splits: Splits) -> Splits:
    """The same data with a few rows to learn from."""
    train = splits.train
    few = Split(train.rows[:_DRAWN], train.targets[:_DRAWN])
    return replace(splits, train=few)


def _refused(kind: str, what: str, why: str, error: Exception | None = None) -> ModelError:
    said = " ".join(str(error).split()).rstrip(".")[:400] if error else ""
    cause = f" ({type(error).__name__}: {said})" if error else ""
    return ModelError(
        f"{kind}: {what} {why}{cause}. Nothing was trained. Cut it in another way (layers, heads, "
        "neurons, width, vocabulary), have no such student (--student-epochs 0, or --static-epochs "
        "0), or take another teacher, e.g. minilm."
    )
