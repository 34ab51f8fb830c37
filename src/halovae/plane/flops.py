"""Floating-point operations of a recorded operator."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import fx

from halovae.plane import operators, windows

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution.default, aten._convolution.default)
PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.linear.default)


def flops(node: fx.Node) -> float:
    """Count two for each multiplication and addition, as `torch.utils.flop_counter` counts them."""
    target, args = cast(Any, node.target), node.args
    if target is windows.residual_convolution:
        target, args = windows.convolution, args[1:]
    result = math.prod(node.meta.get("shape", ()))
    if target in CONVOLUTIONS:
        weight = _shape(node.args[1])
        transposed = bool(node.args[6])
        return 2.0 * (math.prod(_shape(node.args[0])) if transposed else result) * math.prod(weight[1:])
    if target is operators.convolution:
        weight, x, cuts = _shape(node.args[1]), _shape(node.args[0]), cast(Any, node.args[6])
        twice: float = sum(width / x[dim] * (before + after) for dim, *_, width, before, after in cuts)
        return 2.0 * result * math.prod(weight[1:]) * (1 + twice)
    if target is windows.convolution:
        weight, x, cuts, early = _shape(args[1]), _shape(args[0]), cast(Any, args[4]), args[5]
        twice = sum(width / x[dim] * (before + after) for dim, *_, width, before, after in cuts) if early else 0
        return 2.0 * result * math.prod(weight[1:]) * (1 + twice)
    if target in (windows.upsampled_convolution, windows.pointwise):
        return 2.0 * result * math.prod(_shape(node.args[1])[1:])
    if target in PRODUCTS:
        inner = _shape(node.args[1 if target in (aten.addmm.default, aten.baddbmm.default) else 0])[-1]
        return 2.0 * result * inner
    if target is operators.attention:
        query, key = _shape(node.args[0]), _shape(node.args[1])
        return 2.0 * math.prod(query[:-1]) * key[-2] * (query[-1] + _shape(node.args[2])[-1])
    return 0.0


def _shape(argument: Any) -> tuple[int, ...]:
    found: tuple[int, ...] = argument.meta["shape"]
    return found
