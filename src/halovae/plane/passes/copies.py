"""Make copies channels last on the CPU: copies that rearrange pixels, and copies that repeat channels.

PyTorch's copies are contiguous, and results of convolutions are channels last. A sum of maps with different layouts
takes 25 times as long as one of maps with the same layout. A copy that changes the layout takes 5 to 10 times as long
as one that keeps it (256 channels of 5 x 64 x 64 cells, and 128 of 10 x 64 x 64, fp32, one thread, torch 2.13).
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
_CHANNELS = 8  # of a map; a tensor with fewer channels is a picture


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many copies became channels last or were removed; none on accelerators."""
    if mesh.device.kind != "cpu":
        return 0
    _reshape_at_once(graph)
    kept, changes = shared(graph), 0
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.args else None
        if node.target is aten.repeat.default:
            changes += _repeat(node)
        elif node.target is aten.clone.default and node.kwargs.get("memory_format") is torch.contiguous_format:
            if root(node) not in kept and _is_read_by_a_copy(node):
                node.replace_all_uses_with(source)
                graph.erase_node(node)
                changes += 1
            elif len(node.meta["shape"]) > 4 and (channels := _channels(node, list(node.users))):
                _lay(node, source, channels)
                changes += 1
        elif node.target is aten.reshape.default and _copies(node) and (channels := _channels(source, [node])):
            node.target, node.args = windows.copied, (source, channels, node.meta["shape"])
            changes += 1
    return changes


def _reshape_at_once(graph: fx.Graph) -> None:
    """Merge two successive reshapes into one."""
    for node in list(graph.nodes):
        before: Any = node.args[0] if node.args else None
        if node.target is aten.reshape.default and only_user(before, aten.reshape.default):
            node.args = (before.args[0], node.args[1])
            graph.erase_node(before)


def _repeat(node: fx.Node) -> bool:
    """Replace a repeat of only channels by a channels-last copy. Return whether it was replaced."""
    arguments: Any = node.args
    x, sizes = arguments
    shape, (items, *others) = node.meta["shape"], x.meta["shape"] or (1,)
    only_channels = len(shape) in (4, 5) and len(sizes) == 1 + len(others)
    only_channels = only_channels and all(times == 1 for times in (sizes[0], *sizes[2:]))
    if not only_channels or sizes[1] == 1:
        return False
    repeated = inserted(node, aten.unsqueeze.default, (x, 1), (items, 1, *others))
    repeated = inserted(node, aten.expand.default, (repeated, [items, sizes[1], *others]))
    node.target, node.args = windows.copied, (repeated, 2, shape)
    return True


def _lay(node: fx.Node, source: fx.Node, channels: int) -> None:
    """Make a copy channels last. If it is reshaped to a map, include the reshape."""
    node.target, node.args, node.kwargs = windows.copied, (source, channels, None), {}
    shape = next(iter(node.users)).meta["shape"]
    if len(shape) in (4, 5):
        node.args = (source, channels, shape)
        node.meta["shape"] = shape
        for user in list(node.users):
            user.replace_all_uses_with(node)
            node.graph.erase_node(user)


def _is_read_by_a_copy(node: fx.Node) -> bool:
    """Whether a copy of repeated values is only permuted, with some dims split. Then the copy is not needed."""
    source: Any = node.args[0]
    if source.target is not aten.expand.default or not node.users:
        return False
    for user in node.users:
        if user.target is not aten.reshape.default or not user.users:
            return False
        if any(len(group) > 1 for group in _groups(user.meta["shape"], node.meta["shape"])):
            return False
        if any(reader.target is not aten.permute.default for reader in user.users):
            return False
    return True


def _groups(shape: Sequence[int], source: Sequence[int]) -> Iterator[list[int]]:
    """Find the dims that a reshape merges or splits. Dims of one cell are left out.

    Args:
        shape: the shape after the reshape.
        source: the shape before it.

    Yields:
        Neighboring dims of `source` that the reshape turns into one or more dims of `shape`.
    """
    at, dims = 0, [dim for dim, size in enumerate(source) if size != 1 and 0 not in source]
    sizes = [size for size in shape if size != 1]
    while dims:
        group, wanted = [dims.pop(0)], sizes[at]
        at += 1
        while (whole := math.prod(source[dim] for dim in group)) != wanted:
            if whole < wanted:
                group.append(dims.pop(0))
            else:
                wanted *= sizes[at]
                at += 1
        yield group


def _copies(node: fx.Node) -> bool:
    """Whether a reshape to a map merges dims of a permuted tensor that are not neighbors in memory."""
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
    """Return how many dims after the first are channels of a tensor that is reshaped to maps; 0 if it is not.

    If it is reshaped to more dims than a map has, the channels are the dims before the last ones that stay unchanged.
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
