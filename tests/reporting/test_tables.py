"""Tables, Markdown and the plot of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny.optimized import VARIANTS, made_result

from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.reporting.tables import markdown, plot, table
from mlflow_pt_deploy.selection.choice import Choice

BASELINE = "teacher-eager-fp32"


def result(variant: str, p50: float, speedup: float, accuracy: float) -> Result:
    model, runtime, precision = variant.split("-", 2)
    measurements = [
        Measurement("latency_p50_ms", p50, "ms"),
        Measurement("latency_p95_ms", 1.5 * p50, "ms"),
        Measurement("throughput_rows_per_s", 12345.6, "rows/s"),
        Measurement("speedup", speedup, "x", low=0.9 * speedup, high=1.1 * speedup),
        Measurement("artifact_mb", 90.9, "MB"),
        Measurement("peak_rss_mb", 512.3, "MB"),
    ]
    for dataset in ("validation", "test"):
        drop = 0.9 - accuracy
        measurements += [
            Measurement("accuracy", accuracy, "fraction", dataset),
            Measurement("accuracy_drop", drop, "fraction", dataset, drop - 0.01, drop + 0.01),
            Measurement("agreement", 0.95, "fraction", dataset),
        ]
        accuracy += 0.05
    return Result(
        variant, model, runtime, precision, "cpu", 2, None, "", tuple(measurements), BASELINE
    )


TEACHER = result(BASELINE, 14.6, 1.0, 0.85)
STUDENT = result("student-onnxruntime-int8-dynamic", 0.123, 118.7, 0.845)
BROKEN = Result(
    "teacher-openvino-bf16", "teacher", "openvino", "bf16", "cpu", 2, None, "no such file " * 100
)
CHOICE = Choice(STUDENT.variant, "It is by far the fastest.", ())
ALL = [BROKEN, TEACHER, STUDENT]


def test_the_table_shows_the_fastest_first_and_marks_the_chosen() -> None:
    lines = table(ALL, CHOICE).splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["*", BASELINE]
    assert lines[2].split() == [
        "*",
        STUDENT.variant,
        "0.123",
        "0.184",
        "12,346",
        "119",
        "[107,",
        "131]",
        "90.9",
        "512",
        "0.8950",
        "+0.50",
        "[-0.50,",
        "+1.50]",
        "0.9500",
    ]
    assert lines[-1] == "It is by far the fastest."


def test_columns_are_aligned_and_fit_a_terminal() -> None:
    lines = table(ALL, CHOICE).splitlines()
    assert max(map(len, lines)) <= 140
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[0].split()[0] == "variant"


def test_failed_variants_come_last_with_a_shortened_reason() -> None:
    below = table(ALL).splitlines()[4:]
    assert below[0].startswith("! teacher-openvino-bf16: no such file no such file")
    assert below[-1].endswith("...")
    assert len(" ".join(below)) < 500


def test_zero_loss_has_no_negative_sign() -> None:
    drop = Measurement("accuracy_drop", -0.0, "fraction", "test", -0.00001, 0.01)
    assert "+0.00 [+0.00, +1.00]" in table([replace(TEACHER, measurements=(drop,))])


def test_missing_numbers_are_dashes() -> None:
    row = table([replace(TEACHER, measurements=())]).splitlines()[2]
    assert row.split() == [BASELINE, *"-" * 9]


def test_another_dataset_is_named_in_the_header() -> None:
    text = table([TEACHER], dataset="validation")
    assert "acc (validation)" in text
    assert "0.8500" in text


def test_an_empty_table() -> None:
    assert table([]).splitlines()[0].split()[0] == "variant"
    assert markdown([]).startswith("| variant |")


def test_markdown_is_a_github_table_with_the_chosen_in_bold() -> None:
    lines = markdown(ALL, CHOICE, notes=["Synthetic data."]).splitlines()
    assert lines[0] == CHOICE.reason
    assert {line.count("|") for line in lines[2:6]} == {11}
    assert lines[3] == "|---|" + "---:|" * 9
    assert lines[4].startswith(f"| **{STUDENT.variant}** | **0.123** |")
    assert lines[5].startswith(f"| {BASELINE} | 14.6 |")
    assert lines[7].startswith("- `teacher-openvino-bf16` is missing: no such file")
    assert lines[8] == "- Synthetic data."


def test_line_breaks_in_a_reason_are_removed() -> None:
    text = markdown([replace(BROKEN, reason="first\n| second | <b>")])
    assert text.splitlines()[-1] == "- `teacher-openvino-bf16` is missing: first | second | <b>"


def test_in_markdown_a_reason_is_not_shortened() -> None:
    text = markdown([replace(BROKEN, reason="no such file " * 100 + "at all")])
    assert (
        text.splitlines()[-1]
        == f"- `teacher-openvino-bf16` is missing: {'no such file ' * 100}at all"
    )


def test_remarks_are_below_the_results() -> None:
    noted = replace(TEACHER, notes=("is at chance level: it is correct for 33.0% of 90 rows",))
    remark = f"{BASELINE} is at chance level: it is correct for 33.0% of 90 rows."
    assert table([noted, STUDENT]).splitlines()[-1] == f"~ {remark}"
    assert markdown([noted, STUDENT]).splitlines()[-1] == f"- {remark}"


@pytest.mark.parametrize("results", [[TEACHER], []])
def test_the_plot_is_a_png_also_without_results(results: list[Result], tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    plot(results, path, CHOICE, retain=0.99)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000


def test_the_chosen_variant_has_a_ring(tmp_path: Path) -> None:
    from matplotlib.image import imread

    plot(ALL, tmp_path / "plot.png", CHOICE, retain=0.99)
    pixels = imread(tmp_path / "plot.png")
    assert (pixels[..., 1] > pixels[..., 0] + 0.3).sum() > 50  # only the ring is green


def test_labels_that_depend_on_the_batch_have_a_column() -> None:
    steady, flips = (made_result(name, made) for name, made in [*VARIANTS.items()][:2])
    assert "flips" not in table([steady, flips])
    found = tuple(
        replace(m, value=0.984) if m.name == "batch_invariance" else m for m in flips.measurements
    )
    lines = table([steady, replace(flips, measurements=found)]).splitlines()
    assert lines[0].endswith("flips")
    assert [line.split()[-1] for line in lines[2:4]] == ["1.6%", "0.0%"]


def on_gpu(variant: str, p50: float, speedup: float, **measured: float) -> Result:
    found = result(variant, p50, speedup, 0.845)
    units = {"device_ms": "ms", "peak_device_mb": "MB", "speedup_over_cpu": "x"}
    more = [Measurement(name, value, units[name]) for name, value in measured.items()]
    return replace(found, device="cuda", measurements=(*found.measurements, *more))


GPU = on_gpu(f"{BASELINE}-cuda", 2, 1.0, speedup_over_cpu=7.3, device_ms=1.5, peak_device_mb=700)


def test_the_device_is_a_column_where_some_variant_has_another() -> None:
    assert "device" not in table(ALL) and "GPU" not in markdown(ALL)
    header, _, *rows = table([TEACHER, GPU]).splitlines()
    assert header.split()[:2] == ["variant", "device"]
    assert "RSS MB  device ms  GPU MB" in header
    assert [row.split()[:2] for row in rows[:2]] == [[GPU.variant, "cuda"], [BASELINE, "cpu"]]
    assert "1.50     700" in rows[0]
    remark = " ".join(line.strip("~ ") for line in rows[2:])
    assert remark == (
        "A speedup is over the baseline on the same device (teacher-eager-fp32, "
        "teacher-eager-fp32-cuda); milliseconds compare devices; for single rows "
        "teacher-eager-fp32-cuda is 7.3x as fast as teacher-eager-fp32."
    )


def test_what_was_not_measured_on_a_gpu_is_no_column() -> None:
    bare = on_gpu("teacher-onnxruntime-fp32-cuda", 2, 1.2)
    header = table([TEACHER, bare]).splitlines()[0]
    assert "device ms" not in header and "GPU MB" not in header
    failed = replace(bare, reason="no memory", measurements=())
    assert "device" not in table([TEACHER, failed]).splitlines()[0]
    assert "! teacher-onnxruntime-fp32-cuda: no memory" in table([TEACHER, failed])


def test_the_plot_names_the_gpu(tmp_path: Path) -> None:
    plot([TEACHER, GPU], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
