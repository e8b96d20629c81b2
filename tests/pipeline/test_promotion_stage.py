"""Promote, compare, report: from a finished run to the registry and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from tiny.optimized import BASELINE, CONDITIONS, VARIANTS, Made, optimized_run

from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.errors import PolicyError
from mlflow_pt_deploy.pipeline.promotion_stage import (
    check_champion,
    promote_choice,
    read_optimized,
)
from mlflow_pt_deploy.pipeline.report_stage import report_html
from mlflow_pt_deploy.registry.aliases import placement
from mlflow_pt_deploy.registry.history import read_history
from mlflow_pt_deploy.selection.policy import Policy

FASTER = {**VARIANTS, "student-openvino-int8": Made(359, 358, 20.0)}


def command(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> tuple[str, dict]:
    """Run a command with --json; returns what it printed, and the document if it succeeded."""
    capsys.readouterr()
    assert main([*words, "--json"]) == status
    shown = capsys.readouterr()
    lines = shown.out.strip().splitlines()
    document = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return shown.out + shown.err, document


def aliases(name: str = "shop") -> dict[str, str | None]:
    return placement(MlflowClient().get_registered_model(name))


def test_a_promotion_registers_three_and_says_everything(
    tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = optimized_run()
    _, document = command(capsys, "promote", "--run", run_id, "--name", "shop")
    assert document["choice"] == "student-openvino-int8"
    assert "static-numpy-fp32" not in json.dumps(aliases())
    client = MlflowClient()
    version = client.get_model_version("shop", document["version"])
    for part in (
        "student-openvino-int8 takes 1 ms per row",
        "With 95 % confidence it keeps at least",
        "On the test rows, which decided nothing",
        "the promise is kept",
        "| hardware | a cpu, 2 cores |",
        "| data | tiny, 400 validation",
    ):
        assert part in version.description, part
    tags = version.tags
    assert tags["pt_deploy.policy"] == Policy().digest
    assert tags["pt_deploy.dataset"] == "1a2b3c4d"
    assert tags["pt_deploy.run"] == run_id
    assert tags["pt_deploy.role"] == "champion"
    assert tags["accuracy"] == "0.8975"
    assert {"pt_deploy.promoted_by", "pt_deploy.promoted_at", "pt_deploy.libraries"} <= set(tags)
    roles = {
        v.tags["pt_deploy.variant"]: v.tags["pt_deploy.role"]
        for v in client.search_model_versions()
    }
    # the runner-up is the baseline itself
    assert roles == {"student-openvino-int8": "champion", BASELINE: "challenger"}
    assert aliases() == {"previous": None, "champion": "1", "challenger": "2"}
    assert tags["pt_deploy.baseline"] == "2" and tags["pt_deploy.agreement"] == "0.95"


def test_a_dry_run_lists_every_variant_and_changes_nothing(
    tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = optimized_run()
    shown, document = command(capsys, "promote", "--run", run_id, "--name", "shop", "--dry-run")
    assert "static-numpy-fp32" in shown and "excluded: validation accuracy 0.8000 is under" in shown
    assert document["considered"]["student-openvino-int8"] == "chosen"
    limits = ("--max-artifact-mb", "1")
    _, document = command(capsys, "promote", "--run", run_id, "--dry-run", *limits, status=3)
    assert document["choice"] is None
    assert MlflowClient().search_registered_models() == []


def test_without_a_candidate_the_status_is_3(
    tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = optimized_run()
    words = ("promote", "--run", run_id, "--name", "shop", "--max-latency-p95-ms", "0.01")
    shown, _ = command(capsys, *words, status=3)
    assert "nothing is promoted. None of the 3 measured variants is within the limits" in shown
    assert MlflowClient().search_registered_models() == []


def test_a_policy_file_instead_of_flags(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = optimized_run()
    path = tmp_path / "policy.yaml"
    path.write_text("retain: 0.5\nretain_low: 0.5\nruntimes: [numpy, eager]\n")
    words = ("promote", "--run", run_id, "--name", "shop", "--policy", str(path))
    _, document = command(capsys, *words)
    assert document["choice"] == "static-numpy-fp32"
    shown, _ = command(capsys, *words, "--retain", "0.9", status=1)
    assert "--policy is given beside flags" in shown


def test_a_champion_is_replaced_only_by_a_better_one(
    tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = optimized_run()
    words = ("promote", "--name", "shop", "--run")
    command(capsys, *words, first)
    same = optimized_run()
    shown, _ = command(capsys, *words, same, status=3)
    assert "version 1 of shop stays the champion. student-openvino-int8 is version 3" in shown
    assert "its latency is not better beyond noise: 1 against 1 ms per row" in shown
    assert aliases() == {"previous": None, "champion": "1", "challenger": "3"}
    html = report_html(read_optimized(same), "shop", "version 1 stays")
    assert "was chosen; shop keeps its earlier champion" in html and "version 1 stays" in html
    better = optimized_run(FASTER)
    command(capsys, *words, better)
    assert (aliases()["champion"], aliases()["previous"]) == ("4", "1")
    version = MlflowClient().get_model_version_by_alias("shop", "champion")
    assert "Compared with version 1, the champion: its latency is better" in version.description
    command(capsys, *words, first, status=3)
    command(capsys, *words, first, "--replace")
    events = read_history("shop").events
    assert [event.action for event in events] == ["promote"] * 3
    assert events[-1].after == "1"


def test_the_same_champion_again_changes_nothing_but_the_description(tracking: str) -> None:
    done = read_optimized(optimized_run())
    assert promote_choice(done, "shop").previous is None
    again = promote_choice(done, "shop")
    assert (again.version, again.previous) == (aliases()["champion"], None)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"validation": "other"}, "other validation rows"),
        ({"hardware": "an H200"}, "other hardware"),
    ],
)
def test_other_rows_or_hardware_are_refused_with_the_cure(
    tracking: str, capsys: pytest.CaptureFixture[str], conditions: dict, message: str
) -> None:
    words = ("promote", "--name", "shop", "--run")
    command(capsys, *words, optimized_run(conditions={**CONDITIONS, **conditions}))
    shown, _ = command(capsys, *words, optimized_run(FASTER), status=1)
    assert message in shown and "--replace" in shown
    command(capsys, *words, optimized_run(FASTER), "--replace", "yes")


def test_a_champion_of_other_data_is_reported_before_training(
    tracking: str, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(capsys, "promote", "--run", optimized_run(), "--name", "shop")
    words = ("run", "--data", str(tiny_data), "--name", "shop", "--teacher", "nowhere")
    shown, _ = command(capsys, *words, status=1)
    assert "shop has a champion that was measured on other data" in shown
    assert "Nothing was trained" in shown
    shown, _ = command(capsys, *words, "--replace", status=1)
    assert "nowhere" in shown


def test_a_champion_registered_by_hand_needs_replace(
    tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = optimized_run()
    uri = read_optimized(run_id).models[BASELINE]
    version = mlflow.register_model(uri, "shop").version
    MlflowClient().set_registered_model_alias("shop", "champion", version)
    words = ("promote", "--run", run_id, "--name", "shop")
    shown, _ = command(capsys, *words, status=1)
    assert "has no stored measurements: it was not promoted by pt-deploy" in shown
    _, document = command(capsys, *words, "--replace")
    assert document["previous"] == str(version)


def test_commands_on_a_registered_model(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command(capsys, "promote", "--run", optimized_run(), "--name", "my shop")
    command(capsys, "promote", "--run", optimized_run(FASTER), "--name", "my shop")
    shown, document = command(capsys, "rollback", "my shop")
    assert "is version 1 again" in shown
    shown, document = command(capsys, "history", "my shop")
    assert [event["action"] for event in document["events"]] == ["promote", "promote", "rollback"]
    assert not document["moved_by_hand"]
    shown, document = command(capsys, "compare", "my shop@champion", "my shop@previous")
    assert "both give the same label to 100.00% of the rows" in shown
    assert document["metrics"]["p50 ms"] == [1.0, 0.5]
    shown, _ = command(capsys, "compare", "my shop@champion", "my shop/2")
    assert "validation: my shop/2 is +0.25 points" in shown
    out = tmp_path / "page.html"
    command(capsys, "report", "my shop", "--out", str(out))
    text = out.read_text()
    assert "was chosen as the champion of my shop" in text
    assert text.count("rollback") >= 2 and "data:image/png;base64," in text
    shown, _ = command(capsys, "promote", "--repair", "my shop")
    assert "no promotion was interrupted" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rollback", "none"), "none was not rolled back"),
        (("history", "none"), "the history of none cannot be read"),
        (("compare", "none@champion", "none@previous"), "models:/none@champion cannot be found"),
        (("report", "none"), "none has no version with the alias champion"),
        (("report", "0" * 32), "is not a pt-deploy run"),
        (("promote",), "--run is missing"),
        (("promote", "--run", "x", "--name", "a/b"), "x cannot be"),
        (("promote", "--to", "pt-deploy-demo"), "cannot be copied to itself"),
        (("promote", "--to", "b"), "models:/pt-deploy-demo@champion was not copied to b"),
        (("promote", "--repair", "none"), "none cannot be repaired"),
    ],
)
def test_errors_are_one_sentence(
    tracking: str, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    shown, _ = command(capsys, *words, status=1)
    assert message in shown
    assert "Traceback" not in shown


def test_versions_of_other_rows_are_compared_by_data_only(
    tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command(capsys, "promote", "--run", optimized_run(), "--name", "a")
    other = optimized_run(conditions={**CONDITIONS, "validation": "x"})
    command(capsys, "promote", "--run", other, "--name", "b")
    shown, _ = command(capsys, "compare", "a@champion", "b@champion", status=1)
    assert "were measured on other validation rows" in shown and "--data" in shown


def test_a_champion_on_another_gpu_cannot_be_compared(tracking: str) -> None:
    read = read_optimized(optimized_run(conditions={**CONDITIONS, "gpu": "NVIDIA H100"}))
    on_gpu = tuple(
        each if each.variant == BASELINE else replace(each, device="cuda") for each in read.results
    )
    promotion = promote_choice(replace(read, results=on_gpu), "shop")
    tags = MlflowClient().get_model_version("shop", promotion.version).tags
    assert tags["pt_deploy.gpu"] == "NVIDIA H100"
    check_champion("shop", CONDITIONS)  # the new one will not be on a GPU
    check_champion("shop", {**CONDITIONS, "gpu": "NVIDIA H100"})
    with pytest.raises(
        PolicyError, match="measured on other gpu .NVIDIA H100 instead of NVIDIA T4"
    ):
        check_champion("shop", {**CONDITIONS, "gpu": "NVIDIA T4"})


def test_a_champion_on_the_cpu_has_no_gpu(tracking: str) -> None:
    read = read_optimized(optimized_run(conditions={**CONDITIONS, "gpu": "NVIDIA H100"}))
    promotion = promote_choice(read, "shop")
    tags = MlflowClient().get_model_version("shop", promotion.version).tags
    assert "pt_deploy.gpu" not in tags
    check_champion("shop", {**CONDITIONS, "gpu": "NVIDIA T4"})
