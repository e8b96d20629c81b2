"""What the line writes into MLflow's tracking server, and reads back to resume.

A lifecycle is one parent run; teacher, student and variants are its children. Knows run, metric
and tag names; does not know how anything is computed.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy import flavor, interrupt
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ModelError, TrackingError
from mlflow_pt_deploy.hardware import hardware_tags, usable_cores
from mlflow_pt_deploy.measure import Result
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.reach import without_password

STAGE_TAG = "pt_deploy.stage"
VARIANT_TAG = "pt_deploy.variant"
OPTIONS_TAG = "pt_deploy.options"
REASON_TAG = "pt_deploy.reason"
_NOTE_TAG = "mlflow.note.content"
_MLFLOW_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/", "file:")


@contextmanager
def stage_run(stage: str, name: str, *, resume: str = "", options: str = "") -> Iterator[Run]:
    """The run of a stage: resumed, or nested in the active run, or new.

    System metrics are not sampled: they would disturb what is timed.

    Args:
        stage: ``train``, ``distill``, ``search``, ``optimize``, ``run``.
        name: Shown in the UI.
        resume: Id of the run to go on with.
        options: The user's options as JSON, so that a resumed run has the same.

    Raises:
        TrackingError: There is no run to resume.
    """
    nested = mlflow.active_run() is not None
    try:
        if resume:
            context = mlflow.start_run(resume, nested=nested, log_system_metrics=False)
        else:
            context = mlflow.start_run(run_name=name, nested=nested, log_system_metrics=False)
    except MlflowException as error:
        raise TrackingError(f"run {resume or name} cannot be started: {error.message}") from error
    with _ended_in_any_case(context) as run:
        # `mlflow run` creates the run itself and asks no context provider
        mlflow.set_tags({STAGE_TAG: stage, **hardware_tags()})
        if options:
            mlflow.set_tag(OPTIONS_TAG, options)
        yield run


@contextmanager
def open_run(name: str, tags: Mapping[str, str]) -> Iterator[Run]:
    """A new child of the active run."""
    context = mlflow.start_run(run_name=name, nested=True, log_system_metrics=False)
    with _ended_in_any_case(context) as run:
        mlflow.set_tags(dict(tags))
        yield run


@contextmanager
def _ended_in_any_case(context: mlflow.ActiveRun) -> Iterator[Run]:
    """A run that is not left running, also where the process must end inside of it."""
    interrupt.begin()
    client, run_id = MlflowClient(), context.info.run_id
    with interrupt.last_act(lambda: client.set_terminated(run_id, "FAILED")), context as run:
        interrupt.check()
        yield run


def saved_options(run_id: str) -> Options:
    """The options a run was started with.

    Raises:
        TrackingError: There is no such run, or it is not one of ours.
    """
    try:
        return Options.from_json(MlflowClient().get_run(run_id).data.tags[OPTIONS_TAG])
    except (MlflowException, KeyError) as error:
        raise TrackingError(
            f"run {run_id} cannot be resumed: it is not a pt-deploy run on this tracking server "
            f"({without_password(mlflow.get_tracking_uri())})."
        ) from error


def child_run(parent: str, stage: str) -> Run | None:
    """The newest child of a run for a stage, or None."""
    client = MlflowClient()
    found = client.search_runs(
        [client.get_run(parent).info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent}' and tags.`{STAGE_TAG}` = '{stage}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0] if found else None


def end_abandoned(parent: str) -> None:
    """Mark the children of a resumed run that a killed process left running."""
    client = MlflowClient()
    for run in client.search_runs(
        [client.get_run(parent).info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent}' and attributes.status = 'RUNNING'",
    ):
        client.set_terminated(run.info.run_id, "KILLED")


def log_dataset_facts(splits: Splits) -> None:
    """Which rows a run saw: MLflow datasets, sizes, and what a reader should know."""
    for split in ("train", "validation", "test"):
        mlflow.log_input(dataset(splits, split), context=split)
    mlflow.set_tag("pt_deploy.data", splits.name)
    mlflow.set_tag("pt_deploy.synthetic", str(splits.synthetic).lower())
    if splits.notes:
        mlflow.set_tag("pt_deploy.data_notes", "; ".join(splits.notes)[:5000])


def dataset(splits: Splits, split: str) -> MetaDataset:
    """A split as MLflow's dataset, so that the UI groups metrics by it."""
    source = CodeDatasetSource(tags={"data": splits.source, "split": split})
    digest = getattr(splits, split).digest
    name = f"{splits.name}-{split}"
    return MetaDataset(source, name=name, digest=digest)  # type: ignore[abstract]  # MLflow's own


def log_result(result: Result, splits: Splits, step: int) -> str | None:
    """One variant: a child run, and a logged model if it was built and measured.

    Args:
        result: The row of the table.
        splits: Data the numbers belong to.
        step: Distinct for each variant: MLflow copies a run's metrics of one step to its models.

    Returns:
        ``models:/m-...``, or None for a row that failed.
    """
    params = {
        "model": result.model,
        "runtime": result.runtime,
        "precision": result.precision,
        "device": result.device,
        "threads": str(result.threads),
    }
    with open_run(result.variant, {STAGE_TAG: "variant", VARIANT_TAG: result.variant}):
        mlflow.log_params(params)
        if result.reason or result.folder is None:
            mlflow.set_tags({REASON_TAG: result.reason, _NOTE_TAG: f"Not built: {result.reason}"})
            mlflow.end_run("FAILED")
            return None
        mlflow.log_dict(result.to_json(), "measurements.json")
        interrupt.check()
        info = flavor.log_model(
            result.folder,
            result.variant,
            params=params,
            step=step,
            model_type=result.model,
            model_config=_served_so(result),
        )
        _log_metrics(result, splits, info.model_id)
        return f"models:/{info.model_id}"


def _served_so(result: Result) -> dict[str, int]:
    """How the variant was measured to do best, as serving options."""
    found = {"num_threads": result.threads} if result.threads < usable_cores() else {}
    rows = result.value("best_batch_rows")
    return {**found, "max_batch_rows": int(rows)} if rows else found


def _log_metrics(result: Result, splits: Splits, model_id: str) -> None:
    validation = {**result.metrics(""), **result.metrics("validation")}
    mlflow.log_metrics(validation, model_id=model_id, dataset=dataset(splits, "validation"))
    test = result.metrics("test")
    if test:
        mlflow.log_metrics(test, model_id=model_id, dataset=dataset(splits, "test"))


def describe(markdown: str) -> None:
    """The active run's description, which the UI shows first."""
    mlflow.set_tag(_NOTE_TAG, markdown)


def fetch_model(reference: str) -> str:
    """Make a model reference local.

    What MLflow holds is copied to a temporary folder, which is removed when this process ends.

    Args:
        reference: A Hugging Face id, a folder, ``minilm``, or MLflow's ``runs:/`` or ``models:/``
            (or its folder) of a transformers model, of one of our eager fp32 variants or of a
            stage's ``model``.

    Returns:
        What `models.load_classifier` reads.

    Raises:
        ModelError: MLflow has no such model, or it holds nothing to optimize.
    """
    from mlflow_pt_deploy.models.flavors import no_model, other_model

    local = (Path(reference) / "MLmodel").is_file()
    if not reference.startswith(_MLFLOW_SCHEMES) and not local:
        return reference
    root = _download(reference)
    if (root / "config.json").is_file():
        return str(root)
    if (root / "variant" / "model.safetensors").is_file():
        return str(root / "variant")
    if problem := other_model(root):
        raise ModelError(f"{reference} {problem}")
    if (root / "model" / "config.json").is_file():
        return str(_merged_transformers(root))
    if (root / "model.sentence_transformer" / "config.json").is_file():
        return str(root / "model.sentence_transformer")
    raise ModelError(f"{reference} {no_model(root)}")


def _download(reference: str) -> Path:
    """A private copy, also where the artifacts are on this machine: MLflow's store is not ours."""
    # Errors of whoever reads the folder name it, so it should remind of what the user gave.
    name = re.sub(r"[^A-Za-z0-9_.@]+", "-", reference)[-100:]
    folder = tempfile.mkdtemp(prefix=f"pt-deploy-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=reference, dst_path=folder))
    except Exception as error:  # each artifact store has its own
        raise ModelError(
            f"{reference} cannot be fetched from MLflow. Check it, and that MLFLOW_TRACKING_URI "
            f"({without_password(mlflow.get_tracking_uri())}) is where it was logged: {error}"
        ) from error


def _merged_transformers(root: Path) -> Path:
    """MLflow's transformers flavor keeps weights and their readers apart; put them together."""
    for component in (root / "components").glob("*"):
        if component.is_dir():
            shutil.copytree(component, root / "model", dirs_exist_ok=True)
    return root / "model"


def log_folder(folder: Path, name: str) -> str:
    """Log a folder as an artifact of the active run; returns its ``runs:/`` address."""
    mlflow.log_artifacts(str(folder), name)
    run = mlflow.active_run()
    assert run is not None
    return f"runs:/{run.info.run_id}/{name}"


def log_results(results: Sequence[Result], texts: Mapping[str, str], figure: Path) -> None:
    """The whole table, for people and for programs, on the active run."""
    mlflow.log_dict({"results": [result.to_json() for result in results]}, "results.json")
    for name, text in texts.items():
        mlflow.log_text(text, name)
    mlflow.log_artifact(str(figure))
