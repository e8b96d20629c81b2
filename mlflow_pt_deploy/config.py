"""Options of the pipeline, each declared once with default, help text, stages and choices.

The command line, MLproject and the Python API use the same record.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from mlflow_pt_deploy.errors import DataError, ModelError, PolicyError
from mlflow_pt_deploy.option_fields import SWITCH, check_choices, option
from mlflow_pt_deploy.selection.policy import LIMITS, Objective, Policy, read_policy
from mlflow_pt_deploy.system.device import AUTO, DEVICE_FORM, is_device

_TRAIN = ("run", "train", "distill")
_DISTILL = ("run", "distill")
_LABEL = ("run", "distill", "search")
_SEARCH = ("run", "search")
_OPTIMIZE = ("run", "optimize")
_PROMOTE = ("run", "optimize", "promote")
_DATA = ("run", "train", "distill", "search", "optimize")


@dataclass(frozen=True)
class Options:
    """Options of all stages; each stage reads those that list it in their metadata.

    Numeric limits (`max_...`) have no effect at 0.

    Raises:
        DataError: `data` is empty.
        ModelError: An option is not one of its choices, `soft_weight` is not between 0 and 1, or
            another number is negative.
        PolicyError: A limit or the objective is invalid.
    """

    data: str = option(
        "catalog",
        "folder or file of CSV or Parquet, hf:OWNER/NAME, catalog (a demo), digits, or abo:FOLDER",
        stages=_DATA,
    )
    teacher: str = option(
        "auto",
        "teacher model: Hugging Face id or folder, minilm, resnet, runs:/... or models:/...; "
        "auto: minilm for texts, resnet for images",
        stages=(*_TRAIN, "search"),
    )
    student: str = option(
        "",
        "existing smaller models, separated by commas: Hugging Face id or folder, runs:/... or "
        "models:/...; with `run`, empty: distill them",
        stages=_OPTIMIZE,
    )
    name: str = option(
        "pt-deploy-demo", "registered model to promote into", stages=("run", "promote")
    )
    replace: str = option(
        "no",
        "replace the champion without comparing it with the chosen variant",
        stages=("run", "promote"),
        choices=SWITCH,
    )
    epochs: int = option(
        -1,
        "teacher: passes over the training data; 0: no training; "
        "-1: 5 if pretrained, 20 from scratch",
        stages=_TRAIN,
    )
    student_epochs: int = option(
        -1,
        "student: passes over the training data; 0: no student; "
        "-1: 6 if pretrained, 30 from scratch",
        stages=_DISTILL,
    )
    student_layers: int = option(
        3, "layers kept of a text teacher; with `distill`, 0: static student", stages=_DISTILL
    )
    keep_layers: str = option(
        "", "numbers of the layers to keep, e.g. 0,2,5; empty: evenly spaced", stages=_DISTILL
    )
    student_heads: int = option(
        0, "most important attention heads kept in each layer; 0: all", stages=_DISTILL
    )
    student_neurons: int = option(
        0, "most important feed-forward neurons kept in each layer; 0: all", stages=_DISTILL
    )
    student_width: float = option(
        1.0,
        "share of the teacher's hidden size that is kept; for images, channel multiplier of the "
        "MobileNetV2 student",
        stages=_DISTILL,
    )
    student_precision: str = option(
        "fp32",
        "precision of distillation; int8-qat: quantization-aware training",
        stages=_DISTILL,
        choices=("fp32", "int8-qat"),
    )
    vocabulary: str = option(
        "all",
        "word pieces that a student keeps; train: those of the training data and frequent ones",
        stages=_DISTILL,
        choices=("all", "train"),
    )
    static_epochs: int = option(
        12, "static student: passes over the training data; 0: no static student", stages=_DISTILL
    )
    image_size: int = option(
        0, "input size of resnet in pixels; 0: chosen by the size of the images", stages=_TRAIN
    )
    learning_rate: float = option(
        0.0, "peak learning rate; 0: chosen by the model's hidden size", stages=_TRAIN
    )
    batch_size: int = option(0, "rows per training step; 0: chosen by the model", stages=_TRAIN)
    temperature: float = option(2.0, "softmax temperature of distillation", stages=_DISTILL)
    soft_weight: float = option(
        0.7, "weight of the teacher's soft labels in the student's loss, 0 to 1", stages=_DISTILL
    )
    relation_weight: float = option(
        0.0, "weight of the similarity loss between rows; 0: not used", stages=_LABEL
    )
    made_texts: float = option(
        0.0,
        "augmented texts that the teacher labels, as a multiple of the training rows",
        stages=_LABEL,
    )
    trials: int = option(
        0,
        "students that a search tries, earlier trials of the study included; 0: no search",
        stages=_SEARCH,
    )
    search_seconds: float = option(
        0.0, "time limit of the search in seconds; 0: no limit", stages=_SEARCH
    )
    kinds: str = option(
        "transformer,static", "kinds of students that a search tries", stages=_SEARCH
    )
    study: str = option(
        "", "name of a study shared by several processes; empty: the run's id", stages=_SEARCH
    )
    storage: str = option(
        "",
        "database URL of the study, e.g. postgresql://...; not logged; "
        "empty: $PT_DEPLOY_STORAGE, else a file in $PT_DEPLOY_HOME",
        stages=_SEARCH,
    )
    variants: str = option(
        "",
        "variants to build, separated by commas, e.g. onnxruntime,openvino-fp32; empty: all",
        stages=_OPTIMIZE,
    )
    wheel_url: str = option(
        "",
        "requirement that logged models name for this package, e.g. the URL of its wheel; empty: "
        "each model carries the wheel",
        stages=_OPTIMIZE,
    )
    seconds: float = option(
        8.0, "timing budget of each variant in seconds", stages=(*_OPTIMIZE, "search")
    )
    threads: int = option(0, "CPU threads of a call; 0: all cores", stages=_OPTIMIZE)
    device: str = option(
        AUTO,
        "device for training, and for variants beside those of the CPU: cpu, cuda, or one GPU such "
        "as cuda:1; auto: a GPU if PyTorch finds one",
        stages=_DATA,
    )
    processes: int = option(
        1,
        "training processes on this machine; each takes its share of every batch, and of the cores "
        "or a GPU of its own",
        stages=_TRAIN,
    )
    limit: int = option(0, "most rows of each split, for a quick trial; 0: all", stages=_DATA)
    seed: int = option(0, "random seed of splits, row order and dropout", stages=_DATA)
    retain: float = option(
        0.99,
        "fraction of the teacher's validation accuracy that a variant must keep",
        stages=(*_PROMOTE, "search"),
    )
    retain_low: float = option(
        -1.0,
        "the same with 95 % confidence; 0: not required; -1: 0.02 below --retain",
        stages=(*_PROMOTE, "search"),
    )
    objective: str = option(
        "latency",
        "what the selection optimizes: latency of one row, throughput in batches, artifact size, "
        "or cost per row in batches",
        stages=_PROMOTE,
        choices=get_args(Objective),
    )
    policy: str = option(
        "", "YAML file with all limits and the objective, instead of flags", stages=_PROMOTE
    )
    max_latency_p95_ms: float = option(
        0.0, "limit of the 95th percentile latency of a row in ms; 0: no limit", stages=_PROMOTE
    )
    max_artifact_mb: float = option(
        0.0, "limit of the artifact's size in MB (10^6 bytes); 0: no limit", stages=_PROMOTE
    )
    max_peak_rss_mb: float = option(
        0.0, "limit of peak resident memory in MB (10^6 bytes); 0: no limit", stages=_PROMOTE
    )
    max_peak_device_mb: float = option(
        0.0,
        "limit of a GPU variant's device memory in MB (10^6 bytes); 0: no limit",
        stages=_PROMOTE,
    )
    min_throughput_rows_per_s: float = option(
        0.0, "minimum rows per second in batches; 0: no limit", stages=_PROMOTE
    )
    min_class_recall: float = option(
        0.0, "minimum share of correct rows in every class; 0: no limit", stages=_PROMOTE
    )
    min_agreement_perturbed: float = option(
        0.0, "minimum agreement with the teacher on perturbed rows; 0: no limit", stages=_PROMOTE
    )
    min_batch_invariance: float = option(
        0.0,
        "minimum share of rows whose label does not depend on the batch; 0: no limit",
        stages=_PROMOTE,
    )
    runtimes: str = option("", "allowed runtimes, separated by commas; empty: all", stages=_PROMOTE)
    devices: str = option(
        "", "allowed devices, separated by commas: cpu, cuda; empty: all", stages=_PROMOTE
    )
    price_per_core_hour: float = option(
        0.0, "price of a core for an hour, for --objective cost", stages=_PROMOTE
    )
    price_per_gpu_hour: float = option(
        0.0, "price of a GPU without cores for an hour, for --objective cost", stages=_PROMOTE
    )
    resume: str = option("", "id of an interrupted run to resume", stages=_DATA)

    def __post_init__(self) -> None:
        if not self.data.strip():
            raise DataError(
                "--data is missing. Give the data that the model was trained on: a folder or file "
                "of CSV or Parquet with the columns `text` (or `image`) and `label`, "
                "hf:OWNER/NAME, or catalog for a model of the demo."
            )
        self._given_policy()  # a file is read when it is needed: it may be gone on a resume
        check_choices(self, ModelError)
        if not is_device(self.device):
            raise ModelError(f"device is {self.device!r}; give {DEVICE_FORM}.")
        if self.processes < 1:
            raise ModelError(f"processes is {self.processes}; give a number of at least 1.")
        if not 0 <= self.soft_weight <= 1:
            raise ModelError(f"soft_weight is {self.soft_weight}; give a number from 0 to 1.")
        for name in ("relation_weight", "made_texts"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ModelError(f"{name} is {getattr(self, name)}; give a number of at least 0.")

    def selection_policy(self) -> Policy:
        """Limits and objective of the selection.

        Raises:
            PolicyError: One of them is invalid, or flags are given beside a file.
        """
        given = self._given_policy()
        if not self.policy:
            return given
        if given != Policy():
            raise PolicyError(
                "--policy is given beside flags for limits or the objective; give one or the other."
            )
        return read_policy(Path(self.policy))

    def _given_policy(self) -> Policy:
        limits = {name: getattr(self, name) or None for name in LIMITS}
        return Policy(
            retain=self.retain,
            retain_low=self.retain_low,
            objective=self.objective,  # type: ignore[arg-type]  # checked by Policy
            runtimes=_names(self.runtimes),
            devices=_names(self.devices),
            price_per_core_hour=self.price_per_core_hour or None,
            price_per_gpu_hour=self.price_per_gpu_hour or None,
            **limits,
        )

    def to_json(self) -> str:
        """All options except `resume`, `storage` and `processes`, which belong to one call."""
        options = {**asdict(self), "resume": "", "storage": ""}
        del options["processes"]
        return json.dumps(options)

    @classmethod
    def from_json(cls, text: str) -> Options:
        """Read the output of `to_json`."""
        return cls(**json.loads(text))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
