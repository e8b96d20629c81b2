"""Worker process that exports variants in sequence. Started by `builder.build` as

``python -m mlflow_pt_deploy.artifacts.export_worker JOB.json``
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

from mlflow_pt_deploy.artifacts.writing import write_variant
from mlflow_pt_deploy.errors import PtDeployError, root_cause
from mlflow_pt_deploy.preprocessing import Row, row_from_json
from mlflow_pt_deploy.runtimes.base import Inputs
from mlflow_pt_deploy.runtimes.export_check import Probes
from mlflow_pt_deploy.system.child_process import end_with_parent

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


def main(path: Path) -> None:
    """Read one JSON task per line from stdin and write one JSON outcome per line to stdout.

    Args:
        path: JSON file with the settings and rows that all exports share.
    """
    warnings.simplefilter("ignore")
    end_with_parent()
    outcomes = _private_stdout()
    job = json.loads(path.read_text(encoding="utf8"))
    loaded: dict[str, _Source] = {}
    for line in sys.stdin:
        task = json.loads(line)
        started = time.monotonic()
        reason = ""
        try:
            if task["source"] not in loaded:  # keep only one model in memory
                loaded = {task["source"]: _Source.load(task["source"], job)}
            _export(task, loaded[task["source"]], job)
        except (PtDeployError, OSError) as error:
            reason = str(error)
        except Exception as error:  # any error of a runtime fails this variant only
            reason = f"{type(error).__name__}: {root_cause(error)}"
        seconds = round(time.monotonic() - started, 3)
        print(json.dumps({"reason": reason, "seconds": seconds}), file=outcomes, flush=True)


@dataclass(frozen=True)
class _Source:
    """A loaded model with its inputs for tracing, calibration and checks."""

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
    from mlflow_pt_deploy.runtimes.catalog import RUNTIMES

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
    """Return a stream on the real stdout; redirect the prints of libraries to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)
    return stream


if __name__ == "__main__":
    main(Path(sys.argv[1]))
