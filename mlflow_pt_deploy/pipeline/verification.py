"""Compare a model on this machine with what was logged: labels, logits and latency."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mlflow_pt_deploy.artifacts.golden import GoldenComparison, compare_golden_rows
from mlflow_pt_deploy.artifacts.loading import load_variant
from mlflow_pt_deploy.errors import PtDeployError
from mlflow_pt_deploy.evaluation import Worker
from mlflow_pt_deploy.evaluation.timing import warm_up
from mlflow_pt_deploy.registry.addresses import explain_load_error, resolve
from mlflow_pt_deploy.registry.fetch import fetch
from mlflow_pt_deploy.registry.mlmodel import FOLDER
from mlflow_pt_deploy.system.device import CPU
from mlflow_pt_deploy.system.hardware import usable_cores

Status = Literal["pass", "degraded", "wrong"]

SLOWDOWN = 1.5
"""Ratio of this machine's latency to the logged one from which a model counts as degraded."""

_PASSES = 20


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify_model`.

    Attributes:
        uri: The verified version.
        status: ``pass``; ``degraded``: slower than logged, or single labels differ by rounding;
            ``wrong``: other logits than at export, or it cannot be loaded.
        findings: Sentences with both numbers.
        slowdown: Latency here divided by the logged one, if both are known.
        changed_labels: Golden rows with another label.
    """

    uri: str
    status: Status
    findings: tuple[str, ...]
    slowdown: float | None = None
    changed_labels: int = 0


def verify_model(uri: str, *, latency: bool = False) -> Verification:
    """Fetch a model, check its digests, and compute its golden rows on this machine.

    Args:
        uri: ``models:/NAME@champion``, ``models:/NAME/3``, ``runs:/...`` or a folder.
        latency: Time single rows too, in a fresh process. Nothing else should run meanwhile.

    Raises:
        TrackingError: The model cannot be found.
    """
    with tempfile.TemporaryDirectory(prefix="pt-deploy-verify-") as temporary:
        try:
            resolved = resolve(uri)
            fetched = fetch(resolved, Path(temporary))
            folder = fetched.root / FOLDER
            allow_code = bool(fetched.options(None)["allow_code"])
            loaded = load_variant(folder, allow_code=allow_code, check_golden=False)
            compared = compare_golden_rows(loaded, folder)
        except PtDeployError as error:
            return Verification(uri, "wrong", (str(error),))
        except Exception as error:  # artifact stores have no common base class for errors
            raise explain_load_error(error) from error
        findings = [_describe(compared, loaded.device)]
        if not compared.equal:
            return Verification(resolved.uri, "wrong", tuple(findings), None, compared.changed)
        slowdown = None
        if latency:
            threads = int(fetched.mlmodel.config.get("num_threads") or 0) or usable_cores()
            here_ms = _latency_ms(folder, compared, threads, loaded.device)
            slowdown, sentence = _compare_latency(here_ms, _logged_ms(fetched.tags, uri))
            findings.append(sentence)
    degraded = compared.changed or (slowdown is not None and slowdown > SLOWDOWN)
    status: Status = "degraded" if degraded else "pass"
    return Verification(resolved.uri, status, tuple(findings), slowdown, compared.changed)


def _describe(compared: GoldenComparison, device: str) -> str:
    where = "" if device == CPU else f" on {device}"
    return (
        f"{compared.changed} of {len(compared.rows)} golden rows get another label{where} than at "
        "export; "
        f"the logits differ by {compared.difference:.2g}, {compared.allowed:.2g} is allowed."
    )


def _latency_ms(folder: Path, compared: GoldenComparison, threads: int, device: str) -> float:
    """Median latency of a row in a fresh process, in milliseconds."""
    indices = list(range(len(compared.rows)))
    with Worker(folder, compared.rows[0], threads=threads, device=device) as worker:
        worker.load_rows(compared.rows)
        warm_up(worker, indices)
        return float(np.median(worker.time(indices, _PASSES))) / 1e6


def _logged_ms(tags: Mapping[str, str], uri: str) -> float | None:
    """The logged median latency: of the version's tags, or of the logged model."""
    with suppress(KeyError, ValueError):
        return float(tags["latency_p50_ms"])
    if not uri.startswith("models:/m-"):
        return None
    import mlflow

    metrics = mlflow.get_logged_model(uri.removeprefix("models:/")).metrics or []
    return next((each.value for each in metrics if each.key == "latency_p50_ms"), None)


def _compare_latency(here_ms: float, logged_ms: float | None) -> tuple[float | None, str]:
    if logged_ms is None:
        return None, f"A row takes {here_ms:.3g} ms here (median); no latency was logged."
    ratio = here_ms / logged_ms
    return ratio, (
        f"A row takes {here_ms:.3g} ms here (median of the golden rows) and took {logged_ms:.3g} "
        f"ms where it was logged (of the validation rows): {ratio:.2g}x."
    )
