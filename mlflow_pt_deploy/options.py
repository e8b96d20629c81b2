"""Everything a user can ask of the line, in one record.

Knows names and defaults; the command line, MLproject and Python all go through it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from mlflow_pt_deploy.errors import DataError, ModelError
from mlflow_pt_deploy.hardware import check_device
from mlflow_pt_deploy.policy import Policy

DEVICES = ("cpu", "cuda")
VOCABULARIES = ("all", "train")
PRECISIONS = ("fp32", "int8-qat")


@dataclass(frozen=True)
class Options:
    """Everything a user can ask of the line; each stage reads what concerns it.

    Attributes:
        data: See `load_data`; the command line has no default for stages that take a model.
        teacher: Hugging Face id or folder, ``minilm``, ``resnet``, an MLflow address, or ``auto``:
            ``minilm`` for texts, ``resnet`` for images.
        student: The same, for students that exist already, separated by commas; empty: distill.
        name: Registered model to promote into.
        epochs: Passes over train for the teacher; 0 takes it as it is, -1 chooses: 5, or 20 for
            one from scratch.
        student_epochs: Passes for the student; 0 makes none, -1 chooses: 6, or 30 from scratch.
        student_layers: Layers that it keeps of a teacher of texts; 0, for `distill` alone: static.
        keep_layers: Which ones instead, e.g. ``0,2,5``; empty: evenly spread.
        student_heads: Attention heads that each keeps, the most important ones; 0: all.
        student_neurons: The same of feed-forward neurons.
        student_width: Share of the teacher's hidden width that a student of texts keeps, or of a
            MobileNetV2's channels that a student of images has.
        student_precision: ``fp32``, or ``int8-qat``: the student learns with int8's rounding.
        vocabulary: ``all``, or ``train``: students keep train's word pieces and frequent ones.
        static_epochs: Passes for the static student of texts; 0 makes none.
        image_size: Edge in pixels at which ``resnet`` looks at images; 0: by their own size.
        learning_rate: Peak; 0 chooses by the model's width.
        batch_size: Rows a training step; 0 chooses by the model.
        temperature: Of the soft labels.
        soft_weight: Share of the soft labels in a student's loss, 0 to 1.
        relation_weight: Of the relation loss, besides; 0: without.
        made_texts: Texts made from train for the teacher to label too, as a multiple of train.
        trials: Students that a search tries, or has tried before; 0 for no search.
        search_seconds: Time for it; 0: no limit.
        kinds: Of students that it tries: ``transformer``, ``static``.
        study: Its name, to share it between processes; empty: the id of its run.
        storage: Address of its database, which may hold a password and is not logged; empty: a
            file in ``$PT_DEPLOY_HOME``.
        variants: Runtimes or runtimes with a precision to build, separated by commas; empty: all.
        seconds: Timing budget for each variant.
        threads: Threads for one call; 0: all cores.
        device: Where to train, ``cpu`` or ``cuda``; variants are timed on the CPU.
        limit: At most this many rows a split, for a quick trial; 0: all.
        seed: Of cuts, order of rows and dropout.
        retain, objective, max_latency_p95_ms, max_artifact_mb, max_peak_rss_mb: See `Policy`;
            0 sets no limit.
        resume: Id of an interrupted run to go on with.

    Raises:
        DataError: `data` is empty.
        ModelError: `vocabulary` or `student_precision` is none of those, `soft_weight` is no share,
            or a number is below 0.
    """

    data: str = "catalog"
    teacher: str = "auto"
    student: str = ""
    name: str = "pt-deploy-demo"
    epochs: int = -1
    student_epochs: int = -1
    student_layers: int = 3
    keep_layers: str = ""
    student_heads: int = 0
    student_neurons: int = 0
    student_width: float = 1.0
    student_precision: str = "fp32"
    vocabulary: str = "all"
    static_epochs: int = 12
    image_size: int = 0
    learning_rate: float = 0.0
    batch_size: int = 0
    temperature: float = 2.0
    soft_weight: float = 0.7
    relation_weight: float = 0.0
    made_texts: float = 0.0
    trials: int = 0
    search_seconds: float = 0.0
    kinds: str = "transformer,static"
    study: str = ""
    storage: str = ""
    variants: str = ""
    seconds: float = 8.0
    threads: int = 0
    device: str = "cpu"
    limit: int = 0
    seed: int = 0
    retain: float = 0.99
    objective: str = "latency"
    max_latency_p95_ms: float = 0.0
    max_artifact_mb: float = 0.0
    max_peak_rss_mb: float = 0.0
    resume: str = ""

    def __post_init__(self) -> None:
        if not self.data.strip():
            raise DataError(
                "--data is missing. Give the data that the model was made for: a folder or file of "
                "CSV or Parquet with the columns `text` (or `image`) and `label`, hf:OWNER/NAME, "
                "or catalog for a model of the demo."
            )
        lists = {
            "device": DEVICES,
            "vocabulary": VOCABULARIES,
            "student_precision": PRECISIONS,
        }
        for name, known in lists.items():
            if getattr(self, name) not in known:
                raise ModelError(
                    f"{name} is {getattr(self, name)!r}; choose from {', '.join(known)}."
                )
        if self.device != "cpu":
            check_device(self.device)
        if not 0 <= self.soft_weight <= 1:
            raise ModelError(f"soft_weight is {self.soft_weight}; give a share from 0 to 1.")
        for name in ("relation_weight", "made_texts"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ModelError(f"{name} is {getattr(self, name)}; give a number from 0 on.")

    def policy(self) -> Policy:
        """The limits among the options.

        Raises:
            PolicyError: One makes no sense.
        """
        return Policy(
            retain=self.retain,
            max_latency_p95_ms=self.max_latency_p95_ms or None,
            max_artifact_mb=self.max_artifact_mb or None,
            max_peak_rss_mb=self.max_peak_rss_mb or None,
            objective=self.objective,  # type: ignore[arg-type]  # Policy checks it
        )

    def to_json(self) -> str:
        """All options but `resume` and `storage`, which belong to one call and not to the run."""
        return json.dumps({**asdict(self), "resume": "", "storage": ""})

    @classmethod
    def from_json(cls, text: str) -> Options:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))
