"""Random programs of one or several operators, on random grids and layouts, for the property tests."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from hypothesis import strategies as st
from plane.ranks import Outcome, assert_exact, numbers, on_ranks
from torch import Tensor

from halovae import Grid
from halovae.plane import Plane
from halovae.plane.layout import Dim, Factor, Layout, MeshDim, joined, replicated

Value = TypeVar("Value")
Place = Callable[[Tensor, Layout], Tensor]
GRIDS = tuple(map(Grid.parse, ("2x1", "1x2", "2x2", "3x1", "1x3", "3x2")))


@dataclass
class Step:
    """An operator with its arguments. `call` takes a tensor, and a function that partitions others."""

    text: str
    call: Callable[[Tensor, Place], Any] = field(repr=False)


@dataclass
class Program:
    """A sequence of operators, and their input.

    Attributes:
        grid: the ranks.
        layout: the input's layout.
        shape: the input's shape.
        steps: the operators.
        want: the result of plain PyTorch, or its error.
    """

    grid: Grid
    layout: Layout
    shape: tuple[int, ...]
    steps: list[Step]
    want: Any

    def __repr__(self) -> str:
        steps = "\n  ".join(step.text for step in self.steps)
        outcome = f"raises {self.want!r}" if isinstance(self.want, Exception) else "is computed"
        return f"Program on {self.grid} of {self.shape} in {self.layout}, which {outcome}:\n  {steps}"

    def check(self) -> None:
        """Compare all ranks with plain PyTorch, in results or in errors."""

        def work(plane: Plane) -> Any:
            def place(x: Tensor, layout: Layout) -> Tensor:
                with plane.working():
                    return plane.to_layout(plane.lift(x), layout)

            return computed(self.steps, place(numbers(*self.shape), self.layout), place)

        outcomes = on_ranks(work, self.grid)
        if any(map(guarded, outcomes)):
            assert all(map(guarded, outcomes)), "some ranks refuse to write in place"
        elif "view size is not compatible" in str(self.want):
            return  # plane tensors are reshaped instead
        elif isinstance(self.want, Exception):
            assert all(one.error is not None for one in outcomes), "plain PyTorch refuses it"
        else:
            assert_exact(outcomes, self.want)


def guarded(outcome: Outcome) -> bool:
    """Whether the rank refused to write in place to a tensor that is no view of the whole tensor."""
    return isinstance(outcome.error, RuntimeError) and "cannot write in place" in str(outcome.error)


def computed(steps: Sequence[Step], x: Tensor, place: Place) -> Any:
    """Return the result of a program."""
    result: Any = x
    for step in steps:
        result = step.call(result, place)
    return result


class Source:
    """Draws the values that make up a program."""

    def __init__(self, draw: Callable[..., Any], grid: Grid) -> None:
        self.draw, self.grid, self.seed = draw, grid, 0
        everyone: tuple[tuple[MeshDim, int], ...] = (("rows", grid.rows), ("cols", grid.cols))
        self.extents = {name: ranks for name, ranks in everyone if ranks > 1}

    def integer(self, low: int, high: int) -> int:
        return cast(int, self.draw(st.integers(low, max(low, high))))

    def one(self, values: Sequence[Value]) -> Value:
        return cast(Value, self.draw(st.sampled_from(values)))

    def flag(self) -> bool:
        return cast(bool, self.draw(st.booleans()))

    def rarely(self) -> bool:
        return self.integer(0, 7) == 7

    def some(self, values: Sequence[Value], least: int = 0, most: int | None = None) -> list[Value]:
        """Some of the values, in any order."""
        if not values:
            return []
        found = self.draw(st.lists(st.sampled_from(range(len(values))), min_size=least, max_size=most, unique=True))
        return [values[index] for index in found]

    def divisor(self, size: int) -> int:
        return self.one([n for n in range(1, size + 1) if size % n == 0] or [1])

    def factorization(self, size: int) -> list[int]:
        """Extents whose product is `size`."""
        sizes = []
        for _ in range(self.integer(0, 3)):
            sizes.append(self.divisor(size))
            size //= sizes[-1]
        return [*sizes, size]

    def numbers(self, *shape: int) -> Tensor:
        self.seed += 1
        return numbers(*shape, seed=self.seed)

    def broadcast(self, shape: Sequence[int]) -> tuple[int, ...]:
        """A shape that is broadcast to this one."""
        kept = [n if self.flag() else 1 for n in shape]
        return tuple(kept[self.integer(0, len(kept)) :] if self.rarely() else kept)

    def dim(self, size: int, mesh_dims: Sequence[MeshDim]) -> Dim:
        """A dim partitioned over these mesh dims at random bounds."""
        factors, rest = [], size
        tangled = len(mesh_dims) > 1 or self.rarely()
        for name in mesh_dims:
            if tangled:
                factors.append(Factor(self.divisor(rest)))
                rest //= factors[-1].size
            own = self.divisor(rest) if tangled else rest
            ranks = self.extents[name]
            if own < ranks:
                continue
            cuts = self.draw(st.sets(st.integers(1, own - 1), min_size=ranks - 1, max_size=ranks - 1))
            factors.append(Factor(own, name, (0, *sorted(cuts), own)))
            rest //= own
        return joined([*factors, Factor(rest)])

    def layout(self, shape: Sequence[int]) -> Layout:
        """A random layout: mostly H over rows and W over cols."""
        layout, at = list(replicated(tuple(shape))), dict[int, list[MeshDim]]()
        for name in self.extents:
            usual = len(shape) - (2 if name == "rows" else 1)
            dim = self.integer(0, len(shape) - 1) if usual < 0 or self.rarely() else usual
            at.setdefault(dim, []).append(name)
        for dim, names in at.items() if shape else ():
            if shape[dim] > 1:
                layout[dim] = self.dim(shape[dim], names)
        return tuple(layout)

    def partitioned(self, *shape: int) -> tuple[Tensor, Layout]:
        """Numbers, and a layout that they get; every other time that of a plain tensor."""
        layout = self.layout(shape) if self.flag() else replicated(shape)
        return self.numbers(*shape), layout


Maker = Callable[[Source, Tensor], Step]


@st.composite
def programs(draw: Callable[..., Any], makers: Sequence[Maker], ndim: tuple[int, int] = (4, 4), length: int = 1) -> Any:
    """Programs of `length` operators at most, each made by one of the makers.

    Args:
        draw: hypothesis's function.
        makers: the makers of operators.
        ndim: the fewest and the most dims of the input.
        length: length of the longest program.
    """
    source = Source(draw, draw(st.sampled_from(GRIDS)))
    dims = source.integer(*ndim)
    shape = [source.integer(1, 4) for _ in range(dims - 2)] + [source.integer(1, 13) for _ in range(min(dims, 2))]
    layout = source.layout(shape)
    result, steps = numbers(*shape), list[Step]()
    for _ in range(source.integer(min(2, length), length)):
        maker = source.one(makers)
        if not isinstance(result, Tensor) or not applies(maker, result):
            continue
        step = maker(source, result)
        steps.append(step)
        try:
            result = step.call(result, lambda x, _: x)
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as error:
            return Program(source.grid, layout, tuple(shape), steps, error)
        if isinstance(result, Tensor) and result.numel() > 4000:
            break
    return Program(source.grid, layout, tuple(shape), steps, result)


def applies(maker: Maker, x: Tensor) -> bool:
    """Whether a maker has operators for tensors of this rank."""
    low, high = getattr(maker, "ndim", (0, 6))
    return bool(low <= x.ndim <= high and (math.prod(x.shape) > 0 or low == 0) and x.dtype == torch.float64)
