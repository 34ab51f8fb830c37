"""Checks pictures that clients send before they are used."""

from __future__ import annotations

import base64
import binascii
import io
import warnings

from PIL import Image, ImageOps

from halovae.serving.errors import ApiError

FORMATS = ("PNG", "JPEG", "WEBP")
MOST_PIXELS = 64_000_000


def checked(data: bytes, param: str) -> bytes:
    """Return a picture as a plain RGB PNG, rotated as its EXIF data says, with transparency on white.

    Raises:
        ApiError: the data is no picture, is cut off, or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warning about large pictures; the size is checked below
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > MOST_PIXELS:
                    raise ApiError(400, f"{param}: {width}x{height} is more than {MOST_PIXELS} pixels", param)
                upright = ImageOps.exif_transpose(picture)
                if upright.has_transparency_data:
                    white = Image.new("RGBA", upright.size, "white")
                    upright = Image.alpha_composite(white, upright.convert("RGBA"))
                plain = upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ApiError(400, f"{param}: expected a complete {', '.join(FORMATS)} picture ({error})", param) from error
    out = io.BytesIO()
    plain.save(out, "png", compress_level=1)
    return out.getvalue()


def from_data_url(url: str, param: str) -> bytes:
    """Decode the bytes of a `data:...;base64,` URL.

    Raises:
        ApiError: `url` is not such a URL, or its base64 is damaged.
    """
    head, comma, body = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise ApiError(400, f"{param}: expected a file, or a data: URL in base64", param)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"{param}: its base64 is damaged ({error})", param) from error


def converted(png: bytes, kind: str, quality: int) -> bytes:
    """Convert a PNG to "png", "jpeg" or "webp"."""
    if kind == "png":
        return png
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.save(out, kind, quality=quality)
    return out.getvalue()
