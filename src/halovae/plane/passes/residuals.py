"""A convolution's result is added to the residual where it is merged, on the CPU: one pass over both maps less."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.mesh import Mesh
from halovae.plane import windows
from halovae.plane.live import root, same
from halovae.plane.passes.graphs import only_user, replaced, shared
from halovae.plane.passes.in_place import is_own, last_uses

aten = torch.ops.aten


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Returns how many sums are part of a convolution; none on accelerators, whose convolutions only make maps."""
    if mesh.platform.kind != "cpu":
        return 0
    last, kept, found = last_uses(graph), shared(graph), 0
    for node in list(graph.nodes):
        if node.target not in (aten.add_.Tensor, aten.add.Tensor) or len(node.args) != 2 or node.kwargs:
            continue
        made = next((one for one in node.args if only_user(one, windows.convolution)), None)
        onto: Any = next((one for one in node.args if one is not made), None)
        if made is None or not isinstance(onto, fx.Node) or not same(onto, node) or not same(made, node):
            continue
        owner = root(node)
        free = is_own(onto) and root(onto) not in kept and last[root(onto)] is node
        if not (free or owner is root(onto)):  # where the sum is written there already, it was free before
            continue
        if not _follows(node, made, onto):
            continue
        replaced(node, windows.residual_convolution, (onto, *made.args), dict(made.kwargs), made)
        if owner is not root(onto):
            last[root(onto)] = last.pop(owner)
            if owner in kept:
                kept.add(root(onto))
        found += 1
    return found


def _follows(node: fx.Node, made: fx.Node, onto: fx.Node) -> bool:
    """Whether a sum comes right after a convolution, but for views and weights, and both do not share memory."""
    between = made.next
    while between is not node:
        if between.op != "get_attr" and (root(between) is between or between is onto):
            return False
        between = between.next
    return root(onto) not in map(root, made.all_input_nodes)
