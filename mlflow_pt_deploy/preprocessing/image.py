"""Decoding and normalization of images with Pillow and NumPy.

Every color mode (grey, palette, CMYK, 16 bits, transparency) and EXIF orientation becomes an
upright RGB image of the model's input size. Unsupported formats and images with too many pixels
are rejected before any pixel is decoded.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from io import BytesIO
from math import ceil, floor
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from mlflow_pt_deploy.errors import ArtifactError, DataError, ModelError, RowError, root_cause
from mlflow_pt_deploy.preprocessing.base import BATCH, Axis

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 36_000_000
"""Maximum number of pixels of an image: 144 MB with transparency."""

_LARGE = 4_000_000  # pixels; larger images are decoded one at a time to bound memory
_LARGE_LOCK = threading.Lock()

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SETTINGS = "preprocessor.json"
_ROTATED = (5, 6, 7, 8)  # values of EXIF Orientation that swap width and height
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REVERSED = ((2, 3, 7, 8), (3, 4, 6, 7))  # values that mirror the width, the height
_REDUCING_GAP = 2.0  # fast reduction first, to at least twice the target size
_MIN_SIZE, _MAX_SIZE, _SIZE_STEP = 32, 224, 32  # pixels
_SAMPLE_ROWS = 256
_DAMAGED = "is a damaged or truncated image; give the whole file"


def example_image(width: int = 32, height: int = 32) -> bytes:
    """A PNG file that belongs to no data set: a grey gradient."""
    file = BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, "PNG")
    return file.getvalue()


@dataclass(frozen=True)
class _Settings:
    """Settings of image preprocessing; the fields are keys of preprocessor.json.

    Attributes:
        height, width: Output size in pixels.
        shortest_edge: Length in pixels to which the shorter edge is scaled before the center crop;
            0 stretches the image.
        resample: Number of Pillow's resampling filter.
        rescale: Factor applied to pixel values of 0 to 255.
        mean, std: Mean and standard deviation of red, green and blue after rescaling.
        stretch: Height and width to which the image is stretched before the center crop; empty
            stretches to the output size without a crop.
        bgr: Whether the channel order is blue, green, red.
        whole_pixels: Whether sizes and offsets are rounded to whole pixels of the scaled image,
            as in transformers; false for artifacts of earlier versions.
    """

    height: int
    width: int
    shortest_edge: int = 0
    resample: int = int(Image.Resampling.BILINEAR)
    rescale: float = 1 / 255
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    stretch: tuple[int, ...] = ()
    bgr: bool = False
    whole_pixels: bool = False


class ImagePreprocessor:
    """Converts encoded images to ``pixel_values``.

    Args:
        **settings: See `_Settings`.
    """

    column = "image"
    files: tuple[str, ...] = (_SETTINGS,)
    slice_rows = 256
    unknown_id: int | None = None

    def __init__(self, **settings: Any) -> None:
        self.settings = _Settings(**settings)
        mean, std = (
            np.asarray(values, dtype=np.float64).reshape(3, 1, 1)
            for values in (self.settings.mean, self.settings.std)
        )
        self._scale = (self.settings.rescale / std).astype(np.float32)
        self._shift = (-mean / std).astype(np.float32)

    @classmethod
    def from_transformers(cls, processor: Mapping[str, Any]) -> ImagePreprocessor:
        """Create a preprocessor from the image processor of a Hugging Face model.

        Args:
            processor: Content of preprocessor_config.json.

        Raises:
            ModelError: The image preprocessing is not supported.
        """
        from mlflow_pt_deploy.preprocessing import image_processors as processors

        complete = processors.complete(processor)
        try:
            return cls(**processors.settings(complete))
        except Exception as error:  # depends on the processor class
            raise ModelError(
                f"preprocessor_config.json: unsupported image preprocessing ({root_cause(error)}). "
                "Give size as height and width, or as shortest_edge with a "
                "crop_size, and image_mean and image_std."
            ) from error

    @classmethod
    def load(cls, folder: Path) -> ImagePreprocessor:
        """Load a preprocessor from the files of `save`.

        Raises:
            ArtifactError: The file is missing or unreadable.
        """
        try:
            settings = json.loads((folder / _SETTINGS).read_text(encoding="utf8"))
            settings.pop("kind")
            return cls(**settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"{folder.name}: the preprocessor cannot be read: {error}"
            ) from error

    def save(self, folder: Path) -> None:
        """Write ``preprocessor.json`` to an existing folder."""
        settings = {"kind": "image", **asdict(self.settings)}
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf8")

    @property
    def step(self) -> npt.NDArray[np.float32]:
        """Change of the output per step of the pixel value (0 to 255), (3, 1, 1)."""
        return self._scale

    @property
    def axes(self) -> dict[str, dict[int, Axis]]:
        """``pixel_values``, with a dynamic batch."""
        return {"pixel_values": {0: BATCH}}

    def encode(self, rows: Sequence[bytes]) -> list[Pixels]:
        """Decode each image to pixels, uint8 (height, width, 3).

        Raises:
            RowError: A row is not an image, is damaged, or has more than `MAX_PIXELS` pixels.
        """
        encoded = []
        for number, row in enumerate(rows):
            try:
                encoded.append(self._decode(row))
            except DataError as error:
                raise RowError(number, str(error)) from error
        return encoded

    def collate(self, encoded: Sequence[Pixels]) -> dict[str, npt.NDArray[Any]]:
        """Normalize a batch.

        Returns:
            ``pixel_values``, float32 (rows, 3, height, width).
        """
        channels_last = np.stack(encoded)
        rows, height, width, _ = channels_last.shape
        pixels = np.empty((rows, 3, height, width), dtype=np.float32)
        if self.settings.bgr:
            channels_last = channels_last[..., ::-1]
        np.multiply(channels_last.transpose(0, 3, 1, 2), self._scale, out=pixels)
        pixels += self._shift
        return {"pixel_values": pixels}

    def join(
        self, batches: Sequence[Mapping[str, npt.NDArray[Any]]]
    ) -> dict[str, npt.NDArray[Any]]:
        """Combine results of `collate`."""
        return {"pixel_values": np.concatenate([batch["pixel_values"] for batch in batches])}

    def warmup_rows(self) -> list[Pixels]:
        """A grey image, to warm up a model."""
        return [np.full((self.settings.height, self.settings.width, 3), 128, dtype=np.uint8)]

    def token_count(self, encoded: Pixels) -> int:
        """Number of patches of 16 x 16 pixels, the tokens of a vision transformer."""
        return max(1, encoded.size // (3 * 256))

    def __call__(self, rows: Sequence[bytes]) -> dict[str, npt.NDArray[Any]]:
        """`encode` and `collate` in one step."""
        return self.collate(self.encode(rows))

    def _decode(self, data: bytes) -> Pixels:
        image = _open(data)
        if (pixels := image.width * image.height) > MAX_PIXELS:
            raise DataError(_too_large(f"{pixels:,}"))
        if image.mode == "F":
            raise DataError("has floating-point pixels; save it with 8 or 16 bits per channel")
        try:
            with _LARGE_LOCK if pixels > _LARGE else nullcontext():
                return self._pixels(image)
        except Exception as error:  # see `_open`
            raise DataError(_DAMAGED) from error

    def _pixels(self, image: Image.Image) -> Pixels:
        settings = self.settings
        target = (settings.width, settings.height)
        stretched = settings.stretch[::-1] or target
        edge = max(*target, *stretched, settings.shortest_edge)
        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is still large enough.
        if settings.resample != Image.Resampling.NEAREST:  # NEAREST needs the original pixels
            image.draft(None, (round(_REDUCING_GAP * edge), round(_REDUCING_GAP * edge)))
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation in _ROTATED:
            target, stretched = target[::-1], stretched[::-1]
        box = self._crop_box(image.size, target, stretched, orientation)
        small = _to_rgb(image).resize(
            target, settings.resample, box=box, reducing_gap=_REDUCING_GAP
        )
        if orientation in _TRANSPOSITIONS:
            small = small.transpose(_TRANSPOSITIONS[orientation])
        return cast(Pixels, np.asarray(_on_white(small)))

    def _crop_box(
        self,
        size: tuple[int, int],
        target: tuple[int, ...],
        stretched: tuple[int, ...],
        orientation: int,
    ) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the crop, in pixels of the stored image."""
        edge, spans = self.settings.shortest_edge, []
        for axis, (full, out, length) in enumerate(zip(size, target, stretched, strict=True)):
            scaled = edge * full / min(size) if edge else float(length)
            scaled = int(scaled) if self.settings.whole_pixels else scaled
            kept = min(float(out), scaled)
            start = (scaled - kept) / 2
            if self.settings.whole_pixels:  # rounded down at the start of the upright image
                start = ceil(start) if orientation in _REVERSED[axis] else floor(start)
            spans.append((start * full / scaled, (start + kept) * full / scaled))
        (left, right), (top, bottom) = spans
        return left, top, right, bottom


def typical_size(rows: Sequence[bytes]) -> int:
    """Choose the input size of a model for given images: 32 to 224 pixels, a multiple of 32.

    Args:
        rows: Encoded images; the headers of a sample are read.
    """
    edges = []
    for row in rows[:: max(1, len(rows) // _SAMPLE_ROWS)]:
        try:
            edges.append(max(_open(row).size))
        except DataError:  # `encode` reports the row
            continue
    median = float(np.median(edges)) if edges else _MAX_SIZE
    return int(min(max(_SIZE_STEP * np.ceil(median / _SIZE_STEP), _MIN_SIZE), _MAX_SIZE))


def _open(data: bytes) -> Image.Image:
    """Read the header only."""
    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(_too_large("too many")) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"is not an image of a supported format; use one of {', '.join(_FORMATS)}"
        ) from error
    # Pillow raises many unrelated errors for damaged files.
    except Exception as error:
        raise DataError(_DAMAGED) from error


def _too_large(pixels: str) -> str:
    return f"has {pixels} pixels; the limit is {MAX_PIXELS:,}, e.g. 6000 x 6000. Resize it"


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, or to RGBA if the image is transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
