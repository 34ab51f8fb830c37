"""Swap terms of sums to make them channels last.

A sum has the memory layout of its first term. That should be a convolution's result, not an attention's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import operators, windows
from halovae.plane.live import same

aten = torch.ops.aten
_CONVOLUTIONS = (
    aten.convolution.default, operators.convolution, windows.convolution, windows.pointwise,
    windows.upsampled_convolution,
)  # fmt: skip


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many sums were swapped."""
    changes, last = 0, set[fx.Node]()
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.meta.get("shape"), tuple):
            continue
        first: Any = node.args[0] if node.args else None
        if node.target in _CONVOLUTIONS:
            last.add(node)
        elif node.target is aten.add.Tensor and isinstance(node.args[1], fx.Node) and not node.kwargs:
            second: fx.Node = node.args[1]
            if second in last and isinstance(first, fx.Node) and first not in last and same(first, second):
                node.args = (second, first)
                changes += 1
            if second in last or first in last:
                last.add(node)
        elif isinstance(first, fx.Node) and first in last and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            last.add(node)
    return changes
