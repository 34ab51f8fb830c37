"""Let pointwise operators overwrite their first input after its last use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import group_norms, operators, windows
from halovae.plane.live import root, same, shares, size_of
from halovae.plane.passes.graphs import shared, uses

aten = torch.ops.aten
_OVERWRITING: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.silu.default: aten.silu_.default,
    windows.added: windows.added_,
}
# Operators that allocate memory for their result: it is not a view, and shares no memory with other tensors.
_ALLOCATING = (
    *_OVERWRITING, *_OVERWRITING.values(), aten.convolution.default, aten.constant_pad_nd.default,
    aten.upsample_nearest2d.default, operators.convolution, group_norms.group_norm, group_norms.normalized_groups,
    group_norms.whole_group_norm, windows.convolution, windows.copied, windows.normalized, windows.pointwise,
    windows.upsampled_convolution,
)  # fmt: skip


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many operators overwrite their input."""
    last, kept, changes = last_uses(graph), shared(graph), 0
    for node in list(graph.nodes):
        x: Any = node.args[0] if node.args else None
        if not isinstance(x, fx.Node) or last[root(x)] is not node or not is_own(x) or root(x) in kept:
            continue
        if node.target in (aten.add.Tensor, aten.mul.Tensor) and not node.kwargs and _is_better(node, last, kept):
            x, node.args = node.args[1], (node.args[1], x)
        if sum(root(argument) is root(x) for argument in uses(node)) > 1:
            continue  # it reads the memory that it would write to through another argument
        if node.target in (windows.convolution, windows.normalized):
            node.kwargs = {**node.kwargs, "spare": True}
        elif node.target in _OVERWRITING and same(node, x):
            node.target = _OVERWRITING[node.target]
        else:
            continue
        changes += 1
        if shares(node):  # its result is now in its input's memory
            owner = root(x)
            last[owner] = last.pop(node)
            if node in kept:
                kept.add(owner)
    return changes


def _is_better(node: fx.Node, last: dict[fx.Node, fx.Node], kept: set[fx.Node]) -> bool:
    """Whether overwriting the second map leaves no gaps, while the first one is only a part of a larger map."""
    arguments: Any = node.args
    x, y = arguments
    if not isinstance(y, fx.Node) or not same(x, y) or size_of(root(x)) == size_of(x) or not is_own(y):
        return False
    return size_of(root(y)) == size_of(y) and last[root(y)] is node and root(y) not in kept


def last_uses(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return the last user of each memory, by the node that allocated it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in (node, *node.all_input_nodes):
            last[root(used)] = node
    return last


def is_own(x: fx.Node) -> bool:
    """Whether a tensor's memory was allocated by an operator, and each of its values has its own place there."""
    owner = root(x)
    while x is not owner:
        if x.target in (aten.expand.default, aten.as_strided.default):
            return False
        x = x.all_input_nodes[0]
    return owner.target in _ALLOCATING or bool(owner.meta.get("line"))
