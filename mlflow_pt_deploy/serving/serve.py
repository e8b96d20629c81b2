"""``pt-deploy serve``: in this process, or in replicas behind one port.

Imports nothing heavy, because the parent of replicas stays what it is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.hardware import core_numbers, usable_cores
from mlflow_pt_deploy.serving.guard import check_exposure, guard_from_environment
from mlflow_pt_deploy.serving.log import our_log
from mlflow_pt_deploy.serving.options import Options
from mlflow_pt_deploy.serving.settings import Settings
from mlflow_pt_deploy.serving.shares import count_replicas, describe_shares, share_cores

NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)")
"""A word of the command line with a name of the model's own before it."""

_SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]+:")


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
    for word in models:
        check_folder(word)
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


def check_folder(word: str) -> None:
    """See whether a model that is given as a folder is there; addresses are MLflow's business.

    Args:
        word: As for `serve`.

    Raises:
        ServingError: It is not there, or not a model that MLflow saved.
    """
    named = NAMED.fullmatch(word)
    uri = named[2] if named else word
    if uri.startswith("@") or _SCHEME.match(uri):
        return
    folder = Path(uri)
    if (folder / "MLmodel").is_file():
        return
    fault = "is no MLflow model: it has no file MLmodel" if folder.is_dir() else "is not a folder"
    if not folder.exists():
        fault = "is not there"
    cure = "Give a folder that MLflow saved, models:/NAME@champion or runs:/RUN_ID/NAME"
    if (folder / "config.json").is_file():
        cure = f"Make variants of it with pt-deploy optimize --model {uri}, and serve one of them"
    raise ServingError(f"the model {uri} {fault}. {cure}.")


def _say(plan: str, words: Sequence[str]) -> None:
    print(*words, plan, sep="\n", flush=True)
