"""Small pictures of a video: its first frame, and a sheet of frames at even distances."""

from __future__ import annotations

import io
from pathlib import Path

import av
from PIL import Image

_SIDE = 4  # rows, and columns, of a sheet
_WIDTH = 320


def thumbnail(path: Path) -> bytes:
    """Return the first frame, as webp."""
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0)).to_image()
    return _saved(_small(picture), "webp")


def spritesheet(path: Path) -> bytes:
    """Return a sheet of sixteen frames (all, if there are fewer) at even distances, row by row, as jpeg."""
    with av.open(str(path)) as container:
        total = sum(1 for _ in container.decode(video=0))
    count = min(total, _SIDE * _SIDE)
    needed = {index * (total - 1) // max(1, count - 1) for index in range(count)}
    with av.open(str(path)) as container:
        frames = [_small(frame.to_image()) for index, frame in enumerate(container.decode(video=0)) if index in needed]
    width, height = frames[0].size
    cols = min(_SIDE, len(frames))
    sheet = Image.new("RGB", (width * cols, height * -(-len(frames) // cols)))
    for index, frame in enumerate(frames):
        sheet.paste(frame, (index % cols * width, index // cols * height))
    return _saved(sheet, "jpeg")


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((_WIDTH, 10 * _WIDTH))
    return picture


def _saved(picture: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()
