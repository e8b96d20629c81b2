"""The ``pt-deploy`` command: parse the arguments, call a stage, print its result.

Heavy imports happen inside the stages, so ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mlflow_pt_deploy.cli_args import build_parser
from mlflow_pt_deploy.commands import explain, feedback, pipeline, predict, registry, serve
from mlflow_pt_deploy.errors import NotPromotedError
from mlflow_pt_deploy.system.child_process import kill_all
from mlflow_pt_deploy.system.interrupt import describe_signal, handle_signals
from mlflow_pt_deploy.system.paths import own_temporary_folder
from mlflow_pt_deploy.system.progress import quiet_bars
from mlflow_pt_deploy.system.unexpected_errors import error_message

Command = Callable[[argparse.Namespace], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command-line arguments; None: those of this process, which then keeps its
            signal handlers until it exits.

    Returns:
        Exit status: 0 success, 1 a stage failed, 2 wrong usage, 3 nothing was promoted, 4 and 5
        from `verify`, 4 from `drift` and `feedback`, 130 interrupted, 143 terminated.
    """
    parsed = build_parser().parse_args(arguments)
    _quiet_libraries()
    own = arguments is None
    try:
        with _interruptible(parsed.stage, own):
            document = _COMMANDS[parsed.stage](parsed)
            if parsed.json:
                print(json.dumps(document))
            sys.stdout.flush()
            status = int(document.get("exit_status", 0))
            if own and parsed.stage == "serve":
                os._exit(status)  # the workers are gone; the rest of this process holds nothing
            return status
    except KeyboardInterrupt as interrupted:
        number = getattr(interrupted, "number", signal.SIGINT)
        print(f"pt-deploy {parsed.stage}: {describe_signal(number)}", file=sys.stderr, flush=True)
        if own:
            os._exit(128 + number)  # cleanup is done; a normal exit with PyTorch takes seconds
        return 128 + number
    except BrokenPipeError:  # the reader, e.g. `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        print(f"pt-deploy {parsed.stage}: {error_message(error)}", file=sys.stderr)
        return 3 if isinstance(error, NotPromotedError) else 1


@contextmanager
def _interruptible(stage: str, own: bool) -> Iterator[None]:
    """Let signals end the block, and remove its temporary files.

    `serve` installs signal handlers of its own.
    """
    if stage == "serve":
        yield
        return
    with handle_signals(kill_all, f"pt-deploy {stage}", keep=own), own_temporary_folder():
        yield


def _quiet_libraries() -> None:
    """Silence progress bars and messages of libraries, unless the user configured them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ALEMBIC_LOG_LEVEL", "WARNING")
    quiet_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    import logging

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(name).setLevel(logging.WARNING)


_COMMANDS: dict[str, Command] = {
    "run": pipeline.run,
    "train": pipeline.train,
    "distill": pipeline.distill,
    "search": pipeline.search,
    "optimize": pipeline.optimize,
    "promote": registry.promote,
    "rollback": registry.rollback,
    "history": registry.history,
    "compare": registry.compare,
    "verify": registry.verify,
    "drift": registry.drift,
    "report": registry.report,
    "predict": predict.predict,
    "feedback": feedback.feedback,
    "explain": explain.explain,
    "serve": serve.serve,
    "package": serve.package,
}

if __name__ == "__main__":
    sys.exit(main())
