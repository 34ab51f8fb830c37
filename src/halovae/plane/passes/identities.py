"""Remove operators that change no value: `x / 1`, `x + 0`, and copies of maps that only change the memory layout."""

from __future__ import annotations

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import group_norms, operators, windows
from halovae.plane.live import root, same
from halovae.plane.passes.graphs import shared

aten = torch.ops.aten
_NEUTRAL = {aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.add.Tensor: 0, aten.sub.Tensor: 0}
# Operators whose result does not depend on a map's memory layout.
_AGNOSTIC = (
    aten.silu.default, aten.convolution.default, operators.convolution, group_norms.group_norm,
    group_norms.normalized_groups, group_norms.whole_group_norm, windows.convolution, windows.pointwise,
)  # fmt: skip


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many nodes were removed."""
    kept, gone = shared(graph), 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        x = node.args[0]
        neutral = node.target in _NEUTRAL and len(node.args) == 2 and not node.kwargs
        if neutral:
            neutral = not isinstance(node.args[1], fx.Node) and node.args[1] == _NEUTRAL[node.target]
        copied = node.target is aten.clone.default and all(user.target in _AGNOSTIC for user in node.users)
        if (neutral or copied) and same(node, x) and not {root(node), root(x)} & kept:
            node.replace_all_uses_with(x)
            graph.erase_node(node)
            gone += 1
    return gone
