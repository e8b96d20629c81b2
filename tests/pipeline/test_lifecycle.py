"""The whole pipeline on a tiny model: one parent run, its children, a working champion."""

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import load_data
from mlflow_pt_deploy.errors import ModelError, PolicyError, SearchError
from mlflow_pt_deploy.evaluation.profile import Profile
from mlflow_pt_deploy.pipeline.promotion_stage import promote_choice, read_optimized
from mlflow_pt_deploy.pipeline.search_stage import search_students
from mlflow_pt_deploy.pipeline.stages import (
    OptimizationResult,
    distill_student,
    optimize_models,
)
from mlflow_pt_deploy.selection.choice import Choice
from mlflow_pt_deploy.selection.policy import Policy

FEW = "onnxruntime-int8-dynamic,numpy"


def _run_arguments(tiny_data: Path, tiny_model: Path, *more: str) -> list[str]:
    options = {
        "data": tiny_data,
        "teacher": tiny_model,
        "name": "tiny",
        "epochs": 4,
        "student-epochs": 2,
        "student-layers": 1,
        "static-epochs": 2,
        "learning-rate": 0.01,
        "seconds": 0.1,
        "retain": 0.5,
        "variants": FEW,
    }
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return ["run", *flags, "--json", *more]


def _children(run_id: str) -> dict[str, mlflow.entities.Run]:
    client = MlflowClient()
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{run_id}'")
    return {run.info.run_name: run for run in found}


class Killed(BaseException):
    """Simulates a power failure."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per training step; the fifth, in the second epoch, fails."""
    from mlflow_pt_deploy.training import training_state

    real, taken = training_state.TrainingState._train_step, []

    def die_later(self: training_state.TrainingState, loss: object, rows: object) -> float:
        taken.append(1)
        if len(taken) == 5:
            raise Killed
        return real(self, loss, rows)

    monkeypatch.setattr(training_state, "_CHECKPOINT_EVERY_S", 0)
    monkeypatch.setattr(training_state.TrainingState, "_train_step", die_later)
    return taken


def test_an_interrupted_pipeline_is_resumed(
    tracking: str,
    tiny_data: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    steps: list[int],
) -> None:
    with pytest.raises(Killed):
        main(_run_arguments(tiny_data, tiny_model))
    run_id = mlflow.search_runs(
        filter_string="tags.`pt_deploy.stage` = 'run'", search_all_experiments=True
    )["run_id"][0]
    capsys.readouterr()
    assert main(["run", "--resume", run_id, "--json"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    document = json.loads(lines[-1])
    assert document["run_id"] == run_id
    # 4 x 3, 2 x 3 and 2 x 1 steps; the four finished ones are not repeated.
    assert len(steps) == 5 + 12 - 4 + 6 + 2
    _check_document(document)
    _check_tracking(document)
    _check_champion(document)
    assert any("speedup" in line and "p50" in line for line in lines), "no table was printed"
    _check_promotion_again(run_id, capsys)


def _check_document(document: dict) -> None:
    rows = {row["variant"]: row for row in document["variants"]}
    # Eager fp32 and the requested variant of teacher and student; NumPy for the static one.
    assert len(rows) == 5
    assert rows["teacher-eager-fp32"]["validation"]["accuracy"] > 0.8, "the teacher learned nothing"
    assert rows["teacher-eager-fp32"]["test"]["agreement"] == 1
    for row in rows.values():
        assert bool(row["reason"]) != bool(row["model"])
        if row["model"]:
            assert row["validation"]["latency_p50_ms"] > 0
    assert document["choice"] in rows
    assert document["promoted"]["uri"] == "models:/tiny@champion"
    assert set(document["seconds"]) == {"train", "distill", "optimize", "promote"}


def _check_tracking(document: dict) -> None:
    children = _children(document["run_id"])
    assert {"train", "distill", "distill-static", "static-numpy-fp32"} <= set(children)
    tags = children["train"].data.tags
    assert tags["hardware.cores"]
    parent = MlflowClient().get_run(document["run_id"])
    assert document["choice"] in parent.data.tags["mlflow.note.content"]
    files = {f.path for f in MlflowClient().list_artifacts(document["run_id"])}
    assert {"accuracy_latency.png", "report.md", "report.html", "results.json"} <= files
    assert {"models.json", "slices.json", "changed_rows.json"} <= files
    row = next(r for r in document["variants"] if r["model"])
    model = mlflow.get_logged_model(row["model"].removeprefix("models:/"))
    by_dataset = {(m.key, m.dataset_name) for m in model.metrics}
    assert ("accuracy", "data-test") in by_dataset or any(
        key == "accuracy" and name.endswith("-test") for key, name in by_dataset
    )


def _check_champion(document: dict) -> None:
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    answers = model.predict(["please refund me", "my card pin"], params={"top_k": 2})
    assert [len(answer) for answer in answers] == [2, 2]
    version = MlflowClient().get_model_version_by_alias("tiny", "champion")
    assert version.description.startswith(document["reason"])
    assert version.tags["pt_deploy.variant"] == document["choice"]
    for each in MlflowClient().search_model_versions("name = 'tiny'"):
        profile = Profile.from_tag(each.tags["pt_deploy.profile"], "the tag")
        assert profile.rows == sum(profile.scores) == sum(profile.lengths) == 30
    info = mlflow.models.get_model_info("models:/tiny@champion")
    assert info.saved_input_example_info["serving_input_path"] == "serving_input_example.json"


def _check_promotion_again(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Another policy chooses another variant; a failed promotion changes nothing."""
    first = MlflowClient().get_model_version_by_alias("tiny", "champion").version
    chosen = read_optimized(run_id).choice.variant
    done = read_optimized(run_id, Policy(retain=0.0, objective="throughput"))
    other = next(name for name in done.models if name != chosen)
    choice = type(done.choice)(other, "by hand", ())
    by_hand = OptimizationResult(run_id, done.results, done.models, choice)
    promotion = promote_choice(by_hand, "tiny", replace=True)
    assert promotion.previous == str(first)
    client = MlflowClient()
    assert str(client.get_model_version_by_alias("tiny", "previous").version) == str(first)
    limit = ["--max-latency-p95-ms", "0.000001"]
    assert main(["promote", "--run", run_id, "--name", "tiny", *limit]) == 3
    assert "nothing is promoted" in capsys.readouterr().err
    assert str(client.get_model_version_by_alias("tiny", "champion").version) == promotion.version


def test_the_pipeline_on_images(
    tracking: str, tiny_images: Path, tiny_resnet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "data": tiny_images,
        "teacher": tiny_resnet,
        "name": "tiny",
        "epochs": 0,
        "student-epochs": 1,
        "student-width": 0.125,
        "seconds": 0.1,
        "threads": 1,
        "retain": 0.1,
        "variants": "onnxruntime-fp32",
    }
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    assert main(["run", *flags, "--json"]) == 0
    out = capsys.readouterr().out
    rows = {row["variant"]: row for row in json.loads(out.strip().splitlines()[-1])["variants"]}
    assert set(rows) == {
        f"{model}-{runtime}-fp32"
        for model in ("teacher", "student")
        for runtime in ("eager", "onnxruntime")
    }
    assert not any(row["reason"] for row in rows.values())
    assert rows["teacher-onnxruntime-fp32"]["test"]["accuracy"] == 1
    assert """{"inputs": ["'$(base64 -w0 FILE)'"]}""" in out
    images = load_data(str(tiny_images)).test
    answers = mlflow.pyfunc.load_model("models:/tiny@champion").predict(list(images.rows))
    assert len(answers) == len(images)


def test_text_options_are_rejected_for_images(
    tracking: str, tiny_images: Path, tiny_resnet: Path
) -> None:
    options = Options(data=str(tiny_images), teacher=str(tiny_resnet))
    with pytest.raises(ModelError, match="vocabulary: for texts only, and the data are images"):
        distill_student(replace(options, vocabulary="train"))
    with pytest.raises(SearchError, match="a search supports text models only"):
        search_students(replace(options, trials=1))


def test_a_cascade_is_built_measured_and_served(
    tracking: str,
    tiny_data: Path,
    tiny_model: Path,
    tiny_static: Path,
    tmp_path: Path,
) -> None:
    import torch

    from mlflow_pt_deploy.models import load_classifier, save_classifier

    # A static student without weights for one class, and with low confidence.
    static = load_classifier(str(tiny_static))
    with torch.no_grad():
        static.network.classifier.weight[0] = 0
        static.network.classifier.weight *= 0.5
    save_classifier(static, tmp_path / "weak")
    done = optimize_models(
        Options(
            data=str(tiny_data),
            teacher=str(tiny_model),
            student=str(tmp_path / "weak"),
            variants="numpy,cascade",
            retain_low=0.5,
            seconds=0.1,
        )
    )
    rows = {result.variant: result for result in done.results}
    cascade = rows["cascade-static-teacher"]
    assert not cascade.reason
    alone = rows["static-numpy-fp32"].value("accuracy", "validation")
    assert alone < 0.99 * rows["teacher-eager-fp32"].value("accuracy", "validation")
    assert cascade.value("accuracy", "validation") > alone
    # The tiny teacher is as fast as any cascade, so the choice is made by hand.
    by_hand = Choice(cascade.variant, "by hand", ())
    promote_choice(OptimizationResult(done.run_id, done.results, done.models, by_hand), "tiny")
    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    answers = model.predict(["please refund me", "my card pin"])
    assert [answer["label"] for answer in answers] == ["refund", "card"]


def test_without_a_choice_nothing_is_promoted(tracking: str) -> None:
    nothing = OptimizationResult("0", (), {}, Choice(None, "No variant meets the limits.", ()))
    with pytest.raises(PolicyError, match=r"nothing is promoted. No variant meets the limits"):
        promote_choice(nothing, "tiny")


def test_a_student_with_the_vocabulary_of_the_training_data(
    tracking: str, tiny_data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All pieces of the tiny vocabulary would count as frequent.
    monkeypatch.setattr("mlflow_pt_deploy.pipeline.students.frequent_pieces", lambda classifier: [])
    from mlflow_pt_deploy.models import load_classifier
    from mlflow_pt_deploy.pipeline.stages import distill_student
    from mlflow_pt_deploy.tracking import fetch_model

    options = {"data": str(tiny_data), "teacher": str(tiny_model), "student_layers": 0}
    done = distill_student(Options(**options, static_epochs=1, vocabulary="train", limit=3))
    pieces = load_classifier(fetch_model(done.model)).network.pieces.weight
    assert len(pieces) < len(load_classifier(str(tiny_model)).tokenizer)
    with pytest.raises(ModelError, match=r"vocabulary is 'tiny'; choose from all, train"):
        Options(vocabulary="tiny")


def test_all_distillation_options_together(
    tracking: str, tiny_data: Path, tiny_model: Path
) -> None:
    from mlflow_pt_deploy.models import load_classifier
    from mlflow_pt_deploy.pipeline.stages import distill_student
    from mlflow_pt_deploy.tracking import fetch_model

    options = Options(
        data=str(tiny_data),
        teacher=str(tiny_model),
        student_epochs=1,
        keep_layers="1",
        student_neurons=16,
        student_precision="int8-qat",
        relation_weight=1.0,
        made_texts=1.0,
    )
    done = distill_student(options)
    run = MlflowClient().get_run(done.run_id)
    (train,) = (x.dataset for x in run.inputs.dataset_inputs if x.dataset.name.endswith("-train"))
    splits = load_data(str(tiny_data))
    assert train.digest == splits.train.digest  # augmented texts are not part of the data set
    student = load_classifier(fetch_model(done.model)).network
    (layer,) = student.bert.encoder.layer
    assert layer.intermediate.dense.out_features == 16
    assert not any("forward" in vars(module) for module in student.modules())
    with pytest.raises(ModelError, match=r"student_precision is 'int4'; choose from fp32, int8"):
        Options(student_precision="int4")
    with pytest.raises(ModelError, match=r"made_texts is -1; give a number of at least 0"):
        Options(made_texts=-1)
