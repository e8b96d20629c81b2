"""The initial student: a pruned copy of the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models.static import FREQUENT
from mlflow_pt_deploy.pruning import frequent_pieces, new_student, prune_vocabulary


def init_student(
    teacher: Any, options: Options, splits: Splits, *, frequent: int = FREQUENT
) -> Any:
    """Build an untrained student: a subset of the teacher's vocabulary, layers, heads and neurons.

    Args:
        teacher: The fine-tuned teacher; it is not changed.
        options: Options of the student.
        splits: The importance of heads and neurons is estimated on `train`.
        frequent: See `models.new_static`.

    Raises:
        ModelError: The teacher has no such student, or an option is for texts only.
    """
    text_options = {
        "vocabulary": options.vocabulary != "all",
        "student_heads": options.student_heads,
        "student_neurons": options.student_neurons,
        "keep_layers": options.keep_layers,
        "relation_weight": options.relation_weight,
        "made_texts": options.made_texts,
    }
    if splits.column != "text" and (
        given := [name for name, value in text_options.items() if value]
    ):
        raise ModelError(
            f"{', '.join(given)}: for texts only, and the data are images. Leave it out."
        )
    if options.vocabulary != "all":
        texts, common = cast(Sequence[str], splits.train.rows), frequent_pieces(teacher)
        teacher = prune_vocabulary(teacher, texts, keep=common)
    return new_student(
        teacher,
        splits.train,
        options.student_layers,
        options.keep_layers,
        heads=options.student_heads,
        neurons=options.student_neurons,
        width=options.student_width,
        frequent=frequent,
    )
