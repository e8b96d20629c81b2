"""What the tests share: a tiny real model, tiny data, exported variants, and a tracking server.

What takes seconds to make is made once, also where xdist runs the tests in several processes.
"""

from __future__ import annotations

import csv
import logging
import os
import random
import shutil
import sqlite3
import string
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Hugging Face and MLflow read these when they are imported, and child processes inherit them.
os.environ |= {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np
import pytest
from filelock import FileLock

from mlflow_pt_deploy.artifacts import write_variant
from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.eager import Eager

if TYPE_CHECKING:
    from mlflow_pt_deploy.training.training_state import Epoch

KEYWORDS = {
    "card": ("card", "pin", "chip", "plastic", "contactless"),
    "refund": ("refund", "return", "reimburse", "cancel", "returned"),
    "transfer": ("transfer", "send", "wire", "abroad", "payee"),
}
FILLERS = (
    "i my the a to for from with is was not why how when what where please help me can you "
    "it this that still yet again today yesterday bank account money pay shop app phone "
    "number new old get got need want have has do does did and or but of in on at by so "
    "much very "
).split()
HEBREW = "אבגדהוזחטיכלמנסעפצקרשתךםןףץ"
COLOURS = ("blue", "green", "red")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# The longest go first, so that no process is left alone with one of them at the end.
LONGEST = (
    "test_notebooks.py",
    "test_lifecycle.py",
    "test_search_stage.py",
    "test_int8.py",
    "test_contract.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Give each of xdist's processes a core of its own: libraries that share cores spin on them."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not _has_gpu():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA device here"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def private_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unfinished work goes to the test's own folder, never to the user's."""
    monkeypatch.setenv("PT_DEPLOY_HOME", str(tmp_path / "pt-deploy-home"))


@pytest.fixture(autouse=True)
def enabled_loggers() -> None:
    """Libraries that a test before used may have configured logging: the next one has ours.

    Alembic, for example, disables every logger when Optuna or MLflow makes its tables.
    """
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    # a copy: a server of an earlier fixture may make loggers meanwhile
    for name, logger in list(logging.Logger.manager.loggerDict.items()):
        if name.startswith("mlflow_pt_deploy") and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True


@pytest.fixture(scope="session")
def once(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[Path], object]], Path]:
    """Calls a maker with a path that does not exist yet, once for all worker processes."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made-once"
    shared.mkdir(exist_ok=True)

    def make(name: str, maker: Callable[[Path], object]) -> Path:
        with FileLock(shared / f".{name}.lock"):
            if not (shared / f".{name}.done").exists():
                maker(shared / name)
                (shared / f".{name}.done").touch()
        return shared / name

    return make


@pytest.fixture(scope="session")
def tiny_model(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A Hugging Face folder: BERT, 2 layers, 32 wide, 128 positions, 3 labels, knows `KEYWORDS`."""
    return once("tiny-model", _write_tiny_model)


@pytest.fixture(scope="session")
def tiny_static(once: Callable[[str, Callable[[Path], object]], Path], tiny_model: Path) -> Path:
    """A static student of `tiny_model`: 16 hidden, 64 buckets, up to trigrams."""
    return once("tiny-static", lambda folder: _write_tiny_static(folder, tiny_model))


@pytest.fixture(scope="session")
def tiny_data(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder of CSV files (90, 30 and 30 rows); one word of each row tells the label."""
    return once("tiny-data", _write_tiny_data)


@pytest.fixture(scope="session")
def tiny_splits(tiny_data: Path) -> Splits:
    return load_data(str(tiny_data))


@pytest.fixture(scope="session")
def tiny_images(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder of Parquet files (96, 12 and 12 PNGs of 24 x 18); the strongest colour labels it."""
    return once("tiny-images", _write_tiny_images)


@pytest.fixture(scope="session")
def image_splits(tiny_images: Path) -> Splits:
    return load_data(str(tiny_images))


@pytest.fixture(scope="session")
def tiny_resnet(
    once: Callable[[str, Callable[[Path], object]], Path], image_splits: Splits
) -> Path:
    """A Hugging Face folder: ResNet, 2 blocks, 32 x 32 pixels, 3 labels, knows `COLOURS`."""
    return once("tiny-resnet", lambda folder: _write_tiny_images_model(folder, image_splits))


@pytest.fixture(scope="session")
def tiny_mobilenet(
    once: Callable[[str, Callable[[Path], object]], Path], tiny_resnet: Path, image_splits: Splits
) -> Path:
    """A MobileNetV2 of an eighth of the width, beside `tiny_resnet`."""
    return once(
        "tiny-mobilenet",
        lambda folder: _write_tiny_images_model(folder, image_splits, teacher=tiny_resnet),
    )


@pytest.fixture(scope="session")
def tiny_models(
    tiny_model: Path,
    tiny_static: Path,
    tiny_resnet: Path,
    tiny_mobilenet: Path,
    tiny_splits: Splits,
    image_splits: Splits,
) -> dict[str, tuple[Path, Splits]]:
    """Folders of the tiny models, with the rows that they know."""
    return {
        "teacher": (tiny_model, tiny_splits),
        "static": (tiny_static, tiny_splits),
        "resnet": (tiny_resnet, image_splits),
        "mobilenet": (tiny_mobilenet, image_splits),
    }


@pytest.fixture(scope="session")
def exported(
    once: Callable[[str, Callable[[Path], object]], Path],
    tiny_models: dict[str, tuple[Path, Splits]],
) -> Callable[..., Path]:
    """Writes a variant of a tiny model, once; read it, or copy it before you change it."""

    def export(variant: Variant, model: str = "teacher") -> Path:
        source, splits = tiny_models[model]

        def write(folder: Path) -> None:
            from mlflow_pt_deploy.models import load_classifier

            classifier = load_classifier(str(source))
            rows = sorted(splits.train.rows, key=len)
            step = 4 if splits.column == "text" else 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as the child process of `build` does
                write_variant(
                    variant,
                    classifier,
                    folder,
                    model=model,
                    example=classifier.preprocessor([rows[0], rows[len(rows) // 2], rows[-1]]),
                    calibration=[classifier.preprocessor([row]) for row in rows[::step]],
                    golden_rows=splits.validation.rows[:4],
                )

        return once(variant.name(model), write)

    return export


@pytest.fixture(scope="session")
def eager_variant(exported: Callable[[Variant], Path]) -> Path:
    """The folder of a `teacher-eager-fp32`."""
    return exported(Eager())


@pytest.fixture(scope="session")
def empty_database(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """MLflow's SQLite file without runs, to be copied: its schema takes 5 s to create."""
    return once("mlflow.db", _write_database)


@pytest.fixture
def tracking(
    empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """The URI of an empty MLflow in `tmp_path`, which is also its registry; runs are ended."""
    import mlflow
    from mlflow.tracking import fluent

    database = Path(shutil.copyfile(empty_database, tmp_path / "mlflow.db"))
    artifacts = tmp_path / "artifacts"
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE experiments SET artifact_location = ?", (f"{artifacts}/0",))
    connection.close()
    uri = f"sqlite:///{database}"
    for name in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.setenv(name, "")  # remembered, so that what a test sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    monkeypatch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", str(artifacts))  # of new experiments
    monkeypatch.setattr(fluent, "_active_experiment_id", None)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    yield uri
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri("")
    mlflow.set_registry_uri("")


def _write_tiny_model(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = _tokenizer()
    labels = dict(enumerate(KEYWORDS))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=128,
                initializer_range=0.05,
                id2label=labels,
                label2id={label: index for index, label in labels.items()},
            )
        )
    _teach_words(network, tokenizer)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_tiny_static(folder: Path, teacher: Path) -> None:
    """Weights by hand: the embeddings tell the labels already, n-grams move them a little."""
    import torch

    from mlflow_pt_deploy.models import load_classifier, new_static, save_classifier

    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        whole = load_classifier(str(teacher))
        student = new_static(whole, hidden=16, buckets=64, ngrams=3)
        network = student.network
        network.pieces.weight.copy_(whole.network.get_input_embeddings().weight)
        network.grams.weight.normal_(std=0.05)
        network.norm.weight.uniform_(0.9, 1.1)
        network.norm.bias.normal_(std=0.01)
        network.hidden.weight[:3, :3] += torch.eye(3)
        network.classifier.weight[:, :3] += torch.eye(3)
    save_classifier(student, folder)


def _teach_words(network, tokenizer) -> None:
    """Set weights by hand: label i's words fill dimension i, layers pass it on to the head."""
    import torch

    with torch.no_grad():
        embeddings = network.bert.embeddings
        words = embeddings.word_embeddings.weight
        for table in (embeddings.position_embeddings, embeddings.token_type_embeddings):
            table.weight[:, :3] = 0
        words[:, :3] = 0
        for index, group in enumerate(KEYWORDS.values()):
            for word in group:
                words[tokenizer.convert_tokens_to_ids(word), index] = 3.0
        for layer in network.bert.encoder.layer:
            layer.attention.self.value.weight += torch.eye(32)
            layer.attention.output.dense.weight += 2 * torch.eye(32)
        network.bert.pooler.dense.weight += torch.eye(32)
        network.classifier.weight[:, :3] += 5 * torch.eye(3)


def picture(mode: str, size: tuple[int, int], colour: Any, file: str = "PNG", **options) -> bytes:
    """An encoded image of one colour."""
    from PIL import Image

    buffer = BytesIO()
    Image.new(mode, size, colour).save(buffer, file, **options)
    return buffer.getvalue()


def _write_tiny_images(folder: Path) -> None:
    import pandas as pd
    from PIL import Image

    folder.mkdir()
    draw = np.random.default_rng(0)
    for split, count in (("train", 96), ("validation", 12), ("test", 12)):
        rows = []
        for row in range(count):
            light, noise, lead = draw.integers((0, 1, 60), (130, 60, 120))
            pixels = light + draw.integers(0, noise, (18, 24, 3)) - noise // 2
            pixels[..., 2 - row % 3] += lead  # of red, green, blue
            pixels = pixels.clip(0, 255)
            buffer = BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
            rows.append({"image": buffer.getvalue(), "label": COLOURS[row % 3]})
        pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")


def _write_tiny_images_model(folder: Path, splits: Splits, teacher: Path | None = None) -> None:
    """Really trained, in seconds: weights by hand would not survive batch statistics."""
    import torch

    from mlflow_pt_deploy.models import (
        ImageClassifier,
        load_classifier,
        new_mobilenet,
        save_classifier,
    )
    from mlflow_pt_deploy.training.optimization import Schedule
    from mlflow_pt_deploy.training.trainer import cross_entropy, fit

    with torch.random.fork_rng():
        torch.manual_seed(0)
        if teacher is None:
            classifier, rate = _random_resnet(), 1e-2
        else:
            known = load_classifier(str(teacher))
            assert isinstance(known, ImageClassifier)
            classifier, rate = new_mobilenet(known, width=0.125), 3e-3
        loss = cross_entropy(splits.train.targets)
        schedule = Schedule(epochs=20, learning_rate=rate, batch_size=8)
        with suppress(_Learned):
            fit(classifier, splits, loss, schedule, on_epoch=_stop_where_all_is_right)
    save_classifier(classifier.eval(), folder)


class _Learned(Exception):
    """The weights are those that `fit` would keep: no later epoch can be better."""


def _stop_where_all_is_right(epoch: Epoch) -> None:
    if epoch.validation_accuracy == 1:
        raise _Learned


def _random_resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    from mlflow_pt_deploy.models import ImageClassifier

    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(COLOURS)),
        label2id={label: index for index, label in enumerate(COLOURS)},
    )
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return ImageClassifier(ResNetForImageClassification(config), processor)


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import BertProcessing
    from transformers import PreTrainedTokenizerFast

    letters = string.ascii_lowercase + HEBREW
    words = [word for group in KEYWORDS.values() for word in group] + list(FILLERS)
    pieces = [*SPECIAL, *words, *letters, *(f"##{letter}" for letter in letters), *".,!?'"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = BertNormalizer()
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=128,
        **dict(zip(names, SPECIAL, strict=True)),
    )


def _write_tiny_data(folder: Path) -> None:
    folder.mkdir()
    draw = random.Random(0)
    for split, rows in (("train", 90), ("validation", 30), ("test", 30)):
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf8") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            for row in range(rows):
                label = list(KEYWORDS)[row % 3]
                words = draw.choices(FILLERS, k=draw.randint(2, 10))
                words.insert(draw.randrange(len(words)), draw.choice(KEYWORDS[label]))
                table.writerow([" ".join(words), label])


def _write_database(path: Path) -> None:
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
