"""Inspect the MLmodel file of an MLflow model: library and task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_PAIRS = "zero-shot"  # pipelines that score pairs of a text and a label
_REMEDY = (
    "Give a model logged with mlflow.transformers (weights included), a stage's "
    "runs:/RUN_ID/model, or an eager fp32 variant."
)
_SUPPORTED = "only single-label classification of one text or one image is supported"


def unsupported_reason(root: Path) -> str:
    """Why a model of the transformers flavor is not supported; empty if it may be.

    Args:
        root: Folder of the model, with MLmodel.
    """
    flavor = _flavors(root).get("transformers") or {}
    task = str(flavor.get("task", ""))
    if (root / "peft").is_dir() or flavor.get("peft_adaptor"):
        return (
            "is a PEFT adapter with its base model. Merge both first with peft's merge_and_unload, "
            "and log the result."
        )
    if task.startswith(_PAIRS):
        return (
            f"was logged for {task}, which scores pairs of texts or of an image and a text; "
            f"{_SUPPORTED}. Fine-tune its network: pt-deploy train --teacher FOLDER --data ..."
        )
    if flavor and not (root / "model").is_dir():
        return (
            f"contains no weights, only the hub id {flavor.get('source_model_name')}. Give that "
            "id, or log the model with save_pretrained=True."
        )
    return ""


def missing_model_reason(root: Path) -> str:
    """Why an MLflow model without a Hugging Face model is not supported, and the remedy."""
    names = [name for name in _flavors(root) if name != "python_function"]
    found = f", but one of {' and '.join(names)}; {_SUPPORTED}" if names else ""
    return f"contains no Hugging Face model{found}. {_REMEDY}"


def _flavors(root: Path) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load((root / "MLmodel").read_text(encoding="utf8"))["flavors"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
