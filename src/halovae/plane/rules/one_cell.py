"""Convolutions whose kernel has one cell: they need nothing of other ranks, so little has to be known of them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halovae.plane.layout import Layout, partitioned, shape, sole, whole
from halovae.plane.rules.convolution import convolution
from halovae.plane.rules.registry import known, plain, rule
from halovae.plane.tensor import PlaneTensor, channels_last, is_channels_last

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


@rule(aten.convolution.default)
def one_cell(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each rank convolves its part where that leaves the layout of the plane; other ones are `convolution`'s."""
    x, weight, bias, stride, padding, _, transposed = args[:7]
    weight, bias = plain(weight), plain(bias)
    if transposed or not isinstance(x, PlaneTensor) or not _is_plain(weight) or not (bias is None or _is_plain(bias)):
        return convolution(plane, func, args, kwargs)
    layout = _layout(x.partition, weight.shape, tuple(stride), tuple(padding), tuple(plane.extents))
    if layout is None:
        return convolution(plane, func, args, kwargs)
    local = known(func).direct(x.local, weight, bias, *args[3:])
    plane.note(layout)
    last = is_channels_last(x) or is_channels_last(weight)
    return plane.wrap(local, layout, strides=channels_last(shape(layout)) if last else None)


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, PlaneTensor)


@lru_cache(maxsize=4096)
def _layout(
    layout: Layout, weight: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
    mesh_dims: tuple[str, ...],
) -> Layout | None:  # fmt: skip
    """The layout of the result; None where it is not the input's but for the channels, which every rank has."""
    spatial = len(weight) - 2
    if len(layout) != len(weight) or {*weight[2:], *stride} != {1} or {*padding} != {0}:
        return None
    places = dict(partitioned(layout))
    cut = {factor.mesh_dim for _, factor in partitioned(layout)}
    if 1 in places or any(at >= 2 and sole(layout[at]) is None for at in places):
        return None
    # A dim that is whole may be large enough to be partitioned now.
    for at, mesh_dim in ((len(layout) - 2, "rows"), (len(layout) - 1, "cols")):
        if at >= len(layout) - spatial and at not in places and mesh_dim in mesh_dims and mesh_dim not in cut:
            return None
    return (layout[0], whole(weight[0]), *layout[2:])
