"""Real, tiny models for the serving tests: word counts, or colours, to three classes, in NumPy.

It is also a loader module, so that both MLflow and we load what `save_tiny` wrote; child processes
learn of it by `sitecustomize`.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_pt_deploy.errors import ArtifactError, DeviceMemoryError
from mlflow_pt_deploy.model_config import MODEL_CONFIG
from mlflow_pt_deploy.preprocessing import Preprocessor, TextPreprocessor
from mlflow_pt_deploy.preprocessing.image import ImagePreprocessor
from mlflow_pt_deploy.registry import mlmodel
from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.runtimes.cascade import CascadePredictor
from mlflow_pt_deploy.runtimes.device_memory import DeviceMemoryGuard
from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc, signature

mlmodel.LOADERS["tiny.serving"] = "tiny.serving"

WORDS = ("[PAD]", "[UNK]", "red", "green", "blue", "explode", "nan", "slow")
WEIGHTS = np.zeros((len(WORDS), 3), dtype=np.float32)
WEIGHTS[2, 0] = WEIGHTS[3, 1] = WEIGHTS[4, 2] = 1.0


@dataclass(frozen=True)
class TinyManifest:
    name: str = "tiny-numpy-fp32"
    model: str = "tiny"
    runtime: str = "numpy"
    precision: str = "fp32"
    digest: str = "0" * 64
    libraries: Mapping[str, str] = field(default_factory=lambda: {"python": "2.7"})


def predict(inputs: Inputs) -> Logits:
    """float32 (batch, 3): how often each class's word stands in the text."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if (ids == WORDS.index("explode")).any():
        raise RuntimeError("secret /path/to/model exploded")
    logits = (WEIGHTS[ids] * mask[:, :, None]).sum(axis=1)
    logits[(ids == WORDS.index("nan")).any(axis=1)] = np.nan
    return logits.astype(np.float32)


class TinyDevice:
    """A device that does not exist, whose memory all models of this process share.

    Attributes:
        units: Its memory.
        used: What models and tests hold.
    """

    def __init__(self) -> None:
        self.units = self.used = 0
        self._lock = threading.RLock()

    def hold(self, owner: object, units: int) -> None:
        """Hold memory for as long as `owner` exists.

        Raises:
            DeviceMemoryError: There is not enough.
        """
        with self._lock:
            if self.used + units > self.units:
                raise DeviceMemoryError(f"{units} units do not fit the tiny device")
            self.used += units
        weakref.finalize(owner, self.free, units)

    def free(self, units: int) -> None:
        with self._lock:
            self.used -= units


DEVICE = TinyDevice()


@dataclass(frozen=True)
class TinyVariant:
    manifest: TinyManifest
    preprocessor: Preprocessor
    labels: tuple[str, ...] = ("red", "green", "blue")
    predict: Any = staticmethod(predict)
    device: str = "cpu"

    @property
    def running(self) -> TinyManifest:
        return self.manifest


def tiny_variant() -> TinyVariant:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    return TinyVariant(TinyManifest(), TextPreprocessor(tokenizer, max_length=64, pad_id=0))


def tiny_images() -> TinyVariant:
    """How red, green or blue an image is."""

    def colours(inputs: Inputs) -> Logits:
        return inputs["pixel_values"].mean(axis=(2, 3)).astype(np.float32)

    return TinyVariant(TinyManifest(), ImagePreprocessor(height=4, width=4), predict=colours)


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PtDeployPyFunc:
    habits = json.loads((Path(path) / "habits.json").read_text())
    time.sleep(habits.get("load_s", 0))
    if "refuse" in habits:
        raise ArtifactError(habits["refuse"])
    variant = tiny_images() if habits.get("images") else tiny_variant()
    if "label" in habits:
        variant = replace(variant, labels=(habits["label"], "green", "blue"))
    if habits.get("wrong"):
        variant = replace(variant, predict=lambda inputs: np.roll(predict(inputs), 1, axis=1))
    if "predict_s" in habits:

        def slow(inputs: Inputs) -> Logits:
            time.sleep(habits["predict_s"])
            return predict(inputs)

        variant = replace(variant, predict=slow)
    if habits.get("reversed"):
        variant = replace(
            variant, labels=variant.labels[::-1], predict=lambda inputs: predict(inputs)[:, ::-1]
        )
    if "fails_on" in habits:
        word = WORDS.index(habits["fails_on"])

        def failing(inputs: Inputs) -> Logits:
            if (inputs["input_ids"] == word).any():
                raise RuntimeError("secret /path/to/model failed")
            return predict(inputs)

        variant = replace(variant, predict=failing)
    if "slow_s" in habits:
        fast = variant.predict

        def sometimes_slow(inputs: Inputs) -> Logits:
            if (inputs["input_ids"] == WORDS.index("slow")).any():
                time.sleep(habits["slow_s"])
            return fast(inputs)

        variant = replace(variant, predict=sometimes_slow)
    if "unsure_below" in habits:
        variant = replace(
            variant, predict=CascadePredictor(predict, predict, habits["unsure_below"])
        )
    if "full_on" in habits:
        large = WORDS.index(habits["full_on"])

        def allocating(inputs: Inputs) -> Logits:
            if (inputs["input_ids"] == large).any():
                raise RuntimeError("CUDA error: out of memory; secret /path/to/model")
            return predict(inputs)

        variant = replace(variant, predict=DeviceMemoryGuard(allocating, "tiny", "cuda"))
    if "memory" in habits:
        compute = variant.predict

        def on_device(inputs: Inputs) -> Logits:
            return compute(inputs)

        DEVICE.hold(on_device, habits["memory"])
        variant = replace(variant, predict=on_device, device="cuda")
    return PtDeployPyFunc(variant, model_config)  # type: ignore[arg-type]


def load_checked(root: Path, checked: mlmodel.MLmodel, config: Mapping[str, Any]) -> PtDeployPyFunc:
    return _load_pyfunc(str(root), config)


def save_tiny(folder: Path, **habits: Any) -> Path:
    """Write an MLmodel that loads the tiny model.

    Args:
        folder: Must not exist.
        **habits: `images`: classify colours of images; `label`: name of the class red; `load_s`,
            `predict_s`: seconds that loading and each batch take; `slow_s`: seconds that a batch
            with the word "slow" takes; `refuse`: fail to load with this message; `unsure_below`:
            be a cascade of the model and itself; `wrong`: answer with the next label;
            `reversed`: have the same labels in the other order; `fails_on`: fail on this word;
            `memory`: units of `DEVICE` that it needs; `full_on`: a row with this word finds no
            device memory.
    """
    from mlflow import pyfunc
    from mlflow.models import Model

    folder.mkdir()
    model = Model(signature=signature())
    manifest = TinyManifest()
    model.add_flavor(
        mlmodel.FLAVOR_NAME,
        version="0",
        variant=manifest.name,
        runtime=manifest.runtime,
        precision=manifest.precision,
        digest=manifest.digest,
        data=mlmodel.FOLDER,
    )
    pyfunc.add_to_model(model, loader_module="tiny.serving", model_config=MODEL_CONFIG)
    model.save(str(folder / "MLmodel"))
    (folder / mlmodel.FOLDER).mkdir()
    (folder / mlmodel.MANIFEST).write_text("{}")  # of which a promotion takes the digest
    (folder / "habits.json").write_text(json.dumps(habits))
    return folder
