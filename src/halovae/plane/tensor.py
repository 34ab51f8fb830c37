"""A tensor with the logical shape of a whole map, of which this rank holds a part."""

from __future__ import annotations

from functools import cache, lru_cache
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
        source: of a copy that stands for a view: whose memory was copied, and how often that had been written to.
        padded: of a map padded with zeros while a graph is recorded: the map, the widths as `constant_pad_nd` has them,
            and the path of the submodule that padded it.

    Its strides are those that plain PyTorch would give the whole tensor, so that all ranks decide alike, and as plain
    PyTorch does, whether a view needs a copy. How a rank's part lies in memory may differ.
    """

    local: Tensor
    partition: Layout
    plane: Plane
    frozen: str
    source: tuple[Tensor, int] | None
    padded: tuple[PlaneTensor, tuple[int, ...], str] | None = None

    def check_fresh(self) -> None:
        """Make sure that a copy that stands for a view still has what its base has.

        Raises:
            RuntimeError: its base was written to since.
        """
        if self.source is not None and self.source[0]._version != self.source[1]:
            raise RuntimeError(
                "this view of a partitioned tensor is a copy, since other ranks had part of it, and its base was "
                "written to since"
            )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PlaneTensor({list(self.shape)}, local {list(self.local.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch()(func, args, {} if kwargs is None else kwargs)

    # `Interception` sees functions that must be seen before PyTorch takes them apart.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


_make = torch.Tensor._make_wrapper_subclass


def made(
    local: Tensor, layout: Layout, plane: Plane, frozen: str = "", strides: tuple[int, ...] | None = None,
    source: tuple[Tensor, int] | None = None,
) -> PlaneTensor:  # fmt: skip
    """A plane tensor; contiguous, unless it has other `strides`.

    A function, since a class's own call takes longer, and each operator makes one.
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
    """Rules know tensors, so they are imported once there is one."""
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
    """The strides of a new tensor like one of these sizes and strides: contiguous ones, if that one is contiguous."""
    whole = contiguous(sizes)
    if all(a == b or size == 1 for a, b, size in zip(whole, strides, sizes, strict=True)) or 0 in sizes:
        return whole
    return dense(sizes, strides)


@lru_cache(maxsize=4096)
def dense(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a new tensor whose dims lie in memory in the order of another's, without gaps.

    They are the other's where it has no gaps, even odd ones of dims of size 1: PyTorch tells formats apart by them.
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
    whole = contiguous(sizes)
    return 0 not in sizes and any(size > 1 and a != b for size, a, b in zip(sizes, strides, whole, strict=True))


@lru_cache(maxsize=4096)
def channels_last(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a map `[N, C, *]` whose channels lie side by side."""
    inner = contiguous((sizes[0], *sizes[2:], sizes[1]))
    return (inner[0], inner[-1], *inner[1:-1])


def version(x: Tensor) -> tuple[Tensor, int] | None:
    """What a copy that stands for a view must compare with, to see that its base was written to."""
    return None if x.is_inference() else (x, x._version)
