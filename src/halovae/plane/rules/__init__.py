"""Rules: what each operator does on partitioned tensors. One file for each kind of operator."""

from importlib import import_module

from halovae.plane.rules.registry import dispatch

_KINDS = (
    "attention", "convolution", "creation", "joins", "matmul", "normalization", "padding", "pointwise",
    "reductions", "resampling", "views",
)  # fmt: skip
for _kind in _KINDS:
    import_module(f"{__name__}.{_kind}")

__all__ = ["dispatch"]
