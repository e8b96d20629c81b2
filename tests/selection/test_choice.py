"""Made results; the baseline has a validation accuracy of 0.900, so retain=0.99 means 0.891."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.selection.choice import choose, finalists, not_slower_than
from mlflow_pt_deploy.selection.policy import Policy

BASELINE = "teacher-eager-fp32"


def result(
    variant: str,
    *,
    p50: float,
    speedup: tuple[float, float, float],
    accuracy: float = 0.9,
    rows_per_s: float = 100.0,
    mb: float = 90.0,
    rss: float = 500.0,
    test: float = 0.9,
    kept_low: float | None = None,
) -> Result:
    model, runtime, precision = variant.split("-", 2)
    value, low, high = speedup
    measurements = (
        Measurement("latency_p50_ms", p50, "ms"),
        Measurement("latency_p95_ms", 2 * p50, "ms"),
        Measurement("throughput_rows_per_s", rows_per_s, "rows/s"),
        Measurement("speedup", value, "x", low=low, high=high),
        Measurement("artifact_mb", mb, "MB"),
        Measurement("peak_rss_mb", rss, "MB"),
        Measurement("accuracy", accuracy, "fraction", "validation"),
        Measurement("accuracy_drop", 0.9 - accuracy, "fraction", "validation"),
        Measurement(
            "accuracy_kept",
            accuracy / 0.9,
            "fraction",
            "validation",
            low=accuracy / 0.9 - 0.01 if kept_low is None else kept_low,
        ),
        Measurement("class_recall", accuracy - 0.2, "fraction", "validation"),
        Measurement("agreement_perturbed", accuracy - 0.1, "fraction"),
        Measurement("batch_invariance", 0.98, "fraction"),
        Measurement("accuracy", test, "fraction", "test"),
        Measurement("accuracy_drop", 0.9 - test, "fraction", "test"),
    )
    return Result(variant, model, runtime, precision, "cpu", 2, None, "", measurements, BASELINE)


TEACHER = result(BASELINE, p50=10, speedup=(1, 0.95, 1.05))
FUSED = result("teacher-openvino-fp32", p50=4, speedup=(2.5, 2.4, 2.6), rows_per_s=300, mb=91)
SMALL = result(
    "student-openvino-int8", p50=1, speedup=(10, 9, 11), accuracy=0.895, rows_per_s=900, mb=12
)
CRUDE = result(
    "student-numpy-fp32", p50=0.1, speedup=(100, 90, 110), accuracy=0.85, rows_per_s=9000, mb=5
)
BROKEN = Result(
    "teacher-tensorrt-fp16", "teacher", "tensorrt", "fp16", "cpu", 2, None, "not installed"
)
ALL = [TEACHER, BROKEN, FUSED, CRUDE, SMALL]


def test_the_fastest_within_the_limits_is_chosen_and_the_others_are_explained() -> None:
    choice = choose(ALL, Policy())
    assert choice.variant == SMALL.variant
    assert choice.reason == (
        "student-openvino-int8 takes 1 ms per row (median), the best among the variants within "
        "the limits. For single rows it is 10x as fast as teacher-eager-fp32 (95 % interval 9 to "
        "11). Its validation accuracy is 0.8950, that of the baseline 0.9000; the minimum is "
        "0.8910 (retain=0.99). With 95 % confidence it keeps at least 98.4% of the baseline's "
        "accuracy (retain_low=0.97)."
    )
    assert choice.runner_up == FUSED.variant
    assert choice.considered == (
        (TEACHER.variant, "kept: meets the limits, but another is better"),
        (BROKEN.variant, "failed: not installed"),
        (FUSED.variant, "kept: meets the limits, but another is better"),
        (CRUDE.variant, "excluded: validation accuracy 0.8500 is under 0.8910 (retain=0.99)"),
        (SMALL.variant, "chosen"),
    )


def test_the_test_set_does_not_influence_the_choice() -> None:
    def with_test_value(each: Result, value: float) -> Result:
        return replace(
            each,
            measurements=tuple(
                replace(m, value=value, low=value, high=value) if m.dataset == "test" else m
                for m in each.measurements
            ),
        )

    def without_test(each: Result) -> Result:
        return replace(
            each, measurements=tuple(m for m in each.measurements if m.dataset != "test")
        )

    for policy in (Policy(), Policy(objective="throughput"), Policy(retain=1, max_artifact_mb=1)):
        expected = choose(ALL, policy)
        changed = [with_test_value(each, at / 10) for at, each in enumerate(ALL)]
        assert choose(changed, policy) == expected
        assert choose([without_test(each) for each in ALL], policy) == expected


def test_retain_is_relative_and_includes_its_limit() -> None:
    exact = result("student-eager-fp32", p50=1, speedup=(10, 9, 11), accuracy=0.891)
    assert choose([TEACHER, exact], Policy()).variant == exact.variant
    below = result("student-eager-fp32", p50=1, speedup=(10, 9, 11), accuracy=0.8905)
    assert choose([TEACHER, below], Policy()).variant == TEACHER.variant
    assert choose(ALL, Policy(retain=0)).variant == CRUDE.variant


@pytest.mark.parametrize(
    ("policy", "excluded"),
    [
        (Policy(max_latency_p95_ms=1.9), "p95 latency 2 ms is over 1.9 ms (max_latency_p95_ms)"),
        (Policy(max_artifact_mb=11), "artifact size 12 MB is over 11 MB (max_artifact_mb)"),
        (Policy(max_peak_rss_mb=400), "peak memory 500 MB is over 400 MB (max_peak_rss_mb)"),
        (
            Policy(min_throughput_rows_per_s=901),
            "throughput 900 rows/s is under 901 rows/s (min_throughput_rows_per_s)",
        ),
        (
            Policy(min_class_recall=0.7),
            "lowest recall of a class 0.695 is under 0.7 (min_class_recall)",
        ),
        (
            Policy(min_agreement_perturbed=0.8),
            "agreement on perturbed rows 0.795 is under 0.8 (min_agreement_perturbed)",
        ),
        (
            Policy(min_batch_invariance=1),
            "share of labels independent of the batch 0.98 is under 1 (min_batch_invariance)",
        ),
        (
            Policy(runtimes=("onnxruntime", "numpy")),
            "runtime openvino is not allowed (runtimes=onnxruntime,numpy)",
        ),
    ],
)
def test_each_limit_excludes_and_is_named(policy: Policy, excluded: str) -> None:
    choice = choose([SMALL], policy)
    assert choice.variant is None
    assert choice.considered == ((SMALL.variant, f"excluded: {excluded}"),)
    assert excluded in choice.reason


def test_a_tie_within_noise_goes_to_the_more_accurate() -> None:
    noisy = result("student-openvino-fp32", p50=1.1, speedup=(9.5, 8.8, 9.9), accuracy=0.899)
    choice = choose([TEACHER, SMALL, noisy], Policy())
    assert choice.variant == noisy.variant
    assert "No difference in latency beyond noise to student-openvino-int8" in choice.reason
    assert choice.considered[1] == (SMALL.variant, "kept: tied with the best, but not preferred")


def test_further_ties_go_to_the_smaller_and_then_by_name() -> None:
    same = {"p50": 1.0, "speedup": (10.0, 9.0, 11.0)}
    large, small = result("student-a-fp32", mb=9, **same), result("student-b-fp32", mb=8, **same)
    other = result("student-c-fp32", mb=8, **same)
    assert choose([large, other, small], Policy()).variant == "student-b-fp32"


def test_throughput_as_objective() -> None:
    wide = result("student-onnx-int8", p50=2, speedup=(5, 4, 6), accuracy=0.895, rows_per_s=2000)
    choice = choose([*ALL, wide], Policy(objective="throughput"))
    assert choice.variant == wide.variant
    assert choice.reason.startswith("student-onnx-int8 processes 2,000 rows/s, the best")


def test_the_reason_says_if_no_variant_is_faster() -> None:
    slower = result("teacher-torchscript-fp32", p50=11, speedup=(0.9, 0.85, 0.94))
    choice = choose([TEACHER, slower], Policy())
    assert choice.variant == BASELINE
    assert "It is the baseline itself." in choice.reason
    assert "has a better latency than the baseline beyond noise." in choice.reason


def test_faster_only_within_noise_is_not_faster() -> None:
    lucky = result("student-torchscript-fp32", p50=9.8, speedup=(1.02, 0.97, 1.06), accuracy=0.895)
    choice = choose([TEACHER, lucky], Policy())
    assert choice.variant == BASELINE  # tied, and more accurate
    assert "Nothing within the limits has a better latency" in choice.reason
    assert "Nothing within" in choose([lucky], Policy()).reason


def test_the_reason_says_if_no_variant_has_more_throughput() -> None:
    same = result("teacher-eager-bf16", p50=5, speedup=(2, 1.9, 2.1), rows_per_s=99)
    assert "Nothing within" in choose([TEACHER, same], Policy(objective="throughput")).reason


def test_without_a_choice_the_nearest_variants_are_named() -> None:
    choice = choose(ALL, Policy(retain=1, max_artifact_mb=80))
    assert choice.variant is None
    assert choice.reason == (
        "None of the 4 measured variants is within the limits. Nearest: "
        "student-openvino-int8: validation accuracy 0.8950 is under 0.9000 (retain=1); "
        "student-numpy-fp32: validation accuracy 0.8500 is under 0.9000 (retain=1); "
        "teacher-eager-fp32: artifact size 90 MB is over 80 MB (max_artifact_mb). "
        "Loosen a limit, or train a better student."
    )


@pytest.mark.parametrize("results", [[], [BROKEN]])
def test_without_a_measured_variant_there_is_no_choice(results: list[Result]) -> None:
    choice = choose(results, Policy())
    assert choice.variant is None
    assert choice.reason.startswith("No variant was measured successfully")


def test_a_variant_with_missing_measurements_is_skipped() -> None:
    dropped = ("latency_p50_ms", "accuracy_drop", "accuracy_kept")
    partial = replace(
        SMALL, measurements=tuple(m for m in SMALL.measurements if m.name not in dropped)
    )
    choice = choose([TEACHER, partial], Policy())
    assert choice.variant == BASELINE
    assert choice.considered[1] == (
        SMALL.variant,
        "not measured: latency_p50_ms, accuracy_drop, accuracy_kept",
    )


UNSURE = result("student-numpy-fp32", p50=0.5, speedup=(20, 18, 22), accuracy=0.897, kept_low=0.95)


def test_a_variant_must_keep_retain_low_with_confidence() -> None:
    decided = replace(UNSURE, predicted={"validation": (0,) * 200})
    choice = choose([TEACHER, decided, SMALL], Policy())
    assert choice.variant == SMALL.variant
    # 200 rows * ((0.99667 - 0.95) / (0.99667 - 0.97)) ** 2 = 612.5
    why = (
        "it keeps 99.7% of the baseline's validation accuracy, but with 95 % confidence only "
        "95.0%, under 97% (retain_low=0.97); about 620 validation rows would decide, there are 200"
    )
    assert choice.considered[1] == (UNSURE.variant, f"excluded: {why}")
    assert choice.reason.endswith(
        f"student-numpy-fp32 takes 0.5 ms per row (median) and is better, but {why}."
    )
    assert choose([TEACHER, decided, SMALL], Policy(retain_low=0)).variant == UNSURE.variant
    assert choose([TEACHER, decided, SMALL], Policy(retain_low=0.95)).variant == UNSURE.variant


def test_more_rows_do_not_help_a_variant_that_is_as_measured_too_low() -> None:
    low = result("student-a-b", p50=0.5, speedup=(20, 18, 22), accuracy=0.86, kept_low=0.9)
    low = replace(low, predicted={"validation": (0,) * 200})
    (_, why), *_ = choose([low], Policy(retain=0.9555, retain_low=0.9555)).considered
    assert why.endswith("; more validation rows would not help")


def test_the_baseline_always_keeps_its_own_accuracy() -> None:
    few = result(BASELINE, p50=10, speedup=(1, 0.95, 1.05), kept_low=0.5)
    assert choose([few], Policy()).variant == BASELINE
    assert choose([few], Policy(max_artifact_mb=1)).variant is None


def test_size_and_cost_as_objectives() -> None:
    choice = choose(ALL, Policy(objective="size"))
    assert choice.variant == SMALL.variant
    assert choice.reason.startswith("student-openvino-int8 takes 12 MB, the best")
    paid = Policy(objective="cost", price_per_core_hour=0.09)
    # 2 threads * 1e6 / 900 rows/s = 2222 core seconds; a third of that for the baseline's rate
    assert choose(ALL, paid).reason.startswith(
        "student-openvino-int8 costs 0.0556 per million rows"
    )
    one = replace(FUSED, threads=1)
    slower = replace(SMALL, threads=8)
    assert choose([TEACHER, one, slower], paid).variant == one.variant


def test_finalists_are_within_the_limits_best_first() -> None:
    assert finalists(ALL, Policy()) == [SMALL.variant, FUSED.variant]
    assert len(finalists(ALL, Policy(), count=9)) == 3
    assert finalists(ALL, Policy(), count=1) == [SMALL.variant]
    assert finalists([BROKEN], Policy()) == []


def test_not_slower_beyond_noise() -> None:
    def like_small(speedup: float, rows_per_s: float) -> Result:
        return result(
            SMALL.variant, p50=1, speedup=(speedup, speedup, speedup), rows_per_s=rows_per_s
        )

    assert not_slower_than(like_small(9.0, 900), SMALL)  # within the interval
    assert not not_slower_than(like_small(8.9, 900), SMALL)
    assert not not_slower_than(
        like_small(20, 899), SMALL
    )  # faster for single rows, slower in batches
    assert not not_slower_than(BROKEN, SMALL)


def test_the_reason_names_threads_and_batch_size() -> None:
    best = Measurement("best_batch_rows", 32, "rows")
    alone = replace(SMALL, threads=1, measurements=(*SMALL.measurements, best))
    reason = choose([TEACHER, alone], Policy()).reason
    assert "It performs best with one thread and batches of 32 rows." in reason


AT_CHANCE = "is at chance level: it is correct for 33.0% of 90 validation rows"


def test_notes_of_the_chosen_variant_come_first() -> None:
    noted = replace(SMALL, notes=(AT_CHANCE,))
    choice = choose([TEACHER, FUSED, noted], Policy())
    assert choice.variant == SMALL.variant
    assert choice.reason.startswith(f"Warning: {SMALL.variant} {AT_CHANCE}. {SMALL.variant} takes")


def test_notes_of_the_baseline_are_included() -> None:
    noted = replace(TEACHER, notes=(AT_CHANCE,))
    assert choose([noted, SMALL], Policy()).reason.startswith(f"Warning: {BASELINE} {AT_CHANCE}. ")
    assert choose([noted], Policy()).reason.count("chance level") == 1
    assert (
        "Warning"
        not in choose([TEACHER, replace(FUSED, notes=(AT_CHANCE,)), SMALL], Policy()).reason
    )
