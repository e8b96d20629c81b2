"""Compare two models: on the answers stored at measurement, or measured anew, interleaved."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.data import load_data
from mlflow_pt_deploy.data.splits import align
from mlflow_pt_deploy.errors import ModelError, PolicyError, TrackingError
from mlflow_pt_deploy.evaluation import Result, measure
from mlflow_pt_deploy.evaluation.statistics import mcnemar_p, paired_drop
from mlflow_pt_deploy.pipeline.stored_results import read_measured
from mlflow_pt_deploy.registry.addresses import ResolvedVersion, resolve, version_tags
from mlflow_pt_deploy.registry.fetch import fetch
from mlflow_pt_deploy.registry.mlmodel import FOLDER
from mlflow_pt_deploy.selection.challenge import Measured
from mlflow_pt_deploy.selection.explanation import device_title
from mlflow_pt_deploy.system.device import CPU

_METRICS = (
    ("accuracy", "validation", "validation accuracy"),
    ("accuracy", "test", "test accuracy"),
    ("latency_p50_ms", "", "p50 ms"),
    ("latency_p95_ms", "", "p95 ms"),
    ("throughput_rows_per_s", "", "rows/s"),
    ("artifact_mb", "", "MB"),
    ("peak_rss_mb", "", "RSS MB"),
    ("device_ms", "", "device ms"),
    ("peak_device_mb", "", "GPU MB"),
)
_GPU_METRICS = ("device_ms", "peak_device_mb")


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Attributes:
        names: The two versions.
        rows: Title and both values of each metric.
        findings: Sentences: paired difference of the accuracy, agreement, speed.
    """

    names: tuple[str, str]
    rows: tuple[tuple[str, float | None, float | None], ...]
    findings: tuple[str, ...]

    def table(self) -> str:
        """Format as aligned plain text."""
        lines = [("", *self.names)]
        for title, *values in self.rows:
            first, second = ("-" if value is None else f"{value:.5g}" for value in values)
            lines.append((title, first, second))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            f"{title:<{widths[0]}}  {first:>{widths[1]}}  {second:>{widths[2]}}"
            for title, first, second in lines
        ]
        return "\n".join([*text, "", *self.findings])


def compare_models(first: str, second: str, data: str = "", *, seconds: float = 8.0) -> Comparison:
    """Compare two promoted versions.

    Args:
        first, second: ``NAME@champion``, ``NAME/3`` or ``models:/...``.
        data: See ``--data``; empty: the stored answers of the validation and test rows are
            compared. With data, both are measured anew on this machine, interleaved.
        seconds: Timing budget of each model.

    Raises:
        TrackingError: A version does not exist.
        ModelError: A version has no stored measurements.
        PolicyError: The stored measurements are of other rows.
        DataError: The data cannot be read, or has other labels.
    """
    versions = [_resolve(uri) for uri in (first, second)]
    names = tuple(_short(version) for version in versions)
    if data:
        results = _measure(versions, data, seconds)
        same_machine = True
    else:
        stored = [_stored(version) for version in versions]
        results = [each.result for each in stored]
        conditions = [each.conditions for each in stored]
        if conditions[0].get("validation") != conditions[1].get("validation"):
            raise PolicyError(
                f"{names[0]} and {names[1]} were measured on other validation rows, so their "
                "answers cannot be compared. Measure both anew: --data"
            )
        same_machine = conditions[0].get("hardware") == conditions[1].get("hardware") and (
            CPU in (each.device for each in results)
            or conditions[0].get("gpu") == conditions[1].get("gpu")
        )
    rows = tuple(
        (title, *(result.value(metric, dataset) for result in results))
        for metric, dataset, title in _METRICS
        if metric not in _GPU_METRICS or any(result.value(metric) for result in results)
    )
    return Comparison(
        (names[0], names[1]),
        rows,  # type: ignore[arg-type]  # two results give two values
        (
            *_devices(results, names),
            *_quality(results, names),
            *_speed(results, names, bool(data), same_machine),
        ),
    )


def _resolve(uri: str) -> ResolvedVersion:
    address = uri if ":" in uri else f"models:/{uri}"
    try:
        return resolve(address)
    except MlflowException as error:
        raise TrackingError(
            f"{address} cannot be found: {error.message} Give NAME@ALIAS or NAME/VERSION."
        ) from error


def _short(version: ResolvedVersion) -> str:
    return f"{version.name}/{version.version}" if version.name else version.uri


def _stored(version: ResolvedVersion) -> Measured:
    """Measurements of a version, from the run that its tags name."""
    return read_measured(_short(version), version_tags(version), "Measure both anew: --data")


def _measure(versions: list[ResolvedVersion], data: str, seconds: float) -> list[Result]:
    """Measure both on this machine; the first one is the baseline."""
    with tempfile.TemporaryDirectory(prefix="pt-deploy-compare-") as temporary:
        folders = {}
        for place, version in zip(("first", "second"), versions, strict=True):
            target = Path(temporary, place)
            target.mkdir()
            folders[place] = fetch(version, target).root / FOLDER
        splits = load_data(data, on_note=print)
        splits = align(splits, _labels(folders["first"]))
        results = measure(folders, baseline="first", splits=splits, seconds=seconds)
    for version, result in zip(versions, results, strict=True):
        if result.reason:
            raise ModelError(f"{_short(version)} cannot be measured: {result.reason}")
    return results


def _labels(folder: Path) -> tuple[str, ...]:
    from mlflow_pt_deploy.artifacts.manifest import LABELS
    from mlflow_pt_deploy.system.regular_files import read_json

    return tuple(read_json(folder / LABELS))


def _devices(results: list[Result], names: tuple[str, ...]) -> list[str]:
    if all(each.device == CPU for each in results):
        return []
    first, second = (device_title(each.device) for each in results)
    return [f"{names[0]} runs on {first}, {names[1]} on {second}."]


def _quality(results: list[Result], names: tuple[str, ...]) -> list[str]:
    sentences = []
    for dataset in ("validation", "test"):
        samples = [found.samples for r in results if (found := r.get("accuracy", dataset))]
        if len(samples) != 2 or not samples[0] or len(samples[0]) != len(samples[1]):
            continue
        first, second = (np.asarray(each) > 0 for each in samples)
        drop = paired_drop(first, second)
        sentences.append(
            f"{dataset}: {names[1]} is {0 - 100 * drop.value:+.2f} points "
            f"[{-100 * drop.high:+.2f}, {-100 * drop.low:+.2f}] more accurate than {names[0]} "
            f"({len(first)} rows, McNemar p {mcnemar_p(first, second):.2g})."
        )
        labels = [np.asarray(each.predicted.get(dataset, ())) for each in results]
        if len(labels[0]) == len(labels[1]) > 0:
            equal = float(np.mean(labels[0] == labels[1]))
            sentences.append(f"{dataset}: both give the same label to {equal:.2%} of the rows.")
    return sentences


def _speed(
    results: list[Result], names: tuple[str, ...], anew: bool, same_machine: bool
) -> list[str]:
    speedup = results[1].get("speedup")
    if anew and speedup is not None and speedup.low is not None and speedup.high is not None:
        return [
            f"{names[1]} is {speedup.value:.3g}x as fast as {names[0]} for single rows, measured "
            f"interleaved (95 % interval {speedup.low:.3g} to {speedup.high:.3g})."
        ]
    if not same_machine:
        return ["The timings are of different machines: do not compare them; measure with --data."]
    return ["The timings were not interleaved: small differences are noise; --data measures anew."]
