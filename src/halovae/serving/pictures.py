"""Pictures that strangers send: checked before anything of them is used."""

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
    """A picture as a plain RGB PNG: turned as its EXIF data say, on white where it is transparent.

    Raises:
        ApiError: it is none, is cut off, or is too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its size is checked here
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
        raise ApiError(400, f"{param}: expected a whole {', '.join(FORMATS)} picture ({error})", param) from error
    out = io.BytesIO()
    plain.save(out, "png", compress_level=1)
    return out.getvalue()


def from_data_url(url: str, param: str) -> bytes:
    """The bytes of a `data:...;base64,` URL.

    Raises:
        ApiError: it is none.
    """
    head, comma, body = url.partition(",")
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise ApiError(400, f"{param}: expected a file, or a data: URL in base64", param)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ApiError(400, f"{param}: its base64 is damaged ({error})", param) from error


def converted(png: bytes, kind: str, quality: int) -> bytes:
    """A PNG as "png", "jpeg" or "webp"."""
    if kind == "png":
        return png
    out = io.BytesIO()
    with Image.open(io.BytesIO(png)) as picture:
        picture.save(out, kind, quality=quality)
    return out.getvalue()
