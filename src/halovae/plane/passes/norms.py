"""Fuse norms and SiLU into the convolution after them: the map is normalized into the convolution's window.

On the CPU, a norm over a cell's channels without a convolution after it becomes one operator.

GroupNorm is one operator already. This pass recognizes the norm over a cell's channels of video VAEs,
`x / max(|x|, least) * factor * gamma`, whose quotient may be computed in fp32, and LTX's root mean square norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from halovae.distributed.mesh import Mesh
from halovae.plane import backends, group_norms, windows
from halovae.plane.live import same
from halovae.plane.norms import Cells
from halovae.plane.passes.graphs import is_cast, only_user, replaced, used_once, widened

aten = torch.ops.aten
_ROOT = aten.rsqrt.default


def run(graph: fx.Graph, mesh: Mesh) -> int:
    """Return how many nodes were fused or replaced; none on accelerators without halovae's own kernels."""
    fused, changes = backends.kernels(mesh.device.kind), 0
    on_cpu = fused is None and mesh.device.kind == "cpu"
    if fused is None and not on_cpu:
        return 0
    for node in list(graph.nodes):
        if node.target is not windows.convolution:
            continue
        x: Any = node.args[0]
        options: dict[str, Any] = {}
        gone = []
        squeezed = x if only_user(x, aten.squeeze.dims) and _is_one_frame(x) else None
        x = x if squeezed is None else squeezed.args[0]
        if not node.kwargs.keys() & {"silu", "norm"} and only_user(x, aten.silu.default):
            gone.append(x)
            x, options["silu"] = x.args[0], True
        if "norm" not in node.kwargs and only_user(x, group_norms.group_norm):
            gone.append(x)
            x, gamma, beta, groups, eps, scope, counts = x.args
            options |= {"gamma": gamma, "beta": beta, "norm": (groups, eps, scope, counts)}
        elif "norm" not in node.kwargs and only_user(x, group_norms.normalized_groups):
            gone.append(x)
            x, found, gamma, beta, groups, eps = x.args
            options |= {"gamma": gamma, "beta": beta, "norm": (groups, eps, "plane", ()), "found": found}
        elif "norm" not in node.kwargs and only_user(x, group_norms.whole_group_norm):
            gone.append(x)
            x, groups, gamma, beta, eps = x.args
            options |= {"gamma": gamma, "beta": beta, "norm": (groups, eps, "plane", ())}
        elif "norm" not in node.kwargs and used_once(x) and (cells := _over_channels(x, mesh, on_cpu)):
            gone += cells.nodes
            x = cells.x
            options |= {"gamma": cells.gamma, "norm": cells.norm}
            options |= {} if cells.beta is None else {"beta": cells.beta}
        if gone and squeezed is not None:
            gone.insert(0, squeezed)
            x = _without_frames(x, squeezed)
        if gone:
            replaced(node, windows.convolution, (x, *node.args[1:]), {**node.kwargs, **options}, *gone)
            changes += len(gone)
    return changes + (_standalone(graph, mesh) if on_cpu else 0)


def _standalone(graph: fx.Graph, mesh: Mesh) -> int:
    """Replace each norm over channels without a convolution after it by one operator. Return how many nodes it had."""
    gone = set[fx.Node]()
    for node in reversed(list(graph.nodes)):
        shape = node.meta.get("shape")
        if node in gone or not isinstance(shape, tuple) or len(shape) not in (4, 5):
            continue
        norm = _over_channels(node, mesh, on_cpu=True)
        if norm is not None:
            arguments = norm.x, norm.gamma, norm.beta, norm.norm
            replaced(node, windows.normalized, arguments, {}, *norm.nodes[1:])
            gone |= set(norm.nodes)
    return len(gone)


@dataclass(frozen=True)
class _OverChannels:
    """A norm over channels: its map, its weights or None, its parameters, and its nodes, the last one first."""

    x: fx.Node
    gamma: fx.Node | None
    beta: fx.Node | None
    norm: Cells
    nodes: list[fx.Node]


def _over_channels(node: Any, mesh: Mesh, on_cpu: bool) -> _OverChannels | None:
    """Return the norm over channels that ends at a node. Only on the CPU, weights may be computed, or beta present."""
    return _norm_of_cells(node, mesh) or _root_mean_square(node, mesh, on_cpu)


def _is_one_frame(squeezed: fx.Node) -> bool:
    """Whether a picture `[N, C, H, W]` is the only frame of a map `[N, C, 1, H, W]`."""
    clip: Any = squeezed.args[0]
    return squeezed.args[1] == [2] and len(clip.meta["shape"]) == 5 and len(squeezed.meta["shape"]) == 4


def _without_frames(x: fx.Node, squeezed: fx.Node) -> Any:
    """Return a map of one frame as a picture: the map before its unsqueeze, or a new squeeze in place of `squeezed`."""
    if x.target is aten.unsqueeze.default and x.args[1] == 2:
        return x.args[0]
    with x.graph.inserting_before(squeezed):
        picture = x.graph.call_function(aten.squeeze.dims, (x, [2]))
    picture.meta = {**x.meta, "shape": squeezed.meta["shape"]}
    return picture


def _norm_of_cells(node: Any, mesh: Mesh) -> _OverChannels | None:
    """Recognize `x / max(|x|, least) * factor * gamma`."""
    factor, gamma, gone, result = 1.0, None, [], node
    while _calls(node, aten.mul.Tensor, result):
        value: Any = node.args[1]
        if isinstance(value, fx.Node) and not (
            gamma is None and value.op == "get_attr" and _is_of_channels(value, node)
        ):
            return None
        gone.append(node)
        gamma, factor = (value, factor) if isinstance(value, fx.Node) else (gamma, factor * value)
        node = node.args[0]
    rounded = node if _calls(node, aten._to_copy.default, result) else None
    if rounded is not None:
        gone.append(rounded)
        node = rounded.args[0]
    if not _calls(node, aten.div.Tensor, result) or len(node.args) != 2:
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
    plain = plain and _keeps_form(x, result) and _fits(gamma, x.meta["shape"][1])
    nodes = gone if rounded is None else [*gone, wide]
    return _OverChannels(x, gamma, None, (float(least), 0.0, factor), nodes) if plain else None


def _root_mean_square(node: Any, mesh: Mesh, on_cpu: bool) -> _OverChannels | None:
    """Recognize `x / sqrt(mean(x^2) + eps) * gamma + beta`, whose quotient may be computed in fp32.

    Channels may be the last dim within the norm, then also of gamma and beta.
    """
    result, gone, last = node, list[fx.Node](), False
    weights: dict[Any, fx.Node | None] = {aten.add.Tensor: None, aten.mul.Tensor: None}
    for target in (aten.permute.default, aten.add.Tensor, aten.mul.Tensor, aten.permute.default):
        if not _calls(node, target, result) or (target is aten.add.Tensor and not on_cpu):
            continue
        if target is aten.permute.default:
            if last or node.args[1] != _moved(node, back=True):
                continue
            last = True
        elif not _is_weight(node, last, on_cpu):
            continue
        else:
            weights[target] = node.args[1]
        gone.append(node)
        node = node.args[0]
    beta, gamma = weights.values()
    rounded = node if _calls(node, aten._to_copy.default, result) else None
    if rounded is not None:
        gone.append(rounded)
        node = rounded.args[0]
    if not any(_calls(node, target, result) for target in (aten.mul.Tensor, aten.div.Tensor)) or len(node.args) != 2:
        return None
    x, length = node.args
    if not isinstance(x, fx.Node) or len(x.meta["shape"]) not in (4, 5):
        return None
    root = _ROOT if node.target is aten.mul.Tensor else aten.sqrt.default
    if not only_user(length, root) or not only_user(length.args[0], aten.add.Tensor) or length.args[0].kwargs:
        return None
    mean, eps = length.args[0].args
    if not only_user(mean, aten.mean.dim) or isinstance(eps, fx.Node) or mean.kwargs:
        return None
    square, dims, *keep = mean.args
    channel = len(x.meta["shape"]) - 1 if last else 1
    if not only_user(square, aten.pow.Tensor_Scalar) or square.args[1] != 2 or keep != [True]:
        return None
    if dims is None or [dim % len(x.meta["shape"]) for dim in dims] != [channel]:
        return None
    gone += [node, length, length.args[0], mean, square]
    source = square.args[0]
    if source is not x:
        if not only_user(source, aten._to_copy.default) or not is_cast(source, mesh) or source.args[0] is not x:
            return None
        gone.append(source)
    if not x.meta["dtype"].is_floating_point:
        return None
    dtype, wide = x.meta["dtype"], {inner.meta["dtype"] for inner in (source, node)}
    if rounded is not None and not (is_cast(rounded, mesh) and rounded.meta["dtype"] == dtype):
        return None
    if not wide <= {dtype, torch.float32} or (wide != {dtype} and dtype.itemsize > 2):
        return None  # it computes in a narrower dtype than the map's
    channels = x.meta["shape"][channel]
    if last:
        if x.target is not aten.permute.default or x.args[1] != _moved(x, back=False):
            return None
        gone.append(x)
        x = x.args[0]
    if not _keeps_form(x, result) or not all(_fits(weight, channels) for weight in (gamma, beta)):
        return None
    return _OverChannels(x, gamma, beta, (0.0, channels * float(eps), channels**0.5), gone)


def _is_weight(node: fx.Node, last: bool, on_cpu: bool) -> bool:
    """Whether a node multiplies by, or adds, one value per channel. Only on the CPU may these values be computed."""
    weight: Any = node.args[1]
    if len(node.args) != 2 or node.kwargs or not isinstance(weight, fx.Node) or weight.target is _ROOT:
        return False
    if weight.op != "get_attr" and not on_cpu:
        return False
    return len(weight.meta["shape"]) == 1 if last else _is_of_channels(weight, node)


def _calls(node: Any, target: Any, result: Any) -> bool:
    """Whether a node calls `target`. Unless it is the norm's result, it must have one user with it as one argument."""
    return only_user(node, target) or (node is result and isinstance(node, fx.Node) and node.target is target)


def _keeps_form(x: Any, result: Any) -> bool:
    """Whether a map and the norm's result have the same shape and dtype."""
    return isinstance(x, fx.Node) and same(x, result)


def _fits(gamma: Any, channels: int) -> bool:
    return gamma is None or math.prod(gamma.meta["shape"]) == channels


def _moved(node: fx.Node, back: bool) -> list[int]:
    """Return the permutation that moves a map's channels to the last dim, or back."""
    ndim = len(node.meta["shape"])
    return [0, ndim - 1, *range(1, ndim - 1)] if back else [0, *range(2, ndim), 1]


def _is_of_channels(weight: fx.Node, node: fx.Node) -> bool:
    """Whether a weight has one value per channel of a map, and broadcasts over it."""
    _, channels, *spatial = (*node.meta["shape"], 0, 0)[: max(2, len(node.meta["shape"]))]
    values = channels, *(1,) * len(spatial)
    return weight.meta["shape"] in (values, (1, *values))
