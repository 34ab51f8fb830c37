"""Normalizations. Statistics over the plane are reduced over its ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from halovae.plane import group_norms
from halovae.plane.layout import is_partitioned, local_shape
from halovae.plane.rules.registry import plain, rule
from halovae.plane.tensor import PlaneTensor

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


@rule(aten.native_group_norm)
def group_norm(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each rank normalizes its shard with the statistics of all ranks; a map on one rank runs PyTorch's own."""
    x, weight, bias, _, channels, _, groups, eps = args
    weight, bias = plain(weight), plain(bias)
    if isinstance(weight, PlaneTensor) or isinstance(bias, PlaneTensor):
        return NotImplemented
    if torch.Size(x.shape[1:]).numel() == groups:
        return NotImplemented  # groups of one value: PyTorch raises an error for a shard of one item
    x = plane.replicate(x, [1])
    local, own = x.local, x.local.shape[0]
    mesh_dims = {factor.mesh_dim for dim in x.partition[2:] for factor in dim if factor.mesh_dim is not None}
    if not mesh_dims:
        result = plane.run(group_norms.whole_group_norm, local, groups, weight, bias, eps)
    else:
        scope, _ = plane.scope(mesh_dims)
        counts = []
        for place in plane.places(mesh_dims):
            _, _, *sizes = local_shape(x.partition, {**plane.coordinates, **place})
            counts.append(torch.Size(sizes).numel() * (channels // groups))
        plane.received += (len(counts) - 1) * 2 * own * groups * max(4, local.element_size())
        if plane.strips is None:
            result = plane.run(group_norms.group_norm, local, weight, bias, groups, eps, scope, tuple(counts))
        else:  # a strip keeps no map while it waits for the others' statistics
            everyone = plane.gather(plane.run(group_norms.own_statistics, local, groups), mesh_dims)
            found = plane.run(group_norms.combined, everyone, tuple(counts))
            result = plane.run(group_norms.normalized_groups, local, found, weight, bias, groups, eps)
    # The operator also returns statistics, which only training needs.
    return plane.wrap(result, x.partition), None, None


@rule(aten.native_layer_norm, aten._fused_rms_norm, aten.rms_norm)
def layer_norm(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Norms over the last dims, which are replicated."""
    x, normalized, *rest = args
    rest = [plain(one) for one in rest]
    if any(isinstance(one, PlaneTensor) for one in rest):
        return NotImplemented
    x = plane.replicate(x, range(x.ndim - len(normalized), x.ndim))
    result = func(x.local, normalized, *rest, **kwargs)
    if isinstance(result, tuple):
        return plane.wrap(result[0], x.partition), *(None for _ in result[1:])
    return plane.wrap(result, x.partition)


@rule(aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten._batch_norm_impl_index)
def batch_norm(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Norms with given statistics."""
    x, *rest = args
    rest = [plain(one) for one in rest]
    training = func._schema.name != "aten::_native_batch_norm_legit_no_training" and rest[4]
    if training or any(isinstance(one, PlaneTensor) for one in rest) or is_partitioned(x.partition[1]):
        return NotImplemented
    result = func(x.local, *rest, **kwargs)
    return plane.wrap(result[0], x.partition), *result[1:]
