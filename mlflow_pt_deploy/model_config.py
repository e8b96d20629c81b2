"""What a user may set where a model is served: names, defaults, checks.

Knows neither MLflow nor the batcher that obeys them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mlflow_pt_deploy.errors import ServingError


@dataclass(frozen=True)
class Limits:
    """How large a batch and how long a queue may become.

    Attributes:
        max_batch_rows: Most rows in one call of the model.
        max_batch_tokens: Most tokens in one call, padding included (rows x longest). A single
            row that is longer is computed alone. An image counts one token for each 16 x 16 pixels
            of the model's input.
        max_wait_ms: How long an idle model waits for more rows to batch; 0: not at all.
        queue_rows: Most rows in the queue, over all requests.
        deadline_ms: A request that is not answered by then fails with 504; 0: never.
    """

    max_batch_rows: int = 32
    max_batch_tokens: int = 2048
    max_wait_ms: float = 0
    queue_rows: int = 1024
    deadline_ms: float = 10_000


@dataclass(frozen=True)
class ServingOptions(Limits):
    """What a user may set where the model is served; MLflow passes it as ``model_config``.

    Attributes:
        device: Where the model runs: ``cpu`` or ``cuda``.
        num_threads: Threads for one call of the model; 0: what the runtime chooses.
        allow_code: Load formats that carry code though nobody vouched for their digest.
    """

    device: str = "cpu"
    num_threads: int = 0
    allow_code: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None) -> ServingOptions:
        """Check a ``model_config``; what is not given keeps its default.

        Raises:
            ServingError: An unknown key, a wrong type or a value out of range; names the key.
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
"""Every serving option with its default; MLflow drops keys that the MLmodel does not declare."""


def parse_config(pairs: Sequence[str]) -> dict[str, Any]:
    """A ``model_config`` from words such as ``num_threads=2``.

    Raises:
        ServingError: A word has no ``=``; names it.
    """
    config: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign:
            raise ServingError(f"{pair} is no option; write it as KEY=VALUE")
        config[key] = parse_value(text)
    return config


def parse_value(text: str) -> str | int | float | bool:
    """The number or truth value that a word of the command line means, or the word itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


_AT_LEAST_ONE = ("max_batch_rows", "max_batch_tokens", "queue_rows")


def _problem(key: str, value: object) -> str | None:
    """What an option's value should have been, or None where it is right."""
    if key == "device":
        return None if isinstance(value, str) and value else "a device such as cpu or cuda"
    if key == "allow_code":
        return None if isinstance(value, bool) else "true or false"
    least = 1 if key in _AT_LEAST_ONE else 0
    whole = not key.endswith("_ms")
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if number and least <= value < 2**31:  # type: ignore[operator]
        return None
    return f"a {'whole ' if whole else ''}number of at least {least}"
