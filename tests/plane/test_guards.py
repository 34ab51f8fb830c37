"""Inexact operators raise errors that name them; replicated operators are reported; random numbers are the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plane.ranks import GRIDS, Outcome, assert_exact, numbers, run
from torch import Tensor

from halovae import Grid
from halovae.plane import PlaneTensor


def row(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :, 3] = 0
    return y


def rows(x: Tensor) -> Tensor:
    y = x * 2
    y[:, :, 2:6:3].mul_(2)
    return y


def tokens(x: Tensor) -> Tensor:
    y = x * 2
    y.view(1, 4, 3, 14).transpose(1, 2)[:, 1].add_(1)
    return y


def refused(outcomes: list[Outcome], name: str) -> None:
    for outcome in outcomes:
        assert isinstance(outcome.error, RuntimeError), outcome.error
        assert "cannot write in place" in str(outcome.error)
        assert name in str(outcome.error)


@pytest.mark.parametrize(
    ("function", "name"),
    [(row, "aten.fill_"), (rows, "aten.mul_"), (tokens, "aten.add_")],
)
def test_a_write_that_plain_pytorch_would_see_elsewhere_is_refused_by_name(
    function: Callable[[Tensor], Tensor], name: str
) -> None:
    outcomes = run(function, numbers(1, 4, 7, 6), Grid(rows=3))
    refused(outcomes, name)


def test_a_shard_of_the_input_is_not_written_to() -> None:
    x = numbers(1, 4, 7, 6)
    before = x.clone()
    refused(run(lambda x: x.mul_(2), x, Grid(rows=2)), "aten.mul_")
    assert torch.equal(x, before)


def test_a_pad_of_nothing_is_a_copy() -> None:
    def padded(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        z = F.pad(y, (0, 0, 1, 0))
        z.add_(1)
        return y, z

    for grid in GRIDS:
        assert_exact(run(padded, numbers(1, 4, 7, 6), grid), padded(numbers(1, 4, 7, 6)))


def test_sizes_are_not_changed_in_place() -> None:
    for outcome in run(lambda x: (x * 2).resize_(4, 7, 6), numbers(1, 4, 7, 6), Grid(rows=2)):
        assert isinstance(outcome.error, RuntimeError)
        assert "aten.resize_" in str(outcome.error)


def test_fallbacks_and_what_they_received_are_reported() -> None:
    outcomes = run(lambda x: x.tril() + x.triu() + x.tril(1), numbers(1, 4, 7, 6), Grid(rows=2))
    cells = [4 * 6 * 8 * other for other in (3, 4)]  # fp64 that the other rank owns
    for outcome, received in zip(outcomes, cells, strict=True):
        assert outcome.fallbacks == {"aten.tril.default": 2, "aten.triu.default": 1}
        assert dict(outcome.plane.gathered) == {"aten.tril.default": 2 * received, "aten.triu.default": received}


def test_operators_on_what_every_rank_has_are_no_fallbacks() -> None:
    outcomes = run(lambda x: x.mean((2, 3), keepdim=True).tril(), numbers(1, 4, 7, 6), Grid(rows=2, cols=2))
    assert_exact(outcomes, numbers(1, 4, 7, 6).mean((2, 3), keepdim=True).tril())
    assert all(not outcome.fallbacks for outcome in outcomes)


def test_what_pointwise_operators_receive_is_nothing() -> None:
    def received(x: Tensor) -> Tensor:
        assert isinstance(x, PlaneTensor)
        y = F.silu(x) * x + x.flatten(2).view(x.shape)
        return torch.tensor([x.plane.received, x.plane.inside, len(y)])

    for outcome in run(received, numbers(1, 4, 7, 6), Grid(rows=2, cols=2)):
        assert outcome.results[0].tolist() == [0, 0, 1]


RANDOM: dict[str, Callable[[Tensor], Any]] = {
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "normal_": lambda x: (x * 1).normal_(1, 2),
    "uniform_": lambda x: (x * 1).uniform_(-1, 3),
    "normal_of_a_view": lambda x: (x * 1).transpose(2, 3).normal_(),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_": lambda x: (x * 1).bernoulli_(0.3),
    "dropout": lambda x: F.dropout(x, 0.5, True),
    "multinomial": lambda x: torch.multinomial(x[0, 0].exp(), 2),
    "permutation_with_a_generator": lambda x: x * torch.rand(x.shape, generator=torch.Generator().manual_seed(3)),
    "randn": lambda x: x + torch.randn(x.shape, dtype=x.dtype),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("size", [(7, 6), (16, 20)])
def test_random_numbers_are_those_of_one_device(name: str, size: tuple[int, int]) -> None:
    def drawn(x: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        return RANDOM[name](x), torch.rand(3)  # the state afterwards is the same too

    for grid in GRIDS:
        x = numbers(1, 4, *size)
        assert_exact(run(drawn, x, grid), drawn(x))


def pad_then_write(z: Tensor) -> Tensor:
    z = z * 1
    y = F.pad(z, (0, 0, 1, 1))
    z.add_(1)
    return y[:, :, 1:-1] + z


def pad_then_write_to_a_view(z: Tensor) -> Tensor:
    y = F.pad(z, (0, 0, 1, 1))
    y[:, 0].add_(5)
    return y[:, :, 1:-1] * 1


def roll_by_nothing(z: Tensor) -> Tensor:
    z = z * 1
    y = torch.roll(z, 0, 2)
    y.add_(1)
    return z


@pytest.mark.parametrize("work", [pad_then_write, pad_then_write_to_a_view, roll_by_nothing])
def test_results_have_memory_of_their_own(work: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 4, 7, 5, dtype=torch.float64)
    assert_exact(run(work, x, Grid(rows=3)), work(x))


def test_a_stale_copy_cannot_be_returned() -> None:
    def work(z: Tensor) -> Tensor:
        z = z * 1
        y = z[:, :, 0:3]
        z.add_(1)
        return y

    outcomes = run(work, torch.randn(1, 4, 7, 5, dtype=torch.float64), Grid(rows=3))
    assert all("its base was written to since" in str(outcome.error) for outcome in outcomes)


def test_a_norm_does_not_overflow_in_half_precision() -> None:
    outcomes = run(lambda x: x.norm(), torch.ones(1, 1, 400, 400, dtype=torch.float16), Grid(rows=2))
    assert all(float(outcome.results[0]) == 400 for outcome in outcomes)


def test_pieces_of_two_dtypes_have_one_result_on_all_ranks() -> None:
    def work(x: Tensor) -> Tensor:
        return torch.cat([x.float(), x], 2)

    x = torch.randn(1, 2, 6, 5, dtype=torch.float64)
    assert_exact(run(work, x, Grid(rows=2)), work(x))


def test_strides_cannot_be_changed() -> None:
    outcomes = run(lambda x: x.as_strided((2, 2), (1, 1)), torch.randn(1, 1, 4, 4), Grid(rows=2))
    assert all("no strides of its own" in str(outcome.error) for outcome in outcomes)
