"""One of several replicas: the server of `server` in a process of its own, held by a `parent`.

Its job comes as the first line of standard input, whose end is the word to stop. On what was its
standard output it says one line of JSON: that it is ready, or why it cannot be.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.serving.observability.server_log import our_log
from mlflow_pt_deploy.serving.parent import END_S, Job
from mlflow_pt_deploy.serving.settings import Settings

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.server import Server


def main() -> int:
    """Serve until standard input ends; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    tell, parent = _channel(), os.getppid()
    job = Job(**json.loads(sys.stdin.readline()))
    if job.pinned:  # before any library counts cores
        os.sched_setaffinity(0, job.pinned)
    try:
        with our_log(f"replica {job.index}"):
            _serve(job, tell)
    except PtDeployError as error:
        tell(failed=str(error))
        return 1
    finally:
        if os.getppid() != parent:  # nobody else is left to remove it
            shutil.rmtree(job.folder, ignore_errors=True)
    return 0


def _serve(job: Job, tell: Callable[..., None]) -> None:
    from mlflow_pt_deploy.serving.port import join_port
    from mlflow_pt_deploy.serving.served import read_served
    from mlflow_pt_deploy.serving.server import build_server, run_server
    from mlflow_pt_deploy.serving.siblings import Seat, Siblings

    settings = Settings(**job.settings)
    siblings = Siblings(Path(job.folder), job.index, job.count)
    sockets = join_port(settings.host, settings.port)
    seat = Seat(siblings, sockets, job.late, read_served(job.served))
    server = build_server(
        job.models, job.model_config, settings, lambda words: tell(ready=words), seat
    )
    threading.Thread(target=_hold, args=(server, settings.grace_s), daemon=True).start()
    run_server(server)


def _hold(server: Server, grace_s: float) -> None:
    """Wait for the end of standard input, then see to it that this process ends."""
    while os.read(0, 1):
        pass
    server.should_exit = True
    threading.Event().wait(grace_s + END_S)
    os._exit(1)


def _channel() -> Callable[..., None]:
    """A way to tell the parent; what libraries print goes to standard error from here on."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)

    def tell(**told: Any) -> None:
        channel.write(json.dumps(told) + "\n")
        channel.flush()

    return tell


if __name__ == "__main__":
    sys.exit(main())
