"""Export many variants, two child processes at a time; a crash costs a row, not the run.

A child builds many variants of one model, because starting one takes as long as an export. Run by
`build`, not by people:
``python -m mlflow_pt_deploy.variants.build JOB.json``
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np

from mlflow_pt_deploy.data.splits import Splits
from mlflow_pt_deploy.errors import ArtifactError, PtDeployError, VariantError
from mlflow_pt_deploy.hardware import usable_cores
from mlflow_pt_deploy.variants.base import Variant
from mlflow_pt_deploy.variants.folder import verify, write_variant
from mlflow_pt_deploy.variants.table import VARIANTS, suits

_CALIBRATION_ROWS = 128
_TIMEOUT_S = 1800


@dataclass(frozen=True)
class Built:
    """What became of one variant.

    Attributes:
        name: ``<model>-<runtime>-<precision>``.
        model: First part of the name.
        runtime: Second part.
        precision: Third part.
        folder: Where it is, or None where it could not be built.
        reason: Why it could not.
        seconds: Time the export took; 0 where an earlier one was found intact.
    """

    name: str
    model: str
    runtime: str
    precision: str
    folder: Path | None
    reason: str = ""
    seconds: float = 0.0


def build(
    models: Mapping[str, Path],
    splits: Splits,
    target: Path,
    *,
    variants: Sequence[Variant] = VARIANTS,
    parallel: int = 2,
    progress: Callable[[Built], None] | None = None,
) -> list[Built]:
    """Export every variant of every model that it suits.

    Variants that an interrupted run left intact in `target` are kept as they are.

    Args:
        models: First part of the variants' names to a Hugging Face folder.
        splits: Rows of `train` calibrate; rows of `validation` become the golden rows.
        target: Folder to create the variants' folders in.
        variants: What to build.
        parallel: Child processes at a time.
        progress: Called with each variant as it is done.

    Returns:
        One entry for each model and variant, in that order; failures carry their reason.
    """
    done: dict[str, Built] = {}
    report = progress or (lambda built: None)

    def note(built: Built) -> None:
        done[built.name] = built
        report(built)

    asked = suited(models, variants)
    wanted: list[tuple[str, Variant]] = []
    for model, variant in asked:
        if early := _without_building(variant, model, target):
            note(early)
        else:
            wanted.append((model, variant))
    rows = _rows(splits)
    with ThreadPoolExecutor(parallel) as pool:
        jobs = [
            pool.submit(_run_job, model, models[model], job, target, rows, parallel, note)
            for model, job in _jobs(wanted)
        ]
        for job in jobs:
            job.result()
    return [done[variant.name(model)] for model, variant in asked]


def suited(models: Mapping[str, Path], variants: Sequence[Variant]) -> list[tuple[str, Variant]]:
    """Names of models with the variants that suit their kind, in the order given."""
    return [
        (model, variant)
        for model, folder in models.items()
        for variant in variants
        if suits(variant, _model_type(folder))
    ]


def _model_type(folder: Path) -> str:
    """The kind of a model; empty where the child that loads it will say what is wrong."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        return str(config["model_type"])
    except (OSError, ValueError, KeyError):
        return ""


def _without_building(variant: Variant, model: str, target: Path) -> Built | None:
    if reason := variant.unsupported():
        return _built(variant, model, None, reason)
    folder = target / variant.name(model)
    if folder.exists():
        try:
            verify(folder)
        except ArtifactError:
            return None
        return _built(variant, model, folder)
    return None


def _jobs(wanted: Sequence[tuple[str, Variant]]) -> list[tuple[str, list[Variant]]]:
    """A child for what compiles and one for the rest, for each model; the slow ones first."""
    jobs: dict[tuple[bool, str], list[Variant]] = {}
    for model, variant in wanted:
        jobs.setdefault((not variant.compiles, model), []).append(variant)
    return [(model, jobs[fast, model]) for fast, model in sorted(jobs)]


def _rows(splits: Splits) -> dict[str, list[str]]:
    """Rows for tracing (mixed lengths), calibration and golden answers."""
    train = splits.train.rows
    by_length = sorted(range(len(train)), key=lambda row: len(train[row]))
    random = np.random.default_rng(0)
    chosen = random.permutation(len(train))[:_CALIBRATION_ROWS]
    example = [train[by_length[int(share * (len(train) - 1))]] for share in (0.05, 0.5, 0.9)]
    return {
        "example": example,
        "calibration": [train[i] for i in chosen],
        "golden": golden_rows(splits),
    }


def golden_rows(splits: Splits) -> list[str]:
    """A few rows of all lengths, whose answers are kept with each variant."""
    rows = sorted(splits.validation.rows, key=len)
    return rows[:: max(1, len(rows) // 6)][:6]


def _built(
    variant: Variant, model: str, folder: Path | None, reason: str = "", seconds: float = 0.0
) -> Built:
    name = variant.name(model)
    return Built(name, model, variant.runtime, variant.precision, folder, reason, seconds)


def _run_job(
    model: str,
    source: Path,
    variants: list[Variant],
    target: Path,
    rows: Mapping[str, list[str]],
    parallel: int,
    note: Callable[[Built], None],
) -> None:
    """Every variant is noted, whatever happens; one that kills its child costs no other."""
    left = {variant.name(model): variant for variant in variants}
    job = {"model": model, "source": str(source), "target": str(target), **rows}
    while left:
        options = [{"runtime": variant.runtime, **asdict(variant)} for variant in left.values()]
        ready = False
        for answer in _child({**job, "variants": options}, parallel):
            if "name" in answer:
                variant = left.pop(answer["name"])
                folder = None if answer["reason"] else target / answer["name"]
                note(_built(variant, model, folder, answer["reason"], answer["seconds"]))
            elif "died" in answer:
                lost = list(left)[:1] if ready else list(left)
                for name in lost:
                    note(_built(left.pop(name), model, None, answer["died"]))
            else:
                ready = True


def _child(job: Mapping[str, Any], parallel: int) -> Iterator[dict[str, Any]]:
    """The child's answers; a last one with ``died`` if it ended before its work did."""
    with tempfile.TemporaryDirectory() as scratch:
        path, log = Path(scratch) / "job.json", Path(scratch) / "log"
        path.write_text(json.dumps(job), encoding="utf8")
        with log.open("wb") as errors:
            child = _start(path, errors, parallel)
        yield from _answers(child, log)


def _start(job: Path, errors: BinaryIO, parallel: int) -> subprocess.Popen[str]:
    # Two children with all cores each would wait for one another at every OpenMP barrier; and
    # OpenVINO and NNCF send usage statistics to their makers unless they believe to be in CI.
    cores = str(max(1, usable_cores() // parallel))
    return subprocess.Popen(
        [sys.executable, "-m", "mlflow_pt_deploy.variants.build", str(job)],
        env={**os.environ, "OMP_NUM_THREADS": cores, "CI": "true"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
    )


def _answers(child: subprocess.Popen[str], log: Path) -> Iterator[dict[str, Any]]:
    late = threading.Event()

    def give_up() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(_TIMEOUT_S, give_up)
    timer.start()
    try:
        with child, _killed_at_exit(child):
            assert child.stdout is not None
            for line in child.stdout:
                yield json.loads(line)
    finally:
        timer.cancel()
    if late.is_set():
        yield {"died": f"the export was given up after {_TIMEOUT_S} s"}
    elif child.returncode:
        yield {"died": _cause(child.returncode, log)}


@contextmanager
def _killed_at_exit(child: subprocess.Popen[str]) -> Iterator[None]:
    try:
        yield
    finally:
        if child.poll() is None and sys.exc_info()[0] is not None:
            child.kill()


def _cause(code: int, log: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return f"the export was ended by {name}{hint}"
    last = log.read_text(encoding="utf8", errors="replace").strip().splitlines()[-1:]
    return f"the export ended with code {code}: {last[0] if last else 'no message'}"


def main(path: Path) -> None:
    """The child: build what the job says, answer one line of JSON a variant."""
    from mlflow_pt_deploy.models import load_classifier
    from mlflow_pt_deploy.variants.table import RUNTIMES

    warnings.simplefilter("ignore")
    answers = _private_stdout()
    job = json.loads(path.read_text(encoding="utf8"))
    classifier = load_classifier(job["source"])
    example = classifier.preprocessor(job["example"])
    calibration = [classifier.preprocessor([row]) for row in job["calibration"]]
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for options in job["variants"]:
        variant = RUNTIMES[options.pop("runtime")](**options)
        started = time.monotonic()
        reason = ""
        try:
            write_variant(
                variant,
                classifier,
                Path(job["target"]) / variant.name(job["model"]),
                model=job["model"],
                example=example,
                calibration=calibration,
                golden_rows=job["golden"],
            )
        except (PtDeployError, OSError) as error:
            reason = str(error)
        except Exception as error:  # a runtime's own: one row fails, the others go on
            reason = str(VariantError(f"{type(error).__name__}: {str(error)[:300]}"))
        seconds = round(time.monotonic() - started, 3)
        answer = {"name": variant.name(job["model"]), "reason": reason, "seconds": seconds}
        print(json.dumps(answer), file=answers, flush=True)


def _private_stdout() -> TextIO:
    """The real stdout for answers alone; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf8")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    main(Path(sys.argv[1]))
