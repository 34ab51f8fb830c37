"""Compute maps again where strips wait for each other, instead of keeping them.

All strips wait where an operator needs all rows, such as the statistics of GroupNorm, and what each keeps meanwhile
adds up to whole maps. This pass chooses what to keep by a minimum cut between what a strip could compute before it
waits and what it needs afterwards, and computes the rest again. After an upsampling, for example, the smaller map is
kept, and a residual block keeps its input instead of its input and an intermediate map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import networkx
import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import group_norms, operators, whole_maps
from halovae.plane.context import position_in
from halovae.plane.flops import flops
from halovae.plane.live import root, size_of
from halovae.plane.passes.graphs import writes
from halovae.plane.repeats import clean
from halovae.plane.strips import waits

aten = torch.ops.aten
# Results of these are kept: other strips take part in them, or they are tiny.
_KEPT = (
    group_norms.gather, group_norms.own_statistics, group_norms.combined, operators.take, operators.emit,
    operators.pack, whole_maps.hand, whole_maps.handed,
)  # fmt: skip
# While strips wait, they keep at most this share of the largest map, if that is possible at one of these prices. FLUX
# at 4096x4096, whose largest map takes 8 GiB in bf16, then keeps 4 GiB, and takes 1.23 times the operations.
_SHARE = 0.5
_PRICES = (64, 16, 4)
_MOST = 0.75  # of all operations are computed again


def recompute(graph: fx.Graph, bodies: dict[str, fx.Graph], mesh: Mesh) -> None:
    """Rewrite a strip's graphs, which read no memory that an operator writes to.

    Args:
        graph: the main graph.
        bodies: the graphs that it calls. Each is treated separately.
        mesh: the strips, and which one this is.
    """
    if any(map(writes, (graph, *bodies.values()))):
        return
    for one in (graph, *bodies.values()):
        _Recompute(one, mesh).run()
        clean(one)


class _Recompute:
    def __init__(self, graph: fx.Graph, mesh: Mesh) -> None:
        self._graph, self._mesh = graph, mesh
        maps = [node for node in graph.nodes if _is_map(node)]
        self._largest, self._work = max(map(size_of, maps), default=0), sum(map(flops, maps))

    def run(self) -> None:
        """Rewrite the graph at each wait where too much is kept."""
        places = [node for node in self._graph.nodes if waits(node)]
        enough, left = _SHARE * self._largest, _MOST * self._work
        for place, before in zip(places, [None, *places], strict=False):
            crossing = self._crossing(place)
            if _total(crossing) <= enough:
                continue
            for price in _PRICES:
                kept, again = self._cut(place, before, crossing, price)
                if _total(kept) <= enough:
                    break
            if _total(kept) < _total(crossing) and again <= left:
                self._rewrite(place, crossing, kept)
                left -= again

    def _crossing(self, place: fx.Node) -> list[fx.Node]:
        """What is read after a node of what was computed before it."""
        order = {node: at for at, node in enumerate(self._graph.nodes)}
        return [
            node for node in self._graph.nodes
            if order[node] < order[place] and _is_map(node) and any(order[user] > order[place] for user in node.users)
        ]  # fmt: skip

    def _cut(
        self, place: fx.Node, before: fx.Node | None, crossing: list[fx.Node], price: float
    ) -> tuple[set[fx.Node], float]:
        """Choose what to keep while a strip waits at a node.

        Args:
            place: where it waits.
            before: where it waited last: what it kept there is not computed from anything earlier.
            crossing: what is read after `place`.
            price: of all operators together, in largest maps that are not kept.

        Returns:
            What to keep, and the operations of computing the rest again.
        """
        per_flop = price * self._largest / self._work if self._work else 0.0
        order = {node: at for at, node in enumerate(self._graph.nodes)}
        start = -1 if before is None else order[before]
        flow = networkx.DiGraph()
        flow.add_node("needed")
        flow.add_node("given")
        for node in crossing:
            flow.add_edge("needed", (node, "out"))
        left, seen = list(crossing), set(crossing)
        while left:
            node = left.pop()
            flow.add_edge((node, "out"), (node, "in"), capacity=size_of(root(node)))
            if order[node] <= start or not _is_repeatable(node):
                flow.add_edge((node, "in"), "given")
                continue
            flow.add_edge((node, "in"), "given", capacity=int(per_flop * flops(node)))
            for one in filter(_is_map, node.all_input_nodes):
                flow.add_edge((node, "in"), (one, "out"))
                if one not in seen:
                    seen.add(one)
                    left.append(one)
        # Of equal cuts, networkx finds the one nearest to where the flow goes: the one that computes least again.
        _, (_, reached) = networkx.minimum_cut(flow.reverse(copy=False), "given", "needed")
        again = sum(flops(node) for node in seen if (node, "in") in reached)
        return {node for node in seen if (node, "out") in reached and (node, "in") not in reached}, again

    def _rewrite(self, place: fx.Node, crossing: list[fx.Node], kept: set[fx.Node]) -> None:
        order = {node: at for at, node in enumerate(self._graph.nodes)}
        here = order[place]
        copies: dict[fx.Node, fx.Node] = {}

        def later(node: fx.Node) -> list[fx.Node]:
            return [user for user in node.users if order.get(user, -1) > here]

        first = {node: min(later(node), key=order.__getitem__) for node in crossing}
        for node in sorted(crossing, key=lambda one: order[first[one]]):
            if node in kept:
                continue
            users = later(node)
            copy = self._copied(node, kept, copies, first[node])
            for user in users:
                user.replace_input_with(node, copy)

    def _copied(self, node: fx.Node, kept: set[fx.Node], copies: dict[fx.Node, fx.Node], before: fx.Node) -> fx.Node:
        """Return a node that computes the same from what is kept, inserted before another one."""
        pending = [node]
        while pending:
            (*_, one) = pending
            if one in copies or one in kept or not _is_map(one):
                pending.pop()
                continue
            missing = [
                source for source in one.all_input_nodes
                if _is_map(source) and source not in kept and source not in copies
            ]  # fmt: skip
            if missing:
                pending += missing
                continue
            pending.pop()

            def mapped(source: fx.Node) -> fx.Node:
                return copies.get(source, source)

            if one.target is operators.fetch:
                copies[one] = self._fetched(one, mapped, before)
                continue
            with self._graph.inserting_before(before):
                copies[one] = self._graph.node_copy(one, mapped)
            copies[one].meta = {**one.meta, "messages": 0, "sent": 0}
        return copies[node]

    def _fetched(self, node: fx.Node, mapped: Callable[[fx.Node], fx.Node], before: fx.Node) -> fx.Node:
        """Return a fetch's result without messages: rows of earlier strips are kept, this strip's computed again."""
        arguments: Any = node.args
        source, dim, mesh_dim, bounds, needed = arguments
        place = position_in(self._mesh, mesh_dim)
        ((start, stop),), first, last = needed[place], bounds[place], bounds[place + 1]
        parts = []
        for at, function, begin, end in (
            (node.next, None, start, min(first, stop)),
            (before, mapped, max(start, first), min(stop, last)),
        ):
            if end <= begin:
                continue
            whole, offset = (node, start) if function is None else (mapped(source), first)
            with self._graph.inserting_before(at):
                own = self._graph.call_function(aten.narrow.default, (whole, dim, begin - offset, end - begin))
                own.meta = _sized(node, dim, end - begin)
                if function is None:  # a view would keep the whole
                    own = self._graph.call_function(aten.clone.default, (own,))
                    own.meta = {**_sized(node, dim, end - begin), "line": True}
            parts.append(own)
        if len(parts) == 1:
            return parts[0]
        with self._graph.inserting_before(before):
            joined = self._graph.call_function(aten.cat.default, (parts, dim))
        joined.meta = {**node.meta, "messages": 0, "sent": 0}
        return joined


def _sized(node: fx.Node, dim: int, length: int) -> dict[str, Any]:
    shape = list(node.meta["shape"])
    shape[dim] = length
    size = math.prod(shape) * node.meta["dtype"].itemsize
    return {**node.meta, "shape": tuple(shape), "bytes": size, "messages": 0, "sent": 0}


def _is_map(node: fx.Node) -> bool:
    """Whether a node's result takes memory that a strip could free: it is neither a weight nor an input."""
    return node.op == "call_function" and size_of(root(node)) > 0 and root(node).op == "call_function"


def _is_repeatable(node: fx.Node) -> bool:
    """Whether an operator computes the same again, alone."""
    sources = node.all_input_nodes
    if node.target in _KEPT or root(node).target in _KEPT or not sources or sources[0].op == "call_module":
        return False
    if node.target is operators.fetch:
        arguments: Any = node.args
        _, _, _, bounds, needed = arguments
        intervals = [interval for one in needed for interval in one]
        inside = all(start < stop <= bounds[-1] for start, stop in intervals)
        return not waits(node) and inside and len(intervals) == len(needed)
    schema: Any = getattr(node.target, "_schema", None)
    return not (schema is not None and torch.Tag.nondeterministic_seeded in node.target.tags)  # type: ignore[union-attr]


def _total(nodes: Iterable[fx.Node]) -> int:
    return sum(map(size_of, {root(node) for node in nodes}))
