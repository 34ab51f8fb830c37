"""GroupNorm of partitioned maps: statistics of all ranks' shards, and the map that they normalize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.device.kinds import Device
from halovae.distributed.transport import Scope
from halovae.plane import backends
from halovae.plane.context import current, current_kernels, kind_of
from halovae.plane.moments import moments, together
from halovae.plane.tensor import is_channels_last


def whole_group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """GroupNorm of a map that this rank has all of. By moments, the error of a channels-last one in fp32 is 9e-7.

    PyTorch's own (2.13, CPU) has 3e-4 (128 channels, 9 x 128 x 128 cells, a mean of 3 deviations), and takes as long.
    """
    if (fused := backends.kernels(x.device.type)) is not None and backends.takes(x):
        return _normalized(x, fused.moments(x, None, groups), weight, bias, eps)
    if not is_channels_last(x):
        return F.group_norm(x, groups, weight, bias, eps)
    if kind_of(x) != "cpu" or x.dtype.itemsize < 4:
        return F.group_norm(x, groups, weight, bias, eps)
    if len(x) == 1:
        return _by_batch_norm(x, statistics(x, groups, "plane", ()), groups, weight, bias, eps)
    out = torch.empty_like(x)
    for one, into in zip(x.split(1), out.split(1), strict=True):
        into.copy_(whole_group_norm(one, groups, weight, bias, eps))
    return out


def gather(x: Tensor, scope: Scope, ranks: int) -> Tensor:
    """Gather every rank's small tensor: `[ranks, *x.shape]`, in the order of the ranks of a scope."""
    mesh, own = current(), x.contiguous().view(-1)
    mesh.traffic.sent(own, times=ranks - 1)
    with mesh.traffic.waiting.running():
        everyone = mesh.transport.all_gather(scope, own, ranks)
    mesh.traffic.calls += 1
    return torch.stack(everyone).view(ranks, *x.shape)


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scope: Scope,
    counts: tuple[int, ...],
) -> Tensor:
    """GroupNorm of a partitioned map: each rank's mean and squared deviation are combined (Chan et al. 1983).

    Args:
        x: this rank's shard `[N, C, *]`.
        weight: `[C]`.
        bias: `[C]`.
        groups: number of groups of channels that share statistics.
        eps: added to the variance.
        scope: the ranks that have shards: "rows", "cols" or "plane".
        counts: number of values of one group on each of these ranks.
    """
    return normalized_groups(x, statistics(x, groups, scope, counts), weight, bias, groups, eps)


def own_statistics(x: Tensor, groups: int) -> Tensor:
    """Return variance and mean `[2, N, groups]` of the groups of this rank's shard `[N, C, *]`, in fp32 at least."""
    return statistics(x, groups, "plane", ())


def combined(everyone: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Return variance and mean `[2, N, groups]` over all ranks, given each one's and its number of values."""
    return together(everyone, counts)


def normalized_groups(
    x: Tensor, found: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    """GroupNorm of a rank's shard `[N, C, *]` with the statistics that `combined` found."""
    if backends.kernels(x.device.type) is not None and backends.takes(x):
        return _normalized(x, found, weight, bias, eps)
    return _by_batch_norm(x, found, groups, weight, bias, eps)


def _by_batch_norm(
    x: Tensor, found: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    items, channels = x.shape[:2]
    wide, shape = torch.promote_types(x.dtype, torch.float32), (2, items, groups, channels // groups)
    variance, mean = found.unsqueeze(-1).expand(shape).reshape(2, -1).unbind()
    weight, bias = (None if one is None else one.to(wide) for one in (weight, bias))
    if items > 1:
        weight, bias = (None if one is None else one.repeat(items) for one in (weight, bias))
    result = F.batch_norm(x.reshape(1, -1, *x.shape[2:]), mean, variance, weight, bias, eps=eps)
    return result.view(x.shape)


def statistics(
    x: Tensor, groups: int, scope: Scope, counts: tuple[int, ...], shift: Tensor | None = None,
    plus: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return variance and mean `[2, N, groups]` of the groups of a map over all ranks' shards, in fp32 at least.

    Args:
        x: this rank's shard `[N, C, *]`.
        groups: number of groups of channels.
        scope: the ranks that have shards.
        counts: number of values of one group on each of these ranks; empty if this rank has all of them.
        shift: `[C]`, added to the map first, on devices with kernels of our own.
        plus: of the map's shape, also only there: the sum of all three replaces the map first.
    """
    norms = current_kernels(x)[0].norms
    own = moments(x, groups, torch.promote_types(x.dtype, torch.float32), shift, norms, plus)
    return together(gather(own, scope, len(counts)), counts) if counts else own


def _normalized(x: Tensor, found: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    out = torch.empty_like(x, memory_format=Device(x.device).layout(x.ndim))
    backends.kernels(x.device.type).group_norm(x, None, found, weight, bias, eps, False, out)
    return out
