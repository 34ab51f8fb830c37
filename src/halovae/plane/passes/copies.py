"""Copies lie channels last, on the CPU: those of pixels that are rearranged, and of channels that are repeated.

PyTorch's copies lie as their dims follow each other, convolutions' results channels last. A sum of the two takes 25
times as long as one of two that lie alike, and a copy that changes from one to the other 5 to 10 times as long as one
that does not (256 channels of 5 x 64 x 64 cells, and 128 of 10 x 64 x 64, fp32, one thread, torch 2.13).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import windows
from halovae.plane.live import root
from halovae.plane.passes.graphs import inserted, only_user, shared

aten = torch.ops.aten
_CHANNELS = 8  # of a map; what has fewer is a picture


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Returns how many copies lie channels last now, or are not made any more; none on accelerators."""
    if mesh.device.kind != "cpu":
        return 0
    _reshape_at_once(graph)
    kept, found = shared(graph), 0
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target is aten.repeat.default:
            found += _repeat(node)
        elif node.target is aten.clone.default and node.kwargs.get("memory_format") is torch.contiguous_format:
            if root(node) not in kept and _is_read_by_a_copy(node):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                found += 1
            elif len(node.meta["shape"]) > 4 and (channels := _channels(node, list(node.users))):
                _lay(node, source, channels)
                found += 1
        elif node.target is aten.reshape.default and _copies(node) and (channels := _channels(source, [node])):
            node.target, node.args = windows.copied, (source, channels, node.meta["shape"])
            found += 1
    return found


def _reshape_at_once(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        before: Any = node.args[0] if node.args else None
        if node.target is aten.reshape.default and only_user(before, aten.reshape.default):
            node.args = (before.args[0], node.args[1])
            graph.erase_node(before)


def _repeat(node: fx.Node) -> bool:
    """Repeat only channels by a copy that lies channels last."""
    arguments: Any = node.args
    x, sizes = arguments
    shape, (items, *others) = node.meta["shape"], x.meta["shape"] or (1,)
    alone = len(shape) in (4, 5) and len(sizes) == 1 + len(others) and all(one == 1 for one in (sizes[0], *sizes[2:]))
    if not alone or sizes[1] == 1:
        return False
    made = inserted(node, aten.unsqueeze.default, (x, 1), (items, 1, *others))
    made = inserted(node, aten.expand.default, (made, [items, sizes[1], *others]))
    node.target, node.args = windows.copied, (made, 2, shape)
    return True


def _lay(node: fx.Node, source: fx.Node, channels: int) -> None:
    """Let a copy lie channels last, and be what it is reshaped to, if that is a map."""
    node.target, node.args, node.kwargs = windows.copied, (source, channels, None), {}
    shape = next(iter(node.users)).meta["shape"]
    if len(shape) in (4, 5):
        node.args = (source, channels, shape)
        node.meta["shape"] = shape
        for user in list(node.users):
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)


def _is_read_by_a_copy(node: fx.Node) -> bool:
    """Whether a copy of repeated values is only permuted, with some of its dims split. That needs no copy before."""
    source: Any = node.args[0]
    if source.target is not aten.expand.default or not node.users:
        return False
    for user in node.users:
        if user.target is not aten.reshape.default or not user.users:
            return False
        if any(len(group) > 1 for group in _groups(user.meta["shape"], node.meta["shape"])):
            return False
        if any(one.target is not aten.permute.default for one in user.users):
            return False
    return True


def _groups(shape: Sequence[int], given: Sequence[int]) -> Iterator[list[int]]:
    """The dims that become one, or several, when a tensor is reshaped. Those of one cell are left out.

    Args:
        shape: what it is reshaped to.
        given: what it has.

    Yields:
        Neighboring dims of `given`, of which some of `shape` are made.
    """
    at, dims = 0, [dim for dim, size in enumerate(given) if size != 1 and 0 not in given]
    sizes = [size for size in shape if size != 1]
    while dims:
        group, own = [dims.pop(0)], sizes[at]
        at += 1
        while (whole := math.prod(given[dim] for dim in group)) != own:
            if whole < own:
                group.append(dims.pop(0))
            else:
                own *= sizes[at]
                at += 1
        yield group


def _copies(node: fx.Node) -> bool:
    """Whether a map comes of something permuted by merging dims that are not neighbors in memory."""
    source: Any = node.args[0]
    if (
        len(node.meta["shape"]) not in (4, 5)
        or not isinstance(source, fx.Node)
        or source.target is not aten.permute.default
    ):
        return False
    order: Any = source.args[1]
    groups = _groups(node.meta["shape"], source.meta["shape"])
    return any(order[second] != order[first] + 1 for group in groups for first, second in pairwise(group))


def _channels(node: Any, users: Sequence[fx.Node]) -> int:
    """How many dims after the first are the channels of a tensor that is reshaped to maps; 0 if that is not so.

    If it is reshaped to more dims instead, the channels are the dims before the last ones that stay as they are.
    """
    items, *sizes = node.meta["shape"]
    shapes = {user.meta["shape"] if user.target is aten.reshape.default else None for user in users}
    shape = shapes.pop() if len(shapes) == 1 else None
    if not shape or shape[0] != items:
        return 0
    others = shape[1:]
    if len(others) in (3, 4):
        counts = (count for count in range(1, len(sizes)) if math.prod(sizes[:count]) == others[0])
        return next(counts, 0) if others[0] >= _CHANNELS else 0
    same = takewhile(lambda pair: pair[0] == pair[1], zip(reversed(sizes), reversed(others), strict=False))
    count = len(sizes) - len(list(same))
    return count if count < len(sizes) else 0
