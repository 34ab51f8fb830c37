"""How clips and pictures are cut and scaled to what an encoder takes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np

from halovae.cluster.facts import Facts

Size = tuple[int, int]
Picture = TypeVar("Picture")
MAX_PIXELS = 2**31  # bytes of one clip: it is one value of an Arrow column, and has to fit into memory several times


class Rejected(ValueError):
    """An input that cannot be encoded. The message says why."""


class Bucket(NamedTuple):
    """A size, and how many frames clips of it have. None for those that the command names, or for all."""

    width: int
    height: int
    frames: int | None = None


@dataclass(frozen=True)
class Rules:
    """How inputs become clips.

    A picture is scaled so that it covers the bucket whose aspect ratio is closest, and is cropped at the center. Clips
    follow each other without a gap. Each is as long as the longest number of frames that is left.

    Attributes:
        facts: what the encoder takes.
        buckets: the sizes; empty to keep each input's own, cropped to multiples of the spatial factor.
        frames: how many frames clips have, any of these; empty for all frames of an input as one clip.
        fps: frames per second to take, by repeating or leaving out frames; None for all frames.
        most: how many clips to take of one video; None for all.
        max_bytes: larger files are rejected.
    """

    facts: Facts
    buckets: tuple[Bucket, ...] = ()
    frames: tuple[int, ...] = ()
    fps: float | None = None
    most: int | None = None
    max_bytes: int = 2**33

    def __post_init__(self) -> None:
        factor = self.facts.spatial
        for bucket in self.buckets:
            if bucket.width % factor or bucket.height % factor or min(bucket[:2]) < 1:
                raise ValueError(
                    f"size {bucket.width}x{bucket.height}: {self.facts.family} takes multiples of {factor} pixels"
                )
        for frames in (*self.frames, *(one.frames for one in self.buckets if one.frames is not None)):
            if not self.facts.fits(frames):
                near = max(1, self.facts.longest(frames))
                raise ValueError(
                    f"{frames} frames: {self.facts.family} takes {self.facts.first} + a multiple of "
                    f"{self.facts.temporal}, such as {near} or {near + self.facts.temporal}"
                )

    def bucket(self, width: int, height: int) -> Bucket:
        """The size that an input of a size is brought to.

        Raises:
            Rejected: it is too small to be cropped.
        """
        if self.buckets:
            ratio = math.log(width / height)
            return min(self.buckets, key=lambda one: abs(math.log(one.width / one.height) - ratio))
        factor = self.facts.spatial
        if min(width, height) < factor:
            raise Rejected(f"{width}x{height} is too small: {self.facts.family} takes multiples of {factor} pixels")
        return Bucket(width - width % factor, height - height % factor)

    def lengths(self, bucket: Bucket) -> list[int]:
        """How many frames clips of a size may have, most first; empty for all frames of an input."""
        alike = {one.frames for one in self.buckets if one[:2] == bucket[:2] and one.frames is not None}
        return sorted(alike or set(self.frames), reverse=True)

    def cut(self, count: int, bucket: Bucket, ended: bool) -> list[int]:
        """Cut frames into clips.

        Args:
            count: how many frames there are.
            bucket: their size.
            ended: whether no more will come.

        Returns:
            The lengths of the clips that can be taken now, in order.
        """
        lengths = self.lengths(bucket)
        if not lengths:
            return [self.facts.longest(count)] if ended and self.facts.longest(count) > 0 else []
        taken: list[int] = []
        for length in lengths if ended else lengths[:1]:
            while count >= length:
                taken.append(length)
                count -= length
        return taken

    def check(self, count: int, bucket: Bucket) -> None:
        """Check that so many frames may be held at once.

        Raises:
            Rejected: they are more than one clip may have.
        """
        if count * bucket.width * bucket.height * 3 > MAX_PIXELS:
            raise Rejected(
                f"has more than {count - 1} frames of {bucket.width}x{bucket.height}, {MAX_PIXELS >> 30} GiB of "
                "pixels, which is the most of one clip: say by --frames how long clips are"
            )


def scaled(size: Size, bucket: Bucket, crops: bool) -> Size:
    """The size that covers a bucket and keeps the aspect ratio; the input's own if it is only cropped."""
    if crops:
        return size
    factor = max(bucket.width / size[0], bucket.height / size[1])
    return max(bucket.width, round(size[0] * factor)), max(bucket.height, round(size[1] * factor))


def cropped(pixels: np.ndarray, bucket: Bucket) -> np.ndarray:
    """The center of a picture `[H, W, 3]`, in the size of a bucket."""
    top, left = (pixels.shape[0] - bucket.height) // 2, (pixels.shape[1] - bucket.width) // 2
    return pixels[top : top + bucket.height, left : left + bucket.width]


def resampled(frames: Iterable[tuple[Fraction, Picture]], fps: float | None) -> Iterator[Picture]:
    """Take `fps` frames a second of a video, by repeating or leaving out frames.

    As by ffmpeg's filter of this name, each frame stands until the next one, both rounded to frames of the new rate.

    Args:
        frames: the times in seconds from the start, not falling, and the pictures.
        fps: the rate; None takes each frame once.
    """
    if fps is None:
        yield from (picture for _, picture in frames)
        return
    rate = Fraction(fps).limit_denominator(1001)
    held: list[Picture] = []
    before = step = Fraction(0)
    for time, picture in frames:
        if held:
            yield from held * (_slot(time * rate) - _slot(before * rate))
            step = time - before
        before, held = time, [picture]
    yield from held * (_slot((before + step) * rate) - _slot(before * rate) if step else 1)


def _slot(at: Fraction) -> int:
    return math.floor(at + Fraction(1, 2))


def parse_buckets(text: str) -> tuple[Bucket, ...]:
    """Read `WIDTHxHEIGHT` or `WIDTHxHEIGHTxFRAMES`, separated by commas.

    Raises:
        ValueError: the text is something else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", word) for word in words):
        raise ValueError("expected WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, comma-separated, such as 832x480,480x832x17")
    return tuple(Bucket(*map(int, word.split("x"))) for word in words)


def buckets_like(size: Size, step: int) -> tuple[Bucket, ...]:
    """Sizes of many aspect ratios, whose sides are multiples of `step`, with at most as many pixels as `size`.

    Widths go from half to twice the side of a square with as many pixels, as in kohya's trainers.
    """
    area = size[0] * size[1]
    side = math.sqrt(area)
    found = set()
    for first in range(max(step, int(side / 2) // step * step), int(side * 2) + 1, step):
        second = area // first // step * step
        if second >= step:
            found |= {Bucket(first, second), Bucket(second, first)}
    return tuple(sorted(found))
