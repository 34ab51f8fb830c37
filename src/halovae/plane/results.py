"""The result of a sharded call: its chunks, how they are gathered, and a report."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from halovae.device.kinds import Stopwatch
from halovae.device.regions import region
from halovae.distributed.mesh import Mesh
from halovae.grid import Grid, Shard, Span
from halovae.kernels.native import Kernels
from halovae.plane.layout import Layout, extent, sole
from halovae.plane.plane import Plane
from halovae.plane.strip_program import InStrips

Gather = Literal["rank0", "all", "none"]
_ALARMING = 0.05  # warn if fallbacks receive more than this share of all computed bytes


class ShardOptions(TypedDict, total=False):
    """Keyword arguments of `Sharded.stream`; see there."""

    grid: Grid | None
    mesh: Mesh | DeviceMesh | None
    group: dist.ProcessGroup | None
    gather: Gather
    options: Mapping[str, Any] | None
    convert: Callable[[Tensor], Tensor] | None
    leaner: bool
    kernels: Kernels | None
    strips: InStrips | None
    capture: bool


@dataclass(frozen=True)
class ShardReport:
    """What a call cost on this rank.

    Attributes:
        shape: the shape of the whole result.
        grid: extents of the mesh.
        eager: why the function was not recorded; empty if it was.
        chunked: the dim of the result along which chunks come one by one; None if it comes at once.
        recorded: seconds that recording took; 0 if there was a program already.
        clocks: ran during the call, without recording.
        waits: ran while it waited for other ranks' data.
        calls: how often this rank exchanged or gathered data.
        messages: number of messages that it sent.
        bytes_sent: bytes that it sent.
        fallbacks: number of calls of each operator that no rule covers: they ran replicated.
        gathered: bytes that these received, as a share of all computed bytes.
        peak: peak bytes of live tensors, without weights and finished chunks, by the recorded graph; 0 without one.
        passes: how many changes each pass made to the graph, by its name.
        compiled: whether operators used compiled kernels, on the CPU.
    """

    shape: tuple[int, ...]
    grid: Grid
    eager: str
    chunked: int | None
    recorded: float
    clocks: tuple[Stopwatch, ...]
    waits: tuple[Stopwatch, ...]
    calls: int
    messages: int
    bytes_sent: int
    fallbacks: Mapping[str, int]
    gathered: float
    peak: int
    passes: Mapping[str, int] = field(default_factory=dict)
    compiled: bool = False

    @property
    def seconds(self) -> float:
        """Duration of the call, without recording. On an accelerator, this waits for the end of the work."""
        return sum(one.seconds() for one in self.clocks)

    @property
    def waiting(self) -> float:
        """Seconds of these that it waited for other ranks' data."""
        return sum(one.seconds() for one in self.waits)


class Chunks(Iterator["Tensor | None"]):
    """A result in chunks, in order. Each chunk is computed when it is requested.

    Args:
        chunks: the chunks; each is None on ranks that receive nothing.
        dim: the dim along which they are joined; None if there is only one.
        extent: the result's extent along it.
    """

    def __init__(self, chunks: Iterator[Tensor | None], dim: int | None = None, extent: int = 0) -> None:
        self._chunks, self.dim, self.extent = chunks, dim, extent

    def __next__(self) -> Tensor | None:
        return next(self._chunks)

    def close(self) -> None:
        """Stop computing."""
        if isinstance(self._chunks, Generator):
            self._chunks.close()

    def join(self, convert: Callable[[Tensor], Tensor] | None = None) -> Tensor | None:
        """Join all chunks into one tensor; None on ranks that receive nothing.

        Args:
            convert: what is joined of each chunk; it keeps the extents along and before `dim`, and may move the chunk
                to another device.
        """
        whole, start = None, 0
        for chunk in self:
            if convert is not None and chunk is not None:
                chunk = convert(chunk)
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
        layout: the layout of the result.

    Raises:
        ValueError: the result's rows or cols are neither multiples nor divisors of the input's.
    """
    sizes = [extent(dim) for dim in layout]
    if len(sizes) < 3 or any(now % then and then % now for now, then in zip(sizes[-2:], x.shape[-2:], strict=True)):
        raise ValueError(
            f"the function made a result of shape {sizes} of an input of shape {list(x.shape)}: expected "
            f"[..., H', W'] with multiples or divisors of {x.shape[-2]} and {x.shape[-1]}"
        )


def gathered(own: Tensor, layout: Layout, plane: Plane, items: Sequence[Span], gather: Gather) -> Tensor | None:
    """Return the whole result on the ranks that receive it; with gather="none", this rank's shard.

    Args:
        own: this rank's shard.
        layout: its layout.
        plane: the plane that ranks share.
        items: the range of the batch of each position along the grid's batch.
        gather: which ranks receive the result.
    """
    mesh = plane.mesh
    if gather == "none":
        return own
    rows, cols = (sole(dim) for dim in layout[-2:])
    plain = all(sole(dim) is not None or all(f.mesh_dim is None for f in dim) for dim in layout[-2:])
    if not plain or any(factor.mesh_dim for dim in layout[:-2] for factor in dim):
        with plane.active():
            own = plane.full(plane.wrap(own, layout))
        rows = cols = None
    if mesh.grid.size == 1:
        return own
    height, width = (extent(dim) for dim in layout[-2:])
    middle = own.shape[1:-2]
    ratio = extent(layout[0]) // items[mesh.item].size  # frames may be in the batch
    shards = []
    for rank in range(mesh.grid.size):
        item, row, col = mesh.grid.coordinates(rank)
        idle = (rows is None and row > 0) or (cols is None and col > 0)  # only one rank sends replicated dims
        shard_rows = Span(rows.bounds[row], rows.bounds[row + 1]) if rows else Span(0, 0 if idle else height)
        shard_cols = Span(cols.bounds[col], cols.bounds[col + 1]) if cols else Span(0, 0 if idle else width)
        shards.append(Shard(items[item].scaled(ratio), shard_rows, shard_cols))
    shard = shards[mesh.rank]
    own = own[..., : shard.rows.size, : shard.cols.size].contiguous()
    total = items[-1].stop * ratio
    needed = gather == "all" or mesh.rank == 0
    # A message must not be empty; a rank's contribution to a collective call may be.
    everyone = gather == "all" or any(0 in (one.rows.size, one.cols.size) for one in shards)
    count = middle.numel()
    out = own.new_empty((total, count, 1, height, width)) if needed else None
    flat = own.reshape(shard.batch.size, count, 1, shard.rows.size, shard.cols.size)
    with region("gather"):
        mesh.gather_frames(flat, shards, out, everyone)
    return None if out is None else out.view(total, *middle, height, width)


def warn_of_fallbacks(fallbacks: Counter[str], received: Counter[str], computed: int) -> None:
    """Warn if operators without a rule received a large share of all bytes.

    Args:
        fallbacks: number of calls of each of these operators.
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
