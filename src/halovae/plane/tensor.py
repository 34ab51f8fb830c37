"""A tensor with the logical shape of a whole map, of which this rank holds a part."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
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
    def __new__(
        cls, local: Tensor, layout: Layout, plane: Plane, frozen: str = "", like: PlaneTensor | None = None
    ) -> PlaneTensor:
        device = plane.recorder.device if plane.recorder is not None else local.device
        sizes: Any = shape(layout) if like is None else like.shape
        if local.is_contiguous():
            strides = contiguous(tuple(sizes))
        elif like is not None and like.local.stride() == local.stride():
            strides = like.stride()
        else:
            strides = _strides(local, sizes)
        made: PlaneTensor = torch.Tensor._make_wrapper_subclass(
            cls, sizes, strides=strides, dtype=local.dtype, device=device
        )
        made.local, made.partition, made.plane, made.frozen = local, layout, plane, frozen
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PlaneTensor({list(self.shape)}, local {list(self.local.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch()(func, args, kwargs or {})

    # `Interception` sees functions that must be seen before PyTorch takes them apart.
    __torch_function__ = torch._C._disabled_torch_function_impl


@cache
def _dispatch() -> Any:
    """Rules know tensors, so they are imported once there is one."""
    from halovae.plane.rules import dispatch

    return dispatch


@cache
def contiguous(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _strides(local: Tensor, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a whole tensor whose dims lie in memory in the order of its part's.

    With these, PyTorch decides alike for the whole and for the part whether a view needs a copy.
    """
    own = local.stride()
    strides, step = [0] * len(sizes), 1
    for dim in sorted(range(len(sizes)), key=lambda dim: (own[dim], -dim)):
        strides[dim] = step
        step *= sizes[dim]
    return tuple(strides)
