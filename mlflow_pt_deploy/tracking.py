"""MLflow tracking: runs, metrics, datasets and models of the pipeline, and resuming of runs.

A lifecycle is one parent run; teacher, student and variants are its child runs.
"""

from __future__ import annotations

import atexit
import base64
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.data.code_dataset_source import CodeDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ModelError, TrackingError
from mlflow_pt_deploy.evaluation import Result
from mlflow_pt_deploy.evaluation.slices import Change, Slice, changed_rows, slice_accuracy
from mlflow_pt_deploy.runtimes.portable import Portable
from mlflow_pt_deploy.serving.model.inputs import EXAMPLES
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.device import CPU, gpu_name
from mlflow_pt_deploy.system.hardware import hardware, hardware_tags, usable_cores
from mlflow_pt_deploy.tracking_server import redact_uri

STAGE_TAG = "pt_deploy.stage"
VARIANT_TAG = "pt_deploy.variant"
OPTIONS_TAG = "pt_deploy.options"
REASON_TAG = "pt_deploy.reason"
SLICES = "slices.json"
_CHANGED = "changed_rows.json"
_MAX_CHANGED, _MAX_CHARACTERS = 500, 500
_INPUT_ATTEMPTS, _INPUT_PAUSE_S = 3, 0.5
_NOTE_TAG = "mlflow.note.content"
_MLFLOW_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/", "file:")


@contextmanager
def stage_run(stage: str, name: str, *, resume: str = "", options: str = "") -> Iterator[Run]:
    """Start or resume the run of a stage; it is nested if a run is active.

    System metrics are disabled, because sampling would disturb the benchmarks.

    Args:
        stage: ``train``, ``distill``, ``search``, ``optimize``, ``run``.
        name: Name shown in the UI.
        resume: Id of the run to resume, or empty.
        options: Options as JSON, stored for a later resume.

    Raises:
        TrackingError: The run to resume does not exist.
    """
    nested = mlflow.active_run() is not None
    try:
        if resume:
            context = mlflow.start_run(resume, nested=nested, log_system_metrics=False)
        else:
            context = mlflow.start_run(run_name=name, nested=nested, log_system_metrics=False)
    except MlflowException as error:
        raise TrackingError(f"run {resume or name} cannot be started: {error.message}") from error
    with _terminated_on_interrupt(context) as run:
        # `mlflow run` creates the run without calling context providers
        mlflow.set_tags({STAGE_TAG: stage, **hardware_tags()})
        if options:
            mlflow.set_tag(OPTIONS_TAG, options)
        yield run


@contextmanager
def open_run(name: str, tags: Mapping[str, str]) -> Iterator[Run]:
    """Start a child run of the active run."""
    context = mlflow.start_run(run_name=name, nested=True, log_system_metrics=False)
    with _terminated_on_interrupt(context) as run:
        mlflow.set_tags(dict(tags))
        yield run


@contextmanager
def _terminated_on_interrupt(context: mlflow.ActiveRun) -> Iterator[Run]:
    """Enter a run that is marked as failed if the process is forced to exit inside of it."""
    interrupt.begin()
    client, run_id = MlflowClient(), context.info.run_id
    with interrupt.exit_action(lambda: client.set_terminated(run_id, "FAILED")), context as run:
        interrupt.check()
        yield run


def saved_options(run_id: str) -> Options:
    """Return the options that a run was started with.

    Raises:
        TrackingError: The run does not exist, or is not a pt-deploy run.
    """
    try:
        return Options.from_json(MlflowClient().get_run(run_id).data.tags[OPTIONS_TAG])
    except (MlflowException, KeyError) as error:
        raise TrackingError(
            f"run {run_id} cannot be resumed: it is not a pt-deploy run on this tracking server "
            f"({redact_uri(mlflow.get_tracking_uri())})."
        ) from error


def latest_child_run(parent: str, stage: str) -> Run | None:
    """Return the newest child run of a stage, or None."""
    client = MlflowClient()
    found = client.search_runs(
        [client.get_run(parent).info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent}' and tags.`{STAGE_TAG}` = '{stage}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0] if found else None


def terminate_abandoned_children(parent: str) -> None:
    """Mark child runs that a killed process left in status RUNNING as KILLED."""
    client = MlflowClient()
    for run in client.search_runs(
        [client.get_run(parent).info.experiment_id],
        f"tags.mlflow.parentRunId = '{parent}' and attributes.status = 'RUNNING'",
    ):
        client.set_terminated(run.info.run_id, "KILLED")


def log_dataset_facts(splits: Splits) -> None:
    """Log the MLflow datasets of a run, the name of the data, and its notes."""
    for split in ("train", "validation", "test"):
        _log_input(dataset(splits, split), split)
    mlflow.set_tag("pt_deploy.data", splits.name)
    mlflow.set_tag("pt_deploy.synthetic", str(splits.synthetic).lower())
    if splits.notes:
        mlflow.set_tag("pt_deploy.data_notes", "; ".join(splits.notes)[:5000])


def _log_input(found: MetaDataset, context: str) -> None:
    """Log a dataset; try again if another process has just stored the same one.

    MLflow looks a dataset up and then inserts it. Two processes that do so at once violate the
    uniqueness of its digest, and one of them gets an error.
    """
    for attempt in range(_INPUT_ATTEMPTS):
        try:
            mlflow.log_input(found, context=context)
        except Exception:  # of SQLAlchemy or MLflow, depending on the store
            if attempt == _INPUT_ATTEMPTS - 1:
                raise
            time.sleep(_INPUT_PAUSE_S)
        else:
            return


def log_device(run: Run, device: str) -> None:
    """Log the device of a run, as `resolved_device` where `mlflow run` has logged ``auto``."""
    given = run.data.params.get("device", device)
    mlflow.log_param("device" if given == device else "resolved_device", device)


def dataset(splits: Splits, split: str) -> MetaDataset:
    """Return a split as an MLflow dataset, by which the UI groups metrics."""
    source = CodeDatasetSource(tags={"data": splits.source, "split": split})
    digest = getattr(splits, split).digest
    name = f"{splits.name}-{split}"
    return MetaDataset(source, name=name, digest=digest)  # type: ignore[abstract]  # MLflow does the same


def log_result(
    result: Result,
    splits: Splits,
    step: int,
    baseline: Result | None = None,
    wheel_url: str = "",
) -> str | None:
    """Log one variant as a child run, with a logged model if it was built and measured.

    Args:
        result: Result of the variant.
        splits: Data of the measurements.
        baseline: Result whose labels are compared with those of the variant, as a table.
        step: Distinct for each variant, because MLflow copies metrics of one step to its models.
        wheel_url: See `Options`.

    Returns:
        ``models:/m-...``, or None for a failed variant.
    """
    params = {
        "model": result.model,
        "runtime": result.runtime,
        "precision": result.precision,
        "device": result.device,
        "threads": str(result.threads),
    }
    tags = {STAGE_TAG: "variant", VARIANT_TAG: result.variant}
    if result.gpu:
        tags["hardware.gpu_state"] = result.gpu
    with open_run(result.variant, tags):
        mlflow.log_params(params)
        if result.reason or result.folder is None:
            mlflow.set_tags({REASON_TAG: result.reason, _NOTE_TAG: f"Not built: {result.reason}"})
            mlflow.end_run("FAILED")
            return None
        mlflow.log_dict(result.to_json(), "measurements.json")
        if baseline is not None:
            log_differences(result, baseline, splits)
        interrupt.check()
        info = flavor.log_model(
            result.folder,
            result.variant,
            params=params,
            step=step,
            model_type=result.model,
            input_example=_input_example(splits.column),
            model_config=_serving_config(result),
            package=wheel_url,
        )
        _log_metrics(result, splits, info.model_id)
        return f"models:/{info.model_id}"


def _input_example(column: str) -> list[str]:
    """A request's rows, for people and tools that read the logged model; no row of the user's."""
    if column == "text":
        return [EXAMPLES["text"]]
    from mlflow_pt_deploy.preprocessing.image import example_image

    return [base64.b64encode(example_image()).decode()]


def log_differences(result: Result, baseline: Result, splits: Splits) -> None:
    """Log two tables of the validation rows: accuracy by slice, and rows with another label."""
    reference, predicted = (each.predicted.get("validation") for each in (baseline, result))
    if not reference or not predicted:
        return
    slices = slice_accuracy(splits.validation, splits.labels, reference, predicted)
    changed = changed_rows(splits.validation, splits.labels, reference, predicted)
    short = [each._replace(text=each.text[:_MAX_CHARACTERS]) for each in changed[:_MAX_CHANGED]]
    _log_table(slices, Slice._fields, SLICES)
    _log_table(short, Change._fields, _CHANGED)


def _log_table(rows: Sequence[tuple[object, ...]], columns: Sequence[str], name: str) -> None:
    """Log a table in the form that MLflow's UI shows."""
    table = {"columns": list(columns), "data": [list(row) for row in rows]}
    mlflow.log_dict(table, name)


def _serving_config(result: Result) -> dict[str, int]:
    """Return the serving options with which the variant performed best.

    A portable variant has none: its figures are those of a GPU, and it also serves without one.
    """
    if result.runtime == Portable.runtime:
        return {}
    config = {"num_threads": result.threads} if result.threads < usable_cores() else {}
    rows, tokens = result.value("best_batch_rows"), result.value("best_batch_tokens")
    if rows:
        config["max_batch_rows"] = int(rows)
    if rows and tokens:  # of a GPU; the defaults of the batcher would never fill such a batch
        config |= {"max_batch_tokens": int(tokens), "queue_rows": max(1024, 4 * int(rows))}
    return config


def _log_metrics(result: Result, splits: Splits, model_id: str) -> None:
    validation = {**result.metrics(""), **result.metrics("validation")}
    mlflow.log_metrics(validation, model_id=model_id, dataset=dataset(splits, "validation"))
    test = result.metrics("test")
    if test:
        mlflow.log_metrics(test, model_id=model_id, dataset=dataset(splits, "test"))


def set_run_description(markdown: str) -> None:
    """Set the description of the active run, which the UI shows first."""
    mlflow.set_tag(_NOTE_TAG, markdown)


def fetch_model(reference: str) -> str:
    """Download a model from MLflow; other references are returned unchanged.

    The model is copied to a temporary folder, which is removed at the end of this process.

    Args:
        reference: A Hugging Face id, a folder, ``minilm``, or an MLflow address ``runs:/`` or
            ``models:/`` (or folder) of a transformers model, of an eager fp32 variant or of the
            ``model`` of a stage.

    Returns:
        A reference for `models.load_classifier`.

    Raises:
        ModelError: MLflow has no such model, or the model cannot be optimized.
    """
    from mlflow_pt_deploy.models.flavors import missing_model_reason, unsupported_reason

    local = (Path(reference) / "MLmodel").is_file()
    if not reference.startswith(_MLFLOW_SCHEMES) and not local:
        return reference
    root = _download(reference)
    if (root / "config.json").is_file():
        return str(root)
    if (root / "variant" / "model.safetensors").is_file():
        return str(root / "variant")
    if problem := unsupported_reason(root):
        raise ModelError(f"{reference} {problem}")
    if (root / "model" / "config.json").is_file():
        return str(_merged_transformers(root))
    if (root / "model.sentence_transformer" / "config.json").is_file():
        return str(root / "model.sentence_transformer")
    raise ModelError(f"{reference} {missing_model_reason(root)}")


def _download(reference: str) -> Path:
    """Copy a model to a temporary folder, also from a local artifact store."""
    # Later errors contain the folder name, so it includes the reference given by the user.
    name = re.sub(r"[^A-Za-z0-9_.@]+", "-", reference)[-100:]
    folder = tempfile.mkdtemp(prefix=f"pt-deploy-{name}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        return Path(mlflow.artifacts.download_artifacts(artifact_uri=reference, dst_path=folder))
    except Exception as error:  # artifact stores have no common base class for errors
        raise ModelError(
            f"{reference} cannot be fetched from MLflow. Check it and MLFLOW_TRACKING_URI "
            f"({redact_uri(mlflow.get_tracking_uri())}): {error}"
        ) from error


def _merged_transformers(root: Path) -> Path:
    """Merge weights and tokenizer, which the transformers flavor of MLflow saves separately."""
    for component in (root / "components").glob("*"):
        if component.is_dir():
            shutil.copytree(component, root / "model", dirs_exist_ok=True)
    return root / "model"


def log_folder(folder: Path, name: str) -> str:
    """Log a folder as an artifact of the active run; return its ``runs:/`` address."""
    mlflow.log_artifacts(str(folder), name)
    run = mlflow.active_run()
    assert run is not None
    return f"runs:/{run.info.run_id}/{name}"


def conditions(splits: Splits, device: str = CPU) -> dict[str, str]:
    """Return the data and the machine of measurements made now.

    Results can be compared if the digests of the ``validation`` rows and the ``hardware`` are
    equal, and, of two variants on a GPU, the ``gpu``.
    """
    facts = hardware()
    machine = f"{facts['cpu']}, {facts['cores']} cores"
    gpu = gpu_name(device) if device != CPU else ""
    return {
        "data": f"{splits.name}, {len(splits.validation)} validation and {len(splits.test)} test "
        "rows",
        "validation": splits.validation.digest,
        "test": splits.test.digest,
        "hardware": machine,
        **({"gpu": gpu} if gpu else {}),
    }


def read_results(run_id: str) -> tuple[tuple[Result, ...], dict[str, str]]:
    """Read the results of an optimize stage, and their conditions (empty for old runs).

    Raises:
        ModelError: The run has no finished optimize stage.
    """
    try:
        document = mlflow.artifacts.load_dict(f"runs:/{run_id}/results.json")
    except Exception as error:  # differs by artifact store
        raise no_results(run_id) from error
    results = tuple(map(Result.from_json, document["results"]))
    return results, document.get("conditions", {})


def no_results(run_id: str) -> ModelError:
    """The error of a run without a finished optimize stage."""
    return ModelError(
        f"run {run_id} has no finished optimize stage. Finish it with "
        f"pt-deploy run --resume {run_id}"
    )


def log_results(
    results: Sequence[Result],
    measured_under: Mapping[str, str],
    texts: Mapping[str, str],
    figure: Path,
) -> None:
    """Log all results with their conditions to the active run: as JSON, as texts, as a figure."""
    document = {
        "results": [result.to_json() for result in results],
        "conditions": dict(measured_under),
    }
    mlflow.log_dict(document, "results.json")
    for name, text in texts.items():
        mlflow.log_text(text, name)
    mlflow.log_artifact(str(figure))
