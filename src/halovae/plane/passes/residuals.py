"""A convolution's result is added to the residual where it is merged, on the CPU: one pass over both maps less."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from halovae.distributed.mesh import Mesh
from halovae.plane import windows
from halovae.plane.live import root, same
from halovae.plane.passes.graphs import only_user, replaced, shared
from halovae.plane.passes.in_place import is_own, last_uses
from halovae.plane.rules.registry import returns_view

aten = torch.ops.aten


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Returns how many sums are part of a convolution; none on accelerators, whose convolutions only make maps."""
    if mesh.device.kind != "cpu":
        return 0
    last, kept, found = last_uses(graph), shared(graph), 0
    for node in list(graph.nodes):
        if node.target not in (aten.add_.Tensor, aten.add.Tensor) or len(node.args) != 2 or node.kwargs:
            continue
        made: Any = next((one for one in node.args if _comes_right_after(node, one)), None)
        onto: Any = next((one for one in node.args if one is not made), None)
        if made is None or not isinstance(onto, fx.Node) or not same(onto, node) or not same(made, node):
            continue
        owner = root(node)
        free = is_own(onto) and root(onto) not in kept and last[root(onto)] is node
        if not (free or owner is root(onto)):  # where the sum is written there already, it was free before
            continue
        if root(onto) in map(root, made.all_input_nodes):
            continue
        replaced(node, windows.residual_convolution, (onto, *made.args), dict(made.kwargs), made)
        if owner is not root(onto):
            last[root(onto)] = last.pop(owner)
            if owner in kept:
                kept.add(root(onto))
        found += 1
    return found


def _comes_right_after(node: fx.Node, made: Any) -> bool:
    """Whether nothing is computed between a convolution and the sum that takes its result: views and weights aside."""
    if not only_user(made, windows.convolution):
        return False
    between = made.next
    while between is not node and _computes_nothing(between):
        between = between.next
    return between is node


def _computes_nothing(node: fx.Node) -> bool:
    return node.op == "get_attr" or (isinstance(node.target, OpOverload) and returns_view(node.target))
