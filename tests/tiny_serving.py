"""Real, tiny models for the serving tests: word counts, or colours, to three classes, in NumPy.

It is also a loader module, so that both MLflow and we load what `save_tiny` wrote; child processes
learn of it by `sitecustomize`.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.preprocess import Preprocessor, TextPreprocessor
from mlflow_pt_deploy.preprocess.image import ImagePreprocessor
from mlflow_pt_deploy.serving import mlmodel
from mlflow_pt_deploy.serving.pyfunc import MODEL_CONFIG, PyFunc, signature
from mlflow_pt_deploy.variants.base import Inputs, Logits
from mlflow_pt_deploy.variants.cascade import Stages

mlmodel.LOADERS |= {"tiny_serving"}

WORDS = ("[PAD]", "[UNK]", "red", "green", "blue", "explode", "nan")
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


@dataclass(frozen=True)
class TinyVariant:
    manifest: TinyManifest
    preprocessor: Preprocessor
    labels: tuple[str, ...] = ("red", "green", "blue")
    predict: Any = staticmethod(predict)


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


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PyFunc:
    habits = json.loads((Path(path) / "habits.json").read_text())
    time.sleep(habits.get("load_s", 0))
    if "refuse" in habits:
        raise ArtifactError(habits["refuse"])
    variant = tiny_images() if habits.get("images") else tiny_variant()
    if "label" in habits:
        variant = replace(variant, labels=(habits["label"], "green", "blue"))
    if "predict_s" in habits:

        def slow(inputs: Inputs) -> Logits:
            time.sleep(habits["predict_s"])
            return predict(inputs)

        variant = replace(variant, predict=slow)
    if "hang_s" in habits:
        free = variant.predict

        def hangs(inputs: Inputs) -> Logits:
            if (inputs["input_ids"] == WORDS.index("explode")).any():
                time.sleep(habits["hang_s"])
            return free(inputs)

        variant = replace(variant, predict=hangs)
    if "unsure_below" in habits:
        variant = replace(variant, predict=Stages(predict, predict, habits["unsure_below"]))
    return PyFunc(variant, model_config)  # type: ignore[arg-type]


def load_checked(root: Path, checked: mlmodel.MLmodel, config: Mapping[str, Any]) -> PyFunc:
    return _load_pyfunc(str(root), config)


def save_tiny(folder: Path, **habits: Any) -> Path:
    """Write an MLmodel that loads the tiny model.

    Habits: `images` to look at colours, `label` for red, `load_s` and `predict_s` to take their
    time, `hang_s` to stand still where others explode, `refuse` to fail to load, `unsure_below` to
    be a cascade of the model and itself.
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
    pyfunc.add_to_model(model, loader_module="tiny_serving", model_config=MODEL_CONFIG)
    model.save(str(folder / "MLmodel"))
    (folder / mlmodel.FOLDER).mkdir()
    (folder / mlmodel.MANIFEST).write_text("{}")  # of which a promotion takes the digest
    (folder / "habits.json").write_text(json.dumps(habits))
    return folder


@contextmanager
def running(app: Any, **settings: Any) -> Iterator[str]:
    """An application on a free port, with the front that `pt-deploy serve` has; its address."""
    import uvicorn

    from mlflow_pt_deploy.serving.front import open_front

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            if getattr(app, "quick", None) is not None:
                app.front = open_front(app.quick, lambda: self.server_state.default_headers)
            await super().startup(sockets)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            if getattr(app, "front", None) is not None:
                app.front.close()

    server = Server(uvicorn.Config(app, port=0, log_level="error", **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(0.005)
