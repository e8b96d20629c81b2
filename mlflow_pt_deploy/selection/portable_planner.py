"""Select the variants of a portable one: the best on the CPU and the best on a GPU of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mlflow_pt_deploy.evaluation.result import Result
from mlflow_pt_deploy.runtimes.catalog import RUNTIMES
from mlflow_pt_deploy.selection.choice import finalists
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.system.device import CPU, CUDA, kind_of


def plan_portable(results: Sequence[Result], policy: Policy) -> tuple[str, str] | None:
    """Return the names of the variant for the CPU and of that for a GPU, or None.

    Both meet the limits, since either may serve. The GPU decides the model: its best variant of
    which there is one for the CPU, too.

    Args:
        results: From `measure`.
        policy: Limits and objective. Its runtimes are those that may be promoted, which the two
            need not be.
    """
    single = {each.variant: each for each in results if not _is_combined(each)}
    ranked = [
        single[name]
        for name in finalists([*single.values()], replace(policy, runtimes=()), count=len(single))
    ]
    for cuda in ranked:
        for cpu in ranked:
            devices = kind_of(cpu.device), kind_of(cuda.device)
            if devices == (CPU, CUDA) and cpu.model == cuda.model:
                return cpu.variant, cuda.variant
    return None


def _is_combined(result: Result) -> bool:
    kind = RUNTIMES.get(result.runtime)
    return kind is not None and bool(kind.stages)
