"""Normalize and activate maps into the next convolution's input: by Triton where it is, else by PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.device.kinds import HOSTS, Device
from halovae.distributed.transport import Scope
from halovae.kernels.native import Norms
from halovae.plane import backends, context, group_norms
from halovae.plane.tensor import is_channels_last

# For GroupNorm: the groups, eps, and the scope and counts of `group_norms.statistics`. For a norm over each cell's
# channels (`Cells`): the least divisor, the number added to the sum of squares, and a factor.
Cells = tuple[float, float, float]
Norm = tuple[int, float, Scope, tuple[int, ...]] | Cells
# An index into a map `[N, C, *]`: slices of its dims, items first.
Part = tuple[slice, ...]
WHOLE: Part = (slice(None),)
_VALUES = 2**18  # values of a map that are normalized at once


def write(
    x: Tensor, shift: Tensor | None, gamma: Tensor | None, beta: Tensor | None, norm: Norm | None, silu: bool,
    out: Tensor, found: Tensor | None = None, plus: Tensor | None = None,
) -> None:  # fmt: skip
    """Normalize and activate a map into memory.

    Args:
        x: this rank's shard `[N, C, *]`.
        shift: `[C]`, added to the map before.
        gamma: `[C]`, the norm's weight; for a norm over channels, any shape with C values.
        beta: the norm's bias, shaped as `gamma`; on accelerators not for a norm over channels.
        norm: None for no norm.
        silu: whether SiLU follows.
        out: of the map's shape and dtype; may be a view of a larger map.
        found: GroupNorm's variance and mean `[2, N, groups]`, if they are known.
        plus: of the map's shape and dtype. The sum with it, and with `shift`, replaces the map before.
    """
    writer(x, shift, gamma, beta, norm, silu, found, plus)(WHOLE, out)


def writer(
    x: Tensor,
    shift: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    norm: Norm | None,
    silu: bool,
    found: Tensor | None = None,
    plus: Tensor | None = None,
) -> Callable[[Part, Tensor], None]:
    """Return a function that normalizes and activates a part of a map into memory, as `write` does.

    GroupNorm's statistics, of all ranks' shards, are computed before this returns, unless they are already `found`.
    With `plus`, each cell must be in one part.
    """
    fused = backends.kernels(x.device.type)
    if plus is not None and (fused is None or found is not None or not fused.adds(x, plus)):
        sum_of(x, plus, shift, x)
        plus = shift = None
    if fused is not None and norm is not None and len(norm) == 4:
        groups, eps, scope, counts = norm
        moments = group_norms.statistics(x, groups, scope, counts, shift, plus) if found is None else found
        left = shift if plus is None else None
        return lambda part, out: fused.group_norm(x[part], left, moments[:, part[0]], gamma, beta, eps, silu, out)
    if fused is not None and plus is not None:
        return lambda part, out: fused.norm_of_cells(x[part], shift, gamma, norm, silu, out, plus[part])
    if fused is not None:
        return lambda part, out: fused.norm_of_cells(x[part], shift, gamma, norm, silu, out)
    x = x if shift is None else x + per_channel(shift, x)
    if norm is not None and len(norm) == 3:
        least, added, factor = norm
        scale = torch.full(x.shape[1:2], factor, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        scale = scale if gamma is None else scale * gamma.flatten().to(scale.dtype)
        return lambda part, out: _normalize_cells(x[part], scale, beta, least, added, silu, out)
    if norm is not None:
        factors, terms = _factors_and_terms(x, gamma, beta, norm, found)
        # Cost traces run on meta tensors, and see the operators within this one.
        normalized = torch.ops.halovae.normalize_groups if x.device.type == "cpu" else _normalize_groups
        return lambda part, out: normalized(x[part], factors[part[0]], terms[part[0]], silu, out)

    def write(part: Part, out: Tensor) -> None:
        out.copy_(x[part])
        if silu:
            F.silu(out, inplace=True)

    return write


def activated(
    x: Tensor, shift: Tensor | None, gamma: Tensor | None, beta: Tensor | None, norm: Norm | None, silu: bool,
    spare: bool, found: Tensor | None = None, plus: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Normalize and activate a map into new memory, or in place if the map is `spare` and that is not slower.

    With `plus`, the sum of the map, `plus`, and `shift` replaces the map first.
    """
    fused = backends.kernels(x.device.type) is not None
    if plus is not None and not fused:
        sum_of(x, plus, shift, x)
        plus = shift = None
    if shift is not None and not fused:
        x, shift, spare = x + per_channel(shift, x), None, True
    if norm is None and shift is None and plus is None:
        return F.silu(x, inplace=spare) if silu else x
    if fused or norm is None or len(norm) == 3:
        out = x if spare and is_dense(x) else empty_like(x)
        write(x, shift, gamma, beta, norm, silu, out, found, plus)
        return out
    if spare and context.kind_of(x) == "cpu" and (x.is_meta or is_channels_last(x)):
        write(x, None, gamma, beta, norm, silu, x, found)
        return x
    groups, eps, scope, counts = norm
    if found is not None:
        x = group_norms.normalized_groups(x, found, gamma, beta, groups, eps)
    elif counts:
        x = group_norms.group_norm(x, gamma, beta, groups, eps, scope, counts)
    else:
        x = group_norms.whole_group_norm(x, groups, gamma, beta, eps)
    return F.silu(x, inplace=True) if silu else x


def _factors_and_terms(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    norm: tuple[int, float, Scope, tuple[int, ...]],
    found: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return GroupNorm's factors of each item's channels, `[N, C]`, and its terms, `[N, C]`."""
    groups, eps, scope, counts = norm
    items, channels = x.shape[:2]
    found = group_norms.statistics(x, groups, scope, counts) if found is None else found
    variance, mean = found.unbind()
    shape = (items, groups, channels // groups)
    scale = (variance + eps).rsqrt().unsqueeze(-1).expand(shape).reshape(items, channels)
    scale = scale if gamma is None else scale * gamma.to(scale.dtype)
    shift = mean.unsqueeze(-1).expand(shape).reshape(items, channels) * -scale
    return scale, shift if beta is None else shift + beta.to(shift.dtype)


def _normalize_groups(x: Tensor, scale: Tensor, shift: Tensor, silu: bool, out: Tensor) -> None:
    """Write `x * scale + shift`, per item and channel, to `out`; then SiLU."""
    loops, source, result = _loops(x, out)
    if loops is not None and not x.is_meta:
        loops.scale_and_shift(source, scale, shift, silu, result)
        return

    def write(item: int, source: Tensor, result: Tensor) -> None:
        torch.addcmul(shift[item], source, scale[item], out=result)

    _in_parts(x, scale.dtype, write, silu, out)


def _normalize_cells(
    x: Tensor, scale: Tensor, beta: Tensor | None, least: float, added: float, silu: bool, out: Tensor
) -> None:
    """Divide each cell's channels by their Euclidean norm, times `scale`, plus `beta`; then SiLU; into `out`.

    The compiled kernel is one loop: 96 channels of 4 x 128 x 128 cells take 11 ms. PyTorch's operators, some rows at a
    time, take 16 ms in fp32 and 18 in bf16 (one thread, AVX-512, torch 2.13).
    """
    loops, source, result = _loops(x, out)
    if loops is not None and beta is None and (least == 0 or least**2 >= torch.finfo(scale.dtype).tiny):
        loops.normalize(source, scale, added, least**2, silu, result)
        return

    def write(item: int, source: Tensor, result: Tensor) -> None:
        length = torch.linalg.vector_norm(source, dim=-1, keepdim=True)
        if added:
            length = length.square_().add_(added).sqrt_()
        length.clamp_min_(least)
        torch.div(source, length, out=result)
        result.mul_(scale)
        if beta is not None:
            result.add_(beta.flatten())

    _in_parts(x, scale.dtype, write, silu, out)


def _loops(x: Tensor, out: Tensor) -> tuple[Norms | None, Tensor, Tensor]:
    """Return the single-loop norms if they can read a map and write to `out`; and both with channels last."""
    norms = context.current_kernels(x)[0].norms
    source, result = x.movedim(1, -1), out.movedim(1, -1)
    matching = x.dtype == out.dtype and x.shape == out.shape
    supported = norms is not None and matching and norms.takes(source) and norms.takes(result)
    return norms if supported else None, source, result


def empty_like(x: Tensor) -> Tensor:
    """Allocate a map, channels last where the device has that."""
    if x.device.type not in HOSTS:
        return torch.empty_like(x, memory_format=Device(x.device).layout(x.ndim))
    return context.empty_map(x, x.shape)


def _in_parts(
    x: Tensor, dtype: torch.dtype, write: Callable[[int, Tensor, Tensor], None], silu: bool, out: Tensor
) -> None:
    """Normalize and activate a map `[N, C, *]` into `out`, in `dtype`, rounded once.

    Some rows at a time, so that they stay in a core's cache between operators: GroupNorm and SiLU of 128 x 256 x 256
    take 23 ms, where PyTorch's operators one after the other take 60 and one loop takes 11 (fp32, one thread, torch
    2.13).

    Args:
        x: the map.
        dtype: to compute in.
        write: normalizes rows of an item, channels last, into memory; takes the item's index, source, and target.
        silu: whether SiLU follows.
        out: of the map's shape.
    """
    if not x.numel():
        return
    values = _VALUES if x.device.type == "cpu" else x.numel()
    rows = max(1, values * x.shape[-2] // x[0].numel())
    # Reused for all rows: the system would clear fresh memory each time.
    memory = None if out.dtype == dtype else x.new_empty(x[0, ..., :rows, :].numel(), dtype=dtype)
    for start in range(0, x.shape[-2], rows):
        span = (..., slice(start, start + rows), slice(None))
        for item, (rows_of_x, target) in enumerate(zip(x[span], out[span], strict=True)):
            source, result = rows_of_x.movedim(0, -1), target.movedim(0, -1)
            wide = result
            if memory is not None:
                source = wide = memory[: source.numel()].view(source.shape).copy_(source)
            write(item, source, wide)
            if silu:
                F.silu(wide, inplace=True)
            if memory is not None:
                result.copy_(wide)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Reshape values `[C]` to broadcast over a map `[N, C, *]`."""
    return values.view(-1, *(1,) * (x.ndim - 2))


def is_dense(x: Tensor) -> bool:
    """Whether a map is channels last and has no gaps. True for meta tensors."""
    return x.is_meta or x.is_contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def sum_of(x: Tensor, y: Tensor | None, bias: Tensor | None, out: Tensor) -> Tensor:
    """Add two maps of one shape and a bias `[C]`, where they are given, into `out`, which may be one of the maps."""
    fused = backends.kernels(x.device.type)
    if fused is not None and bias is not None and fused.adds(*((x, out) if y is None else (x, y, out))):
        fused.add(x, y, bias, out)
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if bias is None else x.to(wide) + per_channel(bias, x)
    return out.copy_(total if y is None else total + y)


_library = torch.library.Library("halovae", "FRAGMENT")  # why a custom operator: see `moments`
_library.define("normalize_groups(Tensor x, Tensor scale, Tensor shift, bool silu, Tensor(a!) out) -> ()")
_library.impl("normalize_groups", _normalize_groups, "CPU")
