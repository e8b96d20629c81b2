"""MLflow's deployment target ``pt-deploy``: servers on this machine, kept by name.

MLflow finds this module by the entry point ``mlflow.deployments`` and takes from it `run_local`,
`target_help` and the one client class. A deployment is a ``pt-deploy serve`` process; an update is
a swap inside it, so that no request fails.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
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
from mlflow_pt_deploy.plugins import remote, servers
from mlflow_pt_deploy.plugins.servers import State
from mlflow_pt_deploy.serving.options import MODEL_CONFIG, parse_value
from mlflow_pt_deploy.serving.registry import Target
from mlflow_pt_deploy.serving.serve import check_folder, serve
from mlflow_pt_deploy.serving.settings import Settings

FLAVOR = "pt_deploy"
# A deployment listens where there is room, and sees an update at once.
_SETTINGS = {**asdict(Settings()), "port": 0, "poll_s": 1.0}
# For a server that faces others, or has several models; see pt-deploy serve.
for _key in ("tls_cert", "tls_key", "max_models", "max_memory_mb"):
    del _SETTINGS[_key]
_READY_S = 300.0


def run_local(
    name: str,
    model_uri: str,
    flavor: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Serve a model in the foreground until interrupted.

    Raises:
        MlflowException: An option is wrong, or the model may not serve.
    """
    _check_flavor(flavor)
    settings, options, _ = _split(config)
    try:
        serve(f"{name}={model_uri}", model_config=options, **{**_SETTINGS, **settings})
    except PtDeployError as error:
        raise MlflowException(str(error)) from error


def target_help() -> str:
    """What ``mlflow deployments help -t pt-deploy`` prints."""
    server = "\n".join(f"  {key} ({value})" for key, value in _SETTINGS.items())
    options = "\n".join(f"  {key} ({value})" for key, value in MODEL_CONFIG.items())
    return f"""pt-deploy: servers on this machine, each a process that outlives your shell.

  mlflow deployments create -t pt-deploy --name shop -m models:/shop@champion -C port=5001
  mlflow deployments update -t pt-deploy --name shop -m models:/shop/7      no request fails
  mlflow deployments predict -t pt-deploy --name shop -I rows.json
  mlflow deployments delete -t pt-deploy --name shop

The target's URI is pt-deploy, nothing more. An address that moves, such as an alias, is followed;
no update is needed after a promotion.

-C, of the server, at create and run-local only (defaults):
{server}
  ready_s ({_READY_S:g}), seconds until it must be ready
-C, of the model, at update too:
{options}

Tokens: PT_DEPLOY_TOKEN, PT_DEPLOY_ADMIN_TOKEN (or ..._FILE), for the server and these commands.
State and logs: $PT_DEPLOY_HOME/deployments (~/.cache/mlflow-pt-deploy/deployments)."""


class PtDeployClient(BaseDeploymentClient):
    """Deployments on this machine.

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
            MlflowException: The name is taken, an option is wrong, or the model may not serve.
        """
        _check_flavor(flavor)
        settings, options, ready_s = _split(config)
        with _as_mlflow(), servers.locked(name) as folder:
            state = servers.read_state(name)
            if state is not None and state.alive:
                raise MlflowException(
                    f"there is a deployment {name} already ({state.url}). Update or delete it.",
                    RESOURCE_ALREADY_EXISTS,
                )
            check_folder(model_uri)
            target = Target(_absolute(model_uri), options)
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
        """Serve something else, or otherwise, without a pause; a dead server is started again.

        Raises:
            MlflowException: There is no such deployment, an option is wrong, or the new model may
                not serve; the old one then goes on.
        """
        _check_flavor(flavor)
        settings, options, ready_s = _split(config)
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
            new = Target(uri, {**old.model_config, **options})
            try:
                if not state.alive:
                    state = servers.start(folder, new, state.settings, ready_s)
                elif new != old:
                    servers.write_target(folder, new)
                    remote.await_swap(state, new, ready_s)
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
        """End a server, its requests answered, and forget it.

        Raises:
            MlflowException: There is no such deployment.
        """
        with _as_mlflow(), servers.locked(name) as folder:
            state = _existing(name)
            servers.stop(state, float(state.settings["grace_s"]) + 5)
            (folder / "state.json").unlink()
            shutil.rmtree(folder)

    def list_deployments(self, endpoint: str | None = None) -> list[dict[str, Any]]:
        """All deployments on this machine, those whose server is dead included."""
        found = []
        for name in servers.names():
            state = servers.read_state(name)
            with suppress(FileNotFoundError):  # somebody deletes it right now
                found += [_describe(state)] if state else []
        return found

    def get_deployment(self, name: str, endpoint: str | None = None) -> dict[str, Any]:
        """A deployment, and what its server says of its model.

        Raises:
            MlflowException: There is no such deployment, or it refuses our token.
        """
        with _as_mlflow():
            state = _existing(name)
            return {**_describe(state), **({"served": remote.about(state)} if state.alive else {})}

    def predict(
        self, deployment_name: str = "", inputs: Any = None, endpoint: str | None = None
    ) -> Any:
        """Score rows: one text or image, a list of them, a DataFrame, or a whole request as a dict.

        Returns:
            MLflow's ``PredictionsResponse``.

        Raises:
            MlflowException: There is no such deployment, it does not run, or it refused the rows.
        """
        from mlflow.deployments import PredictionsResponse

        with _as_mlflow():
            state = _existing(deployment_name)
            return PredictionsResponse(remote.score(state, inputs))


@contextmanager
def _as_mlflow() -> Iterator[None]:
    """Our errors as MLflow's."""
    try:
        yield
    except PtDeployError as error:
        raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error


def _describe(state: State) -> dict[str, Any]:
    target = servers.read_target(state.name)
    return {
        "name": state.name,
        "flavor": FLAVOR,
        "status": "running" if state.alive else "dead; update it to start it again, or delete it",
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
            f"there is no deployment {name!r}; there is: {known}", RESOURCE_DOES_NOT_EXIST
        )
    return state


def _absolute(uri: str) -> str:
    """A folder's address that does not depend on where somebody stands."""
    return str(Path(uri).resolve()) if Path(uri).exists() else uri


def _check_flavor(flavor: str | None) -> None:
    if flavor not in (None, FLAVOR):
        raise MlflowException(
            f"the target pt-deploy serves the flavor {FLAVOR}, not {flavor}",
            INVALID_PARAMETER_VALUE,
        )


def _split(config: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any], float]:
    """Options of the server, of the model, and how long to wait; from ``-C`` all are words."""
    known: dict[str, Any] = {**_SETTINGS, **MODEL_CONFIG, "ready_s": _READY_S}
    given = dict(config or {})
    if unknown := sorted(given.keys() - known.keys()):
        raise MlflowException(
            f"there is no option {', '.join(unknown)}; there is {', '.join(known)}",
            INVALID_PARAMETER_VALUE,
        )
    for key, value in given.items():
        kind = type(known[key])
        parsed = parse_value(value) if isinstance(value, str) and kind is not str else value
        allowed = (int, float) if kind is float else (kind,)
        if not isinstance(parsed, allowed) or (kind is not bool and isinstance(parsed, bool)):
            raise MlflowException(f"{key} must be a {kind.__name__}", INVALID_PARAMETER_VALUE)
        given[key] = parsed
    names = {field.name for field in fields(Settings)}
    settings = {key: value for key, value in given.items() if key in names}
    options = {key: value for key, value in given.items() if key in MODEL_CONFIG}
    return settings, options, float(given.get("ready_s", _READY_S))
