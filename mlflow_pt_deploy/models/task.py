"""Which task a model folder was made for, read from its small files before its weights.

Two kinds of model are supported: single-label classification of one text, or of one image. A new
head can also be trained on any pretrained network that transformers can give such a head.
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
from mlflow_pt_deploy.models.contents import other_format

TEXT, IMAGE = "text classification", "image classification"
_ENCODER = "pretraining"  # of a network without a task's head
_SUPPORTED = "supported is single-label classification of one text or of one image."
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
_UNFINISHED = {
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
"""transformers' names of heads that networks are pretrained with, or of none."""


@dataclass(frozen=True)
class Task:
    """What a folder's config.json says that the model is for.

    Attributes:
        name: In words, e.g. ``token classification``; empty where the file does not say.
        architecture: transformers' class, e.g. ``BertForTokenClassification``; may be empty.
        unfinished: Whether the network was pretrained only, and for no task of a user's.
    """

    name: str
    architecture: str
    unfinished: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Task:
        """Read the task from a parsed config.json."""
        names = config.get("architectures") or [""]
        architecture = str(names[0] if isinstance(names, list) else names)
        tasks = _tasks().get(architecture, [])
        for wanted in (TEXT, IMAGE):
            if wanted in tasks:
                return cls(wanted, architecture)
        finished = [task for task in tasks if task not in _UNFINISHED]
        if finished:
            return cls(finished[0], architecture)
        if tasks or not architecture:
            named = sorted(tasks, key=lambda task: task == _ENCODER)  # the more telling one
            return cls(named[0] if tasks else "", architecture, unfinished=bool(tasks))
        return cls(_by_name(architecture), architecture)


def read_config(folder: Path, reference: str) -> dict[str, Any]:
    """The parsed config.json of a model folder that transformers alone can read.

    Raises:
        ModelError: The folder has another library's format, needs code of its own, or its
            config.json is missing or damaged.
    """
    if problem := other_format(folder):
        raise ModelError(f"{reference} {problem}")
    config = _json(folder / "config.json", reference)
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        known = _json(folder / name, reference) if (folder / name).is_file() else {}
        if known.get("auto_map"):
            raise ModelError(
                f"{reference} needs Python code of its own ({name} has auto_map), which is never "
                "run here. Give a model that transformers knows by itself; if it knows this one, "
                f"remove auto_map from {name}."
            )
    if "model_type" not in config:
        found = "is a timm model" if "architecture" in config else "has no model_type"
        raise ModelError(
            f"{reference} {found} (config.json), which transformers cannot load here; {_SUPPORTED} "
            "Give a folder that transformers' save_pretrained wrote."
        )
    if config["model_type"] not in CONFIG_MAPPING:
        raise ModelError(
            f"{reference} is of the model_type {config['model_type']!r} (config.json), which "
            f"transformers {transformers.__version__} does not know. Install a newer transformers, "
            "or choose another model."
        )
    if config.get("quantization_config"):
        raise ModelError(
            f"{reference} is quantized already (quantization_config in config.json). Give the "
            "model that it was made from, in float32, float16 or bfloat16."
        )
    return config


def check_classifier(config: Mapping[str, Any], folder: Path, reference: str) -> None:
    """Hold a folder to be a fine-tuned single-label classifier of one text or one image.

    Raises:
        ModelError: It is for another task; names the task and the nearest way on.
    """
    task = Task.of(config)
    if kind := _sentence_transformers(folder):
        raise _other(reference, *kind)
    if task.unfinished:
        raise ModelError(
            f"{reference} was not trained as a classifier: it has no classification head "
            f"({task.architecture}, made for {task.name}). {_FINE_TUNE}"
        )
    if task.name not in ("", TEXT, IMAGE):
        raise _other(reference, f"{task.name} ({task.architecture})", _way(config))
    if problem := _of_outputs(config):
        raise _other(reference, *problem)
    if task.name == "" and _kind(config) is None:
        raise _other(reference, f"another task (model_type {config['model_type']})", "")
    _check_labels(config, reference)
    _check_channels(config, reference)


def check_trainable(config: Mapping[str, Any], reference: str) -> str:
    """Hold a folder to be a network that a new classification head can be trained on.

    Returns:
        What the user should know: that a head of another task is replaced; may be empty.

    Raises:
        ModelError: transformers has no classifier of texts or images for this architecture.
    """
    task = Task.of(config)
    if _kind(config) is None:
        what = f"{task.name or 'another task'} ({task.architecture or config['model_type']})"
        raise _other(reference, what, "Train from a pretrained encoder of texts or images.")
    _check_channels(config, reference)
    made_for = task.name
    if task.unfinished or made_for in ("", TEXT, IMAGE):
        made_for = (_of_outputs(config) or ("",))[0] if made_for in (TEXT, IMAGE) else ""
    return made_for and (
        f"{reference} was made for {made_for}; its head is replaced by a new classifier's."
    )


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether the classifier of a config reads images, not texts."""
    return IMAGE in (Task.of(config).name, _kind(config))


def _kind(config: Mapping[str, Any]) -> str | None:
    """Which of the two classifiers transformers has for a config's model_type."""
    kind = config["model_type"]
    named = Task.of(config).name
    texts = kind in _types("SEQUENCE_CLASSIFICATION")
    images = kind in _types("IMAGE_CLASSIFICATION")
    if images and (not texts or named == IMAGE):
        return IMAGE
    return TEXT if texts else None


def _types(constant: str) -> set[str]:
    """transformers' model types of a task; those that were registered at run time included."""
    mapping = getattr(modeling_auto, f"MODEL_FOR_{constant}_MAPPING")
    registered = {config.model_type for config in mapping._extra_content}
    return {*getattr(modeling_auto, f"MODEL_FOR_{constant}_MAPPING_NAMES"), *registered}


@cache
def _tasks() -> dict[str, list[str]]:
    """The tasks of each class of transformers, by transformers' own tables."""
    found: dict[str, list[str]] = {}
    for constant, table in vars(modeling_auto).items():
        match = _CONSTANT.fullmatch(constant)
        name = match[1].replace("_", " ").lower() if match else _ENCODER
        if match or constant == "MODEL_MAPPING_NAMES":
            for classes in table.values():
                for each in [classes] if isinstance(classes, str) else classes:
                    found.setdefault(each, []).append(_RENAMED.get(name, name))
    return found


def _by_name(architecture: str) -> str:
    """The task of a class that transformers' tables lack, by the library's way of naming."""
    match = _CLASS.search(architecture)
    if match is None:
        return "an unknown task"
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", match[1]).lower()
    return _RENAMED.get(words, words)


def _way(config: Mapping[str, Any]) -> str:
    """The nearest way on from a model of another task."""
    if _kind(config) is None:
        return ""
    return "A classifier can be trained from its network: pt-deploy train --teacher ... --data ..."


def _of_outputs(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Another task that the outputs of a classifier tell, and the way on."""
    kind, labels = config.get("problem_type"), _labels(config)
    if kind == "multi_label_classification":
        return "multi-label classification (problem_type)", "Fine-tune it with one label a row."
    if kind == "regression" or len(labels) == 1:
        told = "problem_type" if kind == "regression" else "one output"
        return (
            f"regression, scores or text pairs ({told})",
            "Fine-tune it with two labels or more: pt-deploy train --teacher ... --data ...",
        )
    if any(_PAIRS.fullmatch(str(label).strip()) for label in labels.values()):
        return (
            "text pairs (natural language inference: its labels say entailment)",
            "Fine-tune it on single texts: pt-deploy train --teacher ... --data ...",
        )
    return None


def _sentence_transformers(folder: Path) -> tuple[str, str] | None:
    """The task of a folder of the library sentence-transformers, and the way on."""
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
    elif twice := next(_repeated(labels), ""):
        problem = f"names {twice!r} twice"
    if problem:
        raise ModelError(
            f"{reference}: id2label in config.json {problem}. Give each output one name of its own."
        )


def _check_channels(config: Mapping[str, Any], reference: str) -> None:
    channels = config.get("num_channels", 3)
    if reads_images(config) and channels != 3:
        raise ModelError(
            f"{reference}: it has {channels} channels; choose a model for images of three."
        )


def _repeated(labels: Mapping[str, Any]) -> Iterator[str]:
    seen: set[str] = set()
    for name in map(str, labels.values()):
        if name in seen:
            yield name
        seen.add(name)


def _other(reference: str, task: str, way: str) -> ModelError:
    return ModelError(f"{reference} is a model for {task}; {_SUPPORTED} {way}".strip())


def _json(path: Path, reference: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded from there (it has no {path.name}). Give a "
            "folder that transformers' save_pretrained wrote."
        ) from error
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded from there ({path.name} is damaged: "
            f"{error}). Copy or download it again."
        ) from error
    if not isinstance(found, dict):
        raise ModelError(
            f"{reference}: no classifier can be loaded from there ({path.name} holds no JSON "
            "object). Copy or download it again."
        )
    return found


def _json_or_empty(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}
