"""The result of a sharded call: its chunks, where they go, and a report."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from halovae.device.regions import region
from halovae.grid import Grid, Shard, Span
from halovae.plane.layout import Layout, extent, sole
from halovae.plane.plane import Plane

Gather = Literal["rank0", "all", "none"]
_ALARMING = 0.05  # share of the received bytes of all computed ones from which fallbacks are warned of


@dataclass(frozen=True)
class ShardReport:
    """What a call took on this rank.

    Attributes:
        shape: of the whole result.
        grid: how the ranks shared the plane.
        eager: why the function was not recorded; empty if it was.
        chunked: the dim of the result along which chunks come one by one; None if it comes whole.
        recorded: seconds that recording took; 0 if the program was there already.
        seconds: of the call, without recording.
        waiting: seconds of these that it waited for other ranks' data.
        calls: how often this rank exchanged or collected something.
        messages: that it sent, and their `bytes_sent`.
        fallbacks: operators that no rule covers, with their calls: they ran replicated on all ranks.
        gathered: the share of all computed bytes that these received.
        peak: bytes of live tensors at the highest point, weights and finished chunks apart, by the recorded graph; 0
            without one.
        passes: how many changes each pass made to the graph, by its name.
        compiled: whether passes over memory were compiled, on the CPU.
    """

    shape: tuple[int, ...]
    grid: Grid
    eager: str
    chunked: int | None
    recorded: float
    seconds: float
    waiting: float
    calls: int
    messages: int
    bytes_sent: int
    fallbacks: Mapping[str, int]
    gathered: float
    peak: int
    passes: Mapping[str, int] = field(default_factory=dict)
    compiled: bool = False


class Chunks(Iterator["Tensor | None"]):
    """A result in chunks, in order. Nothing is computed before it is asked for.

    Args:
        chunks: one after the other; None on ranks that receive nothing.
        dim: along which they lie side by side; None if there is but one.
        extent: of all of them along it.
    """

    def __init__(self, chunks: Iterator[Tensor | None], dim: int | None = None, extent: int = 0) -> None:
        self._chunks, self.dim, self.extent = chunks, dim, extent

    def __next__(self) -> Tensor | None:
        return next(self._chunks)

    def close(self) -> None:
        """Compute no further."""
        if isinstance(self._chunks, Generator):
            self._chunks.close()

    def join(self) -> Tensor | None:
        """All of them as one tensor; None on ranks that receive nothing."""
        whole, start = None, 0
        for chunk in self:
            if self.dim is None or chunk is None:
                whole = chunk
                continue
            if whole is None:
                whole = chunk.new_empty([*chunk.shape[: self.dim], self.extent, *chunk.shape[self.dim + 1 :]])
            whole.narrow(self.dim, start, chunk.shape[self.dim]).copy_(chunk)
            start += chunk.shape[self.dim]
        return whole


def check_result(x: Tensor, layout: Layout) -> None:
    """Check that a result has the input's plane.

    Args:
        x: the input, `[..., H, W]`.
        layout: of the result.

    Raises:
        ValueError: its rows or cols are neither multiples nor divisors of the input's.
    """
    sizes = [extent(dim) for dim in layout]
    if len(sizes) < 3 or any(now % then and then % now for now, then in zip(sizes[-2:], x.shape[-2:], strict=True)):
        raise ValueError(
            f"the function made a result of shape {sizes} of an input of shape {list(x.shape)}: expected "
            f"[..., H', W'] with multiples or divisors of {x.shape[-2]} and {x.shape[-1]}"
        )


def gathered(own: Tensor, layout: Layout, plane: Plane, items: Sequence[Span], gather: Gather) -> Tensor | None:
    """The whole result on the ranks that receive it; with gather="none" this rank's part.

    Args:
        own: this rank's part.
        layout: which part that is.
        plane: the ranks that share it.
        items: of the batch, for each group of ranks along the grid's batch.
        gather: who receives the result.
    """
    mesh = plane.mesh
    if gather == "none":
        return own
    rows, cols = (sole(dim) for dim in layout[-2:])
    plain = all(sole(dim) is not None or all(f.mesh_dim is None for f in dim) for dim in layout[-2:])
    if not plain or any(factor.mesh_dim for dim in layout[:-2] for factor in dim):
        own, rows, cols = plane.full(plane.wrap(own, layout)), None, None
    if mesh.grid.size == 1:
        return own
    height, width = (extent(dim) for dim in layout[-2:])
    middle = own.shape[1:-2]
    ratio = extent(layout[0]) // items[mesh.item].size  # frames may be in the batch
    shards = []
    for rank in range(mesh.grid.size):
        item, row, col = mesh.grid.coordinates(rank)
        whole = (rows is None and row > 0) or (cols is None and col > 0)  # what every rank has, only one gives
        part_rows = Span(rows.bounds[row], rows.bounds[row + 1]) if rows else Span(0, 0 if whole else height)
        part_cols = Span(cols.bounds[col], cols.bounds[col + 1]) if cols else Span(0, 0 if whole else width)
        shards.append(Shard(items[item].scaled(ratio), part_rows, part_cols))
    given = shards[mesh.rank]
    own = own[..., : given.rows.size, : given.cols.size].contiguous()
    total = items[-1].stop * ratio
    needed = gather == "all" or mesh.rank == 0
    # A message may not be empty, a part of a collective call may.
    everyone = gather == "all" or any(0 in (one.rows.size, one.cols.size) for one in shards)
    count = middle.numel()
    out = own.new_empty((total, count, 1, height, width)) if needed else None
    flat = own.reshape(given.batch.size, count, 1, given.rows.size, given.cols.size)
    with region("gather"):
        mesh.gather_frames(flat, shards, out, everyone)
    return None if out is None else out.view(total, *middle, height, width)


def warn_of_fallbacks(fallbacks: Counter[str], received: Counter[str], computed: int) -> None:
    """Warn if operators without a rule received a large share of all bytes.

    Args:
        fallbacks: their calls.
        received: bytes that each received.
        computed: bytes of all results.
    """
    share = sum(received.values()) / max(1, computed)
    if share > _ALARMING:
        names = ", ".join(
            f"{name}: {calls} calls, {received[name] / max(1, computed):.1%} of bytes"
            for name, calls in fallbacks.items()
        )
        warnings.warn(
            f"these operators have no rule and run replicated on all ranks: {names}", RuntimeWarning, stacklevel=5
        )
