"""One rank's view of a partitioned plane: how tensors get onto it, move between layouts, and come off it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halovae.distributed.mesh import Mesh
from halovae.distributed.transport import Scope
from halovae.plane import context, cuts, group_norms, operators, whole_maps
from halovae.plane.layout import (
    Bounds,
    Coordinates,
    Factor,
    Layout,
    MeshDim,
    Uneven,
    even,
    is_partitioned,
    joined,
    local_shape,
    partitioned,
    proper,
    ranges,
    regrouped,
    replicated,
    rounded,
    shape,
)  # fmt: skip
from halovae.plane.operators import Needed
from halovae.plane.tensor import PlaneTensor, channels_last, contiguous, is_channels_last, made

if TYPE_CHECKING:
    from halovae.plane.strips import Strips
    from halovae.plane.trace import Recorder


class Plane:
    """One rank's view of a partitioned plane.

    Args:
        mesh: the ranks. Each position along its batch has a plane of its own.
        recorder: records operators instead of computing them; None to compute.
        strips: how ranks that run one after the other cut maps; None for ranks that run at once.

    Attributes:
        extents: number of ranks along each mesh dim that has more than one.
        coordinates: this rank's position along each of these.
        fallbacks: number of calls of each operator that no rule covers: they ran replicated.
        gathered: bytes that each of these received.
        received: bytes that all operators received.
        computed: bytes of the results of all operators.
        inside: how many rules are running, nested in each other.
    """

    def __init__(self, mesh: Mesh, recorder: Recorder | None = None, strips: Strips | None = None) -> None:
        self.mesh = mesh
        self.recorder = recorder
        self.strips = strips
        ranks_along: dict[MeshDim, int] = {"rows": mesh.grid.rows, "cols": mesh.grid.cols}
        places: Coordinates = {"rows": mesh.row, "cols": mesh.col}
        self.extents = {name: ranks for name, ranks in ranks_along.items() if ranks > 1}
        self.coordinates: Coordinates = {name: places[name] for name in self.extents}
        self.fallbacks: Counter[str] = Counter()
        self.gathered: Counter[str] = Counter()
        self.received = self.computed = 0
        self.inside = 0
        self._seen: dict[tuple[int, ...], Layout] = {}
        self._local_sizes: dict[Layout, tuple[int, ...]] = {}
        self.cuts = set[Bounds]()  # of all maps of a strip
        self.placed = False  # whether a strip has its own part of a constant
        self._handed: dict[int, tuple[Tensor, Tensor]] = {}  # whole maps by id, and what strips read in their place

    @property
    def path(self) -> str:
        """The path of the submodule that is being recorded; empty while operators are computed."""
        return "" if self.recorder is None else self.recorder.module

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this thread's operators use this plane's ranks, and partition new buffers that have a map's size."""
        from halovae.plane.rules.creation import Interception

        # In inference mode, operators arrive undecomposed. `no_grad` differs from it in speed only.
        with context.on(self.mesh), torch.inference_mode(False), torch.no_grad(), Interception(self):
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark this thread as inside of a rule."""
        self.inside += 1
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self.inside -= 1

    def run(self, operator: Callable[..., Tensor], *args: Any) -> Tensor:
        """Call an operator between ranks, or record it."""
        return operator(*args) if self.recorder is None else self.recorder.operator(operator, args, self.mesh)

    def lift(self, x: Any) -> PlaneTensor:
        """Return a replicated tensor as a plane tensor; plane tensors as they are."""
        if isinstance(x, PlaneTensor):
            x.check_fresh()
            return x
        return self.wrap(x, replicated(tuple(x.shape)))

    def wrap(
        self, local: Tensor, layout: Layout, frozen: str = "", strides: tuple[int, ...] | None = None
    ) -> PlaneTensor:
        """Return a plane tensor of which `local` is this rank's shard; contiguous, unless it has other `strides`."""
        if self.strips is not None:
            self.cuts.update(factor.bounds for _, factor in partitioned(layout))
        return made(local, layout, self, frozen, strides)

    def scatter(self, x: Tensor, multiple: int = 1) -> PlaneTensor:
        """Partition the last two dims of a replicated tensor. No data moves.

        Args:
            x: `[..., H, W]`.
            multiple: along H and W, where it divides the extent, it also divides all bounds.
        """
        with self.working():
            return self.to_layout(self.lift(x), self.layout_of(tuple(x.shape), multiple))

    def layout_of(self, sizes: tuple[int, ...], multiple: int = 1) -> Layout:
        """The layout of a map `[..., H, W]` whose last two dims are partitioned."""
        layout = list(replicated(sizes))
        dims: tuple[tuple[int, MeshDim], ...] = ((-2, "rows"), (-1, "cols"))
        for dim, mesh_dim in dims:
            layout[dim] = joined((self.factor(sizes[dim], mesh_dim, multiple),))
        self.note(tuple(layout))
        return tuple(layout)

    def factor(self, size: int, mesh_dim: MeshDim, multiple: int = 1) -> Factor:
        """Return the factor of a dim of a plane, partitioned evenly if it has a cell for every rank."""
        ranks = self.extents.get(mesh_dim, 1)
        if self.strips is not None:
            return self.strips.input_factor(size) if ranks > 1 else Factor(size)
        step = multiple if size % multiple == 0 else 1
        if ranks == 1 or size // step < ranks:
            return Factor(size)
        return Factor(size // step, mesh_dim, even(size // step, ranks)).times(step)

    def full(self, x: Any) -> Any:
        """Return all of a plane tensor, on every rank; other values as they are."""
        with self.working():
            return self.replicate(self.lift(x), range(x.ndim)).local if isinstance(x, PlaneTensor) else x

    def replicate(self, x: PlaneTensor, dims: Sequence[int]) -> PlaneTensor:
        """Return the tensor with these dims replicated."""
        for dim in dims:
            while is_partitioned(x.partition[dim]):
                index, factor = next((i, f) for i, f in enumerate(x.partition[dim]) if f.mesh_dim)
                ranks = len(factor.bounds) - 1
                x = self.moved(x, dim, index, (((0, factor.size),),) * ranks, Factor(factor.size))
        return x

    def moved(self, x: PlaneTensor, dim: int, index: int, needed: Needed, result: Factor) -> PlaneTensor:
        """Return the tensor with one factor's data moved to where they are needed.

        Args:
            x: the tensor.
            dim: the dim to move.
            index: which of the dim's factors; a partitioned one.
            needed: the intervals that each rank along its mesh dim needs.
            result: the factor that these intervals form.
        """
        factors = x.partition[dim]
        factor = factors[index]
        assert factor.mesh_dim is not None
        layout = (
            *x.partition[:dim],
            joined((*factors[:index], result, *factors[index + 1 :])),
            *x.partition[dim + 1 :],
        )
        local, at = x.local, dim
        if len(factors) > 1:
            sizes = [one.local(self.coordinates) for one in factors]
            local, at = local.unflatten(dim, sizes), dim + index
        local = self.fetch(local, at, factor, needed)
        if len(factors) > 1:
            local = local.flatten(dim, dim + len(factors) - 1)
        if result.mesh_dim is None:
            # A shard of one row or col does not show the memory format, and other formats give other bits.
            last = is_channels_last(x)
            if local.stride() != (channels_last if last else contiguous)(tuple(local.shape)):
                formats = {4: torch.channels_last, 5: torch.channels_last_3d}
                local = local.clone(memory_format=formats[local.ndim] if last else torch.contiguous_format)
        strides = x.stride() if shape(layout) == x.shape else None
        return self.wrap(local, layout, "it was made of other ranks' data", strides)

    def collected(self, x: PlaneTensor) -> PlaneTensor:
        """Return a map with all rows on the last strip. On the others it has no values."""
        for dim, factor in partitioned(x.partition):
            assert factor.mesh_dim is not None
            assert self.recorder is not None
            strips = len(factor.bounds) - 1
            needed: Needed = (((0, 0),),) * (strips - 1) + (((0, factor.size),),)
            local = self.run(operators.fetch, x.local, dim, factor.mesh_dim, factor.bounds, needed)
            self.recorder.node(local).meta["collects"] = True
            layout = (*x.partition[:dim], joined((Factor(factor.size),)), *x.partition[dim + 1 :])
            if self.coordinates[factor.mesh_dim] < strips - 1:
                local = x.local.new_empty(self.local_sizes(layout))
                self.recorder.node(local).meta["unused"] = True
            last = is_channels_last(x)
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            local = local.contiguous(memory_format=formats[local.ndim] if last else torch.contiguous_format)
            x = self.wrap(local, layout, strides=x.stride())
        return x

    def fetch(self, local: Tensor, dim: int, factor: Factor, needed: Needed) -> Tensor:
        """Fetch the needed intervals of a factor; no data moves if each rank only needs cells that it owns."""
        assert factor.mesh_dim is not None
        position = self.coordinates[factor.mesh_dim]
        if _owned(factor.bounds, needed):
            start, stop = needed[position][0]
            own = factor.bounds[position], factor.bounds[position + 1]
            return local if (start, stop) == own else local.narrow(dim, start - own[0], stop - start)
        owned = ranges(factor.bounds)
        inside = [(max(a, 0), min(b, factor.size)) for a, b in needed[position]]
        kept = sum(max(0, min(b, owned[position][1]) - max(a, owned[position][0])) for a, b in inside)
        cells = math.prod(extent for at, extent in enumerate(local.shape) if at != dim) * local.element_size()
        self.received += (sum(max(0, b - a) for a, b in inside) - kept) * cells
        return self.run(operators.fetch, local, dim, factor.mesh_dim, factor.bounds, needed)

    def part(self, whole: Tensor, dim: int, needed: Needed) -> Tensor | None:
        """Return a strip's part of a whole map. The first strip computes the map, and keeps it for the others.

        Args:
            whole: the map.
            dim: the dim to cut.
            needed: one interval for each strip.

        Returns:
            None if ranks run at once, if the map is a constant, or if an interval is not within it.
        """
        recorder = self.recorder
        inside = all(start >= 0 and stop <= whole.shape[dim] for ((start, stop),) in needed)
        if self.strips is None or recorder is None or recorder.is_constant(whole) or not inside:
            return None
        found = self._handed.get(id(whole))
        if found is None:
            site, first = len(self._handed), self.coordinates[self.strips.mesh_dim] == 0
            sizes, last = tuple(whole.shape), is_channels_last(whole)
            arguments = (whole, site) if first else (sizes, whole.dtype, last, site)
            found = self._handed[id(whole)] = (
                whole,
                self.run(whole_maps.hand if first else whole_maps.handed, *arguments),
            )
        return self.run(whole_maps.part, found[1], dim, self.strips.mesh_dim, needed)

    def gather(self, local: Tensor, mesh_dims: set[MeshDim]) -> Tensor:
        """Gather every rank's small tensor: `[ranks, ...]`, over the ranks along these mesh dims."""
        scope, ranks = self.scope(mesh_dims)
        self.received += (ranks - 1) * local.numel() * local.element_size()
        return self.run(group_norms.gather, local, scope, ranks)

    def scope(self, mesh_dims: set[MeshDim]) -> tuple[Scope, int]:
        """The ranks along these mesh dims, and their number."""
        if len(mesh_dims) == 2:
            return "plane", self.extents["rows"] * self.extents["cols"]
        (mesh_dim,) = mesh_dims
        return mesh_dim, self.extents[mesh_dim]

    def places(self, mesh_dims: set[MeshDim]) -> list[Coordinates]:
        """The coordinates of the ranks of such a scope, in order."""
        rows = range(self.extents["rows"]) if "rows" in mesh_dims else [self.coordinates.get("rows", 0)]
        cols = range(self.extents["cols"]) if "cols" in mesh_dims else [self.coordinates.get("cols", 0)]
        return [{"rows": row, "cols": col} for row in rows for col in cols]

    def to_layout(self, x: PlaneTensor, layout: Layout) -> PlaneTensor:
        """Return the tensor in another layout of the same shape."""
        assert shape(layout) == tuple(x.shape), (layout, x.shape)
        for dim, (now, then) in enumerate(zip(x.partition, layout, strict=True)):
            if now == then:
                continue
            ours, theirs = [(f.size, f.mesh_dim) for f in now], [(f.size, f.mesh_dim) for f in then]
            if ours == theirs:  # other bounds
                for index, (mine, target) in enumerate(zip(now, then, strict=True)):
                    if mine != target:
                        x = self.moved(x, dim, index, tuple((one,) for one in ranges(target.bounds)), target)
            else:
                x = self.replicate(x, [dim])
        for dim, (now, then) in enumerate(zip(x.partition, layout, strict=True)):
            if now != then:
                x = self.cut(x, dim, then)
        return x

    def cut(self, x: PlaneTensor, dim: int, factors: tuple[Factor, ...]) -> PlaneTensor:
        """Cut this rank's shard out of a replicated dim. No data moves."""
        strip = None
        if len(factors) == 1 and factors[0].mesh_dim is not None:
            strip = self.part(x.local, dim, tuple((one,) for one in ranges(factors[0].bounds)))
        if strip is not None:
            return self.wrap(strip, (*x.partition[:dim], factors, *x.partition[dim + 1 :]), "it is a part of a map")
        local = x.local
        if len(factors) > 1:
            local = local.unflatten(dim, [factor.size for factor in factors])
        for index, factor in enumerate(factors):
            if factor.mesh_dim is not None:
                start = factor.bounds[self.coordinates[factor.mesh_dim]]
                local = local.narrow(dim + index, start, factor.local(self.coordinates))
        if len(factors) > 1:
            local = local.flatten(dim, dim + len(factors) - 1)
        if self.recorder is not None:
            self.placed = self.placed or self.recorder.is_constant(x.local)
            kept = [(one.size, one.bounds[self.coordinates[one.mesh_dim]] if one.mesh_dim else 0,
                     one.local(self.coordinates)) for one in factors]  # fmt: skip
            cuts.note(self.recorder.node(local), self.recorder.node(x.local), dim, kept)
        return self.wrap(
            local, (*x.partition[:dim], factors, *x.partition[dim + 1 :]), "it is a shard of a replicated tensor"
        )

    def viewed(self, x: PlaneTensor, sizes: tuple[int, ...]) -> tuple[PlaneTensor, Layout]:
        """Return the tensor in a layout in which it can be viewed in other sizes, and the view's layout."""
        while True:
            try:
                return x, regrouped(x.partition, sizes)
            except Uneven as uneven:
                cut = uneven.factor
                if cut.mesh_dim is None:
                    raise
                dim, factor = next((dim, one) for dim, one in partitioned(x.partition) if one.mesh_dim == cut.mesh_dim)
                # `cut` is the factor with replicated ones merged into it, or the remainder of an earlier cut of it.
                multiple = uneven.multiple // math.gcd(uneven.multiple, cut.size // factor.size or 1)
                multiple *= factor.size // cut.size or 1
                bounds = rounded(factor.bounds, multiple) if multiple else None
                if multiple and self.strips is not None and factor.size % multiple == 0:  # a row waits for its others
                    lower = tuple(bound // multiple * multiple for bound in factor.bounds)
                    bounds = lower if proper(lower, factor.size, self.strips.empty) else bounds
                if bounds is None or bounds == factor.bounds:
                    x = self.replicate(x, [dim])
                else:
                    index, target = x.partition[dim].index(factor), factor._replace(bounds=bounds)
                    x = self.moved(x, dim, index, tuple((one,) for one in ranges(bounds)), target)

    def local_sizes(self, layout: Layout) -> tuple[int, ...]:
        """The extents of this rank's shard."""
        found = self._local_sizes.get(layout)
        if found is None:
            found = self._local_sizes[layout] = local_shape(layout, self.coordinates)
        return found

    def blank(self, like: Tensor, layout: Layout) -> Tensor | None:
        """Return this rank's shard if it is a strip without rows of a map, which many operators refuse; else None."""
        if self.strips is None or 0 not in self.local_sizes(layout) or 0 in shape(layout):
            return None
        return like.new_empty(self.local_sizes(layout))

    def note(self, layout: Layout) -> None:
        """Remember the bounds of a map, so that buffers of its size get them too."""
        if len(layout) >= 3 and (is_partitioned(layout[-2]) or is_partitioned(layout[-1])):
            self._seen[shape(layout)[-2:]] = layout[-2:]

    def like_seen(self, sizes: tuple[int, ...]) -> Layout | None:
        """Return the layout of a new buffer; None if no map of its size was seen."""
        found = self._seen.get(sizes[-2:]) if len(sizes) >= 3 else None
        return None if found is None else (*replicated(sizes[:-2]), *found)


@lru_cache(maxsize=4096)
def _owned(bounds: Bounds, needed: Needed) -> bool:
    """Whether every rank needs one interval of the cells that it owns."""
    pairs = zip(ranges(bounds), needed, strict=True)
    return all(len(mine) == 1 and own[0] <= mine[0][0] and mine[0][1] <= own[1] for own, mine in pairs)
