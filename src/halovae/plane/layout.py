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
    """A part of a dim.

    Attributes:
        size: its logical extent.
        mesh_dim: the mesh dim that partitions it; None where every rank has all of it.
        bounds: rank i along `mesh_dim` owns `bounds[i]:bounds[i + 1]`; none of these is empty.
    """

    size: int
    mesh_dim: MeshDim | None = None
    bounds: Bounds = ()

    def local(self, coordinates: Coordinates) -> int:
        """How much of it the rank at `coordinates` owns."""
        if self.mesh_dim is None:
            return self.size
        position = coordinates[self.mesh_dim]
        return self.bounds[position + 1] - self.bounds[position]

    def times(self, inner: int) -> Factor:
        """This factor with `inner` whole cells in place of each of its own."""
        return Factor(self.size * inner, self.mesh_dim, tuple(bound * inner for bound in self.bounds))


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]
Coordinates = dict[MeshDim, int]


class Uneven(Exception):
    """A view cuts a partitioned factor where no bounds lie.

    Attributes:
        factor: the one that is in the way.
        multiple: what its bounds would have to be multiples of; 0 if no bounds would do.
    """

    def __init__(self, factor: Factor, multiple: int) -> None:
        super().__init__(factor, multiple)
        self.factor, self.multiple = factor, multiple


def extent(dim: Dim) -> int:
    """The logical extent of a dim."""
    return math.prod(factor.size for factor in dim)


def local_extent(dim: Dim, coordinates: Coordinates) -> int:
    """The extent of a rank's part of a dim."""
    return math.prod(factor.local(coordinates) for factor in dim)


@lru_cache(maxsize=4096)
def shape(layout: Layout) -> tuple[int, ...]:
    """The logical shape."""
    return tuple(map(extent, layout))


def local_shape(layout: Layout, coordinates: Coordinates) -> tuple[int, ...]:
    """The shape of a rank's part."""
    return tuple(local_extent(dim, coordinates) for dim in layout)


def whole(size: int) -> Dim:
    """A dim that every rank has all of."""
    return (Factor(size),) if size != 1 else ()


@lru_cache(maxsize=4096)
def replicated(sizes: tuple[int, ...]) -> Layout:
    """The layout of a tensor that every rank has all of."""
    return tuple(map(whole, sizes))


def partitioned(layout: Layout) -> Iterator[tuple[int, Factor]]:
    """The partitioned factors, each with the dim that it is in."""
    for index, dim in enumerate(layout):
        for factor in dim:
            if factor.mesh_dim is not None:
                yield index, factor


@lru_cache(maxsize=4096)
def is_partitioned(dim: Dim) -> bool:
    """Whether ranks have parts of a dim."""
    return any(factor.mesh_dim is not None for factor in dim)


def sole(dim: Dim) -> Factor | None:
    """The partitioned factor that is all of a dim; None for other dims."""
    return dim[0] if len(dim) == 1 and dim[0].mesh_dim is not None else None


def joined(factors: Sequence[Factor]) -> Dim:
    """A dim of these factors in its one canonical form.

    Factors of size 1 go. A whole factor merges into the factor before it, whose cells it makes larger.
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
    """The layout of a view with these extents of a tensor with this layout. A rank's part needs only be reshaped.

    Raises:
        Uneven: the view would cut a rank's part.
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
                # Neither divides the other: no bounds can help but those of nothing partitioned.
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
    """Bounds of parts whose sizes differ by one at most."""
    spans = split(size, ranks)
    return (0, *(span.stop for span in spans))


def proper(bounds: Sequence[int], size: int) -> bool:
    """Whether bounds leave every rank something."""
    return bounds[0] == 0 and bounds[-1] == size and all(a < b for a, b in pairwise(bounds))


def ranges(bounds: Bounds) -> tuple[tuple[int, int], ...]:
    """What each rank owns."""
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
