"""What an MLflow model holds, by its MLmodel file: which library's model, and for which task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_PAIRS = "zero-shot"  # pipelines that classify by reading a text beside each label
_GIVE = (
    "Give a model logged with mlflow.transformers (weights included), a stage's "
    "runs:/RUN_ID/model, or an eager fp32 variant."
)
_SUPPORTED = "supported is single-label classification of one text or of one image"


def other_model(root: Path) -> str:
    """What is wrong with a folder of MLflow's transformers flavor; empty if it can be tried.

    Args:
        root: The downloaded model, MLmodel included.
    """
    flavor = _flavors(root).get("transformers") or {}
    task = str(flavor.get("task", ""))
    if (root / "peft").is_dir() or flavor.get("peft_adaptor"):
        return (
            "is a PEFT adapter beside its base model. Merge the two first, with peft's "
            "merge_and_unload, and log the result."
        )
    if task.startswith(_PAIRS):
        return (
            f"was logged for {task}, which reads pairs of texts or of an image and a text; "
            f"{_SUPPORTED}. Fine-tune its network: pt-deploy train --teacher FOLDER --data ..."
        )
    if flavor and not (root / "model").is_dir():
        return (
            f"holds no weights, only the name of {flavor.get('source_model_name')} on the hub. "
            "Give that id, or log the model with save_pretrained=True."
        )
    return ""


def no_model(root: Path) -> str:
    """Why a folder of MLflow's cannot be read, and what can."""
    names = [name for name in _flavors(root) if name != "python_function"]
    found = f", but one of {' and '.join(names)}; {_SUPPORTED}" if names else ""
    return f"holds no Hugging Face model{found}. {_GIVE}"


def _flavors(root: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load((root / "MLmodel").read_text(encoding="utf8"))["flavors"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
