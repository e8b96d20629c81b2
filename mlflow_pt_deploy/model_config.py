"""Serving options of a model (MLflow's ``model_config``): declarations, checks and parsing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.option_fields import option, option_specs
from mlflow_pt_deploy.system.device import AUTO, DEVICE_FORM, is_device


@dataclass(frozen=True)
class Limits:
    """Limits of the micro-batcher: size of a batch and length of the queue."""

    max_batch_rows: int = option(32, "most rows in one call of the model")
    max_batch_tokens: int = option(
        2048,
        "most tokens in one call, padding included (rows x longest row); a longer row is computed "
        "alone; an image counts one token per 16 x 16 pixels of the model's input",
    )
    max_wait_ms: float = option(0, "ms that an idle model waits for more rows to batch")
    queue_rows: int = option(1024, "most rows in the queue, over all requests")
    deadline_ms: float = option(
        10_000, "a request that takes longer than this many ms fails with 504; 0: never"
    )


@dataclass(frozen=True)
class ServingOptions(Limits):
    """Options of a served model; MLflow passes them as ``model_config``."""

    device: str = option(
        AUTO,
        "device of the model: cpu, cuda, or one GPU such as cuda:1; auto: the device that it was "
        "built for",
    )
    num_threads: int = option(0, "CPU threads of a call; 0: chosen by the runtime")
    allow_code: bool = option(
        False, "load formats that carry code although their digest is not vouched for"
    )
    explain_method: str = option(
        "auto",
        "how predictions are explained; auto: exactly for static students in NumPy, by leaving "
        "words out for other models; integrated_gradients: for eager variants in fp32",
        choices=("auto", "integrated_gradients"),
    )

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> ServingOptions:
        """Check a ``model_config``; missing options keep their defaults.

        Raises:
            ServingError: A key is unknown, or a value has the wrong type or is out of range.
        """
        config = config or {}
        if unknown := sorted(config.keys() - MODEL_CONFIG.keys()):
            raise ServingError(
                f"model_config has no {', '.join(unknown)}; it has {', '.join(MODEL_CONFIG)}"
            )
        for key, value in config.items():
            if problem := _problem(key, value):
                raise ServingError(f"model_config: {key} must be {problem}, not {value!r}")
        return cls(**config)


MODEL_CONFIG: dict[str, str | int | float | bool] = asdict(ServingOptions())
"""Default of every serving option; MLflow drops keys that the MLmodel file does not declare."""


def parse_config(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` arguments such as ``num_threads=2`` into a ``model_config``.

    Raises:
        ServingError: An argument has no ``=``.
    """
    config: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise ServingError(f"{pair} is not an option; write it as KEY=VALUE")
        config[key] = parse_value(text)
    return config


def parse_value(text: str) -> str | int | float | bool:
    """Parse a command-line value as a bool, int or float, else keep the string."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


_CHOICES = {spec.name: spec.choices for spec in option_specs(ServingOptions) if spec.choices}
_AT_LEAST_ONE = ("max_batch_rows", "max_batch_tokens", "queue_rows")


def _problem(key: str, value: object) -> str | None:
    """Describe what the value of an option must be; None if it is valid."""
    if key == "device":
        return None if isinstance(value, str) and is_device(value) else DEVICE_FORM
    if key == "allow_code":
        return None if isinstance(value, bool) else "true or false"
    if choices := _CHOICES.get(key):
        return None if value in choices else f"one of {', '.join(choices)}"
    least = 1 if key in _AT_LEAST_ONE else 0
    whole = not key.endswith("_ms")
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if number and least <= value < 2**31:  # type: ignore[operator]
        return None
    return f"a {'whole ' if whole else ''}number of at least {least}"
