"""Contract tests of the `Variant` interface, run for every variant of the catalog.

bf16 is tested on every machine; emulated arithmetic is slow but correct.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import picture

from mlflow_pt_deploy.artifacts import LoadedVariant, load_variant, verify
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import MissingExtraError, VariantError
from mlflow_pt_deploy.model_types import STATIC
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.preprocessing import row_from_json
from mlflow_pt_deploy.runtimes import streams
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.catalog import (
    ON_REQUEST,
    STATIC_VARIANTS,
    VARIANTS,
    select,
    skip_reason,
    supports,
)
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.numpy_static import NumPy
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.openvino import OpenVino
from mlflow_pt_deploy.system.device import CPU
from mlflow_pt_deploy.training.inference import predict_logits

LARGEST = 5.0  # largest logit of the tiny model
# Maximum difference to eager fp32, relative to the largest logit. 32 dimensions with three outliers
# are difficult for int8: they share a scale, and fewer errors cancel out than in a wider model.
TOLERANCE = {
    "fp32": 1e-4,
    "bf16": 0.05,
    "fp16": 0.01,
    "int8-dynamic": 0.15,
    "int8-static": 0.2,
    "int8-accuracy": 0.2,
}
# Maximum difference between a single row and the same row in a batch. Dynamic int8 has one scale
# per batch, so the logits of a row depend on the other rows.
BATCH_TOLERANCE = {
    "fp32": 1e-4,
    "bf16": 0.05,
    "fp16": 0.01,
    "int8-dynamic": 0.1,
    "int8-static": 0.02,
    "int8-accuracy": 0.02,
}
ALL = tuple(variant for variant in (*VARIANTS, *ON_REQUEST) if variant.device == CPU)
CALIBRATED = [variant for variant in ALL if variant.precision in ("int8-static", "int8-accuracy")]
CONTRACTS = [("teacher", variant) for variant in ALL]
CONTRACTS += [("static", variant) for variant in STATIC_VARIANTS]
CONTRACTS += [
    ("resnet", variant)
    for variant in ALL
    if not skip_reason(variant, "resnet")
    and variant != AOTInductor("bf16")  # would only cost another minute
]
CONTRACTS += [
    ("mobilenet", variant) for variant in (Eager(), OnnxRuntime(), OnnxRuntime("int8-static"))
]
MOBILENET_FACTOR = 3  # an eighth of MobileNetV2 has too few channels for int8 errors to cancel out
ODD = {
    "text": ["", "a", "😀🏳️‍🌈 card 👩‍👩‍👧", "שלום card עולם", "مرحبا", "\u202ecard\x00\t\u200d"],
    "image": [
        picture("L", (9, 9), 90),
        picture("1", (40, 3), 1),
        picture("CMYK", (30, 60), (0, 90, 200, 10), "JPEG"),
        picture("RGBA", (8, 8), (200, 0, 0, 60)),
        picture("RGB", (1, 300), (0, 200, 0)),
        picture("I;16", (20, 20), 40_000),
    ],
}
LIBRARIES = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino",)}
NEED_LIBRARIES = [
    (variant, library) for variant in ALL for library in LIBRARIES.get(variant.extra or "", ())
]


def _id(value: object) -> str:
    if isinstance(value, tuple):
        return f"{value[0]}-{_id(value[1])}"
    return f"{value.runtime}-{value.precision}" if isinstance(value, Variant) else str(value)


@pytest.fixture(scope="module", params=CONTRACTS, ids=_id)
def contract(request: pytest.FixtureRequest) -> tuple[str, Variant]:
    # AOTInductor is skipped only without a compiler; bf16 is tested on every machine.
    if isinstance(request.param[1], AOTInductor) and (reason := AOTInductor().unsupported()):
        pytest.skip(reason)
    if request.param[1] == AOTInductor("int8-static"):
        pytest.importorskip("torchao", reason="needs the extra quantize")
    return request.param


@pytest.fixture(scope="module")
def model(contract: tuple[str, Variant]) -> str:
    return contract[0]


@pytest.fixture(scope="module")
def variant(contract: tuple[str, Variant]) -> Variant:
    return contract[1]


@pytest.fixture(scope="module")
def folder(model: str, variant: Variant, exported: Callable[..., Path]) -> Path:
    return exported(variant, model)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedVariant:
    return load_variant(folder, threads=1, allow_code=True, check_golden=False)


@pytest.fixture(scope="module")
def classifier(model: str, tiny_models: dict[str, tuple[Path, Splits]]) -> Classifier:
    return load_classifier(str(tiny_models[model][0]))


@pytest.fixture(scope="module")
def splits(model: str, tiny_models: dict[str, tuple[Path, Splits]]) -> Splits:
    return tiny_models[model][1]


@pytest.fixture
def text_only(splits: Splits) -> None:
    if splits.column != "text":
        pytest.skip("images have neither length nor padding")


@pytest.fixture(scope="module")
def transformer(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest logit."""
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / LARGEST)


def test_manifest_labels_and_preprocessor_survive_the_export(
    model: str,
    variant: Variant,
    folder: Path,
    loaded: LoadedVariant,
    classifier: Classifier,
    splits: Splits,
) -> None:
    assert folder.name == variant.name(model)
    assert loaded.manifest == verify(folder)
    assert loaded.manifest.name == folder.name
    assert (loaded.manifest.runtime, loaded.manifest.precision) == (
        variant.runtime,
        variant.precision,
    )
    assert loaded.manifest.carries_code == variant.carries_code
    assert loaded.labels == splits.labels
    rows = splits.test.rows[:2]
    pairs = zip(loaded.preprocessor.encode(rows), classifier.preprocessor.encode(rows), strict=True)
    assert all(np.array_equal(actual, expected) for actual, expected in pairs)


def test_logits_equal_eager_fp32(
    model: str, variant: Variant, loaded: LoadedVariant, classifier: Classifier, splits: Splits
) -> None:
    rows = splits.validation.rows
    expected = predict_logits(classifier, rows)
    actual = np.concatenate([loaded.logits([row]) for row in rows])
    allowed = TOLERANCE[variant.precision] * (MOBILENET_FACTOR if model == "mobilenet" else 1)
    assert difference(actual, expected) < allowed
    assert (actual.argmax(axis=1) == splits.validation.targets).all()


def test_variant_computes_in_its_precision(
    variant: Variant, loaded: LoadedVariant, classifier: Classifier, splits: Splits
) -> None:
    if variant.precision == "fp32":
        pytest.skip("fp32 is the reference")
    if variant == OpenVino("bf16"):
        pytest.skip("OpenVINO computes in fp32 on a CPU without bf16")
    rows = splits.validation.rows
    minimum = 1e-4 if variant.precision == "fp16" else 1e-3  # fp16 has a longer mantissa than bf16
    assert difference(loaded.logits(rows), predict_logits(classifier, rows)) > minimum


@pytest.mark.parametrize("size", [1, 2, 33])
def test_shape_and_dtype_of_a_batch(loaded: LoadedVariant, splits: Splits, size: int) -> None:
    logits = loaded.logits(splits.train.rows[:size])
    assert type(logits) is np.ndarray
    assert logits.dtype == np.float32
    assert logits.shape == (size, 3)
    assert np.isfinite(logits).all()


def test_results_are_not_overwritten_by_later_calls(loaded: LoadedVariant, splits: Splits) -> None:
    first = loaded.logits(splits.test.rows[:1])
    kept = first.copy()
    loaded.logits(splits.test.rows[1:2])
    assert (first == kept).all()


@pytest.mark.parametrize("number", range(6))
def test_odd_rows(
    variant: Variant, loaded: LoadedVariant, classifier: Classifier, number: int
) -> None:
    row = ODD[classifier.preprocessor.column][number]
    expected = predict_logits(classifier, [row])
    if variant in CALIBRATED and isinstance(row, bytes):
        # Plain colors are far outside of the calibrated range, and int8 clips them.
        assert np.isfinite(loaded.logits([row])).all()
        return
    assert difference(loaded.logits([row]), expected) < TOLERANCE[variant.precision]


def test_long_text_is_truncated_to_the_maximum_length(
    variant: Variant, loaded: LoadedVariant, classifier: Classifier, text_only: None
) -> None:
    text = "card pay " * 1111 + "a"
    assert len(text) == 10_000
    assert loaded.preprocessor([text])["input_ids"].shape == (1, 128)
    logits = loaded.logits([text])
    assert difference(logits, predict_logits(classifier, [text])) < TOLERANCE[variant.precision]
    # 126 words, [CLS] and [SEP] are used; later words have no effect.
    assert difference(loaded.logits(["card pay " * 63 + "refund " * 50]), logits) < 1e-6


def test_row_does_not_depend_on_other_rows(
    variant: Variant, loaded: LoadedVariant, splits: Splits
) -> None:
    rows = ["my card", "refund", "", "please send my money abroad " * 20]
    if splits.column == "image":
        rows = [*splits.test.rows[:3], ODD["image"][0]]
    batched = loaded.logits(rows)
    single = np.concatenate([loaded.logits([row]) for row in rows])
    assert difference(batched, single) < BATCH_TOLERANCE[variant.precision]


def test_padding_has_no_effect(
    variant: Variant, loaded: LoadedVariant, classifier: Classifier, text_only: None
) -> None:
    def padded(encoded: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        inputs = loaded.preprocessor.collate(encoded)
        width = ((0, 0), (0, 9))
        return {name: np.pad(array, width) for name, array in inputs.items()}

    rows = ["my card", "i want a refund"]
    actual = loaded.predict(padded(loaded.preprocessor.encode(rows)))
    assert difference(actual, loaded.logits(rows)) < BATCH_TOLERANCE[variant.precision]


def test_golden_rows_have_the_logits_of_the_export(variant: Variant, folder: Path) -> None:
    golden = json.loads((folder / "golden.json").read_text(encoding="utf8"))
    loaded = load_variant(folder, threads=1, allow_code=True, check_golden=True)
    rows = [row_from_json(row) for row in golden["rows"]]
    actual = np.concatenate([loaded.logits([row]) for row in rows])
    assert difference(actual, np.asarray(golden["logits"])) < 1e-5  # the same machine


def test_logits_do_not_depend_on_the_number_of_threads(
    variant: Variant,
    folder: Path,
    loaded: LoadedVariant,
    splits: Splits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "_MIN_ROW_S", 0.0)  # split batches of the tiny model, too
    rows = splits.test.rows[:2]
    one = loaded.logits(rows)
    two = load_variant(folder, threads=2, allow_code=True, check_golden=False).logits(rows)
    # Loading again resets the number of threads.
    loaded = load_variant(folder, threads=1, allow_code=True, check_golden=False)
    scaled = isinstance(loaded.predict, streams.Streams) and variant.precision == "int8-dynamic"
    # Two threads compute one row each; one thread computes both with one scale.
    assert difference(two, one) < (BATCH_TOLERANCE[variant.precision] if scaled else 1e-5)
    assert difference(loaded.logits(rows), one) < 1e-5


@pytest.mark.parametrize(("variant_", "library"), NEED_LIBRARIES, ids=_id)
def test_missing_library_names_its_extra(
    variant_: Variant,
    library: str,
    transformer: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    message = rf"{library} is not installed.*pip install 'mlflow-pt-deploy\[{variant_.extra}\]'"
    with pytest.raises(MissingExtraError, match=message):
        variant_.export(transformer, transformer.preprocessor(["a", "my card"]), [], tmp_path)
    if library != "onnx":  # only needed to export
        with pytest.raises(MissingExtraError, match=message):
            variant_.load(tmp_path, device="cpu", threads=1)


@pytest.mark.parametrize(
    ("variant_", "library", "extra"),
    [
        (OpenVino("int8-static"), "nncf", "openvino"),
        (OpenVino("int8-accuracy"), "nncf", "openvino"),
        (AOTInductor("int8-static"), "torchao", "quantize"),
    ],
    ids=_id,
)
def test_missing_quantizer_names_its_extra(
    variant_: Variant,
    library: str,
    extra: str,
    transformer: Classifier,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    example = transformer.preprocessor(["a", "my card"])
    message = rf"{library} is not installed.*pip install 'mlflow-pt-deploy\[{extra}\]'"
    with pytest.raises(MissingExtraError, match=message):
        variant_.export(transformer, example, [example], tmp_path)


@pytest.mark.parametrize("variant_", CALIBRATED, ids=_id)
def test_too_few_rows_to_calibrate(
    variant_: Variant, transformer: Classifier, tmp_path: Path
) -> None:
    if isinstance(variant_, AOTInductor):
        pytest.importorskip("torchao", reason="needs the extra quantize")
    rows = [transformer.preprocessor([f"my card {number}"]) for number in range(15)]
    message = "needs at least 16 rows of train to calibrate, and got 15. Give more rows"
    with pytest.raises(VariantError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variant_.export(transformer, transformer.preprocessor(["a", "my card"]), rows, tmp_path)


def test_numpy_supports_static_students_only(transformer: Classifier, tmp_path: Path) -> None:
    example = transformer.preprocessor(["a", "my card"])
    with pytest.raises(VariantError, match="static students only"):
        NumPy().export(transformer, example, [], tmp_path)


def test_supported_variants_of_a_model_type() -> None:
    assert [v for v in VARIANTS if supports(v, "bert")] == list(VARIANTS)
    assert not supports(NumPy(), "bert")
    convolutions = {f"{v.runtime}-{v.precision}" for v in VARIANTS if not skip_reason(v, "resnet")}
    assert {"eager-fp32", "onnxruntime-int8-static", "openvino-int8-static"} < convolutions
    assert not any("dynamic" in name for name in convolutions)
    static = [v for v in select("") if supports(v, STATIC)]
    assert set(static) == set(STATIC_VARIANTS)


@pytest.mark.parametrize("variant_", (*ALL, NumPy()), ids=_id)
def test_name_and_equality(variant_: Variant) -> None:
    assert variant_.name("student") == f"student-{variant_.runtime}-{variant_.precision}"
    assert variant_ == type(variant_)(variant_.precision)
    assert variant_.precision in TOLERANCE
