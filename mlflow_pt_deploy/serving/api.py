"""``pt-deploy serve``: in this process, or in replicas behind one port.

Imports nothing heavy, because the parent of replicas stays what it is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mlflow_pt_deploy.serving.http.auth import check_exposure, guard_from_environment
from mlflow_pt_deploy.serving.model.options import Options
from mlflow_pt_deploy.serving.observability.server_log import our_log
from mlflow_pt_deploy.serving.settings import Settings
from mlflow_pt_deploy.serving.shares import count_replicas, describe_shares, share_cores
from mlflow_pt_deploy.system.hardware import core_numbers, usable_cores


def serve(*models: str, model_config: Mapping[str, Any] | None = None, **settings: Any) -> None:
    """Serve models until told to stop, and follow their addresses in the registry.

    Args:
        *models: Anything that MLflow loads (``models:/NAME@champion``, a run's model, a folder),
            ``@FILE`` (see `registry.source`), or either with a name of your own before it:
            ``NAME=URI``. The first answers ``/invocations``, each ``/models/NAME/invocations``.
        model_config: Serving options of all models, see `serving.options.Options`.
        **settings: See `Settings`.

    Raises:
        ServingError: An option is wrong; names it.
        TrackingError: A model cannot be found or fetched.
        PtDeployError: A model may not serve.
    """
    chosen, options = Settings(**settings), Options.from_config(model_config)
    check_exposure(chosen.host, guard_from_environment(), chosen.insecure)
    cores = usable_cores()
    # Elsewhere than on Linux the kernel does not spread connections over several sockets.
    fit = sys.platform == "linux" and options.device == "cpu"
    count = count_replicas(chosen.replicas, cores, fit=fit)
    shares = share_cores(count, cores, core_numbers(), chosen.pin and count > 1)
    say = partial(_say, f"  {describe_shares(shares)}")
    if len(shares) > 1:
        from mlflow_pt_deploy.serving.parent import serve_replicas

        serve_replicas(models, model_config, chosen, shares, say)
        return
    from mlflow_pt_deploy.serving.server import build_server, run_server

    with our_log():
        run_server(build_server(models, model_config, chosen, say))


def _say(plan: str, words: Sequence[str]) -> None:
    print(*words, plan, sep="\n", flush=True)
