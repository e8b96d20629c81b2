"""Copy a champion to another name or another MLflow server, and promote it there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.errors import PtDeployError, TrackingError
from mlflow_pt_deploy.pipeline.verification import verify_model
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG, resolve
from mlflow_pt_deploy.registry.aliases import CHAMPION
from mlflow_pt_deploy.registry.fetch import Fetched, fetch
from mlflow_pt_deploy.registry.mlmodel import digest
from mlflow_pt_deploy.registry.promotion import Promotion, check_name, create_model, promote_version
from mlflow_pt_deploy.registry.served_figures import without_served
from mlflow_pt_deploy.tracking_server import redact_uri

_EXPERIMENT = "pt-deploy promotions"
_FOLDER = "model"


def copy_champion(
    name: str, target: str, registry_uri: str = "", *, verify: bool = False
) -> Promotion:
    """Copy the champion of a registered model, check its digest on arrival, and promote it there.

    Args:
        name: Registered model here.
        target: Registered model there; created if it does not exist.
        registry_uri: MLflow server there; empty: this one.
        verify: Compute the golden rows of the copy on this machine before it is promoted.

    Raises:
        TrackingError: There is no champion, the other server refuses, or the target is the source.
        ArtifactError: The copy differs from the original.
    """
    check_name(target)
    if target == name and not registry_uri:
        raise TrackingError(f"{name} cannot be copied to itself; give another name with --to.")
    address = f"models:/{name}@{CHAMPION}"
    try:
        resolved = resolve(address)
        with tempfile.TemporaryDirectory(prefix="pt-deploy-copy-") as temporary:
            fetched = fetch(resolved, Path(temporary))
            source = MlflowClient().get_model_version(name, str(resolved.version))
            tags = {**without_served(source.tags), DIGEST_TAG: digest(fetched.root)}
            origin = (
                f"copied from {name}/{resolved.version} in {redact_uri(mlflow.get_registry_uri())}"
            )
            with _server(registry_uri):
                version = _upload(fetched, target, tags, f"{source.description or ''}\n\n{origin}")
                _check_arrival(target, version, verify)
                return promote_version(target, version, origin)
    except MlflowException as error:
        where = redact_uri(registry_uri) if registry_uri else "the registry"
        raise TrackingError(
            f"{address} was not copied to {target}: {where} answers: {error.message} Check the "
            "name, the address and your permissions there."
        ) from error


def _upload(fetched: Fetched, target: str, tags: Mapping[str, str], description: str) -> str:
    """Log the files as an artifact of a run there, and register them; return the version."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(_EXPERIMENT)
    experiment_id = (
        experiment.experiment_id if experiment else client.create_experiment(_EXPERIMENT)
    )
    run = client.create_run(experiment_id, run_name=target)
    client.log_artifacts(run.info.run_id, str(fetched.root), _FOLDER)
    client.set_terminated(run.info.run_id)
    create_model(client, target)
    version = client.create_model_version(
        target,
        f"{run.info.artifact_uri}/{_FOLDER}",
        run.info.run_id,
        dict(tags),
        description=description,
    )
    return str(version.version)


def _check_arrival(target: str, version: str, verify: bool) -> None:
    """Check the digest of the copy, and its golden rows if asked; remove it if it is wrong."""
    uri = f"models:/{target}/{version}"
    try:
        with tempfile.TemporaryDirectory(prefix="pt-deploy-copy-") as temporary:
            fetch(resolve(uri), Path(temporary))
        if verify and (found := verify_model(uri)).status != "pass":
            raise TrackingError(
                f"the copy {uri} is {found.status} on this machine: {' '.join(found.findings)} "
                "It was removed; nothing was promoted."
            )
    except PtDeployError:
        MlflowClient().delete_model_version(target, version)
        raise


@contextmanager
def _server(uri: str) -> Iterator[None]:
    """Use another MLflow server inside the block; empty: the same."""
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    if uri:
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
    try:
        yield
    finally:
        if uri:
            mlflow.set_tracking_uri(before[0])
            mlflow.set_registry_uri(before[1])
