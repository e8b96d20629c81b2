"""How often does the chosen variant keep what the policy promises?

    python benchmarks/promise.py results.json [MORE.json ...] [--cuts 1000] [--sizes 100,200,400]

Takes the `results.json` of finished optimize stages (an artifact of their runs). Validation and
test rows are put together and cut anew many times: the policy chooses on the validation rows of a
cut, and the other rows, which chose nothing, tell whether the chosen variant keeps `retain_low` of
the baseline's accuracy. Cascades are planned anew in each cut. Beside the policy stands one that
looks at the measured accuracy only (`retain_low` 0).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.evaluation.result import Measurement, Result, find_result
from mlflow_pt_deploy.evaluation.statistics import paired_drop, paired_ratio, proportion
from mlflow_pt_deploy.selection.cascade_planner import CascadePlan, plan_cascades
from mlflow_pt_deploy.selection.choice import choose
from mlflow_pt_deploy.selection.policy import Policy

_SIZES = (100, 200, 400, 800, 1600)
_MIN_HELD_OUT = 100

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stored:
    """A variant with its answers to all rows, validation first.

    Attributes:
        result: Measurements that do not depend on the cut: speedup, sizes.
        correct: bool (rows,).
        confidence: float64 (rows,).
    """

    result: Result
    correct: Bools
    confidence: Floats


@dataclass(frozen=True)
class Outcome:
    """What a policy chose in one cut.

    Attributes:
        kept: Accuracy of the chosen variant on the held-out rows, as a share of the baseline's.
        speedup: Its speedup.
        is_baseline: Whether the baseline was chosen.
    """

    kept: float
    speedup: float
    is_baseline: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per file, validation size and policy."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--cuts", type=int, default=1000)
    parser.add_argument("--sizes", default=",".join(map(str, _SIZES)))
    parser.add_argument("--retain", type=float, default=0.99)
    parser.add_argument("--retain-low", type=float, default=0.97)
    parsed = parser.parse_args(arguments)
    policies = {
        "retain and retain_low": Policy(retain=parsed.retain, retain_low=parsed.retain_low),
        "retain alone": Policy(retain=parsed.retain, retain_low=0.0),
    }
    print("| results | validation rows | policy | kept | 95 % interval | speedup | baseline |")
    print("|---|--:|---|--:|---|--:|--:|")
    for path in parsed.files:
        variants, name = read(path)
        rows = len(variants[0].correct)
        for size in map(int, parsed.sizes.split(",")):
            if rows - size < _MIN_HELD_OUT:
                continue
            for title, policy in policies.items():
                found = list(simulate(variants, policy, size, parsed.cuts))
                held = sum(each.kept >= parsed.retain_low for each in found)
                share, low, high = proportion(held, len(found))
                speedup = float(np.median([each.speedup for each in found]))
                baseline = sum(each.is_baseline for each in found) / len(found)
                print(
                    f"| {name} | {size} | {title} | {share:.1%} | {low:.1%} to {high:.1%} | "
                    f"{speedup:.3g}x | {baseline:.0%} |",
                    flush=True,
                )
    return 0


def read(path: Path) -> tuple[list[Stored], str]:
    """Variants of a results.json without cascades, the baseline among them, and the data's name."""
    document = json.loads(path.read_text(encoding="utf8"))
    found = [Result.from_json(each) for each in document["results"]]
    stored = [
        Stored(each, _samples(each, "accuracy") > 0, _samples(each, "confidence"))
        for each in found
        if not each.reason and each.runtime != "cascade"
    ]
    name = document.get("conditions", {}).get("data", path.stem).partition(",")[0]
    return stored, name


def simulate(variants: Sequence[Stored], policy: Policy, size: int, cuts: int) -> Iterator[Outcome]:
    """Split the rows `cuts` times; choose on `size` rows and evaluate on the rest."""
    rows = len(variants[0].correct)
    baseline = next(each for each in variants if each.result.variant == each.result.baseline)
    by_name = {each.result.variant: each for each in variants}
    for seed in range(cuts):
        order = np.random.default_rng(seed).permutation(rows)
        inside, held_out = order[:size], order[size:]
        results = [_with_confidence(each, baseline, inside) for each in variants]
        plans = {
            f"cascade-{plan.fast}-{plan.strong}": plan for plan in plan_cascades(results, policy)
        }
        cascades = [
            _cascade(name, plan, results, baseline.correct[inside]) for name, plan in plans.items()
        ]
        choice = choose([*results, *cascades], policy)
        assert choice.variant is not None
        if choice.variant in plans:
            plan = plans[choice.variant]
            correct, speedup = _answers(plan, by_name), 1 / plan.cost
        else:
            correct = by_name[choice.variant].correct
            speedup = by_name[choice.variant].result.value("speedup") or 1.0
        kept = correct[held_out].mean() / baseline.correct[held_out].mean()
        yield Outcome(float(kept), speedup, choice.variant == baseline.result.variant)


def _measured(result: Result, correct: Bools, reference: Bools) -> Result:
    """The result with the validation measurements of these rows."""
    drop = paired_drop(reference, correct)
    kept, low = paired_ratio(reference, correct)
    accuracy = float(correct.mean())
    samples = tuple(correct.astype(float).tolist())
    fresh = (
        Measurement("accuracy", accuracy, "fraction", "validation", samples=samples),
        Measurement("accuracy_drop", drop.value, "fraction", "validation", drop.low, drop.high),
        Measurement("accuracy_kept", kept, "fraction", "validation", low),
    )
    others = tuple(each for each in result.measurements if not each.dataset)
    return replace(result, measurements=(*others, *fresh), predicted={})


def _with_confidence(stored: Stored, baseline: Stored, inside: npt.NDArray[np.int64]) -> Result:
    result = _measured(stored.result, stored.correct[inside], baseline.correct[inside])
    samples = tuple(stored.confidence[inside].tolist())
    confidence = Measurement("confidence", 0.0, "fraction", "validation", samples=samples)
    return replace(result, measurements=(*result.measurements, confidence))


def _cascade(name: str, plan: CascadePlan, results: Sequence[Result], reference: Bools) -> Result:
    """The cascade as `optimize` would measure it: cross-fitted, at the planned cost."""
    fast = find_result(results, plan.fast)
    assert fast is not None
    measured = _measured(fast, np.array(plan.correct) > 0, reference)
    speedup = Measurement("speedup", 1 / plan.cost, "x", low=1 / plan.cost, high=1 / plan.cost)
    others = tuple(each for each in measured.measurements if each.name != "speedup")
    return replace(measured, variant=name, runtime="cascade", measurements=(*others, speedup))


def _answers(plan: CascadePlan, by_name: dict[str, Stored]) -> Bools:
    fast, strong = by_name[plan.fast], by_name[plan.strong]
    return np.where(fast.confidence < plan.threshold, strong.correct, fast.correct)


def _samples(result: Result, name: str) -> Floats:
    parts = [result.get(name, dataset) for dataset in ("validation", "test")]
    values = [value for part in parts if part is not None for value in part.samples]
    return np.asarray(values, dtype=np.float64)


if __name__ == "__main__":
    sys.exit(main())
