"""Let causal convolutions concatenate their frames: zeros, the feature cache, and the frames of the chunk.

The convolution also fills the feature cache for the next chunk. So its input has no other user, and the norm and
activation before it can be fused into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import operators, windows
from halovae.plane.operators import emit
from halovae.plane.passes.graphs import only_user

aten = torch.ops.aten
# Nodes that keep their order. Halo exchanges do on all ranks, also on ranks that only receive.
_STAYING = (emit, *operators.BETWEEN_RANKS, *windows.OPERATORS)


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many nodes were removed."""
    removed = 0
    for node in list(graph.nodes):
        if node.target is not windows.convolution or len(node.meta["shape"]) != 5 or node.args[3][0]:
            continue
        if _with_repeats(node):
            removed += 1
            continue
        if "repeats" in node.kwargs:
            continue
        x, zeros, past, gone = _parts(node.args[0])
        copy, keep = _copied(x, node, gone), None
        later = None if copy is None else _between(copy, node)
        if copy is not None and later is not None:
            with graph.inserting_before(node):
                keep = graph.call_function(windows.kept, (node.args[1], tuple(copy.meta["shape"])))
            keep.meta = {**copy.meta}
            copy.replace_all_uses_with(keep)
            for user in reversed(later):
                node.append(user)
            gone += [copy] if copy.args[0] is x else [copy, copy.args[0]]
        node.args = (x, *node.args[1:])
        options = {"zeros": zeros, "past": past, "keep": keep}
        node.kwargs = {**node.kwargs, **{name: value for name, value in options.items() if value}}
        for unused in gone:
            graph.erase_node(unused)
        removed += len(gone)
    return removed


def _with_repeats(node: fx.Node) -> bool:
    """Let a convolution repeat the first and last frame itself, if its input only does that."""
    cat: Any = node.args[0]
    if node.kwargs.keys() & {"repeats", "zeros", "past"} or not only_user(cat, aten.cat.default):
        return False
    parts, *dim = cat.args
    if dim != [2]:
        return False
    for at, x in enumerate(parts):
        before, after = parts[:at], parts[at + 1 :]
        if not isinstance(x, fx.Node):
            continue
        last = x.meta["shape"][2] - 1
        repeats = _times_of_all(before, x, 0), _times_of_all(after, x, last)
        if None in repeats:
            continue
        node.args = (x, *node.args[1:])
        node.kwargs = {**node.kwargs, "repeats": repeats}
        node.graph.erase_node(cat)
        for part in dict.fromkeys((*before, *after)):
            _erase_unused(part)
        return True
    return False


def _times_of_all(nodes: list[Any], x: fx.Node, frame: int) -> int | None:
    total = 0
    for node in nodes:
        times = _times(node, x, frame)
        if times is None:
            return None
        total += times
    return total


def _times(node: Any, x: fx.Node, frame: int) -> Any:
    """Return how often a node repeats one frame of a map; None if it does anything else."""
    if not isinstance(node, fx.Node):
        return None
    times = 1
    if node.target in (aten.repeat.default, aten.expand.default):
        sizes: Any = node.args[1]
        others = [size for at, size in enumerate(sizes) if at != 2]
        if len(sizes) != 5 or any(size != 1 for size in others):
            return None
        times, node = node.meta["shape"][2], node.args[0]
        if node.meta["shape"][2] != 1:
            return None
    if node is x and x.meta["shape"][2] == 1:
        return times
    if node.target is not aten.slice.Tensor or node.args[0] is not x or len(node.args) != 4:
        return None
    _, dim, start, stop = node.args
    return times if (dim, start, min(stop, x.meta["shape"][2])) == (2, frame, frame + 1) else None


def _erase_unused(node: Any) -> None:
    while isinstance(node, fx.Node) and not node.users and node.all_input_nodes:  # an erased node has no inputs
        gone, node = node, node.args[0]
        gone.graph.erase_node(gone)


def _parts(x: Any) -> tuple[Any, int, Any, list[fx.Node]]:
    """Split an input into a map, the number of zero frames and the past before it, and the nodes that join them."""
    zeros, past, gone = 0, None, list[fx.Node]()
    if only_user(x, aten.constant_pad_nd.default):
        source, widths, *value = x.args
        others = [width for at, width in enumerate(widths) if at != 4]
        if len(widths) > 4 and widths[4] > 0 and not any(others) and not any(value):
            gone.append(x)
            x, zeros = source, widths[4]
    if only_user(x, aten.cat.default) and x.args[1:] == (2,) and len(x.args[0]) == 2:
        gone.append(x)
        past, x = x.args[0]
    return x, zeros, past, gone


def _copied(x: Any, node: fx.Node, gone: list[fx.Node]) -> Any:
    """Return the only other user of a map, if it copies the map or its last frames; else None."""
    others = [user for user in x.users if user is not node and user not in gone]
    if len(others) != 1:
        return None
    (copy,) = others
    if copy.target is aten.slice.Tensor and len(copy.users) == 1 and len(copy.args) == 4:
        _, dim, start, stop = copy.args
        if dim != 2 or not 0 <= start < stop or stop < x.meta["shape"][2]:
            return None
        (copy,) = copy.users
    return copy if copy.target is aten.clone.default else None


def _between(copy: fx.Node, node: fx.Node) -> list[fx.Node] | None:
    """Return the nodes before a convolution that depend on a copy, in order; None if one cannot come after it."""
    dependents, todo = set[fx.Node](), [copy]
    while todo:
        for user in todo.pop().users:
            if user is node or (user.op != "call_function" and user < node):
                return None
            if user < node and user not in dependents:
                if user.target in _STAYING:
                    return None
                dependents.add(user)
                todo.append(user)
    return sorted(dependents)
