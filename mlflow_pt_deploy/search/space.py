"""Search space and the parameters of one trial.

The space is conditional: each kind of student has its own ranges, and only transformers have
layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.errors import SearchError

if TYPE_CHECKING:
    import optuna

_INTERVALS = ("layers", "temperature", "soft_weight", "learning_rate", "epochs")
_CHOICES = ("variants", "batch_size", "threads", "heads", "width")


@dataclass(frozen=True)
class TrialParams:
    """Parameters of one trial: the student's shape, its training, and its runtime.

    Attributes:
        kind: ``transformer`` or ``static``.
        layers: Number of the teacher's layers to keep; 0 for a static student.
        temperature: Distillation temperature.
        soft_weight: Weight of the soft labels in the loss, 0 to 1.
        learning_rate: Peak learning rate.
        batch_size: Rows per training step.
        epochs: Passes over train.
        variant: Runtime and precision, e.g. ``onnxruntime-fp32``.
        threads: Threads per call.
        heads: Attention heads to keep in each layer; 0 keeps all.
        width: Share of the teacher's hidden size to keep; 1 for a static student.
    """

    kind: str
    layers: int
    temperature: float
    soft_weight: float
    learning_rate: float
    batch_size: int
    epochs: int
    variant: str
    threads: int
    heads: int = 0
    width: float = 1.0

    def __str__(self) -> str:
        layers = f" of {_plural(self.layers, 'layer')}" if self.layers else ""
        layers += f" with {_plural(self.heads, 'head')} each" if self.heads else ""
        layers += f", {self.width:.0%} as wide," if self.width < 1 else ""
        threads = _plural(self.threads, "thread")
        return f"a {self.kind} student{layers} on {self.variant} with {threads}"


@dataclass(frozen=True)
class Ranges:
    """Ranges of the parameters of one kind of student, see `TrialParams`.

    Attributes:
        variants, batch_size, threads, heads, width: Choices.
        layers, temperature, soft_weight, learning_rate, epochs: Inclusive lower and upper bound.
            Temperature and learning rate are sampled on a logarithmic scale.
    """

    variants: tuple[str, ...]
    layers: tuple[int, int] = (0, 0)
    temperature: tuple[float, float] = (1.0, 8.0)
    soft_weight: tuple[float, float] = (0.3, 1.0)
    learning_rate: tuple[float, float] = (5e-5, 5e-4)
    batch_size: tuple[int, ...] = (16, 32, 64)
    epochs: tuple[int, int] = (2, 8)
    threads: tuple[int, ...] = (1,)
    heads: tuple[int, ...] = (0,)
    width: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for name in _INTERVALS:
            low, high = getattr(self, name)
            minimum = 0 if name in ("layers", "soft_weight") else 1 if name == "epochs" else 1e-12
            if not minimum <= low <= high < float("inf"):
                raise SearchError(
                    f"{name} is ({low}, {high}); give a lower bound of at least {minimum:g} and an "
                    "upper bound that is not below it."
                )
        if self.soft_weight[1] > 1:
            raise SearchError(f"soft_weight goes up to {self.soft_weight[1]}; the maximum is 1.")
        for name in _CHOICES:
            choices = getattr(self, name)
            if not choices or len(set(choices)) < len(choices):
                raise SearchError(
                    f"{name} is {choices!r}; give at least one choice, without repetitions."
                )


TRANSFORMER = Ranges(("onnxruntime-fp32", "onnxruntime-int8-dynamic"), layers=(1, 6))
STATIC = Ranges(
    ("numpy-fp32", "onnxruntime-fp32"),
    learning_rate=(5e-4, 1e-2),
    batch_size=(64, 128, 256),
    epochs=(6, 20),
)


@dataclass(frozen=True)
class Space:
    """The search space; a kind that is None is excluded.

    Args:
        transformer: Ranges of transformer students, made from the teacher's layers.
        static: Ranges of static students, which sum embeddings.

    Raises:
        SearchError: Both kinds are None, or the range of layers does not fit a kind.
    """

    transformer: Ranges | None = TRANSFORMER
    static: Ranges | None = STATIC

    def __post_init__(self) -> None:
        if not self.kinds():
            raise SearchError("the search space is empty; give the ranges of at least one kind.")
        if self.transformer and self.transformer.layers[0] < 1:
            raise SearchError(f"layers is {self.transformer.layers}; a transformer has at least 1.")
        if self.static and self.static.layers != (0, 0):
            raise SearchError(
                f"layers is {self.static.layers}; a static student has none, give (0, 0)."
            )

    def kinds(self) -> dict[str, Ranges]:
        """Ranges of each kind that is not excluded."""
        both = {"transformer": self.transformer, "static": self.static}
        return {kind: ranges for kind, ranges in both.items() if ranges}

    def record(self) -> dict[str, Any]:
        """Return the space as plain JSON data, to compare it with that of a stored study."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def propose(trial: optuna.Trial, space: Space) -> TrialParams:
    """Sample a point with Optuna; parameter names contain the kind, e.g. ``static.epochs``."""
    kinds = space.kinds()
    kind = trial.suggest_categorical("kind", list(kinds))
    ranges = kinds[kind]

    def number(name: str, log: bool = False) -> float:
        low, high = getattr(ranges, name)
        return trial.suggest_float(f"{kind}.{name}", low, high, log=log)

    return TrialParams(
        kind=kind,
        layers=trial.suggest_int(f"{kind}.layers", *ranges.layers),
        temperature=number("temperature", log=True),
        soft_weight=number("soft_weight"),
        learning_rate=number("learning_rate", log=True),
        batch_size=trial.suggest_categorical(f"{kind}.batch_size", ranges.batch_size),
        epochs=trial.suggest_int(f"{kind}.epochs", *ranges.epochs),
        variant=trial.suggest_categorical(f"{kind}.variant", ranges.variants),
        threads=trial.suggest_categorical(f"{kind}.threads", ranges.threads),
        heads=trial.suggest_categorical(f"{kind}.heads", ranges.heads),
        width=trial.suggest_categorical(f"{kind}.width", ranges.width),
    )


def read_point(params: Mapping[str, Any]) -> TrialParams | None:
    """Return the point of a stored trial; None if its process died while sampling."""
    values = {name.rpartition(".")[2]: value for name, value in params.items()}
    return (
        TrialParams(**values)
        if set(values) == {field.name for field in fields(TrialParams)}
        else None
    )


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"
