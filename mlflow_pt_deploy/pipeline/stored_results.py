"""Read the stored measurements of a promoted version, from the run that its tags name."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.errors import ModelError, PtDeployError
from mlflow_pt_deploy.evaluation.result import find_result
from mlflow_pt_deploy.registry.addresses import RUN_TAG
from mlflow_pt_deploy.selection.challenge import Measured


def read_measured(subject: str, tags: Mapping[str, str], remedy: str) -> Measured:
    """Read the measurements of a version.

    Args:
        subject: The version in the error's message, e.g. ``shop/3``.
        tags: Tags of the version.
        remedy: Last sentence of the error: what to do without them.

    Raises:
        ModelError: It has none, e.g. because it was registered by hand.
    """
    run_id, variant = tags.get(RUN_TAG), tags.get(tracking.VARIANT_TAG)
    if not run_id or not variant:
        raise ModelError(
            f"{subject} has no stored measurements: it was not promoted by pt-deploy. {remedy}"
        )
    try:
        results, conditions = tracking.read_results(run_id)
    except PtDeployError as error:
        raise ModelError(
            f"the measurements of {subject} cannot be read from run {run_id}: {error} {remedy}"
        ) from error
    result = find_result(results, variant)
    if result is None:
        raise ModelError(f"run {run_id} has no measurements of {variant}, {subject}. {remedy}")
    return Measured(result, run_id, conditions)
