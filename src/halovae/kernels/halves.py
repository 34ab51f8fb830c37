"""Products in half precision, on CPUs that have no units for them: computed in fp32 and rounded once.

PyTorch (2.13) has plain loops there. A convolution of 384 to 384 channels, 3 x 3, of 32 x 32 cells takes 0.26 to 4 s in
bf16, by the layout, and 0.04 s by way of fp32; 4096 x 384 times 384 x 384 takes 150 and 20 ms (AVX2, one thread).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from halovae.device.kinds import Device

_VALUES = 2**21  # that are there in fp32 at once
# Weights are heavy if they have so many times the values of a map, by its dims in space and time.
_HEAVIER = {2: 6, 3: 3}
_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_BF16_UNITS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")  # of x86, as `torch.cpu.get_capabilities` names them


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies a dtype as fast as fp32: oneDNN supports it, and there are instructions for it.

    oneDNN also supports bf16 on CPUs with AVX-512 that lack them (Skylake, Cascade Lake), by widening each value. A
    convolution of 96 to 96 channels, 6 x 66 x 66 cells, takes 291 ms there, and 64 ms by way of fp32 (one thread).
    """
    if dtype not in _ASKED:
        return True
    supported: Any = getattr(torch.ops.mkldnn, _ASKED[dtype], None)  # there is none in builds without oneDNN
    if supported is None or not supported():
        return False
    ask: Any = getattr(torch.cpu, "get_capabilities", None)  # torch 2.8 has none
    known = ask() if ask is not None and dtype == torch.bfloat16 else {}
    return known.get("architecture") != "x86_64" or any(known.get(name) for name in _BF16_UNITS)


def multiplied(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """What an operator returns, with tensors of half precision as fp32 while it runs where that is faster.

    Args:
        operator: a convolution or a matrix product.
        arguments: its own.

    Returns:
        The result in the dtype of the first tensor.
    """
    first = next(one for one in arguments if isinstance(one, Tensor))
    dtype = first.dtype
    if first.device.type != "cpu" or has_units(dtype):
        return operator(*arguments)
    wide = [one.float() if isinstance(one, Tensor) and one.dtype == dtype else one for one in arguments]
    return operator(*wide).to(dtype)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """`aten.convolution`, in 3-D and fp32 on the CPU always by oneDNN; some rows at a time where a device has a limit.

    PyTorch (2.13, `use_mkldnn` in ATen/native/Convolution.cpp) takes a loop of its own with one thread where N, C, T
    and H together are at most 20,480, as for few rows. It took up to 9 times as long, and copies each cell for each
    cell of the kernel: 27 times the map.
    """
    given = stride, padding, dilation, transposed, output_padding, groups
    cells = Device(x.device).convolution_cells
    if cells is None or transposed or x.ndim < 4:
        return _convolution(x, weight, bias, *given)
    reach = (weight.shape[-2] - 1) * dilation[-2] + 1
    height, (step, around) = x.shape[-2], (stride[-2], padding[-2])
    rows = (height + 2 * around - reach) // step + 1
    cols = (x.shape[-1] + 2 * padding[-1] - (weight.shape[-1] - 1) * dilation[-1] - 1) // stride[-1] + 1
    if rows * cols <= cells:
        return _convolution(x, weight, bias, *given)
    parts, flat = [], (stride, (*padding[:-2], 0, padding[-1]), *given[2:])
    for start in range(0, rows, most := max(1, cells // cols)):
        first, last = start * step - around, (min(start + most, rows) - 1) * step - around + reach
        part = _rows(x, first, last, x.dtype)
        parts.append(_convolution(part, weight, bias, *flat))
    return torch.cat(parts, -2)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    if not transposed and _is_worth_moving(x, weight):
        moved = _convolution(x.contiguous(), weight, bias, stride, padding, dilation, False, output_padding, groups)
        return moved.contiguous(memory_format=_form(x))
    known = (x.device.type, x.ndim, transposed) == ("cpu", 5, False)
    known = known and {one.dtype for one in (x, weight, bias) if one is not None} == {torch.float32}
    if known and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        bias = bias if bias is None else bias.contiguous()  # it is read as it lies
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    result: Tensor = torch.ops.aten.convolution.default(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )
    return result


def _is_worth_moving(x: Tensor, weight: Tensor) -> bool:
    """Whether a map that lies channels last is convolved faster the other way, copies of map and result included.

    PyTorch (2.13) lays out the weights as the map, and oneDNN does so once more. Where the map is the smaller one that
    takes most of the time. 512 to 512 channels, 3 x 3, of 8 x 8 cells take 15 ms channels last and 4 the other way;
    1024 to 1024, 3 x 3 x 3, of 5 x 16 x 16 cells 612 and 425; 512 of 32 x 32 39 and 46 (fp32, one thread, AVX-512).
    """
    heavy = weight.numel() >= _HEAVIER.get(x.ndim - 2, math.inf) * x.numel()
    last = x.device.type == "cpu" and x.stride(1) == 1 and not x.is_contiguous()  # one of 1 x 1 cells is both
    return heavy and last and weight.is_contiguous()


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """What PyTorch's counter of FLOPs does not know (2.13)."""
    return conv_flop_count(list(x), list(weight), list(out_shape))


if torch.ops.aten.mkldnn_convolution not in flop_registry:
    register_flop_formula(torch.ops.aten.mkldnn_convolution)(_flops)


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """A convolution of stride 1; by way of fp32, some rows at a time.

    Args:
        x: `[N, C, *, H, W]`.
        weight: `[C', C / groups, *]`.
        bias: `[C']`.
        padding: of each spatial dim, with zeros.
        dilation: of each spatial dim.
        groups: of channels.
    """
    ones, zeros = [1] * len(padding), [0] * len(padding)

    def convolve(part: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
        return convolution(part, weight, bias, ones, list(padding), list(dilation), False, zeros, groups)

    if x.device.type != "cpu" or has_units(x.dtype):
        return convolve(x, weight, bias, padding)
    reach, around = (weight.shape[-2] - 1) * dilation[-2], padding[-2]
    height = x.shape[-2]

    def rows(start: int, stop: int) -> Tensor:
        """Rows of the result."""
        first, last = start - around, stop - around + reach
        part = _rows(x, first, last, torch.float32)
        return convolve(part, wide, bias if bias is None else bias.float(), (*padding[:-2], 0, padding[-1]))

    wide = weight.float()
    values = x[:, 0, ..., :1, :].numel() * max(x.shape[1], weight.shape[0])
    return _in_rows(rows, height + 2 * around - reach, values, x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` over the channels, which lie together, of a map `[N, C, *, H, W]`; by fp32, some rows at a time."""
    if x.device.type != "cpu" or has_units(x.dtype):
        return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
    wide, wide_bias = weight.float(), None if bias is None else bias.float()

    def rows(start: int, stop: int) -> Tensor:
        return F.linear(x[..., start:stop, :].movedim(1, -1).float(), wide, wide_bias).movedim(-1, 1)

    return _in_rows(rows, x.shape[-2], x[:, 0, ..., :1, :].numel() * max(weight.shape), x.dtype)


def _in_rows(rows: Callable[[int, int], Tensor], height: int, values: int, dtype: torch.dtype) -> Tensor:
    """What `rows` gives from one row to another, joined and rounded.

    Args:
        rows: makes some of the result's rows.
        height: how many there are.
        values: in a row, of what is there in fp32 meanwhile.
        dtype: of the result.
    """
    step = max(1, _VALUES // max(1, values))
    if step >= height:
        return rows(0, height).to(dtype)
    result = None
    for start in range(0, height, step):
        part = rows(start, min(height, start + step))
        if result is None:
            sizes = (*part.shape[:-2], height, part.shape[-1])
            result = torch.empty(sizes, dtype=dtype, memory_format=_form(part))
        result[..., start : start + step, :].copy_(part)
    assert result is not None
    return result


def _rows(x: Tensor, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows of a map, and zeros where there are none. The layout stays, which `F.pad` does not keep for one item."""
    low, high = min(max(first, 0), x.shape[-2]), min(max(last, 0), x.shape[-2])
    inner = x[..., low:high, :]
    if high - low == last - first:
        return inner.to(dtype)
    before = max(0, min(last, 0) - first)
    sizes = (*x.shape[:-2], last - first, x.shape[-1])
    part = torch.empty(sizes, dtype=dtype, device=x.device, memory_format=_form(x))
    part[..., :before, :].zero_()
    part[..., before + high - low :, :].zero_()
    part[..., before : before + high - low, :].copy_(inner)
    return part


def _form(x: Tensor) -> torch.memory_format:
    """Channels last where a map lies so."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim] if x.stride(1) == 1 else torch.contiguous_format
