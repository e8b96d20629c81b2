"""Dry run before training: build the students, save and reload each model, compare outputs.

It finds models that cannot be pruned or saved before hours are spent on training. Weights do not
matter, so the students are built from the untrained teacher.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Split, Splits
from mlflow_pt_deploy.errors import ModelError, PtDeployError
from mlflow_pt_deploy.models import Classifier, load_classifier, save_classifier
from mlflow_pt_deploy.models.architectures import FAMILIES
from mlflow_pt_deploy.pipeline.students import init_student
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.training.inference import predict_logits

_ROWS = 4
_SAMPLE_ROWS = 16  # for the importance of heads, neurons and dimensions; any rows will do
_TOLERANCE = 1e-3


def dry_run(classifier: Classifier, rows: Sequence[Row], what: str) -> None:
    """Save and reload a model, and compare the outputs of both on a few rows.

    Args:
        classifier: The model; it is not changed.
        rows: Rows of the data.
        what: Description for messages, e.g. ``a student with 2 layers``.

    Raises:
        ModelError: The model cannot be saved or loaded, or its outputs change.
    """
    kind = classifier.network.config.model_type
    sample = rows[:_ROWS]
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        expected = predict_logits(classifier, sample)
        step = "saved"
        try:
            save_classifier(classifier, Path(folder))
            step = "loaded"
            found = predict_logits(load_classifier(folder), sample)
        except Exception as error:  # differs by library and architecture
            raise _error(kind, what, f"cannot be {step}", error) from error
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    if not np.abs(expected - found).max(initial=0.0) <= _TOLERANCE * scale:  # also rejects NaN
        raise _error(kind, what, "has other outputs after saving and loading")


def dry_run_students(teacher: Classifier, options: Options, splits: Splits) -> None:
    """Build each student that the options request, and `dry_run` it.

    Args:
        teacher: Teacher, trained or not; it is not changed.
        options: With `trials` above 0, the smallest students that a search may try are built.
        splits: Data that the students will be trained on.

    Raises:
        ModelError: A student cannot be built, saved or loaded.
    """
    sample = _sample(splits)
    for each in _student_options(options, splits.column, teacher.network.config):
        static = splits.column == "text" and not each.student_layers
        what = "its static student" if static else f"a student with {each.student_layers} layers"
        if splits.column != "text":
            what = "its student"
        with torch.random.fork_rng():
            try:
                student = init_student(teacher, each, sample, frequent=_ROWS)
            except PtDeployError:
                raise
            except Exception as error:  # differs by library and architecture
                kind = teacher.network.config.model_type
                raise _error(kind, what, "cannot be built", error) from error
        dry_run(student, sample.train.rows, what)


def _student_options(options: Options, column: str, config: Any) -> list[Options]:
    """Options of each student."""
    if options.trials:
        smallest = {"transformer": _smallest(config), "static": {"student_layers": 0}}
        kinds = {kind.strip() for kind in options.kinds.split(",")}
        return [replace(options, **cuts) for kind, cuts in smallest.items() if kind in kinds]
    found = [options] if options.student_epochs else []
    if column == "text" and options.static_epochs and options.student_layers:
        found.append(replace(options, student_layers=0))
    return found


def _smallest(config: Any) -> dict[str, Any]:
    """Options of the smallest transformer in the search space."""
    family = FAMILIES.get(config.model_type)
    if family is None or not family.queries:
        return {"student_layers": 1}
    heads = max(1, config.num_attention_heads // 2)
    return {"student_layers": 1, "student_heads": heads, "student_width": 0.5}


def _sample(splits: Splits) -> Splits:
    """The same data with a few training rows."""
    train = splits.train
    sample = Split(train.rows[:_SAMPLE_ROWS], train.targets[:_SAMPLE_ROWS])
    return replace(splits, train=sample)


def _error(kind: str, what: str, why: str, error: Exception | None = None) -> ModelError:
    reason = " ".join(str(error).split()).rstrip(".")[:400] if error else ""
    cause = f" ({type(error).__name__}: {reason})" if error else ""
    return ModelError(
        f"{kind}: {what} {why}{cause}. Nothing was trained. Change the student's layers, heads, "
        "neurons, width or vocabulary, leave it out (--student-epochs 0, or --static-epochs 0), or "
        "use another teacher, e.g. minilm."
    )
