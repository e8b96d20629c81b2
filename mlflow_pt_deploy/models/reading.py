"""Whether a model that is brought is read here as transformers reads it; looked at once.

Texts: the tokenizer's own ids, and logits that do not depend on a row's neighbours. Images: the
image processor's own pixels. What differs is refused, because nothing later would notice: a wrong
baseline agrees with itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mlflow_pt_deploy.errors import ModelError, first_line
from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.models.image import ImageClassifier
from mlflow_pt_deploy.models.text import TextClassifier
from mlflow_pt_deploy.preprocess.processors import own_processor

_WORDS = "Is it gonna RAIN in Zürich on the 24th, or will naïve café-goers enjoy 東京's sun? "
_SHORT, _EMPTY, _LONG = _WORDS[:11], "", _WORDS * 3
_READ = 512  # tokens; a longer text is compared by its ids alone, a network would take too long
_UNUSED, _SPARE = 0.1, 128  # share and number of embeddings that may have no token: padding
_NOISE = 1e-3  # of logits, relative to the largest
_PIXELS = 2.0  # of 255; a half is what rounding and a cheaper reduction of large pictures cost
_SIZES = ((300, 200), (24, 37), (1500, 900))  # width and height


def check_reading(
    classifier: Classifier, folder: Path, reference: str, padding: int | None
) -> None:
    """Compare a classifier's reading of rows with transformers' own.

    Args:
        classifier: With its preprocessor; on the CPU, not in training.
        folder: Where it was loaded from.
        reference: What the user calls it.
        padding: The id of padding by its config as it was loaded.

    Raises:
        ModelError: They differ; says in what.
    """
    if isinstance(classifier, ImageClassifier):
        problem = _pixels(classifier, folder)
    else:
        assert isinstance(classifier, TextClassifier)
        problem = (
            _vocabulary(classifier)
            or _padding(classifier, padding)
            or _ids(classifier)
            or _logits(classifier, padding)
        )
    if problem:
        raise ModelError(f"{reference} {problem}")


def _vocabulary(classifier: TextClassifier) -> str:
    """A tokenizer that is not the model's, or none at all."""
    tokenizer, rows = classifier.tokenizer, len(classifier.network.get_input_embeddings().weight)
    vocabulary = tokenizer.get_vocab()
    whole = "Save the tokenizer that the model was trained with: tokenizer.save_pretrained(folder)."
    named = set(tokenizer.get_added_vocab())
    if not vocabulary.keys() - named or rows - len(vocabulary) > max(_SPARE, _UNUSED * rows):
        return (
            f"has no tokenizer of its own: {len(vocabulary):,} tokens for {rows:,} embeddings, so "
            f"texts would become unknown words. {whole}"
        )
    if (most := max(vocabulary.values())) >= rows:
        return (
            f"has a tokenizer with the id {most:,}, and {rows:,} embeddings only. {whole} If "
            "tokens were added, call model.resize_token_embeddings(len(tokenizer)), and train it."
        )
    pieces = [piece for piece in vocabulary if piece not in named]
    texts = [tokenizer.decode([vocabulary[p]]) for p in pieces[:: max(1, len(pieces) // 50)]]
    read = classifier.preprocessor.encode([*texts, _SHORT])
    if len({tuple(ids) for ids in read}) == 1:
        return f"has a tokenizer that makes the same tokens of every text. {whole}"
    return ""


def _padding(classifier: TextClassifier, declared: int | None) -> str:
    """No id of padding, or two that differ."""
    own = classifier.tokenizer.pad_token_id
    cure = (
        "Set both and save them: tokenizer.pad_token = tokenizer.eos_token (or its own), "
        "model.config.pad_token_id = tokenizer.pad_token_id."
    )
    if own is None and declared is None:
        return f"has no padding token, neither in its tokenizer nor in config.json. {cure}"
    if own is not None and declared is not None and own != declared:
        return (
            f"has two padding ids: {own} in its tokenizer, {declared} in config.json "
            f"(pad_token_id). {cure}"
        )
    return ""


def _ids(classifier: TextClassifier) -> str:
    """Texts that become other tokens than by the tokenizer's own call."""
    ours, tokenizer = classifier.preprocessor, classifier.tokenizer
    long = _WORDS * (2 + ours.max_length // 8)
    for name, text in (("a short", _SHORT), ("an empty", _EMPTY), ("a long", long)):
        (ids,) = ours.encode([text])
        theirs = tokenizer(text, truncation=True, max_length=ours.max_length)["input_ids"]
        if list(theirs) != list(ids) and theirs:  # of an empty text some make nothing
            return (
                f"has a tokenizer ({type(tokenizer).__name__}) whose tokens of {name} text are not "
                f"those of its tokenizer.json (e.g. {theirs[:6]} and {ids[:6]}), which is all that "
                "is served. Save it again with tokenizer.save_pretrained, or choose another model."
            )
    return ""


def _logits(classifier: TextClassifier, declared: int | None) -> str:
    """Answers that are no numbers, are not transformers', or depend on a row's neighbours."""
    most = classifier.preprocessor.max_length
    texts, longest = [_SHORT, _EMPTY, _LONG], _WORDS * (2 + most // 8)
    own, lone = _own_logits(classifier, declared), []
    for text in [*texts, *([longest] if most <= _READ else [])]:
        try:
            lone.append(_answers(classifier, [text]))
        except Exception as error:  # a network's own
            return f"cannot read {_named(text)} ({first_line(error)})."
    alone = np.concatenate(lone[: len(texts)])
    if not all(np.isfinite(logits).all() for logits in lone):
        return "answers with NaN or infinity. Its weights are damaged or incomplete."
    noise = 1e-5 + _NOISE * float(np.abs(alone).max())
    if (gap := float(np.abs(own - alone[:1]).max())) > noise:
        return (
            f"answers otherwise under transformers (logits differ by {gap:.2g}): its tokenizer "
            "gives inputs besides ids and mask, which are not supported. Choose another model."
        )
    together = _answers(classifier, texts)
    if not (gap := float(np.abs(together - alone).max())) <= noise:  # NaN is not
        return (
            f"answers otherwise where a text is padded beside a longer one (logits differ by "
            f"{gap:.2g}): {type(classifier.network).__name__} does not mask its padding. Choose "
            "another architecture."
        )
    return ""


def _named(text: str) -> str:
    return f"a text of {len(text)} characters" if text else "an empty text"


@torch.no_grad()
def _answers(classifier: TextClassifier, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    inputs = classifier.preprocessor(texts)
    logits: torch.Tensor = classifier(*map(torch.from_numpy, inputs.values()))
    return logits.float().numpy()


@torch.no_grad()
def _own_logits(classifier: TextClassifier, declared: int | None) -> npt.NDArray[np.float32]:
    """A short text's logits with all that the tokenizer gives, and the config as it was loaded."""
    network = classifier.network
    inputs = classifier.tokenizer(_SHORT, return_tensors="pt", truncation=True, max_length=64)
    known = inspect.signature(network.forward).parameters
    set_here, network.config.pad_token_id = network.config.pad_token_id, declared
    try:
        found = network(**{name: value for name, value in inputs.items() if name in known})
    finally:
        network.config.pad_token_id = set_here
    logits: npt.NDArray[np.float32] = found.logits.float().numpy()
    return logits


def _pixels(classifier: ImageClassifier, folder: Path) -> str:
    """Pictures that become other pixels than by the image processor itself."""
    sizes: Sequence[tuple[int, int]] = _SIZES
    try:
        own = own_processor(folder)
    except ImportError:  # an older transformers without torchvision: nothing to compare with
        own, sizes = None, ()
    except Exception as error:  # each has its own
        return (
            "has an image processor that transformers cannot make here, so that its pixels cannot "
            f"be compared ({first_line(error)})."
        )
    spread = 1 / np.abs(classifier.preprocessor.step)
    for size in sizes:
        picture = _picture(*size)
        theirs = _own_pixels(own, picture)
        if isinstance(theirs, str):
            return f"has an image processor ({type(own).__name__}) that fails: {theirs}"
        ours = classifier.preprocessor([_encoded(picture)])["pixel_values"][0]
        if theirs.shape != ours.shape:
            return _differs(
                own, classifier.processor, f"{theirs.shape} and not {ours.shape} values"
            )
        gap = float((np.abs(theirs - ours) * spread).mean())
        if not gap <= _PIXELS:
            return _differs(own, classifier.processor, f"other pixels, by {gap:.1f} of 255")
    inputs = classifier.preprocessor([_encoded(_picture(*_SIZES[0]))])
    with torch.no_grad():
        logits = classifier(torch.from_numpy(inputs["pixel_values"]))
    if not torch.isfinite(logits).all():
        return "answers with NaN or infinity. Its weights are damaged or incomplete."
    return ""


def _own_pixels(own: Any, picture: Image.Image) -> npt.NDArray[np.float32] | str:
    try:
        found = own(picture, return_tensors="np")["pixel_values"][0]
    except Exception as error:  # each has its own
        return first_line(error)
    return np.asarray(found, dtype=np.float32)


def _differs(own: Any, processor: Mapping[str, Any], how: str) -> str:
    named = ("size", "crop_size", "crop_pct", "do_center_crop", "resample", "rescale_factor")
    given = ", ".join(f"{name}={processor[name]}" for name in named if name in processor)
    return (
        f"has an image processor ({type(own).__name__}: {given}) that makes {how}, than is known "
        "here. Choose a model with ViTImageProcessor, ConvNextImageProcessor or CLIPImageProcessor."
    )


def _picture(width: int, height: int) -> Image.Image:
    """Ramps of red and green, and a blue chessboard."""
    y, x = np.mgrid[:height, :width]
    board = ((x * 15 // width + y * 10 // height) % 2) * 255
    channels = (x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), board)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _encoded(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
