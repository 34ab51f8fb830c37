"""New tensors and random tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from halovae.plane.layout import replicated
from halovae.plane.rules.attention import attention
from halovae.plane.rules.pointwise import strides_like
from halovae.plane.rules.registry import plane_tensors, rule

if TYPE_CHECKING:
    from halovae.plane.plane import Plane

aten = torch.ops.aten


@rule(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like)
def like(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each rank makes its shard."""
    x, *rest = args
    strides = strides_like(x, kwargs.get("memory_format") or torch.preserve_format)
    return plane.wrap(func(x.local, *rest, **kwargs), x.partition, strides=strides)


@rule(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
def new(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A buffer of a map's size is partitioned as that map is; others are replicated."""
    x, sizes, *rest = args
    layout = plane.like_seen(tuple(sizes)) or replicated(tuple(sizes))
    return plane.wrap(func(x.local, plane.local_sizes(layout), *rest, **kwargs), layout)


@rule(
    aten.rand_like, aten.randn_like, aten.randint_like, aten.normal_, aten.uniform_, aten.bernoulli_, aten.bernoulli,
    aten.random_, aten.exponential_,
)  # fmt: skip
def random(plane: Plane, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Every rank draws the whole plane's numbers, as one device does, and keeps its shard."""
    x, *rest = args
    if func._schema.name == "aten::bernoulli":
        return NotImplemented
    if plane.mesh.grid.batch > 1:
        raise RuntimeError(
            f"{func}: ranks that share a batch would draw other numbers than one device; use a batch of 1"
        )
    # PyTorch draws in the order of memory.
    blank = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    drawn = func(blank, *rest, **kwargs)
    shard = plane.to_layout(plane.lift(drawn), x.partition)
    if func._schema.name.endswith("_"):
        x.local.copy_(shard.local)
        return x
    return plane.wrap(shard.local, shard.partition, "")


_MAKERS = frozenset((torch.zeros, torch.ones, torch.empty, torch.full))
_SEEN = _MAKERS | {F.scaled_dot_product_attention}


class Interception(TorchFunctionMode):
    """Intercepts functions that plane tensors do not see in time.

    Attention: PyTorch chooses a kernel before it dispatches. New buffers of a map's size: they are partitioned as that
    map is, so that no data moves when the map is written into one.
    """

    def __init__(self, plane: Plane) -> None:
        super().__init__()
        self._plane = plane

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _SEEN:  # the fast path: every function call passes through here
            return func(*args, **kwargs) if kwargs else func(*args)
        # `types` lacks plane tensors, whose own `__torch_function__` is disabled.
        if func is F.scaled_dot_product_attention and any(
            True for _ in plane_tensors((*args, *(kwargs or {}).values()))
        ):
            return attention(*args, **(kwargs or {}))
        if func in _MAKERS and not self._plane.inside:
            return self._made(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        sizes = args[0] if args and isinstance(args[0], (tuple, list)) else kwargs.get("size", args)
        layout = self._plane.like_seen(tuple(sizes))
        if layout is None:
            return func(*args, **kwargs)
        rest = args[1:] if args and sizes is args[0] else ()
        with self._plane.working():
            local = func(self._plane.local_sizes(layout), *rest, **{k: v for k, v in kwargs.items() if k != "size"})
        return self._plane.wrap(local, layout)
