"""Layouts are integers: the cells that each rank owns, and the layouts of views."""

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from plane.programs import Source
from torch import Tensor

from halovae import Grid
from halovae.plane.layout import (
    Coordinates,
    Dim,
    Factor,
    Layout,
    MeshDim,
    Uneven,
    even,
    extent,
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

GRIDS = tuple(map(Grid.parse, ("1x1", "2x1", "1x3", "2x2", "3x2")))
QUICK = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@st.composite
def factors(draw: Any) -> tuple[Grid, list[Factor]]:
    """Factors in any order, including replicated ones and ones of size 1; each mesh dim partitions one at most."""
    grid = draw(st.sampled_from(GRIDS))
    found, names = [], draw(st.permutations(["rows", "cols"]))
    for name, ranks in ((name, grid.rows if name == "rows" else grid.cols) for name in names):
        found += [Factor(draw(st.integers(1, 4))) for _ in range(draw(st.integers(0, 2)))]
        size = draw(st.integers(ranks, 8))
        if ranks > 1:
            cuts = draw(st.sets(st.integers(1, size - 1), min_size=ranks - 1, max_size=ranks - 1))
            found.append(Factor(size, name, (0, *sorted(cuts), size)))
    return grid, [*found, Factor(draw(st.integers(1, 4)))]


@st.composite
def layouts(draw: Any) -> tuple[Grid, Layout]:
    grid = draw(st.sampled_from(GRIDS))
    sizes = [draw(st.integers(1, 12)) for _ in range(draw(st.integers(1, 4)))]
    return grid, Source(draw, grid).layout(sizes)


def places(grid: Grid) -> list[Coordinates]:
    return [{"rows": row, "cols": col} for row, col in product(range(grid.rows), range(grid.cols))]


def cells(dim: Dim, coordinates: Coordinates) -> list[int]:
    """The indices of a dim that a rank owns, in the order of its shard."""
    found = [0]
    for factor in dim:
        own = range(factor.size)
        if factor.mesh_dim is not None:
            own = range(*ranges(factor.bounds)[coordinates[factor.mesh_dim]])
        found = [index * factor.size + one for index in found for one in own]
    return found


def shard(x: Tensor, layout: Layout, coordinates: Coordinates) -> Tensor:
    """Return a rank's shard of a tensor."""
    for dim, factors in enumerate(layout):
        x = x.index_select(dim, torch.tensor(cells(factors, coordinates)))
    return x


def indices(sizes: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(sizes)).reshape(sizes)


@QUICK
@given(layouts(), st.data())
def test_a_regrouped_shard_has_the_cells_of_the_view_in_order(drawn: tuple[Grid, Layout], data: st.DataObject) -> None:
    grid, layout = drawn
    whole = indices(shape(layout))
    sizes = tuple(Source(data.draw, grid).factorization(whole.numel()))
    try:
        view = regrouped(layout, sizes)
    except Uneven:
        assert any(True for _ in partitioned(layout)), "views of replicated tensors are always possible"
        return
    assert shape(view) == sizes
    assert all(joined(dim) == dim for dim in view)
    for place in places(grid):
        own = shard(whole, layout, place)
        assert tuple(own.shape) == local_shape(layout, place)
        assert torch.equal(own.reshape(local_shape(view, place)), shard(whole.reshape(sizes), view, place))


@QUICK
@given(layouts())
def test_a_view_and_its_inverse_cancel(drawn: tuple[Grid, Layout]) -> None:
    _, layout = drawn
    sizes = shape(layout)
    flat = regrouped(layout, (math.prod(sizes),))
    assert regrouped(flat, sizes) == layout
    assert regrouped(layout, sizes) == layout


@QUICK
@given(layouts(), st.data())
def test_shards_are_disjoint_and_make_up_the_whole(drawn: tuple[Grid, Layout], data: st.DataObject) -> None:
    grid, layout = drawn
    whole = indices(shape(layout))
    mesh_dims: set[MeshDim | None] = {factor.mesh_dim for _, factor in partitioned(layout)}
    several: list[Coordinates] = [
        place for place in places(grid) if all(name in mesh_dims or at == 0 for name, at in place.items())
    ]
    found = torch.cat([shard(whole, layout, place).flatten() for place in several])
    assert torch.equal(found.sort()[0], whole.flatten())


@QUICK
@given(factors())
def test_joined_factors_are_canonical(drawn: tuple[Grid, list[Factor]]) -> None:
    grid, given_ = drawn
    dim = joined(given_)
    assert joined(dim) == dim
    assert extent(dim) == math.prod(factor.size for factor in given_)
    assert all(factor.mesh_dim is not None or (index == 0 and factor.size > 1) for index, factor in enumerate(dim))
    for place in places(grid):
        assert cells(dim, place) == cells(tuple(given_), place)


@QUICK
@given(st.integers(1, 60), st.integers(1, 9))
def test_even_bounds(size: int, ranks: int) -> None:
    assume(size >= ranks)
    bounds = even(size, ranks)
    lengths = [b - a for a, b in pairwise(bounds)]
    assert proper(bounds, size)
    assert len(lengths) == ranks
    assert max(lengths) - min(lengths) <= 1


@QUICK
@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_rounded_bounds_are_proper_multiples_close_by(cells: int, multiple: int, data: st.DataObject) -> None:
    size = cells * multiple
    ranks = data.draw(st.integers(1, min(size, 6)))
    cuts = data.draw(st.sets(st.integers(1, size - 1), min_size=ranks - 1, max_size=ranks - 1)) if ranks > 1 else set()
    bounds = (0, *sorted(cuts), size)
    assert proper(bounds, size)
    found = rounded(bounds, multiple)
    if found is None:
        assert cells < ranks
        return
    assert proper(found, size)
    assert len(found) == len(bounds)
    assert all(bound % multiple == 0 for bound in found)
    if all(bound % multiple == 0 for bound in bounds):
        assert found == bounds
    assert rounded((*bounds[:-1], size + 1), multiple) is None or multiple == 1


def test_bounds_that_leave_a_rank_nothing_are_not_proper() -> None:
    assert proper((0, 1, 3), 3)
    assert not proper((0, 0, 3), 3)
    assert not proper((0, 3, 3), 3)
    assert not proper((1, 2, 3), 3)
    assert not proper((0, 2), 3)


def test_extents_of_one_have_no_factors() -> None:
    assert replicated((1, 3, 1)) == ((), (Factor(3),), ())


def test_what_is_in_the_way_of_a_view_is_named() -> None:
    rows = Factor(6, "rows", (0, 3, 6))
    layout: Layout = ((rows,), (Factor(5),))
    assert regrouped(layout, (30,)) == ((rows.times(5),),)
    with pytest.raises(Uneven) as raised:  # the bound 3 is no multiple of 2
        regrouped(layout, (3, 10))
    assert raised.value.multiple == 10
