"""Means and variances of the groups of a map, and of several ranks' groups together."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from halovae.kernels.native import Norms, compiled
from halovae.plane import backends
from halovae.plane.tensor import is_channels_last

# Values of a map whose statistics are computed at once, but for groups that are larger: as many as a core's cache
# holds, and so many that an accelerator is busy.
_VALUES_ON_CPU, _VALUES = 2**18, 2**24


def moments(
    x: Tensor, groups: int, dtype: torch.dtype, shift: Tensor | None = None, norms: Norms | None = None
) -> Tensor:  # fmt: skip
    """Variance and mean `[2, N, groups]`. Some groups at once, so that there is no wide copy of all of them.

    A `shift` `[C]` is added before where there are kernels of our own. Norms that are one loop are used on the CPU.
    """
    fused = backends.kernels(x.device.type)
    if fused is not None and (shift is not None or is_channels_last(x)):
        found: Tensor = fused.moments(x, shift, groups)
        return found
    if x.device.type == "cpu" and is_channels_last(x):
        cells = x.movedim(1, -1)
        is_loop = norms is not None and cells.is_contiguous() and norms.takes(cells)
        whole: Tensor = torch.ops.halovae.moments(x, groups, dtype, is_loop)
        return whole
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    limit = _VALUES_ON_CPU if x.device.type == "cpu" else _VALUES
    step = max(1, limit // (grouped[:, 0].numel() or 1))
    parts = [_variance_and_mean(one.to(dtype)) for one in grouped.split(step, 1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _variance_and_mean(x: Tensor) -> Tensor:
    """Variance and mean `[2, *]` over the last dim, in two passes on the CPU.

    `torch.var_mean` of `[1, 32, 32768]` takes 6.9 ms there (one thread, torch 2.13), two passes 0.5 ms.
    """
    if x.device.type != "cpu":
        return torch.stack(torch.var_mean(x, -1, correction=0))
    mean = x.mean(-1)
    return torch.stack(((x - mean.unsqueeze(-1)).square_().mean(-1), mean))


def _of_channels_last(x: Tensor, groups: int, dtype: torch.dtype, is_loop: bool) -> Tensor:
    """The same where the channels of a cell lie together: of each channel, over some cells at once, then together."""
    norms = compiled().norms if is_loop else None
    if norms is not None:
        return _of_groups(norms.moments(x.movedim(1, -1)), groups)
    cells = x.movedim(1, -1).flatten(1, -2)
    parts = cells.split(max(1, _VALUES_ON_CPU // (x.shape[0] * x.shape[1])), 1)
    found = torch.empty((len(parts), 2, x.shape[0], x.shape[1]), dtype=dtype, device=x.device)
    # Written over for each part: fresh memory, which the system clears, can take three times as long as the arithmetic.
    memory = torch.empty_like(parts[0], dtype=dtype)
    for part, (square, mean) in zip(parts, found, strict=True):
        apart = memory[:, : part.shape[1]]
        wide = part if part.dtype == dtype else apart.copy_(part)
        torch.mean(wide, 1, out=mean)
        torch.sub(wide, mean.unsqueeze(1), out=apart)
        torch.mean(apart.square_(), 1, out=square)
    return _of_groups(together(found, tuple(part.shape[1] for part in parts)), groups)


def _of_groups(found: Tensor, groups: int) -> Tensor:
    """Of groups of channels, what is known of each channel, `[2, N, C]`."""
    apart = found.unflatten(2, (groups, -1)).movedim(-1, 0)
    return together(apart, (1,) * len(apart))


def together(parts: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Variance and mean `[2, *]` of values whose parts have these, `[parts, 2, *]` (Chan et al. 1983)."""
    fused = backends.kernels(parts.device.type)
    if fused is not None:
        found: Tensor = fused.together(parts, _shares(counts, parts.dtype, parts.device))
        return found
    variances, means = parts.unbind(1)
    mean = average(means, counts)
    apart = means - mean
    # Small operators: on an accelerator each takes as long as a large one takes to be queued.
    return torch.stack((average(torch.addcmul(variances, apart, apart), counts), mean))


def average(x: Tensor, counts: tuple[int, ...]) -> Tensor:
    """The average over the first dim, by how much each of its entries stands for."""
    if len(set(counts)) == 1:
        return x.mean(0)
    return (x * _shares(counts, x.dtype, x.device)).sum(0)


@lru_cache(maxsize=256)
def _shares(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    total = sum(counts)
    with torch.inference_mode(False), no_dispatch():  # it outlives the call
        return torch.tensor([count / total for count in counts], dtype=dtype, device=device).view(-1, 1, 1)


# An operator, so that dispatch modes, such as the memory meter, see one call and not its many small ones.
_library = torch.library.Library("halovae", "FRAGMENT")
_library.define("moments(Tensor x, int groups, ScalarType dtype, bool is_loop) -> Tensor")
_library.impl("moments", _of_channels_last, "CPU")
