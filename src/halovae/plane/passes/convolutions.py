"""Convolutions of 3 x 3 cells as one operator with their halos, and those of one cell as another.

How to compute them is chosen when they run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.mesh import Mesh
from halovae.plane import operators, windows
from halovae.plane.layout import ranges
from halovae.plane.operators import Cut
from halovae.plane.passes.graphs import only_user, replaced

aten = torch.ops.aten


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Returns how many convolutions are other operators now."""
    found = 0
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
                found += 1
                continue
            fetches = _fetches(x)
            padding = list(padding)
            made = [one for one in map(_cut, fetches) if one is not None]
            if len(made) < len(fetches) or any(padding[dim - 2] for dim, *_ in made):
                continue
            early, cuts = False, tuple(made)
            for dim, *_ in made:
                padding[dim - 2] = 1
            x = fetches[0].args[0] if fetches else x
        else:
            continue
        if _is_window(weight, padding, dilation, groups, cuts):
            arguments = (x, weight, bias, tuple(padding), cuts, early)
            replaced(node, windows.convolution, arguments, {}, *reversed(fetches))
            found += 1
    return found


def _is_window(weight: Any, padding: Any, dilation: Any, groups: Any, cuts: Any) -> bool:
    *_, rows, cols = weight.meta["shape"]
    plain = set(dilation) == {1} and groups == 1 and tuple(padding[-2:]) == (1, 1)
    return plain and len(padding) in (2, 3) and (rows, cols) == (3, 3) and all(one[4] == 1 for one in cuts)


def _fetches(x: Any) -> list[fx.Node]:
    """The fetches that a map comes from, in order."""
    found: list[fx.Node] = []
    while only_user(x, operators.fetch):
        found.insert(0, x)
        x = x.args[0]
    return found


def _cut(fetch: fx.Node) -> Cut | None:
    """A fetch of one row (or col) of each neighbor, as the operators of convolutions have it."""
    arguments: Any = fetch.args
    _, dim, mesh_dim, bounds, wanted = arguments
    if dim < len(fetch.meta["shape"]) - 2:
        return None
    halos = tuple(((start - 1, stop + 1),) for start, stop in ranges(bounds))
    return (dim, mesh_dim, bounds, wanted, 1, False, False) if wanted == halos else None
