"""MLflow's deployment target ``pt-deploy``: named servers on this machine.

MLflow finds this module by the entry point ``mlflow.deployments`` and uses `run_local`,
`target_help` and the client class. A deployment is a ``pt-deploy serve`` process; an update is a
hot swap inside it, so no request fails.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlflow.deployments.base import BaseDeploymentClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    RESOURCE_DOES_NOT_EXIST,
)

from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.model_config import ServingOptions, parse_value
from mlflow_pt_deploy.option_fields import OptionSpec, option_specs
from mlflow_pt_deploy.plugins import http_client
from mlflow_pt_deploy.plugins import local_servers as servers
from mlflow_pt_deploy.plugins.local_servers import State
from mlflow_pt_deploy.registry.addresses import ModelSpec
from mlflow_pt_deploy.serving.api import serve
from mlflow_pt_deploy.serving.model_names import check_folder
from mlflow_pt_deploy.serving.settings import ServerSettings

FLAVOR = "pt_deploy"
# A deployment listens on a free port, and polls often so that an update takes effect at once.
_DEFAULTS = {"port": 0, "poll_s": 1.0}
# TLS and several models need `pt-deploy serve`.
_EXCLUDED = ("tls_cert", "tls_key", "max_models", "max_memory_mb")
_SERVER_OPTIONS = tuple(
    replace(spec, default=_DEFAULTS.get(spec.name, spec.default))
    for spec in option_specs(ServerSettings)
    if spec.name not in _EXCLUDED
)
_SETTINGS = {spec.name: spec.default for spec in _SERVER_OPTIONS}
_TYPE_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
_READY = OptionSpec("ready_s", float, 300.0, "seconds until the server must be ready")


def run_local(
    name: str,
    model_uri: str,
    flavor: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Serve a model in the foreground until interrupted.

    Raises:
        MlflowException: An option is invalid, or the model cannot be served.
    """
    _check_flavor(flavor)
    settings, options, _ = _parse_config(config)
    try:
        serve(f"{name}={model_uri}", model_config=options, **{**_SETTINGS, **settings})
    except PtDeployError as error:
        raise MlflowException(str(error)) from error


def target_help() -> str:
    """Text of ``mlflow deployments help -t pt-deploy``."""
    server = "\n".join(map(_describe_option, (*_SERVER_OPTIONS, _READY)))
    options = "\n".join(map(_describe_option, option_specs(ServingOptions)))
    return f"""pt-deploy: servers on this machine. They keep running after your shell ends.

  mlflow deployments create -t pt-deploy --name shop -m models:/shop@champion -C port=5001
  mlflow deployments update -t pt-deploy --name shop -m models:/shop/7      no request fails
  mlflow deployments predict -t pt-deploy --name shop -I rows.json
  mlflow deployments delete -t pt-deploy --name shop

The target URI is pt-deploy. A server follows the alias in its model URI, so a promotion needs no
update.

Server options, -C KEY=VALUE with create and run-local (defaults in brackets):
{server}

Model options, -C KEY=VALUE with create, run-local and update:
{options}

Tokens: PT_DEPLOY_TOKEN, PT_DEPLOY_ADMIN_TOKEN (or ..._FILE), for the server and these commands.
State and logs: $PT_DEPLOY_HOME/deployments (~/.cache/mlflow-pt-deploy/deployments)."""


def _describe_option(spec: OptionSpec) -> str:
    default = f" ({spec.default})" if spec.default not in ("", None) else ""
    choices = f": {' or '.join(spec.choices)}" if spec.choices else ""
    about = textwrap.indent(textwrap.fill(spec.help + choices, 90), "      ")
    return f"  {spec.name}{default}\n{about}"


class PtDeployClient(BaseDeploymentClient):
    """Client for deployments on this machine.

    Args:
        target_uri: ``pt-deploy``.
    """

    def create_deployment(
        self,
        name: str,
        model_uri: str,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Start a server and wait until it is ready.

        Raises:
            MlflowException: The name is taken, an option is invalid, or the model cannot be served.
        """
        _check_flavor(flavor)
        settings, options, ready_s = _parse_config(config)
        with _as_mlflow(), servers.locked(name) as folder:
            state = servers.read_state(name)
            if state is not None and state.alive:
                raise MlflowException(
                    f"deployment {name} already exists ({state.url}). Update or delete it.",
                    RESOURCE_ALREADY_EXISTS,
                )
            check_folder(model_uri)
            target = ModelSpec(_absolute(model_uri), options)
            state = servers.start(folder, target, {**_SETTINGS, **settings}, ready_s)
        return _describe(state)

    def update_deployment(
        self,
        name: str,
        model_uri: str | None = None,
        flavor: str | None = None,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> dict[str, Any]:
        """Change the model or its options without downtime; restarts a dead server.

        Raises:
            MlflowException: The deployment does not exist, an option is invalid, or the new model
                cannot be served; the server then keeps the old model.
        """
        _check_flavor(flavor)
        settings, options, ready_s = _parse_config(config)
        if settings:
            raise MlflowException(
                f"{', '.join(settings)} cannot change while the server runs. Delete the deployment "
                "and create it again.",
                INVALID_PARAMETER_VALUE,
            )
        with _as_mlflow(), servers.locked(name) as folder:
            state = _existing(name)
            old = servers.read_target(name)
            check_folder(model_uri or old.uri)
            uri = _absolute(model_uri) if model_uri else old.uri
            new = ModelSpec(uri, {**old.model_config, **options})
            try:
                if not state.alive:
                    state = servers.start(folder, new, state.settings, ready_s)
                elif new != old:
                    servers.write_target(folder, new)
                    http_client.await_swap(state, new, ready_s)
            except BaseException:
                servers.write_target(folder, old)
                raise
        return _describe(state)

    def delete_deployment(
        self,
        name: str,
        config: Mapping[str, Any] | None = None,
        endpoint: str | None = None,
    ) -> None:
        """Stop a server after its pending requests, and remove its files.

        Raises:
            MlflowException: The deployment does not exist.
        """
        with _as_mlflow(), servers.locked(name) as folder:
            state = _existing(name)
            servers.stop(state, float(state.settings["grace_s"]) + 5)
            (folder / "state.json").unlink()
            shutil.rmtree(folder)

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """List the deployments on this machine, those with a dead server included."""
        found = []
        for name in servers.names():
            state = servers.read_state(name)
            with suppress(FileNotFoundError):  # deleted in the meantime
                found += [_describe(state)] if state else []
        return found

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """Describe a deployment, with the model status that its server reports.

        Raises:
            MlflowException: The deployment does not exist, or rejects the token.
        """
        with _as_mlflow():
            state = _existing(name)
            served = {"served": http_client.model_status(state)} if state.alive else {}
            return {**_describe(state), **served}

    def predict(
        self, deployment_name: str = "", inputs: Any = None, endpoint: str | None = None
    ) -> Any:
        """Score rows: one text or image, a list of them, a DataFrame, or a whole request as a dict.

        Returns:
            MLflow's ``PredictionsResponse``.

        Raises:
            MlflowException: The deployment does not exist, does not run, or rejected the rows.
        """
        from mlflow.deployments import PredictionsResponse

        with _as_mlflow():
            state = _existing(deployment_name)
            return PredictionsResponse(http_client.score(state, inputs))


@contextmanager
def _as_mlflow() -> Iterator[None]:
    """Convert our errors to MLflow's."""
    try:
        yield
    except PtDeployError as error:
        raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error


def _describe(state: State) -> dict[str, Any]:
    target = servers.read_target(state.name)
    return {
        "name": state.name,
        "flavor": FLAVOR,
        "status": "running" if state.alive else "dead; update it to restart it, or delete it",
        "url": state.url,
        "model_uri": target.uri,
        "config": {**state.settings, **target.model_config},
        "pid": state.pid,
        "created": state.created,
    }


def _existing(name: str) -> State:
    state = servers.read_state(name)
    if state is None:
        known = ", ".join(servers.names()) or "none"
        raise MlflowException(
            f"deployment {name!r} does not exist; existing: {known}", RESOURCE_DOES_NOT_EXIST
        )
    return state


def _absolute(uri: str) -> str:
    """Absolute path of a folder; other URIs are returned as they are."""
    return str(Path(uri).resolve()) if Path(uri).exists() else uri


def _check_flavor(flavor: str | None) -> None:
    if flavor not in (None, FLAVOR):
        raise MlflowException(
            f"the target pt-deploy serves the flavor {FLAVOR}, not {flavor}",
            INVALID_PARAMETER_VALUE,
        )


def _parse_config(config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Parse options of ``-C`` into server settings, model options and ``ready_s``."""
    server, model = _SERVER_OPTIONS, option_specs(ServingOptions)
    known = {spec.name: spec for spec in (*server, *model, _READY)}
    given = dict(config or {})
    if unknown := sorted(given.keys() - known.keys()):
        raise MlflowException(
            f"there is no option {', '.join(unknown)}; options are {', '.join(known)}",
            INVALID_PARAMETER_VALUE,
        )
    parsed = {key: _parse_option(known[key], value) for key, value in given.items()}
    settings, options = (
        {spec.name: parsed[spec.name] for spec in specs if spec.name in parsed}
        for specs in (server, model)
    )
    return settings, options, float(parsed.get(_READY.name, _READY.default))


def _parse_option(spec: OptionSpec, value: Any) -> Any:
    parsed = parse_value(value) if isinstance(value, str) and spec.type is not str else value
    allowed = (int, float) if spec.type is float else (spec.type,)
    if not isinstance(parsed, allowed) or (spec.type is not bool and isinstance(parsed, bool)):
        raise MlflowException(
            f"{spec.name} must be {_TYPE_NAMES[spec.type]}, not {value!r}", INVALID_PARAMETER_VALUE
        )
    return parsed
