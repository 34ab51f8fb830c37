"""Triton kernels for maps `[N, C, *]`, one pass each over an accelerator's memory; one source for all of its devices.

Kernels compute in fp32, or in fp64 for fp64 maps, and round once. Attention also rounds its weights. They read and
write maps of any strides: channels-last and contiguous ones as they are, and parts of larger ones.
"""

from halovae.kernels.triton_kernels.copies import as_bytes, packed, unpack, upsample
from halovae.kernels.triton_kernels.norms import add, adds, group_norm, moments, norm_of_cells, together
from halovae.kernels.triton_kernels.softmax import attention

__all__ = [
    "add", "adds", "as_bytes", "attention", "group_norm", "moments", "norm_of_cells", "packed", "together", "unpack",
    "upsample",
]  # fmt: skip
