"""Fuse nearest upsampling and the convolution after it; ranks then exchange halos at the low resolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import backends, windows
from halovae.plane.layout import ranges
from halovae.plane.operators import Cut
from halovae.plane.passes.graphs import recounted, replaced, widened

aten = torch.ops.aten
_NEAREST_OF_FRAMES = (aten.upsample_nearest3d.default, aten._upsample_nearest_exact3d.default)
_NEAREST = (aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default)


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many upsamplings were fused or replaced.

    All ranks must decide the same way, because halos of fused and unfused operators differ in size. So the decision
    depends on the upsampling factors, which are equal on all ranks, not on a rank's own sizes or on other users of the
    upsampled map.
    """
    changes = 0
    for node in list(graph.nodes):
        if node.target is not windows.convolution or node.kwargs:
            continue
        arguments: Any = node.args
        larger, weight, bias, _, cuts, _ = arguments
        x, gone = _repeated(larger, mesh)
        if x is None:
            continue
        halved = [_halved(cut) for cut in cuts]
        if None in halved:
            continue
        recounted(replaced(node, windows.upsampled_convolution, (x, weight, bias, tuple(halved)), {}, *gone), mesh)
        changes += 1
    if backends.kernels(mesh.device.kind) is not None:
        left = [node for node in graph.nodes if node.target in (*_NEAREST, *_NEAREST_OF_FRAMES)]
        changes += sum(map(_repeated_by_kernel, left))
    return changes


def _repeated_by_kernel(node: fx.Node) -> bool:
    """Replace upsampling by whole factors with halovae's own kernel: PyTorch's is slow for channels-last maps."""
    factors = _factors(node)
    if factors is None:
        return False
    replaced(node, windows.upsampled, (node.args[0], factors), {})
    return True


def _factors(node: fx.Node) -> tuple[int, ...] | None:
    """Return how often each frame, row and col of a map is repeated; None if a factor is not whole."""
    x: Any = node.args[0]
    sizes, larger = x.meta["shape"][2:], node.meta["shape"][2:]
    if any(size % before for before, size in zip(sizes, larger, strict=True)):
        return None
    factors = tuple(size // before for before, size in zip(sizes, larger, strict=True))
    scales = [*node.args[2:], *(None,) * len(factors)]
    return factors if all(scale in (None, factor) for scale, factor in zip(scales, factors, strict=False)) else None


def _repeated(larger: Any, mesh: Mesh) -> tuple[Any, list[fx.Node]]:
    """Return the map before upsampling by two, and the nodes that upsample it, with casts to fp32 and back."""
    gone = [larger]
    if isinstance(larger, fx.Node) and larger.target is aten._to_copy.default:
        gone.append(larger.args[0])
    if not isinstance(gone[-1], fx.Node) or gone[-1].target not in _NEAREST or _factors(gone[-1]) != (2, 2):
        return None, []
    x: Any = gone[-1].args[0]
    return (x, gone) if len(gone) == 1 else (widened(x, larger, mesh), [*gone, x])


def _halved(cut: Cut) -> Cut | None:
    """Return a cut at the low resolution; None if a bound is odd, or the cut fetches more than one cell."""
    dim, mesh_dim, bounds, needed, width, before, after = cut
    halos = tuple(((start - 1, stop + 1),) for start, stop in ranges(bounds))
    if any(bound % 2 for bound in bounds) or needed != halos:
        return None
    half = tuple(bound // 2 for bound in bounds)
    return dim, mesh_dim, half, tuple(((a - 1, b + 1),) for a, b in ranges(half)), width, before, after
