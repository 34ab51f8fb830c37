"""What is done to the recorded graphs of a strip, before passes improve them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import operators
from halovae.plane.collected import without_unused
from halovae.plane.lines import carry_early
from halovae.plane.live import is_operator
from halovae.plane.recompute import recompute
from halovae.plane.repeats import clean
from halovae.plane.strips import Strips


def rewrite(graph: fx.Graph, bodies: dict[str, fx.Graph], mesh: Mesh, strips: Strips, device: torch.device) -> None:
    """Rewrite a strip's graphs.

    Args:
        graph: the main graph.
        bodies: the graphs that it calls.
        mesh: the strips, and which one this is.
        strips: how they cut maps.
        device: where they will run.

    Raises:
        NarrowStripError: strips would receive maps without values.
    """
    if strips.early:
        carry_early(graph, bodies, mesh)
    if strips.recompute:
        recompute(graph, bodies, mesh)
    without_unused(graph, bodies, device)
    for one in (graph, *bodies.values()):
        _name_lines(one)
        _without_empty_maps(one, device)


def _name_lines(graph: fx.Graph) -> None:
    """Note which operator made the map that a line belongs to, as `of`; an empty text if the strip has none of it."""
    for node in graph.nodes:
        if node.target is operators.fetch:
            source = node.args[0]
            node.meta["of"] = "" if 0 in source.meta["shape"] else f"{source.target}, {node.args[1]}"


def _without_empty_maps(graph: fx.Graph, device: torch.device) -> None:
    """Make maps without rows directly, and not by the operators that would compute them: many of these refuse to."""
    for node in list(graph.nodes):
        shape: Any = node.meta.get("shape", ())
        if 0 not in shape or not is_operator(node) or node.target in operators.BETWEEN_RANKS:
            continue
        with graph.inserting_before(node):
            blank = graph.call_function(
                torch.ops.aten.empty.memory_format, (shape,), {"dtype": node.meta["dtype"], "device": device}
            )
        blank.meta = {**node.meta, "messages": 0, "sent": 0}
        node.replace_all_uses_with(blank)
        graph.erase_node(node)
    clean(graph)
