"""Checks pictures that clients send before they are used."""

from __future__ import annotations

import base64
import io
import re
import warnings
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from halovae.serving.errors import ApiError
from halovae.serving.limits import Threads

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_ASPECT = 200  # times that a side is as long as the other: Qwen2-VL's image processor takes no more
threads = Threads("pictures", 2)  # that decode and encode pictures
_MOST_SCANS = 100  # of a JPEG: each takes a pass over the picture, however few bytes it has
_BAND = 2**18  # pixels that are made opaque at once
_DATA_URL = re.compile("data:[^,]{0,255};base64,")
# Clients could fill the log with these: some contain numbers from the file.
warnings.filterwarnings("ignore", module="PIL")


def checked(data: bytes, param: str, most_pixels: int) -> bytes:
    """Return a picture as a plain RGB PNG, rotated as its EXIF data says, with transparency on white.

    It keeps its size: pipelines resize pictures by themselves, and from another size they would get other pixels. For
    the same reason, a JPEG is not decoded at a reduced size (`Image.draft`).

    Raises:
        ApiError: the data is no picture, is cut off, is too large, or is too long and narrow.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > most_pixels:
                message = f"{param}: {width}x{height} is more than {most_pixels} pixels"
                raise ApiError(400, message, param, "invalid_value")
            if max(width, height) > MOST_ASPECT * min(width, height):
                message = f"{param}: {width}x{height}: expected a side of at most {MOST_ASPECT} times the other"
                raise ApiError(400, message, param, "invalid_value")
            if picture.format == "JPEG" and data.count(b"\xff\xda") > _MOST_SCANS:
                raise ApiError(400, f"{param}: expected a JPEG of at most {_MOST_SCANS} scans", param, "invalid_value")
            plain = _opaque(picture)
            ImageOps.exif_transpose(plain, in_place=True)
            plain.info.clear()
            out = io.BytesIO()
            plain.save(out, "png", compress_level=1)
    except ApiError:
        raise
    except Exception as error:  # Pillow raises errors of many kinds for damaged files
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({str(error)[:100] or type(error).__name__})"
        message = f"{param}: expected a complete {', '.join(FORMATS)} picture{reason}"
        raise ApiError(400, message, param, "invalid_value") from error
    return out.getvalue()


def _opaque(picture: Image.Image) -> Image.Image:
    """Return a picture as RGB, with transparency on white. Its metadata stays.

    It is converted in bands: Pillow's RGB and RGBA take four bytes per pixel, and four such copies of a picture with a
    palette would take 16 times its memory.
    """
    picture.load()
    if picture.mode.startswith("I"):  # 16 bits of gray, all of which above 255 Pillow would make white
        gray = picture.point(lambda value: value / 256).convert("L")
        gray.info = picture.info.copy()
        picture = gray
    transparent = picture.has_transparency_data
    if picture.mode == "RGB" and not transparent:
        return picture
    width, height = picture.size
    plain = Image.new("RGB", picture.size)
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        band = picture.crop((0, top, width, min(top + rows, height)))
        if transparent:
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band.convert("RGBA"))
        plain.paste(band.convert("RGB"), (0, top))
    plain.info = picture.info.copy()
    return plain


def is_data_url(text: str) -> bool:
    """Whether a text starts as a `data:...;base64,` URL."""
    return _DATA_URL.match(text) is not None


def from_data_url(url: str, param: str) -> bytes:
    """Decode the bytes of a `data:...;base64,` URL.

    Raises:
        ApiError: `url` is not such a URL, or its base64 is damaged.
    """
    head = _DATA_URL.match(url)
    if head is None:
        raise ApiError(400, f"{param}: expected a file, or a data: URL in base64", param, "invalid_value")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except ValueError as error:  # binascii.Error, and a plain ValueError for characters that are not ASCII
        raise ApiError(400, f"{param}: its base64 is damaged ({error})", param, "invalid_value") from error


def converted(png: Path, kind: str, quality: int) -> bytes:
    """Read a PNG file, and convert it to "png", "jpeg" or "webp".

    Raises:
        OSError: the file cannot be read.
    """
    if kind == "png":
        return png.read_bytes()
    out = io.BytesIO()
    with Image.open(png) as picture:
        picture.save(out, kind, quality=quality)
    return out.getvalue()
