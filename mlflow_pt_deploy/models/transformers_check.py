"""Compare preprocessing and outputs of a loaded model with transformers.

Texts: token ids equal those of the tokenizer, and logits do not depend on other rows of the batch.
Images: pixels equal those of the image processor. Differences are rejected, because later checks
compare variants with this model only and cannot detect them.
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

from mlflow_pt_deploy.errors import ModelError, root_cause
from mlflow_pt_deploy.models.base import Classifier
from mlflow_pt_deploy.models.image import ImageClassifier
from mlflow_pt_deploy.models.text import TextClassifier
from mlflow_pt_deploy.preprocessing.image_processors import own_processor

_WORDS = "Is it gonna RAIN in Zürich on the 24th, or will naïve café-goers enjoy 東京's sun? "
_SHORT, _EMPTY, _LONG = _WORDS[:11], "", _WORDS * 3
_MAX_RUN_TOKENS = 512  # for longer texts only token ids are compared, to save time
_UNUSED_SHARE, _UNUSED_COUNT = 0.1, 128  # maximum of embeddings without a token (padding)
_LOGIT_TOLERANCE = 1e-3  # relative to the largest logit
_PIXEL_TOLERANCE = 2.0  # of 255; rounding and fast reduction of large images cost about 0.5
_SIZES = ((300, 200), (24, 37), (1500, 900))  # width and height


def compare_with_transformers(
    classifier: Classifier, folder: Path, reference: str, padding: int | None
) -> None:
    """Check that a classifier gives the same results as with transformers.

    Args:
        classifier: The classifier, on the CPU and in evaluation mode.
        folder: Folder that it was loaded from.
        reference: The reference that the user gave.
        padding: Padding id of the config before it was changed, or None.

    Raises:
        ModelError: The results differ.
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
    """Problem of a missing tokenizer, or of a tokenizer of another model."""
    tokenizer, rows = classifier.tokenizer, len(classifier.network.get_input_embeddings().weight)
    vocabulary = tokenizer.get_vocab()
    remedy = "Save the tokenizer of the training: tokenizer.save_pretrained(folder)."
    named = set(tokenizer.get_added_vocab())
    if not vocabulary.keys() - named or rows - len(vocabulary) > max(
        _UNUSED_COUNT, _UNUSED_SHARE * rows
    ):
        return (
            f"has no valid tokenizer: {len(vocabulary):,} tokens for {rows:,} embeddings, so most "
            f"words would be unknown. {remedy}"
        )
    if (most := max(vocabulary.values())) >= rows:
        return (
            f"has a tokenizer with the id {most:,}, but only {rows:,} embeddings. {remedy} If "
            "tokens were added, call model.resize_token_embeddings(len(tokenizer)) and train it."
        )
    pieces = [piece for piece in vocabulary if piece not in named]
    texts = [tokenizer.decode([vocabulary[p]]) for p in pieces[:: max(1, len(pieces) // 50)]]
    read = classifier.preprocessor.encode([*texts, _SHORT])
    if len({tuple(ids) for ids in read}) == 1:
        return f"has a tokenizer that returns the same tokens for every text. {remedy}"
    return ""


def _padding(classifier: TextClassifier, declared: int | None) -> str:
    """Problem of a missing padding id, or of two different ones."""
    own = classifier.tokenizer.pad_token_id
    remedy = (
        "Set both and save them: tokenizer.pad_token = tokenizer.eos_token (or another token), "
        "model.config.pad_token_id = tokenizer.pad_token_id."
    )
    if own is None and declared is None:
        return f"has no padding token, neither in its tokenizer nor in config.json. {remedy}"
    if own is not None and declared is not None and own != declared:
        return (
            f"has two padding ids: {own} in its tokenizer, {declared} in config.json "
            f"(pad_token_id). {remedy}"
        )
    return ""


def _ids(classifier: TextClassifier) -> str:
    """Problem of texts whose token ids differ from those of the transformers tokenizer."""
    ours, tokenizer = classifier.preprocessor, classifier.tokenizer
    long = _WORDS * (2 + ours.max_length // 8)
    for name, text in (("a short", _SHORT), ("an empty", _EMPTY), ("a long", long)):
        (ids,) = ours.encode([text])
        theirs = tokenizer(text, truncation=True, max_length=ours.max_length)["input_ids"]
        # Some tokenizers return no token for an empty text.
        if theirs and list(theirs) != list(ids):
            return (
                f"has a tokenizer ({type(tokenizer).__name__}) whose tokens of {name} text differ "
                f"from those of its tokenizer.json (e.g. {theirs[:6]} and {ids[:6]}), which is "
                "used for serving. Save it again with tokenizer.save_pretrained, or choose another "
                "model."
            )
    return ""


def _logits(classifier: TextClassifier, declared: int | None) -> str:
    """Problem of logits that are NaN, differ from transformers, or depend on other rows."""
    most = classifier.preprocessor.max_length
    texts, longest = [_SHORT, _EMPTY, _LONG], _WORDS * (2 + most // 8)
    own, lone = _own_logits(classifier, declared), []
    for text in [*texts, *([longest] if most <= _MAX_RUN_TOKENS else [])]:
        try:
            lone.append(_run(classifier, [text]))
        except Exception as error:  # depends on the network
            return f"cannot process {_describe(text)} ({root_cause(error)})."
    alone = np.concatenate(lone[: len(texts)])
    if not all(np.isfinite(logits).all() for logits in lone):
        return "returns NaN or infinity. Its weights are damaged or incomplete."
    noise = 1e-5 + _LOGIT_TOLERANCE * float(np.abs(alone).max())
    if (gap := float(np.abs(own - alone[:1]).max())) > noise:
        return (
            f"gives other results with transformers (logits differ by {gap:.2g}): its tokenizer "
            "returns inputs besides ids and mask, which are not supported. Choose another model."
        )
    together = _run(classifier, texts)
    if not (gap := float(np.abs(together - alone).max())) <= noise:  # also true for NaN
        return (
            "gives other results for a text in a batch with a longer one (logits differ by "
            f"{gap:.2g}): {type(classifier.network).__name__} does not mask padding. Choose "
            "another architecture."
        )
    return ""


def _describe(text: str) -> str:
    return f"a text of {len(text)} characters" if text else "an empty text"


@torch.no_grad()
def _run(classifier: TextClassifier, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    inputs = classifier.preprocessor(texts)
    logits: torch.Tensor = classifier(*map(torch.from_numpy, inputs.values()))
    return logits.float().numpy()


@torch.no_grad()
def _own_logits(classifier: TextClassifier, declared: int | None) -> npt.NDArray[np.float32]:
    """Logits of a short text with all inputs of the tokenizer and the original padding id."""
    network = classifier.network
    inputs = classifier.tokenizer(_SHORT, return_tensors="pt", truncation=True, max_length=64)
    parameters = inspect.signature(network.forward).parameters
    current, network.config.pad_token_id = network.config.pad_token_id, declared
    try:
        found = network(**{name: value for name, value in inputs.items() if name in parameters})
    finally:
        network.config.pad_token_id = current
    logits: npt.NDArray[np.float32] = found.logits.float().numpy()
    return logits


def _pixels(classifier: ImageClassifier, folder: Path) -> str:
    """Problem of images whose pixels differ from those of the image processor."""
    sizes: Sequence[tuple[int, int]] = _SIZES
    try:
        own = own_processor(folder)
    except ImportError:  # an older transformers without torchvision: no reference
        own, sizes = None, ()
    except Exception as error:  # depends on the processor class
        return (
            "has an image processor that transformers cannot create, so its pixels cannot be "
            f"compared ({root_cause(error)})."
        )
    spread = 1 / np.abs(classifier.preprocessor.step)
    for size in sizes:
        image = _test_image(*size)
        theirs = _own_pixels(own, image)
        if isinstance(theirs, str):
            return f"has an image processor ({type(own).__name__}) that fails: {theirs}"
        ours = classifier.preprocessor([_to_png(image)])["pixel_values"][0]
        if theirs.shape != ours.shape:
            return _differs(
                own, classifier.processor, f"values of shape {theirs.shape} instead of {ours.shape}"
            )
        gap = float((np.abs(theirs - ours) * spread).mean())
        if not gap <= _PIXEL_TOLERANCE:
            return _differs(own, classifier.processor, f"pixels that differ by {gap:.1f} of 255")
    inputs = classifier.preprocessor([_to_png(_test_image(*_SIZES[0]))])
    with torch.no_grad():
        logits = classifier(torch.from_numpy(inputs["pixel_values"]))
    if not torch.isfinite(logits).all():
        return "returns NaN or infinity. Its weights are damaged or incomplete."
    return ""


def _own_pixels(own: Any, image: Image.Image) -> npt.NDArray[np.float32] | str:
    try:
        found = own(image, return_tensors="np")["pixel_values"][0]
    except Exception as error:  # depends on the processor class
        return root_cause(error)
    return np.asarray(found, dtype=np.float32)


def _differs(own: Any, processor: Mapping[str, Any], how: str) -> str:
    named = ("size", "crop_size", "crop_pct", "do_center_crop", "resample", "rescale_factor")
    given = ", ".join(f"{name}={processor[name]}" for name in named if name in processor)
    return (
        f"has an unsupported image processor ({type(own).__name__}: {given}), which gives {how}. "
        "Choose a model with ViTImageProcessor, ConvNextImageProcessor or CLIPImageProcessor."
    )


def _test_image(width: int, height: int) -> Image.Image:
    """An image with gradients of red and green and a blue checkerboard."""
    y, x = np.mgrid[:height, :width]
    board = ((x * 15 // width + y * 10 // height) % 2) * 255
    channels = (x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), board)
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _to_png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
