"""Strips: one device computes a plane part by part, exactly, and repeats nothing.

Strips are ranks that run one after the other. Each computes what the rows up to its end determine, so it needs rows of
earlier strips only, which these leave as messages. A convolution of 3 x 3 determines one row less than it is given:
bounds move up from layer to layer, and the last strip catches up. Operators that need all rows at once, such as
attention and GroupNorm, let each strip wait for the others there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from halovae.plane import group_norms, operators
from halovae.plane.layout import Bounds, Factor, MeshDim, partitioned, proper
from halovae.plane.live import size_of
from halovae.plane.program import Program
from halovae.plane.tensor import PlaneTensor

if TYPE_CHECKING:
    from halovae.plane.plane import Plane


_LEAST = 4  # rows of a map with which strips begin: its edge can be padded without those of later strips


class NarrowStripError(ValueError):
    """A strip would have no row of a map."""


@dataclass(frozen=True)
class Strips:
    """How maps are cut.

    Attributes:
        mesh_dim: what is cut, rows or cols.
        bounds: strip i has `bounds[i]:bounds[i + 1]` of the input.
        whole: the paths of submodules whose maps stay whole: the first strip computes them for all.
        last: those of them after which maps are cut.
        early: whether rows of earlier strips are carried as early as possible; see `lines`.
        recompute: whether maps are computed again that would be kept where strips wait; see `recompute`.
        empty: whether a strip may have no row of a map. The first strips then have none of the last maps, and the last
            strips none of the first.
        collected: the paths of submodules whose inputs the last strip collects; see `collected`.
    """

    mesh_dim: MeshDim
    bounds: Bounds
    whole: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    early: bool = True
    recompute: bool = False
    empty: bool = False
    collected: tuple[str, ...] = ()

    def input_factor(self, size: int) -> Factor:
        """The factor of a new map."""
        return Factor(size) if self.whole else self._scaled(size)

    def output_factor(self, before: Factor, size: int, complete: Callable[[int], int], path: str) -> Factor:
        """Return the factor of an operator's result: up to the rows that each strip's input determines.

        Args:
            before: the input's factor.
            size: the extent of the result.
            complete: how many rows of the result depend on nothing beyond a bound of the input.
            path: the path of the submodule that calls the operator.

        Raises:
            NarrowStripError: a strip would have no row.
        """
        if before.mesh_dim is None:
            return Factor(size) if self.collected or self._is_whole(path) else self._scaled(size)
        if self.empty:
            ends = (min(complete(end), size) for end in self._continued(before))
            bounds = (0, *(end if end == size or end >= _LEAST else 0 for end in ends), size)
        else:
            bounds = (0, *map(complete, before.bounds[1:-1]), size)
        if size == 1 or not proper(bounds, size, self.empty):
            raise NarrowStripError(f"strips at {bounds} of {size} {self.mesh_dim}: expected one in each")
        return Factor(size, self.mesh_dim, bounds)

    def _continued(self, factor: Factor) -> list[int]:
        """The bounds between strips as if a map did not end: strips after its last row go on to lag in later maps."""
        ends = list(factor.bounds[1:-1])
        inside = [place for place, end in enumerate(ends) if end < factor.size]
        last = inside[-1] if inside else -1
        step = round(self.bounds[1] * factor.size / self.bounds[-1])
        start = ends[last] if inside else 0
        return [*ends[: last + 1], *(start + step * (place - last) for place in range(last + 1, len(ends)))]

    def _is_whole(self, path: str) -> bool:
        return path in self.whole or any(path.startswith(f"{one}.") for one in self.last)

    def cut(self, plane: Plane, result: Any, path: str) -> Any:
        """Return a submodule's result, cut into strips if its submodule is the last whole one and it is a map."""
        if path not in self.last or not isinstance(result, PlaneTensor) or result.ndim not in (4, 5):
            return result
        dim = result.ndim - (2 if self.mesh_dim == "rows" else 1)
        factor = self._scaled(result.shape[dim])
        if any(True for _ in partitioned(result.partition)) or factor.mesh_dim is None:
            return result
        with plane.working():
            return plane.to_layout(result, (*result.partition[:dim], (factor,), *result.partition[dim + 1 :]))

    def collect(self, plane: Plane, inputs: tuple[Any, ...], path: str) -> tuple[Any, ...]:
        """Return a submodule's inputs, with all rows on the last strip, if its path is one of `collected`."""
        if path not in self.collected:
            return inputs
        with plane.working():
            return tuple(plane.collected(one) if isinstance(one, PlaneTensor) else one for one in inputs)

    def _scaled(self, size: int) -> Factor:
        given = self.bounds[-1]
        bounds = tuple(round(bound * size / given) for bound in self.bounds)
        if size == 1 or not proper(bounds, size, self.empty):
            return Factor(size)
        return Factor(size, self.mesh_dim, bounds)


def waits(node: fx.Node) -> bool:
    """Whether a strip waits at a node for later strips."""
    if node.target is group_norms.gather:
        return True
    if node.target is not operators.fetch:
        return False
    _, _, _, bounds, needed = node.args
    ends = zip(bounds[1:], needed, strict=True)  # type: ignore[index, arg-type]
    return any(stop > end and end < bounds[-1] for end, intervals in ends for _, stop in intervals)  # type: ignore[index]


def _early_waits(program: Program, share: float) -> set[fx.Node]:
    """The nodes that wait before any map that is larger than a share of the largest one."""
    graphs = (program.graph, *program.bodies.values())
    limit = share * max((size_of(node) for graph in graphs for node in graph.nodes if node.op != "get_attr"), default=0)
    found = set[fx.Node]()
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "call_function" and size_of(node) > limit and not waits(node):
                break
            if waits(node):
                found.add(node)
    return found


def where_whole(program: Program, share: float = 1.0) -> tuple[frozenset[str], frozenset[str]]:
    """Find what is computed before the last node that waits while maps are still small.

    Args:
        program: of a strip, recorded without passes.
        share: maps of at most this share of the largest one are small.

    Returns:
        The paths of the submodules whose results reach such a node, and of those that wait last.
    """
    early = _early_waits(program, share)
    inputs: dict[str, set[int]] = {}  # of called graphs: those that reach such a node
    before, last = set[str](), set[str]()
    for name, graph in (*program.bodies.items(), ("", program.graph)):
        reaching: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            path = str(node.meta.get("module") or "")
            reached = any(user in reaching for user in node.users)
            for box in (user for user in node.users if user.target is operators.pack):
                places = {at for at, one in enumerate(box.args) if one is node}
                reached = reached or any(places & inputs[str(call.target)] for call in box.users)
            if node in early and not reached and path:
                last.add(path)
            if node.target is not operators.pack and (reached or node in early):
                reaching.add(node)
                before.add(path)
        inputs[name] = {int(node.args[1]) for node in reaching if node.target is operators.take}  # type: ignore[arg-type]
    return frozenset(before), frozenset(last)
