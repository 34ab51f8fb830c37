"""Let a convolution add its result to the residual, on the CPU: this saves one pass over both maps."""

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
    """Return how many sums were fused; none on accelerators, whose convolutions cannot add to a map."""
    if mesh.device.kind != "cpu":
        return 0
    last, kept, changes = last_uses(graph), shared(graph), 0
    for node in list(graph.nodes):
        if node.target not in (aten.add_.Tensor, aten.add.Tensor) or len(node.args) != 2 or node.kwargs:
            continue
        result: Any = next((term for term in node.args if _comes_right_after(node, term)), None)
        onto: Any = next((term for term in node.args if term is not result), None)
        if result is None or not isinstance(onto, fx.Node) or not same(onto, node) or not same(result, node):
            continue
        owner = root(node)
        free = is_own(onto) and root(onto) not in kept and last[root(onto)] is node
        if not (free or owner is root(onto)):  # if the sum is already in place, `onto` was free
            continue
        if root(onto) in map(root, result.all_input_nodes):
            continue
        replaced(node, windows.residual_convolution, (onto, *result.args), dict(result.kwargs), result)
        if owner is not root(onto):
            last[root(onto)] = last.pop(owner)
            if owner in kept:
                kept.add(root(onto))
        changes += 1
    return changes


def _comes_right_after(node: fx.Node, result: Any) -> bool:
    """Whether only views and weights are between a convolution and the sum that takes its result."""
    if not only_user(result, windows.convolution):
        return False
    between = result.next
    while between is not node and _computes_nothing(between):
        between = between.next
    return between is node


def _computes_nothing(node: fx.Node) -> bool:
    return node.op == "get_attr" or (isinstance(node.target, OpOverload) and returns_view(node.target))
