"""Norms and SiLU before a convolution become a part of it: a map is normalized into what the convolution reads.

GroupNorm is one operator already. The norm over a cell's channels, as Wan's VAE has it, is recognized:
`x / max(|x|, least) * factor * gamma`, of which the quotient may be computed in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from halovae.mesh import Mesh
from halovae.plane import backends, operators, windows
from halovae.plane.passes.graphs import only_user, replaced, widened

aten = torch.ops.aten


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Returns how many norms and activations went; none on accelerators without kernels of our own."""
    if mesh.platform.kind != "cpu" and backends.kernels(mesh.platform.kind) is None:
        return 0
    found = 0
    for node in list(graph.nodes):
        if node.target is not windows.convolution:
            continue
        x: Any = node.args[0]
        given: dict[str, Any] = {}
        gone = []
        if not node.kwargs.keys() & {"silu", "norm"} and only_user(x, aten.silu.default):
            gone.append(x)
            x, given["silu"] = x.args[0], True
        if "norm" not in node.kwargs and only_user(x, operators.group_norm):
            gone.append(x)
            x, gamma, beta, groups, eps, scope, counts = x.args
            given |= {"gamma": gamma, "beta": beta, "norm": (groups, eps, scope, counts)}
        elif "norm" not in node.kwargs and only_user(x, operators.whole_group_norm):
            gone.append(x)
            x, groups, gamma, beta, eps = x.args
            given |= {"gamma": gamma, "beta": beta, "norm": (groups, eps, "plane", ())}
        elif "norm" not in node.kwargs and (cells := _norm_of_cells(x, mesh)) is not None:
            x, gamma, norm, parts = cells
            given |= {"gamma": gamma, "norm": norm}
            gone += parts
        if gone:
            replaced(node, windows.convolution, (x, *node.args[1:]), {**node.kwargs, **given}, *gone)
            found += len(gone)
    return found


def _norm_of_cells(node: Any, mesh: Mesh) -> tuple[Any, Any, tuple[float, float], list[fx.Node]] | None:
    """What is normalized, gamma, `windows.Norm`, and the nodes that do it; None if a node is no norm over channels."""
    factor, gamma, gone = 1.0, None, []
    while only_user(node, aten.mul.Tensor):
        value: Any = node.args[1]
        if isinstance(value, fx.Node) and not (
            gamma is None and value.op == "get_attr" and _is_of_channels(value, node)
        ):
            return None
        gone.append(node)
        gamma, factor = (value, factor) if isinstance(value, fx.Node) else (gamma, factor * value)
        node = node.args[0]
    rounded = node if only_user(node, aten._to_copy.default) else None
    if rounded is not None:
        gone.append(rounded)
        node = rounded.args[0]
    if not only_user(node, aten.div.Tensor) or len(node.args) != 2:
        return None
    gone.append(node)
    wide, length = node.args
    x: Any = wide if rounded is None else widened(wide, rounded, mesh)
    if x is None or (rounded is not None and len(wide.users) != 2):
        return None
    if only_user(length, aten.expand.default):
        gone.append(length)
        length = length.args[0]
    if not only_user(length, aten.clamp_min.default) or not only_user(length.args[0], aten.linalg_vector_norm.default):
        return None
    (total, least), gone = length.args, [*gone, length, length.args[0]]
    source, order, dims, keepdim, *rest = (*total.args, None, None, None)[:5]
    plain = source is wide and order == 2 and list(dims or ()) == [1] and keepdim and not any(rest) and not total.kwargs
    return (x, gamma, (float(least), factor), gone if rounded is None else [*gone, wide]) if plain else None


def _is_of_channels(weight: fx.Node, node: fx.Node) -> bool:
    """Whether a weight has one value for each channel of a map."""
    shape, (_, channels, *spatial) = weight.meta["shape"], node.meta["shape"]
    return bool(shape == (channels, *(1,) * len(spatial)))
