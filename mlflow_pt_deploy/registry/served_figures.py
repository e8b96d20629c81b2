"""What a registered version served: tags and metrics in MLflow, beside what was promised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from mlflow_pt_deploy.registry.addresses import ResolvedVersion
from mlflow_pt_deploy.registry.profile_tags import SERVED_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

PREFIX = "served."
"""Prefix of the tags; the metrics begin with ``served_``."""

TABLE = "served_feedback.json"
"""Artifact of the version's run: rows by label answered and label sent."""

COLUMNS = ("version", "", "accuracy", "p50 ms", "p99 ms", "rows/s", "judged", "requests", "errors")
"""Titles of `promised_and_served`."""

_SERVED = ("latency_p50_ms", "latency_p99_ms", "rows_per_s", "judged_rows", "requests", "errors")


def write_served(
    version: ResolvedVersion,
    tags: Mapping[str, str],
    metrics: Mapping[str, float] | None = None,
    table: Sequence[Sequence[object]] = (),
) -> None:
    """Write what a version served.

    Args:
        version: A registered version.
        tags: All its tags that begin with `PREFIX`, and `SERVED_TAG`; others of that prefix, of an
            earlier server, are deleted.
        metrics: Logged to the run of the version, if given. Not to its logged model: MLflow reads
            all points of its metrics with it.
        table: Rows of `TABLE`; empty: it is not written.

    Raises:
        MlflowException: The registry or the tracking server rejects it.
        Exception: Of the artifact store.
    """
    from mlflow import MlflowClient

    assert version.name is not None and version.version is not None
    client = MlflowClient()
    found = client.get_model_version(version.name, version.version)
    for key, value in tags.items():
        if found.tags.get(key) != value:
            client.set_model_version_tag(version.name, version.version, key, value)
    for key in found.tags.keys() - tags.keys():
        if key.startswith(PREFIX):
            client.delete_model_version_tag(version.name, version.version, key)
    if found.run_id:
        if metrics:
            _log_metrics(client, found, metrics)
        if table:
            document = {"columns": ["answered", "sent", "rows"], "data": [*map(list, table)]}
            client.log_dict(found.run_id, document, TABLE)


def served_versions(client: MlflowClient, name: str) -> tuple[ModelVersion, ...]:
    """Versions of a registered model that were served, newest first.

    Raises:
        MlflowException: The registry does not answer.
    """
    quote = '"' if "'" in name else "'"
    found = client.search_model_versions(f"name = {quote}{name}{quote}")
    served = [each for each in found if PREFIX + "requests" in each.tags]
    return tuple(sorted(served, key=lambda each: -int(each.version)))


def promised_and_served(versions: Iterable[ModelVersion]) -> list[list[str]]:
    """Two rows, promised and served, for each version that was served; see `COLUMNS`."""
    rows = []
    for each in versions:
        promised = [_short(each.tags.get(name, "")) for name in ("accuracy", "latency_p50_ms")]
        served = [_short(each.tags.get(PREFIX + name, "")) for name in _SERVED]
        rows.append([str(each.version), "promised", *promised, *["-"] * (len(_SERVED) - 1)])
        rows.append(["", "served", _accuracy(each.tags), *served])
    return rows


def served_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """What a version served, by name without `PREFIX`."""
    return {
        key.removeprefix(PREFIX): value for key, value in tags.items() if key.startswith(PREFIX)
    }


def without_served(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags for a copy of a version, which has not served yet."""
    return {
        key: value
        for key, value in tags.items()
        if not key.startswith(PREFIX) and key != SERVED_TAG
    }


def _log_metrics(client: MlflowClient, found: ModelVersion, metrics: Mapping[str, float]) -> None:
    """Log a point; its step is the seconds since the version was registered, also after restarts.

    MLflow draws points of one step as a bar.
    """
    import time

    from mlflow.entities import Metric

    at = round(time.time() * 1000)
    step = (at - (found.creation_timestamp or at)) // 1000
    points = [Metric(f"served_{name}", value, at, step) for name, value in metrics.items()]
    client.log_batch(str(found.run_id), points)


def _accuracy(tags: Mapping[str, str]) -> str:
    bounds = [tags.get(PREFIX + name, "") for name in ("accuracy", "accuracy_low", "accuracy_high")]
    return "{} [{}, {}]".format(*bounds) if all(bounds) else "-"


def _short(value: str) -> str:
    if not value or value.isdecimal():
        return value or "-"
    try:
        return f"{float(value):.4g}"
    except ValueError:  # written by hand
        return value
