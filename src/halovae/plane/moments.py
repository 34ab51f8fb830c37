"""Mean and variance of groups of channels, of one map and combined over ranks."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from halovae.kernels.native import Norms, compiled
from halovae.plane import backends
from halovae.plane.tensor import is_channels_last

# Values whose statistics are computed at once, unless a single group is larger: as many as a core's cache holds, and
# enough to keep an accelerator busy.
_VALUES_ON_CPU, _VALUES = 2**18, 2**24


def moments(
    x: Tensor, groups: int, dtype: torch.dtype, shift: Tensor | None = None, norms: Norms | None = None,
    plus: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return variance and mean `[2, N, groups]`, some groups at a time to avoid a wide copy of the whole map.

    Args:
        x: `[N, C, *]`.
        groups: the number of groups.
        dtype: of the result, and to compute in.
        shift: `[C]`, added to the map before; only used by Triton kernels.
        norms: single-loop norms to use on the CPU.
        plus: of the map's shape; the sum replaces the map before; only used by Triton kernels.
    """
    fused = backends.kernels(x.device.type)
    if fused is not None and backends.takes(x):
        result: Tensor = fused.moments(x, shift, groups, plus)
        return result
    if x.device.type == "cpu" and is_channels_last(x):
        cells = x.movedim(1, -1)
        is_loop = norms is not None and cells.is_contiguous() and norms.takes(cells)
        whole: Tensor = torch.ops.halovae.moments(x, groups, dtype, is_loop)
        return whole
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    limit = _VALUES_ON_CPU if x.device.type == "cpu" else _VALUES
    step = max(1, limit // (grouped[:, 0].numel() or 1))
    parts = [_variance_and_mean(part.to(dtype)) for part in grouped.split(step, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _variance_and_mean(x: Tensor) -> Tensor:
    """Return variance and mean `[2, *]` over the last dim, in two passes on the CPU.

    `torch.var_mean` of `[1, 32, 32768]` takes 6.9 ms there (one thread, torch 2.13), two passes 0.5 ms.
    """
    if x.device.type != "cpu":
        return torch.stack(torch.var_mean(x, -1, correction=0))
    mean = x.mean(-1)
    return torch.stack(((x - mean.unsqueeze(-1)).square_().mean(-1), mean))


def _of_channels_last(x: Tensor, groups: int, dtype: torch.dtype, is_loop: bool) -> Tensor:
    """Compute `moments` of a channels-last map: of each channel, over some cells at a time, then of groups."""
    norms = compiled().norms if is_loop else None
    if norms is not None:
        return _of_groups(norms.moments(x.movedim(1, -1)), groups)
    cells = x.movedim(1, -1).flatten(1, -2)
    parts = cells.split(max(1, _VALUES_ON_CPU // (x.shape[0] * x.shape[1])), 1)
    results = torch.empty((len(parts), 2, x.shape[0], x.shape[1]), dtype=dtype, device=x.device)
    # Reused for each part: fresh memory, which the system clears, can take three times as long as the arithmetic.
    memory = torch.empty_like(parts[0], dtype=dtype)
    for part, (variance, mean) in zip(parts, results, strict=True):
        deviation = memory[:, : part.shape[1]]
        wide = part if part.dtype == dtype else deviation.copy_(part)
        torch.mean(wide, 1, out=mean)
        torch.sub(wide, mean.unsqueeze(1), out=deviation)
        torch.mean(deviation.square_(), 1, out=variance)
    return _of_groups(together(results, tuple(part.shape[1] for part in parts)), groups)


def _of_groups(channels: Tensor, groups: int) -> Tensor:
    """Combine variance and mean of channels, `[2, N, C]`, to those of groups."""
    members = channels.unflatten(2, (groups, -1)).movedim(-1, 0)
    return together(members, (1,) * len(members))


def together(parts: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Combine variances and means of parts, `[parts, 2, *]`, to those of all values, `[2, *]` (Chan et al. 1983)."""
    fused = backends.kernels(parts.device.type)
    if fused is not None:
        result: Tensor = fused.together(parts, _shares(counts, parts.dtype, parts.device))
        return result
    variances, means = parts.unbind(1)
    mean = average(means, counts)
    deviation = means - mean
    # Few operators: on an accelerator, small ones take as long as it takes to launch them.
    return torch.stack((average(torch.addcmul(variances, deviation, deviation), counts), mean))


def average(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Average over the first dim, weighted by the number of values behind each entry."""
    if len(set(counts)) == 1:
        return x.mean(0)
    return (x * _shares(counts, x.dtype, x.device)).sum(0)


@lru_cache(maxsize=256)
def _shares(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    total = sum(counts)
    with torch.inference_mode(False), no_dispatch():  # the cached tensor outlives the call
        return torch.tensor([count / total for count in counts], dtype=dtype, device=device).view(-1, 1, 1)


# A custom operator, so that dispatch modes, such as the memory meter, see one call and not many small ones.
_library = torch.library.Library("halovae", "FRAGMENT")
_library.define("moments(Tensor x, int groups, ScalarType dtype, bool is_loop) -> Tensor")
_library.impl("moments", _of_channels_last, "CPU")
