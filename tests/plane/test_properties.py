"""Random operators and chains of them, on random grids and uneven layouts, equal plain PyTorch on every rank."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plane.makers import MAKERS
from plane.programs import Program, programs
from plane.ranks import assert_exact, check, numbers, on_ranks, run
from torch import Tensor

from halovae import Grid
from halovae.plane import Plane
from halovae.plane.layout import Factor, Layout

QUICK = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(QUICK, max_examples=300, derandomize=False, print_blob=True)
RANKS = {"interpolation": (3, 5), "convolution": (3, 5), "transposed": (3, 5), "attention": (2, 4), "products": (1, 4)}
CHAINED = [make for name, make in MAKERS.items() if name != "writes"]


def drawn(data: st.DataObject, kind: str) -> Program:
    found: Program = data.draw(programs([MAKERS[kind]], RANKS.get(kind, (2, 5))))
    return found


@pytest.mark.parametrize("kind", MAKERS)
@QUICK
@given(data=st.data())
def test_an_operator_is_exact(kind: str, data: st.DataObject) -> None:
    drawn(data, kind).check()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
@LONG
@given(data=st.data())
def test_many_uses_of_an_operator_are_exact(kind: str, data: st.DataObject) -> None:
    drawn(data, kind).check()


@settings(QUICK, max_examples=60)
@given(programs(CHAINED, (3, 5), 5))
def test_a_chain_of_operators_is_exact(program: Program) -> None:
    program.check()


@pytest.mark.slow
@settings(LONG, max_examples=2000)
@given(programs(CHAINED, (3, 5), 5))
def test_many_chains_of_operators_are_exact(program: Program) -> None:
    program.check()


# Cases that these tests found.


def on_layout(function: Any, layout: Layout, shape: tuple[int, ...], grid: Grid) -> None:
    """Compare a function of numbers in this layout with the function of the plain numbers."""
    x = numbers(*shape)

    def work(plane: Plane) -> Any:
        with plane.working():
            placed = plane.to_layout(plane.lift(x), layout)
        return function(placed)

    assert_exact(on_ranks(work, grid), function(x))


def refused(function: Any, x: Tensor, grid: Grid) -> None:
    with pytest.raises(RuntimeError):
        function(x)
    assert all(isinstance(outcome.error, RuntimeError) for outcome in run(function, x, grid))


def test_a_window_may_lie_outside_of_a_replicated_map() -> None:
    weight = numbers(1, 1, 1, 2)
    check(lambda x: F.conv2d(x, weight, padding=(0, 3), dilation=(1, 2)), numbers(1, 1, 1, 1), Grid(cols=3))


def test_a_stride_beyond_a_transposed_kernel_leaves_gaps() -> None:
    weight, bias = numbers(1, 1, 1, 1), numbers(1)
    for stride, padding, extra, dilation in ((2, 0, 0, 1), (3, 1, 1, 1), (2, 1, 1, 3), (5, 0, 4, 1)):
        for size in (2, 7):
            check(
                lambda x, s=stride, p=padding, e=extra, d=dilation: F.conv_transpose2d(x, weight, bias, s, p, e, 1, d),  # type: ignore[misc]
                numbers(1, 1, size, size),
                Grid(rows=2, cols=2),
            )


def test_gaps_between_uneven_bounds() -> None:
    weight = numbers(4, 2, 1)
    layout: Layout = ((Factor(2),), (Factor(4),), (Factor(8, "cols", (0, 2, 7, 8)),))
    on_layout(lambda x: F.conv_transpose1d(x, weight, None, 2, 3, 2, 4, 3), layout, (2, 4, 8), Grid(cols=3))


def test_a_transposed_convolution_to_nothing_is_refused() -> None:
    weight = numbers(1, 1, 1, 1)
    refused(lambda x: F.conv_transpose2d(x, weight, padding=1), numbers(1, 1, 2, 2), Grid(rows=2))


@pytest.mark.parametrize(("mode", "width"), [("reflect", 6), ("circular", 7), ("replicate", -7)])
def test_a_pad_that_plain_pytorch_refuses_is_refused(mode: str, width: int) -> None:
    refused(lambda x: F.pad(x, (0, 0, width, 0), mode=mode), numbers(1, 4, 6, 5), Grid(rows=2, cols=2))


def test_weights_may_multiply_a_vector() -> None:
    check(lambda x: F.linear(x[0, 0, 0], numbers(2, 6)), numbers(1, 4, 7, 6), Grid(rows=2, cols=2))


def test_sizes_change_in_place_as_in_plain_pytorch() -> None:
    def work(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        y.squeeze_(0).unsqueeze_(1).transpose_(0, -1)
        return y, y.sum((1, 2)).t_()

    check(work, numbers(1, 4, 7, 6), Grid(rows=2, cols=2))


def test_group_norm_of_single_values_in_a_partitioned_batch() -> None:
    on_layout(lambda x: F.group_norm(x, 1), ((Factor(2, "rows", (0, 1, 2)),), ()), (2, 1), Grid(rows=2))


def test_indices_of_a_partitioned_dim_may_be_negative() -> None:
    index = torch.tensor([2, 0, 3])
    check(lambda x: x.index_select(-1, index), numbers(1, 4, 7, 6), Grid(rows=2, cols=2))


def test_a_piece_may_be_partitioned_over_ranks_that_the_others_use_for_another_dim() -> None:
    x, y = numbers(2, 2), numbers(2, 2, seed=1)
    rows, cols = Factor(2, "rows", (0, 1, 2)), Factor(2, "cols", (0, 1, 2))

    def work(plane: Plane) -> Tensor:
        with plane.working():
            first = plane.to_layout(plane.lift(x), ((Factor(2),), (rows,)))
            second = plane.to_layout(plane.lift(y), ((rows,), (cols,)))
        return torch.cat([first, second], 1)

    assert_exact(on_ranks(work, Grid(rows=2, cols=2)), torch.cat([x, y], 1))


@pytest.mark.parametrize("rows", [4, 5])
def test_ranks_agree_about_what_had_to_be_copied_although_one_has_a_single_row(rows: int) -> None:
    def part_of_rows(x: Tensor) -> Tensor:
        y = torch.cat([x, x], -1)[..., : x.shape[-1]]
        z = y.reshape(-1)
        return z.mul_(2)

    check(part_of_rows, numbers(rows, 2), Grid(rows=3))


def test_a_clone_of_a_single_row_is_as_dense_as_those_of_several() -> None:
    def work(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        z = y.unflatten(0, (-1, 1)).flatten(0, 1)
        z.add_(1)
        return y, z

    layout: Layout = ((Factor(13, "rows", (0, 1, 5, 13)),), (Factor(9, "cols", (0, 7, 9)),))
    on_layout(work, layout, (13, 9), Grid(rows=3, cols=2))


def test_a_view_that_is_a_copy_refuses_once_its_base_was_written_to() -> None:
    def work(x: Tensor) -> Tensor:
        y = x * 1
        view = y[:, :, 1:4]
        y.mul_(2)
        return view * 1

    outcomes = run(work, numbers(1, 4, 7, 6), Grid(rows=3))
    assert all("its base was written to since" in str(outcome.error) for outcome in outcomes)


def test_ranks_agree_about_what_a_reshape_copies_although_one_has_a_single_col() -> None:
    def work(x: Tensor) -> Tensor:
        y = x.permute(1, 0).clone()
        y.flatten().mul_(2)  # plain PyTorch copies, so that y stays
        return y

    layout: Layout = ((Factor(4),), (Factor(9, "cols", (0, 1, 3, 9)),))
    on_layout(work, layout, (4, 9), Grid(cols=3))
