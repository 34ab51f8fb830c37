"""Shards of any grid up to 64 ranks: nothing left out, nothing owned twice, sizes even to one cell."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from halovae.grid import Grid, Span, split


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    batch = draw(st.integers(1, 64))
    rows = draw(st.integers(1, 64 // batch))
    return Grid(batch, rows, draw(st.integers(1, 64 // (batch * rows))))


@given(length=st.integers(1, 500), count=st.integers(1, 64))
def test_split_covers_everything_once_and_evenly(length: int, count: int) -> None:
    assume(count <= length)
    spans = split(length, count)
    assert [index for span in spans for index in range(span.start, span.stop)] == list(range(length))
    sizes = [span.size for span in spans]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("count", [0, 6, -1])
def test_split_refuses_empty_spans(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 5"):
        split(5, count)


@given(grid=grids(), data=st.data())
def test_shards_tile_the_latent(grid: Grid, data: st.DataObject) -> None:
    batch = data.draw(st.integers(grid.batch, grid.batch + 3))
    height = data.draw(st.integers(grid.rows, grid.rows + 40))
    width = data.draw(st.integers(grid.cols, grid.cols + 40))
    shards = grid.shards(batch, height, width)
    assert len(shards) == grid.size
    total = sum(shard.batch.size * shard.rows.size * shard.cols.size for shard in shards)
    assert total == batch * height * width
    for rank, shard in enumerate(shards):
        item, row, col = grid.coordinates(rank)
        assert rank == (item * grid.rows + row) * grid.cols + col
        assert shard.rows == split(height, grid.rows)[row]
        assert shard.cols == split(width, grid.cols)[col]
        assert shard.batch == split(batch, grid.batch)[item]


@given(grid=grids(), factor=st.sampled_from([1, 2, 4, 8, 16]))
def test_scaled_shards_tile_the_picture(grid: Grid, factor: int) -> None:
    shards = grid.shards(grid.batch, grid.rows + 3, grid.cols + 5)
    scaled = [shard.scaled(factor) for shard in shards]
    height, width = (grid.rows + 3) * factor, (grid.cols + 5) * factor
    assert sum(s.batch.size * s.rows.size * s.cols.size for s in scaled) == grid.batch * height * width
    assert max(s.rows.stop for s in scaled) == height
    for below, above in zip(shards, scaled, strict=True):
        assert above.shape(3, 5) == (below.batch.size, 3, 5, below.rows.size * factor, below.cols.size * factor)


@given(grid=grids())
def test_a_grid_reads_back_what_it_writes(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize("text", ["2", "2x", "2x2x2x2", "ax1", "2 x 1", "-1x2", ""])
def test_a_grid_that_cannot_be_read_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="ROWSxCOLS"):
        Grid.parse(text)


@pytest.mark.parametrize("rows", [0, -2, 1.5, "2"])
def test_a_grid_of_no_ranks_is_refused(rows: int) -> None:
    with pytest.raises(ValueError, match="rows"):
        Grid(rows=rows)


def test_more_ranks_than_rows_says_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"8 ranks along rows, but there are only 5 latent rows: at most 5"):
        Grid(rows=8).shards(1, 5, 9)
    with pytest.raises(ValueError, match=r"along cols.*at most 2"):
        Grid(cols=3).shards(1, 5, 2)
    with pytest.raises(ValueError, match=r"along batch.*at most 1"):
        Grid(batch=2).shards(1, 5, 2)


def test_spans_grow_and_scale() -> None:
    assert Span(2, 5).grown(1, 2) == Span(1, 7)
    assert Span(2, 5).scaled(4) == Span(8, 20)
