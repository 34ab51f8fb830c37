"""How a logical tensor lies on a grid of ranks: integers only, the same on every rank.

Each dim of a tensor is a tuple of factors whose sizes multiply to its extent, the slowest first. A factor may be
partitioned over one mesh dim, at explicit bounds; each mesh dim partitions one factor of a tensor at most. So H x W
flattened to tokens is the dim `(H over rows, W over cols)`, and stays partitioned. Views regroup factors; they never
move data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from halovae.grid import split

MeshDim = Literal["rows", "cols"]
Bounds = tuple[int, ...]


class Factor(NamedTuple):
    """A factor of a dim's extent.

    Attributes:
        size: its logical extent.
        mesh_dim: the mesh dim that partitions it; None if it is replicated.
        bounds: rank i along `mesh_dim` owns `bounds[i]:bounds[i + 1]`; only of strips may these be empty.
    """

    size: int
    mesh_dim: MeshDim | None = None
    bounds: Bounds = ()

    def local(self, coordinates: Coordinates) -> int:
        """The extent that the rank at `coordinates` owns."""
        if self.mesh_dim is None:
            return self.size
        position = coordinates[self.mesh_dim]
        return self.bounds[position + 1] - self.bounds[position]

    def times(self, inner: int) -> Factor:
        """This factor with `inner` cells, on the same rank, in place of each of its own."""
        return Factor(self.size * inner, self.mesh_dim, tuple(bound * inner for bound in self.bounds))


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]
Coordinates = dict[MeshDim, int]


class Uneven(Exception):
    """A view would cut a partitioned factor away from its bounds.

    Attributes:
        factor: the factor that prevents the view.
        multiple: what its bounds would have to be multiples of; 0 if no bounds would allow the view.
    """

    def __init__(self, factor: Factor, multiple: int) -> None:
        super().__init__(factor, multiple)
        self.factor, self.multiple = factor, multiple


def extent(dim: Dim) -> int:
    """The logical extent of a dim."""
    return math.prod(factor.size for factor in dim)


def local_extent(dim: Dim, coordinates: Coordinates) -> int:
    """The extent of a rank's shard of a dim."""
    return math.prod(factor.local(coordinates) for factor in dim)


@lru_cache(maxsize=4096)
def shape(layout: Layout) -> tuple[int, ...]:
    """The logical shape."""
    return tuple(map(extent, layout))


def local_shape(layout: Layout, coordinates: Coordinates) -> tuple[int, ...]:
    """The shape of a rank's shard."""
    return tuple(local_extent(dim, coordinates) for dim in layout)


def replicated_dim(size: int) -> Dim:
    """A replicated dim of this extent."""
    return (Factor(size),) if size != 1 else ()


@lru_cache(maxsize=4096)
def replicated(sizes: tuple[int, ...]) -> Layout:
    """The layout of a replicated tensor."""
    return tuple(map(replicated_dim, sizes))


def partitioned(layout: Layout) -> Iterator[tuple[int, Factor]]:
    """The partitioned factors, each with the dim that it is in."""
    for index, dim in enumerate(layout):
        for factor in dim:
            if factor.mesh_dim is not None:
                yield index, factor


@lru_cache(maxsize=4096)
def is_partitioned(dim: Dim) -> bool:
    """Whether ranks have shards of a dim."""
    return any(factor.mesh_dim is not None for factor in dim)


def sole(dim: Dim) -> Factor | None:
    """The only factor of a dim, if it is partitioned; else None."""
    return dim[0] if len(dim) == 1 and dim[0].mesh_dim is not None else None


def joined(factors: Sequence[Factor]) -> Dim:
    """Return a dim of these factors in canonical form.

    Factors of size 1 are dropped. A replicated factor merges into the factor before it, whose cells become larger.
    """
    found: list[Factor] = []
    for factor in factors:
        if factor.mesh_dim is None and factor.size == 1:
            continue
        if found and factor.mesh_dim is None:
            found[-1] = found[-1].times(factor.size)
        else:
            found.append(factor)
    return tuple(found)


@lru_cache(maxsize=4096)
def regrouped(layout: Layout, sizes: tuple[int, ...]) -> Layout:
    """Return the layout of a view with extents `sizes`. A rank's shard only needs to be reshaped.

    Raises:
        Uneven: the view would cut a rank's shard.
    """
    rest = list(joined([factor for dim in layout for factor in dim]))[::-1]
    result = []
    for size in sizes:
        taken: list[Factor] = []
        while size > 1:
            factor = rest.pop()
            if size % factor.size == 0:
                taken.append(factor)
                size //= factor.size
                continue
            if factor.size % size:
                # Neither divides the other: the view needs a replicated factor.
                blocking = next((one for one in (factor, *reversed(rest)) if one.mesh_dim is not None), factor)
                raise Uneven(blocking, 0)
            inner = factor.size // size
            if any(bound % inner for bound in factor.bounds):
                raise Uneven(factor, inner)
            taken.append(Factor(size, factor.mesh_dim, tuple(bound // inner for bound in factor.bounds)))
            rest.append(Factor(inner))
            size = 1
        result.append(joined(taken))
    return tuple(result)


@lru_cache(maxsize=4096)
def even(size: int, ranks: int) -> Bounds:
    """Bounds of shards whose sizes differ by one at most."""
    spans = split(size, ranks)
    return (0, *(span.stop for span in spans))


def proper(bounds: Sequence[int], size: int, empty: bool = False) -> bool:
    """Whether bounds leave every rank at least one cell; with `empty`, whether they are in order."""
    return bounds[0] == 0 and bounds[-1] == size and all(a < b or (empty and a == b) for a, b in pairwise(bounds))


def ranges(bounds: Bounds) -> tuple[tuple[int, int], ...]:
    """The range that each rank owns."""
    return tuple(pairwise(bounds))


def rounded(bounds: Bounds, multiple: int) -> Bounds | None:
    """The nearest bounds that are multiples of `multiple`; None if there are too few for all ranks."""
    cells, ranks = bounds[-1] // multiple, len(bounds) - 1
    if bounds[-1] % multiple or cells < ranks:
        return None
    near = [round(bound / multiple) for bound in bounds]
    for index in range(1, ranks):
        near[index] = min(max(near[index], near[index - 1] + 1), cells - (ranks - index))
    return tuple(bound * multiple for bound in near)
