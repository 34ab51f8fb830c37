"""Maps that the last strip collects: what needs all rows at the end of a function, it computes for all strips.

An encoder's middle block needs all rows, and comes when maps are small. If every strip waited there for the others, all
of them would keep their temporal caches meanwhile. So each leaves its rows of the block's input for the last strip. The
others go on with a map without values, and what would be computed from it is removed from their graphs.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from halovae.plane import operators, whole_maps
from halovae.plane.live import is_operator, size_of
from halovae.plane.operators import emit, pack, take
from halovae.plane.program import Program
from halovae.plane.repeats import clean
from halovae.plane.strips import NarrowStripError, waits

_SMALL = 1 / 8  # of the largest map: the last strip holds whole maps of this size


def where_collected(program: Program) -> tuple[str, ...]:
    """Find the submodules whose inputs the last strip collects.

    Args:
        program: of a strip, recorded without passes.

    Returns:
        The paths of those in which strips would wait, if all maps are small from there on; else none.
    """
    nodes = [node for graph in (program.graph, *program.bodies.values()) for node in graph.nodes]
    waiting = {node for node in nodes if waits(node)}
    later = _depending(program.graph, program.bodies, waiting)
    limit = _SMALL * max(map(size_of, nodes))
    if any(size_of(node) > limit for node in later):
        return ()
    first = [node for node in waiting if not any(value in later for value in node.all_input_nodes)]
    found = sorted({str(node.meta.get("module") or "") for node in first})
    return () if "" in found else tuple(found)


def without_unused(graph: fx.Graph, bodies: dict[str, fx.Graph], device: torch.device) -> None:
    """Remove what a strip would compute from maps without values, which are marked as `unused`.

    Args:
        graph: the main graph of a strip.
        bodies: the graphs that it calls.
        device: where they will run.

    Raises:
        NarrowStripError: other strips would receive such values.
    """
    marked = {node for one in (graph, *bodies.values()) for node in one.nodes if node.meta.get("unused")}
    if not marked:
        return
    unused = _depending(graph, bodies, marked)
    for one in (graph, *bodies.values()):
        for node in list(one.nodes):
            if node in unused and node.target in (*operators.BETWEEN_RANKS, whole_maps.part):
                raise NarrowStripError("a map that the last strip collects is cut again")
            if node.target is pack:  # temporal caches
                _replace(node, [value for value in node.args if value in unused], (0,), device)
            elif node.op == "output" or node.target is emit:
                _replace(node, [value for value in node.all_input_nodes if value in unused], None, device)
    for one in (graph, *bodies.values()):
        clean(one)


def _depending(graph: fx.Graph, bodies: dict[str, fx.Graph], marked: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on marked ones, and these."""
    found = set(marked)
    count = -1
    while count != len(found):
        count = len(found)
        for one in (graph, *bodies.values()):
            for node in one.nodes:
                if node.target is operator.getitem and node.args[0].op == "call_module":
                    outputs: Any = next(iter(reversed(bodies[str(node.args[0].target)].nodes))).args[0]
                    given = outputs[node.args[1]] in found
                elif is_operator(node):
                    given = any(value in found for value in node.all_input_nodes)
                else:
                    given = False
                if given:
                    found.add(node)
                if node.op == "call_module":
                    box: Any = node.args[0]
                    places = {place for place, value in enumerate(box.args) if value in found}
                    found |= {at for at in bodies[str(node.target)].nodes if at.target is take and at.args[1] in places}
    return found


def _replace(node: fx.Node, values: list[Any], shape: tuple[int, ...] | None, device: torch.device) -> None:
    """Give a node maps without values in place of `values`, of their own shapes or another one."""
    for value in values:
        sizes = tuple(value.meta["shape"]) if shape is None else shape
        with node.graph.inserting_before(node):
            blank = node.graph.call_function(
                torch.ops.aten.empty.memory_format, (sizes,), {"dtype": value.meta["dtype"], "device": device}
            )
        size = torch.Size(sizes).numel() * value.meta["dtype"].itemsize
        blank.meta = {**value.meta, "shape": sizes, "bytes": size, "messages": 0, "sent": 0, "unused": False}
        node.replace_input_with(value, blank)
