"""Image preprocessing: all kinds of files, damaged files and decompression bombs."""

from __future__ import annotations

import json
import struct
import time
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageOps

from mlflow_pt_deploy.errors import ArtifactError, ModelError, RowError
from mlflow_pt_deploy.preprocessing import load_preprocessor
from mlflow_pt_deploy.preprocessing.image import MAX_PIXELS, ImagePreprocessor, typical_size

PALETTE = [0, 0, 255] * 256


def encoded(image: Image.Image, file: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file, **options)
    return buffer.getvalue()


def indexed(**options: Any) -> bytes:
    image = Image.new("P", (5, 5), 7)
    image.putpalette(PALETTE)
    return encoded(image, **options)


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header declares far more pixels than it contains."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.fixture
def preprocessor() -> ImagePreprocessor:
    return ImagePreprocessor(height=4, width=6)


@pytest.mark.parametrize(
    ("file", "colour"),
    [
        (picture("RGB", (9, 9), (1, 2, 3)), (1, 2, 3)),
        (picture("RGB", (9, 9), (1, 2, 3), "BMP"), (1, 2, 3)),
        (picture("RGB", (9, 9), (1, 2, 3), "TIFF"), (1, 2, 3)),
        (picture("RGB", (9, 9), (250, 250, 250), "WEBP"), (250, 250, 250)),
        (picture("L", (9, 9), 90), (90, 90, 90)),
        (picture("L", (9, 9), 90, "JPEG"), (90, 90, 90)),
        (picture("1", (9, 9), 1), (255, 255, 255)),
        (picture("LA", (9, 9), (90, 0)), (255, 255, 255)),  # fully transparent, on white
        (picture("RGBA", (9, 9), (0, 0, 0, 51)), (204, 204, 204)),  # 20 % black
        (picture("CMYK", (9, 9), (0, 0, 0, 0), "JPEG"), (255, 255, 255)),
        (picture("CMYK", (9, 9), (0, 255, 255, 0), "JPEG"), (254, 0, 0)),
        (picture("I;16", (9, 9), 257 * 40), (40, 40, 40)),
        (indexed(), (0, 0, 255)),
        (indexed(transparency=7), (255, 255, 255)),
        (indexed(file="GIF"), (0, 0, 255)),
        (picture("RGB", (1, 300), (0, 200, 0)), (0, 200, 0)),
        (picture("RGB", (1, 1), (0, 200, 0)), (0, 200, 0)),
        (picture("RGB", (2200, 2200), (0, 200, 0)), (0, 200, 0)),
    ],
)
def test_color_modes_and_formats(
    preprocessor: ImagePreprocessor, file: bytes, colour: tuple[int, int, int]
) -> None:
    (pixels,) = preprocessor.encode([file])
    assert pixels.shape == (4, 6, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - colour).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    corners = np.zeros((8, 12, 3), dtype=np.uint8)
    corners[:4, :6], corners[:4, 6:], corners[4:, :6] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(Image.fromarray(corners), exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(file)))
    size = {"height": upright.height, "width": upright.width}
    (pixels,) = ImagePreprocessor(**size).encode([file])
    assert (pixels == np.asarray(upright)).all()


@pytest.mark.parametrize(("size", "middle"), [((40, 20), slice(10, 30)), ((20, 40), slice(10, 30))])
def test_center_crop(size: tuple[int, int], middle: slice) -> None:
    stripes = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    stripes[(slice(None), middle) if size[0] > size[1] else middle] = 255
    preprocessor = ImagePreprocessor(height=20, width=20, shortest_edge=20)
    (pixels,) = preprocessor.encode([encoded(Image.fromarray(stripes))])
    assert (pixels == 255).all()


@pytest.mark.parametrize("file", ["BMP", "JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_truncated_file(preprocessor: ImagePreprocessor, file: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), file)
    good = picture("RGB", (9, 9), (1, 2, 3))
    with pytest.raises(RowError, match="^row 1 is a damaged or truncated image; give") as caught:
        preprocessor.encode([good, whole[: int(share * len(whole))]])
    assert caught.value.row == 1


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\x00",
        b"my secret",
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow would run Ghostscript
        picture("RGB", (9, 9), 0, "PPM"),
    ],
    ids=range(7),
)
def test_unsupported_formats(preprocessor: ImagePreprocessor, file: bytes) -> None:
    with pytest.raises(RowError, match="^row 0 is not an image of a supported format; use one of"):
        preprocessor.encode([file])


def test_floating_point_pixels(preprocessor: ImagePreprocessor) -> None:
    with pytest.raises(RowError, match="^row 0 has floating-point pixels; save it with 8"):
        preprocessor.encode([picture("F", (9, 9), 0.5, "TIFF")])


@pytest.mark.parametrize("edge", [6001, 12_000, 60_000, 2**31 - 1])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb_is_rejected_without_decoding(
    preprocessor: ImagePreprocessor, edge: int
) -> None:
    start = time.perf_counter()
    with pytest.raises(RowError, match="^row 0 has .* pixels; the limit is 36,000,000"):
        preprocessor.encode([bomb(edge, edge)])
    assert time.perf_counter() - start < 0.1
    assert edge * edge > MAX_PIXELS


def test_normalization() -> None:
    file = picture("RGB", (3, 3), (0, 51, 255))
    inputs = ImagePreprocessor(height=2, width=3)([file, file])
    assert list(inputs) == ["pixel_values"]
    assert inputs["pixel_values"].shape == (2, 3, 2, 3)
    assert inputs["pixel_values"].dtype == np.float32
    for channel, value in enumerate((-1, -0.6, 1)):  # (x / 255 - 0.5) / 0.5
        assert inputs["pixel_values"][:, channel] == pytest.approx(value)
    plain = {"rescale": 1.0, "mean": (0, 0, 0), "std": (1, 2, 5)}
    values = ImagePreprocessor(height=1, width=1, **plain)([file])["pixel_values"]
    assert values.ravel() == pytest.approx([0, 25.5, 51])


NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.mark.parametrize(
    ("processor", "geometry"),
    [
        ({"size": 32}, (32, 32, 0)),
        ({"size": {"height": 32, "width": 48}}, (32, 48, 0)),
        (
            {"size": {"shortest_edge": 256}, "crop_size": 224, "do_center_crop": True},
            (224, 224, 256),
        ),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224, 256)),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384, 0)),
        (
            {
                "size": {"height": 256, "width": 256},
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
            },
            (224, 224, 0),  # stretched to 256 x 256 first
        ),
    ],
)
def test_settings_of_hugging_face_models(
    processor: dict[str, Any], geometry: tuple[int, int, int]
) -> None:
    settings = ImagePreprocessor.from_transformers({**processor, **NORMAL}).settings
    assert (settings.height, settings.width, settings.shortest_edge) == geometry
    assert settings.rescale == pytest.approx(1 / 255)
    assert settings.mean == settings.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "processor",
    [
        {},
        NORMAL,
        {"size": 32, "image_mean": [0.5] * 3},
        {"size": {"shortest_edge": 32}, **NORMAL},
        {"size": "large", **NORMAL},
        {"size": 32, "do_pad": True, **NORMAL},
        {"size": {"longest_edge": 32}, **NORMAL},
    ],
)
def test_unsupported_settings(processor: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"^preprocessor_config.json: .*Give size as height and"):
        ImagePreprocessor.from_transformers(processor)


def test_save_and_load(tmp_path: Path) -> None:
    ImagePreprocessor(height=5, width=7, shortest_edge=9, mean=(0.1, 0.2, 0.3)).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == list(ImagePreprocessor.files)
    loaded = load_preprocessor(tmp_path)
    assert isinstance(loaded, ImagePreprocessor)
    assert (loaded.settings.height, loaded.settings.width) == (5, 7)
    file = picture("RGB", (30, 20), (10, 200, 90))
    again = ImagePreprocessor(height=5, width=7, shortest_edge=9, mean=(0.1, 0.2, 0.3))
    assert (loaded([file])["pixel_values"] == again([file])["pixel_values"]).all()


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b'{"kind": "image", "height": 3}'])
def test_invalid_file(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "a-variant"
    folder.mkdir()
    if content is not None:
        (folder / "preprocessor.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="^a-variant: the preprocessor cannot be read: "):
        load_preprocessor(folder)


def test_settings_are_plain_json(tmp_path: Path) -> None:
    ImagePreprocessor(height=4, width=6).save(tmp_path)
    settings = json.loads((tmp_path / "preprocessor.json").read_text(encoding="utf8"))
    assert settings["kind"] == "image"
    assert (settings["height"], settings["width"], settings["std"]) == (4, 6, [0.5] * 3)


@pytest.mark.parametrize(
    ("edges", "size"), [([8], 32), ([33], 64), ([90, 100, 2000], 128), ([3000], 224), ([], 224)]
)
def test_typical_size(edges: list[int], size: int) -> None:
    assert typical_size([b"broken", *(picture("L", (edge, 5), 0) for edge in edges)]) == size


def test_token_count_is_the_number_of_patches() -> None:
    preprocessor = ImagePreprocessor(height=64, width=32)
    (pixels,) = preprocessor.encode([picture("L", (9, 9), 0)])
    assert preprocessor.token_count(pixels) == 8
    assert preprocessor.token_count(pixels[:4, :4]) == 1
    assert [sample.shape for sample in preprocessor.warmup_rows()] == [(64, 32, 3)]
