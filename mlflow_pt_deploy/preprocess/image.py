"""Encoded images to pixels, with Pillow and NumPy alone.

Whatever a file holds (grey, palette, CMYK, 16 bits, transparency, a camera held sideways) comes
out as one upright RGB picture of the model's size. What could harm is refused before a pixel is
decoded: formats outside a short list, and pictures of too many pixels.
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

from mlflow_pt_deploy.errors import ArtifactError, DataError, ModelError, RowError, first_line
from mlflow_pt_deploy.preprocess.base import BATCH, Axis

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 36_000_000
"""Pixels of the largest picture that is decoded: 144 MB, if it is transparent."""

_LARGE = 4_000_000  # pixels; so large ones are decoded one at a time, so that memory stays bounded
_ONE_LARGE = threading.Lock()

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SETTINGS = "preprocessor.json"
_SIDEWAYS = (5, 6, 7, 8)  # values of Exif's Orientation that swap width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REVERSED = ((2, 3, 7, 8), (3, 4, 6, 7))  # values that mirror what is stored: width, height
_GAP = 2.0  # a cheap reduction first, to not less than twice the size that is wanted
_SMALLEST, _LARGEST, _STEP = 32, 224, 32
_LOOKED_AT = 256
_DAMAGED = "is a damaged or cut off image; give the whole file"


@dataclass(frozen=True)
class _Settings:
    """How pictures become a model's input.

    Attributes:
        height, width: Of the result, in pixels.
        shortest_edge: The picture is scaled until its shorter edge has so many pixels, and the
            middle is cut out; 0: it is stretched.
        resample: Pillow's number of the filter.
        rescale: What a value of 0 to 255 is multiplied with first.
        mean, std: Of red, green and blue after that.
        stretch: Height and width that it is stretched to before the middle is cut out; empty:
            height x width, so that nothing is cut off.
        bgr: Whether the channels are blue, green and red instead.
        whole_pixels: Whether sizes and places are rounded to whole pixels of the scaled picture,
            as transformers does; artifacts of earlier versions do not.
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
    """Encoded images to ``pixel_values``.

    Args:
        **settings: See `_Settings`.
    """

    column = "image"
    files: tuple[str, ...] = (_SETTINGS,)
    slice_rows = 256

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
        """Take over the image processor of a Hugging Face model.

        Args:
            processor: The content of its preprocessor_config.json.

        Raises:
            ModelError: It resizes in a way that is not known here.
        """
        from mlflow_pt_deploy.preprocess import processors

        complete = processors.complete(processor)
        try:
            return cls(**processors.settings(complete))
        except Exception as error:  # each of transformers' processors has its own
            raise ModelError(
                "preprocessor_config.json: the images are prepared in a way that is not known here "
                f"({first_line(error)}). Give size as height and width, or as shortest_edge with a "
                "crop_size, and image_mean and image_std."
            ) from error

    @classmethod
    def load(cls, folder: Path) -> ImagePreprocessor:
        """Read what `save` wrote.

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
        """Write ``preprocessor.json`` into an existing folder."""
        settings = {"kind": "image", **asdict(self.settings)}
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf8")

    @property
    def step(self) -> npt.NDArray[np.float32]:
        """What one step of 0 to 255 is in the result, (3, 1, 1)."""
        return self._scale

    @property
    def axes(self) -> dict[str, dict[int, Axis]]:
        """``pixel_values``, of which only the batch is free."""
        return {"pixel_values": {0: BATCH}}

    def encode(self, rows: Sequence[bytes]) -> list[Pixels]:
        """Pixels of each image, uint8 (height, width, 3).

        Raises:
            RowError: A row is no image, is damaged, or has more than `MAX_PIXELS` pixels.
        """
        encoded = []
        for number, row in enumerate(rows):
            try:
                encoded.append(self._decode(row))
            except DataError as error:
                raise RowError(number, str(error)) from error
        return encoded

    def collate(self, encoded: Sequence[Pixels]) -> dict[str, npt.NDArray[Any]]:
        """Normalise a batch.

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

    def samples(self) -> list[Pixels]:
        """A grey picture, for a model to warm up with."""
        return [np.full((self.settings.height, self.settings.width, 3), 128, dtype=np.uint8)]

    def tokens(self, encoded: Pixels) -> int:
        """Patches of 16 x 16 pixels, which vision transformers take for a token."""
        return max(1, encoded.size // (3 * 256))

    def __call__(self, rows: Sequence[bytes]) -> dict[str, npt.NDArray[Any]]:
        """`encode` and `collate` in one step."""
        return self.collate(self.encode(rows))

    def _decode(self, data: bytes) -> Pixels:
        image = _open(data)
        if (pixels := image.width * image.height) > MAX_PIXELS:
            raise DataError(_too_large(f"{pixels:,}"))
        if image.mode == "F":
            raise DataError("holds numbers of no known range; save it with 8 or 16 bits a channel")
        try:
            with _ONE_LARGE if pixels > _LARGE else nullcontext():
                return self._pixels(image)
        except Exception as error:  # see `_open`
            raise DataError(_DAMAGED) from error

    def _pixels(self, image: Image.Image) -> Pixels:
        settings = self.settings
        wanted = (settings.width, settings.height)
        whole = settings.stretch[::-1] or wanted
        edge = max(*wanted, *whole, settings.shortest_edge)
        # A JPEG is decoded at a half, a quarter or an eighth where that is still large enough.
        if settings.resample != Image.Resampling.NEAREST:  # which takes single pixels, no means
            image.draft(None, (round(_GAP * edge), round(_GAP * edge)))
        turn = image.getexif().get(ExifTags.Base.Orientation, 1)
        if turn in _SIDEWAYS:
            wanted, whole = wanted[::-1], whole[::-1]
        box = self._box(image.size, wanted, whole, turn)
        small = _plain(image).resize(wanted, settings.resample, box=box, reducing_gap=_GAP)
        if turn in _TURNS:
            small = small.transpose(_TURNS[turn])
        return cast(Pixels, np.asarray(_on_white(small)))

    def _box(
        self, size: tuple[int, int], wanted: tuple[int, ...], whole: tuple[int, ...], turn: int
    ) -> tuple[float, float, float, float]:
        """The part of the picture that is kept: left, top, right, bottom."""
        edge, spans = self.settings.shortest_edge, []
        for axis, (full, out, stretched) in enumerate(zip(size, wanted, whole, strict=True)):
            scaled = edge * full / min(size) if edge else float(stretched)
            scaled = int(scaled) if self.settings.whole_pixels else scaled
            kept = min(float(out), scaled)
            start = (scaled - kept) / 2
            if self.settings.whole_pixels:  # rounded down where the upright picture begins
                start = ceil(start) if turn in _REVERSED[axis] else floor(start)
            spans.append((start * full / scaled, (start + kept) * full / scaled))
        (left, right), (top, bottom) = spans
        return left, top, right, bottom


def typical_size(rows: Sequence[bytes]) -> int:
    """Edge in pixels at which a model should look at such images: 32 to 224, a multiple of 32.

    Args:
        rows: Encoded images; the headers of a few hundred are read.
    """
    edges = []
    for row in rows[:: max(1, len(rows) // _LOOKED_AT)]:
        try:
            edges.append(max(_open(row).size))
        except DataError:  # `encode` will name the row
            continue
    middle = float(np.median(edges)) if edges else _LARGEST
    return int(min(max(_STEP * np.ceil(middle / _STEP), _SMALLEST), _LARGEST))


def _open(data: bytes) -> Image.Image:
    """Read the header, and nothing behind it."""
    try:
        return Image.open(BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(_too_large("far too many")) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"is no image of a known format; give one of {', '.join(_FORMATS)}"
        ) from error
    # Pillow's readers raise a dozen unrelated kinds on a damaged file.
    except Exception as error:
        raise DataError(_DAMAGED) from error


def _too_large(pixels: str) -> str:
    return f"has {pixels} pixels; the limit is {MAX_PIXELS:,}, e.g. 6000 x 6000. Make it smaller"


def _plain(image: Image.Image) -> Image.Image:
    """The picture as RGB, or as RGBA where it is transparent."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow cuts 16 bits off at 255 instead of scaling them.
        values = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(values.clip(0, 255).round().astype(np.uint8)).convert("RGB")
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
