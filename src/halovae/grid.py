"""Who owns what: the grid of ranks, uneven splits, and the shard of a latent that each rank decodes.

Integers only. Every rank computes every rank's shard from the latent's shape, so nothing is negotiated at run time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Span:
    """A half-open range of indices `[start, stop)` along one dim."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)

    def scaled(self, factor: int) -> Span:
        """The same range after every cell has become `factor` cells."""
        return Span(self.start * factor, self.stop * factor)

    def grown(self, before: int, after: int) -> Span:
        """The range, extended by `before` indices at its start and `after` indices at its end."""
        return Span(self.start - before, self.stop + after)


def split(length: int, count: int) -> tuple[Span, ...]:
    """Split `length` indices into `count` adjoining spans whose sizes differ by at most one, larger spans first.

    Raises:
        ValueError: `count` is not in 1..length, so a span would be empty.
    """
    if not 1 <= count <= length:
        raise ValueError(f"cannot split {length} into {count} non-empty spans: their number must be 1 to {length}")
    size, larger = divmod(length, count)
    starts = [index * size + min(index, larger) for index in range(count + 1)]
    return tuple(Span(*pair) for pair in pairwise(starts))


@dataclass(frozen=True)
class Shard:
    """The index ranges of a latent, or of a feature map made from it, that one rank owns."""

    batch: Span
    rows: Span
    cols: Span

    def scaled(self, factor: int) -> Shard:
        """The same shard after a spatial upsampling by `factor`."""
        return Shard(self.batch, self.rows.scaled(factor), self.cols.scaled(factor))

    @property
    def index(self) -> tuple[slice, ...]:
        """The index of this shard in a full tensor `[B, C, T, H, W]`."""
        return (self.batch.slice, slice(None), slice(None), self.rows.slice, self.cols.slice)

    def shape(self, channels: int, frames: int) -> tuple[int, int, int, int, int]:
        """The shape `[B, C, T, H, W]` of this shard of a feature map with this many channels and frames."""
        return (self.batch.size, channels, frames, self.rows.size, self.cols.size)


@dataclass(frozen=True)
class Grid:
    """The numbers of ranks along the batch, the rows (H), and the cols (W) of a latent.

    Ranks are numbered with cols fastest: rank = (batch index * rows + row) * cols + col.

    Raises:
        ValueError: an extent is not a positive integer.
    """

    batch: int = 1
    rows: int = 1
    cols: int = 1

    def __post_init__(self) -> None:
        for name, extent in vars(self).items():
            if not isinstance(extent, int) or extent < 1:
                raise ValueError(f"Grid({name}={extent!r}): the number of ranks along {name} must be an integer >= 1")

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read `ROWSxCOLS` or `BATCHxROWSxCOLS`, such as `2x1` or `2x2x1`.

        Raises:
            ValueError: the text is neither, or an extent is 0.
        """
        if not re.fullmatch(r"\d+(x\d+){1,2}", text):
            raise ValueError(f"grid {text!r}: write ROWSxCOLS or BATCHxROWSxCOLS, such as 2x1 or 1x2x2")
        extents = [int(number) for number in text.split("x")]
        return cls(*[1] * (3 - len(extents)), *extents)

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}" if self.batch == 1 else f"{self.batch}x{self.rows}x{self.cols}"

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.batch * self.rows * self.cols

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """The position of `rank`: (batch index, row, col)."""
        plane, col = divmod(rank, self.cols)
        return (*divmod(plane, self.rows), col)

    def shards(self, batch: int, height: int, width: int) -> tuple[Shard, ...]:
        """Every rank's shard of `batch` latents of `height` x `width` cells, by rank.

        Raises:
            ValueError: a mesh dim has more ranks than its latent dim has indices; the message says what is possible.
        """
        for dim, ranks, length, unit in (
            ("batch", self.batch, batch, "latents"),
            ("rows", self.rows, height, "latent rows"),
            ("cols", self.cols, width, "latent cols"),
        ):
            if ranks > length:
                raise ValueError(
                    f"grid {self} puts {ranks} ranks along {dim}, but there are only {length} {unit}: "
                    f"at most {length} ranks fit there (batch {batch}, {height} rows, {width} cols in all)"
                )
        return tuple(
            Shard(items, rows, cols)
            for items in split(batch, self.batch)
            for rows in split(height, self.rows)
            for cols in split(width, self.cols)
        )
