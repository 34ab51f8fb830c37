"""Fuse the sum with the residual into the norm and SiLU before the next convolution, which then read it only once.

A kernel adds the residual and the bias of the previous convolution, keeps the sum for the next residual, and normalizes
it, or counts its statistics, in the same pass over memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from halovae.distributed.mesh import Mesh
from halovae.plane import backends, windows
from halovae.plane.live import root
from halovae.plane.passes.graphs import inserted
from halovae.plane.rules.registry import returns_view

aten = torch.ops.aten


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many sums were fused; none where no kernel can add them."""
    if backends.kernels(mesh.device.kind) is None:
        return 0
    changes = 0
    for node in list(graph.nodes):
        if node.target is not windows.convolution or not node.kwargs.keys() & {"norm", "silu"}:
            continue
        given: Any = node.args[0]
        squeezed = given if given.target is aten.squeeze.dims and len(given.users) == 1 else None
        total = given if squeezed is None else given.args[0]
        if total.target is not windows.added_ or "found" in node.kwargs or "shift" in node.kwargs:
            continue
        if not _is_next(node, total):
            continue
        x, plus, bias = total.args
        if squeezed is not None:
            dims, shape = squeezed.args[1], squeezed.meta["shape"]
            first, second = (inserted(node, aten.squeeze.dims, (one, dims), shape) for one in (x, plus))
        else:
            first, second = x, plus
        node.args = (first, *node.args[1:])
        node.kwargs = {**node.kwargs, "shift": bias, "plus": second}
        if squeezed is not None:
            graph.erase_node(squeezed)
        total.replace_all_uses_with(x)
        graph.erase_node(total)
        changes += 1
    return changes


def _is_next(node: fx.Node, total: fx.Node) -> bool:
    """Whether nothing between a sum and the convolution that reads it uses the sum's memory, or its terms'.

    Nor may the convolution itself read them in another way: it would do so before they are summed.
    """
    memories = {root(one) for one in total.all_input_nodes}
    if sum(root(one) in memories for one in node.all_input_nodes) > 1:
        return False
    between = total.next
    while between is not node:
        views = isinstance(between.target, OpOverload) and returns_view(between.target)
        if not views and any(root(one) in memories for one in between.all_input_nodes):
            return False
        between = between.next
    return True
