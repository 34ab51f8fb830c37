"""The zoo's autoencoders on grids of ranks, and unmodified for comparison."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from halovae.distributed.mesh import Mesh
from halovae.distributed.simulated import on_threads
from halovae.grid import Grid
from halovae.models.zoo import CALLS, Direction, Entry, build
from halovae.plane import Plane
from halovae.plane.program import Program
from halovae.plane.trace import trace


def example(entry: Entry, direction: Direction, dtype: torch.dtype) -> Tensor:
    """Return the input: seeded noise, the same in every dtype up to rounding."""
    shape = entry.shape(direction)
    assert shape is not None
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def plain(entry: Entry, direction: Direction, dtype: torch.dtype) -> Tensor:
    """Return the result of the unmodified module on its own."""
    with torch.no_grad():
        return CALLS[direction](build(entry, dtype), example(entry, direction, dtype))


def eager(entry: Entry, direction: Direction, dtype: torch.dtype, grid: Grid) -> list[tuple[Tensor, Plane]]:
    """Return each rank's result, computed operator by operator, and plane. Ranks are threads of this process."""
    x, device = example(entry, direction, dtype), torch.device("cpu")
    module = build(entry, dtype)

    def rank(mesh: Mesh) -> tuple[Tensor, Plane]:
        own, plane = copy.deepcopy(module), Plane(mesh)  # some classes keep caches on themselves
        with plane.active():
            return plane.full(CALLS[direction](own, plane.scatter(x, entry.multiple(direction)))), plane

    return on_threads(grid, device, rank)


def record(entry: Entry, direction: Direction, dtype: torch.dtype, grid: Grid) -> list[Program]:
    """Record each rank's program.

    Raises:
        TraceError: the call cannot be recorded.
    """
    module, device, shape = build(entry, dtype), torch.device("cpu"), entry.shape(direction)
    assert shape is not None

    def rank(mesh: Mesh) -> Program:
        call = CALLS[direction]
        return trace(lambda x: call(module, x), [module], mesh, shape, dtype, device, entry.multiple(direction))

    return on_threads(grid, device, rank)


def replay(programs: list[Program], entry: Entry, direction: Direction, dtype: torch.dtype, grid: Grid) -> list[Tensor]:
    """Return the result of each rank's program, with the global generator seeded as `decode` seeds it."""
    x = example(entry, direction, dtype)

    def rank(mesh: Mesh) -> Tensor:
        program, plane = programs[mesh.rank], Plane(mesh)
        local = plane.scatter(x, entry.multiple(direction)).local
        torch.manual_seed(0)
        result = program(local, mesh)
        with plane.active():
            return plane.full(plane.wrap(result, program.returns))

    with torch.random.fork_rng(devices=[]):
        return on_threads(grid, torch.device("cpu"), rank)


def error(results: list[Tensor], reference: Tensor) -> float:
    """Return the largest difference of any rank's result, relative to the reference's largest value, or to 1."""
    if any(result.shape != reference.shape or not result.isfinite().all() for result in results):
        return float("inf")
    largest = max((result - reference).abs().max().item() for result in results)
    return largest / max(1.0, reference.abs().max().item())
