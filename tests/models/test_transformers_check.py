"""Preprocessing and outputs equal those of transformers, or the model is rejected."""

from __future__ import annotations

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import models
from tiny.models import ROBERTA, SMALL
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoImageProcessor, AutoTokenizer

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import (
    Classifier,
    load_classifier,
    new_classifier,
    new_static,
    reload_classifier,
    save_classifier,
)
from mlflow_pt_deploy.preprocessing import TextPreprocessor, load_preprocessor
from mlflow_pt_deploy.preprocessing.image import ImagePreprocessor
from mlflow_pt_deploy.training.inference import predict_logits

ROWS = ["play some jazz", "", "a", "is it gonna rain in zürich on the 24th 東京's sun " * 9]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to modify."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, name: str, **changes: Any) -> str:
    """Change keys of a JSON file."""
    found = json.loads((folder / name).read_text(encoding="utf8"))
    (folder / name).write_text(json.dumps(found | changes), encoding="utf8")
    return str(folder)


@torch.no_grad()
def expected_logits(folder: str, row: str, max_length: int) -> np.ndarray:
    """Logits of a row with transformers only."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer([row], truncation=True, max_length=max_length, return_tensors="pt")
    names = ("input_ids", "attention_mask")
    return network(**{name: inputs[name] for name in names}).logits.numpy()


def check_equal_to_transformers(classifier: Classifier, folder: str) -> None:
    together = predict_logits(classifier, ROWS)
    for row, logits in zip(ROWS, together, strict=True):
        assert predict_logits(classifier, [row])[0] == pytest.approx(logits, abs=1e-4)
        if classifier.preprocessor.encode([row])[0]:
            text = row or " " * (not classifier.tokenizer("")["input_ids"])
            expected = expected_logits(folder, text, classifier.preprocessor.max_length)
            assert logits == pytest.approx(expected[0], abs=1e-4)


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("Roberta", 32),
        ("RobertaPreLayerNorm", 32),
        ("XLMRobertaXL", 32),
        ("Data2VecText", 32),
        ("IBert", 32),
        ("Camembert", 32),
        ("Bart", 34),  # its table has two additional rows
    ],
)
def test_maximum_length_of_architectures(tmp_path: Path, family: str, positions: int) -> None:
    tokenizer = models.pieces(model_max_length=512)
    small = {**SMALL, **ROBERTA}
    if family == "Bart":
        small = {key: it for key, it in ROBERTA.items() if key != "type_vocab_size"}
        small |= {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.3}
        small |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    reference = models.save(tmp_path, f"{family}ForSequenceClassification", tokenizer, **small)
    classifier = load_classifier(reference)
    assert classifier.preprocessor.max_length == positions
    check_equal_to_transformers(classifier, reference)


def test_network_without_a_maximum_length(tmp_path: Path) -> None:
    """XLNet has relative positions and left padding."""
    tokenizer = models.pieces(padding_side="left", model_max_length=int(1e30))
    small = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "initializer_range": 0.3}
    reference = models.save(
        tmp_path, "XLNetForSequenceClassification", tokenizer, pad_token_id=1, **small
    )
    classifier = load_classifier(reference)
    assert classifier.preprocessor.max_length == 512
    inputs = classifier.preprocessor(["a", "play some jazz"])
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][0, -1] == 1
    check_equal_to_transformers(classifier, reference)
    save_classifier(new_static(classifier), tmp_path / "static")
    check_independent_of_batch(load_classifier(str(tmp_path / "static")))


def check_independent_of_batch(classifier: Classifier) -> None:
    together = predict_logits(classifier, ROWS)
    for row, logits in zip(ROWS, together, strict=True):
        assert predict_logits(classifier, [row])[0] == pytest.approx(logits, abs=1e-4)


GPT2 = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}


def gpt2(folder: Path, pad: str | None, declared: int | None) -> str:
    tokenizer = models.plain(pad)
    end = tokenizer.eos_token_id
    ids = {"eos_token_id": end, "bos_token_id": end, "pad_token_id": declared}
    return models.save(folder, "GPT2ForSequenceClassification", tokenizer, **GPT2, **ids)


@pytest.mark.parametrize("pad", [None, "<|end|>"])
@pytest.mark.parametrize("declared", [True, False])
def test_padding_of_decoders(tmp_path: Path, pad: str | None, declared: bool) -> None:
    end = models.plain(None).eos_token_id
    reference = gpt2(tmp_path / "gpt2", pad, end if declared else None)
    if pad is None and not declared:
        for load in (load_classifier, lambda it: new_classifier(it, ["a", "b"])):
            with pytest.raises(ModelError, match="has no padding token, .* Set both and save"):
                load(reference)
        return
    classifier = load_classifier(reference)
    assert classifier.preprocessor.pad_id == classifier.network.config.pad_token_id == end
    check_equal_to_transformers(classifier, reference)
    save_classifier(classifier, tmp_path / "saved")
    assert (
        predict_logits(reload_classifier(str(tmp_path / "saved")), ROWS)
        == predict_logits(classifier, ROWS)
    ).all()


def test_two_padding_ids(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has two padding ids: \d+ in its tokenizer, 0 in conf"):
        load_classifier(gpt2(tmp_path, "<|end|>", 0))


def test_end_token_as_padding(tmp_path: Path) -> None:
    """transformers classifies at the end token, or before it if it is the padding id."""
    tokenizer = models.pieces(pad_token="</s>")
    reference = models.save(
        tmp_path, "GPT2ForSequenceClassification", tokenizer, **GPT2, pad_token_id=None
    )
    with pytest.raises(ModelError, match="gives other results with transformers"):
        load_classifier(reference)


@pytest.mark.parametrize("architecture", ["FNetForSequenceClassification"])
def test_unmasked_padding(tmp_path: Path, architecture: str) -> None:
    small = {**SMALL, "max_position_embeddings": 32, "pad_token_id": 1}
    reference = models.save(tmp_path, architecture, models.pieces(), **small)
    with pytest.raises(ModelError, match="for a text in a batch with a longer one"):
        load_classifier(reference)


def test_truncation_side(folder: Path, tmp_path: Path) -> None:
    reference = change(folder, "tokenizer_config.json", truncation_side="left")
    classifier = load_classifier(reference)
    row = "card " * 200 + "refund"
    ids = classifier.tokenizer(row, truncation=True, max_length=128)["input_ids"]
    assert classifier.preprocessor.encode([row, "é " + row]) == [ids, ids]
    classifier.preprocessor.save(tmp_path)
    again = load_preprocessor(tmp_path)
    assert again.encode([row]) == [ids]
    settings = json.loads((tmp_path / "preprocessor.json").read_text(encoding="utf8"))
    for name in ("truncation_side", "padding_side"):  # as in earlier versions
        del settings[name]
    (tmp_path / "preprocessor.json").write_text(json.dumps(settings), encoding="utf8")
    old = TextPreprocessor.load(tmp_path)
    assert (old.truncation_side, old.padding_side) == ("right", "right")
    (start,) = old.encode([row])
    assert start == ids[:1] + ids[1:-2] + ids[1:2] + ids[-1:] != ids


def test_text_without_a_token(tmp_path: Path) -> None:
    classifier = load_classifier(gpt2(tmp_path, "<|end|>", None))
    assert classifier.tokenizer("")["input_ids"] == []
    assert classifier.preprocessor.encode([""]) == classifier.preprocessor.encode([" "])
    inputs = classifier.preprocessor([""])
    assert inputs["attention_mask"].tolist() == [[1, 0]]  # the minimum length of exported graphs
    assert np.isfinite(predict_logits(classifier, ["", ""])).all()


@pytest.mark.parametrize("load", [load_classifier, lambda it: new_classifier(it, ["a", "b"])])
def test_missing_tokenizer(folder: Path, load: Any) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded .* which writes"):
        load(str(folder))
    change(folder, "tokenizer_config.json", tokenizer_class="BertTokenizer")
    with pytest.raises(ModelError, match="has no valid tokenizer: 5 tokens for .* embeddings"):
        load(str(folder))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"it has no tokenizer; save it in the folder"):
        load(str(folder))


def test_tokenizer_of_another_model(folder: Path, tmp_path: Path) -> None:
    larger = models.plain(None)
    larger.save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"has a tokenizer with the id \d+, but only \d+ embeddings"
    ):
        load_classifier(str(folder))
    words = {"[PAD]": 0, "[UNK]": 1, "zebra": 2}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_max_length": 16}
    few = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    few.save_pretrained(folder)
    with pytest.raises(ModelError, match="has no valid tokenizer: 3 tokens for"):
        load_classifier(str(folder))


def test_tokenizer_that_needs_conversion(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "spm.model").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is spm.model without .* Convert it once: pip inst"):
        load_classifier(str(folder))


@pytest.mark.parametrize(
    "content", [b"\x80\x02garbage", b"", b"version https://git-lfs.github.com"]
)
def test_damaged_pytorch_weights(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match=r"pytorch_model.bin is|no classifier can be loaded"):
        load_classifier(str(folder))


def test_pickled_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    (folder / "model.safetensors").unlink()
    torch.save({"bert.x": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="contains more than weights; its code is never run"):
        load_classifier(str(folder))
    assert not (tmp_path / "ran").exists()


def test_pytorch_weights(tiny_model: Path, folder: Path) -> None:
    network = load_classifier(str(tiny_model)).network
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    found = predict_logits(load_classifier(str(folder)), ["my card"])
    assert (found == predict_logits(load_classifier(str(tiny_model)), ["my card"])).all()


def test_nan_in_weights(tiny_model: Path, tmp_path: Path) -> None:
    classifier = load_classifier(str(tiny_model))
    classifier.network.classifier.weight.data[0, 0] = float("nan")
    save_classifier(classifier, tmp_path / "broken")
    with pytest.raises(ModelError, match="returns NaN or infinity. Its weights are damaged"):
        load_classifier(str(tmp_path / "broken"))


MEAN, DEVIATION, HALF = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], [0.5] * 3
USUAL = {"image_mean": MEAN, "image_std": DEVIATION, "resample": 3}
CUT = {"do_center_crop": True, "crop_size": {"height": 56, "width": 56}}
SHORT = {"size": {"shortest_edge": 64}}
OLD = "feature_extractor_type"
NEW = "image_processor_type"
PROCESSORS = {
    "ConvNeXt of 2022": {OLD: "ConvNextFeatureExtractor", "size": 56, "crop_pct": 0.875, **USUAL},
    "ConvNeXt": {NEW: "ConvNextImageProcessor", "size": {"shortest_edge": 56}, **USUAL},
    "ConvNeXt, large": {NEW: "ConvNextImageProcessor", "size": {"shortest_edge": 384}, **USUAL},
    "ViT of 2021": {OLD: "ViTFeatureExtractor", "size": 56, "image_mean": HALF, "image_std": HALF},
    "ViT, fast": {NEW: "ViTImageProcessorFast", "size": {"height": 56, "width": 40}, **USUAL},
    "DeiT of 2021": {OLD: "DeiTFeatureExtractor", "size": 64, **USUAL, **CUT, "crop_size": 56},
    "DeiT": {NEW: "DeiTImageProcessor", "size": {"height": 64, "width": 80}, **USUAL, **CUT},
    "CLIP": {NEW: "CLIPImageProcessor", **SHORT, **USUAL, **CUT},
    "BEiT": {OLD: "BeitFeatureExtractor", "size": 56, "do_center_crop": False, **USUAL},
    "DINOv2": {NEW: "BitImageProcessor", **SHORT, **USUAL, **CUT},
    "MobileNet": {NEW: "MobileNetV2ImageProcessor", **SHORT, **CUT},
    "EfficientNet": {NEW: "EfficientNetImageProcessor", "size": {"height": 56, "width": 56}},
    "EfficientNet, offset": {
        NEW: "EfficientNetImageProcessor",
        "size": {"height": 56, "width": 56},
        "rescale_offset": True,
        "rescale_factor": 1 / 127.5,
        "include_top": False,
        "resample": 0,
    },
    "MobileViT": {NEW: "MobileViTImageProcessor", **SHORT, **CUT, "do_flip_channel_order": True},
    "LeViT": {NEW: "LevitImageProcessor", "size": {"shortest_edge": 56}, **USUAL, **CUT},
    "PoolFormer": {NEW: "PoolFormerImageProcessor", **SHORT, "crop_pct": 0.9, **USUAL, **CUT},
    "SigLIP": {NEW: "SiglipImageProcessor", "size": {"height": 56, "width": 56}},
}


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    board = ((x // 20 + y // 20) % 2) * 255
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, board], axis=-1).astype(np.uint8)
    )


def to_file(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(300, 200), (200, 301), (20, 30)])
def test_pixels_equal_those_of_transformers(
    tmp_path: Path, name: str, size: tuple[int, int]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[name]))
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = processor(gradient(*size), return_tensors="np")["pixel_values"][0]
    ours = ImagePreprocessor.from_transformers(PROCESSORS[name])
    (found,) = ours([to_file(gradient(*size))])["pixel_values"]
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 0.015


@pytest.mark.parametrize("orientation", [1, 6])
def test_crop_of_a_rotated_image(orientation: int) -> None:
    deit = ImagePreprocessor(height=40, width=60, stretch=(50, 90))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture, buffer = gradient(300, 200), BytesIO()
    stored = picture.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else picture
    stored.save(buffer, "PNG", exif=exif)
    found = deit.encode([buffer.getvalue()])[0].astype(int)
    assert np.abs(found - deit.encode([to_file(picture)])[0]).mean() < 1


def test_grey_images_and_channel_order() -> None:
    ours = ImagePreprocessor(height=8, width=8, bgr=True, mean=(0, 0, 0), std=(1, 1, 1))
    colour = to_file(Image.new("RGB", (9, 9), (255, 0, 51)))
    assert ours([colour])["pixel_values"][0, :, 0, 0] == pytest.approx([0.2, 0, 1])
    grey = ours([to_file(Image.new("L", (9, 9), 51))])["pixel_values"]
    assert grey == pytest.approx(np.full((1, 3, 8, 8), 0.2))


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (
            {NEW: "PerceiverImageProcessor"},
            r"has an unsupported image processor \(PerceiverImageProcessor",
        ),
        ({NEW: "TextNetImageProcessor"}, "unsupported image preprocessing .*size_divisor"),
        ({NEW: "ViTImageProcessor", "size": {"shortest_edge": 32}}, "shortest_edge without a crop"),
        ({NEW: "NoSuchImageProcessor"}, "unsupported image preprocessing"),
        (
            {"size": 32, "image_mean": HALF, "image_std": HALF},
            "has an .*image processor",
        ),  # without a class
        ({NEW: "ViTImageProcessor", "do_resize": False}, "do_resize is false"),
        ([], "no classifier can be loaded"),
    ],
)
def test_unsupported_image_processors(
    tiny_resnet: Path, tmp_path: Path, processor: Any, message: str
) -> None:
    folder = Path(shutil.copytree(tiny_resnet, tmp_path / "model"))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    for load in (load_classifier, lambda it: new_classifier(it, ["a", "b"])):
        with pytest.raises(ModelError, match=message):
            load(str(folder))


def test_settings_of_the_image_processor_after_saving(tiny_resnet: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_resnet, tmp_path / "model"))
    old = {OLD: "ConvNextFeatureExtractor", "size": 32, "crop_pct": 0.875, **USUAL}
    (folder / "preprocessor_config.json").write_text(json.dumps(old))
    classifier = load_classifier(str(folder))
    assert classifier.preprocessor.settings.shortest_edge == 36
    save_classifier(classifier, tmp_path / "saved")
    again = load_classifier(str(tmp_path / "saved"))
    assert again.preprocessor.settings == classifier.preprocessor.settings
