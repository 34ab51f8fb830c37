"""Frames to mp4, png and folders of png, and clips back to frames.

mp4 is written by PyAV with libx264, which is under the GPL; PyAV's wheels include it.
"""

from __future__ import annotations

import os
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class Sink:
    """Writes frames one after the other. They appear under the final name only when the sink is closed as whole.

    Until then they are in a `.partial` file or folder beside it.

    Args:
        path: `.mp4` for a video, `.png` for one picture; anything without a suffix is a folder of numbered PNGs.
        fps: frames per second of a video.

    Raises:
        ValueError: the suffix is not supported, or the folder holds files other than numbered PNGs.
        OSError: the path cannot be written to.
    """

    def __init__(self, path: Path, fps: float) -> None:
        check_output(path)
        self.path = path
        self.partial = partial_of(path)
        discard(self.partial)
        self._fps = Fraction(fps).limit_denominator(1001)
        self._count = 0
        self._video: av.container.OutputContainer | None = None
        self._stream: av.VideoStream | None = None
        if path.suffix == ".mp4":
            self._video = av.open(str(self.partial), "w", format="mp4")
        elif path.suffix == "":
            self.partial.mkdir()

    def write(self, frames: Tensor) -> None:
        """Append frames `[3, T, H, W]`, uint8."""
        for frame in frames.permute(1, 2, 3, 0).cpu().numpy():
            if self._video is not None:
                self._encode(self._video, frame)
            else:
                name = self.partial / f"frame_{self._count:05d}.png" if self.path.suffix == "" else self.partial
                Image.fromarray(frame).save(name, format="png")
            self._count += 1

    def _encode(self, video: av.container.OutputContainer, frame: np.ndarray) -> None:
        if self._stream is None:
            self._stream = video.add_stream("libx264", rate=self._fps, options={"crf": "18"})
            self._stream.height, self._stream.width = frame.shape[:2]
            self._stream.pix_fmt = "yuv420p"
        video.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def close(self, whole: bool) -> None:
        """Finish. With `whole`, the frames replace what was under the final name; otherwise they are discarded."""
        try:
            if self._video is not None:
                if whole and self._stream is not None:
                    self._video.mux(self._stream.encode())
                self._video.close()
            if whole:
                discard(self.path)
                self.partial.replace(self.path)
        finally:
            discard(self.partial)


def partial_of(path: Path) -> Path:
    """The path that holds the frames for `path` until all of them are written."""
    return path.with_name(f".{path.name}.partial")


def discard(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def check_output(path: Path, frames: int | None = None) -> None:
    """Check, before any work, that a decode of this many frames can be written to `path`.

    Raises:
        ValueError: the suffix is not supported, one picture cannot hold the frames, or the folder holds other files.
        OSError: the path cannot be written to.
    """
    if path.suffix not in (".mp4", ".png", ""):
        raise ValueError(f"output {path}: expected a name that ends in .mp4 or .png, or a folder for numbered PNGs")
    if path.suffix == ".png" and frames not in (None, 1):
        raise ValueError(f"output {path}: one .png cannot hold {frames} frames; name an .mp4 or a folder")
    if path.suffix and path.is_dir():
        raise IsADirectoryError(f"output {path} is a folder")
    if not path.suffix and path.exists():
        others = sorted(p.name for p in path.iterdir() if not p.match("frame_*.png")) if path.is_dir() else [path.name]
        if others:
            raise ValueError(f"output {path} holds files other than numbered frames, such as {others[0]}")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Check that a file or folder with this name can be created.

    Raises:
        OSError: it cannot.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output {path}: there is no folder {path.parent}")
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        probe.touch()
    except OSError as error:
        raise OSError(f"output {path} cannot be written: {error}") from error
    probe.unlink()


def read_clip(path: Path, frames: int | None = None) -> tuple[Tensor, float]:
    """Read a video or a picture.

    Args:
        path: a video that PyAV reads, or a picture.
        frames: how many frames to read at most; None for all.

    Returns:
        Frames `[3, T, H, W]`, uint8, and frames per second (1 for a picture).

    Raises:
        ValueError: the file cannot be read, or holds no frames.
    """
    try:
        if path.suffix.lower() in IMAGES:
            with Image.open(path) as picture:
                return _as_frames([np.asarray(picture.convert("RGB"))]), 1.0
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 16)
            pictures = []
            for frame in container.decode(stream):
                pictures.append(frame.to_ndarray(format="rgb24"))
                if len(pictures) == frames:
                    break
    except (av.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{path}: cannot be read as a video or a picture ({error})") from error
    if not pictures:
        raise ValueError(f"{path}: holds no frames")
    return _as_frames(pictures), rate


def _as_frames(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)
