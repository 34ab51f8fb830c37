"""Lines: the rows that a strip leaves for the next one, carried as early as possible.

A convolution is recorded with the fetch of the rows before its input. If norms, activations, or a concatenation with
earlier frames come before it, this pass fetches rows of the map that these start from, and applies them to these rows,
too. One line then serves a residual block's convolution and its late sum. Frames that are kept for the next chunk keep
the rows before them, so that these are carried once and not with every chunk.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from halovae.distributed.mesh import Mesh
from halovae.plane import context, operators
from halovae.plane.layout import MeshDim
from halovae.plane.operators import take
from halovae.plane.passes.graphs import writes
from halovae.plane.repeats import clean

aten = torch.ops.aten
_NEAREST = (aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default)
_OVER_DIMS = (aten.linalg_vector_norm.default, aten.mean.dim, aten.sum.dim_IntList)


@dataclass(frozen=True)
class Rows:
    """The rows (or cols) of a map that a strip needs.

    Attributes:
        dim: their dim.
        mesh_dim: rows or cols.
        bounds: what strips own.
        needed: what each needs, in one interval.
        place: which strip this is.
    """

    dim: int
    mesh_dim: MeshDim
    bounds: tuple[int, ...]
    needed: operators.Needed
    place: int

    @property
    def own(self) -> int:
        """How many this strip owns."""
        return self.bounds[self.place + 1] - self.bounds[self.place]

    @property
    def first(self) -> int:
        """How many it needs of earlier strips."""
        return self.bounds[self.place] - self.needed[self.place][0][0]

    @property
    def length(self) -> int:
        """How many it needs."""
        start, stop = self.needed[self.place][0]
        return stop - start

    @property
    def start(self) -> int:
        """The first one that it needs."""
        return self.needed[self.place][0][0]

    @property
    def has_own(self) -> bool:
        """Whether all that strips own are needed, and none of later strips."""
        each = zip(self.needed, self.bounds[:-1], self.bounds[1:], strict=True)
        return all(start <= first and stop == last for ((start, stop),), first, last in each)

    def holds(self, others: Rows) -> bool:
        """Whether every strip has these rows, too."""
        pairs = zip(self.needed, others.needed, strict=True)
        same = (self.dim, self.bounds) == (others.dim, others.bounds)
        return same and all(a <= start and stop <= b for ((a, b),), ((start, stop),) in pairs)

    def at(self, dim: int) -> Rows:
        """The same rows of a map that has them along another dim."""
        return replace(self, dim=dim)

    def without(self, behind: int) -> Rows | None:
        """The rows before a map was padded at its end; None if strips other than the one that pads need the padding."""
        size = self.bounds[-1] - behind
        spans = zip(self.needed, self.bounds[:-1], self.bounds[1:], strict=True)
        if any(stop > size and start == end for ((_, stop),), start, end in spans):
            return None
        needed = tuple(((start, min(stop, size)),) for ((start, stop),) in self.needed)
        return replace(self, bounds=tuple(min(bound, size) for bound in self.bounds), needed=needed)

    def divided(self, factor: int) -> Rows | None:
        """The rows of which each becomes `factor`; None if bounds lie between them."""
        ends = [*self.bounds, *(end for one in self.needed for interval in one for end in interval)]
        if any(end % factor for end in ends):
            return None
        needed = tuple(tuple((a // factor, b // factor) for a, b in one) for one in self.needed)
        return Rows(self.dim, self.mesh_dim, tuple(bound // factor for bound in self.bounds), needed, self.place)


@dataclass
class _Step:
    """An operator that treats rows separately: its inputs with their rows, and how to call it on more rows."""

    inputs: list[tuple[fx.Node, Rows]]
    arguments: Callable[[Callable[[fx.Node], fx.Node]], tuple[tuple[Any, ...], dict[str, Any]]]
    joins: bool = False


def carry_early(graph: fx.Graph, bodies: dict[str, fx.Graph], mesh: Mesh) -> None:
    """Rewrite a strip's graphs.

    Args:
        graph: the main graph.
        bodies: the graphs that it calls.
        mesh: the strips, and which one this is.
    """
    if not any(map(writes, (graph, *bodies.values()))):  # a copy of a map does not see what is written to the map
        _Lines(graph, bodies, mesh).run()


class _Lines:
    def __init__(self, graph: fx.Graph, bodies: dict[str, fx.Graph], mesh: Mesh) -> None:
        self._bodies, self._mesh = bodies, mesh
        self._graphs = [graph, *bodies.values()]
        self._calls = {
            id(body): [node for node in graph.nodes if node.op == "call_module" and node.target == name]
            for name, body in bodies.items()
        }
        self._roots: set[tuple[fx.Node, Rows]] = set()  # maps whose rows are fetched
        self._kept: dict[fx.Node, Rows] = {}  # inputs of called graphs that come with more rows
        self._built: dict[tuple[fx.Node, Rows], fx.Node] = {}

    def run(self) -> None:
        """Rewrite the graphs."""
        fetches = {
            node: rows for one in self._graphs for node in one.nodes
            if node.target is operators.fetch and (rows := self._rows_of(node)) is not None
        }  # fmt: skip
        early = {node: rows for node, rows in fetches.items() if rows.has_own}
        for node, rows in early.items():
            for source, at in self._sources(node.args[0], rows):
                if source.target is not take or self._kept.setdefault(source, at) != at:
                    self._roots.add((source, at))
        self._settle()
        packed = [
            (call.args[0], one, rows) for one, rows in self._kept.items() for call in self._calls[id(one.graph)]
        ]  # fmt: skip
        given: list[Any] = [(box, one.args[1], box.args[one.args[1]], rows) for box, one, rows in packed]
        outputs = {(self._called(node), int(node.args[1])): rows for _, _, node, rows in given if _is_result(node)}
        results = [
            (node, rows) for (body, index), rows in outputs.items() for call in self._calls[id(body)]
            for node in call.users if node.args[1] == index
        ]  # fmt: skip
        for node, rows in (*self._kept.items(), *results):
            self._widen(node, rows)
        for node, rows in early.items():
            found = self._more(node.args[0], rows)
            self._roots |= {(found, others) for source, others in self._roots if source is node}
            node.replace_all_uses_with(found)
            node.graph.erase_node(node)
        for (body, index), rows in outputs.items():
            output = next(iter(reversed(body.nodes)))
            values: Any = output.args[0]
            wider = self._more(values[index], rows)
            output.args = ((*values[:index], wider, *values[index + 1 :]),)
        for box, index, node, rows in given:
            box.args = (*box.args[:index], self._more(node, rows), *box.args[index + 1 :])
        self._read_fetched({node: rows for node, rows in fetches.items() if not rows.has_own})
        for graph in self._graphs:
            clean(graph)

    def _rows_of(self, node: fx.Node) -> Rows | None:
        """The rows that a fetch brings; None if some lie outside of the map."""
        arguments: Any = node.args
        _, dim, mesh_dim, bounds, needed = arguments
        if any(len(one) != 1 or one[0][0] < 0 or one[0][1] > bounds[-1] for one in needed):
            return None
        return Rows(dim, mesh_dim, bounds, needed, context.position_in(self._mesh, mesh_dim))

    def _sources(self, node: Any, rows: Rows) -> list[tuple[fx.Node, Rows]]:
        """The maps that a map is computed from row by row, each with the rows that are needed of it."""
        step = _step(node, rows)
        if step is None:
            return [(node, rows)]
        found: list[tuple[fx.Node, Rows]] = []
        for one, at in step.inputs:
            found += [source for source in self._sources(one, at) if source not in found]
        return found if step.joins or len(step.inputs) == 1 or len(found) == 1 else [(node, rows)]

    def _settle(self) -> None:
        """Keep of `_kept` only inputs whose rows before are known wherever the graph is called."""
        while True:
            demanded: dict[Any, Rows] = {}
            failing = []
            for one, rows in self._kept.items():
                boxes: list[Any] = [call.args[0] for call in self._calls[id(one.graph)]]
                values = [box.args[one.args[1]] for box in boxes]
                results = [(id(self._called(value)), value.args[1]) for value in values if _is_result(value)]
                known = all(self._is_known(value, rows) for value in values)
                if not known or any(demanded.setdefault(result, rows) != rows for result in results):
                    failing.append(one)
            if not failing:
                return
            for one in failing:
                self._roots.add((one, self._kept.pop(one)))

    def _is_known(self, node: fx.Node, rows: Rows) -> bool:
        """Whether a map's rows before are fetched or kept anyway."""
        if (node, rows) in self._roots or self._kept.get(node) == rows:
            return True
        if _is_result(node):
            output: Any = next(iter(reversed(self._called(node).nodes)))
            return self._is_known(output.args[0][node.args[1]], rows)
        step = _step(node, rows)
        return step is not None and bool(step.inputs) and all(self._is_known(one, at) for one, at in step.inputs)

    def _called(self, item: fx.Node) -> fx.Graph:
        """The graph whose result a node is."""
        call: Any = item.args[0]
        return self._bodies[str(call.target)]

    def _widen(self, node: fx.Node, rows: Rows) -> None:
        """Let an input or result of a called graph have the rows before. Its other users get its own rows."""
        with node.graph.inserting_after(node):
            own = node.graph.call_function(aten.narrow.default, (node, rows.dim, rows.first, rows.own))
        own.meta = {**node.meta, "messages": 0, "sent": 0}
        node.replace_all_uses_with(own, lambda user: user is not own)
        node.meta = _sized(node, rows)
        self._built[node, rows] = self._built[own, rows] = node

    def _more(self, node: Any, rows: Rows) -> fx.Node:
        """Return a map with the rows before."""
        key = node, rows
        if key in self._built:
            return self._built[key]
        if key in self._roots:
            with node.graph.inserting_after(node):
                made = self._fetched(node, rows)
        else:
            step = _step(node, rows)
            assert step is not None
            inputs = dict(step.inputs)
            args, kwargs = step.arguments(lambda one: self._more(one, inputs[one]) if one in inputs else one)
            with node.graph.inserting_after(node):
                made = node.graph.call_function(node.target, args, kwargs)
            made.meta = {**_sized(node, rows), "messages": 0, "sent": 0}
        self._built[key] = made
        return made

    def _fetched(self, node: fx.Node, rows: Rows) -> fx.Node:
        arguments = rows.dim, rows.mesh_dim, rows.bounds, rows.needed
        made = node.graph.call_function(operators.fetch, (node, *arguments))
        with _disable_current_modes():
            blank = torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device="meta")
            _, messages, sent = operators.fetched_shape(self._mesh, blank, *arguments)
        # Nobody else reads it. (Between ranks that run at once, passes must not change the order of messages.)
        made.meta = {**_sized(node, rows), "messages": messages, "sent": sent, "line": True}
        return made

    def _read_fetched(self, others: dict[fx.Node, Rows]) -> None:
        """Let all users of a map read the copy that has the rows before, so that the map is freed."""
        for (node, rows), made in self._built.items():
            if made.target is not operators.fetch or made.args[0] is not node:
                continue
            for user in list(node.users):
                if (at := others.get(user)) is not None and rows.holds(at):
                    self._read(made, rows.dim, at.start - rows.start, at.length, user)
            if users := [user for user in node.users if user is not made]:
                with node.graph.inserting_after(made):
                    own = node.graph.call_function(aten.narrow.default, (made, rows.dim, rows.first, rows.own))
                own.meta = {**node.meta, "messages": 0, "sent": 0}
                node.replace_all_uses_with(own, set(users).__contains__)

    @staticmethod
    def _read(made: fx.Node, dim: int, first: int, length: int, fetch: fx.Node) -> None:
        with fetch.graph.inserting_before(fetch):
            part = fetch.graph.call_function(aten.narrow.default, (made, dim, first, length))
        part.meta = {**fetch.meta, "messages": 0, "sent": 0}
        fetch.replace_all_uses_with(part)
        fetch.graph.erase_node(fetch)


def _is_result(node: fx.Node) -> bool:
    """Whether a node is a result of a called graph."""
    source: Any = node.args[0] if node.args else None
    return node.target is operator.getitem and source.op == "call_module"


def _sized(node: fx.Node, rows: Rows) -> dict[str, Any]:
    """A node's meta for as many rows as are needed."""
    shape = [*node.meta["shape"]]
    shape[rows.dim] = rows.length
    return {**node.meta, "shape": tuple(shape), "bytes": math.prod(shape) * node.meta["dtype"].itemsize}


def _step(node: fx.Node, rows: Rows) -> _Step | None:
    """How to compute a map's rows from the same rows of its inputs; None if there is no such way."""
    target: Any = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    if behind := dict(node.meta.get("behind", ())).get(rows.dim):
        return _padded_behind(node, rows.without(behind))
    if torch.Tag.pointwise in target.tags or target in (aten._to_copy.default, aten.clone.default):
        return _pointwise(node, rows)
    arguments: Any = node.args
    if not arguments:
        return None
    x, *rest = arguments
    if target is aten.cat.default:
        ndim = len(node.meta["shape"])
        if (rest[0] if rest else 0) % ndim == rows.dim:
            return None
        return _Step([(one, rows) for one in x], lambda more: (([more(one) for one in x], *rest), node.kwargs), True)
    if not isinstance(x, fx.Node):
        return None
    before, after = x.meta["shape"], node.meta["shape"]
    source = _source_dim(target, rest, before, after, rows.dim)
    at: Rows | None = rows
    if target in _NEAREST and rows.dim >= len(after) - 2:
        source, given = rows.dim, node.meta.get("times")
        factor = given[rows.dim - len(after)] if given else after[rows.dim] // before[rows.dim]
        at = rows.divided(factor) if factor * before[rows.dim] == after[rows.dim] else None
    if source is None or at is None or before[source] != at.own:
        return None
    if target in (aten.reshape.default, aten.expand.default, *_NEAREST):
        place = rows.dim - len(after) + len(rest[0])
        sizes = [rows.length if index == place else size for index, size in enumerate(rest[0])]
        return _Step([(x, at.at(source))], lambda more: ((more(x), sizes, *rest[1:]), node.kwargs))
    return _Step([(x, at.at(source))], lambda more: ((more(x), *rest), node.kwargs))


def _padded_behind(node: fx.Node, rows: Rows | None) -> _Step | None:
    """Padding at the end of a map: rows before a strip stay what they are."""
    if rows is None:
        return None
    return _Step([(node.all_input_nodes[0], rows)], lambda more: fx.node.map_arg((node.args, node.kwargs), more))


def _pointwise(node: fx.Node, rows: Rows) -> _Step | None:
    shape = node.meta["shape"]
    inputs = []
    for one in node.all_input_nodes:
        dim = rows.dim - len(shape) + len(one.meta["shape"])
        size = one.meta["shape"][dim] if dim >= 0 else 1
        if size == shape[rows.dim] and one.op != "get_attr":
            inputs.append((one, rows.at(dim)))
        elif size != 1:
            return None
    if not inputs:
        return None
    return _Step(inputs, lambda more: fx.node.map_arg((node.args, node.kwargs), more))


def _source_dim(target: Any, rest: list[Any], before: Sequence[int], after: Sequence[int], dim: int) -> int | None:
    """Which dim of an operator's input is the dim `dim` of its result; None if rows depend on other rows."""
    ndim = len(before)
    if target in _OVER_DIMS:
        dims, keep = (
            (rest[1:3] if target is aten.linalg_vector_norm.default else rest[:2]) if len(rest) > 1 else (None, 0)
        )
        return dim if dims and keep and dim not in {one % ndim for one in dims} else None
    if target is aten.expand.default:
        return dim - len(after) + ndim if dim >= len(after) - ndim else None
    if target is aten.constant_pad_nd.default:
        widths = rest[0][2 * (ndim - 1 - dim) :][:2]
        return None if any(widths) else dim
    if target in (aten.slice.Tensor, aten.narrow.default):
        return dim if rest and rest[0] % ndim != dim else None
    if target is aten.select.int:
        return dim + (dim >= rest[0] % ndim) if rest[0] % ndim != dim + (dim >= rest[0] % ndim) else None
    if target is aten.permute.default:
        return int(rest[0][dim]) % ndim
    if target is aten.unsqueeze.default:
        place = rest[0] % (ndim + 1)
        return None if dim == place else dim - (dim > place)
    if target is aten.squeeze.dims:
        left = [at for at in range(ndim) if before[at] != 1 or at not in {one % ndim for one in rest[0]}]
        return left[dim]
    if target is aten.reshape.default:
        ahead, behind = math.prod(after[:dim]), math.prod(after[dim + 1 :])
        places = [at for at in range(ndim) if before[at] == after[dim] and math.prod(before[at + 1 :]) == behind]
        return next((at for at in places if math.prod(before[:at]) == ahead), None)
    return None
