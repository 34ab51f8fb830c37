"""A tensor with the logical shape of a whole map, of which this rank holds a part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halovae.plane.layout import Layout, shape

if TYPE_CHECKING:
    from halovae.plane.plane import Plane


class PlaneTensor(Tensor):
    """A partitioned tensor. Modules compute with it as with the whole one.

    Attributes:
        local: this rank's part.
        partition: which part that is.
        plane: the ranks that have the others.
        frozen: why it cannot be written in place: its memory is not the whole tensor's view that plain PyTorch would
            write through. Empty where it can.
    """

    local: Tensor
    partition: Layout
    plane: Plane
    frozen: str

    @staticmethod
    def __new__(cls, local: Tensor, layout: Layout, plane: Plane, frozen: str = "") -> PlaneTensor:
        sizes = shape(layout)
        device = plane.recorder.device if plane.recorder is not None else local.device
        made: PlaneTensor = torch.Tensor._make_wrapper_subclass(
            cls, sizes, strides=_strides(local, sizes), dtype=local.dtype, device=device
        )
        made.local, made.partition, made.plane, made.frozen = local, layout, plane, frozen
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PlaneTensor({list(self.shape)}, local {list(self.local.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        from halovae.plane.rules import dispatch

        return dispatch(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from halovae.plane.rules.attention import attention

        if func is F.scaled_dot_product_attention:  # torch chooses a kernel for it before it dispatches
            return attention(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _strides(local: Tensor, sizes: tuple[int, ...]) -> list[int]:
    """Strides of a whole tensor whose dims lie in memory in the order of its part's.

    With these, PyTorch decides alike for the whole and for the part whether a view needs a copy.
    """
    order = sorted(range(len(sizes)), key=lambda dim: (local.stride(dim), -dim)) if not local.is_contiguous() else None
    strides, step = [0] * len(sizes), 1
    for dim in reversed(range(len(sizes))) if order is None else order:
        strides[dim] = step
        step *= sizes[dim]
    return strides
