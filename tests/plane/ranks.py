"""Compare functions of plane tensors on every rank of a grid with the same functions of plain tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halovae import Grid
from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.plane import Plane, PlaneTensor
from halovae.plane.layout import Layout, local_shape

Function = Callable[[Tensor], Any]
GRIDS = tuple(map(Grid.parse, ("2x1", "1x2", "2x2", "3x1")))
CPU = torch.device("cpu")


@dataclass
class Outcome:
    """The results of a function on one rank.

    Attributes:
        plane: the rank's plane.
        results: the full data of each result.
        layouts: how each result was partitioned; None for a plain tensor.
        error: what the function raised.
    """

    plane: Plane
    results: list[Tensor] = field(default_factory=list)
    layouts: list[Layout | None] = field(default_factory=list)
    error: Exception | None = None

    @property
    def fallbacks(self) -> dict[str, int]:
        return dict(self.plane.fallbacks)


class Gone:
    """A rank that is done sends this to ranks that still wait for it: they fail instead of waiting forever."""


def on_ranks(function: Callable[[Plane], Any], grid: Grid) -> list[Outcome]:
    """Call a function on each rank. Errors are kept in the outcomes.

    Raises:
        AssertionError: a rank waits for one that is done.
    """

    def work(mesh: Mesh) -> Outcome:
        outcome = Outcome(Plane(mesh))
        with outcome.plane.active():
            try:
                for one in tensors(function(outcome.plane)):
                    if isinstance(one, PlaneTensor):
                        assert tuple(one.local.shape) == local_shape(one.partition, outcome.plane.coordinates)
                        assert one.local.dtype == one.dtype
                    outcome.layouts.append(one.partition if isinstance(one, PlaneTensor) else None)
                    outcome.results.append(outcome.plane.full(one))
            except Exception as error:
                outcome.error = error
        peers = [rank for rank in range(grid.size) if rank != mesh.rank]
        mesh.transport.exchange("world", [(rank, Gone()) for rank in peers], [])  # type: ignore[misc]
        return outcome

    outcomes = on_threads(grid, CPU, work)
    for outcome in outcomes:
        if outcome.error is not None and "Gone" in str(outcome.error):
            first = next((one.error for one in outcomes if one.error and "Gone" not in str(one.error)), None)
            raise AssertionError(f"a rank waits for one that is done: {first!r}") from outcome.error
    return outcomes


def tensors(value: Any) -> list[Tensor]:
    """The tensors that a function returned, one or several."""
    return [value] if isinstance(value, Tensor) else [one for item in value for one in tensors(item)]


def run(function: Function, x: Tensor, grid: Grid) -> list[Outcome]:
    """Call a function of a map whose last two dims are partitioned on each rank."""
    return on_ranks(lambda plane: function(plane.scatter(x)), grid)


def assert_exact(outcomes: Sequence[Outcome], want: Any, tolerance: float = 1e-12) -> None:
    """Check that all ranks have the same bits, and that these equal plain PyTorch's result up to rounding."""
    for outcome in outcomes:
        if outcome.error is not None:
            raise AssertionError(f"a rank failed: {outcome.error!r}") from outcome.error
    first = outcomes[0]
    for outcome in outcomes[1:]:
        assert outcome.layouts == first.layouts, "ranks disagree about the layout"
        for one, other in zip(first.results, outcome.results, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.isnan(), other.isnan()), "ranks have different bits"
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), "ranks have different bits"
    for got, wanted in zip(first.results, tensors(want), strict=True):
        assert_close(got, wanted, tolerance)


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    """Check equality up to rounding errors, relative to the largest value."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)} for {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{got.dtype} for {want.dtype}"
    if not want.numel():
        return
    got, want = (one.to(torch.float64) for one in (got, want))
    scale = max(1.0, want[want.isfinite()].abs().max().item() if want.isfinite().any() else 1.0)
    assert torch.equal(got.isfinite(), want.isfinite()), "not finite at other places"
    error = (got - want)[want.isfinite()].abs()
    assert not error.numel() or error.max().item() <= tolerance * scale, f"wrong by {error.max().item():.1e}"


def check(function: Function, x: Tensor, grid: Grid, tolerance: float = 1e-12) -> list[Outcome]:
    """Compare a function on a grid of ranks with the function itself."""
    outcomes = run(function, x, grid)
    assert_exact(outcomes, function(x.clone()), tolerance)
    return outcomes


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random numbers, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
