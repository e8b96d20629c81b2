"""The child process that exports variants, one after the other. Run by `build`, not by people:
``python -m mlflow_pt_deploy.variants.export JOB.json``
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mlflow_pt_deploy.child import end_with_parent
from mlflow_pt_deploy.errors import PtDeployError, first_line
from mlflow_pt_deploy.preprocess import Row, row_from_json
from mlflow_pt_deploy.variants.base import Inputs
from mlflow_pt_deploy.variants.check import Probes
from mlflow_pt_deploy.variants.folder import write_variant

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


def main(path: Path) -> None:
    """A task a line on stdin, its outcome a line on stdout, until stdin ends.

    Args:
        path: JSON file with what all exports share.
    """
    warnings.simplefilter("ignore")
    end_with_parent()
    answers = _private_stdout()
    job = json.loads(path.read_text(encoding="utf8"))
    known: dict[str, _Source] = {}
    for line in sys.stdin:
        task = json.loads(line)
        started = time.monotonic()
        reason = ""
        try:
            if task["source"] not in known:  # only one stays in memory
                known = {task["source"]: _Source.load(task["source"], job)}
            _export(task, known[task["source"]], job)
        except (PtDeployError, OSError) as error:
            reason = str(error)
        except Exception as error:  # a runtime's own: one row fails, the others go on
            reason = f"{type(error).__name__}: {first_line(error)}"
        seconds = round(time.monotonic() - started, 3)
        print(json.dumps({"reason": reason, "seconds": seconds}), file=answers, flush=True)


@dataclass(frozen=True)
class _Source:
    """A model to export, and its inputs to trace, to calibrate and to check with."""

    classifier: Classifier
    example: Inputs
    calibration: Sequence[Inputs]
    golden: Sequence[Row]
    probes: Probes

    @classmethod
    def load(cls, folder: str, job: Mapping[str, Any]) -> _Source:
        from mlflow_pt_deploy.models import reload_classifier

        classifier = reload_classifier(folder)
        preprocess = classifier.preprocessor
        calibration = [preprocess([row_from_json(row)]) for row in job["calibration"]]
        example = preprocess([row_from_json(row) for row in job["example"]])
        golden = [row_from_json(row) for row in job["golden"]]
        return cls(classifier, example, calibration, golden, Probes(classifier, golden))


def _export(task: Mapping[str, Any], source: _Source, job: Mapping[str, Any]) -> None:
    from mlflow_pt_deploy.variants.table import RUNTIMES

    variant = RUNTIMES[task["runtime"]](**task["options"])
    write_variant(
        variant,
        source.classifier,
        Path(job["target"]) / variant.name(task["model"]),
        model=task["model"],
        example=source.example,
        calibration=source.calibration,
        golden_rows=source.golden,
        probes=source.probes,
    )


def _private_stdout() -> TextIO:
    """The real stdout for answers alone; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main(Path(sys.argv[1]))
