"""A tensor with the logical shape of a whole map, of which this rank holds a shard."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halovae.plane.layout import Layout, shape

if TYPE_CHECKING:
    from halovae.plane.plane import Plane


class PlaneTensor(Tensor):
    """A partitioned tensor. Modules use it like the whole tensor.

    Attributes:
        local: this rank's shard.
        partition: the tensor's layout.
        plane: the plane that ranks share.
        frozen: why it cannot be written in place: its memory is not the view that plain PyTorch would write through.
            Empty if it can.
        source: for a copy that stands for a view: the tensor that was copied, and its version at that time.
        padded: for a map that was padded with zeros while a graph is recorded: the map before, the widths as for
            `constant_pad_nd`, and the path of the submodule that padded it.

    Its strides are those of the whole tensor in plain PyTorch. So all ranks decide as plain PyTorch does whether a view
    needs a copy. The strides of a rank's shard may differ.
    """

    local: Tensor
    partition: Layout
    plane: Plane
    frozen: str
    source: tuple[Tensor, int] | None
    padded: tuple[PlaneTensor, tuple[int, ...], str] | None = None

    def check_fresh(self) -> None:
        """Check that a copy that stands for a view still equals its base.

        Raises:
            RuntimeError: its base was written to since the copy.
        """
        if self.source is not None and self.source[0]._version != self.source[1]:
            raise RuntimeError(
                "this view of a partitioned tensor is a copy, since other ranks own cells of it, and its base was "
                "written to since"
            )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PlaneTensor({list(self.shape)}, local {list(self.local.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch()(func, args, {} if kwargs is None else kwargs)

    # `Interception` sees the functions that must be seen before PyTorch decomposes them.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


_make = torch.Tensor._make_wrapper_subclass


def made(
    local: Tensor, layout: Layout, plane: Plane, frozen: str = "", strides: tuple[int, ...] | None = None,
    source: tuple[Tensor, int] | None = None,
) -> PlaneTensor:  # fmt: skip
    """Make a plane tensor; contiguous, unless it has other `strides`.

    This is a function because a constructor takes longer, and each operator makes a plane tensor.
    """
    sizes = shape(layout)
    recorder = plane.recorder
    result: PlaneTensor = _make(
        PlaneTensor,
        sizes,
        strides=contiguous(sizes) if strides is None else strides,
        dtype=local.dtype,
        device=local.device if recorder is None else recorder.device,
    )
    result.local, result.partition, result.plane, result.frozen, result.source = local, layout, plane, frozen, source
    return result


@cache
def _dispatch() -> Any:
    """Return the dispatcher, which is imported late: rules import this module."""
    from halovae.plane.rules import dispatch

    return dispatch


@lru_cache(maxsize=4096)
def contiguous(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@lru_cache(maxsize=4096)
def strides_of_new(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a new tensor like one of these sizes and strides; contiguous if that one is contiguous."""
    default = contiguous(sizes)
    if all(a == b or size == 1 for a, b, size in zip(default, strides, sizes, strict=True)) or 0 in sizes:
        return default
    return dense(sizes, strides)


@lru_cache(maxsize=4096)
def dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a new tensor whose dims lie in memory in the order of another's, without gaps.

    They are the other's if it has no gaps, including odd strides of dims of size 1: PyTorch derives formats from them.
    """
    result, step = [0] * len(sizes), 1
    for dim in sorted(range(len(sizes)), key=lambda dim: (strides[dim], -dim)):
        result[dim] = step
        step *= max(sizes[dim], 1)
    gaps = any(extent > 1 and ours != own for extent, ours, own in zip(sizes, strides, result, strict=True))
    return tuple(result) if gaps else strides


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a map `[N, C, *]` lie side by side."""
    return _is_channels_last(x.shape, x.stride())


@lru_cache(maxsize=4096)
def _is_channels_last(sizes: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if len(sizes) not in (4, 5) or sizes[1] <= 1 or strides[1] != 1:
        return False
    default = contiguous(sizes)
    return 0 not in sizes and any(size > 1 and a != b for size, a, b in zip(sizes, strides, default, strict=True))


@lru_cache(maxsize=4096)
def channels_last(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a map `[N, C, *]` whose channels lie side by side."""
    inner = contiguous((sizes[0], *sizes[2:], sizes[1]))
    return (inner[0], inner[-1], *inner[1:-1])


def version(x: Tensor) -> tuple[Tensor, int] | None:
    """Return a tensor and its version, by which a copy of it detects later writes; None for inference tensors."""
    return None if x.is_inference() else (x, x._version)
