"""Python API of ``pt-deploy serve``.

Imports no large library, so that the main process stays small.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from mlflow_pt_deploy.errors import MissingExtraError
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.serving.http.auth import auth_from_environment, require_auth_unless_loopback
from mlflow_pt_deploy.serving.model_names import check_folder, registered_names
from mlflow_pt_deploy.serving.rollout.version_share import check_served, parse_option
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.system.cpu_allocation import count_replicas, describe_shares, share_cores
from mlflow_pt_deploy.system.hardware import core_numbers, usable_cores


def serve(*models: str, model_config: Mapping[str, Any] | None = None, **settings: Any) -> None:
    """Serve models until SIGTERM or Ctrl-C, and follow their aliases in the registry.

    Args:
        *models: URIs that MLflow loads (``models:/NAME@champion``, a run's model, a folder), or
            ``@FILE`` (see `registry.addresses.source`), each optionally with a name: ``NAME=URI``.
            The first serves ``/invocations``, each serves ``/models/NAME/invocations``.
        model_config: Serving options of all models, see `ServingOptions`.
        **settings: See `ServerSettings`.

    Raises:
        MissingExtraError: `grpc_port` is given and the extra `grpc` is not installed.
        ServingError: An option is invalid (the message names it), or a model cannot be opened.
    """
    chosen = ServerSettings(**settings)
    ServingOptions.from_config(model_config)  # checks it
    for word in models:
        check_folder(word)
    for role, text, share in (("canary", chosen.canary, None), ("shadow", chosen.shadow, 1.0)):
        if text:
            check_served(role, parse_option(role, text, share), registered_names(models))
    require_auth_unless_loopback(chosen.host, auth_from_environment(), chosen.insecure)
    cores = usable_cores()
    # only Linux spreads connections over several sockets
    count = count_replicas(chosen.replicas, cores, fit=sys.platform == "linux")
    shares = share_cores(count, cores, core_numbers(), chosen.pin and count > 1)
    if chosen.grpc_port and find_spec("grpc") is None:
        raise MissingExtraError("grpc", "grpc")
    from mlflow_pt_deploy.serving.server import run_server

    on_ready = partial(_print_banner, f"  {describe_shares(shares)}")
    run_server(models, model_config, chosen, shares, on_ready)


def _print_banner(plan: str, lines: Sequence[str]) -> None:
    print(*lines, plan, sep="\n", flush=True)
