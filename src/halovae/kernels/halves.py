"""Convolutions and matrix products in half precision on CPUs without units for it: computed in fp32 and rounded once.

PyTorch (2.13) uses plain loops there. A convolution of 384 to 384 channels, 3 x 3, of 32 x 32 cells takes 0.26 to 4 s
in bf16, depending on the layout, and 0.04 s in fp32; 4096 x 384 times 384 x 384 takes 150 and 20 ms (AVX2, one thread).
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

_VALUES = 2**21  # fp32 values in memory at once
# Weights are heavy if they have this many times the values of the map, by the number of dims in space and time.
_HEAVIER = {2: 6, 3: 3}
_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
_BF16_UNITS = ("avx512_bf16", "amx_bf16", "avx_ne_convert")  # of x86, as `torch.cpu.get_capabilities` names them


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies a dtype as fast as fp32: oneDNN supports it, and the CPU has instructions for it.

    oneDNN also supports bf16 on AVX-512 CPUs without such instructions (Skylake, Cascade Lake), by widening each value.
    A convolution of 96 to 96 channels, 6 x 66 x 66 cells, takes 291 ms there, and 64 ms in fp32 (one thread).
    """
    if dtype not in _ASKED:
        return True
    supported: Any = getattr(torch.ops.mkldnn, _ASKED[dtype], None)  # missing in builds without oneDNN
    if supported is None or not supported():
        return False
    get: Any = getattr(torch.cpu, "get_capabilities", None)  # missing in torch 2.8
    capabilities = get() if get is not None and dtype == torch.bfloat16 else {}
    return capabilities.get("architecture") != "x86_64" or any(capabilities.get(name) for name in _BF16_UNITS)


def multiplied(operator: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Run an operator, with half-precision tensors converted to fp32 where that is faster.

    Args:
        operator: a convolution or a matrix product.
        arguments: the operator's arguments.

    Returns:
        The result in the dtype of the first tensor.
    """
    first = next(value for value in arguments if isinstance(value, Tensor))
    dtype = first.dtype
    if first.device.type != "cpu" or has_units(dtype):
        return operator(*arguments)
    wide = [value.float() if isinstance(value, Tensor) and value.dtype == dtype else value for value in arguments]
    return operator(*wide).to(dtype)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """Compute `aten.convolution`: by oneDNN in 3-D and fp32 on the CPU, in row blocks where a device has a limit.

    PyTorch (2.13, `use_mkldnn` in ATen/native/Convolution.cpp) uses its own single-threaded loop where N * C * T * H is
    at most 20,480, as for few rows. The loop took up to 9 times as long, and it copies each cell once per cell of the
    kernel: 27 times the map.
    """
    options = stride, padding, dilation, transposed, output_padding, groups
    cells = Device(x.device).convolution_cells
    if cells is None or transposed or x.ndim < 4:
        return _convolution(x, weight, bias, *options)
    extent = (weight.shape[-2] - 1) * dilation[-2] + 1
    height, (step, around) = x.shape[-2], (stride[-2], padding[-2])
    rows = (height + 2 * around - extent) // step + 1
    cols = (x.shape[-1] + 2 * padding[-1] - (weight.shape[-1] - 1) * dilation[-1] - 1) // stride[-1] + 1
    if rows * cols <= cells:
        return _convolution(x, weight, bias, *options)
    parts, unpadded = [], (stride, (*padding[:-2], 0, padding[-1]), *options[2:])
    for start in range(0, rows, most := max(1, cells // cols)):
        first, last = start * step - around, (min(start + most, rows) - 1) * step - around + extent
        part = _rows(x, first, last, x.dtype)
        parts.append(_convolution(part, weight, bias, *unpadded))
    return torch.cat(parts, -2)


def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    if not transposed and _is_worth_moving(x, weight):
        moved = _convolution(x.contiguous(), weight, bias, stride, padding, dilation, False, output_padding, groups)
        return moved.contiguous(memory_format=_form(x))
    supported = (x.device.type, x.ndim, transposed) == ("cpu", 5, False)
    supported = supported and {value.dtype for value in (x, weight, bias) if value is not None} == {torch.float32}
    if supported and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled:
        bias = bias if bias is None else bias.contiguous()  # oneDNN ignores its strides
        return torch.mkldnn_convolution(x, weight, bias, padding, stride, dilation, groups)
    result: Tensor = torch.ops.aten.convolution.default(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )
    return result


def _is_worth_moving(x: Tensor, weight: Tensor) -> bool:
    """Whether a channels-last map is convolved faster as a contiguous one, copies of map and result included.

    PyTorch (2.13) copies the weights into the map's layout, and oneDNN copies them again. Where the map is smaller than
    the weights, these copies take most of the time. 512 to 512 channels, 3 x 3, of 8 x 8 cells take 15 ms channels last
    and 4 ms contiguous; 1024 to 1024, 3 x 3 x 3, of 5 x 16 x 16 cells 612 and 425 ms; 512 to 512 of 32 x 32 cells 39
    and 46 ms (fp32, one thread, AVX-512).
    """
    heavy = weight.numel() >= _HEAVIER.get(x.ndim - 2, math.inf) * x.numel()
    last = x.device.type == "cpu" and x.stride(1) == 1 and not x.is_contiguous()  # a map of 1 x 1 cells is both
    return heavy and last and weight.is_contiguous()


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """The FLOPs of oneDNN's convolution, which PyTorch's FLOP counter lacks (2.13)."""
    return conv_flop_count(list(x), list(weight), list(out_shape))


if torch.ops.aten.mkldnn_convolution not in flop_registry:
    register_flop_formula(torch.ops.aten.mkldnn_convolution)(_flops)


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """Compute a convolution of stride 1; in fp32 and row blocks on CPUs without units for the dtype.

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
    overlap, around = (weight.shape[-2] - 1) * dilation[-2], padding[-2]
    height = x.shape[-2]

    def rows(start: int, stop: int) -> Tensor:
        """Rows of the result."""
        first, last = start - around, stop - around + overlap
        part = _rows(x, first, last, torch.float32)
        return convolve(part, wide, bias if bias is None else bias.float(), (*padding[:-2], 0, padding[-1]))

    wide = weight.float()
    values = x[:, 0, ..., :1, :].numel() * max(x.shape[1], weight.shape[0])
    return _in_rows(rows, height + 2 * around - overlap, values, x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply `F.linear` over the channels of a channels-last map `[N, C, *, H, W]`; in fp32 as `convolved` does."""
    if x.device.type != "cpu" or has_units(x.dtype):
        return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
    wide, wide_bias = weight.float(), None if bias is None else bias.float()

    def rows(start: int, stop: int) -> Tensor:
        return F.linear(x[..., start:stop, :].movedim(1, -1).float(), wide, wide_bias).movedim(-1, 1)

    return _in_rows(rows, x.shape[-2], x[:, 0, ..., :1, :].numel() * max(weight.shape), x.dtype)


def _in_rows(rows: Callable[[int, int], Tensor], height: int, values: int, dtype: torch.dtype) -> Tensor:
    """Compute a result in row blocks and round it.

    Args:
        rows: computes the result's rows from a first one to a last one, exclusive.
        height: the number of rows.
        values: fp32 values in memory per row.
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
    """Return rows of a map, zeros outside it. Keeps the layout; `F.pad` does not for a batch of one."""
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
    """The memory format of a map: channels last or contiguous."""
    return {4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim] if x.stride(1) == 1 else torch.contiguous_format
