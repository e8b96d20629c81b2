"""What a student of given options starts from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models.static import FREQUENT
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.prune import frequent_pieces, new_student, prune_vocabulary


def start_student(
    teacher: Any, options: Options, splits: Splits, *, frequent: int = FREQUENT
) -> Any:
    """A part of the teacher: its vocabulary, its layers, and of these what matters most.

    Args:
        teacher: The fine-tuned teacher; it is not changed.
        options: What concerns students.
        splits: Rows of `train` tell what matters.
        frequent: See `models.new_static`.

    Raises:
        ModelError: There is no such student of this teacher.
    """
    of_texts = {
        "vocabulary": options.vocabulary != "all",
        "student_heads": options.student_heads,
        "student_neurons": options.student_neurons,
        "keep_layers": options.keep_layers,
        "relation_weight": options.relation_weight,
        "made_texts": options.made_texts,
    }
    if splits.column != "text" and (given := [name for name, set_ in of_texts.items() if set_]):
        raise ModelError(f"{', '.join(given)}: for texts only, and these are images. Leave it out.")
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
