"""Replace a convolution of 3 x 3 cells and its halo exchange by one operator, and a convolution of one cell by another.

These operators choose their algorithm when they run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import operators, windows
from halovae.plane.layout import ranges
from halovae.plane.operators import Cut
from halovae.plane.passes.graphs import only_user, recounted, replaced, used_once

aten = torch.ops.aten
_PADS = {
    aten.replication_pad2d.default: "replicate",
    aten.replication_pad3d.default: "replicate",
    aten.reflection_pad2d.default: "reflect",
    aten.reflection_pad3d.default: "reflect",
}


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many convolutions were replaced."""
    changes = 0
    for node in list(graph.nodes):
        arguments: Any = node.args
        if node.target is operators.convolution:
            x, weight, bias, padding, dilation, groups, cuts = arguments
            early: bool = True
            fetches: list[fx.Node] = []
        elif node.target is aten.convolution.default:
            x, weight, bias, stride, padding, dilation, transposed, _, groups = arguments
            if transposed or any(step != 1 for step in stride):
                continue
            if not any(padding) and groups == 1 and set(weight.meta["shape"][2:]) == {1}:
                replaced(node, windows.pointwise, (x, weight, bias), {})
                changes += 1
                continue
            fetches = _fetches(x)
            padding = list(padding)
            source: Any = fetches[0].args[0] if fetches else x
            edges = _edges(source, fetches, mesh) if not any(padding) else None
            known = [cut for cut in (_cut(fetch, edges is not None) for fetch in fetches) if cut is not None]
            if not known:  # rows of an earlier strip, or data that are moved otherwise
                fetches, source = [], x
            if len(known) < len(fetches) or any(padding[dim - 2] for dim, *_ in known):
                continue
            early, cuts = False, tuple(known)
            if edges is not None and _is_window(weight, (*padding[:-2], 1, 1), dilation, groups, cuts):
                arguments = (source.args[0], weight, bias, (*padding[:-2], 1, 1), cuts, early)
                recounted(replaced(node, windows.convolution, arguments, edges, *reversed(fetches), source), mesh)
                changes += 1
                continue
            if edges is not None:
                continue
            for dim, *_ in known:
                padding[dim - 2] = 1
            x = source
        else:
            continue
        if _is_window(weight, padding, dilation, groups, cuts):
            arguments = (x, weight, bias, tuple(padding), cuts, early)
            replaced(node, windows.convolution, arguments, {}, *reversed(fetches))
            changes += 1
    return changes


def _is_window(weight: Any, padding: Any, dilation: Any, groups: Any, cuts: Any) -> bool:
    """Whether `windows.convolution` supports a convolution."""
    *_, rows, cols = weight.meta["shape"]
    plain = set(dilation) == {1} and groups == 1 and tuple(padding[-2:]) == (1, 1)
    return plain and len(padding) in (2, 3) and (rows, cols) == (3, 3) and all(cut[4] == 1 for cut in cuts)


def _fetches(x: Any) -> list[fx.Node]:
    """Return the chain of fetches that ends at a map, in order."""
    fetches: list[fx.Node] = []
    while only_user(x, operators.fetch):
        fetches.insert(0, x)
        x = x.args[0]
    return fetches


def _cut(fetch: fx.Node, padded: bool) -> Cut | None:
    """Return the cut of a fetch of one row (or col) from each neighbor; None for other fetches.

    Args:
        fetch: the node.
        padded: whether the first and the last rank's shard have one extra cell, which the cut excludes.
    """
    arguments: Any = fetch.args
    _, dim, mesh_dim, bounds, needed = arguments
    if dim < len(fetch.meta["shape"]) - 2:
        return None
    halos = tuple(((start - 1, stop + 1),) for start, stop in ranges(bounds))
    if not padded:
        return (dim, mesh_dim, bounds, needed, 1, False, False) if needed == halos else None
    if needed != tuple(((max(a, 0), min(b, bounds[-1])),) for ((a, b),) in halos):
        return None
    bounds = (0, *(bound - 1 for bound in bounds[1:-1]), bounds[-1] - 2)
    return dim, mesh_dim, bounds, tuple(((a - 1, b + 1),) for a, b in ranges(bounds)), 1, False, False


def _edges(x: Any, fetches: list[fx.Node], mesh: Mesh) -> dict[str, Any] | None:
    """Return the arguments of `windows.convolution` for a map's padding before its halo exchange; None without it.

    Along a dim that is cut, only the ranks at its ends have padded, each on its side. Frames may be repeated, too.
    """
    if not isinstance(x, fx.Node) or x.target not in _PADS or not used_once(x):
        return None
    widths: Any = x.args[1]
    (left, right, top, bottom), rest = widths[:4], widths[4:]
    cuts: dict[Any, Any] = {fetch.args[1]: fetch.args[2:4] for fetch in fetches}
    sides = []
    for dim, pads in ((len(x.meta["shape"]) - 2, (top, bottom)), (len(x.meta["shape"]) - 1, (left, right))):
        ends = (True, True)
        if dim in cuts:
            mesh_dim, bounds = cuts[dim]
            position = mesh.row if mesh_dim == "rows" else mesh.col
            ends = position == 0, position == len(bounds) - 2
        if pads != tuple(map(int, ends)):
            return None
        sides.append(ends)
    mode = _PADS[x.target]
    if any(rest) and (mode == "reflect" or min(rest) < 0):
        return None
    edges: dict[str, Any] = {"edges": (mode, (*sides[1], *sides[0]))}
    return {**edges, "repeats": tuple(rest)} if any(rest) else edges
