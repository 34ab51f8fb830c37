"""Remove temporal taps that meet only zeros: the causal padding before a clip's first frames, or before an image."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import windows
from halovae.plane.passes.graphs import recounted

aten = torch.ops.aten
_CONVOLUTIONS = (aten.convolution.default, windows.convolution)


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many convolutions have fewer taps.

    All ranks decide the same way, since frames are not partitioned. Halos get smaller.
    """
    changes = 0
    for node in list(graph.nodes):
        if node.target not in _CONVOLUTIONS:
            continue
        arguments: Any = node.args
        padded, weight, *others = arguments
        zeros = _zeros(padded)
        taps, results = weight.meta["shape"][2], node.meta["shape"][2]
        if not zeros or not _is_plain(node):
            continue
        dead = min(taps - 1, zeros - results + 1)  # tap t sees the frames t to t + results - 1
        if dead <= 0:
            continue
        with graph.inserting_before(node):
            live = graph.call_function(aten.slice.Tensor, (weight, 2, dead, taps))
            channels, inputs, _, *kernel = weight.meta["shape"]
            live.meta = {**weight.meta, "shape": (channels, inputs, taps - dead, *kernel), "bytes": 0}
            x = _with_fewer_zeros(graph, padded, dead)
        node.args = (x, live, *others)
        if not padded.users:
            graph.erase_node(padded)
        if node.target is windows.convolution:
            recounted(node, mesh)
        changes += 1
    return changes


def _zeros(node: Any) -> int:
    """Return the number of frames of zeros at the beginning of a map `[N, C, T, H, W]`."""
    if not isinstance(node, fx.Node) or node.target is not aten.constant_pad_nd.default:
        return 0
    if len(node.meta["shape"]) != 5 or any(value != 0 for value in node.args[2:]):
        return 0
    widths: Any = node.args[1]
    return int(widths[4]) if len(widths) > 4 and min(widths) >= 0 else 0


def _is_plain(node: fx.Node) -> bool:
    """Whether a convolution has a stride of 1 in time, and no padding or dilation there."""
    arguments: Any = node.args
    if node.target is windows.convolution:
        return bool(arguments[3][0] == 0) and "repeats" not in node.kwargs
    stride, padding, dilation, transposed = arguments[3:7]
    return (stride[0], padding[0], dilation[0], transposed) == (1, 0, 1, False)


def _with_fewer_zeros(graph: fx.Graph, padded: fx.Node, dead: int) -> fx.Node:
    arguments: Any = padded.args
    x, widths, *value = arguments
    left = [*widths[:4], widths[4] - dead, *widths[5:]]
    if not any(left):
        return x
    fewer = graph.call_function(aten.constant_pad_nd.default, (x, left, *value))
    items, channels, frames, *plane = padded.meta["shape"]
    bytes_ = padded.meta["bytes"] // frames * (frames - dead)
    fewer.meta = {**padded.meta, "shape": (items, channels, frames - dead, *plane), "bytes": bytes_}
    return fewer
