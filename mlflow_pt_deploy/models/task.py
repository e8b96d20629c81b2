"""Determine the task of a model folder from its small files, before its weights are loaded.

Single-label classification of one text or one image is supported. A new head can be trained on any
pretrained network for which transformers has a text or image classifier.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models.contents import foreign_format

TEXT, IMAGE = "text classification", "image classification"
_ENCODER = "pretraining"  # a network without a task head
_SUPPORTED = "only single-label classification of one text or one image is supported."
_FINE_TUNE = "Fine-tune it first: pt-deploy train --teacher ... --data ..."
_PAIRS = re.compile(r"(not|non)?[-_ ]*entail(ment|s|ed)?", re.IGNORECASE)
_CONSTANT = re.compile(r"MODEL_FOR_([A-Z0-9_]+?)_(?:MAPPING_)?NAMES")
_CLASS = re.compile(r"For([A-Z]\w+)$")
_RENAMED = {
    "sequence classification": TEXT,
    "masked lm": "masked language modeling",
    "causal lm": "text generation",
    "seq to seq causal lm": "text-to-text generation",
    "ctc": "speech recognition",
}
_PRETRAINING = {
    "backbone",
    "causal image modeling",
    "image",
    "masked image modeling",
    "masked language modeling",
    "next sentence prediction",
    "pretraining",
    "text encoding",
    "text generation",
}
"""transformers' names of pretraining heads, and of networks without a head."""


@dataclass(frozen=True)
class Task:
    """Task of a model according to its config.json.

    Attributes:
        name: E.g. ``token classification``; empty if unknown.
        architecture: transformers class, e.g. ``BertForTokenClassification``; may be empty.
        pretrained_only: Whether the network was pretrained but not fine-tuned for a task.
    """

    name: str
    architecture: str
    pretrained_only: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Task:
        """Read the task from a parsed config.json."""
        names = config.get("architectures") or [""]
        architecture = str(names[0] if isinstance(names, list) else names)
        tasks = _tasks().get(architecture, [])
        for wanted in (TEXT, IMAGE):
            if wanted in tasks:
                return cls(wanted, architecture)
        finished = [task for task in tasks if task not in _PRETRAINING]
        if finished:
            return cls(finished[0], architecture)
        if tasks or not architecture:
            # Prefer a more specific name than `_ENCODER`.
            named = sorted(tasks, key=lambda task: task == _ENCODER)
            return cls(named[0] if tasks else "", architecture, pretrained_only=bool(tasks))
        return cls(_task_from_name(architecture), architecture)


def read_config(folder: Path, reference: str) -> dict[str, Any]:
    """Read config.json of a model folder and check that transformers can load the folder.

    Raises:
        ModelError: The folder has a format of another library, needs its own code, or its
            config.json is missing or damaged.
    """
    if problem := foreign_format(folder):
        raise ModelError(f"{reference} {problem}")
    config = _json(folder / "config.json", reference)
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        known = _json(folder / name, reference) if (folder / name).is_file() else {}
        if known.get("auto_map"):
            raise ModelError(
                f"{reference} needs its own Python code ({name} has auto_map), which is never run. "
                "Give a model that transformers supports without code; if it supports this one, "
                f"remove auto_map from {name}."
            )
    if "model_type" not in config:
        found = "is a timm model" if "architecture" in config else "has no model_type"
        raise ModelError(
            f"{reference} {found} (config.json), so transformers cannot load it; {_SUPPORTED} Give "
            "a folder written by transformers' save_pretrained."
        )
    if config["model_type"] not in CONFIG_MAPPING:
        raise ModelError(
            f"{reference} has the model_type {config['model_type']!r} (config.json), which "
            f"transformers {transformers.__version__} does not support. Install a newer "
            "transformers, or choose another model."
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{reference} is already quantized (quantization_config in config.json). Give the "
            "original model in float32, float16 or bfloat16."
        )
    return config


def check_classifier(config: Mapping[str, Any], folder: Path, reference: str) -> None:
    """Check that a folder is a fine-tuned single-label classifier of one text or one image.

    Raises:
        ModelError: The model is for another task; the message names the task and an alternative.
    """
    task = Task.from_config(config)
    if kind := _sentence_transformers(folder):
        raise _unsupported(reference, *kind)
    if task.pretrained_only:
        raise ModelError(
            f"{reference} was not trained as a classifier: it has no classification head "
            f"({task.architecture}, for {task.name}). {_FINE_TUNE}"
        )
    if task.name not in ("", TEXT, IMAGE):
        raise _unsupported(reference, f"{task.name} ({task.architecture})", _suggestion(config))
    if problem := _task_of_outputs(config):
        raise _unsupported(reference, *problem)
    if task.name == "" and _classifier_type(config) is None:
        raise _unsupported(reference, f"another task (model_type {config['model_type']})", "")
    _check_labels(config, reference)
    _check_channels(config, reference)


def check_trainable(config: Mapping[str, Any], reference: str) -> str:
    """Check that a new classification head can be trained on a network.

    Returns:
        A note that the head of another task is replaced; empty if there is none.

    Raises:
        ModelError: transformers has no text or image classifier for this architecture.
    """
    task = Task.from_config(config)
    if _classifier_type(config) is None:
        what = f"{task.name or 'another task'} ({task.architecture or config['model_type']})"
        raise _unsupported(reference, what, "Use a pretrained encoder of texts or images.")
    _check_channels(config, reference)
    old_task = task.name
    if task.pretrained_only or old_task in ("", TEXT, IMAGE):
        old_task = (_task_of_outputs(config) or ("",))[0] if old_task in (TEXT, IMAGE) else ""
    return old_task and (
        f"{reference} was trained for {old_task}; its head is replaced by a new classification "
        "head."
    )


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether the classifier of a config is for images (else for texts)."""
    return IMAGE in (Task.from_config(config).name, _classifier_type(config))


def _classifier_type(config: Mapping[str, Any]) -> str | None:
    """The classifier that transformers has for a model_type: text, image or none."""
    kind = config["model_type"]
    named = Task.from_config(config).name
    texts = kind in _types("SEQUENCE_CLASSIFICATION")
    images = kind in _types("IMAGE_CLASSIFICATION")
    if images and (not texts or named == IMAGE):
        return IMAGE
    return TEXT if texts else None


def _types(constant: str) -> set[str]:
    """Model types of a task in transformers, including types registered at run time."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{constant}_MAPPING")
    registered = {config.model_type for config in mapping._extra_content}
    return {*getattr(modeling_auto, f"MODEL_FOR_{constant}_MAPPING_NAMES"), *registered}


@cache
def _tasks() -> dict[str, list[str]]:
    """Tasks of each transformers class, from the tables of transformers."""
    found: dict[str, list[str]] = {}
    for constant, table in vars(modeling_auto).items():
        match = _CONSTANT.fullmatch(constant)
        name = match[1].replace("_", " ").lower() if match else _ENCODER
        if match or constant == "MODEL_MAPPING_NAMES":
            for classes in table.values():
                for each in [classes] if isinstance(classes, str) else classes:
                    found.setdefault(each, []).append(_RENAMED.get(name, name))
    return found


def _task_from_name(architecture: str) -> str:
    """Task of a class that is not in the tables of transformers, from its name."""
    match = _CLASS.search(architecture)
    if match is None:
        return "an unknown task"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", match[1]).lower()
    return _RENAMED.get(words, words)


def _suggestion(config: Mapping[str, Any]) -> str:
    """Suggestion for a model of another task."""
    if _classifier_type(config) is None:
        return ""
    return "Train a classifier from its network: pt-deploy train --teacher ... --data ..."


def _task_of_outputs(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Unsupported task of a classifier according to its outputs, and a suggestion."""
    kind, labels = config.get("problem_type"), _labels(config)
    if kind == "multi_label_classification":
        return "multi-label classification (problem_type)", "Fine-tune it with one label per row."
    if kind == "regression" or len(labels) == 1:
        reason = "problem_type" if kind == "regression" else "one output"
        return (
            f"regression, scores or text pairs ({reason})",
            "Fine-tune it with two or more labels: pt-deploy train --teacher ... --data ...",
        )
    if any(_PAIRS.fullmatch(str(label).strip()) for label in labels.values()):
        return (
            "text pairs (natural language inference, with entailment labels)",
            "Fine-tune it on single texts: pt-deploy train --teacher ... --data ...",
        )
    return None


def _sentence_transformers(folder: Path) -> tuple[str, str] | None:
    """Task of a sentence-transformers folder, and a suggestion."""
    settings = _json_or_empty(folder / "config_sentence_transformers.json")
    config = _json_or_empty(folder / "config.json")
    if settings.get("model_type") == "CrossEncoder" or "sentence_transformers" in config:
        return "text pairs (a cross-encoder of sentence-transformers)", _FINE_TUNE
    if (folder / "modules.json").is_file():
        return "sentence embeddings (sentence-transformers)", _FINE_TUNE
    return None


def _labels(config: Mapping[str, Any]) -> dict[str, Any]:
    labels = config.get("id2label")
    if labels is None:
        count = config.get("num_labels")
        return {str(index): "" for index in range(count if isinstance(count, int) else 2)}
    return dict(labels) if isinstance(labels, dict) else {}


def _check_labels(config: Mapping[str, Any], reference: str) -> None:
    labels = config.get("id2label")
    if labels is None:
        return
    problem = ""
    if not isinstance(labels, dict) or {str(key) for key in labels} != set(
        map(str, range(len(labels)))
    ):
        problem = "does not number the outputs 0, 1, 2, ..."
    elif twice := next(_duplicates(labels), ""):
        problem = f"has the name {twice!r} twice"
    if problem:
        raise ModelError(
            f"{reference}: id2label in config.json {problem}. Give each output a unique name."
        )


def _check_channels(config: Mapping[str, Any], reference: str) -> None:
    channels = config.get("num_channels", 3)
    if reads_images(config) and channels != 3:
        raise ModelError(f"{reference} has {channels} input channels; choose a model with three.")


def _duplicates(labels: Mapping[str, Any]) -> Iterator[str]:
    seen: set[str] = set()
    for name in map(str, labels.values()):
        if name in seen:
            yield name
        seen.add(name)


def _unsupported(reference: str, task: str, suggestion: str) -> ModelError:
    return ModelError(f"{reference} is a model for {task}; {_SUPPORTED} {suggestion}".strip())


def _json(path: Path, reference: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded (it has no {path.name}). Give a folder "
            "written by transformers' save_pretrained."
        ) from error
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded ({path.name} is damaged: {error}). Copy or "
            "download it again."
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{reference}: no classifier can be loaded ({path.name} does not contain a JSON "
            "object). Copy or download it again."
        )
    return found


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}
