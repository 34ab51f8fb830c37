"""Small pictures of a video: its first frame, and a sheet of frames at even distances."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Literal

import av
from PIL import Image

from halovae.serving.errors import ApiError
from halovae.serving.limits import Threads

_SIDE = 4  # rows, and columns, of a sheet
_WIDTH = 320
_KEPT = 32  # small pictures of each kind that are kept in memory, of about 10 and 100 KiB
_threads = Threads("thumbnails", 2)


async def drawn(path: Path, variant: Literal["thumbnail", "spritesheet"]) -> bytes:
    """Return a small picture of a video. It is drawn in a thread, once while it is among the latest ones.

    Raises:
        ApiError: there is no such file.
    """
    draw = {"thumbnail": thumbnail, "spritesheet": spritesheet}[variant]
    try:
        return await _threads.run(draw, path)
    except FileNotFoundError as error:
        raise ApiError(404, f"the file of {path.name} is gone", code="not_found") from error


def thumbnail(path: Path) -> bytes:
    """Return the first frame, as webp."""
    return _thumbnail(path, path.stat().st_mtime_ns)


def spritesheet(path: Path) -> bytes:
    """Return a sheet of sixteen frames (all, if there are fewer) at even distances, row by row, as jpeg."""
    return _spritesheet(path, path.stat().st_mtime_ns)


@lru_cache(_KEPT)
def _thumbnail(path: Path, modified: int) -> bytes:
    with av.open(str(path)) as container:
        picture = next(container.decode(video=0)).to_image()
    return _saved(_small(picture), "webp")


@lru_cache(_KEPT)
def _spritesheet(path: Path, modified: int) -> bytes:
    with av.open(str(path)) as container:
        total = container.streams.video[0].frames  # mp4 files store it
        count = min(total, _SIDE * _SIDE)
        needed = {index * (total - 1) // max(1, count - 1) for index in range(count)}
        decoded = enumerate(container.decode(video=0))
        frames = [_small(frame.to_image()) for index, frame in decoded if index in needed]
    width, height = frames[0].size
    cols = min(_SIDE, len(frames))
    sheet = Image.new("RGB", (width * cols, height * -(-len(frames) // cols)))
    for index, small in enumerate(frames):
        sheet.paste(small, (index % cols * width, index // cols * height))
    return _saved(sheet, "jpeg")


def _small(picture: Image.Image) -> Image.Image:
    picture.thumbnail((_WIDTH, 10 * _WIDTH))
    return picture


def _saved(picture: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()
