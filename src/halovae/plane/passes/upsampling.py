"""Nearest upsampling and the convolution after it become one operator, whose halos travel at the low resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.mesh import Mesh
from halovae.plane import windows
from halovae.plane.layout import ranges
from halovae.plane.operators import Cut
from halovae.plane.passes.graphs import recounted, replaced, widened

aten = torch.ops.aten
_NEAREST = (aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default)


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Returns how many upsamplings are part of a convolution.

    Ranks decide alike, since what is asked is the same for all of them: a rank's own sizes, and who else uses the
    upsampled map, are not. Halos of the two kinds differ in size.
    """
    found = 0
    for node in list(graph.nodes):
        if node.target is not windows.convolution or node.kwargs:
            continue
        arguments: Any = node.args
        larger, weight, bias, _, cuts, _ = arguments
        x, gone = _repeated(larger, mesh)
        if x is None:
            continue
        doubled = [2 * extent for extent in x.meta["shape"][-2:]]
        halved = [_halved(cut) for cut in cuts]
        if doubled != list(larger.meta["shape"][-2:]) or None in halved:
            continue
        recounted(replaced(node, windows.upsampled_convolution, (x, weight, bias, tuple(halved)), {}, *gone), mesh)
        found += 1
    return found


def _repeated(larger: Any, mesh: Mesh) -> tuple[Any, list[fx.Node]]:
    """What is upsampled, and the nodes that do it: also by way of fp32 and back, which changes no value."""
    gone = [larger]
    if isinstance(larger, fx.Node) and larger.target is aten._to_copy.default:
        gone.append(larger.args[0])
    if not isinstance(gone[-1], fx.Node) or gone[-1].target not in _NEAREST:
        return None, []
    x: Any = gone[-1].args[0]
    return (x, gone) if len(gone) == 1 else (widened(x, larger, mesh), [*gone, x])


def _halved(cut: Cut) -> Cut | None:
    dim, mesh_dim, bounds, wanted, width, before, after = cut
    halos = tuple(((start - 1, stop + 1),) for start, stop in ranges(bounds))
    if any(bound % 2 for bound in bounds) or wanted != halos:
        return None
    half = tuple(bound // 2 for bound in bounds)
    return dim, mesh_dim, half, tuple(((a - 1, b + 1),) for a, b in ranges(half)), width, before, after
