"""Convolve only the rows and cols that are kept: a strip's map has some of an earlier strip, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import windows
from halovae.plane.passes.graphs import used_once

aten = torch.ops.aten


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many convolutions compute less."""
    changes = 0
    for node in list(graph.nodes):
        if node.target is not aten.narrow.default:
            continue
        arguments: Any = node.args
        source, dim, first, length = arguments
        between = source if source.target is aten.unsqueeze.default and used_once(source) else None
        convolution: Any = source if between is None else source.args[0]
        if convolution.target is not windows.convolution or not used_once(convolution):
            continue
        if convolution.args[4]:
            continue  # other ranks wait for halos of the whole map
        extent, side = source.meta["shape"][dim], dim - len(source.meta["shape"])
        ends = first, extent - first - length
        beyond = list(convolution.kwargs.get("beyond", (0,) * 4))
        place = {-2: 0, -1: 2}.get(side)
        if place is None or max(ends) > 1 or any(beyond[place : place + 2]) or convolution.kwargs.keys() - {"beyond"}:
            continue
        beyond[place : place + 2] = ends
        convolution.kwargs = {"beyond": tuple(beyond)}
        for one in (convolution, source):
            shape = [*one.meta["shape"]]
            if shape[side] == extent:
                shape[side] = length
                one.meta |= {"shape": tuple(shape), "bytes": one.meta["bytes"] // extent * length}
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        changes += 1
    return changes
