"""A training process beside process 0: only trains, and logs, saves and prints nothing. Started as

``python -m mlflow_pt_deploy.pipeline.training_process``, with the stage and its options on stdin.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import redirect_stdout

from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.errors import PtDeployError, root_cause
from mlflow_pt_deploy.pipeline.device import on_this_machine
from mlflow_pt_deploy.pipeline.training_group import RENDEZVOUS, check_launch
from mlflow_pt_deploy.system.child_process import end_with_parent
from mlflow_pt_deploy.system.ranks import launched_ranks


def main() -> int:
    """Write ``ready`` to stdout, train, and write one line of JSON if that fails.

    Returns:
        Exit status: 0 success, 1 the training failed here or in another process.
    """
    warnings.simplefilter("ignore")
    end_with_parent()
    job = json.load(sys.stdin)
    stream = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)
    print("ready", file=stream, flush=True)
    try:
        join_training(job["stage"], Options.from_json(job["options"]))
    except PtDeployError as error:
        print(json.dumps({"error": str(error)}), file=stream, flush=True)
    except Exception as error:  # any error of a library ends the training of all processes
        reason = f"{type(error).__name__}: {root_cause(error)}"
        print(json.dumps({"error": reason}), file=stream, flush=True)
    else:
        return 0
    return 1


def join_training(stage: str, options: Options) -> None:
    """Train the model of process 0 with it; returns when the training is over.

    The processes meet before the data is read, so that process 0 finds errors first and alone, and
    its caches can be used.

    Args:
        stage: ``train`` or ``distill``.
        options: Options of the stage, as in process 0.

    Raises:
        TrainingError: The stage is trained by one process, or this one has other rows.
    """
    from mlflow_pt_deploy.pipeline.stages import distill_stage, start_student, start_teacher
    from mlflow_pt_deploy.pipeline.training_run import resolve_schedule, run_epochs
    from mlflow_pt_deploy.training.process_group import joined

    options, ranks = on_this_machine(options), launched_ranks()
    check_launch(stage if stage == "train" else distill_stage(options), options, ranks)
    rendezvous = os.environ.get(RENDEZVOUS, "env://")
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        joined(ranks, options.device, rendezvous) as group,
    ):
        start = start_teacher if stage == "train" else start_student
        training = start(options)
        schedule = resolve_schedule(training, options)
        run_epochs(training, options, schedule, group=group)


if __name__ == "__main__":
    sys.exit(main())
